//! The phases of a run as named ranges of a profiler's timeline ([`nvtx`]).

use crate::error::Result;
use crate::methods::{Event, Observer};
use crate::runtime::nvtx::{self, Range};

/// An observer whose run has named ranges: the pictures, in them each phase (`text`, `stage 1 of 2, 64x64`, `decode` ...), in a
/// stage each step. Ops have theirs by themselves, but for those that a graph replays.
pub struct Ranges<'a> {
    observer: &'a mut dyn Observer,
    // Dropped in this order: a range ends before the one that it lies in.
    step: Option<Range>,
    phase: Option<Range>,
    _pictures: Option<Range>,
}

impl<'a> Ranges<'a> {
    /// Of `count` pictures that are made at once.
    pub fn new(observer: &'a mut dyn Observer, count: usize) -> Ranges<'a> {
        let _pictures = nvtx::range(|| if count == 1 { "1 picture".into() } else { format!("{count} pictures") });
        Ranges { observer, step: None, phase: None, _pictures }
    }

    fn begin(&mut self, name: impl FnOnce() -> String) {
        self.step = None;
        self.phase = None;
        self.phase = nvtx::range(name);
    }

    fn step(&mut self, step: usize, steps: usize) {
        self.step = None;
        if step <= steps {
            self.step = nvtx::range(|| format!("step {step} of {steps}"));
        }
    }

    fn follow(&mut self, event: &Event) {
        match event {
            Event::EncodeText => self.begin(|| "text".into()),
            Event::Condition { stage } => self.begin(|| format!("stage {}, conditioning", stage + 1)),
            Event::EncodePicture { stage } => self.begin(|| format!("stage {}, picture", stage + 1)),
            Event::StageBegins { stage, stages, size, steps } => {
                self.begin(|| format!("stage {} of {stages}, {size}", stage + 1));
                self.step(1, *steps);
            }
            Event::Step(progress) => self.step(progress.step + 1, progress.stage_steps),
            Event::Relay { stage, from, to } => {
                self.begin(|| format!("relay to stage {}, decode {from} for {to}", stage + 1));
            }
            Event::RelayUpsample { stage } => self.begin(|| format!("relay to stage {}, upsample", stage + 1)),
            Event::RelayEncode { stage } => self.begin(|| format!("relay to stage {}, encode", stage + 1)),
            Event::PhaseEnds { stage } => self.begin(|| format!("end of phase {}", stage + 1)),
            Event::Decode => self.begin(|| "decode".into()),
            Event::PictureBegins { .. } => {}
            Event::PictureEnds { .. } => {
                self.step = None;
                self.phase = None;
            }
        }
    }
}

impl Observer for Ranges<'_> {
    fn event(&mut self, event: &Event) {
        self.follow(event);
        self.observer.event(event);
    }

    fn cancelled(&self) -> bool {
        self.observer.cancelled()
    }

    fn warning(&mut self, message: &str) {
        self.observer.warning(message);
    }

    fn wants_tensors(&self, index: usize) -> bool {
        self.observer.wants_tensors(index)
    }

    fn tensor(&mut self, index: usize, name: &str, shape: &[usize], values: Vec<f32>) -> Result<()> {
        self.observer.tensor(index, name, shape, values)
    }

    fn phase(&mut self, index: usize, phase: usize, size: [usize; 2], values: Vec<f32>) -> Result<()> {
        self.observer.phase(index, phase, size, values)
    }

    fn integers(&mut self, index: usize, name: &str, shape: &[usize], values: Vec<i64>) -> Result<()> {
        self.observer.integers(index, name, shape, values)
    }
}
