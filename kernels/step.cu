// step.cu: what a captured step does around the denoiser. Everything that changes from step to step is read on the device:
// row *step of a table, so that one recorded graph serves all of them.
#include "common/device.cuh"

constexpr int kThreads = 256;

// The columns of a row of the table, as src/ops/step.rs writes them.
enum Column {
    kInputScale,
    kX0FromX,
    kX0FromE,
    kClip,  // +inf: none
    kNextFromX,
    kNextFromE,
    kNextFromX0,
    kNextFromNoise,
    kX0FromNext,  // 1: x0 is computed from the updated x
    kColumns = 12
};

// scale_input: y[r][i] = table[*step].input_scale * x[i], rounded once, for every r < repeats.
//   y [repeats, count] T   x [count] f32   table [steps, kColumns] f32   step [1]
// Memory bound: (4 + repeats * sizeof(T)) * count bytes. Launch: grid ceil(count / kThreads), block kThreads.
template <class T>
DEVICE void scale_input(T* y, const float* x, const float* table, const unsigned* step, int64_t count, int repeats) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (GUARD(i < count)) {
        const T value = from_f32<T>(table[size_t(*step) * kColumns + kInputScale] * x[i]);
        for (int r = 0; r < repeats; r++) y[r * count + i] = value;
    }
}

// sampler_step: guidance, x0 and update in one pass, in place.
//   e  = guided ? output[i] + guidance (output[count + i] - output[i]) : output[i]
//   x0 = clamp(x0_from_x x + x0_from_e e);  x = next_from_x x + next_from_e e + next_from_x0 x0 + next_from_noise noise
//   x, x0, noise [count] f32 (noise may be null)   output [count] or [2 count] T: the unconditional half first
// Memory bound: (16 or 20) * count + (1 or 2) * sizeof(T) * count bytes. Launch as scale_input.
template <class T>
DEVICE void sampler_step(float* x, float* x0, const T* output, const float* noise, const float* table,
                         const unsigned* step, float guidance, int guided, int64_t count) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (GUARD(i < count)) {
        const float* k = table + size_t(*step) * kColumns;
        float e = to_f32(output[i]);
        if (guided) e += guidance * (to_f32(output[count + i]) - e);
        // NaN stays NaN: neither comparison holds.
        const auto clipped = [k](float value) {
            return value > k[kClip] ? k[kClip] : value < -k[kClip] ? -k[kClip] : value;
        };
        const float clean = clipped(k[kX0FromX] * x[i] + k[kX0FromE] * e);
        float next = k[kNextFromX] * x[i] + k[kNextFromE] * e + k[kNextFromX0] * clean;
        if (k[kNextFromNoise] != 0.f) next += k[kNextFromNoise] * noise[i];
        x0[i] = k[kX0FromNext] != 0.f ? clipped(k[kX0FromX] * next + k[kX0FromE] * e) : clean;
        x[i] = next;
    }
}

#define ENTRIES(T, suffix)                                                                                         \
    KERNEL(scale_input_##suffix, kThreads, 1)                                                                      \
    (T* y, const float* x, const float* table, const unsigned* step, int64_t count, int repeats) {                 \
        scale_input<T>(y, x, table, step, count, repeats);                                                         \
    }                                                                                                              \
    REGISTER_KERNEL(scale_input_##suffix)                                                                          \
    KERNEL(sampler_step_##suffix, kThreads, 1)                                                                     \
    (float* x, float* x0, const T* output, const float* noise, const float* table, const unsigned* step,           \
     float guidance, int guided, int64_t count) {                                                                  \
        sampler_step<T>(x, x0, output, noise, table, step, guidance, guided, count);                               \
    }                                                                                                              \
    REGISTER_KERNEL(sampler_step_##suffix)

ENTRIES(float, f32)
ENTRIES(f16, f16)
ENTRIES(bf16, bf16)

// advance_step: step [images] += 1, the last launch of a step. Launch: grid (images), one thread a block.
KERNEL(advance_step, 1, 1)(unsigned* step) { step[blockIdx.x] += 1; }
REGISTER_KERNEL(advance_step)
