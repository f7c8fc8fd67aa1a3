//! FouriScale (Huang et al., ECCV 2024, arXiv:2403.12963): every step at the final size, where the network's convolutions are
//! dilated in the first steps, and see only what the trained ones would see of the frequencies.
//!
//! ```text
//! d    = the longer side over that of the base size, rounded up          the base size: what the network was trained at
//! d_i  = d for i < start, then max((d - 1) (stop - i) / (stop - start) + 1, 1); from stop on 1: nothing is changed
//! ```
//! - Structure (sec. 3.2): where d_i is above 1 a convolution has the dilation ceil(d_i) ([`FourierConvs`]).
//! - Scale (sec. 3.3): before it its input is low-pass filtered ([`spectral_filter`](crate::ops::spectral_filter)).
//! - Guidance (sec. 3.4): the conditional samples stand twice in a call ([`Prediction::Twins`]). The second ones, whose filter is
//!   gentler, have the self-attention of the first and are what guidance reads; the first are read by nothing else. SDXL's have the
//!   smaller dilation ceil(max(d_i / 1.5, 1)) too.
//! - FreeU (Si et al. 2023, arXiv:2309.11497) in every step, which the published code has on.
//!
//! SDXL's base size is that of its training sizes that covers the picture as often along both sides with the least to spare; it is
//! what the network is told as its size. The published code has these rules for two maps of blocks, SD's four levels and SDXL's
//! three, and goes by a trained 512x512 and by 1024x1024. What follows is our choice, where the code has no rule: maps of blocks decide,
//! whatever the model is called; a model of another trained size has that as its base, as has SDXL where no training size covers
//! the picture so; thresholds are of 50 steps, and are taken as shares of the steps, rounded down; SD's thresholds for up to 3 times
//! the sides are those of 2 and 2.5; a run from a picture begins at its own step of the schedule; a padded map of an odd side is one
//! larger; without guidance the samples stand twice all the same, and the second ones are the prediction. The published samples are
//! DDIM's with an eta of 1, guided by 7.5 (SD) and 5 (SDXL).

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::convolutions::{self, FREEU, Map, Names, freeu_for};
use super::method::{GenerationMethod, MethodSpec, OptionKind, OptionSpec, from_options};
use super::{MegaFusion, Method, ModelFacts, Prediction, Run, Sampling, Size};
use crate::error::{Error, Result};
use crate::models::{ConvPlace, ConvRole, FourierConvs, Redilation, UnetBlock, UnetOptions};
use crate::ops::FreeU;
use crate::runtime::Tensor;
use crate::schedulers::{Sampler, SchedulerConfig};

pub static FOURISCALE: MethodSpec = MethodSpec {
    name: "fouriscale",
    summary: "every step at the final size, convolutions dilated behind a low-pass filter (arXiv:2403.12963)",
    relays: false,
    choices: &[],
    options: OPTIONS,
    parse: |given| from_options(FouriScale::default(), given),
};

/// Huang et al. 2024, arXiv:2403.12963. `None`: as the published code does for the model and the size.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FouriScale {
    /// `D2,M,up_blocks.0.upsamplers.0.conv`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fourier: Option<String>,
    /// d
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fourier_dilation: Option<f64>,
    /// The step from which on d shrinks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fourier_start: Option<usize>,
    /// The first step in which nothing is changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fourier_stop: Option<usize>,
    /// What passes of the highest frequencies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fourier_floor: Option<f64>,
    /// 2.4 times the guidance before d shrinks.
    #[serde(default)]
    pub amplified_guidance: bool,
    /// `1.1,1.2,0.6,0.4` or `none`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeu: Option<String>,
}

const HEADING: &str = "FouriScale";

const STEPS: OptionKind =
    OptionKind::Integer { least: 0, most: u32::MAX as i64, expected: "expected a number of steps, 0 or more" };

/// In the order of the struct's fields.
const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "fourier",
        heading: HEADING,
        value_name: "LIST",
        help: "Which convolutions are filtered and dilated: D2,M,up_blocks.0.upsamplers.0.conv (default: by model)\n\n\
               A group, D0, D1, ... of the down blocks, M the mid block, U0, U1, ... of the up blocks, or one convolution by its \
               name. Upsamplers are dilated alone. SD D2,D3,M,U0,U1,U2; SDXL D2,M,U0,U1 without the last one's upsampler.",
        kind: OptionKind::Text { check: |text| convolutions::names(text).map(drop) },
    },
    OptionSpec {
        name: "fourier_dilation",
        heading: HEADING,
        value_name: "X",
        help: "How many times the trained sides the network shall see, above 0 to 32 (default: the picture's, rounded up)\n\n\
               1 and less: every step is plain.",
        kind: OptionKind::Number {
            above: 0.0,
            most: Redilation::MOST,
            expected: "expected a number above 0, at most 32",
        },
    },
    OptionSpec {
        name: "fourier_start",
        heading: HEADING,
        value_name: "N",
        help: "The dilation shrinks from this step on (default: 10 of 50 for SD up to 3 times the sides, else 20)",
        kind: STEPS,
    },
    OptionSpec {
        name: "fourier_stop",
        heading: HEADING,
        value_name: "N",
        help: "Plain convolutions from this step on (default: 30 of 50 for SD up to 3 times the sides, else 35)",
        kind: STEPS,
    },
    OptionSpec {
        name: "fourier_floor",
        heading: HEADING,
        value_name: "X",
        help: "What passes of the highest frequencies, 0 to 1 (default: 0.6 for SDXL, else 0)",
        kind: OptionKind::Share,
    },
    OptionSpec {
        name: "amplified_guidance",
        heading: HEADING,
        value_name: "BOOL",
        help: "2.4 times the guidance scale in the steps before request.fourier_start",
        kind: OptionKind::Switch,
    },
    FREEU,
];

/// By which guidance is amplified.
const AMPLIFIED: f32 = 2.4;

const PUBLISHED_STEPS: usize = 50;

impl From<FouriScale> for Method {
    fn from(options: FouriScale) -> Method {
        Method::of(&FOURISCALE, options)
    }
}

/// SDXL's training sizes: a height, and the widths that go with it (Podell et al. 2023, arXiv:2307.01952, appendix I).
const SDXL_SIZES: &[(usize, &[usize])] = &[
    (512, &[2048, 1984, 1920, 1856]),
    (576, &[1792, 1728, 1664]),
    (640, &[1600, 1536]),
    (704, &[1472, 1408, 1344]),
    (768, &[1344, 1280]),
    (832, &[1216, 1152]),
    (896, &[1152, 1088]),
    (960, &[1088, 1024]),
    (1024, &[1024, 960]),
    (1088, &[960, 896]),
    (1152, &[896, 832]),
    (1216, &[832]),
    (1280, &[768]),
    (1344, &[768]),
    (1408, &[704]),
    (1472, &[704]),
    (1536, &[640]),
    (1600, &[640]),
    (1664, &[576]),
    (1728, &[576]),
    (1792, &[576]),
    (1856, &[512]),
    (1920, &[512]),
    (1984, &[512]),
    (2048, &[512]),
];

/// How often `base` covers `size` along its height and its width.
fn times(size: Size, base: Size) -> [usize; 2] {
    [size.height.div_ceil(base.height), size.width.div_ceil(base.width)]
}

/// The training size that covers `size` equally often along both sides, and least beyond it; the first of several.
fn sdxl_base(size: Size) -> Option<Size> {
    let all = SDXL_SIZES.iter().flat_map(|&(height, widths)| widths.iter().map(move |&width| Size::new(width, height)));
    let beyond = |base: &Size| {
        let [r, _] = times(size, *base);
        (base.height * r - size.height) + (base.width * r - size.width)
    };
    all.filter(|base| times(size, *base)[0] == times(size, *base)[1]).min_by_key(beyond)
}

/// # Errors
/// [`Error::Request`]: the size that the model was trained at is unknown.
fn base_size(map: Option<Map>, run: &Run) -> Result<Size> {
    let size = run.last_stage().size;
    let Some(native) = run.native() else {
        let reason = format!("the model's configuration has no sample_size to compare {size} with");
        return Err(Error::Request { field: "method", value: FOURISCALE.name.into(), reason });
    };
    let trained_on_many = map == Some(Map::Sdxl) && native == Size::new(1024, 1024);
    Ok(sdxl_base(size).filter(|_| trained_on_many).unwrap_or(native))
}

/// What a run asks in which of its steps.
#[derive(Clone, Debug, PartialEq)]
struct Schedule {
    /// With the factors of the first step; none where nothing is ever changed.
    convs: Option<FourierConvs>,
    /// By what the twins' dilation is smaller.
    twins: f64,
    start: usize,
    stop: usize,
    /// Of the guidance before `start`.
    amplified: f32,
    freeu: Option<[FreeU; 2]>,
}

impl Schedule {
    /// At step `i` of the schedule.
    fn at(&self, i: usize) -> Prediction {
        let factor = |d: f64| match i < self.start {
            true => d,
            false => ((d - 1.0) * ((self.stop - i) as f64 / (self.stop - self.start) as f64) + 1.0).max(1.0),
        };
        let of_step = |convs: &FourierConvs| {
            let factor = factor(convs.factor);
            let twin_factor = (factor / self.twins).max(1.0);
            (factor > 1.0).then(|| FourierConvs { factor, twin_factor, ..convs.clone() })
        };
        let fourier = self.convs.as_ref().filter(|_| i < self.stop).and_then(of_step);
        let amplified = if i < self.start { self.amplified } else { 1.0 };
        let plain = fourier.is_none() && amplified == 1.0;
        let options = UnetOptions { freeu: self.freeu, fourier, ..UnetOptions::default() };
        match plain {
            true => options.into(),
            false => Prediction::Twins { options, amplified },
        }
    }
}

impl FouriScale {
    fn schedule(&self, model: &ModelFacts, run: &Run) -> Result<Schedule> {
        let Some(unet) = &model.unet else {
            return Err(Error::config(format!("model {}", model.name), "fouriscale is for networks that are UNets"));
        };
        let (map, names, steps) = (Map::of(unet), Names(unet.convolutions()), run.stages()[0].steps);
        let refuse = |field, value: String, reason: String| Err(Error::Request { field, value, reason });
        let places = match (&self.fourier, map) {
            (Some(list), _) => names.listed("fourier", list)?,
            (None, Some(Map::Sd1 | Map::Sd2)) => names.groups(&["D2", "D3", "M", "U0", "U1", "U2"]),
            (None, Some(Map::Sdxl)) => {
                let last = ConvPlace { block: UnetBlock::Up(1), role: ConvRole::Sampler };
                let mut places = names.groups(&["D2", "M", "U0", "U1"]);
                places.remove(&last);
                places
            }
            (None, None) => {
                let reason = "the published convolutions are of SD's four levels and SDXL's three, and this network has others; \
                              give request.fourier, as in M,U0";
                return refuse("fourier", "(none)".into(), reason.into());
            }
        };
        let (size, base) = (run.last_stage().size, base_size(map, run)?);
        let own = times(size, base).into_iter().max().unwrap_or(1);
        let d = self.fourier_dilation.unwrap_or(own as f64);
        let is_sdxl = map == Some(Map::Sdxl);
        let (start, stop) = if !is_sdxl && own <= 3 { (10, 30) } else { (20, 35) };
        let share = |threshold: usize| threshold * steps / PUBLISHED_STEPS;
        let (start, stop) = match (self.fourier_start, self.fourier_stop) {
            (Some(start), Some(stop)) => (start, stop),
            (Some(start), None) => (start, share(stop).max(start)),
            (None, Some(stop)) => (share(start).min(stop), stop),
            (None, None) => (share(start), share(stop)),
        };
        let convs = FourierConvs {
            places: Arc::new(places),
            factor: d.max(1.0),
            twin_factor: 1.0,
            floor: self.fourier_floor.unwrap_or(if is_sdxl { 0.6 } else { 0.0 }),
            base: [base.height, base.width].map(|side| side.div_ceil(run.factor())),
        };
        let guided = run.guidance().is_some();
        if d > 1.0 {
            UnetOptions { fourier: Some(convs.clone()), ..UnetOptions::default() }.check(unet)?;
        }
        Ok(Schedule {
            convs: (d > 1.0).then_some(convs),
            twins: if is_sdxl { 1.5 } else { 1.0 },
            start,
            stop,
            amplified: if self.amplified_guidance && guided { AMPLIFIED } else { 1.0 },
            freeu: freeu_for(self.freeu.as_deref(), map)?,
        })
    }
}

impl GenerationMethod for FouriScale {
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

    /// The base size.
    fn told_size(&self, run: &Run, stage: usize) -> Size {
        let map = run.model().and_then(|model| model.unet.as_ref()).and_then(Map::of);
        base_size(map, run).unwrap_or(run.stages()[stage].size)
    }

    fn check(&self, run: &Run) -> Result<()> {
        let refuse = |field, value: String, reason: String| Err(Error::Request { field, value, reason });
        if let (Some(start), Some(stop)) = (self.fourier_start, self.fourier_stop)
            && start > stop
        {
            let reason = format!("is behind request.fourier_stop {stop}; expected at most that");
            return refuse("fourier_start", start.to_string(), reason);
        }
        if let Some(d) = self.fourier_dilation.filter(|d| !(*d > 0.0 && *d <= Redilation::MOST)) {
            return refuse("fourier_dilation", d.to_string(), "expected a number above 0, at most 32".into());
        }
        if let Some(floor) = self.fourier_floor.filter(|floor| !(0.0..=1.0).contains(floor)) {
            return refuse("fourier_floor", floor.to_string(), "expected a number from 0 to 1".into());
        }
        if self.amplified_guidance && run.guidance().is_none() {
            let reason = "has no effect with a request.guidance up to 1: there is no guidance";
            return refuse("amplified_guidance", "true".into(), reason.into());
        }
        if let Some(text) = &self.freeu {
            freeu_for(Some(text), None)?;
        }
        run.model().map_or(Ok(()), |model| self.schedule(model, run).map(drop))
    }

    /// The last latents.
    fn sample(&self, sampling: &mut Sampling) -> Result<Tensor> {
        let run = sampling.run();
        let model = run.model().ok_or_else(|| Error::config("fouriscale", "the run says nothing of its model"))?;
        let (schedule, first) = (self.schedule(model, run)?, run.ranges()[0].start);
        sampling.prepare(vec![run.scheduler().clone()], |coefficients| coefficients)?;
        let x = sampling.first_samples()?;
        Ok(sampling.stage(0, x, &|step| schedule.at(first + step))?.0)
    }
}
