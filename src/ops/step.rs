//! What a step does around the denoiser. All that changes from step to step stands in tables on the device, read by an
//! index on the device: so the work of one step, recorded once, is that of every step.

use rayon::prelude::*;

use super::elementwise::{CHUNK, map, pointwise};
use super::{Tensor, by_dtype, bytes_of, cuda, float, profile};
use crate::error::{Error, Result};
use crate::runtime::{DType, Device, Element, OpKind, Work};

/// Which step of a run each of n images takes next, on the host and on the device: kernels read the device's, so that work
/// recorded in a graph finds the right row of every table at each replay. A batch of k n images is k times the n images in
/// their order (with classifier-free guidance: all unconditional, then all conditional), so its image i takes step i mod n.
///
/// An image has ended when it has taken its last step: it stays at that step, [`sampler_step`] leaves its samples as they
/// are, and what is computed for it is not read.
#[derive(Debug)]
pub struct StepIndex {
    /// Of each image, at least one.
    images: Vec<ImageStep>,
    /// Of a table: its steps, beyond which no image goes.
    end: Option<usize>,
    /// `[2, n]`, u32: of each image its step, then of each what is left.
    device: Tensor,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct ImageStep {
    step: usize,
    /// How many steps it still takes, this one included; 0: it has ended.
    left: usize,
}

impl ImageStep {
    /// For an index without an end.
    const FOREVER: usize = u32::MAX as usize;

    fn next(self) -> ImageStep {
        ImageStep { step: self.step + usize::from(self.left > 1), left: self.left.saturating_sub(1) }
    }
}

impl StepIndex {
    /// The steps of n images, each its own; no image ends.
    ///
    /// # Errors
    /// [`Error::Argument`]: no steps; [`Error::TooLarge`]; [`Error::OutOfMemory`].
    pub fn new(device: &Device, steps: &[usize]) -> Result<StepIndex> {
        StepIndex::ending(device, steps, None)
    }

    /// One step for all images of a batch.
    ///
    /// # Errors
    /// [`Error::TooLarge`]; [`Error::OutOfMemory`].
    pub fn one(device: &Device, step: usize) -> Result<StepIndex> {
        StepIndex::new(device, &[step])
    }

    fn ending(device: &Device, steps: &[usize], end: Option<usize>) -> Result<StepIndex> {
        if steps.is_empty() {
            return Err(Error::argument("StepIndex", "steps", 0, "one for each image, at least one"));
        }
        let device = Tensor::uninit(device, &[2, steps.len()], DType::U32)?;
        let mut index = StepIndex { images: vec![ImageStep { step: 0, left: 0 }; steps.len()], end, device };
        index.set(steps)?;
        Ok(index)
    }

    /// The images with a step of their own, n.
    pub fn images(&self) -> usize {
        self.images.len()
    }

    /// The step of image `image` of a batch, whose images 0, n, 2 n, ... are the same one: its last step when it has ended.
    pub fn get(&self, image: usize) -> usize {
        self.images[image % self.images.len()].step
    }

    /// Has this image taken its last step?
    pub fn has_ended(&self, image: usize) -> bool {
        self.images[image % self.images.len()].left == 0
    }

    /// The largest of the images' steps.
    pub fn last(&self) -> usize {
        self.images.iter().map(|image| image.step).max().unwrap_or(0)
    }

    /// `[2, n]`, u32, on the device: the steps, then what is left.
    pub fn tensor(&self) -> &Tensor {
        &self.device
    }

    /// Every image goes on from its step to the table's end, if there is one; a step at the end: the image has ended. The
    /// index on a card stays where it is, so recorded work reads the new steps.
    ///
    /// # Errors
    /// [`Error::Argument`]: other than n steps, a step beyond the end; [`Error::TooLarge`]; [`Error::Driver`].
    pub fn set(&mut self, steps: &[usize]) -> Result<()> {
        self.one_per_image("steps", steps)?;
        let of = |&step: &usize| match self.end {
            None => Ok(ImageStep { step, left: ImageStep::FOREVER }),
            Some(end) if step <= end => Ok(ImageStep { step: step.min(end - 1), left: end - step }),
            Some(end) => {
                Err(Error::argument("StepIndex", "step", step, format!("at most {end}, the steps of the table")))
            }
        };
        let images = steps.iter().map(of).collect::<Result<_>>()?;
        self.write(images)
    }

    /// How many steps every image still takes from where it is, this one included. 0: it takes none and stays, so that the
    /// others advance without it.
    ///
    /// # Errors
    /// [`Error::Argument`]: other than n numbers, more than the table has; [`Error::Driver`].
    pub fn set_left(&mut self, left: &[usize]) -> Result<()> {
        self.one_per_image("left", left)?;
        let of = |(image, &left): (&ImageStep, &usize)| {
            let most = self.end.map_or(ImageStep::FOREVER, |end| end - image.step);
            if left > most {
                return Err(Error::argument(
                    "StepIndex",
                    "left",
                    left,
                    format!("at most {most} from step {}", image.step),
                ));
            }
            Ok(ImageStep { left, ..*image })
        };
        let images = self.images.iter().zip(left).map(of).collect::<Result<_>>()?;
        self.write(images)
    }

    fn check_images(&self, op: &'static str, images: usize) -> Result<()> {
        if images.is_multiple_of(self.images()) {
            return Ok(());
        }
        let want = format!("a number that divides the {images} images of the batch");
        Err(Error::argument(op, "images with a step of their own", self.images(), want))
    }

    fn one_per_image(&self, arg: &'static str, values: &[usize]) -> Result<()> {
        if values.len() == self.images() {
            return Ok(());
        }
        let want = format!("{}, one for each image of the index", self.images());
        Err(Error::argument("StepIndex", arg, values.len(), want))
    }

    fn write(&mut self, images: Vec<ImageStep>) -> Result<()> {
        write_images(&mut self.device, &images)?;
        self.images = images;
        Ok(())
    }

    /// Every image that has not ended to its next step; on a card by one launch, after the work launched before.
    ///
    /// # Errors
    /// [`Error::TooLarge`]; [`Error::Driver`]
    pub fn advance(&mut self) -> Result<()> {
        const OP: &str = "advance_step";
        let n = self.images();
        let next: Vec<ImageStep> = self.images.iter().map(|image| image.next()).collect();

        let _timed = profile::scope(OP, &[n]);
        match self.device.device().clone() {
            Device::Meta(meta) => {
                let bytes = 2 * self.device.bytes();
                meta.record(OP, OpKind::Elementwise, &[n], Work { macs: 0, flops: 0, bytes, launches: 1 });
            }
            Device::Cpu(_) => write_images(&mut self.device, &next)?,
            Device::Cuda(card) => cuda::step::advance(&card, n, &mut self.device)?,
        }
        self.images = next;
        Ok(())
    }

    /// Tells the host of an [`advance`](StepIndex::advance) that a replay did on the device.
    pub fn replayed(&mut self) {
        self.images.iter_mut().for_each(|image| *image = image.next());
    }
}

/// To an index's `[2, n]` on the device: the steps, then what is left.
fn write_images(device: &mut Tensor, images: &[ImageStep]) -> Result<()> {
    let (steps, left): (Vec<usize>, Vec<usize>) = images.iter().map(|image| (image.step, image.left)).unzip();
    device.write_u32(&as_u32(&[steps, left].concat())?)
}

fn as_u32(steps: &[usize]) -> Result<Vec<u32>> {
    let limit = u128::from(u32::MAX);
    let checked = |&step: &usize| {
        u32::try_from(step).map_err(|_| Error::TooLarge { op: "StepIndex", what: "step", got: step as u128, limit })
    };
    steps.iter().map(checked).collect()
}

/// Rows of a table for the images of a batch, chosen by each image's step. Of every step the table has R conditioning rows
/// (1: the same for all; 2: of one negative prompt and one prompt; N: of every image's own). Of a batch of N images, image
/// i takes row `step[i mod n] * R + i / (N / R)`: R and n both divide N. Rows are read where they are, never copied.
#[derive(Clone, Copy, Debug)]
pub struct StepRows<'a> {
    /// `[steps * R, C]`
    pub table: &'a Tensor,
    pub step: &'a StepIndex,
    /// R, the conditioning rows of a step.
    pub rows: usize,
}

impl StepRows<'_> {
    /// Fit for a batch of `images` images and `columns` channels?
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: the table; [`Error::Argument`]: a step beyond it, R or n that
    /// does not divide the images.
    pub(super) fn check(
        &self,
        op: &'static str,
        images: usize,
        columns: usize,
        dtype: DType,
        with: &Device,
    ) -> Result<()> {
        let [table_rows, _] = self.table.dims(op, "row")?;
        self.table.expect(op, "row", &[table_rows, columns], dtype, with)?;
        if !self.step.tensor().device().same(with) {
            let got = self.step.tensor().device().to_string();
            return Err(Error::Device { op, arg: "step", got, want: with.to_string() });
        }
        if self.rows == 0 || !images.is_multiple_of(self.rows) {
            let want = format!("1 or more that divide the {images} images of the batch");
            return Err(Error::argument(op, "conditioning rows", self.rows, want));
        }
        self.step.check_images(op, images)?;
        if table_rows % self.rows != 0 {
            let want = format!("a multiple of {} rows, those of each step", self.rows);
            return Err(Error::shape(op, "row", self.table, want));
        }
        if images > 0 && self.step.last() >= table_rows / self.rows {
            let want = format!("below {}, the steps that the table has", table_rows / self.rows);
            return Err(Error::argument(op, "step", self.step.last(), want));
        }
        Ok(())
    }

    /// The table's row of each of `images` images.
    pub(super) fn indices(&self, images: usize) -> impl Iterator<Item = usize> {
        let images_per_row = images / self.rows;
        (0..images).map(move |image| self.step.get(image) * self.rows + image / images_per_row)
    }
}

/// How many earlier values a step can reach back to.
pub const HISTORY: usize = 3;

/// One evaluation of a sampler as the affine map that every sampler of the family is, computed in f64 by the schedulers:
/// ```text
/// e    = e_uncond + guidance (e_cond - e_uncond)            (the model's output: eps, v or x0)
/// x0   = x0_from_x x + x0_from_e e,                          then clamped to [-clip, clip] if asked
/// next = next_from_x x + next_from_e e + next_from_x0 x0 + sum_j next_from_history[j] h[j] + next_from_noise n
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
    /// Of the values kept by earlier evaluations, the latest first. One with weight 0 is not read.
    pub next_from_history: [f32; HISTORY],
    /// What becomes the latest value of the history; `None` leaves the history as it is.
    pub kept: Option<Kept>,
    /// x0 is computed a second time, from `next` in the place of x: what the published MegaFusion code relays.
    pub x0_from_next: bool,
}

/// A value for the history.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub struct Kept {
    pub from_x: f32,
    pub from_e: f32,
    pub from_x0: f32,
}

/// Dynamic thresholding of the clean sample, per image: with s the `ratio` quantile of |x0|, at least 1 and at most
/// `max`, x0 becomes clamp(x0, -s, s) / s. Saharia et al. 2022, arXiv:2205.11487, sec. 2.3.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Thresholding {
    /// 0 to 1.
    pub ratio: f32,
    /// Above 0.
    pub max: f32,
}

/// Classifier-free guidance of every image of a batch, on the device: recorded work reads what is there at its replay.
#[derive(Clone, Debug)]
pub struct Guidance {
    /// `[N, 2]`, f32: scale, rescale
    table: Tensor,
    rescales: bool,
}

/// Of one image.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GuidanceScale {
    /// e = e_uncond + scale (e_cond - e_uncond). Ho & Salimans 2022, arXiv:2207.12598.
    pub scale: f32,
    /// phi of Lin et al. 2023, arXiv:2305.08891, eqs. (15), (16): e becomes phi std(e_cond) / std(e) e + (1 - phi) e,
    /// with standard deviations over the image; 0 leaves e alone.
    pub rescale: f32,
}

impl Guidance {
    /// One per image of the batch.
    ///
    /// # Errors
    /// [`Error::Argument`]: a `rescale` outside 0 to 1; [`Error::OutOfMemory`].
    pub fn new(device: &Device, images: &[GuidanceScale]) -> Result<Guidance> {
        if let Some(bad) = images.iter().find(|image| !(0.0..=1.0).contains(&image.rescale)) {
            return Err(Error::argument("Guidance", "rescale", bad.rescale, "0 to 1"));
        }
        let values: Vec<f32> = images.iter().flat_map(|image| [image.scale, image.rescale]).collect();
        let table = Tensor::from_f32(device, &[images.len(), 2], DType::F32, &values)?;
        Ok(Guidance { table, rescales: images.iter().any(|image| image.rescale != 0.0) })
    }

    /// The same scale for `images`, without rescaling.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]
    pub fn uniform(device: &Device, images: usize, scale: f32) -> Result<Guidance> {
        Guidance::new(device, &vec![GuidanceScale { scale, rescale: 0.0 }; images])
    }

    /// Other images' guidance in the same place, where a recorded step reads it.
    ///
    /// # Errors
    /// [`Error::Shape`]: another number of images; [`Error::Argument`]: one rescales and the other does not;
    /// [`Error::Driver`].
    pub fn rewrite(&mut self, from: &Guidance) -> Result<()> {
        if self.rescales != from.rescales {
            return Err(Error::argument("Guidance", "rescale", from.rescales, "as it was recorded"));
        }
        self.table.copy_from(&from.table)
    }

    /// Does any image rescale?
    pub fn rescales(&self) -> bool {
        self.rescales
    }

    pub(super) fn tensor(&self) -> &Tensor {
        &self.table
    }
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
    thresholding: Option<Thresholding>,
}

const COLUMNS: usize = 16;

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
    /// [`Error::Argument`]: no rows, a `clip` that is negative or NaN; [`Error::OutOfMemory`].
    pub fn new(device: &Device, rows: Vec<StepRow>) -> Result<StepTable> {
        const OP: &str = "StepTable";
        if rows.is_empty() {
            return Err(Error::argument(OP, "rows", 0, "at least one step"));
        }
        let table = Tensor::from_f32(device, &[rows.len(), COLUMNS], DType::F32, &values(&rows)?)?;
        let index = StepIndex::ending(device, &[0], Some(rows.len()))?;
        Ok(StepTable { rows, table, index, thresholding: None })
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

    pub fn len(&self) -> usize {
        self.rows.len()
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

    /// Can a batch of `images` images take a step?
    fn check(&self, op: &'static str, images: usize) -> Result<()> {
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

    /// How many earlier values the rows reach back to: what [`SampleState::with_history`] is to hold.
    pub fn history(&self) -> usize {
        history(&self.rows)
    }

    pub(super) fn tensor(&self) -> &Tensor {
        &self.table
    }
}

/// `input_scale * x` with the scale of each image's step, rounded to `dtype`, `repeats` times along the batch: what the
/// network reads. `x: [N, ...]`, f32, to `[repeats * N, ...]`. An image that has ended is scaled as in its last step.
///
/// # Errors
/// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: which argument; [`Error::Argument`]: `repeats` is 0, every image
/// has ended, a number of images that the table's does not divide; [`Error::TooLarge`].
pub fn scale_input(x: &Tensor, steps: &StepTable, dtype: DType, repeats: usize) -> Result<Tensor> {
    const OP: &str = "scale_input";
    x.expect(OP, "x", x.shape(), DType::F32, steps.table.device())?;
    let Some((&n, rest)) = x.shape().split_first() else {
        return Err(Error::shape(OP, "x", x, "[N, ...]"));
    };
    steps.check(OP, n)?;
    if !dtype.is_float() {
        return Err(Error::Dtype { op: OP, arg: "dtype", got: dtype, want: "f32, f16 or bf16".into() });
    }
    if repeats == 0 {
        return Err(Error::argument(OP, "repeats", repeats, "at least 1"));
    }
    let (got, limit) = (n as u128 * repeats as u128, isize::MAX as u128);
    if got > limit {
        return Err(Error::TooLarge { op: OP, what: "repeats * N", got, limit });
    }

    let mut y = Tensor::uninit(x.device(), &[&[n * repeats], rest].concat(), dtype)?;
    let _timed = profile::scope(OP, y.shape());
    match x.device() {
        Device::Meta(meta) => meta.record(OP, OpKind::Elementwise, y.shape(), pointwise(&y, &[Some(x)], 1)),
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) => by_dtype!(dtype, T => scale_input_cpu::<T>(x, steps, &mut y)),
        Device::Cuda(card) => cuda::step::scale_input(card, x, steps, repeats, &mut y)?,
    }
    Ok(y)
}

fn scale_input_cpu<T: Element>(x: &Tensor, steps: &StepTable, y: &mut Tensor) {
    let n = x.shape()[0];
    let (x, per_image) = (x.cpu::<f32>(), x.numel() / n);
    for (i, y) in y.cpu_mut::<T>().chunks_exact_mut(per_image).enumerate() {
        let image = i % n;
        let scale = steps.rows[steps.index.get(image)].input_scale;
        let x = &x[image * per_image..][..per_image];
        map::<f32, T>(x, y, |values| values.iter_mut().for_each(|value| *value *= scale));
    }
}

/// The sample on its way, the clean sample of the latest step, and what later steps need of earlier ones.
#[derive(Debug)]
pub struct SampleState {
    x: Tensor,
    x0: Tensor,
    /// `[depth, N, H, W, C]`, f32, the latest first.
    history: Option<Tensor>,
}

impl SampleState {
    /// `x: [N, H, W, C]`, f32, that nobody else holds: steps overwrite it. `x0` is unspecified before the first.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Dtype`]: `x`; [`Error::Argument`]: it is shared; [`Error::OutOfMemory`].
    pub fn new(x: Tensor) -> Result<SampleState> {
        SampleState::with_history(x, 0)
    }

    /// The same with room for `depth` earlier values, at first all 0: [`StepTable::history`]. A sampler that starts anew
    /// takes a new state.
    ///
    /// # Errors
    /// As [`new`](SampleState::new).
    pub fn with_history(x: Tensor, depth: usize) -> Result<SampleState> {
        const OP: &str = "SampleState";
        x.dims::<4>(OP, "x")?;
        x.expect(OP, "x", x.shape(), DType::F32, x.device())?;
        if !x.is_unshared() {
            return Err(Error::argument(OP, "x", "shared", "a tensor that nobody else holds"));
        }
        if depth > HISTORY {
            return Err(Error::argument(OP, "depth", depth, format!("at most {HISTORY}")));
        }
        let history = match depth {
            0 => None,
            _ => Some(Tensor::zeros(x.device(), &[&[depth], x.shape()].concat(), DType::F32)?),
        };
        let x0 = Tensor::uninit(x.device(), x.shape(), DType::F32)?;
        Ok(SampleState { x, x0, history })
    }

    /// Other samples of the same shape, in the same place. What the history holds is left: the first evaluation gives it the
    /// weight 0, and what has that weight is not read.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: `x`; [`Error::Driver`].
    pub fn restart(&mut self, x: &Tensor) -> Result<()> {
        self.x.copy_from(x)
    }

    /// Does nobody else hold the samples?
    pub fn is_unshared(&self) -> bool {
        self.x.is_unshared() && self.x0.is_unshared()
    }

    pub fn x(&self) -> &Tensor {
        &self.x
    }

    pub fn x0(&self) -> &Tensor {
        &self.x0
    }

    /// `(x, x0)`
    pub fn into_parts(self) -> (Tensor, Tensor) {
        (self.x, self.x0)
    }

    /// Earlier values that there is room for.
    pub fn depth(&self) -> usize {
        self.history.as_ref().map_or(0, |history| history.shape()[0])
    }
}

/// What is known of an evaluation's output before the step: all of it checked.
pub(super) struct Output<'a> {
    pub values: &'a Tensor,
    pub guidance: Option<&'a Guidance>,
    /// `[N]`, f32: what the guided output is multiplied by, where any image rescales.
    pub factors: Option<&'a Tensor>,
}

/// Guidance, x0 and update in one pass, in place, with the row of each image's step. An image's result does not depend on
/// the others of the batch; an image that has ended keeps its samples.
///
/// * `model_output`: `[N, H, W, C]` without guidance, else `[2N, H, W, C]`, unconditional rows first; any float dtype
/// * `guidance`: of N images; `None` when the output has N rows. Where an image rescales, a pass over the output before
///   finds the standard deviations
/// * `noise`: `[N, H, W, C]`, f32, required exactly when a row of the table has a `next_from_noise` other than 0; an image
///   whose row has 0 does not read it
///
/// With [thresholding](StepTable::with_thresholding), a pass before finds each image's quantile, exactly (torch.quantile's
/// linear interpolation between the two nearest values).
///
/// # Errors
/// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: which argument; [`Error::Argument`]: noise missing or
/// superfluous, no step left for any image, a number of images that the table's does not divide, a state without the history
/// that the rows need; [`Error::TooLarge`]: 2^31 or more values per image with guidance rescale or thresholding.
pub fn sampler_step(
    state: &mut SampleState,
    model_output: &Tensor,
    guidance: Option<&Guidance>,
    steps: &StepTable,
    noise: Option<&Tensor>,
) -> Result<()> {
    const OP: &str = "sampler_step";
    let x = &state.x;
    let [n, h, w, c] = x.dims(OP, "x")?;
    x.expect(OP, "x", x.shape(), DType::F32, steps.table.device())?;
    float(OP, "model_output", model_output)?;
    let rows = if guidance.is_some() { 2 * n } else { n };
    model_output.expect(OP, "model_output", &[rows, h, w, c], model_output.dtype(), x.device())?;
    if let Some(guidance) = guidance {
        guidance.table.expect(OP, "guidance", &[n, 2], DType::F32, x.device())?;
    }
    match (noise, steps.adds_noise()) {
        (Some(noise), true) => noise.expect(OP, "noise", x.shape(), DType::F32, x.device())?,
        (None, false) => {}
        (Some(_), false) => {
            return Err(Error::argument(OP, "noise", "given", "none: next_from_noise is 0 in every step"));
        }
        (None, true) => return Err(Error::argument(OP, "noise", "missing", "a tensor: next_from_noise is not 0")),
    }
    if state.depth() < steps.history() {
        let want = format!("{}, which the steps reach back to", steps.history());
        return Err(Error::argument(OP, "history", state.depth(), want));
    }
    steps.check(OP, n)?;

    let mut output = Output { values: model_output, guidance, factors: None };
    let factors = match guidance {
        Some(guidance) if guidance.rescales => Some(rescale_factors(&output, guidance, n)?),
        _ => None,
    };
    output.factors = factors.as_ref();
    let thresholds = match steps.thresholding {
        Some(thresholding) => Some(dynamic_thresholds(x, &output, steps, thresholding)?),
        None => None,
    };
    let _timed = profile::scope(OP, x.shape());
    match model_output.device() {
        Device::Meta(meta) => {
            let flops = x.numel() as u64 * if guidance.is_some() { 13 } else { 10 };
            let history = state.history.as_ref().map_or(0, |history| 2 * history.bytes());
            let bytes = 4 * x.bytes() + history + bytes_of(&[Some(model_output), noise]);
            meta.record(OP, OpKind::Elementwise, x.shape(), Work { macs: 0, flops, bytes, launches: 1 });
        }
        Device::Cpu(_) | Device::Cuda(_) if x.numel() == 0 => {}
        Device::Cpu(_) => *state = sampler_step_cpu(state, &output, steps, noise, thresholds.as_ref())?,
        Device::Cuda(card) => cuda::step::sampler_step(card, state, &output, steps, noise, thresholds.as_ref())?,
    }
    Ok(())
}

impl SampleState {
    /// `(x, x0, history)`, for the kernel that overwrites them.
    pub(super) fn parts_mut(&mut self) -> (&mut Tensor, &mut Tensor, Option<&mut Tensor>) {
        (&mut self.x, &mut self.x0, self.history.as_mut())
    }
}

/// The values of an image, as kernels that reduce over them count.
fn per_image(op: &'static str, x: &Tensor) -> Result<usize> {
    let count = x.shape()[1..].iter().product();
    match i32::try_from(count) {
        Ok(_) => Ok(count),
        Err(_) => Err(Error::TooLarge { op, what: "H * W * C", got: count as u128, limit: i32::MAX as u128 }),
    }
}

/// `[N]`, f32: what the guided output of each image is multiplied by: arXiv:2305.08891, eqs. (15), (16). 1 for an image
/// that does not rescale.
fn rescale_factors(output: &Output, guidance: &Guidance, n: usize) -> Result<Tensor> {
    const OP: &str = "guidance_rescale";
    let values = output.values;
    let count = per_image(OP, values)?;

    let mut factors = Tensor::uninit(values.device(), &[n], DType::F32)?;
    let _timed = profile::scope(OP, factors.shape());
    match values.device() {
        Device::Meta(meta) => {
            let (flops, bytes) = (5 * values.numel() as u64, 2 * values.bytes() + factors.bytes());
            meta.record(OP, OpKind::Elementwise, factors.shape(), Work { macs: 0, flops, bytes, launches: 1 });
        }
        Device::Cpu(_) | Device::Cuda(_) if factors.numel() == 0 => {}
        Device::Cpu(_) => by_dtype!(values.dtype(), T => rescale_factors_cpu::<T>(values, guidance, &mut factors)),
        Device::Cuda(card) => cuda::step::guidance_rescale(card, output, guidance, count, &mut factors)?,
    }
    Ok(factors)
}

fn rescale_factors_cpu<T: Element>(values: &Tensor, guidance: &Guidance, factors: &mut Tensor) {
    let half = values.numel() / 2;
    let (count, scales) = (half / factors.numel(), guidance.table.cpu::<f32>());
    let (uncond, cond) = values.cpu::<T>().split_at(half);
    for (image, factor) in factors.cpu_mut::<f32>().iter_mut().enumerate() {
        let (scale, rescale) = (scales[2 * image], scales[2 * image + 1]);
        let range = image * count..(image + 1) * count;
        let cond = || cond[range.clone()].iter().map(|v| v.to_f32());
        let guided = || {
            uncond[range.clone()].iter().zip(cond()).map(|(e, cond)| {
                let e = e.to_f32();
                e + scale * (cond - e)
            })
        };
        *factor = match rescale {
            0.0 => 1.0,
            _ => rescale * (deviation(cond) / deviation(guided)) + (1.0 - rescale),
        };
    }
}

/// Times the root of the count, which the ratio of two deviations does not see.
fn deviation<I: Iterator<Item = f32>>(values: impl Fn() -> I) -> f32 {
    let (sum, count) = values().fold((0.0, 0.0), |(sum, count), v| (sum + f64::from(v), count + 1.0));
    let mean = sum / count;
    values().map(|v| (f64::from(v) - mean).powi(2)).sum::<f64>().sqrt() as f32
}

/// `[N]`, f32: the bound of each image's clean sample.
fn dynamic_thresholds(x: &Tensor, output: &Output, steps: &StepTable, thresholding: Thresholding) -> Result<Tensor> {
    const OP: &str = "dynamic_threshold";
    let (n, count) = (x.shape()[0], per_image(OP, x)?);
    let (rank, max) = (Rank::of(thresholding.ratio, count), thresholding.max);

    let mut thresholds = Tensor::uninit(x.device(), &[n], DType::F32)?;
    let _timed = profile::scope(OP, thresholds.shape());
    match x.device() {
        Device::Meta(meta) => {
            let (flops, bytes) = (8 * x.numel() as u64, 8 * (x.bytes() + output.values.bytes()) + thresholds.bytes());
            meta.record(OP, OpKind::Elementwise, thresholds.shape(), Work { macs: 0, flops, bytes, launches: 1 });
        }
        Device::Cpu(_) | Device::Cuda(_) if x.numel() == 0 => {}
        Device::Cpu(_) => by_dtype!(output.values.dtype(), T => {
            dynamic_thresholds_cpu(x, &CpuOutput::<T>::new(output, n * count), steps, max, rank, &mut thresholds);
        }),
        Device::Cuda(card) => {
            cuda::step::dynamic_threshold(card, x, output, steps, max, rank, count, &mut thresholds)?;
        }
    }
    Ok(thresholds)
}

fn dynamic_thresholds_cpu<T: Element>(
    x: &Tensor,
    output: &CpuOutput<T>,
    steps: &StepTable,
    max: f32,
    rank: Rank,
    thresholds: &mut Tensor,
) {
    let (x, count) = (x.cpu::<f32>(), x.numel() / thresholds.numel());
    for (image, threshold) in thresholds.cpu_mut::<f32>().iter_mut().enumerate() {
        let k = steps.rows[steps.index.get(image)].coefficients;
        let of = |i: usize| (k.x0_from_x * x[i] + k.x0_from_e * output.at(i, image)).abs();
        let mut magnitudes: Vec<f32> = (image * count..(image + 1) * count).map(of).collect();
        let (_, &mut below, larger) = magnitudes.select_nth_unstable_by(rank.below, f32::total_cmp);
        let above = match rank.above == rank.below {
            true => below,
            false => larger.iter().copied().min_by(f32::total_cmp).unwrap_or(below),
        };
        *threshold = rank.between(below, above).max(1.0).min(max);
    }
}

/// Between which two values of the sorted ones a quantile lies, and how far from the first to the second.
#[derive(Clone, Copy)]
pub(super) struct Rank {
    pub below: usize,
    pub above: usize,
    pub weight: f32,
}

impl Rank {
    /// The `ratio` quantile's of `count` values, as torch computes it.
    fn of(ratio: f32, count: usize) -> Rank {
        let last = count.saturating_sub(1);
        let rank = ratio * last as f32;
        Rank { below: rank as usize, above: (rank.ceil() as usize).min(last), weight: rank.fract() }
    }

    /// As torch's lerp, which is exact at both ends.
    fn between(&self, below: f32, above: f32) -> f32 {
        match self.weight < 0.5 {
            true => below + self.weight * (above - below),
            false => above - (above - below) * (1.0 - self.weight),
        }
    }
}

/// The output on the host, guided.
struct CpuOutput<'a, T> {
    uncond: &'a [T],
    /// The other half, and scale and rescale per image.
    guided: Option<(&'a [T], &'a [f32])>,
    factors: Option<&'a [f32]>,
}

impl<'a, T: Element> CpuOutput<'a, T> {
    fn new(output: &Output<'a>, count: usize) -> CpuOutput<'a, T> {
        let (uncond, cond) = output.values.cpu::<T>().split_at(count);
        let guided = output.guidance.map(|guidance| (cond, guidance.table.cpu::<f32>()));
        CpuOutput { uncond, guided, factors: output.factors.map(|factors| factors.cpu()) }
    }

    fn at(&self, i: usize, image: usize) -> f32 {
        let mut e = self.uncond[i].to_f32();
        if let Some((cond, scales)) = self.guided {
            e += scales[2 * image] * (cond[i].to_f32() - e);
        }
        if let Some(factors) = self.factors {
            e *= factors[image];
        }
        e
    }
}

/// The state after the step.
fn sampler_step_cpu(
    state: &SampleState,
    output: &Output,
    steps: &StepTable,
    noise: Option<&Tensor>,
    thresholds: Option<&Tensor>,
) -> Result<SampleState> {
    let uninit = || Tensor::uninit(state.x.device(), state.x.shape(), DType::F32);
    let (mut next, mut x0) = (uninit()?, uninit()?);
    let count = state.x.numel();
    let per_image = count / state.x.shape()[0];
    // [depth, N, ...]; what an image keeps is written once the image is done.
    let mut history = match &state.history {
        Some(history) => Some(history.duplicate()?),
        None => None,
    };
    by_dtype!(output.values.dtype(), T => {
        let output = CpuOutput::<T>::new(output, count);
        let of_images = next.cpu_mut::<f32>().chunks_exact_mut(per_image).zip(x0.cpu_mut().chunks_exact_mut(per_image));
        for (image, (next, x0)) in of_images.enumerate() {
            let first = image * per_image;
            let of_image = |tensor: &Tensor| tensor.cpu::<f32>()[first..first + per_image].to_vec();
            let Some(StepRow { coefficients: k, .. }) = steps.next_row(image) else {
                next.copy_from_slice(&of_image(&state.x));
                x0.copy_from_slice(&of_image(&state.x0));
                continue;
            };
            let x = &state.x.cpu::<f32>()[first..first + per_image];
            let noise = noise.filter(|_| k.next_from_noise != 0.0).map(|noise| &noise.cpu::<f32>()[first..]);
            let bound = thresholds.map(|thresholds| thresholds.cpu::<f32>()[image]);
            let clip = k.clip.unwrap_or(f32::INFINITY);
            let before = state.history.as_ref().map_or(&[] as &[f32], |history| history.cpu());
            let earlier: Vec<(f32, &[f32])> = k
                .next_from_history
                .iter()
                .enumerate()
                .filter(|(_, weight)| **weight != 0.0)
                .map(|(j, &weight)| (weight, &before[j * count + first..][..per_image]))
                .collect();
            // One value kept per element, or none: then the chunks are empty.
            let keeps = k.kept.filter(|_| history.is_some());
            let mut kept = keeps.map_or_else(Vec::new, |_| vec![0f32; per_image]);
            let mut kept_chunks: Vec<&mut [f32]> = kept.chunks_mut(CHUNK).collect();
            kept_chunks.resize_with(per_image.div_ceil(CHUNK), Default::default);
            let chunks = next.par_chunks_mut(CHUNK).zip(x0.par_chunks_mut(CHUNK));
            chunks.zip(kept_chunks).enumerate().for_each(|(chunk, ((next, x0), kept))| {
                for (j, (next, x0)) in next.iter_mut().zip(x0).enumerate() {
                    let i = chunk * CHUNK + j;
                    let e = output.at(first + i, image);
                    let clean = |x: f32| {
                        let value = k.x0_from_x * x + k.x0_from_e * e;
                        match bound {
                            // Not clamp, which a NaN bound stops; a NaN value stays.
                            Some(bound) if value > bound => 1.0,
                            Some(bound) if value < -bound => -1.0,
                            Some(bound) => value / bound,
                            None => value.clamp(-clip, clip),
                        }
                    };
                    *x0 = clean(x[i]);
                    *next = k.next_from_x * x[i] + k.next_from_e * e + k.next_from_x0 * *x0;
                    for (weight, values) in &earlier {
                        *next += weight * values[i];
                    }
                    if let Some(noise) = noise {
                        *next += k.next_from_noise * noise[i];
                    }
                    if let (Some(of), Some(kept)) = (keeps, kept.get_mut(j)) {
                        *kept = of.from_x * x[i] + of.from_e * e + of.from_x0 * *x0;
                    }
                    if k.x0_from_next {
                        *x0 = clean(*next);
                    }
                }
            });
            if let (Some(history), Some(_)) = (&mut history, keeps) {
                let (depth, history) = (history.shape()[0], history.cpu_mut::<f32>());
                for j in (1..depth).rev() {
                    let latest = (j - 1) * count + first;
                    history.copy_within(latest..latest + per_image, j * count + first);
                }
                history[first..first + per_image].copy_from_slice(&kept);
            }
        }
    });
    Ok(SampleState { x: next, x0, history })
}
