// Global memory, 8 elements a thread at a time where addresses allow it, one elsewhere.
#pragma once
#include "device.cuh"

// Elements a thread moves at once: 16 bytes of f16 and bf16, 32 of f32.
constexpr int kVector = 8;

template <class T>
struct alignas(16) Pack {
    T v[16 / sizeof(T)];
};

template <class T>
DEVICE bool aligned16(const T* p) {
    return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// V = 1, or V = kVector and p aligned to 16 bytes.
template <int V, class T>
DEVICE void load(float (&values)[V], const T* p) {
    if constexpr (V == 1) {
        values[0] = to_f32(*p);
    } else {
        constexpr int kPack = 16 / sizeof(T);
        UNROLL
        for (int part = 0; part < V / kPack; part++) {
            const Pack<T> pack = reinterpret_cast<const Pack<T>*>(p)[part];
            UNROLL
            for (int i = 0; i < kPack; i++) values[part * kPack + i] = to_f32(pack.v[i]);
        }
    }
}

template <int V, class T>
DEVICE void store(T* p, const float (&values)[V]) {
    if constexpr (V == 1) {
        *p = from_f32<T>(values[0]);
    } else {
        constexpr int kPack = 16 / sizeof(T);
        UNROLL
        for (int part = 0; part < V / kPack; part++) {
            Pack<T> pack;
            UNROLL
            for (int i = 0; i < kPack; i++) pack.v[i] = from_f32<T>(values[part * kPack + i]);
            reinterpret_cast<Pack<T>*>(p)[part] = pack;
        }
    }
}
