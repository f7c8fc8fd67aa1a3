// 02_shared_tiles.cu: linear (01_naive.cu) with tiles of x and weight in shared memory.
//
// What changed: a block of 32 x 32 threads makes 32 x 32 sums. It brings slices of 32 k of its 32 rows of x and of weight
// into shared memory, and every element that came once is used 32 times.
// Why: from global memory it is now 2 * 32 * 32 flops per (32 + 32) * 2 bytes of k, 16 FLOP per byte in bf16, and a warp
// reads 32 neighbours of one row. What is left is shared memory: two f32 per product, 0.25 FLOP per byte.
// Two barriers per slice: one before it is read, so that all of it is there; one after, so that nobody still reads it when
// the next one is written.
//
// bench: op linear, entry tutorial_shared, grid ceil(n / 32) by ceil(m / 32), block 1024
#include "common/device.cuh"

constexpr int kM = 32, kN = 32, kSlice = 32;

template <class T>
DEVICE void shared_tiles(T* y, const T* x, const T* weight, const T* bias, int m, int n, int k) {
    SHARED_STATIC(float, xs, [kM][kSlice]);
    // One more column: the lanes of a warp read a column of this, whose elements then lie in 32 different banks.
    SHARED_STATIC(float, ws, [kN][kSlice + 1]);
    const int down = threadIdx.x / kSlice, right = threadIdx.x % kSlice;
    const int row = blockIdx.y * kM + down, column = blockIdx.x * kN + right;
    const int weight_row = blockIdx.x * kN + down;  // the one this thread brings
    float sum = 0.f;
    for (int first = 0; first < k; first += kSlice) {
        const int i = first + right;
        const bool inside = GUARD(i < k);
        xs[down][right] = inside && GUARD(row < m) ? to_f32(x[int64_t(row) * k + i]) : 0.f;
        ws[down][right] = inside && GUARD(weight_row < n) ? to_f32(weight[int64_t(weight_row) * k + i]) : 0.f;
        __syncthreads();
        for (int j = 0; j < kSlice; j++) sum += xs[down][j] * ws[right][j];
        __syncthreads();
    }
    if (GUARD(row < m) && GUARD(column < n)) y[int64_t(row) * n + column] = from_f32<T>(sum + to_f32(bias[column]));
}

#define ENTRY(T, suffix)                                                       \
    KERNEL(tutorial_shared_##suffix, 1024, 1)                                  \
    (T * y, const T* x, const T* weight, const T* bias, int m, int n, int k) { \
        shared_tiles(y, x, weight, bias, m, n, k);                             \
    }                                                                          \
    REGISTER_KERNEL(tutorial_shared_##suffix)
ENTRY(float, f32)
ENTRY(f16, f16)
ENTRY(bf16, bf16)
