//! `megafuse bench generate`: whole pictures in the form of MLPerf's text-to-image test (SDXL, 20 Euler steps, guidance 8).

use std::time::Instant;

use megafuse::pipeline::{Event, LoadOptions, Method, ModelSource, Observer, Picture, Pipeline, Request, Sampler};
use megafuse::runtime::cuda;
use megafuse::{Device, Result};
use serde_json::json;

use super::args::RunArgs;
use super::numbers::Samples;
use super::results::SCHEMA;
use crate::cli::check::{describe, driver};
use crate::cli::console::say;
use crate::cli::output::print_line;
use crate::cli::values;

/// As different as captions are: their length decides nothing, all are padded to the text encoder's context.
const PROMPTS: [&str; 4] = [
    "a lighthouse on a rocky coast at dusk, oil painting",
    "two dogs playing in the snow",
    "a bowl of fruit next to an open window, soft morning light",
    "an empty street in an old town after the rain",
];

pub fn run(args: &RunArgs) -> Result<()> {
    let device = args.device.open()?;
    let emulated = matches!(device, Device::Cuda(_)) && cuda::is_emulated();
    let source = match &args.random {
        Some(shapes) => ModelSource::Random(shapes.clone()),
        None => values::source(args.model.as_deref()),
    };
    let pipeline = Pipeline::load_with(source.clone(), LoadOptions::new(device.clone(), args.dtype))?;
    pipeline.warnings().iter().for_each(|warning| say!("warning: {warning}"));
    let cache = args.cache.cache()?;
    let name = values::source_name(&source);
    let (title, card) = match &device {
        Device::Cuda(card) => (describe(card), card.card().to_string()),
        _ => {
            let name = format!("cpu, {} threads", rayon::current_num_threads());
            (name.clone(), name)
        }
    };
    let mut what = format!("{} Euler steps, guidance {}", args.steps, args.guidance);
    if let Some(cache) = &cache {
        what += &format!(", {} with {}", cache.kind(), cache.options_text());
    }
    if !args.json {
        print_line(title);
        print_line(format!("{name}, {}, {what}", args.dtype));
        if emulated {
            print_line("no performance figures: the times of the emulated card say nothing about a card");
        } else {
            let header = ["batch", "a batch takes", "pictures/s", "text", "steps", "one step", "decode"];
            let [batch, time, rate, text, steps, step, decode] = header;
            print_line(format!("{batch:>5} {time:>14} {rate:>11} {text:>11} {steps:>12} {step:>11} {decode:>11}"));
        }
    }
    for &batch in &args.batch {
        let requests: Vec<Request> = (0..batch)
            .map(|index| {
                Ok(Request {
                    prompt: PROMPTS[index % PROMPTS.len()].into(),
                    method: Method::named("plain")?,
                    size: args.size,
                    steps: Some(args.steps),
                    scheduler: Some(Sampler::Euler),
                    guidance: args.guidance,
                    seed: index as u64,
                    batch,
                    cache: cache.clone(),
                    ..Request::suited_to(&source)
                })
            })
            .collect::<Result<_>>()?;
        let mut made = None;
        let mut runs = Vec::new();
        // Of each picture: how many of its evaluations the network made.
        let mut computed = Vec::new();
        // The first fills pools and records graphs; the emulated card runs no second time.
        for run in 0..if emulated { 1 } else { args.runs + 1 } {
            let mut phases = Phases::new();
            let pictures = pipeline.generate_batch(&requests, &mut phases)?;
            let seconds = phases.end();
            made = pictures.first().map(|picture| format!("{}x{}", picture.width, picture.height));
            let of = |picture: &Picture| picture.parameters.json["cache_computed"].clone();
            computed = pictures.iter().map(of).filter(|computed| !computed.is_null()).collect();
            if run > 0 {
                runs.push(seconds);
            }
        }
        let size = made.unwrap_or_default();
        let mut line = json!({
            "kind": "generate", "schema": SCHEMA, "model": name, "dtype": args.dtype.name(), "size": size,
            "steps": args.steps, "guidance": args.guidance, "sampler": "euler", "batch": batch, "card": card,
            "driver": if matches!(device, Device::Cuda(_)) { driver() } else { String::new() }, "emulated": emulated,
        });
        if let Some(cache) = &cache {
            line["cache"] = cache.kind().name().into();
            line["cache_options"] = cache.options_text().into();
            line["cache_computed"] = computed.clone().into();
        }
        if emulated {
            line["ran"] = true.into();
            print_line(if args.json { line.to_string() } else { format!("{batch:>5} pictures of {size} ran") });
            continue;
        }
        let of = |pick: fn(&Seconds) -> f64| Samples::new(runs.iter().map(pick).collect());
        let all = of(|run| run.all);
        let [text, steps, decode] = [of(|run| run.text), of(|run| run.steps), of(|run| run.decode)].map(|s| s.median());
        let rate = batch as f64 / all.median();
        if args.json {
            line["pictures_per_second"] = rate.into();
            line["seconds"] = all.median().into();
            line["phases"] = json!({ "text": text, "steps": steps, "decode": decode });
            line["runs"] = all.to_json();
            print_line(line);
        } else {
            let ms = |seconds: f64| format!("{:.2} ms", seconds * 1e3);
            let (time, step) = (ms(all.median()), ms(steps / args.steps as f64));
            let [text, steps, decode] = [text, steps, decode].map(ms);
            print_line(format!("{batch:>5} {time:>14} {rate:>11.3} {text:>11} {steps:>12} {step:>11} {decode:>11}"));
            if !computed.is_empty() {
                let computed: Vec<&str> = computed.iter().filter_map(|computed| computed.as_str()).collect();
                print_line(format!("      evaluations by the network: {}", computed.join(", ")));
            }
        }
    }
    Ok(())
}

/// Of one batch.
struct Seconds {
    all: f64,
    text: f64,
    steps: f64,
    decode: f64,
}

/// When the parts of a run begin, by the host's clock: of a card it is at most two steps ahead.
struct Phases {
    began: Instant,
    steps: Option<Instant>,
    decode: Option<Instant>,
}

impl Phases {
    fn new() -> Phases {
        Phases { began: Instant::now(), steps: None, decode: None }
    }

    /// The pictures are in the host's memory.
    fn end(&self) -> Seconds {
        let end = Instant::now();
        let steps = self.steps.unwrap_or(self.began);
        let decode = self.decode.unwrap_or(end);
        Seconds {
            all: (end - self.began).as_secs_f64(),
            text: (steps - self.began).as_secs_f64(),
            steps: decode.saturating_duration_since(steps).as_secs_f64(),
            decode: (end - decode).as_secs_f64(),
        }
    }
}

impl Observer for Phases {
    fn event(&mut self, event: &Event) {
        match event {
            Event::StageBegins { .. } if self.steps.is_none() => self.steps = Some(Instant::now()),
            Event::Decode => self.decode = Some(Instant::now()),
            _ => {}
        }
    }
}
