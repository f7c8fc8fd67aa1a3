// epilogue_linear.cuh: from the sums of main_loop.cuh to the result of linear, through a strip of shared memory per warp.
//
// A strip holds the warp's 16 rows of each part of 64 rows, in boxes of up to 128 bytes a row, swizzled as TMA does it. The
// residual comes into it by TMA while the tile is multiplied, is replaced by the result in place, and leaves by TMA. Warps
// do not wait for each other. TMA fills with zeros what is outside of the residual, and leaves out what is outside of y.
#pragma once
#include "common/linear.cuh"
#include "sm90/main_loop.cuh"
#include "sm90/strip.cuh"

// What an entry can do: no activation; SiLU and the GELUs, by `args.activation`; GEGLU, exact or by tanh; no activation and the
// gate of `args.gate`. Apart, because the temporaries of the activations would spill beside the sums of the larger tiles.
enum LinearKind { kPlain, kActivated, kGated, kRowGated };

// kPasses: the columns of a tile go through the strip in so many steps.
template <class Tile_, int kPasses_, LinearKind kKind_>
struct LinearStrip {
    using Tile = Tile_;
    using T = typename Tile::T;
    static constexpr int kPasses = kPasses_;
    static constexpr LinearKind kKind = kKind_;
    static constexpr int kSpan = kKind == kGated ? 2 : 1;                      // columns of C per output
    static constexpr int kColumns = Tile::kN / kPasses / kSpan;       // of y, in a pass
    static constexpr int kBox = kColumns % 64 == 0 ? 64 : kColumns % 32 == 0 ? 32 : 16;
    static constexpr int kBoxes = kColumns / kBox, kBoxChunks = kBox / 8;
    static_assert(Tile::kN % (kPasses * kSpan) == 0 && kColumns % kBox == 0);

    // The swizzle goes by the address: it repeats after 8 rows.
    struct alignas(8 * kBox * 2) Box {
        T values[16 * kBox];
    };
    Box boxes[Tile::kParts][kBoxes];

    static constexpr int kBytes = Tile::kParts * kBoxes * 16 * kBox * 2;
};

template <class Strip_>
struct LinearEpilogue {
    using Strip = Strip_;
    using Tile = typename Strip::Tile;
    using T = typename Tile::T;

    Strip& strip;
    uint64_t* arrived;  // the residual's mbarrier
    uint32_t parity;
    const TensorMap* y;
    const TensorMap* residual;
    const LinearArgs<T, typename Tile::In>& args;
    int lane;
    Pair<T> bias[Tile::kN / 8];  // of columns 8 j + 2 (lane % 4) and the next
};

// The residual of a pass, once the last store out of the strip has read it.
template <class Strip>
DEVICE void load_residual(LinearEpilogue<Strip>& e, int row, int column) {
    if (e.lane == 0) {
        bulk_wait_read<0>();
        mbar_arrive_expect_tx(e.arrived, Strip::kBytes);
        UNROLL
        for (int i = 0; i < Strip::Tile::kParts; i++) {
            UNROLL
            for (int j = 0; j < Strip::kBoxes; j++) {
                tma_load_2d(&e.strip.boxes[i][j], e.residual, e.arrived, column + j * Strip::kBox, row + 64 * i);
            }
        }
    }
    __syncwarp();
}

template <class Strip>
DEVICE void begin(LinearEpilogue<Strip>& e, Place place, int row) {
    using T = typename Strip::T;
    if (e.args.residual != nullptr) load_residual(e, row, place.n / Strip::kSpan);
    // Here, with all slices still to come, they are long there when they are needed.
    const int inside = e.args.bias != nullptr ? e.args.columns - place.n : 0;
    const T* from = e.args.bias + place.n + 2 * (e.lane % 4);
    UNROLL
    for (int j = 0; j < Strip::Tile::kN / 8; j++) {
        Pair<T> pair = {from_f32<T>(0.f), from_f32<T>(0.f)};
        if (GUARD(8 * j < inside)) pair = *reinterpret_cast<const Pair<T>*>(from + 8 * j);
        e.bias[j] = pair;
    }
}

// Results of 8 columns of y from 16 of C, values and gates in turns: of rows lane / 4 and 8 further down, columns
// 2 (lane % 4) and the next, as of any 8 columns of C.
template <int kActivation, class Strip>
DEVICE void geglu(float (&y)[4], const float* sums, const Pair<typename Strip::T>* bias, int lane) {
    using T = typename Strip::T;
    UNROLL
    for (int down = 0; down < 2; down++) {
        float own[2];  // column lane % 4, and 4 further
        UNROLL
        for (int e = 0; e < 2; e++) {
            const float value = sums[4 * e + 2 * down] + to_f32(bias[e].low);
            own[e] = value * gate_for<kActivation, T>(sums[4 * e + 2 * down + 1] + to_f32(bias[e].high));
        }
        UNROLL
        for (int e = 0; e < 2; e++) {
            // Column 2 (lane % 4) + e is with lane (2 lane + e) % 4 of the quad, in its first half if that is below 4.
            const int from = (lane & 28) | ((2 * lane + e) & 3);
            const float near = __shfl_sync(0xFFFFFFFFu, own[0], from), far = __shfl_sync(0xFFFFFFFFu, own[1], from);
            y[2 * down + e] = lane & 2 ? far : near;
        }
    }
}

// Where the gates of the rows that a lane has begin, lane / 4 and 8 further down of each part of 64 rows: their column 0. Null
// for a row beyond the last, which is not stored.
template <class Strip>
struct GateRows {
    const typename Strip::T* of[Strip::Tile::kParts][2];
};

template <class Strip>
DEVICE GateRows<Strip> gate_rows(const LinearEpilogue<Strip>& e, int row) {
    GateRows<Strip> rows;
    UNROLL
    for (int i = 0; i < Strip::Tile::kParts; i++) {
        UNROLL
        for (int half = 0; half < 2; half++) {
            const int m = row + 64 * i + 8 * half + e.lane / 4;
            rows.of[i][half] = GUARD(m < e.args.m) ? row_of(e.args.gate, m / e.args.image_rows) : nullptr;
        }
    }
    return rows;
}

// Multiplies a lane's four of 8 columns from `column` on by their gates.
template <class Strip>
DEVICE void gated(float (&v)[4], const GateRows<Strip>& rows, int part, int column, const LinearEpilogue<Strip>& e) {
    using T = typename Strip::T;
    UNROLL
    for (int half = 0; half < 2; half++) {
        const T* row = rows.of[part][half];
        if (row != nullptr && GUARD(column < e.args.columns)) {
            const Pair<T> gate = *reinterpret_cast<const Pair<T>*>(row + column + 2 * (e.lane % 4));
            v[2 * half] *= to_f32(gate.low);
            v[2 * half + 1] *= to_f32(gate.high);
        }
    }
}

template <int kActivation, class Strip>
DEVICE void write_out(LinearEpilogue<Strip>& e, const Sums<typename Strip::Tile>& sums, Place place, int row) {
    using T = typename Strip::T;
    constexpr int kSpan = Strip::kSpan;
    const int first_column = place.n / kSpan;
    GateRows<Strip> gates;
    if constexpr (Strip::kKind == kRowGated) gates = gate_rows(e, row);
    UNROLL
    for (int pass = 0; pass < Strip::kPasses; pass++) {
        const int column = first_column + pass * Strip::kColumns;
        if (e.args.residual != nullptr) {
            if (pass > 0) load_residual(e, row, column);
            mbar_wait(e.arrived, e.parity);
            e.parity ^= 1;
        } else {
            if (e.lane == 0) bulk_wait_read<0>();
            __syncwarp();
        }
        UNROLL
        for (int i = 0; i < Strip::Tile::kParts; i++) {
            UNROLL
            for (int j = 0; j < Strip::kColumns / 8; j += 2) {
                T* to = chunk_of<Strip>(e.strip.boxes[i][j / Strip::kBoxChunks], e.lane % 16,
                                        j % Strip::kBoxChunks + e.lane / 16);
                float v[2][4];
                UNROLL
                for (int half = 0; half < 2; half++) {
                    const int at = (pass * (Strip::kColumns / 8) + j + half) * kSpan;
                    if constexpr (kSpan == 2) {
                        geglu<kActivation, Strip>(v[half], &sums[i][4 * at], &e.bias[at], e.lane);
                    } else {
                        UNROLL
                        for (int k = 0; k < 4; k++) {
                            const float bias = to_f32(k % 2 ? e.bias[at].high : e.bias[at].low);
                            v[half][k] = activate<T>(kActivation, sums[i][4 * at + k] + bias);
                        }
                        if constexpr (Strip::kKind == kRowGated) gated(v[half], gates, i, place.n + 8 * at, e);
                    }
                }
                if (e.args.residual != nullptr) add_from<T>(v, to);
                put<T>(to, v);
            }
        }
        fence_proxy_async();
        __syncwarp();
        if (e.lane == 0) {
            UNROLL
            for (int i = 0; i < Strip::Tile::kParts; i++) {
                UNROLL
                for (int j = 0; j < Strip::kBoxes; j++) {
                    tma_store_2d(e.y, &e.strip.boxes[i][j], column + j * Strip::kBox, row + 64 * i);
                }
            }
            bulk_commit();
        }
        __syncwarp();
    }
}

template <class Strip>
DEVICE void finish(LinearEpilogue<Strip>& e, const Sums<typename Strip::Tile>& sums, Place place, int row) {
    if constexpr (Strip::kKind == kGated) {
        if (e.args.activation == kGeglu) return write_out<kGeglu>(e, sums, place, row);
        write_out<kGegluTanh>(e, sums, place, row);
    } else if constexpr (Strip::kKind == kPlain || Strip::kKind == kRowGated) {
        write_out<kNone>(e, sums, place, row);
    } else {
        switch (e.args.activation) {
            case kSilu: return write_out<kSilu>(e, sums, place, row);
            case kGelu: return write_out<kGelu>(e, sums, place, row);
            case kGeluTanh: return write_out<kGeluTanh>(e, sums, place, row);
            default: return write_out<kQuickGelu>(e, sums, place, row);
        }
    }
}

template <class Strip>
DEVICE void end(LinearEpilogue<Strip>& e) {
    if (e.lane == 0) bulk_wait_read<0>();
    __syncwarp();
}
