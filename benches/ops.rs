//! Times the ops at the shapes of Stable Diffusion 1.5 (a guided step at 512x512: batch 2; the VAE at 512x512) and
//! compares each with this machine's own peaks: `cargo bench --bench ops -- [--json] [--filter S] [--dtype f32]
//! [--threads N] [--seconds S] [--cpu-time]`.
//!
//! The peaks are measured first: bare fused multiply-adds on every core (FLOP/s) and a copy of 256 MiB (bytes/s). An op's
//! floor is the larger of flops over the first and bytes over the second; flops and bytes are those that the meta device
//! records for the same call. Inputs are random; outputs are allocated by each call, as in a model; the time is the
//! median. Nothing is flushed between calls: an input that fits the last-level cache may be read from it.

use std::cell::RefCell;
use std::hint::black_box;
use std::time::{Duration, Instant};

use clap::Parser;
use megafuse::Result;
use megafuse::ops::{
    self, Activation, Attention, Conv2d, ConvNorm, GroupNorm, LayerNorm, Linear, SampleState, Source, StepCoefficients,
    StepRow, StepTable, Upsampler,
};
use megafuse::runtime::{DType, Device, Tensor, Work};
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
        let call = (case.prepare)(&meta, args.dtype)?;
        let Device::Meta(recorder) = &meta else { unreachable!() };
        recorder.take_report();
        call()?;
        let work = recorder.take_report().total();

        let call = (case.prepare)(&Device::cpu(), args.dtype)?;
        call()?; // the first call grows the scratch buffers
        let seconds = clock.measure(|| call().map(drop))?;
        report(args, &case.name, work, seconds, &peak);
    }
    Ok(())
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
            black_box(fma_rounds(black_box(ROUNDS)));
        });
        Ok(())
    });
    let lanes = fma_lanes();
    2.0 * (ROUNDS * FMA_SUMS * lanes * threads) as f64 / seconds.expect("infallible")
}

/// Independent sums: enough to hide the latency of two units, few enough for the registers.
const FMA_SUMS: usize = 12;

#[cfg(target_arch = "x86_64")]
fn fma_lanes() -> usize {
    if is_x86_feature_detected!("avx512f") {
        16
    } else if is_x86_feature_detected!("fma") {
        8
    } else {
        4
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn fma_lanes() -> usize {
    4
}

fn fma_rounds(rounds: usize) -> f32 {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::*;

        #[target_feature(enable = "avx512f")]
        fn avx512(rounds: usize) -> f32 {
            let (scale, shift) = (_mm512_set1_ps(0.999), _mm512_set1_ps(0.001));
            let mut sums = [shift; FMA_SUMS];
            for _ in 0..rounds {
                sums = sums.map(|sum| _mm512_fmadd_ps(sum, scale, shift));
            }
            sums.into_iter().map(|sum| _mm512_reduce_add_ps(sum)).sum()
        }

        #[target_feature(enable = "avx,fma")]
        fn fma(rounds: usize) -> f32 {
            let (scale, shift) = (_mm256_set1_ps(0.999), _mm256_set1_ps(0.001));
            let mut sums = [shift; FMA_SUMS];
            for _ in 0..rounds {
                sums = sums.map(|sum| _mm256_fmadd_ps(sum, scale, shift));
            }
            sums.into_iter().map(|sum| _mm256_cvtss_f32(sum)).sum()
        }

        // SAFETY: the instruction sets were detected.
        match fma_lanes() {
            16 => return unsafe { avx512(rounds) },
            8 => return unsafe { fma(rounds) },
            _ => {}
        }
    }
    let mut sums = [[0.001f32; 4]; FMA_SUMS];
    for _ in 0..rounds {
        sums = sums.map(|sum| sum.map(|value| value * 0.999 + 0.001));
    }
    sums.into_iter().flatten().sum()
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

/// Uniform in [-1, 1), SplitMix64. Never zeros: power, and so clocks, follow the data.
fn random(count: usize, seed: u64) -> Vec<f32> {
    let value = |i: usize| {
        let z = (i as u64 + (seed << 40)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).into_par_iter().map(value).collect()
}

fn tensor(device: &Device, dtype: DType, shape: &[usize]) -> Result<Tensor> {
    match device {
        Device::Meta(_) => Tensor::uninit(device, shape, dtype),
        _ => Tensor::from_f32(device, shape, dtype, &random(shape.iter().product(), shape.len() as u64)),
    }
}

type Call = Box<dyn Fn() -> Result<Tensor>>;
type Prepare = Box<dyn Fn(&Device, DType) -> Result<Call>>;

/// A call that can be prepared on any device.
struct Case {
    name: String,
    prepare: Prepare,
}

fn cases() -> Vec<Case> {
    let mut cases = vec![
        conv(Conv { name: "conv_in", shape: [2, 64, 64, 4], outputs: 320, ..CONV }),
        conv(Conv { name: "res 64", shape: [2, 64, 64, 320], outputs: 320, norm: true, ..CONV }),
        conv(Conv { name: "res 64 skip", shape: [2, 64, 64, 640], skip: 320, outputs: 320, norm: true, ..CONV }),
        conv(Conv { name: "down 64", shape: [2, 64, 64, 320], outputs: 320, stride: 2, ..CONV }),
        conv(Conv { name: "res 32", shape: [2, 32, 32, 640], outputs: 640, norm: true, ..CONV }),
        conv(Conv { name: "up 32", shape: [2, 32, 32, 640], outputs: 640, resize_to: Some([64, 64]), ..CONV }),
        conv(Conv { name: "res 16", shape: [2, 16, 16, 1280], outputs: 1280, norm: true, ..CONV }),
        conv(Conv { name: "res 8", shape: [2, 8, 8, 1280], outputs: 1280, norm: true, ..CONV }),
        conv(Conv { name: "res 8 skip", shape: [2, 8, 8, 1280], skip: 1280, outputs: 1280, norm: true, ..CONV }),
        conv(Conv { name: "shortcut 64", shape: [2, 64, 64, 640], skip: 320, outputs: 320, kernel: 1, ..CONV }),
        conv(Conv { name: "conv_out", shape: [2, 64, 64, 320], outputs: 4, norm: true, ..CONV }),
        conv(Conv { name: "vae 256", shape: [1, 256, 256, 256], outputs: 256, norm: true, ..CONV }),
        conv(Conv { name: "vae 512", shape: [1, 512, 512, 128], outputs: 128, norm: true, ..CONV }),
        conv(Conv { name: "vae conv_out", shape: [1, 512, 512, 128], outputs: 3, norm: true, ..CONV }),
    ];
    for (m, k, n) in [
        (8192, 320, 960),
        (8192, 320, 320),
        (8192, 1280, 320),
        (2048, 640, 640),
        (2048, 2560, 640),
        (512, 1280, 1280),
        (512, 5120, 1280),
        (154, 768, 640),
        (154, 768, 2560),
        (2, 1280, 1280),
    ] {
        cases.push(linear(m, k, n, Activation::None));
    }
    for (m, k, n) in [(8192, 320, 2560), (2048, 640, 5120), (512, 1280, 10240)] {
        cases.push(linear(m, k, n, Activation::Geglu));
    }
    cases.push(linear(154, 768, 3072, Activation::QuickGelu));
    for (shape, skip) in [([2, 64, 64, 320], 0), ([2, 64, 64, 640], 320), ([1, 512, 512, 128], 0)] {
        cases.push(group_norm(shape, skip));
    }
    for (rows, c) in [(8192, 320), (2048, 640), (512, 1280)] {
        cases.push(layer_norm(rows, c));
    }
    for (n, l, heads, head_dim) in
        [(2, 4096, 8, 40), (2, 1024, 8, 80), (2, 256, 8, 160), (2, 64, 8, 160), (1, 4096, 1, 512), (1, 16384, 1, 512)]
    {
        cases.push(self_attention(n, l, heads, head_dim, false));
    }
    cases.push(self_attention(2, 77, 12, 64, true));
    for (l, head_dim) in [(4096, 40), (1024, 80), (256, 160), (64, 160)] {
        cases.push(cross_attention(2, l, 77, 8, head_dim));
    }
    for upsampler in [Upsampler::Bilinear, Upsampler::Bicubic, Upsampler::BicubicGaussian, Upsampler::BicubicEdge] {
        cases.push(resize([1, 512, 512, 3], [1024, 1024], upsampler));
    }
    cases.push(sampler_step([1, 128, 128, 4]));
    cases
}

#[derive(Clone, Copy)]
struct Conv {
    name: &'static str,
    /// `[N, H, W, C]` of the first source.
    shape: [usize; 4],
    /// Channels of the second source, 0 for none.
    skip: usize,
    outputs: usize,
    kernel: usize,
    stride: usize,
    norm: bool,
    resize_to: Option<[usize; 2]>,
}

const CONV: Conv =
    Conv { name: "", shape: [1; 4], skip: 0, outputs: 1, kernel: 3, stride: 1, norm: false, resize_to: None };

fn conv(c: Conv) -> Case {
    let [n, h, w, channels] = c.shape;
    let skip = if c.skip > 0 { format!("+{}", c.skip) } else { String::new() };
    let norm = if c.norm { " norm silu" } else { "" };
    let name =
        format!("conv2d {} [{n},{h},{w},{channels}{skip}] {k}x{k} -> {o}{norm}", c.name, k = c.kernel, o = c.outputs);
    let prepare = move |device: &Device, dtype: DType| -> Result<Call> {
        let t = |shape: &[usize]| tensor(device, dtype, shape);
        let (a, b) = (t(&c.shape)?, t(&[n, h, w, c.skip])?);
        let weight = t(&[c.outputs, c.kernel, c.kernel, channels + c.skip])?;
        let (bias, gamma) = (t(&[c.outputs])?, t(&[channels + c.skip])?);
        Ok(Box::new(move || {
            let x = if c.skip > 0 { Source::Two(&a, &b) } else { Source::One(&a) };
            let norm = ConvNorm { gamma: &gamma, beta: &gamma, groups: 32, eps: 1e-5, silu: true };
            ops::conv2d(Conv2d {
                bias: Some(&bias),
                norm: c.norm.then_some(norm),
                stride: c.stride,
                resize_to: c.resize_to,
                ..Conv2d::new(x, &weight)
            })
        }))
    };
    Case { name, prepare: Box::new(prepare) }
}

fn linear(m: usize, k: usize, rows: usize, activation: Activation) -> Case {
    let suffix = if activation == Activation::None { String::new() } else { format!(" {activation:?}").to_lowercase() };
    let prepare = move |device: &Device, dtype: DType| -> Result<Call> {
        let t = |shape: &[usize]| tensor(device, dtype, shape);
        let (x, weight, bias) = (t(&[m, k])?, t(&[rows, k])?, t(&[rows])?);
        Ok(Box::new(move || ops::linear(Linear { bias: Some(&bias), activation, ..Linear::new(&x, &weight) })))
    };
    Case { name: format!("linear [{m},{k}] -> {rows}{suffix}"), prepare: Box::new(prepare) }
}

fn group_norm(shape: [usize; 4], skip: usize) -> Case {
    let [n, h, w, channels] = shape;
    let prepare = move |device: &Device, dtype: DType| -> Result<Call> {
        let t = |shape: &[usize]| tensor(device, dtype, shape);
        let (a, b, gamma) = (t(&shape)?, t(&[n, h, w, skip])?, t(&[channels + skip])?);
        Ok(Box::new(move || {
            let x = if skip > 0 { Source::Two(&a, &b) } else { Source::One(&a) };
            ops::group_norm(GroupNorm { x, gamma: &gamma, beta: &gamma, groups: 32, eps: 1e-5, silu: true })
        }))
    };
    Case { name: format!("group_norm silu [{n},{h},{w},{channels}+{skip}]"), prepare: Box::new(prepare) }
}

fn layer_norm(rows: usize, c: usize) -> Case {
    let prepare = move |device: &Device, dtype: DType| -> Result<Call> {
        let (x, gamma) = (tensor(device, dtype, &[rows, c])?, tensor(device, dtype, &[c])?);
        Ok(Box::new(move || ops::layer_norm(LayerNorm { x: &x, gamma: &gamma, beta: &gamma, eps: 1e-5 })))
    };
    Case { name: format!("layer_norm [{rows},{c}]"), prepare: Box::new(prepare) }
}

fn self_attention(n: usize, l: usize, heads: usize, head_dim: usize, causal: bool) -> Case {
    let prepare = move |device: &Device, dtype: DType| -> Result<Call> {
        let qkv = tensor(device, dtype, &[n, l, 3, heads, head_dim])?;
        Ok(Box::new(move || ops::attention(Attention::Packed { qkv: &qkv, causal })))
    };
    let suffix = if causal { " causal" } else { "" };
    Case { name: format!("attention [{n},{l},3,{heads},{head_dim}]{suffix}"), prepare: Box::new(prepare) }
}

fn cross_attention(n: usize, queries: usize, keys: usize, heads: usize, head_dim: usize) -> Case {
    let prepare = move |device: &Device, dtype: DType| -> Result<Call> {
        let q = tensor(device, dtype, &[n, queries, heads, head_dim])?;
        let kv = tensor(device, dtype, &[n, keys, 2, heads, head_dim])?;
        Ok(Box::new(move || ops::attention(Attention::Cross { q: &q, kv: &kv })))
    };
    Case { name: format!("attention [{n},{queries},{heads},{head_dim}] x {keys} keys"), prepare: Box::new(prepare) }
}

fn resize(shape: [usize; 4], size: [usize; 2], upsampler: Upsampler) -> Case {
    let prepare = move |device: &Device, dtype: DType| -> Result<Call> {
        let x = tensor(device, dtype, &shape)?;
        Ok(Box::new(move || ops::resize(&x, size, upsampler, Some((-1.0, 1.0)), None)))
    };
    Case { name: format!("resize {upsampler:?} {shape:?} -> {size:?}"), prepare: Box::new(prepare) }
}

fn sampler_step([n, h, w, c]: [usize; 4]) -> Case {
    let prepare = move |device: &Device, dtype: DType| -> Result<Call> {
        let (x, output) = (tensor(device, DType::F32, &[n, h, w, c])?, tensor(device, dtype, &[2 * n, h, w, c])?);
        let coefficients = StepCoefficients {
            x0_from_x: 1.1,
            x0_from_e: -0.5,
            clip: None,
            next_from_x: 0.0,
            next_from_e: 0.4,
            next_from_x0: 0.9,
            next_from_noise: 0.0,
            x0_from_next: false,
        };
        let steps = StepTable::new(device, vec![StepRow { input_scale: 1.0, coefficients }])?;
        let state = RefCell::new(SampleState::new(x)?);
        Ok(Box::new(move || {
            let mut state = state.borrow_mut();
            ops::sampler_step(&mut state, &output, Some(7.0), &steps, None)?;
            Ok(state.x0().clone())
        }))
    };
    Case { name: format!("sampler_step guided [{n},{h},{w},{c}]"), prepare: Box::new(prepare) }
}
