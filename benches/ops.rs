//! Times the ops at the shapes of Stable Diffusion 1.5 (a guided step at 512x512: batch 2; the VAE at 512x512) and
//! compares each with this machine's own peaks: `cargo bench --bench ops -- [--json] [--filter S] [--dtype f32]
//! [--threads N] [--seconds S] [--cpu-time]`.
//!
//! The peaks are measured first: bare fused multiply-adds on every core (FLOP/s) and a copy of 256 MiB (bytes/s). An op's
//! floor is the larger of flops over the first and bytes over the second; flops and bytes are those that the meta device
//! records for the same call. Inputs are random; outputs are allocated by each call, as in a model; the time is the
//! median. Nothing is flushed between calls: an input that fits the last-level cache may be read from it.

use std::hint::black_box;
use std::time::{Duration, Instant};

use clap::Parser;
use megafuse::Result;
use megafuse::ops::cases::{self, Case, Inputs, random};
use megafuse::ops::peaks;
use megafuse::runtime::{DType, Device, Work};
use rayon::prelude::*;

#[derive(Parser)]
struct Args {
    /// One JSON object a line instead of a table.
    #[arg(long)]
    json: bool,
    /// Only cases whose name contains this.
    #[arg(long, default_value = "")]
    filter: String,
    #[arg(long, default_value = "f32")]
    dtype: DType,
    /// Default: one per core.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Time spent on a case.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Mean processor time of the measuring thread instead of the median wall time: for a busy machine, with --threads 1
    /// (Linux).
    #[arg(long)]
    cpu_time: bool,
    /// Cargo passes this.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(args.threads).build().expect("a thread pool");
    pool.install(|| run(&args))
}

fn run(args: &Args) -> Result<()> {
    let clock = Clock { time: Duration::from_secs_f64(args.seconds), cpu_time: args.cpu_time };
    let peak = Peaks { flops: fma_flops(clock), bytes: copy_bytes(clock) };
    let threads = rayon::current_num_threads();
    if args.json {
        println!(
            "{}",
            serde_json::json!({ "threads": threads, "dtype": args.dtype.name(), "level": "peak",
                "gflops": peak.flops / 1e9, "gbytes_per_s": peak.bytes / 1e9 })
        );
    } else {
        println!("{threads} threads; peaks: {:.0} GFLOP/s, {:.1} GB/s", peak.flops / 1e9, peak.bytes / 1e9);
        println!("{:58} {:>9} {:>8} {:>8} {:>8} {:>6}", "op", "median", "GFLOP/s", "GB/s", "floor", "share");
    }
    for case in cases().into_iter().filter(|case| case.name.contains(&args.filter)) {
        let meta = Device::meta();
        let call = (case.prepare)(&Inputs::new(&meta, args.dtype, 0))?;
        let Device::Meta(recorder) = &meta else { unreachable!() };
        recorder.take_report();
        call()?;
        let work = recorder.take_report().total();

        let call = (case.prepare)(&Inputs::new(&Device::cpu(), args.dtype, 0))?;
        call()?; // the first call grows the scratch buffers
        let seconds = clock.measure(|| call().map(drop))?;
        report(args, &case.name, work, seconds, &peak);
    }
    Ok(())
}

fn cases() -> Vec<Case> {
    let large_vae = cases::vae_decode(128).into_iter().filter(|case| case.op == "attention");
    [cases::sd15(64), cases::vae_decode(64), cases::relay(64), cases::rms_norms(), cases::sd3(128)]
        .into_iter()
        .flatten()
        .chain(large_vae)
        .collect()
}

struct Peaks {
    flops: f64,
    bytes: f64,
}

fn report(args: &Args, name: &str, work: Work, seconds: f64, peak: &Peaks) {
    let floor = (work.flops as f64 / peak.flops).max(work.bytes as f64 / peak.bytes);
    let (gflops, gbytes) = (work.flops as f64 / seconds / 1e9, work.bytes as f64 / seconds / 1e9);
    if args.json {
        println!(
            "{}",
            serde_json::json!({ "op": name, "median_us": seconds * 1e6, "gflops": gflops, "gbytes_per_s": gbytes,
                "floor_us": floor * 1e6, "share_of_floor": floor / seconds })
        );
    } else {
        println!(
            "{name:58} {:6.0} us {gflops:8.1} {gbytes:8.1} {:5.0} us {:5.0}%",
            seconds * 1e6,
            floor * 1e6,
            100.0 * floor / seconds
        );
    }
}

#[derive(Clone, Copy)]
struct Clock {
    time: Duration,
    cpu_time: bool,
}

impl Clock {
    /// Seconds of a call, over the calls that fit in `time`, at least three.
    fn measure(self, mut call: impl FnMut() -> Result<()>) -> Result<f64> {
        let (start, cpu_start, mut seconds) = (Instant::now(), thread_seconds(), Vec::new());
        while seconds.len() < 3 || start.elapsed() < self.time {
            let call_start = Instant::now();
            call()?;
            seconds.push(call_start.elapsed().as_secs_f64());
        }
        if self.cpu_time {
            return Ok((thread_seconds() - cpu_start) / seconds.len() as f64);
        }
        seconds.sort_by(f64::total_cmp);
        Ok(seconds[seconds.len() / 2])
    }
}

/// Processor time of this thread; 0 where the system does not say.
fn thread_seconds() -> f64 {
    #[cfg(all(target_os = "linux", target_pointer_width = "64"))]
    {
        const CLOCK_THREAD_CPUTIME_ID: i32 = 3;
        unsafe extern "C" {
            fn clock_gettime(clock: i32, time: *mut [i64; 2]) -> i32;
        }
        let mut time = [0i64; 2];
        // SAFETY: a timespec is two 64-bit integers here, seconds and nanoseconds.
        if unsafe { clock_gettime(CLOCK_THREAD_CPUTIME_ID, &mut time) } == 0 {
            return time[0] as f64 + time[1] as f64 * 1e-9;
        }
    }
    0.0
}

/// f32 throughput of bare fused multiply-adds on registers, all threads at once: no memory, no loop of a matrix product.
fn fma_flops(clock: Clock) -> f64 {
    const ROUNDS: usize = 1 << 20;
    let threads = rayon::current_num_threads();
    let seconds = clock.measure(|| {
        (0..threads).into_par_iter().for_each(|_| {
            black_box(peaks::cpu_sums(black_box(ROUNDS)));
        });
        Ok(())
    });
    peaks::cpu_sums_flops(ROUNDS) * threads as f64 / seconds.expect("infallible")
}

/// Bytes read plus written per second by a parallel copy.
fn copy_bytes(clock: Clock) -> f64 {
    let from = random(32 << 20, 3); // 128 MiB read and 128 MiB written
    let mut to = vec![0.0f32; from.len()];
    let seconds = clock.measure(|| {
        to.par_chunks_mut(1 << 16).zip(from.par_chunks(1 << 16)).for_each(|(to, from)| to.copy_from_slice(from));
        Ok(())
    });
    2.0 * size_of_val(&from[..]) as f64 / seconds.expect("infallible")
}
