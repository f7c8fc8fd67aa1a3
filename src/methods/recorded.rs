use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

use super::cache::{Caching, KeptOutput};
use super::views::{ViewBegin, ViewKey, ViewStage, ViewSteps};
use super::{Denoiser, FrequencySplit, Known, LowResolution, LowSteps, Prediction, SplitGuidance};
use crate::error::{Error, Result};
use crate::ops::{self, Guidance, SampleState, StepRow, StepTable, Thresholding, history};
use crate::runtime::{DType, Device, Repeated, Tensor};

/// Steps that a card has recorded, kept with all the memory that they read and write: a later stage of the same kind
/// replays them from its first step on. They belong to one model; other devices keep nothing.
///
/// A step is found by everything that is recorded in it: [`StepKey`], and among the graphs of one key by the
/// step's [`Prediction`] and [`Caching`]. The rest stands in memory that the step owns and that [`begin`](RecordedSteps::begin) writes anew. So a replay
/// cannot do other work than it is asked for.
#[derive(Default)]
pub struct RecordedSteps {
    kept: Kept<StepKey, StageSteps>,
    /// The same of steps over views.
    views: Kept<ViewKey, ViewSteps>,
    /// Memory is short: nothing is kept.
    short: AtomicBool,
}

/// Makes the network's side of a stage, in the memory of the one that it is given.
type DenoiserFor<'a> = dyn Fn(Option<Box<dyn Denoiser>>) -> Result<Box<dyn Denoiser>> + 'a;

/// What a recorded step depends on, beside the model and what is asked of the network.
#[derive(Clone, Debug, PartialEq)]
pub struct StepKey {
    /// `[N, h, w, C]` of the samples.
    pub sample: [usize; 4],
    /// [`DiffusionModel::conditioning_key`](super::DiffusionModel::conditioning_key).
    pub conditioning: Vec<usize>,
    /// Rows of the step table.
    pub rows: usize,
    /// `None`: there is no guidance; else whether it is rescaled.
    pub rescales: Option<bool>,
    pub adds_noise: bool,
    pub thresholding: Option<Thresholding>,
    /// Is a part of a picture kept?
    pub repaints: bool,
    /// Shifts of attention's windows that the network reads in a step, per image.
    pub window_shifts: Option<usize>,
    /// The scale of the network's second calls.
    pub low_scale: Option<usize>,
    /// [`FrequencySplit::grid`]
    pub split: Option<[usize; 2]>,
}

/// What a stage begins with.
pub struct StageInputs<'a> {
    pub x: Tensor,
    pub rows: &'a [StepRow],
    /// The row of the first step.
    pub first: usize,
    /// `[rows, images, C]` ([`StepTable::with_window_shifts`]).
    pub window_shifts: Option<&'a [u32]>,
    pub guidance: Option<Guidance>,
    pub known: Option<&'a Known>,
    /// The network's second calls.
    pub low: Option<&'a LowResolution>,
    /// How guidance is split by frequency, if it is.
    pub split: Option<&'a FrequencySplit>,
}

/// Stages whose steps are kept: those of a run with three relays, for two kinds of runs.
const MOST_KEPT: usize = 8;

/// The steps of the latest stages, by what they depend on.
struct Kept<K, S>(Mutex<Vec<(K, S)>>);

impl<K, S> Default for Kept<K, S> {
    fn default() -> Kept<K, S> {
        Kept(Mutex::default())
    }
}

impl<K: PartialEq, S> Kept<K, S> {
    fn stages(&self) -> MutexGuard<'_, Vec<(K, S)>> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn push(&self, key: K, steps: S) {
        let mut stages = self.stages();
        stages.push((key, steps));
        if stages.len() > MOST_KEPT {
            stages.remove(0);
        }
    }

    /// Steps of this key that are `free` to be used again.
    fn take(&self, key: &K, free: impl Fn(&S) -> bool) -> Option<S> {
        let mut stages = self.stages();
        let at = stages.iter().position(|(other, steps)| other == key && free(steps))?;
        Some(stages.remove(at).1)
    }

    /// How many there were.
    fn clear(&self) -> usize {
        std::mem::take(&mut *self.stages()).len()
    }
}

/// The steps of a stage: all that they read and write, and on a card what was recorded of them.
pub struct StageSteps {
    denoiser: Box<dyn Denoiser>,
    state: SampleState,
    noise: Option<Tensor>,
    table: StepTable,
    guidance: Option<Guidance>,
    known: Option<Known>,
    low: Option<LowSteps>,
    split: Option<SplitGuidance>,
    /// Of the last step that was computed for a cache.
    kept: Option<KeptOutput>,
    recorded: Vec<(Prediction, Caching, Repeated)>,
}

impl RecordedSteps {
    /// Steps for a stage. `denoiser` makes the network's side, in the memory of the one that it is given.
    ///
    /// # Errors
    /// Those of `denoiser`; [`Error::OutOfMemory`], once nothing is kept any more.
    pub fn begin(
        &self,
        key: &StepKey,
        StageInputs { x, rows, first, window_shifts, guidance, known, low, split }: StageInputs,
        denoiser: &DenoiserFor,
    ) -> Result<StageSteps> {
        let history = history(rows);
        let free = |steps: &StageSteps| steps.state.depth() == history && steps.state.is_unshared();
        if let Some(mut steps) = self.kept.take(key, free) {
            if let (Some(to), Some(from)) = (&mut steps.guidance, &guidance) {
                to.rewrite(from)?;
            }
            if let (Some(to), Some(from)) = (&mut steps.known, known) {
                to.copy_from(from)?;
            }
            if let (Some(to), Some(from)) = (&mut steps.low, low) {
                to.rewrite(from, first)?;
            }
            if let (Some(to), Some(from)) = (&mut steps.split, split) {
                to.rewrite(from)?;
            }
            steps.denoiser = denoiser(Some(steps.denoiser))?;
            steps.state.restart(&x)?;
            steps.table.rewrite(rows.to_vec(), first)?;
            if let Some(values) = window_shifts {
                steps.table.rewrite_window_shifts(values)?;
            }
            return Ok(steps);
        }
        let device = x.device().clone();
        let parts = || -> Result<_> {
            let [images, ..] = key.sample;
            let table = StepTable::new(&device, rows.to_vec())?.with_images(images)?;
            let mut table = table.with_thresholding(key.thresholding)?;
            table.index_mut().set(&vec![first; images])?;
            if let Some(values) = window_shifts {
                table = table.with_window_shifts(images, values)?;
            }
            let noise = match key.adds_noise {
                true => Some(Tensor::uninit(&device, &key.sample, DType::F32)?),
                false => None,
            };
            let known = known.map(Known::duplicate).transpose()?;
            let low = low.map(|low| LowSteps::new(&device, low, first)).transpose()?;
            let split = split.map(|split| SplitGuidance::new(&device, split)).transpose()?;
            Ok((denoiser(None)?, table, noise, known, low, split))
        };
        let (denoiser, table, noise, known, low, split) = self.retrying(parts)?;
        // Steps overwrite x, which the caller may still hold.
        let x = if x.is_unshared() { x } else { x.duplicate()? };
        let (state, kept, recorded) = (SampleState::with_history(x, history)?, None, Vec::new());
        Ok(StageSteps { denoiser, state, noise, table, guidance, known, low, split, kept, recorded })
    }

    /// Keeps the steps of a stage that is done, if its device records.
    pub fn end(&self, key: StepKey, steps: StageSteps) {
        if self.keeps(steps.state.x()) {
            self.kept.push(key, steps);
        }
    }

    /// From now on nothing is kept, if memory is short, and what is kept goes.
    pub fn set_short_of_memory(&self, short: bool) {
        self.short.store(short, Ordering::Relaxed);
        if short {
            self.clear();
        }
    }

    /// One step of `steps` by this prediction; where there is no memory for it, what is kept of other stages goes.
    ///
    /// # Errors
    /// Those of the network and the ops.
    pub fn step(&self, steps: &mut StageSteps, prediction: &Prediction, caching: Caching) -> Result<()> {
        let at = |steps: &StageSteps| -> Vec<usize> {
            let index = steps.table.index();
            (0..index.images()).map(|image| index.get(image)).collect()
        };
        let before = at(steps);
        match steps.step(prediction, caching) {
            // It failed before it changed the samples.
            Err(Error::OutOfMemory { .. }) if at(steps) == before && self.clear() > 0 => {
                steps.step(prediction, caching)
            }
            done => done,
        }
    }

    /// Steps over views for a stage.
    ///
    /// # Errors
    /// As [`begin`](RecordedSteps::begin).
    pub fn begin_views(
        &self,
        key: &ViewKey,
        begin: &ViewBegin,
        stage: &ViewStage,
        denoiser: &DenoiserFor,
    ) -> Result<ViewSteps> {
        if let Some(steps) = self.views.take(key, |steps| steps.x().is_unshared()) {
            let mut steps = steps.with_denoiser(|old| denoiser(Some(old)))?;
            steps.restart(begin, stage)?;
            return Ok(steps);
        }
        self.retrying(|| ViewSteps::new(begin, stage, denoiser(None)?))
    }

    /// Keeps the steps of a stage over views that is done, if its device records.
    pub fn end_views(&self, key: ViewKey, steps: ViewSteps) {
        if self.keeps(steps.x()) {
            self.views.push(key, steps);
        }
    }

    /// Are steps of these samples kept: does their device record, and is there memory?
    fn keeps(&self, x: &Tensor) -> bool {
        matches!(x.device(), Device::Cuda(_)) && !self.short.load(Ordering::Relaxed)
    }

    /// `work`, and where there is no memory for it, once more when what is kept has gone. It must have changed nothing then.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn retrying<T>(&self, mut work: impl FnMut() -> Result<T>) -> Result<T> {
        match work() {
            Err(Error::OutOfMemory { .. }) if self.clear() > 0 => work(),
            done => done,
        }
    }

    /// Drops all that is kept, with its memory; how many stages there were.
    pub fn clear(&self) -> usize {
        self.kept.clear() + self.views.clear()
    }
}

impl StageSteps {
    /// Where the step's draw goes, if a step of the run reads one.
    pub fn noise_mut(&mut self) -> Option<&mut Tensor> {
        self.noise.as_mut()
    }

    pub(super) fn denoiser(&self) -> &dyn Denoiser {
        &*self.denoiser
    }

    /// The samples and, after a step, its clean samples.
    pub fn state(&self) -> &SampleState {
        &self.state
    }

    /// Puts other clean samples in the place of the last step's, and moves the samples on by `weight` times the difference.
    ///
    /// # Errors
    /// Those of the ops.
    pub fn revise(&mut self, x0: &Tensor, weight: f32) -> Result<()> {
        let difference = ops::add_scaled(x0, self.state.x0(), -1.0)?;
        let x = ops::add_scaled(self.state.x(), &difference, weight)?;
        self.state.x_mut().copy_from(&x)?;
        self.state.x0_mut().copy_from(x0)
    }

    /// What the network reads is the samples times this, in the next evaluation.
    pub(super) fn next_input_scale(&self) -> f32 {
        self.table.next_row(0).map_or(1.0, |row| row.input_scale)
    }

    pub(super) fn kept_output(&self) -> Option<&KeptOutput> {
        self.kept.as_ref()
    }

    /// Does the next evaluation's output follow from its clean samples?
    pub(super) fn can_step_to_clean(&self) -> bool {
        self.table.next_row(0).is_some_and(|row| row.coefficients.x0_from_e != 0.0)
    }

    /// One evaluation as it is where the guided output of the network has these clean samples, without the network. All
    /// images are at the same step. Nothing of it is recorded: what it multiplies by is another number at every step.
    ///
    /// # Errors
    /// Those of the ops.
    pub(super) fn step_to_clean(&mut self, x0: &Tensor) -> Result<()> {
        let StageSteps { state, noise, table, known, low, .. } = self;
        let k = table.next_row(0).map(|row| row.coefficients).unwrap_or_default();
        let output = ops::scale_cast(x0, 1.0 / k.x0_from_e, 0.0, DType::F32, 1)?;
        let output = ops::add_scaled(&output, state.x(), -k.x0_from_x / k.x0_from_e)?;
        ops::sampler_step(state, &output, None, table, noise.as_ref())?;
        if let Some(known) = known {
            ops::repaint(state.x_mut(), known.args(table.index()))?;
        }
        if let Some(low) = low {
            low.table.index_mut().advance()?;
        }
        table.index_mut().advance()
    }

    /// One step by this prediction: computed, recorded or replayed.
    fn step(&mut self, prediction: &Prediction, caching: Caching) -> Result<()> {
        let StageSteps { denoiser, state, noise, table, guidance, known, low, split, kept, recorded } = self;
        if caching == Caching::Keep && kept.is_none() {
            let mut shape = state.x().shape().to_vec();
            shape[0] *= if guidance.is_some() { 2 } else { 1 };
            *kept = Some(KeptOutput::uninit(state.x().device(), &shape)?);
        }
        let same = |(of, cached, _): &(Prediction, Caching, Repeated)| of == prediction && *cached == caching;
        let at = match recorded.iter().position(same) {
            Some(at) => at,
            None => {
                recorded.push((prediction.clone(), caching, Repeated::new(state.x().device())));
                recorded.len() - 1
            }
        };
        let replayed = recorded[at].2.run(|| {
            let output = match (caching, &mut *kept) {
                (Caching::Reuse, Some(kept)) => kept.reuse(state.x(), table)?,
                (_, kept) => {
                    let output = prediction.rows(&**denoiser, state.x(), table, low.as_ref())?;
                    if let (Caching::Keep, Some(kept)) = (caching, kept) {
                        kept.keep(state.x(), table, &output)?;
                    }
                    output
                }
            };
            let output = match split {
                Some(split) => split.rows(&output)?,
                None => output,
            };
            ops::sampler_step(state, &output, guidance.as_ref(), table, noise.as_ref())?;
            if let Some(known) = known {
                ops::repaint(state.x_mut(), known.args(table.index()))?;
            }
            if let Some(low) = low {
                low.table.index_mut().advance()?;
            }
            table.index_mut().advance()
        })?;
        if replayed {
            table.index_mut().replayed();
            if let Some(low) = low {
                low.table.index_mut().replayed();
            }
        }
        Ok(())
    }
}
