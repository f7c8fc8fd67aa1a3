//! Where the time of the cpu device goes, per op and output shape. Off, an op pays one relaxed load.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

static ON: AtomicBool = AtomicBool::new(false);
static TOTALS: Mutex<BTreeMap<(&'static str, Vec<usize>), OpTime>> = Mutex::new(BTreeMap::new());

/// Calls of one op with one output shape.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpTime {
    pub calls: u64,
    /// Wall-clock time of all calls together.
    pub time: Duration,
}

/// From now on every op's time on the cpu is added up; what was added before is forgotten.
pub fn start() {
    totals().clear();
    ON.store(true, Ordering::Relaxed);
}

/// Stops and returns the sums by op and output shape.
pub fn stop() -> BTreeMap<(&'static str, Vec<usize>), OpTime> {
    ON.store(false, Ordering::Relaxed);
    std::mem::take(&mut *totals())
}

/// Lives as long as the op runs.
pub(super) struct Scope {
    key: (&'static str, Vec<usize>),
    start: Instant,
}

pub(super) fn scope(op: &'static str, output: &[usize]) -> Option<Scope> {
    ON.load(Ordering::Relaxed).then(|| Scope { key: (op, output.to_vec()), start: Instant::now() })
}

impl Drop for Scope {
    fn drop(&mut self) {
        let time = self.start.elapsed();
        let mut totals = totals();
        let total = totals.entry(std::mem::take(&mut self.key)).or_default();
        total.calls += 1;
        total.time += time;
    }
}

fn totals() -> std::sync::MutexGuard<'static, BTreeMap<(&'static str, Vec<usize>), OpTime>> {
    // A panic between two additions leaves plain numbers behind: still usable.
    TOTALS.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
