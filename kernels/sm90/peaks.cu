// sm90/peaks.cu: what Hopper's tensor cores can do at most, measured by `megafuse bench`: bare wgmma, operands in shared
// memory. mma.sync (kernels/peaks.cu) reaches about four fifths of it there.
#include "common/wgmma.cuh"

constexpr int kWarpgroups = 2, kThreads = 128 * kWarpgroups;
constexpr int kM = 64, kN = 256, kK = 64;

template <class T>
struct alignas(1024) PeakOperands {
    T a[kWarpgroups][kM * kK];
    T b[kN * kK];
};

// Rows of 128 bytes in the 128-byte swizzle: chunk c of row r lies at c XOR r modulo 8.
template <class T>
DEVICE void swizzled_copy(T* to, const T* from, int rows) {
    const uint4* chunks = reinterpret_cast<const uint4*>(from);
    uint4* place = reinterpret_cast<uint4*>(to);
    for (int i = threadIdx.x; i < rows * 8; i += kThreads) place[i / 8 * 8 + (i % 8 ^ i / 8 % 8)] = chunks[i];
}

// peak_wgmma: y[warpgroup] = rounds * a b^T, sums in f32.   T = f16 | bf16
//   y [blocks * kWarpgroups, kM, kN] f32   a [kM, kK]   b [kN, kK]; aligned to 16 bytes
// Launch: grid blocks, block kThreads, dynamic shared memory PeakOperands. 2 kM kN kK flops a warpgroup and round. One block
// a multiprocessor: two warpgroups, each with a round on its way while the next is issued, keep its tensor cores busy.
template <class T>
DEVICE void peak_wgmma(float* y, const T* a, const T* b, int rounds) {
    SHARED_DYNAMIC(PeakOperands<T>, s);
    const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
    for (int i = 0; i < kWarpgroups; i++) swizzled_copy(s.a[i], a, kM);
    swizzled_copy(s.b, b, kN);
    fence_proxy_async();
    __syncthreads();
    const uint64_t from_a = wgmma_desc128(smem_u32(s.a[warpgroup]), 16, 1024);
    const uint64_t from_b = wgmma_desc128(smem_u32(s.b), 16, 1024);
    float sums[kN / 2];
    UNROLL
    for (int i = 0; i < kN / 2; i++) {
        sums[i] = 0.f;
        fence_register(sums[i]);
    }
    for (int round = 0; round < rounds; round++) {
        wgmma_fence();
        UNROLL
        for (int k = 0; k < kK / 16; k++) wgmma<T, kN>(sums, from_a + 2 * k, from_b + 2 * k, true);
        wgmma_commit();
        wgmma_wait<1>();
    }
    wgmma_wait<0>();
    const int row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
    float* tile = y + int64_t(blockIdx.x * kWarpgroups + warpgroup) * kM * kN;
    UNROLL
    for (int i = 0; i < kN / 2; i++) {
        fence_register(sums[i]);
        tile[(row + i / 2 % 2 * 8) * kN + i / 4 * 8 + column + i % 2] = sums[i];
    }
}

KERNEL(peak_wgmma_f16, kThreads, 1)(float* y, const f16* a, const f16* b, int rounds) {
    follow_previous();
    peak_wgmma(y, a, b, rounds);
}
REGISTER_KERNEL(peak_wgmma_f16)
KERNEL(peak_wgmma_bf16, kThreads, 1)(float* y, const bf16* a, const bf16* b, int rounds) {
    follow_previous();
    peak_wgmma(y, a, b, rounds);
}
REGISTER_KERNEL(peak_wgmma_bf16)
