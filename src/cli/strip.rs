//! `megafuse generate --strip`: a run stage by stage, side by side.

use std::collections::BTreeMap;

use megafuse::image::{PngText, encode_png, to_bytes};
use megafuse::pipeline::{Picture, Stage};
use megafuse::{Error, Result};

use super::canvas::Canvas;
use super::safetensors_file::{Array, Values};
use super::sheet::{Sheet, common_cell, scaled};

/// Pixels, for all pictures of a strip together.
const WIDEST: usize = 30_000;

/// The strip of a run as a PNG: for every relay that shows pictures its decoded x0 and what the upsampler made of it, then the picture.
/// `tensors`: `relay<k>.decoded` and `relay<k>.upsampled`, `[1, 3, H, W]` in [-1, 1], not clamped.
///
/// # Errors
/// [`Error::Config`]: a tensor is missing; [`Error::NonFinite`].
pub fn png(picture: &Picture, tensors: &BTreeMap<String, Array>, stages: &[Stage], upsampler: &str) -> Result<Vec<u8>> {
    let all: usize = stages.iter().map(|stage| stage.steps).sum();
    let (mut columns, mut pictures, mut done) = (Vec::new(), Vec::new(), 0);
    for (index, stage) in stages.iter().enumerate() {
        done += stage.steps;
        let of_stage = |what: &str| vec![format!("stage {} {}", index + 1, stage.size), format!("{what} {done}/{all}")];
        let Some(next) = stages.get(index + 1) else {
            columns.push(of_stage("step"));
            continue;
        };
        let relay = index + 1;
        if !tensors.contains_key(&format!("relay{relay}.decoded")) {
            continue; // the run began later, or enlarged latents
        }
        pictures.push(canvas(tensors, &format!("relay{relay}.decoded"))?);
        columns.push(of_stage("x0 at step"));
        pictures.push(canvas(tensors, &format!("relay{relay}.upsampled"))?);
        columns.push(vec![format!("relay {relay} {}", next.size), upsampler.to_string()]);
    }
    pictures.push(Canvas { width: picture.width, height: picture.height, rgb: picture.rgb.clone() });

    // Side by side they must not be wider than a picture can be.
    let widest = WIDEST / pictures.len();
    let sizes = || pictures.iter().map(|picture| [picture.width, picture.height]);
    let cell = match common_cell(sizes(), None) {
        [width, height] if width.max(height) > widest => common_cell(sizes(), Some(widest)),
        cell => cell,
    };
    let cells = pictures.into_iter().map(|picture| scaled(picture, cell)).collect::<Result<Vec<_>>>()?;
    let prompt = picture.parameters.json["prompt"].as_str().unwrap_or_default();
    let header = vec![prompt.to_string(), super::grid::common_text(&picture.parameters.json, &["size", "stages"])];
    let sheet = Sheet { header, columns, rows: vec![Vec::new()], cells, cell };
    let drawn = sheet.draw();
    let text = PngText { parameters: &picture.parameters.text, json: &picture.parameters.json.to_string() };
    encode_png(&drawn.rgb, drawn.width, drawn.height, text)
}

/// `[1, 3, H, W]` as bytes.
fn canvas(tensors: &BTreeMap<String, Array>, name: &str) -> Result<Canvas> {
    match tensors.get(name) {
        Some(Array { shape, values: Values::F32(values) }) if shape.len() == 4 && shape[..2] == [1, 3] => {
            let (height, width) = (shape[2], shape[3]);
            let pixel = |at: usize| [0, 1, 2].map(|channel| values[channel * height * width + at]);
            let interleaved: Vec<f32> = (0..height * width).flat_map(pixel).collect();
            Ok(Canvas { width, height, rgb: to_bytes(&interleaved)? })
        }
        _ => Err(Error::config("--strip", format!("the run did not show its {name}"))),
    }
}
