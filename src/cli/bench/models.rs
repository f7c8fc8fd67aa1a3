//! `megafuse bench models`: a guided step of a denoiser and a VAE's decoding, each by itself.

use std::fs;
use std::path::Path;

use megafuse::models::{
    AddedConditioning, Mmdit, MmditConfig, TextConditioning, Unet, UnetConfig, UnetOptions, Vae, VaeConfig, WeightStore,
};
use megafuse::ops::StepIndex;
use megafuse::ops::cases::{Call, Inputs};
use megafuse::pipeline::{RandomShapes, T5_LENGTH};
use megafuse::runtime::{Work, cuda};
use megafuse::{DType, Device, Error, Result};
use serde_json::json;

use super::args::ModelArgs;
use super::clock::Clock;
use super::peaks::Peaks;
use super::results::SCHEMA;
use crate::cli::check::{describe, driver};
use crate::cli::output::print_line;

/// Tokens of a text encoder.
const TOKENS: usize = 77;

pub fn run(args: &ModelArgs) -> Result<()> {
    let device = args.device.open()?;
    let emulated = matches!(device, Device::Cuda(_)) && cuda::is_emulated();
    let clock = if emulated { Clock::once(&device)? } else { Clock::new(&device, args.seconds)? };
    let peak = if emulated { None } else { Some(Peaks::measure(&clock, args.dtype)?) };
    let (title, card) = match &device {
        Device::Cuda(card) => (describe(card), card.card().to_string()),
        _ => {
            let name = format!("cpu, {} threads", rayon::current_num_threads());
            (name.clone(), name)
        }
    };
    if !args.json {
        print_line(title);
        match &peak {
            Some(peak) => print_line(format!(
                "peaks measured: {:.3} TFLOP/s ({}), {:.1} GB/s (copy)",
                peak.flops / 1e12,
                peak.with,
                peak.bytes / 1e9
            )),
            None => print_line("no performance figures: the times of the emulated card say nothing about a card"),
        }
    }
    for part in Part::of(&Source::of(args)?)? {
        let (name, work) = part.work(args)?;
        let call = part.prepare(args, &device)?;
        let mut timed: Vec<_> = clock.ready("", vec![call])?.into_iter().collect();
        clock.sample(&mut timed)?;
        let Some(timed) = timed.first() else { continue };
        let mut line = json!({
            "kind": "model", "schema": SCHEMA, "part": name, "dtype": args.dtype.name(), "card": card,
            "driver": if matches!(device, Device::Cuda(_)) { driver() } else { String::new() }, "emulated": emulated,
            "flops": work.flops, "bytes": work.bytes, "launches": work.launches,
        });
        let Some(peak) = &peak else {
            line["ran"] = true.into();
            print_line(if args.json { line.to_string() } else { format!("{name:44} ran") });
            continue;
        };
        let (graph, single) = (timed.rotated(), timed.single());
        let best = graph.as_ref().unwrap_or(&single);
        let tflops = work.flops as f64 / best.median() / 1e12;
        let share = 1e12 * tflops / peak.flops;
        if args.json {
            line["median_us"] = (best.median() * 1e6).into();
            line["tflops"] = tflops.into();
            line["share_of_peak_flops"] = share.into();
            line["launched"] = single.to_json();
            if let Some(graph) = &graph {
                line["graph"] = graph.to_json();
            }
            print_line(line);
        } else {
            let ms = |seconds: f64| format!("{:9.3} ms", seconds * 1e3);
            let graph = graph.as_ref().map_or("-".into(), |graph| ms(graph.median()));
            print_line(format!(
                "{name:44} from a graph {graph:>12}  launched {} +- {:4.1}%  {tflops:8.3} TFLOP/s, {:3.0}% of the peak",
                ms(single.median()),
                100.0 * best.spread(),
                100.0 * share
            ));
        }
    }
    Ok(())
}

const UNET: &str = "unet";
const TRANSFORMER: &str = "transformer";

enum Denoiser {
    Unet(Box<UnetConfig>),
    Mmdit(MmditConfig),
}

#[derive(Clone, Copy, PartialEq)]
enum Part {
    Denoiser,
    Vae,
}

/// Where configurations and weights come from.
enum Source<'a> {
    Directory(&'a Path),
    Random(&'a RandomShapes),
}

impl Source<'_> {
    fn of(args: &ModelArgs) -> Result<Source<'_>> {
        match (&args.model, &args.random) {
            (Some(path), _) => Ok(Source::Directory(path)),
            (None, Some(shapes)) => Ok(Source::Random(shapes)),
            (None, None) => Err(Error::config("bench models", "neither --model nor --random")),
        }
    }

    /// The folder of its denoiser.
    fn denoiser(&self) -> &'static str {
        let transforms = match self {
            Source::Directory(folder) => folder.join(TRANSFORMER).is_dir(),
            Source::Random(RandomShapes::Directory(folder)) => folder.join(TRANSFORMER).is_dir(),
            Source::Random(RandomShapes::Published(model)) => {
                model.config(&format!("{TRANSFORMER}/config.json")).is_some()
            }
        };
        if transforms { TRANSFORMER } else { UNET }
    }

    /// What messages call it, and the JSON.
    fn config(&self, part: &str) -> Result<(String, String)> {
        match self {
            Source::Directory(folder) => Source::read(folder, part),
            Source::Random(RandomShapes::Directory(folder)) => Source::read(folder, part),
            Source::Random(RandomShapes::Published(model)) => {
                let name = format!("{part}/config.json");
                let json = model.config(&name);
                let json = json.ok_or_else(|| Error::config(name.clone(), "the family has none"))?;
                Ok((name, json))
            }
        }
    }

    fn read(folder: &Path, part: &str) -> Result<(String, String)> {
        let path = folder.join(part).join("config.json");
        let json = fs::read_to_string(&path).map_err(|error| Error::io(&path, error))?;
        Ok((path.display().to_string(), json))
    }

    fn store(&self, part: &str, device: &Device, dtype: DType) -> Result<WeightStore> {
        match (self, device) {
            (_, Device::Meta(_)) => Ok(WeightStore::meta(device, dtype)),
            (Source::Directory(folder), _) => {
                WeightStore::open(&folder.join(part), "diffusion_pytorch_model", device, dtype)
            }
            (Source::Random(_), _) => Ok(WeightStore::random(device, dtype)),
        }
    }
}

impl Part {
    /// Those of a model; one over pixels has no VAE.
    fn of(source: &Source) -> Result<Vec<Part>> {
        let over_pixels = match source.denoiser() {
            TRANSFORMER => false,
            unet => UnetConfig::names_blocks_of_pixels(source.config(unet)?.1.as_bytes()),
        };
        Ok(if over_pixels { vec![Part::Denoiser] } else { vec![Part::Denoiser, Part::Vae] })
    }

    /// What it is, and what it costs, from the configuration.
    fn work(self, args: &ModelArgs) -> Result<(String, Work)> {
        let meta = Device::meta();
        let call = self.prepare(args, &meta)?;
        let Device::Meta(recorder) = &meta else { unreachable!("just made") };
        recorder.take_report();
        let y = call()?;
        let work = recorder.take_report().total();
        let [n, h, w, _] = y.dims("bench models", "result")?;
        Ok(match self {
            Part::Denoiser => {
                let network = if Source::of(args)?.denoiser() == TRANSFORMER { TRANSFORMER } else { "UNet" };
                (format!("{network}, guided step of {} [{n},{h},{w}]", args.batch), work)
            }
            Part::Vae => (format!("VAE, decode {n} of {w}x{h}"), work),
        })
    }

    fn prepare(self, args: &ModelArgs, device: &Device) -> Result<Call> {
        let source = Source::of(args)?;
        let vae_config = match Part::of(&source)?.contains(&Part::Vae) {
            true => {
                let (what, json) = source.config("vae")?;
                Some(VaeConfig::from_json(&what, &json)?)
            }
            false => None,
        };
        let (what, json) = source.config(source.denoiser())?;
        let denoiser = match source.denoiser() {
            TRANSFORMER => Denoiser::Mmdit(MmditConfig::from_json(&what, &json)?),
            _ => Denoiser::Unet(Box::new(UnetConfig::from_json(&what, &json)?)),
        };
        let inputs = Inputs::new(device, args.dtype, 1);
        let factor = vae_config.as_ref().map_or(1, VaeConfig::factor);
        let (sample_size, patch) = match &denoiser {
            Denoiser::Mmdit(config) => (config.sample_size, config.patch_size),
            Denoiser::Unet(config) if config.is_of_pixels() => (config.sample_size, config.factor()),
            Denoiser::Unet(config) => (config.sample_size, 1),
        };
        let [own_h, own_w] = sample_size.unwrap_or([64, 64]);
        let own = (own_w * factor, own_h * factor);
        let (width, height) = args.size.map_or(own, |size| (size.width, size.height));
        let multiple = factor * patch;
        if width % multiple != 0 || height % multiple != 0 {
            let reason = format!("expected both sides as multiples of {multiple}");
            return Err(Error::Request { field: "--size", value: format!("{width}x{height}"), reason });
        }
        let [h, w] = [height / factor, width / factor];
        let samples = 2 * args.batch;
        match (self, denoiser) {
            (Part::Vae, _) => {
                let vae_config = vae_config.ok_or_else(|| Error::config("bench models", "the model has no VAE"))?;
                let vae = Vae::load(source.store("vae", device, args.dtype)?, &vae_config)?;
                let latents = inputs.tensor(&[args.batch, h, w, vae_config.latent_channels])?;
                Ok(Box::new(move || vae.decode(&latents)))
            }
            (Part::Denoiser, Denoiser::Mmdit(config)) => {
                let transformer = Mmdit::load(source.store(TRANSFORMER, device, args.dtype)?, &config)?;
                let latents = inputs.tensor(&[samples, h, w, config.in_channels])?;
                let text = inputs.tensor(&[samples, TOKENS + T5_LENGTH, config.joint_attention_dim])?;
                let pooled = inputs.tensor(&[samples, config.pooled_projection_dim])?;
                let conditioning = transformer.condition(&text, &pooled, &[981.0])?;
                let step = StepIndex::one(device, 0)?;
                Ok(Box::new(move || transformer.forward(&latents, &step, &conditioning)))
            }
            (Part::Denoiser, Denoiser::Unet(config)) => {
                let unet = Unet::load(source.store(UNET, device, args.dtype)?, &config)?;
                let latents = inputs.tensor(&[samples, h, w, config.in_channels])?;
                let text = inputs.tensor(&[samples, TOKENS, config.text_dim()])?;
                let pooled = config.added.map(|added| inputs.tensor(&[samples, added.pooled_dim])).transpose()?;
                let sizes = [height, width, 0, 0, height, width].map(|side| side as f32);
                let time_ids = vec![sizes; samples];
                let added = pooled.as_ref().map(|pooled| AddedConditioning { pooled, time_ids: &time_ids });
                let noise_level = config.reads_noise_level.then_some(250.0);
                let told = TextConditioning { text: &text, added, guidance: None, noise_level };
                let conditioning = unet.condition(told, &[981.0])?;
                let step = StepIndex::one(device, 0)?;
                Ok(Box::new(move || unet.forward(&latents, &step, &conditioning, &UnetOptions::default())))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use megafuse::models::Family;

    /// The published parameter counts.
    #[test]
    fn random_models_have_the_published_size() {
        for (family, unet) in [(Family::Sd1, 859_520_964u64), (Family::Sd2, 865_910_724), (Family::Sdxl, 2_567_463_684)]
        {
            let shapes = RandomShapes::Published(family.into());
            let source = Source::Random(&shapes);
            let counted = |part: &str| -> u64 {
                let store = source.store(part, &Device::meta(), DType::BF16).unwrap();
                let (what, json) = source.config(part).unwrap();
                if part == "unet" {
                    Unet::from_weights(&store.root(), &UnetConfig::from_json(&what, &json).unwrap()).unwrap();
                } else {
                    Vae::from_weights(&store.root(), &VaeConfig::from_json(&what, &json).unwrap()).unwrap();
                }
                store.manifest().iter().map(|(_, shape)| shape.iter().product::<usize>() as u64).sum()
            };
            assert_eq!((counted("unet"), counted("vae")), (unet, 83_653_863), "{family:?}");
        }
    }
}
