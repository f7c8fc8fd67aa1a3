//! Launches of kernels/freeu.cu.

use super::{aligned, entry, int};
use crate::error::Result;
use crate::ops::freeu::{FreeU, MOMENTS};
use crate::runtime::cuda::{CudaDevice, Launch, args};
use crate::runtime::{DType, Tensor};

/// `kThreads`, `kGroups`, `kPixels` of freeu.cu, and `kVector` of common/vector.cuh.
const THREADS: usize = 256;
const GROUPS: usize = 8;
const PIXELS: usize = 512;
const VECTOR: usize = 8;
/// So that adding them up stays cheap.
const MAX_PARTS: usize = 32;

/// Into how many parts the pixels of an image are cut, whose sums are made apart: by the size of one image alone.
fn parts(pixels: usize) -> usize {
    pixels.div_ceil(PIXELS).clamp(1, MAX_PARTS)
}

/// `[N, parts, 7, D]`, f32.
pub fn sums(skip: &Tensor) -> Result<Tensor> {
    let [n, h, w, d] = skip.dims("freeu", "skip")?;
    Tensor::uninit(skip.device(), &[n, parts(h * w), MOMENTS, d], DType::F32)
}

pub fn freeu(device: &CudaDevice, backbone: &Tensor, skip: &Tensor, freeu: FreeU, y: &mut Tensor) -> Result<()> {
    const OP: &str = "freeu";
    let ([n, h, w, c], [_, _, _, d]) = (backbone.dims(OP, "backbone")?, skip.dims(OP, "skip")?);
    let (height, width, pixels) = (int(OP, "H", h)?, int(OP, "W", w)?, int(OP, "H * W", h * w)?);
    let (of_backbone, of_skip) = (int(OP, "C", c)?, int(OP, "D", d)?);
    let parts = parts(h * w);
    let sums = sums(skip)?;
    let vector = [c / 2, c, d].iter().all(|count| count.is_multiple_of(VECTOR))
        && [backbone, skip, y].iter().all(|tensor| aligned(tensor));
    let channels = GROUPS * if vector { VECTOR } else { 1 };
    let dtype = y.dtype();
    if d > 0 {
        let launch = Launch::grid([d.div_ceil(channels), parts, n]).block(THREADS);
        // SAFETY: as the entry has them; sums has `parts` times seven sums for each image and channel of skip.
        unsafe {
            device.launch(
                "freeu",
                &entry("freeu_sums", dtype),
                launch,
                args![sums.cuda(), skip.cuda(), height, width, of_skip, i32::from(vector)],
            )?;
        }
    }
    // Blocks of the backbone's channels, then of the skip connection's.
    let blocks = c.div_ceil(channels) + d.div_ceil(channels);
    let launch = Launch::grid([blocks, (pixels as usize).div_ceil(PIXELS), n]).block(THREADS);
    // SAFETY: as the entry has them; y has the pixels of both, and the channels of one after those of the other.
    unsafe {
        device.launch(
            "freeu",
            &entry("freeu", dtype),
            launch,
            args![
                y.cuda(),
                backbone.cuda(),
                skip.cuda(),
                sums.cuda(),
                height,
                width,
                of_backbone,
                of_skip,
                parts as i32,
                freeu.backbone,
                freeu.skip,
                i32::from(vector)
            ],
        )
    }
}
