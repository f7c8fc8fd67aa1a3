use super::{Activation, Tensor};
use crate::error::Result;

/// Arguments of [`linear`].
#[derive(Clone, Copy, Debug)]
pub struct Linear<'a> {
    /// `[..., K]`
    pub x: &'a Tensor,
    /// `[N, K]`; for GEGLU `[2 * N, K]` with rows interleaved: row `2j` is value j, row `2j + 1` its gate.
    pub weight: &'a Tensor,
    /// `[rows of weight]`
    pub bias: Option<&'a Tensor>,
    pub activation: Activation,
    /// `[..., N]`, added last.
    pub residual: Option<&'a Tensor>,
}

impl<'a> Linear<'a> {
    pub fn new(x: &'a Tensor, weight: &'a Tensor) -> Linear<'a> {
        Linear { x, weight, bias: None, activation: Activation::None, residual: None }
    }
}

/// `activation(x W^T + bias) + residual`: `[..., K]` to `[..., N]`.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::Dtype`](crate::Error::Dtype), [`Error::Device`](crate::Error::Device):
/// which argument; [`Error::OutOfMemory`](crate::Error::OutOfMemory).
pub fn linear(_args: Linear) -> Result<Tensor> {
    unimplemented!()
}
