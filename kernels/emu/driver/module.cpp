// Modules, functions and launches. A module's image is not looked at: the kernels are the ones this library was built
// from. Those of one architecture's folder have no code for other cards, which here shows when the kernel is asked for. What the image would say of a kernel's resources comes from resources.tsv beside the library, where the build
// made one, a line a kernel and architecture with a tab between the fields:
//   arch kernel registers static_shared_bytes spill_store_bytes spill_load_bytes stack_bytes
#include "driver.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>

namespace emu::driver {

// ---- what the compiler said of a kernel ----

struct Resources {
    bool known = false;
    int registers = 32, static_shared = 0, local_bytes = 0;
};

static std::string directory_of_this_library() {
    Dl_info self;
    if (!dladdr(reinterpret_cast<void*>(&directory_of_this_library), &self) || !self.dli_fname) return ".";
    const std::string path = self.dli_fname;
    const size_t slash = path.rfind('/');
    return slash == std::string::npos ? "." : path.substr(0, slash);
}

// "sm_90a", "90a", "compute_80" -> 90, 90, 80.
static int architecture(const std::string& text) {
    const size_t digit = text.find_first_of("0123456789");
    return digit == std::string::npos ? -1 : atoi(text.c_str() + digit);
}

// By kernel: the line of the newest machine code that this card runs, which is of its own major version.
static const std::unordered_map<std::string, Resources>& resource_table() {
    static const auto* table = [] {
        auto* all = new std::unordered_map<std::string, Resources>;
        std::unordered_map<std::string, int> chosen;
        FILE* file = fopen((directory_of_this_library() + "/resources.tsv").c_str(), "r");
        if (!file) return all;
        const int capability = card().major * 10 + card().minor;
        char line[1024];
        while (fgets(line, sizeof line, file)) {
            char arch[64], kernel[512];
            int registers, shared, spill_stores, spill_loads, stack;
            const int fields = sscanf(line, "%63[^\t]\t%511[^\t]\t%d\t%d\t%d\t%d\t%d", arch, kernel, &registers,
                                      &shared, &spill_stores, &spill_loads, &stack);
            const int target = architecture(arch);
            if (fields < 7 || target < 0 || target > capability || target / 10 != card().major) continue;
            if (chosen.count(kernel) && chosen[kernel] > target) continue;
            chosen[kernel] = target;
            (*all)[kernel] = {true, registers, shared, stack};
        }
        fclose(file);
        return all;
    }();
    return *table;
}

// Whether this card has the instructions of a kernel; folders below kernels/ as build/sources.rs lists them.
static bool has_instructions_of(const Kernel& kernel) {
    return !strstr(kernel.file, "kernels/sm90/") || (card().major == 9 && card().minor == 0);
}

static Resources resources_of(const char* kernel) {
    const auto it = resource_table().find(kernel);
    return it == resource_table().end() ? Resources() : it->second;
}

}  // namespace emu::driver

struct CUfunc_st {
    CUmod_st* module;
    const emu::Kernel* kernel;
    emu::driver::Resources resources;
    int max_dynamic_shared;  // what cuFuncSetAttribute allowed, or 48 KiB less the static part

    size_t parameter_bytes() const {
        if (kernel->param_count == 0) return 0;
        const emu::Param& last = kernel->params[kernel->param_count - 1];
        return last.offset + last.size;
    }
};

struct CUmod_st {
    std::map<std::string, std::unique_ptr<CUfunc_st>> functions;
};

namespace emu::driver {

static std::unordered_map<CUmod_st*, std::unique_ptr<CUmod_st>>& modules() {
    static auto* only = new std::unordered_map<CUmod_st*, std::unique_ptr<CUmod_st>>;
    return *only;
}
static std::unordered_set<CUfunc_st*>& functions() {
    static auto* only = new std::unordered_set<CUfunc_st*>;
    return *only;
}

void release_all_modules() {
    functions().clear();
    modules().clear();
}

static std::string last_launch_text = "no launch";
const std::string& last_launch() { return last_launch_text; }

static CUresult load_module(CUmodule* handle, const void* image) {
    if (!handle || !image) return refuse(CUDA_ERROR_INVALID_VALUE, "cuModuleLoadData without an image");
    if (const CUresult e = refuse_during_capture()) return e;
    if (!creation_allowed()) return CUDA_ERROR_OUT_OF_MEMORY;
    auto module = std::make_unique<CUmod_st>();
    *handle = module.get();
    modules()[module.get()] = std::move(module);
    return CUDA_SUCCESS;
}

static CUresult unknown_function(const char* call) {
    return refuse(CUDA_ERROR_INVALID_HANDLE, "%s: no such function", call);
}
static bool known(CUfunction function) { return functions().count(function) != 0; }

// ---- a launch ----

// The arguments are copied when the call is made, so the caller may reuse its own.
struct LaunchWork : Work {
    CUfunction function;  // may be unloaded before this runs; only handed out again, never followed
    const Kernel* kernel;
    dim3 grid, block;
    unsigned shared;
    LaunchAttributes attributes;
    // As a card's constant bank holds them: a parameter may want an alignment of 64.
    struct alignas(64) Line {
        unsigned char bytes[64];
    };
    std::vector<Line> lines;

    CUgraphNodeType type() const override { return CU_GRAPH_NODE_TYPE_KERNEL; }
    bool dependent() const override { return attributes.dependent; }
    unsigned char* arguments() { return reinterpret_cast<unsigned char*>(lines.data()); }
    std::vector<void*> pointers() {
        std::vector<void*> all;
        for (unsigned i = 0; i < kernel->param_count; i++) all.push_back(arguments() + kernel->params[i].offset);
        return all;
    }
    CUresult check_addresses(std::vector<AllocationRef>& used);
    CUresult run() override;
};

// Every address among the arguments has to be the card's or pinned when the kernel runs. A parameter of pointer type is
// one; in other parameters, such as a struct by value, only an address in freed memory is recognised.
CUresult LaunchWork::check_addresses(std::vector<AllocationRef>& used) {
    for (unsigned i = 0; i < kernel->param_count; i++) {
        const Param& param = kernel->params[i];
        for (uint32_t at = 0; at + 8 <= param.size; at += 8) {
            uintptr_t word;
            memcpy(&word, arguments() + param.offset + at, sizeof word);
            if (word == 0) continue;
            if (const AllocationRef allocation = find_allocation_or_end(word)) {
                used.push_back(allocation);
            } else if (const AllocationRef freed = find_freed(word)) {
                return fault(CUDA_ERROR_ILLEGAL_ADDRESS,
                             "%s: argument %u is %#zx, in allocation %llu of %zu bytes, which was freed before it ran",
                             last_launch_text.c_str(), i, size_t(word), (unsigned long long)freed->serial, freed->size);
            } else if (param.is_pointer) {
                return fault(CUDA_ERROR_ILLEGAL_ADDRESS, "%s: argument %u is %#zx, which is no address of the card",
                             last_launch_text.c_str(), i, size_t(word));
            }
        }
    }
    return CUDA_SUCCESS;
}

CUresult LaunchWork::run() {
    char text[512];
    snprintf(text, sizeof text, "launch %llu, %s", (unsigned long long)++state().launches, kernel->name);
    last_launch_text = text;
    std::vector<AllocationRef> used;
    if (const CUresult e = check_addresses(used)) return e;
    std::vector<void*> params = pointers();
    params.push_back(nullptr);
    const int errors = emu::launch(kernel->fn, grid, block, shared, params.data(), attributes);
    if (errors) {
        return fault(CUDA_ERROR_LAUNCH_FAILED,
                     "%s: failed, grid %ux%ux%u, block %ux%ux%u, %u bytes of dynamic shared memory: %s", text, grid.x,
                     grid.y, grid.z, block.x, block.y, block.z, shared, emu::last_error());
    }
    for (const AllocationRef& allocation : used) {
        if (const CUresult e = check_guards_of(allocation, std::string("seen after ") + text)) return e;
    }
    return CUDA_SUCCESS;
}

// Registers are given to a warp in units of 256, to a block in whole warps (rounded to 4 of them).
static uint64_t registers_of_block(int registers, uint64_t threads) {
    const uint64_t warps = ((threads + 31) / 32 + 3) / 4 * 4;
    const uint64_t per_warp = (uint64_t(registers) * 32 + 255) / 256 * 256;
    return warps * per_warp;
}

static CUresult check_launch(const CUfunc_st& f, dim3 grid, dim3 block, unsigned shared) {
    const char* name = f.kernel->name;
    if (!grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z) {
        return say(CUDA_ERROR_INVALID_VALUE, "%s: an empty grid %ux%ux%u or block %ux%ux%u", name, grid.x, grid.y,
                   grid.z, block.x, block.y, block.z);
    }
    if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
        return say(CUDA_ERROR_INVALID_VALUE, "%s: a grid of %ux%ux%u; 2147483647x65535x65535 at most", name, grid.x,
                   grid.y, grid.z);
    }
    const uint64_t threads = uint64_t(block.x) * block.y * block.z;
    if (block.x > 1024 || block.y > 1024 || block.z > 64 || threads > 1024) {
        return say(CUDA_ERROR_INVALID_VALUE, "%s: a block of %ux%ux%u; 1024x1024x64 and 1024 threads at most", name,
                   block.x, block.y, block.z);
    }
    if (threads > f.kernel->max_threads) {
        return say(CUDA_ERROR_INVALID_VALUE, "%s: a block of %llu threads; its launch bound is %u", name,
                   (unsigned long long)threads, f.kernel->max_threads);
    }
    if (int64_t(shared) > f.max_dynamic_shared) {
        return say(CUDA_ERROR_INVALID_VALUE,
                   "%s: %u bytes of dynamic shared memory; %d allowed (cuFuncSetAttribute raises it up to %d)", name,
                   shared, f.max_dynamic_shared, card().shared_opt_in - f.resources.static_shared);
    }
    const uint64_t registers = registers_of_block(f.resources.registers, threads);
    if (f.resources.known && registers > 65536) {
        return say(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "%s: %d registers for each of %llu threads make %llu of 65536",
                   name, f.resources.registers, (unsigned long long)threads, (unsigned long long)registers);
    }
    return CUDA_SUCCESS;
}

// Copies arguments given as pointers, one for each, or as one packed buffer in `extra`.
static CUresult copy_arguments(const CUfunc_st& f, void** params, void** extra, LaunchWork& work) {
    const size_t wanted = f.parameter_bytes();
    work.lines.assign((wanted + sizeof(LaunchWork::Line) - 1) / sizeof(LaunchWork::Line), {});
    if (f.kernel->param_count == 0) return CUDA_SUCCESS;
    if (params && extra) return refuse(CUDA_ERROR_INVALID_VALUE, "%s: both kernelParams and extra", f.kernel->name);
    if (params) {
        for (unsigned i = 0; i < f.kernel->param_count; i++) {
            if (!params[i]) return say(CUDA_ERROR_INVALID_VALUE, "%s: argument %u is missing", f.kernel->name, i);
            memcpy(work.arguments() + f.kernel->params[i].offset, params[i], f.kernel->params[i].size);
        }
        return CUDA_SUCCESS;
    }
    const void* buffer = nullptr;
    size_t bytes = 0;
    for (; extra && extra[0] != CU_LAUNCH_PARAM_END; extra += 2) {
        if (extra[0] == CU_LAUNCH_PARAM_BUFFER_POINTER) buffer = extra[1];
        if (extra[0] == CU_LAUNCH_PARAM_BUFFER_SIZE) bytes = *static_cast<size_t*>(extra[1]);
    }
    if (!buffer || bytes < wanted) {
        return say(CUDA_ERROR_INVALID_VALUE, "%s: %zu bytes of arguments for %zu", f.kernel->name, bytes, wanted);
    }
    memcpy(work.arguments(), buffer, wanted);
    return CUDA_SUCCESS;
}

// Blocks that a cluster of any card can have; more needs an attribute of the function, which is not emulated.
static const uint32_t kLargestCluster = 8;

static CUresult check_cluster(const char* name, dim3 grid, const uint32_t (&cluster)[3]) {
    const auto& [x, y, z] = cluster;
    if (x == 1 && y == 1 && z == 1) return CUDA_SUCCESS;
    if (card().major < 9) return say(CUDA_ERROR_NOT_SUPPORTED, "%s: an %s has no clusters", name, card().name);
    if (x == 0 || y == 0 || z == 0 || uint64_t(x) * y > kLargestCluster || uint64_t(x) * y * z > kLargestCluster) {
        return say(CUDA_ERROR_INVALID_CLUSTER_SIZE, "%s: a cluster of %ux%ux%u blocks; 1 to %u", name, x, y, z,
                   kLargestCluster);
    }
    if (grid.x % x || grid.y % y || grid.z % z) {
        return say(CUDA_ERROR_INVALID_CLUSTER_SIZE, "%s: a grid of %ux%ux%u blocks is not whole clusters of %ux%ux%u", name,
                   grid.x, grid.y, grid.z, x, y, z);
    }
    return CUDA_SUCCESS;
}

static CUresult read_attributes(const char* name, const CUlaunchConfig& config, LaunchAttributes& attributes) {
    if (config.numAttrs && !config.attrs) return say(CUDA_ERROR_INVALID_VALUE, "%s: attrs is missing", name);
    for (unsigned i = 0; i < config.numAttrs; i++) {
        const CUlaunchAttributeValue& value = config.attrs[i].value;
        const int id = int(config.attrs[i].id);
        switch (id) {
            case CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION:
                attributes.cluster[0] = value.clusterDim.x;
                attributes.cluster[1] = value.clusterDim.y;
                attributes.cluster[2] = value.clusterDim.z;
                break;
            case CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION:
                // An older card does not overlap launches.
                attributes.dependent = value.programmaticStreamSerializationAllowed && card().major >= 9;
                break;
            case CU_LAUNCH_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT:
                if (value.sharedMemCarveout > 100) {
                    return say(CUDA_ERROR_INVALID_VALUE, "%s: a carve-out of %u percent", name, value.sharedMemCarveout);
                }
                break;
            case CU_LAUNCH_ATTRIBUTE_COOPERATIVE:
                if (value.cooperative) {
                    return say(CUDA_ERROR_NOT_SUPPORTED, "%s: cooperative launches are not emulated", name);
                }
                break;
            // Hints, which change no result.
            case CU_LAUNCH_ATTRIBUTE_IGNORE:
            case CU_LAUNCH_ATTRIBUTE_ACCESS_POLICY_WINDOW:
            case CU_LAUNCH_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE:
            case CU_LAUNCH_ATTRIBUTE_PRIORITY:
            case CU_LAUNCH_ATTRIBUTE_MEM_SYNC_DOMAIN_MAP:
            case CU_LAUNCH_ATTRIBUTE_MEM_SYNC_DOMAIN:
            case CU_LAUNCH_ATTRIBUTE_NVLINK_UTIL_CENTRIC_SCHEDULING: break;
            case CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_EVENT:
            case CU_LAUNCH_ATTRIBUTE_PREFERRED_CLUSTER_DIMENSION:
            case CU_LAUNCH_ATTRIBUTE_LAUNCH_COMPLETION_EVENT:
            case CU_LAUNCH_ATTRIBUTE_DEVICE_UPDATABLE_KERNEL_NODE:
                return say(CUDA_ERROR_NOT_SUPPORTED, "%s: launch attribute %d is not emulated", name, id);
            case CU_LAUNCH_ATTRIBUTE_SYNCHRONIZATION_POLICY:
                return say(CUDA_ERROR_INVALID_VALUE, "%s: launch attribute %d is one of streams", name, id);
            default: return say(CUDA_ERROR_INVALID_VALUE, "%s: there is no launch attribute %d", name, id);
        }
    }
    return check_cluster(name, dim3(config.gridDimX, config.gridDimY, config.gridDimZ), attributes.cluster);
}

// A launch as work, with everything checked that the driver checks when the call is made.
static CUresult prepare(CUfunction function, dim3 grid, dim3 block, unsigned shared, void** params, void** extra,
                        std::shared_ptr<LaunchWork>& work) {
    if (!known(function)) return unknown_function("cuLaunchKernel");
    if (const CUresult e = check_launch(*function, grid, block, shared)) return e;
    work = std::make_shared<LaunchWork>();
    if (const CUresult e = copy_arguments(*function, params, extra, *work)) return e;
    work->function = function;
    work->kernel = function->kernel;
    work->grid = grid;
    work->block = block;
    work->shared = shared;
    return CUDA_SUCCESS;
}

CUresult prepare_launch(const CUDA_KERNEL_NODE_PARAMS& p, WorkRef& work) {
    std::shared_ptr<LaunchWork> launch;
    const dim3 grid(p.gridDimX, p.gridDimY, p.gridDimZ);
    if (const CUresult e = prepare(p.func, grid, dim3(p.blockDimX, p.blockDimY, p.blockDimZ), p.sharedMemBytes,
                                   p.kernelParams, p.extra, launch)) {
        return e;
    }
    // The parameters of a node say nothing of its attributes: they stay.
    if (work) launch->attributes = static_cast<LaunchWork&>(*work).attributes;
    if (const CUresult e = check_cluster(launch->kernel->name, grid, launch->attributes.cluster)) return e;
    work = launch;
    return CUDA_SUCCESS;
}

void describe_launch(Work& work, CUDA_KERNEL_NODE_PARAMS& p, std::vector<void*>& pointers) {
    auto& launch = static_cast<LaunchWork&>(work);
    pointers = launch.pointers();
    p = {};
    p.func = launch.function;
    p.gridDimX = launch.grid.x, p.gridDimY = launch.grid.y, p.gridDimZ = launch.grid.z;
    p.blockDimX = launch.block.x, p.blockDimY = launch.block.y, p.blockDimZ = launch.block.z;
    p.sharedMemBytes = launch.shared;
    p.kernelParams = pointers.data();
    p.ctx = primary_context();
}

static CUresult launch(CUfunction function, const CUlaunchConfig& config, void** params, void** extra) {
    CUstream_st* stream = find_stream(config.hStream);
    if (!stream) return refuse(CUDA_ERROR_INVALID_HANDLE, "cuLaunchKernel: no such stream");
    std::shared_ptr<LaunchWork> work;
    const dim3 grid(config.gridDimX, config.gridDimY, config.gridDimZ);
    const dim3 block(config.blockDimX, config.blockDimY, config.blockDimZ);
    if (const CUresult e = prepare(function, grid, block, config.sharedMemBytes, params, extra, work)) return e;
    if (const CUresult e = read_attributes(work->kernel->name, config, work->attributes)) return e;
    if (!stream->capture) state().single_launches++;
    return submit(stream, work);
}

// Blocks of a kernel that one multiprocessor holds at a time.
static int blocks_per_multiprocessor(const CUfunc_st& f, int threads, size_t dynamic_shared) {
    if (threads <= 0 || threads > 1024) return 0;
    const uint64_t warps = (uint64_t(threads) + 31) / 32;
    const uint64_t by_threads = uint64_t(card().threads_per_multiprocessor / 32) / warps;
    const uint64_t by_registers =
        65536 / std::max<uint64_t>(1, registers_of_block(f.resources.registers, uint64_t(threads)));
    const uint64_t shared = dynamic_shared + uint64_t(f.resources.static_shared) + 1024;  // 1 KiB is the system's
    const uint64_t by_shared = uint64_t(card().shared_per_multiprocessor) / shared;
    return int(std::min<uint64_t>({uint64_t(card().blocks_per_multiprocessor), by_threads, by_registers, by_shared}));
}

}  // namespace emu::driver

using namespace emu::driver;

// ---- modules ----

EMU_EXPORT CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    return api(Needs::Context, [&] { return load_module(module, image); });
}

EMU_EXPORT CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned, CUjit_option*, void**) {
    return cuModuleLoadData(module, image);
}

EMU_EXPORT CUresult cuModuleLoadFatBinary(CUmodule* module, const void* image) {
    return cuModuleLoadData(module, image);
}

EMU_EXPORT CUresult cuModuleLoad(CUmodule* module, const char* path) {
    return api(Needs::Context, [&]() -> CUresult {
        if (!path) return CUDA_ERROR_INVALID_VALUE;
        FILE* file = fopen(path, "rb");
        if (!file) return refuse(CUDA_ERROR_FILE_NOT_FOUND, "cuModuleLoad: no file %s", path);
        fclose(file);
        return load_module(module, path);
    });
}

EMU_EXPORT CUresult cuModuleUnload(CUmodule module) {
    return api(Needs::Context, [&]() -> CUresult {
        const auto it = modules().find(module);
        if (it == modules().end()) return refuse(CUDA_ERROR_INVALID_HANDLE, "cuModuleUnload: no such module");
        for (const auto& [name, function] : it->second->functions) functions().erase(function.get());
        modules().erase(it);
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuModuleGetFunction(CUfunction* handle, CUmodule module, const char* name) {
    return api(Needs::Context, [&]() -> CUresult {
        if (!handle || !name) return CUDA_ERROR_INVALID_VALUE;
        const auto it = modules().find(module);
        if (it == modules().end()) return refuse(CUDA_ERROR_INVALID_HANDLE, "cuModuleGetFunction: no such module");
        auto& function = it->second->functions[name];
        if (!function) {
            const emu::Kernel* kernel = emu::find_registered(name);
            if (!kernel) {
                it->second->functions.erase(name);
                return refuse(CUDA_ERROR_NOT_FOUND, "no kernel is called %s", name);
            }
            if (!has_instructions_of(*kernel)) {
                it->second->functions.erase(name);
                return say(CUDA_ERROR_NO_BINARY_FOR_GPU, "%s of %s is for sm_90a; this is an %s", name, kernel->file,
                           card().name);
            }
            function = std::make_unique<CUfunc_st>();
            function->module = module;
            function->kernel = kernel;
            function->resources = resources_of(name);
            function->max_dynamic_shared = 48 * 1024 - function->resources.static_shared;
            functions().insert(function.get());
        }
        *handle = function.get();
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuModuleGetGlobal_v2(CUdeviceptr*, size_t*, CUmodule, const char* name) {
    return api(Needs::Context,
               [&] { return refuse(CUDA_ERROR_NOT_FOUND, "no kernel file has a global '%s'", name ? name : ""); });
}

// ---- functions ----

EMU_EXPORT CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
    return api(Needs::Context, [&]() -> CUresult {
        if (!known(function)) return unknown_function("cuFuncGetAttribute");
        if (!value) return CUDA_ERROR_INVALID_VALUE;
        const int capability = card().major * 10 + card().minor;
        switch (int(attribute)) {
            case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
                *value = int(std::min(1024u, function->kernel->max_threads));
                break;
            case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = function->resources.static_shared; break;
            case CU_FUNC_ATTRIBUTE_CONST_SIZE_BYTES: *value = 0; break;
            case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *value = function->resources.local_bytes; break;
            case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = function->resources.registers; break;
            case CU_FUNC_ATTRIBUTE_PTX_VERSION: *value = capability; break;
            case CU_FUNC_ATTRIBUTE_BINARY_VERSION: *value = capability; break;
            case CU_FUNC_ATTRIBUTE_CACHE_MODE_CA: *value = 0; break;
            case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: *value = function->max_dynamic_shared; break;
            case CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT: *value = -1; break;
            default:
                if (int(attribute) < 0 || int(attribute) > 15) return CUDA_ERROR_INVALID_VALUE;
                *value = 0;
        }
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    return api(Needs::Context, [&]() -> CUresult {
        if (!known(function)) return unknown_function("cuFuncSetAttribute");
        switch (int(attribute)) {
            case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
                if (value < 0 || value > card().shared_opt_in - function->resources.static_shared) {
                    return say(CUDA_ERROR_INVALID_VALUE, "%s: %d bytes of dynamic shared memory; %d at most",
                               function->kernel->name, value, card().shared_opt_in - function->resources.static_shared);
                }
                function->max_dynamic_shared = value;
                return CUDA_SUCCESS;
            case CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT:
                return value >= -1 && value <= 100 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
            default: return refuse(CUDA_ERROR_INVALID_VALUE, "function attribute %d cannot be set", int(attribute));
        }
    });
}

EMU_EXPORT CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache) {
    return api(Needs::Context,
               [&] { return known(function) ? CUDA_SUCCESS : unknown_function("cuFuncSetCacheConfig"); });
}

EMU_EXPORT CUresult cuFuncGetName(const char** name, CUfunction function) {
    return api(Needs::Context, [&]() -> CUresult {
        if (!known(function)) return unknown_function("cuFuncGetName");
        if (!name) return CUDA_ERROR_INVALID_VALUE;
        *name = function->kernel->name;
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuFuncGetModule(CUmodule* module, CUfunction function) {
    return api(Needs::Context, [&]() -> CUresult {
        if (!known(function)) return unknown_function("cuFuncGetModule");
        if (!module) return CUDA_ERROR_INVALID_VALUE;
        *module = function->module;
        return CUDA_SUCCESS;
    });
}

// CUDA_ERROR_INVALID_VALUE past the last parameter.
EMU_EXPORT CUresult cuFuncGetParamInfo(CUfunction function, size_t index, size_t* offset, size_t* size) {
    return api(Needs::Context, [&]() -> CUresult {
        if (!known(function)) return unknown_function("cuFuncGetParamInfo");
        if (!offset || index >= function->kernel->param_count) return CUDA_ERROR_INVALID_VALUE;
        *offset = function->kernel->params[index].offset;
        if (size) *size = function->kernel->params[index].size;
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuFuncLoad(CUfunction function) {
    return api(Needs::Context, [&] { return known(function) ? CUDA_SUCCESS : unknown_function("cuFuncLoad"); });
}

// ---- launches ----

EMU_EXPORT CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                                   CUstream stream, void** params, void** extra) {
    return api(Needs::Context, [&] {
        const CUlaunchConfig config{grid_x, grid_y, grid_z, block_x, block_y, block_z, shared, stream, nullptr, 0};
        return launch(function, config, params, extra);
    });
}

EMU_EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** params, void** extra) {
    return api(Needs::Context, [&]() -> CUresult {
        return config ? launch(function, *config, params, extra) : refuse(CUDA_ERROR_INVALID_VALUE, "no configuration");
    });
}

EMU_EXPORT CUresult cuLaunchCooperativeKernel(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                                              unsigned, CUstream, void**) {
    return api(Needs::Context, [] { return say(CUDA_ERROR_NOT_SUPPORTED, "cooperative launches are not emulated"); });
}

// ---- occupancy ----

EMU_EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, CUfunction function, int threads,
                                                                         size_t dynamic_shared, unsigned) {
    return api(Needs::Context, [&]() -> CUresult {
        if (!known(function)) return unknown_function("cuOccupancyMaxActiveBlocksPerMultiprocessor");
        if (!blocks || threads <= 0) return CUDA_ERROR_INVALID_VALUE;
        *blocks = blocks_per_multiprocessor(*function, threads, dynamic_shared);
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction function, int threads,
                                                                size_t dynamic_shared) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, dynamic_shared, 0);
}

EMU_EXPORT CUresult cuOccupancyAvailableDynamicSMemPerBlock(size_t* bytes, CUfunction function, int blocks, int) {
    return api(Needs::Context, [&]() -> CUresult {
        if (!known(function)) return unknown_function("cuOccupancyAvailableDynamicSMemPerBlock");
        if (!bytes || blocks <= 0) return CUDA_ERROR_INVALID_VALUE;
        const int each = card().shared_per_multiprocessor / blocks - 1024 - function->resources.static_shared;
        *bytes = size_t(std::max(0, std::min(each, card().shared_opt_in - function->resources.static_shared)));
        return CUDA_SUCCESS;
    });
}

// The block size that fills a multiprocessor best, the largest among equals.
EMU_EXPORT CUresult cuOccupancyMaxPotentialBlockSizeWithFlags(int* grid, int* block, CUfunction function,
                                                              CUoccupancyB2DSize shared_of_block, size_t dynamic_shared,
                                                              int limit, unsigned) {
    return api(Needs::Context, [&]() -> CUresult {
        if (!known(function)) return unknown_function("cuOccupancyMaxPotentialBlockSize");
        if (!grid || !block) return CUDA_ERROR_INVALID_VALUE;
        int top = int(std::min(1024u, function->kernel->max_threads)), best = 0;
        if (limit > 0) top = std::min(top, limit);
        for (int threads = (top + 31) / 32 * 32; threads > 0; threads -= 32) {
            const int used = std::min(threads, top);
            const size_t shared = shared_of_block ? shared_of_block(used) : dynamic_shared;
            const int blocks = blocks_per_multiprocessor(*function, used, shared);
            if (blocks * used > best) {
                best = blocks * used;
                *block = used;
                *grid = blocks * card().multiprocessors;
            }
        }
        return best ? CUDA_SUCCESS : refuse(CUDA_ERROR_INVALID_VALUE, "no block size fits %s", function->kernel->name);
    });
}

EMU_EXPORT CUresult cuOccupancyMaxPotentialBlockSize(int* grid, int* block, CUfunction function,
                                                     CUoccupancyB2DSize shared_of_block, size_t dynamic_shared,
                                                     int limit) {
    return cuOccupancyMaxPotentialBlockSizeWithFlags(grid, block, function, shared_of_block, dynamic_shared, limit, 0);
}

// As many clusters as there is room for on all multiprocessors; how they are grouped is not modelled.
EMU_EXPORT CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction function, const CUlaunchConfig* config) {
    return api(Needs::Context, [&]() -> CUresult {
        if (!known(function)) return unknown_function("cuOccupancyMaxActiveClusters");
        if (!clusters || !config) return CUDA_ERROR_INVALID_VALUE;
        emu::LaunchAttributes attributes;
        if (const CUresult e = read_attributes(function->kernel->name, *config, attributes)) return e;
        const uint64_t threads = uint64_t(config->blockDimX) * config->blockDimY * config->blockDimZ;
        const int blocks = blocks_per_multiprocessor(*function, int(std::min<uint64_t>(threads, 1025)), config->sharedMemBytes);
        const auto& [x, y, z] = attributes.cluster;
        *clusters = blocks * card().multiprocessors / int(x * y * z);
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuOccupancyMaxPotentialClusterSize(int* size, CUfunction function, const CUlaunchConfig* config) {
    return api(Needs::Context, [&]() -> CUresult {
        if (!known(function)) return unknown_function("cuOccupancyMaxPotentialClusterSize");
        if (!size || !config) return CUDA_ERROR_INVALID_VALUE;
        if (card().major < 9) return say(CUDA_ERROR_NOT_SUPPORTED, "an %s has no clusters", card().name);
        *size = int(kLargestCluster);
        return CUDA_SUCCESS;
    });
}
