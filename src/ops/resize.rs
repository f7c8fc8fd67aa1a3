use rayon::prelude::*;

use super::cuda::resize::{Finish, Passes};
use super::elementwise::{map, ordered, pointwise};
use super::{Tensor, by_dtype, bytes_of, cuda, float, profile};
use crate::error::{Error, Result};
use crate::names::named;
use crate::runtime::{DType, Device, Element, OpKind, Work};

/// The relay's upsampler Phi (MegaFusion, arXiv:2408.11001, table 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Upsampler {
    /// Configuration A: PIL BILINEAR, a triangle widened when downscaling.
    Bilinear,
    /// Configuration B, the default: PIL BICUBIC, a = -0.5, weights of the taps inside the image re-normalised.
    #[default]
    Bicubic,
    /// torch `bicubic` with `align_corners=False, antialias=False`: a = -0.75, border pixels repeated.
    BicubicTorch,
    /// Configuration C: `Bicubic`, then a 5x5 Gaussian of sigma 1.1, reflected at the border.
    BicubicGaussian,
    /// Configuration D: `Bicubic`, then 1/2 [[-1,-1,-1],[-1,10,-1],[-1,-1,-1]]; border pixels as they are.
    BicubicEdge,
}

named!(Upsampler, [
    Bilinear => "bilinear",
    Bicubic => "bicubic",
    BicubicTorch => "bicubic-torch",
    BicubicGaussian => "bicubic-gaussian",
    BicubicEdge => "bicubic-edge",
]);

/// The noise of a relay in pixel space, where nothing is encoded between the resize and the next stage:
/// `signal * resized + sigma * noise`.
#[derive(Clone, Copy, Debug)]
pub struct RelayNoise<'a> {
    /// f32, of the result's shape.
    pub noise: &'a Tensor,
    pub signal: f32,
    pub sigma: f32,
}

/// `x: [N, H, W, C]` to `[N, size[0], size[1], C]`; rows and columns are filtered in f32 (columns' pass first, as PIL
/// does: horizontal, then vertical), `clamp` is applied at the end and `noise` added to that.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument): an empty size, a `clamp` that is not low, high;
/// [`Error::Shape`](crate::Error::Shape): not 4-d or empty, or the noise; [`Error::Dtype`](crate::Error::Dtype);
/// [`Error::Device`](crate::Error::Device): the noise.
pub fn resize(
    x: &Tensor,
    size: [usize; 2],
    upsampler: Upsampler,
    clamp: Option<(f32, f32)>,
    noise: Option<RelayNoise>,
) -> Result<Tensor> {
    const OP: &str = "resize";
    let (low, high) = clamp.unwrap_or((f32::NEG_INFINITY, f32::INFINITY));
    ordered(OP, "clamp", low, high)?;
    let [n, _, _, c] = checked(OP, x, size)?;
    let shape = [n, size[0], size[1], c];
    if let Some(relay) = &noise {
        relay.noise.expect(OP, "noise", &shape, DType::F32, x.device())?;
    }

    let finish = Finish { low, high, noise };
    let mut y = Tensor::uninit(x.device(), &shape, x.dtype())?;
    let _timed = profile::scope(OP, y.shape());
    match x.device() {
        Device::Meta(meta) => {
            let passes = Passes::uninit(x, &y, upsampler, false)?;
            let noise = noise.map(|relay| relay.noise);
            meta.record(OP, OpKind::Resize, y.shape(), work(x, noise, &y, upsampler, passes.launches()));
        }
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) => resize_cpu(x, upsampler, finish, &mut y),
        Device::Cuda(card) => Passes::uninit(x, &y, upsampler, false)?.resize(card, x, finish, &mut y)?,
    }
    Ok(y)
}

fn resize_cpu(x: &Tensor, upsampler: Upsampler, Finish { low, high, noise }: Finish, y: &mut Tensor) {
    let per_image = y.numel() / y.shape()[0];
    by_image(x, upsampler, y, |mut image, [rows, columns], i| {
        image = image.horizontal(columns, |sum| sum as f32).vertical(rows, |sum| sum as f32).sharpened(upsampler);
        image.values.iter_mut().for_each(|value| *value = value.clamp(low, high));
        if let Some(RelayNoise { noise, signal, sigma }) = noise {
            let noise = &noise.cpu::<f32>()[i * per_image..][..per_image];
            image.values.iter_mut().zip(noise).for_each(|(value, noise)| *value = signal * *value + sigma * noise);
        }
        image
    });
}

/// [`resize`] as it happens to 8-bit RGB, for parity with code whose images pass through it: values in [-1, 1] are
/// quantised to `round(255 clamp(x/2 + 0.5, 0, 1))`, filtered horizontally, rounded and clamped to 8 bits, filtered
/// vertically, rounded and clamped again, and mapped back to [-1, 1]. PIL's fixed-point weights (22 bits) make
/// `Bilinear`, `Bicubic` and `BicubicEdge` equal to PIL level for level, on every device; PIL has no `BicubicTorch` and no
/// such Gaussian: these are the float filters on 8-bit levels, rounded once. NaN becomes level 0.
///
/// # Errors
/// As [`resize`].
pub fn resize_u8(x: &Tensor, size: [usize; 2], upsampler: Upsampler) -> Result<Tensor> {
    const OP: &str = "resize_u8";
    let [n, _, _, c] = checked(OP, x, size)?;

    let mut y = Tensor::uninit(x.device(), &[n, size[0], size[1], c], x.dtype())?;
    let _timed = profile::scope(OP, y.shape());
    match x.device() {
        Device::Meta(meta) => {
            let passes = Passes::uninit(x, &y, upsampler, true)?;
            meta.record(OP, OpKind::Resize, y.shape(), work(x, None, &y, upsampler, passes.launches()));
        }
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) => resize_u8_cpu(x, upsampler, &mut y),
        Device::Cuda(card) => Passes::uninit(x, &y, upsampler, true)?.resize_u8(card, x, &mut y)?,
    }
    Ok(y)
}

fn resize_u8_cpu(x: &Tensor, upsampler: Upsampler, y: &mut Tensor) {
    by_image(x, upsampler, y, |mut image, [rows, columns], _| {
        // `as u8` takes NaN to 0.
        let quantise = |v: f32| f32::from(((v / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8);
        image.values.iter_mut().for_each(|value| *value = quantise(*value));
        image = if upsampler == Upsampler::BicubicTorch {
            image.horizontal(columns, |sum| sum as f32).vertical(rows, level)
        } else {
            let (rows, columns) = (rows.fixed_point(), columns.fixed_point());
            image.horizontal(&columns, fixed_point_level).vertical(&rows, fixed_point_level)
        };
        image = image.sharpened(upsampler);
        image.values.iter_mut().for_each(|value| *value = 2.0 * (level(f64::from(*value)) / 255.0) - 1.0);
        image
    });
}

/// `x` and `y`: `[N, H, W, C]`.
fn sizes(x: &Tensor, y: &Tensor) -> ([usize; 4], [usize; 4]) {
    match (x.shape(), y.shape()) {
        (&[n, h, w, c], &[_, to_h, to_w, _]) => ([n, h, w, c], [n, to_h, to_w, c]),
        _ => unreachable!("both were checked"),
    }
}

/// Both passes, what follows them and the noise; tables and intermediate images are not counted as moved.
fn work(x: &Tensor, noise: Option<&Tensor>, y: &Tensor, upsampler: Upsampler, launches: u64) -> Work {
    let ([n, h, w, c], [_, to_h, to_w, _]) = sizes(x, y);
    let taps = |len, out| Filter::new(upsampler, len, out).taps.len();
    let taps = h * taps(w, to_w) + to_w * taps(h, to_h) + to_h * to_w * upsampler.sharpening_taps();
    let flops = (2 * n * c * taps) as u64 + if noise.is_some() { 3 * y.numel() as u64 } else { 0 };
    Work { macs: 0, flops, bytes: bytes_of(&[Some(x), noise, Some(y)]), launches }
}

/// On the cpu: `f` of every image of the batch, with the filters of rows and columns and the image's number.
fn by_image(x: &Tensor, upsampler: Upsampler, y: &mut Tensor, f: impl Fn(Image, [&Filter; 2], usize) -> Image) {
    let ([n, h, w, c], [_, to_h, to_w, _]) = sizes(x, y);
    let filters = [Filter::new(upsampler, h, to_h), Filter::new(upsampler, w, to_w)];
    let [rows, columns] = &filters;
    let (from, to) = (h * w * c, to_h * to_w * c);
    for i in 0..n {
        let mut image = Image { values: vec![0.0; from], h, w, c };
        by_dtype!(x.dtype(), T => map::<T, f32>(&x.cpu()[i * from..][..from], &mut image.values, |_| {}));
        let resized = f(image, [rows, columns], i);
        by_dtype!(x.dtype(), T => map::<f32, T>(&resized.values, &mut y.cpu_mut()[i * to..][..to], |_| {}));
    }
}

/// Nearest neighbour, source index `floor(i * in / out)`: `[N, H, W, C]` to `[N, size[0], size[1], C]`.
///
/// # Errors
/// As [`resize`].
pub fn resize_nearest(x: &Tensor, size: [usize; 2]) -> Result<Tensor> {
    const OP: &str = "resize_nearest";
    let [n, _, _, c] = checked(OP, x, size)?;

    let mut y = Tensor::uninit(x.device(), &[n, size[0], size[1], c], x.dtype())?;
    let _timed = profile::scope(OP, y.shape());
    match x.device() {
        Device::Meta(meta) => meta.record(OP, OpKind::Resize, y.shape(), pointwise(&y, &[Some(x)], 0)),
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) => by_dtype!(x.dtype(), T => resize_nearest_cpu::<T>(x, &mut y)),
        Device::Cuda(card) => cuda::resize::nearest(card, x, &mut y)?,
    }
    Ok(y)
}

fn resize_nearest_cpu<T: Element>(x: &Tensor, y: &mut Tensor) {
    let ([_, h, w, c], [_, to_h, to_w, _]) = sizes(x, y);
    let [rows, columns] = [nearest(h, to_h), nearest(w, to_w)];
    let x = x.cpu::<T>();
    y.cpu_mut::<T>().par_chunks_mut(to_w * c).enumerate().for_each(|(i, y)| {
        let row = &x[(i / to_h * h + rows[i % to_h]) * w * c..][..w * c];
        for (y, &column) in y.chunks_exact_mut(c).zip(&columns) {
            y.copy_from_slice(&row[column * c..][..c]);
        }
    });
}

/// `floor(i * len / out)` for every output index.
fn nearest(len: usize, out: usize) -> Vec<usize> {
    (0..out).map(|i| (i as u128 * len as u128 / out as u128) as usize).collect()
}

/// Bilinear between the centres of the four pixels around, border pixels repeated, no wider when it shrinks: torch's
/// `interpolate(mode="bilinear", align_corners=False, antialias=False)`. `[N, H, W, C]` to `[N, size[0], size[1], C]`, in f32;
/// of equal sizes the input.
///
/// # Errors
/// As [`resize`].
pub fn resize_bilinear(x: &Tensor, size: [usize; 2]) -> Result<Tensor> {
    const OP: &str = "resize_bilinear";
    let [n, h, w, c] = checked(OP, x, size)?;
    if size == [h, w] {
        return Ok(x.clone());
    }

    let mut y = Tensor::uninit(x.device(), &[n, size[0], size[1], c], x.dtype())?;
    let _timed = profile::scope(OP, y.shape());
    match x.device() {
        Device::Meta(meta) => meta.record(OP, OpKind::Resize, y.shape(), pointwise(&y, &[Some(x)], 9)),
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) => by_dtype!(x.dtype(), T => resize_bilinear_cpu::<T>(x, &mut y)),
        Device::Cuda(card) => cuda::resize::bilinear(card, x, &mut y)?,
    }
    Ok(y)
}

fn resize_bilinear_cpu<T: Element>(x: &Tensor, y: &mut Tensor) {
    let ([_, h, w, c], [_, to_h, to_w, _]) = sizes(x, y);
    let [rows, columns] = [between(h, to_h), between(w, to_w)];
    let x = x.cpu::<T>();
    y.cpu_mut::<T>().par_chunks_mut(to_w * c).enumerate().for_each(|(i, y)| {
        let (image, (up, down, k_row)) = (i / to_h, rows[i % to_h]);
        let [upper, lower] = [up, down].map(|row| &x[(image * h + row) * w * c..][..w * c]);
        for (y, &(left, right, k)) in y.chunks_exact_mut(c).zip(&columns) {
            for (channel, y) in y.iter_mut().enumerate() {
                let along = |row: &[T]| {
                    let [a, b] = [left, right].map(|column| row[column * c + channel].to_f32());
                    (1.0 - k) * a + k * b
                };
                *y = T::from_f32((1.0 - k_row) * along(upper) + k_row * along(lower));
            }
        }
    });
}

/// The two inputs around every output and the weight of the second: output i is at `(2 i + 1) len / (2 out) - 1/2`.
fn between(len: usize, out: usize) -> Vec<(usize, usize, f32)> {
    let of = |i: usize| {
        let at = ((2 * i as u128 + 1) * len as u128).saturating_sub(out as u128);
        let (first, rest) = ((at / (2 * out as u128)) as usize, at % (2 * out as u128));
        (first, (first + 1).min(len - 1), rest as f32 / (2 * out) as f32)
    };
    (0..out).map(of).collect()
}

/// Means of 2x2 pixels: `[N, H, W, C]` to `[N, ceil(H/2), ceil(W/2), C]`, summed in f32. At the lower and right border of an odd
/// size the mean is of the pixels that are there: torch's `avg_pool2d(x, 2, 2, ceil_mode=True)`.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape): not 4-d or empty; [`Error::Dtype`](crate::Error::Dtype).
pub fn avg_pool(x: &Tensor) -> Result<Tensor> {
    const OP: &str = "avg_pool";
    let [n, h, w, c] = checked(OP, x, [1, 1])?;

    let mut y = Tensor::uninit(x.device(), &[n, h.div_ceil(2), w.div_ceil(2), c], x.dtype())?;
    let _timed = profile::scope(OP, y.shape());
    match x.device() {
        Device::Meta(meta) => meta.record(OP, OpKind::Resize, y.shape(), pointwise(&y, &[Some(x)], 4)),
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) => by_dtype!(x.dtype(), T => avg_pool_cpu::<T>(x, &mut y)),
        Device::Cuda(card) => cuda::resize::avg_pool(card, x, &mut y)?,
    }
    Ok(y)
}

fn avg_pool_cpu<T: Element>(x: &Tensor, y: &mut Tensor) {
    let ([_, h, w, c], [_, to_h, to_w, _]) = sizes(x, y);
    let x = x.cpu::<T>();
    y.cpu_mut::<T>().par_chunks_mut(to_w * c).enumerate().for_each(|(i, y)| {
        let (image, top) = (i / to_h, i % to_h * 2);
        let rows = top..(top + 2).min(h);
        for (column, y) in y.chunks_exact_mut(c).enumerate() {
            let columns = 2 * column..(2 * column + 2).min(w);
            let count = (rows.len() * columns.len()) as f32;
            for (channel, y) in y.iter_mut().enumerate() {
                let pixels = rows.clone().flat_map(|row| columns.clone().map(move |column| (row, column)));
                let values = pixels.map(|(row, column)| x[((image * h + row) * w + column) * c + channel].to_f32());
                *y = T::from_f32(values.sum::<f32>() / count);
            }
        }
    });
}

fn checked(op: &'static str, x: &Tensor, size: [usize; 2]) -> Result<[usize; 4]> {
    let [n, h, w, c] = x.dims(op, "x")?;
    float(op, "x", x)?;
    if h == 0 || w == 0 || c == 0 {
        return Err(Error::shape(op, "x", x, "a height, a width and channels"));
    }
    if size.contains(&0) {
        return Err(Error::argument(op, "size", format!("{size:?}"), "at least 1 x 1"));
    }
    Ok([n, h, w, c])
}

impl Upsampler {
    /// Multiplications per pixel and channel that follow the resize.
    fn sharpening_taps(self) -> usize {
        match self {
            Upsampler::Bilinear | Upsampler::Bicubic | Upsampler::BicubicTorch => 0,
            Upsampler::BicubicGaussian => 10,
            Upsampler::BicubicEdge => 9,
        }
    }
}

/// One dimension's pass: output i is the sum of the inputs that `taps[ends[i - 1]..ends[i]]` name, times their weights.
pub(super) struct Filter {
    ends: Vec<usize>,
    /// Index of the input, weight. The border's rule is already applied to the indices.
    taps: Vec<(usize, f64)>,
}

impl Filter {
    fn new(upsampler: Upsampler, len: usize, out: usize) -> Filter {
        match upsampler {
            Upsampler::Bilinear => Filter::pil(len, out, 1.0, |x| (1.0 - x.abs()).max(0.0)),
            Upsampler::BicubicTorch => Filter::torch_bicubic(len, out),
            Upsampler::Bicubic | Upsampler::BicubicGaussian | Upsampler::BicubicEdge => {
                Filter::pil(len, out, 2.0, |x| cubic(x, -0.5))
            }
        }
    }

    /// PIL's filters: `kernel` has its support widened by the scale when downscaling, taps outside the image are left
    /// out, and the weights are normalised to sum 1.
    fn pil(len: usize, out: usize, support: f64, kernel: impl Fn(f64) -> f64) -> Filter {
        let scale = len as f64 / out as f64;
        let width = scale.max(1.0);
        let support = support * width;
        Filter::collect(out, |i| {
            let center = (i as f64 + 0.5) * scale;
            // Casts to an integer truncate, those to usize also stop at 0.
            let (first, end) = ((center - support + 0.5) as usize, ((center + support + 0.5) as usize).min(len));
            let weights: Vec<f64> = (first..end).map(|j| kernel((j as f64 - center + 0.5) / width)).collect();
            let sum: f64 = weights.iter().sum();
            (first..end).zip(weights).map(move |(j, weight)| (j, weight / sum)).collect()
        })
    }

    /// torch's, with the source coordinate in f32 as there: at index 1000 its rounding shifts the phase by up to 6e-5.
    fn torch_bicubic(len: usize, out: usize) -> Filter {
        let scale = len as f32 / out as f32;
        Filter::collect(out, |i| {
            let at = scale * (i as f32 + 0.5) - 0.5;
            let (first, phase) = (at.floor() as isize - 1, f64::from(at - at.floor()));
            let weight = |j: isize| cubic(phase + 1.0 - j as f64, -0.75);
            (0..4).map(|j| ((first + j).clamp(0, len as isize - 1) as usize, weight(j))).collect()
        })
    }

    /// 2 `radius` + 1 taps of a Gaussian of standard deviation `sigma`, in pixels, the image mirrored about its border pixels.
    pub(super) fn gaussian(radius: isize, sigma: f64, len: usize) -> Filter {
        let weight = |offset: isize| (-0.5 * (offset as f64 / sigma).powi(2)).exp();
        let sum: f64 = (-radius..=radius).map(weight).sum();
        let period = (2 * len as isize - 2).max(1);
        Filter::collect(len, |i| {
            let mirrored = |at: isize| at.rem_euclid(period).min(period - at.rem_euclid(period)) as usize;
            let tap = |offset| (mirrored(i as isize + offset).min(len - 1), weight(offset) / sum);
            (-radius..=radius).map(tap).collect()
        })
    }

    /// What remains of a line in db4's low band, which has every second sample: its analysis and its synthesis in one.
    /// Daubechies 1988, doi:10.1002/cpa.3160410705; the line is mirrored about its ends, which are repeated.
    pub(super) fn low_band(len: usize) -> Filter {
        let (taps, period) = (DB4.len() as isize, 2 * len as isize);
        Filter::collect(len, |i| {
            let mirrored = |at: isize| at.rem_euclid(period).min(period - 1 - at.rem_euclid(period)) as usize;
            let tap = |offset: isize| {
                let kept = ((i + 1) % 2..DB4.len()).step_by(2);
                let products = kept.filter_map(|a| Some(DB4[a] * DB4.get(usize::try_from(a as isize - offset).ok()?)?));
                (mirrored(i as isize + offset), products.sum())
            };
            (1 - taps..taps).map(tap).collect()
        })
    }

    /// Weights of exactly 0 are left out, so that a pass between equal sizes is a copy.
    fn collect(out: usize, taps_of: impl Fn(usize) -> Vec<(usize, f64)>) -> Filter {
        let mut filter = Filter { ends: Vec::with_capacity(out), taps: Vec::new() };
        for i in 0..out {
            filter.taps.extend(taps_of(i).into_iter().filter(|&(_, weight)| weight != 0.0));
            filter.ends.push(filter.taps.len());
        }
        filter
    }

    /// The weights in units of 2^-22, rounded half away from zero: PIL's for 8-bit images.
    fn fixed_point(&self) -> Filter {
        let rounded = |weight: f64| (weight * f64::from(FIXED_POINT_ONE)).round();
        Filter { ends: self.ends.clone(), taps: self.taps.iter().map(|&(j, weight)| (j, rounded(weight))).collect() }
    }

    fn out(&self) -> usize {
        self.ends.len()
    }

    fn taps_of(&self, i: usize) -> &[(usize, f64)] {
        let start = if i == 0 { 0 } else { self.ends[i - 1] };
        &self.taps[start..self.ends[i]]
    }
}

/// The low-pass of db4's analysis.
const DB4: [f64; 8] = [
    -0.010597401785069032,
    0.0328830116668852,
    0.030841381835560764,
    -0.18703481171909309,
    -0.027983769416859854,
    0.6308807679298589,
    0.7148465705529157,
    0.2303778133088965,
];

/// 1 in PIL's fixed point for 8-bit images.
const FIXED_POINT_ONE: u32 = 1 << 22;

/// A sum of levels times fixed-point weights (integers, exact in f64), rounded half up and clamped to 8 bits.
fn fixed_point_level(sum: f64) -> f32 {
    level(sum / f64::from(FIXED_POINT_ONE))
}

/// Rounded half up and clamped to 8 bits.
fn level(value: f64) -> f32 {
    (value + 0.5).floor().clamp(0.0, 255.0) as f32
}

/// Keys 1981, doi:10.1109/TASSP.1981.1163711: the piecewise cubic with slope `a` at 1.
fn cubic(x: f64, a: f64) -> f64 {
    let x = x.abs();
    if x < 1.0 {
        ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * a
    } else {
        0.0
    }
}

/// One image of the batch, `[h, w, c]`.
pub(super) struct Image {
    pub values: Vec<f32>,
    pub h: usize,
    pub w: usize,
    pub c: usize,
}

impl Image {
    /// `[h, w, c]` to `[h, filter.out(), c]`; `store` rounds a finished sum.
    pub fn horizontal(&self, filter: &Filter, store: impl Fn(f64) -> f32 + Sync) -> Image {
        let (h, w, c) = (self.h, filter.out(), self.c);
        let mut values = vec![0.0; h * w * c];
        values.par_chunks_mut(w * c).zip(self.values.par_chunks(self.w * c)).for_each(|(to, from)| {
            for (i, to) in to.chunks_exact_mut(c).enumerate() {
                for (channel, to) in to.iter_mut().enumerate() {
                    let terms = filter.taps_of(i).iter().map(|&(j, tap)| tap * f64::from(from[j * c + channel]));
                    *to = store(terms.sum());
                }
            }
        });
        Image { values, h, w, c }
    }

    /// `[h, w, c]` to `[filter.out(), w, c]`.
    pub fn vertical(&self, filter: &Filter, store: impl Fn(f64) -> f32 + Sync) -> Image {
        let (h, w, c) = (filter.out(), self.w, self.c);
        let mut values = vec![0.0; h * w * c];
        values.par_chunks_mut(w * c).enumerate().for_each_init(
            || vec![0.0; w * c],
            |sums, (i, to)| {
                sums.fill(0.0);
                for &(j, tap) in filter.taps_of(i) {
                    let from = &self.values[j * w * c..][..w * c];
                    sums.iter_mut().zip(from).for_each(|(sum, &from)| *sum += tap * f64::from(from));
                }
                to.iter_mut().zip(sums.iter()).for_each(|(to, &sum)| *to = store(sum));
            },
        );
        Image { values, h, w, c }
    }

    /// What configurations C and D add to the resize.
    fn sharpened(self, upsampler: Upsampler) -> Image {
        match upsampler {
            Upsampler::Bilinear | Upsampler::Bicubic | Upsampler::BicubicTorch => self,
            Upsampler::BicubicGaussian => {
                let [rows, columns] = [self.h, self.w].map(|len| Filter::gaussian(2, 1.1, len));
                self.horizontal(&columns, |sum| sum as f32).vertical(&rows, |sum| sum as f32)
            }
            Upsampler::BicubicEdge => self.edge_enhanced(),
        }
    }

    /// `1/2 [[-1,-1,-1],[-1,10,-1],[-1,-1,-1]]` as `(11 x - the sum of the 3x3 neighbourhood) / 2`, border pixels kept.
    fn edge_enhanced(&self) -> Image {
        let (h, w, c) = (self.h, self.w, self.c);
        let mut values = self.values.clone();
        values.par_chunks_mut(w * c).enumerate().for_each(|(i, to)| {
            if i == 0 || i + 1 == h || w < 3 {
                return;
            }
            let rows = [i - 1, i, i + 1].map(|row| &self.values[row * w * c..][..w * c]);
            for at in c..(w - 1) * c {
                let column = |at: usize| rows.iter().map(|row| row[at]).sum::<f32>();
                to[at] = (11.0 * rows[1][at] - (column(at - c) + column(at) + column(at + c))) / 2.0;
            }
        });
        Image { values, h, w, c }
    }
}
