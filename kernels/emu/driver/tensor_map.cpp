// Tensor maps: what cuTensorMapEncodeTiled and cuTensorMapEncodeIm2col refuse, rule by rule as the driver API's description
// has them, each with the argument and its value. What passes is encoded as the emulator's TMA reads it (machine/hopper.h).
// Refused although a card could do it, with CUDA_ERROR_NOT_SUPPORTED: interleaved layouts, packed elements of 4 and 6 bits,
// swizzles of larger chunks, strides between the elements of a tile.
#include "driver.h"

namespace emu::driver {

static constexpr int kTypes = 16, kPlainTypes = 13;  // the rest are packed
static constexpr int kElementBytes[kPlainTypes] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
static constexpr bool kIsFloat[kTypes] = {false, false, false, false, false, false, true, true, true, true, true, true, true};

// What both calls take.
struct Encoding {
    const char* call;
    void* map;
    int type;
    uint32_t rank;
    uintptr_t address;
    const cuuint64_t *dims, *strides;
    const cuuint32_t* element_strides;
    int interleave, swizzle, l2_promotion, fill;

    bool packed() const { return type >= kPlainTypes; }
    // 16U4_ALIGN16B and 16U6_ALIGN16B: with gaps in shared memory.
    bool wide() const { return type == CU_TENSOR_MAP_DATA_TYPE_16U4_ALIGN16B || type == CU_TENSOR_MAP_DATA_TYPE_16U6_ALIGN16B; }
    // 64 bits hold the largest product, of 256 elements.
    uint64_t bytes(uint64_t elements) const {
        if (type == CU_TENSOR_MAP_DATA_TYPE_16U6_ALIGN16B) return elements * 6 / 8;
        return packed() ? elements / 2 : elements * uint64_t(kElementBytes[type]);
    }
};

using Number = unsigned long long;

static CUresult out_of_range(const Encoding& e, const char* argument, long long value, long long least, long long most) {
    return say(CUDA_ERROR_INVALID_VALUE, "%s: %s is %lld; %lld to %lld", e.call, argument, value, least, most);
}
static CUresult element_out_of_range(const Encoding& e, const char* argument, uint32_t i, long long value, long long least,
                                     long long most) {
    return out_of_range(e, (std::string(argument) + "[" + std::to_string(i) + "]").c_str(), value, least, most);
}

static CUresult check_tensor(const Encoding& e, uint32_t least_rank) {
    if (card().major < 9) return say(CUDA_ERROR_NOT_SUPPORTED, "%s: an %s has no TMA", e.call, card().name);
    if (!e.map || uintptr_t(e.map) % 64) {
        return say(CUDA_ERROR_INVALID_VALUE, "%s: tensorMap is %p; an address aligned to 64", e.call, e.map);
    }
    if (e.type < 0 || e.type >= kTypes) return out_of_range(e, "tensorDataType", e.type, 0, kTypes - 1);
    if (e.interleave < 0 || e.interleave > 2) return out_of_range(e, "interleave", e.interleave, 0, 2);
    if (e.swizzle < 0 || e.swizzle > 6) return out_of_range(e, "swizzle", e.swizzle, 0, 6);
    if (e.l2_promotion < 0 || e.l2_promotion > 3) return out_of_range(e, "l2Promotion", e.l2_promotion, 0, 3);
    if (e.fill < 0 || e.fill > 1) return out_of_range(e, "oobFill", e.fill, 0, 1);
    if (e.rank < least_rank || e.rank > 5) return out_of_range(e, "tensorRank", e.rank, least_rank, 5);
    if (!e.dims || !e.element_strides || (e.rank > 1 && !e.strides)) {
        return say(CUDA_ERROR_INVALID_VALUE, "%s: an array is missing", e.call);
    }
    const bool by_32 = e.interleave == CU_TENSOR_MAP_INTERLEAVE_32B || e.wide();
    const unsigned alignment = by_32 ? 32 : 16;
    if (e.address == 0 || e.address % alignment) {
        return say(CUDA_ERROR_INVALID_VALUE, "%s: globalAddress is %#zx; an address aligned to %u", e.call,
                   size_t(e.address), alignment);
    }
    for (uint32_t i = 0; i < e.rank; i++) {
        const Number most = 1ull << 32;
        if (e.dims[i] == 0 || e.dims[i] > most) {
            return element_out_of_range(e, "globalDim", i, (long long)e.dims[i], 1, (long long)most);
        }
    }
    const unsigned unit = e.wide() ? 128 : e.packed() ? 2 : 1;
    if (e.dims[0] % unit) {
        return say(CUDA_ERROR_INVALID_VALUE, "%s: globalDim[0] is %llu; a multiple of %u", e.call, Number(e.dims[0]), unit);
    }
    for (uint32_t i = 0; i + 1 < e.rank; i++) {
        if (e.strides[i] % alignment || e.strides[i] >= 1ull << 40) {
            return say(CUDA_ERROR_INVALID_VALUE, "%s: globalStrides[%u] is %llu; a multiple of %u below 2^40", e.call, i,
                       Number(e.strides[i]), alignment);
        }
    }
    for (uint32_t i = 0; i < e.rank; i++) {
        if (i == 0 && e.interleave == CU_TENSOR_MAP_INTERLEAVE_NONE) continue;  // ignored there
        if (e.element_strides[i] < 1 || e.element_strides[i] > 8) {
            return element_out_of_range(e, "elementStrides", i, e.element_strides[i], 1, 8);
        }
    }
    if (e.fill && (!kIsFloat[e.type] || e.packed())) {
        return say(CUDA_ERROR_INVALID_VALUE, "%s: oobFill is NaN; the data type %d is no floating-point one", e.call, e.type);
    }
    return CUDA_SUCCESS;
}

// `elements`: of the box's inner dimension, which `argument` says.
static CUresult check_row(const Encoding& e, const char* argument, uint64_t elements) {
    if (e.wide() && elements != 128) {
        return say(CUDA_ERROR_INVALID_VALUE, "%s: %s is %llu; 128 for packed elements", e.call, argument, Number(elements));
    }
    const Number bytes = e.bytes(elements);
    if (e.interleave == CU_TENSOR_MAP_INTERLEAVE_NONE) {
        if (bytes % 16) {
            return say(CUDA_ERROR_INVALID_VALUE, "%s: %s is %llu, %llu bytes; a multiple of 16 bytes", e.call, argument,
                       Number(elements), bytes);
        }
        const Number span = e.swizzle == CU_TENSOR_MAP_SWIZZLE_NONE  ? ~0ull
                            : e.swizzle == CU_TENSOR_MAP_SWIZZLE_32B ? 32
                            : e.swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64
                                                                     : 128;
        if (bytes > span) {
            return say(CUDA_ERROR_INVALID_VALUE, "%s: %s is %llu, %llu bytes; the swizzle spans %llu", e.call, argument,
                       Number(elements), bytes, span);
        }
    }
    if (e.interleave == CU_TENSOR_MAP_INTERLEAVE_32B && e.swizzle != CU_TENSOR_MAP_SWIZZLE_32B) {
        return say(CUDA_ERROR_INVALID_VALUE, "%s: swizzle is %d; 1, of 32 bytes, with an interleave of 32", e.call, e.swizzle);
    }
    return CUDA_SUCCESS;
}

static CUresult check_emulated(const Encoding& e) {
    if (e.interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) {
        return say(CUDA_ERROR_NOT_SUPPORTED, "%s: interleaved tensor maps are not emulated", e.call);
    }
    if (e.packed()) return say(CUDA_ERROR_NOT_SUPPORTED, "%s: packed elements are not emulated", e.call);
    if (e.swizzle > CU_TENSOR_MAP_SWIZZLE_128B) {
        return say(CUDA_ERROR_NOT_SUPPORTED, "%s: swizzles of chunks larger than 16 bytes are not emulated", e.call);
    }
    if (e.fill) return say(CUDA_ERROR_NOT_SUPPORTED, "%s: a fill with NaN is not emulated", e.call);
    return CUDA_SUCCESS;
}

static CUresult encode_tiled(const Encoding& e, const cuuint32_t* box) {
    if (const CUresult error = check_tensor(e, e.interleave > 0 ? 3 : 1)) return error;
    if (!box) return say(CUDA_ERROR_INVALID_VALUE, "%s: boxDim is missing", e.call);
    for (uint32_t i = 0; i < e.rank; i++) {
        if (box[i] < 1 || box[i] > 256) return element_out_of_range(e, "boxDim", i, box[i], 1, 256);
    }
    if (const CUresult error = check_row(e, "boxDim[0]", box[0])) return error;
    if (const CUresult error = check_emulated(e)) return error;
    for (uint32_t i = 1; i < e.rank; i++) {
        if (e.element_strides[i] != 1) {
            return say(CUDA_ERROR_NOT_SUPPORTED, "%s: elementStrides[%u] is %u; in tiled mode others than 1 are not emulated",
                       e.call, i, e.element_strides[i]);
        }
    }
    if (emu::tensor_map_encode(static_cast<emu::TensorMap*>(e.map), kElementBytes[e.type], int(e.rank),
                               reinterpret_cast<void*>(e.address), e.dims, e.strides, box, e.swizzle)) {
        return say(CUDA_ERROR_NOT_SUPPORTED, "%s: the emulator has no such tensor map", e.call);
    }
    return CUDA_SUCCESS;
}

// The corners are of the spatial dimensions, the innermost, W, first.
static CUresult encode_im2col(const Encoding& e, const int* lower, const int* upper, uint32_t channels, uint32_t pixels) {
    if (const CUresult error = check_tensor(e, 3)) return error;
    if (!lower || !upper) return say(CUDA_ERROR_INVALID_VALUE, "%s: a corner is missing", e.call);
    const int range = e.rank == 3 ? 1 << 15 : e.rank == 4 ? 1 << 7 : 1 << 4;
    for (uint32_t i = 0; i + 2 < e.rank; i++) {
        if (lower[i] < -range || lower[i] >= range) {
            return element_out_of_range(e, "pixelBoxLowerCorner", i, lower[i], -range, range - 1);
        }
        if (upper[i] < -range || upper[i] >= range) {
            return element_out_of_range(e, "pixelBoxUpperCorner", i, upper[i], -range, range - 1);
        }
        // The lower one counts from the first pixel, the upper from the last: the box is what lies between.
        if (int64_t(e.dims[i + 1]) + upper[i] - lower[i] <= 0) {
            return say(CUDA_ERROR_INVALID_VALUE,
                       "%s: between pixelBoxLowerCorner[%u] = %d and pixelBoxUpperCorner[%u] = %d of %llu there is no pixel",
                       e.call, i, lower[i], i, upper[i], Number(e.dims[i + 1]));
        }
    }
    if (channels < 1 || channels > 256) return out_of_range(e, "channelsPerPixel", channels, 1, 256);
    if (pixels < 1 || pixels > 1024) return out_of_range(e, "pixelsPerColumn", pixels, 1, 1024);
    if (const CUresult error = check_row(e, "channelsPerPixel", channels)) return error;
    if (const CUresult error = check_emulated(e)) return error;
    cuuint32_t steps[5] = {1};
    for (uint32_t i = 1; i < e.rank; i++) steps[i] = e.element_strides[i];
    if (emu::tensor_map_encode_im2col(static_cast<emu::TensorMap*>(e.map), kElementBytes[e.type], int(e.rank),
                                      reinterpret_cast<void*>(e.address), e.dims, e.strides, lower, upper, channels, pixels,
                                      steps, e.swizzle)) {
        return say(CUDA_ERROR_NOT_SUPPORTED, "%s: the emulator has no such tensor map", e.call);
    }
    return CUDA_SUCCESS;
}

}  // namespace emu::driver

using namespace emu::driver;

EMU_EXPORT CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                           const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
                                           const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                                           CUtensorMapSwizzle swizzle, CUtensorMapL2promotion l2_promotion,
                                           CUtensorMapFloatOOBfill fill) {
    return api(Needs::Context, [&] {
        return encode_tiled({"cuTensorMapEncodeTiled", map, int(type), rank, uintptr_t(address), dims, strides,
                             element_strides, int(interleave), int(swizzle), int(l2_promotion), int(fill)},
                            box);
    });
}

EMU_EXPORT CUresult cuTensorMapEncodeIm2col(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                            const cuuint64_t* dims, const cuuint64_t* strides, const int* lower_corner,
                                            const int* upper_corner, cuuint32_t channels, cuuint32_t pixels,
                                            const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                                            CUtensorMapSwizzle swizzle, CUtensorMapL2promotion l2_promotion,
                                            CUtensorMapFloatOOBfill fill) {
    return api(Needs::Context, [&] {
        return encode_im2col({"cuTensorMapEncodeIm2col", map, int(type), rank, uintptr_t(address), dims, strides,
                              element_strides, int(interleave), int(swizzle), int(l2_promotion), int(fill)},
                             lower_corner, upper_corner, channels, pixels);
    });
}
