use super::int;
use crate::error::Result;
use crate::ops::peaks::{OP, READ_BLOCK, THREADS, WARPGROUPS, WARPS, WGMMA};
use crate::runtime::Tensor;
use crate::runtime::cuda::{CudaDevice, Launch, args};

/// 16-byte pieces a thread copies: `kCopies` of peaks.cu.
const COPIES: usize = 4;

pub fn products(device: &CudaDevice, a: &Tensor, b: &Tensor, rounds: usize, y: &mut Tensor) -> Result<()> {
    let entry = super::entry("peak_mma", a.dtype());
    let (blocks, rounds) = (y.shape()[0] / WARPS, int(OP, "rounds", rounds)?);
    let launch = Launch::grid([blocks, 1, 1]).block(THREADS);
    // SAFETY: arguments as the entry has them; y has a matrix for each warp of the grid.
    unsafe { device.launch("peaks", &entry, launch, args![y.cuda(), a.cuda(), b.cuda(), rounds]) }
}

pub fn warpgroup_products(device: &CudaDevice, a: &Tensor, b: &Tensor, rounds: usize, y: &mut Tensor) -> Result<()> {
    let entry = super::entry("peak_wgmma", a.dtype());
    let (blocks, rounds) = (y.shape()[0] / WARPGROUPS, int(OP, "rounds", rounds)?);
    let [m, n, k] = WGMMA;
    let shared = (WARPGROUPS * m + n) * k * a.dtype().size_bytes();
    let launch = Launch::grid([blocks, 1, 1]).block(128 * WARPGROUPS).shared(shared);
    // SAFETY: arguments as the entry has them; y has a matrix for each warpgroup of the grid.
    unsafe { device.launch("sm90/peaks", &entry, launch, args![y.cuda(), a.cuda(), b.cuda(), rounds]) }
}

pub fn read(device: &CudaDevice, x: &Tensor, y: &mut Tensor) -> Result<()> {
    let launch = Launch::grid([x.numel() / READ_BLOCK, 1, 1]).block(THREADS);
    // SAFETY: arguments as the entry has them; x is whole blocks, y has an element for each thread.
    unsafe { device.launch("peaks", "peak_read_f32", launch, args![y.cuda(), x.cuda()]) }
}

pub fn sums(device: &CudaDevice, x: &Tensor, scale: f32, shift: f32, rounds: usize, y: &mut Tensor) -> Result<()> {
    let (blocks, rounds) = (y.shape()[0], int(OP, "rounds", rounds)?);
    let launch = Launch::grid([blocks, 1, 1]).block(THREADS);
    // SAFETY: arguments as the entry has them; y has an element for each thread of the grid, x for each of a block.
    unsafe { device.launch("peaks", "peak_ffma_f32", launch, args![y.cuda(), x.cuda(), scale, shift, rounds]) }
}

pub fn copy(device: &CudaDevice, x: &Tensor, y: &mut Tensor) -> Result<()> {
    let count = x.bytes() as usize / 16;
    let launch = Launch::grid([count.div_ceil(THREADS * COPIES), 1, 1]).block(THREADS);
    // SAFETY: arguments as the entry has them; both tensors have `count` times 16 bytes, aligned to 16.
    unsafe { device.launch("peaks", "peak_copy", launch, args![y.cuda(), x.cuda(), count as i64]) }
}
