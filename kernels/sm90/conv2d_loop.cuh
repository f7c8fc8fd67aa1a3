// conv2d_loop.cuh: main_loop.cuh for a convolution: two rings, of pixels and of weights, and a stage of pixels that serves
// several taps.
//
// The rows of a block's tile are blocks of 64 output pixels of one image, each what one wgmma makes; tiles do not know where
// images end, blocks do, so an image's sums do not depend on the batch. A slice is 64 channels of one source.
//   halo    3 x 3, stride 1: a block is 8 x 8 pixels. One box of all pixels that its taps read, (8 + 2 d)^2 of them, lies in
//           shared memory with a pixel in each 128 bytes; a tap reads 8 rows of 8 pixels by a descriptor that begins at its
//           first pixel. The swizzle goes by the address, so that it may begin at any pixel. Of a tile that is `united` the
//           blocks lie side by side, 2 x 2, and have one box together.
//   doubled x enlarged to twice its edges (nearest), then 3 x 3: the output pixels of one parity of row and column are a 2 x 2
//           convolution of x itself, with weights that are sums of those of the nine taps, [4, O, 2, 2, C]; parity (a, b)
//           reads pixels y + a - 1, y + a of x. A block is 8 x 8 pixels of x, a tile one parity of them. As halo otherwise.
//   im2col  any kernel, stride and dilation: a block is 64 pixels in the order of the output. A box for each tap: those
//           pixels' input under it, which TMA finds.
// In all three the channels beyond a source's end and the pixels outside the input are zeros that TMA fills in, the weights beyond
// the source's channels too, so that nothing meets them.
//
// A sum runs over slices, in each over the taps, in each over the 64 channels, 16 at a time inside wgmma, whatever the form
// and the tile: every variant gives the same bits. It begins with bias and row.
#pragma once
#include "common/conv2d.cuh"
#include "sm90/main_loop.cuh"

enum ConvForm { kHalo, kDoubled, kIm2col };

// How the work is cut, as src/ops/cuda/conv_sm90.rs has it; a unit is a block, or the united blocks of a tile.
struct ConvTiles {
    int images;
    int units;         // of an image
    int units_across;  // in a row of them; not im2col
    int tiles_m, tiles_n;
    int parities;  // 4 in the form doubled, else 1
    int tiles;     // with those of every parity and split
    int slices_a;  // of the first source
    int slices;
    int share;  // slices of a split
    int corner_y, corner_x;  // pixel of x, as held, under the first tap of the first output pixel; doubled: of parity 0, 0
    // doubled, a stripe of which may begin with an odd row:
    int odd;       // the first row is
    int later[2];  // rows of x by which the map of y of each parity of rows begins later
};

// The shape of a block's work: two consumer warpgroups, each with half of the pixels.
template <class T_, ConvForm kForm, int kBlocks_, bool kUnited_, int kDilation_, int kN_, int kStagesA_, int kStagesB_>
struct ConvTile {
    using T = T_;
    static constexpr bool kIsHalo = kForm != kIm2col, kIsDoubled = kForm == kDoubled, kUnited = kUnited_;
    static constexpr int kBlocks = kBlocks_, kDilation = kDilation_, kN = kN_;
    static constexpr int kConsumers = 2, kThreads = 128 * (1 + kConsumers), kWarps = 4 * kConsumers;
    static constexpr int kParts = kBlocks / kConsumers;  // blocks of a consumer
    static constexpr int kSlice = 64;
    static constexpr int kUnits = kUnited ? 1 : kBlocks;
    static constexpr int kEdge = kIsHalo ? kUnited ? 16 : 8 : 0;                 // pixels along a unit
    static constexpr int kSide = kIsDoubled ? 2 : 3;                             // taps along the kernel; not im2col
    static constexpr int kPitch = kIsHalo ? kEdge + (kSide - 1) * kDilation : 8;  // pixels of a row of a box
    static constexpr int kPixelBytes = kSlice * 2;
    static constexpr int kBoxBytes = (kIsHalo ? kPitch * kPitch : 64) * kPixelBytes;
    static constexpr int kUnitBytes = (kBoxBytes + 1023) / 1024 * 1024;
    static constexpr int kBytesA = kUnits * kUnitBytes, kBytesB = kN * kPixelBytes;
    // From a consumer's block to its next one, from a consumer's first to the other's.
    static constexpr int kPartBytes = kUnited ? 8 * kPixelBytes : kUnitBytes;
    static constexpr int kConsumerBytes = kUnited ? 8 * kPitch * kPixelBytes : kParts * kUnitBytes;
    static_assert(sizeof(T) == 2 && kN % 32 == 0 && kN <= 256 && kBlocks % kConsumers == 0);
    static_assert(!kUnited || (kIsHalo && kBlocks == 4));
    static_assert(!kIsDoubled || kDilation == 1);

    struct RingA {
        static constexpr int kStages = kStagesA_;
        alignas(1024) unsigned char stages[kStages][kBytesA];
    };
    struct RingB {
        static constexpr int kStages = kStagesB_;
        alignas(1024) unsigned char stages[kStages][kBytesB];
    };
    struct Barriers {
        uint64_t full_a[RingA::kStages], empty_a[RingA::kStages];
        uint64_t full_b[RingB::kStages], empty_b[RingB::kStages];
    };
    struct Rings {
        RingA a;
        RingB b;
    };
};

// A tile: its number among those of the pixels, its first output channel, and the slices that it sums up, none perhaps.
struct ConvPlace {
    int m, n, parity, first, end;
};
// Blocks that run at once share pixels, then weights.
DEVICE ConvPlace place_of(const ConvTiles& t, int tile, int columns) {
    const int row = tile / t.tiles_n, pixels = row / t.parities, split = pixels / t.tiles_m;
    const int first = split * t.share, end = min(t.slices, first + t.share);
    return {pixels % t.tiles_m, tile % t.tiles_n * columns, row % t.parities, first, end};
}

// First output pixel of a unit or a block; doubled: pixel of x; im2col: y is 0, x counts all pixels of the image. Past the
// last image there is nothing to read or to write.
struct Spot {
    int image, y, x;
};
template <class Tile>
DEVICE Spot unit_at(const ConvTiles& t, int unit) {
    const int image = unit / t.units, within = unit % t.units;
    if constexpr (Tile::kIsHalo) {
        return {image, within / t.units_across * Tile::kEdge, within % t.units_across * Tile::kEdge};
    } else {
        return {image, 0, within * 64};
    }
}
template <class Tile>
DEVICE Spot block_at(const ConvTiles& t, int m, int consumer, int part) {
    if constexpr (Tile::kUnited) {
        const Spot unit = unit_at<Tile>(t, m);
        return {unit.image, unit.y + 8 * consumer, unit.x + 8 * part};
    } else {
        return unit_at<Tile>(t, m * Tile::kBlocks + consumer * Tile::kParts + part);
    }
}

// Taps down and across.
template <class Tile>
DEVICE int taps_down(const ConvArgs<typename Tile::T>& c) {
    return Tile::kIsHalo ? Tile::kSide : c.kernel_height;
}
template <class Tile>
DEVICE int taps_across(const ConvArgs<typename Tile::T>& c) {
    return Tile::kIsHalo ? Tile::kSide : c.kernel_width;
}

template <class Tile>
DEVICE void init_rings(typename Tile::Barriers& bars) {
    for (int i = 0; i < Tile::RingA::kStages; i++) {
        mbar_init(&bars.full_a[i], 1);
        mbar_init(&bars.empty_a[i], Tile::kWarps);
    }
    for (int i = 0; i < Tile::RingB::kStages; i++) {
        mbar_init(&bars.full_b[i], 1);
        mbar_init(&bars.empty_b[i], Tile::kWarps);
    }
}

// By one thread: the pixels of all tiles of the block. `x`: of the two sources.
template <class Tile>
DEVICE void produce_pixels(typename Tile::RingA& ring, typename Tile::Barriers& bars, const ConvArgs<typename Tile::T>& c,
                           const ConvTiles& t, const TensorMap* x_a, const TensorMap* x_b) {
    RingPosition<typename Tile::RingA> at = {0, 0};
    for (int tile = blockIdx.x; tile < t.tiles; tile += gridDim.x) {
        const ConvPlace place = place_of(t, tile, Tile::kN);
        Spot corner[Tile::kUnits];  // in x
        UNROLL
        for (int i = 0; i < Tile::kUnits; i++) {
            corner[i] = unit_at<Tile>(t, place.m * Tile::kUnits + i);
            if constexpr (!Tile::kIsHalo) {
                const int pixel = corner[i].x;
                corner[i].y = pixel / c.output_width * c.stride;
                corner[i].x = pixel % c.output_width * c.stride;
            }
            corner[i].y += t.corner_y + place.parity / 2;
            corner[i].x += t.corner_x + place.parity % 2;
        }
        for (int slice = place.first; slice < place.end; slice++) {
            const bool second = slice >= t.slices_a;
            const TensorMap* x = second ? x_b : x_a;
            const int channel = (slice - (second ? t.slices_a : 0)) * Tile::kSlice;
            const auto load_stage = [&](auto load_unit) {
                uint64_t* full = &bars.full_a[at.stage];
                mbar_wait(&bars.empty_a[at.stage], at.parity ^ 1);
                mbar_arrive_expect_tx(full, Tile::kUnits * Tile::kBoxBytes);
                UNROLL
                for (int i = 0; i < Tile::kUnits; i++) {
                    load_unit(ring.stages[at.stage] + i * Tile::kUnitBytes, full, corner[i]);
                }
                advance(at);
            };
            if constexpr (Tile::kIsHalo) {
                load_stage([&](void* to, uint64_t* full, const Spot& from) {
                    tma_load_4d(to, x, full, channel, from.x, from.y, from.image);
                });
            } else {
                for (int tap_y = 0; tap_y < c.kernel_height; tap_y++) {
                    for (int tap_x = 0; tap_x < c.kernel_width; tap_x++) {
                        load_stage([&](void* to, uint64_t* full, const Spot& from) {
                            tma_load_im2col_4d(to, x, full, channel, from.x, from.y, from.image, uint16_t(tap_x * c.dilation),
                                               uint16_t(tap_y * c.dilation));
                        });
                    }
                }
            }
        }
    }
}

// By one thread: the weights of all tiles of the block.
template <class Tile>
DEVICE void produce_weights(typename Tile::RingB& ring, typename Tile::Barriers& bars, const ConvArgs<typename Tile::T>& c,
                            const ConvTiles& t, const TensorMap* weight_a, const TensorMap* weight_b) {
    const int taps = taps_down<Tile>(c) * taps_across<Tile>(c);
    RingPosition<typename Tile::RingB> at = {0, 0};
    for (int tile = blockIdx.x; tile < t.tiles; tile += gridDim.x) {
        const ConvPlace place = place_of(t, tile, Tile::kN);
        const int row = place.parity * c.outputs + place.n;
        for (int slice = place.first; slice < place.end; slice++) {
            const bool second = slice >= t.slices_a;
            const TensorMap* weight = second ? weight_b : weight_a;
            const int channel = (slice - (second ? t.slices_a : 0)) * Tile::kSlice;
            ROLLED
            for (int tap = 0; tap < taps; tap++) {
                uint64_t* full = &bars.full_b[at.stage];
                mbar_wait(&bars.empty_b[at.stage], at.parity ^ 1);
                mbar_arrive_expect_tx(full, Tile::kBytesB);
                tma_load_3d(ring.stages[at.stage], weight, full, channel, tap, row);
                advance(at);
            }
        }
    }
}

// One tap of a slice, asynchronously.
template <class Tile>
DEVICE void multiply_tap(Sums<Tile>& sums, uint32_t a, uint32_t b) {
    UNROLL
    for (int k = 0; k < Tile::kSlice / 16; k++) {
        UNROLL
        for (int i = 0; i < Tile::kParts; i++) {
            const uint32_t part = a + 2 * k + i * (Tile::kPartBytes / kDescriptorUnit);
            wgmma<typename Tile::T, Tile::kN>(sums[i], descriptor<Tile::kPitch * Tile::kPixelBytes>(part),
                                              descriptor(b + 2 * k), true);
        }
    }
}

// By all threads of a consumer warpgroup. Epilogue, as in main_loop.cuh: start(epilogue, sums, place) sets the sums,
// finish(epilogue, sums, place) has them, end(epilogue) comes after the last tile.
template <class Tile, class Epilogue>
DEVICE void consume(typename Tile::Rings& rings, typename Tile::Barriers& bars, const ConvArgs<typename Tile::T>& c,
                    const ConvTiles& t, Epilogue& epilogue, int consumer, int lane) {
    constexpr int kUnit = kDescriptorUnit;
    const uint32_t a = descriptor_low(rings.a.stages[0]) + consumer * (Tile::kConsumerBytes / kUnit);
    const uint32_t b = descriptor_low(rings.b.stages[0]);
    RingPosition<typename Tile::RingA> at_a = {0, 0};
    RingPosition<typename Tile::RingB> at_b = {0, 0};
    for (int tile = blockIdx.x; tile < t.tiles; tile += gridDim.x) {
        const ConvPlace place = place_of(t, tile, Tile::kN);
        Sums<Tile> sums;
        start(epilogue, sums, place);
        fence_sums<Tile>(sums);
        // What the products under way read, to be handed back when they are done.
        uint64_t *last_a = bars.empty_a, *last_b = bars.empty_b;
        for (int slice = place.first; slice < place.end; slice++) {
            if constexpr (Tile::kIsHalo) {
                mbar_wait(&bars.full_a[at_a.stage], at_a.parity);
            }
            ROLLED
            for (int tap_y = 0; tap_y < taps_down<Tile>(c); tap_y++) {
                ROLLED
                for (int tap_x = 0; tap_x < taps_across<Tile>(c); tap_x++) {
                    if constexpr (!Tile::kIsHalo) {
                        mbar_wait(&bars.full_a[at_a.stage], at_a.parity);
                    }
                    mbar_wait(&bars.full_b[at_b.stage], at_b.parity);
                    const int shift = Tile::kIsHalo ? (tap_y * Tile::kPitch + tap_x) * Tile::kDilation * Tile::kPixelBytes : 0;
                    wgmma_fence();
                    multiply_tap<Tile>(sums, a + (at_a.stage * Tile::kBytesA + shift) / kUnit,
                                       b + at_b.stage * (Tile::kBytesB / kUnit));
                    wgmma_commit();
                    wgmma_wait<1>();
                    const bool first = tap_y == 0 && tap_x == 0;
                    if (slice > place.first || !first) {
                        if (lane == 0) mbar_arrive(last_b);
                        if (!Tile::kIsHalo || first) {
                            if (lane == 0) mbar_arrive(last_a);
                        }
                        __syncwarp();
                    }
                    last_a = &bars.empty_a[at_a.stage];
                    last_b = &bars.empty_b[at_b.stage];
                    advance(at_b);
                    if constexpr (!Tile::kIsHalo) advance(at_a);
                }
            }
            if constexpr (Tile::kIsHalo) advance(at_a);
        }
        wgmma_wait<0>();
        fence_sums<Tile>(sums);
        if (place.first < place.end) {
            if (lane == 0) {
                mbar_arrive(last_a);
                mbar_arrive(last_b);
            }
            __syncwarp();
        }
        finish(epilogue, sums, place);
    }
    end(epilogue);
}
