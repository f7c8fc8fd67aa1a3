//! `--from PICTURE.png`: a picture from its own text, and what stands beside it on the command line.

#[path = "common/drawn.rs"]
mod drawn;
#[path = "common/place.rs"]
mod place;

use std::fs;
use std::path::{Path, PathBuf};

use megafuse::image::{PngText, encode_png, read_png_text};
use megafuse::pipeline::METHODS;
use place::{MODEL, Place, text};
use serde_json::Value;
use sha2::{Digest, Sha256};

fn data(name: &str) -> PathBuf {
    Path::new(MODEL).parent().unwrap().join(name)
}

/// What a picture says of itself.
fn said(place: &Place, name: &str) -> Value {
    serde_json::from_str(&read_png_text(&place.path(name), "megafuse").unwrap().expect(name)).unwrap()
}

/// A picture of one grey pixel with these texts.
fn write(place: &Place, name: &str, parameters: &str, json: &str) {
    fs::write(place.path(name), encode_png(&[9, 9, 9], 1, 1, PngText { parameters, json }).unwrap()).unwrap();
}

/// Standard error of a run that must succeed.
fn told(place: &Place, args: &[&str]) -> String {
    let output = place.run(args);
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    text(&output.stderr)
}

#[test]
fn a_picture_makes_itself_again() {
    let sdxl = drawn::folder("sdxl-encoded-negative");
    let (lora, word) = (data("single-file/lora-kohya.safetensors"), data("prompts/sd15/toy.safetensors"));
    let [sdxl, lora, word] = [sdxl.to_str().unwrap(), lora.to_str().unwrap(), word.to_str().unwrap()];
    let weighed = format!("{lora}:0.7");
    let files = ["--model", MODEL, "--lora", &weighed, "--embedding", word];
    // What makes the picture, and what is named again beside it.
    let cases: [(&[&str], &[&str]); 9] = [
        (&["--method", "plain", "--size", "48x32", "--steps", "3", "--seed", "11"], &["--model", MODEL]),
        (
            &[
                "--stages",
                "32x32:2,48x48:1,64x48:1",
                "--method",
                "megafusion",
                "--upsampler",
                "bicubic-edge",
                "--dilation",
                "2",
                "--relay-clamp",
                "none",
                "--reschedule",
                "true",
                "--gamma",
                "1.7",
                "--relay-noise-offset",
                "-1",
                "--guidance",
                "3.3",
                "--guidance-rescale",
                "0.7",
                "--negative=-a \"dog\", \n é",
                "--seed",
                "18446744073709551615",
            ],
            &["--model", MODEL],
        ),
        (
            &[
                "--size",
                "64x64",
                "--steps",
                "4",
                "--method",
                "megafusion++",
                "--reference-compat",
                "--rng",
                "torch-cuda",
                "--eta",
                "0.3",
                "--clip-skip",
                "2",
                "--prompt-syntax",
                "a1111",
                "--long-prompt",
                "chunk",
            ],
            &["--model", MODEL],
        ),
        (
            &[
                "--method",
                "plain",
                "--size",
                "32x32",
                "--steps",
                "4",
                "--scheduler",
                "dpm++-2m-sde",
                "--sigmas",
                "karras",
            ],
            &["--model", MODEL],
        ),
        (&["--method", "plain", "--size", "32x32", "--steps", "2", "--dtype", "bf16"], &["--model", MODEL]),
        (
            &[
                "--method",
                "plain",
                "--size",
                "16x16",
                "--steps",
                "8",
                "--cache",
                "ucache",
                "--cache-options",
                "threshold=2,reset=0",
            ],
            &["--model", MODEL],
        ),
        (&["--method", "plain", "--size", "32x32", "--steps", "2"], &files),
        (
            &[
                "--size",
                "64x64",
                "--steps",
                "3",
                "--original-size",
                "100x70",
                "--crop",
                "3,5",
                "--target-size",
                "64x32",
            ],
            &["--model", sdxl],
        ),
        // The model inside the program needs no name.
        (&["--stages", "64x64:2,96x64:1", "--scheduler", "euler"], &[]),
    ];
    for (made, named) in cases {
        let place = Place::with(&["--device", "cpu"]);
        place.ok(&[&["generate", "a (toy:1.2) photo of a cat", "--out", "a.png"], made, named].concat());
        let heard = told(&place, &[&["generate", "--from", "a.png", "--out", "b.png"], named].concat());
        assert!(!heard.contains("warning: a.png"), "{made:?}: {heard}");
        assert!(
            place.bytes("a.png") == place.bytes("b.png"),
            "{made:?}: {} {}",
            said(&place, "a.png"),
            said(&place, "b.png")
        );
    }
}

/// Options of every kind: numbers, lists of them, switches; stages that were planned and stages that were named.
#[test]
fn every_method_makes_its_picture_again() {
    let cases = [
        "plain --size 64x64 --steps 2",
        "megafusion --stages 64x64:2,96x64:1 --relay-noise-offset -1",
        "megafusion++ --size 96x96 --steps 3 --gamma 1.5",
        "hidiffusion --size 96x64 --steps 3 --t1 0.7 --aggressive false --windows false",
        "scalecrafter --size 96x64 --steps 2 --redilate D1=2,M=1.5 --redilate-steps 1 --disperse D1 --freeu none",
        "fouriscale --size 96x64 --steps 3 --fourier M,U0 --fourier-stop 2 --fourier-dilation 2.5 --fourier-floor 0.3 --amplified-guidance",
        "hires-fix --size 96x64 --steps 4 --denoise 0.6 --enlarge latents --upsampler bilinear",
        "hires-fix --stages 64x64:4,96x64:2",
        "multidiffusion --size 96x64 --steps 2 --stride 8 --view-batch 3 --circular",
        "demofusion --size 128x64 --steps 2 --cosine 2,1.5,1 --sigma 0.7 --stride 6 --view-batch 3",
        "diffusehigh --size 96x64 --steps 3 --refine-guidance 4 --wavelet-steps 0 --sharpen false",
        "upsample-guidance --size 128x96 --steps 2 --up-scale 2 --up-theta 0.8 --up-share 0.5",
        "pixelrush --size 128x96 --steps 2 --refine-timestep 300 --inject-noise 0.4 --stride 10 --view-batch 3 --upsampler bilinear",
        "frecas --size 128x64 --steps 4 --frecas-ends 300 --frecas-gamma 2.5 --map-reuse 0.3 --frecas-upsampler bilinear --guidance-high 5",
        "scalediff --size 128x64 --steps 4 --restart-ratio 0.3 --low-pass 0.25",
    ];
    for spec in METHODS {
        assert!(cases.iter().any(|case| case.split(' ').next() == Some(spec.name)), "{} has no case", spec.name);
    }
    for case in cases {
        let place = Place::with(&["--device", "cpu"]);
        let made: Vec<&str> =
            ["generate", "a red ball", "--out", "a.png", "--method"].into_iter().chain(case.split(' ')).collect();
        place.ok(&made);
        let heard = told(&place, &["generate", "--from", "a.png", "--out", "b.png"]);
        assert!(!heard.contains("warning: a.png"), "{case}: {heard}");
        assert!(place.bytes("a.png") == place.bytes("b.png"), "{case}: {}", said(&place, "b.png"));
    }
}

/// Of SDXL the empty prompt and no prompt are two things.
#[test]
fn an_empty_negative_prompt_is_remembered() {
    let sdxl = drawn::folder("sdxl");
    let place = Place::with(&["--device", "cpu", "--method", "plain", "--size", "32x32", "--steps", "1"]);
    let make = |args: &[&str]| place.ok(&[&["generate", "--model", sdxl.to_str().unwrap()], args].concat());
    make(&["a cat", "--out", "none.png"]);
    make(&["a cat", "--negative", "", "--out", "empty.png"]);
    make(&["--from", "none.png", "--out", "none2.png"]);
    make(&["--from", "empty.png", "--out", "empty2.png"]);
    assert!(
        place.bytes("none.png") == place.bytes("none2.png") && place.bytes("empty.png") == place.bytes("empty2.png")
    );
    let pixels = |name: &str| megafuse::image::read_image(&place.path(name)).unwrap();
    assert_ne!(pixels("none.png"), pixels("empty.png"), "else the test shows nothing");
}

#[test]
fn flags_stand_in_place_of_what_the_picture_says() {
    let place = Place::with(&["--device", "cpu", "--model", MODEL]);
    let base = [
        "generate",
        "a cat",
        "--method",
        "megafusion",
        "--stages",
        "32x32:2,48x48:1",
        "--seed",
        "3",
        "--negative",
        "a dog",
        "--upsampler",
        "bilinear",
        "--scheduler",
        "euler",
        "--sigmas",
        "karras",
        "--guidance-rescale",
        "0.5",
        "--out",
        "a.png",
    ];
    place.ok(&base);
    let with = |args: &[&str]| {
        place.ok(&[&["generate", "--from", "a.png", "--out", "b.png"], args].concat());
        said(&place, "b.png")
    };
    let json = with(&["--seed", "5"]);
    assert_eq!((&json["seed"], &json["prompt"], &json["stages"][1]), (&5.into(), &"a cat".into(), &"48x48:1".into()));
    assert_eq!(with(&["a -dog"])["prompt"], "a -dog");
    let json = with(&["--size", "64x32"]);
    assert_eq!((&json["size"], &json["steps"], &json["upsampler"]), (&"64x32".into(), &3.into(), &"bilinear".into()));
    let json = with(&["--steps", "5"]);
    assert_eq!((&json["size"], &json["steps"]), (&"48x48".into(), &5.into()));
    let json = with(&["--stages", "32x32:1,64x64:1"]);
    assert_eq!((&json["size"], &json["steps"]), (&"64x64".into(), &2.into()));
    // What was chosen goes over to another method, what the first one does by itself does not.
    let json = with(&["--method", "megafusion++"]);
    assert_eq!(
        (&json["upsampler"], &json["reschedule"], &json["dilation"]),
        (&"bilinear".into(), &true.into(), &2.into())
    );
    let json = with(&["--method", "plain"]);
    assert_eq!((&json["stages"][0], &json["upsampler"]), (&"48x48:3".into(), &Value::Null));
    let json = with(&["--guidance", "1"]);
    assert_eq!((&json["guidance"], &json["negative_prompt"]), (&1.0.into(), &"".into()));
    assert_eq!((&json["guidance_rescale"], &with(&[])["guidance_rescale"]), (&Value::Null, &0.5.into()));
    let json = with(&["--scheduler", "ddim", "--eta", "0.5"]);
    assert_eq!((&json["scheduler"], &json["sigmas"], &json["eta"]), (&"ddim".into(), &"uniform".into(), &0.5.into()));
    assert_eq!(with(&["--dtype", "f16"])["dtype"], "f16");
    place.ok(&["generate", "--from", "a.png", "--count", "2", "--out", "n.png"]);
    assert_eq!((&said(&place, "n-1.png")["seed"], &said(&place, "n-2.png")["seed"]), (&3.into(), &4.into()));
    let plan = place.ok(&["plan", "--from", "a.png"]);
    assert!(plan.contains("megafusion, stages 32x32:2 48x48:1"), "{plan}");
}

/// A picture of a model of the hub names it.
#[test]
fn a_model_of_the_hub_is_found_again() {
    let place = Place::with(&["--device", "cpu"]);
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let folder = place.path("hf/hub/models--acme--tiny");
    for part in ["tokenizer", "text_encoder", "unet", "vae", "scheduler"] {
        let to = folder.join("snapshots").join(commit).join(part);
        fs::create_dir_all(&to).unwrap();
        for file in fs::read_dir(Path::new(MODEL).join(part)).unwrap().map(|file| file.unwrap()) {
            fs::copy(file.path(), to.join(file.file_name())).unwrap();
        }
    }
    fs::create_dir_all(folder.join("refs")).unwrap();
    fs::write(folder.join("refs/main"), commit).unwrap();
    place.ok(&["generate", "a", "--model", "acme/tiny", "--method", "plain", "--stages", "16x16:1", "--out", "a.png"]);
    place.ok(&["generate", "--from", "a.png", "--out", "b.png"]);
    assert_eq!(place.bytes("a.png"), place.bytes("b.png"));
}

const WEBUI: &str = "a (cat:1.3) <lora:style:0.8>\nNegative prompt: a dog\nSteps: 3, Sampler: DPM++ 2M, Schedule type: Karras, \
                     CFG scale: 4.5, Seed: 77, Size: 32x48, Model hash: HASH, Model: sd15, Clip skip: 2, Denoising \
                     strength: 0.5, Version: v1.10.1";

#[test]
fn a_picture_of_webui_gives_what_can_be_read() {
    let place = Place::with(&["--device", "cpu"]);
    write(&place, "a.png", WEBUI, "");
    let heard = told(&place, &["generate", "--from", "a.png", "--model", MODEL, "--out", "b.png"]);
    let warnings: Vec<&str> = heard.lines().filter(|line| line.starts_with("warning")).collect();
    let unread = "warning: a.png: not read: Denoising strength: 0.5; <lora:style:0.8> (--lora FILE:WEIGHT)";
    assert_eq!(warnings, [unread]);
    let json = said(&place, "b.png");
    for (key, value) in [
        ("prompt", Value::from("a (cat:1.3)")),
        ("negative_prompt", "a dog".into()),
        ("steps", 3.into()),
        ("scheduler", "dpm++-2m".into()),
        ("sigmas", "karras".into()),
        ("guidance", 4.5.into()),
        ("seed", 77.into()),
        ("size", "32x48".into()),
        ("clip_skip", 2.into()),
        ("prompt_syntax", "a1111".into()),
        ("rng", "torch-cuda".into()),
        ("method", "plain".into()),
    ] {
        assert_eq!(json[key], value, "{key}");
    }
}

#[test]
fn another_model_is_warned_of() {
    let place = Place::with(&["--device", "cpu"]);
    let (sd21, file) = (drawn::folder("sd21"), data("single-file/sd15.safetensors"));
    let [sd21, file] = [sd21.to_str().unwrap(), file.to_str().unwrap()];
    place.ok(&["generate", "a", "--model", MODEL, "--method", "plain", "--stages", "16x16:1", "--out", "a.png"]);
    let heard = told(&place, &["generate", "--from", "a.png", "--model", sd21, "--out", "b.png"]);
    assert!(heard.contains("warning: a.png: this run has model sd21 where it had sd15"), "{heard}");

    let hash: String = Sha256::digest(fs::read(file).unwrap()).iter().map(|byte| format!("{byte:02x}")).collect();
    for (hash, name, warned) in [
        (&hash[..10], "renamed", None),
        ("0123456789", "sd15", Some(format!("a model of the hash {} where it had 0123456789", &hash[..10]))),
    ] {
        let webui = WEBUI.replace("HASH", hash).replace("Model: sd15", &format!("Model: {name}"));
        write(&place, "w.png", &webui, "");
        // The file is of a smaller model than single files are, so the run ends where its weights are read.
        let heard = text(&place.run(&["generate", "--from", "w.png", "--model", file, "--out", "c.png"]).stderr);
        let found = heard.lines().find(|line| line.contains("this run has"));
        assert_eq!(
            found.map(String::from),
            warned.map(|text| format!("warning: w.png: this run has {text}")),
            "{heard}"
        );
    }
}

#[test]
fn pictures_that_say_nothing_are_refused() {
    let place = Place::with(&["--device", "cpu"]);
    let good = "{\"prompt\": \"a\", \"negative_prompt\": \"\", \"model\": \"pocket\", \"method\": \"plain\", \"size\": \
                \"64x64\", \"stages\": [\"64x64:1\"], \"steps\": 1, \"seed\": 1}";
    write(&place, "good.png", "", good);
    place.ok(&["generate", "--from", "good.png", "--out", "made.png"]);

    let bytes = place.bytes("made.png");
    fs::write(place.path("cut.png"), &bytes[..bytes.len() / 2]).unwrap();
    fs::write(place.path("tiny.png"), &bytes[..20]).unwrap();
    fs::write(place.path("empty.png"), "").unwrap();
    fs::write(place.path("page.png"), "<html>").unwrap();
    fs::write(place.path("photo.png"), b"\xff\xd8\xff\xe0\0\x10JFIF\0").unwrap();
    fs::create_dir(place.path("folder")).unwrap();
    let mut broken = bytes.clone();
    broken[16..20].fill(0); // a width of 0, and a checksum that is none
    fs::write(place.path("broken.png"), broken).unwrap();
    for (name, parameters, json) in [
        ("mute.png", "", String::new()),
        ("words.png", "a cat, asleep", String::new()),
        ("half.png", "", good[..good.len() - 2].into()),
        ("list.png", "", "[1]".into()),
        ("grid.png", "", "{\"grid\": {}, \"common\": {}, \"cells\": []}".into()),
        ("size.png", "", good.replace("\"64x64\"", "\"big\"")),
        ("steps.png", "", good.replace("\"steps\": 1", "\"steps\": -1")),
        ("odds.png", "", good.replace("64x64:1", "32x32:1")),
        ("method.png", "", good.replace("plain", "magic")),
        ("seedless.png", "", good.replace("\"seed\": 1", "\"seed\": \"x\"")),
        ("local.png", "", good.replace("pocket", "my model")),
        ("hub.png", "", good.replace("pocket", "acme/none")),
        ("lora.png", "", good.replace("\"seed\"", "\"loras\": [{\"name\": \"style\", \"weight\": 0.8}], \"seed\"")),
        ("words2.png", "", good.replace("\"seed\"", "\"embeddings\": [\"toy\"], \"vae\": \"v\", \"seed\"")),
        ("webui.png", "a\nSteps: many, Sampler: DDIM, Model: pocket", String::new()),
    ] {
        write(&place, name, parameters, &json);
    }
    for (name, parts) in [
        ("none.png", &["no such file", "expected a PNG"][..]),
        ("folder", &["is a folder"]),
        ("empty.png", &["the file is empty"]),
        ("page.png", &["is no PNG"]),
        ("photo.png", &["is a JPEG", "expected the PNG"]),
        ("cut.png", &["is truncated"]),
        ("tiny.png", &["is truncated"]),
        ("broken.png", &["a damaged PNG"]),
        ("mute.png", &["says nothing about how it was made"]),
        ("words.png", &["parameters has no line like", "Steps: 20"]),
        ("half.png", &["its text megafuse is not JSON"]),
        ("list.png", &["is [1], expected a JSON object"]),
        ("grid.png", &["is a grid of pictures"]),
        ("size.png", &["does not make a run", "'big'", "--size"]),
        ("steps.png", &["does not make a run", "'-1'", "--steps"]),
        ("method.png", &["method \"magic\", expected one of plain"]),
        ("seedless.png", &["seed \"x\", expected a whole number"]),
        ("local.png", &["made with the model \"my model\"", "--model PATH"]),
        ("lora.png", &["files that are not named", "--lora style.safetensors:0.8"]),
        ("words2.png", &["--embedding FILE (of the word \"toy\")", "--vae v.safetensors"]),
        ("webui.png", &["does not make a run", "'many'", "--steps"]),
    ] {
        let message = place.fails(1, &["generate", "--from", name, "--out", "x.png"]);
        assert!(message.starts_with(&format!("error: {name}: ")), "{message}");
        assert_eq!(message.trim_end().lines().count(), 1, "{message}");
        for part in parts {
            assert!(message.contains(part), "{part} in: {message}");
        }
    }
    let message = place.fails(1, &["generate", "--from", "hub.png", "--out", "x.png"]);
    assert!(message.contains("acme/none: ") && message.contains("not in the cache"), "{message}");
    // Stages that are not those of the size: as if they were flags.
    let message = place.fails(2, &["generate", "--from", "odds.png", "--out", "x.png"]);
    assert!(message.contains("the last of --stages is 32x32"), "{message}");
    let message = place.fails(2, &["generate", "--from", "good.png", "--manifest", "m.jsonl", "--out", "x"]);
    assert!(message.contains("--manifest"), "{message}");
    assert!(place.fails(2, &["generate", "--from"]).contains("--from"));
}
