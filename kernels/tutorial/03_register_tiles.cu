// 03_register_tiles.cu: linear (01_naive.cu) with 8 x 8 sums per thread, and loads of 16 bytes.
//
// What changed: a thread makes 64 sums in registers, a block of 256 threads a tile of 128 x 128. Per k a thread reads 8
// elements of x and 8 of weight and does 64 multiply-adds with them. A slice lies in shared memory with k outside, so that
// a thread's elements are neighbours and four of them are one load. From global memory a thread takes 16 bytes at a time.
// Why: shared memory gives 128 flops per 64 bytes, 2 FLOP per byte in place of 0.25; global memory 64 FLOP per byte in bf16
// in place of 16. Fewer instructions are loads: 4 of 68 in the innermost loop.
// A thread's rows are 4 and again 4 64 further down, its columns too: the 8 lanes that a load of 16 bytes serves at once then
// read 128 bytes in a row. With 8 rows in a row they would meet in half of the banks.
//
// bench: op linear, entry tutorial_register, grid ceil(n / 128) by ceil(m / 128), block 256, multiple k 8
#include "common/vector.cuh"

constexpr int kM = 128, kN = 128, kSlice = 16;
constexpr int kPitch = kM + 4;  // floats from one k to the next: rows stay aligned to 16 bytes

// The thread's 8 elements of a slice of 128 rows: row threadIdx.x / 2, half a slice of k.
template <class T>
DEVICE void bring(float (&to)[kSlice][kPitch], const T* from, int first_row, int rows, int first_k, int k) {
    const int row = threadIdx.x / 2, half = threadIdx.x % 2 * kVector;
    float values[kVector] = {};
    if (GUARD(first_row + row < rows) && GUARD(first_k + half < k)) {
        load<kVector>(values, from + int64_t(first_row + row) * k + first_k + half);
    }
    UNROLL
    for (int i = 0; i < kVector; i++) to[half + i][row] = values[i];
}

// Four at `place`, and four 64 further.
DEVICE void pick(float (&to)[8], const float* place) {
    UNROLL
    for (int half = 0; half < 2; half++) {
        const float4 four = *reinterpret_cast<const float4*>(place + 64 * half);
        to[4 * half] = four.x, to[4 * half + 1] = four.y, to[4 * half + 2] = four.z, to[4 * half + 3] = four.w;
    }
}

template <class T>
DEVICE void register_tiles(T* y, const T* x, const T* weight, const T* bias, int m, int n, int k) {
    SHARED_STATIC(float, xs, [kSlice][kPitch]);
    SHARED_STATIC(float, ws, [kSlice][kPitch]);
    const int first_row = blockIdx.y * kM, first_column = blockIdx.x * kN;
    const int down = threadIdx.x / 16 * 4, right = threadIdx.x % 16 * 4;
    float sums[8][8] = {};
    for (int first = 0; first < k; first += kSlice) {
        bring(xs, x, first_row, m, first, k);
        bring(ws, weight, first_column, n, first, k);
        __syncthreads();
        UNROLL
        for (int j = 0; j < kSlice; j++) {
            float a[8], b[8];
            pick(a, &xs[j][down]);
            pick(b, &ws[j][right]);
            UNROLL
            for (int i = 0; i < 8; i++) {
                UNROLL
                for (int l = 0; l < 8; l++) sums[i][l] += a[i] * b[l];
            }
        }
        __syncthreads();
    }
    UNROLL
    for (int i = 0; i < 8; i++) {
        UNROLL
        for (int l = 0; l < 8; l++) {
            const int row = first_row + down + i % 4 + i / 4 * 64, column = first_column + right + l % 4 + l / 4 * 64;
            if (GUARD(row < m) && GUARD(column < n)) {
                y[int64_t(row) * n + column] = from_f32<T>(sums[i][l] + to_f32(bias[column]));
            }
        }
    }
}

#define ENTRY(T, suffix)                                                       \
    KERNEL(tutorial_register_##suffix, 256, 1)                                 \
    (T * y, const T* x, const T* weight, const T* bias, int m, int n, int k) { \
        register_tiles(y, x, weight, bias, m, n, k);                           \
    }                                                                          \
    REGISTER_KERNEL(tutorial_register_##suffix)
ENTRY(float, f32)
ENTRY(f16, f16)
ENTRY(bf16, bf16)
