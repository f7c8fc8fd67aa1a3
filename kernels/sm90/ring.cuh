// ring.cuh: where a thread is in a ring of stages, and descriptors of what TMA laid down in rows of 128 swizzled bytes.
#pragma once
#include "common/wgmma.cuh"

// Where in the ring a warp is.
template <class Tile>
struct RingPosition {
    int stage;
    uint32_t parity;
};
template <class Tile>
DEVICE RingPosition<Tile> ring_position(int slices_before) {
    return {slices_before % Tile::kStages, uint32_t(slices_before / Tile::kStages & 1)};
}
template <class Tile>
DEVICE void advance(RingPosition<Tile>& at) {
    if (++at.stage == Tile::kStages) {
        at.stage = 0;
        at.parity ^= 1;
    }
}

// Descriptors of rows of 128 swizzled bytes, 8 rows each `kStride` bytes: the low word has the address and is all that
// changes, so that it alone takes a register. 16 of k further is 2 more, 64 rows of 1024 bytes each 8 are 512.
DEVICE uint32_t descriptor_low(const void* rows) { return uint32_t(wgmma_desc128(smem_u32(rows), 16, 0)); }
template <int kStride = 1024>
DEVICE uint64_t descriptor(uint32_t low) {
    return uint64_t(wgmma_desc128(0, 16, kStride) >> 32) << 32 | low;
}
constexpr int kDescriptorUnit = 16;  // bytes
