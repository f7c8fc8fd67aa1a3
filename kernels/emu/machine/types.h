// CUDA's vector types, f16 and bf16 with the card's rounding, and the arithmetic words of CUDA, in plain C++20.
#pragma once
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
// Never define __noinline__: libstdc++ writes __attribute__((__noinline__)).

struct alignas(4) uchar4 {
    unsigned char x, y, z, w;
};
struct alignas(4) ushort2 {
    unsigned short x, y;
};
struct alignas(8) ushort4 {
    unsigned short x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct uint3 {
    unsigned x, y, z;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) longlong2 {
    long long x, y;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
static inline ushort2 make_ushort2(unsigned short x, unsigned short y) { return {x, y}; }
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Storage types: arithmetic is done in f32.
struct bf16 {
    uint16_t x;
};
struct f16 {
    uint16_t x;
};

static inline float to_f32(float x) { return x; }
static inline float to_f32(bf16 x) { return std::bit_cast<float>(uint32_t(x.x) << 16); }
static inline float to_f32(f16 x) {
    const uint32_t magnitude = x.x & 0x7fff, sign = uint32_t(x.x & 0x8000) << 16;
    const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;  // exact, subnormals too
    const uint32_t exponent = magnitude >= 0x7c00 ? 0x7f800000u : 0u;       // Inf and NaN
    return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | exponent | sign);
}

// Round to nearest even; every NaN becomes the card's own, 0x7fff.
static inline bf16 to_bf16(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
static inline f16 to_f16(float x) {
    const uint32_t all = std::bit_cast<uint32_t>(x), sign = all >> 16 & 0x8000, bits = all & 0x7fffffff;
    if (bits > 0x7f800000) return {0x7fff};
    if (bits >= 0x47800000) return {uint16_t(sign | 0x7c00)};  // 2^16 and more: Inf
    if (bits < 0x38800000) {                                   // below 2^-14: subnormal. 0.5 has the ulp 2^-24
        const float sum = std::bit_cast<float>(bits) + 0.5f;
        return {uint16_t(sign | (std::bit_cast<uint32_t>(sum) - 0x3f000000))};
    }
    return {uint16_t(sign | ((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13))};
}
static inline uint32_t pack_f16(float low, float high) { return to_f16(low).x | uint32_t(to_f16(high).x) << 16; }
static inline uint32_t pack_bf16(float low, float high) { return to_bf16(low).x | uint32_t(to_bf16(high).x) << 16; }

namespace emu {
// The .ftz of an instruction: a subnormal is zero of its sign. NaN is not below.
static inline float flush_subnormal(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }
}  // namespace emu

// ex2.approx.ftz and rcp.approx.ftz, more accurate than the card's (2 ulp and 1 ulp).
static inline float exp2_approx(float x) { return emu::flush_subnormal(exp2f(emu::flush_subnormal(x))); }
static inline float rcp_approx(float x) { return emu::flush_subnormal(1.0f / emu::flush_subnormal(x)); }

// glibc declares ::__expf, ::__logf: macros, not functions.
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __frcp_rn(float x) { return 1.0f / x; }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline double rsqrt(double x) { return 1.0 / sqrt(x); }
static inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
static inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
static inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
static inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
static inline int __popc(unsigned x) { return std::popcount(x); }
static inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
template <class T>
static inline T __ldg(const T* p) {
    return *p;
}

static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }
static inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
static inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
static inline long min(long a, long b) { return a < b ? a : b; }
static inline long max(long a, long b) { return a > b ? a : b; }
static inline long long min(long long a, long long b) { return a < b ? a : b; }
static inline long long max(long long a, long long b) { return a > b ? a : b; }
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }
