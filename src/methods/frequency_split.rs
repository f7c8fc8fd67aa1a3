use super::prediction::in_f32;
use crate::error::Result;
use crate::ops::{self, StepIndex, StepRows};
use crate::runtime::{DType, Device, Tensor};

/// Guidance with one scale for what of it a smaller map can hold and another for the rest: FA-CFG of FreCaS (Zhang et al. 2024,
/// arXiv:2410.18410). With d = cond - uncond,
/// ```text
/// e = uncond + w_low low(d) + w_high (d - low(d)),      low: bilinearly to the grid and back
/// ```
/// which ordinary guidance by w_low makes of `cond' = uncond + low(d) + (w_high / w_low) (d - low(d))`.
#[derive(Clone, Debug, PartialEq)]
pub struct FrequencySplit {
    /// Height and width of the smaller map, in cells.
    pub grid: [usize; 2],
    /// Of each picture w_high / w_low.
    pub factors: Vec<f32>,
}

impl FrequencySplit {
    /// What `cond'` is made of: of low(d), of uncond, of d, the last one subtracted from d itself.
    fn rows(&self) -> Vec<f32> {
        self.factors.iter().flat_map(|factor| [1.0 - factor, 1.0, 1.0 - factor]).collect()
    }
}

/// The same on the device: recorded work reads what is there at its replay.
pub struct SplitGuidance {
    grid: [usize; 2],
    /// `[N, 3]`, f32
    factors: Tensor,
    /// Of each picture its own row.
    pictures: StepIndex,
}

impl SplitGuidance {
    /// # Errors
    /// Those of the device.
    pub fn new(device: &Device, split: &FrequencySplit) -> Result<SplitGuidance> {
        let count = split.factors.len();
        let factors = Tensor::from_f32(device, &[count, 3], DType::F32, &split.rows())?;
        let pictures = StepIndex::new(device, &(0..count).collect::<Vec<_>>())?;
        Ok(SplitGuidance { grid: split.grid, factors, pictures })
    }

    /// Other scales of as many pictures, in the same place.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape): of another number of pictures; those of the device.
    pub fn rewrite(&mut self, split: &FrequencySplit) -> Result<()> {
        self.factors.write_f32(&split.rows())
    }

    /// The rows that guidance reads, of the network's, `[2 N, h, w, C]`; f32. Work that a card can record.
    ///
    /// # Errors
    /// Those of the ops.
    pub fn rows(&self, output: &Tensor) -> Result<Tensor> {
        let [rows, h, w, _] = output.dims("frequency split", "output")?;
        let half = |from: usize| in_f32(output.rows(from..from + rows / 2)?);
        let (unconditional, conditional) = (half(0)?, half(rows / 2)?);
        let difference = ops::add_scaled(&conditional, &unconditional, -1.0)?;
        let low = ops::resize_bilinear(&ops::resize_bilinear(&difference, self.grid)?, [h, w])?;
        let factors = StepRows { table: &self.factors, step: &self.pictures, rows: 1 };
        // Its squares are of one cell.
        let conditional = ops::upsample_guidance(&difference, &low, &unconditional, factors)?;
        ops::stack(&unconditional, &conditional)
    }
}
