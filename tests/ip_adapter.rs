//! IP-Adapters against transformers and diffusers (tools/oracle/ip_adapter.py): the image encoder, the adapters' tokens, whole runs,
//! and files that are none.

#[path = "common/arrays.rs"]
mod arrays;
#[path = "common/drawn.rs"]
mod drawn;
#[path = "common/place.rs"]
mod place;

use std::fs;
use std::path::{Path, PathBuf};

use arrays::{Arrays, arrays};
use megafuse::image::read_png_text;
use megafuse::models::unet::CrossAttentionShape;
use megafuse::models::{
    ClipVisionConfig, ClipVisionModel, ClipVisionOutput, ImageMasks, ImagePrompt, IpAdapter, IpAdapterConfig, Unet,
    UnetCall, UnetConfig, UnetOptions, WeightStore,
};
use megafuse::ops::StepIndex;
use megafuse::pipeline::{InputPicture, encoder_pixels};
use megafuse::runtime::CudaOptions;
use megafuse::{DType, Device, Tensor};
use place::Place;
use serde_json::Value;

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(path)
}

/// The cpu and the emulated card, or those that `MEGAFUSE_TEST_DEVICES` lists.
fn device_names() -> Vec<String> {
    let listed = std::env::var("MEGAFUSE_TEST_DEVICES").unwrap_or_else(|_| "cpu,emu".into());
    listed.split(',').map(String::from).collect()
}

fn device(name: &str) -> Device {
    match name {
        "cpu" => Device::cpu(),
        "emu" => Device::emulated(CudaOptions::default()).expect("the emulated card"),
        "cuda" => Device::cuda(0).expect("the card"),
        other => panic!("MEGAFUSE_TEST_DEVICES has {other:?}, expected cpu, emu and cuda, separated by commas"),
    }
}

/// The largest error of an element, relative to the larger of its size and the root mean square of all.
fn worst(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let rms = (want.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / want.len() as f64).sqrt();
    let error = |(&got, &want): (&f32, &f32)| f64::from(got - want).abs() / f64::from(want.abs()).max(rms);
    got.iter().zip(want).map(error).fold(0.0, |a, b| if b.is_nan() { f64::INFINITY } else { a.max(b) })
}

const ENCODERS: [&str; 3] = ["quick", "odd", "one-layer"];
/// Adapter, its file, its encoder, its model.
const ADAPTERS: [(&str, &str, &str, &str); 5] = [
    ("sd15-base", "sd15-base.bin", "quick", "sd15"),
    ("sd15-plus", "sd15-plus.safetensors", "quick", "sd15"),
    ("wide-base", "wide-base.safetensors", "odd", "wide"),
    ("sdxl-base", "sdxl-base.safetensors", "odd", "sdxl"),
    ("sdxl-plus", "sdxl-plus.safetensors", "one-layer", "sdxl"),
];

fn vision_config(folder: &Path) -> ClipVisionConfig {
    let path = folder.join("config.json");
    ClipVisionConfig::from_json(&path.display().to_string(), &fs::read_to_string(&path).unwrap()).unwrap()
}

fn encoder(name: &str, device: &Device, dtype: DType) -> ClipVisionModel {
    let folder = drawn::folder("ip-adapter").join(name);
    let store = WeightStore::open(&folder, "model", device, dtype).unwrap();
    ClipVisionModel::load(store, &vision_config(&folder)).unwrap()
}

fn unet_config(model: &str) -> UnetConfig {
    let path = data(model).join("unet/config.json");
    UnetConfig::from_json(&path.display().to_string(), &fs::read_to_string(&path).unwrap()).unwrap()
}

/// `[N, 3, S, S]` as the encoder takes them, picture by picture.
fn pictures((shape, values): &(Vec<usize>, Vec<f32>)) -> Vec<Vec<f32>> {
    let plane = shape[2] * shape[3];
    let of = |picture: &[f32]| (0..3 * plane).map(|i| picture[i % 3 * plane + i / 3]).collect();
    values.chunks(3 * plane).map(of).collect()
}

/// Sums of at most a hundred products in three layers; 1e-6 is what comes out.
const MODULE_TOLERANCE: f64 = 1e-5;

#[test]
fn the_encoder_says_what_transformers_does() {
    let want = arrays(&data("ip-adapter/modules.safetensors"));
    for (name, device_name) in ENCODERS.iter().flat_map(|name| device_names().into_iter().map(move |d| (name, d))) {
        let encoder = encoder(name, &device(&device_name), DType::F32);
        let mut pictures = pictures(&want[&format!("{name}.pixels")]);
        let got = encoder.forward(&pictures, ClipVisionOutput::Projected).unwrap();
        let (shape, values) = &want[&format!("{name}.embeds")];
        assert_eq!(got.shape(), &shape[..], "{name}");
        let error = worst(&got.to_f32_vec().unwrap(), values);
        assert!(error < MODULE_TOLERANCE, "{name} {device_name}: embeds off by {error:.1e}");

        pictures.push(vec![0.0; pictures[0].len()]);
        let got = encoder.forward(&pictures, ClipVisionOutput::Penultimate).unwrap();
        let (shape, values) = &want[&format!("{name}.penultimate")];
        assert_eq!(got.shape(), &shape[..], "{name}");
        let error = worst(&got.to_f32_vec().unwrap(), values);
        assert!(error < MODULE_TOLERANCE, "{name} {device_name}: penultimate off by {error:.1e}");
    }
}

#[test]
fn pictures_become_what_transformers_makes_of_them() {
    let want = arrays(&data("ip-adapter/modules.safetensors"));
    for name in ENCODERS {
        let folder = data("ip-adapter").join(name);
        for picture in ["photo", "tall", "mask"] {
            let file = InputPicture::read(&data(&format!("pictures-in/{picture}.png"))).unwrap();
            let got = encoder_pixels(&file, &folder, vision_config(&folder).image_size).unwrap();
            let (shape, values) = &want[&format!("prepared.{picture}.{name}")];
            let want = &pictures(&([&[1], &shape[..]].concat(), values.clone()))[0];
            let off = got.iter().zip(want).map(|(got, want)| (got - want).abs()).fold(0.0, f32::max);
            assert!(got.len() == want.len() && off <= 1e-6, "{picture} for {name}: off by {off}");
        }
    }
}

#[test]
fn adapters_make_the_tokens_that_diffusers_makes() {
    let folder = drawn::folder("ip-adapter");
    let want = arrays(&data("ip-adapter/modules.safetensors"));
    for (name, file, encoder, model) in ADAPTERS {
        let (unet, config) = (unet_config(model), IpAdapterConfig::read(&folder.join(file)).unwrap());
        config.check(&unet, encoder, &vision_config(&folder.join(encoder))).unwrap();
        for device_name in device_names() {
            let device = device(&device_name);
            let adapter = IpAdapter::load(&config, &unet, &device, DType::F32).unwrap();
            let of = |key: &str| {
                let (shape, values) = &want[&format!("{encoder}.{key}")];
                Tensor::from_f32(&device, shape, DType::F32, values).unwrap()
            };
            let input = match config.reads() {
                ClipVisionOutput::Projected => {
                    let none = Tensor::zeros(&device, &[1, config.embed_dim], DType::F32).unwrap();
                    Tensor::concat(&[of("embeds"), none]).unwrap()
                }
                ClipVisionOutput::Penultimate => of("penultimate"),
            };
            let tokens = adapter.tokens(&input).unwrap();
            let (shape, values) = &want[&format!("{name}.tokens")];
            assert_eq!(tokens.shape(), &shape[..], "{name}");
            let error = worst(&tokens.to_f32_vec().unwrap(), values);
            assert!(error < MODULE_TOLERANCE, "{name} {device_name}: off by {error:.1e}");
            assert_eq!(adapter.keys_and_values(&tokens).unwrap().len(), unet.cross_attentions().in_files().len());
        }
    }
}

/// Parameters of the published encoders, as counted by transformers.
#[test]
fn published_encoders_have_their_parameters() {
    let config = |hidden: usize, layers: usize, inner: usize, projection: usize| {
        let json = format!(
            r#"{{"hidden_size": {hidden}, "num_hidden_layers": {layers}, "num_attention_heads": 16, "patch_size": 14,
               "intermediate_size": {inner}, "projection_dim": {projection}, "hidden_act": "gelu", "image_size": 224}}"#
        );
        ClipVisionConfig::from_json("config.json", &json).unwrap()
    };
    let published = [(config(1280, 32, 5120, 1024), 632_076_800), (config(1664, 48, 8192, 1280), 1_844_907_264)];
    for (config, parameters) in published {
        let store = WeightStore::meta(&Device::meta(), DType::F16);
        let model = ClipVisionModel::from_weights(&store.root(), &config).unwrap();
        let count: usize = store.manifest().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
        assert_eq!(count, parameters);
        let tokens = model.forward(&[vec![0.0; 224 * 224 * 3]], ClipVisionOutput::Penultimate).unwrap();
        assert_eq!(tokens.shape(), [1, 257, config.hidden_size]);
    }
}

struct Run {
    name: String,
    args: Vec<String>,
    want: Arrays,
}

/// The stored runs, as command lines.
fn runs() -> Vec<Run> {
    let folder = drawn::folder("ip-adapter");
    let text = fs::read_to_string(data("ip-adapter/runs.json")).unwrap();
    let json: Value = serde_json::from_str(&text).unwrap();
    let path = |path: PathBuf| path.display().to_string();
    let run = |run: &Value| {
        let (name, model) = (run["name"].as_str().unwrap(), run["model"].as_str().unwrap());
        let mut args: Vec<String> = vec!["generate".into()];
        args.extend(run["args"].as_array().unwrap().iter().map(|arg| arg.as_str().unwrap().to_string()));
        args.extend(["--model".into(), path(drawn::folder(model))]);
        for adapter in run["adapters"].as_array().unwrap() {
            let (_, file, encoder, _) =
                ADAPTERS.into_iter().find(|of| of.0 == adapter["name"].as_str().unwrap()).unwrap();
            args.extend(["--ip-adapter".into(), format!("{}:{}", path(folder.join(file)), adapter["scale"])]);
            args.extend(["--ip-encoder".into(), path(folder.join(encoder))]);
        }
        // One encoder for all.
        while args.iter().filter(|arg| *arg == "--ip-encoder").count() > 1 {
            let at = args.iter().rposition(|arg| arg == "--ip-encoder").unwrap();
            args.drain(at..at + 2);
        }
        for (key, flag) in [("images", "--ip-image"), ("masks", "--ip-mask")] {
            let pictures = run[key].as_array().unwrap();
            for picture in pictures.iter().filter(|_| !pictures.iter().all(Value::is_null)) {
                let file = |name: &str| path(data(&format!("pictures-in/{name}.png")));
                args.extend([flag.into(), picture.as_str().map_or("none".into(), file)]);
            }
        }
        let expected = data(&format!("ip-adapter/{name}.safetensors"));
        if ["hidiffusion", "demofusion"].contains(&name) {
            args.extend(["--choices".into(), path(expected.clone())]);
        }
        Run { name: name.into(), args, want: arrays(&expected) }
    };
    json.as_array().unwrap().iter().map(run).collect()
}

/// torch's f32 is 2e-5 from f64 in these runs, at most.
const TOLERANCE: f64 = 1e-4;

fn agree_on(device: &str) {
    let mut failures = Vec::new();
    for Run { name, args, want } in runs() {
        let place = Place::new();
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let more = ["--device", device, "--dtype", "f32", "--out", "out.png", "--dump", "dump.safetensors"];
        place.ok(&[&args[..], &more].concat());
        let got = arrays(&place.path("dump.safetensors"));
        for (key, (shape, values)) in &want {
            assert_eq!(&got[key].0, shape, "{name} {key}");
            let error = worst(&got[key].1, values);
            if error.is_nan() || error > TOLERANCE {
                failures.push(format!("{name} {key}: off by {error:.1e}"));
            }
        }
    }
    assert!(failures.is_empty(), "{device}:\n{}", failures.join("\n"));
}

#[test]
fn runs_on_the_cpu_are_those_of_diffusers() {
    agree_on("cpu");
}

#[test]
fn runs_on_a_card_are_those_of_diffusers() {
    device_names().iter().filter(|name| *name != "cpu").for_each(|name| agree_on(name));
}

fn pixels(place: &Place, name: &str) -> Vec<u8> {
    image::open(place.path(name)).unwrap().into_rgb8().into_raw()
}

/// What a small run with an adapter of `model` is given.
fn small(model: &str, adapter: &str, scale: &str) -> Vec<String> {
    let folder = drawn::folder("ip-adapter");
    let (_, file, encoder, _) = ADAPTERS.into_iter().find(|of| of.0 == adapter).unwrap();
    let path = |path: PathBuf| path.display().to_string();
    let own = ["generate", "a cat", "--method", "plain", "--size", "16x16", "--steps", "2", "--guidance", "2"];
    let mut args: Vec<String> = own.into_iter().map(String::from).collect();
    args.extend(["--model".into(), path(drawn::folder(model)), "--device".into(), "cpu".into()]);
    args.extend(["--ip-adapter".into(), format!("{}{scale}", path(folder.join(file)))]);
    args.extend(["--ip-encoder".into(), path(folder.join(encoder))]);
    args.extend(["--ip-image".into(), path(data("pictures-in/photo.png"))]);
    args
}

fn with<'a>(args: &'a [String], more: &[&'a str]) -> Vec<&'a str> {
    args.iter().map(String::as_str).chain(more.iter().copied()).collect()
}

#[test]
fn a_scale_of_0_is_the_model_alone_and_memory_changes_nothing() {
    let place = Place::new();
    let (none, full) = (small("sd15", "sd15-plus", ":0"), small("sd15", "sd15-plus", ""));
    let alone: Vec<&str> = full[..14].iter().map(String::as_str).collect();
    place.ok(&[&alone[..], &["--out", "alone.png"]].concat());
    place.ok(&with(&none, &["--out", "none.png"]));
    place.ok(&with(&full, &["--out", "full.png"]));
    place.ok(&with(&full, &["--memory", "low", "--out", "low.png"]));
    assert_eq!(pixels(&place, "alone.png"), pixels(&place, "none.png"));
    assert_ne!(pixels(&place, "alone.png"), pixels(&place, "full.png"));
    assert_eq!(pixels(&place, "low.png"), pixels(&place, "full.png"));
    // Pictures of a batch are those made alone; another seed has the pictures' tokens from before.
    place.ok(&with(&full, &["--count", "2", "--batch", "2", "--out", "both.png"]));
    place.ok(&with(&full, &["--seed", "1", "--out", "second.png"]));
    assert_eq!(pixels(&place, "both-1.png"), pixels(&place, "full.png"));
    assert_eq!(pixels(&place, "both-2.png"), pixels(&place, "second.png"));
}

/// On the emulated card the second picture's steps are the first one's, replayed.
#[test]
fn recorded_steps_show_the_pictures_of_their_run() {
    let place = Place::new();
    let photo = small("sd15", "sd15-base", ":0.8");
    let mask = data("pictures-in/mask.png").display().to_string();
    let more = |out| ["--device", "emu", "--dtype", "f32", "--method", "megafusion", "--out", out];
    let stages = ["--stages", "16x16:2,24x24:2"];
    let own: Vec<String> = photo.iter().take(2).cloned().chain(photo[10..12].iter().cloned()).collect();
    let own = [&own[..], &photo[14..]].concat();
    let run = |tail: &[&str], out: &'static str| {
        let args = [&with(&own, &["--guidance", "2"])[..], &more(out), &stages, tail].concat();
        place.ok(&args);
    };
    run(&["--count", "2", "--ip-mask", &mask], "two.png");
    run(&["--seed", "1", "--ip-mask", &mask], "alone.png");
    run(&["--seed", "1"], "everywhere.png");
    assert_eq!(pixels(&place, "two-2.png"), pixels(&place, "alone.png"));
    assert_ne!(pixels(&place, "alone.png"), pixels(&place, "everywhere.png"));
}

#[test]
fn a_picture_says_what_it_was_shown_and_a_plan_counts_it() {
    let place = Place::new();
    let args = small("sd15", "sd15-base", ":0.5");
    place.ok(&with(&args, &["--out", "out.png"]));
    let files = &args[14..];
    let again = ["generate", "--from", "out.png", "--model", &args[11], "--device", "cpu", "--out", "again.png"];
    let message = String::from_utf8_lossy(&place.run(&again).stderr).into_owned();
    for part in ["--ip-adapter sd15-base.safetensors:0.5", "--ip-image photo.png"] {
        assert!(message.contains(part), "{message}");
    }
    place.ok(&[&again[..], &files.iter().map(String::as_str).collect::<Vec<_>>()].concat());
    assert_eq!(place.bytes("out.png"), place.bytes("again.png"));

    let plan = ["plan", "a cat", "--model", &args[11], "--size", "16x16", "--method", "plain", "--json"];
    let plan = place.ok(&[&plan[..], &files.iter().map(String::as_str).collect::<Vec<_>>()].concat());
    let plan: Value = serde_json::from_str(&plan).unwrap();
    let modules: Vec<&str> =
        plan["weights"].as_array().unwrap().iter().map(|part| part["module"].as_str().unwrap()).collect();
    assert_eq!(modules, ["text_encoder", "unet", "vae", "image_encoder", "ip_adapter"]);

    // Without a prompt there are words for good pictures.
    let wordless: Vec<&str> = args.iter().enumerate().filter(|(i, _)| *i != 1).map(|(_, arg)| arg.as_str()).collect();
    place.ok(&[&wordless[..], &["--out", "wordless.png"]].concat());
    let text = String::from_utf8_lossy(&place.bytes("wordless.png")).into_owned();
    assert!(text.contains("best quality, high quality") && text.contains("monochrome, lowres, bad anatomy"), "words");
}

#[test]
fn what_does_not_go_together_is_named() {
    let place = Place::new();
    let file = |name: &str, keys: &[&str]| {
        let (path, zero) = (place.path(name), [0u8; 16]);
        let view = || safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![2, 2], &zero).unwrap();
        fs::write(&path, safetensors::serialize(keys.iter().map(|key| (*key, view())), None).unwrap()).unwrap();
        path.display().to_string()
    };
    let t2i = file("t2i.safetensors", &["body.0.in_conv.weight", "body.0.block1.weight"]);
    let face = file("face.safetensors", &["image_proj.proj.0.weight", "ip_adapter.0.to_q_lora.down.weight"]);
    let full = file("full.safetensors", &["image_proj.proj.3.weight", "ip_adapter.1.to_k_ip.weight"]);
    let half = file("half.safetensors", &["image_proj.proj.weight", "ip_adapter.3.to_k_ip.weight"]);
    let folder = drawn::folder("ip-adapter");
    let path = |path: PathBuf| path.display().to_string();
    let (base, odd) = (path(folder.join("sd15-base.bin")), path(folder.join("odd")));
    let (quick, sdxl) = (path(folder.join("quick")), path(folder.join("sdxl-base.safetensors")));
    let photo = path(data("pictures-in/photo.png"));
    let (lora, text) = (path(data("single-file/lora-kohya.safetensors")), path(data("sd15/text_encoder")));
    let much = format!("{base}:much");
    let with_encoder = |adapter, encoder| ["--ip-adapter", adapter, "--ip-encoder", encoder, "--ip-image", &photo];
    let cases: Vec<(Vec<&str>, Vec<&str>)> = vec![
        (with_encoder(&t2i, &quick).to_vec(), vec!["t2i.safetensors", "T2I-Adapter"]),
        (with_encoder(&face, &quick).to_vec(), vec!["face.safetensors", "FaceID"]),
        (with_encoder(&full, &quick).to_vec(), vec!["full.safetensors", "the full kind"]),
        (with_encoder(&half, &quick).to_vec(), vec!["half.safetensors", "has no ip_adapter.1.to_k_ip.weight"]),
        (with_encoder(&lora, &quick).to_vec(), vec!["is a LoRA, not an IP-Adapter: give it as a LoRA"]),
        (with_encoder(&base, &odd).to_vec(), vec!["sd15-base.bin", "reads 20 channels", "projection_dim 12"]),
        (with_encoder(&base, &text).to_vec(), vec!["text_encoder/config.json", "clip_text_model"]),
        (with_encoder(&sdxl, &odd).to_vec(), vec!["sdxl-base", "read 40", "6 cross-attentions", "another family"]),
        (with_encoder(&much, &quick).to_vec(), vec!["--ip-adapter", "\"much\" is no number", "FILE:SCALE"]),
        (vec!["--ip-adapter", &base, "--ip-image", &photo], vec!["image_encoder/config.json", "--ip-encoder"]),
        (vec!["--ip-adapter", &base, "--ip-encoder", &quick], vec!["there is none for it", "--ip-image"]),
        (vec!["--ip-image", &photo], vec!["--ip-adapter"]),
        (
            [&with_encoder(&base, &quick)[..], &["--ip-mask", &photo, "--method", "multidiffusion"]].concat(),
            vec!["--ip-mask photo.png", "multidiffusion", "views"],
        ),
        (
            [&with_encoder(&base, &quick)[..], &["--ip-image", &photo, "--ip-mask", "none", "--ip-mask", &photo]]
                .concat(),
            vec![],
        ),
        (
            [&with_encoder(&base, &quick)[..], &["--ip-mask", &photo, "--ip-mask", &photo]].concat(),
            vec!["--ip-mask", "1 pictures take one mask each"],
        ),
        (
            [&with_encoder(&base, &quick)[..], &["--ip-adapter", &base, "--ip-image", &photo, "--ip-image", &photo]]
                .concat(),
            vec!["--ip-image", "2 adapters take one picture each", "there are 3"],
        ),
    ];
    let own = ["generate", "a cat", "--model", place::MODEL, "--size", "16x16", "--steps", "1", "--device", "cpu"];
    for (more, wanted) in cases {
        let method: &[&str] = if more.contains(&"--method") { &[] } else { &["--method", "plain"] };
        let output = place.run(&[&own[..], method, &more, &["--out", "out.png"]].concat());
        let said = place::text(&output.stderr);
        assert_eq!(output.status.success(), wanted.is_empty(), "{more:?}: {said}");
        assert!(wanted.iter().all(|part| said.contains(part)) && !said.contains("panicked"), "{more:?}: {said}");
    }
}

/// One kernel a cross-attention with one picture as without, in a step of SD 1.5; a second adapter costs two launches in each, and so
/// does a mask.
#[test]
fn a_step_with_a_picture_has_no_further_launch() {
    let device = Device::meta();
    let Device::Meta(meta) = &device else { unreachable!() };
    let json = fs::read_to_string(data("manifest/sd15-unet.json")).unwrap();
    let config = UnetConfig::from_json("config.json", &json).unwrap();
    let unet = Unet::load(WeightStore::meta(&device, DType::BF16), &config).unwrap();
    let zeros = |shape: &[usize], dtype| Tensor::zeros(&device, shape, dtype).unwrap();
    let prompt = || {
        let shapes = config.cross_attentions().numbered_as_run();
        let kv = |(_, shape): &(usize, CrossAttentionShape)| {
            zeros(&[2, 4, 2, shape.heads, shape.channels / shape.heads], DType::BF16)
        };
        ImagePrompt { kv: shapes.iter().map(kv).collect(), scale: 1.0 }
    };
    let launches = |prompts: usize, masks: Vec<Option<Tensor>>| {
        let text = zeros(&[2, 77, 768], DType::BF16);
        let images = (0..prompts).map(|_| prompt()).collect();
        let conditioning = unet.condition(&text, &[0.0]).unwrap().with_images(&unet, images).unwrap();
        let (options, masks) = (UnetOptions::default(), ImageMasks::new(masks));
        let call = UnetCall { image_masks: Some(&masks), ..UnetCall::from(&options) };
        let (x, step) = (zeros(&[2, 64, 64, 4], DType::BF16), StepIndex::one(&device, 0).unwrap());
        // The masks of the maps are made by the first call.
        unet.forward(&x, &step, &conditioning, call).unwrap();
        meta.take_report();
        unet.forward(&x, &step, &conditioning, call).unwrap();
        meta.take_report().total().launches
    };
    let alone = launches(0, Vec::new());
    assert_eq!(launches(1, Vec::new()), alone);
    assert_eq!(launches(2, Vec::new()), alone + 2 * 16);
    assert_eq!(launches(1, vec![Some(zeros(&[1, 512, 512, 1], DType::F32))]), alone + 2 * 16);

    let few = vec![ImagePrompt { kv: prompt().kv[..15].to_vec(), scale: 1.0 }];
    let conditioning = unet.condition(&zeros(&[2, 77, 768], DType::BF16), &[0.0]).unwrap();
    let error = conditioning.with_images(&unet, few).map(drop).unwrap_err().to_string();
    assert!(error.contains("is 15, expected 16, the cross-attentions of the network"), "{error}");
}

/// The words for pictures alone are of a line that has none, not of one with a prompt.
#[test]
fn lines_have_the_words_that_they_are_alone_with() {
    let place = Place::new();
    let args = small("sd15", "sd15-base", "");
    let own: Vec<&str> = args.iter().enumerate().filter(|(i, _)| *i != 1).map(|(_, arg)| arg.as_str()).collect();
    fs::write(
        place.path("lines.jsonl"),
        "{\"prompt\": \"a dog\", \"id\": \"dog\"}\n{\"prompt\": \"\", \"id\": \"none\"}",
    )
    .unwrap();
    place.ok(&[&own[..], &["--manifest", "lines.jsonl", "--out", "made"]].concat());
    for (id, prompt) in [("dog", "a dog"), ("none", "")] {
        let line: Value =
            serde_json::from_str(&read_png_text(&place.path(&format!("made/{id}.png")), "megafuse").unwrap().unwrap())
                .unwrap();
        let seed = line["seed"].to_string();
        let alone = [&own[..1], &[prompt], &own[1..], &["--seed", &seed, "--out", "alone.png"]].concat();
        place.ok(&alone);
        assert_eq!(place.bytes("alone.png"), place.bytes(&format!("made/{id}.png")), "{id}");
        assert_eq!(line["negative_prompt"].as_str().is_some_and(|text| !text.is_empty()), id == "none", "{line}");
    }
}
