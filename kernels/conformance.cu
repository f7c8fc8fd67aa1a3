// conformance.cu: what every primitive of device.cuh does, dumped as raw numbers. Not part of any op: tests/ops/
// conformance.rs computes the same numbers from NVIDIA's description of each instruction in the PTX ISA and compares, on
// the emulated card and on a real one. A layout that emulator and kernels have wrong in the same way shows here only.
// All of `out` is written. Every launch is of one dimension.
#include "common/device.cuh"
#include "common/rows.cuh"

constexpr uint32_t kWholeWarp = ~0u;

DEVICE uint32_t bits(float x) { return __float_as_uint(x); }

// Registers of ldmatrix.x4 and x4.trans over 32 rows of 8 numbers, row * 8 + column: rows in order, then row
// (lane * 5 + 3) % 32 for lane. out [2 orders][plain, trans][32 lanes][4]. Block 32.
KERNEL(conformance_ldmatrix, 32, 1)(uint32_t* out) {
    follow_previous();
    SHARED_STATIC(uint16_t, image, [32][8]);
    const int lane = threadIdx.x;
    for (int i = 0; i < 8; i++) image[lane][i] = uint16_t(lane * 8 + i);
    __syncwarp();
    for (int order = 0; order < 2; order++) {
        const int row = order == 0 ? lane : (lane * 5 + 3) % 32;
        uint32_t plain[4], transposed[4];
        ldmatrix_x4(plain, image[row]);
        ldmatrix_x4_trans(transposed, image[row]);
        for (int i = 0; i < 4; i++) {
            out[((order * 2 + 0) * 32 + lane) * 4 + i] = plain[i];
            out[((order * 2 + 1) * 32 + lane) * 4 + i] = transposed[i];
        }
    }
}
REGISTER_KERNEL(conformance_ldmatrix)

// d = a b + c of mma.m16n8k16. a: a single 1, in block b at place b of its 256 (lane, register, half); b: 1 + its place of
// 128 (lane, register, half); c: 256 times its place of 128 (lane, register). out [256][32 lanes][4]. Grid 256, block 32.
template <class T>
DEVICE void conformance_mma(float* out) {
    const int lane = threadIdx.x, place = blockIdx.x;
    uint32_t a[4];
    float d[4];
    for (int i = 0; i < 4; i++) {
        const int first = (lane * 4 + i) * 2;
        a[i] = pack2<T>(first == place ? 1.f : 0.f, first + 1 == place ? 1.f : 0.f);
        d[i] = 256.f * (lane * 4 + i);
    }
    const uint32_t b0 = pack2<T>(lane * 4 + 1, lane * 4 + 2), b1 = pack2<T>(lane * 4 + 3, lane * 4 + 4);
    mma_m16n8k16<T>(d, a, b0, b1);
    for (int i = 0; i < 4; i++) out[(place * 32 + lane) * 4 + i] = d[i];
}
KERNEL(conformance_mma_f16, 32, 1)(float* out) {
    follow_previous();
    conformance_mma<f16>(out);
}
REGISTER_KERNEL(conformance_mma_f16)
KERNEL(conformance_mma_bf16, 32, 1)(float* out) {
    follow_previous();
    conformance_mma<bf16>(out);
}
REGISTER_KERNEL(conformance_mma_bf16)

// cp.async of 16 and of 4 bytes, two groups. Every third, every fifth copy is switched off and has no source.
// in [64][4], then [64]; out [64][4]: own copy after the first group; [64]: another thread's after both. Block 64.
KERNEL(conformance_cp_async, 64, 1)(uint32_t* out, const uint32_t* in) {
    follow_previous();
    SHARED_STATIC(uint4, large, [64]);
    SHARED_STATIC(uint32_t, small, [64]);
    const int thread = threadIdx.x;
    large[(thread + 1) % 64] = make_uint4(~0u, ~0u, ~0u, ~0u);
    small[(thread + 1) % 64] = ~0u;
    __syncthreads();
    const bool has_large = thread % 3 != 0, has_small = thread % 5 != 0;
    cp_async_16(&large[thread], has_large ? in + thread * 4 : nullptr, has_large);
    cp_async_commit();
    cp_async_4(&small[thread], has_small ? in + 64 * 4 + thread : nullptr, has_small);
    cp_async_commit();
    cp_async_wait<1>();
    const uint4 own = large[thread];
    cp_async_wait<0>();
    __syncthreads();
    out[thread * 4] = own.x;
    out[thread * 4 + 1] = own.y;
    out[thread * 4 + 2] = own.z;
    out[thread * 4 + 3] = own.w;
    out[64 * 4 + thread] = small[(thread + 33) % 64];
}
REGISTER_KERNEL(conformance_cp_async)

// Shuffles of lane * 3 + 1 (the last as f32), then votes. out [17][32 lanes]. Block 32.
KERNEL(conformance_shuffle, 32, 1)(uint32_t* out) {
    follow_previous();
    const int lane = threadIdx.x, value = lane * 3 + 1;
    const uint32_t results[17] = {
        uint32_t(__shfl_sync(kWholeWarp, value, (lane * 7 + 3) % 32)),
        uint32_t(__shfl_sync(kWholeWarp, value, lane + 5, 8)),
        uint32_t(__shfl_sync(kWholeWarp, value, 37)),
        uint32_t(__shfl_up_sync(kWholeWarp, value, 1)),
        uint32_t(__shfl_up_sync(kWholeWarp, value, 3, 8)),
        uint32_t(__shfl_down_sync(kWholeWarp, value, 1)),
        uint32_t(__shfl_down_sync(kWholeWarp, value, 3, 8)),
        uint32_t(__shfl_xor_sync(kWholeWarp, value, 1)),
        uint32_t(__shfl_xor_sync(kWholeWarp, value, 16)),
        uint32_t(__shfl_xor_sync(kWholeWarp, value, 5, 8)),
        uint32_t(__shfl_xor_sync(kWholeWarp, value, 9, 8)),
        uint32_t(__shfl_xor_sync(kWholeWarp, value, 2, 4)),
        bits(__shfl_xor_sync(kWholeWarp, float(value), 2)),
        __ballot_sync(kWholeWarp, lane % 3 == 0),
        uint32_t(__any_sync(kWholeWarp, lane == 17)),
        uint32_t(__all_sync(kWholeWarp, lane != 17)),
        uint32_t(__all_sync(kWholeWarp, lane < 32)),
    };
    for (int i = 0; i < 17; i++) out[i * 32 + lane] = results[i];
}
REGISTER_KERNEL(conformance_shuffle)

// 16-bit numbers in f32. out [2 * count]: of f16, of bf16. Grid ceil(count / 256), block 256.
KERNEL(conformance_widen, 256, 1)(float* out, const f16* halves, const bf16* bfloats, int count) {
    follow_previous();
    const int i = blockIdx.x * 256 + threadIdx.x;
    if (GUARD(i < count)) {
        out[i] = to_f32(halves[i]);
        out[count + i] = to_f32(bfloats[i]);
    }
}
REGISTER_KERNEL(conformance_widen)

// f32 rounded to 16 bits. out [3][count]: in f16 (low half) and bf16 by from_f32; it and the next packed in f16, in bf16.
// Grid ceil(count / 256), block 256.
KERNEL(conformance_round, 256, 1)(uint32_t* out, const float* in, int count) {
    follow_previous();
    const int i = blockIdx.x * 256 + threadIdx.x;
    if (GUARD(i < count)) {
        const float x = in[i], next = in[(i + 1) % count];
        reinterpret_cast<f16*>(out)[i * 2] = from_f32<f16>(x);
        reinterpret_cast<bf16*>(out)[i * 2 + 1] = from_f32<bf16>(x);
        out[count + i] = pack2<f16>(x, next);
        out[2 * count + i] = pack2<bf16>(x, next);
    }
}
REGISTER_KERNEL(conformance_round)

// out [2][count]: exp2_approx, rcp_approx. Grid ceil(count / 256), block 256.
KERNEL(conformance_approx, 256, 1)(float* out, const float* in, int count) {
    follow_previous();
    const int i = blockIdx.x * 256 + threadIdx.x;
    if (GUARD(i < count)) {
        out[i] = exp2_approx(in[i]);
        out[count + i] = rcp_approx(in[i]);
    }
}
REGISTER_KERNEL(conformance_approx)

// Warp 0 hands warp 1 three rounds of numbers through one buffer; barrier 1: filled, barrier 2: read; warp 2 takes no
// part. out [3 rounds][32 lanes] = round * 100 + 31 - lane. Block 96.
KERNEL(conformance_named_barrier, 96, 1)(uint32_t* out) {
    follow_previous();
    SHARED_STATIC(uint32_t, buffer, [32]);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int round = 0; round < 3; round++) {
        if (warp == 0) {
            if (round > 0) {
                named_barrier_sync(2, 64);
            }
            buffer[lane] = round * 100 + lane;
            named_barrier_arrive(1, 64);
        } else if (warp == 1) {
            named_barrier_sync(1, 64);
            out[round * 32 + lane] = buffer[31 - lane];
            if (round < 2) {
                named_barrier_arrive(2, 64);
            }
        }
    }
}
REGISTER_KERNEL(conformance_named_barrier)

// swizzled<kChunks>(row, chunk) for 16 rows. Returns where the next begins.
template <int kChunks>
DEVICE uint32_t* dump_swizzle(uint32_t* out) {
    for (int row = 0; row < 16; row++) {
        for (int chunk = 0; chunk < kChunks; chunk++) *out++ = swizzled<kChunks>(row, chunk);
    }
    return out;
}
// out: [16][C] for C = 2, 4, 6, 8, 10, 16, 20. One thread.
KERNEL(conformance_swizzle, 1, 1)(uint32_t* out) {
    follow_previous();
    out = dump_swizzle<2>(out);
    out = dump_swizzle<4>(out);
    out = dump_swizzle<6>(out);
    out = dump_swizzle<8>(out);
    out = dump_swizzle<10>(out);
    out = dump_swizzle<16>(out);
    dump_swizzle<20>(out);
}
REGISTER_KERNEL(conformance_swizzle)
