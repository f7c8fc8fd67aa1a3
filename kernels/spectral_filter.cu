// spectral_filter.cu: the low-pass filter before a dilated convolution; FouriScale (Huang et al. 2024, arXiv:2403.12963).
//   y = Re(F^-1((M_rows x M_columns) F x))     F: the transform of x padded with zeros on the right and below to n_h x n_w
// The published mask of an axis of n (even) values is, shifted, reverse(m) ++ m: symmetric about a half frequency, so that its
// inverse transform is complex, and with it the circulant A = F^-1 diag(mask) F of each axis:
//   a(t) = e^(-i pi t / n) (2 / n) sum over j < n/2 of m[j] cos(pi (2 j + 1) t / n),   A[i][k] = a((i - k) mod n)
//   y = (Re A_h x Re A_w - Im A_h x Im A_w) x
// What is padded and what is cut off afterwards are rows and columns of A that are not there, so two dense products per axis
// replace transforms, whatever the sizes' factors are.
//   spectral_taps      taps [masks, n_h + n_w, 2] f32: Re a, Im a of the rows' axis, then of the columns'
//   spectral_columns   z [2, batch, length, width] f32 = Re A and Im A of x [batch, length, width] in T, along length
//   spectral_rows      y [batch, length, width] in T = Re A z[0] - Im A z[1], along length
//     columns: batch N H, length W, width C; rows: batch N, length H, width W C; the batch from `weak_from` on by the second mask
// Bound by multiply-adds: 2 length for each value of x and of y, in f32. A block makes kOutputs x kWidth values of y, from slices
// of kSlice values of length in shared memory; a thread has kOwn neighbours along length, so that of the kOwn taps of the next
// value only one is new, by kOwn columns. Launch: grid (batch ceil(width / kWidth), ceil(length / kOutputs)), block kThreads.
#include "common/vector.cuh"

#ifndef __CUDACC__
static inline double cospi(double x) { return cos(3.14159265358979323846 * x); }
static inline double sinpi(double x) { return sin(3.14159265358979323846 * x); }
#endif

constexpr int kThreads = 256;
constexpr int kOwn = 4;
constexpr int kWidth = 128;
constexpr int kOutputs = kThreads / (kWidth / kOwn) * kOwn;
constexpr int kSlice = 16;
// Differences between an output of the block and a value of the slice.
constexpr int kReach = kOutputs + kSlice - 1;
static_assert(kSlice * kWidth == kThreads * kVector && kReach <= kThreads);

// m[j] = clamp(slope (half / scale + 1 - j) + 1, floor, 1) with slope = (1 - floor) / taper; taper 0: all ones.
struct Masks {
    double scale;
    double floor;
    int taper[4];  // of the first mask the rows' and the columns' axis, then of the second
    int length[2];
};

// A thread has one tap: the cosines of odd multiples of an angle follow from the two before. Launch: grid (ceil((n_h + n_w) /
// kThreads), masks), block kThreads.
KERNEL(spectral_taps_f32, kThreads, 1)(float* taps, GRID_CONST Masks masks) {
    follow_previous();
    const int i = blockIdx.x * kThreads + threadIdx.x, all = masks.length[0] + masks.length[1];
    if (!GUARD(i < all)) return;
    const int axis = i < masks.length[0] ? 0 : 1, n = masks.length[axis], t = axis == 0 ? i : i - masks.length[0];
    const int half = n / 2, taper = masks.taper[2 * blockIdx.y + axis];
    const double slope = taper > 0 ? (1.0 - masks.floor) / taper : 0.0;
    const double turns = double(t) / n, step = 2.0 * cospi(2.0 * turns);
    double before = cospi(turns), cosine = before, sum = 0.0;
    for (int j = 0; j < half; j++) {
        const double value = taper > 0 ? slope * (half / masks.scale + 1.0 - j) + 1.0 : 1.0;
        sum += fmin(fmax(value, masks.floor), 1.0) * cosine;
        const double next = step * cosine - before;
        before = cosine;
        cosine = next;
    }
    sum *= 2.0 / n;
    float* to = taps + (int64_t(blockIdx.y) * all + i) * 2;
    to[0] = float(cospi(turns) * sum);
    to[1] = float(-sinpi(turns) * sum);
}
REGISTER_KERNEL(spectral_taps_f32)

// V: kVector where width is a multiple of it and addresses are aligned, else 1.
template <int V, class T>
DEVICE void load_slice(float (&slice)[kSlice][kWidth], const T* x, int first, int length, int column, int width) {
    UNROLL
    for (int part = 0; part < kVector / V; part++) {
        const int i = (part * kThreads + threadIdx.x) * V, row = i / kWidth, at = i % kWidth;
        float values[V] = {};
        if (GUARD(first + row < length) && GUARD(column + at < width)) {
            load<V>(values, x + int64_t(first + row) * width + column + at);
        }
        UNROLL
        for (int v = 0; v < V; v++) slice[row][at + v] = values[v];
    }
}

template <class T>
struct alignas(kOwn * sizeof(T)) Own {
    T v[kOwn];
};

// The first `count` of a thread's columns: with vectors all of them or none, at once.
template <int V, class T>
DEVICE void store_own(T* y, const float (&values)[kOwn], int count) {
    if constexpr (V == kVector) {
        if (!GUARD(count > 0)) return;
        Own<T> own;
        UNROLL
        for (int c = 0; c < kOwn; c++) own.v[c] = from_f32<T>(values[c]);
        *reinterpret_cast<Own<T>*>(y) = own;
    } else {
        UNROLL
        for (int c = 0; c < kOwn; c++) {
            if (GUARD(c < count)) y[c] = from_f32<T>(values[c]);
        }
    }
}

// kPlanes: of x, 1 for the columns' pass, 2 for the rows'. The planes of x or of y lie `plane` values apart.
template <int kPlanes, int V, class From, class To>
DEVICE void filter(To* y, const From* x, const float* taps, int n, int64_t mask_stride, int weak_from, int64_t plane,
                   int length, int width) {
    SHARED_STATIC(float, slices, [kPlanes][kSlice][kWidth]);
    SHARED_STATIC(float, reach, [2][kReach]);
    const int blocks = (width + kWidth - 1) / kWidth, batch = blockIdx.x / blocks;
    const int column = int(blockIdx.x % blocks) * kWidth, output = blockIdx.y * kOutputs;
    const int own_column = int(threadIdx.x % (kWidth / kOwn)) * kOwn, own = int(threadIdx.x / (kWidth / kOwn)) * kOwn;
    if (batch >= weak_from) taps += mask_stride;
    x += int64_t(batch) * length * width;
    y += int64_t(batch) * length * width;
    float sum[2][kOwn][kOwn] = {};
    for (int first = 0; first < length; first += kSlice) {
        __syncthreads();
        UNROLL
        for (int p = 0; p < kPlanes; p++) load_slice<V>(slices[p], x + p * plane, first, length, column, width);
        if (threadIdx.x < kReach) {
            // Of output `output + i` and value `first + k`: reach[i - k + kSlice - 1].
            int t = output - first - (kSlice - 1) + int(threadIdx.x);
            t = t < 0 ? t + n : t;
            // Beyond n lie outputs that are not made.
            const bool is_tap = t >= 0 && t < n;
            UNROLL
            for (int part = 0; part < 2; part++) reach[part][threadIdx.x] = GUARD(is_tap) ? taps[2 * t + part] : 0.f;
        }
        __syncthreads();
        float tap[2][kOwn];
        UNROLL
        for (int o = 1; o < kOwn; o++) {
            UNROLL
            for (int part = 0; part < 2; part++) tap[part][o] = reach[part][own + o - 1 + kSlice];
        }
        UNROLL
        for (int k = 0; k < kSlice; k++) {
            UNROLL
            for (int part = 0; part < 2; part++) {
                if (k > 0) {
                    UNROLL
                    for (int o = kOwn - 1; o > 0; o--) tap[part][o] = tap[part][o - 1];
                }
                tap[part][0] = reach[part][own + kSlice - 1 - k];
            }
            float values[kPlanes][kOwn];
            UNROLL
            for (int p = 0; p < kPlanes; p++) {
                UNROLL
                for (int c = 0; c < kOwn; c++) values[p][c] = slices[p][k][own_column + c];
            }
            UNROLL
            for (int part = 0; part < 2; part++) {
                UNROLL
                for (int o = 0; o < kOwn; o++) {
                    UNROLL
                    for (int c = 0; c < kOwn; c++) sum[part][o][c] += tap[part][o] * values[kPlanes == 1 ? 0 : part][c];
                }
            }
        }
    }
    UNROLL
    for (int o = 0; o < kOwn; o++) {
        if (!GUARD(output + own + o < length)) break;
        const int64_t at = int64_t(output + own + o) * width + column + own_column;
        const int count = min(width - column - own_column, kOwn);
        if constexpr (kPlanes == 1) {
            store_own<V>(y + at, sum[0][o], count);
            store_own<V>(y + plane + at, sum[1][o], count);
        } else {
            float values[kOwn];
            UNROLL
            for (int c = 0; c < kOwn; c++) values[c] = sum[0][o][c] - sum[1][o][c];
            store_own<V>(y + at, values, count);
        }
    }
}

#define ENTRIES(T, suffix)                                                                                             \
    KERNEL(spectral_columns_##suffix, kThreads, 2)(float* z, const T* x, const float* taps, int n, int64_t mask_stride, \
                                                   int weak_from, int64_t plane, int length, int width, int vector) {  \
        follow_previous();                                                                                             \
        if (vector) {                                                                                                  \
            filter<1, kVector>(z, x, taps, n, mask_stride, weak_from, plane, length, width);                           \
        } else {                                                                                                       \
            filter<1, 1>(z, x, taps, n, mask_stride, weak_from, plane, length, width);                                 \
        }                                                                                                              \
    }                                                                                                                  \
    REGISTER_KERNEL(spectral_columns_##suffix)                                                                         \
    KERNEL(spectral_rows_##suffix, kThreads, 2)(T* y, const float* z, const float* taps, int n, int64_t mask_stride,   \
                                                int weak_from, int64_t plane, int length, int width, int vector) {     \
        follow_previous();                                                                                             \
        if (vector) {                                                                                                  \
            filter<2, kVector>(y, z, taps, n, mask_stride, weak_from, plane, length, width);                           \
        } else {                                                                                                       \
            filter<2, 1>(y, z, taps, n, mask_stride, weak_from, plane, length, width);                                 \
        }                                                                                                              \
    }                                                                                                                  \
    REGISTER_KERNEL(spectral_rows_##suffix)

ENTRIES(float, f32)
ENTRIES(f16, f16)
ENTRIES(bf16, bf16)
