//! Steps over views of a map: each view goes through the network and the sampler on its own, and where views overlap the
//! results are averaged (MultiDiffusion, Bar-Tal et al. 2023, arXiv:2302.08113). Beside windows there may be dilated samples
//! of the whole map and a skip residual (DemoFusion, Du et al. 2024, arXiv:2311.16973).
//!
//! Views are taken in groups. A group is one recorded step: [`gather_patches`](crate::ops::gather_patches) in front of the
//! network, [`step_patches`](crate::ops::step_patches) behind it. Where its views lie and which group it is stands in memory
//! that is written before each replay. The last group of a path may be shorter; it has a recording of its own.

use std::ops::Range;

use super::method::{OptionKind, OptionSpec};
use super::{Denoiser, PatchInput, RecordedSteps, Run, Sides, StepKey, ViewPlaces};
use crate::error::{Error, Result};
use crate::models::UnetOptions;
use crate::ops::{
    self, Guidance, GuidanceScale, PatchLayout, Patches, Restandardised, StepCoefficients, StepRow, StepRows, StepTable,
};
use crate::runtime::{DType, Repeated, Tensor};
use crate::schedulers::Sampler;

/// `view_batch`, of every method with views.
pub const VIEW_BATCH: OptionSpec = OptionSpec {
    name: "view_batch",
    heading: "Views",
    value_name: "N",
    help: "How many views of a picture the network sees at once (default: 16)\n\n\
           Fewer take less memory and more time; the picture is the same.",
    kind: OptionKind::Integer { least: 1, most: 4096, expected: "expected a number of views from 1 to 4096" },
};

/// `stride`
pub const STRIDE: OptionSpec = OptionSpec {
    name: "stride",
    heading: "Views",
    value_name: "N",
    help: "Latent cells from one window to the next (default: an eighth of the window for multidiffusion, half of it for \
           demofusion, three quarters for pixelrush)",
    kind: OptionKind::Integer { least: 1, most: 4096, expected: "expected a number of cells from 1 to 4096" },
};

/// The default of `view_batch`.
pub const DEFAULT_VIEW_BATCH: usize = 16;

/// Where windows of `window` cells begin along an axis of `n`: 0, stride, 2 stride and so on, and the last one where the
/// axis ends. One window of n cells where n <= window. Every cell is in a window if `stride <= window`.
pub fn window_starts(n: usize, window: usize, stride: usize) -> Vec<usize> {
    match n.checked_sub(window) {
        None | Some(0) => vec![0],
        Some(last) => (0..last).step_by(stride.max(1)).chain([last]).collect(),
    }
}

/// Does the run's sampler step each view on its own: no noise, no earlier evaluations, one evaluation per step, no bound that
/// depends on the whole sample?
///
/// # Errors
/// [`Error::Request`], naming the sampler and those that do.
pub fn check_sampler(run: &Run) -> Result<()> {
    let scheduler = run.scheduler();
    let refuse = |field, value: String, reason: &str| Err(Error::Request { field, value, reason: reason.into() });
    if scheduler.thresholding().is_some() {
        let reason = "the model's scheduler bounds each sample by its own values (thresholding), and views have none";
        return refuse("method", run.method().to_string(), reason);
    }
    let draws = scheduler.evaluations(0..scheduler.timesteps().len()).iter().any(|evaluation| evaluation.draws_noise);
    match scheduler.sampler() {
        Sampler::Ddim if draws => refuse("eta", "above 0".into(), "the steps of views draw no noise; expected 0"),
        Sampler::Ddim | Sampler::Euler | Sampler::FlowEuler if !draws => Ok(()),
        sampler => {
            let reason = "the steps of views draw no noise and know no earlier ones; expected ddim or euler";
            refuse("scheduler", sampler.to_string(), reason)
        }
    }
}

/// How the steps of a stage go over views.
pub struct ViewStage<'a> {
    /// All windows of a picture have one shape.
    pub windows: PatchLayout,
    /// Windows of a picture.
    pub count: usize,
    /// Row and column of every window in a step of the stage (from 0), those of the first picture first.
    pub origins: &'a dyn Fn(usize) -> Vec<[i32; 2]>,
    /// Views of a picture that the network sees at once, at most.
    pub view_batch: usize,
    /// Is the network told where each window lies? So many cells are added to its row and column.
    pub crops: Option<i32>,
    pub sides: Sides,
    pub progressive: Option<Progressive>,
}

/// What DemoFusion does in a step beside the windows; factors per step of the stage.
pub struct Progressive {
    pub skip: Option<SkipResidual>,
    /// The share of the dilated samples in a step's result.
    pub dilated: Vec<f32>,
    /// s: cells from one cell of a dilated sample to the next; there are s^2 of them.
    pub scale: usize,
    /// The Gaussian's taps of every step, 2 s - 1 each.
    pub taps: Vec<Vec<f32>>,
    /// Input scales of the first group of windows, then of all others, in place of the step's own.
    pub input_scales: Option<[Vec<f32>; 2]>,
}

/// `x = k0 x + k1 base + k2 noise`, before a step.
pub struct SkipResidual {
    /// The enlarged samples of the phase before.
    pub base: Tensor,
    pub noise: Tensor,
    pub factors: Vec<[f32; 3]>,
}

/// What a recorded step over views depends on, beside the model and the network's options.
#[derive(Clone, Debug, PartialEq)]
pub struct ViewKey {
    pub step: StepKey,
    windows: PatchLayout,
    count: usize,
    view_batch: usize,
    crops: bool,
    /// Scale of the dilated samples.
    scale: Option<usize>,
    skips: bool,
    own_scales: bool,
}

impl ViewKey {
    pub fn new(step: StepKey, stage: &ViewStage) -> ViewKey {
        ViewKey {
            step,
            windows: stage.windows,
            count: stage.count,
            view_batch: stage.view_batch,
            crops: stage.crops.is_some(),
            scale: stage.progressive.as_ref().map(|progressive| progressive.scale),
            skips: stage.progressive.as_ref().is_some_and(|progressive| progressive.skip.is_some()),
            own_scales: stage.progressive.as_ref().is_some_and(|progressive| progressive.input_scales.is_some()),
        }
    }
}

/// Views of one kind, and what their steps add up to.
struct Path {
    patches: Patches,
    /// `[N, h, w, C]`, f32; after the last group the mean.
    sums: Tensor,
}

/// The dilated samples, and what they are read from.
struct Dilated {
    /// Lie on the map itself, beginning in its padding.
    path: Path,
    /// Of these, in the order of [`Patches::place`].
    origins: Vec<[i32; 2]>,
    /// The same of the padded map.
    padded: Patches,
    /// Rows and columns of zeros before the map.
    padding: [usize; 2],
    skip: Option<Skip>,
    /// `[rows, taps]`
    taps: Tensor,
}

/// The skip residual's tensors.
struct Skip {
    base: Tensor,
    noise: Tensor,
    /// `[rows, 3]`
    factors: Tensor,
}

/// A recording of one group.
struct Recording {
    dilated: bool,
    views: usize,
    first: bool,
    options: UnetOptions,
    work: Repeated,
}

/// The steps of a stage over views: all that they read and write, and on a card what was recorded of them.
pub struct ViewSteps {
    denoiser: Box<dyn Denoiser>,
    x: Tensor,
    table: StepTable,
    /// Of the first group of windows, and of all others, where they have input scales of their own.
    scales: Option<[StepTable; 2]>,
    windows: Path,
    dilated: Option<Dilated>,
    /// `[rows, 3]`: x = k0 x + k1 windows + k2 dilated samples, after a step.
    mix: Tensor,
    /// By the views of a group.
    guidance: Vec<(usize, Guidance)>,
    recorded: Vec<Recording>,
    view_batch: usize,
}

/// Everything that a stage begins with.
pub struct ViewBegin<'a> {
    pub x: Tensor,
    pub rows: &'a [StepRow],
    /// The stage's first row, and how many it has.
    pub range: Range<usize>,
    /// Of every picture.
    pub guidance: Option<Vec<GuidanceScale>>,
}

impl ViewSteps {
    /// In fresh memory.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; those of the ops.
    pub fn new(begin: &ViewBegin, stage: &ViewStage, denoiser: Box<dyn Denoiser>) -> Result<ViewSteps> {
        let (device, rows) = (begin.x.device().clone(), begin.rows.len());
        let [images, height, width, _] = begin.x.dims("views", "x")?;
        let shape = begin.x.shape();
        let uninit = |shape: &[usize]| Tensor::uninit(&device, shape, DType::F32);
        let windows = Patches::new(&device, images, stage.count, stage.windows)?;
        let dilated = match &stage.progressive {
            None => None,
            Some(Progressive { scale, skip, .. }) => {
                let (scale, total) = (*scale, scale * scale);
                // So that the network sees whole patches of each.
                let padding = [height, width].map(|n| n.next_multiple_of(scale * stage.sides.patch) - n);
                let padded = [height + padding[0], width + padding[1]];
                let layout = PatchLayout { map: padded, size: padded.map(|n| n / scale), stride: scale, wraps: false };
                let path = Path {
                    patches: Patches::new(&device, images, total, PatchLayout { map: [height, width], ..layout })?,
                    sums: uninit(shape)?,
                };
                let mut dilated = Dilated {
                    path,
                    origins: Vec::new(),
                    padded: Patches::new(&device, images, total, layout)?,
                    padding,
                    skip: match skip {
                        None => None,
                        Some(_) => {
                            let factors = uninit(&[rows, 3])?;
                            Some(Skip { base: uninit(shape)?, noise: uninit(shape)?, factors })
                        }
                    },
                    taps: uninit(&[rows, 2 * scale - 1])?,
                };
                let origins = |from: [usize; 2]| -> Vec<[i32; 2]> {
                    let of = |i: usize| [(i / scale) as i32 - from[0] as i32, (i % scale) as i32 - from[1] as i32];
                    (0..images).flat_map(|_| (0..total).map(of)).collect()
                };
                dilated.padded.place(&origins([0, 0]))?;
                dilated.origins = origins(padding);
                dilated.path.patches.place(&dilated.origins)?;
                Some(dilated)
            }
        };
        let scales = match stage.progressive.as_ref().and_then(|progressive| progressive.input_scales.as_ref()) {
            None => None,
            Some(_) => {
                let table = || StepTable::new(&device, begin.rows.to_vec());
                Some([table()?, table()?])
            }
        };
        // Steps overwrite x, which the caller may still hold.
        let x = if begin.x.is_unshared() { begin.x.clone() } else { begin.x.duplicate()? };
        let mut steps = ViewSteps {
            denoiser,
            x,
            table: StepTable::new(&device, begin.rows.to_vec())?,
            scales,
            windows: Path { patches: windows, sums: uninit(shape)? },
            dilated,
            mix: uninit(&[rows, 3])?,
            guidance: Vec::new(),
            recorded: Vec::new(),
            view_batch: stage.view_batch,
        };
        steps.write_tables(begin, stage)?;
        Ok(steps)
    }

    /// Another stage of the same key, in the same memory.
    ///
    /// # Errors
    /// Those of the device.
    pub fn restart(&mut self, begin: &ViewBegin, stage: &ViewStage) -> Result<()> {
        self.x.copy_from(&begin.x)?;
        self.write_tables(begin, stage)
    }

    fn write_tables(&mut self, begin: &ViewBegin, stage: &ViewStage) -> Result<()> {
        let (rows, range) = (begin.rows.len(), begin.range.clone());
        // Rows of the stage's steps where the step table has them; the others are not read.
        let table = |columns: usize, row: &dyn Fn(usize) -> Vec<f32>| {
            let mut values = vec![0.0; rows * columns];
            for (step, values) in values.chunks_exact_mut(columns).skip(range.start).take(range.len()).enumerate() {
                values.copy_from_slice(&row(step));
            }
            values
        };
        self.table.rewrite(begin.rows.to_vec(), range.start)?;
        let progressive = stage.progressive.as_ref();
        let share = |step: usize| progressive.map_or(0.0, |progressive| progressive.dilated[step]);
        self.mix.write_f32(&table(3, &|step| vec![0.0, 1.0 - share(step), share(step)]))?;
        if let (Some(dilated), Some(progressive)) = (&mut self.dilated, progressive) {
            if let (Some(to), Some(from)) = (&mut dilated.skip, &progressive.skip) {
                to.base.copy_from(&from.base)?;
                to.noise.copy_from(&from.noise)?;
                to.factors.write_f32(&table(3, &|step| from.factors[step].to_vec()))?;
            }
            dilated.taps.write_f32(&table(2 * progressive.scale - 1, &|step| progressive.taps[step].clone()))?;
            if let (Some(tables), Some(scales)) = (&mut self.scales, &progressive.input_scales) {
                for (to, scales) in tables.iter_mut().zip(scales) {
                    let mut rows = begin.rows.to_vec();
                    rows[range.clone()].iter_mut().zip(scales).for_each(|(row, &scale)| row.input_scale = scale);
                    to.rewrite(rows, range.start)?;
                }
            }
        }
        let Some(guidance) = &begin.guidance else { return Ok(()) };
        let paths = [stage.count, progressive.map_or(0, |progressive| progressive.scale * progressive.scale)];
        for views in paths.into_iter().flat_map(|total| groups(total, stage.view_batch)).map(|group| group.len()) {
            let of_group = guidance.iter().flat_map(|&scale| std::iter::repeat_n(scale, views)).collect::<Vec<_>>();
            let of_group = Guidance::new(self.x.device(), &of_group)?;
            match self.guidance.iter_mut().find(|(known, _)| *known == views) {
                Some((_, known)) => known.rewrite(&of_group)?,
                None => self.guidance.push((views, of_group)),
            }
        }
        Ok(())
    }

    /// For [`RecordedSteps`]: the network's side, to be made anew in its memory.
    pub fn with_denoiser(
        mut self,
        make: impl FnOnce(Box<dyn Denoiser>) -> Result<Box<dyn Denoiser>>,
    ) -> Result<ViewSteps> {
        self.denoiser = make(self.denoiser)?;
        Ok(self)
    }

    /// The samples.
    pub fn x(&self) -> &Tensor {
        &self.x
    }

    /// Step `step` of the stage (from 0), whose row is next. `check` is asked before every group of views.
    ///
    /// # Errors
    /// Those of the network and the ops, and of `check`.
    pub fn step(
        &mut self,
        step: usize,
        stage: &ViewStage,
        options: &UnetOptions,
        kept: &RecordedSteps,
        check: &dyn Fn() -> Result<()>,
    ) -> Result<()> {
        if let Some(Dilated { skip: Some(Skip { base, noise, factors }), .. }) = &self.dilated {
            let factors = StepRows { table: factors, step: self.table.index(), rows: 1 };
            ops::mix_latents(&mut self.x, base, Some(noise), factors)?;
        }
        let origins = (stage.origins)(step);
        self.windows.patches.place(&origins)?;
        for group in groups(stage.count, self.view_batch) {
            check()?;
            let of_group = of_group(&origins, stage.count, &group);
            self.denoiser.place_views(&ViewPlaces { layout: stage.windows, origins: &of_group })?;
            if let Some(added) = stage.crops {
                let pixels = |cells: i32| (cells + added) as f32 * stage.sides.factor as f32;
                let crops: Vec<[f32; 2]> =
                    of_group.iter().map(|&[row, column]| [pixels(row), pixels(column)]).collect();
                self.denoiser.tell_crops(self.table.index().get(0), &crops)?;
            }
            self.windows.patches.begin_group(group.clone())?;
            let (views, first) = (group.len(), group.start == 0);
            self.group(false, views, first, stage.crops.is_some(), options, kept)?;
        }
        if let Some(Dilated { path, .. }) = &self.dilated {
            for group in groups(path.patches.total(), self.view_batch) {
                check()?;
                if let Some(dilated) = &mut self.dilated {
                    let (layout, total) = (dilated.path.patches.layout(), dilated.path.patches.total());
                    let origins = of_group(&dilated.origins, total, &group);
                    self.denoiser.place_views(&ViewPlaces { layout, origins: &origins })?;
                    dilated.path.patches.begin_group(group.clone())?;
                    dilated.padded.begin_group(group.clone())?;
                }
                self.group(true, group.len(), false, false, options, kept)?;
            }
        }
        let factors = StepRows { table: &self.mix, step: self.table.index(), rows: 1 };
        let dilated = self.dilated.as_ref().map(|dilated| &dilated.path.sums);
        ops::mix_latents(&mut self.x, &self.windows.sums, dilated, factors)?;
        self.table.index_mut().advance()?;
        self.scales.iter_mut().flatten().try_for_each(|table| table.index_mut().advance())
    }

    /// One group: computed, recorded or replayed. `first`: the first group of windows.
    fn group(
        &mut self,
        dilated: bool,
        views: usize,
        first: bool,
        crops: bool,
        options: &UnetOptions,
        kept: &RecordedSteps,
    ) -> Result<()> {
        // It is another work for the first group only where that has an input scale of its own.
        let first = first && self.scales.is_some();
        let ViewSteps { denoiser, x, table, scales, windows, dilated: samples, guidance, recorded, .. } = self;
        let same = |r: &Recording| (r.dilated, r.views, r.first, &r.options) == (dilated, views, first, options);
        let at = match recorded.iter().position(same) {
            Some(at) => at,
            None => {
                let (work, options) = (Repeated::new(x.device()), options.clone());
                recorded.push(Recording { dilated, views, first, options, work });
                recorded.len() - 1
            }
        };
        let guidance = guidance.iter().find(|(known, _)| *known == views).map(|(_, guidance)| guidance);
        let scales = scales.as_ref().map_or(&*table, |[of_first, of_others]| if first { of_first } else { of_others });
        let mut work = || match (dilated, samples.as_mut()) {
            (true, Some(samples)) => {
                let Dilated { path, padded, padding, taps, .. } = samples;
                let [_, height, width, channels] = x.dims("views", "x")?;
                let zeros = ((height + padding[0]) * (width + padding[1]) - height * width) * channels;
                let weights = StepRows { table: taps, step: table.index(), rows: 1 };
                let blurred = ops::blur_latents(x, *padding, weights)?;
                let (from, to) = (ops::latent_moments(&blurred, 0)?, ops::latent_moments(x, zeros)?);
                let restandardised = Some(Restandardised { from: &from, to: &to });
                let input = PatchInput { x: &blurred, patches: padded, restandardised, scales, crops };
                let output = denoiser.denoise_patches(&input, table, options)?;
                ops::step_patches(x, &path.patches, &output, guidance, table, &mut path.sums)
            }
            _ => {
                let input = PatchInput { x, patches: &windows.patches, restandardised: None, scales, crops };
                let output = denoiser.denoise_patches(&input, table, options)?;
                ops::step_patches(x, &windows.patches, &output, guidance, table, &mut windows.sums)
            }
        };
        // A group that found no memory has not added anything yet.
        kept.retrying(|| recorded[at].work.run(&mut work)).map(drop)
    }
}

/// Of the `total` views of each picture those of a group.
fn of_group(origins: &[[i32; 2]], total: usize, group: &Range<usize>) -> Vec<[i32; 2]> {
    origins.chunks_exact(total).flat_map(|origins| origins[group.clone()].iter().copied()).collect()
}

/// The groups of at most `most` of `total` views.
pub fn groups(total: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    (0..total).step_by(most.max(1)).map(move |first| first..total.min(first + most))
}

/// A part of a map: `size` cells from `origin` on, columns taken around the map where it `wraps`.
///
/// # Errors
/// Those of the device.
pub fn part(x: &Tensor, origin: [usize; 2], size: [usize; 2], wraps: bool) -> Result<Tensor> {
    let [images, height, width, _] = x.dims("part", "x")?;
    let mut patches =
        Patches::new(x.device(), images, 1, PatchLayout { map: [height, width], size, stride: 1, wraps })?;
    patches.place(&vec![origin.map(|n| n as i32); images])?;
    let as_it_is = StepRow { input_scale: 1.0, coefficients: StepCoefficients::default() };
    ops::gather_patches(x, &patches, None, &StepTable::new(x.device(), vec![as_it_is])?, DType::F32, 1)
}
