//! What the oracles saved as safetensors, and how far a result is from it.
#![allow(dead_code)] // each test binary uses a part

use std::collections::BTreeMap;
use std::path::Path;

use megafuse::{DType, Device, Tensor};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

/// By name: shape and values.
pub type Arrays = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// The f32 tensors of a file.
pub fn arrays(path: &Path) -> Arrays {
    let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let float = |(_, view): &(&str, TensorView)| view.dtype() == Dtype::F32;
    let array = |(name, view): (&str, TensorView)| {
        (name.to_string(), (view.shape().to_vec(), bytemuck::pod_collect_to_vec(view.data())))
    };
    file.iter().filter(float).map(array).collect()
}

/// `[N, C, H, W]` to `[N, H, W, C]`.
pub fn channels_last(device: &Device, dtype: DType, (shape, values): &(Vec<usize>, Vec<f32>)) -> Tensor {
    let [n, c, h, w] = shape[..] else { panic!("4 dimensions, not {shape:?}") };
    let at = |i: usize| ((i / c / w / h * c + i % c) * h + i / c / w % h) * w + i / c % w;
    let values: Vec<f32> = (0..n * h * w * c).map(|i| values[at(i)]).collect();
    Tensor::from_f32(device, &[n, h, w, c], dtype, &values).expect("a tensor")
}

/// The largest error of an element, relative to the larger of its size and the root mean square of all; and that of the
/// root mean square error.
pub fn errors(got: &Tensor, want: &Tensor) -> (f64, f64) {
    assert_eq!(got.shape(), want.shape());
    errors_of(&got.to_f32_vec().expect("values"), &want.to_f32_vec().expect("values"))
}

/// The same of values.
pub fn errors_of(got: &[f32], want: &[f32]) -> (f64, f64) {
    assert_eq!(got.len(), want.len());
    let values = |x: &[f32]| x.iter().copied().map(f64::from).collect::<Vec<_>>();
    let (got, want) = (values(got), values(want));
    let rms = |x: &mut dyn Iterator<Item = f64>| (x.map(|x| x * x).sum::<f64>() / want.len() as f64).sqrt();
    let size = rms(&mut want.iter().copied());
    let worst = got.iter().zip(&want).map(|(got, want)| (got - want).abs() / want.abs().max(size));
    let worst = worst.fold(0.0, |a: f64, b| if b.is_nan() { f64::INFINITY } else { a.max(b) });
    (worst, rms(&mut got.iter().zip(&want).map(|(got, want)| got - want)) / size)
}
