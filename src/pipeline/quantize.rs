//! A model written once more with its denoiser's large linear layers in 8 bits and its LoRAs merged.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::families::Part;
use super::files::{ModelFiles, ModelSource, Place};
use crate::error::{Error, Result};
use crate::models::{self, Mmdit, Rewritten, Unet, WeightFile, WeightFormat, WeightStore, Weights};
use crate::runtime::{DType, Device};

/// What was written.
#[derive(Clone, Debug, Default)]
pub struct QuantizeReport {
    /// Weights in 8 bits, each with a scale per row.
    pub weights: usize,
    /// Tensors that LoRAs changed.
    pub merged: usize,
    /// Of all weights that were read and written.
    pub bytes: [u64; 2],
    /// About LoRAs with keys that the model has no tensor for.
    pub warnings: Vec<String>,
}

impl QuantizeReport {
    fn add(&mut self, file: &Rewritten) {
        self.weights += file.quantized;
        self.merged += file.merged;
        self.bytes[0] += file.bytes[0];
        self.bytes[1] += file.bytes[1];
    }
}

/// Where [`quantize`] writes before all is complete: beside `output`.
pub fn unfinished_output(output: &Path) -> PathBuf {
    let name = output.file_name().unwrap_or_default().to_string_lossy();
    output.with_file_name(format!(".{name}.unfinished"))
}

/// Removes what [`quantize`] has written, whatever happens to it.
struct Unfinished(PathBuf);

impl Drop for Unfinished {
    fn drop(&mut self) {
        // What cannot be removed does no harm but to the eye.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Writes the model of `source` to `output`, in safetensors: a single file for a single file, a directory for a directory. The linear
/// layers of the UNet's transformers become 8-bit floats (F8_E4M3) with a scale per row, those that
/// [`WeightFormat::Fp8`] holds so; LoRAs are merged into all parts first; every other tensor stays as it is, and so do the other files of a
/// directory, but for weights in further formats. `output` is complete or not there; `progress` gets the name of each file
/// of weights before it is written.
///
/// # Errors
/// [`Error::File`]: `output` exists; those of the model's files; [`Error::Config`]: the model inside the program, or one
/// with another VAE or embeddings; [`Error::Io`].
pub fn quantize(source: &ModelSource, output: &Path, progress: &mut dyn FnMut(&Path)) -> Result<QuantizeReport> {
    if let ModelSource::Modified { embeddings, vae, .. } = source
        && (!embeddings.is_empty() || vae.is_some())
    {
        return Err(Error::config(
            "quantize",
            "writes the model's own parts: leave the other VAE and the embeddings out",
        ));
    }
    if matches!(source, ModelSource::Prompted { .. }) {
        return Err(Error::config("quantize", "writes the model's own parts: leave the IP-Adapters out"));
    }
    if matches!(source, ModelSource::Resized { .. }) {
        return Err(Error::config("quantize", "writes the model's own parts: leave the ResAdapter out"));
    }
    if matches!(source, ModelSource::Random(_)) {
        return Err(Error::config("quantize", "random weights are nobody's: name a model that has some"));
    }
    let files = ModelFiles::open(source)?;
    if output.exists() {
        return Err(Error::file(output, "exists already: give another name, or remove it"));
    }
    let safetensors = output.extension().is_some_and(|end| end.eq_ignore_ascii_case("safetensors"));
    if matches!(files.place, Place::File(_)) && !safetensors {
        return Err(Error::file(output, "is written as safetensors: give a name that ends in .safetensors"));
    }
    let parts = parts(&files)?;
    let name = output.file_name().ok_or_else(|| Error::file(output, "is no name for a file or a directory"))?;
    let unfinished = Unfinished(unfinished_output(output));
    // Of a run that was killed.
    let _ = fs::remove_dir_all(&unfinished.0);
    fs::create_dir_all(&unfinished.0).map_err(|error| Error::io(&unfinished.0, error))?;
    let made = unfinished.0.join(name);
    let mut done = match &files.place {
        Place::Directory(folder) => directory(folder, &parts, &made, progress)?,
        Place::File(file) => {
            progress(file.path());
            let stores: Vec<&WeightStore> = parts.values().collect();
            let mut done = QuantizeReport::default();
            done.add(&models::rewrite(&stores, file.path(), &made)?);
            done
        }
        Place::Embedded(_) | Place::Published(_) => {
            return Err(Error::config("quantize", "the model inside the program is small as it is: name another"));
        }
    };
    let loaded: Vec<models::Part> = parts.keys().filter_map(|folder| part_of(folder)).collect();
    let not_loaded: Vec<models::Part> = models::Part::ALL.into_iter().filter(|part| !loaded.contains(part)).collect();
    done.warnings = files.adapters.finish(&not_loaded)?.iter().map(ToString::to_string).collect();
    fs::rename(&made, output).map_err(|error| Error::io(output, error))?;
    Ok(done)
}

fn part_of(folder: &str) -> Option<models::Part> {
    models::Part::ALL.into_iter().find(|part| part.folder() == folder)
}

/// The weights of each part by its folder; of the denoiser it is known which are of large linear layers.
fn parts(files: &ModelFiles) -> Result<BTreeMap<&'static str, WeightStore>> {
    let mut parts = BTreeMap::new();
    let here = |part: &&Part| part.weights.is_some() && (!part.is_optional || files.has(part.folder));
    for part in files.family.parts.iter().filter(here) {
        let store = files.outline(part.folder, &Device::cpu(), DType::F32)?.with_format(WeightFormat::Fp8);
        // On the meta device: which weights are asked for, and whether they fit the configuration.
        let ask = |denoiser: &dyn Fn(&Weights) -> Result<()>| {
            denoiser(&store.root()).map_err(|error| store.explained(error, denoiser))
        };
        if part.folder == models::Part::Transformer.folder() {
            let config = files.transformer_config()?;
            ask(&|w| Mmdit::from_weights(w, &config).map(drop))?;
        }
        if part.folder == models::Part::Unet.folder() {
            let config = files.unet_config()?;
            ask(&|w| Unet::from_weights(w, &config).map(drop))?;
        }
        parts.insert(part.folder, store);
    }
    Ok(parts)
}

/// Files of weights in other formats or variants than those that were read: they would be of the old values.
const OTHER_WEIGHTS: [&str; 9] = ["safetensors", "bin", "ckpt", "pt", "pth", "onnx", "onnx_data", "msgpack", "h5"];

fn directory(
    from: &Path,
    parts: &BTreeMap<&'static str, WeightStore>,
    to: &Path,
    progress: &mut dyn FnMut(&Path),
) -> Result<QuantizeReport> {
    let indices: Vec<&Path> = parts.values().filter_map(WeightStore::shard_index).collect();
    copy_tree(from, to, &indices, true)?;
    let mut done = QuantizeReport::default();
    for (folder, store) in parts {
        let (from, to) = (from.join(folder), to.join(folder));
        let mut shards: Vec<(String, Rewritten)> = Vec::new();
        for path in store.paths() {
            progress(path);
            let name = as_safetensors(path);
            let file = models::rewrite(&[store], path, &to.join(&name))?;
            done.add(&file);
            shards.push((name, file));
        }
        if let Some(index) = store.shard_index() {
            let name = index.file_name().unwrap_or_default();
            write_index(&from.join(name), &to.join(as_safetensors(index)), &shards)?;
        }
    }
    Ok(done)
}

/// The name that a file of weights, or an index of shards, has in safetensors.
fn as_safetensors(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let [torch, ours] = [WeightFile::Pickle, WeightFile::Safetensors];
    let ending = |file: WeightFile, after: &str| format!(".{}{after}", file.ending());
    let is_torch = name.ends_with(&ending(torch, "")) || name.contains(&ending(torch, ".index"));
    if !is_torch {
        return name;
    }
    let name = match name.rsplit_once(&ending(torch, "")) {
        Some((before, after)) => format!("{before}{}", ending(ours, after)),
        None => name,
    };
    match name.strip_prefix(torch.stem("model")) {
        Some(rest) => format!("model{rest}"),
        None => name,
    }
}

/// Everything but weights and hidden files; links as what they lead to, as the hub's cache has them.
fn copy_tree(from: &Path, to: &Path, without: &[&Path], root: bool) -> Result<()> {
    fs::create_dir(to).map_err(|error| Error::io(to, error))?;
    for entry in fs::read_dir(from).map_err(|error| Error::io(from, error))? {
        let name = entry.map_err(|error| Error::io(from, error))?.file_name();
        let (path, target) = (from.join(&name), to.join(&name));
        let hidden = name.to_string_lossy().starts_with('.');
        let weights =
            path.extension().is_some_and(|end| OTHER_WEIGHTS.iter().any(|other| end.eq_ignore_ascii_case(other)));
        let index =
            WeightFile::ALL.iter().any(|file| name.to_string_lossy().contains(&format!(".{}.index", file.ending())))
                || without.contains(&path.as_path());
        if hidden || weights || index {
            continue;
        }
        if path.is_dir() {
            // The parts of a model have no folders of their own.
            if root {
                copy_tree(&path, &target, without, false)?;
            }
        } else {
            fs::copy(&path, &target).map_err(|error| Error::io(&path, error))?;
        }
    }
    Ok(())
}

/// The index of the shards with the scales that they have now.
fn write_index(from: &PathBuf, to: &Path, shards: &[(String, Rewritten)]) -> Result<()> {
    let text = fs::read_to_string(from).map_err(|error| Error::io(from, error))?;
    let mut index: serde_json::Value =
        serde_json::from_str(&text).map_err(|error| Error::file(from, format!("not JSON: {error}")))?;
    let total: u64 = shards.iter().map(|(_, file)| file.bytes[1]).sum();
    if let Some(map) = index.get_mut("weight_map").and_then(serde_json::Value::as_object_mut) {
        for name in map.values_mut() {
            *name = name.as_str().map_or(name.clone(), |file| as_safetensors(Path::new(file)).into());
        }
        for (name, file) in shards {
            file.removed.iter().for_each(|key| drop(map.remove(key)));
            map.extend(file.added.iter().map(|key| (key.clone(), name.clone().into())));
        }
    }
    if let Some(metadata) = index.get_mut("metadata").and_then(serde_json::Value::as_object_mut) {
        metadata.insert("total_size".into(), total.into());
    }
    fs::write(to, format!("{index:#}\n")).map_err(|error| Error::io(to, error))
}
