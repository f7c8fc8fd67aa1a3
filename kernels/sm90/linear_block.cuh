// linear_block.cuh: a block of linear.cu and of linear_fp8.cu: main_loop.cuh over x [M, K] and weight [columns, K].
#pragma once
#include "sm90/epilogue_linear.cuh"

template <class Strip>
struct LinearShared {
    typename Strip::Tile::Ring ring;
    Strip strips[Strip::Tile::kWarps];
    typename Strip::Tile::Barriers bars;
    uint64_t residual[Strip::Tile::kWarps];
};

struct LinearMaps {
    const TensorMap* x;
    const TensorMap* weight;
    const TensorMap* y;
    const TensorMap* residual;
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

// `with(linear, warp)`: the epilogue of a consumer warp, from that of linear.
template <class Strip, class With>
DEVICE void linear_block(LinearShared<Strip>& s, const LinearMaps& maps,
                         const LinearArgs<typename Strip::T, typename Strip::Tile::In>& args, With with) {
    using Tile = typename Strip::Tile;
    const int warp = __shfl_sync(0xFFFFFFFFu, int(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
    LinearProblem<Tile> problem;
    problem.x = maps.x;
    problem.weight = maps.weight;
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
        const LinearEpilogue<Strip> linear = {s.strips[warp - 4], &s.residual[warp - 4], 0, maps.y, maps.residual, args,
                                              lane, {}};
        auto epilogue = with(linear, warp - 4);
        consume<Tile>(s.ring, s.bars, problem, epilogue, warp / 4 - 1, warp, lane);
    }
}
