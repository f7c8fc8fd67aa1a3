//! Pictures that a run begins from.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::image::{LevelFilter, canny_edges, decode_image, from_bytes, luma, read_image, resize_levels};
use crate::methods::{Method, Size, StartPicture};
use crate::runtime::{DType, Device, Tensor};

/// A picture file as a run reads it. Clones share its pixels.
#[derive(Clone)]
pub struct InputPicture {
    name: String,
    size: Size,
    /// `[height, width, 3]`
    rgb: Arc<[u8]>,
    digest: String,
}

impl InputPicture {
    /// A PNG, JPEG or WebP: as [`read_image`].
    ///
    /// # Errors
    /// As [`read_image`].
    pub fn read(path: &Path) -> Result<InputPicture> {
        let (width, height, rgb) = read_image(path)?;
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
        InputPicture::new(&name, Size::new(width, height), rgb)
    }

    /// The same of a file's bytes; `name`: what the made picture says of it.
    ///
    /// # Errors
    /// As [`decode_image`].
    pub fn decode(name: &str, bytes: &[u8], most_pixels: u64) -> Result<InputPicture> {
        let (width, height, rgb) = decode_image(Path::new(name), bytes, most_pixels)?;
        InputPicture::new(name, Size::new(width, height), rgb)
    }

    /// `rgb`: `[height, width, 3]`; `name`: what the made picture says of it.
    ///
    /// # Errors
    /// [`Error::Argument`]: `rgb` has another length, or a side is 0.
    pub fn new(name: &str, size: Size, rgb: Vec<u8>) -> Result<InputPicture> {
        if rgb.is_empty() || rgb.len() != 3 * size.area() {
            let want = format!("the 3 bytes of each of {size} pixels");
            return Err(Error::argument("InputPicture", "rgb", rgb.len(), want));
        }
        let hash = blake3::Hasher::new().update(size.to_string().as_bytes()).update(&rgb).finalize();
        let digest = hash.to_hex()[..16].to_string();
        Ok(InputPicture { name: name.into(), size, rgb: rgb.into(), digest })
    }

    /// Of the file, without its folder.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn size(&self) -> Size {
        self.size
    }

    /// Tells apart pictures of other pixels.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Its levels stretched to another size, as PIL does with this filter.
    pub(super) fn resized(&self, size: Size, filter: LevelFilter) -> Result<Vec<u8>> {
        resize_levels(&self.rgb, 3, (self.size.width, self.size.height), (size.width, size.height), filter)
    }

    /// Its edges, white on black, by these thresholds ([`canny_edges`]); of the same name.
    ///
    /// # Errors
    /// As [`canny_edges`].
    pub fn edges(&self, thresholds: [f32; 2]) -> Result<InputPicture> {
        let Size { width, height } = self.size;
        InputPicture::new(&self.name, self.size, canny_edges(&self.rgb, width, height, thresholds)?)
    }

    /// Its levels at another size, stretched to it: as PIL's Lanczos, which diffusers' image processor takes.
    pub(super) fn levels(&self, size: Size) -> Result<Vec<u8>> {
        if size == self.size {
            return Ok(self.rgb.to_vec());
        }
        self.resized(size, LevelFilter::Lanczos)
    }
}

impl PartialEq for InputPicture {
    fn eq(&self, other: &InputPicture) -> bool {
        (&self.name, &self.digest) == (&other.name, &other.digest)
    }
}

impl fmt::Debug for InputPicture {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} ({}, {})", self.name, self.size, self.digest)
    }
}

/// What a run begins from instead of noise. SDEdit, Meng et al. 2021, arXiv:2108.01073.
#[derive(Clone, Debug, PartialEq)]
pub struct InitImage {
    /// Stretched to the size of the stage that begins with it, where that is another.
    pub picture: InputPicture,
    /// White (from level 128 of its grey on) is repainted, black is kept; stretched as the picture is. `None`: all of it.
    pub mask: Option<InputPicture>,
    /// How much of the schedule is run, 0 to 1. `None`: the method's own: 0.8, and 1 with a mask, which then begins with noise
    /// alone; of DemoFusion 1. Not of methods that have the picture in place of their first stage's.
    pub strength: Option<f64>,
}

impl InitImage {
    pub fn new(picture: InputPicture) -> InitImage {
        InitImage { picture, mask: None, strength: None }
    }

    /// As given, or what the method makes of a picture. `None`: the method has no strength.
    pub fn strength_with(&self, method: &Method) -> Option<f64> {
        let usual = || method.implementation().default_strength(self.mask.is_some());
        method.in_place_of_first_stage().is_none().then(|| self.strength.unwrap_or_else(usual))
    }

    /// What of a run of these pictures at `size` may surprise, a sentence each.
    pub(super) fn remarks(&self, size: Size, named: bool) -> Vec<String> {
        let (picture, mut remarks) = (&self.picture, Vec::new());
        let ratio = |size: Size| size.width as f64 / size.height as f64;
        let stretched = |from: Size| (ratio(from) / ratio(size)).ln().abs() > 0.02;
        if !named && size != picture.size {
            let (name, was) = (&picture.name, picture.size);
            remarks.push(format!("{name} is {was}, whose sides the model cannot make: it is resized to {size}"));
        } else if stretched(picture.size) {
            let (name, was) = (&picture.name, picture.size);
            remarks.push(format!("{name} is {was} and is stretched to {size}; crop it to keep its proportions"));
        }
        if let Some(mask) = &self.mask {
            if (ratio(mask.size) / ratio(picture.size)).ln().abs() > 0.02 {
                let (name, was, of) = (&mask.name, mask.size, picture.size);
                remarks.push(format!("the mask {name} is {was} and the picture {of}: both are stretched to {size}"));
            }
            let levels = luma(&mask.rgb);
            if levels.iter().all(|&level| level < 128) {
                remarks.push(format!("the mask {} is black everywhere: nothing is repainted", mask.name));
            }
        }
        remarks
    }
}

/// The pictures on a device.
pub struct OnDevice<'a> {
    pub init: &'a InitImage,
    pub device: &'a Device,
}

impl OnDevice<'_> {
    /// 1 where the mask repaints, `[H, W]`.
    fn repainted(&self, size: Size) -> Result<Vec<bool>> {
        match &self.init.mask {
            Some(mask) => Ok(luma(&mask.levels(size)?).iter().map(|&level| level >= 128).collect()),
            None => Ok(vec![true; size.area()]),
        }
    }

    /// Nothing is resized where no value is asked for.
    fn tensor(&self, shape: &[usize], values: impl FnOnce() -> Result<Vec<f32>>) -> Result<Tensor> {
        match self.device {
            Device::Meta(_) => Tensor::uninit(self.device, shape, DType::F32),
            device => Tensor::from_f32(device, shape, DType::F32, &values()?),
        }
    }
}

impl StartPicture for OnDevice<'_> {
    fn picture(&self, size: Size) -> Result<Tensor> {
        self.tensor(&[1, size.height, size.width, 3], || Ok(from_bytes(&self.init.picture.levels(size)?)))
    }

    fn repaints(&self) -> bool {
        self.init.mask.is_some()
    }

    fn masked_picture(&self, size: Size) -> Result<Tensor> {
        self.tensor(&[1, size.height, size.width, 3], || {
            let mut values = from_bytes(&self.init.picture.levels(size)?);
            for (pixel, repainted) in values.chunks_exact_mut(3).zip(self.repainted(size)?) {
                if repainted {
                    pixel.fill(0.0);
                }
            }
            Ok(values)
        })
    }

    /// Of every cell the mask's pixel at its top left, as torch's nearest interpolation takes it.
    fn mask(&self, size: Size, [h, w]: [usize; 2]) -> Result<Tensor> {
        self.tensor(&[1, h, w, 1], || {
            let repainted = self.repainted(size)?;
            let at = |i: usize| repainted[i / w * size.height / h * size.width + i % w * size.width / w];
            Ok((0..h * w).map(|i| if at(i) { 1.0 } else { 0.0 }).collect())
        })
    }
}
