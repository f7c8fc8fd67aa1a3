//! HiDiffusion (Zhang et al., ECCV 2024, arXiv:2311.17528): sampling at the final size, where the network's deep blocks see
//! feature maps of the size that they were trained at in the first steps (RAU-Net), and self-attention on the widest maps is
//! within windows in all steps (MSW-MSA).
//!
//! RAU-Net has two parts, each of which holds for a range of the S steps. D: a downsampler of stride 4 and dilation 2; P: 2x2
//! means inside a down block, undone bicubically inside its up block. With T_D and T_P their shares of the steps,
//! ```text
//! D:  i < int(S T_D)      P:  i < int(S T_P)                               i: the step, from 0
//! D:  i < int(8/50 S)     P:  int(8/50 S) <= i < int(S T_P)                aggressive
//! ```
//! Where they are and which of t1 and t2 is whose follows from the map of the UNet's blocks:
//!
//! | map | D | P | windows |
//! |---|---|---|---|
//! | SD: four levels, attention on the first three | level 0, t1 | level 1, t2 | level 0 |
//! | SDXL: three levels, attention on the last two | level 1, t2 | level 1, t1 | level 1 |
//!
//! MSW-MSA: the map's four quarters are the windows, after a cyclic shift by k quarters of a window. k is drawn for every
//! self-attention of the level and every step, from 0 to 3, one number of torch's CPU generator each, in the order in which
//! the network executes them; the two halves of guidance share it. In the published code the generator is the global one, here
//! one of the picture's own seed: pictures of a batch do not depend on each other. Its step counters become the sampler's
//! step, which is the same for samplers with one evaluation per step; a sampler with two has both in one step.
//!
//! The published defaults for ControlNet are not here, as there is no ControlNet.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::method::{GenerationMethod, MethodSpec, OptionKind, OptionSpec, from_options};
use super::{ControlUse, MegaFusion, Method, ModelFacts, Run, Sampling, Size};
use crate::error::{Error, Result};
use crate::models::{UnetConfig, UnetOptions};
use crate::rng::TorchUniform;
use crate::runtime::Tensor;

pub static HIDIFFUSION: MethodSpec = MethodSpec {
    name: "hidiffusion",
    summary: "every step at the final size, deep blocks at the trained size at first, attention in windows (arXiv:2311.17528)",
    relays: false,
    choices: &[SHIFTS],
    options: OPTIONS,
    parse: |given| from_options(HiDiffusion::default(), given),
};

/// `[steps, window blocks]`, 0 to 3.
pub(super) const SHIFTS: &str = "shifts";

/// Zhang et al. 2024, arXiv:2311.17528. With both parts off it is plain sampling, bit for bit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HiDiffusion {
    /// Resolution-aware UNet.
    pub raunet: bool,
    /// Windowed self-attention.
    pub windows: bool,
    /// Shares of the steps; `None`: those of the published code for the model and the size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub t1: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub t2: Option<f64>,
    /// D in the first 8/50 of the steps and P after it. `None`: as the published code does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aggressive: Option<bool>,
}

const HEADING: &str = "HiDiffusion";

/// Relays with parts have it too.
pub(super) const RAUNET: OptionSpec = OptionSpec {
    name: "raunet",
    heading: HEADING,
    value_name: "BOOL",
    help: "Deep blocks of the UNet at the size they were trained at, in the first part of the steps (default: true)",
    kind: OptionKind::Bool,
};

/// Relays with parts have it too.
pub(super) const WINDOWS: OptionSpec = OptionSpec {
    name: "windows",
    heading: HEADING,
    value_name: "BOOL",
    help: "Self-attention on the largest maps within shifted windows, in every step (default: true)",
    kind: OptionKind::Bool,
};

/// Relays with parts have it too.
pub(super) const T1: OptionSpec = OptionSpec {
    name: "t1",
    heading: HEADING,
    value_name: "X",
    help: "Share of the steps with the first part of request.raunet (default: by model and size)\n\n\
           On SD models the wide downsampler, on SDXL models the pooled block. 0.4; 0.7 from four times the trained \
           sides on; 0.5 on SDXL-Turbo.",
    kind: OptionKind::Share,
};

/// Relays with parts have it too.
pub(super) const T2: OptionSpec = OptionSpec {
    name: "t2",
    heading: HEADING,
    value_name: "X",
    help: "Share of the steps with the second part of request.raunet (default: by model and size)\n\n\
           On SD models the pooled block, on SDXL models the wide downsampler. 0; 0.3 from four times the trained sides on.",
    kind: OptionKind::Share,
};

/// Relays with parts have it too.
pub(super) const AGGRESSIVE: OptionSpec = OptionSpec {
    name: "aggressive",
    heading: HEADING,
    value_name: "BOOL",
    help: "The wide downsampler in the first 8 of 50 steps and the pooled block after it (default: by model and size)\n\n\
           true on SDXL below four times the trained sides, but for inpainting models, Playground and SDXL-Turbo.",
    kind: OptionKind::Bool,
};

/// In the order of the struct's fields.
const OPTIONS: &[OptionSpec] = &[RAUNET, WINDOWS, T1, T2, AGGRESSIVE];

impl Default for HiDiffusion {
    fn default() -> HiDiffusion {
        HiDiffusion { raunet: true, windows: true, t1: None, t2: None, aggressive: None }
    }
}

impl From<HiDiffusion> for Method {
    fn from(options: HiDiffusion) -> Method {
        Method::of(&HIDIFFUSION, options)
    }
}

/// How the blocks of a UNet are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BlockMap {
    Sd,
    Sdxl,
}

impl BlockMap {
    /// # Errors
    /// [`Error::Config`]: neither of the two.
    fn of(unet: &UnetConfig) -> Result<BlockMap> {
        let down: Vec<bool> = unet.down_blocks.iter().map(|block| block.attention.is_some()).collect();
        let up: Vec<bool> = unet.up_blocks.iter().rev().map(|block| block.attention.is_some()).collect();
        let map = match down[..] {
            [true, true, true, false] => Some(BlockMap::Sd),
            [false, true, true] => Some(BlockMap::Sdxl),
            _ => None,
        };
        map.filter(|map| up == down && unet.self_attentions(map.windowed_level()) > 0).ok_or_else(|| {
            let shown: Vec<&str> = down.iter().map(|&has| if has { "attention" } else { "none" }).collect();
            let reason = format!(
                "hidiffusion knows the blocks of SD (four levels, self-attention on the first three) and of SDXL (three \
                 levels, self-attention on the last two); this UNet has {}",
                shown.join(", ")
            );
            Error::config("unet/config.json", reason)
        })
    }

    fn wide_level(self) -> usize {
        match self {
            BlockMap::Sd => 0,
            BlockMap::Sdxl => 1,
        }
    }

    fn pooled_level(self) -> usize {
        1
    }

    fn windowed_level(self) -> usize {
        self.wide_level()
    }

    /// Latent side that the published models of this map were trained at.
    fn sample_size(self) -> usize {
        match self {
            BlockMap::Sd => 64,
            BlockMap::Sdxl => 128,
        }
    }
}

/// What a stage does in which of its steps.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Schedule {
    map: BlockMap,
    wide: Range<usize>,
    pooled: Range<usize>,
    /// Self-attentions in windows; 0: none is.
    pub(super) windows: usize,
}

impl Schedule {
    pub(super) fn at(&self, step: usize) -> UnetOptions {
        UnetOptions {
            wide_downsampler: self.wide.contains(&step).then_some(self.map.wide_level()),
            pooled_level: self.pooled.contains(&step).then_some(self.map.pooled_level()),
            windowed_level: (self.windows > 0).then_some(self.map.windowed_level()),
            ..UnetOptions::default()
        }
    }
}

impl HiDiffusion {
    /// # Errors
    /// [`Error::Request`]: a share that is none, an option of a part that is off.
    pub(super) fn check_options(&self) -> Result<()> {
        let shares = [("t1", self.t1), ("t2", self.t2)];
        for (field, share) in shares.iter().filter_map(|&(field, share)| Some((field, share?))) {
            if !(0.0..=1.0).contains(&share) {
                let reason = "expected a share of the steps, 0 to 1".into();
                return Err(Error::Request { field, value: share.to_string(), reason });
            }
        }
        if !self.raunet {
            let given = |(field, value): (&'static str, Option<String>)| Some((field, value?));
            let shares = shares.map(|(field, share)| (field, share.map(|share| share.to_string())));
            let aggressive = ("aggressive", self.aggressive.map(|on| on.to_string()));
            if let Some((field, value)) = shares.into_iter().chain([aggressive]).find_map(given) {
                let reason = "has no effect with request.raunet false".into();
                return Err(Error::Request { field, value, reason });
            }
        }
        Ok(())
    }

    /// Of a stage. The steps are those that are made: fewer than the stage's where a run begins from a picture.
    ///
    /// # Errors
    /// [`Error::Config`]: the network is no UNet of a map that is known.
    pub(super) fn schedule(&self, model: &ModelFacts, run: &Run, stage: usize) -> Result<Schedule> {
        let (size, steps) = (run.stages()[stage].size, run.ranges()[stage].len());
        let Some(unet) = &model.unet else {
            return Err(Error::config(format!("model {}", model.name), "hidiffusion is for networks that are UNets"));
        };
        let map = BlockMap::of(unet)?;
        let windows = if self.windows { unet.self_attentions(map.windowed_level()) } else { 0 };
        if !self.raunet {
            return Ok(Schedule { map, wide: 0..0, pooled: 0..0, windows });
        }
        let [native_h, native_w] = unet.sample_size.unwrap_or([map.sample_size(); 2]);
        let (h, w) = (size.height / run.factor(), size.width / run.factor());
        let extreme = h >= 4 * native_h && w >= 4 * native_w;
        let turbo = map == BlockMap::Sdxl && model.distilled;
        // Beside a ControlNet the published code has the first part of SDXL's longer, unless the run begins from a picture.
        let controlled = map == BlockMap::Sdxl && run.has_controls() && run.start().is_none();
        let (t1, t2) = match (turbo, extreme) {
            (true, _) => (0.5, 0.0),
            (false, false) if controlled => (0.5, 0.0),
            (false, true) => (0.7, 0.3),
            (false, false) => (0.4, 0.0),
        };
        let name = model.name.to_lowercase();
        let otherwise =
            unet.in_channels != unet.out_channels || name.contains("inpainting") || name.contains("playground");
        let aggressive = map == BlockMap::Sdxl && !(extreme || turbo || otherwise);
        let (t1, t2) = (self.t1.unwrap_or(t1), self.t2.unwrap_or(t2));
        let (wide, pooled) = if map == BlockMap::Sd { (t1, t2) } else { (t2, t1) };
        let of_steps = |share: f64| (steps as f64 * share) as usize;
        let (wide, pooled) = match self.aggressive.unwrap_or(aggressive) {
            true => {
                let first = (8.0 / 50.0 * steps as f64) as usize;
                (0..first, first..of_steps(pooled))
            }
            false => (0..of_steps(wide), 0..of_steps(pooled)),
        };
        Ok(Schedule { map, wide, pooled, windows })
    }
}

/// The shifts of a picture's windows: `count` of those that its seed gives, from number `first` on.
pub(super) fn drawn_shifts(seed: u64, first: usize, count: usize) -> Vec<i64> {
    let mut rng = TorchUniform::new(seed);
    (0..first + count).map(|_| quarter(rng.rand())).skip(first).collect()
}

/// `torch.rand(1)` as a number of quarters of a window.
fn quarter(u: f32) -> i64 {
    i64::from(u > 0.25) + i64::from(u > 0.5) + i64::from(u > 0.75)
}

impl GenerationMethod for HiDiffusion {
    /// That of a relay.
    fn default_size(&self, native: Size) -> Size {
        MegaFusion::default().default_size(native)
    }

    fn check(&self, run: &Run) -> Result<()> {
        self.check_options()?;
        run.model().map_or(Ok(()), |model| self.schedule(model, run, 0).map(drop))
    }

    /// In the first 0.6 of the steps at about the trained size, in eighths of cells, after them not at all: as published for SDXL,
    /// and the same for SD, for which the published code has nothing.
    fn control_use(&self, run: &Run, stage: usize, share: f64) -> ControlUse {
        const SHARE: f64 = 0.6;
        const MULTIPLE: usize = 8;
        if share >= SHARE {
            return ControlUse::Off;
        }
        let unet = run.model().and_then(|model| model.unet.as_ref());
        let usual = unet.and_then(|unet| BlockMap::of(unet).ok()).map_or(BlockMap::Sd, |map| map).sample_size();
        let native = unet.and_then(|unet| unet.sample_size).unwrap_or([usual; 2]);
        let cells = run.cells(run.stages()[stage].size);
        let over = [0, 1].map(|axis| cells[axis] as f64 / native[axis] as f64);
        let over = over[0].max(over[1]);
        match over > 1.0 {
            true => ControlUse::Resized(cells.map(|n| ((n as f64 / over) as usize / MULTIPLE).max(1) * MULTIPLE)),
            false => ControlUse::Whole,
        }
    }

    /// The last latents.
    fn sample(&self, sampling: &mut Sampling) -> Result<Tensor> {
        let run = sampling.run();
        let model = run.model().ok_or_else(|| Error::config("hidiffusion", "the run says nothing of its model"))?;
        let (schedule, steps) = (self.schedule(model, run, 0)?, run.steps());
        sampling.prepare(vec![run.scheduler().clone()], |coefficients| coefficients)?;
        if schedule.windows > 0 {
            let count = steps * schedule.windows;
            let mut draw = |seed| drawn_shifts(seed, 0, count);
            let chosen = sampling.choose(SHIFTS, &[steps, schedule.windows], 0..=3, &mut draw)?;
            sampling.shift_windows(&chosen, schedule.windows);
        }
        let x = sampling.first_samples()?;
        Ok(sampling.stage(0, x, &|step| schedule.at(step).into())?.0)
    }
}
