mod t5;

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use super::families::{Defaults, FamilySpec, OF_PIXELS, Part, SCHEDULERS, load_part};
use super::ip_adapter::{IpAdapterFile, IpFiles};
use super::{WeightReport, embedded};
use crate::error::{Error, Result};
use crate::models::single_file::{check_extension, open_vae};
use crate::models::{
    self, Adapters, ClipTextConfig, ClipTextModel, Foreign, Mmdit, MmditConfig, PublishedModel, SingleFile, Unet,
    UnetConfig, Unused, Vae, VaeConfig, WeightFile, WeightStore,
};
use crate::runtime::{DType, Device};
use crate::schedulers::SchedulerConfig;
use crate::text::{ClipTokenizer, ClipVocabulary, TextualInversion, TokenizerFiles};

/// Where a model comes from.
#[derive(Clone, Debug, PartialEq)]
pub enum ModelSource {
    /// A directory in the layout of diffusers: tokenizer/, text_encoder/, unet/, vae/, scheduler/.
    Directory(PathBuf),
    /// A whole checkpoint in one file, safetensors or PyTorch's `.ckpt`.
    File(PathBuf),
    /// The small model that ships inside the program.
    Embedded,
    /// No files of weights: random ones of a configuration's shapes. For times and memory, which do not depend on values; a
    /// picture from them is noise.
    Random(RandomShapes),
    /// Another one with adapters, which are applied in this order, files of textual inversion, whose words its prompts then
    /// know, and the weights of another VAE.
    Modified { model: Box<ModelSource>, loras: Vec<Lora>, embeddings: Vec<PathBuf>, vae: Option<PathBuf> },
    /// Another one, `Modified` or not, with a ResAdapter.
    Resized { model: Box<ModelSource>, resadapter: ResAdapter },
    /// Another one, of any of these, with IP-Adapters and the folder of their image encoder; `None`: `image_encoder` beside the
    /// first of them.
    Prompted { model: Box<ModelSource>, adapters: Vec<IpAdapterFile>, encoder: Option<PathBuf> },
}

/// Whose shapes random weights have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RandomShapes {
    /// Of a published model, by its name.
    Published(PublishedModel),
    /// A directory in the layout of diffusers; of its parts only the configurations are read.
    Directory(PathBuf),
}

impl ModelSource {
    /// What is at `path`: a single file where that is a file or is named as one, else a directory.
    pub fn at(path: &Path) -> ModelSource {
        const FILES: [&str; 8] = ["safetensors", "sft", "ckpt", "pt", "pth", "bin", "pkl", "gguf"];
        let end = path.extension().map(|end| end.to_string_lossy().to_lowercase());
        let named = end.is_some_and(|end| FILES.contains(&end.as_str()));
        match path.is_file() || (named && !path.is_dir()) {
            true => ModelSource::File(path.to_path_buf()),
            false => ModelSource::Directory(path.to_path_buf()),
        }
    }

    /// This model with adapters, files of textual inversion and the weights of another VAE; itself without any.
    pub fn with(self, loras: Vec<Lora>, embeddings: Vec<PathBuf>, vae: Option<PathBuf>) -> ModelSource {
        match loras.is_empty() && embeddings.is_empty() && vae.is_none() {
            true => self,
            false => ModelSource::Modified { model: Box::new(self), loras, embeddings, vae },
        }
    }

    /// This model with a ResAdapter; itself without one.
    pub fn with_resadapter(self, resadapter: Option<ResAdapter>) -> ModelSource {
        match resadapter {
            Some(resadapter) => ModelSource::Resized { model: Box::new(self), resadapter },
            None => self,
        }
    }
}

impl ModelSource {
    /// This model with IP-Adapters; itself without any.
    pub fn with_ip_adapters(self, adapters: Vec<IpAdapterFile>, encoder: Option<PathBuf>) -> ModelSource {
        match adapters.is_empty() {
            true => self,
            false => ModelSource::Prompted { model: Box::new(self), adapters, encoder },
        }
    }
}

/// A ResAdapter's folder ([`Adapters::with_resadapter`]) and how strongly its LoRA is applied; its norms stand in place of the
/// model's whatever the weight.
#[derive(Clone, Debug, PartialEq)]
pub struct ResAdapter {
    pub path: PathBuf,
    pub weight: f32,
}

impl ResAdapter {
    /// The folder's name.
    pub fn name(&self) -> String {
        self.path.file_name().unwrap_or(self.path.as_os_str()).to_string_lossy().into_owned()
    }
}

impl std::fmt::Display for ResAdapter {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{}:{}", self.path.display(), self.weight)
    }
}

impl std::str::FromStr for ResAdapter {
    type Err = Error;

    /// `DIR` or `DIR:WEIGHT`.
    fn from_str(text: &str) -> Result<ResAdapter> {
        weighted(text, ["DIR", "WEIGHT"])
            .map(|(path, weight)| ResAdapter { path, weight })
            .map_err(|reason| Error::Request { field: "resadapter", value: text.into(), reason })
    }
}

/// `PATH` or `PATH:WEIGHT`, which errors call by these names.
pub(super) fn weighted(text: &str, [what, number]: [&str; 2]) -> std::result::Result<(PathBuf, f32), String> {
    let (path, weight) = match text.rsplit_once(':') {
        None => (text, 1.0),
        Some((path, weight)) => match weight.parse::<f32>() {
            Ok(number) if number.is_finite() => (path, number),
            _ => {
                let of = number.to_lowercase();
                return Err(format!("the {of} {weight:?} is no number; expected {what} or {what}:{number} (0.8)"));
            }
        },
    };
    match path.is_empty() {
        true => {
            let kind = if what == "DIR" { "folder" } else { "file" };
            Err(format!("names no {kind}; expected {what} or {what}:{number}"))
        }
        false => Ok((path.into(), weight)),
    }
}

/// A LoRA or one of its relatives ([`Adapters`]) and how strongly it is applied.
#[derive(Clone, Debug, PartialEq)]
pub struct Lora {
    pub path: PathBuf,
    /// 1 is full strength, 0 none; a negative one takes away.
    pub weight: f32,
}

impl Lora {
    /// The file's name without its ending.
    pub fn name(&self) -> String {
        stem(&self.path)
    }
}

/// A file's name without its ending.
pub(super) fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

impl std::fmt::Display for Lora {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{}:{}", self.path.display(), self.weight)
    }
}

impl std::str::FromStr for Lora {
    type Err = Error;

    /// `FILE` or `FILE:WEIGHT`.
    fn from_str(text: &str) -> Result<Lora> {
        weighted(text, ["FILE", "WEIGHT"])
            .map(|(path, weight)| Lora { path, weight })
            .map_err(|reason| Error::Request { field: "lora", value: text.into(), reason })
    }
}

/// The files of a model, read part by part: configurations and weights when asked for.
pub struct ModelFiles {
    pub(super) place: Place,
    pub(super) family: &'static FamilySpec,
    loras: Vec<Lora>,
    resadapter: Option<ResAdapter>,
    ip_files: Option<IpFiles>,
    pub(super) adapters: Adapters,
    embeddings: Vec<TextualInversion>,
    /// Whose weights stand for those of the model's own VAE.
    vae: Option<PathBuf>,
    /// No file holds the weights.
    random: bool,
}

pub(super) enum Place {
    Directory(PathBuf),
    /// Configurations alone.
    Published(PublishedModel),
    File(SingleFile),
    /// Path inside the model's directory, contents.
    Embedded(embedded::Files),
}

impl Place {
    /// Is there a part in this folder (`text_encoder_2`)? Where there are no files of tokenizers, they are those of their text
    /// encoders.
    fn has(&self, folder: &str) -> bool {
        let holder = folder.replace("tokenizer", "text_encoder");
        match self {
            Place::Directory(path) => path.join(folder).is_dir(),
            Place::File(file) => file.part_list().iter().any(|part| part.folder() == holder),
            Place::Embedded(files) => files.get(&format!("{folder}/config.json")).is_some(),
            Place::Published(model) => model.config(&format!("{holder}/config.json")).is_some(),
        }
    }
}

/// Where the model is in a folder `models--ORG--NAME` of the Hugging Face hub's cache, which keeps every version in
/// `snapshots/REVISION` and the revision of each branch in `refs/BRANCH`: that of `main`, or the only one. Any other
/// directory as it is.
///
/// # Errors
/// [`Error::File`]: no snapshot, or several and no `main` among them.
fn hub_snapshot(path: &Path) -> Result<PathBuf> {
    let snapshots = path.join("snapshots");
    if !snapshots.is_dir() || path.join("unet").is_dir() {
        return Ok(path.to_path_buf());
    }
    let main = std::fs::read_to_string(path.join("refs/main")).ok().map(|revision| snapshots.join(revision.trim()));
    if let Some(main) = main.filter(|main| main.is_dir()) {
        return Ok(main);
    }
    let entries = std::fs::read_dir(&snapshots).map_err(|error| Error::io(&snapshots, error))?;
    let mut found: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
    found.sort();
    match found.as_slice() {
        [only] => Ok(only.clone()),
        [] => Err(Error::file(&snapshots, "holds no snapshot; the download did not end, start it again")),
        several => {
            let reason = format!("holds {} snapshots, and refs/main names none of them; name one", several.len());
            Err(Error::file(&snapshots, reason))
        }
    }
}

/// `ORG/NAME` of `.../models--ORG--NAME/snapshots/REVISION`, where a cache of the Hugging Face hub keeps a model.
pub fn hub_name(path: &Path) -> Option<String> {
    let snapshots = path.parent().filter(|folder| folder.ends_with("snapshots"))?;
    let name = snapshots.parent()?.file_name()?.to_string_lossy().into_owned();
    Some(name.strip_prefix("models--")?.replace("--", "/"))
}

/// Refuses a directory that is something else than a model of these families, before its parts give riddles.
///
/// # Errors
/// [`Error::Config`]: what it is.
fn refuse_foreign(path: &Path) -> Result<()> {
    // A file that is no JSON is named when it is read.
    let json = |name: &str| -> serde_json::Value {
        let text = std::fs::read_to_string(path.join(name)).unwrap_or_default();
        crate::json::parse(&text).unwrap_or_default()
    };
    let refuse = |name: &str, foreign: Foreign, why: String| {
        Err(Error::config(path.join(name).display().to_string(), format!("{foreign}{why}")))
    };
    let class = |config: &serde_json::Value| config["_class_name"].as_str().unwrap_or_default().to_string();
    let by_class = |name: &str| -> Result<()> {
        let config = json(name);
        let architecture = config["architectures"][0].as_str().unwrap_or_default();
        let class = [class(&config), architecture.to_string()].into_iter().find(|class| !class.is_empty());
        let Some(class) = class else { return Ok(()) };
        match Foreign::of_class(&class) {
            Some(foreign) => refuse(name, foreign, format!(" (it is of the class {class})")),
            None => Ok(()),
        }
    };
    let index = json(INDEX);
    let there = |part: &str| index[part][1].is_string();
    let unet = json("unet/config.json");
    // The refiner reads bigG alone, and its UNet is wider than the base model's.
    if (there("text_encoder_2") && !there("text_encoder")) || unet["block_out_channels"][0] == 384 {
        return refuse(if index.is_null() { "unet/config.json" } else { INDEX }, Foreign::Refiner, String::new());
    }
    by_class(INDEX)?;
    if !path.join("unet").is_dir() {
        for part in ["transformer", "prior", "decoder"] {
            let name = format!("{part}/config.json");
            match Foreign::of_class(&class(&json(&name))) {
                // A part of a whole model has its place here.
                Some(Foreign::Part(_)) => {}
                _ => by_class(&name)?,
            }
        }
        by_class("config.json")?;
        let loras = ["pytorch_lora_weights", "adapter_model"]
            .into_iter()
            .flat_map(|stem| WeightFile::ALL.map(|file| format!("{stem}.{}", file.ending())));
        if let Some(lora) = loras.into_iter().find(|name| path.join(name).is_file()) {
            return refuse(&lora, Foreign::Beside("a LoRA"), String::new());
        }
        return Ok(());
    }
    let channels = |config: &serde_json::Value, key: &str| config[key].as_u64().and_then(|v| usize::try_from(v).ok());
    let latents = channels(&json("vae/config.json"), "latent_channels").unwrap_or(4);
    match channels(&unet, "in_channels") {
        Some(found) if latents == 4 && path.join("vae").is_dir() => match Foreign::of_channels(found) {
            Some(foreign) => refuse(
                "unet/config.json",
                foreign,
                format!(" (in_channels is {found}; the VAE's latent_channels are {latents})"),
            ),
            None => Ok(()),
        },
        _ => Ok(()),
    }
}

/// What a saved pipeline is made of.
pub(super) const INDEX: &str = "model_index.json";
const UNET: &str = "unet/config.json";
/// What a directory must have, for messages.
const LAYOUT: &str = "a model is a directory with tokenizer/, text_encoder/, unet/ (or transformer/), vae/ and scheduler/, as diffusers saves it";
/// For messages about a path that is not there.
const NO_NAME: &str = "and no name of a model on the Hugging Face hub (ORG/NAME)";
/// What decides a picture beside the weights, in each part's folder; not every model has all of them.
pub(super) const CONFIGURATIONS: [&str; 9] = [
    "added_tokens.json",
    "config.json",
    "merges.txt",
    "scheduler_config.json",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
];
/// What stands for the directory of the embedded model.
const EMBEDDED_NAME: &str = "pocket";

impl ModelFiles {
    /// Reads nothing but `model_index.json` (if there) and the headers of single files, and checks that the parts'
    /// directories exist.
    ///
    /// # Errors
    /// [`Error::File`]: what is missing and what the directory should look like; as [`SingleFile::open`],
    /// [`check_extension`], [`Adapters::open`] and [`open_vae`]; [`Error::Config`]: a model of another family.
    pub fn open(source: &ModelSource) -> Result<ModelFiles> {
        let place = match source {
            ModelSource::Modified { model, loras, embeddings, vae } => {
                let mut files = ModelFiles::open(model)?;
                files.loras.extend(loras.iter().cloned());
                let opened = files.loras.iter().map(|lora| Ok((check_extension(&lora.path)?, lora.weight)));
                files.adapters = Adapters::open(&opened.collect::<Result<Vec<_>>>()?)?;
                for path in embeddings {
                    files.embeddings.push(TextualInversion::read(path)?);
                }
                if let Some(path) = vae {
                    open_vae(&check_extension(path)?, &Device::cpu(), DType::F32)?;
                    files.vae = Some(path.clone());
                }
                return Ok(files);
            }
            ModelSource::Resized { model, resadapter } => {
                let mut files = ModelFiles::open(model)?;
                files.adapters = files.adapters.with_resadapter(&resadapter.path, resadapter.weight)?;
                files.resadapter = Some(resadapter.clone());
                return Ok(files);
            }
            ModelSource::Prompted { model, adapters, encoder } => {
                let mut files = ModelFiles::open(model)?;
                files.ip_files = Some(IpFiles::open(adapters, encoder.as_deref())?);
                return Ok(files);
            }
            ModelSource::Embedded => Place::Embedded(embedded::files()?),
            ModelSource::File(path) => Place::File(SingleFile::open(&check_extension(path)?)?),
            ModelSource::Random(RandomShapes::Published(model)) => Place::Published(*model),
            ModelSource::Directory(path) | ModelSource::Random(RandomShapes::Directory(path)) => {
                if path.is_file() {
                    return Err(Error::file(path, format!("is one file, not a directory; {LAYOUT}")));
                }
                if !path.is_dir() {
                    return Err(Error::file(path, format!("no such directory, {NO_NAME}; {LAYOUT}")));
                }
                let path = hub_snapshot(path)?;
                refuse_foreign(&path)?;
                Place::Directory(path)
            }
        };
        let family = FamilySpec::of(|folder| place.has(folder));
        let adapters = Adapters::open(&[])?;
        let random = matches!(source, ModelSource::Random(_));
        let (loras, embeddings) = (Vec::new(), Vec::new());
        let (resadapter, ip_files, vae) = (None, None, None);
        let mut files = ModelFiles { place, family, loras, resadapter, ip_files, adapters, embeddings, vae, random };
        let pixels = files.read(UNET)?.is_some_and(|config| UnetConfig::names_blocks_of_pixels(&config));
        if pixels {
            files.family = OF_PIXELS;
        }
        files.check_index()?;
        if let Place::Directory(path) = &files.place {
            let needed = files.family.parts.iter().filter(|part| part.weights.is_some() && !part.is_optional);
            for part in needed.map(|part| part.folder).chain(["scheduler"]) {
                let folder = path.join(part);
                if !folder.is_dir() {
                    return Err(Error::file(&folder, format!("no such directory; {LAYOUT}")));
                }
            }
        }
        Ok(files)
    }

    /// What the model is called: its directory's name, or ORG/NAME where that is in a cache of the Hugging Face hub; a
    /// single file's name without its ending.
    pub fn name(&self) -> String {
        match &self.place {
            Place::Embedded(_) => EMBEDDED_NAME.into(),
            Place::Published(_) => self.family.name.into(),
            Place::File(file) => stem(file.path()),
            Place::Directory(path) => {
                let path = path.canonicalize().unwrap_or_else(|_| path.clone());
                if let Some(name) = hub_name(&path) {
                    return name;
                }
                path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
            }
        }
    }

    /// Tells this model from others, also from those of its name: the first 16 hexadecimal digits of BLAKE3 over the
    /// configurations, the tokenizer and the weights. Adapters are not in it: [`lora_digests`](ModelFiles::lora_digests).
    ///
    /// # Errors
    /// As [`WeightStore::open`]; [`Error::Io`].
    pub fn digest(&self) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        let mut add = |bytes: &[u8]| {
            hasher.update_rayon(bytes).update(&(bytes.len() as u64).to_le_bytes());
        };
        let folders = || self.family.parts.iter().map(|part| part.folder).chain(SCHEDULERS);
        for (folder, file) in folders().flat_map(|folder| CONFIGURATIONS.map(|file| (folder, file))) {
            if let Some(bytes) = self.read(&format!("{folder}/{file}"))? {
                add(format!("{folder}/{file}").as_bytes());
                add(&bytes);
            }
        }
        if let Place::File(file) = &self.place {
            file.file_bytes().for_each(&mut add);
        }
        let in_file = |folder: &str| matches!(self.place, Place::File(_)) && !(folder == "vae" && self.vae.is_some());
        let here = |part: &&Part| part.weights.is_some() && (!part.is_optional || self.has(part.folder));
        for part in self.family.parts.iter().filter(here).filter(|part| !in_file(part.folder)) {
            self.weights(part.folder, &Device::cpu(), DType::F32)?.file_bytes().for_each(&mut add);
        }
        Ok(hasher.finalize().to_hex()[..16].to_string())
    }

    /// The adapters, in the order in which they are applied.
    pub fn loras(&self) -> &[Lora] {
        &self.loras
    }

    /// IP-Adapters and their encoder.
    pub(super) fn ip_files(&self) -> Option<&IpFiles> {
        self.ip_files.as_ref()
    }

    /// A digest of each IP-Adapter's file, and one of their image encoder; `None`: there are no adapters.
    ///
    /// # Errors
    /// Those of the files.
    pub fn ip_digests(&self) -> Result<Option<(Vec<String>, String)>> {
        self.ip_files.as_ref().map(IpFiles::digests).transpose()
    }

    pub fn resadapter(&self) -> Option<&ResAdapter> {
        self.resadapter.as_ref()
    }

    /// The first 16 hexadecimal digits of BLAKE3 over a ResAdapter's files.
    pub fn resadapter_digest(&self) -> Option<String> {
        let mut hasher = blake3::Hasher::new();
        for bytes in self.adapters.resadapter_bytes()? {
            hasher.update_rayon(bytes).update(&(bytes.len() as u64).to_le_bytes());
        }
        Some(hasher.finalize().to_hex()[..16].to_string())
    }

    /// The files of textual inversion.
    pub fn embeddings(&self) -> &[TextualInversion] {
        &self.embeddings
    }

    /// The file whose weights stand for those of the model's own VAE.
    pub fn vae_file(&self) -> Option<&Path> {
        self.vae.as_deref()
    }

    /// The first 16 hexadecimal digits of BLAKE3 over each adapter's file.
    pub fn lora_digests(&self) -> Vec<String> {
        let digest = |bytes: &[u8]| {
            let mut hasher = blake3::Hasher::new();
            hasher.update_rayon(bytes).finalize().to_hex()[..16].to_string()
        };
        self.adapters.file_bytes().map(|(bytes, _)| digest(bytes)).collect()
    }

    /// To be called with the reports of every part that the run uses: tensors of the files and of adapters that belong to no
    /// part, a sentence per file.
    ///
    /// # Errors
    /// As [`Adapters::finish`].
    pub fn warnings(&self, reports: &[WeightReport]) -> Result<Vec<String>> {
        let mut unused: Vec<Unused> = reports.iter().flat_map(|report| report.unused.iter().cloned()).collect();
        if let Place::File(file) = &self.place
            && !file.unused().is_empty()
        {
            let keys = file.unused().iter().cloned();
            match unused.iter_mut().find(|of_file| of_file.file == file.path()) {
                Some(of_file) => of_file.keys.extend(keys),
                None => unused.push(Unused { file: file.path().to_path_buf(), keys: keys.collect() }),
            }
        }
        let loaded = |part: &models::Part| reports.iter().any(|report| report.module == part.folder());
        let others = models::Part::ALL.into_iter().filter(|part| self.has_part(part.folder()) && !loaded(part));
        unused.extend(self.adapters.finish(&others.collect::<Vec<_>>())?);
        Ok(unused.iter().map(Unused::to_string).collect())
    }

    /// The tokenizer in `folder` (`tokenizer`, `tokenizer_2`).
    ///
    /// # Errors
    /// As [`ClipTokenizer::load`].
    pub fn tokenizer(&self, folder: &str) -> Result<ClipTokenizer> {
        match &self.place {
            Place::Directory(path) => ClipTokenizer::load(&path.join(folder)),
            Place::File(_) | Place::Published(_) => {
                let file = |name: &str| Ok(self.read(&format!("{folder}/{name}"))?.map(Cow::into_owned));
                let vocab: Option<Vec<u8>> = file("vocab.json")?;
                let (merges, config) = (file("merges.txt")?, file("tokenizer_config.json")?);
                let special = file("special_tokens_map.json")?;
                let (vocab, merges) = match (vocab, merges) {
                    (Some(vocab), Some(merges)) => (vocab, merges),
                    _ => {
                        let published = ClipVocabulary::published();
                        (published.vocab, published.merges)
                    }
                };
                let files = TokenizerFiles {
                    vocab: Some(&vocab),
                    merges: Some(&merges),
                    config: config.as_deref(),
                    special_tokens_map: special.as_deref(),
                    ..TokenizerFiles::default()
                };
                ClipTokenizer::from_bytes(&self.path(folder), &files)
            }
            Place::Embedded(files) => {
                let file = |name: &str| files.get(&format!("{folder}/{name}"));
                let files = TokenizerFiles {
                    vocab: file("vocab.json"),
                    merges: file("merges.txt"),
                    tokenizer: file("tokenizer.json"),
                    config: file("tokenizer_config.json"),
                    special_tokens_map: file("special_tokens_map.json"),
                    added_tokens: file("added_tokens.json"),
                };
                ClipTokenizer::from_bytes(&self.path(folder), &files)
            }
        }
    }

    pub fn scheduler_config(&self) -> Result<SchedulerConfig> {
        let (what, json) = self.json("scheduler/scheduler_config.json")?;
        SchedulerConfig::from_json(&what, &json)
    }

    /// Of a scheduler beside the model's own, in this folder.
    ///
    /// # Errors
    /// [`Error::File`]; as [`SchedulerConfig::from_json`].
    pub(super) fn scheduler_config_in(&self, folder: &str) -> Result<SchedulerConfig> {
        let (what, json) = self.json(&format!("{folder}/scheduler_config.json"))?;
        SchedulerConfig::from_json(&what, &json)
    }

    /// Are its samples pixels, and is T5 its only text encoder (DeepFloyd IF)?
    pub fn is_of_pixels(&self) -> bool {
        std::ptr::eq(self.family, OF_PIXELS)
    }

    /// Of the CLIP text encoder in `folder` (`text_encoder`, `text_encoder_2`).
    ///
    /// # Errors
    /// [`Error::File`]; as [`ClipTextConfig::from_json`].
    pub fn clip_config(&self, folder: &str) -> Result<ClipTextConfig> {
        let (what, json) = self.json(&format!("{folder}/config.json"))?;
        ClipTextConfig::from_json(&what, &json)
    }

    pub fn unet_config(&self) -> Result<UnetConfig> {
        let (what, json) = self.json(UNET)?;
        UnetConfig::from_json(&what, &json)
    }

    pub fn vae_config(&self) -> Result<VaeConfig> {
        let (what, json) = self.json("vae/config.json")?;
        VaeConfig::from_json(&what, &json)
    }

    /// The text encoder in `folder`, and its weights' report; on the meta device from its configuration alone.
    ///
    /// # Errors
    /// Those of the files; as [`ClipTextModel::load`].
    pub fn clip(&self, folder: &'static str, device: &Device, dtype: DType) -> Result<(ClipTextModel, WeightReport)> {
        self.clip_of(folder, self.weights(folder, device, dtype)?)
    }

    /// The same of these weights.
    pub(super) fn clip_of(&self, folder: &'static str, store: WeightStore) -> Result<(ClipTextModel, WeightReport)> {
        let config = self.clip_config(folder)?;
        let store = ClipTextModel::prepared(store, &config)?;
        load_part(folder, store, |w| ClipTextModel::from_weights(w, &config))
    }

    /// The UNet, and its weights' report; on the meta device from its configuration alone.
    ///
    /// # Errors
    /// Those of the files; as [`Unet::from_weights`].
    pub fn unet(&self, device: &Device, dtype: DType) -> Result<(Unet, WeightReport)> {
        self.unet_of(self.weights("unet", device, dtype)?)
    }

    /// The same of these weights.
    pub(super) fn unet_of(&self, store: WeightStore) -> Result<(Unet, WeightReport)> {
        let config = self.unet_config()?;
        load_part("unet", store, |w| Unet::from_weights(w, &config))
    }

    pub fn transformer_config(&self) -> Result<MmditConfig> {
        let (what, json) = self.json("transformer/config.json")?;
        MmditConfig::from_json(&what, &json)
    }

    /// The transformer, and its weights' report; on the meta device from its configuration alone.
    ///
    /// # Errors
    /// Those of the files; as [`Mmdit::from_weights`].
    pub fn transformer(&self, device: &Device, dtype: DType) -> Result<(Mmdit, WeightReport)> {
        self.transformer_of(self.weights("transformer", device, dtype)?)
    }

    /// The same of these weights.
    pub(super) fn transformer_of(&self, store: WeightStore) -> Result<(Mmdit, WeightReport)> {
        let config = self.transformer_config()?;
        load_part("transformer", store, |w| Mmdit::from_weights(w, &config))
    }

    /// The VAE, and its weights' report; on the meta device from its configuration alone.
    ///
    /// # Errors
    /// Those of the files; as [`Vae::from_weights`].
    pub fn vae(&self, device: &Device, dtype: DType) -> Result<(Vae, WeightReport)> {
        self.vae_of(self.weights("vae", device, dtype)?)
    }

    /// The same of these weights.
    pub(super) fn vae_of(&self, store: WeightStore) -> Result<(Vae, WeightReport)> {
        let config = self.vae_config()?;
        load_part("vae", store, |w| Vae::from_weights(w, &config))
    }

    /// The weights of the part in `folder`, with the adapters' changes; on the meta device whatever is asked for.
    ///
    /// # Errors
    /// As [`WeightStore::open`], [`SingleFile::store`], [`open_vae`] and [`WeightStore::with_adapters`]; [`Error::File`]: the family has no such part with weights.
    pub(super) fn weights(&self, folder: &str, device: &Device, dtype: DType) -> Result<WeightStore> {
        match device {
            Device::Meta(_) => Ok(WeightStore::meta(device, dtype)),
            _ => self.stored(folder, device, dtype),
        }
    }

    /// Keys and shapes of the part in `folder`, without data: as its files have them, or on the meta device, where no file is
    /// read, whatever is asked for.
    ///
    /// # Errors
    /// As [`weights`](ModelFiles::weights).
    pub(super) fn outline(&self, folder: &str, device: &Device, dtype: DType) -> Result<WeightStore> {
        match device {
            Device::Meta(_) => Ok(WeightStore::meta(&Device::meta(), dtype)),
            _ => self.stored(folder, &Device::meta(), dtype),
        }
    }

    fn stored(&self, folder: &str, device: &Device, dtype: DType) -> Result<WeightStore> {
        let Some(stem) = self.family.part(folder).and_then(|part| part.weights) else {
            return Err(Error::file(&self.path(folder), format!("{} has no such part", self.family.name)));
        };
        let part = models::Part::ALL.into_iter().find(|part| part.folder() == folder);
        let store = match (&self.place, &self.vae, part) {
            (_, Some(vae), Some(models::Part::Vae)) => open_vae(vae, device, dtype)?,
            _ if self.random => match device {
                Device::Meta(_) => WeightStore::meta(device, dtype),
                _ => WeightStore::random(device, dtype),
            },
            (Place::Published(_), ..) => return Err(self.missing(folder)),
            (Place::Directory(path), ..) => WeightStore::open(&path.join(folder), stem, device, dtype)?,
            (Place::File(file), _, Some(part)) => file.store(part, device, dtype)?,
            (Place::File(file), _, None) => return Err(Error::file(file.path(), format!("holds no {folder}"))),
            (Place::Embedded(files), ..) => {
                let name = format!("{folder}/{stem}.safetensors");
                let bytes = files.get(&name).ok_or_else(|| self.missing(&name))?;
                WeightStore::from_bytes(&self.path(&name).display().to_string(), bytes, device, dtype)?
            }
        };
        match part {
            Some(part) if !self.adapters.is_empty() => store.with_adapters(part, &self.adapters),
            _ => Ok(store),
        }
    }

    /// What requests get that do not say it: the family's, or those of distilled models for one that is named turbo or whose
    /// scheduler is Euler-ancestral with trailing timesteps, or for one whose UNet reads its guidance scale.
    pub(super) fn defaults(&self) -> Defaults {
        if self.is_of_pixels() {
            let enlarges = self.unet_config().is_ok_and(|config| config.reads_noise_level);
            let defaults = if enlarges { Defaults::STAGE_II } else { self.family.defaults };
            // The published pipelines know no other than the model's own.
            return Defaults { sampler: self.scheduler_config().ok().map(|config| config.sampler()), ..defaults };
        }
        if self.unet_config().is_ok_and(|config| config.time_cond_proj_dim.is_some()) {
            return self.family.defaults.latent_consistency();
        }
        let turbo = self.name().to_ascii_lowercase().contains("turbo");
        match turbo || self.scheduler_config().is_ok_and(|config| config.is_for_few_steps()) {
            true => self.family.defaults.distilled(),
            false => self.family.defaults,
        }
    }

    /// A true or false of model_index.json.
    ///
    /// # Errors
    /// [`Error::File`], [`Error::Io`]: the file cannot be read; [`Error::Config`]: the value is neither.
    pub(super) fn index_flag(&self, key: &str, default: bool) -> Result<bool> {
        let path = self.path(INDEX);
        let Some(bytes) = self.read(INDEX)? else { return Ok(default) };
        let index: serde_json::Value =
            serde_json::from_slice(&bytes).map_err(|e| Error::file(&path, format!("not JSON: {e}")))?;
        match index.get(key) {
            None | Some(serde_json::Value::Null) => Ok(default),
            Some(serde_json::Value::Bool(value)) => Ok(*value),
            Some(other) => {
                Err(Error::config(path.display().to_string(), format!("{key} is {other}, expected true or false")))
            }
        }
    }

    /// Is it a published model's configurations alone, without a file?
    pub(super) fn is_published(&self) -> bool {
        matches!(self.place, Place::Published(_))
    }

    /// Has the model itself a part in this folder, which is one that models of its family may lack?
    pub fn has(&self, folder: &str) -> bool {
        self.place.has(folder)
    }

    /// Has the model's family a part in this folder (`text_encoder_2`)?
    pub fn has_part(&self, folder: &str) -> bool {
        self.family.part(folder).is_some()
    }

    pub(super) fn family(&self) -> &'static FamilySpec {
        self.family
    }

    /// Refuses models of other families before their parts give riddles.
    fn check_index(&self) -> Result<()> {
        let Some(bytes) = self.read(INDEX)? else { return Ok(()) };
        let path = self.path(INDEX);
        let index: serde_json::Value =
            serde_json::from_slice(&bytes).map_err(|e| Error::file(&path, format!("not JSON: {e}")))?;
        let class = index["_class_name"].as_str().unwrap_or("unknown");
        let has = |part: &str| index.get(part).is_some_and(|entry| !entry[1].is_null());
        if let Some(named) = FamilySpec::of_class(class).filter(|named| !std::ptr::eq(*named, self.family)) {
            let missing = named.parts.iter().find(|part| !part.is_optional && !self.place.has(part.folder));
            let missing = missing.map_or("part", |part| part.folder);
            let reason =
                format!("is of a {class}, and the model has no {missing}: download it, or another copy of the model");
            return Err(Error::config(path.display().to_string(), reason));
        }
        let refuse = |why: String| {
            let what = path.display().to_string();
            Err(Error::config(what, format!("a {class} {why}; expected a {} pipeline", FamilySpec::names())))
        };
        let extra = ["text_encoder_2", "text_encoder_3", "transformer", "controlnet", "image_encoder"];
        for part in extra.into_iter().filter(|part| self.family.part(part).is_none()) {
            // SD 1.x lists an image_encoder of null for IP-Adapter.
            if has(part) {
                return refuse(format!("with a part {part}"));
            }
        }
        for &Part { folder, class: wanted, .. } in self.family.parts.iter().filter(|part| part.weights.is_some()) {
            if let Some(found) = index[folder][1].as_str()
                && found != wanted
            {
                return refuse(format!("whose {folder} is a {found}, not a {wanted}"));
            }
        }
        Ok(())
    }

    /// The file's path (for errors) and text.
    fn json(&self, name: &str) -> Result<(String, String)> {
        let bytes = self.read(name)?.ok_or_else(|| self.missing(name))?;
        let path = self.path(name);
        let text = String::from_utf8(bytes.into_owned()).map_err(|_| Error::file(&path, "is not UTF-8 text"))?;
        Ok((path.display().to_string(), text))
    }

    fn read(&self, name: &str) -> Result<Option<Cow<'static, [u8]>>> {
        match &self.place {
            Place::Embedded(files) => Ok(files.get(name).map(Cow::Borrowed)),
            Place::File(file) => Ok(file.config(name).map(|text| Cow::Owned(text.into_bytes()))),
            Place::Published(model) => Ok(model.config(name).map(|text| Cow::Owned(text.into_bytes()))),
            Place::Directory(path) => {
                let path = path.join(name);
                match std::fs::read(&path) {
                    Ok(bytes) => Ok(Some(Cow::Owned(bytes))),
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
                    Err(error) => Err(Error::io(&path, error)),
                }
            }
        }
    }

    fn missing(&self, name: &str) -> Error {
        Error::file(&self.path(name), format!("no such file; {LAYOUT}"))
    }

    fn path(&self, name: &str) -> PathBuf {
        match &self.place {
            Place::Embedded(_) => Path::new(EMBEDDED_NAME).join(name),
            Place::Published(_) => Path::new(self.family.name).join(name),
            Place::Directory(path) => path.join(name),
            Place::File(file) => file.path().join(name),
        }
    }
}
