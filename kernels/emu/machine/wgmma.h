// A warpgroup's words (common/wgmma.cuh): products, setmaxnreg, stmatrix, elect.
// Not modelled: base offsets of descriptors, negated or transposed `a`, sums in f16, and that the card keeps only some 14
// bits of sums of e4m3.
#pragma once
#include "emu.h"

namespace emu {
enum class Factors : uint8_t { Bf16, F16, E4m3 };
// `a_registers`: four of the thread, or null: by the descriptor `a`. b_transposed: b is MN-major.
void wgmma(float* d, int n, Factors factors, const uint32_t* a_registers, uint64_t a, uint64_t b, bool accumulate,
           bool b_transposed, Loc loc);
void wgmma_fence(Loc loc);
void wgmma_commit(Loc loc);
void wgmma_wait(int pending, Loc loc);
void setmaxnreg(int registers, bool increase, Loc loc);
void stmatrix(void* row, const uint32_t* r, int count, bool trans, Loc loc);
bool elect(Loc loc);
}  // namespace emu

static inline void wgmma_fence(EMU_LOC) { emu::wgmma_fence(loc); }
static inline void wgmma_commit(EMU_LOC) { emu::wgmma_commit(loc); }
template <int N>
static inline void wgmma_wait(EMU_LOC) {
    emu::wgmma_wait(N, loc);
}
static inline void fence_register(float&) {}
static inline void fence_register(uint32_t&) {}
static inline void work_before_wait(float) {}
template <class T, int N, int kTransposedB = 0>
static inline void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate, EMU_LOC) {
    static_assert(N >= 8 && N <= 256 && N % 8 == 0 && (std::is_same_v<T, bf16> || std::is_same_v<T, f16>));
    const emu::Factors factors = std::is_same_v<T, bf16> ? emu::Factors::Bf16 : emu::Factors::F16;
    emu::wgmma(d, N, factors, nullptr, a, b, accumulate, kTransposedB, loc);
}
template <class T, int N, int kTransposedB = 0>
static inline void wgmma_registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate, EMU_LOC) {
    static_assert(N >= 8 && N <= 256 && N % 8 == 0 && (std::is_same_v<T, bf16> || std::is_same_v<T, f16>));
    const emu::Factors factors = std::is_same_v<T, bf16> ? emu::Factors::Bf16 : emu::Factors::F16;
    emu::wgmma(d, N, factors, a, 0, b, accumulate, kTransposedB, loc);
}
template <int N>
static inline void wgmma_e4m3(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate, EMU_LOC) {
    static_assert(N >= 8 && N <= 256 && N % 8 == 0);
    emu::wgmma(d, N, emu::Factors::E4m3, nullptr, a, b, accumulate, false, loc);
}
template <int N>
static inline void setmaxnreg_inc(EMU_LOC) {
    static_assert(N >= 24 && N <= 256 && N % 8 == 0);
    emu::setmaxnreg(N, true, loc);
}
template <int N>
static inline void setmaxnreg_dec(EMU_LOC) {
    static_assert(N >= 24 && N <= 256 && N % 8 == 0);
    emu::setmaxnreg(N, false, loc);
}
static inline void stmatrix_x1(void* row, uint32_t r, EMU_LOC) { emu::stmatrix(row, &r, 1, false, loc); }
static inline void stmatrix_x1_trans(void* row, uint32_t r, EMU_LOC) { emu::stmatrix(row, &r, 1, true, loc); }
static inline void stmatrix_x2(void* row, const uint32_t (&r)[2], EMU_LOC) { emu::stmatrix(row, r, 2, false, loc); }
static inline void stmatrix_x2_trans(void* row, const uint32_t (&r)[2], EMU_LOC) { emu::stmatrix(row, r, 2, true, loc); }
static inline void stmatrix_x4(void* row, const uint32_t (&r)[4], EMU_LOC) { emu::stmatrix(row, r, 4, false, loc); }
static inline void stmatrix_x4_trans(void* row, const uint32_t (&r)[4], EMU_LOC) { emu::stmatrix(row, r, 4, true, loc); }
static inline bool elect_one(EMU_LOC) { return emu::elect(loc); }
