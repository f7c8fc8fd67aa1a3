//! The way between host and card: a ring of pinned memory, so that a copy runs while the next part is prepared and no
//! tensor is held twice on the host.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUresult};

use super::device::Context;
use super::driver::check;
use crate::error::{Error, Result};

const SLOT_BYTES: usize = 8 << 20;
const SLOTS: usize = 2;

/// Slots are made when first needed.
#[derive(Debug)]
pub struct Staging {
    context: Arc<Context>,
    slots: Vec<Slot>,
    next: usize,
}

#[derive(Debug)]
struct Slot {
    host: *mut c_void,
    /// The latest copy from or to the slot is done.
    done: sys::CUevent,
}

// SAFETY: the pointers are the driver's, which any thread may use; the slots are behind a mutex.
unsafe impl Send for Staging {}

impl Staging {
    pub fn new(context: Arc<Context>) -> Staging {
        Staging { context, slots: Vec::new(), next: 0 }
    }

    /// Copies `bytes` to the address, in stream order; returns when `bytes` may change.
    pub fn upload(&mut self, to: u64, bytes: &[u8]) -> Result<()> {
        self.context.bind()?;
        for (part, bytes) in bytes.chunks(SLOT_BYTES).enumerate() {
            let context = self.context.clone();
            let slot = self.slot()?;
            let to = to + (part * SLOT_BYTES) as u64;
            // SAFETY: the slot's last copy is done and it holds SLOT_BYTES; the destination was checked by the caller.
            unsafe {
                std::ptr::copy_nonoverlapping(bytes.as_ptr(), slot.host.cast(), bytes.len());
                let copy = sys::cuMemcpyHtoDAsync_v2(to, slot.host, bytes.len(), context.stream);
                check(&context.name, "cuMemcpyHtoDAsync", copy)?;
                check(&context.name, "cuEventRecord", sys::cuEventRecord(slot.done, context.stream))?;
            }
        }
        Ok(())
    }

    /// Copies from the address when all work before is done; waits for it.
    pub fn download(&mut self, from: u64, bytes: &mut [u8]) -> Result<()> {
        self.context.bind()?;
        for (part, bytes) in bytes.chunks_mut(SLOT_BYTES).enumerate() {
            let context = self.context.clone();
            let slot = self.slot()?;
            let from = from + (part * SLOT_BYTES) as u64;
            // SAFETY: as in upload.
            unsafe {
                let copy = sys::cuMemcpyDtoHAsync_v2(slot.host, from, bytes.len(), context.stream);
                check(&context.name, "cuMemcpyDtoHAsync", copy)?;
                check(&context.name, "cuEventRecord", sys::cuEventRecord(slot.done, context.stream))?;
                check(&context.name, "cuEventSynchronize", sys::cuEventSynchronize(slot.done))?;
                std::ptr::copy_nonoverlapping(slot.host.cast(), bytes.as_mut_ptr(), bytes.len());
            }
        }
        Ok(())
    }

    /// The next slot, once its last copy is done.
    fn slot(&mut self) -> Result<&Slot> {
        if self.slots.len() < SLOTS {
            let slot = self.new_slot()?;
            self.slots.push(slot);
            self.next = self.slots.len() - 1;
        }
        let slot = &self.slots[self.next];
        self.next = (self.next + 1) % SLOTS;
        // SAFETY: the event lives as long as the slot.
        check(&self.context.name, "cuEventSynchronize", unsafe { sys::cuEventSynchronize(slot.done) })?;
        Ok(slot)
    }

    fn new_slot(&self) -> Result<Slot> {
        let name = &self.context.name;
        let mut host = std::ptr::null_mut();
        // SAFETY: the context is current; the pointers are valid for the calls.
        unsafe {
            match sys::cuMemAllocHost_v2(&mut host, SLOT_BYTES) {
                CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                    return Err(Error::OutOfMemory {
                        device: name.clone(),
                        what: "pinned host memory for copies".into(),
                        requested_bytes: SLOT_BYTES as u64,
                        in_use_bytes: (self.slots.len() * SLOT_BYTES) as u64,
                        hint: "end other programs; pinned memory cannot be swapped".into(),
                    });
                }
                result => check(name, "cuMemAllocHost", result)?,
            }
            let mut done = std::ptr::null_mut();
            let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
            if let Err(error) = check(name, "cuEventCreate", sys::cuEventCreate(&mut done, flags)) {
                sys::cuMemFreeHost(host);
                return Err(error);
            }
            Ok(Slot { host, done })
        }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.context.bind().is_err() {
            return;
        }
        for slot in &self.slots {
            // SAFETY: made by new_slot, freed once; the copies are waited for first.
            unsafe {
                sys::cuEventSynchronize(slot.done);
                sys::cuEventDestroy_v2(slot.done);
                sys::cuMemFreeHost(slot.host);
            }
        }
    }
}
