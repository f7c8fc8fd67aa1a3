//! LoRA and its relatives, merged into the weights while they are loaded: in f32, between decoding and rounding.
//!
//! W' = W + weight * scale * delta, scale = alpha / rank, and delta by kind:
//!   LoRA  Hu et al. 2021, arXiv:2106.09685: up down; a convolution's kernel is in `down`
//!   LoHa  Hyeon-Woo et al. 2021, arXiv:2108.06098: (a1 b1) * (a2 b2), element by element
//!   LoKr  Yeh et al. 2023, arXiv:2309.14859: the Kronecker product of two factors, each whole or itself a product
//!   DoRA  Liu et al. 2024, arXiv:2402.09353: W + scale delta, brought to stored norms of its rows or columns
//! and ResAdapter, which also brings norms in place of the model's (adapters/resadapter.rs).
//! Keys are those of kohya's scripts and LyCORIS, of old diffusers, and of PEFT.

mod peft;
mod resadapter;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rayon::prelude::*;

use super::ldm;
use super::weights::{Entry, MappedFile, Part, Unused, WeightStore, read_f32};
use crate::error::{Error, Result};

/// The change of one tensor by one adapter.
#[derive(Debug)]
pub(super) struct Delta {
    /// The user's factor.
    weight: f32,
    /// alpha / rank.
    scale: f32,
    kind: Kind,
    dora: Option<Dora>,
}

#[derive(Debug)]
enum Kind {
    /// `[out, r]`, `[r, in, ...]`, and between them `[r, r, kernel]`.
    Lora {
        up: Entry,
        down: Entry,
        mid: Option<Entry>,
    },
    Hadamard([Factor; 2]),
    Kronecker([Factor; 2]),
    Full(Entry),
}

#[derive(Debug)]
enum Factor {
    Whole(Entry),
    /// `a [out, r]`, `b [r, in]`; or with a core `t [r, r, kernel]`: `a [r, out]`.
    Product {
        a: Entry,
        b: Entry,
        core: Option<Box<Entry>>,
    },
}

#[derive(Debug)]
struct Dora {
    magnitude: Entry,
    /// One norm for each output, or one for each input channel.
    per_output: bool,
}

/// Adapter files with their weights, in the order in which they are applied.
#[derive(Debug)]
pub struct Adapters {
    files: Vec<AdapterFile>,
    /// A ResAdapter's, whose LoRA is the last of the files.
    norms: Option<resadapter::Norms>,
}

#[derive(Debug)]
struct AdapterFile {
    file: Arc<MappedFile>,
    weight: f32,
    /// By part and flattened module name (dots become underscores).
    modules: BTreeMap<(Part, String), Module>,
    /// Keys that are of no dialect.
    unknown: Vec<String>,
    matched: Mutex<HashSet<(Part, String)>>,
}

#[derive(Debug, Default)]
struct Module {
    keys: Vec<String>,
    /// The name in its network, with the dots that the file's keys have.
    path: String,
    /// What PEFT's configuration says of it.
    scaling: Option<peft::Scaling>,
    slots: HashMap<&'static str, Entry>,
}

/// How a key ends, and what its tensor is. Longer ends first.
const ENDS: [(&str, &str); 31] = [
    (".lora_linear_layer.down.weight", "down"),
    (".lora_linear_layer.up.weight", "up"),
    (".lora_magnitude_vector.default.weight", "magnitude"),
    (".lora_magnitude_vector.weight", "magnitude"),
    (".lora_magnitude_vector", "magnitude"),
    (".lora_A.default.weight", "down"),
    (".lora_B.default.weight", "up"),
    (".lora_A.weight", "down"),
    (".lora_B.weight", "up"),
    (".lora_down.weight", "down"),
    (".lora_mid.weight", "mid"),
    (".lora_up.weight", "up"),
    (".lora.down.weight", "down"),
    (".lora.up.weight", "up"),
    ("_lora.down.weight", "down"),
    ("_lora.up.weight", "up"),
    (".dora_scale", "dora_scale"),
    (".alpha", "alpha"),
    (".diff", "diff"),
    (".hada_w1_a", "hada_w1_a"),
    (".hada_w1_b", "hada_w1_b"),
    (".hada_w2_a", "hada_w2_a"),
    (".hada_w2_b", "hada_w2_b"),
    (".hada_t1", "hada_t1"),
    (".hada_t2", "hada_t2"),
    (".lokr_w1_a", "lokr_w1_a"),
    (".lokr_w1_b", "lokr_w1_b"),
    (".lokr_w2_a", "lokr_w2_a"),
    (".lokr_w2_b", "lokr_w2_b"),
    (".lokr_w1", "lokr_w1"),
    (".lokr_w2", "lokr_w2"),
];
const CORE_END: (&str, &str) = (".lokr_t2", "lokr_t2");

/// How a key begins, and the part it is for.
const BEGINNINGS: [(&str, Part); 12] = [
    ("lora_unet_", Part::Unet),
    ("lora_te1_", Part::TextEncoder),
    ("lora_te2_", Part::TextEncoder2),
    ("lora_te_", Part::TextEncoder),
    ("lora_te3_", Part::TextEncoder3),
    ("lora_transformer_", Part::Transformer),
    ("unet.", Part::Unet),
    ("transformer.", Part::Transformer),
    ("text_encoder_3.", Part::TextEncoder3),
    ("text_encoder_2.", Part::TextEncoder2),
    ("text_encoder.", Part::TextEncoder),
    ("", Part::Unet),
];

impl Adapters {
    /// Opens the files and sorts their keys; a weight of 1 is full strength.
    ///
    /// # Errors
    /// [`Error::File`]: not safetensors nor PyTorch's, or without one key of an adapter.
    pub fn open(files: &[(PathBuf, f32)]) -> Result<Adapters> {
        Ok(Adapters {
            files: files.iter().map(|(path, weight)| AdapterFile::open(path, *weight)).collect::<Result<_>>()?,
            norms: None,
        })
    }

    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// The files' bytes and weights, for a digest.
    pub fn file_bytes(&self) -> impl Iterator<Item = (&[u8], f32)> {
        self.files.iter().map(|file| (file.file.as_bytes(), file.weight))
    }

    /// To be called when the parts have their adapters: per file, the keys that no tensor of the model took. Those for the
    /// parts `not_loaded`, which the model has as well, are not among them.
    ///
    /// # Errors
    /// [`Error::File`]: a file none of whose keys belongs to the model.
    pub fn finish(&self, not_loaded: &[Part]) -> Result<Vec<Unused>> {
        let mut all = Vec::new();
        for file in &self.files {
            let matched = file.matched.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            if matched.is_empty() && file.modules.keys().all(|(part, _)| !not_loaded.contains(part)) {
                let key = file.modules.values().flat_map(|module| &module.keys).next().map_or("", String::as_str);
                let reason =
                    format!("no key of this adapter ({key}, ...) belongs to the model: is it for another family?");
                return Err(Error::file(&file.file.path, reason));
            }
            let wanted = |name: &(Part, String)| !matched.contains(name) && !not_loaded.contains(&name.0);
            let left = file.modules.iter().filter(|(name, _)| wanted(name));
            let mut keys: Vec<String> = left.flat_map(|(_, module)| module.keys.clone()).collect();
            keys.extend(file.unknown.iter().cloned());
            if !keys.is_empty() {
                keys.sort();
                all.push(Unused { file: file.file.path.clone(), keys });
            }
        }
        all.extend(self.norms.as_ref().and_then(resadapter::Norms::left));
        Ok(all)
    }
}

impl WeightStore {
    /// Adds the adapters' changes to this part's tensors; they are computed while a tensor is loaded. A ResAdapter's norms come
    /// first, so that an adapter that changes norms changes these.
    ///
    /// # Errors
    /// [`Error::Weight`]: an adapter's tensors do not have the shape of the weight they change, or one of them is missing.
    pub fn with_adapters(mut self, part: Part, adapters: &Adapters) -> Result<WeightStore> {
        if part == Part::Unet {
            adapters.replace_norms(&mut self)?;
        }
        let names: Vec<String> = self.tensors().map(|(key, _)| key.to_string()).collect();
        let level = 1 + names
            .iter()
            .filter(|key| key.starts_with("down_blocks.0.resnets."))
            .filter_map(|key| key.split('.').nth(3)?.parse::<usize>().ok())
            .max()
            .map_or(0, |last| last + 1);
        let attention =
            |block: usize| names.iter().any(|key| key.starts_with(&format!("up_blocks.{block}.attentions.")));
        for (key, entry) in self.entries_mut() {
            let Some(module) = key.strip_suffix(".weight") else { continue };
            let mut aliases = vec![flat(part, module)];
            if part == Part::Unet
                && let Some(name) = ldm::unet_module(module, level, attention)
            {
                aliases.push(flat(part, &name));
            }
            for file in &adapters.files {
                for name in &aliases {
                    let at = (part, name.clone());
                    let Some(module) = file.modules.get(&at) else { continue };
                    let delta = module.delta(file.weight).and_then(|delta| delta.fitting(&entry.shape));
                    let delta = delta.map_err(|reason| Error::Weight {
                        file: file.file.path.clone(),
                        key: module.keys.first().cloned().unwrap_or_default(),
                        reason: format!("{reason} (it changes {key}, shape {:?})", entry.shape),
                    })?;
                    entry.adapters.push(Arc::new(delta));
                    file.matched.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).insert(at);
                }
            }
        }
        Ok(self)
    }
}

/// The name by which modules are compared.
fn flat(part: Part, module: &str) -> String {
    let name = module.replace('.', "_");
    match part {
        Part::TextEncoder | Part::TextEncoder2 => name.strip_prefix("text_model_").map_or(name.clone(), String::from),
        Part::TextEncoder3 | Part::Unet | Part::Transformer | Part::Vae => name,
    }
}

impl AdapterFile {
    fn open(path: &Path, weight: f32) -> Result<AdapterFile> {
        let file = Arc::new(MappedFile::open(path.to_path_buf())?);
        let mut modules: BTreeMap<(Part, String), Module> = BTreeMap::new();
        let mut unknown = Vec::new();
        for (key, entry) in file.entries()? {
            let Some((part, path, name, slot)) = parse(&key).filter(|_| entry.is_float()) else {
                unknown.push(key);
                continue;
            };
            let module = modules.entry((part, name)).or_default();
            module.keys.push(key);
            module.path = path;
            module.slots.insert(slot, entry);
        }
        if modules.is_empty() {
            return Err(Error::file(path, "is no LoRA: no key ends as one of kohya's, of diffusers' or of PEFT's"));
        }
        let mut opened = AdapterFile { file, weight, modules, unknown, matched: Mutex::default() };
        peft::configure(&mut opened)?;
        Ok(opened)
    }
}

/// Part, name of the module in its network, the same flattened, and slot of a key.
fn parse(key: &str) -> Option<(Part, String, String, &'static str)> {
    let (module, slot, end) =
        ENDS.iter().chain([&CORE_END]).find_map(|(end, slot)| Some((key.strip_suffix(end)?, *slot, *end)))?;
    let module = module.strip_prefix("base_model.model.").unwrap_or(module);
    let (part, module) =
        BEGINNINGS.iter().find_map(|(beginning, part)| Some((*part, module.strip_prefix(beginning)?)))?;
    let module = module.strip_prefix("base_model.model.").unwrap_or(module);
    let part = if part == Part::Unet && module.starts_with("text_model.") { Part::TextEncoder } else { part };
    let path = module.to_string();
    let mut name = flat(part, &module.replace(".processor.", "."));
    if end.starts_with('_') && name.ends_with("to_out") {
        name.push_str("_0");
    }
    Some((part, path, name, slot))
}

impl Module {
    fn delta(&self, weight: f32) -> std::result::Result<Delta, String> {
        let slot = |name: &'static str| self.slots.get(name).cloned();
        let need = |name: &'static str| slot(name).ok_or_else(|| format!("its {name} is missing"));
        let factor = |whole: &'static str, a: &'static str, b: &'static str, core: &'static str| match slot(whole) {
            Some(entry) => Ok(Factor::Whole(entry)),
            None => Ok::<_, String>(Factor::Product { a: need(a)?, b: need(b)?, core: slot(core).map(Box::new) }),
        };
        let has = |name: &str| self.slots.contains_key(name);
        let (kind, rank) = if has("down") || has("up") {
            let (up, down) = (need("up")?, need("down")?);
            let rank = down.shape.first().copied();
            (Kind::Lora { up, down, mid: slot("mid") }, rank)
        } else if has("hada_w1_a") {
            let b = need("hada_w1_b")?;
            let factors =
                [factor("", "hada_w1_a", "hada_w1_b", "hada_t1")?, factor("", "hada_w2_a", "hada_w2_b", "hada_t2")?];
            (Kind::Hadamard(factors), b.shape.first().copied())
        } else if has("lokr_w1") || has("lokr_w1_a") {
            let factors = [
                factor("lokr_w1", "lokr_w1_a", "lokr_w1_b", "")?,
                factor("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")?,
            ];
            // Two whole factors have no rank and no scale.
            let rank = slot("lokr_w2_b").or_else(|| slot("lokr_w1_b")).and_then(|b| b.shape.first().copied());
            (Kind::Kronecker(factors), rank)
        } else if let Some(diff) = slot("diff") {
            (Kind::Full(diff), None)
        } else {
            let mut alone: Vec<&str> = self.slots.keys().copied().collect();
            alone.sort_unstable();
            return Err(format!("there is its {} alone, and no up and down or their like", alone.join(" and ")));
        };
        let scale = match (slot("alpha").and_then(|entry| read_f32(&entry).first().copied()), &kind, self.scaling) {
            (None, Kind::Lora { .. } | Kind::Hadamard(_) | Kind::Kronecker(_), Some(scaling)) => scaling.scale(rank),
            (Some(alpha), ..) => rank.map_or(1.0, |rank| alpha / rank.max(1) as f32),
            _ => 1.0,
        };
        let magnitude = slot("magnitude").map(|magnitude| Dora { magnitude, per_output: true });
        let dora = slot("dora_scale").map(|magnitude| {
            let per_output = magnitude.shape.len() < 2 || magnitude.shape[0] != 1;
            Dora { magnitude, per_output }
        });
        Ok(Delta { weight, scale, kind, dora: magnitude.or(dora) })
    }
}

fn numel(entry: &Entry) -> usize {
    entry.shape.iter().product()
}

/// First dimension, and the product of the others.
fn matrix(entry: &Entry) -> (usize, usize) {
    let rows = entry.shape.first().copied().unwrap_or(1);
    (rows, numel(entry) / rows.max(1))
}

impl Factor {
    /// Rows, columns (without the kernel) and kernel size; `Err`: the tensors do not multiply.
    fn shape(&self) -> std::result::Result<[usize; 3], String> {
        match self {
            Factor::Whole(entry) => {
                let kernel = entry.shape.iter().skip(2).product::<usize>();
                let (rows, columns) = matrix(entry);
                Ok([rows, columns / kernel.max(1), kernel])
            }
            Factor::Product { a, b, core: None } => {
                let ((rows, inner), (rank, columns)) = (matrix(a), matrix(b));
                if inner == rank { Ok([rows, columns, 1]) } else { Err(mismatch(&[a, b])) }
            }
            Factor::Product { a, b, core: Some(core) } => {
                let ((ra, rows), (rb, columns)) = (matrix(a), matrix(b));
                let kernel = core.shape.iter().skip(2).product();
                if core.shape.len() > 2 && core.shape[..2] == [ra, rb] {
                    Ok([rows, columns, kernel])
                } else {
                    Err(mismatch(&[&**core, a, b]))
                }
            }
        }
    }

    fn values(&self) -> Vec<f32> {
        match self {
            Factor::Whole(entry) => read_f32(entry),
            Factor::Product { a, b, core: None } => product(&read_f32(a), &read_f32(b), matrix(a).0, matrix(a).1),
            Factor::Product { a, b, core: Some(core) } => {
                let (rank, rows) = matrix(a);
                let values = read_f32(a);
                let turned: Vec<f32> = (0..rows * rank).map(|i| values[i % rank * rows + i / rank]).collect();
                product(&turned, &through_core(core, b), rows, rank)
            }
        }
    }
}

fn mismatch(entries: &[&Entry]) -> String {
    let shapes: Vec<String> = entries.iter().map(|entry| format!("{:?}", entry.shape)).collect();
    format!("its factors of shapes {} do not multiply", shapes.join(" and "))
}

/// `[m, k]` times `[k, n]`.
fn product(a: &[f32], b: &[f32], m: usize, k: usize) -> Vec<f32> {
    let n = b.len() / k.max(1);
    let mut result = vec![0.0; m * n];
    result.par_chunks_mut(n.max(1)).zip(a.par_chunks(k.max(1))).for_each(|(row, a)| {
        for (&a, b) in a.iter().zip(b.chunks(n.max(1))) {
            row.iter_mut().zip(b).for_each(|(to, b)| *to += a * b);
        }
    });
    result
}

/// `core [p, q, kernel]` and `b [q, n]` to `[p, n, kernel]`.
fn through_core(core: &Entry, b: &Entry) -> Vec<f32> {
    let (p, q) = (core.shape[0], core.shape[1]);
    let kernel: usize = core.shape[2..].iter().product();
    let n = numel(b) / q.max(1);
    let (core, b) = (read_f32(core), read_f32(b));
    let mut result = vec![0.0; p * n * kernel];
    for i in 0..p {
        for j in 0..q {
            for c in 0..n {
                for k in 0..kernel {
                    result[(i * n + c) * kernel + k] += core[(i * q + j) * kernel + k] * b[j * n + c];
                }
            }
        }
    }
    result
}

impl Delta {
    /// Itself, if it can change a tensor of this shape.
    fn fitting(self, shape: &[usize]) -> std::result::Result<Delta, String> {
        let rows = shape.first().copied().unwrap_or(1);
        let columns: usize = shape.iter().skip(1).product();
        let found = match &self.kind {
            Kind::Lora { up, down, mid: None } => {
                let ((rows, inner), (rank, columns)) = (matrix(up), matrix(down));
                if inner != rank {
                    return Err(mismatch(&[up, down]));
                }
                (rows, columns)
            }
            Kind::Lora { up, down, mid: Some(mid) } => {
                let ((rows, ru), (rd, columns)) = (matrix(up), matrix(down));
                if mid.shape.len() < 3 || mid.shape[..2] != [ru, rd] {
                    return Err(mismatch(&[up, mid, down]));
                }
                (rows, columns * mid.shape[2..].iter().product::<usize>())
            }
            Kind::Hadamard(factors) => {
                let [a, b] = [factors[0].shape()?, factors[1].shape()?];
                if a != b {
                    return Err(format!("its halves have shapes {a:?} and {b:?}"));
                }
                (a[0], a[1] * a[2])
            }
            Kind::Kronecker(factors) => {
                let [a, b] = [factors[0].shape()?, factors[1].shape()?];
                if a[2] != 1 {
                    return Err("its first factor has a kernel".into());
                }
                let (columns, _) = (a[1] * b[1] * b[2], ());
                (a[0] * b[0], columns)
            }
            Kind::Full(diff) => matrix(diff),
        };
        if found != (rows, columns) {
            return Err(format!("its change has shape {:?}, wanted {:?}", [found.0, found.1], [rows, columns]));
        }
        if let Some(dora) = &self.dora {
            let wanted = if dora.per_output { rows } else { shape.get(1).copied().unwrap_or(1) };
            if numel(&dora.magnitude) != wanted {
                return Err(format!("its DoRA norms have shape {:?}, wanted {wanted}", dora.magnitude.shape));
            }
        }
        Ok(self)
    }

    fn dense(&self) -> Vec<f32> {
        match &self.kind {
            Kind::Lora { up, down, mid: None } => product(&read_f32(up), &read_f32(down), matrix(up).0, matrix(up).1),
            Kind::Lora { up, down, mid: Some(mid) } => {
                product(&read_f32(up), &through_core(mid, down), matrix(up).0, matrix(up).1)
            }
            Kind::Hadamard([a, b]) => a.values().iter().zip(b.values()).map(|(a, b)| a * b).collect(),
            Kind::Kronecker([a, b]) => {
                let (Ok([m1, n1, _]), Ok([m2, n2, kernel])) = (a.shape(), b.shape()) else { return Vec::new() };
                let (a, b) = (a.values(), b.values());
                let mut result = vec![0.0; m1 * m2 * n1 * n2 * kernel];
                let row = n1 * n2 * kernel;
                result.par_chunks_mut(row.max(1)).enumerate().for_each(|(r, to)| {
                    for (c, to) in to.chunks_mut((n2 * kernel).max(1)).enumerate() {
                        let (left, right) = (a[r / m2 * n1 + c], &b[r % m2 * n2 * kernel..][..n2 * kernel]);
                        to.iter_mut().zip(right).for_each(|(to, right)| *to = left * right);
                    }
                });
                result
            }
            Kind::Full(diff) => read_f32(diff),
        }
    }

    /// Changes the values of a tensor of this shape.
    pub(super) fn apply(&self, values: &mut [f32], shape: &[usize]) {
        let delta = self.dense();
        let Some(dora) = &self.dora else {
            let scale = self.weight * self.scale;
            values.iter_mut().zip(&delta).for_each(|(value, delta)| *value += scale * delta);
            return;
        };
        let rows = shape.first().copied().unwrap_or(1).max(1);
        let columns = shape.get(1).copied().unwrap_or(1).max(1);
        let row = values.len() / rows;
        let kernel = (row / columns).max(1);
        let group = |i: usize| if dora.per_output { i / row } else { i % row / kernel };
        let moved: Vec<f32> = values.iter().zip(&delta).map(|(value, delta)| value + self.scale * delta).collect();
        let magnitude = read_f32(&dora.magnitude);
        let mut squares = vec![0f64; magnitude.len()];
        moved.iter().enumerate().for_each(|(i, &v)| squares[group(i)] += f64::from(v) * f64::from(v));
        for (i, (value, moved)) in values.iter_mut().zip(moved).enumerate() {
            let norm = squares[group(i)].sqrt() as f32 + f32::EPSILON;
            *value += self.weight * (moved * magnitude[group(i)] / norm - *value);
        }
    }
}
