//! `megafuse enlarge`: a picture two to four times larger, with new detail.

use std::path::{Path, PathBuf};

use clap::Args;
use megafuse::pipeline::{
    InitImage, InputPicture, METHODS, Method, MethodSpec, Pipeline, PlanReport, Request, Size, Stage,
};
use megafuse::{Error, Result};

use super::console::say;
use super::generate::{self, Files};
use super::method_options::MethodChoice;
use super::output::{self, Outputs, Target};
use super::picture_args::{PictureArgs, RunArgs, conflict};
use super::session::{Session, tell_unread};
use super::{flags, from, ip_args, values};

/// What enlarges where no flag says otherwise.
const METHOD: &str = "megafusion";

const SCALE: f64 = 2.0;

#[derive(Args)]
#[command(after_long_help = EXAMPLES)]
pub struct EnlargeArgs {
    /// PNG, JPEG or WebP files
    #[arg(value_name = "PICTURE", required = true, value_parser = values::path())]
    pub pictures: Vec<PathBuf>,

    /// How many times the sides become longer, above 1 to 8 (default: 2); --size names them instead
    #[arg(long, value_name = "X", value_parser = values::scale, conflicts_with_all = ["size", "stages"])]
    pub scale: Option<f64>,

    /// What the picture shows (default: what a picture of this program or of stable-diffusion-webui says of itself, else nothing)
    #[arg(long, value_name = "PROMPT")]
    pub prompt: Option<String>,

    #[command(flatten)]
    pub method: MethodChoice,

    /// Seed of the noise; random (also -1) draws one
    #[arg(long, value_name = "N", value_parser = values::seed, default_value = "0")]
    pub seed: u64,

    #[command(flatten)]
    pub run: RunArgs,

    /// The PNG file to write, or a folder
    ///
    /// Without it: NAME-WxH.png in the current directory, or NAME-WxH-2.png and so on where that exists. A file named here is
    /// replaced. In a folder, which it must be for several pictures, the default names.
    #[arg(short, long, value_name = "PATH", value_parser = values::path(), help_heading = "Output")]
    pub out: Option<PathBuf>,
}

const EXAMPLES: &str = "\
Examples:
  # twice as large, with the model inside the program
  megafuse enlarge megafuse-0.png

  # a photo, four times as large, with words for what is in it
  megafuse enlarge photo.jpg --scale 4 --prompt \"a lighthouse at dusk\" --model ~/models/stable-diffusion-xl-base-1.0

  # more of it made anew; another method; several pictures
  megafuse enlarge photo.jpg --size 2048x1536 --strength 0.5
  megafuse enlarge photo.jpg --method multidiffusion --strength 0.4
  megafuse enlarge photo.jpg --method hires-fix --denoise 0.5
  megafuse enlarge *.png --out enlarged/

The picture is noised and denoised by the last steps of a relay that begins at its own size (generate --init-image), so that the
model adds detail. For methods that make a first picture and enlarge it, it takes that one's place. megafuse upscale enlarges by a
super-resolution network instead, which adds no detail of its own.

Where no flag says otherwise, multidiffusion's windows are half a window apart (--stride), in place of an eighth, which takes about
sixteen times as long, and hires-fix has a --denoise of 0.35.";

/// The flags that these take from `generate` as this command has them.
pub fn adapted(command: clap::Command) -> clap::Command {
    let usual = MethodSpec::find(METHOD).map(|spec| spec.name).and_then(Method::named);
    let usual = usual.ok().and_then(|method| method.enlarging_strength()).unwrap_or(1.0);
    let methods: Vec<Method> = METHODS.iter().filter_map(|spec| Method::named(spec.name).ok()).collect();
    let others = methods.iter().filter_map(|method| {
        let strength = method.enlarging_strength().filter(|&strength| strength != usual)?;
        Some(format!("; of {method} {strength}"))
    });
    let none = methods.iter().filter_map(|method| {
        let by = method.in_place_of_first_stage()?;
        Some(format!("{method} ({})", flags::named(by)))
    });
    let (others, none) = (others.collect::<String>(), none.collect::<Vec<_>>().join(", "));
    let summary = "How much of the schedule is run, 0 to 1: the larger, the more is made anew";
    let strength = format!("{summary}\n\nDefault: {usual}{others}. Of these another flag says it: {none}.");
    command
        .mut_arg("init_image", |arg| arg.hide(true))
        .mut_arg("mask", |arg| arg.hide(true))
        .mut_arg("strength", |arg| {
            arg.help(format!("{summary} (default: {usual})")).long_help(strength).help_heading("Options")
        })
        .mut_arg("method", |arg| {
            let help = format!("How the picture is enlarged (default: {METHOD}); those of generate --init-image");
            arg.help(help.clone()).long_help(help)
        })
        .mut_arg("stages", |arg| {
            let help = "Sizes and steps of the stages, as of generate (default: from the picture's own size on)";
            arg.help(help).long_help(help)
        })
}

/// A picture, and what is made of it.
struct Work {
    request: Request,
    plan: PlanReport,
    files: Files,
}

pub fn run(mut args: EnlargeArgs) -> Result<()> {
    if args.run.start.init_image.is_some() || args.run.start.mask.is_some() {
        let (flag, reason) = match args.run.start.mask {
            Some(_) => {
                ("--mask", "megafuse generate --init-image repaints a part of a picture; enlarge makes all of it")
            }
            None => ("--init-image", "enlarge begins from its own pictures; name them without the flag"),
        };
        return Err(conflict(flag, "given", reason));
    }
    output::check_png("--out", args.out.as_deref())?;
    if let Some(out) = args.out.as_deref().filter(|out| args.pictures.len() > 1 && !output::is_folder(out)) {
        let reason = format!("is one file for {} pictures; name a folder, with / at its end", args.pictures.len());
        return Err(conflict("--out", out.display(), reason));
    }
    let strength = args.run.start.strength.take();
    let spec = match args.method.0 {
        Some(spec) => spec,
        None => MethodSpec::find(METHOD)?,
    };
    let pictures: Vec<InputPicture> =
        args.pictures.iter().map(|path| InputPicture::read(path)).collect::<Result<_>>()?;
    let of_flags =
        PictureArgs { method: MethodChoice(Some(spec)), seed: args.seed, count: 1 }.request(&args.run, "")?;
    let session = Session::open(&args.run)?;
    let (mut work, mut outputs) = (Vec::new(), Outputs::default());
    for (path, picture) in args.pictures.iter().zip(pictures) {
        let (from, name) = (picture.size(), picture.name().to_string());
        let request = request(&args, session.planner.pipeline(), &of_flags, path, picture, strength)?;
        let plan = session.check(&request)?;
        let size = plan.stages.last().map_or(from, |last| last.size);
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        let target = Target::named(args.out.clone(), &format!("{stem}-{size}"));
        let files = Files::new(target, &request, plan.stages.len(), &mut outputs)?;
        say!("{}", description(&request, &plan, &name, from));
        work.push(Work { request, plan, files });
    }
    let pipeline = session.load()?;
    tell_unread(&pipeline, work.iter().map(|work| &work.request))?;
    for Work { request, plan, files } in work {
        generate::make(&pipeline, &request, 0, &[files], &plan)?;
    }
    Ok(())
}

/// `photo.jpg: 512x512 to 1024x1024 by megafusion, stages 512x512:40 1024x1024:10 of which 35 % are run, "a lighthouse"`
fn description(request: &Request, plan: &PlanReport, name: &str, from: Size) -> String {
    let stages: Vec<String> = plan.stages.iter().map(Stage::to_string).collect();
    let size = plan.stages.last().map_or(from, |last| last.size);
    let words = if request.prompt.is_empty() { "without words".into() } else { format!("{:?}", request.prompt) };
    let (method, stages) = (&request.method, stages.join(" "));
    let share = match request.init_image.as_ref().and_then(|init| init.strength_with(method)) {
        Some(strength) => format!("{} % of the stages", (100.0 * strength).round()),
        None => "the later of the stages".into(),
    };
    format!("{name}: {from} to {size} by {method}, {share} {stages}, {words}")
}

fn request(
    args: &EnlargeArgs,
    pipeline: &Pipeline,
    flags: &Request,
    path: &Path,
    picture: InputPicture,
    strength: Option<f64>,
) -> Result<Request> {
    let words = from::words(path).filter(|_| args.prompt.is_none());
    let (own, negative) = words.unwrap_or_default();
    let from = picture.size();
    let mut request = Request { prompt: args.prompt.clone().unwrap_or(own), ..flags.clone() };
    if request.negative_prompt.is_none() {
        request.negative_prompt = negative.filter(|_| request.is_guided());
    }
    let mut request = ip_args::worded(request, pipeline);
    request.init_image = Some(InitImage { picture, mask: None, strength });
    let size = match (args.run.stages.as_ref().and_then(|stages| stages.0.last()), args.run.size) {
        (Some(last), _) => last.size,
        (None, Some(size)) => size,
        (None, None) => scaled(from, args.scale.unwrap_or(SCALE), pipeline.side_multiple()),
    };
    check_size(size, from, pipeline.side_multiple(), &request)?;
    let mut request = pipeline.enlarging(&request, size)?;
    let run = pipeline.resolve(&request)?;
    // Without words both rows of guidance are the same.
    if request.prompt.is_empty()
        && request.negative_prompt.is_none()
        && args.run.guidance.is_none()
        && run.guidance().is_some()
    {
        request.guidance = 1.0;
    }
    Ok(request)
}

/// `scale` times the sides, in whole cells.
fn scaled(from: Size, scale: f64, factor: usize) -> Size {
    let side = |side: usize| ((side as f64 * scale / factor as f64).round() as usize).max(1) * factor;
    Size::new(side(from.width), side(from.height))
}

/// # Errors
/// [`Error::Request`]: not larger than the picture, or of other proportions: the sizes of its width and of its height that fit.
fn check_size(size: Size, from: Size, factor: usize, request: &Request) -> Result<()> {
    let field = if request.stages.is_empty() { "size" } else { "stages" };
    let refuse = |reason: String| Err(Error::Request { field, value: size.to_string(), reason });
    if size.width < from.width || size.height < from.height || size == from {
        return refuse(format!(
            "is not larger than the picture, which is {from}; megafuse resize makes pictures smaller"
        ));
    }
    let (by_width, by_height) = (size.width as f64 / from.width as f64, size.height as f64 / from.height as f64);
    let off = |ours: usize, theirs: f64| (ours as f64 - theirs).abs() < factor as f64;
    if off(size.height, by_width * from.height as f64) || off(size.width, by_height * from.width as f64) {
        return Ok(());
    }
    let (of_width, of_height) = (scaled(from, by_width, factor), scaled(from, by_height, factor));
    refuse(format!("the picture is {from}; sizes of its proportions are {of_width} and {of_height}"))
}
