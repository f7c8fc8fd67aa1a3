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

/// Bytes of all pools of a device.
#[derive(Debug, Default)]
pub struct Counters {
    in_use: AtomicU64,
    peak: AtomicU64,
    reserved: AtomicU64,
}

impl Counters {
    pub fn in_use(&self) -> u64 {
        self.in_use.load(Ordering::Relaxed)
    }

    pub fn peak(&self) -> u64 {
        self.peak.load(Ordering::Relaxed)
    }

    pub fn reserved(&self) -> u64 {
        self.reserved.load(Ordering::Relaxed)
    }
}

/// How a pool asks the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Tensors share regions, which are kept for the next run.
    Shared,
    /// Every tensor is an allocation of its own size, so that an access beyond it can be seen. For tests.
    Separate,
    /// As `Shared`, and nothing goes back to the driver before the graph that uses it is gone.
    Graph,
    /// As `Separate`, and kept like `Graph`.
    SeparateGraph,
}

impl Kind {
    fn separate(self) -> bool {
        matches!(self, Kind::Separate | Kind::SeparateGraph)
    }

    fn keeps(self) -> bool {
        matches!(self, Kind::Graph | Kind::SeparateGraph)
    }

    pub fn for_graph(self) -> Kind {
        if self.separate() { Kind::SeparateGraph } else { Kind::Graph }
    }
}

#[derive(Debug)]
pub struct Pool {
    context: Arc<Context>,
    counters: Arc<Counters>,
    kind: Kind,
    regions: Mutex<Vec<Region>>,
}

#[derive(Debug)]
struct Region {
    address: u64,
    offsets: Offsets,
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

    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.pool.give(self.address, self.taken);
        self.pool.counters.in_use.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Pool {
    pub fn new(context: Arc<Context>, counters: Arc<Counters>, kind: Kind) -> Arc<Pool> {
        Arc::new(Pool { context, counters, kind, regions: Mutex::new(Vec::new()) })
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    fn regions(&self) -> MutexGuard<'_, Vec<Region>> {
        self.regions.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// # Errors
    /// [`Error::OutOfMemory`] with the card's figures, `what` names the tensor.
    pub fn allocate(self: &Arc<Pool>, bytes: u64, what: &dyn Fn() -> String) -> Result<Buffer> {
        let taken = match self.kind.separate() {
            true => bytes.max(1),
            false => Offsets::rounded(bytes).ok_or_else(|| self.out_of_memory(bytes, what))?,
        };
        let mut regions = self.regions();
        let found = match self.kind.separate() {
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
        let in_use = self.counters.in_use.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.counters.peak.fetch_max(in_use, Ordering::Relaxed);
        Ok(Buffer { pool: self.clone(), address, bytes, taken })
    }

    /// Makes sure that one region can hold `bytes` more.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]
    pub fn reserve(&self, bytes: u64, what: &dyn Fn() -> String) -> Result<()> {
        let mut regions = self.regions();
        let fits = |region: &Region| region.offsets.capacity() - region.offsets.in_use() >= bytes;
        if self.kind.separate() || bytes == 0 || regions.iter().any(fits) {
            return Ok(());
        }
        let bytes = Offsets::rounded(bytes).ok_or_else(|| self.out_of_memory(bytes, what))?;
        let region = self.grow(&mut regions, bytes, what)?;
        regions.push(region);
        Ok(())
    }

    /// A region of at least `bytes`. Where the driver has no more, empty regions go back and it is asked again.
    fn grow(&self, regions: &mut Vec<Region>, bytes: u64, what: &dyn Fn() -> String) -> Result<Region> {
        if !self.kind.separate()
            && bytes < REGION_BYTES
            && let Some(region) = self.ask(REGION_BYTES)?
        {
            return Ok(region);
        }
        if let Some(region) = self.ask(bytes)? {
            return Ok(region);
        }
        if !self.kind.keeps() {
            regions.retain(|region| {
                if region.offsets.is_empty() {
                    self.free(region);
                }
                !region.offsets.is_empty()
            });
            if let Some(region) = self.ask(bytes)? {
                return Ok(region);
            }
        }
        Err(self.out_of_memory(bytes, what))
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
        Ok(Some(Region { address, offsets: Offsets::new(bytes) }))
    }

    fn give(&self, address: u64, bytes: u64) {
        let mut regions = self.regions();
        let holds = |r: &Region| (r.address..r.address + r.offsets.capacity()).contains(&address);
        let index = regions.iter().position(holds).expect("a buffer lies in a region of its pool");
        if self.kind == Kind::SeparateGraph {
            return; // nobody else may get it while the graph is there
        }
        let region = &mut regions[index];
        region.offsets.give(address - region.address, bytes);
        if self.kind == Kind::Separate {
            let region = regions.swap_remove(index);
            self.free(&region);
        }
    }

    /// To the driver, which first waits for the work that uses it.
    fn free(&self, region: &Region) {
        self.counters.reserved.fetch_sub(region.offsets.capacity(), Ordering::Relaxed);
        if self.context.bind().is_ok() {
            // SAFETY: the region came from cuMemAlloc and no tensor lies in it. An error is one of earlier work, which
            // the next call reports.
            let _ = unsafe { sys::cuMemFree_v2(region.address) };
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
            hint: format!("{free}; choose a smaller --size or --dtype bf16, or end other programs on the card"),
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let regions = std::mem::take(&mut *self.regions());
        regions.iter().for_each(|region| self.free(region));
    }
}
