//! A mapped file of weights, safetensors or PyTorch's own, and its entries; indices of shards; what is wrong with a file, and what to do about it.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use safetensors::{Dtype as FileDtype, SafeTensors};

use crate::error::{Error, Result};
use crate::models::adapters::Delta;
use crate::pickle;

#[derive(Debug)]
pub(in crate::models) struct MappedFile {
    pub path: PathBuf,
    pub bytes: Bytes,
}

#[derive(Debug)]
pub(in crate::models) enum Bytes {
    Mapped(Mmap),
    Static(&'static [u8]),
}

/// A tensor of a file; `start..start + len` are its bytes in the whole file.
#[derive(Clone, Debug)]
pub(in crate::models) struct Entry {
    pub file: Arc<MappedFile>,
    /// The key in the file.
    pub name: Arc<str>,
    pub dtype: FileDtype,
    /// What a layer sees: of the slice, and after transposing.
    pub shape: Vec<usize>,
    pub start: usize,
    pub len: usize,
    /// Elements of the file from one index of a dimension to the next, where they do not follow each other as `shape` says.
    pub strides: Option<Vec<usize>>,
    /// What the values are multiplied by: one f32 tensor of one element, or of one per row.
    pub scale: Option<Box<Entry>>,
    /// Adapters that change the values, in the order in which they are applied.
    pub adapters: Vec<Arc<Delta>>,
    /// What the values are multiplied by in the end, before they are rounded.
    pub factor: f32,
}

impl Entry {
    /// The values as they are in these bytes of the file.
    fn new(file: &Arc<MappedFile>, name: &str, dtype: FileDtype, shape: Vec<usize>, bytes: Range<usize>) -> Entry {
        let (file, name, start, len) = (file.clone(), name.into(), bytes.start, bytes.len());
        Entry { file, name, dtype, shape, start, len, strides: None, scale: None, adapters: Vec::new(), factor: 1.0 }
    }

    /// Its elements in the file, from the first to the last.
    pub fn bytes(&self) -> &[u8] {
        &self.file.as_bytes()[self.start..self.start + self.len]
    }

    /// Can the file's bytes be converted one by one?
    pub fn is_plain(&self) -> bool {
        self.strides.is_none() && self.scale.is_none() && self.adapters.is_empty() && self.factor == 1.0
    }

    pub fn is_float(&self) -> bool {
        use FileDtype::{BF16, F8_E4M3, F8_E5M2, F16, F32, F64};
        matches!(self.dtype, F64 | F32 | F16 | BF16 | F8_E4M3 | F8_E5M2)
    }

    /// Is this one scale for all of `weight`, or one per row?
    pub fn fits_rows_of(&self, weight: &Entry) -> bool {
        let count: usize = self.shape.iter().product();
        count == 1 || (self.shape.first() == weight.shape.first() && self.shape.first() == Some(&count))
    }

    /// The rows of one, `index`, of the `count` matrices or vectors that this one stacks. `None`: the rows do not divide.
    pub fn part(&self, index: usize, count: usize) -> Option<Entry> {
        let rows = self.shape.first()?;
        if !rows.is_multiple_of(count) {
            return None;
        }
        let mut part = self.clone();
        part.shape[0] = rows / count;
        match &self.strides {
            None => part.len /= count,
            Some(strides) => {
                let last = part.shape.iter().zip(strides).map(|(size, stride)| size.saturating_sub(1) * stride);
                part.len = (1 + last.sum::<usize>()) * self.dtype.bitsize() / 8;
                part.start += index * part.shape[0] * strides[0] * self.dtype.bitsize() / 8;
                return Some(part);
            }
        }
        part.start += index * part.len;
        if let Some(scale) = self.scale.as_ref().filter(|scale| scale.shape.first() == Some(rows)) {
            part.scale = Some(Box::new(scale.part(index, count)?));
        }
        Some(part)
    }

    /// The matrix with rows and columns exchanged; other tensors as they are.
    pub fn transpose(mut self) -> Entry {
        if let &[rows, columns] = &self.shape[..] {
            let strides = self.strides.unwrap_or_else(|| vec![columns, 1]);
            self.shape = vec![columns, rows];
            self.strides = Some(vec![strides[1], strides[0]]).filter(|strides| *strides != [rows, 1]);
        }
        self
    }
}

impl MappedFile {
    pub fn open(path: PathBuf) -> Result<MappedFile> {
        let file = File::open(&path).map_err(|source| Error::io(&path, source))?;
        if file.metadata().map_err(|source| Error::io(&path, source))?.len() == 0 {
            return Err(Error::file(&path, "is empty: download it again"));
        }
        // SAFETY: the mapping is private and read-only, and only ever seen as bytes. As with any mapped file, another
        // process that shortens it while we load would end ours; weights are not rewritten in place.
        let map = unsafe { Mmap::map(&file) }.map_err(|source| Error::io(&path, source))?;
        Ok(MappedFile { path, bytes: Bytes::Mapped(map) })
    }

    pub fn as_bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Mapped(map) => map,
            Bytes::Static(bytes) => bytes,
        }
    }

    /// Every tensor by its key, checked. Of safetensors: offsets within the file, without holes or overlaps, as long as dtype
    /// and shape say; of PyTorch's own files, which are read without running what they say: each within its storage.
    ///
    /// # Errors
    /// [`Error::File`]: neither of the two, truncated, damaged, or a pickle that would run commands.
    pub fn entries(self: &Arc<Self>) -> Result<BTreeMap<String, Entry>> {
        let bytes = self.as_bytes();
        if pickle::is_pickle(bytes) {
            let read = pickle::read(bytes).map_err(|reason| Error::file(&self.path, reason))?;
            let entry = |key: String, tensor: pickle::PickledTensor| {
                let entry = Entry::new(self, &key, tensor.dtype, tensor.shape, tensor.bytes);
                (key, Entry { strides: tensor.strides, ..entry })
            };
            return Ok(read.tensors.into_iter().map(|(key, tensor)| entry(key, tensor)).collect());
        }
        let (header, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| {
            let reason = match sniff(bytes) {
                Some(what) => what.to_string(),
                None => format!("not a readable safetensors file ({error}): truncated or damaged, download it again"),
            };
            Error::file(&self.path, reason)
        })?;
        let data_start = 8 + header;
        let entry = |key: &str, info: &safetensors::tensor::TensorInfo| {
            let (start, end) = info.data_offsets;
            Entry::new(self, key, info.dtype, info.shape.clone(), data_start + start..data_start + end)
        };
        Ok(metadata.tensors().into_iter().map(|(key, info)| (key.clone(), entry(&key, info))).collect())
    }

    /// `__metadata__` of the header, names and texts; of PyTorch's own files the texts and whole numbers beside the tensors.
    pub fn metadata(&self) -> HashMap<String, String> {
        if pickle::is_pickle(self.as_bytes()) {
            return pickle::read(self.as_bytes()).map(|read| read.values.into_iter().collect()).unwrap_or_default();
        }
        let read = SafeTensors::read_metadata(self.as_bytes()).ok();
        read.and_then(|(_, metadata)| metadata.metadata().clone()).unwrap_or_default()
    }

    /// Lets the system drop a tensor's pages, so that the mapping does not grow into a second copy of the model.
    pub fn release(&self, entry: &Entry) {
        #[cfg(unix)]
        if let Bytes::Mapped(map) = &self.bytes {
            // SAFETY: the pages are clean and backed by the file; a later read brings them back with the same contents.
            let advice =
                unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, entry.start, entry.len) };
            drop(advice); // advice only: without it the pages stay until the system wants them
        }
        #[cfg(not(unix))]
        let _ = entry;
    }
}

/// What a file that is not safetensors is, and what to do about it.
fn sniff(bytes: &[u8]) -> Option<&'static str> {
    let begins = |magic: &[u8]| bytes.starts_with(magic);
    if begins(b"version https://git-lfs") {
        Some("a Git LFS pointer, not the weights: run `git lfs pull` in the model's directory")
    } else if begins(b"\x80\x02") || begins(b"\x80\x04") {
        Some("a pickle, but none that torch.save wrote: load it in Python and save its tensors as safetensors")
    } else if begins(b"GGUF") {
        Some("a GGUF file: safetensors in f32, f16 or bf16 are wanted")
    } else if begins(b"<") {
        Some("a web page, not weights: the download went wrong (is a login needed?), download it again")
    } else {
        None
    }
}

/// `weight_map` of a shard index: key to file name.
pub(super) fn read_index(index: &Path) -> Result<BTreeMap<String, String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let mut text = String::new();
    let file = File::open(index).map_err(|source| Error::io(index, source))?;
    // 64 MiB hold the index of half a million tensors.
    file.take(1 << 26).read_to_string(&mut text).map_err(|source| Error::io(index, source))?;
    let parsed: Index = serde_json::from_str(&text)
        .map_err(|error| Error::file(index, format!("not a safetensors index ({error}): download it again")))?;
    if parsed.weight_map.is_empty() {
        return Err(Error::file(index, "weight_map is empty: download it again"));
    }
    Ok(parsed.weight_map)
}

fn names_in(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// `model-00001-of-00002.safetensors`, also with a variant before or behind the numbers: is it one of several shards?
fn is_shard(name: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let Some((before, behind)) = name.split_once("-of-") else { return false };
    before.rsplit_once('-').is_some_and(|(_, number)| digits(number)) && behind.split('.').next().is_some_and(digits)
}

/// A way in which a network's weights are saved: the ending of its files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightFile {
    Safetensors,
    /// `torch.save`'s.
    Pickle,
}

impl WeightFile {
    /// The one that is preferred first.
    pub const ALL: [WeightFile; 2] = [WeightFile::Safetensors, WeightFile::Pickle];

    /// `safetensors`, `bin`.
    pub fn ending(self) -> &'static str {
        match self {
            WeightFile::Safetensors => "safetensors",
            WeightFile::Pickle => "bin",
        }
    }

    /// `model` and, of text encoders saved by torch, `pytorch_model`.
    pub fn stem(self, stem: &str) -> &str {
        match (self, stem) {
            (WeightFile::Pickle, "model") => "pytorch_model",
            _ => stem,
        }
    }
}

/// The variants of `stem` in `dir` beside the plain one, in the order of the alphabet: `bf16` where
/// `stem.bf16.safetensors` or an index of its shards is there.
pub(super) fn variants(dir: &Path, stem: &str, ending: &str) -> Vec<String> {
    let of = |name: &str| -> Option<String> {
        let rest = name.strip_prefix(stem)?;
        let variant = if let Some(rest) = rest.strip_suffix(&format!(".{ending}.index.json")) {
            rest.strip_prefix('.')?
        } else if let Some(rest) = rest.strip_suffix(".json") {
            rest.strip_prefix(&format!(".{ending}.index."))?
        } else {
            rest.strip_suffix(&format!(".{ending}"))?.strip_prefix('.')?
        };
        (!variant.is_empty() && !is_shard(name)).then(|| variant.to_string())
    };
    let mut variants: Vec<String> = names_in(dir).iter().filter_map(|name| of(name)).collect();
    variants.sort();
    variants.dedup();
    variants
}

/// The weights are not where they should be: say what is there instead.
pub(super) fn not_found(dir: &Path, stem: &str) -> Error {
    let wanted = dir.join(format!("{stem}.safetensors"));
    if !dir.is_dir() {
        return Error::file(dir, "no such directory: a model directory in the diffusers layout has it");
    }
    let names = names_in(dir);
    let torch = |name: &&String| [".bin", ".ckpt", ".pt", ".pth"].iter().any(|end| name.ends_with(end));
    let reason = if let Some(name) = names.iter().find(torch) {
        let bin = WeightFile::Pickle.stem(stem);
        format!("not found, nor {bin}.bin; the directory holds {name}: rename it if these are the weights")
    } else if let Some(name) = names.iter().find(|name| name.ends_with(".safetensors") && is_shard(name)) {
        format!("not found, nor an index of shards, though there is {name}: download {stem}.safetensors.index.json")
    } else if let Some(name) = names.iter().find(|name| name.ends_with(".safetensors")) {
        format!("not found; the directory holds {name}: rename it if these are the weights")
    } else {
        "not found, nor an index of shards: download the weights".to_string()
    };
    Error::file(&wanted, reason)
}

pub(in crate::models) fn file_name(path: &Path) -> &Path {
    path.file_name().map_or(path, Path::new)
}
