use super::Tensor;
use crate::error::Result;
use crate::runtime::DType;

/// Pointwise nonlinearity, alone or in a linear's epilogue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    None,
    /// `x / (1 + exp(-x))`
    Silu,
    /// `x/2 (1 + erf(x / sqrt 2))`, exact
    Gelu,
    /// `x / (1 + exp(-1.702 x))`
    QuickGelu,
    /// `value * gelu(gate)` on interleaved pairs: halves the columns. Only in [`linear`](super::linear).
    Geglu,
}

/// `activation(x)`, same shape and dtype.
///
/// # Errors
/// [`Error::Dtype`](crate::Error::Dtype); [`Error::Argument`](crate::Error::Argument) for GEGLU.
pub fn activation(_x: &Tensor, _activation: Activation) -> Result<Tensor> {
    unimplemented!()
}

/// `a + b`, same shape and dtype.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::Dtype`](crate::Error::Dtype), [`Error::Device`](crate::Error::Device).
pub fn add(_a: &Tensor, _b: &Tensor) -> Result<Tensor> {
    unimplemented!()
}

/// `min(max(x, low), high)`, same shape and dtype; NaN stays NaN.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when `low > high`.
pub fn clamp(_x: &Tensor, _low: f32, _high: f32) -> Result<Tensor> {
    unimplemented!()
}

/// `scale * x + shift`, rounded to `dtype`, repeated along the batch: `[N, ...]` to `[repeats * N, ...]` (all rows, then
/// all rows again: the unconditional and the conditional half of classifier-free guidance).
///
/// # Errors
/// [`Error::Dtype`](crate::Error::Dtype); [`Error::Argument`](crate::Error::Argument) when `repeats` is 0.
pub fn scale_cast(_x: &Tensor, _scale: f32, _shift: f32, _dtype: DType, _repeats: usize) -> Result<Tensor> {
    unimplemented!()
}
