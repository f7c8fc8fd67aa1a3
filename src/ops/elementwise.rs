use rayon::prelude::*;

use super::cpu::math;
use super::{Tensor, by_dtype, bytes_of, cuda, float, profile};
use crate::error::{Error, Result};
use crate::runtime::{DType, Device, Element, OpKind, Work};

/// Elements one task works on: enough to outweigh its start, few enough to stay in the first-level caches.
pub(super) const CHUNK: usize = 8192;

/// Pointwise nonlinearity, alone or in a linear's epilogue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    None,
    /// `x / (1 + exp(-x))`
    Silu,
    /// `x/2 (1 + erf(x / sqrt 2))`, exact
    Gelu,
    /// `x / (1 + exp(-1.702 x))`
    QuickGelu,
    /// `value * gelu(gate)` on interleaved pairs: halves the columns. Only in [`linear`](super::linear).
    Geglu,
    /// `x/2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`: GELU's approximation of Hendrycks & Gimpel 2016, arXiv:1606.08415
    GeluTanh,
    /// `value * gelu_tanh(gate)` on interleaved pairs, as GEGLU.
    GegluTanh,
}

impl Activation {
    /// Every one of them.
    pub const ALL: [Activation; 7] = [
        Activation::None,
        Activation::Silu,
        Activation::Gelu,
        Activation::QuickGelu,
        Activation::Geglu,
        Activation::GeluTanh,
        Activation::GegluTanh,
    ];

    /// Does it multiply values by gates, so that it halves the columns?
    pub fn is_gated(self) -> bool {
        matches!(self, Activation::Geglu | Activation::GegluTanh)
    }
}

/// `activation(x)`, same shape and dtype.
///
/// # Errors
/// [`Error::Dtype`](crate::Error::Dtype); [`Error::Argument`](crate::Error::Argument) for those that are gated.
pub fn activation(x: &Tensor, activation: Activation) -> Result<Tensor> {
    const OP: &str = "activation";
    float(OP, "x", x)?;
    if activation.is_gated() {
        let want = "None, Silu, Gelu, QuickGelu or GeluTanh; GEGLU is part of linear";
        return Err(Error::argument(OP, "activation", format!("{activation:?}"), want));
    }

    let mut y = Tensor::uninit(x.device(), x.shape(), x.dtype())?;
    let _timed = profile::scope(OP, y.shape());
    match x.device() {
        Device::Meta(meta) => meta.record(OP, OpKind::Elementwise, y.shape(), pointwise(&y, &[Some(x)], 4)),
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) => by_dtype!(x.dtype(), T => {
            map::<T, T>(x.cpu(), y.cpu_mut(), |values| math::activate(activation, values));
        }),
        Device::Cuda(card) => cuda::elementwise::activation(card, x, activation, &mut y)?,
    }
    Ok(y)
}

/// `a + b`, same shape and dtype.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::Dtype`](crate::Error::Dtype), [`Error::Device`](crate::Error::Device).
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    add_scaled(a, b, 1.0)
}

/// `a + scale * b` in f32, same shape and dtype; recorded as `add`.
///
/// # Errors
/// As [`add`].
pub fn add_scaled(a: &Tensor, b: &Tensor, scale: f32) -> Result<Tensor> {
    const OP: &str = "add";
    float(OP, "a", a)?;
    b.expect(OP, "b", a.shape(), a.dtype(), a.device())?;

    let mut y = Tensor::uninit(a.device(), a.shape(), a.dtype())?;
    let _timed = profile::scope(OP, y.shape());
    match a.device() {
        Device::Meta(meta) => {
            let flops = if scale == 1.0 { 1 } else { 2 };
            meta.record(OP, OpKind::Elementwise, y.shape(), pointwise(&y, &[Some(a), Some(b)], flops));
        }
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) => by_dtype!(a.dtype(), T => add_cpu::<T>(a, b, scale, &mut y)),
        Device::Cuda(card) => cuda::elementwise::add(card, a, b, scale, &mut y)?,
    }
    Ok(y)
}

fn add_cpu<T: Element>(a: &Tensor, b: &Tensor, scale: f32, y: &mut Tensor) {
    let (a, b) = (a.cpu::<T>(), b.cpu::<T>());
    y.cpu_mut::<T>().par_chunks_mut(CHUNK).zip(a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK))).for_each(|(y, (a, b))| {
        for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
            *y = T::from_f32(a.to_f32() + scale * b.to_f32());
        }
    });
}

/// `a + scale * mask * b` in f32: `a`, `b` `[N, L, ...]`, and for each of the L tokens one of `mask` `[L]`, f32. An image prompt that
/// counts on a part of the picture (IP-Adapter, Ye et al. 2023, arXiv:2308.06721).
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::Dtype`](crate::Error::Dtype), [`Error::Device`](crate::Error::Device).
pub fn add_masked(a: &Tensor, b: &Tensor, mask: &Tensor, scale: f32) -> Result<Tensor> {
    const OP: &str = "add_masked";
    float(OP, "a", a)?;
    b.expect(OP, "b", a.shape(), a.dtype(), a.device())?;
    let &[_, tokens, ..] = a.shape() else {
        return Err(Error::shape(OP, "a", a, "[N, L, ...]"));
    };
    mask.expect(OP, "mask", &[tokens], DType::F32, a.device())?;

    let mut y = Tensor::uninit(a.device(), a.shape(), a.dtype())?;
    let _timed = profile::scope(OP, y.shape());
    match a.device() {
        Device::Meta(meta) => {
            meta.record(OP, OpKind::Elementwise, y.shape(), pointwise(&y, &[Some(a), Some(b), Some(mask)], 3));
        }
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) => by_dtype!(a.dtype(), T => add_masked_cpu::<T>(a, b, mask.cpu(), scale, &mut y)),
        Device::Cuda(card) => cuda::elementwise::add_masked(card, a, b, mask, scale, &mut y)?,
    }
    Ok(y)
}

fn add_masked_cpu<T: Element>(a: &Tensor, b: &Tensor, mask: &[f32], scale: f32, y: &mut Tensor) {
    let row = a.shape()[2..].iter().product();
    let (a, b) = (a.cpu::<T>().par_chunks(row), b.cpu::<T>().par_chunks(row));
    let rows = y.cpu_mut::<T>().par_chunks_mut(row).with_min_len(CHUNK.div_ceil(row)).enumerate();
    rows.zip(a.zip(b)).for_each(|((i, y), (a, b))| {
        let factor = scale * mask[i % mask.len()];
        for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
            *y = T::from_f32(a.to_f32() + factor * b.to_f32());
        }
    });
}

/// `a` and `b` side by side on the last dimension: `[..., C_a]` and `[..., C_b]` to `[..., C_a + C_b]`. For what reads more
/// parts than the two of a [`Source`](super::Source).
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::Dtype`](crate::Error::Dtype), [`Error::Device`](crate::Error::Device).
pub fn concat(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    const OP: &str = "concat";
    float(OP, "a", a)?;
    let (Some((&of_a, rows)), Some(&of_b)) = (a.shape().split_last(), b.shape().last()) else {
        let scalar = if a.shape().is_empty() { ("a", a) } else { ("b", b) };
        return Err(Error::shape(OP, scalar.0, scalar.1, "[..., C]"));
    };
    b.expect(OP, "b", &[rows, &[of_b]].concat(), a.dtype(), a.device())?;

    let mut y = Tensor::uninit(a.device(), &[rows, &[of_a + of_b]].concat(), a.dtype())?;
    let _timed = profile::scope(OP, y.shape());
    match a.device() {
        Device::Meta(meta) => meta.record(OP, OpKind::Elementwise, y.shape(), pointwise(&y, &[Some(a), Some(b)], 0)),
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) => by_dtype!(a.dtype(), T => {
            let (a, b) = (a.cpu::<T>(), b.cpu::<T>());
            y.cpu_mut::<T>().par_chunks_mut(of_a + of_b).with_min_len(64).enumerate().for_each(|(row, y)| {
                y[..of_a].copy_from_slice(&a[row * of_a..][..of_a]);
                y[of_a..].copy_from_slice(&b[row * of_b..][..of_b]);
            });
        }),
        Device::Cuda(card) => cuda::elementwise::concat(card, a, b, &mut y)?,
    }
    Ok(y)
}

/// `a` and `b` one after the other on the first dimension: `[A, ...]` and `[B, ...]` to `[A + B, ...]`; recorded as `concat`.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::Dtype`](crate::Error::Dtype), [`Error::Device`](crate::Error::Device).
pub fn stack(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    const OP: &str = "concat";
    let (Some((of_a, rest)), Some(of_b)) = (a.shape().split_first(), b.shape().first()) else {
        let scalar = if a.shape().is_empty() { ("a", a) } else { ("b", b) };
        return Err(Error::shape(OP, scalar.0, scalar.1, "[N, ...]"));
    };
    b.expect(OP, "b", &[&[*of_b], rest].concat(), a.dtype(), a.device())?;
    let line = |x: &Tensor| x.reshape(&[1, x.numel()]);
    concat(&line(a)?, &line(b)?)?.reshape(&[&[of_a + of_b], rest].concat())
}

/// `min(max(x, low), high)`, same shape and dtype; NaN stays NaN.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when `low > high` or one of them is NaN;
/// [`Error::Dtype`](crate::Error::Dtype).
pub fn clamp(x: &Tensor, low: f32, high: f32) -> Result<Tensor> {
    const OP: &str = "clamp";
    float(OP, "x", x)?;
    ordered(OP, "low, high", low, high)?;

    let mut y = Tensor::uninit(x.device(), x.shape(), x.dtype())?;
    let _timed = profile::scope(OP, y.shape());
    match x.device() {
        Device::Meta(meta) => meta.record(OP, OpKind::Elementwise, y.shape(), pointwise(&y, &[Some(x)], 2)),
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) => by_dtype!(x.dtype(), T => {
            map::<T, T>(x.cpu(), y.cpu_mut(), |values| {
                values.iter_mut().for_each(|value| *value = value.clamp(low, high));
            });
        }),
        Device::Cuda(card) => cuda::elementwise::clamp(card, x, low, high, &mut y)?,
    }
    Ok(y)
}

/// `scale * x + shift`, rounded to `dtype`, repeated along the batch: `[N, ...]` to `[repeats * N, ...]` (all rows, then
/// all rows again: the unconditional and the conditional half of classifier-free guidance).
///
/// # Errors
/// [`Error::Dtype`](crate::Error::Dtype); [`Error::Shape`](crate::Error::Shape): no batch dimension;
/// [`Error::Argument`](crate::Error::Argument) when `repeats` is 0.
pub fn scale_cast(x: &Tensor, scale: f32, shift: f32, dtype: DType, repeats: usize) -> Result<Tensor> {
    const OP: &str = "scale_cast";
    float(OP, "x", x)?;
    if !dtype.is_float() {
        return Err(Error::Dtype { op: OP, arg: "dtype", got: dtype, want: "f32, f16 or bf16".into() });
    }
    if repeats == 0 {
        return Err(Error::argument(OP, "repeats", repeats, "at least 1"));
    }
    let Some(&n) = x.shape().first() else {
        return Err(Error::shape(OP, "x", x, "[N, ...]"));
    };
    let mut shape = x.shape().to_vec();
    shape[0] = n.checked_mul(repeats).ok_or(Error::TooLarge {
        op: OP,
        what: "repeats * N",
        got: n as u128 * repeats as u128,
        limit: usize::MAX as u128,
    })?;

    let mut y = Tensor::uninit(x.device(), &shape, dtype)?;
    let _timed = profile::scope(OP, y.shape());
    match x.device() {
        Device::Meta(meta) => meta.record(OP, OpKind::Elementwise, y.shape(), pointwise(&y, &[Some(x)], 2)),
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) => by_dtype!(x.dtype(), T => by_dtype!(dtype, U => {
            scale_cast_cpu::<T, U>(x, scale, shift, &mut y);
        })),
        Device::Cuda(card) => cuda::elementwise::scale_cast(card, x, scale, shift, repeats, &mut y)?,
    }
    Ok(y)
}

fn scale_cast_cpu<T: Element, U: Element>(x: &Tensor, scale: f32, shift: f32, y: &mut Tensor) {
    for part in y.cpu_mut::<U>().chunks_exact_mut(x.numel()) {
        map::<T, U>(x.cpu(), part, |values| values.iter_mut().for_each(|value| *value = scale * *value + shift));
    }
}

/// How many elements are NaN or infinite; 0 on the meta device. On a card one counter comes back to the host, which waits
/// for it.
///
/// # Errors
/// [`Error::Dtype`](crate::Error::Dtype); [`Error::Driver`](crate::Error::Driver), also that of earlier work.
pub fn count_non_finite(x: &Tensor) -> Result<usize> {
    const OP: &str = "count_non_finite";
    float(OP, "x", x)?;

    let _timed = profile::scope(OP, &[1]);
    match x.device() {
        Device::Meta(meta) => {
            let _counter = Tensor::zeros(x.device(), &[1], DType::U32)?;
            let (flops, bytes) = (x.numel() as u64, x.bytes());
            meta.record(OP, OpKind::Elementwise, &[1], Work { macs: 0, flops, bytes, launches: 1 });
            Ok(0)
        }
        Device::Cpu(_) | Device::Cuda(_) if x.numel() == 0 => Ok(0),
        Device::Cpu(_) => Ok(by_dtype!(x.dtype(), T => count_non_finite_cpu::<T>(x))),
        Device::Cuda(card) => {
            let mut counter = Tensor::zeros(x.device(), &[1], DType::U32)?;
            cuda::elementwise::count_non_finite(card, x, &mut counter)?;
            Ok(counter.to_device(&Device::cpu())?.cpu::<u32>()[0] as usize)
        }
    }
}

fn count_non_finite_cpu<T: Element>(x: &Tensor) -> usize {
    let count = |chunk: &[T]| chunk.iter().filter(|value| !value.to_f32().is_finite()).count();
    x.cpu::<T>().par_chunks(CHUNK).map(count).sum()
}

/// `low <= high`, neither of them NaN.
pub(super) fn ordered(op: &'static str, arg: &'static str, low: f32, high: f32) -> Result<()> {
    if low <= high { Ok(()) } else { Err(Error::argument(op, arg, format!("{low}, {high}"), "low <= high, not NaN")) }
}

/// The work of one launch that reads `inputs`, writes `y` and spends `flops` per element of `y`.
pub(super) fn pointwise(y: &Tensor, inputs: &[Option<&Tensor>], flops: u64) -> Work {
    Work { macs: 0, flops: flops * y.numel() as u64, bytes: y.bytes() + bytes_of(inputs), launches: 1 }
}

/// `y = f(x)` in f32, a chunk at a time.
pub(super) fn map<T: Element, U: Element>(x: &[T], y: &mut [U], f: impl Fn(&mut [f32]) + Sync) {
    y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each_init(
        || vec![0.0; CHUNK],
        |values, (y, x)| {
            let values = &mut values[..x.len()];
            math::load(values, x);
            f(values);
            math::store(y, values);
        },
    );
}
