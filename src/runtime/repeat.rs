use super::cuda::{Graph, Mark};
use super::{CudaDevice, Device};
use crate::error::Result;

/// Work that is done again and again on the same tensors. On a card it runs as launched the first time, is recorded the
/// second time, and replayed from then on; elsewhere it runs each time.
#[derive(Debug)]
pub struct Repeated {
    device: Device,
    state: State,
    /// The ends of the latest runs on a card.
    marks: [Option<Mark>; IN_FLIGHT],
    runs: usize,
}

/// Runs that the host may be ahead of a card: enough that the card never waits, few enough that what the host tells of its
/// progress is true, and that it can stop.
const IN_FLIGHT: usize = 2;

#[derive(Debug)]
enum State {
    New,
    /// It ran once and had this many bytes at once.
    Ran {
        bytes: u64,
    },
    Recorded(Graph),
}

impl Repeated {
    pub fn new(device: &Device) -> Repeated {
        Repeated { device: device.clone(), state: State::New, marks: [None, None], runs: 0 }
    }

    /// Does `work`, or replays it; true when it was replayed. `work` must do the same every time, on tensors that stay where
    /// they are, and may not wait for results.
    ///
    /// # Errors
    /// Those of `work`; [`Error::Driver`](crate::Error::Driver); [`Error::OutOfMemory`](crate::Error::OutOfMemory).
    pub fn run(&mut self, work: impl FnOnce() -> Result<()>) -> Result<bool> {
        let Device::Cuda(card) = self.device.clone() else {
            work()?;
            return Ok(false);
        };
        let replayed = self.on_card(&card, work)?;
        let mark = &mut self.marks[self.runs % IN_FLIGHT];
        match mark {
            Some(mark) => mark.wait()?, // of the run IN_FLIGHT ago
            None => *mark = Some(Mark::new(&card)?),
        }
        if let Some(mark) = mark {
            mark.set()?;
        }
        self.runs += 1;
        Ok(replayed)
    }

    fn on_card(&mut self, card: &CudaDevice, work: impl FnOnce() -> Result<()>) -> Result<bool> {
        match &self.state {
            State::Recorded(graph) => {
                graph.replay()?;
                return Ok(true);
            }
            State::Ran { bytes } if card.graphs() => {
                let graph = card.capture(*bytes, work)?;
                graph.replay()?;
                self.state = State::Recorded(graph);
            }
            _ => {
                let bytes = card.high_water(work)?;
                self.state = State::Ran { bytes };
            }
        }
        Ok(false)
    }

    /// What was recorded, once there is something.
    pub fn graph(&self) -> Option<&Graph> {
        match &self.state {
            State::Recorded(graph) => Some(graph),
            _ => None,
        }
    }
}
