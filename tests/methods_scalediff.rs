//! ScaleDiff's stages, its structure guidance, and what it refuses.

use megafuse::Error;
use megafuse::methods::{GenerationMethod, Geometry, Run, ScaleDiff, Size, Stage, structure_guidance};
use megafuse::schedulers::{Sampler, Scheduler, SchedulerConfig};
use serde_json::json;

fn scheduler(sampler: Sampler, steps: usize) -> Scheduler {
    let json = json!({
        "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000, "steps_offset": 1, "set_alpha_to_one": false, "clip_sample": false,
        "timestep_spacing": "leading",
    });
    let config = SchedulerConfig::from_json("scheduler_config.json", &json.to_string()).unwrap();
    Scheduler::new(&config, sampler, steps, 0.0).unwrap()
}

fn stages(text: &str) -> Vec<Stage> {
    text.split(',').map(|stage| stage.parse().unwrap()).collect()
}

/// Calculated from the published schedule: SDXL's 50 steps of DDIM, of which the last 20 are made again.
#[test]
fn structure_guidance_of_sdxl() {
    let scheduler = scheduler(Sampler::Ddim, 50);
    let strengths = structure_guidance(&scheduler, 30..50);
    assert_eq!(scheduler.timesteps()[30], 381.0);
    for (step, want) in [(0, 1.0), (5, 0.693175), (10, 0.398974), (15, 0.152107), (19, 0.003128)] {
        assert!((strengths[step] - want).abs() < 1e-6, "step {step}: {}", strengths[step]);
    }
}

#[test]
fn stages_double_until_the_final_size() {
    let planned = |method: ScaleDiff, size: &str, native: usize, steps: usize| {
        let (size, native) = (size.parse().unwrap(), Size::new(native, native));
        let stages =
            method.stages(&Geometry { size, native, sides: 8.into(), steps, relay_growth: 1.0, relayed_share: 0.2 });
        stages.map(|stages| stages.iter().map(Stage::to_string).collect::<Vec<_>>().join(","))
    };
    let of = |size, native, steps| planned(ScaleDiff::default(), size, native, steps).unwrap();
    assert_eq!(of("2048x2048", 1024, 50), "1024x1024:50,2048x2048:20");
    assert_eq!(of("4096x4096", 1024, 50), "1024x1024:50,2048x2048:20,4096x4096:20");
    assert_eq!(of("3072x3072", 1024, 50), "1024x1024:50,2048x2048:20,3072x3072:20");
    assert_eq!(of("1280x512", 512, 10), "808x320:10,1280x512:4");
    assert_eq!(of("512x512", 512, 10), "512x512:10");
    assert_eq!(of("384x256", 512, 10), "384x256:10");
    let ratio = |ratio| ScaleDiff { restart_ratio: Some(ratio), ..ScaleDiff::default() };
    assert_eq!(planned(ratio(0.6), "1024x1024", 512, 5).unwrap(), "512x512:5,1024x1024:3");
    assert_eq!(planned(ratio(0.01), "1024x1024", 512, 50).unwrap(), "512x512:50,1024x1024:1");
    let error = planned(ScaleDiff::default(), "1020x1024", 512, 10).unwrap_err();
    assert!(matches!(error, Error::Request { field: "size", .. }), "{error}");
}

#[test]
fn malformed_runs_are_refused() {
    let run = |options: ScaleDiff, stages_text: &str, sampler: Sampler| {
        let stages = stages(stages_text);
        let steps = stages[0].steps;
        match Run::new(options.into(), stages, scheduler(sampler, steps), Some(7.0), 8) {
            Err(Error::Request { field, reason, .. }) => (field, reason),
            Err(error) => panic!("{stages_text}: {error}"),
            Ok(_) => panic!("{stages_text} is no run"),
        }
    };
    let with = |restart_ratio, low_pass| ScaleDiff { restart_ratio, low_pass };
    let two = "64x64:10,128x128:4";
    for (options, stages, sampler, field, says) in [
        (with(None, 0.0), two, Sampler::Ddim, "low_pass", "above 0"),
        (with(None, f64::NAN), two, Sampler::Ddim, "low_pass", "above 0"),
        (with(Some(1.5), 0.125), two, Sampler::Ddim, "restart_ratio", "at most 1"),
        (with(Some(0.5), 0.125), two, Sampler::Ddim, "stages", "makes 5 of the steps"),
        (with(None, 0.125), "64x64:4,128x128:5", Sampler::Ddim, "stages", "last of its 4 steps"),
        (with(None, 0.125), two, Sampler::Heun, "scheduler", "expected ddim or euler"),
        (with(None, 0.125), two, Sampler::Dpm2M, "scheduler", "expected ddim or euler"),
        (with(None, 0.125), "64x64:10,132x128:4", Sampler::Ddim, "stages", "multiples of 8"),
    ] {
        let (got, reason) = run(options.clone(), stages, sampler);
        assert_eq!(got, field, "{options:?} {stages}: {reason}");
        assert!(reason.contains(says), "{options:?} {stages}: {reason}");
    }
}
