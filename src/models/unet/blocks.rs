use super::config::{AttentionConfig, BlockConfig, MidBlockConfig};
use super::{UnetConditioning, UnetConfig};
use crate::error::{Error, Result};
use crate::models::layers::{Downsample, GroupNorm, LayerNorm, Linear, ResnetBlock, ResnetConfig, Upsample};
use crate::models::weights::Weights;
use crate::ops::{self, Activation, Attention, Source, StepIndex};
use crate::runtime::Tensor;

/// Layers whose input is the same in every step of a run: they are applied by `condition`, and the blocks know the index
/// of their result.
#[derive(Default)]
pub(super) struct Projections {
    pub(super) time_emb_proj: Vec<Linear>, // [C_out, T] each, one a ResNet
    pub(super) to_kv: Vec<ToKv>,           // one a cross-attention
}

/// K and V of the text, fused.
pub(super) struct ToKv {
    weight: Tensor, // [2 C, cross_attention_dim]
    heads: usize,
}

impl ToKv {
    /// `text: [R, L, cross_attention_dim]` to `[R, L, 2, heads, head_dim]`.
    pub(super) fn forward(&self, text: &Tensor) -> Result<Tensor> {
        let [n, l, _] = text.dims("unet", "text")?;
        let kv = ops::linear(ops::Linear::new(text, &self.weight))?;
        kv.reshape(&[n, l, 2, self.heads, self.weight.shape()[0] / 2 / self.heads])
    }
}

/// What a block needs of the call beside its input.
#[derive(Clone, Copy)]
pub(super) struct Call<'a> {
    pub(super) conditioning: &'a UnetConditioning,
    pub(super) step: &'a StepIndex,
    pub(super) mid_dilation: usize,
}

/// How the layers of one block are loaded.
pub(super) struct Loader<'a> {
    pub(super) config: &'a UnetConfig,
    pub(super) projections: Projections,
}

/// A ResNet and the index of its `time_emb_proj`.
pub(super) struct Resnet {
    block: ResnetBlock,
    row: usize,
}

impl Resnet {
    fn forward<'a>(&'a self, x: impl Into<Source<'a>>, call: Call<'a>, dilation: usize) -> Result<Tensor> {
        let row = call.conditioning.rows(self.row, call.step);
        self.block.forward(x, Some(row), dilation)
    }
}

impl Loader<'_> {
    fn resnet(&mut self, w: &Weights, in_channels: usize, out_channels: usize, scale: f32) -> Result<Resnet> {
        let (groups, eps) = (self.config.norm_num_groups, self.config.norm_eps);
        let block = ResnetBlock::load(w, ResnetConfig { in_channels, out_channels, groups, eps, scale })?;
        let proj = Linear::load(&w.at("time_emb_proj"), out_channels, self.config.time_embed_dim)?;
        self.projections.time_emb_proj.push(proj);
        Ok(Resnet { block, row: self.projections.time_emb_proj.len() - 1 })
    }

    fn transformer(&mut self, w: &Weights, channels: usize, c: &AttentionConfig, resnet: usize) -> Result<Transformer> {
        let projection = |w: Weights| match self.config.use_linear_projection {
            true => Linear::load_product(&w, channels, channels),
            false => Ok(Linear {
                weight: w.pixel_product("weight", channels, channels)?,
                bias: Some(w.tensor("bias", &[channels])?),
            }),
        };
        let (proj_in, proj_out) = (projection(w.at("proj_in"))?, projection(w.at("proj_out"))?);
        let norm = GroupNorm::load(&w.at("norm"), channels, self.config.norm_num_groups, 1e-6)?;
        let blocks = w.at("transformer_blocks");
        let transformer_blocks = (0..c.layers[resnet])
            .map(|i| self.transformer_block(&blocks.at(i.to_string()), channels, c))
            .collect::<Result<Vec<_>>>()?;
        Ok(Transformer { norm, proj_in, transformer_blocks, proj_out })
    }

    fn transformer_block(&mut self, w: &Weights, channels: usize, c: &AttentionConfig) -> Result<TransformerBlock> {
        let net = w.at("ff.net.0.proj");
        Ok(TransformerBlock {
            norm1: LayerNorm::load(&w.at("norm1"), channels, 1e-5)?,
            attn1: match c.only_cross_attention {
                true => Attn::Cross(self.cross_attention(&w.at("attn1"), channels, c.heads)?),
                false => Attn::Packed(SelfAttention::load(&w.at("attn1"), channels, c.heads)?),
            },
            norm2: LayerNorm::load(&w.at("norm2"), channels, 1e-5)?,
            attn2: self.cross_attention(&w.at("attn2"), channels, c.heads)?,
            norm3: LayerNorm::load(&w.at("norm3"), channels, 1e-5)?,
            ff_in: Linear {
                weight: net.geglu_product("weight", 4 * channels, channels)?,
                bias: Some(net.geglu("bias", 4 * channels, None)?),
            },
            ff_out: Linear::load_product(&w.at("ff.net.2"), channels, 4 * channels)?,
        })
    }

    fn cross_attention(&mut self, w: &Weights, channels: usize, heads: usize) -> Result<CrossAttention> {
        let weight = w.stacked(&["to_k.weight", "to_v.weight"], channels, Some(self.config.cross_attention_dim))?;
        self.projections.to_kv.push(ToKv { weight, heads });
        Ok(CrossAttention {
            to_q: Linear { weight: w.at("to_q").product("weight", channels, channels)?, bias: None },
            to_out: Linear::load_product(&w.at("to_out.0"), channels, channels)?,
            kv: self.projections.to_kv.len() - 1,
            heads,
        })
    }

    /// The ResNets of a block, `in_channels` of each, and the transformers behind them.
    fn layers(
        &mut self,
        w: &Weights,
        c: &BlockConfig,
        in_channels: &[usize],
    ) -> Result<(Vec<Resnet>, Vec<Transformer>)> {
        let (mut resnets, mut attentions) = (Vec::new(), Vec::new());
        for (i, &input) in in_channels.iter().enumerate() {
            resnets.push(self.resnet(&w.at(format!("resnets.{i}")), input, c.channels, 1.0)?);
            if let Some(attention) = &c.attention {
                attentions.push(self.transformer(&w.at(format!("attentions.{i}")), c.channels, attention, i)?);
            }
        }
        Ok((resnets, attentions))
    }

    pub(super) fn down_block(&mut self, w: &Weights, input: usize, c: &BlockConfig, last: bool) -> Result<DownBlock> {
        let in_channels: Vec<usize> = (0..c.resnets).map(|i| if i == 0 { input } else { c.channels }).collect();
        let (resnets, attentions) = self.layers(w, c, &in_channels)?;
        let downsample = match last {
            true => None,
            false => Some(Downsample::load(w, c.channels, self.config.downsample_padding)?),
        };
        Ok(DownBlock { resnets, attentions, downsample })
    }

    /// `input`: channels that come from the block before; `skips`: of the skip connections in the order they are read.
    pub(super) fn up_block(
        &mut self,
        w: &Weights,
        input: usize,
        skips: &[usize],
        c: &BlockConfig,
        last: bool,
    ) -> Result<UpBlock> {
        let before = |i: usize| if i == 0 { input } else { c.channels };
        let in_channels: Vec<usize> = skips.iter().enumerate().map(|(i, skip)| before(i) + skip).collect();
        let (resnets, attentions) = self.layers(w, c, &in_channels)?;
        let upsample = if last { None } else { Some(Upsample::load(w, c.channels)?) };
        Ok(UpBlock { resnets, attentions, upsample })
    }

    pub(super) fn mid_block(&mut self, w: &Weights, channels: usize, c: &MidBlockConfig) -> Result<MidBlock> {
        let scale = c.scale();
        let first = self.resnet(&w.at("resnets.0"), channels, channels, scale)?;
        let rest = match &c.attention {
            None => None,
            Some(attention) => {
                let transformer = self.transformer(&w.at("attentions.0"), channels, attention, 0)?;
                Some((transformer, self.resnet(&w.at("resnets.1"), channels, channels, scale)?))
            }
        };
        Ok(MidBlock { first, rest })
    }
}

/// DownBlock2D and CrossAttnDownBlock2D.
pub(super) struct DownBlock {
    resnets: Vec<Resnet>,
    attentions: Vec<Transformer>, // none, or one behind each ResNet
    downsample: Option<Downsample>,
}

impl DownBlock {
    /// `x: [N, H, W, C_in]`; every output is pushed on `skips`, the last one is returned too.
    pub(super) fn forward(&self, x: Tensor, call: Call, skips: &mut Vec<Tensor>) -> Result<Tensor> {
        let mut x = x;
        for (i, resnet) in self.resnets.iter().enumerate() {
            x = resnet.forward(&x, call, 1)?;
            if let Some(attention) = self.attentions.get(i) {
                x = attention.forward(x, call)?;
            }
            skips.push(x.clone());
        }
        if let Some(downsample) = &self.downsample {
            x = downsample.forward(&x)?;
            skips.push(x.clone());
        }
        Ok(x)
    }
}

/// UNetMidBlock2DCrossAttn, or a single ResNet.
pub(super) struct MidBlock {
    first: Resnet,
    rest: Option<(Transformer, Resnet)>,
}

impl MidBlock {
    /// `[N, H, W, C]` to the same.
    pub(super) fn forward(&self, x: Tensor, call: Call) -> Result<Tensor> {
        let mut x = self.first.forward(&x, call, call.mid_dilation)?;
        if let Some((attention, resnet)) = &self.rest {
            x = attention.forward(x, call)?;
            x = resnet.forward(&x, call, call.mid_dilation)?;
        }
        Ok(x)
    }
}

/// UpBlock2D and CrossAttnUpBlock2D.
pub(super) struct UpBlock {
    resnets: Vec<Resnet>,
    attentions: Vec<Transformer>, // none, or one behind each ResNet
    upsample: Option<Upsample>,
}

impl UpBlock {
    /// `x: [N, H, W, C]`; each ResNet pops its skip connection. The upsampler goes to the size of the skip that the next
    /// block reads first, which is twice ours, or one less for odd sizes.
    pub(super) fn forward(&self, x: Tensor, call: Call, skips: &mut Vec<Tensor>) -> Result<Tensor> {
        let mut x = x;
        for (i, resnet) in self.resnets.iter().enumerate() {
            let skip = skips.pop().ok_or_else(|| Error::config("unet", "an up block found no skip connection"))?;
            x = resnet.forward(Source::Two(&x, &skip), call, 1)?;
            drop(skip);
            if let Some(attention) = self.attentions.get(i) {
                x = attention.forward(x, call)?;
            }
        }
        match (&self.upsample, skips.last()) {
            (Some(upsample), Some(skip)) => {
                let [_, h, w, _] = skip.dims("unet", "skip")?;
                upsample.forward(&x, [h, w])
            }
            _ => Ok(x),
        }
    }
}

/// Transformer2DModel over the pixels. Rombach et al. 2022, arXiv:2112.10752, fig. 3.
struct Transformer {
    norm: GroupNorm, // [C]
    proj_in: Linear, // [C, C]; pixels are tokens, so a 1x1 conv is the same
    transformer_blocks: Vec<TransformerBlock>,
    proj_out: Linear, // [C, C]
}

impl Transformer {
    /// `[N, H, W, C]` to the same.
    fn forward(&self, x: Tensor, call: Call) -> Result<Tensor> {
        let [n, h, w, c] = x.dims("unet", "x")?;
        let tokens = [n, h * w, c];
        let mut y = self.proj_in.forward(&self.norm.forward(&x)?.reshape(&tokens)?)?;
        for block in &self.transformer_blocks {
            y = block.forward(y, call)?;
        }
        self.proj_out.forward_residual(&y, &x.reshape(&tokens)?)?.reshape(&[n, h, w, c])
    }
}

/// BasicTransformerBlock: self-attention, cross-attention to the text, GEGLU feed-forward, each pre-normed and residual.
struct TransformerBlock {
    norm1: LayerNorm,
    attn1: Attn,
    norm2: LayerNorm,
    attn2: CrossAttention,
    norm3: LayerNorm,
    ff_in: Linear,  // [8 C, C], values and gates interleaved
    ff_out: Linear, // [C, 4 C]
}

/// The first attention: of the pixels, or with `only_cross_attention` to the text as well.
enum Attn {
    Packed(SelfAttention),
    Cross(CrossAttention),
}

impl TransformerBlock {
    /// `[N, L, C]` to the same.
    fn forward(&self, x: Tensor, call: Call) -> Result<Tensor> {
        let y = self.norm1.forward(&x)?;
        let x = match &self.attn1 {
            Attn::Packed(attn) => attn.forward(&y, &x)?,
            Attn::Cross(attn) => attn.forward(&y, &x, call)?,
        };
        let x = self.attn2.forward(&self.norm2.forward(&x)?, &x, call)?;
        let y = self.ff_in.fused(&self.norm3.forward(&x)?, Activation::Geglu, None)?; // [N, L, 4 C]
        self.ff_out.forward_residual(&y, &x)
    }
}

struct SelfAttention {
    to_qkv: Linear, // [3 C, C], no bias
    to_out: Linear, // [C, C]
    heads: usize,
}

impl SelfAttention {
    fn load(w: &Weights, channels: usize, heads: usize) -> Result<SelfAttention> {
        let weight = w.stacked_product(&["to_q.weight", "to_k.weight", "to_v.weight"], channels, channels)?;
        let to_out = Linear::load_product(&w.at("to_out.0"), channels, channels)?;
        Ok(SelfAttention { to_qkv: Linear { weight, bias: None }, to_out, heads })
    }

    /// `x`, `residual: [N, L, C]` to the same.
    fn forward(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        let [n, l, c] = x.dims("unet", "x")?;
        let qkv = self.to_qkv.forward(x)?.reshape(&[n, l, 3, self.heads, c / self.heads])?;
        let y = ops::attention(Attention::Packed { qkv: &qkv, causal: false })?.reshape(&[n, l, c])?;
        drop(qkv); // three times the size of x, done with before the next layer allocates
        self.to_out.forward_residual(&y, residual)
    }
}

struct CrossAttention {
    to_q: Linear,   // [C, C], no bias
    to_out: Linear, // [C, C]
    /// Index of the text's K and V.
    kv: usize,
    heads: usize,
}

impl CrossAttention {
    /// `x`, `residual: [N, L, C]` to the same.
    fn forward(&self, x: &Tensor, residual: &Tensor, call: Call) -> Result<Tensor> {
        let [n, l, c] = x.dims("unet", "x")?;
        let q = self.to_q.forward(x)?.reshape(&[n, l, self.heads, c / self.heads])?;
        let y = ops::attention(Attention::Cross { q: &q, kv: call.conditioning.kv(self.kv) })?;
        self.to_out.forward_residual(&y.reshape(&[n, l, c])?, residual)
    }
}
