// Every primitive against a plain computation, in every mode; and that correct kernels are reported clean.
#include "harness.h"

#include "common/wgmma.cuh"

// ---- indices, registration, configuration ----

KERNEL(write_indices, 64, 2)(uint32_t* out) {
    const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    out[block * (blockDim.x * blockDim.y * blockDim.z) + thread] = block << 16 | thread;
}
REGISTER_KERNEL(write_indices)

TEST(indices_cover_the_grid) {
    in_every_mode([] {
        Buffer<uint32_t> out(2 * 3 * 5 * 60);
        CLEAN("write_indices", dim3(2, 3, 5), dim3(3, 4, 5), 0, out.data);
        for (uint32_t i = 0; i < out.count; i++) CHECK(out[i] == ((i / 60) << 16 | i % 60));
    });
}

struct Pair {
    double a;
    char b;
};
KERNEL(takes_everything, 96, 1)(char, double, const float*, Pair, short) {}
REGISTER_KERNEL(takes_everything)

TEST(the_table_knows_parameters_and_bounds) {
    const emu::Kernel* k = emu::find_registered("takes_everything");
    CHECK(k && k == emu::find_registered(k->fn) && k->max_threads == 96 && k->min_blocks == 1 && k->param_count == 5);
    const emu::Param expected[] = {{0, 1, false}, {8, 8, false}, {16, 8, true}, {24, 16, false}, {40, 2, false}};
    for (unsigned i = 0; k && i < 5; i++) {
        CHECK(k->params[i].offset == expected[i].offset && k->params[i].size == expected[i].size &&
              k->params[i].is_pointer == expected[i].is_pointer);
    }
    CHECK(k && strstr(k->file, "primitives.cpp"));
    CHECK(!emu::find_registered("no_such_kernel"));
}

TEST(the_environment_configures) {
    setenv("MEGAFUSE_EMU_SCHEDULE", "run-ahead", 1);
    setenv("MEGAFUSE_EMU_ASYNC", "late", 1);
    setenv("MEGAFUSE_EMU_SEED", "77", 1);
    setenv("MEGAFUSE_EMU_THREADS", "1", 1);
    CHECK(emu::configure_from_environment());
    CHECK(emu::config.sched == emu::RunAhead && emu::config.async == emu::Late && emu::config.seed == 77);
    CHECK(emu::config.threads == 1);
    setenv("MEGAFUSE_EMU_SCHEDULE", "sideways", 1);
    CHECK(!emu::configure_from_environment());
    CHECK(strstr(emu::last_error(), "MEGAFUSE_EMU_SCHEDULE=sideways: expected in-order, reverse, random, run-ahead"));
    unsetenv("MEGAFUSE_EMU_SCHEDULE");
    setenv("MEGAFUSE_EMU_THREADS", "two", 1);
    CHECK(!emu::configure_from_environment());
    CHECK(strstr(emu::last_error(), "MEGAFUSE_EMU_THREADS=two: expected a number from 1"));
    for (const char* name : {"ASYNC", "SEED", "THREADS"}) unsetenv((std::string("MEGAFUSE_EMU_") + name).c_str());
    CHECK(emu::configure_from_environment() && emu::config.sched == emu::Random && emu::config.async == emu::Mixed);
}

// ---- barriers ----

// Reverses each row of 256 through shared memory, three times over the same place.
KERNEL(reverse_rows, 256, 1)(const float* x, float* y) {
    SHARED_STATIC(float, row, [256]);
    float value = x[blockIdx.x * 256 + threadIdx.x];
    for (int i = 0; i < 3; i++) {
        row[threadIdx.x] = value;
        __syncthreads();
        value = row[255 - threadIdx.x];
        __syncthreads();
    }
    y[blockIdx.x * 256 + threadIdx.x] = value;
}
REGISTER_KERNEL(reverse_rows)

TEST(barriers_order_shared_memory) {
    for (const int threads : {1, 2, 4}) {
        in_every_mode([threads] {
            emu::config.threads = threads;
            Buffer<float> x(7 * 256), y(7 * 256);
            for (size_t i = 0; i < x.count; i++) x[i] = float(i);
            CLEAN("reverse_rows", dim3(7), dim3(256), 0, (const float*)x.data, y.data);
            for (size_t i = 0; i < x.count; i++) CHECK(y[i] == float(i / 256 * 256 + 255 - i % 256));
        });
    }
}

// Warps 0, 1 fill two slots in turn, warps 2, 3 read them: full and empty barriers of their own.
struct Slots {
    int value[2][64];
};
KERNEL(producer_consumer, 128, 1)(int* out, int rounds) {
    SHARED_DYNAMIC(Slots, s);
    const int tid = threadIdx.x % 64;
    if (threadIdx.x < 64) {
        for (int i = 0; i < rounds; i++) {
            if (i >= 2) named_barrier_sync(3 + i % 2, 128);
            s.value[i % 2][tid] = i * 100 + tid;
            named_barrier_arrive(1 + i % 2, 128);
        }
    } else {
        for (int i = 0; i < rounds; i++) {
            named_barrier_sync(1 + i % 2, 128);
            out[i * 64 + tid] = s.value[i % 2][63 - tid];
            if (i + 2 < rounds) named_barrier_arrive(3 + i % 2, 128);
        }
    }
}
REGISTER_KERNEL(producer_consumer)

TEST(named_barriers_order_producer_and_consumer) {
    in_every_mode([] {
        Buffer<int> out(9 * 64);
        CLEAN("producer_consumer", dim3(1), dim3(128), sizeof(Slots), out.data, 9);
        for (int i = 0; i < 9 * 64; i++) CHECK(out[i] == i / 64 * 100 + 63 - i % 64);
    });
}

// A barrier orders global memory within a block too.
KERNEL(exchange_through_global, 64, 1)(float* x) {
    x[threadIdx.x] = float(threadIdx.x);
    __syncthreads();
    const float other = x[63 - threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = other;
}
REGISTER_KERNEL(exchange_through_global)

TEST(barriers_order_global_memory) {
    in_every_mode([] {
        Buffer<float> x(64);
        CLEAN("exchange_through_global", dim3(1), dim3(64), 0, x.data);
        for (int i = 0; i < 64; i++) CHECK(x[i] == float(63 - i));
    });
}

KERNEL(sums, 128, 1)(int* counts, float* total, int* largest, unsigned long long* wide) {
    atomicAdd(&counts[threadIdx.x % 3], 1);
    atomicAdd(total, 0.5f);
    atomicMax(largest, int(threadIdx.x));
    atomicAdd(wide, 1ull << 33);
}
REGISTER_KERNEL(sums)

TEST(atomics_of_all_blocks_add_up) {
    in_every_mode([] {
        Buffer<int> counts(3), largest(1);
        Buffer<float> total(1);
        Buffer<unsigned long long> wide(1);
        counts[0] = counts[1] = counts[2] = 0;
        largest[0] = -5;
        total[0] = 0.f;
        wide[0] = 0;
        CLEAN("sums", dim3(10), dim3(128), 0, counts.data, total.data, largest.data, wide.data);
        CHECK(counts[0] == 430 && counts[1] == 430 && counts[2] == 420);
        CHECK(total[0] == 640.f && largest[0] == 127 && wide[0] == 1280ull << 33);
    });
}

// ---- warps ----

KERNEL(all_shuffles, 32, 1)(const int* x, int* out, int width, int arg) {
    const int lane = int(threadIdx.x), value = x[lane];
    out[lane] = __shfl_sync(0xffffffffu, value, arg, width);
    out[32 + lane] = __shfl_up_sync(0xffffffffu, value, unsigned(arg), width);
    out[64 + lane] = __shfl_down_sync(0xffffffffu, value, unsigned(arg), width);
    out[96 + lane] = __shfl_xor_sync(0xffffffffu, value, arg, width);
    const double wide = __shfl_xor_sync(0xffffffffu, double(value), 1);
    out[128 + lane] = int(wide);
    out[160 + lane] = int(__ballot_sync(0xffffffffu, value % 3 == 0));
    out[192 + lane] = __any_sync(0xffffffffu, value == 1031) + 2 * __all_sync(0xffffffffu, value >= 1000);
}
REGISTER_KERNEL(all_shuffles)

TEST(shuffles_and_votes) {
    in_every_mode([] {
        for (const int width : {1, 2, 4, 8, 16, 32}) {
            for (const int arg : {0, 1, 3, 7, 16, 31}) {
                Buffer<int> x(32), out(7 * 32);
                uint32_t votes = 0;
                for (int i = 0; i < 32; i++) {
                    x[i] = 1000 + i;
                    if (x[i] % 3 == 0) votes |= 1u << i;
                }
                CLEAN("all_shuffles", dim3(1), dim3(32), 0, (const int*)x.data, out.data, width, arg);
                for (int lane = 0; lane < 32; lane++) {
                    const int first = lane / width * width, within = lane - first;
                    CHECK(out[lane] == x[first + arg % width]);
                    CHECK(out[32 + lane] == x[within >= arg ? lane - arg : lane]);
                    CHECK(out[64 + lane] == x[within + arg < width ? lane + arg : lane]);
                    CHECK(out[96 + lane] == x[(lane ^ arg) < first + width ? lane ^ arg : lane]);
                    CHECK(out[128 + lane] == x[lane ^ 1]);
                    CHECK(uint32_t(out[160 + lane]) == votes && out[192 + lane] == 3);
                }
            }
        }
    });
}

// The two halves of a warp in operations of their own; a partial last warp; lanes that left.
KERNEL(diverged, 48, 1)(int* out) {
    const unsigned lane = threadIdx.x % 32;
    if (threadIdx.x < 32) {
        if (lane < 16) {
            out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, int(lane), 5);
            __syncwarp(0x0000ffffu);
        } else {
            __syncwarp(0xffff0000u);
            out[threadIdx.x] = __shfl_xor_sync(0xffff0000u, int(lane), 9);
        }
        return;
    }
    if (lane == 0) {
        out[threadIdx.x] = -1;
        return;
    }
    out[threadIdx.x] = int(__ballot_sync(0xfffffffeu, true));
}
REGISTER_KERNEL(diverged)

TEST(diverged_warps) {
    in_every_mode([] {
        Buffer<int> out(48);
        CLEAN("diverged", dim3(1), dim3(48), 0, out.data);
        for (int i = 0; i < 16; i++) {
            CHECK(out[i] == (i ^ 5));
            CHECK(out[16 + i] == ((16 + i) ^ 9));
            CHECK(out[32 + i] == (i ? 0xfffe : -1));
        }
    });
}

// ---- matrices ----

struct Matrices {
    alignas(16) uint16_t at[2][32][8];
};
// Each warp's own part; rows in a scattered order.
KERNEL(load_matrices, 64, 1)(const uint16_t* x, uint32_t* out, int trans) {
    SHARED_DYNAMIC(Matrices, s);
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane * 5 % 32;
    for (int i = 0; i < 8; i++) s.at[warp][lane][i] = x[threadIdx.x * 8 + i];
    __syncwarp();
    uint32_t r[4];
    if (trans) {
        ldmatrix_x4_trans(r, s.at[warp][row]);
    } else {
        ldmatrix_x4(r, s.at[warp][row]);
    }
    for (int i = 0; i < 4; i++) out[threadIdx.x * 4 + i] = r[i];
}
REGISTER_KERNEL(load_matrices)

TEST(ldmatrix_fragments) {
    in_every_mode([] {
        for (const int trans : {0, 1}) {
            Buffer<uint16_t> x(64 * 8);
            Buffer<uint32_t> out(64 * 4);
            for (size_t i = 0; i < x.count; i++) x[i] = uint16_t(i * 77);
            CLEAN("load_matrices", dim3(1), dim3(64), sizeof(Matrices), (const uint16_t*)x.data, out.data, trans);
            for (int t = 0; t < 64; t++) {
                for (int i = 0; i < 4; i++) {
                    // Matrix i, row k is named by lane 8 i + k; a lane gets row lane / 4, columns lane % 4 * 2 and the next.
                    const auto element = [&](int k, int column) {
                        return x[size_t(t / 32 * 256 + (8 * i + k) * 5 % 32 * 8 + column)];
                    };
                    const int lane = t % 32, a = lane / 4, b = lane % 4 * 2;
                    const uint16_t low = trans ? element(b, a) : element(a, b);
                    const uint16_t high = trans ? element(b + 1, a) : element(a, b + 1);
                    CHECK(out[size_t(t * 4 + i)] == (low | uint32_t(high) << 16));
                }
            }
        }
    });
}

// d += a b for one warp; a [16, 16] row-major, b [16, 8] row-major, d [16, 8].
template <class T>
DEVICE void one_mma(const T* a, const T* b, float* d) {
    const unsigned lane = threadIdx.x, g = lane / 4, t = lane % 4;
    const auto pair = [](T low, T high) { return low.x | uint32_t(high.x) << 16; };
    uint32_t fragment[4];
    for (unsigned i = 0; i < 4; i++) {
        const T* p = a + (g + i % 2 * 8) * 16 + t * 2 + i / 2 * 8;
        fragment[i] = pair(p[0], p[1]);
    }
    const T* column = b + t * 2 * 8 + g;
    float sum[4];
    for (unsigned i = 0; i < 4; i++) sum[i] = d[(g + i / 2 * 8) * 8 + t * 2 + i % 2];
    mma_m16n8k16<T>(sum, fragment, pair(column[0], column[8]), pair(column[64], column[72]));
    for (unsigned i = 0; i < 4; i++) d[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = sum[i];
}
KERNEL(mma_bf16, 32, 1)(const bf16* a, const bf16* b, float* d) { one_mma(a, b, d); }
REGISTER_KERNEL(mma_bf16)
KERNEL(mma_f16, 32, 1)(const f16* a, const f16* b, float* d) { one_mma(a, b, d); }
REGISTER_KERNEL(mma_f16)

static bool same_float(float a, float b) {
    return (a != a && b != b) || std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b);
}

template <class T>
static void check_mma(const char* kernel) {
    Random random;
    for (int trial = 0; trial < 6; trial++) {
        Buffer<T> a(256), b(128);
        Buffer<float> d(128);
        // Bit patterns of every kind in the last trials: subnormals, Inf and NaN too.
        const auto value = [&]() -> T { return trial < 3 ? from_f32<T>(random.uniform()) : T{uint16_t(random.next())}; };
        for (size_t i = 0; i < 256; i++) a[i] = value();
        for (size_t i = 0; i < 128; i++) b[i] = value();
        if (trial == 3) {
            for (size_t i = 0; i < 256; i++) a[i].x &= 0x83ff;  // f16: subnormals only
        }
        std::vector<float> expected(128);
        for (size_t i = 0; i < 128; i++) {
            d[i] = random.uniform();
            float sum = d[i];
            for (size_t k = 0; k < 16; k++) sum += to_f32(a[i / 8 * 16 + k]) * to_f32(b[k * 8 + i % 8]);
            expected[i] = sum;
        }
        CLEAN(kernel, dim3(1), dim3(32), 0, (const T*)a.data, (const T*)b.data, d.data);
        for (size_t i = 0; i < 128; i++) {
            if (!same_float(d[i], expected[i])) fail("%s trial %d [%zu]: %g, not %g", kernel, trial, i, d[i], expected[i]);
        }
    }
}

TEST(mma_fragments) {
    in_every_mode([] {
        check_mma<bf16>("mma_bf16");
        check_mma<f16>("mma_f16");
    });
}

// ---- cp.async ----

struct Staged {
    float4 four[3][32];
    float one[32];
};
KERNEL(staged_copies, 32, 1)(const float4* x, const float* ones, float4* out, float* out_ones, int valid) {
    SHARED_DYNAMIC(Staged, s);
    const int lane = int(threadIdx.x);
    for (int group = 0; group < 3; group++) {
        cp_async_16(&s.four[group][lane], x + group * 32 + lane, lane < valid);
        if (group == 1) cp_async_4(&s.one[lane], ones + lane, lane % 3 != 0);
        cp_async_commit();
    }
    cp_async_wait<2>();
    out[lane] = s.four[0][lane];  // a thread's own copies need no barrier
    cp_async_wait<1>();
    out[32 + lane] = s.four[1][lane];
    out_ones[lane] = s.one[lane];
    cp_async_wait<0>();
    out[64 + lane] = s.four[2][lane];
    __syncwarp();
    s.four[0][lane] = s.four[2][31 - lane];
}
REGISTER_KERNEL(staged_copies)

TEST(cp_async_groups_and_zero_fill) {
    in_every_mode([] {
        Buffer<float4> x(96), out(96);
        Buffer<float> ones(32), out_ones(32);
        for (int i = 0; i < 96; i++) x[size_t(i)] = make_float4(float(i), 1.f, 2.f, float(-i));
        for (int i = 0; i < 32; i++) ones[size_t(i)] = float(i + 500);
        CLEAN("staged_copies", dim3(1), dim3(32), sizeof(Staged), (const float4*)x.data, (const float*)ones.data, out.data,
              out_ones.data, 20);
        for (int i = 0; i < 96; i++) {
            const float4 v = out[size_t(i)];
            const bool valid = i % 32 < 20;
            CHECK(v.x == (valid ? float(i) : 0.f) && v.y == (valid ? 1.f : 0.f) && v.z == (valid ? 2.f : 0.f) &&
                  v.w == (valid ? float(-i) : 0.f));
        }
        for (int i = 0; i < 32; i++) CHECK(out_ones[size_t(i)] == (i % 3 ? float(i + 500) : 0.f));
    });
}

// Many groups in flight over a ring of shared memory.
struct Ring {
    float slot[4][64];
};
KERNEL(ring_sum, 64, 1)(const float* x, float* y, int steps) {
    SHARED_DYNAMIC(Ring, s);
    const int tid = int(threadIdx.x);
    for (int i = 0; i < 3; i++) {
        cp_async_4(&s.slot[i][tid], x + i * 64 + tid, i < steps);
        cp_async_commit();
    }
    float sum = 0.f;
    for (int i = 0; i < steps; i++) {
        cp_async_wait<2>();
        __syncthreads();
        sum += s.slot[i % 4][(tid + 1) % 64];
        const int ahead = i + 3;
        cp_async_4(&s.slot[ahead % 4][tid], ahead < steps ? x + ahead * 64 + tid : x, ahead < steps);
        cp_async_commit();
    }
    y[tid] = sum;
}
REGISTER_KERNEL(ring_sum)

TEST(cp_async_ring) {
    in_every_mode([] {
        const int steps = 300;
        Buffer<float> x(size_t(steps) * 64), y(64);
        Random random;
        for (size_t i = 0; i < x.count; i++) x[i] = random.small_integer();
        CLEAN("ring_sum", dim3(1), dim3(64), sizeof(Ring), (const float*)x.data, y.data, steps);
        for (int t = 0; t < 64; t++) {
            float sum = 0.f;
            for (int i = 0; i < steps; i++) sum += x[size_t(i * 64 + (t + 1) % 64)];
            CHECK(y[size_t(t)] == sum);
        }
    });
}

// ---- arithmetic ----

TEST(every_f16_and_its_rounding) {
    for (uint32_t bits = 0; bits < 65536; bits++) {
        const f16 h{uint16_t(bits)};
        const float expected = float(std::bit_cast<_Float16>(uint16_t(bits)));
        CHECK(same_float(to_f32(h), expected));
        if (expected == expected) CHECK(to_f16(expected).x == bits);
    }
    CHECK(to_f16(NAN).x == 0x7fff && to_f16(-NAN).x == 0x7fff && to_bf16(-NAN).x == 0x7fff);
    for (uint64_t bits = 0; bits < 1ull << 32; bits += 4801) {  // of all kinds; 4801 is prime
        const float x = std::bit_cast<float>(uint32_t(bits));
        if (x != x) continue;
        CHECK(to_f16(x).x == std::bit_cast<uint16_t>(_Float16(x)));
        // bf16: nearest of the two neighbours, the even one of equals.
        const uint32_t low = uint32_t(bits) >> 16, tail = uint32_t(bits) & 0xffff;
        const uint32_t rounded = tail > 0x8000 || (tail == 0x8000 && (low & 1)) ? low + 1 : low;
        CHECK(to_bf16(x).x == rounded);
    }
    CHECK(pack_f16(1.f, -2.f) == 0xc0003c00u && pack_bf16(1.f, -2.f) == 0xc0003f80u);
}

TEST(approximations_flush_subnormals) {
    CHECK(exp2_approx(-126.f) == 0x1p-126f && exp2_approx(-126.5f) == 0.f && !std::signbit(exp2_approx(-200.f)));
    CHECK(exp2_approx(1e-40f) == 1.f && exp2_approx(-INFINITY) == 0.f && exp2_approx(INFINITY) == INFINITY);
    CHECK(exp2_approx(128.f) == INFINITY && std::isnan(exp2_approx(NAN)));
    CHECK(rcp_approx(1e-40f) == INFINITY && rcp_approx(-1e-40f) == -INFINITY && rcp_approx(0.f) == INFINITY);
    CHECK(rcp_approx(0x1p127f) == 0.f && rcp_approx(-INFINITY) == 0.f && std::signbit(rcp_approx(-INFINITY)));
    CHECK(std::isnan(rcp_approx(NAN)));
    Random random;
    for (int i = 0; i < 10000; i++) {
        const float x = random.uniform() * 100.f;
        CHECK(std::fabs(exp2_approx(x) / std::exp2(double(x)) - 1.0) < 3e-7);
        if (x != 0.f) CHECK(std::fabs(double(rcp_approx(x)) * x - 1.0) < 2e-7);
    }
}

// ---- Hopper ----

struct WgmmaTiles {
    alignas(1024) bf16 a[64 * 64];
    alignas(1024) bf16 b[64 * 64];
    uint64_t full;
};
// d [64, 64] = a [64, 64] b^T, both loaded by TMA with the 128-byte swizzle. `bug`: see bugs.cpp.
KERNEL(tma_wgmma, 128, 1)(GRID_CONST TensorMap a, GRID_CONST TensorMap b, float* d, int row, int bug) {
    SHARED_DYNAMIC(WgmmaTiles, s);
    const int tid = int(threadIdx.x);
    if (tid == 0) {
        mbar_init(&s.full, 1);
        mbar_fence_init();
    }
    __syncthreads();
    if (tid == 0) {
        mbar_arrive_expect_tx(&s.full, bug == 2 ? sizeof s.a : sizeof s.a + sizeof s.b);
        tma_load_2d(s.a, &a, &s.full, 0, row);
        tma_load_2d(s.b, &b, &s.full, 0, 0);
    }
    if (bug != 1) mbar_wait(&s.full, 0);
    float sum[32] = {};
    wgmma_fence();
    for (uint32_t k = 0; k < 4; k++) {
        const uint64_t a_rows = wgmma_desc128(smem_u32(s.a) + k * 32, 16, 1024);
        const uint64_t b_rows = wgmma_desc128(smem_u32(s.b) + k * 32, 16, 1024);
        wgmma<bf16, 64>(sum, a_rows, b_rows, k > 0);
    }
    wgmma_commit();
    if (bug != 3) wgmma_wait<0>();
    for (int i = 0; i < 32; i++) {
        const int r = tid / 32 * 16 + tid % 32 / 4 + (i / 2 % 2) * 8, c = i / 4 * 8 + tid % 4 * 2 + i % 2;
        d[r * 64 + c] = sum[i];
    }
}
REGISTER_KERNEL(tma_wgmma)

// The rows from `row` on, zeros past the last: the number of wrong elements.
int wrong_in_tma_wgmma(int bug) {
    const int rows = 100, row = 60;
    Buffer<bf16> a(rows * 64), b(64 * 64);
    Buffer<float> d(64 * 64);
    Random random;
    for (size_t i = 0; i < a.count; i++) a[i] = to_bf16(random.small_integer());
    for (size_t i = 0; i < b.count; i++) b[i] = to_bf16(random.small_integer());
    TensorMap map_a, map_b;
    const uint64_t dim_a[] = {64, rows}, dim_b[] = {64, 64}, stride[] = {128};
    const uint32_t box[] = {64, 64};
    CHECK(emu::tensor_map_encode(&map_a, 2, 2, a.data, dim_a, stride, box, 3) == 0);
    CHECK(emu::tensor_map_encode(&map_b, 2, 2, b.data, dim_b, stride, box, 3) == 0);
    if (run("tma_wgmma", dim3(1), dim3(128), sizeof(WgmmaTiles), map_a, map_b, d.data, row, bug)) return -1;
    int wrong = 0;
    for (int i = 0; i < 64 * 64; i++) {
        float sum = 0.f;
        for (int k = 0; k < 64 && row + i / 64 < rows; k++) {
            sum += to_f32(a[size_t((row + i / 64) * 64 + k)]) * to_f32(b[size_t(i % 64 * 64 + k)]);
        }
        wrong += !(d[size_t(i)] == sum);
    }
    return wrong;
}

TEST(tma_and_wgmma) {
    in_every_mode([] {
        const int wrong = wrong_in_tma_wgmma(0);
        if (wrong) fail("%d wrong: %s (%s)", wrong, emu::last_error(), mode_name().c_str());
    });
}
