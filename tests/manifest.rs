//! With the published configurations the models ask for exactly the published checkpoints' keys and shapes.
//! `tests/data/manifest` is written by tools/oracle/manifest.py from the published classes.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::PathBuf;

use megafuse::models::{ClipTextConfig, ClipTextModel, Unet, UnetConfig, Vae, VaeConfig, WeightStore, Weights};
use megafuse::{DType, Device, Result};

fn read(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/manifest").join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn unpacked(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/manifest").join(name);
    let mut text = String::new();
    flate2::read::GzDecoder::new(fs::File::open(&path).expect(name)).read_to_string(&mut text).expect(name);
    text
}

/// The lists of IF's stages are whole: `tensors` of `parameters`.
#[test]
fn lists_of_deepfloyd_if() {
    for (name, total, tensors) in [
        ("if-i-xl-unet", 4_304_695_110, 775),
        ("if-i-l-unet", 935_365_830, 775),
        ("if-i-m-unet", 371_605_830, 775),
        ("if-ii-l-unet", 1_243_277_190, 939),
    ] {
        let keys = published(name);
        assert_eq!((parameters(&keys), keys.len()), (total, tensors), "{name}");
    }
}

/// Lines `path name shape name shape ...`, or the list that tools/oracle/clip.py writes.
fn published(name: &str) -> BTreeMap<String, Vec<usize>> {
    if name.starts_with("text_encoder_") {
        let list: serde_json::Value = serde_json::from_str(&read(&format!("{name}.json"))).expect(name);
        return serde_json::from_value::<Vec<_>>(list["tensors"].clone()).expect(name).into_iter().collect();
    }
    let mut keys = BTreeMap::new();
    let text = if name.starts_with("if-") { unpacked(&format!("{name}.txt.gz")) } else { read(&format!("{name}.txt")) };
    for line in text.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        for tensor in words[1..].chunks(2) {
            let shape = tensor[1].split('x').map(|d| d.parse().expect("a dimension")).collect();
            keys.insert(format!("{}.{}", words[0], tensor[0]), shape);
        }
    }
    keys
}

fn parameters(keys: &BTreeMap<String, Vec<usize>>) -> usize {
    keys.values().map(|shape| shape.iter().product::<usize>()).sum()
}

/// The two lists are one, with `total` parameters in `tensors` tensors; loading allocated no more than those.
fn check(name: &str, total: usize, tensors: Option<usize>, load: impl Fn(&Weights, &str) -> Result<()>) {
    check_with(name, name, total, tensors, load);
}

/// As [`check`], with the list of another model, which has the same tensors.
fn check_with(
    name: &str,
    list: &str,
    total: usize,
    tensors: Option<usize>,
    load: impl Fn(&Weights, &str) -> Result<()>,
) {
    let device = Device::meta();
    let store = WeightStore::meta(&device, DType::F16);
    load(&store.root(), &read(&format!("{name}.json"))).expect(name);
    let asked: BTreeMap<String, Vec<usize>> = store.manifest().into_iter().collect();
    let published = published(list);
    for (key, shape) in &published {
        assert_eq!(asked.get(key), Some(shape), "{name}: {key}");
    }
    for key in asked.keys() {
        assert!(published.contains_key(key), "{name}: {key} is not in the published file");
    }
    assert_eq!(parameters(&asked), total, "{name}");
    tensors.into_iter().for_each(|tensors| assert_eq!(asked.len(), tensors, "{name}"));
    let Device::Meta(meta) = &device else { unreachable!() };
    // A text encoder holds a row of zeros beside its weights.
    let peak = meta.take_report().peak_bytes - 2 * total as u64;
    assert!(peak <= if name.contains("-text") { 2 * 1280 } else { 0 }, "{name}: {peak} bytes more than the weights");
}

fn unet(w: &Weights, json: &str) -> Result<()> {
    Unet::from_weights(w, &UnetConfig::from_json("unet/config.json", json)?).map(drop)
}

fn vae(w: &Weights, json: &str) -> Result<()> {
    Vae::from_weights(w, &VaeConfig::from_json("vae/config.json", json)?).map(drop)
}

fn text(w: &Weights, json: &str) -> Result<()> {
    ClipTextModel::from_weights(w, &ClipTextConfig::from_json("text_encoder/config.json", json)?).map(drop)
}

#[test]
fn sd15() {
    check("sd15-text", 123_060_480, Some(196), text);
    check("sd15-unet", 859_520_964, Some(686), unet);
    check("sd15-vae", 83_653_863, Some(248), vae);
}

#[test]
fn sdxl() {
    check("sdxl-unet", 2_567_463_684, Some(1680), unet);
    check_with("sdxl-text", "sd15-text", 123_060_480, Some(196), text);
    check_with("sdxl-text-2", "text_encoder_sdxl2", 694_659_840, Some(517), text);
    check_with("sdxl-vae", "sd15-vae", 83_653_863, Some(248), vae);
}

#[test]
fn sd21() {
    check("sd21-text", 340_387_840, Some(372), text);
    check("sd21-unet", 865_910_724, Some(686), unet);
    check("sd21-vae", 83_653_863, Some(248), vae);
}
