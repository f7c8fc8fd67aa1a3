// main_loop.cuh: the matrix product of Hopper's kernels: C[M, N] = A[M, K] B[N, K]^T, sums in f32, by TMA and wgmma.
//
// A block is a producer warpgroup and one or two consumer warpgroups. One thread of the producer fills a ring of stages,
// each a slice (128 bytes a row: 64 of k, 128 of 8-bit floats) of A and of B, by TMA in the 128-byte swizzle; the consumers
// multiply out of it by wgmma. Blocks are persistent: each does every gridDim.x-th tile.
//   cooperative  the consumers take each a part of a tile's rows
//   ping-pong    each takes a tile of its own: one multiplies while the other writes out
// An mbarrier a stage says `full` (all bytes are there), another `empty` (every consumer warp has read it).
//
// What differs between ops is given: a Problem says how many tiles and slices there are and loads a slice, an Epilogue does
// what is to be done with the sums.
//
//   Problem
//       tiles, slices                                 counts; slices > 0
//       place_of(problem, int tile)                   the Place where a tile begins
//       load_a(problem, void* to, uint64_t* full, Place, int slice)   by one thread: Tile::kBytesA bytes that `full` counts
//       load_b(problem, void* to, uint64_t* full, Place, int slice)                  Tile::kBytesB
//   Epilogue: one per warp; all its lanes call together
//       begin(epilogue, Place, int row)               the first slice is being multiplied: operands of the end
//       finish(epilogue, Sums<Tile>&, Place, int row)   row: of C, the first of the warp's 16; and 64 i further
//       end(epilogue)                                 after the last tile
//
// An element's sum runs over k in ascending order, 16 at a time inside wgmma, whatever the tile: every variant gives the
// same bits, and a row's sums do not depend on the other rows. mma.sync (common/gemm.cuh) adds in another order.
// Of 8-bit floats wgmma's own sums keep some 14 bits. They are made of a slice each, and added up in f32.
#pragma once
#include "common/hopper.cuh"
#include "sm90/ring.cuh"

enum Schedule { kCooperative, kPingPong };

// Place in C of a tile's first sum.
struct Place {
    int m, n;
};

// Tiles go down in bands of 8, then a column to the right: blocks that run at once share rows of A and of B in L2.
DEVICE Place banded(int tile, int tiles_m, int tiles_n, int rows, int columns) {
    constexpr int kDown = 8;
    const int band = tile / (kDown * tiles_n), within = tile % (kDown * tiles_n);
    const int down = min(kDown, tiles_m - band * kDown);
    return {(band * kDown + within % down) * rows, within / down * columns};
}

// The shape of a block's work. kBlocksPerSm: how many the registers must leave room for. In: of A and B, if not T.
template <class T_, int kM_, int kN_, int kStages_, Schedule kSchedule_, int kConsumers_, int kBlocksPerSm_, class In_ = T_>
struct WgmmaTile {
    using T = T_;
    using In = In_;
    static constexpr int kM = kM_, kN = kN_, kStages = kStages_, kConsumers = kConsumers_, kBlocksPerSm = kBlocksPerSm_;
    static constexpr bool kTurns = kSchedule_ == kPingPong;
    static constexpr bool kPromoted = sizeof(In) == 1;
    static constexpr int kSlice = 128 / sizeof(In);
    static constexpr int kThreads = 128 * (1 + kConsumers), kWarps = 4 * kConsumers;
    static constexpr int kConsumerM = kTurns ? kM : kM / kConsumers;  // rows of a consumer's part
    static constexpr int kParts = kConsumerM / 64;                    // of 64 rows, what one wgmma makes
    static constexpr int kBytesA = kM * 128, kBytesB = kN * 128;
    static_assert(sizeof(T) == 2 && kConsumerM % 64 == 0 && kN % 8 == 0 && kN <= 256 && kM <= 256);
    static_assert(!kTurns || (kConsumers == 2 && !kPromoted));

    struct alignas(1024) Stage {
        In a[kM * kSlice];
        In b[kN * kSlice];
    };
    struct Ring {
        Stage stages[kStages];
    };
    struct Barriers {
        uint64_t full[kStages], empty[kStages], turn[2];
    };
};

// A consumer thread's sums: [i][4 j + 2 h + e] is row 64 i + 16 warp + 8 h + lane / 4, column 8 j + 2 (lane % 4) + e.
template <class Tile>
using Sums = float[Tile::kParts][Tile::kN / 2];

// One slice, asynchronously.
template <class Tile>
DEVICE void multiply(Sums<Tile>& sums, uint32_t a, uint32_t b, bool accumulate) {
    // 32 bytes of k at a time.
    UNROLL
    for (int k = 0; k < 4; k++) {
        UNROLL
        for (int i = 0; i < Tile::kParts; i++) {
            const uint64_t of_a = descriptor(a + 2 * k + 512 * i), of_b = descriptor(b + 2 * k);
            if constexpr (Tile::kPromoted) {
                wgmma_e4m3<Tile::kN>(sums[i], of_a, of_b, accumulate || k > 0);
            } else {
                wgmma<typename Tile::T, Tile::kN>(sums[i], of_a, of_b, accumulate || k > 0);
            }
        }
    }
}

// Keeps reads of the sums behind the wait before it.
template <class Tile>
DEVICE void fence_sums(Sums<Tile>& sums) {
    UNROLL
    for (int i = 0; i < Tile::kParts; i++) {
        UNROLL
        for (int j = 0; j < Tile::kN / 2; j++) fence_register(sums[i][j]);
    }
}

// Adds to the sums, or begins them.
template <class Tile>
DEVICE void add(Sums<Tile>& sums, const Sums<Tile>& of_slice, bool first) {
    UNROLL
    for (int i = 0; i < Tile::kParts; i++) {
        UNROLL
        for (int j = 0; j < Tile::kN / 2; j++) sums[i][j] = first ? of_slice[i][j] : sums[i][j] + of_slice[i][j];
    }
}

template <class Tile>
DEVICE void init_barriers(typename Tile::Barriers& bars) {
    for (int i = 0; i < Tile::kStages; i++) {
        mbar_init(&bars.full[i], 1);
        mbar_init(&bars.empty[i], Tile::kTurns ? 4 : Tile::kWarps);
    }
    for (int i = 0; i < 2; i++) mbar_init(&bars.turn[i], 4);
}

// By one thread: the slices of all tiles of the block, one after the other.
template <class Tile, class Problem>
DEVICE void produce(typename Tile::Ring& ring, typename Tile::Barriers& bars, const Problem& problem) {
    RingPosition<Tile> at = {0, 0};
    for (int tile = blockIdx.x; tile < problem.tiles; tile += gridDim.x) {
        const Place place = place_of(problem, tile);
        for (int slice = 0; slice < problem.slices; slice++) {
            typename Tile::Stage& stage = ring.stages[at.stage];
            uint64_t* full = &bars.full[at.stage];
            mbar_wait(&bars.empty[at.stage], at.parity ^ 1);
            mbar_arrive_expect_tx(full, Tile::kBytesA + Tile::kBytesB);
            load_a(problem, stage.a, full, place, slice);
            load_b(problem, stage.b, full, place, slice);
            advance(at);
        }
    }
}

// By all threads of a consumer warpgroup.
template <class Tile, class Problem, class Epilogue>
DEVICE void consume(typename Tile::Ring& ring, typename Tile::Barriers& bars, const Problem& problem, Epilogue& epilogue,
                    int consumer, int warp, int lane) {
    constexpr int kStep = Tile::kTurns ? 2 : 1;
    constexpr int kUnits = int(sizeof(typename Tile::Stage)) / kDescriptorUnit;
    const int first_row = (Tile::kTurns ? 0 : consumer * Tile::kConsumerM) + warp % 4 * 16;
    const uint32_t a = descriptor_low(ring.stages[0].a) + (Tile::kTurns ? 0 : consumer * Tile::kParts * 512);
    const uint32_t b = descriptor_low(ring.stages[0].b);
    RingPosition<Tile> at = {0, 0};
    uint32_t turn = consumer == 0;  // the first consumer's first turn is not waited for
    int count = Tile::kTurns ? consumer : 0;
    for (int tile = blockIdx.x + count * gridDim.x; tile < problem.tiles; tile += kStep * gridDim.x, count += kStep) {
        const Place place = place_of(problem, tile);
        if constexpr (Tile::kTurns) {
            at = ring_position<Tile>(count * problem.slices);
            mbar_wait(&bars.turn[consumer], turn);
            turn ^= 1;
        }
        Sums<Tile> sums;
        if constexpr (Tile::kPromoted) {
            Sums<Tile> of_slice;
            for (int slice = 0; slice < problem.slices; slice++) {
                mbar_wait(&bars.full[at.stage], at.parity);
                wgmma_fence();
                multiply<Tile>(of_slice, a + at.stage * kUnits, b + at.stage * kUnits, false);
                wgmma_commit();
                if (slice == 0) begin(epilogue, place, place.m + first_row);
                wgmma_wait<0>();
                fence_sums<Tile>(of_slice);
                if (lane == 0) mbar_arrive(&bars.empty[at.stage]);
                __syncwarp();
                advance(at);
                add<Tile>(sums, of_slice, slice == 0);
            }
        } else {
            mbar_wait(&bars.full[at.stage], at.parity);
            wgmma_fence();
            multiply<Tile>(sums, a + at.stage * kUnits, b + at.stage * kUnits, false);
            wgmma_commit();
            begin(epilogue, place, place.m + first_row);
            uint64_t* last = &bars.empty[at.stage];
            advance(at);
            for (int slice = 1; slice < problem.slices; slice++) {
                mbar_wait(&bars.full[at.stage], at.parity);
                wgmma_fence();
                multiply<Tile>(sums, a + at.stage * kUnits, b + at.stage * kUnits, true);
                wgmma_commit();
                // The slice before has been read.
                wgmma_wait<1>();
                if (lane == 0) mbar_arrive(last);
                __syncwarp();
                last = &bars.empty[at.stage];
                advance(at);
            }
            if constexpr (Tile::kTurns) {
                // All products are on their way, so the other's come after them.
                if (lane == 0) mbar_arrive(&bars.turn[consumer ^ 1]);
                __syncwarp();
            }
            wgmma_wait<0>();
            fence_sums<Tile>(sums);
            if (lane == 0) mbar_arrive(last);
            __syncwarp();
        }
        finish(epilogue, sums, place, place.m + first_row);
    }
    end(epilogue);
}
