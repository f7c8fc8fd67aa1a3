//! What a method draws besides noise: given from outside, so that a run can be made again draw by draw.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};

use super::{METHODS, MethodSpec};
use crate::error::{Error, Result};
use crate::names::one_of;

/// Named arrays that stand for a method's own draws ([`MethodSpec::choices`]), the same for every picture of a request. Empty:
/// everything is drawn.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Choices {
    arrays: BTreeMap<String, Array>,
    /// Where they were read.
    file: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq)]
struct Array {
    shape: Vec<usize>,
    values: Values,
}

#[derive(Clone, Debug)]
enum Values {
    I64(Vec<i64>),
    F32(Vec<f32>),
    /// Of an element type that no choice has.
    Other(Dtype),
}

impl Choices {
    /// The arrays of a safetensors file that `method` draws; others are passed over, so that a run's dump will do.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::File`]: unreadable, or not safetensors; [`Error::Request`]: the method draws nothing.
    pub fn read(path: &Path, method: &'static MethodSpec) -> Result<Choices> {
        if method.choices.is_empty() {
            return Err(drawn_by_others(&path.display(), method));
        }
        let bytes = std::fs::read(path).map_err(|error| Error::io(path, error))?;
        let file = SafeTensors::deserialize(&bytes)
            .map_err(|error| Error::file(path, format!("is not a safetensors file: {error}")))?;
        let mut choices = Choices { arrays: BTreeMap::new(), file: Some(path.to_path_buf()) };
        for (name, view) in file.iter().filter(|(name, _)| method.draws(name)) {
            let values = match view.dtype() {
                Dtype::I64 => Values::I64(decode(view.data(), i64::from_le_bytes)),
                Dtype::F32 => Values::F32(decode(view.data(), f32::from_le_bytes)),
                other => Values::Other(other),
            };
            choices.arrays.insert(name.into(), Array { shape: view.shape().to_vec(), values });
        }
        Ok(choices)
    }

    /// With an array of whole numbers, row-major.
    pub fn with(mut self, name: &str, shape: &[usize], values: Vec<i64>) -> Choices {
        self.arrays.insert(name.into(), Array { shape: shape.to_vec(), values: Values::I64(values) });
        self
    }

    /// With an array of numbers, row-major.
    pub fn with_f32(mut self, name: &str, shape: &[usize], values: Vec<f32>) -> Choices {
        self.arrays.insert(name.into(), Array { shape: shape.to_vec(), values: Values::F32(values) });
        self
    }

    /// Is everything drawn?
    pub fn is_empty(&self) -> bool {
        self.arrays.is_empty() && self.file.is_none()
    }

    /// # Errors
    /// [`Error::Request`]: there are choices, and the method draws nothing.
    pub fn check(&self, method: &'static MethodSpec) -> Result<()> {
        match self.is_empty() || !method.choices.is_empty() {
            true => Ok(()),
            false => Err(drawn_by_others(&self.described(), method)),
        }
    }

    fn described(&self) -> String {
        let names: Vec<&str> = self.arrays.keys().map(String::as_str).collect();
        names.join(", ") + &self.place()
    }

    /// ` in FILE`
    fn place(&self) -> String {
        self.file.as_ref().map(|file| format!(" in {}", file.display())).unwrap_or_default()
    }

    /// What a picture that was made with them says of where they are from.
    pub fn source(&self) -> String {
        let name = self.file.as_ref().and_then(|file| file.file_name());
        name.map_or("FILE".into(), |name| name.to_string_lossy().into_owned())
    }

    /// The whole numbers given for `name`; `None`: they are drawn.
    ///
    /// # Errors
    /// [`Error::Request`]: none of this name, of another element type or shape, a value that is not allowed.
    pub(super) fn whole(&self, name: &str, shape: &[usize], allowed: &RangeInclusive<i64>) -> Result<Option<&[i64]>> {
        let Some(array) = self.array(name)? else { return Ok(None) };
        let Values::I64(values) = &array.values else {
            return Err(self.refused(name, format!("is {:?}, expected I64", array.values.dtype())));
        };
        self.check_array(name, array, shape, values, allowed)?;
        Ok(Some(values))
    }

    /// The same of numbers.
    ///
    /// # Errors
    /// As [`whole`](Choices::whole).
    pub(super) fn real(&self, name: &str, shape: &[usize], allowed: &RangeInclusive<f32>) -> Result<Option<&[f32]>> {
        let Some(array) = self.array(name)? else { return Ok(None) };
        let Values::F32(values) = &array.values else {
            return Err(self.refused(name, format!("is {:?}, expected F32", array.values.dtype())));
        };
        self.check_array(name, array, shape, values, allowed)?;
        Ok(Some(values))
    }

    fn array(&self, name: &str) -> Result<Option<&Array>> {
        if self.is_empty() {
            return Ok(None);
        }
        match self.arrays.get(name) {
            Some(array) => Ok(Some(array)),
            None => {
                let held: Vec<&str> = self.arrays.keys().map(String::as_str).collect();
                let held = if held.is_empty() { "none of this method".into() } else { held.join(", ") };
                Err(self.refused(name, format!("is missing; the choices are {held}")))
            }
        }
    }

    fn check_array<T: PartialOrd + Display>(
        &self,
        name: &str,
        array: &Array,
        shape: &[usize],
        values: &[T],
        allowed: &RangeInclusive<T>,
    ) -> Result<()> {
        if array.shape != shape {
            return Err(self.refused(name, format!("has shape {:?}, this run draws {shape:?}", array.shape)));
        }
        match values.iter().position(|value| !allowed.contains(value)) {
            None => Ok(()),
            Some(at) => {
                let (value, first, last) = (&values[at], allowed.start(), allowed.end());
                Err(self.refused(name, format!("value {at} is {value}, expected {first} to {last}")))
            }
        }
    }

    fn refused(&self, name: &str, reason: String) -> Error {
        Error::Request { field: "choices", value: format!("{name}{}", self.place()), reason }
    }
}

/// By bits: a request with NaN is equal to itself.
impl PartialEq for Values {
    fn eq(&self, other: &Values) -> bool {
        match (self, other) {
            (Values::I64(a), Values::I64(b)) => a == b,
            (Values::F32(a), Values::F32(b)) => a.iter().map(|v| v.to_bits()).eq(b.iter().map(|v| v.to_bits())),
            (Values::Other(a), Values::Other(b)) => a == b,
            _ => false,
        }
    }
}

impl Values {
    fn dtype(&self) -> Dtype {
        match self {
            Values::I64(_) => Dtype::I64,
            Values::F32(_) => Dtype::F32,
            Values::Other(dtype) => *dtype,
        }
    }
}

impl MethodSpec {
    /// Does the method draw what a choice of this name stands for? `jitter2` is one of the kind `jitter`.
    pub fn draws(&self, name: &str) -> bool {
        let is_of = |kind: &&str| name.strip_prefix(*kind).is_some_and(|rest| rest.bytes().all(|b| b.is_ascii_digit()));
        self.choices.iter().any(is_of)
    }
}

fn drawn_by_others(value: &dyn Display, method: &MethodSpec) -> Error {
    let with: Vec<&str> = METHODS.iter().filter(|spec| !spec.choices.is_empty()).map(|spec| spec.name).collect();
    let others = if with.is_empty() { String::new() } else { format!("; {} draws something", one_of(&with)) };
    let reason = format!("has no effect with request.method {}, which draws nothing but noise{others}", method.name);
    Error::Request { field: "choices", value: value.to_string(), reason }
}

fn decode<T, const B: usize>(bytes: &[u8], value: impl Fn([u8; B]) -> T) -> Vec<T> {
    bytes.as_chunks::<B>().0.iter().map(|&chunk| value(chunk)).collect()
}
