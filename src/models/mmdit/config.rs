use serde_json::{Value, json};

use crate::error::Result;
use crate::models::config::{JsonConfig, most};

/// `transformer/config.json`; absent keys take the class defaults of diffusers' `SD3Transformer2DModel`.
#[derive(Clone, Debug, PartialEq)]
pub struct MmditConfig {
    /// Native latent height and width: [H, W].
    pub sample_size: Option<[usize; 2]>,
    /// Rows and columns of latent cells that are a token.
    pub patch_size: usize,
    pub in_channels: usize,
    pub out_channels: usize,
    /// Transformer blocks.
    pub num_layers: usize,
    pub num_attention_heads: usize,
    pub attention_head_dim: usize,
    /// Width of the text embeddings.
    pub joint_attention_dim: usize,
    /// Width of the pooled text embedding.
    pub pooled_projection_dim: usize,
    /// Side of the table of positions, in patches: no picture has more of them along a side.
    pub pos_embed_max_size: usize,
    /// Of each block: has it a second attention, of the picture to itself (SD3.5-medium)?
    pub has_dual_attention: Vec<bool>,
    /// Queries and keys are normalised (SD3.5).
    pub has_qk_norm: bool,
}

impl MmditConfig {
    /// Parses and checks config.json; `what` (its path) stands in errors.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) with key and value: of the wrong type, or a part of the published class that
    /// SD3 and SD3.5 do not use.
    pub fn from_json(what: &str, json: &str) -> Result<MmditConfig> {
        let c = JsonConfig::parse(what, json, "SD3Transformer2DModel")?;
        c.only("qk_norm", &[Value::Null, json!("rms_norm")])?;
        let num_layers = c.count("num_layers", 18, most::LAYERS)?;
        let in_channels = c.count("in_channels", 16, most::CHANNELS)?;
        let config = MmditConfig {
            sample_size: c.size("sample_size")?,
            patch_size: c.count("patch_size", 2, most::KERNEL)?,
            in_channels,
            out_channels: match c.get("out_channels") {
                Some(Value::Null) => in_channels,
                _ => c.count("out_channels", 16, most::CHANNELS)?,
            },
            num_layers,
            num_attention_heads: c.count("num_attention_heads", 18, most::CHANNELS)?,
            attention_head_dim: c.count("attention_head_dim", 64, most::CHANNELS)?,
            joint_attention_dim: c.count("joint_attention_dim", 4096, most::CHANNELS)?,
            pooled_projection_dim: c.count("pooled_projection_dim", 2048, most::CHANNELS)?,
            pos_embed_max_size: c.count("pos_embed_max_size", 96, most::SIDE)?,
            has_dual_attention: dual_attention(&c, num_layers)?,
            has_qk_norm: matches!(c.get("qk_norm"), Some(Value::String(_))),
        };
        let width = config.width();
        if width > most::CHANNELS {
            let wanted = format!("with attention_head_dim {} that is a width of {width}", config.attention_head_dim);
            return Err(c.error("num_attention_heads", format!("{wanted}, expected at most {}", most::CHANNELS)));
        }
        if c.count("caption_projection_dim", 1152, most::CHANNELS)? != width {
            let wanted = format!("expected {width}, num_attention_heads times attention_head_dim");
            return Err(c.error("caption_projection_dim", wanted));
        }
        Ok(config)
    }

    /// Channels of a token.
    pub fn width(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }
}

/// `dual_attention_layers`: numbers of blocks, from 0.
fn dual_attention(c: &JsonConfig, num_layers: usize) -> Result<Vec<bool>> {
    const KEY: &str = "dual_attention_layers";
    let mut has = vec![false; num_layers];
    let Some(value) = c.get(KEY) else { return Ok(has) };
    let wanted = || c.error(KEY, format!("expected a list of numbers of blocks, from 0 to {}", num_layers - 1));
    for number in value.as_array().ok_or_else(wanted)? {
        let number = number.as_u64().and_then(|number| usize::try_from(number).ok());
        *number.and_then(|number| has.get_mut(number)).ok_or_else(wanted)? = true;
    }
    Ok(has)
}
