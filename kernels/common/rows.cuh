// rows.cuh: rows of 16-bit elements between global memory and swizzled tiles in shared memory.
//
// A tile keeps a row as chunks of 8 elements (16 bytes), what ldmatrix and cp.async move; there are eight such places in
// the 128 bytes that shared memory serves at once. ldmatrix reads one chunk of 8 consecutive rows, so those must lie in 8
// different places: the chunk's number is XORed with bits of the row, as many as the row length leaves to be spread.
#pragma once
#include "common/device.cuh"

constexpr int kChunk = 8;  // elements

// Where chunk `chunk` of row `row` lies in a tile of rows of `kChunks` chunks, counted in chunks. `kChunks` is even.
template <int kChunks>
DEVICE int swizzled(int row, int chunk) {
    static_assert(kChunks % 2 == 0);
    // Rows 8 / kSpan apart start at the same place of the 128 bytes; kSpan of them are among 8.
    constexpr int kSpan = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : 2;
    return row * kChunks + (chunk ^ (row / (8 / kSpan) % kSpan));
}

// The first element of a chunk.
template <int kChunks, class T>
DEVICE T* chunk_at(T* tile, int row, int chunk) {
    return tile + swizzled<kChunks>(row, chunk) * kChunk;
}

// `count` rows of `width` elements, `stride` elements apart. `aligned`: `data`, `stride` and `width` are whole chunks.
template <class T>
struct Rows {
    T* data;
    int stride, count, width;
    bool aligned;
};

// Asynchronously (where aligned) loads rows first .. first + kRows into a tile; what lies outside is 0. By kThreads
// threads, of which this is number `thread`. The caller commits, waits and synchronises.
template <int kRows, int kChunks, int kThreads, class T>
DEVICE void load_rows(T* tile, const Rows<const T>& rows, int first, int thread) {
    const T* data = rows.data + int64_t(first) * rows.stride;
    const int left = rows.count - first;
    if (rows.aligned) {
        static_assert(kRows * kChunks % kThreads == 0);
        ROLLED  // unrolled, the places of every round would be kept in registers from tile to tile
        for (int i = 0; i < kRows * kChunks / kThreads; i++) {
            const int row = (i * kThreads + thread) / kChunks, chunk = (i * kThreads + thread) % kChunks;
            const bool inside = GUARD(row < left) && GUARD(chunk * kChunk < rows.width);
            cp_async_16(chunk_at<kChunks>(tile, row, chunk), data + row * rows.stride + chunk * kChunk, inside);
        }
    } else {
        for (int i = thread; i < kRows * kChunks * kChunk; i += kThreads) {
            const int row = i / (kChunks * kChunk), column = i % (kChunks * kChunk);
            const bool inside = GUARD(row < left) && GUARD(column < rows.width);
            chunk_at<kChunks>(tile, row, column / kChunk)[column % kChunk] =
                inside ? data[row * rows.stride + column] : from_f32<T>(0.f);
        }
    }
}

// Stores a tile to rows first .. first + kRows, as far as they are inside.
template <int kRows, int kChunks, int kThreads, class T>
DEVICE void store_rows(const Rows<T>& rows, int first, T* tile, int thread) {
    T* data = rows.data + int64_t(first) * rows.stride;
    const int left = rows.count - first;
    if (rows.aligned) {
        UNROLL
        for (int i = 0; i < kRows * kChunks / kThreads; i++) {
            const int row = (i * kThreads + thread) / kChunks, chunk = (i * kThreads + thread) % kChunks;
            if (GUARD(row < left) && GUARD(chunk * kChunk < rows.width)) {
                *reinterpret_cast<uint4*>(data + row * rows.stride + chunk * kChunk) =
                    *reinterpret_cast<const uint4*>(chunk_at<kChunks>(tile, row, chunk));
            }
        }
    } else {
        for (int i = thread; i < kRows * kChunks * kChunk; i += kThreads) {
            const int row = i / (kChunks * kChunk), column = i % (kChunks * kChunk);
            if (GUARD(row < left) && GUARD(column < rows.width)) {
                data[row * rows.stride + column] = chunk_at<kChunks>(tile, row, column / kChunk)[column % kChunk];
            }
        }
    }
}
