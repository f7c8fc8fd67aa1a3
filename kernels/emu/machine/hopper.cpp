// Hopper's asynchronous parts: mbarrier, TMA.
#include "machine.h"

namespace emu {

void reset_hopper(Machine& m) {
    m.tma.clear();
    m.stores.clear();
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
MbarrierInfo& find_mbarrier(Machine& m, uint64_t* bar, Loc loc) {
    check_address(m, bar, loc);
    const auto found = m.mbarriers.find(bar);
    if (found == m.mbarriers.end()) die_with(loc, "mbarrier used before it was initialised");
    // Its operations order themselves; that the initialisation came first is the kernel's business.
    if constexpr (kRace) race::touch_shared(m, bar, 8, race::Access::Read, loc);
    return found->second;
}

void mbar_init(uint64_t* bar, uint32_t count, Loc loc) {
    Machine& m = *machine;
    check_address(m, bar, loc);
    if (count == 0 || count > 0xFFFFF) die_with(loc, "mbarrier for %u arrivals", count);
    const unsigned agent = unsigned(m.mbarriers.size());
    for (const TmaCopy& copy : m.tma) {
        if (copy.bar == bar) die_with(loc, "mbarrier initialised while TMA loads are under way for it");
    }
    MbarrierInfo& info = m.mbarriers[bar];
    info.waiters.clear();
    info.agent = agent;
    info.where = loc;
    store(bar, {0, count, count, 0});
    if constexpr (kRace) race::touch(bar, 8, race::Access::Write, loc);
}

static void expect(MbarrierState& state, uint32_t bytes, Loc loc) {
    constexpr int32_t kMost = (1 << 20) - 1;
    if (bytes > uint32_t(kMost) || state.transactions + int32_t(bytes) > kMost) {
        die_with(loc, "an mbarrier that expects %lld bytes, the card's has room for %d", state.transactions + (long long)bytes, kMost);
    }
    state.transactions += int32_t(bytes);
}

void mbar_arrive_at(Machine& m, uint64_t* bar, uint32_t count, uint32_t transaction_bytes, Loc loc) {
    MbarrierInfo& info = find_mbarrier(m, bar, loc);
    MbarrierState state = load(bar);
    if (count > state.pending) die_with(loc, "more than the mbarrier's %u arrivals in one phase", state.count);
    if constexpr (kRace) race::release_into(info.sum, self().index);
    state.pending -= count;
    expect(state, transaction_bytes, loc);
    settle(m, bar, info, state);
}

void mbar_arrive(uint64_t* bar, uint32_t count, uint32_t transaction_bytes, Loc loc) {
    mbar_arrive_at(*machine, bar, count, transaction_bytes, loc);
}

void mbar_expect_at(Machine& m, uint64_t* bar, uint32_t bytes, Loc loc) {
    find_mbarrier(m, bar, loc);
    MbarrierState state = load(bar);
    expect(state, bytes, loc);
    store(bar, state);
}

void mbar_expect(uint64_t* bar, uint32_t bytes, Loc loc) { mbar_expect_at(*machine, bar, bytes, loc); }

std::string mbarrier_text(const Machine& m, const Thread& waiting) {
    const uint64_t* bar = waiting.waiting_for;
    const Loc where = m.mbarriers.at(const_cast<uint64_t*>(bar)).where;
    const MbarrierState state = load(bar);
    char text[240];
    snprintf(text, sizeof text, ", for parity %u of the mbarrier at shared memory + %zu, of %s:%d, which lacks %u of %u arrivals and %d bytes",
             waiting.waiting_parity, size_t(reinterpret_cast<const char*>(bar) - m.shared), where.file, where.line,
             state.pending, state.count, state.transactions);
    return text;
}

static bool has_ended(Machine& m, uint64_t* bar, uint32_t parity, Loc loc) {
    const MbarrierInfo& info = find_mbarrier(m, bar, loc);
    if (load(bar).phase == (parity & 1)) return false;
    if constexpr (kRace) {
        if (info.last_phase) race::acquire(info.last_phase, self().index);
    }
    return true;
}

void mbar_wait(uint64_t* bar, uint32_t parity, Loc loc) {
    Machine& m = *machine;
    while (!has_ended(m, bar, parity, loc)) {
        m.mbarriers[bar].waiters.push_back(uint16_t(self().index));
        self().waiting_for = bar;
        self().waiting_parity = parity & 1;
        wait_for_others(kMbarrierWait, loc);
    }
}

bool mbar_try(uint64_t* bar, uint32_t parity, Loc loc) {
    if (has_ended(*machine, bar, parity, loc)) return true;
    poll("mbarrier test", loc);
    return has_ended(*machine, bar, parity, loc);
}

// ---- TMA ----

static bool encode(TensorMap* map, int element_bytes, int rank, void* base, const uint64_t* dim, const uint64_t* stride_bytes,
                   int swizzle) {
    static_assert(sizeof(TensorMap) == 128);
    if (rank < 1 || rank > 5 || swizzle < 0 || swizzle > 3 || uintptr_t(base) % 16) return false;
    memset(static_cast<void*>(map), 0, sizeof *map);
    map->base = uintptr_t(base);
    map->rank = uint8_t(rank);
    map->element_bytes = uint8_t(element_bytes);
    map->swizzle = uint8_t(swizzle);
    for (int i = 0; i < rank; i++) {
        if (dim[i] < 1 || dim[i] > uint64_t(1) << 32) return false;
        map->dim[i] = dim[i];
        map->step[i] = 1;
        if (i == 0) continue;
        if (stride_bytes[i - 1] % 16 || stride_bytes[i - 1] >= uint64_t(1) << 40) return false;
        map->stride[i - 1] = stride_bytes[i - 1];
    }
    return true;
}

static bool row_fits(const TensorMap& map) {
    const uint32_t bytes = uint32_t(map.element_bytes) * map.box[0];
    return bytes % 16 == 0 && !(map.swizzle && bytes > (16u << map.swizzle));
}

int tensor_map_encode(TensorMap* map, int element_bytes, int rank, void* base, const uint64_t* dim,
                      const uint64_t* stride_bytes, const uint32_t* box, int swizzle) {
    if (!encode(map, element_bytes, rank, base, dim, stride_bytes, swizzle)) return 1;
    for (int i = 0; i < rank; i++) {
        if (box[i] < 1 || box[i] > 256) return 1;
        map->box[i] = uint16_t(box[i]);
    }
    return !row_fits(*map);
}

int tensor_map_encode_im2col(TensorMap* map, int element_bytes, int rank, void* base, const uint64_t* dim,
                             const uint64_t* stride_bytes, const int* lower_corner, const int* upper_corner,
                             uint32_t channels, uint32_t pixels, const uint32_t* element_strides, int swizzle) {
    if (rank < 3 || !encode(map, element_bytes, rank, base, dim, stride_bytes, swizzle)) return 1;
    if (channels < 1 || channels > 256 || pixels < 1 || pixels > 1024) return 1;
    map->im2col = 1;
    map->box[0] = uint16_t(channels);
    map->pixels = uint16_t(pixels);
    const int range = rank == 3 ? 1 << 15 : rank == 4 ? 1 << 7 : 1 << 4;
    for (int i = 0; i < rank; i++) {
        if (element_strides[i] < 1 || element_strides[i] > 8) return 1;
        map->step[i] = uint8_t(element_strides[i]);
    }
    for (int i = 0; i < rank - 2; i++) {
        for (const int corner : {lower_corner[i], upper_corner[i]}) {
            if (corner < -range || corner >= range) return 1;
        }
        map->lower[i] = int16_t(lower_corner[i]);
        map->upper[i] = int16_t(upper_corner[i]);
        if (int64_t(dim[i + 1]) + upper_corner[i] <= lower_corner[i]) return 1;  // no pixel between the corners
    }
    return !row_fits(*map);
}

// Exchanges the 16-byte chunks of a row by the row's number, both taken from the address.
static uintptr_t swizzled(uintptr_t address, uint32_t swizzle) {
    return swizzle ? address ^ (address >> 7 & ((1u << swizzle) - 1)) << 4 : address;
}

static uint32_t row_bytes(const TensorMap& map) { return uint32_t(map.element_bytes) * map.box[0]; }
static uint32_t row_pitch(const TensorMap& map) { return map.swizzle ? 16u << map.swizzle : row_bytes(map); }
static uint32_t row_count(const TensorMap& map) {
    uint32_t count = map.im2col ? map.pixels : 1;
    for (uint32_t d = 1; d < map.rank && !map.im2col; d++) count *= map.box[d];
    return count;
}

// Calls visit(row, global, first, last) for every row of a box: the bytes [first, last) of it lie within the tensor, from
// `global` on; none where first == last.
template <class Visit>
static void for_each_row(const TensorMap& map, const int* coordinate, const uint16_t* im2col_offset, Visit&& visit) {
    const auto within = [](int64_t at, int64_t low, int64_t high) { return at < low ? low : at > high ? high : at; };
    const int64_t box = map.box[0], first = within(-int64_t(coordinate[0]), 0, box);
    const int64_t last = within(int64_t(map.dim[0]) - coordinate[0], first, box);
    const uint32_t rows = row_count(map), spatial = map.rank - 2u;
    int64_t at[5];
    for (uint32_t d = 0; d < map.rank; d++) at[d] = coordinate[d];
    for (uint32_t r = 0; r < rows; r++) {
        uintptr_t global = map.base + uintptr_t((coordinate[0] + first) * map.element_bytes);
        bool inside = first < last;
        for (uint32_t d = 1; d < map.rank; d++) {
            const int64_t i = at[d] + (map.im2col && d <= spatial ? im2col_offset[d - 1] : 0);
            inside = inside && i >= 0 && i < int64_t(map.dim[d]);
            if (inside) global += uintptr_t(i) * map.stride[d - 1];
        }
        visit(r, reinterpret_cast<char*>(global), uint32_t(inside ? first * map.element_bytes : 0),
              uint32_t(inside ? last * map.element_bytes : 0));
        // The next row: the box's, or the next pixel between the corners, and then of the next image.
        for (uint32_t d = 1; d < map.rank; d++) {
            at[d] += map.step[d];
            if (map.im2col) {
                if (d > spatial || at[d] < int64_t(map.dim[d]) + map.upper[d - 1]) break;
                at[d] = map.lower[d - 1];
            } else {
                if (at[d] < coordinate[d] + int64_t(map.box[d])) break;
                at[d] = coordinate[d];
            }
        }
    }
}

// Calls visit(place, offset) for every 16 bytes of a row: where they lie in shared memory, and in the row.
template <class Visit>
static void for_each_chunk(const Machine& m, const char* shared, const TensorMap& map, uint32_t row, Visit&& visit) {
    const uintptr_t start = uintptr_t(shared - m.shared) + uintptr_t(row) * row_pitch(map);
    for (uint32_t offset = 0; offset < row_bytes(map); offset += 16) {
        visit(m.shared + swizzled(start + offset, map.swizzle), offset);
    }
}

// In order, or at random, a warp goes on as long as it can; not while something may land between its steps.
static void note_pending(Machine& m) {
    m.stays = m.tma.empty() && m.stores.empty() && (m.sched == InOrder || m.sched == Random);
}

static void check_map(const TensorMap& map, const int* coordinates, int rank, bool im2col, Loc loc) {
    if (map.rank != rank) die_with(loc, "TMA of rank %d from a tensor map of rank %u", rank, map.rank);
    if (map.im2col != im2col) {
        die_with(loc, "TMA in %s mode with a tensor map in %s mode", im2col ? "im2col" : "tile", map.im2col ? "im2col" : "tile");
    }
    for (int d = 1; im2col && d < rank - 1; d++) {
        const int64_t end = int64_t(map.dim[d]) + map.upper[d - 1];
        if (coordinates[d] < map.lower[d - 1] || coordinates[d] >= end) {
            die_with(loc, "TMA in im2col mode from coordinate %d of dimension %d, the corners allow %d to %lld", coordinates[d],
                     d, map.lower[d - 1], static_cast<long long>(end - 1));
        }
    }
}

static void check_box(const Machine& m, const void* shared, const TensorMap& map, Loc loc) {
    const uint32_t bytes = (row_count(map) - 1) * row_pitch(map) + row_bytes(map);
    if (!m.in_shared(shared, bytes)) die_with(loc, "TMA of %u bytes outside the block's shared memory", bytes);
    if (uintptr_t(shared) % 128) {
        die_with(loc, "TMA at shared memory + %zu, not aligned to 128", size_t(static_cast<const char*>(shared) - m.shared));
    }
}

void land_tma(Machine& m, size_t index) {
    const TmaCopy copy = m.tma[index];
    m.tma.erase(m.tma.begin() + ptrdiff_t(index));
    note_pending(m);
    if (copy.is_store_async) {
        memcpy(copy.to, copy.value, copy.bytes);
    } else {
        m.stats.tma++;
        const auto land_row = [&](uint32_t row, const char* global, uint32_t first, uint32_t last) {
            char bytes[256 * 8] = {};
            if (first < last) memcpy(bytes + first, global, last - first);
            for_each_chunk(m, copy.to, copy.map, row, [&](char* place, uint32_t offset) { memcpy(place, bytes + offset, 16); });
        };
        for_each_row(copy.map, copy.coordinate, copy.im2col_offset, land_row);
    }
    MbarrierInfo& info = m.mbarriers[copy.bar];
    if constexpr (kRace) race::tma_done(m, info.sum, copy.agent, copy.clock);
    MbarrierState state = load(copy.bar);
    state.transactions -= int32_t(copy.bytes);
    settle(m, copy.bar, info, state);
}

// Its destination is poison until it lands.
void send(Machine& owner, TmaCopy copy, Loc loc) {
    MbarrierInfo& info = find_mbarrier(owner, copy.bar, loc);
    copy.agent = info.agent;
    copy.clock = ++info.clock;
    const auto poison = [&](char* place, size_t bytes) {
        if constexpr (kRace) race::tma_write(owner, place, bytes, copy.agent, copy.clock, loc);
        memset(place, 0xFF, bytes);
    };
    if (copy.is_store_async) {
        poison(copy.to, copy.bytes);
    } else {
        const auto check_row = [&](uint32_t row, const char* global, uint32_t first, uint32_t last) {
            if (first < last) {
                check_global(global, last - first, "TMA load", loc);
                if constexpr (kRace) race::tma_read(owner, global, last - first, copy.agent, copy.clock, loc);
            }
            for_each_chunk(owner, copy.to, copy.map, row, [&](char* place, uint32_t) { poison(place, 16); });
        };
        for_each_row(copy.map, copy.coordinate, copy.im2col_offset, check_row);
    }
    owner.tma.push_back(copy);
    note_pending(owner);
    machine->stays = false;
    if (machine->async == Early) land_tma(owner, owner.tma.size() - 1);
}

static TmaCopy load_of(void* shared, const TensorMap* map, uint64_t* bar, const int* coordinates, int rank,
                       const uint16_t* im2col_offset, Loc loc) {
    check_map(*map, coordinates, rank, im2col_offset, loc);
    TmaCopy copy{static_cast<char*>(shared), *map, bar, {}, {}, row_count(*map) * row_bytes(*map), 0, 0, false, {}};
    memcpy(copy.coordinate, coordinates, size_t(rank) * sizeof(int));
    if (im2col_offset) memcpy(copy.im2col_offset, im2col_offset, size_t(rank - 2) * sizeof(uint16_t));
    return copy;
}

// Changes no value: only what is asked for is checked.
void tma_prefetch(const TensorMap* map, const int* coordinates, int rank, Loc loc) { check_map(*map, coordinates, rank, false, loc); }

void tma_load(void* shared, const TensorMap* map, uint64_t* bar, const int* coordinates, int rank,
              const uint16_t* im2col_offset, Loc loc) {
    const TmaCopy copy = load_of(shared, map, bar, coordinates, rank, im2col_offset, loc);
    check_box(*machine, shared, *map, loc);
    send(*machine, copy, loc);
}

void tma_load_multicast(void* shared, const TensorMap* map, uint64_t* bar, const int* coordinates, int rank, uint16_t mask,
                        Loc loc) {
    const TmaCopy copy = load_of(shared, map, bar, coordinates, rank, nullptr, loc);
    if (!mask || mask >> machine->cluster->size) {
        die_with(loc, "TMA multicast to blocks %#x of a cluster of %u", mask, machine->cluster->size);
    }
    for (unsigned to = 0; mask >> to; to++) {
        if (!(mask >> to & 1)) continue;
        TmaCopy part = copy;
        const auto [owner, place] = find_remote(cluster_address(shared, int(to), loc), 1, loc);
        part.to = place;
        part.bar = reinterpret_cast<uint64_t*>(find_remote(cluster_address(bar, int(to), loc), 8, loc).second);
        check_box(*owner, part.to, *map, loc);
        send(*owner, part, loc);
    }
}

// ---- TMA stores ----
//
// A store reads its shared memory at some time until its thread has waited for that, and writes global memory at some time
// from then on: early, at once; late, when it is waited for or at the end of the block.

static void read_store(Machine& m, TmaStore& store) {
    store.bytes.resize(row_count(store.map) * row_bytes(store.map));
    for (uint32_t row = 0; row < row_count(store.map); row++) {
        char* to = store.bytes.data() + row * row_bytes(store.map);
        for_each_chunk(m, store.from, store.map, row, [&](const char* place, uint32_t offset) { memcpy(to + offset, place, 16); });
    }
}

static void write_store(Machine& m, size_t index) {
    const TmaStore store = std::move(m.stores[index]);
    m.stores.erase(m.stores.begin() + ptrdiff_t(index));
    note_pending(m);
    m.stats.tma++;
    for_each_row(store.map, store.coordinate, nullptr, [&](uint32_t row, char* global, uint32_t first, uint32_t last) {
        if (first < last) memcpy(global, store.bytes.data() + row * row_bytes(store.map) + first, last - first);
    });
}

void step_store(Machine& m, size_t index) {
    TmaStore& store = m.stores[index];
    store.bytes.empty() ? read_store(m, store) : write_store(m, index);
}

void finish_block(Machine& m) {
    while (!m.stores.empty()) step_store(m, 0);
    for (const auto& [bar, info] : m.mbarriers) {
        bool under_way = false;
        for (const TmaCopy& copy : m.tma) under_way |= copy.bar == bar;
        if constexpr (kRace) under_way |= info.clock && !race::tma_is_known(m, info.agent, info.clock);
        if (under_way) {
            die_with(info.where, "the block ends while copies into its shared memory may be under way: nobody waited for this mbarrier");
        }
    }
    if (m.dependent && !m.has_waited) {
        report(Message::Error, "a block of a dependent launch ends without wait_for_previous, which the launch after it relies on");
        abandon_block();
    }
    if constexpr (kRace) race::check_remote_accesses(m);
}

void tma_store(const TensorMap* map, const void* shared, const int* coordinates, int rank, Loc loc) {
    Machine& m = *machine;
    Thread& me = self();
    check_map(*map, coordinates, rank, false, loc);
    check_box(m, shared, *map, loc);
    TmaStore store{static_cast<const char*>(shared), *map, {}, me.index, me.bulk_committed + 1, {}};
    memcpy(store.coordinate, coordinates, size_t(rank) * sizeof(int));
    me.bulk_open++;
    me.bulk_where = loc;
    for_each_row(*map, store.coordinate, nullptr, [&](uint32_t row, const char* global, uint32_t first, uint32_t last) {
        if (first < last) {
            check_global(global, last - first, "TMA store", loc);
            if constexpr (kRace) race::bulk_write(global, last - first, store.group, loc);
        }
        if constexpr (kRace) {
            for_each_chunk(m, store.from, *map, row, [&](const char* place, uint32_t) { race::bulk_read(place, 16, store.group, loc); });
        }
    });
    m.stores.push_back(std::move(store));
    if (m.async == Early) {
        step_store(m, m.stores.size() - 1);
        step_store(m, m.stores.size() - 1);
    }
    note_pending(m);
}

void bulk_commit(Loc) {
    Thread& me = self();
    me.bulk_open = 0;
    me.bulk_committed++;
}

void bulk_wait(int pending, bool reads_only, Loc) {
    Machine& m = *machine;
    Thread& me = self();
    const uint32_t groups = me.bulk_committed > uint32_t(pending) ? me.bulk_committed - uint32_t(pending) : 0;
    for (size_t i = 0; i < m.stores.size();) {
        if (m.stores[i].thread != me.index || m.stores[i].group > groups) {
            i++;
            continue;
        }
        if (m.stores[i].bytes.empty()) read_store(m, m.stores[i]);
        reads_only ? void(i++) : write_store(m, i);
    }
    me.bulk_read = std::max(me.bulk_read, groups);
    if constexpr (kRace) race::bulk_done(groups, reads_only ? 0 : groups);
}

void check_stores_at_exit(const Thread& me) {
    if (me.bulk_open) die_with(me.bulk_where, "the thread leaves the kernel with a TMA store that bulk_commit does not follow");
    if (me.bulk_read < me.bulk_committed) {
        die_with(me.bulk_where, "the thread leaves the kernel while TMA stores may still read its shared memory: no bulk_wait_read<0>");
    }
}

void fence_proxy_async(Loc) {
    if constexpr (kRace) race::fence_proxy_async();
}
void fence_proxy_async_global(Loc) {
    if constexpr (kRace) race::fence_proxy_async_global();
}
}  // namespace emu
