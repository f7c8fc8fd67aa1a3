// Hopper's words (sm_90a): mbarrier, TMA, clusters.
// Not modelled: of TMA reductions, interleaved maps, element strides in tile mode.
#pragma once
#include "emu.h"

namespace emu {
// What the encoders below write into the driver's 128 opaque bytes.
struct alignas(64) TensorMap {
    uint64_t base, dim[5], stride[4];  // strides of dimensions 1 and up, in bytes
    uint16_t box[5], pixels;           // im2col: channels and pixels of a box
    int16_t lower[3], upper[3];        // im2col: corners of dimensions 1 and up
    uint8_t step[5];                   // element strides; 1 in tile mode
    uint8_t rank, element_bytes, swizzle, im2col;
};
void mbar_init(uint64_t* bar, uint32_t count, Loc loc);
void mbar_arrive(uint64_t* bar, uint32_t count, uint32_t transaction_bytes, Loc loc);  // expects so many bytes more
void mbar_expect(uint64_t* bar, uint32_t bytes, Loc loc);
void mbar_wait(uint64_t* bar, uint32_t parity, Loc loc);
bool mbar_try(uint64_t* bar, uint32_t parity, Loc loc);
// In im2col mode with the offsets of the spatial dimensions, else null.
void tma_load(void* shared, const TensorMap* map, uint64_t* bar, const int* coordinates, int rank,
              const uint16_t* im2col_offset, Loc loc);
void tma_prefetch(const TensorMap* map, const int* coordinates, int rank, Loc loc);
void tma_load_multicast(void* shared, const TensorMap* map, uint64_t* bar, const int* coordinates, int rank, uint16_t mask,
                        Loc loc);
void tma_store(const TensorMap* map, const void* shared, const int* coordinates, int rank, Loc loc);
void bulk_commit(Loc loc);
void bulk_wait(int pending, bool reads_only, Loc loc);
void fence_proxy_async_global(Loc loc);
// Clusters. An address of the cluster: the block's rank + 1 from bit 24 on, then as the block itself has it.
uint32_t cluster_rank();
uint32_t cluster_size();
void cluster_arrive(Loc loc);
void cluster_wait(Loc loc);
uint32_t cluster_address(const void* shared, int rank, Loc loc);
void cluster_load(void* to, uint32_t address, size_t bytes, Loc loc);
void cluster_store(uint32_t address, const void* from, size_t bytes, Loc loc);
void cluster_store_async(uint32_t address, const void* from, size_t bytes, uint32_t bar, Loc loc);
void mbar_arrive_cluster(uint64_t* bar, int rank, Loc loc);
void mbar_expect_cluster(uint64_t* bar, int rank, uint32_t bytes, Loc loc);
void fence_proxy_async(Loc loc);
}  // namespace emu

using TensorMap = emu::TensorMap;
static inline void mbar_init(uint64_t* bar, int count, EMU_LOC) { emu::mbar_init(bar, uint32_t(count), loc); }
static inline void mbar_fence_init() {}
static inline void mbar_arrive(uint64_t* bar, EMU_LOC) { emu::mbar_arrive(bar, 1, 0, loc); }
static inline void mbar_arrive_count(uint64_t* bar, int count, EMU_LOC) { emu::mbar_arrive(bar, uint32_t(count), 0, loc); }
static inline void mbar_arrive_expect_tx(uint64_t* bar, uint32_t bytes, EMU_LOC) { emu::mbar_arrive(bar, 1, bytes, loc); }
static inline void mbar_expect(uint64_t* bar, uint32_t bytes, EMU_LOC) { emu::mbar_expect(bar, bytes, loc); }
static inline void mbar_wait(uint64_t* bar, uint32_t parity, EMU_LOC) { emu::mbar_wait(bar, parity, loc); }
static inline bool mbar_try(uint64_t* bar, uint32_t parity, EMU_LOC) { return emu::mbar_try(bar, parity, loc); }
static inline void tma_prefetch_map(const TensorMap*) {}
static inline void tma_prefetch_2d(const TensorMap* map, int c0, int c1, EMU_LOC) {
    const int at[2] = {c0, c1};
    emu::tma_prefetch(map, at, 2, loc);
}
static inline void tma_load_1d(void* shared, const TensorMap* map, uint64_t* bar, int c0, EMU_LOC) {
    const int at[1] = {c0};
    emu::tma_load(shared, map, bar, at, 1, nullptr, loc);
}
static inline void tma_load_2d(void* shared, const TensorMap* map, uint64_t* bar, int c0, int c1, EMU_LOC) {
    const int at[2] = {c0, c1};
    emu::tma_load(shared, map, bar, at, 2, nullptr, loc);
}
static inline void tma_load_3d(void* shared, const TensorMap* map, uint64_t* bar, int c0, int c1, int c2, EMU_LOC) {
    const int at[3] = {c0, c1, c2};
    emu::tma_load(shared, map, bar, at, 3, nullptr, loc);
}
static inline void tma_load_4d(void* shared, const TensorMap* map, uint64_t* bar, int c0, int c1, int c2, int c3, EMU_LOC) {
    const int at[4] = {c0, c1, c2, c3};
    emu::tma_load(shared, map, bar, at, 4, nullptr, loc);
}
static inline void tma_load_5d(void* shared, const TensorMap* map, uint64_t* bar, int c0, int c1, int c2, int c3, int c4, EMU_LOC) {
    const int at[5] = {c0, c1, c2, c3, c4};
    emu::tma_load(shared, map, bar, at, 5, nullptr, loc);
}
static inline void tma_load_im2col_4d(void* shared, const TensorMap* map, uint64_t* bar, int c, int w, int h, int n,
                                      uint16_t offset_w, uint16_t offset_h, EMU_LOC) {
    const int at[4] = {c, w, h, n};
    const uint16_t offset[2] = {offset_w, offset_h};
    emu::tma_load(shared, map, bar, at, 4, offset, loc);
}
static inline void tma_store_2d(const TensorMap* map, const void* shared, int c0, int c1, EMU_LOC) {
    const int at[2] = {c0, c1};
    emu::tma_store(map, shared, at, 2, loc);
}
static inline void tma_store_3d(const TensorMap* map, const void* shared, int c0, int c1, int c2, EMU_LOC) {
    const int at[3] = {c0, c1, c2};
    emu::tma_store(map, shared, at, 3, loc);
}
static inline void tma_store_4d(const TensorMap* map, const void* shared, int c0, int c1, int c2, int c3, EMU_LOC) {
    const int at[4] = {c0, c1, c2, c3};
    emu::tma_store(map, shared, at, 4, loc);
}
static inline void tma_store_5d(const TensorMap* map, const void* shared, int c0, int c1, int c2, int c3, int c4, EMU_LOC) {
    const int at[5] = {c0, c1, c2, c3, c4};
    emu::tma_store(map, shared, at, 5, loc);
}
static inline void bulk_commit(EMU_LOC) { emu::bulk_commit(loc); }
template <int N>
static inline void bulk_wait_read(EMU_LOC) {
    emu::bulk_wait(N, true, loc);
}
template <int N>
static inline void bulk_wait(EMU_LOC) {
    emu::bulk_wait(N, false, loc);
}
static inline void tma_load_multicast_2d(void* shared, const TensorMap* map, uint64_t* bar, int c0, int c1, uint16_t mask,
                                         EMU_LOC) {
    const int at[2] = {c0, c1};
    emu::tma_load_multicast(shared, map, bar, at, 2, mask, loc);
}
static inline int cluster_rank() { return int(emu::cluster_rank()); }
static inline int cluster_size() { return int(emu::cluster_size()); }
static inline void cluster_arrive(EMU_LOC) { emu::cluster_arrive(loc); }
static inline void cluster_wait(EMU_LOC) { emu::cluster_wait(loc); }
static inline void cluster_sync(EMU_LOC) {
    emu::cluster_arrive(loc);
    emu::cluster_wait(loc);
}
static inline uint32_t cluster_address(const void* shared, int rank, EMU_LOC) { return emu::cluster_address(shared, rank, loc); }
static inline float cluster_load_f32(uint32_t address, EMU_LOC) {
    float x;
    emu::cluster_load(&x, address, 4, loc);
    return x;
}
static inline float4 cluster_load_f32x4(uint32_t address, EMU_LOC) {
    float4 x;
    emu::cluster_load(&x, address, 16, loc);
    return x;
}
static inline void cluster_store_f32(uint32_t address, float x, EMU_LOC) { emu::cluster_store(address, &x, 4, loc); }
static inline void cluster_store_f32x4(uint32_t address, float4 x, EMU_LOC) { emu::cluster_store(address, &x, 16, loc); }
static inline void cluster_store_async_f32(uint32_t address, float x, uint32_t bar, EMU_LOC) {
    emu::cluster_store_async(address, &x, 4, bar, loc);
}
static inline void cluster_store_async_f32x4(uint32_t address, float4 x, uint32_t bar, EMU_LOC) {
    emu::cluster_store_async(address, &x, 16, bar, loc);
}
static inline void mbar_arrive_cluster(uint64_t* bar, int rank, EMU_LOC) { emu::mbar_arrive_cluster(bar, rank, loc); }
static inline void mbar_arrive_release_cluster(uint64_t* bar, int rank, EMU_LOC) { emu::mbar_arrive_cluster(bar, rank, loc); }
static inline void mbar_expect_cluster(uint64_t* bar, int rank, uint32_t bytes, EMU_LOC) {
    emu::mbar_expect_cluster(bar, rank, bytes, loc);
}
static inline void mbar_wait_cluster(uint64_t* bar, uint32_t parity, EMU_LOC) { emu::mbar_wait(bar, parity, loc); }
static inline uint32_t atom_add_acq_rel(uint32_t* p, uint32_t x, EMU_LOC) { return emu::add_acq_rel(p, x, loc); }
static inline uint32_t ld_acquire(const uint32_t* p, EMU_LOC) { return emu::load_acquire(p, loc); }
static inline void st_release(uint32_t* p, uint32_t x, EMU_LOC) { emu::store_release(p, x, loc); }
static inline void fence_proxy_async_global(EMU_LOC) { emu::fence_proxy_async_global(loc); }
static inline void fence_proxy_async(EMU_LOC) { emu::fence_proxy_async(loc); }
