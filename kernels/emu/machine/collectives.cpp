// What threads do together: block barriers, warp shuffles and votes, ldmatrix, mma; and atomics.
//
// A lane leaves its operands in buffers of the warp, where each lane has places of its own, and waits; the last one carries
// the operation out and makes the others ready, and each takes its result when it runs again.
#include "machine.h"

#define EMU_INLINE inline __attribute__((always_inline))

namespace emu {

void reset_collectives(Machine& m) {
    for (Barrier& bar : m.bar) {
        memset(bar.present, 0, sizeof bar.present);
        memset(bar.waiting, 0, sizeof bar.waiting);
        bar.arrived = 0;
        if constexpr (kRace) race::forget(bar.sum);
    }
    for (unsigned w = 0; w < m.warps; w++) {
        m.warp[w].busy = 0;
        m.warp[w].leader = m.sched == InOrder ? 0 : unsigned(m.random_state >> w % 16 & 31);
    }
}

// ---- block barriers ----

void barrier(int id, int count, bool wait, Loc loc) {
    Machine& m = *machine;
    Thread& me = self();
    if (unsigned(id) >= kBarriers) die_with(loc, "barrier %d of %u", id, kBarriers);
    if (count < 0 || count % 32 || unsigned(count) > (m.threads + 31) / 32 * 32) {
        die_with(loc, "barrier %d for %d threads: a block of %u has no such number of whole warps", id, count, m.threads);
    }
    Barrier& bar = m.bar[id];
    if (!bar.arrived) {
        bar.count = count;
        bar.first = loc;
        // The missing lanes of a last, partial warp count as arrived.
        bar.expected = count && unsigned(count) < m.threads ? unsigned(count) : m.threads;
    } else if (bar.count != count) {
        die_with(loc, "barrier %d for %d threads, but for %d at %s:%d", id, count, bar.count, bar.first.file, bar.first.line);
    }
    if (count == 0) {
        if (m.alive < m.threads) {
            die_with(loc, "divergent __syncthreads: %u threads of the block have left the kernel", m.threads - m.alive);
        }
        if (bar.first.line != loc.line || bar.first.file != loc.file) {
            die_with(loc, "divergent __syncthreads: others of the block are at %s:%d", bar.first.file, bar.first.line);
        }
    }
    const uint32_t bit = 1u << me.lane;
    if (bar.present[me.warp] & bit) die_with(loc, "arrives a second time at barrier %d before it completed", id);
    bar.present[me.warp] |= bit;
    if (wait) bar.waiting[me.warp] |= bit;
    if constexpr (kRace) race::release_into(bar.sum, me.index);
    if (++bar.arrived < bar.expected) {
        if (wait) wait_for_others(count ? "named barrier" : "__syncthreads", loc);
        return;
    }

    m.stats.barriers++;
    bar.arrived = 0;
    for (unsigned w = 0; w < m.warps; w++) {
        if (bar.present[w] && bar.present[w] != m.warp[w].present) {
            die_with(loc, "barrier %d was reached by lanes %08x of warp %u, not by the whole warp", id, bar.present[w], w);
        }
        const uint32_t waiting = bar.waiting[w];
        if constexpr (kRace) {
            for (uint32_t lanes = waiting; lanes; lanes &= lanes - 1) {
                race::acquire_contributed(bar.sum, w * 32 + unsigned(std::countr_zero(lanes)));
            }
        }
        bar.present[w] = bar.waiting[w] = 0;
        if (waiting) m.make_ready(w, waiting);
    }
    if constexpr (kRace) race::forget(bar.sum);
    if (wait) {
        // Made ready with the others, in whatever order the schedule has for them.
        wait_for_others("ready", loc);
    }
}

// ---- warp operations ----

static const char* name_of(Collective kind) {
    static const char* const names[] = {"__syncwarp",     "__shfl_sync", "__ballot_sync",  "elect", "ldmatrix",
                                        "ldmatrix.trans", "stmatrix",    "stmatrix.trans", "mma",   "mma"};
    return names[unsigned(kind)];
}

// .aligned, or of the full warp: every lane of the warp executes the same instruction.
static bool is_aligned(Collective kind) { return kind >= Collective::Elect; }

static void execute_shuffle(Warp& warp, const Rendezvous& r) {
    for (uint32_t lanes = r.arrived; lanes; lanes &= lanes - 1) {
        const int lane = std::countr_zero(lanes);
        ShuffleLane& mine = warp.shuffle[lane];
        const int segment = lane & ~(mine.width - 1), end = segment + mine.width;
        int source = lane;
        switch (mine.mode) {
            case Idx: source = segment | (mine.arg & (mine.width - 1)); break;
            case Up: source = lane - mine.arg; break;
            case Down: source = lane + mine.arg; break;
            case Xor: source = lane ^ mine.arg; break;
        }
        if (source >= end || (mine.mode == Up && source < segment)) source = lane;
        if (!(r.arrived >> source & 1)) {
            die_with(r.where, "lane %d shuffles from lane %d, which does not take part", lane, source);
        }
        mine.result = warp.shuffle[source].value;
    }
}

static void execute_ballot(Warp& warp, const Rendezvous& r) {
    uint32_t votes = 0;
    for (uint32_t lanes = r.arrived; lanes; lanes &= lanes - 1) {
        const int lane = std::countr_zero(lanes);
        votes |= uint32_t(warp.shuffle[lane].value) << lane;
    }
    for (uint32_t lanes = r.arrived; lanes; lanes &= lanes - 1) warp.shuffle[std::countr_zero(lanes)].result = votes;
}

static void execute_elect(Warp& warp) {
    for (unsigned lane = 0; lane < 32; lane++) warp.shuffle[lane].result = lane == warp.leader;
}

// Row k of matrix i goes to lanes 4k .. 4k + 3, four bytes each; transposed, column k does.
static void execute_ldmatrix(Machine& m, Warp& warp, unsigned warp_index, const Rendezvous& r) {
    const bool trans = r.kind == Collective::LdMatrixTrans;
    for (int i = 0; i < r.detail; i++) {
        m.stats.ldsm++;
        uint8_t in_bank[8] = {}, wavefronts = 0;
        alignas(16) uint16_t matrix[8][8];
        for (int k = 0; k < 8; k++) {
            const void* row = warp.row[i * 8 + k];
            memcpy(matrix[k], row, 16);
            wavefronts = std::max(wavefronts, ++in_bank[uintptr_t(row) >> 4 & 7]);
        }
        m.stats.ldsm_wavefronts += wavefronts;
        if (!trans) {
            memcpy(warp.fragment[i], matrix, sizeof matrix);
        } else {
            for (int k = 0; k < 8; k++) {
                for (int pair = 0; pair < 4; pair++) {
                    warp.fragment[i][k * 4 + pair] = matrix[pair * 2][k] | uint32_t(matrix[pair * 2 + 1][k]) << 16;
                }
            }
        }
        if constexpr (kRace) {  // an element is read both for the lane that receives it and for the one that named its row
            for (unsigned k = 0; k < 8; k++) {
                const unsigned thread = warp_index * 32 + unsigned(i) * 8 + k;
                race::touch_as(thread, warp.row[unsigned(i) * 8 + k], 16, race::Access::Read, r.where);
            }
            for (unsigned lane = 0; lane < 32; lane++) {
                const unsigned k = lane / 4, pair = lane % 4, thread = warp_index * 32 + lane;
                const auto read = [&](unsigned row, unsigned column, size_t bytes) {
                    const char* p = static_cast<const char*>(warp.row[unsigned(i) * 8 + row]) + column * 2;
                    race::touch_as(thread, p, bytes, race::Access::Read, r.where);
                };
                if (trans) {
                    read(pair * 2, k, 2);
                    read(pair * 2 + 1, k, 2);
                } else {
                    read(k, pair * 2, 4);
                }
            }
        }
    }
}

// The reverse. The writes are those of the lanes that name the rows.
static void execute_stmatrix(Warp& warp, unsigned warp_index, const Rendezvous& r) {
    for (int i = 0; i < r.detail; i++) {
        alignas(16) uint16_t matrix[8][8], transposed[8][8];
        memcpy(matrix, warp.fragment[i], sizeof matrix);
        for (int k = 0; k < 64; k++) transposed[k % 8][k / 8] = matrix[k / 8][k % 8];
        for (int k = 0; k < 8; k++) {
            void* row = const_cast<void*>(warp.row[i * 8 + k]);
            memcpy(row, r.kind == Collective::StMatrixTrans ? transposed[k] : matrix[k], 16);
            if constexpr (kRace) race::touch_as(warp_index * 32 + unsigned(i * 8 + k), row, 16, race::Access::Write, r.where);
        }
    }
}

// ---- mma ----
//
// d = a b + c in f32, over k in order: products of two 16-bit floats are exact in f32, so each step rounds once, as a sum.
// (The card's own order and rounding of the sum are not documented.) The same operations whatever the vector width.

typedef float Row __attribute__((vector_size(32)));      // 8 columns
typedef uint32_t Pairs __attribute__((vector_size(32)));  // 8 pairs of 16-bit elements
typedef int32_t Mask __attribute__((vector_size(32)));

static EMU_INLINE void f16_to_f32(const Pairs& half, float* out) {  // as to_f32(f16)
    const Pairs magnitude = half & 0x7fffu, sign = (half & 0x8000u) << 16;
    const Row scaled = Row(magnitude << 13) * 0x1p112f;
    const Pairs exponent = Pairs(Mask(magnitude) >= 0x7c00) & 0x7f800000u;
    *reinterpret_cast<Row*>(out) = Row(Pairs(scaled) | exponent | sign);
}

template <bool is_bf16>
static EMU_INLINE void unpack(const uint32_t* packed, float* low, float* high) {
    const Pairs pairs = *reinterpret_cast<const Pairs*>(packed);
    if constexpr (is_bf16) {
        *reinterpret_cast<Row*>(low) = Row(pairs << 16);
        *reinterpret_cast<Row*>(high) = Row(pairs & 0xffff0000u);
    } else {
        f16_to_f32(pairs & 0xffffu, low);
        f16_to_f32(pairs >> 16, high);
    }
}

template <bool is_bf16>
static EMU_INLINE void multiply(MmaTile& tile) {
    alignas(32) float a[2][16][8], b[2][8][8];  // even k, odd k
    for (int k = 0; k < 8; k++) unpack<is_bf16>(tile.b[k], b[0][k], b[1][k]);
    for (int row = 0; row < 16; row++) unpack<is_bf16>(tile.a[row], a[0][row], a[1][row]);
    for (int row = 0; row < 16; row += 8) {  // eight sums at a time, to hide the latency of the additions
        Row sum[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) sum[i] = *reinterpret_cast<const Row*>(tile.c[row + i]);
#pragma GCC unroll 8
        for (int k = 0; k < 8; k++) {
#pragma GCC unroll 2
            for (int odd = 0; odd < 2; odd++) {
                const Row b_row = *reinterpret_cast<const Row*>(b[odd][k]);
#pragma GCC unroll 8
                for (int i = 0; i < 8; i++) sum[i] += a[odd][row + i][k] * b_row;
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) *reinterpret_cast<Row*>(tile.c[row + i]) = sum[i];
    }
}

static void multiply_bf16(MmaTile& tile) { multiply<true>(tile); }
static void multiply_f16(MmaTile& tile) { multiply<false>(tile); }
#if defined(__x86_64__)
__attribute__((target("avx2"))) static void multiply_bf16_avx2(MmaTile& tile) { multiply<true>(tile); }
__attribute__((target("avx2"))) static void multiply_f16_avx2(MmaTile& tile) { multiply<false>(tile); }
static const bool has_avx2 = __builtin_cpu_supports("avx2");
static void (*const execute_bf16)(MmaTile&) = has_avx2 ? multiply_bf16_avx2 : multiply_bf16;
static void (*const execute_f16)(MmaTile&) = has_avx2 ? multiply_f16_avx2 : multiply_f16;
#else
static void (*const execute_bf16)(MmaTile&) = multiply_bf16;
static void (*const execute_f16)(MmaTile&) = multiply_f16;
#endif

static void execute_sync(unsigned warp_index, const Rendezvous& r) {
    if constexpr (kRace) {
        race::Knowledge* sum = nullptr;
        for (uint32_t lanes = r.arrived; lanes; lanes &= lanes - 1) {
            race::release_into(sum, warp_index * 32 + unsigned(std::countr_zero(lanes)));
        }
        for (uint32_t lanes = r.arrived; lanes; lanes &= lanes - 1) {
            race::acquire_contributed(sum, warp_index * 32 + unsigned(std::countr_zero(lanes)));
        }
        race::forget(sum);
    }
}

// Carries out an operation that all its lanes have reached, and makes them ready but for `running`.
static void complete(Machine& m, unsigned warp_index, Rendezvous& r, uint32_t running) {
    Warp& warp = m.warp[warp_index];
    m.stats.warp_ops++;
    switch (r.kind) {
        case Collective::Sync: execute_sync(warp_index, r); break;
        case Collective::Shuffle: execute_shuffle(warp, r); break;
        case Collective::Ballot: execute_ballot(warp, r); break;
        case Collective::LdMatrix:
        case Collective::LdMatrixTrans: execute_ldmatrix(m, warp, warp_index, r); break;
        case Collective::StMatrix:
        case Collective::StMatrixTrans: execute_stmatrix(warp, warp_index, r); break;
        case Collective::Elect: execute_elect(warp); break;
        case Collective::MmaBf16:
            execute_bf16(warp.mma);
            m.stats.mma++;
            break;
        case Collective::MmaF16:
            execute_f16(warp.mma);
            m.stats.mma++;
    }
    warp.busy &= ~(1u << (&r - warp.slot));
    const uint32_t others = r.arrived & ~running;
    if (others) m.make_ready(warp_index, others);
}

__attribute__((cold)) static void check_overlap(const Warp& warp, uint32_t mask, Collective kind, Loc loc) {
    for (uint32_t busy = warp.busy; busy; busy &= busy - 1) {
        const Rendezvous& other = warp.slot[std::countr_zero(busy)];
        if (other.mask & mask) {
            die_with(loc, "%s for lanes %08x, while lanes %08x of the warp are in %s for %08x at %s:%d", name_of(kind), mask,
                     other.arrived, name_of(other.kind), other.mask, other.where.file, other.where.line);
        }
    }
}

// The first lane to arrive: opens a slot.
static Rendezvous& open(Warp& warp, uint32_t mask, Collective kind, int detail, Loc loc) {
    for (uint32_t busy = warp.busy; busy; busy &= busy - 1) {
        Rendezvous& other = warp.slot[std::countr_zero(busy)];
        if (other.mask == mask) return other;
    }
    if (is_aligned(kind) && warp.alive != kFullWarp) {
        die_with(loc, "%s needs all lanes of the warp, %08x are there", name_of(kind), warp.alive);
    }
    if (warp.busy) check_overlap(warp, mask, kind, loc);
    const unsigned slot = unsigned(std::countr_one(warp.busy));
    if (slot == Warp::kSlots) die_with(loc, "the emulator follows %u parts of a diverged warp", Warp::kSlots);
    warp.busy |= 1u << slot;
    warp.slot[slot] = {mask, 0, kind, detail, loc};
    return warp.slot[slot];
}

[[noreturn]] __attribute__((cold)) static void die_of_mismatch(const Rendezvous& r, uint32_t mask, uint32_t bit,
                                                               Collective kind, Loc loc) {
    if (!(mask & bit)) die_with(loc, "%s: the mask %08x lacks the calling lane", name_of(kind), mask);
    die_with(loc, "lanes of a warp in different operations: %s here, %s at %s:%d", name_of(kind), name_of(r.kind),
             r.where.file, r.where.line);
}

// The running lane's operands are in the warp's buffers; returns when the operation was carried out.
static EMU_INLINE void meet(Thread& me, uint32_t mask, Collective kind, int detail, Loc loc) {
    Warp& warp = *me.own_warp;
    const uint32_t bit = 1u << me.lane;
    Rendezvous& first = warp.slot[0];
    Rendezvous& r = (warp.busy & 1) && first.mask == mask ? first : open(warp, mask, kind, detail, loc);
    const bool same_place = !is_aligned(kind) || (r.where.line == loc.line && r.where.file == loc.file);
    if (!(mask & bit) || r.kind != kind || r.detail != detail || !same_place) [[unlikely]] {
        die_of_mismatch(r, mask, bit, kind, loc);
    }
    r.arrived |= bit;
    if (r.arrived != (mask & warp.alive)) return wait_for_others(name_of(kind), loc);
    Machine& m = *machine;
    me.where = loc;
    complete(m, me.warp, r, bit);
    if (m.sched == Random) yield_at_random(m);
}

void lane_left(Machine& m, Thread& thread) {
    check_wgmma_at_exit(m, thread);
    Warp& warp = m.warp[thread.warp];
    for (uint32_t busy = warp.busy; busy; busy &= busy - 1) {
        Rendezvous& r = warp.slot[std::countr_zero(busy)];
        if (is_aligned(r.kind)) die_with(r.where, "left the kernel while its warp is in %s here", name_of(r.kind));
        if (r.arrived == (r.mask & warp.alive)) complete(m, thread.warp, r, 0);
    }
    if (m.bar[0].arrived && m.bar[0].count == 0) {
        die_with(m.bar[0].first, "divergent __syncthreads: the thread left the kernel while others wait here");
    }
}

void syncwarp(uint32_t mask, Loc loc) { meet(self(), mask, Collective::Sync, 0, loc); }

uint64_t shfl(uint32_t mask, uint64_t value, Shfl mode, int arg, int width, Loc loc) {
    Thread& me = self();
    if (width < 1 || width > 32 || (width & (width - 1))) die_with(loc, "a shuffle's width is a power of two up to 32, not %d", width);
    ShuffleLane& mine = me.own_warp->shuffle[me.lane];
    mine = {value, 0, mode, mode == Idx ? arg : arg & 31, width};
    meet(me, mask, Collective::Shuffle, 0, loc);
    return mine.result;
}

uint32_t ballot(uint32_t mask, bool predicate, Loc loc) {
    Thread& me = self();
    ShuffleLane& mine = me.own_warp->shuffle[me.lane];
    mine.value = predicate;
    meet(me, mask, Collective::Ballot, 0, loc);
    return uint32_t(mine.result);
}

// The card promises no more than the calling lane, and that is what a diverged warp would see.
uint32_t active_mask() { return 1u << self().lane; }

void ldmatrix(uint32_t* r, int count, bool trans, const void* row, Loc loc) {
    Machine& m = *machine;
    Thread& me = self();
    if (!m.in_shared(row, 16)) die_with(loc, "ldmatrix: row %p is not in the block's shared memory", row);
    if (uintptr_t(row) % 16) die_with(loc, "ldmatrix: row at shared memory + %u is not aligned to 16", smem_addr(row, loc));
    me.own_warp->row[me.lane] = row;
    meet(me, kFullWarp, trans ? Collective::LdMatrixTrans : Collective::LdMatrix, count, loc);
    const Thread& again = self();
    for (int i = 0; i < count; i++) r[i] = again.own_warp->fragment[i][again.lane];
}

void stmatrix(void* row, const uint32_t* r, int count, bool trans, Loc loc) {
    Machine& m = *machine;
    Thread& me = self();
    if (int(me.lane) < count * 8) {
        if (!m.in_shared(row, 16)) die_with(loc, "stmatrix: row %p is not in the block's shared memory", row);
        if (uintptr_t(row) % 16) die_with(loc, "stmatrix: row at shared memory + %u is not aligned to 16", smem_addr(row, loc));
    }
    me.own_warp->row[me.lane] = row;
    for (int i = 0; i < count; i++) me.own_warp->fragment[i][me.lane] = r[i];
    meet(me, kFullWarp, trans ? Collective::StMatrixTrans : Collective::StMatrix, count, loc);
}

bool elect(Loc loc) {
    meet(self(), kFullWarp, Collective::Elect, 0, loc);
    const Thread& again = self();
    return again.own_warp->shuffle[again.lane].result != 0;
}

// Lane 4 g + t holds rows g and g + 8 of a, columns g of b, and columns 2 t, 2 t + 1 of each eight of d. Found anew after
// waiting: what a lane keeps meanwhile is memory that 31 others push out of the cache.
static EMU_INLINE float* fragment_of_d(Thread& me) { return &me.own_warp->mma.c[me.lane / 4][me.lane % 4 * 2]; }

void mma16816(float* d, const uint32_t* a, const uint32_t* b, const float* c, bool is_bf16, Loc loc) {
    {
        Thread& me = self();
        MmaTile& tile = me.own_warp->mma;
        const unsigned g = me.lane / 4, t = me.lane % 4;
        uint32_t* a_top = &tile.a[g][t];
        a_top[0] = a[0];
        a_top[8 * 8] = a[1];
        a_top[4] = a[2];
        a_top[8 * 8 + 4] = a[3];
        tile.b[t][g] = b[0];
        tile.b[t + 4][g] = b[1];
        float* top = fragment_of_d(me);
        memcpy(top, c, 8);
        memcpy(top + 8 * 8, c + 2, 8);
        meet(me, kFullWarp, is_bf16 ? Collective::MmaBf16 : Collective::MmaF16, 0, loc);
    }
    const float* top = fragment_of_d(self());
    memcpy(d, top, 8);
    memcpy(d + 2, top + 8 * 8, 8);
}

// ---- atomics: relaxed, they order nothing else ----

static void check_atomic(const void* p, size_t bytes, Loc loc) {
    if (uintptr_t(p) % bytes) die_with(loc, "atomic at %p, which is not aligned to %zu", p, bytes);
    if (!machine->in_shared_window(p)) check_global(p, bytes, "atomic", loc);
    if constexpr (kRace) race::touch(p, bytes, race::Access::Atomic, loc);
}

template <class T>
static T atomic(T* p, T (*combine)(T, T), T operand) {
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(p, &old, combine(old, operand), true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}

uint32_t atomic32(uint32_t* p, Combine32 combine, uint32_t operand, Loc loc) {
    check_atomic(p, 4, loc);
    if constexpr (kRace) race::relaxed_at(p);
    return atomic(p, combine, operand);
}

uint64_t atomic64(uint64_t* p, uint64_t (*combine)(uint64_t, uint64_t), uint64_t operand, Loc loc) {
    check_atomic(p, 8, loc);
    if constexpr (kRace) race::relaxed_at(p);
    return atomic(p, combine, operand);
}

uint32_t compare_and_swap32(uint32_t* p, uint32_t expected, uint32_t desired, Loc loc) {
    check_atomic(p, 4, loc);
    if constexpr (kRace) race::relaxed_at(p);
    __atomic_compare_exchange_n(p, &expected, desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
}

// ---- between blocks ----

uint32_t add_acq_rel(uint32_t* p, uint32_t operand, Loc loc) {
    check_atomic(p, 4, loc);
    if constexpr (kRace) {
        race::acquire_at(p);
        race::release_at(p, false);
    }
    return __atomic_fetch_add(p, operand, __ATOMIC_ACQ_REL);
}

// Who finds what he found before waits for somebody: the others go on.
uint32_t load_acquire(const uint32_t* p, Loc loc) {
    check_atomic(p, 4, loc);
    Thread& me = self();
    uint32_t value = __atomic_load_n(p, __ATOMIC_ACQUIRE);
    if (me.acquired_from == p && me.acquired == value) {
        poll("ld_acquire", loc);
        value = __atomic_load_n(p, __ATOMIC_ACQUIRE);
    }
    me.acquired_from = p;
    me.acquired = value;
    if constexpr (kRace) race::acquire_at(p);
    return value;
}

void store_release(uint32_t* p, uint32_t value, Loc loc) {
    check_atomic(p, 4, loc);
    if constexpr (kRace) race::release_at(p, true);
    __atomic_store_n(p, value, __ATOMIC_RELEASE);
}

void thread_fence(Loc) {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if constexpr (kRace) race::thread_fence();
}
}  // namespace emu
