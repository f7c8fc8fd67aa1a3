use rayon::prelude::*;

use super::{Tensor, by_dtype, cuda, float, profile};
use crate::error::{Error, Result};
use crate::runtime::{DType, Device, Element, OpKind, Work};

/// Token plus position embedding: `ids: [N, L]` u32, `table: [V, C]`, `positions: [P, C]` with `P >= L` to `[N, L, C]`.
///
/// The ids are checked on the host, so on a card they are copied back and waited for: a few hundred bytes, once a prompt.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::Dtype`](crate::Error::Dtype), [`Error::Device`](crate::Error::Device):
/// which argument; [`Error::Argument`](crate::Error::Argument): an id that is not below V, with its value.
pub fn embedding(ids: &Tensor, table: &Tensor, positions: &Tensor) -> Result<Tensor> {
    const OP: &str = "embedding";
    let [n, l] = ids.dims(OP, "ids")?;
    let [v, c] = table.dims(OP, "table")?;
    let [p, _] = positions.dims(OP, "positions")?;
    float(OP, "table", table)?;
    ids.expect(OP, "ids", &[n, l], DType::U32, table.device())?;
    positions.expect(OP, "positions", &[p, c], table.dtype(), table.device())?;
    if p < l {
        return Err(Error::shape(OP, "positions", positions, format!("at least {l} rows, one for every token")));
    }
    check_ids(OP, ids, v)?;

    let mut y = Tensor::uninit(table.device(), &[n, l, c], table.dtype())?;
    let _timed = profile::scope(OP, y.shape());
    match table.device() {
        Device::Meta(meta) => {
            let flops = y.numel() as u64;
            // Of the two tables only the rows that are looked up move.
            let bytes = ids.bytes() + 2 * y.bytes() + (l * c * y.dtype().size_bytes()) as u64;
            meta.record(OP, OpKind::Elementwise, y.shape(), Work { macs: 0, flops, bytes, launches: 1 });
        }
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) => by_dtype!(table.dtype(), T => embedding_cpu::<T>(ids, table, positions, &mut y)),
        Device::Cuda(card) => cuda::embedding::embedding(card, ids, table, positions, &mut y)?,
    }
    Ok(y)
}

/// All ids are below the table's `rows`; on the meta device there are none to look at.
fn check_ids(op: &'static str, ids: &Tensor, rows: usize) -> Result<()> {
    if let Device::Meta(_) = ids.device() {
        return Ok(());
    }
    let ids = ids.to_device(&Device::cpu())?;
    match ids.cpu::<u32>().iter().find(|&&id| id as usize >= rows) {
        None => Ok(()),
        Some(id) => Err(Error::argument(op, "ids", id, format!("token ids below the table's {rows} rows"))),
    }
}

fn embedding_cpu<T: Element>(ids: &Tensor, table: &Tensor, positions: &Tensor, y: &mut Tensor) {
    let (l, c) = (ids.shape()[1], table.shape()[1]);
    let (ids, table, positions) = (ids.cpu::<u32>(), table.cpu::<T>(), positions.cpu::<T>());
    y.cpu_mut::<T>().par_chunks_mut(c).zip(ids).enumerate().for_each(|(token, (y, &id))| {
        let row = &table[id as usize * c..][..c];
        let position = &positions[token % l * c..][..c];
        for ((y, a), b) in y.iter_mut().zip(row).zip(position) {
            *y = T::from_f32(a.to_f32() + b.to_f32());
        }
    });
}

/// The UNet's sinusoid, as config.json describes it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TimestepEmbedding {
    /// Width of the result; an odd width gets a zero column.
    pub dim: usize,
    /// cos first, then sin.
    pub flip_sin_to_cos: bool,
    /// `freq_shift`: subtracted from dim/2 in the exponent's denominator.
    pub freq_shift: f64,
}

/// `f_j = exp(-ln(10000) j / (dim/2 - freq_shift))`; row i is `[sin(t_i f), cos(t_i f)]` (or cos first): `[len, dim]`.
/// Vaswani et al. 2017, arXiv:1706.03762, sec. 3.5.
///
/// `f_j` and the phase `t_i f_j` are rounded to f32 step by step, sine and cosine are not: the published models were
/// trained on phases rounded so, and at t = 981 the rounding moves a sine by up to 6e-5.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument): a `dim` below 2, a shift that leaves no denominator.
pub fn timestep_embedding(timesteps: &[f32], e: TimestepEmbedding, device: &Device, dtype: DType) -> Result<Tensor> {
    const OP: &str = "timestep_embedding";
    if e.dim < 2 {
        return Err(Error::argument(OP, "dim", e.dim, "at least 2: one sine and one cosine"));
    }
    if !dtype.is_float() {
        return Err(Error::Dtype { op: OP, arg: "dtype", got: dtype, want: "f32, f16 or bf16".into() });
    }
    let half = e.dim / 2;
    let denominator = half as f64 - e.freq_shift;
    if !(denominator.is_finite() && denominator > 0.0) {
        return Err(Error::argument(OP, "freq_shift", e.freq_shift, format!("below dim / 2 = {half}")));
    }

    let mut y = Tensor::uninit(device, &[timesteps.len(), e.dim], dtype)?;
    let _timed = profile::scope(OP, y.shape());
    match device {
        Device::Meta(meta) => {
            // Computed on the host and uploaded: bytes, but no launch and none of the device's operations.
            let bytes = y.bytes() + size_of_val(timesteps) as u64;
            meta.record(OP, OpKind::Elementwise, y.shape(), Work { macs: 0, flops: 0, bytes, launches: 0 });
        }
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) | Device::Cuda(_) => y.write_f32(&sinusoids(timesteps, e, denominator))?,
    }
    Ok(y)
}

/// `[len, dim]`, row by row. `denominator`: of the exponent.
fn sinusoids(timesteps: &[f32], e: TimestepEmbedding, denominator: f64) -> Vec<f32> {
    let half = e.dim / 2;
    let frequencies: Vec<f32> = (0..half)
        .map(|j| {
            let exponent = -std::f64::consts::LN_10 as f32 * 4.0 * j as f32 / denominator as f32;
            f64::from(exponent).exp() as f32
        })
        .collect();
    let mut values = vec![0.0; timesteps.len() * e.dim];
    let (sin_at, cos_at) = if e.flip_sin_to_cos { (half, 0) } else { (0, half) };
    for (row, &t) in values.chunks_exact_mut(e.dim).zip(timesteps) {
        for (j, frequency) in frequencies.iter().enumerate() {
            let (sin, cos) = f64::from(t * frequency).sin_cos();
            row[sin_at + j] = sin as f32;
            row[cos_at + j] = cos as f32;
        }
    }
    values
}
