//! DeepFloyd IF in small: calls of its UNets, prompts through its T5, and whole runs of both stages (tools/oracle/deepfloyd.py).

use serde_json::Value;

use crate::files::{self, Arrays, all_passed, compare, data};
use crate::modules::{TOLERANCE, key, probe, run_unet};
use crate::runs::{Run, check_half, check_in, listed};
use crate::skip;

const FOLDER: &str = "if";
const EMU: [&str; 4] = ["--device", "emu", "--dtype", "f32"];

/// The runs with the paths of their pictures.
fn runs(wanted: impl Fn(&str) -> bool) -> Vec<Run> {
    let mut runs = listed("if/runs.json", &["runs"], wanted);
    for run in &mut runs {
        for i in 1..run.args.len() {
            if run.args[i - 1] == "--lowres" {
                run.args[i] = data(FOLDER).join(&run.args[i]).display().to_string();
            }
        }
    }
    runs
}

fn cases(list: &str) -> Vec<Value> {
    files::json("if/runs.json")[list].as_array().unwrap().clone()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

/// One call of a UNet; stage II is told the noise level of the low resolution.
fn call(case: &Value, stored: &Arrays, dtype: &str) -> Result<Arrays, String> {
    let labels = stored.0.contains_key(&key(case, "class_labels"));
    let conditioning: &[&'static str] = if labels { &["prompt_embeds", "class_labels"] } else { &["prompt_embeds"] };
    run_unet(text(&case["model"]), case, stored, dtype, conditioning)
}

#[test]
fn unets() {
    let (cases, stored) = (cases("unets"), Arrays::read(data("if/unets.safetensors")));
    assert_eq!(cases.len(), 24);
    let check = |case: &Value| {
        let (got, out) = (call(case, &stored, "f32")?, key(case, "out"));
        compare(&out, got.get("out"), stored.get(&out), TOLERANCE)
    };
    all_passed(cases.iter().map(check).collect());
}

/// Within twice of what torch commits on the model's worst call.
#[test]
fn unets_in_half_precision() {
    let (cases, stored) = (cases("unets"), Arrays::read(data("if/unets.safetensors")));
    let mut results = Vec::new();
    for dtype in ["f16", "bf16"] {
        let error = |case: &Value| case["torch_error"][dtype].as_f64().unwrap();
        for case in &cases {
            let of_model = cases.iter().filter(|other| other["model"] == case["model"]);
            let (allowed, out) = (2.0 * of_model.map(error).fold(0.0, f64::max), key(case, "out"));
            let got = call(case, &stored, dtype).map_err(|failed| format!("{out} in {dtype}: {failed}"));
            results.push(
                got.and_then(|got| compare(&format!("{out} in {dtype}"), got.get("out"), stored.get(&out), allowed)),
            );
        }
    }
    all_passed(results);
}

/// T5 is told which tokens are padding.
#[test]
fn prompts() {
    let stored = Arrays::read(data("if/text.safetensors"));
    let check = |case: &Value| {
        let got = probe(text(&case["model"]), "text", "f32", &["--prompt", text(&case["prompt"])])?;
        let names = [("t5.input_ids", 0.0), ("t5.attention_mask", 0.0), ("t5.last_hidden_state", TOLERANCE)];
        names.iter().try_for_each(|(name, tolerance)| {
            let stored_name = key(case, name);
            compare(&stored_name, got.get(name), stored.get(&stored_name), *tolerance)
        })
    };
    all_passed(cases("texts").iter().map(check).collect());
}

#[test]
fn stage_one() {
    let runs = runs(|name| !name.starts_with("ii-"));
    assert_eq!(runs.len(), 11);
    all_passed(runs.iter().map(|run| check_in(FOLDER, run, &[])).collect());
}

#[test]
fn stage_two() {
    let runs = runs(|name| name.starts_with("ii-"));
    assert_eq!(runs.len(), 7);
    all_passed(runs.iter().map(|run| check_in(FOLDER, run, &[])).collect());
}

/// Predicted variance and re-scheduled, dilated stages; DDIM; low resolutions in two stages: the kernels are those of a card.
#[test]
fn whole_runs_on_the_emulated_card() {
    if !skip::has_emulated_card() {
        return;
    }
    let some = ["mega-plus", "plain-ddim", "ii-mega"];
    let runs = runs(|name| some.contains(&name));
    assert_eq!(runs.len(), some.len());
    all_passed(runs.iter().map(|run| check_in(FOLDER, run, &EMU)).collect());
}

#[test]
fn in_half_precision() {
    if skip::has_emulated_card() {
        all_passed(vec![check_half(FOLDER, &runs(|name| name == "plain-unguided").remove(0))]);
    }
}
