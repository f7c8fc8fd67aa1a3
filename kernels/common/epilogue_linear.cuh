// epilogue_linear.cuh: from a tile's sums to the result of linear, for gemm.cuh's write_out.
#pragma once
#include "gemm.cuh"
#include "linear.cuh"

// What a sum is multiplied by: nothing, or the scales of its rows of x and of weight.
struct NoScales {};
struct RowScales {
    const float* x;
    const float* weight;
};
DEVICE float scaled(NoScales, int, int64_t, float sum) { return sum; }
DEVICE float scaled(RowScales scales, int m, int64_t column, float sum) {
    return sum * scales.x[m] * scales.weight[column];
}

// kActivation: kGeglu or kGegluTanh; kNone: the arguments'.
template <class Tile, int kActivation, class T, class In, class Scales>
DEVICE void store_linear(const LinearArgs<T, In>& o, Scales scales, const float (&rows)[16][Tile::kPitch], int m0, int n0) {
    constexpr int kSpan = kActivation == kNone ? 1 : 2;  // columns of C per output
    constexpr int kCount = Chunk<T>::kCount, kAcross = Tile::kWarpN / (kCount * kSpan);
    const int outputs = o.columns / kSpan;
    for (int item = lane_index(); item < 16 * kAcross; item += 32) {
        const int row = item / kAcross, column = item % kAcross * kCount * kSpan;
        const int m = m0 + row, n = (n0 + column) / kSpan;
        const float* sums = &rows[row][column];
        const int64_t at = int64_t(m) * outputs + n;
        if (o.wide & kWideOutput) {
            if (GUARD(m < o.m) && GUARD(n < outputs)) {
                float v[kCount * kSpan];
                UNROLL
                for (int e = 0; e < kCount * kSpan; e++) v[e] = scaled(scales, m, int64_t(n) * kSpan + e, sums[e]);
                if (o.bias != nullptr) {
                    UNROLL
                    for (int part = 0; part < kSpan; part++) {
                        const auto bias =
                            *reinterpret_cast<const Chunk<T>*>(o.bias + int64_t(n) * kSpan + part * kCount);
                        UNROLL
                        for (int e = 0; e < kCount; e++) v[part * kCount + e] += to_f32(bias.v[e]);
                    }
                }
                if constexpr (kSpan == 2) {
                    UNROLL
                    for (int e = 0; e < kCount; e++) v[e] = v[2 * e] * gate_for<kActivation, T>(v[2 * e + 1]);
                } else {
                    UNROLL
                    for (int e = 0; e < kCount; e++) v[e] = activate<T>(o.activation, v[e]);
                    if (o.gate.table != nullptr) {
                        const auto gate = *reinterpret_cast<const Chunk<T>*>(row_of(o.gate, m / o.image_rows) + n);
                        UNROLL
                        for (int e = 0; e < kCount; e++) v[e] *= to_f32(gate.v[e]);
                    }
                }
                if (o.residual != nullptr) {
                    const auto residual = *reinterpret_cast<const Chunk<T>*>(o.residual + at);
                    UNROLL
                    for (int e = 0; e < kCount; e++) v[e] += to_f32(residual.v[e]);
                }
                Chunk<T> y;
                UNROLL
                for (int e = 0; e < kCount; e++) y.v[e] = from_f32<T>(v[e]);
                *reinterpret_cast<Chunk<T>*>(o.y + at) = y;
            }
        } else {
            for (int e = 0; e < kCount; e++) {
                if (GUARD(m < o.m) && GUARD(n + e < outputs)) {
                    const int64_t c = int64_t(n + e) * kSpan;
                    const float sum = scaled(scales, m, c, sums[e * kSpan]);
                    float v = sum + (o.bias != nullptr ? to_f32(o.bias[c]) : 0.0f);
                    if constexpr (kSpan == 2) {
                        const float gate = scaled(scales, m, c + 1, sums[e * kSpan + 1]);
                        v *= gate_for<kActivation, T>(gate + (o.bias != nullptr ? to_f32(o.bias[c + 1]) : 0.0f));
                    } else {
                        v = activate<T>(o.activation, v);
                        if (o.gate.table != nullptr) v *= to_f32(row_of(o.gate, m / o.image_rows)[n + e]);
                    }
                    if (o.residual != nullptr) v += to_f32(o.residual[at + e]);
                    o.y[at + e] = from_f32<T>(v);
                }
            }
        }
    }
}

template <class Tile, class T, class In, class Scales>
DEVICE void store_scaled(const LinearArgs<T, In>& o, Scales scales, const float (&rows)[16][Tile::kPitch], int m, int n) {
    switch (o.activation) {
        case kGeglu: return store_linear<Tile, kGeglu>(o, scales, rows, m, n);
        case kGegluTanh: return store_linear<Tile, kGegluTanh>(o, scales, rows, m, n);
        default: return store_linear<Tile, kNone>(o, scales, rows, m, n);
    }
}

template <class Tile>
DEVICE void store(const LinearArgs<typename Tile::T>& o, const float (&rows)[16][Tile::kPitch], int m, int n) {
    store_scaled<Tile>(o, NoScales{}, rows, m, n);
}
