// The words of a warpgroup (sm_90a): its products, with every width; setmaxnreg, stmatrix, elect.
// As in common/device.cuh: PTX instructions under nvcc, plain C++ on the emulated card.
//
// Products:  wgmma_fence();                              after the last access to d, and to `a` in registers
//            wgmma<bf16, 128>(d, a, b, false); ...       asynchronous, one after the other
//            wgmma_commit();
//            wgmma_wait<0>();                            until here nobody touches d, `a` or what the descriptors name
// d [64, N] lies in the registers of 128 threads: thread t holds in d[4 i + 2 h + j] row t / 32 * 16 + t % 32 / 4 + 8 h,
// column 8 i + t % 4 * 2 + j. What ordinary stores wrote into an operand's shared memory needs fence_proxy_async().
#pragma once
#include "common/hopper.cuh"
#ifndef __CUDACC__
#include "emu/machine/wgmma.h"
#else

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most N of the warpgroup's latest groups are under way.
template <int N>
DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// The compiler moves no use of the register across this line. For d before wgmma_fence: ptxas says C7519 where it was needed.
DEVICE void fence_register(float& x) { asm volatile("" : "+f"(x)::"memory"); }
DEVICE void fence_register(uint32_t& x) { asm volatile("" : "+r"(x)::"memory"); }
// What makes x, which is not negative, stays before this line, and a wgmma_wait behind it stays behind: ptxas moves such a
// wait, which reads no register, up to the products whose time that work is to fill. A branch on x that is never taken ends
// the basic block; a trap in it would make ptxas ignore setmaxnreg, an empty branch is removed.
DEVICE void work_before_wait(float x) {
    if (x < 0.f) asm volatile("nanosleep.u32 1;" ::: "memory");
}

// The preprocessor writes out the 32 widths: nothing is generated, so nothing can be out of date. A line has N and the
// numbers of the seven operands after the N / 2 of d.
#define WGMMA_WIDTHS(X) \
    X(8, 4, 5, 6, 7, 8, 9, 10) \
    X(16, 8, 9, 10, 11, 12, 13, 14) \
    X(24, 12, 13, 14, 15, 16, 17, 18) \
    X(32, 16, 17, 18, 19, 20, 21, 22) \
    X(40, 20, 21, 22, 23, 24, 25, 26) \
    X(48, 24, 25, 26, 27, 28, 29, 30) \
    X(56, 28, 29, 30, 31, 32, 33, 34) \
    X(64, 32, 33, 34, 35, 36, 37, 38) \
    X(72, 36, 37, 38, 39, 40, 41, 42) \
    X(80, 40, 41, 42, 43, 44, 45, 46) \
    X(88, 44, 45, 46, 47, 48, 49, 50) \
    X(96, 48, 49, 50, 51, 52, 53, 54) \
    X(104, 52, 53, 54, 55, 56, 57, 58) \
    X(112, 56, 57, 58, 59, 60, 61, 62) \
    X(120, 60, 61, 62, 63, 64, 65, 66) \
    X(128, 64, 65, 66, 67, 68, 69, 70) \
    X(136, 68, 69, 70, 71, 72, 73, 74) \
    X(144, 72, 73, 74, 75, 76, 77, 78) \
    X(152, 76, 77, 78, 79, 80, 81, 82) \
    X(160, 80, 81, 82, 83, 84, 85, 86) \
    X(168, 84, 85, 86, 87, 88, 89, 90) \
    X(176, 88, 89, 90, 91, 92, 93, 94) \
    X(184, 92, 93, 94, 95, 96, 97, 98) \
    X(192, 96, 97, 98, 99, 100, 101, 102) \
    X(200, 100, 101, 102, 103, 104, 105, 106) \
    X(208, 104, 105, 106, 107, 108, 109, 110) \
    X(216, 108, 109, 110, 111, 112, 113, 114) \
    X(224, 112, 113, 114, 115, 116, 117, 118) \
    X(232, 116, 117, 118, 119, 120, 121, 122) \
    X(240, 120, 121, 122, 123, 124, 125, 126) \
    X(248, 124, 125, 126, 127, 128, 129, 130) \
    X(256, 128, 129, 130, 131, 132, 133, 134)

// The text of d's operands, and what they are.
#define WGMMA_TEXT_8 "%0,%1,%2,%3"
#define WGMMA_TEXT_16 WGMMA_TEXT_8 ",%4,%5,%6,%7"
#define WGMMA_TEXT_24 WGMMA_TEXT_16 ",%8,%9,%10,%11"
#define WGMMA_TEXT_32 WGMMA_TEXT_24 ",%12,%13,%14,%15"
#define WGMMA_TEXT_40 WGMMA_TEXT_32 ",%16,%17,%18,%19"
#define WGMMA_TEXT_48 WGMMA_TEXT_40 ",%20,%21,%22,%23"
#define WGMMA_TEXT_56 WGMMA_TEXT_48 ",%24,%25,%26,%27"
#define WGMMA_TEXT_64 WGMMA_TEXT_56 ",%28,%29,%30,%31"
#define WGMMA_TEXT_72 WGMMA_TEXT_64 ",%32,%33,%34,%35"
#define WGMMA_TEXT_80 WGMMA_TEXT_72 ",%36,%37,%38,%39"
#define WGMMA_TEXT_88 WGMMA_TEXT_80 ",%40,%41,%42,%43"
#define WGMMA_TEXT_96 WGMMA_TEXT_88 ",%44,%45,%46,%47"
#define WGMMA_TEXT_104 WGMMA_TEXT_96 ",%48,%49,%50,%51"
#define WGMMA_TEXT_112 WGMMA_TEXT_104 ",%52,%53,%54,%55"
#define WGMMA_TEXT_120 WGMMA_TEXT_112 ",%56,%57,%58,%59"
#define WGMMA_TEXT_128 WGMMA_TEXT_120 ",%60,%61,%62,%63"
#define WGMMA_TEXT_136 WGMMA_TEXT_128 ",%64,%65,%66,%67"
#define WGMMA_TEXT_144 WGMMA_TEXT_136 ",%68,%69,%70,%71"
#define WGMMA_TEXT_152 WGMMA_TEXT_144 ",%72,%73,%74,%75"
#define WGMMA_TEXT_160 WGMMA_TEXT_152 ",%76,%77,%78,%79"
#define WGMMA_TEXT_168 WGMMA_TEXT_160 ",%80,%81,%82,%83"
#define WGMMA_TEXT_176 WGMMA_TEXT_168 ",%84,%85,%86,%87"
#define WGMMA_TEXT_184 WGMMA_TEXT_176 ",%88,%89,%90,%91"
#define WGMMA_TEXT_192 WGMMA_TEXT_184 ",%92,%93,%94,%95"
#define WGMMA_TEXT_200 WGMMA_TEXT_192 ",%96,%97,%98,%99"
#define WGMMA_TEXT_208 WGMMA_TEXT_200 ",%100,%101,%102,%103"
#define WGMMA_TEXT_216 WGMMA_TEXT_208 ",%104,%105,%106,%107"
#define WGMMA_TEXT_224 WGMMA_TEXT_216 ",%108,%109,%110,%111"
#define WGMMA_TEXT_232 WGMMA_TEXT_224 ",%112,%113,%114,%115"
#define WGMMA_TEXT_240 WGMMA_TEXT_232 ",%116,%117,%118,%119"
#define WGMMA_TEXT_248 WGMMA_TEXT_240 ",%120,%121,%122,%123"
#define WGMMA_TEXT_256 WGMMA_TEXT_248 ",%124,%125,%126,%127"
#define WGMMA_FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_D_8 WGMMA_FOUR(0)
#define WGMMA_D_16 WGMMA_D_8, WGMMA_FOUR(4)
#define WGMMA_D_24 WGMMA_D_16, WGMMA_FOUR(8)
#define WGMMA_D_32 WGMMA_D_24, WGMMA_FOUR(12)
#define WGMMA_D_40 WGMMA_D_32, WGMMA_FOUR(16)
#define WGMMA_D_48 WGMMA_D_40, WGMMA_FOUR(20)
#define WGMMA_D_56 WGMMA_D_48, WGMMA_FOUR(24)
#define WGMMA_D_64 WGMMA_D_56, WGMMA_FOUR(28)
#define WGMMA_D_72 WGMMA_D_64, WGMMA_FOUR(32)
#define WGMMA_D_80 WGMMA_D_72, WGMMA_FOUR(36)
#define WGMMA_D_88 WGMMA_D_80, WGMMA_FOUR(40)
#define WGMMA_D_96 WGMMA_D_88, WGMMA_FOUR(44)
#define WGMMA_D_104 WGMMA_D_96, WGMMA_FOUR(48)
#define WGMMA_D_112 WGMMA_D_104, WGMMA_FOUR(52)
#define WGMMA_D_120 WGMMA_D_112, WGMMA_FOUR(56)
#define WGMMA_D_128 WGMMA_D_120, WGMMA_FOUR(60)
#define WGMMA_D_136 WGMMA_D_128, WGMMA_FOUR(64)
#define WGMMA_D_144 WGMMA_D_136, WGMMA_FOUR(68)
#define WGMMA_D_152 WGMMA_D_144, WGMMA_FOUR(72)
#define WGMMA_D_160 WGMMA_D_152, WGMMA_FOUR(76)
#define WGMMA_D_168 WGMMA_D_160, WGMMA_FOUR(80)
#define WGMMA_D_176 WGMMA_D_168, WGMMA_FOUR(84)
#define WGMMA_D_184 WGMMA_D_176, WGMMA_FOUR(88)
#define WGMMA_D_192 WGMMA_D_184, WGMMA_FOUR(92)
#define WGMMA_D_200 WGMMA_D_192, WGMMA_FOUR(96)
#define WGMMA_D_208 WGMMA_D_200, WGMMA_FOUR(100)
#define WGMMA_D_216 WGMMA_D_208, WGMMA_FOUR(104)
#define WGMMA_D_224 WGMMA_D_216, WGMMA_FOUR(108)
#define WGMMA_D_232 WGMMA_D_224, WGMMA_FOUR(112)
#define WGMMA_D_240 WGMMA_D_232, WGMMA_FOUR(116)
#define WGMMA_D_248 WGMMA_D_240, WGMMA_FOUR(120)
#define WGMMA_D_256 WGMMA_D_248, WGMMA_FOUR(124)

// `types`: from k on. Operand o0: accumulate; o1: b; then those of `a` and `last`, texts. Neither factor is negated.
#define WGMMA_PTX(n, types, o0, o1, a, last)                                                                     \
    "{\n.reg .pred p;\nsetp.ne.b32 p, %" #o0 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n types " {" WGMMA_TEXT_##n \
    "}, " a ", %" #o1 ", p, 1, 1" last ";\n}"
#define WGMMA_SHARED(n, o0, o1, o2, o3, ...)                                                      \
    if constexpr (N == n && same_type<T, bf16>)                                                   \
        asm volatile(WGMMA_PTX(n, "k16.f32.bf16.bf16", o0, o1, "%" #o3, ", 0, %" #o2)             \
                     : WGMMA_D_##n                                                                \
                     : "r"(int(accumulate)), "l"(b), "n"(kTransposedB), "l"(a));                  \
    if constexpr (N == n && same_type<T, f16>)                                                    \
        asm volatile(WGMMA_PTX(n, "k16.f32.f16.f16", o0, o1, "%" #o3, ", 0, %" #o2)               \
                     : WGMMA_D_##n                                                                \
                     : "r"(int(accumulate)), "l"(b), "n"(kTransposedB), "l"(a));
#define WGMMA_REGISTERS(n, o0, o1, o2, o3, o4, o5, o6)                                                                  \
    if constexpr (N == n && same_type<T, bf16>)                                                                         \
        asm volatile(WGMMA_PTX(n, "k16.f32.bf16.bf16", o0, o1, "{%" #o3 ",%" #o4 ",%" #o5 ",%" #o6 "}", ", %" #o2)      \
                     : WGMMA_D_##n                                                                                      \
                     : "r"(int(accumulate)), "l"(b), "n"(kTransposedB), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]));    \
    if constexpr (N == n && same_type<T, f16>)                                                                          \
        asm volatile(WGMMA_PTX(n, "k16.f32.f16.f16", o0, o1, "{%" #o3 ",%" #o4 ",%" #o5 ",%" #o6 "}", ", %" #o2)        \
                     : WGMMA_D_##n                                                                                      \
                     : "r"(int(accumulate)), "l"(b), "n"(kTransposedB), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]));
#define WGMMA_E4M3(n, o0, o1, o2, ...)                                              \
    if constexpr (N == n)                                                           \
        asm volatile(WGMMA_PTX(n, "k32.f32.e4m3.e4m3", o0, o1, "%" #o2, "")         \
                     : WGMMA_D_##n                                                  \
                     : "r"(int(accumulate)), "l"(b), "l"(a));

// d = a b, or d += a b where `accumulate`: a [64, 16] and b [16, N] by descriptors, a K-major, b K-major (rows of 16 k) or
// with kTransposedB MN-major (rows of n). Sums in f32.
template <class T, int N, int kTransposedB = 0>
DEVICE void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    static_assert(N >= 8 && N <= 256 && N % 8 == 0 && (same_type<T, bf16> || same_type<T, f16>));
    WGMMA_WIDTHS(WGMMA_SHARED)
}
// The same with `a` from registers, two elements each: thread t has rows t / 32 * 16 + t % 32 / 4 (a[0], a[2]) and 8 below
// (a[1], a[3]), columns t % 4 * 2 and the next (a[0], a[1]) and 8 further (a[2], a[3]): as mma.m16n8k16 has them.
template <class T, int N, int kTransposedB = 0>
DEVICE void wgmma_registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    static_assert(N >= 8 && N <= 256 && N % 8 == 0 && (same_type<T, bf16> || same_type<T, f16>));
    WGMMA_WIDTHS(WGMMA_REGISTERS)
}
// d [64, N] of e4m3 a [64, 32] and b [32, N], both K-major. The card's sums keep some 14 bits: add them up in f32 outside
// every 128 of K or so.
template <int N>
DEVICE void wgmma_e4m3(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    static_assert(N >= 8 && N <= 256 && N % 8 == 0);
    WGMMA_WIDTHS(WGMMA_E4M3)
}

// ---- registers ----

// Registers per thread, for the whole warpgroup: a multiple of 8 from 24 to 256. dec leaves what is above N to the block, inc
// waits until the block's warpgroups have left enough. Before: what KERNEL's bounds give, 65536 / (threads * blocks) rounded
// down to 8. No sum of the warpgroups may exceed that, so 384 threads have 3 * 168 to share out, such as 40 + 2 * 232.
template <int N>
DEVICE void setmaxnreg_inc() {
    static_assert(N >= 24 && N <= 256 && N % 8 == 0);
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
DEVICE void setmaxnreg_dec() {
    static_assert(N >= 24 && N <= 256 && N % 8 == 0);
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// ---- warps ----

// One, two or four 8x8 matrices of 16-bit elements to shared memory, the reverse of ldmatrix: lane i names row i % 8 of matrix
// i / 8 (16 bytes, aligned), and gives of row lane / 4 elements lane % 4 * 2 and the next; with _trans of that column.
DEVICE void stmatrix_x1(void* row, uint32_t r) {
    asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(smem_u32(row)), "r"(r) : "memory");
}
DEVICE void stmatrix_x1_trans(void* row, uint32_t r) {
    asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(smem_u32(row)), "r"(r) : "memory");
}
DEVICE void stmatrix_x2(void* row, const uint32_t (&r)[2]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1,%2};" ::"r"(smem_u32(row)), "r"(r[0]), "r"(r[1])
                 : "memory");
}
DEVICE void stmatrix_x2_trans(void* row, const uint32_t (&r)[2]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};" ::"r"(smem_u32(row)), "r"(r[0]), "r"(r[1])
                 : "memory");
}
DEVICE void stmatrix_x4(void* row, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(smem_u32(row)), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
}
DEVICE void stmatrix_x4_trans(void* row, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(smem_u32(row)), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
}

// True in one lane of the warp, the same each time. Which one is the card's choice.
DEVICE bool elect_one() {
    uint32_t elected;
    asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}" : "=r"(elected)::"memory");
    return elected;
}
#endif

// ---- the same in both worlds ----

// Swizzle of an operand in shared memory, as the descriptor has it: the 16-byte chunks of a row of 128, 64 or 32 bytes are
// exchanged by address bits 7 and up, as TMA writes them. None: 8 rows of 16 bytes, one after the other.
enum class Swizzle : uint64_t { None = 0, Bytes128 = 1, Bytes64 = 2, Bytes32 = 3 };

// An operand at `address` (smem_u32, a multiple of 16). Offsets in bytes, multiples of 16:
//   K-major, swizzled        stride: from 8 rows to the next 8. leading: not read
//   K-major, no swizzle      stride: from 8 rows to the next 8. leading: from 8 elements of a row to the next 8
//   MN-major, swizzled       stride: from 8 k to the next 8. leading: from a row's width of n to the next
//   MN-major, no swizzle     stride: from 8 n to the next 8. leading: from 8 k to the next 8
// Of a swizzled K-major operand the address may lie inside a row, at its k-th element, and rows may begin at any multiple of
// the row's width.
DEVICE uint64_t wgmma_descriptor(Swizzle swizzle, uint32_t address, uint32_t leading, uint32_t stride) {
    return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 |
           uint64_t(swizzle) << 62;
}
// With rows of 128 bytes.
DEVICE uint64_t wgmma_desc128(uint32_t address, uint32_t leading, uint32_t stride) {
    return wgmma_descriptor(Swizzle::Bytes128, address, leading, stride);
}
