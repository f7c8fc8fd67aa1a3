// upsample_guidance.cu: a network's output, corrected by what the network says of a smaller map.
// Hwang, Park & Jo 2024, arXiv:2404.01709.
//
//   pool_latents        y = D[x]                                           means over squares of m x m cells
//   upsample_guidance   y = e + U[k0 low + k1 pooled - k2 D[e]]            U repeats each cell m x m times
//     x [images, m h, m w, C] f32   e, y [rows, m h, m w, C] T   low [rows, h, w, C] T   pooled [images, h, w, C] f32
//     rows: the images, once or twice   k [steps, 3] f32, the row of the image's step   count = values of the smaller map
//     step: of `step_images` images, which a larger batch repeats, as in step.cuh
// Memory bound: what is read and written, once; one launch over a map of latents. A thread has a square of one channel.
// Launch: grid ceil(count / kThreads), block kThreads.
#include "common/device.cuh"

constexpr int kThreads = 256;

// The square of m x m cells that value i of the smaller map stands for.
struct Square {
    int64_t row;  // of the batch
    int64_t first, stride;
    int size, channels;

    __device__ Square(int64_t i, int size, int height, int width, int channels) : size(size), channels(channels) {
        const int64_t cell = i / channels, line = cell / width;
        row = line / height;
        stride = int64_t(width) * size * channels;
        first = line * size * stride + (cell % width) * size * channels + i % channels;
    }

    template <class F>
    __device__ void each(F f) const {
        for (int a = 0; a < size; a++) {
            for (int b = 0; b < size; b++) f(first + a * stride + int64_t(b) * channels);
        }
    }

    template <class T>
    __device__ float mean(const T* values) const {
        float sum = 0.f;
        each([&](int64_t at) { sum += to_f32(values[at]); });
        return sum / float(size * size);
    }
};

KERNEL(pool_latents_f32, kThreads, 1)(float* y, const float* x, int size, int height, int width, int channels,
                                      int64_t count) {
    follow_previous();
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (GUARD(i < count)) y[i] = Square(i, size, height, width, channels).mean(x);
}
REGISTER_KERNEL(pool_latents_f32)

template <class T>
DEVICE void upsample_guidance(T* y, const T* e, const T* low, const float* pooled, const float* factors,
                              const unsigned* step, int step_images, int size, int height, int width, int channels,
                              int64_t images, int64_t count) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (!GUARD(i < count)) return;
    const Square square(i, size, height, width, channels);
    const int64_t image = square.row % images;
    const float* k = factors + size_t(step[image % step_images]) * 3;
    const float of_x = pooled[i - (square.row - image) * height * width * channels];
    const float correction = k[0] * to_f32(low[i]) + k[1] * of_x - k[2] * square.mean(e);
    square.each([&](int64_t at) { y[at] = from_f32<T>(to_f32(e[at]) + correction); });
}

#define ENTRIES(T, suffix)                                                                                          \
    KERNEL(upsample_guidance_##suffix, kThreads, 1)(T* y, const T* e, const T* low, const float* pooled,            \
                                                    const float* factors, const unsigned* step, int step_images,    \
                                                    int size, int height, int width, int channels, int64_t images,  \
                                                    int64_t count) {                                                \
        follow_previous();                                                                                          \
        upsample_guidance(y, e, low, pooled, factors, step, step_images, size, height, width, channels, images,     \
                          count);                                                                                   \
    }                                                                                                               \
    REGISTER_KERNEL(upsample_guidance_##suffix)

ENTRIES(float, f32)
ENTRIES(f16, f16)
ENTRIES(bf16, bf16)
