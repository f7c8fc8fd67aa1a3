// Hopper's words (sm_90a), beside common/device.cuh: mbarrier, TMA, clusters; products are in common/wgmma.cuh. As there: PTX
// instructions under nvcc, plain C++ on the emulated card. For kernels/sm90, which is compiled for no other card.
#pragma once
#include "common/device.cuh"
#ifndef __CUDACC__
#include "emu/machine/hopper.h"
#else
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "common/hopper.cuh is for the kernels of kernels/sm90, which are compiled for sm_90a alone"
#endif
// What cuTensorMapEncodeTiled and cuTensorMapEncodeIm2col fill; a parameter: GRID_CONST TensorMap map.
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
// `count` arrivals at once.
DEVICE void mbar_arrive_count(uint64_t* bar, int count) {
    asm volatile("{.reg .b64 t; mbarrier.arrive.shared::cta.b64 t, [%0], %1;}" ::"r"(smem_u32(bar)), "r"(count) : "memory");
}
// The phase ends only when so many bytes more have come, too.
DEVICE void mbar_arrive_expect_tx(uint64_t* bar, uint32_t bytes) {
    asm volatile("{.reg .b64 t; mbarrier.arrive.expect_tx.shared::cta.b64 t, [%0], %1;}" ::"r"(smem_u32(bar)), "r"(bytes)
                 : "memory");
}
// The same without an arrival.
DEVICE void mbar_expect(uint64_t* bar, uint32_t bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(smem_u32(bar)), "r"(bytes) : "memory");
}
// Whether the phase of this parity has ended; does not wait.
DEVICE bool mbar_try(uint64_t* bar, uint32_t parity) {
    uint32_t ended;
    asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(ended)
                 : "r"(smem_u32(bar)), "r"(parity)
                 : "memory");
    return ended;
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

// ---- TMA: boxes between global and shared memory, through a tensor map ----
//
// In shared memory, aligned to 128 bytes, a box lies with its first dimension in rows; with a swizzle of 32, 64 or 128 bytes
// a row takes that many bytes, however narrow the box, and its 16-byte chunks are exchanged by address bits 7 and up. What
// lies outside the tensor is loaded as zeros, and is not stored.

// Fetches the map itself ahead of its first use.
DEVICE void tma_prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
// Fetches a box into the L2 cache. What a later load sees is what is in memory then, so this may come before
// wait_for_previous whoever writes the tensor.
DEVICE void tma_prefetch_2d(const TensorMap* map, int c0, int c1) {
    asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];" ::"l"(map), "r"(c0), "r"(c1) : "memory");
}

// The box whose first element is c0 (innermost), c1 ..; all its bytes, zeros too, count as transactions of `bar`.
DEVICE void tma_load_1d(void* shared, const TensorMap* map, uint64_t* bar, int c0) {
    asm volatile(
        "cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3}], [%2];" ::
            "r"(smem_u32(shared)), "l"(map), "r"(smem_u32(bar)), "r"(c0)
        : "memory");
}
DEVICE void tma_load_2d(void* shared, const TensorMap* map, uint64_t* bar, int c0, int c1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
            "r"(smem_u32(shared)), "l"(map), "r"(smem_u32(bar)), "r"(c0), "r"(c1)
        : "memory");
}
DEVICE void tma_load_3d(void* shared, const TensorMap* map, uint64_t* bar, int c0, int c1, int c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
            "r"(smem_u32(shared)), "l"(map), "r"(smem_u32(bar)), "r"(c0), "r"(c1), "r"(c2)
        : "memory");
}
DEVICE void tma_load_4d(void* shared, const TensorMap* map, uint64_t* bar, int c0, int c1, int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::
            "r"(smem_u32(shared)), "l"(map), "r"(smem_u32(bar)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}
DEVICE void tma_load_5d(void* shared, const TensorMap* map, uint64_t* bar, int c0, int c1, int c2, int c3, int c4) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::
            "r"(smem_u32(shared)), "l"(map), "r"(smem_u32(bar)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
        : "memory");
}
// A map in im2col mode: pixels in order from (w, h, n) on, within the map's corners and by its steps, each read offset_w,
// offset_h further on.
DEVICE void tma_load_im2col_4d(void* shared, const TensorMap* map, uint64_t* bar, int c, int w, int h, int n,
                               uint16_t offset_w, uint16_t offset_h) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
        "[%2], {%7, %8};" ::"r"(smem_u32(shared)),
        "l"(map), "r"(smem_u32(bar)), "r"(c), "r"(w), "r"(h), "r"(n), "h"(offset_w), "h"(offset_h)
        : "memory");
}

// Stores belong to the next group that their thread commits. Ordinary writes of what is stored: each writer's
// fence_proxy_async, then a barrier, then the store.
DEVICE void tma_store_2d(const TensorMap* map, const void* shared, int c0, int c1) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
                 "r"(smem_u32(shared)), "r"(c0), "r"(c1)
                 : "memory");
}
DEVICE void tma_store_3d(const TensorMap* map, const void* shared, int c0, int c1, int c2) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
                 "r"(smem_u32(shared)), "r"(c0), "r"(c1), "r"(c2)
                 : "memory");
}
DEVICE void tma_store_4d(const TensorMap* map, const void* shared, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
                 "r"(smem_u32(shared)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
                 : "memory");
}
DEVICE void tma_store_5d(const TensorMap* map, const void* shared, int c0, int c1, int c2, int c3, int c4) {
    asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
                 "r"(smem_u32(shared)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
                 : "memory");
}
DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until all but at most N of this thread's latest groups have read their shared memory; before it is written again, and
// before the thread leaves the kernel.
template <int N>
DEVICE void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
// Until they have written global memory, too. The end of the kernel is enough for the next one.
template <int N>
DEVICE void bulk_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}

// Between ordinary writes to shared memory and their reading by TMA or wgmma, by the thread that wrote.
DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The same for global memory.
DEVICE void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// ---- clusters: up to eight blocks that run at one time; the launch says how many ----
//
// A block reaches another's shared memory only after a cluster_sync, for it may not have begun, and before one, for it may
// end: the last thing that such a kernel does is a cluster_sync, too.

DEVICE int cluster_rank() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
DEVICE int cluster_size() {
    int size;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}
// A barrier of all threads of the cluster in two parts; orders their ordinary accesses, too.
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
DEVICE void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}

// Where another block has what this one has at `shared`.
DEVICE uint32_t cluster_address(const void* shared, int rank) {
    uint32_t address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(smem_u32(shared)), "r"(rank));
    return address;
}
DEVICE float cluster_load_f32(uint32_t address) {
    float x;
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
    return x;
}
DEVICE float4 cluster_load_f32x4(uint32_t address) {
    float4 x;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(address)
                 : "memory");
    return x;
}
DEVICE void cluster_store_f32(uint32_t address, float x) {
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}
DEVICE void cluster_store_f32x4(uint32_t address, float4 x) {
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
                 : "memory");
}
// Its bytes count as transactions of the mbarrier `bar`, an address of the cluster too, in the same block.
DEVICE void cluster_store_async_f32(uint32_t address, float x, uint32_t bar) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(address), "f"(x), "r"(bar)
                 : "memory");
}
DEVICE void cluster_store_async_f32x4(uint32_t address, float4 x, uint32_t bar) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
                 "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(bar)
                 : "memory");
}

// At the mbarrier that another block has where this one has `bar`. Enough to hand back a buffer that was read; it releases
// no ordinary writes beyond the block, which would cost a MEMBAR of the whole card.
DEVICE void mbar_arrive_cluster(uint64_t* bar, int rank) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(cluster_address(bar, rank)) : "memory");
}
// With this one that other block sees them, after mbar_wait_cluster.
DEVICE void mbar_arrive_release_cluster(uint64_t* bar, int rank) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(cluster_address(bar, rank)) : "memory");
}
DEVICE void mbar_expect_cluster(uint64_t* bar, int rank, uint32_t bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cluster.shared::cluster.b64 [%0], %1;" ::"r"(cluster_address(bar, rank)), "r"(bytes)
                 : "memory");
}
DEVICE void mbar_wait_cluster(uint64_t* bar, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "WAIT_%=:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n"
        "@p bra DONE_%=;\n"
        "bra WAIT_%=;\n"
        "DONE_%=:\n"
        "}" ::"r"(smem_u32(bar)),
        "r"(parity)
        : "memory");
}
// The box to the same place in each block whose bit is set in `mask`, for the mbarrier that each has at `bar`.
DEVICE void tma_load_multicast_2d(void* shared, const TensorMap* map, uint64_t* bar, int c0, int c1, uint16_t mask) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4}], "
        "[%2], %5;" ::"r"(smem_u32(shared)),
        "l"(map), "r"(smem_u32(bar)), "r"(c0), "r"(c1), "h"(mask)
        : "memory");
}

// ---- between blocks of a grid: what was written before a release is seen after the acquire that meets it ----

DEVICE uint32_t atom_add_acq_rel(uint32_t* p, uint32_t x) {
    uint32_t old;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(x) : "memory");
    return old;
}
DEVICE uint32_t ld_acquire(const uint32_t* p) {
    uint32_t x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}
DEVICE void st_release(uint32_t* p, uint32_t x) { asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory"); }
#endif
