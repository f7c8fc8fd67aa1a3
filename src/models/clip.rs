//! CLIP text encoder as transformers' `CLIPTextModel` and `CLIPTextModelWithProjection` store it: a causal transformer with
//! the norm before each block. Radford et al. 2021, arXiv:2103.00020, sec. 2.4; Cherti et al. 2022, arXiv:2212.07143 for
//! those of SD 2.x and SDXL.

use serde_json::Value;

use super::config::{JsonConfig, as_count, most};
use super::layers::{LayerNorm, Linear};
use super::weights::{WeightStore, Weights};
use crate::error::{Error, Result};
use crate::ops::{self, Activation, Attention};
use crate::runtime::{DType, Device, Tensor};

/// `text_encoder/config.json`; absent keys take the class defaults of transformers.
#[derive(Clone, Debug, PartialEq)]
pub struct ClipTextConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    /// Longest prompt in tokens, start and end included.
    pub max_position_embeddings: usize,
    /// `quick_gelu` (SD 1.x, SDXL's first) or `gelu` (SD 2.x, SDXL's second).
    pub hidden_act: Activation,
    pub layer_norm_eps: f32,
    pub eos_token_id: u32,
    /// Width of the projection of the pooled output: `projection_dim`, where `architectures` has
    /// `CLIPTextModelWithProjection` (SDXL's second encoder).
    pub projection_dim: Option<usize>,
}

/// Of CLIP's text and vision models.
pub(super) fn hidden_act(keys: &JsonConfig) -> Result<Activation> {
    match keys.get("hidden_act") {
        None => Ok(Activation::QuickGelu),
        Some(Value::String(name)) if name == "quick_gelu" => Ok(Activation::QuickGelu),
        Some(Value::String(name)) if name == "gelu" => Ok(Activation::Gelu),
        Some(_) => Err(keys.error("hidden_act", "not supported, only \"quick_gelu\" or \"gelu\" is")),
    }
}

impl ClipTextConfig {
    /// Parses and checks config.json; `what` (its path) stands in errors.
    ///
    /// # Errors
    /// [`Error::Config`]: not JSON, another kind of model, or a key whose value cannot be used, and what could be.
    pub fn from_json(what: &str, json: &str) -> Result<ClipTextConfig> {
        let keys = JsonConfig::parse(what, json, "CLIPTextModel")?;
        keys.only("model_type", &["clip_text_model".into(), Value::Null])?;
        let hidden_act = hidden_act(&keys)?;
        let eos_token_id = match keys.get("eos_token_id") {
            None => 49407,
            // Newer files may hold a list; of CLIP's it has one entry.
            Some(Value::Array(list)) if list.len() == 1 => token_id(&list[0]).ok_or_else(|| id_error(&keys))?,
            Some(value) => token_id(value).ok_or_else(|| id_error(&keys))?,
        };
        // Configurations of the plain class hold a projection_dim too.
        let projects = keys.names("architectures", &[])?.iter().any(|name| name == "CLIPTextModelWithProjection");
        let projection_dim = if projects { Some(keys.count("projection_dim", 512, most::CHANNELS)?) } else { None };
        let config = ClipTextConfig {
            vocab_size: keys.count("vocab_size", 49408, most::TOKENS)?,
            hidden_size: keys.count("hidden_size", 512, most::CHANNELS)?,
            intermediate_size: keys.count("intermediate_size", 2048, most::CHANNELS)?,
            num_hidden_layers: keys.count("num_hidden_layers", 12, most::LAYERS)?,
            num_attention_heads: keys.count("num_attention_heads", 8, most::CHANNELS)?,
            max_position_embeddings: keys.count("max_position_embeddings", 77, most::POSITIONS)?,
            hidden_act,
            layer_norm_eps: keys.positive("layer_norm_eps", 1e-5)? as f32,
            eos_token_id,
            projection_dim,
        };
        if !config.hidden_size.is_multiple_of(config.num_attention_heads) {
            let reason = format!("expected a number that divides hidden_size = {}", config.hidden_size);
            return Err(keys.error("num_attention_heads", reason));
        }
        Ok(config)
    }
}

fn token_id(value: &Value) -> Option<u32> {
    if value.as_u64() == Some(0) { Some(0) } else { as_count(value, most::TOKENS).map(|id| id as u32) }
}

fn id_error(keys: &JsonConfig) -> Error {
    keys.error("eos_token_id", "expected one token id")
}

/// The encoder. Field names are checkpoint keys below `text_model.`
pub struct ClipTextModel {
    config: ClipTextConfig,
    device: Device,
    dtype: DType,
    token_embedding: Tensor,    // [V, C]
    position_embedding: Tensor, // [P, C]
    layers: Vec<EncoderLayer>,
    final_layer_norm: LayerNorm,     // [C]
    text_projection: Option<Linear>, // [P, C], no bias; beside `text_model.`
    /// Position 0 for every row: makes the embedding op pick rows. `[1, C]`
    zero: Tensor,
}

/// What [`forward`](ClipTextModel::forward) is asked for; layers that nothing of it needs are not computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClipOutput {
    /// Which hidden state, counted from the last as in transformers' `hidden_states[-hidden]`: 1 is the last layer's output,
    /// 2 the last layer's input, up to `num_hidden_layers + 1`, the embeddings.
    pub hidden: usize,
    /// The hidden state goes through the final layer norm.
    pub final_layer_norm: bool,
    /// The pooled output too, of the last layer whichever `hidden` is.
    pub pooled: bool,
}

impl ClipOutput {
    /// `last_hidden_state`, which SD 1.x and 2.x read. Clip skip n there is `ClipOutput { hidden: n + 1, ..LAST }`.
    pub const LAST: ClipOutput = ClipOutput { hidden: 1, final_layer_norm: true, pooled: false };

    /// `hidden_states[-2]`, which SDXL reads, without the final norm. Clip skip n there is
    /// `ClipOutput { hidden: n + 2, ..PENULTIMATE }`.
    pub const PENULTIMATE: ClipOutput = ClipOutput { hidden: 2, final_layer_norm: false, pooled: false };

    /// With the pooled output.
    pub fn with_pooled(self) -> ClipOutput {
        ClipOutput { pooled: true, ..self }
    }
}

/// What the encoder says of `N` prompts of `L` tokens, in the weights' dtype.
pub struct TextEmbeddings {
    /// The hidden state asked for: `[N, L, C]`.
    pub hidden: Tensor,
    /// If asked for: the last layer's output after the final norm, at each row's first end-of-text token: `[N, C]`.
    pub pooled: Option<Tensor>,
    /// `text_embeds`, the projection of `pooled`, of a model that has one: `[N, P]`.
    pub projected: Option<Tensor>,
}

/// What an [`EncoderLayer`] is made of.
#[derive(Clone, Copy, Debug)]
pub(super) struct EncoderShape {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub heads: usize,
    pub activation: Activation,
    pub eps: f32,
    /// Do tokens see those before them alone?
    pub causal: bool,
}

/// A layer of the text encoder, and of the image encoder.
pub(super) struct EncoderLayer {
    layer_norm1: LayerNorm, // [C]
    qkv: Linear,            // [3 C, C]: q_proj, k_proj, v_proj
    out_proj: Linear,       // [C, C]
    layer_norm2: LayerNorm, // [C]
    fc1: Linear,            // [M, C]
    fc2: Linear,            // [C, M]
    shape: EncoderShape,
}

impl EncoderLayer {
    pub(super) fn load(w: &Weights, shape: EncoderShape) -> Result<EncoderLayer> {
        let EncoderShape { hidden_size: c, intermediate_size: m, eps, .. } = shape;
        let (attention, mlp) = (w.at("self_attn"), w.at("mlp"));
        Ok(EncoderLayer {
            layer_norm1: LayerNorm::load(&w.at("layer_norm1"), c, eps)?,
            qkv: Linear {
                weight: attention.stacked(&["q_proj.weight", "k_proj.weight", "v_proj.weight"], c, Some(c))?.into(),
                bias: Some(attention.stacked(&["q_proj.bias", "k_proj.bias", "v_proj.bias"], c, None)?),
            },
            out_proj: Linear::load(&attention.at("out_proj"), c, c)?,
            layer_norm2: LayerNorm::load(&w.at("layer_norm2"), c, eps)?,
            fc1: Linear::load(&mlp.at("fc1"), m, c)?,
            fc2: Linear::load(&mlp.at("fc2"), c, m)?,
            shape,
        })
    }

    /// `x: [N, L, C]` to the same.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let EncoderShape { heads, activation, causal, .. } = self.shape;
        let [n, l, c] = x.dims("EncoderLayer", "x")?;
        let qkv = self.qkv.forward(&self.layer_norm1.forward(x)?)?; // [N, L, 3 C]
        let qkv = qkv.reshape(&[n, l, 3, heads, c / heads])?;
        let h = ops::attention(Attention::Packed { qkv: &qkv, causal })?.reshape(&[n, l, c])?;
        let x = self.out_proj.forward_residual(&h, x)?;
        let h = self.fc1.fused(&self.layer_norm2.forward(&x)?, activation, None)?; // [N, L, M]
        self.fc2.forward_residual(&h, &x)
    }
}

impl ClipTextModel {
    /// Takes every tensor of `store`: keys with or without `text_model.`; `position_ids` (0, 1, 2, ... in older files)
    /// and a `text_projection` that `config` does not ask for are let go.
    ///
    /// # Errors
    /// [`Error::Weight`]: missing, extra, of another shape, not finite; [`Error::OutOfMemory`].
    pub fn load(store: WeightStore, config: &ClipTextConfig) -> Result<ClipTextModel> {
        let store = ClipTextModel::prepared(store, config)?;
        let model = ClipTextModel::from_weights(&store.root(), config)?;
        store.finish()?;
        Ok(model)
    }

    /// A store without the tensors that files have and the model does not read, for
    /// [`from_weights`](ClipTextModel::from_weights).
    ///
    /// # Errors
    /// As [`WeightStore::rename`].
    pub fn prepared(mut store: WeightStore, config: &ClipTextConfig) -> Result<WeightStore> {
        store.rename(|key| {
            let projection = key == "text_projection.weight" && config.projection_dim.is_none();
            let unused = key.ends_with("embeddings.position_ids") || projection;
            (!unused).then(|| key.to_string())
        })?;
        Ok(store)
    }

    /// Takes the model's tensors and leaves it to the caller to look for others ([`WeightStore::finish`]) or at what was
    /// asked for ([`WeightStore::manifest`]).
    ///
    /// # Errors
    /// As [`load`](ClipTextModel::load).
    pub fn from_weights(w: &Weights, config: &ClipTextConfig) -> Result<ClipTextModel> {
        let text_projection = match config.projection_dim {
            None => None,
            Some(dim) => Some(Linear::load_without_bias(&w.at("text_projection"), dim, config.hidden_size)?),
        };
        // Older transformers put the whole model below one name; a manifest is of the published, older files.
        let prefixed = w.at("text_model");
        let w = if prefixed.contains("final_layer_norm.weight") { &prefixed } else { w };
        let (c, eps) = (config.hidden_size, config.layer_norm_eps);
        let embeddings = w.at("embeddings");
        let shape = EncoderShape {
            hidden_size: c,
            intermediate_size: config.intermediate_size,
            heads: config.num_attention_heads,
            activation: config.hidden_act,
            eps,
            causal: true,
        };
        let layer = |i| EncoderLayer::load(&w.at(format!("encoder.layers.{i}")), shape);
        Ok(ClipTextModel {
            device: w.device().clone(),
            dtype: w.dtype(),
            token_embedding: embeddings.tensor("token_embedding.weight", &[config.vocab_size, c])?,
            position_embedding: embeddings.tensor("position_embedding.weight", &[config.max_position_embeddings, c])?,
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            final_layer_norm: LayerNorm::load(&w.at("final_layer_norm"), c, eps)?,
            text_projection,
            zero: Tensor::zeros(w.device(), &[1, c], w.dtype())?,
            config: config.clone(),
        })
    }

    /// With `count` further rows `[count, C]` of the embedding table, those of textual inversion (Gal et al. 2022,
    /// arXiv:2208.01618): row k is the id `vocab_size + k`, which never ends a text.
    ///
    /// # Errors
    /// [`Error::Argument`]: `rows` has another number of values; [`Error::OutOfMemory`].
    pub fn with_learned(self, rows: &[f32], count: usize) -> Result<ClipTextModel> {
        let rows = Tensor::from_f32(&self.device, &[count, self.config.hidden_size], self.dtype, rows)?;
        let token_embedding = Tensor::concat(&[self.token_embedding, rows])?;
        Ok(ClipTextModel { token_embedding, ..self })
    }

    pub fn config(&self) -> &ClipTextConfig {
        &self.config
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// `ids`: N rows of equal length L, at most `max_position_embeddings`. There is no padding mask: the models were
    /// trained to attend to the padding.
    ///
    /// # Errors
    /// [`Error::Argument`]: no rows or no tokens, rows of different lengths, a row longer than the encoder's positions,
    /// an id that is not below `vocab_size`, a hidden state that the model does not have; [`Error::OutOfMemory`].
    pub fn forward(&self, ids: &[Vec<u32>], output: ClipOutput) -> Result<TextEmbeddings> {
        let Some(layers) = (self.layers.len() + 1).checked_sub(output.hidden).filter(|_| output.hidden > 0) else {
            let want = format!("1 to {}, the model's hidden states counted from the last", self.layers.len() + 1);
            return Err(Error::argument("ClipTextModel", "hidden", output.hidden, want));
        };
        let tokens = self.checked(ids)?;
        let mut x = ops::embedding(&tokens, &self.token_embedding, &self.position_embedding)?; // [N, L, C]
        for layer in &self.layers[..layers] {
            x = layer.forward(&x)?;
        }
        let hidden = if output.final_layer_norm { self.final_layer_norm.forward(&x)? } else { x.clone() };
        if !output.pooled {
            return Ok(TextEmbeddings { hidden, pooled: None, projected: None });
        }
        for layer in &self.layers[layers..] {
            x = layer.forward(&x)?;
        }
        // Rows are normed one by one, so only those that are read need it.
        let pooled = self.final_layer_norm.forward(&self.pool(&x, ids)?)?;
        let projected = self.text_projection.as_ref().map(|projection| projection.forward(&pooled)).transpose()?;
        Ok(TextEmbeddings { hidden, pooled: Some(pooled), projected })
    }

    /// The ids as a tensor `[N, L]`.
    fn checked(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        let error = |got: String, want: String| Err(Error::argument("ClipTextModel", "ids", got, want));
        let (longest, length) = (self.config.max_position_embeddings, ids.first().map_or(0, Vec::len));
        if length == 0 || length > longest {
            return error(format!("{} rows of {length} tokens", ids.len()), format!("rows of 1 to {longest} tokens"));
        }
        if let Some(other) = ids.iter().find(|row| row.len() != length) {
            return error(format!("rows of {length} and of {} tokens", other.len()), "rows of equal length".into());
        }
        let rows = self.token_embedding.shape()[0];
        if let Some(id) = ids.iter().flatten().find(|&&id| id as usize >= rows) {
            let learned = match rows - self.config.vocab_size {
                0 => String::new(),
                learned => format!(" and {learned} learned rows"),
            };
            return error(format!("{id}"), format!("token ids below vocab_size = {}{learned}", self.config.vocab_size));
        }
        Tensor::from_u32(&self.device, &[ids.len(), length], &ids.concat())
    }

    /// Row `end_of_text` of every prompt of `x: [N, L, C]`: `[N, C]`.
    fn pool(&self, x: &Tensor, ids: &[Vec<u32>]) -> Result<Tensor> {
        let [n, l, c] = x.dims("ClipTextModel", "x")?;
        let rows: Vec<u32> = ids.iter().enumerate().map(|(i, row)| (i * l + self.end_of_text(row)) as u32).collect();
        let rows = Tensor::from_u32(&self.device, &[n, 1], &rows)?;
        ops::embedding(&rows, &x.reshape(&[n * l, c])?, &self.zero)?.reshape(&[n, c])
    }

    /// First end-of-text token of a prompt; 0 when it has none, as transformers has it.
    fn end_of_text(&self, ids: &[u32]) -> usize {
        // Configs from before transformers 4.31 (SD 1.5 and 2.1 among them) hold a wrong id, 2; there the largest id is
        // taken for the end of text, which in the published vocabulary it is.
        let end = match self.config.eos_token_id {
            2 => {
                let own = ids.iter().copied().filter(|&id| (id as usize) < self.config.vocab_size);
                own.max().unwrap_or_default()
            }
            id => id,
        };
        ids.iter().position(|&id| id == end).unwrap_or_default()
    }
}
