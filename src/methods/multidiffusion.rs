//! MultiDiffusion (Bar-Tal et al., ICML 2023, arXiv:2302.08113, sec. 4): one picture of any size as the mean of overlapping
//! windows of the trained size.
//!
//! In a step from timestep t, of windows F_i of the latents x:
//! ```text
//! x' = sum_i F_i^-1(step(F_i(x), eps(F_i(x), t))) / sum_i F_i^-1(1)          eq. (5) with equal weights
//! ```
//! Windows begin every `stride` cells, and the last one where the map ends, so that each cell is in one. With `circular` those
//! along the rows go around, and the picture closes left to right: it is decoded with [`SEAM`] columns of the other side at
//! either border, which are then cut off. SDXL is told the size of the whole picture and no crop.
//!
//! From a picture it runs the last steps of the schedule, as plain sampling does, without a mask.
//!
//! Draws: the first noise; from a picture the posterior's, then the noise.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::method::{GenerationMethod, MethodSpec, OptionKind, OptionSpec, from_options};
use super::views::{DEFAULT_VIEW_BATCH, STRIDE, VIEW_BATCH, ViewStage, check_sampler, part, window_starts};
use super::{Geometry, Method, Run, Sampling, Sides, Size};
use crate::error::{Error, Result};
use crate::models::UnetOptions;
use crate::ops::PatchLayout;
use crate::runtime::Tensor;
use crate::schedulers::{Sampler, SchedulerConfig};

pub static MULTIDIFFUSION: MethodSpec = MethodSpec {
    name: "multidiffusion",
    summary: "overlapping windows of the model's own size, averaged in every step, for panoramas (arXiv:2302.08113)",
    relays: false,
    choices: &[],
    options: &[
        WINDOW,
        STRIDE,
        VIEW_BATCH,
        OptionSpec {
            name: "circular",
            heading: "Views",
            value_name: "",
            help: "The picture closes left to right: windows go around",
            kind: OptionKind::Switch,
        },
    ],
    parse: |given| from_options(MultiDiffusion::default(), given),
};

/// Relays with parts have it too.
pub(super) const WINDOW: OptionSpec = OptionSpec {
    name: "window",
    heading: "Views",
    value_name: "N",
    help: "Sides of a window in latent cells (default: those that the model was trained with)",
    kind: OptionKind::Integer { least: 1, most: 4096, expected: "expected a number of cells from 1 to 4096" },
};

/// Columns of latents from the other side that a circular picture is decoded with.
pub const SEAM: usize = 8;

/// Joint diffusion of overlapping windows: Bar-Tal et al., ICML 2023, arXiv:2302.08113.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MultiDiffusion {
    /// Cells; `None`: the UNet's sample_size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<usize>,
    /// Cells; `None`: an eighth of the window, at least 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stride: Option<usize>,
    /// Views of a picture at once.
    pub view_batch: usize,
    pub circular: bool,
}

impl Default for MultiDiffusion {
    fn default() -> MultiDiffusion {
        MultiDiffusion { window: None, stride: None, view_batch: DEFAULT_VIEW_BATCH, circular: false }
    }
}

impl From<MultiDiffusion> for Method {
    fn from(options: MultiDiffusion) -> Method {
        Method::of(&MULTIDIFFUSION, options)
    }
}

/// The windows of a map.
pub(super) struct Windows {
    layout: PatchLayout,
    origins: Vec<[i32; 2]>,
}

impl Windows {
    /// Is it one, of the whole map? What its steps are is then a plain stage.
    pub(super) fn is_whole(&self) -> bool {
        self.origins.len() == 1 && self.layout.size == self.layout.map
    }
}

impl MultiDiffusion {
    /// Rows and columns of the windows of a run's map, and the stride.
    fn window(&self, run: &Run) -> Result<([usize; 2], usize)> {
        let window = match (self.window, run.native()) {
            (Some(window), _) => [window; 2],
            (None, Some(native)) => [native.height, native.width].map(|side| (side / run.factor()).max(1)),
            (None, None) => {
                let reason =
                    "the model's configuration has no sample_size to take the windows from; name the request.window";
                return Err(Error::Request { field: "window", value: "(none)".into(), reason: reason.into() });
            }
        };
        Ok((window, self.stride.unwrap_or((window[0].min(window[1]) / 8).max(1))))
    }

    /// # Errors
    /// [`Error::Request`]: of no size.
    pub(super) fn windows(&self, run: &Run, size: Size) -> Result<Windows> {
        let (window, stride) = self.window(run)?;
        let map = [size.height, size.width].map(|side| side / run.factor());
        let around = self.circular && map[1] > window[1];
        let rows = window_starts(map[0], window[0], stride);
        let columns = match around {
            true => (0..(map[1] / stride).max(1)).map(|k| k * stride).collect(),
            false => window_starts(map[1], window[1], stride),
        };
        let layout =
            PatchLayout { map, size: [window[0].min(map[0]), window[1].min(map[1])], stride: 1, wraps: around };
        let origins = rows.iter().flat_map(|&row| columns.iter().map(move |&column| [row as i32, column as i32]));
        Ok(Windows { layout, origins: origins.collect() })
    }

    /// Do the windows cover a map of this size?
    ///
    /// # Errors
    /// [`Error::Request`], naming the option.
    pub(super) fn check_windows(&self, run: &Run, size: Size) -> Result<()> {
        let refuse = |field, value: String, reason: String| Err(Error::Request { field, value, reason });
        let (window, stride) = self.window(run)?;
        let least = window[0].min(window[1]);
        if stride == 0 || stride > least {
            let reason = format!("windows of {least} cells cover the picture with a stride of 1 to {least}");
            return refuse("stride", stride.to_string(), reason);
        }
        let patch = run.sides().patch;
        if let Some(side) = window.iter().find(|side| !side.is_multiple_of(patch)) {
            let reason =
                format!("the model's network sees patches of {patch} x {patch} cells; expected a multiple of {patch}");
            return refuse("window", side.to_string(), reason);
        }
        if self.view_batch == 0 {
            return refuse("view_batch", "0".into(), "expected at least 1".into());
        }
        let Windows { layout, .. } = self.windows(run, size)?;
        let left_over = layout.map[1] % stride + stride;
        if layout.wraps && left_over > layout.size[1] {
            let reason = format!(
                "the last of the windows that go around begins {left_over} cells before the first one, and a window has {} \
                 columns; a stride that divides {} leaves no gap",
                layout.size[1], layout.map[1]
            );
            return refuse("stride", stride.to_string(), reason);
        }
        Ok(())
    }

    /// Gives the windows as a stage's views to `work`.
    pub(super) fn with_views<T>(
        &self,
        windows: &Windows,
        images: usize,
        sides: Sides,
        work: impl FnOnce(&ViewStage) -> Result<T>,
    ) -> Result<T> {
        work(&ViewStage {
            windows: windows.layout,
            count: windows.origins.len(),
            origins: &|_| windows.origins.repeat(images),
            view_batch: self.view_batch,
            crops: None,
            sides,
            progressive: None,
        })
    }
}

impl GenerationMethod for MultiDiffusion {
    fn steps_over_views(&self) -> bool {
        true
    }

    /// DDIM, the paper's, whatever the model's own is; of a flow its own.
    fn sampler(&self, config: &SchedulerConfig) -> Sampler {
        if config.is_flow_matching() { config.sampler() } else { Sampler::Ddim }
    }

    /// Four times as wide as the model's own, as the published panoramas are.
    fn default_size(&self, native: Size) -> Size {
        Size::new(4 * native.width, native.height)
    }

    /// Half a window in place of an eighth: a sixteenth of the windows.
    fn enlarging_options(&self, geometry: &Geometry) -> Vec<(&'static str, Value)> {
        let trained = geometry.native.width.min(geometry.native.height) / geometry.sides.factor;
        vec![("stride", (self.window.unwrap_or(trained) / 2).max(1).into())]
    }

    fn check(&self, run: &Run) -> Result<()> {
        self.check_windows(run, run.last_stage().size)?;
        check_sampler(run)
    }

    /// The last latents.
    fn sample(&self, sampling: &mut Sampling) -> Result<Tensor> {
        let run = sampling.run();
        let windows = self.windows(run, run.last_stage().size)?;
        sampling.prepare(vec![run.scheduler().clone()], |coefficients| coefficients)?;
        let x = sampling.first_samples()?;
        let images = x.shape()[0];
        self.with_views(&windows, images, run.sides(), |views| {
            sampling.view_stage(0, x, views, &|_| UnetOptions::default())
        })
    }

    fn decode(&self, sampling: &mut Sampling, samples: &Tensor) -> Result<Vec<Tensor>> {
        if !self.circular {
            return sampling.decode(samples);
        }
        let [_, height, width, _] = samples.dims("multidiffusion", "samples")?;
        let seam = SEAM.min(width);
        let around = part(samples, [0, width - seam], [height, width + 2 * seam], true)?;
        let pictures = sampling.decode(&around)?;
        let size = sampling.run().last_stage().size;
        let left = seam * sampling.run().factor();
        pictures.iter().map(|picture| part(picture, [0, left], [size.height, size.width], false)).collect()
    }
}
