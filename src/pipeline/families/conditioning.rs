//! What a UNet or a ControlNet is told in a stage, for each kind of batch that the stage's steps ask for. A recorded step reads it
//! where it lies.

use std::sync::OnceLock;

use crate::error::Result;
use crate::models::{AddedConditioning, Conditioner, TIME_IDS, UnetConditioning};
use crate::runtime::{Device, Tensor};

/// What a network is told of the timesteps that it was asked for last.
pub struct OfTimesteps<C>(Option<(Vec<f32>, C)>);

impl<C> OfTimesteps<C> {
    pub fn nothing() -> OfTimesteps<C> {
        OfTimesteps(None)
    }

    /// What is there, where it is of these timesteps; else what `make` makes.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn get(&mut self, timesteps: &[f32], make: impl FnOnce() -> Result<C>) -> Result<&C> {
        let latest = match self.0.take() {
            Some(latest) if latest.0 == timesteps => latest,
            other => {
                drop(other); // before there is another
                (timesteps.to_vec(), make()?)
            }
        };
        Ok(&self.0.insert(latest).1)
    }
}

/// What a network is told of whole maps, and what follows from it for other batches.
pub struct StageConditioning {
    whole: UnetConditioning,
    /// How often the network sees a sample.
    repeats: usize,
    /// Of a batch that ends with the conditional samples once more, from the first such call on.
    twins: OnceLock<UnetConditioning>,
    /// Where the network reads them.
    crops: Option<Crops>,
    /// By the samples of a batch: what it was told of each one's crop.
    cropped: Vec<Cropped>,
}

/// What a network that was trained on crops is told beside where they lie.
pub struct Crops {
    /// `[R, pooled_dim]`
    pub pooled: Tensor,
    /// Of the whole picture; top and left of the crop are places 2 and 3.
    pub time_ids: [f32; TIME_IDS],
    pub timesteps: Vec<f32>,
}

/// A batch of crops.
struct Cropped {
    samples: usize,
    /// `[samples, pooled_dim]`; `None`: of another run.
    pooled: Option<Tensor>,
    conditioning: UnetConditioning,
}

impl StageConditioning {
    /// `whole`: its text has R rows, `repeats` equal parts of which the last is the conditional one.
    pub fn new(whole: UnetConditioning, repeats: usize, crops: Option<Crops>) -> StageConditioning {
        StageConditioning { whole, repeats, twins: OnceLock::new(), crops, cropped: Vec::new() }
    }

    /// The same, on a card in memory of its own: a recorded step reads it, and the next run writes into it.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory); those of the device.
    pub fn in_own_memory(self, device: &Device) -> Result<StageConditioning> {
        let whole = match device {
            Device::Cpu(_) => self.whole,
            Device::Cuda(_) | Device::Meta(_) => self.whole.duplicate()?,
        };
        Ok(StageConditioning { whole, ..self })
    }

    /// What `from`, of a stage that begins, says, in the memory of this one.
    ///
    /// # Errors
    /// Those of the device.
    pub fn replace(&mut self, from: StageConditioning) -> Result<()> {
        self.whole.copy_from(&from.whole)?;
        if let Some(twins) = self.twins.get_mut() {
            twins.copy_from(&from.make_twins()?)?;
        }
        self.cropped.iter_mut().for_each(|cropped| cropped.pooled = None);
        self.crops = from.crops;
        Ok(())
    }

    pub fn whole(&self) -> &UnetConditioning {
        &self.whole
    }

    pub fn repeats(&self) -> usize {
        self.repeats
    }

    /// Of a batch that ends with the conditional samples once more. A card reads it at every step, so it is made once and stays
    /// where it is.
    ///
    /// # Errors
    /// Those of the device.
    pub fn twins(&self) -> Result<&UnetConditioning> {
        if let Some(twins) = self.twins.get() {
            return Ok(twins);
        }
        let twins = self.make_twins()?;
        Ok(self.twins.get_or_init(|| twins))
    }

    fn make_twins(&self) -> Result<UnetConditioning> {
        // Of the unconditional rows there are as many as of the conditional ones, or none.
        self.whole.with_twins(self.whole.text_rows() / self.repeats * (self.repeats - 1))
    }

    /// Of a batch of `samples` samples whose crops were told: it has one step.
    pub fn cropped(&self, samples: usize) -> Option<&UnetConditioning> {
        self.cropped.iter().find(|cropped| cropped.samples == samples).map(|cropped| &cropped.conditioning)
    }

    /// As [`Denoiser::tell_crops`](crate::methods::Denoiser::tell_crops), by the layers of the network.
    ///
    /// # Errors
    /// Those of the network.
    pub fn tell_crops(&mut self, network: &Conditioner, evaluation: usize, crops: &[[f32; 2]]) -> Result<()> {
        let Some(Crops { pooled, time_ids, timesteps }) = &self.crops else { return Ok(()) };
        let samples = self.repeats * crops.len();
        let at = self.cropped.iter().position(|cropped| cropped.samples == samples);
        let rows = match at.and_then(|at| self.cropped[at].pooled.clone()) {
            Some(rows) => rows,
            None => {
                // Each row of the text serves as many consecutive samples.
                let text_rows = pooled.shape()[0];
                let row = |sample: usize| pooled.rows(sample * text_rows / samples..sample * text_rows / samples + 1);
                Tensor::concat(&(0..samples).map(row).collect::<Result<Vec<_>>>()?)?
            }
        };
        let &[height, width, _, _, target_height, target_width] = time_ids;
        let of = |&[top, left]: &[f32; 2]| [height, width, top, left, target_height, target_width];
        let ids: Vec<[f32; TIME_IDS]> = crops.iter().map(of).collect::<Vec<_>>().repeat(self.repeats);
        let added = AddedConditioning { pooled: &rows, time_ids: &ids };
        let told = network.condition_samples(&self.whole, added, timesteps[evaluation])?;
        match at {
            Some(at) => {
                self.cropped[at].pooled = Some(rows);
                self.cropped[at].conditioning.copy_rows_from(&told)
            }
            None => {
                self.cropped.push(Cropped { samples, pooled: Some(rows), conditioning: told });
                Ok(())
            }
        }
    }
}
