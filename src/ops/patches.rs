use std::ops::Range;

use super::cpu::patches as on_cpu;
use super::step::{Output, rescale_factors};
use super::{Guidance, StepTable, Tensor, bytes_of, cuda, profile};
use crate::error::{Error, Result};
use crate::runtime::{DType, Device, OpKind, Work};

/// Where patches lie on the maps of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PatchLayout {
    /// Rows and columns of a map.
    pub map: [usize; 2],
    /// Rows and columns of a patch.
    pub size: [usize; 2],
    /// Cells of the map from one cell of a patch to the next: 1 for crops.
    pub stride: usize,
    /// Do the map's last columns border on the first?
    pub wraps: bool,
}

impl PatchLayout {
    /// Does no patch hold a cell twice?
    fn check_wrap(&self, op: &'static str) -> Result<()> {
        let (width, reach) = (self.map[1], (self.size[1] - 1) * self.stride);
        if self.wraps && reach >= width {
            let want = format!("within the {width} columns of the map, around which it wraps");
            return Err(Error::argument(op, "columns of a patch", reach + 1, want));
        }
        Ok(())
    }
}

/// Boxes of cells of one shape on the maps of a batch, as many on each, and which of them the next group is. Cell (i, j) of a
/// patch is the map's (top + i stride, left + j stride). Origins and group stand on the device: work recorded in a graph reads
/// those of each replay.
#[derive(Debug)]
pub struct Patches {
    layout: PatchLayout,
    /// `[N, total, 2]`, i32 in U32: row and column of every patch's first cell.
    origins: Tensor,
    /// `[1]`, U32: the group's first patch.
    first: Tensor,
    group: Range<usize>,
}

/// What the network reads has another mean and deviation than the map that it is read from: `(x - mean) std' / std + mean'`.
#[derive(Clone, Copy, Debug)]
pub struct Restandardised<'a> {
    /// `[N, 2]`, f32, of [`latent_moments`](super::latent_moments): mean and std, of the map.
    pub from: &'a Tensor,
    /// The same: mean' and std'.
    pub to: &'a Tensor,
}

/// Largest coordinate: sums and products of them stay far from 2^31.
const FARTHEST: usize = 1 << 20;

impl Patches {
    /// `total` patches on each of `images` maps, for [`place`](Patches::place) to put somewhere.
    ///
    /// # Errors
    /// [`Error::Argument`]: an empty map or patch, no patch, no stride, a patch that reaches beyond 2^20 cells;
    /// [`Error::OutOfMemory`].
    pub fn new(device: &Device, images: usize, total: usize, layout: PatchLayout) -> Result<Patches> {
        const OP: &str = "Patches";
        let PatchLayout { map, size, stride, .. } = layout;
        let all = [map[0], map[1], size[0], size[1], stride, total];
        if all.contains(&0) || all.iter().any(|&n| n > FARTHEST) {
            let got = format!("{total} of {layout:?}");
            return Err(Error::argument(OP, "layout", got, format!("sizes, stride and patches from 1 to {FARTHEST}")));
        }
        let reach = size.map(|n| (n - 1) * stride + 1);
        if reach.iter().any(|&n| n > FARTHEST) {
            return Err(Error::argument(OP, "layout", format!("{layout:?}"), "within 2^20 cells"));
        }
        let origins = Tensor::from_u32(device, &[images, total, 2], &vec![0; images * total * 2])?;
        let first = Tensor::from_u32(device, &[1], &[0])?;
        Ok(Patches { layout, origins, first, group: 0..total })
    }

    pub fn layout(&self) -> PatchLayout {
        self.layout
    }

    /// Of each map.
    pub fn total(&self) -> usize {
        self.origins.shape()[1]
    }

    /// Row and column of each patch's first cell, those of the first map before those of the second; they may lie outside of
    /// the map. What was recorded reads them from now on.
    ///
    /// # Errors
    /// [`Error::Argument`]: other than `total` per map, beyond 2^20 cells, where columns wrap around a column outside of the
    /// map; [`Error::Driver`].
    pub fn place(&mut self, origins: &[[i32; 2]]) -> Result<()> {
        const OP: &str = "Patches";
        let count = self.origins.numel() / 2;
        if origins.len() != count {
            return Err(Error::argument(OP, "origins", origins.len(), format!("{count}, one for each patch")));
        }
        let PatchLayout { map, wraps, .. } = self.layout;
        let far = |&&[row, column]: &&[i32; 2]| {
            let inside = column >= 0 && (column as usize) < map[1];
            row.unsigned_abs().max(column.unsigned_abs()) as usize > FARTHEST || wraps && !inside
        };
        if let Some(bad) = origins.iter().find(far) {
            let want = format!("within 2^20 cells of the map, and where columns wrap around below {}", map[1]);
            return Err(Error::argument(OP, "origins", format!("{bad:?}"), want));
        }
        self.origins.write_u32(&origins.as_flattened().iter().map(|&at| at as u32).collect::<Vec<_>>())
    }

    /// These patches of each map are the group that is gathered and stepped next.
    ///
    /// # Errors
    /// [`Error::Argument`]: an empty group, patches that there are not; [`Error::Driver`].
    pub fn begin_group(&mut self, group: Range<usize>) -> Result<()> {
        if group.is_empty() || group.end > self.total() {
            let want = format!("at least one of the {} patches", self.total());
            return Err(Error::argument("Patches", "group", format!("{group:?}"), want));
        }
        self.first.write_u32(&[group.start as u32])?;
        self.group = group;
        Ok(())
    }

    /// How many patches of each map the group has.
    pub fn group_len(&self) -> usize {
        self.group.len()
    }

    pub(in crate::ops) fn group(&self) -> Range<usize> {
        self.group.clone()
    }

    /// `(origins, first)`
    pub(in crate::ops) fn tensors(&self) -> (&Tensor, &Tensor) {
        (&self.origins, &self.first)
    }

    /// Fit for `x`, f32, `[N, H, W, C]`?
    fn check(&self, op: &'static str, x: &Tensor, steps: &StepTable) -> Result<[usize; 4]> {
        let [n, h, w, c] = x.dims(op, "x")?;
        let ([height, width], images) = (self.layout.map, self.origins.shape()[0]);
        x.expect(op, "x", &[images, height, width, c], DType::F32, self.origins.device())?;
        if !steps.tensor().device().same(x.device()) {
            let got = steps.tensor().device().to_string();
            return Err(Error::Device { op, arg: "steps", got, want: x.device().to_string() });
        }
        if steps.index().images() != 1 {
            let want = "1: the patches of all images take the same step";
            return Err(Error::argument(op, "images with a step of their own", steps.index().images(), want));
        }
        steps.check(op, n)?;
        Ok([n, h, w, c])
    }
}

/// `input_scale * x` at the cells of a group's patches, with the scale of the step, rounded to `dtype`, `repeats` times along
/// the batch: what the network reads. `x: [N, H, W, C]`, f32, to `[repeats * N * V, h, w, C]`, the V patches of an image side
/// by side. Outside of the map there are zeros.
///
/// # Errors
/// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: which argument; [`Error::Argument`]: `repeats` is 0, no step is
/// left, images with steps of their own; [`Error::TooLarge`].
pub fn gather_patches(
    x: &Tensor,
    patches: &Patches,
    restandardised: Option<Restandardised>,
    steps: &StepTable,
    dtype: DType,
    repeats: usize,
) -> Result<Tensor> {
    const OP: &str = "gather_patches";
    let [n, _, _, c] = patches.check(OP, x, steps)?;
    if let Some(Restandardised { from, to }) = restandardised {
        from.expect(OP, "from", &[n, 2], DType::F32, x.device())?;
        to.expect(OP, "to", &[n, 2], DType::F32, x.device())?;
    }
    if !dtype.is_float() {
        return Err(Error::Dtype { op: OP, arg: "dtype", got: dtype, want: "f32, f16 or bf16".into() });
    }
    if repeats == 0 {
        return Err(Error::argument(OP, "repeats", repeats, "at least 1"));
    }
    let ([h, w], count) = (patches.layout.size, patches.group_len());
    let (got, limit) = (n as u128 * count as u128 * repeats as u128, isize::MAX as u128);
    if got > limit {
        return Err(Error::TooLarge { op: OP, what: "repeats * N * V", got, limit });
    }

    let mut y = Tensor::uninit(x.device(), &[repeats * n * count, h, w, c], dtype)?;
    let _timed = profile::scope(OP, y.shape());
    match x.device() {
        Device::Meta(meta) => {
            let read = (y.numel() / repeats) as u64;
            let flops = read * if restandardised.is_some() { 5 } else { 1 };
            let work = Work { macs: 0, flops, bytes: 4 * read + y.bytes(), launches: 1 };
            meta.record(OP, OpKind::Elementwise, y.shape(), work);
        }
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) => on_cpu::gather(x, patches, restandardised, steps, repeats, &mut y),
        Device::Cuda(card) => cuda::patches::gather(card, x, patches, restandardised, steps, repeats, &mut y)?,
    }
    Ok(y)
}

/// The sampler's step of each patch of a group, added up where they overlap: `sums` takes, from the first group to the last,
/// the sum over the patches that hold a cell, and behind the last group their mean; a cell that no patch holds keeps x. What
/// comes out has the same bits however the patches are grouped and whatever else is in the batch.
///
/// * `x`, `sums`: `[N, H, W, C]`, f32; `x` is what every patch is a part of
/// * `model_output`: `[N * V, h, w, C]` without guidance, else `[2 N V, h, w, C]`, as
///   [`gather_patches`] has them; any float dtype. Of a network that also predicts the variance of its noise 2C channels, of
///   which the second half is not read
/// * `guidance`: of N V images, those of an image's patches side by side
///
/// # Errors
/// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: which argument; [`Error::Argument`]: no step is left, images with
/// steps of their own, a patch that wraps around onto itself, a table whose steps add noise, reach back to earlier ones or threshold; [`Error::TooLarge`]: 2^31 or
/// more values per patch with guidance rescale.
pub fn step_patches(
    x: &Tensor,
    patches: &Patches,
    model_output: &Tensor,
    guidance: Option<&Guidance>,
    steps: &StepTable,
    sums: &mut Tensor,
) -> Result<()> {
    const OP: &str = "step_patches";
    let [n, _, _, c] = patches.check(OP, x, steps)?;
    sums.expect(OP, "sums", x.shape(), DType::F32, x.device())?;
    let ([h, w], images) = (patches.layout.size, n * patches.group_len());
    patches.layout.check_wrap(OP)?;
    let mut output = Output::new(OP, model_output, guidance, [images, h, w, c], steps.learns_noise(), x.device())?;
    let whole = steps.adds_noise() || steps.history() > 0 || steps.thresholding.is_some();
    if whole || steps.rows().iter().any(|row| row.coefficients.x0_from_next) {
        let want = "steps that read the patch and the output alone: no noise, history, threshold or x0 from the next";
        return Err(Error::argument(OP, "steps", "with more", want));
    }

    let factors = match guidance {
        Some(guidance) if guidance.rescales() => Some(rescale_factors(&output, guidance, images)?),
        _ => None,
    };
    output.factors = factors.as_ref();
    let _timed = profile::scope(OP, x.shape());
    match x.device() {
        Device::Meta(meta) => {
            let flops = (images * h * w * c) as u64 * if guidance.is_some() { 11 } else { 8 };
            let bytes = 3 * x.bytes() + bytes_of(&[Some(model_output)]);
            meta.record(OP, OpKind::Elementwise, x.shape(), Work { macs: 0, flops, bytes, launches: 1 });
        }
        Device::Cpu(_) | Device::Cuda(_) if x.numel() == 0 => {}
        Device::Cpu(_) => on_cpu::step(x, patches, &output, steps, sums),
        Device::Cuda(card) => cuda::patches::step(card, x, patches, &output, steps, sums)?,
    }
    Ok(())
}

/// All patches of each map, weighed by their rows and columns where they overlap: a cell is
/// `sum_p r_i c_j values_p(i, j) / sum_p r_i c_j` over the patches that hold it, in f32, and 0 where none does.
///
/// * `values`: `[N * total, h, w, C]`, f32, the patches of an image side by side
/// * `rows`, `columns`: `[h]` and `[w]`, f32, above 0
///
/// To `[N, H, W, C]`, f32.
///
/// # Errors
/// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: which argument; [`Error::Argument`]: a patch that wraps around onto
/// itself.
pub fn merge_patches(values: &Tensor, patches: &Patches, rows: &Tensor, columns: &Tensor) -> Result<Tensor> {
    const OP: &str = "merge_patches";
    let [_, _, _, c] = values.dims(OP, "values")?;
    let (layout, (origins, _)) = (patches.layout(), patches.tensors());
    let ([height, width], [h, w], images) = (layout.map, layout.size, origins.shape()[0]);
    values.expect(OP, "values", &[images * patches.total(), h, w, c], DType::F32, origins.device())?;
    rows.expect(OP, "rows", &[h], DType::F32, origins.device())?;
    columns.expect(OP, "columns", &[w], DType::F32, origins.device())?;
    layout.check_wrap(OP)?;

    let mut y = Tensor::uninit(values.device(), &[images, height, width, c], DType::F32)?;
    let _timed = profile::scope(OP, y.shape());
    match values.device() {
        Device::Meta(meta) => {
            let work =
                Work { macs: 0, flops: 3 * values.numel() as u64, bytes: values.bytes() + y.bytes(), launches: 1 };
            meta.record(OP, OpKind::Elementwise, y.shape(), work);
        }
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) => on_cpu::merge(values, patches, [rows, columns], &mut y),
        Device::Cuda(card) => cuda::patches::merge(card, values, patches, [rows, columns], &mut y)?,
    }
    Ok(y)
}
