// 06_ring.cu: linear (01_naive.cu): 05_tensor_cores.cu with a ring of four slices, and tiles in an order that suits L2.
//
// What changed: three slices are on their way while the fourth is multiplied, and one barrier per slice suffices: it says that
// this slice is there for everybody, and also that everybody has left the slice before, whose slot the next copy takes. Blocks
// go down 8 tiles of rows before they go one tile to the right, so that those that run at once share rows of both operands.
// Why: a slice is multiplied in some 500 clocks at the tensor cores' pace, less than memory takes to answer; with one slice
// ahead the block waits for the rest, with three it does not. Traffic of shared memory is as before; of what global memory
// is asked for, more is found in L2: 132 blocks in bands of 8 touch 8 tiles of rows and 17 of columns, 25 slices where a row
// of blocks, 1 and 132, touches 133.
// The ring is larger than the 48 KB that a kernel has by itself: dynamic shared memory, whose size the launch says.
// kernels/linear.cu, which every card of sm_80 or newer runs, is this with tiles to choose from, and stores of whole rows.
//
// bench: op linear, entry tutorial_ring, grid ceil(n / 128) * ceil(m / 128), block 256, shared 65536, multiple k 8
#include "common/vector.cuh"

constexpr int kM = 128, kN = 128, kChunks = 4, kSlice = 32, kStages = 4;
constexpr int kWarpM = 64, kWarpN = 32;

template <class T>
struct Shared {
    struct Stage {
        Pack<T> x[kM * kChunks], weight[kN * kChunks];
    };
    Stage stages[kStages];
};
static_assert(sizeof(Shared<bf16>) == 65536, "as the launch says");

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

template <class T>
DEVICE void multiply(float (&sums)[kWarpM / 16][kWarpN / 8][4], const Pack<T>* xs, const Pack<T>* ws, int warp_row,
                     int warp_column) {
    const int lane = threadIdx.x % 32;
    UNROLL
    for (int step = 0; step < kSlice / 16; step++) {
        uint32_t a[kWarpM / 16][4], b[kWarpN / 16][4];
        UNROLL
        for (int i = 0; i < kWarpM / 16; i++) {
            ldmatrix_x4(a[i], &xs[place(warp_row + 16 * i + lane % 16, 2 * step + lane / 16)]);
        }
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
DEVICE void ring(T* y, const T* x, const T* weight, const T* bias, int m, int n, int k) {
    SHARED_DYNAMIC(Shared<T>, s);
    // Bands of 8 tiles of rows; the last one may have fewer.
    const int tiles_m = (m + kM - 1) / kM, tiles_n = (n + kN - 1) / kN;
    const int band = blockIdx.x / (8 * tiles_n), within = blockIdx.x % (8 * tiles_n), down = min(8, tiles_m - 8 * band);
    const int first_row = (8 * band + within % down) * kM, first_column = within / down * kN;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_row = warp / 4 * kWarpM, warp_column = warp % 4 * kWarpN;

    const int slices = (k + kSlice - 1) / kSlice;
    for (int slice = 0; slice < kStages - 1; slice++) {
        if (slice < slices) {
            copy_slice(s.stages[slice].x, x, first_row, m, slice * kSlice, k);
            copy_slice(s.stages[slice].weight, weight, first_column, n, slice * kSlice, k);
        }
        cp_async_commit();
    }
    float sums[kWarpM / 16][kWarpN / 8][4] = {};
    for (int slice = 0; slice < slices; slice++) {
        cp_async_wait<kStages - 2>();
        __syncthreads();
        const int ahead = slice + kStages - 1;
        if (ahead < slices) {
            typename Shared<T>::Stage& next = s.stages[ahead % kStages];
            copy_slice(next.x, x, first_row, m, ahead * kSlice, k);
            copy_slice(next.weight, weight, first_column, n, ahead * kSlice, k);
        }
        cp_async_commit();
        const typename Shared<T>::Stage& now = s.stages[slice % kStages];
        multiply(sums, now.x, now.weight, warp_row, warp_column);
    }
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
    KERNEL(tutorial_ring_##suffix, 256, 1)                                     \
    (T * y, const T* x, const T* weight, const T* bias, int m, int n, int k) { \
        ring(y, x, weight, bias, m, n, k);                                     \
    }                                                                          \
    REGISTER_KERNEL(tutorial_ring_##suffix)
ENTRY(f16, f16)
ENTRY(bf16, bf16)
