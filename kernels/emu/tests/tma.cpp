// TMA: boxes of every rank, swizzle and element size against plain loops; im2col; stores; mbarriers; and their mistakes.
#include <algorithm>

#include "harness.h"

#include "common/hopper.cuh"

constexpr unsigned kBoxBytes = 16 * 1024;
struct Box {
    alignas(1024) uint8_t bytes[kBoxBytes];
    uint64_t bar;
    uint32_t* words() { return reinterpret_cast<uint32_t*>(bytes); }
};
struct Coordinates {
    int c[5];
};

DEVICE void load_box(int rank, Box& s, const TensorMap& map, const Coordinates& at) {
    const auto& c = at.c;
    if (rank == 1) tma_load_1d(s.bytes, &map, &s.bar, c[0]);
    if (rank == 2) tma_load_2d(s.bytes, &map, &s.bar, c[0], c[1]);
    if (rank == 3) tma_load_3d(s.bytes, &map, &s.bar, c[0], c[1], c[2]);
    if (rank == 4) tma_load_4d(s.bytes, &map, &s.bar, c[0], c[1], c[2], c[3]);
    if (rank == 5) tma_load_5d(s.bytes, &map, &s.bar, c[0], c[1], c[2], c[3], c[4]);
}
DEVICE void store_box(int rank, const Box& s, const TensorMap& map, const Coordinates& at) {
    const auto& c = at.c;
    if (rank == 2) tma_store_2d(&map, s.bytes, c[0], c[1]);
    if (rank == 3) tma_store_3d(&map, s.bytes, c[0], c[1], c[2]);
    if (rank == 4) tma_store_4d(&map, s.bytes, c[0], c[1], c[2], c[3]);
    if (rank == 5) tma_store_5d(&map, s.bytes, c[0], c[1], c[2], c[3], c[4]);
}

// The box as it lies in shared memory, over bytes of 0xEE. `bytes`: of the box.
KERNEL(tma_loads, 64, 1)(GRID_CONST TensorMap map, uint32_t* out, Coordinates at, int rank, int bytes) {
    SHARED_DYNAMIC(Box, s);
    tma_prefetch_map(&map);
    if (threadIdx.x == 0) {
        mbar_init(&s.bar, 1);
        mbar_fence_init();
    }
    for (unsigned i = threadIdx.x; i < kBoxBytes / 4; i += 64) s.words()[i] = 0xEEEEEEEE;
    fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        mbar_arrive_expect_tx(&s.bar, uint32_t(bytes));
        load_box(rank, s, map, at);
    }
    mbar_wait(&s.bar, 0);
    for (unsigned i = threadIdx.x; i < kBoxBytes / 4; i += 64) out[i] = s.words()[i];
}
REGISTER_KERNEL(tma_loads)

KERNEL(tma_stores, 64, 1)(GRID_CONST TensorMap map, const uint32_t* in, Coordinates at, int rank) {
    SHARED_DYNAMIC(Box, s);
    for (unsigned i = threadIdx.x; i < kBoxBytes / 4; i += 64) s.words()[i] = in[i];
    fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        store_box(rank, s, map, at);
        bulk_commit();
        bulk_wait_read<0>();
    }
}
REGISTER_KERNEL(tma_stores)

// A tensor with rows padded to 16 bytes, and a box somewhere about it.
struct TensorAndBox {
    int rank, element_bytes, swizzle;
    uint64_t dim[5], stride[5];
    uint32_t box[5];
    Coordinates at;
    size_t tensor_bytes, box_bytes;
    TensorMap map;

    // Where element e of the box lies in shared memory, and its address in the tensor, negative if it is outside.
    std::pair<size_t, int64_t> place(size_t e) const {
        const size_t row = e / box[0], column = e % box[0];
        const size_t pitch = swizzle ? size_t(16) << swizzle : box[0] * size_t(element_bytes);
        const size_t offset = row * pitch + column * size_t(element_bytes);
        static constexpr size_t lines[] = {1, 2, 4, 8};  // of 128 bytes, until the pattern repeats
        const size_t line = offset / 128, chunk = (offset / 16 % 8) ^ (line % lines[swizzle]);
        int64_t address = 0;
        for (int d = 0; d < rank; d++) {
            const int64_t i = at.c[d] + int64_t(e % box[d]);
            e /= box[d];
            if (i < 0 || i >= int64_t(dim[d])) return {line * 128 + chunk * 16 + offset % 16, -1};
            address += i * int64_t(stride[d]);
        }
        return {line * 128 + chunk * 16 + offset % 16, address};
    }
    size_t elements() const { return box_bytes / size_t(element_bytes); }
};

static TensorAndBox any_tensor(Random& random, int rank, int swizzle, void* base) {
    static constexpr int sizes[] = {1, 2, 4, 8};
    TensorAndBox t{};
    t.rank = rank;
    t.swizzle = swizzle;
    t.element_bytes = sizes[random.next() % 4];
    const uint32_t widest = swizzle ? 1u << swizzle : 16;  // in 16 bytes
    t.box[0] = (1 + random.next() % widest) * 16 / uint32_t(t.element_bytes);
    if (t.box[0] > 256) t.box[0] = 256;
    t.box_bytes = t.box[0] * size_t(t.element_bytes);
    const size_t pitch = swizzle ? size_t(16) << swizzle : t.box_bytes;
    size_t rows = kBoxBytes / pitch;
    t.stride[0] = uint64_t(t.element_bytes);
    for (int d = 0; d < rank; d++) {
        if (d > 0) {
            t.box[d] = 1 + random.next() % uint32_t(std::min<size_t>(rows, 7));
            rows /= t.box[d];
            t.box_bytes *= t.box[d];
            t.stride[d] = (t.stride[d - 1] * t.dim[d - 1] + 15) / 16 * 16 + random.next() % 2 * 16;
        }
        t.dim[d] = 1 + random.next() % (d == 0 ? 80 : 7);
        t.at.c[d] = int(random.next() % (t.dim[d] + t.box[d] + 1)) - int(t.box[d]);
    }
    t.tensor_bytes = t.stride[rank - 1] * t.dim[rank - 1];
    const int failed = emu::tensor_map_encode(&t.map, t.element_bytes, rank, base, t.dim, t.stride + 1, t.box, swizzle);
    if (failed) fail("rank %d, swizzle %d: no map of box %u, %d bytes", rank, swizzle, t.box[0], t.element_bytes);
    return t;
}

TEST(tma_loads_of_every_kind) {
    Buffer<uint8_t> tensor(1 << 20), got(kBoxBytes), want(kBoxBytes);
    Random random;
    for (size_t i = 0; i < tensor.count; i++) tensor[i] = uint8_t(random.next() % 251);
    in_every_mode([&] {
        for (int i = 0; i < 40; i++) {
            const TensorAndBox t = any_tensor(random, 1 + i % 5, i / 5 % 4, tensor.data);
            for (size_t k = 0; k < kBoxBytes; k++) want[k] = 0xEE;
            for (size_t e = 0; e < t.elements(); e++) {
                const auto [offset, address] = t.place(e);
                for (int b = 0; b < t.element_bytes; b++) want[offset + size_t(b)] = address < 0 ? 0 : tensor[size_t(address + b)];
            }
            CLEAN("tma_loads", dim3(1), dim3(64), sizeof(Box), t.map, reinterpret_cast<uint32_t*>(got.data), t.at, t.rank, int(t.box_bytes));
            if (memcmp(got.data, want.data, kBoxBytes)) fail("load of rank %d, swizzle %d, %d bytes", t.rank, t.swizzle, t.element_bytes);
        }
    });
}

TEST(tma_stores_of_every_kind) {
    Buffer<uint8_t> tensor(1 << 20), in(kBoxBytes), want(1 << 20);
    Random random;
    for (size_t i = 0; i < kBoxBytes; i++) in[i] = uint8_t(random.next() % 251);
    in_every_mode([&] {
        for (int i = 0; i < 32; i++) {
            const TensorAndBox t = any_tensor(random, 2 + i % 4, i / 4 % 4, tensor.data);
            const size_t bytes = t.tensor_bytes + 64;
            memset(tensor.data, 0xEE, bytes);
            memset(want.data, 0xEE, bytes);
            for (size_t e = 0; e < t.elements(); e++) {
                const auto [offset, address] = t.place(e);
                if (address >= 0) memcpy(&want[size_t(address)], &in[offset], size_t(t.element_bytes));
            }
            CLEAN("tma_stores", dim3(1), dim3(64), sizeof(Box), t.map, reinterpret_cast<const uint32_t*>(in.data), t.at, t.rank);
            if (memcmp(tensor.data, want.data, bytes)) fail("store of rank %d, swizzle %d, %d bytes", t.rank, t.swizzle, t.element_bytes);
        }
    });
}

// ---- im2col ----

KERNEL(im2col_loads, 32, 1)(GRID_CONST TensorMap map, uint32_t* out, Coordinates at, int offset_w, int offset_h, int bytes) {
    SHARED_DYNAMIC(Box, s);
    if (threadIdx.x == 0) {
        mbar_init(&s.bar, 1);
        mbar_arrive_expect_tx(&s.bar, uint32_t(bytes));
        tma_load_im2col_4d(s.bytes, &map, &s.bar, at.c[0], at.c[1], at.c[2], at.c[3], uint16_t(offset_w), uint16_t(offset_h));
    }
    __syncwarp();
    mbar_wait(&s.bar, 0);
    for (unsigned i = threadIdx.x; i < unsigned(bytes) / 4; i += 32) out[i] = s.words()[i];
}
REGISTER_KERNEL(im2col_loads)

// A 3x3 convolution's patches, stride 1 or 2, dilation 1 or 2, padding so that the map keeps its size: each output pixel's
// input under every tap, 32 channels, from any pixel on.
TEST(im2col_loads_are_a_convolutions_patches) {
    const int channels = 40, w = 7, h = 5, images = 3, pixels = 24;
    Buffer<uint16_t> x(size_t(images * h * w * channels));
    Buffer<uint8_t> got(size_t(pixels) * 64);
    for (size_t i = 0; i < x.count; i++) x[i] = uint16_t(i + 1);
    in_every_mode([&] {
        for (const int stride : {1, 2}) {
            for (const int dilation : {1, 2}) {
                TensorMap map;
                const uint64_t dim[] = {channels, w, h, images}, strides[] = {channels * 2, channels * 2 * w, channels * 2 * w * h};
                const int lower[] = {-dilation, -dilation}, upper[] = {-dilation, -dilation};
                const uint32_t steps[] = {1, uint32_t(stride), uint32_t(stride), 1};
                CHECK(emu::tensor_map_encode_im2col(&map, 2, 4, x.data, dim, strides, lower, upper, 32, pixels, steps, 2) == 0);
                const int out_w = (w - 1) / stride + 1, out_h = (h - 1) / stride + 1;
                for (int tap = 0; tap < 9; tap++) {
                    const int first = tap * 5 % (out_w * out_h), first_channel = tap % 2 * 16;  // channels past 40 are zeros
                    const int x0 = first % out_w * stride - dilation, y0 = first / out_w * stride - dilation;
                    const int offset_w = tap % 3 * dilation, offset_h = tap / 3 * dilation;
                    CLEAN("im2col_loads", dim3(1), dim3(32), sizeof(Box), map, reinterpret_cast<uint32_t*>(got.data), Coordinates{{first_channel, x0, y0, 1}},
                          offset_w, offset_h, pixels * 64);
                    for (int p = 0; p < pixels; p++) {
                        const int pixel = first + p, image = 1 + pixel / (out_w * out_h);
                        const int ox = pixel % out_w, oy = pixel / out_w % out_h;
                        const int ix = ox * stride - dilation + offset_w, iy = oy * stride - dilation + offset_h;
                        for (int c = 0; c < 32; c++) {
                            const bool inside = ix >= 0 && ix < w && iy >= 0 && iy < h && image < images && first_channel + c < channels;
                            const size_t from = size_t(((image * h + iy) * w + ix) * channels + first_channel + c);
                            const int at = p * 64 + c * 2, swizzled = at ^ (at / 128 % 4) * 16;
                            uint16_t value;
                            memcpy(&value, &got[size_t(swizzled)], 2);
                            if (value != (inside ? x[from] : 0)) return fail("stride %d, dilation %d, tap %d, pixel %d", stride, dilation, tap, p);
                        }
                    }
                }
            }
        }
    });
}

// ---- a ring: loads, arrivals and stores overlap ----

constexpr int kStages = 3, kTiles = 11, kTile = 512;  // floats
struct Ring {
    alignas(128) float in[kStages][kTile];
    alignas(128) float out[2][kTile];
    uint64_t full[kStages], empty[kStages];
};
// y = 2 x + 1, a tile at a time. Left out or wrong: 1 the wait for full stages, 2 the wait for empty ones, 3 the proxy fence,
// 4 the wait before `out` is written again, 5 the commit, 6 the last wait, 7 empty's second parity, 8 the barrier before the
// store, 9 too few bytes are expected.
KERNEL(tma_ring, 160, 1)(GRID_CONST TensorMap x, GRID_CONST TensorMap y, int bug) {
    SHARED_DYNAMIC(Ring, s);
    const int tid = int(threadIdx.x);
    if (tid == 0) {
        for (int i = 0; i < kStages; i++) {
            mbar_init(&s.full[i], 1);
            mbar_init(&s.empty[i], 128);
        }
        mbar_fence_init();
    }
    __syncthreads();
    if (tid >= 128) {
        for (int tile = 0; tile < kTiles && tid == 128; tile++) {
            const int stage = tile % kStages;
            const uint32_t round = uint32_t(tile / kStages);
            if (bug != 2 && tile >= kStages) mbar_wait(&s.empty[stage], bug == 7 ? 0 : (round & 1) ^ 1);
            mbar_arrive_expect_tx(&s.full[stage], uint32_t(sizeof s.in[0]) - (bug == 9 ? 16 : 0));
            tma_load_2d(s.in[stage], &x, &s.full[stage], 0, tile * 2);
        }
        return;
    }
    for (int tile = 0; tile < kTiles; tile++) {
        const int stage = tile % kStages, half = tile % 2;
        if (bug != 1) {
            while (!mbar_try(&s.full[stage], uint32_t(tile / kStages & 1))) {
            }
        }
        float value[4];
        for (int i = 0; i < 4; i++) value[i] = s.in[stage][i * 128 + tid] * 2.f + 1.f;
        mbar_arrive(&s.empty[stage]);
        if (tid == 0 && bug != 4) bulk_wait_read<1>();
        named_barrier_sync(1, 128);
        for (int i = 0; i < 4; i++) s.out[half][i * 128 + tid] = value[i];
        if (bug != 3) fence_proxy_async();
        if (bug != 8) named_barrier_sync(1, 128);
        if (tid == 0) {
            tma_store_2d(&y, s.out[half], 0, tile * 2);
            if (bug != 5) bulk_commit();
        }
    }
    if (tid == 0 && bug != 6) bulk_wait_read<0>();
}
REGISTER_KERNEL(tma_ring)

// 256 columns, 21 rows: the last tile's second row lies outside. The number of wrong elements, or -1: reported.
static int wrong_in_ring(int bug) {
    const int rows = 2 * kTiles - 1;
    Buffer<float> x(size_t(rows) * 256), y(size_t(rows) * 256);
    for (size_t i = 0; i < x.count; i++) x[i] = float(i);
    TensorMap map_x, map_y;
    const uint64_t dim[] = {256, uint64_t(rows)}, stride[] = {1024};
    const uint32_t box[] = {256, 2};
    CHECK(emu::tensor_map_encode(&map_x, 4, 2, x.data, dim, stride, box, 0) == 0);
    CHECK(emu::tensor_map_encode(&map_y, 4, 2, y.data, dim, stride, box, 0) == 0);
    if (run("tma_ring", dim3(1), dim3(160), sizeof(Ring), map_x, map_y, bug)) return -1;
    int wrong = 0;
    for (size_t i = 0; i < x.count; i++) wrong += !(y[i] == x[i] * 2.f + 1.f);
    return wrong;
}

TEST(a_ring_of_loads_and_stores) {
    in_every_mode([] {
        const int wrong = wrong_in_ring(0);
        if (wrong) fail("%d wrong: %s (%s)", wrong, emu::last_error(), mode_name().c_str());
    });
    for (int bug = 1; bug <= 9; bug++) {
        int shown = 0, late = 0;
        in_every_mode([&] {
            const int wrong = wrong_in_ring(bug);
            shown += wrong != 0;
            late += wrong != 0 && emu::config.async == emu::Late;
            if (kRaceBuild && wrong == 0) fail("bug %d: nothing was reported (%s)", bug, mode_name().c_str());
            if (bug == 5) CHECK(wrong == -1 && strstr(emu::last_error(), "bulk_commit"));
            if (bug == 6) CHECK(wrong == -1 && strstr(emu::last_error(), "bulk_wait_read<0>"));
            if (kRaceBuild && bug == 3) CHECK(strstr(emu::last_error(), "without fence.proxy.async"));
        });
        printf("  bug %d: shows in %d of 24 modes, %d of the 8 late ones\n", bug, shown, late);
        if (bug != 3) CHECK(shown > 0);  // a missing fence shows in no schedule
    }
}

// ---- stores that others read ----

// Thread 0 stores, waits or does not, and after a barrier another thread reads global memory.
KERNEL(reads_what_was_stored, 64, 1)(GRID_CONST TensorMap map, float* global, float* out, int waits) {
    SHARED_DYNAMIC(Ring, s);
    for (unsigned i = threadIdx.x; i < kTile; i += 64) s.out[0][i] = float(i);
    fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        tma_store_2d(&map, s.out[0], 0, 0);
        bulk_commit();
        if (waits) {
            bulk_wait<0>();
        } else {
            bulk_wait_read<0>();
        }
    }
    __syncthreads();
    out[threadIdx.x] = global[threadIdx.x];
}
REGISTER_KERNEL(reads_what_was_stored)

TEST(a_store_is_seen_after_its_wait) {
    in_every_mode([] {
        Buffer<float> global(kTile), out(64);
        TensorMap map;
        const uint64_t dim[] = {256, 2}, stride[] = {1024};
        const uint32_t box[] = {256, 2};
        CHECK(emu::tensor_map_encode(&map, 4, 2, global.data, dim, stride, box, 0) == 0);
        CLEAN("reads_what_was_stored", dim3(1), dim3(64), sizeof(Ring), map, global.data, out.data, 1);
        for (size_t i = 0; i < 64; i++) CHECK(out[i] == float(i));
        for (size_t i = 0; i < 64; i++) global[i] = -1.f;
        const int result = run("reads_what_was_stored", dim3(1), dim3(64), sizeof(Ring), map, global.data, out.data, 0);
        if (kRaceBuild) REPORTS(result, "read after write of global memory", "a TMA store", "tma.cpp:");
        if (emu::config.async == emu::Late) CHECK(out[0] == -1.f);
    });
}

// Writes global memory, loads it by TMA.
KERNEL(loads_what_was_written, 32, 1)(GRID_CONST TensorMap map, float* global, float* out, int fence) {
    SHARED_DYNAMIC(Ring, s);
    for (unsigned i = threadIdx.x; i < kTile; i += 32) global[i] = float(i);
    if (fence) fence_proxy_async_global();
    if (threadIdx.x == 0) mbar_init(&s.full[0], 1);
    __syncthreads();
    if (threadIdx.x == 0) {
        mbar_expect(&s.full[0], sizeof s.in[0]);
        tma_load_2d(s.in[0], &map, &s.full[0], 0, 0);
        mbar_arrive(&s.full[0]);
    }
    mbar_wait(&s.full[0], 0);
    for (unsigned i = threadIdx.x; i < kTile; i += 32) out[i] = s.in[0][i];
}
REGISTER_KERNEL(loads_what_was_written)

TEST(a_load_of_what_the_kernel_wrote_wants_a_fence) {
    in_every_mode([] {
        Buffer<float> global(kTile), out(kTile);
        TensorMap map;
        const uint64_t dim[] = {256, 2}, stride[] = {1024};
        const uint32_t box[] = {256, 2};
        CHECK(emu::tensor_map_encode(&map, 4, 2, global.data, dim, stride, box, 0) == 0);
        CLEAN("loads_what_was_written", dim3(1), dim3(32), sizeof(Ring), map, global.data, out.data, 1);
        for (size_t i = 0; i < kTile; i++) CHECK(out[i] == float(i));
        const int result = run("loads_what_was_written", dim3(1), dim3(32), sizeof(Ring), map, global.data, out.data, 0);
        if (kRaceBuild) REPORTS(result, "asynchronous access without fence.proxy.async of global memory", "tma.cpp:");
    });
}

// ---- what is reported in every build and every mode ----

enum TmaMistake {
    kRankDiffers,
    kMisaligned,
    kPastTheEnd,
    kMapOfIm2col,
    kTileMapForIm2col,
    kOutsideCorners,
    kBarrierUnknown,
    kNobodyWaits,
    kStoreUncommitted,
    kStoreNotWaitedFor,
    kHangsForBytes,
    kHangsForArrivals,
    kPollsForever,
    kTooManyArrivals,
    kTooManyBytes,
    kOutsideAllocation,
    kStoresOutsideAllocation,
};
KERNEL(make_tma_mistake, 64, 1)(GRID_CONST TensorMap map, GRID_CONST TensorMap im2col, int mistake) {
    SHARED_DYNAMIC(Box, s);
    if (threadIdx.x == 0) mbar_init(&s.bar, 1);
    __syncthreads();
    if (threadIdx.x == 32) {
        if (mistake == kHangsForBytes || mistake == kHangsForArrivals) mbar_wait(&s.bar, 0);
    }
    if (threadIdx.x != 0) return;
    switch (mistake) {
        case kRankDiffers: tma_load_3d(s.bytes, &map, &s.bar, 0, 0, 0); break;
        case kMisaligned: tma_load_2d(s.bytes + 64, &map, &s.bar, 0, 0); break;
        case kPastTheEnd: tma_load_2d(s.bytes + kBoxBytes, &map, &s.bar, 0, 0); break;
        case kMapOfIm2col: tma_load_4d(s.bytes, &im2col, &s.bar, 0, 0, 0, 0); break;
        case kTileMapForIm2col: tma_load_im2col_4d(s.bytes, &map, &s.bar, 0, 0, 0, 0, 0, 0); break;
        case kOutsideCorners: tma_load_im2col_4d(s.bytes, &im2col, &s.bar, 0, -2, 0, 0, 0, 0); break;
        case kBarrierUnknown: tma_load_2d(s.bytes, &map, reinterpret_cast<uint64_t*>(s.bytes), 0, 0); break;
        case kNobodyWaits:
        case kOutsideAllocation: tma_load_2d(s.bytes, &map, &s.bar, 0, 0); break;
        case kStoreUncommitted:
        case kStoresOutsideAllocation: tma_store_2d(&map, s.bytes, 0, 0); break;
        case kStoreNotWaitedFor:
            tma_store_2d(&map, s.bytes, 0, 0);
            bulk_commit();
            tma_store_2d(&map, s.bytes, 0, 0);
            bulk_commit();
            bulk_wait_read<1>();
            break;
        case kHangsForBytes:
            mbar_arrive_expect_tx(&s.bar, 4096);
            tma_load_2d(s.bytes, &map, &s.bar, 0, 0);
            break;
        case kHangsForArrivals: mbar_wait(&s.bar, 0); break;
        case kPollsForever:
            while (!mbar_try(&s.bar, 0)) {
            }
            break;
        case kTooManyArrivals: mbar_arrive_count(&s.bar, 2); break;
        case kTooManyBytes: mbar_expect(&s.bar, 1 << 20); break;
    }
}
REGISTER_KERNEL(make_tma_mistake)

static uintptr_t memory_begin, memory_end;
static bool within_memory(uintptr_t address, uintptr_t* begin, uintptr_t* end) {
    *begin = memory_begin;
    *end = memory_end;
    return address >= memory_begin && address < memory_end;
}

TEST(tma_mistakes_are_reported) {
    struct Case {
        TmaMistake mistake;
        std::initializer_list<const char*> texts;
    };
    static const Case cases[] = {
        {kRankDiffers, {"TMA of rank 3 from a tensor map of rank 2", "tma.cpp:"}},
        {kMisaligned, {"shared memory + 64, not aligned to 128"}},
        {kPastTheEnd, {"TMA of 2048 bytes outside the block's shared memory"}},
        {kMapOfIm2col, {"in tile mode with a tensor map in im2col mode"}},
        {kTileMapForIm2col, {"TMA of rank 4 from a tensor map of rank 2"}},
        {kOutsideCorners, {"from coordinate -2 of dimension 1, the corners allow -1 to 6"}},
        {kBarrierUnknown, {"before it was initialised"}},
        {kStoreUncommitted, {"with a TMA store that bulk_commit does not follow"}},
        {kStoreNotWaitedFor, {"no bulk_wait_read<0>", "tma.cpp:"}},
        {kHangsForBytes, {"deadlock", "mbarrier wait at", "for parity 0 of the mbarrier at shared memory + 16384", "lacks 0 of 1 arrivals and 2048 bytes"}},
        {kHangsForArrivals, {"deadlock", "warp 0, lanes 00000001: mbarrier wait", "warp 1, lanes 00000001: mbarrier wait", "lacks 1 of 1 arrivals and 0 bytes"}},
        {kPollsForever, {"deadlock", "mbarrier test at"}},
        {kTooManyArrivals, {"more than the mbarrier's 1 arrivals"}},
        {kTooManyBytes, {"an mbarrier that expects 1048576 bytes"}},
    };
    Buffer<float> memory(64 * 64);
    memset(memory.data, 0, memory.count * sizeof(float));
    TensorMap map, im2col;
    const uint64_t dim[] = {32, 64}, stride[] = {128}, dims[] = {32, 8, 8, 1}, strides[] = {128, 1024, 8192};
    const uint32_t box[] = {32, 16}, steps[] = {1, 1, 1, 1};
    const int lower[] = {-1, -1}, upper[] = {-1, -1};
    CHECK(emu::tensor_map_encode(&map, 4, 2, memory.data, dim, stride, box, 3) == 0);
    CHECK(emu::tensor_map_encode_im2col(&im2col, 4, 4, memory.data, dims, strides, lower, upper, 32, 16, steps, 3) == 0);
    const auto launch = [&](TmaMistake mistake) {
        return run("make_tma_mistake", dim3(1), dim3(64), sizeof(Box), map, im2col, int(mistake));
    };
    memory_begin = uintptr_t(memory.data);
    in_every_mode([&] {
        for (const Case& c : cases) expect_report(launch(c.mistake), int(c.mistake), c.texts);
        if (kRaceBuild || emu::config.async == emu::Late) REPORTS(launch(kNobodyWaits), "the block ends while copies into its shared memory may be under way");
        memory_end = memory_begin + 64 * 15;
        emu::set_allocation_lookup(within_memory);
        REPORTS(launch(kOutsideAllocation), "TMA load", "allocation", "tma.cpp:");
        REPORTS(launch(kStoresOutsideAllocation), "TMA store", "allocation", "tma.cpp:");
        emu::set_allocation_lookup(nullptr);
    });
}
