// Clusters, dependent launches, and what passes between the blocks of a grid; right, and with one thing wrong.
#include "harness.h"

#include "common/hopper.cuh"

template <class... A>
static int run_with(const emu::LaunchAttributes& attributes, const char* kernel, dim3 grid, dim3 block, unsigned smem, A... args) {
    void* params[] = {const_cast<void*>(static_cast<const void*>(&args))..., nullptr};
    return emu::launch(emu::find(kernel), grid, block, smem, params, attributes);
}
static emu::LaunchAttributes clusters_of(uint32_t x, uint32_t y = 1, uint32_t z = 1) { return {{x, y, z}, false}; }
static constexpr emu::LaunchAttributes kDependent = {{1, 1, 1}, true};

// Wrong in at least one mode of the plain build, in every mode of the race build.
static void shows(const char* what, int bug, const std::function<bool()>& is_wrong) {
    int shown = 0;
    in_every_mode([&] {
        const bool wrong = is_wrong();
        shown += wrong;
        if (kRaceBuild && !wrong) fail("%s, bug %d: nothing was reported (%s)", what, bug, mode_name().c_str());
    });
    printf("  %s, bug %d: shows in %d of 24 modes\n", what, bug, shown);
}

// ---- ranks ----

KERNEL(dump_ranks, 32, 1)(int* out) {
    const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    if (threadIdx.x == 0) out[block] = cluster_rank() * 10 + cluster_size();
}
REGISTER_KERNEL(dump_ranks)

TEST(ranks_of_a_cluster) {
    in_every_mode([] {
        Buffer<int> out(4 * 6 * 2);
        expect_clean(run_with(clusters_of(2, 3), "dump_ranks", dim3(4, 6, 2), dim3(32), 0, out.data), __LINE__);
        for (int i = 0; i < 48; i++) CHECK(out[size_t(i)] == (i % 4 % 2 + i / 4 % 6 % 3 * 2) * 10 + 6);
        CLEAN("dump_ranks", dim3(4, 6, 2), dim3(32), 0, out.data);
        for (int i = 0; i < 48; i++) CHECK(out[size_t(i)] == 1);
        REPORTS(run_with(clusters_of(3), "dump_ranks", dim3(4), dim3(32), 0, out.data), "clusters of (3, 1, 1) blocks in a grid of (4, 1, 1)");
        REPORTS(run_with(clusters_of(4, 3), "dump_ranks", dim3(4, 3), dim3(32), 0, out.data), "1 to 8 blocks");
        REPORTS(run_with(clusters_of(0), "dump_ranks", dim3(4), dim3(32), 0, out.data), "clusters of (0, 1, 1)");
    });
}

// ---- another block's shared memory ----

struct Exchange {
    alignas(16) float mine[64 * 4], sent[64 * 4];
    uint64_t bar;
};
// Each block reads what the next has, and gets what the one before it stores. Left out: 1 the sync before, 2 the sync at the
// end, 3 the sync between the stores and their reading.
KERNEL(exchanges, 64, 1)(float* out, int left_out) {
    SHARED_DYNAMIC(Exchange, s);
    const int rank = cluster_rank(), size = cluster_size(), next = (rank + 1) % size;
    const unsigned tid = threadIdx.x;
    for (unsigned i = 0; i < 4; i++) s.mine[tid * 4 + i] = float(rank * 1000) + float(tid * 4 + i);
    if (left_out != 1) cluster_sync();
    const float4 x = cluster_load_f32x4(cluster_address(&s.mine[tid * 4], next));
    const float one = cluster_load_f32(cluster_address(&s.mine[255 - tid], next));
    cluster_store_f32x4(cluster_address(&s.sent[tid * 4], next), make_float4(x.x + 1.f, x.y + 1.f, x.z + 1.f, one));
    if (left_out != 3) cluster_sync();
    const unsigned at = ((blockIdx.y * gridDim.x + blockIdx.x) * 64 + tid) * 4;
    for (unsigned i = 0; i < 4; i++) out[at + i] = s.sent[tid * 4 + i];
    // Another read of another block, which the last sync guards.
    out[at] += cluster_load_f32(cluster_address(&s.mine[tid], next)) - s.mine[tid];
    if (left_out != 2) cluster_sync();
}
REGISTER_KERNEL(exchanges)

TEST(blocks_of_a_cluster_exchange) {
    for (const unsigned size : {1u, 2u, 3u, 8u}) {
        const auto wrong = [&](int left_out) {
            Buffer<float> out(2 * 8 * 256);
            const dim3 grid(size, 2);
            const int result = run_with(clusters_of(size), "exchanges", grid, dim3(64), sizeof(Exchange), out.data, left_out);
            if (result) return true;
            for (size_t block = 0; block < 2 * size; block++) {
                const size_t rank = block % size;  // who sent here read what this block has
                const float difference = float(((rank + 1) % size) * 1000) - float(rank * 1000);
                for (size_t t = 0; t < 64; t++) {
                    const float own = float(rank * 1000);
                    const float want[4] = {own + float(t * 4) + 1.f + difference, own + float(t * 4 + 1) + 1.f,
                                           own + float(t * 4 + 2) + 1.f, own + float(255 - t)};
                    for (size_t i = 0; i < 4; i++) {
                        if (out[block * 256 + t * 4 + i] != want[i]) return true;
                    }
                }
            }
            return false;
        };
        in_every_mode([&] {
            if (wrong(0)) fail("%u blocks: %s (%s)", size, emu::last_error(), mode_name().c_str());
            if (size > 1) CHECK(wrong(1) && strstr(emu::last_error(), "before cluster_wait: it may not have begun"));
        });
        if (size != 3) continue;
        shows("exchange", 2, [&] {
            const bool is_wrong = wrong(2);
            if (is_wrong) CHECK(strstr(emu::last_error(), "has ended") || strstr(emu::last_error(), "may end before"));
            return is_wrong;
        });
        shows("exchange", 3, [&] { return wrong(3); });
    }
}

// ---- mbarriers across blocks, and stores that count as their transactions ----

struct Gather {
    alignas(16) float part[8][64];
    uint64_t full;
};
// Every block sends 64 numbers to block 0, which adds them up. how: 0 and up by st.async, 10 and up by ordinary stores and a
// remote arrival. Wrong: 1 no wait, 2 too few bytes expected, 3 no sync at the end, 4 too many bytes.
KERNEL(gathers, 64, 1)(float* out, int how) {
    SHARED_DYNAMIC(Gather, s);
    const int rank = cluster_rank(), size = cluster_size(), tid = int(threadIdx.x), bug = how % 10;
    const bool async = how < 10;
    if (tid == 0 && rank == 0) {
        mbar_init(&s.full, async ? 1 : size);
        mbar_fence_init();
    }
    cluster_sync();
    if (async && tid == 0 && rank == 0) {
        mbar_arrive_expect_tx(&s.full, uint32_t(size * 64 * 4 + (bug == 2 ? -256 : bug == 4 ? 4 : 0)));
    }
    const float value = float(rank * 64 + tid);
    if (async && tid < 16) {
        const float4 four = make_float4(float(rank * 64 + tid * 4), float(rank * 64 + tid * 4 + 1), float(rank * 64 + tid * 4 + 2),
                                        float(rank * 64 + tid * 4 + 3));
        const uint32_t bar = cluster_address(&s.full, 0);
        if (rank % 2) {
            cluster_store_async_f32x4(cluster_address(&s.part[rank][tid * 4], 0), four, bar);
        } else {
            cluster_store_async_f32(cluster_address(&s.part[rank][tid * 4], 0), four.x, bar);
            cluster_store_async_f32(cluster_address(&s.part[rank][tid * 4 + 1], 0), four.y, bar);
            cluster_store_async_f32(cluster_address(&s.part[rank][tid * 4 + 2], 0), four.z, bar);
            cluster_store_async_f32(cluster_address(&s.part[rank][tid * 4 + 3], 0), four.w, bar);
        }
    }
    if (!async) {
        cluster_store_f32(cluster_address(&s.part[rank][tid], 0), value);
        __syncthreads();
        if (tid == 0) mbar_arrive_release_cluster(&s.full, 0);
    }
    if (rank == 0) {
        if (bug != 1) mbar_wait_cluster(&s.full, 0);
        float sum = 0.f;
        for (int i = 0; i < size; i++) sum += s.part[i][tid];
        out[blockIdx.x / unsigned(size) * 64 + unsigned(tid)] = sum;
    }
    if (bug != 3) cluster_sync();
}
REGISTER_KERNEL(gathers)

TEST(a_cluster_adds_up_in_one_block) {
    for (const unsigned size : {2u, 4u, 7u}) {
        const auto wrong = [&](int how) {
            Buffer<float> out(2 * 64);
            if (run_with(clusters_of(size), "gathers", dim3(2 * size), dim3(64), sizeof(Gather), out.data, how)) return true;
            for (size_t t = 0; t < 128; t++) {
                float sum = 0.f;
                for (size_t i = 0; i < size; i++) sum += float(i * 64 + t % 64);
                if (!(out[t] == sum)) return true;
            }
            return false;
        };
        in_every_mode([&] {
            for (const int how : {0, 10}) {
                if (wrong(how)) fail("%u blocks, %d: %s (%s)", size, how, emu::last_error(), mode_name().c_str());
            }
        });
        if (size != 4) continue;
        for (const int how : {1, 2, 11}) shows("gather", how, [&] { return wrong(how); });
        // The senders end early, which is no mistake; block 0 waits for them.
        in_every_mode([&] { CHECK(!wrong(3)); });
        in_every_mode([&] {
            CHECK(wrong(4) && strstr(emu::last_error(), "block 0 of the cluster, warp 0, lanes ffffffff: mbarrier wait at"));
            CHECK(strstr(emu::last_error(), "block 1 of the cluster, warp 1, lanes ffffffff: cluster_wait at"));
            CHECK(strstr(emu::last_error(), "lacks 0 of 1 arrivals and 4 bytes"));
        });
    }
}

// ---- multicast ----

constexpr int kSlots = 2, kSteps = 7, kRow = 64;
struct Slots {
    alignas(128) float tile[kSlots][8][kRow];
    uint64_t full[kSlots], empty[kSlots];
};
// Each step, a warp of block r loads row r of a tile to all blocks; the others of all blocks add up the whole tile. A slot is
// free when every block has read it. Wrong: 1 only the own block's readers are waited for, 2 nobody is, 3 no sync at the end,
// 4 the full wait is missing, 5 the bytes of one row only are expected.
KERNEL(multicasts, 96, 1)(GRID_CONST TensorMap map, float* out, int bug) {
    SHARED_DYNAMIC(Slots, s);
    const int rank = cluster_rank(), size = cluster_size(), tid = int(threadIdx.x), lane = tid % 32;
    if (tid == 0) {
        for (int i = 0; i < kSlots; i++) {
            mbar_init(&s.full[i], 1);
            mbar_init(&s.empty[i], bug == 1 ? 2 : 2 * size);
        }
        mbar_fence_init();
    }
    cluster_sync();
    if (tid == 64) {
        for (int step = 0; step < kSteps; step++) {
            const int slot = step % kSlots;
            if (step >= kSlots && bug != 2) mbar_wait(&s.empty[slot], uint32_t(step / kSlots & 1) ^ 1);
            mbar_arrive_expect_tx(&s.full[slot], uint32_t((bug == 5 ? 1 : size) * kRow * 4));
            tma_load_multicast_2d(s.tile[slot][rank], &map, &s.full[slot], 0, step * size + rank, uint16_t((1 << size) - 1));
        }
    } else if (tid < 64) {
        float sum = 0.f;
        for (int step = 0; step < kSteps; step++) {
            const int slot = step % kSlots;
            if (bug != 4) mbar_wait(&s.full[slot], uint32_t(step / kSlots & 1));
            for (int i = 0; i < size; i++) sum += s.tile[slot][i][tid];
            __syncwarp();
            if (bug == 1 && lane == 0) mbar_arrive(&s.empty[slot]);
            if (bug != 1 && lane < size) mbar_arrive_cluster(&s.empty[slot], lane);
        }
        out[blockIdx.x * 64 + unsigned(tid)] = sum;
    }
    if (bug != 3) cluster_sync();
}
REGISTER_KERNEL(multicasts)

TEST(multicast_through_a_ring) {
    for (const int size : {2, 4, 8}) {
        const int rows = kSteps * size - 1;  // the last row lies outside
        Buffer<float> x(size_t(rows) * kRow);
        for (size_t i = 0; i < x.count; i++) x[i] = float(i % 1009);
        TensorMap map;
        const uint64_t dim[] = {kRow, uint64_t(rows)}, stride[] = {kRow * 4};
        const uint32_t box[] = {kRow, 1};
        CHECK(emu::tensor_map_encode(&map, 4, 2, x.data, dim, stride, box, 0) == 0);
        const auto wrong = [&](int bug) {
            Buffer<float> out(size_t(size) * 64);
            const int result = run_with(clusters_of(uint32_t(size)), "multicasts", dim3(unsigned(size)), dim3(96), sizeof(Slots), map, out.data, bug);
            if (result) return true;
            for (size_t i = 0; i < out.count; i++) {
                float sum = 0.f;
                for (int row = 0; row < rows; row++) sum += x[size_t(row * kRow) + i % 64];
                if (!(out[i] == sum)) return true;
            }
            return false;
        };
        in_every_mode([&] {
            if (wrong(0)) fail("%d blocks: %s (%s)", size, emu::last_error(), mode_name().c_str());
        });
        if (size != 2) continue;
        for (int bug = 1; bug <= 5; bug++) shows("multicast", bug, [&] { return wrong(bug); });
    }
}

// ---- mistakes that every build reports in every mode ----

enum ClusterMistake { kArrivesTwice, kWaitsUnarrived, kNoSuchBlock, kNoSuchAddress, kUnaligned, kOneDoesNotArrive, kMulticastTooWide, kBarElsewhere };
KERNEL(make_cluster_mistake, 32, 1)(GRID_CONST TensorMap map, int mistake) {
    SHARED_DYNAMIC(Exchange, s);
    if (threadIdx.x == 0) mbar_init(&s.bar, 1);
    cluster_sync();
    const int rank = cluster_rank();
    if (threadIdx.x == 0 && rank == 1) {
        switch (mistake) {
            case kArrivesTwice: cluster_arrive(); cluster_arrive(); break;
            case kWaitsUnarrived: cluster_wait(); break;
            case kNoSuchBlock: cluster_address(s.mine, 2); break;
            case kNoSuchAddress: cluster_load_f32(cluster_address(s.mine, 0) + sizeof s); break;
            case kUnaligned: cluster_load_f32x4(cluster_address(s.mine + 1, 0)); break;
            case kMulticastTooWide: tma_load_multicast_2d(s.mine, &map, &s.bar, 0, 0, 4); break;
            case kBarElsewhere: cluster_store_async_f32(cluster_address(s.mine, 0), 1.f, cluster_address(&s.bar, 1)); break;
        }
    }
    if (mistake == kOneDoesNotArrive && rank == 1) {
        __syncthreads();
        mbar_wait(&s.bar, 0);
    }
    cluster_sync();
}
REGISTER_KERNEL(make_cluster_mistake)

TEST(cluster_mistakes_are_reported) {
    struct Case {
        ClusterMistake mistake;
        std::initializer_list<const char*> texts;
    };
    static const Case cases[] = {
        {kArrivesTwice, {"cluster_arrive twice without a cluster_wait", "cluster.cpp:"}},
        {kWaitsUnarrived, {"cluster_wait without a cluster_arrive"}},
        {kNoSuchBlock, {"block 2 of a cluster of 2"}},
        {kNoSuchAddress, {"is not in the shared memory of block 0 of the cluster"}},
        {kUnaligned, {"shared memory + 4 of block 0 of the cluster is not aligned to 16"}},
        {kOneDoesNotArrive, {"deadlock", "block 0 of the cluster, warp 0, lanes ffffffff: cluster_wait", "block 1 of the cluster, warp 0, lanes ffffffff: mbarrier wait"}},
        {kMulticastTooWide, {"TMA multicast to blocks 0x4 of a cluster of 2"}},
        {kBarElsewhere, {"st.async into block 0, its mbarrier in block 1"}},
    };
    Buffer<float> memory(256);
    TensorMap map;
    const uint64_t dim[] = {64, 4}, stride[] = {256};
    const uint32_t box[] = {64, 1};
    CHECK(emu::tensor_map_encode(&map, 4, 2, memory.data, dim, stride, box, 0) == 0);
    in_every_mode([&] {
        for (const Case& c : cases) {
            const int result = run_with(clusters_of(2), "make_cluster_mistake", dim3(4), dim3(32), sizeof(Exchange), map, int(c.mistake));
            expect_report(result, int(c.mistake), c.texts);
        }
    });
}

// ---- blocks of a grid ----

// Each block adds up its part, the last one the sums. how: 0 atom_add_acq_rel, 1 __threadfence and atomicAdd, 2 the same
// without the fence before, 3 without the one after, 4 a fence by another thread than the one that adds, after no barrier.
KERNEL(last_block_adds_up, 32, 1)(const float* x, float* sums, uint32_t* count, float* out, int how) {
    const unsigned tid = threadIdx.x;
    const float value = x[blockIdx.x * 32 + tid];
    sums[blockIdx.x * 32 + tid] = value * 2.f;
    if (how == 4 && tid == 1) __threadfence();
    __syncthreads();
    uint32_t before = 0;
    if (tid == 0) {
        if (how == 0) {
            before = atom_add_acq_rel(count, 1);
        } else {
            if (how == 1 || how == 3) __threadfence();
            before = atomicAdd(count, 1u);
            if (how == 1 || how == 2 || how == 4) __threadfence();
        }
    }
    before = __shfl_sync(~0u, before, 0);
    __syncthreads();
    if (before + 1 < gridDim.x) return;
    float sum = 0.f;
    for (unsigned i = 0; i < gridDim.x; i++) sum += sums[i * 32 + tid];
    out[tid] = sum;
    if (tid == 0) *count = 0;
}
REGISTER_KERNEL(last_block_adds_up)

TEST(the_last_block_adds_up) {
    Buffer<float> x(40 * 32), sums(40 * 32), out(32);
    Buffer<uint32_t> count(1);
    for (size_t i = 0; i < x.count; i++) x[i] = float(i);
    in_every_mode([&] {
        for (int how = 0; how <= 4; how++) {
            count[0] = 0;
            const int result = run("last_block_adds_up", dim3(40), dim3(32), 0, (const float*)x.data, sums.data, count.data, out.data, how);
            if (kRaceBuild && how > 1) {
                REPORTS(result, "read after write of global memory", "block number", "cluster.cpp:");
                continue;
            }
            expect_clean(result, __LINE__);
            CHECK(count[0] == 0);
            for (size_t t = 0; t < 32; t++) {
                float sum = 0.f;
                for (size_t i = 0; i < 40; i++) sum += x[i * 32 + t] * 2.f;
                CHECK(out[t] == sum);
            }
        }
    });
}

// Each block takes what the one before hands on. how: 0 ld_acquire and st_release, 1 the store is atomicExch without a
// fence, 2 a block waits for the one after it.
KERNEL(hands_on, 32, 1)(float* value, uint32_t* flag, int how) {
    const unsigned block = blockIdx.x, from = how == 2 ? block + 1 : block - 1;
    if (how == 2 ? block + 1 < gridDim.x : block > 0) {
        if (threadIdx.x == 0) {
            while (ld_acquire(&flag[from]) != 1) {
            }
        }
        __syncthreads();
        value[block * 32 + threadIdx.x] = value[from * 32 + threadIdx.x] + 1.f;
    } else {
        value[block * 32 + threadIdx.x] = float(threadIdx.x);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        if (how == 1) {
            atomicExch(&flag[block], 1u);
        } else {
            st_release(&flag[block], 1);
        }
    }
}
REGISTER_KERNEL(hands_on)

TEST(blocks_hand_on) {
    const auto launch = [](int how, unsigned blocks, float* last) {
        Buffer<float> value(size_t(blocks) * 32);
        Buffer<uint32_t> flag(blocks);
        for (size_t i = 0; i < blocks; i++) flag[i] = 0;
        const int result = run("hands_on", dim3(blocks), dim3(32), 0, value.data, flag.data, how);
        *last = value[value.count - 1];
        return result;
    };
    in_every_mode([&] {
        float last = 0.f;
        expect_clean(launch(0, 20, &last), __LINE__);
        CHECK(last == 31.f + 19.f);
        if (kRaceBuild) REPORTS(launch(1, 20, &last), "read after write of global memory", "block number");
    });
    float last = 0.f;
    emu::config.threads = 1;
    REPORTS(launch(2, 20, &last), "deadlock", "ld_acquire at", "cluster.cpp:");
}

// ---- dependent launches ----

// y = 2 x, w scales it. early: what happens before the wait: 0 w is read, 1 x is read, 2 y is written, 3 there is no wait.
// starts: 0 the next launch may start at once, 1 after the wait, 2 it is not said.
KERNEL(scales, 64, 1)(float* y, const float* x, const float* w, int early, int starts) {
    const unsigned i = blockIdx.x * 64 + threadIdx.x;
    if (starts == 0) next_may_start();
    const float scale = w[threadIdx.x];
    float value = early == 1 ? x[i] : 0.f;
    if (early == 2) y[i] = 0.f;
    if (early != 3 && threadIdx.x == 0) wait_for_previous();
    __syncthreads();
    if (starts == 1) next_may_start();
    if (early != 1) value = x[i];
    y[i] = value * scale;
}
REGISTER_KERNEL(scales)

TEST(dependent_launches) {
    Buffer<float> a(256), b(256), c(256), w(64);
    for (size_t i = 0; i < 64; i++) w[i] = 2.f;
    const auto scale = [&](const emu::LaunchAttributes& how, Buffer<float>& y, Buffer<float>& x, int early, int starts = 0) {
        return run_with(how, "scales", dim3(4), dim3(64), 0, y.data, (const float*)x.data, (const float*)w.data, early, starts);
    };
    in_every_mode([&] {
        for (size_t i = 0; i < 256; i++) a[i] = float(i);
        expect_clean(scale({}, b, a, 0), __LINE__);
        expect_clean(scale(kDependent, c, b, 0), __LINE__);
        expect_clean(scale(kDependent, b, c, 0), __LINE__);
        CHECK(b[255] == 255.f * 8.f);
        expect_clean(scale({}, a, b, 1), __LINE__);  // without the attribute nothing may begin early
        expect_clean(scale({}, a, a, 3), __LINE__);
        const char* const forgotten = "a block of a dependent launch ends without wait_for_previous";
        REPORTS(scale(kDependent, c, a, 3), forgotten);
        if (!kRaceBuild) return;
        expect_clean(scale({}, b, a, 0), __LINE__);
        REPORTS(scale(kDependent, c, b, 1), "read before wait_for_previous of global memory", "a thread of scales", "cluster.cpp:");
        expect_clean(scale({}, b, a, 0), __LINE__);
        REPORTS(scale(kDependent, a, b, 2), "write before wait_for_previous of global memory");
        expect_clean(scale({}, b, a, 0), __LINE__);
        REPORTS(scale(kDependent, c, b, 3), "read before wait_for_previous of global memory", forgotten);
        // What the launch before the previous one wrote: ended for sure only if the previous one let this start after its wait.
        for (const int starts : {0, 1, 2}) {
            Buffer<float> d(256), e(256);
            for (size_t i = 0; i < 256; i++) e[i] = 1.f;
            expect_clean(scale({}, b, a, 0), __LINE__);
            expect_clean(scale(kDependent, c, a, 0, starts), __LINE__);
            const int result = scale(kDependent, d, b, 1);
            if (starts == 0) {
                REPORTS(result, "read before wait_for_previous", "or of a launch before it");
            } else {
                expect_clean(result, __LINE__);
            }
            // And if the previous one never waits, not even after the wait.
            expect_clean(scale({}, b, a, 0), __LINE__);
            REPORTS(scale(kDependent, d, e, 3, starts), forgotten);
            REPORTS(scale(kDependent, c, b, 0), "the previous launch never waited");
        }
    });
}
