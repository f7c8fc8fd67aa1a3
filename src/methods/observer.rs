use super::{Computed, Size, StageParts, images, ranges};
use crate::error::{Error, Result};
use crate::ops;
use crate::runtime::{Device, Tensor};

/// Where a run stands after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepProgress {
    /// Counted from 0.
    pub stage: usize,
    /// Steps done in this stage, of `stage_steps`.
    pub step: usize,
    pub stage_steps: usize,
    /// Steps done in the whole run, of `run_steps`.
    pub run_step: usize,
    pub run_steps: usize,
}

/// What happens in a run, in order. Names a phase at its beginning, except [`Step`](Event::Step) and the two ends.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// The prompts are encoded next, once for all pictures.
    EncodeText,
    /// Picture `index` (from 0) of `count` begins.
    PictureBegins { index: usize, count: usize, seed: u64 },
    /// What the network is told in a stage is computed next; `stage` from 0.
    Condition { stage: usize },
    /// The picture that the run begins from is encoded next, for a stage; `stage` from 0.
    EncodePicture { stage: usize },
    /// The steps of a stage begin; `stage` from 0.
    StageBegins { stage: usize, stages: usize, size: Size, steps: usize, parts: StageParts },
    /// A step is done.
    Step(StepProgress),
    /// A relay begins: the clean sample is decoded. `stage` (from 0) is the one it leads to.
    Relay { stage: usize, from: Size, to: Size },
    /// The relay's picture, or between phases the samples, is resized.
    RelayUpsample { stage: usize },
    /// The relay's picture is encoded and noised.
    RelayEncode { stage: usize },
    /// The steps of a phase are done: its samples get the mean and deviation of the first one's, and its picture is decoded
    /// where it is wanted. `stage` from 0.
    PhaseEnds { stage: usize },
    /// The steps of a run with a cache are done: how often the network was asked.
    Cached(Computed),
    /// The final decode begins.
    Decode,
    /// The finished picture is enlarged to this size.
    Upscale { size: Size },
    /// The picture is finished.
    PictureEnds { index: usize },
}

/// Who watches a run. Every method has a default that does nothing.
pub trait Observer {
    fn event(&mut self, _event: &Event) {}

    /// Asked before every step, relay and decode: true ends the run with [`Error::Interrupted`].
    fn cancelled(&self) -> bool {
        false
    }

    /// Something the user should know, in one sentence (a prompt that was truncated).
    fn warning(&mut self, _message: &str) {}

    /// Should [`tensor`](Observer::tensor) be called for the intermediate tensors of picture `index`?
    fn wants_tensors(&self, _index: usize) -> bool {
        false
    }

    /// An intermediate tensor of picture `index`, row-major, NCHW where it is a picture or latents: `noise<j>` (the j-th
    /// draw, from 0), `timesteps`, `alpha_bar` (`[stages, training timesteps]`), `step<n>` (latents after the n-th
    /// update, from 1; `phase<s>.step<n>` where a method has phases, with `phase<s>.latent` at their ends),
    /// `relay<k>.{x0,decoded,upsampled,encoded,noised}` (k: the stage it leads to, the second is 1),
    /// `init<k>.{picture,encoded,mask,masked,noised}` (what stage k, from 0, gets of the run's picture), `cond<k>` (the noised picture
    /// that stage k's network enlarges), `latent` (what is
    /// decoded at the end), `image` (not clamped).
    ///
    /// # Errors
    /// End the run.
    fn tensor(&mut self, _index: usize, _name: &str, _shape: &[usize], _values: Vec<f32>) -> Result<()> {
        Ok(())
    }

    /// Picture `index` as it is before its last phase, `phase` from 1: `[height, width]`, RGB in [-1, 1], row-major, not
    /// clamped.
    ///
    /// # Errors
    /// End the run.
    fn phase(&mut self, _index: usize, _phase: usize, _size: [usize; 2], _values: Vec<f32>) -> Result<()> {
        Ok(())
    }

    /// What the method chose for picture `index` besides noise, by the names of [`MethodSpec::choices`](super::MethodSpec).
    ///
    /// # Errors
    /// End the run.
    fn integers(&mut self, _index: usize, _name: &str, _shape: &[usize], _values: Vec<i64>) -> Result<()> {
        Ok(())
    }
}

/// An observer that does nothing.
pub struct Silent;

impl Observer for Silent {}

/// An event of a run, to its observer and to a profiler.
pub fn tell(observer: &mut dyn Observer, event: &Event) {
    ranges::follow(event);
    observer.event(event);
}

/// An observer and the pictures of the batch that it is told about.
pub struct Watch<'a> {
    pub observer: &'a mut dyn Observer,
    /// Index of the batch's first picture.
    pub first: usize,
}

impl Watch<'_> {
    pub(super) fn begin(&mut self, event: Event) -> Result<()> {
        tell(self.observer, &event);
        self.check_cancelled()
    }

    pub(super) fn check_cancelled(&self) -> Result<()> {
        if self.observer.cancelled() { Err(Error::Interrupted) } else { Ok(()) }
    }

    /// `[N, H, W, C]`: every image to the observer as `[1, C, H, W]`, if it wants tensors and there are data.
    pub(super) fn dump(&mut self, name: &str, x: &Tensor) -> Result<()> {
        images(x)?.iter().enumerate().try_for_each(|(index, x)| self.dump_of(index, name, x))
    }

    /// `[1, H, W, C]` of image `index` of the batch to the observer as `[1, C, H, W]`.
    pub(super) fn dump_of(&mut self, index: usize, name: &str, x: &Tensor) -> Result<()> {
        let index = self.first + index;
        if !self.observer.wants_tensors(index) || matches!(x.device(), Device::Meta(_)) {
            return Ok(());
        }
        let [n, h, w, c] = x.dims("dump", "x")?;
        let (values, plane) = (x.to_f32_vec()?, h * w);
        let planar = (0..c).flat_map(|channel| values[channel..].iter().step_by(c).copied().take(plane)).collect();
        self.observer.tensor(index, name, &[n, c, h, w], planar)
    }

    /// The pictures of a batch before their last phase, `[1, H, W, 3]` each, to the observer.
    pub(super) fn phase(&mut self, phase: usize, pictures: &[Tensor]) -> Result<()> {
        for (index, picture) in pictures.iter().enumerate().filter(|(_, x)| !matches!(x.device(), Device::Meta(_))) {
            let [_, height, width, _] = picture.dims("phase", "picture")?;
            self.observer.phase(self.first + index, phase, [height, width], picture.to_f32_vec()?)?;
        }
        Ok(())
    }

    /// What was chosen for image `index` of the batch, to the observer.
    pub(super) fn dump_choice(&mut self, index: usize, name: &str, shape: &[usize], values: &[i64]) -> Result<()> {
        let index = self.first + index;
        match self.observer.wants_tensors(index) {
            true => self.observer.integers(index, name, shape, values.to_vec()),
            false => Ok(()),
        }
    }

    /// The same of f32.
    pub(super) fn dump_values_of(&mut self, index: usize, name: &str, shape: &[usize], values: &[f32]) -> Result<()> {
        let index = self.first + index;
        match self.observer.wants_tensors(index) {
            true => self.observer.tensor(index, name, shape, values.to_vec()),
            false => Ok(()),
        }
    }

    /// A table that the `images` pictures of the batch have in common.
    pub(super) fn dump_values(
        &mut self,
        images: usize,
        name: &str,
        shape: &[usize],
        values: impl Iterator<Item = f32> + Clone,
    ) -> Result<()> {
        for index in self.first..self.first + images {
            if self.observer.wants_tensors(index) {
                self.observer.tensor(index, name, shape, values.clone().collect())?;
            }
        }
        Ok(())
    }
}

/// # Errors
/// [`Error::NonFinite`] with `what` when an element of `x` is NaN or infinite. The meta device has none.
pub(super) fn check_finite(x: &Tensor, what: impl FnOnce() -> String) -> Result<()> {
    if matches!(x.device(), Device::Meta(_)) || !x.dtype().is_float() {
        return Ok(());
    }
    let count = ops::count_non_finite(x)?;
    if count == 0 { Ok(()) } else { Err(Error::NonFinite { what: what(), count, total: x.numel() }) }
}
