//! DeepFloyd IF's embedding of the whole text, which is added to the timestep's: pooled by an attention with one query.

use crate::error::Result;
use crate::models::layers::{LayerNorm, Linear};
use crate::models::weights::Weights;
use crate::ops::{self, Attention};
use crate::runtime::{Device, Tensor};

const EPS: f32 = 1e-5;

/// `add_embedding` of a UNet whose `addition_embed_type` is "text".
pub(super) struct TextPooling {
    norm1: LayerNorm,             // [D]
    positional_embedding: Tensor, // [1, D]
    q_proj: Linear,               // [D, D]
    to_kv: Linear,                // [2 D, D]
    proj: Linear,                 // [T, D]
    norm2: LayerNorm,             // [T]
    heads: usize,
}

impl TextPooling {
    /// `width`: D, of the text; `out`: T, of the timestep's embedding.
    ///
    /// # Errors
    /// Those of the weights.
    pub(super) fn load(w: &Weights, width: usize, out: usize, heads: usize) -> Result<TextPooling> {
        let pool = w.at("pool");
        Ok(TextPooling {
            norm1: LayerNorm::load(&w.at("norm1"), width, EPS)?,
            positional_embedding: pool.tensor("positional_embedding", &[1, width])?,
            q_proj: Linear::load(&pool.at("q_proj"), width, width)?,
            to_kv: Linear {
                weight: pool.stacked(&["k_proj.weight", "v_proj.weight"], width, Some(width))?.into(),
                bias: Some(pool.stacked(&["k_proj.bias", "v_proj.bias"], width, None)?),
            },
            proj: Linear::load(&w.at("proj"), out, width)?,
            norm2: LayerNorm::load(&w.at("norm2"), out, EPS)?,
            heads,
        })
    }

    /// `text: [R, L, D]` to `[R, T]`: the query is the mean of the tokens, with a position of its own, and is itself read too.
    pub(super) fn forward(&self, text: &Tensor) -> Result<Tensor> {
        let [rows, length, width] = text.dims("unet", "text")?;
        let text = self.norm1.forward(text)?;
        let token = self.class_token(&text)?; // [R, D]
        let (heads, dim) = (self.heads, width / self.heads);
        let q = self.q_proj.forward(&token)?.reshape(&[rows, 1, heads, dim])?;
        let tokens = Tensor::concat_channels(&token, &text.reshape(&[rows, length * width])?)?;
        let tokens = tokens.reshape(&[rows, length + 1, width])?;
        let kv = self.to_kv.forward(&tokens)?.reshape(&[rows, length + 1, 2, heads, dim])?;
        let pooled = ops::attention(Attention::Cross { q: &q, kv: &kv })?.reshape(&[rows, width])?;
        self.norm2.forward(&self.proj.forward(&pooled)?)
    }

    /// The mean of the tokens with the position of this one: `[R, L, D]` to `[R, D]`, on the host, as it is computed once a run.
    fn class_token(&self, text: &Tensor) -> Result<Tensor> {
        let [rows, length, width] = text.dims("unet", "text")?;
        let (device, shape) = (text.device(), [rows, width]);
        if let Device::Meta(_) = device {
            return Tensor::uninit(device, &shape, text.dtype());
        }
        let (values, position) = (text.to_f32_vec()?, self.positional_embedding.to_f32_vec()?);
        let mut tokens = Vec::with_capacity(rows * width);
        for row in values.chunks_exact(length * width) {
            for (column, position) in position.iter().enumerate() {
                let sum: f64 = row.iter().skip(column).step_by(width).map(|&value| f64::from(value)).sum();
                tokens.push((sum / length as f64) as f32 + position);
            }
        }
        Tensor::from_f32(device, &shape, text.dtype(), &tokens)
    }
}
