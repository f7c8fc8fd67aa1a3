//! The thread that owns the model: it takes pictures from the queue, makes them in batches, and outlives what goes wrong.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use megafuse::image::{PngText, encode_png};
use megafuse::pipeline::{Event, Observer, Picture, Pipeline, Request, Size};
use megafuse::{Error, Result};

use super::super::console::say;
use super::body::api_text;
use super::jobs::{Jobs, Made};
use super::queue::Waiting;

/// One device with models, of which some are in memory.
pub struct Engine<L> {
    pub jobs: Arc<Jobs>,
    /// Pictures in one batch, at most.
    pub batch: usize,
    /// Models in memory at a time, at least 1.
    pub kept: usize,
    /// The model that is there from the beginning.
    pub first: Arc<str>,
    /// Loads a model by its name: when it is asked for, and again where a panic may have left it half changed.
    pub load: L,
}

impl<L: Fn(&str) -> Result<Pipeline>> Engine<L> {
    /// Until the server ends.
    ///
    /// # Errors
    /// Those of the first model's files.
    pub fn run(&self) -> Result<()> {
        let mut loaded = vec![(Arc::clone(&self.first), (self.load)(&self.first)?)];
        self.jobs.set_ready(true);
        while let Some(group) = self.jobs.take(self.batch) {
            let begin = Instant::now();
            let made = catch_unwind(AssertUnwindSafe(|| match self.bring(&mut loaded, &group[0].model) {
                Ok(pipeline) => self.make(pipeline, &group),
                Err(error) => {
                    group.iter().for_each(|item| self.give_up(item, &error));
                    None
                }
            }));
            if made.is_err() {
                // Its words went to standard error, with the place in the program.
                let error = "an internal error ended it; the server's log has it";
                group.iter().for_each(|item| self.jobs.failed(item, error));
                say!("warning: a panic ended a batch; models are read again");
                loaded.clear();
            }
            self.jobs.batch_over(made.ok().flatten().map(|work| (work, begin.elapsed())));
        }
        Ok(())
    }

    /// The model in memory, as the last of those there. What was asked for longest ago leaves first, and where there is no memory
    /// beside the others, they all do.
    fn bring<'a>(&self, loaded: &'a mut Vec<(Arc<str>, Pipeline)>, name: &Arc<str>) -> Result<&'a Pipeline> {
        match loaded.iter().position(|(known, _)| known == name) {
            Some(at) => {
                let asked = loaded.remove(at);
                loaded.push(asked);
            }
            None => {
                let beyond = (loaded.len() + 1).saturating_sub(self.kept);
                loaded.drain(..beyond);
                let pipeline = match (self.load)(name) {
                    Err(Error::OutOfMemory { .. }) if !loaded.is_empty() => {
                        loaded.clear();
                        (self.load)(name)?
                    }
                    loaded => loaded?,
                };
                loaded.push((Arc::clone(name), pipeline));
            }
        }
        Ok(&loaded.last().expect("just put there").1)
    }

    /// Makes pictures in one batch: the work that was done, `None` where something went wrong. Where one comes out not finite, or
    /// there is no memory for all, each is made alone, so that the others are not lost.
    fn make(&self, pipeline: &Pipeline, group: &[Waiting]) -> Option<u64> {
        let begin = Instant::now();
        let requests: Vec<Request> = group.iter().map(|item| item.request.clone()).collect();
        panic_for_test(&requests);
        let mut watcher = Watcher { jobs: &self.jobs, last: None };
        match (pipeline.generate_batch(&requests, &mut watcher), group) {
            (Ok(pictures), _) => {
                self.jobs.metrics.batch.observe(group.len() as f64);
                self.jobs.metrics.batch_seconds.observe(begin.elapsed().as_secs_f64());
                for (item, picture) in group.iter().zip(pictures) {
                    if let Err(error) = made(picture).and_then(|made| self.jobs.finished(item, made)) {
                        self.give_up(item, &error);
                    }
                }
                Some(group.iter().map(|item| item.cost).sum())
            }
            // The jobs know already.
            (Err(Error::Interrupted), _) => None,
            (Err(Error::NonFinite { .. } | Error::OutOfMemory { .. }), [_, _, ..]) => {
                for item in group {
                    self.make(pipeline, std::slice::from_ref(item));
                }
                None
            }
            (Err(error), group) => {
                group.iter().for_each(|item| self.give_up(item, &error));
                None
            }
        }
    }

    fn give_up(&self, item: &Waiting, error: &Error) {
        let text = api_text(error);
        say!("warning: a picture could not be made: {text}");
        self.jobs.failed(item, &text);
    }
}

/// What the tests see of a fault in the program: `MEGAFUSE_TEST_PANIC` is a prompt at which it panics.
fn panic_for_test(requests: &[Request]) {
    if let Ok(prompt) = std::env::var("MEGAFUSE_TEST_PANIC")
        && requests.iter().any(|request| request.prompt == prompt)
    {
        panic!("MEGAFUSE_TEST_PANIC is {prompt:?}");
    }
}

fn made(picture: Picture) -> Result<Made> {
    let Picture { width, height, rgb, seed, parameters } = picture;
    let png =
        encode_png(&rgb, width, height, PngText { parameters: &parameters.text, json: &parameters.json.to_string() })?;
    let size = Size::new(width, height);
    Ok(Made { seed, size, png, parameters: parameters.json, infotext: parameters.text })
}

/// Passes on where a run stands.
struct Watcher<'a> {
    jobs: &'a Jobs,
    last: Option<Instant>,
}

impl Observer for Watcher<'_> {
    fn event(&mut self, event: &Event) {
        match *event {
            Event::StageBegins { stage, stages, size, .. } => {
                self.last = None;
                self.jobs.progress(|status, _| {
                    (status.stage, status.stages, status.size) = (stage + 1, stages, Some(size.to_string()));
                });
            }
            Event::Step(progress) => {
                self.jobs.metrics.steps.inc();
                let now = Instant::now();
                let rate = self.last.replace(now).map(|last| 1.0 / (now - last).as_secs_f64().max(1e-9));
                self.jobs.progress(|status, later| {
                    (status.step, status.steps) = (progress.run_step, progress.run_steps);
                    status.steps_per_second = rate.or(status.steps_per_second);
                    let left = (progress.run_steps - progress.run_step) as f64;
                    let present = status.steps_per_second.map(|rate| left / rate);
                    status.eta_seconds = present.zip(later).map(|(present, later)| present + later);
                });
            }
            _ => {}
        }
    }

    fn cancelled(&self) -> bool {
        self.jobs.is_given_up()
    }

    fn warning(&mut self, message: &str) {
        self.jobs.warn(message);
    }
}
