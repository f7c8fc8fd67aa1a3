// 08_warp_specialised.cu: linear (01_naive.cu) on Hopper with a producer and two consumers. f16, bf16; sm_90a.
//   Maps: x in boxes of 128 rows of 64, weight of 256 rows of 64, y of 64 rows of 64, all in the swizzle of 128 bytes.
//
// What changed: of three warpgroups one is the producer: one of its threads keeps the ring full. Two consumers multiply, each 64
// rows by 256 columns. Beside `full` each stage has an mbarrier `empty`, at which every consumer warp arrives when it has read
// it; so nobody waits for all. A consumer issues the next slice's products before it waits for the last one's (wait<1>): the
// tensor cores always have the next in hand. setmaxnreg moves registers from the producer, which needs few, to the consumers.
// The result goes through shared memory, where the ring was, and leaves by TMA in whole rows.
// Why: no barrier of the block in the loop, and the tensor cores never idle while memory keeps up. Tiles of 128 x 256 take 85
// FLOP per byte from global memory in place of 64; a consumer's product takes (64 + 256) * 2 bytes per 2 * 64 * 256 flops of k
// from shared memory, 51 FLOP per byte.
// What the product's kernels/sm90/linear.cu has beyond this: a table of tiles, of which 128 x 160 fits widths of 320, 640 and
// 1280 better; blocks that stay and take tile after tile, and consumers in turns (ping-pong), so that one writes out while the
// other multiplies; activation and residual; a start before the previous launch has ended.
//
// bench: op linear, entry tutorial_specialised, grid ceil(n / 256) * ceil(m / 128), block 384, shared 197632
// bench: map x 64 by 128 swizzle 128, map weight 64 by 256 swizzle 128, map y 64 by 64 swizzle 128
// bench: multiple n 8, multiple k 8
#include "sm90/ring.cuh"
#include "sm90/strip.cuh"

constexpr int kM = 128, kN = 256, kSlice = 64, kStages = 4, kConsumers = 2;

template <class T>
struct Shared {
    struct alignas(1024) Stage {
        T x[kM * kSlice], weight[kN * kSlice];
    };
    union {
        Stage stages[kStages];
        T results[kConsumers][kN / 64][64 * 64];  // boxes of 64 rows of 64 columns
    };
    uint64_t full[kStages], empty[kStages];
};
static_assert(sizeof(Shared<bf16>) == 197632, "as the launch says");

// By one thread: all slices, each as soon as its stage is free.
template <class T>
DEVICE void produce(Shared<T>& s, const TensorMap* x, const TensorMap* weight, int first_row, int first_column, int slices) {
    for (int slice = 0; slice < slices; slice++) {
        const int at = slice % kStages;
        // The phase before the first counts as ended, so the first round does not wait.
        mbar_wait(&s.empty[at], slice / kStages % 2 ^ 1);
        mbar_arrive_expect_tx(&s.full[at], sizeof s.stages[at]);
        tma_load_2d(s.stages[at].x, x, &s.full[at], slice * kSlice, first_row);
        tma_load_2d(s.stages[at].weight, weight, &s.full[at], slice * kSlice, first_column);
    }
}

// By the 128 threads of a consumer: its 64 rows.
template <class T>
DEVICE void consume(Shared<T>& s, const T* bias, int n, const TensorMap* y, int first_row, int first_column, int slices,
                    int consumer) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    constexpr int kStageUnits = sizeof s.stages[0] / kDescriptorUnit;
    const uint32_t first_x = descriptor_low(s.stages[0].x) + consumer * (64 * 128 / kDescriptorUnit);
    const uint32_t first_weight = descriptor_low(s.stages[0].weight);
    float sums[kN / 2];
    for (int slice = 0; slice < slices; slice++) {
        const int at = slice % kStages;
        mbar_wait(&s.full[at], slice / kStages % 2);
        wgmma_fence();
        UNROLL
        for (int step = 0; step < kSlice / 16; step++) {
            // In units of 16 bytes: 32 bytes are 16 of k further. Only a descriptor's low word changes.
            const uint64_t a = descriptor(first_x + at * kStageUnits + 2 * step);
            const uint64_t b = descriptor(first_weight + at * kStageUnits + 2 * step);
            wgmma<T, kN>(sums, a, b, slice > 0 || step > 0);
        }
        wgmma_commit();
        if (slice > 0) {
            wgmma_wait<1>();  // the slice before has been read
            if (lane == 0) mbar_arrive(&s.empty[(slice - 1) % kStages]);
        }
    }
    wgmma_wait<0>();
    UNROLL
    for (int j = 0; j < kN / 2; j++) fence_register(sums[j]);
    named_barrier_sync(1, 128 * kConsumers);  // both have read the last slice: the ring's place is free

    // Row 16 warp + lane % 16 of the consumer's 64; stmatrix takes two blocks of 8 columns at a time.
    const int row = 16 * warp + lane % 16;
    UNROLL
    for (int j = 0; j < kN / 8; j += 2) {
        uint32_t packed[4];
        UNROLL
        for (int i = 0; i < 4; i++) {
            const int at = 4 * (j + i / 2) + i % 2 * 2, column = first_column + 8 * (j + i / 2) + lane % 4 * 2;
            Pair<T> add = {from_f32<T>(0.f), from_f32<T>(0.f)};
            if (GUARD(column < n)) add = *reinterpret_cast<const Pair<T>*>(bias + column);  // n is even
            packed[i] = pack2<T>(sums[at] + to_f32(add.low), sums[at + 1] + to_f32(add.high));
        }
        const int chunk = j % 8 + lane / 16;
        stmatrix_x4(&s.results[consumer][j / 8][row * 64 + (chunk ^ row % 8) * 8], packed);
    }
    fence_proxy_async();  // ordinary writes, before TMA reads them
    named_barrier_sync(2 + consumer, 128);
    if (threadIdx.x % 128 == 0) {
        for (int box = 0; box < kN / 64; box++) {
            tma_store_2d(y, s.results[consumer][box], first_column + 64 * box, first_row + 64 * consumer);
        }
        bulk_commit();
        bulk_wait_read<0>();  // shared memory stays until it has been read
    }
}

template <class T>
DEVICE void specialised(const T* bias, int m, int n, int k, const TensorMap* x, const TensorMap* weight, const TensorMap* y) {
    SHARED_DYNAMIC(Shared<T>, s);
    const int tiles_m = (m + kM - 1) / kM, tiles_n = (n + kN - 1) / kN;
    const int band = blockIdx.x / (8 * tiles_n), within = blockIdx.x % (8 * tiles_n), down = min(8, tiles_m - 8 * band);
    const int first_row = (8 * band + within % down) * kM, first_column = within / down * kN;
    const int slices = (k + kSlice - 1) / kSlice;
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; i++) {
            mbar_init(&s.full[i], 1);
            mbar_init(&s.empty[i], 4 * kConsumers);
        }
        mbar_fence_init();
    }
    __syncthreads();
    // 65536 registers for 384 threads are 168 each; 40 + 2 * 232 are 3 * 168.
    if (threadIdx.x < 128) {
        setmaxnreg_dec<40>();
        if (threadIdx.x == 0) produce(s, x, weight, first_row, first_column, slices);
    } else {
        setmaxnreg_inc<232>();
        consume(s, bias, n, y, first_row, first_column, slices, int(threadIdx.x) / 128 - 1);
    }
}

#define ENTRY(T, suffix)                                                                                    \
    KERNEL(tutorial_specialised_##suffix, 384, 1)                                                           \
    (T*, const T*, const T*, const T* bias, int m, int n, int k, GRID_CONST TensorMap x, GRID_CONST TensorMap weight, \
     GRID_CONST TensorMap y) {                                                                              \
        specialised(bias, m, n, k, &x, &weight, &y);                                                        \
    }                                                                                                       \
    REGISTER_KERNEL(tutorial_specialised_##suffix)
ENTRY(f16, f16)
ENTRY(bf16, bf16)
