// Sums over a warp and over a block, in an order that depends on nothing but the number of threads.
#pragma once
#include "device.cuh"

// Every lane gets the sum of all 32.
DEVICE float warp_sum(float value) {
    UNROLL
    for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(~0u, value, lanes);
    return value;
}
DEVICE int warp_sum(int value) {
    UNROLL
    for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(~0u, value, lanes);
    return value;
}

// Every thread gets the sum over the block's kWarps whole warps. `sums` is shared memory that nothing else uses.
template <int kWarps>
DEVICE float block_sum(float value, float (&sums)[kWarps]) {
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0.f;
    UNROLL
    for (int warp = 0; warp < kWarps; warp++) sum += sums[warp];
    return sum;
}
