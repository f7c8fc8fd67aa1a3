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

// V elements as they are stored. V = 1, or V = kVector and p aligned to 16 bytes. A thread that fetches several before it
// uses the first has them all on their way at once; the compiler does not do that by itself where stores come between.
template <int V, class T>
struct Raw {
    static_assert(V == kVector);
    Pack<T> packs[V * sizeof(T) / 16];
};
template <class T>
struct Raw<1, T> {
    T value;
};

template <int V, class T>
DEVICE void fetch(Raw<V, T>& raw, const T* p) {
    if constexpr (V == 1) {
        raw.value = *p;
    } else {
        UNROLL
        for (unsigned part = 0; part < V * sizeof(T) / 16; part++) raw.packs[part] = reinterpret_cast<const Pack<T>*>(p)[part];
    }
}

template <int V, class T>
DEVICE void widen(float (&values)[V], const Raw<V, T>& raw) {
    if constexpr (V == 1) {
        values[0] = to_f32(raw.value);
    } else {
        constexpr int kPack = 16 / sizeof(T);
        UNROLL
        for (int i = 0; i < V; i++) values[i] = to_f32(raw.packs[i / kPack].v[i % kPack]);
    }
}

// A vector held over a long stretch: without this the compiler keeps its widened elements beside it, twice the registers.
template <class T>
DEVICE void hold(Raw<kVector, T>& raw) {
    UNROLL
    for (unsigned i = 0; i < sizeof raw / 4; i++) make_opaque(reinterpret_cast<uint32_t*>(raw.packs)[i]);
}

template <int V, class T>
DEVICE void load(float (&values)[V], const T* p) {
    Raw<V, T> raw;
    fetch<V>(raw, p);
    widen(values, raw);
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
