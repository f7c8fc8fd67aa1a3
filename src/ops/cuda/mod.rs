//! The card's side of the ops: which kernel, which grid. The op has checked the arguments, and the result is not empty.

pub mod attention;
pub mod attention_map;
pub mod attention_sm90;
pub mod conv;
pub mod conv_sm90;
pub mod disperse;
pub mod elementwise;
pub mod embedding;
pub mod freeu;
pub mod latents;
pub mod linear;
pub mod linear_fp8;
pub mod linear_sm90;
pub mod norm;
pub mod patches;
pub mod peaks;
pub mod repaint;
pub mod resize;
pub mod rms_norm;
pub mod sampler;
pub mod spectral_filter;
pub mod step;
mod step_rows;
pub mod tiles;
pub mod unpatchify;
pub mod upsample_guidance;
pub mod variants;

use crate::error::{Error, Result};
use crate::ops::Activation;
use crate::runtime::{DType, Tensor};

/// The entry of a kernel for a dtype: `add_bf16`.
pub fn entry(name: &str, dtype: DType) -> String {
    format!("{name}_{dtype}")
}

/// A size as the kernels count.
pub fn int(op: &'static str, what: &'static str, value: usize) -> Result<i32> {
    i32::try_from(value).map_err(|_| Error::TooLarge { op, what, got: value as u128, limit: i32::MAX as u128 })
}

/// `Activation` of activation.cuh.
fn activation_number(activation: Activation) -> i32 {
    match activation {
        Activation::None => 0,
        Activation::Silu => 1,
        Activation::Gelu => 2,
        Activation::QuickGelu => 3,
        Activation::Geglu => 4,
        Activation::GeluTanh => 5,
        Activation::GegluTanh => 6,
    }
}

/// May a kernel read and write it 16 bytes at a time, from the first element on?
pub fn aligned(tensor: &Tensor) -> bool {
    tensor.cuda().0.is_multiple_of(16)
}
