//! The flags of DeepFloyd IF's second stage: alone, or behind a first one.

use std::path::{Path, PathBuf};

use clap::Args;
use clap::builder::PossibleValuesParser;
use megafuse::Result;
use megafuse::pipeline::{Lowres, LowresPicture, METHODS, Method, ModelSource, Request, SecondRequest};

use super::picture_args::conflict;
use super::values::{self, Stages};

#[derive(Args)]
#[command(next_help_heading = "DeepFloyd IF")]
pub struct PixelArgs {
    /// The picture that a second stage of DeepFloyd IF enlarges, where --model is one
    ///
    /// PNG, JPEG or WebP, or a safetensors file with lowres, f32 [1,3,H,W] from -1 to 1; 64x64 in training. Each stage reads it
    /// resized to its size, with noise. With --upscale-model the first stage's picture takes its place.
    #[arg(long, value_name = "FILE", value_parser = values::path())]
    pub lowres: Option<PathBuf>,

    /// How much noise the picture gets that a second stage enlarges: a training timestep, 0 to 999 (default: 250)
    ///
    /// More noise leaves more to the model.
    #[arg(long, value_name = "N")]
    pub noise_level: Option<usize>,

    /// Sizes and steps of the second stage: WxH:STEPS,... (default: planned for twice the size that it was trained at)
    #[arg(long, value_name = "LIST", value_parser = values::stages, requires = "upscale_model")]
    pub upscale_stages: Option<Stages>,

    /// Steps of the second stage, over all its stages (default: 50)
    #[arg(long, value_name = "N", requires = "upscale_model", conflicts_with = "upscale_stages")]
    pub upscale_steps: Option<usize>,

    /// Guidance scale of the second stage (default: 4)
    #[arg(long, value_name = "X", value_parser = values::guidance, requires = "upscale_model")]
    pub upscale_guidance: Option<f32>,

    /// Method of the second stage (default: megafusion++)
    #[arg(long, value_name = "METHOD", requires = "upscale_model",
          value_parser = PossibleValuesParser::new(METHODS.iter().map(|spec| spec.name)))]
    pub upscale_method: Option<String>,
}

impl PixelArgs {
    /// # Errors
    /// Those of the file.
    pub fn lowres(&self) -> Result<Option<Lowres>> {
        let Some(path) = &self.lowres else { return Ok(None) };
        Ok(Some(Lowres { picture: LowresPicture::read(path)?, noise_level: self.noise_level() }))
    }

    fn noise_level(&self) -> usize {
        self.noise_level.unwrap_or(Lowres::NOISE_LEVEL)
    }

    /// The run of the second stage in this folder; a super-resolution network, which is a file, has none.
    ///
    /// # Errors
    /// [`Error::Request`](megafuse::Error::Request): flags of a second stage beside such a network, or a noise level of no picture.
    pub fn second(&self, upscale_model: Option<&Path>) -> Result<Option<Box<SecondRequest>>> {
        let Some(source) = upscale_model.and_then(second_model) else {
            let given = [
                ("--upscale-stages", self.upscale_stages.as_ref().map(ToString::to_string)),
                ("--upscale-steps", self.upscale_steps.map(|steps| steps.to_string())),
                ("--upscale-guidance", self.upscale_guidance.map(|scale| scale.to_string())),
                ("--upscale-method", self.upscale_method.clone()),
                ("--noise-level", self.noise_level.filter(|_| self.lowres.is_none()).map(|level| level.to_string())),
            ];
            return match given.into_iter().find_map(|(flag, value)| Some((flag, value?))) {
                Some((flag, value)) => {
                    let reason = match flag {
                        "--noise-level" => {
                            "has no picture; give it with --lowres, or a second stage with --upscale-model"
                        }
                        _ => "is of a second stage of DeepFloyd IF, whose folder --upscale-model is to name",
                    };
                    Err(conflict(flag, value, reason))
                }
                None => Ok(None),
            };
        };
        let suited = Request::suited_to(&source);
        let method = match &self.upscale_method {
            Some(name) => name.parse::<Method>()?,
            None => suited.method.clone(),
        };
        let request = Request {
            method,
            stages: self.upscale_stages.as_ref().map_or(Vec::new(), |stages| stages.0.clone()),
            steps: self.upscale_steps,
            guidance: self.upscale_guidance.unwrap_or(suited.guidance),
            ..suited
        };
        Ok(Some(Box::new(SecondRequest { request, noise_level: self.noise_level() })))
    }
}

/// The second stage that `--upscale-model` names: a folder.
pub fn second_model(path: &Path) -> Option<ModelSource> {
    path.is_dir().then(|| ModelSource::Directory(path.to_path_buf()))
}
