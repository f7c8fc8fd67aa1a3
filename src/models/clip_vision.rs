//! CLIP image encoder as transformers' `CLIPVisionModelWithProjection` stores it. Radford et al. 2021, arXiv:2103.00020,
//! sec. 2.4; Dosovitskiy et al. 2020, arXiv:2010.11929; Cherti et al. 2022, arXiv:2212.07143 for ViT-H and bigG, which
//! IP-Adapters read.

use serde_json::Value;

use super::clip::{EncoderLayer, EncoderShape, hidden_act};
use super::config::{JsonConfig, most};
use super::layers::{LayerNorm, Linear};
use super::weights::{WeightStore, Weights};
use crate::error::{Error, Result};
use crate::ops::{self, Activation};
use crate::runtime::{DType, Device, Tensor};

/// `config.json` of an image encoder; absent keys take the class defaults of transformers.
#[derive(Clone, Debug, PartialEq)]
pub struct ClipVisionConfig {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    /// Width of the projected embedding.
    pub projection_dim: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    /// Height and width of the picture, in pixels.
    pub image_size: usize,
    /// Height and width of a patch; what is left over at the right and the bottom is not read.
    pub patch_size: usize,
    pub hidden_act: Activation,
    pub layer_norm_eps: f32,
}

/// Colours of a pixel.
const CHANNELS: usize = 3;

impl ClipVisionConfig {
    /// Parses and checks config.json; `what` (its path) stands in errors.
    ///
    /// # Errors
    /// [`Error::Config`]: not JSON, another kind of model, or a key whose value cannot be used, and what could be.
    pub fn from_json(what: &str, json: &str) -> Result<ClipVisionConfig> {
        let keys = JsonConfig::parse(what, json, "CLIPVisionModelWithProjection")?;
        keys.only("model_type", &["clip_vision_model".into(), Value::Null])?;
        keys.only("num_channels", &[CHANNELS.into()])?;
        let names = keys.names("architectures", &["CLIPVisionModelWithProjection"])?;
        if !names.iter().any(|name| name == "CLIPVisionModelWithProjection") {
            return Err(keys.error("architectures", "an image encoder is a CLIPVisionModelWithProjection"));
        }
        let hidden_act = hidden_act(&keys)?;
        let config = ClipVisionConfig {
            hidden_size: keys.count("hidden_size", 768, most::CHANNELS)?,
            intermediate_size: keys.count("intermediate_size", 3072, most::CHANNELS)?,
            projection_dim: keys.count("projection_dim", 512, most::CHANNELS)?,
            num_hidden_layers: keys.count("num_hidden_layers", 12, most::LAYERS)?,
            num_attention_heads: keys.count("num_attention_heads", 12, most::CHANNELS)?,
            image_size: keys.count("image_size", 224, most::SIDE)?,
            patch_size: keys.count("patch_size", 32, most::SIDE)?,
            hidden_act,
            layer_norm_eps: keys.positive("layer_norm_eps", 1e-5)? as f32,
        };
        if !config.hidden_size.is_multiple_of(config.num_attention_heads) {
            let reason = format!("expected a number that divides hidden_size = {}", config.hidden_size);
            return Err(keys.error("num_attention_heads", reason));
        }
        if config.patch_size > config.image_size {
            return Err(keys.error("patch_size", format!("expected at most image_size = {}", config.image_size)));
        }
        Ok(config)
    }

    /// Patches along a side.
    fn grid(&self) -> usize {
        self.image_size / self.patch_size
    }

    /// Tokens of a picture: the class token and the patches.
    pub fn tokens(&self) -> usize {
        1 + self.grid() * self.grid()
    }

    /// `pixels: [image_size, image_size, 3]`, patch by patch as the first layer reads them, `[patches, patch * patch * 3]`.
    fn patches(&self, pixels: &[f32], patches: &mut Vec<f32>) {
        let (side, row) = (self.patch_size, self.image_size * CHANNELS);
        for at in 0..self.grid() * self.grid() {
            let (top, left) = (at / self.grid() * side, at % self.grid() * side);
            for y in top..top + side {
                patches.extend_from_slice(&pixels[y * row + left * CHANNELS..][..side * CHANNELS]);
            }
        }
    }
}

/// Which output of the encoder is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClipVisionOutput {
    /// `image_embeds`: the class token after the last layer and its norm, projected: `[N, projection_dim]`.
    Projected,
    /// `hidden_states[-2]`: every token as the last layer reads it, `[N, tokens, hidden_size]`.
    Penultimate,
}

/// The encoder. Field names are checkpoint keys, most of them below `vision_model.`
pub struct ClipVisionModel {
    config: ClipVisionConfig,
    device: Device,
    dtype: DType,
    class_embedding: Tensor,    // [1, C]
    patch_embedding: Linear,    // [C, P P 3], stored as a convolution with a stride of P, no bias
    position_embedding: Tensor, // [tokens, C]
    pre_layrnorm: LayerNorm,    // [C]; so spelt in the files
    layers: Vec<EncoderLayer>,
    post_layernorm: LayerNorm, // [C]
    visual_projection: Linear, // [projection_dim, C], no bias
}

impl ClipVisionModel {
    /// Takes every tensor of `store`: keys with or without `vision_model.`; `position_ids` of older files are let go.
    ///
    /// # Errors
    /// [`Error::Weight`]: missing, extra, of another shape, not finite; [`Error::OutOfMemory`].
    pub fn load(store: WeightStore, config: &ClipVisionConfig) -> Result<ClipVisionModel> {
        let store = ClipVisionModel::prepared(store)?;
        let model = ClipVisionModel::from_weights(&store.root(), config)?;
        store.finish()?;
        Ok(model)
    }

    /// A store without the tensors that files have and the model does not read.
    ///
    /// # Errors
    /// As [`WeightStore::rename`].
    pub fn prepared(mut store: WeightStore) -> Result<WeightStore> {
        store.rename(|key| (!key.ends_with("embeddings.position_ids")).then(|| key.to_string()))?;
        Ok(store)
    }

    /// Takes the model's tensors and leaves it to the caller to look for others.
    ///
    /// # Errors
    /// As [`load`](ClipVisionModel::load).
    pub fn from_weights(w: &Weights, config: &ClipVisionConfig) -> Result<ClipVisionModel> {
        let (c, eps) = (config.hidden_size, config.layer_norm_eps);
        let visual_projection = Linear::load_without_bias(&w.at("visual_projection"), config.projection_dim, c)?;
        let prefixed = w.at("vision_model");
        let w = if prefixed.contains("post_layernorm.weight") { &prefixed } else { w };
        let embeddings = w.at("embeddings");
        let shape = EncoderShape {
            hidden_size: c,
            intermediate_size: config.intermediate_size,
            heads: config.num_attention_heads,
            activation: config.hidden_act,
            eps,
            causal: false,
        };
        let layer = |i| EncoderLayer::load(&w.at(format!("encoder.layers.{i}")), shape);
        let patch = config.patch_size;
        let patch_embedding = embeddings.at("patch_embedding").conv("weight", c, CHANNELS, patch)?;
        Ok(ClipVisionModel {
            device: w.device().clone(),
            dtype: w.dtype(),
            class_embedding: embeddings.tensor("class_embedding", &[c])?.reshape(&[1, c])?,
            patch_embedding: Linear {
                weight: patch_embedding.reshape(&[c, patch * patch * CHANNELS])?.into(),
                bias: None,
            },
            position_embedding: embeddings.tensor("position_embedding.weight", &[config.tokens(), c])?,
            pre_layrnorm: LayerNorm::load(&w.at("pre_layrnorm"), c, eps)?,
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            post_layernorm: LayerNorm::load(&w.at("post_layernorm"), c, eps)?,
            visual_projection,
            config: config.clone(),
        })
    }

    pub fn config(&self) -> &ClipVisionConfig {
        &self.config
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    /// `pictures`: N times `[image_size, image_size, 3]`, normalised as the encoder was trained.
    ///
    /// # Errors
    /// [`Error::Argument`]: no picture, or one of another size; [`Error::OutOfMemory`].
    pub fn forward(&self, pictures: &[Vec<f32>], output: ClipVisionOutput) -> Result<Tensor> {
        const OP: &str = "ClipVisionModel";
        let (side, c, tokens) = (self.config.image_size, self.config.hidden_size, self.config.tokens());
        if let Some(other) = pictures.iter().find(|pixels| pixels.len() != side * side * CHANNELS) {
            let want = format!("{side}x{side} pixels of {CHANNELS} channels");
            return Err(Error::argument(OP, "values of a picture", other.len(), want));
        }
        let n = pictures.len();
        if n == 0 {
            return Err(Error::argument(OP, "pictures", n, "at least one"));
        }
        let mut patches = Vec::new();
        pictures.iter().for_each(|pixels| self.config.patches(pixels, &mut patches));
        let shape = [n * (tokens - 1), self.config.patch_size * self.config.patch_size * CHANNELS];
        let patches = Tensor::from_f32(&self.device, &shape, self.dtype, &patches)?;
        // Row 0 is the class token, which begins every picture's.
        let rows = Tensor::concat(&[self.class_embedding.clone(), self.patch_embedding.forward(&patches)?])?;
        let ids: Vec<u32> = (0..n * tokens).map(|i| if i % tokens == 0 { 0 } else { i - i / tokens } as u32).collect();
        let ids = Tensor::from_u32(&self.device, &[n, tokens], &ids)?;
        let mut x = self.pre_layrnorm.forward(&ops::embedding(&ids, &rows, &self.position_embedding)?)?; // [N, L, C]
        let asked = self.layers.len() - usize::from(output == ClipVisionOutput::Penultimate);
        for layer in &self.layers[..asked] {
            x = layer.forward(&x)?;
        }
        match output {
            ClipVisionOutput::Penultimate => Ok(x),
            ClipVisionOutput::Projected => {
                let class = (0..n).map(|i| x.reshape(&[n * tokens, c])?.rows(i * tokens..i * tokens + 1));
                let class = Tensor::concat(&class.collect::<Result<Vec<_>>>()?)?;
                self.visual_projection.forward(&self.post_layernorm.forward(&class)?)
            }
        }
    }
}
