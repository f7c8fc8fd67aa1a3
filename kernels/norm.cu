// norm.cu: group norm (over one or two sources; modulated, and with SiLU or GELU, or not) and layer norm.
//
// Group norm of x [N, H*W, C], channels-last, G groups of D = C/G channels; Wu & He 2018, arXiv:1803.08494:
//   mean, var over the H*W*D elements of a group;  z = (x - mean) / sqrt(var + eps) * gamma[c] + beta[c];  y = f(z)
// or modulated: y = f((1 + scale[r, c]) z + shift[r, c]), r the row of an image's step in a table (common/step_rows.cuh), the
// second norm of a ResNet in Dhariwal & Nichol 2021, arXiv:2105.05233. A thread takes it into gamma and beta of its channels,
// once for all its pixels. f: nothing, SiLU or GELU.
// x may be two tensors a [N, H*W, Ca], b [N, H*W, Cb] side by side on the channels, C = Ca + Cb; a group may span both.
// T = f32 | f16 | bf16; statistics in f32, as float2 {mean, 1 / sqrt(var + eps)} [N, G].
//
// Two ways. Up to 32x32 pixels a launch costs more than the data: group_norm_small does all in one, a block per few
// groups, x read twice (the second time from L1 or L2). Larger images: group_norm_statistics reads x once, split over the
// pixels, and leaves mean and squares per split and channel; group_norm_merge joins these per group; group_norm_apply
// reads x again and writes y. An image is split by its own size alone, so its result does not depend on the batch.
//
// Variance without cancellation, also at |mean| = 1000 std: a thread sums the differences from its first sample. The
// square of that sample's own deviation is part of the result, so n samples lose at most n eps of it even where the
// sample is an outlier. Parts are joined around their joint mean (Chan, Golub & LeVeque 1979), never as E[x^2] - E[x]^2.
//
// `vector`: all channel counts are multiples of kVector and all pointers aligned to 16 bytes, scale and shift in every row too.
#include "common/norm.cuh"
#include "common/reduce.cuh"

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMergeThreads = 128;
// Pixels a thread of group_norm_apply takes, over which the loads of its channels' parameters are spread.
constexpr int kApplyPixels = 8;
// Pixels that a thread has on their way at once.
constexpr int kInFlight = 4;
static_assert(kApplyPixels % kInFlight == 0);

// Mean and sum of squared deviations of V channels over `count` >= 1 samples at p, p + stride, ...
template <int V, class T>
DEVICE void moments(float (&mean)[V], float (&squares)[V], const T* p, int64_t stride, int count) {
    float shift[V], sum[V] = {};
    load<V>(shift, p);
    UNROLL
    for (int j = 0; j < V; j++) squares[j] = 0.f;
    const auto take = [&](const Raw<V, T>& raw) {
        float x[V];
        widen(x, raw);
        UNROLL
        for (int j = 0; j < V; j++) {
            const float d = x[j] - shift[j];
            sum[j] += d;
            squares[j] = fmaf(d, d, squares[j]);
        }
    };
    int i = 1;
    for (; i + kInFlight <= count; i += kInFlight) {
        Raw<V, T> raw[kInFlight];
        UNROLL
        for (int k = 0; k < kInFlight; k++) fetch<V>(raw[k], p + (i + k) * stride);
        UNROLL
        for (int k = 0; k < kInFlight; k++) take(raw[k]);
    }
    for (; i < count; i++) {
        Raw<V, T> raw;
        fetch<V>(raw, p + i * stride);
        take(raw);
    }
    const float scale = 1.f / count;
    UNROLL
    for (int j = 0; j < V; j++) {
        mean[j] = fmaf(sum[j], scale, shift[j]);
        const float left = squares[j] - sum[j] * sum[j] * scale;
        squares[j] = left < 0.f ? 0.f : left;  // NaN stays
    }
}

// Samples of `count` that row `row` of `rows` takes when they are dealt in turn.
DEVICE int dealt(int count, int row, int rows) { return (count - row + rows - 1) / rows; }

// group_norm_statistics: partial [N, splits, C] = {mean, squared deviations} of each channel over a split's pixels.
// Reads x once, coalesced over channels. Launch: grid (ceil(C / (tile V)), splits, N) with V = kVector or 1, block
// tile * (kThreads / tile): `tile` <= 32 columns of V channels side by side, pixels dealt to the rows of threads.
template <int V, class T>
DEVICE void group_norm_statistics(float2* partial, const Sources<T>& x, int pixels, int split_pixels, int tile) {
    SHARED_STATIC(float, means, [kThreads * V]);
    SHARED_STATIC(float, deviations, [kThreads * V]);
    const int row = threadIdx.x / tile, rows = blockDim.x / tile;
    const int tile_channel = blockIdx.x * tile * V, width = tile * V;
    const int column = threadIdx.x % tile * V, channel = tile_channel + column;
    const int first = blockIdx.y * split_pixels, count = min(split_pixels, pixels - first);
    if (GUARD(channel < x.channels()) && row < count) {
        float mean[V], squares[V];
        const T* p = x.at(int64_t(blockIdx.z) * pixels + first + row, channel);
        moments<V>(mean, squares, p, x.stride(channel) * rows, dealt(count, row, rows));
        UNROLL
        for (int j = 0; j < V; j++) {
            means[row * width + column + j] = mean[j];
            deviations[row * width + column + j] = squares[j];
        }
    }
    __syncthreads();
    const int c = threadIdx.x;  // one channel a thread: rows >= V
    if (GUARD(c < min(width, x.channels() - tile_channel))) {
        const int last = min(rows, count);
        float sum = 0.f;
        for (int r = 1; r < last; r++) sum += dealt(count, r, rows) * (means[r * width + c] - means[c]);
        const float mean = means[c] + sum / count;
        float squares = 0.f;
        for (int r = 0; r < last; r++) {
            const float d = means[r * width + c] - mean;
            squares += deviations[r * width + c] + dealt(count, r, rows) * d * d;
        }
        const int64_t split = int64_t(blockIdx.z) * gridDim.y + blockIdx.y;
        partial[split * x.channels() + tile_channel + c] = make_float2(mean, squares);
    }
}

// group_norm_merge: statistics [N, G] of partial [N, splits, C]. Launch: grid (G, N), block kMergeThreads.
DEVICE void group_norm_merge(float2* statistics, const float2* partial, int channels, int pixels, int split_pixels,
                             int splits, float eps) {
    SHARED_STATIC(float, sums, [kMergeThreads / 32]);
    SHARED_STATIC(float, square_sums, [kMergeThreads / 32]);
    const int group_channels = channels / gridDim.x, parts = splits * group_channels;
    const float2* first = partial + int64_t(blockIdx.y) * splits * channels + blockIdx.x * group_channels;
    const float reference = first->x, total = float(pixels) * group_channels;
    float sum = 0.f;
    for (int i = threadIdx.x; i < parts; i += kMergeThreads) {
        const int split = i / group_channels, count = min(split_pixels, pixels - split * split_pixels);
        sum += count * (first[int64_t(split) * channels + i % group_channels].x - reference);
    }
    const float mean = reference + block_sum(sum, sums) / total;
    float squares = 0.f;
    for (int i = threadIdx.x; i < parts; i += kMergeThreads) {
        const int split = i / group_channels, count = min(split_pixels, pixels - split * split_pixels);
        const float2 part = first[int64_t(split) * channels + i % group_channels];
        squares += part.y + count * (part.x - mean) * (part.x - mean);
    }
    squares = block_sum(squares, square_sums);
    if (threadIdx.x == 0) statistics[blockIdx.y * gridDim.x + blockIdx.x] = finished(mean, squares, total, eps);
}

// What normalises V channels of one image.
template <int V>
struct Affine {
    float2 statistics[V];
    float gamma[V], beta[V];

    template <class T>
    __device__ void apply(T* y, const Raw<V, T>& x, int activation) const {
        float values[V];
        widen(values, x);
        UNROLL
        for (int j = 0; j < V; j++) values[j] = normalise(values[j], statistics[j], gamma[j], beta[j]);
        activate_normed<T>(values, activation);
        store<V>(y, values);
    }
};

// `statistics`: of the group that `channel` is in, and of those behind it.
template <int V, class T>
DEVICE Affine<V> affine(const float2* statistics, const T* gamma, const T* beta, const ModulationArgs<T>& modulation, int image,
                        int channel, int group_channels) {
    Affine<V> affine;
    load<V>(affine.gamma, gamma + channel);
    load<V>(affine.beta, beta + channel);
    modulate(affine.gamma, affine.beta, modulation, image, channel);
    int in_group = channel % group_channels;
    UNROLL
    for (int j = 0; j < V; j++) {
        affine.statistics[j] = *statistics;
        if (++in_group == group_channels && j + 1 < V) in_group = 0, statistics++;
    }
    return affine;
}

// V channels of the next kInFlight pixels of a thread: `pixel`, `pixel` + `rows` .. below `pixels`. `first`: of the image.
template <int V, class T>
DEVICE void normalise_pixels(T* y, const Sources<T>& x, const Affine<V>& affine, int64_t first, int pixel, int rows,
                             int pixels, int channel, int activation) {
    Raw<V, T> raw[kInFlight];
    UNROLL
    for (int k = 0; k < kInFlight; k++) {
        if (GUARD(pixel + k * rows < pixels)) fetch<V>(raw[k], x.at(first + pixel + k * rows, channel));
    }
    UNROLL
    for (int k = 0; k < kInFlight; k++) {
        const int64_t at = first + pixel + k * rows;
        if (GUARD(pixel + k * rows < pixels)) affine.apply(y + at * x.channels() + channel, raw[k], activation);
    }
}

// group_norm_apply: y [N, H*W, C] = f(norm of x), statistics [N, G], gamma, beta [C]. Memory bound: x and y once.
// Launch: grid (ceil(H*W / (rows kApplyPixels)), ceil(C / (tile V)), N), block tile * rows, rows = kThreads / tile.
template <int V, class T>
DEVICE void group_norm_apply(T* y, const Sources<T>& x, const float2* statistics, const T* gamma, const T* beta,
                             const ModulationArgs<T>& modulation, int pixels, int groups, int activation, int tile) {
    const int row = threadIdx.x / tile, rows = blockDim.x / tile;
    const int channel = (blockIdx.y * tile + threadIdx.x % tile) * V, group_channels = x.channels() / groups;
    if (!GUARD(channel < x.channels())) return;
    statistics += blockIdx.z * groups + channel / group_channels;
    const Affine<V> normalised = affine<V>(statistics, gamma, beta, modulation, blockIdx.z, channel, group_channels);
    const int first = blockIdx.x * kApplyPixels * rows + row;
    UNROLL
    for (int i = 0; i < kApplyPixels; i += kInFlight) {
        normalise_pixels(y, x, normalised, int64_t(blockIdx.z) * pixels, first + i * rows, rows, pixels, channel, activation);
    }
}

// group_norm_small: statistics [N, G] and y, either of them null where it is not wanted.
// Launch: grid (G / window, N), block kThreads; a block takes `window` groups, whose channels a vector does not straddle
// and which are at most kThreads columns of V channels.
template <int V, class T>
DEVICE void group_norm_small(T* y, float2* statistics, const Sources<T>& x, const T* gamma, const T* beta,
                             const ModulationArgs<T>& modulation, int pixels, int groups, int window, float eps,
                             int activation) {
    SHARED_STATIC(float, means, [kThreads * V]);
    SHARED_STATIC(float, deviations, [kThreads * V]);
    SHARED_STATIC(float2, finals, [kVector]);
    const int group_channels = x.channels() / groups, width = window * group_channels, columns = width / V;
    const int rows = kThreads / columns, row = threadIdx.x / columns, column = threadIdx.x % columns * V;
    const int channel = blockIdx.x * width + column, last = min(rows, pixels);
    const int64_t first_pixel = int64_t(blockIdx.y) * pixels;
    if (row < last) {
        float mean[V], squares[V];
        const T* p = x.at(first_pixel + row, channel);
        moments<V>(mean, squares, p, x.stride(channel) * rows, dealt(pixels, row, rows));
        UNROLL
        for (int j = 0; j < V; j++) {
            means[row * width + column + j] = mean[j];
            deviations[row * width + column + j] = squares[j];
        }
    }
    __syncthreads();
    for (int group = threadIdx.x / 32; group < window; group += kWarps) {
        const int parts = last * group_channels, base = group * group_channels;
        const float reference = means[base], total = float(pixels) * group_channels;
        float sum = 0.f;
        for (int i = threadIdx.x % 32; i < parts; i += 32) {
            const int r = i / group_channels;
            sum += dealt(pixels, r, rows) * (means[r * width + base + i % group_channels] - reference);
        }
        const float mean = reference + warp_sum(sum) / total;
        float squares = 0.f;
        for (int i = threadIdx.x % 32; i < parts; i += 32) {
            const int r = i / group_channels, at = r * width + base + i % group_channels;
            const float d = means[at] - mean;
            squares += deviations[at] + dealt(pixels, r, rows) * d * d;
        }
        const float2 final = finished(mean, warp_sum(squares), total, eps);
        if (threadIdx.x % 32 == 0) {
            finals[group] = final;
            if (statistics) statistics[blockIdx.y * groups + blockIdx.x * window + group] = final;
        }
    }
    __syncthreads();
    if (y && row < last) {
        const Affine<V> normalised =
            affine<V>(finals + column / group_channels, gamma, beta, modulation, blockIdx.y, channel, group_channels);
        for (int pixel = row; pixel < pixels; pixel += kInFlight * rows) {
            normalise_pixels(y, x, normalised, first_pixel, pixel, rows, pixels, channel, activation);
        }
    }
}

// layer_norm: z = (x - mean) / sqrt(var + eps) * gamma + beta over the last dimension; Ba et al. 2016, arXiv:1607.06450.
//   y = z, or modulated: y = (1 + scale[r]) z + shift[r], r the row of an image's step (Peebles & Xie 2023, arXiv:2212.09748)
//   y, x [rows, C]   gamma, beta [C], null: 1 and 0   scale, shift: columns of one table (common/step_rows.cuh), of which a row
//   is for `image_rows` rows of x
// A warp a row, of which a lane has every 32nd vector. Memory bound: x and y once. Rows of up to kLongest vectors a lane stay
// in registers, all on their way at once; longer ones, and those without vectors, are read three times (mean, variance,
// result), from DRAM once: 8 rows of a block fit into L1.
// Launch: grid ceil(rows / kWarps), block kThreads.
constexpr int kLongest = 8;

// {mean, 1 / sqrt(var + eps)} of a row of which `each(f)` gives f the lane's elements. `shift`: one of the row's.
template <class Each>
DEVICE float2 row_statistics(Each each, float shift, int channels, float eps) {
    float sum = 0.f, squares = 0.f;
    each([&](float x) { sum += x - shift; });
    const float mean = shift + warp_sum(sum) / channels;
    each([&](float x) { squares = fmaf(x - mean, x - mean, squares); });
    return finished(mean, warp_sum(squares), channels, eps);
}

// What a row is multiplied by and moved by, all [C]; null: there is none. `scale` and `shift` are there together.
template <class T>
struct RowAffine {
    const T* gamma;
    const T* beta;
    const T* scale;
    const T* shift;
};

template <int V, class T>
DEVICE void normalise_vector(T* y, const float (&x)[V], float2 statistics, const RowAffine<T>& affine, int channel) {
    float scale[V], shift[V], values[V];
    UNROLL
    for (int j = 0; j < V; j++) {
        scale[j] = 1.f;
        shift[j] = 0.f;
    }
    if (affine.gamma != nullptr) load<V>(scale, affine.gamma + channel);
    if (affine.beta != nullptr) load<V>(shift, affine.beta + channel);
    UNROLL
    for (int j = 0; j < V; j++) values[j] = normalise(x[j], statistics, scale[j], shift[j]);
    if (affine.scale != nullptr) {
        load<V>(scale, affine.scale + channel);
        load<V>(shift, affine.shift + channel);
        UNROLL
        for (int j = 0; j < V; j++) values[j] = fmaf(values[j], 1.f + scale[j], shift[j]);
    }
    store<V>(y + channel, values);
}

// kHeld: vectors a lane; 32 kHeld kVector >= channels.
template <int kHeld, class T>
DEVICE void layer_norm_held(T* y, const T* x, const RowAffine<T>& affine, int channels, float eps) {
    const int first = threadIdx.x % 32 * kVector;
    Raw<kVector, T> held[kHeld];
    UNROLL
    for (int i = 0; i < kHeld; i++) {
        const int c = first + i * 32 * kVector;
        if (GUARD(c < channels)) fetch<kVector>(held[i], x + c);
    }
    const auto each = [&](auto f) {
        UNROLL
        for (int i = 0; i < kHeld; i++) {
            if (first + i * 32 * kVector < channels) {
                float values[kVector];
                widen(values, held[i]);
                UNROLL
                for (int j = 0; j < kVector; j++) f(values[j]);
            }
        }
    };
    const float2 statistics = row_statistics(each, to_f32(x[0]), channels, eps);
    UNROLL
    for (int i = 0; i < kHeld; i++) {
        const int c = first + i * 32 * kVector;
        float values[kVector];
        widen(values, held[i]);
        if (GUARD(c < channels)) normalise_vector<kVector>(y, values, statistics, affine, c);
    }
}

template <int V, class T>
DEVICE void layer_norm_long(T* y, const T* x, const RowAffine<T>& affine, int channels, float eps) {
    const int first = threadIdx.x % 32 * V, step = 32 * V;
    const auto each = [&](auto f) {
        for (int c = first; c < channels; c += step) {
            float values[V];
            load<V>(values, x + c);
            UNROLL
            for (int j = 0; j < V; j++) f(values[j]);
        }
    };
    const float2 statistics = row_statistics(each, to_f32(x[0]), channels, eps);
    for (int c = first; c < channels; c += step) {
        float values[V];
        load<V>(values, x + c);
        normalise_vector<V>(y, values, statistics, affine, c);
    }
}

// The kernel's parameter, as src/ops/cuda/norm.rs has it.
template <class T>
struct LayerNormArgs {
    T* y;
    const T* x;
    const T* gamma;
    const T* beta;
    ModulationArgs<T> modulation;
    int rows, image_rows;
    int channels;
    float eps;
    int vector;
};

template <class T>
DEVICE void layer_norm(const LayerNormArgs<T>& args) {
    const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
    if (!GUARD(row < args.rows)) return;
    const int channels = args.channels;
    const T* x = args.x + row * channels;
    T* y = args.y + row * channels;
    RowAffine<T> affine = {args.gamma, args.beta, nullptr, nullptr};
    if (args.modulation.rows.table != nullptr) {
        const T* of_image = row_of(args.modulation.rows, int(row) / args.image_rows);
        affine.scale = of_image + args.modulation.scale;
        affine.shift = of_image + args.modulation.shift;
    }
    constexpr int kStep = 32 * kVector;
    if (!args.vector) {
        layer_norm_long<1>(y, x, affine, channels, args.eps);
    } else if (channels <= 3 * kStep) {
        layer_norm_held<3>(y, x, affine, channels, args.eps);
    } else if (channels <= 5 * kStep) {
        layer_norm_held<5>(y, x, affine, channels, args.eps);
    } else if (channels <= kLongest * kStep) {
        layer_norm_held<kLongest>(y, x, affine, channels, args.eps);
    } else {
        layer_norm_long<kVector>(y, x, affine, channels, args.eps);
    }
}

KERNEL(group_norm_merge_f32, kMergeThreads, 1)(float2* statistics, const float2* partial, int channels, int pixels,
                                               int split_pixels, int splits, float eps) {
    follow_previous();
    group_norm_merge(statistics, partial, channels, pixels, split_pixels, splits, eps);
}
REGISTER_KERNEL(group_norm_merge_f32)

#define ENTRIES(T, suffix)                                                                                           \
    KERNEL(group_norm_statistics_##suffix, kThreads, 1)(float2* partial, const T* a, const T* b, int channels_a,     \
                                                        int channels_b, int pixels, int split_pixels, int tile,      \
                                                        int vector) {                                                \
        follow_previous();                                                                                           \
        const Sources<T> x = {a, b, channels_a, channels_b};                                                         \
        if (vector) {                                                                                                \
            group_norm_statistics<kVector>(partial, x, pixels, split_pixels, tile);                                  \
        } else {                                                                                                     \
            group_norm_statistics<1>(partial, x, pixels, split_pixels, tile);                                        \
        }                                                                                                            \
    }                                                                                                                \
    REGISTER_KERNEL(group_norm_statistics_##suffix)                                                                  \
    KERNEL(group_norm_apply_##suffix, kThreads, 2)(T* y, const T* a, const T* b, const float2* statistics,           \
                                                   const T* gamma, const T* beta, const ModulationArgs<T> modulation,\
                                                   int channels_a, int channels_b, int pixels, int groups,           \
                                                   int activation, int tile, int vector) {                           \
        follow_previous();                                                                                           \
        const Sources<T> x = {a, b, channels_a, channels_b};                                                         \
        if (vector) {                                                                                                \
            group_norm_apply<kVector>(y, x, statistics, gamma, beta, modulation, pixels, groups, activation, tile);  \
        } else {                                                                                                     \
            group_norm_apply<1>(y, x, statistics, gamma, beta, modulation, pixels, groups, activation, tile);        \
        }                                                                                                            \
    }                                                                                                                \
    REGISTER_KERNEL(group_norm_apply_##suffix)                                                                       \
    KERNEL(group_norm_small_##suffix, kThreads, 2)(T* y, float2* statistics, const T* a, const T* b, const T* gamma, \
                                                   const T* beta, const ModulationArgs<T> modulation, int channels_a,\
                                                   int channels_b, int pixels, int groups, int window, float eps,    \
                                                   int activation, int vector) {                                     \
        follow_previous();                                                                                           \
        const Sources<T> x = {a, b, channels_a, channels_b};                                                         \
        if (vector) {                                                                                                \
            group_norm_small<kVector>(y, statistics, x, gamma, beta, modulation, pixels, groups, window, eps,        \
                                      activation);                                                                   \
        } else {                                                                                                     \
            group_norm_small<1>(y, statistics, x, gamma, beta, modulation, pixels, groups, window, eps, activation); \
        }                                                                                                            \
    }                                                                                                                \
    REGISTER_KERNEL(group_norm_small_##suffix)                                                                       \
    KERNEL(layer_norm_##suffix, kThreads, 1)(const LayerNormArgs<T> args) {                                          \
        follow_previous();                                                                                           \
        layer_norm(args);                                                                                            \
    }                                                                                                                \
    REGISTER_KERNEL(layer_norm_##suffix)

ENTRIES(float, f32)
ENTRIES(f16, f16)
ENTRIES(bf16, bf16)
