// activation.cuh: the nonlinearities of math.cuh by number, for results of T.
#pragma once
#include "math.cuh"

// As src/ops/cuda/mod.rs numbers them.
enum Activation { kNone, kSilu, kGelu, kQuickGelu, kGeglu, kGeluTanh, kGegluTanh };

// GELU as precise as a result of T can show.
template <class T>
DEVICE float gelu_for(float z) {
    if constexpr (same_type<T, float>) {
        return gelu(z);
    } else {
        return gelu_16_bit(z);
    }
}

// All activations but GEGLU, which takes two sums.
template <class T>
DEVICE float activate(int activation, float z) {
    switch (activation) {
        case kSilu: return silu(z);
        case kGelu: return gelu_for<T>(z);
        case kQuickGelu: return quick_gelu(z);
        case kGeluTanh: return gelu_tanh(z);
        default: return z;
    }
}
