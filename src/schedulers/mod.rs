//! Schedulers: the noise schedule of scheduler_config.json and the samplers' steps as tables computed in f64.

use std::fmt;
use std::str::FromStr;

use crate::error::Error;

/// How one step goes from a noise level to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sampler {
    /// Song et al. 2020, arXiv:2010.02502; `eta` between 0 (deterministic) and 1.
    Ddim,
    /// Ho et al. 2020, arXiv:2006.11239.
    Ddpm,
    /// Karras et al. 2022, arXiv:2206.00364, algorithm 2 without churn or correction.
    Euler,
    /// Euler to a lower noise level, then fresh noise up to the wanted one.
    EulerAncestral,
}

impl Sampler {
    pub const ALL: [Sampler; 4] = [Sampler::Ddim, Sampler::Ddpm, Sampler::Euler, Sampler::EulerAncestral];

    pub fn name(self) -> &'static str {
        match self {
            Sampler::Ddim => "ddim",
            Sampler::Ddpm => "ddpm",
            Sampler::Euler => "euler",
            Sampler::EulerAncestral => "euler-ancestral",
        }
    }
}

impl fmt::Display for Sampler {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Sampler {
    type Err = Error;
    fn from_str(s: &str) -> Result<Sampler, Error> {
        Sampler::ALL.into_iter().find(|m| m.name() == s).ok_or_else(|| Error::Request {
            flag: "--scheduler",
            value: s.into(),
            reason: "expected ddim, ddpm, euler or euler-ancestral".into(),
        })
    }
}
