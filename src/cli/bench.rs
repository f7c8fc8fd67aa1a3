//! `megafuse bench`: the time of every kernel at the models' shapes, beside what this device can do at most.

use std::hint::black_box;
use std::time::{Duration, Instant};

use megafuse::ops::cases::{self, Call, Case, random, tensor};
use megafuse::ops::peaks;
use megafuse::runtime::cuda::{self, Mark};
use megafuse::runtime::{CudaDevice, Work};
use megafuse::{DType, Device, Error, Result, Tensor, ops};
use rayon::prelude::*;
use serde_json::{Value, json};

use super::args::{BenchArgs, Shapes};
use super::check::{describe, driver, no_case};
use super::output::print_line;

/// Fewest repetitions of a call.
const LEAST: usize = 5;

pub fn run(args: &BenchArgs) -> Result<()> {
    let device = args.device.open()?;
    match &device {
        Device::Cuda(card) if cuda::is_emulated() => run_emulated(args, &device, card),
        _ => run_timed(args, &device),
    }
}

fn selected(args: &BenchArgs, cases: Vec<Case>) -> Result<Vec<Case>> {
    let cases: Vec<Case> = cases.into_iter().filter(|case| case.name.contains(&args.filter)).collect();
    if cases.is_empty() { Err(no_case(&args.filter)) } else { Ok(cases) }
}

impl Shapes {
    fn cases(self) -> Vec<Case> {
        match self {
            Shapes::Sd15 => cases::sd15(64),
            Shapes::Sd15At1024 => cases::sd15(128),
            Shapes::Vae => cases::vae_decode(64),
            Shapes::VaeAt1024 => cases::vae_decode(128),
            Shapes::Sdxl => cases::sdxl(128),
            Shapes::Relay => cases::relay(64),
        }
    }
}

/// Proves that everything runs; measures nothing.
fn run_emulated(args: &BenchArgs, device: &Device, card: &CudaDevice) -> Result<()> {
    let cases = selected(args, cases::small())?;
    let note =
        "no performance figures: the emulated card runs on this machine's cpu, and its times say nothing about a card";
    if args.json {
        print_line(json!({ "emulated": true, "card": card.card(), "driver": driver(), "note": note }));
    } else {
        print_line(format!("{}\n{note}; each case runs once", describe(card)));
    }
    let products = if args.dtype == DType::F32 { DType::BF16 } else { args.dtype };
    let clock = Clock { device, time: Duration::ZERO, least: 1, flush: false };
    let peak_calls = [("peak_mma", peak_products(device, products, 1, 2)?), ("peak_ffma", peak_sums(device, 1, 2)?)];
    for (name, call) in peak_calls.into_iter().chain([("peak_copy", peak_copy(device, 1 << 12)?)]) {
        clock.median(&call)?;
        if args.json {
            print_line(json!({ "op": name, "emulated": true, "ran": true }));
        } else {
            print_line(format!("{name:58} ran"));
        }
    }
    for case in &cases {
        let call = (case.prepare)(device, args.dtype)?;
        for kernel in kernels(args, device, case) {
            if clock.median_by(&kernel, &call)?.is_none() {
                continue;
            }
            if args.json {
                let fields = json!({
                    "dtype": args.dtype.name(), "kernel": kernel, "card": card.card(), "emulated": true, "ran": true,
                });
                print_line(merged(case, fields));
            } else {
                print_line(format!("{:58} ran", title(case, &kernel)));
            }
        }
    }
    Ok(())
}

fn run_timed(args: &BenchArgs, device: &Device) -> Result<()> {
    let cases = selected(args, args.shapes.iter().flat_map(|shapes| shapes.cases()).collect())?;
    let clock = Clock { device, time: Duration::from_secs_f64(args.seconds), least: LEAST, flush: true };
    let peak = Peaks::measure(clock, args.dtype)?;
    let (name, driver) = match device {
        Device::Cuda(card) => (card.card().to_string(), driver()),
        _ => (format!("cpu, {} threads", rayon::current_num_threads()), String::new()),
    };
    if args.json {
        print_line(json!({
            "op": "peak", "dtype": args.dtype.name(), "card": name, "driver": driver, "emulated": false,
            "peak_tflops": peak.flops / 1e12, "peak_gbytes_per_s": peak.bytes / 1e9, "with": peak.with,
        }));
    } else {
        let title = if let Device::Cuda(card) = device { describe(card) } else { name.clone() };
        print_line(title);
        let (tflops, gbytes) = (peak.flops / 1e12, peak.bytes / 1e9);
        print_line(format!("peaks measured: {tflops:.3} TFLOP/s ({}), {gbytes:.1} GB/s (copy)", peak.with));
        print_line(format!(
            "{:58} {:>11} {:>9} {:>8} {:>11} {:>6}",
            "op", "median", "TFLOP/s", "GB/s", "floor", "share"
        ));
    }
    for case in &cases {
        let work = work(case, args.dtype)?;
        let call = (case.prepare)(device, args.dtype)?;
        let floor = (work.flops as f64 / peak.flops).max(work.bytes as f64 / peak.bytes);
        for kernel in kernels(args, device, case) {
            let Some(seconds) = clock.median_by(&kernel, &call)? else { continue };
            let (flops, bytes, share) = (work.flops as f64 / seconds, work.bytes as f64 / seconds, floor / seconds);
            if args.json {
                let fields = json!({
                    "dtype": args.dtype.name(), "kernel": kernel, "card": name, "driver": driver, "emulated": false,
                    "median_us": seconds * 1e6, "tflops": flops / 1e12, "gbytes_per_s": bytes / 1e9,
                    "share_of_peak": share, "floor_us": floor * 1e6,
                });
                print_line(merged(case, fields));
            } else {
                print_line(format!(
                    "{:58} {:8.1} us {:9.3} {:8.1} {:8.1} us {:5.0}%",
                    title(case, &kernel),
                    seconds * 1e6,
                    flops / 1e12,
                    bytes / 1e9,
                    floor * 1e6,
                    100.0 * share
                ));
            }
        }
    }
    Ok(())
}

/// For [`ops::with_variants`]: the op's own choice, and with --variants each kernel that it has to choose from.
fn kernels(args: &BenchArgs, device: &Device, case: &Case) -> Vec<String> {
    let mut kernels = vec![String::new()];
    if args.variants {
        let variants = ops::variants_on(case.op, device, args.dtype);
        kernels.extend(variants.iter().map(|variant| format!("{}={}", case.op, variant.name)));
    }
    kernels
}

fn title(case: &Case, kernel: &str) -> String {
    match kernel.split_once('=') {
        Some((_, variant)) => format!("{} {variant}", case.name),
        None => case.name.clone(),
    }
}

/// Flops and bytes that the meta device counts for the call.
fn work(case: &Case, dtype: DType) -> Result<Work> {
    let meta = Device::meta();
    let call = (case.prepare)(&meta, dtype)?;
    let Device::Meta(recorder) = &meta else { unreachable!("just made") };
    recorder.take_report();
    call()?;
    Ok(recorder.take_report().total())
}

/// op, name and shape, then `fields`.
fn merged(case: &Case, fields: Value) -> Value {
    let mut line = json!({ "op": case.op, "name": case.name, "shape": case.shape });
    if let (Value::Object(line), Value::Object(fields)) = (&mut line, fields) {
        line.extend(fields);
    }
    line
}

/// How a call is timed.
#[derive(Clone, Copy)]
struct Clock<'a> {
    device: &'a Device,
    time: Duration,
    /// Repetitions, at least.
    least: usize,
    /// On a card: empty the second-level cache before each.
    flush: bool,
}

/// Larger than any card's second-level cache.
const FLUSH_VALUES: usize = 64 << 20;

impl Clock<'_> {
    /// Median seconds of a call, over as many as fit in the time, after two that do not count (one for the cpu and for a
    /// single repetition). On a card its own clock, from the end of the work before to the end of the call's; inputs come
    /// from memory, not from the cache. On the cpu nothing is flushed.
    fn median(self, call: &Call) -> Result<f64> {
        let mut seconds = match self.device {
            Device::Cuda(card) => self.on_card(card, call)?,
            _ => self.on_cpu(call)?,
        };
        seconds.sort_by(f64::total_cmp);
        Ok(seconds[seconds.len() / 2])
    }

    /// By the kernels that are named, as [`ops::with_variants`] reads them; `None`: they do not take the call's operands.
    fn median_by(self, kernels: &str, call: &Call) -> Result<Option<f64>> {
        match ops::with_variants(kernels, || self.median(call)) {
            Err(Error::Argument { arg: "MEGAFUSE_KERNEL", .. }) => Ok(None),
            median => median.map(Some),
        }
    }

    fn on_card(self, card: &CudaDevice, call: &Call) -> Result<Vec<f64>> {
        let (start, end) = (Mark::new(card)?, Mark::new(card)?);
        for _ in 1..self.least.min(3) {
            call()?;
        }
        card.synchronize()?;
        let (began, mut seconds) = (Instant::now(), Vec::new());
        while seconds.len() < self.least || began.elapsed() < self.time {
            if self.flush {
                // The card is still at it when the call's launches arrive, so these wait for nothing of the host.
                Tensor::zeros(self.device, &[FLUSH_VALUES], DType::F32)?;
            }
            start.set()?;
            let y = call()?;
            end.set()?;
            end.wait()?;
            seconds.push(f64::from(end.milliseconds_since(&start)?) / 1e3);
            drop(y);
        }
        Ok(seconds)
    }

    fn on_cpu(self, call: &Call) -> Result<Vec<f64>> {
        call()?; // the first call grows the scratch buffers
        let (began, mut seconds) = (Instant::now(), Vec::new());
        while seconds.len() < self.least || began.elapsed() < self.time {
            let start = Instant::now();
            let y = call()?;
            seconds.push(start.elapsed().as_secs_f64());
            drop(y);
        }
        Ok(seconds)
    }
}

/// What the device does at most, a second.
struct Peaks {
    flops: f64,
    /// Read plus written by a copy.
    bytes: f64,
    /// What the flops were measured with.
    with: &'static str,
}

impl Peaks {
    fn measure(clock: Clock, dtype: DType) -> Result<Peaks> {
        let Device::Cuda(card) = clock.device else { return Peaks::of_cpu(clock) };
        // Two blocks a multiprocessor; a few milliseconds on a large card.
        let blocks = 2 * card.multiprocessors();
        let (flops, with, call) = if dtype == DType::F32 {
            const ROUNDS: usize = 1 << 16;
            (peaks::sums_flops(blocks, ROUNDS), "fused multiply-add, f32", peak_sums(clock.device, blocks, ROUNDS)?)
        } else {
            const ROUNDS: usize = 1 << 14;
            let call = peak_products(clock.device, dtype, blocks, ROUNDS)?;
            (peaks::products_flops(blocks, ROUNDS), "mma.sync m16n8k16", call)
        };
        let flops = flops / clock.median(&call)?;
        let bytes = (2 * COPIED * size_of::<f32>()) as f64 / clock.median(&peak_copy(clock.device, COPIED)?)?;
        Ok(Peaks { flops, bytes, with })
    }

    /// Bare fused multiply-adds on all threads at once; a copy by all of them.
    fn of_cpu(clock: Clock) -> Result<Peaks> {
        const ROUNDS: usize = 1 << 20;
        let threads = rayon::current_num_threads();
        let nothing = || Tensor::zeros(&Device::cpu(), &[0], DType::F32);
        let products: Call = Box::new(move || {
            (0..threads).into_par_iter().for_each(|_| {
                black_box(peaks::cpu_sums(black_box(ROUNDS)));
            });
            nothing()
        });
        let flops = peaks::cpu_sums_flops(ROUNDS) * threads as f64 / clock.median(&products)?;
        const COUNT: usize = 32 << 20;
        let from = random(COUNT, 3);
        let to = std::cell::RefCell::new(vec![0.0f32; COUNT]);
        let copy: Call = Box::new(move || {
            let mut to = to.borrow_mut();
            to.par_chunks_mut(1 << 16).zip(from.par_chunks(1 << 16)).for_each(|(to, from)| to.copy_from_slice(from));
            nothing()
        });
        let bytes = (2 * COUNT * size_of::<f32>()) as f64 / clock.median(&copy)?;
        Ok(Peaks { flops, bytes, with: "fused multiply-add, f32" })
    }
}

/// f32 values that the copy reads and writes: 512 MiB.
const COPIED: usize = 128 << 20;

fn peak_products(device: &Device, dtype: DType, blocks: usize, rounds: usize) -> Result<Call> {
    let (a, b) = (tensor(device, dtype, &[peaks::A, 16, 16])?, tensor(device, dtype, &[peaks::B, 8, 16])?);
    Ok(Box::new(move || peaks::products(&a, &b, blocks, rounds)))
}

fn peak_sums(device: &Device, blocks: usize, rounds: usize) -> Result<Call> {
    let x = tensor(device, DType::F32, &[peaks::THREADS])?;
    Ok(Box::new(move || peaks::sums(&x, 0.999, 0.001, blocks, rounds)))
}

fn peak_copy(device: &Device, count: usize) -> Result<Call> {
    let x = tensor(device, DType::F32, &[count])?;
    Ok(Box::new(move || peaks::copy(&x)))
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
