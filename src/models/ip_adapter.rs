//! IP-Adapters: pictures as prompts. Ye et al. 2023, arXiv:2308.06721.
//!
//! ```text
//! base:  c = LayerNorm(W e + b)                 e: the image encoder's projected embedding [E]; c: [tokens, D]
//! plus:  c = LayerNorm(W z_n + b)               z: learnt queries [tokens, dim], which attend to the encoder's tokens x
//!        z_i' = z_i + attn(LN(z_i), [LN(x); LN(z_i)]),  z_(i+1) = z_i' + FF(LN(z_i'))
//! K' = W_k c, V' = W_v c                        of every cross-attention of the UNet, which adds attn(q, K', V')
//! ```
//! The perceiver of `plus` is that of Flamingo (Alayrac et al. 2022, arXiv:2204.14198, sec. 3.1).

use std::path::{Path, PathBuf};

use super::clip_vision::{ClipVisionConfig, ClipVisionOutput};
use super::foreign::Foreign;
use super::layers::{LayerNorm, Linear};
use super::unet::{CrossAttentionShape, UnetConfig};
use super::weights::{WeightStore, Weights};
use crate::error::{Error, Result};
use crate::ops::{self, Activation, Attention, AttentionOptions, SecondSource};
use crate::runtime::{DType, Device, Tensor};

/// Channels of a head of the perceiver, in every published file.
const HEAD_DIM: usize = 64;
const EPS: f32 = 1e-5;

/// What a file holds, from its keys and shapes.
#[derive(Clone, Debug, PartialEq)]
pub struct IpAdapterConfig {
    path: PathBuf,
    pub kind: IpAdapterKind,
    /// Tokens that a picture becomes.
    pub tokens: usize,
    /// Width of what it reads of the image encoder.
    pub embed_dim: usize,
    /// Width of its tokens, which is that of the UNet's text.
    pub cross_attention_dim: usize,
    /// Channels of each cross-attention, in the file's order.
    channels: Vec<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IpAdapterKind {
    /// A linear layer of the projected embedding.
    Base,
    /// A perceiver of `depth` layers of width `dim` over the encoder's tokens.
    Plus { dim: usize, heads: usize, depth: usize, inner: usize },
}

impl IpAdapterConfig {
    /// Reads the header of a `.safetensors` file, or of PyTorch's `.bin`.
    ///
    /// # Errors
    /// [`Error::File`]: neither of the two, or another thing than an IP-Adapter of these kinds, by its name.
    pub fn read(path: &Path) -> Result<IpAdapterConfig> {
        let store = WeightStore::open_state_dict(path, &[], &Device::meta(), DType::F32)?;
        let shape = |key: &str| store.tensors().find(|(name, _)| *name == key).map(|(_, shape)| shape.to_vec());
        let refuse = |reason: String| Err(Error::file(path, reason));
        if let Some(other) = foreign(&store) {
            return refuse(format!("{other}; expected an IP-Adapter, base or plus (image_proj.*, ip_adapter.*)"));
        }
        let dims = |key: &str| -> Result<[usize; 2]> {
            let found = shape(key);
            match found.as_deref() {
                Some(&[rows, columns]) => Ok([rows, columns]),
                Some(&[1, tokens, dim]) => Ok([tokens, dim]),
                Some(other) => Err(Error::file(path, format!("{key} has shape {other:?}, expected a matrix"))),
                None => Err(Error::file(path, format!("has no {key}: it is truncated, or no IP-Adapter"))),
            }
        };
        let numbers = store.tensors().filter(|(key, _)| key.ends_with(".to_k_ip.weight")).count();
        let key = |number: usize| format!("ip_adapter.{}.to_k_ip.weight", 2 * number + 1);
        let channels = (0..numbers).map(|i| dims(&key(i)).map(|[rows, _]| rows)).collect::<Result<Vec<_>>>()?;
        let [_, cross_attention_dim] = dims(&key(0))?;
        let path = path.to_path_buf();
        if shape("image_proj.proj.weight").is_some() {
            let [rows, embed_dim] = dims("image_proj.proj.weight")?;
            let (tokens, kind) = (rows / cross_attention_dim.max(1), IpAdapterKind::Base);
            return Ok(IpAdapterConfig { path, kind, tokens, embed_dim, cross_attention_dim, channels });
        }
        let [tokens, dim] = dims("image_proj.latents")?;
        let [_, embed_dim] = dims("image_proj.proj_in.weight")?;
        let [inner, _] = dims("image_proj.layers.0.0.to_q.weight")?;
        let [hidden, _] = dims("image_proj.layers.0.1.1.weight")?;
        if inner == 0 || !inner.is_multiple_of(HEAD_DIM) {
            let key = "image_proj.layers.0.0.to_q.weight";
            return refuse(format!("{key} has {inner} rows, expected a multiple of {HEAD_DIM}, the width of a head"));
        }
        let depth = (0..).take_while(|i| shape(&format!("image_proj.layers.{i}.0.to_q.weight")).is_some()).count();
        let kind = IpAdapterKind::Plus { dim, heads: inner / HEAD_DIM, depth, inner: hidden };
        Ok(IpAdapterConfig { path, kind, tokens, embed_dim, cross_attention_dim, channels })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it reads of the image encoder.
    pub fn reads(&self) -> ClipVisionOutput {
        match self.kind {
            IpAdapterKind::Base => ClipVisionOutput::Projected,
            IpAdapterKind::Plus { .. } => ClipVisionOutput::Penultimate,
        }
    }

    /// Does it fit this UNet, and this image encoder, whose config.json is at `encoder`?
    ///
    /// # Errors
    /// [`Error::File`] naming both and their widths.
    pub fn check(&self, unet: &UnetConfig, encoder: &str, vision: &ClipVisionConfig) -> Result<()> {
        let own: Vec<usize> = unet.cross_attentions().in_files().iter().map(|shape| shape.channels).collect();
        if (self.cross_attention_dim, &self.channels) != (unet.cross_attention_dim, &own) {
            let of = |width: usize, channels: &[usize]| {
                let alike = channels.chunk_by(|a, b| a == b).map(|alike| format!("{} of {}", alike.len(), alike[0]));
                let alike = alike.collect::<Vec<_>>().join(", ");
                format!("{} cross-attentions ({alike} channels) that read {width}", channels.len())
            };
            let (it, model) = (of(self.cross_attention_dim, &self.channels), of(unet.cross_attention_dim, &own));
            let reason = format!("is for {it}, and the model's UNet has {model}: is this adapter for another family?");
            return Err(Error::file(&self.path, reason));
        }
        let (key, width) = match self.kind {
            IpAdapterKind::Base => ("projection_dim", vision.projection_dim),
            IpAdapterKind::Plus { .. } => ("hidden_size", vision.hidden_size),
        };
        if width != self.embed_dim {
            let reason = format!(
                "reads {} channels of its image encoder, and {encoder} has {key} {width}; name the encoder that it was \
                 trained with (ViT-H has projection_dim 1024 and hidden_size 1280, bigG 1280 and 1664)",
                self.embed_dim
            );
            return Err(Error::file(&self.path, reason));
        }
        Ok(())
    }
}

const FACE_ID: &str = "is an IP-Adapter FaceID, which needs a network for faces that is not here";

/// What a file is that is no IP-Adapter of these kinds.
fn foreign(store: &WeightStore) -> Option<String> {
    let any = |part: &str| store.tensors().any(|(key, _)| key.contains(part));
    let begins = |part: &str| store.tensors().any(|(key, _)| key.starts_with(part));
    if begins("image_proj.perceiver_resampler.")
        || any("to_k_lora.")
        || any("_lora.down.weight") && begins("ip_adapter.")
    {
        return Some(FACE_ID.into());
    }
    if begins("image_proj.proj.3.") {
        return Some("is an IP-Adapter of the full kind (full-face), which is not supported".into());
    }
    if begins("image_proj.proj.0.") {
        return Some(FACE_ID.into());
    }
    if begins("image_proj.") && begins("ip_adapter.") {
        return None;
    }
    if any("lora_") {
        return Some("is a LoRA, not an IP-Adapter: give it as a LoRA".into());
    }
    let keys: Vec<&str> = store.tensors().map(|(key, _)| key).collect();
    Some(match Foreign::of_keys(keys.iter().copied(), any("diffusion_model.")) {
        Some(foreign) => format!("is no IP-Adapter: {foreign}"),
        None => "is no IP-Adapter".into(),
    })
}

/// An adapter's layers: pictures' tokens, and their K and V.
pub struct IpAdapter {
    config: IpAdapterConfig,
    projection: Projection,
    /// One a cross-attention, in the UNet's order of execution.
    to_kv: Vec<(Linear, CrossAttentionShape)>, // [2 C, D], no bias
}

enum Projection {
    Base(Box<BaseProjection>),
    Plus(Box<Resampler>),
}

/// `image_proj.` of the base kind.
struct BaseProjection {
    proj: Linear,    // [tokens D, E]
    norm: LayerNorm, // [D]
}

/// `image_proj.` of the plus kind.
struct Resampler {
    latents: Tensor, // [1, tokens, dim]
    proj_in: Linear, // [dim, E]
    layers: Vec<ResamplerLayer>,
    proj_out: Linear,    // [D, dim]
    norm_out: LayerNorm, // [D]
    heads: usize,
}

struct ResamplerLayer {
    norm1: LayerNorm,   // [dim], of the encoder's tokens
    norm2: LayerNorm,   // [dim], of the latents
    to_q: Linear,       // [heads 64, dim], no bias
    to_kv: Linear,      // [2 heads 64, dim], no bias
    to_out: Linear,     // [dim, heads 64], no bias
    ff_norm: LayerNorm, // [dim]
    ff_in: Linear,      // [inner, dim], no bias
    ff_out: Linear,     // [dim, inner], no bias
}

impl ResamplerLayer {
    fn load(w: &Weights, dim: usize, heads: usize, inner: usize) -> Result<ResamplerLayer> {
        let (attention, ff, width) = (w.at("0"), w.at("1"), heads * HEAD_DIM);
        Ok(ResamplerLayer {
            norm1: LayerNorm::load(&attention.at("norm1"), dim, EPS)?,
            norm2: LayerNorm::load(&attention.at("norm2"), dim, EPS)?,
            to_q: Linear::load_without_bias(&attention.at("to_q"), width, dim)?,
            to_kv: Linear::load_without_bias(&attention.at("to_kv"), 2 * width, dim)?,
            to_out: Linear::load_without_bias(&attention.at("to_out"), dim, width)?,
            ff_norm: LayerNorm::load(&ff.at("0"), dim, EPS)?,
            ff_in: Linear::load_without_bias(&ff.at("1"), inner, dim)?,
            ff_out: Linear::load_without_bias(&ff.at("3"), dim, inner)?,
        })
    }

    /// `x: [N, L, dim]`, `latents: [N, tokens, dim]` to the latents' shape.
    fn forward(&self, x: &Tensor, latents: &Tensor, heads: usize) -> Result<Tensor> {
        let [n, tokens, _] = latents.dims("IpAdapter", "latents")?;
        let own = self.norm2.forward(latents)?;
        let kv =
            |x: &Tensor| -> Result<Tensor> { self.to_kv.forward(x)?.reshape(&[n, x.shape()[1], 2, heads, HEAD_DIM]) };
        let q = self.to_q.forward(&own)?.reshape(&[n, tokens, heads, HEAD_DIM])?;
        let (first, second) = (kv(&self.norm1.forward(x)?)?, kv(&own)?);
        let second = Some(SecondSource { kv: &second, weight: None });
        let options = AttentionOptions { second, ..AttentionOptions::default() };
        let y = ops::attention_with(Attention::Cross { q: &q, kv: &first }, options)?;
        let latents = self.to_out.forward_residual(&y.reshape(&[n, tokens, heads * HEAD_DIM])?, latents)?;
        let h = self.ff_in.fused(&self.ff_norm.forward(&latents)?, Activation::Gelu, None)?;
        self.ff_out.forward_residual(&h, &latents)
    }
}

impl IpAdapter {
    /// The file of `config`, for a UNet that it fits ([`IpAdapterConfig::check`]).
    ///
    /// # Errors
    /// [`Error::Weight`]: missing, extra, of another shape, not finite; [`Error::OutOfMemory`].
    pub fn load(config: &IpAdapterConfig, unet: &UnetConfig, device: &Device, dtype: DType) -> Result<IpAdapter> {
        let store = IpAdapter::store(config, device, dtype)?;
        let adapter = IpAdapter::from_weights(&store.root(), config, unet)?;
        store.finish()?;
        Ok(adapter)
    }

    /// The file's tensors.
    ///
    /// # Errors
    /// As [`WeightStore::open_state_dict`].
    pub fn store(config: &IpAdapterConfig, device: &Device, dtype: DType) -> Result<WeightStore> {
        WeightStore::open_state_dict(&config.path, &[], device, dtype)
    }

    /// Takes the adapter's tensors and leaves it to the caller to look for others.
    ///
    /// # Errors
    /// As [`load`](IpAdapter::load).
    pub fn from_weights(w: &Weights, config: &IpAdapterConfig, unet: &UnetConfig) -> Result<IpAdapter> {
        let (proj, width, embed) = (w.at("image_proj"), config.cross_attention_dim, config.embed_dim);
        let projection = match config.kind {
            IpAdapterKind::Base => Projection::Base(Box::new(BaseProjection {
                proj: Linear::load(&proj.at("proj"), config.tokens * width, embed)?,
                norm: LayerNorm::load(&proj.at("norm"), width, EPS)?,
            })),
            IpAdapterKind::Plus { dim, heads, depth, inner } => {
                let layer = |i| ResamplerLayer::load(&proj.at(format!("layers.{i}")), dim, heads, inner);
                Projection::Plus(Box::new(Resampler {
                    latents: proj.tensor("latents", &[1, config.tokens, dim])?,
                    proj_in: Linear::load(&proj.at("proj_in"), dim, embed)?,
                    layers: (0..depth).map(layer).collect::<Result<_>>()?,
                    proj_out: Linear::load(&proj.at("proj_out"), width, dim)?,
                    norm_out: LayerNorm::load(&proj.at("norm_out"), width, EPS)?,
                    heads,
                }))
            }
        };
        let attentions = unet.cross_attentions();
        let to_kv = |(number, shape): (usize, CrossAttentionShape)| {
            let of = w.at(format!("ip_adapter.{}", 2 * number + 1));
            let weight = of.stacked(&["to_k_ip.weight", "to_v_ip.weight"], shape.channels, Some(width))?;
            Ok((Linear { weight: weight.into(), bias: None }, shape))
        };
        let to_kv = attentions.numbered_as_run().into_iter().map(to_kv).collect::<Result<_>>()?;
        Ok(IpAdapter { config: config.clone(), projection, to_kv })
    }

    pub fn config(&self) -> &IpAdapterConfig {
        &self.config
    }

    /// What the image encoder says of N pictures ([`IpAdapterConfig::reads`]) to their tokens `[N, tokens, D]`.
    ///
    /// # Errors
    /// [`Error::Shape`]; [`Error::OutOfMemory`].
    pub fn tokens(&self, embeds: &Tensor) -> Result<Tensor> {
        let (n, tokens, width) =
            (embeds.shape().first().copied().unwrap_or(0), self.config.tokens, self.config.cross_attention_dim);
        match &self.projection {
            Projection::Base(base) => base.norm.forward(&base.proj.forward(embeds)?.reshape(&[n, tokens, width])?),
            Projection::Plus(resampler) => {
                let x = resampler.proj_in.forward(embeds)?;
                let mut latents = Tensor::concat(&vec![resampler.latents.clone(); n])?;
                for layer in &resampler.layers {
                    latents = layer.forward(&x, &latents, resampler.heads)?;
                }
                resampler.norm_out.forward(&resampler.proj_out.forward(&latents)?)
            }
        }
    }

    /// K and V of tokens `[R, L, D]` for each cross-attention of the UNet in the order of execution:
    /// `[R, L, 2, heads, head_dim]`.
    ///
    /// # Errors
    /// [`Error::Shape`]; [`Error::OutOfMemory`].
    pub fn keys_and_values(&self, tokens: &Tensor) -> Result<Vec<Tensor>> {
        let [r, l, _] = tokens.dims("IpAdapter", "tokens")?;
        let kv = |(to_kv, CrossAttentionShape { channels, heads }): &(Linear, CrossAttentionShape)| {
            to_kv.forward(tokens)?.reshape(&[r, l, 2, *heads, channels / heads])
        };
        self.to_kv.iter().map(kv).collect()
    }
}
