//! Launches of kernels/patches.cu.

use super::{entry, int};
use crate::error::Result;
use crate::ops::step::Output;
use crate::ops::{Patches, Restandardised, StepTable};
use crate::runtime::Tensor;
use crate::runtime::cuda::{CudaDevice, DevicePtr, Launch, args};

/// Threads a block: `kThreads` of patches.cu.
const THREADS: usize = 256;

/// `Patches` of patches.cu.
#[derive(Clone, Copy, bytemuck::NoUninit)]
#[repr(C)]
struct Group {
    origins: DevicePtr,
    first: DevicePtr,
    total: i32,
    count: i32,
    rows: i32,
    columns: i32,
    stride: i32,
    wraps: i32,
    height: i32,
    width: i32,
    channels: i32,
    /// In place of padding.
    _end: u32,
}

impl Group {
    fn of(op: &'static str, patches: &Patches, channels: usize) -> Result<Group> {
        let (layout, (origins, first)) = (patches.layout(), patches.tensors());
        // Patches::new has bounded all but the channels.
        Ok(Group {
            origins: origins.cuda(),
            first: first.cuda(),
            total: patches.total() as i32,
            count: patches.group().len() as i32,
            rows: layout.size[0] as i32,
            columns: layout.size[1] as i32,
            stride: layout.stride as i32,
            wraps: i32::from(layout.wraps),
            height: layout.map[0] as i32,
            width: layout.map[1] as i32,
            channels: int(op, "C", channels)?,
            _end: 0,
        })
    }
}

pub fn gather(
    device: &CudaDevice,
    x: &Tensor,
    patches: &Patches,
    restandardised: Option<Restandardised>,
    steps: &StepTable,
    repeats: usize,
    y: &mut Tensor,
) -> Result<()> {
    const OP: &str = "gather_patches";
    let (elements, group) = (y.numel() / repeats, Group::of(OP, patches, x.shape()[3])?);
    let launch = Launch::grid([elements.div_ceil(THREADS), 1, 1]).block(THREADS);
    let [from, to] = restandardised.map_or([DevicePtr::NULL; 2], |moments| [moments.from.cuda(), moments.to.cuda()]);
    let (table, step) = (steps.tensor().cuda(), steps.index().tensor().cuda());
    let repeats = int(OP, "repeats", repeats)?;
    // SAFETY: as the entry has them; y holds the group's patches of all images `repeats` times, moments have a row for each
    // image, the table has the step, and the group's patches are among those that have an origin.
    unsafe {
        device.launch(
            "patches",
            &entry(OP, y.dtype()),
            launch,
            args![y.cuda(), x.cuda(), from, to, table, step, elements as i64, repeats, group],
        )
    }
}

pub fn merge(
    device: &CudaDevice,
    values: &Tensor,
    patches: &Patches,
    [rows, columns]: [&Tensor; 2],
    y: &mut Tensor,
) -> Result<()> {
    const OP: &str = "merge_patches";
    let (elements, group) = (y.numel(), Group::of(OP, patches, y.shape()[3])?);
    let launch = Launch::grid([elements.div_ceil(THREADS), 1, 1]).block(THREADS);
    // SAFETY: as the entry has them; y has `elements` elements, values all patches of all images, a weight for each of a
    // patch's rows and columns.
    unsafe {
        device.launch(
            "patches",
            OP,
            launch,
            args![y.cuda(), values.cuda(), rows.cuda(), columns.cuda(), elements as i64, group],
        )
    }
}

pub fn step(
    device: &CudaDevice,
    x: &Tensor,
    patches: &Patches,
    output: &Output,
    steps: &StepTable,
    sums: &mut Tensor,
) -> Result<()> {
    const OP: &str = "step_patches";
    let (elements, group) = (x.numel(), Group::of(OP, patches, x.shape()[3])?);
    let launch = Launch::grid([elements.div_ceil(THREADS), 1, 1]).block(THREADS);
    let (guidance, factors) =
        (DevicePtr::or_null(output.guidance.map(|guidance| guidance.tensor())), DevicePtr::or_null(output.factors));
    let (table, step) = (steps.tensor().cuda(), steps.index().tensor().cuda());
    // SAFETY: as the entry has them; sums and x have `elements` elements, the output as many as the group's patches of all
    // images, twice that with guidance and again with a variance; guidance and factors have a row for each of these patches;
    // the table has the step.
    unsafe {
        device.launch(
            "patches",
            &entry(OP, output.values.dtype()),
            launch,
            args![
                sums.cuda(),
                x.cuda(),
                output.values.cuda(),
                guidance,
                factors,
                table,
                step,
                elements as i64,
                output.count() as i64,
                output.variance_channels as i32,
                group
            ],
        )
    }
}
