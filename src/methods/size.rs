use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::names::one_of;

/// A picture's size in pixels, written `WIDTHxHEIGHT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Size {
    pub width: usize,
    pub height: usize,
}

impl Size {
    pub fn new(width: usize, height: usize) -> Size {
        Size { width, height }
    }

    /// With sides that are `n` times as long.
    pub fn times(self, n: usize) -> Size {
        Size::new(n * self.width, n * self.height)
    }

    /// Width times height.
    pub fn area(self) -> usize {
        self.width * self.height
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}x{}", self.width, self.height)
    }
}

impl FromStr for Size {
    type Err = Error;
    fn from_str(s: &str) -> Result<Size> {
        let parse = |side: &str| side.parse::<usize>().ok().filter(|n| (1..=LARGEST_SIDE).contains(n));
        s.split_once(['x', 'X']).and_then(|(w, h)| Some(Size::new(parse(w)?, parse(h)?))).ok_or_else(|| {
            Error::Request {
                field: "size",
                value: s.into(),
                reason: format!("expected WIDTHxHEIGHT in pixels, each 1 to {LARGEST_SIDE}, like 1024x768"),
            }
        })
    }
}

/// Keeps products of sides far from overflow; no device holds a picture of this size.
const LARGEST_SIDE: usize = 1 << 14;

/// One resolution of a run, the number of steps spent there and what they do beside the method's own, written
/// `WIDTHxHEIGHT:STEPS` or `WIDTHxHEIGHT:STEPS+PART+PART`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stage {
    pub size: Size,
    pub steps: usize,
    pub parts: StageParts,
}

impl Stage {
    /// Without parts.
    pub fn new(size: Size, steps: usize) -> Stage {
        Stage { size, steps, parts: StageParts::NONE }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}:{}{}", self.size, self.steps, self.parts)
    }
}

impl FromStr for Stage {
    type Err = Error;
    fn from_str(s: &str) -> Result<Stage> {
        let refuse = |reason: String| Error::Request { field: "stages", value: s.into(), reason };
        let wanted = || refuse("expected WIDTHxHEIGHT:STEPS with at least 1 step, like 512x512:40".into());
        let (size, rest) = s.split_once(':').ok_or_else(wanted)?;
        let (steps, parts) = StageParts::split(rest);
        let (size, steps) = (size.parse().map_err(|_| wanted())?, steps.parse().map_err(|_| wanted())?);
        if steps == 0 {
            return Err(wanted());
        }
        Ok(Stage { size, steps, parts: StageParts::parse(parts).map_err(refuse)? })
    }
}

/// What the steps of a stage do beside the method's own: a set, written `+raunet+crops`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct StageParts(u8);

impl StageParts {
    pub const NONE: StageParts = StageParts(0);
    /// HiDiffusion's deep blocks at the size that they were trained at, in the first of the stage's steps.
    pub const RAUNET: StageParts = StageParts(1);
    /// HiDiffusion's self-attention in windows.
    pub const WINDOWS: StageParts = StageParts(1 << 1);
    /// Both parts of HiDiffusion.
    pub const HIDIFFUSION: StageParts = StageParts(1 | 1 << 1);
    /// MegaFusion's dilation of the middle block.
    pub const DILATION: StageParts = StageParts(1 << 2);
    /// MultiDiffusion's windows of the latents.
    pub const CROPS: StageParts = StageParts(1 << 3);
    /// DemoFusion's jittered windows and dilated samples.
    pub const DEMOFUSION: StageParts = StageParts(1 << 4);

    /// Every part by name, the first of several that would do first.
    const NAMED: [(&'static str, StageParts); 6] = [
        ("hidiffusion", StageParts::HIDIFFUSION),
        ("raunet", StageParts::RAUNET),
        ("windows", StageParts::WINDOWS),
        ("dilation", StageParts::DILATION),
        ("crops", StageParts::CROPS),
        ("demofusion", StageParts::DEMOFUSION),
    ];

    /// Those of both.
    pub const fn and(self, other: StageParts) -> StageParts {
        StageParts(self.0 | other.0)
    }

    /// All of `other`?
    pub fn contains(self, other: StageParts) -> bool {
        self.0 & other.0 == other.0
    }

    /// Any of `other`?
    pub fn intersects(self, other: StageParts) -> bool {
        self.0 & other.0 != 0
    }

    pub fn is_empty(self) -> bool {
        self == StageParts::NONE
    }

    /// Those that `other` has as well.
    pub fn only(self, other: StageParts) -> StageParts {
        StageParts(self.0 & other.0)
    }

    /// Those that `other` does not have.
    pub fn without(self, other: StageParts) -> StageParts {
        StageParts(self.0 & !other.0)
    }

    /// A stage's steps and its parts, as far as there are any: `5` and `+crops` of `5+crops`.
    pub fn split(text: &str) -> (&str, &str) {
        text.split_at(text.find('+').unwrap_or(text.len()))
    }

    /// `+raunet+crops`, or nothing.
    ///
    /// # Errors
    /// The name that is no part's, and those that are.
    pub fn parse(text: &str) -> std::result::Result<StageParts, String> {
        text.split('+').skip(1).try_fold(StageParts::NONE, |parts, name| {
            match StageParts::NAMED.iter().find(|(known, _)| *known == name) {
                Some((_, part)) => Ok(parts.and(*part)),
                None => {
                    let names = StageParts::NAMED.map(|(name, _)| name);
                    Err(format!("+{name} is no part of a stage; expected {}", one_of(&names)))
                }
            }
        })
    }
}

impl fmt::Display for StageParts {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let mut left = *self;
        for (name, part) in StageParts::NAMED {
            if left.contains(part) {
                left = left.without(part);
                write!(f, "+{name}")?;
            }
        }
        Ok(())
    }
}
