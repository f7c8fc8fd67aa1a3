//! Which timesteps and noise levels a run visits.

use super::config::SchedulerConfig;
use super::schedule::{NoiseSchedule, Noising, shifted};
use super::{Sampler, SigmaSpacing, Spacing};
use crate::error::{Error, Result};

/// Of one run: made once for all its steps, on the schedule of the training.
#[derive(Clone, Debug)]
pub(super) struct Levels {
    /// One per step, descending.
    pub timesteps: Vec<f32>,
    /// Noise over signal: at each step, and after the last.
    pub sigmas: Vec<f64>,
}

impl Levels {
    pub fn new(config: &SchedulerConfig, sampler: Sampler, schedule: &NoiseSchedule, steps: usize) -> Result<Levels> {
        let n = config.num_train_timesteps;
        let refuse = |most: usize, reason: &str| {
            Err(Error::Request {
                field: "steps",
                value: steps.to_string(),
                reason: format!("expected 1 to {most}, {reason}"),
            })
        };
        if !(1..=n).contains(&steps) {
            return refuse(n, "the number of timesteps that the model was trained with");
        }
        if sampler == Sampler::FlowEuler {
            return flow(config, steps);
        }
        let spacing = config.spacing(sampler);
        let mut timesteps = match sampler {
            Sampler::Lcm => {
                let original = config.original_inference_steps();
                if steps > original {
                    return refuse(original, "the original_inference_steps that the model was distilled with");
                }
                distilled(n, steps, original)
            }
            _ if sampler.multistep() => {
                let clipped = schedule.abar.iter().rev();
                let lambda_min = config.lambda_min_clipped(sampler);
                let clipped = clipped.take_while(|&&a| 0.5 * (a / (1.0 - a)).ln() < lambda_min).count();
                if steps + clipped >= n {
                    return refuse((n - 1).saturating_sub(clipped), "fewer than the timesteps of the training");
                }
                with_one_more(n, n - clipped, steps, spacing, config.steps_offset)
            }
            _ => timesteps(n, steps, spacing, config.steps_offset, Noising::of(sampler) == Noising::Exploding),
        };
        let sigma = |t: &f32| schedule.sigma(f64::from(*t));
        let mut sigmas: Vec<f64> = timesteps.iter().map(sigma).collect();
        if !sampler.has_sigmas() {
            sigmas.push(0.0); // these samplers look into the table themselves
            return Ok(Levels { timesteps, sigmas });
        }
        let ends_at_smallest = config.ends_at_smallest_sigma()
            && matches!(sampler, Sampler::Euler | Sampler::Dpm2M | Sampler::Dpm2MSde | Sampler::UniPc);
        // DEIS' integral of log(rho) ends above 0.
        let ends_at_smallest = ends_at_smallest || sampler == Sampler::Deis;
        let mut last = if ends_at_smallest { schedule.at(0) } else { 0.0 };
        let (mut largest, mut smallest) = match Noising::of(sampler) {
            Noising::Exploding => (sigmas[0], sigmas[steps - 1]),
            Noising::Preserving | Noising::Flow => (schedule.at(n - 1), schedule.at(0)),
        };
        if config.log_linear(sampler) {
            // One level more than steps, so the run ends at the smallest sigma.
            (largest, smallest) = (schedule.at(n - 1), schedule.at(0));
            let mut levels = exponential(largest, smallest, steps + 1);
            last = levels.pop().unwrap_or(smallest);
            sigmas = levels;
        }
        let chosen = config.sigma_spacing(sampler)?;
        if chosen != SigmaSpacing::Uniform {
            sigmas = spaced(chosen, largest, smallest, steps);
            if config.log_linear(sampler) {
                last = if ends_at_smallest { schedule.at(0) } else { 0.0 };
            }
            // DPM-Solver's class rounds where sigmas are Karras', UniPC's always cuts to integers.
            timesteps = sigmas
                .iter()
                .map(|&sigma| schedule.timestep(sigma))
                .map(|t| match chosen {
                    _ if !sampler.multistep() => t,
                    SigmaSpacing::Karras => t.round_ties_even(),
                    _ => t.trunc(),
                } as f32)
                .collect();
        }
        sigmas.push(last);
        // DEIS' class ends a run of spaced sigmas with a step that changes nothing.
        let listed = if sampler == Sampler::Deis { &sigmas[..steps] } else { &sigmas[..] };
        if sampler.multistep()
            && let Some(i) = listed.windows(2).position(|pair| pair[0] <= pair[1])
        {
            return Err(config.error(format!(
                "steps {} and {} of {steps} have the same noise level, {}, on which {sampler} cannot step; use fewer request.steps, or final_sigmas_type zero",
                i + 1,
                i + 2,
                sigmas[i]
            )));
        }
        Ok(Levels { timesteps, sigmas })
    }
}

/// The levels of a rectified flow, sigma from 1 to the smallest trained one. The shift is there twice, as in the published
/// class: the smallest level is a shifted one, and the levels between are shifted anew.
fn flow(config: &SchedulerConfig, steps: usize) -> Result<Levels> {
    let (n, shift) = (config.num_train_timesteps, config.shift());
    let smallest = f64::from(shifted(1.0 / n as f64, shift) as f32);
    let mut sigmas: Vec<f64> = (0..steps).map(|i| shifted(1.0 + ramp(i, steps) * (smallest - 1.0), shift)).collect();
    // A single step begins with noise alone, which no stretching moves.
    if let Some(terminal) = config.shift_terminal().filter(|_| steps > 1) {
        let stretch = (1.0 - terminal) / (1.0 - sigmas[steps - 1]);
        sigmas.iter_mut().for_each(|sigma| *sigma = 1.0 - (1.0 - *sigma) * stretch);
    }
    let chosen = config.sigma_spacing(Sampler::FlowEuler)?;
    if chosen != SigmaSpacing::Uniform {
        sigmas = spaced(chosen, sigmas[0], sigmas[steps - 1], steps);
    }
    let timesteps = flow_timesteps(&sigmas, n);
    sigmas.push(0.0);
    Ok(Levels { timesteps, sigmas })
}

/// A flow's network is told sigma itself, times the number of training timesteps.
pub(super) fn flow_timesteps(sigmas: &[f64], n: usize) -> Vec<f32> {
    sigmas.iter().map(|&sigma| sigma as f32 * n as f32).collect()
}

fn spaced(spacing: SigmaSpacing, largest: f64, smallest: f64, steps: usize) -> Vec<f64> {
    match spacing {
        SigmaSpacing::Karras => karras(largest, smallest, steps),
        SigmaSpacing::Exponential | SigmaSpacing::Uniform => exponential(largest, smallest, steps),
    }
}

/// Evenly in sigma^(1/rho), rho = 7. Karras et al. 2022, arXiv:2206.00364, eq. (5).
fn karras(largest: f64, smallest: f64, steps: usize) -> Vec<f64> {
    const RHO: f64 = 7.0;
    let (from, to) = (largest.powf(1.0 / RHO), smallest.powf(1.0 / RHO));
    (0..steps).map(|i| (from + ramp(i, steps) * (to - from)).powf(RHO)).collect()
}

fn exponential(largest: f64, smallest: f64, steps: usize) -> Vec<f64> {
    let (from, to) = (largest.ln(), smallest.ln());
    (0..steps).map(|i| (from + ramp(i, steps) * (to - from)).exp()).collect()
}

/// From 0 to 1 over `steps`; 0 where there is one.
fn ramp(i: usize, steps: usize) -> f64 {
    if steps > 1 { i as f64 / (steps - 1) as f64 } else { 0.0 }
}

/// `steps` of `n` training timesteps, descending. Fractions stay where `fractional`, for the samplers that interpolate.
fn timesteps(n: usize, steps: usize, spacing: Spacing, offset: usize, fractional: bool) -> Vec<f32> {
    let at = |i: usize| match spacing {
        Spacing::Leading => ((steps - 1 - i) * (n / steps) + offset) as f64,
        Spacing::Trailing => trailing(n, n, steps, i),
        Spacing::Linspace => {
            let stride = if steps > 1 { (n - 1) as f64 / (steps - 1) as f64 } else { 0.0 };
            let t = if i == 0 && steps > 1 { (n - 1) as f64 } else { (steps - 1 - i) as f64 * stride };
            if fractional { t } else { t.round_ties_even() }
        }
    };
    (0..steps).map(|i| at(i).max(0.0) as f32).collect()
}

fn trailing(n: usize, last: usize, steps: usize, i: usize) -> f64 {
    let delta = (last as f64 - n as f64 / steps as f64) - last as f64; // as numpy's arange rounds it
    (last as f64 + i as f64 * delta).round_ties_even() - 1.0
}

/// The multistep solvers' timesteps: the first `steps` of `steps + 1`, up to the training timestep before `last`.
fn with_one_more(n: usize, last: usize, steps: usize, spacing: Spacing, offset: usize) -> Vec<f32> {
    let at = |i: usize| match spacing {
        Spacing::Leading => ((steps - i) * (last / (steps + 1)) + offset) as f64,
        Spacing::Trailing => trailing(n, last, steps, i),
        Spacing::Linspace if i == 0 => (last - 1) as f64,
        Spacing::Linspace => ((steps - i) as f64 * ((last - 1) as f64 / steps as f64)).round_ties_even(),
    };
    (0..steps).map(|i| at(i).max(0.0) as f32).collect()
}

/// `steps` of the timesteps that the model was distilled at. Luo et al. 2023, arXiv:2310.04378.
fn distilled(n: usize, steps: usize, original: usize) -> Vec<f32> {
    let stride = n / original;
    let at = |i: usize| (original - (i as f64 * (original as f64 / steps as f64)).floor() as usize) * stride - 1;
    (0..steps).map(|i| at(i) as f32).collect()
}
