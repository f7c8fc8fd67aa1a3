// Group norm's input, the norm of an element whose group's statistics are known, and what follows it.
#pragma once
#include "activation.cuh"
#include "step_rows.cuh"
#include "vector.cuh"

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

// What is done to the normalised values z of an image, by its step: (1 + scale) z + shift, both [C], columns of one row of a
// table. As src/ops/cuda/norm.rs has it; tests/kernel_arguments.rs compares the two.
template <class T>
struct ModulationArgs {
    StepRowsArgs<T> rows;  // of a table that is null where there is no modulation
    int scale, shift;      // columns of it with which they begin
};

// Takes the modulation of an image into gamma and beta of V channels, of which normalise() then makes the modulated value:
//   (1 + scale) ((x - mean) rstd gamma + beta) + shift = (x - mean) rstd ((1 + scale) gamma) + ((1 + scale) beta + shift)
template <int V, class T>
DEVICE void modulate(float (&gamma)[V], float (&beta)[V], const ModulationArgs<T>& modulation, int image, int channel) {
    if (modulation.rows.table == nullptr) return;
    const T* row = row_of(modulation.rows, image) + channel;
    float scale[V], shift[V];
    load<V>(scale, row + modulation.scale);
    load<V>(shift, row + modulation.shift);
    UNROLL
    for (int j = 0; j < V; j++) {
        gamma[j] *= 1.f + scale[j];
        beta[j] = fmaf(beta[j], 1.f + scale[j], shift[j]);
    }
}

// kNone, kSilu or kGelu, of results of T.
template <class T, int V>
DEVICE void activate_normed(float (&values)[V], int activation) {
    if (activation == kSilu) {
        UNROLL
        for (int j = 0; j < V; j++) values[j] = silu(values[j]);
    } else if (activation == kGelu) {
        UNROLL
        for (int j = 0; j < V; j++) values[j] = gelu_for<T>(values[j]);
    }
}
