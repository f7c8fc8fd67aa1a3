// What kernels read of a sampler's step: a row of its table, and the network's output, guided.
#pragma once
#include "device.cuh"

// The columns of a row of the table, as src/ops/step/table.rs writes them.
enum Column {
    kInputScale,
    kX0FromX,
    kX0FromE,
    kClip,  // +inf: none
    kNextFromX,
    kNextFromE,
    kNextFromX0,
    kNextFromNoise,
    kX0FromNext,       // 1: x0 is computed from the updated x
    kNextFromHistory,  // three: of the latest value kept, the one before, and its
    kKeeps = kNextFromHistory + 3,  // 1: the history moves on by one, to take what follows
    kKeptFromX,
    kKeptFromE,
    kKeptFromX0,
    kLearnsNoise,  // 1: the noise's deviation is what the network makes of the two that follow
    kLogSmallest,
    kLogLargest,
    kColumns = 19
};

// The row of an image: of `step_images` images with a step of their own, which a larger batch repeats.
//   step [2, step_images]: the steps, then how many each image still takes; 0: it has ended
DEVICE const float* row(const float* table, const unsigned* step, int64_t image, int step_images) {
    return table + size_t(step[image % step_images]) * kColumns;
}

// What an evaluation left, read where it is needed: the output of a batch of images, guided. A network that also predicts the
// variance of its noise has 2 C channels: of each pixel C values of the output, then C of the variance.
template <class T>
struct Output {
    const T* values;        // [half()], or guided [2 half()]: the unconditional half first
    const float* guidance;  // [images, 2], scale and rescale; null: values are as the network gave them
    const float* factors;   // [images]; null: 1
    int64_t count;          // of the samples' values
    int variance_channels;  // C of the network that predicts a variance; 0: it predicts none

    // Where the output for value i of the samples is: the pixels before it have a variance each.
    __device__ int64_t place(int64_t i) const {
        return variance_channels == 0 ? i : i + i / variance_channels * variance_channels;
    }

    // The same from an image's first value on, whose output is less than 2^32 values.
    __device__ unsigned place_in_image(unsigned i) const {
        return variance_channels == 0 ? i : i + i / unsigned(variance_channels) * unsigned(variance_channels);
    }

    __device__ int64_t half() const { return variance_channels == 0 ? count : 2 * count; }

    __device__ float at(int64_t i, int64_t image) const {
        const T* value = values + place(i);
        float e = to_f32(*value);
        if (guidance) e += guidance[2 * image] * (to_f32(value[half()]) - e);
        return factors ? e * factors[image] : e;
    }

    // What the network says of the variance of value i, with its condition: the unconditional half is not read.
    __device__ float variance(int64_t i) const {
        return to_f32(values[place(i) + variance_channels + (guidance ? half() : 0)]);
    }
};
