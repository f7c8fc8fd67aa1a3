//! A checkpoint's files once more, with the weights of large linear layers in 8 bits and adapters merged.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype as FileDtype;
use safetensors::tensor::View;

use super::repack::stored_f32;
use super::{Entry, WeightStore, read_f32};
use crate::error::{Error, Result};
use crate::ops;
use crate::pickle::places;
use crate::runtime::{DType, Device, Element, Tensor};

/// What a rewritten file holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rewritten {
    /// Tensors that are in 8 bits now, and weren't, or with other values.
    pub quantized: usize,
    /// Tensors whose values adapters changed, those in 8 bits among them.
    pub merged: usize,
    /// Keys that the file did not have: the scales.
    pub added: Vec<String>,
    /// Keys that it had: the scales that were there before.
    pub removed: Vec<String>,
    /// Of all tensors, before and now.
    pub bytes: [u64; 2],
}

/// A tensor on its way to a file.
struct Written<'a> {
    dtype: FileDtype,
    shape: Vec<usize>,
    bytes: Cow<'a, [u8]>,
}

impl View for Written<'_> {
    fn dtype(&self) -> FileDtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// Writes the file `path` of these stores to `to`, in safetensors: weights that a layer takes in the store's format
/// ([`WeightFormat::Fp8`](super::WeightFormat::Fp8), and the model has been loaded from it) as codes `X.weight` of F8_E4M3
/// and one f32 scale per row, `X.weight_scale` of shape `[rows, 1]`; what adapters change in the file's own dtype, 8-bit
/// floats that are no such weights as F16; all else as it is.
///
/// # Errors
/// [`Error::File`]: not one of the stores' files; cannot be written. [`Error::Weight`]: a value is not finite once adapters
/// are merged.
pub fn rewrite(stores: &[&WeightStore], path: &Path, to: &Path) -> Result<Rewritten> {
    let file = stores.iter().flat_map(|store| &store.files).find(|file| file.path == path);
    let Some(file) = file else { return Err(Error::file(path, "no part of the model reads this file")) };
    let mut known: Vec<(&Entry, bool)> = Vec::new();
    for store in stores {
        let taken = store.taken();
        let of_file = store.entries.iter().flatten().filter(|(_, entry)| Arc::ptr_eq(&entry.file, file));
        known.extend(of_file.map(|(key, entry)| (entry, taken.products.contains(key))));
    }
    let mut done = Rewritten::default();
    // A new scale stands in place of one of its name, whichever comes first.
    let mut written: BTreeMap<String, Written> = BTreeMap::new();
    let mut old_scales = HashSet::new();
    let raw = file.entries()?;
    for (key, tensor) in &raw {
        let parts: Vec<&(&Entry, bool)> = known.iter().filter(|(entry, _)| *entry.name == **key).collect();
        let merged = parts.iter().any(|(entry, _)| !entry.adapters.is_empty());
        done.merged += usize::from(merged);
        match (&parts[..], key.strip_suffix(".weight")) {
            ([(entry, true)], Some(module)) if entry.shape == tensor.shape && entry.strides == tensor.strides => {
                let [codes, scales] = quantized(key, entry)?;
                old_scales.extend(entry.scale.iter().map(|scale| scale.start));
                let scale_key = format!("{module}.weight_scale");
                if !raw.contains_key(&scale_key) {
                    done.added.push(scale_key.clone());
                }
                done.quantized += 1;
                written.insert(key.clone(), Written { shape: tensor.shape.clone(), ..codes });
                written.insert(scale_key, scales);
            }
            _ if merged => {
                old_scales.extend(parts.iter().filter_map(|(entry, _)| Some(entry.scale.as_ref()?.start)));
                written.insert(key.clone(), with_adapters(key, tensor, parts.iter().map(|(entry, _)| *entry))?);
            }
            _ => {
                let (dtype, shape) = (tensor.dtype, tensor.shape.clone());
                written.entry(key.clone()).or_insert_with(|| Written { dtype, shape, bytes: as_stored(tensor) });
            }
        }
    }
    // The scales that were there belong to no weight any more.
    for (key, _) in raw.iter().filter(|(_, tensor)| old_scales.contains(&tensor.start)) {
        if written.get(key).is_some_and(|tensor| matches!(tensor.bytes, Cow::Borrowed(_))) {
            written.remove(key);
            done.removed.push(key.clone());
        }
    }
    done.bytes[0] = raw.values().map(|tensor| tensor.len as u64).sum();
    done.bytes[1] = written.values().map(|tensor| tensor.bytes.len() as u64).sum();
    let metadata: HashMap<String, String> = file.metadata();
    let metadata = if metadata.is_empty() { HashMap::from([("format".into(), "pt".into())]) } else { metadata };
    safetensors::serialize_to_file(written, Some(metadata), to)
        .map_err(|error| Error::file(to, format!("cannot be written: {error}")))?;
    Ok(done)
}

/// The values of a tensor with its adapters.
fn values_of(key: &str, entry: &Entry) -> Result<Vec<f32>> {
    let mut values = read_f32(entry);
    entry.adapters.iter().for_each(|delta| delta.apply(&mut values, &entry.shape));
    match values.par_iter().filter(|value| !value.is_finite()).count() {
        0 => Ok(values),
        bad => {
            let reason = format!("{bad} of {} values are not finite", values.len());
            Err(Error::Weight { file: entry.file.path.clone(), key: key.into(), reason })
        }
    }
}

/// Codes and scales of a weight `[rows, ...]`.
fn quantized(key: &str, entry: &Entry) -> Result<[Written<'static>; 2]> {
    let rows = entry.shape.first().copied().unwrap_or(1);
    let values = values_of(key, entry)?;
    let columns = values.len().checked_div(rows).unwrap_or(0);
    let made = ops::quantize(&Tensor::from_f32(&Device::cpu(), &[rows, columns], DType::F32, &values)?)?;
    let written = |dtype, shape: Vec<usize>, bytes: &[u8]| Written { dtype, shape, bytes: Cow::Owned(bytes.to_vec()) };
    Ok([
        written(FileDtype::F8_E4M3, entry.shape.clone(), made.codes().cpu_bytes()),
        written(FileDtype::F32, vec![rows, 1], made.scales().cpu_bytes()),
    ])
}

/// A tensor's elements in the order of its shape.
fn as_stored(tensor: &Entry) -> Cow<'_, [u8]> {
    let (bytes, size) = (tensor.bytes(), tensor.dtype.bitsize() / 8);
    match &tensor.strides {
        None => Cow::Borrowed(bytes),
        Some(strides) => {
            let elements = places(&tensor.shape, strides).flat_map(|place| &bytes[place * size..(place + 1) * size]);
            Cow::Owned(elements.copied().collect())
        }
    }
}

/// A tensor with the parts that layers see of it changed by adapters.
fn with_adapters<'a>(key: &str, tensor: &Entry, parts: impl Iterator<Item = &'a Entry>) -> Result<Written<'static>> {
    let size = tensor.dtype.bitsize() / 8;
    let mut stored = stored_f32(tensor);
    for part in parts {
        let values = values_of(key, part)?;
        let to = &mut stored[(part.start - tensor.start) / size..];
        match &part.strides {
            None => to[..values.len()].copy_from_slice(&values),
            Some(strides) => places(&part.shape, strides).zip(&values).for_each(|(place, value)| to[place] = *value),
        }
    }
    let all: Vec<f32> = match &tensor.strides {
        None => stored,
        Some(strides) => places(&tensor.shape, strides).map(|place| stored[place]).collect(),
    };
    fn bytes<T: Element>(values: &[f32]) -> Vec<u8> {
        let rounded: Vec<T> = values.par_iter().map(|&value| T::from_f32(value)).collect();
        bytemuck::cast_slice(&rounded).to_vec()
    }
    let (dtype, bytes) = match tensor.dtype {
        FileDtype::BF16 => (FileDtype::BF16, bytes::<bf16>(&all)),
        FileDtype::F32 | FileDtype::F64 => (FileDtype::F32, bytes::<f32>(&all)),
        _ => (FileDtype::F16, bytes::<f16>(&all)),
    };
    Ok(Written { dtype, shape: tensor.shape.clone(), bytes: Cow::Owned(bytes) })
}

impl WeightStore {
    /// The files that it reads.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|file| file.path.as_path())
    }

    /// The index of the shards, where the weights are in several files.
    pub fn shard_index(&self) -> Option<&Path> {
        self.origin.extension().is_some_and(|end| end == "json").then_some(self.origin.as_path())
    }
}
