// sm90/attention.cu: attention (common/attention.cuh) by wgmma and TMA, for Hopper (sm_90a): f16 and bf16, heads of 40, 64,
//   80, 128, 160 and 512, all operands aligned to 16 bytes; neither causal nor with bias; two softmaxes only of up to
//   kShortKeys and kSecondKeys keys. What does not fit is for attention.cu.
// A block is a producer warpgroup and kConsumers consumer warpgroups of 64 queries each. One thread of the producer copies
//   tiles of keys and of values into two rings by TMA; a consumer multiplies out of them by wgmma: s = q k^T into registers,
//   where it becomes p, which goes from there into p v as it is; the values are read transposed by their descriptor. The
//   next tile's q k^T and this one's p v are under way while p is computed. Blocks are persistent: each does every
//   gridDim.x-th tile of queries. Text (up to kShortKeys keys) has a kernel without a ring.
// Maps, boxes of 64 columns, 1 head: q [N, queries, heads, d] 64 tokens, k and v [R, keys, heads, d] kKeys tokens, k2 and v2
//   likewise (kSecondKeys tokens where they have a softmax of their own; not read where there are none). What a box has
//   beyond a head or its tokens is 0, so that no other head's, no other image's NaN comes in. The entries for windows have
//   q, k and v as [N, map_h, map_w, heads, d], boxes of kBoxSide x kBoxSide tokens: windows and shifts are multiples of that.
// An element's sums run over the keys from the last tile to the first, whatever the tile of queries: the entries with a ring
//   for a width give the same bits.
// Launch: attention_sm90_<tile>_<dtype>; grid: up to the number of tiles, as many as run at once; block
//   AttentionTile::kThreads; dynamic shared memory sizeof(AttentionShared). attention_sm90_<width>_short_<dtype>: grid
//   (ceil(queries / 64), heads, N), block 128, sizeof(ShortShared). src/ops/cuda/attention_sm90.rs has the table and who
//   picks from it.
#include "common/attention.cuh"
#include "common/hopper.cuh"
#include "sm90/ring.cuh"

constexpr int kRows = 64;       // queries of a warpgroup, what one wgmma makes
constexpr int kBoxColumns = 64;  // 128 bytes, the width of the swizzle
constexpr int kBoxSide = 8;      // rows and columns of a window's boxes, of kRows tokens
constexpr int kShortKeys = 80, kSecondKeys = 16;

// The shape of a block's work. kColumns: of v and y; the other columns of the head are another tile's, which computes the
// same scores.
template <class T_, int kHeadDim_, int kColumns_, int kConsumers_, int kKeys_, int kStages_, bool kWindows_ = false>
struct AttentionTile {
    using T = T_;
    static constexpr int kHeadDim = kHeadDim_, kColumns = kColumns_, kConsumers = kConsumers_, kKeys = kKeys_;
    static constexpr int kStages = kStages_, kThreads = 128 * (1 + kConsumers), kParts = kHeadDim / kColumns;
    static constexpr bool kWindows = kWindows_;
    static constexpr int kDepthBoxes = (kHeadDim + 63) / 64, kColumnBoxes = (kColumns + 63) / 64;
    static_assert(kHeadDim % 8 == 0 && kKeys % 16 == 0 && kKeys <= 256 && kColumns <= 256 && kHeadDim % kColumns == 0);
    static_assert(kParts == 1 || kColumns % kBoxColumns == 0);
    static_assert(!kWindows || (kKeys % kRows == 0 && kRows == kBoxSide * kBoxSide));
};

template <class Tile>
struct alignas(1024) AttentionShared {
    using T = typename Tile::T;
    T q[Tile::kConsumers][Tile::kDepthBoxes * kRows * kBoxColumns];
    T k[Tile::kStages][Tile::kDepthBoxes * Tile::kKeys * kBoxColumns];
    T v[Tile::kStages][Tile::kColumnBoxes * Tile::kKeys * kBoxColumns];
    uint64_t q_full[Tile::kConsumers], q_empty[Tile::kConsumers];
    uint64_t k_full[Tile::kStages], k_empty[Tile::kStages], v_full[Tile::kStages], v_empty[Tile::kStages];
};

// A tile of queries: its first query, the columns of y.
struct Job {
    int first, column, head, image;
};
template <class Tile, class T>
DEVICE Job job_of(const AttentionArgs<T>& args, int tile) {
    const int rows = Tile::kConsumers * kRows, down = (args.queries + rows - 1) / rows;
    const int rest = tile / down, head = rest / Tile::kParts;
    return {tile % down * rows, rest % Tile::kParts * Tile::kColumns, head % args.heads, head / args.heads};
}
template <class Tile, class T>
DEVICE int job_count(const AttentionArgs<T>& args) {
    const int rows = Tile::kConsumers * kRows;
    return (args.queries + rows - 1) / rows * Tile::kParts * args.heads * args.images;
}

// ---- copies: by one thread ----

// Boxes of kTokens rows, one behind the other; `full` counts their bytes.
template <int kTokens, int kBoxes, class T>
DEVICE void load_boxes(T* to, const TensorMap* map, uint64_t* full, int column, int head, int token, int image) {
    mbar_arrive_expect_tx(full, kTokens * kBoxes * kBoxColumns * 2);
    UNROLL
    for (int i = 0; i < kBoxes; i++) {
        tma_load_4d(to + i * kTokens * kBoxColumns, map, full, column + i * kBoxColumns, head, token, image);
    }
}

struct Maps {
    const TensorMap *q, *k, *v, *k2, *v2;
};

template <int kTokens_, int kCount_>
struct Boxes {
    static constexpr int kTokens = kTokens_, kCount = kCount_;
};

// The same of a window, whose tokens are in the order of its boxes: softmax is blind to the order of keys. Shifts, windows
// and so the map are whole boxes, none of which crosses an edge. What is behind the window's last box is an image that there
// is not: zeros.
template <int kTokens, int kBoxes, class T>
DEVICE void load_window(T* to, const TensorMap* map, uint64_t* full, int head, int token, const WindowPlace& place,
                        const AttentionArgs<T>& args) {
    mbar_arrive_expect_tx(full, kTokens * kBoxes * kBoxColumns * 2);
    const int across = args.window_w / kBoxSide;
    ROLLED
    for (int i = 0; i < kTokens / kRows; i++) {
        const int box = token / kRows + i;
        const int y = (place.top + box / across * kBoxSide) % args.map_h, x = (place.left + box % across * kBoxSide) % args.map_w;
        const int image = GUARD(box * kRows < args.keys) ? place.image : args.images;
        UNROLL
        for (int c = 0; c < kBoxes; c++) {
            tma_load_5d(to + (c * kTokens + i * kRows) * kBoxColumns, map, full, c * kBoxColumns, head, x, y, image);
        }
    }
}
// Token i of a window in that order, among those of all images.
template <class T>
DEVICE int64_t box_token(const AttentionArgs<T>& args, const WindowPlace& place, int i) {
    const int across = args.window_w / kBoxSide, box = i / kRows, inside = i % kRows;
    return map_token(args, place, box / across * kBoxSide + inside / kBoxSide, box % across * kBoxSide + inside % kBoxSide);
}

// Tiles of keys: those of the first source, then the second's.
template <class Tile>
struct KeyTiles {
    int first, count;
};
template <class Tile, class T>
DEVICE KeyTiles<Tile> key_tiles(const AttentionArgs<T>& args) {
    const int first = (args.keys + Tile::kKeys - 1) / Tile::kKeys;
    return {first, first + (args.keys2 + Tile::kKeys - 1) / Tile::kKeys};
}

template <class Tile, class T>
DEVICE void produce(AttentionShared<Tile>& s, const Maps& maps, const AttentionArgs<T>& args) {
    const KeyTiles<Tile> tiles = key_tiles<Tile>(args);
    const int jobs = job_count<Tile>(args);
    RingPosition<Tile> at_k = {0, 0}, at_v = {0, 0};
    uint32_t q_parity = 1;  // a fresh barrier counts as emptied
    for (int tile = blockIdx.x; tile < jobs; tile += gridDim.x) {
        const Job job = job_of<Tile>(args, tile);
        const int image = job.image / args.images_per_kv, image2 = job.image / args.images_per_kv2;
        WindowPlace place = {};
        if constexpr (Tile::kWindows) place = window_place(args, job.image);
        const auto load = [&](auto* to, const TensorMap* map, uint64_t* full, int column, int token, int of_image, auto boxes) {
            constexpr int kTokens = boxes.kTokens, kBoxes = boxes.kCount;
            if constexpr (Tile::kWindows) {
                load_window<kTokens, kBoxes>(to, map, full, job.head, token, place, args);
            } else {
                load_boxes<kTokens, kBoxes>(to, map, full, column, job.head, token, of_image);
            }
        };
        for (int i = 0; i < Tile::kConsumers; i++) {
            mbar_wait(&s.q_empty[i], q_parity);
            load(s.q[i], maps.q, &s.q_full[i], 0, job.first + i * kRows, job.image, Boxes<kRows, Tile::kDepthBoxes>());
        }
        q_parity ^= 1;
        // Keys one tile ahead of values, as they are used.
        for (int j = tiles.count - 1; j >= -1; j--) {
            if (j >= 0) {
                const bool second = j >= tiles.first;
                mbar_wait(&s.k_empty[at_k.stage], at_k.parity ^ 1);
                load(s.k[at_k.stage], second ? maps.k2 : maps.k, &s.k_full[at_k.stage], 0,
                     (second ? j - tiles.first : j) * Tile::kKeys, second ? image2 : image,
                     Boxes<Tile::kKeys, Tile::kDepthBoxes>());
                advance(at_k);
            }
            const int before = j + 1;
            if (before < tiles.count) {
                const bool second = before >= tiles.first;
                mbar_wait(&s.v_empty[at_v.stage], at_v.parity ^ 1);
                load(s.v[at_v.stage], second ? maps.v2 : maps.v, &s.v_full[at_v.stage], job.column,
                     (second ? before - tiles.first : before) * Tile::kKeys, second ? image2 : image,
                     Boxes<Tile::kKeys, Tile::kColumnBoxes>());
                advance(at_v);
            }
        }
    }
}

// ---- products ----
//
// q and k: 64 columns further is a box further.

// v, transposed: 64 columns further is a box of kKeys rows further.
template <int kKeys>
DEVICE uint32_t along_keys(const void* boxes) {
    return uint32_t(wgmma_desc128(smem_u32(boxes), kKeys * kBoxColumns * 2, 1024));
}

// scores = q k^T [64, kKeys], asynchronously.
template <class Tile, int kKeys>
DEVICE void multiply_keys(float (&scores)[kKeys / 2], uint32_t q, uint32_t k) {
    // Computed here: the descriptors of a ring of one stage never change, and would be kept from tile to tile in registers.
    fence_register(q);
    fence_register(k);
    UNROLL
    for (int i = 0; i < (Tile::kHeadDim + 15) / 16; i++) {
        const int box = i / 4, inside = i % 4 * 32 / kDescriptorUnit;
        wgmma<typename Tile::T, kKeys>(scores, descriptor(q + box * (kRows * 128 / kDescriptorUnit) + inside),
                                       descriptor(k + box * (kKeys * 128 / kDescriptorUnit) + inside), i > 0);
    }
}

// sums += p v [64, kColumns], asynchronously.
template <class Tile, int kKeys>
DEVICE void add_values(float (&sums)[Tile::kColumns / 2], const uint32_t (&p)[kKeys / 16][4], uint32_t v) {
    UNROLL
    for (int i = 0; i < kKeys / 16; i++) {
        wgmma_registers<typename Tile::T, Tile::kColumns, 1>(sums, p[i], descriptor(v + i * (16 * 128 / kDescriptorUnit)), true);
    }
}

template <int N>
DEVICE void fence_registers(float (&x)[N]) {
    UNROLL
    for (int i = 0; i < N; i++) fence_register(x[i]);
}
template <int N>
DEVICE void fence_registers(uint32_t (&x)[N][4]) {
    UNROLL
    for (int i = 0; i < N; i++) {
        UNROLL
        for (int j = 0; j < 4; j++) fence_register(x[i][j]);
    }
}

// ---- softmax, in registers: register i of a thread is of its upper row where i % 4 < 2, else of that 8 below ----

struct Softmax {
    float largest[2] = {-kInfinity, -kInfinity};
    float total[2] = {};  // of this thread's columns
};

// The sum of all of a row's p.
DEVICE float row_total(const Softmax& softmax, int half) {
    float total = softmax.total[half];
    total += __shfl_xor_sync(kWholeWarp, total, 1);
    total += __shfl_xor_sync(kWholeWarp, total, 2);
    return total;
}

// Scores of keys from `count` on become -inf.
template <int N>
DEVICE void mask_keys(float (&scores)[N], int count) {
    const int column = threadIdx.x % 4 * 2;
    UNROLL
    for (int i = 0; i < N; i++) {
        if (!GUARD(i / 4 * 8 + i % 2 + column < count)) scores[i] = -kInfinity;
    }
}

// Scores become p; `correction`: for the sums so far.
template <int N>
DEVICE void exponentials(float (&scores)[N], Softmax& softmax, float scale, float (&correction)[2]) {
    float shift[2];
    UNROLL
    for (int half = 0; half < 2; half++) {
        // Two chains, half as long.
        float max = scores[half * 2], other = scores[half * 2 + 1];
        UNROLL
        for (int i = 4 + half * 2; i < N; i += 4) {
            max = fmaxf(max, scores[i]);
            other = fmaxf(other, scores[i + 1]);
        }
        max = fmaxf(softmax.largest[half], fmaxf(max, other));
        max = fmaxf(max, __shfl_xor_sync(kWholeWarp, max, 1));
        max = fmaxf(max, __shfl_xor_sync(kWholeWarp, max, 2));
        const Rescale to = rescale(softmax.largest[half], max, scale);
        softmax.largest[half] = max;
        softmax.total[half] *= to.correction;
        shift[half] = to.shift;
        correction[half] = to.correction;
    }
    UNROLL
    for (int i = 0; i < N; i++) {
        scores[i] = exp2_approx(fmaf(scores[i], scale, -shift[i / 2 % 2]));
        softmax.total[i / 2 % 2] += scores[i];
    }
}

// p as the second product's operand: what a thread has of 16 keys is what it needs of them.
template <class T, int N>
DEVICE void pack(uint32_t (&p)[N / 8][4], const float (&scores)[N]) {
    UNROLL
    for (int i = 0; i < N / 2; i++) p[i / 4][i % 4] = pack2<T>(scores[i * 2], scores[i * 2 + 1]);
}

// ---- the way out ----

// Four registers in each of four lanes are transposed: lane i gets registers i of the four.
DEVICE void transpose_quad(uint32_t (&r)[4]) {
    UNROLL
    for (int step = 1; step < 4; step *= 2) {
        const bool upper = threadIdx.x & step;
        UNROLL
        for (int i = 0; i < 4; i++) {
            if (i & step) continue;
            const uint32_t got = __shfl_xor_sync(kWholeWarp, upper ? r[i] : r[i + step], step);
            r[i] = upper ? got : r[i];
            r[i + step] = upper ? r[i + step] : got;
        }
    }
}

// y = factor sums, by the four lanes that have a row.
template <class Tile, class T>
DEVICE void store(const AttentionArgs<T>& args, const Job& job, int first_row, const float (&sums)[Tile::kColumns / 2],
                  float upper_factor, float lower_factor) {
    constexpr int kChunks = Tile::kColumns / 8;
    const int lane = threadIdx.x % 4;
    UNROLL
    for (int half = 0; half < 2; half++) {
        const float factor = half ? lower_factor : upper_factor;
        const int row = first_row + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + half * 8;
        const bool inside = GUARD(row < args.queries);
        int64_t token = int64_t(job.image) * args.queries + row;
        if constexpr (Tile::kWindows) token = box_token(args, window_place(args, job.image), row);
        T* to = args.y + (token * args.heads + job.head) * Tile::kHeadDim + job.column;
        const auto pair = [&](int chunk) {
            return pack2<T>(sums[chunk * 4 + half * 2] * factor, sums[chunk * 4 + half * 2 + 1] * factor);
        };
        UNROLL
        for (int chunk = 0; chunk + 4 <= kChunks; chunk += 4) {
            uint32_t r[4] = {pair(chunk), pair(chunk + 1), pair(chunk + 2), pair(chunk + 3)};
            transpose_quad(r);
            if (inside) *reinterpret_cast<uint4*>(to + (chunk + lane) * 8) = make_uint4(r[0], r[1], r[2], r[3]);
        }
        UNROLL
        for (int chunk = kChunks / 4 * 4; chunk < kChunks; chunk++) {
            const uint32_t two = pair(chunk);
            if (inside) *reinterpret_cast<uint32_t*>(to + chunk * 8 + lane * 2) = two;
        }
    }
}

// ---- a consumer warpgroup ----

template <class Tile, class T>
DEVICE void consume(AttentionShared<Tile>& s, const AttentionArgs<T>& args, int consumer) {
    constexpr int kKeys = Tile::kKeys, kConsumers = Tile::kConsumers;
    const KeyTiles<Tile> tiles = key_tiles<Tile>(args);
    const int jobs = job_count<Tile>(args);
    const bool speaks = threadIdx.x % 32 == 0;
    const uint32_t q = descriptor_low(s.q[consumer]), k = descriptor_low(s.k), v = along_keys<kKeys>(s.v);
    constexpr int kStepK = sizeof(s.k[0]) / kDescriptorUnit, kStepV = sizeof(s.v[0]) / kDescriptorUnit;
    // Warpgroups issue their products in turn, so that one's fill the time of the other's exponentials: the barrier of a
    // turn is armed by whose turn was before. The last turn given is taken after the last tile.
    constexpr bool kTurns = kConsumers > 1;
    const int turn = 1 + consumer, next_turn = 1 + (consumer + 1) % kConsumers;
    if (kTurns && consumer == kConsumers - 1) {
        named_barrier_arrive(next_turn, 256);
    }

    RingPosition<Tile> at_k = {0, 0}, at_v = {0, 0};
    uint32_t q_parity = 0;
    for (int tile = blockIdx.x; tile < jobs; tile += gridDim.x) {
        const Job job = job_of<Tile>(args, tile);
        float scores[kKeys / 2], sums[Tile::kColumns / 2], correction[2];
        uint32_t p[kKeys / 16][4];
        Softmax softmax;

        mbar_wait(&s.q_full[consumer], q_parity);
        q_parity ^= 1;
        mbar_wait(&s.k_full[at_k.stage], at_k.parity);
        wgmma_fence();
        multiply_keys<Tile, kKeys>(scores, q, k + at_k.stage * kStepK);
        wgmma_commit();
        UNROLL
        for (int i = 0; i < Tile::kColumns / 2; i++) sums[i] = 0.f;
        wgmma_wait<0>();
        fence_registers(scores);
        if (speaks) {
            mbar_arrive(&s.k_empty[at_k.stage]);
            if (tiles.count == 1) {
                mbar_arrive(&s.q_empty[consumer]);
            }
        }
        advance(at_k);
        const bool of_second = tiles.count > tiles.first;
        mask_keys(scores, of_second ? args.keys2 - (tiles.count - tiles.first - 1) * kKeys
                                    : args.keys - (tiles.first - 1) * kKeys);
        exponentials(scores, softmax, args.scale, correction);
        pack<T>(p, scores);

        for (int j = tiles.count - 2; j >= 0; j--) {
            mbar_wait(&s.k_full[at_k.stage], at_k.parity);
            if (kTurns) {
                named_barrier_sync(turn, 256);
            }
            fence_registers(p);
            fence_registers(sums);
            wgmma_fence();
            multiply_keys<Tile, kKeys>(scores, q, k + at_k.stage * kStepK);
            wgmma_commit();
            mbar_wait(&s.v_full[at_v.stage], at_v.parity);
            wgmma_fence();
            add_values<Tile, kKeys>(sums, p, v + at_v.stage * kStepV);
            wgmma_commit();
            if (kTurns) {
                named_barrier_arrive(next_turn, 256);
            }
            wgmma_wait<1>();
            fence_registers(scores);
            if (speaks) {
                mbar_arrive(&s.k_empty[at_k.stage]);
                if (j == 0) {
                    mbar_arrive(&s.q_empty[consumer]);
                }
            }
            advance(at_k);
            // The end of the first source, before the second.
            if (j == tiles.first - 1) mask_keys(scores, args.keys - j * kKeys);
            exponentials(scores, softmax, args.scale, correction);
            fence_registers(scores);
            work_before_wait(softmax.total[0] + softmax.total[1]);
            wgmma_wait<0>();
            fence_registers(sums);
            fence_registers(scores);
            if (speaks) {
                mbar_arrive(&s.v_empty[at_v.stage]);
            }
            advance(at_v);
            UNROLL
            for (int i = 0; i < Tile::kColumns / 2; i++) sums[i] *= correction[i / 2 % 2];
            pack<T>(p, scores);
        }

        mbar_wait(&s.v_full[at_v.stage], at_v.parity);
        fence_registers(p);
        fence_registers(sums);
        wgmma_fence();
        add_values<Tile, kKeys>(sums, p, v + at_v.stage * kStepV);
        wgmma_commit();
        wgmma_wait<0>();
        fence_registers(sums);
        if (speaks) {
            mbar_arrive(&s.v_empty[at_v.stage]);
        }
        advance(at_v);
        store<Tile>(args, job, job.first + consumer * kRows, sums, 1.f / row_total(softmax, 0), 1.f / row_total(softmax, 1));
    }
    if (kTurns && consumer == 0) {
        named_barrier_sync(turn, 256);
    }
}

template <class Tile, class T>
DEVICE void attention_sm90(const Maps& maps, const AttentionArgs<T>& args) {
    SHARED_DYNAMIC(AttentionShared<Tile>, s);
    const int group = __shfl_sync(kWholeWarp, int(threadIdx.x) / 128, 0);
    if (threadIdx.x == 0) {
        for (int i = 0; i < Tile::kConsumers; i++) {
            mbar_init(&s.q_full[i], 1);
            mbar_init(&s.q_empty[i], 4);
        }
        for (int i = 0; i < Tile::kStages; i++) {
            mbar_init(&s.k_full[i], 1);
            mbar_init(&s.v_full[i], 1);
            mbar_init(&s.k_empty[i], 4 * Tile::kConsumers);
            mbar_init(&s.v_empty[i], 4 * Tile::kConsumers);
        }
        mbar_fence_init();
        tma_prefetch_map(maps.q);
        tma_prefetch_map(maps.k);
        tma_prefetch_map(maps.v);
    }
    next_may_start();
    wait_for_previous();
    __syncthreads();
    // One consumer: the block's registers suffice as they are.
    if (group == 0) {
        if constexpr (Tile::kConsumers > 1) {
            setmaxnreg_dec<32>();
        }
        if (threadIdx.x == 0) produce<Tile>(s, maps, args);
    } else {
        if constexpr (Tile::kConsumers > 1) {
            setmaxnreg_inc<Tile::kConsumers == 2 ? 232 : 160>();
        }
        consume<Tile>(s, args, group - 1);
    }
}

// ---- all keys in one tile ----
//
// No producer and no ring: a block is one warpgroup, and several share a multiprocessor. Of a second softmax the keys are one
// smaller tile; the first one's sums become its result before the second's values are added to them.

template <class Tile>
struct ShortShared {
    using T = typename Tile::T;
    AttentionShared<Tile> first;
    T k2[Tile::kDepthBoxes * kSecondKeys * kBoxColumns];
    T v2[Tile::kColumnBoxes * kSecondKeys * kBoxColumns];
    uint64_t full2;
};

// scores = q k^T, then p, of one tile.
template <class Tile, int kKeys>
DEVICE void weigh(uint32_t (&p)[kKeys / 16][4], Softmax& softmax, const void* q, const void* k, int keys, float scale,
                  const float* weight) {
    float scores[kKeys / 2], correction[2];
    wgmma_fence();
    multiply_keys<Tile, kKeys>(scores, descriptor_low(q), descriptor_low(k));
    wgmma_commit();
    wgmma_wait<0>();
    fence_registers(scores);
    mask_keys(scores, keys);
    exponentials(scores, softmax, scale, correction);
    if (weight) {
        const float share[2] = {*weight / row_total(softmax, 0), *weight / row_total(softmax, 1)};
        UNROLL
        for (int i = 0; i < kKeys / 2; i++) scores[i] *= share[i / 2 % 2];
    }
    pack<typename Tile::T>(p, scores);
}

template <class Tile, int kKeys>
DEVICE void add_tile(float (&sums)[Tile::kColumns / 2], uint32_t (&p)[kKeys / 16][4], const void* v) {
    fence_registers(p);
    fence_registers(sums);
    wgmma_fence();
    add_values<Tile, kKeys>(sums, p, along_keys<kKeys>(v));
    wgmma_commit();
    wgmma_wait<0>();
    fence_registers(sums);
}

template <class Tile, class T>
DEVICE void attention_short(const Maps& maps, const AttentionArgs<T>& args) {
    constexpr int kKeys = Tile::kKeys;
    SHARED_DYNAMIC(ShortShared<Tile>, shared);
    AttentionShared<Tile>& s = shared.first;
    const Job job = {int(blockIdx.x) * kRows, 0, int(blockIdx.y), int(blockIdx.z)};
    if (threadIdx.x == 0) {
        mbar_init(&s.q_full[0], 1);
        mbar_init(&s.k_full[0], 1);
        mbar_init(&s.v_full[0], 1);
        mbar_init(&shared.full2, 2);
        mbar_fence_init();
    }
    next_may_start();
    wait_for_previous();
    __syncthreads();
    if (threadIdx.x == 0) {
        const int image = job.image / args.images_per_kv, image2 = job.image / args.images_per_kv2;
        load_boxes<kKeys, Tile::kDepthBoxes>(s.k[0], maps.k, &s.k_full[0], 0, job.head, 0, image);
        load_boxes<kRows, Tile::kDepthBoxes>(s.q[0], maps.q, &s.q_full[0], 0, job.head, job.first, job.image);
        load_boxes<kKeys, Tile::kColumnBoxes>(s.v[0], maps.v, &s.v_full[0], 0, job.head, 0, image);
        if (args.apart) {
            load_boxes<kSecondKeys, Tile::kDepthBoxes>(shared.k2, maps.k2, &shared.full2, 0, job.head, 0, image2);
            load_boxes<kSecondKeys, Tile::kColumnBoxes>(shared.v2, maps.v2, &shared.full2, 0, job.head, 0, image2);
        }
    }
    float sums[Tile::kColumns / 2];
    uint32_t p[kKeys / 16][4];
    Softmax softmax;
    mbar_wait(&s.k_full[0], 0);
    mbar_wait(&s.q_full[0], 0);
    weigh<Tile, kKeys>(p, softmax, s.q[0], s.k[0], args.keys, args.scale, nullptr);
    UNROLL
    for (int i = 0; i < Tile::kColumns / 2; i++) sums[i] = 0.f;
    mbar_wait(&s.v_full[0], 0);
    add_tile<Tile, kKeys>(sums, p, s.v[0]);
    float factor[2] = {1.f / row_total(softmax, 0), 1.f / row_total(softmax, 1)};
    if (args.apart) {
        UNROLL
        for (int i = 0; i < Tile::kColumns / 2; i++) sums[i] *= factor[i / 2 % 2];
        factor[0] = factor[1] = 1.f;
        uint32_t p2[kSecondKeys / 16][4];
        Softmax second;
        mbar_wait(&shared.full2, 0);
        weigh<Tile, kSecondKeys>(p2, second, s.q[0], shared.k2, args.keys2, args.scale, &args.weight2);
        add_tile<Tile, kSecondKeys>(sums, p2, shared.v2);
    }
    store<Tile>(args, job, job.first, sums, factor[0], factor[1]);
}

#define ENTRY(name, T, threads, blocks, function, ...)                                                         \
    KERNEL(name, threads, blocks)                                                                              \
    (GRID_CONST TensorMap q, GRID_CONST TensorMap k, GRID_CONST TensorMap v, GRID_CONST TensorMap k2,          \
     GRID_CONST TensorMap v2, GRID_CONST AttentionArgs<T> args) {                                              \
        const Maps maps = {&q, &k, &v, &k2, &v2};                                                              \
        function<AttentionTile<T, __VA_ARGS__>>(maps, args);                                                   \
    }                                                                                                          \
    REGISTER_KERNEL(name)
#define RING(tile, suffix, T, ...) \
    ENTRY(attention_sm90_##tile##_##suffix, T, (AttentionTile<T, __VA_ARGS__>::kThreads), 1, attention_sm90, __VA_ARGS__)
#define SHORT(tile, suffix, T, head_dim, blocks) \
    ENTRY(attention_sm90_##tile##_##suffix, T, 128, blocks, attention_short, head_dim, head_dim, 1, kShortKeys, 1)

// Tile; head_dim, columns of a block, consumers, keys of a tile, stages, whether of windows. SHORT: head_dim, blocks per
// multiprocessor that the registers must leave room for.
#define ATTENTIONS(suffix, T)                                 \
    RING(d40_192, suffix, T, 40, 40, 3, 128, 2)               \
    RING(d64_192, suffix, T, 64, 64, 3, 128, 2)               \
    RING(d64_128, suffix, T, 64, 64, 2, 128, 3)               \
    RING(d80_128, suffix, T, 80, 80, 2, 128, 2)               \
    RING(d128_128, suffix, T, 128, 128, 2, 128, 2)            \
    RING(d160_128, suffix, T, 160, 160, 2, 64, 2)             \
    RING(d512_128, suffix, T, 512, 256, 2, 64, 1)             \
    RING(d512_64, suffix, T, 512, 256, 1, 64, 1)              \
    RING(d40_192_windows, suffix, T, 40, 40, 3, 128, 2, true) \
    RING(d64_192_windows, suffix, T, 64, 64, 3, 128, 2, true) \
    SHORT(d40_short, suffix, T, 40, 4)                        \
    SHORT(d64_short, suffix, T, 64, 4)                        \
    SHORT(d80_short, suffix, T, 80, 3)                        \
    SHORT(d128_short, suffix, T, 128, 2)                      \
    SHORT(d160_short, suffix, T, 160, 2)

ATTENTIONS(f16, f16)
ATTENTIONS(bf16, bf16)
