use super::StepTable;
use crate::error::{Error, Result};
use crate::ops::elementwise::{map, pointwise};
use crate::ops::{by_dtype, cuda, profile};
use crate::runtime::{DType, Device, Element, OpKind, Tensor};

/// `input_scale * x` with the scale of each image's step, rounded to `dtype`, `repeats` times along the batch: what the
/// network reads. `x: [N, ...]`, f32, to `[repeats * N, ...]`. An image that has ended is scaled as in its last step.
///
/// # Errors
/// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: which argument; [`Error::Argument`]: `repeats` is 0, every image
/// has ended, a number of images that the table's does not divide; [`Error::TooLarge`].
pub fn scale_input(x: &Tensor, steps: &StepTable, dtype: DType, repeats: usize) -> Result<Tensor> {
    const OP: &str = "scale_input";
    x.expect(OP, "x", x.shape(), DType::F32, steps.tensor().device())?;
    let Some((&n, rest)) = x.shape().split_first() else {
        return Err(Error::shape(OP, "x", x, "[N, ...]"));
    };
    steps.check(OP, n)?;
    if !dtype.is_float() {
        return Err(Error::Dtype { op: OP, arg: "dtype", got: dtype, want: "f32, f16 or bf16".into() });
    }
    if repeats == 0 {
        return Err(Error::argument(OP, "repeats", repeats, "at least 1"));
    }
    let (got, limit) = (n as u128 * repeats as u128, isize::MAX as u128);
    if got > limit {
        return Err(Error::TooLarge { op: OP, what: "repeats * N", got, limit });
    }

    let mut y = Tensor::uninit(x.device(), &[&[n * repeats], rest].concat(), dtype)?;
    let _timed = profile::scope(OP, y.shape());
    match x.device() {
        Device::Meta(meta) => meta.record(OP, OpKind::Elementwise, y.shape(), pointwise(&y, &[Some(x)], 1)),
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) => by_dtype!(dtype, T => scale_input_cpu::<T>(x, steps, &mut y)),
        Device::Cuda(card) => cuda::step::scale_input(card, x, steps, repeats, &mut y)?,
    }
    Ok(y)
}

fn scale_input_cpu<T: Element>(x: &Tensor, steps: &StepTable, y: &mut Tensor) {
    let n = x.shape()[0];
    let (x, per_image) = (x.cpu::<f32>(), x.numel() / n);
    for (i, y) in y.cpu_mut::<T>().chunks_exact_mut(per_image).enumerate() {
        let image = i % n;
        let scale = steps.row(image).input_scale;
        let x = &x[image * per_image..][..per_image];
        map::<f32, T>(x, y, |values| values.iter_mut().for_each(|value| *value *= scale));
    }
}
