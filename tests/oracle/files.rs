//! Expected files, the program's results, and how they are compared.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// The small Stable Diffusion models: directories of tests/data.
pub const MODELS: [&str; 8] = ["sd15", "sd21", "four-levels", "no-quant", "defaults", "mixed", "wide", "zero-snr"];
/// The small SDXL models.
pub const SDXL_MODELS: [&str; 6] =
    ["sdxl", "sdxl-encoded-negative", "sdxl-turbo", "sdxl-v-zero-snr", "sdxl-shards", "sdxl-odd"];

pub fn data(path: impl AsRef<Path>) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(path)
}

pub fn json(path: impl AsRef<Path>) -> Value {
    let path = data(path);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Row-major values, as f32 whatever the file holds (token ids are far below 2^24).
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

/// A safetensors file.
pub struct Arrays(pub BTreeMap<String, Array>);

impl Arrays {
    pub fn read(path: impl AsRef<Path>) -> Arrays {
        let path = path.as_ref();
        let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let file = SafeTensors::deserialize(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let array = |view: &TensorView| Array { shape: view.shape().to_vec(), values: values(view) };
        Arrays(file.iter().map(|(name, view)| (name.to_string(), array(&view))).collect())
    }

    pub fn get(&self, name: &str) -> &Array {
        let names = || self.0.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        self.0.get(name).unwrap_or_else(|| panic!("no tensor {name} among {}", names()))
    }
}

fn values(view: &TensorView) -> Vec<f32> {
    let bytes = view.data();
    match view.dtype() {
        Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
        Dtype::I64 => bytes.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f32).collect(),
        Dtype::U8 => bytes.iter().map(|&b| f32::from(b)).collect(),
        other => panic!("a {other:?} tensor"),
    }
}

/// Writes an input file for `megafuse probe`.
pub fn write(path: &Path, arrays: &[(&str, Array)]) {
    let bytes: Vec<Vec<u8>> = arrays.iter().map(|(_, a)| bytemuck::cast_slice(&a.values).to_vec()).collect();
    let views = arrays.iter().zip(&bytes).map(|((name, array), bytes)| {
        (*name, TensorView::new(Dtype::F32, array.shape.clone(), bytes).expect("values fill the shape"))
    });
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// Runs the program.
///
/// # Errors
/// What it wrote to standard error, when it did not succeed.
pub fn megafuse<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> Result<(), String> {
    let output = Command::new(env!("CARGO_BIN_EXE_megafuse")).args(args).output().expect("the program starts");
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim())),
    }
}

/// Element by element: an error of at most `tolerance` of max(|want|, rms of want).
///
/// # Errors
/// The worst element, in words.
pub fn compare(what: &str, got: &Array, want: &Array, tolerance: f64) -> Result<(), String> {
    if got.shape != want.shape {
        return Err(format!("{what}: shape {:?}, expected {:?}", got.shape, want.shape));
    }
    let (index, error) = worst(got, want);
    if error <= tolerance {
        return Ok(());
    }
    let (got, want, at) = (got.values[index], want.values[index], position(index, &want.shape));
    Err(format!("{what}{at:?} is {got}, expected {want}: off by {error:.1e}, allowed {tolerance:.0e}"))
}

/// Of all elements: the root mean square of the error, relative to that of `want`.
pub fn rms_error(got: &Array, want: &Array) -> f64 {
    assert_eq!(got.shape, want.shape);
    let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
    let want_squares = squares(&mut want.values.iter().map(|&x| f64::from(x)));
    let errors = got.values.iter().zip(&want.values).map(|(&got, &want)| f64::from(got) - f64::from(want));
    (squares(&mut { errors }) / want_squares).sqrt()
}

/// The element with the largest error relative to max(|want|, rms), and that error; infinite where one is not finite.
fn worst(got: &Array, want: &Array) -> (usize, f64) {
    let squares: f64 = want.values.iter().map(|&x| f64::from(x).powi(2)).sum();
    let rms = (squares / want.values.len().max(1) as f64).sqrt().max(f64::MIN_POSITIVE);
    let errors = got.values.iter().zip(&want.values).map(|(&got, &want)| {
        let (got, want) = (f64::from(got), f64::from(want));
        let error = (got - want).abs() / want.abs().max(rms);
        if error.is_nan() { f64::INFINITY } else { error }
    });
    errors.enumerate().max_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or((0, 0.0))
}

fn position(mut index: usize, shape: &[usize]) -> Vec<usize> {
    let mut at: Vec<usize> = shape
        .iter()
        .rev()
        .map(|&n| {
            let i = index % n;
            index /= n;
            i
        })
        .collect();
    at.reverse();
    at
}

/// Panics with all failures at once: one look then shows what they have in common.
pub fn all_passed(results: Vec<Result<(), String>>) {
    let total = results.len();
    assert!(total > 0, "nothing was compared");
    let failures: Vec<String> = results.into_iter().filter_map(Result::err).collect();
    assert!(failures.is_empty(), "{} of {total} comparisons failed:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn a_comparison_sees_one_wrong_element() {
    let want = Array { shape: vec![2, 3], values: vec![1.0, -2.0, 0.0, 4.0, 0.5, 1.0] };
    assert_eq!(compare("x", &want, &want, 0.0), Ok(()));
    let mut got = want.clone();
    got.values[5] += 1e-3;
    assert!(compare("x", &got, &want, 1e-4).unwrap_err().starts_with("x[1, 2] is 1.001, expected 1"));
    assert_eq!(compare("x", &got, &want, 1e-3), Ok(()));
    got.values[5] = f32::NAN;
    assert!(compare("x", &got, &want, 1e9).is_err());
    let flat = Array { shape: vec![6], ..want.clone() };
    assert!(compare("x", &flat, &want, 1.0).unwrap_err().contains("shape"));
}
