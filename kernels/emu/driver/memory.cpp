// Allocations of the emulated card. A device address is a host address, so kernels reach it directly; what a card's
// memory protection would see is seen by other means:
//   guard zones   before and after each allocation lie bytes that are compared at each free, synchronisation and exit;
//                 in an address-sanitizer build its red zones are there instead, and reads out of range are seen too
//   fresh memory  is 0xFF, a NaN in every float type, and so is freed memory
//   quarantine    a freed allocation keeps its addresses for a while, so that a late use is recognised
#include "driver.h"

#include <cstdlib>
#include <cstring>
#include <deque>

#if defined(__SANITIZE_ADDRESS__)  // g++; clang++ has a feature test
#define EMU_ADDRESS_SANITIZER 1
#elif !defined(__has_feature)
#define EMU_ADDRESS_SANITIZER 0
#elif __has_feature(address_sanitizer)
#define EMU_ADDRESS_SANITIZER 1
#else
#define EMU_ADDRESS_SANITIZER 0
#endif

namespace emu::driver {

static const size_t kAlignment = 256;  // of cuMemAlloc
static const size_t kGuard = EMU_ADDRESS_SANITIZER ? 0 : 256;
static const int kPoison = 0xFF;
static const size_t kQuarantineBytes = size_t(64) << 20;
static const size_t kQuarantineCount = 4096;

uint64_t failing_creation = 0;  // counts down to the creation that fails; 0: none
static uint64_t creations = 0;
static uint64_t serials = 0;
static size_t live_bytes = 0, peak_bytes = 0, live_count = 0;  // of the device; the count has pinned ones too
static uint64_t injected_failures = 0;

// By base address. Never destroyed, see state().
static std::map<uintptr_t, AllocationRef>& live() {
    static auto* only = new std::map<uintptr_t, AllocationRef>;
    return *only;
}

static std::map<uintptr_t, AllocationRef>& quarantine() {
    static auto* only = new std::map<uintptr_t, AllocationRef>;
    return *only;
}
static std::deque<AllocationRef>& quarantine_order() {
    static auto* only = new std::deque<AllocationRef>;
    return *only;
}
static size_t quarantined_bytes = 0;

// ---- finding ----

static AllocationRef find_in(const std::map<uintptr_t, AllocationRef>& map, uintptr_t address) {
    auto it = map.upper_bound(address);
    if (it == map.begin()) return nullptr;
    --it;
    return address < it->first + it->second->size ? it->second : nullptr;
}

AllocationRef find_allocation(uintptr_t address) { return find_in(live(), address); }

AllocationRef find_freed(uintptr_t address) {
    return find_in(live(), address) ? nullptr : find_in(quarantine(), address);
}

AllocationRef find_allocation_or_end(uintptr_t address) {
    AllocationRef found = find_in(live(), address);
    return found || address == 0 ? found : find_in(live(), address - 1);
}

bool covers(const Allocation& allocation, uintptr_t address, size_t bytes) {
    return address >= allocation.base && address - allocation.base <= allocation.size &&
           bytes <= allocation.size - (address - allocation.base);
}

// ---- guard zones ----

// Differs from byte to byte, so that neither a shifted copy nor a fill looks intact; repeats with kAlignment.
static const unsigned char* guard_pattern() {
    static const auto* pattern = [] {
        auto* bytes = new unsigned char[kAlignment];
        for (size_t i = 0; i < kAlignment; i++) bytes[i] = (unsigned char)(i * 0x9D + 0x5B);
        return bytes;
    }();
    return pattern;
}

static size_t tail_guard(size_t size) { return kGuard + (kAlignment - size % kAlignment) % kAlignment; }

// Calls part(address, pattern, bytes) for each piece of a zone that lies within one repetition.
template <class Part>
static void guard_pieces(uintptr_t from, size_t bytes, Part part) {
    while (bytes > 0) {
        const size_t offset = from % kAlignment, piece = std::min(bytes, kAlignment - offset);
        part(from, guard_pattern() + offset, piece);
        from += piece;
        bytes -= piece;
    }
}

static void fill_guard(uintptr_t from, size_t bytes) {
    guard_pieces(from, bytes, [](uintptr_t at, const unsigned char* pattern, size_t n) {
        memcpy(reinterpret_cast<void*>(at), pattern, n);
    });
}

// The first byte that differs, or 0.
static uintptr_t damage(uintptr_t from, size_t bytes) {
    uintptr_t first = 0;
    guard_pieces(from, bytes, [&](uintptr_t at, const unsigned char* pattern, size_t n) {
        const auto* zone = reinterpret_cast<const unsigned char*>(at);
        if (first || memcmp(zone, pattern, n) == 0) return;
        first = at + size_t(std::mismatch(zone, zone + n, pattern).first - zone);
    });
    return first;
}

static const char* kind_name(MemoryKind kind) {
    return kind == MemoryKind::Device ? "device" : kind == MemoryKind::Pinned ? "pinned host" : "registered host";
}

CUresult check_guards_of(const AllocationRef& allocation, const std::string& after) {
    if (kGuard == 0 || !allocation->raw) return CUDA_SUCCESS;
    const uintptr_t end = allocation->base + allocation->size;
    const uintptr_t before = damage(allocation->base - kGuard, kGuard),
                    behind = damage(end, tail_guard(allocation->size));
    if (!before && !behind) return CUDA_SUCCESS;
    char where[64];
    if (before) {
        snprintf(where, sizeof where, "%zu bytes before its start", size_t(allocation->base - before));
    } else {
        snprintf(where, sizeof where, "%zu bytes past its end", size_t(behind - end));
    }
    // Said once.
    fill_guard(allocation->base - kGuard, kGuard);
    fill_guard(end, tail_guard(allocation->size));
    return fault(CUDA_ERROR_ILLEGAL_ADDRESS, "write out of bounds: %s allocation %llu of %zu bytes at %#zx, %s; %s",
                 kind_name(allocation->kind), (unsigned long long)allocation->serial, allocation->size,
                 size_t(allocation->base), where, after.c_str());
}

CUresult check_guards(const std::string& after) {
    CUresult result = CUDA_SUCCESS;
    for (const auto& [base, allocation] : live()) {
        const CUresult one = check_guards_of(allocation, after);
        if (result == CUDA_SUCCESS) result = one;
    }
    return result;
}

// ---- making and freeing ----

bool creation_allowed() {
    creations++;
    if (failing_creation == 0 || --failing_creation > 0) return true;
    injected_failures++;
    refuse(CUDA_ERROR_OUT_OF_MEMORY, "creation %llu fails on demand", (unsigned long long)creations);
    return false;
}

static void give_back(const AllocationRef& allocation) {
    free(allocation->raw);
    allocation->raw = nullptr;
}

static void drop_oldest_freed() {
    const AllocationRef oldest = quarantine_order().front();
    quarantine_order().pop_front();
    const auto it = quarantine().find(oldest->base);
    if (it != quarantine().end() && it->second == oldest) quarantine().erase(it);
    quarantined_bytes -= oldest->size;
    give_back(oldest);
}

// Fresh, poisoned memory at an aligned address, or null and why.
static AllocationRef create(MemoryKind kind, size_t size, unsigned flags, bool stream_ordered, CUresult& why) {
    why = CUDA_ERROR_OUT_OF_MEMORY;
    if (!creation_allowed()) return nullptr;
    if (kind == MemoryKind::Device && size > state().memory_limit - std::min(live_bytes, state().memory_limit)) {
        refuse(CUDA_ERROR_OUT_OF_MEMORY, "%zu bytes asked for, %zu of %zu in use", size, live_bytes,
               state().memory_limit);
        return nullptr;
    }
    void* raw = nullptr;
    const size_t whole = EMU_ADDRESS_SANITIZER ? size : kGuard + size + tail_guard(size);
    if (whole < size || posix_memalign(&raw, kAlignment, whole) != 0) {
        refuse(CUDA_ERROR_OUT_OF_MEMORY, "the host has no %zu bytes for an allocation", size);
        return nullptr;
    }
    auto allocation = std::make_shared<Allocation>();
    *allocation = {kind, uintptr_t(raw) + kGuard, size, raw, ++serials, flags, stream_ordered, false};
    memset(reinterpret_cast<void*>(allocation->base), kPoison, size);
    if (kGuard) {
        fill_guard(allocation->base - kGuard, kGuard);
        fill_guard(allocation->base + size, tail_guard(size));
    }
    // The address may have been a quarantined one's, where the sanitizer's allocator decides on reuse.
    quarantine().erase(allocation->base);
    live()[allocation->base] = allocation;
    live_count++;
    if (kind == MemoryKind::Device) {
        live_bytes += size;
        peak_bytes = std::max(peak_bytes, live_bytes);
    }
    why = CUDA_SUCCESS;
    return allocation;
}

// Ends an allocation: its addresses stay recognisable for a while, its content is gone at once.
static CUresult destroy(AllocationRef allocation) {  // by value: the map's own reference goes
    const CUresult result = check_guards_of(allocation, "seen when it was freed, after " + last_launch());
    live().erase(allocation->base);
    allocation->freed = true;
    live_count--;
    if (allocation->kind == MemoryKind::Device) live_bytes -= allocation->size;
    if (allocation->kind == MemoryKind::Registered) return result;
    memset(reinterpret_cast<void*>(allocation->base), kPoison, allocation->size);
    if (EMU_ADDRESS_SANITIZER) give_back(allocation);  // the sanitizer has a quarantine of its own
    quarantine()[allocation->base] = allocation;
    quarantine_order().push_back(allocation);
    quarantined_bytes += allocation->size;
    while (quarantined_bytes > kQuarantineBytes || quarantine_order().size() > kQuarantineCount) drop_oldest_freed();
    return result;
}

void release_all_memory() {
    check_guards("seen when the context ended, after " + last_launch());
    while (!live().empty()) destroy(live().begin()->second);
    while (!quarantine_order().empty()) drop_oldest_freed();
    quarantine().clear();
}

// Before an allocation is refused, pending stream-ordered frees are waited for, as the driver's pool does.
static AllocationRef create_on_device(size_t size, bool stream_ordered, CUresult& why) {
    const size_t unused = state().memory_limit - std::min(live_bytes, state().memory_limit);
    if (size > unused && size <= state().memory_limit) wait_for_everything();
    if (state().fault != CUDA_SUCCESS) {
        why = state().fault;
        return nullptr;
    }
    return create(MemoryKind::Device, size, 0, stream_ordered, why);
}

// ---- stream-ordered allocation ----

// The memory comes to be in stream order: what an unordered operation wrote there earlier is poison afterwards.
struct BirthWork : Work {
    AllocationRef allocation;
    explicit BirthWork(AllocationRef a) : allocation(std::move(a)) {}
    CUgraphNodeType type() const override { return CU_GRAPH_NODE_TYPE_EMPTY; }
    CUresult run() override {
        if (!allocation->freed) memset(reinterpret_cast<void*>(allocation->base), kPoison, allocation->size);
        return CUDA_SUCCESS;
    }
};

struct FreeWork : Work {
    AllocationRef allocation;
    explicit FreeWork(AllocationRef a) : allocation(std::move(a)) {}
    CUgraphNodeType type() const override { return CU_GRAPH_NODE_TYPE_EMPTY; }
    CUresult run() override {
        if (allocation->freed) {
            return fault(CUDA_ERROR_ILLEGAL_ADDRESS, "memory of %zu bytes at %#zx is freed twice", allocation->size,
                         size_t(allocation->base));
        }
        return destroy(allocation);
    }
};

static CUresult allocate_async(CUdeviceptr* address, size_t size, CUstream handle) {
    if (!address || size == 0) return refuse(CUDA_ERROR_INVALID_VALUE, "cuMemAllocAsync of %zu bytes", size);
    CUstream_st* stream = find_stream(handle);
    if (!stream) return refuse(CUDA_ERROR_INVALID_HANDLE, "cuMemAllocAsync: no such stream");
    if (stream->capture) {
        stream->capture->invalidated = true;
        return say(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "allocation inside a graph is not emulated");
    }
    if (const CUresult e = refuse_legacy_during_capture(stream)) return e;
    CUresult why;
    const AllocationRef allocation = create_on_device(size, true, why);
    if (!allocation) return why;
    *address = allocation->base;
    return submit(stream, std::make_shared<BirthWork>(allocation));
}

static CUresult free_device(CUdeviceptr address) {
    if (address == 0) return CUDA_SUCCESS;
    const auto it = live().find(uintptr_t(address));
    if (it == live().end() || it->second->kind != MemoryKind::Device) {
        if (find_freed(uintptr_t(address))) {
            return say(CUDA_ERROR_INVALID_VALUE, "cuMemFree: %#llx was freed before", address);
        }
        return say(CUDA_ERROR_INVALID_VALUE, "cuMemFree: %#llx is not the start of a device allocation", address);
    }
    const AllocationRef allocation = it->second;
    // cuMemFree of cuMemAlloc's memory waits for the card; of stream-ordered memory it does not, by the documentation.
    if (!allocation->stream_ordered) {
        if (const CUresult e = wait_for_everything()) return e;
    }
    return destroy(allocation);
}

}  // namespace emu::driver

using namespace emu::driver;

// ---- device memory ----

EMU_EXPORT CUresult cuMemAlloc_v2(CUdeviceptr* address, size_t size) {
    return api(Needs::Context, [&]() -> CUresult {
        if (const CUresult e = refuse_during_capture()) return e;
        if (!address || size == 0) return refuse(CUDA_ERROR_INVALID_VALUE, "cuMemAlloc of %zu bytes", size);
        CUresult why;
        const AllocationRef allocation = create_on_device(size, false, why);
        if (!allocation) return why;
        *address = allocation->base;
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuMemFree_v2(CUdeviceptr address) {
    return api(Needs::Context, [&]() -> CUresult {
        if (const CUresult e = refuse_during_capture()) return e;
        return free_device(address);
    });
}

EMU_EXPORT CUresult cuMemAllocAsync(CUdeviceptr* address, size_t size, CUstream stream) {
    return api(Needs::Context, [&] { return allocate_async(address, size, stream); });
}

EMU_EXPORT CUresult cuMemFreeAsync(CUdeviceptr address, CUstream handle) {
    return api(Needs::Context, [&]() -> CUresult {
        if (address == 0) return CUDA_SUCCESS;
        CUstream_st* stream = find_stream(handle);
        if (!stream) return refuse(CUDA_ERROR_INVALID_HANDLE, "cuMemFreeAsync: no such stream");
        if (stream->capture) {
            stream->capture->invalidated = true;
            return say(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "freeing inside a graph is not emulated");
        }
        const auto it = live().find(uintptr_t(address));
        if (it == live().end() || it->second->kind != MemoryKind::Device) {
            return say(CUDA_ERROR_INVALID_VALUE, "cuMemFreeAsync: %#llx is not the start of a device allocation",
                       address);
        }
        return submit(stream, std::make_shared<FreeWork>(it->second));
    });
}

EMU_EXPORT CUresult cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
    return api(Needs::Context, [&]() -> CUresult {
        if (free_bytes) *free_bytes = state().memory_limit - std::min(live_bytes, state().memory_limit);
        if (total) *total = state().memory_limit;
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuMemGetAddressRange_v2(CUdeviceptr* base, size_t* size, CUdeviceptr address) {
    return api(Needs::Context, [&]() -> CUresult {
        const AllocationRef allocation = find_allocation(uintptr_t(address));
        if (!allocation) return refuse(CUDA_ERROR_NOT_FOUND, "%#llx is in no allocation", address);
        if (base) *base = allocation->base;
        if (size) *size = allocation->size;
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr address) {
    return api(Needs::Context, [&]() -> CUresult {
        const AllocationRef allocation = find_allocation(uintptr_t(address));
        if (!data || !allocation) return refuse(CUDA_ERROR_INVALID_VALUE, "%#llx is in no allocation", address);
        switch (int(attribute)) {
            case CU_POINTER_ATTRIBUTE_CONTEXT: *static_cast<CUcontext*>(data) = primary_context(); break;
            case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
                *static_cast<unsigned*>(data) =
                    allocation->kind == MemoryKind::Device ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
                break;
            case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *static_cast<CUdeviceptr*>(data) = address; break;
            case CU_POINTER_ATTRIBUTE_HOST_POINTER:
                if (allocation->kind == MemoryKind::Device) return CUDA_ERROR_INVALID_VALUE;
                *static_cast<void**>(data) = reinterpret_cast<void*>(address);
                break;
            case CU_POINTER_ATTRIBUTE_BUFFER_ID: *static_cast<uint64_t*>(data) = allocation->serial; break;
            case CU_POINTER_ATTRIBUTE_IS_MANAGED: *static_cast<unsigned*>(data) = 0; break;
            case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *static_cast<int*>(data) = 0; break;
            case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR: *static_cast<CUdeviceptr*>(data) = allocation->base; break;
            case CU_POINTER_ATTRIBUTE_RANGE_SIZE: *static_cast<size_t*>(data) = allocation->size; break;
            case CU_POINTER_ATTRIBUTE_MAPPED: *static_cast<bool*>(data) = true; break;
            default: return refuse(CUDA_ERROR_NOT_SUPPORTED, "pointer attribute %d is not emulated", int(attribute));
        }
        return CUDA_SUCCESS;
    });
}

// ---- pinned host memory ----

EMU_EXPORT CUresult cuMemHostAlloc(void** address, size_t size, unsigned flags) {
    return api(Needs::Context, [&]() -> CUresult {
        if (const CUresult e = refuse_during_capture()) return e;
        if (!address || size == 0) return refuse(CUDA_ERROR_INVALID_VALUE, "cuMemHostAlloc of %zu bytes", size);
        CUresult why;
        const AllocationRef allocation = create(MemoryKind::Pinned, size, flags, false, why);
        if (!allocation) return why;
        *address = reinterpret_cast<void*>(allocation->base);
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuMemAllocHost_v2(void** address, size_t size) { return cuMemHostAlloc(address, size, 0); }

// Waits for nothing, which the documentation does not promise either: a copy that is still to read or write the buffer
// finds it freed, and that is a fault.
EMU_EXPORT CUresult cuMemFreeHost(void* address) {
    return api(Needs::Context, [&]() -> CUresult {
        if (const CUresult e = refuse_during_capture()) return e;
        const auto it = live().find(uintptr_t(address));
        if (it == live().end() || it->second->kind != MemoryKind::Pinned) {
            return say(CUDA_ERROR_INVALID_VALUE, "cuMemFreeHost: %p is not the start of a pinned allocation", address);
        }
        return destroy(AllocationRef(it->second));
    });
}

EMU_EXPORT CUresult cuMemHostRegister_v2(void* address, size_t size, unsigned flags) {
    return api(Needs::Context, [&]() -> CUresult {
        if (const CUresult e = refuse_during_capture()) return e;
        if (!address || size == 0) return refuse(CUDA_ERROR_INVALID_VALUE, "cuMemHostRegister of %zu bytes", size);
        const uintptr_t base = uintptr_t(address);
        const auto after = live().lower_bound(base);
        if (find_allocation(base) || (after != live().end() && after->first < base + size)) {
            return refuse(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, "%p is registered already", address);
        }
        if (!creation_allowed()) return CUDA_ERROR_OUT_OF_MEMORY;
        auto allocation = std::make_shared<Allocation>();
        *allocation = {MemoryKind::Registered, base, size, nullptr, ++serials, flags, false, false};
        live()[base] = allocation;
        live_count++;
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuMemHostUnregister(void* address) {
    return api(Needs::Context, [&]() -> CUresult {
        if (const CUresult e = refuse_during_capture()) return e;
        const auto it = live().find(uintptr_t(address));
        if (it == live().end() || it->second->kind != MemoryKind::Registered) {
            return refuse(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, "%p is not registered", address);
        }
        return destroy(AllocationRef(it->second));
    });
}

EMU_EXPORT CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr* device, void* host, unsigned flags) {
    return api(Needs::Context, [&]() -> CUresult {
        const AllocationRef allocation = find_allocation(uintptr_t(host));
        if (!device || flags || !allocation || allocation->kind == MemoryKind::Device) {
            return refuse(CUDA_ERROR_INVALID_VALUE, "%p is not pinned", host);
        }
        *device = CUdeviceptr(uintptr_t(host));
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuMemHostGetFlags(unsigned* flags, void* host) {
    return api(Needs::Context, [&]() -> CUresult {
        const AllocationRef allocation = find_allocation(uintptr_t(host));
        if (!flags || !allocation || allocation->kind == MemoryKind::Device) {
            return refuse(CUDA_ERROR_INVALID_VALUE, "%p is not pinned", host);
        }
        *flags = allocation->flags;
        return CUDA_SUCCESS;
    });
}

// ---- pools: one, the default, which keeps nothing ----

static CUmemoryPool default_pool() {
    static char identity;
    return reinterpret_cast<CUmemoryPool>(&identity);
}
static uint64_t release_threshold = 0;

EMU_EXPORT CUresult cuDeviceGetDefaultMemPool(CUmemoryPool* pool, CUdevice device) {
    return api(Needs::Initialised, [&]() -> CUresult {
        if (!pool) return CUDA_ERROR_INVALID_VALUE;
        if (device != 0) return CUDA_ERROR_INVALID_DEVICE;
        *pool = default_pool();
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuDeviceGetMemPool(CUmemoryPool* pool, CUdevice device) {
    return cuDeviceGetDefaultMemPool(pool, device);
}

EMU_EXPORT CUresult cuDeviceSetMemPool(CUdevice device, CUmemoryPool pool) {
    return api(Needs::Initialised, [&]() -> CUresult {
        if (device != 0) return CUDA_ERROR_INVALID_DEVICE;
        return pool == default_pool() ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
    });
}

EMU_EXPORT CUresult cuMemPoolCreate(CUmemoryPool*, const CUmemPoolProps*) {
    return api(Needs::Context,
               [] { return say(CUDA_ERROR_NOT_SUPPORTED, "only the default memory pool is emulated"); });
}

EMU_EXPORT CUresult cuMemPoolDestroy(CUmemoryPool) {
    return api(Needs::Context,
               [] { return refuse(CUDA_ERROR_INVALID_VALUE, "only the default memory pool is emulated"); });
}

EMU_EXPORT CUresult cuMemPoolTrimTo(CUmemoryPool pool, size_t) {
    return api(Needs::Context, [&] { return pool == default_pool() ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; });
}

EMU_EXPORT CUresult cuMemPoolGetAttribute(CUmemoryPool pool, CUmemPool_attribute attribute, void* value) {
    return api(Needs::Context, [&]() -> CUresult {
        if (pool != default_pool() || !value) return CUDA_ERROR_INVALID_VALUE;
        switch (int(attribute)) {
            case 1:  // the three reuse policies
            case 2:
            case 3: *static_cast<int*>(value) = 1; break;
            case CU_MEMPOOL_ATTR_RELEASE_THRESHOLD: *static_cast<uint64_t*>(value) = release_threshold; break;
            case CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT:
            case CU_MEMPOOL_ATTR_USED_MEM_CURRENT: *static_cast<uint64_t*>(value) = live_bytes; break;
            case CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH:
            case CU_MEMPOOL_ATTR_USED_MEM_HIGH: *static_cast<uint64_t*>(value) = peak_bytes; break;
            default: return CUDA_ERROR_INVALID_VALUE;
        }
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuMemPoolSetAttribute(CUmemoryPool pool, CUmemPool_attribute attribute, void* value) {
    return api(Needs::Context, [&]() -> CUresult {
        if (pool != default_pool() || !value) return CUDA_ERROR_INVALID_VALUE;
        if (int(attribute) == CU_MEMPOOL_ATTR_RELEASE_THRESHOLD) release_threshold = *static_cast<uint64_t*>(value);
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuMemAllocFromPoolAsync(CUdeviceptr* address, size_t size, CUmemoryPool pool, CUstream stream) {
    return api(Needs::Context, [&]() -> CUresult {
        if (pool != default_pool()) return CUDA_ERROR_INVALID_VALUE;
        return allocate_async(address, size, stream);
    });
}

// ---- managed memory: not emulated ----

EMU_EXPORT CUresult cuMemAllocManaged(CUdeviceptr*, size_t, unsigned) {
    return api(Needs::Context, [] { return say(CUDA_ERROR_NOT_SUPPORTED, "managed memory is not emulated"); });
}

EMU_EXPORT CUresult cuMemAdvise_v2(CUdeviceptr, size_t, CUmem_advise, CUmemLocation) {
    return api(Needs::Context, [] { return say(CUDA_ERROR_NOT_SUPPORTED, "managed memory is not emulated"); });
}

EMU_EXPORT CUresult cuMemPrefetchAsync_v2(CUdeviceptr, size_t, CUmemLocation, unsigned, CUstream) {
    return api(Needs::Context, [] { return say(CUDA_ERROR_NOT_SUPPORTED, "managed memory is not emulated"); });
}

EMU_EXPORT CUresult cuStreamAttachMemAsync(CUstream, CUdeviceptr, size_t, unsigned) {
    return api(Needs::Context, [] { return say(CUDA_ERROR_NOT_SUPPORTED, "managed memory is not emulated"); });
}

// ---- for tests, found with dlsym ----

// The n-th creation from now (device or pinned memory, stream, event, graph, module) fails once; 0: none.
EMU_EXPORT void emu_fail_allocation(uint64_t nth) {
    std::lock_guard<std::mutex> lock(state().mutex);
    failing_creation = nth;
}

// 0: the default of 16 GiB.
EMU_EXPORT void emu_set_memory_limit(uint64_t bytes) {
    std::lock_guard<std::mutex> lock(state().mutex);
    state().memory_limit = bytes ? bytes : size_t(16) << 30;
}

// Creations so far, failed ones included.
EMU_EXPORT uint64_t emu_allocation_count() {
    std::lock_guard<std::mutex> lock(state().mutex);
    return creations;
}

// How many creations were made to fail.
EMU_EXPORT uint64_t emu_injected_failures() {
    std::lock_guard<std::mutex> lock(state().mutex);
    return injected_failures;
}

// Device and pinned allocations whose free has not happened; a stream-ordered one happens when its stream comes to it.
EMU_EXPORT uint64_t emu_live_allocations() {
    std::lock_guard<std::mutex> lock(state().mutex);
    return live_count;
}

// Bytes of device memory in use now, and at most since the library was loaded.
EMU_EXPORT uint64_t emu_live_bytes() {
    std::lock_guard<std::mutex> lock(state().mutex);
    return live_bytes;
}

EMU_EXPORT uint64_t emu_peak_bytes() {
    std::lock_guard<std::mutex> lock(state().mutex);
    return peak_bytes;
}
