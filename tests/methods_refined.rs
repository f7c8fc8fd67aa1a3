//! DiffuseHigh's sizes and steps; upsample guidance's timesteps and powers; batches of both.

use megafuse::methods::{
    DiffuseHigh, GenerationMethod, Geometry, Method, Size, Stage, UpsampleGuidance, matched_timestep, pooled_power,
};
use megafuse::pipeline::{InitImage, InputPicture, METHODS, ModelSource, Pipeline, Planner, Request, Silent};
use megafuse::schedulers::{Sampler, Scheduler, SchedulerConfig};
use megafuse::{DType, Device};

fn stages(size: &str, steps: usize) -> String {
    let (size, native) = (size.parse().unwrap(), Size::new(1024, 1024));
    let geometry = Geometry { size, native, sides: 8.into(), steps, relay_growth: 1.0, relayed_share: 0.2 };
    let stages = DiffuseHigh::default().stages(&geometry).unwrap();
    stages.iter().map(Stage::to_string).collect::<Vec<_>>().join(",")
}

/// The published code: 50 steps, then 15 at 2048, 3072 and 4096.
#[test]
fn sizes_grow_by_the_native_one_and_repeat_fifteen_of_fifty_steps() {
    assert_eq!(stages("2048x2048", 50), "1024x1024:50,2048x2048:15");
    assert_eq!(stages("4096x4096", 50), "1024x1024:50,2048x2048:15,3072x3072:15,4096x4096:15");
    assert_eq!(stages("2048x1024", 30), "1448x728:30,2048x1024:9");
    assert_eq!(stages("1536x1536", 4), "1024x1024:4,1536x1536:2");
    assert_eq!(stages("1024x1024", 20), "1024x1024:20");
    let stages = ["1024x1024:50", "2048x2048:15", "3072x3072:10"].map(|stage| stage.parse().unwrap());
    assert_eq!(DiffuseHigh::default().ranges(&stages), [0..50, 35..50, 40..50]);
}

/// SNR(tau) / SNR(t) is m^2 within half of the table's own steps; P is the mean square of means, and 1 without noise.
#[test]
fn the_second_call_has_the_ratio_of_signal_to_noise_of_its_samples() {
    let json = r#"{"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
                   "beta_end": 0.012, "num_train_timesteps": 1000}"#;
    let config = SchedulerConfig::from_json("scheduler_config.json", json).unwrap();
    let scheduler = Scheduler::new(&config, Sampler::Ddim, 50, 0.0).unwrap();
    let table = scheduler.alphas_cumprod();
    let log_snr = |k: usize| (table[k] / (1.0 - table[k])).ln();
    for m in [1, 2, 3, 4] {
        for t in (1..1000).step_by(37) {
            let tau = matched_timestep(table, table[t], m);
            let wanted = log_snr(t) + 2.0 * (m as f64).ln();
            if wanted >= log_snr(0) {
                assert_eq!(tau, 0, "the cleanest there is");
                continue;
            }
            let step = log_snr(tau.saturating_sub(1)) - log_snr((tau + 1).min(999));
            assert!((log_snr(tau) - wanted).abs() <= step / 2.0, "m {m}, t {t}: {tau}");
            assert!(m > 1 || tau == t);
        }
    }
    assert_eq!(matched_timestep(&[0.9, 0.5, 0.0], 0.0, 2), 2, "nothing but noise stays so");
    assert_eq!([pooled_power(1.0, 3), pooled_power(0.0, 2), pooled_power(0.5, 2)], [1.0, 0.25, 0.625]);
}

/// Of every method that begins from a picture: it is encoded before the network is asked, no step before its own is made, and a
/// stage in whose place it stands has none.
#[test]
fn every_method_begins_from_a_picture() {
    let planner = Planner::new(&ModelSource::Embedded, DType::F32).unwrap();
    let picture = InputPicture::new("grey.png", Size::new(64, 64), vec![99; 3 * 64 * 64]).unwrap();
    let pipeline = planner.pipeline();
    let mut in_place = Vec::new();
    for spec in METHODS {
        let method = Method::named(spec.name).unwrap();
        let base = Request { method: method.clone(), steps: Some(4), ..Request::default() };
        let from = Request { init_image: Some(InitImage::new(picture.clone())), ..base };
        let request = pipeline.enlarging(&from, Size::new(128, 128)).unwrap();
        if !method.begins_from_pictures() {
            let error = pipeline.resolve(&request).unwrap_err().to_string();
            assert!(error.contains("begins with noise; choose plain"), "{error}");
            continue;
        }
        let run = pipeline.resolve(&request).unwrap();
        let plan = planner.plan(&request).unwrap();
        let at = |name: &str| plan.phases.iter().position(|phase| phase.name == name);
        let encoded = at("encode").or(at("relay encode")).expect(spec.name);
        assert!(encoded < at("denoise").expect(spec.name), "{}", spec.name);
        let whole: usize = run.stages().iter().map(|stage| stage.steps).sum();
        match method.in_place_of_first_stage() {
            None => assert!(run.steps() < whole || method.enlarging_strength() == Some(1.0), "{}", spec.name),
            Some(_) => {
                in_place.push(spec.name);
                assert_eq!(run.picture_size(), Some(run.stages()[0].size), "{}", spec.name);
                assert_eq!(run.steps(), whole - run.stages()[0].steps, "{}", spec.name);
                assert!(plan.phases.iter().all(|phase| phase.name != "relay decode" || phase.stage != Some(1)));
                assert!(plan.phases.iter().all(|phase| phase.name != "denoise" || phase.stage != Some(0)));
            }
        }
    }
    assert_eq!(in_place, ["hires-fix", "diffusehigh", "pixelrush", "scalediff", "frecas"]);
}

/// Stages from a picture's own size on, be it smaller or larger than what the model was trained at.
#[test]
fn stages_from_a_picture() {
    let planned = |method: Method, picture: &str, size: &str| {
        let picture: Size = picture.parse().unwrap();
        let init = InputPicture::new("a.png", picture, vec![0; 3 * picture.area()]).unwrap();
        let planner = Planner::new(&ModelSource::Embedded, DType::F32).unwrap();
        let request = Request { method, steps: Some(10), init_image: Some(InitImage::new(init)), ..Request::default() };
        let request = planner.pipeline().enlarging(&request, size.parse().unwrap()).unwrap();
        planner.pipeline().resolve(&request).unwrap().stages_text()
    };
    let of = |method: &str, picture: &str, size: &str| planned(Method::named(method).unwrap(), picture, size);
    assert_eq!(of("megafusion", "64x64", "128x128"), "64x64:8,128x128:2");
    assert_eq!(of("megafusion", "101x50", "200x100"), "100x52:8,200x100:2");
    assert_eq!(of("hires-fix", "200x100", "400x200"), "200x100:10,400x200:3");
    assert_eq!(of("diffusehigh", "32x32", "128x128"), "32x32:10,64x64:3,96x96:3,128x128:3");
    assert_eq!(of("scalediff", "128x128", "512x512"), "128x128:10,256x256:4,512x512:4");
    assert_eq!(of("pixelrush", "64x64", "192x192"), "64x64:10,128x128:1,192x192:1");
    assert_eq!(of("demofusion", "64x64", "256x256"), "64x64:10,128x128:10,192x192:10,256x256:10");
    assert_eq!(of("demofusion", "96x64", "144x96"), "144x96:10");
    assert_eq!(of("demofusion", "128x128", "256x256"), "128x128:10,256x256:10");
    assert_eq!(of("plain", "64x64", "128x128"), "128x128:10");
}

/// The same bytes alone and in a batch; a scale of 1 is plain sampling, bit for bit.
#[test]
fn pictures_of_a_batch_are_their_own() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/sd15");
    let pipeline = Pipeline::load(ModelSource::Directory(folder), Device::cpu(), DType::F32).unwrap();
    let high = Method::from(DiffuseHigh { wavelet_steps: Some(1), ..DiffuseHigh::default() });
    let up = |up_scale| Method::from(UpsampleGuidance { up_scale: Some(up_scale), ..UpsampleGuidance::default() });
    let base = Request { guidance: 2.0, seed: 5, prompt: "a cat".into(), ..Request::default() };
    let staged = ["8x8:2", "12x12:2"].map(|stage| stage.parse().unwrap()).to_vec();
    let sized = Request { size: Some("12x16".parse().unwrap()), steps: Some(2), ..base.clone() };
    for request in [Request { method: high, stages: staged, ..base }, Request { method: up(2), ..sized.clone() }] {
        let made = |request: Request| pipeline.generate(&request, &mut Silent).unwrap();
        let together = made(Request { count: 2, batch: 2, ..request.clone() });
        for (seed, picture) in (5..).zip(&together) {
            assert!(made(Request { seed, ..request.clone() })[0] == *picture, "{}, seed {seed}", request.method);
        }
        assert_ne!(together[0].rgb, together[1].rgb);
    }
    let rgb =
        |method: Method| pipeline.generate(&Request { method, ..sized.clone() }, &mut Silent).unwrap().remove(0).rgb;
    assert_eq!(rgb(up(1)), rgb(Method::named("plain").unwrap()));
    assert_ne!(rgb(up(2)), rgb(up(1)));
}
