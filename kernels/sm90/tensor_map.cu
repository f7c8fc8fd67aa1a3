// tensor_map.cu: what TMA makes of a tensor map, as raw bytes. Not part of any op: tests/tensor_map.rs encodes maps with the
// driver's cuTensorMapEncode* and computes the same bytes from NVIDIA's description of the copy, on the emulated card and on
// a real one. All of `out` is written.
#include "common/hopper.cuh"

constexpr int kThreads = 128;

struct alignas(1024) Box {
    uint32_t words[1024];
};

// The box at column c0, row c1 as it lies in shared memory, swizzled where the map says so. out [bytes], bytes the box's:
// a multiple of 16, at most a Box. Grid 1, block 128, dynamic shared memory: a Box.
KERNEL(conformance_tensor_map_2d, kThreads, 1)(uint32_t* out, GRID_CONST TensorMap map, int c0, int c1, int bytes) {
    SHARED_DYNAMIC(Box, box);
    SHARED_STATIC(uint64_t, arrived, [1]);
    if (threadIdx.x == 0) {
        mbar_init(arrived, 1);
        mbar_fence_init();
        mbar_arrive_expect_tx(arrived, uint32_t(bytes));
        tma_load_2d(&box, &map, arrived, c0, c1);
    }
    __syncthreads();
    mbar_wait(arrived, 0);
    for (int i = threadIdx.x; i < bytes / 4; i += kThreads) out[i] = box.words[i];
}
REGISTER_KERNEL(conformance_tensor_map_2d)
