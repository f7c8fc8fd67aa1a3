//! Step caches: a step whose network output can be told from those before it does without the network. Off by default; one
//! piece for every sampler, and for every method whose steps see the whole map. The three are those of stable-diffusion.cpp
//! (docs/methods.md), its names and defaults included.
//!
//! ucache, easycache (EasyCache: Zhou et al. 2025, arXiv:2507.02860) reuse the change that the network made last, where little
//! has changed since. u is what the network reads, o what it gives; |.| is the mean absolute value over all elements:
//! ```text
//! d = |u - u_prev|, k = |o - o_prev| / d of the last two computed steps       *_prev: of the last computed step
//! easycache:  E += k d / |o_prev|;  reuse where E < threshold, else E = 0
//! ucache:     E  = decay E + k d / scale (1 + skips / 2);  reuse where E < threshold times 0.5, 1 or 1.5
//! reuse:      o := u + (o_prev - u_prev), each condition's own; the positive one decides for all
//! ```
//! spectrum predicts the guided clean samples of a step from those of computed steps h_k, at tau_k = k / 25 - 1, by a ridge
//! regression in Chebyshev polynomials T_0..T_m and a line through the last two:
//! ```text
//! x0 := w sum_k a_k h_k + (1 - w) (h_last + (h_last - h_prev) / 2),     a = X (X'X + lam I)^-1 T(tau),  X = [T_j(tau_k)]
//! ```
//! Which steps it predicts follows from their number alone. Either way the last step of a stage is computed, as are second
//! evaluations of a step; everything begins anew with each stage.
//!
//! Where u and o decide, their means are taken on the device: a number or two come to the host, which waits for them twice
//! per computed step, and once per step that is reused.

use std::collections::VecDeque;
use std::ops::Range;

use super::{Run, StageSteps};
use crate::error::{Error, Result};
use crate::names::{named, one_of};
use crate::ops::{self, StepTable};
use crate::runtime::{DType, Device, Tensor};
use crate::schedulers::Scheduler;

/// Which cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CacheKind {
    Ucache,
    Easycache,
    Spectrum,
}

named!(CacheKind, [Ucache => "ucache", Easycache => "easycache", Spectrum => "spectrum"]);

/// A cache with its options.
#[derive(Clone, Debug, PartialEq)]
pub struct StepCache {
    kind: CacheKind,
    /// In the order of [`CacheKind::options`].
    values: Vec<f64>,
}

/// An option of a cache: a number.
#[derive(Debug)]
pub struct CacheOption {
    pub name: &'static str,
    pub default: f64,
    pub least: f64,
    pub most: f64,
    /// Only whole numbers?
    pub whole: bool,
}

const fn number(name: &'static str, default: f64, least: f64, most: f64) -> CacheOption {
    CacheOption { name, default, least, most, whole: false }
}

const fn whole(name: &'static str, default: f64, least: f64, most: f64) -> CacheOption {
    CacheOption { name, default, least, most, whole: true }
}

impl CacheKind {
    pub fn options(self) -> &'static [CacheOption] {
        const UCACHE: &[CacheOption] = &[
            number("threshold", 1.0, 0.0, 1e6),
            number("start", 0.15, 0.0, 1.0),
            number("end", 0.95, 0.0, 1.0),
            number("decay", 1.0, 0.0, 1.0),
            whole("relative", 1.0, 0.0, 1.0),
            whole("reset", 1.0, 0.0, 1.0),
        ];
        const EASYCACHE: &[CacheOption] =
            &[number("threshold", 0.2, 0.0, 1e6), number("start", 0.15, 0.0, 1.0), number("end", 0.95, 0.0, 1.0)];
        const SPECTRUM: &[CacheOption] = &[
            number("w", 0.4, 0.0, 1.0),
            whole("m", 3.0, 0.0, 16.0),
            number("lam", 1.0, 0.0, 1e6),
            number("window", 2.0, 1.0, 1e3),
            number("flex", 0.5, 0.0, 1e3),
            whole("warmup", 4.0, 0.0, 1e3),
            number("stop", 0.9, 0.0, 1.0),
            whole("center", 0.0, 0.0, 1.0),
        ];
        match self {
            CacheKind::Ucache => UCACHE,
            CacheKind::Easycache => EASYCACHE,
            CacheKind::Spectrum => SPECTRUM,
        }
    }
}

fn refused(field: &'static str, value: impl ToString, reason: impl Into<String>) -> Error {
    Error::Request { field, value: value.to_string(), reason: reason.into() }
}

impl StepCache {
    /// `options`: `threshold=0.5,start=0.2`, the rest being the defaults.
    ///
    /// # Errors
    /// [`Error::Request`]: the name of no cache; an option that the cache does not have, given twice or out of its range;
    /// `start` not before `end`.
    pub fn new(name: &str, options: &str) -> Result<StepCache> {
        let kind: CacheKind =
            name.parse().map_err(|_| refused("cache", name, format!("expected {}", one_of(CacheKind::NAMES))))?;
        let known = kind.options();
        let refuse = |part: &str, reason: String| Err(refused("cache_options", part, reason));
        let mut given: Vec<Option<f64>> = vec![None; known.len()];
        for part in options.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let Some((key, text)) = part.split_once('=').map(|(key, text)| (key.trim(), text.trim())) else {
                return refuse(part, "expected key=value, separated by commas".into());
            };
            let Some(at) = known.iter().position(|option| option.name == key) else {
                let names: Vec<&str> = known.iter().map(|option| option.name).collect();
                return refuse(part, format!("{kind} has no option {key:?}; it has {}", names.join(", ")));
            };
            let CacheOption { least, most, whole, .. } = known[at];
            let fits = |value: &f64| (least..=most).contains(value) && (!whole || value.fract() == 0.0);
            match text.parse().ok().filter(fits) {
                _ if given[at].is_some() => return refuse(part, format!("{key} is given twice")),
                Some(value) => given[at] = Some(value),
                None => {
                    let number = if whole { "a whole number" } else { "a number" };
                    return refuse(part, format!("expected {number} from {least} to {most}"));
                }
            }
        }
        let values = known.iter().zip(given).map(|(option, given)| given.unwrap_or(option.default)).collect();
        let cache = StepCache { kind, values };
        if kind != CacheKind::Spectrum && cache.value("start") >= cache.value("end") {
            let (start, end) = (cache.value("start"), cache.value("end"));
            return refuse(&format!("start={start},end={end}"), "the start must come before the end".into());
        }
        Ok(cache)
    }

    pub fn kind(&self) -> CacheKind {
        self.kind
    }

    fn value(&self, name: &str) -> f64 {
        let at = self.kind.options().iter().position(|option| option.name == name);
        at.map_or(0.0, |at| self.values[at])
    }

    fn is_set(&self, name: &str) -> bool {
        self.value(name) != 0.0
    }

    /// All options, as [`new`](StepCache::new) reads them.
    pub fn options_text(&self) -> String {
        let options = self.kind.options().iter().zip(&self.values);
        options.map(|(option, value)| format!("{}={value}", option.name)).collect::<Vec<_>>().join(",")
    }

    /// Do the samples of a picture decide which of its steps are computed? Pictures are then made one by one, so that none
    /// depends on the others of a batch.
    pub fn decides_by_picture(&self) -> bool {
        self.kind != CacheKind::Spectrum
    }

    /// Can a run be made with it?
    ///
    /// # Errors
    /// [`Error::Request`]: the method's steps go over views of the map; what it relays is no clean sample of a step.
    pub(super) fn check(&self, run: &Run) -> Result<()> {
        let method = run.method();
        if method.implementation().steps_over_views() {
            let reason = format!("has no effect with request.method {method}, whose steps go over views of the map");
            return Err(refused("cache", self.kind, reason));
        }
        let compat = method.option("reference_compat").and_then(serde_json::Value::as_bool) == Some(true);
        if compat && self.kind == CacheKind::Spectrum {
            let reason = "predicts the clean samples of a step, which request.reference_compat computes in another way";
            return Err(refused("cache", self.kind, reason));
        }
        Ok(())
    }

    /// The cache of a stage, which takes `range` of the schedule's steps.
    pub(super) fn begin(&self, scheduler: &Scheduler, range: Range<usize>) -> StageCache {
        let steps = range.len();
        let decides = match self.kind {
            CacheKind::Spectrum => Decides::Predict { spectrum: Spectrum::new(self, steps), clean: VecDeque::new() },
            CacheKind::Ucache => {
                let at = |share: f64| ((share * steps as f64) as usize).min(steps.saturating_sub(1));
                let (first, end) = (at(self.value("start")), at(self.value("end")));
                let active = (0..steps).map(|step| (first..end).contains(&step)).collect();
                Decides::Reuse { change: Change::new(self, steps), active, output: None }
            }
            CacheKind::Easycache => {
                let last = scheduler.alphas_cumprod().len().saturating_sub(1) as f64;
                let limit = |name: &str| (1.0 - self.value(name)) * last;
                let (from, to) = (limit("start"), limit("end"));
                let is_active = |step: usize| {
                    let t = scheduler.training_timestep(step);
                    t <= from && t > to
                };
                let active = range.map(is_active).collect();
                Decides::Reuse { change: Change::new(self, steps), active, output: None }
            }
        };
        StageCache { decides, steps, keeps: false }
    }
}

/// What becomes of a step's first evaluation.
pub(super) enum StepWork {
    Compute(Caching),
    /// The clean samples, without the network.
    Predicted(Tensor),
}

/// What an evaluation does with the output of the network. Evaluations that differ in it do other work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Caching {
    #[default]
    Off,
    /// The network's input and output are kept.
    Keep,
    /// The output is told from those kept; the network is not asked.
    Reuse,
}

/// The network's input and output of the last computed step, `[N, h, w, C]` or with guidance `[2 N, h, w, C]`, f32.
pub(super) struct KeptOutput {
    input: Tensor,
    output: Tensor,
}

impl KeptOutput {
    pub(super) fn uninit(device: &Device, shape: &[usize]) -> Result<KeptOutput> {
        let uninit = || Tensor::uninit(device, shape, DType::F32);
        Ok(KeptOutput { input: uninit()?, output: uninit()? })
    }

    fn scaled(&self, x: &Tensor, table: &StepTable) -> Result<Tensor> {
        ops::scale_input(x, table, DType::F32, self.input.shape()[0] / x.shape()[0].max(1))
    }

    /// What the network made of samples `x`. Work that a card can record.
    pub(super) fn keep(&mut self, x: &Tensor, table: &StepTable, output: &Tensor) -> Result<()> {
        let input = self.scaled(x, table)?;
        self.input.copy_from(&input)?;
        self.output.copy_from(&ops::scale_cast(output, 1.0, 0.0, DType::F32, 1)?)
    }

    /// What the network would make of samples `x`, f32. Work that a card can record.
    pub(super) fn reuse(&self, x: &Tensor, table: &StepTable) -> Result<Tensor> {
        let change = ops::add_scaled(&self.output, &self.input, -1.0)?;
        ops::add(&self.scaled(x, table)?, &change)
    }

    /// Input and output of the condition that decides: the positive one, the last N rows.
    fn anchor(&self, images: usize) -> Result<[Tensor; 2]> {
        let rows = self.output.shape()[0];
        let last = rows.saturating_sub(images)..rows;
        Ok([self.input.rows(last.clone())?, self.output.rows(last)?])
    }
}

/// A cache in a stage.
pub(super) struct StageCache {
    decides: Decides,
    steps: usize,
    /// Is the step that is evaluated one to be kept?
    keeps: bool,
}

enum Decides {
    Reuse {
        change: Change,
        /// Of each step: may it be reused?
        active: Vec<bool>,
        /// o of the last computed step, of the condition that decides.
        output: Option<Tensor>,
    },
    Predict {
        spectrum: Spectrum,
        /// Clean samples of the latest computed steps, the latest last.
        clean: VecDeque<Tensor>,
    },
}

impl StageCache {
    /// What is to be done in step `step` (from 0), whose first evaluation is next.
    ///
    /// # Errors
    /// Those of the device.
    pub(super) fn work(&mut self, step: usize, on_device: &StageSteps) -> Result<StepWork> {
        let is_last = step + 1 == self.steps;
        let x = on_device.state().x();
        match &mut self.decides {
            Decides::Predict { spectrum, clean } => match spectrum.next(is_last || !on_device.can_step_to_clean()) {
                Some(weights) => Ok(StepWork::Predicted(weighted_sum(clean, &weights)?)),
                None => Ok(StepWork::Compute(Caching::Off)),
            },
            Decides::Reuse { active, .. } if !active[step] => Ok(StepWork::Compute(Caching::Off)),
            Decides::Reuse { change, output, .. } => {
                let distance = match (output, on_device.kept_output()) {
                    (Some(_), Some(kept)) => {
                        let [input, _] = kept.anchor(x.shape()[0])?;
                        let change = ops::add_scaled(&input, x, -on_device.next_input_scale())?;
                        mean_absolutes(&[&change])?.map(|[distance]| distance)
                    }
                    _ => None,
                };
                // Without data none is left out: the most that a run costs.
                if !matches!(x.device(), Device::Meta(_)) && change.reuses(distance) && !is_last {
                    return Ok(StepWork::Compute(Caching::Reuse));
                }
                self.keeps = true;
                Ok(StepWork::Compute(Caching::Keep))
            }
        }
    }

    /// The first evaluation of a step is done; `computed`: by the network.
    ///
    /// # Errors
    /// Those of the device.
    pub(super) fn evaluated(&mut self, computed: bool, on_device: &StageSteps) -> Result<()> {
        match &mut self.decides {
            Decides::Predict { spectrum, clean } if computed => {
                clean.push_back(on_device.state().x0().duplicate()?);
                if clean.len() > spectrum.most_kept() {
                    clean.pop_front();
                }
            }
            Decides::Predict { .. } => {}
            Decides::Reuse { change, output, .. } => {
                let Some(kept) = on_device.kept_output().filter(|_| std::mem::take(&mut self.keeps)) else {
                    return Ok(());
                };
                let [_, now] = kept.anchor(on_device.state().x().shape()[0])?;
                match output {
                    None => {
                        if let Some([norm]) = mean_absolutes(&[&now])? {
                            change.computed(None, norm);
                        }
                        *output = Some(now.duplicate()?);
                    }
                    Some(last) => {
                        let difference = ops::add_scaled(&now, last, -1.0)?;
                        if let Some([moved, norm]) = mean_absolutes(&[&difference, &now])? {
                            change.computed(Some(moved), norm);
                        }
                        last.copy_from(&now)?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// The mean absolute values of tensors `[N, ...]` of one shape, f32, which are taken on their device and come to the host
/// together. `None`: they have no data.
fn mean_absolutes<const COUNT: usize>(tensors: &[&Tensor; COUNT]) -> Result<Option<[f64; COUNT]>> {
    let mut all: Option<Tensor> = None;
    for x in tensors {
        // |x| = x - 2 min(x, 0), which rounds nothing.
        let absolute = ops::add_scaled(x, &ops::clamp(x, f32::MIN, 0.0)?, -2.0)?;
        let moments = ops::latent_moments(&absolute, 0)?;
        all = Some(match all {
            None => moments,
            Some(all) => ops::concat(&all, &moments)?,
        });
    }
    let Some(all) = all.filter(|all| !matches!(all.device(), Device::Meta(_))) else { return Ok(None) };
    // Of each image a mean and a deviation per tensor.
    let values = all.to_f32_vec()?;
    let images = values.len() / (2 * COUNT).max(1);
    let mean =
        |of: usize| values.chunks(2 * COUNT).map(|image| f64::from(image[2 * of])).sum::<f64>() / images.max(1) as f64;
    Ok(Some(std::array::from_fn(mean)))
}

/// `sum_k weights[k] clean[k]`
fn weighted_sum(clean: &VecDeque<Tensor>, weights: &[f64]) -> Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    for (clean, &weight) in clean.iter().zip(weights) {
        sum = Some(match sum {
            None => ops::scale_cast(clean, weight as f32, 0.0, DType::F32, 1)?,
            Some(sum) => ops::add_scaled(&sum, clean, weight as f32)?,
        });
    }
    sum.ok_or_else(|| Error::config("step cache", "predicts from no clean sample"))
}

/// Whether the output of a step can be told from that of the last computed one: ucache and easycache.
struct Change {
    ucache: bool,
    threshold: f64,
    decay: f64,
    relative: bool,
    reset: bool,
    steps: f64,
    /// d of this step.
    distance: Option<f64>,
    /// k
    rate: Option<f64>,
    /// |o| of the last computed step.
    norm: f64,
    /// E
    error: f64,
    skips: f64,
    computed: f64,
    /// A running mean of |o - o_prev|.
    mean_change: Option<f64>,
}

/// Below it a scale is none.
const SMALLEST_SCALE: f64 = 1e-6;

impl Change {
    fn new(cache: &StepCache, steps: usize) -> Change {
        Change {
            ucache: cache.kind == CacheKind::Ucache,
            threshold: cache.value("threshold"),
            decay: cache.value("decay"),
            relative: cache.is_set("relative"),
            reset: cache.is_set("reset"),
            steps: steps as f64,
            distance: None,
            rate: None,
            norm: 0.0,
            error: 0.0,
            skips: 0.0,
            computed: 0.0,
            mean_change: None,
        }
    }

    /// Is the step whose input is `distance` from that of the last computed one, if there is one, to be reused?
    fn reuses(&mut self, distance: Option<f64>) -> bool {
        self.distance = distance;
        let (Some(distance), Some(rate)) = (self.distance.filter(|&d| d > 0.0), self.rate) else { return false };
        if self.norm <= 0.0 {
            return false;
        }
        if !self.ucache {
            self.error += rate * distance / self.norm;
            let reuses = self.error < self.threshold;
            if !reuses {
                self.error = 0.0;
            }
            return reuses;
        }
        let scale = match (self.relative, self.mean_change) {
            (false, _) => 1.0,
            (true, Some(mean)) => (self.norm * 1.6 * mean).sqrt().max(SMALLEST_SCALE),
            (true, None) => self.norm.max(SMALLEST_SCALE),
        };
        self.error = self.decay * self.error + rate * distance / scale * (1.0 + 0.5 * self.skips);
        let share = self.computed / self.steps;
        let mut limit = self.threshold
            * if share < 0.2 {
                0.5
            } else if share > 0.8 {
                1.5
            } else {
                1.0
            };
        if !self.relative {
            limit *= self.norm;
        }
        let reuses = self.error < limit;
        if reuses {
            self.skips += 1.0;
        } else if self.reset {
            self.error = 0.0;
        }
        reuses
    }

    /// The network made an output of this norm, `change` from that of the last computed step, if there is one.
    fn computed(&mut self, change: Option<f64>, norm: f64) {
        if let Some(change) = change {
            if let Some(distance) = self.distance.filter(|&distance| distance > 0.0 && change > 0.0) {
                self.rate = Some(change / distance);
            }
            if change > 0.0 {
                self.mean_change = Some(self.mean_change.map_or(change, |mean| 0.8 * mean + 0.2 * change));
            }
        }
        self.norm = norm;
        self.skips = 0.0;
        self.computed += 1.0;
        if !self.ucache {
            self.error = 0.0;
        }
    }
}

/// Which steps are predicted, and from what.
struct Spectrum {
    w: f64,
    degree: usize,
    lam: f64,
    flex: f64,
    warmup: usize,
    /// From this step on all are computed; 0: from none.
    stop: usize,
    center: bool,
    /// Grows with every computed step after the warm-up.
    window: f64,
    /// c
    step: usize,
    /// Predicted ones since the last computed one.
    predicted: usize,
    /// tau of the latest computed steps, the latest last.
    taus: VecDeque<f64>,
}

impl Spectrum {
    fn new(cache: &StepCache, steps: usize) -> Spectrum {
        Spectrum {
            w: cache.value("w"),
            degree: cache.value("m") as usize,
            lam: cache.value("lam"),
            flex: cache.value("flex"),
            warmup: cache.value("warmup") as usize,
            stop: (cache.value("stop") * steps as f64) as usize,
            center: cache.is_set("center"),
            window: cache.value("window"),
            step: 0,
            predicted: 0,
            taus: VecDeque::new(),
        }
    }

    /// How many clean samples a prediction reads at most.
    fn most_kept(&self) -> usize {
        (self.degree + 1).max(6)
    }

    /// What each kept clean sample weighs in those of the next step; `None`: that one is computed, and kept. `compute`: in any
    /// case.
    fn next(&mut self, compute: bool) -> Option<Vec<f64>> {
        let step = self.step;
        self.step += 1;
        let stopped = self.stop > 0 && step >= self.stop;
        let due = (self.predicted + 1).is_multiple_of((self.window as usize).max(1));
        // 25 whatever the number of steps: half of the usual 50.
        let tau = step as f64 / 25.0 - 1.0;
        let weights = match step >= self.warmup && !stopped && !compute && self.taus.len() >= 2 && !due {
            true => self.weights(tau),
            false => None,
        };
        if weights.is_some() {
            self.predicted += 1;
            return weights;
        }
        self.taus.push_back(tau);
        if self.taus.len() > self.most_kept() {
            self.taus.pop_front();
        }
        self.predicted = 0;
        if step >= self.warmup {
            self.window += self.flex;
        }
        None
    }

    /// `None`: the equations have no solution.
    fn weights(&self, tau: f64) -> Option<Vec<f64>> {
        let basis: Vec<Vec<f64>> = self.taus.iter().map(|&tau| chebyshev(tau, self.degree)).collect();
        let count = self.degree + 1;
        let mut gram = vec![vec![0.0; count]; count];
        for (i, row) in gram.iter_mut().enumerate() {
            for (j, value) in row.iter_mut().enumerate() {
                *value = basis.iter().map(|of| of[i] * of[j]).sum::<f64>() + if i == j { self.lam } else { 0.0 };
            }
        }
        let at = chebyshev(tau, self.degree);
        let solved = solve(&gram, &at).or_else(|| {
            let added = 1e-4 * (0..count).map(|i| gram[i][i]).sum::<f64>() / count as f64;
            (0..count).for_each(|i| gram[i][i] += added);
            solve(&gram, &at)
        })?;
        let mut fitted: Vec<f64> = basis.iter().map(|of| of.iter().zip(&solved).map(|(a, b)| a * b).sum()).collect();
        let last = fitted.len() - 1;
        if self.center {
            // The fit is one of differences to the last clean samples: a constant is kept.
            fitted[last] += 1.0 - fitted.iter().sum::<f64>();
        }
        let mut weights: Vec<f64> = fitted.iter().map(|fitted| self.w * fitted).collect();
        weights[last] += 1.5 * (1.0 - self.w);
        weights[last - 1] -= 0.5 * (1.0 - self.w);
        Some(weights)
    }
}

/// T_0 to T_degree at `tau`.
fn chebyshev(tau: f64, degree: usize) -> Vec<f64> {
    let mut values = vec![1.0, tau];
    for j in 2..=degree {
        values.push(2.0 * tau * values[j - 1] - values[j - 2]);
    }
    values.truncate(degree + 1);
    values
}

/// The solution of a symmetric positive definite system, by Cholesky; `None`: it is not positive definite.
fn solve(matrix: &[Vec<f64>], right: &[f64]) -> Option<Vec<f64>> {
    let n = right.len();
    let mut lower = vec![vec![0.0; n]; n];
    for i in 0..n {
        for j in 0..=i {
            let rest = matrix[i][j] - (0..j).map(|k| lower[i][k] * lower[j][k]).sum::<f64>();
            lower[i][j] = match i == j {
                true if rest > 0.0 => rest.sqrt(),
                true => return None,
                false => rest / lower[j][j],
            };
        }
    }
    let mut x = right.to_vec();
    for i in 0..n {
        x[i] = (x[i] - (0..i).map(|k| lower[i][k] * x[k]).sum::<f64>()) / lower[i][i];
    }
    for i in (0..n).rev() {
        x[i] = (x[i] - (i + 1..n).map(|k| lower[k][i] * x[k]).sum::<f64>()) / lower[i][i];
    }
    Some(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spectrum(options: &str, steps: usize) -> Spectrum {
        Spectrum::new(&StepCache::new("spectrum", options).unwrap(), steps)
    }

    fn pattern(options: &str, steps: usize) -> String {
        let mut spectrum = spectrum(options, steps);
        (0..steps).map(|step| if spectrum.next(step + 1 == steps).is_some() { '.' } else { 'C' }).collect()
    }

    #[test]
    fn which_steps_spectrum_computes() {
        assert_eq!(pattern("", 20), "CCCC.C.C..C..C...CCC");
        assert_eq!(pattern("", 28), "CCCC.C.C..C..C...C...C...CCC");
        assert_eq!(pattern("", 50).matches('C').count(), 19);
        assert_eq!(pattern("warmup=20", 20), "C".repeat(20));
        assert_eq!(pattern("window=1,flex=0", 9), "C".repeat(9));
        // The last step of a stage is computed.
        assert_eq!(pattern("stop=0,window=9,flex=0,warmup=0", 8), "CC.....C");
        assert_eq!(pattern("", 1), "C");
    }

    /// The figures are worked out from the formulas in f64 by another program.
    #[test]
    fn what_spectrum_predicts_from() {
        let near = |got: &[f64], want: [f64; 4]| {
            assert!(got.len() == 4 && got.iter().zip(want).all(|(got, want)| (got - want).abs() < 2e-6), "{got:?}");
        };
        let fifth = |options: &str| {
            let mut spectrum = spectrum(options, 20);
            (0..5).map(|_| spectrum.next(false)).last().flatten().unwrap()
        };
        near(&fifth("w=1"), [0.006414, 0.133668, 0.247159, 0.347443]);
        near(&fifth(""), [0.002566, 0.053467, -0.201136, 1.038977]);
        near(&fifth("w=0"), [0.0, 0.0, -0.5, 1.5]);
        let centered: f64 = fifth("center=1").iter().sum();
        assert!((centered - 1.0).abs() < 1e-12, "{centered}");
    }

    /// Without the ridge four clean samples fix a cubic, and the fit goes through it.
    #[test]
    fn without_a_ridge_a_cubic_is_continued() {
        let mut spectrum = spectrum("lam=0,w=1,m=3", 20);
        let weights = (0..5).map(|_| spectrum.next(false)).last().flatten().unwrap();
        let cubic = |step: usize| (step as f64 - 1.7).powi(3) + 2.0 * step as f64;
        let got: f64 = weights.iter().enumerate().map(|(step, weight)| weight * cubic(step)).sum();
        assert!((got - cubic(4)).abs() < 1e-3, "{got} {}", cubic(4));
    }

    /// u falls by 1 at each step, o, where it is computed, rises by 1/8 from 3.
    fn decisions(name: &str, options: &str, steps: usize) -> String {
        let mut change = Change::new(&StepCache::new(name, options).unwrap(), steps);
        let mut last: Option<usize> = None;
        let decide = |step: usize| {
            let since = last.map(|last| (step - last) as f64);
            if change.reuses(since) {
                return '.';
            }
            change.computed(since.map(|steps| 0.125 * steps), 3.0 + 0.125 * step as f64);
            last = Some(step);
            'C'
        };
        (0..steps).map(decide).collect()
    }

    #[test]
    fn which_steps_a_small_change_reuses() {
        // k = 1/8: the third step adds 0.125 / 3.125 = 0.04 to E, the next 0.08: 0.12 in all, then 0.24.
        assert_eq!(decisions("easycache", "threshold=0.2", 9), "CC..C..C.");
        assert_eq!(decisions("easycache", "threshold=0.041", 5), "CC.C.");
        assert_eq!(decisions("easycache", "threshold=0.04", 5), "CCC.C");
        assert_eq!(decisions("easycache", "threshold=0", 9), "C".repeat(9));
        assert_eq!(decisions("ucache", "threshold=0", 9), "C".repeat(9));
    }

    #[test]
    fn options_are_read_and_mistakes_are_named() {
        let cache = StepCache::new("ucache", " threshold=0.5 , reset=0,").unwrap();
        assert_eq!(cache.options_text(), "threshold=0.5,start=0.15,end=0.95,decay=1,relative=1,reset=0");
        assert_eq!(StepCache::new("ucache", &cache.options_text()).unwrap(), cache);
        for (name, options, wanted) in [
            ("teacache", "", "cache teacache: expected ucache, easycache or spectrum"),
            ("ucache", "threshold", "cache_options threshold: expected key=value"),
            ("ucache", "m=3", "ucache has no option \"m\"; it has threshold, start, end, decay, relative, reset"),
            ("easycache", "threshold=-1", "threshold=-1: expected a number from 0 to 1000000"),
            ("easycache", "threshold=nan", "threshold=nan: expected a number"),
            ("easycache", "start=0.5,end=0.5", "the start must come before the end"),
            ("spectrum", "m=2.5", "m=2.5: expected a whole number from 0 to 16"),
            ("spectrum", "w=0.1,w=0.2", "w is given twice"),
        ] {
            let error = StepCache::new(name, options).unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
    }
}
