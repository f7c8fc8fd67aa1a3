//! Prompt to picture: tokenize, encode, denoise with a method, decode.

mod control;
mod embedded;
mod families;
mod files;
mod hub;
mod ip_adapter;
mod lowres;
mod memory;
mod parameters;
mod plan;
mod quantize;
mod request;
mod resident;
mod run;
mod second;
mod start;
mod tensor_picture;
mod upscale;

pub use crate::hub::{HubName, HubObserver, HubSettings};
pub use crate::methods::{
    CacheKind, Choices, Computed, Enlarged, Event, HiresFix, METHODS, MegaFusion, Method, MethodSpec, Observer,
    OptionKind, OptionSpec, Plain, RelayClamp, Run, Silent, Size, Stage, StageParts, StepCache, StepProgress, text_of,
    without_effect,
};
pub use crate::models::Tiling;
pub use crate::ops::Upsampler;
pub use crate::rng::RngKind;
pub use crate::schedulers::{Sampler, SigmaSpacing};
pub use crate::text::{LongPrompt, Syntax, TextualInversion};
pub use control::{ControlFiles, ControlImage, ControlInput, StagePictures};
pub use files::{Lora, ModelFiles, ModelSource, RandomShapes, ResAdapter, hub_name};
pub use hub::{HubNeed, fetch_model};
#[doc(hidden)]
pub use ip_adapter::encoder_pixels;
pub use ip_adapter::{IpAdapterFile, IpImage};
pub use lowres::{Lowres, LowresPicture, PictureValues};
pub use memory::{LoadOptions, MemoryOptions, Residency, Rung, VaePartition};
pub use parameters::Parameters;
pub use plan::{OpCost, PhaseReport, PlanReport, Planner, WeightReport, plan};
pub use quantize::{QuantizeReport, quantize, unfinished_output};
pub use request::{IF_T5_LENGTH, Request, SecondRequest, SizeIds, T5_LENGTH, TextOptions};
pub use run::{Picture, Pipeline};
pub use start::{InitImage, InputPicture};
pub use upscale::{UpscaleOptions, Upscaler};
