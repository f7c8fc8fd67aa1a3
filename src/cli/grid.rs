//! `megafuse grid`: methods, seeds and prompts side by side in one labelled picture.

use std::collections::HashSet;
use std::fmt;

use clap::ValueEnum;
use megafuse::image::{PngText, encode_png, infotext};
use megafuse::pipeline::{MethodSpec, Pipeline, Request, Size, Upscaler};
use megafuse::{Error, Result};
use serde_json::{Map, Value, json};

use super::canvas::Canvas;
use super::console::say;
use super::manifest::{self, Line};
use super::output::{self, Target};
use super::picture_args::{GridArgs, MethodRun, by_method, conflict};
use super::progress::PicturesProgress;
use super::session::{Costs, Session, batches, tell_unread};
use super::sheet::{Sheet, common_cell, scaled};
use super::values;

/// What a grid varies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ValueEnum)]
pub enum Axis {
    Prompts,
    Methods,
    Seeds,
}

impl Axis {
    /// From the outermost to the innermost row.
    const ALL: [Axis; 3] = [Axis::Prompts, Axis::Methods, Axis::Seeds];
}

/// One of `--methods`.
#[derive(Clone, Copy, Debug)]
pub struct MethodAt {
    pub method: &'static MethodSpec,
    /// In place of the other pictures' size.
    pub size: Option<Size>,
}

impl MethodAt {
    /// `plain`, `plain@64x64`.
    pub fn parse(text: &str) -> std::result::Result<MethodAt, String> {
        let (method, size) = match text.split_once('@') {
            Some((method, size)) => (method, Some(values::library::<Size>(size)?)),
            None => (text, None),
        };
        Ok(MethodAt { method: values::method(method)?, size })
    }
}

impl fmt::Display for MethodAt {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.size {
            Some(size) => write!(f, "{}@{size}", self.method),
            None => write!(f, "{}", self.method),
        }
    }
}

/// A picture of the grid: what makes it and how it describes itself.
struct Cell {
    request: Request,
    parameters: Value,
    size: Size,
    /// In MACs.
    cost: u64,
}

pub fn run(args: &GridArgs) -> Result<()> {
    output::check_png("--out", args.out.as_deref())?;
    if args.run.options.given.contains_key("phases") {
        let reason =
            "a grid shows finished pictures; leave it out, or use generate --manifest to write those of phases";
        return Err(conflict("--phases", "true", reason));
    }
    let grid = Grid::new(args)?;
    args.run.check_effect(&grid.runs(args))?;
    let target = Target::named(args.out.clone(), "megafuse-grid");
    target.check()?;
    let session = Session::open(&args.run)?;
    let cells = grid.cells(args, &session)?;
    let common = common(cells.iter().map(|cell| &cell.parameters));
    let scale = session.planner.pipeline().upscaler().map_or(1, Upscaler::scale);
    let sizes = cells.iter().map(|cell| [cell.size.width, cell.size.height].map(|side| scale * side));
    let mut sheet = Sheet {
        header: grid.header(&common),
        columns: grid.labels(&grid.columns, &cells),
        rows: grid.labels(&grid.rows, &cells),
        cells: Vec::new(),
        cell: common_cell(sizes, args.cell),
    };
    sheet.check()?;

    let batch = cells.first().map_or(Ok(1), |cell| session.batch(args.run.batch, &cell.request, cells.len()))?;
    let pipeline = session.load()?;
    tell_unread(&pipeline, cells.iter().map(|cell| &cell.request))?;
    sheet.cells = pictures(&pipeline, &cells, batch, sheet.cell)?;
    let drawn = sheet.draw();
    let parameters = grid.infotext(&common);
    let json = grid.json(&sheet, &common, &cells).to_string();
    let text = PngText { parameters: &parameters, json: &json };
    let path = target.write(&encode_png(&drawn.rgb, drawn.width, drawn.height, text)?)?;
    say!("{}x{}, {} pictures", drawn.width, drawn.height, sheet.cells.len());
    output::print_name(&path);
    Ok(())
}

fn pictures(pipeline: &Pipeline, cells: &[Cell], batch: usize, cell: [usize; 2]) -> Result<Vec<Canvas>> {
    let mut progress = PicturesProgress::new(cells.len(), cells.iter().map(|cell| cell.cost).sum());
    let mut canvases: Vec<Option<Canvas>> = cells.iter().map(|_| None).collect();
    let requests: Vec<&Request> = cells.iter().map(|cell| &cell.request).collect();
    for group in batches(&requests, batch, |a, b| a.fits_into_batch_of(b)) {
        progress.picture(format!("{:?}", requests[group[0]].prompt), Vec::new());
        let together: Vec<Request> = group.iter().map(|&at| requests[at].clone()).collect();
        let made = pipeline.generate_batch(&together, &mut progress)?;
        for (at, picture) in group.into_iter().zip(made) {
            let picture = Canvas { width: picture.width, height: picture.height, rgb: picture.rgb };
            canvases[at] = Some(scaled(picture, cell)?);
            progress.picture_done(cells[at].cost);
        }
    }
    let missing = || Error::config("grid", "the run ended without a picture");
    canvases.into_iter().map(|canvas| canvas.ok_or_else(missing)).collect()
}

/// A prompt and what a manifest says about it.
struct Subject {
    prompt: String,
    line: Option<Line>,
}

/// The axes' values, and which axes are columns and rows.
struct Grid {
    subjects: Vec<Subject>,
    methods: Vec<MethodAt>,
    /// `None`: each line of the manifest has its own.
    seeds: Option<Vec<u64>>,
    columns: Vec<Axis>,
    rows: Vec<Axis>,
}

/// A place on every axis.
#[derive(Clone, Copy, Default)]
struct Place {
    subject: usize,
    method: usize,
    seed: usize,
}

impl Grid {
    fn new(args: &GridArgs) -> Result<Grid> {
        let columns = args.columns.clone();
        if columns.iter().collect::<HashSet<_>>().len() < columns.len() {
            let names: Vec<String> = columns.iter().map(|axis| format!("{axis:?}").to_lowercase()).collect();
            return Err(conflict("--columns", names.join(","), "each of methods, seeds and prompts at most once"));
        }
        let rows = Axis::ALL.into_iter().filter(|axis| !columns.contains(axis)).collect();
        let subjects: Vec<Subject> = match &args.manifest {
            None => args.prompts.iter().map(|prompt| Subject { prompt: prompt.clone(), line: None }).collect(),
            Some(path) => {
                let lines = manifest::read(path)?;
                if let Some(line) = lines.iter().find(|line| line.method.is_some()) {
                    let reason = "has a method; in a grid the methods are those of --methods";
                    return Err(Error::file(&manifest::place(path, line.number), reason));
                }
                lines.into_iter().map(|line| Subject { prompt: line.prompt.clone(), line: Some(line) }).collect()
            }
        };
        let seeds = match (&args.seeds, &args.manifest) {
            (Some(seeds), _) => Some(seeds.0.clone()),
            (None, None) => Some(vec![0]),
            (None, Some(_)) => None,
        };
        Ok(Grid { subjects, methods: args.methods.clone(), seeds, columns, rows })
    }

    /// The methods and the stages that are named for them.
    fn runs<'a>(&'a self, args: &'a GridArgs) -> Vec<MethodRun<'a>> {
        let stages = args.run.stages();
        let of_subject = |subject: &'a Subject| {
            let of = move |method: &MethodAt| match &subject.line {
                Some(line) => line.run(method.method, stages),
                None => (method.method, stages),
            };
            self.methods.iter().map(of)
        };
        self.subjects.iter().flat_map(of_subject).collect()
    }

    fn length(&self, axis: Axis) -> usize {
        match axis {
            Axis::Prompts => self.subjects.len(),
            Axis::Methods => self.methods.len(),
            Axis::Seeds => self.seeds.as_ref().map_or(1, Vec::len),
        }
    }

    /// Every place on these axes, the last axis fastest.
    fn places(&self, axes: &[Axis]) -> Vec<Place> {
        let mut places = vec![Place::default()];
        for &axis in axes {
            let further = |place: &Place| {
                let mut place = *place;
                (0..self.length(axis)).map(move |at| {
                    match axis {
                        Axis::Prompts => place.subject = at,
                        Axis::Methods => place.method = at,
                        Axis::Seeds => place.seed = at,
                    }
                    place
                })
            };
            places = places.iter().flat_map(further).collect();
        }
        places
    }

    /// By rows.
    fn cells(&self, args: &GridArgs, session: &Session) -> Result<Vec<Cell>> {
        let axes = [&self.rows[..], &self.columns].concat();
        let mut costs = Costs::default();
        let mut one = |place: Place| {
            let request = self.request(place, args, session)?;
            let run = session.planner.pipeline().resolve(&request)?;
            let cost = costs.of(session, &request)?;
            let parameters = session.planner.pipeline().parameters(&request)?.json;
            let size = run.last_stage().size;
            Ok(Cell { request, parameters, size, cost })
        };
        self.places(&axes).into_iter().map(&mut one).collect()
    }

    fn request(&self, place: Place, args: &GridArgs, session: &Session) -> Result<Request> {
        let (subject, wanted) = (&self.subjects[place.subject], self.methods[place.method]);
        // What a method of one stage is compared with.
        let relayed = self.methods.iter().map(|method| method.method).find(|spec| spec.relays);
        let flags = args.run.request(relayed.unwrap_or(wanted.method))?;
        let mut request = match &subject.line {
            Some(line) => line.with_pictures(line.request(&flags, &args.run.options)?)?,
            None => Request { prompt: subject.prompt.clone(), ..flags },
        };
        if let Some(seeds) = &self.seeds {
            request.seed = seeds[place.seed];
        }
        if !wanted.method.relays {
            let run = session.planner.pipeline().resolve(&request)?;
            request.steps = Some(run.scheduler().timesteps().len());
            request.size = Some(run.last_stage().size);
        }
        if wanted.size.is_some() {
            request.size = wanted.size;
        }
        let request = by_method(&request, wanted.method)?;
        Ok(Request { method: args.run.options.of(wanted.method, &request.stages)?, ..request })
    }

    /// Of every column or row: what its axes say there, where they have more than one value.
    fn labels(&self, axes: &[Axis], cells: &[Cell]) -> Vec<Vec<String>> {
        let of =
            |place: &Place| -> Vec<String> { axes.iter().flat_map(|&axis| self.label(axis, *place, cells)).collect() };
        self.places(axes).iter().map(of).collect()
    }

    fn label(&self, axis: Axis, place: Place, cells: &[Cell]) -> Vec<String> {
        let several = self.length(axis) > 1;
        match axis {
            Axis::Prompts if several => {
                let subject = &self.subjects[place.subject];
                let own = self.seeds.is_none().then_some(subject.line.as_ref()).flatten();
                let seed = own.map(|line| format!("seed {}", line.seed(0)));
                [quoted_if_empty(&subject.prompt)].into_iter().chain(seed).collect()
            }
            Axis::Methods if several => {
                let wanted = self.methods[place.method];
                let of_method = |cell: &&Cell| {
                    cell.request.method.name() == wanted.method.name && wanted.size.is_none_or(|size| cell.size == size)
                };
                // Its stages, where all its pictures have the same.
                let stages = common(cells.iter().filter(of_method).map(|cell| &cell.parameters)).remove("stages");
                let stages = stages.map(|stages| stages_text(&stages));
                [wanted.method.to_string()].into_iter().chain(stages).collect()
            }
            Axis::Seeds if several => self.seeds.iter().map(|seeds| format!("seed {}", seeds[place.seed])).collect(),
            _ => Vec::new(),
        }
    }

    fn header(&self, common: &Map<String, Value>) -> Vec<String> {
        let prompt = (self.subjects.len() == 1).then(|| quoted_if_empty(&self.subjects[0].prompt));
        let skip: &[&str] = if self.methods.len() > 1 { &["method", "stages"] } else { &[] };
        prompt.into_iter().chain([common_text(&Value::Object(common.clone()), skip)]).collect()
    }

    /// The `parameters` of the PNG.
    fn infotext(&self, common: &Map<String, Value>) -> String {
        let prompts: Vec<&str> = self.subjects.iter().map(|subject| subject.prompt.as_str()).collect();
        let list = |values: Vec<String>| values.join(" ");
        let text = |key: &str| common.get(key).map(|value| value.as_str().map_or(value.to_string(), String::from));
        let mut fields = vec![("Methods", list(self.methods.iter().map(MethodAt::to_string).collect()))];
        if let Some(seeds) = &self.seeds {
            fields.push(("Seeds", list(seeds.iter().map(u64::to_string).collect())));
        }
        let named = [
            ("Steps", "steps"),
            ("CFG scale", "guidance"),
            ("CFG scale high", "guidance_high"),
            ("CFG rescale", "guidance_rescale"),
            ("Size", "size"),
            ("Model", "model"),
            ("Version", "version"),
        ];
        fields.extend(named.into_iter().filter_map(|(name, key)| Some((name, text(key)?))));
        infotext(&prompts.join("\n"), "", &fields)
    }

    /// Everything: the labels, what all cells have in common, and by rows what tells each from the others.
    fn json(&self, sheet: &Sheet, common: &Map<String, Value>, cells: &[Cell]) -> Value {
        let own = |cell: &Cell| -> Value {
            let all = cell.parameters.as_object().into_iter().flatten();
            all.filter(|(key, _)| !common.contains_key(*key))
                .map(|(key, value)| (key.clone(), value.clone()))
                .collect::<Map<_, _>>()
                .into()
        };
        let rows: Vec<Vec<Value>> =
            cells.chunks(sheet.columns.len().max(1)).map(|row| row.iter().map(own).collect()).collect();
        json!({"grid": {"columns": sheet.columns, "rows": sheet.rows}, "common": common, "cells": rows})
    }
}

fn quoted_if_empty(prompt: &str) -> String {
    if prompt.trim().is_empty() { "(no prompt)".into() } else { prompt.into() }
}

/// The keys that have one value in all of them. The device is left out: it was not asked yet.
fn common<'a>(mut all: impl Iterator<Item = &'a Value>) -> Map<String, Value> {
    let mut common = all.next().and_then(Value::as_object).cloned().unwrap_or_default();
    common.shift_remove("device");
    for other in all {
        common.retain(|key, value| other.get(key.as_str()) == Some(value));
    }
    common
}

fn stages_text(stages: &Value) -> String {
    let stages = stages.as_array().into_iter().flatten().filter_map(Value::as_str);
    stages.collect::<Vec<_>>().join(" ")
}

/// A picture's parameters in one line, without the prompt and the keys to `skip`: `pocket, megafusion 64x64:48
/// 256x256:2, 50 steps, ddim, guidance 3, seed 0, f32, megafuse 0.1.0`.
pub fn common_text(parameters: &Value, skip: &[&str]) -> String {
    let get = |key: &str| if skip.contains(&key) { None } else { parameters.get(key) };
    let text = |key: &str| get(key).map(|value| value.as_str().map_or(value.to_string(), String::from));
    let with =
        |before: &str, key: &str| text(key).filter(|text| !text.is_empty()).map(|text| format!("{before}{text}"));
    let stages = get("stages").map(stages_text);
    let method = match (text("method"), stages) {
        (Some(method), Some(stages)) => Some(format!("{method} {stages}")),
        (method, stages) => method.or(stages),
    };
    let size = if parameters.get("stages").is_some() && !skip.contains(&"stages") { None } else { text("size") };
    let number = |key: &str| get(key).and_then(Value::as_f64);
    let guidance = number("guidance").map(|scale| format!("guidance {scale}"));
    let rescale = number("guidance_rescale").map(|phi| format!("guidance rescale {phi}"));
    let high = number("guidance_high").map(|scale| format!("guidance high {scale}"));
    let eta = number("eta").filter(|&eta| eta != 0.0).map(|eta| format!("eta {eta}"));
    let steps = text("steps").map(|steps| format!("{steps} steps"));
    let parts = [
        text("model"),
        method,
        size,
        steps,
        text("scheduler"),
        eta,
        guidance,
        high,
        rescale,
        with("negative prompt: ", "negative_prompt"),
        with("seed ", "seed"),
        text("dtype"),
        text("version"),
    ];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_with_sizes() {
        let plain = MethodAt::parse("plain@64x48").unwrap();
        assert_eq!((plain.method.name, plain.size), ("plain", Some(Size::new(64, 48))));
        assert_eq!(MethodAt::parse("megafusion++").unwrap().to_string(), "megafusion++");
        assert_eq!(plain.to_string(), "plain@64x48");
        for text in ["", "magic", "plain@", "plain@64", "@64x64"] {
            assert!(MethodAt::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn places_follow_the_order_of_the_axes() {
        let subject = |prompt: &str| Subject { prompt: prompt.into(), line: None };
        let grid = Grid {
            subjects: vec![subject("a"), subject("b")],
            methods: vec![MethodAt::parse("plain").unwrap()],
            seeds: Some(vec![7, 8, 9]),
            columns: vec![Axis::Seeds],
            rows: vec![Axis::Prompts, Axis::Methods],
        };
        let places = |axes: &[Axis]| -> Vec<[usize; 3]> {
            grid.places(axes).iter().map(|place| [place.subject, place.method, place.seed]).collect()
        };
        assert_eq!(places(&[Axis::Seeds]), [[0, 0, 0], [0, 0, 1], [0, 0, 2]]);
        let both = [[0, 0, 0], [0, 0, 1], [0, 0, 2], [1, 0, 0], [1, 0, 1], [1, 0, 2]];
        assert_eq!(places(&[Axis::Prompts, Axis::Methods, Axis::Seeds]), both);
        assert_eq!(grid.labels(&grid.columns, &[]), [["seed 7"], ["seed 8"], ["seed 9"]]);
        assert_eq!(grid.labels(&grid.rows, &[]), [["a"], ["b"]]);
    }

    #[test]
    fn what_cells_share_is_said_once() {
        let cell =
            |seed: u64| json!({"model": "m", "seed": seed, "guidance": 7.5, "stages": ["64x64:2"], "device": "cpu"});
        let (a, b) = (cell(1), cell(2));
        let common = Value::from(common([&a, &b].into_iter()));
        assert_eq!(common, json!({"model": "m", "guidance": 7.5, "stages": ["64x64:2"]}));
        assert_eq!(common_text(&common, &[]), "m, 64x64:2, guidance 7.5");
        assert_eq!(common_text(&common, &["stages"]), "m, guidance 7.5");
        assert_eq!(common_text(&json!({"negative_prompt": "", "eta": 0.0, "size": "8x8"}), &[]), "8x8");
    }
}
