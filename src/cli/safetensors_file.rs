//! Safetensors files of `--dump` and `probe`: named tensors in NCHW order, read and written through host memory.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use megafuse::{Error, Result};
use safetensors::Dtype;
use safetensors::tensor::{SafeTensors, TensorView};

use super::output;

/// A tensor on its way to a file.
#[derive(Clone)]
pub enum Values {
    F32(Vec<f32>),
    I64(Vec<i64>),
}

/// A named array, row-major.
#[derive(Clone)]
pub struct Array {
    pub shape: Vec<usize>,
    pub values: Values,
}

impl Array {
    pub fn f32(shape: &[usize], values: Vec<f32>) -> Array {
        Array { shape: shape.to_vec(), values: Values::F32(values) }
    }

    pub fn i64(shape: &[usize], values: Vec<i64>) -> Array {
        Array { shape: shape.to_vec(), values: Values::I64(values) }
    }

    fn view(&self) -> TensorView<'_> {
        let (dtype, bytes): (Dtype, &[u8]) = match &self.values {
            Values::F32(values) => (Dtype::F32, bytemuck::cast_slice(values)),
            Values::I64(values) => (Dtype::I64, bytemuck::cast_slice(values)),
        };
        TensorView::new(dtype, self.shape.clone(), bytes).expect("as many values as the shape says")
    }
}

/// Writes the arrays as one file; an existing file is replaced when the new one is complete.
///
/// # Errors
/// [`Error::Io`].
pub fn write(path: &Path, arrays: &BTreeMap<String, Array>) -> Result<()> {
    let views: Vec<(&String, TensorView)> = arrays.iter().map(|(name, array)| (name, array.view())).collect();
    let bytes = safetensors::serialize(views, None::<HashMap<String, String>>)
        .map_err(|error| Error::file(path, format!("cannot be written as safetensors: {error}")))?;
    output::replace(path, &bytes)
}

/// The tensors of an input file, as f32.
pub struct Inputs<'a> {
    path: &'a Path,
    bytes: Vec<u8>,
}

impl<'a> Inputs<'a> {
    /// # Errors
    /// [`Error::Io`], [`Error::File`]: unreadable, or not safetensors.
    pub fn open(path: &'a Path) -> Result<Inputs<'a>> {
        let bytes = std::fs::read(path).map_err(|error| Error::io(path, error))?;
        let inputs = Inputs { path, bytes };
        inputs.tensors()?;
        Ok(inputs)
    }

    fn tensors(&self) -> Result<SafeTensors<'_>> {
        SafeTensors::deserialize(&self.bytes)
            .map_err(|error| Error::file(self.path, format!("is not a safetensors file: {error}")))
    }

    /// Shape and values of the tensor `name`.
    ///
    /// # Errors
    /// [`Error::Weight`] naming file and tensor: missing, of a dtype that is not a number type, or not finite.
    pub fn get(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>)> {
        let wrong = |reason: String| Error::Weight { file: self.path.to_path_buf(), key: name.into(), reason };
        let tensors = self.tensors()?;
        let tensor = tensors.tensor(name).map_err(|_| {
            let mut names = tensors.names();
            names.sort_unstable();
            wrong(format!("is missing; the file holds {}", names.join(", ")))
        })?;
        let bytes = tensor.data();
        let values: Vec<f32> = match tensor.dtype() {
            Dtype::F32 => decode(bytes, f32::from_le_bytes),
            Dtype::F64 => decode(bytes, |b| f64::from_le_bytes(b) as f32),
            Dtype::F16 => decode(bytes, |b| half::f16::from_le_bytes(b).to_f32()),
            Dtype::BF16 => decode(bytes, |b| half::bf16::from_le_bytes(b).to_f32()),
            Dtype::I32 => decode(bytes, |b| i32::from_le_bytes(b) as f32),
            Dtype::I64 => decode(bytes, |b| i64::from_le_bytes(b) as f32),
            other => return Err(wrong(format!("is {other:?}, expected f32, f16, bf16, f64, i32 or i64"))),
        };
        let not_finite = values.iter().filter(|value| !value.is_finite()).count();
        if not_finite > 0 {
            return Err(wrong(format!("{not_finite} of {} values are not finite", values.len())));
        }
        Ok((tensor.shape().to_vec(), values))
    }

    /// The tensor `name`, which must have `R` dimensions.
    ///
    /// # Errors
    /// As [`get`](Inputs::get); [`Error::Weight`] with the shape found and `wanted`.
    pub fn get_shaped<const R: usize>(&self, name: &str, wanted: &str) -> Result<([usize; R], Vec<f32>)> {
        let (shape, values) = self.get(name)?;
        match <[usize; R]>::try_from(shape) {
            Ok(shape) if values.is_empty() => Err(self.mismatch(name, &shape, wanted)),
            Ok(shape) => Ok((shape, values)),
            Err(shape) => Err(self.mismatch(name, &shape, wanted)),
        }
    }

    /// The error for a tensor of a wrong shape.
    pub fn mismatch(&self, name: &str, shape: &[usize], wanted: &str) -> Error {
        let reason = format!("has shape {shape:?}, expected {wanted}");
        Error::Weight { file: self.path.to_path_buf(), key: name.into(), reason }
    }
}

fn decode<const B: usize>(bytes: &[u8], value: impl Fn([u8; B]) -> f32) -> Vec<f32> {
    bytes.as_chunks::<B>().0.iter().map(|&chunk| value(chunk)).collect()
}
