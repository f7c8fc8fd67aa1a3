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
    kColumns = 16
};

// The row of an image: of `step_images` images with a step of their own, which a larger batch repeats.
//   step [2, step_images]: the steps, then how many each image still takes; 0: it has ended
DEVICE const float* row(const float* table, const unsigned* step, int64_t image, int step_images) {
    return table + size_t(step[image % step_images]) * kColumns;
}

// What an evaluation left, read where it is needed: the output of a batch of images, guided.
template <class T>
struct Output {
    const T* values;        // [count], or guided [2 count]: the unconditional half first
    const float* guidance;  // [images, 2], scale and rescale; null: values are as the network gave them
    const float* factors;   // [images]; null: 1
    int64_t count;

    __device__ float at(int64_t i, int64_t image) const {
        float e = to_f32(values[i]);
        if (guidance) e += guidance[2 * image] * (to_f32(values[count + i]) - e);
        return factors ? e * factors[image] : e;
    }
};
