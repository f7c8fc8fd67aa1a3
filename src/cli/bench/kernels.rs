//! `megafuse bench kernels`: the time of every kernel at the models' shapes.

use megafuse::ops::cases::{self, Case, Inputs};
use megafuse::runtime::cuda;
use megafuse::runtime::{CudaDevice, Work};
use megafuse::{DType, Device, Error, Result, ops};
use serde_json::{Value, json};

use super::args::{KernelArgs, Shapes};
use super::clock::{Clock, Timed};
use super::compare;
use super::errors::{Errors, Reference, errors};
use super::ncu;
use super::numbers::Samples;
use super::own;
use super::peaks::{self, Peaks};
use super::power::{Drawn, Meter};
use super::results::SCHEMA;
use super::roofline::{Point, Roofline};
use super::workload;
use crate::cli::check::{describe, driver, no_case};
use crate::cli::console::say;
use crate::cli::output::{self, print_line};

pub fn run(args: &KernelArgs) -> Result<()> {
    if let Some([first, second]) = args.compare.as_deref() {
        return compare::run(first, second, &args.filter, args.json);
    }
    if let Some(path) = &args.kernel {
        return own::run(path, args);
    }
    let device = args.device.open()?;
    if args.ncu {
        return ncu::run(args, &device);
    }
    if args.once {
        for (case, _) in selected(args, || usual(args))? {
            (case.prepare)(&Inputs::new(&device, args.dtype, CHECKED[0]))?()?;
        }
        return Ok(());
    }
    match &device {
        Device::Cuda(card) if cuda::is_emulated() => run_emulated(args, &device, card),
        _ => run_timed(args, &device),
    }
}

/// The cases to time, and how often a run has each, where they are a run's; `usual` without --workload.
fn selected(args: &KernelArgs, usual: impl FnOnce() -> Vec<Case>) -> Result<Vec<(Case, u64)>> {
    let cases = match &args.workload {
        Some(path) => workload::read(path)?,
        None => usual().into_iter().map(|case| (case, 1)).collect(),
    };
    let cases: Vec<_> = cases.into_iter().filter(|(case, _)| case.name.contains(&args.filter)).collect();
    if cases.is_empty() { Err(no_case(&args.filter)) } else { Ok(cases) }
}

fn usual(args: &KernelArgs) -> Vec<Case> {
    args.shapes.iter().flat_map(|shapes| shapes.cases()).collect()
}

impl Shapes {
    fn cases(self) -> Vec<Case> {
        match self {
            Shapes::Sd15 => cases::sd15(64),
            Shapes::Sd15At1024 => cases::sd15(128),
            Shapes::Vae => cases::vae_decode(64),
            Shapes::VaeAt1024 => cases::vae_decode(128),
            Shapes::Sdxl => cases::sdxl(128),
            Shapes::Sd3 => cases::sd3(128),
            Shapes::IfXl => cases::if_xl(64),
            Shapes::Relay => cases::relay(64),
            Shapes::Methods => cases::methods(128),
        }
    }
}

/// Seeds of the inputs that results are checked with, before and after; those of what is timed come after them.
const CHECKED: [u64; 2] = [1, 2];

/// Proves that everything runs and is right; measures nothing.
fn run_emulated(args: &KernelArgs, device: &Device, card: &CudaDevice) -> Result<()> {
    let cases = selected(args, cases::small)?;
    let note =
        "no performance figures: the emulated card runs on this machine's cpu, and its times say nothing about a card";
    if args.json {
        print_line(json!({
            "kind": "run", "schema": SCHEMA, "version": env!("CARGO_PKG_VERSION"), "emulated": true, "card": card.card(),
            "driver": driver(), "note": note,
        }));
    } else {
        print_line(format!("{}\n{note}; each case runs once", describe(card)));
    }
    if args.roofline.is_some() {
        let reason = "the emulated card has no times to draw";
        return Err(Error::Request { field: "--roofline", value: "FILE".into(), reason: reason.into() });
    }
    let clock = Clock::once(device)?;
    let products = if args.dtype == DType::F32 { DType::BF16 } else { args.dtype };
    for name in peaks::run_once(&clock, card, products)? {
        if args.json {
            print_line(json!({ "kind": "peak", "with": name, "emulated": true, "ran": true }));
        } else {
            print_line(format!("{:58} ran", format!("peak: {name}")));
        }
    }
    let mut wrong = Vec::new();
    for (case, count) in &cases {
        let mut bench = Bench::new(args, device, case, *count)?;
        let mut kernels = bench.prepare(&clock)?;
        bench.check(CHECKED[0])?;
        clock.sample(&mut kernels)?;
        bench.check(CHECKED[1])?;
        for timed in &kernels {
            let error = bench.error(&timed.kernel);
            let how = if timed.copies() > 0 { "from a graph too" } else { "not from a graph" };
            if args.json {
                let fields = json!({
                    "kernel": timed.kernel, "card": card.card(), "emulated": true, "ran": true,
                    "from_graph": timed.copies() > 0, "error": error_json(error, bench.reference, args.dtype),
                });
                print_line(bench.line(fields));
            } else {
                let error = error.map_or(String::new(), |error| format!("{:9.1e}", error.rms));
                print_line(format!("{:58} ran, {how:16} error {error}", bench.title(&timed.kernel)));
            }
        }
        wrong.extend(bench.mistakes());
    }
    finish(wrong)
}

fn run_timed(args: &KernelArgs, device: &Device) -> Result<()> {
    let cases = selected(args, || usual(args))?;
    let clock = Clock::new(device, args.seconds)?;
    let peak = Peaks::measure(&clock, args.dtype)?;
    let (name, driver) = match device {
        Device::Cuda(card) => (card.card().to_string(), driver()),
        _ => (format!("cpu, {} threads", rayon::current_num_threads()), String::new()),
    };
    let meter = match device {
        Device::Cuda(card) => {
            Meter::open(card).map_err(|why| say!("no clock, power and energy of the card: {why}")).ok()
        }
        _ => None,
    };
    let on_card = matches!(device, Device::Cuda(_));
    if args.json {
        print_line(json!({
            "kind": "run", "schema": SCHEMA, "version": env!("CARGO_PKG_VERSION"), "emulated": false, "card": name,
            "driver": driver, "dtype": args.dtype.name(), "peak_tflops": peak.flops / 1e12,
            "peak_gbytes_per_s": peak.bytes / 1e9, "with": peak.with,
            "multiprocessors": if let Device::Cuda(card) = device { Some(card.multiprocessors()) } else { None },
            "l2_bytes": if let Device::Cuda(card) = device { Some(card.l2_bytes()?) } else { None },
        }));
    } else {
        print_line(if let Device::Cuda(card) = device { describe(card) } else { name.clone() });
        let (tflops, gbytes) = (peak.flops / 1e12, peak.bytes / 1e9);
        print_line(format!("peaks measured: {tflops:.3} TFLOP/s ({}), {gbytes:.1} GB/s (copy)", peak.with));
        print_line(header(on_card, meter.is_some()));
    }
    let mut roofline = Roofline::new(format!("{name}, {}", args.dtype), peak);
    let mut wrong = Vec::new();
    let mut sum = Sum::default();
    for (case, count) in &cases {
        let mut bench = Bench::new(args, device, case, *count)?;
        let mut kernels = bench.prepare(&clock)?;
        bench.check(CHECKED[0])?;
        clock.sample(&mut kernels)?;
        bench.check(CHECKED[1])?;
        for timed in &kernels {
            let drawn = match &meter {
                Some(meter) => ops::with_variants(&timed.kernel, || clock.drawn(timed, meter))?,
                None => None,
            };
            let figures = Figures::new(&bench, timed, &peak, drawn);
            if figures.below_floor(&bench, &clock, timed) {
                wrong.push(format!(
                    "{} took {:.2} us, its floor is {:.2} us: not all of its work was done, or it is counted wrong",
                    bench.title(&timed.kernel),
                    figures.seconds * 1e6,
                    figures.floor * 1e6
                ));
            }
            if args.json {
                print_line(bench.line(figures.to_json(&bench, timed, &name, &driver)));
            } else {
                print_line(figures.row(&bench.title(&timed.kernel), on_card, meter.is_some()));
            }
            if timed.kernel.is_empty() {
                sum.add(case.op, *count, &figures);
            }
            roofline.points.push(Point {
                op: case.op.into(),
                name: bench.title(&timed.kernel),
                flops: bench.work.flops as f64,
                bytes: bench.work.bytes as f64,
                seconds: figures.seconds,
            });
        }
        wrong.extend(bench.mistakes());
    }
    if args.workload.is_some() {
        sum.print(args.json);
    }
    if let Some(path) = &args.roofline {
        output::replace(path, roofline.svg().as_bytes())?;
        say!("{}", path.display());
    }
    finish(wrong)
}

/// What a workload's calls come to, by op.
#[derive(Default)]
struct Sum {
    ops: Vec<(&'static str, u64, f64, f64)>,
}

impl Sum {
    fn add(&mut self, op: &'static str, count: u64, figures: &Figures) {
        if !self.ops.iter().any(|(name, ..)| *name == op) {
            self.ops.push((op, 0, 0.0, 0.0));
        }
        for (_, calls, seconds, floor) in self.ops.iter_mut().filter(|(name, ..)| *name == op) {
            *calls += count;
            *seconds += count as f64 * figures.seconds;
            *floor += count as f64 * figures.floor;
        }
    }

    fn print(&self, as_json: bool) {
        let all = self.ops.iter().fold(("all", 0, 0.0, 0.0), |(name, calls, seconds, floor), op| {
            (name, calls + op.1, seconds + op.2, floor + op.3)
        });
        if !as_json {
            print_line(format!("{:18} {:>8} {:>12} {:>12} {:>6}", "of the run", "calls", "time", "floor", "share"));
        }
        for &(op, calls, seconds, floor) in self.ops.iter().chain([&all]) {
            if as_json {
                print_line(json!({
                    "kind": "workload", "op": op, "calls": calls, "seconds": seconds, "floor_seconds": floor,
                    "share_of_peak": floor / seconds,
                }));
            } else {
                let [ms, floor_ms] = [seconds, floor].map(|seconds| format!("{:.3} ms", seconds * 1e3));
                print_line(format!("{op:18} {calls:>8} {ms:>12} {floor_ms:>12} {:5.0}%", 100.0 * floor / seconds));
            }
        }
    }
}

fn finish(wrong: Vec<String>) -> Result<()> {
    if wrong.is_empty() {
        return Ok(());
    }
    Err(Error::config("bench", wrong.join("\n")))
}

fn header(on_card: bool, metered: bool) -> String {
    let mut header = format!("{:58} {:>11} {:>6}", "op", if on_card { "rotated" } else { "median" }, "+-");
    if on_card {
        header += &format!(" {:>11}", "cold");
    }
    header += &format!(" {:>9} {:>8} {:>11} {:>6} {:>8}", "TFLOP/s", "GB/s", "floor", "share", "error");
    if metered {
        header += &format!(" {:>6} {:>5} {:>9}", "SM MHz", "W", "mJ");
    }
    header
}

/// One case of a run.
struct Bench<'a> {
    args: &'a KernelArgs,
    device: &'a Device,
    case: &'a Case,
    /// Calls of it in the run that is timed; 1 without --workload.
    count: u64,
    work: Work,
    reference: Option<Reference>,
    /// By kernel.
    errors: Vec<(String, Errors)>,
}

impl<'a> Bench<'a> {
    fn new(args: &'a KernelArgs, device: &'a Device, case: &'a Case, count: u64) -> Result<Bench<'a>> {
        let work = work(case, args.dtype)?;
        let reference = Reference::of(device, args.dtype, work);
        Ok(Bench { args, device, case, count, work, reference, errors: Vec::new() })
    }

    /// For [`ops::with_variants`]: the op's own choice, and with --variants each kernel that it has to choose from.
    fn kernels(&self) -> Vec<String> {
        let mut names = vec![String::new()];
        if self.args.variants {
            let variants = ops::variants_on(self.case.op, self.device, self.args.dtype);
            names.extend(variants.iter().map(|variant| format!("{}={}", self.case.op, variant.name)));
        }
        names
    }

    /// Those of [`kernels`](Bench::kernels) that take the operands.
    fn prepare(&self, clock: &Clock) -> Result<Vec<Timed>> {
        let mut kernels = Vec::new();
        for name in self.kernels() {
            kernels.extend(clock.prepare(self.case, self.args.dtype, &name, self.work.bytes)?);
        }
        Ok(kernels)
    }

    /// With inputs that no kernel has seen.
    fn check(&mut self, seed: u64) -> Result<()> {
        let Some(reference) = self.reference else { return Ok(()) };
        let want = reference.result(self.case, self.device, self.args.dtype, seed)?;
        for name in self.kernels() {
            let Some(errors) = errors(self.case, self.device, self.args.dtype, &name, seed, &want)? else { continue };
            match self.errors.iter_mut().find(|(kernel, _)| *kernel == name) {
                Some((_, before)) => *before = before.or_worse(errors),
                None => self.errors.push((name, errors)),
            }
        }
        Ok(())
    }

    fn error(&self, kernel: &str) -> Option<Errors> {
        self.errors.iter().find(|(name, _)| name == kernel).map(|(_, errors)| *errors)
    }

    /// A sentence for each kernel with a wrong result.
    fn mistakes(&self) -> Vec<String> {
        let dtype = self.args.dtype;
        let wrong = self.errors.iter().filter(|(_, errors)| !errors.right(dtype));
        let sentence = |(kernel, errors): &(String, Errors)| {
            format!(
                "{} is wrong: off by {:.1e} of the result's root mean square, {:.1e} are allowed in {dtype}",
                self.title(kernel),
                errors.rms,
                Errors::allowed(dtype)
            )
        };
        wrong.map(sentence).collect()
    }

    fn title(&self, kernel: &str) -> String {
        match kernel.split_once('=') {
            Some((_, variant)) => format!("{} {variant}", self.case.name),
            None => self.case.name.clone(),
        }
    }

    /// What is said of the case, then `fields`.
    fn line(&self, fields: Value) -> Value {
        let mut line = json!({
            "kind": "kernel", "op": self.case.op, "name": self.case.name, "shape": self.case.shape,
            "dtype": self.args.dtype.name(), "flops": self.work.flops, "bytes": self.work.bytes,
        });
        if self.args.workload.is_some() {
            line["count"] = self.count.into();
        }
        if let (Value::Object(line), Value::Object(fields)) = (&mut line, fields) {
            line.extend(fields);
        }
        line
    }
}

/// Flops and bytes that the meta device counts for the call.
pub fn work(case: &Case, dtype: DType) -> Result<Work> {
    let meta = Device::meta();
    let call = (case.prepare)(&Inputs::new(&meta, dtype, 0))?;
    let Device::Meta(recorder) = &meta else { unreachable!("just made") };
    recorder.take_report();
    call()?;
    Ok(recorder.take_report().total())
}

fn error_json(error: Option<Errors>, reference: Option<Reference>, dtype: DType) -> Value {
    match (error, reference) {
        (Some(error), Some(reference)) => json!({
            "rms": error.rms, "worst": error.worst, "allowed_rms": Errors::allowed(dtype), "against": reference.name(),
        }),
        _ => Value::Null,
    }
}

/// What was measured of one kernel.
struct Figures {
    /// Rotated on a card, where there is that, else the single calls'.
    seconds: f64,
    method: &'static str,
    floor: f64,
    flops: f64,
    bytes: f64,
    rotated: Option<Samples>,
    single: Samples,
    error: Option<Errors>,
    drawn: Option<Drawn>,
}

/// A time that is so much shorter than the floor is no measurement's error: the peak was measured on the same card a
/// moment before, at clocks that may have been somewhat lower.
const BELOW: f64 = 0.85;

impl Figures {
    fn new(bench: &Bench, timed: &Timed, peak: &Peaks, drawn: Option<Drawn>) -> Figures {
        let (rotated, single) = (timed.rotated(), timed.single());
        let method = match (&rotated, bench.device) {
            (Some(_), _) => "rotated",
            (None, Device::Cuda(_)) => "cold",
            (None, _) => "warm",
        };
        let (flops, bytes) = (bench.work.flops as f64, bench.work.bytes as f64);
        Figures {
            seconds: rotated.as_ref().unwrap_or(&single).median(),
            method,
            floor: (flops / peak.flops).max(bytes / peak.bytes),
            flops,
            bytes,
            error: bench.error(&timed.kernel),
            rotated,
            single,
            drawn,
        }
    }

    /// Where neither operands nor results can hide in a cache: a cold call leaves its results in one, to be written later,
    /// and the cpu reads what it has there.
    fn below_floor(&self, bench: &Bench, clock: &Clock, timed: &Timed) -> bool {
        self.method == "rotated" && clock.exceeds_cache(timed, bench.work.bytes) && self.seconds < BELOW * self.floor
    }

    fn to_json(&self, bench: &Bench, timed: &Timed, card: &str, driver: &str) -> Value {
        let single = if self.method == "warm" { "warm" } else { "cold" };
        let mut line = json!({
            "kernel": timed.kernel, "card": card, "driver": driver, "emulated": false, "method": self.method,
            "median_us": self.seconds * 1e6, "tflops": self.flops / self.seconds / 1e12,
            "gbytes_per_s": self.bytes / self.seconds / 1e9, "floor_us": self.floor * 1e6,
            "share_of_peak": self.floor / self.seconds, single: self.single.to_json(),
            "error": error_json(self.error, bench.reference, bench.args.dtype),
        });
        if let Some(rotated) = &self.rotated {
            line["rotated"] = rotated.to_json();
            line["rotated"]["copies"] = timed.copies().into();
        }
        if let Some(why) = &timed.not_recorded {
            line["not_rotated"] = why.clone().into();
        }
        if let Some(Drawn { sm_mhz, watts, joules }) = self.drawn {
            line["sm_mhz"] = sm_mhz.into();
            line["watts"] = watts.into();
            line["joules"] = joules.into();
        }
        line
    }

    fn row(&self, title: &str, on_card: bool, metered: bool) -> String {
        let us = |seconds: f64| format!("{:8.1} us", seconds * 1e6);
        let spread = self.rotated.as_ref().unwrap_or(&self.single).spread();
        let mut row = if on_card {
            let rotated = self.rotated.as_ref().map_or("-".into(), |samples| us(samples.median()));
            format!("{title:58} {rotated:>11} {:5.1}% {}", 100.0 * spread, us(self.single.median()))
        } else {
            format!("{title:58} {} {:5.1}%", us(self.seconds), 100.0 * spread)
        };
        let (tflops, gbytes) = (self.flops / self.seconds / 1e12, self.bytes / self.seconds / 1e9);
        let (floor, share) = (us(self.floor), 100.0 * self.floor / self.seconds);
        let error = self.error.map_or("-".into(), |error| format!("{:.1e}", error.rms));
        row += &format!(" {tflops:9.3} {gbytes:8.1} {floor} {share:5.0}% {error:>8}");
        if let (true, Some(Drawn { sm_mhz, watts, joules })) = (metered, self.drawn) {
            row += &format!(" {sm_mhz:6.0} {watts:5.0} {:9.3}", joules * 1e3);
        }
        row
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use clap::ValueEnum;

    use super::*;

    #[test]
    fn every_case_is_counted_and_has_a_name_of_its_own() {
        for &shapes in Shapes::value_variants() {
            let mut names = BTreeSet::new();
            for case in shapes.cases() {
                let work = work(&case, DType::BF16).unwrap_or_else(|error| panic!("{}: {error}", case.name));
                assert!(work.bytes > 0, "{}", case.name);
                assert!(case.shape.is_object(), "{}", case.name);
                assert!(names.insert(case.name.clone()), "{} twice", case.name);
            }
        }
    }
}
