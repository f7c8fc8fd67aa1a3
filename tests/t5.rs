//! T5's text encoder against transformers (tools/oracle/t5.py): small random models, the published manifest. (tests/t5_tokenizer.rs has
//! its tokenizer.)

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use common::{devices, drawn};
use megafuse::models::{T5Config, T5Encoder, WeightStore};
use megafuse::runtime::OpKind;
use megafuse::{DType, Device};
use safetensors::SafeTensors;
use serde::Deserialize;

/// Values up to 4, of models in which no token is ill-conditioned.
const ALLOWED: f64 = 2e-5;

const CASES: [&str; 4] = ["plain", "masked", "long", "wide-head"];

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(path)
}

fn config(folder: &Path) -> T5Config {
    T5Config::from_json("config.json", &fs::read_to_string(folder.join("config.json")).unwrap()).unwrap()
}

fn load(folder: &Path, stem: &str, device: &Device, dtype: DType) -> T5Encoder {
    T5Encoder::load(WeightStore::open(folder, stem, device, dtype).unwrap(), &config(folder)).unwrap()
}

/// `expected.safetensors` of a model.
struct Expected {
    ids: Vec<Vec<u32>>,
    lengths: Option<Vec<usize>>,
    hidden: BTreeMap<String, Vec<f32>>,
    /// Largest error of transformers' own run in f32 and in bf16.
    f32: f64,
    bf16: f64,
}

fn expected(case: &str) -> Expected {
    let bytes = fs::read(data(&format!("t5/{case}/expected.safetensors"))).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let errors = header.metadata().as_ref().and_then(|metadata| metadata.get("errors"));
    let errors: BTreeMap<String, f64> = errors.map_or_else(BTreeMap::new, |text| serde_json::from_str(text).unwrap());
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let words = |name: &str| -> Vec<[u8; 4]> { file.tensor(name).unwrap().data().as_chunks().0.to_vec() };
    let length = file.tensor("ids").unwrap().shape()[1];
    let ids: Vec<u32> = words("ids").into_iter().map(u32::from_le_bytes).collect();
    let has_lengths = file.names().contains(&"lengths");
    let names: Vec<String> = file.names().iter().map(|name| name.to_string()).collect();
    Expected {
        ids: ids.chunks(length).map(<[u32]>::to_vec).collect(),
        lengths: has_lengths.then(|| words("lengths").into_iter().map(|v| u32::from_le_bytes(v) as usize).collect()),
        hidden: names
            .into_iter()
            .filter(|name| name.starts_with("hidden"))
            .map(|name| (name.clone(), words(&name).into_iter().map(f32::from_le_bytes).collect()))
            .collect(),
        f32: errors.get("f32").copied().unwrap_or_default(),
        bf16: errors.get("bf16").copied().unwrap_or_default(),
    }
}

/// The largest difference.
fn distance(got: &megafuse::Tensor, want: &[f32]) -> f64 {
    let got = got.to_f32_vec().unwrap();
    assert_eq!(got.len(), want.len());
    let differences = got.iter().zip(want).map(|(got, want)| f64::from(got - want).abs());
    differences.fold(0.0, |a, b| if b.is_nan() { f64::INFINITY } else { a.max(b) })
}

#[test]
fn hidden_states_equal_transformers() {
    for case in CASES {
        let (folder, want) = (drawn::folder(&format!("t5/{case}")), expected(case));
        for device in devices() {
            let model = load(&folder, "model", &device, DType::F32);
            let got = model.forward(&want.ids, want.lengths.as_deref()).unwrap();
            assert_eq!(got.shape(), [want.ids.len(), want.ids[0].len(), model.config().d_model], "{case}");
            let off = distance(&got, &want.hidden["hidden"]);
            println!("{case} on {device}: off by {off:.1e}");
            // Scores of many units lie before each softmax: the worst token of `masked` is off by 2e-5 in transformers too.
            assert!(off < 4.0 * want.f32, "{case} on {device}: off by {off:.1e}");
        }
    }
}

/// Allowed: twice what the published library's run in bf16 is off by, and in f16, which has three bits more, a quarter of that.
#[test]
fn low_precision_is_as_good_as_the_published_one() {
    for case in CASES {
        let (folder, want) = (drawn::folder(&format!("t5/{case}")), expected(case));
        for device in devices() {
            for (dtype, allowed) in [(DType::BF16, 2.0 * want.bf16), (DType::F16, want.bf16 / 2.0)] {
                let model = load(&folder, "model", &device, dtype);
                let got = model.forward(&want.ids, want.lengths.as_deref()).unwrap();
                assert_eq!(got.dtype(), dtype);
                let off = distance(&got, &want.hidden["hidden"]);
                assert!(off < allowed, "{case} {dtype} on {device}: off by {off:.1e}, allowed {allowed:.1e}");
                assert!(off > 1e-5, "{case} {dtype} on {device}: off by {off:.1e}, so nothing was rounded");
            }
        }
    }
}

/// Feed-forward layers of the published encoder leave the range of f16.
#[test]
fn in_place_of_f16_stands_bf16() {
    let dtypes = [DType::F32, DType::BF16, DType::F16].map(T5Encoder::dtype_for);
    assert_eq!(dtypes, [DType::F32, DType::BF16, DType::BF16]);
}

/// Nothing attends to padding where lengths are given, and everything does where they are not.
#[test]
fn padding_is_not_attended_to() {
    let (folder, want) = (drawn::folder("t5/masked"), expected("masked"));
    let lengths = want.lengths.clone().unwrap();
    let mut other = want.ids.clone();
    for (row, &length) in other.iter_mut().zip(&lengths) {
        row[length..].iter_mut().for_each(|id| *id = (*id + 1) % 37);
    }
    for device in devices() {
        let model = load(&folder, "model", &device, DType::F32);
        let run = |ids: &[Vec<u32>], lengths| model.forward(ids, lengths).unwrap().to_f32_vec().unwrap();
        let (width, l) = (model.config().d_model, want.ids[0].len());
        let of_row = |all: &[f32], row: usize| all[row * l * width..][..lengths[row] * width].to_vec();
        let (masked, changed) = (run(&want.ids, Some(&lengths)), run(&other, Some(&lengths)));
        let (unmasked, seen) = (run(&want.ids, None), run(&other, None));
        for row in 0..3 {
            assert_eq!(of_row(&masked, row), of_row(&changed, row), "row {row} on {device}");
        }
        assert_ne!(of_row(&unmasked, 1), of_row(&seen, 1), "{device}");
        // Whole rows need no mask.
        assert_eq!(unmasked, run(&want.ids, Some(&[l; 3])), "{device}");
    }
}

/// The same 8 bits on the cpu and a card: as cast, and with a scale for each matrix.
#[test]
fn eight_bit_floats_load_with_and_without_scales() {
    let (folder, want) = (data("t5/fp8"), expected("fp8"));
    for device in devices() {
        for (stem, hidden) in [("model", "hidden"), ("scaled", "hidden_scaled")] {
            let off = distance(
                &load(&folder, stem, &device, DType::F32).forward(&want.ids, None).unwrap(),
                &want.hidden[hidden],
            );
            assert!(off < ALLOWED, "{stem} on {device}: off by {off:.1e}");
        }
    }
    let (cast, scaled) = (&want.hidden["hidden"], &want.hidden["hidden_scaled"]);
    assert!(cast.iter().zip(scaled).any(|(a, b)| (a - b).abs() > 1e-2), "the scales change the result");
}

/// A file with these tensors of `plain`, each renamed or left out, and one more.
fn renamed(rename: impl Fn(&str) -> Option<String>, more: &str) -> tempfile::TempDir {
    let from = drawn::folder("t5/plain");
    let to = tempfile::tempdir().unwrap();
    let bytes = fs::read(from.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Vec<_> = file.iter().filter_map(|(name, view)| Some((rename(name)?, view))).collect();
    tensors.push((more.to_string(), file.tensor("encoder.final_layer_norm.weight").unwrap()));
    fs::write(to.path().join("model.safetensors"), safetensors::serialize(tensors, None).unwrap()).unwrap();
    fs::copy(from.join("config.json"), to.path().join("config.json")).unwrap();
    to
}

#[test]
fn files_may_hold_the_other_name_of_the_embedding_and_a_decoder() {
    let want = expected("plain");
    let check = |folder: &Path| {
        let got = load(folder, "model", &Device::cpu(), DType::F32).forward(&want.ids, None).unwrap();
        assert!(distance(&got, &want.hidden["hidden"]) < ALLOWED);
    };
    check(renamed(|name| Some(name.into()), "decoder.final_layer_norm.weight").path());
    check(renamed(|name| Some(name.into()), "lm_head.weight").path());
    check(renamed(|name| Some(name.into()), "encoder.embed_tokens.weight").path());
    let other = |name: &str| Some(name.replace("shared.weight", "encoder.embed_tokens.weight"));
    check(renamed(other, "decoder.embed_tokens.weight").path());
}

#[test]
fn wrong_weights_are_named() {
    let fails = |rename: &dyn Fn(&str) -> Option<String>, more: &str, wanted: &str| {
        let folder = renamed(rename, more);
        let store = WeightStore::open(folder.path(), "model", &Device::cpu(), DType::F32).unwrap();
        let error = T5Encoder::load(store, &config(folder.path())).map(drop).unwrap_err().to_string();
        assert!(error.contains(wanted), "{error:?} lacks {wanted:?}");
    };
    let all = |name: &str| Some(name.to_string());
    fails(&all, "encoder.block.3.layer.0.layer_norm.weight", "encoder.block.3.layer.0.layer_norm.weight");
    let without = |part: &'static str| move |name: &str| (!name.contains(part)).then(|| name.to_string());
    for part in
        ["shared", "block.0.layer.0.SelfAttention.relative_attention_bias", "block.2.layer.1.DenseReluDense.wi_0"]
    {
        fails(&without(part), "lm_head.weight", part);
    }
}

#[derive(Deserialize)]
struct Manifest {
    config: serde_json::Value,
    parameters: usize,
    tensors: Vec<(String, Vec<usize>)>,
}

/// The published configuration asks for exactly the published tensors; and what a prompt pair costs.
#[test]
fn manifest_and_cost_of_the_published_encoder() {
    let text = fs::read_to_string(data("manifest/text_encoder_t5xxl.json")).unwrap();
    let want: Manifest = serde_json::from_str(&text).unwrap();
    assert_eq!(want.parameters, 4_762_310_656);
    let config = T5Config::from_json("t5xxl", &want.config.to_string()).unwrap();
    let device = Device::meta();
    let store = WeightStore::meta(&device, DType::BF16);
    let model = T5Encoder::from_weights(&store.root(), &config).unwrap();
    let mut got = store.manifest();
    got.sort();
    assert_eq!(got, want.tensors);
    let count: usize = got.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    assert_eq!(count, want.parameters);

    let Device::Meta(meta) = &device else { unreachable!() };
    meta.take_report();
    let out = model.forward(&[vec![0; 256], vec![1; 256]], None).unwrap();
    assert_eq!(out.shape(), [2, 256, 4096]);
    let report = meta.take_report();
    let (tokens, c, ff) = (2 * 256, 4096, 10240);
    assert_eq!(report.of(OpKind::Linear).macs, 24 * tokens * (4 * c * c + 3 * c * ff));
    // Two norms, four products and attention a block, the embedding and the last norm: nothing is transposed or copied.
    assert_eq!(report.ops.len(), 24 * 7 + 2);
}

#[test]
fn defaults_are_those_of_the_published_class() {
    let config = T5Config::from_json("config.json", r#"{"feed_forward_proj": "gated-gelu"}"#).unwrap();
    assert_eq!((config.vocab_size, config.d_model, config.d_kv, config.d_ff), (32128, 512, 64, 2048));
    assert_eq!((config.num_layers, config.num_heads, config.layer_norm_epsilon), (6, 8, 1e-6));
    assert_eq!((config.relative_attention_num_buckets, config.relative_attention_max_distance), (32, 128));
}

/// A config.json and what the error must name beside the file.
#[test]
fn unusable_configurations_are_named() {
    let gated = |rest: &str| format!(r#"{{"feed_forward_proj": "gated-gelu", {rest}}}"#);
    let cases: [(String, &[&str]); 9] = [
        ("[]".into(), &["JSON"]),
        ("{}".into(), &["feed_forward_proj is absent", "gated-gelu"]),
        (r#"{"feed_forward_proj": "relu"}"#.into(), &["feed_forward_proj is \"relu\"", "1.1"]),
        (gated(r#""model_type": "umt5""#), &["model_type", "umt5", "t5"]),
        (gated(r#""is_decoder": true"#), &["is_decoder"]),
        (gated(r#""d_kv": 0"#), &["d_kv is 0", "from 1"]),
        (gated(r#""layer_norm_epsilon": 0"#), &["layer_norm_epsilon", "above 0"]),
        (gated(r#""relative_attention_num_buckets": 3"#), &["relative_attention_num_buckets is 3", "4 or more"]),
        (gated(r#""relative_attention_max_distance": 8"#), &["relative_attention_max_distance is 8", "more than 8"]),
    ];
    for (json, wanted) in cases {
        let error = T5Config::from_json("text_encoder_3/config.json", &json).unwrap_err().to_string();
        for part in wanted.iter().chain(&["text_encoder_3/config.json"]) {
            assert!(error.contains(part), "{json}: {error:?} lacks {part:?}");
        }
    }
}

#[test]
fn ids_and_lengths_that_do_not_fit_are_named() {
    let model = load(&drawn::folder("t5/plain"), "model", &Device::cpu(), DType::F32);
    type Case<'a> = (&'a [Vec<u32>], Option<&'a [usize]>, &'a str);
    let cases: [Case; 7] = [
        (&[], None, "0 rows"),
        (&[vec![]], None, "of 0 tokens"),
        (&[vec![1; 4], vec![1; 5]], None, "equal length"),
        (&[vec![1, 61]], None, "vocab_size = 61"),
        (&[vec![1; 4]], Some(&[5]), "lengths is [5], expected 1 to 4"),
        (&[vec![1; 4]], Some(&[0]), "lengths is [0]"),
        (&[vec![1; 4]], Some(&[1, 2]), "for each of 1 rows"),
    ];
    for (ids, lengths, wanted) in cases {
        let error = model.forward(ids, lengths).err().unwrap().to_string();
        assert!(error.contains(wanted), "{ids:?}: {error:?} lacks {wanted:?}");
    }
}
