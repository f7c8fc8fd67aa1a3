use super::step_rows::{StepRowsArgs, aligned_rows};
use super::tiles::{self, Card, Product, Wide};
use super::{activation_number, aligned, entry, linear_sm90, variants};
use crate::error::Result;
use crate::ops::Linear;
use crate::runtime::Tensor;
use crate::runtime::cuda::{CudaDevice, DevicePtr, Launch, args};

const OP: &str = "linear";

/// `LinearArgs` of linear.cuh.
#[derive(Clone, Copy, bytemuck::NoUninit)]
#[repr(C)]
pub(super) struct LinearArgs {
    y: DevicePtr,
    x: DevicePtr,
    weight: DevicePtr,
    bias: DevicePtr,
    residual: DevicePtr,
    gate: StepRowsArgs,
    m: i32,
    columns: i32,
    k: i32,
    activation: i32,
    wide: i32,
    image_rows: i32,
}

impl LinearArgs {
    /// `[m, n, k]`: rows and columns of y, terms of a sum.
    pub(super) fn new(op: &'static str, args: &Linear, [m, _, k]: [usize; 3], wide: &Wide, y: &Tensor) -> Result<Self> {
        Ok(LinearArgs {
            y: y.cuda(),
            x: args.x.cuda(),
            weight: args.weight.cuda(),
            bias: DevicePtr::or_null(args.bias),
            residual: DevicePtr::or_null(args.residual),
            gate: match &args.gate {
                None => StepRowsArgs::NONE,
                Some(gate) => StepRowsArgs::columns(op, gate, args.x.shape()[0])?,
            },
            m: tiles::count(op, "rows of x", m)?,
            columns: tiles::count(op, "rows of weight", args.weight.shape()[0])?,
            k: tiles::count(op, "K", k)?,
            activation: activation_number(args.activation),
            wide: wide.bits(),
            image_rows: tiles::count(op, "rows of an image", args.image_rows(m))?,
        })
    }
}

/// `[m, n, k]`: rows and columns of y, terms of a sum.
pub fn linear(device: &CudaDevice, args: &Linear, [m, n, k]: [usize; 3], y: &mut Tensor) -> Result<()> {
    if y.numel() == 0 {
        return Ok(());
    }
    let (x, weight, dtype) = (args.x, args.weight, args.x.dtype());
    let columns = weight.shape()[0];
    let chunk = tiles::chunk(dtype);
    let wide = Wide {
        x: k % chunk == 0 && aligned(x),
        weight: k % chunk == 0 && aligned(weight),
        output: n % chunk == 0
            && [Some(&*y), args.bias, args.residual].into_iter().flatten().all(aligned)
            && args.gate.as_ref().is_none_or(aligned_rows),
    };
    let chunks = wide.x && wide.weight;
    let arguments = LinearArgs::new(OP, args, [m, n, k], &wide, y)?;
    let asked = variants::asked(OP)?;
    let hopper = &linear_sm90::LINEAR;
    if hopper.takes(device, args, [m, n, k], y) && asked.is_none_or(|name| hopper.has(name)) {
        // SAFETY: the arguments were made of the same operands, whose shapes were checked.
        return unsafe { hopper.launch(device, args, [m, n, k], arguments, asked, y) };
    }
    let tile = tiles::pick(&Product { op: OP, dtype, size: [m, columns, k], chunks, card: Card::of(device) })?;
    let launch = Launch::grid([tile.blocks(m, columns), 1, 1]).block(tile.threads()).shared(tile.shared_bytes());
    let entry = entry(&format!("linear_{}", tile.name), dtype);
    // SAFETY: the argument as the entry has it; shapes were checked against [m, n, k], `wide` against the addresses.
    unsafe { device.launch("linear", &entry, launch, args![arguments]) }
}
