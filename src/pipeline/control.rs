//! ControlNets of a run: their files, and the pictures that they read.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};

use super::WeightReport;
use super::families::load_part;
use super::files::stem;
use super::start::InputPicture;
use super::tensor_picture::TensorFile;
use crate::error::{Error, Result};
use crate::methods::Size;
use crate::models::{ControlFile, ControlNet, ControlNetConfig, WeightStore};
use crate::runtime::{DType, Device, Tensor};

/// Where a ControlNet comes from: a directory in the layout of diffusers, or one file.
#[derive(Clone, Debug)]
pub struct ControlFiles {
    path: PathBuf,
    config: ControlNetConfig,
    file: Option<ControlFile>,
}

const CONFIG: &str = "config.json";

impl ControlFiles {
    /// Reads the configuration, of a file its keys; no weights.
    ///
    /// # Errors
    /// [`Error::File`]: not there, no config.json in the directory; as [`ControlFile::open`] and [`ControlNetConfig::from_json`].
    pub fn open(path: &Path) -> Result<ControlFiles> {
        if path.is_dir() {
            let config = path.join(CONFIG);
            let json = match std::fs::read_to_string(&config) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    let reason = "has no config.json: expected the directory of a ControlNet as diffusers saves it";
                    return Err(Error::file(path, reason));
                }
                read => read.map_err(|error| Error::io(&config, error))?,
            };
            let config = ControlNetConfig::from_json(&config.display().to_string(), &json)?;
            return Ok(ControlFiles { path: path.to_path_buf(), config, file: None });
        }
        let file = ControlFile::open(path)?;
        let config = ControlNetConfig::from_json(&path.display().to_string(), file.config())?;
        Ok(ControlFiles { path: path.to_path_buf(), config, file: Some(file) })
    }

    /// Of the directory, or of the file without its ending.
    pub fn name(&self) -> String {
        match &self.file {
            None => self.path.file_name().unwrap_or(self.path.as_os_str()).to_string_lossy().into_owned(),
            Some(_) => stem(&self.path),
        }
    }

    pub fn config(&self) -> &ControlNetConfig {
        &self.config
    }

    /// The weights; on the meta device whatever is asked for.
    ///
    /// # Errors
    /// As [`WeightStore::open`].
    pub fn store(&self, device: &Device, dtype: DType) -> Result<WeightStore> {
        match device {
            Device::Meta(_) => Ok(WeightStore::meta(device, dtype)),
            _ => self.stored(device, dtype),
        }
    }

    /// Keys and shapes, without data.
    ///
    /// # Errors
    /// As [`WeightStore::open`].
    pub(super) fn outline(&self, device: &Device, dtype: DType) -> Result<WeightStore> {
        match device {
            Device::Meta(_) => Ok(WeightStore::meta(&Device::meta(), dtype)),
            _ => self.stored(&Device::meta(), dtype),
        }
    }

    fn stored(&self, device: &Device, dtype: DType) -> Result<WeightStore> {
        match &self.file {
            Some(file) => Ok(file.store(device, dtype)),
            None => WeightStore::open(&self.path, "diffusion_pytorch_model", device, dtype),
        }
    }

    /// The ControlNet of these weights, and their report.
    ///
    /// # Errors
    /// As [`ControlNet::from_weights`].
    pub fn net_of(&self, store: WeightStore) -> Result<(ControlNet, WeightReport)> {
        load_part("controlnet", store, |w| ControlNet::from_weights(w, &self.config))
    }

    /// The first 16 hexadecimal digits of BLAKE3 over configuration and weights.
    ///
    /// # Errors
    /// As [`WeightStore::open`].
    pub fn digest(&self) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        hasher.update(format!("{:?}", self.config).as_bytes());
        for bytes in self.store(&Device::cpu(), DType::F32)?.file_bytes() {
            hasher.update_rayon(bytes).update(&(bytes.len() as u64).to_le_bytes());
        }
        Ok(hasher.finalize().to_hex()[..16].to_string())
    }
}

/// What one ControlNet of a request reads, and how it counts.
#[derive(Clone, Debug, PartialEq)]
pub struct ControlInput {
    pub image: ControlImage,
    /// What it adds is multiplied by this.
    pub scale: f32,
    /// Guess mode: it is asked for the conditional samples alone, and what it adds to the finer levels counts less.
    pub guess: bool,
    /// It is on in steps that begin at this share of all steps, 0 to 1, or later,
    pub start: f64,
    /// and that end at this one or earlier.
    pub end: f64,
}

impl ControlInput {
    /// In every step, with scale 1.
    pub fn new(image: ControlImage) -> ControlInput {
        ControlInput { image, scale: 1.0, guess: false, start: 0.0, end: 1.0 }
    }

    /// What a picture's text and its JSON say of it, with the ControlNet at `path`.
    pub fn described(&self, path: &Path) -> (String, Value) {
        let ControlInput { image, scale, guess, start, end } = self;
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
        let mut text = format!("{name} {scale} of {}", image.name());
        if (*start, *end) != (0.0, 1.0) {
            text += &format!(" from {start} to {end}");
        }
        if *guess {
            text += " guess mode";
        }
        let scale: f64 = scale.to_string().parse().unwrap_or_else(|_| f64::from(*scale));
        let mut json = json!({
            "name": name, "scale": scale, "guess": guess, "start": start, "end": end, "image": image.name(),
            "image_digest": image.digest(),
        });
        if let ControlImage::Edges(_, [low, high]) = image {
            text += &format!(" edges {low} {high}");
            json["canny"] = format!("{low},{high}").into();
        }
        (text, json)
    }

    /// # Errors
    /// [`Error::Request`]: a scale or a share that is none.
    pub(super) fn check(&self) -> Result<()> {
        let refuse = |field, value: String, reason: String| Err(Error::Request { field, value, reason });
        if !self.scale.is_finite() {
            return refuse("control_scale", self.scale.to_string(), "expected a number; 1 is usual".into());
        }
        for (field, share) in [("control_start", self.start), ("control_end", self.end)] {
            if !(0.0..=1.0).contains(&share) {
                return refuse(field, share.to_string(), "expected a share of all steps, 0 to 1".into());
            }
        }
        if self.start >= self.end {
            let reason = format!("expected more than request.control_start, which is {}", self.start);
            return refuse("control_end", self.end.to_string(), reason);
        }
        Ok(())
    }
}

/// The picture that a ControlNet reads. Clones share it.
#[derive(Clone, Debug, PartialEq)]
pub enum ControlImage {
    /// Stretched to the size of each stage by Lanczos.
    Picture(InputPicture),
    /// The same of a picture's edges, which were found in its own size by these thresholds.
    Edges(InputPicture, [f32; 2]),
    /// One for each stage, of its size.
    Stages(StagePictures),
}

/// Pictures of the stages of a run, f32.
#[derive(Clone)]
pub struct StagePictures {
    name: String,
    digest: String,
    /// By the stage, from 0: values from 0 to 1, `[H, W, 3]`.
    pictures: Arc<BTreeMap<usize, (Size, Vec<f32>)>>,
}

impl PartialEq for StagePictures {
    fn eq(&self, other: &StagePictures) -> bool {
        (&self.name, &self.digest) == (&other.name, &other.digest)
    }
}

impl fmt::Debug for StagePictures {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.digest)
    }
}

impl StagePictures {
    /// Of a safetensors file `control<k>`, f32, `[1, 3, H, W]`, k the stage from 0; from 1 where there is no `control0`. Others are
    /// passed over.
    fn read(path: &Path) -> Result<StagePictures> {
        let file = TensorFile::read(path)?;
        let mut pictures = BTreeMap::new();
        for (name, view) in file.tensors()?.iter() {
            if let Some(stage) = name.strip_prefix("control").and_then(|number| number.parse::<usize>().ok()) {
                pictures.insert(stage, file.picture(name, &view, 0.0..=1.0)?);
            }
        }
        if pictures.is_empty() {
            return Err(file.error("holds no tensor control<k>, expected one for each stage: control0, control1, ..."));
        }
        if !pictures.contains_key(&0) {
            pictures = pictures.into_iter().map(|(stage, picture)| (stage - 1, picture)).collect();
        }
        let digest = blake3::hash(&file.bytes).to_hex()[..16].to_string();
        Ok(StagePictures { name: file.name(), digest, pictures: Arc::new(pictures) })
    }

    fn of(&self, stage: usize, size: Size) -> Result<&[f32]> {
        let refuse = |reason: String| {
            let (field, value) = ("control_image", self.name.clone());
            Error::Request { field, value, reason }
        };
        match self.pictures.get(&stage) {
            Some((own, values)) if *own == size => Ok(values),
            Some((own, _)) => Err(refuse(format!("control{stage} is {own}, expected {size}, the size of that stage"))),
            None => {
                Err(refuse(format!("holds no control{stage}, for the stage of {size}; expected one for each stage")))
            }
        }
    }
}

impl ControlImage {
    /// A PNG, JPEG or WebP, or a safetensors file with a picture for each stage.
    ///
    /// # Errors
    /// As [`InputPicture::read`]; [`Error::File`]: tensors of another shape or type, or values outside 0 to 1.
    pub fn read(path: &Path) -> Result<ControlImage> {
        match path.extension().is_some_and(|end| end.eq_ignore_ascii_case("safetensors")) {
            true => Ok(ControlImage::Stages(StagePictures::read(path)?)),
            false => Ok(ControlImage::Picture(InputPicture::read(path)?)),
        }
    }

    /// A picture's edges by these thresholds, in its place.
    ///
    /// # Errors
    /// As [`InputPicture::edges`]; [`Error::Request`]: pictures of stages have none.
    pub fn edges(&self, thresholds: [f32; 2]) -> Result<ControlImage> {
        match self {
            ControlImage::Picture(picture) | ControlImage::Edges(picture, _) => {
                Ok(ControlImage::Edges(picture.edges(thresholds)?, thresholds))
            }
            ControlImage::Stages(stages) => {
                let reason =
                    "edges are found in a picture file, and this one has the stages' pictures as they are read";
                Err(Error::Request { field: "control_image", value: stages.name.clone(), reason: reason.into() })
            }
        }
    }

    /// Of the file, without its folder.
    pub fn name(&self) -> &str {
        match self {
            ControlImage::Picture(picture) | ControlImage::Edges(picture, _) => picture.name(),
            ControlImage::Stages(stages) => &stages.name,
        }
    }

    /// Tells apart pictures of other pixels.
    pub fn digest(&self) -> &str {
        match self {
            ControlImage::Picture(picture) | ControlImage::Edges(picture, _) => picture.digest(),
            ControlImage::Stages(stages) => &stages.digest,
        }
    }

    /// Is there a picture for each of these stages, of its size?
    ///
    /// # Errors
    /// [`Error::Request`]: which stage has none, or one of another size.
    pub(super) fn check(&self, mut stages: impl Iterator<Item = (usize, Size)>) -> Result<()> {
        match self {
            ControlImage::Picture(_) | ControlImage::Edges(..) => Ok(()),
            ControlImage::Stages(pictures) => stages.try_for_each(|(stage, size)| pictures.of(stage, size).map(drop)),
        }
    }

    /// `[1, H, W, 3]`, f32, of values from 0 to 1, at the size of a stage; nothing is resized where no value is asked for.
    ///
    /// # Errors
    /// As [`check`](ControlImage::check); those of the device.
    pub(super) fn on(&self, device: &Device, stage: usize, size: Size) -> Result<Tensor> {
        let shape = [1, size.height, size.width, 3];
        match (device, self) {
            (Device::Meta(_), _) => Tensor::uninit(device, &shape, DType::F32),
            (_, ControlImage::Picture(picture) | ControlImage::Edges(picture, _)) => {
                let values: Vec<f32> = picture.levels(size)?.iter().map(|&level| f32::from(level) / 255.0).collect();
                Tensor::from_f32(device, &shape, DType::F32, &values)
            }
            (_, ControlImage::Stages(stages)) => Tensor::from_f32(device, &shape, DType::F32, stages.of(stage, size)?),
        }
    }
}
