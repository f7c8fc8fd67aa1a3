// elementwise.cu: the few pointwise ops that no other kernel absorbs.
#include "common/device.cuh"

constexpr int kThreads = 256;

// add: y = a + b in f32, rounded once.   y, a, b [count]   T = f32 | f16 | bf16
// Memory bound: 3 * count * sizeof(T) bytes. Launch: grid ceil(count / kThreads), block kThreads. Any alignment.
template <class T>
DEVICE void add(T* y, const T* a, const T* b, int64_t count) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (GUARD(i < count)) y[i] = from_f32<T>(to_f32(a[i]) + to_f32(b[i]));
}

#define ENTRIES(T, suffix)                                                                                  \
    KERNEL(add_##suffix, kThreads, 1)(T* y, const T* a, const T* b, int64_t count) { add<T>(y, a, b, count); } \
    REGISTER_KERNEL(add_##suffix)

ENTRIES(float, f32)
ENTRIES(f16, f16)
ENTRIES(bf16, bf16)
