//! How a call is timed.
//!
//! On a card in two ways, which differ by tens of percent for short calls:
//!
//! * `rotated`: calls one after the other without a gap, replayed from a graph, on operands that are together at least twice
//!   the second-level cache: what a call takes inside a run;
//! * `cold`: one call by itself, after the second-level cache was emptied by reading something else (a fill would leave lines
//!   to be written back while the call runs): launch included, operands from memory.
//!
//! On the cpu in one, `warm`: call after call on the same operands, nothing is emptied.

use std::time::{Duration, Instant};

use megafuse::ops::cases::{Call, Case, Inputs};
use megafuse::ops::{self, peaks};
use megafuse::runtime::CudaDevice;
use megafuse::runtime::cuda::{Graph, Mark};
use megafuse::{DType, Device, Error, Result, Tensor};

use super::numbers::Samples;
use super::power::{Drawn, Meter};

/// Fewest samples of anything.
const LEAST: usize = 5;
/// Enough of them when half the 95 % interval of the median is this share of it, and there are [`ENOUGH`].
const SPREAD: f64 = 0.005;
const ENOUGH: usize = 20;
/// Calls that a graph holds, at most: of a call that touches little, so many do not fill twice the cache.
const MOST_CALLS: usize = 512;
/// Clocks have settled when the medians of two batches of samples in a row differ by less.
const SETTLED: f64 = 0.01;
const BATCH: usize = 5;

/// Values that are read to empty a cache: four times its size, at least 64 MiB.
fn flush_values(l2_bytes: u64) -> usize {
    (4 * l2_bytes as usize / 4).max(16 << 20).next_multiple_of(peaks::READ_BLOCK)
}

pub struct Clock<'a> {
    pub device: &'a Device,
    /// For each kernel of a case.
    time: Duration,
    least: usize,
    card: Option<CardClock<'a>>,
}

struct CardClock<'a> {
    card: &'a CudaDevice,
    l2_bytes: u64,
    /// What is read to empty the cache.
    flush: Tensor,
    start: Mark,
    end: Mark,
}

/// One kernel of a case, ready to be timed.
pub struct Timed {
    /// As [`ops::with_variants`] reads it; empty: the op's own choice.
    pub kernel: String,
    calls: Vec<Call>,
    graph: Option<Graph>,
    /// Why there is no graph.
    pub not_recorded: Option<String>,
    rotated: Vec<f64>,
    single: Vec<f64>,
}

impl Timed {
    /// Distinct calls of the graph.
    pub fn copies(&self) -> usize {
        if self.graph.is_some() { self.calls.len() } else { 0 }
    }

    pub fn rotated(&self) -> Option<Samples> {
        (!self.rotated.is_empty()).then(|| Samples::new(self.rotated.clone()))
    }

    /// Cold on a card, warm on the cpu.
    pub fn single(&self) -> Samples {
        Samples::new(self.single.clone())
    }

    fn settled(&self, least: usize) -> bool {
        let enough = |seconds: &Vec<f64>| {
            let samples = Samples::new(seconds.clone());
            samples.len() >= least.max(ENOUGH) && samples.spread() < SPREAD
        };
        enough(&self.single) && (self.graph.is_none() || enough(&self.rotated))
    }
}

impl<'a> Clock<'a> {
    pub fn new(device: &'a Device, seconds: f64) -> Result<Clock<'a>> {
        let card = match device {
            Device::Cuda(card) => {
                let l2_bytes = card.l2_bytes()?;
                let flush = Tensor::zeros(device, &[flush_values(l2_bytes)], DType::F32)?;
                Some(CardClock { card, l2_bytes, flush, start: Mark::new(card)?, end: Mark::new(card)? })
            }
            _ => None,
        };
        Ok(Clock { device, time: Duration::from_secs_f64(seconds), least: LEAST, card })
    }

    /// Runs everything once and empties no cache: for the emulated card, whose times mean nothing.
    pub fn once(device: &'a Device) -> Result<Clock<'a>> {
        let card = match device {
            Device::Cuda(card) => {
                let flush = Tensor::zeros(device, &[peaks::READ_BLOCK], DType::F32)?;
                Some(CardClock { card, l2_bytes: 0, flush, start: Mark::new(card)?, end: Mark::new(card)? })
            }
            _ => None,
        };
        Ok(Clock { device, time: Duration::ZERO, least: 1, card })
    }

    /// Do the operands of the graph's calls, `bytes` each, fill twice the cache?
    pub fn exceeds_cache(&self, timed: &Timed, bytes: u64) -> bool {
        self.card.as_ref().is_some_and(|card| timed.copies() as u64 * bytes >= 2 * card.l2_bytes)
    }

    /// Makes the operands and records the graph. `bytes`: what a call reads and writes. `None`: the kernel does not take the
    /// case's operands.
    pub fn prepare(&self, case: &Case, dtype: DType, kernel: &str, bytes: u64) -> Result<Option<Timed>> {
        let copies = match &self.card {
            None => 1,
            Some(card) if card.l2_bytes == 0 => 2,
            Some(card) => ((2 * card.l2_bytes).div_ceil(bytes.max(1)) as usize + 1).clamp(2, MOST_CALLS),
        };
        let calls = (0..copies as u64).map(|copy| (case.prepare)(&Inputs::new(self.device, dtype, 3 + copy)));
        self.ready(kernel, calls.collect::<Result<_>>()?)
    }

    /// The same for calls that exist.
    pub fn ready(&self, kernel: &str, calls: Vec<Call>) -> Result<Option<Timed>> {
        let mut timed =
            Timed { kernel: kernel.into(), calls, graph: None, not_recorded: None, rotated: vec![], single: vec![] };
        let recorded = ops::with_variants(kernel, || {
            timed.calls[0]()?; // loads modules and grows pools, which no graph can record
            let Some(CardClock { card, .. }) = &self.card else { return Ok(None) };
            card.synchronize()?;
            let graph = card.capture(0, || {
                // All results are alive until the end, so that they too lie apart.
                let results: Result<Vec<Tensor>> = timed.calls.iter().map(|call| call()).collect();
                results.map(drop)
            });
            match graph {
                Ok(graph) => Ok(Some(graph)),
                Err(Error::Config { what, reason }) if what == "graph" => {
                    timed.not_recorded = Some(reason);
                    Ok(None)
                }
                Err(error) => Err(error),
            }
        });
        match recorded {
            Err(Error::Argument { arg: "MEGAFUSE_KERNEL", .. }) => Ok(None),
            recorded => {
                timed.graph = recorded?;
                Ok(Some(timed))
            }
        }
    }

    /// Samples all kernels in turns, one of each at a time (A B A B), so that what changes with time changes for all: first
    /// until the clocks have settled, without counting, then until every interval is narrow or the time is over.
    pub fn sample(&self, kernels: &mut [Timed]) -> Result<()> {
        let time = self.time.mul_f64(kernels.len() as f64);
        self.warm_up(kernels, time / 2)?;
        let began = Instant::now();
        let mut rounds = 0;
        while rounds < self.least || began.elapsed() < time && !kernels.iter().all(|timed| timed.settled(self.least)) {
            for timed in kernels.iter_mut() {
                if let Some(seconds) = self.rotated(timed)? {
                    timed.rotated.push(seconds);
                }
                let seconds = self.single(timed, rounds)?;
                timed.single.push(seconds);
            }
            rounds += 1;
        }
        Ok(())
    }

    fn warm_up(&self, kernels: &[Timed], time: Duration) -> Result<()> {
        if self.least == 1 {
            return Ok(());
        }
        let (began, mut before) = (Instant::now(), None);
        loop {
            let mut batch = Vec::new();
            for round in 0..BATCH {
                for timed in kernels {
                    batch.push(match self.rotated(timed)? {
                        Some(seconds) => seconds,
                        None => self.single(timed, round)?,
                    });
                }
            }
            // Of different kernels, but of the same ones each time.
            let sum: f64 = batch.iter().sum();
            let settled = before.is_some_and(|before: f64| (sum / before - 1.0).abs() < SETTLED);
            if settled || began.elapsed() >= time {
                return Ok(());
            }
            before = Some(sum);
        }
    }

    /// Seconds of a call within a replay of the graph.
    fn rotated(&self, timed: &Timed) -> Result<Option<f64>> {
        let (Some(CardClock { start, end, .. }), Some(graph)) = (&self.card, &timed.graph) else { return Ok(None) };
        start.set()?;
        graph.replay()?;
        end.set()?;
        end.wait()?;
        Ok(Some(f64::from(end.milliseconds_since(start)?) / 1e3 / timed.calls.len() as f64))
    }

    fn single(&self, timed: &Timed, round: usize) -> Result<f64> {
        let call = &timed.calls[round % timed.calls.len()];
        ops::with_variants(&timed.kernel, || match &self.card {
            None => {
                let start = Instant::now();
                let y = call()?;
                let seconds = start.elapsed().as_secs_f64();
                drop(y);
                Ok(seconds)
            }
            Some(CardClock { flush, start, end, .. }) => {
                // The card is still at it when the call's launches arrive, so these wait for nothing of the host.
                peaks::read(flush)?;
                start.set()?;
                let y = call()?;
                end.set()?;
                end.wait()?;
                drop(y);
                Ok(f64::from(end.milliseconds_since(start)?) / 1e3)
            }
        })
    }

    /// Clock, power and energy of the kernel's calls, replayed for a fifth of a second at least: the card counts energy in
    /// steps of some tens of milliseconds.
    pub fn drawn(&self, timed: &Timed, meter: &Meter) -> Result<Option<Drawn>> {
        const LEAST_TIME: Duration = Duration::from_millis(200);
        let (Some(CardClock { card, end, .. }), Some(graph)) = (&self.card, &timed.graph) else { return Ok(None) };
        card.synchronize()?;
        let (Some(before), began) = (meter.joules(), Instant::now()) else { return Ok(None) };
        let (mut replays, mut clocks) = (0, Vec::new());
        while began.elapsed() < self.time.max(LEAST_TIME) {
            // A few ahead, so that the card never waits.
            for _ in 0..4 {
                graph.replay()?;
            }
            replays += 4;
            clocks.extend(meter.sm_mhz());
            end.set()?;
            end.wait()?;
        }
        let (seconds, after) = (began.elapsed().as_secs_f64(), meter.joules());
        let Some(joules) = after.map(|after| after - before).filter(|_| !clocks.is_empty()) else { return Ok(None) };
        let sm_mhz = clocks.iter().sum::<f64>() / clocks.len() as f64;
        Ok(Some(Drawn { sm_mhz, watts: joules / seconds, joules: joules / (replays * timed.calls.len()) as f64 }))
    }
}
