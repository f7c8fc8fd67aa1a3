// 01_naive.cu: y[M, N] = x[M, K] weight[N, K]^T + bias[N], one thread per element of y.
//   T = f32 | f16 | bf16, contiguous; the sum in f32, one rounding at the store. Any size, any alignment.
//
// What it costs: per product two loads of an element and one fused multiply-add. In bf16 that is 2 flops per 4 bytes asked
// of the caches, 0.5 FLOP per byte; a card that does hundreds of flops in the time of one byte waits nearly always.
// The lanes of a warp have 16 neighbouring columns, so they read 16 rows of the weight, K elements apart: each load of a
// warp touches up to 17 lines, of which it takes one element. The rest of a line is used later only if it is still in L1.
//
// bench: op linear, entry tutorial_naive, grid ceil(n / 16) by ceil(m / 16), block 256
#include "common/device.cuh"

constexpr int kM = 16, kN = 16;  // a block's part of y

template <class T>
DEVICE void naive(T* y, const T* x, const T* weight, const T* bias, int m, int n, int k) {
    const int row = blockIdx.y * kM + threadIdx.x / kN, column = blockIdx.x * kN + threadIdx.x % kN;
    if (!GUARD(row < m) || !GUARD(column < n)) return;
    float sum = 0.f;
    for (int i = 0; i < k; i++) sum += to_f32(x[int64_t(row) * k + i]) * to_f32(weight[int64_t(column) * k + i]);
    y[int64_t(row) * n + column] = from_f32<T>(sum + to_f32(bias[column]));
}

#define ENTRY(T, suffix)                                                                                       \
    KERNEL(tutorial_naive_##suffix, 256, 1)                                                                    \
    (T * y, const T* x, const T* weight, const T* bias, int m, int n, int k) { naive(y, x, weight, bias, m, n, k); } \
    REGISTER_KERNEL(tutorial_naive_##suffix)
ENTRY(float, f32)
ENTRY(f16, f16)
ENTRY(bf16, bf16)
