use super::Tensor;
use crate::error::Result;

/// The relay's upsampler Phi (MegaFusion, arXiv:2408.11001, table 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Upsampler {
    /// Configuration A: PIL BILINEAR, a triangle widened when downscaling.
    Bilinear,
    /// Configuration B, the default: PIL BICUBIC, a = -0.5, weights of the taps inside the image re-normalised.
    #[default]
    Bicubic,
    /// torch `bicubic` with `align_corners=False, antialias=False`: a = -0.75, border pixels repeated.
    BicubicTorch,
    /// Configuration C: `Bicubic`, then a 5x5 Gaussian of sigma 1.1, reflected at the border.
    BicubicGaussian,
    /// Configuration D: `Bicubic`, then 1/2 [[-1,-1,-1],[-1,10,-1],[-1,-1,-1]]; border pixels as they are.
    BicubicEdge,
}

/// `x: [N, H, W, C]` to `[N, size[0], size[1], C]`; rows and columns are filtered in f32 (columns' pass first, as PIL
/// does: horizontal, then vertical) and `clamp` is applied at the end.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument): an empty size; [`Error::Shape`](crate::Error::Shape): not 4-d or empty.
pub fn resize(_x: &Tensor, _size: [usize; 2], _upsampler: Upsampler, _clamp: Option<(f32, f32)>) -> Result<Tensor> {
    unimplemented!()
}

/// Nearest neighbour, source index `floor(i * in / out)`: `[N, H, W, C]` to `[N, size[0], size[1], C]`.
///
/// # Errors
/// As [`resize`].
pub fn resize_nearest(_x: &Tensor, _size: [usize; 2]) -> Result<Tensor> {
    unimplemented!()
}
