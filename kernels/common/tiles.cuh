// tiles.cuh: the variants of linear and conv2d; src/ops/cuda/tiles.rs has the same table and the reasons to pick one.
//   name, T, blocks a multiprocessor that registers must allow, M, N, warps down, warps across, stages, general
#pragma once
#define TILES_16_BIT(ENTRY, T, suffix)                        \
    ENTRY(128x256_##suffix, T, 1, 128, 256, 2, 4, 4, false)   \
    ENTRY(128x128_##suffix, T, 2, 128, 128, 2, 4, 4, false)   \
    ENTRY(128x64_##suffix, T, 2, 128, 64, 4, 2, 4, false)     \
    ENTRY(64x128_##suffix, T, 2, 64, 128, 2, 4, 4, false)     \
    ENTRY(64x64_##suffix, T, 4, 64, 64, 2, 2, 4, false)       \
    ENTRY(general_##suffix, T, 2, 64, 64, 2, 2, 2, true)

#define TILES(ENTRY)                                      \
    ENTRY(128x128_f32, float, 1, 128, 128, 4, 2, 3, false) \
    ENTRY(64x64_f32, float, 3, 64, 64, 2, 2, 3, false)     \
    ENTRY(general_f32, float, 2, 64, 64, 2, 2, 2, true)    \
    TILES_16_BIT(ENTRY, f16, f16)                         \
    TILES_16_BIT(ENTRY, bf16, bf16)
