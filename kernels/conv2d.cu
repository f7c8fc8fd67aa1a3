// conv2d.cu, conv2d: y[N, Hout, Wout, O] = scale * (conv(resize(x), weight) + bias[O] + row[r(n), O] + residual),
//   channels-last. Implicit GEMM: M = N Hout Wout output pixels, K = kh kw C values under the kernel, ordered as weight
//   [O, kh, kw, C]; no im2col buffer: a thread finds its rows' pixels when it comes to a new tap, else adds 64 bytes.
//   x is one source [N, H, W, Ca], or two side by side (a skip connection), the second [N, H, W, Cb], C = Ca + Cb.
//   resize: nearest neighbour, pixel i of the input is stored pixel i * H / Hin; padding is zeros around the input.
//   y, x, weight, bias, row, residual: T = f32 | f16 | bf16; bias, row, residual may be null. y overlaps nothing.
//   row: a table [steps * rows, O] with `rows` conditioning rows a step; `step` [images] on the device, so that a captured
//   graph replays for every step: image n of N reads r(n) = step[n % images] * rows + n / (N / rows), where it lies.
// Compute bound: 2 M O K flops; bytes at best x, weight, residual and y once (3x3: eight of nine taps read x from L2).
// Sums and what is added to them in f32, one rounding at the store.
// Launch: conv2d_<tile>_<dtype>, grid (ceil(M / kM) * ceil(O / kN), splits), block Tile::kThreads, dynamic shared memory
// sizeof(Tile::Shared); src/ops/cuda/tiles.rs has the table. `general` takes any channels and alignment; the others ask
// that Ca and Cb are multiples of Chunk<T>::kCount and that x and weight are aligned to 16 bytes.
// splits > 1: block (., s) sums its slices of K into partial[s, M, O] (f32); conv2d_join_<dtype> adds the parts in order.
#include "common/gemm.cuh"

// As #[repr(C)] struct KernelGeometry of src/ops/cuda/conv.rs.
struct ConvGeometry {
    int m, outputs;
    int channels_a, channels_b;
    int height, width;              // as stored
    int input_height, input_width;  // after the resize
    int output_width, pixels;       // of an output image: Hout * Wout
    int kernel_height, kernel_width;
    int stride, dilation, top, left;
    int first_row;  // of the stored image that is held; a part of an image is alone in its batch
};

// As #[repr(C)] struct KernelStepRows of src/ops/cuda/conv.rs.
struct StepRows {
    int images;          // with a step of their own
    int rows;            // conditioning rows of a step
    int images_per_row;  // N / rows
};

// Bits of `wide`: these rows are whole aligned chunks; kWideOutput: y, bias, row, residual and partial.
enum ConvWide { kWideX = 1, kWideWeight = 2, kWideOutput = 4 };

constexpr int kOutside = -(1 << 30);  // a row that no tap brings inside

// ---- rows of the implicit matrix ----

template <class T>
struct ConvSource {
    const T* a;
    const T* b;
};

// A thread's output pixels, one a row, and where it is in K.
template <class T, int kRows>
struct ConvRows {
    ConvSource<T> x;
    ConvGeometry g;
    bool wide;
    int image[kRows], y[kRows], x0[kRows];  // of the kernel's first tap, in the padded input
    // async: the segment of K (a tap's channels in one source) and the thread's chunk in it
    int tap_y, tap_x, channel;
    bool in_b;
    const T* from[kRows];  // null: zeros
    int k;                 // general: its chunk's first value of K
};

// Pixel of the image, as stored, under tap (tap_y, tap_x) of row i; false: padding, or no such row.
template <class T, int kRows>
DEVICE bool find_pixel(const ConvRows<T, kRows>& r, int i, int tap_y, int tap_x, int64_t& pixel) {
    int y = r.y[i] + tap_y * r.g.dilation, x = r.x0[i] + tap_x * r.g.dilation;
    const bool inside_y = GUARD(unsigned(y) < unsigned(r.g.input_height));
    const bool inside_x = GUARD(unsigned(x) < unsigned(r.g.input_width));
    // The host keeps stored size times input size below 2^32.
    if (r.g.input_height != r.g.height) y = unsigned(y) * unsigned(r.g.height) / unsigned(r.g.input_height);
    if (r.g.input_width != r.g.width) x = unsigned(x) * unsigned(r.g.width) / unsigned(r.g.input_width);
    pixel = (int64_t(r.image[i]) * r.g.height + y - r.g.first_row) * r.g.width + x;
    return inside_y && inside_x;
}

// Looks up the rows' pixels of the current segment.
template <class T, int kRows>
DEVICE void find_segment(ConvRows<T, kRows>& r) {
    const bool inside_k = GUARD(r.tap_y < r.g.kernel_height);
    UNROLL
    for (int i = 0; i < kRows; i++) {
        int64_t pixel;
        const bool inside = find_pixel(r, i, r.tap_y, r.tap_x, pixel) && inside_k;
        const T* from = r.in_b ? r.x.b + pixel * r.g.channels_b : r.x.a + pixel * r.g.channels_a;
        r.from[i] = inside ? from + r.channel : nullptr;
    }
}

// Moves on to the segment that holds `channel`, counted from the current one.
template <class T, int kRows>
DEVICE bool skip_segments(ConvRows<T, kRows>& r) {
    bool moved = false;
    while (r.tap_y < r.g.kernel_height && r.channel >= (r.in_b ? r.g.channels_b : r.g.channels_a)) {
        r.channel -= r.in_b ? r.g.channels_b : r.g.channels_a;
        if (r.in_b || r.g.channels_b == 0) {
            r.in_b = false;
            r.tap_x++;
            if (r.tap_x == r.g.kernel_width) {
                r.tap_x = 0;
                r.tap_y++;
            }
        } else {
            r.in_b = true;
        }
        moved = true;
    }
    return moved;
}

// From slice `slice` of K on.
template <class Tile>
DEVICE ConvRows<typename Tile::T, Tile::kRowsA> conv_rows(const ConvSource<typename Tile::T>& x, const ConvGeometry& g,
                                                          int first_row, int slice, bool wide) {
    ConvRows<typename Tile::T, Tile::kRowsA> r;
    r.x = x;
    r.g = g;
    r.wide = wide;
    UNROLL
    for (int i = 0; i < Tile::kRowsA; i++) {
        const int m = first_row + threadIdx.x / kRowChunks + i * Tile::kRowStep;
        const int pixel = m % g.pixels;
        r.image[i] = m / g.pixels;
        r.y[i] = GUARD(m < g.m) ? pixel / g.output_width * g.stride - g.top : kOutside;
        r.x0[i] = pixel % g.output_width * g.stride - g.left;
    }
    r.k = slice * Tile::kSlice + threadIdx.x % kRowChunks * Tile::kChunkValues;
    if constexpr (!Tile::kGeneral) {
        const int channels = g.channels_a + g.channels_b;
        const int tap = r.k / channels;
        r.tap_y = tap / g.kernel_width;
        r.tap_x = tap % g.kernel_width;
        r.channel = r.k - tap * channels;
        r.in_b = r.channel >= g.channels_a;
        if (r.in_b) r.channel -= g.channels_a;
        find_segment(r);
    }
    return r;
}

template <class Tile, int kRows>
DEVICE void copy_async(ConvRows<typename Tile::T, kRows>& r, Chunk<typename Tile::T>* slice) {
    UNROLL
    for (int i = 0; i < kRows; i++) cp_async_16(&slice[own_place<Tile>(i)], r.from[i], r.from[i] != nullptr);
    r.channel += Tile::kSlice;
    if (skip_segments(r)) {
        find_segment(r);
    } else {
        UNROLL
        for (int i = 0; i < kRows; i++) {
            if (r.from[i] != nullptr) r.from[i] += Tile::kSlice;
        }
    }
}

// The tap and the channel (over both sources) of value k of K.
struct KPlace {
    int tap_y, tap_x, channel;
};
DEVICE KPlace k_place(const ConvGeometry& g, int k) {
    const int channels = g.channels_a + g.channels_b;
    if (k < channels) return {0, 0, k};  // 1x1: no division
    const int tap = k / channels;
    return {tap / g.kernel_width, tap % g.kernel_width, k - tap * channels};
}

template <class Tile, int kRows>
DEVICE void load_wide(ConvRows<typename Tile::T, kRows>& r, Chunk<typename Tile::T> (&to)[kRows]) {
    using T = typename Tile::T;
    const KPlace at = k_place(r.g, r.k);
    const bool inside_k = GUARD(at.tap_y < r.g.kernel_height), in_b = at.channel >= r.g.channels_a;
    UNROLL
    for (int i = 0; i < kRows; i++) {
        to[i] = Chunk<T>{};
        int64_t pixel;
        if (find_pixel(r, i, at.tap_y, at.tap_x, pixel) && inside_k) {
            const T* from = in_b ? r.x.b + pixel * r.g.channels_b + (at.channel - r.g.channels_a)
                                 : r.x.a + pixel * r.g.channels_a + at.channel;
            to[i] = *reinterpret_cast<const Chunk<T>*>(from);
        }
    }
    r.k += Tile::kSlice;
}

template <class Tile, int kRows>
DEVICE void fill(ConvRows<typename Tile::T, kRows>& r, Chunk<typename Tile::T>* slice) {
    using T = typename Tile::T;
    for (int e = 0; e < Tile::kChunkValues; e++) {
        const KPlace at = k_place(r.g, r.k + e);
        const bool inside_k = GUARD(at.tap_y < r.g.kernel_height), in_b = at.channel >= r.g.channels_a;
        UNROLL
        for (int i = 0; i < kRows; i++) {
            T value = from_f32<T>(0.0f);
            int64_t pixel;
            if (find_pixel(r, i, at.tap_y, at.tap_x, pixel) && inside_k) {
                value = in_b ? r.x.b[pixel * r.g.channels_b + (at.channel - r.g.channels_a)]
                             : r.x.a[pixel * r.g.channels_a + at.channel];
            }
            slice[own_place<Tile>(i)].v[e] = value;
        }
    }
    r.k += Tile::kSlice;
}

// ---- the result ----

template <class T>
struct ConvOutput {
    T* y;
    float* partial;  // of this split, or null
    const T* bias;
    const T* row;  // the table, or null
    const unsigned* step;
    StepRows step_rows;
    const T* residual;
    float scale;
    int m, outputs, pixels;
    bool wide;
};

template <class T>
DEVICE ConvOutput<T> conv_output(T* y, float* partial, const T* bias, const T* row, const unsigned* step,
                                 const StepRows& step_rows, const T* residual, float scale, const ConvGeometry& g,
                                 int wide) {
    if (partial != nullptr) partial += int64_t(blockIdx.y) * g.m * g.outputs;
    const bool whole = (wide & kWideOutput) != 0;
    return {y, partial, bias, row, step, step_rows, residual, scale, g.m, g.outputs, g.pixels, whole};
}

// The table's row of output pixel m's image, from output channel n on; null without a table.
template <class T>
DEVICE const T* row_of(const ConvOutput<T>& o, int m, int n) {
    if (o.row == nullptr) return nullptr;
    const int image = m / o.pixels;
    const int64_t first = int64_t(o.step[image % o.step_rows.images]) * o.step_rows.rows;
    return o.row + (first + image / o.step_rows.images_per_row) * o.outputs + n;
}

// Output pixel m, output channels n .. n + Chunk<T>::kCount - 1 (those below O), from their sums.
template <class T>
DEVICE void finish(const ConvOutput<T>& o, const float* sums, int m, int n) {
    constexpr int kCount = Chunk<T>::kCount;
    const int64_t at = int64_t(m) * o.outputs + n;
    const T* row = row_of(o, m, n);
    if (o.wide) {
        float v[kCount];
        UNROLL
        for (int e = 0; e < kCount; e++) v[e] = sums[e];
        if (o.bias != nullptr) {
            const auto bias = *reinterpret_cast<const Chunk<T>*>(o.bias + n);
            UNROLL
            for (int e = 0; e < kCount; e++) v[e] += to_f32(bias.v[e]);
        }
        if (row != nullptr) {
            const auto add = *reinterpret_cast<const Chunk<T>*>(row);
            UNROLL
            for (int e = 0; e < kCount; e++) v[e] += to_f32(add.v[e]);
        }
        if (o.residual != nullptr) {
            const auto residual = *reinterpret_cast<const Chunk<T>*>(o.residual + at);
            UNROLL
            for (int e = 0; e < kCount; e++) v[e] += to_f32(residual.v[e]);
        }
        Chunk<T> y;
        UNROLL
        for (int e = 0; e < kCount; e++) y.v[e] = from_f32<T>(v[e] * o.scale);
        *reinterpret_cast<Chunk<T>*>(o.y + at) = y;
    } else {
        for (int e = 0; e < kCount; e++) {
            if (GUARD(n + e < o.outputs)) {
                float v = sums[e];
                if (o.bias != nullptr) v += to_f32(o.bias[n + e]);
                if (row != nullptr) v += to_f32(row[e]);
                if (o.residual != nullptr) v += to_f32(o.residual[at + e]);
                o.y[at + e] = from_f32<T>(v * o.scale);
            }
        }
    }
}

template <class Tile>
DEVICE void store(const ConvOutput<typename Tile::T>& o, const float (&rows)[16][Tile::kPitch], int m0, int n0) {
    constexpr int kCount = Tile::kChunkValues, kAcross = Tile::kWarpN / kCount;
    for (int item = lane_index(); item < 16 * kAcross; item += 32) {
        const int row = item / kAcross, column = item % kAcross * kCount;
        const int m = m0 + row, n = n0 + column;
        if (GUARD(m < o.m) && GUARD(n < o.outputs)) {
            if (o.partial == nullptr) {
                finish(o, &rows[row][column], m, n);
            } else {
                float* partial = o.partial + int64_t(m) * o.outputs + n;
                if (o.wide) {
                    UNROLL
                    for (int e = 0; e < kCount; e += 4) {
                        const auto part = *reinterpret_cast<const Chunk<float>*>(&rows[row][column + e]);
                        *reinterpret_cast<Chunk<float>*>(partial + e) = part;
                    }
                } else {
                    for (int e = 0; e < kCount; e++) {
                        if (GUARD(n + e < o.outputs)) partial[e] = rows[row][column + e];
                    }
                }
            }
        }
    }
}

template <class Tile, class T = typename Tile::T>
DEVICE void conv2d(const ConvSource<T>& x, const T* weight, const ConvOutput<T>& output, const ConvGeometry& g,
                   int wide) {
    SHARED_DYNAMIC(typename Tile::Shared, s);
    const TileOrigin origin = tile_origin<Tile>(g.m, g.outputs);
    const int k = g.kernel_height * g.kernel_width * (g.channels_a + g.channels_b);
    const int slices = (k + Tile::kSlice - 1) / Tile::kSlice;
    // Block (., s) takes the s-th of gridDim.y equal shares of the slices; the last ones may have fewer.
    const int share = (slices + gridDim.y - 1) / gridDim.y;
    const int first = blockIdx.y * share, count = max(0, min(share, slices - first));
    Sums<Tile> sums = {};
    if (count > 0) {
        auto a = conv_rows<Tile>(x, g, origin.m, first, wide & kWideX);
        auto b = dense_rows<Tile>(weight, origin.n, g.outputs, k, first * Tile::kSlice, wide & kWideWeight);
        product<Tile>(sums, s, a, b, count);
    }
    write_out<Tile>(sums, s, origin, output);
}

#define CONV2D(name, T, min_blocks, ...)                                                                             \
    KERNEL(conv2d_##name, (Tile<T, __VA_ARGS__>::kThreads), min_blocks)                                              \
    (T* y, float* partial, const T* a, const T* b, const T* weight, const T* bias, const T* row,                   \
     const unsigned* step, StepRows step_rows, const T* residual, float scale, ConvGeometry geometry, int wide) {    \
        follow_previous();                                                                                           \
        const auto output = conv_output(y, partial, bias, row, step, step_rows, residual, scale, geometry, wide);  \
        const ConvSource<T> x = {a, b};                                                                              \
        conv2d<Tile<T, __VA_ARGS__>>(x, weight, output, geometry, wide);                                              \
    }                                                                                                                \
    REGISTER_KERNEL(conv2d_##name)

#include "common/tiles.cuh"
TILES(CONV2D)

// conv2d_join: y = scale * (partial[0] + partial[1] + ... + bias + row + residual), the second launch of a split sum.
//   partial [splits, M, O] f32, added in order. Memory bound: splits * M * O * 4 bytes and y's.
// Launch: grid ceil(M * ceil(O / Chunk<T>::kCount) / kJoinThreads), block kJoinThreads. Any O, any alignment.
constexpr int kJoinThreads = 256;

template <class T>
DEVICE void conv2d_join(const ConvOutput<T>& o, int splits) {
    constexpr int kCount = Chunk<T>::kCount;
    const int64_t across = (o.outputs + kCount - 1) / kCount;
    const int64_t item = int64_t(blockIdx.x) * kJoinThreads + threadIdx.x;
    const int m = int(item / across), n = int(item % across) * kCount;
    if (GUARD(item < o.m * across)) {
        float sums[kCount] = {};
        for (int split = 0; split < splits; split++) {
            const float* partial = o.partial + (int64_t(split) * o.m + m) * o.outputs + n;
            if (o.wide) {
                UNROLL
                for (int e = 0; e < kCount; e += 4) {
                    const auto part = *reinterpret_cast<const Chunk<float>*>(partial + e);
                    UNROLL
                    for (int i = 0; i < 4; i++) sums[e + i] += part.v[i];
                }
            } else {
                UNROLL
                for (int e = 0; e < kCount; e++) {
                    if (GUARD(n + e < o.outputs)) sums[e] += partial[e];
                }
            }
        }
        finish(o, sums, m, n);
    }
}

#define CONV2D_JOIN(T, suffix)                                                                                     \
    KERNEL(conv2d_join_##suffix, kJoinThreads, 1)                                                                  \
    (T* y, float* partial, const T* bias, const T* row, const unsigned* step, StepRows step_rows, const T* residual, \
     float scale, ConvGeometry geometry, int splits, int wide) {                                                   \
        follow_previous();                                                                                         \
        auto output = conv_output(y, partial, bias, row, step, step_rows, residual, scale, geometry, wide);      \
        conv2d_join(output, splits);                                                                               \
    }                                                                                                              \
    REGISTER_KERNEL(conv2d_join_##suffix)

CONV2D_JOIN(float, f32)
CONV2D_JOIN(f16, f16)
CONV2D_JOIN(bf16, bf16)
