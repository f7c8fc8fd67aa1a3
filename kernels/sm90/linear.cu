// sm90/linear.cu: linear (common/linear.cuh) by wgmma and TMA, for Hopper (sm_90a): f16 and bf16; K and the outputs are
//   multiples of 8, K > 0, all operands aligned to 16 bytes. Any M. What does not fit is for linear.cu.
// Maps, rows of `kSlice` or of the strip's `kBox` columns: x [M, K] in boxes of kM x 64, weight [columns, K] kN x 64, y and
//   residual [M, N] 16 x kBox; a map of a residual that is not there is not read.
// Launch: linear_sm90_<tile>_<dtype>, linear_sm90_<tile>_activated_<dtype>, linear_sm90_<tile>_geglu_<dtype>; grid up to
//   the number of tiles, as many as run at once; block WgmmaTile::kThreads; dynamic shared memory sizeof(LinearShared).
//   src/ops/cuda/linear_sm90.rs has the table and who picks from it.
#include "sm90/epilogue_linear.cuh"

template <class Strip>
struct LinearShared {
    typename Strip::Tile::Ring ring;
    Strip strips[Strip::Tile::kWarps];
    typename Strip::Tile::Barriers bars;
    uint64_t residual[Strip::Tile::kWarps];
};

template <class Tile>
struct LinearProblem {
    const TensorMap* x;
    const TensorMap* weight;
    int tiles_m, tiles_n, tiles, slices;
};

template <class Tile>
DEVICE Place place_of(const LinearProblem<Tile>& p, int tile) {
    return banded(tile, p.tiles_m, p.tiles_n, Tile::kM, Tile::kN);
}
template <class Tile>
DEVICE void load_a(const LinearProblem<Tile>& p, void* to, uint64_t* full, Place place, int slice) {
    tma_load_2d(to, p.x, full, slice * Tile::kSlice, place.m);
}
template <class Tile>
DEVICE void load_b(const LinearProblem<Tile>& p, void* to, uint64_t* full, Place place, int slice) {
    tma_load_2d(to, p.weight, full, slice * Tile::kSlice, place.n);
}
// The weight of the ring's first round towards the card, while the launch before this one ends: it does not write it, or if
// it does, the loads read what it wrote.
template <class Tile>
DEVICE void prefetch_b(const LinearProblem<Tile>& p) {
    const Place place = place_of(p, blockIdx.x);
    for (int slice = 0; slice < min(Tile::kStages, p.slices); slice++) {
        tma_prefetch_2d(p.weight, slice * Tile::kSlice, place.n);
    }
}

template <class Tile, int kPasses, LinearKind kKind>
DEVICE void linear_sm90(const TensorMap* x, const TensorMap* weight, const TensorMap* y, const TensorMap* residual,
                        const LinearArgs<typename Tile::T>& args) {
    using Strip = LinearStrip<Tile, kPasses, kKind>;
    SHARED_DYNAMIC(LinearShared<Strip>, s);
    const int warp = __shfl_sync(0xFFFFFFFFu, int(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
    LinearProblem<Tile> problem;
    problem.x = x;
    problem.weight = weight;
    problem.tiles_m = (args.m + Tile::kM - 1) / Tile::kM;
    problem.tiles_n = (args.columns + Tile::kN - 1) / Tile::kN;
    problem.tiles = problem.tiles_m * problem.tiles_n;
    problem.slices = (args.k + Tile::kSlice - 1) / Tile::kSlice;
    next_may_start();
    if (threadIdx.x == 0) {
        prefetch_b(problem);
        init_barriers<Tile>(s.bars);
        for (int i = 0; i < Tile::kWarps; i++) mbar_init(&s.residual[i], 1);
        mbar_fence_init();
    }
    __syncthreads();
    wait_for_previous();
    if (warp < 4) {
        // One consumer: the block's registers suffice as they are.
        if constexpr (Tile::kConsumers > 1) {
            setmaxnreg_dec<40>();
        }
        if (threadIdx.x == 0) produce<Tile>(s.ring, s.bars, problem);
    } else {
        if constexpr (Tile::kConsumers > 1) {
            setmaxnreg_inc<232>();
        }
        LinearEpilogue<Strip> epilogue = {s.strips[warp - 4], &s.residual[warp - 4], 0, y, residual, args, lane, {}};
        consume<Tile>(s.ring, s.bars, problem, epilogue, warp / 4 - 1, warp, lane);
    }
}

#define ENTRY(name, T, kind, passes, ...)                                                                        \
    KERNEL(name, (WgmmaTile<T, __VA_ARGS__>::kThreads), (WgmmaTile<T, __VA_ARGS__>::kBlocksPerSm))               \
    (GRID_CONST TensorMap x, GRID_CONST TensorMap weight, GRID_CONST TensorMap y, GRID_CONST TensorMap residual, \
     GRID_CONST LinearArgs<T> args) {                                                                            \
        linear_sm90<WgmmaTile<T, __VA_ARGS__>, passes, kind>(&x, &weight, &y, &residual, args);                  \
    }                                                                                                            \
    REGISTER_KERNEL(name)
#define PLAIN(tile, suffix, T, ...) ENTRY(linear_sm90_##tile##_##suffix, T, kPlain, __VA_ARGS__)
#define ACTIVATED(tile, suffix, T, ...) ENTRY(linear_sm90_##tile##_activated_##suffix, T, kActivated, __VA_ARGS__)
#define GEGLU(tile, suffix, T, ...) ENTRY(linear_sm90_##tile##_geglu_##suffix, T, kGated, __VA_ARGS__)

// Tile; passes, M, N, stages, schedule, consumers, blocks per multiprocessor that the registers must leave room for. Of the
// kinds those that have earned their place; the registers of 128x160 in turns do not suffice for GEGLU.
#define LINEARS(suffix, T)                                                              \
    PLAIN(128x160, suffix, T, 1, 128, 160, 5, kCooperative, 2, 1)                       \
    ACTIVATED(128x160, suffix, T, 1, 128, 160, 5, kCooperative, 2, 1)                   \
    GEGLU(128x160, suffix, T, 1, 128, 160, 5, kCooperative, 2, 1)                       \
    PLAIN(256x128, suffix, T, 2, 256, 128, 4, kCooperative, 2, 1)                       \
    GEGLU(256x128, suffix, T, 2, 256, 128, 4, kCooperative, 2, 1)                       \
    PLAIN(pingpong_128x160, suffix, T, 1, 128, 160, 4, kPingPong, 2, 1)                 \
    PLAIN(pingpong_128x128, suffix, T, 1, 128, 128, 5, kPingPong, 2, 1)                 \
    GEGLU(pingpong_128x128, suffix, T, 1, 128, 128, 5, kPingPong, 2, 1)                 \
    PLAIN(pingpong_64x256, suffix, T, 1, 64, 256, 4, kPingPong, 2, 1)                   \
    GEGLU(pingpong_64x256, suffix, T, 1, 64, 256, 4, kPingPong, 2, 1)                   \
    PLAIN(64x80, suffix, T, 1, 64, 80, 5, kCooperative, 1, 2)                           \
    ACTIVATED(64x80, suffix, T, 1, 64, 80, 5, kCooperative, 1, 2)                       \
    PLAIN(64x64, suffix, T, 1, 64, 64, 4, kCooperative, 1, 3)                           \
    GEGLU(64x64, suffix, T, 1, 64, 64, 4, kCooperative, 1, 3)

LINEARS(f16, f16)
LINEARS(bf16, bf16)
