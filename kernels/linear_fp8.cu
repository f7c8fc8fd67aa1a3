// linear_fp8.cu, quantize: rows of x[rows, K] (T = f32 | f16 | bf16) as e4m3 codes with a scale each:
//     scale = peak / 448, code = round(x (448 / peak)), peak = max(max |x|, 1e-30)   scales [rows] f32
//   linear_fp8: common/linear_fp8.cuh, for every card: the codes become f16, which holds them exactly, on their way into
//   shared memory. sm90/linear_fp8.cu has Hopper's.
// Launch: quantize_<dtype>: a warp a row, grid ceil(rows / 8); quantize_wide_<dtype>: a block a row; the host picks by K
//   alone; block kThreads; `vector`: K is a multiple of kVector, pointers aligned to 16. Memory bound: x comes from DRAM
//   once, the second time from L1.
//   linear_fp8_general_<dtype of y>: grid ceil(M / kM) * ceil(columns / kN), block Product::kThreads, dynamic shared memory
//   sizeof(Product::Shared). kWideX, kWideWeight: K is a multiple of 8 and the codes are aligned to 8.
#include "common/epilogue_linear.cuh"
#include "common/linear_fp8.cuh"
#include "common/vector.cuh"

constexpr int kThreads = 256;
constexpr float kSmallestPeak = 1e-30f;

// ---- quantize ----

// The larger; NaN stays, once it is there.
DEVICE float larger(float a, float b) { return b > a || b != b ? b : a; }

template <int V>
DEVICE void store_codes(e4m3* to, const float (&values)[V]) {
    if constexpr (V == 1) {
        *to = to_e4m3(values[0]);
    } else {
        static_assert(V == 8);
        const float low[4] = {values[0], values[1], values[2], values[3]};
        const float high[4] = {values[4], values[5], values[6], values[7]};
        *reinterpret_cast<uint2*>(to) = make_uint2(pack_e4m3(low), pack_e4m3(high));
    }
}

// `kRowThreads`: 32 or kThreads, those that share a row.
template <int kRowThreads, int V, class T>
DEVICE void quantize(e4m3* codes, float* scales, const T* x, int64_t rows, int k) {
    static_assert(kRowThreads == 32 || kRowThreads == kThreads);
    const int64_t row = int64_t(blockIdx.x) * (kThreads / kRowThreads) + threadIdx.x / kRowThreads;
    if (!GUARD(row < rows)) return;
    x += row * k;
    codes += row * k;
    const int first = threadIdx.x % kRowThreads * V, step = kRowThreads * V;
    float values[V], peak = kSmallestPeak;
    for (int c = first; c < k; c += step) {
        load<V>(values, x + c);
        UNROLL
        for (int j = 0; j < V; j++) peak = larger(peak, fabsf(values[j]));
    }
    UNROLL
    for (int lanes = 16; lanes > 0; lanes /= 2) peak = larger(peak, __shfl_xor_sync(~0u, peak, lanes));
    if constexpr (kRowThreads > 32) {
        SHARED_STATIC(float, peaks, [kThreads / 32]);
        if (threadIdx.x % 32 == 0) peaks[threadIdx.x / 32] = peak;
        __syncthreads();
        UNROLL
        for (int warp = 0; warp < kThreads / 32; warp++) peak = larger(peak, peaks[warp]);
    }
    if (threadIdx.x % kRowThreads == 0) scales[row] = peak / kLargestE4m3;
    const float up = kLargestE4m3 / peak;
    for (int c = first; c < k; c += step) {
        load<V>(values, x + c);
        UNROLL
        for (int j = 0; j < V; j++) values[j] *= up;
        store_codes<V>(codes + c, values);
    }
}

#define QUANTIZE(name, kRowThreads, T)                                                                      \
    KERNEL(name, kThreads, 1)(e4m3* codes, float* scales, const T* x, int64_t rows, int k, int vector) {    \
        follow_previous();                                                                                  \
        if (vector) {                                                                                       \
            quantize<kRowThreads, kVector>(codes, scales, x, rows, k);                                      \
        } else {                                                                                            \
            quantize<kRowThreads, 1>(codes, scales, x, rows, k);                                            \
        }                                                                                                   \
    }                                                                                                       \
    REGISTER_KERNEL(name)

QUANTIZE(quantize_f32, 32, float)
QUANTIZE(quantize_f16, 32, f16)
QUANTIZE(quantize_bf16, 32, bf16)
QUANTIZE(quantize_wide_f32, kThreads, float)
QUANTIZE(quantize_wide_f16, kThreads, f16)
QUANTIZE(quantize_wide_bf16, kThreads, bf16)

// ---- linear_fp8 ----

using Product = Tile<f16, 64, 64, 2, 2, 2, true>;

// As DenseRows, of codes.
struct E4m3Rows {
    const e4m3* x;
    int64_t stride;
    int rows, k;
    bool wide;
};

DEVICE E4m3Rows e4m3_rows(const e4m3* x, int first_row, int rows, int k, bool wide) {
    const int row = first_row + threadIdx.x / kRowChunks, first_k = threadIdx.x % kRowChunks * Product::kChunkValues;
    return {x + int64_t(row) * k + first_k, int64_t(Product::kRowStep) * k, rows - row, k - first_k, wide};
}

struct alignas(8) E4m3Chunk {
    e4m3 v[8];
};

template <class Tile, int kRows>
DEVICE void load_wide(E4m3Rows& from, Chunk<f16> (&to)[kRows]) {
    UNROLL
    for (int i = 0; i < kRows; i++) {
        to[i] = Chunk<f16>{};
        if (GUARD(i * Tile::kRowStep < from.rows) && GUARD(from.k > 0)) {
            const E4m3Chunk codes = *reinterpret_cast<const E4m3Chunk*>(from.x + i * from.stride);
            UNROLL
            for (int e = 0; e < 8; e++) to[i].v[e] = to_f16(to_f32(codes.v[e]));
        }
    }
    from.x += Tile::kSlice;
    from.k -= Tile::kSlice;
}

template <class Tile, int kRows>
DEVICE void fill(E4m3Rows& from, Chunk<f16>* slice) {
    for (int i = 0; i < kRows; i++) {
        Chunk<f16>& to = slice[own_place<Tile>(i)];
        for (int e = 0; e < Tile::kChunkValues; e++) {
            const bool inside = GUARD(i * Tile::kRowStep < from.rows) && GUARD(e < from.k);
            to.v[e] = to_f16(inside ? to_f32(from.x[i * from.stride + e]) : 0.f);
        }
    }
    from.x += Tile::kSlice;
    from.k -= Tile::kSlice;
}

template <class Tile, class T>
DEVICE void store(const LinearFp8Args<T>& o, const float (&rows)[16][Tile::kPitch], int m, int n) {
    store_scaled<Tile>(o.linear, RowScales{o.x_scales, o.weight_scales}, rows, m, n);
}

template <class T>
DEVICE void linear_fp8(const LinearFp8Args<T>& args) {
    SHARED_DYNAMIC(Product::Shared, s);
    const LinearArgs<T, e4m3>& linear = args.linear;
    const TileOrigin origin = tile_origin<Product>(linear.m, linear.columns);
    E4m3Rows a = e4m3_rows(linear.x, origin.m, linear.m, linear.k, linear.wide & kWideX);
    E4m3Rows b = e4m3_rows(linear.weight, origin.n, linear.columns, linear.k, linear.wide & kWideWeight);
    Sums<Product> sums = {};
    product<Product>(sums, s, a, b, (linear.k + Product::kSlice - 1) / Product::kSlice);
    write_out<Product>(sums, s, origin, args);
}

#define LINEAR_FP8(name, T)                                                                          \
    KERNEL(name, Product::kThreads, 2)(const LinearFp8Args<T> args) {                                \
        follow_previous();                                                                           \
        linear_fp8(args);                                                                            \
    }                                                                                                \
    REGISTER_KERNEL(name)

LINEAR_FP8(linear_fp8_general_f32, float)
LINEAR_FP8(linear_fp8_general_f16, f16)
LINEAR_FP8(linear_fp8_general_bf16, bf16)
