//! The low-pass filter before a dilated convolution: FouriScale (Huang et al., ECCV 2024, arXiv:2403.12963, sec. 3.3).

use std::f64::consts::PI;

use rayon::prelude::*;

use super::cpu::math::{self, simd};
use super::{Tensor, by_dtype, bytes_of, cuda, float, profile};
use crate::error::{Error, Result};
use crate::runtime::{Device, Element, OpKind, Work};

/// Which frequencies pass, of a map that is seen by a convolution whose reach is `scale` times the trained one. An axis of n values
/// has n / 2 frequencies on each side, j = 0, 1, ..., from the middle outwards, and of each passes
/// ```text
/// m[j] = clamp((1 - floor) / taper (n / 2 / scale + 1 - j) + 1, floor, 1)
/// taper: strong max(floor(n / 8), 1); weak floor((scale - 1) n / (2 scale)), where 0 lets all pass
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LowPass {
    /// At least 1.
    pub scale: f64,
    /// What passes of the highest frequencies, 0 to 1.
    pub floor: f64,
}

/// How steeply a [`LowPass`] falls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strength {
    Strong,
    /// Over all frequencies that the trained reach does not resolve.
    Weak,
}

impl LowPass {
    /// Frequencies over which the mask of an axis of `n` values falls to its floor.
    pub(super) fn taper(self, n: usize, strength: Strength) -> usize {
        match strength {
            Strength::Strong => (n / 8).max(1),
            Strength::Weak => {
                // The whole part of the exact quotient, which a rounded one may miss.
                let (a, b) = ((self.scale - 1.0) * n as f64, 2.0 * self.scale);
                ((a - a % b) / b).round() as usize
            }
        }
    }

    /// m of an axis of `n` values, from the middle outwards: `n / 2` of them.
    pub fn mask(self, n: usize, strength: Strength) -> Vec<f64> {
        let (half, taper) = (n / 2, self.taper(n, strength));
        let at = |j: usize| match taper {
            0 => 1.0,
            _ => {
                let slope = (1.0 - self.floor) / taper as f64;
                (slope * (half as f64 / self.scale + 1.0 - j as f64) + 1.0).max(self.floor).min(1.0)
            }
        };
        (0..half).map(at).collect()
    }
}

/// Arguments of [`spectral_filter`].
#[derive(Clone, Copy, Debug)]
pub struct SpectralFilter<'a> {
    /// `[N, H, W, C]`
    pub x: &'a Tensor,
    /// Height and width of the map with zeros to the right and below: even, at least H and W.
    pub padded: [usize; 2],
    pub pass: LowPass,
    /// The last so many images get the weak mask, all before them the strong one.
    pub weak: usize,
}

impl SpectralFilter<'_> {
    /// Do all frequencies of all images pass?
    fn is_identity(&self) -> bool {
        let images = self.x.shape().first().copied().unwrap_or(0);
        let used = [(Strength::Strong, self.weak < images), (Strength::Weak, self.weak > 0)];
        let all_pass = |strength| self.padded.iter().all(|&n| self.pass.mask(n, strength).iter().all(|&m| m == 1.0));
        used.into_iter().filter(|(_, is_used)| *is_used).all(|(strength, _)| all_pass(strength))
    }
}

/// `x` without the frequencies that its [`LowPass`] holds back: the padded map's discrete Fourier transform, times the masks of both
/// axes, transformed back, its real part, cut to `[N, H, W, C]`; in f32. Where everything passes, `x`.
///
/// As published, the mask of an axis is put on the shifted spectrum as its mirror image and itself side by side, so it is symmetric
/// about half a frequency. The filter is therefore no product of real ones; with A = F^-1 diag(mask) F of each axis,
/// `y = Re(A_rows x A_columns) x = (Re A_rows x Re A_columns - Im A_rows x Im A_columns) x`, two products per axis.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape): not 4-d; [`Error::Dtype`](crate::Error::Dtype);
/// [`Error::Argument`](crate::Error::Argument): a padded side that is odd or smaller than the map's, a scale below 1, a floor
/// outside 0 to 1, more weak images than there are.
pub fn spectral_filter(args: SpectralFilter) -> Result<Tensor> {
    const OP: &str = "spectral_filter";
    let SpectralFilter { x, padded, pass, weak } = args;
    let [n, h, w, c] = x.dims(OP, "x")?;
    float(OP, "x", x)?;
    if padded.iter().zip([h, w]).any(|(&padded, side)| padded < side || padded == 0 || padded % 2 == 1) {
        let want = format!("even sides of at least those of the map, {h} x {w}");
        return Err(Error::argument(OP, "padded", format!("{padded:?}"), want));
    }
    if !(pass.scale >= 1.0 && pass.scale.is_finite()) {
        return Err(Error::argument(OP, "scale", pass.scale, "at least 1"));
    }
    if !(0.0..=1.0).contains(&pass.floor) {
        return Err(Error::argument(OP, "floor", pass.floor, "0 to 1"));
    }
    if weak > n {
        return Err(Error::argument(OP, "weak", weak, format!("at most the {n} images")));
    }
    if args.is_identity() {
        return Ok(x.clone());
    }

    let mut y = Tensor::uninit(x.device(), x.shape(), x.dtype())?;
    let _timed = profile::scope(OP, y.shape());
    match x.device() {
        Device::Meta(meta) => {
            let passes = cuda::spectral_filter::Passes::uninit(&args)?;
            // Of each value two products along each axis.
            let flops = (4 * (h + w) * n * h * w * c) as u64;
            let work = Work { macs: 0, flops, bytes: bytes_of(&[Some(x), Some(&y)]), launches: passes.launches() };
            meta.record(OP, OpKind::Resize, y.shape(), work);
        }
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) => by_dtype!(x.dtype(), T => spectral_filter_cpu::<T>(&args, &mut y)),
        Device::Cuda(card) => cuda::spectral_filter::Passes::uninit(&args)?.launch(card, &args, &mut y)?,
    }
    Ok(y)
}

/// Real and imaginary part of a(t), t < n: `A[i][k] = a((i - k) mod n)`.
fn taps(mask: &[f64]) -> Vec<[f32; 2]> {
    let n = 2 * mask.len();
    let of = |t: usize| {
        // Whole half turns are left out before anything is rounded.
        let cosine = |(j, m): (usize, &f64)| m * (PI * ((2 * j + 1) * t % (2 * n)) as f64 / n as f64).cos();
        let sum = 2.0 / n as f64 * mask.iter().enumerate().map(cosine).sum::<f64>();
        let (sin, cos) = (PI * t as f64 / n as f64).sin_cos();
        [cos * sum, -sin * sum].map(|value| value as f32)
    };
    (0..n).into_par_iter().map(of).collect()
}

fn spectral_filter_cpu<T: Element>(args: &SpectralFilter, y: &mut Tensor) {
    let SpectralFilter { x, padded, pass, weak } = *args;
    let &[n, h, w, c] = x.shape() else { unreachable!("checked: four dimensions") };
    let per_image = h * w * c;
    let tables = |strength| padded.map(|length| taps(&pass.mask(length, strength)));
    let [strong, weaker] = [tables(Strength::Strong), tables(Strength::Weak)];
    for image in 0..n {
        let [rows, columns] = if image + weak < n { &strong } else { &weaker };
        let mut values = vec![0.0; per_image];
        math::load(&mut values, &x.cpu::<T>()[image * per_image..][..per_image]);
        // Of each row of the map its real part, then its imaginary part.
        let mut between = vec![0.0; 2 * per_image];
        between.par_chunks_mut(2 * w * c).zip(values.par_chunks(w * c)).for_each(|(to, row)| {
            let (re, im) = to.split_at_mut(w * c);
            for (i, (re, im)) in re.chunks_exact_mut(c).zip(im.chunks_exact_mut(c)).enumerate() {
                for (k, x) in row.chunks_exact(c).enumerate() {
                    let [a, b] = columns[(i + columns.len() - k) % columns.len()];
                    add_multiple(re, x, a);
                    add_multiple(im, x, b);
                }
            }
        });
        let y = &mut y.cpu_mut::<T>()[image * per_image..][..per_image];
        y.par_chunks_mut(w * c).enumerate().for_each(|(i, y)| {
            let mut sum = vec![0.0; w * c];
            for (k, row) in between.chunks_exact(2 * w * c).enumerate() {
                let [a, b] = rows[(i + rows.len() - k) % rows.len()];
                add_multiple(&mut sum, &row[..w * c], a);
                add_multiple(&mut sum, &row[w * c..], -b);
            }
            math::store(y, &sum);
        });
    }
}

simd! {
    fn add_multiple(to: &mut [f32], from: &[f32], factor: f32) {
        to.iter_mut().zip(from).for_each(|(to, from)| *to = math::fma::<FMA>(factor, *from, *to));
    }
}
