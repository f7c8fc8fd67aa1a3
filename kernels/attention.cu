// attention.cu: attention (common/attention.cuh) without the scores in memory, on every card.
//   T = f16 | bf16: tensor cores, scores and sums in f32, p rounded to T for the second product. T = f32: f32 throughout.
// Compute bound: 4 * N * heads * queries * keys * d flops (half of it causal); each tile of queries reads its head's k
// and v once, from L2 where a head fits. No alignment asked; 16-byte copies where d and the addresses allow.
// Launch: grid (ceil(queries / rows of a block), heads, N), block 128 | 256; shared memory: see src/ops/cuda/attention.rs.
#include "common/attention.cuh"
#include "common/math.cuh"
#include "common/rows.cuh"

template <class T>
struct Head {
    Rows<const T> q, k, v, k2, v2;
    Rows<T> y;
};

// Head blockIdx.y of image blockIdx.z, its columns from `first_column` on.
// kAny: of any width and alignment; else both are whole chunks.
template <bool kAny, class T>
DEVICE Head<T> this_head(const AttentionArgs<T>& args, int first_column) {
    const int y_stride = args.heads * args.head_dim, column = blockIdx.y * args.head_dim + first_column;
    const int width = args.head_dim - first_column;
    const bool windows = kAny && args.map_h;
    // Windows are many of an image, wherever its tokens lie.
    const WindowPlace place = windows ? window_place(args, blockIdx.z) : WindowPlace();
    const int64_t map = windows ? int64_t(place.image) * (args.map_h * args.map_w) : 0;
    const int64_t query = windows ? map : int64_t(blockIdx.z) * args.queries;
    const int64_t key = windows ? map : int64_t(blockIdx.z / args.images_per_kv) * args.keys;
    const int queries = windows ? query_count(args, place) : args.queries;
    const int64_t key2 = kAny && args.k2 ? int64_t(blockIdx.z / args.images_per_kv2) * args.keys2 : 0;
    const uint64_t addresses = uint64_t(args.y) | uint64_t(args.q) | uint64_t(args.k) | uint64_t(args.v) |
                               uint64_t(args.k2) | uint64_t(args.v2);
    // Whole chunks in a head make whole chunks of the strides.
    const bool aligned = !kAny || (addresses % 16 == 0 && args.head_dim % kChunk == 0);
    return {
        {args.q + query * args.q_stride + column, args.q_stride, queries, width, aligned},
        {args.k + key * args.kv_stride + column, args.kv_stride, args.keys, width, aligned},
        {args.v + key * args.kv_stride + column, args.kv_stride, args.keys, width, aligned},
        {args.k2 + key2 * args.kv2_stride + column, args.kv2_stride, args.keys2, width, aligned},
        {args.v2 + key2 * args.kv2_stride + column, args.kv2_stride, args.keys2, width, aligned},
        {args.y + query * y_stride + column, y_stride, queries, width, aligned},
    };
}

// What a tile of keys is there for. The tiles of a second source that is apart come twice: first their softmax's maximum
// and sum are found, then their values are added, each p times weight2 over that sum. So no second sums are needed.
enum Pass { kSoftmax, kMeasure, kAdd };

struct KeyTile {
    int first, keys;  // its first key, and how many the source has
    bool second;      // of the second source
    Pass pass;
};

// The tiles of a block, of kKeys keys each: those of the first source, as far as its queries see, then the second's.
template <int kKeys, bool kAny>
struct KeyTiles {
    int first, second, count;

    template <class T>
    __device__ __forceinline__ KeyTiles(const AttentionArgs<T>& args, int queries_end) {
        const int keys = kAny && args.causal ? min(args.keys, queries_end) : args.keys;
        first = (keys + kKeys - 1) / kKeys;
        second = kAny ? (args.keys2 + kKeys - 1) / kKeys : 0;
        count = first + (kAny && args.apart ? 2 * second : second);
    }
    template <class T>
    __device__ __forceinline__ KeyTile at(const AttentionArgs<T>& args, int tile) const {
        if (!kAny || tile < first) return {tile * kKeys, args.keys, false, kSoftmax};
        const int from = tile - first;
        if (from < second) return {from * kKeys, args.keys2, true, args.apart ? kMeasure : kSoftmax};
        return {(from - second) * kKeys, args.keys2, true, kAdd};
    }
};

// Where the queries or the keys of this block's window lie in their image; else in their order.
template <bool kAny, bool kKeys, class T>
struct TokenPlaces {
    const AttentionArgs<T>& args;
    WindowPlace place;

    __device__ __forceinline__ explicit TokenPlaces(const AttentionArgs<T>& args_) : args(args_), place() {
        if (!scattered()) return;
        place = window_place(args, blockIdx.z);
        if (kKeys) place = key_place(args, place);
        place.image = 0;
    }
    __device__ __forceinline__ bool scattered() const { return kAny && args.map_h; }
    __device__ __forceinline__ int64_t of(int i) const {
        if (!scattered()) return i;
        const int columns = kKeys ? key_columns(args) : query_columns(args, place);
        return map_token(args, place, i / columns, i % columns);
    }
};

// load_rows and store_rows, of tokens wherever they lie.
template <int kRows, int kChunks, int kThreads, class Places, class T>
DEVICE void load_tokens(T* tile, const Rows<const T>& rows, const Places& places, int first, int thread) {
    if (!places.scattered()) {
        load_rows<kRows, kChunks, kThreads>(tile, rows, first, thread);
        return;
    }
    ROLLED
    for (int i = thread; i < kRows * kChunks; i += kThreads) {
        const int row = i / kChunks, chunk = i % kChunks;
        const bool inside = GUARD(first + row < rows.count) && GUARD(chunk * kChunk < rows.width);
        const T* from = rows.data + (inside ? places.of(first + row) * rows.stride + chunk * kChunk : 0);
        T* to = chunk_at<kChunks>(tile, row, chunk);
        if (rows.aligned) {
            cp_async_16(to, from, inside);
            continue;
        }
        for (int c = 0; c < kChunk; c++) {
            to[c] = inside && GUARD(chunk * kChunk + c < rows.width) ? from[c] : from_f32<T>(0.f);
        }
    }
}
template <int kRows, int kChunks, int kThreads, class Places, class T>
DEVICE void store_tokens(const Rows<T>& rows, const Places& places, int first, T* tile, int thread) {
    if (!places.scattered()) {
        store_rows<kRows, kChunks, kThreads>(rows, first, tile, thread);
        return;
    }
    ROLLED
    for (int i = thread; i < kRows * kChunks * kChunk; i += kThreads) {
        const int row = i / (kChunks * kChunk), column = i % (kChunks * kChunk);
        if (GUARD(first + row < rows.count) && GUARD(column < rows.width)) {
            rows.data[places.of(first + row) * rows.stride + column] =
                chunk_at<kChunks>(tile, row, column / kChunk)[column % kChunk];
        }
    }
}

// By value, field by field: a choice between two structs would put both into local memory.
template <class T>
DEVICE Rows<const T> rows_of(const KeyTile& tile, const Rows<const T>& first, const Rows<const T>& second) {
    return {tile.second ? second.data : first.data, tile.second ? second.stride : first.stride,
            tile.second ? second.count : first.count, first.width, first.aligned};
}

// The bias of this block's head and image, from query 0 and key 0 on; null: none.
template <class T>
DEVICE const T* this_bias(const AttentionArgs<T>& args) {
    if (!args.bias) return nullptr;
    const int64_t head = int64_t(blockIdx.z / args.images_per_bias) * args.heads + blockIdx.y;
    return args.bias + head * args.queries * args.keys;
}

// A score as an exponent of 2, whose scale is 1 then.
template <class T>
DEVICE float biased(float score, const AttentionArgs<T>& args, const T* bias, int query, int key) {
    const bool inside = GUARD(query < args.queries) && GUARD(key < args.keys);
    return score * args.scale + (inside ? to_f32(bias[int64_t(query) * args.keys + key]) * kLog2E : 0.f);
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
DEVICE void attention(const AttentionArgs<T>& args) {
    constexpr int kThreads = kWarps * 32, kRows = kWarps * kTiles * 16, kChunks = kHeadDim / kChunk;
    // Chunks of 16 columns of q that stay in registers: all, or one at a time where there are none to spare.
    constexpr int kKept = kTiles == 1 ? kHeadDim / 16 : 1;
    using Shared = AttentionShared<T, kHeadDim, kTiles, kKeys>;
    SHARED_DYNAMIC(Shared, shared);
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const Head<T> head = this_head<kAny>(args, 0);
    const int first_query = blockIdx.x * kRows, warp_row = warp * kTiles * 16;
    const bool causal = kAny && args.causal;
    const T* bias = kAny ? this_bias(args) : nullptr;
    const KeyTiles<kKeys, kAny> tiles(args, first_query + kRows);
    const TokenPlaces<kAny, false, T> places(args);
    const TokenPlaces<kAny, true, T> key_places(args);

    load_tokens<kRows, kChunks, kThreads>(shared.q, head.q, places, first_query, thread);
    load_tokens<kKeys, kChunks, kThreads>(shared.k[0], head.k, key_places, 0, thread);
    load_tokens<kKeys, kChunks, kThreads>(shared.v[0], head.v, key_places, 0, thread);
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
    float sums[kTiles][kHeadDim / 8][4] = {}, total[kTiles][2] = {}, largest[kTiles][2], share[kTiles][2];
    UNROLL
    for (int m = 0; m < kTiles; m++) largest[m][0] = largest[m][1] = -kInfinity;

    for (int tile = 0;; tile++) {
        const int stage = tile % 2;
        const KeyTile now = tiles.at(args, tile);
        const int first_key = now.first;
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
        if (tile + 1 < tiles.count) {
            const KeyTile next = tiles.at(args, tile + 1);
            load_tokens<kKeys, kChunks, kThreads>(shared.k[stage ^ 1], rows_of(next, head.k, head.k2), key_places, next.first, thread);
            load_tokens<kKeys, kChunks, kThreads>(shared.v[stage ^ 1], rows_of(next, head.v, head.v2), key_places, next.first, thread);
            cp_async_commit();
        }
        const int first_row = first_query + warp_row;
        float scale = args.scale;
        if (kAny && bias && !now.second) {
            scale = 1.f;
            UNROLL
            for (int m = 0; m < kTiles; m++) {
                UNROLL
                for (int j = 0; j < kKeys / 8; j++) {
                    UNROLL
                    for (int i = 0; i < 4; i++) {
                        const int key = first_key + j * 8 + lane % 4 * 2 + i % 2;
                        const int query = first_row + m * 16 + lane / 4 + i / 2 * 8;
                        scores[m][j][i] = biased(scores[m][j][i], args, bias, query, key);
                    }
                }
            }
        }
        if (first_key + kKeys > now.keys || (causal && first_key + kKeys > first_row)) {
            UNROLL
            for (int m = 0; m < kTiles; m++) {
                UNROLL
                for (int j = 0; j < kKeys / 8; j++) {
                    UNROLL
                    for (int i = 0; i < 4; i++) {
                        const int key = first_key + j * 8 + lane % 4 * 2 + i % 2;
                        const int query = first_row + m * 16 + lane / 4 + i / 2 * 8;
                        if (key >= now.keys || (causal && key > query)) scores[m][j][i] = -kInfinity;
                    }
                }
            }
        }

        // Between two softmaxes: the first one's sums are what it gives, the second begins; and when its sum is known.
        const bool begins = kAny && now.pass == kMeasure && first_key == 0, adds = kAny && now.pass == kAdd;
        if (begins || (adds && first_key == 0)) {
            UNROLL
            for (int m = 0; m < kTiles; m++) {
                UNROLL
                for (int half = 0; half < 2; half++) {
                    float sum = total[m][half];
                    sum += __shfl_xor_sync(kWholeWarp, sum, 1);
                    sum += __shfl_xor_sync(kWholeWarp, sum, 2);
                    if (adds) {
                        share[m][half] = args.weight2 / sum;
                        continue;
                    }
                    total[m][half] = 0.f;
                    largest[m][half] = -kInfinity;
                    UNROLL
                    for (int j = 0; j < kHeadDim / 8; j++) {
                        sums[m][j][half * 2] /= sum;
                        sums[m][j][half * 2 + 1] /= sum;
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
                const Rescale to = rescale(largest[m][half], max, scale);
                largest[m][half] = max;
                float sum = 0.f;
                UNROLL
                for (int j = 0; j < kKeys / 8; j++) {
                    UNROLL
                    for (int i = half * 2; i < half * 2 + 2; i++) {
                        scores[m][j][i] = exp2_approx(scores[m][j][i] * scale - to.shift);
                        sum += scores[m][j][i];
                        if (adds) scores[m][j][i] *= share[m][half];
                    }
                }
                total[m][half] = total[m][half] * to.correction + sum;
                // Not of the first softmax's result, which another's sums of 0 would make NaN if these were infinite.
                if (kAny && now.pass != kSoftmax) continue;
                UNROLL
                for (int j = 0; j < kHeadDim / 8; j++) {
                    sums[m][j][half * 2] *= to.correction;
                    sums[m][j][half * 2 + 1] *= to.correction;
                }
            }
        }

        UNROLL
        for (int j = 0; j < kKeys / 16; j++) {
            if (kAny && now.pass == kMeasure) continue;
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

        if (tile + 1 == tiles.count) break;
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
            const float factor = kAny && args.apart ? 1.f : 1.f / sum;
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
    store_tokens<kTiles * 16, kChunks, 32>(head.y, places, first_query + warp_row, shared.q + warp_row * kHeadDim, lane);
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
DEVICE void attention_wide(const AttentionArgs<T>& args) {
    SHARED_DYNAMIC(WideShared<T>, shared);
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const Head<T> head = this_head<true>(args, warp * kSlice);
    const int first_query = blockIdx.x * kWideRows;
    const KeyTiles<kWideKeys, true> tiles(args, first_query + kWideRows);
    const T* bias = this_bias(args);
    const TokenPlaces<true, false, T> places(args);
    const TokenPlaces<true, true, T> key_places(args);
    T *const my_k = shared.k[warp], *const my_v = shared.v[warp];

    load_tokens<kWideRows, kSliceChunks, 32>(my_v, head.q, places, first_query, lane);
    load_tokens<kWideKeys, kSliceChunks, 32>(my_k, head.k, key_places, 0, lane);
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
    float total = 0.f, largest = -kInfinity, share = 0.f;

    for (int tile = 0; tile < tiles.count; tile++) {
        const KeyTile now = tiles.at(args, tile);
        const int first_key = now.first;
        load_tokens<kWideKeys, kSliceChunks, 32>(my_v, rows_of(now, head.v, head.v2), key_places, first_key, lane);
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

        if (tile + 1 < tiles.count) {
            const KeyTile next = tiles.at(args, tile + 1);
            load_tokens<kWideKeys, kSliceChunks, 32>(my_k, rows_of(next, head.k, head.k2), key_places, next.first, lane);
        }
        cp_async_commit();
        // Between two softmaxes, as in the kernel above.
        const bool begins = now.pass == kMeasure && first_key == 0;
        float before = 1.f;
        if (begins || (now.pass == kAdd && first_key == 0)) {
            float sum = total;
            UNROLL
            for (int i = 1; i < 8; i *= 2) sum += __shfl_xor_sync(kWholeWarp, sum, i);
            share = args.weight2 / sum;
            before = begins ? 1.f / sum : 1.f;
            total = begins ? 0.f : total;
            largest = begins ? -kInfinity : largest;
        }
        float score[4] = {}, max = largest, sum = 0.f;
        UNROLL
        for (int w = 0; w < kWideWarps; w++) {
            const float4 term = *reinterpret_cast<const float4*>(&shared.terms[w][term_at(query, first_of_eight)]);
            score[0] += term.x;
            score[1] += term.y;
            score[2] += term.z;
            score[3] += term.w;
        }
        const bool has_bias = bias && !now.second;
        const float scale = has_bias ? 1.f : args.scale;
        UNROLL
        for (int i = 0; i < 4; i++) {
            const int key = first_key + first_of_eight + i;
            if (has_bias) score[i] = biased(score[i], args, bias, first_query + query, key);
            if (key >= now.keys || (args.causal && key > first_query + query)) score[i] = -kInfinity;
            max = fmaxf(max, score[i]);
        }
        UNROLL
        for (int i = 1; i < 8; i *= 2) max = fmaxf(max, __shfl_xor_sync(kWholeWarp, max, i));
        const Rescale to = rescale(largest, max, scale);
        largest = max;
        UNROLL
        for (int i = 0; i < 4; i++) {
            score[i] = exp2_approx(score[i] * scale - to.shift);
            sum += score[i];
            if (now.pass == kAdd) score[i] *= share;
        }
        total = total * to.correction + sum;
        T* p = chunk_at<kWideKeys / kChunk>(shared.p, query, first_of_eight / kChunk) + first_of_eight % kChunk;
        *reinterpret_cast<uint2*>(p) = make_uint2(pack2<T>(score[0], score[1]), pack2<T>(score[2], score[3]));
        if (thread % 8 == 0) shared.factor[query] = now.pass == kSoftmax ? to.correction : before;
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
                if (now.pass == kMeasure) continue;
                if (args.causal) {
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
    if (thread % 8 == 0) shared.factor[query] = args.apart ? 1.f : 1.f / total;
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
    store_tokens<kWideRows, kSliceChunks, 32>(head.y, places, first_query, my_k, lane);
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
DEVICE void attention_f32(const AttentionArgs<float>& args) {
    constexpr int kVColumns = kColumns < 64 ? kColumns : 64;
    SHARED_DYNAMIC(F32Shared<kVColumns>, shared);
    const int thread = threadIdx.x, column = thread % 16, first_row = thread / 16 * 4;
    const Head<float> head = this_head<true>(args, 0);
    const int first_query = blockIdx.x * kF32Rows, head_dim = args.head_dim;
    const KeyTiles<kF32Keys, true> tiles(args, first_query + kF32Rows);
    const float* bias = this_bias(args);
    const TokenPlaces<true, false, float> places(args);
    const TokenPlaces<true, true, float> key_places(args);
    float share[4] = {};
    float sums[4][kColumns / 16] = {}, total[4] = {}, largest[4] = {-kInfinity, -kInfinity, -kInfinity, -kInfinity};

    for (int tile = 0; tile < tiles.count; tile++) {
        const KeyTile now = tiles.at(args, tile);
        const int first_key = now.first;
        const Rows<const float> k = rows_of(now, head.k, head.k2), v = rows_of(now, head.v, head.v2);
        float scores[4][4] = {};
        for (int d = 0; d < head_dim; d += kDepth) {
            const int depth = min(kDepth, head_dim - d);
            __syncthreads();
            for (int i = thread; i < kF32Rows * kDepth; i += kF32Threads) {
                const int row = i / kDepth, c = i % kDepth;
                const bool inside = GUARD(c < depth);
                const float* from = head.q.data + places.of(first_query + row) * head.q.stride + d + c;
                shared.q[row][c] = inside && GUARD(first_query + row < head.q.count) ? *from : 0.f;
                from = k.data + key_places.of(first_key + row) * k.stride + d + c;
                shared.k[row][c] = inside && GUARD(first_key + row < k.count) ? *from : 0.f;
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
            const int query = first_query + first_row + r;
            seen[r] = min(kF32Keys, now.keys - first_key);
            if (args.causal) seen[r] = min(seen[r], max(0, query + 1 - first_key));
            // Between two softmaxes, as in the kernels above.
            const bool begins = now.pass == kMeasure && first_key == 0;
            if (begins || (now.pass == kAdd && first_key == 0)) {
                float sum = total[r];
                UNROLL
                for (int i = 1; i < 16; i *= 2) sum += __shfl_xor_sync(kWholeWarp, sum, i);
                share[r] = args.weight2 / sum;
                if (begins) {
                    total[r] = 0.f;
                    largest[r] = -kInfinity;
                    UNROLL
                    for (int j = 0; j < kColumns / 16; j++) sums[r][j] /= sum;
                }
            }
            const bool has_bias = bias && !now.second;
            const float scale = has_bias ? 1.f : args.scale;
            float max = largest[r], sum = 0.f;
            UNROLL
            for (int j = 0; j < 4; j++) {
                if (has_bias) scores[r][j] = biased(scores[r][j], args, bias, query, first_key + column + j * 16);
                if (column + j * 16 >= seen[r]) scores[r][j] = -kInfinity;
                max = fmaxf(max, scores[r][j]);
            }
            UNROLL
            for (int i = 1; i < 16; i *= 2) max = fmaxf(max, __shfl_xor_sync(kWholeWarp, max, i));
            const float shift = max == -kInfinity ? 0.f : max;
            const float correction = exp2_approx((largest[r] - shift) * scale);
            largest[r] = max;
            UNROLL
            for (int j = 0; j < 4; j++) {
                const float p = exp2_approx((scores[r][j] - shift) * scale);
                sum += p;
                shared.p[first_row + r][column + j * 16] = now.pass == kAdd ? p * share[r] : p;
            }
            total[r] = total[r] * correction + sum;
            if (now.pass != kSoftmax) continue;
            UNROLL
            for (int j = 0; j < kColumns / 16; j++) sums[r][j] *= correction;
        }

        UNROLL
        for (int d = 0; d < kColumns; d += kVColumns) {
            if (now.pass == kMeasure) continue;
            __syncthreads();
            for (int i = thread; i < kF32Keys * kVColumns; i += kF32Threads) {
                const int row = i / kVColumns, c = i % kVColumns;
                const bool inside = GUARD(first_key + row < v.count) && GUARD(d + c < head_dim);
                const float* from = v.data + key_places.of(first_key + row) * v.stride + d + c;
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
            if (GUARD(row < head.y.count) && GUARD(c < head_dim)) {
                head.y.data[places.of(row) * head.y.stride + c] = args.apart ? sums[r][j] : sums[r][j] / sum;
            }
        }
    }
}

#define TIER(T, suffix, head_dim, tiles, keys, any, blocks)                                    \
    KERNEL(attention_##suffix, kWarps * 32, blocks)(AttentionArgs<T> args) {                   \
        follow_previous();                                                                     \
        attention<T, head_dim, tiles, keys, any>(args);                                        \
    }                                                                                          \
    REGISTER_KERNEL(attention_##suffix)

#define TIERS(T, suffix)                                                                       \
    TIER(T, d16_any_##suffix, 16, 1, 64, true, 3)                                              \
    TIER(T, d32_any_##suffix, 32, 1, 64, true, 3)                                              \
    TIER(T, d64_any_##suffix, 64, 1, 64, true, 2)                                              \
    TIER(T, d160_any_##suffix, 160, 1, 32, true, 2)                                            \
    TIER(T, d32_##suffix, 32, 1, 64, false, 4)                                                 \
    TIER(T, d48_##suffix, 48, 1, 64, false, 3)                                                 \
    TIER(T, d64_##suffix, 64, 1, 64, false, 3)                                                 \
    TIER(T, d80_##suffix, 80, 1, 64, false, 2)                                                 \
    TIER(T, d128_##suffix, 128, 1, 64, false, 2)                                               \
    TIER(T, d160_##suffix, 160, 1, 32, false, 2)                                               \
    TIER(T, d48_long_##suffix, 48, 2, 64, false, 2)                                            \
    TIER(T, d64_long_##suffix, 64, 2, 64, false, 2)                                            \
    TIER(T, d80_long_##suffix, 80, 2, 64, false, 2)                                            \
    KERNEL(attention_d512_##suffix, kWideThreads, 1)(AttentionArgs<T> args) {                  \
        follow_previous();                                                                     \
        attention_wide<T>(args);                                                               \
    }                                                                                          \
    REGISTER_KERNEL(attention_d512_##suffix)

#define F32_TIER(head_dim)                                                                     \
    KERNEL(attention_d##head_dim##_f32, kF32Threads, 1)(AttentionArgs<float> args) {           \
        follow_previous();                                                                     \
        attention_f32<head_dim>(args);                                                         \
    }                                                                                          \
    REGISTER_KERNEL(attention_d##head_dim##_f32)

TIERS(f16, f16)
TIERS(bf16, bf16)
F32_TIER(32)
F32_TIER(64)
F32_TIER(128)
F32_TIER(192)
F32_TIER(512)
