use rayon::prelude::*;

use super::elementwise::{CHUNK, pointwise};
use super::{StepRows, Tensor, cuda, profile};
use crate::error::{Error, Result};
use crate::runtime::{DType, Device, OpKind, Work};

/// `x = k0 x + k1 a + k2 b` in place, `k` the row of each image's step in `factors`, whose table is `[steps, 3]`, f32. What
/// has the factor 0 is not read. `x`, `a`, `b`: `[N, ...]`, f32; without `b` its factor is not read either.
///
/// # Errors
/// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: which argument; [`Error::Argument`]: a step beyond the table.
pub fn mix_latents(x: &mut Tensor, a: &Tensor, b: Option<&Tensor>, factors: StepRows) -> Result<()> {
    const OP: &str = "mix_latents";
    let n = images(OP, x)?;
    a.expect(OP, "a", x.shape(), DType::F32, x.device())?;
    if let Some(b) = b {
        b.expect(OP, "b", x.shape(), DType::F32, x.device())?;
    }
    one_row(OP, "factors", &factors, n, 3, x.device())?;

    let _timed = profile::scope(OP, x.shape());
    match x.device().clone() {
        Device::Meta(meta) => {
            meta.record(OP, OpKind::Elementwise, x.shape(), pointwise(x, &[Some(x), Some(a), b], 5));
        }
        Device::Cpu(_) | Device::Cuda(_) if x.numel() == 0 => {}
        Device::Cpu(_) => mix_latents_cpu(x, a, b, factors),
        Device::Cuda(card) => cuda::latents::mix(&card, x, a, b, factors)?,
    }
    Ok(())
}

fn mix_latents_cpu(x: &mut Tensor, a: &Tensor, b: Option<&Tensor>, factors: StepRows) {
    let n = x.shape()[0];
    let per_image = x.numel() / n;
    let rows: Vec<usize> = factors.indices(n).collect();
    let (table, a, b) = (factors.table.cpu::<f32>(), a.cpu::<f32>(), b.map(|b| b.cpu::<f32>()));
    for (image, x) in x.cpu_mut::<f32>().chunks_exact_mut(per_image).enumerate() {
        let k = &table[3 * rows[image]..][..3];
        x.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, x)| {
            let first = image * per_image + chunk * CHUNK;
            for (i, x) in x.iter_mut().enumerate() {
                let mut sum = if k[1] == 0.0 { 0.0 } else { k[1] * a[first + i] };
                if k[0] != 0.0 {
                    sum += k[0] * *x;
                }
                if let Some(b) = b
                    && k[2] != 0.0
                {
                    sum += k[2] * b[first + i];
                }
                *x = sum;
            }
        });
    }
}

/// Mean and standard deviation of each image, `[N, 2]`, f32, over all its values and `padding` zeros more; the deviation is
/// that of a sample, over the count less 1. `x: [N, ...]`, f32.
///
/// # Errors
/// [`Error::Shape`], [`Error::Dtype`]; [`Error::TooLarge`]: 2^31 or more values per image.
pub fn latent_moments(x: &Tensor, padding: usize) -> Result<Tensor> {
    const OP: &str = "latent_moments";
    let n = images(OP, x)?;
    let per_image = x.numel() / n.max(1);
    let (got, limit) = (per_image as u128 + padding as u128, i32::MAX as u128);
    if got > limit {
        return Err(Error::TooLarge { op: OP, what: "values per image and padding", got, limit });
    }

    let mut moments = Tensor::uninit(x.device(), &[n, 2], DType::F32)?;
    let _timed = profile::scope(OP, moments.shape());
    match x.device() {
        Device::Meta(meta) => {
            let (flops, bytes) = (4 * x.numel() as u64, x.bytes() + moments.bytes());
            meta.record(OP, OpKind::Elementwise, moments.shape(), Work { macs: 0, flops, bytes, launches: 1 });
        }
        Device::Cpu(_) | Device::Cuda(_) if n == 0 => {}
        Device::Cpu(_) => latent_moments_cpu(x, padding, &mut moments),
        Device::Cuda(card) => cuda::latents::moments(card, x, padding, &mut moments)?,
    }
    Ok(moments)
}

fn latent_moments_cpu(x: &Tensor, padding: usize, moments: &mut Tensor) {
    let per_image = x.numel() / x.shape()[0];
    for (image, moments) in moments.cpu_mut::<f32>().chunks_exact_mut(2).enumerate() {
        let x = &x.cpu::<f32>()[image * per_image..][..per_image];
        let count = (per_image + padding) as f64;
        let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / count;
        let squares: f64 = x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum();
        let std = ((squares + padding as f64 * mean * mean) / (count - 1.0)).sqrt();
        moments.copy_from_slice(&[mean as f32, std as f32]);
    }
}

/// `(x - mean) std' / std + mean'` for every image: `x: [N, ...]`, f32; `from` (mean, std) and `to` (mean', std'): `[N, 2]`,
/// f32, of [`latent_moments`].
///
/// # Errors
/// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: which argument.
pub fn standardise_latents(x: &Tensor, from: &Tensor, to: &Tensor) -> Result<Tensor> {
    const OP: &str = "standardise_latents";
    let n = images(OP, x)?;
    from.expect(OP, "from", &[n, 2], DType::F32, x.device())?;
    to.expect(OP, "to", &[n, 2], DType::F32, x.device())?;

    let mut y = Tensor::uninit(x.device(), x.shape(), DType::F32)?;
    let _timed = profile::scope(OP, y.shape());
    match x.device() {
        Device::Meta(meta) => meta.record(OP, OpKind::Elementwise, y.shape(), pointwise(&y, &[Some(x)], 4)),
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) => {
            let per_image = x.numel() / n;
            let (from, to) = (from.cpu::<f32>(), to.cpu::<f32>());
            let of_images = y.cpu_mut::<f32>().chunks_exact_mut(per_image).zip(x.cpu::<f32>().chunks_exact(per_image));
            for (image, (y, x)) in of_images.enumerate() {
                let ([mean, std], [new_mean, new_std]) =
                    ([from[2 * image], from[2 * image + 1]], [to[2 * image], to[2 * image + 1]]);
                y.iter_mut().zip(x).for_each(|(y, x)| *y = (x - mean) * (new_std / std) + new_mean);
            }
        }
        Device::Cuda(card) => cuda::latents::standardise(card, x, from, to, &mut y)?,
    }
    Ok(y)
}

/// The maps with `top` rows and `left` columns of zeros before them, filtered along both axes by the taps of each image's
/// step (`weights`, table `[steps, taps]`, f32, an odd number of taps) and zeros outside: `x: [N, H, W, C]`, f32, to
/// `[N, top + H, left + W, C]`.
///
/// # Errors
/// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: which argument, also an even number of taps; [`Error::Argument`]:
/// a step beyond the table.
pub fn blur_latents(x: &Tensor, [top, left]: [usize; 2], weights: StepRows) -> Result<Tensor> {
    const OP: &str = "blur_latents";
    let [n, h, w, c] = x.dims(OP, "x")?;
    images(OP, x)?;
    let [_, taps] = weights.table.dims(OP, "weights")?;
    if taps % 2 == 0 {
        return Err(Error::shape(OP, "weights", weights.table, "an odd number of taps"));
    }
    one_row(OP, "weights", &weights, n, taps, x.device())?;

    let mut y = Tensor::uninit(x.device(), &[n, top + h, left + w, c], DType::F32)?;
    let _timed = profile::scope(OP, y.shape());
    match x.device() {
        Device::Meta(meta) => {
            let flops = 2 * (taps * taps + taps) as u64 * y.numel() as u64;
            let bytes = x.bytes() + y.bytes();
            meta.record(OP, OpKind::Elementwise, y.shape(), Work { macs: 0, flops, bytes, launches: 1 });
        }
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) => blur_latents_cpu(x, [top, left], weights, &mut y),
        Device::Cuda(card) => cuda::latents::blur(card, x, [top, left], weights, &mut y)?,
    }
    Ok(y)
}

/// Along the columns, then along the rows.
fn blur_latents_cpu(x: &Tensor, [top, left]: [usize; 2], weights: StepRows, y: &mut Tensor) {
    let &[n, h, w, c] = x.shape() else { unreachable!("checked") };
    let (taps, padded) = (weights.table.shape()[1], [top + h, left + w]);
    let rows: Vec<usize> = weights.indices(n).collect();
    for (image, y) in y.cpu_mut::<f32>().chunks_exact_mut(padded[0] * padded[1] * c).enumerate() {
        let k = &weights.table.cpu::<f32>()[taps * rows[image]..][..taps];
        let x = &x.cpu::<f32>()[image * h * w * c..][..h * w * c];
        // The tap at `at + tap` of a line with `before` zeros in front of `length` values.
        let inside = |at: usize, tap: usize, before: usize, length: usize| {
            (at + tap).checked_sub(taps / 2 + before).filter(|&i| i < length)
        };
        let mut filtered = vec![0f32; h * padded[1] * c];
        filtered.par_chunks_exact_mut(padded[1] * c).enumerate().for_each(|(row, line)| {
            for (column, cell) in line.chunks_exact_mut(c).enumerate() {
                for (tap, k) in k.iter().enumerate() {
                    let Some(from) = inside(column, tap, left, w) else { continue };
                    let values = &x[(row * w + from) * c..][..c];
                    cell.iter_mut().zip(values).for_each(|(sum, value)| *sum += k * value);
                }
            }
        });
        y.par_chunks_exact_mut(padded[1] * c).enumerate().for_each(|(row, line)| {
            line.fill(0.0);
            for (tap, k) in k.iter().enumerate() {
                let Some(from) = inside(row, tap, top, h) else { continue };
                let values = &filtered[from * padded[1] * c..][..padded[1] * c];
                line.iter_mut().zip(values).for_each(|(sum, value)| *sum += k * value);
            }
        });
    }
}

/// N of an f32 tensor `[N, ...]`.
fn images(op: &'static str, x: &Tensor) -> Result<usize> {
    x.expect(op, "x", x.shape(), DType::F32, x.device())?;
    x.shape().first().copied().ok_or_else(|| Error::shape(op, "x", x, "[N, ...]"))
}

/// A table of f32 with one row of `columns` per step. `arg`: what the op calls it.
fn one_row(
    op: &'static str,
    arg: &'static str,
    rows: &StepRows,
    images: usize,
    columns: usize,
    device: &Device,
) -> Result<()> {
    if rows.rows != 1 {
        return Err(Error::argument(op, "rows", rows.rows, "1 for each step"));
    }
    rows.check(op, arg, images, columns, DType::F32, device)
}
