//! Runs from a picture, inpainting and hires fix against what tools/oracle/pictures_in.py stored.

use std::path::Path;

use megafuse::image::read_image;

use crate::files::{Arrays, all_passed, data, megafuse};
use crate::runs::{Run, check_in, generate, listed, model};
use crate::skip;

const FOLDER: &str = "pictures-in";

/// The runs whose name begins so, with the paths of their files.
fn runs(prefix: &str) -> Vec<Run> {
    let mut runs = listed(&format!("{FOLDER}/runs.json"), &["runs"], |name| name.starts_with(prefix));
    for run in &mut runs {
        for i in 1..run.args.len() {
            if ["--init-image", "--mask"].contains(&run.args[i - 1].as_str()) {
                run.args[i] = data(FOLDER).join(&run.args[i]).display().to_string();
            }
        }
    }
    runs
}

fn check(prefix: &str) {
    all_passed(runs(prefix).iter().map(|run| check_in(FOLDER, run, &[])).collect());
}

#[test]
fn from_a_picture() {
    check("img2img");
}

#[test]
fn inpainting() {
    check("inpaint");
}

#[test]
fn relays_from_a_picture() {
    check("mega");
}

#[test]
fn views_of_a_picture() {
    check("views");
}

#[test]
fn hires_fix() {
    check("hires");
}

/// Methods that have the picture in place of their first stage's.
#[test]
fn cascades_from_a_picture() {
    check("cascade");
}

/// One of each kind, with recorded steps: known parts, further channels, a relay that begins late, a second pass.
#[test]
fn on_the_emulated_card() {
    if !skip::has_emulated_card() {
        return;
    }
    const EMU: [&str; 4] = ["--device", "emu", "--dtype", "f32"];
    let names = [
        "img2img-heun",
        "inpaint-ancestral",
        "inpaint-channels-sdxl",
        "mega-inpaint",
        "hires-picture",
        "cascade-diffusehigh",
    ];
    all_passed(names.map(|name| check_in(FOLDER, &run(name), &EMU)).into());
    // The second picture's steps are replays, in the memory of the first one's.
    for name in ["inpaint-channels-sdxl", "inpaint-ddim"] {
        let folder = tempfile::tempdir().unwrap();
        generate(folder.path(), &run(name), &[&EMU[..], &["--count", "2"]].concat()).unwrap();
        generate(folder.path(), &with_seed_plus(run(name), 1), &EMU).unwrap();
        let read = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
        assert!(read("out-2.png") == read("out.png"), "{name}");
    }
}

/// Every kind of file as PIL reads it; of the lossy ones decoders may differ by rounding.
#[test]
fn files_of_every_kind() {
    let expected = Arrays::read(data(FOLDER).join("kinds.safetensors"));
    let check = |(name, want): (&String, &crate::files::Array)| {
        let (width, height, levels) = read_image(&data(FOLDER).join("kinds").join(name)).map_err(|e| e.to_string())?;
        if want.shape != [height, width, 3] {
            return Err(format!("{name} is {width}x{height}, expected {:?}", want.shape));
        }
        let allowed = if name.ends_with(".jpg") || name.starts_with("lossy") { 3.0 } else { 0.0 };
        let worst =
            levels.iter().zip(&want.values).map(|(&got, want)| (f32::from(got) - want).abs()).fold(0.0, f32::max);
        if worst <= allowed { Ok(()) } else { Err(format!("{name} is off by {worst} levels, allowed {allowed}")) }
    };
    all_passed(expected.0.iter().map(check).collect());
}

fn run(name: &str) -> Run {
    runs(name).into_iter().find(|run| run.name == name).expect("a stored run")
}

fn with_seed_plus(mut run: Run, more: u64) -> Run {
    let seed = 1 + run.args.iter().position(|arg| arg == "--seed").unwrap();
    run.args[seed] = (run.args[seed].parse::<u64>().unwrap() + more).to_string();
    run
}

/// A picture from a picture depends on its own seed alone, at every batch size.
#[test]
fn a_batch_makes_the_pictures_of_single_runs() {
    for name in ["inpaint-ancestral", "inpaint-channels", "hires-picture", "cascade-diffusehigh", "cascade-scalediff"] {
        let (run, folder) = (run(name), tempfile::tempdir().unwrap());
        generate(folder.path(), &run, &["--count", "3", "--batch", "3"]).unwrap();
        generate(folder.path(), &with_seed_plus(run, 2), &[]).unwrap();
        let read = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
        assert!(read("out-3.png") == read("out.png"), "{name}");
    }
}

/// `--from` makes the picture again, once the file that it began from is named.
#[test]
fn a_picture_says_what_it_began_from() {
    let (run, folder) = (run("inpaint-euler"), tempfile::tempdir().unwrap());
    generate(folder.path(), &run, &[]).unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (out, again) = (path("out.png"), path("again.png"));
    let model = data("sd15").display().to_string();
    let from = ["generate", "--from", &out, "--model", &model, "--device", "cpu", "--out", &again].map(String::from);
    let missing = megafuse(&from).unwrap_err();
    for part in ["files that are not named", "--init-image photo.png", "--mask mask.png"] {
        assert!(missing.contains(part), "{part} in: {missing}");
    }
    let file = |name: &str| data(FOLDER).join(name).display().to_string();
    let files = ["--init-image".into(), file("photo.png"), "--mask".into(), file("mask.png")];
    megafuse(&[&from[..], &files].concat()).unwrap();
    assert!(std::fs::read(&out).unwrap() == std::fs::read(&again).unwrap());
    let text = megafuse::image::read_png_text(Path::new(&out), "parameters").unwrap().unwrap();
    assert!(text.contains("Denoising strength: 0.6, Init image: photo.png, Mask: mask.png"), "{text}");
}

#[test]
fn what_does_not_fit_is_named() {
    let place = tempfile::tempdir().unwrap();
    let file = |name: &str| data(FOLDER).join(name).display().to_string();
    let write = |name: &str, bytes: &[u8]| {
        let path = place.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.display().to_string()
    };
    let photo_bytes = std::fs::read(file("photo.png")).unwrap();
    let (photo, mask, missing) =
        (file("photo.png"), file("mask.png"), place.path().join("no.png").display().to_string());
    let (text, empty) = (write("text.png", b"no picture"), write("empty.png", b""));
    let (half, gif) =
        (write("half.png", &photo_bytes[..photo_bytes.len() / 2]), write("a.gif", b"GIF89a\x01\0\x01\0\0\0\0;"));
    let webp = std::fs::read(file("kinds/lossy.webp")).unwrap();
    let half_webp = write("half.webp", &webp[..webp.len() / 2]);
    let pixel = place.path().join("pixel.png").display().to_string();
    image::RgbImage::new(1, 1).save(&pixel).unwrap();
    let inpainting = run("inpaint-channels");
    let inpainting = model(place.path(), &inpainting).display().to_string();
    let small = data("sd15").display().to_string();
    let folder = place.path().display().to_string();
    let plain = ["--method", "plain", "--steps", "5"];
    let cases: [(&str, &[&str], &[&str]); 27] = [
        (&small, &["--init-image", &missing], &["no.png", "no such file", "PNG, JPEG or WebP"]),
        (&small, &["--init-image", &folder], &["is a folder"]),
        (&small, &["--init-image", &text], &["text.png", "not a PNG, JPEG or WebP file"]),
        (&small, &["--init-image", &empty], &["empty.png", "the file is empty"]),
        (&small, &["--init-image", &half], &["half.png", "truncated"]),
        (&small, &["--init-image", &half_webp], &["half.webp"]),
        (&small, &["--init-image", &gif], &["a.gif", "not a PNG, JPEG or WebP file"]),
        (&small, &["--init-image", &pixel], &["--size 1x1", "multiples of 2"]),
        (&small, &["--init-image", &photo, "--mask", &text], &["text.png", "not a PNG, JPEG or WebP file"]),
        (&small, &["--init-image", &photo, "--strength", "1.5"], &["--strength", "expected a number from 0 to 1"]),
        (&small, &["--init-image", &photo, "--strength", "nan"], &["--strength", "expected a number from 0 to 1"]),
        (
            &small,
            &["--init-image", &photo, "--strength", "0"],
            &["--strength 0: leaves none of the 5 steps", "at least 0.2"],
        ),
        (&small, &["--init-image", &photo, "--strength", "0.19"], &["--strength 0.19: leaves none of the 5 steps"]),
        (&small, &["--mask", &mask], &["--init-image"]),
        (&small, &["--strength", "0.5"], &["--init-image"]),
        (&small, &["--init-image", &photo, "--size", "17x16"], &["--size 17x16", "the nearest is"]),
        (&small, &["--denoise", "0.5"], &["--denoise 0.5", "has no effect with --method plain; hires-fix has it"]),
        (&inpainting, &[], &["--mask (none)", "is an inpainting model", "--init-image and --mask"]),
        (&inpainting, &["--init-image", &photo], &["--mask (none)", "is an inpainting model"]),
        (
            &small,
            &["--method", "hires-fix", "--init-image", &photo, "--mask", &mask],
            &["--mask with --method hires-fix", "keeps no part of a picture", "choose plain, megafusion"],
        ),
        (
            &small,
            &["--method", "pixelrush", "--init-image", &photo, "--mask", &mask, "--size", "72x56"],
            &["--mask with --method pixelrush: this method keeps no part of a picture; leave --mask out"],
        ),
        (
            &small,
            &["--method", "scalediff", "--init-image", &photo, "--strength", "0.5", "--size", "72x56"],
            &["--strength 0.5: --restart-ratio says how much scalediff makes anew of a picture; leave --strength out"],
        ),
        (
            &small,
            &["--method", "diffusehigh", "--init-image", &photo],
            &["--stages 36x28:5: diffusehigh enlarges the picture after the first stage", "name a larger --size"],
        ),
        (
            &small,
            &["--method", "scalediff", "--init-image", &photo, "--size", "71x56"],
            &["--size 71x56: sides must be multiples of 2"],
        ),
        (
            &inpainting,
            &["--method", "hires-fix", "--init-image", &photo, "--mask", &mask],
            &["--mask with --method hires-fix", "leave --mask out, or choose plain"],
        ),
        (&small, &["--method", "hires-fix", "--denoise", "0.1"], &["--denoise 0.1: leaves none of the 5 steps"]),
        (&small, &["--method", "hires-fix", "--denoise", "2"], &["--denoise", "above 0, at most 1"]),
    ];
    let hires = |stages: &str, more: &[&str], parts: &[&str]| {
        let args =
            [&["generate", "a cat", "--model", &small, "--method", "hires-fix", "--stages", stages], more].concat();
        let message = megafuse(&args).unwrap_err();
        parts.iter().for_each(|part| assert!(message.contains(part), "{part} in: {message}"));
    };
    hires("8x8:2", &[], &["--stages 8x8:2", "hires fix has two"]);
    hires("8x8:2,16x16:3", &[], &["the last of the first one's 2 steps"]);
    hires("8x8:4,16x16:3", &["--denoise", "0.5"], &["--denoise makes 2 of the steps"]);
    for (model, more, parts) in cases {
        let method = more.contains(&"--method");
        let usual = if method { &plain[2..] } else { &plain[..] };
        let out = place.path().join("never.png").display().to_string();
        let args = [&["generate", "a cat", "--model", model, "--device", "cpu", "--out", &out], usual, more].concat();
        let message = megafuse(&args).expect_err(&more.join(" "));
        parts.iter().for_each(|part| assert!(message.contains(part), "{part} in: {message}"));
        assert!(!Path::new(&out).exists());
    }
}

/// What is odd is said, and the picture is made.
#[test]
fn what_is_odd_is_said() {
    let place = tempfile::tempdir().unwrap();
    let file = |name: &str| data(FOLDER).join(name).display().to_string();
    let black = place.path().join("black.png").display().to_string();
    image::RgbImage::new(20, 20).save(&black).unwrap();
    let out = place.path().join("out.png").display().to_string();
    let plan = |more: &[&str]| {
        let (small, photo) = (data("sd15").display().to_string(), file("photo.png"));
        let begin = [
            "plan",
            "a cat",
            "--model",
            &small,
            "--method",
            "plain",
            "--steps",
            "3",
            "--init-image",
            &photo,
            "--out",
            &out,
        ];
        let output =
            std::process::Command::new(env!("CARGO_BIN_EXE_megafuse")).args([&begin, more].concat()).output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let rounded = plan(&[]);
    assert!(
        rounded.contains("photo.png is 37x29, whose sides the model cannot make: it is resized to 36x28"),
        "{rounded}"
    );
    let stretched = plan(&["--size", "16x16"]);
    assert!(stretched.contains("photo.png is 37x29 and is stretched to 16x16"), "{stretched}");
    let masked = plan(&["--size", "36x28", "--mask", &black]);
    for part in ["the mask black.png is 20x20 and the picture 37x29", "is black everywhere: nothing is repainted"] {
        assert!(masked.contains(part), "{part} in: {masked}");
    }
    assert!(!plan(&["--size", "36x28"]).contains("warning"));
}
