//! Launches of kernels/spectral_filter.cu.

use super::{aligned, entry, int};
use crate::error::Result;
use crate::ops::spectral_filter::{SpectralFilter, Strength};
use crate::runtime::cuda::{CudaDevice, Launch, args};
use crate::runtime::{DType, Tensor};

/// Threads a block: `kThreads` of spectral_filter.cu.
const THREADS: usize = 256;
/// `kWidth` and `kOutputs`: values that a block makes.
const WIDTH: usize = 128;
const OUTPUTS: usize = 32;
/// `kVector` of common/vector.cuh.
const VECTOR: usize = 8;

const OP: &str = "spectral_filter";

/// `Masks` of spectral_filter.cu.
#[derive(Clone, Copy, bytemuck::NoUninit)]
#[repr(C)]
struct Masks {
    scale: f64,
    floor: f64,
    taper: [i32; 4],
    length: [i32; 2],
}

/// What a filter needs beside its result.
pub struct Passes {
    /// `[2, n_h + n_w, 2]`, f32: of the strong and of the weak mask, the taps of both axes.
    taps: Tensor,
    /// `[2, N, H, W, C]`, f32: real and imaginary part after the columns' pass.
    between: Tensor,
}

/// One axis of a map: `[batch, length, width]`.
struct Axis {
    batch: usize,
    length: usize,
    width: usize,
    padded: usize,
    /// Its first tap among those of a mask.
    first_tap: usize,
    /// The first of the batch that has the weak mask.
    weak_from: usize,
}

impl Passes {
    /// Allocates, on any device.
    ///
    /// # Errors
    /// As [`Tensor::uninit`].
    pub fn uninit(args: &SpectralFilter) -> Result<Passes> {
        let (device, [n, h, w, c]) = (args.x.device(), args.x.dims::<4>(OP, "x")?);
        Ok(Passes {
            taps: Tensor::uninit(device, &[2, args.padded.iter().sum(), 2], DType::F32)?,
            between: Tensor::uninit(device, &[2, n, h, w, c], DType::F32)?,
        })
    }

    pub fn launches(&self) -> u64 {
        3
    }

    pub fn launch(&self, device: &CudaDevice, args: &SpectralFilter, y: &mut Tensor) -> Result<()> {
        let SpectralFilter { x, padded: [rows, columns], weak, .. } = *args;
        let [n, h, w, c] = x.dims(OP, "x")?;
        self.make_taps(device, args)?;
        let strong = n - weak;
        let axis = Axis { batch: n * h, length: w, width: c, padded: columns, first_tap: rows, weak_from: strong * h };
        self.along(device, "spectral_columns", x, &self.between, &axis, x.dtype())?;
        let axis = Axis { batch: n, length: h, width: w * c, padded: rows, first_tap: 0, weak_from: strong };
        self.along(device, "spectral_rows", &self.between, y, &axis, x.dtype())
    }

    fn make_taps(&self, device: &CudaDevice, args: &SpectralFilter) -> Result<()> {
        let SpectralFilter { padded, pass, .. } = *args;
        let side = |side| int(OP, "padded side", side);
        let taper = |strength, axis: usize| pass.taper(padded[axis], strength) as i32;
        let [strong, weak] = [Strength::Strong, Strength::Weak];
        let masks = Masks {
            scale: pass.scale,
            floor: pass.floor,
            taper: [taper(strong, 0), taper(strong, 1), taper(weak, 0), taper(weak, 1)],
            length: [side(padded[0])?, side(padded[1])?],
        };
        let count = int(OP, "padded sides together", padded[0] + padded[1])? as usize;
        let launch = Launch::grid([count.div_ceil(THREADS), 2, 1]).block(THREADS);
        // SAFETY: as the entry has them; the table has two masks of `count` taps.
        unsafe { device.launch(OP, "spectral_taps_f32", launch, args![self.taps.cuda(), masks]) }
    }

    /// `from` and `to`: one of them is the pair of planes between the passes.
    fn along(
        &self,
        device: &CudaDevice,
        name: &str,
        from: &Tensor,
        to: &Tensor,
        axis: &Axis,
        dtype: DType,
    ) -> Result<()> {
        let &Axis { batch, length, width, padded, first_tap, weak_from } = axis;
        let [n, length_i32, width_i32] = [padded, length, width].map(|size| int(OP, "size", size));
        let (n, length_i32, width_i32) = (n?, length_i32?, width_i32?);
        let blocks = int(OP, "blocks of a row of the grid", batch * width.div_ceil(WIDTH))? as usize;
        let plane = self.between.numel() / 2;
        let vector = width.is_multiple_of(VECTOR) && aligned(from) && aligned(to);
        let taps = self.taps.rows(0..2)?.reshape(&[self.taps.numel() / 2, 2])?;
        let taps = taps.rows(first_tap..taps.shape()[0])?;
        let mask_stride = self.taps.numel() / 2;
        let launch = Launch::grid([blocks, length.div_ceil(OUTPUTS), 1]).block(THREADS);
        // SAFETY: as the entry has them; `from` and `to` have `batch` times `length` rows of `width` values, the pair of planes
        // twice, `plane` apart, and each mask `padded` taps from the first on.
        unsafe {
            device.launch(
                OP,
                &entry(name, dtype),
                launch,
                args![
                    to.cuda(),
                    from.cuda(),
                    taps.cuda(),
                    n,
                    mask_stride as i64,
                    int(OP, "images with the strong mask", weak_from)?,
                    plane as i64,
                    length_i32,
                    width_i32,
                    i32::from(vector)
                ],
            )
        }
    }
}
