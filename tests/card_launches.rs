//! What a pipeline's pictures launch, one by one and as graphs. Needs the emulated card, whose driver counts; its counters
//! are those of the process, so there is one test.

#[path = "common/drawn.rs"]
mod drawn;
#[path = "common/emulated.rs"]
mod emulated;

use std::path::Path;

use megafuse::methods::{DemoFusion, MegaFusion, Method, MultiDiffusion, Plain};
use megafuse::pipeline::{self, Event, InitImage, InputPicture, ModelSource, Observer, Pipeline, Request, Size};
use megafuse::runtime::{CudaDevice, CudaOptions};
use megafuse::schedulers::Sampler;
use megafuse::{DType, Device};

use emulated::Emulated;

/// Kernels and graphs that were launched up to now.
type Launches = [u64; 2];

/// What every step launches.
struct PerStep<'a> {
    emulated: &'a Emulated,
    before: Launches,
    steps: Vec<Launches>,
}

impl<'a> PerStep<'a> {
    fn new(emulated: &'a Emulated) -> PerStep<'a> {
        PerStep { emulated, before: [0; 2], steps: Vec::new() }
    }

    fn now(&self) -> Launches {
        ["emu_single_launch_count", "emu_graph_launch_count"].map(|name| self.emulated.call(name))
    }
}

impl Observer for PerStep<'_> {
    fn event(&mut self, event: &Event) {
        let now = self.now();
        if let Event::Step(_) = event {
            self.steps.push([0, 1].map(|i| now[i] - self.before[i]));
        }
        self.before = now;
    }
}

/// A picture whose left half is repainted.
fn half_of_a_picture() -> InitImage {
    let size = Size::new(8, 8);
    let left = (0..64).flat_map(|i| [if i % 8 < 4 { 255 } else { 0 }; 3]).collect();
    let mask = InputPicture::new("mask.png", size, left).unwrap();
    let picture = InputPicture::new("picture.png", size, (0..192).collect()).unwrap();
    InitImage { mask: Some(mask), ..InitImage::new(picture) }
}

/// From the second picture on all steps of all stages are replays, the first step included: with both methods, one and two
/// pictures in a batch, one evaluation per step and two, with draws in every step and without, and with a part of a picture
/// that is kept.
#[test]
fn a_second_pictures_steps_are_graphs_from_the_first_on() {
    let emulated = Emulated::open();
    views(&emulated);
    let card = Device::Cuda(CudaDevice::open(CudaOptions::default()).unwrap());
    let stages = |stages: &[&str]| stages.iter().map(|stage| stage.parse().unwrap()).collect::<Vec<_>>();
    let (plain, relay): (Method, Method) = (Plain {}.into(), MegaFusion::plus().into());
    for batch in [1, 2] {
        for (method, stages, scheduler, init_image) in [
            (&plain, stages(&["8x8:4"]), Sampler::Ddim, None),
            (&plain, stages(&["8x8:3"]), Sampler::EulerAncestral, None),
            (&relay, stages(&["8x8:3", "12x8:2"]), Sampler::Ddim, None),
            // The second stage has one step: it is launched for the first picture and recorded for the second.
            (&relay, stages(&["8x8:2", "12x8:1"]), Sampler::Heun, None),
            (&relay, stages(&["8x8:2", "12x8:1"]), Sampler::Euler, Some(half_of_a_picture())),
        ] {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/sd15");
            let pipeline = Pipeline::load(ModelSource::Directory(folder), card.clone(), DType::BF16).unwrap();
            let kept = if init_image.is_some() { ", a part kept" } else { "" };
            let scheduled = Request { scheduler: Some(scheduler), init_image, ..Request::default() };
            let base = Request { method: method.clone(), stages, ..scheduled };
            let of = |prompt: &str, seed, guidance| Request {
                prompt: prompt.into(),
                seed,
                guidance,
                count: batch,
                batch,
                ..base.clone()
            };
            let run = pipeline.resolve(&of("a cat", 1, 2.5)).unwrap();
            let mut first_step = 0;
            // Single launches and evaluations of each step: where a part is kept, a stage's last clean samples get it.
            let mut evaluations: Vec<Launches> = Vec::new();
            for stage in run.stages() {
                for step in first_step..first_step + stage.steps {
                    let before = run.scheduler().evaluations(first_step..step).len();
                    let evaluated = run.scheduler().evaluations(first_step..step + 1).len() - before;
                    let last = step + 1 == first_step + stage.steps;
                    evaluations.push([u64::from(last && !kept.is_empty()), evaluated as u64]);
                }
                first_step += stage.steps;
            }
            let what = format!("{method} {scheduler}, batch {batch}{kept}");
            let per_step = |request: Request| {
                let mut counted = PerStep::new(&emulated);
                assert_eq!(pipeline.generate(&request, &mut counted).unwrap().len(), batch, "{what}");
                assert_eq!(counted.steps.len(), evaluations.len(), "{what}");
                counted.steps
            };
            let first = per_step(of("a cat", 1, 2.5));
            assert!(first[0][0] > 100, "{what}: the first step of all is launched: {first:?}");
            for later in [of("a cat", 2, 2.5), of("two dogs", 7, 6.0)] {
                assert_eq!(per_step(later), evaluations, "{what}");
            }
        }
    }
}

/// Steps over views: a graph for each group, in a later picture from the first step on; launched one by one, as many kernels
/// as the planner counts, those for the conditioning of SDXL's crops among them.
fn views(emulated: &Emulated) {
    let windows = MultiDiffusion { window: Some(4), stride: Some(3), ..MultiDiffusion::default() };
    let phases = DemoFusion { view_batch: 2, ..DemoFusion::default() };
    // Graphs of each step: two windows in one group; in phase 2 three windows and four dilated samples in groups of two.
    let cases: [(&str, Method, &str, &[u64]); 2] =
        [("sd15", windows.into(), "14x8", &[1, 1]), ("sdxl-turbo", phases.into(), "32x16", &[1, 1, 4, 4])];
    for (model, method, size, want) in cases {
        let source = ModelSource::Directory(drawn::folder(model));
        let base = Request {
            method,
            size: Some(size.parse().unwrap()),
            steps: Some(2),
            scheduler: Some(Sampler::Euler),
            guidance: 2.0,
            ..Request::default()
        };
        let counted = |pipeline: &Pipeline, seed| {
            let mut counted = PerStep::new(emulated);
            pipeline.generate(&Request { seed, ..base.clone() }, &mut counted).unwrap();
            counted.steps
        };
        let load = |eager| {
            let card = CudaDevice::open(CudaOptions { eager, ..CudaOptions::default() }).unwrap();
            Pipeline::load(source.clone(), Device::Cuda(card), DType::BF16).unwrap()
        };
        let recording = load(false);
        counted(&recording, 1);
        counted(&recording, 2);
        let graphs: Vec<u64> = counted(&recording, 3).iter().map(|step| step[1]).collect();
        assert_eq!(graphs, want, "{model}");

        let launched: Vec<u64> = counted(&load(true), 1).iter().map(|step| step[0]).collect();
        let plan = pipeline::plan(&source, DType::BF16, &base).unwrap();
        let steps = plan.phases.iter().filter(|phase| phase.name == "denoise");
        let planned: Vec<u64> = steps.flat_map(|phase| vec![phase.once.launches; phase.repeats]).collect();
        assert_eq!(launched, planned, "{model}");
    }
}
