//! Prompt to picture: tokenize, encode, denoise with a method, decode.

mod embedded;
mod files;
mod parameters;
mod plan;
mod request;
mod run;

pub use crate::methods::{Event, Observer, Silent, StepProgress};
pub use crate::rng::RngKind;
pub use files::{ModelFiles, ModelSource};
pub use parameters::Parameters;
pub use plan::{PhaseReport, PlanReport, WeightReport, plan};
pub use request::Request;
pub use run::{Picture, Pipeline};
