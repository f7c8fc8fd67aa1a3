//! 5x5 kernels in place of 3x3 ones: the dispersed convolution of ScaleCrafter (He et al. 2023, arXiv:2310.07702, sec. 3.3).

use std::sync::LazyLock;

use rayon::prelude::*;

use super::{Tensor, by_dtype, bytes_of, cuda, float, profile};
use crate::error::{Error, Result};
use crate::runtime::{DType, Device, Element, OpKind, Work};

/// Taps of the kernels before and after.
pub(super) const SMALL: usize = 9;
pub(super) const LARGE: usize = 25;

/// How much of the fit is that both kernels see a map alike, beside that the larger sees the enlarged map as the smaller the map.
const PIXEL_WEIGHT: f64 = 0.05;

/// `weight: [O, 3, 3, I]` to `[O, 5, 5, I]`: each kernel through [`dispersion`], in f32 and rounded once.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::Dtype`](crate::Error::Dtype): `weight`.
pub fn disperse(weight: &Tensor) -> Result<Tensor> {
    const OP: &str = "disperse";
    let [o, kh, kw, i] = weight.dims(OP, "weight")?;
    float(OP, "weight", weight)?;
    if [kh, kw] != [3, 3] {
        return Err(Error::shape(OP, "weight", weight, "[O, 3, 3, I]"));
    }

    let mut y = Tensor::uninit(weight.device(), &[o, 5, 5, i], weight.dtype())?;
    let _timed = profile::scope(OP, y.shape());
    match weight.device() {
        Device::Meta(meta) => {
            let _matrix = Tensor::uninit(weight.device(), &[LARGE, SMALL], DType::F32)?;
            let (flops, bytes) = (2 * (SMALL * y.numel()) as u64, bytes_of(&[Some(weight), Some(&y)]));
            meta.record(OP, OpKind::Elementwise, y.shape(), Work { macs: 0, flops, bytes, launches: 1 });
        }
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) => by_dtype!(weight.dtype(), T => disperse_cpu::<T>(weight, i, &mut y)),
        Device::Cuda(card) => cuda::disperse::disperse(card, weight, &mut y)?,
    }
    Ok(y)
}

fn disperse_cpu<T: Element>(weight: &Tensor, inputs: usize, y: &mut Tensor) {
    let (r, x) = (dispersion(), weight.cpu::<T>());
    y.cpu_mut::<T>().par_chunks_mut(LARGE * inputs).zip(x.par_chunks(SMALL * inputs)).for_each(|(y, x)| {
        for (to, row) in y.chunks_exact_mut(inputs).zip(r.iter()) {
            for (input, to) in to.iter_mut().enumerate() {
                let terms = row.iter().enumerate().map(|(tap, r)| *r as f32 * x[tap * inputs + input].to_f32());
                *to = T::from_f32(terms.sum());
            }
        }
    });
}

/// R, `[25][9]`, row-major kernels on both sides: the k5 = R k3 for which, over all maps x of 3x3 pixels with zeros outside,
///
/// ```text
/// |conv5(up(x)) - up(conv3(x))|^2 + 0.05^2 |conv5(x) - conv3(x)|^2
/// ```
///
/// is least; `up` is bilinear to 5x5, every second pixel one of x. Solved from the normal equations, in f64.
pub fn dispersion() -> &'static [[f64; SMALL]; LARGE] {
    static R: LazyLock<[[f64; SMALL]; LARGE]> = LazyLock::new(solved);
    &R
}

fn solved() -> [[f64; SMALL]; LARGE] {
    let mut a = [[0.0; LARGE]; LARGE];
    let mut b = [[0.0; SMALL]; LARGE];
    let mut add = |large: &[f64], small: &[f64], weight: f64| {
        for (i, l) in large.iter().enumerate() {
            a[i].iter_mut().zip(large).for_each(|(a, other)| *a += weight * l * other);
            b[i].iter_mut().zip(small).for_each(|(b, other)| *b += weight * l * other);
        }
    };
    for at in 0..9 {
        let mut x = [0.0; 9];
        x[at] = 1.0;
        let (small, same): (Vec<_>, Vec<_>) =
            (0..9).map(|pixel| (taps(&x, 3, pixel, 3), taps(&x, 3, pixel, 5))).unzip();
        let enlarged = enlarged(&x);
        for pixel in 0..25 {
            // Of each tap of the small kernel: its map, enlarged, at this pixel.
            let of_tap = |tap: usize| {
                let map: Vec<f64> = small.iter().map(|taps| taps[tap]).collect();
                self::enlarged(&map)[pixel]
            };
            let small: Vec<f64> = (0..SMALL).map(of_tap).collect();
            add(&taps(&enlarged, 5, pixel, 5), &small, 1.0);
        }
        same.iter().zip(&small).for_each(|(large, small)| add(large, small, PIXEL_WEIGHT * PIXEL_WEIGHT));
    }
    // Gaussian elimination; the matrix is positive definite with a condition of 354, so the diagonal serves as pivots.
    for pivot in 0..LARGE {
        for row in (0..LARGE).filter(|&row| row != pivot) {
            let factor = a[row][pivot] / a[pivot][pivot];
            let (from, from_b) = (a[pivot], b[pivot]);
            a[row].iter_mut().zip(from).for_each(|(to, from)| *to -= factor * from);
            b[row].iter_mut().zip(from_b).for_each(|(to, from)| *to -= factor * from);
        }
    }
    std::array::from_fn(|row| b[row].map(|value| value / a[row][row]))
}

/// What a kernel of `kernel` x `kernel` taps sees of `x`, of `side` x `side` pixels, at a pixel: zeros outside.
fn taps(x: &[f64], side: usize, pixel: usize, kernel: usize) -> Vec<f64> {
    let (row, column, reach) = (pixel / side, pixel % side, kernel / 2);
    let inside = |at: usize, tap: usize| (at + tap).checked_sub(reach).filter(|&at| at < side);
    let value = |tap: usize| {
        let (row, column) = (inside(row, tap / kernel), inside(column, tap % kernel));
        row.zip(column).map_or(0.0, |(row, column)| x[row * side + column])
    };
    (0..kernel * kernel).map(value).collect()
}

/// 3x3 pixels to 5x5.
fn enlarged(x: &[f64]) -> Vec<f64> {
    let value = |pixel: usize| {
        let (row, column) = (pixel / 5, pixel % 5);
        let rows = [row / 2, row.div_ceil(2)];
        let columns = [column / 2, column.div_ceil(2)];
        rows.iter().flat_map(|row| columns.map(|column| x[row * 3 + column])).sum::<f64>() / 4.0
    };
    (0..25).map(value).collect()
}
