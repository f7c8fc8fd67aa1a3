// The emulated card. A kernel built by a host C++20 compiler includes this (through common/device.cuh) and finds every
// word of device.cuh here as plain C++; the driver look-alike uses the first section to find and launch kernels.
//
//   types.h           vector types, f16, bf16, arithmetic               seen by kernels
//   emu.h             launches; primitives, where CUDA and device.cuh name them
//   hopper.h          mbarrier, TMA, clusters                           seen by kernels with common/hopper.cuh
//   wgmma.h           a warpgroup's words                               seen by kernels with common/wgmma.cuh
//   machine.h         one block on one worker thread                     internal
//   launch.cpp        kernel table, configuration, worker pool, messages
//   fibers.cpp        context switch, stacks, the scheduler, shared memory
//   collectives.cpp   block barriers, warp shuffles, ldmatrix, mma, atomics
//   async.cpp         cp.async
//   fault.cpp         illegal addresses
//   cluster.cpp       clusters: their barrier, shared memory of other blocks, dependent launches
//   hopper.cpp        mbarrier, TMA
//   wgmma.cpp         a warpgroup's products and registers
//   race.cpp          the race detector, in builds with -DEMU_RACE
//
// A cluster, mostly of one block, is one thread of the host, its threads are fibers: a thread runs until it waits for others. Which warp goes
// next, which lane of it first and when an asynchronous copy lands is decided by Config, the same way for the same seed
// and whatever the number of workers. Whatever the card leaves undefined or punishes is an error that ends the launch.
//
// Flags. All builds: -std=c++20 -fPIC -ffp-contract=off -fno-strict-aliasing.
//   plain     -O2
//   race      -O1 -g -DEMU_RACE on all, -fsanitize=thread on the .cu files only. Never linked with libtsan: race.cpp has
//             the functions that the instrumentation calls. Blocks run one after the other.
//   sanitize  -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all on all. A process that
//             is not instrumented loads it with LD_PRELOAD=$(c++ -print-file-name=libasan.so) and
//             ASAN_OPTIONS=detect_leaks=0.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>

#include "types.h"

namespace emu {

// ---- where a primitive was called ----

struct Loc {
    const char* file;
    int line;
    constexpr Loc(const char* file = __builtin_FILE(), int line = __builtin_LINE()) : file(file), line(line) {}
};
// The last parameter of a primitive. It must be a constructor call: Loc{__builtin_LINE()} would be this line.
#define EMU_LOC ::emu::Loc loc = ::emu::Loc()

// ---- configuration ----

enum Sched {
    InOrder,   // the warp that runs, then the next one
    Reverse,   // the last warp and lane that can run
    Random,    // any warp at any point where it waits or completes a warp's operation
    RunAhead,  // warps have fixed random ranks; the highest that can run does, as far as it can
};
enum Async {
    Early,  // copies land when they are issued
    Late,   // when they are waited for; until then their destination is poison
    Mixed,  // each one way or the other
};
struct Config {
    Sched sched = Random;
    Async async = Mixed;
    uint64_t seed = 1;
    int threads = 2;  // host threads that run blocks; results do not depend on it
    int fill = 0xFF;     // bytes of fresh shared memory: NaN in every float type
    bool quiet = false;  // messages only in last_error(), not on stderr
};
extern Config config;
// Reads MEGAFUSE_EMU_SCHEDULE=in-order|reverse|random|run-ahead, MEGAFUSE_EMU_ASYNC=early|late|mixed,
// MEGAFUSE_EMU_SEED=n and MEGAFUSE_EMU_THREADS=n. False: one has no such value; the message is on stderr and in last_error().
bool configure_from_environment();

// ---- kernels and launches ----

using Thunk = void (*)(void* const* params);
// A parameter as the driver sees it: where it lies in the packed argument buffer, and whether it is an address.
struct Param {
    uint32_t offset, size;
    bool is_pointer;
};
struct Kernel {
    const char* name;
    const char* file;  // of the .cu
    Thunk fn;          // one thread's body
    unsigned max_threads, min_blocks;  // its launch bounds
    const Param* params;
    unsigned param_count;
    const Kernel* next;
    Kernel(const char* name, const char* file, Thunk fn, const unsigned (&bounds)[2], const Param* params,
           unsigned param_count);
};
using Reg = Kernel;
const Kernel* first_kernel();                        // of all, a list in no order
const Kernel* find_registered(const char* name);     // or null
const Kernel* find_registered(Thunk fn);             // or null
Thunk find(const char* name);                        // or null

// What cuLaunchKernelEx says beyond the shape: blocks of a cluster along each dimension, which divide the grid's, at most 8
// in all; whether the launch may begin before the previous one has ended (programmatic stream serialization).
struct LaunchAttributes {
    uint32_t cluster[3] = {1, 1, 1};
    bool dependent = false;
};
// Runs the whole grid. 0: done; negative: refused before anything ran; positive: number of errors and races.
// `params[i]` points to the value of parameter i; `smem` is the dynamic shared memory in bytes. Launches wait for each other.
int launch(Thunk fn, dim3 grid, dim3 block, unsigned smem, void* const* params, const LaunchAttributes& attributes = {});
// What went wrong in the latest launch of this host thread, a line each; empty if nothing did.
const char* last_error();

// The driver's table of allocations: the one that holds `address`, as [begin, end). With it, cp.async and atomics (in the
// race build every access) outside all allocations are errors.
using AllocationLookup = bool (*)(uintptr_t address, uintptr_t* begin, uintptr_t* end);
void set_allocation_lookup(AllocationLookup lookup);

// What cuTensorMapEncodeTiled does (hopper.h). `stride_bytes`: of dims 1 and up; `swizzle`: 0, 1, 2, 3 for none, 32, 64, 128
// bytes. 0, or 1 for what the driver refuses.
struct TensorMap;
int tensor_map_encode(TensorMap* map, int element_bytes, int rank, void* base, const uint64_t* dim,
                      const uint64_t* stride_bytes, const uint32_t* box, int swizzle);
// What cuTensorMapEncodeIm2col does. The corners are of the spatial dimensions, 1 to rank - 2, the element strides of all.
int tensor_map_encode_im2col(TensorMap* map, int element_bytes, int rank, void* base, const uint64_t* dim,
                             const uint64_t* stride_bytes, const int* lower_corner, const int* upper_corner,
                             uint32_t channels, uint32_t pixels, const uint32_t* element_strides, int swizzle);

struct Stats {
    uint64_t switches, barriers, warp_ops, mma, wgmma, ldsm, ldsm_wavefronts, tma, races, errors;
};
extern Stats stats;  // sums over all launches

// ---- the running thread ----

struct BlockIndex {
    uint3 block;
    dim3 block_dim, grid_dim;
};
struct Context {
    uint3 thread;
    unsigned lane, warp, index;  // index: linear in the block
    const BlockIndex* block;
};
// Initial-exec: two loads instead of a call. All thread-local data of the library then lies in the static block, where a
// loaded library gets some hundred bytes: keep large things out of it.
extern __thread Context* cur __attribute__((tls_model("initial-exec")));

// ---- primitives: compiled once, optimised, never instrumented for races ----

[[noreturn]] void die(const char* what, Loc loc);
void* dyn_smem(size_t need, Loc loc);
void* static_smem(const void* key, size_t bytes, size_t align);
uint32_t smem_addr(const void* p, Loc loc);                     // in the 32-bit shared window
void barrier(int id, int count, bool wait, Loc loc);            // count 0: the whole block, id 0
void syncwarp(uint32_t mask, Loc loc);
enum Shfl { Idx, Up, Down, Xor };
uint64_t shfl(uint32_t mask, uint64_t value, Shfl mode, int arg, int width, Loc loc);
uint32_t ballot(uint32_t mask, bool predicate, Loc loc);
uint32_t active_mask();
void ldmatrix(uint32_t* r, int count, bool trans, const void* row, Loc loc);
void mma16816(float* d, const uint32_t* a, const uint32_t* b, const float* c, bool is_bf16, Loc loc);
void cp_async(void* shared, const void* global, int bytes, int source_bytes, Loc loc);
void cp_async_commit(Loc loc);
void cp_async_wait(int pending, Loc loc);
using Combine32 = uint32_t (*)(uint32_t old, uint32_t operand);
uint32_t atomic32(uint32_t* p, Combine32 combine, uint32_t operand, Loc loc);
uint64_t atomic64(uint64_t* p, uint64_t (*combine)(uint64_t, uint64_t), uint64_t operand, Loc loc);
uint32_t compare_and_swap32(uint32_t* p, uint32_t expected, uint32_t desired, Loc loc);
// Between blocks: an atomic that releases what its thread knows and acquires what others released there, a load that
// acquires, a store that releases, and the fence that makes relaxed atomics after it release, before it acquire.
uint32_t add_acq_rel(uint32_t* p, uint32_t operand, Loc loc);
uint32_t load_acquire(const uint32_t* p, Loc loc);
void store_release(uint32_t* p, uint32_t value, Loc loc);
void thread_fence(Loc loc);
// Dependent launches.
void next_may_start(Loc loc);
void wait_for_previous(Loc loc);

// ---- registration ----

#define EMU_UNINSTRUMENTED __attribute__((no_sanitize("thread")))

template <auto F>
struct Entry;
template <class... A, void (*F)(A...)>
struct Entry<F> {
    template <size_t... I>
    EMU_UNINSTRUMENTED static void call(void* const* params, std::index_sequence<I...>) {
        F(*static_cast<std::remove_reference_t<A>*>(params[I])...);
    }
    EMU_UNINSTRUMENTED static void run(void* const* params) { call(params, std::index_sequence_for<A...>{}); }

    static constexpr unsigned count = sizeof...(A);
    struct Layout {
        Param params[count + 1];  // never empty
        // As a C struct of the parameters would be laid out.
        constexpr Layout() : params{} {
            uint32_t i = 0, end = 0;
            ((end = (end + alignof(A) - 1) / alignof(A) * alignof(A), params[i++] = {end, sizeof(A), std::is_pointer_v<A>},
              end += sizeof(A)), ...);
        }
    };
    static constexpr Layout layout{};
};
}  // namespace emu

#define DEVICE static inline
#define UNROLL
#define ROLLED
#define GRID_CONST const
#define KERNEL(name, max_threads, min_blocks)                                                      \
    static constexpr unsigned emu_bounds_##name[2] = {unsigned(max_threads), unsigned(min_blocks)}; \
    __attribute__((noinline)) static void name
#define REGISTER_KERNEL(name)                                                                            \
    static const ::emu::Kernel emu_kernel_##name(#name, __FILE__, ::emu::Entry<&name>::run, emu_bounds_##name, \
                                                 ::emu::Entry<&name>::layout.params, ::emu::Entry<&name>::count);

#define SHARED_DYNAMIC(T, name) T& name = *static_cast<T*>(::emu::dyn_smem(sizeof(T), ::emu::Loc(__FILE__, __LINE__)))
#define SHARED_STATIC(T, name, dims)          \
    typedef T name##_shared_type dims;        \
    static char name##_shared_key;            \
    name##_shared_type& name = *static_cast<name##_shared_type*>(::emu::static_smem( \
        &name##_shared_key, sizeof(name##_shared_type), alignof(name##_shared_type)))

// ---- CUDA's own words ----

#define threadIdx (::emu::cur->thread)
#define blockIdx (::emu::cur->block->block)
#define blockDim (::emu::cur->block->block_dim)
#define gridDim (::emu::cur->block->grid_dim)
constexpr int warpSize = 32;

static inline void __syncthreads(EMU_LOC) { emu::barrier(0, 0, true, loc); }
static inline void __syncwarp(uint32_t mask = ~0u, EMU_LOC) { emu::syncwarp(mask, loc); }
static inline void __threadfence(EMU_LOC) { emu::thread_fence(loc); }
static inline void __threadfence_block() {}

namespace emu {
template <class T>
static inline T shuffle(uint32_t mask, T value, Shfl mode, int arg, int width, Loc loc) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = shfl(mask, bits, mode, arg, width, loc);
    memcpy(&value, &bits, sizeof value);
    return value;
}
}  // namespace emu
template <class T>
static inline T __shfl_sync(uint32_t mask, T value, int lane, int width = 32, EMU_LOC) {
    return emu::shuffle(mask, value, emu::Idx, lane, width, loc);
}
template <class T>
static inline T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = 32, EMU_LOC) {
    return emu::shuffle(mask, value, emu::Xor, lane_mask, width, loc);
}
template <class T>
static inline T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, EMU_LOC) {
    return emu::shuffle(mask, value, emu::Down, int(delta), width, loc);
}
template <class T>
static inline T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, EMU_LOC) {
    return emu::shuffle(mask, value, emu::Up, int(delta), width, loc);
}
static inline uint32_t __ballot_sync(uint32_t mask, bool predicate, EMU_LOC) { return emu::ballot(mask, predicate, loc); }
static inline bool __any_sync(uint32_t mask, bool predicate, EMU_LOC) { return emu::ballot(mask, predicate, loc) != 0; }
static inline bool __all_sync(uint32_t mask, bool predicate, EMU_LOC) { return emu::ballot(mask, !predicate, loc) == 0; }
static inline uint32_t __activemask() { return emu::active_mask(); }

static inline int atomicAdd(int* p, int value, EMU_LOC) {
    const auto add = [](uint32_t a, uint32_t b) { return a + b; };
    return int(emu::atomic32(reinterpret_cast<uint32_t*>(p), add, uint32_t(value), loc));
}
static inline unsigned atomicAdd(unsigned* p, unsigned value, EMU_LOC) {
    return emu::atomic32(p, [](uint32_t a, uint32_t b) { return a + b; }, value, loc);
}
static inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long value, EMU_LOC) {
    const auto add = [](uint64_t a, uint64_t b) { return a + b; };
    return emu::atomic64(reinterpret_cast<uint64_t*>(p), add, value, loc);
}
static inline float atomicAdd(float* p, float value, EMU_LOC) {
    const auto add = [](uint32_t a, uint32_t b) {
        return std::bit_cast<uint32_t>(std::bit_cast<float>(a) + std::bit_cast<float>(b));
    };
    const uint32_t old = emu::atomic32(reinterpret_cast<uint32_t*>(p), add, std::bit_cast<uint32_t>(value), loc);
    return std::bit_cast<float>(old);
}
static inline int atomicMax(int* p, int value, EMU_LOC) {
    const auto larger = [](uint32_t a, uint32_t b) { return int(a) < int(b) ? b : a; };
    return int(emu::atomic32(reinterpret_cast<uint32_t*>(p), larger, uint32_t(value), loc));
}
static inline int atomicMin(int* p, int value, EMU_LOC) {
    const auto smaller = [](uint32_t a, uint32_t b) { return int(b) < int(a) ? b : a; };
    return int(emu::atomic32(reinterpret_cast<uint32_t*>(p), smaller, uint32_t(value), loc));
}
static inline unsigned atomicOr(unsigned* p, unsigned value, EMU_LOC) {
    return emu::atomic32(p, [](uint32_t a, uint32_t b) { return a | b; }, value, loc);
}
static inline unsigned atomicExch(unsigned* p, unsigned value, EMU_LOC) {
    return emu::atomic32(p, [](uint32_t, uint32_t b) { return b; }, value, loc);
}
static inline unsigned atomicCAS(unsigned* p, unsigned expected, unsigned desired, EMU_LOC) {
    return emu::compare_and_swap32(p, expected, desired, loc);
}

// ---- the words of device.cuh ----

static inline uint32_t smem_u32(const void* p, EMU_LOC) { return emu::smem_addr(p, loc); }
static inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, EMU_LOC) { emu::ldmatrix(r, 4, false, row, loc); }
static inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, EMU_LOC) {
    emu::ldmatrix(r, 4, true, row, loc);
}
template <class T>
static inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMU_LOC) {
    static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
    const uint32_t b[2] = {b0, b1};
    emu::mma16816(d, a, b, d, std::is_same_v<T, bf16>, loc);
}
static inline void cp_async_16(void* shared, const void* global, bool pred, EMU_LOC) {
    emu::cp_async(shared, global, 16, pred ? 16 : 0, loc);
}
static inline void cp_async_4(void* shared, const void* global, bool pred, EMU_LOC) {
    emu::cp_async(shared, global, 4, pred ? 4 : 0, loc);
}
static inline void make_opaque(uint32_t&) {}
static inline void cp_async_commit(EMU_LOC) { emu::cp_async_commit(loc); }
template <int N>
static inline void cp_async_wait(EMU_LOC) {
    emu::cp_async_wait(N, loc);
}
static inline void next_may_start(EMU_LOC) { emu::next_may_start(loc); }
static inline void wait_for_previous(EMU_LOC) { emu::wait_for_previous(loc); }
static inline void named_barrier_sync(int id, int threads, EMU_LOC) { emu::barrier(id, threads, true, loc); }
static inline void named_barrier_arrive(int id, int threads, EMU_LOC) { emu::barrier(id, threads, false, loc); }
