//! `megafuse quantize` and `--weights fp8`: what is written, what is left, and that pictures come out of it.

#[path = "common/drawn.rs"]
mod drawn;
#[path = "common/place.rs"]
mod place;
#[path = "common/torch_file.rs"]
mod torch_file;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use megafuse::models::{Adapters, Part, SingleFile, WeightStore};
use megafuse::pipeline::{self, Lora, ModelSource};
use megafuse::{DType, Device, Error};
use place::{MODEL, Place, copy};
use safetensors::{Dtype, SafeTensors};

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

const STEMS: [(Part, &str); 4] = [
    (Part::TextEncoder, "model"),
    (Part::TextEncoder2, "model"),
    (Part::Unet, "diffusion_pytorch_model"),
    (Part::Vae, "diffusion_pytorch_model"),
];

fn directory(model: &Path, part: Part) -> WeightStore {
    let stem = STEMS.iter().find(|(other, _)| *other == part).expect("a stem").1;
    WeightStore::open(&model.join(part.folder()), stem, &Device::cpu(), DType::F32).expect("a model's part")
}

/// The layers that `--weights fp8` holds in 8 bits, by their names in the layout of diffusers.
fn is_product(key: &str) -> bool {
    let ends = ["proj_in", "proj_out", "attn1.to_q", "attn1.to_k", "attn1.to_v", "to_out.0", "attn2.to_q"];
    let module = key.strip_suffix(".weight").unwrap_or("");
    key.contains("attentions.")
        && (ends.iter().any(|end| module.ends_with(end))
            || module.ends_with("ff.net.0.proj")
            || module.ends_with("ff.net.2"))
}

/// Each tensor of a part against `wanted`: in 8 bits it errs by what 3 bits of fraction cost, else by `allowed` of its
/// largest value. How many were in 8 bits.
fn compare(got: &WeightStore, wanted: &WeightStore, unet: bool, allowed: f32, what: &str) -> usize {
    let keys = |store: &WeightStore| store.tensors().map(|(key, _)| key.to_string()).collect::<BTreeSet<_>>();
    assert_eq!(keys(got), keys(wanted), "{what}");
    let list: Vec<(String, Vec<usize>)> =
        wanted.tensors().map(|(key, shape)| (key.to_string(), shape.to_vec())).collect();
    let mut products = 0;
    for (key, shape) in list.iter().filter(|(key, _)| !key.ends_with("position_ids")) {
        let values = |store: &WeightStore| store.root().tensor(key, shape).expect("loads").to_f32_vec().expect("cpu");
        let (got, wanted) = (values(got), values(wanted));
        if unet && is_product(key) {
            products += 1;
            for (got, wanted) in got.chunks(got.len() / shape[0]).zip(wanted.chunks(wanted.len() / shape[0])) {
                let peak = wanted.iter().fold(0f32, |peak, x| peak.max(x.abs()));
                for (got, wanted) in got.iter().zip(wanted) {
                    // Half of a unit of the last place; below 2^-6 of the codes, of 2^-9.
                    let step = (wanted.abs() / 16.0).max(peak / 448.0 / 1024.0) + allowed * peak;
                    assert!((got - wanted).abs() <= 1.001 * step, "{what} {key}: {got} for {wanted} of {peak}");
                }
            }
            assert!(got != wanted, "{what} {key}: as it was");
        } else {
            let peak = wanted.iter().fold(0f32, |peak, x| peak.max(x.abs()));
            for (got, wanted) in got.iter().zip(&wanted) {
                assert!((got - wanted).abs() <= allowed * peak, "{what} {key}: {got} for {wanted}");
            }
        }
    }
    products
}

/// Shards keep their names and the index knows the scales; what is no weight is copied, other formats are not.
#[test]
fn a_directory_keeps_its_layout() {
    let place = Place::new();
    let (model, output) = (place.path("model"), place.path("small"));
    copy(&drawn::folder("sdxl-shards"), &model);
    fs::write(model.join("unet/diffusion_pytorch_model.bin"), "old").unwrap();
    fs::write(model.join("README.md"), "of the model").unwrap();
    let mut named = Vec::new();
    let done =
        pipeline::quantize(&ModelSource::at(&model), &output, &mut |path| named.push(path.to_path_buf())).unwrap();
    assert_eq!(named.len(), 10, "{named:?}");
    assert_eq!(fs::read_to_string(output.join("README.md")).unwrap(), "of the model");
    assert!(!output.join("unet/diffusion_pytorch_model.bin").exists());
    let mut products = 0;
    for (part, _) in STEMS {
        let (got, wanted) = (directory(&output, part), directory(&model, part));
        products += compare(&got, &wanted, part == Part::Unet, 0.0, part.folder());
    }
    assert_eq!((done.weights, done.merged), (products, 0));
    assert!(products > 30 && done.bytes[1] < done.bytes[0], "{products} {:?}", done.bytes);
    let bytes = fs::read(output.join("unet/diffusion_pytorch_model-00002-of-00005.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (key, codes) = file.iter().find(|(_, view)| view.dtype() == Dtype::F8_E4M3).expect("codes");
    let scales = file.tensor(&key.replace(".weight", ".weight_scale")).expect("scales");
    assert_eq!((scales.dtype(), scales.shape()), (Dtype::F32, &[codes.shape()[0], 1][..]));

    // Once more: the same codes, and no second set of scales.
    let again = place.path("again");
    let twice = pipeline::quantize(&ModelSource::at(&output), &again, &mut |_| {}).unwrap();
    assert_eq!((twice.weights, twice.bytes), (products, [done.bytes[1]; 2]));
    let (got, wanted) = (directory(&again, Part::Unet), directory(&output, Part::Unet));
    for (key, shape) in wanted.tensors().filter(|(key, _)| is_product(key)) {
        let values = |store: &WeightStore| store.root().tensor(key, shape).unwrap().to_f32_vec().unwrap();
        for (got, wanted) in values(&got).iter().zip(values(&wanted)) {
            assert!((got - wanted).abs() <= 3e-7 * wanted.abs(), "{key}: {got} for {wanted}");
        }
    }
}

/// What torch.save wrote becomes safetensors, under the names that these have; a shard's index too.
#[test]
fn files_of_torch_become_safetensors() {
    let place = Place::new();
    let (model, output) = (place.path("model"), place.path("small"));
    copy(&data("sd15"), &model);
    for (name, bin) in [
        ("unet/diffusion_pytorch_model", "unet/diffusion_pytorch_model-00001-of-00001"),
        ("text_encoder/model", "text_encoder/pytorch_model"),
        ("vae/diffusion_pytorch_model", "vae/diffusion_pytorch_model"),
    ] {
        let safetensors = model.join(format!("{name}.safetensors"));
        fs::write(model.join(format!("{bin}.bin")), torch_file::of_safetensors(&safetensors)).unwrap();
        fs::remove_file(safetensors).unwrap();
    }
    let wanted = directory(&data("sd15"), Part::Unet);
    let shard = "diffusion_pytorch_model-00001-of-00001.bin";
    let map: serde_json::Map<_, _> = wanted.tensors().map(|(key, _)| (key.to_string(), shard.into())).collect();
    let index = model.join("unet/diffusion_pytorch_model.bin.index.json");
    fs::write(index, serde_json::json!({ "weight_map": map }).to_string()).unwrap();
    let done = pipeline::quantize(&ModelSource::at(&model), &output, &mut |_| {}).unwrap();
    let mut products = 0;
    for part in [Part::TextEncoder, Part::Unet, Part::Vae] {
        let (got, wanted) = (directory(&output, part), directory(&data("sd15"), part));
        assert!(got.paths().all(|path| path.extension().is_some_and(|end| end == "safetensors")), "{part:?}");
        products += compare(&got, &wanted, part == Part::Unet, 0.0, part.folder());
    }
    assert_eq!((done.weights, products > 10), (products, true));
    assert!(output.join("unet/diffusion_pytorch_model.safetensors.index.json").is_file());
    assert!(output.join("text_encoder/model.safetensors").is_file());

    // A whole checkpoint, with what it says of its training.
    let (checkpoint, small) = (place.path("it.ckpt"), place.path("it.safetensors"));
    let stored = data("single-file/sd21.safetensors");
    let configured = ["unet/config.json", "text_encoder/config.json", "vae/config.json"];
    let text = |name: &str| (name.to_string(), fs::read_to_string(data("sd21").join(name)).unwrap());
    fs::write(&checkpoint, torch_file::checkpoint(&stored, 875_000, &configured.map(text))).unwrap();
    pipeline::quantize(&ModelSource::at(&checkpoint), &small, &mut |_| {}).unwrap();
    let (got, wanted) = (SingleFile::open(&small).unwrap(), SingleFile::open(&checkpoint).unwrap());
    let scheduler = |file: &SingleFile| file.config("scheduler/scheduler_config.json").unwrap();
    assert!(scheduler(&got).contains("epsilon") && scheduler(&got) == scheduler(&wanted));
    let store = |file: &SingleFile, part| file.store(part, &Device::cpu(), DType::F32).unwrap();
    for part in [Part::TextEncoder, Part::Unet, Part::Vae] {
        compare(&store(&got, part), &store(&wanted, part), part == Part::Unet, 0.0, part.folder());
    }
}

/// In a directory and in a single file: what the file holds with the LoRA merged (which tests/single_file.rs compares with
/// PyTorch's sums).
#[test]
fn loras_are_merged_before() {
    let place = Place::new();
    let path = data("single-file/lora-kohya.safetensors");
    let single = place.path("single.safetensors");
    with_configurations(&data("single-file/sd15.safetensors"), &data("sd15"), &single);
    for (model, name) in [(single, "small.safetensors"), (data("sd15"), "small")] {
        let output = place.path(name);
        let source = ModelSource::at(&model).with(vec![Lora { path: path.clone(), weight: 0.7 }], Vec::new(), None);
        let done = pipeline::quantize(&source, &output, &mut |_| {}).unwrap();
        assert!(done.merged > 0 && done.weights > 10 && done.warnings.is_empty(), "{done:?}");
        for part in [Part::TextEncoder, Part::Unet, Part::Vae] {
            let store = |model: &Path| match model.is_dir() {
                true => directory(model, part),
                false => SingleFile::open(model).unwrap().store(part, &Device::cpu(), DType::F32).unwrap(),
            };
            let adapters = Adapters::open(&[(path.clone(), 0.7)]).unwrap();
            let wanted = store(&model).with_adapters(part, &adapters).unwrap();
            // A file of f16 rounds what is merged.
            compare(&store(&output), &wanted, part == Part::Unet, 5e-4, &format!("{name} {}", part.folder()));
        }
    }
}

/// A single file that carries its small model's configurations; those of the family are of the published size.
fn with_configurations(file: &Path, model: &Path, to: &Path) {
    let bytes = fs::read(file).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let names = ["unet/config.json", "text_encoder/config.json", "vae/config.json"];
    let text = |name: &str| (name.to_string(), fs::read_to_string(model.join(name)).unwrap());
    safetensors::serialize_to_file(tensors.tensors(), Some(names.map(text).into()), to).unwrap();
}

/// The program, from the file to the picture and from the picture to its command.
#[test]
fn pictures_come_out_of_8_bits() {
    let place = Place::new();
    let said = place.ok(&["quantize", "--model", MODEL, "--out", "small"]);
    assert_eq!(said.trim(), "small");
    let generate = |model: &str, out: &str, further: &[&str]| {
        let base = ["generate", "a photo of a cat", "--model", model, "--stages", "16x16:2,24x24:1", "--device", "cpu"];
        place.ok(&[&base[..], &["--out", out], further].concat());
        pixels(&place.path(out))
    };
    let plain = generate(MODEL, "plain.png", &[]);
    let rounded = generate(MODEL, "rounded.png", &["--weights", "fp8"]);
    let small = generate("small", "small.png", &["--weights", "fp8"]);
    let worst = |a: &[u8], b: &[u8]| a.iter().zip(b).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
    assert!(worst(&rounded, &small) <= 1, "the same codes, {}", worst(&rounded, &small));
    assert!(plain != rounded, "--weights fp8 changes what is computed");
    place.ok(&["generate", "--from", "rounded.png", "--model", MODEL, "--device", "cpu", "--out", "again.png"]);
    assert_eq!(pixels(&place.path("again.png")), rounded);
    // As it is: the rounded values in f32.
    generate("small", "dequantised.png", &[]);
}

/// Of each weight in 8 bits its codes and an f32 per row.
#[test]
fn plan_counts_the_bytes_of_8_bits() {
    let store = directory(Path::new(MODEL), Part::Unet);
    let bytes = |(key, shape): (&str, &[usize])| {
        let values: usize = shape.iter().product();
        if is_product(key) { values + 4 * shape[0] } else { 2 * values }
    };
    let expected: usize = store.tensors().map(bytes).sum();
    let place = Place::new();
    let json = place.ok(&["plan", "x", "--model", MODEL, "--dtype", "bf16", "--weights", "fp8", "--json"]);
    let report: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    let weights = report["weights"].as_array().expect("parts");
    let unet = weights.iter().find(|part| part["module"] == "unet").expect("a UNet");
    assert_eq!(unet["bytes"], expected);
}

fn pixels(path: &Path) -> Vec<u8> {
    let mut reader = png::Decoder::new(std::io::BufReader::new(fs::File::open(path).unwrap())).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    reader.next_frame(&mut pixels).unwrap();
    pixels
}

#[test]
fn mistakes_are_named_and_leave_nothing() {
    let place = Place::new();
    fs::create_dir(place.path("there")).unwrap();
    let fails = |args: &[&str], expected: &str| {
        let message = place.fails(1, &[&["quantize"], args].concat());
        assert!(message.contains(expected), "{message} does not contain {expected}");
    };
    fails(&["--model", MODEL, "--out", "there"], "there: exists already: give another name, or remove it");
    fails(&["--model", "nowhere", "--out", "x"], "nowhere: no such directory");
    let file = data("single-file/sd15.safetensors");
    let file = file.to_str().unwrap();
    fails(&["--model", file, "--out", "x"], "is written as safetensors: give a name that ends in .safetensors");
    // A LoRA for another family: found out at the end, when the files are written.
    let lora = data("single-file/lora-sdxl.safetensors");
    fails(&["--model", MODEL, "--lora", lora.to_str().unwrap(), "--out", "x"], "lora-sdxl");
    // A weight that is not finite.
    copy(Path::new(MODEL), &place.path("broken"));
    let path = place.path("broken/unet/diffusion_pytorch_model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let (start, key) = {
        let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        let tensors = metadata.tensors();
        let (key, info) = tensors.iter().find(|(key, _)| is_product(key)).unwrap();
        (8 + header + info.data_offsets.0, key.clone())
    };
    bytes[start..start + 4].fill(0xff);
    fs::write(&path, &bytes).unwrap();
    fails(&["--model", "broken", "--out", "x"], &key);
    let error = pipeline::quantize(&ModelSource::Embedded, &place.path("x"), &mut |_| {}).unwrap_err();
    assert!(matches!(error, Error::Config { .. }), "{error}");
    let vae =
        ModelSource::at(Path::new(MODEL)).with(Vec::new(), Vec::new(), Some(data("single-file/sd15.safetensors")));
    assert!(pipeline::quantize(&vae, &place.path("x"), &mut |_| {}).unwrap_err().to_string().contains("VAE"));
}
