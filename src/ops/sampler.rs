use super::Tensor;
use crate::error::Result;

/// One sampler step as the affine map that every sampler of the family is, computed in f64 by the schedulers:
/// ```text
/// e    = e_uncond + guidance (e_cond - e_uncond)            (the model's output: eps, v or x0)
/// x0   = x0_from_x x + x0_from_e e,                          then clamped to [-clip, clip] if asked
/// next = next_from_x x + next_from_e e + next_from_x0 x0 + next_from_noise n
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepCoefficients {
    pub x0_from_x: f32,
    pub x0_from_e: f32,
    pub clip: Option<f32>,
    pub next_from_x: f32,
    pub next_from_e: f32,
    pub next_from_x0: f32,
    pub next_from_noise: f32,
}

/// What [`sampler_step`] returns, both f32 of the latents' shape.
#[derive(Clone, Debug)]
pub struct StepOutput {
    pub next: Tensor,
    pub x0: Tensor,
}

/// Guidance, x0 and update in one pass.
///
/// * `x`: latents `[N, H, W, C]`, f32
/// * `model_output`: `[N, H, W, C]` without guidance, else `[2N, H, W, C]`, unconditional rows first; any float dtype
/// * `guidance`: the scale w, `None` when the output has N rows
/// * `noise`: `[N, H, W, C]`, f32, required exactly when `next_from_noise` is not 0
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::Dtype`](crate::Error::Dtype), [`Error::Device`](crate::Error::Device):
/// which argument; [`Error::Argument`](crate::Error::Argument): noise missing or superfluous.
pub fn sampler_step(
    _x: &Tensor,
    _model_output: &Tensor,
    _guidance: Option<f32>,
    _coefficients: &StepCoefficients,
    _noise: Option<&Tensor>,
) -> Result<StepOutput> {
    unimplemented!()
}

/// `signal * x0 + sigma * noise`, f32: the forward process, sqrt(abar) and sqrt(1 - abar). Any shape.
///
/// # Errors
/// As [`sampler_step`].
pub fn add_noise(_x0: &Tensor, _noise: &Tensor, _signal: f32, _sigma: f32) -> Result<Tensor> {
    unimplemented!()
}

/// The VAE's posterior. `moments: [N, H, W, 2C]` (mean, then log variance, clamped to [-30, 20]) to `[N, H, W, C]` f32:
/// the mean, or `mean + exp(logvar / 2) * noise`.
///
/// # Errors
/// As [`sampler_step`].
pub fn diagonal_gaussian(_moments: &Tensor, _noise: Option<&Tensor>) -> Result<Tensor> {
    unimplemented!()
}
