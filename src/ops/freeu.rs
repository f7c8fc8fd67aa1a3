//! FreeU (Si et al. 2023, arXiv:2309.11497): what a ResNet of an up block reads, weighted.

use std::f64::consts::TAU;

use rayon::prelude::*;

use super::{Tensor, by_dtype, bytes_of, cuda, float, profile};
use crate::error::Result;
use crate::runtime::{Device, Element, OpKind, Work};

/// The two factors of FreeU for one number of channels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FreeU {
    /// Of the first half of the backbone's channels.
    pub backbone: f32,
    /// Of the skip connection's lowest frequencies.
    pub skip: f32,
}

/// Sums of a map that its four lowest frequencies are: of x, and of x times the cosine and sine of each wave.
pub(super) const MOMENTS: usize = 7;

/// `backbone: [N, H, W, C]` with its first `C / 2` channels times `freeu.backbone`, and beside it `skip: [N, H, W, D]` whose
/// discrete Fourier coefficients of the frequencies 0 and -1 along both axes (the four around the centre as published: each
/// map's own frequency 0, and one of each pair of opposite ones) are multiplied by `freeu.skip`, of which the real part is
/// taken: `[N, H, W, C + D]`. Sums in f32; an image depends on itself alone, bit for bit.
///
/// With theta the phases `2 pi i / H` and `2 pi j / W` of the rows and columns, and s = `freeu.skip`,
/// ```text
/// y = x + (s - 1) / (H W) sum over k in {0, rows, columns, both} of (A_k cos theta_k + B_k sin theta_k)
/// A_k = sum of x cos theta_k,   B_k = sum of x sin theta_k,   theta_0 = 0,   theta_both = theta_rows + theta_columns
/// ```
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::Dtype`](crate::Error::Dtype), [`Error::Device`](crate::Error::Device):
/// which argument.
pub fn freeu(backbone: &Tensor, skip: &Tensor, freeu: FreeU) -> Result<Tensor> {
    const OP: &str = "freeu";
    let [n, h, w, c] = backbone.dims(OP, "backbone")?;
    float(OP, "backbone", backbone)?;
    let [_, _, _, d] = skip.dims(OP, "skip")?;
    skip.expect(OP, "skip", &[n, h, w, d], backbone.dtype(), backbone.device())?;

    let mut y = Tensor::uninit(backbone.device(), &[n, h, w, c + d], backbone.dtype())?;
    let _timed = profile::scope(OP, y.shape());
    match backbone.device() {
        Device::Meta(meta) => {
            let _sums = cuda::freeu::sums(skip)?;
            let flops = (backbone.numel() + 4 * MOMENTS * skip.numel()) as u64;
            let bytes = bytes_of(&[Some(backbone), Some(skip), Some(skip), Some(&y)]);
            meta.record(OP, OpKind::Elementwise, y.shape(), Work { macs: 0, flops, bytes, launches: 2 });
        }
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) => by_dtype!(backbone.dtype(), T => freeu_cpu::<T>(backbone, skip, freeu, &mut y)),
        Device::Cuda(card) => cuda::freeu::freeu(card, backbone, skip, freeu, &mut y)?,
    }
    Ok(y)
}

/// Cosine and sine of the wave of one period over `length` pixels, at each.
fn wave(length: usize) -> Vec<[f64; 2]> {
    (0..length).map(|i| (TAU * i as f64 / length as f64).sin_cos()).map(|(sin, cos)| [cos, sin]).collect()
}

/// At a pixel: 1 and the cosine and sine of each wave. A map of one row has no frequency but 0 along the rows: 0.
fn basis([h, w]: [usize; 2], [cos_y, sin_y]: [f64; 2], [cos_x, sin_x]: [f64; 2]) -> [f64; MOMENTS] {
    let (y, x) = (f64::from(h > 1), f64::from(w > 1));
    let (cos, sin) = (cos_y * cos_x - sin_y * sin_x, sin_y * cos_x + cos_y * sin_x);
    [1.0, y * cos_y, y * sin_y, x * cos_x, x * sin_x, y * x * cos, y * x * sin]
}

fn freeu_cpu<T: Element>(backbone: &Tensor, skip: &Tensor, freeu: FreeU, y: &mut Tensor) {
    let (&[n, h, w, c], &[_, _, _, d]) = (backbone.shape(), skip.shape()) else { unreachable!("checked") };
    let (rows, columns) = (wave(h), wave(w));
    let (backbone, skip) = (backbone.cpu::<T>(), skip.cpu::<T>());
    let factor = (f64::from(freeu.skip) - 1.0) / (h * w) as f64;
    let half = c / 2;
    for image in 0..n {
        let skip = &skip[image * h * w * d..][..h * w * d];
        let of_row = |i: usize| {
            let mut sums = vec![0.0; MOMENTS * d];
            for (x, column) in skip[i * w * d..][..w * d].chunks_exact(d.max(1)).zip(&columns) {
                for (sums, k) in sums.chunks_exact_mut(d.max(1)).zip(basis([h, w], rows[i], *column)) {
                    sums.iter_mut().zip(x).for_each(|(sum, x)| *sum += k * f64::from(x.to_f32()));
                }
            }
            sums
        };
        // Added in the order of the rows, whatever thread had them.
        let of_rows: Vec<Vec<f64>> = (0..h).into_par_iter().map(of_row).collect();
        let mut sums = vec![0.0; MOMENTS * d];
        of_rows.iter().for_each(|row| sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += value));
        let y = &mut y.cpu_mut::<T>()[image * h * w * (c + d)..][..h * w * (c + d)];
        y.par_chunks_mut(w * (c + d)).enumerate().for_each(|(i, y)| {
            for (j, y) in y.chunks_exact_mut(c + d).enumerate() {
                let (to_backbone, to_skip) = y.split_at_mut(c);
                let pixel = i * w + j;
                let from = &backbone[(image * h * w + pixel) * c..][..c];
                for (channel, (to, from)) in to_backbone.iter_mut().zip(from).enumerate() {
                    *to = if channel < half { T::from_f32(freeu.backbone * from.to_f32()) } else { *from };
                }
                let k = basis([h, w], rows[i], columns[j]);
                for (channel, (to, from)) in to_skip.iter_mut().zip(&skip[pixel * d..][..d]).enumerate() {
                    let low: f64 = k.iter().enumerate().map(|(at, k)| k * sums[at * d + channel]).sum();
                    *to = T::from_f32((f64::from(from.to_f32()) + factor * low) as f32);
                }
            }
        });
    }
}
