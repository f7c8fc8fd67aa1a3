//! `megafuse probe` on every case of every small model.

use std::path::Path;

use crate::files::{self, Array, Arrays, MODELS, compare, data, megafuse};

/// The expected values are f64's; f32 on torch is within 1e-5 of them.
const TOLERANCE: f64 = 2e-5;

fn probe(model: &str, module: &str, more: &[&str]) -> Result<Arrays, String> {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.safetensors");
    let (dir, out_text) = (data(model), out.display().to_string());
    let dir = dir.display().to_string();
    let mut args = vec!["probe", "--model", &dir, "--module", module, "--device", "cpu", "--out", &out_text];
    args.extend(more);
    megafuse(&args).map_err(|e| format!("{model} {module}: {e}"))?;
    Ok(Arrays::read(out))
}

fn probe_with(model: &str, module: &str, inputs: &[(&str, &Array)], more: &[&str]) -> Result<Arrays, String> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("in.safetensors");
    files::write(&file, inputs);
    let file = file.display().to_string();
    probe(model, module, &[&["--in", &file], more].concat())
}

/// Every case of `list` in every model's oracle.json: `check(model, case name, case, expected)`.
fn each_case(
    list: &str,
    check: impl Fn(&str, &str, &serde_json::Value, &Arrays) -> Result<Vec<Result<(), String>>, String>,
) {
    let mut results = Vec::new();
    for model in MODELS {
        let cases = files::json(Path::new(model).join("oracle.json"));
        let want = Arrays::read(data(model).join("oracle.safetensors"));
        for case in cases[list].as_array().unwrap() {
            let name = case["name"].as_str().unwrap();
            match check(model, name, case, &want) {
                Ok(compared) => results.extend(compared),
                Err(failed) => results.push(Err(format!("{model} {name}: {failed}"))),
            }
        }
    }
    files::all_passed(results);
}

fn same(model: &str, case: &str, got: &Arrays, want: &Arrays, outputs: &[(&str, f64)]) -> Vec<Result<(), String>> {
    let compare = |&(output, tolerance): &(&str, f64)| {
        let key = format!("{case}.{output}");
        compare(&format!("{model} {key}"), got.get(output), want.get(&key), tolerance)
    };
    outputs.iter().map(compare).collect()
}

#[test]
fn text_encoders() {
    each_case("text", |model, name, case, want| {
        let got = probe(model, "text", &["--prompt", case["prompt"].as_str().unwrap()])?;
        let outputs = [
            ("input_ids", 0.0),
            ("last_hidden_state", TOLERANCE),
            ("penultimate", TOLERANCE),
            ("pooled", TOLERANCE),
            ("prompt_embeds", TOLERANCE),
        ];
        Ok(same(model, name, &got, want, &outputs))
    });
}

#[test]
fn unets() {
    each_case("unet", |model, name, case, want| {
        let [sample, timestep, embeds] =
            ["sample", "timestep", "prompt_embeds"].map(|input| want.get(&format!("{name}.{input}")));
        let dilation = case["dilation"].to_string();
        let run = |sample: &Array, timestep: &Array, embeds: &Array| {
            let inputs = [("sample", sample), ("timestep", timestep), ("prompt_embeds", embeds)];
            probe_with(model, "unet", &inputs, &["--dilation", &dilation])
        };
        let got = if timestep.values.iter().all(|t| *t == timestep.values[0]) {
            run(sample, timestep, embeds)?
        } else {
            // The program takes one timestep for a batch: sample by sample.
            let mut out = Array { shape: sample.shape.clone(), values: Vec::new() };
            for n in 0..timestep.values.len() {
                let one = run(&row(sample, n), &row(timestep, n), &row(embeds, n))?;
                out.values.extend(&one.get("out").values);
            }
            Arrays([("out".to_string(), out)].into())
        };
        Ok(same(model, name, &got, want, &[("out", TOLERANCE)]))
    });
}

fn row(array: &Array, n: usize) -> Array {
    let length: usize = array.shape[1..].iter().product();
    let mut shape = array.shape.clone();
    shape[0] = 1;
    Array { shape, values: array.values[n * length..][..length].to_vec() }
}

#[test]
fn vae_encoders() {
    each_case("vae_encode", |model, name, _, want| {
        let image = want.get(&format!("{name}.image"));
        let got = probe_with(model, "vae-encode", &[("image", image)], &[])?;
        Ok(same(model, name, &got, want, &[("mean", TOLERANCE), ("logvar", TOLERANCE)]))
    });
}

#[test]
fn vae_decoders() {
    each_case("vae_decode", |model, name, _, want| {
        let latent = want.get(&format!("{name}.latent"));
        let got = probe_with(model, "vae-decode", &[("latent", latent)], &[])?;
        Ok(same(model, name, &got, want, &[("decoded", TOLERANCE)]))
    });
}
