//! The generation methods: plain sampling and MegaFusion. A method talks to a [`DiffusionModel`] and fills the options
//! that the model offers per call; it never edits a model.

mod megafusion;
mod model;
mod observer;
mod size;
mod stages;

pub use megafusion::{Plan, generate};
pub use model::{DiffusionModel, NoiseSource};
pub use observer::{Event, Observer, Silent, StepProgress, Watch};
pub use size::{Size, Stage};
pub use stages::{base_size, check_size, default_stages};

use std::fmt;
use std::str::FromStr;

use crate::error::Error;

/// Which method makes the picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Method {
    /// All steps at the final size.
    Plain,
    /// Truncate and relay. Wu et al., WACV 2025, arXiv:2408.11001, sec. 3.2.
    #[default]
    MegaFusion,
    /// With dilated convolutions and noise re-scheduling: the same paper, sec. 3.3.
    MegaFusionPlus,
}

impl Method {
    pub const ALL: [Method; 3] = [Method::Plain, Method::MegaFusion, Method::MegaFusionPlus];

    pub fn name(self) -> &'static str {
        match self {
            Method::Plain => "plain",
            Method::MegaFusion => "megafusion",
            Method::MegaFusionPlus => "megafusion++",
        }
    }
}

impl Method {
    /// Does the method re-schedule the noise of later stages when not told otherwise?
    pub fn reschedules(self) -> bool {
        self == Method::MegaFusionPlus
    }

    /// The dilation of later stages when not told otherwise.
    pub fn dilation(self) -> usize {
        if self == Method::MegaFusionPlus { 2 } else { 1 }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Method {
    type Err = Error;
    fn from_str(s: &str) -> Result<Method, Error> {
        Method::ALL.into_iter().find(|m| m.name() == s).ok_or_else(|| Error::Request {
            flag: "--method",
            value: s.into(),
            reason: "expected plain, megafusion or megafusion++".into(),
        })
    }
}

/// Where a relay clamps its picture to [-1, 1].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum RelayClamp {
    None,
    /// After the decoder.
    Decode,
    /// After the decoder and after the upsampler.
    #[default]
    Both,
}

impl RelayClamp {
    pub const ALL: [RelayClamp; 3] = [RelayClamp::None, RelayClamp::Decode, RelayClamp::Both];

    pub fn name(self) -> &'static str {
        match self {
            RelayClamp::None => "none",
            RelayClamp::Decode => "decode",
            RelayClamp::Both => "both",
        }
    }
}

impl fmt::Display for RelayClamp {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for RelayClamp {
    type Err = Error;
    fn from_str(s: &str) -> Result<RelayClamp, Error> {
        RelayClamp::ALL.into_iter().find(|c| c.name() == s).ok_or_else(|| Error::Request {
            flag: "--relay-clamp",
            value: s.into(),
            reason: "expected none, decode or both".into(),
        })
    }
}
