// Clusters: their barrier, the shared memory of their other blocks; and launches that begin before the previous one ended.
#include "machine.h"

namespace emu {

uint32_t cluster_rank() { return machine->block_rank; }
uint32_t cluster_size() { return machine->cluster->size; }

// ---- the barrier ----

void reset_cluster(Cluster& c) {
    c.alive = 0;
    for (unsigned rank = 0; rank < c.size; rank++) c.alive += c.block[rank]->threads;
    c.failed = false;
    c.arrived = c.phases = 0;
    c.waiting.clear();
    c.pollers.clear();
    c.woken_pollers = c.fruitless_polls = 0;
    if constexpr (kRace) {
        race::forget(c.sum);
        race::forget(c.last_phase);
    }
}

// All threads that have not left the kernel have arrived: the phase ends.
static void settle(Cluster& c) {
    if (!c.arrived || c.arrived < c.alive) return;
    c.arrived = 0;
    c.phases++;
    if constexpr (kRace) {
        race::forget(c.last_phase);
        std::swap(c.last_phase, c.sum);
    }
    for (Thread* thread : c.waiting) thread->home->make_ready_thread(thread->index);
    c.waiting.clear();
}

void thread_left(Cluster& c, Thread& thread) {
    if (thread.cluster_arrivals > c.phases) c.arrived--;
    settle(c);
}

void cluster_arrive(Loc loc) {
    Cluster& c = *machine->cluster;
    Thread& me = self();
    if (me.cluster_arrivals != me.cluster_waits) die_with(loc, "cluster_arrive twice without a cluster_wait");
    me.cluster_arrivals++;
    if constexpr (kRace) race::release_into(c.sum, me.index);
    c.arrived++;
    settle(c);
}

void cluster_wait(Loc loc) {
    Cluster& c = *machine->cluster;
    Thread& me = self();
    if (me.cluster_arrivals == me.cluster_waits) die_with(loc, "cluster_wait without a cluster_arrive");
    while (c.phases < me.cluster_arrivals) {
        c.waiting.push_back(&me);
        wait_for_others("cluster_wait", loc);
    }
    me.cluster_waits++;
    machine->has_met = true;
    if constexpr (kRace) {
        if (c.last_phase) race::acquire(c.last_phase, me.index);
    }
}

// ---- shared memory of other blocks ----

constexpr unsigned kRankShift = 24;

uint32_t cluster_address(const void* shared, int rank, Loc loc) {
    if (rank < 0 || unsigned(rank) >= machine->cluster->size) {
        die_with(loc, "block %d of a cluster of %u", rank, machine->cluster->size);
    }
    return uint32_t(rank + 1) << kRankShift | smem_addr(shared, loc);
}

std::pair<Machine*, char*> find_remote(uint32_t address, size_t bytes, Loc loc) {
    const uint32_t rank = address >> kRankShift, offset = address & ((1u << kRankShift) - 1);
    const Cluster& c = *machine->cluster;
    if (rank > c.size) die_with(loc, "%#x is no address of a cluster of %u", address, c.size);
    Machine& owner = rank == 0 ? *machine : *c.block[rank - 1];
    char* p = owner.shared + offset;
    if (!owner.in_shared(p, bytes)) die_with(loc, "%#x is not in the shared memory of block %u of the cluster", address, owner.block_rank);
    if (offset % bytes) die_with(loc, "shared memory + %u of block %u of the cluster is not aligned to %zu", offset, owner.block_rank, bytes);
    if (&owner == machine) return {&owner, p};
    if (!machine->has_met) {
        die_with(loc, "shared memory of block %u of the cluster before cluster_wait: it may not have begun", owner.block_rank);
    }
    if (!owner.alive) die_with(loc, "shared memory of block %u of the cluster, which has ended", owner.block_rank);
    return {&owner, p};
}

void cluster_load(void* to, uint32_t address, size_t bytes, Loc loc) {
    const auto [owner, p] = find_remote(address, bytes, loc);
    if constexpr (kRace) {
        race::touch_shared(*owner, p, bytes, race::Access::Read, loc);
        race::note_remote_access(*owner, loc);
    }
    memcpy(to, p, bytes);
    yield_at_random(*machine);
}

void cluster_store(uint32_t address, const void* from, size_t bytes, Loc loc) {
    const auto [owner, p] = find_remote(address, bytes, loc);
    if constexpr (kRace) {
        race::touch_shared(*owner, p, bytes, race::Access::Write, loc);
        race::note_remote_access(*owner, loc);
    }
    memcpy(p, from, bytes);
}

void cluster_store_async(uint32_t address, const void* from, size_t bytes, uint32_t bar, Loc loc) {
    const auto [owner, p] = find_remote(address, bytes, loc);
    const auto [bar_owner, bar_place] = find_remote(bar, 8, loc);
    if (owner != bar_owner) die_with(loc, "st.async into block %u, its mbarrier in block %u", owner->block_rank, bar_owner->block_rank);
    TmaCopy copy{p, {}, reinterpret_cast<uint64_t*>(bar_place), {}, {}, uint32_t(bytes), 0, 0, true, {}};
    memcpy(copy.value, from, bytes);
    send(*owner, copy, loc);
}

void mbar_arrive_cluster(uint64_t* bar, int rank, Loc loc) {
    const auto [owner, place] = find_remote(cluster_address(bar, rank, loc), 8, loc);
    if constexpr (kRace) race::note_remote_access(*owner, loc);
    mbar_arrive_at(*owner, reinterpret_cast<uint64_t*>(place), 1, 0, loc);
}

void mbar_expect_cluster(uint64_t* bar, int rank, uint32_t bytes, Loc loc) {
    const auto [owner, place] = find_remote(cluster_address(bar, rank, loc), 8, loc);
    if constexpr (kRace) race::note_remote_access(*owner, loc);
    mbar_expect_at(*owner, reinterpret_cast<uint64_t*>(place), bytes, loc);
}

// ---- dependent launches: launches run one after the other; what might overlap is the race detector's business ----

void next_may_start(Loc) {
    if constexpr (kRace) race::next_launch_may_start();
}
void wait_for_previous(Loc) {
    machine->has_waited = true;
    if constexpr (kRace) race::previous_launch_done();
}
}  // namespace emu
