//! `megafuse generate --manifest`: a picture for every line of a file.

use std::collections::HashMap;
use std::path::Path;
use std::time::Instant;

use megafuse::image::{PngText, encode_png};
use megafuse::pipeline::{
    ControlFiles, IpAdapterFile, IpImage, Lora, ModelFiles, Picture, Pipeline, Request, SizeIds, Stage, TextOptions,
    TextualInversion,
};
use megafuse::runtime::cuda;
use megafuse::{Device, Error, Result};
use serde_json::{Value, json};

use super::console::say;
use super::flags;
use super::generate::{phase_suffix, shown_phases};
use super::ip_args;
use super::manifest::{self, Line, Shard};
use super::method_options::MethodOptions;
use super::output::{self, Target};
use super::picture_args::{GenerateArgs, MethodRun, conflict};
use super::progress::{PhaseFiles, PicturesProgress, seconds_text};
use super::run_folder::{Found, RunFolder};
use super::session::{Costs, Session, batches, tell_unread};

pub fn run(args: &GenerateArgs, manifest: &Path) -> Result<()> {
    if args.picture.count != 1 {
        let reason = "a line of the manifest makes one picture; write a line for each, with its own id and seed";
        return Err(conflict("--count", args.picture.count, reason));
    }
    let lines = manifest::read(manifest)?;
    let spec = args.picture.spec(&args.run);
    let runs: Vec<MethodRun> = lines.iter().map(|line| line.run(spec, args.run.stages())).collect();
    let flags = Flags { request: args.picture.request_beside(&args.run, "", &runs)?, options: &args.run.options };
    let session = Session::open(&args.run)?;
    let (mut costs, lines) = check(&session, manifest, lines, &flags)?;
    let out = args.out.as_deref().ok_or_else(|| conflict("--manifest", manifest.display(), "needs --out, a folder"))?;
    if output::is_stdout(out) {
        return Err(conflict("--out", out.display(), "--manifest writes a folder of pictures, which needs a name"));
    }
    let folder = RunFolder::inspect(out, description(&session, &flags)?, args.resume)?;
    folder.check_names(lines.iter().flat_map(Named::file_names).collect())?;

    let shard = args.shard.unwrap_or(Shard::WHOLE);
    let part: Vec<&Named> = lines.iter().enumerate().filter(|(at, _)| shard.has(*at)).map(|(_, line)| line).collect();
    let todo = missing(&session, &folder, &part, &flags)?;
    let present = part.len() - todo.len();
    if todo.is_empty() {
        folder.begin()?; // a shard without lines, too, leaves its folder
        say!("{} of {} pictures are there already, nothing to make", present, part.len());
        return Ok(());
    }
    output::advise_on_interrupt("; the same command with --resume makes the missing ones");
    let mut item = |named: &Named| {
        let request = flags.of(&session, &named.line)?;
        Ok(Item { named: named.clone(), cost: costs.of(&session, &request)?, request })
    };
    let todo: Vec<Item> = todo.into_iter().map(&mut item).collect::<Result<_>>()?;
    let batch = session.batch(args.run.batch, &todo[0].pictured()?, todo.len())?;
    let pipeline = session.load()?;
    tell_unread(&pipeline, todo.iter().map(|item| &item.request))?;
    let writing = folder.begin()?;
    if writing.shared && shard.is_whole() {
        say!("warning: another run writes into {}; they share the work only with --shard", out.display());
    }
    Pictures { pipeline, folder, batch, manifest, shard }.make(&todo, present)
}

/// What the flags say of every line.
struct Flags<'a> {
    request: Request,
    options: &'a MethodOptions,
}

impl Flags<'_> {
    /// Without the line's own pictures.
    fn of(&self, session: &Session, line: &Line) -> Result<Request> {
        Ok(ip_args::worded(line.request(&self.request, self.options)?, session.planner.pipeline()))
    }
}

/// A line, and how many phases of its picture are written beside it.
#[derive(Clone)]
struct Named {
    line: Line,
    phases: usize,
}

impl Named {
    /// Of all its pictures, those of phases first.
    fn file_names(&self) -> Vec<String> {
        (1..=self.phases).map(|phase| self.line.phase_name(phase)).chain([self.line.file_name()]).collect()
    }
}

/// Every line's request against the model, before weights are read: what each picture costs, and which files each line writes.
///
/// # Errors
/// Those of a request; [`Error::File`]: two lines would write the same file.
fn check(session: &Session, manifest: &Path, lines: Vec<Line>, flags: &Flags) -> Result<(Costs, Vec<Named>)> {
    let (mut costs, mut all) = (Costs::default(), Vec::new());
    for line in lines {
        let request = flags.of(session, &line)?;
        if line.negative_prompt.as_ref().is_some_and(|negative| !negative.is_empty()) && request.guidance <= 1.0 {
            let reason = format!("negative_prompt has no effect with a guidance of {}", request.guidance);
            return Err(Error::file(&manifest::place(manifest, line.number), reason));
        }
        let rescaled = line.guidance.or(line.guidance_rescale).is_some();
        if rescaled && request.guidance_rescale > 0.0 && request.guidance <= 1.0 {
            let (phi, guidance) = (request.guidance_rescale, request.guidance);
            let reason = format!("guidance_rescale {phi} has no effect with a guidance of {guidance}");
            return Err(Error::file(&manifest::place(manifest, line.number), reason));
        }
        let of_line = |error: Error| match error {
            // What the line does not say, the flags do: their error is theirs.
            Error::Request { .. } if line.has_geometry() || !line.control_images.is_empty() => {
                Error::file(&manifest::place(manifest, line.number), flags::error_text(&error))
            }
            other => other,
        };
        let request = line.with_pictures(request).map_err(of_line)?;
        costs.of(session, &request).map_err(of_line)?;
        if !line.control_images.is_empty() {
            session.planner.pipeline().resolve(&request).map_err(of_line)?;
        }
        // Not resolved for nothing: there may be very many lines.
        let phases = match shown_phases(&request.method, 2) {
            0 => 0,
            _ => shown_phases(&request.method, session.planner.pipeline().resolve(&request)?.stages().len()),
        };
        all.push(Named { line, phases });
    }
    let finished: HashMap<String, usize> =
        all.iter().map(|Named { line, .. }| (line.id.to_ascii_lowercase(), line.number)).collect();
    for Named { line, phases } in &all {
        for phase in 1..=*phases {
            let id = format!("{}{}", line.id, phase_suffix(phase));
            if let Some(&other) = finished.get(&id.to_ascii_lowercase()) {
                let reason =
                    format!("id {id:?} is what --phases calls a picture of line {}; choose another", line.number);
                return Err(Error::file(&manifest::place(manifest, other), reason));
            }
        }
    }
    Ok((costs, all))
}

/// Everything but the lines that decides the pictures.
fn description(session: &Session, Flags { request: flags, options }: &Flags) -> Result<Value> {
    let files = ModelFiles::open(session.source())?;
    let stages: Vec<String> = flags.stages.iter().map(Stage::to_string).collect();
    // Cards of one kind make the same pictures; other devices make others, to rounding.
    let device = match session.device() {
        Device::Cuda(card) => {
            let (major, minor) = card.compute_capability();
            format!("{} sm_{major}{minor}", if cuda::is_emulated() { "emu" } else { "cuda" })
        }
        other => other.to_string(),
    };
    let mut description = json!({
        "version": concat!("megafuse ", env!("CARGO_PKG_VERSION")),
        "model": files.name(), "model_digest": files.digest()?,
        "method": flags.method.name(), "size": flags.size.map(|size| size.to_string()), "stages": stages,
        "steps": flags.steps, "guidance": flags.guidance.to_string(), "negative_prompt": flags.negative_prompt.as_deref().unwrap_or_default(),
        "scheduler": flags.scheduler.map(|sampler| sampler.name()), "eta": flags.eta, "sigmas": flags.sigmas.map(|spacing| spacing.to_string()),
        "seed": flags.seed, "rng": flags.rng.name(),
        "dtype": session.dtype().name(), "device": device,
    });
    if flags.guidance_rescale != 0.0 {
        description["guidance_rescale"] = flags.guidance_rescale.to_string().into();
    }
    if let Some(high) = flags.guidance_high {
        description["guidance_high"] = high.to_string().into();
    }
    if !files.loras().is_empty() {
        let lora = |(lora, digest): (&Lora, String)| json!({"name": lora.name(), "weight": lora.weight.to_string(), "digest": digest});
        description["loras"] = files.loras().iter().zip(files.lora_digests()).map(lora).collect();
    }
    if let (Some(resadapter), Some(digest)) = (files.resadapter(), files.resadapter_digest()) {
        let weight = resadapter.weight.to_string();
        description["resadapter"] = json!({"name": resadapter.name(), "weight": weight, "digest": digest});
    }
    if let Some((digests, encoder)) = files.ip_digests()? {
        let of = |(file, digest): (&IpAdapterFile, String)| json!({"name": file.name(), "scale": file.scale.to_string(), "digest": digest});
        description["ip_adapters"] = session.planner.pipeline().ip_adapters().iter().zip(digests).map(of).collect();
        description["ip_encoder"] = encoder.into();
        description["ip_images"] = flags.ip_images.iter().map(IpImage::to_json).collect();
    }
    if !files.embeddings().is_empty() {
        let of = |file: &TextualInversion| json!({"word": file.word(), "digest": file.digest()});
        description["embeddings"] = files.embeddings().iter().map(of).collect();
    }
    if let Some(vae) = session.planner.pipeline().vae_name() {
        description["vae"] = vae.into();
    }
    if let Some(upscaler) = session.planner.pipeline().upscaler() {
        upscaler.describe(&mut Vec::new(), &mut description);
    }
    for (name, value) in session.planner.pipeline().options().named() {
        description[name] = value.into();
    }
    let TextOptions { syntax, long_prompt, clip_skip, t5_length } = flags.text;
    description["prompt_syntax"] = syntax.name().into();
    description["long_prompt"] = long_prompt.name().into();
    description["clip_skip"] = clip_skip.into();
    if let Some(length) = t5_length {
        description["t5_length"] = length.into();
    }
    let SizeIds { original, crop, target } = flags.size_ids;
    for (name, value) in [
        ("original_size", original.map(|size| size.to_string())),
        ("crop", crop.map(|(x, y)| format!("{x},{y}"))),
        ("target_size", target.map(|size| size.to_string())),
    ] {
        if let Some(value) = value {
            description[name] = value.into();
        }
    }
    if let Some(init) = &flags.init_image {
        description["init_image"] = json!({"name": init.picture.name(), "digest": init.picture.digest()});
        description["mask"] =
            init.mask.as_ref().map(|mask| json!({"name": mask.name(), "digest": mask.digest()})).into();
        description["strength"] = init.strength_with(&flags.method).into();
    }
    if !flags.controls.is_empty() {
        let mut controls = Vec::new();
        for (input, path) in flags.controls.iter().zip(&session.planner.pipeline().options().controls) {
            let mut json = input.described(path).1;
            json["digest"] = ControlFiles::open(path)?.digest()?.into();
            controls.push(json);
        }
        description["controls"] = controls.into();
    }
    // Those given are some line's, if not of the method that the flags name.
    for (name, value) in flags.method.options().iter().chain(&options.given) {
        description[name] = value.clone();
    }
    Ok(description)
}

/// The lines whose pictures are not there.
fn missing<'a>(session: &Session, folder: &RunFolder, part: &[&'a Named], flags: &Flags) -> Result<Vec<&'a Named>> {
    let mut todo = Vec::new();
    for &named in part {
        let line = &named.line;
        if !folder.has(&line.file_name()) {
            todo.push(named);
            continue;
        }
        let request = line.with_pictures(flags.of(session, line)?)?;
        let parameters = session.planner.pipeline().parameters(&request)?.json;
        match folder.find(line, &parameters)? {
            Found::Picture if named.file_names().iter().all(|name| folder.has(name)) => {}
            Found::Picture => todo.push(named),
            Found::Damaged => {
                say!("warning: {} is no whole PNG and is made again", folder.picture(line).display());
                todo.push(named);
            }
        }
    }
    Ok(todo)
}

/// A picture to make.
struct Item {
    named: Named,
    /// Without the line's own pictures.
    request: Request,
    /// In MACs.
    cost: u64,
}

impl Item {
    fn pictured(&self) -> Result<Request> {
        self.named.line.with_pictures(self.request.clone())
    }

    fn fits_into_batch_of(&self, other: &Item) -> bool {
        self.named.line.control_images == other.named.line.control_images
            && self.request.fits_into_batch_of(&other.request)
    }
}

struct Pictures<'a> {
    pipeline: Pipeline,
    folder: RunFolder,
    /// Pictures that are made at once, at most.
    batch: usize,
    manifest: &'a Path,
    shard: Shard,
}

impl Pictures<'_> {
    /// `todo`: the pictures to make; `present`: how many are there already.
    fn make(&self, todo: &[Item], present: usize) -> Result<()> {
        let failed = self.folder.path().join(self.shard.file_name("failed", "jsonl"));
        // Of an earlier run; its lines are tried again.
        match std::fs::remove_file(&failed) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(&failed, error)),
            _ => {}
        }
        let (begin, mut failures) = (Instant::now(), Vec::new());
        let mut progress = PicturesProgress::new(todo.len(), todo.iter().map(|item| item.cost).sum());
        for group in batches(todo, self.batch, Item::fits_into_batch_of) {
            let items: Vec<&Item> = group.iter().map(|&at| &todo[at]).collect();
            match self.together(&items, &mut progress, &failed, &mut failures) {
                Ok(()) => {}
                Err(error) => {
                    progress.finish();
                    let made = progress.done() - failures.len();
                    say!("{made} pictures made, {} there before; --resume makes the others", present);
                    return Err(error);
                }
            }
        }
        progress.finish();
        let (made, seconds) = (todo.len() - failures.len(), begin.elapsed().as_secs_f64());
        let time = seconds_text(seconds);
        let rate = progress.rate_text();
        let whole = made + present;
        say!(
            "{whole} pictures in {}: {made} made in {time} ({rate}), {present} there before",
            self.folder.path().display()
        );
        match failures.first() {
            None => Ok(()),
            Some(first) => {
                let reason =
                    format!("{} of {} pictures could not be made; the first: {first}", failures.len(), todo.len());
                Err(Error::file(&failed, reason))
            }
        }
    }

    /// Makes pictures in one batch. Where one comes out not finite, each is made alone, so that the others are not lost.
    fn together(
        &self,
        items: &[&Item],
        progress: &mut PicturesProgress,
        failed: &Path,
        failures: &mut Vec<String>,
    ) -> Result<()> {
        let place = |item: &Item| manifest::place(self.manifest, item.named.line.number).display().to_string();
        let requests: Vec<Request> = items.iter().map(|item| item.pictured()).collect::<Result<_>>()?;
        let phases = items.iter().zip(&requests).map(|(item, request)| {
            let names = item.named.file_names();
            let targets =
                names.iter().take(item.named.phases).map(|name| Target::Chosen(self.folder.path().join(name)));
            PhaseFiles::new(&self.pipeline, request, &targets.collect::<Vec<_>>())
        });
        progress.picture(place(items[0]), phases.collect::<Result<_>>()?);
        match (self.pipeline.generate_batch(&requests, progress), items) {
            (Ok(pictures), _) => {
                for (item, picture) in items.iter().zip(&pictures) {
                    self.write(&item.named.line, picture, progress)?;
                    progress.picture_done(item.cost);
                }
                Ok(())
            }
            // The numbers of this picture, not the machine: the others may well come out.
            (Err(error @ Error::NonFinite { .. }), [item]) => {
                let record = json!({"line": item.named.line.number, "id": item.named.line.id, "error": flags::error_text(&error)});
                output::append_line(failed, &record.to_string())?;
                progress.line(&format!("{}: {}", place(item), flags::error_text(&error)));
                failures.push(flags::error_text(&error));
                progress.picture_done(item.cost);
                Ok(())
            }
            (Err(Error::NonFinite { .. }), items) => {
                items.iter().try_for_each(|item| self.together(&[item], progress, failed, failures))
            }
            (Err(error), _) => Err(error),
        }
    }

    fn write(&self, line: &Line, picture: &Picture, progress: &mut PicturesProgress) -> Result<()> {
        let text = PngText { parameters: &picture.parameters.text, json: &picture.parameters.json.to_string() };
        let path = self.folder.picture(line);
        output::replace(&path, &encode_png(&picture.rgb, picture.width, picture.height, text)?)?;
        progress.suspend(|| output::print_line(path.display()));
        Ok(())
    }
}
