//! Where in a region of memory each tensor lies: addresses only, so that the planner can run the same code without one.

use std::collections::BTreeMap;

/// Every allocation begins at a multiple of this: what cuMemAlloc promises, and more than any vector load asks for.
pub const ALIGN: u64 = 256;

/// Best fit over a region of `capacity` bytes; neighbouring free ranges are joined.
#[derive(Debug)]
pub struct Offsets {
    capacity: u64,
    /// Start and length of every free range.
    free: BTreeMap<u64, u64>,
    in_use: u64,
}

impl Offsets {
    pub fn new(capacity: u64) -> Offsets {
        let free = if capacity > 0 { BTreeMap::from([(0, capacity)]) } else { BTreeMap::new() };
        Offsets { capacity, free, in_use: 0 }
    }

    /// What an allocation of `bytes` takes: a multiple of [`ALIGN`], at least one.
    pub fn rounded(bytes: u64) -> Option<u64> {
        bytes.max(1).checked_next_multiple_of(ALIGN)
    }

    /// The start of `bytes` (already [`rounded`](Offsets::rounded)), or `None` where no free range is long enough.
    pub fn take(&mut self, bytes: u64) -> Option<u64> {
        let fits = self.free.iter().filter(|&(_, &length)| length >= bytes);
        let (&start, &length) = fits.min_by_key(|&(&start, &length)| (length, start))?;
        self.free.remove(&start);
        if length > bytes {
            self.free.insert(start + bytes, length - bytes);
        }
        self.in_use += bytes;
        Some(start)
    }

    /// Gives back what [`take`](Offsets::take) returned for `bytes`.
    pub fn give(&mut self, start: u64, bytes: u64) {
        let (mut start, mut length) = (start, bytes);
        if let Some((&before, &before_length)) = self.free.range(..start).next_back()
            && before + before_length == start
        {
            self.free.remove(&before);
            (start, length) = (before, length + before_length);
        }
        if let Some(after) = self.free.remove(&(start + length)) {
            length += after;
        }
        self.free.insert(start, length);
        self.in_use -= bytes;
    }

    /// The most that [`take`](Offsets::take) can give in one piece.
    pub fn longest_free(&self) -> u64 {
        self.free.values().copied().max().unwrap_or(0)
    }

    pub fn is_empty(&self) -> bool {
        self.in_use == 0
    }

    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Bytes taken.
    #[cfg(test)]
    fn in_use(&self) -> u64 {
        self.in_use
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_disjoint_and_come_back() {
        let mut offsets = Offsets::new(64 * ALIGN);
        let mut live: Vec<(u64, u64)> = Vec::new();
        let mut state = 1u64;
        for _ in 0..10_000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let random = state >> 33;
            if random.is_multiple_of(3) && !live.is_empty() {
                let (start, bytes) = live.swap_remove(random as usize / 3 % live.len());
                offsets.give(start, bytes);
            } else {
                let bytes = (random / 3 % 9 + 1) * ALIGN;
                if let Some(start) = offsets.take(bytes) {
                    assert!(start.is_multiple_of(ALIGN) && start + bytes <= 64 * ALIGN);
                    assert!(live.iter().all(|&(other, size)| start + bytes <= other || other + size <= start));
                    live.push((start, bytes));
                }
            }
            assert_eq!(offsets.in_use(), live.iter().map(|(_, bytes)| bytes).sum::<u64>());
        }
        live.drain(..).for_each(|(start, bytes)| offsets.give(start, bytes));
        assert!(offsets.is_empty());
        assert_eq!(offsets.take(64 * ALIGN), Some(0), "all free ranges were joined again");
    }

    #[test]
    fn best_fit() {
        let mut offsets = Offsets::new(10 * ALIGN);
        let starts: Vec<u64> = (0..5).map(|_| offsets.take(2 * ALIGN).unwrap()).collect();
        offsets.give(starts[0], 2 * ALIGN);
        offsets.give(starts[1], 2 * ALIGN);
        offsets.give(starts[3], 2 * ALIGN);
        assert_eq!(offsets.take(ALIGN), Some(starts[3]), "the smaller hole");
        assert_eq!(offsets.longest_free(), 4 * ALIGN, "of the five that are free");
        assert_eq!(offsets.take(5 * ALIGN), None);
        assert_eq!(Offsets::rounded(0), Some(ALIGN));
        assert_eq!(Offsets::rounded(u64::MAX), None);
    }
}
