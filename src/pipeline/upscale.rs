//! Super-resolution of finished pictures, of 8 bits per channel in and out.

use std::path::PathBuf;

use serde_json::Value;

use super::files::stem;
use super::plan::WeightReport;
use crate::error::{Error, Result};
use crate::methods::{Observer, Size};
use crate::models::{RrdbNet, Tiling};
use crate::runtime::{DType, Device, Tensor};

/// Which network enlarges pictures, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpscaleOptions {
    /// Its weights: safetensors, or PyTorch's `.pth`.
    pub file: PathBuf,
    /// Of weights and activations.
    pub dtype: DType,
    pub tiling: Tiling,
}

impl UpscaleOptions {
    /// f16 on a card, which is what the published programs run these networks in, else f32.
    pub fn usual_dtype(device: &Device) -> DType {
        if matches!(device, Device::Cuda(_)) { DType::F16 } else { DType::F32 }
    }
}

/// A network that enlarges pictures, in memory.
pub struct Upscaler {
    name: String,
    net: RrdbNet,
    tiling: Tiling,
    warnings: Vec<String>,
}

/// Rows of an automatic stripe where the whole finds no room, at least.
const FEWEST_ROWS: usize = 32;

impl Upscaler {
    /// # Errors
    /// As [`RrdbNet::open`].
    pub fn open(options: &UpscaleOptions, device: &Device) -> Result<Upscaler> {
        let (net, warnings) = RrdbNet::open(&options.file, device, options.dtype)?;
        Ok(Upscaler { name: stem(&options.file), net, tiling: options.tiling, warnings })
    }

    /// The file's name without its ending.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How many times the edges become longer.
    pub fn scale(&self) -> usize {
        self.net.config().scale()
    }

    pub fn dtype(&self) -> DType {
        self.net.dtype()
    }

    /// Of what it makes of a picture.
    pub fn enlarged(&self, size: Size) -> Size {
        Size::new(self.scale() * size.width, self.scale() * size.height)
    }

    /// What was odd about the file, a sentence each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Says in a picture's text, in the words that stable-diffusion-webui has for it, and in its JSON, that this made it.
    pub fn describe(&self, fields: &mut Vec<(String, String)>, json: &mut Value) {
        fields.push(("Postprocess upscale by".into(), self.scale().to_string()));
        fields.push(("Postprocess upscaler".into(), self.name.clone()));
        json["upscale_model"] = self.name.clone().into();
        json["upscale_dtype"] = self.dtype().name().into();
    }

    pub fn weights(&self) -> WeightReport {
        let parameters = self.net.parameters();
        let bytes = parameters * self.dtype().size_bytes() as u64;
        WeightReport { module: "upscaler", parameters, bytes, variant: None, unused: Vec::new() }
    }

    /// `rgb`, 8 bits and 3 bytes per pixel, row-major, to the same of [`enlarged`](Upscaler::enlarged) size: bytes over 255 go in;
    /// what comes out is clamped to [0, 1], times 255, rounded to nearest, ties to even. A size that the network cannot read is
    /// continued at the right and at the bottom by reflection, and the result cut. On the meta device: the ops' record, no bytes.
    ///
    /// An automatic tiling that finds no room goes on in stripes: the same picture, in more time.
    ///
    /// # Errors
    /// [`Error::Argument`]: a picture without pixels, or of another size than said; [`Error::Interrupted`]: asked after every
    /// stripe; [`Error::NonFinite`]; [`Error::OutOfMemory`].
    pub fn upscale(&self, size: Size, rgb: &[u8], observer: &mut dyn Observer) -> Result<Vec<u8>> {
        let picture = self.on_device(size, rgb)?;
        let padded_rows = picture.shape()[1];
        let mut tiling = self.tiling;
        loop {
            let done = self.run(&picture, size, tiling, observer);
            let rows = match (&done, self.tiling, tiling) {
                (Err(Error::OutOfMemory { .. }), Tiling::Automatic, Tiling::Stripes(rows)) => rows / 2,
                (Err(Error::OutOfMemory { .. }), Tiling::Automatic, _) => padded_rows / 2,
                _ => return done,
            };
            if rows < FEWEST_ROWS {
                return done;
            }
            let how = "which gives the same picture in more time";
            observer.warning(&format!("the upscaler finds no room: it works by stripes of {rows} rows, {how}"));
            tiling = Tiling::Stripes(rows);
        }
    }

    fn run(&self, picture: &Tensor, size: Size, tiling: Tiling, observer: &dyn Observer) -> Result<Vec<u8>> {
        let Size { width, height } = self.enlarged(size);
        let mut bytes = Vec::new();
        self.net.forward_rows(picture, tiling, &mut |rows| {
            if observer.cancelled() {
                return Err(Error::Interrupted);
            }
            let [_, _, padded_width, channels] = rows.dims("upscale", "rows")?;
            if let Device::Meta(_) = rows.device() {
                return Ok(());
            }
            let values = rows.to_f32_vec()?;
            let count = values.iter().filter(|value| !value.is_finite()).count();
            if count > 0 {
                let what = format!("the upscaler {}", self.name);
                return Err(Error::NonFinite { what, count, total: values.len() });
            }
            for row in values.chunks_exact(padded_width * channels) {
                let byte = |value: &f32| (value.clamp(0.0, 1.0) * 255.0).round_ties_even() as u8;
                bytes.extend(row[..width * channels].iter().map(byte));
            }
            Ok(())
        })?;
        bytes.truncate(3 * width * height);
        Ok(bytes)
    }

    /// `[1, H, W, 3]` in [0, 1], continued to a size that the network reads.
    fn on_device(&self, Size { width, height }: Size, rgb: &[u8]) -> Result<Tensor> {
        const OP: &str = "upscale";
        let (device, dtype, unit) = (self.net.device(), self.net.dtype(), self.net.config().unshuffle);
        if width == 0 || height == 0 {
            return Err(Error::argument(OP, "size", format!("{width}x{height}"), "at least 1x1"));
        }
        let shape = [1, height.next_multiple_of(unit), width.next_multiple_of(unit), 3];
        if let Device::Meta(_) = device {
            return Tensor::uninit(device, &shape, dtype);
        }
        if rgb.len() != 3 * width * height {
            return Err(Error::argument(
                OP,
                "rgb",
                rgb.len(),
                format!("{} bytes for {width}x{height}", 3 * width * height),
            ));
        }
        // Pixel `size` is pixel `size - 2` once more; one alone is repeated.
        let reflected =
            |at: usize, size: usize| if at < size { at } else { (2 * size - 2).saturating_sub(at).min(size - 1) };
        let mut values = Vec::with_capacity(shape.iter().product());
        for y in 0..shape[1] {
            for x in 0..shape[2] {
                let from = 3 * (reflected(y, height) * width + reflected(x, width));
                values.extend(rgb[from..from + 3].iter().map(|&byte| f32::from(byte) / 255.0));
            }
        }
        Tensor::from_f32(device, &shape, dtype, &values)
    }
}
