use super::cpu::gemm::{self, Dense, Store};
use super::cpu::{self, OutputRows, math};
use super::{Activation, Tensor, by_dtype, bytes_of, cases, cuda, float, profile};
use crate::error::{Error, Result};
use crate::runtime::{Device, Element, OpKind, Work};

const OP: &str = "linear";

/// Arguments of [`linear`].
#[derive(Clone, Copy, Debug)]
pub struct Linear<'a> {
    /// `[..., K]`
    pub x: &'a Tensor,
    /// `[N, K]`; for GEGLU `[2 * N, K]` with rows interleaved: row `2j` is value j, row `2j + 1` its gate.
    pub weight: &'a Tensor,
    /// `[rows of weight]`
    pub bias: Option<&'a Tensor>,
    pub activation: Activation,
    /// `[..., N]`, added last.
    pub residual: Option<&'a Tensor>,
}

impl<'a> Linear<'a> {
    pub fn new(x: &'a Tensor, weight: &'a Tensor) -> Linear<'a> {
        Linear { x, weight, bias: None, activation: Activation::None, residual: None }
    }
}

/// `activation(x W^T + bias) + residual`: `[..., K]` to `[..., N]`, dtype of `x`.
///
/// A row of the result depends on its own row of `x` only, bit for bit: not on the other rows, nor on the number of
/// threads.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::Dtype`](crate::Error::Dtype), [`Error::Device`](crate::Error::Device):
/// which argument; [`Error::OutOfMemory`](crate::Error::OutOfMemory).
pub fn linear(args: Linear) -> Result<Tensor> {
    let Linear { x, weight, bias, activation, residual } = args;
    float(OP, "x", x)?;
    let Some((&k, leading)) = x.shape().split_last() else {
        return Err(Error::shape(OP, "x", x, "[..., K]"));
    };
    let [weight_rows, _] = weight.dims(OP, "weight")?;
    weight.expect(OP, "weight", &[weight_rows, k], x.dtype(), x.device())?;
    let n = match activation {
        Activation::Geglu if weight_rows % 2 != 0 => {
            return Err(Error::shape(OP, "weight", weight, "an even number of rows: GEGLU's values and gates"));
        }
        Activation::Geglu => weight_rows / 2,
        _ => weight_rows,
    };
    if let Some(bias) = bias {
        bias.expect(OP, "bias", &[weight_rows], x.dtype(), x.device())?;
    }
    let output_shape = [leading, &[n]].concat();
    if let Some(residual) = residual {
        residual.expect(OP, "residual", &output_shape, x.dtype(), x.device())?;
    }

    let mut y = Tensor::uninit(x.device(), &output_shape, x.dtype())?;
    let m: usize = leading.iter().product();
    let _timed = profile::scope(OP, y.shape());
    profile::call(OP, || cases::linear_shape([m, weight_rows, k], bias.is_some(), activation, residual.is_some()));
    match x.device() {
        Device::Meta(meta) => {
            let macs = (m * weight_rows * k) as u64;
            let per_row = weight_rows as u64 * u64::from(bias.is_some())
                + n as u64 * (activation_flops(activation) + u64::from(residual.is_some()));
            let flops = 2 * macs + m as u64 * per_row;
            let bytes = bytes_of(&[Some(x), Some(weight), bias, residual, Some(&y)]);
            let launches = u64::from(y.numel() > 0);
            meta.record(OP, OpKind::Linear, y.shape(), Work { macs, flops, bytes, launches });
        }
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) => by_dtype!(x.dtype(), T => linear_cpu::<T>(&args, [m, n, k], &mut y)),
        Device::Cuda(card) => cuda::linear::linear(card, &args, [m, n, k], &mut y)?,
    }
    Ok(y)
}

/// Flops per output element, counted by the formula with exp and erf as one each; GEGLU's includes the product.
pub(super) fn activation_flops(activation: Activation) -> u64 {
    match activation {
        Activation::None => 0,
        Activation::Silu => 4,
        Activation::QuickGelu | Activation::Gelu => 5,
        Activation::Geglu => 6,
    }
}

fn linear_cpu<T: Element>(args: &Linear, [m, n, k]: [usize; 3], y: &mut Tensor) {
    let bias = args.bias.map(cpu::to_f32::<T>);
    let residual = args.residual.map(|r| r.cpu::<T>());
    let weight_rows = args.weight.shape()[0];
    let epilogue = Epilogue { bias, activation: args.activation, residual, n, y: OutputRows::new(y.cpu_mut::<T>(), n) };
    gemm::matmul([m, weight_rows, k], &Dense { x: args.x.cpu::<T>(), k }, args.weight.cpu::<T>(), &epilogue);
}

struct Epilogue<'a, T> {
    bias: Option<Vec<f32>>,
    activation: Activation,
    residual: Option<&'a [T]>,
    n: usize,
    y: OutputRows<'a, T>,
}

impl<T: Element> Store for Epilogue<'_, T> {
    fn store(&self, row: usize, column: usize, sums: &mut [f32]) {
        if let Some(bias) = &self.bias {
            math::add(sums, &bias[column..column + sums.len()]);
        }
        math::activate(self.activation, sums);
        // A block of columns begins at a multiple of the panel width, so never between a value and its gate.
        let (column, len) = match self.activation {
            Activation::Geglu => (column / 2, sums.len() / 2),
            _ => (column, sums.len()),
        };
        let sums = &mut sums[..len];
        if let Some(residual) = self.residual {
            math::add(sums, &residual[row * self.n + column..][..len]);
        }
        // SAFETY: matmul calls store once for each row and column.
        math::store(unsafe { self.y.get(row, column..column + len) }, sums);
    }
}
