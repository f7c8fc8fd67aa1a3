// libcuda.so.1 look-alike over the SIMT emulator: enough of the driver API for cudarc host code to run end to end on a CPU
#include "emu.h"
#include <chrono>
typedef int R; typedef unsigned long long P; using emu::Loc;
#define X extern "C" __attribute__((visibility("default"))) R
struct Ev { double t; };
static double now() { return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
X cuInit(unsigned) { if (const char* s = getenv("EMU_SCHED")) emu::config.sched = (emu::Sched)atoi(s); if (const char* s = getenv("EMU_ASYNC")) emu::config.async = (emu::Async)atoi(s); emu::config.threads = 2; return 0; }
X cuDeviceGetCount(int* n) { *n = 1; return 0; }
X cuDeviceGet(int* d, int) { *d = 0; return 0; }
X cuDeviceGetName(char* n, int len, int) { snprintf(n, len, "SIMT emulator"); return 0; }
X cuDeviceGetAttribute(int* v, int a, int) { *v = a == 75 ? 9 : a == 76 ? 0 : a == 115 ? 1 : a == 97 ? 232448 : a == 16 ? 4 : 0; return 0; }
X cuDevicePrimaryCtxRetain(void** c, int) { *c = (void*)1; return 0; }
X cuDevicePrimaryCtxRelease_v2(int) { return 0; }
X cuCtxSetCurrent(void*) { return 0; }  X cuCtxGetCurrent(void** c) { *c = (void*)1; return 0; }  X cuCtxSynchronize() { return 0; }
X cuStreamCreate(void** s, unsigned) { *s = (void*)2; return 0; }  X cuStreamDestroy_v2(void*) { return 0; }  X cuStreamSynchronize(void*) { return 0; }  X cuStreamWaitEvent(void*, void*, unsigned) { return 0; }
X cuMemAlloc_v2(P* p, size_t n) { *p = (P)aligned_alloc(256, (n + 255) & ~(size_t)255); memset((void*)*p, 0xFF, n); return 0; }
X cuMemFree_v2(P p) { free((void*)p); return 0; }
X cuMemAllocAsync(P* p, size_t n, void*) { return cuMemAlloc_v2(p, n); }  X cuMemFreeAsync(P p, void*) { return cuMemFree_v2(p); }
X cuMemcpyHtoDAsync_v2(P d, const void* s, size_t n, void*) { memcpy((void*)d, s, n); return 0; }
X cuMemcpyDtoHAsync_v2(void* d, P s, size_t n, void*) { memcpy(d, (void*)s, n); return 0; }
X cuMemcpyDtoDAsync_v2(P d, P s, size_t n, void*) { memcpy((void*)d, (void*)s, n); return 0; }
X cuMemsetD8Async(P d, unsigned char v, size_t n, void*) { memset((void*)d, v, n); return 0; }
X cuModuleLoadData(void** m, const void*) { *m = (void*)3; return 0; }  X cuModuleUnload(void*) { return 0; }
X cuModuleGetFunction(void** f, void*, const char* n) { *f = (void*)emu::find(n); return *f ? 0 : 500; }
X cuFuncSetAttribute(void*, int, int) { return 0; }
X cuEventCreate(void** e, unsigned) { *e = new Ev{0}; return 0; }  X cuEventDestroy_v2(void* e) { delete (Ev*)e; return 0; }
X cuEventRecord(void* e, void*) { ((Ev*)e)->t = now(); return 0; }  X cuEventSynchronize(void*) { return 0; }  X cuEventQuery(void*) { return 0; }
X cuEventElapsedTime_v2(float* ms, void* a, void* b) { *ms = (float)(((Ev*)b)->t - ((Ev*)a)->t); return 0; }
X cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned sm, void*, void** p, void**) { return emu::launch((emu::Thunk)f, dim3(gx, gy, gz), dim3(bx, by, bz), sm, p) ? 719 : 0; }
X cuGetErrorName(int e, const char** s) { *s = e == 719 ? "CUDA_ERROR_LAUNCH_FAILED" : "CUDA_ERROR"; return 0; }  X cuGetErrorString(int e, const char** s) { return cuGetErrorName(e, s); }
X cuTensorMapEncodeTiled(void* m, int dt, unsigned rank, void* g, const uint64_t* dim, const uint64_t* str, const unsigned* box, const unsigned*, int, int swz, int, int) { static const int es[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4}; return emu::tensor_map_encode((emu::TensorMap*)m, es[dt], rank, g, dim, str, box, swz); }
X cuDriverGetVersion(int* v) { *v = 13000; return 0; }
X cuMemAllocHost_v2(void** p, size_t n) { *p = malloc(n); return 0; }  X cuMemFreeHost(void* p) { free(p); return 0; }
X cuMemGetInfo_v2(size_t* f, size_t* t) { *f = *t = (size_t)8 << 30; return 0; }
X cuFuncGetParamInfo(void*, size_t, size_t*, size_t*) { return 1; }
X emu_last_error(char*, int) { return 0; }
