//! SD3Transformer2DModel: MMDiT, the denoiser of Stable Diffusion 3 and 3.5. Esser et al. 2024, arXiv:2403.03206, sec. 4; the
//! modulation is that of Peebles & Xie 2023, arXiv:2212.09748.

mod blocks;
mod conditioning;
mod config;
mod positions;

pub use conditioning::MmditConditioning;
pub use config::MmditConfig;

use super::layers::{Conv2d, Linear};
use super::weights::{WeightStore, Weights};
use crate::error::{Error, Result};
use crate::ops::{self, StepIndex};
use crate::runtime::{DType, Device, Tensor};
use blocks::{JointBlock, Modulations};
use conditioning::TimeTextEmbedding;
use positions::Positions;

/// The denoiser.
pub struct Mmdit {
    config: MmditConfig,
    device: Device,
    dtype: DType,
    pos_embed: Conv2d, // [C, patch, patch, in_channels]
    positions: Positions,
    time_text_embed: TimeTextEmbedding,
    context_embedder: Linear, // [C, joint_attention_dim]
    transformer_blocks: Vec<JointBlock>,
    /// Of every block's two streams, and of the end.
    modulations: Modulations,
    proj_out: Linear, // [patch * patch * out_channels, C]
}

impl Mmdit {
    /// Takes every tensor of `store`.
    ///
    /// # Errors
    /// [`Error::Weight`]: missing, extra, of another shape, not finite; [`Error::OutOfMemory`].
    pub fn load(store: WeightStore, config: &MmditConfig) -> Result<Mmdit> {
        let mmdit = Mmdit::from_weights(&store.root(), config)?;
        store.finish()?;
        Ok(mmdit)
    }

    /// Takes the model's tensors and leaves it to the caller to look for others ([`WeightStore::finish`]) or at what was
    /// asked for ([`WeightStore::manifest`]).
    ///
    /// # Errors
    /// As [`load`](Mmdit::load).
    pub fn from_weights(w: &Weights, config: &MmditConfig) -> Result<Mmdit> {
        let (c, patch) = (config.width(), config.patch_size);
        let mut modulations = Modulations::new();
        let blocks = w.at("transformer_blocks");
        let transformer_blocks = (0..config.num_layers)
            .map(|i| JointBlock::load(&blocks.at(i.to_string()), config, i, &mut modulations))
            .collect::<Result<_>>()?;
        modulations.push(blocks::load_end(&w.at("norm_out"), c)?);
        Ok(Mmdit {
            device: w.device().clone(),
            dtype: w.dtype(),
            pos_embed: Conv2d::load(&w.at("pos_embed.proj"), c, config.in_channels, patch)?,
            positions: Positions::load(&w.at("pos_embed"), config)?,
            time_text_embed: TimeTextEmbedding::load(&w.at("time_text_embed"), config)?,
            context_embedder: Linear::load(&w.at("context_embedder"), c, config.joint_attention_dim)?,
            transformer_blocks,
            modulations,
            proj_out: Linear::load(&w.at("proj_out"), patch * patch * config.out_channels, c)?,
            config: config.clone(),
        })
    }

    pub fn config(&self) -> &MmditConfig {
        &self.config
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// `x: [N, H, W, in_channels]` to `[N, H, W, out_channels]`: the velocity. H and W are multiples of the patch's side, and at most
    /// `pos_embed_max_size` patches. Of n images with a step of their own, sample i is at timestep `timesteps[step.get(i)]`; it
    /// reads row `i / (N / R)` of the text. N is a multiple of n and of R.
    ///
    /// The first call with an N and a size brings the positions to the device, where they stay: a recorded step must not be that call.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: `x`; [`Error::Argument`]: `step`, more patches than there are positions;
    /// [`Error::OutOfMemory`].
    pub fn forward(&self, x: &Tensor, step: &StepIndex, conditioning: &MmditConditioning) -> Result<Tensor> {
        let (patch, c) = (self.config.patch_size, self.config.width());
        let [n, h, w, _] = x.dims("mmdit", "x")?;
        x.expect("mmdit", "x", &[n, h, w, self.config.in_channels], self.dtype, &self.device)?;
        if h == 0 || w == 0 || !h.is_multiple_of(patch) || !w.is_multiple_of(patch) {
            let want = format!("a height and width of multiples of {patch}, the side of a patch");
            return Err(Error::shape("mmdit", "x", x, want));
        }
        conditioning.check(x, n, step)?;
        let grid = [h / patch, w / patch];
        let positions = self.positions.of(n, grid, &self.device)?;
        let residual = Some(&positions);
        let embedded = ops::conv2d(ops::Conv2d { stride: patch, padding: [0; 4], residual, ..self.pos_embed.args(x) })?;
        let mut x = embedded.reshape(&[n, grid[0] * grid[1], c])?;
        drop(embedded);
        let mut text = conditioning.text(n)?;
        for block in &self.transformer_blocks {
            let rows = [block.rows, block.rows + 1].map(|rows| conditioning.rows(rows, step, c));
            (x, text) = block.forward(x, text, rows)?;
        }
        drop(text);
        let x = conditioning.rows(self.modulations.len() - 1, step, c).modulated_at_end(&x)?;
        ops::unpatchify(&self.proj_out.forward(&x)?, grid, patch)
    }
}
