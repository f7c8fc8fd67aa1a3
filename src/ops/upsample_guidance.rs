use rayon::prelude::*;

use super::elementwise::pointwise;
use super::{StepRows, Tensor, by_dtype, bytes_of, cuda, float, profile};
use crate::error::{Error, Result};
use crate::runtime::{DType, Device, Element, OpKind, Work};

/// Means over squares of `scale` x `scale` cells: `x: [N, H, W, C]`, f32, to `[N, H / scale, W / scale, C]`.
///
/// # Errors
/// [`Error::Shape`], [`Error::Dtype`]; [`Error::Argument`]: a `scale` that does not divide H and W, or is 0.
pub fn pool_latents(x: &Tensor, scale: usize) -> Result<Tensor> {
    const OP: &str = "pool_latents";
    let [n, h, w, c] = x.dims(OP, "x")?;
    x.expect(OP, "x", x.shape(), DType::F32, x.device())?;
    if scale == 0 || !h.is_multiple_of(scale) || !w.is_multiple_of(scale) {
        return Err(Error::argument(OP, "scale", scale, format!("1 or more that divides the {h}x{w} cells")));
    }

    let mut y = Tensor::uninit(x.device(), &[n, h / scale, w / scale, c], DType::F32)?;
    let _timed = profile::scope(OP, y.shape());
    match x.device() {
        Device::Meta(meta) => {
            meta.record(OP, OpKind::Elementwise, y.shape(), pointwise(&y, &[Some(x)], (scale * scale) as u64));
        }
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) => {
            let squares = Squares { scale, w: w / scale, c };
            let x = x.cpu::<f32>();
            y.cpu_mut::<f32>().par_iter_mut().enumerate().for_each(|(i, y)| *y = squares.mean(x, i));
        }
        Device::Cuda(card) => cuda::upsample_guidance::pool(card, x, &mut y)?,
    }
    Ok(y)
}

/// The network's output, corrected by its output for a smaller map: `y = e + U[k0 low + k1 pooled - k2 D[e]]`, D the means over
/// squares of cells, U each cell repeated over its square, k the row of each image's step in `factors`, whose table is
/// `[steps, 3]`, f32. Hwang, Park & Jo 2024, arXiv:2404.01709.
///
/// * `output`: `[R N, H, W, C]`, any float dtype, which is the result's; R: 1, or 2 with guidance
/// * `low`: `[R N, H / m, W / m, C]`, of the same dtype
/// * `pooled`: `[N, H / m, W / m, C]`, f32, of [`pool_latents`]: for networks whose output is not the noise
///
/// # Errors
/// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: which argument; [`Error::Argument`]: a step beyond the table.
pub fn upsample_guidance(output: &Tensor, low: &Tensor, pooled: &Tensor, factors: StepRows) -> Result<Tensor> {
    const OP: &str = "upsample_guidance";
    let ([rows, h, w, c], [_, low_h, low_w, _]) = (output.dims(OP, "output")?, low.dims(OP, "low")?);
    let [images, ..] = pooled.dims::<4>(OP, "pooled")?;
    float(OP, "output", output)?;
    let scale = h.checked_div(low_h).unwrap_or(1);
    if [h, w] != [low_h * scale, low_w * scale] {
        return Err(Error::shape(
            OP,
            "low",
            low,
            format!("{h}x{w} cells over a whole number, the same for both sides"),
        ));
    }
    low.expect(OP, "low", &[rows, low_h, low_w, c], output.dtype(), output.device())?;
    pooled.expect(OP, "pooled", &[images, low_h, low_w, c], DType::F32, output.device())?;
    if images == 0 && rows > 0 || images > 0 && !rows.is_multiple_of(images) {
        return Err(Error::shape(OP, "pooled", pooled, format!("a number of images that divides {rows}")));
    }
    if factors.rows != 1 {
        return Err(Error::argument(OP, "rows", factors.rows, "1 for each step"));
    }
    factors.check(OP, "factors", images, 3, DType::F32, output.device())?;

    let mut y = Tensor::uninit(output.device(), output.shape(), output.dtype())?;
    let _timed = profile::scope(OP, y.shape());
    match output.device() {
        Device::Meta(meta) => {
            let flops = 2 * y.numel() as u64 + 5 * low.numel() as u64;
            let bytes = bytes_of(&[Some(output), Some(low), Some(pooled), Some(&y)]);
            meta.record(OP, OpKind::Elementwise, y.shape(), Work { macs: 0, flops, bytes, launches: 1 });
        }
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) => by_dtype!(output.dtype(), T => {
            guide_cpu::<T>(output, low, pooled, factors, Squares { scale, w: low_w, c }, &mut y);
        }),
        Device::Cuda(card) => cuda::upsample_guidance::guide(card, output, low, pooled, factors, &mut y)?,
    }
    Ok(y)
}

fn guide_cpu<T: Element>(
    output: &Tensor,
    low: &Tensor,
    pooled: &Tensor,
    factors: StepRows,
    squares: Squares,
    y: &mut Tensor,
) {
    let (images, small) = (pooled.shape()[0], pooled.numel() / pooled.shape()[0]);
    let table = factors.table.cpu::<f32>();
    let steps: Vec<usize> = factors.indices(images).collect();
    let (e, low, pooled, y) = (output.cpu::<T>(), low.cpu::<T>(), pooled.cpu::<f32>(), y.cpu_mut::<T>());
    for (i, low) in low.iter().enumerate() {
        let image = i / small % images;
        let k = &table[3 * steps[image]..][..3];
        let of_x = pooled[image * small + i % small];
        let correction = k[0] * low.to_f32() + k[1] * of_x - k[2] * squares.mean(e, i);
        squares.each(i).for_each(|at| y[at] = T::from_f32(e[at].to_f32() + correction));
    }
}

/// The squares of cells that the values of a smaller map stand for.
#[derive(Clone, Copy)]
struct Squares {
    scale: usize,
    /// Columns of the smaller map.
    w: usize,
    c: usize,
}

impl Squares {
    /// Where the square's values of value `i`'s channel are.
    fn each(self, i: usize) -> impl Iterator<Item = usize> {
        let Squares { scale, w, c } = self;
        let (cell, stride) = (i / c, w * scale * c);
        let first = cell / w * scale * stride + cell % w * scale * c + i % c;
        (0..scale).flat_map(move |a| (0..scale).map(move |b| first + a * stride + b * c))
    }

    fn mean<T: Element>(self, values: &[T], i: usize) -> f32 {
        self.each(i).map(|at| values[at].to_f32()).sum::<f32>() / (self.scale * self.scale) as f32
    }
}
