//! DeepFloyd IF's attention: pixels attend to the text and to each other in one softmax.

use super::blocks::{Call, ToKv};
use super::config::AddedKvConfig;
use super::{UnetConditioning, UnetConfig};
use crate::error::Result;
use crate::models::layers::{GroupNorm, Linear};
use crate::models::weights::Weights;
use crate::ops::{self, Attention, AttentionOptions, SecondSource};
use crate::runtime::Tensor;

const EPS: f32 = 1e-5;
/// Groups of the text's norm.
const TEXT_GROUPS: usize = 32;

/// An attention behind a ResNet, with its residual.
pub(super) struct AddedKvAttention {
    group_norm: GroupNorm, // [C]
    /// Queries, and unless the text is all that is read keys and values behind them.
    to_qkv: Linear, // [3 C, C] or [C, C]
    to_out: Linear,        // [C, C]
    heads: usize,
    /// Index of the text's K and V.
    kv: usize,
}

impl AddedKvAttention {
    /// With the text's layer, whose number will be `kv`.
    ///
    /// # Errors
    /// Those of the weights.
    pub(super) fn load(
        w: &Weights,
        channels: usize,
        c: &AddedKvConfig,
        config: &UnetConfig,
        kv: usize,
    ) -> Result<(AddedKvAttention, ToKv)> {
        let own: &[[&str; 2]] = match c.only_text {
            true => &[["to_q.weight", "to_q.bias"]],
            false => &[["to_q.weight", "to_q.bias"], ["to_k.weight", "to_k.bias"], ["to_v.weight", "to_v.bias"]],
        };
        let to_qkv = Linear {
            weight: w.stacked_product(&own.iter().map(|names| names[0]).collect::<Vec<_>>(), channels, channels)?,
            bias: Some(w.stacked(&own.iter().map(|names| names[1]).collect::<Vec<_>>(), channels, None)?),
        };
        let text = config.cross_attention_dim;
        let norm = match c.norms_text {
            true => Some(GroupNorm::load(&w.at("norm_cross"), text, TEXT_GROUPS, EPS)?),
            false => None,
        };
        let to_kv = ToKv {
            weight: w.stacked(&["add_k_proj.weight", "add_v_proj.weight"], channels, Some(text))?,
            bias: Some(w.stacked(&["add_k_proj.bias", "add_v_proj.bias"], channels, None)?),
            norm,
            heads: c.heads,
        };
        let attention = AddedKvAttention {
            group_norm: GroupNorm::load(&w.at("group_norm"), channels, config.norm_num_groups, EPS)?,
            to_qkv,
            to_out: Linear::load_product(&w.at("to_out.0"), channels, channels)?,
            heads: c.heads,
            kv,
        };
        Ok((attention, to_kv))
    }

    /// `[N, H, W, C]` to the same.
    pub(super) fn forward(&self, x: Tensor, call: Call) -> Result<Tensor> {
        let [n, h, w, c] = x.dims("unet", "x")?;
        let (tokens, heads) = ([n, h * w, c], self.heads);
        let conditioning: &UnetConditioning = call.conditioning;
        let kv = conditioning.kv(self.kv);
        let y = self.to_qkv.forward(&self.group_norm.forward(&x)?.reshape(&tokens)?)?;
        let y = match self.to_qkv.weight.rows() == c {
            true => ops::attention(Attention::Cross { q: &y.reshape(&[n, h * w, heads, c / heads])?, kv })?,
            false => {
                let qkv = y.reshape(&[n, h * w, 3, heads, c / heads])?;
                let second = Some(SecondSource { kv, weight: None });
                let options = AttentionOptions { second, ..AttentionOptions::default() };
                ops::attention_with(Attention::Packed { qkv: &qkv, causal: false }, options)?
            }
        };
        self.to_out.forward_residual(&y.reshape(&tokens)?, &x.reshape(&tokens)?)?.reshape(&[n, h, w, c])
    }
}
