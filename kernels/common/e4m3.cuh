// e4m3.cuh: 8-bit floats of 4 bits of exponent and 3 of fraction: up to 448, no infinities, subnormals in units of 2^-9
//   (OCP 8-bit Floating Point Specification, 2023).
#pragma once
#include "device.cuh"

constexpr float kLargestE4m3 = 448.f;

struct e4m3 {
    uint8_t code;
};

// Exact.
DEVICE float to_f32(e4m3 x) {
    const uint32_t magnitude = x.code & 0x7fu;
    // The bits as those of an f32, whose exponent's bias is 127 instead of 7.
    const float value = __uint_as_float(magnitude << 20) * 1.329227995784915873e36f;  // 2^120
    const float any = magnitude == 0x7fu ? __uint_as_float(0x7fffffffu) : value;
    return x.code & 0x80u ? -any : any;
}

// Four values, rounded to nearest even, the first in the lowest byte; what is larger than 448 becomes 448, NaN stays NaN.
DEVICE uint32_t pack_e4m3(const float (&x)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    uint16_t low, high;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(x[1]), "f"(x[0]));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(x[3]), "f"(x[2]));
    return uint32_t(low) | uint32_t(high) << 16;
#else
    uint32_t packed = 0;
    UNROLL
    for (int i = 0; i < 4; i++) {
        const float magnitude = fabsf(x[i]);
        const uint32_t bits = __float_as_uint(magnitude);
        // To 3 bits of fraction; below 2^-6 to units of 2^-9: beside 2^14 nothing smaller has a place in f32.
        const uint32_t normal = ((bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20) - (120u << 3);
        const uint32_t subnormal = __float_as_uint(magnitude + 16384.f) - __float_as_uint(16384.f);
        uint32_t code = magnitude < 0.015625f ? subnormal : normal;
        if (magnitude >= kLargestE4m3) code = 0x7eu;
        if (magnitude != magnitude) code = 0x7fu;
        packed |= (code | (__float_as_uint(x[i]) >> 24 & 0x80u)) << (8 * i);
    }
    return packed;
#endif
}
DEVICE e4m3 to_e4m3(float x) {
    const float four[4] = {x, 0.f, 0.f, 0.f};
    return {uint8_t(pack_e4m3(four))};
}
