use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

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

/// One resolution of a run and the number of steps spent there, written `WIDTHxHEIGHT:STEPS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stage {
    pub size: Size,
    pub steps: usize,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}:{}", self.size, self.steps)
    }
}

impl FromStr for Stage {
    type Err = Error;
    fn from_str(s: &str) -> Result<Stage> {
        s.split_once(':')
            .and_then(|(size, steps)| {
                let (size, steps) = (size.parse().ok()?, steps.parse().ok()?);
                (steps > 0).then_some(Stage { size, steps })
            })
            .ok_or_else(|| Error::Request {
                field: "stages",
                value: s.into(),
                reason: "expected WIDTHxHEIGHT:STEPS with at least 1 step, like 512x512:40".into(),
            })
    }
}
