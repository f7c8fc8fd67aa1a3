//! ResAdapters against PyTorch's sums (tools/oracle/resadapter.py), and folders that are none.

use std::fs;
use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

use crate::drawn;
use crate::files::{self, Arrays, compare, data, megafuse};

/// torch's f32 is 1.6e-6 from f64 in these runs.
const TOLERANCE: f64 = 1e-4;

fn of(name: &str) -> String {
    data("resadapter").join(name).display().to_string()
}

#[test]
fn its_runs_are_those_of_the_summed_weights() {
    let runs = files::json("resadapter/runs.json");
    for run in runs.as_array().unwrap() {
        let name = run["model"].as_str().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = |file: &str| folder.path().join(file).display().to_string();
        let model = drawn::folder(name).display().to_string();
        let adapter = format!("{}:{}", of(name), run["weight"]);
        let args: Vec<&str> = run["args"].as_array().unwrap().iter().map(|arg| arg.as_str().unwrap()).collect();
        let (png, dump) = (path("out.png"), path("dump.safetensors"));
        let more = ["--model", &model, "--resadapter", &adapter, "--device", "cpu", "--out", &png, "--dump", &dump];
        megafuse(&[&["generate"], &args[..], &more[..]].concat()).unwrap();
        let (got, want) = (Arrays::read(&dump), Arrays::read(data(format!("resadapter/{name}.safetensors"))));
        for (step, want) in &want.0 {
            compare(step, got.get(step), want, TOLERANCE).unwrap_or_else(|error| panic!("{name}: {error}"));
        }

        // The picture says what it was made with, and is made again with it alone.
        let again = path("again.png");
        let from = ["generate", "--from", &png, "--model", &model, "--device", "cpu", "--out", &again];
        let refused = megafuse(&from).unwrap_err();
        let wanted = format!("--resadapter {name}:{}", run["weight"]);
        assert!(refused.contains(wanted.trim_end_matches(".0")), "{refused}");
        megafuse(&[&from[..], &["--resadapter", &adapter]].concat()).unwrap();
        assert!(fs::read(&png).unwrap() == fs::read(&again).unwrap(), "{name}");
    }
}

/// With a weight of 0 the norms are still the ResAdapter's; a LoRA beside it is added to both.
#[test]
fn the_weight_is_that_of_its_lora() {
    let folder = tempfile::tempdir().unwrap();
    let model = data("sd15").display().to_string();
    let made = |name: &str, more: &[&str]| {
        let png = folder.path().join(name).display().to_string();
        let args = ["generate", "a cat", "--model", &model, "--method", "plain", "--size", "16x16", "--steps", "1"];
        megafuse(&[&args[..], &["--device", "cpu", "--out", &png], more].concat()).unwrap();
        image::open(png).unwrap().into_rgb8().into_raw()
    };
    let lora = data("single-file/lora-kohya.safetensors").display().to_string();
    let (none, full) = (format!("{}:0", of("sd15")), of("sd15"));
    let all = [
        made("plain.png", &[]),
        made("norms.png", &["--resadapter", &none]),
        made("full.png", &["--resadapter", &full]),
        made("both.png", &["--resadapter", &full, "--lora", &lora]),
        made("lora.png", &["--lora", &lora]),
    ];
    for (i, a) in all.iter().enumerate() {
        assert!(all[i + 1..].iter().all(|b| a != b), "picture {i} is one of the others");
    }
}

#[test]
fn folders_that_are_no_resadapter_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let model = data("sd15").display().to_string();
    let (lora, norms) = ("pytorch_lora_weights.safetensors", "diffusion_pytorch_model.safetensors");
    let made = |name: &str, files: &[(&str, &Path)]| {
        let to = folder.path().join(name);
        fs::create_dir(&to).unwrap();
        for (name, from) in files {
            fs::copy(from, to.join(name)).unwrap();
        }
        to.display().to_string()
    };
    let file = |model: &str, name: &str| data("resadapter").join(model).join(name);
    let (own_lora, own_norms) = (file("sd15", lora), file("sd15", norms));
    let other_lora = data("single-file/lora-kohya.safetensors");
    // Without the tensor `changed`, or with its first value alone.
    let changed = |from: &Path, changed: &str, cut: bool| {
        let bytes = fs::read(from).unwrap();
        let mut tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
        let at = tensors.iter().position(|(key, _)| key == changed).unwrap();
        let (key, view) = tensors.remove(at);
        if cut {
            tensors.push((key, TensorView::new(view.dtype(), vec![1], &view.data()[..4]).unwrap()));
        }
        let to = folder.path().join(format!("{changed}-{cut}.safetensors"));
        fs::write(&to, safetensors::serialize(tensors, None).unwrap()).unwrap();
        to
    };
    let key = "mid_block.resnets.1.norm2.bias";
    let cases = [
        (folder.path().join("nowhere").display().to_string(), vec!["nowhere", "is no folder", lora, norms]),
        (own_norms.display().to_string(), vec![norms, "is no folder"]),
        (made("no-lora", &[(norms, &own_norms)]), vec![lora, "no such file"]),
        (made("no-norms", &[(lora, &own_lora)]), vec![norms, "no such file"]),
        (made("swapped", &[(lora, &own_norms), (norms, &own_norms)]), vec![lora, "is no LoRA"]),
        (made("loras", &[(lora, &own_lora), (norms, &own_lora)]), vec![norms, "holds no norm of a ResNet"]),
        (made("style", &[(lora, &other_lora), (norms, &own_norms)]), vec![lora, "samplers.0.conv", "another family"]),
        (of("sdxl"), vec!["another family"]),
        (
            made("short", &[(lora, &own_lora), (norms, &changed(&own_norms, key, false))]),
            vec![norms, key, "is missing", "another family"],
        ),
        (
            made("cut", &[(lora, &own_lora), (norms, &changed(&own_norms, key, true))]),
            vec![norms, key, "has shape [1]", "another family"],
        ),
        (format!("{}:much", of("sd15")), vec!["--resadapter", "\"much\" is no number", "DIR:WEIGHT"]),
        (":0.5".into(), vec!["--resadapter", "names no folder"]),
    ];
    let out = folder.path().join("out.png").display().to_string();
    for (adapter, wanted) in cases {
        let args = ["generate", "a cat", "--model", &model, "--method", "plain", "--size", "16x16", "--steps", "1"];
        let more = ["--device", "cpu", "--out", &out, "--resadapter", &adapter];
        let said = megafuse(&[&args[..], &more[..]].concat()).unwrap_err();
        assert!(wanted.iter().all(|part| said.contains(part)) && !said.contains("panicked"), "{adapter}: {said}");
    }
}
