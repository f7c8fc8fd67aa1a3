//! What the transformer is told beside its sample: the text, its pooled embedding and the timestep.

use super::blocks::Rows;
use super::{Mmdit, MmditConfig};
use crate::error::{Error, Result};
use crate::models::layers::Linear;
use crate::models::weights::Weights;
use crate::ops::{self, Activation, StepIndex, StepRows, TimestepEmbedding};
use crate::runtime::Tensor;

/// What is the same for every step of a run, computed once: the text as the blocks read it, and the rows by which each block
/// modulates its streams at each timestep.
#[derive(Clone, Debug)]
pub struct MmditConditioning {
    tables: Vec<Tensor>, // of each modulation: [steps * R, parts * C], those of a step together
    text: Tensor,        // [R, L, C]
    steps: usize,
}

impl MmditConditioning {
    /// Rows of the text, R; a call has a multiple of them as its samples.
    pub fn text_rows(&self) -> usize {
        self.text.shape()[0]
    }

    /// Timesteps it was made for.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// The same in memory of its own.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; [`Error::Driver`].
    pub fn duplicate(&self) -> Result<MmditConditioning> {
        let tables = self.tables.iter().map(Tensor::duplicate).collect::<Result<_>>()?;
        Ok(MmditConditioning { tables, text: self.text.duplicate()?, steps: self.steps })
    }

    /// Another conditioning of the same shapes, in the memory of this one: a recorded step then reads it.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: `from` has other shapes; [`Error::Driver`].
    pub fn copy_from(&mut self, from: &MmditConditioning) -> Result<()> {
        let to = self.tables.iter_mut().chain([&mut self.text]);
        to.zip(from.tables.iter().chain([&from.text])).try_for_each(|(to, from)| to.copy_from(from))
    }

    pub(super) fn rows<'a>(&'a self, modulation: usize, step: &'a StepIndex, width: usize) -> Rows<'a> {
        Rows { rows: StepRows { table: &self.tables[modulation], step, rows: self.text_rows() }, width }
    }

    /// The text of `n` samples, which are as many of each row in the order of the rows: `[n, L, C]`.
    pub(super) fn text(&self, n: usize) -> Result<Tensor> {
        let (rows, dtype) = (self.text_rows(), self.text.dtype());
        if n == rows {
            return Ok(self.text.clone());
        }
        let repeated = |row: usize| ops::scale_cast(&self.text.rows(row..row + 1)?, 1.0, 0.0, dtype, n / rows);
        let mut text = repeated(0)?;
        for row in 1..rows {
            text = ops::stack(&text, &repeated(row)?)?;
        }
        Ok(text)
    }

    /// Made for the `n` samples of `x` at these steps?
    ///
    /// # Errors
    /// [`Error::Shape`]: N; [`Error::Argument`]: a step.
    pub(super) fn check(&self, x: &Tensor, n: usize, step: &StepIndex) -> Result<()> {
        let rows = self.text_rows();
        if n == 0 || rows == 0 || !n.is_multiple_of(rows) {
            return Err(Error::shape("mmdit", "x", x, format!("N as a multiple of the text's {rows} rows")));
        }
        if !n.is_multiple_of(step.images()) {
            let want = format!("N as a multiple of the {} images with a step of their own", step.images());
            return Err(Error::shape("mmdit", "x", x, want));
        }
        if step.last() >= self.steps {
            let want = format!("below {}, the number of timesteps of the conditioning", self.steps);
            return Err(Error::argument("mmdit", "step", step.last(), want));
        }
        Ok(())
    }
}

/// Two linear layers with SiLU between.
struct Mlp {
    linear_1: Linear, // [C, K]
    linear_2: Linear, // [C, C]
}

/// CombinedTimestepTextProjEmbeddings: of the timestep's sinusoid and of the pooled text, which are added.
pub(super) struct TimeTextEmbedding {
    timestep_embedder: Mlp,
    text_embedder: Mlp,
}

/// As published.
const SINUSOID: TimestepEmbedding = TimestepEmbedding { dim: 256, flip_sin_to_cos: true, freq_shift: 0.0 };

impl TimeTextEmbedding {
    pub(super) fn load(w: &Weights, config: &MmditConfig) -> Result<TimeTextEmbedding> {
        let c = config.width();
        let mlp = |w: Weights, inputs: usize| -> Result<Mlp> {
            let (linear_1, linear_2) = (w.at("linear_1"), w.at("linear_2"));
            Ok(Mlp { linear_1: Linear::load(&linear_1, c, inputs)?, linear_2: Linear::load(&linear_2, c, c)? })
        };
        Ok(TimeTextEmbedding {
            timestep_embedder: mlp(w.at("timestep_embedder"), SINUSOID.dim)?,
            text_embedder: mlp(w.at("text_embedder"), config.pooled_projection_dim)?,
        })
    }
}

impl Mmdit {
    /// What a run needs of its prompts and timesteps. `text: [R, L, joint_attention_dim]`, `pooled: [R, pooled_projection_dim]`; a
    /// batch of N samples is R equal parts in this order, so with classifier-free guidance the unconditional row or rows come
    /// first. `timesteps`: all of the run, 1000 sigma, in the order in which [`forward`](Mmdit::forward) will name them by index.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: `text`, `pooled`; [`Error::OutOfMemory`].
    pub fn condition(&self, text: &Tensor, pooled: &Tensor, timesteps: &[f32]) -> Result<MmditConditioning> {
        let [rows, length, _] = text.dims("mmdit", "text")?;
        let config = &self.config;
        text.expect("mmdit", "text", &[rows, length, config.joint_attention_dim], self.dtype, &self.device)?;
        pooled.expect("mmdit", "pooled", &[rows, config.pooled_projection_dim], self.dtype, &self.device)?;
        let tables = self.tables(pooled, timesteps)?;
        Ok(MmditConditioning { tables, text: self.context_embedder.forward(text)?, steps: timesteps.len() })
    }

    fn tables(&self, pooled: &Tensor, timesteps: &[f32]) -> Result<Vec<Tensor>> {
        let rows = pooled.shape()[0];
        // Of a step R times the same, with the rows of the pooled text.
        let repeated: Vec<f32> = timesteps.iter().flat_map(|&t| std::iter::repeat_n(t, rows)).collect();
        let embedding = &self.time_text_embed;
        let (of_time, of_text) = (&embedding.timestep_embedder, &embedding.text_embedder);
        let time = ops::timestep_embedding(&repeated, SINUSOID, &self.device, self.dtype)?; // [steps * R, 256]
        let time = of_time.linear_1.fused(&time, Activation::Silu, None)?;
        let time = if timesteps.is_empty() {
            time
        } else {
            let text = of_text.linear_2.forward(&of_text.linear_1.fused(pooled, Activation::Silu, None)?)?;
            let text = ops::scale_cast(&text, 1.0, 0.0, self.dtype, timesteps.len())?; // [R, C] of each step
            of_time.linear_2.forward_residual(&time, &text)?
        };
        // The norms read nothing but silu(emb).
        let embedding = ops::activation(&time, Activation::Silu)?; // [steps * R, C]
        self.modulations.iter().map(|modulation| modulation.forward(&embedding)).collect()
    }
}
