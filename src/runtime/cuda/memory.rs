//! The card's memory: regions from the driver, cut into tensors by [`Offsets`]. All work goes through one stream, so what
//! is freed may be given to the next tensor at once: its work comes later.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use cudarc::driver::sys::{self, CUresult};

use super::arena::Offsets;
use super::device::Context;
use super::driver::check;
use crate::error::{Error, Result};

/// A region is at least this large, so that a run asks the driver a few times, not once a tensor.
const REGION_BYTES: u64 = 32 << 20;

/// The same for a graph's memory, which comes from the regions.
const GRAPH_REGION_BYTES: u64 = 1 << 20;

/// Bytes of all pools of a device.
#[derive(Debug, Default)]
pub struct Counters {
    in_use: AtomicU64,
    peak: AtomicU64,
    /// The peak since somebody began to look.
    high_water: AtomicU64,
    reserved: AtomicU64,
}

impl Counters {
    pub fn in_use(&self) -> u64 {
        self.in_use.load(Ordering::Relaxed)
    }

    pub fn peak(&self) -> u64 {
        self.peak.load(Ordering::Relaxed)
    }

    /// From now on [`high_water`](Counters::high_water) counts anew; the bytes in use now.
    pub fn begin_high_water(&self) -> u64 {
        let in_use = self.in_use();
        self.high_water.store(in_use, Ordering::Relaxed);
        in_use
    }

    pub fn high_water(&self) -> u64 {
        self.high_water.load(Ordering::Relaxed)
    }

    pub fn reserved(&self) -> u64 {
        self.reserved.load(Ordering::Relaxed)
    }
}

/// How tensors lie in a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Tensors share regions, which are kept for the next run.
    Shared,
    /// Every tensor is an allocation of its own size, so that an access beyond it can be seen. For tests.
    Separate,
}

#[derive(Debug)]
pub struct Pool {
    context: Arc<Context>,
    counters: Arc<Counters>,
    layout: Layout,
    /// A graph's pool: its regions are buffers of this one, so that they are nobody else's while the graph is there.
    parent: Option<Arc<Pool>>,
    regions: Mutex<Vec<Region>>,
}

#[derive(Debug)]
struct Region {
    address: u64,
    offsets: Offsets,
    /// What it is cut from, in a graph's pool.
    block: Option<Buffer>,
}

/// A tensor's memory; returns to its pool when dropped.
#[derive(Debug)]
pub struct Buffer {
    pool: Arc<Pool>,
    address: u64,
    bytes: u64,
    /// Of the region.
    taken: u64,
}

impl Buffer {
    pub fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.pool.give(self.address, self.taken);
        if self.pool.parent.is_none() {
            self.pool.counters.in_use.fetch_sub(self.bytes, Ordering::Relaxed);
        }
    }
}

impl Pool {
    pub fn new(context: Arc<Context>, counters: Arc<Counters>, layout: Layout) -> Arc<Pool> {
        Arc::new(Pool { context, counters, layout, parent: None, regions: Mutex::new(Vec::new()) })
    }

    /// A pool whose memory is taken from this one and comes back when the pool and its tensors are gone.
    pub fn for_graph(self: &Arc<Pool>) -> Arc<Pool> {
        let (context, counters) = (self.context.clone(), self.counters.clone());
        let (layout, parent) = (self.layout, Some(self.clone()));
        Arc::new(Pool { context, counters, layout, parent, regions: Mutex::new(Vec::new()) })
    }

    fn separate(&self) -> bool {
        self.layout == Layout::Separate
    }

    fn regions(&self) -> MutexGuard<'_, Vec<Region>> {
        self.regions.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// # Errors
    /// [`Error::OutOfMemory`] with the card's figures, `what` names the tensor.
    pub fn allocate(self: &Arc<Pool>, bytes: u64, what: &dyn Fn() -> String) -> Result<Buffer> {
        let taken = match self.separate() {
            true => bytes.max(1),
            false => Offsets::rounded(bytes).ok_or_else(|| self.out_of_memory(bytes, what))?,
        };
        let mut regions = self.regions();
        let found = match self.separate() {
            true => None,
            false => regions.iter_mut().find_map(|r| r.offsets.take(taken).map(|offset| r.address + offset)),
        };
        let address = match found {
            Some(address) => address,
            None => {
                let mut region = self.grow(&mut regions, taken, what)?;
                let offset = region.offsets.take(taken).expect("a fresh region holds what it was made for");
                let address = region.address + offset;
                regions.push(region);
                address
            }
        };
        drop(regions);
        if self.parent.is_none() {
            let in_use = self.counters.in_use.fetch_add(bytes, Ordering::Relaxed) + bytes;
            self.counters.peak.fetch_max(in_use, Ordering::Relaxed);
            self.counters.high_water.fetch_max(in_use, Ordering::Relaxed);
        }
        Ok(Buffer { pool: self.clone(), address, bytes, taken })
    }

    /// Makes sure that one region can hold `bytes` more.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]
    pub fn reserve(&self, bytes: u64, what: &dyn Fn() -> String) -> Result<()> {
        let mut regions = self.regions();
        let fits = |region: &Region| region.offsets.longest_free() >= bytes;
        if self.separate() || bytes == 0 || regions.iter().any(fits) {
            return Ok(());
        }
        let bytes = Offsets::rounded(bytes).ok_or_else(|| self.out_of_memory(bytes, what))?;
        let region = self.grow(&mut regions, bytes, what)?;
        regions.push(region);
        Ok(())
    }

    /// A region of at least `bytes`. Where the driver has no more, empty regions go back and it is asked again.
    fn grow(&self, regions: &mut Vec<Region>, bytes: u64, what: &dyn Fn() -> String) -> Result<Region> {
        if let Some(parent) = &self.parent {
            let bytes = if self.separate() { bytes } else { bytes.max(GRAPH_REGION_BYTES) };
            let block = parent.allocate(bytes, what)?;
            return Ok(Region { address: block.address, offsets: Offsets::new(bytes), block: Some(block) });
        }
        if !self.separate()
            && bytes < REGION_BYTES
            && let Some(region) = self.ask(REGION_BYTES)?
        {
            return Ok(region);
        }
        if let Some(region) = self.ask(bytes)? {
            return Ok(region);
        }
        let (empty, rest) = std::mem::take(regions).into_iter().partition(|region| region.offsets.is_empty());
        *regions = rest;
        self.free(empty);
        self.ask(bytes)?.ok_or_else(|| self.out_of_memory(bytes, what))
    }

    /// `None`: the driver has not that much.
    fn ask(&self, bytes: u64) -> Result<Option<Region>> {
        self.context.bind()?;
        let mut address = 0;
        // SAFETY: the context is current; the pointer is valid for the call.
        match unsafe { sys::cuMemAlloc_v2(&mut address, bytes as usize) } {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => return Ok(None),
            result => check(&self.context.name, "cuMemAlloc", result)?,
        }
        self.counters.reserved.fetch_add(bytes, Ordering::Relaxed);
        Ok(Some(Region { address, offsets: Offsets::new(bytes), block: None }))
    }

    fn give(&self, address: u64, bytes: u64) {
        let mut regions = self.regions();
        let holds = |r: &Region| (r.address..r.address + r.offsets.capacity()).contains(&address);
        let index = regions.iter().position(holds).expect("a buffer lies in a region of its pool");
        match (self.layout, &self.parent) {
            (Layout::Shared, _) => {
                let region = &mut regions[index];
                region.offsets.give(address - region.address, bytes);
            }
            (Layout::Separate, Some(_)) => {} // nobody else may get it while the graph is there
            (Layout::Separate, None) => {
                let region = regions.swap_remove(index);
                drop(regions);
                self.free(vec![region]);
            }
        }
    }

    /// To where they came from. The driver first waits for the work that uses them.
    fn free(&self, regions: Vec<Region>) {
        let bound = self.context.bind().is_ok();
        for region in regions {
            if region.block.is_some() {
                continue; // goes back to the parent by itself
            }
            self.counters.reserved.fetch_sub(region.offsets.capacity(), Ordering::Relaxed);
            if bound {
                // SAFETY: the region came from cuMemAlloc and no tensor lies in it. An error is one of earlier work,
                // which the next call reports.
                let _ = unsafe { sys::cuMemFree_v2(region.address) };
            }
        }
    }

    fn out_of_memory(&self, bytes: u64, what: &dyn Fn() -> String) -> Error {
        let free = match self.context.memory() {
            Ok((free, total)) => format!("{free} of the card's {total} bytes are free"),
            Err(_) => "the card does not say how much is free".into(),
        };
        Error::OutOfMemory {
            device: self.context.name.clone(),
            what: what(),
            requested_bytes: bytes,
            in_use_bytes: self.counters.in_use(),
            hint: format!(
                "{free}; smaller tensors or a type of two bytes (bf16) need less, or end other programs on the card"
            ),
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let regions = std::mem::take(&mut *self.regions());
        self.free(regions);
    }
}
