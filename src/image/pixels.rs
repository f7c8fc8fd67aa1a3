use rayon::prelude::*;

use crate::error::{Error, Result};

/// Values in [-1, 1] to bytes: `x / 2 + 1/2` clamped to [0, 1], times 255, rounded to nearest, ties to even, in f32: what
/// diffusers' image processor does.
///
/// # Errors
/// [`Error::NonFinite`]: NaN or infinity is an error, never a black pixel.
pub fn to_bytes(values: &[f32]) -> Result<Vec<u8>> {
    let count = values.par_iter().filter(|value| !value.is_finite()).count();
    if count > 0 {
        return Err(Error::NonFinite { what: "image".into(), count, total: values.len() });
    }
    Ok(values.par_iter().map(|x| ((x / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8).collect())
}

/// Bytes to values in [-1, 1]: `2 * (byte / 255) - 1` in f32, as diffusers' image processor has it.
pub fn from_bytes(bytes: &[u8]) -> Vec<f32> {
    bytes.iter().map(|&byte| 2.0 * (f32::from(byte) / 255.0) - 1.0).collect()
}
