//! UNet2DConditionModel of the SD 1.x/2.x family. Rombach et al. 2022, arXiv:2112.10752.

use super::weights::WeightStore;
use crate::error::Result;
use crate::runtime::Tensor;

/// `unet/config.json`; absent keys take the class defaults of diffusers.
#[derive(Clone, Debug)]
pub struct UnetConfig {
    pub in_channels: usize,
    pub out_channels: usize,
    /// Native latent height and width: [H, W].
    pub sample_size: Option<[usize; 2]>,
    pub cross_attention_dim: usize,
    // the owner of this file adds the rest
}

impl UnetConfig {
    /// Parses and checks config.json; `what` (its path) stands in errors.
    pub fn from_json(_what: &str, _json: &str) -> Result<UnetConfig> {
        unimplemented!()
    }
}

/// What a method may ask of a call.
#[derive(Clone, Debug, PartialEq)]
pub struct UnetOptions {
    /// Dilation (and padding) of the mid block's four 3x3 convs: 1, or 2 in MegaFusion++'s later stages.
    pub mid_dilation: usize,
}

impl Default for UnetOptions {
    fn default() -> UnetOptions {
        UnetOptions { mid_dilation: 1 }
    }
}

/// What is the same for every step of a run, computed once: K and V of the text for every cross-attention, and each
/// ResNet's projection of every timestep's embedding.
pub struct UnetConditioning {
    _private: (),
}

pub struct Unet {}

impl Unet {
    pub fn load(_store: WeightStore, _config: &UnetConfig) -> Result<Unet> {
        unimplemented!()
    }

    pub fn config(&self) -> &UnetConfig {
        unimplemented!()
    }

    /// `text: [N, L, cross_attention_dim]`, the rows in the order of the samples' (unconditional first);
    /// `timesteps`: all of the run, in the order in which [`forward`](Unet::forward) will name them by index.
    pub fn condition(&self, _text: &Tensor, _timesteps: &[f32]) -> Result<UnetConditioning> {
        unimplemented!()
    }

    /// `x: [N, H, W, in_channels]` at timestep `timesteps[step]` to `[N, H, W, out_channels]`. Any H, W.
    pub fn forward(
        &self,
        _x: &Tensor,
        _step: usize,
        _text: &UnetConditioning,
        _options: &UnetOptions,
    ) -> Result<Tensor> {
        unimplemented!()
    }
}
