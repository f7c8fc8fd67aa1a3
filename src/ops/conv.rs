use super::{GroupNorm, Source, Tensor};
use crate::error::Result;

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
    /// Group norm (and SiLU) of the input, applied while it is loaded; its `x` is this `x`.
    pub norm: Option<ConvNorm<'a>>,
    /// The input is first resized to this height and width by nearest neighbour (the upsampler's conv).
    pub resize_to: Option<[usize; 2]>,
    /// `[N, O]`: the timestep's row, added to every pixel.
    pub row: Option<&'a Tensor>,
    /// `[N, H_out, W_out, O]`, added before `scale`.
    pub residual: Option<&'a Tensor>,
    /// The sum is multiplied by this: 1, or 1 / output_scale_factor.
    pub scale: f32,
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
    pub silu: bool,
}

impl<'a> ConvNorm<'a> {
    pub fn of(self, x: Source<'a>) -> GroupNorm<'a> {
        GroupNorm { x, gamma: self.gamma, beta: self.beta, groups: self.groups, eps: self.eps, silu: self.silu }
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
        let (bias, norm, resize_to, row, residual) = (None, None, None, None, None);
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
        }
    }
}

/// 2-d cross-correlation, fused: `scale * (conv(silu(norm(resize(x)))) + bias + row + residual)`.
///
/// `H_out = (H + top + bottom - dilation * (kh - 1) - 1) / stride + 1`, the same for W (after `resize_to`).
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::Dtype`](crate::Error::Dtype), [`Error::Device`](crate::Error::Device):
/// which argument; [`Error::Argument`](crate::Error::Argument): stride or dilation 0, a kernel larger than the padded
/// input; [`Error::OutOfMemory`](crate::Error::OutOfMemory).
pub fn conv2d(_args: Conv2d) -> Result<Tensor> {
    unimplemented!()
}
