// tiles.cuh: the variants of linear and conv2d; src/ops/cuda/tiles.rs has the same table and the reasons to pick one.
//   name, T, blocks a multiprocessor that registers must allow, M, N, warps down, warps across, stages, general
// A warp of 64x64 reads 8 KiB of shared memory for 128 Ki products, one of 32x32 4 KiB for 32 Ki.
// Registers (nvcc 13.0; linear / conv2d, the larger of sm_80 and sm_90a), none spilled:
//   16-bit  128x256 207/227   128x128 207/237   128x64 139/161   64x128 137/155   64x64 89/96   general 106/136
//   f32     128x128 252/254   64x64 168/168   general 168/168
#pragma once
#define TILES_16_BIT(ENTRY, T, suffix)                      \
    ENTRY(128x256_##suffix, T, 1, 128, 256, 2, 4, 4, false) \
    ENTRY(128x128_##suffix, T, 2, 128, 128, 2, 2, 4, false) \
    ENTRY(128x64_##suffix, T, 3, 128, 64, 2, 2, 4, false)   \
    ENTRY(64x128_##suffix, T, 3, 64, 128, 2, 2, 4, false)   \
    ENTRY(64x64_##suffix, T, 4, 64, 64, 2, 2, 4, false)     \
    ENTRY(general_##suffix, T, 2, 64, 64, 2, 2, 2, true)

#define TILES(ENTRY)                                       \
    ENTRY(128x128_f32, float, 1, 128, 128, 4, 2, 3, false) \
    ENTRY(64x64_f32, float, 3, 64, 64, 2, 2, 3, false)     \
    ENTRY(general_f32, float, 2, 64, 64, 2, 2, 2, true)    \
    TILES_16_BIT(ENTRY, f16, f16)                          \
    TILES_16_BIT(ENTRY, bf16, bf16)
