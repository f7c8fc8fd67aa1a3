use super::Size;
use crate::error::Result;
use crate::models::UnetOptions;
use crate::ops::StepTable;
use crate::runtime::{Device, Tensor};

/// What a method needs of a model, conditioned on its prompt. A latent model decodes to and encodes from pictures; for a
/// pixel model the two are the identity.
///
/// Samples are f32, `[1, h, w, C]`; pictures f32, `[1, H, W, 3]`, in [-1, 1].
pub trait DiffusionModel {
    /// Where samples live.
    fn device(&self) -> &Device;

    /// Shape of the sample of a picture.
    fn sample_shape(&self, size: Size) -> [usize; 4];

    /// The network's output at the current step for `x` times the step's input scale: one row, or with guidance two, the
    /// unconditional one first; any float dtype. Work that a card can record: nothing is waited for, and what depends on
    /// the step is read on the device.
    fn denoise(&self, x: &Tensor, steps: &StepTable, options: &UnetOptions) -> Result<Tensor>;

    /// The picture of a clean sample, not clamped.
    fn decode(&self, x0: &Tensor) -> Result<Tensor>;

    /// The clean sample of a picture: the posterior's mode, or with `noise` (of the sample's shape) a sample of it.
    fn encode(&self, picture: &Tensor, noise: Option<&Tensor>) -> Result<Tensor>;
}

/// Where a method's noise comes from.
pub trait NoiseSource {
    /// The next draw: independent N(0, 1), f32, of `shape` (NHWC).
    fn normal(&mut self, shape: [usize; 4]) -> Result<Tensor>;

    /// The next draw, of the shape of `to`, into its memory.
    fn normal_into(&mut self, to: &mut Tensor) -> Result<()>;
}
