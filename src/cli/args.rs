//! The flags. What one value may be is said in [`values`](super::values); what does not go together, here.

use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use megafuse::pipeline::{Method, ModelSource, RelayClamp, Request, RngKind, Sampler, Size, Upsampler};
use megafuse::{DType, Device, Error, Result};

use super::values::{self, DeviceChoice, Stages};

#[derive(Parser)]
#[command(name = "megafuse", version, about, after_long_help = EXAMPLES, max_term_width = 100)]
#[command(propagate_version = true, subcommand_required = true, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
Examples:
  megafuse generate \"two large red balls on the left\"
  megafuse generate \"a lighthouse at dusk\" --model ~/models/stable-diffusion-v1-5 --size 1024x1024
  megafuse plan \"a lighthouse\" --model ~/models/stable-diffusion-v1-5 --size 1024x1024
  megafuse doctor

Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.";

#[derive(Subcommand)]
pub enum Command {
    /// Make pictures from a prompt
    Generate(Box<GenerateArgs>),
    /// Say what generate would cost, from the configuration files alone
    Plan(Box<PlanArgs>),
    /// Run one module of a model on tensors of a safetensors file
    Probe(ProbeArgs),
    /// Resize a picture with an upsampler of the relay
    Resize(ResizeArgs),
    /// Compare every kernel on this machine's card with the cpu
    Check(CheckArgs),
    /// Time every kernel at the models' shapes, beside what the device can do at most
    Bench(BenchArgs),
    /// Say what this program and machine can do, and what is missing
    Doctor,
}

#[derive(Args)]
#[command(after_long_help = GENERATE_EXAMPLES)]
pub struct GenerateArgs {
    #[command(flatten)]
    pub run: RunArgs,

    /// The PNG file to write
    ///
    /// Without it: megafuse-SEED.png in the current directory, or megafuse-SEED-2.png and so on where that exists.
    /// A file named here is replaced, and only once the new picture is complete. A directory gets the default name.
    /// With --count N the names get -1 to -N before the ending.
    #[arg(long, value_name = "PATH", help_heading = "Output")]
    pub out: Option<PathBuf>,

    /// Write the run's intermediate tensors to a safetensors file
    ///
    /// f32, NCHW: noise<j> (the j-th draw, from 0), timesteps, alpha_bar, step<n> (latents after the n-th update, from
    /// 1), relay<k>.{x0,decoded,upsampled,encoded,noised} (the k-th relay, from 1), latent, image. Replaced when it
    /// exists; with --count N the names get -1 to -N before the ending.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub dump: Option<PathBuf>,
}

const GENERATE_EXAMPLES: &str = "\
Examples:
  # the model inside the program, nothing to download
  megafuse generate \"two large red balls on the left\"

  # Stable Diffusion 1.5 from a directory: 512x512, relayed to 768x768, then to 1024x1024
  megafuse generate \"a lighthouse at dusk\" --model ~/models/stable-diffusion-v1-5 --size 1024x1024

  # the stages by hand, 4 pictures with seeds 7 to 10 in out-1.png to out-4.png
  megafuse generate \"a lighthouse at dusk\" --model ~/models/stable-diffusion-v1-5 \\
      --stages 512x512:40,768x768:5,1024x1024:5 --seed 7 --count 4 --out out.png

  # no relay: every step at the final size
  megafuse generate \"a green cube\" --method plain --size 64x64

The names of the files written go to standard output, everything else to standard error.";

/// `plan` takes the flags of `generate`; --out and --dump are accepted and write nothing.
#[derive(Args)]
#[command(after_long_help = PLAN_EXAMPLES)]
pub struct PlanArgs {
    #[command(flatten)]
    pub run: RunArgs,

    /// Print JSON instead of tables
    #[arg(long)]
    pub json: bool,

    #[arg(long, hide = true)]
    pub out: Option<PathBuf>,

    #[arg(long, hide = true)]
    pub dump: Option<PathBuf>,
}

const PLAN_EXAMPLES: &str = "\
Examples:
  megafuse plan \"a lighthouse\" --model ~/models/stable-diffusion-v1-5 --size 1024x1024
  megafuse plan \"a lighthouse\" --model ~/models/stable-diffusion-v1-5 --method plain --size 1024x1024 --json

Only the config.json files are read: the weights need not be there.
1 MAC is one multiplication and one addition, 2 FLOPs; peak memory counts weights and live activations.";

/// What decides a picture: the same for `generate` and `plan`.
#[derive(Args)]
pub struct RunArgs {
    /// What the picture shows
    pub prompt: String,

    /// Model directory in the layout of diffusers (default: the small model inside the program)
    ///
    /// The directory holds tokenizer/, text_encoder/, unet/, vae/ and scheduler/, with safetensors weights.
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,

    /// What guidance steers away from (default: the empty prompt)
    #[arg(long, value_name = "PROMPT")]
    pub negative: Option<String>,

    /// How the picture gets its size
    ///
    /// plain: every step at the final size. megafusion: the first steps at the model's own size, then relays to larger
    /// ones (arXiv:2408.11001). megafusion++: with noise re-scheduling and dilated convolutions in the later stages.
    /// Default: megafusion++; for the small model inside the program, which they bend out of shape, megafusion with one
    /// relay and the last fiftieth of the steps after it.
    #[arg(long, value_parser = named::<Method, 3>(Method::ALL.map(Method::name)))]
    pub method: Option<Method>,

    /// Size of the final picture, width x height in pixels
    #[arg(long, value_name = "WxH", value_parser = values::library::<Size>)]
    pub size: Option<Size>,

    /// Seed of the first picture; picture i of --count uses seed + i
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,

    /// How many pictures
    #[arg(long, value_name = "N", value_parser = values::count, default_value = "1")]
    pub count: usize,

    /// Steps over all stages (default: the sum of --stages, else 50)
    #[arg(long, value_name = "N", value_parser = values::steps)]
    pub steps: Option<usize>,

    /// Classifier-free guidance scale; up to 1 there is no guidance (default: 7; 3 for the model inside the program)
    #[arg(long, value_name = "X", value_parser = values::guidance)]
    pub guidance: Option<f32>,

    /// Sampler (default: that of the model's scheduler class; ddim for a class without one here, such as PNDM)
    #[arg(long, value_parser = named::<Sampler, 4>(Sampler::ALL.map(Sampler::name)), value_name = "S")]
    pub scheduler: Option<Sampler>,

    /// DDIM's share of fresh noise per step, 0 to 1
    #[arg(long, value_name = "X", value_parser = values::eta, default_value = "0")]
    pub eta: f64,

    /// Sizes and steps of the stages, smallest first (default: planned from --size)
    #[arg(long, value_name = "WxH:STEPS,...", value_parser = values::stages, help_heading = "MegaFusion")]
    pub stages: Option<Stages>,

    /// How a relay enlarges its picture (default: bicubic)
    ///
    /// bilinear, bicubic: as PIL; bicubic-torch: as torch without antialias; bicubic-gaussian: then a 5x5 Gaussian;
    /// bicubic-edge: then a 3x3 edge enhancement.
    #[arg(long, value_name = "U", value_parser = upsampler_parser(),
          help_heading = "MegaFusion")]
    pub upsampler: Option<Upsampler>,

    /// Where a relay clamps its picture to the valid range (default: both)
    ///
    /// none; decode: after the decoder; both: after the decoder and after the upsampler.
    #[arg(long, value_name = "C", value_parser = named::<RelayClamp, 3>(RelayClamp::ALL.map(RelayClamp::name)),
          help_heading = "MegaFusion")]
    pub relay_clamp: Option<RelayClamp>,

    /// Noise re-scheduling in stages 2 and later (default: true for megafusion++)
    #[arg(long, value_name = "BOOL", help_heading = "MegaFusion")]
    pub reschedule: Option<bool>,

    /// Dilation of the UNet's middle block in stages 2 and later (default: 2 for megafusion++, else 1)
    #[arg(long, value_name = "N", value_parser = values::dilation, help_heading = "MegaFusion")]
    pub dilation: Option<usize>,

    /// How many steps less noisy a relay's noise is than the step that follows it (default: 0)
    #[arg(long, value_name = "N", help_heading = "MegaFusion")]
    pub relay_noise_offset: Option<usize>,

    /// Do as the published code of MegaFusion does where it differs from the paper
    ///
    /// x0 from the updated latents, relay pictures through 8-bit RGB (without --relay-clamp), a posterior sample, the
    /// dilation in every stage, the first schedule re-scheduled too; with ddim only.
    #[arg(long, help_heading = "MegaFusion")]
    pub reference_compat: bool,

    /// Which generator draws the noise
    ///
    /// torch-cpu: the noise of torch.randn on a seeded CPU generator, bit for bit; torch-cuda: on a CUDA generator
    /// (Philox), to rounding.
    #[arg(long, value_parser = named::<RngKind, 2>(["torch-cpu", "torch-cuda"]), value_name = "R",
          default_value = "torch-cpu", help_heading = "Machine")]
    pub rng: RngKind,

    /// Element type of weights and activations [default: f32, bf16 on a card]
    ///
    /// Statistics and sums are f32 always.
    #[arg(long, value_parser = named::<DType, 3>(["f32", "f16", "bf16"]), value_name = "T", help_heading = "Machine")]
    pub dtype: Option<DType>,

    /// Where to run: auto, cpu, cuda, cuda:N or emu; auto takes the best that is there
    #[arg(long, value_name = "D", value_parser = DeviceChoice::parse, default_value = "auto",
          help_heading = "Machine")]
    pub device: DeviceChoice,
}

impl RunArgs {
    /// `--dtype`, or what suits the device.
    pub fn dtype_on(&self, device: &Device) -> DType {
        let usual = if matches!(device, Device::Cuda(_)) { DType::BF16 } else { DType::F32 };
        self.dtype.unwrap_or(usual)
    }

    pub fn source(&self) -> ModelSource {
        values::source(self.model.as_deref())
    }

    /// # Errors
    /// [`Error::Request`] naming the flag, when two flags contradict each other or one would have no effect.
    pub fn request(&self) -> Result<Request> {
        self.check_seeds()?;
        self.check_effect()?;
        Ok(Request {
            prompt: self.prompt.clone(),
            negative_prompt: self.negative.clone().unwrap_or_default(),
            method: self.method(),
            size: self.size,
            stages: self.stages.as_ref().map(|stages| stages.0.clone()).unwrap_or_default(),
            upsampler: self.upsampler.unwrap_or_default(),
            relay_clamp: self.relay_clamp.unwrap_or_default(),
            reschedule: self.reschedule,
            dilation: self.dilation,
            relay_noise_offset: self.relay_noise_offset.unwrap_or(0),
            reference_compat: self.reference_compat,
            scheduler: self.scheduler,
            eta: self.eta,
            steps: self.steps,
            guidance: self.guidance.unwrap_or(if self.model.is_none() { 3.0 } else { 7.0 }),
            seed: self.seed,
            count: self.count,
            rng: self.rng,
        })
    }

    pub fn method(&self) -> Method {
        let usual = if self.model.is_none() { Method::MegaFusion } else { Method::MegaFusionPlus };
        self.method.unwrap_or(usual)
    }

    fn check_seeds(&self) -> Result<()> {
        match self.seed.checked_add(self.count as u64 - 1) {
            Some(_) => Ok(()),
            None => {
                let reason = format!("with --count {} the last seed would exceed 2^64 - 1", self.count);
                Err(conflict("--seed", self.seed, reason))
            }
        }
    }

    /// A flag that would change nothing is a misunderstanding; better said before an hour of computing than after.
    fn check_effect(&self) -> Result<()> {
        if self.eta > 0.0 && self.scheduler.is_some_and(|sampler| sampler != Sampler::Ddim) {
            return Err(conflict("--eta", self.eta, "only --scheduler ddim has an eta"));
        }
        if self.method() != Method::Plain {
            return Ok(());
        }
        let relay_only = |flag, value: String| {
            Err(conflict(flag, value, "has no effect with --method plain, which has no relay; choose megafusion"))
        };
        match self {
            RunArgs { stages: Some(stages), .. } if stages.0.len() > 1 => {
                let reason = "--method plain has one stage; choose megafusion or megafusion++";
                Err(conflict("--stages", stages, reason))
            }
            RunArgs { upsampler: Some(upsampler), .. } => relay_only("--upsampler", upsampler_name(*upsampler).into()),
            RunArgs { relay_clamp: Some(clamp), .. } => relay_only("--relay-clamp", clamp.to_string()),
            RunArgs { reschedule: Some(true), .. } => relay_only("--reschedule", "true".into()),
            RunArgs { dilation: Some(dilation @ 2..), .. } => relay_only("--dilation", dilation.to_string()),
            RunArgs { relay_noise_offset: Some(offset @ 1..), .. } => {
                relay_only("--relay-noise-offset", offset.to_string())
            }
            _ => Ok(()),
        }
    }
}

fn conflict(flag: &'static str, value: impl ToString, reason: impl Into<String>) -> Error {
    Error::Request { flag, value: value.to_string(), reason: reason.into() }
}

#[derive(Args)]
#[command(after_long_help = PROBE_EXAMPLES)]
pub struct ProbeArgs {
    /// Model directory in the layout of diffusers (default: the small model inside the program)
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,

    /// Which module to run
    #[arg(long, value_enum, value_name = "M")]
    pub module: Module,

    /// Dilation of the UNet's middle block (module unet)
    #[arg(long, value_name = "N", value_parser = values::dilation)]
    pub dilation: Option<usize>,

    /// The prompt (module text)
    #[arg(long, value_name = "S")]
    pub prompt: Option<String>,

    /// Input tensors (every module but text)
    #[arg(long = "in", value_name = "FILE")]
    pub input: Option<PathBuf>,

    /// Where the output tensors go; replaced when it exists
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,

    /// Element type of weights and activations
    #[arg(long, value_parser = named::<DType, 3>(["f32", "f16", "bf16"]), value_name = "T", default_value = "f32")]
    pub dtype: DType,

    /// Where to run: auto, cpu, cuda, cuda:N or emu
    #[arg(long, value_name = "D", value_parser = DeviceChoice::parse, default_value = "auto")]
    pub device: DeviceChoice,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Module {
    /// --prompt -> input_ids, last_hidden_state, penultimate, pooled, prompt_embeds
    Text,
    /// sample [N,C,H,W], timestep [1], prompt_embeds [N,L,D] -> out [N,C,H,W]
    Unet,
    /// image [N,3,H,W] in [-1,1] -> mean, logvar [N,c,h,w] (not scaled; logvar clamped to [-30,20])
    VaeEncode,
    /// latent [N,c,h,w] (not scaled) -> decoded [N,3,H,W]
    VaeDecode,
}

const PROBE_EXAMPLES: &str = "\
Examples:
  megafuse probe --module text --prompt \"a red ball\" --out text.safetensors
  megafuse probe --model ~/models/stable-diffusion-v1-5 --module unet --in step.safetensors --out eps.safetensors
  megafuse probe --module vae-decode --in latent.safetensors --out picture.safetensors

Inputs are f32, f16, bf16 or f64 (timestep also i32 or i64); outputs are f32, input_ids i64.";

#[derive(Args)]
#[command(after_long_help = RESIZE_EXAMPLES)]
pub struct ResizeArgs {
    /// A PNG or JPEG file
    #[arg(value_name = "IN")]
    pub input: PathBuf,

    /// The PNG file to write; replaced when it exists
    #[arg(value_name = "OUT")]
    pub output: PathBuf,

    /// Size of the result, width x height in pixels
    #[arg(long, value_name = "WxH", value_parser = values::library::<Size>)]
    pub size: Size,

    /// Which upsampler
    #[arg(long, value_name = "U", value_parser = upsampler_parser(),
          default_value = "bicubic")]
    pub upsampler: Upsampler,
}

const RESIZE_EXAMPLES: &str = "\
Examples:
  megafuse resize photo.jpg large.png --size 1024x768
  megafuse resize photo.png large.png --size 1024x768 --upsampler bicubic-edge";

#[derive(Args)]
#[command(after_long_help = CHECK_EXAMPLES)]
pub struct CheckArgs {
    /// Which card: auto (the first one), cuda, cuda:N or emu
    #[arg(long, value_name = "D", value_parser = DeviceChoice::parse, default_value = "auto")]
    pub device: DeviceChoice,

    /// Only cases with this in their op and name
    #[arg(long, value_name = "S", default_value = "")]
    pub filter: String,

    /// Which element types
    #[arg(long = "dtype", value_enum, value_name = "T", default_value = "all")]
    pub dtypes: DTypes,

    /// Print a JSON object a line instead of a table
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DTypes {
    All,
    F32,
    F16,
    Bf16,
}

impl DTypes {
    pub fn list(self) -> &'static [DType] {
        match self {
            DTypes::All => &DType::FLOATS,
            DTypes::F32 => &[DType::F32],
            DTypes::F16 => &[DType::F16],
            DTypes::Bf16 => &[DType::BF16],
        }
    }
}

const CHECK_EXAMPLES: &str = "\
Examples:
  megafuse check
  megafuse check --filter attention --dtype bf16
  megafuse check --device emu

Each result of the card is compared, element by element, with what the cpu computes in f32 from
the same inputs. Allowed are the rounding to the element type and a few f32 ulps of the terms. Exit
status 1 when an op is wrong.";

#[derive(Args)]
#[command(after_long_help = BENCH_EXAMPLES)]
pub struct BenchArgs {
    /// Where to run: auto, cpu, cuda, cuda:N or emu
    #[arg(long, value_name = "D", value_parser = DeviceChoice::parse, default_value = "auto")]
    pub device: DeviceChoice,

    /// Only cases with this in their op and name
    #[arg(long, value_name = "S", default_value = "")]
    pub filter: String,

    /// Element type of weights and activations
    #[arg(long, value_parser = named::<DType, 3>(["f32", "f16", "bf16"]), value_name = "T", default_value = "bf16")]
    pub dtype: DType,

    /// Print a JSON object a line instead of a table
    #[arg(long)]
    pub json: bool,

    /// Time spent on each case and each peak
    #[arg(long, value_name = "S", value_parser = values::seconds, default_value = "0.3")]
    pub seconds: f64,

    /// Whose shapes, separated by commas
    #[arg(long, value_enum, value_name = "MODEL,...", value_delimiter = ',', default_value = "sd15,vae,relay")]
    pub shapes: Vec<Shapes>,
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
    /// A relay from 512x512 to 1024x1024, and the sampler's steps
    Relay,
}

const BENCH_EXAMPLES: &str = "\
Examples:
  megafuse bench
  megafuse bench --shapes sd15,sd15-1024 --filter attention
  megafuse bench --dtype f16 --shapes vae-1024 --json > bench.jsonl
  megafuse bench --device cpu --dtype f32 --filter linear

The peaks are measured first, on the same device: bare multiply-adds on registers (for f16 and bf16
on a card: mma.sync on the tensor cores) and a copy of memory. floor: the larger of flops and bytes
over these; share: floor over time. On a card the second-level cache is emptied before each
repetition; on the cpu nothing is, so what fits its caches may have a share above 100%. The
emulated card runs a few small cases once: its times say nothing about a card and are not printed.";

/// One of these names, listed in the help, parsed by the library.
fn named<T, const N: usize>(names: [&'static str; N]) -> impl TypedValueParser<Value = T>
where
    T: std::str::FromStr<Err = Error> + Clone + Send + Sync + 'static,
{
    PossibleValuesParser::new(names).try_map(|name| values::library::<T>(&name))
}

const UPSAMPLERS: [(&str, Upsampler); 5] = [
    ("bilinear", Upsampler::Bilinear),
    ("bicubic", Upsampler::Bicubic),
    ("bicubic-torch", Upsampler::BicubicTorch),
    ("bicubic-gaussian", Upsampler::BicubicGaussian),
    ("bicubic-edge", Upsampler::BicubicEdge),
];

fn upsampler_parser() -> impl TypedValueParser<Value = Upsampler> {
    PossibleValuesParser::new(UPSAMPLERS.map(|(name, _)| name)).map(|wanted| {
        let known = UPSAMPLERS.iter().find(|(name, _)| *name == wanted);
        known.expect("one of the possible values").1
    })
}

fn upsampler_name(upsampler: Upsampler) -> &'static str {
    UPSAMPLERS.iter().find(|(_, known)| *known == upsampler).map_or("?", |(name, _)| name)
}
