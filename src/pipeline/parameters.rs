use serde_json::json;

use super::{Pipeline, Request};
use crate::image::infotext;
use crate::methods::{Method, Plan, Stage};
use crate::ops::Upsampler;
use crate::rng::RngKind;

/// How a picture was made, for its file.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameters {
    /// As stable-diffusion-webui writes it (PNG text chunk `parameters`).
    pub text: String,
    /// Everything, as a JSON object (PNG text chunk `megafuse`).
    pub json: serde_json::Value,
}

impl Parameters {
    pub(super) fn new(request: &Request, plan: &Plan, pipeline: &Pipeline, seed: u64) -> Parameters {
        let last = plan.stages[plan.stages.len() - 1];
        let stages: Vec<String> = plan.stages.iter().map(Stage::to_string).collect();
        let steps: usize = plan.stages.iter().map(|stage| stage.steps).sum();
        let version = concat!("megafuse ", env!("CARGO_PKG_VERSION"));
        let megafusion = plan.method != Method::Plain;

        let mut fields = vec![
            ("Steps", steps.to_string()),
            ("Sampler", plan.scheduler.sampler().webui_name().to_string()),
            ("CFG scale", request.guidance.to_string()),
            ("Seed", seed.to_string()),
            ("Size", last.size.to_string()),
            ("Model", pipeline.name().to_string()),
            ("Method", plan.method.to_string()),
        ];
        if request.eta != 0.0 {
            fields.push(("Eta", request.eta.to_string()));
        }
        if megafusion {
            fields.push(("Stages", stages.join(" ")));
            fields.push(("Upsampler", upsampler_name(plan.upsampler).to_string()));
            fields.push(("Relay clamp", plan.relay_clamp.to_string()));
            fields.push(("Reschedule", plan.reschedule.to_string()));
            if let Some(gamma) = plan.gamma {
                fields.push(("Gamma", gamma.to_string()));
            }
            fields.push(("Dilation", plan.dilation.to_string()));
            fields.push(("Relay noise offset", plan.relay_noise_offset.to_string()));
            if plan.reference_compat {
                fields.push(("Reference compat", "true".into()));
            }
        }
        fields.push(("RNG", rng_name(request.rng).to_string()));
        fields.push(("Dtype", pipeline.dtype().to_string()));
        fields.push(("Version", version.to_string()));

        let mut json = json!({
            "prompt": request.prompt, "negative_prompt": request.negative_prompt, "model": pipeline.name(),
            "method": plan.method.name(), "size": last.size.to_string(), "stages": stages, "steps": steps,
            "scheduler": plan.scheduler.sampler().name(), "eta": request.eta,
            "guidance": decimal(request.guidance), "seed": seed, "rng": rng_name(request.rng),
            "dtype": pipeline.dtype().name(), "device": pipeline.device().to_string(), "version": version,
        });
        if megafusion {
            json["upsampler"] = upsampler_name(plan.upsampler).into();
            json["relay_clamp"] = plan.relay_clamp.name().into();
            json["reschedule"] = plan.reschedule.into();
            if let Some(gamma) = plan.gamma {
                json["gamma"] = gamma.into();
            }
            json["dilation"] = plan.dilation.into();
            json["relay_noise_offset"] = plan.relay_noise_offset.into();
            json["reference_compat"] = plan.reference_compat.into();
        }
        Parameters { text: infotext(&request.prompt, &request.negative_prompt, &fields), json }
    }
}

/// 7.1, not the 7.099999904632568 that the f32 is.
fn decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

fn rng_name(rng: RngKind) -> &'static str {
    match rng {
        RngKind::TorchCpu => "torch-cpu",
        RngKind::TorchCuda => "torch-cuda",
    }
}

fn upsampler_name(upsampler: Upsampler) -> &'static str {
    match upsampler {
        Upsampler::Bilinear => "bilinear",
        Upsampler::Bicubic => "bicubic",
        Upsampler::BicubicTorch => "bicubic-torch",
        Upsampler::BicubicGaussian => "bicubic-gaussian",
        Upsampler::BicubicEdge => "bicubic-edge",
    }
}
