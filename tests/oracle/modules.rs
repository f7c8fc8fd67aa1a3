//! `megafuse probe` on every case of every small model.

use std::path::Path;

use serde_json::Value;

use crate::drawn;
use crate::files::{self, Array, Arrays, MODELS, SDXL_MODELS, all_passed, compare, data, megafuse};

/// The expected values are f64's; f32 on torch is within 1e-5 of them.
pub const TOLERANCE: f64 = 2e-5;
/// This one case is ill-conditioned: torch's own f32 is off by 1.6e-5, and an input changed by 6e-8 moves it by 1.4e-5.
const ILL_CONDITIONED: (&str, f64) = ("four-levels unet-square.out", 5e-5);

/// A module of a model: its list in oracle.json, what it is run on, and what is compared (the main output first).
struct Module {
    models: &'static [&'static str],
    list: &'static str,
    run: fn(model: &str, case: &Value, stored: &Arrays, dtype: &str) -> Result<Arrays, String>,
    outputs: &'static [&'static str],
}

fn run_text(model: &str, case: &Value, _: &Arrays, dtype: &str) -> Result<Arrays, String> {
    probe(model, "text", dtype, &["--prompt", case["prompt"].as_str().unwrap()])
}

const TEXT: Module = Module {
    models: &MODELS,
    list: "text",
    run: run_text,
    outputs: &["last_hidden_state", "penultimate", "pooled", "prompt_embeds"],
};

/// Both text encoders, and what the UNet gets of them.
const SDXL_TEXT: Module = Module {
    models: &SDXL_MODELS,
    list: "text",
    run: run_text,
    outputs: &[
        "prompt_embeds",
        "pooled_prompt_embeds",
        "clip1.last_hidden_state",
        "clip1.penultimate",
        "clip2.last_hidden_state",
        "clip2.penultimate",
    ],
};

const UNET: Module = Module {
    models: &MODELS,
    list: "unet",
    run: |model, case, stored, dtype| run_unet(model, case, stored, dtype, &["prompt_embeds"]),
    outputs: &["out"],
};

const SDXL_UNET: Module = Module {
    models: &SDXL_MODELS,
    list: "unet",
    run: |model, case, stored, dtype| {
        run_unet(model, case, stored, dtype, &["prompt_embeds", "pooled_prompt_embeds", "time_ids"])
    },
    outputs: &["out"],
};

pub fn run_unet(
    model: &str,
    case: &Value,
    stored: &Arrays,
    dtype: &str,
    conditioning: &[&'static str],
) -> Result<Arrays, String> {
    let names = ["sample", "timestep"].iter().chain(conditioning);
    let inputs: Vec<(&str, Array)> = names.map(|&name| (name, stored.get(&key(case, name)).clone())).collect();
    let dilation = case["dilation"].to_string();
    let run = |inputs: &[(&str, Array)]| probe_with(model, "unet", dtype, inputs, &["--dilation", &dilation]);
    let timesteps = &inputs[1].1.values;
    if timesteps.iter().all(|t| *t == timesteps[0]) {
        return run(&inputs);
    }
    // The program takes one timestep for a batch: sample by sample.
    let mut out = Array { shape: inputs[0].1.shape.clone(), values: Vec::new() };
    for n in 0..timesteps.len() {
        let rows: Vec<_> = inputs.iter().map(|(name, x)| (*name, row(x, n))).collect();
        out.values.extend(&run(&rows)?.get("out").values);
    }
    // A network may give more channels than it reads.
    let [n, _, h, w] = out.shape[..] else { panic!("a sample is [N, C, H, W]") };
    out.shape[1] = out.values.len() / (n * h * w);
    Ok(Arrays([("out".to_string(), out)].into()))
}

/// Every small model's VAE is of one kind.
const VAES: [&str; MODELS.len() + SDXL_MODELS.len()] = {
    let mut all = [""; MODELS.len() + SDXL_MODELS.len()];
    let (first, second) = all.split_at_mut(MODELS.len());
    first.copy_from_slice(&MODELS);
    second.copy_from_slice(&SDXL_MODELS);
    all
};

const VAE_ENCODE: Module = Module {
    models: &VAES,
    list: "vae_encode",
    run: |model, case, stored, dtype| {
        probe_with(model, "vae-encode", dtype, &[("image", stored.get(&key(case, "image")).clone())], &[])
    },
    outputs: &["mean", "logvar"],
};

const VAE_DECODE: Module = Module {
    models: &VAES,
    list: "vae_decode",
    run: |model, case, stored, dtype| {
        probe_with(model, "vae-decode", dtype, &[("latent", stored.get(&key(case, "latent")).clone())], &[])
    },
    outputs: &["decoded"],
};

pub fn key(case: &Value, tensor: &str) -> String {
    format!("{}.{tensor}", case["name"].as_str().unwrap())
}

pub fn row(array: &Array, n: usize) -> Array {
    let length: usize = array.shape[1..].iter().product();
    let mut shape = array.shape.clone();
    shape[0] = 1;
    Array { shape, values: array.values[n * length..][..length].to_vec() }
}

pub fn probe(model: &str, module: &str, dtype: &str, more: &[&str]) -> Result<Arrays, String> {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.safetensors");
    let (model, out_text) = (drawn::folder(model).display().to_string(), out.display().to_string());
    let mut args = vec!["probe", "--model", &model, "--module", module, "--dtype", dtype];
    args.extend(["--device", "cpu", "--out", &out_text]);
    args.extend(more);
    megafuse(&args)?;
    Ok(Arrays::read(out))
}

fn probe_with(
    model: &str,
    module: &str,
    dtype: &str,
    inputs: &[(&str, Array)],
    more: &[&str],
) -> Result<Arrays, String> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("in.safetensors");
    files::write(&file, inputs);
    let file = file.display().to_string();
    probe(model, module, dtype, &[&["--in", &file], more].concat())
}

impl Module {
    /// All outputs of every case of every model, in f32.
    fn check(&self) {
        let mut results = Vec::new();
        for &model in self.models {
            let (cases, stored) = self.cases(model);
            for case in &cases {
                let what = |output: &str| format!("{model} {}", key(case, output));
                match (self.run)(model, case, &stored, "f32") {
                    Err(failed) => results.push(Err(format!("{}: {failed}", what(self.outputs[0])))),
                    Ok(got) => results.extend(self.outputs.iter().map(|output| {
                        let what = what(output);
                        let tolerance = if what == ILL_CONDITIONED.0 { ILL_CONDITIONED.1 } else { TOLERANCE };
                        compare(&what, got.get(output), stored.get(&key(case, output)), tolerance)
                    })),
                }
            }
        }
        all_passed(results);
    }

    /// The main output in f16 and bf16: within twice of what torch commits on this model's worst case.
    fn check_half(&self) {
        let mut results = Vec::new();
        for &model in self.models {
            let (cases, stored) = self.cases(model);
            for dtype in ["f16", "bf16"] {
                let error = |case: &Value| case["torch_error"][dtype].as_f64().unwrap();
                let allowed = 2.0 * cases.iter().map(error).fold(0.0, f64::max);
                for case in &cases {
                    let output = key(case, self.outputs[0]);
                    let what = format!("{model} {output} in {dtype}");
                    let got = (self.run)(model, case, &stored, dtype).map_err(|failed| format!("{what}: {failed}"));
                    results.push(
                        got.and_then(|got| compare(&what, got.get(self.outputs[0]), stored.get(&output), allowed)),
                    );
                }
            }
        }
        all_passed(results);
    }

    fn cases(&self, model: &str) -> (Vec<Value>, Arrays) {
        let listed = files::json(Path::new(model).join("oracle.json"));
        (listed[self.list].as_array().unwrap().clone(), Arrays::read(data(model).join("oracle.safetensors")))
    }
}

#[test]
fn text_encoders() {
    TEXT.check();
}

#[test]
fn text_encoders_in_half_precision() {
    TEXT.check_half();
}

#[test]
fn sdxl_text_encoders() {
    SDXL_TEXT.check();
}

#[test]
fn sdxl_text_encoders_in_half_precision() {
    SDXL_TEXT.check_half();
}

#[test]
fn probed_token_ids() {
    let mut results = Vec::new();
    for (module, names) in [(&TEXT, &["input_ids"] as &[&str]), (&SDXL_TEXT, &["clip1.input_ids", "clip2.input_ids"])] {
        for &model in module.models {
            let (cases, stored) = module.cases(model);
            for case in &cases {
                let got = (module.run)(model, case, &stored, "f32").unwrap();
                results.extend(names.iter().map(|name| {
                    let ids = key(case, name);
                    compare(&format!("{model} {ids}"), got.get(name), stored.get(&ids), 0.0)
                }));
            }
        }
    }
    all_passed(results);
}

#[test]
fn unets() {
    UNET.check();
}

#[test]
fn unets_in_half_precision() {
    UNET.check_half();
}

#[test]
fn sdxl_unets() {
    SDXL_UNET.check();
}

#[test]
fn sdxl_unets_in_half_precision() {
    SDXL_UNET.check_half();
}

#[test]
fn vae_encoders() {
    VAE_ENCODE.check();
}

#[test]
fn vae_encoders_in_half_precision() {
    VAE_ENCODE.check_half();
}

#[test]
fn vae_decoders() {
    VAE_DECODE.check();
}

#[test]
fn vae_decoders_in_half_precision() {
    VAE_DECODE.check_half();
}
