//! Pictures as prompts: IP-Adapter files and the image encoder that they share, what a request shows them, and what the network
//! is told of it. Ye et al. 2023, arXiv:2308.06721.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde_json::{Value, json};

use super::families::load_part;
use super::files::{stem, weighted};
use super::memory::{LoadOptions, Role};
use super::resident::{Module, Resident};
use super::{InputPicture, ModelFiles, WeightReport};
use crate::error::{Error, Result};
use crate::image::{LevelFilter, luma};
use crate::methods::{Run, Size, StageParts};
use crate::models::{
    ClipVisionConfig, ClipVisionModel, ClipVisionOutput, ImagePrompt, IpAdapter, IpAdapterConfig, UnetConfig,
    WeightStore,
};
use crate::runtime::{DType, Device, Tensor};

/// An IP-Adapter's file and how strongly its pictures count.
#[derive(Clone, Debug, PartialEq)]
pub struct IpAdapterFile {
    pub path: PathBuf,
    /// What its attention is multiplied by: 1 is full strength, 0 none.
    pub scale: f32,
}

impl IpAdapterFile {
    /// The file's name without its ending.
    pub fn name(&self) -> String {
        stem(&self.path)
    }
}

impl std::fmt::Display for IpAdapterFile {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{}:{}", self.path.display(), self.scale)
    }
}

impl FromStr for IpAdapterFile {
    type Err = Error;

    /// `FILE` or `FILE:SCALE`.
    fn from_str(text: &str) -> Result<IpAdapterFile> {
        let refused = |reason| Error::Request { field: "ip_adapters", value: text.into(), reason };
        weighted(text, ["FILE", "SCALE"]).map(|(path, scale)| IpAdapterFile { path, scale }).map_err(refused)
    }
}

/// A picture that an IP-Adapter shows the network.
#[derive(Clone, Debug, PartialEq)]
pub struct IpImage {
    /// Which of the model's adapters, from 0.
    pub adapter: usize,
    pub picture: InputPicture,
    /// White (from level 128 of its grey on) where the picture counts; stretched to the size of each stage. `None`: everywhere.
    pub mask: Option<InputPicture>,
}

impl IpImage {
    /// As a picture's JSON and `run.json` name it.
    pub fn to_json(&self) -> Value {
        let mut json = json!({
            "name": self.picture.name(), "adapter": self.adapter + 1, "digest": self.picture.digest(),
        });
        if let Some(mask) = &self.mask {
            json["mask"] = mask.name().into();
            json["mask_digest"] = mask.digest().into();
        }
        json
    }
}

/// The adapters' files and their encoder's folder.
#[derive(Clone, Debug)]
pub(super) struct IpFiles {
    pub adapters: Vec<(IpAdapterFile, IpAdapterConfig)>,
    /// The image encoder's.
    pub encoder: PathBuf,
}

/// Where the published repository keeps the encoder of the adapters beside it.
const ENCODER: &str = "image_encoder";

impl IpFiles {
    /// Reads the files' headers. Without `encoder` it is the folder `image_encoder` beside the first adapter.
    ///
    /// # Errors
    /// As [`IpAdapterConfig::read`]; [`Error::File`]: no encoder.
    pub fn open(adapters: &[IpAdapterFile], encoder: Option<&Path>) -> Result<IpFiles> {
        let read = |file: &IpAdapterFile| Ok((file.clone(), IpAdapterConfig::read(&file.path)?));
        let adapters: Vec<_> = adapters.iter().map(read).collect::<Result<_>>()?;
        let beside = || {
            let folder = adapters.first().and_then(|(file, _)| file.path.parent()).unwrap_or(Path::new(""));
            folder.join(ENCODER)
        };
        let encoder = encoder.map_or_else(beside, PathBuf::from);
        if !encoder.join("config.json").is_file() {
            let reason = "no such file; an IP-Adapter needs the image encoder that it was trained with: name its folder \
                          (config.json and model.safetensors) by request.ip_encoder";
            return Err(Error::file(&encoder.join("config.json"), reason));
        }
        Ok(IpFiles { adapters, encoder })
    }

    fn config(&self) -> Result<(String, ClipVisionConfig)> {
        let path = self.encoder.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|error| Error::io(&path, error))?;
        let what = path.display().to_string();
        let config = ClipVisionConfig::from_json(&what, &text)?;
        Ok((what, config))
    }

    fn encoder_weights(&self, device: &Device, dtype: DType) -> Result<WeightStore> {
        ClipVisionModel::prepared(WeightStore::open(&self.encoder, "model", device, dtype)?)
    }

    /// The first 16 hexadecimal digits of BLAKE3 over each adapter's file, and over the encoder's configurations and weights.
    ///
    /// # Errors
    /// Those of the files.
    pub fn digests(&self) -> Result<(Vec<String>, String)> {
        let digest = |parts: &[&[u8]]| {
            let mut hasher = blake3::Hasher::new();
            for part in parts {
                hasher.update_rayon(part).update(&(part.len() as u64).to_le_bytes());
            }
            hasher.finalize().to_hex()[..16].to_string()
        };
        let of = |(_, config): &(IpAdapterFile, IpAdapterConfig)| {
            let store = IpAdapter::store(config, &Device::meta(), DType::F32)?;
            Ok(digest(&store.file_bytes().collect::<Vec<_>>()))
        };
        let adapters = self.adapters.iter().map(of).collect::<Result<_>>()?;
        let read = |name: &str| std::fs::read(self.encoder.join(name)).unwrap_or_default();
        let (config, preprocessor) = (read("config.json"), read(PREPROCESSOR));
        let store = self.encoder_weights(&Device::meta(), DType::F32)?;
        let parts = [&config[..], &preprocessor].into_iter().chain(store.file_bytes());
        Ok((adapters, digest(&parts.collect::<Vec<_>>())))
    }
}

/// What the network is told of a run's pictures.
#[derive(Clone, Debug, Default)]
pub(super) struct ImagePrompts {
    pub prompts: Vec<ImagePrompt>,
    masks: Vec<Option<InputPicture>>,
}

impl ImagePrompts {
    /// The masks for pictures of this size, one a prompt: `[1, H, W, 1]`, f32, 1 where it counts. None where nothing is masked.
    ///
    /// # Errors
    /// Those of the device.
    pub fn masks(&self, size: Size, device: &Device) -> Result<Vec<Option<Tensor>>> {
        if self.masks.iter().all(Option::is_none) {
            return Ok(Vec::new());
        }
        let of = |mask: &InputPicture| {
            let shape = [1, size.height, size.width, 1];
            match device {
                Device::Meta(_) => Tensor::uninit(device, &shape, DType::F32),
                device => {
                    let levels = luma(&mask.levels(size)?);
                    let counts = |&level: &u8| if level >= 128 { 1.0 } else { 0.0 };
                    Tensor::from_f32(device, &shape, DType::F32, &levels.iter().map(counts).collect::<Vec<_>>())
                }
            }
        };
        self.masks.iter().map(|mask| mask.as_ref().map(of).transpose()).collect()
    }

    /// Tells apart runs whose recorded steps are others: for each prompt its rows, its tokens, and whether it has a mask.
    pub fn key(&self) -> Vec<usize> {
        let of = |(prompt, mask): (&ImagePrompt, &Option<InputPicture>)| {
            let shape = prompt.kv.first().map_or(&[][..], Tensor::shape);
            [shape.first().copied().unwrap_or(0), shape.get(1).copied().unwrap_or(0), usize::from(mask.is_some())]
        };
        self.prompts.iter().zip(&self.masks).flat_map(of).collect()
    }
}

/// The adapters of a model and their encoder. They leave memory with the text encoders.
pub(super) struct IpAdapters {
    files: Vec<IpAdapterFile>,
    encoder: Resident<ClipVisionModel>,
    adapters: Vec<Resident<IpAdapter>>,
    pixels: Preprocessor,
    /// Where encoder and adapters are, as text encoders.
    device: Device,
    /// Where the network is.
    network_device: Device,
    dtype: DType,
    /// In the order of [`modules`](IpAdapters::modules).
    pub weights: Vec<WeightReport>,
}

impl IpAdapters {
    /// Those of the files, if there are any, for this UNet.
    ///
    /// # Errors
    /// Those of the files; [`Error::File`]: an adapter does not fit the model or the encoder; [`Error::Config`]: there is no UNet.
    pub fn open(files: &ModelFiles, unet: Option<&UnetConfig>, options: &LoadOptions) -> Result<Option<IpAdapters>> {
        let Some(of) = files.ip_files() else { return Ok(None) };
        let Some(unet) = unet else {
            return Err(Error::config(format!("model {}", files.name()), "has no UNet, which IP-Adapters are for"));
        };
        let (what, config) = of.config()?;
        of.adapters.iter().try_for_each(|(_, adapter)| adapter.check(unet, &what, &config))?;
        let pixels = Preprocessor::read(&of.encoder, config.image_size)?;
        let (device, network_device) = (options.text_device().clone(), options.device.clone());
        let dtype = options.dtype;
        let outline = of.encoder_weights(&Device::meta(), dtype)?;
        let mut weights =
            vec![load_part("image_encoder", outline, |w| ClipVisionModel::from_weights(w, &config).map(drop))?.1];
        let mut adapters = Vec::new();
        for (_, adapter) in &of.adapters {
            let outline = IpAdapter::store(adapter, &Device::meta(), dtype)?;
            weights.push(load_part("ip_adapter", outline, |w| IpAdapter::from_weights(w, adapter, unet).map(drop))?.1);
            let (adapter, unet, device) = (adapter.clone(), unet.clone(), device.clone());
            let load = move || {
                let store = IpAdapter::store(&adapter, &device, dtype)?;
                Ok(load_part("ip_adapter", store, |w| IpAdapter::from_weights(w, &adapter, &unet))?.0)
            };
            adapters.push(Resident::new(Role::Text, load));
        }
        let load = {
            let (of, device) = (of.clone(), device.clone());
            move || {
                let store = of.encoder_weights(&device, dtype)?;
                Ok(load_part("image_encoder", store, |w| ClipVisionModel::from_weights(w, &config))?.0)
            }
        };
        let encoder = Resident::new(Role::Text, load);
        let files = of.adapters.iter().map(|(file, _)| file.clone()).collect();
        Ok(Some(IpAdapters { files, encoder, adapters, pixels, device, network_device, dtype, weights }))
    }

    pub fn files(&self) -> &[IpAdapterFile] {
        &self.files
    }

    pub fn modules(&self) -> impl Iterator<Item = &dyn Module> {
        let encoder: &dyn Module = &self.encoder;
        std::iter::once(encoder).chain(self.adapters.iter().map(|adapter| adapter as &dyn Module))
    }

    /// What the network is told of these pictures: of each adapter one prompt with the tokens of all its pictures side by side;
    /// where one of them has a mask, one prompt a picture. `guided`: with unconditional rows before the others, of an embedding of
    /// zeros, or of the plus kind of a picture of zeros.
    ///
    /// # Errors
    /// Those of the networks.
    pub fn encode(&self, images: &[IpImage], guided: bool) -> Result<ImagePrompts> {
        let mut all = ImagePrompts::default();
        for (index, (file, adapter)) in self.files.iter().zip(&self.adapters).enumerate() {
            let images: Vec<&IpImage> = images.iter().filter(|image| image.adapter == index).collect();
            if images.is_empty() || file.scale == 0.0 {
                continue;
            }
            let adapter = adapter.get()?;
            let tokens = adapter.tokens(&self.embeds(&images, adapter.config(), guided)?)?;
            let [rows, length, width] = tokens.dims("IpAdapter", "tokens")?;
            let none = guided.then(|| tokens.rows(rows - 1..rows)).transpose()?;
            let mut push = |first: usize, end: usize, mask: Option<InputPicture>| -> Result<()> {
                let joined = [1, (end - first) * length, width];
                let shown = tokens.rows(first..end)?.reshape(&joined)?;
                let rows = match &none {
                    None => shown,
                    Some(none) => {
                        let none = Tensor::concat(&vec![none.clone(); end - first])?.reshape(&joined)?;
                        Tensor::concat(&[none, shown])?
                    }
                };
                let kv = adapter.keys_and_values(&rows)?;
                let kv = kv.iter().map(|kv| kv.to_device(&self.network_device)).collect::<Result<_>>()?;
                all.prompts.push(ImagePrompt { kv, scale: file.scale });
                all.masks.push(mask);
                Ok(())
            };
            if images.iter().all(|image| image.mask.is_none()) {
                push(0, images.len(), None)?;
                continue;
            }
            images.iter().enumerate().try_for_each(|(at, image)| push(at, at + 1, image.mask.clone()))?;
        }
        Ok(all)
    }

    /// What the encoder says of the pictures; with guidance the last row is that of none.
    fn embeds(&self, images: &[&IpImage], config: &IpAdapterConfig, guided: bool) -> Result<Tensor> {
        let encoder = self.encoder.get()?;
        let side = self.pixels.side;
        let blank = || vec![0.0; side * side * 3];
        let read = |image: &&IpImage| match self.device {
            Device::Meta(_) => Ok(blank()),
            _ => self.pixels.of(&image.picture),
        };
        let mut pixels = images.iter().map(read).collect::<Result<Vec<_>>>()?;
        match config.reads() {
            ClipVisionOutput::Penultimate => {
                pixels.extend(guided.then(blank));
                encoder.forward(&pixels, ClipVisionOutput::Penultimate)
            }
            ClipVisionOutput::Projected => {
                let embeds = encoder.forward(&pixels, ClipVisionOutput::Projected)?;
                if !guided {
                    return Ok(embeds);
                }
                Tensor::concat(&[embeds, Tensor::zeros(&self.device, &[1, config.embed_dim], self.dtype)?])
            }
        }
    }
}

/// Do the request's pictures fit the adapters, and its masks the run?
///
/// # Errors
/// [`Error::Request`]: pictures without an adapter, an adapter without a picture, a mask where steps go over views of the map.
pub(super) fn check(adapters: Option<&IpAdapters>, images: &[IpImage], run: &Run) -> Result<()> {
    let refused = |field, value: String, reason: String| Err(Error::Request { field, value, reason });
    let files = adapters.map_or(&[][..], |adapters| adapters.files());
    if let Some(image) = images.iter().find(|image| image.adapter >= files.len()) {
        let reason = match files.len() {
            0 => "is shown by no adapter; name one with request.ip_adapters".to_string(),
            count => format!("is for adapter {}, and there are {count}", image.adapter + 1),
        };
        return refused("ip_images", image.picture.name().into(), reason);
    }
    for (index, file) in files.iter().enumerate() {
        if !images.iter().any(|image| image.adapter == index) {
            let reason = "shows the network a picture, and there is none for it; name it with request.ip_images";
            return refused("ip_adapters", file.to_string(), reason.into());
        }
    }
    let views = |run: &Run| run.method().implementation().steps_over_views();
    let of_views = StageParts::CROPS.and(StageParts::DEMOFUSION);
    let parts = |run: &Run| run.stages().iter().any(|stage| stage.parts.intersects(of_views));
    if let Some(mask) = images.iter().find_map(|image| image.mask.as_ref())
        && (views(run) || parts(run))
    {
        let method = run.method();
        let reason =
            format!("is of the whole map, and steps of this run by {method} go over views of it; leave it out");
        return refused("ip_masks", mask.name().into(), reason);
    }
    Ok(())
}

const PREPROCESSOR: &str = "preprocessor_config.json";

/// How a picture becomes the encoder's pixels: as transformers' CLIPImageProcessor over PIL.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Preprocessor {
    /// To which the shorter side is resized.
    shortest: usize,
    /// Of the square that is cut from the middle.
    side: usize,
    mean: [f64; 3],
    std: [f64; 3],
}

impl Preprocessor {
    /// That of `preprocessor_config.json` in an encoder's folder; without the file the published one, at the encoder's size.
    ///
    /// # Errors
    /// [`Error::Config`]: a key that says something else than a square from the middle at the encoder's size.
    fn read(folder: &Path, side: usize) -> Result<Preprocessor> {
        let (mean, std) = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]);
        let published = Preprocessor { shortest: side, side, mean, std };
        let path = folder.join(PREPROCESSOR);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(published),
            Err(error) => return Err(Error::io(&path, error)),
        };
        let what = path.display().to_string();
        let json: Value =
            serde_json::from_str(&text).map_err(|error| Error::config(&what, format!("not JSON ({error})")))?;
        let wrong =
            |key: &str, wanted: &str| Error::config(&what, format!("{key} is {}: expected {wanted}", json[key]));
        let side_of = |value: &Value| value.as_u64().and_then(|value| usize::try_from(value).ok());
        let shortest = match &json["size"] {
            Value::Null => Some(side),
            Value::Object(size) => size.get("shortest_edge").and_then(side_of),
            size => side_of(size),
        };
        let shortest = shortest.filter(|&shortest| shortest >= side && shortest < 1 << 14);
        let shortest =
            shortest.ok_or_else(|| wrong("size", &format!("shortest_edge of at least image_size = {side}")))?;
        let crop = match &json["crop_size"] {
            Value::Null => Some([side; 2]),
            Value::Object(crop) => {
                let [height, width] = ["height", "width"].map(|key| crop.get(key).and_then(side_of));
                height.zip(width).map(|(height, width)| [height, width])
            }
            crop => side_of(crop).map(|crop| [crop; 2]),
        };
        if crop != Some([side; 2]) {
            return Err(wrong("crop_size", &format!("{side}, the encoder's image_size")));
        }
        let three = |key: &str, default: [f64; 3]| match &json[key] {
            Value::Null => Ok(default),
            Value::Array(list) => {
                let values: Option<Vec<f64>> = list.iter().map(Value::as_f64).collect();
                values.and_then(|values| <[f64; 3]>::try_from(values).ok()).ok_or_else(|| wrong(key, "three numbers"))
            }
            _ => Err(wrong(key, "three numbers")),
        };
        let (mean, std) = (three("image_mean", mean)?, three("image_std", std)?);
        if std.contains(&0.0) {
            return Err(wrong("image_std", "three numbers other than 0"));
        }
        Ok(Preprocessor { shortest, side, mean, std })
    }

    /// `[side, side, 3]`
    fn of(&self, picture: &InputPicture) -> Result<Vec<f32>> {
        let Size { width, height } = picture.size();
        let short = width.min(height);
        let longer = |length: usize| self.shortest * length / short;
        let size = Size::new(longer(width), longer(height));
        let levels = picture.resized(size, LevelFilter::Bicubic)?;
        let (top, left) = ((size.height - self.side) / 2, (size.width - self.side) / 2);
        let mut pixels = Vec::with_capacity(self.side * self.side * 3);
        for y in top..top + self.side {
            let row = &levels[(y * size.width + left) * 3..][..self.side * 3];
            let value = |(i, &level): (usize, &u8)| (f64::from(level) / 255.0 - self.mean[i % 3]) / self.std[i % 3];
            pixels.extend(row.iter().enumerate().map(|at| value(at) as f32));
        }
        Ok(pixels)
    }
}

/// The encoder's pixels of a picture, `[side, side, 3]`: for tests.
///
/// # Errors
/// As the encoder's preprocessing.
#[doc(hidden)]
pub fn encoder_pixels(picture: &InputPicture, folder: &Path, side: usize) -> Result<Vec<f32>> {
    Preprocessor::read(folder, side)?.of(picture)
}
