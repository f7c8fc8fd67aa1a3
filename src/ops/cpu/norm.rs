//! Statistics and normalisation of channels-last rows (pixels), for the norms and for a convolution that normalises its input.

use rayon::prelude::*;

use super::math::{self, simd};
use crate::ops::{Activation, GroupNorm, Source};
use crate::runtime::Element;

/// Rows of C channels that a task or a partial sum takes: 64 KiB of f32, however many threads there are.
pub fn rows_per_task(channels: usize) -> usize {
    (16 * 1024 / channels.max(1)).max(1)
}

/// One source or two side by side, as rows of channels.
pub struct SourceRows<'a, T> {
    pub a: &'a [T],
    pub b: &'a [T],
    pub channels_a: usize,
    /// Of both sources.
    pub channels: usize,
    pub images: usize,
    /// H * W
    pub pixels: usize,
}

impl<'a, T: Element> SourceRows<'a, T> {
    /// `dims`: `[N, H, W, C]` as [`Source::dims`] returned it.
    pub fn new(x: &Source<'a>, [n, h, w, channels]: [usize; 4]) -> SourceRows<'a, T> {
        let channels_a = x.first().shape()[3];
        let b = x.second().map_or(&[][..], |b| b.cpu::<T>());
        SourceRows { a: x.first().cpu::<T>(), b, channels_a, channels, images: n, pixels: h * w }
    }

    /// All channels of one row, counted over all images.
    pub fn load(&self, row: usize, to: &mut [f32]) {
        let (to_a, to_b) = to.split_at_mut(self.channels_a);
        math::load(to_a, &self.a[row * self.channels_a..][..self.channels_a]);
        if !to_b.is_empty() {
            let channels_b = self.channels - self.channels_a;
            math::load(to_b, &self.b[row * channels_b..][..channels_b]);
        }
    }
}

/// Mean and sum of squared deviations of `count` values.
#[derive(Clone, Copy, Debug, Default)]
pub struct Moments {
    count: f64,
    mean: f64,
    squares: f64,
}

impl Moments {
    /// Of both sets together: Chan, Golub & LeVeque 1979.
    fn merge(self, other: Moments) -> Moments {
        let count = self.count + other.count;
        if count == 0.0 {
            return self;
        }
        let delta = other.mean - self.mean;
        Moments {
            count,
            mean: self.mean + delta * other.count / count,
            squares: self.squares + other.squares + delta * delta * self.count * other.count / count,
        }
    }

    /// Mean and 1 / sqrt(var + eps).
    pub fn finished(self, eps: f32) -> [f64; 2] {
        [self.mean, 1.0 / (self.squares / self.count + f64::from(eps)).sqrt()]
    }
}

/// Group norm of an input whose statistics are known: `y[n, c] = activation((x - mean[n, c]) * scale[n, c] + shift[n, c])`.
pub struct ChannelAffine {
    /// `[N, C]`
    mean: Vec<f32>,
    /// `[N, C]`: gamma / sqrt(var + eps), times 1 + scale of the modulation
    scale: Vec<f32>,
    /// `[N, C]`: beta, modulated
    shift: Vec<f32>,
    channels: usize,
    activation: Activation,
}

impl ChannelAffine {
    /// Of the statistics of `x`.
    pub fn group_norm<T: Element>(x: &SourceRows<T>, args: &GroupNorm) -> ChannelAffine {
        let mut moments = vec![Moments::default(); x.images * args.groups];
        for (image, moments) in moments.chunks_exact_mut(args.groups).enumerate() {
            add_moments(x, image * x.pixels, x.pixels, block_rows(x.channels, x.pixels), moments);
        }
        let statistics: Vec<[f64; 2]> = moments.into_iter().map(|moments| moments.finished(args.eps)).collect();
        ChannelAffine::new::<T>(args, &statistics)
    }

    /// `statistics`: mean and 1 / sqrt(var + eps) of every image and group.
    pub fn new<T: Element>(args: &GroupNorm, statistics: &[[f64; 2]]) -> ChannelAffine {
        let (gamma, beta) = (super::to_f32::<T>(args.gamma), super::to_f32::<T>(args.beta));
        let (images, channels) = (statistics.len() / args.groups, gamma.len());
        let mut affine = ChannelAffine {
            mean: Vec::with_capacity(images * channels),
            scale: Vec::with_capacity(images * channels),
            shift: beta.repeat(images),
            channels,
            activation: args.activation,
        };
        let group_channels = channels / args.groups;
        for (i, [mean, rstd]) in statistics.iter().enumerate() {
            let group = i % args.groups;
            let channels = group * group_channels..(group + 1) * group_channels;
            affine.mean.extend(channels.clone().map(|_| *mean as f32));
            affine.scale.extend(gamma[channels].iter().map(|&gamma| (f64::from(gamma) * rstd) as f32));
        }
        if let Some(columns) = args.columns() {
            let [scale, shift] = columns.map(|columns| columns.cpu::<T>(images, channels).concat());
            for (to, scale) in affine.scale.iter_mut().zip(&scale) {
                *to *= 1.0 + scale;
            }
            modulate(&mut affine.shift, &scale, &shift);
        }
        affine
    }

    /// Normalises one row of image `image` in place.
    pub fn apply(&self, image: usize, values: &mut [f32]) {
        let [mean, scale, shift] =
            [&self.mean, &self.scale, &self.shift].map(|all| &all[image * self.channels..][..self.channels]);
        if self.activation == Activation::Silu {
            return affine_silu(values, mean, scale, shift);
        }
        affine(values, mean, scale, shift);
        math::activate(self.activation, values);
    }
}

/// Rows that [`add_moments`] sums up at once, of an image of `pixels`.
pub fn block_rows(channels: usize, pixels: usize) -> usize {
    rows_per_task(channels).min(pixels.max(1))
}

/// Adds to the moments `to` of each group those of `count` rows from `first`: blocks of `block` rows are summed in f32, in two
/// passes each while they are in cache, and merged in f64 in their order.
pub fn add_moments<T: Element>(x: &SourceRows<T>, first: usize, count: usize, block: usize, to: &mut [Moments]) {
    let groups = to.len();
    let mut moments = vec![Moments::default(); count.div_ceil(block) * groups];
    moments.par_chunks_mut(groups).enumerate().for_each(|(i, to)| {
        block_moments(x, first + i * block, block.min(count - i * block), to);
    });
    for moments in moments.chunks_exact(groups) {
        for (to, moments) in to.iter_mut().zip(moments) {
            *to = to.merge(*moments);
        }
    }
}

/// Moments by group of `count` rows from `first`.
fn block_moments<T: Element>(x: &SourceRows<T>, first: usize, count: usize, to: &mut [Moments]) {
    let c = x.channels;
    let mut values = vec![0.0; count * c];
    let mut sums = vec![0.0; 3 * c];
    let (mean, rest) = sums.split_at_mut(c);
    let (deviation, squares) = rest.split_at_mut(c);
    for (i, values) in values.chunks_exact_mut(c).enumerate() {
        x.load(first + i, values);
        math::add(mean, values);
    }
    math::scale(mean, 1.0 / count as f32);
    for values in values.chunks_exact(c) {
        deviations(values, mean, deviation, squares);
    }
    let group_channels = c / to.len();
    for (group, to) in to.iter_mut().enumerate() {
        for c in group * group_channels..(group + 1) * group_channels {
            // `mean` was rounded; what is left of the sum of deviations corrects it.
            let n = count as f64;
            let left = f64::from(deviation[c]) / n;
            let channel = Moments {
                count: n,
                mean: f64::from(mean[c]) + left,
                squares: (f64::from(squares[c]) - n * left * left).max(0.0),
            };
            *to = to.merge(channel);
        }
    }
}

simd! {
    fn deviations(values: &[f32], mean: &[f32], sum: &mut [f32], squares: &mut [f32]) {
        for (((value, mean), sum), squares) in values.iter().zip(mean).zip(sum).zip(squares) {
            let d = value - mean;
            *sum += d;
            *squares = math::fma::<FMA>(d, d, *squares);
        }
    }
}

simd! {
    fn affine(values: &mut [f32], mean: &[f32], scale: &[f32], shift: &[f32]) {
        for (((value, mean), scale), shift) in values.iter_mut().zip(mean).zip(scale).zip(shift) {
            *value = math::fma::<FMA>(*value - mean, *scale, *shift);
        }
    }
}

simd! {
    fn affine_silu(values: &mut [f32], mean: &[f32], scale: &[f32], shift: &[f32]) {
        for (((value, mean), scale), shift) in values.iter_mut().zip(mean).zip(scale).zip(shift) {
            *value = math::silu::<FMA>(math::fma::<FMA>(*value - mean, *scale, *shift));
        }
    }
}

simd! {
    /// Normalises one row in place: `(x - mean) / sqrt(var + eps) * gamma + beta`.
    pub fn layer_norm_row(values: &mut [f32], gamma: &[f32], beta: &[f32], eps: f32) {
        let count = values.len() as f32;
        let rough = lane_sum(values.iter().copied()) / count;
        // `rough` was rounded; the mean deviation from it corrects it.
        let left = lane_sum(values.iter().map(|value| value - rough)) / count;
        let mean = rough + left;
        let squares = lane_sum(values.iter().map(|value| (value - rough - left) * (value - rough - left)));
        let rstd = 1.0 / (squares / count + eps).sqrt();
        for ((value, gamma), beta) in values.iter_mut().zip(gamma).zip(beta) {
            *value = math::fma::<FMA>((*value - rough - left) * rstd, *gamma, *beta);
        }
    }
}

simd! {
    /// `values = (1 + scale) * values + shift`
    pub fn modulate(values: &mut [f32], scale: &[f32], shift: &[f32]) {
        for ((value, scale), shift) in values.iter_mut().zip(scale).zip(shift) {
            *value = math::fma::<FMA>(*value, 1.0 + scale, *shift);
        }
    }
}

simd! {
    /// Normalises one row in place: `x / sqrt(mean(x^2) + eps) * gamma`.
    pub fn rms_norm_row(values: &mut [f32], gamma: &[f32], eps: f32) {
        let squares = lane_sum(values.iter().map(|value| value * value));
        let scale = 1.0 / (squares / values.len() as f32 + eps).sqrt();
        for (value, gamma) in values.iter_mut().zip(gamma) {
            *value = *value * scale * gamma;
        }
    }
}

/// A sum in 16 interleaved chains, which the compiler may vectorise; the order is the same on every machine.
#[inline(always)]
fn lane_sum(mut values: impl ExactSizeIterator<Item = f32>) -> f32 {
    let mut lanes = [0.0f32; 16];
    for _ in 0..values.len() / 16 {
        for lane in &mut lanes {
            *lane += values.next().unwrap_or(0.0);
        }
    }
    for (lane, value) in lanes.iter_mut().zip(values) {
        *lane += value;
    }
    for width in [8, 4, 2, 1] {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
    }
    lanes[0]
}
