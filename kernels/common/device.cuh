// The only header a kernel includes. Under nvcc its words are PTX instructions, one function each; under a host C++20
// compiler (the emulated card) the same words are plain C++ from emu/machine/emu.h.
//
// A kernel:      KERNEL(add_bf16, 256, 1)(bf16* y, const bf16* a, const bf16* b, int count) { ... }
//                REGISTER_KERNEL(add_bf16)              the emulated card finds it by this name
// Shared memory: SHARED_DYNAMIC(Tiles, s)               a struct over the launch's dynamic shared memory
//                SHARED_STATIC(float, sums, [32])
// Bounds:        if (GUARD(i < count)) ...              every predicate that keeps an access inside its tensor
#pragma once
#ifndef __CUDACC__
#include "emu/machine/emu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

typedef __half f16;
typedef __nv_bfloat16 bf16;

#define DEVICE static __device__ __forceinline__
#define KERNEL(name, max_threads, min_blocks) \
    extern "C" __global__ void __launch_bounds__(max_threads, min_blocks) name
#define REGISTER_KERNEL(name)
// A parameter that is read where it lies, by an index or through its address.
#define GRID_CONST const __grid_constant__
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")  // not unrolled, where that would cost registers

// At namespace scope: inside an extern "C" kernel it would get C linkage.
extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
#define SHARED_DYNAMIC(T, name) T& name = *reinterpret_cast<T*>(dynamic_shared_memory)
#define SHARED_STATIC(T, name, dims) __shared__ __align__(16) T name dims

DEVICE float to_f32(float x) { return x; }
DEVICE float to_f32(f16 x) { return __half2float(x); }
DEVICE float to_f32(bf16 x) { return __bfloat162float(x); }
DEVICE f16 to_f16(float x) { return __float2half_rn(x); }
DEVICE bf16 to_bf16(float x) { return __float2bfloat16_rn(x); }

// Two values rounded to nearest even and packed, the first in the low half.
DEVICE uint32_t pack_f16(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
DEVICE uint32_t pack_bf16(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// 2 ulp; subnormal inputs and results are 0.
DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// 1 ulp.
DEVICE float rcp_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE uint32_t smem_u32(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Four 8x8 matrices of 16-bit elements; lane i names row i % 8 of matrix i / 8 (16 bytes, aligned).
DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem_u32(row))
                 : "memory");
}
DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem_u32(row))
                 : "memory");
}

// d += a b: a 16x16 (row), b 16x8 (column), d 16x8 in f32.
template <class T>
DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<f16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 bytes from global to shared memory, asynchronously, both aligned to 16; without `pred` zeros, and nothing is read.
DEVICE void cp_async_16(void* shared, const void* global, bool pred) {
    const int bytes = pred ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_u32(shared)), "l"(global), "r"(bytes)
                 : "memory");
}
// The same for 4 bytes.
DEVICE void cp_async_4(void* shared, const void* global, bool pred) {
    const int bytes = pred ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(smem_u32(shared)), "l"(global), "r"(bytes)
                 : "memory");
}
// The compiler takes x for a new value from here on: what it computed from it before it does not keep, but computes again.
DEVICE void make_opaque(uint32_t& x) { asm volatile("" : "+r"(x)); }
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most N of this thread's latest groups are under way.
template <int N>
DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// The next launch may begin once all blocks have said so or ended; what it may touch, only its own wait says.
DEVICE void next_may_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Until the previous launch has ended and all its writes are seen. Before that: nothing it reads or writes is touched. A
// kernel that touches nothing waits all the same, or the launch after it cannot rely on those before it. Before sm_90
// launches do not overlap, and there is nothing to wait for.
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

DEVICE void named_barrier_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEVICE void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
#endif

// ---- the same in both worlds ----

template <class A, class B>
inline constexpr bool same_type = false;
template <class A>
inline constexpr bool same_type<A, A> = true;

#define GUARD(condition) (condition)

// How a kernel begins: every launch may begin before the one before it has ended (src/runtime/cuda/launch.rs). One that has
// something to do before its wait says the two words itself. No parameter is `const T* __restrict__` (but in peaks.cu,
// whose input nobody writes): what is read through that counts as constant, and the compiler may read it before the wait.
DEVICE void follow_previous() {
    next_may_start();
    wait_for_previous();
}

template <class T>
DEVICE T from_f32(float x) {
    if constexpr (same_type<T, f16>) {
        return to_f16(x);
    } else if constexpr (same_type<T, bf16>) {
        return to_bf16(x);
    } else {
        static_assert(same_type<T, float>);
        return x;
    }
}

template <class T>
DEVICE uint32_t pack2(float low, float high) {
    if constexpr (same_type<T, f16>) {
        return pack_f16(low, high);
    } else {
        static_assert(same_type<T, bf16>);
        return pack_bf16(low, high);
    }
}
