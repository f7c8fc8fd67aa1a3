//! Launches of kernels/linear_fp8.cu: quantize, and linear_fp8 on every card.

use super::linear::LinearArgs;
use super::step_rows::aligned_rows;
use super::tiles::{self, Wide};
use super::variants::{self, Variant};
use super::{aligned, entry, int, linear_sm90};
use crate::error::Result;
use crate::ops::{Linear, LinearFp8};
use crate::runtime::Tensor;
use crate::runtime::cuda::{CudaDevice, DevicePtr, Launch, args};

const OP: &str = "linear_fp8";

/// Threads a block and elements a thread moves at once: `kThreads` of linear_fp8.cu, `kVector` of common/vector.cuh.
const THREADS: usize = 256;
const VECTOR: usize = 8;
/// Longer rows get a block each: four vectors a lane of a warp.
const WIDE: usize = 1024;

pub fn quantize(device: &CudaDevice, x: &Tensor, codes: &mut Tensor, scales: &mut Tensor) -> Result<()> {
    let (rows, k) = (scales.numel(), x.shape().last().copied().unwrap_or(0));
    let vector = k.is_multiple_of(VECTOR) && aligned(x) && aligned(codes);
    let (name, blocks) = if k > WIDE { ("quantize_wide", rows) } else { ("quantize", rows.div_ceil(THREADS / 32)) };
    let k = int("quantize", "K", k)?;
    // SAFETY: arguments as the entry has them; x and codes have `rows` rows of k elements, scales has `rows`.
    unsafe {
        device.launch(
            "linear_fp8",
            &entry(name, x.dtype()),
            Launch::grid([blocks, 1, 1]).block(THREADS),
            args![codes.cuda(), scales.cuda(), x.cuda(), rows as i64, k, i32::from(vector)],
        )
    }
}

/// `LinearFp8Args` of linear_fp8.cuh.
#[derive(Clone, Copy, bytemuck::NoUninit)]
#[repr(C)]
struct LinearFp8Args {
    linear: LinearArgs,
    x_scales: DevicePtr,
    weight_scales: DevicePtr,
}

/// The kernel of every card.
pub const GENERAL: Variant =
    Variant { name: "general", reason: "any card, size and alignment: the codes become f16 on their way in" };

/// `[m, n, k]`: rows and columns of y, terms of a sum.
pub fn linear_fp8(device: &CudaDevice, args: &LinearFp8, [m, n, k]: [usize; 3], y: &mut Tensor) -> Result<()> {
    let LinearFp8 { x, weight, bias, activation, gate, residual, dtype } = *args;
    let codes = Linear { x: x.codes(), weight: weight.codes(), bias, activation, gate, residual };
    let chunk = tiles::chunk(dtype);
    // A chunk of codes is 8 bytes.
    let wide_codes = |codes: &Tensor| k.is_multiple_of(8) && codes.cuda().0.is_multiple_of(8);
    let wide = Wide {
        x: wide_codes(codes.x),
        weight: wide_codes(codes.weight),
        output: n.is_multiple_of(chunk)
            && [Some(&*y), bias, residual].into_iter().flatten().all(aligned)
            && gate.as_ref().is_none_or(aligned_rows),
    };
    let arguments = LinearFp8Args {
        linear: LinearArgs::new(OP, &codes, [m, n, k], &wide, y)?,
        x_scales: x.scales().cuda(),
        weight_scales: weight.scales().cuda(),
    };
    let hopper = &linear_sm90::LINEAR_FP8;
    let asked = variants::asked(OP)?;
    let scales_aligned = aligned(weight.scales());
    if scales_aligned && hopper.takes(device, &codes, [m, n, k], y) && asked.is_none_or(|name| hopper.has(name)) {
        // SAFETY: the arguments were made of the same operands, whose shapes were checked.
        return unsafe { hopper.launch(device, &codes, [m, n, k], arguments, asked, y) };
    }
    let tile = tiles::general();
    let launch =
        Launch::grid([tile.blocks(m, codes.weight.shape()[0]), 1, 1]).block(tile.threads()).shared(tile.shared_bytes());
    // SAFETY: the argument as the entry has it; shapes were checked against [m, n, k], `wide` against the addresses.
    unsafe { device.launch("linear_fp8", &entry("linear_fp8_general", dtype), launch, args![arguments]) }
}
