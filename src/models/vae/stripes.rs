//! Encoder and decoder in little memory: the largest maps are made in horizontal stripes. A norm takes the statistics of the
//! whole map and a convolution the rows around its stripe, so every value has the bits that it has without stripes: there is
//! nothing to blend.

use std::ops::Range;

use super::{Decoder, Encoder};
use crate::error::Result;
use crate::models::layers::{Conv2d, GroupNorm, ResnetBlock, Upsample};
use crate::ops::{self, Activation, GroupMoments, GroupStatistics, Stripe};
use crate::runtime::Tensor;

/// Does level `i` of [`block_out_channels`](super::VaeConfig::block_out_channels), with `input` and `output` channels, need no more
/// memory without stripes than the finest level needs with them, which is `finest` values a pixel of the finest map, times
/// four? In stripes a residual block keeps two maps, its result and the one that it comes from; without them also the
/// normalised input of a convolution.
fn fits(i: usize, input: usize, output: usize, finest: usize) -> bool {
    let whole = (2 * input + output).max(4 * output);
    i > 0 && 4 * whole <= (1 << (2 * i)) * finest
}

impl Encoder {
    /// As [`forward`](Encoder::forward), one image.
    pub(super) fn forward_in_stripes(&self, x: &Tensor, rows: usize) -> Result<Tensor> {
        let mut x = self.conv_in.forward(x)?;
        let finest = 4 * 2 * self.conv_in.outputs();
        for (i, block) in self.down_blocks.iter().enumerate() {
            let input = x.shape()[3];
            let output = block.resnets.first().map_or(input, ResnetBlock::outputs);
            if fits(i, input, output, finest) {
                for resnet in &block.resnets {
                    x = resnet.forward_owned(x)?;
                }
            } else {
                for resnet in &block.resnets {
                    x = in_stripes(resnet, Input::Whole(x), rows)?;
                }
            }
            if let Some(downsample) = &block.downsample {
                x = downsample.forward(&x)?;
            }
        }
        let x = self.mid_block.forward(x)?;
        normalised_in_stripes(&self.conv_norm_out, &self.conv_out, x, rows)
    }
}

impl Decoder {
    /// As [`forward`](Decoder::forward), one image.
    pub(super) fn forward_in_stripes(&self, x: &Tensor, rows: usize) -> Result<Tensor> {
        let mut x = self.mid_block.forward(self.conv_in.forward(x)?)?;
        let last = self.up_blocks.len() - 1;
        // With the finest upsampling's input, a quarter of its result.
        let kept = self.up_blocks[last].resnets.first().map_or(0, ResnetBlock::inputs);
        let finest = 4 * 2 * self.conv_out.inputs() + kept;
        let mut upsample: Option<&Upsample> = None;
        for (i, block) in self.up_blocks.iter().enumerate() {
            let input = x.shape()[3];
            let output = block.resnets.first().map_or(input, ResnetBlock::outputs);
            let mut x_in = match upsample {
                Some(by) => Input::Upsampled { from: x, by },
                None => Input::Whole(x),
            };
            if fits(last - i, input, output, finest) {
                x = x_in.whole()?;
                for resnet in &block.resnets {
                    x = resnet.forward_owned(x)?;
                }
            } else {
                for resnet in &block.resnets {
                    x_in = Input::Whole(in_stripes(resnet, x_in, rows)?);
                }
                x = x_in.whole()?;
            }
            upsample = block.upsample.as_ref();
        }
        normalised_in_stripes(&self.conv_norm_out, &self.conv_out, x, rows)
    }
}

/// What a residual block in stripes begins with, `[1, H, W, C]`.
enum Input<'a> {
    Whole(Tensor),
    /// The result of an upsampling convolution, made again whenever rows of it are read: with twice the input's height and
    /// width it is four times as large.
    Upsampled {
        from: Tensor,
        by: &'a Upsample,
    },
}

impl Input<'_> {
    fn dims(&self) -> Result<[usize; 4]> {
        match self {
            Input::Whole(x) => x.dims("vae", "x"),
            Input::Upsampled { from, .. } => {
                let [n, h, w, c] = from.dims("vae", "x")?;
                Ok([n, 2 * h, 2 * w, c])
            }
        }
    }

    fn whole(self) -> Result<Tensor> {
        let [_, h, w, _] = self.dims()?;
        match self {
            Input::Whole(x) => Ok(x),
            Input::Upsampled { from, by } => by.forward(&from, [h, w]),
        }
    }

    /// `[1, range.len(), W, C]`
    fn rows(&self, range: Range<usize>) -> Result<Tensor> {
        let [_, h, w, _] = self.dims()?;
        match self {
            Input::Whole(x) => rows(x, range),
            Input::Upsampled { from, by } => {
                let [_, height, _, _] = from.dims("vae", "x")?;
                let output = [range.start, range.end];
                by.forward_stripe(from, [h, w], Stripe { height, first_row: 0, output, statistics: None })
            }
        }
    }

    fn statistics(&self, norm: &GroupNorm, stripe_rows: usize) -> Result<GroupStatistics> {
        let dims = self.dims()?;
        let mut moments = GroupMoments::new(norm.conv_norm(Activation::Silu), dims)?;
        match self {
            Input::Whole(x) => moments.add(x)?,
            Input::Upsampled { .. } => {
                for range in stripes(dims[1], stripe_rows) {
                    moments.add(&self.rows(range)?)?;
                }
            }
        }
        moments.finish()
    }
}

/// A residual block: `h`, the input of its second convolution, is whole, and so is its shortcut, into which the result goes
/// stripe by stripe. An input that is whole and has no convolution in its way is the shortcut itself.
fn in_stripes(block: &ResnetBlock, input: Input, stripe_rows: usize) -> Result<Tensor> {
    let [_, height, w, _] = input.dims()?;
    let like =
        |channels| Tensor::uninit(block.conv1.weight.device(), &[height, w, channels], block.conv1.weight.dtype());
    let statistics = input.statistics(&block.norm1, stripe_rows)?;
    let mut moments = GroupMoments::new(block.norm2.conv_norm(Activation::Silu), [1, height, w, block.outputs()])?;
    let mut h = like(block.outputs())?;
    let mut shortcut = match (&input, &block.conv_shortcut) {
        (Input::Whole(_), None) => None,
        _ => Some(like(block.outputs())?),
    };
    for range in stripes(height, stripe_rows) {
        let output = [range.start, range.end];
        // The 3x3 convolution reads a row above and a row below.
        let first_row = range.start.saturating_sub(1);
        let x = input.rows(first_row..height.min(range.end + 1))?;
        let stripe = Stripe { height, first_row, output, statistics: Some(&statistics) };
        let norm = Some(block.norm1.conv_norm(Activation::Silu));
        let y = ops::conv2d(ops::Conv2d { norm, stripe: Some(stripe), ..block.conv1.args(&x) })?;
        moments.add(&y)?;
        copy_rows(&mut h, range.start, &y)?;
        drop(y);
        if let Some(shortcut) = &mut shortcut {
            let y = match &block.conv_shortcut {
                Some(conv) => {
                    let stripe = Some(Stripe { statistics: None, ..stripe });
                    ops::conv2d(ops::Conv2d { stripe, ..conv.args(&x) })?
                }
                None => rows(&x, range.start - first_row..range.end - first_row)?,
            };
            copy_rows(shortcut, range.start, &y)?;
        }
    }
    let mut y = match (shortcut, input) {
        (Some(shortcut), _) => shortcut,
        (None, input) => {
            let x = input.whole()?;
            let [_, h, w, c] = x.dims("vae", "x")?;
            x.reshape(&[h, w, c])?
        }
    };

    let statistics = moments.finish()?;
    let c = block.outputs();
    let h = h.reshape(&[1, height, w, c])?;
    for range in stripes(height, stripe_rows) {
        let output = [range.start, range.end];
        let stripe = Some(Stripe { height, first_row: 0, output, statistics: Some(&statistics) });
        let (norm, scale) = (Some(block.norm2.conv_norm(Activation::Silu)), block.scale);
        let made = {
            let residual = y.rows(range.clone())?.reshape(&[1, range.len(), w, c])?;
            let residual = Some(&residual);
            ops::conv2d(ops::Conv2d { norm, residual, scale, stripe, ..block.conv2.args(&h) })?
        };
        copy_rows(&mut y, range.start, &made)?;
    }
    y.reshape(&[1, height, w, c])
}

/// The last norm and convolution.
fn normalised_in_stripes(norm: &GroupNorm, conv: &Conv2d, x: Tensor, stripe_rows: usize) -> Result<Tensor> {
    let [_, height, w, _] = x.dims("vae", "x")?;
    let norm = norm.conv_norm(Activation::Silu);
    let mut moments = GroupMoments::new(norm, x.dims("vae", "x")?)?;
    moments.add(&x)?;
    let statistics = moments.finish()?;
    let mut y = Tensor::uninit(x.device(), &[height, w, conv.outputs()], x.dtype())?;
    for range in stripes(height, stripe_rows) {
        let output = [range.start, range.end];
        let stripe = Some(Stripe { height, first_row: 0, output, statistics: Some(&statistics) });
        let made = ops::conv2d(ops::Conv2d { norm: Some(norm), stripe, ..conv.args(&x) })?;
        copy_rows(&mut y, range.start, &made)?;
    }
    y.reshape(&[1, height, w, conv.outputs()])
}

/// `0..height` in ranges of `rows`, the last of which may be shorter.
fn stripes(height: usize, rows: usize) -> impl Iterator<Item = Range<usize>> {
    (0..height).step_by(rows).map(move |first| first..height.min(first.saturating_add(rows)))
}

/// Rows of one image `[1, H, W, C]`, sharing its storage: `[1, range.len(), W, C]`.
fn rows(x: &Tensor, range: Range<usize>) -> Result<Tensor> {
    let [_, h, w, c] = x.dims("vae", "x")?;
    let count = range.len();
    x.reshape(&[h, w, c])?.rows(range)?.reshape(&[1, count, w, c])
}

/// A stripe `[1, rows, W, C]` to its place in a map `[H, W, C]`.
fn copy_rows(map: &mut Tensor, first: usize, stripe: &Tensor) -> Result<()> {
    let [_, rows, w, c] = stripe.dims("vae", "stripe")?;
    map.copy_rows_from(first, &stripe.reshape(&[rows, w, c])?)
}
