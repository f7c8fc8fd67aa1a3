//! DeepFloyd IF through the library: what fits together, two stages in one run, which methods run over pixels, what is refused and how.
//! (`tests/oracle` has the values.)

#[path = "common/drawn.rs"]
mod drawn;
#[path = "common/place.rs"]
mod place;

use std::collections::BTreeMap;

use megafuse::image::read_png_text;
use megafuse::methods::{Event, METHODS, Method, Observer, Size};
use megafuse::models::DeepFloydModel;
use megafuse::pipeline::{
    InitImage, InputPicture, LoadOptions, Lowres, LowresPicture, MemoryOptions, ModelSource, Pipeline, Planner,
    RandomShapes, Request, Residency, SecondRequest, Silent, plan,
};
use megafuse::{DType, Device, Result};
use place::{Place, copy_changed, text};
use serde_json::{Value, json};

fn source(name: &str) -> ModelSource {
    ModelSource::Directory(drawn::folder(&format!("if/{name}")))
}

fn small(name: &str) -> Pipeline {
    Pipeline::load(source(name), Device::cpu(), DType::F32).expect("a small model")
}

/// Stage I with stage II behind it.
fn both(batch_of: &str) -> Pipeline {
    let second = Some(source("ii-l"));
    let options = LoadOptions { second, ..LoadOptions::new(Device::cpu(), DType::F32) };
    Pipeline::load_with(source(batch_of), options).expect("two small models")
}

fn request(method: &str, stages: &[&str]) -> Request {
    let method = Method::named(method).expect("a method");
    let stages = stages.iter().map(|stage| stage.parse().expect("a stage")).collect();
    Request { prompt: "a photo of a cat".into(), method, stages, guidance: 3.0, seed: 5, ..Request::default() }
}

fn picture(side: usize) -> InputPicture {
    let rgb = (0..3 * side * side).map(|i| (i * 37 % 251) as u8).collect();
    InputPicture::new("small.png", Size::new(side, side), rgb).expect("a picture")
}

fn lowres(noise_level: usize) -> Option<Lowres> {
    Some(Lowres { picture: LowresPicture::File(picture(8)), noise_level })
}

fn says(error: &str, parts: &[&str]) {
    for part in parts {
        assert!(error.contains(part), "{error:?} does not say {part:?}");
    }
}

fn refused(pipeline: &Pipeline, request: &Request) -> String {
    match pipeline.generate(request, &mut Silent) {
        Ok(_) => format!("{} makes a picture", request.method),
        Err(error) => error.to_string(),
    }
}

/// A copy of a small model with one key of a configuration changed, and what loading it says.
fn changed(name: &str, file: &str, key: &str, value: Value) -> String {
    let place = tempfile::tempdir().expect("a folder");
    let to = place.path().join("model");
    copy_changed(&drawn::folder(&format!("if/{name}")), &to, file, key, value);
    match Pipeline::load(ModelSource::Directory(to), Device::cpu(), DType::F32) {
        Ok(_) => format!("{file} with {key} changed loads"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn configurations_that_do_not_fit_are_named() {
    let (unet, t5) = ("unet/config.json", "text_encoder/config.json");
    let cases: [(&str, &str, &str, Value, &[&str]); 14] = [
        ("i-xl", unet, "in_channels", json!(6), &["in_channels 6", "expected 3"]),
        ("i-xl", unet, "out_channels", json!(4), &["out_channels 4", "3 (RGB) or 6"]),
        ("ii-l", unet, "class_embed_type", json!(null), &["in_channels 6", "stage I", "null"]),
        ("ii-l", unet, "class_embed_type", json!("identity"), &["class_embed_type is \"identity\"", "timestep"]),
        ("i-xl", unet, "encoder_hid_dim", json!(12), &["12 wide", "d_model"]),
        (
            "i-xl",
            unet,
            "addition_embed_type_num_heads",
            json!(7),
            &["addition_embed_type_num_heads is 7", "not divisible"],
        ),
        ("i-xl", unet, "attention_head_dim", json!(7), &["attention_head_dim is 7", "not divisible"]),
        ("i-xl", unet, "act_fn", json!("mish"), &["act_fn is \"mish\"", "gelu"]),
        ("i-xl", unet, "cross_attention_norm", json!("layer_norm"), &["cross_attention_norm is \"layer_norm\""]),
        ("i-xl", unet, "encoder_hid_dim_type", json!("image_proj"), &["encoder_hid_dim_type is \"image_proj\""]),
        ("i-xl", unet, "mid_block_type", json!("UNetMidBlock2DCrossAttn"), &["stand beside others", "one kind"]),
        ("i-xl", unet, "time_embedding_act_fn", json!(3), &["time_embedding_act_fn is 3", "name of an activation"]),
        ("i-xl", t5, "feed_forward_proj", json!("relu"), &["feed_forward_proj is \"relu\""]),
        (
            "i-xl",
            "scheduler/scheduler_config.json",
            "_class_name",
            json!("FlowMatchEulerDiscreteScheduler"),
            &["flow matching", "DeepFloyd IF"],
        ),
    ];
    for (name, file, key, value, parts) in cases {
        says(&changed(name, file, key, value), parts);
    }
}

#[test]
fn requests_that_do_not_fit_are_named() {
    let (first, second, two) = (small("i-xl"), small("ii-l"), both("i-xl"));
    let one = || request("plain", &["16x16:2"]);
    says(&refused(&first, &request("plain", &["20x16:2"])), &["20x16", "multiples of 8"]);
    says(&refused(&first, &Request { lowres: lowres(250), ..one() }), &["small.png", "has no effect with i-xl"]);
    says(&refused(&second, &one()), &["ii-l enlarges a picture", "request.lowres"]);
    says(&refused(&second, &Request { lowres: lowres(1000), ..one() }), &["noise_level", "1000", "expected 0 to 999"]);
    let reference_compat = Method::named("megafusion").and_then(|method| method.with("reference_compat", true));
    let scheduler = Some("ddim".parse().expect("a sampler"));
    let compat = Request { method: reference_compat.expect("an option"), scheduler, ..one() };
    says(&refused(&first, &compat), &["reference_compat", "over pixels"]);
    let of_parts = request("megafusion", &["16x16:2", "32x32:2+hidiffusion"]);
    says(&refused(&first, &of_parts), &["32x32:2+hidiffusion", "over pixels"]);
    let given = || Some(Box::new(SecondRequest { request: request("plain", &["18x16:2"]), noise_level: 250 }));
    says(&refused(&first, &Request { second: given(), ..one() }), &["second", "no second model was loaded"]);
    says(&refused(&two, &Request { second: given(), ..one() }), &["second.stages", "18x16", "multiples of 8"]);
    let learned = LoadOptions { second: Some(source("i-xl")), ..LoadOptions::new(Device::cpu(), DType::F32) };
    let error = Pipeline::load_with(source("i-xl"), learned).map(|_| ()).expect_err("no second stage");
    says(&error.to_string(), &["i-xl", "enlarges no picture"]);
    let narrow = LoadOptions { second: Some(source("ii-only")), ..LoadOptions::new(Device::cpu(), DType::F32) };
    let error = Pipeline::load_with(source("i-xl"), narrow).map(|_| ()).expect_err("text of another width");
    says(&error.to_string(), &["ii-only", "another width"]);
}

/// A network without channels of the variance under a scheduler that asks for them.
#[test]
fn a_variance_that_is_not_there_is_said() {
    let place = tempfile::tempdir().expect("a folder");
    let to = place.path().join("model");
    let file = "scheduler/scheduler_config.json";
    copy_changed(&drawn::folder("if/i-clip"), &to, file, "variance_type", "learned_range".into());
    let pipeline = Pipeline::load(ModelSource::Directory(to), Device::cpu(), DType::F32).expect("a model");
    says(&refused(&pipeline, &request("plain", &["16x16:2"])), &["learned_range", "6 channels", "ddim"]);
}

/// Networks over pixels also give a variance; methods that keep or average what a network gives are made for latents.
#[test]
fn every_method_runs_or_says_why_not() {
    let pipeline = small("i-two");
    let mut ran = Vec::new();
    for spec in METHODS {
        let stages: &[&str] = if spec.relays { &[] } else { &["8x8:3"] };
        let size = Some(Size::new(16, 16)).filter(|_| spec.relays);
        let steps = size.map(|_| 4);
        match pipeline.generate(&Request { size, steps, ..request(spec.name, stages) }, &mut Silent) {
            Ok(_) => ran.push(spec.name),
            Err(error) => {
                let reason =
                    "is for models over latents, and i-two is over pixels; choose plain, megafusion or megafusion++";
                assert_eq!(error.to_string(), format!("method {}: {reason}", spec.name), "{spec}");
            }
        }
    }
    assert_eq!(ran, ["plain", "megafusion", "megafusion++"]);
}

#[test]
fn suited_requests_are_the_published_and_the_papers() {
    let (first, second) = (source("i-two"), source("ii-l"));
    let stages = |source: &ModelSource, request: Request| {
        let run = Pipeline::load(source.clone(), Device::cpu(), DType::F32).and_then(|model| model.resolve(&request));
        let run = run.expect("a run");
        let stages = run.stages().iter().map(ToString::to_string).collect::<Vec<_>>();
        (request.method.name().to_string(), request.guidance, run.scheduler().sampler().name(), stages)
    };
    let of_first = stages(&first, Request::suited_to(&first));
    assert_eq!(of_first, ("megafusion++".into(), 7.0, "ddpm", ["8x8:80", "16x16:20"].map(String::from).to_vec()));
    let request = Request { lowres: lowres(250), ..Request::suited_to(&second) };
    let of_second = stages(&second, request);
    assert_eq!(of_second, ("megafusion++".into(), 4.0, "ddpm", ["16x16:40", "32x32:10"].map(String::from).to_vec()));
}

/// Tensors of a run by name, and its events.
#[derive(Default)]
struct Seen(BTreeMap<String, (Vec<usize>, Vec<f32>)>, Vec<Event>);

impl Observer for Seen {
    fn event(&mut self, event: &Event) {
        self.1.push(event.clone());
    }

    fn wants_tensors(&self, index: usize) -> bool {
        index == 0
    }

    fn tensor(&mut self, _index: usize, name: &str, shape: &[usize], values: Vec<f32>) -> Result<()> {
        self.0.insert(name.into(), (shape.to_vec(), values));
        Ok(())
    }
}

/// The second stage reads what the first one made, goes on with its generator and is told its prompt.
#[test]
fn two_stages_in_one_run() {
    let pipeline = both("i-xl");
    let second = SecondRequest { request: request("megafusion", &["16x16:2", "32x24:2"]), noise_level: 100 };
    let request = Request { second: Some(Box::new(second)), ..request("megafusion", &["16x16:2", "24x24:1"]) };
    let mut seen = Seen::default();
    let pictures = pipeline.generate(&request, &mut seen).expect("a picture");
    assert_eq!((pictures[0].width, pictures[0].height), (32, 24));
    let json = &pictures[0].parameters.json;
    assert_eq!((json["stages"].clone(), json["seed"].clone()), (json!(["16x16:2", "24x24:1"]), json!(5)));
    assert_eq!(json["upscale_stages"], "16x16:2,32x24:2");
    assert_eq!((json["second_model"].as_str(), json["noise_level"].as_u64()), (Some("ii-l"), Some(100)));
    assert!(pictures[0].parameters.text.contains("Upscale stages: 16x16:2 32x24:2"));

    // The condition of the second's first stage is the first one's picture at its size, signal and noise as the level says.
    let (shape, image) = &seen.0["image"];
    assert_eq!(shape, &[1, 3, 24, 24]);
    let names: Vec<&str> = seen.0.keys().map(String::as_str).filter(|name| name.starts_with("second.cond")).collect();
    assert_eq!(names, ["second.cond0", "second.cond1"]);
    // x_T, two steps and a relay; DDPM draws nothing for its last step.
    let noises = seen.0.keys().filter(|name| name.starts_with("noise")).count();
    assert_eq!(noises, 4);
    let abar = |level: usize| {
        let bar = |u: f64| ((u + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2);
        let step = |i: usize| (1.0 - bar((i + 1) as f64 / 1000.0) / bar(i as f64 / 1000.0)).min(0.999);
        (0..=level).map(|i| 1.0 - step(i)).product::<f64>()
    };
    let (signal, sigma) = (abar(100).sqrt(), (1.0 - abar(100)).sqrt());
    let (noise, cond) = (&seen.0["second.noise1"].1, &seen.0["second.cond0"].1);
    // 24x24 to 16x16 with aligned corners: the corners are the picture's own.
    for channel in 0..3 {
        let [small, large] = [256 * channel, 576 * channel];
        for (to, from) in [(small, large), (small + 255, large + 575), (small + 15, large + 23)] {
            let want = signal * f64::from(image[from].clamp(-1.0, 1.0)) + sigma * f64::from(noise[to]);
            assert!((want - f64::from(cond[to])).abs() < 1e-5, "{want} {}", cond[to]);
        }
    }
    // Its first draw goes on where the first run's generator was.
    let first = seen.0.iter().filter(|(name, _)| name.starts_with("noise"));
    let drawn: usize = first.map(|(_, (shape, _))| shape.iter().product::<usize>()).sum();
    let mut rng = megafuse::rng::Rng::new(megafuse::rng::RngKind::TorchCpu, 5);
    let sizes: Vec<usize> = (0..noises).map(|i| seen.0[&format!("noise{i}")].1.len()).collect();
    assert_eq!(sizes.iter().sum::<usize>(), drawn);
    sizes.iter().for_each(|&size| drop(rng.normal(size)));
    assert_eq!(rng.normal(768), seen.0["second.noise0"].1);

    let (mut stages, mut steps) = (Vec::new(), Vec::new());
    for event in &seen.1 {
        match event {
            Event::StageBegins { stage, stages: of, .. } => stages.push((*stage, *of)),
            Event::Step(at) => steps.push((at.stage, at.run_step, at.run_steps)),
            _ => {}
        }
    }
    assert_eq!(stages, [(0, 4), (1, 4), (2, 4), (3, 4)]);
    assert_eq!(steps, [(0, 1, 7), (0, 2, 7), (1, 3, 7), (2, 4, 7), (2, 5, 7), (3, 6, 7), (3, 7, 7)]);
    assert_eq!(seen.1.iter().filter(|event| matches!(event, Event::EncodeText)).count(), 1);
}

#[test]
fn pictures_of_a_batch_are_those_made_alone() {
    let pipeline = both("i-xl");
    let second = SecondRequest { request: request("plain", &["16x16:2"]), noise_level: 250 };
    let request =
        Request { count: 3, second: Some(Box::new(second)), ..request("megafusion++", &["16x16:2", "24x24:2"]) };
    let alone = pipeline.generate(&request, &mut Silent).expect("pictures");
    let together = pipeline.generate(&Request { batch: 3, ..request }, &mut Silent).expect("pictures");
    for (a, b) in alone.iter().zip(&together) {
        assert_eq!(a.rgb, b.rgb, "seed {}", a.seed);
    }
    assert_ne!(alone[0].rgb, alone[1].rgb);
}

/// Parts that leave memory come back for the next picture, and the second model goes without the first one's; a plan counts both.
#[test]
fn less_memory_makes_the_same_pictures() {
    let of = |residency: Residency| {
        let memory = MemoryOptions { residency, ..MemoryOptions::default() };
        LoadOptions { second: Some(source("ii-l")), memory, ..LoadOptions::new(Device::cpu(), DType::F32) }
    };
    let second = Some(Box::new(SecondRequest { request: request("plain", &["32x32:2"]), noise_level: 250 }));
    let request = Request { count: 2, second, ..request("plain", &["16x16:2"]) };
    let made = [Residency::Keep, Residency::Low].map(|residency| {
        let pipeline = Pipeline::load_with(source("i-xl"), of(residency)).expect("two small models");
        let pictures = pipeline.generate(&request, &mut Silent).expect("pictures");
        pictures.into_iter().map(|picture| picture.rgb).collect::<Vec<_>>()
    });
    assert_eq!(made[0], made[1]);
    let planner = Planner::with(&source("i-xl"), &of(Residency::Auto)).expect("a planner");
    let ladder = planner.ladder(&request).expect("peaks");
    assert!(ladder.first().map(|rung| rung.1) > ladder.last().map(|rung| rung.1), "{ladder:?}");
    let modules: Vec<&str> = planner.plan(&request).expect("a plan").weights.iter().map(|part| part.module).collect();
    assert_eq!(modules, ["text_encoder", "unet", "unet"]);
}

/// Without guidance in one of the two the rows of the prompt are others.
#[test]
fn each_stage_has_its_guidance() {
    let pipeline = both("i-xl");
    let of = |first: f32, second: f32| {
        let of_second = Request { guidance: second, ..request("plain", &["16x16:2"]) };
        let second = Some(Box::new(SecondRequest { request: of_second, noise_level: 250 }));
        let request = Request { guidance: first, second, ..request("plain", &["16x16:2"]) };
        pipeline.generate(&request, &mut Silent).expect("a picture")[0].rgb.clone()
    };
    let made = [of(3.0, 3.0), of(3.0, 1.0), of(1.0, 3.0), of(1.0, 1.0)];
    for (i, picture) in made.iter().enumerate() {
        assert!(made[..i].iter().all(|other| other != picture), "{i}");
    }
}

/// The samples are pixels: a picture is what it is, and no draw goes before its noise.
#[test]
fn runs_begin_from_pictures() {
    let pipeline = small("i-xl");
    let init_image = Some(InitImage { strength: Some(0.5), ..InitImage::new(picture(16)) });
    let mut seen = Seen::default();
    let made = pipeline.generate(&Request { init_image, ..request("plain", &["16x16:4"]) }, &mut seen);
    assert_eq!(made.expect("a picture").len(), 1);
    assert_eq!(seen.0["init0.encoded"].1, seen.0["init0.picture"].1);
    let (noise, noised) = (&seen.0["noise0"].1, &seen.0["init0.noised"].1);
    // signal picture + sigma noise, by the noise of two pixels.
    let clean = &seen.0["init0.encoded"].1;
    let sigma = |i: usize, signal: f32| (noised[i] - signal * clean[i]) / noise[i];
    let signal = {
        let [a, b] = [0, 1].map(|i| (noised[i] / noise[i], clean[i] / noise[i]));
        (a.0 - b.0) / (a.1 - b.1)
    };
    assert!((signal.powi(2) + sigma(0, signal).powi(2) - 1.0).abs() < 1e-3);
    assert!((0..clean.len()).all(|i| (noised[i] - signal * clean[i] - sigma(0, signal) * noise[i]).abs() < 1e-3));
    let steps = seen.0.keys().filter(|name| name.starts_with("step")).count();
    assert_eq!(steps, 2);
}

/// Of the published models, with their configurations alone: weights and stages. tests/step_costs.rs has what a relay saves.
#[test]
fn published_models_are_planned_from_their_configurations() {
    for (model, unet, native, stages) in [
        (DeepFloydModel::IXl, 4_304_695_110u64, 64, ["64x64:80", "128x128:20"]),
        (DeepFloydModel::IL, 935_365_830, 64, ["64x64:80", "128x128:20"]),
        (DeepFloydModel::IM, 371_605_830, 64, ["64x64:80", "128x128:20"]),
        (DeepFloydModel::IiL, 1_243_277_190, 256, ["256x256:40", "512x512:10"]),
    ] {
        let source = ModelSource::Random(RandomShapes::Published(megafuse::models::PublishedModel::DeepFloyd(model)));
        let lowres = (native == 256).then(|| lowres(250)).flatten();
        let request = Request { prompt: "a cat".into(), lowres, ..Request::suited_to(&source) };
        let report = plan(&source, DType::BF16, &request).expect("a plan");
        let planned: Vec<String> = report.stages.iter().map(ToString::to_string).collect();
        assert_eq!(planned, stages, "{model:?}");
        let parameters: Vec<(&str, u64)> = report.weights.iter().map(|part| (part.module, part.parameters)).collect();
        assert_eq!(parameters, [("text_encoder", 4_762_310_656), ("unet", unet)], "{model:?}");
    }
}

/// What a picture of two stages, or of the second alone, says of itself makes it again.
#[test]
fn flags_reach_both_stages_and_come_back_from_a_picture() {
    let place = Place::with(&["--device", "cpu", "--dtype", "f32"]);
    let [first, second] = ["if/i-xl", "if/ii-l"].map(|name| drawn::folder(name).display().to_string());
    let models = ["--model", &first, "--upscale-model", &second];
    let flags = [
        "--method",
        "megafusion",
        "--stages",
        "8x8:2,16x16:1",
        "--guidance",
        "3",
        "--seed",
        "7",
        "--noise-level",
        "99",
        "--upscale-stages",
        "16x16:1,24x16:2",
        "--upscale-method",
        "megafusion",
        "--upscale-guidance",
        "1.5",
    ];
    place.ok(&[&["generate", "a cat", "--out", "two.png"], &models[..], &flags].concat());
    let said = |name: &str| -> Value {
        let text = read_png_text(&place.path(name), "megafuse").expect("a PNG").expect("its text");
        serde_json::from_str(&text).expect("JSON")
    };
    let json = said("two.png");
    assert_eq!((&json["stages"], &json["upscale_stages"]), (&json!(["8x8:2", "16x16:1"]), &json!("16x16:1,24x16:2")));
    assert_eq!((&json["guidance"], &json["upscale_guidance"]), (&json!(3.0), &json!(1.5)));
    assert_eq!((&json["upscale_method"], &json["noise_level"]), (&json!("megafusion"), &json!(99)));
    place.ok(&[&["generate", "--from", "two.png", "--out", "again.png"], &models[..]].concat());
    assert_eq!(place.bytes("two.png"), place.bytes("again.png"));
    place.ok(&[&["generate", "--from", "two.png", "--out", "other.png", "--noise-level", "98"], &models[..]].concat());
    assert_eq!(said("other.png")["noise_level"], 98);
    assert_ne!(place.bytes("two.png"), place.bytes("other.png"));
    let error = place.fails(1, &["generate", "--from", "two.png", "--model", &first, "--out", "x.png"]);
    says(&error, &["--upscale-model ii-l"]);

    // The second stage alone has no text encoder of its own: this folder has.
    let alone = ["--model", &second, "--method", "plain", "--size", "16x16", "--steps", "2", "--lowres", "two.png"];
    place.ok(&[&["generate", "a cat", "--out", "alone.png"], &alone[..]].concat());
    assert_eq!(
        (said("alone.png")["lowres"].clone(), said("alone.png")["noise_level"].clone()),
        (json!("two.png"), json!(250))
    );
    let from = ["generate", "--from", "alone.png", "--model", &second];
    says(&place.fails(1, &[&from[..], &["--out", "x.png"]].concat()), &["--lowres two.png"]);
    place.ok(&[&from[..], &["--lowres", "two.png", "--out", "same.png"]].concat());
    assert_eq!(place.bytes("alone.png"), place.bytes("same.png"));
    let told = place.run(&[&from[..], &["--lowres", "other.png", "--out", "unlike.png"]].concat());
    says(&text(&told.stderr), &["this run has lowres_digest"]);
    assert_ne!(place.bytes("alone.png"), place.bytes("unlike.png"));
}

#[test]
fn flags_that_do_not_fit_are_named() {
    let place = Place::with(&["--device", "cpu", "--dtype", "f32"]);
    let [first, second] = ["if/i-xl", "if/ii-l"].map(|name| drawn::folder(name).display().to_string());
    std::fs::write(place.path("text.png"), "no picture").expect("a file");
    let values = [0u8; 12];
    let view =
        safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![1, 3, 1, 1], &values).expect("a view");
    let file = |name: &str| safetensors::serialize([(name, &view)], None).expect("a file");
    std::fs::write(place.path("unnamed.safetensors"), file("picture")).expect("a file");
    let both = ["--model", &first, "--upscale-model", &second];
    type Case<'a> = (i32, &'a [&'a str], &'a [&'a str], &'a [&'a str]);
    let cases: [Case; 10] = [
        (2, &["--model", &first], &["--noise-level", "9"], &["--noise-level 9", "--lowres", "--upscale-model"]),
        (2, &["--model", &first], &["--upscale-guidance", "2"], &["--upscale-model"]),
        (
            2,
            &["--model", &first, "--upscale-model", "net.pth"],
            &["--upscale-steps", "2"],
            &["--upscale-steps 2", "second stage of DeepFloyd IF"],
        ),
        (1, &["--model", &first], &["--lowres", "text.png"], &["text.png"]),
        (2, &["--model", &second], &[], &["ii-l", "--lowres"]),
        (1, &["--model", &second], &["--lowres", "unnamed.safetensors"], &["unnamed.safetensors", "no tensor lowres"]),
        (2, &both, &["--noise-level", "1000"], &["--noise-level 1000", "0 to 999"]),
        (2, &both, &["--upscale-stages", "18x16:2"], &["--upscale-stages 18x16", "multiples of 8"]),
        (2, &both, &["--upscale-method", "demofusion"], &["--upscale-method demofusion", "over pixels"]),
        (2, &both, &["--upscale-stages", "16x16:2", "--upscale-steps", "2"], &["--upscale-stages", "--upscale-steps"]),
    ];
    for (status, models, flags, parts) in cases {
        let args = [
            &["generate", "a cat", "--size", "8x8", "--method", "plain", "--steps", "1", "--out", "x.png"],
            models,
            flags,
        ];
        let error = place.fails(status, &args.concat());
        println!("{error}");
        assert!(!error.contains("request."), "{error}");
        says(&error, parts);
    }
}
