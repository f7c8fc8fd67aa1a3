// Group norm of an element whose group's statistics are known.
#pragma once
#include "device.cuh"

// (x - mean) / sqrt(var + eps) * gamma + beta. The difference comes first: folded into one multiplication and addition
// (x * scale + shift) it would cancel at |mean| >> std.
DEVICE float normalise(float x, float2 statistics, float gamma, float beta) {
    const float mean = statistics.x, rstd = statistics.y;
    return fmaf(x - mean, rstd * gamma, beta);
}
