//! What every method's run is made of: draws, stages of steps, decoding and encoding, and telling the observer.

use std::ops::{Range, RangeInclusive};

use super::cache::{Caching, StepWork};
use super::observer::{check_finite, tell};
use super::views::{ViewBegin, ViewKey, ViewStage};
use super::{
    Denoiser, DiffusionModel, Event, FrequencySplit, Known, LowResolution, NoiseSource, NoisedPicture, Prediction, Run,
    Size, Stage, StageInputs, StepKey, StepProgress, Watch,
};
use crate::error::Result;
use crate::models::UnetOptions;
use crate::ops::{self, Guidance, GuidanceScale, StepCoefficients, StepRow};
use crate::runtime::{DType, Tensor};
use crate::schedulers::{Evaluation, Scheduler};

/// A run on its way, for a batch of pictures. A method's `sample` first calls [`prepare`](Sampling::prepare), then the
/// phases in its own order.
pub struct Sampling<'a> {
    pub(super) model: &'a dyn DiffusionModel,
    pub(super) run: &'a Run,
    noise: &'a mut dyn NoiseSource,
    watch: Watch<'a>,
    /// One per stage.
    pub(super) schedulers: Vec<Scheduler>,
    /// Of the whole run; most samplers have one per step.
    evaluations: Vec<Evaluation>,
    /// Of every evaluation.
    rows: Vec<StepRow>,
    /// Signal and sigma of the samples after every evaluation: those of the next one; of a stage's last, clean ones.
    pub(super) levels: Vec<[f64; 2]>,
    timesteps: Vec<f32>,
    /// Of attention's windows: how many an image has in a step, and those of every evaluation and image.
    window_shifts: Option<(usize, Vec<u32>)>,
    /// In place of the run's.
    guidance_scale: Option<f32>,
    /// The network's second calls.
    low: Option<LowResolution>,
    /// Steps and evaluations done.
    done: usize,
    evaluated: usize,
    /// Evaluations in which a cache stood in for the network.
    reused: usize,
    draws: usize,
    /// What the stage that begins next keeps of the run's picture.
    pub(super) known: Option<Known>,
    /// What its network reads beside the samples.
    pub(super) channels: Option<Tensor>,
    /// What the last stage's network collected of its cross-attention, for the next one.
    attention_maps: Option<Tensor>,
}

/// Clean samples in place of those that were found in a step, counted from 0; `None`: these.
pub type Revise<'a> = dyn FnMut(&mut Sampling, usize, &Tensor) -> Result<Option<Tensor>> + 'a;

/// Runs a method: the pictures, f32, `[1, H, W, 3]` each, not clamped.
///
/// # Errors
/// [`Error::Interrupted`]; [`Error::NonFinite`], naming the phase; those of the model.
pub fn generate<'a>(
    model: &'a dyn DiffusionModel,
    run: &'a Run,
    noise: &'a mut dyn NoiseSource,
    watch: Watch<'a>,
) -> Result<Vec<Tensor>> {
    generate_counted(model, run, noise, watch).map(|(images, _)| images)
}

/// How many of a run's evaluations the network made, where the run has a cache of steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Computed {
    pub computed: usize,
    pub evaluations: usize,
}

impl std::fmt::Display for Computed {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{} of {}", self.computed, self.evaluations)
    }
}

/// The same, and with a cache of steps how many the network made.
///
/// # Errors
/// As [`generate`].
pub fn generate_counted<'a>(
    model: &'a dyn DiffusionModel,
    run: &'a Run,
    noise: &'a mut dyn NoiseSource,
    watch: Watch<'a>,
) -> Result<(Vec<Tensor>, Option<Computed>)> {
    let mut sampling = Sampling {
        model,
        run,
        noise,
        watch,
        schedulers: Vec::new(),
        evaluations: Vec::new(),
        rows: Vec::new(),
        levels: Vec::new(),
        timesteps: Vec::new(),
        window_shifts: None,
        guidance_scale: None,
        low: None,
        done: 0,
        evaluated: 0,
        reused: 0,
        draws: 0,
        known: None,
        channels: None,
        attention_maps: None,
    };
    let latent = run.method().implementation().sample(&mut sampling)?;
    sampling.watch.dump("latent", &latent)?;
    let (reused, evaluations) = (sampling.reused, sampling.evaluated);
    let computed = run.cache().map(|_| Computed { computed: evaluations - reused, evaluations });
    if let Some(computed) = computed {
        sampling.watch.begin(Event::Cached(computed))?;
    }
    sampling.watch.begin(Event::Decode)?;
    let images = run.method().implementation().decode(&mut sampling, &latent)?;
    for (index, image) in images.iter().enumerate() {
        sampling.watch.dump_of(index, "image", image)?;
        check_finite(image, || "the decoded picture".into())?;
    }
    Ok((images, computed))
}

impl<'a> Sampling<'a> {
    pub fn run(&self) -> &'a Run {
        self.run
    }

    /// Sets the schedule of every stage; `adapt` may change what the sampler makes of each step.
    ///
    /// # Errors
    /// Those of the observer.
    pub fn prepare(
        &mut self,
        schedulers: Vec<Scheduler>,
        adapt: impl Fn(StepCoefficients) -> StepCoefficients,
    ) -> Result<()> {
        // A stage knows no evaluations of the one before.
        let of_stage = |(range, scheduler): (&Range<usize>, &Scheduler)| {
            let evaluations = scheduler.evaluations(range.clone());
            let after =
                |next: usize| evaluations.get(next).map_or((1.0, 0.0), |next| scheduler.noise_level(next.level));
            let levels = (1..=evaluations.len()).map(after).map(<[f64; 2]>::from).collect::<Vec<_>>();
            evaluations.into_iter().zip(levels).collect::<Vec<_>>()
        };
        let evaluations: Vec<(Evaluation, [f64; 2])> =
            self.run.ranges().iter().zip(&schedulers).flat_map(of_stage).collect();
        let (evaluations, levels): (Vec<Evaluation>, Vec<[f64; 2]>) = evaluations.into_iter().unzip();
        self.levels = levels;
        let row = |evaluation: &Evaluation| StepRow {
            input_scale: evaluation.input_scale,
            coefficients: adapt(evaluation.coefficients),
        };
        self.rows = evaluations.iter().map(row).collect();
        self.timesteps = evaluations.iter().map(|evaluation| evaluation.timestep).collect();
        self.evaluations = evaluations;
        self.schedulers = schedulers;
        self.dump_tables()
    }

    /// Sets the shifts that attention's windows have, `[steps, C]` of each picture ([`choose`](Sampling::choose)), in the order
    /// in which the network executes those of a step. All evaluations of a step have the same.
    pub fn shift_windows(&mut self, pictures: &[Vec<i64>], columns: usize) {
        let mut values = Vec::new();
        let mut step = 0;
        for evaluation in &self.evaluations {
            let of = |picture: &Vec<i64>| picture[step * columns..(step + 1) * columns].to_vec();
            values.extend(pictures.iter().flat_map(of).map(|shift| shift as u32));
            step += usize::from(evaluation.ends_step);
        }
        self.window_shifts = Some((columns, values));
    }

    pub fn scheduler(&self, stage: usize) -> &Scheduler {
        &self.schedulers[stage]
    }

    /// Pictures of the batch.
    pub fn images(&self) -> usize {
        self.noise.seeds().len()
    }

    pub fn sample_shape(&self, size: Size) -> [usize; 4] {
        self.model.sample_shape(size)
    }

    /// The samples that the first stage begins with.
    ///
    /// # Errors
    /// Those of the device.
    pub fn initial_noise(&mut self, size: Size) -> Result<Tensor> {
        let noise = self.draw(self.model.sample_shape(size))?;
        match self.schedulers[0].init_noise_sigma() {
            1.0 => Ok(noise),
            sigma => ops::scale_cast(&noise, sigma as f32, 0.0, DType::F32, 1),
        }
    }

    /// All steps of stage `index`, from `x` on: the last samples and the clean samples of the last step.
    /// `prediction_at`: what each step of the stage, counted from 0, asks of the network.
    ///
    /// # Errors
    /// [`Error::Interrupted`]; [`Error::NonFinite`], naming the stage; those of the model.
    pub fn stage(
        &mut self,
        index: usize,
        x: Tensor,
        prediction_at: &dyn Fn(usize) -> Prediction,
    ) -> Result<(Tensor, Tensor)> {
        self.revised_stage(index, x, prediction_at, &mut |_, _, _| Ok(None))
    }

    /// The same, where `revise` may put other clean samples in the place of those that a step (from 0) found: the step is
    /// then what it is for a network that predicts these. For samplers of one evaluation per step that keep nothing of earlier
    /// ones ([`Run::check_revisable`]).
    ///
    /// # Errors
    /// As [`stage`](Sampling::stage); those of `revise`.
    pub fn revised_stage(
        &mut self,
        index: usize,
        x: Tensor,
        prediction_at: &dyn Fn(usize) -> Prediction,
        revise: &mut Revise,
    ) -> Result<(Tensor, Tensor)> {
        let (model, stages) = (self.model, self.run.stages());
        let (Stage { size, parts, .. }, steps) = (stages[index], self.run.ranges()[index].len());
        let (known, channels, maps) = (self.known.take(), self.channels.take(), self.attention_maps.take());
        self.watch.begin(Event::Condition { stage: index })?;
        let channels = match channels {
            None => self.lowres(index)?,
            channels => channels,
        };
        let key = StepKey { repaints: known.is_some(), ..self.key(size) };
        let guidance = self.guidance(key.sample[0]);
        let split = self.frequency_split(index, guidance.as_deref());
        let key = StepKey { split: split.as_ref().map(|split| split.grid), ..key };
        let guidance = guidance.map(|scales| Guidance::new(model.device(), &scales)).transpose()?;
        let told = self.run.method().implementation().told_size(self.run, index);
        let second = self.low.as_ref().map(|low| low.all_timesteps(&self.timesteps));
        let timesteps = second.as_ref().unwrap_or(&self.timesteps);
        let run = self.run;
        let prediction_at = &|step: usize| prediction_at(step).with_control(run.controls_at(index, step));
        let pictures = model.control_pictures(index, size)?;
        let begin = |reuse| {
            let mut denoiser = begin_controlled(model, told, timesteps, &pictures, reuse)?;
            match &channels {
                None => {}
                Some(channels) => denoiser.set_channels(channels)?,
            }
            if let Some(maps) = &maps {
                let [_, h, w, _] = key.sample;
                denoiser.reuse_attention_maps(maps, [h, w], prediction_at(0).attention_maps().flat)?;
            }
            Ok(denoiser)
        };
        let window_shifts = self.window_shifts.as_ref().map(|(_, values)| values.as_slice());
        let (rows, first) = (&self.rows, self.evaluated);
        let (known_here, low) = (known.as_ref(), self.low.as_ref());
        let inputs =
            StageInputs { x, rows, first, window_shifts, guidance, known: known_here, low, split: split.as_ref() };
        let mut on_device = model.recorded_steps().begin(&key, inputs, &begin)?;
        self.watch.begin(Event::StageBegins { stage: index, stages: stages.len(), size, steps, parts })?;
        let mut clean = None;
        let range = self.run.ranges()[index].clone();
        let mut cache = self.run.cache().map(|cache| cache.begin(&self.schedulers[index], range));
        for step in 1..=steps {
            let mut cache = cache.as_mut();
            loop {
                self.watch.check_cancelled()?;
                let Evaluation { draws_noise, ends_step, .. } = self.evaluations[self.evaluated];
                if draws_noise {
                    self.draw_for_step(key.sample, on_device.noise_mut())?;
                }
                // Of a step with two evaluations the first alone: the second one's samples are none of the run's.
                let mut cache = cache.take();
                let work = match &mut cache {
                    Some(cache) => cache.work(step - 1, &on_device)?,
                    None => StepWork::Compute(Caching::Off),
                };
                let asked = match work {
                    StepWork::Compute(caching) => {
                        model.recorded_steps().step(&mut on_device, &prediction_at(step - 1), caching)?;
                        caching != Caching::Reuse
                    }
                    StepWork::Predicted(x0) => {
                        on_device.step_to_clean(&x0)?;
                        false
                    }
                };
                self.reused += usize::from(!asked);
                if let Some(cache) = cache {
                    cache.evaluated(asked, &on_device)?;
                }
                self.evaluated += 1;
                if ends_step {
                    break;
                }
            }
            if let Some(x0) = revise(self, step - 1, on_device.state().x0())? {
                let k = &self.rows[self.evaluated - 1].coefficients;
                debug_assert!(k.kept.is_none() && k.clip.is_none() && k.x0_from_e != 0.0);
                on_device.revise(&x0, k.next_from_x0 + k.next_from_e / k.x0_from_e)?;
            }
            if let Some(known) = known.as_ref().filter(|_| step == steps) {
                clean = Some(known.in_place_of(on_device.state().x0())?);
            }
            self.step_done(index, step, on_device.state().x())?;
        }
        if steps > 0 && prediction_at(steps - 1).attention_maps().collect {
            self.attention_maps = on_device.denoiser().attention_maps();
        }
        let (x, x0) = (on_device.state().x().clone(), clean.unwrap_or_else(|| on_device.state().x0().clone()));
        model.recorded_steps().end(key, on_device);
        let done = self.done;
        check_finite(&x0, || format!("stage {} ({size}), the clean sample after step {done}", index + 1))?;
        Ok((x, x0))
    }

    /// All steps of stage `index`, from `x` on, over views of its map: the last samples. `options_at` as in
    /// [`stage`](Sampling::stage).
    ///
    /// # Errors
    /// [`Error::Interrupted`]; [`Error::NonFinite`], naming the stage; those of the model.
    pub fn view_stage(
        &mut self,
        index: usize,
        x: Tensor,
        views: &ViewStage,
        options_at: &dyn Fn(usize) -> UnetOptions,
    ) -> Result<Tensor> {
        Ok(self.viewed(index, x, views, options_at, false)?.0)
    }

    /// The same with the clean samples of the last step, the means over views as the samples are.
    ///
    /// # Errors
    /// As [`view_stage`](Sampling::view_stage).
    pub fn clean_view_stage(
        &mut self,
        index: usize,
        x: Tensor,
        views: &ViewStage,
        options_at: &dyn Fn(usize) -> UnetOptions,
    ) -> Result<(Tensor, Tensor)> {
        self.viewed(index, x, views, options_at, true)
    }

    /// `clean`: else the second samples are the first.
    fn viewed(
        &mut self,
        index: usize,
        x: Tensor,
        views: &ViewStage,
        options_at: &dyn Fn(usize) -> UnetOptions,
        clean: bool,
    ) -> Result<(Tensor, Tensor)> {
        let (model, stages) = (self.model, self.run.stages());
        let (Stage { size, parts, .. }, steps) = (stages[index], self.run.ranges()[index].len());
        self.watch.begin(Event::Condition { stage: index })?;
        let key = ViewKey::new(self.key(size), views);
        let range = self.evaluated..self.evaluated + steps;
        let begin = ViewBegin { x, rows: &self.rows, range, guidance: self.guidance(key.step.sample[0]) };
        let told = self.run.method().implementation().told_size(self.run, index);
        let pictures = model.control_pictures(index, size)?;
        let denoiser = |reuse| begin_controlled(model, told, &self.timesteps, &pictures, reuse);
        let mut on_device = model.recorded_steps().begin_views(&key, &begin, views, &denoiser)?;
        drop(begin);
        let mut before = None;
        self.watch.begin(Event::StageBegins { stage: index, stages: stages.len(), size, steps, parts })?;
        for step in 1..=steps {
            let check = || self.watch.check_cancelled();
            if clean && step == steps {
                before = Some(on_device.x().duplicate()?);
            }
            let options = UnetOptions { control: self.run.controls_at(index, step - 1), ..options_at(step - 1) };
            on_device.step(step - 1, views, &options, model.recorded_steps(), &check)?;
            self.evaluated += 1;
            self.step_done(index, step, on_device.x())?;
        }
        let x = on_device.x().clone();
        model.recorded_steps().end_views(key, on_device);
        let x0 = match before {
            None => x.clone(),
            Some(before) => {
                let [from_before, from_after] = clean_weights(&self.rows[self.evaluated - 1].coefficients);
                ops::add_noise(&before, &x, from_before, from_after)?
            }
        };
        let done = self.done;
        check_finite(&x0, || format!("stage {} ({size}), the samples after step {done}", index + 1))?;
        Ok((x, x0))
    }

    /// What a step of a stage of this size depends on.
    fn key(&self, size: Size) -> StepKey {
        StepKey {
            sample: self.model.sample_shape(size),
            conditioning: self.model.conditioning_key(),
            rows: self.rows.len(),
            rescales: self.run.guidance().map(|scales| scales.iter().any(|scale| scale.rescale != 0.0)),
            adds_noise: self.rows.iter().any(|row| row.coefficients.next_from_noise != 0.0),
            thresholding: self.run.scheduler().thresholding(),
            window_shifts: self.window_shifts.as_ref().map(|(columns, _)| *columns),
            repaints: false,
            low_scale: self.low.as_ref().map(|low| low.scale),
            split: None,
        }
    }

    /// Every stage from now on is guided by this scale in place of the run's. Without guidance in the run it has no effect.
    pub fn set_guidance_scale(&mut self, scale: f32) {
        self.guidance_scale = Some(scale);
    }

    /// The network is called a second time in the evaluations of every stage from now on that ask for it
    /// ([`Prediction::Upsampled`]).
    pub fn set_low_resolution(&mut self, low: LowResolution) {
        debug_assert_eq!(low.evaluations.len(), self.evaluations.len());
        self.low = Some(low);
    }

    /// How the guidance of stage `index` is split by frequency: as the run says.
    fn frequency_split(&self, index: usize, guidance: Option<&[GuidanceScale]>) -> Option<FrequencySplit> {
        let (high, grid) = (self.run.guidance_high()?, self.run.guidance_grid(index)?);
        let factors = guidance?.iter().map(|low| high / low.scale).collect();
        Some(FrequencySplit { grid, factors })
    }

    /// Of each of `images` pictures.
    fn guidance(&self, images: usize) -> Option<Vec<GuidanceScale>> {
        let mut scales = match self.run.guidance()? {
            &[one] => vec![one; images],
            scales => scales.to_vec(),
        };
        if let Some(scale) = self.guidance_scale {
            scales.iter_mut().for_each(|own| own.scale = scale);
        }
        Some(scales)
    }

    /// Step `step` (from 1) of stage `index` is done.
    pub(super) fn step_done(&mut self, index: usize, step: usize, x: &Tensor) -> Result<()> {
        self.done += 1;
        let (run_step, run_steps) = (self.done, self.run.steps());
        let name = self.run.method().implementation().step_name(index, step, run_step);
        self.watch.dump(&name, x)?;
        let stage_steps = self.run.ranges()[index].len();
        let progress = StepProgress { stage: index, step, stage_steps, run_step, run_steps };
        tell(self.watch.observer, &Event::Step(progress));
        Ok(())
    }

    /// # Errors
    /// [`Error::Interrupted`](crate::Error::Interrupted)
    pub(super) fn check_cancelled(&self) -> Result<()> {
        self.watch.check_cancelled()
    }

    /// The pictures as they are before their last phase, `phase` from 1.
    ///
    /// # Errors
    /// Those of the observer.
    pub fn phase(&mut self, phase: usize, pictures: &[Tensor]) -> Result<()> {
        self.watch.phase(phase, pictures)
    }

    /// A step's draw: into the place that the step reads, or, where no step of the run reads one, drawn for the order of
    /// draws alone.
    fn draw_for_step(&mut self, shape: [usize; 4], to: Option<&mut Tensor>) -> Result<()> {
        let Some(to) = to else {
            return self.draw(shape).map(drop);
        };
        self.noise.normal_into(to)?;
        self.watch.dump(&format!("noise{}", self.draws), to)?;
        self.draws += 1;
        Ok(())
    }

    /// The next draw, `[N, h, w, C]`.
    ///
    /// # Errors
    /// Those of the device.
    pub fn draw(&mut self, shape: [usize; 4]) -> Result<Tensor> {
        let noise = self.noise.normal(shape)?;
        self.watch.dump(&format!("noise{}", self.draws), &noise)?;
        self.draws += 1;
        Ok(noise)
    }

    /// Whole numbers of `shape` for each picture of the batch, row-major: those that the run was given under `name`, else those
    /// that `draw` gives for the picture's seed. Shown to the observer under the same name.
    ///
    /// # Errors
    /// [`Error::Request`](crate::Error::Request): what was given has another shape or values that are not allowed, or lacks the
    /// name; those of the observer.
    pub fn choose(
        &mut self,
        name: &str,
        shape: &[usize],
        allowed: RangeInclusive<i64>,
        draw: &mut dyn FnMut(u64) -> Vec<i64>,
    ) -> Result<Vec<Vec<i64>>> {
        let chosen = per_picture(&self.noise.seeds(), self.run.choices().whole(name, shape, &allowed)?, draw);
        for (index, values) in chosen.iter().enumerate() {
            debug_assert_eq!(values.len(), shape.iter().product::<usize>(), "{name}");
            self.watch.dump_choice(index, name, shape, values)?;
        }
        Ok(chosen)
    }

    /// The same of f32.
    ///
    /// # Errors
    /// As [`choose`](Sampling::choose).
    pub fn choose_f32(
        &mut self,
        name: &str,
        shape: &[usize],
        allowed: RangeInclusive<f32>,
        draw: &mut dyn FnMut(u64) -> Vec<f32>,
    ) -> Result<Vec<Vec<f32>>> {
        let chosen = per_picture(&self.noise.seeds(), self.run.choices().real(name, shape, &allowed)?, draw);
        for (index, values) in chosen.iter().enumerate() {
            debug_assert_eq!(values.len(), shape.iter().product::<usize>(), "{name}");
            self.watch.dump_values_of(index, name, shape, values)?;
        }
        Ok(chosen)
    }

    /// The pictures of clean samples, one by one: a batch needs no more memory than one picture.
    ///
    /// # Errors
    /// Those of the model.
    pub fn decode(&mut self, x0: &Tensor) -> Result<Vec<Tensor>> {
        let (model, observer) = (self.model, &mut *self.watch.observer);
        images(x0)?.iter().map(|x0| model.decode(x0, &mut |message| observer.warning(message))).collect()
    }

    /// The clean samples of pictures: the posterior's mode, or with `noise` a sample of it.
    ///
    /// # Errors
    /// Those of the model.
    pub fn encode(&mut self, pictures: &[Tensor], noise: Option<&Tensor>) -> Result<Tensor> {
        let noise = noise.map(images).transpose()?;
        let (model, observer) = (self.model, &mut *self.watch.observer);
        let of = |(i, picture)| {
            let noise = noise.as_ref().map(|noise| &noise[i]);
            model.encode(picture, noise, &mut |message| observer.warning(message))
        };
        Tensor::concat(&pictures.iter().enumerate().map(of).collect::<Result<Vec<_>>>()?)
    }

    /// Clean samples of one picture for every image of the batch, each with its own `noise`, `[N, h, w, C]`; without, all alike.
    ///
    /// # Errors
    /// Those of the model.
    pub fn encode_once(&mut self, picture: &Tensor, noise: Option<&Tensor>) -> Result<Tensor> {
        let (model, observer) = (self.model, &mut *self.watch.observer);
        let encoded = model.encode(picture, noise, &mut |message| observer.warning(message))?;
        match noise {
            Some(_) => Ok(encoded),
            None => Tensor::concat(&vec![encoded; self.images()]),
        }
    }

    /// The draw for a sample of a posterior, of a stage's size; `None`: the model has none.
    ///
    /// # Errors
    /// Those of the device.
    pub(super) fn posterior_noise(&mut self, shape: [usize; 4]) -> Result<Option<Tensor>> {
        match self.model.has_posterior() {
            true => self.draw(shape).map(Some),
            false => Ok(None),
        }
    }

    /// What a network reads of the picture that it enlarges in stage `index`: with fresh noise, dumped as `cond<index>`.
    fn lowres(&mut self, index: usize) -> Result<Option<Tensor>> {
        let size = self.run.stages()[index].size;
        let Some(NoisedPicture { pictures, signal, sigma }) = self.model.lowres(size)? else { return Ok(None) };
        let noise = self.draw(self.sample_shape(size))?;
        let noised = ops::add_noise(&pictures, &noise, signal as f32, sigma as f32)?;
        self.dump(&format!("cond{index}"), &noised)?;
        Ok(Some(noised))
    }

    /// A phase begins.
    ///
    /// # Errors
    /// [`Error::Interrupted`]
    pub fn begin(&mut self, event: Event) -> Result<()> {
        self.watch.begin(event)
    }

    /// Shows the observer an intermediate tensor of every image of the batch.
    ///
    /// # Errors
    /// Those of the observer.
    pub fn dump(&mut self, name: &str, x: &Tensor) -> Result<()> {
        self.watch.dump(name, x)
    }

    /// The same of a tensor per image.
    ///
    /// # Errors
    /// Those of the observer.
    pub fn dump_each(&mut self, name: &str, tensors: &[Tensor]) -> Result<()> {
        tensors.iter().enumerate().try_for_each(|(index, x)| self.watch.dump_of(index, name, x))
    }

    fn dump_tables(&mut self) -> Result<()> {
        let images = self.model.sample_shape(self.run.stages()[0].size)[0];
        let timesteps = self.schedulers[0].timesteps();
        self.watch.dump_values(images, "timesteps", &[timesteps.len()], timesteps.iter().copied())?;
        let flows: Option<Vec<&[f64]>> = self.schedulers.iter().map(Scheduler::flow_sigmas).collect();
        let (name, tables) = match flows {
            Some(sigmas) => ("sigmas", sigmas),
            None => ("alpha_bar", self.schedulers.iter().map(Scheduler::alphas_cumprod).collect()),
        };
        let shape = [tables.len(), tables[0].len()];
        self.watch.dump_values(images, name, &shape, tables.into_iter().flatten().map(|&value| value as f32))
    }
}

/// A stage's denoiser, told the pictures that its ControlNets read.
fn begin_controlled(
    model: &dyn DiffusionModel,
    size: Size,
    timesteps: &[f32],
    pictures: &[Tensor],
    reuse: Option<Box<dyn Denoiser>>,
) -> Result<Box<dyn Denoiser>> {
    let mut denoiser = model.begin_stage(size, timesteps, reuse)?;
    if !pictures.is_empty() {
        denoiser.set_control_pictures(pictures)?;
    }
    Ok(denoiser)
}

/// The weights of the samples before and after a step in its clean samples. Without a bound the step is linear in the
/// samples and the network's output e, so that means over views of the former are means of the latter:
/// x0 = a x + b e and x' = c x + d e + f x0, so e = (x' - (c + f a) x) / (d + f b).
fn clean_weights(k: &StepCoefficients) -> [f32; 2] {
    let [a, b, c, d, f] = [k.x0_from_x, k.x0_from_e, k.next_from_x, k.next_from_e, k.next_from_x0].map(f64::from);
    let from_after = b / (d + f * b);
    [a - from_after * (c + f * a), from_after].map(|weight| weight as f32)
}

/// What is given, for every picture, else what is drawn for each one's seed.
fn per_picture<T: Clone>(seeds: &[u64], given: Option<&[T]>, draw: &mut dyn FnMut(u64) -> Vec<T>) -> Vec<Vec<T>> {
    seeds.iter().map(|&seed| given.map_or_else(|| draw(seed), <[T]>::to_vec)).collect()
}

/// The images of a batch, `[1, ...]` each, sharing its memory.
pub fn images(x: &Tensor) -> Result<Vec<Tensor>> {
    let n = x.shape().first().copied().unwrap_or(0);
    (0..n).map(|i| x.rows(i..i + 1)).collect()
}
