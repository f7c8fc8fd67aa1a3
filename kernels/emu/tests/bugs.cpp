// Every kind of mistake, made on purpose: reported by the build, and under the modes, that should find it.
#include "harness.h"

#include <sys/wait.h>
#include <unistd.h>

#include "common/wgmma.cuh"

// ---- found by every build in every mode ----

enum Mistake {
    kNone,
    kWaitsForNobody,
    kSplitSyncthreads,
    kLeavesBeforeSyncthreads,
    kLeavesDuringSyncthreads,
    kOddBarrierCount,
    kBarrier16,
    kPartOfAWarpAtBarrier,
    kArrivesTwice,
    kShufflesFromInactive,
    kMaskLacksCaller,
    kLanesMissing,
    kDifferentCollectives,
    kOverlappingMasks,
    kMmaWithoutAllLanes,
    kMmaAtTwoLines,
    kShuffleWidth,
    kLdmatrixMisaligned,
    kLdmatrixOfGlobal,
    kLdmatrixPastTheEnd,
    kCopyMisalignedShared,
    kCopyMisalignedGlobal,
    kCopyIntoGlobal,
    kCopyPastTheEnd,
    kCopyFromShared,
    kAtomicMisaligned,
    kBarBeforeInit,
    kBarTooManyArrivals,
    kWgmmaInTwoWarps,
};
struct Small {
    float value[64];
};
KERNEL(make_mistake, 128, 1)(float* x, int mistake) {
    SHARED_DYNAMIC(Small, s);
    const int tid = int(threadIdx.x), lane = tid % 32;
    s.value[tid % 64] = 0.f;
    uint32_t r[4] = {};
    float sum[4] = {};
    switch (mistake) {
        case kWaitsForNobody:
            if (tid >= 32) named_barrier_sync(1, 64);
            break;
        case kSplitSyncthreads:
            if (tid < 32) {
                __syncthreads();
            } else {
                __syncthreads();
            }
            break;
        case kLeavesBeforeSyncthreads:
            if (tid == 7) return;
            __syncthreads();
            break;
        case kLeavesDuringSyncthreads:
            if (tid >= 32) return;
            __syncthreads();
            break;
        case kOddBarrierCount: named_barrier_sync(1, 33); break;
        case kBarrier16: named_barrier_sync(16, 64); break;
        case kPartOfAWarpAtBarrier:
            if (lane < 16) named_barrier_sync(1, 32);
            break;
        case kArrivesTwice:
            if (tid < 32) {
                named_barrier_arrive(1, 64);
                named_barrier_arrive(1, 64);
            }
            break;
        case kShufflesFromInactive:
            if (lane < 16) x[tid] = __shfl_sync(0x0000ffffu, 1.f, 20);
            break;
        case kMaskLacksCaller: x[tid] = __shfl_sync(0x0000ffffu, 1.f, 2); break;
        case kLanesMissing:
            if (lane < 16) __syncwarp();
            __syncthreads();
            break;
        case kDifferentCollectives:
            if (lane < 16) {
                __syncwarp();
            } else {
                x[tid] = float(__ballot_sync(0xffffffffu, true));
            }
            break;
        case kOverlappingMasks:
            if (lane < 16) {
                __syncwarp(0x0001ffffu);
            } else {
                __syncwarp(0xffff0000u);
            }
            __syncwarp();
            break;
        case kMmaWithoutAllLanes:
            if (lane == 3) return;
            mma_m16n8k16<bf16>(sum, r, 0, 0);
            break;
        case kMmaAtTwoLines:
            if (lane < 16) {
                mma_m16n8k16<bf16>(sum, r, 0, 0);
            } else {
                mma_m16n8k16<bf16>(sum, r, 0, 0);
            }
            break;
        case kShuffleWidth: x[tid] = __shfl_xor_sync(0xffffffffu, 1.f, 1, 12); break;
        case kLdmatrixMisaligned: ldmatrix_x4(r, &s.value[1]); break;
        case kLdmatrixOfGlobal: ldmatrix_x4(r, x); break;
        case kLdmatrixPastTheEnd: ldmatrix_x4(r, &s.value[64]); break;
        case kCopyMisalignedShared: cp_async_16(&s.value[2], x, true); break;
        case kCopyMisalignedGlobal: cp_async_16(&s.value[0], x + 2, true); break;
        case kCopyIntoGlobal: cp_async_16(x, x, true); break;
        case kCopyPastTheEnd: cp_async_16(&s.value[64], x, true); break;
        case kCopyFromShared: cp_async_16(&s.value[0], &s.value[4], true); break;
        case kAtomicMisaligned: atomicAdd(reinterpret_cast<int*>(reinterpret_cast<char*>(x) + 2), 1); break;
        case kBarBeforeInit: mbar_wait(reinterpret_cast<uint64_t*>(&s.value[0]), 0); break;
        case kBarTooManyArrivals: {
            uint64_t* bar = reinterpret_cast<uint64_t*>(&s.value[0]);
            if (tid == 0) {
                mbar_init(bar, 2);
                mbar_arrive_expect_tx(bar, 4096);
                mbar_arrive(bar);
                mbar_arrive(bar);
            }
            break;
        }
        case kWgmmaInTwoWarps: wgmma_fence(); break;
    }
}
REGISTER_KERNEL(make_mistake)

TEST(what_the_card_leaves_undefined_is_reported) {
    struct Case {
        Mistake mistake;
        std::initializer_list<const char*> texts;
    };
    static const Case cases[] = {
        {kWaitsForNobody, {"deadlock", "warp 1, lanes ffffffff: named barrier at", "bugs.cpp:", "warp 0, lanes ffffffff: left the kernel"}},
        {kSplitSyncthreads, {"divergent __syncthreads"}},
        {kLeavesBeforeSyncthreads, {"divergent __syncthreads"}},
        {kLeavesDuringSyncthreads, {"divergent __syncthreads"}},
        {kOddBarrierCount, {"no such number of whole warps"}},
        {kBarrier16, {"barrier 16 of 16"}},
        {kPartOfAWarpAtBarrier, {"not by the whole warp"}},
        {kArrivesTwice, {"arrives a second time"}},
        {kShufflesFromInactive, {"shuffles from lane 20, which does not take part"}},
        {kMaskLacksCaller, {"lacks the calling lane"}},
        {kLanesMissing, {"deadlock", "lanes 0000ffff: __syncwarp at", "lanes ffff0000: __syncthreads at"}},
        {kDifferentCollectives, {"different operations"}},
        {kOverlappingMasks, {"while lanes"}},
        {kMmaWithoutAllLanes, {"mma"}},
        {kMmaAtTwoLines, {"different operations"}},
        {kShuffleWidth, {"a power of two"}},
        {kLdmatrixMisaligned, {"is not aligned to 16"}},
        {kLdmatrixOfGlobal, {"not in the block's shared memory"}},
        {kLdmatrixPastTheEnd, {"not in the block's shared memory"}},
        {kCopyMisalignedShared, {"is not aligned to 16"}},
        {kCopyMisalignedGlobal, {"is not aligned to 16"}},
        {kCopyIntoGlobal, {"not in the block's shared memory"}},
        {kCopyPastTheEnd, {"not in the block's shared memory"}},
        {kCopyFromShared, {"reads shared memory"}},
        {kAtomicMisaligned, {"aligned to 4"}},
        {kBarBeforeInit, {"before it was initialised"}},
        {kBarTooManyArrivals, {"more than the mbarrier's 2 arrivals"}},
        {kWgmmaInTwoWarps, {"incomplete warpgroup"}},
    };
    in_every_mode([] {
        Buffer<float> x(128);
        for (const Case& c : cases) {
            const int result = run("make_mistake", dim3(1), dim3(64), sizeof(Small), x.data, int(c.mistake));
            expect_report(result, int(c.mistake), c.texts);
            expect_report(result, int(c.mistake), {"make_mistake, block (0, 0, 0)"});
        }
    });
    // And afterwards everything works as before.
    Buffer<float> x(128);
    CHECK(run("make_mistake", dim3(3), dim3(64), sizeof(Small), x.data, int(kWaitsForNobody)) > 0);
}

KERNEL(uses_too_much, 1024, 1)() {
    SHARED_STATIC(float, a, [12 * 1024]);
    SHARED_STATIC(float, b, [1]);
    a[0] = b[0] = 0.f;
}
REGISTER_KERNEL(uses_too_much)

TEST(launch_limits) {
    Buffer<float> x(128);
    const auto launch = [&](dim3 grid, dim3 block, unsigned smem) {
        return run("make_mistake", grid, block, smem, x.data, int(kNone));
    };
    CHECK(launch(dim3(1), dim3(64), sizeof(Small)) == 0 && emu::last_error()[0] == 0);
    REPORTS(launch(dim3(1), dim3(129), sizeof(Small)), "make_mistake: block of 129 threads, compiled for at most 128");
    REPORTS(launch(dim3(1), dim3(1, 1, 65), sizeof(Small)), "block (1, 1, 65)");
    REPORTS(run("uses_too_much", dim3(1), dim3(1025), 0), "1024 threads");
    REPORTS(launch(dim3(0), dim3(64), sizeof(Small)), "empty grid or block");
    REPORTS(launch(dim3(1, 65536), dim3(64), sizeof(Small)), "grid (1, 65536, 1)");
    REPORTS(launch(dim3(1), dim3(64), 227 * 1024 + 1), "232449 bytes of shared memory");
    REPORTS(launch(dim3(1), dim3(64), sizeof(Small) - 1), "uses 256 bytes of dynamic shared memory, the launch gave 255");
    REPORTS(run("uses_too_much", dim3(1), dim3(1), 0), "more than 48 KiB of static shared memory");
    CHECK(emu::launch(nullptr, dim3(1), dim3(1), 0, nullptr) < 0);
}

// ---- accesses outside the allocations ----

static uintptr_t table_begin, table_end;
static bool table(uintptr_t address, uintptr_t* begin, uintptr_t* end) {
    *begin = table_begin;
    *end = table_end;
    return address >= table_begin && address < table_end;
}
KERNEL(reads_at, 32, 1)(const float* x, float* y, int offset, int how) {
    SHARED_DYNAMIC(Small, s);
    s.value[threadIdx.x] = 0.f;
    if (threadIdx.x == 0) {
        if (how == 0) cp_async_4(&s.value[0], x + offset, true);
        if (how == 1) atomicAdd(const_cast<float*>(x + offset), 1.f);
        if (how == 2) y[0] = x[offset];
        if (how == 3) cp_async_4(&s.value[0], x + offset, false);
    }
}
REGISTER_KERNEL(reads_at)

TEST(accesses_outside_every_allocation) {
    Buffer<float> memory(192);
    memory[63] = 0.f;
    table_begin = uintptr_t(memory.data);
    table_end = table_begin + 64 * sizeof(float);
    emu::set_allocation_lookup(table);
    const auto launch = [&](int offset, int how) {
        return run("reads_at", dim3(1), dim3(32), sizeof(Small), (const float*)memory.data, memory.data, offset, how);
    };
    in_every_mode([&] {
        for (const int how : {0, 1, 2, 3}) expect_clean(launch(63, how), __LINE__);
        REPORTS(launch(64, 0), "cp.async at", "in no allocation", "bugs.cpp:");
        REPORTS(launch(64, 1), "atomic at", "in no allocation");
        if (kRaceBuild) REPORTS(launch(64, 2), "access at", "in no allocation", "bugs.cpp:");
        expect_clean(launch(64, 3), __LINE__);  // reads nothing
    });
    emu::set_allocation_lookup(nullptr);
}

// ---- found by wrong results, and by the race build ----

// Sums of 64 neighbours through shared memory, two tiles. What is left out: 1 the wait, 2 the barrier before reading,
// 3 the barrier after reading.
struct Tile {
    float value[128];
};
KERNEL(tiled_sum, 128, 1)(const float* x, float* y, int left_out) {
    SHARED_DYNAMIC(Tile, s);
    float sum = 0.f;
    for (int tile = 0; tile < 2; tile++) {
        cp_async_4(&s.value[threadIdx.x], x + tile * 128 + threadIdx.x, true);
        cp_async_commit();
        if (left_out != 1) cp_async_wait<0>();
        if (left_out != 2) __syncthreads();
        for (unsigned i = 0; i < 64; i++) sum += s.value[(threadIdx.x + i) % 128];
        if (left_out != 3) __syncthreads();
    }
    y[threadIdx.x] = sum;
}
REGISTER_KERNEL(tiled_sum)

TEST(a_missing_wait_or_barrier_shows) {
    Buffer<float> x(256);
    for (size_t i = 0; i < 256; i++) x[i] = float(i * i % 31);
    for (int left_out = 0; left_out <= 3; left_out++) {
        int modes_with_wrong_results = 0;
        in_every_mode([&] {
            Buffer<float> y(128);
            const int result = run("tiled_sum", dim3(1), dim3(128), sizeof(Tile), (const float*)x.data, y.data, left_out);
            if (kRaceBuild && left_out) {
                REPORTS(result, "RACE", "bugs.cpp:");
            } else {
                expect_clean(result, __LINE__);
            }
            bool right = true;
            for (size_t t = 0; t < 128; t++) {
                float sum = 0.f;
                for (size_t i = 0; i < 64; i++) sum += x[(t + i) % 128] + x[128 + (t + i) % 128];
                right = right && y[t] == sum;
            }
            if (left_out == 0) CHECK(right);
            if (left_out == 1) CHECK(right == (emu::config.async == emu::Early));
            modes_with_wrong_results += !right;
        });
        printf("  left out %d: wrong results in %d of 24 modes\n", left_out, modes_with_wrong_results);
        if (left_out) CHECK(modes_with_wrong_results > 0);
    }
}

// Rows written by each lane, read by its neighbours through ldmatrix. No schedule shows the missing __syncwarp.
struct Rows {
    alignas(16) uint32_t at[32][4];
};
KERNEL(stage_rows, 32, 1)(uint32_t* out, int left_out) {
    SHARED_DYNAMIC(Rows, s);
    for (unsigned i = 0; i < 4; i++) s.at[threadIdx.x][i] = threadIdx.x * 4 + i;
    if (!left_out) __syncwarp();
    uint32_t r[4];
    ldmatrix_x4(r, s.at[threadIdx.x]);
    for (int i = 0; i < 4; i++) out[threadIdx.x * 4 + unsigned(i)] = r[i];
}
REGISTER_KERNEL(stage_rows)

TEST(a_missing_syncwarp_before_ldmatrix) {
    in_every_mode([] {
        Buffer<uint32_t> out(128);
        CLEAN("stage_rows", dim3(1), dim3(32), sizeof(Rows), out.data, 0);
        const int result = run("stage_rows", dim3(1), dim3(32), sizeof(Rows), out.data, 1);
        if (kRaceBuild) {
            REPORTS(result, "RACE", "read after write", "bugs.cpp:");
        } else {
            expect_clean(result, __LINE__);
        }
    });
}

// Each lane replaces just those elements that ldmatrix gave it; but another lane named their row, and read it too.
KERNEL(replaces_rows, 32, 1)(uint32_t* out, int left_out) {
    SHARED_DYNAMIC(Rows, s);
    for (unsigned i = 0; i < 4; i++) s.at[threadIdx.x][i] = threadIdx.x * 4 + i;
    __syncwarp();
    uint32_t r[4];
    ldmatrix_x4(r, s.at[threadIdx.x]);
    if (!left_out) __syncwarp();
    for (unsigned i = 0; i < 4; i++) s.at[i * 8 + threadIdx.x / 4][threadIdx.x % 4] = r[i] + 1;
    __syncwarp();
    for (unsigned i = 0; i < 4; i++) out[threadIdx.x * 4 + i] = s.at[threadIdx.x][i];
}
REGISTER_KERNEL(replaces_rows)

TEST(a_missing_syncwarp_after_ldmatrix) {
    in_every_mode([] {
        Buffer<uint32_t> out(128);
        CLEAN("replaces_rows", dim3(1), dim3(32), sizeof(Rows), out.data, 0);
        for (unsigned i = 0; i < 128; i++) CHECK(out[i] == i + 1);
        const int result = run("replaces_rows", dim3(1), dim3(32), sizeof(Rows), out.data, 1);
        if (kRaceBuild) {
            REPORTS(result, "RACE", "write after read", "bugs.cpp:");
        } else {
            expect_clean(result, __LINE__);
        }
    });
}

KERNEL(reads_unwritten, 32, 1)(float* y, int from) {
    SHARED_STATIC(float, value, [64]);
    value[threadIdx.x] = 1.f;
    __syncthreads();
    y[threadIdx.x] = value[threadIdx.x + unsigned(from)];
}
REGISTER_KERNEL(reads_unwritten)

TEST(unwritten_shared_memory_is_nan_and_reported) {
    in_every_mode([] {
        Buffer<float> y(32);
        CLEAN("reads_unwritten", dim3(1), dim3(32), 0, y.data, 0);
        CHECK(y[31] == 1.f);
        const int result = run("reads_unwritten", dim3(1), dim3(32), 0, y.data, 1);
        CHECK(std::isnan(y[31]));
        if (kRaceBuild) REPORTS(result, "uninitialised shared memory", "bugs.cpp:");
    });
}

// Global memory. 0: each its own. Between blocks: 1 all write one place, 2 one writes what others read, 3 the reverse,
// 6 a write beside atomics. Between threads of a block: 4 no barrier before reading, 5 none after.
KERNEL(touches_global, 64, 1)(float* x, float* y, int how) {
    const unsigned i = blockIdx.x * 64 + threadIdx.x;
    switch (how) {
        case 0: x[i] = float(i); break;
        case 1: x[threadIdx.x] = 1.f; break;
        case 2:
            if (blockIdx.x == 0) x[threadIdx.x] = 1.f;
            if (blockIdx.x == 1) y[i] = x[threadIdx.x];
            break;
        case 3:
            if (blockIdx.x < 3) y[i] = x[threadIdx.x];
            if (blockIdx.x == 3) x[threadIdx.x] = 1.f;
            break;
        case 4:
            x[i] = 1.f;
            y[i] = x[i ^ 32];
            break;
        case 5:
            y[i] = x[i ^ 32];
            x[i] = 1.f;
            break;
        case 6:
            if (i == 0) x[0] = 0.f;
            if (threadIdx.x == 0) atomicAdd(&x[0], 1.f);
            break;
    }
}
REGISTER_KERNEL(touches_global)

TEST(races_in_global_memory) {
    in_every_mode([] {
        Buffer<float> x(256), y(256);
        for (size_t i = 0; i < 256; i++) x[i] = 0.f;
        CLEAN("touches_global", dim3(4), dim3(64), 0, x.data, y.data, 0);
        if (!kRaceBuild) return;
        const auto launch = [&](int how) { return run("touches_global", dim3(4), dim3(64), 0, x.data, y.data, how); };
        REPORTS(launch(1), "write after write of global memory", "block number", "bugs.cpp:");
        REPORTS(launch(2), "read after write of global memory", "block number");
        REPORTS(launch(3), "write after read of global memory", "block number");
        REPORTS(launch(4), "of global memory");
        REPORTS(launch(5), "of global memory");
        REPORTS(launch(6), "of global memory", "block number");
    });
}

// Each thread writes a byte of its own, or with `shared` half of them one of another's.
KERNEL(writes_bytes, 64, 1)(uint8_t* bytes, int shared) { bytes[shared ? threadIdx.x / 2 : threadIdx.x] = uint8_t(threadIdx.x); }
REGISTER_KERNEL(writes_bytes)

TEST(neighbouring_bytes_are_of_different_threads) {
    Buffer<uint8_t> bytes(64);
    CLEAN("writes_bytes", dim3(1), dim3(64), 0, bytes.data, 0);
    for (size_t i = 0; i < 64; i++) CHECK(bytes[i] == i);
    if (kRaceBuild) REPORTS(run("writes_bytes", dim3(1), dim3(64), 0, bytes.data, 1), "write after write of global memory");
}

KERNEL(loads_four, 32, 1)(const float* x, float4* y) {
    if (threadIdx.x == 0) *y = *reinterpret_cast<const float4*>(x);
}
REGISTER_KERNEL(loads_four)

TEST(misaligned_vectors) {
    Buffer<float> x(8);
    Buffer<float4> y(1);
    CLEAN("loads_four", dim3(1), dim3(32), 0, (const float*)x.data, y.data);
    if (kRaceBuild) {
        REPORTS(run("loads_four", dim3(1), dim3(32), 0, (const float*)x.data + 1, y.data), "is misaligned", "bugs.cpp:");
    }
}

// ---- Hopper ----

int wrong_in_tma_wgmma(int bug);

TEST(hopper_bugs_show) {
    for (const int bug : {1, 2, 3}) {  // no mbarrier wait; too few bytes expected; no wgmma wait
        int shown = 0;
        in_every_mode([&] {
            const int wrong = wrong_in_tma_wgmma(bug);
            // What was not waited for has landed all the same where completion is early.
            if (emu::config.async == emu::Late) CHECK(wrong != 0);
            if (kRaceBuild && bug == 1) CHECK(wrong == -1 && strstr(emu::last_error(), "RACE"));
            shown += wrong != 0;
        });
        CHECK(shown > 0);
    }
}

// ---- found by ending the process: each in a child ----

static std::string child_output(const std::function<void()>& body, int* status) {
    int ends[2];
    if (pipe(ends) != 0) return "no pipe";
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2);
        close(ends[0]);
        emu::config.quiet = false;
        body();
        _exit(0);
    }
    close(ends[1]);
    std::string text;
    char chunk[4096];
    for (ssize_t n; (n = read(ends[0], chunk, sizeof chunk)) > 0;) text.append(chunk, size_t(n));
    close(ends[0]);
    waitpid(child, status, 0);
    return text;
}

static void expect_death(const char* text, const std::function<void()>& body) {
    int status = 0;
    const std::string output = child_output(body, &status);
    if (status == 0) return fail("lived on, expected: %s", text);
    if (output.find(text) == std::string::npos) fail("no \"%s\" in: %.2000s", text, output.c_str());
}

KERNEL(writes_shared_at, 32, 1)(int at, int in_static) {
    SHARED_DYNAMIC(Small, s);
    SHARED_STATIC(float, before, [64]);
    SHARED_STATIC(float, after, [64]);
    if (threadIdx.x == 0) {
        float* place = in_static ? before : s.value;
        place[at] = 1.f;
        after[0] = 0.f;
    }
}
REGISTER_KERNEL(writes_shared_at)
KERNEL(writes_global_at, 32, 1)(float* x, int at) {
    if (threadIdx.x == 0) x[at] = 1.f;
}
REGISTER_KERNEL(writes_global_at)
KERNEL(overflows, 32, 1)(int* x) { x[threadIdx.x] += 0x7fffffff; }
REGISTER_KERNEL(overflows)

TEST(sanitizers_see_kernels) {
    if (!kSanitizeBuild) return;
    for (const int in_static : {0, 1}) {
        CLEAN("writes_shared_at", dim3(2), dim3(32), sizeof(Small), 63, in_static);
        expect_death("AddressSanitizer: use-after-poison", [=] { run("writes_shared_at", dim3(2), dim3(32), sizeof(Small), 64, in_static); });
    }
    float* x = new float[16];
    CLEAN("writes_global_at", dim3(1), dim3(32), 0, x, 15);
    expect_death("AddressSanitizer: heap-buffer-overflow", [=] { run("writes_global_at", dim3(1), dim3(32), 0, x, 16); });
    delete[] x;
    Buffer<float> four(8);
    Buffer<float4> y(1);
    expect_death("misaligned address", [&] { run("loads_four", dim3(1), dim3(32), 0, (const float*)four.data + 1, y.data); });
    Buffer<int> ones(32);
    for (size_t i = 0; i < 32; i++) ones[i] = 1;
    expect_death("signed integer overflow", [&] { run("overflows", dim3(1), dim3(32), 0, ones.data); });
}

__attribute__((noinline)) static float deep(float* x, int depth) {
    volatile float local[256];
    local[depth % 256] = x[0];
    return depth == 0 ? local[0] : deep(x, depth - 1) + local[depth % 256];
}
KERNEL(recurses_deeply, 32, 1)(float* x, int depth) {
    if (threadIdx.x == 0) x[1] = deep(x, depth);
}
REGISTER_KERNEL(recurses_deeply)

TEST(faults_end_the_launch) {
    Buffer<float> x(2);
    x[0] = 1.f;
    CLEAN("recurses_deeply", dim3(1), dim3(32), 0, x.data, 10);
    CHECK(x[1] == 11.f);
    float* const nowhere = reinterpret_cast<float*>(uintptr_t(4096));
    if (kSanitizeBuild) {
        expect_death("stack-overflow", [&] { run("recurses_deeply", dim3(1), dim3(32), 0, x.data, 100000); });
        expect_death("SEGV", [&] { run("writes_global_at", dim3(1), dim3(32), 0, nowhere, 0); });
        return;
    }
    for (int i = 0; i < 3; i++) {
        REPORTS(run("recurses_deeply", dim3(4), dim3(32), 0, x.data, 100000), "stack overflow", "recurses_deeply, block");
        REPORTS(run("writes_global_at", dim3(4), dim3(32), 0, nowhere, 2), "access to address 0x1008, where there is no memory");
        CLEAN("recurses_deeply", dim3(1), dim3(32), 0, x.data, 10);
    }
    // Not in a kernel: the process ends as ever.
    expect_death("", [&] { *const_cast<volatile float*>(nowhere) = 1.f; });
}
