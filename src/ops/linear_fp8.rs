use rayon::prelude::*;

use super::cpu::gemm::{self, Dense};
use super::cpu::math;
use super::linear::{Epilogue, check, flops, gate_bytes, output_shape};
use super::{Activation, Linear, StepColumns, Tensor, by_dtype, bytes_of, cuda, float, profile};
use crate::error::{Error, Result};
use crate::runtime::{DType, Device, Element, F8E4M3, OpKind, Work};

/// Rows of 8-bit floats with a scale each: a value is its code times the scale of its row. What [`quantize`] makes.
#[derive(Clone, Debug)]
pub struct Quantized {
    /// `[..., K]`, [`DType::F8E4M3`]
    codes: Tensor,
    /// `[rows]`, f32
    scales: Tensor,
}

impl Quantized {
    /// `codes`: `[..., K]` of dtype [`DType::F8E4M3`]; `scales`: `[rows]`, f32, one for each row of `codes`.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: which of the two.
    pub fn new(codes: Tensor, scales: Tensor) -> Result<Quantized> {
        const OP: &str = "Quantized";
        if codes.dtype() != DType::F8E4M3 {
            let want = DType::F8E4M3.to_string();
            return Err(Error::Dtype { op: OP, arg: "codes", got: codes.dtype(), want });
        }
        let rows = rows_of(OP, "codes", &codes)?;
        scales.expect(OP, "scales", &[rows], DType::F32, codes.device())?;
        Ok(Quantized { codes, scales })
    }

    /// `[..., K]`
    pub fn shape(&self) -> &[usize] {
        self.codes.shape()
    }

    pub fn codes(&self) -> &Tensor {
        &self.codes
    }

    pub fn scales(&self) -> &Tensor {
        &self.scales
    }

    /// On another device.
    ///
    /// # Errors
    /// As [`Tensor::to_device`].
    pub fn to_device(&self, device: &Device) -> Result<Quantized> {
        Ok(Quantized { codes: self.codes.to_device(device)?, scales: self.scales.to_device(device)? })
    }
}

fn rows_of(op: &'static str, arg: &'static str, x: &Tensor) -> Result<usize> {
    match x.shape().split_last() {
        Some((_, leading)) => Ok(leading.iter().product()),
        None => Err(Error::shape(op, arg, x, "[..., K]")),
    }
}

/// No row counts as smaller: the reciprocal of its scale is an f32.
const SMALLEST_PEAK: f32 = 1e-30;

/// Each row of `x` (`[..., K]`, any float dtype) as 8-bit floats E4M3, scaled so that its largest magnitude becomes 448:
/// `scale = max |x| / 448`, `code = round(x * (448 / max |x|))`, to nearest even. A row with NaN or an infinity is NaN.
///
/// A row's result depends on that row only, bit for bit.
///
/// # Errors
/// [`Error::Shape`], [`Error::Dtype`]: `x` has no last dimension, or no float dtype; [`Error::OutOfMemory`].
pub fn quantize(x: &Tensor) -> Result<Quantized> {
    const OP: &str = "quantize";
    float(OP, "x", x)?;
    let rows = rows_of(OP, "x", x)?;
    let mut codes = Tensor::uninit(x.device(), x.shape(), DType::F8E4M3)?;
    let mut scales = Tensor::uninit(x.device(), &[rows], DType::F32)?;
    let _timed = profile::scope(OP, codes.shape());
    match x.device() {
        Device::Meta(meta) => {
            // Magnitude, maximum, product.
            let flops = 3 * x.numel() as u64;
            let bytes = bytes_of(&[Some(x), Some(&codes), Some(&scales)]);
            let launches = u64::from(rows > 0);
            meta.record(OP, OpKind::Elementwise, codes.shape(), Work { macs: 0, flops, bytes, launches });
        }
        Device::Cpu(_) | Device::Cuda(_) if rows == 0 => {}
        Device::Cpu(_) => by_dtype!(x.dtype(), T => quantize_cpu::<T>(x, &mut codes, &mut scales)),
        Device::Cuda(card) => cuda::linear_fp8::quantize(card, x, &mut codes, &mut scales)?,
    }
    Ok(Quantized { codes, scales })
}

fn quantize_cpu<T: Element>(x: &Tensor, codes: &mut Tensor, scales: &mut Tensor) {
    let k = x.shape().last().copied().unwrap_or(0);
    let (x, codes) = (x.cpu::<T>(), codes.cpu_mut::<F8E4M3>());
    if k == 0 {
        return scales.cpu_mut::<f32>().fill(SMALLEST_PEAK / F8E4M3::MAX);
    }
    let rows = x.par_chunks_exact(k).zip(codes.par_chunks_exact_mut(k)).zip(scales.cpu_mut::<f32>());
    rows.for_each_init(
        || vec![0.0; k],
        |values, ((x, codes), scale)| {
            math::load(values, x);
            // NaN stays, once it is there.
            let larger = |a: f32, b: f32| if b > a || b.is_nan() { b } else { a };
            let peak = values.iter().fold(SMALLEST_PEAK, |peak, x| larger(peak, x.abs()));
            let up = F8E4M3::MAX / peak;
            values.iter_mut().for_each(|x| *x *= up);
            math::store(codes, values);
            *scale = peak / F8E4M3::MAX;
        },
    );
}

/// Arguments of [`linear_fp8`].
#[derive(Clone, Copy, Debug)]
pub struct LinearFp8<'a> {
    /// `[..., K]`
    pub x: &'a Quantized,
    /// `[N, K]`; for GEGLU `[2 * N, K]` with rows interleaved, as in [`Linear`].
    pub weight: &'a Quantized,
    /// `[rows of weight]`, of dtype `dtype`
    pub bias: Option<&'a Tensor>,
    pub activation: Activation,
    /// As in [`Linear`], a table of dtype `dtype`.
    pub gate: Option<StepColumns<'a>>,
    /// `[..., N]`, of dtype `dtype`, added last.
    pub residual: Option<&'a Tensor>,
    /// Of the result: a float dtype.
    pub dtype: DType,
}

/// [`linear`](super::linear()) of operands in 8-bit floats: `gate * activation(x W^T + bias) + residual`, `[..., K]` to `[..., N]`.
///
/// The codes' products are exact; their sums are f32, and get the scales of both rows at the end. On Hopper, whose tensor
/// cores keep some 14 bits of such sums, those of 128 terms are added up in f32: without that, sums of 5120 positive terms
/// err by 9 %. What is left is what [`quantize`] rounds away, 3.6 % of each normal value.
///
/// # Errors
/// As [`linear`](super::linear()); [`Error::Dtype`]: `dtype` is no float type.
pub fn linear_fp8(args: LinearFp8) -> Result<Tensor> {
    const OP: &str = "linear_fp8";
    let LinearFp8 { x, weight, bias, activation, gate, residual, dtype } = args;
    if !dtype.is_float() {
        return Err(Error::Dtype { op: OP, arg: "dtype", got: dtype, want: "f32, f16 or bf16".into() });
    }
    let codes = Linear { x: &x.codes, weight: &weight.codes, bias, activation, gate, residual };
    let [m, n, k] = check(OP, &codes, DType::F8E4M3, dtype)?;

    let mut y = Tensor::uninit(x.codes.device(), &output_shape(&x.codes, n), dtype)?;
    let _timed = profile::scope(OP, y.shape());
    match x.codes.device() {
        Device::Meta(meta) => {
            let rows = weight.codes.shape()[0];
            let (macs, launches) = ((m * rows * k) as u64, u64::from(y.numel() > 0));
            let flops = flops(&codes, [m, n, k]) + 2 * (m * rows) as u64;
            let operands = [&x.codes, &x.scales, &weight.codes, &weight.scales];
            let bytes = bytes_of(&operands.map(Some)) + bytes_of(&[bias, residual, Some(&y)]) + gate_bytes(&codes, n);
            meta.record(OP, OpKind::Linear, y.shape(), Work { macs, flops, bytes, launches });
        }
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) => by_dtype!(dtype, T => {
            let (left, right) = (x.codes.cpu::<F8E4M3>(), weight.codes.cpu::<F8E4M3>());
            let scales = [x.scales.cpu::<f32>(), weight.scales.cpu::<f32>()];
            let epilogue = Epilogue::<T>::new(&codes, Some(scales), n, &mut y);
            gemm::matmul([m, weight.codes.shape()[0], k], &Dense { x: left, k }, right, &epilogue)
        }),
        Device::Cuda(card) => cuda::linear_fp8::linear_fp8(card, &args, [m, n, k], &mut y)?,
    }
    Ok(y)
}
