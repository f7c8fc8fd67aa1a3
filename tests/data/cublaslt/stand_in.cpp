// cuBLASLt, as far as `bench --kernel` asks it, on the emulated card's memory, which is the host's: tests/bench.rs. Does the
// product that descriptors and layouts describe, columns first, in bf16; says what it was asked in the file that
// CUBLASLT_TEST_LOG names. Numbers are those of cublasLt.h.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

struct Descriptor {
    int compute, scale, transpose_a, epilogue;
    const uint16_t* bias;
};
struct Layout {
    int type;
    uint64_t rows, columns;
    int64_t leading;
};
struct Found {
    uint64_t algorithm[8];
    size_t workspace_bytes;
    int state;
    float waves;
    int reserved[4];
};
static_assert(sizeof(Found) == 96);

enum { kOk = 0, kInvalid = 7, kNotSupported = 15 };
enum { kBf16 = 14, kF32 = 0, kCompute32F = 68, kEpilogueBias = 4 };
static const uint64_t kAlgorithm = 0x5eed;
static size_t most_workspace;

template <class... Args>
static void say(const char* format, Args... args) {
    FILE* file = fopen(getenv("CUBLASLT_TEST_LOG"), "a");
    if (!file) abort();
    fprintf(file, format, args...);
    fputc('\n', file);
    fclose(file);
}

static float widen(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
static uint16_t narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

extern "C" {
int cublasLtCreate(void** handle) {
    say("create");
    *handle = new int;
    return kOk;
}
int cublasLtDestroy(void* handle) {
    say("destroy");
    delete static_cast<int*>(handle);
    return kOk;
}
int cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t columns, int64_t leading) {
    *layout = new Layout{type, rows, columns, leading};
    return kOk;
}
int cublasLtMatrixLayoutDestroy(Layout* layout) {
    delete layout;
    return kOk;
}
int cublasLtMatmulDescCreate(Descriptor** descriptor, int compute, int scale) {
    *descriptor = new Descriptor{compute, scale, 0, 1, nullptr};
    return kOk;
}
int cublasLtMatmulDescDestroy(Descriptor* descriptor) {
    delete descriptor;
    return kOk;
}
int cublasLtMatmulDescSetAttribute(Descriptor* descriptor, int attribute, const void* value, size_t bytes) {
    switch (attribute) {
        case 3: return bytes == 4 ? (memcpy(&descriptor->transpose_a, value, 4), kOk) : kInvalid;
        case 7: return bytes == 4 ? (memcpy(&descriptor->epilogue, value, 4), kOk) : kInvalid;
        case 8: return bytes == 8 ? (memcpy(&descriptor->bias, value, 8), kOk) : kInvalid;
        default: return kInvalid;
    }
}
int cublasLtMatmulPreferenceCreate(void** preference) {
    *preference = new int;
    return kOk;
}
int cublasLtMatmulPreferenceDestroy(void* preference) {
    delete static_cast<int*>(preference);
    return kOk;
}
int cublasLtMatmulPreferenceSetAttribute(void*, int attribute, const void* value, size_t bytes) {
    if (attribute != 1 || bytes != 8) return kInvalid;
    memcpy(&most_workspace, value, 8);
    return kOk;
}

static bool takes(const Descriptor* of, const Layout* a, const Layout* b, const Layout* c, const Layout* d) {
    for (const Layout* layout : {a, b, c, d}) {
        if (layout->type != kBf16 || layout->leading < int64_t(layout->rows)) return false;
    }
    return of->compute == kCompute32F && of->scale == kF32 && of->transpose_a == 1 && of->epilogue == kEpilogueBias &&
           of->bias && a->rows == b->rows && d->rows == a->columns && d->columns == b->columns;
}

int cublasLtMatmulAlgoGetHeuristic(void*, Descriptor* of, Layout* a, Layout* b, Layout* c, Layout* d, void*, int wanted,
                                   Found* found, int* count) {
    say("heuristic m %d n %d k %d", int(d->columns), int(d->rows), int(a->rows));
    *count = 0;
    if (!takes(of, a, b, c, d) || getenv("CUBLASLT_TEST_REFUSE")) return kNotSupported;
    if (wanted < 1) return kInvalid;
    memset(found, 0, sizeof *found);
    found->algorithm[0] = kAlgorithm;
    *count = 1;
    return kOk;
}

int cublasLtMatmul(void*, Descriptor* of, const float* alpha, const uint16_t* a, Layout* layout_a, const uint16_t* b,
                   Layout* layout_b, const float* beta, const uint16_t*, Layout* layout_c, uint16_t* d, Layout* layout_d,
                   const uint64_t* algorithm, void* workspace, size_t workspace_bytes, void* stream) {
    if (!takes(of, layout_a, layout_b, layout_c, layout_d)) return kNotSupported;
    if (!algorithm || *algorithm != kAlgorithm || !workspace || workspace_bytes != most_workspace || !stream) return kInvalid;
    if (*alpha != 1.f || *beta != 0.f) return kInvalid;
    const bool wrong = getenv("CUBLASLT_TEST_WRONG") != nullptr;
    for (uint64_t column = 0; column < layout_d->columns; column++) {
        for (uint64_t row = 0; row < layout_d->rows; row++) {
            double sum = wrong ? 0 : widen(of->bias[row]);
            for (uint64_t i = 0; i < layout_a->rows; i++) {
                sum += double(widen(a[row * layout_a->leading + i])) * widen(b[column * layout_b->leading + i]);
            }
            d[column * layout_d->leading + row] = narrow(float(sum));
        }
    }
    say("matmul m %d n %d k %d", int(layout_d->columns), int(layout_d->rows), int(layout_a->rows));
    return kOk;
}
}
