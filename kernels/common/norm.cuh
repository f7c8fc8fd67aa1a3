// Group norm's input, and the norm of an element whose group's statistics are known.
#pragma once
#include "device.cuh"

// Two sources side by side; b is null and channels_b 0 where there is one.
template <class T>
struct Sources {
    const T* a;
    const T* b;
    int channels_a, channels_b;

    __device__ int channels() const { return channels_a + channels_b; }
    // Element [pixel, channel]; a vector of channels never lies in both sources.
    __device__ const T* at(int64_t pixel, int channel) const {
        return channel < channels_a ? a + pixel * channels_a + channel : b + pixel * channels_b + (channel - channels_a);
    }
    // Elements from one pixel to the next.
    __device__ int64_t stride(int channel) const { return channel < channels_a ? channels_a : channels_b; }
};

// {mean, 1 / sqrt(var + eps)} of `squares` squared deviations of `count` elements.
DEVICE float2 finished(float mean, float squares, float count, float eps) {
    return make_float2(mean, 1.f / sqrtf(squares / count + eps));
}

// (x - mean) / sqrt(var + eps) * gamma + beta. The difference comes first: folded into one multiplication and addition
// (x * scale + shift) it would cancel at |mean| >> std.
DEVICE float normalise(float x, float2 statistics, float gamma, float beta) {
    const float mean = statistics.x, rstd = statistics.y;
    return fmaf(x - mean, rstd * gamma, beta);
}
