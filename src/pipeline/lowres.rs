//! Pictures that a second stage of DeepFloyd IF enlarges.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use super::start::InputPicture;
use super::tensor_picture::TensorFile;
use crate::error::{Error, Result};
use crate::image::from_bytes;
use crate::methods::{NoisedPicture, Size};
use crate::runtime::{DType, Device, Tensor};

/// What a network enlarges that reads a smaller picture with noise beside its samples (Ho et al. 2021, arXiv:2106.15282, sec. 4.2).
#[derive(Clone, Debug, PartialEq)]
pub struct Lowres {
    pub picture: LowresPicture,
    /// The training timestep whose noise the picture gets: more noise leaves more to the network. The published pipeline's is
    /// [`NOISE_LEVEL`](Lowres::NOISE_LEVEL).
    pub noise_level: usize,
}

/// The picture. Clones share it.
#[derive(Clone, Debug, PartialEq)]
pub enum LowresPicture {
    File(InputPicture),
    Values(PictureValues),
}

/// A picture that was never rounded to 8 bits.
#[derive(Clone)]
pub struct PictureValues {
    name: String,
    digest: String,
    size: Size,
    /// `[height, width, 3]`, from -1 to 1.
    values: Arc<[f32]>,
}

impl PartialEq for PictureValues {
    fn eq(&self, other: &PictureValues) -> bool {
        (&self.name, &self.digest) == (&other.name, &other.digest)
    }
}

impl fmt::Debug for PictureValues {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} ({}, {})", self.name, self.size, self.digest)
    }
}

impl PictureValues {
    /// `values`: `[height, width, 3]`, clamped to -1 to 1; `name`: what the made picture says of it.
    pub(super) fn new(name: &str, size: Size, mut values: Vec<f32>) -> PictureValues {
        values.iter_mut().for_each(|value| *value = value.clamp(-1.0, 1.0));
        let mut hasher = blake3::Hasher::new();
        hasher.update(size.to_string().as_bytes()).update(bytemuck::cast_slice(&values));
        let digest = hasher.finalize().to_hex()[..16].to_string();
        PictureValues { name: name.into(), digest, size, values: values.into() }
    }

    /// Of a safetensors file `lowres`, f32, `[1, 3, H, W]`, from -1 to 1; others are passed over.
    fn read(path: &Path) -> Result<PictureValues> {
        let file = TensorFile::read(path)?;
        let tensors = file.tensors()?;
        let view = tensors.tensor("lowres").map_err(|_| file.error("holds no tensor lowres, expected one"))?;
        let (size, values) = file.picture("lowres", &view, -1.0..=1.0)?;
        Ok(PictureValues::new(&file.name(), size, values))
    }
}

impl LowresPicture {
    /// A PNG, JPEG or WebP, or a safetensors file whose values are not rounded.
    ///
    /// # Errors
    /// As [`InputPicture::read`]; [`Error::File`]: a tensor of another shape or type, or values outside -1 to 1.
    pub fn read(path: &Path) -> Result<LowresPicture> {
        match path.extension().is_some_and(|end| end.eq_ignore_ascii_case("safetensors")) {
            true => Ok(LowresPicture::Values(PictureValues::read(path)?)),
            false => Ok(LowresPicture::File(InputPicture::read(path)?)),
        }
    }

    /// Of the file, without its folder.
    pub fn name(&self) -> &str {
        match self {
            LowresPicture::File(picture) => picture.name(),
            LowresPicture::Values(values) => &values.name,
        }
    }

    /// Tells apart pictures of other pixels.
    pub fn digest(&self) -> &str {
        match self {
            LowresPicture::File(picture) => picture.digest(),
            LowresPicture::Values(values) => &values.digest,
        }
    }

    /// One of the same cost: without pixels.
    fn without_pixels() -> LowresPicture {
        LowresPicture::Values(PictureValues::new("", Size::new(1, 1), vec![0.0; 3]))
    }

    /// At this size, `[H, W, 3]`, from -1 to 1.
    fn at(&self, size: Size) -> Result<Vec<f32>> {
        match self {
            LowresPicture::File(picture) => {
                Ok(aligned_bilinear(&from_bytes(&picture.levels(picture.size())?), picture.size(), size))
            }
            LowresPicture::Values(own) => Ok(aligned_bilinear(&own.values, own.size, size)),
        }
    }
}

impl Lowres {
    /// Of the published pipeline.
    pub const NOISE_LEVEL: usize = 250;

    /// The same at no other cost.
    pub(super) fn without_pixels(&self) -> Lowres {
        Lowres { picture: LowresPicture::without_pixels(), ..*self }
    }

    /// # Errors
    /// [`Error::Request`]: a noise level without one of `levels`.
    pub(super) fn check(&self, levels: &[f64]) -> Result<()> {
        match self.noise_level < levels.len() {
            true => Ok(()),
            false => {
                let reason = format!("expected 0 to {}, a timestep of the noise's schedule", levels.len() - 1);
                Err(Error::Request { field: "noise_level", value: self.noise_level.to_string(), reason })
            }
        }
    }

    /// The pictures of a batch at a stage's size, all with the noise level of the first; `levels`: abar of every timestep.
    ///
    /// # Errors
    /// Those of the device.
    pub(super) fn noised(all: &[&Lowres], levels: &[f64], device: &Device, size: Size) -> Result<NoisedPicture> {
        let abar = levels[all[0].noise_level];
        let shape = [all.len(), size.height, size.width, 3];
        let pictures = match device {
            Device::Meta(_) => Tensor::uninit(device, &shape, DType::F32)?,
            _ => {
                let mut values = Vec::with_capacity(shape.iter().product());
                for lowres in all {
                    values.extend(lowres.picture.at(size)?);
                }
                Tensor::from_f32(device, &shape, DType::F32, &values)?
            }
        };
        Ok(NoisedPicture { pictures, signal: abar.sqrt(), sigma: (1.0 - abar).sqrt() })
    }
}

/// `[H, W, 3]` to another size, bilinearly, with the corners' pixels on the corners: torch's `align_corners=True`.
fn aligned_bilinear(values: &[f32], from: Size, to: Size) -> Vec<f32> {
    if from == to {
        return values.to_vec();
    }
    // Of an output: the first of two neighbours, the second, and its share.
    let taps = |from: usize, to: usize| -> Vec<(usize, usize, f32)> {
        let scale = if to > 1 { (from - 1) as f32 / (to - 1) as f32 } else { 0.0 };
        let tap = |i: usize| {
            let at = scale * i as f32;
            let first = (at as usize).min(from - 1);
            (first, (first + 1).min(from - 1), at - first as f32)
        };
        (0..to).map(tap).collect()
    };
    let (rows, columns) = (taps(from.height, to.height), taps(from.width, to.width));
    let mut out = Vec::with_capacity(3 * to.area());
    for (top, bottom, down) in rows {
        for &(left, right, along) in &columns {
            for channel in 0..3 {
                let at = |row: usize, column: usize| values[3 * (row * from.width + column) + channel];
                let upper = (1.0 - along) * at(top, left) + along * at(top, right);
                let lower = (1.0 - along) * at(bottom, left) + along * at(bottom, right);
                out.push((1.0 - down) * upper + down * lower);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Corners stay, the middle is between.
    #[test]
    fn corners_are_aligned() {
        let picture: Vec<f32> = [0.0, 1.0, 2.0, 3.0].iter().flat_map(|&value| [value; 3]).collect();
        let got = aligned_bilinear(&picture, Size::new(2, 2), Size::new(3, 5));
        let want = [0.0, 0.5, 1.0, 0.5, 1.0, 1.5, 1.0, 1.5, 2.0, 1.5, 2.0, 2.5, 2.0, 2.5, 3.0];
        assert_eq!(got, want.iter().flat_map(|&value| [value; 3]).collect::<Vec<f32>>());
        assert_eq!(aligned_bilinear(&picture, Size::new(2, 2), Size::new(1, 1)), [0.0; 3]);
    }
}
