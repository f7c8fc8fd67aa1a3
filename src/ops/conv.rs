use std::collections::BTreeSet;
use std::ops::Range;

use rayon::prelude::*;

use super::cpu::gemm::{self, Rows, Store};
use super::cpu::norm::{ChannelAffine, SourceRows};
use super::cpu::{self, OutputRows, math};
use super::cuda::conv::{Plan, Scratch};
use super::{
    Activation, GroupNorm, GroupStatistics, Modulation, Source, StepRows, Tensor, by_dtype, bytes_of, cases, cuda,
    profile,
};
use crate::error::{Error, Result};
use crate::runtime::{Device, Element, OpKind, Work};

/// Arguments of [`conv2d`].
#[derive(Clone, Copy, Debug)]
pub struct Conv2d<'a> {
    /// `[N, H, W, I]`, one source or two.
    pub x: Source<'a>,
    /// `[O, kh, kw, I]`
    pub weight: &'a Tensor,
    /// `[O]`
    pub bias: Option<&'a Tensor>,
    pub stride: usize,
    pub dilation: usize,
    /// Zeros around the input: top, bottom, left, right.
    pub padding: [usize; 4],
    /// Group norm of the input, modulated or not, and an activation; its statistics are those of `x`.
    pub norm: Option<ConvNorm<'a>>,
    /// The (normalised) input is resized to this height and width by nearest neighbour (the upsampler's conv).
    pub resize_to: Option<[usize; 2]>,
    /// `[steps * R, O]`: the row of each image's timestep and conditioning, added to every pixel.
    pub row: Option<StepRows<'a>>,
    /// `[N, H_out, W_out, O]`, added before `scale`.
    pub residual: Option<&'a Tensor>,
    /// The sum is multiplied by this: 1, or 1 / output_scale_factor.
    pub scale: f32,
    /// What is negative then is multiplied by this (LeakyReLU, Maas et al. 2013, sec. 2); 1: it stays as it is, bit for bit.
    pub negative_slope: f32,
    /// Only some output rows of one image are made, with the bits that they have in the whole result: `padding`, `resize_to` and
    /// `stride` are those of the whole, the residual is of the rows made.
    pub stripe: Option<Stripe<'a>>,
}

/// Which rows of a convolution over one image are made, and which rows of its input are there.
#[derive(Clone, Copy, Debug)]
pub struct Stripe<'a> {
    /// Of the whole input, as stored.
    pub height: usize,
    /// Row of the whole input that `x` begins with; `x` holds at least the rows under the kernel.
    pub first_row: usize,
    /// Output rows: the first, and the first that is not made.
    pub output: [usize; 2],
    /// For `norm`: the whole input's.
    pub statistics: Option<&'a GroupStatistics>,
}

/// What [`GroupNorm`] needs beside its input.
#[derive(Clone, Copy, Debug)]
pub struct ConvNorm<'a> {
    /// `[I]`
    pub gamma: &'a Tensor,
    /// `[I]`
    pub beta: &'a Tensor,
    pub groups: usize,
    pub eps: f32,
    /// Of the images of the convolution.
    pub modulation: Option<Modulation<'a>>,
    pub activation: Activation,
}

impl<'a> ConvNorm<'a> {
    pub fn of(self, x: Source<'a>) -> GroupNorm<'a> {
        let ConvNorm { gamma, beta, groups, eps, modulation, activation } = self;
        GroupNorm { x, gamma, beta, groups, eps, modulation, activation }
    }
}

impl<'a> Conv2d<'a> {
    /// Stride 1, dilation 1, "same" padding for odd kernels, nothing fused.
    pub fn new(x: impl Into<Source<'a>>, weight: &'a Tensor) -> Conv2d<'a> {
        let (kh, kw) = match weight.shape() {
            [_, kh, kw, _] => (*kh, *kw),
            _ => (1, 1), // conv2d reports the rank
        };
        let padding = [kh / 2, kh / 2, kw / 2, kw / 2];
        let (bias, norm, resize_to, row, residual, stripe) = (None, None, None, None, None, None);
        Conv2d {
            x: x.into(),
            weight,
            bias,
            stride: 1,
            dilation: 1,
            padding,
            norm,
            resize_to,
            row,
            residual,
            scale: 1.0,
            negative_slope: 1.0,
            stripe,
        }
    }
}

pub(super) const OP: &str = "conv2d";

/// Sizes of one call, checked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    pub(super) images: usize,
    /// Of the stored input, the whole of it.
    pub(super) stored: [usize; 2],
    /// Rows of the stored input that `x` holds.
    pub(super) held: [usize; 2],
    /// Of the input as the convolution sees it: after `resize_to`.
    pub(super) input: [usize; 2],
    /// Of what is made.
    pub(super) output: [usize; 2],
    /// Output row that it begins with.
    pub(super) first_output: usize,
    /// Of the whole result.
    pub(super) whole_output: [usize; 2],
    /// Of both sources.
    pub(super) channels: usize,
    pub(super) outputs: usize,
    pub(super) kernel: [usize; 2],
}

/// 2-d cross-correlation, fused: `leaky_relu(scale * (conv(resize(activation(norm(x)))) + bias + row + residual))`.
///
/// `H_out = (H + top + bottom - dilation * (kh - 1) - 1) / stride + 1`, the same for W (after `resize_to`).
///
/// An image's result depends on that image only, bit for bit: not on the batch, nor on the number of threads. On a card a
/// normalised input is rounded to its dtype before it is multiplied.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::Dtype`](crate::Error::Dtype), [`Error::Device`](crate::Error::Device):
/// which argument; [`Error::Argument`](crate::Error::Argument): stride or dilation 0, a kernel larger than the padded
/// input, an empty `resize_to`, what [`group_norm`](super::group_norm) refuses;
/// [`Error::OutOfMemory`](crate::Error::OutOfMemory).
pub fn conv2d(args: Conv2d) -> Result<Tensor> {
    let g = check(&args)?;
    let Some(stripe) = args.stripe else {
        return run(&args, &g);
    };
    // Only the rows that are read: the rest needs no norm.
    let [first_row, end] = stored_rows(&args, &g, &(g.first_output..g.first_output + g.output[0]));
    let held = first_row - stripe.first_row..end - stripe.first_row;
    let narrowed = |x: &Tensor| {
        let [_, rows, w, c] = x.dims(OP, "x")?;
        x.reshape(&[rows, w, c])?.rows(held.clone())?.reshape(&[1, held.len(), w, c])
    };
    let (a, b) = (narrowed(args.x.first())?, args.x.second().map(narrowed).transpose()?);
    let x = b.as_ref().map_or(Source::One(&a), |b| Source::Two(&a, b));
    let stripe = Some(Stripe { first_row, ..stripe });
    run(&Conv2d { x, stripe, ..args }, &Geometry { held: [first_row, end], ..g })
}

fn run(args: &Conv2d, g: &Geometry) -> Result<Tensor> {
    let x = args.x.first();
    let mut y = Tensor::uninit(x.device(), &[g.images, g.output[0], g.output[1], g.outputs], x.dtype())?;
    let _timed = profile::scope(OP, y.shape());
    profile::call(OP, || cases::conv_shape(args, g));
    match x.device() {
        Device::Meta(meta) => {
            let plan = Plan::new(args, g, None);
            let _scratch = Scratch::uninit(x.device(), &plan, x.dtype())?;
            meta.record(OP, OpKind::Conv, y.shape(), work(args, g, &plan, &y));
        }
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) => by_dtype!(x.dtype(), T => conv2d_cpu::<T>(args, g, &mut y)),
        Device::Cuda(card) => {
            let plan = Plan::new(args, g, Some(card));
            let scratch = Scratch::uninit(x.device(), &plan, x.dtype())?;
            cuda::conv::conv2d(card, args, g, &plan, scratch, &mut y)?;
        }
    }
    Ok(y)
}

fn check(args: &Conv2d) -> Result<Geometry> {
    let [n, rows, w, c] = args.x.dims(OP)?;
    let (x, weight) = (args.x.first(), args.weight);
    let (h, first_row) = args.stripe.map_or((rows, 0), |stripe| (stripe.height, stripe.first_row));
    if args.stripe.is_some() && n != 1 {
        return Err(Error::shape(OP, "x", x, "one image: a stripe is of one"));
    }
    if first_row > h || rows > h - first_row {
        return Err(Error::argument(
            OP,
            "stripe.first_row",
            first_row,
            format!("{rows} rows from there on within {h}"),
        ));
    }
    let [outputs, kh, kw, _] = weight.dims(OP, "weight")?;
    weight.expect(OP, "weight", &[outputs, kh, kw, c], x.dtype(), x.device())?;
    if kh == 0 || kw == 0 {
        return Err(Error::shape(OP, "weight", weight, "a kernel of at least 1 x 1"));
    }
    if args.stride == 0 {
        return Err(Error::argument(OP, "stride", 0, "at least 1"));
    }
    if args.dilation == 0 {
        return Err(Error::argument(OP, "dilation", 0, "at least 1"));
    }
    if let Some([rh, rw]) = args.resize_to
        && (rh == 0 || rw == 0 || h == 0 || w == 0)
    {
        let want = format!("a size of at least 1 x 1, from an input of at least 1 x 1 (it is {h} x {w})");
        return Err(Error::argument(OP, "resize_to", format!("{rh} x {rw}"), want));
    }
    let input = args.resize_to.unwrap_or([h, w]);
    let [top, bottom, left, right] = args.padding;
    let output = [
        output_size(args, input[0], kh, "height", [top, bottom])?,
        output_size(args, input[1], kw, "width", [left, right])?,
    ];
    if let Some(bias) = args.bias {
        bias.expect(OP, "bias", &[outputs], x.dtype(), x.device())?;
    }
    if let Some(norm) = args.norm {
        norm.of(args.x).check(OP)?;
    }
    if let Some(row) = args.row {
        row.check(OP, "row", n, outputs, x.dtype(), x.device())?;
    }
    let [first_output, end] = args.stripe.map_or([0, output[0]], |stripe| stripe.output);
    if first_output > end || end > output[0] {
        let (got, want) = (format!("{first_output}..{end}"), format!("a range within 0..{}", output[0]));
        return Err(Error::argument(OP, "stripe.output", got, want));
    }
    let g = Geometry {
        images: n,
        stored: [h, w],
        held: [first_row, first_row + rows],
        input,
        output: [end - first_output, output[1]],
        first_output,
        whole_output: output,
        channels: c,
        outputs,
        kernel: [kh, kw],
    };
    if let Some(residual) = args.residual {
        residual.expect(OP, "residual", &[n, g.output[0], g.output[1], outputs], x.dtype(), x.device())?;
    }
    if let Some(stripe) = args.stripe {
        let [first, last] = stored_rows(args, &g, &(first_output..end));
        if first < last && (first < g.held[0] || last > g.held[1]) {
            let want = format!("rows {first}..{last} of the {h}, for output rows {first_output}..{end}");
            return Err(Error::argument(OP, "stripe", format!("rows {}..{}", g.held[0], g.held[1]), want));
        }
        match (args.norm, stripe.statistics) {
            (Some(norm), Some(statistics)) => statistics.check(OP, &norm.of(args.x))?,
            (Some(_), None) => {
                return Err(Error::argument(OP, "stripe.statistics", "none", "those of the norm's input"));
            }
            (None, Some(_)) => return Err(Error::argument(OP, "stripe.statistics", "some", "none: there is no norm")),
            (None, None) => {}
        }
    }
    Ok(g)
}

fn output_size(args: &Conv2d, size: usize, kernel: usize, what: &str, padding: [usize; 2]) -> Result<usize> {
    // In u128 nothing overflows.
    let padded = size as u128 + padding[0] as u128 + padding[1] as u128;
    let reach = args.dilation as u128 * (kernel as u128 - 1) + 1;
    if padded < reach {
        let got = format!("{kernel} with dilation {}: {reach} values of the {what}", args.dilation);
        return Err(Error::argument(OP, "kernel", got, format!("at most the padded input's {padded}")));
    }
    let output = (padded - reach) / args.stride as u128 + 1;
    let limit = isize::MAX as u128;
    if padded > limit {
        return Err(Error::TooLarge { op: OP, what: "padded input", got: padded, limit });
    }
    Ok(output as usize)
}

/// Cost of the fused op, and the launches that a card splits it into.
fn work(args: &Conv2d, g: &Geometry, plan: &Plan, y: &Tensor) -> Work {
    let values = y.numel() as u64;
    let macs = values * (g.kernel[0] * g.kernel[1] * g.channels) as u64;
    let is_leaky = args.negative_slope != 1.0;
    let epilogue = [args.bias.is_some(), args.row.is_some(), args.residual.is_some(), args.scale != 1.0, is_leaky];
    let epilogue = epilogue.iter().filter(|&&used| used).count() as u64;
    let x_values = (g.images * (g.held[1] - g.held[0]) * g.stored[1] * g.channels) as u64;
    let norm = args.norm.map(|norm| norm.of(args.x));
    let norm_flops = norm.map_or(0, |norm| norm.flops_per_element() * x_values);
    let modulation = norm.map_or(0, |norm| norm.modulation_bytes([g.images, g.stored[0], g.stored[1], g.channels]));
    let (gamma, beta) = (norm.map(|norm| norm.gamma), norm.map(|norm| norm.beta));
    let (x, x2) = (Some(args.x.first()), args.x.second());
    Work {
        macs,
        flops: 2 * macs + epilogue * values + norm_flops,
        bytes: bytes_of(&[x, x2, Some(args.weight), args.bias, gamma, beta, args.residual, Some(y)])
            + modulation
            + args.row.map_or(0, |row| {
                let rows: BTreeSet<usize> = row.indices(g.images).collect();
                (rows.len() * g.outputs * y.dtype().size_bytes()) as u64
            }),
        launches: plan.launches(),
    }
}

/// Normalised input that exists at once, in f32; a larger one is made and consumed in bands of rows.
const BAND_BYTES: usize = 128 << 20;

fn conv2d_cpu<T: Element>(args: &Conv2d, g: &Geometry, y: &mut Tensor) {
    let epilogue = Epilogue {
        bias: args.bias.map(cpu::to_f32::<T>),
        row: args
            .row
            .map(|row| row.indices(g.images).map(|i| &row.table.cpu::<T>()[i * g.outputs..][..g.outputs]).collect()),
        residual: args.residual.map(|r| r.cpu::<T>()),
        scale: args.scale,
        negative_slope: args.negative_slope,
        outputs: g.outputs,
        pixels: g.output[0] * g.output[1],
        first_row: 0,
        y: OutputRows::new(y.cpu_mut::<T>(), g.outputs),
    };
    let weight = args.weight.cpu::<T>();
    let k = g.kernel[0] * g.kernel[1] * g.channels;
    let rows = g.held[1] - g.held[0];
    let x = SourceRows::<T>::new(&args.x, [g.images, rows, g.stored[1], g.channels]);
    let Some(norm) = args.norm.filter(|_| x.pixels > 0) else {
        // Without pixels there is only padding: nothing to normalise.
        let rows = Taps::new(args, g, x, g.held, g.first_output);
        return gemm::matmul([g.images * epilogue.pixels, g.outputs, k], &rows, weight, &epilogue);
    };

    let norm = norm.of(args.x);
    let affine = match args.stripe.and_then(|stripe| stripe.statistics).and_then(GroupStatistics::cpu) {
        Some(statistics) => ChannelAffine::new::<T>(&norm, statistics),
        None => ChannelAffine::group_norm(&x, &norm),
    };
    let mut epilogue = epilogue;
    for (images, output_rows) in bands(args, g) {
        let stored = stored_rows(args, g, &output_rows);
        let band = normalised(&x, &affine, g, images.clone(), stored);
        let band = SourceRows {
            a: &band,
            b: &[],
            channels_a: g.channels,
            channels: g.channels,
            images: images.len(),
            pixels: (stored[1] - stored[0]) * g.stored[1],
        };
        let rows = Taps::new(args, g, band, stored, output_rows.start);
        let rows = Taps { output_pixels: output_rows.len() * g.output[1], ..rows };
        epilogue.first_row = images.start * epilogue.pixels + (output_rows.start - g.first_output) * g.output[1];
        gemm::matmul([images.len() * rows.output_pixels, g.outputs, k], &rows, weight, &epilogue);
    }
}

/// All images and output rows at once when the normalised input is within [`BAND_BYTES`]; else bands of one image each.
fn bands(args: &Conv2d, g: &Geometry) -> Vec<(Range<usize>, Range<usize>)> {
    let row_bytes = g.stored[1] * g.channels * size_of::<f32>();
    let output = g.first_output..g.first_output + g.output[0];
    if g.images * (g.held[1] - g.held[0]) * row_bytes <= BAND_BYTES {
        return vec![(0..g.images, output)];
    }
    // As many output rows as the band's input rows feed, without their overlap.
    let stored_rows = (BAND_BYTES / row_bytes.max(1)).max(1);
    let rows = (stored_rows * g.input[0] / g.stored[0] / args.stride).max(1);
    (0..g.images)
        .flat_map(|image| {
            let output = output.clone();
            let end = output.end;
            output.step_by(rows).map(move |first| (image..image + 1, first..end.min(first + rows)))
        })
        .collect()
}

/// Stored input rows that these output rows read: the first, and the first behind them. Where they read none, an empty range
/// within the rows held.
fn stored_rows(args: &Conv2d, g: &Geometry, output: &Range<usize>) -> [usize; 2] {
    let top = args.padding[0];
    if output.is_empty() || g.input[0] == 0 {
        return [g.held[0]; 2];
    }
    let first = (output.start * args.stride).saturating_sub(top);
    let last = (output.end - 1) * args.stride + args.dilation * (g.kernel[0] - 1);
    if last < top || first >= g.input[0] {
        return [g.held[0]; 2];
    }
    let last = (last - top).min(g.input[0] - 1);
    [nearest(first, g.stored[0], g.input[0]), nearest(last, g.stored[0], g.input[0]) + 1]
}

/// Nearest neighbour: the source of index `i` when `from` values become `to`.
fn nearest(i: usize, from: usize, to: usize) -> usize {
    (i as u128 * from as u128 / to as u128) as usize
}

fn normalised<T: Element>(
    x: &SourceRows<T>,
    affine: &ChannelAffine,
    g: &Geometry,
    images: Range<usize>,
    [first, end]: [usize; 2],
) -> Vec<f32> {
    let (c, w) = (g.channels, g.stored[1]);
    let pixels = (end - first) * w;
    let mut band = vec![0.0; images.len() * pixels * c];
    let rows = cpu::norm::rows_per_task(c);
    band.par_chunks_mut(rows * c).enumerate().for_each(|(task, band)| {
        for (i, to) in band.chunks_exact_mut(c).enumerate() {
            let (image, pixel) = ((task * rows + i) / pixels + images.start, (task * rows + i) % pixels);
            x.load(image * x.pixels + (first - g.held[0]) * w + pixel, to);
            affine.apply(image, to);
        }
    });
    band
}

/// The convolution's left side: row r is output pixel r, its k values the input under the kernel, `[kh, kw, C]`.
struct Taps<'a, T> {
    x: SourceRows<'a, T>,
    stride: usize,
    dilation: usize,
    /// Top and left.
    padding: [usize; 2],
    kernel: [usize; 2],
    input: [usize; 2],
    /// Stored row and column of each input row and column.
    source: [Vec<usize>; 2],
    /// Stored rows that `x` holds.
    stored: [usize; 2],
    stored_width: usize,
    output_width: usize,
    /// Output pixels of an image in this product.
    output_pixels: usize,
    /// Output row that the product begins with.
    first_output_row: usize,
    /// The kernel's columns lie side by side in memory: no dilation, no resize, one source.
    contiguous: bool,
}

impl<'a, T: Element> Taps<'a, T> {
    fn new(
        args: &Conv2d,
        g: &Geometry,
        x: SourceRows<'a, T>,
        stored: [usize; 2],
        first_output_row: usize,
    ) -> Taps<'a, T> {
        let source = [0, 1].map(|d| (0..g.input[d]).map(|i| nearest(i, g.stored[d], g.input[d])).collect());
        Taps {
            stride: args.stride,
            dilation: args.dilation,
            padding: [args.padding[0], args.padding[2]],
            kernel: g.kernel,
            input: g.input,
            source,
            stored,
            stored_width: g.stored[1],
            output_width: g.output[1],
            output_pixels: g.output[0] * g.output[1],
            first_output_row,
            contiguous: args.dilation == 1 && args.resize_to.is_none() && x.channels_a == x.channels,
            x,
        }
    }

    /// First element of an input pixel within its image's stretch of a source with `channels` channels.
    fn pixel(&self, image: usize, y: usize, x: usize) -> usize {
        let [first, end] = self.stored;
        let row = image * (end - first) + (self.source[0][y] - first);
        row * self.stored_width + self.source[1][x]
    }

    /// Values `from..from + to.len()` of the channels of one input pixel.
    fn load_channels(&self, pixel: usize, from: usize, to: &mut [f32]) {
        let (channels, channels_a) = (self.x.channels, self.x.channels_a);
        let in_a = channels_a.saturating_sub(from).min(to.len());
        let (to_a, to_b) = to.split_at_mut(in_a);
        if !to_a.is_empty() {
            math::load(to_a, &self.x.a[pixel * channels_a + from..][..to_a.len()]);
        }
        if !to_b.is_empty() {
            let from = from + in_a - channels_a;
            math::load(to_b, &self.x.b[pixel * (channels - channels_a) + from..][..to_b.len()]);
        }
    }
}

impl<T: Element> Rows for Taps<'_, T> {
    fn load(&self, row: usize, k: Range<usize>, mut to: &mut [f32]) {
        let (image, pixel) = (row / self.output_pixels, row % self.output_pixels);
        let (out_y, out_x) = (pixel / self.output_width + self.first_output_row, pixel % self.output_width);
        let c = self.x.channels;
        let [kh, kw] = self.kernel;
        let [top, left] = self.padding;
        let (mut tap, mut from) = (k.start / c.max(1), k.start % c.max(1));
        while !to.is_empty() {
            let (ky, kx) = (tap / kw, tap % kw);
            debug_assert!(ky < kh);
            let (y, x) = (out_y * self.stride + ky * self.dilation, out_x * self.stride + kx * self.dilation);
            // Taps that are read or skipped together: to the end of the kernel row, or one.
            let inside_y = y >= top && y - top < self.input[0];
            let (taps, inside) = if !inside_y {
                (kw - kx, false)
            } else if self.contiguous {
                let before = left.saturating_sub(x).min(kw - kx);
                match before {
                    0 => match (self.input[1] + left).saturating_sub(x).min(kw - kx) {
                        0 => (kw - kx, false),
                        inside => (inside, true),
                    },
                    before => (before, false),
                }
            } else {
                (1, x >= left && x - left < self.input[1])
            };
            let count = (taps * c - from).min(to.len());
            let (now, rest) = to.split_at_mut(count);
            if !inside {
                now.fill(0.0);
            } else if self.contiguous {
                math::load(now, &self.x.a[self.pixel(image, y - top, x - left) * c + from..][..count]);
            } else {
                self.load_channels(self.pixel(image, y - top, x - left), from, now);
            }
            to = rest;
            tap += taps;
            from = 0;
        }
    }
}

struct Epilogue<'a, T> {
    /// `[O]`
    bias: Option<Vec<f32>>,
    /// `[O]` of each image
    row: Option<Vec<&'a [T]>>,
    /// `[N * H_out * W_out, O]`
    residual: Option<&'a [T]>,
    scale: f32,
    negative_slope: f32,
    outputs: usize,
    /// H_out * W_out
    pixels: usize,
    /// Output pixel, over all images, of the product's row 0.
    first_row: usize,
    /// `[N * H_out * W_out, O]`
    y: OutputRows<'a, T>,
}

impl<T: Element> Store for Epilogue<'_, T> {
    fn store(&self, row: usize, column: usize, sums: &mut [f32]) {
        let (row, len) = (self.first_row + row, sums.len());
        if let Some(bias) = &self.bias {
            math::add(sums, &bias[column..][..len]);
        }
        if let Some(rows) = &self.row {
            math::add(sums, &rows[row / self.pixels][column..][..len]);
        }
        if let Some(residual) = self.residual {
            math::add(sums, &residual[row * self.outputs + column..][..len]);
        }
        if self.scale != 1.0 {
            math::scale(sums, self.scale);
        }
        if self.negative_slope != 1.0 {
            math::leaky_relu(sums, self.negative_slope);
        }
        // SAFETY: matmul calls store once for each row and column; bands do not overlap and run one after another.
        math::store(unsafe { self.y.get(row, column..column + len) }, sums);
    }
}
