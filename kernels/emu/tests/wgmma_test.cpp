// wgmma in every form against a plain computation: widths, types, layouts of shared memory, `a` in registers; and the
// mistakes that its rules about registers and fences invite.
#include "harness.h"

#include <cmath>

#include "common/wgmma.cuh"

enum class Form { Shared, Registers, E4m3 };

// Where an element lies: rows of `row_bytes` (16: no swizzle) along k, or along the other dimension where mn_major.
struct Layout {
    uint32_t row_bytes = 128, leading = 0, stride = 1024, start = 0;
    bool mn_major = false;

    Swizzle swizzle() const {
        if (row_bytes == 16) return Swizzle::None;
        return row_bytes == 128 ? Swizzle::Bytes128 : row_bytes == 64 ? Swizzle::Bytes64 : Swizzle::Bytes32;
    }
    // Of the byte `k` (in bytes, K-major) of a row; MN-major, of the two bytes of element (row, k / 2).
    uint32_t at(uint32_t row, uint32_t k) const {
        const uint32_t chunk_bits = row_bytes / 16 - 1;
        uint32_t address = start;
        if (mn_major) {
            const uint32_t element = k / 2, width = row_bytes / 2;
            address += row_bytes == 16 ? row / 8 * stride + element / 8 * leading + element % 8 * 16 + row % 8 * 2
                                       : row / width * leading + element / 8 * stride + element % 8 * row_bytes + row % width * 2;
            address += k % 2;
        } else {
            address += row_bytes == 16 ? row / 8 * stride + row % 8 * 16 + k / 16 * leading + k % 16
                                       : row / 8 * stride + row % 8 * row_bytes + k;
        }
        return address ^ (address / 128 & chunk_bits) * 16;
    }
};

constexpr uint32_t kImageA = 16 * 1024, kImageB = 64 * 1024;
struct Images {
    alignas(1024) uint4 a[kImageA / 16];
    alignas(1024) uint4 b[kImageB / 16];
};
struct Product {
    const uint4 *a, *b;           // images
    const uint32_t* a_registers;  // [128][4]
    const float* c;               // [64, N], or null
    float* d;                     // [64, N]
    Layout a_layout, b_layout;
};

template <class T, int N>
DEVICE void multiply(const Product& p, Form form, Images& s) {
    float d[N / 2];
    const int thread = int(threadIdx.x), top = thread / 32 * 16 + thread % 32 / 4, left = thread % 4 * 2;
    const auto place = [&](int i) { return (top + i / 2 % 2 * 8) * N + i / 4 * 8 + left + i % 2; };
    for (int i = 0; i < N / 2; i++) d[i] = p.c ? p.c[place(i)] : 1e30f;
    uint32_t registers[4];
    for (int i = 0; i < 4; i++) registers[i] = p.a_registers ? p.a_registers[thread * 4 + i] : 0;
    const auto descriptor = [](const void* image, const Layout& l) {
        return wgmma_descriptor(l.swizzle(), smem_u32(image) + l.start, l.leading, l.stride);
    };
    const uint64_t a = descriptor(s.a, p.a_layout), b = descriptor(s.b, p.b_layout);
    wgmma_fence();
    if (form == Form::E4m3) {
        wgmma_e4m3<N>(d, a, b, p.c != nullptr);
    } else if (form == Form::Registers) {
        if (p.b_layout.mn_major) {
            wgmma_registers<T, N, 1>(d, registers, b, p.c != nullptr);
        } else {
            wgmma_registers<T, N>(d, registers, b, p.c != nullptr);
        }
    } else if (p.b_layout.mn_major) {
        wgmma<T, N, 1>(d, a, b, p.c != nullptr);
    } else {
        wgmma<T, N>(d, a, b, p.c != nullptr);
    }
    wgmma_commit();
    wgmma_wait<0>();
    for (int i = 0; i < N / 2; i++) p.d[place(i)] = d[i];
}

template <class T, int N = 8>
DEVICE void multiply_of_width(int n, const Product& p, Form form, Images& s) {
    if (n == N) return multiply<T, N>(p, form, s);
    if constexpr (N < 256) multiply_of_width<T, N + 8>(n, p, form, s);
}

KERNEL(multiplies_once, 128, 1)(Product p, int n, int is_bf16, Form form) {
    SHARED_DYNAMIC(Images, s);
    for (uint32_t i = threadIdx.x; i < kImageA / 16; i += 128) s.a[i] = p.a[i];
    for (uint32_t i = threadIdx.x; i < kImageB / 16; i += 128) s.b[i] = p.b[i];
    fence_proxy_async();
    __syncthreads();
    is_bf16 ? multiply_of_width<bf16>(n, p, form, s) : multiply_of_width<f16>(n, p, form, s);
}
REGISTER_KERNEL(multiplies_once)

static float from_e4m3(uint8_t x) {
    const int exponent = x >> 3 & 15, mantissa = x & 7;
    const float magnitude = exponent ? std::ldexp(float(8 + mantissa), exponent - 10) : std::ldexp(float(mantissa), -9);
    return (x & 0x7f) == 0x7f ? NAN : x & 0x80 ? -magnitude : magnitude;
}

// One product of random factors, all sums exact, in the current mode.
static void check_product(int n, bool is_bf16, Form form, Layout a_layout, Layout b_layout, bool accumulate, int line) {
    const int depth = form == Form::E4m3 ? 32 : 16, bytes = 32 / depth;
    Random random;
    random.state = uint64_t(n * 8 + is_bf16 * 4 + int(form));
    Buffer<uint4> a(kImageA / 16), b(kImageB / 16);
    Buffer<uint32_t> registers(128 * 4);
    Buffer<float> c(size_t(64 * n)), d(size_t(64 * n));
    std::vector<float> a_value(size_t(64 * depth)), b_value(size_t(n * depth));
    const auto fill = [&](std::vector<float>& values, Buffer<uint4>& image, const Layout& layout) {
        for (size_t i = 0; i < values.size(); i++) {
            uint16_t code;
            if (form == Form::E4m3) {
                // Exponents 2^-2 to 2, so that no sum is rounded; or zero.
                const uint32_t bits = random.next();
                code = bits % 8 == 0 ? 0 : uint16_t((bits >> 3 & 0x87) | (5 + (bits >> 12) % 4) << 3);
                values[i] = from_e4m3(uint8_t(code));
            } else {
                values[i] = random.small_integer() * 0.5f;
                code = is_bf16 ? to_bf16(values[i]).x : to_f16(values[i]).x;
            }
            const uint32_t row = uint32_t(i) / uint32_t(depth), k = uint32_t(i) % uint32_t(depth);
            memcpy(reinterpret_cast<char*>(image.data) + layout.at(row, k * uint32_t(bytes)), &code, size_t(bytes));
        }
    };
    fill(a_value, a, a_layout);
    fill(b_value, b, b_layout);
    for (int t = 0; t < 128; t++) {
        for (int i = 0; i < 4; i++) {
            const int row = t / 32 * 16 + t % 32 / 4 + i % 2 * 8, k = t % 4 * 2 + i / 2 * 8;
            const float low = a_value[size_t(row * depth + k)], high = a_value[size_t(row * depth + k + 1)];
            registers[size_t(t * 4 + i)] = is_bf16 ? pack_bf16(low, high) : pack_f16(low, high);
        }
    }
    for (size_t i = 0; i < c.count; i++) c[i] = random.small_integer();
    const Product product{a.data, b.data, registers.data, accumulate ? c.data : nullptr, d.data, a_layout, b_layout};
    expect_clean(run("multiplies_once", dim3(1), dim3(128), sizeof(Images), product, n, int(is_bf16), form), line);
    int wrong = 0;
    for (int i = 0; i < 64 * n; i++) {
        double sum = accumulate ? c[size_t(i)] : 0.;
        for (int k = 0; k < depth; k++) sum += double(a_value[size_t(i / n * depth + k)]) * b_value[size_t(i % n * depth + k)];
        wrong += !(d[size_t(i)] == float(sum));
    }
    if (wrong) {
        fail("line %d: %d of %d wrong, n = %d, %s, form %d (%s)", line, wrong, 64 * n, n, is_bf16 ? "bf16" : "f16", int(form),
             mode_name().c_str());
    }
}

TEST(wgmma_of_every_width) {
    for (int n = 8; n <= 256; n += 8) {
        const Layout rows, columns{128, 2048, 1024, 0, true};
        for (const bool is_bf16 : {true, false}) {
            check_product(n, is_bf16, Form::Shared, rows, rows, n % 16 == 0, __LINE__);
            check_product(n, is_bf16, Form::Shared, rows, columns, n % 16 != 0, __LINE__);
            check_product(n, is_bf16, Form::Registers, rows, rows, n % 16 != 0, __LINE__);
            check_product(n, is_bf16, Form::Registers, rows, columns, n % 16 == 0, __LINE__);
        }
        check_product(n, false, Form::E4m3, rows, rows, n % 16 == 0, __LINE__);
    }
}
