//! AutoencoderKL of the SD 1.x/2.x family. Kingma & Welling 2013, arXiv:1312.6114; Rombach et al. 2022, arXiv:2112.10752.

mod stripes;
mod tiles;

use serde_json::{Value, json};

use self::tiles::Tiles;
use super::config::{JsonConfig, most};
use super::layers::{Conv2d, Downsample, GroupNorm, Linear, ResnetBlock, ResnetConfig, Upsample};
use super::weights::{WeightStore, Weights};
use crate::error::{Error, Result};
use crate::ops::{self, Activation, Attention};
use crate::runtime::{DType, Device, Tensor};

/// Added to the variance in every norm of the VAE.
const EPS: f32 = 1e-6;

/// `vae/config.json`; absent keys take the class defaults of diffusers' `AutoencoderKL`.
#[derive(Clone, Debug)]
pub struct VaeConfig {
    /// Of the image that is encoded.
    pub in_channels: usize,
    /// Of the image that is decoded.
    pub out_channels: usize,
    pub latent_channels: usize,
    /// The denoiser's latents are `(z - shift_factor) * scaling_factor`.
    pub scaling_factor: f64,
    pub shift_factor: f64,
    /// Channels of each level, the finest first.
    pub block_out_channels: Vec<usize>,
    /// ResNets a level in the encoder; the decoder has one more.
    pub layers_per_block: usize,
    pub norm_num_groups: usize,
    /// Native image height and width: [H, W].
    pub sample_size: Option<[usize; 2]>,
    pub use_quant_conv: bool,
    pub use_post_quant_conv: bool,
    pub mid_block_add_attention: bool,
    /// Does the decoder leave the range of f16, so that it must run in f32 or bf16? `None`: the file does not say; the
    /// published class then takes it for true, while no VAE of Stable Diffusion 1.x or 2.x does.
    pub force_upcast: Option<bool>,
}

impl VaeConfig {
    /// Parses and checks config.json; `what` (its path) stands in errors.
    ///
    /// # Errors
    /// [`Error::Config`] with key and value: of the wrong type, or a part of the published class that the family does not
    /// use.
    pub fn from_json(what: &str, json: &str) -> Result<VaeConfig> {
        let c = JsonConfig::parse(what, json, "AutoencoderKL")?;
        c.only("latents_mean", &[Value::Null])?;
        c.only("latents_std", &[Value::Null])?;
        c.only_silu("act_fn")?;
        let norm_num_groups = c.count("norm_num_groups", 32, most::CHANNELS)?;
        let block_out_channels = c.levels(&[64], norm_num_groups)?;
        for (key, supported) in [("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")] {
            let names = c.names(key, &[supported])?;
            if names.len() != block_out_channels.len() {
                let wanted =
                    format!("expected {} entries, as many as block_out_channels has", block_out_channels.len());
                return Err(c.error(key, wanted));
            }
            if names.iter().any(|name| name != supported) {
                return Err(c.error(key, format!("not supported, only {} is", json!(supported))));
            }
        }
        Ok(VaeConfig {
            in_channels: c.count("in_channels", 3, most::CHANNELS)?,
            out_channels: c.count("out_channels", 3, most::CHANNELS)?,
            latent_channels: c.count("latent_channels", 4, most::CHANNELS)?,
            scaling_factor: c.positive("scaling_factor", 0.18215)?,
            shift_factor: match c.get("shift_factor") {
                Some(Value::Null) => 0.0,
                _ => c.number("shift_factor", 0.0)?,
            },
            layers_per_block: c.count("layers_per_block", 1, most::LAYERS)?,
            norm_num_groups,
            sample_size: c.size("sample_size")?.or(Some([32, 32])),
            use_quant_conv: c.flag("use_quant_conv", true)?,
            use_post_quant_conv: c.flag("use_post_quant_conv", true)?,
            mid_block_add_attention: c.flag("mid_block_add_attention", true)?,
            force_upcast: match c.get("force_upcast") {
                None | Some(Value::Null) => None,
                Some(_) => Some(c.flag("force_upcast", true)?),
            },
            block_out_channels,
        })
    }

    /// Pixels per latent cell and side: 2^(levels - 1).
    pub fn factor(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }

    fn resnet(&self, w: &Weights, in_channels: usize, out_channels: usize) -> Result<ResnetBlock> {
        let (groups, eps, scale) = (self.norm_num_groups, EPS, 1.0);
        ResnetBlock::load(w, ResnetConfig { scale, ..ResnetConfig::new(in_channels, out_channels, groups, eps) })
    }

    /// `resnets.0` to `resnets.{count - 1}`; the first has `input` channels, all give `output`.
    fn resnets(&self, w: &Weights, count: usize, input: usize, output: usize) -> Result<Vec<ResnetBlock>> {
        let load = |i| self.resnet(&w.at(format!("resnets.{i}")), if i == 0 { input } else { output }, output);
        (0..count).map(load).collect()
    }
}

/// How a picture goes through the VAE: the less of it at a time, the less memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Partition {
    /// At once.
    #[default]
    Whole,
    /// The finest level in horizontal stripes of so many rows of pixels: the same result, bit for bit. The decoder runs its last
    /// upsampling convolution twice.
    Stripes { rows: usize },
    /// Square tiles of `side` pixels, each of which shares `overlap` pixels with the next and is blended with it over these:
    /// another result, without seams but with each tile's own contrast; diffusers' `enable_tiling` with side `sample_size` and
    /// a quarter of it as overlap. The memory is a tile's. A picture no larger than a tile goes through whole.
    Tiles { side: usize, overlap: usize },
}

/// Images to latents and back.
pub struct Vae {
    config: VaeConfig,
    device: Device,
    dtype: DType,
    encoder: Encoder,
    decoder: Decoder,
    quant_conv: Option<Conv2d>,      // [2 latent_channels, 1, 1, 2 latent_channels]
    post_quant_conv: Option<Conv2d>, // [latent_channels, 1, 1, latent_channels]
}

impl Vae {
    /// Takes every tensor of `store`. Old attention names (query, key, value, proj_attn) are accepted.
    ///
    /// # Errors
    /// [`Error::Weight`]: missing, extra, of another shape, not finite; [`Error::OutOfMemory`].
    pub fn load(store: WeightStore, config: &VaeConfig) -> Result<Vae> {
        let vae = Vae::from_weights(&store.root(), config)?;
        store.finish()?;
        Ok(vae)
    }

    /// Takes the model's tensors and leaves it to the caller to look for others ([`WeightStore::finish`]) or at what was
    /// asked for ([`WeightStore::manifest`]).
    ///
    /// # Errors
    /// As [`load`](Vae::load).
    pub fn from_weights(w: &Weights, config: &VaeConfig) -> Result<Vae> {
        let conv = |name: &str, channels: usize, present: bool| {
            present.then(|| Conv2d::load(&w.at(name), channels, channels, 1)).transpose()
        };
        Ok(Vae {
            device: w.device().clone(),
            dtype: w.dtype(),
            encoder: Encoder::load(&w.at("encoder"), config)?,
            decoder: Decoder::load(&w.at("decoder"), config)?,
            quant_conv: conv("quant_conv", 2 * config.latent_channels, config.use_quant_conv)?,
            post_quant_conv: conv("post_quant_conv", config.latent_channels, config.use_post_quant_conv)?,
            config: config.clone(),
        })
    }

    pub fn config(&self) -> &VaeConfig {
        &self.config
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// `image: [N, H, W, in_channels]` in [-1, 1], H and W multiples of [`factor`](VaeConfig::factor), to moments
    /// `[N, H/f, W/f, 2 * latent_channels]`: mean, log variance (raw).
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: `image`; [`Error::OutOfMemory`].
    pub fn encode(&self, image: &Tensor) -> Result<Tensor> {
        self.encode_in(image, Partition::Whole)
    }

    /// As [`encode`](Vae::encode), a part of the picture at a time.
    ///
    /// # Errors
    /// As [`encode`](Vae::encode); [`Error::Argument`]: `partition`.
    pub fn encode_in(&self, image: &Tensor, partition: Partition) -> Result<Tensor> {
        const OP: &str = "vae_encode";
        let ([n, h, w, _], f) = (image.dims(OP, "image")?, self.config.factor());
        image.expect(OP, "image", &[n, h, w, self.config.in_channels], self.dtype, &self.device)?;
        if h == 0 || w == 0 || !h.is_multiple_of(f) || !w.is_multiple_of(f) {
            return Err(Error::shape(OP, "image", image, format!("height and width divisible by {f}")));
        }
        partition.check(OP, f)?;
        let quantised = |moments: Tensor| match &self.quant_conv {
            Some(conv) => conv.forward(&moments),
            None => Ok(moments),
        };
        match partition {
            Partition::Whole => quantised(self.encoder.forward(image)?),
            Partition::Stripes { rows } => {
                each_image(image, |image| quantised(self.encoder.forward_in_stripes(image, rows)?))
            }
            Partition::Tiles { side, overlap } => {
                let step = side - overlap;
                let tiles = Tiles { side, step, result_side: side / f, result_step: step / f };
                each_image(image, |image| tiles.run(image, |tile| quantised(self.encoder.forward(tile)?)))
            }
        }
    }

    /// `latent: [N, h, w, latent_channels]`, already divided by the scaling factor, to `[N, f h, f w, out_channels]`, not
    /// clamped. Any h, w.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: `latent`; [`Error::OutOfMemory`].
    pub fn decode(&self, latent: &Tensor) -> Result<Tensor> {
        self.decode_in(latent, Partition::Whole)
    }

    /// As [`decode`](Vae::decode), a part of the picture at a time.
    ///
    /// # Errors
    /// As [`decode`](Vae::decode); [`Error::Argument`]: `partition`.
    pub fn decode_in(&self, latent: &Tensor, partition: Partition) -> Result<Tensor> {
        const OP: &str = "vae_decode";
        let [n, h, w, _] = latent.dims(OP, "latent")?;
        latent.expect(OP, "latent", &[n, h, w, self.config.latent_channels], self.dtype, &self.device)?;
        if h == 0 || w == 0 {
            return Err(Error::shape(OP, "latent", latent, "a height and width of at least 1"));
        }
        let f = self.config.factor();
        partition.check(OP, f)?;
        let dequantised = |latent: &Tensor| match &self.post_quant_conv {
            Some(conv) => conv.forward(latent),
            None => Ok(latent.clone()),
        };
        match partition {
            Partition::Whole => self.decoder.forward(&dequantised(latent)?),
            Partition::Stripes { rows } => {
                each_image(latent, |latent| self.decoder.forward_in_stripes(&dequantised(latent)?, rows))
            }
            Partition::Tiles { side, overlap } => {
                let step = side - overlap;
                let tiles = Tiles { side: side / f, step: step / f, result_side: side, result_step: step };
                each_image(latent, |latent| tiles.run(latent, |tile| self.decoder.forward(&dequantised(tile)?)))
            }
        }
    }
}

impl Partition {
    /// `f`: pixels per latent cell and side.
    fn check(self, op: &'static str, f: usize) -> Result<()> {
        match self {
            Partition::Whole => {}
            Partition::Stripes { rows } => {
                if rows == 0 {
                    return Err(Error::argument(op, "rows of a stripe", rows, "at least 1"));
                }
            }
            Partition::Tiles { side, overlap } => {
                if side == 0 || !side.is_multiple_of(f) {
                    let want = format!("at least {f} pixels, a multiple of {f}");
                    return Err(Error::argument(op, "side of a tile", side, want));
                }
                if overlap >= side || !overlap.is_multiple_of(f) {
                    let want = format!("less than the side, {side}, and a multiple of {f}");
                    return Err(Error::argument(op, "overlap of tiles", overlap, want));
                }
            }
        }
        Ok(())
    }
}

/// The results for the images of a batch, one after the other; an empty batch goes through as it is.
fn each_image(x: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    match x.shape()[0] {
        0 | 1 => f(x),
        images => {
            let results: Vec<Tensor> = (0..images).map(|i| f(&x.rows(i..i + 1)?)).collect::<Result<_>>()?;
            Tensor::concat(&results)
        }
    }
}

/// `down_blocks.{i}` of the encoder.
struct DownBlock {
    resnets: Vec<ResnetBlock>,
    downsample: Option<Downsample>,
}

struct Encoder {
    conv_in: Conv2d, // [C_0, 3, 3, in_channels]
    down_blocks: Vec<DownBlock>,
    mid_block: MidBlock,
    conv_norm_out: GroupNorm, // [C_last]
    conv_out: Conv2d,         // [2 latent_channels, 3, 3, C_last]
}

impl Encoder {
    fn load(w: &Weights, c: &VaeConfig) -> Result<Encoder> {
        let channels = &c.block_out_channels;
        let last = channels[channels.len() - 1];
        let mut input = channels[0];
        let mut down_blocks = Vec::new();
        for (i, &output) in channels.iter().enumerate() {
            let w = w.at(format!("down_blocks.{i}"));
            let resnets = c.resnets(&w, c.layers_per_block, input, output)?;
            let downsample = (i + 1 < channels.len()).then(|| Downsample::load(&w, output, 0)).transpose()?;
            down_blocks.push(DownBlock { resnets, downsample });
            input = output;
        }
        Ok(Encoder {
            conv_in: Conv2d::load(&w.at("conv_in"), channels[0], c.in_channels, 3)?,
            down_blocks,
            mid_block: MidBlock::load(&w.at("mid_block"), c, last)?,
            conv_norm_out: GroupNorm::load(&w.at("conv_norm_out"), last, c.norm_num_groups, EPS)?,
            conv_out: Conv2d::load(&w.at("conv_out"), 2 * c.latent_channels, last, 3)?,
        })
    }

    /// `[N, H, W, in_channels]` to `[N, H/f, W/f, 2 latent_channels]`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self.conv_in.forward(x)?;
        for block in &self.down_blocks {
            for resnet in &block.resnets {
                x = resnet.forward_owned(x)?;
            }
            if let Some(downsample) = &block.downsample {
                x = downsample.forward(&x)?;
            }
        }
        let x = self.mid_block.forward(x)?;
        ops::conv2d(ops::Conv2d { norm: self.conv_norm_out.on_load(Activation::Silu), ..self.conv_out.args(&x) })
    }
}

/// `up_blocks.{i}` of the decoder, the coarsest level first.
struct UpBlock {
    resnets: Vec<ResnetBlock>,
    upsample: Option<Upsample>,
}

struct Decoder {
    conv_in: Conv2d, // [C_last, 3, 3, latent_channels]
    mid_block: MidBlock,
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm, // [C_0]
    conv_out: Conv2d,         // [out_channels, 3, 3, C_0]
}

impl Decoder {
    fn load(w: &Weights, c: &VaeConfig) -> Result<Decoder> {
        let channels = &c.block_out_channels;
        let last = channels[channels.len() - 1];
        let mut input = last;
        let mut up_blocks = Vec::new();
        for (i, &output) in channels.iter().rev().enumerate() {
            let w = w.at(format!("up_blocks.{i}"));
            let resnets = c.resnets(&w, c.layers_per_block + 1, input, output)?;
            let upsample = (i + 1 < channels.len()).then(|| Upsample::load(&w, output)).transpose()?;
            up_blocks.push(UpBlock { resnets, upsample });
            input = output;
        }
        Ok(Decoder {
            conv_in: Conv2d::load(&w.at("conv_in"), last, c.latent_channels, 3)?,
            mid_block: MidBlock::load(&w.at("mid_block"), c, last)?,
            up_blocks,
            conv_norm_out: GroupNorm::load(&w.at("conv_norm_out"), channels[0], c.norm_num_groups, EPS)?,
            conv_out: Conv2d::load(&w.at("conv_out"), c.out_channels, channels[0], 3)?,
        })
    }

    /// `[N, h, w, latent_channels]` to `[N, f h, f w, out_channels]`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self.mid_block.forward(self.conv_in.forward(x)?)?;
        for block in &self.up_blocks {
            for resnet in &block.resnets {
                x = resnet.forward_owned(x)?;
            }
            if let Some(upsample) = &block.upsample {
                let [_, h, w, _] = x.dims("vae_decode", "x")?;
                x = upsample.forward(&x, [2 * h, 2 * w])?;
            }
        }
        ops::conv2d(ops::Conv2d { norm: self.conv_norm_out.on_load(Activation::Silu), ..self.conv_out.args(&x) })
    }
}

/// ResNet, attention over all pixels, ResNet.
struct MidBlock {
    first: ResnetBlock,
    attention: Option<PixelAttention>,
    second: ResnetBlock,
}

impl MidBlock {
    fn load(w: &Weights, c: &VaeConfig, channels: usize) -> Result<MidBlock> {
        let attention = w.at("attentions.0");
        Ok(MidBlock {
            first: c.resnet(&w.at("resnets.0"), channels, channels)?,
            attention: match c.mid_block_add_attention {
                true => Some(PixelAttention::load(&attention, channels, c.norm_num_groups)?),
                false => None,
            },
            second: c.resnet(&w.at("resnets.1"), channels, channels)?,
        })
    }

    /// `[N, H, W, C]` to the same.
    fn forward(&self, x: Tensor) -> Result<Tensor> {
        let mut x = self.first.forward_owned(x)?;
        if let Some(attention) = &self.attention {
            x = attention.forward(x)?;
        }
        self.second.forward_owned(x)
    }
}

/// Self-attention of the pixels with one head as wide as the block.
struct PixelAttention {
    group_norm: GroupNorm, // [C]
    to_qkv: Linear,        // [3 C, C]
    to_out: Linear,        // [C, C]
}

impl PixelAttention {
    fn load(w: &Weights, channels: usize, groups: usize) -> Result<PixelAttention> {
        // Files from before diffusers 0.13 have the names of its AttentionBlock.
        let (qkv, out) = match w.contains("to_q.weight") || !w.contains("query.weight") {
            true => (["to_q", "to_k", "to_v"], "to_out.0"),
            false => (["query", "key", "value"], "proj_attn"),
        };
        let names = |part: &str| qkv.map(|name| format!("{name}.{part}"));
        let (weights, biases) = (names("weight"), names("bias"));
        Ok(PixelAttention {
            group_norm: GroupNorm::load(&w.at("group_norm"), channels, groups, EPS)?,
            to_qkv: Linear {
                weight: w.stacked(&weights.each_ref().map(String::as_str), channels, Some(channels))?.into(),
                bias: Some(w.stacked(&biases.each_ref().map(String::as_str), channels, None)?),
            },
            to_out: Linear::load(&w.at(out), channels, channels)?,
        })
    }

    /// `[N, H, W, C]` to the same.
    fn forward(&self, x: Tensor) -> Result<Tensor> {
        let [n, h, w, c] = x.dims("vae", "x")?;
        let tokens = [n, h * w, c];
        let y = self.group_norm.forward(&x)?.reshape(&tokens)?;
        let qkv = self.to_qkv.forward(&y)?.reshape(&[n, h * w, 3, 1, c])?;
        drop(y);
        let y = ops::attention(Attention::Packed { qkv: &qkv, causal: false })?.reshape(&tokens)?;
        drop(qkv);
        self.to_out.forward_residual(&y, &x.reshape(&tokens)?)?.reshape(&[n, h, w, c])
    }
}
