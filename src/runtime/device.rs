use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::cuda::{self, CudaDevice, CudaOptions};
use super::{MetaDevice, available_bytes};
use crate::error::Result;

/// Where a tensor lives and where ops on it run. Cheap to clone; clones are the same device.
#[derive(Clone, Debug)]
pub enum Device {
    /// Host memory; ops in Rust, threads from rayon.
    Cpu(CpuDevice),
    /// An NVIDIA card (or its emulation); ops in the kernels of kernels/.
    Cuda(CudaDevice),
    /// No data: shape checks and a record of every op's cost.
    Meta(MetaDevice),
}

impl Device {
    pub fn cpu() -> Device {
        Device::Cpu(CpuDevice::default())
    }

    pub fn meta() -> Device {
        Device::Meta(MetaDevice::default())
    }

    /// Card `ordinal` of the installed driver.
    ///
    /// # Errors
    /// As [`CudaDevice::open`].
    pub fn cuda(ordinal: usize) -> Result<Device> {
        Ok(Device::Cuda(CudaDevice::open(CudaOptions { ordinal, ..CudaOptions::default() })?))
    }

    /// The emulated card: the same kernels, compiled for the host, behind the driver's interface. It takes the place of
    /// the installed driver for the whole process.
    ///
    /// # Errors
    /// As [`cuda::emulated_library`], [`cuda::use_library`] and [`CudaDevice::open`].
    pub fn emulated(options: CudaOptions) -> Result<Device> {
        cuda::use_library(&cuda::emulated_library()?)?;
        Ok(Device::Cuda(CudaDevice::open(options)?))
    }

    /// Bytes that this program can have in all: what its tensors hold already and what the device can still give. `None`
    /// where the device does not say, and for meta.
    pub fn budget_bytes(&self) -> Option<u64> {
        match self {
            Device::Cpu(cpu) => Some(available_bytes()?.saturating_add(cpu.in_use_bytes())),
            Device::Cuda(card) => card.memory().ok().map(|memory| memory.free_bytes + memory.reserved_bytes),
            Device::Meta(_) => None,
        }
    }

    /// Are the two the same device, so that one op may read both?
    pub fn same(&self, other: &Device) -> bool {
        match (self, other) {
            (Device::Cpu(a), Device::Cpu(b)) => Arc::ptr_eq(&a.0, &b.0),
            (Device::Cuda(a), Device::Cuda(b)) => a.same(b),
            (Device::Meta(a), Device::Meta(b)) => a.same(b),
            _ => false,
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Device::Cpu(_) => f.write_str("cpu"),
            Device::Cuda(cuda) => cuda.fmt(f),
            Device::Meta(_) => f.write_str("meta"),
        }
    }
}

/// The host. Counts the bytes its tensors hold, so that an allocation failure can say what is in use.
#[derive(Clone, Debug, Default)]
pub struct CpuDevice(Arc<CpuCounters>);

#[derive(Debug, Default)]
struct CpuCounters {
    in_use_bytes: AtomicU64,
    peak_bytes: AtomicU64,
}

impl CpuDevice {
    /// Bytes held by live tensors.
    pub fn in_use_bytes(&self) -> u64 {
        self.0.in_use_bytes.load(Ordering::Relaxed)
    }

    /// Largest [`in_use_bytes`](Self::in_use_bytes) so far.
    pub fn peak_bytes(&self) -> u64 {
        self.0.peak_bytes.load(Ordering::Relaxed)
    }

    pub(super) fn added(&self, bytes: u64) {
        let now = self.0.in_use_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.0.peak_bytes.fetch_max(now, Ordering::Relaxed);
    }

    pub(super) fn removed(&self, bytes: u64) {
        self.0.in_use_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}
