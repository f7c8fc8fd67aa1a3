//! ControlNets against what tools/oracle/controlnet.py stored: one call through `probe`, whole runs through `generate`.

use std::collections::HashMap;
use std::path::PathBuf;

use safetensors::SafeTensors;
use serde_json::Value;

use crate::drawn;
use crate::files::{self, Array, Arrays, all_passed, compare, data, megafuse};
use crate::runs::{Run, check_in, generate, listed};

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

/// The expected values are f64's.
const TOLERANCE: f64 = 2e-5;

fn net(name: &str) -> PathBuf {
    drawn::folder(&format!("{FOLDER}/{name}"))
}

/// `probe --module unet --control` with the stored inputs, against the stored outputs.
fn probe(control: &str, path: &std::path::Path, model: &str, more: &[&str]) -> Result<(), String> {
    let want = Arrays::read(data(FOLDER).join(control).join("expected.safetensors"));
    let folder = tempfile::tempdir().unwrap();
    let (input, out) = (folder.path().join("in.safetensors"), folder.path().join("out.safetensors"));
    let inputs = ["sample", "timestep", "prompt_embeds", "pooled_prompt_embeds", "time_ids", "control"];
    let inputs: Vec<(&str, Array)> =
        inputs.into_iter().filter_map(|name| Some((name, want.0.get(name)?.clone()))).collect();
    files::write(&input, &inputs);
    let path_text = |path: &std::path::Path| path.display().to_string();
    let mut args = vec!["probe", "--module", "unet"].into_iter().map(String::from).collect::<Vec<_>>();
    for (flag, value) in [
        ("--model", path_text(&data(model))),
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

/// One of each kind with recorded steps; the second picture's steps are replays, in the memory of the first one's.
#[test]
fn on_the_emulated_card() {
    let devices = std::env::var("MEGAFUSE_TEST_DEVICES").unwrap_or_else(|_| "cpu,emu".into());
    if !devices.split(',').any(|device| device == "emu") {
        eprintln!("MEGAFUSE_TEST_DEVICES has no emu: nothing is checked");
        return;
    }
    const EMU: [&str; 4] = ["--device", "emu", "--dtype", "f32"];
    for name in ["plain", "several-shares", "sdxl-guess", "mega-shares", "hi-sdxl", "demo"] {
        check(name, &EMU);
    }
    let run = |name: &str| runs(name).remove(0);
    for name in ["guess", "mega-shares", "multi"] {
        let folder = tempfile::tempdir().unwrap();
        let alone = |seed: &str| {
            let mut run = run(name);
            let at = run.args.iter().position(|arg| arg == "--seed").unwrap();
            run.args[at + 1] = seed.into();
            run
        };
        generate(folder.path(), &alone("91"), &[&EMU[..], &["--count", "2"]].concat()).unwrap();
        generate(folder.path(), &alone("92"), &EMU).unwrap();
        let read = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
        assert!(read("out-2.png") == read("out.png"), "{name}");
    }
}
