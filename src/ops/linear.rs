use super::cpu::gemm::{self, Dense, Store};
use super::cpu::{self, OutputRows, math};
use super::{Activation, StepColumns, Tensor, by_dtype, bytes_of, cases, cuda, float, profile};
use crate::error::{Error, Result};
use crate::runtime::{DType, Device, Element, OpKind, Work};

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
    /// The result is multiplied by N columns of the row of its image, before the residual is added; `x` is `[images, ..., K]` then,
    /// and there is no activation. The gates of a diffusion transformer: Peebles & Xie 2023, arXiv:2212.09748, sec. 3.2.
    pub gate: Option<StepColumns<'a>>,
    /// `[..., N]`, added last.
    pub residual: Option<&'a Tensor>,
}

impl<'a> Linear<'a> {
    pub fn new(x: &'a Tensor, weight: &'a Tensor) -> Linear<'a> {
        Linear { x, weight, bias: None, activation: Activation::None, gate: None, residual: None }
    }

    /// Of `m` rows of x, those of an image: for each of them there is a row of the gate.
    pub(super) fn image_rows(&self, m: usize) -> usize {
        let images = if self.gate.is_some() { self.x.shape()[0] } else { 1 };
        m / images.max(1)
    }
}

/// `gate * activation(x W^T + bias) + residual`: `[..., K]` to `[..., N]`, dtype of `x`.
///
/// A row of the result depends on its own row of `x` only, bit for bit: not on the other rows, nor on the number of
/// threads.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::Dtype`](crate::Error::Dtype), [`Error::Device`](crate::Error::Device):
/// which argument; [`Error::Argument`](crate::Error::Argument): a gate beside an activation, of other images, or a step beyond
/// its table; [`Error::OutOfMemory`](crate::Error::OutOfMemory).
pub fn linear(args: Linear) -> Result<Tensor> {
    let Linear { x, weight, bias, activation, gate, residual } = args;
    float(OP, "x", x)?;
    let [m, n, k] = check(OP, &args, x.dtype(), x.dtype())?;

    let mut y = Tensor::uninit(x.device(), &output_shape(x, n), x.dtype())?;
    let _timed = profile::scope(OP, y.shape());
    let rows = weight.shape()[0];
    profile::call(OP, || {
        let gate = gate.map(|gate| [x.shape()[0], gate.rows.rows]);
        cases::linear_shape([m, rows, k], bias.is_some(), activation, gate, residual.is_some())
    });
    match x.device() {
        Device::Meta(meta) => {
            let flops = flops(&args, [m, n, k]);
            let (macs, launches) = ((m * rows * k) as u64, u64::from(y.numel() > 0));
            let bytes = bytes_of(&[Some(x), Some(weight), bias, residual, Some(&y)]) + gate_bytes(&args, n);
            meta.record(OP, OpKind::Linear, y.shape(), Work { macs, flops, bytes, launches });
        }
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) => by_dtype!(x.dtype(), T => {
            let epilogue = Epilogue::<T>::new(&args, None, n, &mut y);
            gemm::matmul([m, rows, k], &Dense { x: x.cpu::<T>(), k }, weight.cpu::<T>(), &epilogue)
        }),
        Device::Cuda(card) => cuda::linear::linear(card, &args, [m, n, k], &mut y)?,
    }
    Ok(y)
}

/// `[m, n, k]`: rows of x and of y, columns of y, terms of a sum. `operands`: the dtype of x, which has been checked, and of
/// weight; `others`: of the rest.
pub(super) fn check(op: &'static str, args: &Linear, operands: DType, others: DType) -> Result<[usize; 3]> {
    let Linear { x, weight, bias, activation, gate, residual } = *args;
    let Some((&k, leading)) = x.shape().split_last() else {
        return Err(Error::shape(op, "x", x, "[..., K]"));
    };
    let [weight_rows, _] = weight.dims(op, "weight")?;
    weight.expect(op, "weight", &[weight_rows, k], operands, x.device())?;
    let n = match activation {
        activation if !activation.is_gated() => weight_rows,
        _ if weight_rows % 2 != 0 => {
            return Err(Error::shape(op, "weight", weight, "an even number of rows: GEGLU's values and gates"));
        }
        _ => weight_rows / 2,
    };
    if let Some(bias) = bias {
        bias.expect(op, "bias", &[weight_rows], others, x.device())?;
    }
    if let Some(residual) = residual {
        residual.expect(op, "residual", &output_shape(x, n), others, x.device())?;
    }
    if let Some(gate) = gate {
        if activation != Activation::None {
            return Err(Error::argument(op, "activation", format!("{activation:?}"), "None beside a gate"));
        }
        let [images, _, ..] = *x.shape() else {
            return Err(Error::shape(op, "x", x, "[images, ..., K] beside a gate"));
        };
        gate.check(op, "gate", images, n, others, x.device())?;
    }
    Ok([leading.iter().product(), n, k])
}

pub(super) fn output_shape(x: &Tensor, n: usize) -> Vec<usize> {
    let leading = &x.shape()[..x.shape().len() - 1];
    [leading, &[n]].concat()
}

pub(super) fn flops(args: &Linear, [m, n, k]: [usize; 3]) -> u64 {
    let weight_rows = args.weight.shape()[0];
    let per_row = weight_rows as u64 * u64::from(args.bias.is_some())
        + n as u64
            * (activation_flops(args.activation) + u64::from(args.gate.is_some()) + u64::from(args.residual.is_some()));
    2 * (m * weight_rows * k) as u64 + m as u64 * per_row
}

/// Bytes of the gates that are read.
pub(super) fn gate_bytes(args: &Linear, n: usize) -> u64 {
    args.gate.map_or(0, |gate| gate.bytes(args.x.shape()[0], n))
}

/// Flops per output element, counted by the formula with exp, erf and tanh as one each; GEGLU's includes the product.
pub(super) fn activation_flops(activation: Activation) -> u64 {
    match activation {
        Activation::None => 0,
        Activation::Silu => 4,
        Activation::QuickGelu | Activation::Gelu => 5,
        Activation::Geglu => 6,
        Activation::GeluTanh => 9,
        Activation::GegluTanh => 10,
    }
}

/// From sums to the result on the cpu.
pub(super) struct Epilogue<'a, T> {
    /// Of the rows of x and of weight.
    scales: Option<[&'a [f32]; 2]>,
    bias: Option<Vec<f32>>,
    activation: Activation,
    /// Of each image.
    gates: Option<Vec<Vec<f32>>>,
    image_rows: usize,
    residual: Option<&'a [T]>,
    n: usize,
    y: OutputRows<'a, T>,
}

impl<'a, T: Element> Epilogue<'a, T> {
    pub(super) fn new(args: &Linear<'a>, scales: Option<[&'a [f32]; 2]>, n: usize, y: &'a mut Tensor) -> Self {
        let bias = args.bias.map(cpu::to_f32::<T>);
        let residual = args.residual.map(|r| r.cpu::<T>());
        let gates = args.gate.map(|gate| gate.cpu::<T>(args.x.shape()[0], n));
        let image_rows = args.image_rows(y.numel() / n.max(1));
        let y = OutputRows::new(y.cpu_mut::<T>(), n);
        Epilogue { scales, bias, activation: args.activation, gates, image_rows, residual, n, y }
    }
}

impl<T: Element> Store for Epilogue<'_, T> {
    fn store(&self, row: usize, column: usize, sums: &mut [f32]) {
        if let Some([rows, columns]) = self.scales {
            let of_columns = &columns[column..column + sums.len()];
            sums.iter_mut().zip(of_columns).for_each(|(sum, scale)| *sum = *sum * rows[row] * scale);
        }
        if let Some(bias) = &self.bias {
            math::add(sums, &bias[column..column + sums.len()]);
        }
        math::activate(self.activation, sums);
        // A block of columns begins at a multiple of the panel width, so never between a value and its gate.
        let span = if self.activation.is_gated() { 2 } else { 1 };
        let (column, len) = (column / span, sums.len() / span);
        let sums = &mut sums[..len];
        if let Some(gates) = &self.gates {
            let gates = &gates[row / self.image_rows][column..column + len];
            sums.iter_mut().zip(gates).for_each(|(sum, gate)| *sum *= gate);
        }
        if let Some(residual) = self.residual {
            math::add(sums, &residual[row * self.n + column..][..len]);
        }
        // SAFETY: matmul calls store once for each row and column.
        math::store(unsafe { self.y.get(row, column..column + len) }, sums);
    }
}
