//! Text encoders elsewhere than the network, and a number of T5's tokens where there is no T5.

mod common;
#[path = "common/place.rs"]
mod place;

use std::path::{Path, PathBuf};

use common::cards;
use megafuse::methods::MegaFusion;
use megafuse::pipeline::{LoadOptions, ModelSource, Pipeline, Planner, Request, Silent, TextOptions};
use megafuse::{DType, Device};
use place::{MODEL, Place};

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(path)
}

fn request() -> Request {
    Request {
        prompt: "a photo of a cat".into(),
        method: MegaFusion::plus().into(),
        stages: vec!["16x16:2".parse().unwrap(), "24x20:1".parse().unwrap()],
        seed: 5,
        ..Request::default()
    }
}

/// What the text encoders say is computed on the host and copied: the same picture but for rounding, and a plan of the card counts
/// none of their memory.
#[test]
fn text_encoders_may_stay_on_the_host() {
    for card in cards() {
        for model in ["sd15", "sdxl"] {
            let source = ModelSource::Directory(common::drawn::folder(model));
            let with = |text_device| LoadOptions { text_device, ..LoadOptions::new(card.clone(), DType::F32) };
            let made = |text_device| {
                let pipeline = Pipeline::load_with(source.clone(), with(text_device)).unwrap();
                pipeline.generate(&request(), &mut Silent).unwrap().remove(0)
            };
            let (on_card, on_host) = (made(None), made(Some(Device::cpu())));
            let off = on_card.rgb.iter().zip(&on_host.rgb).map(|(a, b)| a.abs_diff(*b)).max();
            assert!(off <= Some(1), "{model} on {card}: {off:?}");
            assert_eq!(on_host.parameters.json["text_encoder_device"], "cpu");
            assert!(on_card.parameters.json.get("text_encoder_device").is_none());

            let plan = |text_device| {
                let planner = Planner::with(&source, &with(text_device)).unwrap();
                let text: u64 =
                    planner.pipeline().weights().iter().filter(|w| w.module.starts_with("text")).map(|w| w.bytes).sum();
                (planner.plan(&request()).unwrap(), text)
            };
            let ((all, text), (without, _)) = (plan(None), plan(Some(Device::cpu())));
            // Beside its weights an encoder has a few zeros.
            let saved = all.peak_bytes - without.peak_bytes;
            assert!((text..text + 1024).contains(&saved), "{model}: {saved} bytes of {text}");
        }
    }
}

#[test]
fn a_number_of_t5_tokens_without_t5_is_refused() {
    let pipeline = Pipeline::load(ModelSource::Directory(data("sd15")), Device::meta(), DType::F32).unwrap();
    let text = TextOptions { t5_length: Some(77), ..TextOptions::default() };
    let error = pipeline.resolve(&Request { text, ..request() }).map(drop).unwrap_err().to_string();
    assert!(error.starts_with("text.t5_length 77: ") && error.contains("no T5 text encoder"), "{error}");
}

#[test]
fn both_are_flags() {
    let place = Place::new();
    let run = ["generate", "a cat", "--model", MODEL, "--stages", "16x16:1", "--method", "plain"];
    let with = |further: &[&'static str]| [&run[..], further].concat();
    let refused = place.fails(2, &with(&["--t5-length", "77"]));
    assert!(refused.contains("--t5-length 77: has no effect with sd15"), "{refused}");
    let refused = place.fails(2, &with(&["--t5-length", "1"]));
    assert!(refused.contains("from 2 to 512"), "{refused}");
    place.ok(&with(&["--device", "emu", "--text-encoder-device", "cpu", "--out", "a.png"]));
    let again = place.run(&["generate", "--from", "a.png", "--device", "emu", "--model", MODEL, "--out", "b.png"]);
    assert!(again.status.success() && !place::text(&again.stderr).contains("text_encoder_device"), "{again:?}");
    let [a, b] = ["a.png", "b.png"].map(|name| std::fs::read(place.path(name)).unwrap());
    assert!(a == b, "--from takes the flag over");
}
