// freeu.cu: FreeU (Si et al. 2023, arXiv:2309.11497), what a ResNet of an up block reads.
//   y = backbone and skip side by side; the backbone's first C / 2 channels times b; of skip's Fourier coefficients those of
//   the frequencies 0 and -1 along both axes times s, real part. With W_k(pixel) the seven waves 1, cos, sin of the rows'
//   phase 2 pi i / H, of the columns' 2 pi j / W and of their sum,
//     y(pixel) = x(pixel) + (s - 1) / (H W) sum over k of W_k(pixel) M_k,   M_k = sum over pixels of W_k x
//   A map of one row (or column) has no other frequency than 0 along it: those waves are 0.
//   y [N, H, W, C + D]   backbone [N, H, W, C]   skip [N, H, W, D]   sums [N, parts, 7, D] f32   T = f32 | f16 | bf16
// Memory bound: skip twice, the others once; the waves are computed anew for each pixel and kVector channels.
// freeu_sums: grid (ceil(D / channels of a block), parts, N); freeu: grid (blocks of C + of D, ceil(H W / kPixels), N); block
// kThreads: kGroups groups of kVector channels (or of 1, where sizes or addresses are no whole vectors) and kLanes pixels.
#include "common/math.cuh"
#include "common/vector.cuh"

#ifndef __CUDACC__
static inline void sincospif(float x, float* sine, float* cosine) {
    *sine = float(sin(3.14159265358979323846 * x));
    *cosine = float(cos(3.14159265358979323846 * x));
}
#endif

constexpr int kThreads = 256;
constexpr int kGroups = 8;
constexpr int kLanes = kThreads / kGroups;
constexpr int kWarps = kThreads / 32;
constexpr int kPixels = 512;  // of one block of freeu, and at least of a part of freeu_sums
constexpr int kMoments = 7;

DEVICE void waves(float (&k)[kMoments], int pixel, int height, int width) {
    const int row = pixel / width, column = pixel % width;
    const float rows = height > 1 ? 1.f : 0.f, columns = width > 1 ? 1.f : 0.f;
    float sin_y, cos_y, sin_x, cos_x;
    sincospif(2.f * float(row) / float(height), &sin_y, &cos_y);
    sincospif(2.f * float(column) / float(width), &sin_x, &cos_x);
    k[0] = 1.f;
    k[1] = rows * cos_y;
    k[2] = rows * sin_y;
    k[3] = columns * cos_x;
    k[4] = columns * sin_x;
    k[5] = rows * columns * (cos_y * cos_x - sin_y * sin_x);
    k[6] = rows * columns * (sin_y * cos_x + cos_y * sin_x);
}

// The sums over one part's pixels. A lane adds its own pixels, a warp its four lanes of a channel, a block its warps in order.
template <int V, class T>
DEVICE void sums_of_part(float* sums, const T* skip, int height, int width, int channels) {
    SHARED_STATIC(float, of_warps, [kWarps][kMoments][kGroups * kVector]);
    const int group = threadIdx.x % kGroups, lane = threadIdx.x / kGroups, warp = threadIdx.x / 32;
    const int channel = (blockIdx.x * kGroups + group) * V, pixels = height * width;
    const int length = (pixels + int(gridDim.y) - 1) / int(gridDim.y), first = blockIdx.y * length;
    const int end = min(pixels, first + length);
    float sum[kMoments][V] = {};
    if (GUARD(channel < channels)) {
        for (int pixel = first + lane; pixel < end; pixel += kLanes) {
            float k[kMoments], values[V];
            waves(k, pixel, height, width);
            load<V>(values, skip + (int64_t(blockIdx.z) * pixels + pixel) * channels + channel);
            UNROLL
            for (int at = 0; at < kMoments; at++) {
                UNROLL
                for (int v = 0; v < V; v++) sum[at][v] += k[at] * values[v];
            }
        }
    }
    UNROLL
    for (int at = 0; at < kMoments; at++) {
        UNROLL
        for (int v = 0; v < V; v++) {
            float value = sum[at][v];
            value += __shfl_xor_sync(~0u, value, 16);
            value += __shfl_xor_sync(~0u, value, 8);
            if (threadIdx.x % 32 < kGroups) of_warps[warp][at][group * V + v] = value;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kMoments * kGroups * V; i += kThreads) {
        const int at = i / (kGroups * V), c = i % (kGroups * V), own = blockIdx.x * kGroups * V + c;
        if (!GUARD(own < channels)) continue;
        float total = 0.f;
        for (int w = 0; w < kWarps; w++) total += of_warps[w][at][c];
        sums[((int64_t(blockIdx.z) * gridDim.y + blockIdx.y) * kMoments + at) * channels + own] = total;
    }
}

template <int V, class T>
DEVICE void apply(T* y, const T* backbone, const T* skip, const float* sums, int height, int width, int of_backbone,
                  int of_skip, int parts, float b, float s) {
    SHARED_STATIC(float, moments, [kMoments][kGroups * kVector]);
    const int group = threadIdx.x % kGroups, lane = threadIdx.x / kGroups;
    const int pixels = height * width, first = blockIdx.y * kPixels, end = min(pixels, first + kPixels);
    const int of_both = of_backbone + of_skip, blocks = (of_backbone + kGroups * V - 1) / (kGroups * V);
    const int64_t image = int64_t(blockIdx.z) * pixels;
    if (int(blockIdx.x) < blocks) {
        const int channel = (blockIdx.x * kGroups + group) * V;
        if (!GUARD(channel < of_backbone)) return;
        const float factor = channel < of_backbone / 2 ? b : 1.f;
        for (int pixel = first + lane; pixel < end; pixel += kLanes) {
            float values[V];
            load<V>(values, backbone + (image + pixel) * of_backbone + channel);
            UNROLL
            for (int v = 0; v < V; v++) values[v] *= factor;
            store<V>(y + (image + pixel) * of_both + channel, values);
        }
        return;
    }
    const int first_channel = (blockIdx.x - blocks) * kGroups * V;
    const float factor = (s - 1.f) / float(pixels);
    for (int i = threadIdx.x; i < kMoments * kGroups * V; i += kThreads) {
        const int at = i / (kGroups * V), c = i % (kGroups * V), own = first_channel + c;
        float sum = 0.f;
        if (GUARD(own < of_skip)) {
            for (int part = 0; part < parts; part++) {
                sum += sums[((int64_t(blockIdx.z) * parts + part) * kMoments + at) * of_skip + own];
            }
        }
        moments[at][c] = factor * sum;
    }
    __syncthreads();
    const int channel = first_channel + group * V;
    if (!GUARD(channel < of_skip)) return;
    for (int pixel = first + lane; pixel < end; pixel += kLanes) {
        float k[kMoments], values[V];
        waves(k, pixel, height, width);
        load<V>(values, skip + (image + pixel) * of_skip + channel);
        UNROLL
        for (int at = 0; at < kMoments; at++) {
            UNROLL
            for (int v = 0; v < V; v++) values[v] += k[at] * moments[at][group * V + v];
        }
        store<V>(y + (image + pixel) * of_both + of_backbone + channel, values);
    }
}

#define ENTRIES(T, suffix)                                                                                             \
    KERNEL(freeu_sums_##suffix, kThreads, 1)(float* sums, const T* skip, int height, int width, int channels,          \
                                             int vector) {                                                             \
        follow_previous();                                                                                             \
        if (vector) {                                                                                                  \
            sums_of_part<kVector>(sums, skip, height, width, channels);                                                \
        } else {                                                                                                       \
            sums_of_part<1>(sums, skip, height, width, channels);                                                      \
        }                                                                                                              \
    }                                                                                                                  \
    REGISTER_KERNEL(freeu_sums_##suffix)                                                                               \
    KERNEL(freeu_##suffix, kThreads, 1)(T* y, const T* backbone, const T* skip, const float* sums, int height,         \
                                        int width, int of_backbone, int of_skip, int parts, float b, float s,          \
                                        int vector) {                                                                  \
        follow_previous();                                                                                             \
        if (vector) {                                                                                                  \
            apply<kVector>(y, backbone, skip, sums, height, width, of_backbone, of_skip, parts, b, s);                 \
        } else {                                                                                                       \
            apply<1>(y, backbone, skip, sums, height, width, of_backbone, of_skip, parts, b, s);                       \
        }                                                                                                              \
    }                                                                                                                  \
    REGISTER_KERNEL(freeu_##suffix)

ENTRIES(float, f32)
ENTRIES(f16, f16)
ENTRIES(bf16, bf16)
