//! The flags of the commands that make or plan pictures, and the requests that they become.

use std::path::{Path, PathBuf};

use clap::Args;
use clap::builder::PossibleValue;
use megafuse::models::WeightFormat;
use megafuse::pipeline::{
    CacheKind, Choices, InitImage, InputPicture, LoadOptions, LongPrompt, Lora, METHODS, MemoryOptions, MethodSpec,
    ModelSource, Request, ResAdapter, Residency, RngKind, Sampler, SigmaSpacing, Size, SizeIds, Stage, StepCache,
    Syntax, TextOptions, Tiling, UpscaleOptions, VaePartition, without_effect,
};
use megafuse::{DType, Device, Error, Result};

use super::args::named;
use super::control_args::ControlArgs;
use super::grid::{Axis, MethodAt};
use super::hub::HubArgs;
use super::ip_args::IpArgs;
use super::manifest::Shard;
use super::method_options::{MethodChoice, MethodOptions};
use super::pixel_args::{PixelArgs, second_model};
use super::values::{self, Batch, DeviceChoice, Seeds, Stages};

#[derive(Args)]
#[command(after_long_help = GENERATE_EXAMPLES)]
pub struct GenerateArgs {
    /// What the picture shows
    #[arg(required_unless_present_any = ["manifest", "from", "ip_image"], conflicts_with = "manifest")]
    pub prompt: Option<String>,

    /// Repeat a picture as its own text says; a prompt and flags beside it stand in place of what it says
    ///
    /// A PNG of this program carries everything: the same command makes the same bytes on the same device. Of one of
    /// stable-diffusion-webui or InvokeAI prompts, steps, sampler, guidance, seed, size and clip skip are read (of InvokeAI
    /// HiDiffusion's switches too), and a warning says what was not. A model that is neither inside the program nor on the hub, LoRAs, embeddings and a VAE are to be named.
    #[arg(long, value_name = "PICTURE.png", value_parser = values::path(), conflicts_with = "manifest")]
    pub from: Option<PathBuf>,

    #[command(flatten)]
    pub picture: PictureArgs,

    #[command(flatten)]
    pub run: RunArgs,

    /// The PNG file to write; with --manifest the folder
    ///
    /// Without it: megafuse-SEED.png in the current directory, or megafuse-SEED-2.png and so on where that exists.
    /// A file named here is replaced, and only once the new picture is complete. A directory gets the default name.
    /// With --count N the names get -1 to -N before the ending. A missing folder is made. - is standard output.
    #[arg(long, value_name = "PATH", value_parser = values::path(), help_heading = "Output")]
    pub out: Option<PathBuf>,

    /// Write the run's intermediate tensors to a safetensors file
    ///
    /// f32, NCHW: noise<j> (the j-th draw, from 0), timesteps, alpha_bar, step<n> (latents after the n-th update, from
    /// 1), relay<k>.{x0,decoded,upsampled,encoded,noised} (the k-th relay, from 1), init<k>.{picture,encoded,mask,masked,noised}
    /// (of --init-image, for stage k from 0), cond<k> (of --lowres, with its noise), latent, image; of a second stage of DeepFloyd IF
    /// second.*; and as i64 what the method chose (see --choices): shifts.
    /// Replaced when it exists; with --count N the names get -1 to -N before the ending.
    #[arg(long, value_name = "FILE", value_parser = values::path(), help_heading = "Output", conflicts_with = "manifest")]
    pub dump: Option<PathBuf>,

    /// What the method would draw besides noise, from a safetensors file: the --dump of another run will do
    ///
    /// Tensors that the method does not draw are passed over. The same for every picture of --count; without it each
    /// picture's follow from its seed.
    #[arg(long, value_name = "FILE", value_parser = values::path(), conflicts_with = "manifest")]
    pub choices: Option<PathBuf>,

    /// Write the run stage by stage to a labelled PNG: x0 at every relay, before and after the upsampler, and the picture
    ///
    /// Replaced when it exists; with --count N the names get -1 to -N before the ending.
    #[arg(long, value_name = "FILE", value_parser = values::path(), help_heading = "Output", conflicts_with = "manifest")]
    pub strip: Option<PathBuf>,

    /// Write the shapes of the run's ops and how often each is called, for bench kernels --workload
    ///
    /// JSON, of one batch in the fastest way, whatever memory there is; also before a picture is made that takes long.
    #[arg(long, value_name = "FILE", value_parser = values::path(), help_heading = "Output", conflicts_with = "manifest")]
    pub record_shapes: Option<PathBuf>,

    /// Print the time of every op of the run, and write a trace for chrome://tracing or ui.perfetto.dev
    ///
    /// On a card by its own clock, every launch by itself instead of from a graph; on the cpu by the host's. Not on the
    /// emulated card, whose times say nothing.
    #[arg(long, value_name = "FILE", value_parser = values::path(), help_heading = "Output", conflicts_with = "manifest")]
    pub profile: Option<PathBuf>,

    /// Make a picture for every line of this file, into the folder --out
    ///
    /// JSON lines: {"prompt": "..."}, and where wanted "id" (a string or number: the picture becomes ID.png; default: the
    /// line's number in six digits, 000001), "seed", "negative_prompt", "method", "size" ("WxH"), "stages"
    /// ("WxH:STEPS,...", also in place of --size and --steps), "steps", "guidance", "guidance_rescale", "control_image" (one file, or a list; beside the manifest), each in place of
    /// the flag. A line without a seed gets --seed plus the line's number less 1, or with an id --seed plus the id's FNV-1a
    /// hash of 32 bits; so its picture depends on the line and the flags alone. A picture that comes out not finite is noted in failed.jsonl and the others go on.
    #[arg(long, value_name = "FILE", value_parser = values::path(), requires = "out", help_heading = "Many pictures")]
    pub manifest: Option<PathBuf>,

    /// Make what is missing in the folder --out
    ///
    /// Refused where the folder's run.json names other flags, another model or another program; a picture that is there
    /// must be that of its line. Begins where the folder is empty.
    #[arg(long, requires = "manifest", help_heading = "Many pictures")]
    pub resume: bool,

    /// Make the i-th of n parts: lines i, i + n, i + 2n and so on
    ///
    /// Parts may share a folder, with --resume, and run at the same time.
    #[arg(long, value_name = "I/N", requires = "manifest", value_parser = Shard::parse, help_heading = "Many pictures")]
    pub shard: Option<Shard>,
}

const GENERATE_EXAMPLES: &str = "\
Examples:
  # the model inside the program, nothing to download
  megafuse generate \"two large red balls on the left\"

  # a model of the Hugging Face hub; what is not in its local cache is fetched
  megafuse generate \"a lighthouse at dusk\" --model stable-diffusion-v1-5/stable-diffusion-v1-5

  # Stable Diffusion 1.5 from a directory: 512x512, relayed to 768x768, then to 1024x1024
  megafuse generate \"a lighthouse at dusk\" --model ~/models/stable-diffusion-v1-5 --size 1024x1024

  # the stages by hand, 4 pictures with seeds 7 to 10 in out-1.png to out-4.png
  megafuse generate \"a lighthouse at dusk\" --model ~/models/stable-diffusion-v1-5 \\
      --stages 512x512:40,768x768:5,1024x1024:5 --seed 7 --count 4 --out out.png

  # no relay: every step at the final size
  megafuse generate \"a green cube\" --method plain --size 64x64

  # parts of other methods in single stages
  megafuse generate \"a green cube\" --stages 64x64:40,128x128:5+hidiffusion,256x256:5+crops

  # what happens at every relay
  megafuse generate \"a green cube\" --stages 64x64:45,256x256:5 --strip strip.png

  # from a photo: the last 60 % of the steps; a part of it made anew; large, by a relay
  megafuse generate \"a red cube\" --init-image photo.jpg --size 64x64 --method plain --strength 0.6
  megafuse generate \"a red cube\" --init-image photo.jpg --mask mask.png --size 64x64 --method plain
  megafuse generate \"a red cube\" --init-image photo.jpg --stages 64x64:30,128x128:20 --strength 0.7

  # a picture again, and the same with another seed
  megafuse generate --from megafuse-0.png
  megafuse generate --from megafuse-0.png --seed 5

  # ten thousand pictures; the same command again, after whatever stopped it, makes the missing ones
  megafuse generate --manifest prompts.jsonl --out pictures --resume
  # the same on two machines
  megafuse generate --manifest prompts.jsonl --out pictures --resume --shard 1/2
  megafuse generate --manifest prompts.jsonl --out pictures --resume --shard 2/2

The names of the files written go to standard output, everything else to standard error.";

/// `plan` takes the flags of `generate`; --out, --dump and --strip are accepted and write nothing.
#[derive(Args)]
#[command(after_long_help = PLAN_EXAMPLES)]
pub struct PlanArgs {
    /// What the picture shows
    #[arg(required_unless_present_any = ["from", "ip_image"])]
    pub prompt: Option<String>,

    /// As generate --from: what the picture says of itself is planned
    #[arg(long, value_name = "PICTURE.png", value_parser = values::path())]
    pub from: Option<PathBuf>,

    #[command(flatten)]
    pub picture: PictureArgs,

    #[command(flatten)]
    pub run: RunArgs,

    /// Print JSON instead of tables
    #[arg(long)]
    pub json: bool,

    /// Also predict how long it would take on a card: h200, h200-portable, h100, a100, 4090, or a file of bench kernels --json
    ///
    /// A prediction from counted work and measured kernels, not a measurement; docs/performance.md says how far off it is.
    #[arg(long, value_name = "CARD")]
    pub card: Option<String>,

    /// As generate --choices
    #[arg(long, value_name = "FILE", value_parser = values::path())]
    pub choices: Option<PathBuf>,

    #[arg(long, hide = true)]
    pub out: Option<PathBuf>,

    #[arg(long, hide = true)]
    pub dump: Option<PathBuf>,

    #[arg(long, hide = true)]
    pub strip: Option<PathBuf>,
}

const PLAN_EXAMPLES: &str = "\
Examples:
  megafuse plan \"a lighthouse\" --model ~/models/stable-diffusion-v1-5 --size 1024x1024
  megafuse plan \"a lighthouse\" --model ~/models/stable-diffusion-v1-5 --method plain --size 1024x1024 --json

Only the config.json files are read: the weights need not be there.
1 MAC is one multiplication and one addition, 2 FLOPs; peak memory counts weights and live activations.";

#[derive(Args)]
#[command(after_long_help = GRID_EXAMPLES)]
pub struct GridArgs {
    /// What the pictures show, one prompt or several
    #[arg(value_name = "PROMPT", required_unless_present = "manifest", conflicts_with = "manifest")]
    pub prompts: Vec<String>,

    /// Prompts from a file as generate --manifest reads it, each with its own seed unless --seeds is given
    #[arg(long, value_name = "FILE", value_parser = values::path())]
    pub manifest: Option<PathBuf>,

    /// Methods, separated by commas, each where wanted with a size of its own: plain@64x64
    ///
    /// plain makes every step at the final size of the others.
    #[arg(long, value_name = "M,...", value_delimiter = ',', value_parser = MethodAt::parse,
          default_value = "plain,megafusion,megafusion++")]
    pub methods: Vec<MethodAt>,

    /// Seeds: numbers and ranges, separated by commas; 0..3 is 0,1,2; random draws one (default: 0)
    #[arg(long, value_name = "N,A..B,...", value_parser = values::seeds)]
    pub seeds: Option<Seeds>,

    #[command(flatten)]
    pub run: RunArgs,

    /// What stands side by side: methods, seeds, prompts, or several separated by commas; the rest are rows
    #[arg(
        long,
        value_enum,
        value_name = "AXIS,...",
        value_delimiter = ',',
        default_value = "methods",
        help_heading = "Output"
    )]
    pub columns: Vec<Axis>,

    /// Largest side of a cell, in pixels (default: that of the largest picture, or a multiple of it from 128 on)
    ///
    /// A smaller picture is enlarged to it by repeating pixels, where that comes out even, else bicubically; a larger one
    /// is shrunk bicubically.
    #[arg(long, value_name = "PIXELS", value_parser = values::cell, help_heading = "Output")]
    pub cell: Option<usize>,

    /// The PNG file to write, replaced when it exists (default: megafuse-grid.png, megafuse-grid-2.png and so on)
    #[arg(long, value_name = "PATH", value_parser = values::path(), help_heading = "Output")]
    pub out: Option<PathBuf>,
}

const GRID_EXAMPLES: &str = "\
Examples:
  # direct sampling at 256x256 beside MegaFusion and MegaFusion++, the model inside the program
  megafuse grid \"two large red balls on the left\" \"a small green cube\" --size 256x256

  # three seeds side by side, a method a row, the trained size as a further method
  megafuse grid \"a blue cone\" --methods plain@64x64,plain,megafusion --seeds 0..3 --columns seeds

  # the first lines of a benchmark
  head -4 prompts.jsonl > few.jsonl
  megafuse grid --manifest few.jsonl --model ~/models/stable-diffusion-v1-5 --size 1024x1024 --cell 256

What all cells have in common stands above them; the PNG also carries every cell's parameters as JSON.";

/// A method, and the stages that are named for it.
pub type MethodRun<'a> = (&'static MethodSpec, &'a [Stage]);

/// The method and the seeds of one request.
#[derive(Args)]
pub struct PictureArgs {
    #[command(flatten)]
    pub method: MethodChoice,

    /// Seed of the first picture; picture i of --count uses seed + i; random (also -1) draws one
    #[arg(long, value_name = "N", value_parser = values::seed, default_value = "0")]
    pub seed: u64,

    /// How many pictures
    #[arg(long, value_name = "N", value_parser = values::count, default_value = "1")]
    pub count: usize,
}

/// What decides a picture beside its prompt, method and seed: the same for every command that makes or plans pictures.
#[derive(Args)]
pub struct RunArgs {
    /// Model directory, single file or ORG/NAME of the Hugging Face hub (default: the small model inside the program)
    ///
    /// The directory holds tokenizer/, text_encoder/, unet/ (or transformer/), vae/ and scheduler/, with safetensors or .bin weights; or it is a
    /// model's folder in a cache of the Hugging Face hub (models--ORG--NAME). The file is a whole checkpoint of Stable
    /// Diffusion 1.x, 2.x, XL, 3 or 3.5 in safetensors or .ckpt, of which nothing is run. What is no path is a name on the hub: ORG/NAME, ORG/NAME@REVISION, or
    /// ORG/NAME/FILE.safetensors where a repository holds single files. What its local cache does not have is fetched:
    /// of each part one safetensors form (else .bin), in f16 where the run's element type has 16 bits and there is one.
    #[arg(long, value_name = "MODEL", value_parser = values::path())]
    pub model: Option<PathBuf>,

    #[command(flatten)]
    pub hub: HubArgs,

    #[command(flatten)]
    pub added: AddedFiles,

    #[command(flatten)]
    pub start: StartArgs,

    #[command(flatten)]
    pub control: ControlArgs,

    #[command(flatten)]
    pub ip: IpArgs,

    /// What guidance steers away from (default: the empty prompt; on SDXL zeros, where the model says so)
    #[arg(long, value_name = "PROMPT")]
    pub negative: Option<String>,

    /// How prompts are read (default: plain)
    ///
    /// plain: as words. a1111: as stable-diffusion-webui reads them, (word:1.2), (word), [word], \\( and BREAK.
    #[arg(long, value_parser = named::<Syntax>(Syntax::NAMES.iter().copied()), value_name = "S", help_heading = "Prompt")]
    pub prompt_syntax: Option<Syntax>,

    /// What becomes of a prompt beyond the text encoder's 77 tokens (default: truncate)
    ///
    /// truncate: its end is not read, and a warning says so. chunk: it is read in chunks of 75 tokens.
    #[arg(long, value_parser = named::<LongPrompt>(LongPrompt::NAMES.iter().copied()), value_name = "L",
          help_heading = "Prompt")]
    pub long_prompt: Option<LongPrompt>,

    /// Which layer of the text encoder is read, counted from the last, which is 1 (default: the model's own)
    #[arg(long, value_name = "N", value_parser = values::clip_skip, help_heading = "Prompt")]
    pub clip_skip: Option<usize>,

    /// Tokens of a prompt that a T5 text encoder (SD 3, DeepFloyd IF) reads (default: 256; 77 with --reference-compat, and of
    /// DeepFloyd IF)
    #[arg(long, value_name = "N", value_parser = values::t5_length, help_heading = "Prompt")]
    pub t5_length: Option<usize>,

    /// Size of the final picture, width x height in pixels
    #[arg(long, value_name = "WxH", value_parser = values::library::<Size>)]
    pub size: Option<Size>,

    /// Steps over all stages (default: the sum of --stages, else 50)
    #[arg(long, value_name = "N", value_parser = values::steps)]
    pub steps: Option<usize>,

    /// Classifier-free guidance scale; up to 1 there is no guidance (default: 7; 2 for the model inside the program)
    ///
    /// A latent consistency model (LCM) is told the scale in place of guidance; its default is 8.5.
    #[arg(long, value_name = "X", value_parser = values::guidance)]
    pub guidance: Option<f32>,

    /// How far the guided output is rescaled to the contrast of the unguided one, 0 (not) to 1 (all the way)
    ///
    /// For models of v-prediction with zero terminal SNR, whose pictures guidance overexposes; 0.7 is the paper's
    /// (arXiv:2305.08891, sec. 3.4).
    #[arg(long, value_name = "X", value_parser = values::guidance_rescale, default_value = "0")]
    pub guidance_rescale: f32,

    /// Guidance scale of the details that a stage has over the one before (default for --method frecas: 35 or 45, 6 for the pocket model; others: none)
    ///
    /// Guidance is split by frequency: what fits the map of the stage before (in a first stage larger than the trained size: the
    /// trained one's) keeps --guidance, the rest has this scale. Stages up to the trained size are not split. FreCaS,
    /// arXiv:2410.18410.
    #[arg(long, value_name = "X", value_parser = values::guidance_high)]
    pub guidance_high: Option<f32>,

    /// Sampler (default: ddim; for --method plain that of the model's scheduler class)
    #[arg(long, value_parser = named::<Sampler>(sampler_names()), value_name = "S")]
    pub scheduler: Option<Sampler>,

    /// How the noise levels are spaced, for samplers with sigmas (default: as the model's configuration says)
    #[arg(long, value_parser = named::<SigmaSpacing>(["uniform", "karras", "exponential"]), value_name = "S")]
    pub sigmas: Option<SigmaSpacing>,

    /// DDIM's share of fresh noise per step, 0 to 1 (default: 1 for scalecrafter and fouriscale, 0 for the others)
    #[arg(long, value_name = "X", value_parser = values::eta)]
    pub eta: Option<f64>,

    /// Sizes and steps of the stages, smallest first (default: planned from --size)
    ///
    /// A stage of megafusion, megafusion++ and hires-fix may have parts of other methods, with their flags: 1024x1024:5+hidiffusion.
    /// +raunet, +windows, or both as +hidiffusion; +dilation (not of hires-fix): --dilation in such stages alone; +crops: the
    /// windows of multidiffusion; +demofusion: jittered windows and dilated samples. Thresholds count the stage's own steps.
    #[arg(long, value_name = "WxH:STEPS,...", value_parser = values::stages, help_heading = "MegaFusion")]
    pub stages: Option<Stages>,

    #[command(flatten)]
    pub options: MethodOptions,

    #[command(flatten)]
    pub cache: CacheArgs,

    /// What the model is told of the original picture's size (default: the stage's size)
    #[arg(long, value_name = "WxH", value_parser = values::library::<Size>, help_heading = "SDXL")]
    pub original_size: Option<Size>,

    /// What the model is told of the crop: pixels cut off at the left and at the top (default: 0,0)
    #[arg(long, value_name = "X,Y", value_parser = values::crop, help_heading = "SDXL")]
    pub crop: Option<(usize, usize)>,

    /// What the model is told of the target's size (default: the stage's size)
    #[arg(long, value_name = "WxH", value_parser = values::library::<Size>, help_heading = "SDXL")]
    pub target_size: Option<Size>,

    /// How many pictures are made at once, at most: a number, or auto
    ///
    /// A picture has the same bytes at every batch size. auto: one on the cpu; on a card as many as its memory holds, up
    /// to 8.
    #[arg(long, value_name = "N", value_parser = values::batch, default_value = "1", help_heading = "Machine")]
    pub batch: Batch,

    /// Which generator draws the noise
    ///
    /// torch-cpu: the noise of torch.randn on a seeded CPU generator, bit for bit; torch-cuda: on a CUDA generator
    /// (Philox), to rounding.
    #[arg(long, value_parser = named::<RngKind>(RngKind::NAMES.iter().copied()), value_name = "R",
          default_value = "torch-cpu", help_heading = "Machine")]
    pub rng: RngKind,

    /// Element type of weights and activations [default: f32, bf16 on a card]
    ///
    /// Statistics and sums are f32 always.
    #[arg(long, value_parser = named::<DType>(["f32", "f16", "bf16"]), value_name = "T", help_heading = "Machine")]
    pub dtype: Option<DType>,

    /// How the denoiser's large linear layers hold their weights
    ///
    /// fp8: 8-bit floats (E4M3) with a scale per row, the inputs of those layers in the same form: half their memory, and on
    /// cards that multiply such numbers less time. The picture differs a little.
    #[arg(long, value_parser = named::<WeightFormat>(WeightFormat::NAMES.iter().copied()), value_name = "W",
          default_value = "plain", help_heading = "Machine")]
    pub weights: WeightFormat,

    /// Element type of the VAE (default: as --dtype; bf16 for f16 where the model's VAE leaves the range of f16)
    #[arg(long, value_parser = named::<DType>(["f32", "f16", "bf16"]), value_name = "T", help_heading = "Machine")]
    pub vae_dtype: Option<DType>,

    /// Where text encoders run (default: where everything does)
    ///
    /// cpu: on the host, so that they need no memory of a card; their T5 is the largest part of SD 3 and of DeepFloyd IF.
    #[arg(long, value_name = "D", value_parser = ["cpu"], help_heading = "Machine")]
    pub text_encoder_device: Option<String>,

    /// Which parts of the model stay in memory
    ///
    /// auto: all of them, where the run fits, else as low. keep: all of them, always. low: each part is loaded when it is
    /// needed, and text encoders leave memory once the prompts are encoded.
    #[arg(long, value_parser = named::<Residency>(Residency::NAMES.iter().copied()), value_name = "M",
          default_value = "auto", help_heading = "Machine")]
    pub memory: Residency,

    /// How the VAE decodes and encodes
    ///
    /// auto: whole, by stripes where that does not fit. stripes: the same picture in less memory. tiles: with a cross-fade
    /// between tiles, in least memory; colours may differ a little from tile to tile.
    #[arg(long, value_parser = named::<VaePartition>(VaePartition::NAMES.iter().copied()), value_name = "P",
          default_value = "auto", help_heading = "Machine")]
    pub vae_partition: VaePartition,

    #[command(flatten)]
    pub upscale: UpscaleArgs,

    #[command(flatten)]
    pub pixel: PixelArgs,

    /// Where to run: auto, cpu, cuda, cuda:N or emu; auto takes the best that is there
    #[arg(long, value_name = "D", value_parser = DeviceChoice::parse, default_value = "auto",
          help_heading = "Machine")]
    pub device: DeviceChoice,
}

/// Steps without the network.
#[derive(Args)]
pub struct CacheArgs {
    /// Leave out the network in steps that can be told from earlier ones: ucache, easycache or spectrum (default: in none)
    ///
    /// Fewer calls of the network for a picture that differs a little. ucache and easycache reuse the last change where little
    /// has changed since, each picture by itself, so that pictures are made one by one; spectrum predicts clean samples, in
    /// steps that follow from their number. Not with methods whose steps go over views. The picture's text says how often the
    /// network was asked.
    #[arg(long, value_parser = named::<CacheKind>(CacheKind::NAMES.iter().copied()), value_name = "CACHE",
          help_heading = "Step cache")]
    pub cache: Option<CacheKind>,

    /// Options of --cache with commas between them: threshold=0.5,start=0.2
    ///
    /// ucache: threshold (1), start (0.15), end (0.95), decay (1), relative (1), reset (1). easycache: threshold (0.2), start
    /// (0.15), end (0.95). spectrum: w (0.4), m (3), lam (1), window (2), flex (0.5), warmup (4), stop (0.9), center (0).
    #[arg(long, value_name = "KEY=VALUE,...", requires = "cache", help_heading = "Step cache")]
    pub cache_options: Option<String>,
}

impl CacheArgs {
    /// # Errors
    /// [`Error::Request`]: an option that the cache does not have, or a value out of its range.
    pub fn cache(&self) -> Result<Option<StepCache>> {
        let new = |kind: CacheKind| StepCache::new(kind.name(), self.cache_options.as_deref().unwrap_or_default());
        self.cache.map(new).transpose()
    }
}

/// The picture that a run begins from.
#[derive(Args)]
pub struct StartArgs {
    /// A picture to begin from in place of noise: PNG, JPEG or WebP
    ///
    /// Its Exif orientation is applied and transparency dropped; grey and 16-bit pictures are read as 8-bit RGB. It is
    /// stretched to the size of the stage that begins, by Lanczos; without --size and --stages its own size, rounded down to
    /// what the model can make, is the final one. With several stages the run begins in that one in which the first of its
    /// steps lies. For demofusion it takes the place of phase 1's; for methods that make a picture and enlarge it (hires-fix,
    /// diffusehigh, scalediff, pixelrush, frecas) that of the first stage's, which is not run and is planned at the picture's own size.
    #[arg(long, value_name = "FILE", value_parser = values::path(), help_heading = "Begin from a picture")]
    pub init_image: Option<PathBuf>,

    /// Where the picture is made anew: white is repainted, black kept
    ///
    /// With methods that run every step on the whole map. A grey picture, of any size: it is stretched as --init-image is, and its levels from 128 on count as white. What is
    /// kept passes through the VAE and so differs a little from the file. A model for inpainting reads the mask itself, and
    /// needs one; with any other the kept part is put back after every step.
    #[arg(long, value_name = "FILE", value_parser = values::path(), requires = "init_image",
          help_heading = "Begin from a picture")]
    pub mask: Option<PathBuf>,

    /// How much of the schedule is run, 0 to 1 (default: 0.8; 1 with --mask and for demofusion, which takes nothing else)
    ///
    /// The last int(steps x strength) steps. 1 with a mask begins with noise alone. Methods that have the picture in place of
    /// their first stage's take none: --denoise of hires-fix, --restart-ratio of scalediff, --refine-timestep of pixelrush,
    /// --frecas-ends of frecas and the steps of diffusehigh's later --stages say it.
    #[arg(long, value_name = "X", value_parser = values::strength, help_heading = "Begin from a picture")]
    pub strength: Option<f64>,
}

impl StartArgs {
    /// The files, read.
    ///
    /// # Errors
    /// Those of the files; [`Error::Request`]: a strength without a picture.
    pub fn init_image(&self) -> Result<Option<InitImage>> {
        let Some(path) = &self.init_image else {
            return match self.strength {
                None => Ok(None),
                Some(strength) => {
                    Err(conflict("--strength", strength, "is of a run from a picture; name --init-image FILE"))
                }
            };
        };
        let mask = self.mask.as_deref().map(InputPicture::read).transpose()?;
        Ok(Some(InitImage { picture: InputPicture::read(path)?, mask, strength: self.strength }))
    }
}

/// What becomes of a finished picture.
#[derive(Args)]
#[command(next_help_heading = "Upscaling")]
pub struct UpscaleArgs {
    /// Enlarge every finished picture with this network: ESRGAN, Real-ESRGAN or BSRGAN (RRDBNet); or with this second stage of
    /// DeepFloyd IF
    ///
    /// A safetensors or .pth file; how many times the edges become longer, 1, 2, 4 or 8, is the network's. The same bytes as of
    /// megafuse upscale on the picture. Or a folder as diffusers saves a second stage, behind a --model that is a first one: it reads
    /// the same prompt, and needs no text encoder.
    #[arg(long, value_name = "FILE|DIR", value_parser = values::path())]
    pub upscale_model: Option<PathBuf>,

    /// How the upscaler goes through a picture: stripes of N of its rows; 0: at once (default: what fits)
    ///
    /// The picture is the same. Small stripes take less memory and far more time.
    #[arg(long, value_name = "N", requires = "upscale_model")]
    pub upscale_tile: Option<usize>,

    /// Element type of the upscaler [default: f32, f16 on a card]
    #[arg(long, value_parser = named::<DType>(["f32", "f16", "bf16"]), value_name = "T", requires = "upscale_model")]
    pub upscale_dtype: Option<DType>,
}

impl UpscaleArgs {
    fn options(&self, device: &Device) -> Option<UpscaleOptions> {
        let file = self.upscale_model.clone().filter(|path| second_model(path).is_none())?;
        let dtype = self.upscale_dtype.unwrap_or_else(|| UpscaleOptions::usual_dtype(device));
        Some(UpscaleOptions { file, dtype, tiling: tiling(self.upscale_tile) })
    }
}

/// What `--tile` says.
pub fn tiling(rows: Option<usize>) -> Tiling {
    match rows {
        None => Tiling::Automatic,
        Some(0) => Tiling::Whole,
        Some(rows) => Tiling::Stripes(rows),
    }
}

/// What is loaded beside the model's own files.
#[derive(Args)]
pub struct AddedFiles {
    /// A LoRA to merge into the weights, where wanted with its weight: FILE:0.8 (default weight: 1)
    ///
    /// May be given several times. LoRA, LoHa, LoKr and DoRA in safetensors or .pt, with the keys of kohya's
    /// scripts, of diffusers or of PEFT.
    #[arg(long, value_name = "FILE[:WEIGHT]", value_parser = values::library::<Lora>)]
    pub lora: Vec<Lora>,

    /// A ResAdapter's folder, where wanted with its weight: DIR:0.5 (default weight: 1)
    ///
    /// Lets a model draw at sizes that it was not trained at, with any method: pytorch_lora_weights.safetensors is merged into
    /// the weights, the norms of diffusion_pytorch_model.safetensors stand in place of the model's. The weight is the first
    /// one's; its authors suggest 1 below the trained size and 0.3 to 0.7 above it.
    #[arg(long, value_name = "DIR[:WEIGHT]", value_parser = values::library::<ResAdapter>)]
    pub resadapter: Option<ResAdapter>,

    /// A file of textual inversion: its word in a prompt stands for its vectors
    ///
    /// May be given several times. Safetensors, .pt or .bin as stable-diffusion-webui (the word is the file's name) or
    /// diffusers (the word is the tensor's) write them; for SDXL with clip_l and clip_g.
    #[arg(long, value_name = "FILE", value_parser = values::path())]
    pub embedding: Vec<PathBuf>,

    /// Weights of another VAE, of the same shapes, in a file of safetensors or .pt
    #[arg(long, value_name = "FILE", value_parser = values::path())]
    pub vae: Option<PathBuf>,
}

impl AddedFiles {
    /// `--model` with what is added to it.
    pub fn source(&self, model: Option<&Path>) -> ModelSource {
        values::source(model)
            .with(self.lora.clone(), self.embedding.clone(), self.vae.clone())
            .with_resadapter(self.resadapter.clone())
    }
}

impl PictureArgs {
    /// The method that is chosen, or the one that suits the model.
    pub fn spec(&self, run: &RunArgs) -> &'static MethodSpec {
        self.method.0.unwrap_or_else(|| Request::suited_to(&run.source()).method.spec())
    }

    /// # Errors
    /// [`Error::Request`] naming the flag, when two flags contradict each other or one would have no effect.
    pub fn request(&self, run: &RunArgs, prompt: &str) -> Result<Request> {
        self.request_beside(run, prompt, &[(self.spec(run), run.stages())])
    }

    /// The same for runs by these methods with these stages.
    ///
    /// # Errors
    /// As [`request`](PictureArgs::request).
    pub fn request_beside(&self, run: &RunArgs, prompt: &str, runs: &[MethodRun]) -> Result<Request> {
        if self.seed.checked_add(self.count as u64 - 1).is_none() {
            let reason = format!("with --count {} the last seed would exceed 2^64 - 1", self.count);
            return Err(conflict("--seed", self.seed, reason));
        }
        run.check_effect(runs)?;
        // So that the memory of a whole batch is looked at before the run; auto is settled by what there is.
        let batch = match run.batch {
            Batch::Of(batch) => batch.min(self.count),
            Batch::Auto => 1,
        };
        let request = run.request(self.spec(run))?;
        let prompt = prompt.into();
        Ok(Request { prompt, seed: self.seed, count: self.count, batch, ..request })
    }
}

impl RunArgs {
    /// `--dtype`, or what suits the device.
    pub fn dtype_on(&self, device: &Device) -> DType {
        self.dtype.unwrap_or_else(|| usual_dtype(device))
    }

    pub fn source(&self) -> ModelSource {
        let source = self.added.source(self.model.as_deref());
        source.with_ip_adapters(self.ip.ip_adapter.clone(), self.ip.ip_encoder.clone())
    }

    /// How the model is loaded on the device.
    pub fn load_options(&self, device: &Device) -> LoadOptions {
        let memory = MemoryOptions { residency: self.memory, vae: self.vae_partition };
        let (dtype, weights) = (self.dtype_on(device), self.weights);
        let (upscale, controls) = (self.upscale.options(device), self.control.control.clone());
        let host = self.text_encoder_device.is_some() && !matches!(device, Device::Cpu(_));
        let (text_device, vae_dtype) = (host.then(Device::cpu), self.vae_dtype);
        let second = self.upscale.upscale_model.as_deref().and_then(second_model);
        let (device, reads_prompts) = (device.clone(), true);
        LoadOptions { device, text_device, dtype, weights, vae_dtype, memory, upscale, controls, reads_prompts, second }
    }

    /// Those of `--stages`; none: they are planned.
    pub fn stages(&self) -> &[Stage] {
        self.stages.as_ref().map_or(&[], |stages| &stages.0)
    }

    /// These flags as a request without a prompt, for seed 0. Options that `spec` does not have are left out.
    ///
    /// # Errors
    /// [`Error::Request`]: an option's value does not fit; those of the files of `--init-image`, `--mask` and `--ip-image`.
    pub fn request(&self, spec: &'static MethodSpec) -> Result<Request> {
        Ok(Request {
            prompt: String::new(),
            negative_prompt: self.negative.clone(),
            text: TextOptions {
                syntax: self.prompt_syntax.unwrap_or_default(),
                long_prompt: self.long_prompt.unwrap_or_default(),
                clip_skip: self.clip_skip,
                t5_length: self.t5_length,
            },
            method: self.options.of(spec, self.stages())?,
            size: self.size,
            stages: self.stages().to_vec(),
            scheduler: self.scheduler,
            sigmas: self.sigmas,
            eta: self.eta,
            steps: self.steps,
            guidance: self.guidance.unwrap_or(Request::suited_to(&self.source()).guidance),
            guidance_rescale: self.guidance_rescale,
            guidance_high: self.guidance_high,
            init_image: self.start.init_image()?,
            lowres: self.pixel.lowres()?,
            second: self.pixel.second(self.upscale.upscale_model.as_deref())?,
            controls: self.control.inputs()?,
            ip_images: self.ip.images()?,
            size_ids: SizeIds { original: self.original_size, crop: self.crop, target: self.target_size },
            seed: 0,
            count: 1,
            batch: 1,
            rng: self.rng,
            choices: Choices::default(),
            cache: self.cache.cache()?,
        })
    }

    /// A flag that would change nothing is a misunderstanding; better said before an hour of computing than after.
    ///
    /// # Errors
    /// [`Error::Request`]: the flag has no effect in any of these runs.
    pub fn check_effect(&self, runs: &[MethodRun]) -> Result<()> {
        let eta = self.eta.unwrap_or(0.0);
        if eta > 0.0 && self.scheduler.is_some_and(|sampler| sampler != Sampler::Ddim) {
            return Err(conflict("--eta", eta, "only --scheduler ddim has an eta"));
        }
        let guidance = self.guidance.unwrap_or(Request::suited_to(&self.source()).guidance);
        if let Some(negative) = self.negative.as_ref().filter(|negative| !negative.is_empty() && guidance <= 1.0) {
            let reason = format!("has no effect with --guidance {guidance}; up to 1 there is no guidance");
            return Err(conflict("--negative", format!("{negative:?}"), reason));
        }
        if self.guidance_rescale > 0.0 && guidance <= 1.0 {
            let reason = format!("has no effect with --guidance {guidance}; up to 1 there is no guidance");
            return Err(conflict("--guidance-rescale", self.guidance_rescale, reason));
        }
        if let Some(stages) = self.stages.as_ref().filter(|stages| stages.0.len() > 1)
            && !runs.iter().any(|(spec, _)| spec.relays)
        {
            let relaying: Vec<&str> = METHODS.iter().filter(|spec| spec.relays).map(|spec| spec.name).collect();
            let chosen = runs.first().map_or("plain", |(spec, _)| spec.name);
            let reason = format!("--method {chosen} has one stage; choose {}", relaying.join(" or "));
            return Err(conflict("--stages", stages, reason));
        }
        let unused = |name: &&String| !runs.iter().any(|(spec, stages)| spec.reads(name, stages));
        let Some(name) = self.options.given.keys().find(unused) else { return Ok(()) };
        let mut methods: Vec<&MethodSpec> = Vec::new();
        for (spec, _) in runs {
            if !methods.iter().any(|known| known.name == spec.name) {
                methods.push(spec);
            }
        }
        Err(without_effect(name, &self.options.given[name], &methods))
    }
}

/// `request` by the method `spec`, beside other methods: it keeps the options that it has, and a method with one stage
/// makes all steps of the others' stages at the last one's size.
///
/// # Errors
/// [`Error::Request`]: an option's value does not fit.
pub fn by_method(request: &Request, spec: &'static MethodSpec) -> Result<Request> {
    let scheduled = request.method.scheduled_steps(&request.stages);
    let request = Request { method: request.method.replaced_by(spec)?, ..request.clone() };
    if spec.relays || request.stages.is_empty() {
        return Ok(request);
    }
    let last = request.stages.last().map(|last| last.size);
    Ok(Request {
        size: request.size.or(last),
        steps: Some(request.steps.unwrap_or(scheduled)),
        stages: Vec::new(),
        ..request
    })
}

/// Samplers as this program calls them, which the help lists, and as others do.
fn sampler_names() -> impl Iterator<Item = PossibleValue> {
    Sampler::ALL.into_iter().map(|sampler| PossibleValue::new(sampler.name()).aliases(sampler.aliases()))
}

/// What suits the device where no flag says otherwise.
pub fn usual_dtype(device: &Device) -> DType {
    if matches!(device, Device::Cuda(_)) { DType::BF16 } else { DType::F32 }
}

pub fn conflict(flag: &'static str, value: impl ToString, reason: impl Into<String>) -> Error {
    Error::Request { field: flag, value: value.to_string(), reason: reason.into() }
}
