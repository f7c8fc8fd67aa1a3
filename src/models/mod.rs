//! The networks: field names are checkpoint keys, shapes stand beside them, a forward reads like the figure.

pub mod adapters;
pub mod clip;
pub mod clip_vision;
mod config;
mod control_file;
mod foreign;
pub mod ip_adapter;
pub mod layers;
mod ldm;
mod ldm_mmdit;
mod mmdit;
mod published;
mod rrdbnet;
pub mod single_file;
mod t5;
pub mod unet;
pub mod vae;
pub mod weights;

pub use adapters::Adapters;
pub use clip::{ClipOutput, ClipTextConfig, ClipTextModel, TextEmbeddings};
pub use clip_vision::{ClipVisionConfig, ClipVisionModel, ClipVisionOutput};
pub use control_file::ControlFile;
pub use foreign::Foreign;
pub use ip_adapter::{IpAdapter, IpAdapterConfig, IpAdapterKind};
pub use layers::Redilation;
pub use mmdit::{Mmdit, MmditConditioning, MmditConfig};
pub use published::{DeepFloydModel, PublishedModel};
pub use rrdbnet::{RrdbNet, RrdbNetConfig, Tiling};
pub use single_file::{Family, SingleFile};
pub use t5::{T5Config, T5Encoder};
pub use unet::{
    AddedConditioning, AttentionMapMemory, AttentionMaps, Conditioner, Control, ControlNet, ControlNetConfig,
    ControlOptions, ConvPlace, ConvRole, FourierConvs, ImageMasks, ImagePrompt, Redilations, TIME_IDS,
    TextConditioning, Unet, UnetBlock, UnetCall, UnetConditioning, UnetConfig, UnetOptions, ZeroConvs,
};
pub use vae::{Partition, Vae, VaeConfig};
pub use weights::{Part, Rewritten, Unused, WeightFile, WeightFormat, WeightStore, Weights, rewrite};
