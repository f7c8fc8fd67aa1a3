use crate::error::Result;
use crate::methods::Size;

/// Where a run stands after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepProgress {
    /// Counted from 0.
    pub stage: usize,
    /// Steps done in this stage, of `stage_steps`.
    pub step: usize,
    pub stage_steps: usize,
    /// Steps done in the whole run, of `run_steps`.
    pub run_step: usize,
    pub run_steps: usize,
}

/// What happens in a run, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The prompts are encoded next.
    EncodeText,
    /// Picture `index` (from 0) of `count` begins.
    PictureBegins {
        index: usize,
        count: usize,
        seed: u64,
    },
    /// The steps of a stage begin; `stage` from 0.
    StageBegins {
        stage: usize,
        stages: usize,
        size: Size,
        steps: usize,
    },
    Step(StepProgress),
    /// The clean picture goes to the next size; `stage` (from 0) is the one it leads to.
    Relay {
        stage: usize,
        from: Size,
        to: Size,
    },
    /// The final decode begins.
    Decode,
    PictureEnds {
        index: usize,
    },
}

/// Who watches a run. Every method has a default that does nothing.
pub trait Observer {
    fn event(&mut self, _event: &Event) {}

    /// Asked before every step, relay and decode: true ends the run with [`Error::Interrupted`](crate::Error::Interrupted).
    fn cancelled(&self) -> bool {
        false
    }

    /// Something the user should know, in one sentence (a prompt that was truncated).
    fn warning(&mut self, _message: &str) {}

    /// Should [`tensor`](Observer::tensor) be called for the intermediate tensors of picture `index`?
    fn wants_tensors(&self, _index: usize) -> bool {
        false
    }

    /// An intermediate tensor, f32, row-major, NCHW where it is a picture or latents: `noise<j>`, `timesteps`,
    /// `alpha_bar`, `step<n>`, `relay<k>.{x0,decoded,upsampled,encoded,noised}`, `latent`, `image`.
    fn tensor(&mut self, _index: usize, _name: &str, _shape: &[usize], _values: Vec<f32>) -> Result<()> {
        Ok(())
    }
}

/// An observer that does nothing.
pub struct Silent;

impl Observer for Silent {}
