//! Stages with parts: what the steps of one stage of a relay do beside the relay's own ([`StageParts`]).
//!
//! | part | what the stage's steps do | options |
//! |---|---|---|
//! | `+raunet` | HiDiffusion's deep blocks at the trained size, in the shares t1 and t2 of the stage's steps | `raunet`, `t1`, `t2`, `aggressive` |
//! | `+windows` | HiDiffusion's self-attention in windows | `windows` |
//! | `+hidiffusion` | both | |
//! | `+dilation` | MegaFusion's dilation, in these stages alone | `dilation` |
//! | `+crops` | MultiDiffusion's windows of the trained size, averaged | `window`, `stride`, `view_batch` |
//! | `+demofusion` | DemoFusion's jittered windows and dilated samples, mixed | `stride`, `view_batch`, `cosine` (the first is not read), `sigma` |
//!
//! A part whose options switch it off leaves the stage's bits as they are without it. `+crops` with one window over the whole map
//! is a stage without it. The thresholds of `+raunet` count the stage's own steps, those that are made. The network sees no more
//! than the trained size in crops, so parts for maps that are larger (`+raunet`, `+windows`) do not go with `+crops` and
//! `+demofusion`.
//!
//! Draws, beside the relay's: `shifts<k>` of stage k (from 1) with `+windows`, which go on where those of the stage before end;
//! `jitter<k>` with `+demofusion`, in the same way. Either comes from a generator of its own, as in the methods.

use serde::{Deserialize, Serialize};

use super::demofusion::{COSINE, SIGMA};
use super::hidiffusion::{AGGRESSIVE, RAUNET, SHIFTS, Schedule, T1, T2, WINDOWS, drawn_shifts};
use super::method::OptionSpec;
use super::multidiffusion::WINDOW;
use super::views::{STRIDE, VIEW_BATCH, check_sampler};
use super::{DemoFusion, HiDiffusion, MultiDiffusion, Run, Sampling, Stage, StageParts};
use crate::error::{Error, Result};
use crate::models::UnetOptions;
use crate::rng::PythonRandom;
use crate::runtime::Tensor;

/// The options of parts that a method does not read itself; `None`: the default of the method that the part is from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PartOptions {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub raunet: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub windows: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub t1: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub t2: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aggressive: Option<bool>,
    /// Cells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<usize>,
    /// Cells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stride: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub view_batch: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cosine: Option<[f64; 3]>,
    /// Cells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sigma: Option<f64>,
}

/// In the order of the struct's fields.
const OPTIONS: [OptionSpec; 10] = [RAUNET, WINDOWS, T1, T2, AGGRESSIVE, WINDOW, STRIDE, VIEW_BATCH, COSINE, SIGMA];

/// A method's own options, then those of parts, `ALL` together.
pub const fn with_parts<const OWN: usize, const ALL: usize>(own: &[OptionSpec; OWN]) -> [OptionSpec; ALL] {
    assert!(ALL == OWN + OPTIONS.len());
    let mut all = [OPTIONS[0]; ALL];
    let mut i = 0;
    while i < ALL {
        all[i] = if i < OWN { own[i] } else { OPTIONS[i - OWN] };
        i += 1;
    }
    all
}

/// Parts that need nothing of the method.
pub const OF_ANY_METHOD: StageParts = StageParts::HIDIFFUSION.and(VIEWS);

/// What is drawn for parts besides noise.
pub const CHOICES: &[&str] = &[SHIFTS, "jitter"];

const VIEWS: StageParts = StageParts::CROPS.and(StageParts::DEMOFUSION);

/// The parts that read an option of this name.
pub fn part_of(option: &str) -> Option<StageParts> {
    match option {
        "raunet" | "t1" | "t2" | "aggressive" => Some(StageParts::RAUNET),
        "windows" => Some(StageParts::WINDOWS),
        "window" => Some(StageParts::CROPS),
        "stride" | "view_batch" => Some(VIEWS),
        "cosine" | "sigma" => Some(StageParts::DEMOFUSION),
        _ => None,
    }
}

/// Which stages read what `parts` do, as an error goes on.
pub fn readers(parts: StageParts) -> String {
    let each = [StageParts::RAUNET, StageParts::WINDOWS, StageParts::CROPS, StageParts::DEMOFUSION];
    let names = each.into_iter().filter(|&part| parts.contains(part)).map(|part| part.to_string());
    format!(", and a stage with {} in request.stages", names.collect::<Vec<_>>().join(" or "))
}

impl PartOptions {
    /// HiDiffusion as far as a stage has its parts.
    fn hidiffusion(&self, parts: StageParts) -> HiDiffusion {
        let usual = HiDiffusion::default();
        let raunet = parts.contains(StageParts::RAUNET);
        HiDiffusion {
            raunet: raunet && self.raunet.unwrap_or(usual.raunet),
            windows: parts.contains(StageParts::WINDOWS) && self.windows.unwrap_or(usual.windows),
            t1: self.t1.filter(|_| raunet),
            t2: self.t2.filter(|_| raunet),
            aggressive: self.aggressive.filter(|_| raunet),
        }
    }

    fn multidiffusion(&self) -> MultiDiffusion {
        let usual = MultiDiffusion::default();
        MultiDiffusion {
            window: self.window,
            stride: self.stride,
            view_batch: self.view_batch.unwrap_or(usual.view_batch),
            ..usual
        }
    }

    fn demofusion(&self) -> DemoFusion {
        let usual = DemoFusion::default();
        DemoFusion {
            stride: self.stride,
            cosine: self.cosine.unwrap_or(usual.cosine),
            sigma: self.sigma.unwrap_or(usual.sigma),
            view_batch: self.view_batch.unwrap_or(usual.view_batch),
            ..usual
        }
    }

    /// # Errors
    /// [`Error::Request`]: parts that do not go together, an option or a sampler that does not go with them, a mask with views,
    /// choices that no stage draws; [`Error::Config`]: a network that `+raunet` and `+windows` do not know.
    pub(super) fn check(&self, run: &Run) -> Result<()> {
        let parts_of_run = run.stages().iter().fold(StageParts::NONE, |all, stage| all.and(stage.parts));
        for (index, stage) in run.stages().iter().enumerate() {
            let refuse = |reason: String| Err(Error::Request { field: "stages", value: stage.to_string(), reason });
            let (views, whole) = (stage.parts.only(VIEWS), stage.parts.only(StageParts::HIDIFFUSION));
            if views == VIEWS {
                return refuse("+crops and +demofusion both lay windows over the map; leave one of them out".into());
            }
            if !views.is_empty() && !whole.is_empty() {
                return refuse(format!(
                    "{whole} is for maps larger than the trained size, and with {views} the network sees none; leave one of \
                     them out"
                ));
            }
            if stage.parts.contains(StageParts::CROPS) {
                self.multidiffusion().check_windows(run, stage.size)?;
            }
            if stage.parts.contains(StageParts::DEMOFUSION) {
                self.demofusion().check_stage_of_relay(run)?;
            }
            if !whole.is_empty() {
                self.hidiffusion(whole).check_options()?;
                run.model().map_or(Ok(()), |model| self.hidiffusion(whole).schedule(model, run, index).map(drop))?;
            }
        }
        if parts_of_run.intersects(VIEWS) {
            let views = parts_of_run.only(VIEWS);
            let refuse =
                |field, value: &str, reason: String| Err(Error::Request { field, value: value.into(), reason });
            check_sampler(run)?;
            let evaluations = run.scheduler().evaluations(0..run.scheduler().timesteps().len());
            if evaluations.iter().any(|evaluation| evaluation.coefficients.clip.is_some()) {
                let reason =
                    "the model's scheduler bounds clean samples (clip_sample), and the mean over views has none";
                return refuse("stages", &run.stages_text(), reason.into());
            }
            if run.start().is_some_and(|start| start.repaints) {
                let reason = format!("a stage with {views} keeps no part of a picture; leave the part or the mask out");
                return refuse("mask", "with request.stages", reason);
            }
        }
        if !run.choices().is_empty() && !parts_of_run.intersects(StageParts::WINDOWS.and(StageParts::DEMOFUSION)) {
            let (value, reason) =
                (run.choices().source(), "no stage has +windows or +demofusion, which draw something");
            return Err(Error::Request { field: "choices", value, reason: reason.into() });
        }
        Ok(())
    }

    /// The stages of a run that begins now, after [`Sampling::prepare`]: draws what their parts draw for the whole run.
    ///
    /// # Errors
    /// [`Error::Config`]: the run says nothing of its model; [`Error::Request`]: choices that do not fit.
    pub(super) fn begin(&self, sampling: &mut Sampling) -> Result<Composition<'_>> {
        let run = sampling.run();
        let mut schedules = Vec::new();
        for (index, stage) in run.stages().iter().enumerate() {
            let whole = stage.parts.only(StageParts::HIDIFFUSION);
            schedules.push(match whole.is_empty() {
                true => None,
                false => {
                    let model = run.model();
                    let model = model.ok_or_else(|| Error::config("stages", "the run says nothing of its model"))?;
                    Some(self.hidiffusion(whole).schedule(model, run, index)?)
                }
            });
        }
        let columns = schedules.iter().flatten().map(|schedule| schedule.windows).max().unwrap_or(0);
        if columns > 0 {
            // One row of every picture per step of the run; steps of other stages do not read theirs.
            let mut shifts: Vec<Vec<i64>> = Vec::new();
            let mut drawn = 0;
            for (index, (schedule, range)) in schedules.iter().zip(run.ranges()).enumerate() {
                let (steps, count) = (range.len(), range.len() * columns);
                let of_stage = match schedule {
                    Some(schedule) if schedule.windows > 0 && steps > 0 => {
                        let name = format!("{SHIFTS}{}", index + 1);
                        let mut draw = |seed| drawn_shifts(seed, drawn, count);
                        let chosen = sampling.choose(&name, &[steps, columns], 0..=3, &mut draw)?;
                        drawn += count;
                        chosen
                    }
                    _ => vec![vec![0; count]; sampling.images()],
                };
                shifts.resize_with(of_stage.len(), Vec::new);
                shifts.iter_mut().zip(of_stage).for_each(|(all, of_stage)| all.extend(of_stage));
            }
            sampling.shift_windows(&shifts, columns);
        }
        Ok(Composition { options: self, schedules, generators: Vec::new() })
    }
}

/// The stages of a run on its way.
pub struct Composition<'a> {
    options: &'a PartOptions,
    /// Of HiDiffusion's parts, by stage.
    schedules: Vec<Option<Schedule>>,
    /// Of DemoFusion's windows, one per picture.
    generators: Vec<PythonRandom>,
}

impl Composition<'_> {
    /// All steps of stage `index` with its parts, from `x` on: the last samples and the clean samples of the last step.
    /// `options`: what the method itself asks of the network in this stage.
    ///
    /// # Errors
    /// As [`Sampling::stage`]; [`Error::Request`]: choices that do not fit.
    pub(super) fn stage(
        &mut self,
        sampling: &mut Sampling,
        index: usize,
        x: Tensor,
        options: &UnetOptions,
    ) -> Result<(Tensor, Tensor)> {
        let run = sampling.run();
        let Stage { size, parts, .. } = run.stages()[index];
        if parts.contains(StageParts::DEMOFUSION) {
            let demofusion = self.options.demofusion();
            return demofusion.stage_of_relay(sampling, index, x, options, &mut self.generators);
        }
        if parts.contains(StageParts::CROPS) {
            let multidiffusion = self.options.multidiffusion();
            let windows = multidiffusion.windows(run, size)?;
            if !windows.is_whole() {
                let images = x.shape()[0];
                return multidiffusion.with_views(&windows, images, run.sides(), |views| {
                    sampling.clean_view_stage(index, x, views, &|_| options.clone())
                });
            }
        }
        let schedule = self.schedules[index].as_ref();
        let options_at = |step| match schedule {
            Some(schedule) => UnetOptions { mid_dilation: options.mid_dilation, ..schedule.at(step) },
            None => options.clone(),
        };
        sampling.stage(index, x, &|step| options_at(step).into())
    }
}
