//! A ControlNet in one file, safetensors or PyTorch's (`.pth`, `.ckpt`): with the keys of the first published code (`control_model.`,
//! or without it), or those of diffusers. The family is read off the shapes; configurations are the published ones.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::foreign::Foreign;
use super::ldm;
use super::single_file::{Family, published_config};
use super::weights::{Entry, MappedFile, WeightStore, attach_scales, unwrapped_names};
use crate::error::{Error, Result};
use crate::runtime::{DType, Device};

/// A mapped file and where the ControlNet's tensors are in it, under the keys of diffusers.
#[derive(Clone, Debug)]
pub struct ControlFile {
    file: Arc<MappedFile>,
    entries: BTreeMap<String, Entry>,
    config: String,
}

/// Files beside ControlNets whose keys hold a text, and what they are.
const OTHERS: [(&str, &str); 9] = [
    ("lora_controlnet", "a ControlNet-LoRA, which needs the model that it was made from: download the full ControlNet"),
    ("lllite_", "a ControlNet-LLLite, which is not supported: download a full ControlNet"),
    (
        "task_embedding",
        "a union of ControlNets (ControlNet++), which is not supported: download one for its one condition",
    ),
    ("control_add_embedding", "a union of ControlNets, which is not supported: download one for its one condition"),
    ("adapter.body.", "a T2I-Adapter, which is not supported: download a ControlNet"),
    ("body.0.block1.", "a T2I-Adapter, which is not supported: download a ControlNet"),
    ("body.0.in_conv.", "a T2I-Adapter, which is not supported: download a ControlNet"),
    ("ip_adapter.", "an IP-Adapter, not a ControlNet"),
    ("double_blocks.", "a ControlNet for FLUX, not for Stable Diffusion"),
];

impl ControlFile {
    /// Maps the file and finds its family; reads no weights. An entry `controlnet/config.json` of the file's metadata stands in
    /// place of the published configuration.
    ///
    /// # Errors
    /// [`Error::File`]: not safetensors nor PyTorch's; not a ControlNet (and what it seems to be), among these files that hold the
    /// difference to a model; one of no published width.
    pub fn open(path: &Path) -> Result<ControlFile> {
        const PREFIX: &str = "control_model.";
        let file = Arc::new(MappedFile::open(path.to_path_buf())?);
        let mut entries = unwrapped_names(attach_scales(file.entries()?));
        let refuse = |reason: String| Err(Error::file(path, reason));
        let has = |entries: &BTreeMap<String, Entry>, text: &str| entries.keys().any(|key| key.contains(text));
        if let Some((_, what)) = OTHERS.iter().find(|(text, _)| has(&entries, text)) {
            return refuse(format!("is {what}"));
        }
        if entries.keys().any(|key| key == "difference" || key.starts_with("diff_")) {
            let what = "holds the difference between a ControlNet and a model: download the full ControlNet";
            return refuse(what.into());
        }
        if entries.keys().any(|key| key.starts_with(PREFIX)) {
            entries = entries.into_iter().filter_map(|(key, e)| Some((key.strip_prefix(PREFIX)?.into(), e))).collect();
        }
        if has(&entries, "input_hint_block.") {
            entries = renamed(entries);
        } else if !has(&entries, "controlnet_cond_embedding.") {
            let keys = entries.keys().map(String::as_str);
            return refuse(match Foreign::of_keys(keys, false) {
                Some(foreign) => format!("is no ControlNet: {foreign}"),
                None => "is no ControlNet: no tensor input_hint_block.* or controlnet_cond_embedding.*".into(),
            });
        }
        let config = match file.metadata().remove("controlnet/config.json") {
            Some(config) => config,
            None => published(&entries).map_err(|reason| Error::file(path, reason))?,
        };
        Ok(ControlFile { file, entries, config })
    }

    /// What a directory in the layout of diffusers would hold as config.json.
    pub fn config(&self) -> &str {
        &self.config
    }

    /// The weights, from the one mapping.
    pub fn store(&self, device: &Device, dtype: DType) -> WeightStore {
        WeightStore::view(&self.file, self.entries.clone(), device, dtype)
    }
}

/// LDM keys as those of diffusers; what is none of them stays, and will be named as unused.
fn renamed(entries: BTreeMap<String, Entry>) -> BTreeMap<String, Entry> {
    let keys = || entries.keys().map(String::as_str);
    let (level, hints) = (ldm::unet_level(keys()), ldm::hint_layers(keys()));
    let name = |key: &str| ldm::control_key(key, level, hints).unwrap_or_else(|| key.to_string());
    entries.iter().map(|(key, entry)| (name(key), entry.clone())).collect()
}

/// The configuration of the published ControlNets whose text is as wide.
fn published(entries: &BTreeMap<String, Entry>) -> std::result::Result<String, String> {
    const WIDTH: &str = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight";
    let width = entries.get(WIDTH).and_then(|weight| weight.shape.get(1).copied());
    let family = match width {
        Some(768) => Family::Sd1,
        Some(1024) => Family::Sd2,
        Some(2048) => Family::Sdxl,
        _ => {
            let got = width.map_or("none".into(), |width| width.to_string());
            return Err(format!(
                "is a ControlNet whose text is {got} channels wide, and the published ones have 768, 1024 or 2048: give its \
                 directory, with config.json"
            ));
        }
    };
    let unet = published_config(family, "unet/config.json").unwrap_or_default();
    let mut config: Value = serde_json::from_str(&unet).map_err(|error| error.to_string())?;
    if let Some(keys) = config.as_object_mut() {
        keys.remove("up_block_types");
        keys.insert("_class_name".into(), "ControlNetModel".into());
    }
    Ok(config.to_string())
}
