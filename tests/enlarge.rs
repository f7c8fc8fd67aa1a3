//! `megafuse enlarge` end to end, with the model inside the program and a small one.

#[path = "common/place.rs"]
mod place;

use std::fs;

use megafuse::image::{read_image, read_png_text};
use serde_json::Value;

use place::{MODEL, Place, text};

/// A picture of `width` x `height` that is no other size.
fn photo(place: &Place, name: &str, width: u32, height: u32) {
    let pixel = |x: u32, y: u32| image::Rgb([(x * 5 % 256) as u8, (y * 7 % 256) as u8, ((x + y) * 3 % 256) as u8]);
    image::RgbImage::from_fn(width, height, pixel).save(place.path(name)).unwrap();
}

fn json(place: &Place, name: &str) -> Value {
    serde_json::from_str(&read_png_text(&place.path(name), "megafuse").unwrap().expect("our text")).unwrap()
}

/// The model inside the program, on a picture of its own: its words, a relay from its size to twice that; and the picture's text
/// makes it again.
#[test]
fn a_picture_of_the_model_inside_the_program() {
    let place = Place::with(&["--device", "cpu"]);
    place.ok(&[
        "generate",
        "a green cube",
        "--method",
        "plain",
        "--size",
        "64x64",
        "--steps",
        "2",
        "--out",
        "small.png",
    ]);
    let out = place.run(&["enlarge", "small.png", "--steps", "6", "--strength", "0.4"]);
    let said = text(&out.stderr);
    for part in ["small.png: 64x64 to 128x128 by megafusion, 40 % of the stages 64x64:5 128x128:1", "a green cube"] {
        assert!(said.contains(part), "{part} in: {said}");
    }
    assert!(out.status.success() && text(&out.stdout).contains("small-128x128.png"), "{}", text(&out.stdout));
    let (width, height, _) = read_image(&place.path("small-128x128.png")).unwrap();
    assert_eq!((width, height), (128, 128));
    let said = json(&place, "small-128x128.png");
    assert_eq!((said["prompt"].as_str(), said["init_image"].as_str()), (Some("a green cube"), Some("small.png")));
    let again = ["generate", "--from", "small-128x128.png", "--init-image", "small.png", "--out", "again.png"];
    place.ok(&again);
    assert!(place.bytes("again.png") == place.bytes("small-128x128.png"));
}

/// Several pictures into a folder, each in its own proportions; other methods by flag.
#[test]
fn pictures_of_any_proportions() {
    let place = Place::with(&["--device", "cpu"]);
    photo(&place, "wide.png", 37, 16);
    photo(&place, "tall.png", 20, 30);
    let small = ["--model", MODEL, "--steps", "3", "--prompt", "a cat"];
    let out =
        place.ok(&[&["enlarge", "wide.png", "tall.png", "--scale", "1.5", "--out", "large/"], &small[..]].concat());
    for (name, size) in [("wide-56x24.png", (56, 24)), ("tall-30x46.png", (30, 46))] {
        assert!(out.contains(name), "{out}");
        let (width, height, _) = read_image(&place.path(&format!("large/{name}"))).unwrap();
        assert_eq!((width, height), size);
    }
    let by = |method: &str, size: &str| {
        let args = ["enlarge", "tall.png", "--size", size, "--method", method, "--out", "by.png"];
        place.ok(&[&args, &small[..]].concat());
        json(&place, "by.png")
    };
    assert_eq!(by("plain", "40x60")["strength"], 0.35);
    assert_eq!(by("multidiffusion", "40x60")["method"], "multidiffusion");
    let stages = ["enlarge", "tall.png", "--stages", "20x30:3,40x60:2+crops", "--window", "8", "--out", "by.png"];
    place.ok(&[&stages, &small[..2], &small[4..]].concat());
    assert_eq!(json(&place, "by.png")["stages"][1], "40x60:2+crops");
}

/// Every method has its own stages from the picture's size on, options and share of the schedule; flags go before them.
#[test]
fn other_methods_by_name() {
    let place = Place::with(&["--device", "cpu"]);
    photo(&place, "tall.png", 20, 30);
    let by = |method: &str, more: &[&str]| {
        let args = ["enlarge", "tall.png", "--model", MODEL, "--steps", "3", "--prompt", "a cat", "--method", method];
        place.ok(&[&args, more, &["--out", "by.png"]].concat());
        let (width, height, _) = read_image(&place.path("by.png")).unwrap();
        assert_eq!((width, height), (40, 60), "{method}");
        json(&place, "by.png")
    };
    for (method, more, stages, key, value) in [
        ("hires-fix", &[][..], "20x30:3 40x60:1", "denoise", Value::from(0.35)),
        ("hires-fix", &["--denoise", "1"], "20x30:3 40x60:3", "denoise", 1.0.into()),
        ("diffusehigh", &[], "20x30:3 40x60:1", "sharpen", true.into()),
        ("scalediff", &[], "20x30:3 40x60:2", "low_pass", 0.125.into()),
        ("pixelrush", &[], "20x30:3 40x60:1", "refine_timestep", 249.into()),
        ("demofusion", &[], "40x60:3", "strength", 1.0.into()),
        ("upsample-guidance", &[], "40x60:3", "strength", 0.35.into()),
        ("multidiffusion", &[], "40x60:3", "stride", 8.into()),
        ("multidiffusion", &["--stride", "12", "--strength", "0.7"], "40x60:3", "stride", 12.into()),
    ] {
        let said = by(method, more);
        let made: Vec<&str> = said["stages"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        assert_eq!((made.join(" ").as_str(), &said[key]), (stages, &value), "{method}");
        assert_eq!(said.get("strength").is_none(), stages.starts_with("20x30"), "{method}");
    }
    // As generate makes it from the same stages.
    let made = place.bytes("by.png");
    by("diffusehigh", &[]);
    let enlarged = place.bytes("by.png");
    assert!(made != enlarged);
    let args = ["generate", "a cat", "--model", MODEL, "--method", "diffusehigh", "--init-image", "tall.png"];
    place.ok(&[&args[..], &["--stages", "20x30:3,40x60:1", "--out", "by.png"]].concat());
    assert!(place.bytes("by.png") == enlarged);
}

#[test]
fn what_cannot_be_enlarged_is_refused() {
    let place = Place::with(&["--device", "cpu"]);
    photo(&place, "a.png", 20, 30);
    fs::write(place.path("b.txt"), "no picture").unwrap();
    for (args, parts) in [
        (&["a.png", "--size", "20x30"][..], &["--size 20x30: is not larger than the picture, which is 20x30"][..]),
        (&["a.png", "--size", "16x60"], &["--size 16x60", "megafuse resize makes pictures smaller"]),
        (&["a.png", "--size", "60x60"], &["the picture is 20x30; sizes of its proportions are 60x90 and 40x60"]),
        (&["a.png", "--stages", "20x30:2,60x60:2"], &["--stages", "60x90 and 40x60"]),
        (&["a.png", "--scale", "1"], &["--scale", "above 1, at most 8"]),
        (&["a.png", "--scale", "2", "--size", "40x60"], &["--scale", "cannot be used with"]),
        (&["b.txt"], &["b.txt", "not a PNG, JPEG or WebP file"]),
        (&["no.png"], &["no.png", "no such file"]),
        (&["a.png", "a.png", "--out", "one.png"], &["--out one.png: is one file for 2 pictures"]),
        (&["a.png", "--out", "a.jpg"], &["--out a.jpg: pictures are written as PNG"]),
        (&["a.png", "--init-image", "a.png"], &["--init-image", "enlarge begins from its own pictures"]),
        (&["a.png", "--strength", "0.01"], &["--strength 0.01: leaves none of the"]),
        (
            &["a.png", "--method", "hires-fix", "--strength", "0.5"],
            &["--strength 0.5: --denoise says how much hires-fix makes anew of a picture; leave --strength out"],
        ),
        (
            &["a.png", "--method", "diffusehigh", "--strength", "1"],
            &["--strength 1: the number of steps of the later --stages says how much diffusehigh"],
        ),
        (
            &["a.png", "--method", "pixelrush", "--stages", "40x60:3"],
            &["--stages 40x60:3: pixelrush enlarges the picture after the first stage", "larger --size"],
        ),
        (
            &["a.png", "--method", "demofusion", "--strength", "0.5"],
            &["--strength", "every phase runs the whole schedule"],
        ),
        (&["a.png", "--init-image", "a.png", "--mask", "a.png"], &["--mask", "enlarge makes all of it"]),
        (
            &["a.png", "--method", "demofusion", "--phases", "--size", "128x192", "--out", "-"],
            &["--phases true", "nothing beside it; name a file"],
        ),
        (&["a.png", "--phases"], &["--phases", "has no effect with --method megafusion; demofusion has it"]),
        (
            &["a.png", "--method", "plain", "--window", "8"],
            &["--window 8", "has no effect with --method plain", "+crops"],
        ),
        (&[], &["PICTURE"]),
    ] {
        let model: &[&str] = if args.is_empty() { &[] } else { &["--model", MODEL] };
        let status = if args[..].iter().any(|arg| ["b.txt", "no.png"].contains(arg)) { 1 } else { 2 };
        let message = place.fails(status, &[&["enlarge"], args, model].concat());
        parts.iter().for_each(|part| assert!(message.contains(part), "{part} in: {message}"));
    }
}
