use rayon::prelude::*;

use super::cpu::norm::{ChannelAffine, SourceRows};
use super::cpu::{self, math};
use super::{
    Activation, Source, StepColumns, StepRows, Tensor, by_dtype, bytes_of, cases, cuda, float, linear, profile,
};
use crate::error::{Error, Result};
use crate::runtime::{Device, Element, OpKind, Work};

/// Arguments of [`group_norm`].
#[derive(Clone, Copy, Debug)]
pub struct GroupNorm<'a> {
    /// `[N, H, W, C]`, one source or two; a group may span both.
    pub x: Source<'a>,
    /// `[C]`
    pub gamma: &'a Tensor,
    /// `[C]`
    pub beta: &'a Tensor,
    /// Divides C.
    pub groups: usize,
    /// Added to the variance, units of x squared.
    pub eps: f32,
    /// What is done to each image's normalised channels, by its step.
    pub modulation: Option<Modulation<'a>>,
    /// Of the normalised and modulated values: `None`, `Silu` or `Gelu`.
    pub activation: Activation,
}

impl<'a> GroupNorm<'a> {
    /// The arguments fit together: `[N, H, W, C]` of the input.
    pub(super) fn check(&self, op: &'static str) -> Result<[usize; 4]> {
        let dims = self.x.dims(op)?;
        let (x, [images, .., c]) = (self.x.first(), dims);
        self.gamma.expect(op, "gamma", &[c], x.dtype(), x.device())?;
        self.beta.expect(op, "beta", &[c], x.dtype(), x.device())?;
        if self.groups == 0 || c % self.groups != 0 {
            return Err(Error::Shape {
                op,
                arg: "x",
                got: dims.to_vec(),
                want: format!("a channel count that {} groups divide", self.groups),
            });
        }
        check_eps(op, self.eps)?;
        for columns in self.columns().iter().flatten() {
            columns.check(op, "modulation", images, c, x.dtype(), x.device())?;
        }
        if !matches!(self.activation, Activation::None | Activation::Silu | Activation::Gelu) {
            let (got, want) = (format!("{:?}", self.activation), "None, Silu or Gelu after a group norm");
            return Err(Error::argument(op, "activation", got, want));
        }
        Ok(dims)
    }

    /// Scale and shift of the modulation.
    pub(super) fn columns(&self) -> Option<[StepColumns<'a>; 2]> {
        self.modulation.map(|modulation| modulation.columns())
    }

    /// Flops of normalising one element: mean 1, variance 3, normalise 2, gamma and beta 2; scale and shift 2; the activation.
    pub(super) fn flops_per_element(&self) -> u64 {
        8 + if self.modulation.is_some() { 2 } else { 0 } + linear::activation_flops(self.activation)
    }

    /// Bytes of scale and shift that `images` images read.
    pub(super) fn modulation_bytes(&self, [images, .., c]: [usize; 4]) -> u64 {
        self.columns().iter().flatten().map(|columns| columns.bytes(images, c)).sum()
    }
}

pub(super) fn check_eps(op: &'static str, eps: f32) -> Result<()> {
    if eps.is_finite() && eps >= 0.0 {
        return Ok(());
    }
    Err(Error::argument(op, "eps", eps, "a finite value that is not negative"))
}

/// `activation((1 + scale) * group_norm(x) + shift)`, without a modulation `activation(group_norm(x))`: `[N, H, W, C]`, dtype of
/// the input. Statistics in f32, two passes. Wu & He 2018, arXiv:1803.08494, sec. 3; the modulation as in the ResNets of
/// Dhariwal & Nichol 2021, arXiv:2105.05233.
///
/// An image's result depends on that image only, bit for bit: not on the batch, nor on the number of threads.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) (also: `groups` does not divide C), [`Error::Dtype`](crate::Error::Dtype),
/// [`Error::Device`](crate::Error::Device): which argument; [`Error::Argument`](crate::Error::Argument): a negative or
/// non-finite `eps`, another activation, rows of the modulation that do not divide the images, a step beyond its table.
pub fn group_norm(args: GroupNorm) -> Result<Tensor> {
    const OP: &str = "group_norm";
    let dims = args.check(OP)?;
    let x = args.x.first();
    let form = cuda::norm::Form::of(x.device(), dims, args.groups, x.dtype());

    let mut y = Tensor::uninit(x.device(), &dims, x.dtype())?;
    let _timed = profile::scope(OP, y.shape());
    profile::call(OP, || cases::group_norm_shape(&args, dims));
    match x.device() {
        Device::Meta(meta) => {
            let _scratch = cuda::norm::scratch(x.device(), &form)?;
            let flops = args.flops_per_element() * y.numel() as u64;
            let bytes = bytes_of(&[Some(x), args.x.second(), Some(args.gamma), Some(args.beta), Some(&y)])
                + args.modulation_bytes(dims);
            let launches = form.launches();
            meta.record(OP, OpKind::Norm, y.shape(), Work { macs: 0, flops, bytes, launches });
        }
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) => by_dtype!(x.dtype(), T => group_norm_cpu::<T>(&args, dims, &mut y)),
        Device::Cuda(card) => {
            let scratch = cuda::norm::scratch(x.device(), &form)?;
            cuda::norm::group_norm(card, &args, dims, scratch, &mut y)?;
        }
    }
    Ok(y)
}

fn group_norm_cpu<T: Element>(args: &GroupNorm, dims: [usize; 4], y: &mut Tensor) {
    let x = SourceRows::<T>::new(&args.x, dims);
    let affine = ChannelAffine::group_norm(&x, args);
    let rows = cpu::norm::rows_per_task(x.channels);
    y.cpu_mut::<T>().par_chunks_mut(rows * x.channels).enumerate().for_each(|(task, y)| {
        let mut values = vec![0.0; x.channels];
        for (i, y) in y.chunks_exact_mut(x.channels).enumerate() {
            let row = task * rows + i;
            x.load(row, &mut values);
            affine.apply(row / x.pixels, &mut values);
            math::store(y, &values);
        }
    });
}

/// Arguments of [`layer_norm`].
#[derive(Clone, Copy, Debug)]
pub struct LayerNorm<'a> {
    /// `[..., C]`
    pub x: &'a Tensor,
    /// `[C]`; `None`: ones.
    pub gamma: Option<&'a Tensor>,
    /// `[C]`; `None`: zeros.
    pub beta: Option<&'a Tensor>,
    /// Added to the variance, units of x squared.
    pub eps: f32,
    /// `x` is `[images, ..., C]` then.
    pub modulation: Option<Modulation<'a>>,
}

impl<'a> LayerNorm<'a> {
    /// Without gamma, beta and modulation.
    pub fn new(x: &'a Tensor, eps: f32) -> LayerNorm<'a> {
        LayerNorm { x, gamma: None, beta: None, eps, modulation: None }
    }
}

/// What is done to normalised values by each image's step: `(1 + scale) * normed + shift`, with a value of each for every
/// channel. Of a diffusion transformer's layer norms, Peebles & Xie 2023, arXiv:2212.09748, sec. 3.2, and of the second group
/// norm of a ResNet, Dhariwal & Nichol 2021, arXiv:2105.05233 (there: adaptive group normalization).
#[derive(Clone, Copy, Debug)]
pub struct Modulation<'a> {
    /// Of a table that has both: `[steps * R, C or more]`.
    pub rows: StepRows<'a>,
    /// Columns of the table with which the C values of each begin.
    pub scale: usize,
    /// As `scale`.
    pub shift: usize,
}

impl<'a> Modulation<'a> {
    /// Scale and shift.
    pub(super) fn columns(&self) -> [StepColumns<'a>; 2] {
        [self.scale, self.shift].map(|first| StepColumns { rows: self.rows, first })
    }
}

/// Layer norm over the last dimension, shape and dtype of `x`, and what a diffusion transformer does then, in f32 and rounded
/// once. Ba et al. 2016, arXiv:1607.06450.
///
/// A row's result depends on that row only, bit for bit.
///
/// # Errors
/// As [`group_norm`]; also [`Error::Argument`](crate::Error::Argument): rows of the modulation that do not divide the images, a
/// step beyond its table.
pub fn layer_norm(args: LayerNorm) -> Result<Tensor> {
    const OP: &str = "layer_norm";
    let LayerNorm { x, gamma, beta, eps, modulation } = args;
    float(OP, "x", x)?;
    let Some(&c) = x.shape().last() else {
        return Err(Error::shape(OP, "x", x, "[..., C]"));
    };
    for (arg, affine) in [("gamma", gamma), ("beta", beta)] {
        affine.map_or(Ok(()), |affine| affine.expect(OP, arg, &[c], x.dtype(), x.device()))?;
    }
    check_eps(OP, eps)?;
    let columns = modulation.map(|modulation| modulation.columns());
    for columns in columns.iter().flatten() {
        let [images, _, ..] = *x.shape() else {
            return Err(Error::shape(OP, "x", x, "[images, ..., C] beside a modulation"));
        };
        columns.check(OP, "modulation", images, c, x.dtype(), x.device())?;
    }

    let mut y = Tensor::uninit(x.device(), x.shape(), x.dtype())?;
    let _timed = profile::scope(OP, y.shape());
    profile::call(OP, || cases::layer_norm_shape(&args, c));
    match x.device() {
        Device::Meta(meta) => {
            // As group norm; one for each of gamma and beta, two for scale and shift.
            let affine = [gamma.is_some(), beta.is_some(), modulation.is_some(), modulation.is_some()];
            let flops = (6 + affine.iter().filter(|&&used| used).count() as u64) * y.numel() as u64;
            let rows = columns.iter().flatten().map(|columns| columns.bytes(x.shape()[0], c)).sum::<u64>();
            let bytes = bytes_of(&[Some(x), gamma, beta, Some(&y)]) + rows;
            meta.record(OP, OpKind::Norm, y.shape(), Work { macs: 0, flops, bytes, launches: 1 });
        }
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) => by_dtype!(x.dtype(), T => layer_norm_cpu::<T>(&args, c, &mut y)),
        Device::Cuda(card) => cuda::norm::layer_norm(card, &args, c, &mut y)?,
    }
    Ok(y)
}

fn layer_norm_cpu<T: Element>(args: &LayerNorm, c: usize, y: &mut Tensor) {
    let gamma = args.gamma.map_or_else(|| vec![1.0; c], cpu::to_f32::<T>);
    let beta = args.beta.map_or_else(|| vec![0.0; c], cpu::to_f32::<T>);
    let images = args.x.shape()[0];
    let image_rows = y.numel() / c / images.max(1);
    let modulation = args.modulation.map(|modulation| modulation.columns().map(|part| part.cpu::<T>(images, c)));
    let rows = cpu::norm::rows_per_task(c);
    let x = args.x.cpu::<T>();
    y.cpu_mut::<T>().par_chunks_mut(rows * c).zip(x.par_chunks(rows * c)).enumerate().for_each(|(task, (y, x))| {
        let mut values = vec![0.0; c];
        for (i, (y, x)) in y.chunks_exact_mut(c).zip(x.chunks_exact(c)).enumerate() {
            math::load(&mut values, x);
            cpu::norm::layer_norm_row(&mut values, &gamma, &beta, args.eps);
            if let Some([scale, shift]) = &modulation {
                let image = (task * rows + i) / image_rows;
                cpu::norm::modulate(&mut values, &scale[image], &shift[image]);
            }
            math::store(y, &values);
        }
    });
}
