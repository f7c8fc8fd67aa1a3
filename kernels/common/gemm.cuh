// gemm.cuh: the matrix product that linear and conv2d share: C[M, N] = A[M, K] B[N, K]^T, sums in f32.
//
// A block makes a tile of kM x kN sums. A slice of A and of B, 64 bytes of k a row (32 f16 or bf16, 16 f32), waits in
// each slot of a ring of kStages; one barrier a slice. 16-bit types multiply on the tensor cores (mma.sync m16n8k16), f32
// on the FMA units (never TF32). Where A's rows are in memory is the caller's: DenseRows here, ConvRows in conv2d.cu.
//
// Two ways into shared memory, chosen by the host (src/ops/cuda/tiles.rs):
//   async    every 16-byte chunk of a row is aligned and whole: cp.async, kStages - 1 slices ahead
//   general  any alignment, any K: through registers
//
// An element's sum runs over k in ascending order, 16 at a time (mma) or one at a time (FMA), whatever the tile: every
// variant gives the same bits, and a row's sums do not depend on the other rows. Zeros beyond K change no sum.
#pragma once
#include "device.cuh"

// 16 bytes: what one thread moves at once.
template <class T>
struct alignas(16) Chunk {
    static constexpr int kCount = 16 / sizeof(T);
    T v[kCount];
};

constexpr int kRowChunks = 4;  // of a row of a slice: 64 bytes

// Place of a row's chunk in a slice. Two rows share the 128 bytes that the banks serve at once; with the chunk's number
// xor-ed by the pair's, eight rows at one chunk (an ldmatrix) lie in eight different places.
DEVICE int chunk_place(int row, int chunk) { return row * kRowChunks + (chunk ^ ((row >> 1) & (kRowChunks - 1))); }

// The shape of a block's work. A warp makes (kM / kWarpsM) x (kN / kWarpsN) sums.
template <class T_, int kM_, int kN_, int kWarpsM_, int kWarpsN_, int kStages_, bool kGeneral_>
struct Tile {
    using T = T_;
    static constexpr int kM = kM_, kN = kN_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kStages = kStages_;
    static constexpr bool kGeneral = kGeneral_;
    static constexpr int kWarps = kWarpsM * kWarpsN, kThreads = 32 * kWarps;
    static constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;
    static constexpr int kChunkValues = Chunk<T>::kCount, kSlice = kRowChunks * kChunkValues;
    // Threads 0..3 take the chunks of a slice's row 0, 4..7 of row 1, ...; then again kRowStep rows further down.
    static constexpr int kRowStep = kThreads / kRowChunks;
    static constexpr int kRowsA = kM / kRowStep, kRowsB = kN / kRowStep;  // a thread's
    // Sums on their way out: 16 rows a warp; 4 more columns shift the banks from row to row.
    static constexpr int kPitch = kWarpN + 4;
    static_assert(kM % kRowStep == 0 && kN % kRowStep == 0, "every thread moves the same number of chunks");
    static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0);
    static_assert(kStages >= 2);

    struct Slices {
        Chunk<T> a[kM * kRowChunks];
        Chunk<T> b[kN * kRowChunks];
    };
    union Shared {
        Slices ring[kStages];
        float rows[kWarps][16][kPitch];
    };
};

// ---- rows of a matrix, dense ----

// What a thread loads of rows [row, row + kRowStep, ...) of x[rows, K]: its chunk of each slice, slice by slice.
template <class T>
struct DenseRows {
    const T* x;      // its first row, at its chunk of the next slice
    int64_t stride;  // elements from one of its rows to its next
    int rows;        // rows of the matrix from its first row on
    int k;           // values of K from its chunk of the next slice on
    bool wide;       // general only: chunks are whole and aligned
};

template <class Tile>
DEVICE DenseRows<typename Tile::T> dense_rows(const typename Tile::T* x, int first_row, int rows, int k, int first_k,
                                              bool wide) {
    const int row = first_row + threadIdx.x / kRowChunks;
    first_k += threadIdx.x % kRowChunks * Tile::kChunkValues;
    return {x + int64_t(row) * k + first_k, int64_t(Tile::kRowStep) * k, rows - row, k - first_k, wide};
}

// Place of the thread's i-th row in a slice.
template <class Tile>
DEVICE int own_place(int i) {
    return chunk_place(threadIdx.x / kRowChunks + i * Tile::kRowStep, threadIdx.x % kRowChunks);
}

template <class Tile, int kRows>
DEVICE void copy_async(DenseRows<typename Tile::T>& from, Chunk<typename Tile::T>* slice) {
    UNROLL
    for (int i = 0; i < kRows; i++) {
        const bool inside = GUARD(i * Tile::kRowStep < from.rows) && GUARD(from.k > 0);
        cp_async_16(&slice[own_place<Tile>(i)], from.x + i * from.stride, inside);
    }
    from.x += Tile::kSlice;
    from.k -= Tile::kSlice;
}

template <class Tile, int kRows>
DEVICE void load_wide(DenseRows<typename Tile::T>& from, Chunk<typename Tile::T> (&to)[kRows]) {
    using T = typename Tile::T;
    UNROLL
    for (int i = 0; i < kRows; i++) {
        to[i] = Chunk<T>{};
        if (GUARD(i * Tile::kRowStep < from.rows) && GUARD(from.k > 0)) {
            to[i] = *reinterpret_cast<const Chunk<T>*>(from.x + i * from.stride);
        }
    }
    from.x += Tile::kSlice;
    from.k -= Tile::kSlice;
}

// Value by value, straight into the slice.
template <class Tile, int kRows>
DEVICE void fill(DenseRows<typename Tile::T>& from, Chunk<typename Tile::T>* slice) {
    using T = typename Tile::T;
    for (int i = 0; i < kRows; i++) {
        Chunk<T>& to = slice[own_place<Tile>(i)];
        for (int e = 0; e < Tile::kChunkValues; e++) {
            const bool inside = GUARD(i * Tile::kRowStep < from.rows) && GUARD(e < from.k);
            to.v[e] = inside ? from.x[i * from.stride + e] : from_f32<T>(0.0f);
        }
    }
    from.x += Tile::kSlice;
    from.k -= Tile::kSlice;
}

template <class Tile, int kRows>
DEVICE void store_chunks(const Chunk<typename Tile::T> (&from)[kRows], Chunk<typename Tile::T>* slice) {
    UNROLL
    for (int i = 0; i < kRows; i++) slice[own_place<Tile>(i)] = from[i];
}

// ---- the product of two slices ----

DEVICE int warp_index() { return threadIdx.x / 32; }
DEVICE int lane_index() { return threadIdx.x % 32; }
template <class Tile>
DEVICE int warp_row() {
    return warp_index() / Tile::kWarpsN * Tile::kWarpM;
}
template <class Tile>
DEVICE int warp_column() {
    return warp_index() % Tile::kWarpsN * Tile::kWarpN;
}

// Sums of a warp on the tensor cores: [i][j] is the 16x8 block at (16 i, 8 j); of it a lane has row lane / 4, columns
// lane % 4 * 2 + {0, 1}, and the same 8 rows further down.
template <class Tile>
struct MmaSums {
    float v[Tile::kWarpM / 16][Tile::kWarpN / 8][4];
};

template <class Tile>
DEVICE void multiply(MmaSums<Tile>& sums, const typename Tile::Slices& s) {
    using T = typename Tile::T;
    const int lane = lane_index();
    // ldmatrix: lanes 0..7 name the rows of matrix 0, 8..15 of matrix 1, ... A: rows 0-7 and 8-15 at k 0-7, then both
    // at k 8-15. B: rows (columns of C) 0-7 at k 0-7 and 8-15, then rows 8-15.
    const int row_a = warp_row<Tile>() + (lane & 15), chunk_a = lane >> 4;
    const int row_b = warp_column<Tile>() + (lane & 7) + (lane >> 4 << 3), chunk_b = lane >> 3 & 1;
    UNROLL
    for (int step = 0; step < kRowChunks / 2; step++) {
        uint32_t a[Tile::kWarpM / 16][4], b[Tile::kWarpN / 16][4];
        // 16 rows further down the swizzle is the same.
        const Chunk<T>* from_a = &s.a[chunk_place(row_a, 2 * step + chunk_a)];
        const Chunk<T>* from_b = &s.b[chunk_place(row_b, 2 * step + chunk_b)];
        UNROLL
        for (int i = 0; i < Tile::kWarpM / 16; i++) ldmatrix_x4(a[i], from_a + i * 16 * kRowChunks);
        UNROLL
        for (int j = 0; j < Tile::kWarpN / 16; j++) ldmatrix_x4(b[j], from_b + j * 16 * kRowChunks);
        UNROLL
        for (int i = 0; i < Tile::kWarpM / 16; i++) {
            UNROLL
            for (int j = 0; j < Tile::kWarpN / 8; j++) {
                mma_m16n8k16<T>(sums.v[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
            }
        }
    }
}

// Rows 16 pass .. 16 pass + 15 of the warp's sums, to `rows`.
template <class Tile>
DEVICE void stage(const MmaSums<Tile>& sums, int pass, float (&rows)[16][Tile::kPitch]) {
    const int row = lane_index() / 4, column = lane_index() % 4 * 2;
    UNROLL
    for (int j = 0; j < Tile::kWarpN / 8; j++) {
        UNROLL
        for (int half = 0; half < 2; half++) {
            *reinterpret_cast<float2*>(&rows[row + 8 * half][8 * j + column]) =
                make_float2(sums.v[pass][j][2 * half], sums.v[pass][j][2 * half + 1]);
        }
    }
}

// Sums of a warp on the FMA units: a lane has rows lane / 8 + 4 i and columns lane % 8 + 8 j.
template <class Tile>
struct FmaSums {
    float v[Tile::kWarpM / 4][Tile::kWarpN / 8];
};

template <class Tile>
DEVICE void multiply(FmaSums<Tile>& sums, const typename Tile::Slices& s) {
    constexpr int kColumns = Tile::kWarpN / 8;
    const int row = warp_row<Tile>() + lane_index() / 8, column = warp_column<Tile>() + lane_index() % 8;
    UNROLL
    for (int chunk = 0; chunk < kRowChunks; chunk++) {
        Chunk<float> b[kColumns];
        UNROLL
        for (int j = 0; j < kColumns; j++) b[j] = s.b[chunk_place(column + 8 * j, chunk)];
        UNROLL
        for (int i = 0; i < Tile::kWarpM / 4; i++) {
            const Chunk<float> a = s.a[chunk_place(row + 4 * i, chunk)];
            UNROLL
            for (int j = 0; j < kColumns; j++) {
                UNROLL
                for (int k = 0; k < 4; k++) sums.v[i][j] = a.v[k] * b[j].v[k] + sums.v[i][j];
            }
        }
    }
}

template <class Tile>
DEVICE void stage(const FmaSums<Tile>& sums, int pass, float (&rows)[16][Tile::kPitch]) {
    const int row = lane_index() / 8, column = lane_index() % 8;
    UNROLL
    for (int i = 0; i < 4; i++) {
        UNROLL
        for (int j = 0; j < Tile::kWarpN / 8; j++) rows[row + 4 * i][column + 8 * j] = sums.v[4 * pass + i][j];
    }
}

template <class Tile, bool kMma>
struct SumsOf {
    using Type = MmaSums<Tile>;
};
template <class Tile>
struct SumsOf<Tile, false> {
    using Type = FmaSums<Tile>;
};
template <class Tile>
using Sums = typename SumsOf<Tile, sizeof(typename Tile::T) == 2>::Type;

// ---- the loop over K ----

template <class Tile, class RowsA, class RowsB>
DEVICE void load_slices(RowsA& a, RowsB& b, typename Tile::Slices& to) {
    if constexpr (Tile::kGeneral) {
        if (a.wide) {
            Chunk<typename Tile::T> chunks[Tile::kRowsA];
            load_wide<Tile>(a, chunks);
            store_chunks<Tile>(chunks, to.a);
        } else {
            fill<Tile, Tile::kRowsA>(a, to.a);
        }
        if (b.wide) {
            Chunk<typename Tile::T> chunks[Tile::kRowsB];
            load_wide<Tile>(b, chunks);
            store_chunks<Tile>(chunks, to.b);
        } else {
            fill<Tile, Tile::kRowsB>(b, to.b);
        }
    } else {
        copy_async<Tile, Tile::kRowsA>(a, to.a);
        copy_async<Tile, Tile::kRowsB>(b, to.b);
    }
}

// The sums over `slices` slices of K. Afterwards shared memory may still be read by other warps.
template <class Tile, class RowsA, class RowsB>
DEVICE void product(Sums<Tile>& sums, typename Tile::Shared& s, RowsA& a, RowsB& b, int slices) {
    constexpr int kAhead = Tile::kStages - 1;
    for (int i = 0; i < kAhead; i++) {
        if (i < slices) load_slices<Tile>(a, b, s.ring[i]);
        if constexpr (!Tile::kGeneral) {
            cp_async_commit();
        }
    }
    int slot = 0;
    for (int slice = 0; slice < slices; slice++) {
        if constexpr (!Tile::kGeneral) {
            cp_async_wait<kAhead - 1>();
        }
        // This slice has landed for every thread, and every warp has left the one whose slot is filled next.
        __syncthreads();
        const bool more = slice + kAhead < slices;
        typename Tile::Slices& next = s.ring[slot == 0 ? kAhead : slot - 1];
        if constexpr (Tile::kGeneral) {
            // Loads are under way while the tile is multiplied.
            Chunk<typename Tile::T> chunks_a[Tile::kRowsA], chunks_b[Tile::kRowsB];
            if (more && a.wide) load_wide<Tile>(a, chunks_a);
            if (more && b.wide) load_wide<Tile>(b, chunks_b);
            multiply(sums, s.ring[slot]);
            if (more && a.wide) store_chunks<Tile>(chunks_a, next.a);
            if (more && b.wide) store_chunks<Tile>(chunks_b, next.b);
            if (more && !a.wide) fill<Tile, Tile::kRowsA>(a, next.a);
            if (more && !b.wide) fill<Tile, Tile::kRowsB>(b, next.b);
        } else {
            if (more) load_slices<Tile>(a, b, next);
            cp_async_commit();
            multiply(sums, s.ring[slot]);
        }
        slot = slot == kAhead ? 0 : slot + 1;
    }
}

// ---- from sums to the result ----

// First row and column of a block's tile. Blocks that run at once share rows of A and of B in L2: they go down 8 tiles
// of rows, then one tile of columns to the right, ...
struct TileOrigin {
    int m, n;
};
template <class Tile>
DEVICE TileOrigin tile_origin(int m, int n) {
    constexpr int kDown = 8;
    const int tiles_m = (m + Tile::kM - 1) / Tile::kM, tiles_n = (n + Tile::kN - 1) / Tile::kN;
    const int band = blockIdx.x / (kDown * tiles_n), within = blockIdx.x % (kDown * tiles_n);
    const int down = min(kDown, tiles_m - band * kDown);
    return {(band * kDown + within % down) * Tile::kM, within / down * Tile::kN};
}

// Hands the tile's sums to store(output, rows, m, n), 16 rows of a warp at a time: rows[r][c] is the sum of row m + r
// and column n + c of C. All lanes of the warp call it together.
template <class Tile, class Output>
DEVICE void write_out(const Sums<Tile>& sums, typename Tile::Shared& s, TileOrigin origin, const Output& output) {
    float(&rows)[16][Tile::kPitch] = s.rows[warp_index()];
    __syncthreads();  // the rows lie where slices were
    UNROLL
    for (int pass = 0; pass < Tile::kWarpM / 16; pass++) {
        stage(sums, pass, rows);
        __syncwarp();
        store<Tile>(output, rows, origin.m + warp_row<Tile>() + 16 * pass, origin.n + warp_column<Tile>());
        __syncwarp();
    }
}
