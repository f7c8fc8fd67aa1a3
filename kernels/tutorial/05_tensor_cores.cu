// 05_tensor_cores.cu: linear (01_naive.cu) on the tensor cores: mma.sync, fed by ldmatrix from swizzled rows. f16 and bf16.
//
// What changed: one mma.sync of a warp does 16 x 8 x 16 products of 16 bit elements with sums in f32. 8 warps, 2 down and 4
// across, make 64 x 32 sums each. ldmatrix brings four 8 x 8 blocks of elements to where mma wants them: 16 rows of x, or 16
// of weight, at 16 of k. Two slices and cp.async are as before.
// Why: the fused multiply-add units of an H200 do 60 TFLOP/s (data sheet 67), its tensor cores 647 by mma.sync (measured).
// Nothing is widened any more. A warp reads (64 + 32) * 2 bytes of shared memory per 2 * 64 * 32 flops of k: 21 FLOP per byte.
// Rows are 64 bytes without padding. ldmatrix reads 8 rows at one chunk at once, which would lie in two banks' width; so chunk
// c of row r is kept at place c ^ (r / 2 % 4) (a swizzle), and 8 rows at one chunk fill all banks once.
//
// bench: op linear, entry tutorial_mma, grid ceil(n / 128) by ceil(m / 128), block 256, multiple k 8
#include "common/vector.cuh"

constexpr int kM = 128, kN = 128, kChunks = 4, kSlice = 32;
constexpr int kWarpM = 64, kWarpN = 32;

DEVICE int place(int row, int chunk) { return row * kChunks + (chunk ^ (row / 2 % kChunks)); }

template <class T>
DEVICE void copy_slice(Pack<T>* to, const T* from, int first_row, int rows, int first_k, int k) {
    const int chunk = threadIdx.x % kChunks, at = first_k + chunk * 8;
    UNROLL
    for (int i = 0; i < 2; i++) {
        const int row = threadIdx.x / kChunks + 64 * i;
        const bool inside = GUARD(first_row + row < rows) && GUARD(at < k);
        cp_async_16(&to[place(row, chunk)], from + int64_t(first_row + row) * k + at, inside);
    }
}

// sums[i][j]: the 16 x 8 block at row 16 i, column 8 j of the warp's part.
template <class T>
DEVICE void multiply(float (&sums)[kWarpM / 16][kWarpN / 8][4], const Pack<T>* xs, const Pack<T>* ws, int warp_row,
                     int warp_column) {
    const int lane = threadIdx.x % 32;
    UNROLL
    for (int step = 0; step < kSlice / 16; step++) {
        uint32_t a[kWarpM / 16][4], b[kWarpN / 16][4];
        // Lane i names row i % 8 of block i / 8. Of x: rows 0-7 and 8-15 at the first 8 of k, then both at the next 8.
        UNROLL
        for (int i = 0; i < kWarpM / 16; i++) {
            ldmatrix_x4(a[i], &xs[place(warp_row + 16 * i + lane % 16, 2 * step + lane / 16)]);
        }
        // Of weight: rows 0-7 at the first 8 of k and at the next, then rows 8-15.
        UNROLL
        for (int j = 0; j < kWarpN / 16; j++) {
            ldmatrix_x4(b[j], &ws[place(warp_column + 16 * j + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2)]);
        }
        UNROLL
        for (int i = 0; i < kWarpM / 16; i++) {
            UNROLL
            for (int j = 0; j < kWarpN / 8; j++) {
                mma_m16n8k16<T>(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
            }
        }
    }
}

template <class T>
DEVICE void tensor_cores(T* y, const T* x, const T* weight, const T* bias, int m, int n, int k) {
    SHARED_STATIC(Pack<T>, xs, [2][kM * kChunks]);
    SHARED_STATIC(Pack<T>, ws, [2][kN * kChunks]);
    const int first_row = blockIdx.y * kM, first_column = blockIdx.x * kN;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_row = warp / 4 * kWarpM, warp_column = warp % 4 * kWarpN;
    float sums[kWarpM / 16][kWarpN / 8][4] = {};
    copy_slice(xs[0], x, first_row, m, 0, k);
    copy_slice(ws[0], weight, first_column, n, 0, k);
    cp_async_commit();
    int now = 0;
    for (int first = 0; first < k; first += kSlice, now ^= 1) {
        if (first + kSlice < k) {
            copy_slice(xs[now ^ 1], x, first_row, m, first + kSlice, k);
            copy_slice(ws[now ^ 1], weight, first_column, n, first + kSlice, k);
        }
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        multiply(sums, xs[now], ws[now], warp_row, warp_column);
        __syncthreads();
    }
    // A lane has of each block row lane / 4, columns 2 (lane % 4) and the next, and the same 8 rows further down.
    UNROLL
    for (int i = 0; i < kWarpM / 16; i++) {
        UNROLL
        for (int j = 0; j < kWarpN / 8; j++) {
            UNROLL
            for (int e = 0; e < 4; e++) {
                const int row = first_row + warp_row + 16 * i + lane / 4 + e / 2 * 8;
                const int column = first_column + warp_column + 8 * j + lane % 4 * 2 + e % 2;
                if (GUARD(row < m) && GUARD(column < n)) {
                    y[int64_t(row) * n + column] = from_f32<T>(sums[i][j][e] + to_f32(bias[column]));
                }
            }
        }
    }
}

#define ENTRY(T, suffix)                                                       \
    KERNEL(tutorial_mma_##suffix, 256, 1)                                      \
    (T * y, const T* x, const T* weight, const T* bias, int m, int n, int k) { \
        tensor_cores(y, x, weight, bias, m, n, k);                             \
    }                                                                          \
    REGISTER_KERNEL(tutorial_mma_##suffix)
ENTRY(f16, f16)
ENTRY(bf16, bf16)
