//! The generation methods. A method talks to a [`DiffusionModel`] and fills the options
//! that the model offers per call; it never edits a model.
//!
//! A method is one file: a struct of its options with serde and a [`MethodSpec`], which [`METHODS`] lists. Its flags, their
//! help, JSON, a picture's text and the grid's labels follow from these (docs/architecture.md shows a whole one).

mod cache;
mod choices;
mod convolutions;
mod demofusion;
mod diffusehigh;
mod fouriscale;
mod frecas;
mod frequency_split;
mod hidiffusion;
mod hires_fix;
mod low_resolution;
mod megafusion;
mod method;
mod model;
mod multidiffusion;
mod observer;
mod parts;
mod pixelrush;
mod plain;
mod prediction;
mod ranges;
mod recorded;
mod relay;
mod run;
mod sampling;
mod scalecrafter;
mod scalediff;
mod size;
mod stages;
mod start;
mod upsample_guidance;
pub mod views;

pub use cache::{CacheKind, CacheOption, Caching, StepCache};
pub use choices::Choices;
pub use demofusion::{DEMOFUSION, DemoFusion, JitteredWindows, cosine_factors, gaussian_taps, phase_sizes};
pub use diffusehigh::{DIFFUSEHIGH, DiffuseHigh};
pub use fouriscale::{FOURISCALE, FouriScale};
pub use frecas::{FRECAS, FreCaS, FrecasUpsampler};
pub use frequency_split::{FrequencySplit, SplitGuidance};
pub use hidiffusion::{HIDIFFUSION, HiDiffusion};
pub use hires_fix::{Enlarged, HIRES_FIX, HiresFix};
pub use low_resolution::{LowEvaluation, LowResolution, LowSteps};
pub use megafusion::{MEGAFUSION, MEGAFUSION_PLUS, MegaFusion};
pub use method::{GenerationMethod, Method, MethodSpec, OptionKind, OptionSpec, from_options, text_of, without_effect};
pub use model::{Denoiser, DiffusionModel, NoiseSource, NoisedPicture, PatchInput, ViewPlaces};
pub use multidiffusion::{MULTIDIFFUSION, MultiDiffusion};
pub use observer::{Event, Observer, Silent, StepProgress, Watch, tell};
pub use parts::PartOptions;
pub use pixelrush::{PIXELRUSH, PixelRush};
pub use plain::{PLAIN, Plain};
pub use prediction::Prediction;
pub use ranges::RunRange;
pub use recorded::{RecordedSteps, StageInputs, StageSteps, StepKey};
pub use run::{ControlShares, ControlUse, ModelFacts, PublishedSchedule, Run};
pub use sampling::{Computed, Revise, Sampling, generate, generate_counted, images};
pub use scalecrafter::{SCALECRAFTER, ScaleCrafter};
pub use scalediff::{SCALEDIFF, ScaleDiff, structure_guidance};
pub use size::{Size, Stage, StageParts};
pub use stages::{Geometry, Sides, base_size, check_size, consecutive, relay_stages};
pub use start::{Known, Start, StartPicture};
pub use upsample_guidance::{UPSAMPLE_GUIDANCE, UpsampleGuidance, matched_timestep, pooled_power};

use crate::names::named;

/// Every method, in the order of the help.
pub static METHODS: &[&MethodSpec] = &[
    &PLAIN,
    &MEGAFUSION,
    &MEGAFUSION_PLUS,
    &HIRES_FIX,
    &HIDIFFUSION,
    &MULTIDIFFUSION,
    &DEMOFUSION,
    &SCALECRAFTER,
    &DIFFUSEHIGH,
    &UPSAMPLE_GUIDANCE,
    &PIXELRUSH,
    &SCALEDIFF,
    &FRECAS,
    &FOURISCALE,
];

/// Where a relay clamps its picture to [-1, 1].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum RelayClamp {
    None,
    /// After the decoder.
    Decode,
    /// After the decoder and after the upsampler.
    #[default]
    Both,
}

named!(RelayClamp, [None => "none", Decode => "decode", Both => "both"]);
