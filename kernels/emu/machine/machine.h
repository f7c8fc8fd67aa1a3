// One block in execution, on one worker thread with those of its cluster: the state that the parts of the emulator share. Internal.
#pragma once
#include <atomic>
#include <deque>
#include <memory>
#include <unordered_map>
#include <vector>

#include "emu.h"
#include "hopper.h"
#include "wgmma.h"

#if defined(__SANITIZE_ADDRESS__)
#define EMU_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMU_ASAN 1
#endif
#endif
#ifdef EMU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emu {

#ifdef EMU_ASAN
constexpr bool kAsan = true;
#else
constexpr bool kAsan = false;
#endif
#ifdef EMU_RACE
constexpr bool kRace = true;
#else
constexpr bool kRace = false;
#endif

// What a card of compute capability 8.0 to 9.0 allows.
constexpr unsigned kMaxThreads = 1024, kMaxWarps = kMaxThreads / 32, kBarriers = 16, kWarpgroups = kMaxThreads / 128;
constexpr unsigned kMaxCluster = 8;
constexpr unsigned kMaxShared = 227 * 1024, kMaxStaticShared = 48 * 1024;
constexpr uint32_t kFullWarp = ~0u;

constexpr size_t kPage = 4096, kSharedWindow = 256 * 1024;
constexpr size_t kStackBytes = (kAsan ? 512 : 128) * 1024;  // sanitizers make frames several times as large

// ---- races: functions of race.cpp, called only in race builds ----

struct Machine;

namespace race {
struct Knowledge;  // which events of which threads and copies are known to have happened
struct State;
enum class Access : uint8_t { Read, Write, Atomic };

// Threads are named by their index in the running thread's block; `owner` is the block whose shared memory it is.
void begin_launch(Machine& m, uint64_t clusters, bool dependent);
void begin_cluster(Machine& m);
void touch(const void* p, size_t bytes, Access access, Loc loc);                 // by the running thread
void touch_as(unsigned thread, const void* p, size_t bytes, Access, Loc loc);    // by another thread of its warp
void forget(Knowledge*& sum);
void release_into(Knowledge*& sum, unsigned thread);  // all that `thread` has done and knows
void acquire(Knowledge* sum, unsigned thread);        // `thread` knows all of it from now on
void acquire_contributed(Knowledge* sum, unsigned thread);  // the same, when `thread` released into it before
// A copy by cp.async belongs to the next group that its thread commits; a wait makes that thread know groups.
void async_copy_write(void* p, size_t bytes, uint32_t group, Loc loc);
void async_copies_done(uint32_t groups);
void touch_shared(const Machine& owner, const void* p, size_t bytes, Access access, Loc loc);
// TMA writes and wgmma reads are agents of their own.
void tma_write(const Machine& owner, void* p, size_t bytes, unsigned agent, uint32_t clock, Loc loc);
void tma_read(const Machine& owner, const void* global, size_t bytes, unsigned agent, uint32_t clock, Loc loc);
void tma_done(const Machine& owner, Knowledge*& sum, unsigned agent, uint32_t clock);
bool tma_is_known(const Machine& owner, unsigned agent, uint32_t clock);  // to some thread of the block
// The running thread uses another block's shared memory itself, which has to be known there before that block ends.
void note_remote_access(const Machine& owner, Loc loc);
void check_remote_accesses(const Machine& owner);
// TMA stores of the running thread, by group.
void bulk_read(const void* shared, size_t bytes, uint32_t group, Loc loc);
void bulk_write(const void* global, size_t bytes, uint32_t group, Loc loc);
void bulk_done(uint32_t read_groups, uint32_t written_groups);
void wgmma_read(const void* p, size_t bytes, unsigned warpgroup, uint32_t group, Loc loc);
void wgmmas_done(unsigned warpgroup, uint32_t groups);
void fence_proxy_async();
void fence_proxy_async_global();
// Between blocks of a launch, through atomics at an address; between launches.
void release_at(const void* p, bool replaces);
void acquire_at(const void* p);
void relaxed_at(const void* p);
void thread_fence();
void previous_launch_done();
void next_launch_may_start();
}  // namespace race

// ---- threads and their stacks ----

struct Stack {
    char* low = nullptr;  // kStackBytes above a page that faults
    void* sp = nullptr;   // where it was parked, free, between two threads
    void* fake_stack = nullptr;
};

struct AsyncCopy {
    void* to;
    const void* from;
    uint32_t bytes, source_bytes;
};

struct Warp;

struct Thread : Context {
    Stack* stack;  // null until it starts
    void* sp;      // where it waits on it
    Warp* own_warp;
    const char* waiting_in;
    Loc where;
    // cp.async: copies not yet made, and of each outstanding group the end of its copies.
    std::vector<AsyncCopy> copies;
    std::vector<uint32_t> group_ends;
    uint32_t first_copy, first_group, committed_groups;
    // TMA stores: those since the latest commit, groups, and groups known to have read their shared memory.
    uint32_t bulk_open, bulk_committed, bulk_read;
    Loc bulk_where;  // of the latest
    const uint64_t* waiting_for;  // the mbarrier, and which phase's end
    uint32_t waiting_parity;
    Machine* home;
    uint32_t cluster_arrivals, cluster_waits;
    const uint32_t* acquired_from;  // by the latest load_acquire, and what
    uint32_t acquired;
};

// ---- warps ----

enum class Collective : uint8_t { Sync, Shuffle, Ballot, Elect, LdMatrix, LdMatrixTrans, StMatrix, StMatrixTrans, MmaBf16, MmaF16 };

// Lanes of a warp on their way into one operation.
struct Rendezvous {
    uint32_t mask, arrived;
    Collective kind;
    int detail;  // must agree between the lanes
    Loc where;
};

struct ShuffleLane {
    uint64_t value, result;
    Shfl mode;
    int arg, width;
};

// mma.m16n8k16 with f32 accumulators: pairs along k as registers hold them.
struct alignas(64) MmaTile {
    float c[16][8];
    uint32_t a[16][8];  // [row][k / 2]
    uint32_t b[8][8];   // [k / 2][column]
};

struct Warp {
    static constexpr unsigned kSlots = 8;
    uint32_t present;  // lanes that exist
    uint32_t alive;    // and have not left the kernel
    uint32_t busy;     // slots in use: disjoint masks of a diverged warp
    unsigned leader;   // of elect
    Rendezvous slot[kSlots];
    ShuffleLane shuffle[32];
    const void* row[32];
    alignas(16) uint32_t fragment[4][32];
    MmaTile mma;
};

// ---- block ----

struct Barrier {
    int count;  // as given; 0: the whole block
    unsigned expected, arrived;
    uint32_t present[kMaxWarps], waiting[kMaxWarps];
    Loc first;
    race::Knowledge* sum;
};

struct StaticShared {
    const void* key;
    void* address;
};

// ---- Hopper ----

// Into one block's shared memory, by TMA, or 16 bytes or fewer by st.async.
struct TmaCopy {
    char* to;
    TensorMap map;
    uint64_t* bar;
    int coordinate[5];
    uint16_t im2col_offset[3];
    uint32_t bytes, clock;
    unsigned agent;
    bool is_store_async;
    char value[16];
};
struct TmaStore {
    const char* from;
    TensorMap map;
    int coordinate[5];
    unsigned thread;
    uint32_t group;           // of its thread
    std::vector<char> bytes;  // empty until it has read them
};
struct MbarrierInfo {
    std::vector<uint16_t> waiters;
    Loc where;  // its initialisation
    race::Knowledge *sum = nullptr, *last_phase = nullptr;
    unsigned agent = 0;
    uint32_t clock = 0;
};

// ---- wgmma ----

enum class WgmmaStep : uint8_t { Fence, Multiply, Commit, Wait, Increase, Decrease };
// What all threads of the warpgroup have in common.
struct WgmmaCall {
    WgmmaStep step;
    Factors factors;
    bool accumulate, b_transposed, a_in_registers;
    int n;  // columns; groups that may be pending; registers
    uint64_t a, b;
    bool operator==(const WgmmaCall&) const = default;
};
// A warpgroup's d.
struct Accumulators {
    float* place[128];  // each thread's registers
    int n;
    uint32_t under_way;     // products not yet waited for
    bool is_known, fenced;  // has been used; a fence came since
    Loc where;              // of the latest product
    // [64][n]: the sums of the products under way; else what the registers held at the latest wait or fence.
    alignas(64) float value[64 * 256];
};
// A step that threads of a warpgroup have reached; a product until it was waited for.
struct WgmmaRecord {
    WgmmaCall call;
    Loc where;
    unsigned arrived;
    bool done;
    Accumulators* accumulators;
    float* d[128];
    const uint32_t* a_place[128];
    uint32_t a[128][4];  // as issued
};
struct Warpgroup {
    std::deque<std::unique_ptr<WgmmaRecord>> steps;  // that some threads have not reached
    uint32_t executed, reached[128];                 // steps: by all; by each thread
    std::deque<std::unique_ptr<WgmmaRecord>> products;  // issued and not waited for, in order
    std::vector<std::unique_ptr<WgmmaRecord>> unused;
    std::vector<uint32_t> groups;  // products of each outstanding group
    uint32_t open, committed, committed_by_first;  // the first thread may be ahead
    bool fenced_since_wait, fenced_since_commit;
    std::vector<std::unique_ptr<Accumulators>> accumulators;
    unsigned registers, wanted;  // per thread: has; waits for, or 0
};

// ---- clusters ----

// The blocks that run at one time on one worker: one, if the launch has no clusters.
struct Cluster {
    unsigned size = 1, current = 0;  // current: the block that ran latest
    uint64_t number = 0;             // in the grid
    Machine* block[kMaxCluster] = {};
    uint8_t order[kMaxCluster] = {};  // of blocks that run ahead
    unsigned alive = 0;
    bool failed = false;
    // The barrier: arrivals of threads that are alive, and phases that have ended.
    unsigned arrived = 0;
    uint32_t phases = 0;
    std::vector<Thread*> waiting;
    race::Knowledge *sum = nullptr, *last_phase = nullptr;
    // Threads that let others run before they look again.
    std::vector<Thread*> pollers;
    unsigned woken_pollers = 0, fruitless_polls = 0;
};

// ---- one worker ----

struct Tiles;

struct Machine {
    char* region = nullptr;  // the shared window, then stacks; one piece, so that one comparison tells them from the rest
    size_t region_bytes = 0;
    char* shared = nullptr;
    void* main_sp = nullptr;
    void* main_fake_stack = nullptr;
    const void* main_low = nullptr;
    size_t main_bytes = 0;
    std::vector<Stack*> stacks, free_stacks;

    const Kernel* kernel = nullptr;
    void* const* params = nullptr;
    BlockIndex index{};
    Cluster own_cluster;
    Cluster* cluster = nullptr;    // that of the worker's first machine, its block 0
    std::vector<Machine*> others;  // of that machine: for the cluster's other blocks
    unsigned block_rank = 0, first_thread = 0;  // in the cluster
    bool has_met = false;          // a thread has come through the cluster's barrier
    bool dependent = false;        // the launch may begin before the previous one has ended
    bool has_waited = false;       // for that one, a thread
    const std::atomic<int>* workers_at_work = nullptr;
    unsigned threads = 0, warps = 0, alive = 0;

    unsigned dynamic_shared = 0, shared_top = 0, static_shared = 0;
    std::vector<StaticShared> statics;

    // Threads that can run: a bit a lane, and a bit a warp with any.
    uint32_t ready[kMaxWarps], ready_warps = 0;
    unsigned current_warp = 0, lane_offset = 0;  // lanes from the offset on go first
    uint8_t rank[kMaxWarps];
    bool stays = false;  // a warp goes on as long as it can, and nothing lands between its steps
    uint64_t random_state = 1;
    Sched sched = InOrder;
    Async async = Early;

    Thread thread[kMaxThreads];
    Warp warp[kMaxWarps];
    Barrier bar[kBarriers];
    Warpgroup warpgroup[kWarpgroups];
    Tiles* tiles = nullptr;       // a product's operands
    unsigned free_registers = 0;  // per thread of one warpgroup, left by setmaxnreg.dec
    std::vector<TmaCopy> tma;
    std::vector<TmaStore> stores;
    std::unordered_map<uint64_t*, MbarrierInfo> mbarriers;

    uintptr_t fault_address = 0;
    uintptr_t allocation_begin = 0, allocation_end = 0;  // the one found last
    race::State* race = nullptr;
    Stats stats{};

    uint32_t random() {
        random_state ^= random_state << 13;
        random_state ^= random_state >> 7;
        random_state ^= random_state << 17;
        return uint32_t(random_state >> 11);
    }
    void make_ready(unsigned warp_index, uint32_t lanes) {
        ready[warp_index] |= lanes;
        ready_warps |= 1u << warp_index;
    }
    void make_ready_thread(unsigned t) { make_ready(t >> 5, 1u << (t & 31)); }
    bool in_shared_window(const void* p) const { return size_t(static_cast<const char*>(p) - shared) < kSharedWindow; }
    // Within the shared memory that this block has.
    bool in_shared(const void* p, size_t bytes) const {
        const size_t offset = size_t(static_cast<const char*>(p) - shared);
        return offset < shared_top && bytes <= shared_top - offset;
    }
};
extern __thread Machine* machine __attribute__((tls_model("initial-exec")));
static inline Thread& self() { return *static_cast<Thread*>(cur); }

// launch.cpp
enum class Message { Error, Race };
__attribute__((format(printf, 2, 3))) void report(Message kind, const char* format, ...);
bool stop_requested();  // an error, or too many races
std::string thread_name(const Machine& m, unsigned thread);
void check_global(const void* p, size_t bytes, const char* what, Loc loc);  // inside an allocation, where the table is known

// fibers.cpp
void create_machine(Machine& m);
void run_cluster(Machine& m, uint64_t number, const uint32_t (&shape)[3]);
Thread* schedule(Machine& m);
void wait_for_others(const char* what, Loc loc);  // returns when somebody made this thread ready again
void poll(const char* what, Loc loc);             // lets others run; reported as a deadlock when nothing ever happens
void yield_at_random(Machine& m);                 // in random order: sometimes lets another warp go first
[[noreturn]] void abandon_block();                // after an error was reported: the launch ends
[[noreturn]] void die_with(Loc loc, const char* format, ...) __attribute__((format(printf, 2, 3)));

// fault.cpp
void catch_faults();  // on this thread of the host from now on

// collectives.cpp
void reset_collectives(Machine& m);
void lane_left(Machine& m, Thread& thread);  // operations that waited only for it complete

// cluster.cpp
// The block that an address of the cluster is in, and the place there; checked to be of `bytes` that exist while it runs.
std::pair<Machine*, char*> find_remote(uint32_t address, size_t bytes, Loc loc);
void reset_cluster(Cluster& c);
void thread_left(Cluster& c, Thread& thread);  // a barrier that waited only for it completes

// async.cpp
void land_copies(Thread& thread, uint32_t up_to);

// hopper.cpp
void reset_hopper(Machine& m);
void land_tma(Machine& m, size_t index);
void step_store(Machine& m, size_t index);  // it reads, or if it has, it writes
void check_stores_at_exit(const Thread& me);
void finish_block(Machine& m);  // its last thread leaves: what is under way ends, or should have
void send(Machine& owner, TmaCopy copy, Loc loc);  // into the owner's shared memory, for one of its mbarriers
MbarrierInfo& find_mbarrier(Machine& owner, uint64_t* bar, Loc loc);
void mbar_arrive_at(Machine& owner, uint64_t* bar, uint32_t count, uint32_t transaction_bytes, Loc loc);
void mbar_expect_at(Machine& owner, uint64_t* bar, uint32_t bytes, Loc loc);
std::string mbarrier_text(const Machine& m, const Thread& waiting);  // what the phase it waits for lacks
inline constexpr char kMbarrierWait[] = "mbarrier wait";

// wgmma.cpp
void reset_wgmma(Machine& m);
void check_wgmma_at_exit(const Machine& m, const Thread& me);
}  // namespace emu
