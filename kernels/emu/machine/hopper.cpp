// Hopper's asynchronous parts: mbarrier, TMA in tile mode, wgmma with both operands in shared memory.
#include "machine.h"

namespace emu {

void reset_hopper(Machine& m) {
    m.tma.clear();
    if constexpr (kRace) {
        for (auto& [bar, info] : m.mbarriers) {
            race::forget(info.sum);
            race::forget(info.last_phase);
        }
    }
    m.mbarriers.clear();
    for (Warpgroup& group : m.warpgroup) {
        group.arrived = group.open = group.committed = 0;
        group.queue.clear();
        group.groups.clear();
    }
}

// ---- mbarrier ----

// The emulator's own layout of the opaque 64 bits: phase, pending arrivals (20 bits), their number at the start of a
// phase (20), expected transaction bytes (signed, 23).
struct MbarrierState {
    uint32_t phase, pending, count;
    int32_t transactions;
};
static MbarrierState load(const uint64_t* bar) {
    const uint64_t bits = *bar;
    return {uint32_t(bits & 1), uint32_t(bits >> 1 & 0xFFFFF), uint32_t(bits >> 21 & 0xFFFFF), int32_t(int64_t(bits) >> 41)};
}
static void store(uint64_t* bar, const MbarrierState& s) {
    *bar = s.phase | uint64_t(s.pending) << 1 | uint64_t(s.count) << 21 | uint64_t(int64_t(s.transactions)) << 41;
}

// Stores the state, after the end of the phase if it has come.
static void settle(Machine& m, uint64_t* bar, MbarrierInfo& info, MbarrierState state) {
    if (state.pending == 0 && state.transactions == 0) {
        state.phase ^= 1;
        state.pending = state.count;
        if constexpr (kRace) {
            race::forget(info.last_phase);
            std::swap(info.last_phase, info.sum);
        }
        for (uint16_t waiter : info.waiters) m.make_ready_thread(waiter);
        info.waiters.clear();
    }
    store(bar, state);
}

static void check_address(const Machine& m, const uint64_t* bar, Loc loc) {
    if (!m.in_shared(bar, 8) || uintptr_t(bar) % 8) die_with(loc, "mbarrier at %p: not 8 aligned bytes of shared memory", bar);
}
static MbarrierInfo& find(Machine& m, uint64_t* bar, Loc loc) {
    check_address(m, bar, loc);
    const auto found = m.mbarriers.find(bar);
    if (found == m.mbarriers.end()) die_with(loc, "mbarrier used before it was initialised");
    // Its operations order themselves; that the initialisation came first is the kernel's business.
    if constexpr (kRace) race::touch(bar, 8, race::Access::Read, loc);
    return found->second;
}

void mbar_init(uint64_t* bar, uint32_t count, Loc loc) {
    Machine& m = *machine;
    check_address(m, bar, loc);
    if (count == 0 || count > 0xFFFFF) die_with(loc, "mbarrier for %u arrivals", count);
    const unsigned agent = unsigned(m.mbarriers.size());
    MbarrierInfo& info = m.mbarriers[bar];
    info.waiters.clear();
    info.agent = agent;
    store(bar, {0, count, count, 0});
    if constexpr (kRace) race::touch(bar, 8, race::Access::Write, loc);
}

void mbar_arrive(uint64_t* bar, uint32_t transaction_bytes, Loc loc) {
    Machine& m = *machine;
    MbarrierInfo& info = find(m, bar, loc);
    MbarrierState state = load(bar);
    if (state.pending == 0) die_with(loc, "more than the mbarrier's %u arrivals in one phase", state.count);
    if constexpr (kRace) race::release_into(info.sum, self().index);
    state.pending--;
    state.transactions += int32_t(transaction_bytes);
    settle(m, bar, info, state);
}

void mbar_wait(uint64_t* bar, uint32_t parity, Loc loc) {
    Machine& m = *machine;
    for (;;) {
        MbarrierInfo& info = find(m, bar, loc);
        if (load(bar).phase != (parity & 1)) {
            if constexpr (kRace) {
                if (info.last_phase) race::acquire(info.last_phase, self().index);
            }
            return;
        }
        info.waiters.push_back(uint16_t(self().index));
        wait_for_others("mbarrier wait", loc);
    }
}

// ---- TMA ----

int tensor_map_encode(TensorMap* map, int element_bytes, int rank, void* base, const uint64_t* dim,
                      const uint64_t* stride_bytes, const uint32_t* box, int swizzle) {
    static_assert(sizeof(TensorMap) == 128);
    if (rank < 1 || rank > 5 || swizzle < 0 || swizzle > 3 || uintptr_t(base) % 16) return 1;
    memset(static_cast<void*>(map), 0, sizeof *map);
    map->base = uintptr_t(base);
    map->rank = uint32_t(rank);
    map->element_bytes = uint32_t(element_bytes);
    map->swizzle = uint32_t(swizzle);
    for (int i = 0; i < rank; i++) {
        map->dim[i] = dim[i];
        map->stride[i] = i ? stride_bytes[i - 1] : uint64_t(element_bytes);
        map->box[i] = box[i];
        if (i && stride_bytes[i - 1] % 16) return 1;
        if (box[i] < 1 || box[i] > 256) return 1;
    }
    const uint64_t inner_bytes = uint64_t(element_bytes) * box[0];
    return inner_bytes % 16 || (swizzle && inner_bytes > (16u << swizzle));
}

// Exchanges the 16-byte chunks of a row by the row's number, both taken from the address.
static uintptr_t swizzled(uintptr_t address, uint32_t swizzle) {
    return swizzle ? address ^ (address >> 7 & ((1u << swizzle) - 1)) << 4 : address;
}

// Elements outside the tensor are zero.
void land_tma(Machine& m, size_t index) {
    const TmaCopy copy = m.tma[index];
    m.tma.erase(m.tma.begin() + ptrdiff_t(index));
    m.stays = m.tma.empty() && (m.sched == InOrder || m.sched == Random);
    const TensorMap& map = copy.map;
    const uint32_t row_bytes = map.box[0] * map.element_bytes, rows = copy.bytes / row_bytes;
    m.stats.tma++;
    for (uint32_t r = 0; r < rows; r++) {
        const char* source = reinterpret_cast<const char*>(map.base);
        uint32_t rest = r;
        bool inside = true;
        for (uint32_t d = 1; d < map.rank; d++) {
            const int64_t at = copy.coordinate[d] + int64_t(rest % map.box[d]);
            rest /= map.box[d];
            if (at < 0 || at >= int64_t(map.dim[d])) inside = false;
            if (inside) source += at * int64_t(map.stride[d]);
        }
        for (uint32_t offset = 0; offset < row_bytes; offset += 16) {
            char chunk[16] = {};
            for (uint32_t byte = 0; byte < 16; byte += map.element_bytes) {
                const int64_t at = copy.coordinate[0] + int64_t((offset + byte) / map.element_bytes);
                if (inside && at >= 0 && at < int64_t(map.dim[0])) {
                    memcpy(chunk + byte, source + at * map.element_bytes, map.element_bytes);
                }
            }
            const uintptr_t to = uintptr_t(copy.to - m.shared) + r * row_bytes + offset;
            memcpy(m.shared + swizzled(to, map.swizzle), chunk, 16);
        }
    }
    MbarrierInfo& info = m.mbarriers[copy.bar];
    if constexpr (kRace) race::tma_done(info.sum, copy.agent, copy.clock);
    MbarrierState state = load(copy.bar);
    state.transactions -= int32_t(copy.bytes);
    settle(m, copy.bar, info, state);
}

void tma_load(void* shared, const TensorMap* map, uint64_t* bar, const int* coordinates, int rank, Loc loc) {
    Machine& m = *machine;
    if (int(map->rank) != rank) die_with(loc, "TMA of rank %d from a tensor map of rank %u", rank, map->rank);
    MbarrierInfo& info = find(m, bar, loc);
    TmaCopy copy{static_cast<char*>(shared), *map, bar, {}, map->element_bytes, 0, info.agent};
    for (int d = 0; d < rank; d++) {
        copy.coordinate[d] = coordinates[d];
        copy.bytes *= map->box[d];
    }
    if (!m.in_shared(shared, copy.bytes)) die_with(loc, "TMA of %u bytes outside the block's shared memory", copy.bytes);
    if (uintptr_t(shared) % 128) die_with(loc, "TMA destination is not aligned to 128");
    if (map->swizzle && map->box[0] * map->element_bytes != (16u << map->swizzle)) {
        die_with(loc, "the emulator wants the box's inner dimension to be as wide as the swizzle");
    }
    if constexpr (kRace) {
        copy.clock = ++info.clock;
        race::tma_write(shared, copy.bytes, copy.agent, copy.clock, loc);
    }
    m.tma.push_back(copy);
    m.stays = false;
    if (m.async == Early) land_tma(m, m.tma.size() - 1);
}

// ---- wgmma ----

static float to_float(uint16_t bits, bool is_bf16) { return is_bf16 ? to_f32(bf16{bits}) : to_f32(f16{bits}); }

// Address of element (row, k) of an operand: with rows of k (K-major), or with rows of the other dimension (MN-major).
static const char* element(const Machine& m, uint64_t descriptor, uint32_t row, uint32_t k, bool mn_major) {
    const uint32_t start = uint32_t(descriptor & 0x3FFF) << 4;
    const uint32_t leading = uint32_t(descriptor >> 16 & 0x3FFF) << 4, stride = uint32_t(descriptor >> 32 & 0x3FFF) << 4;
    const uintptr_t address = mn_major ? start + row / 64 * leading + k / 8 * stride + k % 8 * 128 + row % 64 * 2
                                       : start + row / 8 * stride + row % 8 * 128 + k * 2;
    return m.shared + (swizzled(address, 3) & 0x3FFFF);
}

static void multiply(Machine& m, const Wgmma& w) {
    auto& [a, b, d] = m.wgmma_operands;
    const WgmmaCall& call = w.call;
    const auto value = [&](const char* p) {
        uint16_t bits;
        memcpy(&bits, p, 2);
        return to_float(bits, call.is_bf16);
    };
    m.stats.wgmma++;
    for (uint32_t row = 0; row < 64; row++) {
        for (uint32_t k = 0; k < 16; k++) a[row][k] = value(element(m, call.a, row, k, false));
    }
    for (uint32_t column = 0; column < uint32_t(call.n); column++) {
        for (uint32_t k = 0; k < 16; k++) b[k][column] = value(element(m, call.b, column, k, call.b_transposed));
    }
    // Thread t holds row t / 32 * 16 + t % 32 / 4, and the one 8 below, columns t % 4 * 2 and the next of each eight.
    const auto each_register = [&](auto&& visit) {
        for (int t = 0; t < 128; t++) {
            const int row = t / 32 * 16 + t % 32 / 4, column = t % 4 * 2;
            for (int i = 0; i < call.n / 2; i++) {
                visit(w.d[t][i], d[row + (i >> 1 & 1) * 8][i / 4 * 8 + column + (i & 1)]);
            }
        }
    };
    each_register([&](float& held, float& sum) { sum = call.accumulate ? held : 0.f; });
    for (int row = 0; row < 64; row++) {
        for (int k = 0; k < 16; k++) {
            for (int column = 0; column < call.n; column++) d[row][column] += a[row][k] * b[k][column];
        }
    }
    each_register([&](float& held, float& sum) { held = sum; });
}

static void check_reads(Machine& m, const WgmmaCall& call, unsigned index, uint32_t group) {
    for (uint32_t row = 0; row < 64; row++) {
        for (uint32_t k = 0; k < 16; k += 8) race::wgmma_read(element(m, call.a, row, k, false), 16, index, group, call.loc);
    }
    if (!call.b_transposed) {
        for (uint32_t row = 0; row < uint32_t(call.n); row++) {
            for (uint32_t k = 0; k < 16; k += 8) race::wgmma_read(element(m, call.b, row, k, false), 16, index, group, call.loc);
        }
    } else {
        for (uint32_t row = 0; row < uint32_t(call.n); row += 8) {
            for (uint32_t k = 0; k < 16; k++) race::wgmma_read(element(m, call.b, row, k, true), 16, index, group, call.loc);
        }
    }
}

static void execute(Machine& m, Warpgroup& group, unsigned index) {
    const WgmmaCall& first = *group.call[0];
    switch (group.step) {
        case WgmmaStep::Fence: break;
        case WgmmaStep::Multiply: {
            Wgmma w{first, {}};
            for (int t = 0; t < 128; t++) {
                const WgmmaCall& call = *group.call[t];
                if (call.a != first.a || call.b != first.b || call.accumulate != first.accumulate) {
                    die_with(call.loc, "wgmma with different descriptors in the threads of a warpgroup");
                }
                w.d[t] = call.d;
            }
            if (first.a >> 62 != 1 || first.b >> 62 != 1) die_with(first.loc, "the emulator knows the 128-byte swizzle only");
            if constexpr (kRace) check_reads(m, first, index, group.committed + 1);
            if (m.async == Early) {
                multiply(m, w);
            } else {
                group.queue.push_back(w);
                group.open++;
            }
            break;
        }
        case WgmmaStep::Commit:
            group.groups.push_back(group.open);
            group.open = 0;
            group.committed++;
            break;
        case WgmmaStep::Wait:
            while (group.groups.size() > size_t(first.pending)) {
                for (uint32_t i = 0; i < group.groups[0]; i++) multiply(m, group.queue[i]);
                group.queue.erase(group.queue.begin(), group.queue.begin() + group.groups[0]);
                group.groups.erase(group.groups.begin());
            }
            if constexpr (kRace) {
                const uint32_t pending = uint32_t(first.pending);
                race::wgmmas_done(index, group.committed > pending ? group.committed - pending : 0);
            }
    }
}

static void meet(WgmmaStep step, WgmmaCall call, const char* what) {
    Machine& m = *machine;
    Thread& me = self();
    const unsigned index = me.warp / 4;
    if ((index + 1) * 128 > m.threads) die_with(call.loc, "%s in an incomplete warpgroup", what);
    Warpgroup& group = m.warpgroup[index];
    if (group.arrived && (group.step != step || group.where.line != call.loc.line)) {
        die_with(call.loc, "threads of a warpgroup at different wgmma instructions, others at %s:%d", group.where.file,
                 group.where.line);
    }
    group.step = step;
    group.where = call.loc;
    group.call[me.index % 128] = &call;
    if (++group.arrived < 128) return wait_for_others(what, call.loc);
    group.arrived = 0;
    execute(m, group, index);
    for (unsigned w = index * 4; w < index * 4 + 4; w++) {
        const uint32_t lanes = w == me.warp ? ~(1u << me.lane) : kFullWarp;
        m.make_ready(w, lanes);
    }
}

void wgmma(float* d, int n, uint64_t a, uint64_t b, bool accumulate, bool is_bf16, bool b_transposed, Loc loc) {
    meet(WgmmaStep::Multiply, {d, n, a, b, accumulate, is_bf16, b_transposed, 0, loc}, "wgmma");
}
void wgmma_fence(Loc loc) { meet(WgmmaStep::Fence, {nullptr, 0, 0, 0, false, false, false, 0, loc}, "wgmma.fence"); }
void wgmma_commit(Loc loc) { meet(WgmmaStep::Commit, {nullptr, 0, 0, 0, false, false, false, 0, loc}, "wgmma.commit_group"); }
void wgmma_wait(int pending, Loc loc) {
    meet(WgmmaStep::Wait, {nullptr, 0, 0, 0, false, false, false, pending, loc}, "wgmma.wait_group");
}
void fence_proxy_async(Loc) {
    if constexpr (kRace) race::fence_proxy_async();
}
}  // namespace emu
