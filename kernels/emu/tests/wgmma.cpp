// wgmma in every form against a plain computation: widths, types, layouts of shared memory, `a` in registers; and the
// mistakes that its rules about registers and fences invite.
#include "harness.h"

#include <cmath>

#include "common/wgmma.cuh"

enum class Form { Shared, Registers, E4m3 };

// Where an element lies: rows of `row_bytes` (16: no swizzle) along k, or along the other dimension where mn_major.
struct Layout {
    uint32_t row_bytes = 128, leading = 0, stride = 1024, start = 0;
    bool mn_major = false;

    Swizzle swizzle() const {
        if (row_bytes == 16) return Swizzle::None;
        return row_bytes == 128 ? Swizzle::Bytes128 : row_bytes == 64 ? Swizzle::Bytes64 : Swizzle::Bytes32;
    }
    // Of the byte `k` (in bytes, K-major) of a row; MN-major, of the two bytes of element (row, k / 2).
    uint32_t at(uint32_t row, uint32_t k) const {
        const uint32_t chunk_bits = row_bytes / 16 - 1;
        uint32_t address = start;
        if (mn_major) {
            const uint32_t element = k / 2, width = row_bytes / 2;
            address += row_bytes == 16 ? row / 8 * stride + element / 8 * leading + element % 8 * 16 + row % 8 * 2
                                       : row / width * leading + element / 8 * stride + element % 8 * row_bytes + row % width * 2;
            address += k % 2;
        } else {
            address += row_bytes == 16 ? row / 8 * stride + row % 8 * 16 + k / 16 * leading + k % 16
                                       : row / 8 * stride + row % 8 * row_bytes + k;
        }
        return address ^ (address / 128 & chunk_bits) * 16;
    }
};

constexpr uint32_t kImageA = 16 * 1024, kImageB = 64 * 1024;
struct Images {
    alignas(1024) uint4 a[kImageA / 16];
    alignas(1024) uint4 b[kImageB / 16];
};
struct Product {
    const uint4 *a, *b;           // images
    const uint32_t* a_registers;  // [128][4]
    const float* c;               // [64, N], or null
    float* d;                     // [64, N]
    Layout a_layout, b_layout;
};

template <class T, int N>
DEVICE void multiply(const Product& p, Form form, Images& s) {
    float d[N / 2];
    const int thread = int(threadIdx.x), top = thread / 32 * 16 + thread % 32 / 4, left = thread % 4 * 2;
    const auto place = [&](int i) { return (top + i / 2 % 2 * 8) * N + i / 4 * 8 + left + i % 2; };
    for (int i = 0; i < N / 2; i++) d[i] = p.c ? p.c[place(i)] : 1e30f;
    uint32_t registers[4];
    for (int i = 0; i < 4; i++) registers[i] = p.a_registers ? p.a_registers[thread * 4 + i] : 0;
    const auto descriptor = [](const void* image, const Layout& l) {
        return wgmma_descriptor(l.swizzle(), smem_u32(image) + l.start, l.leading, l.stride);
    };
    const uint64_t a = descriptor(s.a, p.a_layout), b = descriptor(s.b, p.b_layout);
    wgmma_fence();
    if (form == Form::E4m3) {
        wgmma_e4m3<N>(d, a, b, p.c != nullptr);
    } else if (form == Form::Registers) {
        if (p.b_layout.mn_major) {
            wgmma_registers<T, N, 1>(d, registers, b, p.c != nullptr);
        } else {
            wgmma_registers<T, N>(d, registers, b, p.c != nullptr);
        }
    } else if (p.b_layout.mn_major) {
        wgmma<T, N, 1>(d, a, b, p.c != nullptr);
    } else {
        wgmma<T, N>(d, a, b, p.c != nullptr);
    }
    wgmma_commit();
    wgmma_wait<0>();
    for (int i = 0; i < N / 2; i++) p.d[place(i)] = d[i];
}

template <class T, int N = 8>
DEVICE void multiply_of_width(int n, const Product& p, Form form, Images& s) {
    if (n == N) return multiply<T, N>(p, form, s);
    if constexpr (N < 256) multiply_of_width<T, N + 8>(n, p, form, s);
}

KERNEL(multiplies_once, 128, 1)(Product p, int n, int is_bf16, Form form) {
    SHARED_DYNAMIC(Images, s);
    for (uint32_t i = threadIdx.x; i < kImageA / 16; i += 128) s.a[i] = p.a[i];
    for (uint32_t i = threadIdx.x; i < kImageB / 16; i += 128) s.b[i] = p.b[i];
    fence_proxy_async();
    __syncthreads();
    is_bf16 ? multiply_of_width<bf16>(n, p, form, s) : multiply_of_width<f16>(n, p, form, s);
}
REGISTER_KERNEL(multiplies_once)

static float from_e4m3(uint8_t x) {
    const int exponent = x >> 3 & 15, mantissa = x & 7;
    const float magnitude = exponent ? std::ldexp(float(8 + mantissa), exponent - 10) : std::ldexp(float(mantissa), -9);
    return (x & 0x7f) == 0x7f ? NAN : x & 0x80 ? -magnitude : magnitude;
}

// One product of random factors, all sums exact, in the current mode.
static void check_product(int n, bool is_bf16, Form form, Layout a_layout, Layout b_layout, bool accumulate, int line) {
    const int depth = form == Form::E4m3 ? 32 : 16, bytes = 32 / depth;
    Random random;
    random.state = uint64_t(n * 8 + is_bf16 * 4 + int(form));
    Buffer<uint4> a(kImageA / 16), b(kImageB / 16);
    Buffer<uint32_t> registers(128 * 4);
    Buffer<float> c(size_t(64 * n)), d(size_t(64 * n));
    std::vector<float> a_value(size_t(64 * depth)), b_value(size_t(n * depth));
    const auto fill = [&](std::vector<float>& values, Buffer<uint4>& image, const Layout& layout) {
        for (size_t i = 0; i < values.size(); i++) {
            uint16_t code;
            if (form == Form::E4m3) {
                // Exponents 2^-2 to 2, so that no sum is rounded; or zero.
                const uint32_t bits = random.next();
                code = bits % 8 == 0 ? 0 : uint16_t((bits >> 3 & 0x87) | (5 + (bits >> 12) % 4) << 3);
                values[i] = from_e4m3(uint8_t(code));
            } else {
                values[i] = random.small_integer() * 0.5f;
                code = is_bf16 ? to_bf16(values[i]).x : to_f16(values[i]).x;
            }
            const uint32_t row = uint32_t(i) / uint32_t(depth), k = uint32_t(i) % uint32_t(depth);
            memcpy(reinterpret_cast<char*>(image.data) + layout.at(row, k * uint32_t(bytes)), &code, size_t(bytes));
        }
    };
    fill(a_value, a, a_layout);
    fill(b_value, b, b_layout);
    for (int t = 0; t < 128; t++) {
        for (int i = 0; i < 4; i++) {
            const int row = t / 32 * 16 + t % 32 / 4 + i % 2 * 8, k = t % 4 * 2 + i / 2 * 8;
            const float low = a_value[size_t(row * depth + k)], high = a_value[size_t(row * depth + k + 1)];
            registers[size_t(t * 4 + i)] = is_bf16 ? pack_bf16(low, high) : pack_f16(low, high);
        }
    }
    for (size_t i = 0; i < c.count; i++) c[i] = random.small_integer();
    const Product product{a.data, b.data, registers.data, accumulate ? c.data : nullptr, d.data, a_layout, b_layout};
    expect_clean(run("multiplies_once", dim3(1), dim3(128), sizeof(Images), product, n, int(is_bf16), form), line);
    int wrong = 0;
    for (int i = 0; i < 64 * n; i++) {
        double sum = accumulate ? c[size_t(i)] : 0.;
        for (int k = 0; k < depth; k++) sum += double(a_value[size_t(i / n * depth + k)]) * b_value[size_t(i % n * depth + k)];
        wrong += !(d[size_t(i)] == float(sum));
    }
    if (wrong) {
        fail("line %d: %d of %d wrong, n = %d, %s, form %d (%s)", line, wrong, 64 * n, n, is_bf16 ? "bf16" : "f16", int(form),
             mode_name().c_str());
    }
}

TEST(wgmma_of_every_width) {
    for (int n = 8; n <= 256; n += 8) {
        const Layout rows, columns{128, 2048, 1024, 0, true};
        for (const bool is_bf16 : {true, false}) {
            check_product(n, is_bf16, Form::Shared, rows, rows, n % 16 == 0, __LINE__);
            check_product(n, is_bf16, Form::Shared, rows, columns, n % 16 != 0, __LINE__);
            check_product(n, is_bf16, Form::Registers, rows, rows, n % 16 != 0, __LINE__);
            check_product(n, is_bf16, Form::Registers, rows, columns, n % 16 == 0, __LINE__);
        }
        check_product(n, false, Form::E4m3, rows, rows, n % 16 == 0, __LINE__);
    }
}

TEST(wgmma_in_every_mode) {
    in_every_mode([] {
        check_product(40, true, Form::Shared, {}, {}, true, __LINE__);
        check_product(96, false, Form::Registers, {}, {128, 2048, 1024, 0, true}, true, __LINE__);
    });
}

TEST(wgmma_layouts_of_shared_memory) {
    for (const uint32_t row_bytes : {128u, 64u, 32u}) {
        const Layout plain{row_bytes, 0, 8 * row_bytes};
        for (uint32_t start = 0; start + 32 <= row_bytes; start += 16) {  // a k step within the row
            const Layout step{row_bytes, 0, 8 * row_bytes, start};
            check_product(72, true, Form::Shared, step, plain, true, __LINE__);
            check_product(72, true, Form::Shared, plain, step, true, __LINE__);
            check_product(72, false, Form::E4m3, step, step, true, __LINE__);
        }
        for (uint32_t row = 1; row < 8; row++) {  // the first of its rows, and a stride of no whole pattern
            const Layout shifted{row_bytes, 0, 10 * row_bytes, row * row_bytes};
            check_product(72, true, Form::Shared, shifted, plain, true, __LINE__);
            check_product(72, false, Form::Shared, plain, shifted, true, __LINE__);
        }
        check_product(136, true, Form::Shared, plain, {row_bytes, 16 * row_bytes, 8 * row_bytes, 0, true}, true, __LINE__);
    }
    const Layout none{16, 128, 256}, far{16, 2048, 128};
    check_product(72, true, Form::Shared, none, far, true, __LINE__);
    check_product(72, false, Form::Shared, far, none, true, __LINE__);
    check_product(72, false, Form::E4m3, none, far, true, __LINE__);
    check_product(72, true, Form::Shared, {}, {16, 256, 512, 0, true}, true, __LINE__);
    check_product(72, true, Form::Shared, none, {32, 512, 256, 0, true}, true, __LINE__);  // each operand its own
}

// ---- mistakes ----

struct Operands {
    alignas(1024) uint32_t a[64 * 32];
    alignas(1024) uint32_t b[64 * 32];
};
enum Mistake {
    kNoMistake, kReadsBeforeWait, kWritesBeforeWait, kNoFence, kNoFenceAfterWrite, kFenceTooEarly, kOtherShape,
    kNewRegistersBeforeWait, kNoFenceForRegisters, kNoProxyFence, kNoBarrier, kOverwritesOperand, kOtherDescriptors,
    kPastRow, kMnInsideRow, kBaseOffset, kOutside, kWarpLeaves, kNoCommit, kWaitsForTooMany
};
// d [64, 64] of ones times ones, twice over 16 k: every sum is 32, and one more each from the code between.
KERNEL(wgmma_mistake, 128, 1)(float* out, Mistake mistake) {
    SHARED_DYNAMIC(Operands, s);
    const int thread = int(threadIdx.x);
    for (int i = 0; i < 16; i++) s.a[i * 128 + thread] = s.b[i * 128 + thread] = 0x3f803f80;
    if (mistake != kNoProxyFence) fence_proxy_async();
    if (mistake != kNoBarrier) __syncthreads();
    uint64_t a = wgmma_desc128(smem_u32(s.a), 0, 1024), b = wgmma_desc128(smem_u32(s.b), 0, 1024);
    if (mistake == kOtherDescriptors && thread == 77) a += 2;
    if (mistake == kPastRow) a = wgmma_desc128(smem_u32(s.a) + 112, 0, 1024);
    if (mistake == kBaseOffset) a |= uint64_t(1) << 49;
    if (mistake == kOutside) b = wgmma_desc128(smem_u32(s.b), 0, 2048);
    if (mistake == kWarpLeaves && thread >= 96) return;
    uint32_t ones[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
    float d[32];
    if (mistake == kFenceTooEarly) wgmma_fence();
    for (int round = 0; round < 2; round++) {
        for (int i = 0; i < 32; i++) d[i] = 0.f;
        if (mistake != kNoFence && mistake != kFenceTooEarly && (mistake != kNoFenceAfterWrite || round == 0)) wgmma_fence();
        if (mistake == kFenceTooEarly && round == 1) {
            wgmma_fence();
            d[3] = 1.f;
        }
        if (mistake == kMnInsideRow) {
            wgmma<bf16, 64, 1>(d, a, b + 2, true);
        } else {
            wgmma<bf16, 64>(d, a, b, true);
        }
        wgmma_commit();
        if (mistake == kNewRegistersBeforeWait) ones[1] = 0;
        if (mistake == kOtherShape) wgmma<bf16, 32>(reinterpret_cast<float(&)[16]>(d), a, b, true);
        if (mistake != kNoFenceForRegisters) wgmma_fence();
        wgmma_registers<bf16, 64>(d, ones, b, true);
        if (mistake != kNoCommit) wgmma_commit();
        if (mistake == kNewRegistersBeforeWait) ones[1] = 0x3f803f80;
        if (mistake == kNewRegistersBeforeWait && round == 1) ones[2] = 0;
        if (mistake == kReadsBeforeWait) out[thread * 32] = d[0];
        if (mistake == kWritesBeforeWait) d[5] *= 2.f, d[6] = 3.f;
        if (mistake == kOverwritesOperand) {
            __syncthreads();
            s.b[thread] = 0;
        }
        if (mistake == kWaitsForTooMany) {
            wgmma_wait<1>();
        } else {
            wgmma_wait<0>();
        }
        if (mistake == kOverwritesOperand) s.b[thread] = 0x3f803f80, fence_proxy_async();
        for (int i = mistake == kReadsBeforeWait; i < 32; i++) out[thread * 32 + i] = d[i];
        __syncthreads();
    }
}
REGISTER_KERNEL(wgmma_mistake)

static int wrong_in_mistake(Mistake mistake, int* result) {
    Buffer<float> out(128 * 32);
    for (size_t i = 0; i < out.count; i++) out[i] = 0.f;
    *result = run("wgmma_mistake", dim3(1), dim3(128), sizeof(Operands), out.data, mistake);
    int wrong = 0;
    for (size_t i = 0; i < out.count; i++) wrong += !(out[i] == 32.f);
    return wrong;
}

TEST(wgmma_mistakes_show) {
    const auto reports = [](Mistake mistake, std::initializer_list<const char*> texts, int line) {
        int result;
        wrong_in_mistake(mistake, &result);
        expect_report(result, line, texts);
    };
    in_every_mode([&] {
        int result;
        CHECK(wrong_in_mistake(kNoMistake, &result) == 0);
        expect_clean(result, __LINE__);
        // What nothing reports is wrong every time.
        CHECK(wrong_in_mistake(kReadsBeforeWait, &result) >= 128);
        CHECK(wrong_in_mistake(kNoCommit, &result) > 0);
        CHECK(wrong_in_mistake(kWaitsForTooMany, &result) > 0);
        // Operands are read when a product is issued, or when it is waited for.
        const int overwritten = wrong_in_mistake(kOverwritesOperand, &result);
        if (emu::config.async != emu::Mixed) CHECK((overwritten == 0) == (emu::config.async == emu::Early));
        reports(kWritesBeforeWait, {"wgmma issued at", "accumulators", "written before wgmma_wait"}, __LINE__);
        reports(kNoFence, {"without wgmma_fence since its accumulators were free"}, __LINE__);
        reports(kNoFenceAfterWrite, {"written after the latest wgmma_wait, and no wgmma_fence"}, __LINE__);
        reports(kFenceTooEarly, {"written after the latest wgmma_fence"}, __LINE__);
        reports(kOtherShape, {"wgmma of n = 32 on accumulators of one of n = 64"}, __LINE__);
        reports(kNewRegistersBeforeWait, {"`a` in registers", "changed before wgmma_wait"}, __LINE__);
        reports(kNoFenceForRegisters, {"`a` in registers without wgmma_fence"}, __LINE__);
        reports(kOtherDescriptors, {"different descriptors"}, __LINE__);
        reports(kPastRow, {"a starts at byte 112 of a swizzled row of 128, and goes past its end"}, __LINE__);
        reports(kMnInsideRow, {"b starts at byte 32 of a swizzled row of 128, MN-major"}, __LINE__);
        reports(kBaseOffset, {"base offset"}, __LINE__);
        reports(kOutside, {"of b is at shared memory +", "of which the block has 16384 bytes"}, __LINE__);
        reports(kWarpLeaves, {"its warpgroup", "left the kernel", "wgmma"}, __LINE__);
        if (kRaceBuild) {
            reports(kNoProxyFence, {"without fence.proxy.async", "the wgmma of warpgroup 0"}, __LINE__);
            reports(kNoBarrier, {"RACE", "wgmma of warpgroup 0"}, __LINE__);
            reports(kOverwritesOperand, {"RACE", "write after read", "wgmma of warpgroup 0"}, __LINE__);
        }
    });
}

// ---- registers ----

// Warpgroup 0 gives registers up, the others take them.
KERNEL(shares_registers, 384, 1)(int* out, int how) {
    const unsigned group = threadIdx.x / 128;
    if (group == 0) {
        if (how == 0) setmaxnreg_dec<40>();
        if (how == 1) setmaxnreg_dec<48>();
        if (how == 2) setmaxnreg_dec<176>();
        if (how == 4 && threadIdx.x < 96) setmaxnreg_dec<40>();
        if (how == 5) setmaxnreg_dec<168>();
    } else {
        if (how == 3) setmaxnreg_inc<160>();
        if (how != 5) setmaxnreg_inc<232>();
    }
    out[blockIdx.x * 384 + threadIdx.x] = int(group);
}
REGISTER_KERNEL(shares_registers)
KERNEL(registers_without_bounds, 384, 0)(int* out) {
    setmaxnreg_dec<40>();
    out[threadIdx.x] = 1;
}
REGISTER_KERNEL(registers_without_bounds)

TEST(setmaxnreg_shares_the_block_s_registers) {
    in_every_mode([] {
        Buffer<int> out(2 * 384);
        const auto share = [&](int how) { return run("shares_registers", dim3(2), dim3(384), 0, out.data, how); };
        expect_clean(share(0), __LINE__);
        for (int i = 0; i < 2 * 384; i++) CHECK(out[size_t(i)] == i / 128 % 3);
        expect_clean(share(5), __LINE__);
        REPORTS(share(1), "deadlock", "setmaxnreg.inc at");
        REPORTS(share(2), "setmaxnreg.dec to 176 registers per thread, but the warpgroup has 168");
        REPORTS(share(3), "setmaxnreg.inc to 160 registers per thread, but the warpgroup has 168");
        REPORTS(share(4), "setmaxnreg");
        REPORTS(run("registers_without_bounds", dim3(1), dim3(384), 0, out.data), "launch bounds", "ptxas ignores it");
    });
}

// ---- stmatrix, elect ----

struct StoredRows {
    alignas(16) uint16_t at[64][8];
};
// Lane i's register j holds 2 * (j * 32 + i) and the next. Rows in a scattered order; the rest keeps 0xffff.
KERNEL(stores_matrices, 32, 1)(uint16_t* out, int count, int trans, int forgets_sync) {
    SHARED_DYNAMIC(StoredRows, s);
    const uint32_t lane = threadIdx.x;
    for (int i = 0; i < 16; i++) s.at[i * 4 + lane / 8][lane % 8] = 0xffff;
    __syncwarp();
    uint32_t r[4];
    for (uint32_t j = 0; j < 4; j++) r[j] = 2 * (j * 32 + lane) | (2 * (j * 32 + lane) + 1) << 16;
    void* row = s.at[lane * 5 % 32];
    const uint32_t two[2] = {r[0], r[1]};
    if (count == 1) trans ? stmatrix_x1_trans(row, r[0]) : stmatrix_x1(row, r[0]);
    if (count == 2) trans ? stmatrix_x2_trans(row, two) : stmatrix_x2(row, two);
    if (count == 4) trans ? stmatrix_x4_trans(row, r) : stmatrix_x4(row, r);
    if (!forgets_sync) __syncwarp();
    for (int i = 0; i < 16; i++) out[(i * 4 + lane / 8) * 8 + lane % 8] = s.at[i * 4 + lane / 8][lane % 8];
}
REGISTER_KERNEL(stores_matrices)

TEST(stmatrix_fragments) {
    in_every_mode([] {
        for (const int count : {1, 2, 4}) {
            for (const int trans : {0, 1}) {
                Buffer<uint16_t> out(64 * 8);
                CLEAN("stores_matrices", dim3(1), dim3(32), sizeof(StoredRows), out.data, count, trans, 0);
                std::vector<uint16_t> want(64 * 8, 0xffff);
                for (int matrix = 0; matrix < count; matrix++) {
                    for (int k = 0; k < 64; k++) {  // element k of the fragment: lane k / 2
                        const int row = trans ? k % 8 : k / 8, column = trans ? k / 8 : k % 8;
                        want[size_t((matrix * 8 + row) * 5 % 32 * 8 + column)] = uint16_t(2 * (matrix * 32 + k / 2) + k % 2);
                    }
                }
                for (size_t i = 0; i < out.count; i++) CHECK(out[i] == want[i]);
                const int result = run("stores_matrices", dim3(1), dim3(32), sizeof(StoredRows), out.data, count, trans, 1);
                if (kRaceBuild) {
                    REPORTS(result, "RACE", "read after write");
                } else {
                    expect_clean(result, __LINE__);
                }
            }
        }
    });
}

KERNEL(elects, 64, 1)(int* out, int diverged) {
    if (diverged && threadIdx.x % 32 == 5) return;
    for (int i = 0; i < 3; i++) out[i * 64 + int(threadIdx.x)] = elect_one();
}
REGISTER_KERNEL(elects)

TEST(elect_chooses_one_lane) {
    bool other_than_first = false;
    in_every_mode([&] {
        Buffer<int> out(3 * 64);
        CLEAN("elects", dim3(1), dim3(64), 0, out.data, 0);
        for (int warp = 0; warp < 2; warp++) {
            int sum = 0;
            for (int lane = 0; lane < 32; lane++) {
                const int i = warp * 32 + lane;
                sum += out[size_t(i)];
                CHECK(out[size_t(64 + i)] == out[size_t(i)] && out[size_t(128 + i)] == out[size_t(i)]);
                other_than_first = other_than_first || (lane > 0 && out[size_t(i)]);
            }
            CHECK(sum == 1);
        }
        REPORTS(run("elects", dim3(1), dim3(64), 0, out.data, 1), "elect");
    });
    CHECK(other_than_first);  // which lane it is no kernel may know
}
