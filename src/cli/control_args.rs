//! The flags of ControlNets.

use std::path::PathBuf;

use clap::Args;
use megafuse::Result;
use megafuse::pipeline::{ControlImage, ControlInput};

use super::picture_args::conflict;
use super::values;

/// ControlNets, each with the picture that it reads.
#[derive(Args)]
#[command(next_help_heading = "ControlNet")]
pub struct ControlArgs {
    /// A ControlNet: a directory as diffusers saves it, or one .safetensors, .pth or .ckpt file; may be given several times
    ///
    /// Of Stable Diffusion 1.x, 2.x or XL, as the model is. With every method: --control-image is resized to each stage, and of a
    /// view the ControlNet sees the part that the view shows. hidiffusion asks it in the first 0.6 of the steps, at about the
    /// trained size.
    #[arg(long, value_name = "CONTROLNET", value_parser = values::path())]
    pub control: Vec<PathBuf>,

    /// The picture that a ControlNet reads, one for each --control, in their order: edges, a depth map, a pose
    ///
    /// PNG, JPEG or WebP, stretched to the size of each stage by Lanczos; or a safetensors file with control0, control1 and so on,
    /// one for each stage: f32 [1,3,H,W] of its size, from 0 to 1.
    #[arg(long, value_name = "FILE", value_parser = values::path(), requires = "control")]
    pub control_image: Vec<PathBuf>,

    /// ControlNets read the edges of their pictures, found by Canny with these thresholds: 100,200; none leaves a picture as it is
    ///
    /// One for all, or one for each --control. An edge is as strong as the first threshold and joined to one as strong as the second:
    /// lengths of Sobel gradients, 0 to 1140, of the grey picture blurred by 1.4 pixels. (OpenCV's does not blur, and finds more.)
    #[arg(long, value_name = "LOW,HIGH", value_parser = canny, requires = "control")]
    pub control_canny: Vec<Canny>,

    /// What a ControlNet adds is multiplied by this (default: 1); one for all, or one for each --control
    #[arg(long, value_name = "X", value_parser = values::control_scale, requires = "control", allow_negative_numbers = true)]
    pub control_scale: Vec<f32>,

    /// ControlNets follow their pictures without the prompt's help: they see the conditional samples alone, and add less to details
    ///
    /// A --guidance of 3 to 5 suits it.
    #[arg(long, requires = "control")]
    pub control_guess: bool,

    /// A ControlNet is on from this share of all steps on (default: 0); one for all, or one for each --control
    #[arg(long, value_name = "X", value_parser = values::strength, requires = "control")]
    pub control_start: Vec<f64>,

    /// A ControlNet is on up to this share of all steps (default: 1); one for all, or one for each --control
    #[arg(long, value_name = "X", value_parser = values::strength, requires = "control")]
    pub control_end: Vec<f64>,
}

impl ControlArgs {
    /// What each ControlNet reads and how it counts, with the files read.
    ///
    /// # Errors
    /// [`Error::Request`](megafuse::Error::Request): other than one picture for each, other than one value for all or for each;
    /// those of the files.
    pub fn inputs(&self) -> Result<Vec<ControlInput>> {
        let count = self.control.len();
        let given = self.control_image.len();
        if given < count {
            let reason = "has no picture to read; give a --control-image for each --control, in their order";
            return Err(conflict("--control", self.control[given].display(), reason));
        }
        if given > count {
            let reason = format!("is one more than the {count} given with --control; give one for each");
            return Err(conflict("--control-image", self.control_image[count].display(), reason));
        }
        let edges = each("--control-canny", &self.control_canny, Canny(None), count)?;
        let scales = each("--control-scale", &self.control_scale, 1.0, count)?;
        let starts = each("--control-start", &self.control_start, 0.0, count)?;
        let ends = each("--control-end", &self.control_end, 1.0, count)?;
        let input = |(index, path): (usize, &PathBuf)| {
            let image = ControlImage::read(path)?;
            let image = match edges[index].0 {
                Some(thresholds) => image.edges(thresholds)?,
                None => image,
            };
            let (scale, start, end) = (scales[index], starts[index], ends[index]);
            Ok(ControlInput { image, scale, guess: self.control_guess, start, end })
        };
        self.control_image.iter().enumerate().map(input).collect()
    }
}

/// One value for all of `count`, or one for each.
fn each<T: Copy + ToString>(flag: &'static str, values: &[T], usual: T, count: usize) -> Result<Vec<T>> {
    match values {
        [] => Ok(vec![usual; count]),
        &[one] => Ok(vec![one; count]),
        values if values.len() == count => Ok(values.to_vec()),
        values => {
            let given = values.iter().map(T::to_string).collect::<Vec<_>>().join(", ");
            Err(conflict(flag, given, format!("expected one for all ControlNets, or {count}, one for each --control")))
        }
    }
}

/// Thresholds of an edge, or none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Canny(pub Option<[f32; 2]>);

impl std::fmt::Display for Canny {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self.0 {
            Some([low, high]) => write!(f, "{low},{high}"),
            None => f.write_str("none"),
        }
    }
}

fn canny(text: &str) -> std::result::Result<Canny, String> {
    if text == "none" {
        return Ok(Canny(None));
    }
    let numbers =
        text.split_once(',').and_then(|(low, high)| Some([low.trim().parse().ok()?, high.trim().parse().ok()?]));
    match numbers {
        Some([low, high]) if low >= 0.0 && low <= high && high <= 1140.0 => Ok(Canny(Some([low, high]))),
        _ => Err("expected LOW,HIGH with 0 <= LOW <= HIGH <= 1140, like 100,200, or none".into()),
    }
}
