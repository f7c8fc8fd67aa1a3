use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::models::config::{JsonConfig, as_count, most};
use crate::ops::{Activation, TimestepEmbedding};

/// `unet/config.json`; absent keys take the class defaults of diffusers' `UNet2DConditionModel`. What the file describes
/// per level (scalar or list) is resolved per block here.
#[derive(Clone, Debug)]
pub struct UnetConfig {
    pub in_channels: usize,
    pub out_channels: usize,
    /// Native latent height and width: [H, W].
    pub sample_size: Option<[usize; 2]>,
    /// Width of the text that cross-attention reads.
    pub cross_attention_dim: usize,
    /// `encoder_hid_dim`: width of the text embeddings, where a linear layer makes them `cross_attention_dim` wide (DeepFloyd IF).
    pub encoder_hid_dim: Option<usize>,
    /// Channels of each level, the finest first.
    pub block_out_channels: Vec<usize>,
    /// The down blocks in order, one a level.
    pub down_blocks: Vec<BlockConfig>,
    /// `None`: `mid_block_type` is null.
    pub mid_block: Option<MidBlockConfig>,
    /// The up blocks in order, the coarsest level first.
    pub up_blocks: Vec<BlockConfig>,
    /// Of the ResNets, inside the embeddings and before the last convolution: SiLU, or GELU (DeepFloyd IF).
    pub activation: Activation,
    /// `resnet_time_scale_shift` is "scale_shift": the timestep's row scales and shifts what a ResNet's second norm gives, in place of
    /// being added before it (Dhariwal & Nichol 2021, arXiv:2105.05233, sec. 4.3).
    pub scale_shift: bool,
    /// What becomes of the timestep's embedding before each ResNet's projection, in this order: `time_embedding_act_fn`, and
    /// without `resnet_skip_time_act` the ResNets' own.
    pub time_activations: Vec<Activation>,
    /// The model sees `2 x - 1`.
    pub center_input_sample: bool,
    /// Sinusoid of the timestep; its width is `block_out_channels[0]`.
    pub timestep: TimestepEmbedding,
    /// Width of the timestep's embedding.
    pub time_embed_dim: usize,
    /// `addition_embed_type` is "text_time": the timestep's embedding gets one of pooled text and sizes added (SDXL).
    pub added: Option<AddedConfig>,
    /// `addition_embed_type` is "text": the timestep's embedding gets one of the text added, pooled by an attention of so many heads
    /// (DeepFloyd IF).
    pub text_pooling_heads: Option<usize>,
    /// `class_embed_type` is "timestep": the timestep's embedding gets one of a number added, that of the noise in the picture
    /// which DeepFloyd IF's second stage reads (Ho et al. 2021, arXiv:2106.15282, sec. 4.2).
    pub reads_noise_level: bool,
    /// `time_cond_proj_dim`: width of the guidance scale's embedding, of models distilled from guided ones (LCM).
    pub time_cond_proj_dim: Option<usize>,
    /// Symmetric padding of the downsampling convs; 0 pads bottom and right by one.
    pub downsample_padding: usize,
    pub norm_num_groups: usize,
    pub norm_eps: f32,
    /// proj_in and proj_out of the transformers are stored as linear layers, not as 1x1 convs.
    pub use_linear_projection: bool,
    pub conv_in_kernel: usize,
    pub conv_out_kernel: usize,
}

/// SDXL's second embedding. Podell et al. 2023, arXiv:2307.01952, sec. 2.2.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AddedConfig {
    /// Width of the pooled text embedding.
    pub pooled_dim: usize,
    /// Each of the [`TIME_IDS`] numbers becomes a sinusoid like the timestep's, of another width.
    pub time_id: TimestepEmbedding,
}

/// Numbers that SDXL reads beside the text: height and width of the original image, top and left of the crop, height and
/// width of the target, all in pixels.
pub const TIME_IDS: usize = 6;

impl AddedConfig {
    /// `timestep`: the timestep's sinusoid.
    fn read(c: &JsonConfig, timestep: TimestepEmbedding) -> Result<Option<AddedConfig>> {
        const INPUT: &str = "projection_class_embeddings_input_dim";
        if !c.is("addition_embed_type", "text_time") {
            return Ok(None);
        }
        let required = |key: &str| {
            let wanted = "addition_embed_type = \"text_time\" needs a number of at least 1";
            c.optional_count(key, most::CHANNELS)?.ok_or_else(|| c.error(key, wanted))
        };
        let (dim, input) = (required("addition_time_embed_dim")?, required(INPUT)?);
        if dim < 2 {
            return Err(c.error("addition_time_embed_dim", "expected at least 2: one sine and one cosine"));
        }
        if input <= TIME_IDS * dim {
            let wanted = format!("expected more than {}: {TIME_IDS} sizes of addition_time_embed_dim", TIME_IDS * dim);
            return Err(c.error(INPUT, wanted));
        }
        let time_id = TimestepEmbedding { dim, ..timestep };
        Ok(Some(AddedConfig { pooled_dim: input - TIME_IDS * dim, time_id }))
    }

    /// Width of what the embedding reads: pooled text, then the sinusoids.
    pub(super) fn input_dim(&self) -> usize {
        self.pooled_dim + TIME_IDS * self.time_id.dim
    }
}

/// One level on the way down or up.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockConfig {
    /// Channels of the block's output.
    pub channels: usize,
    pub resnets: usize,
    /// `None` for blocks without transformers.
    pub attention: Option<AttentionConfig>,
    /// The block is one of DeepFloyd IF's.
    pub pixel: Option<PixelBlockConfig>,
}

/// A block of a UNet over pixels: its down- or upsampler is a ResNet, and behind each other ResNet is an attention or none
/// (`ResnetDownsampleBlock2D`, `SimpleCrossAttnDownBlock2D` and their mirrors).
#[derive(Clone, Debug, PartialEq)]
pub struct PixelBlockConfig {
    pub attention: Option<AddedKvConfig>,
    /// `resnet_out_scale_factor`: the ResNets' outputs are divided by it.
    pub scale_factor: f64,
}

/// An attention of the pixels to the text and to each other in one softmax: keys and values of the text are added to those of the
/// pixels.
#[derive(Clone, Debug, PartialEq)]
pub struct AddedKvConfig {
    pub heads: usize,
    /// Pixels attend to the text alone.
    pub only_text: bool,
    /// `cross_attention_norm` is "group_norm": the text is normalised by each attention.
    pub norms_text: bool,
}

/// The transformers of a block.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionConfig {
    /// `attention_head_dim` of the file: in this family it means the number of heads.
    pub heads: usize,
    /// Transformer blocks in the attention behind each ResNet.
    pub layers: Vec<usize>,
    /// The first attention of each transformer block reads the text too.
    pub only_cross_attention: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub struct MidBlockConfig {
    /// `None`: `UNetMidBlock2D`, a single ResNet, or one of DeepFloyd IF.
    pub attention: Option<AttentionConfig>,
    /// `UNetMidBlock2DSimpleCrossAttn`: this attention between two ResNets.
    pub added_kv: Option<AddedKvConfig>,
    /// `mid_block_scale_factor`: the ResNets' outputs are divided by it.
    pub scale_factor: f64,
}

/// Keys that would change the model in ways not written here, with the values under which they change nothing.
fn unsupported() -> Vec<(&'static str, Vec<Value>)> {
    vec![
        ("dual_cross_attention", vec![json!(false)]),
        ("encoder_hid_dim_type", vec![Value::Null, json!("text_proj")]),
        ("class_embed_type", vec![Value::Null, json!("timestep")]),
        ("addition_embed_type", vec![Value::Null, json!("text_time"), json!("text")]),
        ("num_class_embeds", vec![Value::Null]),
        ("class_embeddings_concat", vec![json!(false), Value::Null]),
        ("resnet_time_scale_shift", vec![json!("default"), json!("scale_shift")]),
        ("cross_attention_norm", vec![Value::Null, json!("group_norm")]),
        ("time_embedding_type", vec![json!("positional")]),
        ("timestep_post_act", vec![Value::Null]),
        ("attention_type", vec![json!("default")]),
    ]
}

impl UnetConfig {
    /// Parses and checks config.json; `what` (its path) stands in errors.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) with key and value: of the wrong type, lists of unequal length, or a part of the published class
    /// that the families do not use.
    pub fn from_json(what: &str, json: &str) -> Result<UnetConfig> {
        let c = JsonConfig::parse(what, json, "UNet2DConditionModel")?;
        for (key, values) in unsupported() {
            c.only(key, &values)?;
        }
        let activation = activation(&c, "act_fn")?.unwrap_or(Activation::Silu);
        let norm_num_groups = c.count("norm_num_groups", 32, most::CHANNELS)?;
        let block_out_channels = c.levels(&[320, 640, 1280, 1280], norm_num_groups)?;
        let levels = block_out_channels.len();
        let blocks = Blocks::read(&c, &block_out_channels)?;
        let dim = block_out_channels[0];
        let cross_attention_dim = cross_attention_dim(&c, levels)?;
        let encoder_hid_dim = c.optional_count("encoder_hid_dim", most::CHANNELS)?;
        let of_pixels = blocks.down[0].pixel.is_some();
        let timestep = TimestepEmbedding {
            dim,
            flip_sin_to_cos: c.flag("flip_sin_to_cos", true)?,
            freq_shift: c.number("freq_shift", 0.0)?,
        };
        let config = UnetConfig {
            in_channels: c.count("in_channels", 4, most::CHANNELS)?,
            out_channels: c.count("out_channels", 4, most::CHANNELS)?,
            sample_size: c.size("sample_size")?,
            cross_attention_dim,
            encoder_hid_dim,
            activation,
            scale_shift: c.is("resnet_time_scale_shift", "scale_shift"),
            time_activations: time_activations(&c, activation, of_pixels)?,
            text_pooling_heads: text_pooling_heads(&c, encoder_hid_dim.unwrap_or(cross_attention_dim))?,
            reads_noise_level: c.is("class_embed_type", "timestep"),
            down_blocks: blocks.down,
            mid_block: blocks.mid,
            up_blocks: blocks.up,
            center_input_sample: c.flag("center_input_sample", false)?,
            timestep,
            added: AddedConfig::read(&c, timestep)?,
            time_cond_proj_dim: c.optional_count("time_cond_proj_dim", most::CHANNELS)?,
            time_embed_dim: c.optional_count("time_embedding_dim", most::CHANNELS)?.unwrap_or(4 * dim),
            downsample_padding: padding(&c)?,
            norm_num_groups,
            norm_eps: c.positive("norm_eps", 1e-5)? as f32,
            use_linear_projection: c.flag("use_linear_projection", false)?,
            conv_in_kernel: odd(&c, "conv_in_kernel")?,
            conv_out_kernel: odd(&c, "conv_out_kernel")?,
            block_out_channels,
        };
        if !matches!(c.get("upcast_attention"), Some(Value::Null)) {
            c.flag("upcast_attention", false)?; // nothing to do: the softmax is f32 always
        }
        Ok(config)
    }

    /// Does this config.json name blocks of DeepFloyd IF? Whatever else it says.
    pub fn names_blocks_of_pixels(json: &[u8]) -> bool {
        let config: Value = serde_json::from_slice(json).unwrap_or_default();
        config["down_block_types"][0].as_str().is_some_and(|name| DOWN[2..].contains(&name))
    }

    /// Self-attentions of a level, of its down and its up block: those of [`UnetOptions::windowed_level`](super::UnetOptions).
    pub fn self_attentions(&self, level: usize) -> usize {
        let levels = self.down_blocks.len();
        let blocks = [self.down_blocks.get(level), self.up_blocks.get((levels - 1).wrapping_sub(level))];
        let of = |block: &BlockConfig| match &block.attention {
            Some(attention) if !attention.only_cross_attention => attention.layers[..block.resnets].iter().sum(),
            _ => 0,
        };
        blocks.into_iter().flatten().map(of).sum()
    }

    /// Width of the text embeddings that the network reads.
    pub fn text_dim(&self) -> usize {
        self.encoder_hid_dim.unwrap_or(self.cross_attention_dim)
    }

    /// Channels of a sample: its output may have as many more, the logarithm of a variance each (Nichol & Dhariwal 2021,
    /// arXiv:2102.09672, sec. 3.1).
    pub fn sample_channels(&self) -> usize {
        if self.is_of_pixels() { 3 } else { self.out_channels }
    }

    /// Is it one of DeepFloyd IF's, over pixels? Sides of samples are then multiples of [`factor`](UnetConfig::factor).
    pub fn is_of_pixels(&self) -> bool {
        self.down_blocks.iter().any(|block| block.pixel.is_some())
    }

    /// Channels of the skip connections, in the order in which they are written.
    pub fn skip_channels(&self) -> Vec<usize> {
        let mut skips = vec![self.block_out_channels[0]];
        for (i, block) in self.down_blocks.iter().enumerate() {
            let downsampler = usize::from(i + 1 < self.down_blocks.len());
            skips.extend(vec![block.channels; block.resnets + downsampler]);
        }
        skips
    }

    /// Height and width of the latents shrink by this on the way to the mid block; other sizes work too.
    pub fn factor(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }
}

struct Blocks {
    down: Vec<BlockConfig>,
    mid: Option<MidBlockConfig>,
    up: Vec<BlockConfig>,
}

/// What a block's type says.
#[derive(Clone, Copy, PartialEq)]
struct BlockKind {
    attends: bool,
    of_pixels: bool,
}

impl BlockKind {
    /// As `down_block_types` or `up_block_types` name it; the names: without attention and with it, of latents and of pixels.
    fn read(c: &JsonConfig, key: &str, name: &str, [plain, cross, resnet, simple]: [&str; 4]) -> Result<BlockKind> {
        let (attends, of_pixels) = match name.strip_prefix("UNetRes").unwrap_or(name) {
            name if name == plain => (false, false),
            name if name == cross => (true, false),
            name if name == resnet => (false, true),
            name if name == simple => (true, true),
            name => {
                let wanted = format!("{name} is not supported, only {plain}, {cross}, {resnet} and {simple} are");
                return Err(c.error(key, wanted));
            }
        };
        Ok(BlockKind { attends, of_pixels })
    }
}

const DOWN: [&str; 4] =
    ["DownBlock2D", "CrossAttnDownBlock2D", "ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"];
const UP: [&str; 4] = ["UpBlock2D", "CrossAttnUpBlock2D", "ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"];
const PIXEL_MID: &str = "UNetMidBlock2DSimpleCrossAttn";

impl Blocks {
    fn read(c: &JsonConfig, channels: &[usize]) -> Result<Blocks> {
        let levels = channels.len();
        let types = |key: &str, default: &[&str], kinds: [&str; 4]| -> Result<Vec<BlockKind>> {
            let names = c.names(key, default)?;
            if names.len() != levels {
                return Err(c.error(key, format!("expected {levels} entries, as many as block_out_channels has")));
            }
            names.iter().map(|name| BlockKind::read(c, key, name, kinds)).collect()
        };
        let down_default = ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"];
        let up_default = ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"];
        let down_types = types("down_block_types", &down_default, DOWN)?;
        let up_types = types("up_block_types", &up_default, UP)?;
        let of_pixels = down_types[0].of_pixels;
        if down_types.iter().chain(&up_types).any(|kind| kind.of_pixels != of_pixels)
            || c.is("mid_block_type", PIXEL_MID) != of_pixels
        {
            let wanted =
                format!("blocks of DeepFloyd IF ({}, {}) stand beside others; expected one kind", DOWN[2], DOWN[3]);
            return Err(c.error("down_block_types", wanted));
        }

        let resnets = c.count_per_level("layers_per_block", levels, 2, most::LAYERS)?;
        // The published class takes either name and means the number of heads.
        let heads_key = match c.get("num_attention_heads") {
            None | Some(Value::Null) => "attention_head_dim",
            Some(_) => "num_attention_heads",
        };
        let heads = c.count_per_level(heads_key, levels, 8, most::CHANNELS)?;
        let only_cross_attention = c.flag_per_level("only_cross_attention", levels, false)?;
        let layers = TransformerLayers::read(c, levels)?;
        let attention = |level: usize, layers: Vec<usize>, only_cross_attention: bool| {
            if !channels[level].is_multiple_of(heads[level]) {
                let wanted =
                    format!("level {level} has {} channels, not divisible into as many heads", channels[level]);
                return Err(c.error(heads_key, wanted));
            }
            Ok(Some(AttentionConfig { heads: heads[level], layers, only_cross_attention }))
        };
        let added_kv =
            |level: usize, entry: usize, only_text: bool| AddedKvConfig::read(c, channels, [level, entry], only_text);
        let scale_factor = c.positive("resnet_out_scale_factor", 1.0)?;
        let pixel = |level: usize, entry: usize, kind: BlockKind| {
            let attention = match kind.attends {
                true => Some(added_kv(level, entry, only_cross_attention[level])?),
                false => None,
            };
            Ok::<_, Error>(PixelBlockConfig { attention, scale_factor })
        };

        let (mut down, mut up) = (Vec::new(), Vec::new());
        for level in 0..levels {
            let (resnets, kind) = (resnets[level], down_types[level]);
            let attention = match kind.attends && !of_pixels {
                true => attention(level, layers.down(c, level, resnets)?, only_cross_attention[level])?,
                false => None,
            };
            let pixel = of_pixels.then(|| pixel(level, level, kind)).transpose()?;
            down.push(BlockConfig { channels: channels[level], resnets, attention, pixel });
        }
        for (i, level) in (0..levels).rev().enumerate() {
            let (resnets, kind) = (resnets[level] + 1, up_types[i]);
            let attention = match kind.attends && !of_pixels {
                true => attention(level, layers.up(c, i, resnets)?, only_cross_attention[level])?,
                false => None,
            };
            let pixel = of_pixels.then(|| pixel(level, i, kind)).transpose()?;
            up.push(BlockConfig { channels: channels[level], resnets, attention, pixel });
        }
        let scale_factor = c.positive("mid_block_scale_factor", 1.0)?;
        let last = levels - 1;
        let mid = match c.get("mid_block_type") {
            Some(Value::Null) => None,
            Some(Value::String(name)) if name == "UNetMidBlock2D" => {
                Some(MidBlockConfig { attention: None, added_kv: None, scale_factor })
            }
            Some(Value::String(name)) if name == PIXEL_MID => {
                let only_text = match (c.get("mid_block_only_cross_attention"), c.get("only_cross_attention")) {
                    (None | Some(Value::Null), Some(Value::Bool(all))) => *all,
                    (None | Some(Value::Null), _) => false,
                    _ => c.flag("mid_block_only_cross_attention", false)?,
                };
                Some(MidBlockConfig { attention: None, added_kv: Some(added_kv(last, last, only_text)?), scale_factor })
            }
            Some(value) if value != "UNetMidBlock2DCrossAttn" => {
                let wanted = format!(
                    "not supported, only \"UNetMidBlock2DCrossAttn\", \"UNetMidBlock2D\", \"{PIXEL_MID}\" or null is"
                );
                return Err(c.error("mid_block_type", wanted));
            }
            _ => {
                let attention = attention(last, vec![layers.down(c, last, 1)?[0]], false)?;
                Some(MidBlockConfig { attention, added_kv: None, scale_factor })
            }
        };
        // Each count may be believed and their product not.
        let of = |block: &BlockConfig| block.resnets + block.attention.iter().flat_map(|a| &a.layers).sum::<usize>();
        let all: usize = down.iter().chain(&up).map(of).sum();
        if all > MOST_LAYERS {
            let wanted = format!("with {LAYERS} these are {all} layers; at most {MOST_LAYERS} are expected");
            return Err(c.error("layers_per_block", wanted));
        }
        Ok(Blocks { down, mid, up })
    }
}

impl AddedKvConfig {
    /// Of a level: `attention_head_dim` means the width of a head here. Of a list the published class takes the entry of the block's
    /// own number on the way up too, where the other lists are of levels.
    fn read(c: &JsonConfig, channels: &[usize], [level, entry]: [usize; 2], only_text: bool) -> Result<AddedKvConfig> {
        const KEY: &str = "attention_head_dim";
        let (width, channels) = (c.count_per_level(KEY, channels.len(), 8, most::CHANNELS)?[entry], channels[level]);
        if !channels.is_multiple_of(width) {
            let wanted = format!("level {level} has {channels} channels, not divisible into heads of this width");
            return Err(c.error(KEY, wanted));
        }
        let norms_text = c.is("cross_attention_norm", "group_norm");
        Ok(AddedKvConfig { heads: channels / width, only_text, norms_text })
    }
}

/// `transformer_layers_per_block` and `reverse_transformer_layers_per_block`: a count, one a level, or one a ResNet.
struct TransformerLayers {
    down: Vec<Value>,
    /// In the order of the up blocks.
    up: Vec<Value>,
    up_key: &'static str,
}

/// ResNets and transformer blocks of a UNet, at most: SDXL has 87.
const MOST_LAYERS: usize = 2048;
const LAYERS: &str = "transformer_layers_per_block";
const REVERSE_LAYERS: &str = "reverse_transformer_layers_per_block";

impl TransformerLayers {
    fn read(c: &JsonConfig, levels: usize) -> Result<TransformerLayers> {
        let per_level = |key: &str, value: &Value| match value {
            Value::Array(list) if list.len() == levels => Ok(list.clone()),
            Value::Array(_) => Err(c.error(key, format!("expected a list of {levels}"))),
            value => Ok(vec![value.clone(); levels]),
        };
        let down = per_level(LAYERS, c.get(LAYERS).unwrap_or(&json!(1)))?;
        match c.get(REVERSE_LAYERS) {
            None | Some(Value::Null) => {
                if down.iter().any(Value::is_array) {
                    return Err(c.error(REVERSE_LAYERS, format!("{LAYERS} is one a ResNet, so this must be given")));
                }
                let up = down.iter().rev().cloned().collect();
                Ok(TransformerLayers { down, up, up_key: LAYERS })
            }
            Some(value) => {
                Ok(TransformerLayers { down, up: per_level(REVERSE_LAYERS, value)?, up_key: REVERSE_LAYERS })
            }
        }
    }

    fn down(&self, c: &JsonConfig, level: usize, resnets: usize) -> Result<Vec<usize>> {
        per_resnet(c, LAYERS, &self.down[level], resnets)
    }

    fn up(&self, c: &JsonConfig, block: usize, resnets: usize) -> Result<Vec<usize>> {
        per_resnet(c, self.up_key, &self.up[block], resnets)
    }
}

/// A count for all ResNets of a block, or a list with at least one a ResNet.
fn per_resnet(c: &JsonConfig, key: &str, value: &Value, resnets: usize) -> Result<Vec<usize>> {
    let count = |value| as_count(value, most::LAYERS);
    let layers: Option<Vec<usize>> = match value {
        Value::Array(list) => list.get(..resnets).and_then(|list| list.iter().map(count).collect()),
        value => count(value).map(|layers| vec![layers; resnets]),
    };
    layers.ok_or_else(|| {
        let most = most::LAYERS;
        c.error(key, format!("expected counts from 1 to {most}, one for each of a block's {resnets} ResNets if a list"))
    })
}

/// All attentions read the same text, so a list of widths must be of equal ones.
fn cross_attention_dim(c: &JsonConfig, levels: usize) -> Result<usize> {
    let dims = c.count_per_level("cross_attention_dim", levels, 1280, most::CHANNELS)?;
    if dims.iter().any(|dim| *dim != dims[0]) {
        return Err(c.error("cross_attention_dim", "not supported, only equal widths are: there is one text encoder"));
    }
    Ok(dims[0])
}

/// An activation by name; `None` for null and absent.
fn activation(c: &JsonConfig, key: &str) -> Result<Option<Activation>> {
    match c.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(name)) => match name.to_lowercase().as_str() {
            "silu" | "swish" => Ok(Some(Activation::Silu)),
            "gelu" => Ok(Some(Activation::Gelu)),
            _ => Err(c.error(key, "not supported, only \"silu\" (or \"swish\") and \"gelu\" are")),
        },
        Some(_) => Err(c.error(key, "expected the name of an activation, \"silu\" or \"gelu\"")),
    }
}

/// Blocks of latents have no `resnet_skip_time_act`.
fn time_activations(c: &JsonConfig, of_resnets: Activation, of_pixels: bool) -> Result<Vec<Activation>> {
    let first = activation(c, "time_embedding_act_fn")?;
    let skips = c.flag("resnet_skip_time_act", false)? && of_pixels;
    Ok(first.into_iter().chain((!skips).then_some(of_resnets)).collect())
}

/// `width`: of the text.
fn text_pooling_heads(c: &JsonConfig, width: usize) -> Result<Option<usize>> {
    const KEY: &str = "addition_embed_type_num_heads";
    if !c.is("addition_embed_type", "text") {
        return Ok(None);
    }
    match c.count(KEY, 64, most::CHANNELS)? {
        heads if width.is_multiple_of(heads) => Ok(Some(heads)),
        _ => Err(c.error(KEY, format!("the text is {width} channels wide, not divisible into as many heads"))),
    }
}

fn padding(c: &JsonConfig) -> Result<usize> {
    match c.get("downsample_padding").map(Value::as_u64) {
        None => Ok(1),
        Some(Some(padding @ 0..=1)) => Ok(padding as usize),
        Some(_) => Err(c.error("downsample_padding", "not supported, only 0 or 1 is")),
    }
}

fn odd(c: &JsonConfig, key: &str) -> Result<usize> {
    let kernel = c.count(key, 3, most::KERNEL)?;
    if kernel % 2 == 1 { Ok(kernel) } else { Err(c.error(key, "expected an odd kernel size")) }
}

impl BlockConfig {
    /// What the ResNets' outputs are multiplied by.
    pub(super) fn scale(&self) -> f32 {
        self.pixel.as_ref().map_or(1.0, |pixel| (1.0 / pixel.scale_factor) as f32)
    }
}

impl MidBlockConfig {
    pub(super) fn scale(&self) -> f32 {
        (1.0 / self.scale_factor) as f32
    }
}
