//! The commands and the flags of those that make no pictures. The others' are in [`picture_args`](super::picture_args);
//! what one value may be is said in [`values`](super::values).

use std::path::PathBuf;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use megafuse::pipeline::{Lora, Size, Upsampler};
use megafuse::{DType, Error};

use super::bench::BenchArgs;
use super::enlarge::EnlargeArgs;
use super::hub::HubArgs;
use super::picture_args::{AddedFiles, GenerateArgs, GridArgs, PlanArgs};
use super::serve::ServeArgs;
use super::values::{self, DeviceChoice};

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
  megafuse grid \"a green cube\" \"a blue cone\" --seeds 0..2
  megafuse plan \"a lighthouse\" --model ~/models/stable-diffusion-v1-5 --size 1024x1024
  megafuse enlarge photo.jpg --scale 2
  megafuse doctor

Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.";

#[derive(Subcommand)]
pub enum Command {
    /// Make pictures from a prompt
    Generate(Box<GenerateArgs>),
    /// Make one labelled picture of methods, seeds and prompts side by side
    Grid(Box<GridArgs>),
    /// Make a picture larger, with new detail
    Enlarge(Box<EnlargeArgs>),
    /// Make pictures for others, over HTTP
    Serve(Box<ServeArgs>),
    /// Say what generate would cost, from the configuration files alone
    Plan(Box<PlanArgs>),
    /// Run one module of a model on tensors of a safetensors file
    Probe(ProbeArgs),
    /// Enlarge pictures with a super-resolution network
    Upscale(UpscaleCommand),
    /// Resize a picture with an upsampler of the relay
    Resize(ResizeArgs),
    /// Write a model with its large linear layers in 8 bits and LoRAs merged
    Quantize(QuantizeArgs),
    /// Compare every kernel on this machine's card with the cpu
    Check(CheckArgs),
    /// Time the kernels at the models' shapes, beside what the device can do at most
    Bench(Box<BenchArgs>),
    /// Say what this program and machine can do, and what is missing
    Doctor,
}

#[derive(Args)]
#[command(after_long_help = QUANTIZE_EXAMPLES)]
pub struct QuantizeArgs {
    /// Model directory, single file or ORG/NAME of the Hugging Face hub
    #[arg(long, value_name = "MODEL", value_parser = values::path())]
    pub model: PathBuf,

    #[command(flatten)]
    pub hub: HubArgs,

    /// A LoRA to merge into the weights, where wanted with its weight: FILE:0.8 (default weight: 1)
    #[arg(long, value_name = "FILE[:WEIGHT]", value_parser = values::library::<Lora>)]
    pub lora: Vec<Lora>,

    /// The new model: a directory, or a name in .safetensors where the model is a single file; it must not exist
    #[arg(long, value_name = "PATH", value_parser = values::path())]
    pub out: PathBuf,
}

const QUANTIZE_EXAMPLES: &str = "\
Examples:
  megafuse quantize --model stable-diffusion-xl-base-1.0 --out sdxl-fp8
  megafuse quantize --model my-tune.safetensors --lora style.safetensors:0.7 --out my-tune-fp8.safetensors
  megafuse generate --model sdxl-fp8 --weights fp8 \"two red balls\"

The new model takes less room on disk. Without --weights fp8 it runs in the usual dtype, with the rounded values.";

#[derive(Args)]
#[command(after_long_help = PROBE_EXAMPLES)]
pub struct ProbeArgs {
    /// Model directory, single file or ORG/NAME of the Hugging Face hub (default: the small model inside the program)
    #[arg(long, value_name = "MODEL", value_parser = values::path())]
    pub model: Option<PathBuf>,

    #[command(flatten)]
    pub hub: HubArgs,

    #[command(flatten)]
    pub added: AddedFiles,

    /// Which module to run
    #[arg(long, value_enum, value_name = "M")]
    pub module: Module,

    /// Dilation of the UNet's middle block (module unet)
    #[arg(long, value_name = "N", value_parser = values::dilation)]
    pub dilation: Option<usize>,

    /// A ControlNet beside the UNet, as generate --control (module unet)
    #[arg(long, value_name = "CONTROLNET", value_parser = values::path())]
    pub control: Option<PathBuf>,

    /// What the ControlNet adds is multiplied by this (default: 1)
    #[arg(long, value_name = "X", value_parser = values::control_scale, requires = "control", allow_negative_numbers = true)]
    pub control_scale: Option<f32>,

    /// The prompt (module text)
    #[arg(long, value_name = "S")]
    pub prompt: Option<String>,

    /// Input tensors (every module but text)
    #[arg(long = "in", value_name = "FILE", value_parser = values::path())]
    pub input: Option<PathBuf>,

    /// Where the output tensors go; replaced when it exists
    #[arg(long, value_name = "FILE", value_parser = values::path())]
    pub out: PathBuf,

    /// Element type of weights and activations
    #[arg(long, value_parser = named::<DType>(["f32", "f16", "bf16"]), value_name = "T", default_value = "f32")]
    pub dtype: DType,

    /// Where to run: auto, cpu, cuda, cuda:N or emu
    #[arg(long, value_name = "D", value_parser = DeviceChoice::parse, default_value = "auto")]
    pub device: DeviceChoice,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Module {
    /// --prompt -> input_ids, last_hidden_state, penultimate, pooled, prompt_embeds; of SDXL and SD3 clip1.*, clip2.*,
    /// t5.* (SD3, DeepFloyd IF), prompt_embeds, pooled_prompt_embeds
    Text,
    /// sample [N,C,H,W], timestep [1], prompt_embeds [N,L,D] (SDXL: pooled_prompt_embeds [N,P], time_ids [N,6];
    /// DeepFloyd IF-II: class_labels [1], the noise level) -> out [N,C,H,W]; with --control also control [N,3,H,W] in
    /// [0,1] -> control.down<i>, control.mid, which out has in it
    Unet,
    /// sample [N,C,H,W], timestep [1], prompt_embeds [N,L,D], pooled_prompt_embeds [N,P] (SD3) -> out [N,C,H,W]
    Transformer,
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
#[command(after_long_help = UPSCALE_EXAMPLES)]
pub struct UpscaleCommand {
    /// PNG, JPEG or WebP files
    #[arg(value_name = "PICTURE", required = true, value_parser = values::path())]
    pub pictures: Vec<PathBuf>,

    /// The network: ESRGAN, Real-ESRGAN or BSRGAN (RRDBNet), a safetensors or .pth file
    ///
    /// How many times the edges become longer, 1, 2, 4 or 8, is the network's. A .pth file is read as data: nothing in it is
    /// run.
    #[arg(long, value_name = "FILE", value_parser = values::path())]
    pub model: PathBuf,

    /// The PNG file to write, or a folder
    ///
    /// Without it: NAME-x4.png (for a network that enlarges four times) in the current directory, or NAME-x4-2.png and so on
    /// where that exists. A file named here is replaced. In a folder, which it must be for several pictures, the default names.
    #[arg(short, long, value_name = "PATH", value_parser = values::path())]
    pub out: Option<PathBuf>,

    /// Go through the picture in stripes of N of its rows; 0: at once (default: what fits)
    ///
    /// The result is the same. Small stripes take less memory and far more time.
    #[arg(long, value_name = "N")]
    pub tile: Option<usize>,

    /// Element type of weights and activations [default: f32, f16 on a card]
    #[arg(long, value_parser = named::<DType>(["f32", "f16", "bf16"]), value_name = "T")]
    pub dtype: Option<DType>,

    /// Where to run: auto, cpu, cuda, cuda:N or emu; auto takes the best that is there
    #[arg(long, value_name = "D", value_parser = DeviceChoice::parse, default_value = "auto")]
    pub device: DeviceChoice,
}

const UPSCALE_EXAMPLES: &str = "\
Examples:
  megafuse upscale photo.jpg --model RealESRGAN_x4plus.pth
  megafuse upscale *.png --model BSRGAN.pth --out enlarged/

A picture of this program keeps what it says of itself: generate --from makes it again, enlarged.";

#[derive(Args)]
#[command(after_long_help = RESIZE_EXAMPLES)]
pub struct ResizeArgs {
    /// A PNG, JPEG or WebP file
    #[arg(value_name = "IN", value_parser = values::path())]
    pub input: PathBuf,

    /// The PNG file to write; replaced when it exists
    #[arg(value_name = "OUT", value_parser = values::path())]
    pub output: PathBuf,

    /// Size of the result, width x height in pixels
    #[arg(long, value_name = "WxH", value_parser = values::library::<Size>)]
    pub size: Size,

    /// Which upsampler
    #[arg(long, value_name = "U", value_parser = named::<Upsampler>(Upsampler::NAMES.iter().copied()),
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

/// One of these names, listed in the help, parsed by the library.
pub fn named<T>(names: impl IntoIterator<Item = impl Into<PossibleValue>>) -> impl TypedValueParser<Value = T>
where
    T: std::str::FromStr<Err = Error> + Clone + Send + Sync + 'static,
{
    PossibleValuesParser::new(names).try_map(|name| values::library::<T>(&name))
}
