//! Prompt to picture: tokenize, encode, denoise with a method, decode.

mod files;
mod plan;
mod request;
mod run;

pub use crate::methods::{Event, Observer, Silent, StepProgress};
pub use files::{ModelFiles, ModelSource};
pub use plan::{PhaseReport, PlanReport, WeightReport, plan};
pub use request::{Request, RngKind};
pub use run::{Parameters, Picture, Pipeline};
