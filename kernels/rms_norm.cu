// rms_norm.cu: root mean square norm over the last dimension; Zhang & Sennrich 2019, arXiv:1910.07467.
//   y = x / sqrt(mean(x^2) + eps) * gamma
//   y, x [rows, C]   gamma [C]   T = f32 | f16 | bf16   eps: units of x squared
// Arithmetic in f32, rounded once, at the store. An infinity makes NaN in its own place and 0 elsewhere in its row; where
// the squares themselves leave f32 (|x| > 1e19) the row is 0: both as the formula says in f32.
//
// Memory bound, ideally 2 rows C sizeof(T) bytes: x comes from DRAM once, the second time from L1 (8 KiB a block at the
// longest row of T5). One entry, two ways, which the host picks by C alone, so that a row's result depends on nothing else:
//   rms_norm       a warp a row, 8 rows a block, no barrier: short rows and many (SD3's queries and keys, C = 64)
//   rms_norm_wide  a block a row: long rows and few (T5, C = 4096)
// Launch: grid ceil(rows / 8) or rows, block kThreads. `vector`: C is a multiple of kVector, all pointers aligned to 16.
#include "common/reduce.cuh"
#include "common/vector.cuh"

constexpr int kThreads = 256;

// `kRowThreads`: 32 or kThreads, those that share a row.
template <int kRowThreads, int V, class T>
DEVICE void rms_norm(T* y, const T* x, const T* gamma, int64_t rows, int channels, float eps) {
    static_assert(kRowThreads == 32 || kRowThreads == kThreads);
    const int64_t row = int64_t(blockIdx.x) * (kThreads / kRowThreads) + threadIdx.x / kRowThreads;
    if (!GUARD(row < rows)) return;
    x += row * channels;
    y += row * channels;
    const int first = threadIdx.x % kRowThreads * V, step = kRowThreads * V;
    float values[V], squares = 0.f;
    for (int c = first; c < channels; c += step) {
        load<V>(values, x + c);
        UNROLL
        for (int j = 0; j < V; j++) squares = fmaf(values[j], values[j], squares);
    }
    if constexpr (kRowThreads == 32) {
        squares = warp_sum(squares);
    } else {
        SHARED_STATIC(float, sums, [kThreads / 32]);
        squares = block_sum(squares, sums);
    }
    const float scale = 1.f / sqrtf(squares / channels + eps);
    for (int c = first; c < channels; c += step) {
        float gammas[V];
        load<V>(values, x + c);
        load<V>(gammas, gamma + c);
        UNROLL
        for (int j = 0; j < V; j++) values[j] = values[j] * scale * gammas[j];
        store<V>(y + c, values);
    }
}

#define ENTRY(name, kRowThreads, T)                                                                                    \
    KERNEL(name, kThreads, 1)(T* y, const T* x, const T* gamma, int64_t rows, int channels, float eps, int vector) {   \
        follow_previous();                                                                                             \
        if (vector) {                                                                                                  \
            rms_norm<kRowThreads, kVector>(y, x, gamma, rows, channels, eps);                                          \
        } else {                                                                                                       \
            rms_norm<kRowThreads, 1>(y, x, gamma, rows, channels, eps);                                                \
        }                                                                                                              \
    }                                                                                                                  \
    REGISTER_KERNEL(name)

ENTRY(rms_norm_f32, 32, float)
ENTRY(rms_norm_f16, 32, f16)
ENTRY(rms_norm_bf16, 32, bf16)
ENTRY(rms_norm_wide_f32, kThreads, float)
ENTRY(rms_norm_wide_f16, kThreads, f16)
ENTRY(rms_norm_wide_bf16, kThreads, bf16)
