// sm90/conv2d.cu: conv2d (common/conv2d.cuh) by wgmma and TMA, for Hopper (sm_90a): f16 and bf16; the channels of each source
//   and the outputs are multiples of 8, all operands aligned to 16 bytes, no resize. What does not fit is for conv2d.cu.
// Compute bound: 2 M O K flops, K = kh kw C; halo: 1.6 (d = 1) to 2.3 (d = 2) reads of x from L2 instead of 9.
// Maps: x of each source [N, H, W, C] in boxes of 64 channels (halo: by kPitch x kPitch pixels; im2col: by 64), weight of each
//   source [O, kh kw, C] in boxes of kN x 1 x 64, both zeros beyond C; y and residual in boxes of 32 channels: halo
//   [N, Hout, Wout, O] by 2 x 8 pixels, im2col [N, 1, Hout Wout, O] by 16. A map of what is not there is not read.
// Launch: conv2d_sm90_<tile>_<dtype>; grid up to the number of tiles, as many as run at once; block ConvTile::kThreads; dynamic
//   shared memory sizeof(ConvShared); may be a dependent launch: only the weights are read before the launch before has ended.
//   src/ops/cuda/conv_sm90.rs has the table and who picks from it. Parts of sums are joined by conv2d_join of conv2d.cu.
#include "sm90/epilogue_conv2d.cuh"

template <class Tile>
struct ConvShared {
    typename Tile::Rings rings;
    ConvStrip<Tile> strips[Tile::kWarps];
    typename Tile::Barriers bars;
    uint64_t residual[Tile::kWarps];
};

struct ConvMaps {
    const TensorMap *x_a, *x_b, *weight_a, *weight_b, *y, *residual;
};

template <class Tile>
DEVICE void conv2d_sm90(const ConvMaps& maps, const ConvArgs<typename Tile::T>& args, const ConvTiles& tiles) {
    SHARED_DYNAMIC(ConvShared<Tile>, s);
    const int warp = __shfl_sync(0xFFFFFFFFu, int(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
    next_may_start();
    if (threadIdx.x == 0) {
        init_rings<Tile>(s.bars);
        for (int i = 0; i < Tile::kWarps; i++) mbar_init(&s.residual[i], 1);
        mbar_fence_init();
    }
    __syncthreads();
    if (warp < 4) {
        setmaxnreg_dec<40>();
        if (threadIdx.x == 0) {
            wait_for_previous();
            produce_pixels<Tile>(s.rings.a, s.bars, args, tiles, maps.x_a, maps.x_b);
        }
        if (threadIdx.x == 32) produce_weights<Tile>(s.rings.b, s.bars, args, tiles, maps.weight_a, maps.weight_b);
    } else {
        setmaxnreg_inc<232>();
        wait_for_previous();
        ConvEpilogue<Tile> epilogue = {s.strips[warp - 4], &s.residual[warp - 4], 0,     0,        maps.y,
                                       maps.residual,      args,                  tiles, warp / 4 - 1, warp % 4, lane};
        consume<Tile>(s.rings, s.bars, args, tiles, epilogue, warp / 4 - 1, lane);
    }
}

#define ENTRY(name, T, ...)                                                                              \
    KERNEL(name, (ConvTile<T, __VA_ARGS__>::kThreads), 1)                                                \
    (GRID_CONST TensorMap x_a, GRID_CONST TensorMap x_b, GRID_CONST TensorMap weight_a,                  \
     GRID_CONST TensorMap weight_b, GRID_CONST TensorMap y, GRID_CONST TensorMap residual,               \
     GRID_CONST ConvArgs<T> args, GRID_CONST ConvTiles tiles) {                                          \
        const ConvMaps maps = {&x_a, &x_b, &weight_a, &weight_b, &y, &residual};                         \
        conv2d_sm90<ConvTile<T, __VA_ARGS__>>(maps, args, tiles);                                        \
    }                                                                                                    \
    REGISTER_KERNEL(name)
#define CONV(tile, suffix, T, ...) ENTRY(conv2d_sm90_##tile##_##suffix, T, __VA_ARGS__)

// Tile; form, blocks of 64 pixels, united, dilation, outputs, stages of pixels and of weights.
#define CONVS(suffix, T)                                               \
    CONV(halo_128x160, suffix, T, kHalo, 2, false, 1, 160, 4, 5)       \
    CONV(halo_256x160, suffix, T, kHalo, 4, true, 1, 160, 2, 5)        \
    CONV(halo_256x128, suffix, T, kHalo, 4, true, 1, 128, 3, 4)        \
    CONV(halo2_128x160, suffix, T, kHalo, 2, false, 2, 160, 3, 5)      \
    CONV(halo2_256x160, suffix, T, kHalo, 4, true, 2, 160, 2, 4)       \
    CONV(im2col_128x160, suffix, T, kIm2col, 2, false, 1, 160, 5, 5)   \
    CONV(im2col_256x128, suffix, T, kIm2col, 4, false, 1, 128, 4, 4)

CONVS(f16, f16)
CONVS(bf16, bf16)
