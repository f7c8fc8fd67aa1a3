// launch.cu: what a launch hands to Hopper's kernels, as raw numbers: boxes of tensor maps, clusters, dependence on the
// launch before. Not part of any op: tests/hopper_launch.rs computes the same from NVIDIA's description, on the emulated
// card and on a real one. All of `out` is written.
#include "common/hopper.cuh"

constexpr int kThreads = 128;

struct alignas(1024) Box {
    uint32_t words[2048];
};

// One thread's `load`, awaited by all, and the box as it lies in shared memory, swizzled where the map says so.
template <class Load>
DEVICE void copy_box(uint32_t* out, int bytes, Load load) {
    SHARED_DYNAMIC(Box, box);
    SHARED_STATIC(uint64_t, arrived, [1]);
    if (threadIdx.x == 0) {
        mbar_init(arrived, 1);
        mbar_fence_init();
        mbar_arrive_expect_tx(arrived, uint32_t(bytes));
        load(&box, arrived);
    }
    __syncthreads();
    mbar_wait(arrived, 0);
    for (int i = threadIdx.x; i < bytes / 4; i += kThreads) out[i] = box.words[i];
}

// out [bytes], bytes those of the map's box, at most a Box, with rows as wide as the swizzle. Grid 1, block 128, dynamic
// shared memory: a Box.
KERNEL(conformance_box_2d, kThreads, 1)(uint32_t* out, GRID_CONST TensorMap map, int c0, int c1, int bytes) {
    follow_previous();
    copy_box(out, bytes, [&](void* box, uint64_t* bar) { tma_load_2d(box, &map, bar, c0, c1); });
}
REGISTER_KERNEL(conformance_box_2d)
KERNEL(conformance_box_4d, kThreads, 1)(uint32_t* out, GRID_CONST TensorMap map, int c0, int c1, int c2, int c3, int bytes) {
    follow_previous();
    copy_box(out, bytes, [&](void* box, uint64_t* bar) { tma_load_4d(box, &map, bar, c0, c1, c2, c3); });
}
REGISTER_KERNEL(conformance_box_4d)
// The tap at offset w, h of the filter, from channel c and the output's first pixel at w0, h0 of image n.
KERNEL(conformance_box_im2col, kThreads, 1)(uint32_t* out, GRID_CONST TensorMap map, int c, int w0, int h0, int n, int w, int h,
                                            int bytes) {
    follow_previous();
    const auto load = [&](void* box, uint64_t* bar) {
        tma_load_im2col_4d(box, &map, bar, c, w0, h0, n, uint16_t(w), uint16_t(h));
    };
    copy_box(out, bytes, load);
}
REGISTER_KERNEL(conformance_box_im2col)

// out [blocks][2]: each block's rank in its cluster and the cluster's size; 0 and 1 in a launch without clusters. Block 32.
KERNEL(conformance_cluster, 32, 1)(uint32_t* out) {
    follow_previous();
    const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    if (threadIdx.x == 0) {
        out[block * 2] = uint32_t(cluster_rank());
        out[block * 2 + 1] = uint32_t(cluster_size());
    }
}
REGISTER_KERNEL(conformance_cluster)

// y = 2 x + 1, of what the launches before have left. x, y [count]. Grid ceil(count / 128), block 128.
KERNEL(conformance_dependent, kThreads, 1)(uint32_t* y, const uint32_t* x, int count) {
    const int i = blockIdx.x * kThreads + threadIdx.x;
    next_may_start();
    wait_for_previous();
    if (GUARD(i < count)) y[i] = 2 * x[i] + 1;
}
REGISTER_KERNEL(conformance_dependent)

// Declared wrongly: a map has to lie at a multiple of 64, and TensorMap says so. Never launched.
struct Bytes {
    char bytes[128];
};
KERNEL(conformance_misplaced_map, 32, 1)(uint32_t* out, Bytes map) {
    follow_previous();
    *out = uint32_t(map.bytes[0]);
}
REGISTER_KERNEL(conformance_misplaced_map)
