// Threads of a block as fibers: context switch, stacks, the scheduler, the life of a thread, shared memory.
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdarg>

#include "machine.h"

namespace emu {

__thread Context* cur;
__thread Machine* machine;

// ---- context switch ----
//
// Saves the callee-saved registers on the running stack and that stack's pointer in *save, then goes on with `to`. About
// 10 ns: ucontext's makes a system call, 20 times as long. The float modes are not saved: kernels do not change them.

#if defined(__x86_64__)
extern "C" void emu_switch(void** save, void* to);
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
.type emu_switch,@function
emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp,(%rdi)
    movq %rsi,%rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emu_switch,.-emu_switch
)");
static void* first_frame(char* top, void (*entry)()) {
    void** sp = reinterpret_cast<void**>(uintptr_t(top) & ~uintptr_t(15));
    *--sp = nullptr;  // the return address of `entry`, which does not return
    *--sp = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; i++) *--sp = nullptr;
    return sp;
}
#elif defined(__aarch64__)
extern "C" void emu_switch(void** save, void* to);
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
.type emu_switch,@function
emu_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size emu_switch,.-emu_switch
)");
static void* first_frame(char* top, void (*entry)()) {
    char* sp = reinterpret_cast<char*>(uintptr_t(top) & ~uintptr_t(15)) - 160;
    memset(sp, 0, 160);
    reinterpret_cast<void**>(sp)[11] = reinterpret_cast<void*>(entry);  // x30
    return sp;
}
#else
#error "the emulated card switches stacks on x86-64 and aarch64 only"
#endif

// AddressSanitizer is told of every switch: where the next stack lies, and on arrival what it had saved for this one.
static inline void go_to(Stack& from, void** save, Stack& to, void* sp) {
    machine->stats.switches++;
#ifdef EMU_ASAN
    __sanitizer_start_switch_fiber(&from.fake_stack, to.low, kStackBytes);
#endif
    emu_switch(save, sp);
#ifdef EMU_ASAN
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
    (void)from, (void)to;
}

static void go_to_main(Stack& from) {
    const Machine& first = *machine->cluster->block[0];
#ifdef EMU_ASAN
    __sanitizer_start_switch_fiber(&from.fake_stack, first.main_low, first.main_bytes);
#endif
    emu_switch(&from.sp, first.main_sp);
#ifdef EMU_ASAN
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

static void go_from_main(Machine& m, Stack& to) {
#ifdef EMU_ASAN
    pthread_attr_t attributes;
    void* low;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &low, &m.main_bytes);
    pthread_attr_destroy(&attributes);
    m.main_low = low;
    __sanitizer_start_switch_fiber(&m.main_fake_stack, to.low, kStackBytes);
#endif
    emu_switch(&m.main_sp, to.sp);
#ifdef EMU_ASAN
    __sanitizer_finish_switch_fiber(m.main_fake_stack, nullptr, nullptr);
#endif
}

// ---- stacks ----
//
// A stack outlives the threads that run on it: a thread that ends is followed, on the same stack, by one that has not
// started, so the threads of a kernel without barriers share one warm stack and are never switched.

static void fiber_main();

static void prepare_stack(Machine& m, Stack& stack, size_t index) {
#ifdef EMU_ASAN
    __asan_unpoison_memory_region(stack.low, kStackBytes);
#endif
    // Tops at different offsets in a page: equal ones meet in the same sets of the L1 cache, 39 ns a switch for 13.
    stack.sp = first_frame(stack.low + kStackBytes - 64 - index % 61 * 192, fiber_main);
    stack.fake_stack = nullptr;
    m.free_stacks.push_back(&stack);
}

static Stack& take_stack(Machine& m) {
    if (m.free_stacks.empty()) {
        const size_t index = m.stacks.size();
        char* guard = m.region + kSharedWindow + index * (kStackBytes + kPage);
        mprotect(guard + kPage, kStackBytes, PROT_READ | PROT_WRITE);
        m.stacks.push_back(new Stack);
        m.stacks.back()->low = guard + kPage;
        prepare_stack(m, *m.stacks.back(), index);
    }
    Stack& stack = *m.free_stacks.back();
    m.free_stacks.pop_back();
    return stack;
}

void create_machine(Machine& m) {
    m.region_bytes = kSharedWindow + kMaxThreads * (kStackBytes + kPage);
    // Room for the window to start at a multiple of its size, as on the card, where offsets and addresses are the same.
    const size_t reserved = m.region_bytes + kSharedWindow;
    void* p = mmap(nullptr, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
        fprintf(stderr, "[emu] no address space for %zu bytes of stacks\n", reserved);
        abort();
    }
    m.region = reinterpret_cast<char*>((uintptr_t(p) + kSharedWindow - 1) & ~(uintptr_t(kSharedWindow) - 1));
    m.shared = m.region;
    mprotect(m.shared, kSharedWindow, PROT_READ | PROT_WRITE);
    for (Barrier& bar : m.bar) bar.sum = nullptr;
}

// ---- the scheduler ----

static unsigned nth_bit(uint32_t mask, unsigned n) {
    while (n--) mask &= mask - 1;
    return unsigned(std::countr_zero(mask));
}

static bool any_ready(const Cluster& c) {
    for (unsigned rank = 0; rank < c.size; rank++) {
        if (c.block[rank]->ready_warps) return true;
    }
    return false;
}

// One copy into a block's shared memory lands. False: none is under way.
static bool land_one(Cluster& c, bool at_random) {
    const unsigned first = at_random && c.size > 1 ? c.block[0]->random() % c.size : 0;
    for (unsigned i = 0; i < c.size; i++) {
        Machine& m = *c.block[(first + i) % c.size];
        if (m.tma.empty()) continue;
        land_tma(m, at_random ? c.block[0]->random() % m.tma.size() : 0);
        return true;
    }
    return false;
}

static void land_at_random(Cluster& c) {
    Machine& first = *c.block[0];
    for (unsigned rank = 0; rank < c.size; rank++) {
        Machine& m = *c.block[rank];
        while (!m.tma.empty() && first.random() % 4 == 0) land_tma(m, first.random() % m.tma.size());
        while (!m.stores.empty() && first.random() % 4 == 0) step_store(m, first.random() % m.stores.size());
    }
}

// Those who poll go on when nobody else can. After many rounds in which nobody else could they are stuck: soon, if no other
// worker runs blocks of the launch, else after some seconds.
static void wake_pollers(Cluster& c) {
    if (c.woken_pollers == 0) c.fruitless_polls = 0;
    if (c.woken_pollers > 0) c.woken_pollers--;
    constexpr unsigned kFewPolls = 1000, kMostPolls = 100'000;
    if (c.pollers.empty() || any_ready(c)) return;
    if (++c.fruitless_polls > kFewPolls) {
        if (*machine->workers_at_work == 1 || c.fruitless_polls > kMostPolls) return;
        usleep(100);
    }
    for (Thread* thread : c.pollers) thread->home->make_ready_thread(thread->index);
    c.woken_pollers = unsigned(c.pollers.size());
    c.pollers.clear();
}

// The block that goes next; it has a ready warp.
static Machine& next_block(Cluster& c) {
    const auto ready = [&](unsigned rank) { return c.block[rank]->ready_warps != 0; };
    Machine& first = *c.block[0];
    if (c.size == 1) return first;
    unsigned rank = c.current;
    switch (first.sched) {
        case InOrder:
            while (!ready(rank)) rank = (rank + 1) % c.size;
            break;
        case Reverse:
            rank = c.size - 1;
            while (!ready(rank)) rank--;
            break;
        case Random:
            if (!ready(rank) || first.random() % 4 == 0) {
                do {
                    rank = first.random() % c.size;
                } while (!ready(rank));
            }
            break;
        case RunAhead: {
            unsigned i = 0;
            while (!ready(c.order[i])) i++;
            rank = c.order[i];
        }
    }
    c.current = rank;
    return *c.block[rank];
}

// Takes the thread that goes next out of the ready ones of the cluster; null: none is ready.
Thread* schedule(Machine& of_cluster) {
    Cluster& c = *of_cluster.cluster;
    if (!c.alive) return nullptr;
    const bool mixed = of_cluster.async == Mixed;
    if (mixed) land_at_random(c);
    while (!any_ready(c) && land_one(c, mixed)) {
    }
    if (!c.pollers.empty()) wake_pollers(c);
    if (!any_ready(c)) return nullptr;
    Machine& m = next_block(c);
    const uint32_t warps = m.ready_warps;
    unsigned warp = m.current_warp;
    switch (m.sched) {
        case InOrder:
            if (!(warps >> warp & 1)) {
                const uint32_t higher = warps & ~((2u << warp) - 1);
                warp = unsigned(std::countr_zero(higher ? higher : warps));
            }
            break;
        case Reverse: warp = 31 - unsigned(std::countl_zero(warps)); break;
        case Random:
            if (!(warps >> warp & 1)) {
                const uint32_t random = m.random();
                warp = nth_bit(warps, (random >> 5) % unsigned(std::popcount(warps)));
                m.lane_offset = random & 31;
            }
            break;
        case RunAhead: {
            unsigned i = 0;
            while (!(warps >> m.rank[i] & 1)) i++;
            warp = m.rank[i];
        }
    }
    m.current_warp = warp;
    const uint32_t lanes = m.ready[warp];
    unsigned lane;
    if (m.sched == Reverse) {
        lane = 31 - unsigned(std::countl_zero(lanes));
    } else {
        const uint32_t from_offset = lanes >> m.lane_offset << m.lane_offset;
        lane = unsigned(std::countr_zero(from_offset ? from_offset : lanes));
    }
    m.ready[warp] = lanes & ~(1u << lane);
    if (!m.ready[warp]) m.ready_warps &= ~(1u << warp);
    return &m.thread[warp * 32 + lane];
}

// ---- errors inside a block ----

// Leaves the block as it is; run_block makes new frames for the stacks that were in use.
void abandon_block() {
    machine->cluster->failed = true;
    Stack nowhere;
    go_to_main(nowhere);
    __builtin_unreachable();
}

void die_with(Loc loc, const char* format, ...) {
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    report(Message::Error, "%s at %s:%d: %s", thread_name(*machine, cur->index).c_str(), loc.file, loc.line, text);
    abandon_block();
}

void die(const char* what, Loc loc) { die_with(loc, "%s", what); }

// Lanes that wait at one place are one line.
static std::string waiting_text(const Machine& m) {
    std::string lines;
    char block[40] = "";
    if (m.cluster->size > 1) snprintf(block, sizeof block, "block %u of the cluster, ", m.block_rank);
    for (unsigned w = 0; w < m.warps; w++) {
        uint32_t rest = m.warp[w].alive;
        while (rest) {
            const Thread& first = m.thread[w * 32 + unsigned(std::countr_zero(rest))];
            uint32_t same = 0;
            for (uint32_t lanes = rest; lanes; lanes &= lanes - 1) {
                const Thread& t = m.thread[w * 32 + unsigned(std::countr_zero(lanes))];
                const bool alike = t.where.line == first.where.line && t.waiting_in == first.waiting_in;
                if (alike && (t.waiting_in != kMbarrierWait || t.waiting_for == first.waiting_for)) same |= 1u << t.lane;
            }
            rest &= ~same;
            char line[360];
            snprintf(line, sizeof line, "\n    %swarp %u, lanes %08x: %s at %s:%d", block, w, same, first.waiting_in,
                     first.where.file, first.where.line);
            lines += line;
            if (first.waiting_in == kMbarrierWait) lines += mbarrier_text(m, first);
        }
        const uint32_t left = m.warp[w].present & ~m.warp[w].alive;
        if (left) {
            char line[120];
            snprintf(line, sizeof line, "\n    %swarp %u, lanes %08x: left the kernel", block, w, left);
            lines += line;
        }
    }
    return lines;
}

[[noreturn]] static void deadlock(const Cluster& c) {
    std::string lines;
    for (unsigned rank = 0; rank < c.size; rank++) lines += waiting_text(*c.block[rank]);
    report(Message::Error, "deadlock, every thread waits:%s", lines.c_str());
    abandon_block();
}

// ---- waiting ----

static inline void resume(Thread& me, Thread& next) {
    cur = &next;
    machine = next.home;
    if (!next.stack) [[unlikely]] {
        next.stack = &take_stack(*next.home);
        next.sp = next.stack->sp;
    }
    if (&next != &me) go_to(*me.stack, &me.sp, *next.stack, next.sp);
}

void wait_for_others(const char* what, Loc loc) {
    Machine& m = *machine;
    Thread& me = self();
    me.waiting_in = what;
    me.where = loc;
    // The common case of schedule(): another lane of the warp.
    const uint32_t lanes = m.ready[m.current_warp], from_offset = lanes >> m.lane_offset << m.lane_offset;
    if (m.stays && from_offset & (from_offset - 1)) [[likely]] {  // at least two, so the warp remains ready
        m.ready[m.current_warp] = lanes & ~(from_offset & -from_offset);
        return resume(me, m.thread[m.current_warp * 32 + unsigned(std::countr_zero(from_offset))]);
    }
    Thread* next = schedule(m);
    if (!next) deadlock(*m.cluster);
    resume(me, *next);
}

void poll(const char* what, Loc loc) {
    machine->cluster->pollers.push_back(&self());
    wait_for_others(what, loc);
}

void yield_at_random(Machine& m) {
    if (m.sched != Random || m.random() % 4 != 0) return;
    Thread& me = self();
    m.make_ready_thread(me.index);
    m.current_warp = nth_bit(m.ready_warps, m.random() % unsigned(std::popcount(m.ready_warps)));
    wait_for_others("ready", me.where);
}

// ---- the life of a thread ----

// A fiber may be continued by another thread of the host in the next launch, so what these two functions read of `cur`
// and `machine` must not be kept across a switch: hence not inlined.
__attribute__((noinline)) static void run_thread() {
    Machine& m = *machine;
    m.kernel->fn(m.params);
    Thread& me = self();
    if (!me.group_ends.empty() || !me.copies.empty()) land_copies(me, uint32_t(me.copies.size()));
    if (me.bulk_open || me.bulk_committed) check_stores_at_exit(me);
    if (m.alive == 1) finish_block(m);
    m.alive--;
    m.cluster->alive--;
    m.warp[me.warp].alive &= ~(1u << me.lane);
    lane_left(m, me);
    thread_left(*m.cluster, me);
}

// Returns on this stack when `cur` is a thread that is to start here.
__attribute__((noinline)) static void next_thread() {
    Machine& m = *machine;  // a stack stays with the block whose threads run on it
    Stack& mine = *self().stack;
    Thread* next = schedule(m);
    if (next && !next->stack && next->home == &m) {
        next->stack = &mine;
        cur = next;
        return;
    }
    if (!next && m.cluster->alive) deadlock(*m.cluster);
    m.free_stacks.push_back(&mine);
    if (!next) return go_to_main(mine);
    cur = next;
    machine = next->home;
    if (!next->stack) {
        next->stack = &take_stack(*next->home);
        next->sp = next->stack->sp;
    }
    go_to(mine, &mine.sp, *next->stack, next->sp);
}

static void fiber_main() {
#ifdef EMU_ASAN
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
    for (;;) {
        run_thread();
        next_thread();
    }
}

// ---- a block ----

static uint64_t mixed(uint64_t x) {
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ x >> 27) * 0x94D049BB133111EBull;
    return x ^ x >> 31;
}

static void begin_block(Machine& m, uint3 block) {
    const dim3 grid = m.index.grid_dim;
    const uint64_t number = (uint64_t(block.z) * grid.y + block.y) * grid.x + block.x;
    m.index.block = block;
    m.alive = m.threads;
    m.has_met = false;
    m.has_waited = false;
    m.sched = config.sched;
    m.async = config.async;
    m.random_state = mixed(config.seed * 0x9E3779B97F4A7C15ull + number + 1) | 1;
    m.current_warp = 0;
    m.lane_offset = 0;
    m.stays = m.sched == InOrder || m.sched == Random;
    if (m.sched == Random || m.sched == RunAhead) {
        m.current_warp = m.random() % m.warps;
        m.lane_offset = m.random() & 31;
        for (unsigned i = 0; i < m.warps; i++) m.rank[i] = uint8_t(i);
        for (unsigned i = m.warps - 1; i > 0; i--) std::swap(m.rank[i], m.rank[m.random() % (i + 1)]);
    }

    m.shared_top = m.dynamic_shared;
    m.static_shared = 0;
    m.statics.clear();
#ifdef EMU_ASAN
    __asan_unpoison_memory_region(m.shared, kSharedWindow);
#endif
    memset(m.shared, config.fill, m.dynamic_shared);
#ifdef EMU_ASAN
    __asan_poison_memory_region(m.shared + m.dynamic_shared, kSharedWindow - m.dynamic_shared);
#endif

    reset_collectives(m);
    reset_hopper(m);
    reset_wgmma(m);
    m.ready_warps = 0;
    for (unsigned w = 0; w < m.warps; w++) {
        const unsigned lanes = min(m.threads - w * 32, 32u);
        m.warp[w].present = m.warp[w].alive = lanes == 32 ? kFullWarp : (1u << lanes) - 1;
        m.ready[w] = 0;
        m.make_ready(w, m.warp[w].present);
    }
    for (unsigned i = 0; i < m.threads; i++) {
        Thread& t = m.thread[i];
        t.stack = nullptr;
        t.copies.clear();
        t.group_ends.clear();
        t.first_copy = t.first_group = t.committed_groups = 0;
        t.bulk_open = t.bulk_committed = t.bulk_read = 0;
        t.cluster_arrivals = t.cluster_waits = 0;
        t.acquired_from = nullptr;
    }
}

// Blocks of a cluster are neighbours; their rank counts along x first, as blocks do in the grid.
void run_cluster(Machine& m, uint64_t number, const uint32_t (&shape)[3]) {
    Cluster& c = *m.cluster;
    c.number = number;
    reset_cluster(c);
    const dim3 grid = m.index.grid_dim;
    const uint64_t across = grid.x / shape[0], down = grid.y / shape[1];
    const uint3 corner = {unsigned(number % across) * shape[0], unsigned(number / across % down) * shape[1],
                          unsigned(number / (across * down)) * shape[2]};
    for (unsigned rank = 0; rank < c.size; rank++) {
        begin_block(*c.block[rank], {corner.x + rank % shape[0], corner.y + rank / shape[0] % shape[1],
                                     corner.z + rank / (shape[0] * shape[1])});
    }
    if (c.size > 1) {
        c.current = m.sched == Random ? m.random() % c.size : 0;
        for (unsigned i = 0; i < c.size; i++) c.order[i] = uint8_t(i);
        for (unsigned i = c.size - 1; i > 0; i--) std::swap(c.order[i], c.order[m.random() % (i + 1)]);
    }
    if constexpr (kRace) race::begin_cluster(m);

    Thread& first = *schedule(m);
    cur = &first;
    machine = first.home;
    first.stack = &take_stack(*first.home);
    go_from_main(m, *first.stack);
    cur = nullptr;
    machine = &m;

    for (unsigned rank = 0; rank < c.size; rank++) {
        Machine& block = *c.block[rank];
        if (c.failed) {
            block.free_stacks.clear();
            for (size_t i = 0; i < block.stacks.size(); i++) prepare_stack(block, *block.stacks[i], i);
        }
#ifdef EMU_ASAN
        __asan_unpoison_memory_region(block.shared, kSharedWindow);
#endif
    }
}

// ---- shared memory ----

void* dyn_smem(size_t need, Loc loc) {
    Machine& m = *machine;
    if (need > m.dynamic_shared) {
        die_with(loc, "the kernel uses %zu bytes of dynamic shared memory, the launch gave %u", need, m.dynamic_shared);
    }
    return m.shared;
}

void* static_smem(const void* key, size_t bytes, size_t align) {
    Machine& m = *machine;
    for (const StaticShared& s : m.statics) {
        if (s.key == key) return s.address;
    }
    const Loc nowhere("static shared memory", 0);
    m.static_shared += unsigned(bytes);
    if (m.static_shared > kMaxStaticShared) die_with(nowhere, "more than 48 KiB of static shared memory");
    const size_t gap = kAsan ? 32 : 0;  // stays poisoned
    align = align < 16 ? 16 : align;
    const size_t start = (m.shared_top + gap + align - 1) / align * align;
    if (start + bytes > kMaxShared + gap * m.statics.size()) {
        die_with(nowhere, "%zu bytes of shared memory, the card has %u", start + bytes, kMaxShared);
    }
    char* p = m.shared + start;
    m.shared_top = unsigned(start + bytes);
#ifdef EMU_ASAN
    __asan_unpoison_memory_region(p, bytes);
#endif
    memset(p, config.fill, bytes);
    m.statics.push_back({key, p});
    return p;
}

uint32_t smem_addr(const void* p, Loc loc) {
    if (!machine->in_shared_window(p)) die_with(loc, "%p is not in shared memory", p);
    return uint32_t(static_cast<const char*>(p) - machine->shared);
}
}  // namespace emu
