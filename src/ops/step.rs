//! What a step does around the denoiser. All that changes from step to step stands in tables on the device, read by an
//! index on the device: so the work of one step, recorded once, is that of every step.

use rayon::prelude::*;

use super::elementwise::{CHUNK, scale_cast};
use super::{Tensor, by_dtype, bytes_of, cuda, float};
use crate::error::{Error, Result};
use crate::runtime::{DType, Device, Element, OpKind, Work};

/// Which step of a run each of n images takes next, on the host and on the device: kernels read the device's, so that work
/// recorded in a graph finds the right row of every table at each replay. A batch of k n images is k times the n images in
/// their order (with classifier-free guidance: all unconditional, then all conditional), so its image i takes step i mod n.
#[derive(Debug)]
pub struct StepIndex {
    /// At least one.
    host: Vec<usize>,
    /// `[n]`, u32
    device: Tensor,
}

impl StepIndex {
    /// The steps of n images that advance together, each from its own.
    ///
    /// # Errors
    /// [`Error::Argument`]: no steps; [`Error::TooLarge`]; [`Error::OutOfMemory`].
    pub fn new(device: &Device, steps: &[usize]) -> Result<StepIndex> {
        if steps.is_empty() {
            return Err(Error::argument("StepIndex", "steps", 0, "one for each image, at least one"));
        }
        let device = Tensor::from_u32(device, &[steps.len()], &as_u32(steps)?)?;
        Ok(StepIndex { host: steps.to_vec(), device })
    }

    /// One step for all images of a batch.
    ///
    /// # Errors
    /// [`Error::TooLarge`]; [`Error::OutOfMemory`].
    pub fn one(device: &Device, step: usize) -> Result<StepIndex> {
        StepIndex::new(device, &[step])
    }

    /// The images with a step of their own, n.
    pub fn images(&self) -> usize {
        self.host.len()
    }

    /// The step of image `image` of a batch, whose images 0, n, 2 n, ... are the same one.
    pub fn get(&self, image: usize) -> usize {
        self.host[image % self.host.len()]
    }

    /// The largest of the images' steps.
    pub fn last(&self) -> usize {
        self.host.iter().copied().max().unwrap_or(0)
    }

    /// `[n]`, u32, on the device.
    pub fn tensor(&self) -> &Tensor {
        &self.device
    }

    /// The index on a card stays where it is, so recorded work reads the new steps.
    ///
    /// # Errors
    /// [`Error::Argument`]: other than n steps; [`Error::TooLarge`]; [`Error::Driver`].
    pub fn set(&mut self, steps: &[usize]) -> Result<()> {
        if steps.len() != self.images() {
            let want = format!("{}, one for each image of the index", self.images());
            return Err(Error::argument("StepIndex", "steps", steps.len(), want));
        }
        self.device.write_u32(&as_u32(steps)?)?;
        self.host.copy_from_slice(steps);
        Ok(())
    }

    /// All images to their next step; on a card by one launch, after the work launched before.
    ///
    /// # Errors
    /// [`Error::TooLarge`]; [`Error::Driver`]
    pub fn advance(&mut self) -> Result<()> {
        let next: Vec<usize> = self.host.iter().map(|step| step + 1).collect();
        match self.device.device().clone() {
            Device::Meta(meta) => {
                let work = Work { macs: 0, flops: 0, bytes: 2 * self.device.bytes(), launches: 1 };
                meta.record("advance_step", OpKind::Elementwise, &[next.len()], work);
            }
            Device::Cpu(_) => self.device.write_u32(&as_u32(&next)?)?,
            Device::Cuda(card) => cuda::step::advance(&card, &mut self.device)?,
        }
        self.host = next;
        Ok(())
    }

    /// Tells the host of an [`advance`](StepIndex::advance) that a replay did on the device.
    pub fn replayed(&mut self) {
        self.host.iter_mut().for_each(|step| *step += 1);
    }
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
        if !images.is_multiple_of(self.step.images()) {
            let want = format!("a number that divides the {images} images of the batch");
            return Err(Error::argument(op, "images with a step of their own", self.step.images(), want));
        }
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

/// One sampler step as the affine map that every sampler of the family is, computed in f64 by the schedulers:
/// ```text
/// e    = e_uncond + guidance (e_cond - e_uncond)            (the model's output: eps, v or x0)
/// x0   = x0_from_x x + x0_from_e e,                          then clamped to [-clip, clip] if asked
/// next = next_from_x x + next_from_e e + next_from_x0 x0 + next_from_noise n
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepCoefficients {
    pub x0_from_x: f32,
    pub x0_from_e: f32,
    pub clip: Option<f32>,
    pub next_from_x: f32,
    pub next_from_e: f32,
    pub next_from_x0: f32,
    pub next_from_noise: f32,
    /// x0 is computed a second time, from `next` in the place of x: what the published MegaFusion code relays.
    pub x0_from_next: bool,
}

/// What a step needs beside the model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepRow {
    /// The network reads the latents times this.
    pub input_scale: f32,
    pub coefficients: StepCoefficients,
}

/// All steps of a run, on the device, and which is next.
#[derive(Debug)]
pub struct StepTable {
    rows: Vec<StepRow>,
    /// `[steps, COLUMNS]`, f32, in the order of `Column` in kernels/step.cu.
    table: Tensor,
    index: StepIndex,
}

const COLUMNS: usize = 12;

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
        values.extend([k.next_from_noise, x0_from_next, 0.0, 0.0, 0.0]);
    }
    Ok(values)
}

impl StepTable {
    /// The first row is next.
    ///
    /// # Errors
    /// [`Error::Argument`]: no rows, a `clip` that is negative or NaN; [`Error::OutOfMemory`].
    pub fn new(device: &Device, rows: Vec<StepRow>) -> Result<StepTable> {
        const OP: &str = "StepTable";
        if rows.is_empty() {
            return Err(Error::argument(OP, "rows", 0, "at least one step"));
        }
        let table = Tensor::from_f32(device, &[rows.len(), COLUMNS], DType::F32, &values(&rows)?)?;
        Ok(StepTable { rows, table, index: StepIndex::one(device, 0)? })
    }

    /// Other rows, as many, in the same place; `first` is next.
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
        let steps = vec![first; self.index.images()];
        self.index.set(&steps)
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

    /// The row of the next step.
    ///
    /// # Errors
    /// [`Error::Argument`] when all are done.
    pub fn current(&self) -> Result<&StepRow> {
        let (step, want) = (self.index.get(0), || format!("below {}, the steps of the table", self.len()));
        self.rows.get(step).ok_or_else(|| Error::argument("StepTable", "step", step, want()))
    }

    /// Does any step add noise?
    pub fn adds_noise(&self) -> bool {
        self.rows.iter().any(|row| row.coefficients.next_from_noise != 0.0)
    }

    pub(super) fn tensor(&self) -> &Tensor {
        &self.table
    }
}

/// The current step's `input_scale * x`, rounded to `dtype`, `repeats` times along the batch: what the network reads.
/// `x: [N, ...]`, f32, to `[repeats * N, ...]`.
///
/// # Errors
/// As [`scale_cast`]; [`Error::Argument`] after the table's last step.
pub fn scale_input(x: &Tensor, steps: &StepTable, dtype: DType, repeats: usize) -> Result<Tensor> {
    const OP: &str = "scale_input";
    x.expect(OP, "x", x.shape(), DType::F32, steps.table.device())?;
    let scale = steps.current()?.input_scale;
    let Device::Cuda(card) = x.device() else {
        return scale_cast(x, scale, 0.0, dtype, repeats);
    };
    let Some((&n, rest)) = x.shape().split_first() else {
        return Err(Error::shape(OP, "x", x, "[N, ...]"));
    };
    if !dtype.is_float() {
        return Err(Error::Dtype { op: OP, arg: "dtype", got: dtype, want: "f32, f16 or bf16".into() });
    }
    if repeats == 0 {
        return Err(Error::argument(OP, "repeats", repeats, "at least 1"));
    }
    let mut y = Tensor::uninit(x.device(), &[&[n * repeats], rest].concat(), dtype)?;
    cuda::step::scale_input(card, x, steps, repeats, &mut y)?;
    Ok(y)
}

/// The sample on its way, and the clean sample of the latest step.
#[derive(Debug)]
pub struct SampleState {
    x: Tensor,
    x0: Tensor,
}

impl SampleState {
    /// `x: [N, H, W, C]`, f32, that nobody else holds: steps overwrite it. `x0` is unspecified before the first.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Dtype`]: `x`; [`Error::Argument`]: it is shared; [`Error::OutOfMemory`].
    pub fn new(x: Tensor) -> Result<SampleState> {
        const OP: &str = "SampleState";
        x.dims::<4>(OP, "x")?;
        x.expect(OP, "x", x.shape(), DType::F32, x.device())?;
        if !x.is_unshared() {
            return Err(Error::argument(OP, "x", "shared", "a tensor that nobody else holds"));
        }
        let x0 = Tensor::uninit(x.device(), x.shape(), DType::F32)?;
        Ok(SampleState { x, x0 })
    }

    /// Other samples of the same shape, in the same place.
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
}

/// Guidance, x0 and update in one pass, in place, with the current row of `steps`.
///
/// * `model_output`: `[N, H, W, C]` without guidance, else `[2N, H, W, C]`, unconditional rows first; any float dtype
/// * `guidance`: the scale w, `None` when the output has N rows
/// * `noise`: `[N, H, W, C]`, f32, required exactly when a row of the table has a `next_from_noise` other than 0; rows
///   with 0 do not read it
///
/// # Errors
/// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: which argument; [`Error::Argument`]: noise missing or
/// superfluous, no step left.
pub fn sampler_step(
    state: &mut SampleState,
    model_output: &Tensor,
    guidance: Option<f32>,
    steps: &StepTable,
    noise: Option<&Tensor>,
) -> Result<()> {
    const OP: &str = "sampler_step";
    let SampleState { x, .. } = &*state;
    let [n, h, w, c] = x.dims(OP, "x")?;
    x.expect(OP, "x", x.shape(), DType::F32, steps.table.device())?;
    float(OP, "model_output", model_output)?;
    let rows = if guidance.is_some() { 2 * n } else { n };
    model_output.expect(OP, "model_output", &[rows, h, w, c], model_output.dtype(), x.device())?;
    match (noise, steps.adds_noise()) {
        (Some(noise), true) => noise.expect(OP, "noise", x.shape(), DType::F32, x.device())?,
        (None, false) => {}
        (Some(_), false) => {
            return Err(Error::argument(OP, "noise", "given", "none: next_from_noise is 0 in every step"));
        }
        (None, true) => return Err(Error::argument(OP, "noise", "missing", "a tensor: next_from_noise is not 0")),
    }
    let coefficients = steps.current()?.coefficients;
    match x.device().clone() {
        Device::Meta(meta) => {
            let bytes = 4 * x.bytes() + bytes_of(&[Some(model_output), noise]);
            let flops = x.numel() as u64 * if guidance.is_some() { 13 } else { 10 };
            meta.record(OP, OpKind::Elementwise, x.shape(), Work { macs: 0, flops, bytes, launches: 1 });
        }
        Device::Cpu(_) => {
            let mut next = Tensor::uninit(x.device(), x.shape(), DType::F32)?;
            let mut x0 = Tensor::uninit(x.device(), x.shape(), DType::F32)?;
            let noise = noise.map(|noise| noise.cpu::<f32>());
            by_dtype!(model_output.dtype(), T => {
                let (uncond, cond) = model_output.cpu::<T>().split_at(x.numel());
                let guided = guidance.map(|scale| (scale, cond));
                step_cpu(x.cpu(), uncond, guided, &coefficients, noise, next.cpu_mut(), x0.cpu_mut());
            });
            *state = SampleState { x: next, x0 };
        }
        Device::Cuda(card) => {
            cuda::step::sampler_step(&card, &mut state.x, &mut state.x0, model_output, guidance, steps, noise)?;
        }
    }
    Ok(())
}

/// The loop of [`sampler_step`]; `guided` holds the guidance scale and the conditional half.
fn step_cpu<T: Element>(
    x: &[f32],
    output: &[T],
    guided: Option<(f32, &[T])>,
    k: &StepCoefficients,
    noise: Option<&[f32]>,
    next: &mut [f32],
    x0: &mut [f32],
) {
    let clip = k.clip.unwrap_or(f32::INFINITY);
    next.par_chunks_mut(CHUNK).zip(x0.par_chunks_mut(CHUNK)).enumerate().for_each(|(chunk, (next, x0))| {
        let start = chunk * CHUNK;
        for (i, (next, x0)) in next.iter_mut().zip(x0).enumerate() {
            let i = start + i;
            let mut e = output[i].to_f32();
            if let Some((scale, cond)) = guided {
                e += scale * (cond[i].to_f32() - e);
            }
            let clean = |x: f32| (k.x0_from_x * x + k.x0_from_e * e).clamp(-clip, clip);
            *x0 = clean(x[i]);
            *next = k.next_from_x * x[i] + k.next_from_e * e + k.next_from_x0 * *x0;
            if let Some(noise) = noise.filter(|_| k.next_from_noise != 0.0) {
                *next += k.next_from_noise * noise[i];
            }
            if k.x0_from_next {
                *x0 = clean(*next);
            }
        }
    });
}
