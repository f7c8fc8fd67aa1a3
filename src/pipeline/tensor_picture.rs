//! Pictures among the tensors of a safetensors file, which nothing rounds to 8 bits.

use std::ops::RangeInclusive;
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::error::{Error, Result};
use crate::methods::Size;

/// The bytes of a safetensors file with pictures, and what errors call it.
pub(super) struct TensorFile<'a> {
    path: &'a Path,
    pub bytes: Vec<u8>,
}

impl<'a> TensorFile<'a> {
    /// # Errors
    /// [`Error::Io`].
    pub fn read(path: &'a Path) -> Result<TensorFile<'a>> {
        let bytes = std::fs::read(path).map_err(|error| Error::io(path, error))?;
        Ok(TensorFile { path, bytes })
    }

    /// # Errors
    /// [`Error::File`]: it is no safetensors file.
    pub fn tensors(&self) -> Result<SafeTensors<'_>> {
        SafeTensors::deserialize(&self.bytes).map_err(|error| self.error(format!("is no safetensors file ({error})")))
    }

    pub fn error(&self, reason: impl Into<String>) -> Error {
        Error::file(self.path, reason)
    }

    /// Of the file, without its folder.
    pub fn name(&self) -> String {
        self.path.file_name().unwrap_or(self.path.as_os_str()).to_string_lossy().into_owned()
    }

    /// `view`, f32, `[1, 3, H, W]`, as a size and `[H, W, 3]`.
    ///
    /// # Errors
    /// [`Error::File`]: another shape or type, or a value outside `range`.
    pub fn picture(&self, name: &str, view: &TensorView, range: RangeInclusive<f32>) -> Result<(Size, Vec<f32>)> {
        let (shape, dtype) = (view.shape(), view.dtype());
        let &[1, 3, height, width] = shape else {
            return Err(self.error(format!("{name} has shape {shape:?}, expected [1, 3, H, W]")));
        };
        if dtype != Dtype::F32 || height * width == 0 {
            return Err(self.error(format!("{name} is {dtype:?} of {width}x{height}, expected F32 and pixels")));
        }
        let planes: Vec<f32> = bytemuck::pod_collect_to_vec(view.data());
        if let Some(value) = planes.iter().find(|value| !range.contains(*value)) {
            let (least, most) = (range.start(), range.end());
            return Err(self.error(format!("{name} has the value {value}, expected {least} to {most}")));
        }
        let area = height * width;
        let values = (0..3 * area).map(|i| planes[i % 3 * area + i / 3]).collect();
        Ok((Size::new(width, height), values))
    }
}
