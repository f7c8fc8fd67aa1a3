// resize.cu: separable resizing of channels-last images, in f32 between the passes.
//
//   resize_horizontal   y [rows, to, C] f32 = x [rows, from, C] in T, filtered along the width
//   resize_vertical     y [N, to, width] in T = x [N, from, width] f32, filtered along the height
//   resize_bilinear     y [N, to_h, to_w, C] in T = x [N, h, w, C] between its pixels' centres, no wider when it shrinks
//   avg_pool            y [N, ceil(h/2), ceil(w/2), C] = means of 2x2 pixels of x [N, h, w, C] in T
//   resize_edge         y = (11 x - sum of the 3x3 neighbourhood) / 2, border pixels as they are: 1/2 of the kernel of
//                       -1 around 10
// The last pass of a resize finishes: y = signal clamp(value, low, high) + sigma noise (noise null: the clamped value).
// The same for 8-bit images, on levels 0..255 held in f32: resize_levels quantises, resize_fixed_* filter in integers with
// weights in units of 2^-22 as PIL does, resize_picture goes back to [-1, 1].
//
// A filter is a table of 32-bit words, made by resize_filter in f64: counts [to] (the taps of each output), then the input
// index of every tap, [to, taps], then its weight, [to, taps] (f32, or an integer for resize_fixed_*); `taps` is the most
// that an output can have. So a resize uploads nothing, and a graph can record it.
//
// Two filters keep the size, for sharpen and exchange_low_band: a Gaussian of three taps, and what db4 keeps in its low band.
//
// Memory bound: x and y once; the taps of one input are read from L1 or L2.
// Launch, unless said otherwise: grid (rows of y over the whole batch, ceil(elements of a row / kThreads)), block kThreads.
#include "common/math.cuh"
#include "common/vector.cuh"

constexpr int kThreads = 256;
// Of resize_fixed_*: 1 in units of the weights.
constexpr int kFixedShift = 22;

template <class W>
struct Taps {
    const unsigned* index;
    const W* weight;
    int count;
};

// The taps of output i.
template <class W>
DEVICE Taps<W> taps_of(const unsigned* filter, int taps, int outputs, int i) {
    const unsigned* index = filter + outputs + i * taps;
    return {index, reinterpret_cast<const W*>(index + outputs * taps), int(filter[i])};
}

// As src/ops/cuda/resize.rs numbers them.
enum FilterKind { kTriangle, kCubic, kTorchCubic, kGaussian, kBlur, kLowBand };

// Keys 1981, doi:10.1109/TASSP.1981.1163711: the piecewise cubic with slope `a` at 1.
DEVICE double keys(double x, double a) {
    x = fabs(x);
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
    return x < 2.0 ? (((x - 5.0) * x + 8.0) * x - 4.0) * a : 0.0;
}

// One output's taps as they are found. A weight of exactly 0 is left out, so that a pass between equal sizes is a copy.
struct TapWriter {
    unsigned* index;
    unsigned* weight;
    bool fixed;
    int count;

    __device__ void add(int input, double value) {
        if (value == 0.0) return;
        index[count] = unsigned(input);
        // Rounded half away from zero, as PIL does.
        weight[count] = fixed ? unsigned(int(round(value * (1 << kFixedShift)))) : __float_as_uint(float(value));
        count++;
    }
};

// PIL's filters: the kernel's support is widened by the scale when downscaling, taps outside the image are left out, and
// the weights are normalised to sum 1.
DEVICE void pil_taps(TapWriter& taps, bool triangle, int from, int to, int i) {
    const double scale = double(from) / to, width = scale > 1.0 ? scale : 1.0;
    const double support = (triangle ? 1.0 : 2.0) * width, center = (i + 0.5) * scale;
    const int first = max(int(center - support + 0.5), 0), end = min(int(center + support + 0.5), from);
    const auto weight = [=](int j) {
        const double x = (j - center + 0.5) / width;
        return triangle ? fmax(1.0 - fabs(x), 0.0) : keys(x, -0.5);
    };
    double sum = 0.0;
    for (int j = first; j < end; j++) sum += weight(j);
    for (int j = first; j < end; j++) taps.add(j, weight(j) / sum);
}

// torch's bicubic, with the source coordinate in f32 as there: at index 1000 its rounding shifts the phase by up to 6e-5.
DEVICE void torch_taps(TapWriter& taps, int from, int to, int i) {
    const float scale = float(from) / float(to);
    // The product is rounded to f32 before the subtraction: in f64 it is exact, and no compiler joins the two.
    const float at = float(double(scale) * (i + 0.5)) - 0.5f;
    const int first = int(floorf(at)) - 1;
    const double phase = at - floorf(at);
    for (int j = 0; j < 4; j++) taps.add(min(max(first + j, 0), from - 1), keys(phase + 1.0 - j, -0.75));
}

// 2 radius + 1 taps of a Gaussian of standard deviation sigma, in pixels, the image mirrored about its border pixels.
DEVICE void gaussian_taps(TapWriter& taps, int radius, double sigma, int length, int i) {
    const int period = max(2 * length - 2, 1);
    const auto weight = [=](int offset) { return exp(-0.5 * (offset / sigma) * (offset / sigma)); };
    double beside = 0.0;
    for (int offset = 1; offset <= radius; offset++) beside += weight(offset);
    const double sum = weight(0) + 2.0 * beside;
    for (int offset = -radius; offset <= radius; offset++) {
        const int at = ((i + offset) % period + period) % period;
        taps.add(min(min(at, period - at), length - 1), weight(offset) / sum);
    }
}

// What remains of a line in db4's low band, which has every second sample: its analysis and its synthesis in one. Daubechies
// 1988, doi:10.1002/cpa.3160410705; the line is mirrored about its ends, which are repeated.
//   y(i) = sum over o of x(i + o) sum over a = kFirst, kFirst + 2, ... of h[a] h[a - o]      kFirst = (i + 1) mod 2
template <int kFirst>
DEVICE void low_band_taps(TapWriter& taps, int length, int i) {
    constexpr int kTaps = 8;
    constexpr double h[kTaps] = {-0.010597401785069032, 0.0328830116668852,  0.030841381835560764, -0.18703481171909309,
                                 -0.027983769416859854, 0.6308807679298589,  0.7148465705529157,   0.2303778133088965};
    const int period = 2 * length;
    UNROLL
    for (int offset = 1 - kTaps; offset < kTaps; offset++) {
        double weight = 0.0;
        UNROLL
        for (int a = kFirst; a < kTaps; a += 2) {
            if (a >= offset && a - offset < kTaps) weight += h[a] * h[a - offset];
        }
        const int at = ((i + offset) % period + period) % period;
        taps.add(min(at, period - 1 - at), weight);
    }
}

// The tables of a resize, one per dimension and kind of filter, as src/ops/cuda/resize.rs has them.
struct Filters {
    unsigned* words[4];
    int kind[4];
    int taps[4];
    int from[4];
    int to[4];
    int fixed;  // weights are integers, but the Gaussian's
    float sigma;  // of kBlur
};

// All tables of a resize. Launch: grid (ceil(largest to / kFilterThreads), filters), block kFilterThreads: few outputs, of
// many f64 operations each, so spread over the card.
constexpr int kFilterThreads = 32;
KERNEL(resize_filter, kFilterThreads, 1)(GRID_CONST Filters filters) {
    follow_previous();
    const int i = blockIdx.x * kFilterThreads + threadIdx.x;
    unsigned* words = filters.words[blockIdx.y];
    const int kind = filters.kind[blockIdx.y], taps = filters.taps[blockIdx.y];
    const int from = filters.from[blockIdx.y], to = filters.to[blockIdx.y];
    if (!GUARD(i < to)) return;
    unsigned* index = words + to + i * taps;
    TapWriter writer = {index, index + to * taps, filters.fixed != 0 && kind != kGaussian, 0};
    if (kind == kTorchCubic) {
        torch_taps(writer, from, to, i);
    } else if (kind == kGaussian) {
        gaussian_taps(writer, 2, 1.1, to, i);
    } else if (kind == kBlur) {
        gaussian_taps(writer, 1, filters.sigma, to, i);
    } else if (kind == kLowBand && i % 2 == 0) {
        low_band_taps<1>(writer, to, i);
    } else if (kind == kLowBand) {
        low_band_taps<0>(writer, to, i);
    } else {
        pil_taps(writer, kind == kTriangle, from, to, i);
    }
    words[i] = unsigned(writer.count);
}
REGISTER_KERNEL(resize_filter)

// A sum over taps, in f32; of levels in integers, which fit: 255 times absolute weights below 2 in units of 2^-22. Begins with
// the first product: a copy stays a copy, -0 included.
DEVICE void add_tap(float& sum, float weight, float x, bool first) { sum = first ? weight * x : fmaf(weight, x, sum); }
DEVICE void add_tap(int& sum, int weight, float x, bool first) {
    sum = (first ? 1 << (kFixedShift - 1) : sum) + weight * int(x);
}
// Levels: rounded half up and clamped to 8 bits.
DEVICE float filtered(float sum) { return sum; }
DEVICE float filtered(int sum) { return float(min(max(sum >> kFixedShift, 0), 255)); }

// What the last pass does to a value.
struct Finish {
    float low, high;
    const float* noise;
    float signal, sigma;

    __device__ float operator()(float value, int64_t i) const {
        value = clamp(value, low, high);
        return noise ? fmaf(signal, value, sigma * noise[i]) : value;
    }
};

// A thread has one column of kRows rows, so that it reads the taps once and has that many loads on their way for each.
// Launch: grid (ceil(rows / kRows), ceil(to C / kThreads)).
constexpr int kRows = 4;
template <class W, class T>
DEVICE void horizontal(float* y, const T* x, const unsigned* filter, int taps, int64_t rows, int from, int to,
                       int channels) {
    const int i = blockIdx.y * kThreads + threadIdx.x;
    if (!GUARD(i < to * channels)) return;
    const int64_t first = int64_t(blockIdx.x) * kRows, stride = int64_t(from) * channels;
    x += first * stride + i % channels;
    const Taps<W> t = taps_of<W>(filter, taps, to, i / channels);
    W sum[kRows];
    for (int k = 0; k < t.count; k++) {
        const T* at = x + int64_t(t.index[k]) * channels;
        const W weight = t.weight[k];
        T value[kRows];
        UNROLL
        for (int r = 0; r < kRows; r++) {
            if (GUARD(first + r < rows)) value[r] = at[r * stride];
        }
        UNROLL
        for (int r = 0; r < kRows; r++) {
            if (first + r < rows) add_tap(sum[r], weight, to_f32(value[r]), k == 0);
        }
    }
    UNROLL
    for (int r = 0; r < kRows; r++) {
        if (GUARD(first + r < rows)) y[(first + r) * to * channels + i] = filtered(sum[r]);
    }
}

// A block has one row of y, so that its taps are the same for all threads; a thread has V elements of it.
// Launch: grid (rows of y, ceil(width / (kThreads V))); V = kVector: width is a multiple of it and x, y, noise are aligned.
template <int V, class W, class T>
DEVICE void vertical(T* y, const float* x, const unsigned* filter, int taps, int from, int to, int width,
                     const Finish& finish) {
    const int i = (blockIdx.y * kThreads + threadIdx.x) * V;
    if (!GUARD(i < width)) return;
    x += int64_t(blockIdx.x / to) * from * width + i;
    const Taps<W> t = taps_of<W>(filter, taps, to, blockIdx.x % to);
    W sum[V];
    ROLLED
    for (int k = 0; k < t.count; k++) {
        float values[V];
        load<V>(values, x + int64_t(t.index[k]) * width);
        UNROLL
        for (int j = 0; j < V; j++) add_tap(sum[j], t.weight[k], values[j], k == 0);
    }
    const int64_t at = int64_t(blockIdx.x) * width + i;
    float results[V];
    UNROLL
    for (int j = 0; j < V; j++) results[j] = finish(filtered(sum[j]), at + j);
    store<V>(y + at, results);
}

template <class T>
DEVICE void edge(T* y, const float* x, int height, int width, int channels, const Finish& finish) {
    const int i = blockIdx.y * kThreads + threadIdx.x, row = blockIdx.x % height, column = i / channels;
    if (!GUARD(i < width * channels)) return;
    const int64_t stride = int64_t(width) * channels, at = blockIdx.x * stride + i;
    float value = x[at];
    if (GUARD(row > 0) && GUARD(row + 1 < height) && GUARD(column > 0) && GUARD(column + 1 < width)) {
        float sum = 0.f;
        UNROLL
        for (int j = -1; j <= 1; j++) {
            const float* p = x + at + j * channels;
            sum += p[-stride] + p[0] + p[stride];
        }
        value = (11.f * value - sum) / 2.f;
    }
    y[at] = from_f32<T>(finish(value, at));
}

// y [count] f32 = round(255 clamp(x/2 + 0.5, 0, 1)), ties to even; NaN is 0. Launch: grid ceil(count / kThreads).
template <class T>
DEVICE void levels(float* y, const T* x, int64_t count) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (GUARD(i < count)) y[i] = rintf(255.f * fminf(fmaxf(0.5f * to_f32(x[i]) + 0.5f, 0.f), 1.f));
}

// y [count] in T = 2 level(x) / 255 - 1, level rounding half up and clamping to 8 bits. Launch as levels.
template <class T>
DEVICE void picture(T* y, const float* x, int64_t count) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (GUARD(i < count)) y[i] = from_f32<T>(2.f * (clamp(floorf(x[i] + 0.5f), 0.f, 255.f) / 255.f) - 1.f);
}

// resize_nearest: y [N, to_h, to_w, C] = x [N, h, w, C] at floor(i * in / out).
template <class T>
DEVICE void nearest(T* y, const T* x, int h, int w, int to_h, int to_w, int channels) {
    const int i = blockIdx.y * kThreads + threadIdx.x;
    if (!GUARD(i < to_w * channels)) return;
    const int64_t row = blockIdx.x / to_h * int64_t(h) + int64_t(blockIdx.x % to_h) * h / to_h;
    const int64_t column = int64_t(i / channels) * w / to_w;
    y[int64_t(blockIdx.x) * to_w * channels + i] = x[(row * w + column) * channels + i % channels];
}

// Where output i of `to` lies among `from` inputs: (2 i + 1) from / (2 to) - 1/2, not before the first, exactly.
struct Between {
    int first, second;
    float weight;  // of the second
};
DEVICE Between between(int i, int from, int to) {
    const int64_t at = (2 * int64_t(i) + 1) * from - to, unit = 2 * int64_t(to);
    if (at <= 0) return {0, 0, 0.f};
    const int first = int(at / unit);
    return {first, min(first + 1, from - 1), float(at % unit) / float(unit)};
}

// resize_bilinear: y [N, to_h, to_w, C] from x [N, h, w, C] as torch's interpolate with align_corners=False, antialias=False. V
// channels a thread.
template <int V, class T>
DEVICE void bilinear(T* y, const T* x, int h, int w, int to_h, int to_w, int channels) {
    const int i = (blockIdx.y * kThreads + threadIdx.x) * V;
    if (!GUARD(i < to_w * channels)) return;
    const Between row = between(int(blockIdx.x % to_h), h, to_h), column = between(i / channels, w, to_w);
    x += int64_t(blockIdx.x / to_h) * h * w * channels + i % channels;
    const T* upper = x + int64_t(row.first) * w * channels;
    const T* lower = x + int64_t(row.second) * w * channels;
    const int64_t left = int64_t(column.first) * channels, right = int64_t(column.second) * channels;
    float a[V], b[V], c[V], d[V];
    load<V>(a, upper + left);
    load<V>(b, upper + right);
    load<V>(c, lower + left);
    load<V>(d, lower + right);
    UNROLL
    for (int v = 0; v < V; v++) {
        const float top = (1.f - column.weight) * a[v] + column.weight * b[v];
        const float bottom = (1.f - column.weight) * c[v] + column.weight * d[v];
        a[v] = (1.f - row.weight) * top + row.weight * bottom;
    }
    store<V>(y + int64_t(blockIdx.x) * to_w * channels + i, a);
}

// avg_pool: y [N, ceil(h / 2), ceil(w / 2), C] = means of 2x2 pixels of x [N, h, w, C], at the lower and right border of an odd
// size of those that are there (torch's avg_pool2d with ceil_mode). V channels a thread.
template <int V, class T>
DEVICE void avg_pool(T* y, const T* x, int h, int w, int channels) {
    const int to_h = (h + 1) / 2, to_w = (w + 1) / 2, i = (blockIdx.y * kThreads + threadIdx.x) * V;
    if (!GUARD(i < to_w * channels)) return;
    const int top = int(blockIdx.x % to_h) * 2, left = i / channels * 2;
    const int rows = min(2, h - top), columns = min(2, w - left);
    const T* from = x + ((int64_t(blockIdx.x / to_h) * h + top) * w + left) * channels + i % channels;
    float sum[V] = {};
    for (int row = 0; row < rows; row++) {
        for (int column = 0; column < columns; column++) {
            float values[V];
            load<V>(values, from + (int64_t(row) * w + column) * channels);
            UNROLL
            for (int v = 0; v < V; v++) sum[v] += values[v];
        }
    }
    const float count = float(rows * columns);
    UNROLL
    for (int v = 0; v < V; v++) sum[v] /= count;
    store<V>(y + int64_t(blockIdx.x) * to_w * channels + i, sum);
}

KERNEL(resize_fixed_horizontal_f32, kThreads, 1)(float* y, const float* x, const unsigned* filter, int taps,
                                                 int64_t rows, int from, int to, int channels) {
    follow_previous();
    horizontal<int>(y, x, filter, taps, rows, from, to, channels);
}
REGISTER_KERNEL(resize_fixed_horizontal_f32)

KERNEL(resize_fixed_vertical_f32, kThreads, 1)(float* y, const float* x, const unsigned* filter, int taps, int from,
                                               int to, int width, int vector) {
    follow_previous();
    const Finish levels = {0.f, 255.f, nullptr, 0.f, 0.f};
    if (vector) {
        vertical<kVector, int>(y, x, filter, taps, from, to, width, levels);
    } else {
        vertical<1, int>(y, x, filter, taps, from, to, width, levels);
    }
}
REGISTER_KERNEL(resize_fixed_vertical_f32)

#define ENTRIES(T, suffix)                                                                                             \
    KERNEL(resize_horizontal_##suffix, kThreads, 1)(float* y, const T* x, const unsigned* filter, int taps,            \
                                                    int64_t rows, int from, int to, int channels) {                    \
        follow_previous();                                                                                             \
        horizontal<float>(y, x, filter, taps, rows, from, to, channels);                                               \
    }                                                                                                                  \
    REGISTER_KERNEL(resize_horizontal_##suffix)                                                                        \
    KERNEL(resize_vertical_##suffix, kThreads, 1)(T* y, const float* x, const unsigned* filter, int taps, int from,    \
                                                  int to, int width, float low, float high, const float* noise,        \
                                                  float signal, float sigma, int vector) {                             \
        follow_previous();                                                                                             \
        const Finish finish = {low, high, noise, signal, sigma};                                                       \
        if (vector) {                                                                                                  \
            vertical<kVector, float>(y, x, filter, taps, from, to, width, finish);                                     \
        } else {                                                                                                       \
            vertical<1, float>(y, x, filter, taps, from, to, width, finish);                                           \
        }                                                                                                              \
    }                                                                                                                  \
    REGISTER_KERNEL(resize_vertical_##suffix)                                                                          \
    KERNEL(resize_edge_##suffix, kThreads, 1)(T* y, const float* x, int height, int width, int channels, float low,    \
                                              float high, const float* noise, float signal, float sigma) {             \
        follow_previous();                                                                                             \
        edge(y, x, height, width, channels, Finish{low, high, noise, signal, sigma});                                  \
    }                                                                                                                  \
    REGISTER_KERNEL(resize_edge_##suffix)                                                                              \
    KERNEL(resize_levels_##suffix, kThreads, 1)(float* y, const T* x, int64_t count) {                                 \
        follow_previous();                                                                                             \
        levels(y, x, count);                                                                                           \
    }                                                                                                                  \
    REGISTER_KERNEL(resize_levels_##suffix)                                                                            \
    KERNEL(resize_picture_##suffix, kThreads, 1)(T* y, const float* x, int64_t count) {                                \
        follow_previous();                                                                                             \
        picture(y, x, count);                                                                                          \
    }                                                                                                                  \
    REGISTER_KERNEL(resize_picture_##suffix)                                                                           \
    KERNEL(resize_nearest_##suffix, kThreads, 1)(T* y, const T* x, int h, int w, int to_h, int to_w, int channels) {   \
        follow_previous();                                                                                             \
        nearest(y, x, h, w, to_h, to_w, channels);                                                                     \
    }                                                                                                                  \
    REGISTER_KERNEL(resize_nearest_##suffix)                                                                           \
    KERNEL(resize_bilinear_##suffix, kThreads, 1)(T* y, const T* x, int h, int w, int to_h, int to_w, int channels,    \
                                                  int vector) {                                                        \
        follow_previous();                                                                                             \
        if (vector) {                                                                                                  \
            bilinear<kVector>(y, x, h, w, to_h, to_w, channels);                                                       \
        } else {                                                                                                       \
            bilinear<1>(y, x, h, w, to_h, to_w, channels);                                                             \
        }                                                                                                              \
    }                                                                                                                  \
    REGISTER_KERNEL(resize_bilinear_##suffix)                                                                          \
    KERNEL(avg_pool_##suffix, kThreads, 1)(T* y, const T* x, int h, int w, int channels, int vector) {                 \
        follow_previous();                                                                                             \
        if (vector) {                                                                                                  \
            avg_pool<kVector>(y, x, h, w, channels);                                                                   \
        } else {                                                                                                       \
            avg_pool<1>(y, x, h, w, channels);                                                                         \
        }                                                                                                              \
    }                                                                                                                  \
    REGISTER_KERNEL(avg_pool_##suffix)

ENTRIES(float, f32)
ENTRIES(f16, f16)
ENTRIES(bf16, bf16)
