//! The samplers against diffusers' own steps, table by table and step by step, and their closed forms.

use std::path::Path;

use megafuse::Error;
use megafuse::ops::StepCoefficients;
use megafuse::schedulers::{Sampler, Scheduler, SchedulerConfig};
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

/// SD 1.5's and 2.1's.
fn sd() -> serde_json::Value {
    serde_json::json!({
        "_class_name": "PNDMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "steps_offset": 1, "set_alpha_to_one": false, "clip_sample": false,
        "skip_prk_steps": true, "trained_betas": null
    })
}

fn scheduler(sampler: Sampler, steps: usize) -> Scheduler {
    Scheduler::new(&config(&sd()), sampler, steps, 0.0).unwrap()
}

fn sampler_of(class: &str) -> Option<Sampler> {
    match class {
        "DDIMScheduler" => Some(Sampler::Ddim),
        "DDPMScheduler" => Some(Sampler::Ddpm),
        "EulerDiscreteScheduler" => Some(Sampler::Euler),
        "EulerAncestralDiscreteScheduler" => Some(Sampler::EulerAncestral),
        _ => None,
    }
}

/// The step in f64: (next, x0).
fn apply(c: &StepCoefficients, x: f32, e: f32, n: f32) -> (f64, f64) {
    let [x, e, n] = [x, e, n].map(f64::from);
    let mut x0 = f64::from(c.x0_from_x) * x + f64::from(c.x0_from_e) * e;
    if let Some(clip) = c.clip {
        x0 = x0.clamp(-f64::from(clip), f64::from(clip));
    }
    let next = f64::from(c.next_from_x) * x
        + f64::from(c.next_from_e) * e
        + f64::from(c.next_from_x0) * x0
        + f64::from(c.next_from_noise) * n;
    (next, x0)
}

/// Each difference within `tolerance` of the values' scale; `scale` is the largest magnitude that entered the sums.
#[track_caller]
fn close(got: f64, want: f32, scale: f64, tolerance: f64, what: &str) {
    let error = (got - f64::from(want)).abs();
    assert!(error <= tolerance * scale.max(1.0), "{what}: {got} is not {want} (off by {error:e}, scale {scale})");
}

#[test]
fn every_step_is_the_published_one() {
    let expected = Expected::load();
    let mut compared = 0;
    for case in &expected.cases {
        let name = case["name"].as_str().unwrap();
        let Some(sampler) = sampler_of(case["class"].as_str().unwrap()) else { continue };
        let (steps, eta) = (case["steps"].as_u64().unwrap() as usize, case["eta"].as_f64().unwrap_or(0.0));
        let scheduler = Scheduler::new(&config(&case["config"]), sampler, steps, eta).unwrap();
        let (_, timesteps) = expected.tensor(&format!("{name}.timesteps")).unwrap();
        assert_eq!(scheduler.timesteps(), timesteps, "{name}");
        let sigma = case["init_noise_sigma"].as_f64().unwrap();
        assert!((scheduler.init_noise_sigma() / sigma - 1.0).abs() < 1e-6, "{name}: {sigma}");

        let (_, samples) = expected.tensor(&format!("{name}.samples")).unwrap();
        let (shape, outputs) = expected.tensor(&format!("{name}.model_outputs")).unwrap();
        let x0s = expected.tensor(&format!("{name}.pred_original")).map(|t| t.1);
        let inputs = expected.tensor(&format!("{name}.model_inputs")).map(|t| t.1);
        let noise = expected.tensor(&format!("{name}.noise")).map(|t| t.1);
        let size: usize = shape[1..].iter().product();
        for i in 0..steps {
            let what = format!("{name}, step {i}");
            let step = scheduler.step(i);
            assert_eq!(step.draws_noise, case["draws"][i].as_bool().unwrap(), "{what}");
            let c = &step.coefficients;
            for j in i * size..(i + 1) * size {
                let (x, e) = (samples[j], outputs[j]);
                let n = if step.draws_noise { noise.as_ref().unwrap()[j] } else { 0.0 };
                let (next, x0) = apply(c, x, e, n);
                // The published step takes 1 - abar (and 1 - abar_t / abar_s) from f32 values: sqrt(1 - abar) is off by
                // up to 2^-24 / sqrt(1 - abar), 2e-6 at abar[0], where it stands beside values of the order of 1. The
                // other operations round their operands by 2^-24.
                let sum = [x, e, n].iter().map(|v| f64::from(v.abs())).sum::<f64>() + x0.abs();
                let x0_scale = f64::from(c.x0_from_x.abs().max(c.x0_from_e.abs()).max(1.0));
                let next_scale = (x0_scale * f64::from(c.next_from_x0.abs())).max(1.0);
                close(next, samples[j + size], sum * next_scale, 1e-6, &what);
                if let Some(x0s) = &x0s {
                    close(x0, x0s[j], sum * x0_scale, 1e-6, &format!("{what}: x0"));
                }
                if let Some(inputs) = &inputs {
                    close(
                        f64::from(step.input_scale) * f64::from(x),
                        inputs[j],
                        f64::from(inputs[j].abs()),
                        1e-6,
                        &what,
                    );
                }
            }
        }
        compared += 1;
    }
    assert!(compared >= 30, "only {compared} cases");
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
        ("PNDMScheduler", Sampler::Ddim),
        ("DDIMScheduler", Sampler::Ddim),
        ("LMSDiscreteScheduler", Sampler::Ddim),
        ("DPMSolverMultistepScheduler", Sampler::Ddim),
        ("DDPMScheduler", Sampler::Ddpm),
        ("EulerDiscreteScheduler", Sampler::Euler),
        ("EulerAncestralDiscreteScheduler", Sampler::EulerAncestral),
    ] {
        assert_eq!(config(&serde_json::json!({"_class_name": class})).sampler(), sampler);
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
    bad(json!({"thresholding": true}), Sampler::Ddim, "thresholding");
    bad(json!({"clip_sample_range": -1.0}), Sampler::Ddim, "clip_sample_range");
    bad(json!({"steps_offset": 200}), Sampler::Ddim, "steps_offset");
    bad(json!({"variance_type": "learned_range"}), Sampler::Ddpm, "variance_type");
    bad(json!({"use_karras_sigmas": true}), Sampler::Euler, "use_karras_sigmas");
    bad(json!({"interpolation_type": "log_linear"}), Sampler::Euler, "interpolation_type");
    bad(json!({"prediction_type": "sample"}), Sampler::EulerAncestral, "prediction_type");
    bad(json!({"_class_name": "FlowMatchEulerDiscreteScheduler"}), Sampler::Euler, "FlowMatch");
    bad(
        json!({"rescale_betas_zero_snr": true, "timestep_spacing": "trailing"}),
        Sampler::Ddim,
        "rescale_betas_zero_snr",
    );
}

#[test]
fn bad_requests_name_the_flag() {
    let new = |sampler, steps, eta| Scheduler::new(&config(&sd()), sampler, steps, eta).unwrap_err();
    assert!(matches!(new(Sampler::Ddim, 0, 0.0), Error::Request { flag: "--steps", .. }));
    assert!(matches!(new(Sampler::Ddim, 1001, 0.0), Error::Request { flag: "--steps", .. }));
    assert!(matches!(new(Sampler::Ddim, 10, 1.5), Error::Request { flag: "--eta", .. }));
    assert!(matches!(new(Sampler::Ddim, 10, f64::NAN), Error::Request { flag: "--eta", .. }));
    assert!(matches!(new(Sampler::Euler, 10, 0.5), Error::Request { flag: "--eta", .. }));
}
