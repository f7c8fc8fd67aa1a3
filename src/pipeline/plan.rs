use serde_json::{Value, json};

use super::memory::{LoadOptions, Rung};
use super::{ModelSource, Pipeline, Request, Upscaler};
use crate::error::Result;
use crate::methods::{Event, Observer, Size, Stage};
use crate::models::Unused;
use crate::runtime::{DType, Device, MetaDevice, OpKind, Report, Work};

/// The cost of one phase of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct PhaseReport {
    /// `text`, `encode` (of the picture that the run begins from), `condition`, `denoise`, `relay decode`, `relay upsample`, `relay encode`, `decode`,
    /// `upscale`.
    pub name: &'static str,
    /// The stage that the phase belongs to, from 0; a relay belongs to the stage it leads to.
    pub stage: Option<usize>,
    /// Picture size of the phase's result.
    pub size: Option<Size>,
    /// How many times it runs.
    pub repeats: usize,
    /// One run of it, by kind (kinds without launches are left out) and in total.
    pub by_kind: Vec<(OpKind, Work)>,
    pub once: Work,
    /// One run of it, by op and work of a call.
    pub ops: Vec<OpCost>,
    /// Largest number of bytes alive at once during it, weights included.
    pub peak_bytes: u64,
    /// Bytes of the weights that are in memory at its end.
    pub weight_bytes: u64,
}

/// Calls of one op that cost the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpCost {
    pub op: &'static str,
    pub calls: u64,
    /// One call.
    pub work: Work,
}

/// Weights of one module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightReport {
    /// `text_encoder`, `unet`, `vae`, `upscaler`.
    pub module: &'static str,
    pub parameters: u64,
    pub bytes: u64,
    /// Which variant of the files was read (`fp16`); `None`: the plain one.
    pub variant: Option<String>,
    /// Tensors of its files that no layer has.
    pub unused: Vec<Unused>,
}

/// What a request would cost, from the configuration files alone.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanReport {
    pub dtype: DType,
    pub stages: Vec<Stage>,
    /// In the order of the run.
    pub phases: Vec<PhaseReport>,
    pub weights: Vec<WeightReport>,
    /// Over all phases and repeats, for one batch.
    pub by_kind: Vec<(OpKind, Work)>,
    pub total: Work,
    pub peak_bytes: u64,
    /// What of the model is in memory when.
    pub memory: Rung,
}

impl PlanReport {
    /// The same as JSON.
    pub fn to_json(&self) -> Value {
        let phase = |phase: &PhaseReport| {
            json!({
                "name": phase.name, "stage": phase.stage, "size": phase.size.map(|size| size.to_string()),
                "repeats": phase.repeats, "once": cost(&phase.by_kind, phase.once), "peak_bytes": phase.peak_bytes,
            })
        };
        let weights = |weights: &WeightReport| json!({"module": weights.module, "parameters": weights.parameters, "bytes": weights.bytes});
        json!({
            "dtype": self.dtype.name(),
            "stages": self.stages.iter().map(Stage::to_string).collect::<Vec<_>>(),
            "phases": self.phases.iter().map(phase).collect::<Vec<_>>(),
            "weights": self.weights.iter().map(weights).collect::<Vec<_>>(),
            "weight_bytes": self.weight_bytes(),
            "total": cost(&self.by_kind, self.total),
            "peak_bytes": self.peak_bytes,
            "memory": self.memory.to_json(),
        })
    }

    /// The most that a run holds beside the weights, in the phases between the text and, where the denoiser leaves memory
    /// for it, the VAE's.
    pub(super) fn beside_weights_bytes(&self) -> u64 {
        let counted = self.phases.iter().filter(|phase| match phase.name {
            "text" => self.memory.keeps_text,
            "encode" | "decode" | "phase end" | "relay decode" | "relay encode" => self.memory.keeps_network,
            _ => true,
        });
        counted.map(|phase| phase.peak_bytes.saturating_sub(phase.weight_bytes)).max().unwrap_or(0)
    }

    /// Over all modules.
    pub fn weight_bytes(&self) -> u64 {
        self.weights.iter().map(|weights| weights.bytes).sum()
    }
}

fn cost(by_kind: &[(OpKind, Work)], total: Work) -> Value {
    let work = |w: Work| json!({"macs": w.macs, "flops": w.flops, "bytes": w.bytes, "launches": w.launches});
    let mut value = work(total);
    value["by_kind"] =
        by_kind.iter().map(|(kind, w)| (kind.name().to_string(), work(*w))).collect::<serde_json::Map<_, _>>().into();
    value
}

/// Runs the request on the meta device: the code of the real run, for one batch.
///
/// # Errors
/// As [`Pipeline::load`] and [`Pipeline::generate`], except for those of weight files and the tokenizer.
pub fn plan(source: &ModelSource, dtype: DType, request: &Request) -> Result<PlanReport> {
    Planner::new(source, dtype)?.plan(request)
}

/// A model on the meta device, which tells what its requests come to and cost: for callers with many of them.
pub struct Planner {
    meta: MetaDevice,
    pipeline: Pipeline,
}

impl Planner {
    /// # Errors
    /// As [`Pipeline::load`], except for those of weight files and the tokenizer.
    pub fn new(source: &ModelSource, dtype: DType) -> Result<Planner> {
        Planner::with(source, &LoadOptions::new(Device::meta(), dtype))
    }

    /// For a model that will be loaded with these options.
    ///
    /// # Errors
    /// As [`new`](Planner::new).
    pub fn with(source: &ModelSource, options: &LoadOptions) -> Result<Planner> {
        let meta = MetaDevice::default();
        let options = options.on_meta(&meta);
        Ok(Planner { meta, pipeline: Pipeline::load_with(source.clone(), options)? })
    }

    /// The model, without data.
    pub fn pipeline(&self) -> &Pipeline {
        &self.pipeline
    }

    /// The run in the fastest way, whatever memory it takes.
    ///
    /// # Errors
    /// As [`Pipeline::generate`].
    pub fn plan(&self, request: &Request) -> Result<PlanReport> {
        self.plan_on(0, request)
    }

    /// The run in the fastest way for which `available` bytes are enough, else in the one that takes least memory. `None`:
    /// there is no limit.
    ///
    /// # Errors
    /// As [`plan`](Planner::plan).
    pub fn plan_within(&self, available: Option<u64>, request: &Request) -> Result<PlanReport> {
        let rungs = self.pipeline.ladder().len();
        for rung in 0..rungs - 1 {
            let plan = self.plan_on(rung, request)?;
            if available.is_none_or(|available| plan.peak_bytes <= available) {
                return Ok(plan);
            }
        }
        self.plan_on(rungs - 1, request)
    }

    /// The peak of memory in every way in which the model may be held, the fastest way first.
    ///
    /// # Errors
    /// As [`plan`](Planner::plan).
    pub fn ladder(&self, request: &Request) -> Result<Vec<(Rung, u64)>> {
        let rungs = self.pipeline.ladder().iter().enumerate();
        rungs.map(|(index, &rung)| Ok((rung, self.plan_on(index, request)?.peak_bytes))).collect()
    }

    /// The run on a rung of the pipeline's ladder, from a model that is not in memory yet.
    ///
    /// # Errors
    /// As [`plan`](Planner::plan).
    pub(super) fn plan_on(&self, rung: usize, request: &Request) -> Result<PlanReport> {
        let mut stages = self.pipeline.resolve(request)?.stages().to_vec();
        if let Some(second) = self.pipeline.resolve_second(request)? {
            stages.extend(second.stages().iter().cloned());
        }
        self.pipeline.release_all();
        let meta = self.meta.clone();
        meta.take_report(); // sets the peak to what is alive
        let mut recorder = Recorder {
            meta,
            pipeline: &self.pipeline,
            stages: stages.clone(),
            last: 0,
            current: None,
            phases: Vec::new(),
        };
        let one_batch = Request { count: request.count.min(request.most_at_once()), ..request.clone() };
        self.pipeline.generate_on(Some(rung), &one_batch, &mut recorder)?;

        let phases = recorder.phases;
        let peak_bytes = phases.iter().map(|phase| phase.peak_bytes).max().unwrap_or(0);
        let sum = |pick: &dyn Fn(&PhaseReport) -> Work| {
            phases.iter().fold(Work::default(), |sum, phase| sum.plus(pick(phase), phase.repeats as u64))
        };
        let total = sum(&|phase| phase.once);
        let by_kind = OpKind::ALL
            .into_iter()
            .map(|kind| {
                let of = |phase: &PhaseReport| phase.by_kind.iter().find(|(k, _)| *k == kind).map(|(_, work)| *work);
                (kind, sum(&|phase| of(phase).unwrap_or_default()))
            })
            .filter(|(_, work)| work.launches > 0)
            .collect();
        let mut weights = self.pipeline.weights().to_vec();
        weights.extend(self.pipeline.upscaler().map(Upscaler::weights));
        weights.extend(self.pipeline.second().into_iter().flat_map(|second| second.weights().to_vec()));
        let (dtype, memory) = (self.pipeline.dtype(), self.pipeline.ladder()[rung]);
        Ok(PlanReport { dtype, stages, phases, weights, by_kind, total, peak_bytes, memory })
    }
}

/// Cuts the meta device's record at the run's events.
struct Recorder<'a> {
    meta: MetaDevice,
    pipeline: &'a Pipeline,
    stages: Vec<Stage>,
    /// The stage that began last.
    last: usize,
    /// The phase that the next record belongs to; `None`: not counted (the first noise).
    current: Option<(&'static str, Option<usize>)>,
    phases: Vec<PhaseReport>,
}

impl Observer for Recorder<'_> {
    fn event(&mut self, event: &Event) {
        let report = self.meta.take_report();
        if let Some((name, stage)) = self.current.take() {
            self.add(name, stage, &report);
        }
        if let Event::StageBegins { stage, .. } = *event {
            self.last = stage;
        }
        let last = self.last;
        self.current = match *event {
            Event::EncodeText => Some(("text", None)),
            Event::Condition { stage } => Some(("condition", Some(stage))),
            Event::EncodePicture { stage } => Some(("encode", Some(stage))),
            Event::StageBegins { stage, .. } => Some(("denoise", Some(stage))),
            Event::Step(progress) if progress.step < progress.stage_steps => Some(("denoise", Some(progress.stage))),
            Event::Relay { stage, .. } => Some(("relay decode", Some(stage))),
            Event::RelayUpsample { stage } => Some(("relay upsample", Some(stage))),
            Event::RelayEncode { stage } => Some(("relay encode", Some(stage))),
            Event::PhaseEnds { stage } => Some(("phase end", Some(stage))),
            Event::Decode => Some(("decode", Some(last))),
            Event::Upscale { .. } => Some(("upscale", Some(last))),
            Event::Step(_) | Event::Cached(_) | Event::PictureBegins { .. } | Event::PictureEnds { .. } => None,
        };
    }
}

impl Recorder<'_> {
    fn add(&mut self, name: &'static str, stage: Option<usize>, report: &Report) {
        let once = report.total();
        if name == "condition" && once.launches == 0 {
            return; // what it needs was made with the text
        }
        // A cache's two kinds of steps take turns.
        let mut of_stage = self.phases.iter_mut().rev().take_while(|phase| (phase.name, phase.stage) == (name, stage));
        if let Some(last) = of_stage.find(|phase| phase.once == once) {
            last.repeats += 1;
            last.peak_bytes = last.peak_bytes.max(report.peak_bytes);
            last.weight_bytes = self.pipeline.resident_bytes();
            return;
        }
        let size = stage.map(|stage| match name {
            "relay decode" => self.stages[stage - 1].size,
            "upscale" => {
                let upscaler = self.pipeline.upscaler();
                upscaler.map_or(self.stages[stage].size, |upscaler| upscaler.enlarged(self.stages[stage].size))
            }
            _ => self.stages[stage].size,
        });
        let by_kind =
            OpKind::ALL.into_iter().map(|kind| (kind, report.of(kind))).filter(|(_, w)| w.launches > 0).collect();
        let mut ops: Vec<OpCost> = Vec::new();
        for record in &report.ops {
            match ops.iter_mut().find(|cost| cost.op == record.op && cost.work == record.work) {
                Some(cost) => cost.calls += 1,
                None => ops.push(OpCost { op: record.op, calls: 1, work: record.work }),
            }
        }
        let (peak_bytes, weight_bytes) = (report.peak_bytes, self.pipeline.resident_bytes());
        self.phases.push(PhaseReport { name, stage, size, repeats: 1, by_kind, once, ops, peak_bytes, weight_bytes });
    }
}
