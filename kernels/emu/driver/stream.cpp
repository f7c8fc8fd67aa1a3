// Streams and events. A stream is no queue of its own: it only remembers its last operation, which its next one waits
// for. The legacy default stream (handle 0) orders with every blocking stream, in both directions.
#include "driver.h"

#include <chrono>

namespace emu::driver {

static std::unordered_map<CUstream_st*, std::unique_ptr<CUstream_st>>& streams() {
    static auto* only = new std::unordered_map<CUstream_st*, std::unique_ptr<CUstream_st>>;
    return *only;
}
static std::unordered_map<CUevent_st*, std::unique_ptr<CUevent_st>>& events() {
    static auto* only = new std::unordered_map<CUevent_st*, std::unique_ptr<CUevent_st>>;
    return *only;
}
// CU_STREAM_PER_THREAD: a blocking stream for each thread that asked for it.
static std::unordered_map<std::thread::id, std::unique_ptr<CUstream_st>>& thread_streams() {
    static auto* only = new std::unordered_map<std::thread::id, std::unique_ptr<CUstream_st>>;
    return *only;
}
static CUstream_st& legacy_stream() {
    static auto* only = new CUstream_st{true, 0, 1, nullptr, nullptr, {}};
    return *only;
}
// Last operations of blocking streams that were destroyed: the legacy stream still orders after them.
static std::vector<OperationRef> orphans;
static uint64_t stream_ids = 2;

CUstream_st* find_stream(CUstream handle) {
    if (!handle || handle == CU_STREAM_LEGACY) return &legacy_stream();
    if (handle == CU_STREAM_PER_THREAD) {
        auto& own = thread_streams()[std::this_thread::get_id()];
        if (!own) own.reset(new CUstream_st{true, 0, ++stream_ids, nullptr, nullptr, {}});
        return own.get();
    }
    const auto it = streams().find(handle);
    return it == streams().end() ? nullptr : it->second.get();
}

bool is_legacy(const CUstream_st* stream) { return stream == &legacy_stream(); }

std::vector<CUstream_st*> all_streams() {
    std::vector<CUstream_st*> all{&legacy_stream()};
    for (const auto& [id, stream] : thread_streams()) all.push_back(stream.get());
    for (const auto& [handle, stream] : streams()) all.push_back(stream.get());
    return all;
}

std::vector<OperationRef> stream_order(CUstream_st* stream) {
    std::vector<OperationRef> earlier{stream->last};
    if (is_legacy(stream)) {
        for (CUstream_st* other : all_streams()) {
            if (other->blocking && other != stream) earlier.push_back(other->last);
        }
        earlier.insert(earlier.end(), orphans.begin(), orphans.end());
        orphans.clear();
    } else if (stream->blocking) {
        earlier.push_back(legacy_stream().last);
    }
    return earlier;
}

void stream_append(CUstream_st* stream, const OperationRef& operation) { stream->last = operation; }

CUresult submit(CUstream_st* stream, WorkRef work, OperationRef* operation) {
    if (operation) *operation = nullptr;
    if (stream->capture) return capture_node(stream, std::move(work));
    if (const CUresult e = refuse_legacy_during_capture(stream)) return e;
    const OperationRef appended = append(std::move(work), stream_order(stream));
    stream_append(stream, appended);
    if (operation) *operation = appended;
    return CUDA_SUCCESS;
}

CUresult synchronize_stream(CUstream_st* stream) {
    if (const CUresult e = refuse_on_capturing(stream)) return e;
    if (const CUresult e = refuse_legacy_during_capture(stream)) return e;
    return wait_for(stream->last);
}

void release_all_streams() {
    for (CUstream_st* stream : all_streams()) leave_capture(stream);
    streams().clear();
    events().clear();
    thread_streams().clear();
    legacy_stream().last = nullptr;
    orphans.clear();
}

static CUevent_st* find_event(CUevent handle) {
    const auto it = events().find(handle);
    return it == events().end() ? nullptr : it->second.get();
}

static double milliseconds_now() {
    using namespace std::chrono;
    return duration<double, std::milli>(steady_clock::now().time_since_epoch()).count();
}

// The moment at which an event's stream got there.
struct TimestampWork : Work {
    std::shared_ptr<CUevent_st::Record> record;
    explicit TimestampWork(std::shared_ptr<CUevent_st::Record> r) : record(std::move(r)) {}
    CUgraphNodeType type() const override { return CU_GRAPH_NODE_TYPE_EMPTY; }
    CUresult run() override {
        record->milliseconds = milliseconds_now();
        return CUDA_SUCCESS;
    }
};

// A callback of the host; it may not call the driver.
struct HostWork : Work {
    CUhostFn function;
    void* argument;
    HostWork(CUhostFn f, void* a) : function(f), argument(a) {}
    CUgraphNodeType type() const override { return CU_GRAPH_NODE_TYPE_HOST; }
    CUresult run() override {
        in_host_function = true;
        function(argument);
        in_host_function = false;
        return CUDA_SUCCESS;
    }
};

static CUresult create_stream(CUstream* handle, unsigned flags, int priority) {
    if (!handle || (flags & ~unsigned(CU_STREAM_NON_BLOCKING))) {
        return refuse(CUDA_ERROR_INVALID_VALUE, "cuStreamCreate with flags %#x", flags);
    }
    if (!creation_allowed()) return CUDA_ERROR_OUT_OF_MEMORY;
    auto stream = std::make_unique<CUstream_st>();
    stream->blocking = !(flags & CU_STREAM_NON_BLOCKING);
    stream->priority = std::min(0, std::max(-5, priority));
    stream->id = ++stream_ids;
    *handle = stream.get();
    streams()[stream.get()] = std::move(stream);
    return CUDA_SUCCESS;
}

static CUresult unknown_stream(const char* call) {
    return refuse(CUDA_ERROR_INVALID_HANDLE, "%s: no such stream", call);
}
static CUresult unknown_event(const char* call) { return refuse(CUDA_ERROR_INVALID_HANDLE, "%s: no such event", call); }

static CUresult record_event(CUevent event_handle, CUstream stream_handle) {
    CUevent_st* event = find_event(event_handle);
    if (!event) return unknown_event("cuEventRecord");
    CUstream_st* stream = find_stream(stream_handle);
    if (!stream) return unknown_stream("cuEventRecord");
    if (stream->capture) {
        if (stream->capture->invalidated)
            return refuse(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "the capture is invalid");
        event->capture = stream->capture;
        event->capture_tail = stream->capture_tail;
        return CUDA_SUCCESS;
    }
    auto record = std::make_shared<CUevent_st::Record>();
    if (const CUresult e = submit(stream, std::make_shared<TimestampWork>(record), &record->operation)) return e;
    event->record = record;
    event->capture = nullptr;
    event->capture_tail.clear();
    return CUDA_SUCCESS;
}

}  // namespace emu::driver

using namespace emu::driver;

// ---- streams ----

EMU_EXPORT CUresult cuStreamCreate(CUstream* stream, unsigned flags) {
    return api(Needs::Context, [&] { return create_stream(stream, flags, 0); });
}

EMU_EXPORT CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int priority) {
    return api(Needs::Context, [&] { return create_stream(stream, flags, priority); });
}

// Work that is under way goes on.
EMU_EXPORT CUresult cuStreamDestroy_v2(CUstream handle) {
    return api(Needs::Context, [&]() -> CUresult {
        CUstream_st* stream = find_stream(handle);
        if (!stream || is_legacy(stream) || handle == CU_STREAM_PER_THREAD) return unknown_stream("cuStreamDestroy");
        leave_capture(stream);
        if (stream->blocking && stream->last && !stream->last->done) orphans.push_back(stream->last);
        streams().erase(handle);
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuStreamSynchronize(CUstream handle) {
    return api(Needs::Context, [&]() -> CUresult {
        CUstream_st* stream = find_stream(handle);
        if (!stream) return unknown_stream("cuStreamSynchronize");
        return synchronize_stream(stream);
    });
}

EMU_EXPORT CUresult cuStreamQuery(CUstream handle) {
    return api(Needs::Context, [&]() -> CUresult {
        CUstream_st* stream = find_stream(handle);
        if (!stream) return unknown_stream("cuStreamQuery");
        if (const CUresult e = refuse_on_capturing(stream)) return e;
        if (const CUresult e = refuse_legacy_during_capture(stream)) return e;
        if (!stream->last || stream->last->done) return CUDA_SUCCESS;
        make_progress(stream->last);
        return state().fault ? state().fault : CUDA_ERROR_NOT_READY;
    });
}

EMU_EXPORT CUresult cuStreamWaitEvent(CUstream stream_handle, CUevent event_handle, unsigned flags) {
    return api(Needs::Context, [&]() -> CUresult {
        CUstream_st* stream = find_stream(stream_handle);
        if (!stream) return unknown_stream("cuStreamWaitEvent");
        CUevent_st* event = find_event(event_handle);
        if (!event) return unknown_event("cuStreamWaitEvent");
        if (flags > 1) return refuse(CUDA_ERROR_INVALID_VALUE, "cuStreamWaitEvent with flags %#x", flags);
        if (stream->capture || event->capture) return capture_wait(stream, event);
        if (!event->record) return CUDA_SUCCESS;
        if (const CUresult e = refuse_legacy_during_capture(stream)) return e;
        std::vector<OperationRef> earlier = stream_order(stream);
        earlier.push_back(event->record->operation);
        stream_append(stream, append(nullptr, earlier));
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuStreamGetFlags(CUstream handle, unsigned* flags) {
    return api(Needs::Context, [&]() -> CUresult {
        CUstream_st* stream = find_stream(handle);
        if (!stream) return unknown_stream("cuStreamGetFlags");
        if (!flags) return CUDA_ERROR_INVALID_VALUE;
        *flags = stream->blocking ? CU_STREAM_DEFAULT : CU_STREAM_NON_BLOCKING;
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuStreamGetPriority(CUstream handle, int* priority) {
    return api(Needs::Context, [&]() -> CUresult {
        CUstream_st* stream = find_stream(handle);
        if (!stream) return unknown_stream("cuStreamGetPriority");
        if (!priority) return CUDA_ERROR_INVALID_VALUE;
        *priority = stream->priority;
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuStreamGetId(CUstream handle, unsigned long long* id) {
    return api(Needs::Context, [&]() -> CUresult {
        CUstream_st* stream = find_stream(handle);
        if (!stream) return unknown_stream("cuStreamGetId");
        if (!id) return CUDA_ERROR_INVALID_VALUE;
        *id = stream->id;
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuStreamGetCtx(CUstream handle, CUcontext* context) {
    return api(Needs::Context, [&]() -> CUresult {
        if (!find_stream(handle)) return unknown_stream("cuStreamGetCtx");
        if (!context) return CUDA_ERROR_INVALID_VALUE;
        *context = primary_context();
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuLaunchHostFunc(CUstream handle, CUhostFn function, void* argument) {
    return api(Needs::Context, [&]() -> CUresult {
        CUstream_st* stream = find_stream(handle);
        if (!stream) return unknown_stream("cuLaunchHostFunc");
        if (!function) return CUDA_ERROR_INVALID_VALUE;
        return submit(stream, std::make_shared<HostWork>(function, argument));
    });
}

// ---- events ----

EMU_EXPORT CUresult cuEventCreate(CUevent* handle, unsigned flags) {
    return api(Needs::Context, [&]() -> CUresult {
        const unsigned known = CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING | CU_EVENT_INTERPROCESS;
        if (!handle || (flags & ~known)) return refuse(CUDA_ERROR_INVALID_VALUE, "cuEventCreate with flags %#x", flags);
        if (!creation_allowed()) return CUDA_ERROR_OUT_OF_MEMORY;
        auto event = std::make_unique<CUevent_st>();
        event->flags = flags;
        *handle = event.get();
        events()[event.get()] = std::move(event);
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuEventDestroy_v2(CUevent handle) {
    return api(Needs::Context, [&]() -> CUresult {
        if (!find_event(handle)) return unknown_event("cuEventDestroy");
        events().erase(handle);
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuEventRecord(CUevent event, CUstream stream) {
    return api(Needs::Context, [&] { return record_event(event, stream); });
}

EMU_EXPORT CUresult cuEventRecordWithFlags(CUevent event, CUstream stream, unsigned flags) {
    return api(Needs::Context, [&]() -> CUresult {
        if (flags) return say(CUDA_ERROR_NOT_SUPPORTED, "external event records are not emulated");
        return record_event(event, stream);
    });
}

EMU_EXPORT CUresult cuEventQuery(CUevent handle) {
    return api(Needs::Context, [&]() -> CUresult {
        CUevent_st* event = find_event(handle);
        if (!event) return unknown_event("cuEventQuery");
        if (event->capture) return refuse(CUDA_ERROR_CAPTURED_EVENT, "the event was recorded in a capture");
        if (const CUresult e = refuse_during_capture()) return e;
        if (!event->record || event->record->operation->done) return CUDA_SUCCESS;
        make_progress(event->record->operation);
        return state().fault ? state().fault : CUDA_ERROR_NOT_READY;
    });
}

EMU_EXPORT CUresult cuEventSynchronize(CUevent handle) {
    return api(Needs::Context, [&]() -> CUresult {
        CUevent_st* event = find_event(handle);
        if (!event) return unknown_event("cuEventSynchronize");
        if (event->capture) return refuse(CUDA_ERROR_CAPTURED_EVENT, "the event was recorded in a capture");
        if (const CUresult e = refuse_during_capture()) return e;
        return event->record ? wait_for(event->record->operation) : CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuEventElapsedTime_v2(float* milliseconds, CUevent start_handle, CUevent end_handle) {
    return api(Needs::Context, [&]() -> CUresult {
        CUevent_st *start = find_event(start_handle), *end = find_event(end_handle);
        if (!start || !end) return unknown_event("cuEventElapsedTime");
        if (!milliseconds) return CUDA_ERROR_INVALID_VALUE;
        if (start->capture || end->capture)
            return refuse(CUDA_ERROR_CAPTURED_EVENT, "an event was recorded in a capture");
        if ((start->flags | end->flags) & CU_EVENT_DISABLE_TIMING) {
            return refuse(CUDA_ERROR_INVALID_HANDLE, "cuEventElapsedTime: an event was made without timing");
        }
        if (!start->record || !end->record) return refuse(CUDA_ERROR_INVALID_HANDLE, "an event was never recorded");
        if (!start->record->operation->done || !end->record->operation->done) {
            return refuse(CUDA_ERROR_NOT_READY, "cuEventElapsedTime: an event has not happened yet");
        }
        *milliseconds = float(end->record->milliseconds - start->record->milliseconds);
        return CUDA_SUCCESS;
    });
}

#ifndef EMU_CUDA_H  // the real header has renamed it away
EMU_EXPORT CUresult cuEventElapsedTime(float* milliseconds, CUevent start, CUevent end) {
    return cuEventElapsedTime_v2(milliseconds, start, end);
}
#endif
