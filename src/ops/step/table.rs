use super::{StepIndex, Thresholding};
use crate::error::{Error, Result};
use crate::runtime::{DType, Device, Tensor};

/// How many earlier values a step can reach back to.
pub const HISTORY: usize = 3;

/// One evaluation of a sampler as the affine map that every sampler of the family is, computed in f64 by the schedulers:
/// ```text
/// e    = e_uncond + guidance (e_cond - e_uncond)            (the model's output: eps, v or x0)
/// x0   = x0_from_x x + x0_from_e e,                          then clamped to [-clip, clip] if asked
/// next = next_from_x x + next_from_e e + next_from_x0 x0 + sum_j next_from_history[j] h[j] + next_from_noise d n
/// d    = the deviation that the network predicts, for each value its own, where the noise is learned; else 1
/// h    = [kept.from_x x + kept.from_e e + kept.from_x0 x0, h[0], h[1]]   where something is kept
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub struct StepCoefficients {
    pub x0_from_x: f32,
    pub x0_from_e: f32,
    pub clip: Option<f32>,
    pub next_from_x: f32,
    pub next_from_e: f32,
    pub next_from_x0: f32,
    pub next_from_noise: f32,
    /// How the noise's deviation is made of what the network predicts. Not read where `next_from_noise` is 0.
    pub learned: Option<LearnedNoise>,
    /// Of the values kept by earlier evaluations, the latest first. One with weight 0 is not read.
    pub next_from_history: [f32; HISTORY],
    /// What becomes the latest value of the history; `None` leaves the history as it is.
    pub kept: Option<Kept>,
    /// x0 is computed a second time, from `next` in the place of x: what the published MegaFusion code relays.
    pub x0_from_next: bool,
}

/// Noise of a variance that the network predicts for each value, between two that the step has. Nichol & Dhariwal 2021,
/// arXiv:2102.09672, eq. (15), in which the fraction is f = (v + 1) / 2 of the network's v:
/// variance = exp(f log_largest + (1 - f) log_smallest).
///
/// v is not kept within -1 to 1, so the variance may lie beyond the two.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LearnedNoise {
    /// Of the variance at v = -1: the posterior's.
    pub log_smallest: f32,
    /// Of the variance at v = 1: beta.
    pub log_largest: f32,
}

impl LearnedNoise {
    /// The deviation of noise whose variance the network says is `v`.
    pub(super) fn deviation(self, v: f32) -> f32 {
        let fraction = (v + 1.0) / 2.0;
        (0.5 * (fraction * self.log_largest + (1.0 - fraction) * self.log_smallest)).exp()
    }
}

/// A value for the history.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub struct Kept {
    pub from_x: f32,
    pub from_e: f32,
    pub from_x0: f32,
}

/// What a step needs beside the model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepRow {
    /// The network reads the latents times this.
    pub input_scale: f32,
    pub coefficients: StepCoefficients,
}

/// All steps of a run, on the device, and which of them is next, for all images or for each.
#[derive(Debug)]
pub struct StepTable {
    rows: Vec<StepRow>,
    /// `[steps, COLUMNS]`, f32, in the order of `Column` in kernels/step.cu.
    table: Tensor,
    index: StepIndex,
    pub(in crate::ops) thresholding: Option<Thresholding>,
    /// `[steps, images, C]`, u32.
    window_shifts: Option<Tensor>,
}

const COLUMNS: usize = 19;

/// The table's elements, `[steps, COLUMNS]`.
fn values(rows: &[StepRow]) -> Result<Vec<f32>> {
    let mut values = Vec::with_capacity(rows.len() * COLUMNS);
    for StepRow { input_scale, coefficients: k } in rows {
        let clip = k.clip.unwrap_or(f32::INFINITY);
        if clip.is_nan() || clip < 0.0 {
            return Err(Error::argument("StepTable", "clip", clip, "0 or more"));
        }
        let x0_from_next = f32::from(u8::from(k.x0_from_next));
        values.extend([*input_scale, k.x0_from_x, k.x0_from_e, clip, k.next_from_x, k.next_from_e, k.next_from_x0]);
        values.extend([k.next_from_noise, x0_from_next]);
        values.extend(k.next_from_history);
        let kept = k.kept.unwrap_or_default();
        values.extend([f32::from(u8::from(k.kept.is_some())), kept.from_x, kept.from_e, kept.from_x0]);
        let learned = k.learned.map_or([0.0; 2], |learned| [learned.log_smallest, learned.log_largest]);
        if let Some(log) = learned.into_iter().find(|log| !log.is_finite()) {
            return Err(Error::argument("StepTable", "learned", log, "the logarithm of a variance, finite"));
        }
        values.push(f32::from(u8::from(k.learned.is_some())));
        values.extend(learned);
    }
    Ok(values)
}

/// How many earlier values rows reach back to.
pub fn history(rows: &[StepRow]) -> usize {
    let of_row = |row: &StepRow| row.coefficients.next_from_history.iter().rposition(|&weight| weight != 0.0);
    rows.iter().filter_map(of_row).max().map_or(0, |last| last + 1)
}

impl StepTable {
    /// The first row is next, for all images.
    ///
    /// # Errors
    /// [`Error::Argument`]: no rows, a `clip` that is negative or NaN, a variance whose logarithm is not finite;
    /// [`Error::OutOfMemory`].
    pub fn new(device: &Device, rows: Vec<StepRow>) -> Result<StepTable> {
        const OP: &str = "StepTable";
        if rows.is_empty() {
            return Err(Error::argument(OP, "rows", 0, "at least one step"));
        }
        let table = Tensor::from_f32(device, &[rows.len(), COLUMNS], DType::F32, &values(&rows)?)?;
        let index = StepIndex::ending(device, &[0], Some(rows.len()))?;
        Ok(StepTable { rows, table, index, thresholding: None, window_shifts: None })
    }

    /// Each of `images` images gets a step of its own, at first the table's first; before there is one step for all.
    ///
    /// # Errors
    /// [`Error::Argument`]: no images; [`Error::OutOfMemory`].
    pub fn with_images(self, images: usize) -> Result<StepTable> {
        let index = StepIndex::ending(self.table.device(), &vec![0; images], Some(self.rows.len()))?;
        Ok(StepTable { index, ..self })
    }

    /// Other rows, as many, in the same place; `first` is next for every image.
    ///
    /// # Errors
    /// [`Error::Argument`]: another count of rows; as [`new`](StepTable::new).
    pub fn rewrite(&mut self, rows: Vec<StepRow>, first: usize) -> Result<()> {
        if rows.len() != self.rows.len() {
            let want = format!("{}, as before", self.rows.len());
            return Err(Error::argument("StepTable", "rows", rows.len(), want));
        }
        self.table.write_f32(&values(&rows)?)?;
        self.rows = rows;
        self.index.set(&vec![first; self.index.images()])
    }

    /// The clean sample of every row is thresholded; a row's `clip` then says nothing.
    ///
    /// # Errors
    /// [`Error::Argument`]: a ratio outside 0 to 1, a `max` that is not above 0.
    pub fn with_thresholding(self, thresholding: Option<Thresholding>) -> Result<StepTable> {
        if let Some(Thresholding { ratio, max }) = thresholding {
            if !(0.0..=1.0).contains(&ratio) {
                return Err(Error::argument("StepTable", "ratio", ratio, "0 to 1"));
            }
            if !(max > 0.0 && max.is_finite()) {
                return Err(Error::argument("StepTable", "max", max, "above 0"));
            }
        }
        Ok(StepTable { thresholding, ..self })
    }

    /// With shifts of attention's windows that the network reads, `C` of each image at each step: `[steps, images, C]`,
    /// row-major ([`WindowShift::factors`](crate::ops::WindowShift)).
    ///
    /// # Errors
    /// [`Error::Argument`]: no whole number of columns; [`Error::OutOfMemory`].
    pub fn with_window_shifts(self, images: usize, values: &[u32]) -> Result<StepTable> {
        let each = self.len() * images;
        if each == 0 || !values.len().is_multiple_of(each) {
            let want = format!("a multiple of {each}, steps times images");
            return Err(Error::argument("StepTable", "window shifts", values.len(), want));
        }
        let shape = [self.len(), images, values.len() / each];
        let window_shifts = Some(Tensor::from_u32(self.table.device(), &shape, values)?);
        Ok(StepTable { window_shifts, ..self })
    }

    /// Other shifts, as many, in the same place.
    ///
    /// # Errors
    /// [`Error::Argument`]: another count; [`Error::Driver`].
    pub fn rewrite_window_shifts(&mut self, values: &[u32]) -> Result<()> {
        match &mut self.window_shifts {
            Some(shifts) if shifts.numel() == values.len() => shifts.write_u32(values),
            shifts => {
                let want = format!("{}, as before", shifts.as_ref().map_or(0, Tensor::numel));
                Err(Error::argument("StepTable", "window shifts", values.len(), want))
            }
        }
    }

    /// `[steps, images, C]`, u32, on the device.
    pub fn window_shifts(&self) -> Option<&Tensor> {
        self.window_shifts.as_ref()
    }

    pub fn len(&self) -> usize {
        self.rows.len()
    }

    pub fn rows(&self) -> &[StepRow] {
        &self.rows
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    pub fn index(&self) -> &StepIndex {
        &self.index
    }

    pub fn index_mut(&mut self) -> &mut StepIndex {
        &mut self.index
    }

    /// The row of an image's next step; `None` when the image has ended.
    pub fn next_row(&self, image: usize) -> Option<&StepRow> {
        match self.index.has_ended(image) {
            true => None,
            false => self.rows.get(self.index.get(image)),
        }
    }

    /// The row of an image's step: of its last when the image has ended.
    pub(in crate::ops) fn row(&self, image: usize) -> &StepRow {
        &self.rows[self.index.get(image)]
    }

    /// Can a batch of `images` images take a step?
    pub(in crate::ops) fn check(&self, op: &'static str, images: usize) -> Result<()> {
        self.index.check_images(op, images)?;
        if (0..self.index.images()).all(|image| self.index.has_ended(image)) {
            let want = format!("below {}, the steps of the table", self.len());
            return Err(Error::argument("StepTable", "step", self.len(), want));
        }
        Ok(())
    }

    /// Does any step add noise?
    pub fn adds_noise(&self) -> bool {
        self.rows.iter().any(|row| row.coefficients.next_from_noise != 0.0)
    }

    /// Does any step add noise of a deviation that the network predicts? Then its output has the channels for it.
    pub fn learns_noise(&self) -> bool {
        let learns = |row: &StepRow| row.coefficients.learned.is_some() && row.coefficients.next_from_noise != 0.0;
        self.rows.iter().any(learns)
    }

    /// How many earlier values the rows reach back to: what
    /// [`SampleState::with_history`](super::SampleState::with_history) is to hold.
    pub fn history(&self) -> usize {
        history(&self.rows)
    }

    pub(in crate::ops) fn tensor(&self) -> &Tensor {
        &self.table
    }
}
