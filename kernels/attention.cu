// attention.cu: softmax(q k^T / sqrt(head_dim)) v per head, without the scores in memory.
//   s_ij = q_i . k_j / sqrt(d);   p_ij = exp(s_ij - max_j s_ij);   y_i = sum_j p_ij v_j / sum_j p_ij
//   Keys come in tiles. max and both sums are kept for the keys so far and brought to a new max when one appears
//   (Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691).
//   q, y [N, queries, heads, d]; k, v [R, keys, heads, d], tokens q_stride, kv_stride elements apart (heads side by
//   side), so that they are read where the projections left them. R divides N; image n attends to row n / (N / R).
//   y is dense. causal: query i sees keys 0..=i.
//   T = f16 | bf16: tensor cores, scores and sums in f32, p rounded to T for the second product. T = f32: f32 throughout.
// Compute bound: 4 * N * heads * queries * keys * d flops (half of it causal); each tile of queries reads its head's k
// and v once, from L2 where a head fits. No alignment asked; 16-byte copies where d and the addresses allow.
// NaN and infinity spread to what a query sees and no further: neither masked keys nor other heads or images.
// Launch: grid (ceil(queries / rows of a block), heads, N), block 128 | 256; shared memory: see src/ops/cuda/attention.rs.
#include "common/device.cuh"
#include "common/rows.cuh"

struct AttentionSize {
    int queries, keys, head_dim;
    int q_stride, kv_stride;  // from a token to the next, in elements
    float scale;              // log2(e) / sqrt(head_dim): exponentials are powers of two
    int causal;
    int images_per_kv;        // N / R
};

constexpr float kInfinity = __builtin_huge_valf();
constexpr uint32_t kWholeWarp = ~0u;

template <class T>
struct Head {
    Rows<const T> q, k, v;
    Rows<T> y;
};

// Head blockIdx.y of image blockIdx.z, its columns from `first_column` on.
// kAny: of any width and alignment; else both are whole chunks.
template <bool kAny, class T>
DEVICE Head<T> this_head(T* y, const T* q, const T* k, const T* v, const AttentionSize& size, int first_column) {
    const int y_stride = gridDim.y * size.head_dim, column = blockIdx.y * size.head_dim + first_column;
    const int width = size.head_dim - first_column;
    const int64_t query = int64_t(blockIdx.z) * size.queries;
    const int64_t key = int64_t(blockIdx.z / size.images_per_kv) * size.keys;
    const uint64_t addresses = uint64_t(y) | uint64_t(q) | uint64_t(k) | uint64_t(v);
    // Whole chunks in a head make whole chunks of the strides.
    const bool aligned = !kAny || (addresses % 16 == 0 && size.head_dim % kChunk == 0);
    return {
        {q + query * size.q_stride + column, size.q_stride, size.queries, width, aligned},
        {k + key * size.kv_stride + column, size.kv_stride, size.keys, width, aligned},
        {v + key * size.kv_stride + column, size.kv_stride, size.keys, width, aligned},
        {y + query * y_stride + column, y_stride, size.queries, width, aligned},
    };
}

// What a new maximum of scores does: exponents are score * scale - shift, and sums so far are multiplied by correction.
struct Rescale {
    float shift, correction;
};

// A row that so far saw only -inf keeps sums of 0, for exp(-inf) relative to any finite maximum; NaN passes through.
DEVICE Rescale rescale(float old_max, float new_max, float scale) {
    const float shift = new_max == -kInfinity ? 0.f : new_max * scale;
    return {shift, exp2_approx(old_max * scale - shift)};
}

// ---- f16 and bf16, head_dim up to 160 ----
//
// A warp has kTiles times 16 queries and all columns: scores, p and sums stay in its registers, and p passes from the
// first product's accumulators to the second's operand as they are. k and v come through a ring of two stages, the next
// tile's copies under way during this tile's products. Columns from head_dim up to kHeadDim are 0.
// 32 queries a warp (kTiles = 2) halve the shared memory read per product, which 16 are bound by; they need the
// registers of two, and long sequences to fill the card.

constexpr int kWarps = 4;

template <class T, int kHeadDim, int kTiles, int kKeys>
struct AttentionShared {
    T q[kWarps * kTiles * 16 * kHeadDim];  // later y
    T k[2][kKeys * kHeadDim];
    T v[2][kKeys * kHeadDim];
};

// sums += p v for the 16 queries and 16 keys on the diagonal, where key j is for query i >= j: not as products with 0,
// so that NaN or infinity in a value stays with the queries that see it. `p`: accumulators of two tiles of 8 keys.
template <int kHeadDim, class T>
DEVICE void add_diagonal(float (&sums)[kHeadDim / 8][4], const float (&p0)[4], const float (&p1)[4], T* v, int first_key) {
    const int lane = threadIdx.x % 32, row = lane / 4;
    for (int source = 0; source < 4; source++) {
        UNROLL
        for (int i = 0; i < 4; i++) {
            const int key = i / 2 * 8 + source * 2 + i % 2;
            const float(&p)[4] = i < 2 ? p0 : p1;
            const float upper = __shfl_sync(kWholeWarp, p[i % 2], source, 4);
            const float lower = __shfl_sync(kWholeWarp, p[2 + i % 2], source, 4);
            UNROLL
            for (int j = 0; j < kHeadDim / 8; j++) {
                const T* values = chunk_at<kHeadDim / kChunk>(v, first_key + key, j) + lane % 4 * 2;
                const float v0 = to_f32(values[0]), v1 = to_f32(values[1]);
                if (key <= row) {
                    sums[j][0] += upper * v0;
                    sums[j][1] += upper * v1;
                }
                if (key <= row + 8) {
                    sums[j][2] += lower * v0;
                    sums[j][3] += lower * v1;
                }
            }
        }
    }
}

template <class T, int kHeadDim, int kTiles, int kKeys, bool kAny>
DEVICE void attention(T* y, const T* q, const T* k, const T* v, const AttentionSize& size) {
    constexpr int kThreads = kWarps * 32, kRows = kWarps * kTiles * 16, kChunks = kHeadDim / kChunk;
    // Chunks of 16 columns of q that stay in registers: all, or one at a time where there are none to spare.
    constexpr int kKept = kTiles == 1 ? kHeadDim / 16 : 1;
    using Shared = AttentionShared<T, kHeadDim, kTiles, kKeys>;
    SHARED_DYNAMIC(Shared, shared);
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const Head<T> head = this_head<kAny>(y, q, k, v, size, 0);
    const int first_query = blockIdx.x * kRows, warp_row = warp * kTiles * 16;
    const bool causal = kAny && size.causal;
    const int keys = causal ? min(size.keys, first_query + kRows) : size.keys;
    const int tiles = (keys + kKeys - 1) / kKeys;

    load_rows<kRows, kChunks, kThreads>(shared.q, head.q, first_query, thread);
    load_rows<kKeys, kChunks, kThreads>(shared.k[0], head.k, 0, thread);
    load_rows<kKeys, kChunks, kThreads>(shared.v[0], head.v, 0, thread);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    uint32_t queries[kTiles][kKept][4];
    const auto load_queries = [&](uint32_t(&to)[4], int m, int d) {
        ldmatrix_x4(to, chunk_at<kChunks>(shared.q, warp_row + m * 16 + lane % 16, d * 2 + lane / 16));
    };
    if (kKept > 1) {
        UNROLL
        for (int m = 0; m < kTiles; m++) {
            UNROLL
            for (int d = 0; d < kKept; d++) load_queries(queries[m][d], m, d);
        }
    }

    // Of this thread's rows, lane / 4 and 8 below it in each 16: sums of p v and of p, the largest score.
    float sums[kTiles][kHeadDim / 8][4] = {}, total[kTiles][2] = {}, largest[kTiles][2];
    UNROLL
    for (int m = 0; m < kTiles; m++) largest[m][0] = largest[m][1] = -kInfinity;

    for (int tile = 0;; tile++) {
        const int stage = tile % 2, first_key = tile * kKeys;
        float scores[kTiles][kKeys / 8][4] = {};
        UNROLL
        for (int d = 0; d < kHeadDim / 16; d++) {
            if (kKept == 1) {
                UNROLL
                for (int m = 0; m < kTiles; m++) load_queries(queries[m][0], m, d);
            }
            UNROLL
            for (int j = 0; j < kKeys / 16; j++) {
                uint32_t keys_[4];
                const int row = j * 16 + lane % 8 + lane / 16 * 8;
                ldmatrix_x4(keys_, chunk_at<kChunks>(shared.k[stage], row, d * 2 + lane / 8 % 2));
                UNROLL
                for (int m = 0; m < kTiles; m++) {
                    mma_m16n8k16<T>(scores[m][j * 2], queries[m][d % kKept], keys_[0], keys_[1]);
                    mma_m16n8k16<T>(scores[m][j * 2 + 1], queries[m][d % kKept], keys_[2], keys_[3]);
                }
            }
        }

        // Not before the product, whose fragments need the registers.
        if (tile + 1 < tiles) {
            load_rows<kKeys, kChunks, kThreads>(shared.k[stage ^ 1], head.k, first_key + kKeys, thread);
            load_rows<kKeys, kChunks, kThreads>(shared.v[stage ^ 1], head.v, first_key + kKeys, thread);
            cp_async_commit();
        }
        const int first_row = first_query + warp_row;
        if (first_key + kKeys > size.keys || (causal && first_key + kKeys > first_row)) {
            UNROLL
            for (int m = 0; m < kTiles; m++) {
                UNROLL
                for (int j = 0; j < kKeys / 8; j++) {
                    UNROLL
                    for (int i = 0; i < 4; i++) {
                        const int key = first_key + j * 8 + lane % 4 * 2 + i % 2;
                        const int query = first_row + m * 16 + lane / 4 + i / 2 * 8;
                        if (key >= size.keys || (causal && key > query)) scores[m][j][i] = -kInfinity;
                    }
                }
            }
        }

        UNROLL
        for (int m = 0; m < kTiles; m++) {
            UNROLL
            for (int half = 0; half < 2; half++) {
                float max = largest[m][half];
                UNROLL
                for (int j = 0; j < kKeys / 8; j++) {
                    max = fmaxf(max, fmaxf(scores[m][j][half * 2], scores[m][j][half * 2 + 1]));
                }
                max = fmaxf(max, __shfl_xor_sync(kWholeWarp, max, 1));
                max = fmaxf(max, __shfl_xor_sync(kWholeWarp, max, 2));
                const Rescale to = rescale(largest[m][half], max, size.scale);
                largest[m][half] = max;
                float sum = 0.f;
                UNROLL
                for (int j = 0; j < kKeys / 8; j++) {
                    UNROLL
                    for (int i = half * 2; i < half * 2 + 2; i++) {
                        scores[m][j][i] = exp2_approx(scores[m][j][i] * size.scale - to.shift);
                        sum += scores[m][j][i];
                    }
                }
                total[m][half] = total[m][half] * to.correction + sum;
                UNROLL
                for (int j = 0; j < kHeadDim / 8; j++) {
                    sums[m][j][half * 2] *= to.correction;
                    sums[m][j][half * 2 + 1] *= to.correction;
                }
            }
        }

        UNROLL
        for (int j = 0; j < kKeys / 16; j++) {
            if (causal) {
                // Of the 16 by 16 blocks of a causal warp, one is partly seen.
                const int key = first_key + j * 16;
                if (key > first_row) continue;
                if (key == first_row) {
                    add_diagonal<kHeadDim>(sums[0], scores[0][j * 2], scores[0][j * 2 + 1], shared.v[stage], j * 16);
                    continue;
                }
            }
            uint32_t p[kTiles][4];
            UNROLL
            for (int m = 0; m < kTiles; m++) {
                UNROLL
                for (int i = 0; i < 4; i++) {
                    const float* pair = &scores[m][j * 2 + i / 2][i % 2 * 2];
                    p[m][i] = pack2<T>(pair[0], pair[1]);
                }
            }
            UNROLL
            for (int d = 0; d < kHeadDim / 16; d++) {
                uint32_t values[4];
                ldmatrix_x4_trans(values, chunk_at<kChunks>(shared.v[stage], j * 16 + lane % 16, d * 2 + lane / 16));
                UNROLL
                for (int m = 0; m < kTiles; m++) {
                    mma_m16n8k16<T>(sums[m][d * 2], p[m], values[0], values[1]);
                    mma_m16n8k16<T>(sums[m][d * 2 + 1], p[m], values[2], values[3]);
                }
            }
        }

        if (tile + 1 == tiles) break;
        cp_async_wait<0>();
        __syncthreads();
    }

    // Through shared memory, so that rows leave in whole chunks. These rows of q were read by this warp alone, but by
    // all of its lanes, and with one tile of keys no barrier came since.
    __syncwarp();
    UNROLL
    for (int m = 0; m < kTiles; m++) {
        UNROLL
        for (int half = 0; half < 2; half++) {
            float sum = total[m][half];
            sum += __shfl_xor_sync(kWholeWarp, sum, 1);
            sum += __shfl_xor_sync(kWholeWarp, sum, 2);
            const float factor = 1.f / sum;
            const int row = warp_row + m * 16 + lane / 4 + half * 8;
            UNROLL
            for (int j = 0; j < kHeadDim / 8; j++) {
                T* to = chunk_at<kChunks>(shared.q, row, j) + lane % 4 * 2;
                *reinterpret_cast<uint32_t*>(to) =
                    pack2<T>(sums[m][j][half * 2] * factor, sums[m][j][half * 2 + 1] * factor);
            }
        }
    }
    __syncwarp();
    store_rows<kTiles * 16, kChunks, 32>(head.y, first_query + warp_row, shared.q + warp_row * kHeadDim, lane);
}

// ---- f16 and bf16, head_dim up to 512 ----
//
// 32 queries a block. A warp has 64 columns of q, k, v and y, so its part of k and v is its own and waits for no other
// warp. Its product of q and k is one term of the scores; the eight terms meet in shared memory, are added in order, and
// p comes back the same way. k of the next tile is under way during softmax and second product, v during the first.

constexpr int kWideWarps = 8, kWideThreads = kWideWarps * 32, kWideRows = 32, kWideKeys = 32;
constexpr int kSlice = 64, kSliceChunks = kSlice / kChunk;  // columns of a warp

template <class T>
struct WideShared {
    T k[kWideWarps][kWideKeys * kSlice];  // later y
    T v[kWideWarps][kWideKeys * kSlice];  // first q
    float terms[kWideWarps][kWideRows * kWideKeys];
    T p[kWideRows * kWideKeys];
    float factor[kWideRows];
};

// Where a warp's term of a score lies: written as accumulators (4 rows at once), read as rows, neither in conflict.
DEVICE int term_at(int row, int key) { return row * kWideKeys + (key ^ (row % 4 * 8)); }

template <class T>
DEVICE void attention_wide(T* y, const T* q, const T* k, const T* v, const AttentionSize& size) {
    SHARED_DYNAMIC(WideShared<T>, shared);
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const Head<T> head = this_head<true>(y, q, k, v, size, warp * kSlice);
    const int first_query = blockIdx.x * kWideRows;
    const int keys = size.causal ? min(size.keys, first_query + kWideRows) : size.keys;
    T *const my_k = shared.k[warp], *const my_v = shared.v[warp];

    load_rows<kWideRows, kSliceChunks, 32>(my_v, head.q, first_query, lane);
    load_rows<kWideKeys, kSliceChunks, 32>(my_k, head.k, 0, lane);
    cp_async_commit();
    cp_async_wait<0>();
    __syncwarp();
    uint32_t queries[2][kSlice / 16][4];
    UNROLL
    for (int m = 0; m < 2; m++) {
        UNROLL
        for (int d = 0; d < kSlice / 16; d++) {
            ldmatrix_x4(queries[m][d], chunk_at<kSliceChunks>(my_v, m * 16 + lane % 16, d * 2 + lane / 16));
        }
    }
    __syncwarp();

    float sums[2][kSlice / 8][4] = {};
    // Of query thread / 8, the same in 8 threads.
    const int query = thread / 8, first_of_eight = thread % 8 * 4;
    float total = 0.f, largest = -kInfinity;

    for (int first_key = 0; first_key < keys; first_key += kWideKeys) {
        load_rows<kWideKeys, kSliceChunks, 32>(my_v, head.v, first_key, lane);
        cp_async_commit();

        float scores[2][kWideKeys / 8][4] = {};
        UNROLL
        for (int d = 0; d < kSlice / 16; d++) {
            UNROLL
            for (int j = 0; j < kWideKeys / 16; j++) {
                uint32_t keys_[4];
                const int row = j * 16 + lane % 8 + lane / 16 * 8;
                ldmatrix_x4(keys_, chunk_at<kSliceChunks>(my_k, row, d * 2 + lane / 8 % 2));
                UNROLL
                for (int m = 0; m < 2; m++) {
                    mma_m16n8k16<T>(scores[m][j * 2], queries[m][d], keys_[0], keys_[1]);
                    mma_m16n8k16<T>(scores[m][j * 2 + 1], queries[m][d], keys_[2], keys_[3]);
                }
            }
        }
        UNROLL
        for (int m = 0; m < 2; m++) {
            UNROLL
            for (int j = 0; j < kWideKeys / 8; j++) {
                UNROLL
                for (int half = 0; half < 2; half++) {
                    float* to = &shared.terms[warp][term_at(m * 16 + lane / 4 + half * 8, j * 8 + lane % 4 * 2)];
                    *reinterpret_cast<float2*>(to) = make_float2(scores[m][j][half * 2], scores[m][j][half * 2 + 1]);
                }
            }
        }
        __syncthreads();

        if (first_key + kWideKeys < keys) {
            load_rows<kWideKeys, kSliceChunks, 32>(my_k, head.k, first_key + kWideKeys, lane);
        }
        cp_async_commit();
        float score[4] = {}, max = largest, sum = 0.f;
        UNROLL
        for (int w = 0; w < kWideWarps; w++) {
            const float4 term = *reinterpret_cast<const float4*>(&shared.terms[w][term_at(query, first_of_eight)]);
            score[0] += term.x;
            score[1] += term.y;
            score[2] += term.z;
            score[3] += term.w;
        }
        UNROLL
        for (int i = 0; i < 4; i++) {
            const int key = first_key + first_of_eight + i;
            if (key >= size.keys || (size.causal && key > first_query + query)) score[i] = -kInfinity;
            max = fmaxf(max, score[i]);
        }
        UNROLL
        for (int i = 1; i < 8; i *= 2) max = fmaxf(max, __shfl_xor_sync(kWholeWarp, max, i));
        const Rescale to = rescale(largest, max, size.scale);
        largest = max;
        UNROLL
        for (int i = 0; i < 4; i++) {
            score[i] = exp2_approx(score[i] * size.scale - to.shift);
            sum += score[i];
        }
        total = total * to.correction + sum;
        T* p = chunk_at<kWideKeys / kChunk>(shared.p, query, first_of_eight / kChunk) + first_of_eight % kChunk;
        *reinterpret_cast<uint2*>(p) = make_uint2(pack2<T>(score[0], score[1]), pack2<T>(score[2], score[3]));
        if (thread % 8 == 0) shared.factor[query] = to.correction;
        cp_async_wait<1>();
        __syncthreads();

        UNROLL
        for (int m = 0; m < 2; m++) {
            UNROLL
            for (int half = 0; half < 2; half++) {
                const float correction = shared.factor[m * 16 + lane / 4 + half * 8];
                UNROLL
                for (int j = 0; j < kSlice / 8; j++) {
                    sums[m][j][half * 2] *= correction;
                    sums[m][j][half * 2 + 1] *= correction;
                }
            }
        }
        UNROLL
        for (int m = 0; m < 2; m++) {
            UNROLL
            for (int j = 0; j < kWideKeys / 16; j++) {
                if (size.causal) {
                    const int key = first_key + j * 16, row = first_query + m * 16;
                    if (key > row) continue;
                    if (key == row) {
                        // As add_diagonal.
                        for (int i = 0; i < 16; i++) {
                            const int upper = lane / 4, chunk = (j * 16 + i) / kChunk;
                            const auto p_of = [&](int r) {
                                return to_f32(chunk_at<kWideKeys / kChunk>(shared.p, m * 16 + r, chunk)[i % kChunk]);
                            };
                            UNROLL
                            for (int c = 0; c < kSliceChunks; c++) {
                                const T* values = chunk_at<kSliceChunks>(my_v, j * 16 + i, c) + lane % 4 * 2;
                                const float v0 = to_f32(values[0]), v1 = to_f32(values[1]);
                                if (i <= upper) {
                                    sums[m][c][0] += p_of(upper) * v0;
                                    sums[m][c][1] += p_of(upper) * v1;
                                }
                                if (i <= upper + 8) {
                                    sums[m][c][2] += p_of(upper + 8) * v0;
                                    sums[m][c][3] += p_of(upper + 8) * v1;
                                }
                            }
                        }
                        continue;
                    }
                }
                uint32_t weights[4];
                const int row = m * 16 + lane % 16;
                ldmatrix_x4(weights, chunk_at<kWideKeys / kChunk>(shared.p, row, j * 2 + lane / 16));
                UNROLL
                for (int d = 0; d < kSlice / 16; d++) {
                    uint32_t values[4];
                    ldmatrix_x4_trans(values, chunk_at<kSliceChunks>(my_v, j * 16 + lane % 16, d * 2 + lane / 16));
                    mma_m16n8k16<T>(sums[m][d * 2], weights, values[0], values[1]);
                    mma_m16n8k16<T>(sums[m][d * 2 + 1], weights, values[2], values[3]);
                }
            }
        }
        cp_async_wait<0>();
        __syncwarp();
    }

    UNROLL
    for (int i = 1; i < 8; i *= 2) total += __shfl_xor_sync(kWholeWarp, total, i);
    __syncthreads();
    if (thread % 8 == 0) shared.factor[query] = 1.f / total;
    __syncthreads();
    UNROLL
    for (int m = 0; m < 2; m++) {
        UNROLL
        for (int half = 0; half < 2; half++) {
            const int row = m * 16 + lane / 4 + half * 8;
            const float factor = shared.factor[row];
            UNROLL
            for (int j = 0; j < kSlice / 8; j++) {
                T* to = chunk_at<kSliceChunks>(my_k, row, j) + lane % 4 * 2;
                *reinterpret_cast<uint32_t*>(to) =
                    pack2<T>(sums[m][j][half * 2] * factor, sums[m][j][half * 2 + 1] * factor);
            }
        }
    }
    __syncwarp();
    store_rows<kWideRows, kSliceChunks, 32>(head.y, first_query, my_k, lane);
}

// ---- f32 ----
//
// 64 queries a block of 16 by 16 threads, 64 keys a tile. A thread has queries thread / 16 * 4 + 0..4 and of them every
// 16th key and column. q and k come in chunks of kDepth columns, v in chunks of kVColumns.

constexpr int kF32Threads = 256, kF32Rows = 64, kF32Keys = 64, kDepth = 32;

template <int kVColumns>
struct F32Shared {
    union {
        struct {
            float q[kF32Rows][kDepth + 1], k[kF32Keys][kDepth + 1];
        };
        float v[kF32Keys][kVColumns];
    };
    float p[kF32Rows][kF32Keys + 1];
};

template <int kColumns>
DEVICE void attention_f32(float* y, const float* q, const float* k, const float* v, const AttentionSize& size) {
    constexpr int kVColumns = kColumns < 64 ? kColumns : 64;
    SHARED_DYNAMIC(F32Shared<kVColumns>, shared);
    const int thread = threadIdx.x, column = thread % 16, first_row = thread / 16 * 4;
    const Head<float> head = this_head<true>(y, q, k, v, size, 0);
    const int first_query = blockIdx.x * kF32Rows, head_dim = size.head_dim;
    const int keys = size.causal ? min(size.keys, first_query + kF32Rows) : size.keys;
    float sums[4][kColumns / 16] = {}, total[4] = {}, largest[4] = {-kInfinity, -kInfinity, -kInfinity, -kInfinity};

    for (int first_key = 0; first_key < keys; first_key += kF32Keys) {
        float scores[4][4] = {};
        for (int d = 0; d < head_dim; d += kDepth) {
            const int depth = min(kDepth, head_dim - d);
            __syncthreads();
            for (int i = thread; i < kF32Rows * kDepth; i += kF32Threads) {
                const int row = i / kDepth, c = i % kDepth;
                const bool inside = GUARD(c < depth);
                const float* from = head.q.data + int64_t(first_query + row) * head.q.stride + d + c;
                shared.q[row][c] = inside && GUARD(first_query + row < size.queries) ? *from : 0.f;
                from = head.k.data + int64_t(first_key + row) * head.k.stride + d + c;
                shared.k[row][c] = inside && GUARD(first_key + row < size.keys) ? *from : 0.f;
            }
            __syncthreads();
            for (int c = 0; c < depth; c++) {
                UNROLL
                for (int r = 0; r < 4; r++) {
                    UNROLL
                    for (int j = 0; j < 4; j++) {
                        scores[r][j] += shared.q[first_row + r][c] * shared.k[column + j * 16][c];
                    }
                }
            }
        }
        // Keys of this tile that a query sees.
        int seen[4];
        UNROLL
        for (int r = 0; r < 4; r++) {
            seen[r] = min(kF32Keys, size.keys - first_key);
            if (size.causal) seen[r] = min(seen[r], max(0, first_query + first_row + r + 1 - first_key));
            float max = largest[r], sum = 0.f;
            UNROLL
            for (int j = 0; j < 4; j++) {
                if (column + j * 16 >= seen[r]) scores[r][j] = -kInfinity;
                max = fmaxf(max, scores[r][j]);
            }
            UNROLL
            for (int i = 1; i < 16; i *= 2) max = fmaxf(max, __shfl_xor_sync(kWholeWarp, max, i));
            const float shift = max == -kInfinity ? 0.f : max;
            const float correction = exp2_approx((largest[r] - shift) * size.scale);
            largest[r] = max;
            UNROLL
            for (int j = 0; j < 4; j++) {
                const float p = exp2_approx((scores[r][j] - shift) * size.scale);
                sum += p;
                shared.p[first_row + r][column + j * 16] = p;
            }
            total[r] = total[r] * correction + sum;
            UNROLL
            for (int j = 0; j < kColumns / 16; j++) sums[r][j] *= correction;
        }

        UNROLL
        for (int d = 0; d < kColumns; d += kVColumns) {
            __syncthreads();
            for (int i = thread; i < kF32Keys * kVColumns; i += kF32Threads) {
                const int row = i / kVColumns, c = i % kVColumns;
                const bool inside = GUARD(first_key + row < size.keys) && GUARD(d + c < head_dim);
                const float* from = head.v.data + int64_t(first_key + row) * head.v.stride + d + c;
                shared.v[row][c] = inside ? *from : 0.f;
            }
            __syncthreads();
            for (int key = 0; key < seen[3]; key++) {
                UNROLL
                for (int r = 0; r < 4; r++) {
                    if (key < seen[r]) {  // not a product with 0, which NaN would survive
                        UNROLL
                        for (int j = 0; j < kVColumns / 16; j++) {
                            sums[r][d / 16 + j] += shared.p[first_row + r][key] * shared.v[key][column + j * 16];
                        }
                    }
                }
            }
        }
    }

    UNROLL
    for (int r = 0; r < 4; r++) {
        float sum = total[r];
        UNROLL
        for (int i = 1; i < 16; i *= 2) sum += __shfl_xor_sync(kWholeWarp, sum, i);
        const int row = first_query + first_row + r;
        UNROLL
        for (int j = 0; j < kColumns / 16; j++) {
            const int c = column + j * 16;
            if (GUARD(row < size.queries) && GUARD(c < head_dim)) {
                head.y.data[int64_t(row) * head.y.stride + c] = sums[r][j] / sum;
            }
        }
    }
}

#define TIER(T, suffix, head_dim, tiles, keys, any, blocks)                                                          \
    KERNEL(attention_##suffix, kWarps * 32, blocks)(T * y, const T* q, const T* k, const T* v, AttentionSize size) { \
        follow_previous();                                                                                           \
        attention<T, head_dim, tiles, keys, any>(y, q, k, v, size);                                                  \
    }                                                                                                                \
    REGISTER_KERNEL(attention_##suffix)

#define TIERS(T, suffix)                                                                                           \
    TIER(T, d16_any_##suffix, 16, 1, 64, true, 4)                                                                  \
    TIER(T, d32_any_##suffix, 32, 1, 64, true, 3)                                                                  \
    TIER(T, d64_any_##suffix, 64, 1, 64, true, 2)                                                                  \
    TIER(T, d160_any_##suffix, 160, 1, 32, true, 2)                                                                \
    TIER(T, d32_##suffix, 32, 1, 64, false, 4)                                                                     \
    TIER(T, d48_##suffix, 48, 1, 64, false, 3)                                                                     \
    TIER(T, d64_##suffix, 64, 1, 64, false, 3)                                                                     \
    TIER(T, d80_##suffix, 80, 1, 64, false, 2)                                                                     \
    TIER(T, d128_##suffix, 128, 1, 64, false, 2)                                                                   \
    TIER(T, d160_##suffix, 160, 1, 32, false, 2)                                                                   \
    TIER(T, d48_long_##suffix, 48, 2, 64, false, 2)                                                                \
    TIER(T, d64_long_##suffix, 64, 2, 64, false, 2)                                                                \
    TIER(T, d80_long_##suffix, 80, 2, 64, false, 2)                                                                \
    KERNEL(attention_d512_##suffix, kWideThreads, 1)                                                               \
    (T * y, const T* q, const T* k, const T* v, AttentionSize size) {                                              \
        follow_previous();                                                                                         \
        attention_wide<T>(y, q, k, v, size);                                                                       \
    }                                                                                                              \
    REGISTER_KERNEL(attention_d512_##suffix)

#define F32_TIER(head_dim)                                                                                 \
    KERNEL(attention_d##head_dim##_f32, kF32Threads, 1)                                                    \
    (float* y, const float* q, const float* k, const float* v, AttentionSize size) {                       \
        follow_previous();                                                                                 \
        attention_f32<head_dim>(y, q, k, v, size);                                                         \
    }                                                                                                      \
    REGISTER_KERNEL(attention_d##head_dim##_f32)

TIERS(f16, f16)
TIERS(bf16, bf16)
F32_TIER(32)
F32_TIER(64)
F32_TIER(128)
F32_TIER(192)
F32_TIER(512)
