// conv2d.cu, conv2d: y = f(scale * (conv(resize(x), weight) + bias + row + residual)), for every card; what the names are is in
//   common/conv2d.cuh.
// Implicit GEMM: M = N Hout Wout output pixels, K = kh kw C values under the kernel, ordered as weight [O, kh, kw, C]; no
// im2col buffer: a thread finds its rows' pixels when it comes to a new tap, else adds 64 bytes.
// Compute bound: 2 M O K flops; bytes at best x, weight, residual and y once (3x3: eight of nine taps read x from L2).
// Launch: conv2d_<tile>_<dtype>, grid (ceil(M / kM) * ceil(O / kN), splits), block Tile::kThreads, dynamic shared memory
// sizeof(Tile::Shared); src/ops/cuda/tiles.rs has the table. `general` takes any channels and alignment; the others ask
// that Ca and Cb are multiples of Chunk<T>::kCount and that x and weight are aligned to 16 bytes.
// splits > 1: block (., s) sums its slices of K into partial[s, M, O] (f32); conv2d_join_<dtype> adds the parts in order.
#include "common/conv2d.cuh"
#include "common/gemm.cuh"

constexpr int kOutside = -(1 << 30);  // a row that no tap brings inside

// ---- rows of the implicit matrix ----

// A thread's output pixels, one a row, and where it is in K.
template <class T, int kRows>
struct ConvRows {
    ConvArgs<T> c;
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
    int y = r.y[i] + tap_y * r.c.dilation, x = r.x0[i] + tap_x * r.c.dilation;
    const bool inside_y = GUARD(unsigned(y) < unsigned(r.c.input_height));
    const bool inside_x = GUARD(unsigned(x) < unsigned(r.c.input_width));
    // The host keeps stored size times input size below 2^32.
    if (r.c.input_height != r.c.height) y = unsigned(y) * unsigned(r.c.height) / unsigned(r.c.input_height);
    if (r.c.input_width != r.c.width) x = unsigned(x) * unsigned(r.c.width) / unsigned(r.c.input_width);
    pixel = (int64_t(r.image[i]) * r.c.height + y - r.c.first_row) * r.c.width + x;
    return inside_y && inside_x;
}

// Looks up the rows' pixels of the current segment.
template <class T, int kRows>
DEVICE void find_segment(ConvRows<T, kRows>& r) {
    const bool inside_k = GUARD(r.tap_y < r.c.kernel_height);
    UNROLL
    for (int i = 0; i < kRows; i++) {
        int64_t pixel;
        const bool inside = find_pixel(r, i, r.tap_y, r.tap_x, pixel) && inside_k;
        const T* from = r.in_b ? r.c.b + pixel * r.c.channels_b : r.c.a + pixel * r.c.channels_a;
        r.from[i] = inside ? from + r.channel : nullptr;
    }
}

// Moves on to the segment that holds `channel`, counted from the current one.
template <class T, int kRows>
DEVICE bool skip_segments(ConvRows<T, kRows>& r) {
    bool moved = false;
    while (r.tap_y < r.c.kernel_height && r.channel >= (r.in_b ? r.c.channels_b : r.c.channels_a)) {
        r.channel -= r.in_b ? r.c.channels_b : r.c.channels_a;
        if (r.in_b || r.c.channels_b == 0) {
            r.in_b = false;
            r.tap_x++;
            if (r.tap_x == r.c.kernel_width) {
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
DEVICE ConvRows<typename Tile::T, Tile::kRowsA> conv_rows(const ConvArgs<typename Tile::T>& c, int first_row, int slice) {
    ConvRows<typename Tile::T, Tile::kRowsA> r;
    r.c = c;
    r.wide = c.wide & kWideX;
    UNROLL
    for (int i = 0; i < Tile::kRowsA; i++) {
        const int m = first_row + threadIdx.x / kRowChunks + i * Tile::kRowStep;
        const int pixel = m % c.pixels;
        r.image[i] = m / c.pixels;
        r.y[i] = GUARD(m < c.m) ? pixel / c.output_width * c.stride - c.top : kOutside;
        r.x0[i] = pixel % c.output_width * c.stride - c.left;
    }
    r.k = slice * Tile::kSlice + threadIdx.x % kRowChunks * Tile::kChunkValues;
    if constexpr (!Tile::kGeneral) {
        const int channels = c.channels_a + c.channels_b;
        const int tap = r.k / channels;
        r.tap_y = tap / c.kernel_width;
        r.tap_x = tap % c.kernel_width;
        r.channel = r.k - tap * channels;
        r.in_b = r.channel >= c.channels_a;
        if (r.in_b) r.channel -= c.channels_a;
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
template <class T>
DEVICE KPlace k_place(const ConvArgs<T>& c, int k) {
    const int channels = c.channels_a + c.channels_b;
    if (k < channels) return {0, 0, k};  // 1x1: no division
    const int tap = k / channels;
    return {tap / c.kernel_width, tap % c.kernel_width, k - tap * channels};
}

template <class Tile, int kRows>
DEVICE void load_wide(ConvRows<typename Tile::T, kRows>& r, Chunk<typename Tile::T> (&to)[kRows]) {
    using T = typename Tile::T;
    const KPlace at = k_place(r.c, r.k);
    const bool inside_k = GUARD(at.tap_y < r.c.kernel_height), in_b = at.channel >= r.c.channels_a;
    UNROLL
    for (int i = 0; i < kRows; i++) {
        to[i] = Chunk<T>{};
        int64_t pixel;
        if (find_pixel(r, i, at.tap_y, at.tap_x, pixel) && inside_k) {
            const T* from = in_b ? r.c.b + pixel * r.c.channels_b + (at.channel - r.c.channels_a)
                                 : r.c.a + pixel * r.c.channels_a + at.channel;
            to[i] = *reinterpret_cast<const Chunk<T>*>(from);
        }
    }
    r.k += Tile::kSlice;
}

template <class Tile, int kRows>
DEVICE void fill(ConvRows<typename Tile::T, kRows>& r, Chunk<typename Tile::T>* slice) {
    using T = typename Tile::T;
    for (int e = 0; e < Tile::kChunkValues; e++) {
        const KPlace at = k_place(r.c, r.k + e);
        const bool inside_k = GUARD(at.tap_y < r.c.kernel_height), in_b = at.channel >= r.c.channels_a;
        UNROLL
        for (int i = 0; i < kRows; i++) {
            T value = from_f32<T>(0.0f);
            int64_t pixel;
            if (find_pixel(r, i, at.tap_y, at.tap_x, pixel) && inside_k) {
                value = in_b ? r.c.b[pixel * r.c.channels_b + (at.channel - r.c.channels_a)]
                             : r.c.a[pixel * r.c.channels_a + at.channel];
            }
            slice[own_place<Tile>(i)].v[e] = value;
        }
    }
    r.k += Tile::kSlice;
}

// ---- the result ----

// Output pixel m, output channels n .. n + Chunk<T>::kCount - 1 (those below O), from their sums.
template <class T>
DEVICE void finish(const ConvArgs<T>& o, const float* sums, int m, int n) {
    constexpr int kCount = Chunk<T>::kCount;
    const int64_t at = int64_t(m) * o.outputs + n;
    const T* row = row_of(o, m / o.pixels, n);
    if (o.wide & kWideOutput) {
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
        for (int e = 0; e < kCount; e++) y.v[e] = from_f32<T>(finished(o, v[e]));
        *reinterpret_cast<Chunk<T>*>(o.y + at) = y;
    } else {
        for (int e = 0; e < kCount; e++) {
            if (GUARD(n + e < o.outputs)) {
                float v = sums[e];
                if (o.bias != nullptr) v += to_f32(o.bias[n + e]);
                if (row != nullptr) v += to_f32(row[e]);
                if (o.residual != nullptr) v += to_f32(o.residual[at + e]);
                o.y[at + e] = from_f32<T>(finished(o, v));
            }
        }
    }
}

template <class Tile>
DEVICE void store(const ConvArgs<typename Tile::T>& o, const float (&rows)[16][Tile::kPitch], int m0, int n0) {
    constexpr int kCount = Tile::kChunkValues, kAcross = Tile::kWarpN / kCount;
    for (int item = lane_index(); item < 16 * kAcross; item += 32) {
        const int row = item / kAcross, column = item % kAcross * kCount;
        const int m = m0 + row, n = n0 + column;
        if (GUARD(m < o.m) && GUARD(n < o.outputs)) {
            if (o.partial == nullptr) {
                finish(o, &rows[row][column], m, n);
            } else {
                float* partial = o.partial + (int64_t(blockIdx.y) * o.m + m) * o.outputs + n;
                if (o.wide & kWideOutput) {
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

template <class Tile>
DEVICE void conv2d(const ConvArgs<typename Tile::T>& c) {
    SHARED_DYNAMIC(typename Tile::Shared, s);
    const TileOrigin origin = tile_origin<Tile>(c.m, c.outputs);
    const int k = c.kernel_height * c.kernel_width * (c.channels_a + c.channels_b);
    const int slices = (k + Tile::kSlice - 1) / Tile::kSlice;
    // Block (., s) takes the s-th of gridDim.y equal shares of the slices; the last ones may have fewer.
    const int share = (slices + gridDim.y - 1) / gridDim.y;
    const int first = blockIdx.y * share, count = max(0, min(share, slices - first));
    Sums<Tile> sums = {};
    if (count > 0) {
        auto a = conv_rows<Tile>(c, origin.m, first);
        auto b = dense_rows<Tile>(c.weight, origin.n, c.outputs, k, first * Tile::kSlice, c.wide & kWideWeight);
        product<Tile>(sums, s, a, b, count);
    }
    write_out<Tile>(sums, s, origin, c);
}

#define CONV2D(name, T, min_blocks, ...)                                                                    \
    KERNEL(conv2d_##name, (Tile<T, __VA_ARGS__>::kThreads), min_blocks)(const ConvArgs<T> args) {           \
        follow_previous();                                                                                  \
        conv2d<Tile<T, __VA_ARGS__>>(args);                                                                 \
    }                                                                                                       \
    REGISTER_KERNEL(conv2d_##name)

#include "common/tiles.cuh"
TILES(CONV2D)

// conv2d_join: y = f(scale * (partial[0] + partial[1] + ... + bias + row + residual)), the second launch of a split sum.
//   partial [splits, M, O] f32, added in order. Memory bound: splits * M * O * 4 bytes and y's.
// Launch: grid ceil(M * ceil(O / Chunk<T>::kCount) / kJoinThreads), block kJoinThreads. Any O, any alignment.
constexpr int kJoinThreads = 256;

template <class T>
DEVICE void conv2d_join(const ConvArgs<T>& o) {
    constexpr int kCount = Chunk<T>::kCount;
    const int64_t across = (o.outputs + kCount - 1) / kCount;
    const int64_t item = int64_t(blockIdx.x) * kJoinThreads + threadIdx.x;
    const int m = int(item / across), n = int(item % across) * kCount;
    if (GUARD(item < o.m * across)) {
        float sums[kCount] = {};
        for (int split = 0; split < o.splits; split++) {
            const float* partial = o.partial + (int64_t(split) * o.m + m) * o.outputs + n;
            if (o.wide & kWideOutput) {
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

#define CONV2D_JOIN(T, suffix)                                              \
    KERNEL(conv2d_join_##suffix, kJoinThreads, 1)(const ConvArgs<T> args) { \
        follow_previous();                                                  \
        conv2d_join(args);                                                  \
    }                                                                       \
    REGISTER_KERNEL(conv2d_join_##suffix)

CONV2D_JOIN(float, f32)
CONV2D_JOIN(f16, f16)
CONV2D_JOIN(bf16, bf16)
