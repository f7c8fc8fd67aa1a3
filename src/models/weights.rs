//! Weights by key: safetensors files (one, or shards with an index) checked, converted, repacked and brought to a device;
//! or, for the meta device, a manifest of what a model asks for.
//!
//! A file is mapped, not read: a tensor goes from the mapping straight into its final layout and dtype, row by row, and
//! its pages are given back, so loading holds the loaded tensors and little else.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use half::{bf16, f16, slice::HalfFloatSliceExt};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::{Dtype as FileDtype, SafeTensors};

use crate::error::{Error, Result};
use crate::runtime::{DType, Device, Element, Tensor};

/// All tensors of one model. Every key is consumed exactly once: [`finish`](WeightStore::finish) reports what is left.
#[derive(Debug)]
pub struct WeightStore {
    device: Device,
    dtype: DType,
    /// The file, or the index of the shards: stands in errors about keys that no file holds.
    origin: PathBuf,
    files: Vec<MappedFile>,
    /// By the key that layers ask for. `None`: a manifest, which has every tensor anybody asks for.
    entries: Option<BTreeMap<String, Entry>>,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    keys: HashSet<String>,
    in_order: Vec<(String, Vec<usize>)>,
}

#[derive(Debug)]
struct MappedFile {
    path: PathBuf,
    bytes: Bytes,
}

#[derive(Debug)]
enum Bytes {
    Mapped(Mmap),
    Static(&'static [u8]),
}

/// A tensor of a file; `start..start + len` are its bytes in the whole file.
#[derive(Clone, Debug)]
struct Entry {
    file: usize,
    dtype: FileDtype,
    shape: Vec<usize>,
    start: usize,
    len: usize,
}

impl WeightStore {
    /// Opens `dir/stem.safetensors`, or the shards named by `dir/stem.safetensors.index.json`; where neither exists, their
    /// `.fp16.` variants. Tensors will be `dtype` on `device`.
    ///
    /// # Errors
    /// [`Error::File`]: missing, truncated, not safetensors, two shards with one key, an index that names a file or key
    /// that is not there. Always with what to do.
    pub fn open(dir: &Path, stem: &str, device: &Device, dtype: DType) -> Result<WeightStore> {
        let at = |name: String| dir.join(name);
        for variant in ["", ".fp16"] {
            let single = at(format!("{stem}{variant}.safetensors"));
            if single.is_file() {
                return WeightStore::of_files(single.clone(), vec![MappedFile::open(single)?], device, dtype);
            }
            let mut indices = vec![at(format!("{stem}{variant}.safetensors.index.json"))];
            if !variant.is_empty() {
                indices.push(at(format!("{stem}.safetensors.index{variant}.json"))); // the other order is in use too
            }
            if let Some(index) = indices.into_iter().find(|path| path.is_file()) {
                return WeightStore::open_sharded(index, device, dtype);
            }
        }
        Err(not_found(dir, stem))
    }

    /// The bytes of one safetensors file that is already in memory (the embedded model); `name` stands in errors.
    ///
    /// # Errors
    /// [`Error::File`]: truncated or not safetensors.
    pub fn from_bytes(name: &str, bytes: &'static [u8], device: &Device, dtype: DType) -> Result<WeightStore> {
        let file = MappedFile { path: PathBuf::from(name), bytes: Bytes::Static(bytes) };
        WeightStore::of_files(file.path.clone(), vec![file], device, dtype)
    }

    /// No data: hands out meta tensors of the shapes asked for and remembers key and shape of each.
    pub fn meta(device: &Device, dtype: DType) -> WeightStore {
        let (origin, files, taken) = (PathBuf::from("manifest"), Vec::new(), Mutex::default());
        WeightStore { device: device.clone(), dtype, origin, files, entries: None, taken }
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
            files.push(MappedFile::open(path)?);
        }
        let store = WeightStore::of_files(index, files, device, dtype)?;
        for (key, name) in &weight_map {
            let entry = store.entries.iter().flatten().find_map(|(k, entry)| (k == key).then_some(entry));
            let found = entry.map(|entry| file_name(&store.files[entry.file].path));
            if found != Some(Path::new(name)) {
                let elsewhere =
                    found.map_or(String::from("no shard has it"), |at| format!("it is in {}", at.display()));
                let reason =
                    format!("the index puts tensor {key} into {name}, but {elsewhere}: download all files again");
                return Err(Error::file(&store.origin, reason));
            }
        }
        if let Some((key, entry)) = store.entries.iter().flatten().find(|(key, _)| !weight_map.contains_key(*key)) {
            let shard = file_name(&store.files[entry.file].path).display();
            let reason = format!("the index does not name tensor {key} of {shard}: download all files again");
            return Err(Error::file(&store.origin, reason));
        }
        Ok(store)
    }

    fn of_files(origin: PathBuf, files: Vec<MappedFile>, device: &Device, dtype: DType) -> Result<WeightStore> {
        let mut entries: BTreeMap<String, Entry> = BTreeMap::new();
        for (index, file) in files.iter().enumerate() {
            for (key, entry) in file.entries(index)? {
                if let Some(other) = entries.get(&key) {
                    let other = file_name(&files[other.file].path).display();
                    let reason =
                        format!("tensor {key} is in {other} as well: keep one of the two, or download both again");
                    return Err(Error::file(&file.path, reason));
                }
                entries.insert(key, entry);
            }
        }
        let taken = Mutex::default();
        Ok(WeightStore { device: device.clone(), dtype, origin, files, entries: Some(entries), taken })
    }

    /// Keys and checkpoint shapes asked for so far, in order.
    pub fn manifest(&self) -> Vec<(String, Vec<usize>)> {
        self.taken().in_order.clone()
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
            let file = self.files[entry.file].path.clone();
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
        Err(Error::Weight { file: self.files[entry.file].path.clone(), key: key.to_string(), reason })
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
                None => return error(&self.origin, format!("missing, wanted shape {shape:?}{}", foreign(entries))),
                some => some,
            },
        };
        let path = entry.map_or(self.origin.as_path(), |entry| &self.files[entry.file].path);
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
            if !matches!(entry.dtype, FileDtype::F64 | FileDtype::F32 | FileDtype::F16 | FileDtype::BF16) {
                return error(path, format!("is {}, wanted F32, F16, BF16 or F64", entry.dtype));
            }
        }
        Ok(entry)
    }

    /// Writes a tensor of the file into `to` (elements of the store's dtype, on the cpu) in the layout asked for.
    fn fill(&self, key: &str, entry: &Entry, to: &mut [impl Element], layout: Layout) -> Result<()> {
        let file = &self.files[entry.file];
        let bytes = &file.as_bytes()[entry.start..entry.start + entry.len];
        let bad = repack(bytes, entry.dtype, to, layout);
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
        let shape = |rows: usize| [Some(rows), columns].into_iter().flatten().collect::<Vec<_>>();
        let conv = [&shape(rows)[..], &[1, 1]].concat();
        let also = columns.is_some().then_some(conv.as_slice());
        let sources = names.iter().map(|name| self.take(name, &shape(rows), also)).collect::<Result<Vec<_>>>()?;
        self.build(&shape(names.len() * rows), &sources, Layout::Same)
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
        // A card gets each tensor as soon as it is repacked: the host holds one at a time.
        let host = if let Device::Cpu(_) = self.store.device { self.store.device.clone() } else { Device::cpu() };
        let mut tensor = Tensor::uninit(&host, shape, self.store.dtype)?;
        match self.store.dtype {
            DType::F32 => self.fill_all(tensor.cpu_mut::<f32>(), sources, layout)?,
            DType::F16 => self.fill_all(tensor.cpu_mut::<f16>(), sources, layout)?,
            DType::BF16 => self.fill_all(tensor.cpu_mut::<bf16>(), sources, layout)?,
            got @ DType::U32 => {
                let (op, arg, want) = ("WeightStore", "dtype", "f32, f16 or bf16".into());
                return Err(Error::Dtype { op, arg, got, want });
            }
        }
        tensor.to_device(&self.store.device)
    }

    fn fill_all<T: Element>(&self, to: &mut [T], sources: &[(String, Option<&Entry>)], layout: Layout) -> Result<()> {
        let part = to.len() / sources.len().max(1);
        for (i, (key, entry)) in sources.iter().enumerate() {
            let to = &mut to[i * part..(i + 1) * part];
            match entry {
                Some(entry) => self.store.fill(key, entry, to, layout)?,
                None => {
                    let reason = "a manifest has no data: it works on the meta device only";
                    return Err(Error::DeviceUnavailable { device: "cpu".into(), reason: reason.into() });
                }
            }
        }
        Ok(())
    }
}

/// How a checkpoint's tensor becomes ours.
#[derive(Clone, Copy, Debug)]
enum Layout {
    Same,
    /// Rows `[channels, pixels]` to `[pixels, channels]`.
    ChannelsLast {
        channels: usize,
        pixels: usize,
    },
    /// Row `r` of ours is row `r / 2` of the first `n`, or of the second `n` for odd `r`.
    Interleaved {
        n: usize,
        columns: usize,
    },
}

/// Values that the dtype cannot hold.
struct BadValues {
    count: usize,
    value: f64,
}

/// Elements a thread converts at a time.
const CHUNK: usize = 1 << 15;

/// Converts `bytes` (little-endian elements of `dtype`) into `to`; `Some` when a value is not finite after rounding.
fn repack<T: Element>(bytes: &[u8], dtype: FileDtype, to: &mut [T], layout: Layout) -> Option<BadValues> {
    let row = match layout {
        Layout::Same => CHUNK,
        Layout::ChannelsLast { channels, pixels } => channels * pixels,
        Layout::Interleaved { columns, .. } => columns,
    };
    let rows_per_chunk = CHUNK.div_ceil(row.max(1));
    let size = dtype.bitsize() / 8;
    let convert = |(chunk_index, chunk): (usize, &mut [T])| {
        let mut values = vec![0.0; row.min(chunk.len())];
        let mut bad: Option<BadValues> = None;
        for (i, to) in chunk.chunks_mut(row).enumerate() {
            let r = chunk_index * rows_per_chunk + i;
            let source_row = match layout {
                Layout::Interleaved { n, .. } => r / 2 + (r % 2) * n,
                _ => r,
            };
            let values = &mut values[..to.len()];
            let first = source_row * row;
            let source = &bytes[first * size..(first + to.len()) * size];
            decode(source, dtype, values);
            bad = merge(bad, out_of_range(source, dtype, values, T::DTYPE));
            match layout {
                Layout::ChannelsLast { channels, pixels } if pixels > 1 => {
                    for (p, to) in to.chunks_mut(channels).enumerate() {
                        to.iter_mut().enumerate().for_each(|(c, to)| *to = T::from_f32(values[c * pixels + p]));
                    }
                }
                _ => to.iter_mut().zip(&*values).for_each(|(to, &value)| *to = T::from_f32(value)),
            }
        }
        bad
    };
    to.par_chunks_mut(rows_per_chunk * row.max(1)).enumerate().map(convert).reduce(|| None, merge)
}

fn merge(a: Option<BadValues>, b: Option<BadValues>) -> Option<BadValues> {
    match (a, b) {
        (Some(a), Some(b)) => Some(BadValues { count: a.count + b.count, value: a.value }),
        (a, b) => a.or(b),
    }
}

/// Little-endian file elements as f32. A file's data need not be aligned.
fn decode(bytes: &[u8], dtype: FileDtype, to: &mut [f32]) {
    fn each<const SIZE: usize>(to: &mut [f32], bytes: &[u8], value: impl Fn([u8; SIZE]) -> f32) {
        let (elements, _) = bytes.as_chunks::<SIZE>();
        to.iter_mut().zip(elements).for_each(|(to, &element)| *to = value(element));
    }
    match dtype {
        FileDtype::F64 => each(to, bytes, |v| f64::from_le_bytes(v) as f32),
        FileDtype::F32 => each(to, bytes, f32::from_le_bytes),
        FileDtype::BF16 => each(to, bytes, |v| bf16::from_le_bytes(v).to_f32()),
        FileDtype::F16 => match bytemuck::try_cast_slice::<u8, f16>(bytes) {
            Ok(values) if cfg!(target_endian = "little") => values.convert_to_f32_slice(to), // vector instructions
            _ => each(to, bytes, |v| f16::from_le_bytes(v).to_f32()),
        },
        _ => unreachable!("take() lets only these through"),
    }
}

/// The values of a row that become NaN or infinity in `dtype`: from half a unit above its largest value on.
fn out_of_range(bytes: &[u8], file_dtype: FileDtype, values: &[f32], dtype: DType) -> Option<BadValues> {
    let limit = match dtype {
        DType::F16 => 65520.0,
        DType::BF16 => f32::from_bits(0x7f7f_8000),
        DType::F32 | DType::U32 => f32::INFINITY,
    };
    let count = values.iter().filter(|value| value.abs() >= limit || value.is_nan()).count();
    if count == 0 {
        return None;
    }
    let i = values.iter().position(|value| value.abs() >= limit || value.is_nan()).unwrap_or(0);
    let value = match file_dtype {
        FileDtype::F64 => bytemuck::cast_slice::<u8, [u8; 8]>(bytes).get(i).map_or(0.0, |&v| f64::from_le_bytes(v)),
        _ => f64::from(values[i]),
    };
    Some(BadValues { count, value })
}

impl MappedFile {
    fn open(path: PathBuf) -> Result<MappedFile> {
        let file = File::open(&path).map_err(|source| Error::io(&path, source))?;
        if file.metadata().map_err(|source| Error::io(&path, source))?.len() == 0 {
            return Err(Error::file(&path, "is empty: download it again"));
        }
        // SAFETY: the mapping is private and read-only, and only ever seen as bytes. As with any mapped file, another
        // process that shortens it while we load would end ours; weights are not rewritten in place.
        let map = unsafe { Mmap::map(&file) }.map_err(|source| Error::io(&path, source))?;
        Ok(MappedFile { path, bytes: Bytes::Mapped(map) })
    }

    fn as_bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Mapped(map) => map,
            Bytes::Static(bytes) => bytes,
        }
    }

    /// Every key of the header, checked: offsets within the file, without holes or overlaps, as long as dtype and shape say.
    fn entries(&self, file: usize) -> Result<Vec<(String, Entry)>> {
        let bytes = self.as_bytes();
        let (header, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| {
            let reason = match sniff(bytes) {
                Some(what) => what.to_string(),
                None => format!("not a readable safetensors file ({error}): truncated or damaged, download it again"),
            };
            Error::file(&self.path, reason)
        })?;
        let data_start = 8 + header;
        let entry = |info: &safetensors::tensor::TensorInfo| {
            let (start, end) = info.data_offsets;
            let (dtype, shape) = (info.dtype, info.shape.clone());
            Entry { file, dtype, shape, start: data_start + start, len: end - start }
        };
        Ok(metadata.tensors().into_iter().map(|(key, info)| (key, entry(info))).collect())
    }

    /// Lets the system drop a tensor's pages, so that the mapping does not grow into a second copy of the model.
    fn release(&self, entry: &Entry) {
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
    } else if begins(b"PK\x03\x04") || begins(b"\x80\x02") || begins(b"\x80\x04") {
        Some("a PyTorch pickle, not safetensors: convert it (load it in diffusers, then save_pretrained)")
    } else if begins(b"GGUF") {
        Some("a GGUF file: safetensors in f32, f16 or bf16 are wanted")
    } else if begins(b"<") {
        Some("a web page, not weights: the download went wrong (is a login needed?), download it again")
    } else {
        None
    }
}

/// `weight_map` of a shard index: key to file name.
fn read_index(index: &Path) -> Result<BTreeMap<String, String>> {
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

/// The weights are not where they should be: say what is there instead.
fn not_found(dir: &Path, stem: &str) -> Error {
    let wanted = dir.join(format!("{stem}.safetensors"));
    if !dir.is_dir() {
        return Error::file(dir, "no such directory: a model directory in the diffusers layout has it");
    }
    let mut names: Vec<String> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .collect();
    names.sort();
    let pickle = |name: &&String| [".bin", ".ckpt", ".pt", ".pth", ".pkl"].iter().any(|end| name.ends_with(end));
    let reason = if let Some(name) = names.iter().find(pickle) {
        format!(
            "not found; {name} is a PyTorch pickle, which can run code and is not read: download the safetensors version, \
             or convert it (load the model in diffusers or transformers, then save_pretrained(dir))"
        )
    } else if let Some(name) = names.iter().find(|name| name.ends_with(".safetensors")) {
        format!("not found; the directory holds {name}: rename it if these are the weights")
    } else {
        "not found, nor an index of shards: download the weights".to_string()
    };
    Error::file(&wanted, reason)
}

/// A hint for a file whose keys are of another family altogether.
fn foreign(entries: &BTreeMap<String, Entry>) -> &'static str {
    let any = |prefix: &str| entries.keys().any(|key| key.starts_with(prefix));
    if any("model.diffusion_model.") || any("first_stage_model.") || any("cond_stage_model.") {
        "; this is a single-file checkpoint: convert it to the diffusers layout (StableDiffusionPipeline.from_single_file, \
         then save_pretrained)"
    } else if any("lora_") || entries.keys().any(|key| key.contains(".lora_")) {
        "; this is a LoRA, not a model"
    } else if entries.is_empty() {
        "; the file holds no tensors"
    } else {
        ""
    }
}

fn file_name(path: &Path) -> &Path {
    path.file_name().map_or(path, Path::new)
}
