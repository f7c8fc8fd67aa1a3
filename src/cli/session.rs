//! What every command that makes pictures does first: device, model, and whether the run fits into memory.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::time::Instant;

use megafuse::pipeline::{LoadOptions, ModelSource, Pipeline, PlanReport, Planner, Request, Size, Stage, WeightReport};
use megafuse::{DType, Device, Error, Result};

use super::console::say;
use super::flags;
use super::memory::bytes_text;
use super::picture_args::RunArgs;
use super::progress::seconds_text;
use super::values::{self, Batch};

/// A model that has not been loaded yet, where it will run, and what its requests would cost.
pub struct Session {
    source: ModelSource,
    options: LoadOptions,
    pub planner: Planner,
    /// Was it said that another sampler than the model's own runs?
    told: Cell<bool>,
    /// What was said of the requests' pictures.
    remarks: RefCell<Vec<String>>,
}

impl Session {
    /// Reads configurations, no weights.
    ///
    /// # Errors
    /// Those of the device; as [`Planner::new`].
    pub fn open(run: &RunArgs) -> Result<Session> {
        Session::on(run, run.device.open()?)
    }

    /// The same on a device that is open.
    ///
    /// # Errors
    /// As [`Planner::new`].
    pub fn on(run: &RunArgs, device: Device) -> Result<Session> {
        let (source, options) = (run.source(), run.load_options(&device));
        let planner = Planner::with(&source, &options)?;
        Ok(Session { source, options, planner, told: Cell::new(false), remarks: RefCell::default() })
    }

    pub fn device(&self) -> &Device {
        &self.options.device
    }

    pub fn dtype(&self) -> DType {
        self.options.dtype
    }

    /// Once: a line when the model's own sampler would run, and there is none of its class here.
    fn tell_substitution(&self, request: &Request) {
        let own = request.scheduler.is_none() && !request.method.spec().relays;
        let line = self.planner.pipeline().scheduler().substitution();
        if let Some(line) = line.filter(|_| own && !self.told.replace(true)) {
            say!("{}", flags::named(&line));
        }
    }

    /// # Errors
    /// As [`Planner::plan_within`]; [`Error::Request`] when the run needs more memory than there is, with a size that fits.
    pub fn check(&self, request: &Request) -> Result<PlanReport> {
        self.tell_substitution(request);
        for remark in self.planner.pipeline().remarks(request)? {
            if !self.remarks.borrow().contains(&remark) {
                say!("warning: {remark}");
                self.remarks.borrow_mut().push(remark);
            }
        }
        let available = self.device().budget_bytes();
        let plan = self.planner.plan_within(available, request)?;
        check_memory(&self.planner, request, &plan, available)?;
        Ok(plan)
    }

    /// How many of `count` pictures like `request`'s are made at once.
    ///
    /// # Errors
    /// As [`Planner::plan`].
    pub fn batch(&self, asked: Batch, request: &Request, count: usize) -> Result<usize> {
        if request.one_at_a_time() {
            return Ok(1);
        }
        let most = count.clamp(1, AUTO_BATCH);
        let card = match (asked, self.device()) {
            (Batch::Of(batch), _) => return Ok(batch.min(count.max(1))),
            (Batch::Auto, Device::Cuda(card)) => card,
            (Batch::Auto, _) => return Ok(1),
        };
        let free = card.memory()?.free_bytes;
        for batch in (2..=most).rev() {
            let request = Request { count: batch, batch, ..request.clone() };
            if self.planner.plan(&request)?.peak_bytes <= free {
                return Ok(batch);
            }
        }
        Ok(1)
    }

    /// Reads the weights and says so.
    ///
    /// # Errors
    /// As [`Pipeline::load`].
    pub fn load(self) -> Result<Pipeline> {
        load(&self.source, &self.options)
    }

    pub fn source(&self) -> &ModelSource {
        &self.source
    }
}

/// Reads a model's weights and says so.
///
/// # Errors
/// As [`Pipeline::load_with`].
pub fn load(source: &ModelSource, options: &LoadOptions) -> Result<Pipeline> {
    let begin = Instant::now();
    let name = values::source_name(source);
    let LoadOptions { device, dtype, .. } = options;
    let pipeline = Pipeline::load_with(source.clone(), options.clone())?;
    pipeline.warnings().iter().for_each(|warning| say!("warning: {warning}"));
    variants_line(pipeline.weights()).iter().for_each(|line| say!("{line}"));
    let loading = seconds_text(begin.elapsed().as_secs_f64());
    match device {
        Device::Cuda(card) => say!("{name}, {dtype} on {device} ({}), loaded in {loading}", card.card()),
        _ => {
            let threads = rayon::current_num_threads();
            say!("{name}, {dtype} on {device}, {threads} threads, loaded in {loading}");
        }
    }
    Ok(pipeline)
}

/// Once per word: a line about words of textual inversion that no prompt holds.
///
/// # Errors
/// As [`Pipeline::unread_embeddings`].
pub fn tell_unread<'a>(pipeline: &Pipeline, requests: impl Iterator<Item = &'a Request>) -> Result<()> {
    for word in pipeline.unread_embeddings(requests)? {
        say!("warning: the word {word:?} of --embedding stands in no prompt");
    }
    Ok(())
}

/// Which variant of the weights was read (`fp16`), and for which parts; `None`: the plain one for all.
pub fn variants_line(reports: &[WeightReport]) -> Option<String> {
    let mut variants: Vec<(&str, Vec<&str>)> = Vec::new();
    for report in reports {
        let Some(variant) = report.variant.as_deref() else { continue };
        match variants.iter_mut().find(|(other, _)| *other == variant) {
            Some((_, modules)) => modules.push(report.module),
            None => variants.push((variant, vec![report.module])),
        }
    }
    let said: Vec<String> =
        variants.iter().map(|(variant, modules)| format!("variant {variant} of {}", modules.join(", "))).collect();
    (!said.is_empty()).then(|| format!("read the {}", said.join("; the ")))
}

/// Pictures that `--batch auto` makes at once, at most: beyond it a card has little left to gain.
pub const AUTO_BATCH: usize = 8;

/// The items by index, in groups of at most `most` that are `alike`, so that they can be made in one batch; in the order of their
/// first ones.
pub fn batches<T>(items: &[T], most: usize, alike: impl Fn(&T, &T) -> bool) -> Vec<Vec<usize>> {
    let mut groups: Vec<Vec<usize>> = Vec::new();
    // Groups with room, one of a kind.
    let mut open: Vec<usize> = Vec::new();
    for (index, item) in items.iter().enumerate() {
        match open.iter().position(|&group| alike(item, &items[groups[group][0]])) {
            Some(at) => {
                let group = open[at];
                groups[group].push(index);
                if groups[group].len() >= most {
                    open.remove(at);
                }
            }
            None => {
                groups.push(vec![index]);
                if most > 1 {
                    open.push(groups.len() - 1);
                }
            }
        }
    }
    groups
}

/// What many requests cost, worked out once for those of the same method and stages.
#[derive(Default)]
pub struct Costs {
    asked: HashMap<Asked, u64>,
    /// By method with its options, stages, and whether there is guidance.
    planned: HashMap<(String, Vec<Stage>, bool), u64>,
}

/// What of a request decides its cost and whether it can be met, beside the flags that all have in common.
#[derive(PartialEq, Eq, Hash)]
struct Asked {
    method: String,
    size: Option<Size>,
    stages: Vec<Stage>,
    steps: Option<usize>,
    guided: bool,
    rescaled: bool,
    negative: bool,
}

/// Kinds of requests that are remembered, at most: a server is asked for ever new ones.
const MOST_KINDS: usize = 4096;

impl Costs {
    /// MACs of one picture, checked as by [`Session::check`].
    ///
    /// # Errors
    /// As [`Session::check`].
    pub fn of(&mut self, session: &Session, request: &Request) -> Result<u64> {
        let guided = request.is_guided();
        let Request { size, steps, .. } = *request;
        let method = format!("{} {:?}", request.method, request.method.options());
        let rescaled = request.guidance_rescale > 0.0;
        let negative = request.negative_prompt.as_ref().is_some_and(|negative| !negative.is_empty());
        let stages = request.stages.clone();
        let asked = Asked { method, size, stages, steps, guided, rescaled, negative };
        if let Some(&cost) = self.asked.get(&asked) {
            return Ok(cost);
        }
        if self.asked.len() >= MOST_KINDS {
            *self = Costs::default();
        }
        let planned = (asked.method.clone(), session.planner.pipeline().resolve(request)?.stages().to_vec(), guided);
        let cost = match self.planned.get(&planned) {
            Some(&cost) => cost,
            None => session.check(request)?.total.macs,
        };
        self.planned.insert(planned, cost);
        self.asked.insert(asked, cost);
        Ok(cost)
    }
}

/// # Errors
/// [`Error::Request`] when the run needs more memory than there is, with a size that fits.
fn check_memory(planner: &Planner, request: &Request, plan: &PlanReport, available: Option<u64>) -> Result<()> {
    let Some(available) = available.filter(|&available| plan.peak_bytes > available) else { return Ok(()) };
    let Some(wanted) = plan.stages.last().map(|stage| stage.size) else { return Ok(()) };
    let fits = (1..16).rev().find_map(|sixteenths| {
        let side = |side: usize| (side * sixteenths / 16 / 64 * 64).max(64);
        let size = Size::new(side(wanted.width), side(wanted.height));
        let smaller = Request { size: Some(size), stages: Vec::new(), ..request.clone() };
        planner.plan_within(Some(available), &smaller).ok().filter(|plan| plan.peak_bytes <= available).map(|_| size)
    });
    let advice = match fits {
        Some(size) => format!("--size {size} would fit"),
        None => "no smaller size of this shape fits either".to_string(),
    };
    let (need, free) = (bytes_text(plan.peak_bytes), bytes_text(available));
    let reason = format!("needs at least {need} of memory in {}, {free} are available; {advice}", plan.dtype);
    let flag = if request.stages.is_empty() { "--size" } else { "--stages" };
    Err(Error::Request { field: flag, value: wanted.to_string(), reason })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn batches_hold_requests_that_differ_in_words_and_seed_alone() {
        let of = |prompt: &str, seed: u64, steps: usize| Request {
            prompt: prompt.into(),
            seed,
            steps: Some(steps),
            ..Request::default()
        };
        let requests = [of("a", 0, 5), of("b", 1, 5), of("a", 0, 6), of("c", 2, 5), of("d", 3, 6), of("e", 4, 5)];
        let batches = |most| batches(&requests, most, Request::fits_into_batch_of);
        assert_eq!(batches(3), [vec![0, 1, 3], vec![2, 4], vec![5]]);
        assert_eq!(batches(1), [[0], [1], [2], [3], [4], [5]]);
    }

    #[test]
    fn a_run_beyond_the_memory_is_refused_with_figures_and_a_size_that_fits() {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/sd15");
        let planner = Planner::new(&ModelSource::Directory(model), DType::F32).unwrap();
        let request = Request { size: Some(Size::new(1024, 1024)), ..Request::default() };
        let plan = planner.plan(&request).unwrap();
        let check = |available| check_memory(&planner, &request, &plan, available);
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
