// 07_tma_wgmma.cu: linear (01_naive.cu) in Hopper's words: TMA fills the ring, wgmma multiplies out of it. f16, bf16; sm_90a.
//   Maps: x [M, K] and weight [N, K] in boxes of 128 rows of 64, in the swizzle of 128 bytes.
//
// What changed: one thread asks TMA for a box of 64 x 128 elements, and no thread computes an address or a bound: what lies
// beyond the matrix comes as zeros. An mbarrier per stage says that all bytes of the slice are there. wgmma multiplies 64 rows
// of x by 128 of weight straight from shared memory, for the four warps together (a warpgroup), asynchronously; descriptors
// tell it address, swizzle and how far 8 rows are from the next 8.
// Why: mma.sync's rate is 647 of the 790 TFLOP/s that wgmma makes of a large product on an H200 (measured), and its operands
// go through registers: 21 FLOP per byte of shared memory. Here one read of weight serves 64 rows, one of x 128 columns: 43
// FLOP per byte, and no ldmatrix is issued. A slice is 64 of k: half the barriers.
// A block is one warpgroup here: 128 threads with 128 sums each. After a slice it waits for its products, then for its other
// warps, then one thread fills the stage again: in that time the tensor cores idle, unless another block of the
// multiprocessor has work. That is what 08 mends.
//
// bench: op linear, entry tutorial_wgmma, grid ceil(n / 128) by ceil(m / 128), block 128, shared 99328
// bench: map x 64 by 128 swizzle 128, map weight 64 by 128 swizzle 128, multiple n 8, multiple k 8
#include "common/wgmma.cuh"

constexpr int kM = 128, kN = 128, kSlice = 64, kStages = 3;
constexpr int kParts = kM / 64;  // one wgmma makes 64 rows

template <class T>
struct Shared {
    struct alignas(1024) Stage {  // the swizzle goes by the address, and repeats after 8 rows of 128 bytes
        T x[kM * kSlice], weight[kN * kSlice];
    };
    Stage stages[kStages];
    uint64_t full[kStages];
};
static_assert(sizeof(Shared<bf16>) == 99328, "as the launch says");

template <class T>
DEVICE void load(Shared<T>& s, const TensorMap* x, const TensorMap* weight, int first_row, int first_column, int slice) {
    typename Shared<T>::Stage& stage = s.stages[slice % kStages];
    uint64_t* full = &s.full[slice % kStages];
    mbar_arrive_expect_tx(full, sizeof stage);
    tma_load_2d(stage.x, x, full, slice * kSlice, first_row);
    tma_load_2d(stage.weight, weight, full, slice * kSlice, first_column);
}

template <class T>
DEVICE void tma_wgmma(T* y, const T* bias, int m, int n, int k, const TensorMap* x, const TensorMap* weight) {
    SHARED_DYNAMIC(Shared<T>, s);
    const int first_row = blockIdx.y * kM, first_column = blockIdx.x * kN;
    const int slices = (k + kSlice - 1) / kSlice;
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; i++) mbar_init(&s.full[i], 1);
        mbar_fence_init();
        for (int slice = 0; slice < min(kStages, slices); slice++) load(s, x, weight, first_row, first_column, slice);
    }
    __syncthreads();  // the mbarriers are there for everybody
    float sums[kParts][kN / 2];
    for (int slice = 0; slice < slices; slice++) {
        const typename Shared<T>::Stage& stage = s.stages[slice % kStages];
        mbar_wait(&s.full[slice % kStages], slice / kStages % 2);
        wgmma_fence();
        UNROLL
        for (int step = 0; step < kSlice / 16; step++) {
            UNROLL
            for (int i = 0; i < kParts; i++) {
                // 16 of k are 32 bytes further in the row; 8 rows are 1024 bytes.
                const uint64_t a = wgmma_desc128(smem_u32(stage.x) + 32 * step + 64 * 128 * i, 16, 1024);
                const uint64_t b = wgmma_desc128(smem_u32(stage.weight) + 32 * step, 16, 1024);
                wgmma<T, kN>(sums[i], a, b, slice > 0 || step > 0);
            }
        }
        wgmma_commit();
        wgmma_wait<0>();  // this warp's rows are done
        // The other warps' are: nobody reads the stage any more. The emulated card multiplies for all four warps at once, and
        // does not miss this line; a card does not promise that.
        __syncthreads();
        if (threadIdx.x == 0 && slice + kStages < slices) load(s, x, weight, first_row, first_column, slice + kStages);
    }
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    UNROLL
    for (int i = 0; i < kParts; i++) {
        UNROLL
        for (int j = 0; j < kN / 2; j++) {
            fence_register(sums[i][j]);  // no read of it moves before the wait
            const int row = first_row + 64 * i + 16 * warp + lane / 4 + j / 2 % 2 * 8;
            const int column = first_column + j / 4 * 8 + lane % 4 * 2 + j % 2;
            if (GUARD(row < m) && GUARD(column < n)) {
                y[int64_t(row) * n + column] = from_f32<T>(sums[i][j] + to_f32(bias[column]));
            }
        }
    }
}

#define ENTRY(T, suffix)                                                                                  \
    KERNEL(tutorial_wgmma_##suffix, 128, 1)                                                               \
    (T * y, const T*, const T*, const T* bias, int m, int n, int k, GRID_CONST TensorMap x, GRID_CONST TensorMap weight) { \
        tma_wgmma(y, bias, m, n, k, &x, &weight);                                                         \
    }                                                                                                     \
    REGISTER_KERNEL(tutorial_wgmma_##suffix)
ENTRY(f16, f16)
ENTRY(bf16, bf16)
