//! Launch of kernels/disperse.cu.

use super::entry;
use crate::error::Result;
use crate::ops::disperse::{LARGE, SMALL, dispersion};
use crate::runtime::cuda::{CudaDevice, Launch, args};
use crate::runtime::{DType, Tensor};

/// Threads a block: `kThreads` of disperse.cu.
const THREADS: usize = 256;

/// Uploads the matrix, so no part of what a card records.
pub fn disperse(device: &CudaDevice, weight: &Tensor, y: &mut Tensor) -> Result<()> {
    let values: Vec<f32> = dispersion().iter().flatten().map(|&value| value as f32).collect();
    let matrix = Tensor::from_f32(weight.device(), &[LARGE, SMALL], DType::F32, &values)?;
    let [outputs, _, _, inputs] = weight.dims::<4>("disperse", "weight")?;
    let launch = Launch::grid([outputs, inputs.div_ceil(THREADS), 1]).block(THREADS);
    // SAFETY: as the entry has them; weight is [outputs, 9, inputs], y [outputs, 25, inputs], the matrix [25, 9].
    unsafe {
        device.launch(
            "disperse",
            &entry("disperse", y.dtype()),
            launch,
            args![y.cuda(), weight.cuda(), matrix.cuda(), inputs as i64],
        )
    }
}
