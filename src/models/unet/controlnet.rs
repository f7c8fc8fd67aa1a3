//! ControlNet: a trained copy of the UNet's encoder and middle block that reads a picture beside the latents and adds to the skip
//! connections. Zhang, Rao & Agrawala 2023, arXiv:2302.05543, sec. 3.2 and fig. 3.
//!
//! ```text
//! h_0    = conv_in(x) + E(picture)                              E: a small network from pixels to the latents' grid
//! h_i    = the i-th output of the copied down blocks, h_mid that of the middle block
//! skip_i = skip_i + s_i Z_i(h_i),   mid = mid + s_mid Z_mid(h_mid)        Z: 1x1 convolutions that training began at zero
//! ```
//! The sum is the epilogue of the zero convolution, which reads the skip as its residual; s_i is in its weights ([`ZeroConvs`]). A
//! ControlNet is always called as it was trained; where a method changes the size of the UNet's maps, h_i is resized to the skip's.

use serde_json::{Map, Value, json};

use super::blocks::{Call, DownBlock, Loader, MidBlock};
use super::conditioning::{Conditioner, TimeEmbedding};
use super::{UnetConditioning, UnetConfig, UnetOptions};
use crate::error::{Error, Result};
use crate::models::config::{JsonConfig, most};
use crate::models::layers::Conv2d;
use crate::models::weights::{WeightStore, Weights};
use crate::ops::{self, Activation, StepIndex, Upsampler};
use crate::runtime::{DType, Device, Tensor};

/// Which ControlNets a call has, and how they see the samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ControlOptions {
    /// Bit i: the denoiser's i-th one. 0: the UNet does what it does alone.
    pub on: u32,
    /// Height and width to which the samples are resized for them, by nearest neighbour; what they find is resized back
    /// bicubically: HiDiffusion's published way. `None`: the samples' own.
    pub map: Option<[usize; 2]>,
}

impl ControlOptions {
    /// So many at most.
    pub const MOST: usize = u32::BITS as usize;

    pub fn is_on(self, index: usize) -> bool {
        index < Self::MOST && self.on & (1 << index) != 0
    }
}

/// `config.json` of diffusers' `ControlNetModel`.
#[derive(Clone, Debug)]
pub struct ControlNetConfig {
    /// Of the UNet whose down blocks and middle block it copies, as far as these go.
    pub encoder: UnetConfig,
    /// Channels of the picture's embedding on each of its levels, the finest first; each level but the first has half the sides.
    pub hint_channels: Vec<usize>,
    /// The picture's channels are read as blue, green, red.
    pub reads_bgr: bool,
}

/// Classes of `config.json` that are taken for ControlNets, and what they are.
const OTHER_CLASSES: [(&str, &str); 6] = [
    ("T2IAdapter", "a T2I-Adapter"),
    ("ControlNetUnionModel", "a union of ControlNets (ControlNet++)"),
    ("ControlNetXSAdapter", "a ControlNet-XS"),
    ("SD3ControlNetModel", "a ControlNet for Stable Diffusion 3"),
    ("FluxControlNetModel", "a ControlNet for FLUX"),
    ("UNet2DConditionModel", "a UNet"),
];

impl ControlNetConfig {
    /// Parses and checks config.json; `what` (its path) stands in errors.
    ///
    /// # Errors
    /// [`Error::Config`] with key and value: another class (T2I-Adapter and others, by their names), `global_pool_conditions`, a
    /// picture of other than 3 channels, and as [`UnetConfig::from_json`].
    pub fn from_json(what: &str, json: &str) -> Result<ControlNetConfig> {
        let keys: Map<String, Value> = serde_json::from_str(json)
            .map_err(|error| Error::config(what, format!("not a JSON object ({error}): download the file again")))?;
        let class = keys.get("_class_name").and_then(Value::as_str).unwrap_or("ControlNetModel");
        if let Some((_, name)) = OTHER_CLASSES.iter().find(|(other, _)| class == *other) {
            let reason = format!("_class_name is {class:?}: this is {name}, expected a ControlNet (ControlNetModel)");
            return Err(Error::config(what, reason));
        }
        let c = JsonConfig::parse(what, json, "ControlNetModel")?;
        c.only("global_pool_conditions", &[json!(false)])?;
        c.only("conditioning_channels", &[json!(3)])?;
        c.only("controlnet_conditioning_channel_order", &[json!("rgb"), json!("bgr")])?;
        let reads_bgr = c.get("controlnet_conditioning_channel_order").is_some_and(|order| order == "bgr");
        let hint_channels = c.counts("conditioning_embedding_out_channels", &[16, 32, 96, 256], most::CHANNELS)?;
        if hint_channels.len() > most::LEVELS {
            let wanted = format!("expected at most {} levels", most::LEVELS);
            return Err(c.error("conditioning_embedding_out_channels", wanted));
        }
        Ok(ControlNetConfig { encoder: encoder(what, keys)?, hint_channels, reads_bgr })
    }

    /// Pixels per cell of the latents, along a side.
    pub fn factor(&self) -> usize {
        1 << (self.hint_channels.len() - 1)
    }

    /// Does it add to what a UNet of this configuration computes, of latents with cells of `factor` pixels?
    ///
    /// # Errors
    /// What does not fit: the end of a sentence that begins with the ControlNet's name.
    pub fn check_fit(&self, unet: &UnetConfig, factor: usize) -> std::result::Result<(), String> {
        let (own, other) = (&self.encoder, unet);
        let pooled = |config: &UnetConfig| config.added.map_or(0, |added| added.pooled_dim);
        let mid = |config: &UnetConfig| config.mid_block.is_some().then(|| config.block_out_channels.last().copied());
        let different = |what: &str, own: String, other: String| {
            Err(format!(
                "has {what} {own}, unet/config.json {other}; they must be equal: it was trained for another model"
            ))
        };
        if own.cross_attention_dim != other.cross_attention_dim {
            let (own, other) = (own.cross_attention_dim, other.cross_attention_dim);
            return different("cross_attention_dim", own.to_string(), other.to_string());
        }
        if own.skip_channels() != other.skip_channels() || mid(own) != mid(other) {
            let text = |config: &UnetConfig| {
                let layers: Vec<usize> = config.down_blocks.iter().map(|block| block.resnets).collect();
                format!("{:?} with layers_per_block {layers:?}", config.block_out_channels)
            };
            return different("block_out_channels", text(own), text(other));
        }
        if pooled(own) != pooled(other) {
            let text = |dim: usize| if dim == 0 { "none".into() } else { format!("of {dim} channels") };
            return different("pooled text (addition_embed_type)", text(pooled(own)), text(pooled(other)));
        }
        if own.in_channels != other.out_channels {
            return different(
                "in_channels",
                own.in_channels.to_string(),
                format!("{} out_channels", other.out_channels),
            );
        }
        if self.factor() != factor {
            let (own, entries) = (self.factor(), self.hint_channels.len());
            return Err(format!(
                "has cells of {own} pixels (conditioning_embedding_out_channels has {entries} entries), the model's VAE of \
                 {factor}; they must be equal"
            ));
        }
        Ok(())
    }
}

/// The keys that a ControlNet has in common with a UNet, and the up blocks that it has not, as a UNet's.
fn encoder(what: &str, mut keys: Map<String, Value>) -> Result<UnetConfig> {
    const UP: &str = "UpBlock2D";
    let mirrored = |name: &str| if name.starts_with("CrossAttn") { format!("CrossAttn{UP}") } else { UP.to_string() };
    keys.insert("_class_name".into(), "UNet2DConditionModel".into());
    if let Some(Value::Array(down)) = keys.get("down_block_types") {
        let up: Vec<String> = down.iter().rev().filter_map(Value::as_str).map(mirrored).collect();
        keys.insert("up_block_types".into(), up.into());
    }
    for key in ["center_input_sample", "conv_in_kernel", "time_embedding_dim", "time_cond_proj_dim", "sample_size"] {
        keys.remove(key);
    }
    let encoder = UnetConfig::from_json(what, &Value::Object(keys).to_string())?;
    if encoder.is_of_pixels() || encoder.encoder_hid_dim.is_some() || encoder.reads_noise_level {
        let reason = "is for a UNet over pixels (DeepFloyd IF), for which there are no ControlNets here";
        return Err(Error::config(what, reason));
    }
    Ok(encoder)
}

/// A convolution that was trained on blue, green and red, for red, green and blue.
fn swapped(conv: Conv2d) -> Result<Conv2d> {
    let weight = &conv.weight; // [O, 3, 3, 3]
    if let Device::Meta(_) = weight.device() {
        return Ok(conv);
    }
    let values: Vec<f32> = weight.to_f32_vec()?.chunks_exact(3).flat_map(|rgb| [rgb[2], rgb[1], rgb[0]]).collect();
    let weight = Tensor::from_f32(weight.device(), weight.shape(), weight.dtype(), &values)?;
    Ok(Conv2d::new(weight, conv.bias))
}

/// From the picture to the latents' grid: 3x3 convolutions, SiLU after each but the last.
struct HintEmbedding {
    conv_in: Conv2d,     // [c_0, 3, 3, 3]
    blocks: Vec<Conv2d>, // [c_i, 3, 3, c_i] and [c_i+1, 3, 3, c_i] of stride 2, in turn
    conv_out: Conv2d,    // [C_0, 3, 3, c_last]
}

impl HintEmbedding {
    fn load(w: &Weights, config: &ControlNetConfig) -> Result<HintEmbedding> {
        let (channels, out) = (&config.hint_channels, config.encoder.block_out_channels[0]);
        let mut blocks = Vec::new();
        for pair in channels.windows(2) {
            for (out, number) in [(pair[0], blocks.len()), (pair[1], blocks.len() + 1)] {
                blocks.push(Conv2d::load(&w.at(format!("blocks.{number}")), out, pair[0], 3)?);
            }
        }
        let last = channels[channels.len() - 1];
        let conv_in = Conv2d::load(&w.at("conv_in"), channels[0], 3, 3)?;
        Ok(HintEmbedding {
            conv_in: if config.reads_bgr { swapped(conv_in)? } else { conv_in },
            blocks,
            conv_out: Conv2d::load(&w.at("conv_out"), out, last, 3)?,
        })
    }

    /// `[N, H, W, 3]` to `[N, H / factor, W / factor, C_0]`.
    fn forward(&self, picture: &Tensor) -> Result<Tensor> {
        let mut x = ops::activation(&self.conv_in.forward(picture)?, Activation::Silu)?;
        for (number, conv) in self.blocks.iter().enumerate() {
            let y = ops::conv2d(ops::Conv2d { stride: 1 + number % 2, ..conv.args(&x) })?;
            x = ops::activation(&y, Activation::Silu)?;
        }
        self.conv_out.forward(&x)
    }
}

/// A ControlNet.
pub struct ControlNet {
    config: ControlNetConfig,
    conditioner: Conditioner,
    conv_in: Conv2d, // [C_0, 3, 3, in_channels]
    controlnet_cond_embedding: HintEmbedding,
    down_blocks: Vec<DownBlock>,
    mid_block: Option<MidBlock>,
    controlnet_down_blocks: Vec<Conv2d>, // [C_i, 1, 1, C_i], of each skip connection
    controlnet_mid_block: Conv2d,        // [C, 1, 1, C]
}

/// The zero convolutions of a run: times what they count.
#[derive(Clone, Debug)]
pub struct ZeroConvs {
    /// Weight and bias; of the skips in their order, then of the middle block.
    convs: Vec<[Tensor; 2]>,
}

impl ZeroConvs {
    /// Others of the same ControlNet, in the memory of these: a recorded step then reads them.
    ///
    /// # Errors
    /// [`Error::Shape`]: of another one; [`Error::Driver`].
    pub fn copy_from(&mut self, from: &ZeroConvs) -> Result<()> {
        let (to, from) = (self.convs.iter_mut().flatten(), from.convs.iter().flatten());
        to.zip(from).try_for_each(|(to, from)| to.copy_from(from))
    }

    /// The same in memory of their own.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; [`Error::Driver`].
    pub fn duplicate(&self) -> Result<ZeroConvs> {
        let of = |[weight, bias]: &[Tensor; 2]| Ok([weight.duplicate()?, bias.duplicate()?]);
        Ok(ZeroConvs { convs: self.convs.iter().map(of).collect::<Result<_>>()? })
    }

    /// `skip + Z_i(h)`: `skip [N, H, W, C]`, of which the samples before `first` stay; `h [N - first, h, w, C]` is resized.
    fn add(&self, index: usize, h: &Tensor, skip: &Tensor, first: usize) -> Result<Tensor> {
        let [n, height, width, _] = skip.dims("controlnet", "skip")?;
        let resized = match h.dims("controlnet", "h")? {
            [_, own_height, own_width, _] if [own_height, own_width] == [height, width] => None,
            _ => Some(ops::resize(h, [height, width], Upsampler::BicubicTorch, None, None)?),
        };
        let [weight, bias] = &self.convs[index];
        let args = ops::Conv2d { bias: Some(bias), ..ops::Conv2d::new(resized.as_ref().unwrap_or(h), weight) };
        if first == 0 {
            return ops::conv2d(ops::Conv2d { residual: Some(skip), ..args });
        }
        let seen = skip.rows(first..n)?;
        ops::stack(&skip.rows(0..first)?, &ops::conv2d(ops::Conv2d { residual: Some(&seen), ..args })?)
    }
}

/// A ControlNet in a call of the UNet.
#[derive(Clone, Copy)]
pub struct Control<'a> {
    pub net: &'a ControlNet,
    pub zero_convs: &'a ZeroConvs,
    /// What the UNet is told, made by [`ControlNet::condition`], of the samples that it sees.
    pub conditioning: &'a UnetConditioning,
    /// `[N - first, h, w, C_0]`: [`ControlNet::hint`] of each sample that it sees.
    pub hint: &'a Tensor,
    /// The samples before this one stay as they are: with guess mode the unconditional ones, else none.
    pub first: usize,
}

impl std::fmt::Debug for Control<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("Control").field("hint", self.hint).field("first", &self.first).finish_non_exhaustive()
    }
}

impl Control<'_> {
    /// Adds to the `skips` and to what the middle block found; that is returned. `x` is what the UNet reads, `map` the size to which
    /// it is resized for this.
    pub(super) fn add(
        &self,
        x: &Tensor,
        step: &StepIndex,
        map: Option<[usize; 2]>,
        skips: &mut [Tensor],
        mid: &Tensor,
    ) -> Result<Tensor> {
        let [n, _, _, _] = x.dims("controlnet", "x")?;
        if self.first >= n {
            return Err(Error::argument("controlnet", "first sample", self.first, format!("below {n}, their number")));
        }
        let seen = if self.first == 0 { x.clone() } else { x.rows(self.first..n)? };
        let seen = match map {
            Some(map) => ops::resize_nearest(&seen, map)?,
            None => seen,
        };
        let mut add = |index: usize, h: &Tensor| {
            let skip =
                skips.get_mut(index).ok_or_else(|| Error::config("controlnet", "has more skips than the UNet"))?;
            *skip = self.zero_convs.add(index, h, skip, self.first)?;
            Ok(())
        };
        let h = self.net.features(&seen, self.hint, step, self.conditioning, &mut add)?;
        self.zero_convs.add(self.zero_convs.convs.len() - 1, &h, mid, self.first)
    }
}

impl ControlNet {
    /// Takes every tensor of `store`.
    ///
    /// # Errors
    /// [`Error::Weight`]: missing, extra, of another shape, not finite; [`Error::OutOfMemory`].
    pub fn load(store: WeightStore, config: &ControlNetConfig) -> Result<ControlNet> {
        let net = ControlNet::from_weights(&store.root(), config)?;
        store.finish()?;
        Ok(net)
    }

    /// Takes the model's tensors and leaves it to the caller to look for others.
    ///
    /// # Errors
    /// As [`load`](ControlNet::load).
    pub fn from_weights(w: &Weights, config: &ControlNetConfig) -> Result<ControlNet> {
        let encoder = &config.encoder;
        let skips = encoder.skip_channels();
        let (first, deepest) = (skips[0], encoder.block_out_channels[encoder.block_out_channels.len() - 1]);
        let mut loader = Loader::new(encoder);
        let (down_blocks, mid_block) = loader.encoder(w)?;
        let zero_conv = |name: String, channels: usize| Conv2d::load(&w.at(name), channels, channels, 1);
        let of_skip = |(i, &channels)| zero_conv(format!("controlnet_down_blocks.{i}"), channels);
        Ok(ControlNet {
            conv_in: Conv2d::load(&w.at("conv_in"), first, encoder.in_channels, encoder.conv_in_kernel)?,
            conditioner: Conditioner {
                config: encoder.clone(),
                device: w.device().clone(),
                dtype: w.dtype(),
                time_embedding: TimeEmbedding::load(w, encoder)?,
                text_projection: None,
                projections: loader.projections,
            },
            controlnet_cond_embedding: HintEmbedding::load(&w.at("controlnet_cond_embedding"), config)?,
            down_blocks,
            mid_block,
            controlnet_down_blocks: skips.iter().enumerate().map(of_skip).collect::<Result<_>>()?,
            controlnet_mid_block: zero_conv("controlnet_mid_block".into(), deepest)?,
            config: config.clone(),
        })
    }

    pub fn config(&self) -> &ControlNetConfig {
        &self.config
    }

    pub fn device(&self) -> &Device {
        &self.conditioner.device
    }

    pub fn dtype(&self) -> DType {
        self.conditioner.dtype
    }

    /// The embedding of pictures in the model's dtype, `[N, H, W, 3]`, RGB, of values from 0 to 1:
    /// `[N, H / factor, W / factor, C_0]`. It does not depend on the step.
    ///
    /// # Errors
    /// [`Error::Shape`]: sides that the factor does not divide; those of the ops.
    pub fn hint(&self, picture: &Tensor) -> Result<Tensor> {
        let [n, h, w, _] = picture.dims("controlnet", "picture")?;
        picture.expect("controlnet", "picture", &[n, h, w, 3], self.dtype(), self.device())?;
        let factor = self.config.factor();
        if !(h.is_multiple_of(factor) && w.is_multiple_of(factor)) {
            let want = format!("height and width as multiples of {factor}");
            return Err(Error::shape("controlnet", "picture", picture, want));
        }
        self.controlnet_cond_embedding.forward(picture)
    }

    /// The zero convolutions, each times `scale` and with `guess` times a factor that grows from 0.1 at the first skip to 1 at
    /// the middle block, evenly in its logarithm: guess mode, as published beside the paper.
    ///
    /// # Errors
    /// Those of the device.
    pub fn zero_convs(&self, scale: f32, guess: bool) -> Result<ZeroConvs> {
        let convs: Vec<&Conv2d> = self.controlnet_down_blocks.iter().chain([&self.controlnet_mid_block]).collect();
        let last = (convs.len() - 1) as f64;
        let scaled = |(index, conv): (usize, &&Conv2d)| {
            let guessed = if guess { 10f64.powf(index as f64 / last - 1.0) } else { 1.0 };
            let scale = (f64::from(scale) * guessed) as f32;
            let times = |x: &Tensor| ops::scale_cast(x, scale, 0.0, x.dtype(), 1);
            Ok([times(&conv.weight)?, times(&conv.bias)?])
        };
        Ok(ZeroConvs { convs: convs.iter().enumerate().map(scaled).collect::<Result<_>>()? })
    }

    /// The layers that read what the UNet is told.
    pub fn conditioner(&self) -> &Conditioner {
        &self.conditioner
    }

    /// Calls `each` with the features of the skips in their order; the middle block's are returned. `x: [N, h, w, in_channels]`,
    /// `hint: [N, h, w, C_0]`.
    ///
    /// # Errors
    /// As [`Unet::forward`](super::Unet::forward); [`Error::Shape`]: `hint`; those of `each`.
    pub fn features(
        &self,
        x: &Tensor,
        hint: &Tensor,
        step: &StepIndex,
        conditioning: &UnetConditioning,
        each: &mut dyn FnMut(usize, &Tensor) -> Result<()>,
    ) -> Result<Tensor> {
        let [n, h, w, _] = x.dims("controlnet", "x")?;
        let encoder = &self.config.encoder;
        x.expect("controlnet", "x", &[n, h, w, encoder.in_channels], self.dtype(), self.device())?;
        hint.expect("controlnet", "hint", &[n, h, w, encoder.block_out_channels[0]], self.dtype(), self.device())?;
        conditioning.check(x, n, step)?;
        let options = UnetOptions::default();
        let (window_shifts, attention_maps, levels) = (None, None, self.down_blocks.len());
        let call = Call {
            conditioning,
            step,
            options: &options,
            window_shifts,
            attention_maps,
            image_masks: None,
            twins: 0,
            levels,
        };
        let mut x = ops::conv2d(ops::Conv2d { residual: Some(hint), ..self.conv_in.args(x) })?;
        each(0, &x)?;
        let mut index = 1;
        for block in &self.down_blocks {
            let mut features = Vec::new();
            x = block.forward(x, call, &mut features)?;
            for h in features {
                each(index, &h)?;
                index += 1;
            }
        }
        match &self.mid_block {
            Some(mid) => mid.forward(x, call),
            None => Ok(x),
        }
    }

    /// What it would add to the skips and to the middle block's output, by itself: `[N, h_i, w_i, C_i]` of each.
    ///
    /// # Errors
    /// As [`features`](ControlNet::features).
    pub fn forward(
        &self,
        x: &Tensor,
        hint: &Tensor,
        step: &StepIndex,
        conditioning: &UnetConditioning,
        zero_convs: &ZeroConvs,
    ) -> Result<Vec<Tensor>> {
        let mut added = Vec::new();
        let of = |index: usize, h: &Tensor| {
            let [weight, bias] = &zero_convs.convs[index];
            ops::conv2d(ops::Conv2d { bias: Some(bias), ..ops::Conv2d::new(h, weight) })
        };
        let mut each = |index: usize, h: &Tensor| {
            added.push(of(index, h)?);
            Ok(())
        };
        let mid = self.features(x, hint, step, conditioning, &mut each)?;
        added.push(of(zero_convs.convs.len() - 1, &mid)?);
        Ok(added)
    }
}
