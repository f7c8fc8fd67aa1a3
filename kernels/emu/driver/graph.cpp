// Stream capture and graphs. While a stream captures, its calls record nodes instead of queueing operations; a stream
// joins by waiting for an event that was recorded in the capture, and has to be joined back the same way. A node keeps
// the work it would have done, a kernel's arguments included. A replay appends one operation for each node, ordered by
// the graph's edges only, so that independent nodes run in a drawn order.
#include "driver.h"

#include <cstring>

struct CUgraphExec_st {
    struct Node {
        emu::driver::WorkRef work;
        std::vector<size_t> waits_for;
    };
    std::vector<Node> nodes;
    std::unordered_map<CUgraphNode_st*, size_t> index;  // of the graph's nodes, for changes of one node
    emu::driver::OperationRef last;                     // replays of one executable graph do not overlap
};

namespace emu::driver {

static std::unordered_map<CUgraph_st*, std::unique_ptr<CUgraph_st>>& graphs() {
    static auto* only = new std::unordered_map<CUgraph_st*, std::unique_ptr<CUgraph_st>>;
    return *only;
}
static std::unordered_map<CUgraphExec_st*, std::unique_ptr<CUgraphExec_st>>& executables() {
    static auto* only = new std::unordered_map<CUgraphExec_st*, std::unique_ptr<CUgraphExec_st>>;
    return *only;
}
static uint64_t capture_ids = 0;
static thread_local int interaction_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

Capture::Capture() : graph(new CUgraph_st) {}
Capture::~Capture() = default;

void release_all_graphs() {
    executables().clear();
    graphs().clear();
}

static std::vector<Capture*> active_captures() {
    std::vector<Capture*> active;
    for (CUstream_st* stream : all_streams()) {
        Capture* capture = stream->capture.get();
        if (capture && std::find(active.begin(), active.end(), capture) == active.end()) active.push_back(capture);
    }
    return active;
}

// ---- the rules ----

static CUresult invalid(const Capture& capture) {
    return refuse(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "capture %llu is invalid", (unsigned long long)capture.id);
}

static CUgraphNode_st* add_node(CUgraph_st& graph, WorkRef work, const std::vector<CUgraphNode_st*>& waits_for) {
    auto node = std::make_unique<CUgraphNode_st>();
    node->graph = &graph;
    node->work = std::move(work);
    node->waits_for = waits_for;
    graph.nodes.push_back(std::move(node));
    return graph.nodes.back().get();
}

CUresult capture_node(CUstream_st* stream, WorkRef work) {
    if (stream->capture->invalidated) return invalid(*stream->capture);
    stream->capture_tail = {add_node(*stream->capture->graph, std::move(work), stream->capture_tail)};
    return CUDA_SUCCESS;
}

CUresult refuse_during_capture() {
    CUresult result = CUDA_SUCCESS;
    for (Capture* capture : active_captures()) {
        const bool own = capture->thread == std::this_thread::get_id();
        const bool own_forbids = own && capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED &&
                                 interaction_mode != CU_STREAM_CAPTURE_MODE_RELAXED;
        const bool other_forbids =
            !own && capture->mode == CU_STREAM_CAPTURE_MODE_GLOBAL && interaction_mode == CU_STREAM_CAPTURE_MODE_GLOBAL;
        if (!own_forbids && !other_forbids) continue;
        capture->invalidated = true;
        result = refuse(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "not allowed while capture %llu is going on",
                        (unsigned long long)capture->id);
    }
    return result;
}

CUresult refuse_while_capturing() {
    CUresult result = CUDA_SUCCESS;
    for (Capture* capture : active_captures()) {
        capture->invalidated = true;
        result = refuse(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "the context cannot be waited for during capture %llu",
                        (unsigned long long)capture->id);
    }
    return result;
}

CUresult refuse_on_capturing(CUstream_st* stream) {
    if (!stream->capture) return CUDA_SUCCESS;
    stream->capture->invalidated = true;
    return refuse(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "a capturing stream cannot be waited for or asked");
}

CUresult refuse_legacy_during_capture(CUstream_st* stream) {
    if (!is_legacy(stream)) return CUDA_SUCCESS;
    CUresult result = CUDA_SUCCESS;
    for (CUstream_st* other : all_streams()) {
        if (!other->blocking || !other->capture) continue;
        other->capture->invalidated = true;
        result = refuse(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, "the legacy stream would wait for a capturing stream");
    }
    return result;
}

// cuStreamWaitEvent where the stream, the event or both belong to a capture.
CUresult capture_wait(CUstream_st* stream, CUevent_st* event) {
    if (stream->capture && stream->capture->invalidated) return invalid(*stream->capture);
    if (!event->capture) {
        if (!event->record) return CUDA_SUCCESS;
        stream->capture->invalidated = true;
        return refuse(CUDA_ERROR_STREAM_CAPTURE_ISOLATION,
                      "a capturing stream waits for an event from outside the capture");
    }
    if (event->capture->ended) {
        if (stream->capture) stream->capture->invalidated = true;
        return refuse(CUDA_ERROR_CAPTURED_EVENT, "the event was recorded in a capture that has ended");
    }
    if (event->capture->invalidated) return invalid(*event->capture);
    if (is_legacy(stream)) {
        event->capture->invalidated = true;
        return refuse(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, "the legacy stream cannot join a capture");
    }
    if (stream->capture && stream->capture != event->capture) {
        stream->capture->invalidated = event->capture->invalidated = true;
        return refuse(CUDA_ERROR_STREAM_CAPTURE_MERGE, "two captures would become one");
    }
    stream->capture = event->capture;
    for (CUgraphNode_st* node : event->capture_tail) {
        auto& tail = stream->capture_tail;
        if (std::find(tail.begin(), tail.end(), node) == tail.end()) tail.push_back(node);
    }
    return CUDA_SUCCESS;
}

static void end(const CaptureRef& capture) {
    capture->ended = true;
    for (CUstream_st* stream : all_streams()) {
        if (stream->capture != capture) continue;
        stream->capture = nullptr;
        stream->capture_tail.clear();
    }
}

// A stream that is destroyed: its capture cannot be completed any more.
void leave_capture(CUstream_st* stream) {
    if (!stream->capture) return;
    const CaptureRef capture = stream->capture;
    capture->invalidated = true;
    if (capture->origin == stream) end(capture);
    stream->capture = nullptr;
    stream->capture_tail.clear();
}

// Whether every node that nothing waits for is in the origin's tail: all forks came back.
static bool joined(const Capture& capture) {
    std::unordered_set<CUgraphNode_st*> waited_for;
    for (const auto& node : capture.graph->nodes) waited_for.insert(node->waits_for.begin(), node->waits_for.end());
    const auto& tail = capture.origin->capture_tail;
    for (const auto& node : capture.graph->nodes) {
        if (!waited_for.count(node.get()) && std::find(tail.begin(), tail.end(), node.get()) == tail.end())
            return false;
    }
    return true;
}

static CUgraph_st* find_graph(CUgraph handle) {
    const auto it = graphs().find(handle);
    if (it != graphs().end()) return it->second.get();
    for (Capture* capture : active_captures()) {  // as cuStreamGetCaptureInfo gave it out
        if (capture->graph.get() == handle) return handle;
    }
    return nullptr;
}

static CUgraphNode_st* find_node(CUgraphNode handle) {
    for (const auto& [key, graph] : graphs()) {
        for (const auto& node : graph->nodes) {
            if (node.get() == handle) return handle;
        }
    }
    return nullptr;
}

static CUgraphExec_st* find_executable(CUgraphExec handle) {
    const auto it = executables().find(handle);
    return it == executables().end() ? nullptr : it->second.get();
}

static CUresult unknown_graph(const char* call) { return refuse(CUDA_ERROR_INVALID_VALUE, "%s: no such graph", call); }

// The driver's way to hand out a list: without a place for it only its length.
template <class T>
static CUresult hand_out(const std::vector<T>& all, T* place, size_t* count) {
    if (!count) return CUDA_ERROR_INVALID_VALUE;
    if (place) {
        for (size_t i = 0; i < *count; i++) place[i] = i < all.size() ? all[i] : T();
        *count = std::min(*count, all.size());
    } else {
        *count = all.size();
    }
    return CUDA_SUCCESS;
}

// A dependent launch becomes a node that its own wait orders behind the kernel before it; what it comes after that is no
// kernel, it comes after altogether.
static CUgraphEdgeData edge_data(const CUgraphNode_st& from, const CUgraphNode_st& to) {
    CUgraphEdgeData data{};
    if (to.work->dependent() && from.work->type() == CU_GRAPH_NODE_TYPE_KERNEL) {
        data.from_port = CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC;
        data.type = CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC;
    }
    return data;
}

// Hands out the edges' data, or refuses to hand out the edges without it.
static CUresult hand_out_data(const std::vector<CUgraphEdgeData>& all, bool edges, CUgraphEdgeData* place, size_t count) {
    if (place) return hand_out(all, place, &count);
    const auto has_data = [](const CUgraphEdgeData& data) { return data.type || data.from_port || data.to_port; };
    if (edges && std::any_of(all.begin(), all.end(), has_data)) {
        return refuse(CUDA_ERROR_LOSSY_QUERY, "the edges have data, and there is no place for it");
    }
    return CUDA_SUCCESS;
}

static std::vector<CUgraphExec_st::Node> executable_nodes(const CUgraph_st& graph,
                                                          std::unordered_map<CUgraphNode_st*, size_t>& index) {
    std::vector<CUgraphExec_st::Node> nodes;
    for (const auto& node : graph.nodes) {
        CUgraphExec_st::Node copy{node->work, {}};
        for (CUgraphNode_st* earlier : node->waits_for) copy.waits_for.push_back(index.at(earlier));
        index[node.get()] = nodes.size();
        nodes.push_back(std::move(copy));
    }
    return nodes;
}

static CUresult instantiate(CUgraphExec* handle, CUgraph graph_handle, unsigned long long flags) {
    CUgraph_st* graph = find_graph(graph_handle);
    if (!handle || !graph) return unknown_graph("cuGraphInstantiate");
    const unsigned long long known = CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH |
                                     CUDA_GRAPH_INSTANTIATE_FLAG_UPLOAD | CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY;
    if (flags & ~known) return refuse(CUDA_ERROR_INVALID_VALUE, "cuGraphInstantiate with flags %#llx", flags);
    if (!creation_allowed()) return CUDA_ERROR_OUT_OF_MEMORY;
    auto executable = std::make_unique<CUgraphExec_st>();
    executable->nodes = executable_nodes(*graph, executable->index);
    *handle = executable.get();
    executables()[executable.get()] = std::move(executable);
    return CUDA_SUCCESS;
}

// A graph launched into a capturing stream: its nodes become nodes of the graph being recorded.
static CUresult record_replay(CUstream_st* stream, const CUgraphExec_st& executable) {
    if (stream->capture->invalidated) return invalid(*stream->capture);
    std::vector<CUgraphNode_st*> nodes, leaves;
    std::vector<bool> waited_for(executable.nodes.size());
    for (const auto& node : executable.nodes) {
        std::vector<CUgraphNode_st*> earlier;
        for (size_t i : node.waits_for) earlier.push_back(nodes[i]), waited_for[i] = true;
        if (earlier.empty()) earlier = stream->capture_tail;
        nodes.push_back(add_node(*stream->capture->graph, node.work, earlier));
    }
    for (size_t i = 0; i < nodes.size(); i++) {
        if (!waited_for[i]) leaves.push_back(nodes[i]);
    }
    if (!leaves.empty()) stream->capture_tail = leaves;
    return CUDA_SUCCESS;
}

static CUresult replay(CUgraphExec handle, CUstream stream_handle) {
    CUgraphExec_st* executable = find_executable(handle);
    if (!executable) return refuse(CUDA_ERROR_INVALID_VALUE, "cuGraphLaunch: no such executable graph");
    CUstream_st* stream = find_stream(stream_handle);
    if (!stream) return refuse(CUDA_ERROR_INVALID_HANDLE, "cuGraphLaunch: no such stream");
    if (stream->capture) return record_replay(stream, *executable);
    if (const CUresult e = refuse_legacy_during_capture(stream)) return e;
    state().graph_launches++;
    Hold hold;
    std::vector<OperationRef> start = stream_order(stream);
    start.push_back(executable->last);
    const OperationRef gate = append(nullptr, start);
    std::vector<OperationRef> operations{gate};
    for (const auto& node : executable->nodes) {
        std::vector<OperationRef> earlier{gate};
        for (size_t i : node.waits_for) earlier.push_back(operations[i + 1]);
        operations.push_back(append(node.work, earlier));
    }
    executable->last = append(nullptr, operations);
    stream_append(stream, executable->last);
    return CUDA_SUCCESS;
}

}  // namespace emu::driver

using namespace emu::driver;

// ---- capture ----

EMU_EXPORT CUresult cuStreamBeginCapture_v2(CUstream handle, CUstreamCaptureMode mode) {
    return api(Needs::Context, [&]() -> CUresult {
        CUstream_st* stream = find_stream(handle);
        if (!stream) return refuse(CUDA_ERROR_INVALID_HANDLE, "cuStreamBeginCapture: no such stream");
        if (int(mode) < 0 || int(mode) > 2) return refuse(CUDA_ERROR_INVALID_VALUE, "capture mode %d", int(mode));
        if (is_legacy(stream)) {
            return refuse(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "the legacy default stream cannot capture");
        }
        if (stream->capture) return refuse(CUDA_ERROR_ILLEGAL_STATE, "the stream captures already");
        if (!creation_allowed()) return CUDA_ERROR_OUT_OF_MEMORY;
        auto capture = std::make_shared<Capture>();
        capture->origin = stream;
        capture->mode = mode;
        capture->thread = std::this_thread::get_id();
        capture->id = ++capture_ids;
        stream->capture = capture;
        stream->capture_tail.clear();
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuStreamEndCapture(CUstream handle, CUgraph* graph) {
    return api(Needs::Context, [&]() -> CUresult {
        CUstream_st* stream = find_stream(handle);
        if (!stream) return refuse(CUDA_ERROR_INVALID_HANDLE, "cuStreamEndCapture: no such stream");
        if (!graph) return CUDA_ERROR_INVALID_VALUE;
        *graph = nullptr;
        if (!stream->capture) return refuse(CUDA_ERROR_ILLEGAL_STATE, "the stream does not capture");
        const CaptureRef capture = stream->capture;
        if (capture->origin != stream) {
            capture->invalidated = true;
            return refuse(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, "the capture began in another stream");
        }
        if (capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED && capture->thread != std::this_thread::get_id()) {
            return refuse(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, "the capture began on another thread");
        }
        const bool all_joined = joined(*capture);
        end(capture);
        if (capture->invalidated) return invalid(*capture);
        if (!all_joined) {
            return refuse(CUDA_ERROR_STREAM_CAPTURE_UNJOINED, "a stream that joined the capture was not joined back");
        }
        *graph = capture->graph.get();
        graphs()[*graph] = std::move(capture->graph);
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus* status) {
    return api(Needs::Context, [&]() -> CUresult {
        CUstream_st* stream = find_stream(handle);
        if (!stream) return refuse(CUDA_ERROR_INVALID_HANDLE, "cuStreamIsCapturing: no such stream");
        if (!status) return CUDA_ERROR_INVALID_VALUE;
        if (const CUresult e = refuse_legacy_during_capture(stream)) return e;
        *status = CUstreamCaptureStatus(!stream->capture               ? CU_STREAM_CAPTURE_STATUS_NONE
                                        : stream->capture->invalidated ? CU_STREAM_CAPTURE_STATUS_INVALIDATED
                                                                       : CU_STREAM_CAPTURE_STATUS_ACTIVE);
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuStreamGetCaptureInfo_v3(CUstream handle, CUstreamCaptureStatus* status, cuuint64_t* id,
                                              CUgraph* graph, const CUgraphNode** dependencies,
                                              const CUgraphEdgeData** edges, size_t* count) {
    if (const CUresult e = cuStreamIsCapturing(handle, status)) return e;
    return api(Needs::Context, [&]() -> CUresult {
        CUstream_st* stream = find_stream(handle);
        const bool capturing = stream && stream->capture;
        if (id) *id = capturing ? stream->capture->id : 0;
        if (graph) *graph = capturing ? stream->capture->graph.get() : nullptr;
        if (dependencies) *dependencies = capturing ? stream->capture_tail.data() : nullptr;
        if (edges) *edges = nullptr;
        if (count) *count = capturing ? stream->capture_tail.size() : 0;
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuStreamGetCaptureInfo_v2(CUstream handle, CUstreamCaptureStatus* status, cuuint64_t* id,
                                              CUgraph* graph, const CUgraphNode** dependencies, size_t* count) {
    return cuStreamGetCaptureInfo_v3(handle, status, id, graph, dependencies, nullptr, count);
}

EMU_EXPORT CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
    return api(Needs::Initialised, [&]() -> CUresult {
        if (!mode || int(*mode) < 0 || int(*mode) > 2) return CUDA_ERROR_INVALID_VALUE;
        const int before = interaction_mode;
        interaction_mode = int(*mode);
        *mode = CUstreamCaptureMode(before);
        return CUDA_SUCCESS;
    });
}

// ---- graphs ----

EMU_EXPORT CUresult cuGraphDestroy(CUgraph handle) {
    return api(Needs::Context, [&]() -> CUresult {
        const auto it = graphs().find(handle);
        if (it == graphs().end()) return unknown_graph("cuGraphDestroy");
        for (const auto& [key, executable] : executables()) {
            for (const auto& node : it->second->nodes) executable->index.erase(node.get());
        }
        graphs().erase(it);
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuGraphGetNodes(CUgraph handle, CUgraphNode* place, size_t* count) {
    return api(Needs::Context, [&]() -> CUresult {
        CUgraph_st* graph = find_graph(handle);
        if (!graph) return unknown_graph("cuGraphGetNodes");
        std::vector<CUgraphNode> all;
        for (const auto& node : graph->nodes) all.push_back(node.get());
        return hand_out(all, place, count);
    });
}

EMU_EXPORT CUresult cuGraphGetRootNodes(CUgraph handle, CUgraphNode* place, size_t* count) {
    return api(Needs::Context, [&]() -> CUresult {
        CUgraph_st* graph = find_graph(handle);
        if (!graph) return unknown_graph("cuGraphGetRootNodes");
        std::vector<CUgraphNode> roots;
        for (const auto& node : graph->nodes) {
            if (node->waits_for.empty()) roots.push_back(node.get());
        }
        return hand_out(roots, place, count);
    });
}

EMU_EXPORT CUresult cuGraphGetEdges_v2(CUgraph handle, CUgraphNode* from, CUgraphNode* to, CUgraphEdgeData* data,
                                       size_t* count) {
    return api(Needs::Context, [&]() -> CUresult {
        CUgraph_st* graph = find_graph(handle);
        if (!graph) return unknown_graph("cuGraphGetEdges");
        if (!count || !from != !to) return CUDA_ERROR_INVALID_VALUE;
        std::vector<CUgraphNode> sources, targets;
        std::vector<CUgraphEdgeData> all;
        for (const auto& node : graph->nodes) {
            for (CUgraphNode_st* earlier : node->waits_for) {
                sources.push_back(earlier), targets.push_back(node.get());
                all.push_back(edge_data(*earlier, *node));
            }
        }
        const size_t room = *count;
        if (const CUresult e = hand_out_data(all, from, data, room)) return e;
        if (const CUresult e = hand_out(sources, from, count)) return e;
        *count = room;
        return hand_out(targets, to, count);
    });
}

EMU_EXPORT CUresult cuGraphNodeGetDependencies_v2(CUgraphNode handle, CUgraphNode* place, CUgraphEdgeData* data,
                                                  size_t* count) {
    return api(Needs::Context, [&]() -> CUresult {
        CUgraphNode_st* node = find_node(handle);
        if (!node || !count) return refuse(CUDA_ERROR_INVALID_VALUE, "no such graph node");
        std::vector<CUgraphEdgeData> all;
        for (CUgraphNode_st* earlier : node->waits_for) all.push_back(edge_data(*earlier, *node));
        if (const CUresult e = hand_out_data(all, place, data, *count)) return e;
        return hand_out(node->waits_for, place, count);
    });
}

EMU_EXPORT CUresult cuGraphNodeGetType(CUgraphNode handle, CUgraphNodeType* type) {
    return api(Needs::Context, [&]() -> CUresult {
        CUgraphNode_st* node = find_node(handle);
        if (!node || !type) return refuse(CUDA_ERROR_INVALID_VALUE, "no such graph node");
        *type = node->work->type();
        return CUDA_SUCCESS;
    });
}

// The pointers handed out stay good until the node's parameters are asked for again or its graph is destroyed.
EMU_EXPORT CUresult cuGraphKernelNodeGetParams_v2(CUgraphNode handle, CUDA_KERNEL_NODE_PARAMS* params) {
    return api(Needs::Context, [&]() -> CUresult {
        CUgraphNode_st* node = find_node(handle);
        if (!node || !params || node->work->type() != CU_GRAPH_NODE_TYPE_KERNEL) {
            return refuse(CUDA_ERROR_INVALID_VALUE, "no such kernel node");
        }
        describe_launch(*node->work, *params, node->parameter_pointers);
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuGraphKernelNodeSetParams_v2(CUgraphNode handle, const CUDA_KERNEL_NODE_PARAMS* params) {
    return api(Needs::Context, [&]() -> CUresult {
        CUgraphNode_st* node = find_node(handle);
        if (!node || !params || node->work->type() != CU_GRAPH_NODE_TYPE_KERNEL) {
            return refuse(CUDA_ERROR_INVALID_VALUE, "no such kernel node");
        }
        WorkRef work = node->work;
        if (const CUresult e = prepare_launch(*params, work)) return e;
        node->work = work;
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph graph, unsigned long long flags) {
    return api(Needs::Context, [&] { return instantiate(executable, graph, flags); });
}

// ---- executable graphs ----

EMU_EXPORT CUresult cuGraphLaunch(CUgraphExec executable, CUstream stream) {
    return api(Needs::Context, [&] { return replay(executable, stream); });
}

EMU_EXPORT CUresult cuGraphUpload(CUgraphExec executable, CUstream stream) {
    return api(Needs::Context, [&]() -> CUresult {
        if (!find_executable(executable))
            return refuse(CUDA_ERROR_INVALID_VALUE, "cuGraphUpload: no such executable graph");
        return find_stream(stream) ? CUDA_SUCCESS : refuse(CUDA_ERROR_INVALID_HANDLE, "cuGraphUpload: no such stream");
    });
}

// A replay that is under way goes on.
EMU_EXPORT CUresult cuGraphExecDestroy(CUgraphExec executable) {
    return api(Needs::Context, [&]() -> CUresult {
        if (!find_executable(executable)) return refuse(CUDA_ERROR_INVALID_VALUE, "no such executable graph");
        executables().erase(executable);
        return CUDA_SUCCESS;
    });
}

EMU_EXPORT CUresult cuGraphExecKernelNodeSetParams_v2(CUgraphExec handle, CUgraphNode node,
                                                      const CUDA_KERNEL_NODE_PARAMS* params) {
    return api(Needs::Context, [&]() -> CUresult {
        CUgraphExec_st* executable = find_executable(handle);
        if (!executable || !params || !executable->index.count(node)) {
            return refuse(CUDA_ERROR_INVALID_VALUE, "no such node of an executable graph");
        }
        auto& target = executable->nodes[executable->index[node]];
        if (target.work->type() != CU_GRAPH_NODE_TYPE_KERNEL) return refuse(CUDA_ERROR_INVALID_VALUE, "no kernel node");
        WorkRef work = target.work;
        if (const CUresult e = prepare_launch(*params, work)) return e;
        target.work = work;
        return CUDA_SUCCESS;
    });
}

// The same nodes and edges in the same order, with other parameters.
EMU_EXPORT CUresult cuGraphExecUpdate_v2(CUgraphExec handle, CUgraph graph_handle, CUgraphExecUpdateResultInfo* info) {
    return api(Needs::Context, [&]() -> CUresult {
        CUgraphExec_st* executable = find_executable(handle);
        CUgraph_st* graph = find_graph(graph_handle);
        if (!executable || !graph || !info) return unknown_graph("cuGraphExecUpdate");
        *info = {};
        std::unordered_map<CUgraphNode_st*, size_t> index;
        auto nodes = executable_nodes(*graph, index);
        bool same = nodes.size() == executable->nodes.size();
        for (size_t i = 0; same && i < nodes.size(); i++) same = nodes[i].waits_for == executable->nodes[i].waits_for;
        if (!same) {
            info->result = CUgraphExecUpdateResult(CU_GRAPH_EXEC_UPDATE_ERROR_TOPOLOGY_CHANGED);
            return refuse(CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE, "the graph has other nodes or edges");
        }
        for (size_t i = 0; i < nodes.size(); i++) {
            if (nodes[i].work->type() == executable->nodes[i].work->type()) continue;
            info->result = CUgraphExecUpdateResult(CU_GRAPH_EXEC_UPDATE_ERROR_NODE_TYPE_CHANGED);
            info->errorNode = graph->nodes[i].get();
            return refuse(CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE, "node %zu is of another type", i);
        }
        executable->nodes = std::move(nodes);
        return CUDA_SUCCESS;
    });
}
