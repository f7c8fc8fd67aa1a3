//! Where the time of a run goes, per op and output shape, and which calls a run is made of. Off, an op pays two loads. Each
//! call is also a range of a profiler's timeline ([`nvtx`]), if one is attached.
//!
//! On the cpu a time is the wall clock's. On a card it is the card's own, between two marks around the op's launches, so
//! launches wait for nothing; work that is replayed from a graph passes here only when it is recorded, so a profiled run
//! must be without graphs ([`CudaOptions::eager`](crate::runtime::CudaOptions)).

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::error::Result;
use crate::runtime::Device;
use crate::runtime::cuda::{CudaDevice, Mark};
use crate::runtime::nvtx::{self, Range};

static ON: AtomicBool = AtomicBool::new(false);
static STATE: Mutex<State> = Mutex::new(State { card: None, began: None, spans: Vec::new(), marked: Vec::new() });

/// Op and output shape.
pub type Key = (&'static str, Vec<usize>);

/// Calls of one op with one output shape.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpTime {
    pub calls: u64,
    /// Time of all calls together.
    pub time: Duration,
}

/// One call.
#[derive(Clone, Debug)]
pub struct Span {
    pub key: Key,
    /// Since the start of the profile.
    pub start: Duration,
    pub time: Duration,
}

struct State {
    card: Option<CudaDevice>,
    /// On the host's clock, and on the card's.
    began: Option<(Instant, Option<Mark>)>,
    spans: Vec<Span>,
    /// Calls on the card, which may not be done yet.
    marked: Vec<(Key, Mark, Mark)>,
}

/// From now on every op is timed on the host's clock; what was measured before is forgotten.
pub fn start() {
    begin(None, None);
}

/// The same for a device: on a card by the card's clock, elsewhere as [`start`].
///
/// # Errors
/// [`Error::Driver`](crate::Error::Driver)
pub fn start_on(device: &Device) -> Result<()> {
    let Device::Cuda(card) = device else {
        start();
        return Ok(());
    };
    let began = Mark::new(card)?;
    began.set()?;
    begin(Some(card.clone()), Some(began));
    Ok(())
}

fn begin(card: Option<CudaDevice>, mark: Option<Mark>) {
    *state() = State { card, began: Some((Instant::now(), mark)), spans: Vec::new(), marked: Vec::new() };
    ON.store(true, Ordering::Relaxed);
}

/// Stops and returns the sums by op and output shape.
pub fn stop() -> BTreeMap<Key, OpTime> {
    // Without a card nothing can fail.
    sums(&stop_spans().unwrap_or_default())
}

/// Stops, waits for what is under way and returns every call in the order of its end.
///
/// # Errors
/// [`Error::Driver`](crate::Error::Driver): also those of the work.
pub fn stop_spans() -> Result<Vec<Span>> {
    ON.store(false, Ordering::Relaxed);
    let mut state = state();
    let marked = std::mem::take(&mut state.marked);
    let mut spans = std::mem::take(&mut state.spans);
    if let (Some(card), Some((_, Some(began)))) = (state.card.take(), &state.began) {
        card.synchronize()?;
        let milliseconds = |mark: &Mark, since: &Mark| {
            Ok(Duration::from_secs_f64((f64::from(mark.milliseconds_since(since)?) / 1e3).max(0.0)))
        };
        for (key, start, end) in marked {
            spans.push(Span { key, start: milliseconds(&start, began)?, time: milliseconds(&end, &start)? });
        }
    }
    Ok(spans)
}

/// By op and output shape.
pub fn sums(spans: &[Span]) -> BTreeMap<Key, OpTime> {
    let mut totals: BTreeMap<Key, OpTime> = BTreeMap::new();
    for span in spans {
        let total = totals.entry(span.key.clone()).or_default();
        total.calls += 1;
        total.time += span.time;
    }
    totals
}

/// Lives as long as the op runs.
pub(super) struct Scope {
    /// If a profile is on.
    _timed: Option<Timed>,
    /// If a profiler is attached.
    _range: Option<Range>,
}

struct Timed {
    key: Key,
    start: Start,
}

enum Start {
    Host(Instant),
    Card(Mark, CudaDevice),
}

pub(super) fn scope(op: &'static str, output: &[usize]) -> Scope {
    let _range = nvtx::range(|| format!("{op} {output:?}"));
    Scope { _timed: timed(op, output), _range }
}

fn timed(op: &'static str, output: &[usize]) -> Option<Timed> {
    if !ON.load(Ordering::Relaxed) {
        return None;
    }
    let key = (op, output.to_vec());
    let Some(card) = state().card.clone() else { return Some(Timed { key, start: Start::Host(Instant::now()) }) };
    // An error of the driver here is one of the work before, which the op's own launch reports.
    let mark = Mark::new(&card).ok()?;
    mark.set().ok()?;
    Some(Timed { key, start: Start::Card(mark, card) })
}

impl Drop for Timed {
    fn drop(&mut self) {
        let key = std::mem::take(&mut self.key);
        match &self.start {
            Start::Host(start) => {
                let time = start.elapsed();
                let mut state = state();
                let since = state.began.as_ref().map_or(Duration::ZERO, |(began, _)| start.duration_since(*began));
                state.spans.push(Span { key, start: since, time });
            }
            Start::Card(_, card) => {
                let Ok(end) = Mark::new(card).and_then(|end| end.set().map(|()| end)) else { return };
                let start = std::mem::replace(&mut self.start, Start::Host(Instant::now()));
                if let Start::Card(start, _) = start {
                    state().marked.push((key, start, end));
                }
            }
        }
    }
}

fn state() -> std::sync::MutexGuard<'static, State> {
    // A panic between two additions leaves whole entries behind: still usable.
    STATE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// A call that a run makes: what [`cases::of_shape`](super::cases::of_shape) makes one like it from.
#[derive(Clone, Debug, PartialEq)]
pub struct RecordedCall {
    pub op: &'static str,
    /// As in [`Case::shape`](super::cases::Case::shape).
    pub shape: Value,
    pub count: u64,
}

thread_local! {
    static CALLS: RefCell<Option<Vec<RecordedCall>>> = const { RefCell::new(None) };
}

/// Runs `f` and returns the calls of ops that it made on this thread, equal ones together, in the order of their first.
/// Meant for a run on the meta device, which makes the calls of the real one.
pub fn record_calls<R>(f: impl FnOnce() -> R) -> (R, Vec<RecordedCall>) {
    CALLS.set(Some(Vec::new()));
    let result = f();
    (result, CALLS.take().unwrap_or_default())
}

/// Called by an op whose calls can be made again from their shape.
pub(super) fn call(op: &'static str, shape: impl FnOnce() -> Value) {
    CALLS.with_borrow_mut(|calls| {
        let Some(calls) = calls else { return };
        let shape = shape();
        match calls.iter_mut().find(|call| call.op == op && call.shape == shape) {
            Some(call) => call.count += 1,
            None => calls.push(RecordedCall { op, shape, count: 1 }),
        }
    });
}
