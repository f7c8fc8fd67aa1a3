// The emulated card's driver: a look-alike of libcuda.so.1 over the SIMT emulator.
//
//   api.h        types and constants of the driver API
//   driver.cpp   start, device, context, errors, and the emu_* functions that tests find with dlsym
//   memory.cpp   allocations: guard zones, quarantine, memory limit, failure on demand
//   queue.cpp    operations: what was asked for, in which order it may happen, when it does
//   stream.cpp   streams and events
//   copy.cpp     copies and memsets
//   module.cpp   modules, functions, launches with their attributes and limits
//   tensor_map.cpp   tensor maps for TMA
//   graph.cpp    stream capture, graphs
//
// Time. A call that is asynchronous on a card only appends an Operation here. Operations run on the thread that waits
// for them, one at a time, in an order that the streams and events allow and that is otherwise drawn from a seed:
//   MEGAFUSE_EMU_ASYNC=early   each at once
//   MEGAFUSE_EMU_ASYNC=late    only when a call waits, and then only what that call waits for
//   MEGAFUSE_EMU_ASYNC=mixed   some earlier, some later, drawn from MEGAFUSE_EMU_SEED (the default)
// So a missing wait, or a pinned buffer written or freed too early, gives a wrong result on some setting, every time.
// While operations run the driver is locked: a callback of cuLaunchHostFunc must not wait for a thread that calls it.
//
// Faults. An illegal address, a failed launch or a damaged guard zone is said on stderr and stays: every later call
// returns it until the context is reset or released, as on a card.
//
// The environment, read by cuInit, beside what emu.h lists:
//   MEGAFUSE_EMU_CAPABILITY=9.0      the card: 7.5, 8.0, 8.6, 8.9 or 9.0 (the default), with its limits
//   MEGAFUSE_EMU_MEMORY=bytes        its memory, 16 GiB if not set
//   MEGAFUSE_EMU_FAIL_ALLOC=n        the n-th memory, stream, event, graph or module fails with out of memory, once
//   MEGAFUSE_EMU_DEVICES=0           no card: cuInit is CUDA_ERROR_NO_DEVICE
//   MEGAFUSE_EMU_DRIVER_VERSION=n    what cuDriverGetVersion says, 13000 if not set
//
// A symbol that the product calls and this library lacks panics in cudarc at the first call. To find them:
//     nm -D --defined-only libcuda.so.1 | grep -o ' cu.*'                  what there is
//     grep -rhoE 'sys::cu[A-Z]\w+' cudarc/src/driver src/ | sort -u     what is called
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "api.h"
#include "emu/machine/emu.h"

#define EMU_EXPORT extern "C" __attribute__((visibility("default")))

namespace emu::driver {

// ---- work and its order (queue.cpp) ----

// What an operation does. A graph's node and each of its replays share one.
struct Work {
    virtual ~Work() = default;
    virtual CUgraphNodeType type() const = 0;
    // Whether it may begin before the kernel before it has ended.
    virtual bool dependent() const { return false; }
    // Runs with the driver locked. Anything but CUDA_SUCCESS is a fault of the context.
    virtual CUresult run() = 0;
};
using WorkRef = std::shared_ptr<Work>;

struct Operation {
    WorkRef work;  // null: a mark that only orders others
    std::vector<std::weak_ptr<Operation>> dependents;
    std::vector<std::shared_ptr<Operation>> waits_for;  // emptied when it has run
    size_t missing = 0;                                 // how many of waits_for have not run
    uint64_t wanted = 0;                                // the number of the wait that needs this operation
    bool done = false;
};
using OperationRef = std::shared_ptr<Operation>;

enum class Timing { Early, Late, Mixed };

// Appends an operation that may run once all of `waits_for` have.
OperationRef append(WorkRef work, const std::vector<OperationRef>& waits_for);
// Runs what `target` needs, and under Mixed perhaps more. The context's fault, if there is one now.
CUresult wait_for(const OperationRef& target);
CUresult wait_for_everything();
// A poll: lets one operation that `target` needs run, so that a loop of polls ends.
void make_progress(const OperationRef& target);
void forget_operations();
// While one lives, appended operations only queue up, so that those of a replayed graph run in a drawn order even under
// Timing::Early.
struct Hold {
    Hold();
    ~Hold();
};
// Whether everything that is appended runs before append() returns.
bool completes_at_once();
void set_timing(Timing timing, uint64_t seed);
// Uniform over [0, below), from the seed.
uint64_t draw(uint64_t below);

// ---- memory (memory.cpp) ----

enum class MemoryKind { Device, Pinned, Registered };

struct Allocation {
    MemoryKind kind;
    uintptr_t base;
    size_t size;
    void* raw;        // what malloc gave: the guard zone before `base`; null for Registered and once given back
    uint64_t serial;  // the how-manieth
    unsigned flags;
    bool stream_ordered;  // from cuMemAllocAsync
    bool freed;
};
using AllocationRef = std::shared_ptr<Allocation>;

// The allocation that contains the address, or null. Freed ones: only while they are in quarantine.
AllocationRef find_allocation(uintptr_t address);
AllocationRef find_freed(uintptr_t address);
// Like find_allocation, but an address one past the end also counts.
AllocationRef find_allocation_or_end(uintptr_t address);
// Whether all of [address, address + bytes) lies in one allocation.
bool covers(const Allocation& allocation, uintptr_t address, size_t bytes);
// Counts one creation of a memory, stream, event, graph or module; false: this is the one that shall fail.
bool creation_allowed();
// Compares guard zones with what they were filled with; the first damage is a fault. `after` says when it was seen.
CUresult check_guards(const std::string& after);
CUresult check_guards_of(const AllocationRef& allocation, const std::string& after);
void release_all_memory();

// ---- modules and launches (module.cpp) ----

void release_all_modules();
// A launch as work that can be queued or recorded, checked as the driver checks it when the call is made; and back. `work`
// is the kernel's node whose attributes are kept, or null.
CUresult prepare_launch(const CUDA_KERNEL_NODE_PARAMS& params, WorkRef& work);
void describe_launch(Work& work, CUDA_KERNEL_NODE_PARAMS& params, std::vector<void*>& pointers);
// The launch that ran last, for messages: "launch 17, add_bf16".
const std::string& last_launch();

// ---- streams, events, graphs ----

void release_all_streams();
void release_all_graphs();

// A capture in progress: one graph being recorded by the streams that joined it.
struct Capture {
    std::unique_ptr<CUgraph_st> graph;
    CUstream_st* origin;
    CUstreamCaptureMode mode;
    std::thread::id thread;
    uint64_t id;
    bool invalidated = false;
    bool ended = false;
    Capture();
    ~Capture();
};
using CaptureRef = std::shared_ptr<Capture>;

}  // namespace emu::driver

struct CUstream_st {
    bool blocking;  // orders with the legacy default stream
    int priority;
    uint64_t id;
    emu::driver::OperationRef last;
    emu::driver::CaptureRef capture;            // while capturing
    std::vector<CUgraphNode_st*> capture_tail;  // what the next captured node waits for
};

struct CUevent_st {
    unsigned flags;
    struct Record {
        emu::driver::OperationRef operation;
        double milliseconds = 0;
    };
    std::shared_ptr<Record> record;   // null: never recorded
    emu::driver::CaptureRef capture;  // recorded last in this capture
    std::vector<CUgraphNode_st*> capture_tail;
};

struct CUgraphNode_st {
    CUgraph_st* graph;
    emu::driver::WorkRef work;
    std::vector<CUgraphNode_st*> waits_for;
    std::vector<void*> parameter_pointers;  // what cuGraphKernelNodeGetParams hands out
};

struct CUgraph_st {
    std::vector<std::unique_ptr<CUgraphNode_st>> nodes;  // each after those it waits for
};

namespace emu::driver {

// The stream behind a handle: 0 and CU_STREAM_LEGACY, CU_STREAM_PER_THREAD, or one that was created; else null.
CUstream_st* find_stream(CUstream handle);
bool is_legacy(const CUstream_st* stream);
// Appends work to a stream, or a node to the graph that the stream is recording. `operation`, where asked for, is null
// when it was recorded.
CUresult submit(CUstream_st* stream, WorkRef work, OperationRef* operation = nullptr);
// What a stream's next operation waits for.
std::vector<OperationRef> stream_order(CUstream_st* stream);
// Makes `operation` the last of its stream.
void stream_append(CUstream_st* stream, const OperationRef& operation);
CUresult synchronize_stream(CUstream_st* stream);
// Every stream there is: created ones, the legacy one and the threads' own.
std::vector<CUstream_st*> all_streams();

// The rules of capture (graph.cpp).
CUresult capture_node(CUstream_st* stream, WorkRef work);
// For calls that might wait or allocate behind the back of a capture: 900, and the captures concerned are invalid.
CUresult refuse_during_capture();
// For calls that wait for the whole context: 900 while any stream captures, and the captures are invalid.
CUresult refuse_while_capturing();
// For calls on a stream that a capturing stream does not allow.
CUresult refuse_on_capturing(CUstream_st* stream);
// A legacy stream's work would order with every blocking stream: 906 when one of those is capturing.
CUresult refuse_legacy_during_capture(CUstream_st* stream);
CUresult capture_wait(CUstream_st* stream, CUevent_st* event);
void leave_capture(CUstream_st* stream);

// ---- the driver's own state (driver.cpp) ----

struct Card {
    int major, minor, multiprocessors;
    int shared_opt_in, shared_per_multiprocessor;  // bytes
    int threads_per_multiprocessor, blocks_per_multiprocessor;
    int l2_bytes, clock_khz, memory_khz, bus_bits;
    const char* name;
};
const Card& card();

struct State {
    std::mutex mutex;
    bool initialised = false;
    int retained = 0;  // of the primary context
    bool context_alive = false;
    unsigned context_flags = 0;
    CUresult fault = CUDA_SUCCESS;  // the sticky error
    std::string last_error;         // the last text of say()
    uint64_t launches = 0;         // kernels that ran
    uint64_t single_launches = 0;  // asked for one by one, not to be recorded
    uint64_t graph_launches = 0;
    size_t memory_limit = 0;
};
State& state();
CUcontext primary_context();
// Printed on stderr as "[emu] ..." and kept for emu_last_error; returns `code`.
CUresult say(CUresult code, const char* format, ...) __attribute__((format(printf, 2, 3)));
// Kept for emu_last_error only: an ordinary refusal.
CUresult refuse(CUresult code, const char* format, ...) __attribute__((format(printf, 2, 3)));
// say(), and the context is faulty from here on.
CUresult fault(CUresult code, const char* format, ...) __attribute__((format(printf, 2, 3)));

enum class Needs { Nothing, Initialised, Context };
// Checks what a call needs; CUDA_SUCCESS: go on.
CUresult may_call(Needs needs);
// True on a thread that is inside a cuLaunchHostFunc callback, where no driver call is allowed.
extern thread_local bool in_host_function;

// The frame of every exported function: one at a time, the context's state checked, no exception out of the library.
template <class Body>
CUresult api(Needs needs, Body body) {
    if (in_host_function) return CUDA_ERROR_NOT_PERMITTED;
    std::lock_guard<std::mutex> lock(state().mutex);
    try {
        const CUresult status = may_call(needs);
        return status == CUDA_SUCCESS ? body() : status;
    } catch (const std::bad_alloc&) {
        return refuse(CUDA_ERROR_OUT_OF_MEMORY, "the host has no memory left");
    }
}

}  // namespace emu::driver
