//! ControlNets against what tools/oracle/controlnet.py stored: one call through `probe`, whole runs through `generate`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use megafuse::image::read_image;
use megafuse::models::{ControlNet, ControlNetConfig, WeightStore};
use megafuse::pipeline::{ControlImage, ControlInput, LoadOptions, ModelSource, Plain, Planner, Request};
use megafuse::{DType, Device};
use safetensors::SafeTensors;
use serde_json::Value;

use crate::drawn;
use crate::files::{self, Array, Arrays, all_passed, compare, data, megafuse};
use crate::modules::TOLERANCE;
use crate::runs::{Run, check_half, check_in, generate, listed};
use crate::skip;

const FOLDER: &str = "control";

/// The ControlNets, and the model of each.
const NETS: [(&str, &str); 6] = [
    ("sd15-edges", "sd15"),
    ("sd15-depth", "sd15"),
    ("sd21", "sd21"),
    ("four-levels", "four-levels"),
    ("sdxl", "sdxl"),
    ("sdxl-turbo", "sdxl-turbo"),
];

fn net(name: &str) -> PathBuf {
    drawn::folder(&format!("{FOLDER}/{name}"))
}

/// `probe --module unet --control` with the stored inputs, against the stored outputs.
fn probe(control: &str, path: &Path, model: &str, more: &[&str]) -> Result<(), String> {
    let want = Arrays::read(data(FOLDER).join(control).join("expected.safetensors"));
    let folder = tempfile::tempdir().unwrap();
    let (input, out) = (folder.path().join("in.safetensors"), folder.path().join("out.safetensors"));
    let inputs = ["sample", "timestep", "prompt_embeds", "pooled_prompt_embeds", "time_ids", "control"];
    let inputs: Vec<(&str, Array)> =
        inputs.into_iter().filter_map(|name| Some((name, want.0.get(name)?.clone()))).collect();
    files::write(&input, &inputs);
    let path_text = |path: &Path| path.display().to_string();
    let mut args = vec!["probe", "--module", "unet"].into_iter().map(String::from).collect::<Vec<_>>();
    for (flag, value) in [
        ("--model", path_text(&drawn::folder(model))),
        ("--control", path_text(path)),
        ("--control-scale", want.get("scale").values[0].to_string()),
        ("--in", path_text(&input)),
        ("--out", path_text(&out)),
    ] {
        args.extend([flag.to_string(), value]);
    }
    args.extend(more.iter().map(ToString::to_string));
    if !more.contains(&"--device") {
        args.extend(["--device", "cpu"].map(String::from));
    }
    megafuse(&args).map_err(|e| format!("{control}: {e}"))?;
    let got = Arrays::read(out);
    let outputs = want.0.iter().filter(|(name, _)| name.starts_with("control.") || *name == "out");
    let differences: Vec<String> = outputs
        .filter_map(|(name, want)| compare(&format!("{control} {name}"), got.get(name), want, TOLERANCE).err())
        .collect();
    if differences.is_empty() { Ok(()) } else { Err(differences.join("\n  ")) }
}

#[test]
fn one_call() {
    all_passed(NETS.iter().map(|(control, model)| probe(control, &net(control), model, &[])).collect());
}

/// A file with the keys of the first published code, with and without `control_model.`, reads as the directory does.
#[test]
fn one_file() {
    let (control, model) = ("four-levels", "four-levels");
    let directory = net(control);
    let bytes = std::fs::read(directory.join("diffusion_pytorch_model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let described = files::json(format!("{FOLDER}/{control}/diffusion_pytorch_model.drawn.json"));
    let names = files::json(format!("{FOLDER}/{control}/ldm.json"));
    let text = |value: &Value| value.as_str().unwrap().to_string();
    let names: Vec<(String, String)> = described["tensors"]
        .as_array()
        .unwrap()
        .iter()
        .zip(names.as_array().unwrap())
        .map(|(tensor, ldm)| (text(&tensor[0]), text(ldm)))
        .collect();
    let config = std::fs::read_to_string(directory.join("config.json")).unwrap();
    let metadata = HashMap::from([("controlnet/config.json".to_string(), config)]);
    let folder = tempfile::tempdir().unwrap();
    for prefix in ["control_model.", ""] {
        let renamed = names.iter().map(|(key, ldm)| (format!("{prefix}{ldm}"), tensors.tensor(key).unwrap()));
        let file = folder.path().join("control.safetensors");
        std::fs::write(&file, safetensors::serialize(renamed, Some(metadata.clone())).unwrap()).unwrap();
        probe(control, &file, model, &[]).unwrap();
    }
}

/// The runs whose name begins so, with the paths of their ControlNets and pictures.
fn runs(prefix: &str) -> Vec<Run> {
    let mut runs = listed(&format!("{FOLDER}/runs.json"), &["runs"], |name| name.starts_with(prefix));
    for run in &mut runs {
        for i in 1..run.args.len() {
            run.args[i] = match run.args[i - 1].as_str() {
                "--control" => net(&run.args[i]).display().to_string(),
                "--control-image" => data(FOLDER).join(&run.args[i]).display().to_string(),
                _ => continue,
            };
        }
    }
    runs
}

fn check(prefix: &str, more: &[&str]) {
    all_passed(runs(prefix).iter().map(|run| check_in(FOLDER, run, more)).collect());
}

#[test]
fn plain_runs() {
    check("plain", &[]);
}

#[test]
fn several_controlnets() {
    check("several", &[]);
}

#[test]
fn guess_mode() {
    check("guess", &[]);
}

#[test]
fn sdxl() {
    check("sdxl", &[]);
}

#[test]
fn relays() {
    check("mega", &[]);
}

#[test]
fn hidiffusion() {
    check("hi-", &[]);
}

#[test]
fn views() {
    check("multi", &[]);
    check("demo", &[]);
}

#[test]
fn in_half_precision() {
    if skip::has_emulated_card() {
        all_passed(vec![check_half(FOLDER, &run("plain"))]);
    }
}

/// The one of this name.
fn run(name: &str) -> Run {
    runs(name).into_iter().find(|run| run.name == name).expect("a run of this name")
}

/// The same from another seed.
fn seeded(name: &str, seed: &str) -> Run {
    let mut run = run(name);
    let at = run.args.iter().position(|arg| arg == "--seed").unwrap();
    run.args[at + 1] = seed.into();
    run
}

/// The pictures of a batch, which share the calls of a ControlNet, are to the bit those that are made alone.
#[test]
fn batches() {
    for name in ["guess", "multi"] {
        let folder = tempfile::tempdir().unwrap();
        let dump = |name: &str| Arrays::read(folder.path().join(name)).0;
        generate(folder.path(), &seeded(name, "91"), &["--count", "2", "--batch", "2"]).unwrap();
        for (seed, of_batch) in [("91", "dump-1.safetensors"), ("92", "dump-2.safetensors")] {
            generate(folder.path(), &seeded(name, seed), &[]).unwrap();
            assert!(dump(of_batch) == dump("dump.safetensors"), "{name} {seed}");
        }
        assert!(dump("dump-1.safetensors") != dump("dump-2.safetensors"), "{name}: both from one seed");
    }
}

/// One of each kind with recorded steps; the second picture's steps are replays, in the memory of the first one's.
#[test]
fn on_the_emulated_card() {
    if !skip::has_emulated_card() {
        return;
    }
    const EMU: [&str; 4] = ["--device", "emu", "--dtype", "f32"];
    for name in ["plain", "several-shares", "sdxl-guess", "mega-shares", "hi-sdxl", "demo"] {
        check(name, &EMU);
    }
    for name in ["guess", "mega-shares", "multi"] {
        let folder = tempfile::tempdir().unwrap();
        generate(folder.path(), &seeded(name, "91"), &[&EMU[..], &["--count", "2"]].concat()).unwrap();
        generate(folder.path(), &seeded(name, "92"), &EMU).unwrap();
        let read = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
        assert!(read("out-2.png") == read("out.png"), "{name}");
    }
}

/// Of the published ControlNets, from their configurations alone.
#[test]
fn parameters_of_the_published_ones() {
    let config = |more: &str| {
        let own = r#""_class_name": "ControlNetModel", "norm_num_groups": 32"#;
        ControlNetConfig::from_json("config.json", &format!("{{{own}, {more}}}")).expect("a good config")
    };
    let sd15 = config(r#""cross_attention_dim": 768, "attention_head_dim": 8"#);
    let sdxl = config(
        r#""cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280],
           "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], "use_linear_projection": true,
           "transformer_layers_per_block": [1, 2, 10], "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
           "projection_class_embeddings_input_dim": 2816"#,
    );
    for (config, want) in [(sd15, 361_279_120), (sdxl, 1_251_014_160)] {
        let store = WeightStore::meta(&Device::meta(), DType::F32);
        ControlNet::from_weights(&store.root(), &config).expect("a manifest");
        let parameters: usize = store.manifest().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
        assert_eq!(parameters, want);
    }
}

/// What `generate` says to arguments that it refuses, in `folder`.
fn refused(folder: &Path, args: &[&str]) -> String {
    let model = data("sd15").display().to_string();
    let out = folder.join("out.png").display().to_string();
    let always = ["generate", "a cat", "--method", "plain", "--size", "16x16", "--steps", "1", "--device", "cpu"];
    let args = [&always[..], &["--model", &model, "--out", &out], args].concat();
    megafuse(&args).expect_err(&format!("{args:?} is refused"))
}

#[test]
fn bad_inputs_have_their_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (edges, picture) = (net("sd15-edges").display().to_string(), data("control/picture.png").display().to_string());
    let (sd21, stages) = (net("sd21").display().to_string(), data("control/stages.safetensors").display().to_string());
    let file = |name: &str, tensors: &[(&str, &[usize], f32)]| {
        let array =
            |shape: &[usize], value| Array { shape: shape.to_vec(), values: vec![value; shape.iter().product()] };
        let arrays: Vec<(&str, Array)> = tensors.iter().map(|(key, shape, x)| (*key, array(shape, *x))).collect();
        files::write(&folder.path().join(name), &arrays);
        path(name)
    };
    let adapter = folder.path().join("adapter");
    std::fs::create_dir(&adapter).unwrap();
    std::fs::write(adapter.join("config.json"), r#"{"_class_name": "T2IAdapter"}"#).unwrap();
    let pooled = folder.path().join("pooled");
    std::fs::create_dir(&pooled).unwrap();
    let config = std::fs::read_to_string(net("sd15-edges").join("config.json")).unwrap();
    std::fs::write(pooled.join("config.json"), config.replacen('{', "{\"global_pool_conditions\": true,", 1)).unwrap();
    std::fs::create_dir(folder.path().join("empty")).unwrap();
    let lora = file("lora.safetensors", &[("lora_controlnet", &[1], 0.0), ("input_blocks.0.0.up", &[1], 0.0)]);
    let difference =
        file("difference.safetensors", &[("difference", &[1], 0.0), ("input_hint_block.0.weight", &[1], 0.0)]);
    let union = file("union.safetensors", &[("task_embedding", &[1], 0.0)]);
    let t2i = file("t2i.safetensors", &[("adapter.body.0.block1.weight", &[1], 0.0)]);
    let vae = file("vae.safetensors", &[("decoder.mid.block_1.norm1.weight", &[1], 0.0), ("encoder.mid.x", &[1], 0.0)]);
    let wide = file("wide.safetensors", &[("control_model.input_hint_block.0.weight", &[1], 0.0)]);
    let bright = file("bright.safetensors", &[("control0", &[1, 3, 16, 16], 2.0)]);
    let none = file("none.safetensors", &[("x", &[1, 3, 16, 16], 1.0)]);
    let one =
        |more: &[&str]| [&["--control", edges.as_str(), "--control-image", picture.as_str()], more].concat().join("\n");
    let with = |control: &str, image: &str| format!("--control\n{control}\n--control-image\n{image}");
    let cases: Vec<(String, Vec<&str>)> = vec![
        (format!("--control\n{edges}"), vec!["--control ", "has no picture to read", "--control-image"]),
        (one(&["--control-image", &picture]), vec!["--control-image", "one more than the 1 given with --control"]),
        (format!("--control-image\n{picture}"), vec!["--control <CONTROLNET>"]),
        (with(&path("missing"), &picture), vec!["missing", "No such file or directory"]),
        (with(&path("empty"), &picture), vec!["has no config.json", "ControlNet"]),
        (with(&path("adapter"), &picture), vec!["T2IAdapter", "this is a T2I-Adapter", "expected a ControlNet"]),
        (with(&path("pooled"), &picture), vec!["global_pool_conditions is true", "only false is"]),
        (
            with(&sd21, &picture),
            vec!["sd21", "cross_attention_dim 32, unet/config.json 16", "trained for another model"],
        ),
        (with(&lora, &picture), vec!["is a ControlNet-LoRA", "download the full ControlNet"]),
        (with(&difference, &picture), vec!["holds the difference between a ControlNet and a model"]),
        (with(&union, &picture), vec!["is a union of ControlNets"]),
        (with(&t2i, &picture), vec!["is a T2I-Adapter"]),
        (with(&vae, &picture), vec!["is no ControlNet", "a VAE"]),
        (with(&wide, &picture), vec!["text is none channels wide", "config.json"]),
        (with(&picture, &picture), vec!["picture.png", "not a readable safetensors file"]),
        (with(&edges, &path("missing.png")), vec!["missing.png", "no such file; expected a PNG, JPEG or WebP file"]),
        (with(&edges, &bright), vec!["control0 has the value 2, expected 0 to 1"]),
        (with(&edges, &none), vec!["holds no tensor control<k>"]),
        (with(&edges, &stages), vec!["control0 is 12x12, expected 16x16, the size of that stage"]),
        (one(&["--control-scale", "much"]), vec!["much", "expected a number; 1 is usual"]),
        (one(&["--control-scale", "nan"]), vec!["expected a number; 1 is usual"]),
        (one(&["--control-scale", "1", "--control-scale", "2"]), vec!["expected one for all ControlNets, or 1"]),
        (
            one(&["--control-start", "0.5", "--control-end", "0.5"]),
            vec!["--control-end 0.5", "more than --control-start"],
        ),
        (one(&["--control-start", "1.5"]), vec!["1.5", "expected a number from 0 to 1"]),
        (one(&["--control-canny", "200,100"]), vec!["expected LOW,HIGH"]),
        (
            format!("{}\n--control-canny\n1,2", with(&edges, &stages)),
            vec!["stages.safetensors", "edges are found in a picture file"],
        ),
    ];
    for (args, wanted) in cases {
        let args: Vec<&str> = args.split('\n').collect();
        let message = refused(folder.path(), &args);
        assert!(!message.contains("panicked"), "{message}");
        for part in wanted {
            assert!(message.contains(part), "{args:?}: {part:?} is not in: {message}");
        }
    }
    assert!(!folder.path().join("out.png").exists());
}

/// A picture says which ControlNets made it; with these named it is made again, the same bytes.
#[test]
fn a_picture_is_made_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let run = |args: &[&str]| megafuse(args);
    let (edges, depth) = (net("sd15-edges").display().to_string(), net("sd15-depth").display().to_string());
    let (picture, model) = (data("control/picture.png").display().to_string(), data("sd15").display().to_string());
    let (first, again) = (path("first.png"), path("again.png"));
    let files = ["--control", &edges, "--control", &depth, "--control-image", &picture, "--control-image", &picture];
    let own = [
        "--control-scale",
        "0.5",
        "--control-scale",
        "-0.25",
        "--control-end",
        "0.6",
        "--control-guess",
        "--control-canny",
    ];
    let always = ["--model", &model, "--device", "cpu"];
    let flags = ["a cat", "--method", "plain", "--size", "16x16", "--steps", "2", "--seed", "3"];
    run(&[
        &["generate"],
        &flags[..],
        &files,
        &own,
        &["100,300", "--control-canny", "none"],
        &always,
        &["--out", &first],
    ]
    .concat())
    .unwrap();
    let missing = run(&[&["generate", "--from", &first, "--out", &again], &always[..]].concat()).unwrap_err();
    for part in ["--control sd15-edges", "--control-image picture.png", "not named"] {
        assert!(missing.contains(part), "{missing}");
    }
    run(&[&["generate", "--from", &first, "--out", &again], &always[..], &files].concat()).unwrap();
    assert!(std::fs::read(&first).unwrap() == std::fs::read(&again).unwrap());
    // What is on no more, and edges that are not found, make another picture.
    let other =
        [&["generate", "--from", &first, "--control-canny", "none", "--out", &again], &always[..], &files].concat();
    run(&other).unwrap();
    assert!(std::fs::read(&first).unwrap() != std::fs::read(&again).unwrap());
}

/// The ControlNet's weights and work are counted, and nothing of them is read.
#[test]
fn a_plan_counts_it() {
    let planner = |controls: Vec<PathBuf>| {
        let mut options = LoadOptions::new(Device::meta(), DType::F32);
        options.controls = controls;
        Planner::with(&ModelSource::Directory(data("sd15")), &options).expect("a planner")
    };
    let image = ControlImage::read(&data("control/picture.png")).expect("a picture");
    let request =
        |controls| Request { steps: Some(3), controls, ..Request { method: Plain {}.into(), ..Request::default() } };
    let without = planner(Vec::new()).plan(&request(Vec::new())).expect("a plan");
    let with = planner(vec![net("sd15-edges")]).plan(&request(vec![ControlInput::new(image)])).expect("a plan");
    let module = with.weights.iter().find(|weights| weights.module == "controlnet").expect("the ControlNet");
    assert!(module.parameters > 10_000, "{}", module.parameters);
    assert!(with.total.macs > without.total.macs * 5 / 4 && with.peak_bytes > without.peak_bytes);
}

/// A scale of 0 leaves every method's bytes as they are; and at whichever one place of the schedule a ControlNet is on, the picture
/// is another one.
#[test]
fn every_method_has_it() {
    let (xl, turbo, sd) = (("sdxl", "sdxl"), ("sdxl-turbo", "sdxl-turbo"), ("sd15-edges", "sd15"));
    let cases = [
        (xl, "fouriscale --size 64x64 --steps 2"),
        (xl, "scalecrafter --size 64x64 --steps 2 --redilate M=2 --damped M=2 --damped-steps 2"),
        (xl, "upsample-guidance --size 64x64 --steps 2"),
        // Beside a ControlNet t1 is another one by default.
        (xl, "megafusion --stages 32x32:1,48x40:2+hidiffusion --t1 0.5"),
        (sd, "frecas --size 64x64 --steps 3"),
        (sd, "diffusehigh --size 48x48 --steps 4"),
        (sd, "scalediff --size 64x64 --steps 3"),
        (sd, "hires-fix --stages 16x16:2,24x22:2"),
        (sd, "megafusion++ --stages 16x16:2,26x22:2+crops"),
        (sd, "multidiffusion --size 48x20 --circular --window 8 --stride 4 --steps 2"),
        (turbo, "pixelrush --size 32x32"),
        (turbo, "megafusion --stages 16x16:1,32x30:1+demofusion"),
    ];
    let folder = tempfile::tempdir().unwrap();
    let picture = data("control/picture.png").display().to_string();
    for ((control, model), method) in cases {
        let (net, model) = (net(control).display().to_string(), drawn::folder(model).display().to_string());
        let made = |more: &[&str]| {
            let [out, dump] = ["out.png", "dump.safetensors"].map(|name| folder.path().join(name));
            let always = ["generate", "a cat", "--guidance", "2", "--device", "cpu", "--model", &model, "--method"];
            let files = ["--out", out.to_str().unwrap(), "--dump", dump.to_str().unwrap()];
            let own: Vec<&str> = method.split(' ').chain(files).collect();
            megafuse(&[&always[..], &own, more].concat()).unwrap_or_else(|error| panic!("{method}: {error}"));
            (read_image(&out).expect("a picture").2, Arrays::read(dump))
        };
        let with = |scale, more: &[&str]| {
            made(&[&["--control", &net, "--control-image", &picture, "--control-scale", scale], more].concat())
        };
        let (picture_without, without) = made(&[]);
        assert!(picture_without == with("0", &[]).0, "{method}");
        assert!(picture_without != with("1", &[]).0, "{method}");
        let places = without.get("timesteps").values.len();
        for place in 0..places {
            // A little more than its share, so that no rounding leaves it out.
            let share = |place: usize, more: f64| (place as f64 / places as f64 + more).clamp(0.0, 1.0).to_string();
            let (start, end) = (share(place, -1e-3), share(place + 1, 1e-3));
            let (_, here) = with("1", &["--control-start", &start, "--control-end", &end]);
            assert!(without.get("image") != here.get("image"), "{method}: place {place} of {places}");
        }
    }
}

/// A line of a manifest may have pictures of its own, beside the file.
#[test]
fn lines_have_their_own_pictures() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let white = Array { shape: vec![1, 3, 16, 16], values: vec![1.0; 768] };
    files::write(&folder.path().join("white.safetensors"), &[("control0", white)]);
    std::fs::copy(data("control/picture.png"), folder.path().join("picture.png")).unwrap();
    let lines = [
        r#"{"prompt": "a cat", "seed": 1, "id": "white", "control_image": "white.safetensors"}"#,
        r#"{"prompt": "a cat", "seed": 1, "id": "flags"}"#,
    ];
    std::fs::write(path("lines.jsonl"), lines.join("\n")).unwrap();
    let (edges, model) = (net("sd15-edges").display().to_string(), data("sd15").display().to_string());
    let always = ["--method", "plain", "--size", "16x16", "--steps", "1", "--device", "cpu", "--model", &model];
    let controlled = |image: &str| ["--control", &edges, "--control-image", image].map(String::from);
    let run = |head: &[&str], image: &str| {
        let args: Vec<String> = head.iter().chain(&always).map(ToString::to_string).chain(controlled(image)).collect();
        megafuse(&args)
    };
    run(&["generate", "--manifest", &path("lines.jsonl"), "--out", &path("made")], &path("picture.png")).unwrap();
    for (id, image) in [("white", "white.safetensors"), ("flags", "picture.png")] {
        run(&["generate", "a cat", "--seed", "1", "--out", &path("alone.png")], &path(image)).unwrap();
        let read = |name: String| std::fs::read(name).unwrap();
        assert!(read(path("alone.png")) == read(path(&format!("made/{id}.png"))), "{id}");
    }
    std::fs::write(path("lines.jsonl"), r#"{"prompt": "a", "control_image": ["a.png", "b.png"]}"#).unwrap();
    let error = run(&["generate", "--manifest", &path("lines.jsonl"), "--out", &path("more")], &path("picture.png"));
    assert!(error.as_ref().is_err_and(|error| error.contains("expected 1, one for each --control")), "{error:?}");
}

/// A line's picture that does not fit is found before the first picture is made.
#[test]
fn a_lines_picture_of_another_size_is_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    for (name, side) in [("right", 16), ("wrong", 8)] {
        let white = Array { shape: vec![1, 3, side, side], values: vec![1.0; 3 * side * side] };
        files::write(&folder.path().join(format!("{name}.safetensors")), &[("control0", white)]);
    }
    let line = |name: &str| format!(r#"{{"prompt": "a cat", "control_image": "{name}.safetensors"}}"#);
    std::fs::write(path("lines.jsonl"), [line("right"), line("wrong")].join("\n")).unwrap();
    let (edges, model) = (net("sd15-edges").display().to_string(), data("sd15").display().to_string());
    let args =
        ["generate", "--method", "plain", "--size", "16x16", "--steps", "1", "--device", "cpu", "--model", &model];
    let files = [path("lines.jsonl"), path("made"), path("right.safetensors")];
    let files = ["--manifest", &files[0], "--out", &files[1], "--control", &edges, "--control-image", &files[2]];
    let error = megafuse(&[&args[..], &files].concat()).unwrap_err();
    for part in ["lines.jsonl:2", "control0 is 8x8, expected 16x16"] {
        assert!(error.contains(part), "{part} is not in: {error}");
    }
    assert!(!folder.path().join("made").exists());
}
