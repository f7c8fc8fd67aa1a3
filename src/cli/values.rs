//! The values of flags: each parser says what is accepted; clap puts the flag and the value in front.

use std::fmt;
use std::hash::{BuildHasher, Hasher};
use std::path::{MAIN_SEPARATOR, Path, PathBuf};
use std::str::FromStr;

use clap::builder::{PathBufValueParser, TypedValueParser};

use megafuse::models::{DeepFloydModel, Family, PublishedModel};
use megafuse::pipeline::{MethodSpec, ModelSource, RandomShapes, Stage, StageParts, hub_name};
use megafuse::runtime::{CudaDevice, CudaOptions};
use megafuse::{Device, Error};

use super::flags;

/// Steps of one run: the training schedule has that many timesteps.
pub const MAX_STEPS: usize = 1000;

/// Parses with the library's own parser; of its error only the reason is kept, clap adds the rest.
pub fn library<T: FromStr<Err = Error>>(text: &str) -> Result<T, String> {
    text.parse().map_err(reason)
}

/// `--method`, and a line's.
pub fn method(name: &str) -> Result<&'static MethodSpec, String> {
    MethodSpec::find(name).map_err(reason)
}

fn reason(error: Error) -> String {
    match error {
        Error::Request { reason, .. } => flags::named(&reason),
        Error::Argument { want, .. } => format!("expected {want}"),
        other => other.to_string(),
    }
}

/// A path; `~` at its beginning is the home folder also where the shell leaves it as it is, as in `--model=~/models`.
pub fn path() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().map(|path| at_home(path, std::env::home_dir()))
}

/// `./~/x` is not taken for one at home.
fn at_home(path: PathBuf, home: Option<PathBuf>) -> PathBuf {
    match (path.strip_prefix("~"), home) {
        (Ok(rest), Some(home)) if rest.as_os_str().is_empty() => home,
        (Ok(rest), Some(home)) => {
            let mut place = home.join(rest).into_os_string();
            // A separator at the end says that a folder is meant.
            if path.as_os_str().as_encoded_bytes().last().is_some_and(|&byte| std::path::is_separator(byte.into())) {
                place.push(MAIN_SEPARATOR.to_string());
            }
            place.into()
        }
        _ => path,
    }
}

/// A seed, or `-1` or `random` for one that nobody chose: of 32 bits, as torch's CPU generator uses no more.
pub fn seed(text: &str) -> Result<u64, String> {
    match text {
        "-1" | "random" => {
            // The standard library's keys come from the system's source of randomness.
            let drawn = std::collections::hash_map::RandomState::new().build_hasher().finish();
            Ok(drawn & u64::from(u32::MAX))
        }
        _ => text.parse().map_err(|_| {
            format!("expected a whole number from 0 to {}, or random (also -1) for one that is drawn", u64::MAX)
        }),
    }
}

/// `--model`.
pub fn source(model: Option<&Path>) -> ModelSource {
    model.map_or(ModelSource::Embedded, ModelSource::at)
}

/// How messages call the model.
pub fn source_name(source: &ModelSource) -> String {
    match source {
        ModelSource::Directory(path) => hub_name(path).unwrap_or_else(|| path.display().to_string()),
        ModelSource::File(path) => path.display().to_string(),
        ModelSource::Embedded => "pocket (the model inside the program)".into(),
        ModelSource::Random(shapes) => format!("{}, random weights", random_name(shapes)),
        ModelSource::Resized { model, resadapter } => format!("{} with ResAdapter {resadapter}", source_name(model)),
        ModelSource::Prompted { model, adapters, .. } => {
            let adapters: Vec<String> = adapters.iter().map(|adapter| format!("IP-Adapter {adapter}")).collect();
            format!("{} with {}", source_name(model), adapters.join(", "))
        }
        ModelSource::Modified { model, loras, embeddings, vae } => {
            let loras = loras.iter().map(|lora| format!("LoRA {lora}"));
            let vae = vae.iter().map(|vae| format!("VAE {}", vae.display()));
            let embeddings = embeddings.iter().map(|file| format!("embedding {}", file.display()));
            format!("{} with {}", source_name(model), loras.chain(embeddings).chain(vae).collect::<Vec<_>>().join(", "))
        }
    }
}

/// Published models that `--random` knows: their shapes need no file.
const PUBLISHED: [(&str, PublishedModel); 9] = [
    ("sd15", PublishedModel::Stable(Family::Sd1)),
    ("sd21", PublishedModel::Stable(Family::Sd2)),
    ("sdxl", PublishedModel::Stable(Family::Sdxl)),
    ("sd3", PublishedModel::Stable(Family::Sd3)),
    ("sd35", PublishedModel::Stable(Family::Sd35)),
    ("if-i-xl", PublishedModel::DeepFloyd(DeepFloydModel::IXl)),
    ("if-i-l", PublishedModel::DeepFloyd(DeepFloydModel::IL)),
    ("if-i-m", PublishedModel::DeepFloyd(DeepFloydModel::IM)),
    ("if-ii-l", PublishedModel::DeepFloyd(DeepFloydModel::IiL)),
];

/// `--random`: one of [`PUBLISHED`], or a directory with configurations.
pub fn random(text: &str) -> Result<RandomShapes, String> {
    match PUBLISHED.iter().find(|(name, _)| *name == text) {
        Some((_, model)) => Ok(RandomShapes::Published(*model)),
        None if Path::new(text).is_dir() => Ok(RandomShapes::Directory(text.into())),
        None => {
            let names: Vec<&str> = PUBLISHED.iter().map(|(name, _)| *name).collect();
            Err(format!("expected {}, or a directory with the configurations of a model", names.join(", ")))
        }
    }
}

/// As [`random`] reads it.
pub fn random_name(shapes: &RandomShapes) -> String {
    match shapes {
        RandomShapes::Published(model) => {
            PUBLISHED.iter().find(|(_, other)| other == model).map_or("a published model", |(name, _)| name).into()
        }
        RandomShapes::Directory(path) => path.display().to_string(),
    }
}

/// All of `--stages`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stages(pub Vec<Stage>);

impl Stages {
    pub fn total_steps(&self) -> usize {
        self.0.iter().map(|stage| stage.steps).sum()
    }
}

impl fmt::Display for Stages {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let stages: Vec<String> = self.0.iter().map(Stage::to_string).collect();
        f.write_str(&stages.join(","))
    }
}

/// `WxH:steps,WxH:steps,...`, each where wanted with parts: `WxH:steps+crops`
pub fn stages(text: &str) -> Result<Stages, String> {
    const WANTED: &str = "expected WxH:steps,WxH:steps,... such as 512x512:40,768x768:5,1024x1024:5";
    let mut list = Vec::new();
    for (index, part) in text.split(',').enumerate() {
        let in_stage = |reason: String| format!("stage {} {part:?}: {reason}", index + 1);
        let (size, rest) = part.split_once(':').ok_or_else(|| in_stage(WANTED.into()))?;
        let (count, parts) = StageParts::split(rest);
        let size = library(size).map_err(in_stage)?;
        let steps = steps(count).map_err(in_stage)?;
        let parts = StageParts::parse(parts).map_err(in_stage)?;
        list.push(Stage { size, steps, parts });
    }
    let stages = Stages(list);
    match stages.total_steps() {
        total if total <= MAX_STEPS => Ok(stages),
        total => Err(format!("{total} steps in all, the limit is {MAX_STEPS}, the length of the training schedule")),
    }
}

/// A number of steps.
pub fn steps(text: &str) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(steps) if (1..=MAX_STEPS).contains(&steps) => Ok(steps),
        _ => Err(format!("expected a number of steps from 1 to {MAX_STEPS}")),
    }
}

/// The guidance scale: finite, not negative.
pub fn guidance(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(scale) if (0.0..=1000.0).contains(&scale) => Ok(scale),
        _ => Err("expected a number from 0 to 1000; 7 is usual, up to 1 there is no guidance".into()),
    }
}

/// The scale of guidance's high band.
pub fn guidance_high(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(scale) if (0.0..=1000.0).contains(&scale) => Ok(scale),
        _ => Err("expected a number from 0 to 1000; the value of --guidance changes nothing".into()),
    }
}

/// phi of the guidance's rescaling.
pub fn guidance_rescale(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(phi) if (0.0..=1.0).contains(&phi) => Ok(phi),
        _ => Err("expected a number from 0 (none) to 1; 0.7 is usual".into()),
    }
}

/// DDIM's eta.
pub fn eta(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(eta) if (0.0..=1.0).contains(&eta) => Ok(eta),
        _ => Err("expected a number from 0 (no fresh noise) to 1 (as much as DDPM)".into()),
    }
}

/// Time for a measurement.
pub fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.0..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("expected seconds from 0 (as few repetitions as possible) to 3600".into()),
    }
}

/// How many pictures.
pub fn count(text: &str) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(count) if (1..=10_000).contains(&count) => Ok(count),
        _ => Err("expected a number of pictures from 1 to 10000".into()),
    }
}

/// A layer of the text encoder, counted from the last.
pub fn clip_skip(text: &str) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(n) if (1..=64).contains(&n) => Ok(n),
        _ => Err("expected 1 (the last layer) or more, at most the layers of the text encoder".into()),
    }
}

/// Tokens of T5, the end token among them.
pub fn t5_length(text: &str) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(n) if (2..=512).contains(&n) => Ok(n),
        _ => Err("expected a number of tokens from 2 to 512, like 77, 128 or 256".into()),
    }
}

/// What a ControlNet adds is multiplied by it.
pub fn control_scale(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(scale) if scale.is_finite() => Ok(scale),
        _ => Err("expected a number; 1 is usual".into()),
    }
}

/// A share of the schedule.
pub fn strength(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if (0.0..=1.0).contains(&x) => Ok(x),
        _ => Err("expected a number from 0 to 1, like 0.6".into()),
    }
}

/// How many times sides become longer.
pub fn scale(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x > 1.0 && x <= 8.0 => Ok(x),
        _ => Err("expected a number above 1, at most 8, like 2".into()),
    }
}

/// `X,Y`: pixels from the left and from the top.
pub fn crop(text: &str) -> Result<(usize, usize), String> {
    let side = |text: &str| text.trim().parse::<usize>().ok().filter(|&side| side <= MOST_CROPPED);
    let parsed = text.split_once(',').and_then(|(x, y)| Some((side(x)?, side(y)?)));
    parsed.ok_or_else(|| format!("expected X,Y, pixels from the left and from the top, each 0 to {MOST_CROPPED}"))
}

/// The largest side of a picture.
const MOST_CROPPED: usize = 1 << 14;

/// `--batch`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Batch {
    Auto,
    Of(usize),
}

/// A number of pictures, or auto.
pub fn batch(text: &str) -> Result<Batch, String> {
    match text.parse::<usize>() {
        _ if text == "auto" => Ok(Batch::Auto),
        Ok(count) if (1..=256).contains(&count) => Ok(Batch::Of(count)),
        _ => Err("expected auto, or a number of pictures from 1 to 256".into()),
    }
}

/// All of `--seeds`, in the order given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seeds(pub Vec<u64>);

/// Far more than a picture of them could show.
const MOST_SEEDS: u64 = 10_000;

/// `7`, `0..3` (0, 1, 2), `0..=3` (0, 1, 2, 3), or several of these separated by commas.
pub fn seeds(text: &str) -> Result<Seeds, String> {
    const WANTED: &str =
        "expected numbers and ranges separated by commas, like 0..3 (which is 0,1,2) or 5,7,9; random draws one";
    let number = |text: &str| text.parse::<u64>().map_err(|_| WANTED.to_string());
    let mut list = Vec::new();
    for part in text.split(',') {
        let (first, last) = match part.split_once("..") {
            None => {
                let seed = seed(part).map_err(|_| WANTED.to_string())?;
                (seed, seed)
            }
            Some((first, last)) => match last.strip_prefix('=') {
                Some(last) => (number(first)?, number(last)?),
                None => (number(first)?, number(last)?.checked_sub(1).ok_or(format!("{part} is empty; {WANTED}"))?),
            },
        };
        if last < first {
            return Err(format!("{part} is empty; {WANTED}"));
        }
        if last - first >= MOST_SEEDS || list.len() as u64 >= MOST_SEEDS {
            return Err(format!("more than {MOST_SEEDS} seeds; {WANTED}"));
        }
        list.extend(first..=last);
    }
    Ok(Seeds(list))
}

/// Side of a grid's cell.
pub fn cell(text: &str) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(side) if (16..=4096).contains(&side) => Ok(side),
        _ => Err("expected a side from 16 to 4096 pixels".into()),
    }
}

/// Dilation of 3x3 convolutions.
pub fn dilation(text: &str) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(dilation) if (1..=64).contains(&dilation) => Ok(dilation),
        _ => Err("expected a dilation from 1 (none) to 64; the paper's is 2".into()),
    }
}

/// `--device`, before it is known what this machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    Auto,
    Cpu,
    Cuda { index: usize },
    Emu,
}

impl DeviceChoice {
    pub fn parse(text: &str) -> Result<DeviceChoice, String> {
        let indexed = || text.strip_prefix("cuda:").and_then(|index| index.parse().ok());
        match text {
            "auto" => Ok(DeviceChoice::Auto),
            "cpu" => Ok(DeviceChoice::Cpu),
            "cuda" => Ok(DeviceChoice::Cuda { index: 0 }),
            "emu" => Ok(DeviceChoice::Emu),
            _ => indexed()
                .map(|index| DeviceChoice::Cuda { index })
                .ok_or_else(|| "expected auto, cpu, cuda, cuda:N or emu".to_string()),
        }
    }

    /// `auto` is card 0 where a driver and a card are there and the program holds kernels, else the cpu.
    ///
    /// # Errors
    /// [`Error::DeviceUnavailable`]: what is missing, and what can be done; [`Error::Driver`].
    pub fn open(self) -> megafuse::Result<Device> {
        self.open_with(CudaOptions::default())
    }

    /// The same; a card without graphs, every launch by itself.
    ///
    /// # Errors
    /// As [`open`](DeviceChoice::open).
    pub fn open_eager(self) -> megafuse::Result<Device> {
        self.open_with(CudaOptions { eager: true, ..CudaOptions::default() })
    }

    /// The same; a card as the options say, but for its number.
    ///
    /// # Errors
    /// As [`open`](DeviceChoice::open).
    pub fn open_with(self, options: CudaOptions) -> megafuse::Result<Device> {
        let card = |ordinal| Ok(Device::Cuda(CudaDevice::open(CudaOptions { ordinal, ..options })?));
        match self {
            DeviceChoice::Auto => Ok(card(0).unwrap_or_else(|_: Error| Device::cpu())),
            DeviceChoice::Cpu => Ok(Device::cpu()),
            DeviceChoice::Cuda { index } => card(index),
            DeviceChoice::Emu => Device::emulated(options),
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            DeviceChoice::Auto => f.write_str("auto"),
            DeviceChoice::Cpu => f.write_str("cpu"),
            DeviceChoice::Cuda { index } => write!(f, "cuda:{index}"),
            DeviceChoice::Emu => f.write_str("emu"),
        }
    }
}

#[cfg(test)]
mod tests {
    use megafuse::pipeline::Size;

    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(library::<Size>("1024x768"), Ok(Size::new(1024, 768)));
        let wrong =
            ["", "512", "512x", "x512", "-8x8", "8.5x8", "8x8x3", "8 x 8", "0x8", "8x0", "8x99999999999999999999"];
        for text in wrong.into_iter().chain(["1000000000x1000000000"]) {
            let error = library::<Size>(text).expect_err(text);
            assert!(error.contains("1024x768"), "{text}: {error}");
        }
    }

    #[test]
    fn homes() {
        let home = || Some(PathBuf::from("/home/x"));
        for (text, want) in
            [("~", "/home/x"), ("~/a", "/home/x/a"), ("~/a/", "/home/x/a/"), ("~a", "~a"), ("./~/a", "./~/a")]
        {
            assert_eq!(at_home(text.into(), home()).as_os_str(), want, "{text}");
        }
        assert_eq!(at_home("~/a".into(), None), Path::new("~/a"));
    }

    #[test]
    fn stage_lists() {
        let list = stages("512x512:40,768x768:5,1024x1024:5").unwrap();
        assert_eq!(list.total_steps(), 50);
        assert_eq!(list.to_string(), "512x512:40,768x768:5,1024x1024:5");
        for (text, part) in [
            ("", "stage 1 \"\""),
            ("512x512", "expected WxH:steps"),
            ("512x512:", "from 1 to 1000"),
            ("512x512:0", "from 1 to 1000"),
            ("512x512:1001", "from 1 to 1000"),
            ("512x512:-3", "from 1 to 1000"),
            ("512x512:40,", "stage 2 \"\""),
            ("512x512:40,768x0:5", "stage 2 \"768x0:5\""),
            ("512x512:600,768x768:401", "1001 steps in all"),
        ] {
            let error = stages(text).expect_err(text);
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn seed_lists() {
        assert_eq!(seeds("0..3"), Ok(Seeds(vec![0, 1, 2])));
        assert_eq!(seeds("0..=2,9"), Ok(Seeds(vec![0, 1, 2, 9])));
        assert_eq!(seeds("18446744073709551615"), Ok(Seeds(vec![u64::MAX])));
        assert_ne!(seeds("random,-1").map(|seeds| seeds.0[0]), seeds("random,-1").map(|seeds| seeds.0[0]));
        for text in
            ["", "3..3", "3..2", "0..0", "5..=4", "..", "0..", "a", "1,", "-2", "0..random", "-1..3", "0...3", "1e3"]
        {
            assert!(seeds(text).is_err(), "{text}");
        }
        for text in ["0..18446744073709551615", "0..=18446744073709551615", "0..10001", "0..10000,0..9999,1"] {
            assert!(seeds(text).unwrap_err().contains("more than"), "{text}");
        }
    }

    #[test]
    fn numbers() {
        assert_eq!(guidance("7.5"), Ok(7.5));
        assert_eq!(guidance("0"), Ok(0.0));
        for text in ["NaN", "inf", "-1", "", "seven", "1e9"] {
            assert!(guidance(text).is_err(), "{text}");
        }
        assert_eq!(guidance_rescale("0.7"), Ok(0.7));
        for text in ["NaN", "-0.1", "1.1", ""] {
            assert!(guidance_rescale(text).is_err(), "{text}");
        }
        assert_eq!(eta("0.5"), Ok(0.5));
        for text in ["NaN", "-0.1", "1.1", "x"] {
            assert!(eta(text).is_err(), "{text}");
        }
        assert_eq!(seconds("0.5"), Ok(0.5));
        for text in ["NaN", "-1", "inf", "soon"] {
            assert!(seconds(text).is_err(), "{text}");
        }
        assert_eq!((count("3"), dilation("2")), (Ok(3), Ok(2)));
        for text in ["0", "-1", "", "1e3", "99999999999999999999"] {
            assert!(count(text).is_err() && dilation(text).is_err(), "{text}");
        }
    }

    #[test]
    fn devices() {
        assert_eq!(DeviceChoice::parse("auto"), Ok(DeviceChoice::Auto));
        assert_eq!(DeviceChoice::parse("cuda"), Ok(DeviceChoice::Cuda { index: 0 }));
        assert_eq!(DeviceChoice::parse("cuda:3"), Ok(DeviceChoice::Cuda { index: 3 }));
        for text in ["gpu", "cuda:", "cuda:x", "cuda:-1", "CPU", ""] {
            assert!(DeviceChoice::parse(text).is_err(), "{text}");
        }
        assert!(DeviceChoice::Auto.open().is_ok(), "with a card or without");
        let error = DeviceChoice::Cuda { index: 4096 }.open().unwrap_err().to_string();
        assert!(error.contains("cuda:4096"), "{error}");
    }
}
