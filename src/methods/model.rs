use super::Size;
use crate::error::Result;
use crate::models::UnetOptions;
use crate::runtime::Tensor;

/// What a method needs of a model, conditioned on its prompt. A latent model decodes to and encodes from pictures; for a
/// pixel model the two are the identity.
///
/// Samples are f32, `[1, h, w, C]`; pictures f32, `[1, H, W, 3]`, in [-1, 1].
pub trait DiffusionModel {
    /// Shape of the sample of a picture.
    fn sample_shape(&self, size: Size) -> [usize; 4];

    /// The network's output at step `step` of the run's timesteps for `input_scale * x`: one row, or with guidance two,
    /// the unconditional one first; any float dtype.
    fn denoise(&self, x: &Tensor, step: usize, input_scale: f32, options: &UnetOptions) -> Result<Tensor>;

    /// The picture of a clean sample, not clamped.
    fn decode(&self, x0: &Tensor) -> Result<Tensor>;

    /// The clean sample of a picture: the posterior's mode, or with `noise` (of the sample's shape) a sample of it.
    fn encode(&self, picture: &Tensor, noise: Option<&Tensor>) -> Result<Tensor>;
}

/// Where a method's noise comes from.
pub trait NoiseSource {
    /// The next draw: independent N(0, 1), f32, of `shape` (NHWC).
    fn normal(&mut self, shape: [usize; 4]) -> Result<Tensor>;
}
