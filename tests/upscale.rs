//! Pictures enlarged by a network: from files and at the end of a run, what they say of themselves, and what is counted.

#[path = "common/emulated.rs"]
mod emulated;
#[path = "common/place.rs"]
mod place;

use std::fs;
use std::path::{Path, PathBuf};

use megafuse::image::{PngText, encode_png, read_image, read_png_text};
use megafuse::models::{RrdbNet, RrdbNetConfig, Tiling, WeightStore};
use megafuse::pipeline::{Observer, Silent, Size, UpscaleOptions, Upscaler};
use megafuse::runtime::{CudaDevice, CudaOptions};
use megafuse::{DType, Device, Error, Tensor};
use safetensors::SafeTensors;
use serde_json::Value;

use emulated::Emulated;
use place::{MODEL, Place};

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/rrdbnet").join(path)
}

fn network(file: &str) -> String {
    data(file).display().to_string()
}

fn upscaler(file: &str, tiling: Tiling) -> Upscaler {
    Upscaler::open(&UpscaleOptions { file: data(file), dtype: DType::F32, tiling }, &Device::cpu()).expect("opens")
}

/// torch's bytes for a size that the network cannot read: continued by reflection, then cut.
#[test]
fn a_picture_of_odd_size_is_torchs() {
    let bytes = fs::read(data("values.safetensors")).expect("values.safetensors");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let [picture, want] = ["odd.picture", "odd.out"].map(|key| file.tensor(key).expect("stored"));
    let &[height, width, 3] = picture.shape() else { panic!("{:?}", picture.shape()) };
    for tiling in [Tiling::Automatic, Tiling::Whole, Tiling::Stripes(3)] {
        let upscaler = upscaler("x2-bsrgan.safetensors", tiling);
        let got = upscaler.upscale(Size::new(width, height), picture.data(), &mut Silent).expect("runs");
        assert_eq!(got.len(), want.data().len());
        // f32 may fall to the other side of a half.
        let off = got.iter().zip(want.data()).filter(|(got, want)| got != want);
        let off: Vec<u8> = off.map(|(got, want)| got.abs_diff(*want)).collect();
        assert!(off.len() <= 1 && off.iter().all(|&off| off == 1), "{tiling:?}: {off:?}");
    }
}

#[test]
fn what_cannot_be_enlarged_is_refused() {
    let upscaler = upscaler("x4.pth", Tiling::Stripes(0));
    let error = |size, rgb: &[u8]| upscaler.upscale(size, rgb, &mut Silent).expect_err("an error").to_string();
    assert!(error(Size::new(2, 0), &[]).contains("at least 1x1"));
    assert!(error(Size::new(2, 1), &[0; 5]).contains("6 bytes for 2x1"));
    assert!(error(Size::new(2, 1), &[0; 6]).contains("rows of a stripe"));
    struct Cancelled;
    impl Observer for Cancelled {
        fn cancelled(&self) -> bool {
            true
        }
    }
    let upscaler = self::upscaler("x4.pth", Tiling::Automatic);
    let ended = upscaler.upscale(Size::new(1, 1), &[0; 3], &mut Cancelled);
    assert!(matches!(ended, Err(Error::Interrupted)));
}

const RUN: [&str; 9] =
    ["generate", "a cat", "--method", "plain", "--stages", "16x16:2", "--seed", "3", "--upscale-dtype"];

#[test]
fn a_run_that_enlarges_gives_the_bytes_of_the_picture_enlarged() {
    let place = Place::with(&["--device", "cpu"]);
    let x4 = network("x4.pth");
    let upscaled = [&RUN[..], &["f32", "--model", MODEL, "--upscale-model", &x4]].concat();
    place.ok(&[&upscaled[..], &["--out", "large.png"]].concat());
    place.ok(&[&RUN[..8], &["--model", MODEL, "--out", "small.png"]].concat());
    let out = place.ok(&["upscale", "small.png", "--model", &x4]);
    assert_eq!(out.trim(), "small-x4.png");
    let [large, from_file] =
        ["large.png", "small-x4.png"].map(|name| read_image(&place.path(name)).expect("a picture"));
    assert_eq!((large.0, large.1), (64, 64));
    assert!(large == from_file, "other bytes");
    // Both say how they were made, and say the same; a1111's words for it in the text for galleries.
    let [of_large, of_file] = ["large.png", "small-x4.png"].map(|name| {
        let of = |key| read_png_text(&place.path(name), key).expect("readable").expect("a text");
        let json: Value = serde_json::from_str(&of("megafuse")).expect("JSON");
        (of("parameters"), json)
    });
    assert_eq!(of_large.1, of_file.1);
    assert_eq!((&of_large.1["upscale_model"], &of_large.1["upscale_dtype"]), (&"x4".into(), &"f32".into()));
    for parameters in [&of_large.0, &of_file.0] {
        assert!(parameters.contains("Postprocess upscale by: 4, Postprocess upscaler: x4"), "{parameters}");
    }
    // And are made again: with the network named, else it is asked for.
    let again = ["generate", "--from", "small-x4.png", "--model", MODEL, "--out", "again.png"];
    let message = place.fails(1, &again);
    assert!(message.contains("--upscale-model x4.pth"), "{message}");
    place.ok(&[&again[..], &["--upscale-model", &x4]].concat());
    assert!(place.bytes("again.png") == place.bytes("large.png"), "another file");
    // Stripes are the same picture, and a default name replaces nothing.
    let out = place.ok(&["upscale", "small.png", "--model", &x4, "--tile", "5"]);
    assert_eq!(out.trim(), "small-x4-2.png");
    assert!(place.bytes("small-x4-2.png") == place.bytes("small-x4.png"), "another file");
}

#[test]
fn several_pictures_go_into_a_folder() {
    let place = Place::with(&["--device", "cpu"]);
    let x2 = network("x2-esrgan.pth");
    for (name, width) in [("a.png", 3), ("b.png", 4)] {
        let rgb: Vec<u8> = (0..width * 2 * 3).map(|i| i as u8 * 10).collect();
        fs::write(place.path(name), encode_png(&rgb, width, 2, PngText::default()).expect("encoded")).expect("written");
    }
    let out = place.ok(&["upscale", "a.png", "b.png", "--model", &x2, "-o", "large/"]);
    assert_eq!(out.lines().collect::<Vec<_>>(), ["large/a-x2.png", "large/b-x2.png"]);
    assert_eq!(read_image(&place.path("large/b-x2.png")).map(|(width, height, _)| (width, height)).ok(), Some((8, 4)));
    // A picture that says nothing of how it was made does not afterwards.
    assert_eq!(read_png_text(&place.path("large/a-x2.png"), "parameters").expect("readable"), None);
    let fails = |status, args: &[&str], words: &[&str]| {
        let message = place.fails(status, &[&["upscale"], args].concat());
        words.iter().for_each(|word| assert!(message.contains(word), "{word:?} is not in: {message}"));
    };
    fails(2, &["a.png", "b.png", "--model", &x2, "--out", "c.png"], &["--out", "one file for 2 pictures"]);
    fails(2, &["a.png", "--model", &x2, "--out", "c.jpg"], &["--out", ".png"]);
    fails(1, &["a.png", "none.png", "--model", &x2], &["none.png"]);
    fails(1, &["a.png", "--model", "a.png"], &["a.png", "safetensors"]);
    let vae = format!("{MODEL}/vae/diffusion_pytorch_model.safetensors");
    fails(1, &["a.png", "--model", &vae], &["a part of a diffusion model", "RRDBNet"]);
    let message = place.fails(2, &["generate", "a cat", "--model", MODEL, "--upscale-tile", "64"]);
    assert!(message.contains("--upscale-model"), "{message}");
    let message = place.fails(1, &["generate", "a cat", "--model", MODEL, "--upscale-model", "none.pth"]);
    assert!(message.contains("none.pth"), "{message}");
}

#[test]
fn a_folder_of_pictures_keeps_its_upscaler() {
    let place = Place::with(&["--device", "cpu"]);
    fs::write(place.path("lines.jsonl"), "{\"prompt\": \"a cat\"}\n").expect("written");
    let args = ["generate", "--manifest", "lines.jsonl", "--out", "pictures", "--model", MODEL, "--method", "plain"];
    let [x4, x2] = ["x4.pth", "x2-esrgan.pth"].map(network);
    let with =
        |file, more: &[&'static str]| [&args[..], &["--stages", "16x16:1", "--upscale-model", file], more].concat();
    place.ok(&with(x4.as_str(), &[]));
    let (width, height, _) = read_image(&place.path("pictures/000001.png")).expect("a picture");
    assert_eq!((width, height), (64, 64));
    let message = place.fails(1, &with(x2.as_str(), &["--resume"]));
    assert!(message.contains("upscale_model") && message.contains("x2-esrgan"), "{message}");
}

/// One phase per picture, with the weights counted.
#[test]
fn plan_counts_the_network() {
    let place = Place::new();
    let args = ["plan", "a cat", "--model", MODEL, "--method", "plain", "--stages", "16x16:2", "--json"];
    let plan = |more: &[&str]| -> Value { serde_json::from_str(&place.ok(&[&args[..], more].concat())).expect("JSON") };
    let (without, with) = (plan(&[]), plan(&["--upscale-model", &network("x4.pth")]));
    let phases = with["phases"].as_array().expect("phases");
    let (last, others) = phases.split_last().expect("phases");
    assert_eq!(others.len(), without["phases"].as_array().expect("phases").len());
    assert_eq!((&last["name"], &last["size"]), (&"upscale".into(), &"64x64".into()));
    // The textbook count: K per output value, at 16x16 but for the doublings, the last convolution and the one before.
    let dense = 9 * ((16 + 24 + 32 + 40) * 8 + 48 * 16);
    let macs = 256 * (27 * 16 + 6 * dense + 9 * 256) + 1024 * 9 * 256 + 4096 * (9 * 256 + 9 * 256 + 9 * 48);
    assert_eq!(last["once"]["macs"], macs);
    let bytes = |plan: &Value| plan["weight_bytes"].as_u64().expect("bytes");
    let parameters = RrdbNet::open(&data("x4.pth"), &Device::meta(), DType::F32).expect("opens").0.parameters();
    assert_eq!(bytes(&with) - bytes(&without), 4 * parameters);
    assert!(with["total"]["macs"].as_u64() > without["total"]["macs"].as_u64());
}

/// A card launches what was counted; in f16 twice the edges have sums of weights made before on some cards.
#[test]
fn counted_launches_are_those_of_a_card() {
    let emulated = Emulated::open();
    let card = Device::Cuda(CudaDevice::open(CudaOptions::default()).expect("the emulated card"));
    let meta = Device::meta();
    let Device::Meta(record) = &meta else { unreachable!() };
    for (file, dtype) in [("x4.pth", DType::F16), ("x2-bsrgan.safetensors", DType::F32)] {
        let launched = |device: &Device| {
            let (net, _) = RrdbNet::open(&data(file), device, dtype).expect("opens");
            let picture = Tensor::zeros(device, &[1, 8, 12, 3], dtype).expect("a picture");
            record.take_report();
            let before: u64 = emulated.call("emu_single_launch_count");
            net.forward_rows(&picture, Tiling::Automatic, &mut |_| Ok(())).expect("runs");
            let after: u64 = emulated.call("emu_single_launch_count");
            (record.take_report().total().launches, after - before)
        };
        let ((counted, _), (_, launched)) = (launched(&meta), launched(&card));
        assert_eq!(counted, launched, "{file} {dtype}");
    }
}

#[test]
fn a_published_networks_cost_is_counted_in_stripes_too() {
    let meta = Device::meta();
    let Device::Meta(record) = &meta else { unreachable!() };
    let mut store = WeightStore::meta(&meta, DType::F16);
    let net = RrdbNet::load(&mut store, &RrdbNetConfig::X4).expect("loads");
    let picture = Tensor::zeros(&meta, &[1, 1024, 1024, 3], DType::F16).expect("a picture");
    let macs = |tiling| {
        record.take_report();
        net.forward_rows(&picture, tiling, &mut |_| Ok(())).expect("runs");
        record.take_report().total().macs as f64 / 1e12
    };
    let [whole, automatic, stripes] = [Tiling::Whole, Tiling::Automatic, Tiling::Stripes(256)].map(macs);
    // Some 17 million multiplications per pixel, and a few rows of the enlarged maps again at each stripe's edges.
    assert!((17.0..19.5).contains(&whole), "{whole}");
    assert!(
        automatic < 1.03 * whole && stripes > 1.5 * whole && stripes < 3.0 * whole,
        "{whole} {automatic} {stripes}"
    );
}
