// linear.cu, linear: y[M, N] = activation(x[M, K] weight[columns, K]^T + bias[columns]) + residual[M, N]
//   activation: none, SiLU, GELU (exact), quick GELU: columns = N; GEGLU: columns = 2 N, weight rows interleaved, row 2j
//   is value j and row 2j + 1 its gate: y_j = value_j gelu(gate_j)
//   y, x, weight, bias, residual: T = f32 | f16 | bf16, contiguous; bias and residual may be null. y overlaps nothing.
// Compute bound from M ~ 300 on (bf16, H100-class): 2 M columns K flops; below, the weight's columns K sizeof(T) bytes.
// Bias, activation and residual in f32, one rounding at the store.
// Launch: linear_<tile>_<dtype>, grid ceil(M / kM) * ceil(columns / kN), block Tile::kThreads, dynamic shared memory
// sizeof(Tile::Shared); src/ops/cuda/tiles.rs has the table. `general` takes any K and alignment; the others ask that
// K % Chunk<T>::kCount == 0 and that x and weight are aligned to 16 bytes.
#include "common/gemm.cuh"
#include "common/math.cuh"

enum LinearActivation { kNone, kSilu, kGelu, kQuickGelu, kGeglu };

// Bits of `wide`: these rows are whole aligned chunks.
enum LinearWide { kWideX = 1, kWideWeight = 2, kWideOutput = 4 };

template <class T>
struct LinearOutput {
    T* y;
    const T* bias;
    const T* residual;
    int m, n;
    int activation;
    bool wide;
};

DEVICE float activate(int activation, float x) {
    switch (activation) {
        case kSilu: return silu(x);
        case kGelu: return gelu(x);
        case kQuickGelu: return quick_gelu(x);
        default: return x;
    }
}

// kSpan: columns of C an output, 2 for GEGLU.
template <class Tile, int kSpan>
DEVICE void store_linear(const LinearOutput<typename Tile::T>& o, const float (&rows)[16][Tile::kPitch], int m0,
                         int n0) {
    using T = typename Tile::T;
    constexpr int kCount = Chunk<T>::kCount, kAcross = Tile::kWarpN / (kCount * kSpan);
    for (int item = lane_index(); item < 16 * kAcross; item += 32) {
        const int row = item / kAcross, column = item % kAcross * kCount * kSpan;
        const int m = m0 + row, n = (n0 + column) / kSpan;
        const float* sums = &rows[row][column];
        const int64_t at = int64_t(m) * o.n + n;
        if (o.wide) {
            if (GUARD(m < o.m) && GUARD(n < o.n)) {
                float v[kCount * kSpan];
                UNROLL
                for (int e = 0; e < kCount * kSpan; e++) v[e] = sums[e];
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
                    for (int e = 0; e < kCount; e++) v[e] = v[2 * e] * gelu(v[2 * e + 1]);
                } else {
                    UNROLL
                    for (int e = 0; e < kCount; e++) v[e] = activate(o.activation, v[e]);
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
                if (GUARD(m < o.m) && GUARD(n + e < o.n)) {
                    const int64_t c = int64_t(n + e) * kSpan;
                    float v = sums[e * kSpan] + (o.bias != nullptr ? to_f32(o.bias[c]) : 0.0f);
                    if constexpr (kSpan == 2) {
                        v *= gelu(sums[e * kSpan + 1] + (o.bias != nullptr ? to_f32(o.bias[c + 1]) : 0.0f));
                    } else {
                        v = activate(o.activation, v);
                    }
                    if (o.residual != nullptr) v += to_f32(o.residual[at + e]);
                    o.y[at + e] = from_f32<T>(v);
                }
            }
        }
    }
}

template <class Tile>
DEVICE void store(const LinearOutput<typename Tile::T>& o, const float (&rows)[16][Tile::kPitch], int m, int n) {
    if (o.activation == kGeglu) {
        store_linear<Tile, 2>(o, rows, m, n);
    } else {
        store_linear<Tile, 1>(o, rows, m, n);
    }
}

template <class Tile>
DEVICE void linear(typename Tile::T* y, const typename Tile::T* x, const typename Tile::T* weight,
                   const typename Tile::T* bias, const typename Tile::T* residual, int m, int columns, int k,
                   int activation, int wide) {
    SHARED_DYNAMIC(typename Tile::Shared, s);
    const TileOrigin origin = tile_origin<Tile>(m, columns);
    auto a = dense_rows<Tile>(x, origin.m, m, k, 0, wide & kWideX);
    auto b = dense_rows<Tile>(weight, origin.n, columns, k, 0, wide & kWideWeight);
    Sums<Tile> sums = {};
    product<Tile>(sums, s, a, b, (k + Tile::kSlice - 1) / Tile::kSlice);
    const LinearOutput<typename Tile::T> output = {
        y, bias, residual, m, activation == kGeglu ? columns / 2 : columns, activation, (wide & kWideOutput) != 0};
    write_out<Tile>(sums, s, origin, output);
}

#define LINEAR(name, T, min_blocks, ...)                                                                            \
    KERNEL(linear_##name, (Tile<T, __VA_ARGS__>::kThreads), min_blocks)                                             \
    (T* y, const T* x, const T* weight, const T* bias, const T* residual, int m, int columns, int k, int activation, \
     int wide) {                                                                                                    \
        linear<Tile<T, __VA_ARGS__>>(y, x, weight, bias, residual, m, columns, k, activation, wide);                 \
    }                                                                                                               \
    REGISTER_KERNEL(linear_##name)

#include "common/tiles.cuh"
TILES(LINEAR)
