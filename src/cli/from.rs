//! `--from PICTURE.png`: a picture's own text becomes the flags that make it again. What the user says beside it stands.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use clap::ArgMatches;
use clap::parser::ValueSource;
use megafuse::image::{Infotext, read_png_texts};
use megafuse::pipeline::{HubName, METHODS, Method, MethodSpec, OptionKind, Sampler, SigmaSpacing, hub_name, text_of};
use megafuse::{Error, Result};
use serde_json::{Map, Value};

use super::console::say;

/// A flag that the picture's text stands for: `--size=512x512`.
#[derive(Debug, PartialEq)]
struct Flag {
    /// Its name in clap, which is that of the flag with `_` for `-`.
    id: &'static str,
    /// `None`: a switch.
    value: Option<String>,
}

/// What a picture says about how it was made.
#[derive(Debug, Default)]
struct Recipe {
    prompt: String,
    flags: Vec<Flag>,
    method: Option<&'static MethodSpec>,
    /// ORG/NAME, or the name of a directory or file; `None`: the model inside the program.
    model: Option<String>,
    /// Files that the user must name: the flag that is missing, and what it should be.
    files: Vec<(&'static str, String)>,
    /// What was not read.
    unread: Vec<String>,
}

/// The arguments with what the picture of `--from` says in their place; `None` without that flag.
///
/// # Errors
/// [`Error::File`] naming the picture: no PNG, no text of a run in it, a value that is none; the model, a LoRA or another
/// file that made it is not named.
pub fn expanded(matches: &ArgMatches) -> Result<Option<(PathBuf, Vec<OsString>)>> {
    let Some((command, matches)) = matches.subcommand().filter(|(name, _)| ["generate", "plan"].contains(name)) else {
        return Ok(None);
    };
    let Some(path) = matches.get_one::<PathBuf>("from").cloned() else { return Ok(None) };
    let recipe = read(&path)?;
    let given = |id: &str| matches.value_source(id) == Some(ValueSource::CommandLine);
    let mut args: Vec<OsString> = vec!["megafuse".into(), command.into()];
    args.extend(recipe.arguments(&path, matches, given)?.into_iter().map(OsString::from));
    args.extend(std::env::args_os().skip(2));
    if !given("prompt") {
        args.extend(["--".into(), OsString::from(&recipe.prompt)]);
    }
    if !recipe.unread.is_empty() {
        say!("warning: {}: not read: {}", path.display(), recipe.unread.join("; "));
    }
    Ok(Some((path, args)))
}

/// The flags made a command that clap refuses: the text is none of a run.
pub fn wrong(path: &Path, error: &clap::Error) -> Error {
    let text = error.to_string();
    let first = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
    Error::file(path, format!("its text does not make a run: {first}"))
}

impl Recipe {
    /// The flags that the user has not decided, directly or by another flag.
    fn arguments(&self, path: &Path, matches: &ArgMatches, given: impl Fn(&str) -> bool) -> Result<Vec<String>> {
        let mut args = Vec::new();
        let method = matches.get_one::<String>("method").filter(|_| given("method"));
        let method = method.and_then(|name| MethodSpec::find(name).ok());
        // Of another method only what was chosen holds, not what the first one does by itself.
        let usual = self.method.filter(|spec| method.is_some_and(|method| method.name != spec.name));
        let usual = usual.and_then(|spec| Method::named(spec.name).ok());
        let unguided = given("guidance") && matches.get_one::<f32>("guidance").is_some_and(|&scale| scale <= 1.0);
        let by_another = |flag: &Flag| match flag.id {
            "stages" => given("size") || given("steps") || method.is_some_and(|method| !method.relays),
            "size" | "steps" => given("stages"),
            "sigmas" | "eta" => given("scheduler"),
            "cache_options" => given("cache"),
            "negative" | "guidance_rescale" => unguided,
            // Of another method or other stages the run itself says whether there is anything to split.
            "guidance_high" => unguided || ["method", "size", "stages"].into_iter().any(&given),
            id => match METHODS.iter().any(|spec| spec.option(id).is_some()) {
                false => false,
                true => {
                    let usual = usual.as_ref().and_then(|usual| usual.option(id)).map(text_of);
                    // Sizes planned anew have no parts.
                    let of_part = || self.method.is_some_and(|method| method.part_of(id).is_some());
                    method.is_some_and(|method| method.option(id).is_none())
                        || (of_part() && (given("size") || given("steps")))
                        || (usual.is_some() && usual == flag.value)
                        || (usual.as_deref() == Some("true") && flag.value.is_none())
                }
            },
        };
        for flag in self.flags.iter().filter(|flag| !given(flag.id) && !by_another(flag)) {
            let name = flag.id.replace('_', "-");
            args.push(match &flag.value {
                Some(value) => format!("--{name}={value}"),
                None => format!("--{name}"),
            });
        }
        match &self.model {
            Some(name) if !given("model") => match name.parse::<HubName>() {
                Ok(name) => args.push(format!("--model={name}")),
                Err(_) => {
                    let reason = format!("was made with the model {name:?}; name its directory or file: --model PATH");
                    return Err(Error::file(path, reason));
                }
            },
            _ => {}
        }
        let missing: Vec<&str> =
            self.files.iter().filter(|(id, _)| !given(id)).map(|(_, wanted)| wanted.as_str()).collect();
        if !missing.is_empty() {
            return Err(Error::file(path, format!("was made with files that are not named: {}", missing.join(" "))));
        }
        Ok(args)
    }

    fn flag(&mut self, id: &'static str, value: impl ToString) {
        self.flags.push(Flag { id, value: Some(value.to_string()) });
    }
}

/// The prompt that a picture's text says it was made with, and the negative one; `None`: it says nothing, or is no PNG.
pub fn words(path: &Path) -> Option<(String, Option<String>)> {
    let recipe = read(path).ok()?;
    let negative = recipe.flags.iter().find(|flag| flag.id == "negative").and_then(|flag| flag.value.clone());
    Some((recipe.prompt, negative))
}

/// # Errors
/// As [`expanded`].
fn read(path: &Path) -> Result<Recipe> {
    let texts = texts(path)?;
    let chunk = |keyword: &str| texts.iter().find(|(key, _)| key == keyword).map(|(_, text)| text.as_str());
    if let Some(text) = chunk("megafuse") {
        let json: Value = serde_json::from_str(text)
            .map_err(|error| Error::file(path, format!("its text megafuse is not JSON ({error})")))?;
        return match json {
            Value::Object(json) if json.contains_key("grid") => {
                Err(Error::file(path, "is a grid of pictures; a picture of its own carries what made it"))
            }
            Value::Object(json) => of_json(path, &json),
            other => Err(Error::file(path, format!("its text megafuse is {other}, expected a JSON object"))),
        };
    }
    if let Some(text) = chunk("invokeai_metadata") {
        return match serde_json::from_str(text) {
            Ok(Value::Object(json)) => Ok(of_invokeai(&json)),
            _ => Err(Error::file(path, "its text invokeai_metadata is not a JSON object")),
        };
    }
    match chunk("parameters").map(Infotext::parse) {
        Some(Some(text)) => Ok(of_infotext(&text)),
        Some(None) => Err(Error::file(path, "its text parameters has no line like \"Steps: 20, Sampler: DDIM, ...\"")),
        None if texts.is_empty() => Err(Error::file(path, NO_TEXT)),
        None => {
            let names: Vec<&str> = texts.iter().map(|(key, _)| key.as_str()).collect();
            Err(Error::file(path, format!("{NO_TEXT}; its texts are: {}", names.join(", "))))
        }
    }
}

const NO_TEXT: &str = "says nothing about how it was made: this PNG has no text megafuse or parameters (editing or \
                       uploading a picture often removes it)";

/// Keyword and text of a PNG's text chunks.
///
/// # Errors
/// [`Error::File`]: what the file is instead; [`Error::Io`].
fn texts(path: &Path) -> Result<Vec<(String, String)>> {
    if path.is_dir() {
        return Err(Error::file(path, "is a folder; expected a PNG"));
    }
    let mut begin = Vec::new();
    let file = File::open(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Error::file(path, "no such file; expected a PNG"),
        _ => Error::io(path, error),
    })?;
    file.take(8).read_to_end(&mut begin).map_err(|error| Error::io(path, error))?;
    match begin.as_slice() {
        [] => Err(Error::file(path, "the file is empty; expected a PNG")),
        [0xff, 0xd8, ..] => Err(Error::file(path, "is a JPEG, whose text is not read; expected the PNG that was made")),
        b"\x89PNG\r\n\x1a\n" => read_png_texts(path).map_err(|error| match error {
            Error::File { reason, .. } if reason.starts_with("not a PNG") => {
                Error::file(path, "is truncated: the PNG ends in the middle")
            }
            error => error,
        }),
        _ => Err(Error::file(path, "is no PNG")),
    }
}

/// Keys whose value is that of a flag: key, flag.
const SAME: [(&str, &str); 29] = [
    ("cache", "cache"),
    ("cache_options", "cache_options"),
    ("size", "size"),
    ("steps", "steps"),
    ("scheduler", "scheduler"),
    ("sigmas", "sigmas"),
    ("eta", "eta"),
    ("guidance", "guidance"),
    ("guidance_high", "guidance_high"),
    ("guidance_rescale", "guidance_rescale"),
    ("seed", "seed"),
    ("strength", "strength"),
    ("rng", "rng"),
    ("dtype", "dtype"),
    ("weights", "weights"),
    ("vae_dtype", "vae_dtype"),
    ("text_encoder_device", "text_encoder_device"),
    ("upscale_dtype", "upscale_dtype"),
    ("vae_partition", "vae_partition"),
    ("clip_skip", "clip_skip"),
    ("t5_length", "t5_length"),
    ("prompt_syntax", "prompt_syntax"),
    ("long_prompt", "long_prompt"),
    ("noise_level", "noise_level"),
    ("upscale_guidance", "upscale_guidance"),
    ("upscale_method", "upscale_method"),
    ("upscale_stages", "upscale_stages"),
    ("original_size", "original_size"),
    ("target_size", "target_size"),
];

/// A picture of this program.
///
/// # Errors
/// [`Error::File`]: a key that is missing, or is not what it should be.
fn of_json(path: &Path, json: &Map<String, Value>) -> Result<Recipe> {
    let wrong = |key: &str, wanted: &str| match json.get(key) {
        None => Error::file(path, format!("its text megafuse has no {key}, expected {wanted}")),
        Some(value) => Error::file(path, format!("its text megafuse has {key} {value}, expected {wanted}")),
    };
    let text = |key: &str| json.get(key).and_then(Value::as_str).ok_or_else(|| wrong(key, "a text"));
    let mut recipe = Recipe { prompt: text("prompt")?.into(), ..Recipe::default() };
    match (text("negative_prompt")?, json.get("negative_prompt_is_empty")) {
        ("", None | Some(Value::Bool(false) | Value::Null)) => {}
        (negative, _) => recipe.flag("negative", negative),
    }
    for (key, id) in SAME {
        match json.get(key) {
            None | Some(Value::Null) => {}
            Some(Value::String(value)) => recipe.flag(id, value),
            Some(Value::Number(value)) => recipe.flag(id, value),
            Some(_) => return Err(wrong(key, "a text or a number")),
        }
    }
    if json.get("seed").is_none_or(|seed| seed.as_u64().is_none()) {
        return Err(wrong("seed", "a whole number from 0"));
    }
    let stages = json.get("stages").and_then(Value::as_array).filter(|stages| !stages.is_empty());
    let stages: Option<Vec<&str>> = stages.map(|stages| stages.iter().map(Value::as_str).collect()).unwrap_or_default();
    recipe.flag("stages", stages.ok_or_else(|| wrong("stages", "a list of WxH:STEPS"))?.join(","));
    if let Some(crop) = json.get("crop") {
        recipe.flag("crop", crop.as_str().ok_or_else(|| wrong("crop", "X,Y"))?);
    }
    let method = MethodSpec::find(text("method")?).map_err(|_| {
        let names: Vec<&str> = METHODS.iter().map(|spec| spec.name).collect();
        wrong("method", &format!("one of {}", names.join(", ")))
    })?;
    recipe.flag("method", method);
    recipe.method = Some(method);
    for option in method.options {
        match (option.kind, json.get(option.name)) {
            (_, None | Some(Value::Null)) | (OptionKind::Switch, Some(Value::Bool(false))) => {}
            (OptionKind::Switch, Some(Value::Bool(true))) => recipe.flags.push(Flag { id: option.name, value: None }),
            (_, Some(value @ (Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_)))) => {
                recipe.flag(option.name, text_of(value));
            }
            _ => return Err(wrong(option.name, "a value of this option")),
        }
    }
    recipe.model = Some(text("model")?.to_string()).filter(|name| name != INSIDE);

    let list = |key: &str| match json.get(key) {
        None | Some(Value::Null) => Ok(&[][..]),
        Some(Value::Array(list)) => Ok(list.as_slice()),
        Some(_) => Err(wrong(key, "a list")),
    };
    for lora in list("loras")? {
        let (Some(name), Some(weight)) = (lora["name"].as_str(), lora["weight"].as_f64()) else {
            return Err(wrong("loras", "names and weights"));
        };
        recipe.files.push(("lora", format!("--lora {name}.safetensors:{weight}")));
    }
    if let Some(resadapter) = json.get("resadapter") {
        let (Some(name), Some(weight)) = (resadapter["name"].as_str(), resadapter["weight"].as_f64()) else {
            return Err(wrong("resadapter", "a name and a weight"));
        };
        recipe.files.push(("resadapter", format!("--resadapter {name}:{weight}")));
    }
    for adapter in list("ip_adapters")? {
        let (Some(name), Some(scale)) = (adapter["name"].as_str(), adapter["scale"].as_f64()) else {
            return Err(wrong("ip_adapters", "names and scales"));
        };
        recipe.files.push(("ip_adapter", format!("--ip-adapter {name}.safetensors:{scale}")));
    }
    let images = list("ip_images")?;
    let masked = images.iter().any(|image| image["mask"].is_string());
    for image in images {
        let name = image["name"].as_str().ok_or_else(|| wrong("ip_images", "names of files"))?;
        recipe.files.push(("ip_image", format!("--ip-image {name}")));
        if masked {
            let mask = image["mask"].as_str().unwrap_or("none");
            recipe.files.push(("ip_mask", format!("--ip-mask {mask}")));
        }
    }
    for word in list("embeddings")? {
        let word = word.as_str().ok_or_else(|| wrong("embeddings", "words"))?;
        recipe.files.push(("embedding", format!("--embedding FILE (of the word {word:?})")));
    }
    if let Some(vae) = json.get("vae") {
        let vae = vae.as_str().ok_or_else(|| wrong("vae", "a name"))?;
        recipe.files.push(("vae", format!("--vae {vae}.safetensors")));
    }
    if let Some(name) = json.get("upscale_model") {
        let name = name.as_str().ok_or_else(|| wrong("upscale_model", "a name"))?;
        recipe.files.push(("upscale_model", format!("--upscale-model {name}.pth")));
    }
    if let Some(choices) = json.get("choices") {
        let choices = choices.as_str().ok_or_else(|| wrong("choices", "a name"))?;
        recipe.files.push(("choices", format!("--choices {choices}")));
    }
    controls(list("controls")?, &mut recipe).ok_or_else(|| wrong("controls", "names, pictures and scales"))?;
    if let Some(name) = json.get("second_model") {
        let name = name.as_str().ok_or_else(|| wrong("second_model", "a name"))?;
        recipe.files.push(("upscale_model", format!("--upscale-model {name}")));
    }
    for (key, flag) in [("init_image", "--init-image"), ("mask", "--mask"), ("lowres", "--lowres")] {
        if let Some(name) = json.get(key) {
            let name = name.as_str().ok_or_else(|| wrong(key, "the name of a file"))?;
            recipe.files.push((key, format!("{flag} {name}")));
        }
    }
    let known = |key: &str| {
        let others = [
            "prompt",
            "negative_prompt",
            "negative_prompt_is_empty",
            "stages",
            "crop",
            "method",
            "choices",
            "cache_computed",
            "upscale_model",
            "second_model",
            "lowres",
            "init_image",
            "mask",
            "controls",
        ];
        SAME.iter().any(|(same, _)| *same == key)
            || others.contains(&key)
            || COMPARED.contains(&key)
            || key == "device"
            || method.option(key).is_some()
    };
    recipe.unread.extend(json.iter().filter(|(key, _)| !known(key)).map(|(key, value)| format!("{key}: {value}")));
    Ok(recipe)
}

/// The ControlNets that are to be named, with their pictures, and what else is said of them. `None`: not what is written.
fn controls(list: &[Value], recipe: &mut Recipe) -> Option<()> {
    let guesses = list.iter().any(|control| control["guess"] == Value::Bool(true));
    if guesses {
        recipe.flags.push(Flag { id: "control_guess", value: None });
    }
    for control in list {
        let (name, image) = (control["name"].as_str()?, control["image"].as_str()?);
        recipe.files.push(("control", format!("--control {name}")));
        recipe.files.push(("control_image", format!("--control-image {image}")));
        for (key, id) in [("scale", "control_scale"), ("start", "control_start"), ("end", "control_end")] {
            recipe.flag(id, control[key].as_f64()?);
        }
        if list.iter().any(|control| control.get("canny").is_some()) {
            recipe.flag("control_canny", control.get("canny").map_or(Some("none"), Value::as_str)?);
        }
    }
    Some(())
}

/// How the model inside the program is called.
const INSIDE: &str = "pocket";

/// Of stable-diffusion-webui or a program that writes as it does: what can be read of it.
fn of_infotext(text: &Infotext) -> Recipe {
    let ours = text.field("Version").is_some_and(|version| version.starts_with("megafuse"));
    let mut recipe = Recipe { prompt: text.prompt.clone(), ..Recipe::default() };
    if !text.negative.is_empty() {
        recipe.flag("negative", &text.negative);
    }
    let mut spacing = None;
    let mut sampler = None;
    for (key, value) in &text.fields {
        let (value, unread) = (value.as_str(), format!("{key}: {value}"));
        match key.as_str() {
            "Steps" => recipe.flag("steps", value),
            "CFG scale" => recipe.flag("guidance", value),
            "CFG scale high" if ours => recipe.flag("guidance_high", value),
            "CFG rescale" if ours => recipe.flag("guidance_rescale", value),
            "Seed" => recipe.flag("seed", value),
            "Size" => recipe.flag("size", value),
            "Clip skip" => recipe.flag("clip_skip", value),
            "Sampler" => match sampler_named(value) {
                Some((named, named_spacing)) => (sampler, spacing) = (Some(named), spacing.or(named_spacing)),
                None => recipe.unread.push(unread),
            },
            "Schedule type" => match SigmaSpacing::ALL.into_iter().find(|spacing| spacing.webui_name() == value) {
                Some(named) => spacing = Some(named),
                None if value == "Automatic" => {}
                None => recipe.unread.push(unread),
            },
            "RNG" => match value {
                "CPU" => recipe.flag("rng", "torch-cpu"),
                "NV" | "GPU" => recipe.flag("rng", "torch-cuda"),
                _ => recipe.unread.push(unread),
            },
            "Model" => recipe.model = Some(value.to_string()).filter(|name| name != INSIDE),
            "Model hash" | "Version" => {}
            "Dtype" if ours => recipe.flag("dtype", value),
            "Prompt syntax" if ours => recipe.flag("prompt_syntax", value),
            "T5 length" if ours => recipe.flag("t5_length", value),
            "Long prompt" if ours => recipe.flag("long_prompt", value),
            "Stages" if ours => recipe.flag("stages", value.replace(' ', ",")),
            "Method" if ours => match MethodSpec::find(value) {
                Ok(method) => recipe.method = Some(method),
                Err(_) => recipe.unread.push(unread),
            },
            _ => recipe.unread.push(unread),
        }
    }
    if let Some(sampler) = sampler {
        recipe.flag("scheduler", sampler);
        if let Some(spacing) = spacing.filter(|_| sampler.has_sigmas()) {
            recipe.flag("sigmas", spacing);
        }
    }
    if !ours {
        // It reads emphasis and long prompts always, and draws on the card unless it says otherwise.
        recipe.flag("prompt_syntax", "a1111");
        recipe.flag("long_prompt", "chunk");
        if text.field("RNG").is_none() {
            recipe.flag("rng", "torch-cuda");
        }
        let (prompt, networks) = without_networks(&recipe.prompt);
        recipe.prompt = prompt;
        let networks = networks.into_iter().map(|tag| format!("{tag} (--lora FILE:WEIGHT)"));
        recipe.unread.extend(networks);
    }
    let method = recipe.method.or_else(|| MethodSpec::find("plain").ok());
    if let Some(method) = method {
        recipe.flag("method", method);
    }
    recipe.method = method;
    recipe
}

/// Of InvokeAI: what can be read of its metadata, the switches of HiDiffusion included (its pull request 8787). The shifts of
/// windows are not in it, so they are drawn anew.
fn of_invokeai(json: &Map<String, Value>) -> Recipe {
    let text = |key: &str| json.get(key).and_then(Value::as_str).unwrap_or_default();
    let number = |key: &str| json.get(key).filter(|value| value.is_number()).map(text_of);
    let is_on = |key: &str| json.get(key) == Some(&Value::Bool(true));
    let mut recipe = Recipe { prompt: text("positive_prompt").into(), ..Recipe::default() };
    let mut read = vec!["positive_prompt", "app_version", "generation_mode"];
    let negative = "negative_prompt";
    if !text(negative).is_empty() {
        recipe.flag("negative", text(negative));
    }
    read.push(negative);
    for (key, id) in [
        ("seed", "seed"),
        ("steps", "steps"),
        ("cfg_scale", "guidance"),
        ("cfg_rescale_multiplier", "guidance_rescale"),
    ] {
        if let Some(value) = number(key) {
            recipe.flag(id, value);
            read.push(key);
        }
    }
    if let (Some(width), Some(height)) = (number("width"), number("height")) {
        recipe.flag("size", format!("{width}x{height}"));
        read.extend(["width", "height"]);
    }
    if let Some((sampler, spacing)) = invokeai_sampler(text("scheduler")) {
        recipe.flag("scheduler", sampler);
        if let Some(spacing) = spacing {
            recipe.flag("sigmas", spacing);
        }
        read.push("scheduler");
    }
    match text("rand_device") {
        "cpu" => recipe.flag("rng", "torch-cpu"),
        "cuda" => recipe.flag("rng", "torch-cuda"),
        _ => {}
    }
    read.push("rand_device");
    // There it counts the layers that are left out.
    if let Some(skipped) = json.get("clip_skip").and_then(Value::as_u64) {
        if skipped > 0 {
            recipe.flag("clip_skip", skipped + 1);
        }
        read.push("clip_skip");
    }
    let model = json.get("model").and_then(|model| model["name"].as_str());
    recipe.model = model.map(String::from);
    read.push("model");

    let hidiffusion = is_on("hidiffusion");
    read.push("hidiffusion");
    let switches = [("hidiffusion_raunet", "raunet"), ("hidiffusion_window_attn", "windows")];
    let ratios = [("hidiffusion_t1_ratio", "t1"), ("hidiffusion_t2_ratio", "t2")];
    for (key, id) in switches {
        if let Some(Value::Bool(on)) = json.get(key).filter(|_| hidiffusion) {
            recipe.flag(id, on);
        }
        read.push(key);
    }
    for (key, id) in ratios {
        // None is there, as here, what suits the model.
        if let Some(share) = number(key).filter(|_| hidiffusion && is_on("hidiffusion_raunet")) {
            recipe.flag(id, share);
        }
        read.push(key);
    }
    recipe.method = MethodSpec::find(if hidiffusion { "hidiffusion" } else { "plain" }).ok();
    if let Some(method) = recipe.method {
        recipe.flag("method", method);
    }
    if hidiffusion && json.get("hidiffusion_window_attn") != Some(&Value::Bool(false)) {
        recipe.unread.push("the shifts of the windows, which are drawn anew".into());
    }
    if !["", "txt2img", "sdxl_txt2img"].contains(&text("generation_mode")) {
        recipe.unread.push(format!("generation_mode: {}", text("generation_mode")));
    }
    let says_nothing = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        _ => false,
    };
    let others = json.iter().filter(|(key, value)| !read.contains(&key.as_str()) && !says_nothing(value));
    recipe.unread.extend(others.map(|(key, value)| format!("{key}: {value}")));
    recipe
}

/// A sampler by InvokeAI's name, with `_k` for Karras sigmas.
fn invokeai_sampler(name: &str) -> Option<(Sampler, Option<SigmaSpacing>)> {
    let (name, spacing) = match name.strip_suffix("_k") {
        Some(name) => (name, Some(SigmaSpacing::Karras)),
        None => (name, None),
    };
    let sampler = match name {
        "ddim" => Sampler::Ddim,
        "ddpm" => Sampler::Ddpm,
        "euler" => Sampler::Euler,
        "euler_a" => Sampler::EulerAncestral,
        "dpmpp_2m" => Sampler::Dpm2M,
        "dpmpp_2m_sde" => Sampler::Dpm2MSde,
        "unipc" => Sampler::UniPc,
        "lcm" => Sampler::Lcm,
        "heun" => Sampler::Heun,
        "pndm" => Sampler::Pndm,
        "deis" => Sampler::Deis,
        _ => return None,
    };
    Some((sampler, spacing))
}

/// The sampler of webui's name; before version 1.9 the spacing stood at its end. Without one it was the sampler's own.
fn sampler_named(name: &str) -> Option<(Sampler, Option<SigmaSpacing>)> {
    let sampler = |name: &str| Sampler::ALL.into_iter().find(|sampler| sampler.webui_name() == name);
    let spacings = [SigmaSpacing::Karras, SigmaSpacing::Exponential];
    let ended = spacings.into_iter().find_map(|spacing| {
        let name = name.strip_suffix(spacing.webui_name())?.strip_suffix(' ')?;
        Some((sampler(name)?, Some(spacing)))
    });
    ended.or_else(|| Some((sampler(name)?, None)))
}

/// A prompt without its `<lora:NAME:WEIGHT>` and the like, and these.
fn without_networks(prompt: &str) -> (String, Vec<String>) {
    let (mut kept, mut tags, mut rest) = (String::new(), Vec::new(), prompt);
    while let Some(start) = rest.find('<') {
        let tag = rest[start..].find('>').map(|end| &rest[start..start + end + 1]);
        let is_network = |tag: &&str| ["<lora:", "<lyco:", "<hypernet:"].iter().any(|begin| tag.starts_with(begin));
        let tag = tag.filter(is_network);
        let next = start + tag.map_or(1, str::len);
        kept.push_str(&rest[..if tag.is_some() { start } else { next }]);
        tags.extend(tag.map(String::from));
        rest = &rest[next..];
    }
    kept.push_str(rest);
    (kept.trim().to_string(), tags)
}

/// Keys that say what a run was made of: another value makes another picture.
const COMPARED: [&str; 12] = [
    "model",
    "loras",
    "resadapter",
    "ip_adapters",
    "ip_images",
    "embeddings",
    "vae",
    "version",
    "init_image_digest",
    "lowres_digest",
    "mask_digest",
    "control_files",
];

/// One warning where the run that `parameters` describe is of other things than the picture's.
///
/// # Errors
/// As [`expanded`].
pub fn compare(path: &Path, parameters: &Value, device: &str, model: Option<&Path>) -> Result<()> {
    let texts = texts(path)?;
    let chunk = |keyword: &str| texts.iter().find(|(key, _)| key == keyword).map(|(_, text)| text.as_str());
    let mut differences = Vec::new();
    if let Some(picture) = chunk("megafuse").and_then(|text| serde_json::from_str::<Value>(text).ok()) {
        for key in COMPARED {
            let (theirs, ours) =
                (picture.get(key).unwrap_or(&Value::Null), parameters.get(key).unwrap_or(&Value::Null));
            if theirs != ours {
                differences.push(format!("{key} {} where it had {}", shown(ours), shown(theirs)));
            }
        }
        let kind = |device: &str| device.split(':').next().unwrap_or_default().to_string();
        match picture["device"].as_str() {
            Some(theirs) if kind(theirs) != kind(device) => {
                differences.push(format!("device {device} where it had {theirs} (which differ by rounding)"));
            }
            _ => {}
        }
    } else if let Some(text) = chunk("parameters").and_then(Infotext::parse) {
        let name = |name: &str| name.trim_end_matches(".safetensors").to_ascii_lowercase();
        let ours = parameters["model"].as_str().unwrap_or_default();
        // The hash of a file tells what its name does not.
        let hash = match (text.field("Model hash"), model.filter(|model| model.is_file() && hub_name(model).is_none()))
        {
            (Some(theirs), Some(model)) if !theirs.is_empty() => Some((theirs, megafuse::hub::sha256_of(model)?)),
            _ => None,
        };
        match hash {
            Some((theirs, ours)) if ours.starts_with(&theirs.to_ascii_lowercase()) => {}
            Some((theirs, ours)) => {
                differences.push(format!("a model of the hash {} where it had {theirs}", &ours[..10]));
            }
            None => match text.field("Model") {
                Some(theirs) if name(theirs) != name(ours) => {
                    differences.push(format!("the model {ours} where it had {theirs}"));
                }
                _ => {}
            },
        }
    }
    if !differences.is_empty() {
        say!("warning: {}: this run has {}", path.display(), differences.join(", "));
    }
    Ok(())
}

fn shown(value: &Value) -> String {
    match value {
        Value::Null => "none".into(),
        value => text_of(value),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn value<'a>(recipe: &'a Recipe, id: &str) -> Option<&'a str> {
        recipe.flags.iter().find(|flag| flag.id == id).and_then(|flag| flag.value.as_deref())
    }

    #[test]
    fn what_webui_writes_is_read() {
        let text = "a (cat:1.2) <lora:style:0.8> <3\nNegative prompt: blurry\nSteps: 20, Sampler: DPM++ 2M Karras, CFG scale: \
                    7.5, Seed: 12, Size: 512x768, Model hash: 6ce0161689, Model: v1-5, Denoising strength: 0.5, Clip skip: 2, \
                    Hires upscale: 2, Version: v1.6.0";
        let recipe = of_infotext(&Infotext::parse(text).unwrap());
        assert_eq!(recipe.prompt, "a (cat:1.2)  <3");
        for (id, wanted) in [
            ("negative", "blurry"),
            ("steps", "20"),
            ("scheduler", "dpm++-2m"),
            ("sigmas", "karras"),
            ("guidance", "7.5"),
            ("seed", "12"),
            ("size", "512x768"),
            ("clip_skip", "2"),
            ("rng", "torch-cuda"),
            ("prompt_syntax", "a1111"),
            ("long_prompt", "chunk"),
            ("method", "plain"),
        ] {
            assert_eq!(value(&recipe, id), Some(wanted), "{id}");
        }
        assert_eq!(recipe.model.as_deref(), Some("v1-5"));
        let unread = recipe.unread.join("; ");
        assert_eq!(unread, "Denoising strength: 0.5; Hires upscale: 2; <lora:style:0.8> (--lora FILE:WEIGHT)");
    }

    #[test]
    fn what_invokeai_writes_is_read() {
        let metadata = json!({
            "app_version": "6.12.0", "generation_mode": "sdxl_txt2img", "positive_prompt": "a fox", "negative_prompt": "red",
            "positive_style_prompt": "", "seed": 7, "steps": 30, "cfg_scale": 7.5, "cfg_rescale_multiplier": 0, "width": 2048,
            "height": 1536, "scheduler": "dpmpp_2m_k", "rand_device": "cpu", "clip_skip": 1, "loras": [], "seamless_x": false,
            "model": {"name": "Juggernaut XL", "base": "sdxl"}, "hidiffusion": true, "hidiffusion_raunet": true,
            "hidiffusion_window_attn": true, "hidiffusion_t1_ratio": 0.35, "hidiffusion_t2_ratio": null, "hrf": true,
        });
        let of = |metadata: &Value| of_invokeai(metadata.as_object().unwrap());
        let recipe = of(&metadata);
        assert_eq!((recipe.prompt.as_str(), recipe.model.as_deref()), ("a fox", Some("Juggernaut XL")));
        for (id, wanted) in [
            ("negative", "red"),
            ("seed", "7"),
            ("steps", "30"),
            ("guidance", "7.5"),
            ("guidance_rescale", "0"),
            ("size", "2048x1536"),
            ("scheduler", "dpm++-2m"),
            ("sigmas", "karras"),
            ("rng", "torch-cpu"),
            ("clip_skip", "2"),
            ("method", "hidiffusion"),
            ("raunet", "true"),
            ("windows", "true"),
            ("t1", "0.35"),
        ] {
            assert_eq!(value(&recipe, id), Some(wanted), "{id}");
        }
        assert_eq!(value(&recipe, "t2"), None, "what suits the model");
        assert_eq!(recipe.unread, ["the shifts of the windows, which are drawn anew", "hrf: true"]);

        let mut without = metadata.clone();
        without["hidiffusion_raunet"] = json!(false);
        assert_eq!((value(&of(&without), "raunet"), value(&of(&without), "t1")), (Some("false"), None));
        without["hidiffusion"] = json!(false);
        assert_eq!((value(&of(&without), "method"), value(&of(&without), "windows")), (Some("plain"), None));
        assert_eq!(of(&without).unread, ["hrf: true"]);
    }

    #[test]
    fn samplers_have_webuis_names() {
        // There a flow's is called Euler too: the model decides.
        for sampler in Sampler::ALL.into_iter().filter(|&sampler| sampler != Sampler::FlowEuler) {
            assert_eq!(sampler_named(sampler.webui_name()), Some((sampler, None)), "{sampler}");
        }
        assert_eq!(sampler_named("Euler Karras"), Some((Sampler::Euler, Some(SigmaSpacing::Karras))));
        assert_eq!(sampler_named("DPM adaptive"), None);
    }

    #[test]
    fn keys_that_are_wrong_are_named() {
        let good = json!({"prompt": "a", "negative_prompt": "", "model": "pocket", "method": "plain", "size": "64x64",
                          "stages": ["64x64:5"], "steps": 5, "seed": 1});
        let read = |json: &Value| of_json(Path::new("p.png"), json.as_object().unwrap());
        assert_eq!(value(&read(&good).unwrap(), "stages"), Some("64x64:5"));
        for (key, wrong, part) in [
            ("prompt", Value::Null, "has prompt null, expected a text"),
            ("prompt", json!(5), "has prompt 5, expected a text"),
            ("seed", json!(-1), "has seed -1, expected a whole number from 0"),
            ("stages", json!("64x64:5"), "has stages \"64x64:5\", expected a list"),
            ("stages", json!([5]), "has stages [5], expected a list"),
            ("method", json!("magic"), "has method \"magic\", expected one of plain"),
            ("size", json!([64, 64]), "has size [64,64], expected a text"),
            ("loras", json!("x"), "has loras \"x\", expected a list"),
            ("loras", json!([{"name": "x"}]), "expected names and weights"),
        ] {
            let mut json = good.clone();
            json[key] = wrong;
            let message = read(&json).unwrap_err().to_string();
            assert!(message.starts_with("p.png: ") && message.contains(part), "{part} in: {message}");
        }
        // Of several pictures a mask is one's own: the others' place is kept.
        let mut json = good.clone();
        json["ip_images"] = json!([{"name": "a.png"}, {"name": "b.png", "mask": "m.png"}]);
        let files: Vec<String> = read(&json).unwrap().files.into_iter().map(|(_, flag)| flag).collect();
        assert_eq!(files, ["--ip-image a.png", "--ip-mask none", "--ip-image b.png", "--ip-mask m.png"]);
        let mut json = good.clone();
        json.as_object_mut().unwrap().remove("model");
        assert!(read(&json).unwrap_err().to_string().contains("has no model, expected a text"));
        let mut json = good;
        json["hires"] = json!(2);
        assert_eq!(read(&json).unwrap().unread, ["hires: 2"]);
    }
}
