//! Layers with weights: the checkpoint's names, the fused ops.

use super::weights::Weights;
use crate::error::Result;
use crate::ops::{self, Activation, ConvNorm, Source};
use crate::runtime::Tensor;

/// `weight: [N, K]`, `bias: [N]` or none.
pub struct Linear {
    pub weight: Tensor,
    pub bias: Option<Tensor>,
}

impl Linear {
    pub fn load(w: &Weights, n: usize, k: usize) -> Result<Linear> {
        Ok(Linear { weight: w.matrix("weight", n, k)?, bias: Some(w.tensor("bias", &[n])?) })
    }

    pub fn load_without_bias(w: &Weights, n: usize, k: usize) -> Result<Linear> {
        Ok(Linear { weight: w.matrix("weight", n, k)?, bias: None })
    }

    /// `[..., K]` to `[..., N]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.fused(x, Activation::None, None)
    }

    pub fn forward_residual(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        self.fused(x, Activation::None, Some(residual))
    }

    pub fn fused(&self, x: &Tensor, activation: Activation, residual: Option<&Tensor>) -> Result<Tensor> {
        ops::linear(ops::Linear { x, weight: &self.weight, bias: self.bias.as_ref(), activation, residual })
    }
}

/// `weight: [O, kh, kw, I]`, `bias: [O]`.
pub struct Conv2d {
    pub weight: Tensor,
    pub bias: Tensor,
}

impl Conv2d {
    pub fn load(w: &Weights, out: usize, input: usize, kernel: usize) -> Result<Conv2d> {
        Ok(Conv2d { weight: w.conv("weight", out, input, kernel)?, bias: w.tensor("bias", &[out])? })
    }

    /// The op's arguments with weight and bias set, to be completed: stride, norm, residual, ...
    pub fn args<'a>(&'a self, x: impl Into<Source<'a>>) -> ops::Conv2d<'a> {
        ops::Conv2d { bias: Some(&self.bias), ..ops::Conv2d::new(x, &self.weight) }
    }

    /// "Same" padding, stride 1, nothing fused.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
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
    pub fn on_load(&self, silu: bool) -> Option<ConvNorm<'_>> {
        Some(ConvNorm { gamma: &self.weight, beta: &self.bias, groups: self.groups, eps: self.eps, silu })
    }

    /// `[N, H, W, C]` to the same.
    pub fn forward<'a>(&'a self, x: impl Into<Source<'a>>) -> Result<Tensor> {
        let (gamma, beta, groups, eps) = (&self.weight, &self.bias, self.groups, self.eps);
        ops::group_norm(ops::GroupNorm { x: x.into(), gamma, beta, groups, eps, silu: false })
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
        ops::layer_norm(ops::LayerNorm { x, gamma: &self.weight, beta: &self.bias, eps: self.eps })
    }
}
