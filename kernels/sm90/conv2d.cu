// sm90/conv2d.cu: conv2d (common/conv2d.cuh) by wgmma and TMA, for Hopper (sm_90a): f16 and bf16; the channels of each source
//   and the outputs are multiples of 8, all operands aligned to 16 bytes; a resize to twice the edges before 3 x 3 or
//   none. What does not fit is for conv2d.cu.
// Compute bound: 2 M O K flops, K = kh kw C; halo: 1.6 (d = 1) to 2.3 (d = 2) reads of x from L2 instead of 9.
// Maps: x of each source [N, H, W, C] in boxes of 64 channels (halo: by kPitch x kPitch pixels; im2col: by 64), weight of each
//   source [O, kh kw, C] in boxes of kN x 1 x 64, both zeros beyond C; y and residual in boxes of 32 channels: halo
//   [N, Hout, Wout, O] by 2 x 8 pixels, doubled the same of the pixels of each parity, im2col [N, 1, Hout Wout, O] by 16. A map
//   of what is not there is not read.
// Launch: conv2d_sm90_<tile>_<dtype>; grid up to the number of tiles, as many as run at once; block ConvTile::kThreads; dynamic
//   shared memory sizeof(ConvShared).
//   src/ops/cuda/conv_sm90.rs has the table and who picks from it. Parts of sums are joined by conv2d_join of conv2d.cu.
#include "common/vector.cuh"
#include "sm90/epilogue_conv2d.cuh"

template <class Tile>
struct ConvShared {
    typename Tile::Rings rings;
    ConvStrip<Tile> strips[Tile::kWarps];
    typename Tile::Barriers bars;
    uint64_t residual[Tile::kWarps];
};

// Of y, by parity; in the other forms the first alone is read.
struct ConvResults {
    TensorMap maps[4];
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
    wait_for_previous();
    if (warp < 4) {
        setmaxnreg_dec<40>();
        if (threadIdx.x == 0) produce_pixels<Tile>(s.rings.a, s.bars, args, tiles, maps.x_a, maps.x_b);
        if (threadIdx.x == 32) produce_weights<Tile>(s.rings.b, s.bars, args, tiles, maps.weight_a, maps.weight_b);
    } else {
        setmaxnreg_inc<232>();
        ConvEpilogue<Tile> epilogue = {s.strips[warp - 4], &s.residual[warp - 4], 0,     0,        maps.y,
                                       maps.residual,      args,                  tiles, warp / 4 - 1, warp % 4, lane};
        consume<Tile>(s.rings, s.bars, args, tiles, epilogue, warp / 4 - 1, lane);
    }
}

#define ENTRY(name, T, ...)                                                                              \
    KERNEL(name, (ConvTile<T, __VA_ARGS__>::kThreads), 1)                                                \
    (GRID_CONST TensorMap x_a, GRID_CONST TensorMap x_b, GRID_CONST TensorMap weight_a,                  \
     GRID_CONST TensorMap weight_b, GRID_CONST ConvResults y, GRID_CONST TensorMap residual,             \
     GRID_CONST ConvArgs<T> args, GRID_CONST ConvTiles tiles) {                                          \
        const ConvMaps maps = {&x_a, &x_b, &weight_a, &weight_b, y.maps, &residual};                         \
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
    CONV(doubled_128x160, suffix, T, kDoubled, 2, false, 1, 160, 4, 5) \
    CONV(doubled_256x160, suffix, T, kDoubled, 4, true, 1, 160, 3, 4)  \
    CONV(doubled_256x128, suffix, T, kDoubled, 4, true, 1, 128, 3, 5)  \
    CONV(im2col_128x160, suffix, T, kIm2col, 2, false, 1, 160, 5, 5)   \
    CONV(im2col_256x128, suffix, T, kIm2col, 4, false, 1, 128, 4, 4)

CONVS(f16, f16)
CONVS(bf16, bf16)

// conv2d_join_weights: u [4, O, 2, 2, C], the weights of the form doubled, from those of the nine taps, weight [O, 3, 3, C].
//   u[2 a + b, o, p, q, c] = sum of weight[o, y, x, c] over rows y of set (a, p) and columns x of set (b, q), which are
//   (0, 0): 0   (0, 1): 1, 2   (1, 0): 0, 1   (1, 1): 2: those that read the same pixel of x. In f32, one rounding.
// Memory bound: 25 O C sizeof(T) bytes. Launch: grid ceil(O C / 8 / kSumThreads), block kSumThreads. C is a multiple of 8,
// both aligned to 16 bytes.
constexpr int kSumThreads = 256;

template <class T>
DEVICE void join_weights(T* u, const T* weight, int outputs, int channels) {
    const int chunks = channels / 8;
    const int64_t item = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
    if (!GUARD(item < int64_t(outputs) * chunks)) return;
    const int64_t output = item / chunks, channel = item % chunks * 8;
    float taps[3][3][8];
    UNROLL
    for (int tap = 0; tap < 9; tap++) load<8>(taps[tap / 3][tap % 3], weight + (output * 9 + tap) * channels + channel);
    UNROLL
    for (int parity = 0; parity < 4; parity++) {
        UNROLL
        for (int tap = 0; tap < 4; tap++) {
            const int a = parity / 2, b = parity % 2, p = tap / 2, q = tap % 2;
            float sums[8] = {};
            UNROLL
            for (int y = p * (1 + a); y < p * (1 + a) + (a == p ? 1 : 2); y++) {
                UNROLL
                for (int x = q * (1 + b); x < q * (1 + b) + (b == q ? 1 : 2); x++) {
                    UNROLL
                    for (int e = 0; e < 8; e++) sums[e] += taps[y][x][e];
                }
            }
            store<8>(u + ((int64_t(parity) * outputs + output) * 4 + tap) * channels + channel, sums);
        }
    }
}

#define JOIN_WEIGHTS(suffix, T)                                                                             \
    KERNEL(conv2d_join_weights_##suffix, kSumThreads, 1)(T* u, const T* weight, int outputs, int channels) {       \
        follow_previous();                                                                                  \
        join_weights(u, weight, outputs, channels);                                                         \
    }                                                                                                          \
    REGISTER_KERNEL(conv2d_join_weights_##suffix)

JOIN_WEIGHTS(f16, f16)
JOIN_WEIGHTS(bf16, bf16)
