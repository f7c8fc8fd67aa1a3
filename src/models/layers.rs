//! Layers with weights: the checkpoint's names, the fused ops.

use std::ops::Range;
use std::sync::OnceLock;

use super::weights::Weights;
use crate::error::{Error, Result};
use crate::ops::{
    self, Activation, ConvNorm, LinearFp8, LowPass, Modulation, Quantized, Source, SpectralFilter, StepColumns,
    StepRows, Stripe,
};
use crate::runtime::Tensor;

/// A linear layer's weight `[N, K]`, in the dtype of the activations or in 8 bits.
pub enum Matrix {
    Plain(Tensor),
    Fp8(Quantized),
}

impl Matrix {
    /// N
    pub fn rows(&self) -> usize {
        match self {
            Matrix::Plain(weight) => weight.shape()[0],
            Matrix::Fp8(weight) => weight.shape()[0],
        }
    }
}

impl From<Tensor> for Matrix {
    fn from(weight: Tensor) -> Matrix {
        Matrix::Plain(weight)
    }
}

/// `weight: [N, K]`, `bias: [N]` or none.
pub struct Linear {
    pub weight: Matrix,
    pub bias: Option<Tensor>,
}

impl Linear {
    pub fn load(w: &Weights, n: usize, k: usize) -> Result<Linear> {
        Ok(Linear { weight: w.matrix("weight", n, k)?.into(), bias: Some(w.tensor("bias", &[n])?) })
    }

    pub fn load_without_bias(w: &Weights, n: usize, k: usize) -> Result<Linear> {
        Ok(Linear { weight: w.matrix("weight", n, k)?.into(), bias: None })
    }

    /// A layer whose weight may be in 8 bits: one with many rows of input, step after step.
    pub fn load_product(w: &Weights, n: usize, k: usize) -> Result<Linear> {
        Ok(Linear { weight: w.product("weight", n, k)?, bias: Some(w.tensor("bias", &[n])?) })
    }

    /// `[..., K]` to `[..., N]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.fused(x, Activation::None, None)
    }

    pub fn forward_residual(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        self.fused(x, Activation::None, Some(residual))
    }

    pub fn fused(&self, x: &Tensor, activation: Activation, residual: Option<&Tensor>) -> Result<Tensor> {
        self.run(x, activation, None, residual)
    }

    /// `gate * (x W^T + bias) + residual`, `x: [images, ..., K]`; of the gate N columns.
    pub fn forward_gated(&self, x: &Tensor, gate: StepColumns, residual: &Tensor) -> Result<Tensor> {
        self.run(x, Activation::None, Some(gate), Some(residual))
    }

    fn run(
        &self,
        x: &Tensor,
        activation: Activation,
        gate: Option<StepColumns>,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        let bias = self.bias.as_ref();
        match &self.weight {
            Matrix::Plain(weight) => ops::linear(ops::Linear { x, weight, bias, activation, gate, residual }),
            Matrix::Fp8(weight) => {
                let dtype = x.dtype();
                ops::linear_fp8(LinearFp8 { x: &ops::quantize(x)?, weight, bias, activation, gate, residual, dtype })
            }
        }
    }
}

/// `weight: [O, kh, kw, I]`, `bias: [O]`.
pub struct Conv2d {
    pub weight: Tensor,
    pub bias: Tensor,
    /// The 3x3 kernels dispersed to 5x5, `[O, 5, 5, I]`, from the first call on that asks for them.
    dispersed: OnceLock<Tensor>,
}

/// How a 3x3 convolution is applied, beside as it was trained: the re-dilated and the dispersed convolution of ScaleCrafter (He et
/// al. 2023, arXiv:2310.07702, sec. 3.2 and 3.3).
///
/// With D = ceil(factor), the input is enlarged bilinearly by D / factor, convolved with dilation D, and the result resized to
/// the size that the convolution has without: a dilation by `factor`, whole or not.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Redilation {
    /// Above 0, at most [`MOST`](Redilation::MOST).
    pub factor: f64,
    /// With 5x5 kernels ([`disperse`](ops::disperse)).
    pub dispersed: bool,
}

impl Redilation {
    /// As it was trained.
    pub const NONE: Redilation = Redilation { factor: 1.0, dispersed: false };
    /// The largest factor: far beyond the published 4.
    pub const MOST: f64 = 32.0;

    pub fn by(factor: f64) -> Redilation {
        Redilation { factor, dispersed: false }
    }

    fn dilation(self) -> usize {
        self.factor.ceil() as usize
    }

    /// A side of the input as the convolution sees it: as published, rounded to even.
    fn resized(self, side: usize) -> usize {
        (side as f64 * (self.factor.ceil() / self.factor)).round_ties_even() as usize
    }
}

/// How a 3x3 convolution is applied in a call.
#[derive(Clone, Copy, Debug)]
pub enum ConvForm<'a> {
    Redilated(Redilation),
    Filtered(FilteredConv<'a>),
}

/// A convolution whose dilation is larger than it was trained with, and what passes to it is low frequencies: FouriScale (Huang et
/// al. 2024, arXiv:2403.12963, sec. 3.2 and 3.3). The batch ends with twins, which are treated less severely.
#[derive(Clone, Copy, Debug)]
pub struct FilteredConv<'a> {
    /// How many times the trained reach, 1 or more.
    pub factor: f64,
    /// Of the samples before the twins, and of the twins.
    pub dilations: [usize; 2],
    pub filter: Option<MapFilter>,
    /// The last so many samples.
    pub twins: usize,
    /// The rows of both, where a convolution adds rows and they are others than those of the whole batch.
    pub rows: Option<[StepRows<'a>; 2]>,
}

/// What [`FilteredConv`] filters by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MapFilter {
    /// Height and width of the layer's map for samples of the size that the network was trained at.
    pub base: [usize; 2],
    pub floor: f64,
}

impl MapFilter {
    /// The sides to which a map is padded: the trained ones as often as the longer side needs, as published; what is odd then is one
    /// more.
    fn padded(&self, map: [usize; 2]) -> [usize; 2] {
        let times = |axis: usize| map[axis].div_ceil(self.base[axis].max(1));
        let times = times(0).max(times(1));
        self.base.map(|base| (base.max(1) * times).next_multiple_of(2))
    }
}

impl From<Redilation> for ConvForm<'_> {
    fn from(redilation: Redilation) -> Self {
        ConvForm::Redilated(redilation)
    }
}

impl Conv2d {
    pub fn load(w: &Weights, out: usize, input: usize, kernel: usize) -> Result<Conv2d> {
        Ok(Conv2d::new(w.conv("weight", out, input, kernel)?, w.tensor("bias", &[out])?))
    }

    pub fn new(weight: Tensor, bias: Tensor) -> Conv2d {
        Conv2d { weight, bias, dispersed: OnceLock::new() }
    }

    fn dispersed(&self) -> Result<&Tensor> {
        if let Some(weight) = self.dispersed.get() {
            return Ok(weight);
        }
        let weight = ops::disperse(&self.weight)?;
        Ok(self.dispersed.get_or_init(|| weight))
    }

    /// The convolution `args` of this layer, whose padding is that of dilation 1, as `redilation` says. Half a stride of a side that
    /// the stride does not divide is cut off by the last resize, as published.
    ///
    /// # Errors
    /// Those of the ops.
    pub fn redilated<'a>(&'a self, args: ops::Conv2d<'a>, redilation: Redilation) -> Result<Tensor> {
        if redilation == Redilation::NONE {
            return ops::conv2d(args);
        }
        let weight = if redilation.dispersed { self.dispersed()? } else { &self.weight };
        let (dilation, reach) = (redilation.dilation(), weight.shape()[1] / 2);
        let padding = args.padding.map(|side| side * dilation * reach);
        let args = ops::Conv2d { weight, dilation, padding, ..args };
        let [_, h, w, _] = args.x.dims("conv2d")?;
        let size = args.resize_to.unwrap_or([h, w]);
        let (seen, out) = (size.map(|side| redilation.resized(side)), size.map(|side| (side / args.stride).max(1)));
        let whole = size.iter().all(|side| side.is_multiple_of(args.stride));
        if seen == size && whole {
            return ops::conv2d(args);
        }
        let normed = args.norm.map(|norm| ops::group_norm(norm.of(args.x))).transpose()?;
        let x = normed.as_ref().map_or(args.x, Source::One);
        let y = match (args.resize_to, x) {
            // Nothing but the convolution's result is resized.
            _ if seen == size => ops::conv2d(ops::Conv2d { x, norm: None, residual: None, ..args })?,
            (Some(_), Source::Two(x, _)) => {
                return Err(Error::shape("conv2d", "x", x, "one source: it is resized twice"));
            }
            (Some(size), Source::One(x)) => {
                let x = ops::resize_bilinear(&ops::resize_nearest(x, size)?, seen)?;
                drop(normed);
                ops::conv2d(ops::Conv2d { x: (&x).into(), norm: None, residual: None, resize_to: None, ..args })?
            }
            (None, x) => {
                let joined = match x {
                    Source::One(x) => ops::resize_bilinear(x, seen)?,
                    Source::Two(a, b) => ops::resize_bilinear(&ops::concat(a, b)?, seen)?,
                };
                drop(normed);
                ops::conv2d(ops::Conv2d { x: (&joined).into(), norm: None, residual: None, ..args })?
            }
        };
        let y = ops::resize_bilinear(&y, out)?;
        match args.residual {
            // It is of the layer's own size, and added before the scale, which y has already.
            Some(residual) => ops::add_scaled(&y, residual, args.scale),
            None => Ok(y),
        }
    }

    /// The convolution `args` of this layer, whose padding is that of dilation 1, in this form.
    ///
    /// # Errors
    /// Those of the ops.
    pub fn formed<'a>(&'a self, args: ops::Conv2d<'a>, form: ConvForm<'a>) -> Result<Tensor> {
        match form {
            ConvForm::Redilated(redilation) => self.redilated(args, redilation),
            ConvForm::Filtered(filtered) => self.filtered(args, filtered),
        }
    }

    fn filtered<'a>(&'a self, args: ops::Conv2d<'a>, form: FilteredConv<'a>) -> Result<Tensor> {
        let FilteredConv { factor, dilations, filter, twins, rows } = form;
        let [n, h, w, _] = args.x.dims("conv2d")?;
        let filtered = match filter {
            None => None,
            Some(filter) => {
                let x = match (args.norm, args.x) {
                    (Some(norm), x) => ops::group_norm(norm.of(x))?,
                    (None, Source::One(x)) => x.clone(),
                    (None, Source::Two(a, b)) => ops::concat(a, b)?,
                };
                let pass = LowPass { scale: (factor / args.stride as f64).max(1.0), floor: filter.floor };
                let padded = filter.padded([h, w]);
                Some(ops::spectral_filter(SpectralFilter { x: &x, padded, pass, weak: twins })?)
            }
        };
        let args = match &filtered {
            Some(x) => ops::Conv2d { x: x.into(), norm: None, ..args },
            None => args,
        };
        let dilated = |args: ops::Conv2d, dilation: usize| {
            let padding = args.padding.map(|side| side * dilation);
            ops::conv2d(ops::Conv2d { dilation, padding, ..args })
        };
        let [dilation, of_twins] = dilations;
        if dilation == of_twins || twins == 0 || twins == n {
            return dilated(args, if twins == n { of_twins } else { dilation });
        }
        let part = |number: usize, samples: Range<usize>, dilation| {
            let (x, x2) = (args.x.first().rows(samples.clone())?, args.x.second().map(|x2| x2.rows(samples.clone())));
            let (x2, residual) = (x2.transpose()?, args.residual.map(|residual| residual.rows(samples)).transpose()?);
            let x = x2.as_ref().map_or(Source::One(&x), |x2| Source::Two(&x, x2));
            let row = args.row.map(|row| rows.map_or(row, |rows| rows[number]));
            dilated(ops::Conv2d { x, row, residual: residual.as_ref(), ..args }, dilation)
        };
        ops::stack(&part(0, 0..n - twins, dilation)?, &part(1, n - twins..n, of_twins)?)
    }

    /// The op's arguments with weight and bias set, to be completed: stride, norm, residual, ...
    pub fn args<'a>(&'a self, x: impl Into<Source<'a>>) -> ops::Conv2d<'a> {
        ops::Conv2d { bias: Some(&self.bias), ..ops::Conv2d::new(x, &self.weight) }
    }

    pub fn inputs(&self) -> usize {
        self.weight.shape()[3]
    }

    pub fn outputs(&self) -> usize {
        self.weight.shape()[0]
    }

    /// "Same" padding, stride 1, nothing fused.
    pub fn forward<'a>(&'a self, x: impl Into<Source<'a>>) -> Result<Tensor> {
        ops::conv2d(self.args(x))
    }
}

/// `weight` (gamma) and `bias` (beta): `[C]`.
pub struct GroupNorm {
    pub weight: Tensor,
    pub bias: Tensor,
    pub groups: usize,
    pub eps: f32,
}

impl GroupNorm {
    pub fn load(w: &Weights, channels: usize, groups: usize, eps: f32) -> Result<GroupNorm> {
        let (weight, bias) = (w.tensor("weight", &[channels])?, w.tensor("bias", &[channels])?);
        Ok(GroupNorm { weight, bias, groups, eps })
    }

    /// For a conv that normalises while loading.
    pub fn on_load(&self, activation: Activation) -> Option<ConvNorm<'_>> {
        Some(self.conv_norm(activation))
    }

    /// Without a modulation.
    pub fn conv_norm(&self, activation: Activation) -> ConvNorm<'_> {
        let (gamma, beta, groups, eps) = (&self.weight, &self.bias, self.groups, self.eps);
        ConvNorm { gamma, beta, groups, eps, modulation: None, activation }
    }

    /// `[N, H, W, C]` to the same.
    pub fn forward<'a>(&'a self, x: impl Into<Source<'a>>) -> Result<Tensor> {
        ops::group_norm(self.conv_norm(Activation::None).of(x.into()))
    }
}

/// `weight` (gamma) and `bias` (beta): `[C]`.
pub struct LayerNorm {
    pub weight: Tensor,
    pub bias: Tensor,
    pub eps: f32,
}

impl LayerNorm {
    pub fn load(w: &Weights, channels: usize, eps: f32) -> Result<LayerNorm> {
        Ok(LayerNorm { weight: w.tensor("weight", &[channels])?, bias: w.tensor("bias", &[channels])?, eps })
    }

    /// `[..., C]` to the same.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (gamma, beta) = (Some(&self.weight), Some(&self.bias));
        ops::layer_norm(ops::LayerNorm { gamma, beta, ..ops::LayerNorm::new(x, self.eps) })
    }
}

/// What a [`ResnetBlock`] is made of.
#[derive(Clone, Copy, Debug)]
pub struct ResnetConfig {
    pub in_channels: usize,
    pub out_channels: usize,
    pub groups: usize,
    pub eps: f32,
    /// The sum of branch and shortcut is multiplied by this: 1 / output_scale_factor.
    pub scale: f32,
    /// Behind both norms.
    pub activation: Activation,
    /// The timestep's row scales and shifts what the second norm gives, in place of being added before it.
    pub scale_shift: bool,
}

impl ResnetConfig {
    /// With SiLU and an added row.
    pub fn new(in_channels: usize, out_channels: usize, groups: usize, eps: f32) -> ResnetConfig {
        let (scale, activation, scale_shift) = (1.0, Activation::Silu, false);
        ResnetConfig { in_channels, out_channels, groups, eps, scale, activation, scale_shift }
    }
}

/// What a ResNet does to the size of its map, behind the first norm of the branch and on the shortcut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resample {
    /// Means of 2x2 pixels.
    Halve,
    /// Nearest neighbour, to this height and width.
    To([usize; 2]),
}

/// Residual block of the UNet (with the timestep's row) and of the VAE (without). Ho et al. 2020, arXiv:2006.11239.
///
/// `time_emb_proj` is not here: its result does not depend on the input, so it is computed once a run for all steps.
pub struct ResnetBlock {
    pub(super) norm1: GroupNorm,              // [C_in]
    pub(super) conv1: Conv2d,                 // [C_out, 3, 3, C_in]
    pub(super) norm2: GroupNorm,              // [C_out]
    pub(super) conv2: Conv2d,                 // [C_out, 3, 3, C_out]
    pub(super) conv_shortcut: Option<Conv2d>, // [C_out, 1, 1, C_in], when C_in != C_out
    pub(super) scale: f32,
    activation: Activation,
    scale_shift: bool,
}

impl ResnetBlock {
    pub fn load(w: &Weights, c: ResnetConfig) -> Result<ResnetBlock> {
        let (input, output) = (c.in_channels, c.out_channels);
        Ok(ResnetBlock {
            norm1: GroupNorm::load(&w.at("norm1"), input, c.groups, c.eps)?,
            conv1: Conv2d::load(&w.at("conv1"), output, input, 3)?,
            norm2: GroupNorm::load(&w.at("norm2"), output, c.groups, c.eps)?,
            conv2: Conv2d::load(&w.at("conv2"), output, output, 3)?,
            conv_shortcut: match input == output {
                true => None,
                false => Some(Conv2d::load(&w.at("conv_shortcut"), output, input, 1)?),
            },
            scale: c.scale,
            activation: c.activation,
            scale_shift: c.scale_shift,
        })
    }

    /// C_in
    pub fn inputs(&self) -> usize {
        self.conv1.inputs()
    }

    /// C_out
    pub fn outputs(&self) -> usize {
        self.conv1.outputs()
    }

    /// `x: [N, H, W, C_in]`, one source or two; `row`: of `[steps * R, C_out]`, the timesteps', or with
    /// [`ResnetConfig::scale_shift`] of `[steps * R, 2 C_out]`, scales before shifts; to `[N, H, W, C_out]`. `forms`: of the two 3x3
    /// convs.
    ///
    /// # Errors
    /// Those of the ops; [`Error::Shape`] for two sources in a block without `conv_shortcut`, which has one input only.
    pub fn forward<'a>(
        &'a self,
        x: impl Into<Source<'a>>,
        row: Option<StepRows<'a>>,
        forms: [ConvForm<'a>; 2],
    ) -> Result<Tensor> {
        let x = x.into();
        let norm = self.norm1.on_load(self.activation);
        let conv1 = ops::Conv2d { norm, row: row.filter(|_| !self.scale_shift), ..self.conv1.args(x) };
        let h = self.conv1.formed(conv1, forms[0])?;
        let shortcut = match (&self.conv_shortcut, x) {
            (Some(conv), x) => ops::conv2d(conv.args(x))?,
            (None, Source::One(x)) => x.clone(),
            (None, Source::Two(x, _)) => return Err(Error::shape("resnet", "x", x, "one source: C_in is C_out")),
        };
        self.second_half(&h, &shortcut, row, forms[1])
    }

    /// As [`forward`](ResnetBlock::forward) in place of a down- or upsampler: `x` has C_in = C_out channels.
    ///
    /// # Errors
    /// As [`forward`](ResnetBlock::forward).
    pub fn forward_resampled<'a>(
        &'a self,
        x: &'a Tensor,
        row: Option<StepRows<'a>>,
        forms: [ConvForm<'a>; 2],
        resample: Resample,
    ) -> Result<Tensor> {
        let row1 = row.filter(|_| !self.scale_shift);
        let norm = self.norm1.conv_norm(self.activation);
        let (h, shortcut) = match resample {
            Resample::Halve => {
                let halved = ops::avg_pool(&ops::group_norm(norm.of(x.into()))?)?;
                let conv1 = ops::Conv2d { row: row1, ..self.conv1.args(&halved) };
                (self.conv1.formed(conv1, forms[0])?, ops::avg_pool(x)?)
            }
            Resample::To(size) => {
                let args = self.conv1.args(x);
                let conv1 = ops::Conv2d { norm: Some(norm), resize_to: Some(size), row: row1, ..args };
                (self.conv1.formed(conv1, forms[0])?, ops::resize_nearest(x, size)?)
            }
        };
        self.second_half(&h, &shortcut, row, forms[1])
    }

    /// As [`forward`](ResnetBlock::forward) without rows and dilation, in less memory: `x` lives no longer than the block needs
    /// it, unless others hold it.
    ///
    /// # Errors
    /// Those of the ops.
    pub fn forward_owned(&self, x: Tensor) -> Result<Tensor> {
        let h = ops::conv2d(ops::Conv2d { norm: self.norm1.on_load(self.activation), ..self.conv1.args(&x) })?;
        let shortcut = match &self.conv_shortcut {
            Some(conv) => {
                let shortcut = conv.forward(&x)?;
                drop(x);
                shortcut
            }
            None => x,
        };
        self.second_half(&h, &shortcut, None, Redilation::NONE.into())
    }

    fn second_half(&self, h: &Tensor, shortcut: &Tensor, row: Option<StepRows>, form: ConvForm) -> Result<Tensor> {
        let modulation =
            row.filter(|_| self.scale_shift).map(|rows| Modulation { rows, scale: 0, shift: self.outputs() });
        let norm = Some(ConvNorm { modulation, ..self.norm2.conv_norm(self.activation) });
        let conv2 = ops::Conv2d { norm, residual: Some(shortcut), scale: self.scale, ..self.conv2.args(h) };
        self.conv2.formed(conv2, form)
    }
}

/// 3x3 conv of stride 2 (`downsamplers.0.conv`), padded by 1 all around (the UNet), or with 0 by one row below and one
/// column to the right (the VAE).
pub struct Downsample {
    conv: Conv2d, // [C, 3, 3, C]
    padding: [usize; 4],
}

impl Downsample {
    pub fn load(w: &Weights, channels: usize, padding: usize) -> Result<Downsample> {
        let padding = if padding == 0 { [0, 1, 0, 1] } else { [padding; 4] };
        Ok(Downsample { conv: Conv2d::load(&w.at("downsamplers.0.conv"), channels, channels, 3)?, padding })
    }

    /// `[N, H, W, C]` to half the size, rounded up (rounded down with padding 0).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_as(x, Redilation::NONE.into())
    }

    /// The same in this form; re-dilated, half the size is rounded down, to 1 at least.
    pub fn forward_as(&self, x: &Tensor, form: ConvForm) -> Result<Tensor> {
        self.conv.formed(ops::Conv2d { stride: 2, padding: self.padding, ..self.conv.args(x) }, form)
    }

    /// `[N, H, W, C]` to a quarter of the size, rounded up: the same weights with stride 4, dilation 2 and padding 2 all around
    /// (HiDiffusion, Zhang et al. 2024, arXiv:2311.17528).
    pub fn forward_wide(&self, x: &Tensor) -> Result<Tensor> {
        ops::conv2d(ops::Conv2d { stride: 4, dilation: 2, padding: [2; 4], ..self.conv.args(x) })
    }
}

/// Nearest neighbour and a 3x3 conv (`upsamplers.0.conv`) in one.
pub struct Upsample {
    conv: Conv2d, // [C, 3, 3, C]
}

impl Upsample {
    pub fn load(w: &Weights, channels: usize) -> Result<Upsample> {
        Ok(Upsample { conv: Conv2d::load(&w.at("upsamplers.0.conv"), channels, channels, 3)? })
    }

    /// `[N, H, W, C]` to `[N, size[0], size[1], C]`.
    pub fn forward(&self, x: &Tensor, size: [usize; 2]) -> Result<Tensor> {
        self.forward_as(x, size, Redilation::NONE.into())
    }

    /// The same with the convolution in this form.
    pub fn forward_as(&self, x: &Tensor, size: [usize; 2], form: ConvForm) -> Result<Tensor> {
        self.conv.formed(ops::Conv2d { resize_to: Some(size), ..self.conv.args(x) }, form)
    }

    /// The rows of `stripe` of what [`forward`](Upsample::forward) gives for one image.
    pub fn forward_stripe(&self, x: &Tensor, size: [usize; 2], stripe: Stripe) -> Result<Tensor> {
        ops::conv2d(ops::Conv2d { resize_to: Some(size), stripe: Some(stripe), ..self.conv.args(x) })
    }
}
