// attention.cuh: what an attention is, whichever instructions make its products.
//   s_ij = q_i . k_j scale + bias_ij;   p_ij = exp(s_ij - max_j s_ij);   y_i = sum_j p_ij v_j / sum_j p_ij
//   Keys come in tiles. max and both sums are kept for the keys so far and brought to a new max when one appears
//   (Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691).
//   q, y [N, queries, heads, d]; k, v [R, keys, heads, d], tokens q_stride, kv_stride elements apart (heads side by
//   side), so that they are read where the projections left them. R divides N; image n attends to row n / (N / R).
//   y is dense. causal: query i sees keys 0..=i.
//   bias [B, heads, queries, keys] or null, B divides N: of T5's relative positions, or a mask.
//   Windows: the tokens are those of a map [map_h, map_w], row by row, shifted cyclically, and attend to those of their own
//   window (MSW-MSA of HiDiffusion, Zhang et al. 2024, arXiv:2311.17528, after Swin's, arXiv:2103.14030). N counts windows then,
//   of an image one after the other, and queries = keys the tokens of one. Token i of a window lies on the map at row (window's
//   first row + shift + i / window_w) mod map_h, columns likewise: read and stored there, so that nothing is rolled, cut or
//   put together. The shift is factor * unit, the factor in the table's row of the image's step, of image mod
//   shift_images, read on the device.
//   With key_h the windows are neighbourhoods (ScaleDiff, arXiv:2510.25818): of the queries they are disjoint boxes of
//   [window_h, window_w], the last of an axis short where the map is no multiple, of the keys boxes of [key_h, key_w] around them,
//   moved inside the map. Then queries = window_h window_w, of which a short box has fewer, and keys = key_h key_w.
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
    const unsigned* shifts;  // [steps, shift_images, shift_columns], this op's column; null: no shift
    const unsigned* step;    // [2, step_images]
    int images, queries, keys, keys2, heads, head_dim;
    int q_stride, kv_stride, kv2_stride;                  // from a token to the next, in elements
    int images_per_kv, images_per_kv2, images_per_bias;  // N / R, N / R2, N / B
    int map_h, map_w, window_h, window_w, unit_h, unit_w;  // map_h: 0 without windows
    int key_h, key_w;                                      // 0: a window's keys are those of its queries
    int shift_columns, shift_images, step_images;
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

// Of a window: its image, and where its first token lies on the map.
struct WindowPlace {
    int image, top, left;
};
template <class T>
DEVICE WindowPlace window_place(const AttentionArgs<T>& args, int number) {
    const int across = (args.map_w + args.window_w - 1) / args.window_w;
    const int windows = across * ((args.map_h + args.window_h - 1) / args.window_h);
    const int image = number / windows, window = number % windows;
    int factor = 0;
    if (args.shifts) {
        const unsigned row = args.step[image % args.step_images] * args.shift_images + image % args.shift_images;
        factor = int(args.shifts[row * args.shift_columns] % 65536);
    }
    return {image, window / across * args.window_h + factor * args.unit_h, window % across * args.window_w + factor * args.unit_w};
}
// Columns of the window at `place`, of its queries; how many these are; columns of its keys.
template <class T>
DEVICE int query_columns(const AttentionArgs<T>& args, const WindowPlace& place) {
    return args.key_h ? min(args.window_w, args.map_w - place.left) : args.window_w;
}
template <class T>
DEVICE int query_count(const AttentionArgs<T>& args, const WindowPlace& place) {
    return args.key_h ? query_columns(args, place) * min(args.window_h, args.map_h - place.top) : args.queries;
}
template <class T>
DEVICE int key_columns(const AttentionArgs<T>& args) {
    return args.key_h ? args.key_w : args.window_w;
}
// Where its keys lie.
template <class T>
DEVICE WindowPlace key_place(const AttentionArgs<T>& args, const WindowPlace& place) {
    if (!args.key_h) return place;
    const int top = max(0, min(place.top - (args.key_h - args.window_h) / 2, args.map_h - args.key_h));
    const int left = max(0, min(place.left - (args.key_w - args.window_w) / 2, args.map_w - args.key_w));
    return {place.image, top, left};
}
// The token in row y and column x of a window's box, among those of all images.
template <class T>
DEVICE int64_t map_token(const AttentionArgs<T>& args, const WindowPlace& place, int y, int x) {
    return (int64_t(place.image) * args.map_h + (place.top + y) % args.map_h) * args.map_w + (place.left + x) % args.map_w;
}
