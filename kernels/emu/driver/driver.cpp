// Start, device, context and errors of the look-alike driver, and the functions that only tests call.
#include "driver.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <iterator>

namespace emu::driver {

thread_local bool in_host_function = false;
// The contexts a thread has pushed; the last is current. There is one context, so this tells none from one.
static thread_local std::vector<CUcontext> context_stack;

State& state() {
    static State* only = new State;  // never destroyed: threads may still be here at exit
    return *only;
}

CUcontext primary_context() {
    static char identity;
    return reinterpret_cast<CUcontext>(&identity);
}

// ---- messages ----

static std::string formatted(const char* format, va_list arguments) {
    char text[1024];
    vsnprintf(text, sizeof text, format, arguments);
    return text;
}

CUresult refuse(CUresult code, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    state().last_error = formatted(format, arguments);
    va_end(arguments);
    return code;
}

CUresult say(CUresult code, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    state().last_error = formatted(format, arguments);
    va_end(arguments);
    if (!config.quiet) fprintf(stderr, "[emu] %s\n", state().last_error.c_str());
    return code;
}

CUresult fault(CUresult code, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    const std::string text = formatted(format, arguments);
    va_end(arguments);
    say(code, "%s", text.c_str());
    if (state().fault == CUDA_SUCCESS) state().fault = code;
    return code;
}

CUresult may_call(Needs needs) {
    if (needs == Needs::Nothing) return CUDA_SUCCESS;
    if (!state().initialised) return refuse(CUDA_ERROR_NOT_INITIALIZED, "cuInit was not called");
    if (needs == Needs::Initialised) return CUDA_SUCCESS;
    if (context_stack.empty() || !context_stack.back()) {
        return refuse(CUDA_ERROR_INVALID_CONTEXT, "no context is current on this thread");
    }
    if (!state().context_alive) return refuse(CUDA_ERROR_CONTEXT_IS_DESTROYED, "the primary context was released");
    return state().fault;
}

// ---- the card ----

// What differs between the cards, from the CUDA programming guide's table of compute capabilities and the data sheets.
static const Card kCards[] = {
    {7, 5, 40, 64 << 10, 64 << 10, 1024, 16, 4 << 20, 1590000, 5001000, 256, "emulated sm_75 card"},
    {8, 0, 108, 163 << 10, 164 << 10, 2048, 32, 40 << 20, 1410000, 1215000, 5120, "emulated sm_80 card"},
    {8, 6, 84, 99 << 10, 100 << 10, 1536, 16, 6 << 20, 1740000, 7251000, 384, "emulated sm_86 card"},
    {8, 9, 128, 99 << 10, 100 << 10, 1536, 24, 72 << 20, 2520000, 10501000, 384, "emulated sm_89 card"},
    {9, 0, 132, 227 << 10, 228 << 10, 2048, 32, 50 << 20, 1980000, 2619000, 5120, "emulated sm_90 card"},
};
// The newest: it runs the kernels of every instruction set, so that one run tests them all. The portable ones under the
// tighter limits of an older card, and the choices that ops make there, are a run of their own (tools/emulated sm80).
static const Card* chosen_card = std::end(kCards) - 1;

const Card& card() { return *chosen_card; }

static const size_t kDefaultMemory = size_t(16) << 30;

// Leaves `value` as it is where the variable is not set.
static bool read_number(const char* name, uint64_t& value) {
    const char* text = getenv(name);
    if (!text || !*text) return true;
    char* end;
    const uint64_t number = strtoull(text, &end, 10);
    if (*end || *text == '-') {
        fprintf(stderr, "[emu] %s is '%s'; it has to be a number\n", name, text);
        return false;
    }
    value = number;
    return true;
}

// The driver's own operations complete as the kernels' asynchronous copies do.
static void follow_config() {
    const Timing timings[] = {Timing::Early, Timing::Late, Timing::Mixed};
    set_timing(timings[config.async], config.seed);
}

// Null or "": as it is. False: no such name.
static bool set_schedule(const char* schedule, const char* async, uint64_t seed) {
    const struct {
        const char* name;
        Sched value;
    } schedules[] = {{"in-order", InOrder}, {"reverse", Reverse}, {"random", Random}, {"run-ahead", RunAhead}};
    const struct {
        const char* name;
        Async value;
    } asyncs[] = {{"early", Early}, {"late", Late}, {"mixed", Mixed}};
    bool schedule_known = !schedule || !*schedule, async_known = !async || !*async;
    for (const auto& s : schedules) {
        if (schedule && !strcmp(s.name, schedule)) config.sched = s.value, schedule_known = true;
    }
    for (const auto& a : asyncs) {
        if (async && !strcmp(a.name, async)) config.async = a.value, async_known = true;
    }
    config.seed = seed;
    follow_config();
    return schedule_known && async_known;
}

static bool choose_card() {
    const char* capability = getenv("MEGAFUSE_EMU_CAPABILITY");
    if (!capability || !*capability) return true;
    for (const Card& c : kCards) {
        if (capability == std::to_string(c.major) + "." + std::to_string(c.minor)) {
            chosen_card = &c;
            return true;
        }
    }
    fprintf(stderr, "[emu] MEGAFUSE_EMU_CAPABILITY is '%s'; it is one of 7.5, 8.0, 8.6, 8.9 and 9.0\n", capability);
    return false;
}

extern uint64_t failing_creation;  // memory.cpp
static uint64_t devices = 1, driver_version = 13000;

// Kernels are found by name alone, so one name for two would test one of them.
static bool names_are_unique() {
    std::unordered_map<std::string, const char*> files;
    for (const Kernel* kernel = first_kernel(); kernel; kernel = kernel->next) {
        const auto [other, fresh] = files.emplace(kernel->name, kernel->file);
        if (fresh) continue;
        say(CUDA_ERROR_INVALID_IMAGE, "the kernel %s is in %s and in %s", kernel->name, kernel->file, other->second);
        return false;
    }
    return true;
}

// False, with the reason on stderr: a mistyped setting must not run as another one.
static bool read_environment() {
    uint64_t memory = kDefaultMemory;
    if (!configure_from_environment() || !choose_card() || !read_number("MEGAFUSE_EMU_MEMORY", memory) ||
        !read_number("MEGAFUSE_EMU_FAIL_ALLOC", failing_creation) || !read_number("MEGAFUSE_EMU_DEVICES", devices)) {
        return false;
    }
    state().memory_limit = memory;
    follow_config();
    return true;
}

// For the emulator's own checks of accesses to global memory.
static bool look_up(uintptr_t address, uintptr_t* begin, uintptr_t* end) {
    const AllocationRef allocation = find_allocation(address);
    if (!allocation) return false;
    *begin = allocation->base;
    *end = allocation->base + allocation->size;
    return true;
}

// Damage that no call was left to report must not end in success.
static void check_at_exit() {
    std::unique_lock<std::mutex> lock(state().mutex, std::try_to_lock);
    if (!lock || state().fault != CUDA_SUCCESS) return;
    if (check_guards("seen at exit, after " + last_launch()) != CUDA_SUCCESS) _Exit(1);
}

// ---- the context ----

// Ends the context: what it owns is gone, pending work is dropped, a fault is forgotten.
static void destroy_context_contents() {
    forget_operations();
    release_all_graphs();
    release_all_streams();
    release_all_modules();
    release_all_memory();
    state().fault = CUDA_SUCCESS;
}

static CUresult check_device(CUdevice device) {
    return device == 0 ? CUDA_SUCCESS : refuse(CUDA_ERROR_INVALID_DEVICE, "there is one device, not number %d", device);
}

}  // namespace emu::driver

using namespace emu::driver;

// ---- start ----

EMU_EXPORT CUresult cuInit(unsigned flags) {
    return api(Needs::Nothing, [&]() -> CUresult {
        if (flags) return refuse(CUDA_ERROR_INVALID_VALUE, "cuInit takes no flags");
        if (state().initialised) return CUDA_SUCCESS;
        if (!read_environment()) return refuse(CUDA_ERROR_INVALID_VALUE, "a MEGAFUSE_EMU_ variable has no such value");
        if (!names_are_unique()) return CUDA_ERROR_INVALID_IMAGE;
        if (devices == 0) return refuse(CUDA_ERROR_NO_DEVICE, "MEGAFUSE_EMU_DEVICES=0");
        emu::set_allocation_lookup(look_up);
        atexit(check_at_exit);
        state().initialised = true;
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuDriverGetVersion(int* version) {
    if (!version || !read_number("MEGAFUSE_EMU_DRIVER_VERSION", driver_version)) return CUDA_ERROR_INVALID_VALUE;
    *version = int(driver_version);
    return CUDA_SUCCESS;
}

EMU_EXPORT CUresult cuGetErrorName(CUresult error, const char** name) {
    if (!name) return CUDA_ERROR_INVALID_VALUE;
    switch (int(error)) {
#define EMU_NAME(code, number, text) \
    case number: *name = #code; return CUDA_SUCCESS;
        EMU_CUDA_ERRORS(EMU_NAME)
#undef EMU_NAME
    }
    *name = nullptr;
    return CUDA_ERROR_INVALID_VALUE;
}

EMU_EXPORT CUresult cuGetErrorString(CUresult error, const char** sentence) {
    if (!sentence) return CUDA_ERROR_INVALID_VALUE;
    switch (int(error)) {
#define EMU_SENTENCE(code, number, text) \
    case number: *sentence = text; return CUDA_SUCCESS;
        EMU_CUDA_ERRORS(EMU_SENTENCE)
#undef EMU_SENTENCE
    }
    *sentence = nullptr;
    return CUDA_ERROR_INVALID_VALUE;
}

// cudarc looks its symbols up with dlsym; other callers of the driver ask here. Versioned names first, newest first.
EMU_EXPORT CUresult cuGetProcAddress_v2(const char* symbol, void** function, int, cuuint64_t,
                                        CUdriverProcAddressQueryResult* status) {
    if (!symbol || !function) return CUDA_ERROR_INVALID_VALUE;
    Dl_info self;
    void* library =
        dladdr(reinterpret_cast<void*>(&cuInit), &self) ? dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD) : nullptr;
    *function = nullptr;
    for (const char* version : {"_v4", "_v3", "_v2", ""}) {
        *function = dlsym(library ? library : RTLD_DEFAULT, (std::string(symbol) + version).c_str());
        if (*function) break;
    }
    if (library) dlclose(library);
    if (status) {
        *status = CUdriverProcAddressQueryResult(*function ? CU_GET_PROC_ADDRESS_SUCCESS
                                                           : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND);
    }
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

// ---- device ----

EMU_EXPORT CUresult cuDeviceGetCount(int* count) {
    return api(Needs::Initialised, [&]() -> CUresult {
        if (!count) return CUDA_ERROR_INVALID_VALUE;
        *count = 1;
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    return api(Needs::Initialised, [&]() -> CUresult {
        if (!device) return CUDA_ERROR_INVALID_VALUE;
        if (const CUresult e = check_device(ordinal)) return e;
        *device = 0;
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuDeviceGetName(char* name, int length, CUdevice device) {
    return api(Needs::Initialised, [&]() -> CUresult {
        if (!name || length <= 0) return CUDA_ERROR_INVALID_VALUE;
        if (const CUresult e = check_device(device)) return e;
        snprintf(name, size_t(length), "%s", card().name);
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device) {
    return api(Needs::Initialised, [&]() -> CUresult {
        if (!uuid) return CUDA_ERROR_INVALID_VALUE;
        if (const CUresult e = check_device(device)) return e;
        memcpy(uuid->bytes, "emulated\0\0\0\0\0\0\0", 16);
        uuid->bytes[15] = char(card().major);
        return CUDA_SUCCESS;
    });
}

#ifndef EMU_CUDA_H  // the real header has renamed it away
EMU_EXPORT CUresult cuDeviceGetUuid(CUuuid* uuid, CUdevice device) { return cuDeviceGetUuid_v2(uuid, device); }
#endif

EMU_EXPORT CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice device) {
    return api(Needs::Initialised, [&]() -> CUresult {
        if (!bytes) return CUDA_ERROR_INVALID_VALUE;
        if (const CUresult e = check_device(device)) return e;
        *bytes = state().memory_limit;
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuDeviceGetPCIBusId(char* text, int length, CUdevice device) {
    return api(Needs::Initialised, [&]() -> CUresult {
        if (!text || length < 13) return CUDA_ERROR_INVALID_VALUE;
        if (const CUresult e = check_device(device)) return e;
        snprintf(text, size_t(length), "0000:00:00.0");
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    return api(Needs::Initialised, [&]() -> CUresult {
        if (!value) return CUDA_ERROR_INVALID_VALUE;
        if (const CUresult e = check_device(device)) return e;
        const Card& c = card();
        switch (attribute) {
            case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
            case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X: *value = 1024; break;
            case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: *value = 1024; break;
            case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: *value = 64; break;
            case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: *value = 0x7fffffff; break;
            case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y: *value = 65535; break;
            case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: *value = 65535; break;
            case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = 48 * 1024; break;
            case CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY: *value = 64 * 1024; break;
            case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
            case CU_DEVICE_ATTRIBUTE_MAX_PITCH: *value = 0x7fffffff; break;
            case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
            case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: *value = c.clock_khz; break;
            case CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT: *value = 512; break;
            case CU_DEVICE_ATTRIBUTE_GPU_OVERLAP: *value = 1; break;
            case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = c.multiprocessors; break;
            case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY: *value = 1; break;
            case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS: *value = 1; break;
            case CU_DEVICE_ATTRIBUTE_ECC_ENABLED: *value = 1; break;
            case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *value = c.memory_khz; break;
            case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = c.bus_bits; break;
            case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: *value = c.l2_bytes; break;
            case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: *value = c.threads_per_multiprocessor; break;
            case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT: *value = 3; break;
            case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING: *value = 1; break;
            case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = c.major; break;
            case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = c.minor; break;
            case CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED: *value = 1; break;
            case CU_DEVICE_ATTRIBUTE_GLOBAL_L1_CACHE_SUPPORTED: *value = 1; break;
            case CU_DEVICE_ATTRIBUTE_LOCAL_L1_CACHE_SUPPORTED: *value = 1; break;
            case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = c.shared_per_multiprocessor; break;
            case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: *value = 65536; break;
            case CU_DEVICE_ATTRIBUTE_SINGLE_TO_DOUBLE_PRECISION_PERF_RATIO: *value = 2; break;
            case CU_DEVICE_ATTRIBUTE_COMPUTE_PREEMPTION_SUPPORTED: *value = 1; break;
            case CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM: *value = 1; break;
            case CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH: *value = 0; break;
            case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = c.shared_opt_in; break;
            case CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED: *value = 1; break;
            case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR: *value = c.blocks_per_multiprocessor; break;
            case CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK: *value = 1024; break;
            case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED: *value = 1; break;
            case CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH: *value = c.major >= 9; break;
            case CU_DEVICE_ATTRIBUTE_TENSOR_MAP_ACCESS_SUPPORTED: *value = c.major >= 9; break;
            default:
                // What the card cannot do, or nobody here asks: zero, as for an absent feature.
                if (attribute < 1 || attribute > 200) return CUDA_ERROR_INVALID_VALUE;
                *value = 0;
        }
        return CUDA_SUCCESS;
    });
}

// ---- primary context ----

EMU_EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    return api(Needs::Initialised, [&]() -> CUresult {
        if (!context) return CUDA_ERROR_INVALID_VALUE;
        if (const CUresult e = check_device(device)) return e;
        state().retained++;
        state().context_alive = true;
        *context = primary_context();
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    return api(Needs::Initialised, [&]() -> CUresult {
        if (const CUresult e = check_device(device)) return e;
        if (state().retained == 0) return refuse(CUDA_ERROR_INVALID_CONTEXT, "the primary context is not retained");
        if (--state().retained > 0) return CUDA_SUCCESS;
        CUresult damage = CUDA_SUCCESS;
        if (state().fault == CUDA_SUCCESS) damage = wait_for_everything();
        destroy_context_contents();
        state().context_alive = false;
        return damage;
    });
}

// Real driver: whoever still holds the context has to retain it again. Here it is usable at once, empty.
EMU_EXPORT CUresult cuDevicePrimaryCtxReset_v2(CUdevice device) {
    return api(Needs::Initialised, [&]() -> CUresult {
        if (const CUresult e = check_device(device)) return e;
        destroy_context_contents();
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
    return api(Needs::Initialised, [&]() -> CUresult {
        if (const CUresult e = check_device(device)) return e;
        if (flags) *flags = state().context_flags;
        if (active) *active = state().context_alive;
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuDevicePrimaryCtxSetFlags_v2(CUdevice device, unsigned flags) {
    return api(Needs::Initialised, [&]() -> CUresult {
        if (const CUresult e = check_device(device)) return e;
        state().context_flags = flags;
        return CUDA_SUCCESS;
    });
}

// ---- the current context of a thread ----

static CUresult check_context(CUcontext context) {
    if (context && context != primary_context()) return refuse(CUDA_ERROR_INVALID_CONTEXT, "no such context");
    if (context && !state().context_alive) return refuse(CUDA_ERROR_CONTEXT_IS_DESTROYED, "the context was released");
    return CUDA_SUCCESS;
}

EMU_EXPORT CUresult cuCtxSetCurrent(CUcontext context) {
    return api(Needs::Initialised, [&]() -> CUresult {
        if (const CUresult e = check_context(context)) return e;
        if (context_stack.empty()) context_stack.push_back(context);
        context_stack.back() = context;
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuCtxGetCurrent(CUcontext* context) {
    return api(Needs::Initialised, [&]() -> CUresult {
        if (!context) return CUDA_ERROR_INVALID_VALUE;
        *context = context_stack.empty() ? nullptr : context_stack.back();
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuCtxPushCurrent_v2(CUcontext context) {
    return api(Needs::Initialised, [&]() -> CUresult {
        if (!context) return CUDA_ERROR_INVALID_CONTEXT;
        if (const CUresult e = check_context(context)) return e;
        context_stack.push_back(context);
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuCtxPopCurrent_v2(CUcontext* context) {
    return api(Needs::Initialised, [&]() -> CUresult {
        if (context_stack.empty()) return CUDA_ERROR_INVALID_CONTEXT;
        if (context) *context = context_stack.back();
        context_stack.pop_back();
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuCtxGetDevice(CUdevice* device) {
    return api(Needs::Context, [&]() -> CUresult {
        if (!device) return CUDA_ERROR_INVALID_VALUE;
        *device = 0;
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuCtxSynchronize() {
    return api(Needs::Context, [&]() -> CUresult {
        if (const CUresult e = refuse_while_capturing()) return e;
        return wait_for_everything();
    });
}

EMU_EXPORT CUresult cuCtxSetFlags(unsigned flags) {
    return api(Needs::Context, [&]() -> CUresult {
        state().context_flags = flags;
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuCtxGetFlags(unsigned* flags) {
    return api(Needs::Context, [&]() -> CUresult {
        if (!flags) return CUDA_ERROR_INVALID_VALUE;
        *flags = state().context_flags;
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuCtxGetApiVersion(CUcontext context, unsigned* version) {
    return api(Needs::Initialised, [&]() -> CUresult {
        if (!version) return CUDA_ERROR_INVALID_VALUE;
        if (const CUresult e = check_context(context)) return e;
        *version = 13000;
        return CUDA_SUCCESS;
    });
}

// Limits are remembered; none changes what the emulator does.
static size_t limits[8] = {1024, 1 << 20, 8 << 20, 0, 2048, 128, 0, 0};

EMU_EXPORT CUresult cuCtxGetLimit(size_t* value, CUlimit limit) {
    return api(Needs::Context, [&]() -> CUresult {
        if (!value) return CUDA_ERROR_INVALID_VALUE;
        if (int(limit) < 0 || int(limit) >= 8) return CUDA_ERROR_UNSUPPORTED_LIMIT;
        *value = limits[limit];
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuCtxSetLimit(CUlimit limit, size_t value) {
    return api(Needs::Context, [&]() -> CUresult {
        if (int(limit) < 0 || int(limit) >= 8) return CUDA_ERROR_UNSUPPORTED_LIMIT;
        limits[limit] = value;
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuCtxGetCacheConfig(CUfunc_cache* config) {
    return api(Needs::Context, [&]() -> CUresult {
        if (!config) return CUDA_ERROR_INVALID_VALUE;
        *config = CUfunc_cache(0);
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuCtxSetCacheConfig(CUfunc_cache) {
    return api(Needs::Context, [] { return CUDA_SUCCESS; });
}

EMU_EXPORT CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    return api(Needs::Context, [&]() -> CUresult {
        if (least) *least = 0;
        if (greatest) *greatest = -5;
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuProfilerStart() {
    return api(Needs::Context, [] { return CUDA_SUCCESS; });
}

EMU_EXPORT CUresult cuProfilerStop() {
    return api(Needs::Context, [] { return CUDA_SUCCESS; });
}

// ---- areas that the product has no use for: a clear refusal instead of cudarc's panic at a missing symbol ----

EMU_EXPORT CUresult cuCtxCreate_v3(CUcontext*, CUexecAffinityParam*, int, unsigned, CUdevice) {
    return api(Needs::Initialised,
               [] { return say(CUDA_ERROR_NOT_SUPPORTED, "only the primary context is emulated"); });
}

EMU_EXPORT CUresult cuCtxCreate_v4(CUcontext*, CUctxCreateParams*, unsigned, CUdevice) {
    return api(Needs::Initialised,
               [] { return say(CUDA_ERROR_NOT_SUPPORTED, "only the primary context is emulated"); });
}

EMU_EXPORT CUresult cuCtxDestroy_v2(CUcontext) {
    return api(Needs::Initialised,
               [] { return refuse(CUDA_ERROR_INVALID_CONTEXT, "only the primary context is emulated"); });
}

EMU_EXPORT CUresult cuImportExternalMemory(CUexternalMemory*, const CUDA_EXTERNAL_MEMORY_HANDLE_DESC*) {
    return api(Needs::Context, [] { return say(CUDA_ERROR_NOT_SUPPORTED, "external memory is not emulated"); });
}

EMU_EXPORT CUresult cuExternalMemoryGetMappedBuffer(CUdeviceptr*, CUexternalMemory,
                                                    const CUDA_EXTERNAL_MEMORY_BUFFER_DESC*) {
    return api(Needs::Context, [] { return say(CUDA_ERROR_NOT_SUPPORTED, "external memory is not emulated"); });
}

EMU_EXPORT CUresult cuDestroyExternalMemory(CUexternalMemory) {
    return api(Needs::Context, [] { return say(CUDA_ERROR_NOT_SUPPORTED, "external memory is not emulated"); });
}

// ---- for tests, found with dlsym ----

// Schedules of a block's warps: in-order, reverse, random, run-ahead. Completion of asynchronous work: early, late,
// mixed. Null leaves one as it is. Returns 0, or 1 when a name is unknown (the other settings are made).
EMU_EXPORT int emu_set_schedule(const char* schedule, const char* async, uint64_t seed) {
    std::lock_guard<std::mutex> lock(state().mutex);
    return set_schedule(schedule, async, seed) ? 0 : 1;
}

// The text of the last refusal or fault, cut to `length`; returns its full length.
EMU_EXPORT int emu_last_error(char* text, int length) {
    std::lock_guard<std::mutex> lock(state().mutex);
    if (text && length > 0) snprintf(text, size_t(length), "%s", state().last_error.c_str());
    return int(state().last_error.size());
}

// Kernels that ran since the library was loaded, those of replayed graphs included.
EMU_EXPORT uint64_t emu_launch_count() {
    std::lock_guard<std::mutex> lock(state().mutex);
    return state().launches;
}

// Calls that launch one kernel, but for those that were recorded; and calls that launch a graph.
EMU_EXPORT uint64_t emu_single_launch_count() {
    std::lock_guard<std::mutex> lock(state().mutex);
    return state().single_launches;
}
EMU_EXPORT uint64_t emu_graph_launch_count() {
    std::lock_guard<std::mutex> lock(state().mutex);
    return state().graph_launches;
}
