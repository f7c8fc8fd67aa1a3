//! DemoFusion (Du et al., CVPR 2024, arXiv:2311.16973): phases of growing size, each of which enlarges the latents of the one
//! before, noises them and runs the whole schedule again.
//!
//! Phase 1 is plain sampling at the trained size; phase s has s times its sides. With z0 the enlarged latents, z'_t = z0 noised
//! to t by one draw, and per step at timestep t of T = 1000
//! ```text
//! k  = (1 + cos(pi (T - t) / T)) / 2;   c1 = k^a1;  c2 = k^a2;  c3 = 0.99 k^a3 + 0.01
//! z  = (1 - c1) z + c1 z'_t                                          skip residual, sec. 3.2
//! zl = mean over windows of step(window of z)                        MultiDiffusion, windows jittered in every step
//! zg = step(each dilated sample of z), the network reading samples of G(z)        dilated sampling, sec. 3.4
//! z  = (1 - c2) zl + c2 zg
//! ```
//! G is a Gaussian of 2 s - 1 taps and deviation sigma c3 cells, standardised back to the mean and deviation of z. After its
//! last step a phase's latents get the mean and the deviation of phase 1's.
//!
//! Where paper and published code differ, the code is followed: (T - t) / T with T = 1000 whatever the steps, 2 s - 1 taps
//! rather than 4 s - 3, the deviation's lower end 0.01 sigma. Unlike there, the network always reads its input at the noise
//! level of the step ([`reference_compat`](DemoFusion::reference_compat)), any deterministic sampler will do, statistics are
//! those of f32, and a phase's noise is the next draw of the picture's one generator.
//!
//! SDXL is told the final size as original and target, in phase 1 too; of a window, where it lies in the map with a border of
//! the largest jitter around it.
//!
//! From a picture phase 1 is one of the others, of scale 1: the picture at its size, encoded, takes the place of the enlarged latents
//! of the phase before, and its mean and deviation those of phase 1's. Where the picture is larger than the trained size, windows are
//! of that size, and the dilated samples about as many, along a side, as the phase's longer side is times the trained one.
//!
//! Draws: phase 1's first noise, from a picture its posterior's; then one noise per phase of the others. `jitter<s>`: of a generator of its own, per step and window the
//! column's offset, then the row's; none along an axis that the window spans.

use serde::{Deserialize, Serialize};

use super::method::{GenerationMethod, MethodSpec, OptionKind, OptionSpec, from_options};
use super::views::{
    DEFAULT_VIEW_BATCH, Progressive, STRIDE, SkipResidual, VIEW_BATCH, ViewStage, check_sampler, window_starts,
};
use super::{Event, Geometry, Method, Prediction, Run, Sampling, Size, Stage, check_size};
use crate::error::{Error, Result};
use crate::models::UnetOptions;
use crate::ops::{self, PatchLayout, Upsampler};
use crate::rng::PythonRandom;
use crate::runtime::Tensor;
use crate::schedulers::{Sampler, SchedulerConfig};

pub static DEMOFUSION: MethodSpec = MethodSpec {
    name: "demofusion",
    summary: "phases of growing size over windows and dilated samples of the map (arXiv:2311.16973)",
    relays: true,
    choices: &["jitter"],
    options: &[
        STRIDE,
        COSINE,
        SIGMA,
        VIEW_BATCH,
        OptionSpec {
            name: "phases",
            heading: HEADING,
            value_name: "",
            help: "Write the picture of every phase as well\n\n\
                   That of phase 1 beside picture.png is picture-phase1.png; each costs a decode.",
            kind: OptionKind::Switch,
        },
        OptionSpec {
            name: "reference_compat",
            heading: HEADING,
            value_name: "",
            help: "Do as the published code does where it differs from the paper",
            kind: OptionKind::Switch,
        },
    ],
    parse: |given| from_options(DemoFusion::default(), given),
};

const HEADING: &str = "DemoFusion";

/// Relays with parts have it too.
pub(super) const COSINE: OptionSpec = OptionSpec {
    name: "cosine",
    heading: HEADING,
    value_name: "A1,A2,A3",
    help: "Exponents of the cosine factors: skip residual, dilated samples, blur (default: 3,1,1)",
    kind: OptionKind::Numbers {
        count: 3,
        least: 0.0,
        most: 1e6,
        expected: "expected three numbers from 0 with commas, like 3,1,1",
    },
};

/// Relays with parts have it too.
pub(super) const SIGMA: OptionSpec = OptionSpec {
    name: "sigma",
    heading: HEADING,
    value_name: "X",
    help: "Standard deviation of the blur of dilated samples at the beginning, in cells (default: 0.8)",
    kind: OptionKind::Number { above: 0.0, most: 100.0, expected: "expected a number above 0, like 0.8" },
};

/// Progressive upscaling: Du et al., CVPR 2024, arXiv:2311.16973.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DemoFusion {
    /// Cells from one window to the next; `None`: half a window.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stride: Option<usize>,
    /// alpha_1 to alpha_3.
    pub cosine: [f64; 3],
    /// Cells.
    pub sigma: f64,
    /// Views of a picture at once.
    pub view_batch: usize,
    /// Is the picture of every phase decoded and shown?
    pub phases: bool,
    /// The published code's input scaling, with Euler: in phases 2 and later the first group of windows of a step reads its
    /// input at the step's noise level (in the first step without a scale), all others, and the dilated samples, at the
    /// next step's.
    pub reference_compat: bool,
}

impl Default for DemoFusion {
    fn default() -> DemoFusion {
        DemoFusion {
            stride: None,
            cosine: [3.0, 1.0, 1.0],
            sigma: 0.8,
            view_batch: DEFAULT_VIEW_BATCH,
            phases: false,
            reference_compat: false,
        }
    }
}

impl From<DemoFusion> for Method {
    fn from(options: DemoFusion) -> Method {
        Method::of(&DEMOFUSION, options)
    }
}

/// c1, c2, c3 at a timestep, of `training_steps`.
pub fn cosine_factors(timestep: f64, training_steps: f64, [a1, a2, a3]: [f64; 3]) -> [f64; 3] {
    let k = 0.5 * (1.0 + (std::f64::consts::PI * (training_steps - timestep) / training_steps).cos());
    [k.powf(a1), k.powf(a2), 0.99 * k.powf(a3) + 0.01]
}

/// 2 s - 1 taps of a Gaussian of standard deviation `sigma`, of sum 1.
pub fn gaussian_taps(scale: usize, sigma: f64) -> Vec<f64> {
    let middle = scale as f64 - 1.0;
    let taps: Vec<f64> = (0..2 * scale - 1).map(|j| (-((j as f64 - middle) / sigma).powi(2) / 2.0).exp()).collect();
    let sum: f64 = taps.iter().sum();
    taps.iter().map(|tap| tap / sum).collect()
}

/// Sizes of the phases of a picture whose longer side is `phases` times a phase 1's, in multiples of `multiple` pixels.
pub fn phase_sizes(size: Size, phases: usize, multiple: usize) -> Vec<Size> {
    let (long, short) = (size.width.max(size.height), size.width.min(size.height));
    let of_phase = |phase: usize| {
        let long_side = long / phases * phase;
        let whole = |side: usize| side / multiple * multiple;
        let (long_side, short_side) = (whole(long_side), whole(long_side * short / long));
        if size.width >= size.height { Size::new(long_side, short_side) } else { Size::new(short_side, long_side) }
    };
    (1..=phases).map(of_phase).collect()
}

/// Windows along one axis: where each begins without jitter, and between which offsets it is jittered; none where it spans the
/// axis.
struct Axis {
    starts: Vec<usize>,
    jitter: Vec<Option<[i64; 2]>>,
}

impl Axis {
    fn new(length: usize, window: usize, stride: usize, reach: i64) -> Axis {
        let starts = window_starts(length, window, stride);
        let jitter = starts.iter().map(|&start| match (start == 0, start + window >= length) {
            (true, true) => None,
            (true, false) => Some([-reach, 0]),
            (false, true) => Some([0, reach]),
            (false, false) => Some([-reach, reach]),
        });
        Axis { jitter: jitter.collect(), starts }
    }
}

/// The windows of a map, row by row.
pub struct JitteredWindows {
    rows: Axis,
    columns: Axis,
    /// Rows and columns of each.
    pub size: [usize; 2],
    /// r, the largest offset.
    pub reach: usize,
}

impl JitteredWindows {
    /// Of a map of `map` rows and columns.
    pub fn new(map: [usize; 2], window: usize, stride: usize) -> JitteredWindows {
        let reach = window.saturating_sub(stride) / 4;
        let [rows, columns] = map.map(|length| Axis::new(length, window, stride, reach as i64));
        JitteredWindows { rows, columns, size: map.map(|length| length.min(window)), reach }
    }

    pub fn count(&self) -> usize {
        self.rows.starts.len() * self.columns.starts.len()
    }

    /// Row and column of window `index` among the windows along each axis.
    fn at(&self, index: usize) -> [usize; 2] {
        [index / self.columns.starts.len(), index % self.columns.starts.len()]
    }

    /// The offsets of one step, column and row of each window; `draw`: from one number to another.
    pub fn draw(&self, draw: &mut dyn FnMut(i64, i64) -> i64) -> Vec<i64> {
        let mut offsets = Vec::with_capacity(2 * self.count());
        for index in 0..self.count() {
            let [row, column] = self.at(index);
            for allowed in [self.columns.jitter[column], self.rows.jitter[row]] {
                offsets.push(allowed.map_or(0, |[low, high]| draw(low, high)));
            }
        }
        offsets
    }

    /// The first offset of a step that its window does not allow: its place, and from what to what it may be.
    pub fn misplaced(&self, offsets: &[i64]) -> Option<(usize, [i64; 2])> {
        let allowed = |place: usize| {
            let [row, column] = self.at(place / 2);
            let of_axis = if place.is_multiple_of(2) { self.columns.jitter[column] } else { self.rows.jitter[row] };
            of_axis.unwrap_or([0, 0])
        };
        let places = (0..offsets.len()).map(|place| (place, allowed(place)));
        places.into_iter().find(|&(place, [low, high])| !(low..=high).contains(&offsets[place]))
    }

    /// Row and column of every window with these offsets.
    pub fn origins(&self, offsets: &[i64]) -> Vec<[i32; 2]> {
        let of = |(index, offset): (usize, &[i64])| {
            let [row, column] = self.at(index);
            [self.rows.starts[row] as i64 + offset[1], self.columns.starts[column] as i64 + offset[0]]
                .map(|at| at as i32)
        };
        offsets.chunks_exact(2).enumerate().map(of).collect()
    }
}

/// The offsets of every picture's windows in the steps of phase or stage `number` (from 1): `[steps, windows, 2]`, chosen as
/// `jitter<number>`. `generators`: one per picture, which goes on from phase to phase.
///
/// # Errors
/// [`Error::Request`]: what was given in their place does not fit.
fn jitter(
    sampling: &mut Sampling,
    windows: &JitteredWindows,
    number: usize,
    steps: usize,
    generators: &mut Vec<PythonRandom>,
) -> Result<Vec<Vec<i64>>> {
    let (name, count, reach) = (format!("jitter{number}"), windows.count(), windows.reach as i64);
    let mut next = 0;
    let jitter = sampling.choose(&name, &[steps, count, 2], -reach..=reach, &mut |seed| {
        if generators.len() == next {
            generators.push(PythonRandom::new(seed));
        }
        let generator = &mut generators[next];
        next += 1;
        (0..steps).flat_map(|_| windows.draw(&mut |low, high| generator.randint(low, high))).collect()
    })?;
    for (jitter, step) in jitter.iter().flat_map(|jitter| (0..steps).map(move |step| (jitter, step))) {
        let offsets = of_step(jitter, step, count);
        if let Some((place, [low, high])) = windows.misplaced(offsets) {
            let reason = format!(
                "the {} of window {} in step {} is {}, expected {low} to {high}: outer windows move outward",
                if place % 2 == 0 { "column" } else { "row" },
                place / 2,
                step + 1,
                offsets[place]
            );
            return Err(Error::Request { field: "choices", value: name, reason });
        }
    }
    Ok(jitter)
}

/// The offsets of one step's `count` windows.
fn of_step(jitter: &[i64], step: usize, count: usize) -> &[i64] {
    &jitter[step * 2 * count..][..2 * count]
}

/// Cells of a map from one cell of a dilated sample to the next, so that the sample is about as large as a window.
fn dilated_scale([height, width]: [usize; 2], window: usize) -> usize {
    ((height.max(width) as f64 / window as f64).round() as usize).max(1)
}

impl DemoFusion {
    /// Cells of a window's sides, which are those of the longer side of phase 1, from a picture at most the trained ones, and
    /// the stride.
    fn window(&self, run: &Run) -> (usize, usize) {
        let longer = |size: Size| (size.width.max(size.height) / run.factor()).max(1);
        let (first, trained) = (longer(run.stages()[0].size), run.native().map(longer));
        let window = trained.filter(|_| run.start().is_some()).map_or(first, |trained| first.min(trained));
        (window, self.stride.unwrap_or((window / 2).max(1)))
    }

    /// Phase `phase` (from 1) from the latents `before` on, which it enlarges: its latents before they get the mean and the
    /// deviation of the first phase's.
    fn phase(
        &self,
        sampling: &mut Sampling,
        phase: usize,
        before: &Tensor,
        generators: &mut Vec<PythonRandom>,
    ) -> Result<Tensor> {
        let run = sampling.run();
        let (index, (window, stride)) = (phase - 1, self.window(run));
        let Stage { size, steps, .. } = run.stages()[index];
        let shape = sampling.sample_shape(size);
        let [images, height, width, _] = shape;
        let base = match phase {
            1 => before.clone(),
            _ => {
                sampling.begin(Event::RelayUpsample { stage: index })?;
                ops::resize(before, [height, width], Upsampler::BicubicTorch, None, None)?
            }
        };
        let noise = sampling.draw(shape)?;
        let range = run.ranges()[index].clone();
        let levels: Vec<(f64, f64)> = range.clone().map(|step| run.scheduler().noise_level(step)).collect();
        let x = ops::add_noise(&base, &noise, levels[0].0 as f32, levels[0].1 as f32)?;

        let windows = JitteredWindows::new([height, width], window, stride);
        let count = windows.count();
        let jitter = jitter(sampling, &windows, phase, steps, generators)?;

        let scale = dilated_scale([height, width], window);
        let training_steps = run.scheduler().alphas_cumprod().len() as f64;
        let evaluations = run.scheduler().evaluations(range);
        let factors: Vec<[f64; 3]> = evaluations
            .iter()
            .map(|evaluation| cosine_factors(f64::from(evaluation.timestep), training_steps, self.cosine))
            .collect();
        let skip = |([c1, ..], (signal, sigma)): (&[f64; 3], &(f64, f64))| {
            [1.0 - c1, c1 * signal, c1 * sigma].map(|factor| factor as f32)
        };
        let taps = |[_, _, c3]: &[f64; 3]| {
            gaussian_taps(scale, self.sigma * c3).into_iter().map(|tap| tap as f32).collect::<Vec<f32>>()
        };
        let scales: Vec<f32> = evaluations.iter().map(|evaluation| evaluation.input_scale).collect();
        // sigma_T = 0: a scale of 1.
        let own = [[&[1.0], &scales[1..]].concat(), [&scales[1..], &[1.0]].concat()];
        let views = ViewStage {
            windows: PatchLayout { map: [height, width], size: windows.size, stride: 1, wraps: false },
            count,
            origins: &|step| jitter.iter().flat_map(|jitter| windows.origins(of_step(jitter, step, count))).collect(),
            view_batch: self.view_batch,
            crops: Some(windows.reach as i32),
            sides: run.sides(),
            progressive: Some(Progressive {
                skip: Some(SkipResidual { base, noise, factors: factors.iter().zip(&levels).map(skip).collect() }),
                dilated: factors.iter().map(|[_, c2, _]| *c2 as f32).collect(),
                scale,
                taps: factors.iter().map(taps).collect(),
                input_scales: self.reference_compat.then_some(own),
            }),
        };
        debug_assert_eq!(jitter.len(), images);
        sampling.view_stage(index, x, &views, &|_| UnetOptions::default())
    }

    /// Windows of a relay's stage as [`window`](DemoFusion::window): those of the trained size, where it is known.
    fn stage_window(&self, run: &Run) -> (usize, usize) {
        let Some(native) = run.native() else { return self.window(run) };
        let window = (native.width.max(native.height) / run.factor()).max(1);
        (window, self.stride.unwrap_or((window / 2).max(1)))
    }

    /// Stage `index` (from 0) of a relay, from the samples `x` on: jittered windows and dilated samples, without the skip
    /// residual and the standardisation that tie a phase to the one before it. The last samples and the clean ones. The stage's
    /// longer side is about as many times the trained one as a dilated sample has cells of the map from one cell to the next.
    ///
    /// The cosine factors run from the stage's first step to its last as over a whole schedule: with steps a to b of n, in place
    /// of t stands T - (T - t - T a/n) n/(b - a), which is t where the stage has all steps.
    ///
    /// # Errors
    /// As [`Sampling::stage`]; [`Error::Request`] of choices that do not fit.
    pub(super) fn stage_of_relay(
        &self,
        sampling: &mut Sampling,
        index: usize,
        x: Tensor,
        options: &UnetOptions,
        generators: &mut Vec<PythonRandom>,
    ) -> Result<(Tensor, Tensor)> {
        let run = sampling.run();
        let (window, stride) = self.stage_window(run);
        let [_, height, width, _] = sampling.sample_shape(run.stages()[index].size);
        let range = run.ranges()[index].clone();
        let windows = JitteredWindows::new([height, width], window, stride);
        let count = windows.count();
        let jitter = jitter(sampling, &windows, index + 1, range.len(), generators)?;

        let scale = dilated_scale([height, width], window);
        let all = run.scheduler().alphas_cumprod().len() as f64;
        let scheduled = run.scheduler().timesteps().len() as f64;
        let (begin, share) = (all * range.start as f64 / scheduled, range.len() as f64 / scheduled);
        let of_stage = |timestep: f64| (all - (all - timestep - begin) / share).clamp(0.0, all);
        let evaluations = run.scheduler().evaluations(range);
        let factors = evaluations
            .iter()
            .map(|evaluation| cosine_factors(of_stage(f64::from(evaluation.timestep)), all, self.cosine));
        let factors: Vec<[f64; 3]> = factors.collect();
        let taps = |[_, _, c3]: &[f64; 3]| {
            gaussian_taps(scale, self.sigma * c3).into_iter().map(|tap| tap as f32).collect::<Vec<f32>>()
        };
        let views = ViewStage {
            windows: PatchLayout { map: [height, width], size: windows.size, stride: 1, wraps: false },
            count,
            origins: &|step| jitter.iter().flat_map(|jitter| windows.origins(of_step(jitter, step, count))).collect(),
            view_batch: self.view_batch,
            crops: Some(windows.reach as i32),
            sides: run.sides(),
            progressive: Some(Progressive {
                skip: None,
                dilated: factors.iter().map(|[_, c2, _]| *c2 as f32).collect(),
                scale,
                taps: factors.iter().map(taps).collect(),
                input_scales: None,
            }),
        };
        sampling.clean_view_stage(index, x, &views, &|_| options.clone())
    }

    /// # Errors
    /// [`Error::Request`]: a stride that leaves gaps between windows of `window` cells, no views at once, factors that are none.
    pub(super) fn check_options(&self, (window, stride): (usize, usize)) -> Result<()> {
        let refuse = |field, value: String, reason: String| Err(Error::Request { field, value, reason });
        if stride == 0 || stride > window {
            let reason = format!("windows of {window} cells cover the picture with a stride of 1 to {window}");
            return refuse("stride", stride.to_string(), reason);
        }
        if self.view_batch == 0 {
            return refuse("view_batch", "0".into(), "expected at least 1".into());
        }
        if !(self.sigma > 0.0 && self.sigma.is_finite()) {
            return refuse("sigma", self.sigma.to_string(), "expected a number above 0".into());
        }
        if self.cosine.iter().any(|exponent| !(*exponent >= 0.0 && exponent.is_finite())) {
            return refuse("cosine", format!("{:?}", self.cosine), "expected three numbers from 0".into());
        }
        Ok(())
    }

    /// The same for a relay's stage.
    ///
    /// # Errors
    /// As [`check_options`](DemoFusion::check_options).
    pub(super) fn check_stage_of_relay(&self, run: &Run) -> Result<()> {
        self.check_options(self.stage_window(run))
    }

    fn show(&self, sampling: &mut Sampling, phase: usize, x: &Tensor) -> Result<()> {
        sampling.dump(&format!("phase{phase}.latent"), x)?;
        if self.phases && phase < sampling.run().stages().len() {
            let pictures = sampling.decode(x)?;
            sampling.phase(phase, &pictures)?;
        }
        Ok(())
    }
}

impl GenerationMethod for DemoFusion {
    fn steps_over_views(&self) -> bool {
        true
    }

    /// The model's own where its steps are deterministic and know no earlier ones, else Euler, the published pipeline's.
    fn sampler(&self, config: &SchedulerConfig) -> Sampler {
        match config.sampler() {
            own @ (Sampler::Ddim | Sampler::Euler | Sampler::FlowEuler) => own,
            _ => Sampler::Euler,
        }
    }

    fn default_size(&self, native: Size) -> Size {
        native.times(2)
    }

    /// A phase for each multiple of the trained side up to the picture's longer side.
    fn stages(&self, geometry: &Geometry) -> Result<Vec<Stage>> {
        let &Geometry { size, native, sides, steps, .. } = geometry;
        let multiple = sides.multiple();
        check_size("size", size, multiple)?;
        let refuse = |reason: String| Err(Error::Request { field: "size", value: size.to_string(), reason });
        let (long, base) = (size.width.max(size.height), native.width.max(native.height));
        if !long.is_multiple_of(base) {
            let below = (long / base).max(1) * base;
            let reason = format!(
                "the longer side must be a multiple of {base}, which the model was trained at, like {below} or {}",
                below + base
            );
            return refuse(reason);
        }
        let (phases, short) = (long / base, size.width.min(size.height));
        if short < phases * multiple {
            let reason =
                format!("the shorter side must be at least {}, a cell in each of {phases} phases", phases * multiple);
            return refuse(reason);
        }
        Ok(phase_sizes(size, phases, multiple).into_iter().map(|size| Stage::new(size, steps)).collect())
    }

    /// Every phase runs the whole schedule.
    fn ranges(&self, stages: &[Stage]) -> Vec<std::ops::Range<usize>> {
        stages.iter().map(|stage| 0..stage.steps).collect()
    }

    /// As many phases as the final side is times the picture's, or the trained one where that is larger; fewer where they
    /// would have no whole cells.
    fn stages_from_picture(&self, geometry: &Geometry, picture: Size) -> Result<Vec<Stage>> {
        let &Geometry { size, native, sides, steps, .. } = geometry;
        let multiple = sides.multiple();
        check_size("size", size, multiple)?;
        let longer = |size: Size| size.width.max(size.height);
        let fits = |phases: &usize| {
            longer(size).is_multiple_of(phases * multiple) && size.width.min(size.height) >= phases * multiple
        };
        let most = longer(size) / longer(picture).max(longer(native));
        let phases = (1..=most).rev().find(fits).unwrap_or(1);
        Ok(phase_sizes(size, phases, multiple).into_iter().map(|size| Stage::new(size, steps)).collect())
    }

    /// Every phase runs the whole schedule.
    fn default_strength(&self, _repaints: bool) -> f64 {
        1.0
    }

    fn enlarging_strength(&self) -> f64 {
        1.0
    }

    fn told_size(&self, run: &Run, _stage: usize) -> Size {
        run.last_stage().size
    }

    /// That of phase 1, as the published code has it.
    fn original_beside_controls(&self, run: &Run) -> Option<Size> {
        Some(run.stages()[0].size)
    }

    fn step_name(&self, stage: usize, step: usize, _run_step: usize) -> String {
        format!("phase{}.step{step}", stage + 1)
    }

    fn check(&self, run: &Run) -> Result<()> {
        let refuse = |field, value: String, reason: String| Err(Error::Request { field, value, reason });
        let (stages, last) = (run.stages(), run.last_stage());
        let phases = stages.len();
        let multiple = run.sides().multiple();
        let planned = phase_sizes(last.size, phases, multiple);
        let steps = stages.iter().all(|stage| stage.steps == last.steps);
        let whole = last.size.width.max(last.size.height).is_multiple_of(phases * multiple);
        if !steps || !whole || stages.iter().map(|stage| stage.size).ne(planned.iter().copied()) {
            let planned: Vec<String> = planned.iter().map(|size| format!("{size}:{}", last.steps)).collect();
            let reason = format!(
                "demofusion's phases are 1, 2, 3 and so on times the first one's size, of as many steps each, like {}; \
                 leave request.stages out and name the request.size",
                planned.join(",")
            );
            return refuse("stages", run.stages_text(), reason);
        }
        self.check_options(self.window(run))?;
        if self.reference_compat && run.scheduler().sampler() != Sampler::Euler {
            let value = format!("with request.scheduler {}", run.scheduler().sampler());
            return refuse("reference_compat", value, "the published code of DemoFusion samples with euler".into());
        }
        if run.start().is_some_and(|start| start.step > 0) {
            let reason =
                "every phase runs the whole schedule, and the picture takes the place of phase 1's; expected 1";
            return refuse("strength", "below 1".into(), reason.into());
        }
        check_sampler(run)
    }

    /// The last phase's latents.
    fn sample(&self, sampling: &mut Sampling) -> Result<Tensor> {
        let stages = sampling.run().stages();
        sampling.prepare(vec![sampling.run().scheduler().clone(); stages.len()], |coefficients| coefficients)?;
        let mut generators = Vec::new();
        let (mut x, first) = match sampling.start_samples(0)? {
            Some(picture) => (picture, 1),
            None => {
                let noise = sampling.initial_noise(stages[0].size)?;
                let (x, _) = sampling.stage(0, noise, &|_| Prediction::default())?;
                sampling.begin(Event::PhaseEnds { stage: 0 })?;
                self.show(sampling, 1, &x)?;
                (x, 2)
            }
        };
        let anchor = ops::latent_moments(&x, 0)?;
        for phase in first..=stages.len() {
            let last = self.phase(sampling, phase, &x, &mut generators)?;
            sampling.begin(Event::PhaseEnds { stage: phase - 1 })?;
            x = ops::standardise_latents(&last, &ops::latent_moments(&last, 0)?, &anchor)?;
            self.show(sampling, phase, &x)?;
        }
        Ok(x)
    }
}
