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

// min(max(x, low), high), but NaN stays NaN.
DEVICE float clamp(float x, float low, float high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

DEVICE bool is_finite(float x) { return fabsf(x) <= 3.402823466e38f; }
