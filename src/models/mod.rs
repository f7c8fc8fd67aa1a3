//! The networks: field names are checkpoint keys, shapes stand beside them, a forward reads like the figure.

pub mod clip;
mod config;
pub mod layers;
pub mod unet;
pub mod vae;
pub mod weights;

pub use clip::{ClipOutput, ClipTextConfig, ClipTextModel, TextEmbeddings};
pub use unet::{AddedConditioning, TIME_IDS, TextConditioning, Unet, UnetConditioning, UnetConfig, UnetOptions};
pub use vae::{Vae, VaeConfig};
pub use weights::{WeightStore, Weights};
