use crate::error::Result;
use crate::ops::{StepCoefficients, StepRow, StepRows, StepTable};
use crate::runtime::{DType, Device, Tensor};

/// A second call of the network in each evaluation of a run, on the samples' means over squares of cells, at a timestep of its
/// own: [`Prediction::Upsampled`](super::Prediction::Upsampled).
#[derive(Clone, Debug, PartialEq)]
pub struct LowResolution {
    /// Cells along the side of a square.
    pub scale: usize,
    /// Of the whole run.
    pub evaluations: Vec<LowEvaluation>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LowEvaluation {
    /// What the network is told.
    pub timestep: f32,
    /// The network reads the means times this.
    pub input_scale: f32,
    /// Of the output for the means, of the means, of the means of the first output:
    /// [`upsample_guidance`](crate::ops::upsample_guidance).
    pub factors: [f32; 3],
}

impl LowResolution {
    /// What the network is told in a run: the timesteps of its evaluations, then those of the second calls.
    pub fn all_timesteps(&self, timesteps: &[f32]) -> Vec<f32> {
        timesteps.iter().copied().chain(self.evaluations.iter().map(|evaluation| evaluation.timestep)).collect()
    }

    /// Of as many rows that are not read, then of the evaluations: the second call's timestep has the same number in
    /// [`all_timesteps`](LowResolution::all_timesteps).
    fn rows(&self) -> Vec<StepRow> {
        let row = |input_scale| StepRow { input_scale, coefficients: StepCoefficients::default() };
        let own = self.evaluations.iter().map(|evaluation| row(evaluation.input_scale));
        vec![row(0.0); self.evaluations.len()].into_iter().chain(own).collect()
    }

    fn factors(&self) -> Vec<f32> {
        let own = self.evaluations.iter().flat_map(|evaluation| evaluation.factors);
        vec![0.0; 3 * self.evaluations.len()].into_iter().chain(own).collect()
    }
}

/// What the second calls of a stage read, on the device.
pub struct LowSteps {
    pub scale: usize,
    pub table: StepTable,
    /// `[2 evaluations, 3]`, f32
    factors: Tensor,
}

impl LowSteps {
    /// `first`: the stage's first evaluation.
    ///
    /// # Errors
    /// Those of the device.
    pub fn new(device: &Device, low: &LowResolution, first: usize) -> Result<LowSteps> {
        let rows = low.rows();
        let factors = Tensor::from_f32(device, &[rows.len(), 3], DType::F32, &low.factors())?;
        let mut table = StepTable::new(device, rows)?;
        table.index_mut().set(&[low.evaluations.len() + first])?;
        Ok(LowSteps { scale: low.scale, table, factors })
    }

    /// Another run's, of as many evaluations, in the same place.
    ///
    /// # Errors
    /// Those of the device.
    pub fn rewrite(&mut self, low: &LowResolution, first: usize) -> Result<()> {
        self.table.rewrite(low.rows(), low.evaluations.len() + first)?;
        self.factors.write_f32(&low.factors())
    }

    pub fn factors(&self) -> StepRows<'_> {
        StepRows { table: &self.factors, step: self.table.index(), rows: 1 }
    }
}
