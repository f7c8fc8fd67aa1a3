// sm90/linear_fp8.cu: linear_fp8 (common/linear_fp8.cuh) by wgmma and TMA, for Hopper (sm_90a): y in f16 and bf16; K a
//   multiple of 16 and the outputs of 8, K > 0, all operands aligned to 16 bytes. Any M. What does not fit is for
//   linear_fp8.cu.
// Maps and launch as of sm90/linear.cu, slices of 128 of k: linear_fp8_sm90_<tile>[_activated|_geglu|_gate]_<dtype of y>; dynamic
//   shared memory sizeof(LinearFp8Shared). src/ops/cuda/linear_sm90.rs has the table and who picks from it.
#include "common/linear_fp8.cuh"
#include "sm90/linear_block.cuh"

template <class Strip>
struct LinearFp8Shared {
    LinearShared<Strip> linear;
    alignas(16) float scales[Strip::Tile::kWarps][Strip::Tile::kN];  // of the weight's rows that the tile meets
};

// Scales the sums, then does what linear does with them.
template <class Strip_>
struct LinearFp8Epilogue {
    using Strip = Strip_;
    using Tile = typename Strip::Tile;

    LinearEpilogue<Strip> linear;
    const float* x_scales;
    const float* weight_scales;
    float (&columns)[Tile::kN];    // shared memory
    float rows[Tile::kParts][2];   // of rows lane / 4 and 8 further down
};

template <class Strip>
DEVICE void begin(LinearFp8Epilogue<Strip>& e, Place place, int row) {
    begin(e.linear, place, row);
    const int inside = e.linear.args.columns - place.n, lane = e.linear.lane;
    for (int i = 4 * lane; i < Strip::Tile::kN; i += 128) {
        const bool there = GUARD(i < inside);
        cp_async_16(&e.columns[i], e.weight_scales + place.n + i, there);
    }
    cp_async_commit();
    UNROLL
    for (int i = 0; i < Strip::Tile::kParts; i++) {
        UNROLL
        for (int half = 0; half < 2; half++) {
            const int m = row + 64 * i + 8 * half + lane / 4;
            e.rows[i][half] = GUARD(m < e.linear.args.m) ? e.x_scales[m] : 0.f;
        }
    }
}

template <class Strip>
DEVICE void finish(LinearFp8Epilogue<Strip>& e, Sums<typename Strip::Tile>& sums, Place place, int row) {
    cp_async_wait<0>();
    __syncwarp();
    UNROLL
    for (int j = 0; j < Strip::Tile::kN / 8; j++) {
        const float2 columns = *reinterpret_cast<const float2*>(&e.columns[8 * j + 2 * (e.linear.lane % 4)]);
        UNROLL
        for (int i = 0; i < Strip::Tile::kParts; i++) {
            UNROLL
            for (int half = 0; half < 2; half++) {
                float* pair = &sums[i][4 * j + 2 * half];
                pair[0] = pair[0] * e.rows[i][half] * columns.x;
                pair[1] = pair[1] * e.rows[i][half] * columns.y;
            }
        }
    }
    finish(e.linear, sums, place, row);
}

template <class Strip>
DEVICE void end(LinearFp8Epilogue<Strip>& e) {
    end(e.linear);
}

template <class Tile, int kPasses, LinearKind kKind>
DEVICE void linear_fp8_sm90(const LinearMaps& maps, const LinearFp8Args<typename Tile::T>& args) {
    using Strip = LinearStrip<Tile, kPasses, kKind>;
    SHARED_DYNAMIC(LinearFp8Shared<Strip>, s);
    linear_block<Strip>(s.linear, maps, args.linear, [&](const LinearEpilogue<Strip>& linear, int warp) {
        return LinearFp8Epilogue<Strip>{linear, args.x_scales, args.weight_scales, s.scales[warp], {}};
    });
}

#define ENTRY(name, T, kind, passes, ...)                                                                        \
    KERNEL(name, (WgmmaTile<T, __VA_ARGS__, e4m3>::kThreads), (WgmmaTile<T, __VA_ARGS__, e4m3>::kBlocksPerSm))   \
    (GRID_CONST TensorMap x, GRID_CONST TensorMap weight, GRID_CONST TensorMap y, GRID_CONST TensorMap residual, \
     GRID_CONST LinearFp8Args<T> args) {                                                                         \
        linear_fp8_sm90<WgmmaTile<T, __VA_ARGS__, e4m3>, passes, kind>({&x, &weight, &y, &residual}, args);      \
    }                                                                                                            \
    REGISTER_KERNEL(name)
#define PLAIN(tile, suffix, T, ...) ENTRY(linear_fp8_sm90_##tile##_##suffix, T, kPlain, __VA_ARGS__)
#define ACTIVATED(tile, suffix, T, ...) ENTRY(linear_fp8_sm90_##tile##_activated_##suffix, T, kActivated, __VA_ARGS__)
#define GEGLU(tile, suffix, T, ...) ENTRY(linear_fp8_sm90_##tile##_geglu_##suffix, T, kGated, __VA_ARGS__)
#define GATE(tile, suffix, T, ...) ENTRY(linear_fp8_sm90_##tile##_gate_##suffix, T, kRowGated, __VA_ARGS__)

// As in sm90/linear.cu. Twice the sums in registers: no tile of 256 rows or columns.
#define LINEARS(suffix, T)                                            \
    PLAIN(128x160, suffix, T, 1, 128, 160, 5, kCooperative, 2, 1)     \
    PLAIN(128x128, suffix, T, 1, 128, 128, 5, kCooperative, 2, 1)     \
    ACTIVATED(128x128, suffix, T, 1, 128, 128, 5, kCooperative, 2, 1) \
    GEGLU(128x128, suffix, T, 1, 128, 128, 5, kCooperative, 2, 1)     \
    GATE(128x128, suffix, T, 1, 128, 128, 5, kCooperative, 2, 1)      \
    PLAIN(64x80, suffix, T, 1, 64, 80, 5, kCooperative, 1, 2)         \
    ACTIVATED(64x80, suffix, T, 1, 64, 80, 5, kCooperative, 1, 2)     \
    PLAIN(64x64, suffix, T, 1, 64, 64, 4, kCooperative, 1, 2)         \
    GEGLU(64x64, suffix, T, 1, 64, 64, 4, kCooperative, 1, 2)         \
    GATE(64x64, suffix, T, 1, 64, 64, 4, kCooperative, 1, 2)

LINEARS(f16, f16)
LINEARS(bf16, bf16)
