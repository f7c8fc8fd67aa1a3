//! `megafuse upscale`: pictures through a super-resolution network.

use std::path::Path;
use std::time::Instant;

use megafuse::Result;
use megafuse::image::{PngText, encode_png, infotext, read_image, read_png_texts};
use megafuse::pipeline::{Observer, Size, UpscaleOptions, Upscaler};
use serde_json::Value;

use super::args::UpscaleCommand;
use super::console::say;
use super::output::{self, Outputs, Target};
use super::picture_args::{conflict, tiling};
use super::progress::seconds_text;

pub fn run(args: &UpscaleCommand) -> Result<()> {
    output::check_png("--out", args.out.as_deref())?;
    if let Some(out) = args.out.as_deref().filter(|out| args.pictures.len() > 1 && !output::is_folder(out)) {
        let reason = format!("is one file for {} pictures; name a folder, with / at its end", args.pictures.len());
        return Err(conflict("--out", out.display(), reason));
    }
    for picture in &args.pictures {
        read_image(picture)?; // what is no picture is said before any work
    }
    let device = args.device.open()?;
    let dtype = args.dtype.unwrap_or_else(|| UpscaleOptions::usual_dtype(&device));
    let options = UpscaleOptions { file: args.model.clone(), dtype, tiling: tiling(args.tile) };
    let upscaler = Upscaler::open(&options, &device)?;
    upscaler.warnings().iter().for_each(|warning| say!("warning: {warning}"));
    let target = |picture: &Path| {
        let stem = picture.file_stem().unwrap_or_default().to_string_lossy();
        Target::named(args.out.clone(), &format!("{stem}-x{}", upscaler.scale()))
    };
    let targets: Vec<Target> = args.pictures.iter().map(|picture| target(picture)).collect();
    let mut outputs = Outputs::default();
    targets.iter().try_for_each(|target| outputs.target("--out", target))?;
    say!("{}, {dtype} on {device}", upscaler.name());
    for (picture, target) in args.pictures.iter().zip(&targets) {
        let begin = Instant::now();
        let (width, height, rgb) = read_image(picture)?;
        let size = Size::new(width, height);
        let rgb = upscaler.upscale(size, &rgb, &mut Warnings)?;
        let enlarged = upscaler.enlarged(size);
        let (parameters, json) = texts(picture, &upscaler);
        let text = PngText { parameters: &parameters, json: &json };
        let path = target.write(&encode_png(&rgb, enlarged.width, enlarged.height, text)?)?;
        say!("{size} to {enlarged}, {}", seconds_text(begin.elapsed().as_secs_f64()));
        output::print_name(&path);
    }
    Ok(())
}

struct Warnings;

impl Observer for Warnings {
    fn warning(&mut self, message: &str) {
        say!("warning: {message}");
    }
}

/// What the picture says of how it was made, and that it was enlarged; of a picture that says nothing, nothing.
fn texts(picture: &Path, upscaler: &Upscaler) -> (String, String) {
    let texts = read_png_texts(picture).unwrap_or_default(); // no PNG
    let chunk = |keyword: &str| texts.iter().find(|(key, _)| key == keyword).map(|(_, text)| text.clone());
    let mut parameters = chunk("parameters").unwrap_or_default();
    let mut json: Value = chunk("megafuse").and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
    let (mut fields, mut ignored) = (Vec::new(), Value::Object(Default::default()));
    // Once: no command makes a picture that was enlarged twice.
    let once = json.is_object() && json.get("upscale_model").is_none();
    upscaler.describe(&mut fields, if once { &mut json } else { &mut ignored });
    if !parameters.is_empty() {
        let fields: Vec<(&str, String)> = fields.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
        parameters = format!("{parameters}, {}", infotext("", "", &fields));
    }
    (parameters, if once { json.to_string() } else { String::new() })
}
