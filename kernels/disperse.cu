// disperse.cu: 5x5 kernels from 3x3 ones, once per layer; ScaleCrafter (He et al. 2023, arXiv:2310.07702, sec. 3.3).
//   y[o][t][i] = sum over s < 9 of matrix[t][s] x[o][s][i], in f32
//   y [outputs, 25, inputs]   x [outputs, 9, inputs]   matrix [25, 9] f32   T = f32 | f16 | bf16
// Memory bound: (9 + 25) * outputs * inputs * sizeof(T) bytes. A thread has one output and input channel, so that neighbours
// read and write side by side. Launch: grid (outputs, ceil(inputs / kThreads)), block kThreads. Any sizes and alignment.
#include "common/math.cuh"

constexpr int kThreads = 256;
constexpr int kSmall = 9, kLarge = 25;

template <class T>
DEVICE void disperse(T* y, const T* x, const float* matrix, int64_t inputs) {
    SHARED_STATIC(float, rows, [kLarge * kSmall]);
    if (threadIdx.x < kLarge * kSmall) rows[threadIdx.x] = matrix[threadIdx.x];
    __syncthreads();
    const int64_t input = int64_t(blockIdx.y) * kThreads + threadIdx.x;
    if (!GUARD(input < inputs)) return;
    x += int64_t(blockIdx.x) * kSmall * inputs + input;
    y += int64_t(blockIdx.x) * kLarge * inputs + input;
    float small[kSmall];
    UNROLL
    for (int s = 0; s < kSmall; s++) small[s] = to_f32(x[s * inputs]);
    for (int t = 0; t < kLarge; t++) {
        float sum = 0.f;
        UNROLL
        for (int s = 0; s < kSmall; s++) sum += rows[t * kSmall + s] * small[s];
        y[t * inputs] = from_f32<T>(sum);
    }
}

#define ENTRY(T, suffix)                                                                                        \
    KERNEL(disperse_##suffix, kThreads, 1)(T* y, const T* x, const float* matrix, int64_t inputs) {             \
        follow_previous();                                                                                      \
        disperse(y, x, matrix, inputs);                                                                         \
    }                                                                                                           \
    REGISTER_KERNEL(disperse_##suffix)

ENTRY(float, f32)
ENTRY(f16, f16)
ENTRY(bf16, bf16)
