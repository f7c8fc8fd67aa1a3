use super::{Source, Tensor};
use crate::error::Result;

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
    /// Also apply SiLU.
    pub silu: bool,
}

/// Group norm, optionally followed by SiLU: `[N, H, W, C]`. Statistics in f32, two passes. Wu & He 2018,
/// arXiv:1803.08494, sec. 3.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) (also: `groups` does not divide C), [`Error::Dtype`](crate::Error::Dtype),
/// [`Error::Device`](crate::Error::Device): which argument.
pub fn group_norm(_args: GroupNorm) -> Result<Tensor> {
    unimplemented!()
}

/// Arguments of [`layer_norm`].
#[derive(Clone, Copy, Debug)]
pub struct LayerNorm<'a> {
    /// `[..., C]`
    pub x: &'a Tensor,
    /// `[C]`
    pub gamma: &'a Tensor,
    /// `[C]`
    pub beta: &'a Tensor,
    /// Added to the variance, units of x squared.
    pub eps: f32,
}

/// Layer norm over the last dimension. Ba et al. 2016, arXiv:1607.06450.
///
/// # Errors
/// As [`group_norm`].
pub fn layer_norm(_args: LayerNorm) -> Result<Tensor> {
    unimplemented!()
}
