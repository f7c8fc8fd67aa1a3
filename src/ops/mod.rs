//! The fused ops of the models: checked arguments here, one name in kernel, op, test and bench.
//!
//! A model calls the fused op; a device may split it. Layouts: activations `[N, H, W, C]`, tokens `[N, L, C]`, heads
//! `[N, L, heads, head_dim]`, conv weights `[O, kh, kw, I]`, linear weights `[N, K]`. Inputs of one op share device and
//! dtype unless said otherwise; accumulation and statistics are f32. Every op accepts empty batches.
//!
//! Every op is written alike, and [`rms_norm`] is the one to copy: it checks its arguments, allocates the result, opens a
//! [`profile::scope`](profile) by its name and the result's shape, and asks the device with one `match`, whose arms are
//! 1. the meta device, which records the op's [`Work`](crate::runtime::Work) by the same name and shape;
//! 2. an empty result, for which nothing is left to do;
//! 3. the cpu;
//! 4. a card.
//!
//! Memory that a card needs beside the result is allocated at the head of its arm, and of the meta device's, which counts it.

mod attention;
mod attention_map;
#[doc(hidden)]
pub mod cases;
mod conv;
mod cpu;
mod cuda;
mod disperse;
mod elementwise;
mod embedding;
mod freeu;
mod latents;
mod linear;
mod linear_fp8;
mod low_band;
mod norm;
mod patches;
#[doc(hidden)]
pub mod peaks;
pub mod profile;
mod resize;
mod rms_norm;
mod sampler;
mod spectral_filter;
mod statistics;
mod step;
mod unpatchify;
mod upsample_guidance;

pub use attention::{Attention, AttentionOptions, SecondSource, WindowShift, Windows, attention, attention_with};
pub use attention_map::{attention_map, blend_attention_map};
pub use conv::{Conv2d, ConvNorm, Stripe, conv2d};
pub use cuda::variants::{Variant, all as variants, on_device as variants_on, with_variants};
pub use disperse::{disperse, dispersion};
pub use elementwise::{
    Activation, activation, add, add_masked, add_scaled, clamp, concat, count_non_finite, scale_cast, stack,
};
pub use embedding::{TimestepEmbedding, embedding, timestep_embedding};
pub use freeu::{FreeU, freeu};
pub use latents::{blur_latents, latent_moments, mix_latents, standardise_latents};
pub use linear::{Linear, linear};
pub use linear_fp8::{LinearFp8, Quantized, linear_fp8, quantize};
pub use low_band::{exchange_low_band, sharpen};
pub use norm::{GroupNorm, LayerNorm, Modulation, group_norm, layer_norm};
pub use patches::{PatchLayout, Patches, Restandardised, gather_patches, merge_patches, step_patches};
pub use resize::{RelayNoise, Upsampler, avg_pool, resize, resize_bilinear, resize_nearest, resize_u8};
pub use rms_norm::{RmsNorm, rms_norm, rms_norm_heads};
pub use sampler::{add_noise, diagonal_gaussian};
pub use spectral_filter::{LowPass, SpectralFilter, Strength, spectral_filter};
pub use statistics::{GroupMoments, GroupStatistics};
pub use step::{
    Guidance, GuidanceScale, HISTORY, Kept, LearnedNoise, Repaint, SampleState, StepCoefficients, StepColumns,
    StepIndex, StepRow, StepRows, StepTable, Thresholding, history, repaint, sampler_step, scale_input,
};
pub use unpatchify::unpatchify;
pub use upsample_guidance::{pool_latents, upsample_guidance};

use crate::error::{Error, Result};
use crate::runtime::Tensor;

/// The instruction set that the cpu's ops use, `baseline`, `avx2` or `avx512`: the largest of this machine, or the smaller
/// one that `MEGAFUSE_CPU` names.
///
/// # Errors
/// [`Error::Config`]: the variable names none of this machine's. The ops themselves then take the largest.
pub fn cpu_level() -> Result<&'static str> {
    Ok(cpu::math::chosen()?.name())
}

/// The input of an op that can read a skip connection as a second source: `Two(a, b)` is `a` and `b` side by side on
/// the channel dimension, without a copy.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    One(&'a Tensor),
    /// `[N, H, W, C_a]` and `[N, H, W, C_b]`, read as `[N, H, W, C_a + C_b]`.
    Two(&'a Tensor, &'a Tensor),
}

impl<'a> Source<'a> {
    pub fn first(&self) -> &'a Tensor {
        match self {
            Source::One(a) | Source::Two(a, _) => a,
        }
    }

    pub fn second(&self) -> Option<&'a Tensor> {
        match self {
            Source::One(_) => None,
            Source::Two(_, b) => Some(b),
        }
    }

    /// `[N, H, W, C]` with C over both sources.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`] when a source is not 4-d or the two do not fit together.
    pub fn dims(&self, op: &'static str) -> Result<[usize; 4]> {
        let a = self.first();
        let [n, h, w, c] = a.dims(op, "x")?;
        float(op, "x", a)?;
        match self.second() {
            None => Ok([n, h, w, c]),
            Some(b) => {
                let [_, _, _, c_b] = b.dims(op, "x2")?;
                b.expect(op, "x2", &[n, h, w, c_b], a.dtype(), a.device())?;
                Ok([n, h, w, c + c_b])
            }
        }
    }
}

impl<'a> From<&'a Tensor> for Source<'a> {
    fn from(x: &'a Tensor) -> Source<'a> {
        Source::One(x)
    }
}

/// The argument has a float dtype.
fn float(op: &'static str, arg: &'static str, x: &Tensor) -> Result<()> {
    if x.dtype().is_float() {
        return Ok(());
    }
    Err(Error::Dtype { op, arg, got: x.dtype(), want: "f32, f16 or bf16".into() })
}

/// Runs a generic function for the element type of a float tensor: `by_dtype!(x.dtype(), T => kernel::<T>(x))`.
macro_rules! by_dtype {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::runtime::DType::F32 => {
                type $T = f32;
                $body
            }
            $crate::runtime::DType::F16 => {
                type $T = half::f16;
                $body
            }
            $crate::runtime::DType::BF16 => {
                type $T = half::bf16;
                $body
            }
            $crate::runtime::DType::U32 | $crate::runtime::DType::F8E4M3 => unreachable!("checked: a float dtype"),
        }
    };
}
use by_dtype;

/// Total bytes of tensors that an op reads or writes once.
fn bytes_of(tensors: &[Option<&Tensor>]) -> u64 {
    tensors.iter().flatten().map(|t| t.bytes()).sum()
}
