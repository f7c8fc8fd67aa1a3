// Copies and memsets, asynchronous as on a card:
//   from pageable host memory   the bytes are staged when the call is made, and land later
//   from pinned host memory     the bytes are read when the copy runs
//   to pageable host memory     the call waits for the copy
//   to pinned host memory       the bytes are there when the copy has run
//   device to device, memset    never wait, also in the calls without a stream
// Addresses are checked when the call is made and again when the work runs: in between the memory may have been freed.
#include "driver.h"

#include <cstring>

namespace emu::driver {

enum class Place { Device, Pinned, Pageable };

// One end of a copy.
struct Range {
    Place place;
    uintptr_t address;
};

static CUresult device_range(uintptr_t address, size_t bytes, const char* what) {
    const AllocationRef allocation = find_allocation(address);
    if (!allocation) {
        return say(CUDA_ERROR_INVALID_VALUE, "%s: %#zx is %s", what, size_t(address),
                   find_freed(address) ? "in memory that was freed" : "in no allocation");
    }
    if (!covers(*allocation, address, bytes)) {
        return say(CUDA_ERROR_INVALID_VALUE, "%s: %zu bytes at offset %zu of an allocation of %zu", what, bytes,
                   size_t(address - allocation->base), allocation->size);
    }
    return CUDA_SUCCESS;
}

static CUresult classify_host(const void* pointer, size_t bytes, const char* what, Range& range) {
    range = {Place::Pageable, uintptr_t(pointer)};
    if (!pointer) return refuse(CUDA_ERROR_INVALID_VALUE, "%s: the host address is null", what);
    const AllocationRef allocation = find_allocation(range.address);
    if (!allocation) return CUDA_SUCCESS;
    if (allocation->kind == MemoryKind::Device) {
        return say(CUDA_ERROR_INVALID_VALUE, "%s: the host address %p is the card's", what, pointer);
    }
    range.place = Place::Pinned;
    return device_range(range.address, bytes, what);
}

// When the work runs: does the memory still exist? Pageable memory is the host's own affair.
static CUresult still_there(const Range& range, size_t bytes, const char* what) {
    if (range.place == Place::Pageable) return CUDA_SUCCESS;
    const AllocationRef allocation = find_allocation(range.address);
    if (allocation && covers(*allocation, range.address, bytes)) return CUDA_SUCCESS;
    return fault(CUDA_ERROR_ILLEGAL_ADDRESS, "%s of %zu bytes at %#zx runs after that %s memory was freed", what, bytes,
                 size_t(range.address), range.place == Place::Device ? "device" : "pinned host");
}

struct CopyWork : Work {
    Range to, from;
    size_t bytes;
    bool staged_copy = false;
    std::vector<char> staged;  // the bytes as they were when the call was made

    CopyWork(Range t, Range f, size_t n) : to(t), from(f), bytes(n) {}
    void stage() {
        const char* source = reinterpret_cast<const char*>(from.address);
        staged.assign(source, source + bytes);
        staged_copy = true;
    }
    CUgraphNodeType type() const override { return CU_GRAPH_NODE_TYPE_MEMCPY; }
    CUresult run() override {
        if (const CUresult e = still_there(to, bytes, "a copy to")) return e;
        if (!staged_copy) {
            if (const CUresult e = still_there(from, bytes, "a copy from")) return e;
        }
        memmove(reinterpret_cast<void*>(to.address),
                staged_copy ? staged.data() : reinterpret_cast<const void*>(from.address), bytes);
        return CUDA_SUCCESS;
    }
};

struct MemsetWork : Work {
    uintptr_t address;
    uint32_t value;
    unsigned width;
    size_t count;
    MemsetWork(uintptr_t a, uint32_t v, unsigned w, size_t n) : address(a), value(v), width(w), count(n) {}
    CUgraphNodeType type() const override { return CU_GRAPH_NODE_TYPE_MEMSET; }
    CUresult run() override {
        if (const CUresult e = still_there({Place::Device, address}, count * width, "a memset")) return e;
        switch (width) {
            case 1: memset(reinterpret_cast<void*>(address), int(value), count); break;
            case 2: std::fill_n(reinterpret_cast<uint16_t*>(address), count, uint16_t(value)); break;
            default: std::fill_n(reinterpret_cast<uint32_t*>(address), count, value);
        }
        return CUDA_SUCCESS;
    }
};

// `waits`: a call without a stream, which returns only when the host may look at, or reuse, its memory.
static CUresult copy(Range to, Range from, size_t bytes, CUstream handle, bool waits) {
    CUstream_st* stream = find_stream(handle);
    if (!stream) return refuse(CUDA_ERROR_INVALID_HANDLE, "a copy: no such stream");
    auto work = std::make_shared<CopyWork>(to, from, bytes);
    if (stream->capture) return capture_node(stream, work);  // reads and writes the host's memory at each replay
    if (from.place == Place::Pageable && !completes_at_once()) work->stage();
    OperationRef operation;
    if (const CUresult e = submit(stream, work, &operation)) return e;
    const bool host_sees_result = to.place == Place::Pageable || (waits && to.place == Place::Pinned);
    const bool host_may_reuse = waits && from.place == Place::Pinned;
    return host_sees_result || host_may_reuse ? wait_for(operation) : CUDA_SUCCESS;
}

static CUresult copy_to_device(CUdeviceptr to, const void* from, size_t bytes, CUstream stream, bool waits) {
    if (bytes == 0) return CUDA_SUCCESS;
    Range source;
    if (const CUresult e = device_range(uintptr_t(to), bytes, "a copy to the device")) return e;
    if (const CUresult e = classify_host(from, bytes, "a copy to the device", source)) return e;
    return copy({Place::Device, uintptr_t(to)}, source, bytes, stream, waits);
}

static CUresult copy_to_host(void* to, CUdeviceptr from, size_t bytes, CUstream stream, bool waits) {
    if (bytes == 0) return CUDA_SUCCESS;
    Range target;
    if (const CUresult e = device_range(uintptr_t(from), bytes, "a copy to the host")) return e;
    if (const CUresult e = classify_host(to, bytes, "a copy to the host", target)) return e;
    return copy(target, {Place::Device, uintptr_t(from)}, bytes, stream, waits);
}

static CUresult copy_on_device(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    if (bytes == 0) return CUDA_SUCCESS;
    if (const CUresult e = device_range(uintptr_t(to), bytes, "a copy on the device, target")) return e;
    if (const CUresult e = device_range(uintptr_t(from), bytes, "a copy on the device, source")) return e;
    return copy({Place::Device, uintptr_t(to)}, {Place::Device, uintptr_t(from)}, bytes, stream, false);
}

// Copies whose direction the addresses tell.
static CUresult copy_any(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream, bool waits) {
    const AllocationRef target = find_allocation(uintptr_t(to)), source = find_allocation(uintptr_t(from));
    const bool to_device = target && target->kind == MemoryKind::Device;
    const bool from_device = source && source->kind == MemoryKind::Device;
    if (to_device && from_device) return copy_on_device(to, from, bytes, stream);
    if (to_device) return copy_to_device(to, reinterpret_cast<const void*>(from), bytes, stream, waits);
    if (from_device) return copy_to_host(reinterpret_cast<void*>(to), from, bytes, stream, waits);
    return refuse(CUDA_ERROR_INVALID_VALUE, "a copy of which no end is on the device");
}

static CUresult fill(CUdeviceptr address, uint32_t value, unsigned width, size_t count, CUstream handle) {
    if (address % width) return refuse(CUDA_ERROR_INVALID_VALUE, "a memset of %u-byte values at %#llx", width, address);
    if (count == 0) return CUDA_SUCCESS;
    if (count > SIZE_MAX / width) return refuse(CUDA_ERROR_INVALID_VALUE, "a memset of %zu values", count);
    if (const CUresult e = device_range(uintptr_t(address), count * width, "a memset")) return e;
    CUstream_st* stream = find_stream(handle);
    if (!stream) return refuse(CUDA_ERROR_INVALID_HANDLE, "a memset: no such stream");
    return submit(stream, std::make_shared<MemsetWork>(uintptr_t(address), value, width, count));
}

}  // namespace emu::driver

using namespace emu::driver;

// ---- with a stream ----

EMU_EXPORT CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, CUstream stream) {
    return api(Needs::Context, [&] { return copy_to_device(to, from, bytes, stream, false); });
}

EMU_EXPORT CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, CUstream stream) {
    return api(Needs::Context, [&] { return copy_to_host(to, from, bytes, stream, false); });
}

EMU_EXPORT CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    return api(Needs::Context, [&] { return copy_on_device(to, from, bytes, stream); });
}

EMU_EXPORT CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    return api(Needs::Context, [&] { return copy_any(to, from, bytes, stream, false); });
}

EMU_EXPORT CUresult cuMemcpyPeerAsync(CUdeviceptr to, CUcontext, CUdeviceptr from, CUcontext, size_t bytes,
                                      CUstream stream) {
    return api(Needs::Context, [&] { return copy_on_device(to, from, bytes, stream); });
}

EMU_EXPORT CUresult cuMemsetD8Async(CUdeviceptr address, unsigned char value, size_t count, CUstream stream) {
    return api(Needs::Context, [&] { return fill(address, value, 1, count, stream); });
}

EMU_EXPORT CUresult cuMemsetD16Async(CUdeviceptr address, unsigned short value, size_t count, CUstream stream) {
    return api(Needs::Context, [&] { return fill(address, value, 2, count, stream); });
}

EMU_EXPORT CUresult cuMemsetD32Async(CUdeviceptr address, unsigned value, size_t count, CUstream stream) {
    return api(Needs::Context, [&] { return fill(address, value, 4, count, stream); });
}

// ---- without: on the legacy default stream ----

EMU_EXPORT CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) {
    return api(Needs::Context, [&]() -> CUresult {
        if (const CUresult e = refuse_during_capture()) return e;
        return copy_to_device(to, from, bytes, nullptr, true);
    });
}

EMU_EXPORT CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) {
    return api(Needs::Context, [&]() -> CUresult {
        if (const CUresult e = refuse_during_capture()) return e;
        return copy_to_host(to, from, bytes, nullptr, true);
    });
}

EMU_EXPORT CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    return api(Needs::Context, [&]() -> CUresult {
        if (const CUresult e = refuse_during_capture()) return e;
        return copy_on_device(to, from, bytes, nullptr);
    });
}

EMU_EXPORT CUresult cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    return api(Needs::Context, [&]() -> CUresult {
        if (const CUresult e = refuse_during_capture()) return e;
        return copy_any(to, from, bytes, nullptr, true);
    });
}

EMU_EXPORT CUresult cuMemsetD8_v2(CUdeviceptr address, unsigned char value, size_t count) {
    return api(Needs::Context, [&]() -> CUresult {
        if (const CUresult e = refuse_during_capture()) return e;
        return fill(address, value, 1, count, nullptr);
    });
}

EMU_EXPORT CUresult cuMemsetD16_v2(CUdeviceptr address, unsigned short value, size_t count) {
    return api(Needs::Context, [&]() -> CUresult {
        if (const CUresult e = refuse_during_capture()) return e;
        return fill(address, value, 2, count, nullptr);
    });
}

EMU_EXPORT CUresult cuMemsetD32_v2(CUdeviceptr address, unsigned value, size_t count) {
    return api(Needs::Context, [&]() -> CUresult {
        if (const CUresult e = refuse_during_capture()) return e;
        return fill(address, value, 4, count, nullptr);
    });
}
