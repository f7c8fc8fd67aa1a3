//! Weight files: layouts and conversions that come out right, and every way a file can be wrong with its own error.

#[path = "common/torch_file.rs"]
mod torch_file;

use std::fs;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use megafuse::models::{WeightStore, Weights};
use megafuse::{DType, Device, Error, Result, Tensor};
use safetensors::Dtype as FileDtype;
use safetensors::tensor::{TensorView, serialize};

type Entry<'a> = (&'a str, &'a [usize], Vec<f64>);

/// A safetensors file of `(key, shape, values)`, all stored as `dtype`.
fn file_bytes(dtype: FileDtype, tensors: &[Entry]) -> Vec<u8> {
    let data: Vec<Vec<u8>> = tensors.iter().map(|(_, _, values)| encode(dtype, values)).collect();
    let views = tensors.iter().zip(&data).map(|((key, shape, _), data)| {
        (key.to_string(), TensorView::new(dtype, shape.to_vec(), data).expect("shape and values agree"))
    });
    serialize(views, None).expect("serializes")
}

fn encode(dtype: FileDtype, values: &[f64]) -> Vec<u8> {
    let each = |f: &dyn Fn(f64) -> Vec<u8>| values.iter().flat_map(|&v| f(v)).collect();
    match dtype {
        FileDtype::F64 => each(&|v| v.to_le_bytes().to_vec()),
        FileDtype::F32 => each(&|v| (v as f32).to_le_bytes().to_vec()),
        FileDtype::F16 => each(&|v| f16::from_f64(v).to_le_bytes().to_vec()),
        FileDtype::BF16 => each(&|v| bf16::from_f64(v).to_le_bytes().to_vec()),
        FileDtype::I64 => each(&|v| (v as i64).to_le_bytes().to_vec()),
        _ => panic!("not used here"),
    }
}

fn count(n: usize) -> Vec<f64> {
    (0..n).map(|i| i as f64 / 8.0).collect()
}

fn write(dir: &Path, name: &str, bytes: &[u8]) {
    fs::write(dir.join(name), bytes).expect("temporary file");
}

fn open(dir: &Path, dtype: DType) -> Result<WeightStore> {
    WeightStore::open(dir, "model", &Device::cpu(), dtype)
}

/// A store over one file of these tensors.
fn store(file_dtype: FileDtype, dtype: DType, tensors: &[Entry]) -> WeightStore {
    let bytes: &'static [u8] = file_bytes(file_dtype, tensors).leak();
    WeightStore::from_bytes("built-in.safetensors", bytes, &Device::cpu(), dtype).expect("a good file")
}

fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.to_f32_vec().expect("cpu").into_iter().map(f64::from).collect()
}

fn message<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("expected an error"),
        Err(error) => error.to_string(),
    }
}

fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{message:?} does not say {part:?}");
    }
}

#[test]
fn every_file_dtype_becomes_every_dtype() {
    let source: Vec<f64> = vec![0.0, -0.5, 1.0 / 3.0, 123.456, -6.0e-6, 60000.0];
    for from in [FileDtype::F64, FileDtype::F32, FileDtype::F16, FileDtype::BF16] {
        for to in DType::FLOATS {
            let store = store(from, to, &[("x", &[2, 3], source.clone())]);
            let tensor = store.root().tensor("x", &[2, 3]).expect("loads");
            assert_eq!((tensor.shape(), tensor.dtype()), (&[2usize, 3][..], to));
            let stored = |v: f64| match from {
                FileDtype::F16 => f16::from_f64(v).to_f32(),
                FileDtype::BF16 => bf16::from_f64(v).to_f32(),
                _ => v as f32,
            };
            let rounded = |v: f32| match to {
                DType::F16 => f16::from_f32(v).to_f64(),
                DType::BF16 => bf16::from_f32(v).to_f64(),
                _ => f64::from(v),
            };
            let want: Vec<f64> = source.iter().map(|&v| rounded(stored(v))).collect();
            assert_eq!(values(&tensor), want, "{from:?} to {to}");
        }
    }
}

/// Sizes below, at and above the unit in which threads convert.
#[test]
fn long_tensors_convert_every_element() {
    for n in [1usize, 32767, 32768, 32769, 100_003] {
        let source: Vec<f64> = (0..n).map(|i| (i % 2039) as f64).collect();
        let store = store(FileDtype::F16, DType::F32, &[("x", &[n], source.clone())]);
        assert_eq!(values(&store.root().tensor("x", &[n]).expect("loads")), source, "{n}");
    }
}

#[test]
fn conv_weights_become_channels_last() {
    for (o, i, k) in [(1, 1, 1), (5, 3, 3), (2, 7, 1), (3, 4000, 3), (2, 3, 5)] {
        let n = o * i * k * k;
        let source: Vec<f64> = (0..n).map(|v| (v % 2039) as f64).collect();
        let store = store(FileDtype::F32, DType::F32, &[("conv.weight", &[o, i, k, k], source.clone())]);
        let got = store.root().at("conv").conv("weight", o, i, k).expect("loads");
        assert_eq!(got.shape(), [o, k, k, i]);
        for (at, &value) in values(&got).iter().enumerate() {
            let (c, rest) = (at % i, at / i);
            let (x, y, out) = (rest % k, rest / k % k, rest / k / k);
            assert_eq!(value, source[((out * i + c) * k + y) * k + x], "{o} {i} {k} at {at}");
        }
    }
}

#[test]
fn matrices_and_1x1_convs_are_the_same_bytes() {
    let tensors: &[Entry] = &[("a", &[3, 2], count(6)), ("b", &[3, 2, 1, 1], count(6))];
    let as_matrix = store(FileDtype::F32, DType::F32, tensors);
    for key in ["a", "b"] {
        let matrix = as_matrix.root().matrix(key, 3, 2).expect(key);
        assert_eq!((matrix.shape(), values(&matrix)), (&[3usize, 2][..], count(6)));
    }
    let as_conv = store(FileDtype::F32, DType::F32, tensors);
    for key in ["a", "b"] {
        let conv = as_conv.root().conv(key, 3, 2, 1).expect(key);
        assert_eq!((conv.shape(), values(&conv)), (&[3usize, 1, 1, 2][..], count(6)));
    }
}

#[test]
fn stacked_puts_tensors_one_after_the_other() {
    let (q, k, v) = (vec![1.0; 6], vec![2.0; 6], vec![3.0; 6]);
    let tensors: &[Entry] = &[
        ("a.to_v.weight", &[2, 3], v.clone()),
        ("a.to_q.weight", &[2, 3], q.clone()),
        ("a.to_k.weight", &[2, 3, 1, 1], k.clone()),
        ("a.to_q.bias", &[2], vec![4.0; 2]),
        ("a.to_k.bias", &[2], vec![5.0; 2]),
    ];
    let store = store(FileDtype::F32, DType::F16, tensors);
    let a = store.root().at("a");
    let weight = a.stacked(&["to_q.weight", "to_k.weight", "to_v.weight"], 2, Some(3)).expect("loads");
    assert_eq!((weight.shape(), values(&weight)), (&[6usize, 3][..], [q, k, v].concat()));
    let bias = a.stacked(&["to_q.bias", "to_k.bias"], 2, None).expect("loads");
    assert_eq!((bias.shape(), values(&bias)), (&[4usize][..], vec![4.0, 4.0, 5.0, 5.0]));
    store.finish().expect("nothing left");
}

#[test]
fn geglu_interleaves_values_and_gates() {
    for (n, columns) in [(1, 1), (3, 2), (1280, 77)] {
        let source: Vec<f64> = (0..2 * n * columns).map(|v| (v % 2039) as f64).collect();
        let bias: Vec<f64> = (0..2 * n).map(|v| (v % 2039) as f64).collect();
        let tensors: &[Entry] =
            &[("proj.weight", &[2 * n, columns], source.clone()), ("proj.bias", &[2 * n], bias.clone())];
        let store = store(FileDtype::F32, DType::F32, tensors);
        let proj = store.root().at("proj");
        let weight = proj.geglu("weight", n, Some(columns)).expect("loads");
        assert_eq!(weight.shape(), [2 * n, columns]);
        let row = |r: usize| &source[r * columns..(r + 1) * columns];
        let want: Vec<f64> = (0..n).flat_map(|j| [row(j), row(n + j)].concat()).collect();
        assert_eq!(values(&weight), want);
        let want: Vec<f64> = (0..n).flat_map(|j| [bias[j], bias[n + j]]).collect();
        assert_eq!(values(&proj.geglu("bias", n, None).expect("loads")), want);
    }
}

/// Nothing in the format promises that data begin at a multiple of the element's size.
#[test]
fn unaligned_data_is_read() {
    for (dtype, size) in [(FileDtype::F64, 8), (FileDtype::F32, 4), (FileDtype::F16, 2), (FileDtype::BF16, 2)] {
        let header = format!(r#"{{"x":{{"dtype":"{dtype}","shape":[2],"data_offsets":[0,{}]}}}}"#, 2 * size);
        for padding in 0..8 {
            let mut bytes = ((header.len() + padding) as u64).to_le_bytes().to_vec();
            bytes.extend(header.as_bytes());
            bytes.extend(vec![b' '; padding]);
            bytes.extend(encode(dtype, &[1.5, -2.0]));
            let store = WeightStore::from_bytes("x", bytes.leak(), &Device::cpu(), DType::F32).expect("a good file");
            assert_eq!(values(&store.root().tensor("x", &[2]).expect("loads")), [1.5, -2.0]);
        }
    }
}

#[test]
fn values_that_are_not_finite_are_refused() {
    let cases = [
        (FileDtype::F32, DType::F32, f64::NAN, "NaN"),
        (FileDtype::F16, DType::F32, f64::INFINITY, "inf"),
        (FileDtype::BF16, DType::BF16, f64::NEG_INFINITY, "-inf"),
        (FileDtype::F32, DType::F16, 65520.0, "too large for f16: f32 and bf16 can hold them"),
        (FileDtype::F64, DType::F32, 1e39, "too large for f32"),
        (FileDtype::F32, DType::BF16, f64::from(f32::MAX), "too large for bf16"),
    ];
    for (from, to, value, says) in cases {
        let store = store(from, to, &[("norm.weight", &[3], vec![1.0, value, 1.0])]);
        let error = message(store.root().tensor("norm.weight", &[3]));
        assert_says(&error, &["built-in.safetensors", "norm.weight", "1 of 3 values", says]);
    }
    for (to, value) in [(DType::F16, 65519.0), (DType::BF16, 3.389e38)] {
        let store = store(FileDtype::F32, to, &[("x", &[1], vec![value])]);
        let got = values(&store.root().tensor("x", &[1]).expect("rounds to the largest finite value"));
        assert!(got[0].is_finite());
    }
}

#[test]
fn wrong_keys_and_shapes_name_file_key_and_shapes() {
    let tensors: &[Entry] = &[("conv.weight", &[4, 3, 3, 3], count(108)), ("extra", &[1], vec![0.0])];
    let error = |ask: &dyn Fn(&Weights) -> Result<Tensor>| {
        let store = store(FileDtype::F16, DType::F32, tensors);
        message(ask(&store.root().at("conv")))
    };
    let missing = error(&|conv| conv.tensor("bias", &[4]));
    assert_says(&missing, &["built-in.safetensors", "tensor conv.bias", "missing", "[4]"]);
    let shape = error(&|conv| conv.conv("weight", 8, 3, 3));
    assert_says(&shape, &["tensor conv.weight", "has shape [4, 3, 3, 3]", "wanted [8, 3, 3, 3]"]);
    let twice = error(&|conv| conv.conv("weight", 4, 3, 3).and_then(|_| conv.conv("weight", 4, 3, 3)));
    assert_says(&twice, &["tensor conv.weight", "two layers"]);
    let store = store(FileDtype::F16, DType::F32, tensors);
    store.root().at("conv").conv("weight", 4, 3, 3).expect("loads");
    let extra = message(store.finish());
    assert_says(&extra, &["built-in.safetensors", "tensor extra", "[1]", "no layer", "config.json"]);
}

#[test]
fn left_over_tensors_are_counted() {
    let names: Vec<String> = (0..9).map(|i| format!("t{i}")).collect();
    let tensors: Vec<Entry> = names.iter().map(|name| (name.as_str(), &[1usize][..], vec![0.0])).collect();
    let error = message(store(FileDtype::F32, DType::F32, &tensors).finish());
    assert_says(&error, &["tensor t0", "nor 8 more: t1, t2, t3, t4, ..."]);
}

#[test]
fn integers_are_refused_unless_dropped() {
    let bytes: &'static [u8] = file_bytes(FileDtype::I64, &[("position_ids", &[1, 3], count(3))]).leak();
    let open = || WeightStore::from_bytes("ids", bytes, &Device::cpu(), DType::F32).expect("a good file");
    let error = message(open().root().tensor("position_ids", &[1, 3]));
    assert_says(&error, &["position_ids", "I64", "wanted F32"]);
    let mut store = open();
    store.rename(|key| (key != "position_ids").then(|| key.to_string())).expect("drops");
    store.finish().expect("nothing left");
}

#[test]
fn rename_finds_a_clash() {
    let tensors: &[Entry] = &[("text_model.a", &[1], vec![1.0]), ("a", &[1], vec![2.0]), ("b", &[1], vec![3.0])];
    let strip = |key: &str| Some(key.strip_prefix("text_model.").unwrap_or(key).to_string());
    let error = message(store(FileDtype::F32, DType::F32, tensors).rename(strip));
    assert_says(&error, &["tensor text_model.a", "second tensor stands for a"]);
    let mut good = store(FileDtype::F32, DType::F32, &tensors[..1]);
    good.rename(strip).expect("renames");
    assert!(good.contains("a") && !good.contains("text_model.a"));
    good.root().tensor("a", &[1]).expect("under its new name");
    good.finish().expect("nothing left");
}

#[test]
fn a_manifest_hands_out_shapes_and_remembers_them() {
    let store = WeightStore::meta(&Device::meta(), DType::F16);
    let root = store.root();
    let take = |w: &Weights| -> Result<Vec<Tensor>> {
        Ok(vec![
            w.at("conv").conv("weight", 4, 3, 3)?,
            w.matrix("proj", 5, 2)?,
            w.stacked(&["q", "k"], 2, Some(7))?,
            w.geglu("ff", 3, Some(2))?,
        ])
    };
    let shapes: Vec<Vec<usize>> = take(&root).expect("meta").iter().map(|t| t.shape().to_vec()).collect();
    assert_eq!(shapes, [vec![4, 3, 3, 3], vec![5, 2], vec![4, 7], vec![6, 2]]);
    assert!(root.contains("anything"));
    assert_says(&message(root.matrix("proj", 5, 2)), &["proj", "two layers"]);
    let want = [("conv.weight", vec![4, 3, 3, 3]), ("proj", vec![5, 2]), ("q", vec![2, 7]), ("k", vec![2, 7])];
    let want = want.into_iter().chain([("ff", vec![6, 2])]).map(|(key, shape)| (key.to_string(), shape));
    assert_eq!(store.manifest(), want.collect::<Vec<_>>());
    store.finish().expect("a manifest has no left-overs");
}

#[test]
fn a_manifest_has_no_data_for_the_cpu() {
    let store = WeightStore::meta(&Device::cpu(), DType::F32);
    assert!(matches!(store.root().tensor("x", &[1]), Err(Error::DeviceUnavailable { .. })));
}

#[test]
fn files_load_on_the_meta_device_with_their_shapes_checked() {
    let bytes: &'static [u8] = file_bytes(FileDtype::F32, &[("x", &[2], count(2)), ("y", &[2], count(2))]).leak();
    let store = WeightStore::from_bytes("x", bytes, &Device::meta(), DType::F32).expect("a good file");
    assert_eq!(store.root().tensor("x", &[2]).expect("shape agrees").shape(), [2]);
    assert_says(&message(store.root().tensor("y", &[3])), &["has shape [2], wanted [3]"]);
}

#[test]
fn single_sharded_and_fp16_files_are_found() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let at = dir.path();
    let take_all = |keys: &[&str]| {
        let store = open(at, DType::F32).expect("opens");
        keys.iter().for_each(|key| assert_eq!(values(&store.root().tensor(key, &[2]).expect("loads")), count(2)));
        store.finish().expect("nothing left");
    };
    write(at, "model.fp16.safetensors", &file_bytes(FileDtype::F16, &[("a", &[2], count(2))]));
    take_all(&["a"]);
    fs::remove_file(at.join("model.fp16.safetensors")).expect("removes");

    write(at, "model-00001-of-00002.safetensors", &file_bytes(FileDtype::F32, &[("a", &[2], count(2))]));
    write(at, "model-00002-of-00002.safetensors", &file_bytes(FileDtype::BF16, &[("b", &[2], count(2))]));
    let index = r#"{"metadata": {"total_size": 12}, "weight_map": {
        "a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}"#;
    for name in
        ["model.safetensors.index.fp16.json", "model.fp16.safetensors.index.json", "model.safetensors.index.json"]
    {
        write(at, name, index.as_bytes());
        take_all(&["a", "b"]);
        fs::remove_file(at.join(name)).expect("removes");
    }
    write(at, "model.safetensors", &file_bytes(FileDtype::F32, &[("c", &[2], count(2))]));
    take_all(&["c"]);
}

/// mochi#119: any one variant that is there.
#[test]
fn the_only_variant_is_taken_and_named() {
    let of = |key: &str| file_bytes(FileDtype::BF16, &[(key, &[2], count(2))]);
    let index = r#"{"weight_map": {"a": "SHARD"}}"#;
    let shard = "model-00001-of-00001.bf16.safetensors";
    for (name, variant) in [
        ("model.bf16.safetensors", "bf16"),
        ("model.non_ema.safetensors", "non_ema"),
        ("model.fp16.ema_only.safetensors", "fp16.ema_only"),
        ("model.safetensors.index.bf16.json", "bf16"),
        ("model.bf16.safetensors.index.json", "bf16"),
    ] {
        let dir = tempfile::tempdir().expect("temporary directory");
        let at = dir.path();
        if name.ends_with(".json") {
            write(at, name, index.replace("SHARD", shard).as_bytes());
            write(at, shard, &of("a"));
        } else {
            write(at, name, &of("a"));
        }
        let store = open(at, DType::F32).expect(name);
        assert_eq!((store.variant(), store.contains("a")), (Some(variant), true), "{name}");
        // fp16 goes before any other, the plain one before both.
        write(at, "model.fp16.safetensors", &of("b"));
        let store = open(at, DType::F32).expect(name);
        assert_eq!((store.variant(), store.contains("b")), (Some("fp16"), true), "{name}");
        write(at, "model.safetensors", &of("c"));
        let store = open(at, DType::F32).expect(name);
        assert_eq!((store.variant(), store.contains("c")), (None, true), "{name}");
    }
}

#[test]
fn one_of_several_variants_must_be_chosen() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let at = dir.path();
    write(at, "model.safetensors.index.bf16.json", b"{}");
    write(at, "model.non_ema.safetensors", b"");
    write(at, "modelling.ema.safetensors", b"");
    let error = message(open(at, DType::F32));
    assert_says(&error, &["model.safetensors", "the variants bf16, non_ema:", "rename"]);
    // Shards are no variants.
    let dir = tempfile::tempdir().expect("temporary directory");
    let at = dir.path();
    write(at, "model.fp32-00001-of-00002.safetensors", b"");
    let error = message(open(at, DType::F32));
    assert_says(&error, &["model.fp32-00001-of-00002.safetensors", "nor an index of shards"]);
}

/// ControlNet#336: what no layer has is data for a warning; what wrappers put before every key is taken away.
#[test]
fn keys_of_wrapped_networks_are_understood() {
    for (prefix, found) in [
        ("_orig_mod.", true),
        ("module.", true),
        ("model.", true),
        ("module._orig_mod.", true),
        ("model.module.", true),
        ("net.", false),
    ] {
        let (a, b) = (format!("{prefix}conv.weight"), format!("{prefix}model.bias"));
        let store = store(FileDtype::F32, DType::F32, &[(&a, &[2], count(2)), (&b, &[2], count(2))]);
        assert_eq!(store.contains("conv.weight") && store.contains("model.bias"), found, "{prefix}");
    }
    // One key without the prefix: it is a name like others. A whole checkpoint's names begin so.
    let (a, b) = ("module.conv.weight", "module.conv.bias");
    let mixed = store(FileDtype::F32, DType::F32, &[(a, &[2], count(2)), (b, &[2], count(2)), ("x", &[2], count(2))]);
    assert!(mixed.contains(a) && mixed.contains(b));
    let (a, b) = ("model.diffusion_model.out.2.bias", "model.x");
    let whole = store(FileDtype::F32, DType::F32, &[(a, &[2], count(2)), (b, &[2], count(2))]);
    assert!(whole.contains(a) && whole.contains(b));
}

#[test]
fn what_no_layer_asked_for_is_listed() {
    let names: Vec<String> = (0..6).map(|i| format!("t{i}")).collect();
    let tensors: Vec<Entry> = names.iter().map(|name| (name.as_str(), &[1usize][..], vec![0.0])).collect();
    let store = store(FileDtype::F32, DType::F32, &tensors);
    store.root().tensor("t1", &[1]).expect("loads");
    let [unused] = &store.unused()[..] else { panic!("one file") };
    assert_eq!(unused.keys, ["t0", "t2", "t3", "t4", "t5"]);
    let wanted = "built-in.safetensors: no part of the model uses 5 tensors: t0, t2, t3, t4, ...";
    assert_eq!(unused.to_string(), wanted);
    ["t0", "t2", "t3", "t4"].iter().for_each(|key| drop(store.root().tensor(key, &[1]).expect("loads")));
    assert_eq!(store.unused()[0].to_string(), "built-in.safetensors: no part of the model uses 1 tensor: t5");
    store.root().tensor("t5", &[1]).expect("loads");
    assert_eq!(store.unused(), []);
}

/// A missing tensor and one that no layer has: their names beside each other, if they are alike.
#[test]
fn a_missing_tensor_is_found_under_another_name() {
    let explained = |extra: (&str, &[usize])| {
        let tensors: &[Entry] = &[
            ("a.norm.weight", &[4], count(4)),
            (extra.0, extra.1, count(extra.1.iter().product())),
            ("a.conv.bias", &[4], count(4)),
        ];
        let store = store(FileDtype::F32, DType::F32, tensors);
        let load = |w: &Weights| -> Result<()> {
            w.tensor("a.norm.weight", &[4])?;
            w.tensor("a.norm.bias", &[4])?;
            w.conv("a.conv.weight", 4, 2, 3)?;
            w.tensor("a.conv.bias", &[4])?;
            Ok(())
        };
        let error = load(&store.root()).expect_err("a tensor is missing");
        store.explained(error, load).to_string()
    };
    for (extra, shape, alike) in [
        ("a.norm.beta", &[4][..], true),
        ("b.a.norm.bias", &[4], true),
        ("a.nrom.bias", &[4], true),
        ("a.norm.offset", &[5], false),
        ("a.further.layer.bias", &[4], false),
    ] {
        let error = explained((extra, shape));
        assert_says(
            &error,
            &["tensor a.norm.bias: missing, wanted shape [4]", "also missing: a.conv.weight (2 in all)"],
        );
        assert_eq!(error.contains(&format!("{extra}, shape {shape:?}, which looks like it")), alike, "{error}");
        // A tensor that another layer takes is no candidate, though its name is as near.
        assert!(!error.contains("a.norm.weight") && !error.contains("tensor a.conv.bias"), "{error}");
    }
}

#[test]
fn bad_shards_are_named() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let at = dir.path();
    let shard = |key: &str| file_bytes(FileDtype::F32, &[(key, &[2], count(2))]);
    let case = |index: &str, says: &[&str]| {
        write(at, "model.safetensors.index.json", index.as_bytes());
        assert_says(&message(open(at, DType::F32)), says);
    };
    write(at, "s1.safetensors", &shard("a"));
    write(at, "s2.safetensors", &shard("b"));
    write(at, "again.safetensors", &shard("a"));
    case("{", &["model.safetensors.index.json", "not a safetensors index", "download it again"]);
    case(r#"{"weight_map": {}}"#, &["weight_map is empty"]);
    case(
        r#"{"weight_map": {"a": "s1.safetensors", "b": "s3.safetensors"}}"#,
        &["s3.safetensors", "missing", "download"],
    );
    case(r#"{"weight_map": {"a": "../s1.safetensors"}}"#, &["../s1.safetensors", "plain name"]);
    case(r#"{"weight_map": {"a": "s2.safetensors", "b": "s1.safetensors"}}"#, &["tensor a", "s2.safetensors", "in s1"]);
    case(r#"{"weight_map": {"a": "s1.safetensors", "z": "s2.safetensors"}}"#, &["tensor z", "no shard has it"]);
    case(r#"{"weight_map": {"a": "s1.safetensors", "c": "again.safetensors"}}"#, &["tensor a", "again", "as well"]);
    write(at, "s2.safetensors", &file_bytes(FileDtype::F32, &[("b", &[2], count(2)), ("more", &[2], count(2))]));
    case(r#"{"weight_map": {"a": "s1.safetensors", "b": "s2.safetensors"}}"#, &["does not name tensor more"]);
}

/// Headers and bodies that do not fit together: the file's name, and that a download helps.
#[test]
fn damaged_files_are_refused() {
    let with_header = |header: &str, data: usize| {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    };
    let good = file_bytes(FileDtype::F32, &[("a", &[2], count(2)), ("b", &[2], count(2))]);
    let tensor = |key: &str, from: usize, to: usize| {
        format!(r#""{key}":{{"dtype":"F32","shape":[2],"data_offsets":[{from},{to}]}}"#)
    };
    let pair = |a: String, b: String, data: usize| with_header(&format!("{{{a},{b}}}"), data);
    let again: &[&str] = &["model.safetensors", "download it again"];
    let cases: Vec<(&str, Vec<u8>, &[&str])> = vec![
        ("empty", vec![], &["is empty", "download it again"]),
        ("part of the length", good[..5].to_vec(), again),
        ("part of the header", good[..20].to_vec(), again),
        ("part of the data", good[..good.len() - 3].to_vec(), again),
        ("more than the data", [&good[..], &[0; 8]].concat(), again),
        ("largest header", u64::MAX.to_le_bytes().to_vec(), again),
        ("large header", 200_000_000u64.to_le_bytes().repeat(9), again),
        ("half an object", with_header("{", 0), again),
        ("not text", with_header("\u{0}\u{1}", 0), again),
        ("a list", with_header("[1, 2]", 0), again),
        ("overlap", pair(tensor("a", 0, 8), tensor("b", 4, 12), 12), again),
        ("hole", pair(tensor("a", 0, 8), tensor("b", 12, 20), 20), again),
        ("a key twice", pair(tensor("a", 0, 8), tensor("a", 8, 16), 16), again),
        ("shorter than its shape", with_header(&format!("{{{}}}", tensor("a", 0, 4)), 4), again),
        ("backwards", with_header(&format!("{{{}}}", tensor("a", 8, 0)), 8), again),
        (
            "overflow",
            with_header(r#"{"a":{"dtype":"F32","shape":[18446744073709551615,2],"data_offsets":[0,8]}}"#, 8),
            again,
        ),
        ("unknown dtype", with_header(r#"{"a":{"dtype":"Q7","shape":[2],"data_offsets":[0,8]}}"#, 8), again),
        ("lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:00".to_vec(), &["Git LFS", "git lfs pull"]),
        ("zip", b"PK\x03\x04rest of a zip archive".to_vec(), &["no directory of a zip archive", "download it again"]),
        ("another pickle", b"\x80\x04}.".to_vec(), &["none that torch.save wrote", "as safetensors"]),
        ("html", b"<!DOCTYPE html><html>".to_vec(), &["web page", "download it again"]),
        ("gguf", b"GGUF\x03\0\0\0".to_vec(), &["GGUF"]),
    ];
    let dir = tempfile::tempdir().expect("temporary directory");
    for (name, bytes, says) in cases {
        write(dir.path(), "model.safetensors", &bytes);
        let error = message(open(dir.path(), DType::F32));
        says.iter().for_each(|part| assert!(error.contains(part), "{name}: {error:?} does not say {part:?}"));
    }
}

#[test]
fn absent_files_say_what_is_there_instead() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let at = dir.path();
    let absent = WeightStore::open(&at.join("unet"), "model", &Device::cpu(), DType::F32);
    assert_says(&message(absent), &["unet", "no such directory"]);
    assert_says(&message(open(at, DType::F32)), &["model.safetensors", "not found", "download"]);
    write(at, "other.safetensors", b"");
    assert_says(&message(open(at, DType::F32)), &["not found", "other.safetensors", "rename"]);
    write(at, "weights.pth", b"");
    assert_says(&message(open(at, DType::F32)), &["nor pytorch_model.bin", "weights.pth", "rename"]);
    write(at, "pytorch_model.bin", b"");
    assert_says(&message(open(at, DType::F32)), &["pytorch_model.bin", "is empty"]);
}

fn pickles(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/pickles").join(name)
}

/// What torch.save wrote, in both of its forms, against what torch reads of it (tools/oracle/pickles.py): all dtypes, tensors
/// that lie in their storages in any order or share them, a parameter; of a training's checkpoint the state dict alone.
#[test]
fn files_of_torch_hold_what_torch_reads() {
    let cpu = Device::cpu();
    let open = |name: &str| WeightStore::open_state_dict(&pickles(name), &[], &cpu, DType::F32).expect("opens");
    let names = |store: &WeightStore| -> Vec<(String, Vec<usize>)> {
        store.tensors().map(|(key, shape)| (key.to_string(), shape.to_vec())).collect()
    };
    for name in ["training.ckpt", "older.pth"] {
        let (got, want) = (open(name), open("values.safetensors"));
        assert_eq!(names(&got), names(&want), "{name}");
        assert_eq!(names(&got).len(), 14);
        for (key, shape) in names(&want).iter().filter(|(key, _)| key != "i64") {
            let read = |store: &WeightStore| values(&store.root().tensor(key, shape).expect("a tensor"));
            assert_eq!(read(&got), read(&want), "{name} {key}");
        }
    }
}

/// `.bin` beside nothing else is read, under the name that each kind of network has; safetensors come before it.
#[test]
fn bins_are_read_where_there_is_no_safetensors() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let at = dir.path();
    let safetensors = |values: Vec<f64>| file_bytes(FileDtype::F32, &[("a", &[2], values)]);
    let bin = |values: Vec<f64>| {
        write(at, "source", &safetensors(values));
        torch_file::of_safetensors(&at.join("source"))
    };
    let open_stem = |stem| WeightStore::open(at, stem, &Device::cpu(), DType::F32).expect("opens");
    let of = |stem| values(&open_stem(stem).root().tensor("a", &[2]).expect("a tensor"));
    write(at, "pytorch_model.bin", &bin(vec![1.0, 2.0]));
    write(at, "diffusion_pytorch_model.fp16.bin", &bin(vec![3.0, 4.0]));
    assert_eq!((of("model"), of("diffusion_pytorch_model")), (vec![1.0, 2.0], vec![3.0, 4.0]));
    assert_eq!(open_stem("diffusion_pytorch_model").variant(), Some("fp16"));
    write(at, "diffusion_pytorch_model-00001-of-00001.bin", &bin(vec![5.0, 6.0]));
    let index = r#"{"weight_map": {"a": "diffusion_pytorch_model-00001-of-00001.bin"}}"#;
    write(at, "diffusion_pytorch_model.bin.index.json", index.as_bytes());
    assert_eq!(of("diffusion_pytorch_model"), [5.0, 6.0]);
    write(at, "diffusion_pytorch_model.bf16.safetensors", &safetensors(vec![7.0, 8.0]));
    assert_eq!(of("diffusion_pytorch_model"), [7.0, 8.0]);
}

#[test]
fn damaged_files_of_torch_say_what_is_wrong() {
    let good = fs::read(pickles("training.ckpt")).expect("a file");
    let zip = |pickle: &[u8]| torch_file::archive(pickle, &[&[0; 16]], 0);
    // {"w": a tensor of storage 0, which has so many bytes of a kind}
    let tensor = |class: &str, storage: &str, size: &str, strides: &str| {
        let storage = format!("(U\x07storagectorch\n{class}\nU\x01{storage}U\x03cpuK\x04tQ");
        zip(format!("}}U\x01wctorch._utils\n_rebuild_tensor_v2\n({storage}K\0{size}{strides}tRs.").as_bytes())
    };
    let (square, plain) = ("(K\x02K\x02t", "(K\x02K\x01t");
    let mut of_another_program = zip(b"}.");
    while let Some(at) = of_another_program.windows(8).position(|name| name == b"data.pkl") {
        of_another_program[at + 5..at + 8].copy_from_slice(b"txt");
    }
    // {} of which each BUILD with itself as its parameters makes twice as much, 40 times.
    let doubling =
        [&b"}q\0X\x01\0\0\0aNs0}X\x0b\0\0\0_parametersh\0sq\x01"[..], &b"0h\0h\x01b".repeat(40), b"."].concat();
    // Seven dicts, each with the one before under a hundred names.
    let mut tree = b"}X\x01\0\0\0aNsq\0".to_vec();
    for level in 0..7u8 {
        tree.push(b'}');
        tree.extend((0..100).flat_map(|name| [b'K', name, b'h', level, b's']));
        tree.extend([b'q', level + 1]);
    }
    tree.push(b'.');
    const AGAIN: &str = "download it again";
    let cases: Vec<(&str, Vec<u8>, &[&str])> = vec![
        ("cut", good[..good.len() / 2].to_vec(), &["no directory of a zip archive", AGAIN]),
        ("no pickle", torch_file::archive(b"", &[], 0), &["in the middle"]),
        ("a zip of other files", of_another_program, &["without data.pkl", "not a file that torch.save wrote"]),
        ("compressed", torch_file::archive(b"}.", &[], 8), &["data.pkl is compressed", "save it as safetensors"]),
        (
            "a command",
            zip(b"cposix\nsystem\nU\x04true\x85R."),
            &["would call posix.system", "was not run", "do not use"],
        ),
        ("a command among weights", zip(b"}U\x01ac__builtin__\neval\nU\x01x\x85Rs."), &["would call __builtin__.eval"]),
        ("a command by name", zip(b"(U\x04trueios\nsystem\n."), &["would call os.system"]),
        ("a command as an object", zip(b"(csubprocess\nPopen\nU\x04trueo."), &["would call subprocess.Popen"]),
        ("numbers alone", zip(b"}U\x01aK\x01s."), &["holds no dict of tensors"]),
        ("an unknown instruction", zip(b"\xff."), &["unknown instruction 0xff"]),
        ("no value", zip(b"."), &["an empty stack"]),
        ("a dict that doubles", zip(&doubling), &["grows without end"]),
        ("a tree of dicts", zip(&tree), &["dicts in dicts without end"]),
        ("no end", zip(b"}"), &["in the middle"]),
        ("a storage that is not there", tensor("FloatStorage", "7", square, plain), &["w is in no storage", AGAIN]),
        ("beyond its storage", tensor("FloatStorage", "0", "(K\x05t", "(K\x01t"), &["w is longer than its storage"]),
        ("sizes and strides", tensor("FloatStorage", "0", square, "(K\x01t"), &["strides [1]"]),
        ("one value for all", tensor("FloatStorage", "0", square, "(K\0K\0t"), &["w of shape [2, 2] repeats"]),
        ("complex numbers", tensor("ComplexFloatStorage", "0", square, plain), &["torch.ComplexFloatStorage", "f16"]),
    ];
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("it.ckpt");
    for (name, bytes, says) in cases {
        fs::write(&path, &bytes).expect("temporary file");
        let error = message(WeightStore::open_state_dict(&path, &[], &Device::meta(), DType::F32));
        says.iter().chain(&["it.ckpt"]).for_each(|part| {
            assert!(error.contains(part), "{name}: {error:?} does not say {part:?}");
        });
    }
}

#[test]
fn files_of_another_family_are_recognised() {
    let hints = [
        ("model.diffusion_model.out.2.bias", "single-file checkpoint"),
        ("lora_unet_down_blocks_0.alpha", "LoRA"),
        ("down_blocks.0.attentions.0.to_q.lora_A.weight", "LoRA"),
    ];
    for (key, says) in hints {
        let store = store(FileDtype::F32, DType::F32, &[(key, &[1], vec![0.0])]);
        assert_says(&message(store.root().tensor("conv_in.bias", &[4])), &["conv_in.bias", "missing", says]);
    }
}

/// Weights for times: the same for the same key, other ones for another, none far from zero.
#[test]
fn random_weights_need_no_file() {
    for dtype in DType::FLOATS {
        let store = WeightStore::random(&Device::cpu(), dtype);
        let values = |key: &str| store.root().at(key).conv("weight", 8, 4, 3).unwrap();
        let (a, b) = (values("a"), values("b"));
        assert_eq!((a.shape(), a.dtype()), (&[8, 3, 3, 4][..], dtype));
        let (a, b) = (a.to_f32_vec().unwrap(), b.to_f32_vec().unwrap());
        assert_ne!(a, b);
        let again = WeightStore::random(&Device::cpu(), dtype);
        assert_eq!(again.root().at("a").conv("weight", 8, 4, 3).unwrap().to_f32_vec().unwrap(), a);
        let largest = a.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        assert!(largest > 0.02 && largest <= 0.031, "{largest}");
        assert!(store.root().at("a").tensor("weight", &[1]).is_err(), "taken twice");
    }
}
