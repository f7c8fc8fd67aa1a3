// epilogue_conv2d.cuh: bias and row into the sums of conv2d_loop.cuh, and from the sums to the result, through a strip of
// shared memory per warp.
//
// The columns of a tile go through the strip 32 at a time, in two places by turns: while one is on its way out, the next has
// its residual on the way in and is filled. What TMA moves is the warp's 16 pixels: 2 rows of 8 (halo), or 16 of the output's
// order (im2col). It loads zeros for what is outside of the residual, and leaves out what is outside of y.
// Parts of sums (args.partial) leave as they are, in f32, from the registers.
#pragma once
#include "sm90/conv2d_loop.cuh"
#include "sm90/strip.cuh"

constexpr int kStripColumns = 32;

template <class Tile>
struct ConvStrip {
    using T = typename Tile::T;
    static constexpr int kBoxChunks = kStripColumns / 8;
    // The swizzle goes by the address: it repeats after 8 rows.
    struct alignas(8 * kStripColumns * 2) Box {
        T values[16 * kStripColumns];
    };
    Box boxes[2][Tile::kParts];
};

template <class Tile_>
struct ConvEpilogue {
    using Tile = Tile_;
    using T = typename Tile::T;
    using Strip = ConvStrip<Tile>;

    Strip& strip;
    uint64_t* arrived;  // the residual's mbarrier
    uint32_t parity;
    int turn;  // place of the strip that is next
    const TensorMap* y;  // of every parity
    const TensorMap* residual;  // not in the form doubled
    const ConvArgs<T>& c;
    const ConvTiles& t;
    int consumer, warp, lane;  // warp: of the consumer's four
};

// The first of the warp's 16 pixels in a block.
template <class Tile>
DEVICE Spot warp_spot(const ConvEpilogue<Tile>& e, int m, int part) {
    Spot spot = block_at<Tile>(e.t, m, e.consumer, part);
    if constexpr (Tile::kIsHalo) {
        spot.y += 2 * e.warp;
    } else {
        spot.x += 16 * e.warp;
    }
    return spot;
}

// The residual of 32 columns to place `turn`, once the stores that read from it are done.
template <class Tile>
DEVICE void load_residual(ConvEpilogue<Tile>& e, int m, int column, int turn) {
    if (e.lane == 0) {
        bulk_wait_read<0>();
        mbar_arrive_expect_tx(e.arrived, Tile::kParts * sizeof(typename ConvStrip<Tile>::Box));
        UNROLL
        for (int i = 0; i < Tile::kParts; i++) {
            const Spot spot = warp_spot(e, m, i);
            tma_load_4d(&e.strip.boxes[turn][i], e.residual, e.arrived, column, spot.x, spot.y, spot.image);
        }
    }
    __syncwarp();
}

// Adds, to the sums of one block, 8 columns each what this lane has of them: nothing from a null pointer, or beyond `inside`.
template <class Tile>
DEVICE void add_columns(float (&sums)[Tile::kN / 2], const typename Tile::T* from, int inside) {
    using T = typename Tile::T;
    UNROLL
    for (int j = 0; j < Tile::kN / 8; j++) {
        Pair<T> pair = {from_f32<T>(0.f), from_f32<T>(0.f)};
        if (from != nullptr && GUARD(8 * j < inside)) pair = *reinterpret_cast<const Pair<T>*>(from + 8 * j);
        sums[4 * j] += to_f32(pair.low);
        sums[4 * j + 1] += to_f32(pair.high);
        sums[4 * j + 2] += to_f32(pair.low);
        sums[4 * j + 3] += to_f32(pair.high);
    }
}

template <class Tile>
DEVICE void start(ConvEpilogue<Tile>& e, Sums<Tile>& sums, const ConvPlace& place) {
    using T = typename Tile::T;
    const bool whole = e.c.partial == nullptr;
    if (whole && e.c.residual != nullptr) load_residual(e, place.m, place.n, e.turn);
    const int inside = e.c.outputs - place.n, n = place.n + 2 * (e.lane % 4);
    UNROLL
    for (int i = 0; i < Tile::kParts; i++) {
        UNROLL
        for (int j = 0; j < Tile::kN / 2; j++) sums[i][j] = 0.f;
        add_columns<Tile>(sums[i], whole && e.c.bias != nullptr ? e.c.bias + n : nullptr, inside);
        const int image = block_at<Tile>(e.t, place.m, e.consumer, i).image;
        const T* row = nullptr;
        if (whole && GUARD(image < e.t.images)) row = row_of(e.c, image, n);
        add_columns<Tile>(sums[i], row, inside);
    }
}

struct alignas(8) PairOfSums {
    float low, high;
};

// Part of the sums, as they are.
template <class Tile>
DEVICE void write_partial(const ConvEpilogue<Tile>& e, const Sums<Tile>& sums, const ConvPlace& place) {
    const int width = e.c.output_width, inside = e.c.outputs - place.n;
    float* partial = e.c.partial + int64_t(place.first / e.t.share) * e.c.m * e.c.outputs + place.n + 2 * (e.lane % 4);
    UNROLL
    for (int i = 0; i < Tile::kParts; i++) {
        const Spot spot = warp_spot(e, place.m, i);
        UNROLL
        for (int half = 0; half < 2; half++) {
            const int row = e.lane / 4 + 8 * half;
            int y = spot.y + (Tile::kIsHalo ? half : 0), x = spot.x + (Tile::kIsHalo ? e.lane / 4 : row);
            if constexpr (Tile::kIsDoubled) {
                y = 2 * y + place.parity / 2 - e.t.odd;
                x = 2 * x + place.parity % 2;
            }
            const int pixel = y * width + x;
            const bool in_rows = !Tile::kIsDoubled || GUARD(y >= 0), in_row = !Tile::kIsHalo || GUARD(x < width);
            if (in_rows && in_row && GUARD(pixel < e.c.pixels) && GUARD(spot.image < e.t.images)) {
                float* to = partial + (int64_t(spot.image) * e.c.pixels + pixel) * e.c.outputs;
                UNROLL
                for (int j = 0; j < Tile::kN / 8; j++) {
                    if (GUARD(8 * j < inside)) {
                        *reinterpret_cast<PairOfSums*>(to + 8 * j) = {sums[i][4 * j + 2 * half], sums[i][4 * j + 2 * half + 1]};
                    }
                }
            }
        }
    }
}

template <class Tile>
DEVICE void finish(ConvEpilogue<Tile>& e, const Sums<Tile>& sums, const ConvPlace& place) {
    using T = typename Tile::T;
    using Strip = ConvStrip<Tile>;
    constexpr int kPasses = Tile::kN / kStripColumns;
    if (e.c.partial != nullptr) return write_partial(e, sums, place);
    UNROLL
    for (int pass = 0; pass < kPasses; pass++) {
        const int column = place.n + pass * kStripColumns;
        typename Strip::Box(&boxes)[Tile::kParts] = e.strip.boxes[e.turn];
        e.turn ^= 1;
        if (e.c.residual != nullptr) {
            mbar_wait(e.arrived, e.parity);
            e.parity ^= 1;
            __syncwarp();  // every lane has seen the phase end before the next one may
            if (pass + 1 < kPasses) load_residual(e, place.m, column + kStripColumns, e.turn);
        } else {
            // The last store but one, which was from this place.
            if (e.lane == 0) bulk_wait_read<1>();
            __syncwarp();
        }
        UNROLL
        for (int i = 0; i < Tile::kParts; i++) {
            UNROLL
            for (int j = 0; j < kStripColumns / 8; j += 2) {
                T* to = chunk_of<Strip>(boxes[i], e.lane % 16, j + e.lane / 16);
                const float* from = &sums[i][4 * (pass * (kStripColumns / 8) + j)];
                float v[2][4];
                UNROLL
                for (int k = 0; k < 8; k++) v[k / 4][k % 4] = from[k];
                if (e.c.residual != nullptr) add_from<T>(v, to);
                UNROLL
                for (int k = 0; k < 8; k++) v[k / 4][k % 4] = finished(e.c, v[k / 4][k % 4]);
                put<T>(to, v);
            }
        }
        fence_proxy_async();
        __syncwarp();
        if (e.lane == 0) {
            UNROLL
            for (int i = 0; i < Tile::kParts; i++) {
                const Spot spot = warp_spot(e, place.m, i);
                const int later = Tile::kIsDoubled ? e.t.later[place.parity / 2] : 0;
                tma_store_4d(e.y + place.parity, &boxes[i], column, spot.x, spot.y - later, spot.image);
            }
            bulk_commit();
        }
        __syncwarp();
    }
}

template <class Tile>
DEVICE void end(ConvEpilogue<Tile>& e) {
    if (e.lane == 0) bulk_wait_read<0>();
    __syncwarp();
}
