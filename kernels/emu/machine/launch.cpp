// The kernel table, the configuration, launches over a pool of workers, and what they report.
#include <atomic>
#include <condition_variable>
#include <pthread.h>
#include <cstdarg>
#include <cstdlib>
#include <mutex>
#include <thread>

#include "machine.h"

namespace emu {

Config config;
Stats stats;

// ---- kernels ----

static const Kernel* kernels;  // constant-initialised: registrations run before main in any order

Kernel::Kernel(const char* name, const char* file, Thunk fn, const unsigned (&bounds)[2], const Param* params,
               unsigned param_count)
    : name(name), file(file), fn(fn), max_threads(bounds[0]), min_blocks(bounds[1]), params(params),
      param_count(param_count), next(kernels) {
    kernels = this;
}

const Kernel* first_kernel() { return kernels; }

const Kernel* find_registered(const char* name) {
    for (const Kernel* k = kernels; k; k = k->next) {
        if (strcmp(k->name, name) == 0) return k;
    }
    return nullptr;
}

const Kernel* find_registered(Thunk fn) {
    for (const Kernel* k = kernels; k; k = k->next) {
        if (k->fn == fn) return k;
    }
    return nullptr;
}

Thunk find(const char* name) {
    const Kernel* k = find_registered(name);
    return k ? k->fn : nullptr;
}

// ---- messages ----

constexpr int kMaxMessages = 8;
static std::mutex message_mutex;
static std::string messages;  // of the launch in progress
static std::atomic<int> message_count, error_count;
static thread_local std::string latest_error;

const char* last_error() { return latest_error.c_str(); }
bool stop_requested() { return error_count > 0 || message_count >= kMaxMessages; }

std::string thread_name(const Machine& m, unsigned thread) {
    const dim3 dim = m.index.block_dim;
    char text[96];
    snprintf(text, sizeof text, "thread (%u, %u, %u), warp %u lane %u", thread % dim.x, thread / dim.x % dim.y,
             thread / (dim.x * dim.y), thread / 32, thread % 32);
    return text;
}

static void add_message(const std::string& text) {
    std::lock_guard lock(message_mutex);
    if (message_count++ >= kMaxMessages) return;
    if (!messages.empty()) messages += '\n';
    messages += text;
    if (!config.quiet) fprintf(stderr, "[emu] %s\n", text.c_str());
}

void report(Message kind, const char* format, ...) {
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    std::string text(size_t(vsnprintf(nullptr, 0, format, args)) + 1, '\0');
    vsnprintf(text.data(), text.size(), format, again);
    va_end(again);
    va_end(args);
    text.pop_back();
    if (const Machine* m = machine) {
        const uint3 b = m->index.block;
        char where[160];
        snprintf(where, sizeof where, "%s, block (%u, %u, %u): ", m->kernel->name, b.x, b.y, b.z);
        text.insert(0, where);
        (kind == Message::Race ? machine->stats.races : machine->stats.errors)++;
    }
    text.insert(0, kind == Message::Race ? "RACE: " : "ERROR: ");
    if (kind == Message::Error) error_count++;
    add_message(text);
}

// ---- configuration ----

static bool wrong_value(const char* variable, const char* value, const char* choices) {
    latest_error = std::string(variable) + "=" + value + ": expected " + choices;
    fprintf(stderr, "[emu] %s\n", latest_error.c_str());
    return false;
}

template <class T, size_t N>
static bool read_choice(const char* variable, const std::pair<const char*, T> (&choices)[N], T& out) {
    const char* value = getenv(variable);
    if (!value) return true;
    std::string names;
    for (const auto& [name, choice] : choices) {
        if (strcmp(value, name) == 0) {
            out = choice;
            return true;
        }
        names += (names.empty() ? "" : ", ") + std::string(name);
    }
    return wrong_value(variable, value, names.c_str());
}

static bool read_number(const char* variable, uint64_t smallest, uint64_t largest, uint64_t& out) {
    const char* value = getenv(variable);
    if (!value) return true;
    char* end = nullptr;
    errno = 0;
    const uint64_t number = strtoull(value, &end, 10);
    if (*value < '0' || *value > '9' || *end || errno || number < smallest || number > largest) {
        const std::string range = "a number from " + std::to_string(smallest) + " to " + std::to_string(largest);
        return wrong_value(variable, value, range.c_str());
    }
    out = number;
    return true;
}

bool configure_from_environment() {
    static const std::pair<const char*, Sched> schedules[] = {
        {"in-order", InOrder}, {"reverse", Reverse}, {"random", Random}, {"run-ahead", RunAhead}};
    static const std::pair<const char*, Async> completions[] = {{"early", Early}, {"late", Late}, {"mixed", Mixed}};
    Config read;
    uint64_t threads = uint64_t(read.threads);
    const bool good = read_choice("MEGAFUSE_EMU_SCHEDULE", schedules, read.sched) &&
                      read_choice("MEGAFUSE_EMU_ASYNC", completions, read.async) &&
                      read_number("MEGAFUSE_EMU_SEED", 0, UINT64_MAX, read.seed) &&
                      read_number("MEGAFUSE_EMU_THREADS", 1, 256, threads);
    if (!good) return false;
    const unsigned cores = std::thread::hardware_concurrency();
    read.threads = int(cores ? std::min<uint64_t>(threads, cores) : threads);
    read.quiet = config.quiet;
    config = read;
    return true;
}

// ---- allocations ----

static std::atomic<AllocationLookup> allocation_lookup;
void set_allocation_lookup(AllocationLookup lookup) { allocation_lookup = lookup; }

void check_global(const void* p, size_t bytes, const char* what, Loc loc) {
    Machine& m = *machine;
    const uintptr_t address = uintptr_t(p);
    if (address >= m.allocation_begin && address + bytes <= m.allocation_end) return;
    const AllocationLookup lookup = allocation_lookup;
    if (!lookup) return;
    uintptr_t begin = 0, end = 0;
    if (!lookup(address, &begin, &end)) die_with(loc, "%s at %p, which is in no allocation", what, p);
    if (address + bytes > end) {
        die_with(loc, "%s of %zu bytes at %p, %zu before the end of an allocation of %zu", what, bytes, p,
                 size_t(end - address), size_t(end - begin));
    }
    m.allocation_begin = begin;
    m.allocation_end = end;
}

// ---- launches ----

struct Launch {
    const Kernel* kernel;
    void* const* params;
    dim3 grid, block;
    unsigned smem;
    LaunchAttributes attributes;
    uint64_t clusters;
    std::atomic<uint64_t> next{0};
    std::atomic<int> at_work{0};
};

static void prepare(Machine& m, Machine& first, unsigned rank, const Launch& launch) {
    m.kernel = launch.kernel;
    m.params = launch.params;
    m.index = {{}, launch.block, launch.grid};
    m.threads = launch.block.x * launch.block.y * launch.block.z;
    m.warps = (m.threads + 31) / 32;
    m.dynamic_shared = launch.smem;
    m.dependent = launch.attributes.dependent;
    m.allocation_begin = m.allocation_end = 0;
    m.stats = {};
    m.cluster = &first.own_cluster;
    m.cluster->block[rank] = &m;
    m.block_rank = rank;
    m.first_thread = rank * m.threads;
    m.workers_at_work = &launch.at_work;
    for (unsigned i = 0; i < m.threads; i++) {
        Thread& t = m.thread[i];
        t.thread = {i % launch.block.x, i / launch.block.x % launch.block.y, i / (launch.block.x * launch.block.y)};
        t.lane = i % 32;
        t.warp = i / 32;
        t.index = i;
        t.own_warp = &m.warp[i / 32];
        t.block = &m.index;
        t.home = &m;
    }
}

static void add(Stats& to, const Stats& from) {
    const uint64_t* more = reinterpret_cast<const uint64_t*>(&from);
    uint64_t* sums = reinterpret_cast<uint64_t*>(&to);
    for (size_t k = 0; k < sizeof(Stats) / sizeof(uint64_t); k++) sums[k] += more[k];
}

static void run_blocks(Machine& m, Launch& launch) {
    catch_faults();
    launch.at_work++;
    const auto& shape = launch.attributes.cluster;
    m.own_cluster.size = shape[0] * shape[1] * shape[2];
    while (m.others.size() + 1 < m.own_cluster.size) {
        m.others.push_back(new Machine());
        create_machine(*m.others.back());
    }
    machine = &m;
    prepare(m, m, 0, launch);
    for (unsigned rank = 1; rank < m.own_cluster.size; rank++) prepare(*m.others[rank - 1], m, rank, launch);
    if constexpr (kRace) race::begin_launch(m, launch.clusters, launch.attributes.dependent);
    for (uint64_t number; !stop_requested() && (number = launch.next++) < launch.clusters;) run_cluster(m, number, shape);
    for (unsigned rank = 1; rank < m.own_cluster.size; rank++) add(m.stats, m.others[rank - 1]->stats);
    machine = nullptr;
    launch.at_work--;
}

// The launching thread works too, as worker 0; the others sleep between launches. Never destroyed: the process may end
// while they sleep.
struct Pool {
    std::mutex launching;  // held during a launch
    std::vector<Machine*> machines;
    std::mutex mutex;
    std::condition_variable wake, done;
    Launch* launch = nullptr;
    uint64_t generation = 0;
    size_t invited = 0, working = 0;  // workers of this launch, and those not done with it

    Machine& worker(size_t index) {
        while (machines.size() <= index) {
            Machine* m = new Machine();
            create_machine(*m);
            const size_t number = machines.size();
            machines.push_back(m);
            if (number > 0) std::thread([this, m, number] { serve(*m, number); }).detach();
        }
        return *machines[index];
    }

    void serve(Machine& m, size_t number) {
        uint64_t seen = 0;
        std::unique_lock lock(mutex);
        for (;;) {
            wake.wait(lock, [&] { return generation != seen; });
            seen = generation;
            if (number >= invited || !launch) continue;
            Launch& mine = *launch;
            lock.unlock();
            run_blocks(m, mine);
            lock.lock();
            if (--working == 0) done.notify_one();
        }
    }

    void run(Launch& work, size_t workers) {
        Machine& first = worker(0);
        if (workers > 1) {
            worker(workers - 1);
            std::lock_guard lock(mutex);
            launch = &work;
            invited = workers;
            working = workers - 1;
            generation++;
            wake.notify_all();
        }
        run_blocks(first, work);
        if (workers > 1) {
            std::unique_lock lock(mutex);
            done.wait(lock, [&] { return working == 0; });
            launch = nullptr;
        }
        for (size_t i = 0; i < workers; i++) add(stats, machines[i]->stats);
    }
};

static Pool* of_process;

// A forked child has none of its parent's workers, and their condition variables may be in any state: it begins with none.
static Pool& pool() {
    static const bool made = [] {
        of_process = new Pool;
        return pthread_atfork(nullptr, nullptr, [] { of_process = new Pool; }) == 0;
    }();
    if (!made) std::abort();
    return *of_process;
}

// A worker that slept through a whole launch finds `launch` null or a later one; it is invited by its number only.

static std::string refusal(const Kernel* kernel, dim3 grid, dim3 block, unsigned smem, const uint32_t (&cluster)[3]) {
    if (!kernel) return "not a kernel";
    char text[256] = "";
    const uint64_t threads = uint64_t(block.x) * block.y * block.z;
    if (threads == 0 || uint64_t(grid.x) * grid.y * grid.z == 0) {
        snprintf(text, sizeof text, "empty grid or block");
    } else if (threads > kMaxThreads || block.x > 1024 || block.y > 1024 || block.z > 64) {
        snprintf(text, sizeof text, "block (%u, %u, %u), the card has up to (1024, 1024, 64) and 1024 threads", block.x,
                 block.y, block.z);
    } else if (threads > kernel->max_threads) {
        snprintf(text, sizeof text, "block of %u threads, compiled for at most %u", unsigned(threads), kernel->max_threads);
    } else if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
        snprintf(text, sizeof text, "grid (%u, %u, %u), the card has up to (2147483647, 65535, 65535)", grid.x, grid.y, grid.z);
    } else if (uint64_t(cluster[0]) * cluster[1] * cluster[2] == 0 || uint64_t(cluster[0]) * cluster[1] * cluster[2] > kMaxCluster ||
               grid.x % cluster[0] || grid.y % cluster[1] || grid.z % cluster[2]) {
        snprintf(text, sizeof text, "clusters of (%u, %u, %u) blocks in a grid of (%u, %u, %u): they have 1 to %u blocks and divide it",
                 cluster[0], cluster[1], cluster[2], grid.x, grid.y, grid.z, kMaxCluster);
    } else if (smem > kMaxShared) {
        snprintf(text, sizeof text, "%u bytes of shared memory, the card has %u", smem, kMaxShared);
    }
    return *text ? std::string(kernel->name) + ": " + text : "";
}

int launch(Thunk fn, dim3 grid, dim3 block, unsigned smem, void* const* params, const LaunchAttributes& attributes) {
    std::lock_guard lock(pool().launching);
    const Kernel* kernel = find_registered(fn);
    const auto& cluster = attributes.cluster;
    latest_error = refusal(kernel, grid, block, smem, cluster);
    if (!latest_error.empty()) {
        if (!config.quiet) fprintf(stderr, "[emu] launch refused: %s\n", latest_error.c_str());
        return -1;
    }
    messages.clear();
    message_count = error_count = 0;
    const uint64_t clusters = uint64_t(grid.x) * grid.y * grid.z / (cluster[0] * cluster[1] * cluster[2]);
    Launch work{kernel, params, grid, block, smem, attributes, clusters};
    // Races between blocks are found in any order of the blocks, so the race build runs them one after the other.
    const uint64_t workers = kRace ? 1 : std::min<uint64_t>(uint64_t(config.threads), work.clusters);
    pool().run(work, workers ? size_t(workers) : 1);
    latest_error = messages;
    return message_count;
}
}  // namespace emu
