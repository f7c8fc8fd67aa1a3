//! The networks: field names are checkpoint keys, shapes stand beside them, a forward reads like the figure.

pub mod adapters;
pub mod clip;
mod config;
mod control_file;
mod foreign;
pub mod layers;
mod ldm;
mod ldm_mmdit;
mod rrdbnet;
pub mod single_file;
mod t5;
pub mod unet;
pub mod vae;
pub mod weights;

pub use adapters::Adapters;
pub use clip::{ClipOutput, ClipTextConfig, ClipTextModel, TextEmbeddings};
pub use control_file::ControlFile;
pub use foreign::Foreign;
pub use layers::Redilation;
pub use rrdbnet::{RrdbNet, RrdbNetConfig, Tiling};
pub use single_file::{Family, SingleFile};
pub use t5::{T5Config, T5Encoder};
pub use unet::{
    AddedConditioning, AttentionMapMemory, AttentionMaps, Control, ControlNet, ControlNetConfig, ControlOptions,
    ConvPlace, ConvRole, FourierConvs, Redilations, TIME_IDS, TextConditioning, Unet, UnetBlock, UnetCall,
    UnetConditioning, UnetConfig, UnetOptions, ZeroConvs,
};
pub use vae::{Partition, Vae, VaeConfig};
pub use weights::{Part, Rewritten, Unused, WeightFile, WeightFormat, WeightStore, Weights, rewrite};
