// rms_norm.cu: root mean square norm over the last dimension; Zhang & Sennrich 2019, arXiv:1910.07467.
//   y = x / sqrt(mean(x^2) + eps) * gamma
//   y, x [rows, C]   gamma [C]   T = f32 | f16 | bf16   eps: units of x squared
// Arithmetic in f32, rounded once, at the store. An infinity makes NaN in its own place and 0 elsewhere in its row; where
// the squares themselves leave f32 (|x| > 1e19) the row is 0: both as the formula says in f32.
//
// Memory bound, ideally 2 rows C sizeof(T) bytes: x comes from DRAM once, the second time from L1 (8 KiB a block at the
// longest row of T5). One entry, two ways, which the host picks by C alone, so that a row's result depends on nothing else:
//   rms_norm       a warp a row, 8 rows a block, no barrier: short rows and many
//   rms_norm_wide  a block a row: long rows and few (T5, C = 4096)
// rms_norm_heads: the same in place, of queries and keys where a fused projection has left them, x [tokens, P, heads, C]: the
//   first P - 1 parts by a gamma each, the last, the values, stays. A quarter of a warp a row up to C = 64, else a warp.
// Launch: grid ceil(rows / 8) or rows, rms_norm_heads ceil(rows / 32) or ceil(rows / 8), block kThreads. `vector`: C is a
// multiple of kVector, all pointers aligned to 16.
#include "common/reduce.cuh"
#include "common/vector.cuh"

constexpr int kThreads = 256;

// `kRowThreads`: 32 or kThreads, those that share a row.
template <int kRowThreads, int V, class T>
DEVICE void rms_norm(T* y, const T* x, const T* gamma, int64_t rows, int channels, float eps) {
    static_assert(kRowThreads == 32 || kRowThreads == kThreads);
    const int64_t row = int64_t(blockIdx.x) * (kThreads / kRowThreads) + threadIdx.x / kRowThreads;
    if (!GUARD(row < rows)) return;
    x += row * channels;
    y += row * channels;
    const int first = threadIdx.x % kRowThreads * V, step = kRowThreads * V;
    float values[V], squares = 0.f;
    for (int c = first; c < channels; c += step) {
        load<V>(values, x + c);
        UNROLL
        for (int j = 0; j < V; j++) squares = fmaf(values[j], values[j], squares);
    }
    if constexpr (kRowThreads == 32) {
        squares = warp_sum(squares);
    } else {
        SHARED_STATIC(float, sums, [kThreads / 32]);
        squares = block_sum(squares, sums);
    }
    const float scale = 1.f / sqrtf(squares / channels + eps);
    for (int c = first; c < channels; c += step) {
        float gammas[V];
        load<V>(values, x + c);
        load<V>(gammas, gamma + c);
        UNROLL
        for (int j = 0; j < V; j++) values[j] = values[j] * scale * gammas[j];
        store<V>(y + c, values);
    }
}

// `rows`: of the parts that are normalised, `parts` - 1 times `heads` of a token. A row of lanes beyond the last takes part in
// the sums, with nothing.
template <int kRowThreads, int V, class T>
DEVICE void rms_norm_heads(T* x, const T* gamma, const T* second_gamma, int64_t rows, int parts, int heads, int channels,
                           float eps) {
    static_assert(kRowThreads == 32 || kRowThreads == 8);
    const int64_t row = int64_t(blockIdx.x) * (kThreads / kRowThreads) + threadIdx.x / kRowThreads;
    const bool inside = GUARD(row < rows);
    const int normalised = (parts - 1) * heads, in_token = int(row % normalised);
    x += (row / normalised * parts * heads + in_token) * channels;
    if (in_token >= heads) gamma = second_gamma;
    const int first = threadIdx.x % kRowThreads * V, step = kRowThreads * V, end = inside ? channels : 0;
    float values[V], squares = 0.f;
    for (int c = first; c < end; c += step) {
        load<V>(values, x + c);
        UNROLL
        for (int j = 0; j < V; j++) squares = fmaf(values[j], values[j], squares);
    }
    UNROLL
    for (int lanes = kRowThreads / 2; lanes > 0; lanes /= 2) squares += __shfl_xor_sync(~0u, squares, lanes);
    const float scale = 1.f / sqrtf(squares / channels + eps);
    for (int c = first; c < end; c += step) {
        float gammas[V];
        load<V>(values, x + c);
        load<V>(gammas, gamma + c);
        UNROLL
        for (int j = 0; j < V; j++) values[j] = values[j] * scale * gammas[j];
        store<V>(x + c, values);
    }
}

#define ENTRY(name, kRowThreads, T)                                                                                    \
    KERNEL(name, kThreads, 1)(T* y, const T* x, const T* gamma, int64_t rows, int channels, float eps, int vector) {   \
        follow_previous();                                                                                             \
        if (vector) {                                                                                                  \
            rms_norm<kRowThreads, kVector>(y, x, gamma, rows, channels, eps);                                          \
        } else {                                                                                                       \
            rms_norm<kRowThreads, 1>(y, x, gamma, rows, channels, eps);                                                \
        }                                                                                                              \
    }                                                                                                                  \
    REGISTER_KERNEL(name)

ENTRY(rms_norm_f32, 32, float)
ENTRY(rms_norm_f16, 32, f16)
ENTRY(rms_norm_bf16, 32, bf16)
ENTRY(rms_norm_wide_f32, kThreads, float)
ENTRY(rms_norm_wide_f16, kThreads, f16)
ENTRY(rms_norm_wide_bf16, kThreads, bf16)

#define HEADS(name, kRowThreads, T)                                                                                    \
    KERNEL(name, kThreads, 1)(T* x, const T* gamma, const T* second_gamma, int64_t rows, int parts, int heads,         \
                              int channels, float eps, int vector) {                                                   \
        follow_previous();                                                                                             \
        if (vector) {                                                                                                  \
            rms_norm_heads<kRowThreads, kVector>(x, gamma, second_gamma, rows, parts, heads, channels, eps);           \
        } else {                                                                                                       \
            rms_norm_heads<kRowThreads, 1>(x, gamma, second_gamma, rows, parts, heads, channels, eps);                 \
        }                                                                                                              \
    }                                                                                                                  \
    REGISTER_KERNEL(name)

HEADS(rms_norm_heads_f32, 8, float)
HEADS(rms_norm_heads_f16, 8, f16)
HEADS(rms_norm_heads_bf16, 8, bf16)
HEADS(rms_norm_heads_wide_f32, 32, float)
HEADS(rms_norm_heads_wide_f16, 32, f16)
HEADS(rms_norm_heads_wide_bf16, 32, bf16)
