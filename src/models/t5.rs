//! T5's text encoder, version 1.1, as transformers' `T5EncoderModel` stores it: SD 3's third encoder and DeepFloyd IF's. Raffel et
//! al. 2020, arXiv:1910.10683, sec. 2.1; gated feed-forward layers: Shazeer 2020, arXiv:2002.05202.

use serde_json::Value;

use super::config::{JsonConfig, most};
use super::layers::Linear;
use super::weights::{WeightStore, Weights};
use crate::error::{Error, Result};
use crate::ops::{self, Activation, Attention, AttentionOptions};
use crate::runtime::{DType, Device, Tensor};

/// `text_encoder_3/config.json`; absent keys take the class defaults of transformers.
#[derive(Clone, Debug, PartialEq)]
pub struct T5Config {
    pub vocab_size: usize,
    /// C
    pub d_model: usize,
    /// Width of a head; all heads together need not be `d_model` wide.
    pub d_kv: usize,
    pub d_ff: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    /// Half of them for keys after the query, half for those before it; of each half one half for single distances.
    pub relative_attention_num_buckets: usize,
    /// Distance in tokens from which on all fall into the last bucket.
    pub relative_attention_max_distance: usize,
    pub layer_norm_epsilon: f32,
}

impl T5Config {
    /// Parses and checks config.json; `what` (its path) stands in errors.
    ///
    /// # Errors
    /// [`Error::Config`]: not JSON, another kind of model (T5 before version 1.1 has no gates), or a key whose value cannot be
    /// used, and what could be.
    pub fn from_json(what: &str, json: &str) -> Result<T5Config> {
        let keys = JsonConfig::parse(what, json, "T5EncoderModel")?;
        keys.only("model_type", &["t5".into(), Value::Null])?;
        keys.only("is_decoder", &[false.into()])?;
        if keys.get("feed_forward_proj").is_none_or(|kind| kind != "gated-gelu") {
            return Err(keys.error("feed_forward_proj", "not supported, only \"gated-gelu\" (T5 version 1.1) is"));
        }
        let config = T5Config {
            vocab_size: keys.count("vocab_size", 32128, most::TOKENS)?,
            d_model: keys.count("d_model", 512, most::CHANNELS)?,
            d_kv: keys.count("d_kv", 64, most::CHANNELS)?,
            d_ff: keys.count("d_ff", 2048, most::CHANNELS)?,
            num_layers: keys.count("num_layers", 6, most::LAYERS)?,
            num_heads: keys.count("num_heads", 8, most::CHANNELS)?,
            relative_attention_num_buckets: keys.count("relative_attention_num_buckets", 32, most::POSITIONS)?,
            relative_attention_max_distance: keys.count("relative_attention_max_distance", 128, most::POSITIONS)?,
            layer_norm_epsilon: keys.positive("layer_norm_epsilon", 1e-6)? as f32,
        };
        let single = config.relative_attention_num_buckets / 4;
        if single == 0 {
            return Err(keys.error("relative_attention_num_buckets", "expected 4 or more"));
        }
        if config.relative_attention_max_distance <= single {
            let wanted = format!("expected more than {single}, a quarter of relative_attention_num_buckets");
            return Err(keys.error("relative_attention_max_distance", wanted));
        }
        Ok(config)
    }

    /// The bucket of a key `distance` tokens after its query (before it where negative): single distances near the query, further
    /// away ranges that grow logarithmically. In f32, as the published code has it.
    fn bucket(&self, distance: isize) -> usize {
        let side = self.relative_attention_num_buckets / 2;
        let single = side / 2;
        let after = if distance > 0 { side } else { 0 };
        let far = distance.unsigned_abs();
        if far < single {
            return after + far;
        }
        let range = (self.relative_attention_max_distance as f64 / single as f64).ln() as f32;
        let share = (far as f32 / single as f32).ln() / range;
        let bucket = single + (share * (side - single) as f32) as usize;
        after + bucket.min(side - 1)
    }
}

/// Root mean square norm: no mean is taken off and no bias added.
struct RmsNorm {
    weight: Tensor, // [C]
    eps: f32,
}

impl RmsNorm {
    fn load(w: &Weights, config: &T5Config) -> Result<RmsNorm> {
        Ok(RmsNorm { weight: w.tensor("weight", &[config.d_model])?, eps: config.layer_norm_epsilon })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::rms_norm(ops::RmsNorm { x, gamma: &self.weight, eps: self.eps })
    }
}

/// `encoder.block.{i}`; nothing has a bias.
struct Block {
    attention_norm: RmsNorm,    // layer.0.layer_norm
    qkv: Linear,                // [3 heads d_kv, C]: layer.0.SelfAttention.{q, k, v}
    o: Linear,                  // [C, heads d_kv]: layer.0.SelfAttention.o
    feed_forward_norm: RmsNorm, // layer.1.layer_norm
    wi: Linear,                 // [2 d_ff, C], interleaved: layer.1.DenseReluDense.wi_1 (values) and wi_0 (gates)
    wo: Linear,                 // [C, d_ff]: layer.1.DenseReluDense.wo
    heads: usize,
}

impl Block {
    fn load(w: &Weights, config: &T5Config) -> Result<Block> {
        let (c, inner) = (config.d_model, config.num_heads * config.d_kv);
        let (first, second) = (w.at("layer.0"), w.at("layer.1"));
        let (attention, dense) = (first.at("SelfAttention"), second.at("DenseReluDense"));
        let names = ["q.weight", "k.weight", "v.weight"];
        Ok(Block {
            attention_norm: RmsNorm::load(&first.at("layer_norm"), config)?,
            qkv: Linear { weight: attention.stacked(&names, inner, Some(c))?.into(), bias: None },
            o: Linear::load_without_bias(&attention.at("o"), c, inner)?,
            feed_forward_norm: RmsNorm::load(&second.at("layer_norm"), config)?,
            wi: Linear { weight: dense.gated("wi_1.weight", "wi_0.weight", config.d_ff, c)?.into(), bias: None },
            wo: Linear::load_without_bias(&dense.at("wo"), c, config.d_ff)?,
            heads: config.num_heads,
        })
    }

    /// `x: [N, L, C]` to the same; `bias: [B, heads, L, L]`, added to the scores.
    fn forward(&self, x: &Tensor, bias: &Tensor) -> Result<Tensor> {
        let [n, l, _] = x.dims("T5Encoder", "x")?;
        let inner = self.qkv.weight.rows() / 3;
        let qkv = self.qkv.forward(&self.attention_norm.forward(x)?)?; // [N, L, 3 heads d_kv]
        let qkv = qkv.reshape(&[n, l, 3, self.heads, inner / self.heads])?;
        let options = AttentionOptions { scale: Some(1.0), bias: Some(bias), ..AttentionOptions::default() };
        let h = ops::attention_with(Attention::Packed { qkv: &qkv, causal: false }, options)?;
        let x = self.o.forward_residual(&h.reshape(&[n, l, inner])?, x)?;
        let h = self.wi.fused(&self.feed_forward_norm.forward(&x)?, Activation::GegluTanh, None)?; // [N, L, d_ff]
        self.wo.forward_residual(&h, &x)
    }
}

/// The encoder. Activations of the published one leave the range of f16; see [`dtype_for`](T5Encoder::dtype_for).
pub struct T5Encoder {
    config: T5Config,
    device: Device,
    dtype: DType,
    shared: Tensor, // [V, C]
    /// Added to the scores of a head, by the bucket of the distance between query and key: `[buckets, heads]`, the first block's, which
    /// all share. On the host, as it is needed once per call; without values on the meta device.
    relative_attention_bias: Vec<f32>,
    blocks: Vec<Block>,
    final_layer_norm: RmsNorm, // [C]
    /// What the embedding op adds to every row: nothing, as T5 has no positions. `[1, C]`
    zero: Tensor,
}

impl T5Encoder {
    /// What the weights are loaded in where the rest of a model is in `dtype`: bf16 in place of f16, in which the sums of the published
    /// encoder's feed-forward layers overflow.
    pub fn dtype_for(dtype: DType) -> DType {
        if dtype == DType::F16 { DType::BF16 } else { dtype }
    }

    /// Takes every tensor of `store`.
    ///
    /// # Errors
    /// [`Error::Weight`]: missing, extra, of another shape, not finite; [`Error::OutOfMemory`].
    pub fn load(store: WeightStore, config: &T5Config) -> Result<T5Encoder> {
        let store = T5Encoder::prepared(store)?;
        let model = T5Encoder::from_weights(&store.root(), config)?;
        store.finish()?;
        Ok(model)
    }

    /// A store without what files have and the encoder does not read, for [`from_weights`](T5Encoder::from_weights): the decoder, and
    /// the second name of the embedding, `encoder.embed_tokens.weight`, which is the only one in some files.
    ///
    /// # Errors
    /// As [`WeightStore::rename`].
    pub fn prepared(mut store: WeightStore) -> Result<WeightStore> {
        const SHARED: &str = "shared.weight";
        let has_shared = store.contains(SHARED);
        store.rename(|key| match key {
            "encoder.embed_tokens.weight" => (!has_shared).then(|| SHARED.to_string()),
            "lm_head.weight" => None,
            _ => (!key.starts_with("decoder.")).then(|| key.to_string()),
        })?;
        Ok(store)
    }

    /// Takes the model's tensors and leaves it to the caller to look for others ([`WeightStore::finish`]) or at what was
    /// asked for ([`WeightStore::manifest`]).
    ///
    /// # Errors
    /// As [`load`](T5Encoder::load).
    pub fn from_weights(w: &Weights, config: &T5Config) -> Result<T5Encoder> {
        let encoder = w.at("encoder");
        let buckets = [config.relative_attention_num_buckets, config.num_heads];
        let bias = encoder.at("block.0.layer.0.SelfAttention").tensor("relative_attention_bias.weight", &buckets)?;
        let relative_attention_bias = match w.device() {
            Device::Meta(_) => Vec::new(),
            _ => bias.to_f32_vec()?,
        };
        let block = |i| Block::load(&encoder.at(format!("block.{i}")), config);
        Ok(T5Encoder {
            device: w.device().clone(),
            dtype: w.dtype(),
            shared: w.tensor("shared.weight", &[config.vocab_size, config.d_model])?,
            relative_attention_bias,
            blocks: (0..config.num_layers).map(block).collect::<Result<_>>()?,
            final_layer_norm: RmsNorm::load(&encoder.at("final_layer_norm"), config)?,
            zero: Tensor::zeros(w.device(), &[1, config.d_model], w.dtype())?,
            config: config.clone(),
        })
    }

    pub fn config(&self) -> &T5Config {
        &self.config
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// `last_hidden_state`: `[N, L, C]`, in the weights' dtype.
    ///
    /// * `ids`: N rows of equal length L
    /// * `lengths`: tokens of each row that stand before its padding, which nothing attends to then (DeepFloyd IF); `None`: the
    ///   padding is read like text (SD 3)
    ///
    /// # Errors
    /// [`Error::Argument`]: no rows or no tokens, rows of different lengths, an id that is not below `vocab_size`, `lengths` that are
    /// not 1 to L for each row; [`Error::OutOfMemory`].
    pub fn forward(&self, ids: &[Vec<u32>], lengths: Option<&[usize]>) -> Result<Tensor> {
        let [n, l] = self.check(ids, lengths)?;
        let bias = self.bias(l, lengths)?;
        let tokens = Tensor::from_u32(&self.device, &[n * l, 1], &ids.concat())?;
        let x = ops::embedding(&tokens, &self.shared, &self.zero)?; // [N L, 1, C]
        let mut x = x.reshape(&[n, l, self.config.d_model])?;
        for block in &self.blocks {
            x = block.forward(&x, &bias)?;
        }
        self.final_layer_norm.forward(&x)
    }

    /// N and L.
    fn check(&self, ids: &[Vec<u32>], lengths: Option<&[usize]>) -> Result<[usize; 2]> {
        let error = |arg, got: String, want: String| Err(Error::argument("T5Encoder", arg, got, want));
        let length = ids.first().map_or(0, Vec::len);
        if length == 0 || length > most::POSITIONS {
            let (got, most) = (format!("{} rows of {length} tokens", ids.len()), most::POSITIONS);
            return error("ids", got, format!("rows of 1 to {most} tokens"));
        }
        if let Some(other) = ids.iter().find(|row| row.len() != length) {
            return error(
                "ids",
                format!("rows of {length} and of {} tokens", other.len()),
                "rows of equal length".into(),
            );
        }
        if let Some(id) = ids.iter().flatten().find(|&&id| id as usize >= self.config.vocab_size) {
            let want = format!("token ids below vocab_size = {}", self.config.vocab_size);
            return error("ids", id.to_string(), want);
        }
        match lengths {
            Some(all) if all.len() != ids.len() || all.iter().any(|of_row| !(1..=length).contains(of_row)) => {
                error("lengths", format!("{all:?}"), format!("1 to {length} for each of {} rows", ids.len()))
            }
            _ => Ok([ids.len(), length]),
        }
    }

    /// What is added to the scores of all blocks: `[1, heads, L, L]`, or `[N, heads, L, L]` where rows have lengths of their own.
    fn bias(&self, l: usize, lengths: Option<&[usize]>) -> Result<Tensor> {
        let lengths = lengths.filter(|lengths| lengths.iter().any(|&length| length < l)).unwrap_or(&[]);
        let heads = self.config.num_heads;
        let shape = [lengths.len().max(1), heads, l, l];
        if let Device::Meta(_) = self.device {
            return Tensor::uninit(&self.device, &shape, self.dtype);
        }
        // Of all distances from -(L - 1) to L - 1.
        let buckets: Vec<usize> = (0..2 * l - 1).map(|i| self.config.bucket(i as isize - (l as isize - 1))).collect();
        let mut values = Vec::with_capacity(shape.iter().product());
        for row in 0..shape[0] {
            let seen = lengths.get(row).copied().unwrap_or(l);
            for (head, query) in (0..heads).flat_map(|head| (0..l).map(move |query| (head, query))) {
                let of_key = |key: usize| match key < seen {
                    true => self.relative_attention_bias[buckets[key + l - 1 - query] * heads + head],
                    false => f32::NEG_INFINITY,
                };
                values.extend((0..l).map(of_key));
            }
        }
        Tensor::from_f32(&self.device, &shape, self.dtype, &values)
    }
}
