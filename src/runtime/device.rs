use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::MetaDevice;

/// Where a tensor lives and where ops on it run. Cheap to clone; clones are the same device.
#[derive(Clone, Debug)]
pub enum Device {
    /// Host memory; ops in Rust on the gemm crate and rayon.
    Cpu(CpuDevice),
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

    /// Are the two the same device, so that one op may read both?
    pub fn same(&self, other: &Device) -> bool {
        match (self, other) {
            (Device::Cpu(a), Device::Cpu(b)) => Arc::ptr_eq(&a.0, &b.0),
            (Device::Meta(a), Device::Meta(b)) => a.same(b),
            _ => false,
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Device::Cpu(_) => "cpu",
            Device::Meta(_) => "meta",
        })
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
