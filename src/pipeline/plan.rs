use super::{ModelSource, Request};
use crate::error::Result;
use crate::methods::{Size, Stage};
use crate::runtime::{DType, OpKind, Work};

/// The cost of one phase of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct PhaseReport {
    /// `text`, `denoise`, `relay decode`, `relay upsample`, `relay encode`, `decode`.
    pub name: &'static str,
    /// The stage that the phase belongs to, from 0; a relay belongs to the stage it leads to.
    pub stage: Option<usize>,
    /// Picture size of the phase's result.
    pub size: Option<Size>,
    /// How many times it runs.
    pub repeats: usize,
    /// One run of it, by kind (kinds without work are left out) and in total.
    pub by_kind: Vec<(OpKind, Work)>,
    pub once: Work,
    /// Largest number of bytes alive at once during it, weights included.
    pub peak_bytes: u64,
}

/// Weights of one module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightReport {
    /// `text_encoder`, `unet`, `vae`.
    pub module: &'static str,
    pub parameters: u64,
    pub bytes: u64,
}

/// What a request would cost, from the configuration files alone.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanReport {
    pub dtype: DType,
    pub stages: Vec<Stage>,
    pub phases: Vec<PhaseReport>,
    pub weights: Vec<WeightReport>,
    /// Over all phases and repeats, for one picture.
    pub by_kind: Vec<(OpKind, Work)>,
    pub total: Work,
    pub peak_bytes: u64,
}

impl PlanReport {
    /// The same as JSON.
    pub fn to_json(&self) -> serde_json::Value {
        unimplemented!()
    }
}

/// Runs the request on the meta device.
///
/// # Errors
/// As [`Pipeline::generate`](super::Pipeline::generate), except for those of weight files.
pub fn plan(_source: &ModelSource, _dtype: DType, _request: &Request) -> Result<PlanReport> {
    unimplemented!()
}
