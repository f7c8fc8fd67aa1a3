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
// Shared memory: also reads of what nothing wrote. Global memory: within a block as above; two blocks of a launch are
// never ordered, so only atomics may meet. Reads kept per place are few (four, of different warps where possible; two in
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
constexpr unsigned kBulkThreads = 64;
constexpr unsigned kTmaAgents = 32, kMaxAgents = 2 * kMaxThreads + kWarpgroups + kTmaAgents + 2 * kBulkThreads;
constexpr unsigned kGranule = 2;  // bytes; neighbouring f16 of two threads do not conflict

struct Knowledge {
    uint32_t users;
    Knowledge* last;  // joined into this one latest: a barrier's threads mostly share theirs
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
    bool has_write, has_atomic;
};
struct GlobalPage {
    uint64_t launch;
    GlobalCell cell[kPage / kGranule];
};

struct Range {
    uintptr_t begin, end;
};

struct State {
    unsigned threads, agents;
    std::vector<Knowledge*> free;
    Knowledge* known[kMaxThreads] = {};
    uint32_t clock[kMaxThreads];      // of the thread's own events
    uint32_t copies[kMaxThreads];     // groups of its asynchronous copies that it waited for
    uint32_t multiplies[kMaxThreads];  // groups of its warpgroup's wgmmas
    uint32_t fenced[kMaxThreads];     // its clock at its latest fence.proxy.async of shared memory
    uint32_t fenced_global[kMaxThreads];
    uint8_t bulk_number[kMaxThreads];  // 1 and up, of the threads that store by TMA
    unsigned bulk_threads;
    uint32_t bulk_read[kBulkThreads + 1], bulk_written[kBulkThreads + 1];  // groups of their stores that they waited for
    std::vector<SharedCell> shared = std::vector<SharedCell>(kSharedWindow / kGranule);
    uint32_t block_serial = 0;
    uint64_t launch_serial = 0;
    std::unordered_map<uintptr_t, GlobalPage*> pages;
    std::pair<uintptr_t, GlobalPage*> recent_page[64] = {};
    Range allocation[8];
    unsigned next_allocation;
    Range image;
    std::set<std::tuple<const char*, uint16_t, uint16_t>> reported;
};

static State& state() { return *machine->race; }

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

static unsigned bulk_agents(const State& s) { return 2 * s.threads + kWarpgroups + kTmaAgents; }

static std::string agent_name(unsigned agent) {
    const State& s = state();
    if (agent < s.threads) return thread_name(*machine, agent);
    if (agent < 2 * s.threads) return "the cp.async of " + thread_name(*machine, agent - s.threads);
    if (agent < 2 * s.threads + kWarpgroups) return "the wgmma of warpgroup " + std::to_string(agent - 2 * s.threads);
    if (agent >= bulk_agents(s)) return "a TMA store";
    return "a TMA load";
}

static bool is_new(const char* kind, uint16_t here, uint16_t there) {
    return state().reported.insert({kind, std::min(here, there), std::max(here, there)}).second;
}

static void report_shared(const char* kind, size_t offset, unsigned agent, uint16_t here, const Event& other) {
    if (!is_new(kind, here, other.where)) return;
    report(Message::Race, "%s at shared memory + %zu: %s at %s, not ordered with %s at %s", kind, offset,
           agent_name(agent).c_str(), place_text(here).c_str(), agent_name(other.agent).c_str(),
           place_text(other.where).c_str());
}

static void report_global(const char* kind, uintptr_t address, unsigned agent, uint16_t here, const GlobalEvent& other) {
    if (!is_new(kind, here, other.where)) return;
    std::string who = agent_name(other.agent);
    if (other.block != uint32_t(machine->block_number)) who = "block number " + std::to_string(other.block) + ", " + who;
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
    return k;
}
static void drop(State& s, Knowledge*& k) {
    if (k && --k->users == 0) {
        drop(s, k->last);
        s.free.push_back(k);
    }
    k = nullptr;
}
static void join(const State& s, Knowledge& into, const Knowledge& from) {
    for (unsigned i = 0; i < s.agents; i++) into.known[i] = std::max(into.known[i], from.known[i]);
}
static void set_last(State& s, Knowledge& k, Knowledge* last) {
    last->users++;
    drop(s, k.last);
    k.last = last;
}

void forget(Knowledge*& sum) {
    if (sum) drop(*machine->race, sum);
}

void release_into(Knowledge*& sum, unsigned thread) {
    State& s = state();
    Knowledge* mine = s.known[thread];
    if (!sum) {
        sum = take(s);
        memcpy(sum->known, mine->known, s.agents * sizeof(uint32_t));
        set_last(s, *sum, mine);
    } else if (sum->last != mine) {
        join(s, *sum, *mine);
        set_last(s, *sum, mine);
    }
    const auto raise = [&](unsigned agent, uint32_t clock) { sum->known[agent] = std::max(sum->known[agent], clock); };
    raise(thread, s.clock[thread]);
    raise(s.threads + thread, s.copies[thread]);
    raise(2 * s.threads + thread / 128, s.multiplies[thread]);
    if (const unsigned number = s.bulk_number[thread]) {
        raise(bulk_agents(s) + 2 * number - 2, s.bulk_read[number]);
        raise(bulk_agents(s) + 2 * number - 1, s.bulk_written[number]);
    }
    s.clock[thread]++;
}

void acquire_contributed(Knowledge* sum, unsigned thread) {
    State& s = state();
    sum->users++;
    drop(s, s.known[thread]);
    s.known[thread] = sum;
}

void acquire(Knowledge* sum, unsigned thread) {
    State& s = state();
    if (s.known[thread] == sum) return;
    Knowledge* both = take(s);
    memcpy(both->known, s.known[thread]->known, s.agents * sizeof(uint32_t));
    join(s, *both, *sum);
    drop(s, s.known[thread]);
    s.known[thread] = both;
}

static inline __attribute__((always_inline)) bool knows(const State& s, unsigned thread, unsigned agent, uint32_t clock) {
    if (agent == thread || s.known[thread]->known[agent] >= clock) return true;
    if (agent == s.threads + thread) return s.copies[thread] >= clock;
    if (agent == 2 * s.threads + thread / 128) return s.multiplies[thread] >= clock;
    const unsigned number = s.bulk_number[thread], bulk = bulk_agents(s) + 2 * number;
    return number && ((agent == bulk - 2 && s.bulk_read[number] >= clock) || (agent == bulk - 1 && s.bulk_written[number] >= clock));
}

void begin_block(Machine& m) {
    State& s = *m.race;
    s.threads = m.threads;
    s.agents = bulk_agents(s) + 2 * kBulkThreads;
    s.bulk_threads = 0;
    if (++s.block_serial == 0) {
        for (SharedCell& cell : s.shared) cell.block = 0;
        s.block_serial = 1;
    }
    Knowledge* nothing = take(s);
    memset(nothing->known, 0, s.agents * sizeof(uint32_t));
    for (unsigned t = 0; t < kMaxThreads; t++) drop(s, s.known[t]);
    for (unsigned t = 0; t < m.threads; t++) {
        s.known[t] = nothing;
        nothing->users++;
        s.clock[t] = 1;
        s.copies[t] = s.multiplies[t] = s.fenced[t] = s.fenced_global[t] = 0;
        s.bulk_number[t] = 0;
    }
    drop(s, nothing);
}

// ---- shared memory ----

struct SharedAccess {
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
    const size_t offset = size_t(static_cast<const char*>(p) - machine->shared);
    const size_t first = offset / kGranule, last = std::min((offset + bytes - 1) / kGranule, s.shared.size() - 1);
    for (size_t g = first; g <= last; g++) {
        SharedCell& cell = s.shared[g];
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
            report_shared(kind, g * kGranule, a.agent, a.where, cell.atomic);
        }
        if (cell.has_write) {
            if (unordered(w)) {
                report_shared(kind, g * kGranule, a.agent, a.where, w);
            } else if (a.async_proxy && w.agent < s.threads && s.fenced[w.agent] < w.clock) {
                report_shared("asynchronous access without fence.proxy.async", g * kGranule, a.agent, a.where, w);
            }
        }
        if (a.kind == Access::Read) {
            keep_read(s, cell, a);
            continue;
        }
        for (unsigned i = 0; i < cell.reads; i++) {
            if (unordered(cell.read[i])) {
                report_shared("write after read", g * kGranule, a.agent, a.where, cell.read[i]);
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

void async_copy_write(void* p, size_t bytes, uint32_t group, Loc loc) {
    access_shared(p, bytes, {state().threads + cur->index, cur->index, group, Access::Write, number_of(packed(loc))});
}
void async_copies_done(uint32_t groups) {
    uint32_t& known = state().copies[cur->index];
    known = std::max(known, groups);
}
void tma_write(void* p, size_t bytes, unsigned agent, uint32_t clock, Loc loc) {
    const unsigned number = 2 * state().threads + kWarpgroups + agent % kTmaAgents;
    access_shared(p, bytes, {number, cur->index, clock, Access::Write, number_of(packed(loc)), true});
}
void tma_done(Knowledge*& sum, unsigned agent, uint32_t clock) {
    State& s = state();
    if (!sum) {
        sum = take(s);
        memset(sum->known, 0, s.agents * sizeof(uint32_t));
    }
    uint32_t& known = sum->known[2 * s.threads + kWarpgroups + agent % kTmaAgents];
    known = std::max(known, clock);
}
void wgmma_read(const void* p, size_t bytes, unsigned warpgroup, uint32_t group, Loc loc) {
    access_shared(p, bytes, {2 * state().threads + warpgroup, warpgroup * 128, group, Access::Read, number_of(packed(loc)), true});
}
void wgmmas_done(unsigned warpgroup, uint32_t groups) {
    for (unsigned t = warpgroup * 128; t < warpgroup * 128 + 128; t++) {
        state().multiplies[t] = std::max(state().multiplies[t], groups);
    }
}
void fence_proxy_async() { state().fenced[cur->index] = state().clock[cur->index]; }
void fence_proxy_async_global() { state().fenced_global[cur->index] = state().clock[cur->index]; }

static unsigned bulk_number(Loc loc) {
    State& s = state();
    uint8_t& number = s.bulk_number[cur->index];
    if (!number) {
        if (s.bulk_threads == kBulkThreads) die_with(loc, "the race detector follows TMA stores of %u threads of a block", kBulkThreads);
        number = uint8_t(++s.bulk_threads);
        s.bulk_read[number] = s.bulk_written[number] = 0;
    }
    return number;
}
void bulk_read(const void* p, size_t bytes, uint32_t group, Loc loc) {
    const unsigned agent = bulk_agents(state()) + 2 * bulk_number(loc) - 2;
    access_shared(p, bytes, {agent, cur->index, group, Access::Read, number_of(packed(loc)), true});
}
void bulk_done(uint32_t read_groups, uint32_t written_groups) {
    State& s = state();
    const unsigned number = s.bulk_number[cur->index];
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
    const uint32_t block = uint32_t(machine->block_number);
    const GlobalEvent event{block, a.clock, uint16_t(a.agent), a.where};
    const auto ordered = [&](const GlobalEvent& e) {
        return e.block == block && (e.agent == a.agent || knows(s, a.viewer, e.agent, e.clock));
    };
    const uintptr_t last = (address + bytes - 1) / kGranule;
    for (uintptr_t g = address / kGranule; g <= last; g++) {
        GlobalCell& cell = page_of(s, g * kGranule).cell[g % (kPage / kGranule)];
        const char* what = a.kind == Access::Read ? "read after write" : "write after write";
        if (cell.has_atomic && a.kind != Access::Atomic && !ordered(cell.atomic)) {
            report_global(what, g * kGranule, a.agent, a.where, cell.atomic);
        }
        if (cell.has_write) {
            const GlobalEvent& w = cell.write;
            if (!ordered(w)) {
                report_global(what, g * kGranule, a.agent, a.where, w);
            } else if (a.async_proxy && w.agent < s.threads && s.fenced_global[w.agent] < w.clock) {
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
                report_global("write after read", g * kGranule, a.agent, a.where, cell.read[i]);
                break;
            }
        }
        cell.reads = 0;
        cell.has_atomic = a.kind == Access::Atomic;
        if (!cell.has_atomic) cell.has_write = true;
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
    const size_t offset = size_t(static_cast<const char*>(p) - machine->region);
    if (offset < kSharedWindow) {
        access_shared(p, bytes, {thread, thread, s.clock[thread], kind, number_of(place)});
    } else if (offset >= machine->region_bytes) {
        const uint16_t where = number_of(place);
        if (is_global(s, uintptr_t(p), bytes, where)) access_global(uintptr_t(p), bytes, {thread, thread, s.clock[thread], kind, where});
    }
}

void tma_read(const void* p, size_t bytes, unsigned agent, uint32_t clock, Loc loc) {
    const unsigned number = 2 * state().threads + kWarpgroups + agent % kTmaAgents;
    access_global(uintptr_t(p), bytes, {number, cur->index, clock, Access::Read, number_of(packed(loc)), true});
}
void bulk_write(const void* p, size_t bytes, uint32_t group, Loc loc) {
    const unsigned agent = bulk_agents(state()) + 2 * bulk_number(loc) - 1;
    access_global(uintptr_t(p), bytes, {agent, cur->index, group, Access::Write, number_of(packed(loc)), true});
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

void begin_launch(Machine& m) {
    if (!m.race) m.race = new State;
    State& s = *m.race;
    s.launch_serial++;
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
