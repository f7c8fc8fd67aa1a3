//! What every command that makes pictures does first: device, model, and whether the run fits into memory.

use std::collections::HashMap;
use std::time::Instant;

use megafuse::pipeline::{Method, ModelSource, Pipeline, PlanReport, Planner, Request, Size, Stage};
use megafuse::{DType, Device, Error, Result};

use super::console::say;
use super::memory::{available_bytes, bytes_text};
use super::picture_args::RunArgs;
use super::progress::seconds_text;
use super::values;

/// A model that has not been loaded yet, where it will run, and what its requests would cost.
pub struct Session {
    source: ModelSource,
    pub device: Device,
    pub dtype: DType,
    pub planner: Planner,
}

impl Session {
    /// Reads configurations, no weights.
    ///
    /// # Errors
    /// Those of the device; as [`Planner::new`].
    pub fn open(run: &RunArgs) -> Result<Session> {
        let device = run.device.open()?;
        let (source, dtype) = (run.source(), run.dtype_on(&device));
        let planner = Planner::new(&source, dtype)?;
        let scheduler = planner.pipeline().scheduler();
        if let (None, false, Some(class)) = (run.scheduler, run.reference_compat, scheduler.class_without_sampler()) {
            let sampler = scheduler.sampler();
            say!(
                "the model's scheduler is {class}, for which there is no sampler here; {sampler} runs instead \
                 (--scheduler chooses another)"
            );
        }
        Ok(Session { source, device, dtype, planner })
    }

    /// # Errors
    /// As [`Planner::plan`]; [`Error::Request`] when the run needs more memory than there is, with a size that fits.
    pub fn check(&self, request: &Request) -> Result<PlanReport> {
        let plan = self.planner.plan(request)?;
        let available = match &self.device {
            Device::Cuda(card) => Some(card.memory()?.free_bytes),
            _ => available_bytes(),
        };
        check_memory(&self.planner, request, &plan, available)?;
        Ok(plan)
    }

    /// Reads the weights and says so.
    ///
    /// # Errors
    /// As [`Pipeline::load`].
    pub fn load(self) -> Result<Pipeline> {
        let begin = Instant::now();
        let name = values::source_name(&self.source);
        let Session { device, dtype, .. } = &self;
        let pipeline = Pipeline::load(self.source.clone(), device.clone(), *dtype)?;
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

    pub fn source(&self) -> &ModelSource {
        &self.source
    }
}

/// What many requests cost, worked out once for those of the same stages.
#[derive(Default)]
pub struct Costs {
    asked: HashMap<Asked, u64>,
    /// By stages, and whether there is guidance.
    planned: HashMap<(Vec<Stage>, bool), u64>,
}

/// What of a request decides its cost, beside the flags that all have in common.
#[derive(PartialEq, Eq, Hash)]
struct Asked {
    method: Method,
    size: Option<Size>,
    stages: Vec<Stage>,
    steps: Option<usize>,
    guided: bool,
}

impl Costs {
    /// MACs of one picture, checked as by [`Session::check`].
    ///
    /// # Errors
    /// As [`Session::check`].
    pub fn of(&mut self, session: &Session, request: &Request) -> Result<u64> {
        let guided = request.guidance > 1.0;
        let Request { method, size, steps, .. } = *request;
        let asked = Asked { method, size, stages: request.stages.clone(), steps, guided };
        if let Some(&cost) = self.asked.get(&asked) {
            return Ok(cost);
        }
        let planned = (session.planner.pipeline().resolve(request)?.stages, guided);
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
        planner.plan(&smaller).ok().filter(|plan| plan.peak_bytes <= available).map(|_| size)
    });
    let advice = match fits {
        Some(size) => format!("--size {size} would fit"),
        None => "no smaller size of this shape fits either".to_string(),
    };
    let (need, free) = (bytes_text(plan.peak_bytes), bytes_text(available));
    let reason = format!("needs at least {need} of memory in {}, {free} are available; {advice}", plan.dtype);
    let flag = if request.stages.is_empty() { "--size" } else { "--stages" };
    Err(Error::Request { flag, value: wanted.to_string(), reason })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

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
