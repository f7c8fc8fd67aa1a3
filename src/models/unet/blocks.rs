use super::added_kv::AddedKvAttention;
use super::config::{AddedKvConfig, AttentionConfig, BlockConfig, MidBlockConfig};
use super::{
    AttentionMapMemory, AttentionMaps, ConvPlace, ConvRole, ImageMasks, UnetBlock, UnetConditioning, UnetConfig,
    UnetOptions,
};
use crate::error::{Error, Result};
use crate::models::layers::{
    ConvForm, Downsample, FilteredConv, GroupNorm, LayerNorm, Linear, Redilation, Resample, ResnetBlock, ResnetConfig,
    Upsample,
};
use crate::models::weights::Weights;
use crate::ops::{
    self, Activation, Attention, AttentionOptions, FreeU, SecondSource, Source, StepIndex, WindowShift, Windows,
};
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
    pub(super) weight: Tensor,          // [2 C, cross_attention_dim]
    pub(super) bias: Option<Tensor>,    // [2 C]
    pub(super) norm: Option<GroupNorm>, // [cross_attention_dim], before it
    pub(super) heads: usize,
}

impl ToKv {
    /// `text: [R, L, cross_attention_dim]` to `[R, L, 2, heads, head_dim]`.
    pub(super) fn forward(&self, text: &Tensor) -> Result<Tensor> {
        let [n, l, c] = text.dims("unet", "text")?;
        // A group's statistics are of all tokens, as of the pixels of a map.
        let normed = self.norm.as_ref().map(|norm| norm.forward(&text.reshape(&[n, l, 1, c])?)?.reshape(&[n, l, c]));
        let normed = normed.transpose()?;
        let x = normed.as_ref().unwrap_or(text);
        let kv = ops::linear(ops::Linear { bias: self.bias.as_ref(), ..ops::Linear::new(x, &self.weight) })?;
        kv.reshape(&[n, l, 2, self.heads, self.weight.shape()[0] / 2 / self.heads])
    }
}

/// What a block needs of the call beside its input.
#[derive(Clone, Copy)]
pub(super) struct Call<'a> {
    pub(super) conditioning: &'a UnetConditioning,
    pub(super) step: &'a StepIndex,
    pub(super) options: &'a UnetOptions,
    pub(super) window_shifts: Option<&'a Tensor>,
    pub(super) attention_maps: Option<&'a AttentionMapMemory>,
    pub(super) image_masks: Option<&'a ImageMasks>,
    pub(super) twins: usize,
    /// Of the network.
    pub(super) levels: usize,
}

impl<'a> Call<'a> {
    fn is_pooled(&self, level: Option<usize>) -> bool {
        level.is_some() && self.options.pooled_level == level
    }

    /// The result `y` of cross-attention to the text as the options want it; its queries are the tokens of `map`.
    fn by_maps(&self, map: [usize; 2], q: &Tensor, kv: &Tensor, y: Tensor) -> Result<Tensor> {
        let AttentionMaps { collect, reuse, .. } = self.options.attention_maps;
        if !collect && reuse == 0.0 {
            return Ok(y);
        }
        let memory = self.attention_maps;
        let memory = memory.ok_or_else(|| Error::config("unet", "the call has no memory for maps of attention"))?;
        if collect {
            memory.add(map, q, kv)?;
        }
        match reuse {
            0.0 => Ok(y),
            reuse => ops::blend_attention_map(&y, memory.shares(map)?, kv, reuse),
        }
    }

    /// Cross-attention to the text, and to the image prompts: the first without a mask in the same call. Maps are of the text alone.
    fn with_images(&self, attention: usize, map: [usize; 2], q: &Tensor, kv: &Tensor) -> Result<Tensor> {
        let prompts = self.conditioning.images();
        let mut masks = Vec::new();
        for index in 0..prompts.len() {
            masks.push(self.image_masks.map(|masks| masks.of(index, map)).transpose()?.flatten());
        }
        let by_maps = self.options.attention_maps.reuse > 0.0;
        let joined = masks.iter().position(Option::is_none).filter(|_| !by_maps);
        let second = joined.map(|index| {
            let prompt = &prompts[index];
            SecondSource { kv: &prompt.kv[attention], weight: Some(prompt.scale) }
        });
        let options = AttentionOptions { second, ..AttentionOptions::default() };
        let y = ops::attention_with(Attention::Cross { q, kv }, options)?;
        let mut y = self.by_maps(map, q, kv, y)?;
        for (index, (prompt, mask)) in prompts.iter().zip(&masks).enumerate() {
            if Some(index) == joined {
                continue;
            }
            let own = ops::attention(Attention::Cross { q, kv: &prompt.kv[attention] })?;
            y = match mask {
                None => ops::add_scaled(&y, &own, prompt.scale)?,
                Some(mask) => ops::add_masked(&y, &own, mask, prompt.scale)?,
            };
        }
        Ok(y)
    }

    /// How this convolution is applied; `resnet`: the number of its ResNet's rows.
    fn form(&self, place: ConvPlace, resnet: Option<usize>) -> ConvForm<'a> {
        if let Some(fourier) = self.options.fourier.as_ref().filter(|fourier| fourier.places.contains(&place)) {
            let (dilations, filter) = (fourier.dilations(), fourier.filter(place, self.levels));
            let rows = resnet.and_then(|resnet| self.conditioning.rows_of_twins(resnet, self.step));
            return ConvForm::Filtered(FilteredConv {
                factor: fourier.factor,
                dilations,
                filter,
                twins: self.twins,
                rows,
            });
        }
        ConvForm::Redilated(self.options.redilations.get(place).unwrap_or_else(|| match place.block {
            UnetBlock::Mid => Redilation::by(self.options.mid_dilation as f64),
            UnetBlock::Down(_) | UnetBlock::Up(_) => Redilation::NONE,
        }))
    }
}

/// How the layers of one block are loaded.
pub(super) struct Loader<'a> {
    pub(super) config: &'a UnetConfig,
    pub(super) projections: Projections,
    /// Of the block that is loaded; `None`: the mid block.
    pub(super) level: Option<usize>,
    pub(super) block: UnetBlock,
    /// Self-attentions of each level so far, in the order of execution.
    self_attentions: Vec<usize>,
    /// Second attentions so far, those that read image prompts.
    second_attentions: usize,
}

/// Which of a level's self-attentions, in the order of execution.
#[derive(Clone, Copy)]
struct Place {
    level: usize,
    number: usize,
}

impl<'a> Loader<'a> {
    pub(super) fn new(config: &'a UnetConfig) -> Loader<'a> {
        let (projections, self_attentions) = (Projections::default(), vec![0; config.down_blocks.len()]);
        Loader { config, projections, level: None, block: UnetBlock::Mid, self_attentions, second_attentions: 0 }
    }
}

/// A ResNet and the index of its `time_emb_proj`.
pub(super) struct Resnet {
    block: ResnetBlock,
    row: usize,
    /// Of its two 3x3 convolutions.
    places: [ConvPlace; 2],
}

impl Resnet {
    fn forward<'a>(&'a self, x: impl Into<Source<'a>>, call: Call<'a>) -> Result<Tensor> {
        self.block.forward(x, Some(call.conditioning.rows(self.row, call.step)), self.forms(call))
    }

    /// In place of a down- or upsampler.
    fn forward_resampled<'a>(&'a self, x: &'a Tensor, call: Call<'a>, resample: Resample) -> Result<Tensor> {
        let row = call.conditioning.rows(self.row, call.step);
        self.block.forward_resampled(x, Some(row), self.forms(call), resample)
    }

    fn forms<'a>(&self, call: Call<'a>) -> [ConvForm<'a>; 2] {
        self.places.map(|place| call.form(place, Some(self.row)))
    }
}

impl Loader<'_> {
    /// `resnets.{number}` of the block with the weights `w`.
    fn resnet(&mut self, w: &Weights, number: usize, channels: [usize; 2], scale: f32) -> Result<Resnet> {
        let roles = [ConvRole::Conv1(number), ConvRole::Conv2(number)];
        self.resnet_of(&w.at(format!("resnets.{number}")), roles, channels, scale)
    }

    fn resnet_of(
        &mut self,
        w: &Weights,
        roles: [ConvRole; 2],
        [in_channels, out_channels]: [usize; 2],
        scale: f32,
    ) -> Result<Resnet> {
        let &UnetConfig { norm_num_groups, norm_eps, activation, scale_shift, time_embed_dim, .. } = self.config;
        let config = ResnetConfig::new(in_channels, out_channels, norm_num_groups, norm_eps);
        let block = ResnetBlock::load(w, ResnetConfig { scale, activation, scale_shift, ..config })?;
        let columns = if scale_shift { 2 * out_channels } else { out_channels };
        let proj = Linear::load(&w.at("time_emb_proj"), columns, time_embed_dim)?;
        self.projections.time_emb_proj.push(proj);
        let places = roles.map(|role| ConvPlace { block: self.block, role });
        Ok(Resnet { block, row: self.projections.time_emb_proj.len() - 1, places })
    }

    fn added_kv(&mut self, w: &Weights, channels: usize, c: &AddedKvConfig) -> Result<BlockAttention> {
        let number = self.projections.to_kv.len();
        let (attention, to_kv) = AddedKvAttention::load(w, channels, c, self.config, number)?;
        self.projections.to_kv.push(to_kv);
        Ok(BlockAttention::AddedKv(attention))
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
        let second = Some(self.second_attentions);
        self.second_attentions += 1;
        Ok(TransformerBlock {
            norm1: LayerNorm::load(&w.at("norm1"), channels, 1e-5)?,
            attn1: match c.only_cross_attention {
                true => Attn::Cross(self.cross_attention(&w.at("attn1"), channels, c.heads, None)?),
                false => {
                    Attn::Packed(SelfAttention::load(&w.at("attn1"), channels, c.heads, self.depth(), self.place())?)
                }
            },
            norm2: LayerNorm::load(&w.at("norm2"), channels, 1e-5)?,
            attn2: self.cross_attention(&w.at("attn2"), channels, c.heads, second)?,
            norm3: LayerNorm::load(&w.at("norm3"), channels, 1e-5)?,
            ff_in: Linear {
                weight: net.geglu_product("weight", 4 * channels, channels)?,
                bias: Some(net.geglu("bias", 4 * channels, None)?),
            },
            ff_out: Linear::load_product(&w.at("ff.net.2"), channels, 4 * channels)?,
        })
    }

    /// How often the maps of the block that is loaded were halved.
    fn depth(&self) -> usize {
        self.level.unwrap_or(self.config.down_blocks.len() - 1)
    }

    /// The next self-attention's.
    fn place(&mut self) -> Option<Place> {
        let level = self.level?;
        self.self_attentions[level] += 1;
        Some(Place { level, number: self.self_attentions[level] - 1 })
    }

    fn cross_attention(
        &mut self,
        w: &Weights,
        channels: usize,
        heads: usize,
        second: Option<usize>,
    ) -> Result<CrossAttention> {
        let weight = w.stacked(&["to_k.weight", "to_v.weight"], channels, Some(self.config.cross_attention_dim))?;
        self.projections.to_kv.push(ToKv { weight, bias: None, norm: None, heads });
        Ok(CrossAttention {
            to_q: Linear { weight: w.at("to_q").product("weight", channels, channels)?, bias: None },
            to_out: Linear::load_product(&w.at("to_out.0"), channels, channels)?,
            kv: self.projections.to_kv.len() - 1,
            second,
            heads,
        })
    }

    /// The ResNets of a block, `in_channels` of each, and the attentions behind them.
    fn layers(
        &mut self,
        w: &Weights,
        c: &BlockConfig,
        in_channels: &[usize],
    ) -> Result<(Vec<Resnet>, Vec<BlockAttention>)> {
        let (mut resnets, mut attentions) = (Vec::new(), Vec::new());
        for (i, &input) in in_channels.iter().enumerate() {
            resnets.push(self.resnet(w, i, [input, c.channels], c.scale())?);
            let w = w.at(format!("attentions.{i}"));
            if let Some(attention) = &c.attention {
                attentions.push(BlockAttention::Transformer(self.transformer(&w, c.channels, attention, i)?));
            }
            if let Some(attention) = c.pixel.as_ref().and_then(|pixel| pixel.attention.as_ref()) {
                attentions.push(self.added_kv(&w, c.channels, attention)?);
            }
        }
        Ok((resnets, attentions))
    }

    /// The ResNet in the place of a sampler.
    fn resnet_sampler(&mut self, w: &Weights, c: &BlockConfig) -> Result<Resnet> {
        self.resnet_of(w, [ConvRole::Sampler; 2], [c.channels; 2], c.scale())
    }

    /// The down blocks and the middle block, which a ControlNet copies.
    pub(super) fn encoder(&mut self, w: &Weights) -> Result<(Vec<DownBlock>, Option<MidBlock>)> {
        let config = self.config;
        let mut input = self.width();
        let mut down_blocks = Vec::new();
        for (i, block) in config.down_blocks.iter().enumerate() {
            let last = i + 1 == config.down_blocks.len();
            (self.level, self.block) = (Some(i), UnetBlock::Down(i));
            down_blocks.push(self.down_block(&w.at(format!("down_blocks.{i}")), input, block, last)?);
            input = block.channels;
        }
        (self.level, self.block) = (None, UnetBlock::Mid);
        let mid_block = match &config.mid_block {
            None => None,
            Some(mid) => Some(self.mid_block(&w.at("mid_block"), input, mid)?),
        };
        Ok((down_blocks, mid_block))
    }

    fn down_block(&mut self, w: &Weights, input: usize, c: &BlockConfig, last: bool) -> Result<DownBlock> {
        let in_channels: Vec<usize> = (0..c.resnets).map(|i| if i == 0 { input } else { c.channels }).collect();
        let (resnets, attentions) = self.layers(w, c, &in_channels)?;
        let downsample = match last {
            true => None,
            false if c.pixel.is_some() => {
                Some(Downsampler::Resnet(Box::new(self.resnet_sampler(&w.at("downsamplers.0"), c)?)))
            }
            false => {
                Some(Downsampler::Conv(Box::new(Downsample::load(w, c.channels, self.config.downsample_padding)?)))
            }
        };
        Ok(DownBlock { resnets, attentions, downsample, level: self.level, sampler: self.sampler() })
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
        let upsample = match last {
            true => None,
            false if c.pixel.is_some() => {
                Some(Upsampler::Resnet(Box::new(self.resnet_sampler(&w.at("upsamplers.0"), c)?)))
            }
            false => Some(Upsampler::Conv(Upsample::load(w, c.channels)?)),
        };
        Ok(UpBlock { resnets, attentions, upsample, level: self.level, sampler: self.sampler(), width: self.width() })
    }

    fn sampler(&self) -> ConvPlace {
        ConvPlace { block: self.block, role: ConvRole::Sampler }
    }

    /// Channels of the finest level.
    fn width(&self) -> usize {
        self.config.block_out_channels[0]
    }

    fn mid_block(&mut self, w: &Weights, channels: usize, c: &MidBlockConfig) -> Result<MidBlock> {
        let scale = c.scale();
        let first = self.resnet(w, 0, [channels, channels], scale)?;
        let of_attention = w.at("attentions.0");
        let attention = match (&c.attention, &c.added_kv) {
            (Some(attention), _) => {
                Some(BlockAttention::Transformer(self.transformer(&of_attention, channels, attention, 0)?))
            }
            (None, Some(attention)) => Some(self.added_kv(&of_attention, channels, attention)?),
            (None, None) => None,
        };
        let rest = match attention {
            Some(attention) => Some((attention, self.resnet(w, 1, [channels, channels], scale)?)),
            None => None,
        };
        Ok(MidBlock { first, rest })
    }
}

/// What stands behind a ResNet.
enum BlockAttention {
    Transformer(Transformer),
    AddedKv(AddedKvAttention),
}

impl BlockAttention {
    /// `[N, H, W, C]` to the same.
    fn forward(&self, x: Tensor, call: Call) -> Result<Tensor> {
        match self {
            BlockAttention::Transformer(transformer) => transformer.forward(x, call),
            BlockAttention::AddedKv(attention) => attention.forward(x, call),
        }
    }
}

/// Half the size.
enum Downsampler {
    Conv(Box<Downsample>),
    Resnet(Box<Resnet>),
}

/// Twice the size.
enum Upsampler {
    Conv(Upsample),
    Resnet(Box<Resnet>),
}

/// DownBlock2D, CrossAttnDownBlock2D, ResnetDownsampleBlock2D and SimpleCrossAttnDownBlock2D.
pub(super) struct DownBlock {
    resnets: Vec<Resnet>,
    attentions: Vec<BlockAttention>, // none, or one behind each ResNet
    downsample: Option<Downsampler>,
    level: Option<usize>,
    /// Of the downsampler.
    sampler: ConvPlace,
}

impl DownBlock {
    /// `x: [N, H, W, C_in]`; every output is pushed on `skips`, the last one is returned too. On the pooled level the first has
    /// half the sides already.
    pub(super) fn forward(&self, x: Tensor, call: Call, skips: &mut Vec<Tensor>) -> Result<Tensor> {
        let mut x = x;
        for (i, resnet) in self.resnets.iter().enumerate() {
            x = resnet.forward(&x, call)?;
            if let Some(attention) = self.attentions.get(i) {
                x = attention.forward(x, call)?;
            }
            if i == 0 && call.is_pooled(self.level) {
                x = ops::avg_pool(&x)?;
            }
            skips.push(x.clone());
        }
        if let Some(downsample) = &self.downsample {
            let wide = self.level.is_some() && call.options.wide_downsampler == self.level;
            x = match downsample {
                Downsampler::Conv(conv) if wide => conv.forward_wide(&x)?,
                Downsampler::Conv(conv) => conv.forward_as(&x, call.form(self.sampler, None))?,
                Downsampler::Resnet(resnet) => resnet.forward_resampled(&x, call, Resample::Halve)?,
            };
            skips.push(x.clone());
        }
        Ok(x)
    }
}

/// UNetMidBlock2DCrossAttn, UNetMidBlock2DSimpleCrossAttn, or a single ResNet.
pub(super) struct MidBlock {
    first: Resnet,
    rest: Option<(BlockAttention, Resnet)>,
}

impl MidBlock {
    /// `[N, H, W, C]` to the same.
    pub(super) fn forward(&self, x: Tensor, call: Call) -> Result<Tensor> {
        let mut x = self.first.forward(&x, call)?;
        if let Some((attention, resnet)) = &self.rest {
            x = attention.forward(x, call)?;
            x = resnet.forward(&x, call)?;
        }
        Ok(x)
    }
}

/// UpBlock2D, CrossAttnUpBlock2D, ResnetUpsampleBlock2D and SimpleCrossAttnUpBlock2D.
pub(super) struct UpBlock {
    resnets: Vec<Resnet>,
    attentions: Vec<BlockAttention>, // none, or one behind each ResNet
    upsample: Option<Upsampler>,
    level: Option<usize>,
    /// Of the upsampler.
    sampler: ConvPlace,
    /// Channels of the finest level.
    width: usize,
}

impl UpBlock {
    /// `x: [N, H, W, C]`; each ResNet pops its skip connection, the last one of the pooled level one of the size from before.
    /// The upsampler goes to the size of the skip that the next block reads first, which is twice ours, or one less for odd
    /// sizes (four times and less after a wide downsampler).
    pub(super) fn forward(&self, x: Tensor, call: Call, skips: &mut Vec<Tensor>) -> Result<Tensor> {
        let mut x = x;
        for (i, resnet) in self.resnets.iter().enumerate() {
            let skip = skips.pop().ok_or_else(|| Error::config("unet", "an up block found no skip connection"))?;
            if i + 1 == self.resnets.len() && call.is_pooled(self.level) {
                let [_, h, w, _] = skip.dims("unet", "skip")?;
                x = ops::resize(&x, [h, w], ops::Upsampler::BicubicTorch, None, None)?;
            }
            x = match self.freeu(&x, call)? {
                Some(freeu) => resnet.forward(&ops::freeu(&x, &skip, freeu)?, call)?,
                None => resnet.forward(Source::Two(&x, &skip), call)?,
            };
            drop(skip);
            if let Some(attention) = self.attentions.get(i) {
                x = attention.forward(x, call)?;
            }
        }
        match (&self.upsample, skips.last()) {
            (Some(upsample), Some(skip)) => {
                let [_, h, w, _] = skip.dims("unet", "skip")?;
                match upsample {
                    Upsampler::Conv(conv) => conv.forward_as(&x, [h, w], call.form(self.sampler, None)),
                    Upsampler::Resnet(resnet) => resnet.forward_resampled(&x, call, Resample::To([h, w])),
                }
            }
            _ => Ok(x),
        }
    }
}

impl UpBlock {
    /// How the backbone `x` and its skip connection are weighted.
    fn freeu(&self, x: &Tensor, call: Call) -> Result<Option<FreeU>> {
        let [_, _, _, channels] = x.dims("unet", "x")?;
        let times = [4, 2].iter().position(|times| channels == times * self.width);
        Ok(call.options.freeu.zip(times).map(|(freeu, at)| freeu[at]))
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
            y = block.forward(y, [h, w], call)?;
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
    /// `[N, L, C]` to the same; L are the pixels of `map`.
    fn forward(&self, x: Tensor, map: [usize; 2], call: Call) -> Result<Tensor> {
        let y = self.norm1.forward(&x)?;
        let x = match &self.attn1 {
            Attn::Packed(attn) => attn.forward(&y, &x, map, call)?,
            Attn::Cross(attn) => attn.forward(&y, &x, map, call)?,
        };
        let x = self.attn2.forward(&self.norm2.forward(&x)?, &x, map, call)?;
        let y = self.ff_in.fused(&self.norm3.forward(&x)?, Activation::Geglu, None)?; // [N, L, 4 C]
        self.ff_out.forward_residual(&y, &x)
    }
}

struct SelfAttention {
    to_qkv: Linear, // [3 C, C], no bias
    to_out: Linear, // [C, C]
    heads: usize,
    /// How often its map was halved.
    depth: usize,
    place: Option<Place>,
}

impl SelfAttention {
    fn load(w: &Weights, channels: usize, heads: usize, depth: usize, place: Option<Place>) -> Result<SelfAttention> {
        let weight = w.stacked_product(&["to_q.weight", "to_k.weight", "to_v.weight"], channels, channels)?;
        let to_out = Linear::load_product(&w.at("to_out.0"), channels, channels)?;
        Ok(SelfAttention { to_qkv: Linear { weight, bias: None }, to_out, heads, depth, place })
    }

    /// `x`, `residual: [N, L, C]` to the same; L are the pixels of `map`.
    fn forward(&self, x: &Tensor, residual: &Tensor, map: [usize; 2], call: Call) -> Result<Tensor> {
        let windowed = self.place.filter(|place| call.options.windowed_level == Some(place.level));
        let Some(Place { number, .. }) = windowed else {
            let around = call.options.neighbourhood.and_then(|sides| self.neighbourhood(map, sides));
            return self.to_out.forward_residual(&self.attend(x, around, call.twins)?, residual);
        };
        let window = map.map(|side| side.div_ceil(2));
        let (even, unit) = (window.map(|side| 2 * side), window.map(|side| side / 4));
        // As published, the rows decide: where a window is too low for a shift of rows there is none of columns either.
        let factors = call.window_shifts.filter(|_| unit[0] > 0);
        let shift = factors.map(|factors| WindowShift { factors, step: call.step, column: number, unit });
        let windows = Some(Windows { map: even, window, keys: None, shift });
        if even == map {
            return self.to_out.forward_residual(&self.attend(x, windows, 0)?, residual);
        }
        let y = self.to_out.forward(&self.attend(&resized(x, map, even)?, windows, 0)?)?;
        ops::add(&resized(&y, even, map)?, residual)
    }

    /// Windows of the neighbourhoods of a map, for samples of `sides`; `None`: one of them spans the map.
    fn neighbourhood(&self, map: [usize; 2], sides: [usize; 2]) -> Option<Windows<'static>> {
        let keys = sides.map(|side| (0..self.depth).fold(side, |side, _| side.div_ceil(2)));
        let spans = map.iter().zip(keys).all(|(&map, keys)| map <= keys);
        let window = keys.map(|side| side.div_ceil(2));
        (!spans).then_some(Windows { map, window, keys: Some(keys), shift: None })
    }

    /// `[N, L, C]` to the same, before the output's projection.
    fn attend(&self, x: &Tensor, windows: Option<Windows>, twins: usize) -> Result<Tensor> {
        let [n, l, c] = x.dims("unet", "x")?;
        let qkv = self.to_qkv.forward(x)?.reshape(&[n, l, 3, self.heads, c / self.heads])?;
        if twins > 0 {
            // The samples before, and those that borrow the weights of the last of these.
            let others = n - twins;
            let (own, qk, v) = (qkv.rows(0..others)?, qkv.rows(others - twins..others)?, qkv.rows(others..n)?);
            let own = ops::attention(Attention::Packed { qkv: &own, causal: false })?;
            let borrowed = ops::attention(Attention::Borrowed { qk: &qk, v: &v })?;
            return ops::stack(&own, &borrowed)?.reshape(&[n, l, c]);
        }
        let options = AttentionOptions { windows, ..AttentionOptions::default() };
        ops::attention_with(Attention::Packed { qkv: &qkv, causal: false }, options)?.reshape(&[n, l, c])
        // qkv, three times the size of x, is done with before the next layer allocates.
    }
}

/// `[N, L, C]` of a map to that of another, bicubically as torch does.
fn resized(x: &Tensor, [h, w]: [usize; 2], to: [usize; 2]) -> Result<Tensor> {
    let [n, _, c] = x.dims("unet", "x")?;
    let y = ops::resize(&x.reshape(&[n, h, w, c])?, to, ops::Upsampler::BicubicTorch, None, None)?;
    y.reshape(&[n, to[0] * to[1], c])
}

struct CrossAttention {
    to_q: Linear,   // [C, C], no bias
    to_out: Linear, // [C, C]
    /// Index of the text's K and V.
    kv: usize,
    /// Index of an image prompt's, of the second attention of a block: it is also the one whose maps a call may collect or reuse.
    second: Option<usize>,
    heads: usize,
}

impl CrossAttention {
    /// `x`, `residual: [N, L, C]` to the same; L are the pixels of `map`.
    fn forward(&self, x: &Tensor, residual: &Tensor, map: [usize; 2], call: Call) -> Result<Tensor> {
        let [n, l, c] = x.dims("unet", "x")?;
        let q = self.to_q.forward(x)?.reshape(&[n, l, self.heads, c / self.heads])?;
        let kv = call.conditioning.kv(self.kv);
        let y = match self.second {
            None => ops::attention(Attention::Cross { q: &q, kv })?,
            Some(second) => call.with_images(second, map, &q, kv)?,
        };
        self.to_out.forward_residual(&y.reshape(&[n, l, c])?, residual)
    }
}
