//! The values of flags: each parser says what it got wrong and what is accepted; clap adds the flag and the value.

use std::fmt;
use std::str::FromStr;

/// A longer side is a slip of the finger: at 16384 x 16384 the decoder's largest activation alone is 128 GiB in f32.
pub const MAX_SIDE: usize = 16384;

/// Steps of one run: the training schedule has that many timesteps.
pub const MAX_STEPS: usize = 1000;

/// Width and height in pixels, written `WxH`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    pub width: usize,
    pub height: usize,
}

impl Size {
    /// `[height, width]`, the order of a tensor's dimensions.
    pub fn rows_columns(self) -> [usize; 2] {
        [self.height, self.width]
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}x{}", self.width, self.height)
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(s: &str) -> Result<Size, String> {
        let wanted = || "expected width x height in pixels, such as 1024x768".to_string();
        let (width, height) = s.split_once(['x', 'X']).ok_or_else(wanted)?;
        let side = |name: &str, digits: &str| -> Result<usize, String> {
            if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
                return Err(wanted());
            }
            match digits.parse::<usize>() {
                Ok(0) => Err(format!("the {name} is 0; {}", wanted())),
                Ok(side) if side <= MAX_SIDE => Ok(side),
                _ => Err(format!("the {name} {digits} is too large, the limit is {MAX_SIDE} pixels a side")),
            }
        };
        Ok(Size { width: side("width", width)?, height: side("height", height)? })
    }
}

/// One stage of `--stages`, written `WxH:steps`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StageSpec {
    pub size: Size,
    pub steps: usize,
}

impl fmt::Display for StageSpec {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}:{}", self.size, self.steps)
    }
}

/// All of `--stages`, written `WxH:steps,WxH:steps,...`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stages(pub Vec<StageSpec>);

impl Stages {
    pub fn total_steps(&self) -> usize {
        self.0.iter().map(|stage| stage.steps).sum()
    }

    pub fn last_size(&self) -> Size {
        self.0.last().expect("the parser accepts no empty list").size
    }
}

impl fmt::Display for Stages {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let stages: Vec<String> = self.0.iter().map(StageSpec::to_string).collect();
        f.write_str(&stages.join(","))
    }
}

impl FromStr for Stages {
    type Err = String;

    fn from_str(s: &str) -> Result<Stages, String> {
        let wanted = "expected WxH:steps,WxH:steps,..., such as 512x512:40,768x768:5,1024x1024:5";
        let mut stages = Vec::new();
        for (index, text) in s.split(',').enumerate() {
            let in_stage = |reason: String| format!("stage {} ({text:?}): {reason}", index + 1);
            let (size, steps) = text.split_once(':').ok_or_else(|| in_stage(wanted.into()))?;
            let size = size.parse().map_err(in_stage)?;
            let steps = parse_steps(steps).map_err(in_stage)?;
            stages.push(StageSpec { size, steps });
        }
        let stages = Stages(stages);
        match stages.total_steps() {
            total if total <= MAX_STEPS => Ok(stages),
            total => Err(format!("{total} steps in all, the limit is {MAX_STEPS}, the length of the training schedule")),
        }
    }
}

/// A step count, `1..=1000`.
pub fn parse_steps(s: &str) -> Result<usize, String> {
    match s.parse::<usize>() {
        Ok(steps) if (1..=MAX_STEPS).contains(&steps) => Ok(steps),
        _ => Err(format!("expected a number of steps from 1 to {MAX_STEPS}")),
    }
}

/// The guidance scale: finite, not negative.
pub fn parse_guidance(s: &str) -> Result<f64, String> {
    match s.parse::<f64>() {
        Ok(scale) if scale.is_finite() && (0.0..=1000.0).contains(&scale) => Ok(scale),
        _ => Err("expected a number from 0 to 1000; 7 is usual, 1 and below turn guidance off".into()),
    }
}

/// DDIM's eta.
pub fn parse_eta(s: &str) -> Result<f64, String> {
    match s.parse::<f64>() {
        Ok(eta) if (0.0..=1.0).contains(&eta) => Ok(eta),
        _ => Err("expected a number from 0 (DDIM) to 1 (as noisy as DDPM)".into()),
    }
}

/// `--device`, before it is known what this machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceSpec {
    Auto,
    Cpu,
    Cuda { index: usize },
    Emu,
}

impl FromStr for DeviceSpec {
    type Err = String;

    fn from_str(s: &str) -> Result<DeviceSpec, String> {
        match s {
            "auto" => return Ok(DeviceSpec::Auto),
            "cpu" => return Ok(DeviceSpec::Cpu),
            "cuda" => return Ok(DeviceSpec::Cuda { index: 0 }),
            "emu" => return Ok(DeviceSpec::Emu),
            _ => {}
        }
        s.strip_prefix("cuda:")
            .and_then(|index| index.parse().ok())
            .map(|index| DeviceSpec::Cuda { index })
            .ok_or_else(|| "expected auto, cpu, cuda, cuda:0 (or another index) or emu".to_string())
    }
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            DeviceSpec::Auto => f.write_str("auto"),
            DeviceSpec::Cpu => f.write_str("cpu"),
            DeviceSpec::Cuda { index } => write!(f, "cuda:{index}"),
            DeviceSpec::Emu => f.write_str("emu"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!("1024x768".parse(), Ok(Size { width: 1024, height: 768 }));
        assert_eq!("64X8".parse(), Ok(Size { width: 64, height: 8 }));
        for (text, part) in [
            ("", "such as 1024x768"),
            ("512", "such as 1024x768"),
            ("512x", "such as 1024x768"),
            ("x512", "such as 1024x768"),
            ("-512x512", "such as 1024x768"),
            ("+512x512", "such as 1024x768"),
            ("512.5x512", "such as 1024x768"),
            ("512x512x3", "such as 1024x768"),
            ("512 x 512", "such as 1024x768"),
            ("0x512", "the width is 0"),
            ("512x0", "the height is 0"),
            ("1000000000x1000000000", "limit is 16384"),
            ("512x16385", "limit is 16384"),
            ("512x99999999999999999999999999", "limit is 16384"),
        ] {
            let error = text.parse::<Size>().expect_err(text);
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn stages() {
        let stages: Stages = "512x512:40,768x768:5,1024x1024:5".parse().unwrap();
        assert_eq!(stages.total_steps(), 50);
        assert_eq!(stages.last_size(), Size { width: 1024, height: 1024 });
        assert_eq!(stages.to_string(), "512x512:40,768x768:5,1024x1024:5");
        for (text, part) in [
            ("", "stage 1 (\"\")"),
            ("512x512", "expected WxH:steps"),
            ("512x512:", "from 1 to 1000"),
            ("512x512:0", "from 1 to 1000"),
            ("512x512:1001", "from 1 to 1000"),
            ("512x512:-3", "from 1 to 1000"),
            ("512x512:40,", "stage 2 (\"\")"),
            ("512x512:40,768x0:5", "stage 2 (\"768x0:5\"): the height is 0"),
            ("512x512:600,768x768:401", "1001 steps in all"),
        ] {
            let error = text.parse::<Stages>().expect_err(text);
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn numbers() {
        assert_eq!(parse_guidance("7.5"), Ok(7.5));
        assert_eq!(parse_guidance("0"), Ok(0.0));
        for text in ["NaN", "inf", "-1", "", "seven", "1e9"] {
            assert!(parse_guidance(text).is_err(), "{text}");
        }
        assert_eq!(parse_eta("0.5"), Ok(0.5));
        for text in ["NaN", "-0.1", "1.1", "x"] {
            assert!(parse_eta(text).is_err(), "{text}");
        }
    }

    #[test]
    fn devices() {
        assert_eq!("auto".parse(), Ok(DeviceSpec::Auto));
        assert_eq!("cuda".parse(), Ok(DeviceSpec::Cuda { index: 0 }));
        assert_eq!("cuda:3".parse(), Ok(DeviceSpec::Cuda { index: 3 }));
        for text in ["gpu", "cuda:", "cuda:x", "cuda:-1", "CPU", ""] {
            assert!(text.parse::<DeviceSpec>().is_err(), "{text}");
        }
    }
}
