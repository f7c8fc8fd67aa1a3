//! Which sizes and how many steps, when the user names only the final size; which steps of a schedule stages take.

use std::ops::Range;

use super::{Size, Stage};
use crate::error::{Error, Result};

/// Up to this ratio of sides to the native ones, one stage at the final size makes the picture.
const LARGEST_DIRECT_SCALE: f64 = 1.1;

/// Relays a run has at most.
const MOST_RELAYS: usize = 3;

/// What the sides of pictures and samples are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sides {
    /// Pixels per latent cell.
    pub factor: usize,
    /// Cells of which a side of what the network sees is a multiple: 1, or the side of a transformer's patch.
    pub patch: usize,
}

impl Sides {
    /// Pixels of which a picture's side is a multiple.
    pub fn multiple(self) -> usize {
        self.factor * self.patch
    }
}

impl From<usize> for Sides {
    /// Of a network that sees any number of cells.
    fn from(factor: usize) -> Sides {
        Sides { factor, patch: 1 }
    }
}

/// What a request and a model say of sizes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Geometry {
    /// Of the picture.
    pub size: Size,
    /// That the model was trained at.
    pub native: Size,
    pub sides: Sides,
    /// Of the whole run.
    pub steps: usize,
    /// By how much of the native sides a relay enlarges a picture, at most.
    pub relay_growth: f64,
    /// The share of the steps that all stages after the first have together.
    pub relayed_share: f64,
}

/// The stages of a relay to a size.
///
/// Sizes up to 1.1 times the native sides (by area): one stage. Else the first stage has the native area and the final
/// aspect ratio; the sides then grow linearly, by about `relay_growth` of the native ones per relay, in at most three
/// relays; all but the final size are rounded to [multiples](Sides::multiple). Stages 2 and later have `relayed_share` of the steps.
/// So, as in the paper (arXiv:2408.11001, sec. 4.1), SD 1.5 goes to 1024x1024 by 512x512:40, 768x768:5, 1024x1024:5 (growth
/// 0.5), SDXL to 2048x2048 by 1024x1024:40, 2048x2048:10 (growth 1), and SD3 by 1024x1024:20, 2048x2048:8 (share 2/7).
///
/// # Errors
/// [`Error::Request`]: `size` is not made of such multiples.
pub fn relay_stages(geometry: &Geometry) -> Result<Vec<Stage>> {
    let &Geometry { size, native, sides, steps, relay_growth, relayed_share } = geometry;
    let multiple = sides.multiple();
    check_size("size", size, multiple)?;
    let scale = (size.area() as f64 / native.area() as f64).sqrt();
    if scale <= LARGEST_DIRECT_SCALE || steps < 2 {
        return Ok(vec![Stage::new(size, steps)]);
    }
    let relays = relays_to(scale, relay_growth).min(MOST_RELAYS).min(steps - 1);
    let relayed_steps = ((steps as f64 * relayed_share).round() as usize).max(relays);
    let sizes = sizes_between(base_size(size, native, multiple), size, relays, multiple);
    let stage = |(relay, size)| {
        // The earlier of them take what does not divide.
        let extra = usize::from(relay <= relayed_steps % relays);
        let steps = if relay == 0 { steps - relayed_steps } else { relayed_steps / relays + extra };
        Stage::new(size, steps)
    };
    Ok(sizes.into_iter().enumerate().map(stage).collect())
}

/// How many relays a picture of `scale` times the native sides takes, each of which adds at most `growth` of these.
fn relays_to(scale: f64, growth: f64) -> usize {
    ((scale - 1.0) / growth - 1e-9).ceil().max(1.0) as usize
}

/// From one size to another by `relays` steps of equal length; all but the last are rounded to multiples of `multiple`.
fn sizes_between(first: Size, last: Size, relays: usize, multiple: usize) -> Vec<Size> {
    let at = |relay: usize| {
        let between = |from: usize, to: usize| {
            rounded(from as f64 + (to as f64 - from as f64) * relay as f64 / relays as f64, multiple)
        };
        let between = || Size::new(between(first.width, last.width), between(first.height, last.height));
        if relay == relays { last } else { between() }
    };
    std::iter::once(first).chain((1..=relays).map(at)).collect()
}

/// The native area in the final aspect ratio, then sides that grow by at most `growth` of the native ones, up to the final size;
/// that size alone up to 1.1 times the native sides.
pub(super) fn grown_sizes(geometry: &Geometry, growth: f64) -> Vec<Size> {
    let &Geometry { size, native, sides, .. } = geometry;
    let multiple = sides.multiple();
    let scale = (size.area() as f64 / native.area() as f64).sqrt();
    match scale <= LARGEST_DIRECT_SCALE {
        true => vec![size],
        false => sizes_between(base_size(size, native, multiple), size, relays_to(scale, growth), multiple),
    }
}

/// So much of a doubling is left to the last stage.
const BEYOND_A_DOUBLING: f64 = 0.1;

/// The native area in the final aspect ratio, then twice the sides each time, up to the final size; that size alone where the
/// native area is as large.
pub(super) fn doubled_sizes(geometry: &Geometry) -> Vec<Size> {
    let &Geometry { size, native, sides, .. } = geometry;
    let multiple = sides.multiple();
    let base = base_size(size, native, multiple);
    let scale = (size.area() as f64 / base.area() as f64).sqrt();
    let doublings = (scale.log2() - BEYOND_A_DOUBLING).ceil().max(0.0) as usize;
    let at = |times: usize| Size::new(base.width << times, base.height << times);
    (0..doublings).map(at).chain([size]).collect()
}

/// The first stage takes the whole schedule, each later one as many of its last steps as it has.
pub(super) fn last_steps_again(stages: &[Stage]) -> Vec<Range<usize>> {
    let all = stages.first().map_or(0, |first| first.steps);
    stages.iter().map(|stage| all.saturating_sub(stage.steps)..all).collect()
}

/// The steps of a schedule that stages take one after the other.
pub fn consecutive(stages: &[Stage]) -> Vec<Range<usize>> {
    let mut end = 0;
    let of_stage = |stage: &Stage| {
        end += stage.steps;
        end - stage.steps..end
    };
    stages.iter().map(of_stage).collect()
}

/// The native area in the aspect ratio of `size`.
pub fn base_size(size: Size, native: Size, multiple: usize) -> Size {
    let (area, ratio) = (native.area() as f64, size.width as f64 / size.height as f64);
    Size::new(rounded((area * ratio).sqrt(), multiple), rounded((area / ratio).sqrt(), multiple))
}

fn rounded(side: f64, multiple: usize) -> usize {
    ((side / multiple as f64).round() as usize).max(1) * multiple
}

/// # Errors
/// [`Error::Request`] with `field`: a side is 0 or not a multiple of `multiple`; names the nearest size that is.
pub fn check_size(field: &'static str, size: Size, multiple: usize) -> Result<()> {
    let fits = |side: usize| side > 0 && side.is_multiple_of(multiple);
    if fits(size.width) && fits(size.height) {
        return Ok(());
    }
    let nearest = Size::new(rounded(size.width as f64, multiple), rounded(size.height as f64, multiple));
    let reason = format!("sides must be multiples of {multiple} with this model; the nearest is {nearest}");
    Err(Error::Request { field, value: size.to_string(), reason })
}
