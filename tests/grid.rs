//! `grid` and `generate --strip`: every picture in its place, pixel by pixel, and what the file says about it.

#[path = "common/place.rs"]
mod place;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use place::{MODEL, Place};
use serde_json::Value;

fn a_place() -> Place {
    Place::with(&["--model", MODEL])
}

/// The picture of `generate` with these flags.
fn picture(place: &Place, args: &[&str]) -> Png {
    place.ok(&[&["generate"], args, &["--out", "one.png"]].concat());
    read_png(&place.path("one.png"))
}

#[derive(Debug, PartialEq)]
struct Png {
    width: usize,
    height: usize,
    pixels: Vec<u8>,
    parameters: String,
    json: Value,
}

fn read_png(path: &Path) -> Png {
    let file = std::io::BufReader::new(fs::File::open(path).unwrap_or_else(|error| panic!("{path:?}: {error}")));
    let mut reader = png::Decoder::new(file).read_info().expect("a PNG");
    let mut pixels = vec![0; reader.output_buffer_size().expect("a small picture")];
    let info = reader.next_frame(&mut pixels).expect("a complete PNG");
    let chunks = &reader.info().uncompressed_latin1_text;
    let chunk = |keyword| &chunks.iter().find(|chunk| chunk.keyword == keyword).expect("our chunk").text;
    let json = serde_json::from_str(chunk("megafuse")).expect("JSON");
    let parameters = chunk("parameters").clone();
    Png { width: info.width as usize, height: info.height as usize, pixels, parameters, json }
}

/// Every pixel `factor` times in both directions.
fn enlarged(picture: &Png, factor: usize) -> (usize, Vec<u8>) {
    let mut pixels = Vec::new();
    for y in 0..picture.height * factor {
        for x in 0..picture.width * factor {
            let at = (y / factor * picture.width + x / factor) * 3;
            pixels.extend(&picture.pixels[at..at + 3]);
        }
    }
    (picture.width * factor, pixels)
}

/// Where the picture stands in `sheet`, exactly once: x and y.
fn find(sheet: &Png, (width, pixels): (usize, Vec<u8>)) -> (usize, usize) {
    let height = pixels.len() / 3 / width;
    let row = |x: usize, y: usize| &sheet.pixels[(y * sheet.width + x) * 3..(y * sheet.width + x + width) * 3];
    let is = |x: usize, y: usize| (0..height).all(|i| row(x, y + i) == &pixels[i * width * 3..(i + 1) * width * 3]);
    let places = (0..=sheet.height - height).flat_map(|y| (0..=sheet.width - width).map(move |x| (x, y)));
    let found: Vec<(usize, usize)> = places.filter(|&(x, y)| is(x, y)).collect();
    assert_eq!(found.len(), 1, "{found:?}");
    found[0]
}

const STAGES: [&str; 2] = ["--stages", "16x16:2,32x24:1"];

#[test]
fn every_picture_of_a_grid_is_in_its_place() {
    let place = a_place();
    let command = [&["grid", "a cat", "a red dog", "--seeds", "3,9"], &STAGES[..], &["--out", "grid.png"]].concat();
    assert_eq!(place.ok(&command), "grid.png\n");
    let grid = read_png(&place.path("grid.png"));
    // 32x24, four times as large; rows: prompts, within them seeds; columns: methods.
    let (mut xs, mut ys) = (BTreeSet::new(), Vec::new());
    for prompt in ["a cat", "a red dog"] {
        for seed in ["3", "9"] {
            let base = [prompt, "--seed", seed];
            let mut row = Vec::new();
            for method in ["plain", "megafusion", "megafusion++"] {
                // Plain makes all steps at the last size.
                let stages = if method == "plain" { &["--size", "32x24", "--steps", "3"][..] } else { &STAGES };
                let picture = picture(&place, &[&base[..], stages, &["--method", method]].concat());
                row.push(find(&grid, enlarged(&picture, 4)));
            }
            assert!(row[0].1 == row[1].1 && row[1].1 == row[2].1, "{row:?}");
            assert!(row[0].0 + 128 < row[1].0 && row[1].0 + 128 < row[2].0, "{row:?}");
            xs.extend(row.iter().map(|(x, _)| *x));
            ys.push(row[0].1);
        }
    }
    assert_eq!(xs.len(), 3);
    assert!(ys.windows(2).all(|pair| pair[0] + 96 < pair[1]), "{ys:?}");

    // The labels are above and beside the pictures, and the file says what made each.
    let ink = |x: std::ops::Range<usize>, y: std::ops::Range<usize>| {
        y.flat_map(|y| x.clone().map(move |x| (y * grid.width + x) * 3)).filter(|&at| grid.pixels[at] < 128).count()
    };
    let (left, top) = (*xs.first().unwrap(), ys[0]);
    assert!(ink(0..left, top..top + 96) > 50 && ink(left..left + 128, 0..top) > 50);
    assert_eq!(grid.json["grid"]["columns"][0], serde_json::json!(["plain", "32x24:3"]));
    assert_eq!(grid.json["grid"]["columns"][2], serde_json::json!(["megafusion++", "16x16:2 32x24:1"]));
    assert_eq!(grid.json["grid"]["rows"][3], serde_json::json!(["a red dog", "seed 9"]));
    assert_eq!((&grid.json["common"]["steps"], &grid.json["common"]["seed"]), (&3.into(), &Value::Null));
    let cell = &grid.json["cells"][3][1];
    assert_eq!(
        (&cell["prompt"], &cell["seed"], &cell["method"]),
        (&"a red dog".into(), &9.into(), &"megafusion".into())
    );
    assert!(grid.parameters.starts_with("a cat\na red dog\nMethods: plain megafusion megafusion++, Seeds: 3 9"));

    let again = fs::read(place.path("grid.png")).unwrap();
    place.ok(&command);
    assert_eq!(fs::read(place.path("grid.png")).unwrap(), again, "the same command, the same file");
}

/// Axes turned, a method at a size of its own, and default names that replace nothing.
#[test]
fn axes_sizes_and_names_are_chosen_by_flags() {
    let place = a_place();
    let command =
        ["grid", "a cat", "--methods", "plain@16x16,plain", "--size", "32x32", "--steps", "2", "--seeds", "0..3"];
    assert_eq!(place.ok(&[&command[..], &["--columns", "seeds"]].concat()), "megafuse-grid.png\n");
    assert_eq!(place.ok(&[&command[..], &["--columns", "seeds,methods"]].concat()), "megafuse-grid-2.png\n");
    let grid = read_png(&place.path("megafuse-grid.png"));
    let wide = read_png(&place.path("megafuse-grid-2.png"));
    let small = ["a cat", "--method", "plain", "--size", "16x16", "--steps", "2", "--seed", "2"];
    let large = ["a cat", "--method", "plain", "--size", "32x32", "--steps", "2", "--seed", "0"];
    // Both at 128 pixels.
    let (small, large) = (enlarged(&picture(&place, &small), 8), enlarged(&picture(&place, &large), 4));
    let (below, above) = (find(&grid, large.clone()), find(&grid, small.clone()));
    assert!(below.1 > above.1 + 128 && above.0 > below.0 + 2 * 128, "{below:?} {above:?}");
    assert_eq!(find(&wide, large).1, find(&wide, small).1);
    assert_eq!(wide.json["cells"].as_array().map(Vec::len), Some(1));
    assert_eq!(grid.json["grid"]["rows"][0], serde_json::json!(["plain", "16x16:2"]));

    // Shrunk to a chosen size.
    place.ok(&[&command[..], &["--columns", "seeds", "--cell", "16", "--out", "small.png"]].concat());
    let shrunk = read_png(&place.path("small.png"));
    let native = picture(&place, &["a cat", "--method", "plain", "--size", "16x16", "--steps", "2", "--seed", "1"]);
    find(&shrunk, enlarged(&native, 1));
}

#[test]
fn a_grid_of_a_manifest_has_its_seeds_and_sizes() {
    let place = a_place();
    let lines = "{\"prompt\": \"a cat\", \"seed\": 5}\n{\"prompt\": \"a dog\", \"size\": \"16x16\", \"guidance\": 2}\n";
    fs::write(place.path("few.jsonl"), lines).unwrap();
    let command = ["grid", "--manifest", "few.jsonl", "--methods", "plain", "--size", "32x32", "--steps", "1"];
    place.ok(&[&command[..], &["--out", "g.png"]].concat());
    let grid = read_png(&place.path("g.png"));
    assert_eq!(grid.json["grid"]["rows"], serde_json::json!([["a cat", "seed 5"], ["a dog", "seed 1"]]));
    let plain = ["--method", "plain", "--steps", "1"];
    let cat = picture(&place, &[&["a cat", "--seed", "5", "--size", "32x32"], &plain[..]].concat());
    let dog = ["a dog", "--seed", "1", "--size", "16x16", "--guidance", "2"];
    let dog = picture(&place, &[&dog[..], &plain].concat());
    assert!(find(&grid, enlarged(&cat, 4)).1 + 128 < find(&grid, enlarged(&dog, 8)).1);
    // With --seeds all lines have those.
    place.ok(&[&command[..], &["--seeds", "8", "--out", "h.png"]].concat());
    assert_eq!(read_png(&place.path("h.png")).json["common"]["seed"], 8);

    fs::write(place.path("few.jsonl"), "{\"prompt\": \"a\", \"method\": \"plain\"}").unwrap();
    let message = place.fails(1, &command);
    assert!(message.contains("few.jsonl:1") && message.contains("--methods"), "{message}");
}

#[test]
fn grids_that_cannot_be_made_are_refused_first() {
    let place = a_place();
    fs::write(place.path("no"), "a file").unwrap();
    for (args, status, part) in [
        (&["grid"][..], 2, "PROMPT"),
        (&["grid", "a", "--manifest", "b"], 2, "--manifest"),
        (&["grid", "a", "--methods", "magic"], 2, "megafusion++"),
        (&["grid", "a", "--methods", "plain@7"], 2, "1024x768"),
        (&["grid", "a", "--methods", "plain@15x15"], 2, "multiples of 2"),
        (&["grid", "a", "--seeds", "3..1"], 2, "is empty"),
        (&["grid", "a", "--columns", "cats"], 2, "methods"),
        (&["grid", "a", "--columns", "seeds,seeds"], 2, "--columns seeds,seeds"),
        (&["grid", "a", "--cell", "0"], 2, "from 16"),
        (&["grid", "a", "--cell", "4096", "--seeds", "0..300"], 2, "300 rows"),
        (&["grid", "a", "--methods", "plain", "--upsampler", "bilinear"], 2, "--upsampler bilinear"),
        (&["grid", "a", "--methods", "demofusion", "--phases"], 2, "a grid shows finished pictures"),
        (&["grid", "a", "--methods", "plain,megafusion", "--window", "8"], 2, "a stage with +crops in --stages"),
        (&["grid", "a", "--out", "a.jpg"], 2, ".png"),
        (&["grid", "a", "--out", "no/such/a.png"], 1, "cannot be made"),
        (&["grid", "--manifest", "no.jsonl"], 1, "no.jsonl: no such file"),
        (&["generate", "a", "--method", "plain", "--size", "16x16", "--strip", "s.png"], 2, "--strip s.png"),
        (&["generate", "a", "--strip", "s.png", "--out", "s.png"], 2, "same file as --out"),
        (&["generate", "a", "--strip", "s.png", "--dump", "s.png"], 2, "same file as --dump"),
        (&["generate", "a", "--strip", "s.jpg"], 2, "--strip s.jpg"),
        (&["generate", "a", "--strip", "no/such/s.png"], 1, "cannot be made"),
    ] {
        let message = place.fails(status, args);
        assert!(message.contains(part), "{part} for {args:?} in: {message}");
    }
}

/// Against the tensors of --dump.
#[test]
fn a_strip_shows_every_relay_before_and_after_the_upsampler() {
    let place = a_place();
    let stages = ["--stages", "16x16:2,24x24:1,32x32:2", "--relay-clamp", "none"];
    let files = ["--strip", "s.png", "--dump", "d.safetensors", "--out", "p.png", "--count", "2"];
    let printed = place.ok(&[&["generate", "a cat"], &stages[..], &files].concat());
    let names = ["p-1.png", "d-1.safetensors", "s-1.png", "p-2.png", "d-2.safetensors", "s-2.png"];
    assert_eq!(printed.lines().collect::<Vec<_>>(), names);
    let strip = read_png(&place.path("s-2.png"));
    let picture = read_png(&place.path("p-2.png"));
    assert_eq!(strip.json, picture.json);

    let bytes = fs::read(place.path("d-2.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let panel = |name: &str| {
        let tensor = tensors.tensor(name).unwrap();
        let (height, width) = (tensor.shape()[2], tensor.shape()[3]);
        let values: Vec<f32> = bytemuck::pod_collect_to_vec(tensor.data());
        let plane = width * height;
        let value = |i: usize| ((values[i % 3 * plane + i / 3] / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even();
        let pixels = (0..3 * plane).map(|i| value(i) as u8).collect();
        Png { width, height, pixels, parameters: String::new(), json: Value::Null }
    };
    // 32 pixels become 128; 24 do not go into 128 evenly and are resized, so only the even ones are found as they are.
    let x0 = find(&strip, enlarged(&panel("relay1.decoded"), 8));
    let upsampled = find(&strip, enlarged(&panel("relay2.upsampled"), 4));
    let last = find(&strip, enlarged(&picture, 4));
    assert!(x0.1 == upsampled.1 && upsampled.1 == last.1, "{x0:?} {upsampled:?} {last:?}");
    let pitch = last.0 - upsampled.0;
    assert!(
        pitch > 128 && x0.0 + 3 * pitch == upsampled.0,
        "five pictures side by side: {x0:?} {upsampled:?} {last:?}"
    );

    // The strip is the same without the dump, and the picture is the same without the strip.
    let first = fs::read(place.path("s-1.png")).unwrap();
    place.ok(&[&["generate", "a cat"], &stages[..], &["--strip", "t.png", "--out", "q.png"]].concat());
    assert_eq!(fs::read(place.path("t.png")).unwrap(), first);
    assert_eq!(fs::read(place.path("q.png")).unwrap(), fs::read(place.path("p-1.png")).unwrap());
}
