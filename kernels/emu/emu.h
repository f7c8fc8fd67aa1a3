// CPU SIMT emulator: declarations seen by kernels when they are built as plain C++20.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <cstdio>
#include <cstdlib>
#include <tuple>
#include <utility>
#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
// NB: never define __noinline__ (libstdc++ uses __attribute__((__noinline__)))

struct alignas(8) float2 { float x, y; };   struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };  struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) int2 { int x, y; };        struct alignas(16) int4 { int x, y, z, w; };
struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x, y, z; constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {} };
static inline float2 make_float2(float a, float b) { return {a, b}; }
static inline float4 make_float4(float a, float b, float c, float d) { return {a, b, c, d}; }
static inline uint2 make_uint2(unsigned a, unsigned b) { return {a, b}; }
static inline uint4 make_uint4(unsigned a, unsigned b, unsigned c, unsigned d) { return {a, b, c, d}; }

namespace emu {
struct Loc { const char* file; int line; constexpr Loc(const char* f = __builtin_FILE(), int l = __builtin_LINE()) : file(f), line(l) {} };
#define EMU_LOC ::emu::Loc loc = ::emu::Loc()   // must be a constructor call: Loc{__builtin_LINE()} would give this line in GCC
struct Ctx { uint3 tid, bid; dim3 bdim, gdim; unsigned lane, warp, lin; };
extern __thread Ctx* cur;   // __thread, not thread_local: no init wrapper call; fibers never migrate between OS threads

// ---- launch ----
enum Sched { InOrder, Reverse, Random, RunAhead };
enum Async { Early, Late, Mixed };
struct Config { Sched sched = InOrder; Async async = Early; uint64_t seed = 1; int threads = 1; int fill = 0xFF; };
extern Config config;
struct Stats { uint64_t switches, barriers, warp_ops, mma, wgmma, ldsm, ldsm_wavefronts, tma, races, errors; };
extern Stats stats;
using Thunk = void (*)(void* const* params);
// A kernel's parameter as the driver sees it: where it lies in the packed argument buffer, and whether it is an address.
struct Param { uint32_t offset, size; bool is_pointer; };
struct Reg {
  const char* name; Thunk fn; const Param* params; unsigned param_count, max_threads; Reg* next;
  Reg(const char* n, Thunk f, const Param* p, unsigned count, unsigned threads); };
const Reg* find_registered(const char* name);  // null: no such kernel
int launch(Thunk fn, dim3 grid, dim3 block, unsigned smem, void* const* params); // 0 = ok, else number of errors
Thunk find(const char* name);
template <class... A, size_t... I> static void call_unpacked(void (*f)(A...), void* const* p, std::index_sequence<I...>) { f(*(std::remove_reference_t<A>*)p[I]...); }
template <auto F> struct Unpack;
template <class... A, void (*F)(A...)> struct Unpack<F> {
  static void call(void* const* p) { call_unpacked(F, p, std::index_sequence_for<A...>{}); }
  static constexpr unsigned count = sizeof...(A);
  struct Params { Param at[count ? count : 1]; };
  static constexpr Params layout() {  // as a C struct of the parameters would be laid out
    Params r{}; uint32_t i = 0, top = 0;
    ((top = (top + alignof(A) - 1) / alignof(A) * alignof(A), r.at[i] = {top, sizeof(A), std::is_pointer_v<A>}, top += sizeof(A), i++), ...);
    return r; }
  static constexpr Params params = layout();
};

// ---- primitives (emu.cpp; compiled once, optimised, never instrumented) ----
void* dyn_smem(size_t need, Loc loc);
void* static_smem(const void* key, size_t bytes, size_t align);
uint32_t smem_addr(const void* p, Loc loc);      // 32-bit shared-window address
[[noreturn]] void die(const char* what, Loc loc);
void barrier(int id, int count /*0 = whole block*/, bool wait, Loc loc);
void syncwarp(uint32_t mask, Loc loc);
enum Shfl { Idx, Up, Down, Xor };
uint64_t shfl(uint32_t mask, uint64_t v, Shfl mode, int arg, int width, Loc loc);
uint32_t ballot(uint32_t mask, bool p, Loc loc);
void ldmatrix(uint32_t* r, int n, bool trans, const void* row, Loc loc);
void mma16816(float* d, const uint32_t* a, const uint32_t* b, const float* c, bool bf16, Loc loc);
void cp_async(void* s, const void* g, int bytes, int src_bytes, Loc loc);
void cp_async_commit(Loc loc);
void cp_async_wait(int pending, Loc loc);
enum AtomicOp { Add, Max, Min, Exch, Or };
uint32_t atomic32(uint32_t* p, uint32_t (*f)(uint32_t, uint32_t), uint32_t v, Loc loc);
// Hopper
void mbar_init(uint64_t* b, uint32_t count, Loc loc);
void mbar_arrive(uint64_t* b, uint32_t tx, Loc loc);              // arrive(1) + expect_tx(tx)
bool mbar_try_wait(uint64_t* b, uint32_t parity, bool block, Loc loc);
struct alignas(64) TensorMap { uint64_t base, dim[5], stride[5]; uint32_t box[5], rank, esize, swizzle; };
int tensor_map_encode(TensorMap* m, int esize, int rank, void* base, const uint64_t* dim, const uint64_t* stride_bytes /*rank-1*/, const uint32_t* box, int swizzle /*0,1,2,3 = none,32,64,128B*/);
void tma_load(void* s, const TensorMap* m, uint64_t* bar, const int* coord, int rank, Loc loc);
void wgmma(float* d, int n, uint64_t da, uint64_t db, bool scale_d, bool bf16, bool tb, Loc loc); // m64 n k16, A and B from smem; tb: B is MN-major
void wgmma_fence(Loc loc); void wgmma_commit(Loc loc); void wgmma_wait(int pending, Loc loc);
void fence_proxy_async(Loc loc);
}  // namespace emu

#define threadIdx (::emu::cur->tid)
#define blockIdx (::emu::cur->bid)
#define blockDim (::emu::cur->bdim)
#define gridDim (::emu::cur->gdim)

static inline void __syncthreads(EMU_LOC) { emu::barrier(0, 0, true, loc); }
static inline void __syncwarp(uint32_t mask = ~0u, EMU_LOC) { emu::syncwarp(mask, loc); }
template <class T> static inline T emu_shfl(uint32_t m, T v, emu::Shfl k, int a, int w, emu::Loc loc) {
  static_assert(sizeof(T) <= 8); uint64_t u = 0; memcpy(&u, &v, sizeof v); u = emu::shfl(m, u, k, a, w, loc); memcpy(&v, &u, sizeof v); return v; }
template <class T> static inline T __shfl_sync(uint32_t m, T v, int s, int w = 32, EMU_LOC) { return emu_shfl(m, v, emu::Idx, s, w, loc); }
template <class T> static inline T __shfl_xor_sync(uint32_t m, T v, int s, int w = 32, EMU_LOC) { return emu_shfl(m, v, emu::Xor, s, w, loc); }
template <class T> static inline T __shfl_down_sync(uint32_t m, T v, int s, int w = 32, EMU_LOC) { return emu_shfl(m, v, emu::Down, s, w, loc); }
template <class T> static inline T __shfl_up_sync(uint32_t m, T v, int s, int w = 32, EMU_LOC) { return emu_shfl(m, v, emu::Up, s, w, loc); }
static inline uint32_t __ballot_sync(uint32_t m, bool p, EMU_LOC) { return emu::ballot(m, p, loc); }
static inline bool __any_sync(uint32_t m, bool p, EMU_LOC) { return emu::ballot(m, p, loc) != 0; }
static inline bool __all_sync(uint32_t m, bool p, EMU_LOC) { return emu::ballot(m, p, loc) == m; }
static inline int atomicAdd(int* p, int v, EMU_LOC) { return (int)emu::atomic32((uint32_t*)p, [](uint32_t a, uint32_t b) { return a + b; }, (uint32_t)v, loc); }
static inline float atomicAdd(float* p, float v, EMU_LOC) { return __builtin_bit_cast(float, emu::atomic32((uint32_t*)p, [](uint32_t a, uint32_t b) { return __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, a) + __builtin_bit_cast(float, b)); }, __builtin_bit_cast(uint32_t, v), loc)); }
#define __expf(x) expf(x)   // glibc already declares ::__expf, __logf, __sinf ...: macros, not functions
static inline float __fdividef(float a, float b) { return a / b; }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
template <class T> static inline T __ldg(const T* p) { return *p; }
static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }

// ---- types and portable layer ----
struct bf16 { uint16_t x; };  struct f16 { uint16_t x; };
static inline float to_f32(float x) { return x; }
static inline float to_f32(bf16 b) { return __builtin_bit_cast(float, (uint32_t)b.x << 16); }
static inline bf16 to_bf16(float f) { uint32_t u = __builtin_bit_cast(uint32_t, f); if ((u & 0x7fffffff) > 0x7f800000) return {0x7fff}; return {(uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16)}; }
static inline float to_f32(f16 b) { return (float)__builtin_bit_cast(_Float16, b.x); }
static inline f16 to_f16(float f) { return {__builtin_bit_cast(uint16_t, (_Float16)f)}; }
static inline uint32_t pack_bf16(float lo, float hi) { return to_bf16(lo).x | (uint32_t)to_bf16(hi).x << 16; }
static inline uint32_t pack_f16(float lo, float hi) { return to_f16(lo).x | (uint32_t)to_f16(hi).x << 16; }
static inline float exp2_approx(float x) { return exp2f(x); }
static inline float rcp_approx(float x) { return 1.0f / x; }

#define DEVICE static inline
#define GRID_CONST const
#define KERNEL(name, maxthreads, minblocks) \
  static constexpr unsigned name##_max_threads = maxthreads; \
  static void name
#define REGISTER_KERNEL(name) \
  static ::emu::Reg emu_reg_##name{#name, &::emu::Unpack<&name>::call, ::emu::Unpack<&name>::params.at, ::emu::Unpack<&name>::count, name##_max_threads};
#define SHARED_DYNAMIC(T, name) T& name = *(T*)::emu::dyn_smem(sizeof(T), ::emu::Loc{__FILE__, __LINE__})
#define SHARED_STATIC(T, name, dims) typedef T name##_arr dims; static char name##_key; name##_arr& name = *(name##_arr*)::emu::static_smem(&name##_key, sizeof(name##_arr), alignof(name##_arr) < 16 ? 16 : alignof(name##_arr))
#define UNROLL

static inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, EMU_LOC) { emu::ldmatrix(r, 4, false, row, loc); }
static inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, EMU_LOC) { emu::ldmatrix(r, 4, true, row, loc); }
template <class T> static inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMU_LOC) { uint32_t b[2] = {b0, b1}; emu::mma16816(d, a, b, d, std::is_same_v<T, bf16>, loc); }
static inline void cp_async_16(void* s, const void* g, bool pred, EMU_LOC) { emu::cp_async(s, g, 16, pred ? 16 : 0, loc); }
static inline void cp_async_4(void* s, const void* g, bool pred, EMU_LOC) { emu::cp_async(s, g, 4, pred ? 4 : 0, loc); }
static inline void cp_async_commit(EMU_LOC) { emu::cp_async_commit(loc); }
template <int N> static inline void cp_async_wait(EMU_LOC) { emu::cp_async_wait(N, loc); }
static inline void named_barrier_sync(int id, int n, EMU_LOC) { emu::barrier(id, n, true, loc); }
static inline void named_barrier_arrive(int id, int n, EMU_LOC) { emu::barrier(id, n, false, loc); }
// Hopper
using TensorMap = emu::TensorMap;
static inline uint32_t smem_u32(const void* p, EMU_LOC) { return emu::smem_addr(p, loc); }
static inline void mbar_init(uint64_t* b, int n, EMU_LOC) { emu::mbar_init(b, n, loc); }
static inline void mbar_fence_init() {}
static inline void mbar_arrive(uint64_t* b, EMU_LOC) { emu::mbar_arrive(b, 0, loc); }
static inline void mbar_arrive_expect_tx(uint64_t* b, uint32_t bytes, EMU_LOC) { emu::mbar_arrive(b, bytes, loc); }
static inline void mbar_wait(uint64_t* b, uint32_t parity, EMU_LOC) { emu::mbar_try_wait(b, parity, true, loc); }
static inline void tma_load_2d(void* s, const TensorMap* m, uint64_t* bar, int c0, int c1, EMU_LOC) { int c[2] = {c0, c1}; emu::tma_load(s, m, bar, c, 2, loc); }
static inline void fence_proxy_async(EMU_LOC) { emu::fence_proxy_async(loc); }
static inline void wgmma_fence(EMU_LOC) { emu::wgmma_fence(loc); }
static inline void wgmma_commit(EMU_LOC) { emu::wgmma_commit(loc); }
template <int N> static inline void wgmma_wait(EMU_LOC) { emu::wgmma_wait(N, loc); }
template <class T, int TB = 0> static inline void wgmma_m64n64k16(float (&d)[32], uint64_t da, uint64_t db, bool scale_d, EMU_LOC) { emu::wgmma(d, 64, da, db, scale_d, std::is_same_v<T, bf16>, TB, loc); }
template <class T, int TB = 0> static inline void wgmma_m64n128k16(float (&d)[64], uint64_t da, uint64_t db, bool scale_d, EMU_LOC) { emu::wgmma(d, 128, da, db, scale_d, std::is_same_v<T, bf16>, TB, loc); }
template <int N> static inline void setmaxnreg_inc() {}
template <int N> static inline void setmaxnreg_dec() {}
