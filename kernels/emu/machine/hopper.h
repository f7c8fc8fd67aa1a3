// Hopper's words (sm_90a): mbarrier, TMA in tile mode.
// Not modelled: TMA stores, im2col, clusters and multicast, element strides.
#pragma once
#include "emu.h"

#define GRID_CONST const

namespace emu {
// What cuTensorMapEncodeTiled writes into its 128 opaque bytes.
struct alignas(64) TensorMap {
    uint64_t base, dim[5], stride[5];  // strides in bytes
    uint32_t box[5], rank, element_bytes, swizzle;
};
void mbar_init(uint64_t* bar, uint32_t count, Loc loc);
void mbar_arrive(uint64_t* bar, uint32_t transaction_bytes, Loc loc);  // arrives once, expects so many bytes more
void mbar_wait(uint64_t* bar, uint32_t parity, Loc loc);
void tma_load(void* shared, const TensorMap* map, uint64_t* bar, const int* coordinates, int rank, Loc loc);
void fence_proxy_async(Loc loc);
}  // namespace emu

using TensorMap = emu::TensorMap;
static inline void mbar_init(uint64_t* bar, int count, EMU_LOC) { emu::mbar_init(bar, uint32_t(count), loc); }
static inline void mbar_fence_init() {}
static inline void mbar_arrive(uint64_t* bar, EMU_LOC) { emu::mbar_arrive(bar, 0, loc); }
static inline void mbar_arrive_expect_tx(uint64_t* bar, uint32_t bytes, EMU_LOC) { emu::mbar_arrive(bar, bytes, loc); }
static inline void mbar_wait(uint64_t* bar, uint32_t parity, EMU_LOC) { emu::mbar_wait(bar, parity, loc); }
static inline void tma_load_2d(void* shared, const TensorMap* map, uint64_t* bar, int c0, int c1, EMU_LOC) {
    const int coordinates[2] = {c0, c1};
    emu::tma_load(shared, map, bar, coordinates, 2, loc);
}
static inline void fence_proxy_async(EMU_LOC) { emu::fence_proxy_async(loc); }
