// Hopper's words (sm_90a), beside common/device.cuh: mbarrier, TMA in tile mode; products are in common/wgmma.cuh. As there:
// PTX instructions under nvcc, plain C++ on the emulated card. For sm_80 a kernel that uses wgmma compiles to an empty body:
// put it under #ifdef HOPPER_BODY.
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
#endif
