use std::path::PathBuf;

use serde_json::json;

use super::files::stem;
use super::second::SecondModel;
use super::{ControlInput, IpAdapterFile, IpImage, Lora, Lowres, Pipeline, Request, SizeIds, TextOptions};
use crate::image::infotext;
use crate::methods::{Computed, Run, Stage, text_of};
use crate::rng::RngKind;
use crate::schedulers::{Sampler, SigmaSpacing};
use crate::text::{LongPrompt, Syntax};

/// How a picture was made, for its file.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameters {
    /// As stable-diffusion-webui writes it (PNG text chunk `parameters`).
    pub text: String,
    /// Everything, as a JSON object (PNG text chunk `megafuse`).
    pub json: serde_json::Value,
}

impl Parameters {
    pub(super) fn new(request: &Request, run: &Run, pipeline: &Pipeline, seed: u64) -> Parameters {
        let last = run.last_stage();
        let stages: Vec<String> = run.stages().iter().map(Stage::to_string).collect();
        let steps = run.scheduler().timesteps().len();
        let version = concat!("megafuse ", env!("CARGO_PKG_VERSION"));
        let method = run.method();
        let sampler = run.scheduler().sampler();
        // Without guidance nothing steers away from it.
        let negative = request.negative_prompt.as_deref().filter(|_| run.guidance().is_some()).unwrap_or_default();

        let mut fields = vec![
            ("Steps".to_string(), steps.to_string()),
            ("Sampler".to_string(), webui_sampler(sampler).0.to_string()),
            ("CFG scale".to_string(), request.guidance.to_string()),
            ("Seed".to_string(), seed.to_string()),
            ("Size".to_string(), last.size.to_string()),
            ("Model".to_string(), pipeline.name().to_string()),
            ("Method".to_string(), method.to_string()),
        ];
        if request.guidance_rescale != 0.0 {
            fields.push(("CFG rescale".into(), request.guidance_rescale.to_string()));
        }
        let high = run.guidance_high();
        if let Some(high) = high {
            fields.push(("CFG scale high".into(), high.to_string()));
        }
        let spacing = run.scheduler().sigma_spacing();
        if spacing != SigmaSpacing::Uniform {
            fields.push(("Schedule type".into(), spacing.webui_name().to_string()));
        }
        let eta = webui_sampler(sampler).1.unwrap_or(run.scheduler().eta());
        if eta != 0.0 {
            fields.push(("Eta DDIM".into(), eta.to_string()));
        }
        if method.spec().relays {
            fields.push(("Stages".into(), stages.join(" ")));
        }
        fields.extend(method.options().iter().map(|(name, value)| (title(name), text_of(value))));
        fields.push(("RNG".into(), webui_rng(request.rng).to_string()));
        fields.push(("Dtype".into(), pipeline.dtype().to_string()));
        fields.push(("Version".into(), version.to_string()));

        let mut json = json!({
            "prompt": request.prompt, "negative_prompt": negative, "model": pipeline.name(),
            "method": method.name(), "size": last.size.to_string(), "stages": stages, "steps": steps,
            "scheduler": sampler.name(), "sigmas": spacing.to_string(), "eta": run.scheduler().eta(),
            "guidance": decimal(request.guidance), "seed": seed, "rng": request.rng.name(),
            "dtype": pipeline.dtype().name(), "device": pipeline.device().to_string(), "version": version,
        });
        if request.guidance_rescale != 0.0 {
            json["guidance_rescale"] = decimal(request.guidance_rescale).into();
        }
        if let Some(high) = high {
            json["guidance_high"] = decimal(high).into();
        }
        // The empty prompt is not for every family what no prompt is.
        if run.guidance().is_some() && request.negative_prompt.as_deref() == Some("") {
            json["negative_prompt_is_empty"] = true.into();
        }
        if !pipeline.loras().is_empty() {
            let lora = |lora: &Lora| format!("{}:{}", lora.name(), lora.weight);
            fields.push(("Lora".into(), pipeline.loras().iter().map(lora).collect::<Vec<_>>().join(", ")));
            let lora = |lora: &Lora| json!({"name": lora.name(), "weight": decimal(lora.weight)});
            json["loras"] = pipeline.loras().iter().map(lora).collect();
        }
        if let Some(resadapter) = pipeline.resadapter() {
            let (name, weight) = (resadapter.name(), resadapter.weight);
            fields.push(("ResAdapter".into(), format!("{name}:{weight}")));
            json["resadapter"] = json!({"name": name, "weight": decimal(weight)});
        }
        if !request.ip_images.is_empty() {
            let files = pipeline.ip_adapters();
            let adapter = |file: &IpAdapterFile| format!("{}:{}", file.name(), file.scale);
            fields.push(("IP-Adapter".into(), files.iter().map(adapter).collect::<Vec<_>>().join(", ")));
            let picture = |image: &IpImage| image.picture.name().to_string();
            fields.push(("IP images".into(), request.ip_images.iter().map(picture).collect::<Vec<_>>().join(", ")));
            let adapter = |file: &IpAdapterFile| json!({"name": file.name(), "scale": decimal(file.scale)});
            json["ip_adapters"] = files.iter().map(adapter).collect();
            json["ip_images"] = request.ip_images.iter().map(IpImage::to_json).collect();
        }
        if !pipeline.embeddings().is_empty() {
            fields.push(("Embeddings".into(), pipeline.embeddings().join(", ")));
            json["embeddings"] = pipeline.embeddings().into();
        }
        if let Some(vae) = pipeline.vae_name() {
            fields.push(("VAE".into(), vae.to_string()));
            json["vae"] = vae.into();
        }
        if let Some(upscaler) = pipeline.upscaler() {
            upscaler.describe(&mut fields, &mut json);
        }
        if !request.choices.is_empty() {
            fields.push(("Choices".into(), request.choices.source()));
            json["choices"] = request.choices.source().into();
        }
        if let Some(cache) = run.cache() {
            fields.push(("Cache".into(), cache.kind().to_string()));
            fields.push(("Cache options".into(), cache.options_text()));
            json["cache"] = cache.kind().name().into();
            json["cache_options"] = cache.options_text().into();
        }
        for (name, value) in pipeline.options().named() {
            fields.push((title(name), value.to_string()));
            json[name] = value.into();
        }
        let TextOptions { syntax, long_prompt, clip_skip, t5_length } = request.text;
        if let Some(clip_skip) = clip_skip {
            fields.push(("Clip skip".into(), clip_skip.to_string()));
            json["clip_skip"] = clip_skip.into();
        }
        if let Some(length) = t5_length {
            fields.push(("T5 length".into(), length.to_string()));
            json["t5_length"] = length.into();
        }
        // Without these the JSON is that of a prompt read as words.
        if syntax != Syntax::default() {
            fields.push(("Prompt syntax".into(), syntax.to_string()));
            json["prompt_syntax"] = syntax.name().into();
        }
        if long_prompt != LongPrompt::default() {
            fields.push(("Long prompt".into(), long_prompt.to_string()));
            json["long_prompt"] = long_prompt.name().into();
        }
        if let Some(init) = &request.init_image {
            if let Some(strength) = init.strength_with(method) {
                fields.push(("Denoising strength".into(), strength.to_string()));
                json["strength"] = strength.into();
            }
            for (key, picture) in [("init_image", Some(&init.picture)), ("mask", init.mask.as_ref())] {
                let Some(picture) = picture else { continue };
                fields.push((title(key), picture.name().to_string()));
                json[key] = picture.name().into();
                json[format!("{key}_digest")] = picture.digest().into();
            }
        }
        if !request.controls.is_empty() {
            let paths = &pipeline.options().controls;
            let controls = || request.controls.iter().zip(paths).map(|(input, path)| input.described(path));
            fields.push(("ControlNet".into(), controls().map(|(text, _)| text).collect::<Vec<_>>().join("; ")));
            json["controls"] = controls().map(|(_, json)| json).collect();
            // Of a run that is made again with another scale these are the same.
            let file = |(input, path): (&ControlInput, &PathBuf)| format!("{}: {}", stem(path), input.image.digest());
            json["control_files"] = request.controls.iter().zip(paths).map(file).collect();
        }
        if let Some(Lowres { picture, noise_level }) = &request.lowres {
            fields.push(("Lowres".into(), picture.name().to_string()));
            fields.push(("Noise level".into(), noise_level.to_string()));
            json["lowres"] = picture.name().into();
            json["lowres_digest"] = picture.digest().into();
            json["noise_level"] = (*noise_level).into();
        }
        let SizeIds { original, crop, target } = request.size_ids;
        for (name, value) in [
            ("original_size", original.map(|size| size.to_string())),
            ("crop", crop.map(|(x, y)| format!("{x},{y}"))),
            ("target_size", target.map(|size| size.to_string())),
        ] {
            if let Some(value) = value {
                fields.push((title(name), value.clone()));
                json[name] = value.into();
            }
        }
        for (name, value) in method.options() {
            json[name] = value.clone();
        }
        let fields: Vec<(&str, String)> = fields.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
        Parameters { text: infotext(&request.prompt, negative, &fields), json }
    }

    /// With the second model's run of it.
    pub(super) fn with_second(mut self, second: &SecondModel, run: &Run, request: &Request) -> Parameters {
        let mut fields = Vec::new();
        second.describe(request, run, &mut fields, &mut self.json);
        for (name, value) in fields {
            self.text += &format!(", {name}: {value}");
        }
        self
    }

    /// With what is known only once the picture is made: how many of its evaluations a cache left to the network.
    pub(super) fn with_computed(mut self, computed: Option<Computed>) -> Parameters {
        if let Some(computed) = computed {
            self.text += &format!(", Cache computed: {computed}");
            self.json["cache_computed"] = computed.to_string().into();
        }
        self
    }
}

/// 7.1, not the 7.099999904632568 that the f32 is.
fn decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

/// A sampler's name in stable-diffusion-webui, and its eta where the name alone does not say it: DDPM is there DDIM with
/// an eta of 1 (Song et al. 2020, arXiv:2010.02502, section 4.1).
fn webui_sampler(sampler: Sampler) -> (&'static str, Option<f64>) {
    match sampler {
        Sampler::Ddpm => (Sampler::Ddim.webui_name(), Some(1.0)),
        sampler => (sampler.webui_name(), None),
    }
}

/// The source of noise as stable-diffusion-webui names it; `NV` is its copy of the generator of NVIDIA's cards.
fn webui_rng(rng: RngKind) -> &'static str {
    match rng {
        RngKind::TorchCpu => "CPU",
        RngKind::TorchCuda => "NV",
    }
}

/// `relay_clamp` as `Relay clamp`.
fn title(name: &str) -> String {
    let words = name.replace('_', " ");
    let mut letters = words.chars();
    letters.next().map(|first| first.to_uppercase().chain(letters).collect()).unwrap_or_default()
}
