use std::ops::Range;

use super::{Choices, Method, MethodSpec, Sides, Size, Stage, StageParts, Start, StepCache, base_size, check_size};
use crate::error::{Error, Result};
use crate::models::{ControlOptions, UnetConfig};
use crate::names::one_of;
use crate::ops::GuidanceScale;
use crate::schedulers::{Evaluation, Scheduler};

/// A run, fully decided and checked: what a method makes pictures by.
#[derive(Clone, Debug)]
pub struct Run {
    method: Method,
    stages: Vec<Stage>,
    /// Of each stage.
    ranges: Vec<Range<usize>>,
    scheduler: Scheduler,
    guidance: Option<Vec<GuidanceScale>>,
    /// Scale of guidance's high band; `None`: what the method says.
    guidance_high: Option<f32>,
    published: PublishedSchedule,
    choices: Choices,
    start: Option<Start>,
    cache: Option<StepCache>,
    controls: Vec<ControlShares>,
    sides: Sides,
    native: Option<Size>,
    model: Option<ModelFacts>,
}

/// The steps in which a ControlNet is on, as shares of all steps that the run makes of its schedule: those that begin at `start` or later
/// and end at `end` or earlier.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ControlShares {
    pub start: f64,
    pub end: f64,
}

/// How a step sees ControlNets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ControlUse {
    /// As the UNet sees the samples.
    Whole,
    /// With samples resized to this height and width, in cells ([`ControlOptions::map`]).
    Resized([usize; 2]),
    /// Not at all.
    Off,
}

/// What a method may know of the model beforehand, to choose its defaults and to refuse what the network has no place for.
#[derive(Clone, Debug)]
pub struct ModelFacts {
    /// As it is called: a directory, a file, or a name of the hub.
    pub name: String,
    /// Was it distilled to a few steps?
    pub distilled: bool,
    /// Of a model whose network is a UNet.
    pub unet: Option<UnetConfig>,
}

impl ModelFacts {
    /// Are its samples pixels (DeepFloyd IF)?
    pub fn is_of_pixels(&self) -> bool {
        self.unet.as_ref().is_some_and(UnetConfig::is_of_pixels)
    }

    /// Most methods are made for latents.
    ///
    /// # Errors
    /// [`Error::Request`]: the method does not run over this model's pixels.
    pub fn check_method(&self, method: &Method) -> Result<()> {
        if !self.is_of_pixels() || method.implementation().takes_pixels() {
            return Ok(());
        }
        let names = MethodSpec::names(|method| method.implementation().takes_pixels());
        let reason = format!("is for models over latents, and {} is over pixels; choose {}", self.name, one_of(&names));
        Err(Error::Request { field: "method", value: method.to_string(), reason })
    }
}

/// What MegaFusion's published code has for the models of a family, whatever their sizes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PublishedSchedule {
    /// gamma of the base schedule: its default argument `reschedule_res` is 768, which is a size of SD's and none of SDXL's.
    pub base_gamma: f64,
    /// Sides of the squares that get gamma 1, 2.25 and 4.
    pub sides: [usize; 3],
}

impl PublishedSchedule {
    /// SDM-MegaFusion.
    pub const SD: PublishedSchedule = PublishedSchedule { base_gamma: 2.25, sides: [512, 768, 1024] };
    /// SDXL-MegaFusion.
    pub const SDXL: PublishedSchedule = PublishedSchedule { base_gamma: 1.0, sides: [1024, 1536, 2048] };

    /// gamma of a stage's size, if the published code has one for it.
    pub fn gamma(&self, size: Size) -> Option<f64> {
        let at = self.sides.iter().position(|&side| (size.width, size.height) == (side, side))?;
        Some([1.0, 2.25, 4.0][at])
    }
}

impl Run {
    /// * `stages`: at least one
    /// * `scheduler`: the base schedule, with [`Method::scheduled_steps`]
    /// * `guidance`: classifier-free guidance scale of every picture; `None`: the model has no unconditional rows
    /// * `sides`: what every side is made of; a number is the pixels per latent cell of a network that sees any number of them
    ///
    /// # Errors
    /// [`Error::Request`], naming the field: no stage, a stage without steps, several stages for a method that has one,
    /// sides that are not made of it; what the method's own check says of its options.
    pub fn new(
        method: Method,
        stages: Vec<Stage>,
        scheduler: Scheduler,
        guidance: Option<f32>,
        sides: impl Into<Sides>,
    ) -> Result<Run> {
        Run::for_native(method, stages, scheduler, guidance, sides, None)
    }

    /// The same with the size that the model was trained at, if it is known.
    ///
    /// # Errors
    /// As [`new`](Run::new).
    pub fn for_native(
        method: Method,
        stages: Vec<Stage>,
        scheduler: Scheduler,
        guidance: Option<f32>,
        sides: impl Into<Sides>,
        native: Option<Size>,
    ) -> Result<Run> {
        let sides = sides.into();
        let guidance = guidance.map(|scale| vec![GuidanceScale { scale, rescale: 0.0 }]);
        let ranges = method.implementation().ranges(&stages);
        let (published, choices) = (PublishedSchedule::SD, Choices::default());
        let (start, cache, model, controls) = (None, None, None, Vec::new());
        let mut run = Run {
            method,
            stages,
            ranges,
            scheduler,
            guidance,
            guidance_high: None,
            published,
            choices,
            start,
            cache,
            controls,
            sides,
            native,
            model,
        };
        let refuse = |reason: String| Err(Error::Request { field: "stages", value: run.stages_text(), reason });
        if run.stages.is_empty() || run.stages.iter().any(|stage| stage.steps == 0) {
            return refuse("expected at least one stage, and one step in each".into());
        }
        if run.stages.len() > 1 && !run.method.spec().relays {
            return refuse(format!("the {} method has one stage; use request.method megafusion", run.method));
        }
        for stage in &run.stages {
            check_size("stages", stage.size, sides.multiple())?;
            let beyond = stage.parts.without(run.method.implementation().parts());
            if !beyond.is_empty() {
                let names = MethodSpec::names(|method| method.implementation().parts().contains(beyond));
                return refuse(format!("{} has no stages with {beyond}; choose {}", run.method, one_of(&names)));
            }
        }
        let (steps, scheduled) = (run.method.scheduled_steps(&run.stages), run.scheduler.timesteps().len());
        if steps != scheduled {
            return refuse(format!(
                "the stages ask for {steps} steps, the scheduler has {scheduled}; they must be equal"
            ));
        }
        run.scheduler = run.method.implementation().schedule(run.scheduler.clone(), &run)?;
        run.method.implementation().check(&run)?;
        Ok(run)
    }

    /// With another family's published schedule; without it SD's.
    pub fn published_as(self, published: PublishedSchedule) -> Run {
        Run { published, ..self }
    }

    /// Of this model. Without it a method that asks something of the network makes no picture.
    ///
    /// # Errors
    /// [`Error::Request`], [`Error::Config`]: what the method's check says of its options and the model.
    pub fn of_model(self, model: ModelFacts) -> Result<Run> {
        let run = Run { model: Some(model), ..self };
        run.check_pixels()?;
        run.method.implementation().check(&run)?;
        Ok(run)
    }

    /// Most methods, the parts of stages and what changes guidance and steps are made for latents.
    fn check_pixels(&self) -> Result<()> {
        let Some(model) = self.model.as_ref().filter(|model| model.is_of_pixels()) else { return Ok(()) };
        model.check_method(&self.method)?;
        let parts = self.stages.iter().fold(StageParts::NONE, |all, stage| all.and(stage.parts));
        let beyond = parts.without(StageParts::DILATION);
        if !beyond.is_empty() {
            let reason = format!("stages with {beyond} are for models over latents, and {} is over pixels", model.name);
            return Err(Error::Request { field: "stages", value: self.stages_text(), reason });
        }
        let given = [
            ("cache", self.cache.as_ref().map(|cache| cache.kind().to_string())),
            ("guidance_high", self.guidance_high.map(|scale| scale.to_string())),
        ];
        if let Some((field, value)) = given.into_iter().find_map(|(field, value)| Some((field, value?))) {
            let reason = format!("is for models over latents, and {} is over pixels; leave it out", model.name);
            return Err(Error::Request { field, value, reason });
        }
        Ok(())
    }

    /// With what is given in place of the method's own draws.
    ///
    /// # Errors
    /// [`Error::Request`]: the method draws nothing.
    pub fn with_choices(self, choices: Choices) -> Result<Run> {
        choices.check(self.method.spec())?;
        Ok(Run { choices, ..self })
    }

    /// With a cache of steps; `None`: every step is computed.
    ///
    /// # Errors
    /// [`Error::Request`]: the method's steps cannot be left out.
    pub fn with_cache(self, cache: Option<StepCache>) -> Result<Run> {
        cache.as_ref().map_or(Ok(()), |cache| cache.check(&self))?;
        Ok(Run { cache, ..self })
    }

    /// With ControlNets.
    pub fn with_controls(self, controls: Vec<ControlShares>) -> Run {
        Run { controls, ..self }
    }

    pub fn has_controls(&self) -> bool {
        !self.controls.is_empty()
    }

    /// The ControlNets of step `step` (from 0) of a stage. A relay's stages share one schedule, and a phase of DemoFusion runs a whole
    /// one: what counts is the step's place in the schedule.
    pub fn controls_at(&self, stage: usize, step: usize) -> ControlOptions {
        let made = || self.ranges.iter().filter(|range| !range.is_empty());
        let (Some(first), Some(end)) = (made().map(|r| r.start).min(), made().map(|r| r.end).max()) else {
            return ControlOptions::default();
        };
        let (i, steps) = ((self.ranges[stage].start + step - first) as f64, (end - first) as f64);
        let is_on = |shares: &ControlShares| i / steps >= shares.start && (i + 1.0) / steps <= shares.end;
        let bits = self.controls.iter().enumerate().filter(|(_, shares)| is_on(shares)).map(|(index, _)| 1 << index);
        let on = bits.fold(0, |on, bit: u32| on | bit);
        match self.method.implementation().control_use(self, stage, i / steps) {
            _ if on == 0 => ControlOptions::default(),
            ControlUse::Off => ControlOptions::default(),
            ControlUse::Whole => ControlOptions { on, map: None },
            ControlUse::Resized(map) => ControlOptions { on, map: Some(map) },
        }
    }

    pub fn cache(&self) -> Option<&StepCache> {
        self.cache.as_ref()
    }

    /// With another scale for what of guidance a smaller map does not hold ([`FrequencySplit`](super::FrequencySplit)); `None`:
    /// as the method does.
    ///
    /// # Errors
    /// [`Error::Request`]: there is no guidance, no stage in which it can be split, or it is rescaled.
    pub fn with_guidance_high(self, high: Option<f32>) -> Result<Run> {
        let run = Run { guidance_high: high.or(self.guidance_high), ..self };
        let refuse = |value: String, reason: String| Err(Error::Request { field: "guidance_high", value, reason });
        if let Some(high) = high {
            if !(high.is_finite() && high >= 0.0) {
                return refuse(high.to_string(), "expected a number from 0; request.guidance is usual".into());
            }
            if run.guidance().is_none() {
                let reason = "has no effect without guidance; expected a request.guidance above 1";
                return refuse(high.to_string(), reason.into());
            }
            let views = |stage: &Stage| stage.parts.intersects(StageParts::CROPS.and(StageParts::DEMOFUSION));
            if !run.method.implementation().splits_guidance() || run.stages.iter().any(views) {
                let reason = "guidance is split over whole maps, and steps of this run see patches of theirs; choose another \
                              request.method, and stages without +crops and +demofusion";
                return refuse(high.to_string(), reason.into());
            }
            if (0..run.stages.len()).all(|stage| run.guidance_grid(stage).is_none()) {
                let stages = run.stages_text();
                let reason =
                    format!("has no effect: no stage of {stages} is larger than what the model was trained at");
                return refuse(high.to_string(), reason);
            }
        }
        let rescale =
            run.guidance().and_then(|scales| scales.iter().map(|scale| scale.rescale).find(|&phi| phi != 0.0));
        match (run.guidance_high(), rescale) {
            (Some(high), Some(rescale)) => Err(Error::Request {
                field: "guidance_rescale",
                value: rescale.to_string(),
                reason: format!(
                    "goes back to the contrast of one prediction, and guidance is split by frequency here \
                                 (request.guidance_high {high}); leave one of the two out"
                ),
            }),
            _ => Ok(run),
        }
    }

    /// Scale of guidance's high band, where guidance is split.
    pub fn guidance_high(&self) -> Option<f32> {
        self.guidance.as_ref()?;
        self.guidance_high.or_else(|| self.method.implementation().guidance_high(self))
    }

    /// Height and width in cells of what guidance's low band fits in a stage that is split where guidance is.
    pub fn guidance_grid(&self, stage: usize) -> Option<[usize; 2]> {
        self.method.implementation().guidance_grid(self, stage)
    }

    /// Height and width of a picture's map, in cells.
    pub fn cells(&self, size: Size) -> [usize; 2] {
        [size.height, size.width].map(|side| side / self.factor())
    }

    /// With guidance of its own for each picture of a batch, where there is guidance.
    pub fn with_guidance(self, pictures: Vec<GuidanceScale>) -> Run {
        Run { guidance: self.guidance.map(|_| pictures), ..self }
    }

    pub fn model(&self) -> Option<&ModelFacts> {
        self.model.as_ref()
    }

    /// What is given in place of the method's own draws.
    pub fn choices(&self) -> &Choices {
        &self.choices
    }

    /// From a picture: the steps of the schedule before its own are not made, or where the picture stands in place of the first
    /// stage's those of this stage; stages that have none left are empty.
    ///
    /// # Errors
    /// [`Error::Request`]: the method cannot begin from a picture, or not from one with a mask; no stage follows the first.
    pub fn starting(mut self, start: Start) -> Result<Run> {
        let value = format!("with request.method {}", self.method);
        if !self.method.begins_from_pictures() {
            let names = MethodSpec::names(Method::begins_from_pictures);
            let reason = format!("this method begins with noise; choose {}", one_of(&names));
            return Err(Error::Request { field: "init_image", value, reason });
        }
        if start.repaints && !self.method.takes_masks() {
            let names = MethodSpec::names(Method::takes_masks);
            let reason =
                format!("this method keeps no part of a picture; leave request.mask out, or choose {}", one_of(&names));
            return Err(Error::Request { field: "mask", value, reason });
        }
        match (self.method.in_place_of_first_stage(), &mut self.ranges[..]) {
            (None, ranges) => {
                for range in ranges {
                    range.start = range.start.max(start.step).min(range.end);
                }
            }
            (Some(_), [first, _, ..]) => first.start = first.end,
            (Some(_), _) => {
                let reason = format!(
                    "{} enlarges the picture after the first stage, in whose place it stands, and no other follows; name a \
                     larger request.size, or choose request.method plain",
                    self.method
                );
                return Err(Error::Request { field: "stages", value: self.stages_text(), reason });
            }
        }
        self.start = Some(start);
        self.method.implementation().check(&self)?;
        Ok(self)
    }

    /// Where the run begins, if it begins from a picture.
    pub fn start(&self) -> Option<Start> {
        self.start
    }

    /// The first stage that has steps.
    pub fn first_stage(&self) -> usize {
        self.ranges.iter().position(|range| !range.is_empty()).unwrap_or(0)
    }

    /// The size at which the run's picture is taken, if it begins from one.
    pub fn picture_size(&self) -> Option<Size> {
        let stage = if self.method.in_place_of_first_stage().is_some() { 0 } else { self.first_stage() };
        self.start.map(|_| self.stages[stage].size)
    }

    /// The size of the first stage; where a picture stands in its place, whose size may be any, the trained area in its
    /// proportions.
    pub(super) fn trained_size(&self) -> Size {
        let first = self.stages[0].size;
        match (self.start, self.native) {
            (Some(_), Some(native)) => base_size(first, native, self.sides.multiple()),
            _ => first,
        }
    }

    pub fn published(&self) -> PublishedSchedule {
        self.published
    }

    /// Pixels per latent cell, along a side.
    pub fn factor(&self) -> usize {
        self.sides.factor
    }

    /// What its sides are made of.
    pub fn sides(&self) -> Sides {
        self.sides
    }

    /// The size that the model was trained at, if it is known.
    pub fn native(&self) -> Option<Size> {
        self.native
    }

    pub fn method(&self) -> &Method {
        &self.method
    }

    /// At least one.
    pub fn stages(&self) -> &[Stage] {
        &self.stages
    }

    /// Which of the schedule's steps each stage takes.
    pub fn ranges(&self) -> &[Range<usize>] {
        &self.ranges
    }

    /// Steps of all stages together.
    pub fn steps(&self) -> usize {
        self.ranges.iter().map(Range::len).sum()
    }

    /// The last stage, whose size is the picture's.
    pub fn last_stage(&self) -> Stage {
        self.stages[self.stages.len() - 1]
    }

    /// The base schedule, of which [`ranges`](Run::ranges) says who takes what.
    pub fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }

    /// May a method put other clean samples in the place of a step's ([`Sampling::revised_stage`](super::Sampling::revised_stage))?
    ///
    /// # Errors
    /// [`Error::Request`]: the sampler evaluates the network twice in a step, or keeps what it found in earlier ones; the model
    /// bounds its clean samples.
    pub fn check_revisable(&self) -> Result<()> {
        let evaluations = self.scheduler.evaluations(0..self.scheduler.timesteps().len());
        let single = |evaluation: &Evaluation| evaluation.ends_step && evaluation.coefficients.kept.is_none();
        if !evaluations.iter().all(single) {
            let reason = format!(
                "{} changes what a step finds, so no step may need an earlier one; expected ddim or euler",
                self.method
            );
            return Err(Error::Request { field: "scheduler", value: self.scheduler.sampler().to_string(), reason });
        }
        let bounded = evaluations.iter().any(|evaluation| evaluation.coefficients.clip.is_some());
        if bounded || self.scheduler.thresholding().is_some() {
            let reason = "the model's scheduler bounds its clean samples (clip_sample or thresholding), which this method changes";
            return Err(Error::Request { field: "method", value: self.method.to_string(), reason: reason.into() });
        }
        Ok(())
    }

    /// What the network is told at every evaluation of the run, in order.
    pub fn timesteps(&self) -> Vec<f32> {
        let of_stage = |range: &Range<usize>| self.scheduler.evaluations(range.clone());
        self.ranges.iter().flat_map(of_stage).map(|evaluation| evaluation.timestep).collect()
    }

    /// Classifier-free guidance of each picture of a batch, or one for all; `None`: the model has no unconditional rows.
    pub fn guidance(&self) -> Option<&[GuidanceScale]> {
        self.guidance.as_deref()
    }

    /// `512x512:40,1024x1024:10`
    pub fn stages_text(&self) -> String {
        self.stages.iter().map(Stage::to_string).collect::<Vec<_>>().join(",")
    }
}
