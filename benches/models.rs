//! One step of a denoiser (batch 2 with guidance: unconditional and conditional; batch 1 with --guidance 1), or a VAE, on
//! the cpu: `cargo bench --bench models -- DIR [--size 512] [--runs 3] [--threads N] [--dtype f32] [--guidance 7] [--vae]
//! [--profile]`.
//!
//! DIR: a model directory; tools/oracle/full_size.py writes a random one of SD 1.5's or SDXL's size, and
//! tools/oracle/bench_torch.py times the same step with the published library. Prints one JSON line: times, processor time (what the threads used, so
//! that a busy machine can be told from a slow program), peak resident memory. With --profile also the time of every op
//! and output shape, with the multiply-accumulates that the meta device counts for them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Parser;
use megafuse::models::{
    AddedConditioning, TextConditioning, Unet, UnetConfig, UnetOptions, Vae, VaeConfig, WeightStore,
};
use megafuse::ops::{StepIndex, profile};
use megafuse::runtime::{DType, Device, Tensor};
use megafuse::{Error, Result};

#[derive(Parser)]
struct Args {
    /// Model directory with `unet` and `vae`.
    dir: PathBuf,
    /// Pixels a side; the latents are an eighth of it.
    #[arg(long, default_value_t = 512)]
    size: usize,
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Default: one per core.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    #[arg(long, default_value = "f32")]
    dtype: DType,
    /// Above 1: a guided step, of batch 2.
    #[arg(long, default_value_t = 7.0)]
    guidance: f32,
    /// Time decoding one image instead of a denoiser step.
    #[arg(long)]
    vae: bool,
    /// Also the time of every op.
    #[arg(long)]
    profile: bool,
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
    let start = Instant::now();
    let model = Model::load(args, &Device::cpu())?;
    let load_s = start.elapsed().as_secs_f64();
    let loaded_peak = status_bytes("VmHWM:");
    model.forward()?; // untimed
    if args.profile {
        profile::start();
    }
    let mut times = Vec::new();
    let cpu = cpu_seconds();
    for _ in 0..args.runs {
        let start = Instant::now();
        model.forward()?;
        times.push(start.elapsed().as_secs_f64());
    }
    let cpu_s = (cpu_seconds() - cpu) / args.runs.max(1) as f64;
    let profiled = profile::stop();
    let mut sorted = times.clone();
    sorted.sort_by(f64::total_cmp);
    let line = serde_json::json!({
        "what": match (args.vae, args.guidance > 1.0) {
            (true, _) => "VAE decode, batch 1",
            (false, true) => "guided UNet step, batch 2",
            (false, false) => "UNet call, batch 1",
        },
        "size": args.size, "dtype": args.dtype.name(), "threads": rayon::current_num_threads(),
        "median_s": sorted.get(sorted.len() / 2), "times_s": times, "cpu_s": cpu_s, "load_s": load_s,
        "loaded_peak_rss_bytes": loaded_peak, "peak_rss_bytes": status_bytes("VmHWM:"),
    });
    println!("{line}");
    if args.profile {
        print_profile(&profiled, &counted(args)?, args.runs);
    }
    Ok(())
}

enum Model {
    Unet { unet: Box<Unet>, context: Tensor, pooled: Option<Tensor>, latents: Tensor },
    Vae { vae: Box<Vae>, latents: Tensor },
}

impl Model {
    /// On the meta device without weights, from the configuration alone.
    fn load(args: &Args, device: &Device) -> Result<Model> {
        let folder = args.dir.join(if args.vae { "vae" } else { "unet" });
        let path = folder.join("config.json");
        let json = fs::read_to_string(&path).map_err(|source| Error::io(&path, source))?;
        let what = path.display().to_string();
        let store = match device {
            Device::Meta(_) => WeightStore::meta(device, args.dtype),
            _ => WeightStore::open(&folder, "diffusion_pytorch_model", device, args.dtype)?,
        };
        if args.vae {
            let vae = Box::new(Vae::load(store, &VaeConfig::from_json(&what, &json)?)?);
            let side = args.size / vae.config().factor();
            let latents = random(device, &[1, side, side, vae.config().latent_channels], args.dtype, 0)?;
            return Ok(Model::Vae { vae, latents });
        }
        let unet = Box::new(Unet::load(store, &UnetConfig::from_json(&what, &json)?)?);
        let (batch, side) = (if args.guidance > 1.0 { 2 } else { 1 }, args.size / 8);
        let latents = random(device, &[batch, side, side, unet.config().in_channels], args.dtype, 1)?;
        let context = random(device, &[batch, 77, unet.config().cross_attention_dim], args.dtype, 2)?;
        let pooled = unet.config().added.map(|added| random(device, &[batch, added.pooled_dim], args.dtype, 3));
        Ok(Model::Unet { unet, context, pooled: pooled.transpose()?, latents })
    }

    /// As the published library does it, text and timestep are embedded anew in each step.
    fn forward(&self) -> Result<Tensor> {
        match self {
            Model::Vae { vae, latents } => vae.decode(latents),
            Model::Unet { unet, context, pooled, latents } => {
                let [_, h, w, _] = latents.dims("bench", "latents")?;
                let time_ids = [[8 * h, 8 * w, 0, 0, 8 * h, 8 * w].map(|side| side as f32)];
                let added = pooled.as_ref().map(|pooled| AddedConditioning { pooled, time_ids: &time_ids });
                let text = TextConditioning { text: context, added, guidance: None, noise_level: None };
                let conditioning = unet.condition(text, &[981.0])?;
                unet.forward(latents, &StepIndex::one(latents.device(), 0)?, &conditioning, &UnetOptions::default())
            }
        }
    }
}

/// Uniform values of unit variance.
fn random(device: &Device, shape: &[usize], dtype: DType, seed: u64) -> Result<Tensor> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 12f32.sqrt()
    };
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| next()).collect();
    Tensor::from_f32(device, shape, dtype, &values)
}

type Key = (&'static str, Vec<usize>);

/// Multiply-accumulates of one forward, by op and output shape.
fn counted(args: &Args) -> Result<BTreeMap<Key, u64>> {
    let device = Device::meta();
    let model = Model::load(args, &device)?;
    let Device::Meta(meta) = &device else { return Ok(BTreeMap::new()) };
    meta.take_report();
    model.forward()?;
    let mut macs = BTreeMap::new();
    for record in meta.take_report().ops {
        *macs.entry((record.op, record.output)).or_default() += record.work.macs;
    }
    Ok(macs)
}

fn print_profile(profiled: &BTreeMap<Key, profile::OpTime>, macs: &BTreeMap<Key, u64>, runs: usize) {
    let mut rows: Vec<_> = profiled.iter().collect();
    rows.sort_by_key(|(_, total)| std::cmp::Reverse(total.time));
    let all: f64 = rows.iter().map(|(_, total)| total.time.as_secs_f64()).sum::<f64>() / runs as f64;
    println!("{:12} {:22} {:>5} {:>9} {:>6} {:>8}", "op", "output", "calls", "ms/step", "share", "GFLOP/s");
    for (key, total) in rows {
        let seconds = total.time.as_secs_f64() / runs as f64;
        let gflops = 2.0 * macs.get(key).copied().unwrap_or(0) as f64 / seconds / 1e9;
        let (shape, calls) = (format!("{:?}", key.1), total.calls / runs as u64);
        println!(
            "{:12} {shape:22} {calls:>5} {:>9.1} {:>5.1}% {gflops:>8.1}",
            key.0,
            seconds * 1e3,
            100.0 * seconds / all
        );
    }
}

/// User and system time of this process so far, all threads. 0 where there is no /proc.
fn cpu_seconds() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or("").split(' ').collect();
    let ticks = |i: usize| fields.get(i).and_then(|f| f.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / 100.0 // USER_HZ is 100 on every Linux that matters here
}

/// A field of /proc/self/status, there in kB. 0 where there is none.
fn status_bytes(field: &str) -> u64 {
    let status = fs::read_to_string(Path::new("/proc/self/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
}
