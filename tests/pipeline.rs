//! What a run promises beside its numbers (tests/oracle has those): seeds, counts, warnings, cancellation, parameters, and the
//! planner's figures.

#[path = "common/drawn.rs"]
mod drawn;

use std::path::{Path, PathBuf};

use half::f16;
use megafuse::methods::{HiDiffusion, MegaFusion, Method, Plain, ScaleDiff, Stage};
use megafuse::pipeline::{
    self, Event, LoadOptions, LongPrompt, MemoryOptions, ModelSource, Observer, Picture, Pipeline, Planner, Request,
    Residency, RngKind, Sampler, Silent, Syntax, TextOptions, VaePartition,
};
use megafuse::runtime::OpKind;
use megafuse::{DType, Device, Error};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data")
}

fn load(model: &str, dtype: DType) -> Pipeline {
    Pipeline::load(ModelSource::Directory(drawn::folder(model)), Device::cpu(), dtype).unwrap()
}

#[derive(Default)]
struct Recorded {
    warnings: Vec<String>,
    events: Vec<Event>,
    patience: Option<usize>,
}

impl Observer for Recorded {
    fn event(&mut self, event: &Event) {
        self.events.push(event.clone());
    }
    fn cancelled(&self) -> bool {
        self.patience.is_some_and(|patience| self.events.len() >= patience)
    }
    fn warning(&mut self, message: &str) {
        self.warnings.push(message.into());
    }
}

fn small() -> Request {
    Request {
        prompt: "a photo of a cat".into(),
        method: MegaFusion::plus().into(),
        stages: vec!["16x16:2".parse().unwrap(), "24x20:1".parse().unwrap()],
        seed: 5,
        ..Request::default()
    }
}

#[test]
fn a_picture_depends_on_its_own_seed_alone() {
    let pipeline = load("sd15", DType::F32);
    let three = pipeline.generate(&Request { count: 3, ..small() }, &mut Silent).unwrap();
    assert_eq!(three.len(), 3);
    for (i, picture) in three.iter().enumerate() {
        let alone = pipeline.generate(&Request { seed: 5 + i as u64, ..small() }, &mut Silent).unwrap();
        assert_eq!(alone.as_slice(), std::slice::from_ref(picture));
        assert_eq!((picture.width, picture.height, picture.rgb.len()), (24, 20, 3 * 24 * 20));
    }
    assert_ne!(three[0].rgb, three[1].rgb);
    assert_ne!(three[1].rgb, three[2].rgb);
}

/// HiDiffusion on SDXL's map: shifts of each picture's own; both parts off make the plain picture.
#[test]
fn hidiffusions_pictures_depend_on_their_own_seeds_alone() {
    let pipeline = load("sdxl", DType::F32);
    let of = |method: Method, seed| Request {
        prompt: "a cat".into(),
        method,
        size: Some("30x44".parse().unwrap()),
        steps: Some(3),
        seed,
        ..Request::default()
    };
    let hi: Method = HiDiffusion { t1: Some(0.7), ..HiDiffusion::default() }.into();
    let three = pipeline.generate(&Request { count: 3, batch: 3, ..of(hi.clone(), 5) }, &mut Silent).unwrap();
    for (seed, picture) in (5..).zip(&three) {
        assert_eq!(pipeline.generate(&of(hi.clone(), seed), &mut Silent).unwrap()[0], *picture, "seed {seed}");
    }
    let rgb = |method: Method| pipeline.generate(&of(method, 5), &mut Silent).unwrap().remove(0).rgb;
    let off = |raunet, windows| HiDiffusion { raunet, windows, ..HiDiffusion::default() }.into();
    let plain = rgb(Plain {}.into());
    assert_eq!(rgb(off(false, false)), plain);
    assert_ne!(rgb(off(true, false)), plain);
    assert_ne!(rgb(off(false, true)), plain);

    let json = pipeline.parameters(&of(hi, 5)).unwrap().json;
    assert_eq!((&json["method"], &json["t1"], json.get("t2")), (&"hidiffusion".into(), &0.7.into(), None));
    let error = load("sd15", DType::F32).resolve(&of(off(true, true), 0)).unwrap_err().to_string();
    assert!(error.contains("this UNet has attention, none"), "{error}");
}

/// ScaleDiff on a map with short windows: what a batch shares is not in its pictures.
#[test]
fn scalediffs_pictures_depend_on_their_own_seeds_alone() {
    let pipeline = load("sdxl", DType::F32);
    let stages = ["16x16:2", "28x20:1"].map(|stage| stage.parse().unwrap()).to_vec();
    let of = |seed| Request {
        prompt: "a cat".into(),
        method: ScaleDiff::default().into(),
        stages: stages.clone(),
        seed,
        ..Request::default()
    };
    let three = pipeline.generate(&Request { count: 3, batch: 3, ..of(5) }, &mut Silent).unwrap();
    for (seed, picture) in (5..).zip(&three) {
        assert_eq!(pipeline.generate(&of(seed), &mut Silent).unwrap()[0], *picture, "seed {seed}");
    }
    let json = &three[0].parameters.json;
    let told = (&json["method"], json["low_pass"].as_f64(), json.get("restart_ratio"));
    assert_eq!(told, (&"scalediff".into(), Some(0.125), None));
}

#[test]
fn parameters_say_how_to_make_the_picture_again() {
    let pipeline = load("sd15", DType::F32);
    let request = Request { negative_prompt: Some("blurry, dark".into()), ..small() };
    let rescaled = Request { guidance_rescale: 0.7, ..request.clone() };
    let rescaled = pipeline.parameters(&rescaled).unwrap();
    assert!(rescaled.text.contains("CFG scale: 7, Seed: 5,") && rescaled.text.contains(", CFG rescale: 0.7,"));
    assert_eq!(rescaled.json["guidance_rescale"].as_f64(), Some(0.7));
    let picture = pipeline.generate(&request, &mut Silent).unwrap().remove(0);
    assert_eq!(picture.parameters.json.get("guidance_rescale"), None);
    let text = &picture.parameters.text;
    assert!(text.starts_with("a photo of a cat\nNegative prompt: blurry, dark\nSteps: 3, Sampler: DDIM, CFG scale: 7, Seed: 5, Size: 24x20, Model: sd15,"), "{text}");
    let json = &picture.parameters.json;
    assert_eq!(json["stages"], serde_json::json!(["16x16:2", "24x20:1"]));
    assert_eq!((json["seed"].as_u64(), json["guidance"].as_f64()), (Some(5), Some(7.0)));
    assert_eq!((json["dilation"].as_u64(), json["reschedule"].as_bool()), (Some(2), Some(true)));
}

#[test]
fn low_precision_runs_stay_near_f32() {
    let want = load("sd15", DType::F32).generate(&small(), &mut Silent).unwrap().remove(0);
    for (dtype, levels) in [(DType::F16, 12.0), (DType::BF16, 40.0)] {
        let got = load("sd15", dtype).generate(&small(), &mut Silent).unwrap().remove(0);
        let difference = |(a, b): (&u8, &u8)| f64::from(a.abs_diff(*b));
        let mean = got.rgb.iter().zip(&want.rgb).map(difference).sum::<f64>() / want.rgb.len() as f64;
        assert!(mean < levels, "{dtype}: {mean} levels off on average");
    }
}

/// The weights of sd15's VAE, with those before the decoder's first ResNet so large that f16 has no room for what they give.
fn loud_vae(path: &Path) {
    let bytes = std::fs::read(data().join("sd15/vae/diffusion_pytorch_model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let loud = ["post_quant_conv.weight", "decoder.conv_in.weight"];
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = file
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            assert_eq!(view.dtype(), Dtype::F16);
            let factor = if loud.contains(&name.as_str()) { 1000.0 } else { 1.0 };
            let values = view.data().chunks_exact(2).map(|b| f16::from_le_bytes(b.try_into().unwrap()).to_f32());
            (name, view.shape().to_vec(), values.flat_map(|value| (factor * value).to_le_bytes()).collect())
        })
        .collect();
    let views =
        tensors.iter().map(|(name, shape, bytes)| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// The VAE in f16 where its model allows it; what it cannot hold is decoded in bf16, and said.
#[test]
fn a_vae_that_leaves_the_range_of_f16_goes_on_in_bf16() {
    let folder = tempfile::tempdir().unwrap();
    let vae = folder.path().join("loud.safetensors");
    loud_vae(&vae);
    let source = ModelSource::Directory(data().join("sd15")).with(Vec::new(), Vec::new(), Some(vae));
    let load = |vae_dtype| {
        let options = LoadOptions { vae_dtype, ..LoadOptions::new(Device::cpu(), DType::F16) };
        Pipeline::load_with(source.clone(), options).unwrap()
    };
    let plain = Request { method: Plain {}.into(), stages: vec!["16x16:2".parse().unwrap()], ..small() };
    for request in [small(), plain] {
        let want = load(Some(DType::BF16)).generate(&request, &mut Silent).unwrap();
        let pipeline = load(None);
        let mut recorded = Recorded::default();
        assert_eq!(pipeline.generate(&request, &mut recorded).unwrap()[0].rgb, want[0].rgb);
        let said = "is not finite in f16: the VAE runs in bf16 from here on";
        assert_eq!(recorded.warnings.len(), 1, "{:?}", recorded.warnings);
        assert!(recorded.warnings[0].ends_with(said), "{:?}", recorded.warnings);
        let mut recorded = Recorded::default();
        assert_eq!(pipeline.generate(&request, &mut recorded).unwrap()[0].rgb, want[0].rgb);
        assert!(recorded.warnings.is_empty(), "{:?}", recorded.warnings);
    }
}

/// Which dtype the VAE gets, by its bytes: two per parameter or four.
#[test]
fn the_vae_has_the_dtype_that_it_can_bear() {
    let bytes = |model: &str, dtype, vae_dtype| {
        let options = LoadOptions { vae_dtype, ..LoadOptions::new(Device::meta(), dtype) };
        let planner = Planner::with(&ModelSource::Directory(drawn::folder(model)), &options).unwrap();
        let vae = planner.pipeline().weights().last().unwrap().clone();
        assert_eq!(vae.module, "vae");
        vae.bytes / vae.parameters
    };
    for model in ["sd15", "sdxl", "sdxl-odd"] {
        assert_eq!(bytes(model, DType::F32, None), 4, "{model}");
        assert_eq!(bytes(model, DType::F16, None), 2, "{model}");
        assert_eq!(bytes(model, DType::BF16, None), 2, "{model}");
        assert_eq!(bytes(model, DType::F16, Some(DType::F32)), 4, "{model}");
    }
}

/// Parts that leave memory on the cpu: the same pictures, at a lower peak.
#[test]
fn parts_of_a_model_come_and_go() {
    let made = |memory: MemoryOptions| {
        let device = Device::cpu();
        let options = LoadOptions { memory, ..LoadOptions::new(device.clone(), DType::F32) };
        let pipeline = Pipeline::load_with(ModelSource::Directory(drawn::folder("sdxl")), options).unwrap();
        let stages = vec!["16x16:2".parse().unwrap(), "24x20:1".parse().unwrap()];
        let request = Request { stages, count: 2, ..small() };
        let pictures = pipeline.generate(&request, &mut Silent).unwrap();
        let Device::Cpu(cpu) = &device else { unreachable!() };
        (pictures, cpu.peak_bytes())
    };
    let (want, most) = made(MemoryOptions { residency: Residency::Keep, vae: VaePartition::Whole });
    for vae in [VaePartition::Auto, VaePartition::Stripes] {
        let (pictures, least) = made(MemoryOptions { residency: Residency::Low, vae });
        assert_eq!(pictures, want, "{vae}");
        assert!(least < most, "{vae}: {least} of {most} bytes");
    }
}

#[test]
fn a_long_prompt_is_cut_with_a_warning() {
    let pipeline = load("sd15", DType::F32);
    let mut recorded = Recorded::default();
    let prompt = "one two three four five six seven eight nine ten ".repeat(12);
    pipeline.generate(&Request { prompt, ..small() }, &mut recorded).unwrap();
    assert_eq!(recorded.warnings.len(), 1, "{:?}", recorded.warnings);
    assert!(recorded.warnings[0].starts_with("the prompt is longer than"), "{:?}", recorded.warnings);
}

#[test]
fn cancelling_ends_the_run() {
    let pipeline = load("sd15", DType::F32);
    for patience in [0, 2, 4] {
        let mut recorded = Recorded { patience: Some(patience), ..Recorded::default() };
        assert!(matches!(pipeline.generate(&small(), &mut recorded), Err(Error::Interrupted)));
        assert!(recorded.events.len() <= patience + 2);
    }
}

#[test]
fn requests_that_cannot_be_met_name_the_field() {
    let pipeline = load("sd15", DType::F32);
    let refused = |request: Request, field: &str| match pipeline.resolve(&request) {
        Err(Error::Request { field: got, .. }) => assert_eq!(got, field),
        Err(other) => panic!("{field}: {other}"),
        Ok(_) => panic!("{field}: accepted"),
    };
    refused(Request { count: 0, ..small() }, "count");
    refused(Request { guidance: f32::NAN, ..small() }, "guidance");
    for (guidance, guidance_rescale) in [(7.0, 1.5), (7.0, -0.1), (7.0, f32::NAN), (1.0, 0.7)] {
        refused(Request { guidance, guidance_rescale, ..small() }, "guidance_rescale");
    }
    refused(Request { steps: Some(4), ..small() }, "steps");
    refused(Request { size: Some("16x16".parse().unwrap()), ..small() }, "size");
    refused(Request { method: Plain {}.into(), ..small() }, "stages");
    refused(Request { stages: Vec::new(), size: Some("17x16".parse().unwrap()), ..small() }, "size");
    refused(Request { eta: Some(2.0), ..small() }, "eta");
    refused(Request { stages: Vec::new(), steps: Some(2000), ..small() }, "steps");
    refused(Request { stages: Vec::new(), steps: Some(0), ..small() }, "steps");
}

/// A UNet that reads its guidance scale: the defaults of the published pipeline for such models, no classifier-free guidance,
/// and so no negative prompt and nothing to rescale. The run itself is in tests/oracle.
#[test]
fn a_latent_consistency_model_is_told_its_guidance_scale() {
    let dir = tempfile::tempdir().unwrap();
    let copied = |from: &Path, to: PathBuf| {
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::fs::copy(from, to).unwrap();
    };
    for part in ["tokenizer", "text_encoder", "vae", "scheduler"] {
        for file in std::fs::read_dir(drawn::folder("zero-snr").join(part)).unwrap().map(|file| file.unwrap().path()) {
            copied(&file, dir.path().join(part).join(file.file_name().unwrap()));
        }
    }
    for file in ["config.json", "diffusion_pytorch_model.safetensors"] {
        let from = data().join("unet-options/guidance-embedding").join(file);
        copied(&from, dir.path().join("unet").join(file));
    }
    let source = ModelSource::Directory(dir.path().into());
    let suited = Request { prompt: "a cat".into(), ..Request::suited_to(&source) };
    assert_eq!((suited.method.name(), suited.guidance), ("plain", 8.5));
    let pipeline = Pipeline::load(source, Device::cpu(), DType::F32).unwrap();
    let run = pipeline.resolve(&suited).unwrap();
    assert_eq!((run.scheduler().sampler(), run.scheduler().timesteps().len()), (Sampler::Lcm, 4));
    assert_eq!((run.guidance(), run.last_stage().size), (None, pipeline.native_size().unwrap()));
    let small = Request { size: Some("16x16".parse().unwrap()), ..suited };
    let picture = |guidance| {
        let request = Request { guidance, ..small.clone() };
        pipeline.generate(&request, &mut Silent).unwrap().remove(0)
    };
    assert_ne!(picture(8.5).rgb, picture(1.0).rgb, "the scale is read, also where there would be no guidance");
    assert!(picture(8.5).parameters.text.contains("CFG scale: 8.5"));
    for (request, field) in [
        (Request { negative_prompt: Some("a dog".into()), ..small.clone() }, "negative_prompt"),
        (Request { guidance_rescale: 0.7, ..small.clone() }, "guidance_rescale"),
    ] {
        let error = pipeline.resolve(&request).unwrap_err().to_string();
        assert!(error.starts_with(field) && error.contains("told its guidance scale"), "{error}");
    }
}

/// A flow's scheduler beside a model of betas.
#[test]
fn families_say_what_they_are_not_trained_by() {
    let dir = sd15_configs();
    let flow = r#"{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}"#;
    std::fs::write(dir.path().join("scheduler/scheduler_config.json"), flow).unwrap();
    let plan = |request: &Request| pipeline::plan(&ModelSource::Directory(dir.path().into()), DType::BF16, request);
    let error = plan(&Request::default()).unwrap_err().to_string();
    assert!(
        error.contains("FlowMatchEulerDiscreteScheduler") && error.contains("Stable Diffusion 1.x or 2.x"),
        "{error}"
    );
    let dir = sd15_configs();
    let plan = |request: &Request| pipeline::plan(&ModelSource::Directory(dir.path().into()), DType::BF16, request);
    let error = plan(&Request { scheduler: Some(Sampler::FlowEuler), ..Request::default() }).unwrap_err().to_string();
    assert!(error.contains("flow matching") && error.contains("table of betas"), "{error}");
}

#[test]
fn a_plan_is_the_real_run_counted() {
    let source = ModelSource::Directory(data().join("sd15"));
    let report = pipeline::plan(&source, DType::F32, &small()).unwrap();
    let names: Vec<_> = report.phases.iter().map(|phase| (phase.name, phase.stage, phase.repeats)).collect();
    assert_eq!(
        names,
        [
            ("text", None, 1),
            ("denoise", Some(0), 2),
            ("relay decode", Some(1), 1),
            ("relay upsample", Some(1), 1),
            ("relay encode", Some(1), 1),
            ("denoise", Some(1), 1),
            ("decode", Some(1), 1)
        ]
    );
    let sum: u64 = report.phases.iter().map(|phase| phase.repeats as u64 * phase.once.macs).sum();
    assert_eq!(report.total.macs, sum);
    let kinds: u64 = report.by_kind.iter().map(|(_, work)| work.flops).sum();
    assert_eq!(report.total.flops, kinds);
    assert!(report.by_kind.iter().any(|(kind, work)| *kind == OpKind::Attention && work.macs > 0));
    assert!(report.peak_bytes > report.weight_bytes());
    assert!(report.phases.iter().all(|phase| phase.peak_bytes <= report.peak_bytes && phase.once.flops > 0));
    // What the cpu device really held at most is what was planned: the plan's tensors, give or take dumps and draws.
    let device = Device::cpu();
    let pipeline = Pipeline::load(source, device.clone(), DType::F32).unwrap();
    pipeline.generate(&small(), &mut Silent).unwrap();
    let Device::Cpu(cpu) = &device else { unreachable!() };
    let ratio = cpu.peak_bytes() as f64 / report.peak_bytes as f64;
    assert!((0.8..1.25).contains(&ratio), "held {} bytes, planned {}", cpu.peak_bytes(), report.peak_bytes);
    let json = report.to_json();
    assert_eq!(json["total"]["macs"].as_u64(), Some(report.total.macs));
}

#[test]
fn the_other_generator_gives_another_picture() {
    let pipeline = load("sd15", DType::F32);
    let one = pipeline.generate(&small(), &mut Silent).unwrap();
    let other = pipeline.generate(&Request { rng: RngKind::TorchCuda, ..small() }, &mut Silent).unwrap();
    assert_ne!(one[0].rgb, other[0].rgb);
}

/// A directory with the published configurations of SD 1.5 and no weights.
fn sd15_configs() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (part, from) in [("text_encoder", "sd15-text"), ("unet", "sd15-unet"), ("vae", "sd15-vae")] {
        std::fs::create_dir(dir.path().join(part)).unwrap();
        std::fs::copy(data().join(format!("manifest/{from}.json")), dir.path().join(part).join("config.json")).unwrap();
    }
    std::fs::create_dir(dir.path().join("scheduler")).unwrap();
    let scheduler = r#"{"_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": false, "skip_prk_steps": true,
        "steps_offset": 1, "trained_betas": null, "clip_sample": false}"#;
    std::fs::write(dir.path().join("scheduler/scheduler_config.json"), scheduler).unwrap();
    dir
}

/// Convolutions and projections cost as the areas do, (40/4 + 5 * 0.5625 + 5) / 50 of all steps at the final size; with
/// attention, which grows with the square, MegaFusion saves more.
#[test]
fn sd15_at_1024_costs_what_the_paper_says() {
    let dir = sd15_configs();
    let report =
        |request: &Request| pipeline::plan(&ModelSource::Directory(dir.path().into()), DType::BF16, request).unwrap();
    let denoising = |method, attention: bool| {
        // PNDM, the model's own sampler, evaluates one step twice.
        let (size, scheduler) = (Some("1024x1024".parse().unwrap()), Some(Sampler::Ddim));
        let report = report(&Request { method, size, scheduler, ..Request::default() });
        let steps = report.phases.iter().filter(|phase| phase.name == "denoise");
        let kinds = steps.flat_map(|phase| phase.by_kind.iter().map(move |(kind, work)| (kind, work, phase.repeats)));
        let counted = kinds.filter(|(kind, ..)| attention || **kind != OpKind::Attention);
        counted.map(|(_, work, repeats)| work.macs * repeats as u64).sum::<u64>() as f64
    };
    let ratio = |attention| denoising(Method::default(), attention) / denoising(Plain {}.into(), attention);
    assert!((ratio(false) - 0.35625).abs() < 1e-3, "{}", ratio(false));
    assert!((0.25..0.30).contains(&ratio(true)), "{}", ratio(true));

    let report = report(&Request::default());
    assert_eq!(
        report.stages.iter().map(Stage::to_string).collect::<Vec<_>>(),
        ["512x512:40", "768x768:5", "1024x1024:5"]
    );
    let parameters: Vec<_> = report.weights.iter().map(|weights| (weights.module, weights.parameters)).collect();
    assert_eq!(parameters, [("text_encoder", 123_060_480), ("unet", 859_520_964), ("vae", 83_653_863)]);
    // One guided step at 512x512: about 2 x 400 G multiply-accumulates.
    let step = report.phases.iter().find(|phase| phase.name == "denoise").unwrap();
    assert!((step.once.macs as f64 / 2.0 / 401e9 - 1.0).abs() < 0.2, "{}", step.once.macs / 2);
}

/// The model inside the program, with its own defaults: each object has its colour and its place.
#[test]
fn the_embedded_model_draws_what_it_is_asked_for() {
    let source = ModelSource::Embedded;
    let pipeline = Pipeline::load(source.clone(), Device::cpu(), DType::F32).unwrap();
    let usual = Request { steps: Some(12), seed: 3, ..Request::suited_to(&source) };
    let red: Colour = |[r, g, b]| r > 140 && g < 90 && b < 90;
    let blue: Colour = |[r, g, b]| r < 90 && g < 140 && b > 140;
    for (prompt, left, right) in [
        ("a large red ball on the left, on a grey ground", red, blue),
        ("a large blue cube to the left of a large red ball, on a sand ground", blue, red),
    ] {
        let plain = Request { prompt: prompt.into(), method: Plain {}.into(), ..usual.clone() };
        let picture = pipeline.generate(&plain, &mut Silent).unwrap().remove(0);
        assert_eq!((picture.width, picture.height), (64, 64));
        let shares = [left, right].map(|colour| halves(&picture, colour));
        let two = prompt.contains(" of ");
        assert!(shares[0][0] > 0.04 && shares[0][1] < 0.002, "{prompt}: {shares:?}");
        assert!(shares[1][0] < 0.002 && (shares[1][1] > 0.04) == two, "{prompt}: {shares:?}");
    }
    let picture = pipeline.generate(&Request { prompt: "a red ball".into(), ..usual }, &mut Silent).unwrap().remove(0);
    assert_eq!((picture.width, picture.height), (256, 256));
    let text = &picture.parameters.text;
    assert!(text.contains("CFG scale: 2,") && text.contains("Method: megafusion,"), "{text}");
}

type Colour = fn([u8; 3]) -> bool;

/// Share of the pixels of the left and of the right half that have a colour.
fn halves(picture: &Picture, colour: Colour) -> [f64; 2] {
    let mut found = [0.0; 2];
    for (i, pixel) in picture.rgb.chunks_exact(3).enumerate() {
        let right = usize::from(i % picture.width >= picture.width / 2);
        found[right] += f64::from(u8::from(colour([pixel[0], pixel[1], pixel[2]])));
    }
    found.map(|count| count / (picture.rgb.len() / 6) as f64)
}

/// A picture has the same bytes alone and in a batch, whatever its neighbours' prompts, guidance and seeds.
#[test]
fn a_batch_makes_the_pictures_that_its_requests_make_alone() {
    for (model, size) in [("sd15", "16x24"), ("sdxl", "16x24")] {
        let pipeline = Pipeline::load(ModelSource::Directory(drawn::folder(model)), Device::cpu(), DType::F32).unwrap();
        for method in [Plain {}.into(), MegaFusion::plus().into()] {
            let base = Request { method, size: Some(size.parse().unwrap()), steps: Some(3), ..Request::default() };
            let of = |prompt: &str, negative: Option<&str>, seed, guidance| Request {
                prompt: prompt.into(),
                negative_prompt: negative.map(String::from),
                seed,
                guidance,
                ..base.clone()
            };
            let requests = [of("a cat", None, 1, 7.0), of("two dogs", Some("red"), 7, 2.5), of("a cat", None, 2, 1.5)];
            let together = pipeline.generate_batch(&requests, &mut Silent).unwrap();
            for (request, picture) in requests.iter().zip(&together) {
                assert!(pipeline.generate(request, &mut Silent).unwrap()[0] == *picture, "{model} {request:?}");
            }
            // One prompt, several seeds: the rows of its conditioning are shared.
            let counted = |batch| {
                let request = Request { count: 5, batch, ..requests[0].clone() };
                pipeline.generate(&request, &mut Silent).unwrap()
            };
            assert!(counted(1) == counted(2), "{model}");
            assert_eq!(counted(3).iter().map(|picture| picture.seed).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
        }
        let guided = |guidance| Request { guidance, ..Request::default() };
        for other in [Request { steps: Some(2), ..Request::default() }, guided(1.0)] {
            let error = pipeline.generate_batch(&[Request::default(), other], &mut Silent).unwrap_err().to_string();
            let want = "prompt, negative prompt, guidance scale and seed alone";
            assert!(error.contains("batch with the prompt") && error.contains(want), "{error}");
        }
        let error =
            pipeline.generate_batch(&[guided(7.0), guided(f32::INFINITY)], &mut Silent).unwrap_err().to_string();
        assert!(error.contains("guidance inf"), "{error}");
    }
}

/// Weights, chunks, clip skip and learned words reach the picture, and a neighbour with a longer prompt does not.
#[test]
fn prompts_are_read_as_asked() {
    let words = data().join("prompts/sd15/toy.safetensors");
    let source = ModelSource::Directory(data().join("sd15")).with(Vec::new(), vec![words], None);
    let pipeline = Pipeline::load(source, Device::cpu(), DType::F32).unwrap();
    let (size, steps) = (Some("16x16".parse().unwrap()), Some(1));
    let plain = Request { method: Plain {}.into(), size, steps, ..Request::default() };
    let picture = |prompt: &str, text: TextOptions| {
        let request = Request { prompt: prompt.into(), text, ..plain.clone() };
        pipeline.generate(&request, &mut Silent).unwrap().remove(0).rgb
    };
    let (default, a1111) = (TextOptions::default(), TextOptions { syntax: Syntax::A1111, ..TextOptions::default() });
    let words = picture("a red cat", default);
    assert!(words == picture("a (red:1.0) cat", a1111));
    assert!(words != picture("a (red:1.6) cat", a1111));
    assert!(picture("a toy cat", default) != picture("a cat", default));

    let skip = |n| TextOptions { clip_skip: Some(n), ..TextOptions::default() };
    assert!(words == picture("a red cat", skip(1)) && words != picture("a red cat", skip(2)));
    let request = Request { text: skip(40), ..plain.clone() };
    let error = pipeline.generate(&request, &mut Silent).unwrap_err().to_string();
    assert!(error.contains("text.clip_skip 40") && error.contains("expected 1"), "{error}");

    let chunks = TextOptions { long_prompt: LongPrompt::Chunk, ..TextOptions::default() };
    let long = format!("{}and a blue dog", "a red cat ".repeat(40));
    assert!(picture(&long, chunks) != picture(&long, default));
    assert!(picture("a red cat", chunks) == words);
    let of = |prompt: &str, seed| Request { prompt: prompt.into(), seed, text: chunks, ..plain.clone() };
    let requests = [of("a red cat", 0), of(&long, 1), of("a dog", 2)];
    // Without guidance a negative prompt is not read, however long it is.
    let negative_prompt = Some(long.clone());
    let unguided =
        requests.clone().map(|request| Request { guidance: 1.0, negative_prompt: negative_prompt.clone(), ..request });
    for requests in [requests, unguided] {
        let together = pipeline.generate_batch(&requests, &mut Silent).unwrap();
        for (request, picture) in requests.iter().zip(&together) {
            assert!(pipeline.generate(request, &mut Silent).unwrap()[0] == *picture, "{:?}", request.prompt);
        }
    }
}
