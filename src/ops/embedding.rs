use super::Tensor;
use crate::error::Result;
use crate::runtime::{DType, Device};

/// Token plus position embedding: `ids: [N, L]` u32, `table: [V, C]`, `positions: [P, C]` with `P >= L` to `[N, L, C]`.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::Dtype`](crate::Error::Dtype), [`Error::Device`](crate::Error::Device):
/// which argument; [`Error::Argument`](crate::Error::Argument): an id that is not below V, with its value.
pub fn embedding(_ids: &Tensor, _table: &Tensor, _positions: &Tensor) -> Result<Tensor> {
    unimplemented!()
}

/// The UNet's sinusoid, as config.json describes it.
#[derive(Clone, Copy, Debug)]
pub struct TimestepEmbedding {
    /// Width of the result; an odd width gets a zero column.
    pub dim: usize,
    /// cos first, then sin.
    pub flip_sin_to_cos: bool,
    /// `freq_shift`: subtracted from dim/2 in the exponent's denominator.
    pub freq_shift: f64,
}

/// `f_j = exp(-ln(10000) j / (dim/2 - freq_shift))`; row i is `[sin(t_i f), cos(t_i f)]` (or cos first): `[len, dim]`.
/// Vaswani et al. 2017, arXiv:1706.03762, sec. 3.5.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument): a `dim` below 2, a shift that leaves no denominator.
pub fn timestep_embedding(
    _timesteps: &[f32],
    _e: TimestepEmbedding,
    _device: &Device,
    _dtype: DType,
) -> Result<Tensor> {
    unimplemented!()
}
