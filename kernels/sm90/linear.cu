// sm90/linear.cu: linear (common/linear.cuh) by wgmma and TMA, for Hopper (sm_90a): f16 and bf16; K and the outputs are
//   multiples of 8, K > 0, all operands aligned to 16 bytes. Any M. What does not fit is for linear.cu.
// Maps, rows of `kSlice` or of the strip's `kBox` columns: x [M, K] in boxes of kM x 64, weight [columns, K] kN x 64, y and
//   residual [M, N] 16 x kBox; a map of a residual that is not there is not read.
// Launch: linear_sm90_<tile>_<dtype>, linear_sm90_<tile>_activated_<dtype>, linear_sm90_<tile>_geglu_<dtype>,
//   linear_sm90_<tile>_gate_<dtype>; grid up to the number of tiles, as many as run at once; block
//   WgmmaTile::kThreads; dynamic shared memory sizeof(LinearShared). src/ops/cuda/linear_sm90.rs has the table and who
//   picks from it.
#include "sm90/linear_block.cuh"

template <class Tile, int kPasses, LinearKind kKind>
DEVICE void linear_sm90(const LinearMaps& maps, const LinearArgs<typename Tile::T>& args) {
    using Strip = LinearStrip<Tile, kPasses, kKind>;
    SHARED_DYNAMIC(LinearShared<Strip>, s);
    linear_block<Strip>(s, maps, args, [](const LinearEpilogue<Strip>& linear, int) { return linear; });
}

#define ENTRY(name, T, kind, passes, ...)                                                                        \
    KERNEL(name, (WgmmaTile<T, __VA_ARGS__>::kThreads), (WgmmaTile<T, __VA_ARGS__>::kBlocksPerSm))               \
    (GRID_CONST TensorMap x, GRID_CONST TensorMap weight, GRID_CONST TensorMap y, GRID_CONST TensorMap residual, \
     GRID_CONST LinearArgs<T> args) {                                                                            \
        linear_sm90<WgmmaTile<T, __VA_ARGS__>, passes, kind>({&x, &weight, &y, &residual}, args);                \
    }                                                                                                            \
    REGISTER_KERNEL(name)
#define PLAIN(tile, suffix, T, ...) ENTRY(linear_sm90_##tile##_##suffix, T, kPlain, __VA_ARGS__)
#define ACTIVATED(tile, suffix, T, ...) ENTRY(linear_sm90_##tile##_activated_##suffix, T, kActivated, __VA_ARGS__)
#define GEGLU(tile, suffix, T, ...) ENTRY(linear_sm90_##tile##_geglu_##suffix, T, kGated, __VA_ARGS__)
#define GATE(tile, suffix, T, ...) ENTRY(linear_sm90_##tile##_gate_##suffix, T, kRowGated, __VA_ARGS__)

// Tile; passes, M, N, stages, schedule, consumers, blocks per multiprocessor that the registers must leave room for. Of the
// kinds those that have earned their place; the registers of 128x160 in turns do not suffice for GEGLU.
#define LINEARS(suffix, T)                                                              \
    PLAIN(128x160, suffix, T, 1, 128, 160, 5, kCooperative, 2, 1)                       \
    ACTIVATED(128x160, suffix, T, 1, 128, 160, 5, kCooperative, 2, 1)                   \
    GEGLU(128x160, suffix, T, 1, 128, 160, 5, kCooperative, 2, 1)                       \
    PLAIN(256x128, suffix, T, 2, 256, 128, 4, kCooperative, 2, 1)                       \
    GEGLU(256x128, suffix, T, 2, 256, 128, 4, kCooperative, 2, 1)                       \
    GATE(256x128, suffix, T, 2, 256, 128, 4, kCooperative, 2, 1)                        \
    PLAIN(pingpong_128x160, suffix, T, 1, 128, 160, 4, kPingPong, 2, 1)                 \
    PLAIN(pingpong_128x128, suffix, T, 1, 128, 128, 5, kPingPong, 2, 1)                 \
    GEGLU(pingpong_128x128, suffix, T, 1, 128, 128, 5, kPingPong, 2, 1)                 \
    GATE(pingpong_128x128, suffix, T, 1, 128, 128, 5, kPingPong, 2, 1)                  \
    PLAIN(pingpong_64x256, suffix, T, 1, 64, 256, 4, kPingPong, 2, 1)                   \
    GEGLU(pingpong_64x256, suffix, T, 1, 64, 256, 4, kPingPong, 2, 1)                   \
    PLAIN(64x80, suffix, T, 1, 64, 80, 5, kCooperative, 1, 2)                           \
    ACTIVATED(64x80, suffix, T, 1, 64, 80, 5, kCooperative, 1, 2)                       \
    PLAIN(64x64, suffix, T, 1, 64, 64, 4, kCooperative, 1, 3)                           \
    GEGLU(64x64, suffix, T, 1, 64, 64, 4, kCooperative, 1, 3)                           \
    GATE(64x64, suffix, T, 1, 64, 64, 4, kCooperative, 1, 3)

LINEARS(f16, f16)
LINEARS(bf16, bf16)
