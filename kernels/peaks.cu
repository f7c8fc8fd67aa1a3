// peaks.cu: what a card can do at most, measured by `megafuse bench`: bare products on registers, a bare copy, a bare read.
//
// The loops touch no memory. Each warp has kA kB = 8 products under way that do not wait for each other (each thread
// kSums = 16 sums), enough for the latency of a tensor core (of an FMA unit) at two blocks a multiprocessor. What is
// computed is stored, so that it can be checked and is not removed.
#include "common/device.cuh"
#include "common/vector.cuh"

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kA = 2, kB = 4;
constexpr int kSums = 16;
constexpr int kCopies = 4;
constexpr int kReads = 16;

// peak_mma: y[warp] = rounds * (sum over i, j of a[i] b[j]^T), by mma.sync.   T = f16 | bf16
//   y [blocks * kWarps, 16, 8] f32   a [kA, 16, 16]   b [kB, 8, 16]; aligned to 4 bytes
// Launch: grid blocks, block kThreads. 2 * 16 * 8 * 16 * kA * kB flops a warp and round. By warp: the products of a
// Hopper warpgroup are faster (sm90/peaks.cu).
template <class T>
DEVICE void peak_mma(float* y, const T* a, const T* b, int rounds) {
    const int warp = blockIdx.x * kWarps + threadIdx.x / 32;
    const int row = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
    // 32 bits are two elements of a row; 8 of them a row, 128 a matrix of 16 rows.
    const uint32_t* a_pairs = reinterpret_cast<const uint32_t*>(a);
    const uint32_t* b_pairs = reinterpret_cast<const uint32_t*>(b);
    uint32_t a_regs[kA][4], b_regs[kB][2];
    UNROLL
    for (int i = 0; i < kA; i++) {
        UNROLL
        for (int part = 0; part < 4; part++) {
            a_regs[i][part] = a_pairs[i * 128 + (row + part % 2 * 8) * 8 + part / 2 * 4 + pair];
        }
    }
    UNROLL
    for (int j = 0; j < kB; j++) {
        UNROLL
        for (int part = 0; part < 2; part++) b_regs[j][part] = b_pairs[j * 64 + row * 8 + part * 4 + pair];
    }
    float d[kA][kB][4] = {};
    for (int round = 0; round < rounds; round++) {
        UNROLL
        for (int i = 0; i < kA; i++) {
            UNROLL
            for (int j = 0; j < kB; j++) mma_m16n8k16<T>(d[i][j], a_regs[i], b_regs[j][0], b_regs[j][1]);
        }
    }
    UNROLL
    for (int e = 0; e < 4; e++) {
        float sum = 0.f;
        UNROLL
        for (int i = 0; i < kA; i++) {
            UNROLL
            for (int j = 0; j < kB; j++) sum += d[i][j][e];
        }
        y[warp * 128 + (row + e / 2 * 8) * 8 + pair * 2 + e % 2] = sum;
    }
}

KERNEL(peak_mma_f16, kThreads, 2)(float* y, const f16* a, const f16* b, int rounds) {
    follow_previous();
    peak_mma(y, a, b, rounds);
}
REGISTER_KERNEL(peak_mma_f16)
KERNEL(peak_mma_bf16, kThreads, 2)(float* y, const bf16* a, const bf16* b, int rounds) {
    follow_previous();
    peak_mma(y, a, b, rounds);
}
REGISTER_KERNEL(peak_mma_bf16)

// peak_ffma: kSums sums s_i, first x + i, then `rounds` times s_i = s_i scale + shift; y is their sum.
//   y [blocks * kThreads]   x [kThreads]   f32
// Launch: grid blocks, block kThreads. 2 kSums flops a thread and round.
KERNEL(peak_ffma_f32, kThreads, 2)(float* y, const float* x, float scale, float shift, int rounds) {
    follow_previous();
    float sums[kSums];
    UNROLL
    for (int i = 0; i < kSums; i++) sums[i] = x[threadIdx.x] + i;
    for (int round = 0; round < rounds; round++) {
        UNROLL
        for (int i = 0; i < kSums; i++) sums[i] = fmaf(sums[i], scale, shift);
    }
    float sum = 0.f;
    UNROLL
    for (int i = 0; i < kSums; i++) sum += sums[i];
    y[blockIdx.x * kThreads + threadIdx.x] = sum;
}
REGISTER_KERNEL(peak_ffma_f32)

// peak_copy: y = x, 16 bytes at a time.   y, x [count] of 16 bytes, aligned to that
// Launch: grid ceil(count / (kThreads kCopies)), block kThreads; neighbours read neighbours.
KERNEL(peak_copy, kThreads, 1)(Pack<float>* __restrict__ y, const Pack<float>* __restrict__ x, int64_t count) {
    follow_previous();
    const int64_t first = int64_t(blockIdx.x) * kThreads * kCopies + threadIdx.x;
    UNROLL
    for (int part = 0; part < kCopies; part++) {
        const int64_t i = first + part * kThreads;
        if (GUARD(i < count)) y[i] = x[i];
    }
}
REGISTER_KERNEL(peak_copy)

// peak_read: y[thread] = sum of the thread's kReads pieces of x, each of four f32; nothing is written but that. It empties
// the second-level cache of what was there, and leaves nothing to be written back, as a fill would.
//   y [threads] f32   x [threads * kReads] of 16 bytes, aligned to that
// Launch: grid threads / kThreads, block kThreads; neighbours read neighbours.
KERNEL(peak_read_f32, kThreads, 1)(float* __restrict__ y, const float4* __restrict__ x) {
    follow_previous();
    const int64_t first = int64_t(blockIdx.x) * kThreads * kReads + threadIdx.x;
    float sum = 0.f;
    UNROLL
    for (int part = 0; part < kReads; part++) {
        const float4 piece = x[first + part * kThreads];
        sum += piece.x + piece.y + (piece.z + piece.w);
    }
    y[int64_t(blockIdx.x) * kThreads + threadIdx.x] = sum;
}
REGISTER_KERNEL(peak_read_f32)
