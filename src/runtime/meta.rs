//! The device without data: it runs the model code for its shapes and records what every op would cost.

use std::sync::{Arc, Mutex};

/// What an op mainly is, for the totals by kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum OpKind {
    Conv,
    Linear,
    Attention,
    Norm,
    Resize,
    /// Embeddings, activations, sampler steps: a few flops an element.
    Elementwise,
}

impl OpKind {
    pub const ALL: [OpKind; 6] =
        [OpKind::Conv, OpKind::Linear, OpKind::Attention, OpKind::Norm, OpKind::Resize, OpKind::Elementwise];

    pub fn name(self) -> &'static str {
        match self {
            OpKind::Conv => "conv",
            OpKind::Linear => "linear",
            OpKind::Attention => "attention",
            OpKind::Norm => "norm",
            OpKind::Resize => "resize",
            OpKind::Elementwise => "elementwise",
        }
    }
}

/// Cost of one op call as the fused kernel would have it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Multiply-accumulates of the matrix products and convolutions; 0 for the others.
    pub macs: u64,
    /// Floating-point operations: 2 * macs plus the op's own elementwise work.
    pub flops: u64,
    /// Bytes read from and written to device memory when every operand moves once.
    pub bytes: u64,
    /// Kernel launches.
    pub launches: u64,
}

impl Work {
    /// `self + times * work`; stays at the largest number rather than wrap for sizes that nobody can run.
    pub fn plus(self, work: Work, times: u64) -> Work {
        let add = |sum: u64, one: u64| sum.saturating_add(one.saturating_mul(times));
        Work {
            macs: add(self.macs, work.macs),
            flops: add(self.flops, work.flops),
            bytes: add(self.bytes, work.bytes),
            launches: add(self.launches, work.launches),
        }
    }
}

/// One op call on the meta device.
#[derive(Clone, Debug)]
pub struct OpRecord {
    /// The op's one name: kernel, `ops::` function, test and bench.
    pub op: &'static str,
    pub kind: OpKind,
    /// Shape of the (first) output.
    pub output: Vec<usize>,
    pub work: Work,
    /// Bytes of live tensors (weights included) right after the output was allocated.
    pub live_bytes: u64,
}

/// What was recorded since the last [`MetaDevice::take_report`].
#[derive(Clone, Debug, Default)]
pub struct Report {
    pub ops: Vec<OpRecord>,
    /// Largest number of bytes alive at once during these ops, weights included.
    pub peak_bytes: u64,
}

impl Report {
    /// Sum over the ops of one kind.
    pub fn of(&self, kind: OpKind) -> Work {
        Self::sum(self.ops.iter().filter(|op| op.kind == kind))
    }

    pub fn total(&self) -> Work {
        Self::sum(self.ops.iter())
    }

    fn sum<'a>(ops: impl Iterator<Item = &'a OpRecord>) -> Work {
        ops.fold(Work::default(), |sum, op| sum.plus(op.work, 1))
    }
}

#[derive(Clone, Debug, Default)]
pub struct MetaDevice(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    live_bytes: u64,
    report: Report,
}

impl MetaDevice {
    pub fn same(&self, other: &MetaDevice) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Bytes of live tensors.
    pub fn live_bytes(&self) -> u64 {
        self.lock().live_bytes
    }

    /// Called by an op after it allocated its outputs.
    pub fn record(&self, op: &'static str, kind: OpKind, output: &[usize], work: Work) {
        let mut state = self.lock();
        let live_bytes = state.live_bytes;
        state.report.ops.push(OpRecord { op, kind, output: output.to_vec(), work, live_bytes });
    }

    /// The record so far; recording starts anew with the bytes alive now as the first peak.
    pub fn take_report(&self) -> Report {
        let mut state = self.lock();
        let live_bytes = state.live_bytes;
        std::mem::replace(&mut state.report, Report { ops: Vec::new(), peak_bytes: live_bytes })
    }

    pub(super) fn added(&self, bytes: u64) {
        let mut state = self.lock();
        state.live_bytes += bytes;
        state.report.peak_bytes = state.report.peak_bytes.max(state.live_bytes);
    }

    pub(super) fn removed(&self, bytes: u64) {
        self.lock().live_bytes -= bytes;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // A panic while recording leaves plain counters behind: still usable.
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_of_work_saturate() {
        let one = Work { macs: u64::MAX / 2, flops: 3, bytes: 0, launches: 1 };
        let sum = one.plus(one, 5);
        assert_eq!(sum, Work { macs: u64::MAX, flops: 18, bytes: 0, launches: 6 });
    }
}
