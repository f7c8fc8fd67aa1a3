//! ScaleCrafter (He et al., ICLR 2024, arXiv:2310.07702): every step at the final size, where the receptive field of the
//! network's convolutions is enlarged in the first steps.
//!
//! - Re-dilation (sec. 3.2): a convolution gets a dilation d, whole or not ([`Redilation`]), while i < tau. Progressive
//!   factors are `max(ceil(d (tau - i) / tau), 2)`                                                          i: the step, from 0
//! - Dispersion (sec. 3.3): such a convolution has 5x5 kernels ([`ops::disperse`](crate::ops::disperse)) and half the factor, after it
//!   was shrunk. In either branch below to what that branch re-dilates.
//! - Noise-damped guidance (sec. 3.4): of two predictions, d re-dilated and v with a weaker set,
//!   `eps = eps_v(uncond) + w (eps_d(cond) - eps_d(uncond))`
//! - FreeU (Si et al. 2023, arXiv:2309.11497) in every step, which the published code has on.
//!
//! The published configurations are for two maps of blocks, SD's four levels and SDXL's three, and for sizes of 2, 2.5, 4x2 and
//! 4 times the trained sides. The table goes by these, whatever the model is called; that it holds for another model than the
//! published ones, the one inside the program among them, is our choice. So is what follows where the code has no rule: its
//! thresholds are of 50 steps, and are taken as shares of the steps, rounded down; a run from a picture begins at its own step of
//! the schedule; a portrait size has the factors of the landscape one. The published samples are DDIM's with an eta of 1, guided by
//! 7.5 (SD) and 5 (SDXL).

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::convolutions::{self, FREEU, Map, Names, freeu_for};
use super::method::{GenerationMethod, MethodSpec, OptionKind, OptionSpec, from_options};
use super::{MegaFusion, Method, ModelFacts, Prediction, Run, Sampling, Size};
use crate::error::{Error, Result};
use crate::models::{ConvPlace, Redilation, UnetOptions};
use crate::ops::FreeU;
use crate::runtime::Tensor;
use crate::schedulers::{Sampler, SchedulerConfig};

pub static SCALECRAFTER: MethodSpec = MethodSpec {
    name: "scalecrafter",
    summary: "every step at the final size, convolutions re-dilated in the first steps (arXiv:2310.07702)",
    relays: false,
    choices: &[],
    options: OPTIONS,
    parse: |given| from_options(ScaleCrafter::default(), given),
};

/// He et al. 2023, arXiv:2310.07702. `None`: as the published code does for the model and the size.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScaleCrafter {
    /// `D2=2,M=4,down_blocks.2.downsamplers.0.conv=2.5`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub redilate: Option<String>,
    /// Plain convolutions from this step on. `None` with `redilate`: all steps are re-dilated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub redilate_steps: Option<usize>,
    /// `None` with `redilate`: no.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progressive: Option<bool>,
    /// As `redilate`, of the weaker branch. `None` with `redilate`: there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub damped: Option<String>,
    /// `None` with `damped`: as many steps as are re-dilated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub damped_steps: Option<usize>,
    /// `D3,M`. `None`: no convolution.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disperse: Option<String>,
    /// `None` with `disperse`: as many steps as are re-dilated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disperse_steps: Option<usize>,
    /// `1.1,1.2,0.6,0.4` or `none`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeu: Option<String>,
}

const HEADING: &str = "ScaleCrafter";

const STEPS: OptionKind =
    OptionKind::Integer { least: 0, most: u32::MAX as i64, expected: "expected a number of steps, 0 or more" };

/// In the order of the struct's fields.
const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "redilate",
        heading: HEADING,
        value_name: "LIST",
        help: "Dilation of convolutions: D2=2,M=4,up_blocks.0.upsamplers.0.conv=2.5 (default: by model and size)\n\n\
               A group, D0, D1, ... of the down blocks, M the mid block, U0, U1, ... of the up blocks, or one convolution by its \
               name; a later entry replaces an earlier one. Without it what was published for 2, 2.5, 4x2 and 4 times the \
               trained sides.",
        kind: OptionKind::Text { check: |text| factors(text).map(drop) },
    },
    OptionSpec {
        name: "redilate_steps",
        heading: HEADING,
        value_name: "N",
        help: "Plain convolutions from this step on (default: by model and size; with a request.redilate all steps are re-dilated)",
        kind: STEPS,
    },
    OptionSpec {
        name: "progressive",
        heading: HEADING,
        value_name: "BOOL",
        help: "Dilations shrink to 2 with the steps (default: by model and size; false with a request.redilate)",
        kind: OptionKind::Bool,
    },
    OptionSpec {
        name: "damped",
        heading: HEADING,
        value_name: "LIST",
        help: "Noise-damped guidance: the weaker dilations, as request.redilate (default: by model and size; none with a request.redilate)\n\n\
               A second call of the network with these, whose unconditional prediction is what guidance begins from.",
        kind: OptionKind::Text { check: |text| factors(text).map(drop) },
    },
    OptionSpec {
        name: "damped_steps",
        heading: HEADING,
        value_name: "N",
        help: "How many of the first steps have noise-damped guidance (default: by model and size; with a request.damped those re-dilated)",
        kind: STEPS,
    },
    OptionSpec {
        name: "disperse",
        heading: HEADING,
        value_name: "LIST",
        help: "Which of the re-dilated convolutions get 5x5 kernels and half the dilation: D3,M (default: none)\n\n\
               Made from the model's 3x3 kernels once, and kept beside them.",
        kind: OptionKind::Text { check: |text| convolutions::names(text).map(drop) },
    },
    OptionSpec {
        name: "disperse_steps",
        heading: HEADING,
        value_name: "N",
        help: "How many of the first steps have them (default: those re-dilated)",
        kind: STEPS,
    },
    FREEU,
];

impl From<ScaleCrafter> for Method {
    fn from(options: ScaleCrafter) -> Method {
        Method::of(&SCALECRAFTER, options)
    }
}

/// Names of groups or convolutions with their factors.
fn factors(text: &str) -> std::result::Result<Vec<(&str, f64)>, String> {
    let expected = || {
        format!(
            "expected NAME=FACTOR,..., a group (D2, M, U0) or a convolution and a factor from 1 to {}",
            Redilation::MOST
        )
    };
    fn entry(part: &str) -> Option<(&str, f64)> {
        let (name, factor) = part.split_once('=')?;
        let (name, factor) = (name.trim(), factor.trim().parse().ok()?);
        (!name.is_empty() && (1.0..=Redilation::MOST).contains(&factor)).then_some((name, factor))
    }
    text.split(',').map(|part| entry(part).ok_or_else(expected)).collect()
}

impl Map {
    /// The configuration for a size of these times the trained sides, the longer one first. Convolutions that a map lacks are
    /// left out.
    fn published(self, times: [f64; 2]) -> Option<Published> {
        const SD_2: &str = "D1=2,D2=2,D3=2,M=2,U0=2,U1=2,U2=2";
        const SD_2_5: &str = "D1=2.5,D2=2.5,D3=2.5,M=2.5,U0=2.5,U1=2.5,U2=2.5";
        const SD_4: &str = "D1=2,D2=3,D3=4,M=4,U0=4,U1=3,U2=2";
        const SD_1_WEAK: &str = "D2=3,D3=4,M=4,U0=4,U1=3";
        const SD_2X_4: &str = "D2=3,down_blocks.2.downsamplers.0.conv=4,D3=4,M=4,U0=4,U1=4,U2=3,U3=2";
        const SD_2X_WEAK: &str = "D2=3,down_blocks.2.downsamplers.0.conv=4,D3=4,M=4,U0=4,U1=4,U2=3";
        let plain = |redilate, tau| Published { redilate, tau, damped: "", damped_tau: 0, progressive: false };
        let damped = |redilate, tau, damped| Published { redilate, tau, damped, damped_tau: tau, progressive: true };
        Some(match (self, times) {
            (Map::Sd1, [2.0, 2.0]) => plain(SD_2, 30),
            (Map::Sd1, [2.5, 2.5]) => plain(SD_2_5, 35),
            (Map::Sd1, [4.0, 2.0] | [4.0, 4.0]) => damped(SD_4, 35, SD_1_WEAK),
            (Map::Sd2, [2.0, 2.0]) => plain(SD_2, 20),
            (Map::Sd2, [2.5, 2.5]) => plain(SD_2_5, 30),
            (Map::Sd2, [4.0, 2.0]) => Published { progressive: true, ..plain(SD_4, 37) },
            (Map::Sd2, [4.0, 4.0]) => damped(SD_2X_4, 37, SD_2X_WEAK),
            (Map::Sdxl, [2.0, 2.0]) => plain("M=2,U0=2", 30),
            (Map::Sdxl, [2.5, 2.5]) => plain("M=2.5,U0=2.5", 30),
            (Map::Sdxl, [4.0, 2.0]) => damped("D2=3,M=4,U0=4,U1=3,U2=2", 35, "M=2,U0=2"),
            (Map::Sdxl, [4.0, 4.0]) => damped("D2=4,M=4,U0=4,U1=3,U2=2", 35, "M=2,U0=2"),
            _ => return None,
        })
    }
}

/// A published configuration; the thresholds are of [`PUBLISHED_STEPS`].
struct Published {
    redilate: &'static str,
    tau: usize,
    damped: &'static str,
    damped_tau: usize,
    progressive: bool,
}

const PUBLISHED_STEPS: usize = 50;

type Factors = BTreeMap<ConvPlace, f64>;

/// What a run asks in which of its steps.
#[derive(Clone, Debug, PartialEq)]
struct Schedule {
    strong: Factors,
    /// Of noise-damped guidance.
    weak: Factors,
    dispersed: BTreeSet<ConvPlace>,
    redilate_steps: usize,
    damped_steps: usize,
    disperse_steps: usize,
    progressive: bool,
    freeu: Option<[FreeU; 2]>,
}

impl Schedule {
    /// At step `i` of the schedule.
    fn at(&self, i: usize) -> Prediction {
        let strong = self.options(&self.strong, self.redilate_steps, i);
        match i < self.damped_steps {
            true => Prediction::Damped { strong, weak: self.options(&self.weak, self.damped_steps, i) },
            false => strong.into(),
        }
    }

    fn options(&self, factors: &Factors, tau: usize, i: usize) -> UnetOptions {
        let of = |(&place, &factor): (&ConvPlace, &f64)| {
            let factor = match self.progressive {
                true => (factor * (tau - i) as f64 / tau as f64).ceil().max(2.0),
                false => factor,
            };
            let dispersed = i < self.disperse_steps && self.dispersed.contains(&place);
            (place, Redilation { factor: if dispersed { factor / 2.0 } else { factor }, dispersed })
        };
        let redilations = if i < tau { factors.iter().map(of).collect() } else { Default::default() };
        UnetOptions { redilations, freeu: self.freeu, ..UnetOptions::default() }
    }
}

impl Names {
    /// # Errors
    /// [`Error::Request`]: no list, or a name that the network does not have.
    fn factors(&self, field: &'static str, text: &str) -> Result<Factors> {
        let entries = factors(text).map_err(|reason| Error::Request { field, value: text.into(), reason })?;
        let mut factors = Factors::new();
        for (name, factor) in entries {
            factors.extend(self.find(field, name)?.into_iter().map(|place| (place, factor)));
        }
        Ok(plain_left_out(factors))
    }

    /// The same of a published list: what the network does not have is left out.
    fn published(&self, text: &str) -> Factors {
        let entries = factors(text).unwrap_or_default();
        let of = |(name, factor)| self.get(name).into_iter().map(move |place| (place, factor));
        plain_left_out(entries.into_iter().flat_map(of).collect())
    }
}

fn plain_left_out(mut factors: Factors) -> Factors {
    factors.retain(|_, factor| *factor != 1.0);
    factors
}

impl ScaleCrafter {
    fn schedule(&self, model: &ModelFacts, run: &Run) -> Result<Schedule> {
        let Some(unet) = &model.unet else {
            return Err(Error::config(format!("model {}", model.name), "scalecrafter is for networks that are UNets"));
        };
        let (map, names, steps) = (Map::of(unet), Names(unet.convolutions()), run.stages()[0].steps);
        let published = match &self.redilate {
            Some(_) => None,
            None => Some(published(map, run)?),
        };
        let share = |tau: usize| tau * steps / PUBLISHED_STEPS;
        let (strong, own_steps, own_progressive) = match (&self.redilate, &published) {
            (Some(list), _) => (names.factors("redilate", list)?, steps, false),
            (None, Some(own)) => (names.published(own.redilate), share(own.tau), own.progressive),
            (None, None) => (Factors::new(), 0, false),
        };
        let redilate_steps = self.redilate_steps.unwrap_or(own_steps);
        let (weak, own_steps) = match (&self.damped, &published) {
            (Some(list), _) => (names.factors("damped", list)?, redilate_steps),
            (None, Some(own)) => (names.published(own.damped), share(own.damped_tau)),
            (None, None) => (Factors::new(), 0),
        };
        let is_damped = self.damped.is_some() || published.is_some_and(|own| own.damped_tau > 0);
        if let Some(steps) = self.damped_steps.filter(|_| !is_damped) {
            let reason = "has no effect without request.damped: nothing is published for this model and size".into();
            return Err(Error::Request { field: "damped_steps", value: steps.to_string(), reason });
        }
        let damped_steps = self.damped_steps.unwrap_or(own_steps);
        let dispersed = match &self.disperse {
            None => BTreeSet::new(),
            Some(list) => names.listed("disperse", list)?,
        };
        Ok(Schedule {
            strong,
            weak,
            dispersed,
            redilate_steps,
            damped_steps: if run.guidance().is_some() { damped_steps } else { 0 },
            disperse_steps: self.disperse_steps.unwrap_or(redilate_steps.max(damped_steps)),
            progressive: self.progressive.unwrap_or(own_progressive),
            freeu: freeu_for(self.freeu.as_deref(), map)?,
        })
    }
}

/// # Errors
/// [`Error::Request`]: nothing is published for the model or the size.
fn published(map: Option<Map>, run: &Run) -> Result<Published> {
    let size = run.last_stage().size;
    let refuse = |reason: String| Error::Request { field: "redilate", value: "(none)".into(), reason };
    let give = "give request.redilate, as in M=2,U0=2";
    let Some(map) = map else {
        let reason = "the published factors are for SD's four levels and SDXL's three, and this network has others";
        return Err(refuse(format!("{reason}; {give}")));
    };
    let Some(native) = run.native() else {
        return Err(refuse(format!("the model's configuration has no sample_size to compare {size} with; {give}")));
    };
    let [w, h] =
        [(size.width, native.width), (size.height, native.height)].map(|(own, native)| own as f64 / native as f64);
    map.published([w.max(h), w.min(h)]).ok_or_else(|| {
        refuse(format!(
            "the published factors are for 2, 2.5, 4x2 and 4 times the trained {native}, and {size} is none of them; {give}"
        ))
    })
}

impl GenerationMethod for ScaleCrafter {
    fn sampler(&self, _: &SchedulerConfig) -> Sampler {
        Sampler::Ddim
    }

    fn eta(&self) -> f64 {
        1.0
    }

    /// That of a relay.
    fn default_size(&self, native: Size) -> Size {
        MegaFusion::default().default_size(native)
    }

    fn check(&self, run: &Run) -> Result<()> {
        let refuse = |field, value: String, reason: &str| Err(Error::Request { field, value, reason: reason.into() });
        if let Some(steps) = self.disperse_steps.filter(|_| self.disperse.is_none()) {
            return refuse("disperse_steps", steps.to_string(), "has no effect without request.disperse");
        }
        if let Some(list) = self.damped.as_ref().filter(|_| run.guidance().is_none()) {
            return refuse(
                "damped",
                list.clone(),
                "has no effect with a request.guidance up to 1: there is no guidance",
            );
        }
        if let Some(text) = &self.freeu {
            freeu_for(Some(text), None)?;
        }
        run.model().map_or(Ok(()), |model| self.schedule(model, run).map(drop))
    }

    /// The last latents.
    fn sample(&self, sampling: &mut Sampling) -> Result<Tensor> {
        let run = sampling.run();
        let model = run.model().ok_or_else(|| Error::config("scalecrafter", "the run says nothing of its model"))?;
        let (schedule, first) = (self.schedule(model, run)?, run.ranges()[0].start);
        sampling.prepare(vec![run.scheduler().clone()], |coefficients| coefficients)?;
        let x = sampling.first_samples()?;
        Ok(sampling.stage(0, x, &|step| schedule.at(first + step))?.0)
    }
}
