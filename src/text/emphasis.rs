//! What weights do to the text encoder's output, and which of its layers is used.

use crate::error::{Error, Result};

/// Multiplies every token's embedding by its weight and restores the mean of the whole chunk, as webui's "Original"
/// emphasis: `z' = w z`, then `z' * mean(z) / mean(z')`, the means over all tokens and channels of this chunk alone.
///
/// * `values`: `[L, C]`, the encoder's output for one chunk, in place
/// * `weights`: `[L]`, of [`Chunks::weights`](super::Chunks::weights); when all are 1 nothing is changed
///
/// Means are taken in f64. A weighted mean of zero is left as it is, there is no factor that would restore it. SDXL's
/// pooled vector is not weighted.
///
/// # Errors
/// [`Error::Argument`]: `shape` is not that of `values` and `weights`.
pub fn emphasize(values: &mut [f32], shape: [usize; 2], weights: &[f32]) -> Result<()> {
    let [tokens, channels] = shape;
    if weights.len() != tokens || tokens.checked_mul(channels) != Some(values.len()) {
        let want = format!("[{} weights, C] with {} values in all", weights.len(), values.len());
        return Err(Error::argument("emphasize", "shape", format!("{shape:?}"), want));
    }
    if channels == 0 || weights.iter().all(|&weight| weight == 1.0) {
        return Ok(());
    }
    let mean = |values: &[f32]| values.iter().map(|&v| f64::from(v)).sum::<f64>() / values.len() as f64;
    let before = mean(values);
    for (row, &weight) in values.chunks_exact_mut(channels).zip(weights) {
        row.iter_mut().for_each(|v| *v *= weight);
    }
    let after = mean(values);
    if after != 0.0 {
        let factor = (before / after) as f32;
        values.iter_mut().for_each(|v| *v *= factor);
    }
    Ok(())
}

/// webui's "Clip skip": `n` = 1 uses the last layer's output; n >= 2 uses `hidden_states[-n]`, the output of the n-th
/// layer from the end. Either goes through the final layer norm, except on SDXL, where there is none and where the model's
/// own choice (`hidden_states[-2]`) holds unless the number was given explicitly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClipSkip(usize);

impl ClipSkip {
    /// # Errors
    /// [`Error::Request`]: `n` is not in 1 to `num_hidden_layers`.
    pub fn new(n: usize, num_hidden_layers: usize) -> Result<ClipSkip> {
        if n == 0 || n > num_hidden_layers {
            let reason = format!("expected 1 (the last layer) to {num_hidden_layers}, the text encoder's layers");
            return Err(Error::Request { flag: "--clip-skip", value: n.to_string(), reason });
        }
        Ok(ClipSkip(n))
    }

    pub fn get(self) -> usize {
        self.0
    }

    /// How many of `num_hidden_layers` layers run before the output is taken; at least 1 when the number was checked
    /// against this encoder.
    pub fn layers_run(self, num_hidden_layers: usize) -> usize {
        (num_hidden_layers + 1).saturating_sub(self.0)
    }
}
