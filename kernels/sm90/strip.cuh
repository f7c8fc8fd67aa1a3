// strip.cuh: results on their way between the registers of a warp and global memory, by TMA through shared memory. A strip
// has boxes of 16 rows of kBoxChunks chunks (8 elements, 16 bytes), swizzled as TMA does it by the width of a row.
#pragma once
#include "common/hopper.cuh"
#include "common/wgmma.cuh"

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

// 16 x 16 results of a warp: two blocks of 8 columns, of each of which a lane has four, as wgmma leaves them. `place`: the
// lane's chunk of a box, in row lane % 16, column 8 (lane / 16).

// Adds what lies there; every lane has its part before a result takes the place.
template <class T>
DEVICE void add_from(float (&v)[2][4], const T* place) {
    uint32_t r[4];
    ldmatrix_x4(r, place);
    __syncwarp();
    UNROLL
    for (int k = 0; k < 4; k++) {
        const auto pair = *reinterpret_cast<const Pair<T>*>(&r[k]);
        v[k / 2][k % 2 * 2] += to_f32(pair.low);
        v[k / 2][k % 2 * 2 + 1] += to_f32(pair.high);
    }
}
template <class T>
DEVICE void put(T* place, const float (&v)[2][4]) {
    uint32_t packed[4];
    UNROLL
    for (int k = 0; k < 4; k++) packed[k] = pack2<T>(v[k / 2][k % 2 * 2], v[k / 2][k % 2 * 2 + 1]);
    stmatrix_x4(place, packed);
}
