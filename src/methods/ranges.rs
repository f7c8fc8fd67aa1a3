//! The phases of a run as named ranges of a profiler's timeline ([`nvtx`]): the pictures, in them each phase (`text`,
//! `stage 1 of 2, 64x64`, `decode` ...), in a stage each step. Ops have theirs by themselves, but for those that a graph replays.

use std::cell::RefCell;
use std::marker::PhantomData;

use super::Event;
use crate::runtime::nvtx::{self, Range};

/// Open ranges of a run. Dropped in this order: a range ends before the one that it lies in.
struct Open {
    step: Option<Range>,
    phase: Option<Range>,
    _whole: Range,
}

thread_local! {
    /// Of this thread's runs; a run may plan another.
    static OPEN: RefCell<Vec<Open>> = const { RefCell::new(Vec::new()) };
}

/// The range of a whole run; what is open in it ends with it, also where the run ends by an error.
pub struct RunRange {
    /// A thread's own.
    not_send: PhantomData<*const ()>,
}

impl RunRange {
    /// `None`: no profiler is attached.
    pub fn begin(name: impl FnOnce() -> String) -> Option<RunRange> {
        let _whole = nvtx::range(name)?;
        OPEN.with_borrow_mut(|open| open.push(Open { step: None, phase: None, _whole }));
        Some(RunRange { not_send: PhantomData })
    }
}

impl Drop for RunRange {
    fn drop(&mut self) {
        OPEN.with_borrow_mut(Vec::pop);
    }
}

impl Open {
    fn phase(&mut self, name: impl FnOnce() -> String) {
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
            Event::EncodeText => self.phase(|| "text".into()),
            Event::Condition { stage } => self.phase(|| format!("stage {}, conditioning", stage + 1)),
            Event::EncodePicture { stage } => self.phase(|| format!("stage {}, picture", stage + 1)),
            Event::StageBegins { stage, stages, size, steps, parts } => {
                self.phase(|| format!("stage {} of {stages}, {size}{parts}", stage + 1));
                self.step(1, *steps);
            }
            Event::Step(progress) => self.step(progress.step + 1, progress.stage_steps),
            Event::Relay { stage, from, to } => {
                self.phase(|| format!("relay to stage {}, decode {from} for {to}", stage + 1));
            }
            Event::RelayUpsample { stage } => self.phase(|| format!("relay to stage {}, upsample", stage + 1)),
            Event::RelayEncode { stage } => self.phase(|| format!("relay to stage {}, encode", stage + 1)),
            Event::PhaseEnds { stage } => self.phase(|| format!("end of phase {}", stage + 1)),
            Event::Decode => self.phase(|| "decode".into()),
            Event::Upscale { size } => self.phase(|| format!("upscale to {size}")),
            Event::PictureBegins { .. } | Event::Cached(_) => {}
            Event::PictureEnds { .. } => {
                self.step = None;
                self.phase = None;
            }
        }
    }
}

/// Called with every event of a run, before its observer is.
pub(super) fn follow(event: &Event) {
    if nvtx::attached() {
        OPEN.with_borrow_mut(|open| open.last_mut().map(|open| open.follow(event)));
    }
}
