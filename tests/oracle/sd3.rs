//! Stable Diffusion 3 and 3.5 in small: whole runs, and what the transformer is told (tools/oracle/sd3.py).

use std::process::Command;

use crate::drawn;
use crate::files::{Arrays, all_passed, compare, data, megafuse};
use crate::runs::{check_in, listed};

const FOLDER: &str = "sd3";

#[test]
fn whole_runs() {
    let runs = listed("sd3/runs.json", &["runs"], |_| true);
    assert_eq!(runs.len(), 8);
    all_passed(runs.iter().map(|run| check_in(FOLDER, run, &[])).collect());
}

/// One run of each kind on the emulated card, whose kernels are those of a card.
#[test]
fn whole_runs_on_the_emulated_card() {
    let some = ["plain-negative", "mega-3.5", "mega-dual"];
    let runs = listed("sd3/runs.json", &["runs"], |name| some.contains(&name));
    assert_eq!(runs.len(), some.len());
    all_passed(runs.iter().map(|run| check_in(FOLDER, run, &["--device", "emu", "--dtype", "f32"])).collect());
}

#[test]
fn text_of_three_encoders() {
    let of = |name: &str, model: &str, prompt: &str| {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out.safetensors").display().to_string();
        let model = drawn::folder(&format!("sd3/{model}")).display().to_string();
        let args = ["probe", "--model", &model, "--module", "text", "--dtype", "f32", "--device", "cpu", "--out", &out];
        megafuse(&[&args[..], &["--prompt", prompt]].concat())?;
        let (mut got, want) = (Arrays::read(&out), Arrays::read(data(format!("sd3/{name}-text.safetensors"))));
        // Of the tokens the first 40 are stored: those of CLIP, and the first of T5.
        let embeds = got.0.get_mut("prompt_embeds").expect("the embeddings");
        let [_, _, width] = embeds.shape[..] else { panic!("{:?}", embeds.shape) };
        embeds.shape[1] = 40;
        embeds.values.truncate(40 * width);
        let both = ["prompt_embeds", "pooled_prompt_embeds"];
        both.iter().try_for_each(|key| compare(&format!("{name}: {key}"), got.get(key), want.get(key), 2e-5))
    };
    all_passed(vec![
        of("plain", "medium", "a photo of a cat"),
        of("plain-3.5", "medium-3.5", "a photo of a cat"),
        of("plain-negative", "large", "a photo of a cat"),
    ]);
}

/// What is said of a model without T5, once.
#[test]
fn a_missing_t5_is_said() {
    let place = tempfile::tempdir().unwrap();
    let model = drawn::folder("sd3/dual").display().to_string();
    let mut command = Command::new(env!("CARGO_BIN_EXE_megafuse"));
    let args = [
        "generate", "a cat", "--model", &model, "--method", "plain", "--size", "16x16", "--steps", "1", "--device",
        "cpu",
    ];
    let output = command.current_dir(place.path()).args(args).args(["--count", "2"]).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    assert_eq!(told.matches("the model has no T5 text encoder").count(), 1, "{told}");
}
