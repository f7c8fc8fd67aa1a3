//! The CLIP text encoder against transformers (tools/oracle/clip.py): small random models, and the published manifests.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use megafuse::models::{ClipOutput, ClipTextConfig, ClipTextModel, WeightStore};
use megafuse::{DType, Device};
use safetensors::SafeTensors;
use serde::Deserialize;

const CASES: [&str; 4] = ["quick-gelu", "gelu", "projection", "with-projection"];

fn folder(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/clip").join(case)
}

fn config(folder: &Path) -> ClipTextConfig {
    let path = folder.join("config.json");
    ClipTextConfig::from_json(&path.display().to_string(), &fs::read_to_string(&path).unwrap()).unwrap()
}

fn load(folder: &Path, dtype: DType) -> megafuse::Result<ClipTextModel> {
    ClipTextModel::load(WeightStore::open(folder, "model", &Device::cpu(), dtype)?, &config(folder))
}

struct Expected {
    ids: Vec<Vec<u32>>,
    /// last_hidden_state, penultimate, skipped, pooled, and projected of a model with a projection.
    outputs: BTreeMap<String, Vec<f32>>,
    /// Largest error of transformers' own run in f16 and in bf16, for each output.
    errors: Errors,
}

#[derive(Deserialize)]
struct Errors {
    f16: BTreeMap<String, f64>,
    bf16: BTreeMap<String, f64>,
}

fn expected(case: &str) -> Expected {
    let bytes = fs::read(folder(case).join("expected.safetensors")).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let errors = &header.metadata().as_ref().unwrap()["errors"];
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let words = |name: &str| -> Vec<[u8; 4]> { file.tensor(name).unwrap().data().as_chunks().0.to_vec() };
    let length = file.tensor("ids").unwrap().shape()[1];
    let ids: Vec<u32> = words("ids").into_iter().map(u32::from_le_bytes).collect();
    Expected {
        ids: ids.chunks(length).map(<[u32]>::to_vec).collect(),
        outputs: file
            .names()
            .into_iter()
            .filter(|&name| name != "ids")
            .map(|name| (name.to_string(), words(name).into_iter().map(f32::from_le_bytes).collect()))
            .collect(),
        errors: serde_json::from_str(errors).unwrap(),
    }
}

fn assert_close(what: &str, got: &megafuse::Tensor, want: &[f32], tolerance: f64) {
    let got = got.to_f32_vec().unwrap();
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let error = f64::from(got - want).abs();
        assert!(error <= tolerance, "{what}[{i}] = {got}, transformers has {want}: off by {error:e} > {tolerance:e}");
    }
}

/// Every output that transformers has, each asked for as its reader does.
fn outputs(model: &ClipTextModel, ids: &[Vec<u32>]) -> BTreeMap<String, megafuse::Tensor> {
    let last = model.forward(ids, ClipOutput::LAST.with_pooled()).unwrap();
    let penultimate = model.forward(ids, ClipOutput::PENULTIMATE.with_pooled()).unwrap();
    let skipped = model.forward(ids, ClipOutput { hidden: 2, ..ClipOutput::LAST }).unwrap();
    assert!(skipped.pooled.is_none() && skipped.projected.is_none(), "nobody asked");
    let pooled = [&last, &penultimate].map(|out| out.pooled.as_ref().unwrap().to_f32_vec().unwrap());
    assert_eq!(pooled[0], pooled[1], "pooled does not depend on the hidden state that is asked for");
    let all = [
        ("last_hidden_state", Some(last.hidden)),
        ("penultimate", Some(penultimate.hidden)),
        ("skipped", Some(skipped.hidden)),
        ("pooled", last.pooled),
        ("projected", last.projected),
    ];
    all.into_iter().filter_map(|(name, tensor)| Some((name.to_string(), tensor?))).collect()
}

#[test]
fn outputs_equal_transformers() {
    for case in CASES {
        let want = expected(case);
        let got = outputs(&load(&folder(case), DType::F32).unwrap(), &want.ids);
        assert!(got.keys().eq(want.outputs.keys()), "{case}: {:?}", got.keys());
        assert_eq!(got.contains_key("projected"), case == "with-projection");
        let (n, l) = (want.ids.len(), want.ids[0].len());
        for (name, got) in &got {
            let shape = match name.as_str() {
                "pooled" => vec![n, 24],
                "projected" => vec![n, 10],
                _ => vec![n, l, 24],
            };
            assert_eq!(got.shape(), shape, "{case}: {name}");
            // Values of a few units; some 60 roundings on the longest path, each at most half an ulp, adding up as a walk.
            let values = &want.outputs[name];
            let largest = values.iter().fold(0.0_f64, |m, v| m.max(f64::from(v.abs())));
            assert_close(&format!("{case}: {name}"), got, values, 8.0 * largest * f64::from(f32::EPSILON));
        }
    }
}

/// Allowed: twice what the published library's run in the same dtype is off by.
#[test]
fn low_precision_is_as_good_as_the_published_one() {
    for case in CASES {
        let want = expected(case);
        for (dtype, errors) in [(DType::F16, &want.errors.f16), (DType::BF16, &want.errors.bf16)] {
            for (name, got) in outputs(&load(&folder(case), dtype).unwrap(), &want.ids) {
                assert_eq!(got.dtype(), dtype);
                assert_close(&format!("{case} {dtype}: {name}"), &got, &want.outputs[&name], 2.0 * errors[&name]);
            }
        }
    }
}

#[test]
fn hidden_states_that_do_not_exist_are_named() {
    let model = load(&folder("quick-gelu"), DType::F32).unwrap();
    let ids = expected("quick-gelu").ids;
    assert!(model.forward(&ids, ClipOutput { hidden: 4, ..ClipOutput::PENULTIMATE }).is_ok(), "the embeddings");
    for hidden in [0, 5, usize::MAX] {
        let error = model.forward(&ids, ClipOutput { hidden, ..ClipOutput::LAST }).map(drop).unwrap_err().to_string();
        assert!(error.contains(&format!("hidden is {hidden}, expected 1 to 4")), "{error}");
    }
}

/// Prompts do not see each other, and a token sees only those before it.
#[test]
fn rows_are_independent_and_causal() {
    let want = expected("quick-gelu");
    let model = load(&folder("quick-gelu"), DType::F32).unwrap();
    let all = model.forward(&want.ids, ClipOutput::LAST).unwrap().hidden.to_f32_vec().unwrap();
    let one = model.forward(&want.ids[1..2], ClipOutput::LAST).unwrap().hidden.to_f32_vec().unwrap();
    let row = one.len();
    for (i, (a, b)) in all[row..2 * row].iter().zip(&one).enumerate() {
        assert!((a - b).abs() <= 8.0 * 4.0 * f32::EPSILON, "{i}: {a} with other rows, {b} alone");
    }
    let short = model.forward(&[want.ids[1][..4].to_vec()], ClipOutput::LAST).unwrap().hidden.to_f32_vec().unwrap();
    for (i, (a, b)) in one.iter().zip(&short).enumerate() {
        assert!((a - b).abs() <= 8.0 * 4.0 * f32::EPSILON, "{i}: {a} with tokens after it, {b} without");
    }
}

#[derive(Deserialize)]
struct Manifest {
    config: serde_json::Value,
    parameters: usize,
    tensors: Vec<(String, Vec<usize>)>,
}

fn manifest(name: &str) -> Manifest {
    let path = format!("{}/tests/data/manifest/text_encoder_{name}.json", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// The published configurations ask for exactly the published tensors.
#[test]
fn manifest_of_the_published_encoders() {
    for (name, parameters) in [("sd15", 123_060_480), ("sd21", 340_387_840), ("sdxl2", 694_659_840)] {
        let want = manifest(name);
        assert_eq!(want.parameters, parameters, "{name}");
        let config = ClipTextConfig::from_json(name, &want.config.to_string()).unwrap();
        let store = WeightStore::meta(&Device::meta(), DType::F16);
        let model = ClipTextModel::from_weights(&store.root(), &config).unwrap();
        let mut got = store.manifest();
        got.sort();
        assert_eq!(got, want.tensors, "{name}");
        let count: usize = got.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
        assert_eq!(count, parameters, "{name}");

        let out = model.forward(&[vec![0; 77], vec![1; 77]], ClipOutput::PENULTIMATE.with_pooled()).unwrap();
        assert_eq!(out.hidden.shape(), [2, 77, config.hidden_size], "{name}");
        assert_eq!(out.pooled.unwrap().shape(), [2, config.hidden_size], "{name}");
        let projected = out.projected.map(|projected| projected.shape().to_vec());
        assert_eq!(projected, (name == "sdxl2").then(|| vec![2, 1280]), "{name}");
    }
}

/// One guided prompt pair through SD 1.5's encoder: the products of the layers and both halves of the attention.
#[test]
fn cost_on_the_meta_device() {
    use megafuse::runtime::OpKind;
    let device = Device::meta();
    let config = ClipTextConfig::from_json("sd15", &manifest("sd15").config.to_string()).unwrap();
    let store = WeightStore::meta(&device, DType::F16);
    let model = ClipTextModel::from_weights(&store.root(), &config).unwrap();
    let Device::Meta(meta) = &device else { unreachable!() };
    meta.take_report();
    let (tokens, c, m) = (2 * 77, 768, 3072);
    let skip_two = ClipOutput { hidden: 3, ..ClipOutput::PENULTIMATE };
    // Layers, and ops beside them: the embedding, a norm, and for the pooled output rows and their norm. Nothing is
    // transposed or copied, and no layer computed that nobody reads.
    for (output, layers, others) in [
        (ClipOutput::LAST, 12, 2),
        (ClipOutput::LAST.with_pooled(), 12, 4),
        (ClipOutput::PENULTIMATE, 11, 1),
        (ClipOutput::PENULTIMATE.with_pooled(), 12, 3),
        (skip_two, 10, 1),
    ] {
        model.forward(&[vec![0; 77], vec![0; 77]], output).unwrap();
        let report = meta.take_report();
        let macs = layers * tokens * (4 * c * c + 2 * c * m);
        assert_eq!(report.of(OpKind::Linear).macs, macs, "{output:?}");
        assert_eq!(report.ops.len() as u64, 7 * layers + others, "{output:?}");
    }
}

#[test]
fn defaults_are_those_of_the_published_class() {
    let config = ClipTextConfig::from_json("config.json", "{}").unwrap();
    let (vocab, width, mlp, layers, heads) = (49408, 512, 2048, 12, 8);
    assert_eq!(config.vocab_size, vocab);
    assert_eq!(config.hidden_size, width);
    assert_eq!(config.intermediate_size, mlp);
    assert_eq!(config.num_hidden_layers, layers);
    assert_eq!(config.num_attention_heads, heads);
    assert_eq!(config.max_position_embeddings, 77);
    assert_eq!(config.hidden_act, megafuse::ops::Activation::QuickGelu);
    assert_eq!(config.layer_norm_eps, 1e-5);
    assert_eq!(config.eos_token_id, 49407);
    assert_eq!(config.projection_dim, None, "the class without a projection");
    let config = ClipTextConfig::from_json("x", r#"{"architectures": ["CLIPTextModelWithProjection"]}"#).unwrap();
    assert_eq!(config.projection_dim, Some(512));
}

/// A config.json and what the error must name beside the file.
#[test]
fn unusable_configurations_are_named() {
    let cases: [(&str, &[&str]); 11] = [
        ("", &["JSON"]),
        ("[]", &["JSON"]),
        (r#"{"model_type": "t5"}"#, &["model_type", "\"t5\"", "clip_text_model"]),
        (r#"{"hidden_act": "gelu_new"}"#, &["hidden_act", "gelu_new", "quick_gelu"]),
        (r#"{"hidden_size": 0}"#, &["hidden_size is 0", "from 1"]),
        (r#"{"hidden_size": "768"}"#, &["hidden_size is \"768\""]),
        (r#"{"num_attention_heads": 7}"#, &["num_attention_heads is 7", "hidden_size = 512"]),
        (r#"{"layer_norm_eps": -1e-5}"#, &["layer_norm_eps", "above 0"]),
        (r#"{"architectures": "CLIPTextModel"}"#, &["architectures", "a list of names"]),
        (
            r#"{"architectures": ["CLIPTextModelWithProjection"], "projection_dim": 0}"#,
            &["projection_dim is 0", "from 1"],
        ),
        (r#"{"eos_token_id": [1, 2]}"#, &["eos_token_id", "[1,2]"]),
    ];
    for (json, wanted) in cases {
        let error = ClipTextConfig::from_json("text_encoder/config.json", json).unwrap_err().to_string();
        for part in wanted.iter().chain(&["text_encoder/config.json"]) {
            assert!(error.contains(part), "{json}: {error:?} lacks {part:?}");
        }
    }
}

#[test]
fn ids_that_do_not_fit_are_named() {
    let model = load(&folder("quick-gelu"), DType::F32).unwrap();
    let cases: [(&[Vec<u32>], &str); 5] = [
        (&[], "0 rows"),
        (&[vec![]], "of 0 tokens"),
        (&[vec![1; 12]], "1 to 11 tokens"),
        (&[vec![1; 4], vec![1; 5]], "equal length"),
        (&[vec![1, 61]], "vocab_size = 61"),
    ];
    for (ids, wanted) in cases {
        let error = model.forward(ids, ClipOutput::LAST).err().unwrap().to_string();
        assert!(error.contains(wanted), "{ids:?}: {error:?} lacks {wanted:?}");
    }
}

/// Weights and config.json that do not belong together, either way.
#[test]
fn wrong_weights_are_named() {
    let folder = folder("quick-gelu");
    let load = |change: &dyn Fn(&mut ClipTextConfig)| {
        let mut config = config(&folder);
        change(&mut config);
        let store = WeightStore::open(&folder, "model", &Device::cpu(), DType::F32).unwrap();
        ClipTextModel::load(store, &config).err().unwrap().to_string()
    };
    let missing = load(&|config| config.num_hidden_layers = 4);
    assert!(missing.contains("text_model.encoder.layers.3.") && missing.contains("missing"), "{missing}");
    let extra = load(&|config| config.num_hidden_layers = 2);
    assert!(extra.contains("text_model.encoder.layers.2.") && extra.contains("no layer"), "{extra}");
    let shape = load(&|config| config.vocab_size = 62);
    assert!(shape.contains("token_embedding.weight") && shape.contains("[61, 24]"), "{shape}");
    assert!(shape.contains("[62, 24]") && shape.contains("model.safetensors"), "{shape}");
}
