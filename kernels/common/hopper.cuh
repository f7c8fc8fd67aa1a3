// Hopper's words (sm_90a), beside common/device.cuh: mbarrier, TMA in tile mode, wgmma with both operands in shared memory.
// As there: PTX instructions under nvcc, plain C++ on the emulated card. For sm_80 a kernel that uses wgmma compiles to an
// empty body: put it under #ifdef HOPPER_BODY.
#pragma once
#include "common/device.cuh"
#ifndef __CUDACC__
#include "emu/machine/hopper.h"
#define HOPPER_BODY
#else
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define HOPPER_BODY
#endif
#define GRID_CONST const __grid_constant__

// What cuTensorMapEncodeTiled fills; a parameter: GRID_CONST TensorMap map.
struct alignas(64) TensorMap {
    char opaque[128];
};

DEVICE void mbar_init(uint64_t* bar, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_u32(bar)), "r"(count) : "memory");
}
// After mbar_init, before a barrier that lets others see it.
DEVICE void mbar_fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void mbar_arrive(uint64_t* bar) {
    asm volatile("{.reg .b64 t; mbarrier.arrive.shared::cta.b64 t, [%0];}" ::"r"(smem_u32(bar)) : "memory");
}
DEVICE void mbar_arrive_expect_tx(uint64_t* bar, uint32_t bytes) {
    asm volatile("{.reg .b64 t; mbarrier.arrive.expect_tx.shared::cta.b64 t, [%0], %1;}" ::"r"(smem_u32(bar)), "r"(bytes)
                 : "memory");
}
// Until the phase of this parity has ended.
DEVICE void mbar_wait(uint64_t* bar, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "WAIT_%=:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@p bra DONE_%=;\n"
        "bra WAIT_%=;\n"
        "DONE_%=:\n"
        "}" ::"r"(smem_u32(bar)),
        "r"(parity)
        : "memory");
}

// The box of `map` at column c0, row c1; its bytes count as transactions of `bar`. `shared` aligned to 128.
DEVICE void tma_load_2d(void* shared, const TensorMap* map, uint64_t* bar, int c0, int c1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            smem_u32(shared)),
        "l"(map), "r"(smem_u32(bar)), "r"(c0), "r"(c1)
        : "memory");
}

// Plain writes to shared memory, before wgmma reads them.
DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Descriptor of a matrix in shared memory with the 128-byte swizzle; the offsets in bytes.
DEVICE uint64_t wgmma_desc128(uint32_t address, uint32_t leading_offset, uint32_t stride_offset) {
    return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(leading_offset >> 4) << 16 | uint64_t(stride_offset >> 4) << 32 |
           uint64_t(1) << 62;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most N of the warpgroup's latest groups are under way.
template <int N>
DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
template <int N>
DEVICE void setmaxnreg_inc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
DEVICE void setmaxnreg_dec() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// d = a b, or += where `accumulate`: a 64 x 16, b 16 x n by descriptors, d in f32. Transposed: b has rows of n.
#define EIGHT(d, i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define WGMMA_64(type)                                                                                                \
    asm volatile(                                                                                                     \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type         \
        " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28," \
        "%29,%30,%31}, %32, %33, p, 1, 1, 0, %35;\n}"                                                                 \
        : EIGHT(d, 0), EIGHT(d, 8), EIGHT(d, 16), EIGHT(d, 24)                                                        \
        : "l"(a), "l"(b), "r"(int(accumulate)), "n"(Transposed))
#define WGMMA_128(type)                                                                                               \
    asm volatile(                                                                                                     \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type        \
        " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28," \
        "%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55," \
        "%56,%57,%58,%59,%60,%61,%62,%63}, %64, %65, p, 1, 1, 0, %67;\n}"                                             \
        : EIGHT(d, 0), EIGHT(d, 8), EIGHT(d, 16), EIGHT(d, 24), EIGHT(d, 32), EIGHT(d, 40), EIGHT(d, 48), EIGHT(d, 56) \
        : "l"(a), "l"(b), "r"(int(accumulate)), "n"(Transposed))
template <class T, int Transposed = 0>
DEVICE void wgmma_m64n64k16(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
    if constexpr (same_type<T, bf16>) {
        WGMMA_64("bf16");
    } else {
        static_assert(same_type<T, f16>);
        WGMMA_64("f16");
    }
}
template <class T, int Transposed = 0>
DEVICE void wgmma_m64n128k16(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
    if constexpr (same_type<T, bf16>) {
        WGMMA_128("bf16");
    } else {
        static_assert(same_type<T, f16>);
        WGMMA_128("f16");
    }
}
#undef EIGHT
#undef WGMMA_64
#undef WGMMA_128
#endif
#endif
