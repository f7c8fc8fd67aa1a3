// conformance_tma.cu: what TMA, clusters and hand-over between blocks do, as raw numbers. Not part of any op: tests/ops/
// conformance_tma.rs computes the same from the PTX ISA, for the emulated card and a real one. launch.cu has the plainer cases.
#include "common/hopper.cuh"

constexpr uint32_t kUntouched = 0xeeeeeeee;
constexpr int kWords = 4096;
struct Shared {
    alignas(1024) uint32_t words[kWords];
    uint64_t bar;
};

// Shared memory after a box of rank 1, 3 or 5 has come: kUntouched where nothing was written. No wait is for ever, so that
// a wrong number of bytes shows as such. out [4096], then whether the bytes came. Grid 1, block 128, shared: a Shared.
KERNEL(conformance_tma_load, 128, 1)(uint32_t* out, GRID_CONST TensorMap map, int rank, int c0, int c1, int c2, int c3, int c4,
                                     int bytes) {
    follow_previous();
    SHARED_DYNAMIC(Shared, s);
    for (int i = threadIdx.x; i < kWords; i += 128) s.words[i] = kUntouched;
    fence_proxy_async();
    if (threadIdx.x == 0) {
        mbar_init(&s.bar, 1);
        mbar_fence_init();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        tma_prefetch_map(&map);
        mbar_expect(&s.bar, uint32_t(bytes));
        if (rank == 1) tma_load_1d(s.words, &map, &s.bar, c0);
        if (rank == 2) tma_load_2d(s.words, &map, &s.bar, c0, c1);
        if (rank == 3) tma_load_3d(s.words, &map, &s.bar, c0, c1, c2);
        if (rank == 5) tma_load_5d(s.words, &map, &s.bar, c0, c1, c2, c3, c4);
        mbar_arrive_count(&s.bar, 1);
    }
    int polls = 0;
    while (!mbar_try(&s.bar, 0) && polls < 1 << 20) polls++;
    for (int i = threadIdx.x; i < kWords; i += 128) out[i] = s.words[i];
    if (threadIdx.x == 0) out[kWords] = polls < 1 << 20;
}
REGISTER_KERNEL(conformance_tma_load)

// Word i of shared memory holds i; the box is stored to wherever the map lies. Grid 1, block 128, shared: a Shared.
KERNEL(conformance_tma_store, 128, 1)(GRID_CONST TensorMap map, int rank, int c0, int c1, int c2, int c3, int c4) {
    follow_previous();
    SHARED_DYNAMIC(Shared, s);
    for (int i = threadIdx.x; i < kWords; i += 128) s.words[i] = i;
    fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        if (rank == 2) tma_store_2d(&map, s.words, c0, c1);
        if (rank == 3) tma_store_3d(&map, s.words, c0, c1, c2);
        if (rank == 4) tma_store_4d(&map, s.words, c0, c1, c2, c3);
        if (rank == 5) tma_store_5d(&map, s.words, c0, c1, c2, c3, c4);
        bulk_commit();
        bulk_wait_read<0>();
        bulk_wait<0>();
    }
}
REGISTER_KERNEL(conformance_tma_store)

// Four blocks of a cluster; map [4 rows][32 words], box one row. Each block: a row from each block by multicast, 32 words that
// the next block has, 32 that the one before stored, 4 each that every block sent by st.async (vector, then single).
// out [4 blocks][128 + 32 + 32 + 32]. Grid 4, cluster 4, block 32.
struct Exchange {
    alignas(128) uint32_t rows[4][32];
    alignas(16) float mine[32], stored[32], sent[4][8];
    uint64_t multicast, stores, sends;
};
KERNEL(conformance_exchange, 32, 1)(uint32_t* out, GRID_CONST TensorMap map) {
    follow_previous();
    SHARED_STATIC(Exchange, shared, [1]);
    Exchange& s = shared[0];
    const int lane = threadIdx.x, rank = cluster_rank(), next = (rank + 1) % 4;
    s.mine[lane] = float(rank * 100 + lane);
    if (lane == 0) {
        mbar_init(&s.multicast, 1);
        mbar_init(&s.stores, 1);
        mbar_init(&s.sends, 1);
        mbar_fence_init();
        mbar_arrive_expect_tx(&s.multicast, 4 * 128);
    }
    __syncwarp();
    cluster_sync();
    if (lane == 0) {
        mbar_expect_cluster(&s.sends, next, 32);  // four blocks of 32 bytes, all said by the block before
        mbar_expect_cluster(&s.sends, next, 96);
        mbar_arrive_cluster(&s.sends, next);
        tma_load_multicast_2d(s.rows[rank], &map, &s.multicast, 0, rank, 0xf);
    }
    cluster_store_f32(cluster_address(&s.stored[lane], next), float(1000 + rank * 100 + lane));
    __syncwarp();
    if (lane == 0) mbar_arrive_release_cluster(&s.stores, next);
    if (lane < 4) {
        const float x = float(2000 + rank * 100 + lane * 10);
        const uint32_t bar = cluster_address(&s.sends, lane);
        cluster_store_async_f32x4(cluster_address(s.sent[rank], lane), make_float4(x, x + 1, x + 2, x + 3), bar);
        for (int i = 4; i < 8; i++) cluster_store_async_f32(cluster_address(&s.sent[rank][i], lane), x + i, bar);
    }
    const float4 others = cluster_load_f32x4(cluster_address(&s.mine[lane / 4 * 4], next));
    const float other = cluster_load_f32(cluster_address(&s.mine[lane], next));
    mbar_wait(&s.multicast, 0);
    mbar_wait_cluster(&s.stores, 0);
    mbar_wait_cluster(&s.sends, 0);
    uint32_t* to = out + rank * 224;
    for (int i = 0; i < 4; i++) to[i * 32 + lane] = s.rows[i][lane];
    to[128 + lane] = uint32_t(lane % 4 == 0 ? others.x : other);
    to[160 + lane] = uint32_t(s.stored[lane]);
    to[192 + lane] = uint32_t(s.sent[lane / 8][lane % 8]);
    cluster_sync();
}
REGISTER_KERNEL(conformance_exchange)

// A mbarrier by hand. out: [0] not ended before the arrivals, [1] not after the arrivals alone, [2] ended with the bytes,
// [3] the next parity not yet, [4] ended after three arrivals at once, [5] the old parity no longer. One thread.
KERNEL(conformance_mbarrier, 1, 1)(uint32_t* out, GRID_CONST TensorMap map) {
    follow_previous();
    SHARED_STATIC(Exchange, shared, [1]);
    Exchange& s = shared[0];
    uint64_t* bar = &s.multicast;
    mbar_init(bar, 3);
    mbar_fence_init();
    out[0] = mbar_try(bar, 0);
    mbar_arrive_count(bar, 2);
    mbar_arrive_expect_tx(bar, 128);
    out[1] = mbar_try(bar, 0);
    tma_load_2d(s.rows[0], &map, bar, 0, 0);
    mbar_wait(bar, 0);
    out[2] = mbar_try(bar, 0);
    out[3] = mbar_try(bar, 1);
    mbar_arrive_count(bar, 3);
    out[4] = mbar_try(bar, 1);
    out[5] = mbar_try(bar, 0);
}
REGISTER_KERNEL(conformance_mbarrier)

// Each block writes 64 numbers; the last one to come adds them up. sums [blocks * 64], count [1]: 0 before and after.
// out [64]. Block 64.
KERNEL(conformance_last_block, 64, 1)(uint32_t* out, uint32_t* sums, uint32_t* count) {
    follow_previous();
    SHARED_STATIC(uint32_t, before, [1]);
    const int tid = threadIdx.x;
    sums[blockIdx.x * 64 + tid] = blockIdx.x * tid;
    __syncthreads();
    if (tid == 0) before[0] = atom_add_acq_rel(count, 1);
    __syncthreads();
    if (before[0] + 1 < gridDim.x) return;
    uint32_t sum = 0;
    for (uint32_t i = 0; i < gridDim.x; i++) sum += sums[i * 64 + tid];
    out[tid] = sum;
    if (tid == 0) st_release(count, ld_acquire(count) - gridDim.x);
}
REGISTER_KERNEL(conformance_last_block)
