//! `megafuse generate`: pictures from a prompt.

use std::path::{Path, PathBuf};
use std::time::Instant;

use megafuse::Result;
use megafuse::image::{PngText, encode_png};
use megafuse::ops::profile as ops_profile;
use megafuse::pipeline::{Choices, Method, Pipeline, PlanReport, Request, text_of};

use super::console::say;
use super::from;
use super::output::{self, Outputs, Target};
use super::picture_args::{GenerateArgs, conflict};
use super::progress::{Keep, PhaseFiles, Progress, seconds_text};
use super::session::{Session, tell_unread};
use super::{batch, bench, ip_args, profile, safetensors_file, strip};

pub fn run(args: &GenerateArgs) -> Result<()> {
    if let Some(manifest) = &args.manifest {
        return batch::run(args, manifest);
    }
    let mut request = args.picture.request(&args.run, args.prompt.as_deref().unwrap_or_default())?;
    if let Some(path) = &args.choices {
        request.choices = Choices::read(path, request.method.spec())?;
    }
    let session = match &args.profile {
        Some(path) => Session::on(&args.run, profile::device(args.run.device, path)?)?,
        None => Session::open(&args.run)?,
    };
    let request = ip_args::worded(request, session.planner.pipeline());
    if let Some(picture) = &args.from {
        let parameters = session.planner.pipeline().parameters(&request)?.json;
        from::compare(picture, &parameters, &session.device().to_string(), args.run.model.as_deref())?;
    }
    // Everything that can be wrong with the request or the configuration is found before weights are read.
    let plan = session.check(&request)?;
    check_strip(args, &request, &plan)?;
    if let Some(path) = &args.record_shapes {
        bench::write_workload(path, &session, &request)?;
    }
    let targets = targets(args, &request, plan.stages.len())?;
    let batch = session.batch(args.run.batch, &request, targets.len())?;
    let device = session.device().clone();
    let pipeline = session.load()?;
    if args.profile.is_some() {
        ops_profile::start_on(&device)?;
    }
    tell_unread(&pipeline, std::iter::once(&request))?;
    for (index, files) in targets.chunks(batch).enumerate() {
        let first = index * batch;
        if targets.len() > 1 {
            match files.len() {
                1 => say!("picture {} of {}", first + 1, targets.len()),
                n => say!("pictures {} to {} of {}", first + 1, first + n, targets.len()),
            }
        }
        make(&pipeline, &request, first, files, &plan)?;
    }
    match &args.profile {
        Some(path) => profile::report(path, &device, &ops_profile::stop_spans()?),
        None => Ok(()),
    }
}

/// Where the files of one picture go.
pub struct Files {
    picture: Target,
    dump: Option<PathBuf>,
    strip: Option<PathBuf>,
    /// The pictures of phases before the last.
    phases: Vec<Target>,
}

impl Files {
    /// The picture of a run of so many stages, and those of its phases where they are wanted. The places are checked.
    ///
    /// # Errors
    /// As [`Outputs::target`]; [`Error::Request`](megafuse::Error::Request): there is nothing beside standard output.
    pub fn new(picture: Target, request: &Request, stages: usize, outputs: &mut Outputs) -> Result<Files> {
        outputs.target("--out", &picture)?;
        let mut phases = Vec::new();
        for phase in 1..=shown_phases(&request.method, stages) {
            let Some(target) = picture.beside(&phase_suffix(phase)) else {
                let reason = "the picture goes to standard output, and there is nothing beside it; name a file";
                return Err(conflict("--phases", "true", reason));
            };
            outputs.target("--phases", &target)?;
            phases.push(target);
        }
        Ok(Files { picture, dump: None, strip: None, phases })
    }
}

/// Phases before the last whose pictures are wanted, of a run of so many stages.
pub fn shown_phases(method: &Method, stages: usize) -> usize {
    let wanted = method.option("phases").and_then(serde_json::Value::as_bool) == Some(true);
    if wanted { stages.saturating_sub(1) } else { 0 }
}

/// What the name of a phase's picture has beyond that of the whole.
pub fn phase_suffix(phase: usize) -> String {
    format!("-phase{phase}")
}

/// Makes the pictures from number `first` on in one batch and writes them: so each is on disk as soon as it is done.
pub fn make(pipeline: &Pipeline, request: &Request, first: usize, files: &[Files], plan: &PlanReport) -> Result<()> {
    let begin = Instant::now();
    let keep = match &files[0] {
        Files { dump: Some(_), .. } => Keep::All,
        Files { strip: Some(_), .. } => Keep::Pictures,
        _ => Keep::Nothing,
    };
    let of = |index: usize| Request { seed: request.seed + (first + index) as u64, count: 1, ..request.clone() };
    let requests: Vec<Request> = (0..files.len()).map(of).collect();
    let phases = requests.iter().zip(files).map(|(request, files)| PhaseFiles::new(pipeline, request, &files.phases));
    let mut progress = Progress::new(keep).with_phases(phases.collect::<Result<_>>()?);
    let pictures = pipeline.generate_batch(&requests, &mut progress)?;
    progress.finish();
    let time = seconds_text(begin.elapsed().as_secs_f64());
    let mut tensors = std::mem::take(&mut progress.tensors);
    tensors.resize_with(files.len(), Default::default);
    for ((picture, files), tensors) in pictures.iter().zip(files).zip(&tensors) {
        let text = PngText { parameters: &picture.parameters.text, json: &picture.parameters.json.to_string() };
        let path = files.picture.write(&encode_png(&picture.rgb, picture.width, picture.height, text)?)?;
        say!("{}x{}, seed {}, {time}", picture.width, picture.height, picture.seed);
        output::print_name(&path);
        if let Some(path) = &files.dump {
            safetensors_file::write(path, tensors)?;
            output::print_name(path);
        }
        if let Some(path) = &files.strip {
            let upsampler = request.method.option("upsampler").map(text_of).unwrap_or_default();
            output::replace(path, &strip::png(picture, tensors, &plan.stages, &upsampler)?)?;
            output::print_name(path);
        }
    }
    Ok(())
}

/// Where each picture and what belongs to it go; all places are checked now.
fn targets(args: &GenerateArgs, request: &Request, stages: usize) -> Result<Vec<Files>> {
    output::check_png("--out", args.out.as_deref())?;
    output::check_png("--strip", args.strip.as_deref())?;
    let mut outputs = Outputs::default();
    let one = |index: usize| {
        let seed = request.seed + index as u64;
        let picture = Target::picture(args.out.as_deref(), index, request.count, seed);
        let files = Files::new(picture, request, stages, &mut outputs)?;
        let mut place = |flag, path: Option<&Path>| -> Result<Option<PathBuf>> {
            let path = path.map(|path| output::numbered(path, index, request.count));
            path.as_deref().map_or(Ok(()), |path| outputs.file(flag, path))?;
            Ok(path)
        };
        Ok(Files {
            dump: place("--dump", args.dump.as_deref())?,
            strip: place("--strip", args.strip.as_deref())?,
            ..files
        })
    };
    (0..request.count).map(one).collect()
}

/// # Errors
/// [`Error::Request`]: a strip of a run without relays would be the picture.
fn check_strip(args: &GenerateArgs, request: &Request, plan: &PlanReport) -> Result<()> {
    match &args.strip {
        Some(strip) if plan.stages.len() < 2 => {
            let reason = "this run has one stage and no relay to show; choose megafusion and a larger --size";
            Err(conflict("--strip", strip.display(), reason))
        }
        Some(strip) if request.method.option("upsampler").is_none() => {
            let reason = format!("{} has no relay to show; choose megafusion", request.method);
            Err(conflict("--strip", strip.display(), reason))
        }
        _ => Ok(()),
    }
}
