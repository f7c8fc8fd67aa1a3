//! `megafuse generate`: pictures from a prompt.

use std::path::{Path, PathBuf};
use std::time::Instant;

use megafuse::image::{PngText, encode_png};
use megafuse::pipeline::{self, ModelSource, Pipeline, PlanReport, Request, Size};
use megafuse::{DType, Device, Error, Result};

use super::args::GenerateArgs;
use super::memory::{available_bytes, bytes_text};
use super::output::{self, Target};
use super::progress::{Progress, seconds_text};
use super::{safetensors_file, values};

pub fn run(args: &GenerateArgs) -> Result<()> {
    let request = args.run.request()?;
    let device = args.run.device.open()?;
    let targets = targets(args, &request)?;
    let source = args.run.source();
    let dtype = args.run.dtype_on(&device);

    // Everything that can be wrong with the request or the configuration is found before weights are read.
    let plan = pipeline::plan(&source, dtype, &request)?;
    let available = match &device {
        Device::Cuda(card) => Some(card.memory()?.free_bytes),
        _ => available_bytes(),
    };
    check_memory(&source, dtype, &request, &plan, available)?;

    let begin = Instant::now();
    let name = values::source_name(&source);
    let pipeline = Pipeline::load(source, device.clone(), dtype)?;
    let loading = seconds_text(begin.elapsed().as_secs_f64());
    match &device {
        Device::Cuda(card) => eprintln!("{name}, {dtype} on {device} ({}), loaded in {loading}", card.card()),
        _ => {
            let threads = rayon::current_num_threads();
            eprintln!("{name}, {dtype} on {device}, {threads} threads, loaded in {loading}");
        }
    }

    for (index, (picture, dump)) in targets.iter().enumerate() {
        if targets.len() > 1 {
            eprintln!("picture {} of {}", index + 1, targets.len());
        }
        one_picture(&pipeline, &picture_request(&request, index), picture, dump.as_deref())?;
    }
    Ok(())
}

/// Pictures are made one by one, so that each is on disk as soon as it is done: a picture depends on its own seed only.
fn picture_request(request: &Request, index: usize) -> Request {
    Request { seed: request.seed + index as u64, count: 1, ..request.clone() }
}

fn one_picture(pipeline: &Pipeline, request: &Request, target: &Target, dump: Option<&Path>) -> Result<()> {
    let begin = Instant::now();
    let mut progress = Progress::new(dump.is_some());
    let pictures = pipeline.generate(request, &mut progress)?;
    progress.finish();
    let tensors = progress.tensors.take();
    let picture = pictures.first().ok_or_else(|| Error::config("generate", "the run ended without a picture"))?;
    let text = PngText { parameters: &picture.parameters.text, json: &picture.parameters.json.to_string() };
    let path = target.write(&encode_png(&picture.rgb, picture.width, picture.height, text)?)?;
    let time = seconds_text(begin.elapsed().as_secs_f64());
    eprintln!("{}x{}, seed {}, {time}", picture.width, picture.height, picture.seed);
    output::print_line(path.display());
    if let (Some(path), Some(tensors)) = (dump, tensors) {
        safetensors_file::write(path, &tensors)?;
        output::print_line(path.display());
    }
    Ok(())
}

/// Where each picture and its dump go; all places are checked now.
fn targets(args: &GenerateArgs, request: &Request) -> Result<Vec<(Target, Option<PathBuf>)>> {
    if let Some(out) = &args.out
        && !out.is_dir()
        && out.extension().is_some_and(|extension| !extension.eq_ignore_ascii_case("png"))
    {
        let reason = "pictures are written as PNG; give a name that ends in .png";
        return Err(Error::Request { flag: "--out", value: out.display().to_string(), reason: reason.into() });
    }
    if args.out.is_some() && args.out == args.dump {
        let value = args.dump.as_deref().unwrap_or(Path::new("")).display().to_string();
        return Err(Error::Request { flag: "--dump", value, reason: "is the same file as --out".into() });
    }
    let one = |index: usize| {
        let seed = request.seed + index as u64;
        let picture = Target::picture(args.out.as_deref(), index, request.count, seed);
        let dump = args.dump.as_deref().map(|dump| output::numbered(dump, index, request.count));
        picture.check()?;
        dump.as_deref().map_or(Ok(()), output::check_writable)?;
        Ok((picture, dump))
    };
    (0..request.count).map(one).collect()
}

/// # Errors
/// [`Error::Request`] when the run needs more memory than there is, with a size that fits.
fn check_memory(
    source: &ModelSource,
    dtype: DType,
    request: &Request,
    plan: &PlanReport,
    available: Option<u64>,
) -> Result<()> {
    let Some(available) = available.filter(|&available| plan.peak_bytes > available) else { return Ok(()) };
    let Some(wanted) = plan.stages.last().map(|stage| stage.size) else { return Ok(()) };
    let fits = (1..16).rev().find_map(|sixteenths| {
        let side = |side: usize| (side * sixteenths / 16 / 64 * 64).max(64);
        let size = Size::new(side(wanted.width), side(wanted.height));
        let smaller = Request { size: Some(size), stages: Vec::new(), ..request.clone() };
        pipeline::plan(source, dtype, &smaller).ok().filter(|plan| plan.peak_bytes <= available).map(|_| size)
    });
    let advice = match fits {
        Some(size) => format!("--size {size} would fit"),
        None => "no smaller size of this shape fits either".to_string(),
    };
    let (need, free) = (bytes_text(plan.peak_bytes), bytes_text(available));
    let reason = format!("needs at least {need} of memory in {dtype}, {free} are available; {advice}");
    let flag = if request.stages.is_empty() { "--size" } else { "--stages" };
    Err(Error::Request { flag, value: wanted.to_string(), reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_beyond_the_memory_is_refused_with_figures_and_a_size_that_fits() {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/sd15");
        let (source, dtype) = (ModelSource::Directory(model), DType::F32);
        let request = Request { size: Some(Size::new(1024, 1024)), ..Request::default() };
        let plan = pipeline::plan(&source, dtype, &request).unwrap();
        let check = |available| check_memory(&source, dtype, &request, &plan, available);
        check(None).unwrap();
        check(Some(plan.peak_bytes)).unwrap();
        let message = check(Some(plan.peak_bytes / 2)).unwrap_err().to_string();
        for part in ["--size 1024x1024: needs at least", "of memory in f32", "are available; --size ", " would fit"] {
            assert!(message.contains(part), "{part} in: {message}");
        }
        let message = check(Some(1000)).unwrap_err().to_string();
        assert!(message.contains("no smaller size"), "{message}");
    }
}
