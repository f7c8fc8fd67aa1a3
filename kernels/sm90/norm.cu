// sm90/norm.cu: group norm of norm.cu, modulated, with SiLU or GELU, or not, in one launch, for Hopper (sm_90a): f16 and bf16.
//
// A cluster takes a window of groups of one image, its blocks the pixels in equal parts. A thread has one vector of channels
// and every rows-th pixel of its block; the first kHeld of them stay in registers, all on their way at once, the others are
// read twice, the second time from L2 as far as they are still there. Bytes: x once, what is not held again, y once.
//
// Statistics in two passes over what a block has, so that nothing cancels: the mean of what is held; then the deviations of
// all from that, which corrects the mean and gives the squares. At least a quarter of a block is held, and the mean of a quarter
// is within two standard deviations of the whole's, so that the correction cancels at most 5 eps of the variance. Blocks are
// joined around their joint mean (Chan, Golub & LeVeque 1979), through distributed shared memory, in the order of their
// ranks. The cluster follows from one image's size alone (src/ops/cuda/norm.rs), and so does the order of all sums.
//
// Asked for: channel counts that are multiples of kVector, all pointers aligned to 16, scale and shift in every row too; C/G >=
// kVector or C/G = 4, so that a vector lies in at most two groups; a window of whole vectors and at most kMostGroups groups; a
// pixel for every block.
// Launch: group_norm_cluster_<dtype>, grid (G / window * blocks, N), cluster (blocks, 1, 1), block kThreads.
#include "common/hopper.cuh"
#include "common/norm.cuh"
#include "common/reduce.cuh"

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kMostGroups = kWarps;  // a warp each
constexpr int kHeld = 12;            // 48 registers
constexpr int kInFlight = 4;

// A thread's share of a sum per group: of the group that its first channel is in, and of the next one.
struct Shares {
    float value[2][kThreads];
};

// Where a thread's channels are: `own` of them in group `group` of the window, the others in the next.
struct Straddle {
    int group, own;

    __device__ int of(int channel) const { return channel < own ? group : group + 1; }
};

DEVICE void share(Shares& shares, const float (&sums)[kVector], const Straddle& straddle) {
    float own = 0.f, next = 0.f;
    UNROLL
    for (int j = 0; j < kVector; j++) {
        if (j < straddle.own) {
            own += sums[j];
        } else {
            next += sums[j];
        }
    }
    shares.value[0][threadIdx.x] = own;
    shares.value[1][threadIdx.x] = next;
}

// By a warp: the sum of `rows` rows of threads' shares in a group of the window, `columns` threads a row.
DEVICE float group_sum(const Shares& shares, int group, int width, int rows, int columns) {
    const int first = group * width / kVector, count = ((group + 1) * width - 1) / kVector - first + 1;
    float sum = 0.f;
    for (int i = threadIdx.x % 32; i < rows * count; i += 32) {
        const int column = first + i % count;
        sum += shares.value[column * kVector / width == group ? 0 : 1][i / count * columns + column];
    }
    return warp_sum(sum);
}

// Pixels [first, first + count) of an image: those of block `rank` of `blocks`.
struct Part {
    int first, count;
};
DEVICE Part part_of(int pixels, int rank, int blocks) {
    const int first = int(int64_t(pixels) * rank / blocks);
    return {first, int(int64_t(pixels) * (rank + 1) / blocks) - first};
}

// y and statistics [N, G], either of them null where it is not wanted.
template <class T>
DEVICE void group_norm_cluster(T* y, float2* statistics, const Sources<T>& x, const T* gamma, const T* beta,
                               const ModulationArgs<T>& modulation, int pixels, int groups, int window, float eps,
                               int activation) {
    SHARED_STATIC(Shares, held_sums, [1]);
    SHARED_STATIC(Shares, sums, [1]);
    SHARED_STATIC(Shares, squares, [1]);
    SHARED_STATIC(float, centers, [kMostGroups]);
    SHARED_STATIC(float2, parts, [kMostGroups]);
    SHARED_STATIC(float2, finals, [kMostGroups]);
    const int blocks = cluster_size(), rank = cluster_rank(), unit = blockIdx.x / blocks;
    const int width = x.channels() / groups, columns = window * width / kVector, rows = kThreads / columns;
    const int row = threadIdx.x / columns, column = threadIdx.x % columns, warp = threadIdx.x / 32;
    const int channel = unit * window * width + column * kVector;
    const Part part = part_of(pixels, rank, blocks);
    const int64_t first = int64_t(blockIdx.y) * pixels + part.first;
    const int last = min(rows, part.count);
    const Straddle straddle = {column * kVector / width,
                               min(kVector, (column * kVector / width + 1) * width - column * kVector)};

    Raw<kVector, T> held[kHeld], scale, shift;
    if (row < last) {
        UNROLL
        for (int i = 0; i < kHeld; i++) {
            if (GUARD(row + i * rows < part.count)) fetch<kVector>(held[i], x.at(first + row + i * rows, channel));
        }
        if (y) {
            fetch<kVector>(scale, gamma + channel);
            fetch<kVector>(shift, beta + channel);
        }
        float sum[kVector] = {};
        UNROLL
        for (int i = 0; i < kHeld; i++) {
            float values[kVector];
            widen(values, held[i]);
            if (row + i * rows < part.count) {
                UNROLL
                for (int j = 0; j < kVector; j++) sum[j] += values[j];
            }
        }
        share(held_sums[0], sum, straddle);
    }
    __syncthreads();
    if (warp < window) {
        const float sum = group_sum(held_sums[0], warp, width, last, columns);
        if (threadIdx.x % 32 == 0) centers[warp] = sum / (float(min(part.count, rows * kHeld)) * width);
    }
    __syncthreads();

    if (row < last) {
        float center[kVector], sum[kVector] = {}, square[kVector] = {};
        UNROLL
        for (int j = 0; j < kVector; j++) center[j] = centers[straddle.of(j)];
        const auto take = [&](const Raw<kVector, T>& raw) {
            float values[kVector];
            widen(values, raw);
            UNROLL
            for (int j = 0; j < kVector; j++) {
                const float d = values[j] - center[j];
                sum[j] += d;
                square[j] = fmaf(d, d, square[j]);
            }
        };
        UNROLL
        for (int i = 0; i < kHeld; i++) {
            hold(held[i]);
            if (row + i * rows < part.count) take(held[i]);
        }
        int pixel = row + kHeld * rows;
        for (; pixel + (kInFlight - 1) * rows < part.count; pixel += kInFlight * rows) {
            Raw<kVector, T> raw[kInFlight];
            UNROLL
            for (int k = 0; k < kInFlight; k++) fetch<kVector>(raw[k], x.at(first + pixel + k * rows, channel));
            UNROLL
            for (int k = 0; k < kInFlight; k++) take(raw[k]);
        }
        for (; pixel < part.count; pixel += rows) {
            Raw<kVector, T> raw;
            fetch<kVector>(raw, x.at(first + pixel, channel));
            take(raw);
        }
        share(sums[0], sum, straddle);
        share(squares[0], square, straddle);
    }
    __syncthreads();
    if (warp < window) {
        const float sum = group_sum(sums[0], warp, width, last, columns);
        const float square = group_sum(squares[0], warp, width, last, columns);
        if (threadIdx.x % 32 == 0) {
            const float count = float(part.count) * width, left = square - sum * sum / count;
            parts[warp] = make_float2(centers[warp] + sum / count, left < 0.f ? 0.f : left);  // NaN stays
        }
    }
    cluster_sync();
    if (warp < window) {
        // A lane a block.
        const int lane = threadIdx.x % 32;
        float mean = 0.f, square = 0.f, count = 0.f;
        if (lane < blocks) {
            const uint32_t at = cluster_address(&parts[warp], lane);
            mean = cluster_load_f32(at);
            square = cluster_load_f32(at + sizeof(float));
            count = float(part_of(pixels, lane, blocks).count) * width;
        }
        const float reference = __shfl_sync(~0u, mean, 0), total = float(pixels) * width;
        const float joint = reference + warp_sum(count * (mean - reference)) / total;
        const float deviations = warp_sum(square + count * (mean - joint) * (mean - joint));
        if (lane == 0) {
            finals[warp] = finished(joint, deviations, total, eps);
            if (statistics && rank == 0) statistics[blockIdx.y * groups + unit * window + warp] = finals[warp];
        }
    }
    cluster_arrive();
    __syncthreads();
    if (y && row < last) {
        float gammas[kVector], betas[kVector];
        widen(gammas, scale);
        widen(betas, shift);
        modulate(gammas, betas, modulation, blockIdx.y, channel);
        const float2 own = finals[straddle.group], next = finals[straddle.of(kVector - 1)];
        const auto put = [&](int pixel, const Raw<kVector, T>& raw) {
            float values[kVector];
            widen(values, raw);
            UNROLL
            for (int j = 0; j < kVector; j++) {
                values[j] = normalise(values[j], j < straddle.own ? own : next, gammas[j], betas[j]);
            }
            activate_normed<T>(values, activation);
            store<kVector>(y + (first + pixel) * x.channels() + channel, values);
        };
        UNROLL
        for (int i = 0; i < kHeld; i++) {
            hold(held[i]);
            if (GUARD(row + i * rows < part.count)) put(row + i * rows, held[i]);
        }
        // Backwards: what was read last is still in L2.
        int left = (part.count - row + rows - 1) / rows - kHeld;
        for (; left >= kInFlight; left -= kInFlight) {
            Raw<kVector, T> raw[kInFlight];
            const int pixel = row + (kHeld + left - 1) * rows;
            UNROLL
            for (int k = 0; k < kInFlight; k++) fetch<kVector>(raw[k], x.at(first + pixel - k * rows, channel));
            UNROLL
            for (int k = 0; k < kInFlight; k++) put(pixel - k * rows, raw[k]);
        }
        for (; left > 0; left--) {
            Raw<kVector, T> raw;
            const int pixel = row + (kHeld + left - 1) * rows;
            fetch<kVector>(raw, x.at(first + pixel, channel));
            put(pixel, raw);
        }
    }
    // The others have read this block's part.
    cluster_wait();
}

#define ENTRY(T, suffix)                                                                                                \
    KERNEL(group_norm_cluster_##suffix, kThreads, 1)(T* y, float2* statistics, const T* a, const T* b, const T* gamma,  \
                                                     const T* beta, const ModulationArgs<T> modulation,                 \
                                                     int channels_a, int channels_b, int pixels, int groups,            \
                                                     int window, float eps, int activation) {                           \
        follow_previous();                                                                                              \
        const Sources<T> x = {a, b, channels_a, channels_b};                                                            \
        group_norm_cluster(y, statistics, x, gamma, beta, modulation, pixels, groups, window, eps, activation);         \
    }                                                                                                                   \
    REGISTER_KERNEL(group_norm_cluster_##suffix)

ENTRY(f16, f16)
ENTRY(bf16, bf16)
