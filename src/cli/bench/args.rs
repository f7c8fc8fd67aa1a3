//! The flags of `megafuse bench`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use megafuse::DType;
use megafuse::pipeline::{RandomShapes, Size};

use crate::cli::args::named;
use crate::cli::picture_args::CacheArgs;
use crate::cli::values::{self, DeviceChoice};

#[derive(Args)]
#[command(args_conflicts_with_subcommands = true, after_long_help = EXAMPLES)]
pub struct BenchArgs {
    #[command(subcommand)]
    pub what: Option<What>,

    /// Without a word of what: kernels
    #[command(flatten)]
    pub kernels: KernelArgs,
}

#[derive(Subcommand)]
pub enum What {
    /// Time every kernel at the models' shapes, beside what the device can do at most (the default)
    #[command(after_long_help = EXAMPLES)]
    Kernels(Box<KernelArgs>),
    /// Time the parts of a model: a guided step of its denoiser, and its VAE
    #[command(after_long_help = MODEL_EXAMPLES)]
    Models(ModelArgs),
    /// Time whole pictures, from the prompt to the pixels, at several batch sizes
    #[command(after_long_help = GENERATE_EXAMPLES)]
    Generate(RunArgs),
}

#[derive(Args)]
pub struct ModelArgs {
    /// Model directory with unet/ (or transformer/) and vae/; tools/oracle/full_size.py writes random ones of the published sizes
    #[arg(long, value_name = "DIR", value_parser = values::path(), required_unless_present = "random")]
    pub model: Option<PathBuf>,

    /// Instead of --model: random weights, made in memory, of the shapes of sd15, sd21, sdxl, sd3 or sd35 as they are
    /// published, or of the configurations in a directory
    #[arg(long, value_name = "MODEL", value_parser = values::random, conflicts_with = "model")]
    pub random: Option<RandomShapes>,

    /// Where to run: auto, cpu, cuda, cuda:N or emu
    #[arg(long, value_name = "D", value_parser = DeviceChoice::parse, default_value = "auto")]
    pub device: DeviceChoice,

    /// Element type of weights and activations
    #[arg(long, value_parser = named::<DType>(["f32", "f16", "bf16"]), value_name = "T", default_value = "bf16")]
    pub dtype: DType,

    /// Size of the pictures (default: the model's own)
    #[arg(long, value_name = "WxH", value_parser = values::library::<Size>)]
    pub size: Option<Size>,

    /// Pictures at once; a guided step has twice as many samples
    #[arg(long, value_name = "N", value_parser = values::count, default_value = "1")]
    pub batch: usize,

    /// Time spent on each part, at most
    #[arg(long, value_name = "S", value_parser = values::seconds, default_value = "3")]
    pub seconds: f64,

    /// Print a JSON object a line instead of a table
    #[arg(long)]
    pub json: bool,
}

const MODEL_EXAMPLES: &str = "\
Examples:
  megafuse bench models --random sdxl
  megafuse bench models --model ~/models/stable-diffusion-xl-base-1.0
  megafuse bench models --model /tmp/sd15 --size 1024x1024 --dtype f16 --json

On a card each part is timed as it runs in a picture, replayed from a graph, and launched by itself.
The text and the timestep are embedded before, as in a picture. share: of the peak that is measured
first, with the best instruction of the device.";

#[derive(Args)]
pub struct RunArgs {
    /// Model directory (default: the small model inside the program)
    #[arg(long, value_name = "DIR", value_parser = values::path())]
    pub model: Option<PathBuf>,

    /// Instead of --model: random weights, made in memory, of the shapes of sd15, sd21, sdxl, sd3 or sd35 as they are
    /// published, or of the configurations in a directory
    #[arg(long, value_name = "MODEL", value_parser = values::random, conflicts_with = "model")]
    pub random: Option<RandomShapes>,

    /// Where to run: auto, cpu, cuda, cuda:N or emu
    #[arg(long, value_name = "D", value_parser = DeviceChoice::parse, default_value = "auto")]
    pub device: DeviceChoice,

    /// Element type of weights and activations
    #[arg(long, value_parser = named::<DType>(["f32", "f16", "bf16"]), value_name = "T", default_value = "bf16")]
    pub dtype: DType,

    /// Size of the pictures (default: the model's own)
    #[arg(long, value_name = "WxH", value_parser = values::library::<Size>)]
    pub size: Option<Size>,

    /// Steps of the Euler sampler
    #[arg(long, value_name = "N", value_parser = values::steps, default_value = "20")]
    pub steps: usize,

    /// Classifier-free guidance scale
    #[arg(long, value_name = "X", value_parser = values::guidance, default_value = "8")]
    pub guidance: f32,

    #[command(flatten)]
    pub cache: CacheArgs,

    /// Pictures at once, one size after the other, separated by commas
    #[arg(long, value_name = "N,...", value_delimiter = ',', value_parser = values::count, default_value = "1")]
    pub batch: Vec<usize>,

    /// Runs of each batch size that count; one more goes first
    #[arg(long, value_name = "N", value_parser = values::count, default_value = "3")]
    pub runs: usize,

    /// Print a JSON object a line instead of a table
    #[arg(long)]
    pub json: bool,
}

const GENERATE_EXAMPLES: &str = "\
Examples:
  megafuse bench generate --random sdxl --batch 1,2,4,8,16,32
  megafuse bench generate --model ~/models/stable-diffusion-xl-base-1.0 --batch 8 --json
  megafuse bench generate --device cpu --dtype f32 --steps 4

In the form of MLPerf's text-to-image test: 20 Euler steps, guidance 8, from prompts to pixels in
memory, text encoders and VAE included; loading the weights and writing files is not. Random weights
(--random) of the same shapes take the same time, and their pictures are noise. The emulated card runs each batch size once and prints no times.";

#[derive(Args)]
pub struct KernelArgs {
    /// Where to run: auto, cpu, cuda, cuda:N or emu
    #[arg(long, value_name = "D", value_parser = DeviceChoice::parse, default_value = "auto")]
    pub device: DeviceChoice,

    /// Only cases with this in their op and name
    #[arg(long, value_name = "S", default_value = "")]
    pub filter: String,

    /// Element type of weights and activations
    #[arg(long, value_parser = named::<DType>(["f32", "f16", "bf16"]), value_name = "T", default_value = "bf16")]
    pub dtype: DType,

    /// Print a JSON object a line instead of a table (docs/performance.md has the fields)
    #[arg(long)]
    pub json: bool,

    /// Time spent on each kernel and each peak, at most
    #[arg(long, value_name = "S", value_parser = values::seconds, default_value = "0.3")]
    pub seconds: f64,

    /// On a card: time each kernel that an op has to choose from, beside its own choice and in turns with it
    #[arg(long)]
    pub variants: bool,

    /// Whose shapes, separated by commas
    #[arg(long, value_enum, value_name = "MODEL,...", value_delimiter = ',', default_value = "sd15,vae,relay")]
    pub shapes: Vec<Shapes>,

    /// Instead of --shapes: those of a real run, which generate --record-shapes wrote, and what they come to together
    #[arg(long, value_name = "FILE", value_parser = values::path(), conflicts_with = "shapes")]
    pub workload: Option<PathBuf>,

    /// Your own kernel, a CUDA file, against the contract of one of our ops (docs/kernels.md has them)
    ///
    /// Compiled, compared with the cpu at odd sizes, raced on the emulated card, and on a card timed in turns with ours, a
    /// linear also with cuBLASLt's, which MEGAFUSE_CUBLASLT names. Without a card the emulated one is taken. A comment of the
    /// file says what it is: // bench: op rms_norm, entry my_norm, grid rows, block 256
    #[arg(long, value_name = "FILE.cu", value_parser = values::path(),
          conflicts_with_all = ["filter", "variants", "shapes", "workload", "roofline", "compare"])]
    pub kernel: Option<PathBuf>,

    /// On a card: what ten counters of Nsight Compute say of each kernel, instead of times; ncu must be installed
    #[arg(long, conflicts_with_all = ["json", "seconds", "roofline", "compare", "kernel"])]
    pub ncu: bool,

    /// Every case once, nothing else: what ncu runs
    #[arg(long, hide = true)]
    pub once: bool,

    /// Time nothing: compare two results of --json, case by case
    #[arg(long, value_names = ["A.json", "B.json"], num_args = 2, value_parser = values::path(),
          conflicts_with_all = ["device", "dtype", "seconds", "variants", "shapes", "workload", "roofline"])]
    pub compare: Option<Vec<PathBuf>>,

    /// Also draw every case below the device's peaks, to this SVG file; replaced when it exists
    #[arg(long, value_name = "FILE", value_parser = values::path())]
    pub roofline: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shapes {
    /// UNet of Stable Diffusion 1.5, a guided step at 512x512
    Sd15,
    /// The same at 1024x1024
    #[value(name = "sd15-1024")]
    Sd15At1024,
    /// VAE decoder at 512x512
    Vae,
    /// The same at 1024x1024
    #[value(name = "vae-1024")]
    VaeAt1024,
    /// UNet of SDXL, a guided step at 1024x1024
    Sdxl,
    /// A block of SD 3's transformer, a guided step at 1024x1024
    Sd3,
    /// ResNets of the UNet of DeepFloyd IF-I-XL, a guided step at 64x64
    IfXl,
    /// A relay from 512x512 to 1024x1024, and the sampler's steps
    Relay,
    /// What methods do beside the network at 2048x2048: views, patches, frequency bands, moments
    Methods,
}

const EXAMPLES: &str = "\
Examples:
  megafuse bench
  megafuse bench kernels --shapes sd15,sd15-1024 --filter attention
  megafuse bench kernels --dtype f16 --shapes vae-1024 --json > bench.json
  megafuse bench kernels --shapes sdxl --filter linear --variants --roofline linear.svg
  megafuse bench kernels --shapes sdxl --filter attention --ncu
  megafuse bench kernels --compare before.json after.json
  megafuse generate \"a cat\" --model DIR --record-shapes cat.json; megafuse bench --workload cat.json
  megafuse bench kernels --kernel my_norm.cu --device emu
  megafuse bench kernels --device cpu --dtype f32 --filter linear

The peaks are measured first, on the same device, with the best instruction it has: bare products
of the tensor cores (wgmma or mma.sync; for f32 fused multiply-adds) and a copy of memory. floor: the
larger of flops and bytes over these; share: floor over time.

On a card each kernel has two times. rotated: calls without a gap, from a graph, on operands that
are together at least twice the second-level cache. cold: a call by itself, after that cache was
emptied by reading. Each is a median; +-: half its 95% confidence interval. error: root mean square
of the difference from the same call in f32, relative, on fresh inputs before and after; a result
that is wrong, and a time below the floor, is an error. Clock, power and energy come from NVML,
where it is there. On the cpu nothing is emptied, so what fits its caches may have a share above
100%. The emulated card runs a few small cases once: its times say nothing about a card and are not
printed.";
