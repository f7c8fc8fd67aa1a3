use serde_json::json;

use super::{Pipeline, Request};
use crate::image::infotext;
use crate::methods::{Run, Stage, text_of};
use crate::schedulers::Sampler;

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
        let steps: usize = run.stages().iter().map(|stage| stage.steps).sum();
        let version = concat!("megafuse ", env!("CARGO_PKG_VERSION"));
        let method = run.method();
        let sampler = run.scheduler().sampler();

        let mut fields = vec![
            ("Steps".to_string(), steps.to_string()),
            ("Sampler".to_string(), webui_name(sampler).to_string()),
            ("CFG scale".to_string(), request.guidance.to_string()),
            ("Seed".to_string(), seed.to_string()),
            ("Size".to_string(), last.size.to_string()),
            ("Model".to_string(), pipeline.name().to_string()),
            ("Method".to_string(), method.to_string()),
        ];
        if request.eta != 0.0 {
            fields.push(("Eta".into(), request.eta.to_string()));
        }
        if method.spec().relays {
            fields.push(("Stages".into(), stages.join(" ")));
        }
        fields.extend(method.options().iter().map(|(name, value)| (title(name), text_of(value))));
        fields.push(("RNG".into(), request.rng.name().to_string()));
        fields.push(("Dtype".into(), pipeline.dtype().to_string()));
        fields.push(("Version".into(), version.to_string()));

        let mut json = json!({
            "prompt": request.prompt, "negative_prompt": request.negative_prompt, "model": pipeline.name(),
            "method": method.name(), "size": last.size.to_string(), "stages": stages, "steps": steps,
            "scheduler": sampler.name(), "eta": request.eta,
            "guidance": decimal(request.guidance), "seed": seed, "rng": request.rng.name(),
            "dtype": pipeline.dtype().name(), "device": pipeline.device().to_string(), "version": version,
        });
        for (name, value) in method.options() {
            json[name] = value.clone();
        }
        let fields: Vec<(&str, String)> = fields.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
        Parameters { text: infotext(&request.prompt, &request.negative_prompt, &fields), json }
    }
}

/// 7.1, not the 7.099999904632568 that the f32 is.
fn decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

fn webui_name(sampler: Sampler) -> &'static str {
    match sampler {
        Sampler::Ddim => "DDIM",
        Sampler::Ddpm => "DDPM",
        Sampler::Euler => "Euler",
        Sampler::EulerAncestral => "Euler a",
    }
}

/// `relay_clamp` as `Relay clamp`.
fn title(name: &str) -> String {
    let words = name.replace('_', " ");
    let mut letters = words.chars();
    letters.next().map(|first| first.to_uppercase().chain(letters).collect()).unwrap_or_default()
}
