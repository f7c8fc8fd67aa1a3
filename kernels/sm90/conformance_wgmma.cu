// conformance_wgmma.cu: what the words of common/wgmma.cuh do, dumped as raw numbers, as kernels/conformance.cu does for those
// of common/device.cuh: tests/ops/conformance_wgmma.rs computes the same from NVIDIA's description, and compares on the
// emulated card and on a real one. All of `out` is written. Every launch is of one dimension.
#include "common/wgmma.cuh"

enum Form { kShared, kRegisters, kE4m3 };

struct Images {
    alignas(1024) uint4 a[1024];
    alignas(1024) uint4 b[4096];
};

// d [64, N] = c + a b where `accumulate`, with c[row, column] = row + column / 256, for e4m3 row alone; else a b. `a`, `b`:
// images of shared memory (16 and 64 KiB); a_bits, b_bits: their descriptors but for where the image lies; `registers`
// [128][4]. out [64, N]. Block 128, dynamic shared memory: Images.
template <class T, int N, int kTransposedB, Form form>
DEVICE void conformance_wgmma(float* out, const uint4* a, const uint4* b, const uint32_t* registers, uint64_t a_bits,
                              uint64_t b_bits, int accumulate) {
    SHARED_DYNAMIC(Images, s);
    const int thread = threadIdx.x;
    for (int i = thread; i < 1024; i += 128) s.a[i] = a[i];
    for (int i = thread; i < 4096; i += 128) s.b[i] = b[i];
    fence_proxy_async();
    __syncthreads();
    uint32_t held[4];
    for (int i = 0; i < 4; i++) held[i] = registers[thread * 4 + i];
    float d[N / 2];
    const int top = thread / 32 * 16 + thread % 32 / 4, left = thread % 4 * 2;
    UNROLL
    for (int i = 0; i < N / 2; i++) d[i] = (top + i / 2 % 2 * 8) + (form == kE4m3 ? 0.f : (i / 4 * 8 + left + i % 2) / 256.f);
    const uint64_t a_descriptor = a_bits + (smem_u32(s.a) >> 4), b_descriptor = b_bits + (smem_u32(s.b) >> 4);
    UNROLL
    for (int i = 0; i < N / 2; i++) fence_register(d[i]);  // or the compiler sets some of them after the fence
    wgmma_fence();
    if constexpr (form == kShared) {
        wgmma<T, N, kTransposedB>(d, a_descriptor, b_descriptor, accumulate);
    } else if constexpr (form == kRegisters) {
        wgmma_registers<T, N, kTransposedB>(d, held, b_descriptor, accumulate);
    } else {
        wgmma_e4m3<N>(d, a_descriptor, b_descriptor, accumulate);
    }
    wgmma_commit();
    wgmma_wait<0>();
    UNROLL
    for (int i = 0; i < N / 2; i++) out[(top + i / 2 % 2 * 8) * N + i / 4 * 8 + left + i % 2] = d[i];
}
#define WGMMA_ENTRY(name, T, n, transposed, form)                                                                            \
    KERNEL(name, 128, 1)(float* out, const uint4* a, const uint4* b, const uint32_t* registers, uint64_t a_bits,             \
                         uint64_t b_bits, int accumulate) {                                                                  \
        follow_previous();                                                                                                   \
        conformance_wgmma<T, n, transposed, form>(out, a, b, registers, a_bits, b_bits, accumulate);                         \
    }                                                                                                                        \
    REGISTER_KERNEL(name)
// Every width in both types; each way to name an operand in one of them, the types by turns.
#define WGMMA_ENTRIES(n, T, U)                                              \
    WGMMA_ENTRY(conformance_wgmma_bf16_##n, bf16, n, 0, kShared)            \
    WGMMA_ENTRY(conformance_wgmma_f16_##n, f16, n, 0, kShared)              \
    WGMMA_ENTRY(conformance_wgmma_trans_##n, T, n, 1, kShared)              \
    WGMMA_ENTRY(conformance_wgmma_registers_##n, U, n, 0, kRegisters)       \
    WGMMA_ENTRY(conformance_wgmma_registers_trans_##n, T, n, 1, kRegisters) \
    WGMMA_ENTRY(conformance_wgmma_e4m3_##n, bf16, n, 0, kE4m3)
WGMMA_ENTRIES(8, bf16, f16) WGMMA_ENTRIES(16, f16, bf16)
WGMMA_ENTRIES(24, bf16, f16) WGMMA_ENTRIES(32, f16, bf16)
WGMMA_ENTRIES(40, bf16, f16) WGMMA_ENTRIES(48, f16, bf16)
WGMMA_ENTRIES(56, bf16, f16) WGMMA_ENTRIES(64, f16, bf16)
WGMMA_ENTRIES(72, bf16, f16) WGMMA_ENTRIES(80, f16, bf16)
WGMMA_ENTRIES(88, bf16, f16) WGMMA_ENTRIES(96, f16, bf16)
WGMMA_ENTRIES(104, bf16, f16) WGMMA_ENTRIES(112, f16, bf16)
WGMMA_ENTRIES(120, bf16, f16) WGMMA_ENTRIES(128, f16, bf16)
WGMMA_ENTRIES(136, bf16, f16) WGMMA_ENTRIES(144, f16, bf16)
WGMMA_ENTRIES(152, bf16, f16) WGMMA_ENTRIES(160, f16, bf16)
WGMMA_ENTRIES(168, bf16, f16) WGMMA_ENTRIES(176, f16, bf16)
WGMMA_ENTRIES(184, bf16, f16) WGMMA_ENTRIES(192, f16, bf16)
WGMMA_ENTRIES(200, bf16, f16) WGMMA_ENTRIES(208, f16, bf16)
WGMMA_ENTRIES(216, bf16, f16) WGMMA_ENTRIES(224, f16, bf16)
WGMMA_ENTRIES(232, bf16, f16) WGMMA_ENTRIES(240, f16, bf16)
WGMMA_ENTRIES(248, bf16, f16) WGMMA_ENTRIES(256, f16, bf16)

// stmatrix of one, two, four matrices, plain, then transposed. Lane i's register j holds 2 * (j * 32 + i) and the next; it
// names row i * 5 % 32 of 32. out [2][3][32 rows][4], a row's other words 0xffffffff. Block 32.
KERNEL(conformance_stmatrix, 32, 1)(uint32_t* out) {
    follow_previous();
    SHARED_STATIC(uint4, rows, [32]);
    const uint32_t lane = threadIdx.x;
    uint32_t r[4];
    for (uint32_t j = 0; j < 4; j++) r[j] = 2 * (j * 32 + lane) | (2 * (j * 32 + lane) + 1) << 16;
    const uint32_t two[2] = {r[0], r[1]};
    void* row = &rows[lane * 5 % 32];
    for (int form = 0; form < 6; form++) {
        rows[lane] = make_uint4(~0u, ~0u, ~0u, ~0u);
        __syncwarp();
        if (form == 0) stmatrix_x1(row, r[0]);
        if (form == 1) stmatrix_x2(row, two);
        if (form == 2) stmatrix_x4(row, r);
        if (form == 3) stmatrix_x1_trans(row, r[0]);
        if (form == 4) stmatrix_x2_trans(row, two);
        if (form == 5) stmatrix_x4_trans(row, r);
        __syncwarp();
        const uint4 held = rows[lane];
        const uint32_t words[4] = {held.x, held.y, held.z, held.w};
        for (int i = 0; i < 4; i++) out[(form * 32 + int(lane)) * 4 + i] = words[i];
        __syncwarp();
    }
}
REGISTER_KERNEL(conformance_stmatrix)

// elect_one twice. out [2][64]: 1 where elected. Block 64.
KERNEL(conformance_elect, 64, 1)(uint32_t* out) {
    follow_previous();
    for (int i = 0; i < 2; i++) out[i * 64 + int(threadIdx.x)] = elect_one();
}
REGISTER_KERNEL(conformance_elect)

// One warpgroup leaves registers to two. out [grid][384]: the warpgroup. Block 384.
KERNEL(conformance_setmaxnreg, 384, 1)(uint32_t* out) {
    follow_previous();
    if (threadIdx.x < 128) {
        setmaxnreg_dec<40>();
        out[blockIdx.x * 384 + threadIdx.x] = 0;
    } else {
        setmaxnreg_inc<232>();
        out[blockIdx.x * 384 + threadIdx.x] = threadIdx.x / 128;
    }
}
REGISTER_KERNEL(conformance_setmaxnreg)
