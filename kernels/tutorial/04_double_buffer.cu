// 04_double_buffer.cu: linear (01_naive.cu) with the next slice on its way while this one is multiplied.
//
// What changed: shared memory has two slices. cp.async copies the next one past the registers, in the element type as it is,
// while the block multiplies out of the other. Rows are kept whole, 64 bytes of k in 4 chunks of 16 bytes.
// Why: up to here a block waited for global memory once per slice, some 500 clocks with nothing to do, and the loads' results
// took registers. Traffic is as before from global memory; from shared memory 16 bit types now are half as large: 4 FLOP per
// byte in bf16. Elements are widened at every use: 16 conversions per 64 multiply-adds.
// A row takes 5 chunks of shared memory, not 4: the 8 lanes that a load serves at once read 8 rows, which then lie in
// different banks, because 5 r mod 8 takes every value.
//
// bench: op linear, entry tutorial_double, grid ceil(n / 128) by ceil(m / 128), block 256, multiple k 8
#include "common/vector.cuh"

constexpr int kM = 128, kN = 128, kChunks = 4, kPitch = 5;

template <class T>
constexpr int kChunkValues = 16 / int(sizeof(T));

// The thread's two chunks of a slice of 128 rows: threads 0 to 3 take row 0, 4 to 7 row 1 ...; then again 64 rows further.
template <class T>
DEVICE void copy_slice(Pack<T> (&to)[kM][kPitch], const T* from, int first_row, int rows, int first_k, int k) {
    const int chunk = threadIdx.x % kChunks, at = first_k + chunk * kChunkValues<T>;
    UNROLL
    for (int i = 0; i < 2; i++) {
        const int row = threadIdx.x / kChunks + 64 * i;
        const bool inside = GUARD(first_row + row < rows) && GUARD(at < k);
        cp_async_16(&to[row][chunk], from + int64_t(first_row + row) * k + at, inside);  // zeros where it is not inside
    }
}

template <class T>
DEVICE void double_buffer(T* y, const T* x, const T* weight, const T* bias, int m, int n, int k) {
    SHARED_STATIC(Pack<T>, xs, [2][kM][kPitch]);
    SHARED_STATIC(Pack<T>, ws, [2][kN][kPitch]);
    constexpr int kSlice = kChunks * kChunkValues<T>;
    const int first_row = blockIdx.y * kM, first_column = blockIdx.x * kN;
    const int down = threadIdx.x / 16, right = threadIdx.x % 16;  // rows down + 16 i, columns right + 16 l
    float sums[8][8] = {};
    copy_slice(xs[0], x, first_row, m, 0, k);
    copy_slice(ws[0], weight, first_column, n, 0, k);
    cp_async_commit();
    int now = 0;
    for (int first = 0; first < k; first += kSlice, now ^= 1) {
        if (first + kSlice < k) {
            copy_slice(xs[now ^ 1], x, first_row, m, first + kSlice, k);
            copy_slice(ws[now ^ 1], weight, first_column, n, first + kSlice, k);
        }
        cp_async_commit();   // a group per slice, be it empty: the wait counts groups
        cp_async_wait<1>();  // this thread's part of this slice is there
        __syncthreads();     // everybody's is
        for (int chunk = 0; chunk < kChunks; chunk++) {
            Pack<T> a[8], b[8];
            UNROLL
            for (int i = 0; i < 8; i++) a[i] = xs[now][down + 16 * i][chunk], b[i] = ws[now][right + 16 * i][chunk];
            UNROLL
            for (int e = 0; e < kChunkValues<T>; e++) {
                UNROLL
                for (int i = 0; i < 8; i++) {
                    UNROLL
                    for (int l = 0; l < 8; l++) sums[i][l] += to_f32(a[i].v[e]) * to_f32(b[l].v[e]);
                }
            }
        }
        __syncthreads();  // before the next round's copies come into this slice
    }
    UNROLL
    for (int i = 0; i < 8; i++) {
        UNROLL
        for (int l = 0; l < 8; l++) {
            const int row = first_row + down + 16 * i, column = first_column + right + 16 * l;
            if (GUARD(row < m) && GUARD(column < n)) {
                y[int64_t(row) * n + column] = from_f32<T>(sums[i][l] + to_f32(bias[column]));
            }
        }
    }
}

#define ENTRY(T, suffix)                                                       \
    KERNEL(tutorial_double_##suffix, 256, 1)                                   \
    (T * y, const T* x, const T* weight, const T* bias, int m, int n, int k) { \
        double_buffer(y, x, weight, bias, m, n, k);                            \
    }                                                                          \
    REGISTER_KERNEL(tutorial_double_##suffix)
ENTRY(float, f32)
ENTRY(f16, f16)
ENTRY(bf16, bf16)
