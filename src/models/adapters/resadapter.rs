//! ResAdapter (Cheng et al. 2024, arXiv:2403.02084): what lets a model draw at sizes that it was not trained at, in two files: the
//! UNet's group norms of ResNets, which stand in place of the model's, and a LoRA of the convolutions that change the size.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use super::{AdapterFile, Adapters, Part, WeightStore, flat};
use crate::error::{Error, Result};
use crate::models::weights::{Entry, MappedFile, Unused};

/// The files of a ResAdapter's folder.
const LORA: &str = "pytorch_lora_weights.safetensors";
const NORMS: &str = "diffusion_pytorch_model.safetensors";

/// Group norms that stand in place of the model's.
#[derive(Debug)]
pub(super) struct Norms {
    file: Arc<MappedFile>,
    entries: BTreeMap<String, Entry>,
    /// Keys that the UNet that was loaded does not have.
    unused: Mutex<Vec<String>>,
}

/// `down_blocks.0.resnets.1.norm2.bias`
fn is_norm(key: &str) -> bool {
    let ends = ["norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"];
    key.contains("resnets.") && key.rsplit_once(".norm").is_some_and(|(_, end)| ends.contains(&&*format!("norm{end}")))
}

/// `down_blocks.0.downsamplers.0.conv.weight`
fn is_sampler(key: &str) -> bool {
    key.ends_with("samplers.0.conv.weight")
}

impl Adapters {
    /// With those of a ResAdapter's folder: the norms in place of the model's, and its LoRA, `weight` times, after the other
    /// adapters.
    ///
    /// # Errors
    /// [`Error::File`]: no folder, a file that is missing, is not safetensors or holds nothing of a ResAdapter.
    pub fn with_resadapter(mut self, folder: &Path, weight: f32) -> Result<Adapters> {
        if !folder.is_dir() {
            let reason = format!("is no folder; a ResAdapter is one, with {LORA} and {NORMS} in it");
            return Err(Error::file(folder, reason));
        }
        for name in [LORA, NORMS] {
            if !folder.join(name).is_file() {
                let reason = format!("no such file; a ResAdapter's folder has {LORA} and {NORMS}");
                return Err(Error::file(&folder.join(name), reason));
            }
        }
        let file = Arc::new(MappedFile::open(folder.join(NORMS))?);
        let entries = file.entries()?;
        if !entries.keys().any(|key| is_norm(key)) {
            let reason = "holds no norm of a ResNet (down_blocks.0.resnets.0.norm1.weight): it is no ResAdapter's";
            return Err(Error::file(&file.path, reason));
        }
        self.files.push(AdapterFile::open(&folder.join(LORA), weight)?);
        self.norms = Some(Norms { file, entries, unused: Mutex::default() });
        Ok(self)
    }

    /// The bytes of a ResAdapter's two files, for a digest.
    pub fn resadapter_bytes(&self) -> Option<[&[u8]; 2]> {
        let (norms, lora) = (self.norms.as_ref()?, self.files.last()?);
        Some([lora.file.as_bytes(), norms.file.as_bytes()])
    }

    /// The UNet's store with a ResAdapter's norms, where there is one; its LoRA is for the same network.
    pub(super) fn replace_norms(&self, store: &mut WeightStore) -> Result<()> {
        let (Some(norms), Some(lora)) = (&self.norms, self.files.last()) else { return Ok(()) };
        let module = |key: &str| (Part::Unet, flat(Part::Unet, key.trim_end_matches(".weight")));
        if let Some((key, _)) =
            store.tensors().find(|(key, _)| is_sampler(key) && !lora.modules.contains_key(&module(key)))
        {
            let reason = format!(
                "changes the convolutions between a network's sizes, but not {key}, which this model has: is it for another family?"
            );
            return Err(Error::file(&lora.file.path, reason));
        }
        let mut unused: Vec<String> = norms.entries.keys().cloned().collect();
        for (key, entry) in store.entries_mut().filter(|(key, _)| is_norm(key)) {
            let refuse = |reason: String| {
                let reason = format!("{reason}: is this ResAdapter for another family?");
                Err(Error::Weight { file: norms.file.path.clone(), key: key.clone(), reason })
            };
            let Some(own) = norms.entries.get(key).filter(|own| own.is_float()) else {
                return refuse("is missing, and the model has it".into());
            };
            if own.shape != entry.shape {
                return refuse(format!("has shape {:?}, the model's has {:?}", own.shape, entry.shape));
            }
            *entry = Entry { factor: entry.factor, ..own.clone() };
            unused.retain(|other| other != key);
        }
        *norms.unused.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = unused;
        Ok(())
    }
}

impl Norms {
    /// Tensors that the UNet does not have, if it has been loaded.
    pub fn left(&self) -> Option<Unused> {
        let keys = self.unused.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone();
        (!keys.is_empty()).then(|| Unused { file: self.file.path.clone(), keys })
    }
}
