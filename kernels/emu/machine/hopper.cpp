// Hopper's asynchronous parts: mbarrier, TMA in tile mode.
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

void fence_proxy_async(Loc) {
    if constexpr (kRace) race::fence_proxy_async();
}
}  // namespace emu
