// sampler.cu: the noise of relays and of the VAE's posterior, in f32.
//
// Memory bound, and small. Launch of all: grid ceil(count / kThreads), block kThreads.
#include "common/math.cuh"

constexpr int kThreads = 256;

// diagonal_gaussian: y = mean, or mean + exp(logvar / 2) noise, logvar clamped to [-30, 20].
//   moments [pixels, 2C]: mean, then logvar   y, noise [pixels, C] f32, noise null: the mean   count = pixels * C
template <class T>
DEVICE void diagonal_gaussian(float* y, const T* moments, const float* noise, int channels, int64_t count) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (!GUARD(i < count)) return;
    const T* mean = moments + i / channels * (2 * channels) + i % channels;
    const float value = to_f32(*mean);
    y[i] = noise ? fmaf(expf(0.5f * clamp(to_f32(mean[channels]), -30.f, 20.f)), noise[i], value) : value;
}

// add_noise: y = signal x0 + sigma noise.   y, x0, noise [count] f32
KERNEL(add_noise_f32, kThreads, 1)(float* y, const float* x0, const float* noise, float signal, float sigma,
                                   int64_t count) {
    follow_previous();
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (GUARD(i < count)) y[i] = fmaf(signal, x0[i], sigma * noise[i]);
}
REGISTER_KERNEL(add_noise_f32)

#define ENTRIES(T, suffix)                                                                                         \
    KERNEL(diagonal_gaussian_##suffix, kThreads, 1)(float* y, const T* moments, const float* noise, int channels,  \
                                                    int64_t count) {                                               \
        follow_previous();                                                                                         \
        diagonal_gaussian(y, moments, noise, channels, count);                                                     \
    }                                                                                                              \
    REGISTER_KERNEL(diagonal_gaussian_##suffix)

ENTRIES(float, f32)
ENTRIES(f16, f16)
ENTRIES(bf16, bf16)
