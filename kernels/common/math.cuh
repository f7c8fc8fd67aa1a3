// Nonlinearities and clamps in f32; all of them pass NaN through.
#pragma once
#include "device.cuh"

constexpr float kLog2E = 1.44269504088896340736f;

// z / (1 + exp(-z)), relative error eps (|z| + 3); 0 where the result is subnormal.
DEVICE float silu(float z) { return z * rcp_approx(1.f + exp2_approx(-kLog2E * z)); }

// z / (1 + exp(-1.702 z))
DEVICE float quick_gelu(float z) { return z * rcp_approx(1.f + exp2_approx(-1.702f * kLog2E * z)); }

// z/2 (1 + erf(z / sqrt 2)), as z/2 erfc(-z / sqrt 2): at z = -4 the sum would cancel to three digits.
DEVICE float gelu(float z) { return 0.5f * z * erfcf(-0.70710678118654752440f * z); }

// The same for a result that is stored in 16 bits: relative error below 1e-5 for -13 < z < 13 (5e-6 above -6), where
// storing costs up to 2^-11 in f16 and 2^-8 in bf16; a third of erfcf's instructions. With a = |z|:
//   erfc(a / sqrt 2) / 2 = exp(-a^2 / 2) u P(u),  u = 1 / (1 + 0.308 a)
// the form of Abramowitz & Stegun 7.1.26; P minimises the largest relative error on 0 <= a <= 14.
DEVICE float gelu_16_bit(float z) {
    const float u = rcp_approx(fmaf(0.308f, fabsf(z), 1.f));
    float p = fmaf(-0.07543399930000305f, u, 0.1896267831325531f);
    p = fmaf(p, u, 0.00726676220074296f);
    p = fmaf(p, u, 0.13653483986854553f);
    p = fmaf(p, u, 0.11888138204813004f);
    p = fmaf(p, u, 0.12312265485525131f);
    const float tail = exp2_approx(-0.5f * kLog2E * z * z) * (u * p);
    return z * (z < 0.f ? tail : 1.f - tail);
}

// z/2 (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))): (1 + tanh u) / 2 = 1 / (1 + exp(-2 u)), which cancels nowhere.
DEVICE float gelu_tanh(float z) {
    const float u = 0.79788456080286535588f * fmaf(0.044715f * z * z, z, z);
    return z * rcp_approx(1.f + exp2_approx(-2.f * kLog2E * u));
}

// min(max(x, low), high), but NaN stays NaN.
DEVICE float clamp(float x, float low, float high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

DEVICE bool is_finite(float x) { return fabsf(x) <= 3.402823466e38f; }
