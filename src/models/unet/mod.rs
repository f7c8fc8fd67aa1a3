//! UNet2DConditionModel of the SD 1.x/2.x and SDXL families, over latents, and of DeepFloyd IF, over pixels. Rombach et al. 2022,
//! arXiv:2112.10752; Podell et al. 2023, arXiv:2307.01952; Saharia et al. 2022, arXiv:2205.11487; the convolutional frame is that of
//! Ho et al. 2020, arXiv:2006.11239.

mod added_kv;
mod attention_maps;
mod blocks;
mod conditioning;
mod config;
mod controlnet;
mod convolutions;
mod fourier;
mod image_prompt;
mod text_pooling;

pub use attention_maps::{AttentionMapMemory, AttentionMaps};
pub use conditioning::{AddedConditioning, Conditioner, TextConditioning, UnetConditioning};
pub use config::{
    AddedConfig, AddedKvConfig, AttentionConfig, BlockConfig, MidBlockConfig, PixelBlockConfig, TIME_IDS, UnetConfig,
};
pub use controlnet::{Control, ControlNet, ControlNetConfig, ControlOptions, ZeroConvs};
pub use convolutions::{ConvPlace, ConvRole, Redilations, UnetBlock};
pub use fourier::FourierConvs;
pub use image_prompt::{CrossAttentionShape, CrossAttentions, ImageMasks, ImagePrompt};

use super::layers::{Conv2d, GroupNorm, Linear, Redilation};
use super::weights::{WeightStore, Weights};
use crate::error::{Error, Result};
use crate::ops::{self, FreeU, Source, StepIndex};
use crate::runtime::{DType, Device, Tensor};
use blocks::{Call, DownBlock, Loader, MidBlock, UpBlock};
use conditioning::TimeEmbedding;

/// What a method may ask of a call. Data alone: calls with equal options do the same work, so a recorded step is found by them.
/// A level is that of a down block, counted from 0, the finest; the up block of level i of n is number n - 1 - i.
#[derive(Clone, Debug, PartialEq)]
pub struct UnetOptions {
    /// Dilation (and padding) of the mid block's four 3x3 convs: 1, or 2 in MegaFusion++'s later stages.
    pub mid_dilation: usize,
    /// The downsampler of this level has stride 4, padding 2 and dilation 2, so that all below it sees a quarter of the sides:
    /// the resolution-aware downsampler of HiDiffusion (Zhang et al. 2024, arXiv:2311.17528, sec. 3.2). The upsampler on the
    /// way back goes to the size of the next skip connection, as always.
    pub wide_downsampler: Option<usize>,
    /// The down block of this level averages 2x2 pixels after its first ResNet and transformer; its up block goes back to the
    /// size, bicubically, before its last ResNet, which reads the skip connection from before the averaging. HiDiffusion again.
    pub pooled_level: Option<usize>,
    /// Self-attention on this level is within four windows, of half the map's height and width each, shifted by
    /// [`UnetCall::window_shifts`]: MSW-MSA of HiDiffusion, sec. 3.3. A map of odd sides is attended to as one of even sides, to
    /// which it is resized and back bicubically.
    pub windowed_level: Option<usize>,
    /// Self-attention on every level is within neighbourhoods, which are as large as that level's map is for samples of this
    /// height and width: the tokens of a box of half its sides attend to those of a box of its own sides around them, moved inside
    /// the map. Neighbourhood patch attention of ScaleDiff (2025, arXiv:2510.25818). Not beside `windowed_level`.
    pub neighbourhood: Option<[usize; 2]>,
    /// Convolutions at another dilation than they were trained with: ScaleCrafter (He et al. 2023, arXiv:2310.07702). Of the
    /// mid block's they go before `mid_dilation`.
    pub redilations: Redilations,
    /// What the up blocks' ResNets read is weighted where the backbone has four and two times the channels of the finest level:
    /// FreeU (Si et al. 2023, arXiv:2309.11497), in that order.
    pub freeu: Option<[FreeU; 2]>,
    /// Maps of cross-attention to the text are collected, or reused: FreCaS (2024, arXiv:2410.18410). With [`UnetCall::attention_maps`].
    pub attention_maps: AttentionMaps,
    /// Convolutions with a low-pass filter before them: FouriScale (Huang et al. 2024, arXiv:2403.12963). They go before
    /// `redilations` and `mid_dilation`.
    pub fourier: Option<FourierConvs>,
    /// Which ControlNets are asked with it: those of [`UnetCall::controls`].
    pub control: ControlOptions,
}

/// What a call is given beside its sample and its conditioning; `&UnetOptions` is enough where that is all.
#[derive(Clone, Copy, Debug)]
pub struct UnetCall<'a> {
    pub options: &'a UnetOptions,
    /// `[steps, M, C]`, u32, as [`WindowShift::factors`](crate::ops::WindowShift): in quarters of a window, a column for each
    /// self-attention of the windowed level in the order of execution ([`UnetConfig::self_attentions`]). `None`: no shift.
    pub window_shifts: Option<&'a Tensor>,
    /// Where the options' maps are collected and read; none may be asked without it.
    pub attention_maps: Option<&'a AttentionMapMemory>,
    /// So many of the last samples are the ones before them once more, for which the conditioning was made
    /// ([`UnetConditioning::with_twins`]): their self-attention has the queries and keys of these, and their own values, as
    /// FouriScale has it (sec. 3.4). Not beside windows and neighbourhoods.
    pub twins: usize,
    /// The ControlNets that the options name. Each adds to the skip connections and to the middle block's output.
    pub controls: &'a [Control<'a>],
    /// Where the conditioning's image prompts count; `None`: everywhere.
    pub image_masks: Option<&'a ImageMasks>,
}

impl<'a> From<&'a UnetOptions> for UnetCall<'a> {
    fn from(options: &'a UnetOptions) -> UnetCall<'a> {
        UnetCall { options, window_shifts: None, attention_maps: None, twins: 0, controls: &[], image_masks: None }
    }
}

impl Default for UnetOptions {
    fn default() -> UnetOptions {
        UnetOptions {
            mid_dilation: 1,
            wide_downsampler: None,
            pooled_level: None,
            windowed_level: None,
            neighbourhood: None,
            redilations: Redilations::default(),
            freeu: None,
            attention_maps: AttentionMaps::default(),
            fourier: None,
            control: ControlOptions::default(),
        }
    }
}

impl UnetOptions {
    /// Does a network of this configuration have a place for all that is asked?
    ///
    /// # Errors
    /// [`Error::Argument`]: an option, and what it could be.
    pub fn check(&self, config: &UnetConfig) -> Result<()> {
        let UnetOptions {
            mid_dilation,
            wide_downsampler,
            pooled_level,
            windowed_level,
            neighbourhood,
            redilations,
            freeu: _,
            attention_maps,
            fourier,
            control: _,
        } = self;
        if *mid_dilation == 0 {
            return Err(Error::argument("unet", "mid_dilation", 0, "1 or more"));
        }
        if let Some(sides) = neighbourhood {
            if sides.contains(&0) {
                return Err(Error::argument("unet", "neighbourhood", format!("{sides:?}"), "sides of at least 1"));
            }
            if windowed_level.is_some() {
                return Err(Error::argument("unet", "windowed_level", "given", "none beside a neighbourhood"));
            }
        }
        if !(0.0..=1.0).contains(&attention_maps.reuse) {
            return Err(Error::argument("unet", "attention_maps.reuse", attention_maps.reuse, "a share from 0 to 1"));
        }
        let levels = config.down_blocks.len();
        let below = |arg, level: &Option<usize>, end: usize| match *level {
            Some(level) if level >= end => {
                Err(Error::argument("unet", arg, level, format!("a level below {end}, of {levels}")))
            }
            _ => Ok(()),
        };
        below("wide_downsampler", wide_downsampler, levels - 1)?;
        below("pooled_level", pooled_level, levels)?;
        below("windowed_level", windowed_level, levels)?;
        let places = config.convolutions();
        for (place, redilation) in redilations.iter() {
            if !places.contains(&place) {
                return Err(Error::argument("unet", "redilations", place, "a convolution of the network's blocks"));
            }
            if place.is_downsampler() && config.downsample_padding == 0 {
                return Err(Error::argument("unet", "redilations", place, ConvPlace::ONE_SIDED));
            }
            if !(redilation.factor > 0.0 && redilation.factor <= Redilation::MOST) {
                let want = format!("above 0, at most {}", Redilation::MOST);
                return Err(Error::argument("unet", "redilations", format!("{place} {}", redilation.factor), want));
            }
        }
        fourier.as_ref().map_or(Ok(()), |fourier| fourier.check(config))
    }
}

/// The denoiser.
pub struct Unet {
    conditioner: Conditioner,
    conv_in: Conv2d, // [C_0, k, k, in_channels]
    down_blocks: Vec<DownBlock>,
    mid_block: Option<MidBlock>,
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm, // [C_0]
    conv_out: Conv2d,         // [out_channels, k, k, C_0]
}

impl Unet {
    /// Takes every tensor of `store`.
    ///
    /// # Errors
    /// [`Error::Weight`]: missing, extra, of another shape, not finite; [`Error::OutOfMemory`].
    pub fn load(store: WeightStore, config: &UnetConfig) -> Result<Unet> {
        let unet = Unet::from_weights(&store.root(), config)?;
        store.finish()?;
        Ok(unet)
    }

    /// Takes the model's tensors and leaves it to the caller to look for others ([`WeightStore::finish`]) or at what was
    /// asked for ([`WeightStore::manifest`]).
    ///
    /// # Errors
    /// As [`load`](Unet::load).
    pub fn from_weights(w: &Weights, config: &UnetConfig) -> Result<Unet> {
        let channels = &config.block_out_channels;
        let (first, deepest) = (channels[0], channels[channels.len() - 1]);
        let mut loader = Loader::new(config);

        let (down_blocks, mid_block) = loader.encoder(w)?;
        let (mut skips, mut input) = (config.skip_channels(), deepest);
        let mut up_blocks = Vec::new();
        for (i, block) in config.up_blocks.iter().enumerate() {
            let last = i + 1 == config.up_blocks.len();
            (loader.level, loader.block) = (Some(config.up_blocks.len() - 1 - i), UnetBlock::Up(i));
            let mut read = skips.split_off(skips.len() - block.resnets);
            read.reverse();
            up_blocks.push(loader.up_block(&w.at(format!("up_blocks.{i}")), input, &read, block, last)?);
            input = block.channels;
        }
        Ok(Unet {
            conv_in: Conv2d::load(&w.at("conv_in"), first, config.in_channels, config.conv_in_kernel)?,
            conditioner: Conditioner {
                config: config.clone(),
                device: w.device().clone(),
                dtype: w.dtype(),
                time_embedding: TimeEmbedding::load(w, config)?,
                text_projection: match config.encoder_hid_dim {
                    Some(dim) => Some(Linear::load(&w.at("encoder_hid_proj"), config.cross_attention_dim, dim)?),
                    None => None,
                },
                projections: loader.projections,
            },
            down_blocks,
            mid_block,
            up_blocks,
            conv_norm_out: GroupNorm::load(&w.at("conv_norm_out"), first, config.norm_num_groups, config.norm_eps)?,
            conv_out: Conv2d::load(&w.at("conv_out"), config.out_channels, first, config.conv_out_kernel)?,
        })
    }

    pub fn config(&self) -> &UnetConfig {
        &self.conditioner.config
    }

    pub fn device(&self) -> &Device {
        &self.conditioner.device
    }

    pub fn dtype(&self) -> DType {
        self.conditioner.dtype
    }

    /// The layers that read what is the same in every step of a run.
    pub fn conditioner(&self) -> &Conditioner {
        &self.conditioner
    }

    /// `x: [N, H, W, in_channels]`, one source or two, to `[N, H, W, out_channels]`: the predicted noise, or whatever the checkpoint was trained
    /// to predict. Any H, W. Of n images with a step of their own, sample i is at timestep `timesteps[step.get(i)]`; it
    /// reads row `i / (N / R)` of the text. N is a multiple of n and of R.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: `x`; [`Error::Argument`]: `step`, an option that the network has
    /// no place for, window shifts of fewer columns or other images, more twins than others; [`Error::OutOfMemory`].
    pub fn forward<'a>(
        &self,
        x: impl Into<Source<'a>>,
        step: &StepIndex,
        conditioning: &UnetConditioning,
        call: impl Into<UnetCall<'a>>,
    ) -> Result<Tensor> {
        let UnetCall { options, window_shifts, attention_maps, twins, controls, image_masks } = call.into();
        let Conditioner { config, device, dtype, .. } = &self.conditioner;
        let source: Source = x.into();
        let (x, second) = (source.first(), source.second());
        let [n, h, w, c] = x.dims("unet", "x")?;
        let beside = second.map_or(0, |second| second.shape().last().copied().unwrap_or(0));
        x.expect("unet", "x", &[n, h, w, config.in_channels.saturating_sub(beside)], *dtype, device)?;
        if let Some(second) = second {
            second.expect("unet", "x2", &[n, h, w, config.in_channels - c], *dtype, device)?;
        }
        if h == 0 || w == 0 {
            return Err(Error::shape("unet", "x", x, "a height and width of at least 1"));
        }
        if config.is_of_pixels() && !(h.is_multiple_of(config.factor()) && w.is_multiple_of(config.factor())) {
            return Err(Error::shape("unet", "x", x, format!("sides that are multiples of {}", config.factor())));
        }
        conditioning.check(x, n, step)?;
        options.check(config)?;
        if let Some(maps) = attention_maps {
            maps.begin();
        }
        if twins > 0 {
            if 2 * twins > n {
                return Err(Error::argument("unet", "twins", twins, format!("at most half of the {n} samples")));
            }
            if options.windowed_level.is_some() || options.neighbourhood.is_some() {
                return Err(Error::argument("unet", "twins", twins, "0 beside windows and neighbourhoods"));
            }
        }
        let levels = self.down_blocks.len();
        let call = Call { conditioning, step, options, window_shifts, attention_maps, image_masks, twins, levels };

        let centered = |x: &Tensor| ops::scale_cast(x, 2.0, -1.0, *dtype, 1);
        let mut x = match (config.center_input_sample, second) {
            (true, None) => self.conv_in.forward(&centered(x)?)?,
            (true, Some(second)) => self.conv_in.forward(Source::Two(&centered(x)?, &centered(second)?))?,
            (false, _) => self.conv_in.forward(source)?,
        };
        let mut skips = vec![x.clone()];
        for block in &self.down_blocks {
            x = block.forward(x, call, &mut skips)?;
        }
        if let Some(mid) = &self.mid_block {
            x = mid.forward(x, call)?;
        }
        for control in controls {
            x = control.add(source.first(), step, options.control.map, &mut skips, &x)?;
        }
        for block in &self.up_blocks {
            x = block.forward(x, call, &mut skips)?;
        }
        if let Some(maps) = attention_maps.filter(|_| options.attention_maps.collect) {
            maps.finish(options.attention_maps.flat)?;
        }
        ops::conv2d(ops::Conv2d { norm: self.conv_norm_out.on_load(config.activation), ..self.conv_out.args(&x) })
    }
}
