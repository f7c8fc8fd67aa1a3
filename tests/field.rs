//! What people ran into with other programs of this kind, as the program is used from outside; each test says which
//! report it comes from.

#[path = "common/place.rs"]
mod place;

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use place::{MODEL, Place, text};

/// A picture of 16x16 in two steps.
const QUICK: [&str; 8] = ["generate", "a cat", "--model", MODEL, "--method", "plain", "--stages", "16x16:2"];

fn quick<'a>(further: &[&'a str]) -> Vec<&'a str> {
    QUICK.into_iter().chain(further.iter().copied()).collect()
}

fn is_png(bytes: &[u8]) -> bool {
    // Signature first, IEND with its checksum last.
    bytes.starts_with(b"\x89PNG\r\n\x1a\n") && bytes.ends_with(b"IEND\xae\x42\x60\x82")
}

/// The chunk that galleries read, and the one that holds everything.
fn texts(bytes: &[u8]) -> (String, serde_json::Value) {
    let reader = png::Decoder::new(std::io::Cursor::new(bytes)).read_info().expect("a PNG");
    let mut chunks: Vec<(String, String)> = Vec::new();
    chunks.extend(reader.info().uncompressed_latin1_text.iter().map(|c| (c.keyword.clone(), c.text.clone())));
    chunks.extend(reader.info().utf8_text.iter().map(|c| (c.keyword.clone(), c.get_text().expect("UTF-8"))));
    let chunk = |keyword: &str| chunks.iter().find(|(key, _)| key == keyword).expect(keyword).1.clone();
    (chunk("parameters"), serde_json::from_str(&chunk("megafuse")).expect("JSON"))
}

/// The value of `key` as stable-diffusion-webui reads it: on the last line, up to a comma.
fn field(parameters: &str, key: &str) -> Option<String> {
    let fields = parameters.lines().last().expect("a line").split(", ");
    fields.filter_map(|field| field.split_once(": ")).find(|(name, _)| *name == key).map(|(_, value)| value.into())
}

/// The run was refused before anything was computed.
fn refused_first(place: &Place, status: i32, args: &[&str], part: &str) {
    let message = place.fails(status, args);
    assert!(message.contains(part), "{part} for {args:?} in: {message}");
    assert!(!message.contains("stage") && !message.contains("loaded"), "{args:?} computed first: {message}");
}

/// A copy of the small model that may be changed.
fn copy_model(to: &Path) {
    for entry in fs::read_dir(MODEL).unwrap().map(|entry| entry.unwrap().path()) {
        let place = to.join(entry.file_name().unwrap());
        fs::create_dir_all(to).unwrap();
        match entry.is_dir() {
            true => {
                fs::create_dir_all(&place).unwrap();
                for file in fs::read_dir(&entry).unwrap().map(|file| file.unwrap().path()) {
                    fs::copy(&file, place.join(file.file_name().unwrap())).unwrap();
                }
            }
            false => drop(fs::copy(&entry, &place).unwrap()),
        }
    }
}

fn output(command: &mut Command) -> Output {
    command.output().expect("the program starts")
}

/// tqdm#1033: progress that cannot be shown ended the work.
#[cfg(unix)]
#[test]
fn a_closed_or_full_standard_error_does_not_end_the_work() {
    let place = Place::new();
    let full = || Stdio::from(fs::OpenOptions::new().write(true).open("/dev/full").expect("Linux has it"));
    assert!(output(place.command(&quick(&["--out", "full.png"])).stderr(full())).status.success());
    assert!(is_png(&place.bytes("full.png")));

    let mut command = place.command(&quick(&["--out", "closed.png"]));
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    assert!(output(command.stderr(writer)).status.success());
    assert!(is_png(&place.bytes("closed.png")));

    fs::write(place.path("prompts.jsonl"), "{\"prompt\": \"a\"}\n{\"prompt\": \"b\"}\n{\"prompt\": \"c\"}\n").unwrap();
    let many = ["generate", "--manifest", "prompts.jsonl", "--out", "many", "--model", MODEL, "--stages", "16x16:1"];
    let ended = output(place.command(&many).args(["--method", "plain"]).stderr(full()));
    assert!(ended.status.success(), "{ended:?}");
    assert_eq!(text(&ended.stdout).lines().count(), 3);

    let failed = output(place.command(&["generate", "x", "--model", "none"]).stderr(full()));
    assert_eq!(failed.status.code(), Some(1), "the status still tells");
}

/// One place writes to the standard streams: the standard library's macros panic where it cannot.
#[test]
fn nothing_prints_past_the_console() {
    let mut paths = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cli")];
    while let Some(path) = paths.pop() {
        if path.is_dir() {
            paths.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            continue;
        }
        let source = fs::read_to_string(&path).unwrap();
        for word in ["println!", "print!(", "dbg!"] {
            assert!(!source.contains(word), "{} uses {word}; console.rs has say! and print_line", path.display());
        }
    }
}

/// ml-stable-diffusion#48, sd.cpp#528: the result was computed and could not be saved.
#[test]
fn missing_folders_are_made_and_other_places_refused_first() {
    let place = Place::new();
    assert_eq!(place.ok(&quick(&["--out", "new/"])), "new/megafuse-0.png\n");
    assert_eq!(place.ok(&quick(&["--out", "a/b/c.png", "--dump", "d/e.safetensors"])), "a/b/c.png\nd/e.safetensors\n");
    assert_eq!(place.ok(&quick(&["--count", "2", "--out", "two/"])), "two/megafuse-0.png\ntwo/megafuse-1.png\n");
    let grid = ["grid", "a cat", "--model", MODEL, "--methods", "plain", "--stages", "16x16:1", "--out", "grids/"];
    assert_eq!(place.ok(&grid), "grids/megafuse-grid.png\n");
    place.ok(&["resize", "a/b/c.png", "r/s.png", "--size", "8x8"]);
    place.ok(&["probe", "--module", "text", "--prompt", "a", "--model", MODEL, "--out", "p/q.safetensors"]);
    for file in ["new/megafuse-0.png", "a/b/c.png", "grids/megafuse-grid.png", "r/s.png"] {
        assert!(is_png(&place.bytes(file)), "{file}");
    }

    let long = format!("{}.png", "x".repeat(300));
    fs::write(place.path("file"), "").unwrap();
    for name in [long.as_str(), "file/a.png"] {
        refused_first(&place, 1, &quick(&["--out", name]), name);
        refused_first(&place, 1, &quick(&["--dump", name]), name);
        refused_first(&place, 1, &[&grid[..8], &["--out", name]].concat(), name);
        refused_first(&place, 1, &["resize", "a/b/c.png", name, "--size", "8x8"], name);
    }
    let strip = ["generate", "a", "--model", MODEL, "--stages", "16x16:1,24x24:1", "--strip", &long];
    refused_first(&place, 1, &strip, &long);
    refused_first(&place, 1, &quick(&["--dump", "folder/"]), "is a folder");
    refused_first(&place, 1, &["resize", "a/b/c.png", "folder/", "--size", "8x8"], "is a folder");
    let probe = ["probe", "--module", "text", "--prompt", "a", "--model", MODEL, "--out"];
    refused_first(&place, 1, &[&probe[..], &["folder/"]].concat(), "is a folder");
    refused_first(&place, 1, &[&probe[..], &[&long]].concat(), &long);
}

#[test]
fn a_run_that_fails_leaves_no_folder() {
    let place = Place::new();
    copy_model(&place.path("model"));
    let unet = "model/unet/diffusion_pytorch_model.safetensors";
    fs::write(place.path(unet), "no weights").unwrap();
    let args = ["generate", "a", "--model", "model", "--method", "plain", "--stages", "16x16:1", "--out", "a/b/c.png"];
    assert!(place.fails(1, &args).contains(unet));
    // A folder that was there stays, though it is empty.
    fs::create_dir(place.path("a")).unwrap();
    place.fails(1, &args);
    assert!(fs::read_dir(place.path("a")).unwrap().next().is_none());
}

/// Found beside these: the strip replaced the picture.
#[test]
fn two_outputs_that_are_one_file_are_refused() {
    let place = Place::new();
    fs::create_dir(place.path("folder")).unwrap();
    let stages = ["generate", "a", "--model", MODEL, "--stages", "16x16:1,24x24:1"];
    let here = place.path("s.png");
    for (flags, part) in [
        (&["--out", "s.png", "--strip", "./s.png"][..], "same file as --out s.png"),
        (&["--out", "s.png", "--strip", "folder/../s.png"], "same file as --out s.png"),
        (&["--out", "s.png", "--dump", here.to_str().unwrap()], "same file as --out s.png"),
        (&["--dump", "x", "--strip", "./x"], "same file as --dump x"),
        (&["--strip", "megafuse-0.png"], "default name of --out"),
        (&["--strip", "megafuse-0-2.png"], "default name of --out"),
        (&["--out", "folder", "--dump", "folder/megafuse-0.png"], "default name of --out"),
        (&["--count", "2", "--dump", "megafuse.png", "--seed", "1"], "default name of --out"),
        (&["--out", "-", "--dump", "-"], "same file as --out -"),
        (&["--count", "2", "--out", "-"], "same file as --out -"),
    ] {
        let message = place.fails(2, &[&stages[..], flags].concat());
        assert!(message.contains(part), "{part} for {flags:?} in: {message}");
    }
    place.ok(&[&stages[..], &["--out", "s.png", "--strip", "folder/s.png", "--dump", "/dev/null"]].concat());
}

#[cfg(unix)]
#[test]
fn links_to_one_file_are_one_output() {
    use std::os::unix::fs::symlink;
    let place = Place::new();
    symlink("behind.png", place.path("link.png")).unwrap();
    symlink(".", place.path("here")).unwrap();
    for other in ["behind.png", "here/behind.png", "here/link.png"] {
        refused_first(&place, 2, &quick(&["--out", "link.png", "--dump", other]), "same file as --out link.png");
    }
    place.ok(&quick(&["--out", "link.png"]));
    assert!(fs::symlink_metadata(place.path("link.png")).unwrap().is_symlink());
    assert!(is_png(&place.bytes("behind.png")));
    symlink("b.png", place.path("a.png")).unwrap();
    symlink("a.png", place.path("b.png")).unwrap();
    refused_first(&place, 1, &quick(&["--out", "a.png"]), "in a circle");
}

/// imageflow#622: a line of text in the picture, and success when the output was lost.
#[cfg(unix)]
#[test]
fn standard_output_takes_one_clean_file() {
    let place = Place::new();
    place.ok(&quick(&["--out", "a.png"]));
    let wanted = place.bytes("a.png");
    for out in ["-", "/dev/stdout"] {
        let ended = output(&mut place.command(&quick(&["--out", out, "--dump", "d.safetensors"])));
        assert!(ended.status.success(), "{ended:?}");
        assert!(ended.stdout == wanted, "{out}: {} bytes, not the picture's {}", ended.stdout.len(), wanted.len());
        assert!(text(&ended.stderr).contains("d.safetensors"), "the other file is named all the same");
    }
    assert!(!place.names().contains("-"), "a file of that name is ./-");
    let probe = ["probe", "--module", "text", "--prompt", "a", "--model", MODEL, "--out"];
    place.ok(&[&probe[..], &["t.safetensors"]].concat());
    assert!(output(&mut place.command(&[&probe[..], &["-"]].concat())).stdout == place.bytes("t.safetensors"));
    place.ok(&["resize", "a.png", "r.png", "--size", "8x8"]);
    let resized = output(&mut place.command(&["resize", "a.png", "-", "--size", "8x8"]));
    assert!(resized.stdout == place.bytes("r.png"));
    fs::write(place.path("m.jsonl"), "{\"prompt\": \"a\"}\n").unwrap();
    refused_first(&place, 2, &["generate", "--manifest", "m.jsonl", "--model", MODEL, "--out", "-"], "--out -");
}

#[cfg(unix)]
#[test]
fn lost_output_is_a_failure() {
    let place = Place::new();
    let full = || Stdio::from(fs::OpenOptions::new().write(true).open("/dev/full").expect("Linux has it"));
    for args in [&["plan", "a", "--json"][..], &["doctor"], &["--help"], &["--version"], &quick(&["--out", "-"])] {
        let ended = output(place.command(args).stdout(full()));
        assert_eq!(ended.status.code(), Some(1), "{args:?}");
        assert!(text(&ended.stderr).contains("standard output: No space left"), "{args:?}: {}", text(&ended.stderr));
    }
    // The picture is there; that its name is lost is said.
    assert_eq!(output(place.command(&quick(&["--out", "a.png"])).stdout(full())).status.code(), Some(1));
    assert!(is_png(&place.bytes("a.png")));
    // `| head -1` has read enough, but of a picture nothing may be missing.
    let closed = |args: &[&str]| {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        output(place.command(args).stdout(writer)).status.code()
    };
    assert_eq!(closed(&["plan", "a"]), Some(0));
    assert_eq!(closed(&["--help"]), Some(0));
    assert_eq!(closed(&quick(&["--out", "-"])), Some(1));
}

/// forge#2475, webui#7962: parameters that their reader takes for others.
#[test]
fn a_gallery_reads_the_parameters_as_they_are_meant() {
    let place = Place::new();
    let parameters = |flags: &[&str]| {
        place.ok(&quick(&[&["--out", "a.png"], flags].concat()));
        texts(&place.bytes("a.png")).0
    };
    for (flags, sampler, eta, rng) in [
        (&["--scheduler", "ddim", "--eta", "0.5"][..], "DDIM", Some("0.5"), "CPU"),
        (&["--scheduler", "ddim", "--rng", "torch-cuda"], "DDIM", None, "NV"),
        (&["--scheduler", "ddpm"], "DDIM", Some("1"), "CPU"),
        (&["--scheduler", "euler"], "Euler", None, "CPU"),
        (&["--scheduler", "euler-ancestral"], "Euler a", None, "CPU"),
    ] {
        let parameters = parameters(flags);
        let field = |key| field(&parameters, key);
        assert_eq!(field("Sampler").as_deref(), Some(sampler), "{parameters}");
        assert_eq!(field("Eta DDIM").as_deref(), eta, "{parameters}");
        assert_eq!(field("RNG").as_deref(), Some(rng), "{parameters}");
        // webui's name for the eta of its ancestral samplers.
        assert_eq!(field("Eta"), None, "{parameters}");
    }
}

/// fastsdcpu#235, diffusers#183: another sampler than the model's ran, without a word.
#[test]
fn a_scheduler_that_is_not_here_is_named_with_what_runs() {
    let place = Place::new();
    copy_model(&place.path("model"));
    let config = place.path("model/scheduler/scheduler_config.json");
    let mut json: serde_json::Value = serde_json::from_str(&fs::read_to_string(&config).unwrap()).unwrap();
    let args = ["generate", "a", "--model", "model", "--method", "plain", "--stages", "16x16:1", "--out", "a.png"];
    let mut said = |class: &str, further: &[&str]| {
        json["_class_name"] = class.into();
        fs::write(&config, json.to_string()).unwrap();
        let ended = output(&mut place.command(&[&args[..], further].concat()));
        assert!(ended.status.success(), "{ended:?}");
        text(&ended.stderr).lines().find(|line| line.contains("runs instead")).map(String::from)
    };
    for (class, instead) in
        [("DPMSolverSinglestepScheduler", "dpm++-2m"), ("LMSDiscreteScheduler", "euler"), ("NewScheduler", "ddim")]
    {
        let line = said(class, &[]).unwrap_or_else(|| panic!("nothing is said of {class}"));
        assert!(line.contains(class) && line.contains(instead), "{line}");
        assert_eq!(said(class, &["--scheduler", "euler"]), None, "chosen");
    }
    let own = ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"];
    let multistep = ["UniPCMultistepScheduler", "PNDMScheduler", "DEISMultistepScheduler"];
    for class in own.into_iter().chain(multistep).chain(["LCMScheduler", "HeunDiscreteScheduler"]) {
        assert_eq!(said(class, &[]), None, "{class} runs itself");
    }
}

/// Adds a tensor of zeros to a weight file, and puts `prefix` before every key.
fn rewrite_weights(path: &Path, prefix: &str, further: &[(&str, &[usize])]) {
    let bytes = fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let zeros = vec![0; 4096];
    let mut tensors: Vec<_> = file.tensors().into_iter().map(|(key, view)| (format!("{prefix}{key}"), view)).collect();
    for (key, shape) in further {
        let data = &zeros[..4 * shape.iter().product::<usize>()];
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.to_vec(), data).unwrap();
        tensors.push((key.to_string(), view));
    }
    fs::write(path, safetensors::serialize(tensors, None).unwrap()).unwrap();
}

/// ControlNet#336: a text encoder's file that also holds `logit_scale` and the vision model.
#[test]
fn further_tensors_are_one_warning_and_no_error() {
    let place = Place::new();
    copy_model(&place.path("model"));
    let args = ["--model", "model", "--method", "plain", "--stages", "16x16:2", "--out", "a.png"];
    let generate = [&["generate", "a cat"][..], &args].concat();
    place.ok(&generate);
    let wanted = place.bytes("a.png");
    let (text, unet) = ("model/text_encoder/model.safetensors", "model/unet/diffusion_pytorch_model.safetensors");
    let vision = ["a", "b", "c", "d"].map(|name| format!("vision_model.{name}"));
    let mut further: Vec<(&str, &[usize])> = vision.iter().map(|key| (key.as_str(), &[2, 2][..])).collect();
    further.push(("logit_scale", &[]));
    rewrite_weights(&place.path(text), "", &further);
    let ended = output(&mut place.command(&generate));
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success(), "{said}");
    let warning = format!(
        "warning: {text}: no part of the model uses 5 tensors: logit_scale, vision_model.a, vision_model.b, \
         vision_model.c, ...\n"
    );
    assert_eq!((said.matches(&warning).count(), said.matches("warning").count()), (1, 1), "{said}");
    assert!(place.bytes("a.png") == wanted);
    // In probe as well.
    let probe = ["probe", "--module", "text", "--prompt", "a", "--model", "model", "--out", "t.safetensors"];
    let said = String::from_utf8_lossy(&output(&mut place.command(&probe)).stderr).into_owned();
    assert_eq!(said.matches(&warning).count(), 1, "{said}");
    // More layers than the configuration says are left out as well, as when a clip skip is written into it.
    let config = place.path("model/text_encoder/config.json");
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    json["num_hidden_layers"] = 1.into();
    fs::write(&config, json.to_string()).unwrap();
    let said = String::from_utf8_lossy(&output(&mut place.command(&generate)).stderr).into_owned();
    assert!(said.contains("no part of the model uses 21 tensors: "), "{said}");
    // A prefix before every key, of a compiled and of a distributed model.
    for prefix in ["_orig_mod.", "module.", "model."] {
        let other = place.path(&format!("model{prefix}"));
        copy_model(&other);
        rewrite_weights(&other.join("unet/diffusion_pytorch_model.safetensors"), prefix, &[]);
        rewrite_weights(&other.join("text_encoder/model.safetensors"), prefix, &[]);
        let named = other.to_str().unwrap();
        let ended = output(&mut place.command(&[&generate[..2], &["--model", named], &args[2..]].concat()));
        let said = String::from_utf8_lossy(&ended.stderr);
        assert!(ended.status.success() && !said.contains("warning"), "{said}");
    }
    // Missing ones stay errors.
    rewrite_weights(&place.path(unet), "net.", &[]);
    let message = place.fails(1, &generate);
    let wanted = ["missing, wanted shape", "also missing: ", "net.down_blocks.0.", "which looks like it"];
    wanted.iter().for_each(|part| assert!(message.contains(part), "{part} in: {message}"));
}

/// mochi#119: "rename it" cannot work for an index of shards.
#[test]
fn the_only_variant_is_read_and_named() {
    let place = Place::new();
    copy_model(&place.path("model"));
    let generate =
        ["generate", "a cat", "--model", "model", "--method", "plain", "--stages", "16x16:2", "--out", "a.png"];
    place.ok(&generate);
    let wanted = place.bytes("a.png");
    let unet = place.path("model/unet");
    let weights = fs::read(unet.join("diffusion_pytorch_model.safetensors")).unwrap();
    fs::remove_file(unet.join("diffusion_pytorch_model.safetensors")).unwrap();
    let shard = "diffusion_pytorch_model-00001-of-00001.bf16.safetensors";
    let keys = safetensors::SafeTensors::deserialize(&weights).unwrap();
    let map: serde_json::Map<String, serde_json::Value> =
        keys.names().into_iter().map(|key| (key.to_string(), shard.into())).collect();
    let index = serde_json::json!({"metadata": {}, "weight_map": map});
    fs::write(unet.join(shard), &weights).unwrap();
    fs::write(unet.join("diffusion_pytorch_model.safetensors.index.bf16.json"), index.to_string()).unwrap();
    let vae = place.path("model/vae");
    let name = |variant: &str| vae.join(format!("diffusion_pytorch_model{variant}.safetensors"));
    fs::rename(name(""), name(".non_ema")).unwrap();
    let ended = output(&mut place.command(&generate));
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success(), "{said}");
    assert_eq!(said.matches("read the variant bf16 of unet; the variant non_ema of vae\n").count(), 1, "{said}");
    assert!(place.bytes("a.png") == wanted);
    fs::copy(name(".non_ema"), name(".ema")).unwrap();
    let message = place.fails(1, &generate);
    assert!(message.contains("the variants ema, non_ema"), "{message}");
}

/// sd.cpp#1706, mlxcel#1459: -1 for a random seed, as elsewhere.
#[test]
fn a_random_seed_is_told_and_makes_the_picture_again() {
    let place = Place::new();
    let mut seeds = Vec::new();
    for flags in [&["--seed", "-1"][..], &["--seed=-1"], &["--seed", "random"]] {
        let ended = output(&mut place.command(&quick(&[flags, &["--out", "a.png"]].concat())));
        assert!(ended.status.success(), "{ended:?}");
        let (parameters, json) = texts(&place.bytes("a.png"));
        let seed = json["seed"].as_u64().unwrap();
        assert!(text(&ended.stderr).contains(&format!("seed {seed}")), "{}", text(&ended.stderr));
        assert_eq!(field(&parameters, "Seed"), Some(seed.to_string()));
        assert!(u32::try_from(seed).is_ok());
        seeds.push(seed);
        let drawn = place.bytes("a.png");
        place.ok(&quick(&["--seed", &seed.to_string(), "--out", "a.png"]));
        assert!(drawn == place.bytes("a.png"));
    }
    seeds.dedup();
    assert_eq!(seeds.len(), 3, "the same seed three times");
    // A negative number is a value: what is wrong is its size.
    for (flag, value, wanted) in [("--seed", "-2", "random"), ("--guidance", "-3", "from 0"), ("--steps", "-1", "1000")]
    {
        let message = place.fails(2, &["generate", "x", flag, value]);
        assert!(message.contains(&format!("invalid value '{value}'")) && message.contains(wanted), "{message}");
    }
}

/// forge#2496: a negative prompt without guidance does nothing.
#[test]
fn a_negative_prompt_without_guidance_is_refused() {
    let place = Place::new();
    for guidance in ["1", "0.5"] {
        refused_first(&place, 2, &quick(&["--guidance", guidance, "--negative", "bad"]), "--negative \"bad\"");
    }
    place.ok(&quick(&["--guidance", "1", "--negative", "", "--out", "a.png"]));
    assert!(!texts(&place.bytes("a.png")).0.contains("Negative"));
    let lines = "{\"prompt\": \"a\", \"guidance\": 1, \"negative_prompt\": \"bad\"}\n";
    fs::write(place.path("m.jsonl"), lines).unwrap();
    let many = ["generate", "--manifest", "m.jsonl", "--model", MODEL, "--stages", "16x16:1", "--method", "plain"];
    refused_first(&place, 1, &[&many[..], &["--out", "many"]].concat(), "m.jsonl:1: negative_prompt has no effect");
}

/// ComfyUI#1923: pictures of v-prediction with zero terminal SNR came out overexposed.
#[test]
fn guidance_is_rescaled_where_there_is_guidance() {
    let place = Place::new();
    place.ok(&quick(&["--out", "a.png"]));
    place.ok(&quick(&["--guidance-rescale", "0.7", "--out", "b.png"]));
    let (parameters, json) = texts(&place.bytes("b.png"));
    assert_eq!(field(&parameters, "CFG rescale").as_deref(), Some("0.7"));
    assert_eq!(json["guidance_rescale"], 0.7);
    assert_eq!(texts(&place.bytes("a.png")).1.get("guidance_rescale"), None);
    assert!(place.bytes("a.png") != place.bytes("b.png"));
    let rescaled = ["--guidance", "1", "--guidance-rescale", "0.7"];
    refused_first(&place, 2, &quick(&rescaled), "--guidance-rescale 0.7: has no effect with --guidance 1");
    refused_first(&place, 2, &["plan", "a", "--guidance-rescale", "2"], "from 0 (none) to 1");

    let many = ["generate", "--manifest", "m.jsonl", "--model", MODEL, "--stages", "16x16:2", "--method", "plain"];
    let lines = "{\"prompt\": \"a cat\", \"guidance_rescale\": 0.7, \"seed\": 0}\n";
    fs::write(place.path("m.jsonl"), lines).unwrap();
    place.ok(&[&many[..], &["--out", "many"]].concat());
    assert!(place.bytes("many/000001.png") == place.bytes("b.png"));
    let lines =
        "{\"prompt\": \"a\", \"guidance\": 1}\n{\"prompt\": \"a\", \"guidance\": 1, \"guidance_rescale\": 0.5}\n";
    fs::write(place.path("m.jsonl"), lines).unwrap();
    refused_first(&place, 1, &[&many[..], &["--out", "two"]].concat(), "m.jsonl:2: guidance_rescale 0.5 has no effect");
    let grid = ["grid", "a cat", "--methods", "plain", "--model", MODEL, "--stages", "16x16:2", "--out", "g.png"];
    place.ok(&[&grid[..], &["--guidance-rescale", "0.7"]].concat());
    assert!(texts(&place.bytes("g.png")).0.contains("CFG rescale: 0.7"));
}

/// diffusers#2905: what no sampler can do is said with what can.
#[test]
fn an_epsilon_without_signal_is_refused_with_what_works() {
    let place = Place::new();
    copy_model(&place.path("model"));
    let config = place.path("model/scheduler/scheduler_config.json");
    let json = r#"{"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "prediction_type": "epsilon", "rescale_betas_zero_snr": true, "timestep_spacing": "trailing", "clip_sample": false}"#;
    fs::write(config, json).unwrap();
    let args = ["generate", "a", "--model", "model", "--method", "plain", "--stages", "16x16:2", "--out", "a.png"];
    for sampler in ["ddim", "ddpm", "lcm"] {
        let message = place.fails(1, &[&args[..], &["--scheduler", sampler]].concat());
        for part in ["rescale_betas_zero_snr", "division by 0", "v_prediction", "--scheduler euler"] {
            assert!(message.contains(part), "{part} in: {message}");
        }
    }
    for sampler in ["euler", "euler-ancestral", "dpm++-2m", "dpm++-2m-sde", "unipc", "heun", "pndm", "deis"] {
        place.ok(&[&args[..], &["--scheduler", sampler]].concat());
    }
}

/// DiffStyle#3: models where the hub's tools keep them, and `~` where the shell does not replace it.
#[test]
fn a_model_in_the_hubs_cache_has_its_name() {
    let place = Place::new();
    let cache = place.path("models--acme--tiny");
    copy_model(&cache.join("snapshots/0a1b2c"));
    let model = |folder: &str| {
        place.ok(&[
            "generate",
            "a",
            "--method",
            "plain",
            "--stages",
            "16x16:1",
            "--out",
            "a.png",
            &format!("--model={folder}"),
        ]);
        texts(&place.bytes("a.png")).1["model"].as_str().unwrap().to_string()
    };
    assert_eq!(model("models--acme--tiny"), "acme/tiny", "the only snapshot");
    assert_eq!(model("models--acme--tiny/snapshots/0a1b2c"), "acme/tiny");

    // Of several, the one that main names.
    fs::create_dir_all(cache.join("snapshots/ffffff")).unwrap();
    let message = place.fails(1, &["plan", "a", "--model", "models--acme--tiny"]);
    assert!(message.contains("2 snapshots"), "{message}");
    fs::create_dir_all(cache.join("refs")).unwrap();
    fs::write(cache.join("refs/main"), "0a1b2c\n").unwrap();
    assert_eq!(model("models--acme--tiny"), "acme/tiny");

    fs::create_dir_all(place.path("models--acme--none/snapshots")).unwrap();
    let message = place.fails(1, &["plan", "a", "--model", "models--acme--none"]);
    assert!(message.contains("no snapshot"), "{message}");

    // A plain directory, found from home.
    fs::rename(cache.join("snapshots/0a1b2c"), place.path("tiny")).unwrap();
    for flag in ["--model=~/tiny", "--out=~/at-home/a.png"] {
        let args = if flag.starts_with("--out") { quick(&[flag]) } else { [&["plan", "a"], &[flag][..]].concat() };
        let ended = output(place.command(&args).env("HOME", place.path("")));
        assert!(ended.status.success(), "{ended:?}");
    }
    assert!(is_png(&place.bytes("at-home/a.png")));
    assert!(!place.names().contains("~"));
}
