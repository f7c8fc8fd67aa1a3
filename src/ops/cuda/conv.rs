//! Launches of kernels/conv2d.cu, or of the kernels for Hopper (`conv_sm90`). How a convolution is split into launches follows
//! from its shape, so that the meta device counts the same launches and the same scratch memory.

use super::norm::{self, Statistics};
use super::tiles::{self, Card, Product, Wide};
use super::{aligned, conv_sm90, entry, variants};
use crate::error::{Error, Result};
use crate::ops::GroupStatistics;
use crate::ops::conv::{Conv2d, Geometry, OP};
use crate::runtime::cuda::{CudaDevice, DevicePtr, Isa, Launch, args};
use crate::runtime::{DType, Device, Tensor};

/// `kJoinThreads` of conv2d.cu.
const JOIN_THREADS: usize = 256;

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
    /// Of both sources.
    channels: usize,
    /// Twice the edges as 2 x 2 convolutions, with sums of weights that a launch makes before.
    doubled: bool,
}

impl Plan {
    /// Without a card as one of Hopper's does it, where the two differ: with the sums of weights for twice the edges, which
    /// the others do not need.
    pub fn new(args: &Conv2d, g: &Geometry, card: Option<&CudaDevice>) -> Plan {
        let dims = [g.images, g.held[1] - g.held[0], g.stored[1], g.channels];
        let pixels = g.output[0] * g.output[1];
        let taps = g.kernel[0] * g.kernel[1];
        // Without values there is only padding.
        let norm = args.norm.filter(|_| dims.iter().all(|&size| size > 0));
        let norm = norm.map(|norm| norm::Form::of(args.weight.device(), dims, norm.groups, args.weight.dtype()));
        // A stripe's sums are split as the whole image's.
        let splits = tiles::splits(g.whole_output[0] * g.whole_output[1], g.outputs, taps * g.channels);
        let statistics_given = args.stripe.is_some();
        let doubled = conv_sm90::is_doubled(args, g) && card.is_none_or(|card| card.has(Isa::Sm90a));
        let (m, outputs, channels) = (g.images * pixels, g.outputs, g.channels);
        Plan { norm, statistics_given, dims, splits, m, outputs, channels, doubled }
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
        norm + u64::from(self.doubled) + 1 + u64::from(self.splits > 1)
    }
}

/// Memory of one call beside its arguments and its result.
pub struct Scratch {
    statistics: Option<Statistics>,
    /// The normalised input.
    normalised: Option<Tensor>,
    /// `[splits, M, O]`, f32
    partial: Option<Tensor>,
    /// `[4, O, 2, 2, C]`
    doubled_weights: Option<Tensor>,
}

impl Scratch {
    /// # Errors
    /// As [`Tensor::uninit`].
    pub fn uninit(device: &Device, plan: &Plan, dtype: DType) -> Result<Scratch> {
        let mut scratch = Scratch { statistics: None, normalised: None, partial: None, doubled_weights: None };
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
        if plan.doubled {
            scratch.doubled_weights = Some(Tensor::uninit(device, &[4, plan.outputs, 2, 2, plan.channels], dtype)?);
        }
        Ok(scratch)
    }
}

/// `ConvArgs` of conv2d.cuh.
#[derive(Clone, Copy, bytemuck::NoUninit)]
#[repr(C)]
pub(super) struct ConvArgs {
    y: DevicePtr,
    partial: DevicePtr,
    a: DevicePtr,
    b: DevicePtr,
    weight: DevicePtr,
    bias: DevicePtr,
    row: DevicePtr,
    step: DevicePtr,
    residual: DevicePtr,
    scale: f32,
    negative_slope: f32,
    splits: i32,
    step_images: i32,
    step_rows: i32,
    images_per_row: i32,
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
    wide: i32,
}

/// What a launch reads and writes; `a` and `b` are normalised where the convolution has a norm.
pub(super) struct Operands<'a> {
    pub(super) a: &'a Tensor,
    pub(super) b: Option<&'a Tensor>,
    pub(super) y: &'a Tensor,
    pub(super) partial: Option<&'a Tensor>,
    /// For twice the edges.
    pub(super) doubled_weights: Option<&'a Tensor>,
}

impl ConvArgs {
    fn new(args: &Conv2d, g: &Geometry, plan: &Plan, operands: &Operands, wide: Wide) -> Result<ConvArgs> {
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
        // One row for all without a table, which the kernels do not read then.
        let (steps, rows) = args.row.map_or((1, 1), |row| (row.step.images(), row.rows));
        let channels = |x: Option<&Tensor>| count("C", x.map_or(0, |x| x.shape()[3]));
        Ok(ConvArgs {
            y: operands.y.cuda(),
            partial: DevicePtr::or_null(operands.partial),
            a: operands.a.cuda(),
            b: DevicePtr::or_null(operands.b),
            weight: args.weight.cuda(),
            bias: DevicePtr::or_null(args.bias),
            row: DevicePtr::or_null(args.row.map(|row| row.table)),
            step: DevicePtr::or_null(args.row.map(|row| row.step.tensor())),
            residual: DevicePtr::or_null(args.residual),
            scale: args.scale,
            negative_slope: args.negative_slope,
            splits: count("splits", plan.splits)?,
            step_images: count("images with a step of their own", steps)?,
            step_rows: count("conditioning rows", rows)?,
            images_per_row: count("N / conditioning rows", g.images / rows)?,
            m: count("N * H_out * W_out", g.images * pixels)?,
            outputs: count("O", g.outputs)?,
            channels: [channels(Some(operands.a))?, channels(operands.b)?],
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
            wide: wide.bits(),
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
    let dtype = y.dtype();
    let given = args.stripe.and_then(|stripe| stripe.statistics).and_then(GroupStatistics::card);
    if let (Some(norm), Some(normalised)) = (args.norm, &mut scratch.normalised) {
        let args = norm.of(args.x);
        match given {
            Some(given) => norm::group_norm_apply(device, &args, plan.dims, given, normalised)?,
            None => norm::group_norm(device, &args, plan.dims, scratch.statistics.take(), normalised)?,
        }
    }
    let asked = variants::asked(OP)?;
    let (a, b) = match &scratch.normalised {
        Some(normalised) => (normalised, None),
        None => (args.x.first(), args.x.second()),
    };
    let operands =
        Operands { a, b, y, partial: scratch.partial.as_ref(), doubled_weights: scratch.doubled_weights.as_ref() };
    let k = g.kernel[0] * g.kernel[1] * g.channels;
    let chunk = tiles::chunk(dtype);
    let table = args.row.map(|row| row.table);
    let wide = Wide {
        x: [Some(a), b].into_iter().flatten().all(|x| x.shape()[3] % chunk == 0 && aligned(x)),
        weight: k.is_multiple_of(chunk) && aligned(args.weight),
        output: g.outputs.is_multiple_of(chunk)
            && [Some(operands.y), args.bias, table, args.residual, operands.partial].into_iter().flatten().all(aligned),
    };
    let arguments = ConvArgs::new(args, g, plan, &operands, wide)?;
    if conv_sm90::takes(device, args, g, &operands) && asked.is_none_or(conv_sm90::is_one) {
        if let Some(sums) = operands.doubled_weights {
            conv_sm90::join_weights(device, args.weight, sums)?;
        }
        conv_sm90::conv2d(device, args, g, plan.splits, &operands, arguments, asked)?;
    } else {
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
        // SAFETY: the argument as the entry has it; the op checked that the tensors fit together, `wide` says what is
        // aligned; the partial sums have room for every split.
        unsafe { device.launch("conv2d", &entry(&format!("conv2d_{}", tile.name), dtype), launch, args![arguments])? };
    }
    if plan.splits == 1 {
        return Ok(());
    }
    let items = plan.m * g.outputs.div_ceil(chunk);
    let launch = Launch::grid([items.div_ceil(JOIN_THREADS), 1, 1]).block(JOIN_THREADS);
    // SAFETY: as above; the partial sums are those of the launch before.
    unsafe { device.launch("conv2d", &entry("conv2d_join", dtype), launch, args![arguments]) }
}
