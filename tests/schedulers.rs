//! The samplers against diffusers' own steps, table by table and step by step, and their closed forms.

use std::path::Path;

use megafuse::Error;
use megafuse::ops::{HISTORY, LearnedNoise, StepCoefficients, Thresholding};
use megafuse::schedulers::{Evaluation, Sampler, Scheduler, SchedulerConfig, SigmaSpacing};
use safetensors::SafeTensors;

struct Expected {
    bytes: Vec<u8>,
    cases: Vec<serde_json::Value>,
}

impl Expected {
    fn load() -> Expected {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/schedulers");
        let json = std::fs::read_to_string(folder.join("oracle.json")).unwrap();
        let listed: serde_json::Value = serde_json::from_str(&json).unwrap();
        Expected {
            bytes: std::fs::read(folder.join("oracle.safetensors")).unwrap(),
            cases: listed["cases"].as_array().unwrap().clone(),
        }
    }

    fn tensor(&self, name: &str) -> Option<(Vec<usize>, Vec<f32>)> {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let view = file.tensor(name).ok()?;
        let values = view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        Some((view.shape().to_vec(), values))
    }
}

fn config(json: &serde_json::Value) -> SchedulerConfig {
    SchedulerConfig::from_json("scheduler_config.json", &json.to_string()).unwrap()
}

/// SD3's.
fn sd3() -> serde_json::Value {
    serde_json::json!({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0})
}

/// SD 1.5's and 2.1's, or for a sampler of flows SD3's.
fn sd() -> serde_json::Value {
    serde_json::json!({
        "_class_name": "PNDMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "steps_offset": 1, "set_alpha_to_one": false, "clip_sample": false,
        "skip_prk_steps": true, "trained_betas": null
    })
}

fn scheduler(sampler: Sampler, steps: usize) -> Scheduler {
    let json = if sampler == Sampler::FlowEuler { sd3() } else { sd() };
    Scheduler::new(&config(&json), sampler, steps, 0.0).unwrap()
}

/// torch.quantile of |x0| by its definition, then the bound: diffusers' `_threshold_sample`.
fn bound(x0: &[f64], thresholding: Thresholding) -> f64 {
    let mut sorted: Vec<f64> = x0.iter().map(|v| v.abs()).collect();
    sorted.sort_by(f64::total_cmp);
    let rank = f64::from(thresholding.ratio * (sorted.len() - 1) as f32);
    let (low, high) = (sorted[rank.floor() as usize], sorted[rank.ceil() as usize]);
    (low + rank.fract() * (high - low)).max(1.0).min(f64::from(thresholding.max))
}

/// A run in f64 by the coefficients: what the network's outputs and the noise make of the first sample.
struct Run {
    x: Vec<f64>,
    history: [Vec<f64>; HISTORY],
}

impl Run {
    /// x0 of the evaluation, of an output and the noise, `(noise, its deviation)`.
    fn step(
        &mut self,
        c: &StepCoefficients,
        e: &[f32],
        n: Option<&[(f32, f64)]>,
        thresholding: Option<Thresholding>,
    ) -> Vec<f64> {
        let clean = |(x, e): (&f64, &f32)| f64::from(c.x0_from_x) * x + f64::from(c.x0_from_e) * f64::from(*e);
        let mut x0: Vec<f64> = self.x.iter().zip(e).map(clean).collect();
        if let Some(thresholding) = thresholding {
            let bound = bound(&x0, thresholding);
            x0.iter_mut().for_each(|v| *v = v.clamp(-bound, bound) / bound);
        } else if let Some(clip) = c.clip {
            x0.iter_mut().for_each(|v| *v = v.clamp(-f64::from(clip), f64::from(clip)));
        }
        let mut kept = Vec::new();
        for i in 0..self.x.len() {
            let (x, e) = (self.x[i], f64::from(e[i]));
            if let Some(k) = c.kept {
                kept.push(f64::from(k.from_x) * x + f64::from(k.from_e) * e + f64::from(k.from_x0) * x0[i]);
            }
            let earlier = c.next_from_history.iter().zip(&self.history).filter(|(weight, _)| **weight != 0.0);
            self.x[i] = f64::from(c.next_from_x) * x
                + f64::from(c.next_from_e) * e
                + f64::from(c.next_from_x0) * x0[i]
                + earlier.map(|(weight, values)| f64::from(*weight) * values[i]).sum::<f64>()
                + n.map_or(0.0, |n| f64::from(c.next_from_noise) * n[i].1 * f64::from(n[i].0));
        }
        if c.kept.is_some() {
            self.history.rotate_right(1);
            self.history[0] = kept;
        }
        x0
    }
}

/// The deviation of noise whose variance the network says is `v`, and the size of what its logarithm is a sum of.
/// arXiv:2102.09672, eq. (15).
fn deviation(learned: Option<LearnedNoise>, v: f32) -> (f64, f64) {
    let Some(LearnedNoise { log_smallest, log_largest }) = learned else { return (1.0, 0.0) };
    let fraction = (f64::from(v) + 1.0) / 2.0;
    let terms = [fraction * f64::from(log_largest), (1.0 - fraction) * f64::from(log_smallest)];
    ((0.5 * (terms[0] + terms[1])).exp(), terms[0].abs() + terms[1].abs())
}

/// Each difference within `tolerance` of the values' scale; `scale` is the largest magnitude that entered the sums.
#[track_caller]
fn close(got: f64, want: f32, scale: f64, tolerance: f64, what: &str) {
    let error = (got - f64::from(want)).abs();
    assert!(error <= tolerance * scale.max(1.0), "{what}: {got} is not {want} (off by {error:e}, scale {scale})");
}

/// Every evaluation from the published sample before it; the history is the test's own. The published steps are f32: each of
/// their coefficients is a few roundings off, as is each of the sums, so 16 ulps of what enters a sum is asked for. That holds
/// for the multistep solvers too, whose coefficients are quotients of differences of logarithms: the differences lose up to
/// 2^-21 of a step of 0.1 and more, but what they weigh is the difference of two neighbouring clean samples, and the test's
/// scale counts both of those in full.
#[test]
fn every_step_is_the_published_one() {
    const TOLERANCE: f64 = 8.0 * f32::EPSILON as f64; // 9.5e-7
    let expected = Expected::load();
    let mut compared = 0;
    for case in &expected.cases {
        let name = case["name"].as_str().unwrap();
        let (steps, eta) = (case["steps"].as_u64().unwrap() as usize, case["eta"].as_f64().unwrap_or(0.0));
        let mut json = case["config"].clone();
        json["_class_name"] = case["class"].clone();
        let config = config(&json);
        assert_eq!(config.substitution(), None, "{name}");
        let sampler = config.sampler();
        let scheduler = Scheduler::new(&config, sampler, steps, eta).unwrap();
        let evaluations = scheduler.evaluations(0..steps);
        assert_eq!(evaluations.iter().filter(|e| e.ends_step).count(), steps, "{name}");
        let (_, timesteps) = expected.tensor(&format!("{name}.timesteps")).unwrap();
        assert_eq!(evaluations.len(), timesteps.len(), "{name}");
        for (got, want) in evaluations.iter().zip(&timesteps) {
            // Fractional ones are found in f32 tables of log(sigma), a few thousandths apart at most; where the class then
            // cuts them to integers, 998.9999 becomes 998.
            let cut = name.ends_with("-exponential") && !name.starts_with("euler") && !name.starts_with("flow");
            let tolerance = if cut {
                1.0
            } else if want.fract() == 0.0 {
                0.0
            } else {
                2e-3
            };
            assert!((got.timestep - want).abs() <= tolerance, "{name}: {} is not {want}", got.timestep);
        }
        let sigma = case["init_noise_sigma"].as_f64().unwrap();
        assert!((scheduler.init_noise_sigma() / sigma - 1.0).abs() < 1e-6, "{name}: {sigma}");

        let (_, samples) = expected.tensor(&format!("{name}.samples")).unwrap();
        let (shape, outputs) = expected.tensor(&format!("{name}.model_outputs")).unwrap();
        let x0s = expected.tensor(&format!("{name}.pred_original")).map(|t| t.1);
        let inputs = expected.tensor(&format!("{name}.model_inputs")).map(|t| t.1);
        let noise = expected.tensor(&format!("{name}.noise")).map(|t| t.1);
        let size = samples.len() / (evaluations.len() + 1);
        // Of a network that predicts a variance each output is followed by it.
        let each = outputs.len() / evaluations.len();
        assert_eq!(shape[1..].iter().product::<usize>() * shape[0], outputs.len());
        config.check_channels(sampler, size, each).unwrap();
        let mut run = Run { x: vec![0.0; size], history: Default::default() };
        for (i, evaluation) in evaluations.iter().enumerate() {
            let what = format!("{name}, evaluation {i}");
            assert_eq!(evaluation.draws_noise, case["draws"][i].as_bool().unwrap(), "{what}");
            let (c, range) = (&evaluation.coefficients, i * size..(i + 1) * size);
            let (x, e) = (&samples[range.clone()], &outputs[i * each..][..size]);
            let learned = c.learned.filter(|_| scheduler.learns_variance());
            assert_eq!(learned.is_some(), json["variance_type"] == "learned_range" && evaluation.draws_noise, "{what}");
            let deviations: Vec<(f64, f64)> =
                (0..size).map(|j| deviation(learned, outputs[i * each + (size + j) % each])).collect();
            let noise = evaluation.draws_noise.then(|| &noise.as_ref().unwrap()[range.clone()]);
            let n = noise.map(|n| n.iter().zip(&deviations).map(|(&n, &(d, _))| (n, d)).collect::<Vec<_>>());
            run.x = x.iter().map(|&x| f64::from(x)).collect();
            let x0 = run.step(c, e, n.as_deref(), scheduler.thresholding());
            let history = c.next_from_history.iter().map(|weight| f64::from(weight.abs())).sum::<f64>();
            for j in 0..size {
                // An error of a variance's logarithm is one of the noise, relative to it.
                let noise = n.as_ref().map_or(0.0, |n| f64::from(n[j].0.abs()) * n[j].1 * (1.0 + deviations[j].1));
                let sum = [x[j], e[j]].iter().map(|v| f64::from(v.abs())).sum::<f64>() + noise + x0[j].abs();
                let x0_scale = f64::from(c.x0_from_x.abs().max(c.x0_from_e.abs()).max(1.0));
                let next_scale = (x0_scale * f64::from(c.next_from_x0.abs())).max(1.0).max(history);
                close(run.x[j], samples[j + (i + 1) * size], sum * next_scale, TOLERANCE, &what);
                if let Some(x0s) = x0s.as_ref().filter(|_| sampler != Sampler::Lcm) {
                    close(x0[j], x0s[j + i * size], sum * x0_scale, 1e-6, &format!("{what}: x0"));
                }
                if let Some(inputs) = &inputs {
                    let want = inputs[j + i * size];
                    close(
                        f64::from(evaluation.input_scale) * f64::from(x[j]),
                        want,
                        f64::from(want.abs()),
                        1e-6,
                        &what,
                    );
                }
            }
        }
        compared += 1;
    }
    assert!(compared >= 144, "only {compared} cases");
}

/// Names of other programs, each of one sampler; its own name is what is written.
#[test]
fn samplers_are_known_by_the_names_of_other_programs() {
    let others = [("euler_a", "euler-ancestral"), ("dpmpp_2m", "dpm++-2m"), ("dpm++2m", "dpm++-2m"), ("plms", "pndm")];
    for (other, own) in others {
        assert_eq!(other.parse::<Sampler>().expect(other).name(), own);
    }
    let mut names: Vec<&str> = Sampler::ALL.iter().flat_map(|sampler| sampler.aliases()).copied().collect();
    names.extend(Sampler::ALL.map(Sampler::name));
    assert!(names.iter().all(|name| names.iter().filter(|other| other == &name).count() == 1), "{names:?}");
    assert!("dpmpp_3m".parse::<Sampler>().is_err());
}

/// A stage begins with an empty history: its first evaluation reads none, and the later ones no more than it has kept.
#[test]
fn a_stage_begins_without_history() {
    for sampler in Sampler::ALL {
        let base = scheduler(sampler, 10);
        let stage = base.rescheduled(4.0);
        let run = [base.evaluations(0..6), stage.evaluations(6..10)].concat();
        assert_eq!(run.iter().filter(|e| e.ends_step).count(), 10, "{sampler}");
        assert!(run.windows(2).all(|pair| pair[1].step == pair[0].step + usize::from(pair[0].ends_step)), "{sampler}");
        for evaluations in [base.evaluations(0..6), stage.evaluations(6..10)] {
            let mut kept = 0;
            for Evaluation { step, coefficients: c, .. } in &evaluations {
                let reached = c.next_from_history.iter().rposition(|weight| *weight != 0.0).map_or(0, |last| last + 1);
                assert!(reached <= kept, "{sampler}, step {step}: {reached} of {kept}");
                kept += usize::from(c.kept.is_some());
            }
        }
        // As the run of its own length does not differ from a stage that is the whole run.
        assert_eq!(base.evaluations(0..10), base.rescheduled(1.0).evaluations(0..10), "{sampler}");
    }
}

#[test]
fn heun_and_pndm_count_their_second_evaluations_once() {
    let counts = |sampler| {
        let evaluations = scheduler(sampler, 4).evaluations(0..4);
        (0..4).map(|step| evaluations.iter().filter(|e| e.step == step).count()).collect::<Vec<_>>()
    };
    assert_eq!(counts(Sampler::Heun), [2, 2, 2, 1]);
    assert_eq!(counts(Sampler::Pndm), [2, 1, 1, 1]);
    assert_eq!(counts(Sampler::Dpm2M), [1, 1, 1, 1]);
}

/// Rescaled sigmas are those of the rescheduled table, for every sampler that has a list of them.
#[test]
fn rescheduling_multiplies_the_listed_sigmas() {
    let of_betas = Sampler::ALL.into_iter().filter(|&sampler| sampler != Sampler::FlowEuler);
    for sampler in of_betas.filter(|sampler| sampler.has_sigmas()) {
        for spacing in SigmaSpacing::ALL {
            let base = Scheduler::new(&config(&sd()).with_sigmas(Some(spacing)), sampler, 12, 0.0).unwrap();
            assert_eq!(base.sigma_spacing(), spacing);
            let four = base.rescheduled(4.0);
            assert_eq!(base.timesteps(), four.timesteps());
            for i in 0..12 {
                let [a, b] = [&base, &four].map(|s| s.noise_level(i)).map(|(signal, noise)| noise / signal);
                assert!((b / a - 2.0).abs() < 1e-12, "{sampler} {spacing} {i}");
            }
        }
    }
    let asked = config(&sd()).with_sigmas(Some(SigmaSpacing::Karras));
    let error = Scheduler::new(&asked, Sampler::Ddim, 10, 0.0).unwrap_err();
    assert!(matches!(error, Error::Request { field: "sigmas", .. }), "{error}");
}

/// SD3's levels with 28 steps, and the same for pictures of four times the area: noise over signal is doubled, as by twice
/// the shift, and the network is told so.
#[test]
fn flows_are_rescheduled_by_their_shift() {
    let base = scheduler(Sampler::FlowEuler, 28);
    let (four, one) = (base.rescheduled(4.0), base.rescheduled(1.0));
    assert_eq!(base.evaluations(0..28), one.evaluations(0..28));
    for (step, want) in [(0, 1.0), (1, 0.987381), (2, 0.974108), (19, 0.560625), (20, 0.515072), (27, 0.008929)] {
        let (signal, noise) = base.noise_level(step);
        assert!((noise - want).abs() < 1e-6 && (signal + noise - 1.0).abs() < 1e-15, "{step}: {noise} is not {want}");
        let (signal_of_four, noise_of_four) = four.noise_level(step);
        assert!((noise_of_four * signal - 2.0 * noise * signal_of_four).abs() < 1e-15, "{step}");
        for scheduler in [&base, &four] {
            let (got, want) = (f64::from(scheduler.timesteps()[step]), scheduler.noise_level(step).1 * 1000.0);
            assert!((got / want - 1.0).abs() < 2e-7, "{step}: {got} is not {want}");
        }
    }
    // abar of a level is what the level makes of signal and noise, before and after.
    for scheduler in [&base, &four] {
        let abar = scheduler.alphas_cumprod();
        assert_eq!((abar.len(), abar[999], scheduler.final_alpha_cumprod()), (1000, 0.0, 1.0));
    }
    let half = 1.0 / 1.3f64.hypot(1.0);
    let level = base.alphas_cumprod().iter().position(|abar| abar.sqrt() <= half).unwrap();
    let ratio = |abar: f64| ((1.0 - abar) / abar).sqrt();
    let grown = ratio(four.alphas_cumprod()[level]) / ratio(base.alphas_cumprod()[level]);
    assert!((grown - 2.0).abs() < 1e-12, "{grown}");
}

/// A file with Python's -Infinity, as diffusers writes DPM-Solver's.
#[test]
fn pythons_infinity_is_read() {
    let text = r#"{"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -Infinity, "beta_end": 0.012}"#;
    let config = SchedulerConfig::from_json("scheduler_config.json", text).unwrap();
    assert_eq!(config.sampler(), Sampler::Dpm2M);
    Scheduler::new(&config, Sampler::Dpm2M, 10, 0.0).unwrap();
    let error =
        SchedulerConfig::from_json("scheduler_config.json", "{\"beta_end\": 0.012,\n 7}").unwrap_err().to_string();
    assert!(error.contains("scheduler_config.json") && error.contains("line 2 column 2"), "{error}");
    let error = SchedulerConfig::from_json("scheduler_config.json", r#"{"beta_end": NaN}"#).unwrap_err().to_string();
    assert!(error.contains("beta_end is \"NaN\""), "{error}");
}

#[test]
fn alphas_cumprod_are_the_published_tables() {
    let expected = Expected::load();
    let sd_zero_snr = {
        let mut json = sd();
        json["rescale_betas_zero_snr"] = true.into();
        json["prediction_type"] = "v_prediction".into();
        json
    };
    for (name, json) in [
        ("sd", sd()),
        ("defaults", serde_json::json!({})),
        ("cosine", serde_json::json!({"beta_schedule": "squaredcos_cap_v2"})),
        ("zero-snr", sd_zero_snr),
    ] {
        let scheduler = Scheduler::new(&config(&json), Sampler::Ddim, 10, 0.0).unwrap();
        let (_, want) = expected.tensor(&format!("alpha_bar.{name}")).unwrap();
        for (t, (got, want)) in scheduler.alphas_cumprod().iter().zip(&want).enumerate() {
            let error = (got - f64::from(*want)).abs();
            // Bit for bit, except where the table was rescaled in f32: a few roundings.
            let tolerance = if name == "zero-snr" { 4.0 * f64::from(f32::EPSILON) } else { 0.0 };
            assert!(error <= tolerance * f64::from(*want), "{name}, abar[{t}]: {got} is not {want}");
        }
    }
    for gamma in ["1.0", "2.25", "4.0"] {
        let got = scheduler(Sampler::Ddim, 10).rescheduled(gamma.parse().unwrap());
        let (_, want) = expected.tensor(&format!("alpha_bar.sd.gamma-{gamma}")).unwrap();
        for (got, want) in got.alphas_cumprod().iter().zip(&want) {
            assert!((got / f64::from(*want) - 1.0).abs() < 1e-6, "gamma {gamma}: {got} is not {want}");
        }
    }
}

#[test]
fn rescheduling_multiplies_every_sigma_by_the_root_of_gamma() {
    let base = scheduler(Sampler::Ddim, 50);
    for gamma in [1.0, 1.7, 2.25, 4.0, 16.0] {
        let rescheduled = base.rescheduled(gamma);
        for (a, b) in base.alphas_cumprod().iter().zip(rescheduled.alphas_cumprod()) {
            let ratio = ((1.0 - b) / b).sqrt() / ((1.0 - a) / a).sqrt();
            assert!((ratio / gamma.sqrt() - 1.0).abs() < 1e-12, "gamma {gamma}: {ratio}");
        }
        assert_eq!(rescheduled.final_alpha_cumprod(), rescheduled.alphas_cumprod()[0]);
    }
    // The values of the paper's schedule.
    let four = base.rescheduled(4.0);
    for (t, want) in [(181, 0.473751), (101, 0.675957), (41, 0.859932), (1, 0.993219), (981, 0.00145016)] {
        assert!((four.alphas_cumprod()[t] / want - 1.0).abs() < 4e-6, "{t}");
    }
    assert!((four.final_alpha_cumprod() - 0.996609).abs() < 1e-6);
    assert_eq!(base.rescheduled(1.0).alphas_cumprod(), base.alphas_cumprod());
}

#[test]
fn euler_sigmas_follow_the_rescheduled_table() {
    let mut json = sd();
    json["timestep_spacing"] = "leading".into();
    let base = Scheduler::new(&config(&json), Sampler::Euler, 50, 0.0).unwrap();
    assert!((base.noise_level(0).1 - 13.1204).abs() < 1e-4);
    assert!((base.init_noise_sigma() - 13.1585).abs() < 1e-4);
    let four = base.rescheduled(4.0);
    for i in 0..50 {
        assert_eq!(four.noise_level(i).0, 1.0);
        assert!((four.noise_level(i).1 / base.noise_level(i).1 - 2.0).abs() < 1e-12);
    }
}

#[test]
fn fifty_steps_relay_at_181_and_81() {
    let s = scheduler(Sampler::Ddim, 50);
    let ts = s.timesteps();
    assert_eq!((ts[0], ts[39], ts[40], ts[45], ts[49]), (981.0, 201.0, 181.0, 81.0, 1.0));
    let (signal, noise) = s.noise_level(40);
    assert!((signal.powi(2) - 0.782654).abs() < 1e-6 && (noise - 0.46620).abs() < 1e-5);
}

#[test]
fn all_step_counts_keep_timesteps_in_range_and_descending() {
    for spacing in ["leading", "trailing", "linspace"] {
        let mut json = sd();
        json["timestep_spacing"] = spacing.into();
        for steps in (1..=999).step_by(7) {
            let s = Scheduler::new(&config(&json), Sampler::Ddim, steps, 0.0).unwrap();
            assert_eq!(s.timesteps().len(), steps);
            assert!(s.timesteps().windows(2).all(|w| w[0] > w[1]), "{spacing} {steps}");
            assert!(s.timesteps().iter().all(|t| (0.0..1000.0).contains(t)), "{spacing} {steps}");
        }
    }
}

#[test]
fn classes_choose_their_sampler() {
    for (class, sampler) in [
        ("PNDMScheduler", Sampler::Pndm),
        ("DDIMScheduler", Sampler::Ddim),
        ("DPMSolverMultistepScheduler", Sampler::Dpm2M),
        ("UniPCMultistepScheduler", Sampler::UniPc),
        ("DEISMultistepScheduler", Sampler::Deis),
        ("FlowMatchEulerDiscreteScheduler", Sampler::FlowEuler),
        ("LCMScheduler", Sampler::Lcm),
        ("HeunDiscreteScheduler", Sampler::Heun),
        ("DDPMScheduler", Sampler::Ddpm),
        ("EulerDiscreteScheduler", Sampler::Euler),
        ("EulerAncestralDiscreteScheduler", Sampler::EulerAncestral),
    ] {
        let config = config(&serde_json::json!({"_class_name": class}));
        assert_eq!((config.sampler(), config.substitution()), (sampler, None));
    }
    for (class, sampler) in [
        ("LMSDiscreteScheduler", Sampler::Euler),
        ("DPMSolverSinglestepScheduler", Sampler::Dpm2M),
        ("FlowMatchHeunDiscreteScheduler", Sampler::FlowEuler),
        ("TCDScheduler", Sampler::Ddim),
    ] {
        let config = config(&serde_json::json!({"_class_name": class}));
        let line = config.substitution().unwrap();
        assert_eq!(config.sampler(), sampler);
        assert!(line.contains(class) && line.contains(sampler.name()), "{line}");
    }
    let sde = serde_json::json!({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"});
    assert_eq!(config(&sde).sampler(), Sampler::Dpm2MSde);
    let old = serde_json::json!({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"});
    assert!(config(&old).substitution().unwrap().contains("algorithm_type dpmsolver"));
}

/// DeepFloyd IF's stages: the levels of their steps, and the two variances of each as in arXiv:2102.09672, eq. (15), also of
/// the schedule for pictures of four times the area.
#[test]
fn deepfloyds_stages_learn_their_variance() {
    let file = |sample_max_value: f64| {
        serde_json::json!({
            "_class_name": "DDPMScheduler", "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "squaredcos_cap_v2",
            "clip_sample": true, "clip_sample_range": 1.0, "dynamic_thresholding_ratio": 0.95, "num_train_timesteps": 1000,
            "prediction_type": "epsilon", "sample_max_value": sample_max_value, "thresholding": true, "trained_betas": null,
            "variance_type": "learned_range"
        })
    };
    // (largest, steps, the first steps' end, relay: timestep, abar, and of gamma 4)
    for (max, steps, end, relay, abar, four) in
        [(1.5, 100, 200.0, 190.0, 0.907018, 0.709191), (1.0, 50, 200.0, 180.0, 0.915877, 0.731316)]
    {
        let config = config(&file(max));
        assert_eq!((config.sampler(), config.substitution()), (Sampler::Ddpm, None));
        let base = Scheduler::new(&config, Sampler::Ddpm, steps, 0.0).unwrap();
        assert!(base.learns_variance());
        assert_eq!(base.thresholding(), Some(Thresholding { ratio: 0.95, max: max as f32 }));
        let stride = 1000 / steps;
        let want: Vec<f32> = (0..steps).rev().map(|i| (i * stride) as f32).collect();
        assert_eq!(base.timesteps(), want);
        // Of eq. (17) itself; the table is a product of f32.
        for (t, want) in [(500, 0.492285), (990, 0.000196719), (0, 0.999959)] {
            assert!((base.alphas_cumprod()[t] / want - 1.0).abs() < 1e-5, "{t}: {}", base.alphas_cumprod()[t]);
        }
        let first = steps * 4 / 5;
        assert_eq!([first - 1, first].map(|i| base.timesteps()[i]), [end, relay]);
        for (scheduler, want) in [(base.clone(), abar), (base.rescheduled(4.0), four)] {
            assert!(scheduler.learns_variance());
            assert!((scheduler.noise_level(first).0.powi(2) / want - 1.0).abs() < 2e-6);
            let evaluations = scheduler.evaluations(0..steps);
            for (i, Evaluation { coefficients: c, draws_noise, .. }) in evaluations.iter().enumerate() {
                assert_eq!(c.clip, None);
                if i + 1 == steps {
                    assert_eq!((c.learned, c.next_from_noise, *draws_noise), (None, 0.0, false), "t = 0");
                    continue;
                }
                let [now, next] = [i, i + 1].map(|i| scheduler.alphas_cumprod()[base.timesteps()[i] as usize]);
                let beta = 1.0 - now / next;
                let want = [(1.0 - next) / (1.0 - now) * beta, beta].map(f64::ln);
                let learned = c.learned.unwrap();
                for (got, want) in [learned.log_smallest, learned.log_largest].into_iter().zip(want) {
                    assert!((f64::from(got) - want).abs() < 5e-7 * want.abs(), "step {i}: {got}, expected {want}");
                }
                assert_eq!((c.next_from_noise, *draws_noise), (1.0, true));
            }
        }
    }
}

/// Channels of the network's output beside those of the samples: what learned noise needs, and others leave alone.
#[test]
fn a_variance_that_is_missing_is_one_clear_error() {
    let learned = config(&serde_json::json!({"_class_name": "DDPMScheduler", "variance_type": "learned_range"}));
    let fixed = config(&serde_json::json!({"_class_name": "DDPMScheduler", "variance_type": "fixed_small"}));
    learned.check_channels(Sampler::Ddpm, 3, 6).unwrap();
    for sampler in Sampler::ALL {
        fixed.check_channels(sampler, 3, 3).unwrap();
        fixed.check_channels(sampler, 3, 6).unwrap();
        assert!(fixed.check_channels(sampler, 3, 4).unwrap_err().to_string().contains("has 4 channels"));
        if sampler != Sampler::FlowEuler {
            let scheduler = Scheduler::new(&learned, sampler, 10, 0.0).unwrap();
            assert_eq!(scheduler.learns_variance(), sampler == Sampler::Ddpm, "{sampler}");
            let learns = scheduler.evaluations(0..10).iter().any(|e| e.coefficients.learned.is_some());
            assert_eq!(learns, sampler == Sampler::Ddpm, "{sampler}");
        }
        if sampler != Sampler::Ddpm {
            learned.check_channels(sampler, 3, 3).unwrap();
        }
    }
    for channels in [3, 4, 12] {
        let text = learned.check_channels(Sampler::Ddpm, 3, channels).unwrap_err().to_string();
        let words = ["scheduler_config.json", "learned_range", "6 channels", &format!("it has {channels}")];
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
    }
}

#[test]
fn bad_configurations_name_the_key() {
    let bad = |json: serde_json::Value, sampler: Sampler, word: &str| {
        let error = SchedulerConfig::from_json("dir/scheduler_config.json", &json.to_string())
            .and_then(|config| Scheduler::new(&config, sampler, 10, 0.0))
            .expect_err(word);
        let text = error.to_string();
        assert!(text.contains(word) && text.contains("dir/scheduler_config.json"), "{text}");
    };
    use serde_json::json;
    bad(json!({"beta_schedule": "laplace"}), Sampler::Ddim, "beta_schedule");
    bad(json!({"beta_start": -1.0}), Sampler::Ddim, "beta 0");
    bad(json!({"beta_schedule": "scaled_linear", "beta_end": -1.0}), Sampler::Ddim, "beta");
    bad(json!({"trained_betas": [0.1, 0.2]}), Sampler::Ddim, "trained_betas");
    bad(json!({"num_train_timesteps": 1}), Sampler::Ddim, "num_train_timesteps");
    bad(json!({"num_train_timesteps": "many"}), Sampler::Ddim, "invalid type");
    bad(json!({"prediction_type": "noise"}), Sampler::Ddim, "noise");
    bad(json!({"timestep_spacing": "even"}), Sampler::Ddim, "even");
    bad(json!({"thresholding": true, "dynamic_thresholding_ratio": 1.5}), Sampler::Ddim, "dynamic_thresholding_ratio");
    bad(json!({"sample_max_value": 0.0}), Sampler::Ddim, "sample_max_value");
    bad(json!({"steps_offset": 65537}), Sampler::Ddim, "steps_offset");
    bad(json!({"original_inference_steps": 0}), Sampler::Lcm, "original_inference_steps");
    bad(json!({"solver_order": 3}), Sampler::Dpm2M, "solver_order");
    bad(json!({"final_sigmas_type": "sigma_min", "use_karras_sigmas": true}), Sampler::Dpm2M, "same noise level");
    bad(json!({"_class_name": "PNDMScheduler"}), Sampler::Pndm, "skip_prk_steps");
    bad(json!({"clip_sample_range": -1.0}), Sampler::Ddim, "clip_sample_range");
    bad(json!({"steps_offset": 200}), Sampler::Ddim, "steps_offset");
    bad(json!({"variance_type": "learned"}), Sampler::Ddpm, "variance_type");
    bad(json!({"variance_type": "fixed_large_log"}), Sampler::Ddpm, "variance_type");
    bad(json!({"use_beta_sigmas": true}), Sampler::Euler, "use_beta_sigmas");
    bad(json!({"use_karras_sigmas": true, "use_exponential_sigmas": true}), Sampler::Euler, "use_karras_sigmas");
    bad(json!({"interpolation_type": "cubic"}), Sampler::Euler, "interpolation_type");
    bad(json!({"prediction_type": "sample"}), Sampler::EulerAncestral, "prediction_type");
    let flow = |more: serde_json::Value| {
        let mut json = json!({"_class_name": "FlowMatchEulerDiscreteScheduler"});
        json.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json
    };
    bad(flow(json!({})), Sampler::Euler, "FlowMatch");
    bad(json!({}), Sampler::FlowEuler, "flow-euler");
    bad(flow(json!({"use_dynamic_shifting": true})), Sampler::FlowEuler, "use_dynamic_shifting");
    bad(flow(json!({"invert_sigmas": true})), Sampler::FlowEuler, "invert_sigmas");
    bad(flow(json!({"shift": 0.0})), Sampler::FlowEuler, "shift is 0");
    bad(flow(json!({"shift_terminal": 1.0})), Sampler::FlowEuler, "shift_terminal");
    bad(json!({"_class_name": "DEISMultistepScheduler", "solver_order": 3}), Sampler::Deis, "solver_order");
    bad(
        json!({"rescale_betas_zero_snr": true, "timestep_spacing": "trailing"}),
        Sampler::Ddim,
        "rescale_betas_zero_snr",
    );
}

#[test]
fn bad_requests_name_the_field() {
    let new = |sampler, steps, eta| Scheduler::new(&config(&sd()), sampler, steps, eta).unwrap_err();
    assert!(matches!(new(Sampler::Ddim, 0, 0.0), Error::Request { field: "steps", .. }));
    assert!(matches!(new(Sampler::Ddim, 1001, 0.0), Error::Request { field: "steps", .. }));
    assert!(matches!(new(Sampler::Ddim, 10, 1.5), Error::Request { field: "eta", .. }));
    assert!(matches!(new(Sampler::Ddim, 10, f64::NAN), Error::Request { field: "eta", .. }));
    assert!(matches!(new(Sampler::Dpm2M, 1000, 0.0), Error::Request { field: "steps", .. }));
    assert!(matches!(new(Sampler::Lcm, 51, 0.0), Error::Request { field: "steps", .. }));
    assert!(matches!(new(Sampler::Euler, 10, 0.5), Error::Request { field: "eta", .. }));
}
