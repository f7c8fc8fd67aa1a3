//! AutoencoderKL of the SD 1.x/2.x family. Kingma & Welling 2013, arXiv:1312.6114; Rombach et al. 2022, arXiv:2112.10752.

use super::weights::WeightStore;
use crate::error::Result;
use crate::runtime::Tensor;

/// `vae/config.json`; absent keys take the class defaults of diffusers.
#[derive(Clone, Debug)]
pub struct VaeConfig {
    pub latent_channels: usize,
    pub scaling_factor: f64,
    pub shift_factor: f64,
    // the owner of this file adds the rest
}

impl VaeConfig {
    /// Parses and checks config.json; `what` (its path) stands in errors.
    pub fn from_json(_what: &str, _json: &str) -> Result<VaeConfig> {
        unimplemented!()
    }

    /// Pixels per latent cell and side: 2^(levels - 1).
    pub fn factor(&self) -> usize {
        unimplemented!()
    }
}

pub struct Vae {}

impl Vae {
    /// Old attention names (query, key, value, proj_attn) are accepted.
    pub fn load(_store: WeightStore, _config: &VaeConfig) -> Result<Vae> {
        unimplemented!()
    }

    pub fn config(&self) -> &VaeConfig {
        unimplemented!()
    }

    /// `image: [N, H, W, 3]` in [-1, 1] to moments `[N, H/f, W/f, 2 * latent_channels]`: mean, log variance (raw).
    pub fn encode(&self, _image: &Tensor) -> Result<Tensor> {
        unimplemented!()
    }

    /// `latent: [N, h, w, latent_channels]`, already divided by the scaling factor, to `[N, f h, f w, 3]`, not clamped.
    pub fn decode(&self, _latent: &Tensor) -> Result<Tensor> {
        unimplemented!()
    }
}
