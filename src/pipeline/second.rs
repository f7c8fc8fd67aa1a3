//! A second model that enlarges what the first one makes, in one run: DeepFloyd IF's second stage. It reads the pictures unrounded, is
//! told the first one's prompts, and goes on with its generators, as the published pipelines do when they are called one after the
//! other with one generator.

use serde_json::Value;

use super::lowres::{Lowres, LowresPicture, PictureValues};
use super::memory::LoadOptions;
use super::{ModelSource, Pipeline, Request, SecondRequest};
use crate::error::{Error, Result};
use crate::methods::{Event, Observer, Run, Size, Stage, StepProgress};
use crate::runtime::{Device, Tensor};

/// Fields of a request that the second run has of its own, and what they are called beside the first one's.
const OWN_FIELDS: [(&str, &str); 5] = [
    ("guidance", "second.guidance"),
    ("method", "second.method"),
    ("size", "second.size"),
    ("stages", "second.stages"),
    ("steps", "second.steps"),
];

fn own_name(field: &str) -> Option<&'static str> {
    OWN_FIELDS.iter().find(|(name, _)| *name == field).map(|(_, own)| *own)
}

/// A text that names fields as `request.steps`, with `request.second.steps` where the second run has its own.
fn with_own_names(text: &str) -> String {
    let mut parts = text.split("request.");
    let before = parts.next().unwrap_or_default().to_string();
    parts.fold(before, |text, part| {
        let end = part.find(|c: char| !(c.is_ascii_lowercase() || c == '_')).unwrap_or(part.len());
        let (field, rest) = part.split_at(end);
        format!("{text}request.{}{rest}", own_name(field).unwrap_or(field))
    })
}

/// The second model, loaded.
pub(super) struct SecondModel(Box<Pipeline>);

impl SecondModel {
    /// As the first one is loaded. `text_dim`: width of what the first one's text encoder says.
    ///
    /// # Errors
    /// As [`Pipeline::load_with`]; [`Error::Config`]: it enlarges nothing, or reads text of another width.
    pub fn open(source: &ModelSource, options: &LoadOptions, text_dim: Option<usize>) -> Result<SecondModel> {
        let options = LoadOptions { reads_prompts: false, second: None, ..options.clone() };
        let pipeline = Pipeline::load_with(source.clone(), options)?;
        let misfit = |reason: &str| Err(Error::config(format!("model {}", pipeline.name()), reason));
        if !pipeline.enlarges_lowres() {
            return misfit("enlarges no picture; expected a second stage of DeepFloyd IF (IFSuperResolutionPipeline)");
        }
        if text_dim != pipeline.text_dim() {
            return misfit("reads text of another width than the first model's text encoder gives (encoder_hid_dim)");
        }
        Ok(SecondModel(Box::new(pipeline)))
    }

    /// An error of the second run, by the names that its fields have beside the first one's.
    pub fn named(error: Error) -> Error {
        match error {
            Error::Request { field, value, reason } => {
                Error::Request { field: own_name(field).unwrap_or(field), value, reason: with_own_names(&reason) }
            }
            other => other,
        }
    }

    pub fn pipeline(&self) -> &Pipeline {
        &self.0
    }

    /// The second run of a picture: that of the request's own, else with the model's defaults. `picture`: what the first model
    /// made, `[1, H, W, 3]`, `None` before that.
    ///
    /// # Errors
    /// Those of the device.
    pub fn request(&self, first: &Request, picture: Option<&Tensor>) -> Result<Request> {
        let usual = || SecondRequest { request: self.0.suited_request(), noise_level: Lowres::NOISE_LEVEL };
        let SecondRequest { request: second, noise_level } = first.second.as_deref().cloned().unwrap_or_else(usual);
        let values = match picture {
            Some(picture) if !matches!(picture.device(), Device::Meta(_)) => {
                let [_, height, width, _] = picture.dims("generate", "picture")?;
                PictureValues::new("first stage", Size::new(width, height), picture.to_f32_vec()?)
            }
            _ => PictureValues::new("first stage", Size::new(1, 1), vec![0.0; 3]),
        };
        let lowres = Some(Lowres { picture: LowresPicture::Values(values), noise_level });
        let Request { prompt, negative_prompt, text, seed, rng, .. } = first.clone();
        Ok(Request { prompt, negative_prompt, text, seed, rng, lowres, count: 1, batch: first.batch, ..second })
    }

    /// Says in a picture's text and its JSON that this model made it larger.
    pub fn describe(&self, request: &Request, run: &Run, fields: &mut Vec<(String, String)>, json: &mut Value) {
        let stages: Vec<String> = run.stages().iter().map(Stage::to_string).collect();
        let level = request.lowres.as_ref().map_or(Lowres::NOISE_LEVEL, |lowres| lowres.noise_level);
        fields.push(("Upscale model".into(), self.0.name().into()));
        fields.push(("Upscale stages".into(), stages.join(" ")));
        fields.push(("Upscale CFG scale".into(), request.guidance.to_string()));
        fields.push(("Noise level".into(), level.to_string()));
        json["second_model"] = self.0.name().into();
        json["upscale_method"] = run.method().name().into();
        json["upscale_stages"] = stages.join(",").into();
        json["upscale_guidance"] = request.guidance.to_string().parse::<f64>().unwrap_or_default().into();
        json["noise_level"] = level.into();
    }
}

/// Tells the observer of both runs about one of them: its stages and steps stand among those of both, and the second's tensors are
/// called `second.*`.
pub(super) struct OneOfTwo<'a> {
    pub observer: &'a mut dyn Observer,
    pub is_second: bool,
    /// Stages and steps of the other run.
    pub other: (usize, usize),
}

impl OneOfTwo<'_> {
    fn named(&self, name: &str) -> String {
        if self.is_second { format!("second.{name}") } else { name.into() }
    }
}

impl Observer for OneOfTwo<'_> {
    fn event(&mut self, event: &Event) {
        let mut event = event.clone();
        let (other_stages, other_steps) = self.other;
        let (stages_before, steps_before) = if self.is_second { self.other } else { (0, 0) };
        match &mut event {
            Event::PictureBegins { .. } | Event::PictureEnds { .. } if self.is_second => return,
            Event::StageBegins { stage, stages, .. } => {
                *stage += stages_before;
                *stages += other_stages;
            }
            Event::Condition { stage }
            | Event::EncodePicture { stage }
            | Event::Relay { stage, .. }
            | Event::RelayUpsample { stage }
            | Event::RelayEncode { stage }
            | Event::PhaseEnds { stage } => *stage += stages_before,
            Event::Step(StepProgress { stage, run_step, run_steps, .. }) => {
                *stage += stages_before;
                *run_step += steps_before;
                *run_steps += other_steps;
            }
            _ => {}
        }
        self.observer.event(&event);
    }

    fn cancelled(&self) -> bool {
        self.observer.cancelled()
    }

    fn warning(&mut self, message: &str) {
        self.observer.warning(message);
    }

    fn wants_tensors(&self, index: usize) -> bool {
        self.observer.wants_tensors(index)
    }

    fn tensor(&mut self, index: usize, name: &str, shape: &[usize], values: Vec<f32>) -> Result<()> {
        self.observer.tensor(index, &self.named(name), shape, values)
    }

    fn phase(&mut self, index: usize, phase: usize, size: [usize; 2], values: Vec<f32>) -> Result<()> {
        self.observer.phase(index, phase, size, values)
    }

    fn integers(&mut self, index: usize, name: &str, shape: &[usize], values: Vec<i64>) -> Result<()> {
        self.observer.integers(index, &self.named(name), shape, values)
    }
}
