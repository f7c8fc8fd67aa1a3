//! CLIP text encoder (Radford et al. 2021, arXiv:2103.00020) as transformers' `CLIPTextModel` stores it.

use super::weights::WeightStore;
use crate::error::Result;
use crate::runtime::Tensor;

/// `text_encoder/config.json`; absent keys take the class defaults of transformers.
#[derive(Clone, Debug, serde::Deserialize)]
pub struct ClipTextConfig {}

impl ClipTextConfig {
    /// Parses and checks config.json; `what` (its path) stands in errors.
    pub fn from_json(_what: &str, _json: &str) -> Result<ClipTextConfig> {
        unimplemented!()
    }
}

pub struct ClipTextModel {}

/// All f32-or-dtype tensors of the tokens `[N, L]`.
pub struct TextEmbeddings {
    /// After the final layer norm: `[N, L, C]`.
    pub last_hidden_state: Tensor,
    /// Input of the last layer, `hidden_states[-2]`: `[N, L, C]`.
    pub penultimate: Tensor,
    /// `last_hidden_state` at each row's first end-of-text token: `[N, C]`.
    pub pooled: Tensor,
}

impl ClipTextModel {
    /// Takes every tensor of `store` (dropping `position_ids`, accepting keys with and without `text_model.`).
    pub fn load(_store: WeightStore, _config: &ClipTextConfig) -> Result<ClipTextModel> {
        unimplemented!()
    }

    /// `ids`: N rows of equal length L, at most `max_position_embeddings`.
    pub fn forward(&self, _ids: &[Vec<u32>]) -> Result<TextEmbeddings> {
        unimplemented!()
    }
}
