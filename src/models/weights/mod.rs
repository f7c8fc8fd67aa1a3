//! Weights by key: safetensors files, or those that `torch.save` wrote (one, or shards with an index), checked, converted,
//! repacked and brought to a device; or, for the meta device, a manifest of what a model asks for.
//!
//! A file is mapped, not read: a tensor goes from the mapping straight into its final layout and dtype, row by row, and
//! its pages are given back, so loading holds the loaded tensors and little else.

mod file;
mod gated;
mod names;
mod repack;
mod rewrite;

use std::collections::{BTreeMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype as FileDtype;

pub use self::file::WeightFile;
use self::file::{Bytes, not_found, read_index, variants};
pub(super) use self::file::{Entry, MappedFile, file_name};
use self::names::alike;
pub(super) use self::names::unwrapped_names;
pub(super) use self::repack::read_f32;
use self::repack::{Layout, repack};
pub use self::rewrite::{Rewritten, rewrite};
use super::layers::Matrix;
use crate::error::{Error, Result};
use crate::names::named;
use crate::ops::cases::random;
use crate::ops::{self, Quantized};
use crate::runtime::{DType, Device, Element, Tensor};

/// A network of a model, by the folder that holds it in the layout of diffusers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    TextEncoder,
    /// OpenCLIP bigG of SDXL and SD3.
    TextEncoder2,
    /// T5 of SD3.
    TextEncoder3,
    Unet,
    /// SD3's denoiser.
    Transformer,
    Vae,
}

impl Part {
    pub const ALL: [Part; 6] =
        [Part::TextEncoder, Part::TextEncoder2, Part::TextEncoder3, Part::Unet, Part::Transformer, Part::Vae];

    /// `text_encoder`, `text_encoder_2`, `text_encoder_3`, `unet`, `transformer`, `vae`.
    pub fn folder(self) -> &'static str {
        match self {
            Part::TextEncoder => "text_encoder",
            Part::TextEncoder2 => "text_encoder_2",
            Part::TextEncoder3 => "text_encoder_3",
            Part::Unet => "unet",
            Part::Transformer => "transformer",
            Part::Vae => "vae",
        }
    }
}

/// How the weights of a denoiser's large linear layers are held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    /// As everything else, in the dtype of the activations.
    #[default]
    Plain,
    /// In 8-bit floats E4M3 with a scale per row; their inputs are brought into that form too (see
    /// [`quantize`](ops::quantize)).
    Fp8,
}
named!(WeightFormat, [Plain => "plain", Fp8 => "fp8"]);

/// All tensors of one model. Every key is consumed exactly once: [`finish`](WeightStore::finish) reports what is left.
#[derive(Debug)]
pub struct WeightStore {
    device: Device,
    dtype: DType,
    format: WeightFormat,
    /// The file, or the index of the shards: stands in errors about keys that no file holds.
    origin: PathBuf,
    /// `fp16` of `model.fp16.safetensors`.
    variant: Option<String>,
    files: Vec<Arc<MappedFile>>,
    /// By the key that layers ask for. `None`: a manifest, which has every tensor anybody asks for.
    entries: Option<BTreeMap<String, Entry>>,
    /// A survey hands out meta tensors for missing keys too, and remembers them.
    survey: bool,
    /// Tensors that no file has are random.
    random: bool,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    keys: HashSet<String>,
    in_order: Vec<(String, Vec<usize>)>,
    /// Weights that a layer takes in the store's format.
    products: HashSet<String>,
    /// Of a survey.
    missing: Vec<(String, Vec<usize>)>,
}

/// Tensors of a file that no layer has, for one warning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unused {
    pub file: PathBuf,
    /// In the order of the alphabet.
    pub keys: Vec<String>,
}

impl std::fmt::Display for Unused {
    /// A sentence with the first few keys.
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let (shown, more) = (&self.keys[..self.keys.len().min(4)], if self.keys.len() > 4 { ", ..." } else { "" });
        let tensors = if self.keys.len() == 1 { "tensor" } else { "tensors" };
        let (file, count) = (self.file.display(), self.keys.len());
        write!(f, "{file}: no part of the model uses {count} {tensors}: {}{more}", shown.join(", "))
    }
}

impl WeightStore {
    /// Opens `dir/stem.safetensors`, or the shards named by `dir/stem.safetensors.index.json`; where neither exists, their
    /// `.fp16.` variants, and else those of any other variant (`.bf16.`, `.non_ema.`, ...) if it is the only one; where there
    /// is no safetensors file, in the same order the `.bin` files of `torch.save` (of text encoders `pytorch_model.bin`). A
    /// prefix that a wrapper put before every key (`_orig_mod.`, `module.`, `model.`) is taken away. Tensors will be `dtype`
    /// on `device`.
    ///
    /// # Errors
    /// [`Error::File`]: missing, truncated, neither safetensors nor PyTorch's, two shards with one key, an index that names a
    /// file or key that is not there, several variants. Always with what to do.
    pub fn open(dir: &Path, stem: &str, device: &Device, dtype: DType) -> Result<WeightStore> {
        let found = WeightFile::ALL.into_iter().find_map(|form| find(dir, form.stem(stem), form.ending()).transpose());
        let (path, variant) = found.transpose()?.ok_or_else(|| not_found(dir, stem))?;
        let mut store = match path.extension().is_some_and(|end| end == "json") {
            true => WeightStore::open_sharded(path, device, dtype)?,
            false => WeightStore::of_one_file(Arc::new(MappedFile::open(path)?), device, dtype)?,
        };
        store.variant = variant.strip_prefix('.').map(String::from);
        Ok(store)
    }

    /// Opens one file with a network's state dict: safetensors, or PyTorch's own form (`.pth`). Of several dicts in a file the first of `wrappers` (`params_ema`) that is there is taken, else all;
    /// then prefixes go as in [`open`](WeightStore::open).
    ///
    /// # Errors
    /// [`Error::File`]: missing, truncated, neither of the two.
    pub fn open_state_dict(path: &Path, wrappers: &[&str], device: &Device, dtype: DType) -> Result<WeightStore> {
        let file = Arc::new(MappedFile::open(path.to_path_buf())?);
        let mut entries = file.entries()?;
        for wrapper in wrappers {
            let prefix = format!("{wrapper}.");
            if entries.keys().any(|key| key.starts_with(&prefix)) {
                let inside = entries.into_iter();
                entries = inside.filter_map(|(key, entry)| Some((key.strip_prefix(&prefix)?.into(), entry))).collect();
                break;
            }
        }
        Ok(WeightStore::view(&file, unwrapped_names(entries), device, dtype))
    }

    /// Multiplies the values of some tensors, in f32, before they are rounded to the store's dtype.
    pub(super) fn scale(&mut self, factor: impl Fn(&str) -> f32) {
        for (key, entry) in self.entries_mut() {
            entry.factor = factor(key);
        }
    }

    /// The bytes of one safetensors file that is already in memory (the embedded model); `name` stands in errors.
    ///
    /// # Errors
    /// [`Error::File`]: truncated or not safetensors.
    pub fn from_bytes(name: &str, bytes: &'static [u8], device: &Device, dtype: DType) -> Result<WeightStore> {
        let file = Arc::new(MappedFile { path: PathBuf::from(name), bytes: Bytes::Static(bytes) });
        WeightStore::of_one_file(file, device, dtype)
    }

    /// No data: hands out meta tensors of the shapes asked for and remembers key and shape of each.
    pub fn meta(device: &Device, dtype: DType) -> WeightStore {
        WeightStore::new(PathBuf::from("manifest"), Vec::new(), None, device, dtype)
    }

    /// No file: hands out tensors of the shapes asked for with random values, the same for the same key, uniform within
    /// [`RANDOM_SIZE`] of 0. For times, which do not depend on values; a picture from them is noise.
    pub fn random(device: &Device, dtype: DType) -> WeightStore {
        let store = WeightStore::new(PathBuf::from("random weights"), Vec::new(), None, device, dtype);
        WeightStore { random: true, ..store }
    }

    fn new(
        origin: PathBuf,
        files: Vec<Arc<MappedFile>>,
        entries: Option<BTreeMap<String, Entry>>,
        device: &Device,
        dtype: DType,
    ) -> WeightStore {
        let (device, taken) = (device.clone(), Mutex::default());
        let format = WeightFormat::Plain;
        WeightStore {
            device,
            dtype,
            format,
            origin,
            variant: None,
            files,
            entries,
            survey: false,
            random: false,
            taken,
        }
    }

    fn open_sharded(index: PathBuf, device: &Device, dtype: DType) -> Result<WeightStore> {
        let weight_map = read_index(&index)?;
        let mut names: Vec<&String> = weight_map.values().collect();
        names.sort();
        names.dedup();
        let dir = index.parent().unwrap_or(Path::new("."));
        let mut files = Vec::new();
        for name in names {
            if Path::new(name).file_name() != Some(name.as_ref()) {
                return Err(Error::file(&index, format!("weight_map names the file {name:?}, expected a plain name")));
            }
            let path = dir.join(name);
            if !path.is_file() {
                let reason =
                    format!("this shard is missing, {} asks for it: download it again", file_name(&index).display());
                return Err(Error::file(&path, reason));
            }
            files.push(Arc::new(MappedFile::open(path)?));
        }
        let mut store = WeightStore::of_files(index, files, device, dtype)?;
        for (key, name) in &weight_map {
            let entry = store.entries.iter().flatten().find_map(|(k, entry)| (k == key).then_some(entry));
            let found = entry.map(|entry| file_name(&entry.file.path));
            if found != Some(Path::new(name)) {
                let elsewhere =
                    found.map_or(String::from("no shard has it"), |at| format!("it is in {}", at.display()));
                let reason =
                    format!("the index puts tensor {key} into {name}, but {elsewhere}: download all files again");
                return Err(Error::file(&store.origin, reason));
            }
        }
        if let Some((key, entry)) = store.entries.iter().flatten().find(|(key, _)| !weight_map.contains_key(*key)) {
            let shard = file_name(&entry.file.path).display();
            let reason = format!("the index does not name tensor {key} of {shard}: download all files again");
            return Err(Error::file(&store.origin, reason));
        }
        store.entries = store.entries.map(|entries| unwrapped_names(attach_scales(entries)));
        Ok(store)
    }

    fn of_one_file(file: Arc<MappedFile>, device: &Device, dtype: DType) -> Result<WeightStore> {
        let mut store = WeightStore::of_files(file.path.clone(), vec![file], device, dtype)?;
        store.entries = store.entries.map(|entries| unwrapped_names(attach_scales(entries)));
        Ok(store)
    }

    /// A part of a file: its tensors under the keys that the layers ask for.
    pub(super) fn view(
        file: &Arc<MappedFile>,
        entries: BTreeMap<String, Entry>,
        device: &Device,
        dtype: DType,
    ) -> WeightStore {
        WeightStore::new(file.path.clone(), vec![file.clone()], Some(entries), device, dtype)
    }

    pub(super) fn entries_mut(&mut self) -> impl Iterator<Item = (&String, &mut Entry)> {
        self.entries.iter_mut().flatten()
    }

    /// Keys and shapes of the stored tensors; none for a manifest.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.entries.iter().flatten().map(|(key, entry)| (key.as_str(), entry.shape.as_slice()))
    }

    fn of_files(origin: PathBuf, files: Vec<Arc<MappedFile>>, device: &Device, dtype: DType) -> Result<WeightStore> {
        let mut entries: BTreeMap<String, Entry> = BTreeMap::new();
        for file in &files {
            for (key, entry) in file.entries()? {
                if let Some(other) = entries.get(&key) {
                    let other = file_name(&other.file.path).display();
                    let reason =
                        format!("tensor {key} is in {other} as well: keep one of the two, or download both again");
                    return Err(Error::file(&file.path, reason));
                }
                entries.insert(key, entry);
            }
        }
        Ok(WeightStore::new(origin, files, Some(entries), device, dtype))
    }

    /// Keys and checkpoint shapes asked for so far, in order.
    pub fn manifest(&self) -> Vec<(String, Vec<usize>)> {
        self.taken().in_order.clone()
    }

    /// Hands out the weights of linear layers in this form, where a layer is made for it.
    pub fn with_format(self, format: WeightFormat) -> WeightStore {
        WeightStore { format, ..self }
    }

    /// Bytes of the tensors handed out so far, in the form in which they are.
    pub fn bytes(&self) -> u64 {
        let taken = self.taken();
        let bytes = |(key, shape): &(String, Vec<usize>)| {
            let values = shape.iter().product::<usize>();
            match self.format == WeightFormat::Fp8 && taken.products.contains(key) {
                true => values * DType::F8E4M3.size_bytes() + shape[0] * DType::F32.size_bytes(),
                false => values * self.dtype.size_bytes(),
            }
        };
        taken.in_order.iter().map(|taken| bytes(taken) as u64).sum()
    }

    /// Of the tensors that it hands out.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The files' bytes, in the order of their names.
    pub fn file_bytes(&self) -> impl Iterator<Item = &[u8]> {
        self.files.iter().map(|file| file.as_bytes())
    }

    pub fn root(&self) -> Weights<'_> {
        Weights { store: self, prefix: String::new() }
    }

    /// Renames keys before anybody asks: `rename(key)` is the key under which a stored tensor will be found, `None`
    /// drops it (`position_ids`).
    ///
    /// # Errors
    /// [`Error::Weight`]: two keys become one.
    pub fn rename(&mut self, rename: impl Fn(&str) -> Option<String>) -> Result<()> {
        let Some(entries) = self.entries.take() else { return Ok(()) };
        let mut renamed: BTreeMap<String, Entry> = BTreeMap::new();
        for (key, entry) in entries {
            let Some(new) = rename(&key) else { continue };
            let file = entry.file.path.clone();
            if renamed.insert(new.clone(), entry).is_some() {
                let reason = format!("a second tensor stands for {new}: the file mixes two naming schemes");
                return Err(Error::Weight { file, key, reason });
            }
        }
        self.entries = Some(renamed);
        Ok(())
    }

    /// Does the file hold a tensor with this full key? (Always true for a manifest.)
    pub fn contains(&self, key: &str) -> bool {
        self.entries.as_ref().is_none_or(|entries| entries.contains_key(key))
    }

    /// Which variant of the files was opened (`fp16`); `None`: the plain one.
    pub fn variant(&self) -> Option<&str> {
        self.variant.as_deref()
    }

    /// The tensors that no layer asked for so far, by file.
    pub fn unused(&self) -> Vec<Unused> {
        let taken = self.taken();
        let mut unused: Vec<Unused> = Vec::new();
        for (key, entry) in self.entries.iter().flatten().filter(|(key, _)| !taken.keys.contains(*key)) {
            match unused.iter_mut().find(|of_file| of_file.file == entry.file.path) {
                Some(of_file) => of_file.keys.push(key.clone()),
                None => unused.push(Unused { file: entry.file.path.clone(), keys: vec![key.clone()] }),
            }
        }
        unused
    }

    /// `load` gave `error`. If that is a missing tensor: the error that names all that are missing, and the tensor that no
    /// layer has and that looks like it, if there is one; any other error as it is.
    pub fn explained<T>(&self, error: Error, load: impl FnOnce(&Weights) -> Result<T>) -> Error {
        let (Error::Weight { file, key, reason }, Some(entries)) = (&error, &self.entries) else { return error };
        if entries.contains_key(key) {
            return error;
        }
        let mut survey =
            WeightStore::new(self.origin.clone(), Vec::new(), Some(entries.clone()), &Device::meta(), self.dtype);
        survey.survey = true;
        // What else is wrong ends the survey early: then later tensors may count as extra that are not.
        let complete = load(&survey.root()).is_ok();
        let taken = survey.taken();
        let mut reason = reason.clone();
        if complete && taken.missing.len() > 1 {
            let others = taken.missing.iter().map(|(other, _)| other.as_str()).filter(|other| other != key);
            let more = if taken.missing.len() > 4 { ", ..." } else { "" };
            let shown = others.take(3).collect::<Vec<_>>().join(", ");
            reason += &format!("; also missing: {shown}{more} ({} in all)", taken.missing.len());
        }
        let extra = entries.iter().filter(|(other, _)| complete && !taken.keys.contains(*other));
        let wanted = taken.missing.iter().find(|(missing, _)| missing == key).map_or(&[][..], |(_, shape)| shape);
        if let Some((other, entry)) = alike(key, wanted, extra) {
            reason += &format!(
                "; no layer has the tensor {other}, shape {:?}, which looks like it: is it the same under another name?",
                entry.shape
            );
        }
        Error::Weight { file: file.clone(), key: key.clone(), reason }
    }

    /// # Errors
    /// [`Error::Weight`] naming the tensors that no layer asked for.
    pub fn finish(self) -> Result<()> {
        let Some(entries) = &self.entries else { return Ok(()) };
        let taken = self.taken();
        let left: Vec<(&String, &Entry)> = entries.iter().filter(|(key, _)| !taken.keys.contains(*key)).collect();
        let Some((key, entry)) = left.first() else { return Ok(()) };
        let others: Vec<&str> = left[1..].iter().take(4).map(|(key, _)| key.as_str()).collect();
        let others = match left.len() - 1 {
            0 => String::new(),
            more => {
                format!(" (nor {more} more: {}{})", others.join(", "), if more > others.len() { ", ..." } else { "" })
            }
        };
        let reason = format!(
            "shape {:?}: no layer of the model that config.json describes has it{others}; do config.json and weights \
             belong together?",
            entry.shape
        );
        Err(Error::Weight { file: entry.file.path.clone(), key: key.to_string(), reason })
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        // A panic while a key is noted leaves a plain list behind: still usable.
        self.taken.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Consumes `key`. `shape` is the checkpoint's; `also` another shape of the same bytes that files may have.
    /// `None`: a manifest.
    fn take(&self, key: &str, shape: &[usize], also: Option<&[usize]>) -> Result<Option<&Entry>> {
        let error =
            |file: &Path, reason: String| Err(Error::Weight { file: file.to_path_buf(), key: key.to_string(), reason });
        let entry = match &self.entries {
            None => None,
            Some(entries) => match entries.get(key) {
                None if self.survey => {
                    let mut taken = self.taken();
                    taken.missing.push((key.to_string(), shape.to_vec()));
                    return Ok(None);
                }
                None => return error(&self.origin, format!("missing, wanted shape {shape:?}{}", foreign(entries))),
                some => some,
            },
        };
        let path = entry.map_or(self.origin.as_path(), |entry| &entry.file.path);
        let mut taken = self.taken();
        if !taken.keys.insert(key.to_string()) {
            return error(path, "two layers ask for it".into());
        }
        taken.in_order.push((key.to_string(), shape.to_vec()));
        drop(taken);
        if let Some(entry) = entry {
            if entry.shape != shape && also != Some(entry.shape.as_slice()) {
                return error(path, format!("has shape {:?}, wanted {shape:?}", entry.shape));
            }
            if !entry.is_float() {
                return error(path, format!("is {}, wanted F32, F16, BF16, F64, F8_E4M3 or F8_E5M2", entry.dtype));
            }
        }
        Ok(entry)
    }

    /// Writes a tensor of the file into `to` (elements of the store's dtype, on the cpu) in the layout asked for.
    fn fill(&self, key: &str, entry: &Entry, to: &mut [impl Element], layout: Layout) -> Result<()> {
        let file = &entry.file;
        let bad = if entry.is_plain() {
            repack(entry.bytes(), entry.dtype, to, layout)
        } else {
            let mut values = read_f32(entry);
            entry.adapters.iter().for_each(|delta| delta.apply(&mut values, &entry.shape));
            if entry.factor != 1.0 {
                values.par_iter_mut().for_each(|value| *value *= entry.factor);
            }
            repack(bytemuck::cast_slice(&values), FileDtype::F32, to, layout)
        };
        file.release(entry);
        let Some(bad) = bad else { return Ok(()) };
        let what = if bad.value.is_finite() {
            let hint = if self.dtype == DType::F16 { ": f32 and bf16 can hold them" } else { "" };
            format!("too large for {}{hint}", self.dtype)
        } else {
            String::from("not finite: the file is damaged or its training diverged; download it again")
        };
        let reason = format!("{} of {} values, the first of them {}, are {what}", bad.count, to.len(), bad.value);
        Err(Error::Weight { file: file.path.clone(), key: key.to_string(), reason })
    }
}

/// A place in the key tree: `weights.at("conv1").conv("weight", ...)`.
#[derive(Clone)]
pub struct Weights<'a> {
    store: &'a WeightStore,
    prefix: String,
}

impl<'a> Weights<'a> {
    /// The sub-tree `name` (a dot is put between).
    pub fn at(&self, name: impl AsRef<str>) -> Weights<'a> {
        let name = name.as_ref();
        let prefix = if self.prefix.is_empty() { name.to_string() } else { format!("{}.{name}", self.prefix) };
        Weights { store: self.store, prefix }
    }

    /// Is there a tensor `name` here? For parts that a file may lack.
    pub fn contains(&self, name: &str) -> bool {
        self.store.contains(&self.at(name).prefix)
    }

    /// Full key, for messages.
    pub fn path(&self) -> &str {
        &self.prefix
    }

    pub fn device(&self) -> &'a Device {
        &self.store.device
    }

    pub fn dtype(&self) -> DType {
        self.store.dtype
    }

    /// The tensor `name` with exactly this shape.
    ///
    /// # Errors
    /// [`Error::Weight`]: missing, taken twice, another shape, a dtype other than f32/f16/bf16 (f64 is accepted and
    /// rounded), a value that is not finite (also after rounding to the dtype).
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let source = self.take(name, shape, None)?;
        self.build(shape, &[source], Layout::Same)
    }

    /// As [`tensor`](Weights::tensor), but in host memory, whatever the store's device. `None` on the meta device: there is no data.
    ///
    /// # Errors
    /// As [`tensor`](Weights::tensor).
    pub fn host_tensor(&self, name: &str, shape: &[usize]) -> Result<Option<Tensor>> {
        let source = self.take(name, shape, None)?;
        match &self.store.device {
            Device::Meta(_) => Ok(None),
            _ => self.build_on_host(shape, &[source], Layout::Same).map(Some),
        }
    }

    /// Consumes the tensor `name`, which files have and the model's result does not depend on.
    ///
    /// # Errors
    /// [`Error::Weight`]: missing, taken twice, another shape.
    pub fn unread(&self, name: &str, shape: &[usize]) -> Result<()> {
        self.take(name, shape, None).map(drop)
    }

    /// A conv weight, `[O, I, kh, kw]` in the file, as `[O, kh, kw, I]`. A file may hold a 1x1 conv as `[O, I]`.
    ///
    /// # Errors
    /// As [`tensor`](Weights::tensor).
    pub fn conv(&self, name: &str, out: usize, input: usize, kernel: usize) -> Result<Tensor> {
        let matrix = [out, input];
        let also = (kernel == 1).then_some(matrix.as_slice());
        let source = self.take(name, &[out, input, kernel, kernel], also)?;
        let layout = Layout::ChannelsLast { channels: input, pixels: kernel * kernel };
        self.build(&[out, kernel, kernel, input], &[source], layout)
    }

    /// A linear weight `[N, K]`; a file may hold it as a 1x1 conv `[N, K, 1, 1]` as well.
    ///
    /// # Errors
    /// As [`tensor`](Weights::tensor).
    pub fn matrix(&self, name: &str, n: usize, k: usize) -> Result<Tensor> {
        let source = self.take(name, &[n, k], Some(&[n, k, 1, 1]))?;
        self.build(&[n, k], &[source], Layout::Same)
    }

    /// Several tensors of equal trailing shape stacked on the first dimension: fused QKV, `names` in order, `rows` each,
    /// to `[names * rows, columns]` (or `[names * rows]` without columns: biases).
    ///
    /// # Errors
    /// As [`tensor`](Weights::tensor).
    pub fn stacked(&self, names: &[&str], rows: usize, columns: Option<usize>) -> Result<Tensor> {
        let sources = self.take_all(names, rows, columns)?;
        let shape = [Some(names.len() * rows), columns].into_iter().flatten().collect::<Vec<_>>();
        self.build(&shape, &sources, Layout::Same)
    }

    /// A GEGLU projection, `2 * n` rows `[values; gates]` in the file, as interleaved rows value 0, gate 0, value 1, ...:
    /// `[2 * n, columns]`, or its bias `[2 * n]` without columns.
    ///
    /// # Errors
    /// As [`tensor`](Weights::tensor).
    pub fn geglu(&self, name: &str, n: usize, columns: Option<usize>) -> Result<Tensor> {
        let shape: Vec<usize> = [Some(2 * n), columns].into_iter().flatten().collect();
        let source = self.take(name, &shape, None)?;
        self.build(&shape, &[source], Layout::Interleaved { n, columns: columns.unwrap_or(1) })
    }

    /// As [`matrix`](Weights::matrix), for a layer that takes its weight in the store's [`WeightFormat`].
    ///
    /// # Errors
    /// As [`tensor`](Weights::tensor).
    pub fn product(&self, name: &str, n: usize, k: usize) -> Result<Matrix> {
        let source = self.take(name, &[n, k], Some(&[n, k, 1, 1]))?;
        self.build_product(&[n, k], &[source], Layout::Same)
    }

    /// The same of a 1x1 conv, `[N, K, 1, 1]` in the file, or `[N, K]`.
    ///
    /// # Errors
    /// As [`tensor`](Weights::tensor).
    pub fn pixel_product(&self, name: &str, n: usize, k: usize) -> Result<Matrix> {
        let source = self.take(name, &[n, k, 1, 1], Some(&[n, k]))?;
        self.build_product(&[n, k], &[source], Layout::Same)
    }

    /// As [`stacked`](Weights::stacked), in the store's [`WeightFormat`].
    ///
    /// # Errors
    /// As [`tensor`](Weights::tensor).
    pub fn stacked_product(&self, names: &[&str], rows: usize, columns: usize) -> Result<Matrix> {
        let sources = self.take_all(names, rows, Some(columns))?;
        self.build_product(&[names.len() * rows, columns], &sources, Layout::Same)
    }

    /// As [`geglu`](Weights::geglu), in the store's [`WeightFormat`].
    ///
    /// # Errors
    /// As [`tensor`](Weights::tensor).
    pub fn geglu_product(&self, name: &str, n: usize, columns: usize) -> Result<Matrix> {
        let source = self.take(name, &[2 * n, columns], None)?;
        self.build_product(&[2 * n, columns], &[source], Layout::Interleaved { n, columns })
    }

    fn take_all(
        &self,
        names: &[&str],
        rows: usize,
        columns: Option<usize>,
    ) -> Result<Vec<(String, Option<&'a Entry>)>> {
        let shape = [Some(rows), columns].into_iter().flatten().collect::<Vec<_>>();
        let conv = [&shape[..], &[1, 1]].concat();
        let also = columns.is_some().then_some(conv.as_slice());
        names.iter().map(|name| self.take(name, &shape, also)).collect()
    }

    /// A weight in the store's form. In 8 bits it is rounded once, from f32.
    fn build_product(&self, shape: &[usize], sources: &[(String, Option<&Entry>)], layout: Layout) -> Result<Matrix> {
        let device = &self.store.device;
        self.store.taken().products.extend(sources.iter().map(|(key, _)| key.clone()));
        match (self.store.format, device) {
            (WeightFormat::Plain, _) => Ok(Matrix::Plain(self.build(shape, sources, layout)?)),
            (WeightFormat::Fp8, Device::Meta(_)) => {
                let codes = Tensor::uninit(device, shape, DType::F8E4M3)?;
                let scales = Tensor::uninit(device, &shape[..1], DType::F32)?;
                Ok(Matrix::Fp8(Quantized::new(codes, scales)?))
            }
            (WeightFormat::Fp8, _) => {
                let host = if let Device::Cpu(_) = device { device.clone() } else { Device::cpu() };
                let mut weight = Tensor::uninit(&host, shape, DType::F32)?;
                self.fill_all(weight.cpu_mut::<f32>(), sources, layout)?;
                Ok(Matrix::Fp8(ops::quantize(&weight)?.to_device(device)?))
            }
        }
    }

    fn take(&self, name: &str, shape: &[usize], also: Option<&[usize]>) -> Result<(String, Option<&'a Entry>)> {
        let key = self.at(name).prefix;
        let entry = self.store.take(&key, shape, also)?;
        Ok((key, entry))
    }

    /// A tensor of the store's dtype and device from `sources`, one after the other.
    fn build(&self, shape: &[usize], sources: &[(String, Option<&Entry>)], layout: Layout) -> Result<Tensor> {
        if let Device::Meta(_) = self.store.device {
            return Tensor::uninit(&self.store.device, shape, self.store.dtype);
        }
        self.build_on_host(shape, sources, layout)?.to_device(&self.store.device)
    }

    /// The same before it is on the device: a card gets each tensor as soon as it is repacked, and the host holds one at a time.
    fn build_on_host(&self, shape: &[usize], sources: &[(String, Option<&Entry>)], layout: Layout) -> Result<Tensor> {
        let host = if let Device::Cpu(_) = self.store.device { self.store.device.clone() } else { Device::cpu() };
        let mut tensor = Tensor::uninit(&host, shape, self.store.dtype)?;
        match self.store.dtype {
            DType::F32 => self.fill_all(tensor.cpu_mut::<f32>(), sources, layout)?,
            DType::F16 => self.fill_all(tensor.cpu_mut::<f16>(), sources, layout)?,
            DType::BF16 => self.fill_all(tensor.cpu_mut::<bf16>(), sources, layout)?,
            got @ (DType::U32 | DType::F8E4M3) => {
                let (op, arg, want) = ("WeightStore", "dtype", "f32, f16 or bf16".into());
                return Err(Error::Dtype { op, arg, got, want });
            }
        }
        Ok(tensor)
    }

    fn fill_all<T: Element>(&self, to: &mut [T], sources: &[(String, Option<&Entry>)], layout: Layout) -> Result<()> {
        let part = to.len() / sources.len().max(1);
        for (i, (key, entry)) in sources.iter().enumerate() {
            let to = &mut to[i * part..(i + 1) * part];
            match entry {
                Some(entry) => self.store.fill(key, entry, to, layout)?,
                None if self.store.random => {
                    let mut hasher = DefaultHasher::new();
                    key.hash(&mut hasher);
                    let values = random(to.len(), hasher.finish() >> 40);
                    to.par_iter_mut().zip(&values).for_each(|(to, value)| *to = T::from_f32(RANDOM_SIZE * value));
                }
                None => {
                    let reason = "a manifest has no data: it works on the meta device only";
                    return Err(Error::DeviceUnavailable { device: "cpu".into(), reason: reason.into() });
                }
            }
        }
        Ok(())
    }
}

/// Small enough that activations stay finite in f16 through a deep network.
const RANDOM_SIZE: f32 = 0.03;

/// The weights of `dir` in files of this ending and their variant (`""`, `.fp16`): the file, or the index of its shards.
///
/// # Errors
/// [`Error::File`]: several variants to choose from.
fn find(dir: &Path, stem: &str, ending: &str) -> Result<Option<(PathBuf, String)>> {
    let of = |variant: String| {
        // The variant stands before or behind `.safetensors.index`: both orders are in use.
        let names = [
            format!("{stem}{variant}.{ending}"),
            format!("{stem}{variant}.{ending}.index.json"),
            format!("{stem}.{ending}.index{variant}.json"),
        ];
        let path = names.into_iter().map(|name| dir.join(name)).find(|path| path.is_file())?;
        Some((path, variant))
    };
    if let Some(found) = of(String::new()).or_else(|| of(".fp16".into())) {
        return Ok(Some(found));
    }
    match &variants(dir, stem, ending)[..] {
        [] => Ok(None),
        [only] => Ok(of(format!(".{only}"))),
        several => {
            let reason = format!(
                "not found; there are the variants {}: keep one of them, or rename the files of the wanted one to \
                 {stem}.{ending}",
                several.join(", ")
            );
            Err(Error::file(&dir.join(format!("{stem}.{ending}")), reason))
        }
    }
}

/// Puts the scales of 8-bit floats to their tensors: `X.scale_weight` or `X.weight_scale` beside `X.weight`, in f32, one
/// value or one per row. The marker `scaled_fp8` and the scales of activations (`scale_input`, `input_scale`), which
/// serve 8-bit arithmetic, are let go.
pub(super) fn attach_scales(entries: BTreeMap<String, Entry>) -> BTreeMap<String, Entry> {
    let is_f8 = |entry: &Entry| matches!(entry.dtype, FileDtype::F8_E4M3 | FileDtype::F8_E5M2);
    if !entries.values().any(is_f8) {
        return entries;
    }
    let (mut scales, mut left) = (Vec::new(), BTreeMap::new());
    for (key, entry) in entries {
        let module = key.strip_suffix(".scale_weight").or_else(|| key.strip_suffix(".weight_scale"));
        let unused = key.ends_with(".scale_input") || key.ends_with(".input_scale") || key.ends_with("scaled_fp8");
        match module {
            Some(module) => scales.push((format!("{module}.weight"), key.clone(), entry)),
            None if unused => {}
            None => drop(left.insert(key, entry)),
        }
    }
    for (weight, key, scale) in scales {
        match left.get_mut(&weight) {
            Some(entry) if is_f8(entry) && scale.is_float() && scale.fits_rows_of(entry) => {
                entry.scale = Some(Box::new(scale));
            }
            _ => drop(left.insert(key, scale)), // not a scale as we know it: a tensor that no layer has
        }
    }
    left
}

/// A hint for a file whose keys are of another family altogether.
fn foreign(entries: &BTreeMap<String, Entry>) -> &'static str {
    let any = |prefix: &str| entries.keys().any(|key| key.starts_with(prefix));
    if any("model.diffusion_model.") || any("first_stage_model.") || any("cond_stage_model.") {
        "; this is a single-file checkpoint: give its own path as the model"
    } else if any("lora_") || entries.keys().any(|key| key.contains(".lora_")) {
        "; this is a LoRA, not a model"
    } else if entries.is_empty() {
        "; the file holds no tensors"
    } else {
        ""
    }
}
