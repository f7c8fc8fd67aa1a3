// Hopper's words (sm_90a): mbarrier, TMA in tile mode, wgmma with both operands in shared memory.
// Not modelled: wgmma operands from registers, TMA stores, im2col, clusters and multicast, element strides.
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
// m64 n k16; `a`, `b`: descriptors; b_rows_are_k: B is MN-major.
void wgmma(float* d, int n, uint64_t a, uint64_t b, bool accumulate, bool is_bf16, bool b_transposed, Loc loc);
void wgmma_fence(Loc loc);
void wgmma_commit(Loc loc);
void wgmma_wait(int pending, Loc loc);
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
static inline void wgmma_fence(EMU_LOC) { emu::wgmma_fence(loc); }
static inline void wgmma_commit(EMU_LOC) { emu::wgmma_commit(loc); }
template <int N>
static inline void wgmma_wait(EMU_LOC) {
    emu::wgmma_wait(N, loc);
}
template <class T, int Transposed = 0>
static inline void wgmma_m64n64k16(float (&d)[32], uint64_t a, uint64_t b, bool accumulate, EMU_LOC) {
    emu::wgmma(d, 64, a, b, accumulate, std::is_same_v<T, bf16>, Transposed, loc);
}
template <class T, int Transposed = 0>
static inline void wgmma_m64n128k16(float (&d)[64], uint64_t a, uint64_t b, bool accumulate, EMU_LOC) {
    emu::wgmma(d, 128, a, b, accumulate, std::is_same_v<T, bf16>, Transposed, loc);
}
template <int N>
static inline void setmaxnreg_inc() {}
template <int N>
static inline void setmaxnreg_dec() {}
// Descriptor of a matrix in shared memory with the 128-byte swizzle; the offsets in bytes.
static inline uint64_t wgmma_desc128(uint32_t address, uint32_t leading_offset, uint32_t stride_offset) {
    return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(leading_offset >> 4) << 16 | uint64_t(stride_offset >> 4) << 32 |
           uint64_t(1) << 62;
}
