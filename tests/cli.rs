//! The program from outside: its flags, files, messages and exit status. Numbers are checked elsewhere.

#[path = "common/drawn.rs"]
mod drawn;
#[path = "common/place.rs"]
mod place;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use place::{MODEL, Place, text};
use safetensors::{Dtype, SafeTensors};

/// `generate` on the small model in a few steps, with further flags.
fn generate<'a>(further: &[&'a str]) -> Vec<&'a str> {
    let base = ["generate", "a photo of a cat", "--model", MODEL, "--stages", "16x16:2,24x24:1"];
    base.into_iter().chain(further.iter().copied()).collect()
}

struct Png {
    width: u32,
    height: u32,
    pixels: Vec<u8>,
    texts: Vec<(String, String)>,
}

fn read_png(path: &Path) -> Png {
    let file = std::io::BufReader::new(fs::File::open(path).unwrap_or_else(|error| panic!("{path:?}: {error}")));
    let mut reader = png::Decoder::new(file).read_info().expect("a PNG");
    let mut pixels = vec![0; reader.output_buffer_size().expect("a small picture")];
    let info = reader.next_frame(&mut pixels).expect("a complete PNG");
    assert_eq!((info.color_type, info.bit_depth), (png::ColorType::Rgb, png::BitDepth::Eight));
    let texts = reader.info().uncompressed_latin1_text.iter();
    let mut texts: Vec<(String, String)> = texts.map(|chunk| (chunk.keyword.clone(), chunk.text.clone())).collect();
    let utf8 = reader.info().utf8_text.iter();
    texts.extend(utf8.map(|chunk| (chunk.keyword.clone(), chunk.get_text().expect("UTF-8"))));
    Png { width: info.width, height: info.height, pixels, texts }
}

fn write_png(path: &Path, width: u32, height: u32, pixels: &[u8]) {
    let file = fs::File::create(path).expect("a writable folder");
    let mut encoder = png::Encoder::new(file, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.write_header().expect("a header").write_image_data(pixels).expect("the pixels");
}

/// Shape and f32 values of a tensor.
fn tensor(bytes: &[u8], name: &str) -> (Vec<usize>, Vec<f32>) {
    let tensors = SafeTensors::deserialize(bytes).expect("a safetensors file");
    let tensor = tensors.tensor(name).unwrap_or_else(|_| panic!("{name} among {:?}", tensors.names()));
    assert_eq!(tensor.dtype(), Dtype::F32, "{name}");
    (tensor.shape().to_vec(), bytemuck::pod_collect_to_vec(tensor.data()))
}

fn write_tensors(path: &Path, tensors: &[(&str, Vec<usize>, Vec<f32>)]) {
    let views = tensors.iter().map(|(name, shape, values)| {
        let view = safetensors::tensor::TensorView::new(Dtype::F32, shape.clone(), bytemuck::cast_slice(values));
        (*name, view.expect("as many values as the shape says"))
    });
    safetensors::serialize_to_file(views, None, path).expect("a writable folder");
}

/// Values between -1 and 1 without a pattern.
fn noise(count: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

#[test]
fn help_shows_every_command_and_flag_with_examples() {
    let place = Place::new();
    let help = place.ok(&["--help"]);
    for command in ["generate", "grid", "plan", "probe", "resize", "check", "bench", "doctor"] {
        assert!(help.contains(command), "{help}");
        let help = place.ok(&[command, "--help"]);
        assert!(command == "doctor" || help.contains("Examples:"), "{command}: {help}");
    }
    let help = place.ok(&["generate", "--help"]);
    let flags = "model offline from negative method size stages upsampler relay-clamp reschedule dilation gamma relay-noise-offset \
                 scheduler sigmas eta steps guidance guidance-high guidance-rescale seed count batch original-size crop target-size prompt-syntax long-prompt clip-skip rng dtype vae-dtype memory vae-partition device out dump strip manifest resume shard \
                 reference-compat choices raunet windows t1 t2 aggressive \
                 control control-image control-scale control-guess control-start control-end control-canny \
                 ip-adapter ip-encoder ip-image ip-mask t5-length text-encoder-device lowres noise-level \
                 upscale-model upscale-stages upscale-steps upscale-guidance upscale-method";
    for flag in flags.split_whitespace() {
        assert!(help.contains(&format!("--{flag}")), "--{flag} is not in the help");
    }
    let version = place.ok(&["--version"]);
    assert_eq!(version.trim(), concat!("megafuse ", env!("CARGO_PKG_VERSION")));
}

/// The defaults of `--method` and `--guidance` depend on the model, so clap does not write them: the help's words are held
/// against what a run without these flags does.
#[test]
fn help_names_the_defaults_that_a_run_has() {
    let place = Place::new();
    let help = place.ok(&["generate", "--help"]).split_whitespace().collect::<Vec<_>>().join(" ");
    let named = |begin: &str, end: &str| {
        let from = help.find(begin).unwrap_or_else(|| panic!("{begin:?} in {help}")) + begin.len();
        help[from..].split(end).next().unwrap().to_string()
    };
    let method = named("Default: ", " for the model inside the program");
    let guidance = named("there is no guidance (default: ", " for the model inside the program");
    for (index, model) in [Some(MODEL), None].into_iter().enumerate() {
        let flags: Vec<&str> = model.map_or(vec![], |model| vec!["--model", model]);
        let said =
            |text: &str| text.split("; ").nth(index).unwrap_or_else(|| panic!("two defaults in {text}")).to_string();
        let picture = format!("{index}.png");
        place.ok(&[&["generate", "x", "--out", &picture, "--stages", "32x32:1,64x64:1"], flags.as_slice()].concat());
        let parameters = read_png(&place.path(&picture)).texts.remove(0).1;
        for part in [format!("Method: {},", said(&method)), format!("CFG scale: {},", said(&guidance))] {
            assert!(parameters.contains(&part), "{model:?}: {part} in {parameters}");
        }
    }
}

#[test]
fn a_picture_is_the_same_again_and_another_with_another_seed() {
    let place = Place::new();
    assert_eq!(place.ok(&generate(&["--seed", "3", "--out", "a.png"])), "a.png\n");
    place.ok(&generate(&["--seed", "3", "--out", "b.png"]));
    place.ok(&generate(&["--seed", "4", "--out", "c.png"]));
    assert_eq!(place.bytes("a.png"), place.bytes("b.png"));
    let (a, c) = (read_png(&place.path("a.png")), read_png(&place.path("c.png")));
    assert_eq!((a.width, a.height), (24, 24));
    assert_ne!(a.pixels, c.pixels);
    assert!(a.pixels.iter().collect::<BTreeSet<_>>().len() > 4, "a flat picture");
}

#[test]
fn a_picture_says_how_it_was_made() {
    let place = Place::new();
    place.ok(&generate(&["--seed", "3", "--negative", "a dog", "--guidance", "5.5", "--out", "a.png"]));
    let texts = read_png(&place.path("a.png")).texts;
    let chunk = |keyword: &str| &texts.iter().find(|(key, _)| key == keyword).expect(keyword).1;
    let parameters = chunk("parameters");
    let lines: Vec<&str> = parameters.lines().collect();
    assert_eq!(lines[0], "a photo of a cat");
    assert_eq!(lines[1], "Negative prompt: a dog");
    for part in ["Steps: 3", "CFG scale: 5.5", "Seed: 3", "Size: 24x24"] {
        assert!(lines[2].contains(part), "{part} in {parameters}");
    }
    let json: serde_json::Value = serde_json::from_str(chunk("megafuse")).expect("JSON");
    assert_eq!(json["prompt"], "a photo of a cat");
    assert_eq!(json["seed"], 3);
}

#[test]
fn default_names_do_not_replace_and_chosen_names_do() {
    let place = Place::new();
    assert_eq!(place.ok(&generate(&["--seed", "3"])), "megafuse-3.png\n");
    assert_eq!(place.ok(&generate(&["--seed", "3"])), "megafuse-3-2.png\n");
    assert_eq!(place.bytes("megafuse-3.png"), place.bytes("megafuse-3-2.png"));
    fs::write(place.path("a.png"), "something old").unwrap();
    place.ok(&generate(&["--seed", "3", "--out", "a.png"]));
    assert_eq!(place.bytes("a.png"), place.bytes("megafuse-3.png"));
    fs::create_dir(place.path("folder")).unwrap();
    let printed = place.ok(&generate(&["--seed", "3", "--out", "folder"]));
    assert_eq!(Path::new(printed.trim()), Path::new("folder/megafuse-3.png"));
}

#[test]
fn counted_pictures_depend_on_their_own_seed_only() {
    let place = Place::new();
    let printed = place.ok(&generate(&["--seed", "5", "--count", "3", "--out", "x.png", "--dump", "d.safetensors"]));
    let names = ["x-1.png", "d-1.safetensors", "x-2.png", "d-2.safetensors", "x-3.png", "d-3.safetensors"];
    assert_eq!(printed.lines().collect::<Vec<_>>(), names);
    assert_eq!(place.names(), names.iter().map(ToString::to_string).collect());
    place.ok(&generate(&["--seed", "7", "--out", "alone.png"]));
    assert_eq!(read_png(&place.path("x-3.png")).pixels, read_png(&place.path("alone.png")).pixels);
    assert_ne!(read_png(&place.path("x-1.png")).pixels, read_png(&place.path("x-2.png")).pixels);
}

#[test]
fn a_dump_holds_the_whole_run() {
    let place = Place::new();
    place.ok(&generate(&["--out", "a.png", "--dump", "d.safetensors"]));
    let bytes = place.bytes("d.safetensors");
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let names: BTreeSet<&str> = tensors.names().into_iter().collect();
    // Two draws: the first latents and the relay's noise.
    let want: BTreeSet<&str> =
        "noise0 noise1 timesteps alpha_bar step1 step2 step3 relay1.x0 relay1.decoded relay1.upsampled \
                relay1.encoded relay1.noised latent image"
            .split_whitespace()
            .collect();
    assert_eq!(names, want);
    assert_eq!(tensor(&bytes, "timesteps").0, [3]);
    assert_eq!(tensor(&bytes, "relay1.decoded").0, [1, 3, 16, 16]);
    assert_eq!(tensor(&bytes, "relay1.upsampled").0, [1, 3, 24, 24]);
    assert_eq!(tensor(&bytes, "relay1.noised").0, [1, 4, 12, 12]);
    let (shape, image) = tensor(&bytes, "image");
    assert_eq!(shape, [1, 3, 24, 24]);
    // The PNG is this tensor: x / 2 + 1/2, clamped, in 255 steps.
    let pixels = read_png(&place.path("a.png")).pixels;
    for (index, &pixel) in pixels.iter().enumerate() {
        let (position, channel) = (index / 3, index % 3);
        let value = (image[channel * 24 * 24 + position] / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0;
        assert!((value - f32::from(pixel)).abs() <= 0.5 + 1e-4, "pixel {position}: {value} as {pixel}");
    }
}

#[test]
fn a_plan_adds_up() {
    let place = Place::new();
    let args = ["plan", "a cat", "--model", MODEL, "--stages", "16x16:2,24x24:1"];
    let json: serde_json::Value =
        serde_json::from_str(&place.ok(&[&args[..], &["--json"]].concat())).expect("JSON on standard output");
    let total = json["total"]["macs"].as_u64().expect("total.macs");
    let phases = json["phases"].as_array().expect("phases");
    let sum: u64 =
        phases.iter().map(|phase| phase["repeats"].as_u64().unwrap() * phase["once"]["macs"].as_u64().unwrap()).sum();
    assert!(total > 0);
    assert_eq!(sum, total);
    let weights = json["weights"].as_array().expect("weights");
    assert_eq!(weights.len(), 3);
    assert!(json["peak_bytes"].as_u64().unwrap() > weights.iter().map(|w| w["bytes"].as_u64().unwrap()).sum::<u64>());

    let table = place.ok(&args);
    for part in ["16x16:2 24x24:1", "conv GMAC", "relay decode", "peak memory", "unet", "total"] {
        assert!(table.contains(part), "{part} in:\n{table}");
    }
    // Of a batch: the denoiser's products for each picture, the text's once.
    let batch = [&args[..], &["--count", "3", "--batch", "2"]].concat();
    let of_batch: serde_json::Value = serde_json::from_str(&place.ok(&[&batch[..], &["--json"]].concat())).unwrap();
    let macs = |json: &serde_json::Value, name: &str| {
        let phases = json["phases"].as_array().unwrap().iter().filter(|phase| phase["name"] == name);
        phases.map(|phase| phase["once"]["macs"].as_u64().unwrap()).collect::<Vec<_>>()
    };
    let doubled: Vec<u64> = macs(&json, "denoise").iter().map(|macs| 2 * macs).collect();
    assert_eq!(macs(&of_batch, "denoise"), doubled);
    assert_eq!(macs(&of_batch, "text"), macs(&json, "text"));
    assert!(of_batch["peak_bytes"].as_u64() > json["peak_bytes"].as_u64());
    assert!(place.ok(&batch).contains("for 2 of 3 pictures in one batch"));
    assert!(place.names().is_empty());
}

#[test]
fn a_plan_says_what_less_memory_costs() {
    let place = Place::new();
    let plan = |further: &[&str]| -> serde_json::Value {
        let args = ["plan", "a cat", "--model", MODEL, "--stages", "16x16:2,24x24:1", "--json"];
        serde_json::from_str(&place.ok(&[&args[..], further].concat())).expect("JSON on standard output")
    };
    let all = plan(&[]);
    let peaks = |json: &serde_json::Value| -> Vec<u64> {
        json["ladder"].as_array().unwrap().iter().map(|rung| rung["peak_bytes"].as_u64().unwrap()).collect()
    };
    assert_eq!(peaks(&all).len(), 5);
    assert_eq!(peaks(&all)[0], all["peak_bytes"].as_u64().unwrap());
    assert!(peaks(&all).is_sorted_by(|a, b| a >= b), "{all}");
    assert_eq!(all["memory"]["vae"], "whole");
    let low = plan(&["--memory", "low", "--vae-partition", "stripes"]);
    assert_eq!(low["memory"]["keeps_text_encoders"], false);
    assert_eq!(low["memory"]["vae"], "stripes of 128 rows");
    assert!(low["peak_bytes"].as_u64() < all["peak_bytes"].as_u64());
    let table = place.ok(&["plan", "a cat", "--model", MODEL, "--size", "16x16"]);
    for part in ["all parts of the model stay in memory", "and the denoiser leaves memory while the VAE works"] {
        assert!(table.contains(part), "{part} in:\n{table}");
    }
}

#[test]
fn less_memory_makes_the_same_picture() {
    let place = Place::new();
    let json = |name: &str, further: &[&str]| {
        place.ok(&generate(&[&["--out", name][..], further].concat()));
        let png = read_png(&place.path(name));
        let json = png.texts.iter().find(|(key, _)| key == "megafuse").expect("the parameters").1.clone();
        (png.pixels, serde_json::from_str::<serde_json::Value>(&json).expect("JSON"))
    };
    let (pixels, usual) = json("a.png", &[]);
    assert!(usual["vae_dtype"].is_null() && usual["vae_partition"].is_null(), "{usual}");
    for further in [&["--memory", "low"][..], &["--memory", "keep", "--vae-partition", "stripes"]] {
        assert_eq!(json("b.png", further), (pixels.clone(), usual.clone()), "{further:?}");
    }
    assert_eq!(json("c.png", &["--vae-dtype", "bf16"]).1["vae_dtype"], "bf16");
    assert_eq!(json("d.png", &["--vae-partition", "tiles"]).1["vae_partition"], "tiles");
}

#[test]
fn a_plan_needs_no_weights() {
    let place = Place::new();
    for part in ["text_encoder", "unet", "vae", "scheduler", "tokenizer"] {
        fs::create_dir(place.path(part)).unwrap();
        for entry in fs::read_dir(Path::new(MODEL).join(part)).unwrap() {
            let from = entry.unwrap().path();
            if from.extension().is_none_or(|extension| extension != "safetensors") {
                fs::copy(&from, place.path(part).join(from.file_name().unwrap())).unwrap();
            }
        }
    }
    place.ok(&["plan", "a cat", "--model", ".", "--size", "64x48"]);
    let message = place.fails(1, &["generate", "a cat", "--model", ".", "--size", "64x48"]);
    assert!(message.contains("safetensors"), "{message}");
}

#[test]
fn a_doctor_names_what_is_there() {
    let report = Place::new().ok(&["doctor"]);
    for part in [env!("CARGO_PKG_VERSION"), "threads", "cpu features", "cuda", "emu", "pocket", "--model DIR"] {
        assert!(report.contains(part), "{part} in:\n{report}");
    }
}

#[test]
fn an_instruction_set_is_chosen_by_a_variable() {
    let place = Place::new();
    let doctor =
        |level: &str| place.command(&["doctor"]).env("MEGAFUSE_CPU", level).output().expect("the program starts");
    let report = text(&doctor("baseline").stdout);
    assert!(report.contains("with baseline kernels"), "{report}");
    let output = doctor("avx3");
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("MEGAFUSE_CPU=avx3") && message.contains("it has baseline"), "{message}");
}

#[test]
fn resize_agrees_with_the_filters_by_hand() {
    let place = Place::new();
    // One row, grey 100 then 200: with bicubic a = -1/2 twice as wide, borders re-normalised, by hand in f64.
    write_png(&place.path("in.png"), 2, 1, &[100, 100, 100, 200, 200, 200]);
    place.ok(&["resize", "in.png", "out.png", "--size", "4x1"]);
    let weight = |x: f64| {
        let x = x.abs();
        match x {
            x if x < 1.0 => 1.5 * x.powi(3) - 2.5 * x.powi(2) + 1.0,
            x if x < 2.0 => -0.5 * x.powi(3) + 2.5 * x.powi(2) - 4.0 * x + 2.0,
            _ => 0.0,
        }
    };
    let want = |i: usize| {
        let centre = (i as f64 + 0.5) / 2.0;
        let taps = [(weight(0.5 - centre), 100.0), (weight(1.5 - centre), 200.0)];
        let sum: f64 = taps.iter().map(|(w, _)| w).sum();
        taps.iter().map(|(w, value)| w * value).sum::<f64>() / sum
    };
    let out = read_png(&place.path("out.png"));
    assert_eq!((out.width, out.height), (4, 1));
    for i in 0..4 {
        assert!((f64::from(out.pixels[3 * i]) - want(i)).abs() <= 0.5 + 1e-3, "{i}: {:?} {}", out.pixels, want(i));
    }

    let bilinear = |i: usize| [100.0, 125.0, 175.0, 200.0][i];
    place.ok(&["resize", "in.png", "out.png", "--size", "4x1", "--upsampler", "bilinear"]);
    let out = read_png(&place.path("out.png"));
    for i in 0..4 {
        assert!((f64::from(out.pixels[3 * i + 1]) - bilinear(i)).abs() <= 0.5 + 1e-3, "{i}: {:?}", out.pixels);
    }

    for upsampler in ["bicubic", "bicubic-torch", "bicubic-gaussian", "bicubic-edge"] {
        let flat: Vec<u8> = [17, 99, 255].repeat(63);
        write_png(&place.path("flat.png"), 9, 7, &flat);
        place.ok(&["resize", "flat.png", "flat-out.png", "--size", "23x11", "--upsampler", upsampler]);
        assert_eq!(read_png(&place.path("flat-out.png")).pixels, [17, 99, 255].repeat(23 * 11), "{upsampler}");
    }
}

#[test]
fn probes_take_and_give_nchw() {
    let place = Place::new();
    place.ok(&["probe", "--model", MODEL, "--module", "text", "--prompt", "a cat", "--out", "text.safetensors"]);
    let bytes = place.bytes("text.safetensors");
    let (shape, embeds) = tensor(&bytes, "prompt_embeds");
    assert_eq!((shape[0], shape.len()), (1, 3));
    assert_eq!(embeds, tensor(&bytes, "last_hidden_state").1);
    let ids = SafeTensors::deserialize(&bytes).unwrap();
    let ids = ids.tensor("input_ids").unwrap();
    assert_eq!((ids.dtype(), ids.shape()), (Dtype::I64, &shape[..2]));

    let image = noise(3 * 20 * 16);
    write_tensors(&place.path("image.safetensors"), &[("image", vec![1, 3, 20, 16], image)]);
    let (input, out) = ("image.safetensors", "moments.safetensors");
    place.ok(&["probe", "--model", MODEL, "--module", "vae-encode", "--in", input, "--out", out]);
    let (shape, mean) = tensor(&place.bytes(out), "mean");
    assert_eq!(shape, [1, 4, 10, 8]);
    assert_eq!(tensor(&place.bytes(out), "logvar").0, shape);
    write_tensors(&place.path("latent.safetensors"), &[("latent", shape, mean.clone())]);
    let (input, out) = ("latent.safetensors", "decoded.safetensors");
    place.ok(&["probe", "--model", MODEL, "--module", "vae-decode", "--in", input, "--out", out]);
    assert_eq!(tensor(&place.bytes(out), "decoded").0, [1, 3, 20, 16]);

    // Two samples at once are the two one by one.
    let text_shape = tensor(&bytes, "prompt_embeds").0;
    let sample = noise(2 * 4 * 6 * 5);
    let unet = |name: &str, n: usize, sample: &[f32]| {
        write_tensors(
            &place.path("in.safetensors"),
            &[
                ("sample", vec![n, 4, 6, 5], sample.to_vec()),
                ("timestep", vec![1], vec![521.0]),
                ("prompt_embeds", text_shape.clone(), embeds.clone()),
            ],
        );
        place.ok(&["probe", "--model", MODEL, "--module", "unet", "--in", "in.safetensors", "--out", name]);
        let (shape, out) = tensor(&place.bytes(name), "out");
        assert_eq!(shape, [n, 4, 6, 5]);
        out
    };
    let both = unet("both.safetensors", 2, &sample);
    let second = unet("second.safetensors", 1, &sample[120..]);
    for (a, b) in both[120..].iter().zip(&second) {
        assert!((a - b).abs() <= 1e-4 * b.abs().max(1.0), "{a} {b}");
    }
}

#[test]
fn probes_refuse_what_does_not_fit() {
    let place = Place::new();
    write_tensors(&place.path("a.safetensors"), &[("image", vec![1, 3, 7, 8], noise(168))]);
    fs::write(place.path("b.safetensors"), "not tensors").unwrap();
    let probe = |further: &[&str]| -> Vec<String> {
        let base = ["probe", "--model", MODEL, "--out", "out.safetensors", "--module"];
        base.iter().chain(further).map(ToString::to_string).collect()
    };
    for (further, status, parts) in [
        (&["vae-encode", "--in", "a.safetensors"][..], 1, &["image", "[1, 3, 7, 8]", "multiples of 2"][..]),
        (&["vae-decode", "--in", "a.safetensors"], 1, &["a.safetensors", "latent", "image"]),
        (&["unet", "--in", "b.safetensors"], 1, &["b.safetensors", "safetensors file"]),
        (&["unet", "--in", "c.safetensors"], 1, &["c.safetensors"]),
        (&["unet"], 2, &["--in"]),
        (&["text"], 2, &["--prompt"]),
        (&["text", "--prompt", "x", "--dilation", "2"], 2, &["--dilation 2"]),
        (&["vae-decode", "--in", "a.safetensors", "--prompt", "x"], 2, &["--prompt"]),
        (&["nothing"], 2, &["--module", "vae-encode"]),
    ] {
        let args = probe(further);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let message = place.fails(status, &args);
        for part in parts {
            assert!(message.contains(part), "{part} for {further:?} in: {message}");
        }
    }
}

/// The kernels beside the cpu, on the emulated card.
#[test]
fn a_check_compares_kernels_with_the_cpu() {
    let place = Place::new();
    let table = place.ok(&["check", "--device", "emu", "--filter", "add"]);
    for part in ["add_noise", "add  ", "f32", "f16", "bf16", "  ok", "all ok"] {
        assert!(table.contains(part), "{part} in:\n{table}");
    }
    assert!(!table.contains("WRONG"), "{table}");
    let lines = place.ok(&["check", "--device", "emu", "--filter", "layer_norm", "--dtype", "bf16", "--json"]);
    for line in lines.lines() {
        let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
        assert_eq!(
            (&line["op"], &line["dtype"], &line["verdict"]),
            (&"layer_norm".into(), &"bf16".into(), &"ok".into())
        );
        assert_eq!(line["emulated"], true);
        assert!(line["error"].as_f64() <= line["allowed"].as_f64(), "{line}");
    }
    assert!(place.fails(2, &["check", "--device", "cpu"]).contains("--device cpu"));
    assert!(place.fails(2, &["check", "--device", "emu", "--filter", "subtract"]).contains("subtract"));
    assert!(place.fails(1, &["check", "--device", "cuda:4096"]).contains("cuda:4096"));
}

/// Flags that contradict each other or do nothing: each names the flag and its value before anything is computed.
/// The dump of one run gives another its choices; what does not fit is said by name, before anything is made.
#[test]
fn a_dump_is_the_choices_of_another_run() {
    let place = Place::new();
    let sdxl: &'static str = drawn::folder("sdxl").display().to_string().leak();
    let run = |command, steps, more: &[&'static str]| -> Vec<&'static str> {
        let begin = [command, "x", "--model", sdxl, "--method", "hidiffusion", "--size", "32x32", "--steps", steps];
        [&begin, more].concat()
    };
    place.ok(&run("generate", "2", &["--seed", "5", "--out", "a.png", "--dump", "a.safetensors"]));
    let given = ["--seed", "6", "--choices", "a.safetensors", "--out", "b.png", "--dump", "b.safetensors"];
    place.ok(&run("generate", "2", &given));
    place.ok(&run("generate", "2", &["--seed", "6", "--out", "c.png", "--dump", "c.safetensors"]));
    let shifts = |name: &str| {
        let bytes = place.bytes(name);
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let view = file.tensor("shifts").unwrap();
        assert_eq!((view.dtype(), view.shape()), (safetensors::Dtype::I64, &[2, 10][..]), "{name}");
        view.data().to_vec()
    };
    assert_eq!(shifts("b.safetensors"), shifts("a.safetensors"));
    assert_ne!(shifts("c.safetensors"), shifts("a.safetensors"));
    assert_ne!(place.bytes("b.png"), place.bytes("c.png"));

    let again =
        |more: &[&'static str]| [&["generate", "--from", "b.png", "--model", sdxl, "--out", "d.png"], more].concat();
    let message = place.fails(1, &again(&[]));
    assert!(message.contains("was made with files that are not named: --choices a.safetensors"), "{message}");
    place.ok(&again(&["--choices", "a.safetensors"]));
    assert_eq!(place.bytes("d.png"), place.bytes("b.png"));

    for command in ["generate", "plan"] {
        let message = place.fails(2, &run(command, "3", &["--choices", "a.safetensors"]));
        let want = "--choices shifts in a.safetensors: has shape [2, 10], this run draws [3, 10]";
        assert!(message.contains(want), "{message}");
    }
    let plain =
        ["generate", "x", "--model", MODEL, "--size", "16x16", "--method", "plain", "--choices", "a.safetensors"];
    let message = place.fails(2, &plain);
    assert!(message.contains("--choices a.safetensors: has no effect with --method plain"), "{message}");
}

#[test]
fn flags_that_do_not_go_together() {
    let place = Place::new();
    fs::create_dir(place.path("folder.png")).unwrap();
    fs::write(place.path("no"), "a file").unwrap();
    for (flags, status, parts) in [
        (&["--size", "32x32"][..], 2, &["--size 32x32", "24x24"][..]),
        (&["--steps", "7"], 2, &["--steps 7", "3"]),
        (&["--method", "plain"], 2, &["--stages", "plain"]),
        (&["--scheduler", "euler", "--eta", "0.5"], 2, &["--eta 0.5", "ddim"]),
        (&["--seed", "18446744073709551615", "--count", "2"], 2, &["--seed 18446744073709551615", "--count 2"]),
        (&["--device", "cuda:4096"], 1, &["cuda:4096"]),
        (&["--reference-compat", "--scheduler", "euler"], 2, &["--reference-compat with --scheduler euler: ", "ddim"]),
        (&["--out", "a.jpg"], 2, &["--out a.jpg", ".png"]),
        (&["--out", "no/such/a.png"], 1, &["no/such/a.png", "the folder no/such cannot be made"]),
        (&["--out", "a.png", "--dump", "a.png"], 2, &["--dump a.png", "--out"]),
        (&["--dump", "folder.png"], 1, &["folder.png", "folder"]),
        (&["--unknown"], 2, &["--unknown"]),
    ] {
        let message = place.fails(status, &generate(flags));
        for part in parts {
            assert!(message.contains(part), "{part} for {flags:?} in: {message}");
        }
    }
    for (flag, value) in [
        ("--upsampler", "bilinear"),
        ("--relay-clamp", "none"),
        ("--reschedule", "true"),
        ("--dilation", "2"),
        ("--gamma", "4"),
        ("--relay-noise-offset", "1"),
        ("--relay-noise-offset", "-1"),
    ] {
        let args = ["generate", "x", "--model", MODEL, "--size", "16x16", "--method", "plain", flag, value];
        let message = place.fails(2, &args);
        assert!(message.contains(&format!("{flag} {value}")) && message.contains("plain"), "{message}");
    }
}

#[test]
fn values_that_are_refused() {
    let place = Place::new();
    for (flag, value, part) in [
        ("--size", "0x0", "1024x768"),
        ("--size", "1000000000x1000000000", "1024x768"),
        ("--size", "23x24", "multiples of 2"),
        ("--stages", "16x16:2,24x24", "stage 2"),
        ("--stages", "16x16:0", "from 1 to 1000"),
        ("--steps", "0", "from 1 to 1000"),
        ("--steps", "1001", "from 1 to 1000"),
        ("--guidance", "NaN", "from 0"),
        ("--guidance", "-1", "from 0"),
        ("--eta", "2", "from 0"),
        ("--count", "0", "from 1"),
        ("--seed", "-2", "--seed"),
        ("--dilation", "0", "from 1"),
        ("--reschedule", "True", "true, false"),
        ("--gamma", "0", "above 0"),
        ("--method", "magic", "megafusion++"),
        ("--scheduler", "dpm_fast", "euler-ancestral"),
        ("--upsampler", "lanczos", "bicubic-edge"),
        ("--relay-clamp", "yes", "decode"),
        ("--rng", "numpy", "torch-cuda"),
        ("--dtype", "f64", "bf16"),
        ("--device", "tpu", "auto"),
        ("--model", "no/such/model", "no/such/model"),
    ] {
        let args = ["generate", "x", "--model", MODEL, "--size", "16x16"];
        // A flag given twice is an error of its own, so the tested one replaces the usual one.
        let mut args: Vec<&str> = args.to_vec();
        match args.iter().position(|arg| *arg == flag) {
            Some(at) => args[at + 1] = value,
            None => args.extend([flag, value]),
        }
        let joined = if value.starts_with('-') { Some(format!("{flag}={value}")) } else { None };
        if let Some(joined) = &joined {
            args.truncate(args.len() - 2);
            args.push(joined);
        }
        let status = if flag == "--model" { 1 } else { 2 };
        let message = place.fails(status, &args);
        assert!(message.contains(part), "{flag} {value}: {message}");
        assert!(message.contains(value), "{flag} {value}: {message}");
    }
}

/// Ctrl-C in the middle of a run and kill -9: no file, no rest of one.
#[cfg(unix)]
#[test]
fn an_interrupt_leaves_nothing() {
    for (signal, status) in [("INT", Some(130)), ("KILL", None)] {
        let place = Place::new();
        let args = ["generate", "x", "--model", MODEL, "--size", "96x96", "--method", "plain", "--steps", "900"];
        let mut command = place.command(&args);
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("starts");
        // The first progress line says that the steps have begun.
        let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stderr.take().expect("piped")));
        assert!(lines.by_ref().any(|line| line.expect("text").starts_with("stage 1/1")), "no stage began");
        let kill = Command::new("kill").args(["-s", signal, &child.id().to_string()]).status();
        assert!(kill.expect("kill runs").success());
        let begin = Instant::now();
        let ended = child.wait().expect("it ends");
        assert!(begin.elapsed() < Duration::from_secs(20), "{signal}: took {:?}", begin.elapsed());
        assert_eq!(ended.code(), status, "{signal}");
        let rest: Vec<String> = lines.map_while(Result::ok).collect();
        assert!(signal == "KILL" || rest.iter().any(|line| line.contains("nothing was written")), "{rest:?}");
        assert!(place.names().is_empty(), "{signal} left {:?}", place.names());
    }
}

/// The main job: one command, no model directory, no flags but fewer steps, for the time of an unoptimised build.
#[test]
fn a_newcomer_gets_a_picture() {
    let place = Place::new();
    assert_eq!(place.ok(&["generate", "two large red balls on the left", "--steps", "5"]), "megafuse-0.png\n");
    let picture = read_png(&place.path("megafuse-0.png"));
    assert_eq!((picture.width, picture.height), (256, 256));
}
