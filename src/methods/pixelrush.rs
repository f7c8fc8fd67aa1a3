//! PixelRush (2026, arXiv:2602.12769): a picture at the model's own size, then one refinement per doubling, in which overlapping
//! patches of the trained size each take a short inversion and one step of a distilled model.
//! ```text
//! y   = E(Phi(clamp(D(x_0))))                                      of every patch its part of the map; K the timestep
//! e   = eps(y, K);   e' = sqrt(1 - q^2) e + q n                    the inversion, and noise against over-smoothing
//! z   = sqrt(abar_K) y + sqrt(1 - abar_K) e'
//! x_0 = the clean sample of z by eps(z, K)
//! x_0 of the map = sum_p w_p x_0,p / sum_p w_p                     w a Gaussian over the patch's rows times one over its columns
//! ```
//! The paper gives the cascade, K = 249, patches that overlap and Gaussian feathering; the rest is decided here, as there is no
//! published code: one model makes the base picture and the refinements, so a distilled one (SDXL-Turbo, LCM) is what this is
//! for; the picture is enlarged in pixels; y is taken as clean; e is mixed with one noise map per stage, so that overlaps agree,
//! q = 1/2; patches begin every three quarters of their sides; the feather's standard deviation is 0.3 of a side; SDXL is told the
//! model's own size and no crop; refinements have no guidance. The last stage has the picture's size, whatever its ratio to the
//! first.
//!
//! A picture that the run begins from stands in place of clamp(D(x_0)) of the first stage, which is not run. So any picture is refined,
//! whatever made it.
//!
//! Draws: the first noise; per step one, where the sampler draws; one per refinement, unless q is 0, which is all of them from a picture.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::megafusion::UPSAMPLER;
use super::method::{GenerationMethod, MethodSpec, OptionKind, OptionSpec, from_options};
use super::observer::check_finite;
use super::relay::Left;
use super::stages::{doubled_sizes, last_steps_again};
use super::views::{DEFAULT_VIEW_BATCH, STRIDE, VIEW_BATCH, groups, window_starts};
use super::{Event, Geometry, Method, Prediction, Run, Sampling, Size, Stage, StageParts, check_size};
use crate::error::{Error, Result};
use crate::models::UnetOptions;
use crate::ops::{self, PatchLayout, Patches, StepCoefficients, StepRow, StepTable, Upsampler};
use crate::runtime::{DType, Device, Tensor};
use crate::schedulers::Readout;

pub static PIXELRUSH: MethodSpec = MethodSpec {
    name: "pixelrush",
    summary: "refines overlapping patches at every doubling, by one step of a distilled model (arXiv:2602.12769)",
    relays: true,
    choices: &[],
    options: OPTIONS,
    parse: |given| from_options(PixelRush::default(), given),
};

const HEADING: &str = "PixelRush";

/// In the order of the struct's fields.
const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "refine_timestep",
        heading: HEADING,
        value_name: "N",
        help: "Timestep of the training schedule that refinements go back to (default: 249)\n\n\
               The larger, the more is made anew. 249 is the last of four that SDXL-Turbo is distilled to.",
        kind: OptionKind::Integer { least: 0, most: 999, expected: "expected a timestep from 0 to 999" },
    },
    OptionSpec {
        name: "inject_noise",
        heading: HEADING,
        value_name: "X",
        help: "Share of fresh noise in that of a refinement's inversion, 0 (none) to 1 (only) (default: 0.5)",
        kind: OptionKind::Share,
    },
    STRIDE,
    VIEW_BATCH,
    UPSAMPLER,
];

/// The feather's standard deviation, in sides of a patch.
const FEATHER: f64 = 0.3;

/// Few-step refinement of patches: PixelRush, arXiv:2602.12769.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PixelRush {
    /// K
    pub refine_timestep: usize,
    /// q
    pub inject_noise: f64,
    /// Cells; `None`: three quarters of a patch's smaller side.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stride: Option<usize>,
    /// Patches of a picture at once.
    pub view_batch: usize,
    pub upsampler: Upsampler,
}

impl Default for PixelRush {
    fn default() -> PixelRush {
        PixelRush {
            refine_timestep: 249,
            inject_noise: 0.5,
            stride: None,
            view_batch: DEFAULT_VIEW_BATCH,
            upsampler: Upsampler::default(),
        }
    }
}

impl From<PixelRush> for Method {
    fn from(options: PixelRush) -> Method {
        Method::of(&PIXELRUSH, options)
    }
}

/// The patches of a map.
struct Places {
    layout: PatchLayout,
    /// Of each, row and column of the first cell.
    origins: Vec<[i32; 2]>,
}

impl PixelRush {
    /// Rows and columns of a patch, and the stride.
    fn patch(&self, run: &Run) -> Result<([usize; 2], usize)> {
        let Some(native) = run.native() else {
            let reason = "the model's configuration has no sample_size to take the patches from; choose request.method hires-fix";
            return Err(Error::Request { field: "method", value: run.method().to_string(), reason: reason.into() });
        };
        let sides = [native.height, native.width].map(|side| (side / run.factor()).max(1));
        let stride = self.stride.unwrap_or((sides[0].min(sides[1]) * 3 / 4).max(1));
        Ok((sides, stride))
    }

    fn places(&self, run: &Run, stage: usize) -> Result<Places> {
        let (patch, stride) = self.patch(run)?;
        let size = run.stages()[stage].size;
        let map = [size.height, size.width].map(|side| side / run.factor());
        let [rows, columns] = [0, 1].map(|axis| window_starts(map[axis], patch[axis], stride));
        let layout = PatchLayout { map, size: [0, 1].map(|axis| patch[axis].min(map[axis])), stride: 1, wraps: false };
        let origins = rows.iter().flat_map(|&row| columns.iter().map(move |&column| [row as i32, column as i32]));
        Ok(Places { layout, origins: origins.collect() })
    }

    /// From what a stage leaves to clean samples of the next one's size, through the picture.
    fn enlarged(&self, sampling: &mut Sampling, stage: usize, left: &Left) -> Result<Tensor> {
        sampling.dump_left(stage, left)?;
        let enlarged = sampling.enlarged_left(stage, left, |picture, size| {
            let picture = ops::clamp(&picture, -1.0, 1.0)?;
            ops::resize(&picture, size, self.upsampler, Some((-1.0, 1.0)), None)
        })?;
        sampling.encoded_pictures(stage, &enlarged, false)
    }

    /// The clean samples of a stage after the first, from those that were enlarged.
    fn refined(&self, sampling: &mut Sampling, stage: usize, enlarged: &Tensor) -> Result<Tensor> {
        let run = sampling.run();
        let Places { layout, origins } = self.places(run, stage)?;
        let readout = self.readout(run)?;
        let (images, size) = (enlarged.shape()[0], run.stages()[stage].size);
        let noise = match self.inject_noise {
            0.0 => None,
            _ => Some(sampling.draw(sampling.sample_shape(size))?),
        };
        sampling.begin(Event::Condition { stage })?;
        let told = self.told_size(run, stage);
        let network = sampling.model.begin_stage(told, &[self.refine_timestep as f32], None)?;
        let as_it_is = StepRow { input_scale: 1.0, coefficients: StepCoefficients::default() };
        let table = StepTable::new(enlarged.device(), vec![as_it_is])?;
        let mut patches = Patches::new(enlarged.device(), images, origins.len(), layout)?;
        patches.place(&origins.repeat(images))?;
        // The prompt's prediction alone, also where the run has guidance.
        let output = |x: &Tensor| -> Result<Tensor> {
            let (rows, output) = (x.shape()[0], network.denoise(x, &table, &UnetOptions::default())?);
            let last = output.shape()[0];
            ops::scale_cast(&output.rows(last - rows..last)?, 1.0, 0.0, DType::F32, 1)
        };
        let stages = run.stages().len();
        sampling.begin(Event::StageBegins { stage, stages, size, parts: StageParts::NONE, steps: 1 })?;
        // Of each picture the groups of its patches.
        let mut clean = vec![Vec::new(); images];
        for group in groups(origins.len(), self.view_batch) {
            sampling.check_cancelled()?;
            patches.begin_group(group.clone())?;
            let part = |x: &Tensor| ops::gather_patches(x, &patches, None, &table, DType::F32, 1);
            let y = part(enlarged)?;
            let mut e = mixed(&y, &output(&y)?, readout.noise)?;
            if let Some(noise) = &noise {
                let kept = (1.0 - self.inject_noise.powi(2)).sqrt();
                e = mixed(&e, &part(noise)?, [kept, self.inject_noise])?;
            }
            let z = mixed(&y, &e, readout.level)?;
            let x0 = mixed(&z, &output(&z)?, readout.x0)?;
            for (image, clean) in clean.iter_mut().enumerate() {
                clean.push(x0.rows(image * group.len()..(image + 1) * group.len())?);
            }
        }
        let all = Tensor::concat(&clean.into_iter().flatten().collect::<Vec<_>>())?;
        let weights = |axis: usize| feather(enlarged.device(), layout.size[axis]);
        let merged = ops::merge_patches(&all, &patches, &weights(0)?, &weights(1)?)?;
        sampling.step_done(stage, 1, &merged)?;
        check_finite(&merged, || format!("the refinement of stage {} ({size})", stage + 1))?;
        Ok(merged)
    }

    /// What an output at K says.
    fn readout(&self, run: &Run) -> Result<Readout> {
        run.scheduler().readout(self.refine_timestep).ok_or_else(|| {
            let trained = run.scheduler().alphas_cumprod().len();
            let reason = format!(
                "expected one of the {trained} timesteps of a diffusion model, with signal and noise in it; flow matching has none"
            );
            Error::Request { field: "refine_timestep", value: self.refine_timestep.to_string(), reason }
        })
    }
}

/// `a x + b y`, f32.
fn mixed(x: &Tensor, y: &Tensor, [a, b]: [f64; 2]) -> Result<Tensor> {
    ops::add_noise(x, y, a as f32, b as f32)
}

/// `[n]`: a Gaussian about the middle of a side.
fn feather(device: &Device, n: usize) -> Result<Tensor> {
    let deviation = FEATHER * n as f64;
    let weight = |i: usize| (-0.5 * ((i as f64 - (n as f64 - 1.0) / 2.0) / deviation).powi(2)).exp() as f32;
    Tensor::from_f32(device, &[n], DType::F32, &(0..n).map(weight).collect::<Vec<_>>())
}

impl GenerationMethod for PixelRush {
    fn default_size(&self, native: Size) -> Size {
        native.times(2)
    }

    /// All steps at the native area, then one per doubling of the sides and one at the final size.
    fn stages(&self, geometry: &Geometry) -> Result<Vec<Stage>> {
        let &Geometry { size, sides, steps, .. } = geometry;
        check_size("size", size, sides.multiple())?;
        let stage = |(i, size)| Stage::new(size, if i == 0 { steps } else { 1 });
        Ok(doubled_sizes(geometry).into_iter().enumerate().map(stage).collect())
    }

    fn in_place_of_first_stage(&self) -> Option<&'static str> {
        Some("request.refine_timestep")
    }

    /// A refinement takes no step of the schedule; its one is counted as the last of them.
    fn ranges(&self, stages: &[Stage]) -> Vec<Range<usize>> {
        last_steps_again(stages)
    }

    /// Refinements have no guidance.
    fn splits_guidance(&self) -> bool {
        false
    }

    /// The model's own in refinements: a patch has that.
    fn told_size(&self, run: &Run, stage: usize) -> Size {
        match (stage, run.native()) {
            (0, _) | (_, None) => run.stages()[stage].size,
            (_, Some(native)) => native,
        }
    }

    fn check(&self, run: &Run) -> Result<()> {
        if run.stages()[1..].iter().any(|stage| stage.steps != 1) {
            let reason = "every stage after the first refines in one step; expected WxH:STEPS,WxH:1 and so on".into();
            return Err(Error::Request { field: "stages", value: run.stages_text(), reason });
        }
        let (patch, stride) = self.patch(run)?;
        let least = patch[0].min(patch[1]);
        if stride == 0 || stride > least {
            let reason = format!("patches of {least} cells cover the picture with a stride of 1 to {least}");
            return Err(Error::Request { field: "stride", value: stride.to_string(), reason });
        }
        self.readout(run).map(drop)
    }

    /// The clean samples of the last refinement.
    fn sample(&self, sampling: &mut Sampling) -> Result<Tensor> {
        let run = sampling.run();
        sampling.prepare(vec![run.scheduler().clone(); run.stages().len()], |coefficients| coefficients)?;
        let mut left = sampling.first_stage(|sampling| {
            let noise = sampling.initial_noise(run.stages()[0].size)?;
            Ok(sampling.stage(0, noise, &|_| Prediction::default())?.0)
        })?;
        for stage in 1..run.stages().len() {
            let enlarged = self.enlarged(sampling, stage, &left)?;
            left = Left::Samples(self.refined(sampling, stage, &enlarged)?);
        }
        sampling.last_samples(left)
    }
}
