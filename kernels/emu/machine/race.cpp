// The race detector. Kernels of the race build are compiled with -fsanitize=thread and linked without its library: the
// functions that the instrumentation calls are here, and the emulator's primitives report what they touch themselves.
//
// Happens-before by vector clocks (as in FastTrack, Flanagan and Freund 2009). Agents are the threads of a block, the
// asynchronous copies of each, the wgmmas of each warpgroup and the TMA of each mbarrier. An agent's events are numbered;
// a thread knows, for each agent, up to which event everything has happened before what it does now. Barriers, __syncwarp,
// mbarriers and waits pass this knowledge on; shuffles, votes and atomics do not. For every two bytes of memory the last
// write and some reads since are kept; an access that does not know of a conflicting one is a race, whether or not this
// schedule had them in the wrong order.
//
// The blocks of a cluster are one such system. Between clusters, which run one after the other here, knowledge passes through
// the addresses of atomics: a release leaves there what its thread knows of its own cluster and of others, an acquire takes
// it. __threadfence makes the relaxed atomics after it release what was known then, and acquires what those before it met.
//
// A dependent launch (programmatic stream serialization) is checked against the accesses of those before it, which are
// ordered only with threads that know of a wait_for_previous.
//
// Shared memory: also reads of what nothing wrote. Global memory: within a cluster as above; two clusters of a launch are
// ordered by nothing else, so only atomics may meet. Reads kept per place are few (four, of different warps where possible; two in
// global memory), so a race with a place's many readers is found by one of them, not by all.
#ifdef EMU_RACE
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O2")  // the race build is -O1, and half of its time is spent here
#endif
#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <set>

#include "machine.h"

namespace emu::race {

// Threads of a block that may store by TMA: each one's stores are two agents, their reads and their writes.
constexpr unsigned kBulkThreads = 64, kTmaAgents = 32;
constexpr unsigned kMaxClusterThreads = kMaxCluster * kMaxThreads;
// And one that stands for the previous launch.
constexpr unsigned kMaxAgents =
    2 * kMaxClusterThreads + kMaxCluster * (kWarpgroups + kTmaAgents + 2 * kBulkThreads) + 1;
constexpr unsigned kGranule = 2;  // bytes; neighbouring f16 of two threads do not conflict

struct Knowledge;
// What is known of earlier clusters, by their number: never changed once it is shared.
struct Foreign {
    uint32_t users;
    std::vector<std::pair<uint32_t, Knowledge*>> of;  // in order
};

struct Knowledge {
    uint32_t users;
    Knowledge* last;  // joined into this one latest: a barrier's threads mostly share theirs
    Foreign* foreign;
    uint32_t known[kMaxAgents];
};

struct Event {
    uint32_t clock;
    uint16_t agent, where;
};
struct SharedCell {
    uint32_t block;  // the serial number of the block that it speaks of
    Event write, atomic, read[4];  // the last plain write, and the last atomic since
    uint8_t reads, latest;
    bool has_write, has_atomic, written;
};

struct GlobalEvent {
    uint32_t block, clock;
    uint16_t agent, where;
};
struct GlobalCell {
    GlobalEvent write, atomic, read[2];
    uint8_t reads;
    uint8_t written;  // a bit per byte of the last write: two threads may write neighbouring bytes
    bool has_write, has_atomic;
};
struct GlobalPage {
    uint64_t launch;
    GlobalCell cell[kPage / kGranule];
};

struct Range {
    uintptr_t begin, end;
};

// What a dependent launch has to know of the one before it.
struct PreviousLaunch {
    std::string name;
    uint32_t first = 0, clusters = 0;      // its clusters' numbers
    uint32_t unfinished = 0;               // from this number on, others might run when it began
    bool waited = true;                    // a thread did, so it ended after all before it
    bool let_next_start_early = false;     // before it had waited itself
};

struct State {
    unsigned threads = 0, agents, blocks, threads_of_block;
    std::vector<Knowledge*> free;
    // Of the cluster's threads, block by block.
    Knowledge* known[kMaxClusterThreads] = {};
    uint32_t clock[kMaxClusterThreads];       // of the thread's own events
    uint32_t copies[kMaxClusterThreads];      // groups of its asynchronous copies that it waited for
    uint32_t multiplies[kMaxClusterThreads];  // groups of its warpgroup's wgmmas
    uint16_t warpgroup[kMaxClusterThreads];   // its number in the cluster
    uint32_t fenced[kMaxClusterThreads];      // its clock at its latest fence.proxy.async of shared memory
    uint32_t fenced_global[kMaxClusterThreads];
    uint16_t bulk_number[kMaxClusterThreads];  // 1 and up, of the threads that store by TMA
    unsigned bulk_threads;
    // Groups of their stores that they waited for.
    uint32_t bulk_read[kMaxCluster * kBulkThreads + 1], bulk_written[kMaxCluster * kBulkThreads + 1];
    Knowledge* at_fence[kMaxClusterThreads] = {};  // what was known at the latest __threadfence
    Foreign* met[kMaxClusterThreads] = {};         // by relaxed atomics since
    std::unordered_map<uintptr_t, Foreign*> released;  // at addresses of atomics
    struct Remote {
        uint32_t clock;
        uint16_t where;
    };
    std::vector<Remote> remote;  // latest access of each thread to each other block's shared memory
    std::vector<SharedCell> shared;
    uint32_t block_serial = 0;
    uint64_t launch_serial = 0;
    PreviousLaunch launch, previous;
    std::unordered_map<uintptr_t, GlobalPage*> pages;
    std::pair<uintptr_t, GlobalPage*> recent_page[64] = {};
    Range allocation[8];
    unsigned next_allocation;
    Range image;
    std::set<std::tuple<const char*, uint16_t, uint16_t>> reported;

    // Agents: the threads, their copies, the wgmmas, TMA into each block's shared memory, stores by TMA, the previous launch.
    unsigned wgmma_agents() const { return 2 * threads; }
    unsigned tma_agents() const { return wgmma_agents() + blocks * kWarpgroups; }
    unsigned bulk_agents() const { return tma_agents() + blocks * kTmaAgents; }
    unsigned previous_launch() const { return bulk_agents() + blocks * 2 * kBulkThreads; }
    uint32_t cluster_number() const { return launch.first + uint32_t(machine->cluster->number); }
};

static State& state() { return *machine->cluster->block[0]->race; }
static unsigned running() { return machine->first_thread + cur->index; }

// ---- places in the source: a pc of instrumented code, or a Loc with its line in the upper 16 bits ----

static std::vector<uint64_t> places = {0};
static std::unordered_map<uint64_t, uint16_t> place_numbers;
static std::pair<uint64_t, uint16_t> recent_place[256];

static uint64_t packed(Loc loc) { return uint64_t(uintptr_t(loc.file)) | uint64_t(std::min(loc.line, 0xffff)) << 48; }

static uint16_t number_of(uint64_t place) {
    auto& recent = recent_place[(place ^ place >> 8 ^ place >> 48) & 255];
    if (recent.first == place) return recent.second;
    auto [found, added] = place_numbers.try_emplace(place, uint16_t(places.size()));
    if (added) {
        if (places.size() == 0xffff) {
            found->second = 0;
        } else {
            places.push_back(place);
        }
    }
    recent = {place, found->second};
    return found->second;
}

// The line of a pc: of the innermost inlined function outside the emulator's headers.
static Loc symbolized(uint64_t pc) {
    static std::unordered_map<uint64_t, Loc> known;
    const auto found = known.find(pc);
    if (found != known.end()) return found->second;
    Loc loc("?", 0);
    Dl_info info{};
    dladdr(reinterpret_cast<void*>(pc), &info);
    char command[600], line[600];
    snprintf(command, sizeof command, "addr2line -i -e '%s' %#llx 2>/dev/null", info.dli_fname ? info.dli_fname : "",
             static_cast<unsigned long long>(pc - 1 - uint64_t(info.dli_fbase)));
    if (FILE* pipe = popen(command, "r")) {
        while (fgets(line, sizeof line, pipe)) {
            line[strcspn(line, "\n (")] = 0;
            char* colon = strrchr(line, ':');
            if (!colon) continue;
            *colon = 0;
            free(loc.line ? const_cast<char*>(loc.file) : nullptr);
            loc = Loc(strdup(line), atoi(colon + 1));
            if (!strstr(line, "/emu/")) break;
        }
        while (fgets(line, sizeof line, pipe)) {
        }
        pclose(pipe);
    }
    known.emplace(pc, loc);
    return loc;
}

static Loc place(uint16_t number) {
    const uint64_t bits = places[number];
    if (!number) return Loc("?", 0);
    if (bits >> 48) return Loc(reinterpret_cast<const char*>(bits & 0xffffffffffff), int(bits >> 48));
    return symbolized(bits);
}
static std::string place_text(uint16_t number) {
    const Loc loc = place(number);
    return std::string(loc.file) + ":" + std::to_string(loc.line);
}

// ---- reports: each pair of places once a launch ----

static std::string agent_name(unsigned agent) {
    const State& s = state();
    const auto thread = [&](unsigned t) {
        const std::string name = thread_name(*machine, t % s.threads_of_block);
        return s.blocks == 1 ? name : "block " + std::to_string(t / s.threads_of_block) + " of the cluster, " + name;
    };
    if (agent < s.threads) return thread(agent);
    if (agent < s.wgmma_agents()) return "the cp.async of " + thread(agent - s.threads);
    if (agent < s.tma_agents()) return "the wgmma of warpgroup " + std::to_string(agent - s.wgmma_agents());
    return agent < s.bulk_agents() ? "a TMA load" : "a TMA store";
}

static bool is_new(const char* kind, uint16_t here, uint16_t there) {
    return state().reported.insert({kind, std::min(here, there), std::max(here, there)}).second;
}

static void report_shared(const char* kind, const Machine& owner, size_t offset, unsigned agent, uint16_t here, const Event& other) {
    if (!is_new(kind, here, other.where)) return;
    char of[40] = "";
    if (owner.cluster->size > 1) snprintf(of, sizeof of, " of block %u of the cluster", owner.block_rank);
    report(Message::Race, "%s at shared memory + %zu%s: %s at %s, not ordered with %s at %s", kind, offset, of,
           agent_name(agent).c_str(), place_text(here).c_str(), agent_name(other.agent).c_str(),
           place_text(other.where).c_str());
}

static void report_global(const char* kind, uintptr_t address, unsigned agent, uint16_t here, const GlobalEvent& other) {
    if (!is_new(kind, here, other.where)) return;
    const State& s = state();
    std::string who = agent_name(other.agent);
    if (other.block < s.launch.first) {
        who = "a thread of " + s.previous.name;
        if (other.block < s.previous.first) who += " or of a launch before it";
    } else if (other.block != s.cluster_number()) {
        who = (s.blocks == 1 ? "block number " : "cluster number ") + std::to_string(other.block - s.launch.first) + ", " + who;
    }
    report(Message::Race, "%s of global memory at %#zx: %s at %s, not ordered with %s at %s", kind, size_t(address),
           agent_name(agent).c_str(), place_text(here).c_str(), who.c_str(),
           place_text(other.where).c_str());
}

// ---- knowledge ----

static Knowledge* take(State& s) {
    if (s.free.empty()) s.free.push_back(new Knowledge);
    Knowledge* k = s.free.back();
    s.free.pop_back();
    k->users = 1;
    k->last = nullptr;
    k->foreign = nullptr;
    return k;
}
static void drop(State& s, Foreign*& f);
static void drop(State& s, Knowledge*& k) {
    if (k && --k->users == 0) {
        drop(s, k->last);
        drop(s, k->foreign);
        s.free.push_back(k);
    }
    k = nullptr;
}
static void drop(State& s, Foreign*& f) {
    if (f && --f->users == 0) {
        for (auto& [cluster, knowledge] : f->of) drop(s, knowledge);
        delete f;
    }
    f = nullptr;
}
static Knowledge* copy_of(State& s, const Knowledge& from) {
    Knowledge* k = take(s);
    memcpy(k->known, from.known, s.agents * sizeof(uint32_t));
    if ((k->foreign = from.foreign)) k->foreign->users++;
    return k;
}
static void raise_all(const State& s, Knowledge& into, const Knowledge& from) {
    for (unsigned i = 0; i < s.agents; i++) into.known[i] = std::max(into.known[i], from.known[i]);
}
// Both, as one user's: `into` is given up.
static void join(State& s, Foreign*& into, Foreign* from) {
    if (!from || into == from) return;
    if (!into) {
        into = from;
        from->users++;
        return;
    }
    Foreign* both = new Foreign{1, {}};
    auto a = into->of.begin(), b = from->of.begin();
    while (a != into->of.end() || b != from->of.end()) {
        const bool has_a = a != into->of.end() && (b == from->of.end() || a->first <= b->first);
        const bool has_b = b != from->of.end() && (a == into->of.end() || b->first <= a->first);
        both->of.push_back(has_a ? *a : *b);
        Knowledge*& knowledge = both->of.back().second;
        if (has_a && has_b && a->second != b->second) {
            knowledge = copy_of(s, *a->second);
            raise_all(s, *knowledge, *b->second);
        } else {
            knowledge->users++;
        }
        if (has_a) a++;
        if (has_b) b++;
    }
    drop(s, into);
    into = both;
}
static void join(State& s, Knowledge& into, const Knowledge& from) {
    raise_all(s, into, from);
    join(s, into.foreign, from.foreign);
}
static void set_last(State& s, Knowledge& k, Knowledge* last) {
    last->users++;
    drop(s, k.last);
    k.last = last;
}

void forget(Knowledge*& sum) {
    if (sum) drop(state(), sum);
}

// As release_into, but `thread` is the cluster's number of it.
static void release(State& s, Knowledge*& sum, unsigned thread) {
    Knowledge* mine = s.known[thread];
    if (!sum) {
        sum = copy_of(s, *mine);
        set_last(s, *sum, mine);
    } else if (sum->last != mine) {
        join(s, *sum, *mine);
        set_last(s, *sum, mine);
    }
    const auto raise = [&](unsigned agent, uint32_t clock) { sum->known[agent] = std::max(sum->known[agent], clock); };
    raise(thread, s.clock[thread]);
    raise(s.threads + thread, s.copies[thread]);
    raise(s.wgmma_agents() + s.warpgroup[thread], s.multiplies[thread]);
    if (const unsigned number = s.bulk_number[thread]) {
        raise(s.bulk_agents() + 2 * number - 2, s.bulk_read[number]);
        raise(s.bulk_agents() + 2 * number - 1, s.bulk_written[number]);
    }
    s.clock[thread]++;
}
void release_into(Knowledge*& sum, unsigned thread) { release(state(), sum, machine->first_thread + thread); }

void acquire_contributed(Knowledge* sum, unsigned thread) {
    State& s = state();
    thread += machine->first_thread;
    sum->users++;
    drop(s, s.known[thread]);
    s.known[thread] = sum;
}

// What the thread knows, to be added to.
static Knowledge& own_known(State& s, unsigned thread) {
    Knowledge* mine = copy_of(s, *s.known[thread]);
    drop(s, s.known[thread]);
    return *(s.known[thread] = mine);
}

void acquire(Knowledge* sum, unsigned thread) {
    State& s = state();
    thread += machine->first_thread;
    if (s.known[thread] != sum) join(s, own_known(s, thread), *sum);
}

static inline __attribute__((always_inline)) bool knows(const State& s, unsigned thread, unsigned agent, uint32_t clock) {
    if (agent == thread || s.known[thread]->known[agent] >= clock) return true;
    if (agent < s.threads) return false;
    if (agent < s.wgmma_agents()) return agent == s.threads + thread && s.copies[thread] >= clock;
    if (agent < s.tma_agents()) return agent == s.wgmma_agents() + s.warpgroup[thread] && s.multiplies[thread] >= clock;
    const unsigned number = s.bulk_number[thread], bulk = s.bulk_agents() + 2 * number;
    return number && ((agent == bulk - 2 && s.bulk_read[number] >= clock) || (agent == bulk - 1 && s.bulk_written[number] >= clock));
}

static bool knows_of_cluster(const State& s, unsigned thread, uint32_t cluster, unsigned agent, uint32_t clock) {
    const Foreign* foreign = s.known[thread]->foreign;
    if (!foreign) return false;
    const auto found = std::lower_bound(foreign->of.begin(), foreign->of.end(), cluster,
                                        [](const auto& entry, uint32_t number) { return entry.first < number; });
    return found != foreign->of.end() && found->first == cluster && found->second->known[agent] >= clock;
}

void begin_cluster(Machine& m) {
    State& s = *m.race;
    for (unsigned t = 0; t < s.threads; t++) {
        drop(s, s.known[t]);
        drop(s, s.at_fence[t]);
        drop(s, s.met[t]);
    }
    s.blocks = m.cluster->size;
    s.threads_of_block = m.threads;
    s.threads = s.blocks * m.threads;
    s.agents = s.previous_launch() + 1;
    s.bulk_threads = 0;
    const size_t cells = s.blocks * kSharedWindow / kGranule;
    if (s.shared.size() < cells) s.shared.resize(cells);
    s.remote.assign(s.blocks == 1 ? 0 : s.blocks * s.threads, {0, 0});
    if (++s.block_serial == 0) {
        for (SharedCell& cell : s.shared) cell.block = 0;
        s.block_serial = 1;
    }
    Knowledge* nothing = take(s);
    memset(nothing->known, 0, s.agents * sizeof(uint32_t));
    for (unsigned t = 0; t < s.threads; t++) {
        s.known[t] = nothing;
        nothing->users++;
        s.clock[t] = 1;
        s.copies[t] = s.multiplies[t] = s.fenced[t] = s.fenced_global[t] = 0;
        s.warpgroup[t] = uint16_t(t / m.threads * kWarpgroups + t % m.threads / 128);
        s.bulk_number[t] = 0;
    }
    drop(s, nothing);
}

// ---- between clusters ----

// Adds what `knowledge` says of its own cluster and of others; it is given up.
static void add_to(State& s, Foreign*& into, Knowledge* knowledge) {
    join(s, into, knowledge->foreign);
    drop(s, knowledge->foreign);
    drop(s, knowledge->last);
    Foreign* own = new Foreign{1, {{s.cluster_number(), knowledge}}};
    join(s, into, own);
    drop(s, own);
}

void release_at(const void* p, bool replaces) {
    State& s = state();
    Foreign*& released = s.released[uintptr_t(p)];
    if (replaces) drop(s, released);
    Knowledge* knowledge = nullptr;
    release(s, knowledge, running());
    add_to(s, released, knowledge);
}

static void acquire_foreign(State& s, Foreign* foreign) {
    if (!foreign) return;
    Knowledge& mine = own_known(s, running());
    join(s, mine.foreign, foreign);
    for (const auto& [cluster, knowledge] : foreign->of) {
        if (cluster == s.cluster_number()) raise_all(s, mine, *knowledge);
    }
}

void acquire_at(const void* p) {
    State& s = state();
    const auto found = s.released.find(uintptr_t(p));
    if (found != s.released.end()) acquire_foreign(s, found->second);
}

void relaxed_at(const void* p) {
    State& s = state();
    const auto found = s.released.find(uintptr_t(p));
    if (found != s.released.end()) join(s, s.met[running()], found->second);
    if (const Knowledge* known = s.at_fence[running()]) {
        Foreign*& released = s.released[uintptr_t(p)];
        add_to(s, released, copy_of(s, *known));
    }
}

void thread_fence() {
    State& s = state();
    const unsigned me = running();
    acquire_foreign(s, s.met[me]);
    drop(s, s.met[me]);
    drop(s, s.at_fence[me]);
    release(s, s.at_fence[me], me);
}

// ---- between launches ----

void previous_launch_done() {
    State& s = state();
    s.launch.waited = true;
    own_known(s, running()).known[s.previous_launch()] = 1;
}

void next_launch_may_start() {
    State& s = state();
    if (s.launch.first > 0 && !s.known[running()]->known[s.previous_launch()]) s.launch.let_next_start_early = true;
}

// Whether an access of an earlier launch has ended for sure.
static bool has_ended(const State& s, unsigned thread, uint32_t cluster) {
    if (!s.known[thread]->known[s.previous_launch()]) return cluster < s.launch.unfinished;
    // The previous one has; those before it, only if it waited for them.
    return cluster >= s.previous.first || s.previous.waited || cluster < s.previous.unfinished;
}

// ---- shared memory ----

struct SharedAccess {
    const Machine& owner;
    unsigned agent, viewer;  // viewer: the thread whose knowledge counts
    uint32_t clock;
    Access kind;
    uint16_t where;
    bool async_proxy = false;
};

static void keep_read(const State& s, SharedCell& cell, const SharedAccess& a) {
    const Event event{a.clock, uint16_t(a.agent), a.where};
    for (unsigned i = 0; i < cell.reads; i++) {
        if (cell.read[i].agent == a.agent || knows(s, a.viewer, cell.read[i].agent, cell.read[i].clock)) {
            cell.read[i] = event;
            cell.latest = uint8_t(i);
            return;
        }
    }
    if (cell.reads < 4) {
        cell.latest = cell.reads;
        cell.read[cell.reads++] = event;
        return;
    }
    // Full: give up one of two of the same warp, else one by turns.
    for (unsigned i = 0; i < 4; i++) {
        for (unsigned j = 0; j < i; j++) {
            if (cell.read[i].agent / 32 == cell.read[j].agent / 32) {
                cell.read[i] = event;
                cell.latest = uint8_t(i);
                return;
            }
        }
    }
    cell.latest = a.agent & 3;
    cell.read[cell.latest] = event;
}

static void access_shared(const void* p, size_t bytes, const SharedAccess& a) {
    State& s = state();
    constexpr size_t kCells = kSharedWindow / kGranule;
    const size_t offset = size_t(static_cast<const char*>(p) - a.owner.shared);
    const size_t first = offset / kGranule, last = std::min((offset + bytes - 1) / kGranule, kCells - 1);
    SharedCell* const cells = s.shared.data() + a.owner.block_rank * kCells;
    for (size_t g = first; g <= last; g++) {
        SharedCell& cell = cells[g];
        if (cell.block != s.block_serial) {
            cell = {};
            cell.block = s.block_serial;
        }
        if (a.kind != Access::Write && !cell.written) {
            cell.written = true;
            if (is_new("uninitialised", a.where, a.where)) {
                report(Message::Race, "uninitialised shared memory + %zu is read by %s at %s", g * kGranule,
                       agent_name(a.agent).c_str(), place_text(a.where).c_str());
            }
        }
        // Read before by the same agent, with no event of it and no write since: nothing new.
        if (a.kind == Access::Read && cell.reads) {
            const Event& latest = cell.read[cell.latest];
            if (latest.agent == a.agent && latest.clock == a.clock) continue;
        }
        const char* kind = a.kind == Access::Read ? "read after write" : "write after write";
        const auto unordered = [&](const Event& e) { return e.agent != a.agent && !knows(s, a.viewer, e.agent, e.clock); };
        const Event& w = cell.write;
        if (cell.has_atomic && a.kind != Access::Atomic && unordered(cell.atomic)) {
            report_shared(kind, a.owner, g * kGranule, a.agent, a.where, cell.atomic);
        }
        if (cell.has_write) {
            if (unordered(w)) {
                report_shared(kind, a.owner, g * kGranule, a.agent, a.where, w);
            } else if (a.async_proxy && w.agent < s.threads && s.fenced[w.agent] < w.clock) {
                report_shared("asynchronous access without fence.proxy.async", a.owner, g * kGranule, a.agent, a.where, w);
            }
        }
        if (a.kind == Access::Read) {
            keep_read(s, cell, a);
            continue;
        }
        for (unsigned i = 0; i < cell.reads; i++) {
            if (unordered(cell.read[i])) {
                report_shared("write after read", a.owner, g * kGranule, a.agent, a.where, cell.read[i]);
                break;
            }
        }
        cell.reads = 0;
        cell.written = true;
        cell.has_atomic = a.kind == Access::Atomic;
        if (!cell.has_atomic) cell.has_write = true;
        (cell.has_atomic ? cell.atomic : cell.write) = {a.clock, uint16_t(a.agent), a.where};
    }
}

void touch_shared(const Machine& owner, const void* p, size_t bytes, Access kind, Loc loc) {
    const unsigned me = running();
    access_shared(p, bytes, {owner, me, me, state().clock[me], kind, number_of(packed(loc))});
}
void note_remote_access(const Machine& owner, Loc loc) {
    State& s = state();
    if (&owner != machine) s.remote[owner.block_rank * s.threads + running()] = {s.clock[running()], number_of(packed(loc))};
}
void check_remote_accesses(const Machine& owner) {
    const State& s = state();
    for (unsigned t = 0; t < s.threads && !s.remote.empty(); t++) {
        const State::Remote& access = s.remote[owner.block_rank * s.threads + t];
        bool known = access.clock == 0;
        for (unsigned i = 0; i < owner.threads && !known; i++) known = knows(s, owner.first_thread + i, t, access.clock);
        if (known) continue;
        die_with(place(access.where), "block %u of the cluster may end before %s uses its shared memory here", owner.block_rank,
                 agent_name(t).c_str());
    }
}

void async_copy_write(void* p, size_t bytes, uint32_t group, Loc loc) {
    access_shared(p, bytes, {*machine, state().threads + running(), running(), group, Access::Write, number_of(packed(loc))});
}
void async_copies_done(uint32_t groups) {
    uint32_t& known = state().copies[running()];
    known = std::max(known, groups);
}
static unsigned tma_agent(const Machine& owner, unsigned agent) {
    return state().tma_agents() + owner.block_rank * kTmaAgents + agent % kTmaAgents;
}
void tma_write(const Machine& owner, void* p, size_t bytes, unsigned agent, uint32_t clock, Loc loc) {
    access_shared(p, bytes, {owner, tma_agent(owner, agent), running(), clock, Access::Write, number_of(packed(loc)), true});
}
void tma_done(const Machine& owner, Knowledge*& sum, unsigned agent, uint32_t clock) {
    State& s = state();
    if (!sum) {
        sum = take(s);
        memset(sum->known, 0, s.agents * sizeof(uint32_t));
    }
    uint32_t& known = sum->known[tma_agent(owner, agent)];
    known = std::max(known, clock);
}
bool tma_is_known(const Machine& owner, unsigned agent, uint32_t clock) {
    const State& s = state();
    for (unsigned i = 0; i < owner.threads; i++) {
        if (knows(s, owner.first_thread + i, tma_agent(owner, agent), clock)) return true;
    }
    return false;
}
void wgmma_read(const void* p, size_t bytes, unsigned warpgroup, uint32_t group, Loc loc) {
    const unsigned agent = state().wgmma_agents() + machine->block_rank * kWarpgroups + warpgroup;
    access_shared(p, bytes, {*machine, agent, machine->first_thread + warpgroup * 128, group, Access::Read, number_of(packed(loc)), true});
}
void wgmmas_done(unsigned warpgroup, uint32_t groups) {
    const unsigned first = machine->first_thread + warpgroup * 128;
    for (unsigned t = first; t < first + 128; t++) state().multiplies[t] = std::max(state().multiplies[t], groups);
}
void fence_proxy_async() { state().fenced[running()] = state().clock[running()]; }
void fence_proxy_async_global() { state().fenced_global[running()] = state().clock[running()]; }

static unsigned bulk_number(Loc loc) {
    State& s = state();
    uint16_t& number = s.bulk_number[running()];
    if (!number) {
        if (s.bulk_threads == s.blocks * kBulkThreads) die_with(loc, "the race detector follows TMA stores of %u threads of a block", kBulkThreads);
        number = uint16_t(++s.bulk_threads);
        s.bulk_read[number] = s.bulk_written[number] = 0;
    }
    return number;
}
void bulk_read(const void* p, size_t bytes, uint32_t group, Loc loc) {
    const unsigned agent = state().bulk_agents() + 2 * bulk_number(loc) - 2;
    access_shared(p, bytes, {*machine, agent, running(), group, Access::Read, number_of(packed(loc)), true});
}
void bulk_done(uint32_t read_groups, uint32_t written_groups) {
    State& s = state();
    const unsigned number = s.bulk_number[running()];
    s.bulk_read[number] = std::max(s.bulk_read[number], read_groups);
    s.bulk_written[number] = std::max(s.bulk_written[number], written_groups);
}

// ---- global memory ----

static GlobalPage& page_of(State& s, uintptr_t address) {
    const uintptr_t number = address / kPage;
    auto& recent = s.recent_page[number & 63];
    if (recent.first != number || !recent.second) {
        GlobalPage*& page = s.pages[number];
        if (!page) {
            page = new GlobalPage;
            page->launch = 0;
        }
        recent = {number, page};
    }
    GlobalPage& page = *recent.second;
    if (page.launch != s.launch_serial) {
        memset(static_cast<void*>(page.cell), 0, sizeof page.cell);
        page.launch = s.launch_serial;
    }
    return page;
}

struct GlobalAccess {
    unsigned agent, viewer;
    uint32_t clock;
    Access kind;
    uint16_t where;
    bool async_proxy = false;
};

static void access_global(uintptr_t address, size_t bytes, const GlobalAccess& a) {
    State& s = state();
    const uint32_t block = s.cluster_number();
    const GlobalEvent event{block, a.clock, uint16_t(a.agent), a.where};
    const auto ordered = [&](const GlobalEvent& e) {
        if (e.block == block) return e.agent == a.agent || knows(s, a.viewer, e.agent, e.clock);
        if (e.block < s.launch.first) return has_ended(s, a.viewer, e.block);
        return knows_of_cluster(s, a.viewer, e.block, e.agent, e.clock);
    };
    const auto kind = [&](const GlobalEvent& e, const char* within) {
        if (e.block >= s.launch.first) return within;
        if (s.known[a.viewer]->known[s.previous_launch()]) return "the previous launch never waited, so those before it may run on: access";
        return a.kind == Access::Read ? "read before wait_for_previous" : "write before wait_for_previous";
    };
    const uintptr_t last = (address + bytes - 1) / kGranule;
    for (uintptr_t g = address / kGranule; g <= last; g++) {
        GlobalCell& cell = page_of(s, g * kGranule).cell[g % (kPage / kGranule)];
        const char* what = a.kind == Access::Read ? "read after write" : "write after write";
        const uintptr_t first = std::max(address, g * kGranule), end = std::min(address + bytes, (g + 1) * kGranule);
        const uint8_t touched = uint8_t(((1u << (end - first)) - 1) << (first - g * kGranule));
        if (cell.has_atomic && a.kind != Access::Atomic && !ordered(cell.atomic)) {
            report_global(kind(cell.atomic, what), g * kGranule, a.agent, a.where, cell.atomic);
        }
        if (cell.has_write && (cell.written & touched)) {
            const GlobalEvent& w = cell.write;
            if (!ordered(w)) {
                report_global(kind(w, what), g * kGranule, a.agent, a.where, w);
            } else if (a.async_proxy && w.block == block && w.agent < s.threads && s.fenced_global[w.agent] < w.clock) {
                report_global("asynchronous access without fence.proxy.async", g * kGranule, a.agent, a.where, w);
            }
        }
        if (a.kind == Access::Read) {
            // Slot 0: the latest; slot 1: one not ordered before it, of another block if there is one.
            if (cell.reads && !ordered(cell.read[0]) && (cell.reads < 2 || cell.read[1].block == block)) {
                cell.read[1] = cell.read[0];
                cell.reads = 2;
            }
            cell.read[0] = event;
            cell.reads = std::max<uint8_t>(cell.reads, 1);
            continue;
        }
        for (unsigned i = 0; i < cell.reads; i++) {
            if (!ordered(cell.read[i])) {
                report_global(kind(cell.read[i], "write after read"), g * kGranule, a.agent, a.where, cell.read[i]);
                break;
            }
        }
        cell.reads = 0;
        cell.has_atomic = a.kind == Access::Atomic;
        if (!cell.has_atomic) {
            cell.has_write = true;
            cell.written = touched;
        }
        (cell.has_atomic ? cell.atomic : cell.write) = event;
    }
}

// True: a place in global memory. False: memory of the emulator that kernels read (threadIdx, constant tables).
static bool is_global(State& s, uintptr_t address, size_t bytes, uint16_t where) {
    for (const Range& r : s.allocation) {
        if (address >= r.begin && address + bytes <= r.end) return true;
    }
    const auto within = [&](uintptr_t begin, size_t size) { return address - begin < size; };
    if (within(uintptr_t(machine), sizeof(Machine)) || within(uintptr_t(&cur), sizeof cur)) return false;
    if (within(s.image.begin, s.image.end - s.image.begin)) return false;
    machine->allocation_begin = machine->allocation_end = 0;
    check_global(reinterpret_cast<const void*>(address), bytes, "access", place(where));
    if (machine->allocation_end) {
        s.allocation[s.next_allocation++ % 8] = {machine->allocation_begin, machine->allocation_end};
    }
    return true;
}

static void touch_place(unsigned thread, const void* p, size_t bytes, Access kind, uint64_t place) {
    State& s = state();
    thread += machine->first_thread;
    const size_t offset = size_t(static_cast<const char*>(p) - machine->region);
    if (offset < kSharedWindow) {
        access_shared(p, bytes, {*machine, thread, thread, s.clock[thread], kind, number_of(place)});
    } else if (offset >= machine->region_bytes) {
        const uint16_t where = number_of(place);
        if (is_global(s, uintptr_t(p), bytes, where)) access_global(uintptr_t(p), bytes, {thread, thread, s.clock[thread], kind, where});
    }
}

void tma_read(const Machine& owner, const void* p, size_t bytes, unsigned agent, uint32_t clock, Loc loc) {
    access_global(uintptr_t(p), bytes, {tma_agent(owner, agent), running(), clock, Access::Read, number_of(packed(loc)), true});
}
void bulk_write(const void* p, size_t bytes, uint32_t group, Loc loc) {
    const unsigned agent = state().bulk_agents() + 2 * bulk_number(loc) - 1;
    access_global(uintptr_t(p), bytes, {agent, running(), group, Access::Write, number_of(packed(loc)), true});
}

void touch(const void* p, size_t bytes, Access kind, Loc loc) { touch_place(cur->index, p, bytes, kind, packed(loc)); }
void touch_as(unsigned thread, const void* p, size_t bytes, Access kind, Loc loc) {
    touch_place(thread, p, bytes, kind, packed(loc));
}

// ---- launches ----

// The loaded object that holds the kernel: its constants are no global memory.
static Range image_of(const void* code) {
    struct Search {
        uintptr_t code;
        Range found;
    } search{uintptr_t(code), {0, 0}};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* data) {
            Search& search = *static_cast<Search*>(data);
            Range r{UINTPTR_MAX, 0};
            for (int i = 0; i < info->dlpi_phnum; i++) {
                const auto& header = info->dlpi_phdr[i];
                if (header.p_type != PT_LOAD) continue;
                r.begin = std::min<uintptr_t>(r.begin, info->dlpi_addr + header.p_vaddr);
                r.end = std::max<uintptr_t>(r.end, info->dlpi_addr + header.p_vaddr + header.p_memsz);
            }
            if (search.code < r.begin || search.code >= r.end) return 0;
            search.found = r;
            return 1;
        },
        &search);
    return search.found;
}

void begin_launch(Machine& m, uint64_t clusters, bool dependent) {
    if (!m.race) m.race = new State;
    State& s = *m.race;
    for (auto& [address, released] : s.released) drop(s, released);
    s.released.clear();
    s.previous = s.launch;
    s.launch = {m.kernel->name, 0, uint32_t(clusters), 0, true, false};
    const uint64_t first = uint64_t(s.previous.first) + s.previous.clusters;
    if (dependent && s.launch_serial && first + clusters < UINT32_MAX) {
        // The previous one may still run, and what might when it began, unless it let this one begin only after its wait.
        s.launch.first = uint32_t(first);
        s.launch.waited = false;
        const bool alone = s.previous.waited && !s.previous.let_next_start_early;
        s.launch.unfinished = alone ? s.previous.first : s.previous.unfinished;
    } else {
        s.launch_serial++;
    }
    s.reported.clear();
    memset(s.allocation, 0, sizeof s.allocation);
    s.next_allocation = 0;
    const uintptr_t code = reinterpret_cast<uintptr_t>(m.kernel->fn);
    if (code < s.image.begin || code >= s.image.end) s.image = image_of(reinterpret_cast<const void*>(code));
    constexpr size_t kMostPages = 8192;  // about 700 MB of cells
    if (s.pages.size() > kMostPages) {
        for (auto& [number, page] : s.pages) delete page;
        s.pages.clear();
        memset(static_cast<void*>(s.recent_page), 0, sizeof s.recent_page);
    }
}

// ---- what the instrumentation calls ----

static inline void instrumented(const void* p, size_t bytes, Access kind, const void* pc) {
    if (!machine || !cur) return;
    touch_place(cur->index, p, bytes, kind, uint64_t(uintptr_t(pc)));
}
__attribute__((cold)) static void misaligned(const void* p, size_t bytes, const void* pc) {
    if (machine && cur) die_with(symbolized(uint64_t(uintptr_t(pc))), "access of %zu bytes at %p is misaligned", bytes, p);
}
static inline void aligned(const void* p, size_t bytes, Access kind, const void* pc) {
    if (uintptr_t(p) % bytes) misaligned(p, bytes, pc);
    instrumented(p, bytes, kind, pc);
}
}  // namespace emu::race

using emu::race::Access;
#define PC __builtin_return_address(0)
#define ACCESSES(n)                                                                                             \
    extern "C" void __tsan_read##n(void* p) { emu::race::aligned(p, n, Access::Read, PC); }                     \
    extern "C" void __tsan_write##n(void* p) { emu::race::aligned(p, n, Access::Write, PC); }                   \
    extern "C" void __tsan_volatile_read##n(void* p) { emu::race::aligned(p, n, Access::Read, PC); }            \
    extern "C" void __tsan_volatile_write##n(void* p) { emu::race::aligned(p, n, Access::Write, PC); }          \
    extern "C" void __tsan_unaligned_read##n(void* p) { emu::race::instrumented(p, n, Access::Read, PC); }      \
    extern "C" void __tsan_unaligned_write##n(void* p) { emu::race::instrumented(p, n, Access::Write, PC); }    \
    extern "C" void __tsan_read_write##n(void* p) {                                                             \
        emu::race::aligned(p, n, Access::Read, PC);                                                             \
        emu::race::instrumented(p, n, Access::Write, PC);                                                       \
    }                                                                                                           \
    extern "C" void __tsan_unaligned_read_write##n(void* p) {                                                   \
        emu::race::instrumented(p, n, Access::Read, PC);                                                        \
        emu::race::instrumented(p, n, Access::Write, PC);                                                       \
    }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

extern "C" {
void __tsan_read_range(void* p, size_t n) {
    if (n) emu::race::instrumented(p, n, Access::Read, PC);
}
void __tsan_write_range(void* p, size_t n) {
    if (n) emu::race::instrumented(p, n, Access::Write, PC);
}
void* __tsan_memcpy(void* to, const void* from, size_t n) {
    if (n) emu::race::instrumented(from, n, Access::Read, PC);
    if (n) emu::race::instrumented(to, n, Access::Write, PC);
    return memcpy(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, size_t n) {
    if (n) emu::race::instrumented(from, n, Access::Read, PC);
    if (n) emu::race::instrumented(to, n, Access::Write, PC);
    return memmove(to, from, n);
}
void* __tsan_memset(void* to, int value, size_t n) {
    if (n) emu::race::instrumented(to, n, Access::Write, PC);
    return memset(to, value, n);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
#endif
