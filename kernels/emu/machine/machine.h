// One block in execution on one worker thread: the state that the parts of the emulator share. Internal.
#pragma once
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

void begin_launch(Machine& m);
void begin_block(Machine& m);
void touch(const void* p, size_t bytes, Access access, Loc loc);                 // by the running thread
void touch_as(unsigned thread, const void* p, size_t bytes, Access, Loc loc);    // by another thread of its warp
void forget(Knowledge*& sum);
void release_into(Knowledge*& sum, unsigned thread);  // all that `thread` has done and knows
void acquire(Knowledge* sum, unsigned thread);        // `thread` knows all of it from now on
void acquire_contributed(Knowledge* sum, unsigned thread);  // the same, when `thread` released into it before
// A copy by cp.async belongs to the next group that its thread commits; a wait makes that thread know groups.
void async_copy_write(void* p, size_t bytes, uint32_t group, Loc loc);
void async_copies_done(uint32_t groups);
// TMA writes and wgmma reads are agents of their own.
void tma_write(void* p, size_t bytes, unsigned agent, uint32_t clock, Loc loc);
void tma_done(Knowledge*& sum, unsigned agent, uint32_t clock);
void wgmma_read(const void* p, size_t bytes, unsigned warpgroup, uint32_t group, Loc loc);
void wgmmas_done(unsigned warpgroup, uint32_t groups);
void fence_proxy_async();
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

struct TmaCopy {
    char* to;
    TensorMap map;
    uint64_t* bar;
    int coordinate[5];
    uint32_t bytes, clock;
    unsigned agent;
};
struct MbarrierInfo {
    std::vector<uint16_t> waiters;
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
    uint64_t block_number = 0;
    unsigned threads = 0, warps = 0, alive = 0;
    bool failed = false;

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
    Tiles* tiles = nullptr;  // a product's operands
    unsigned free_registers = 0;  // per thread of one warpgroup, left by setmaxnreg.dec
    std::vector<TmaCopy> tma;
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
void run_block(Machine& m, uint64_t block_number);
Thread* schedule(Machine& m);
void wait_for_others(const char* what, Loc loc);  // returns when somebody made this thread ready again
void yield_at_random(Machine& m);                 // in random order: sometimes lets another warp go first
[[noreturn]] void abandon_block();                // after an error was reported: the launch ends
[[noreturn]] void die_with(Loc loc, const char* format, ...) __attribute__((format(printf, 2, 3)));

// fault.cpp
void catch_faults();  // on this thread of the host from now on

// collectives.cpp
void reset_collectives(Machine& m);
void lane_left(Machine& m, Thread& thread);  // operations that waited only for it complete

// async.cpp
void land_copies(Thread& thread, uint32_t up_to);

// hopper.cpp
void reset_hopper(Machine& m);
void land_tma(Machine& m, size_t index);

// wgmma.cpp
void reset_wgmma(Machine& m);
void check_wgmma_at_exit(const Machine& m, const Thread& me);
}  // namespace emu
