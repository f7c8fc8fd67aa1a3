// activation.cuh: the activations, in f32. Numbers as in src/ops/elementwise.rs.
#pragma once
#include "device.cuh"

constexpr float kLog2E = 1.4426950408889634f;

// x / (1 + e^-x); -inf gives NaN (inf / inf), as the formula does.
DEVICE float silu(float x) { return x * rcp_approx(1.0f + exp2_approx(-kLog2E * x)); }

// x / (1 + e^(-1.702 x))
DEVICE float quick_gelu(float x) { return x * rcp_approx(1.0f + exp2_approx(-1.702f * kLog2E * x)); }

// x/2 (1 + erf(x / sqrt 2)). For z >= 0: 1 - erf(z) = e^(-z^2) t P(2t - 1), t = 1 / (1 + z/2), P fitted for relative
// error (4e-8); the normal distribution's tail keeps its relative precision.
DEVICE float gelu(float x) {
    const float z = fabsf(x) * 0.70710678f;
    const float t = rcp_approx(0.5f * z + 1.0f), s = 2.0f * t - 1.0f;
    float p = -0.00023121474f;
    p = p * s + 0.0003781779f;
    p = p * s + 0.0014894739f;
    p = p * s + -0.0032191633f;
    p = p * s + -0.010741645f;
    p = p * s + 0.01821768f;
    p = p * s + 0.13973479f;
    p = p * s + 0.34358048f;
    p = p * s + 0.51079136f;
    const float tail = 0.5f * t * p * exp2_approx(-kLog2E * (z * z));
    return x * (x < 0.0f ? tail : 1.0f - tail);
}
