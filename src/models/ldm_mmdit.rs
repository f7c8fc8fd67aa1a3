//! Keys of SD3's first files (`joint_blocks`, as Stability AI and ComfyUI write them) to those of diffusers' SD3Transformer2DModel, and
//! the configuration that the tensors' shapes say.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::ldm;
use super::weights::Entry;

const NAMES: [(&str, &str); 8] = [
    ("x_embedder.proj", "pos_embed.proj"),
    ("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
    ("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
    ("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
    ("context_embedder", "context_embedder"),
    ("final_layer.linear", "proj_out"),
    ("final_layer.adaLN_modulation.1", "norm_out.linear"),
];
/// Of a block's stream of pixels, and of its stream of text.
const STREAMS: [(&str, [(&str, &str); 9]); 2] = [
    (
        "x_block.",
        [
            ("adaLN_modulation.1", "norm1.linear"),
            ("attn.proj", "attn.to_out.0"),
            ("attn.ln_q", "attn.norm_q"),
            ("attn.ln_k", "attn.norm_k"),
            ("attn2.proj", "attn2.to_out.0"),
            ("attn2.ln_q", "attn2.norm_q"),
            ("attn2.ln_k", "attn2.norm_k"),
            ("mlp.fc1", "ff.net.0.proj"),
            ("mlp.fc2", "ff.net.2"),
        ],
    ),
    (
        "context_block.",
        [
            ("adaLN_modulation.1", "norm1_context.linear"),
            ("attn.proj", "attn.to_add_out"),
            ("attn.ln_q", "attn.norm_added_q"),
            ("attn.ln_k", "attn.norm_added_k"),
            // Text has one attention.
            ("attn2.proj", "attn2.to_add_out"),
            ("attn2.ln_q", "attn2.norm_added_q"),
            ("attn2.ln_k", "attn2.norm_added_k"),
            ("mlp.fc1", "ff_context.net.0.proj"),
            ("mlp.fc2", "ff_context.net.2"),
        ],
    ),
];

/// What becomes of a tensor.
#[derive(Debug, PartialEq, Eq)]
enum Named {
    Whole(String),
    /// Rows that diffusers holds apart: q, k and v.
    Thirds([String; 3]),
    /// Of the norms that end a stream: the rows of the shift come first here, those of the scale in diffusers, so that a layer
    /// takes them one by one.
    ShiftAndScale([String; 2]),
}

/// The names in diffusers of a tensor; `last`: the number of the last block. `None`: not a key of such a transformer.
fn named(key: &str, last: usize) -> Option<Named> {
    if key == "pos_embed" {
        return Some(Named::Whole("pos_embed.pos_embed".into()));
    }
    let (module, kind) = key.rsplit_once('.')?;
    let halves = |module: &str| Named::ShiftAndScale(["shift", "scale"].map(|half| format!("{module}.{half}.{kind}")));
    let Some(rest) = module.strip_prefix("joint_blocks.") else {
        let (_, name) = NAMES.iter().find(|(from, _)| *from == module)?;
        return Some(match *name {
            "norm_out.linear" => halves(name),
            name => Named::Whole(format!("{name}.{kind}")),
        });
    };
    let (number, rest) = rest.split_once('.')?;
    let block: usize = number.parse().ok()?;
    let (stream, names) = STREAMS.iter().find(|(stream, _)| rest.starts_with(stream))?;
    let rest = &rest[stream.len()..];
    let at = format!("transformer_blocks.{block}");
    if let Some(attention) = rest.strip_suffix(".qkv") {
        let parts =
            if *stream == "x_block." { ["to_q", "to_k", "to_v"] } else { ["add_q_proj", "add_k_proj", "add_v_proj"] };
        return Some(Named::Thirds(parts.map(|part| format!("{at}.{attention}.{part}.{kind}"))));
    }
    let (_, name) = names.iter().find(|(from, _)| *from == rest)?;
    Some(match *name {
        "norm1_context.linear" if block == last => halves(&format!("{at}.{name}")),
        name => Named::Whole(format!("{at}.{name}.{kind}")),
    })
}

/// The tensors under diffusers' keys, and the keys that belong to none.
pub(super) fn entries(entries: BTreeMap<String, Entry>) -> (BTreeMap<String, Entry>, Vec<String>) {
    let last = blocks(&entries).saturating_sub(1);
    let (mut all, mut unused) = (BTreeMap::new(), Vec::new());
    for (key, entry) in entries {
        let parts: Vec<String> = match named(&key, last) {
            None => {
                unused.push(key);
                continue;
            }
            Some(Named::Whole(name)) => {
                all.insert(name, entry);
                continue;
            }
            Some(Named::Thirds(names)) => names.into(),
            Some(Named::ShiftAndScale(names)) => names.into(),
        };
        let count = parts.len();
        for (index, name) in parts.into_iter().enumerate() {
            match entry.part(index, count) {
                Some(part) => drop(all.insert(name, part)),
                None => unused.push(key.clone()), // the layers will miss it
            }
        }
    }
    (all, unused)
}

fn blocks(entries: &BTreeMap<String, Entry>) -> usize {
    ldm::count(entries.keys().map(String::as_str), "joint_blocks.")
}

/// `transformer/config.json` of the tensors, whose keys are those of the first files. Heads are 64 wide in every published model.
pub(super) fn config(entries: &BTreeMap<String, Entry>) -> Value {
    const HEAD_DIM: usize = 64;
    let side = |key: &str, axis: usize, default: usize| {
        entries.get(key).and_then(|entry| entry.shape.get(axis).copied()).unwrap_or(default)
    };
    let width = side("x_embedder.proj.weight", 0, 1536);
    let positions =
        entries.get("pos_embed").map_or(192 * 192, |entry| entry.shape.iter().rev().nth(1).copied().unwrap_or(0));
    let count = blocks(entries);
    let is_dual = |key: &String| {
        key.strip_prefix("joint_blocks.")?.strip_suffix(".x_block.attn2.qkv.weight")?.parse::<usize>().ok()
    };
    let mut dual: Vec<usize> = entries.keys().filter_map(is_dual).collect();
    dual.sort_unstable();
    let shape = Shape {
        layers: count,
        width,
        heads: width / HEAD_DIM,
        patch: side("x_embedder.proj.weight", 2, 2),
        channels: side("x_embedder.proj.weight", 1, 16),
        text: side("context_embedder.weight", 1, 4096),
        pooled: side("y_embedder.mlp.0.weight", 1, 2048),
        positions: (positions as f64).sqrt() as usize,
        dual,
        qk_norm: entries.contains_key("joint_blocks.0.x_block.attn.ln_q.weight"),
    };
    shape.config()
}

/// What the published transformers differ in.
pub(super) struct Shape {
    layers: usize,
    width: usize,
    heads: usize,
    patch: usize,
    channels: usize,
    text: usize,
    pooled: usize,
    /// Along a side.
    positions: usize,
    /// Blocks with a second attention.
    dual: Vec<usize>,
    qk_norm: bool,
}

impl Shape {
    /// stabilityai/stable-diffusion-3-medium.
    pub fn medium() -> Shape {
        let (dual, qk_norm) = (Vec::new(), false);
        Shape {
            layers: 24,
            width: 1536,
            heads: 24,
            patch: 2,
            channels: 16,
            text: 4096,
            pooled: 2048,
            positions: 192,
            dual,
            qk_norm,
        }
    }

    /// stabilityai/stable-diffusion-3.5-medium.
    pub fn medium_3_5() -> Shape {
        Shape { positions: 384, dual: (0..13).collect(), qk_norm: true, ..Shape::medium() }
    }

    pub fn config(&self) -> Value {
        json!({
            "_class_name": "SD3Transformer2DModel", "num_layers": self.layers, "num_attention_heads": self.heads,
            "attention_head_dim": self.width / self.heads.max(1), "patch_size": self.patch, "in_channels": self.channels,
            "out_channels": self.channels, "joint_attention_dim": self.text, "caption_projection_dim": self.width,
            "pooled_projection_dim": self.pooled, "pos_embed_max_size": self.positions, "sample_size": 128,
            "dual_attention_layers": self.dual, "qk_norm": if self.qk_norm { Value::from("rms_norm") } else { Value::Null },
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use safetensors::Dtype;
    use safetensors::tensor::TensorView;

    use super::super::weights::MappedFile;
    use super::*;

    fn whole(key: &str) -> Option<String> {
        match named(key, 3) {
            Some(Named::Whole(name)) => Some(name),
            _ => None,
        }
    }

    #[test]
    fn keys_of_the_first_files() {
        assert_eq!(whole("pos_embed").as_deref(), Some("pos_embed.pos_embed"));
        assert_eq!(whole("t_embedder.mlp.2.bias").as_deref(), Some("time_text_embed.timestep_embedder.linear_2.bias"));
        let block = "joint_blocks.3.context_block.";
        assert_eq!(
            whole(&format!("{block}mlp.fc1.weight")).as_deref(),
            Some("transformer_blocks.3.ff_context.net.0.proj.weight")
        );
        let halves = |at: &str| Some(Named::ShiftAndScale([format!("{at}.shift.bias"), format!("{at}.scale.bias")]));
        assert_eq!(
            named(&format!("{block}adaLN_modulation.1.bias"), 3),
            halves("transformer_blocks.3.norm1_context.linear")
        );
        assert_eq!(named("final_layer.adaLN_modulation.1.bias", 3), halves("norm_out.linear"));
        let thirds = ["to_q", "to_k", "to_v"].map(|part| format!("transformer_blocks.0.attn2.{part}.weight"));
        assert_eq!(named("joint_blocks.0.x_block.attn2.qkv.weight", 3), Some(Named::Thirds(thirds)));
        assert_eq!(whole("joint_blocks.0.x_block.other.weight"), None);
        assert_eq!(whole("double_blocks.0.img_attn.qkv.weight"), None);
    }

    /// A number that no model has is one to refuse, not one to count to.
    #[test]
    fn a_block_of_any_number_is_read() {
        let key = |block: usize| format!("joint_blocks.{block}.x_block.attn2.qkv.weight");
        let bytes = [0u8; 48];
        let view = || TensorView::new(Dtype::F32, vec![12, 1], &bytes).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let tensors = [3, usize::MAX].map(|block| (key(block), view()));
        std::fs::write(&path, safetensors::serialize(tensors, None).unwrap()).unwrap();
        let config = config(&Arc::new(MappedFile::open(path).unwrap()).entries().unwrap());
        assert_eq!(config["dual_attention_layers"], json!([3, usize::MAX]));
        assert_eq!(config["num_layers"], json!(usize::MAX));
    }
}
