use std::sync::Arc;

use cudarc::driver::sys::{self, CUevent, CUevent_flags};

use super::CudaDevice;
use super::device::Context;
use super::driver::check;
use crate::error::Result;

/// A point in the card's work.
#[derive(Debug)]
pub struct Mark {
    context: Arc<Context>,
    event: CUevent,
}

// SAFETY: the handle is the driver's, which any thread may use.
unsafe impl Send for Mark {}
unsafe impl Sync for Mark {}

impl Mark {
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver)
    pub fn new(device: &CudaDevice) -> Result<Mark> {
        let context = device.context().clone();
        context.bind()?;
        let mut event = std::ptr::null_mut();
        // SAFETY: the pointer is valid for the call.
        let result = unsafe { sys::cuEventCreate(&mut event, CUevent_flags::CU_EVENT_DEFAULT as u32) };
        check(&context.name, "cuEventCreate", result)?;
        Ok(Mark { context, event })
    }

    /// Moves the mark behind all work launched so far.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver)
    pub fn set(&self) -> Result<()> {
        self.context.bind()?;
        // SAFETY: event and stream live as long as self.
        let result = unsafe { sys::cuEventRecord(self.event, self.context.stream) };
        check(&self.context.name, "cuEventRecord", result)
    }

    /// Waits until the card has come this far; at once when the mark was never set.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver): also those of the work before.
    pub fn wait(&self) -> Result<()> {
        self.context.bind()?;
        // SAFETY: as set.
        check(&self.context.name, "cuEventSynchronize", unsafe { sys::cuEventSynchronize(self.event) })
    }

    /// Milliseconds of the card's time from `start` to this mark; both must have been reached.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver)
    pub fn milliseconds_since(&self, start: &Mark) -> Result<f32> {
        self.context.bind()?;
        let mut time = 0.0;
        // SAFETY: as set; the pointer is valid for the call.
        let result = unsafe { sys::cuEventElapsedTime_v2(&mut time, start.event, self.event) };
        check(&self.context.name, "cuEventElapsedTime", result)?;
        Ok(time)
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: made by new, destroyed once.
            unsafe { sys::cuEventDestroy_v2(self.event) };
        }
    }
}
