//! What a device can do at most, for benches that compare an op with it: multiply-adds on registers, without memory.
//! Copies and reads of memory beside them.
//!
//! On a card the kernels of kernels/peaks.cu; for the cpu one thread's loop, of which the caller starts as many as there
//! are threads. The functions compute something, so that a test can check that all of it was done.

use super::{Tensor, cuda};
use crate::error::{Error, Result};
use crate::runtime::cuda::CudaDevice;
use crate::runtime::{DType, Device};

pub(super) const OP: &str = "peaks";

/// Threads a block, and warps: `kThreads`, `kWarps` of peaks.cu.
pub const THREADS: usize = 256;
pub const WARPS: usize = THREADS / 32;

/// Matrices: `kA`, `kB`; sums a thread: `kSums`.
pub const A: usize = 2;
pub const B: usize = 4;
pub const SUMS: usize = 16;

/// On tensor cores, one instruction a warp after the other: `rounds` times the sum of all `a[i] b[j]^T`, by each of
/// `blocks * WARPS` warps. `a: [A, 16, 16]`, `b: [B, 8, 16]`, f16 or bf16, to `[blocks * WARPS, 16, 8]`, f32.
///
/// # Errors
/// [`Error::Device`]: not on a card; [`Error::Shape`], [`Error::Dtype`]; [`Error::TooLarge`]; [`Error::Driver`].
pub fn products(a: &Tensor, b: &Tensor, blocks: usize, rounds: usize) -> Result<Tensor> {
    let card = card("a", a)?;
    if !matches!(a.dtype(), DType::F16 | DType::BF16) {
        return Err(Error::Dtype { op: OP, arg: "a", got: a.dtype(), want: "f16 or bf16".into() });
    }
    a.expect(OP, "a", &[A, 16, 16], a.dtype(), a.device())?;
    b.expect(OP, "b", &[B, 8, 16], a.dtype(), a.device())?;
    let mut y = Tensor::uninit(a.device(), &[blocks * WARPS, 16, 8], DType::F32)?;
    cuda::peaks::products(card, a, b, rounds, &mut y)?;
    Ok(y)
}

/// Flops of [`products`].
pub fn products_flops(blocks: usize, rounds: usize) -> f64 {
    (2 * 16 * 8 * 16 * A * B) as f64 * (blocks * WARPS) as f64 * rounds as f64
}

/// On the FMA units: sums `x + i`, `i < SUMS`, each `rounds` times multiplied by `scale` and `shift` added; their sum.
/// `x: [THREADS]`, f32, to `[blocks, THREADS]`.
///
/// # Errors
/// As [`products`].
pub fn sums(x: &Tensor, scale: f32, shift: f32, blocks: usize, rounds: usize) -> Result<Tensor> {
    let card = card("x", x)?;
    x.expect(OP, "x", &[THREADS], DType::F32, x.device())?;
    let mut y = Tensor::uninit(x.device(), &[blocks, THREADS], DType::F32)?;
    cuda::peaks::sums(card, x, scale, shift, rounds, &mut y)?;
    Ok(y)
}

/// Flops of [`sums`].
pub fn sums_flops(blocks: usize, rounds: usize) -> f64 {
    (2 * SUMS) as f64 * (blocks * THREADS) as f64 * rounds as f64
}

/// Rows of a, of b and terms of a sum in [`warpgroup_products`], and warpgroups a block: `kM`, `kN`, `kK`, `kWarpgroups` of
/// sm90/peaks.cu.
pub const WGMMA: [usize; 3] = [64, 256, 64];
pub const WARPGROUPS: usize = 2;

/// On Hopper's tensor cores, operands in shared memory: `rounds` times `a b^T`, by each of `blocks * WARPGROUPS`
/// warpgroups. `a: [64, 64]`, `b: [256, 64]`, f16 or bf16, to `[blocks * WARPGROUPS, 64, 256]`, f32.
///
/// # Errors
/// As [`products`]; [`Error::Kernel`]: the card or this program has no sm_90a.
pub fn warpgroup_products(a: &Tensor, b: &Tensor, blocks: usize, rounds: usize) -> Result<Tensor> {
    let card = card("a", a)?;
    let [m, n, k] = WGMMA;
    if !matches!(a.dtype(), DType::F16 | DType::BF16) {
        return Err(Error::Dtype { op: OP, arg: "a", got: a.dtype(), want: "f16 or bf16".into() });
    }
    a.expect(OP, "a", &[m, k], a.dtype(), a.device())?;
    b.expect(OP, "b", &[n, k], a.dtype(), a.device())?;
    let mut y = Tensor::uninit(a.device(), &[blocks * WARPGROUPS, m, n], DType::F32)?;
    cuda::peaks::warpgroup_products(card, a, b, rounds, &mut y)?;
    Ok(y)
}

/// Flops of [`warpgroup_products`].
pub fn warpgroup_products_flops(blocks: usize, rounds: usize) -> f64 {
    (2 * WGMMA.iter().product::<usize>()) as f64 * (blocks * WARPGROUPS) as f64 * rounds as f64
}

/// f32 values that [`read`] takes at a time: of a block of threads.
pub const READ_BLOCK: usize = THREADS * 16 * 4;

/// Reads all of `x`, whole [`READ_BLOCK`]s of f32, and writes hardly anything: a sum a thread, `[values / 64]`.
///
/// # Errors
/// As [`copy`].
pub fn read(x: &Tensor) -> Result<Tensor> {
    let card = card("x", x)?;
    if !x.numel().is_multiple_of(READ_BLOCK) || !cuda::aligned(x) {
        let got = format!("{} values at {:#x}", x.numel(), x.cuda().0);
        return Err(Error::argument(
            OP,
            "x",
            got,
            format!("whole blocks of {READ_BLOCK} at an address that 16 divides"),
        ));
    }
    x.expect(OP, "x", x.shape(), DType::F32, x.device())?;
    let mut y = Tensor::uninit(x.device(), &[x.numel() / 64], DType::F32)?;
    cuda::peaks::read(card, x, &mut y)?;
    Ok(y)
}

/// A copy on the same card, of any tensor of whole 16 bytes that begins at an address they divide.
///
/// # Errors
/// [`Error::Device`]: not on a card; [`Error::Argument`]: the size or the address; [`Error::OutOfMemory`];
/// [`Error::Driver`].
pub fn copy(x: &Tensor) -> Result<Tensor> {
    let card = card("x", x)?;
    if !x.bytes().is_multiple_of(16) || !cuda::aligned(x) {
        let got = format!("{} bytes at {:#x}", x.bytes(), x.cuda().0);
        return Err(Error::argument(OP, "x", got, "a size and an address that 16 divides"));
    }
    let mut y = Tensor::uninit(x.device(), x.shape(), x.dtype())?;
    cuda::peaks::copy(card, x, &mut y)?;
    Ok(y)
}

fn card<'a>(arg: &'static str, x: &'a Tensor) -> Result<&'a CudaDevice> {
    match x.device() {
        Device::Cuda(card) => Ok(card),
        other => Err(Error::Device { op: OP, arg, got: other.to_string(), want: "a card".into() }),
    }
}

/// Independent sums of the cpu: enough to hide the latency of two units, few enough for the registers.
const CPU_SUMS: usize = 12;

/// Flops of [`cpu_sums`].
pub fn cpu_sums_flops(rounds: usize) -> f64 {
    (2 * CPU_SUMS * cpu_lanes()) as f64 * rounds as f64
}

#[cfg(target_arch = "x86_64")]
fn cpu_lanes() -> usize {
    if is_x86_feature_detected!("avx512f") {
        16
    } else if is_x86_feature_detected!("fma") {
        8
    } else {
        4
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn cpu_lanes() -> usize {
    4
}

/// f32 multiply-adds of one thread of the cpu on registers.
pub fn cpu_sums(rounds: usize) -> f32 {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::*;

        #[target_feature(enable = "avx512f")]
        fn avx512(rounds: usize) -> f32 {
            let (scale, shift) = (_mm512_set1_ps(0.999), _mm512_set1_ps(0.001));
            let mut sums = [shift; CPU_SUMS];
            for _ in 0..rounds {
                for sum in &mut sums {
                    *sum = _mm512_fmadd_ps(*sum, scale, shift);
                }
            }
            sums.into_iter().map(|sum| _mm512_reduce_add_ps(sum)).sum()
        }

        #[target_feature(enable = "avx,fma")]
        fn fma(rounds: usize) -> f32 {
            let (scale, shift) = (_mm256_set1_ps(0.999), _mm256_set1_ps(0.001));
            let mut sums = [shift; CPU_SUMS];
            for _ in 0..rounds {
                for sum in &mut sums {
                    *sum = _mm256_fmadd_ps(*sum, scale, shift);
                }
            }
            sums.into_iter().map(|sum| _mm256_cvtss_f32(sum)).sum()
        }

        // SAFETY: the instruction sets were detected.
        match cpu_lanes() {
            16 => return unsafe { avx512(rounds) },
            8 => return unsafe { fma(rounds) },
            _ => {}
        }
    }
    let mut sums = [[0.001f32; 4]; CPU_SUMS];
    for _ in 0..rounds {
        for value in sums.as_flattened_mut() {
            *value = *value * 0.999 + 0.001;
        }
    }
    sums.into_iter().flatten().sum()
}
