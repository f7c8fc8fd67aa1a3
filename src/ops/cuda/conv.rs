//! Launches of kernels/conv2d.cu. How a convolution is split into launches follows from its shape, so that the meta
//! device counts the same launches and the same scratch memory.

use super::norm::{self, Statistics};
use super::tiles::{self, Card, Product, Wide};
use super::{aligned, entry};
use crate::error::{Error, Result};
use crate::ops::conv::{Conv2d, Geometry, OP};
use crate::ops::{GroupStatistics, StepRows};
use crate::runtime::cuda::{CudaDevice, DevicePtr, Launch, args};
use crate::runtime::{DType, Device, Tensor};

/// `kJoinThreads` of conv2d.cu.
const JOIN_THREADS: usize = 256;

/// `StepRows` of conv2d.cu.
#[derive(Clone, Copy)]
#[repr(C)]
struct KernelStepRows {
    images: i32,
    rows: i32,
    images_per_row: i32,
}

impl KernelStepRows {
    /// One row for all without a table, which the kernel does not read then.
    fn new(row: Option<StepRows>, images: usize) -> Result<KernelStepRows> {
        let (steps, rows) = row.map_or((1, 1), |row| (row.step.images(), row.rows));
        let count = |what, value| tiles::count(OP, what, value);
        Ok(KernelStepRows {
            images: count("images with a step of their own", steps)?,
            rows: count("conditioning rows", rows)?,
            images_per_row: count("N / conditioning rows", images / rows)?,
        })
    }
}

/// The launches that a convolution is made of.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// The norm, which the group norm's own kernels apply before, into a scratch tensor.
    norm: Option<norm::Form>,
    /// The statistics of the norm's input are given.
    statistics_given: bool,
    /// Of the input that is there, as stored.
    dims: [usize; 4],
    splits: usize,
    /// Output pixels, over all images, and channels.
    m: usize,
    outputs: usize,
}

impl Plan {
    pub fn new(args: &Conv2d, g: &Geometry) -> Plan {
        let dims = [g.images, g.held[1] - g.held[0], g.stored[1], g.channels];
        let pixels = g.output[0] * g.output[1];
        let taps = g.kernel[0] * g.kernel[1];
        // Without values there is only padding.
        let norm = args.norm.filter(|_| dims.iter().all(|&size| size > 0));
        let norm = norm.map(|norm| norm::Form::of(args.weight.device(), dims, norm.groups, args.weight.dtype()));
        // A stripe's sums are split as the whole image's.
        let splits = tiles::splits(g.whole_output[0] * g.whole_output[1], g.outputs, taps * g.channels);
        let statistics_given = args.stripe.is_some();
        Plan { norm, statistics_given, dims, splits, m: g.images * pixels, outputs: g.outputs }
    }

    pub fn launches(&self) -> u64 {
        if self.m * self.outputs == 0 {
            return 0;
        }
        let norm = match self.norm {
            None => 0,
            Some(_) if self.statistics_given => 1,
            Some(form) => form.launches(),
        };
        norm + 1 + u64::from(self.splits > 1)
    }
}

/// Memory of one call beside its arguments and its result.
pub struct Scratch {
    statistics: Option<Statistics>,
    /// The normalised input.
    normalised: Option<Tensor>,
    /// `[splits, M, O]`, f32
    partial: Option<Tensor>,
}

impl Scratch {
    /// # Errors
    /// As [`Tensor::uninit`].
    pub fn uninit(device: &Device, plan: &Plan, dtype: DType) -> Result<Scratch> {
        let mut scratch = Scratch { statistics: None, normalised: None, partial: None };
        if plan.m * plan.outputs == 0 {
            return Ok(scratch);
        }
        if let Some(form) = &plan.norm {
            if !plan.statistics_given {
                scratch.statistics = norm::scratch(device, form)?;
            }
            scratch.normalised = Some(Tensor::uninit(device, &plan.dims, dtype)?);
        }
        if plan.splits > 1 {
            let shape = [plan.splits, plan.m, plan.outputs];
            scratch.partial = Some(Tensor::uninit(device, &shape, DType::F32)?);
        }
        Ok(scratch)
    }
}

/// `ConvGeometry` of conv2d.cu.
#[derive(Clone, Copy)]
#[repr(C)]
struct KernelGeometry {
    m: i32,
    outputs: i32,
    channels: [i32; 2],
    stored: [i32; 2],
    input: [i32; 2],
    output_width: i32,
    pixels: i32,
    kernel: [i32; 2],
    stride: i32,
    dilation: i32,
    top: i32,
    left: i32,
    first_row: i32,
}

impl KernelGeometry {
    /// `channels`: of the two sources.
    fn new(args: &Conv2d, g: &Geometry, channels: [usize; 2]) -> Result<KernelGeometry> {
        let count = |what, value| tiles::count(OP, what, value);
        let [top, bottom, left, right] = args.padding;
        for (size, padding) in [(g.input[0], [top, bottom]), (g.input[1], [left, right])] {
            // The kernel's mark for a row outside lies below every coordinate of the padded input.
            const LIMIT: usize = 1 << 29;
            let padded = size + padding[0] + padding[1];
            if padded > LIMIT {
                return Err(Error::TooLarge {
                    op: OP,
                    what: "padded input",
                    got: padded as u128,
                    limit: LIMIT as u128,
                });
            }
        }
        for (stored, input) in g.stored.into_iter().zip(g.input) {
            let (got, limit) = (stored as u128 * input as u128, u128::from(u32::MAX));
            if stored != input && got > limit {
                return Err(Error::TooLarge { op: OP, what: "stored size * size of resize_to", got, limit });
            }
        }
        count("kh * kw * C", g.kernel[0] * g.kernel[1] * g.channels)?;
        let pixels = g.output[0] * g.output[1];
        Ok(KernelGeometry {
            m: count("N * H_out * W_out", g.images * pixels)?,
            outputs: count("O", g.outputs)?,
            channels: [count("C", channels[0])?, count("C", channels[1])?],
            stored: [count("H", g.stored[0])?, count("W", g.stored[1])?],
            input: [g.input[0] as i32, g.input[1] as i32],
            output_width: count("W_out", g.output[1])?,
            pixels: count("H_out * W_out", pixels)?,
            kernel: [count("kh", g.kernel[0])?, count("kw", g.kernel[1])?],
            stride: count("stride", args.stride)?,
            dilation: count("dilation", args.dilation)?,
            // Output row 0 of the kernel is the stripe's first.
            top: count("padding", top)? - count("stripe.output * stride", g.first_output * args.stride)?,
            left: left as i32,
            first_row: count("first row", g.held[0])?,
        })
    }
}

pub fn conv2d(
    device: &CudaDevice,
    args: &Conv2d,
    g: &Geometry,
    plan: &Plan,
    mut scratch: Scratch,
    y: &mut Tensor,
) -> Result<()> {
    if y.numel() == 0 {
        return Ok(());
    }
    let (dtype, weight) = (y.dtype(), args.weight);
    let given = args.stripe.and_then(|stripe| stripe.statistics).and_then(GroupStatistics::card);
    if let (Some(norm), Some(normalised)) = (args.norm, &mut scratch.normalised) {
        let args = norm.of(args.x);
        match given {
            Some(given) => norm::group_norm_apply(device, &args, plan.dims, given, normalised)?,
            None => norm::group_norm(device, &args, plan.dims, scratch.statistics.take(), normalised)?,
        }
    }
    let (a, b) = match &scratch.normalised {
        Some(normalised) => (normalised, None),
        None => (args.x.first(), args.x.second()),
    };
    let channels = [a.shape()[3], b.map_or(0, |b| b.shape()[3])];
    let geometry = KernelGeometry::new(args, g, channels)?;
    let k = g.kernel[0] * g.kernel[1] * g.channels;

    let chunk = tiles::chunk(dtype);
    let table = args.row.map(|row| row.table);
    let wide = Wide {
        x: channels.iter().all(|channels| channels % chunk == 0) && aligned(a) && b.is_none_or(aligned),
        weight: k.is_multiple_of(chunk) && aligned(weight),
        output: g.outputs.is_multiple_of(chunk)
            && [Some(&*y), args.bias, table, args.residual, scratch.partial.as_ref()]
                .into_iter()
                .flatten()
                .all(aligned),
    };
    let tile = tiles::pick(&Product {
        op: OP,
        dtype,
        size: [plan.m * plan.splits, g.outputs, k / plan.splits],
        chunks: wide.x && wide.weight,
        card: Card::of(device),
    })?;
    let launch = Launch::grid([tile.blocks(plan.m, g.outputs), plan.splits, 1])
        .block(tile.threads())
        .shared(tile.shared_bytes());
    let conv_entry = entry(&format!("conv2d_{}", tile.name), dtype);
    let pointer = DevicePtr::or_null;
    let partial = pointer(scratch.partial.as_ref());
    let step = pointer(args.row.map(|row| row.step.tensor()));
    let step_rows = KernelStepRows::new(args.row, g.images)?;
    // SAFETY: arguments as the entry has them; the op checked that they fit together, `wide` says what is aligned; the
    // partial sums have room for every split.
    unsafe {
        device.launch(
            "conv2d",
            &conv_entry,
            launch,
            args![
                y.cuda(),
                partial,
                a.cuda(),
                pointer(b),
                weight.cuda(),
                pointer(args.bias),
                pointer(table),
                step,
                step_rows,
                pointer(args.residual),
                args.scale,
                geometry,
                wide.bits()
            ],
        )?;
    }
    if plan.splits == 1 {
        return Ok(());
    }
    let items = plan.m * g.outputs.div_ceil(chunk);
    let launch = Launch::grid([items.div_ceil(JOIN_THREADS), 1, 1]).block(JOIN_THREADS);
    // SAFETY: as above; the partial sums are those of the launch before.
    unsafe {
        device.launch(
            "conv2d",
            &entry("conv2d_join", dtype),
            launch,
            args![
                y.cuda(),
                partial,
                pointer(args.bias),
                pointer(table),
                step,
                step_rows,
                pointer(args.residual),
                args.scale,
                geometry,
                plan.splits as i32,
                wide.bits()
            ],
        )
    }
}
