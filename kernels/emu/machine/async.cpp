// cp.async: copies of one thread from global to shared memory, in groups.
//
// An early copy lands at once. A late one lands when its group is waited for; until then its destination is poison, so a
// reader that did not wait reads NaN rather than what an earlier tile left there.
#include "machine.h"

namespace emu {

static void land(const AsyncCopy& copy) {
    if (copy.source_bytes) memcpy(copy.to, copy.from, copy.source_bytes);
    memset(static_cast<char*>(copy.to) + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
}

void cp_async(void* shared, const void* global, int bytes, int source_bytes, Loc loc) {
    Machine& m = *machine;
    Thread& me = self();
    const AsyncCopy copy{shared, global, uint32_t(bytes), uint32_t(source_bytes)};
    if (!m.in_shared(shared, copy.bytes)) die_with(loc, "cp.async: %p is not in the block's shared memory", shared);
    if (uintptr_t(shared) % copy.bytes) {
        die_with(loc, "cp.async: shared memory + %u is not aligned to %d", smem_addr(shared, loc), bytes);
    }
    // Also where nothing is read: the instruction names an aligned address in any case.
    if (uintptr_t(global) % copy.bytes) die_with(loc, "cp.async: global address %p is not aligned to %d", global, bytes);
    if (source_bytes) {
        if (m.in_shared_window(global)) die_with(loc, "cp.async reads shared memory");
        check_global(global, copy.source_bytes, "cp.async", loc);
    }
    if constexpr (kRace) {
        race::async_copy_write(shared, copy.bytes, me.committed_groups + 1, loc);
        if (source_bytes) race::touch(global, copy.source_bytes, race::Access::Read, loc);
    }
    if (m.async == Early || (m.async == Mixed && m.random() % 2)) {
        land(copy);
    } else {
        memset(shared, 0xFF, copy.bytes);
        me.copies.push_back(copy);
    }
}

void cp_async_commit(Loc) {
    Thread& me = self();
    me.group_ends.push_back(uint32_t(me.copies.size()));
    me.committed_groups++;
}

void land_copies(Thread& thread, uint32_t up_to) {
    for (; thread.first_copy < up_to; thread.first_copy++) land(thread.copies[thread.first_copy]);
}

void cp_async_wait(int pending, Loc) {
    Thread& me = self();
    const uint32_t groups = uint32_t(me.group_ends.size());
    if (groups - me.first_group > uint32_t(pending)) {
        me.first_group = groups - uint32_t(pending);
        land_copies(me, me.group_ends[me.first_group - 1]);
        if (me.first_copy == me.copies.size() && pending == 0) {
            me.copies.clear();
            me.group_ends.clear();
            me.first_copy = me.first_group = 0;
        } else if (me.first_group >= 64) {  // forget what has landed
            me.copies.erase(me.copies.begin(), me.copies.begin() + me.first_copy);
            me.group_ends.erase(me.group_ends.begin(), me.group_ends.begin() + me.first_group);
            for (uint32_t& end : me.group_ends) end -= me.first_copy;
            me.first_copy = me.first_group = 0;
        }
    }
    if constexpr (kRace) {
        race::async_copies_done(me.committed_groups > uint32_t(pending) ? me.committed_groups - uint32_t(pending) : 0);
    }
}
}  // namespace emu
