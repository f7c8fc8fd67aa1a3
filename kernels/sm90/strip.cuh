// strip.cuh: results on their way between the registers of a warp and global memory, by TMA through shared memory. A strip
// has boxes of 16 rows of kBoxChunks chunks (8 elements, 16 bytes), swizzled as TMA does it by the width of a row.
#pragma once
#include "common/hopper.cuh"

// Where chunk `chunk` of row `row` lies in a box: TMA's swizzle of 128, 64 or 32 bytes.
template <class Strip>
DEVICE typename Strip::T* chunk_of(typename Strip::Box& box, int row, int chunk) {
    constexpr int kRows = 8 / Strip::kBoxChunks;  // in 128 bytes
    return box.values + (row * Strip::kBoxChunks + (chunk ^ (row / kRows % Strip::kBoxChunks))) * 8;
}

// Two neighbours of a row, as the operands have them.
template <class T>
struct alignas(4) Pair {
    T low, high;
};
