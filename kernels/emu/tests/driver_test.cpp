// What the emulated card's driver promises, one scenario a run: driver_test NAME, or driver_test --list. Built and run
// by tests/emulated_driver.rs, which also sets the environment that some scenarios are about. Linked with libcuda.so.1.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "common/device.cuh"
#include "emu/driver/api.h"

// ---- the driver's functions used here ----

extern "C" {
CUresult cuInit(unsigned);
CUresult cuDriverGetVersion(int*);
CUresult cuGetErrorName(CUresult, const char**);
CUresult cuGetErrorString(CUresult, const char**);
CUresult cuGetProcAddress_v2(const char*, void**, int, cuuint64_t, CUdriverProcAddressQueryResult*);
CUresult cuDeviceGetCount(int*);
CUresult cuDeviceGet(CUdevice*, int);
CUresult cuDeviceGetName(char*, int, CUdevice);
CUresult cuDeviceGetUuid_v2(CUuuid*, CUdevice);
CUresult cuDeviceTotalMem_v2(size_t*, CUdevice);
CUresult cuDeviceGetAttribute(int*, CUdevice_attribute, CUdevice);
CUresult cuDevicePrimaryCtxRetain(CUcontext*, CUdevice);
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice);
CUresult cuDevicePrimaryCtxReset_v2(CUdevice);
CUresult cuCtxSetCurrent(CUcontext);
CUresult cuCtxGetCurrent(CUcontext*);
CUresult cuCtxSynchronize();
CUresult cuMemAlloc_v2(CUdeviceptr*, size_t);
CUresult cuMemFree_v2(CUdeviceptr);
CUresult cuMemAllocAsync(CUdeviceptr*, size_t, CUstream);
CUresult cuMemFreeAsync(CUdeviceptr, CUstream);
CUresult cuMemGetInfo_v2(size_t*, size_t*);
CUresult cuMemGetAddressRange_v2(CUdeviceptr*, size_t*, CUdeviceptr);
CUresult cuPointerGetAttribute(void*, CUpointer_attribute, CUdeviceptr);
CUresult cuMemHostAlloc(void**, size_t, unsigned);
CUresult cuMemAllocHost_v2(void**, size_t);
CUresult cuMemFreeHost(void*);
CUresult cuMemHostRegister_v2(void*, size_t, unsigned);
CUresult cuMemHostUnregister(void*);
CUresult cuMemcpyHtoD_v2(CUdeviceptr, const void*, size_t);
CUresult cuMemcpyDtoH_v2(void*, CUdeviceptr, size_t);
CUresult cuMemcpyDtoD_v2(CUdeviceptr, CUdeviceptr, size_t);
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr, const void*, size_t, CUstream);
CUresult cuMemcpyDtoHAsync_v2(void*, CUdeviceptr, size_t, CUstream);
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr, CUdeviceptr, size_t, CUstream);
CUresult cuMemsetD8Async(CUdeviceptr, unsigned char, size_t, CUstream);
CUresult cuMemsetD16Async(CUdeviceptr, unsigned short, size_t, CUstream);
CUresult cuMemsetD32Async(CUdeviceptr, unsigned, size_t, CUstream);
CUresult cuMemsetD8_v2(CUdeviceptr, unsigned char, size_t);
CUresult cuStreamCreate(CUstream*, unsigned);
CUresult cuStreamDestroy_v2(CUstream);
CUresult cuStreamSynchronize(CUstream);
CUresult cuStreamQuery(CUstream);
CUresult cuStreamWaitEvent(CUstream, CUevent, unsigned);
CUresult cuLaunchHostFunc(CUstream, CUhostFn, void*);
CUresult cuEventCreate(CUevent*, unsigned);
CUresult cuEventDestroy_v2(CUevent);
CUresult cuEventRecord(CUevent, CUstream);
CUresult cuEventQuery(CUevent);
CUresult cuEventSynchronize(CUevent);
CUresult cuEventElapsedTime_v2(float*, CUevent, CUevent);
CUresult cuModuleLoadData(CUmodule*, const void*);
CUresult cuModuleUnload(CUmodule);
CUresult cuModuleGetFunction(CUfunction*, CUmodule, const char*);
CUresult cuFuncGetAttribute(int*, CUfunction_attribute, CUfunction);
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int);
CUresult cuFuncGetName(const char**, CUfunction);
CUresult cuFuncGetParamInfo(CUfunction, size_t, size_t*, size_t*);
CUresult cuLaunchKernel(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream,
                        void**, void**);
CUresult cuLaunchKernelEx(const CUlaunchConfig*, CUfunction, void**, void**);
CUresult cuOccupancyMaxActiveClusters(int*, CUfunction, const CUlaunchConfig*);
CUresult cuOccupancyMaxPotentialClusterSize(int*, CUfunction, const CUlaunchConfig*);
CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                                const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
CUresult cuTensorMapEncodeIm2col(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                                 const int*, const int*, cuuint32_t, cuuint32_t, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int*, CUfunction, int, size_t);
CUresult cuOccupancyMaxPotentialBlockSize(int*, int*, CUfunction, CUoccupancyB2DSize, size_t, int);
CUresult cuStreamBeginCapture_v2(CUstream, CUstreamCaptureMode);
CUresult cuStreamEndCapture(CUstream, CUgraph*);
CUresult cuStreamIsCapturing(CUstream, CUstreamCaptureStatus*);
CUresult cuStreamGetCaptureInfo_v3(CUstream, CUstreamCaptureStatus*, cuuint64_t*, CUgraph*, const CUgraphNode**,
                                   const CUgraphEdgeData**, size_t*);
CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode*);
CUresult cuGraphDestroy(CUgraph);
CUresult cuGraphGetNodes(CUgraph, CUgraphNode*, size_t*);
CUresult cuGraphGetEdges_v2(CUgraph, CUgraphNode*, CUgraphNode*, CUgraphEdgeData*, size_t*);
CUresult cuGraphNodeGetDependencies_v2(CUgraphNode, CUgraphNode*, CUgraphEdgeData*, size_t*);
CUresult cuGraphNodeGetType(CUgraphNode, CUgraphNodeType*);
CUresult cuGraphKernelNodeGetParams_v2(CUgraphNode, CUDA_KERNEL_NODE_PARAMS*);
CUresult cuGraphInstantiateWithFlags(CUgraphExec*, CUgraph, unsigned long long);
CUresult cuGraphLaunch(CUgraphExec, CUstream);
CUresult cuGraphUpload(CUgraphExec, CUstream);
CUresult cuGraphExecDestroy(CUgraphExec);
CUresult cuGraphExecKernelNodeSetParams_v2(CUgraphExec, CUgraphNode, const CUDA_KERNEL_NODE_PARAMS*);
CUresult cuGraphExecUpdate_v2(CUgraphExec, CUgraph, CUgraphExecUpdateResultInfo*);
void emu_fail_allocation(uint64_t nth);
void emu_set_memory_limit(uint64_t bytes);
uint64_t emu_allocation_count();
uint64_t emu_live_allocations();
uint64_t emu_live_bytes();
uint64_t emu_peak_bytes();
uint64_t emu_launch_count();
int emu_last_error(char*, int);
int emu_set_schedule(const char* schedule, const char* async, uint64_t seed);
}

// ---- kernels ----

KERNEL(test_fill, 256, 1)(int* y, int value, int count) {
    follow_previous();
    const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
    if (GUARD(i < count)) y[i] = value;
}
REGISTER_KERNEL(test_fill)

KERNEL(test_twice, 1024, 1)(int* y, const int* x, int count) {
    const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
    if (GUARD(i < count)) y[i] = 2 * x[i];
}
REGISTER_KERNEL(test_twice)

// Writes one value at an offset that may lie outside.
KERNEL(test_write_at, 32, 1)(int* y, long long offset) { y[offset] = 42; }
REGISTER_KERNEL(test_write_at)

// Waits for threads that do not exist.
KERNEL(test_deadlock, 32, 1)(int* y) {
    named_barrier_sync(1, 64);
    *y = 1;
}
REGISTER_KERNEL(test_deadlock)

struct Pair {
    int first, second;
    int* to;
};
// The last three have offsets that padding decides.
KERNEL(test_struct, 64, 1)(unsigned char tag, Pair pair, float scale, long long wide) {
    pair.to[0] = pair.first + pair.second + tag + int(scale) + int(wide);
}
REGISTER_KERNEL(test_struct)

struct Shared {
    int values[1];
};
KERNEL(test_shared, 128, 1)(int* y, int bytes) {
    SHARED_DYNAMIC(Shared, shared);
    shared.values[0] = bytes;
    y[0] = shared.values[0];
}
REGISTER_KERNEL(test_shared)

// resources.tsv of the test says 255 registers, 16 KiB of static shared memory.
KERNEL(test_heavy, 1024, 1)(int* y) { y[0] = 7; }
REGISTER_KERNEL(test_heavy)

// ---- checks ----

static int failures = 0;

#define CHECK(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            failures++; \
        } \
    } while (0)

static void expect(CUresult got, int want, const char* call, int line) {
    if (int(got) == want) return;
    char text[512];
    emu_last_error(text, sizeof text);
    fprintf(stderr, "%s:%d: %s is %d, expected %d (%s)\n", __FILE__, line, call, int(got), want, text);
    failures++;
}
#define EXPECT(call, want) expect(call, want, #call, __LINE__)
#define OK(call) expect(call, CUDA_SUCCESS, #call, __LINE__)

static bool last_error_says(const char* part) {
    char text[1024];
    emu_last_error(text, sizeof text);
    if (strstr(text, part)) return true;
    fprintf(stderr, "the last error is: %s\n", text);
    return false;
}

// ---- what most scenarios need ----

static CUmodule module;

static void open_card() {
    CUdevice device;
    CUcontext context;
    OK(cuInit(0));
    OK(cuDeviceGet(&device, 0));
    OK(cuDevicePrimaryCtxRetain(&context, device));
    OK(cuCtxSetCurrent(context));
    OK(cuModuleLoadData(&module, "an image"));
    if (!getenv("MEGAFUSE_EMU_ASYNC")) emu_set_schedule(nullptr, "early", 1);
}

static CUfunction kernel(const char* name) {
    CUfunction function = nullptr;
    OK(cuModuleGetFunction(&function, module, name));
    return function;
}

static CUdeviceptr allocate(size_t bytes) {
    CUdeviceptr address = 0;
    OK(cuMemAlloc_v2(&address, bytes));
    return address;
}

static CUstream new_stream(unsigned flags = CU_STREAM_NON_BLOCKING) {
    CUstream stream = nullptr;
    OK(cuStreamCreate(&stream, flags));
    return stream;
}

static CUevent new_event(unsigned flags = CU_EVENT_DISABLE_TIMING) {
    CUevent event = nullptr;
    OK(cuEventCreate(&event, flags));
    return event;
}

static CUresult launch_fill(CUdeviceptr y, int value, int count, CUstream stream) {
    void* params[] = {&y, &value, &count};
    const unsigned blocks = unsigned(count + 255) / 256;
    return cuLaunchKernel(kernel("test_fill"), blocks, 1, 1, 256, 1, 1, 0, stream, params, nullptr);
}

static CUresult launch_twice(CUdeviceptr y, CUdeviceptr x, int count, CUstream stream) {
    void* params[] = {&y, &x, &count};
    const unsigned blocks = unsigned(count + 255) / 256;
    return cuLaunchKernel(kernel("test_twice"), blocks, 1, 1, 256, 1, 1, 0, stream, params, nullptr);
}

static CUresult launch_write_at(CUdeviceptr y, long long offset, CUstream stream = nullptr) {
    void* params[] = {&y, &offset};
    return cuLaunchKernel(kernel("test_write_at"), 1, 1, 1, 1, 1, 1, 0, stream, params, nullptr);
}

static int read_int(CUdeviceptr address) {
    int value = 0;
    OK(cuMemcpyDtoH_v2(&value, address, sizeof value));
    return value;
}

// What lies there, past every queue: the address is the host's too.
static int peek(CUdeviceptr address) { return *reinterpret_cast<volatile int*>(address); }

static CUgraphExec instantiated(CUgraph graph) {
    CUgraphExec executable = nullptr;
    OK(cuGraphInstantiateWithFlags(&executable, graph, 0));
    return executable;
}

// ---- start, device, context ----

static void start() {
    int count = 0, version = 0, value = 0;
    CUcontext context;
    EXPECT(cuDeviceGetCount(&count), CUDA_ERROR_NOT_INITIALIZED);
    EXPECT(cuCtxSynchronize(), CUDA_ERROR_NOT_INITIALIZED);
    EXPECT(cuInit(1), CUDA_ERROR_INVALID_VALUE);
    OK(cuDriverGetVersion(&version));
    CHECK(version == 13000);
    OK(cuInit(0));
    OK(cuDeviceGetCount(&count));
    CHECK(count == 1);
    EXPECT(cuDeviceGet(&value, 1), CUDA_ERROR_INVALID_DEVICE);
    char name[64] = {}, cut[4];
    OK(cuDeviceGetName(name, sizeof name, 0));
    CHECK(strstr(name, "emulated"));
    OK(cuDeviceGetName(cut, sizeof cut, 0));
    CHECK(strlen(cut) == 3);
    CUuuid uuid;
    OK(cuDeviceGetUuid_v2(&uuid, 0));
    size_t total;
    OK(cuDeviceTotalMem_v2(&total, 0));
    CHECK(total == size_t(16) << 30);

    EXPECT(cuCtxSynchronize(), CUDA_ERROR_INVALID_CONTEXT);
    OK(cuCtxGetCurrent(&context));
    CHECK(!context);
    CUcontext primary, again;
    OK(cuDevicePrimaryCtxRetain(&primary, 0));
    EXPECT(cuCtxSynchronize(), CUDA_ERROR_INVALID_CONTEXT);
    OK(cuCtxSetCurrent(primary));
    OK(cuCtxSynchronize());
    std::thread([] { EXPECT(cuCtxSynchronize(), CUDA_ERROR_INVALID_CONTEXT); }).join();
    OK(cuDevicePrimaryCtxRetain(&again, 0));
    CHECK(again == primary);
    OK(cuDevicePrimaryCtxRelease_v2(0));
    OK(cuCtxSynchronize());
    OK(cuDevicePrimaryCtxRelease_v2(0));
    EXPECT(cuCtxSynchronize(), CUDA_ERROR_CONTEXT_IS_DESTROYED);
    EXPECT(cuCtxSetCurrent(primary), CUDA_ERROR_CONTEXT_IS_DESTROYED);
    EXPECT(cuDevicePrimaryCtxRelease_v2(0), CUDA_ERROR_INVALID_CONTEXT);
}

static int attribute(CUdevice_attribute which) {
    int value = -1;
    OK(cuDeviceGetAttribute(&value, which, 0));
    return value;
}

// The Rust side runs this with MEGAFUSE_EMU_CAPABILITY 8.0 and 8.6 too.
static void attributes() {
    OK(cuInit(0));
    const char* set = getenv("MEGAFUSE_EMU_CAPABILITY");
    const std::string capability = set ? set : "9.0";
    const bool hopper = capability == "9.0", small = capability == "8.6";
    CHECK(attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) == (hopper ? 9 : 8));
    CHECK(attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR) == (small ? 6 : 0));
    CHECK(attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT) == (hopper ? 132 : small ? 84 : 108));
    CHECK(attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK) == 48 << 10);
    CHECK(attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN) == (hopper ? 227 : small ? 99 : 163) << 10);
    CHECK(attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR) == (hopper  ? 228
                                                                                  : small ? 100
                                                                                          : 164)
                                                                                     << 10);
    CHECK(attribute(CU_DEVICE_ATTRIBUTE_WARP_SIZE) == 32);
    CHECK(attribute(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK) == 1024);
    CHECK(attribute(CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X) == 0x7fffffff);
    CHECK(attribute(CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y) == 65535);
    CHECK(attribute(CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED) == 1);
    CHECK(attribute(CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE) > 0);
    CHECK(attribute(CU_DEVICE_ATTRIBUTE_CLOCK_RATE) > 0);
    CHECK(attribute(150) == 0);
    int value;
    EXPECT(cuDeviceGetAttribute(&value, 100000, 0), CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuDeviceGetAttribute(&value, 1, 1), CUDA_ERROR_INVALID_DEVICE);
}

static void error_names() {
    const char* text;
    OK(cuGetErrorName(CUDA_ERROR_ILLEGAL_ADDRESS, &text));
    CHECK(!strcmp(text, "CUDA_ERROR_ILLEGAL_ADDRESS"));
    OK(cuGetErrorString(CUDA_ERROR_OUT_OF_MEMORY, &text));
    CHECK(!strcmp(text, "out of memory"));
    OK(cuGetErrorName(CUDA_SUCCESS, &text));
    EXPECT(cuGetErrorName(CUresult(12345), &text), CUDA_ERROR_INVALID_VALUE);
    CHECK(!text);
    void* function;
    CUdriverProcAddressQueryResult status;
    OK(cuGetProcAddress_v2("cuMemAlloc", &function, 13000, 0, &status));
    CHECK(function == reinterpret_cast<void*>(&cuMemAlloc_v2));
    EXPECT(cuGetProcAddress_v2("cuNoSuchThing", &function, 13000, 0, &status), CUDA_ERROR_NOT_FOUND);
    CHECK(!function && int(status) == CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND);
}

// MEGAFUSE_EMU_DEVICES=0 and MEGAFUSE_EMU_DRIVER_VERSION=12040 from outside.
static void no_card_and_an_old_driver() {
    int version;
    OK(cuDriverGetVersion(&version));
    CHECK(version == 12040);
    EXPECT(cuInit(0), CUDA_ERROR_NO_DEVICE);
}

// A variable with a value that does not exist, from outside.
static void mistyped_environment() { EXPECT(cuInit(0), CUDA_ERROR_INVALID_VALUE); }

// ---- memory ----

static void memory() {
    open_card();
    size_t free_before, free_bytes, total, size;
    OK(cuMemGetInfo_v2(&free_before, &total));
    CUdeviceptr a = allocate(1000), base;
    CHECK(a % 256 == 0);
    for (int i = 0; i < 250; i++) CHECK(peek(a + 4 * i) == -1);  // poison
    OK(cuMemGetInfo_v2(&free_bytes, &total));
    CHECK(free_bytes == free_before - 1000);
    CHECK(emu_live_bytes() == 1000 && emu_live_allocations() == 1 && emu_peak_bytes() == 1000);
    OK(cuMemGetAddressRange_v2(&base, &size, a + 17));
    CHECK(base == a && size == 1000);
    EXPECT(cuMemGetAddressRange_v2(&base, &size, a + 1000), CUDA_ERROR_NOT_FOUND);
    unsigned type;
    OK(cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, a));
    CHECK(type == CU_MEMORYTYPE_DEVICE);
    EXPECT(cuMemAlloc_v2(&base, 0), CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuMemAlloc_v2(nullptr, 4), CUDA_ERROR_INVALID_VALUE);

    std::vector<char> host(2000, 1);
    OK(cuMemcpyHtoD_v2(a, host.data(), 1000));
    EXPECT(cuMemcpyHtoD_v2(a, host.data(), 1001), CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuMemcpyHtoD_v2(a + 4, host.data(), 997), CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuMemcpyHtoD_v2(a - 1, host.data(), 1), CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuMemcpyDtoH_v2(host.data(), a, 1001), CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuMemcpyDtoH_v2(host.data(), 12345, 1), CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuMemcpyHtoD_v2(a, nullptr, 4), CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuMemcpyHtoD_v2(a, reinterpret_cast<void*>(a), 4), CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuMemcpyDtoD_v2(a, a + 500, 501), CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuMemsetD8Async(a, 0, 1001, nullptr), CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuMemsetD32Async(a + 2, 0, 1, nullptr), CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuMemsetD16Async(a + 1, 0, 1, nullptr), CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuMemsetD32Async(a, 0, 251, nullptr), CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuMemsetD32Async(a, 0, SIZE_MAX / 2, nullptr), CUDA_ERROR_INVALID_VALUE);
    OK(cuMemcpyHtoD_v2(0, nullptr, 0));  // nothing to copy
    OK(cuMemsetD8_v2(a, 3, 1000));
    CHECK(read_int(a + 996) == 0x03030303);
    OK(cuMemsetD16Async(a, 0x1234, 2, nullptr));
    CHECK(read_int(a) == 0x12341234);
    OK(cuMemsetD32Async(a, 77, 250, nullptr));
    CHECK(read_int(a + 996) == 77);
    CUdeviceptr b = allocate(1000);
    OK(cuMemcpyDtoD_v2(b, a, 1000));
    CHECK(read_int(b + 996) == 77);
    OK(cuMemFree_v2(b));

    EXPECT(cuMemFree_v2(a + 8), CUDA_ERROR_INVALID_VALUE);
    OK(cuMemFree_v2(0));
    OK(cuMemFree_v2(a));
    CHECK(peek(a) == -1);  // poisoned again; the quarantine keeps it readable
    EXPECT(cuMemFree_v2(a), CUDA_ERROR_INVALID_VALUE);
    CHECK(last_error_says("freed before"));
    EXPECT(cuMemcpyHtoD_v2(a, host.data(), 4), CUDA_ERROR_INVALID_VALUE);
    CHECK(last_error_says("memory that was freed"));
    CHECK(emu_live_bytes() == 0 && emu_live_allocations() == 0 && emu_peak_bytes() == 2000);
}

static void pinned_memory() {
    open_card();
    void *host, *same;
    OK(cuMemAllocHost_v2(&host, 100));
    CHECK(emu_live_allocations() == 1 && emu_live_bytes() == 0);
    EXPECT(cuMemFree_v2(CUdeviceptr(host)), CUDA_ERROR_INVALID_VALUE);
    CUdeviceptr a = allocate(100);
    EXPECT(cuMemFreeHost(reinterpret_cast<void*>(a)), CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuMemcpyHtoD_v2(a, static_cast<char*>(host) + 50, 51), CUDA_ERROR_INVALID_VALUE);  // past its end
    OK(cuMemFreeHost(host));
    EXPECT(cuMemFreeHost(host), CUDA_ERROR_INVALID_VALUE);
    OK(cuMemHostAlloc(&same, 8, 0));
    OK(cuMemFreeHost(same));
    std::vector<int> own(64);
    OK(cuMemHostRegister_v2(own.data(), 256, 0));
    EXPECT(cuMemHostRegister_v2(own.data() + 1, 4, 0), CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
    OK(cuMemHostUnregister(own.data()));
    EXPECT(cuMemHostUnregister(own.data()), CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
    OK(cuMemFree_v2(a));
    CHECK(emu_live_allocations() == 0);
}

// MEGAFUSE_EMU_MEMORY=4096 from outside.
static void memory_limit() {
    open_card();
    size_t free_bytes, total;
    CUdeviceptr a = allocate(4000), b;
    OK(cuMemGetInfo_v2(&free_bytes, &total));
    CHECK(total == 4096 && free_bytes == 96);
    EXPECT(cuMemAlloc_v2(&b, 97), CUDA_ERROR_OUT_OF_MEMORY);
    CHECK(last_error_says("4000 of 4096"));
    EXPECT(cuMemAllocAsync(&b, 97, nullptr), CUDA_ERROR_OUT_OF_MEMORY);
    b = allocate(96);
    OK(cuMemFree_v2(b));
    emu_set_memory_limit(5000);
    b = allocate(1000);
    emu_set_memory_limit(100);  // below what is in use: nothing is free
    OK(cuMemGetInfo_v2(&free_bytes, &total));
    CHECK(total == 100 && free_bytes == 0);
    CUdeviceptr c;
    EXPECT(cuMemAlloc_v2(&c, 1), CUDA_ERROR_OUT_OF_MEMORY);
    OK(cuMemFree_v2(a));
    OK(cuMemFree_v2(b));
    c = allocate(100);
    // A stream-ordered free that has not happened yet is waited for before memory is refused.
    OK(cuMemFree_v2(c));
    emu_set_schedule(nullptr, "late", 1);
    OK(cuMemAllocAsync(&a, 100, nullptr));
    OK(cuMemFreeAsync(a, nullptr));
    CHECK(emu_live_bytes() == 100);
    OK(cuMemAllocAsync(&b, 100, nullptr));
    CHECK(emu_live_bytes() == 100);
    EXPECT(cuMemAlloc_v2(&c, size_t(-1)), CUDA_ERROR_OUT_OF_MEMORY);
}

// Whatever is created first, second ... fails once, and the next try succeeds. MEGAFUSE_EMU_FAIL_ALLOC=1 from outside.
static void failure_on_demand() {
    CUdevice device;
    CUcontext context;
    OK(cuInit(0));
    OK(cuDeviceGet(&device, 0));
    OK(cuDevicePrimaryCtxRetain(&context, device));
    OK(cuCtxSetCurrent(context));
    EXPECT(cuModuleLoadData(&module, "an image"), CUDA_ERROR_OUT_OF_MEMORY);
    OK(cuModuleLoadData(&module, "an image"));
    CHECK(emu_allocation_count() == 2);
    const CUstream stream = new_stream();
    auto run = [&](int fail) {
        emu_fail_allocation(uint64_t(fail));
        CUdeviceptr a, b;
        void* host;
        CUstream s;
        CUevent e;
        CUmodule m;
        CUgraph g = nullptr;
        CUgraphExec x;
        int out_of_memory = 0;
        auto tried = [&](CUresult result) {
            if (result == CUDA_ERROR_OUT_OF_MEMORY) return out_of_memory++, false;
            OK(result);
            return true;
        };
        if (tried(cuMemAlloc_v2(&a, 4))) OK(cuMemFree_v2(a));
        if (tried(cuMemAllocAsync(&b, 4, stream))) OK(cuMemFreeAsync(b, stream));
        if (tried(cuMemAllocHost_v2(&host, 4))) OK(cuMemFreeHost(host));
        int registered;
        if (tried(cuMemHostRegister_v2(&registered, 4, 0))) OK(cuMemHostUnregister(&registered));
        if (tried(cuStreamCreate(&s, 0))) OK(cuStreamDestroy_v2(s));
        if (tried(cuEventCreate(&e, 0))) OK(cuEventDestroy_v2(e));
        if (tried(cuModuleLoadData(&m, "x"))) OK(cuModuleUnload(m));
        if (tried(cuStreamBeginCapture_v2(stream, 0))) {
            OK(cuStreamEndCapture(stream, &g));
            if (tried(cuGraphInstantiateWithFlags(&x, g, 0))) OK(cuGraphExecDestroy(x));
            OK(cuGraphDestroy(g));
        }
        emu_fail_allocation(0);
        CHECK(out_of_memory == (fail >= 1 && fail <= 9));
    };
    run(0);
    const uint64_t before = emu_allocation_count();
    run(0);
    const int creations = int(emu_allocation_count() - before);
    CHECK(creations == 9);
    for (int n = 1; n <= creations + 1; n++) run(n);
    OK(cuStreamSynchronize(stream));
    CHECK(emu_live_allocations() == 0);
}

// ---- guard zones ----

static void write_past_the_end() {
    open_card();
    CUdeviceptr a = allocate(1004), b = allocate(4);
    OK(launch_write_at(a, 250));
    OK(cuCtxSynchronize());
    OK(launch_write_at(a, 251));  // the launch itself still succeeds
    EXPECT(cuCtxSynchronize(), CUDA_ERROR_ILLEGAL_ADDRESS);
    CHECK(last_error_says("1004 bytes") && last_error_says("0 bytes past its end") && last_error_says("test_write_at"));
    EXPECT(cuMemAlloc_v2(&b, 4), CUDA_ERROR_ILLEGAL_ADDRESS);  // and stays
    EXPECT(cuStreamSynchronize(nullptr), CUDA_ERROR_ILLEGAL_ADDRESS);
    int count;
    OK(cuDeviceGetCount(&count));
    OK(cuDevicePrimaryCtxReset_v2(0));
    OK(cuCtxSynchronize());
    CHECK(emu_live_allocations() == 0);
    EXPECT(cuMemFree_v2(b), CUDA_ERROR_INVALID_VALUE);  // of the time before
    OK(cuModuleLoadData(&module, "an image"));
    a = allocate(4);
    OK(launch_fill(a, 5, 1, nullptr));
    CHECK(read_int(a) == 5);
}

static void write_before_the_start() {
    open_card();
    CUdeviceptr a = allocate(64);
    OK(launch_write_at(a, -2));
    EXPECT(cuCtxSynchronize(), CUDA_ERROR_ILLEGAL_ADDRESS);
    CHECK(last_error_says("8 bytes before its start"));
}

// Damage that no launch is to blame for is seen at the next free or synchronisation, of host memory too.
static void damage_by_the_host() {
    open_card();
    CUdeviceptr a = allocate(8);
    *reinterpret_cast<char*>(a + 8) ^= 1;
    EXPECT(cuCtxSynchronize(), CUDA_ERROR_ILLEGAL_ADDRESS);
    CHECK(last_error_says("seen at a synchronisation, after no launch"));
    OK(cuDevicePrimaryCtxReset_v2(0));
    void* host;
    OK(cuMemAllocHost_v2(&host, 10));
    static_cast<char*>(host)[-1] ^= 1;
    EXPECT(cuMemFreeHost(host), CUDA_ERROR_ILLEGAL_ADDRESS);
    CHECK(last_error_says("pinned host") && last_error_says("10 bytes") && last_error_says("when it was freed"));
    EXPECT(cuCtxSynchronize(), CUDA_ERROR_ILLEGAL_ADDRESS);
}

// The process ends well by its own account; the driver makes it fail. The Rust side expects that.
static void damage_seen_at_exit() {
    open_card();
    CUdeviceptr a = allocate(8);
    *reinterpret_cast<char*>(a + 9) ^= 1;
}

// ---- when copies happen ----

static void pageable_copies() {
    open_card();
    for (const char* async : {"early", "late", "mixed"}) {
        emu_set_schedule(nullptr, async, 3);
        const CUstream stream = new_stream();
        CUdeviceptr a = allocate(4);
        int value = 1;
        OK(cuMemcpyHtoDAsync_v2(a, &value, 4, stream));
        value = 2;  // the bytes were staged
        int back = 0;
        OK(cuMemcpyDtoHAsync_v2(&back, a, 4, stream));
        CHECK(back == 1);  // waited for
    }
    emu_set_schedule(nullptr, "late", 3);
    CUdeviceptr a = allocate(4);
    int value = 9;
    OK(cuMemcpyHtoD_v2(a, &value, 4));
    CHECK(peek(a) == -1);  // a staged copy may land after the call without a stream, too
    OK(cuStreamSynchronize(nullptr));
    CHECK(peek(a) == 9);
    OK(cuMemcpyHtoD_v2(a, &value, 4));
    OK(cuMemsetD8_v2(a, 0, 4));
    CHECK(peek(a) == 9);
    OK(cuMemcpyDtoD_v2(a, a, 4));
    CHECK(read_int(a) == 0);
}

static void pinned_copies() {
    open_card();
    const CUstream stream = new_stream();
    CUdeviceptr a = allocate(4);
    void* memory;
    OK(cuMemAllocHost_v2(&memory, 8));
    int* host = static_cast<int*>(memory);

    emu_set_schedule(nullptr, "late", 1);
    host[0] = 1;
    OK(cuMemcpyHtoDAsync_v2(a, host, 4, stream));
    host[0] = 2;  // too early: the copy will read this
    OK(cuStreamSynchronize(stream));
    CHECK(read_int(a) == 2);
    host[1] = 77;
    OK(cuMemcpyDtoHAsync_v2(host + 1, a, 4, stream));
    CHECK(host[1] == 77);  // too early to look
    OK(cuStreamSynchronize(stream));
    CHECK(host[1] == 2);
    // The calls without a stream are done with pinned memory when they return.
    host[0] = 3;
    OK(cuMemcpyHtoD_v2(a, host, 4));
    host[0] = 4;
    OK(cuMemcpyDtoH_v2(host + 1, a, 4));
    CHECK(host[1] == 3);

    emu_set_schedule(nullptr, "early", 1);
    host[0] = 5;
    OK(cuMemcpyHtoDAsync_v2(a, host, 4, stream));
    host[0] = 6;
    OK(cuMemcpyDtoHAsync_v2(host + 1, a, 4, stream));
    CHECK(host[1] == 5);

    // Registered memory is pinned.
    emu_set_schedule(nullptr, "late", 1);
    int own = 7;
    OK(cuMemHostRegister_v2(&own, 4, 0));
    OK(cuMemcpyHtoDAsync_v2(a, &own, 4, stream));
    own = 8;
    OK(cuStreamSynchronize(stream));
    CHECK(peek(a) == 8);
    OK(cuMemHostUnregister(&own));

    // Both outcomes within a few seeds.
    std::set<int> seen;
    for (uint64_t seed = 1; seed <= 20; seed++) {
        emu_set_schedule(nullptr, "mixed", seed);
        host[0] = 10;
        OK(cuMemcpyHtoDAsync_v2(a, host, 4, stream));
        host[0] = 20;
        OK(cuStreamSynchronize(stream));
        seen.insert(peek(a));
    }
    CHECK((seen == std::set<int>{10, 20}));
}

static void pinned_buffer_freed_too_early() {
    open_card();
    emu_set_schedule(nullptr, "late", 1);
    const CUstream stream = new_stream();
    CUdeviceptr a = allocate(4);
    void* host;
    OK(cuMemAllocHost_v2(&host, 4));
    OK(cuMemcpyHtoDAsync_v2(a, host, 4, stream));
    OK(cuMemFreeHost(host));
    EXPECT(cuStreamSynchronize(stream), CUDA_ERROR_ILLEGAL_ADDRESS);
    CHECK(last_error_says("a copy from of 4 bytes") && last_error_says("pinned host memory was freed"));
    OK(cuDevicePrimaryCtxReset_v2(0));
    a = allocate(4);
    OK(cuMemAllocHost_v2(&host, 4));
    OK(cuMemcpyDtoHAsync_v2(host, a, 4, nullptr));
    OK(cuMemFreeHost(host));
    EXPECT(cuStreamSynchronize(nullptr), CUDA_ERROR_ILLEGAL_ADDRESS);
    CHECK(last_error_says("a copy to of 4 bytes"));
}

// ---- streams ----

// Two streams fill the same place; without an event either may come last, with one never the first.
static void order_of_streams() {
    open_card();
    const CUstream one = new_stream(), two = new_stream();
    const CUevent event = new_event();
    CUdeviceptr a = allocate(4);
    for (const char* async : {"late", "mixed"}) {
        std::set<int> free_order, ordered;
        for (uint64_t seed = 1; seed <= 30; seed++) {
            emu_set_schedule(nullptr, async, seed);
            OK(launch_fill(a, 1, 1, one));
            OK(launch_fill(a, 2, 1, two));
            OK(cuCtxSynchronize());
            free_order.insert(peek(a));
            OK(launch_fill(a, 1, 1, one));
            OK(cuEventRecord(event, one));
            OK(cuStreamWaitEvent(two, event, 0));
            OK(launch_fill(a, 2, 1, two));
            OK(cuCtxSynchronize());
            ordered.insert(peek(a));
        }
        CHECK((free_order == std::set<int>{1, 2}));
        CHECK((ordered == std::set<int>{2}));
    }
    // Late: only what the wait needs.
    emu_set_schedule(nullptr, "late", 1);
    CUdeviceptr b = allocate(4);
    OK(launch_fill(a, 10, 1, one));
    OK(launch_fill(b, 20, 1, two));
    OK(cuStreamSynchronize(two));
    CHECK(peek(b) == 20 && peek(a) == 2);
    OK(cuStreamSynchronize(one));
    CHECK(peek(a) == 10);
    // A stream's own work stays in order, whatever the seed.
    for (uint64_t seed = 1; seed <= 20; seed++) {
        emu_set_schedule(nullptr, "mixed", seed);
        for (int i = 0; i < 10; i++) OK(launch_fill(a, i, 1, one));
        OK(cuStreamSynchronize(one));
        CHECK(peek(a) == 9);
    }
    EXPECT(cuStreamSynchronize(reinterpret_cast<CUstream>(0x1234)), CUDA_ERROR_INVALID_HANDLE);
    EXPECT(launch_fill(a, 1, 1, reinterpret_cast<CUstream>(0x1234)), CUDA_ERROR_INVALID_HANDLE);
    EXPECT(cuStreamDestroy_v2(nullptr), CUDA_ERROR_INVALID_HANDLE);
    CUstream none;
    EXPECT(cuStreamCreate(&none, 4), CUDA_ERROR_INVALID_VALUE);
}

// The default stream and a blocking one order with each other; a non-blocking one with neither.
static void legacy_stream() {
    open_card();
    CUdeviceptr a = allocate(4);
    const CUstream blocking = new_stream(CU_STREAM_DEFAULT), free_one = new_stream();
    std::set<int> with_blocking, with_free;
    for (uint64_t seed = 1; seed <= 30; seed++) {
        emu_set_schedule(nullptr, "late", seed);
        OK(launch_fill(a, 1, 1, blocking));
        OK(launch_fill(a, 2, 1, nullptr));
        OK(launch_fill(a, 3, 1, blocking));
        OK(launch_fill(a, 4, 1, CU_STREAM_PER_THREAD));  // orders with the default stream only
        OK(cuStreamSynchronize(nullptr));
        CHECK(peek(a) == 2);
        OK(cuStreamSynchronize(blocking));
        with_blocking.insert(peek(a));
        OK(cuCtxSynchronize());
        OK(launch_fill(a, 1, 1, free_one));
        OK(launch_fill(a, 2, 1, nullptr));
        OK(cuCtxSynchronize());
        with_free.insert(peek(a));
    }
    CHECK((with_blocking == std::set<int>{3}));
    CHECK((with_free == std::set<int>{1, 2}));
    for (const CUstream stream : {blocking, CU_STREAM_PER_THREAD}) {
        for (uint64_t seed = 1; seed <= 20; seed++) {
            emu_set_schedule(nullptr, "late", seed);
            OK(launch_fill(a, 1, 1, stream));
            OK(launch_fill(a, 2, 1, nullptr));
            OK(cuCtxSynchronize());
            CHECK(peek(a) == 2);
            OK(launch_fill(a, 3, 1, nullptr));
            OK(launch_fill(a, 4, 1, stream));
            OK(cuCtxSynchronize());
            CHECK(peek(a) == 4);
        }
    }
    // A blocking stream that is gone still comes before.
    for (uint64_t seed = 1; seed <= 10; seed++) {
        emu_set_schedule(nullptr, "late", seed);
        const CUstream gone = new_stream(CU_STREAM_DEFAULT);
        OK(launch_fill(a, 5, 1, gone));
        OK(cuStreamDestroy_v2(gone));
        OK(launch_fill(a, 6, 1, nullptr));
        OK(cuCtxSynchronize());
        CHECK(peek(a) == 6);
    }
}

static void events() {
    open_card();
    emu_set_schedule(nullptr, "late", 1);
    const CUstream stream = new_stream(), other = new_stream();
    const CUevent start = new_event(CU_EVENT_DEFAULT), end = new_event(CU_EVENT_DEFAULT), untimed = new_event();
    CUdeviceptr a = allocate(4);
    float ms = -1;
    OK(cuEventQuery(start));  // never recorded: nothing to wait for
    OK(cuEventSynchronize(start));
    OK(cuStreamWaitEvent(stream, start, 0));
    EXPECT(cuEventElapsedTime_v2(&ms, start, end), CUDA_ERROR_INVALID_HANDLE);
    OK(cuEventRecord(start, stream));
    OK(launch_fill(a, 1, 1, stream));
    OK(cuEventRecord(end, stream));
    OK(launch_fill(a, 2, 1, stream));
    EXPECT(cuEventElapsedTime_v2(&ms, start, end), CUDA_ERROR_NOT_READY);
    EXPECT(cuEventQuery(end), CUDA_ERROR_NOT_READY);
    EXPECT(cuStreamQuery(stream), CUDA_ERROR_NOT_READY);
    int polls = 0;
    while (cuEventQuery(end) == CUDA_ERROR_NOT_READY && polls < 100) polls++;
    CHECK(polls > 0 && polls < 100);
    CHECK(peek(a) == 1);
    OK(cuEventElapsedTime_v2(&ms, start, end));
    CHECK(ms >= 0);
    while (cuStreamQuery(stream) == CUDA_ERROR_NOT_READY && polls < 200) polls++;
    CHECK(polls < 200 && peek(a) == 2);
    OK(cuEventRecord(untimed, stream));
    OK(cuEventSynchronize(untimed));
    EXPECT(cuEventElapsedTime_v2(&ms, start, untimed), CUDA_ERROR_INVALID_HANDLE);
    // A wait is for the record that was made before it.
    OK(launch_fill(a, 3, 1, stream));
    OK(cuEventRecord(untimed, stream));
    OK(cuStreamWaitEvent(other, untimed, 0));
    OK(launch_fill(a, 4, 1, stream));
    OK(cuEventRecord(untimed, stream));
    OK(cuStreamSynchronize(other));
    CHECK(peek(a) == 3);
    OK(cuEventDestroy_v2(untimed));
    EXPECT(cuEventRecord(untimed, stream), CUDA_ERROR_INVALID_HANDLE);
    EXPECT(cuEventSynchronize(untimed), CUDA_ERROR_INVALID_HANDLE);
    CUevent none;
    EXPECT(cuEventCreate(&none, 64), CUDA_ERROR_INVALID_VALUE);
    OK(cuCtxSynchronize());
    CHECK(peek(a) == 4);
}

static void destroyed_stream_finishes() {
    open_card();
    emu_set_schedule(nullptr, "late", 1);
    CUdeviceptr a = allocate(4);
    const CUstream stream = new_stream();
    OK(launch_fill(a, 1, 1, stream));
    OK(cuStreamDestroy_v2(stream));
    EXPECT(cuStreamSynchronize(stream), CUDA_ERROR_INVALID_HANDLE);
    CHECK(peek(a) == -1);
    OK(cuCtxSynchronize());
    CHECK(peek(a) == 1);
    // cuMemFree waits for the card, so this is no use after free.
    const CUstream again = new_stream();
    OK(launch_fill(a, 2, 1, again));
    OK(cuMemFree_v2(a));
    OK(cuCtxSynchronize());
}

static std::vector<int> called;
static void host_functions() {
    open_card();
    emu_set_schedule(nullptr, "late", 1);
    const CUstream stream = new_stream();
    CUdeviceptr a = allocate(4);
    OK(launch_fill(a, 1, 1, stream));
    static CUdeviceptr place;
    place = a;
    OK(cuLaunchHostFunc(
        stream,
        [](void*) {
            called.push_back(peek(place));
            EXPECT(cuCtxSynchronize(), CUDA_ERROR_NOT_PERMITTED);
        },
        nullptr));
    OK(launch_fill(a, 2, 1, stream));
    CHECK(called.empty());
    OK(cuStreamSynchronize(stream));
    CHECK(called == std::vector<int>{1});
}

// ---- stream-ordered memory ----

static void stream_ordered_memory() {
    open_card();
    emu_set_schedule(nullptr, "late", 1);
    const CUstream one = new_stream(), two = new_stream();
    CUdeviceptr a;
    OK(cuMemAllocAsync(&a, 4, one));
    OK(launch_fill(a, 1, 1, one));
    OK(cuMemFreeAsync(a, one));
    CHECK(emu_live_bytes() == 4);
    OK(cuStreamSynchronize(one));
    CHECK(emu_live_bytes() == 0);
    EXPECT(cuMemAllocAsync(&a, 0, one), CUDA_ERROR_INVALID_VALUE);
    // Used on another stream before it is there: the value does not last.
    OK(cuMemAllocAsync(&a, 4, one));
    OK(launch_fill(a, 1, 1, two));
    OK(cuStreamSynchronize(two));
    OK(cuStreamSynchronize(one));
    CHECK(peek(a) == -1);
    OK(cuMemFree_v2(a));
    EXPECT(cuMemFreeAsync(a, one), CUDA_ERROR_INVALID_VALUE);
}

static void use_after_stream_ordered_free() {
    open_card();
    const CUstream stream = new_stream();
    CUdeviceptr a;
    OK(cuMemAllocAsync(&a, 400, stream));
    OK(cuMemFreeAsync(a, stream));
    OK(launch_fill(a, 1, 1, stream));
    EXPECT(cuStreamSynchronize(stream), CUDA_ERROR_ILLEGAL_ADDRESS);
    CHECK(last_error_says("400 bytes, which was freed before it ran"));
}

// cuMemFree of stream-ordered memory waits for nothing.
static void stream_ordered_memory_freed_under_work() {
    open_card();
    emu_set_schedule(nullptr, "late", 1);
    const CUstream stream = new_stream();
    CUdeviceptr a;
    OK(cuMemAllocAsync(&a, 400, stream));
    OK(cuMemsetD8Async(a, 0, 400, stream));
    OK(cuMemFree_v2(a));
    EXPECT(cuStreamSynchronize(stream), CUDA_ERROR_ILLEGAL_ADDRESS);
    CHECK(last_error_says("a memset of 400 bytes"));
}

static void freed_twice_in_stream_order() {
    open_card();
    emu_set_schedule(nullptr, "late", 1);
    CUdeviceptr a;
    OK(cuMemAllocAsync(&a, 400, nullptr));
    OK(cuMemFreeAsync(a, nullptr));
    OK(cuMemFreeAsync(a, nullptr));
    EXPECT(cuCtxSynchronize(), CUDA_ERROR_ILLEGAL_ADDRESS);
    CHECK(last_error_says("freed twice"));
}

// ---- modules, functions, launches ----

static void modules() {
    open_card();
    CUfunction function;
    CUmodule none;
    EXPECT(cuModuleLoadData(&none, nullptr), CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuModuleGetFunction(&function, module, "no_such_kernel"), CUDA_ERROR_NOT_FOUND);
    const CUfunction twice = kernel("test_twice");
    CHECK(twice == kernel("test_twice"));
    const char* name;
    OK(cuFuncGetName(&name, twice));
    CHECK(!strcmp(name, "test_twice"));
    size_t offset, size;
    const CUfunction structure = kernel("test_struct");
    const size_t expected[][2] = {{0, 1}, {8, 16}, {24, 4}, {32, 8}};
    for (size_t i = 0; i < 4; i++) {
        OK(cuFuncGetParamInfo(structure, i, &offset, &size));
        CHECK(offset == expected[i][0] && size == expected[i][1]);
    }
    EXPECT(cuFuncGetParamInfo(structure, 4, &offset, &size), CUDA_ERROR_INVALID_VALUE);
    int value;
    OK(cuFuncGetAttribute(&value, CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, structure));
    CHECK(value == 64);
    OK(cuModuleUnload(module));
    EXPECT(cuFuncGetName(&name, twice), CUDA_ERROR_INVALID_HANDLE);
    EXPECT(cuModuleGetFunction(&function, module, "test_twice"), CUDA_ERROR_INVALID_HANDLE);
    EXPECT(cuModuleUnload(module), CUDA_ERROR_INVALID_HANDLE);
}

// As REGISTER_KERNEL registers test_fill, from another file.
static const emu::Kernel& registered(const char* name, const char* file) {
    const emu::Kernel& fill = *emu::find_registered("test_fill");
    const unsigned bounds[2] = {fill.max_threads, fill.min_blocks};
    return *new emu::Kernel(name, file, fill.fn, bounds, fill.params, fill.param_count);
}

// A kernel of one architecture; the Rust side runs this with MEGAFUSE_EMU_CAPABILITY 8.9 too.
static void instruction_sets() {
    registered("test_hopper", "kernels/sm90/test.cu");
    registered("test_portable", "kernels/test.cu");
    open_card();
    CUfunction function;
    OK(cuModuleGetFunction(&function, module, "test_portable"));
    const char* capability = getenv("MEGAFUSE_EMU_CAPABILITY");
    if (!capability || !strcmp(capability, "9.0")) {
        OK(cuModuleGetFunction(&function, module, "test_hopper"));
    } else {
        EXPECT(cuModuleGetFunction(&function, module, "test_hopper"), CUDA_ERROR_NO_BINARY_FOR_GPU);
        CHECK(last_error_says("kernels/sm90/test.cu is for sm_90a"));
        EXPECT(cuModuleGetFunction(&function, module, "test_hopper"), CUDA_ERROR_NO_BINARY_FOR_GPU);
    }
}

static void two_kernels_of_one_name() {
    registered("test_fill", "kernels/sm90/test.cu");
    EXPECT(cuInit(0), CUDA_ERROR_INVALID_IMAGE);
    CHECK(last_error_says("test_fill is in") && last_error_says("kernels/sm90/test.cu"));
}

static void arguments() {
    open_card();
    emu_set_schedule(nullptr, "late", 1);
    const CUstream stream = new_stream();
    CUdeviceptr a = allocate(4);
    unsigned char tag = 1;
    Pair pair{10, 20, reinterpret_cast<int*>(a)};
    float scale = 100.f;
    long long wide = 1000;
    void* params[] = {&tag, &pair, &scale, &wide};
    const CUfunction function = kernel("test_struct");
    OK(cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, stream, params, nullptr));
    pair.first = tag = 0;  // the arguments were copied
    const uint64_t before = emu_launch_count();
    OK(cuStreamSynchronize(stream));
    CHECK(peek(a) == 1131 && emu_launch_count() == before + 1);
    // The same as one packed buffer.
    struct Packed {
        unsigned char tag;
        Pair pair;
        float scale;
        long long wide;
    } packed{2, {1, 2, reinterpret_cast<int*>(a)}, 3.f, 4};
    size_t bytes = sizeof packed;
    void* extra[] = {CU_LAUNCH_PARAM_BUFFER_POINTER, &packed, CU_LAUNCH_PARAM_BUFFER_SIZE, &bytes, CU_LAUNCH_PARAM_END};
    OK(cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, stream, nullptr, extra));
    OK(cuStreamSynchronize(stream));
    CHECK(peek(a) == 12);
    bytes = 8;
    EXPECT(cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, stream, nullptr, extra), CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, stream, nullptr, nullptr), CUDA_ERROR_INVALID_VALUE);
    CUlaunchConfig config{1, 1, 1, 1, 1, 1, 0, stream, nullptr, 0};
    tag = 5;
    OK(cuLaunchKernelEx(&config, function, params, nullptr));
    OK(cuStreamSynchronize(stream));
    CHECK(peek(a) == 1125);
    EXPECT(cuLaunchKernelEx(nullptr, function, params, nullptr), CUDA_ERROR_INVALID_VALUE);
}

static bool has_hopper() { return attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) >= 9; }

// The Rust side runs this with MEGAFUSE_EMU_CAPABILITY 8.0 too.
static void launch_attributes() {
    open_card();
    CUdeviceptr y = allocate(4);
    int value = 7, count = 1;
    void* params[] = {&y, &value, &count};
    const CUfunction fill = kernel("test_fill");
    const CUstream stream = new_stream();
    CUlaunchAttribute attributes[2]{};
    CUlaunchConfig config{6, 4, 1, 32, 1, 1, 0, stream, attributes, 1};
    const auto launch = [&](int id, unsigned a = 0, unsigned b = 0, unsigned c = 0) {
        attributes[0].id = CUlaunchAttributeID(id);
        attributes[0].value = {};
        attributes[0].value.clusterDim = {a, b, c};  // the first also of every other value
        return cuLaunchKernelEx(&config, fill, params, nullptr);
    };
    const int cluster = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    CHECK(attribute(CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH) == has_hopper());
    CHECK(attribute(CU_DEVICE_ATTRIBUTE_TENSOR_MAP_ACCESS_SUPPORTED) == has_hopper());
    OK(launch(cluster, 1, 1, 1));
    if (has_hopper()) {
        const unsigned sizes[][3] = {{0, 1, 1}, {1, 0, 1}, {1, 1, 0}, {6, 2, 1}, {1, 1, 9}, {65536, 65536, 1}};
        for (const auto& s : sizes) {
            EXPECT(launch(cluster, s[0], s[1], s[2]), CUDA_ERROR_INVALID_CLUSTER_SIZE);
            CHECK(last_error_says("blocks; 1 to 8"));
        }
        const unsigned parts[][3] = {{4, 1, 1}, {1, 3, 1}, {1, 1, 2}, {2, 3, 1}};
        for (const auto& s : parts) {
            EXPECT(launch(cluster, s[0], s[1], s[2]), CUDA_ERROR_INVALID_CLUSTER_SIZE);
            CHECK(last_error_says("a grid of 6x4x1 blocks is not whole clusters of"));
        }
        int clusters = 0, blocks = 0;
        attributes[0].value.clusterDim = {2, 2, 1};
        OK(cuOccupancyMaxActiveClusters(&clusters, fill, &config));
        OK(cuOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, fill, 32, 0));
        CHECK(clusters == blocks * 132 / 4);
        OK(cuOccupancyMaxPotentialClusterSize(&clusters, fill, &config));
        CHECK(clusters == 8);
    } else {
        EXPECT(launch(cluster, 2, 1, 1), CUDA_ERROR_NOT_SUPPORTED);
        CHECK(last_error_says("has no clusters"));
    }
    OK(launch(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, 1));
    OK(launch(CU_LAUNCH_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 0));
    OK(launch(CU_LAUNCH_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100));
    EXPECT(launch(CU_LAUNCH_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 101), CUDA_ERROR_INVALID_VALUE);
    OK(launch(CU_LAUNCH_ATTRIBUTE_IGNORE, 5));
    OK(launch(CU_LAUNCH_ATTRIBUTE_PRIORITY, 0));
    OK(launch(CU_LAUNCH_ATTRIBUTE_COOPERATIVE, 0));
    EXPECT(launch(CU_LAUNCH_ATTRIBUTE_COOPERATIVE, 1), CUDA_ERROR_NOT_SUPPORTED);
    EXPECT(launch(CU_LAUNCH_ATTRIBUTE_SYNCHRONIZATION_POLICY), CUDA_ERROR_INVALID_VALUE);
    EXPECT(launch(CU_LAUNCH_ATTRIBUTE_PREFERRED_CLUSTER_DIMENSION, 1, 1, 1), CUDA_ERROR_NOT_SUPPORTED);
    for (const int id : {-1, 15, 17, 1000}) {
        EXPECT(launch(id), CUDA_ERROR_INVALID_VALUE);
        CHECK(last_error_says("there is no launch attribute"));
    }
    // Several in one launch: each counts.
    config.numAttrs = 2;
    attributes[1].id = CU_LAUNCH_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
    attributes[1].value.sharedMemCarveout = 101;
    EXPECT(launch(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, 1), CUDA_ERROR_INVALID_VALUE);
    config.attrs = nullptr;
    EXPECT(cuLaunchKernelEx(&config, fill, params, nullptr), CUDA_ERROR_INVALID_VALUE);
    // A refused launch did nothing, and is no fault.
    OK(cuStreamSynchronize(stream));
    CHECK(peek(y) == 7);
}

// While a stream captures, attributes are checked and kept as in a launch, and a node's new parameters keep them.
static void attributes_in_a_graph() {
    open_card();
    CUdeviceptr y = allocate(4);
    int value = 7, count = 1;
    void* params[] = {&y, &value, &count};
    const CUfunction fill = kernel("test_fill");
    const CUstream stream = new_stream();
    CUlaunchAttribute attributes[2]{};
    attributes[0].id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    attributes[0].value.clusterDim = {2, 1, 1};
    attributes[1].id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attributes[1].value.programmaticStreamSerializationAllowed = 1;
    CUlaunchConfig config{3, 1, 1, 32, 1, 1, 0, stream, attributes, 2};
    OK(cuStreamBeginCapture_v2(stream, CU_STREAM_CAPTURE_MODE_RELAXED));
    EXPECT(cuLaunchKernelEx(&config, fill, params, nullptr), CUDA_ERROR_INVALID_CLUSTER_SIZE);
    config.gridDimX = 4;
    OK(cuLaunchKernelEx(&config, fill, params, nullptr));
    CUgraph graph;
    OK(cuStreamEndCapture(stream, &graph));
    CUgraphNode node;
    size_t nodes = 1;
    OK(cuGraphGetNodes(graph, &node, &nodes));
    CHECK(nodes == 1);
    const CUgraphExec executable = instantiated(graph);
    CUDA_KERNEL_NODE_PARAMS changed;
    OK(cuGraphKernelNodeGetParams_v2(node, &changed));
    changed.gridDimX = 3;
    EXPECT(cuGraphExecKernelNodeSetParams_v2(executable, node, &changed), CUDA_ERROR_INVALID_CLUSTER_SIZE);
    changed.gridDimX = 2;
    OK(cuGraphExecKernelNodeSetParams_v2(executable, node, &changed));
}

// A captured launch that may overlap the kernel before it gets an edge that says so; one behind a memset does not.
static void dependent_launches_in_a_graph() {
    open_card();
    const CUdeviceptr y = allocate(4);
    CUdeviceptr to = y;
    int value = 7, count = 1;
    void* params[] = {&to, &value, &count};
    const CUstream stream = new_stream();
    CUlaunchAttribute attribute{};
    attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    CUlaunchConfig config{1, 1, 1, 32, 1, 1, 0, stream, &attribute, 1};
    OK(cuStreamBeginCapture_v2(stream, CU_STREAM_CAPTURE_MODE_RELAXED));
    OK(cuMemsetD8Async(y, 0, 4, stream));
    for (const int allowed : {1, 1, 0}) {
        attribute.value.programmaticStreamSerializationAllowed = allowed;
        OK(cuLaunchKernelEx(&config, kernel("test_fill"), params, nullptr));
    }
    CUgraph graph;
    OK(cuStreamEndCapture(stream, &graph));
    CUgraphNode from[3], after[3];
    CUgraphEdgeData data[3];
    size_t edges = 0;
    OK(cuGraphGetEdges_v2(graph, nullptr, nullptr, nullptr, &edges));
    CHECK(edges == 3);
    OK(cuGraphGetEdges_v2(graph, from, after, data, &edges));
    const int programmatic = has_hopper();
    for (int i = 0; i < 3; i++) {
        CHECK(data[i].type == (i == 1 ? programmatic : 0));
        CHECK(data[i].from_port == (i == 1 ? programmatic : 0) && data[i].to_port == 0);
        size_t one = 1;
        CUgraphNode earlier;
        CUgraphEdgeData its;
        OK(cuGraphNodeGetDependencies_v2(after[i], &earlier, &its, &one));
        CHECK(one == 1 && earlier == from[i] && its.type == data[i].type);
        const CUresult without = cuGraphNodeGetDependencies_v2(after[i], &earlier, nullptr, &one);
        CHECK(without == (i == 1 && programmatic ? CUDA_ERROR_LOSSY_QUERY : CUDA_SUCCESS));
    }
    const CUresult without = cuGraphGetEdges_v2(graph, from, after, nullptr, &edges);
    CHECK(without == (programmatic ? CUDA_ERROR_LOSSY_QUERY : CUDA_SUCCESS));
    OK(cuGraphLaunch(instantiated(graph), stream));
    OK(cuStreamSynchronize(stream));
    CHECK(peek(y) == 7);
}

// ---- tensor maps ----

// A map that is good, and what a rule is about changed in it. Of bf16: [6][20][40][24][64], a box of [1][2][4][8][64].
struct Maps {
    CUtensorMap map{};
    CUtensorMap* to = &map;
    int type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    cuuint32_t rank = 5;
    uintptr_t address;
    cuuint64_t dims[5] = {64, 24, 40, 20, 6}, strides[4] = {128, 3072, 122880, 2457600};
    cuuint32_t box[5] = {64, 8, 4, 2, 1}, steps[5] = {1, 1, 1, 1, 1};
    int interleave = CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle = CU_TENSOR_MAP_SWIZZLE_128B, promotion = 2, fill = 0;
    // im2col: [6][40][24][64] and pixels of 3x3 around each.
    int lower[3] = {-1, -1, -1}, upper[3] = {-1, -1, -1};
    cuuint32_t channels = 64, pixels = 128;

    explicit Maps(CUdeviceptr address) : address(uintptr_t(address)) {}
    CUresult tiled() {
        return cuTensorMapEncodeTiled(to, CUtensorMapDataType(type), rank, reinterpret_cast<void*>(address), dims, strides, box,
                                      steps, CUtensorMapInterleave(interleave), CUtensorMapSwizzle(swizzle),
                                      CUtensorMapL2promotion(promotion), CUtensorMapFloatOOBfill(fill));
    }
    CUresult im2col() {
        return cuTensorMapEncodeIm2col(to, CUtensorMapDataType(type), rank, reinterpret_cast<void*>(address), dims, strides,
                                       lower, upper, channels, pixels, steps, CUtensorMapInterleave(interleave),
                                       CUtensorMapSwizzle(swizzle), CUtensorMapL2promotion(promotion),
                                       CUtensorMapFloatOOBfill(fill));
    }
};

// What both calls want of the tensor.
static void tensor_map_rules(CUdeviceptr address, CUresult (Maps::*encode)()) {
    const auto accepted = [&](auto change, int line) {
        Maps maps(address);
        change(maps);
        expect((maps.*encode)(), CUDA_SUCCESS, "encode", line);
    };
    const auto refused = [&](const char* words, auto change, int line, int error = CUDA_ERROR_INVALID_VALUE) {
        Maps maps(address);
        change(maps);
        expect((maps.*encode)(), error, words, line);
        if (!last_error_says(words)) expect(CUDA_ERROR_UNKNOWN, CUDA_SUCCESS, words, line);
    };
    accepted([](Maps&) {}, __LINE__);
    refused("tensorMap is", [](Maps& m) { m.to = nullptr; }, __LINE__);
    refused("tensorMap is", [](Maps& m) { m.to = reinterpret_cast<CUtensorMap*>(reinterpret_cast<char*>(&m.map) + 32); }, __LINE__);
    refused("tensorDataType is 16; 0 to 15", [](Maps& m) { m.type = 16; }, __LINE__);
    refused("tensorDataType is -1", [](Maps& m) { m.type = -1; }, __LINE__);
    refused("interleave is 3", [](Maps& m) { m.interleave = 3; }, __LINE__);
    refused("swizzle is 7", [](Maps& m) { m.swizzle = 7; }, __LINE__);
    refused("swizzle is -1", [](Maps& m) { m.swizzle = -1; }, __LINE__);
    refused("l2Promotion is 4", [](Maps& m) { m.promotion = 4; }, __LINE__);
    refused("oobFill is 2", [](Maps& m) { m.fill = 2; }, __LINE__);
    refused("tensorRank is 6", [](Maps& m) { m.rank = 6; }, __LINE__);
    refused("tensorRank is 0", [](Maps& m) { m.rank = 0; }, __LINE__);
    refused("globalAddress is", [](Maps& m) { m.address += 8; }, __LINE__);
    refused("globalAddress is 0; an address aligned to 16", [](Maps& m) { m.address = 0; }, __LINE__);
    refused("globalAddress is", [](Maps& m) { m.address += 16, m.interleave = 2, m.swizzle = 1; }, __LINE__);
    refused("aligned to 32", [](Maps& m) { m.address += 16, m.type = CU_TENSOR_MAP_DATA_TYPE_16U6_ALIGN16B; }, __LINE__);
    refused("globalDim[4] is 0; 1 to 4294967296", [](Maps& m) { m.dims[4] = 0; }, __LINE__);
    refused("globalDim[0] is 4294967297", [](Maps& m) { m.dims[0] = (1ull << 32) + 1; }, __LINE__);
    accepted([](Maps& m) { m.dims[4] = 1ull << 32; }, __LINE__);
    refused("a multiple of 2", [](Maps& m) { m.type = CU_TENSOR_MAP_DATA_TYPE_16U4_ALIGN8B, m.dims[0] = 65; }, __LINE__);
    refused("a multiple of 128", [](Maps& m) { m.type = CU_TENSOR_MAP_DATA_TYPE_16U4_ALIGN16B; }, __LINE__);
    refused("globalStrides[3] is 2457608; a multiple of 16 below 2^40", [](Maps& m) { m.strides[3] += 8; }, __LINE__);
    refused("globalStrides[0] is 1099511627776", [](Maps& m) { m.strides[0] = 1ull << 40; }, __LINE__);
    refused("globalStrides[0] is 144; a multiple of 32", [](Maps& m) { m.strides[0] = 144, m.interleave = 2, m.swizzle = 1; }, __LINE__);
    refused("elementStrides[2] is 0; 1 to 8", [](Maps& m) { m.steps[2] = 0; }, __LINE__);
    refused("elementStrides[2] is 9", [](Maps& m) { m.steps[2] = 9; }, __LINE__);
    accepted([](Maps& m) { m.steps[0] = 9; }, __LINE__);  // ignored without an interleave
    refused("elementStrides[0] is 9", [](Maps& m) { m.steps[0] = 9, m.interleave = 1; }, __LINE__);
    refused("oobFill is NaN", [](Maps& m) { m.fill = 1, m.type = CU_TENSOR_MAP_DATA_TYPE_UINT16; }, __LINE__);
    refused("with an interleave of 32", [](Maps& m) { m.interleave = 2; }, __LINE__);
    for (const int type : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}) {
        accepted([&](Maps& m) { m.type = type, m.box[0] = m.channels = 16; }, __LINE__);
    }
    // A card could, the emulator cannot.
    refused("not emulated", [](Maps& m) { m.interleave = 1; }, __LINE__, CUDA_ERROR_NOT_SUPPORTED);
    refused("not emulated", [](Maps& m) { m.type = CU_TENSOR_MAP_DATA_TYPE_16U4_ALIGN8B; }, __LINE__, CUDA_ERROR_NOT_SUPPORTED);
    refused("not emulated", [](Maps& m) { m.swizzle = 4; }, __LINE__, CUDA_ERROR_NOT_SUPPORTED);
    refused("not emulated", [](Maps& m) { m.fill = 1; }, __LINE__, CUDA_ERROR_NOT_SUPPORTED);
}

static void tiled_tensor_maps() {
    open_card();
    const CUdeviceptr address = allocate(4096);
    tensor_map_rules(address, &Maps::tiled);
    const auto encode = [&](auto change) {
        Maps maps(address);
        change(maps);
        return maps.tiled();
    };
    for (cuuint32_t rank = 1; rank <= 5; rank++) OK(encode([&](Maps& m) { m.rank = rank; }));
    EXPECT(encode([](Maps& m) { m.rank = 2, m.interleave = 1; }), CUDA_ERROR_INVALID_VALUE);
    CHECK(last_error_says("tensorRank is 2; 3 to 5"));
    for (int i = 0; i < 5; i++) {
        EXPECT(encode([&](Maps& m) { m.box[i] = 0; }), CUDA_ERROR_INVALID_VALUE);
        EXPECT(encode([&](Maps& m) { m.box[i] = 257; }), CUDA_ERROR_INVALID_VALUE);
        CHECK(last_error_says(("boxDim[" + std::to_string(i) + "] is 257; 1 to 256").c_str()));
    }
    OK(encode([](Maps& m) { m.box[0] = m.box[1] = 256, m.swizzle = 0; }));
    EXPECT(encode([](Maps& m) { m.box[0] = 60; }), CUDA_ERROR_INVALID_VALUE);
    CHECK(last_error_says("boxDim[0] is 60, 120 bytes; a multiple of 16 bytes"));
    for (const auto& [swizzle, most] : {std::pair(1, 16u), {2, 32u}, {3, 64u}}) {
        for (cuuint32_t width = 8; width <= 64; width += 8) {
            EXPECT(encode([&](Maps& m) { m.swizzle = swizzle, m.box[0] = width; }),
                   width <= most ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE);
        }
        CHECK(most == 64 || last_error_says("the swizzle spans"));
    }
    EXPECT(encode([](Maps& m) { m.steps[1] = 2; }), CUDA_ERROR_NOT_SUPPORTED);
}

static void im2col_tensor_maps() {
    open_card();
    const CUdeviceptr address = allocate(4096);
    tensor_map_rules(address, &Maps::im2col);
    const auto encode = [&](auto change) {
        Maps maps(address);
        change(maps);
        return maps.im2col();
    };
    for (cuuint32_t rank = 3; rank <= 5; rank++) OK(encode([&](Maps& m) { m.rank = rank; }));
    for (const cuuint32_t rank : {1u, 2u}) EXPECT(encode([&](Maps& m) { m.rank = rank; }), CUDA_ERROR_INVALID_VALUE);
    CHECK(last_error_says("tensorRank is 2; 3 to 5"));
    const int ranges[3] = {32768, 128, 16};
    for (int rank = 3; rank <= 5; rank++) {
        const int range = ranges[rank - 3];
        for (int i = 0; i < rank - 2; i++) {
            const auto corners = [&](int lower, int upper) {
                return encode([&](Maps& m) { m.rank = rank, m.dims[i + 1] = 100000, m.lower[i] = lower, m.upper[i] = upper; });
            };
            OK(corners(-range, -range));
            OK(corners(range - 1, range - 1));
            EXPECT(corners(-range - 1, 0), CUDA_ERROR_INVALID_VALUE);
            CHECK(last_error_says("pixelBoxLowerCorner[") && last_error_says(std::to_string(-range - 1).c_str()));
            EXPECT(corners(range, 0), CUDA_ERROR_INVALID_VALUE);
            EXPECT(corners(0, range), CUDA_ERROR_INVALID_VALUE);
            CHECK(last_error_says("pixelBoxUpperCorner["));
            EXPECT(corners(0, -range - 1), CUDA_ERROR_INVALID_VALUE);
        }
    }
    OK(encode([](Maps& m) { m.rank = 4, m.lower[0] = 0, m.upper[0] = -23; }));
    EXPECT(encode([](Maps& m) { m.rank = 4, m.lower[0] = 0, m.upper[0] = -24; }), CUDA_ERROR_INVALID_VALUE);
    CHECK(last_error_says("of 24 there is no pixel"));
    for (const cuuint32_t channels : {0u, 257u}) {
        EXPECT(encode([&](Maps& m) { m.channels = channels, m.swizzle = 0; }), CUDA_ERROR_INVALID_VALUE);
    }
    CHECK(last_error_says("channelsPerPixel is 257; 1 to 256"));
    OK(encode([](Maps& m) { m.channels = 256, m.swizzle = 0; }));
    EXPECT(encode([](Maps& m) { m.channels = 72; }), CUDA_ERROR_INVALID_VALUE);
    CHECK(last_error_says("channelsPerPixel is 72, 144 bytes; the swizzle spans 128"));
    EXPECT(encode([](Maps& m) { m.channels = 4; }), CUDA_ERROR_INVALID_VALUE);
    for (const cuuint32_t pixels : {0u, 1025u}) EXPECT(encode([&](Maps& m) { m.pixels = pixels; }), CUDA_ERROR_INVALID_VALUE);
    CHECK(last_error_says("pixelsPerColumn is 1025; 1 to 1024"));
    OK(encode([](Maps& m) { m.pixels = 1024, m.steps[1] = m.steps[2] = 2; }));
}

// MEGAFUSE_EMU_CAPABILITY=8.9 from outside.
static void no_tensor_maps() {
    open_card();
    Maps maps(allocate(4096));
    EXPECT(maps.tiled(), CUDA_ERROR_NOT_SUPPORTED);
    EXPECT(maps.im2col(), CUDA_ERROR_NOT_SUPPORTED);
    CHECK(last_error_says("has no TMA"));
}

static void host_address_as_argument() {
    open_card();
    static int on_the_host[4];
    OK(launch_fill(CUdeviceptr(on_the_host), 1, 1, nullptr));
    EXPECT(cuCtxSynchronize(), CUDA_ERROR_ILLEGAL_ADDRESS);
    CHECK(last_error_says("argument 0") && last_error_says("no address of the card"));
}

static void freed_address_inside_a_struct() {
    open_card();
    CUdeviceptr a = allocate(64);
    OK(cuMemFree_v2(a));
    unsigned char tag = 1;
    Pair pair{10, 20, reinterpret_cast<int*>(a)};
    float scale = 0;
    long long wide = 0;
    void* params[] = {&tag, &pair, &scale, &wide};
    OK(cuLaunchKernel(kernel("test_struct"), 1, 1, 1, 1, 1, 1, 0, nullptr, params, nullptr));
    EXPECT(cuCtxSynchronize(), CUDA_ERROR_ILLEGAL_ADDRESS);
    CHECK(last_error_says("64 bytes, which was freed"));
}

static void failed_kernel() {
    open_card();
    emu_set_schedule(nullptr, "late", 1);
    CUdeviceptr a = allocate(4);
    void* params[] = {&a};
    const CUstream stream = new_stream();
    const CUfunction fill = kernel("test_fill");
    OK(cuLaunchKernel(kernel("test_deadlock"), 1, 1, 1, 32, 1, 1, 0, stream, params, nullptr));
    int value = 1, count = 1;
    void* fill_params[] = {&a, &value, &count};
    OK(cuLaunchKernel(fill, 1, 1, 1, 1, 1, 1, 0, stream, fill_params, nullptr));  // will not run after a fault
    EXPECT(cuStreamSynchronize(stream), CUDA_ERROR_LAUNCH_FAILED);
    EXPECT(cuMemFree_v2(a), CUDA_ERROR_LAUNCH_FAILED);
    EXPECT(cuLaunchKernel(fill, 1, 1, 1, 1, 1, 1, 0, stream, fill_params, nullptr), CUDA_ERROR_LAUNCH_FAILED);
    CHECK(peek(a) == -1);
    // Released and retained, the context is a new one.
    OK(cuDevicePrimaryCtxRelease_v2(0));
    CUcontext context;
    OK(cuDevicePrimaryCtxRetain(&context, 0));
    OK(cuCtxSetCurrent(context));
    OK(cuCtxSynchronize());
    EXPECT(cuStreamSynchronize(stream), CUDA_ERROR_INVALID_HANDLE);
}

static void launch_limits() {
    open_card();
    CUdeviceptr y = allocate(4096);
    OK(cuMemsetD8_v2(y, 0, 4096));
    int count = 1;
    void* params[] = {&y, &y, &count};
    const CUfunction twice = kernel("test_twice"), fill = kernel("test_fill");
    auto launch = [&](CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                      unsigned shared = 0) {
        return cuLaunchKernel(f, gx, gy, gz, bx, by, bz, shared, nullptr, params, nullptr);
    };
    OK(launch(twice, 1, 1, 1, 1024, 1, 1));
    OK(launch(twice, 1, 1, 1, 1, 1024, 1));
    OK(launch(twice, 1, 1, 1, 1, 1, 64));
    OK(launch(twice, 1, 2, 2, 4, 4, 4));
    const unsigned bad[][6] = {{0, 1, 1, 1, 1, 1},     {1, 0, 1, 1, 1, 1},        {1, 1, 0, 1, 1, 1},
                               {1, 1, 1, 0, 1, 1},     {1, 1, 1, 1, 0, 1},        {1, 1, 1, 1, 1, 0},
                               {1, 65536, 1, 1, 1, 1}, {1, 1, 65536, 1, 1, 1},    {0x80000000u, 1, 1, 1, 1, 1},
                               {1, 1, 1, 1025, 1, 1},  {1, 1, 1, 1, 1025, 1},     {1, 1, 1, 1, 1, 65},
                               {1, 1, 1, 32, 33, 1},   {1, 1, 1, 1024, 1024, 64}, {1, 1, 1, 65536, 65536, 1}};
    for (const auto& b : bad) EXPECT(launch(twice, b[0], b[1], b[2], b[3], b[4], b[5]), CUDA_ERROR_INVALID_VALUE);
    OK(launch_fill(y, 1, 1, nullptr));
    EXPECT(launch(fill, 1, 1, 1, 257, 1, 1), CUDA_ERROR_INVALID_VALUE);  // its launch bound
    CHECK(last_error_says("launch bound is 256"));
    EXPECT(launch(reinterpret_cast<CUfunction>(0x1234), 1, 1, 1, 1, 1, 1), CUDA_ERROR_INVALID_HANDLE);

    int limit = attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN), value;
    const CUfunction shared = kernel("test_shared");
    void* shared_params[] = {&y, &count};
    auto launch_shared = [&](unsigned bytes) {
        return cuLaunchKernel(shared, 1, 1, 1, 32, 1, 1, bytes, nullptr, shared_params, nullptr);
    };
    OK(launch_shared(48 << 10));
    EXPECT(launch_shared((48 << 10) + 1), CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuFuncSetAttribute(shared, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, limit + 1),
           CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuFuncSetAttribute(shared, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, -1), CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuFuncSetAttribute(shared, CU_FUNC_ATTRIBUTE_NUM_REGS, 1), CUDA_ERROR_INVALID_VALUE);
    OK(cuFuncSetAttribute(shared, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, limit));
    OK(cuFuncGetAttribute(&value, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared));
    CHECK(value == limit);
    OK(launch_shared(unsigned(limit)));
    EXPECT(launch_shared(unsigned(limit) + 1), CUDA_ERROR_INVALID_VALUE);
    OK(cuCtxSynchronize());  // a refused launch is no fault
}

// resources.tsv beside the library.
static void resources() {
    open_card();
    CUdeviceptr y = allocate(4);
    void* params[] = {&y};
    const CUfunction heavy = kernel("test_heavy");
    int value;
    OK(cuFuncGetAttribute(&value, CU_FUNC_ATTRIBUTE_NUM_REGS, heavy));
    CHECK(value == 255);
    OK(cuFuncGetAttribute(&value, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, heavy));
    CHECK(value == 16 << 10);
    OK(cuFuncGetAttribute(&value, CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES, heavy));
    CHECK(value == 24);
    auto launch = [&](unsigned threads, unsigned shared) {
        return cuLaunchKernel(heavy, 1, 1, 1, threads, 1, 1, shared, nullptr, params, nullptr);
    };
    OK(launch(256, 0));  // 8 warps of 8192 registers
    EXPECT(launch(257, 0), CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES);
    EXPECT(launch(1024, 0), CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES);
    CHECK(last_error_says("255 registers"));
    OK(launch(32, 32 << 10));
    EXPECT(launch(32, (32 << 10) + 1), CUDA_ERROR_INVALID_VALUE);  // with the static part more than 48 KiB
    const int limit = attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
    const CUfunction_attribute most = CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    EXPECT(cuFuncSetAttribute(heavy, most, limit), CUDA_ERROR_INVALID_VALUE);
    OK(cuFuncSetAttribute(heavy, most, limit - (16 << 10)));
    int blocks, grid, block;
    OK(cuOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, heavy, 256, 0));
    CHECK(blocks == 1);
    OK(cuOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel("test_twice"), 1024, 0));
    CHECK(blocks == 2);
    OK(cuOccupancyMaxPotentialBlockSize(&grid, &block, heavy, nullptr, 0, 0));
    CHECK(block == 256 && grid == attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT));
    OK(cuCtxSynchronize());
}

// ---- capture and graphs ----

static void replay() {
    open_card();
    const CUstream stream = new_stream();
    for (const char* async : {"early", "late", "mixed"}) {
        emu_set_schedule(nullptr, async, 5);
        CUdeviceptr a = allocate(400), b = allocate(400);
        CUstreamCaptureStatus status;
        OK(cuMemsetD32Async(a, 1, 100, stream));
        OK(cuStreamSynchronize(stream));
        OK(cuStreamBeginCapture_v2(stream, CU_STREAM_CAPTURE_MODE_GLOBAL));
        OK(cuStreamIsCapturing(stream, &status));
        CHECK(int(status) == CU_STREAM_CAPTURE_STATUS_ACTIVE);
        int count = 100;
        {
            void* params[] = {&b, &a, &count};
            OK(cuLaunchKernel(kernel("test_twice"), 1, 1, 1, 128, 1, 1, 0, stream, params, nullptr));
            count = 0;  // copied when it was recorded
        }
        OK(cuMemcpyDtoDAsync_v2(a, b, 400, stream));
        OK(cuMemsetD8Async(b, 0, 4, stream));
        CUgraph graph;
        OK(cuStreamEndCapture(stream, &graph));
        OK(cuStreamIsCapturing(stream, &status));
        CHECK(int(status) == CU_STREAM_CAPTURE_STATUS_NONE);
        OK(cuCtxSynchronize());
        CHECK(peek(a) == 1 && peek(b) == -1);  // nothing ran
        const CUgraphExec executable = instantiated(graph);
        OK(cuGraphUpload(executable, stream));
        for (int i = 0; i < 5; i++) OK(cuGraphLaunch(executable, stream));
        OK(cuGraphDestroy(graph));  // the executable lives on
        OK(cuGraphLaunch(executable, stream));
        OK(cuStreamSynchronize(stream));
        CHECK(peek(a + 396) == 64 && peek(b + 396) == 64 && peek(b) == 0);
        // Of the memory as it is now, like any launch.
        OK(cuMemsetD32Async(a, 5, 100, stream));
        OK(cuGraphLaunch(executable, stream));
        OK(cuGraphExecDestroy(executable));  // a replay under way goes on
        CHECK(read_int(a) == 5 || !strcmp(async, "late") || !strcmp(async, "mixed") || read_int(a) == 10);
        OK(cuStreamSynchronize(stream));
        CHECK(peek(a) == 10);
        EXPECT(cuGraphLaunch(executable, stream), CUDA_ERROR_INVALID_VALUE);
        EXPECT(cuGraphDestroy(graph), CUDA_ERROR_INVALID_VALUE);
    }
    // An empty graph is one.
    CUgraph graph;
    OK(cuStreamBeginCapture_v2(stream, CU_STREAM_CAPTURE_MODE_RELAXED));
    OK(cuStreamEndCapture(stream, &graph));
    const CUgraphExec executable = instantiated(graph);
    OK(cuGraphLaunch(executable, stream));
    OK(cuStreamSynchronize(stream));
    CUgraphExec none;
    EXPECT(cuGraphInstantiateWithFlags(&none, graph, 4), CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuGraphInstantiateWithFlags(&none, reinterpret_cast<CUgraph>(0x1234), 0), CUDA_ERROR_INVALID_VALUE);
}

static void graph_contents() {
    open_card();
    const CUstream stream = new_stream();
    CUdeviceptr a = allocate(400), b = allocate(400);
    OK(cuStreamBeginCapture_v2(stream, CU_STREAM_CAPTURE_MODE_GLOBAL));
    OK(launch_fill(a, 7, 100, stream));
    OK(cuMemcpyDtoDAsync_v2(b, a, 400, stream));
    OK(cuMemsetD8Async(a, 0, 4, stream));
    CUstreamCaptureStatus status;
    cuuint64_t id;
    CUgraph recording, graph;
    const CUgraphNode* tail;
    size_t count = 0;
    OK(cuStreamGetCaptureInfo_v3(stream, &status, &id, &recording, &tail, nullptr, &count));
    CHECK(id != 0 && recording && count == 1 && tail[0]);
    OK(cuStreamEndCapture(stream, &graph));
    CHECK(graph == recording);
    OK(cuGraphGetNodes(graph, nullptr, &count));
    CHECK(count == 3);
    CUgraphNode nodes[4];
    count = 4;
    OK(cuGraphGetNodes(graph, nodes, &count));
    CHECK(count == 3 && !nodes[3]);
    const int types[] = {CU_GRAPH_NODE_TYPE_KERNEL, CU_GRAPH_NODE_TYPE_MEMCPY, CU_GRAPH_NODE_TYPE_MEMSET};
    for (int i = 0; i < 3; i++) {
        CUgraphNodeType type;
        OK(cuGraphNodeGetType(nodes[i], &type));
        CHECK(int(type) == types[i]);
    }
    CUgraphNode from[2], to[2];
    count = 2;
    OK(cuGraphGetEdges_v2(graph, from, to, nullptr, &count));
    CHECK(count == 2 && from[0] == nodes[0] && to[0] == nodes[1] && from[1] == nodes[1] && to[1] == nodes[2]);
    CUDA_KERNEL_NODE_PARAMS params;
    OK(cuGraphKernelNodeGetParams_v2(nodes[0], &params));
    CHECK(params.func == kernel("test_fill") && params.gridDimX == 1 && params.blockDimX == 256);
    CHECK(*static_cast<CUdeviceptr*>(params.kernelParams[0]) == a && *static_cast<int*>(params.kernelParams[1]) == 7);
    EXPECT(cuGraphKernelNodeGetParams_v2(nodes[1], &params), CUDA_ERROR_INVALID_VALUE);

    const CUgraphExec executable = instantiated(graph);
    OK(cuGraphKernelNodeGetParams_v2(nodes[0], &params));
    int value = 8;
    params.kernelParams[1] = &value;
    OK(cuGraphExecKernelNodeSetParams_v2(executable, nodes[0], &params));
    OK(cuGraphLaunch(executable, stream));
    OK(cuStreamSynchronize(stream));
    CHECK(peek(b) == 8);
    params.blockDimX = 257;
    EXPECT(cuGraphExecKernelNodeSetParams_v2(executable, nodes[0], &params), CUDA_ERROR_INVALID_VALUE);
    params.blockDimX = 256;
    OK(cuGraphDestroy(graph));
    EXPECT(cuGraphExecKernelNodeSetParams_v2(executable, nodes[0], &params), CUDA_ERROR_INVALID_VALUE);
    CUgraphNodeType type;
    EXPECT(cuGraphNodeGetType(nodes[0], &type), CUDA_ERROR_INVALID_VALUE);

    // The same graph with other values updates the executable; another shape of graph does not.
    CUgraph other;
    CUgraphExecUpdateResultInfo info;
    OK(cuStreamBeginCapture_v2(stream, CU_STREAM_CAPTURE_MODE_GLOBAL));
    OK(launch_fill(a, 9, 100, stream));
    OK(cuMemcpyDtoDAsync_v2(b, a, 400, stream));
    OK(cuMemsetD8Async(a, 0, 4, stream));
    OK(cuStreamEndCapture(stream, &other));
    OK(cuGraphExecUpdate_v2(executable, other, &info));
    OK(cuGraphLaunch(executable, stream));
    OK(cuStreamSynchronize(stream));
    CHECK(peek(b) == 9);
    OK(cuStreamBeginCapture_v2(stream, CU_STREAM_CAPTURE_MODE_GLOBAL));
    OK(launch_fill(a, 9, 100, stream));
    OK(cuStreamEndCapture(stream, &other));
    EXPECT(cuGraphExecUpdate_v2(executable, other, &info), CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE);
    CHECK(int(info.result) == CU_GRAPH_EXEC_UPDATE_ERROR_TOPOLOGY_CHANGED);
}

// Two branches of a fork write the same place: a replay runs them in a drawn order, whatever the setting. What comes
// after the join comes last.
static void fork_and_join() {
    open_card();
    const CUstream main = new_stream(), side = new_stream();
    const CUevent fork = new_event(), join = new_event();
    CUdeviceptr a = allocate(4), b = allocate(4);
    CUgraph graph;
    OK(cuStreamBeginCapture_v2(main, CU_STREAM_CAPTURE_MODE_GLOBAL));
    OK(launch_fill(a, 1, 1, main));
    OK(cuEventRecord(fork, main));
    OK(cuStreamWaitEvent(side, fork, 0));
    CUstreamCaptureStatus status;
    OK(cuStreamIsCapturing(side, &status));
    CHECK(int(status) == CU_STREAM_CAPTURE_STATUS_ACTIVE);
    OK(launch_fill(a, 2, 1, main));
    OK(launch_fill(a, 3, 1, side));
    OK(cuEventRecord(join, side));
    OK(cuStreamWaitEvent(main, join, 0));
    OK(launch_twice(b, a, 1, main));
    OK(cuStreamEndCapture(main, &graph));
    OK(cuStreamIsCapturing(side, &status));
    CHECK(int(status) == CU_STREAM_CAPTURE_STATUS_NONE);
    size_t edges;
    OK(cuGraphGetEdges_v2(graph, nullptr, nullptr, nullptr, &edges));
    CHECK(edges == 4);
    const CUgraphExec executable = instantiated(graph);
    for (const char* async : {"early", "late", "mixed"}) {
        std::set<int> results;
        for (uint64_t seed = 1; seed <= 20; seed++) {
            emu_set_schedule(nullptr, async, seed);
            OK(cuGraphLaunch(executable, main));
            OK(cuStreamSynchronize(main));
            results.insert(peek(b));
        }
        CHECK((results == std::set<int>{4, 6}));
    }
    // Launched into another capture, it becomes part of that graph.
    CUgraph outer;
    OK(cuStreamBeginCapture_v2(main, CU_STREAM_CAPTURE_MODE_GLOBAL));
    OK(launch_fill(a, 50, 1, main));
    OK(cuGraphLaunch(executable, main));
    OK(launch_twice(a, b, 1, main));
    OK(cuStreamEndCapture(main, &outer));
    const CUgraphExec nested = instantiated(outer);
    for (uint64_t seed = 1; seed <= 20; seed++) {
        emu_set_schedule(nullptr, "early", seed);
        OK(cuGraphLaunch(nested, main));
        OK(cuStreamSynchronize(main));
        CHECK(peek(a) == 2 * peek(b) && peek(b) <= 6);
    }
}

// Replays of one executable graph do not overlap, on whatever streams.
static void replays_on_two_streams() {
    open_card();
    const CUstream one = new_stream(), two = new_stream();
    CUdeviceptr a = allocate(4), b = allocate(4);
    CUgraph graph;
    OK(cuStreamBeginCapture_v2(one, CU_STREAM_CAPTURE_MODE_GLOBAL));
    OK(launch_twice(b, a, 1, one));
    OK(cuMemcpyDtoDAsync_v2(a, b, 4, one));
    OK(cuStreamEndCapture(one, &graph));
    const CUgraphExec executable = instantiated(graph);
    for (uint64_t seed = 1; seed <= 20; seed++) {
        emu_set_schedule(nullptr, "late", seed);
        OK(cuMemsetD32Async(a, 3, 1, one));
        OK(cuCtxSynchronize());
        OK(cuGraphLaunch(executable, one));
        OK(cuGraphLaunch(executable, two));
        OK(cuCtxSynchronize());
        CHECK(peek(a) == 12);
    }
}

static CUstreamCaptureStatus status_of(CUstream stream) {
    CUstreamCaptureStatus status;
    OK(cuStreamIsCapturing(stream, &status));
    return status;
}

// Each call that a capture does not allow, and that it ends the capture.
static void capture_rules() {
    open_card();
    const CUstream stream = new_stream(), other = new_stream(), blocking = new_stream(CU_STREAM_DEFAULT);
    const CUevent event = new_event(), outside = new_event();
    CUdeviceptr a = allocate(4), b;
    CUgraph graph = reinterpret_cast<CUgraph>(1);
    void* host;
    int value = 0;

    EXPECT(cuStreamBeginCapture_v2(nullptr, 0), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    EXPECT(cuStreamBeginCapture_v2(stream, 3), CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuStreamEndCapture(stream, &graph), CUDA_ERROR_ILLEGAL_STATE);
    auto begin = [&](int mode = CU_STREAM_CAPTURE_MODE_GLOBAL) { OK(cuStreamBeginCapture_v2(stream, mode)); };
    auto ended_by = [&] {
        CHECK(int(status_of(stream)) == CU_STREAM_CAPTURE_STATUS_INVALIDATED);
        EXPECT(launch_fill(a, 1, 1, stream), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        EXPECT(cuStreamEndCapture(stream, &graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        CHECK(!graph);
        CHECK(int(status_of(stream)) == CU_STREAM_CAPTURE_STATUS_NONE);
    };

    begin();
    EXPECT(cuStreamBeginCapture_v2(stream, 0), CUDA_ERROR_ILLEGAL_STATE);
    EXPECT(cuStreamSynchronize(stream), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    ended_by();
    begin();
    EXPECT(cuStreamQuery(stream), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    ended_by();
    begin();
    EXPECT(cuCtxSynchronize(), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    ended_by();
    for (int mode : {CU_STREAM_CAPTURE_MODE_GLOBAL, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL}) {
        begin(mode);
        EXPECT(cuMemAlloc_v2(&b, 4), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        ended_by();
        begin(mode);
        EXPECT(cuMemFree_v2(a), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        ended_by();
        begin(mode);
        EXPECT(cuMemAllocHost_v2(&host, 4), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        ended_by();
        begin(mode);
        EXPECT(cuEventQuery(outside), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        ended_by();
        begin(mode);
        EXPECT(cuMemcpyHtoD_v2(a, &value, 4), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        ended_by();
    }
    begin(CU_STREAM_CAPTURE_MODE_RELAXED);
    OK(cuMemAlloc_v2(&b, 4));
    OK(launch_fill(b, 3, 1, stream));
    OK(cuStreamEndCapture(stream, &graph));
    OK(cuGraphLaunch(instantiated(graph), stream));
    OK(cuStreamSynchronize(stream));
    CHECK(peek(b) == 3);
    // The same for a thread that says it knows what it does.
    CUstreamCaptureMode mine = CU_STREAM_CAPTURE_MODE_RELAXED;
    begin();
    OK(cuThreadExchangeStreamCaptureMode(&mine));
    OK(cuMemAlloc_v2(&b, 4));
    OK(cuThreadExchangeStreamCaptureMode(&mine));
    CHECK(int(mine) == CU_STREAM_CAPTURE_MODE_RELAXED);
    OK(cuStreamEndCapture(stream, &graph));
    begin();
    EXPECT(cuMemAllocAsync(&b, 4, stream), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    ended_by();

    // Another stream's uncaptured work.
    OK(cuEventRecord(outside, other));
    begin();
    EXPECT(cuStreamWaitEvent(stream, outside, 0), CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
    ended_by();
    // Events of a capture.
    begin();
    OK(cuEventRecord(event, stream));
    EXPECT(cuEventQuery(event), CUDA_ERROR_CAPTURED_EVENT);
    EXPECT(cuEventSynchronize(event), CUDA_ERROR_CAPTURED_EVENT);
    OK(cuStreamEndCapture(stream, &graph));
    EXPECT(cuStreamWaitEvent(other, event, 0), CUDA_ERROR_CAPTURED_EVENT);
    // Two captures.
    begin();
    OK(cuStreamBeginCapture_v2(other, CU_STREAM_CAPTURE_MODE_GLOBAL));
    OK(cuEventRecord(event, stream));
    EXPECT(cuStreamWaitEvent(other, event, 0), CUDA_ERROR_STREAM_CAPTURE_MERGE);
    EXPECT(cuStreamEndCapture(other, &graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    ended_by();
    // A fork that did not come back, and an end in the wrong stream.
    begin();
    OK(cuEventRecord(event, stream));
    OK(cuStreamWaitEvent(other, event, 0));
    OK(launch_fill(a, 1, 1, other));
    EXPECT(cuStreamEndCapture(stream, &graph), CUDA_ERROR_STREAM_CAPTURE_UNJOINED);
    CHECK(!graph && int(status_of(other)) == CU_STREAM_CAPTURE_STATUS_NONE);
    begin();
    OK(cuEventRecord(event, stream));
    OK(cuStreamWaitEvent(other, event, 0));
    EXPECT(cuStreamEndCapture(other, &graph), CUDA_ERROR_STREAM_CAPTURE_UNMATCHED);
    ended_by();
    // The legacy stream while a blocking stream captures.
    OK(cuStreamBeginCapture_v2(blocking, CU_STREAM_CAPTURE_MODE_RELAXED));
    EXPECT(launch_fill(a, 1, 1, nullptr), CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
    EXPECT(cuStreamEndCapture(blocking, &graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    begin(CU_STREAM_CAPTURE_MODE_RELAXED);
    OK(launch_fill(a, 1, 1, nullptr));  // a non-blocking one does not mind
    OK(cuEventRecord(event, stream));
    EXPECT(cuStreamWaitEvent(nullptr, event, 0), CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
    ended_by();
    // A stream that is destroyed while it captures.
    const CUstream gone = new_stream();
    OK(cuStreamBeginCapture_v2(gone, CU_STREAM_CAPTURE_MODE_GLOBAL));
    OK(launch_fill(a, 1, 1, gone));
    OK(cuEventRecord(event, gone));
    OK(cuStreamWaitEvent(other, event, 0));
    OK(cuStreamDestroy_v2(gone));
    CHECK(int(status_of(other)) == CU_STREAM_CAPTURE_STATUS_NONE);
    OK(launch_fill(a, 7, 1, other));
    OK(cuCtxSynchronize());
    CHECK(peek(a) == 7);
    OK(cuMemFree_v2(a));
}

static void capture_and_threads() {
    open_card();
    CUcontext context;
    OK(cuCtxGetCurrent(&context));
    const CUstream stream = new_stream();
    CUgraph graph;
    // What another thread's allocation gives, and whether the capture survives it.
    auto other_thread_allocates = [&](int capture_mode, int thread_mode, int want) {
        OK(cuStreamBeginCapture_v2(stream, capture_mode));
        std::thread([&] {
            OK(cuCtxSetCurrent(context));
            CUstreamCaptureMode mode = thread_mode;
            OK(cuThreadExchangeStreamCaptureMode(&mode));
            CHECK(int(mode) == CU_STREAM_CAPTURE_MODE_GLOBAL);
            CUdeviceptr address;
            EXPECT(cuMemAlloc_v2(&address, 4), want);
        }).join();
        EXPECT(cuStreamEndCapture(stream, &graph), want ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED : CUDA_SUCCESS);
    };
    const int global = CU_STREAM_CAPTURE_MODE_GLOBAL, local = CU_STREAM_CAPTURE_MODE_THREAD_LOCAL,
              relaxed = CU_STREAM_CAPTURE_MODE_RELAXED;
    other_thread_allocates(global, global, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    other_thread_allocates(global, local, CUDA_SUCCESS);
    other_thread_allocates(global, relaxed, CUDA_SUCCESS);
    other_thread_allocates(local, global, CUDA_SUCCESS);
    other_thread_allocates(relaxed, global, CUDA_SUCCESS);
    for (int mode : {global, local, relaxed}) {
        OK(cuStreamBeginCapture_v2(stream, mode));
        std::thread([&] {
            OK(cuCtxSetCurrent(context));
            EXPECT(cuStreamEndCapture(stream, &graph),
                   mode == relaxed ? CUDA_SUCCESS : CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
        }).join();
        if (mode != relaxed) OK(cuStreamEndCapture(stream, &graph));
    }
}

// ---- the rest ----

static void threads() {
    open_card();
    CUcontext context;
    OK(cuCtxGetCurrent(&context));
    emu_set_schedule(nullptr, "mixed", 11);
    std::vector<std::thread> all;
    for (int t = 0; t < 4; t++) {
        all.emplace_back([=] {
            OK(cuCtxSetCurrent(context));
            const CUstream stream = new_stream();
            for (int i = 0; i < 40; i++) {
                CUdeviceptr a;
                OK(cuMemAllocAsync(&a, 400, stream));
                OK(launch_fill(a, 100 * t + i, 100, stream));
                std::vector<int> back(100);
                OK(cuMemcpyDtoHAsync_v2(back.data(), a, 400, stream));
                CHECK(back[0] == 100 * t + i && back[99] == back[0]);
                OK(cuMemFreeAsync(a, stream));
            }
            OK(cuStreamSynchronize(stream));
            OK(cuStreamDestroy_v2(stream));
        });
    }
    for (auto& thread : all) thread.join();
    CHECK(emu_live_allocations() == 0);
}

static void schedule_names() {
    open_card();
    for (const char* schedule : {"in-order", "reverse", "random", "run-ahead"}) {
        CHECK(emu_set_schedule(schedule, "mixed", 2) == 0);
        CUdeviceptr a = allocate(4000);
        OK(launch_fill(a, 3, 1000, nullptr));
        CHECK(read_int(a + 3996) == 3);
    }
    CHECK(emu_set_schedule("backwards", nullptr, 2) == 1);
    CHECK(emu_set_schedule(nullptr, "soon", 2) == 1);
    CHECK(emu_set_schedule("", "", 2) == 0);
}

// MEGAFUSE_EMU_ASYNC=late from outside.
static void late_by_environment() {
    open_card();
    CUdeviceptr a = allocate(4);
    OK(launch_fill(a, 1, 1, nullptr));
    CHECK(peek(a) == -1);
    OK(cuCtxSynchronize());
    CHECK(peek(a) == 1);
}

// A queue of many operations is neither slow nor deep on the stack.
static void long_queue() {
    open_card();
    emu_set_schedule(nullptr, "late", 1);
    const CUstream stream = new_stream();
    CUdeviceptr a = allocate(4);
    for (int i = 0; i < 100000; i++) OK(cuMemsetD32Async(a, unsigned(i), 1, stream));
    OK(cuStreamSynchronize(stream));
    CHECK(peek(a) == 99999);
    for (int i = 0; i < 100000; i++) OK(cuMemsetD32Async(a, unsigned(i), 1, stream));
    OK(cuDevicePrimaryCtxReset_v2(0));  // dropped, not run
}

static const struct {
    const char* name;
    void (*run)();
} kScenarios[] = {
#define SCENARIO(name) {#name, name}
    SCENARIO(start),
    SCENARIO(attributes),
    SCENARIO(error_names),
    SCENARIO(no_card_and_an_old_driver),
    SCENARIO(mistyped_environment),
    SCENARIO(memory),
    SCENARIO(pinned_memory),
    SCENARIO(memory_limit),
    SCENARIO(failure_on_demand),
    SCENARIO(write_past_the_end),
    SCENARIO(write_before_the_start),
    SCENARIO(damage_by_the_host),
    SCENARIO(damage_seen_at_exit),
    SCENARIO(pageable_copies),
    SCENARIO(pinned_copies),
    SCENARIO(pinned_buffer_freed_too_early),
    SCENARIO(order_of_streams),
    SCENARIO(legacy_stream),
    SCENARIO(events),
    SCENARIO(destroyed_stream_finishes),
    SCENARIO(host_functions),
    SCENARIO(stream_ordered_memory),
    SCENARIO(use_after_stream_ordered_free),
    SCENARIO(stream_ordered_memory_freed_under_work),
    SCENARIO(freed_twice_in_stream_order),
    SCENARIO(modules),
    SCENARIO(instruction_sets),
    SCENARIO(two_kernels_of_one_name),
    SCENARIO(arguments),
    SCENARIO(launch_attributes),
    SCENARIO(attributes_in_a_graph),
    SCENARIO(dependent_launches_in_a_graph),
    SCENARIO(tiled_tensor_maps),
    SCENARIO(im2col_tensor_maps),
    SCENARIO(no_tensor_maps),
    SCENARIO(host_address_as_argument),
    SCENARIO(freed_address_inside_a_struct),
    SCENARIO(failed_kernel),
    SCENARIO(launch_limits),
    SCENARIO(resources),
    SCENARIO(replay),
    SCENARIO(graph_contents),
    SCENARIO(fork_and_join),
    SCENARIO(replays_on_two_streams),
    SCENARIO(capture_rules),
    SCENARIO(capture_and_threads),
    SCENARIO(threads),
    SCENARIO(schedule_names),
    SCENARIO(late_by_environment),
    SCENARIO(long_queue),
};

int main(int argc, char** argv) {
    const std::string wanted = argc == 2 ? argv[1] : "";
    for (const auto& scenario : kScenarios) {
        if (wanted == "--list") printf("%s\n", scenario.name);
        if (wanted != scenario.name) continue;
        scenario.run();
        return failures ? 1 : 0;
    }
    return wanted == "--list" ? 0 : 2;
}
