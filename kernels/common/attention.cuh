// attention.cuh: what an attention is, whichever instructions make its products.
//   s_ij = q_i . k_j scale + bias_ij;   p_ij = exp(s_ij - max_j s_ij);   y_i = sum_j p_ij v_j / sum_j p_ij
//   Keys come in tiles. max and both sums are kept for the keys so far and brought to a new max when one appears
//   (Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691).
//   q, y [N, queries, heads, d]; k, v [R, keys, heads, d], tokens q_stride, kv_stride elements apart (heads side by
//   side), so that they are read where the projections left them. R divides N; image n attends to row n / (N / R).
//   y is dense. causal: query i sees keys 0..=i.
//   bias [B, heads, queries, keys] or null, B divides N: of T5's relative positions, or a mask.
//   k2, v2 [R2, keys2, heads, d] or null: a second source of keys and values. Joined, their scores enter the same softmax
//   (the streams of SD 3's transformer); apart they have one of their own, y = attention(q, k, v) + weight2 attention(q,
//   k2, v2) (IP-Adapter, Ye et al. 2023, arXiv:2308.06721). Not with causal; bias is for the first source alone.
// NaN and infinity spread to what a query sees and no further: neither masked keys nor other heads or images. A query that
// sees scores of -inf alone has NaN.
#pragma once
#include "common/device.cuh"

// The kernels' parameter, as src/ops/cuda/attention.rs has it; tests/kernel_arguments.rs compares the two.
template <class T>
struct AttentionArgs {
    T* y;
    const T* q;
    const T* k;
    const T* v;
    const T* k2;
    const T* v2;
    const T* bias;
    int images, queries, keys, keys2, heads, head_dim;
    int q_stride, kv_stride, kv2_stride;                  // from a token to the next, in elements
    int images_per_kv, images_per_kv2, images_per_bias;  // N / R, N / R2, N / B
    int causal;
    int apart;
    float scale;  // times log2(e): exponentials are powers of two
    float weight2;
};

constexpr float kInfinity = __builtin_huge_valf();
constexpr uint32_t kWholeWarp = ~0u;

// What a new maximum of scores does: exponents are score * scale - shift, and sums so far are multiplied by correction.
struct Rescale {
    float shift, correction;
};

// A row that so far saw only -inf keeps sums of 0, for exp(-inf) relative to any finite maximum; NaN passes through.
DEVICE Rescale rescale(float old_max, float new_max, float scale) {
    const float shift = new_max == -kInfinity ? 0.f : new_max * scale;
    return {shift, exp2_approx(old_max * scale - shift)};
}
