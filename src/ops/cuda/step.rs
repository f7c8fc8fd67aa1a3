use super::entry;
use crate::error::Result;
use crate::ops::StepTable;
use crate::runtime::Tensor;
use crate::runtime::cuda::{CudaDevice, DevicePtr, Launch, args};

/// Threads a block: `kThreads` of step.cu.
const THREADS: usize = 256;

pub fn advance(device: &CudaDevice, index: &mut Tensor) -> Result<()> {
    let launch = Launch::grid([index.numel(), 1, 1]).block(1);
    // SAFETY: the index has as many u32 as there are blocks.
    unsafe { device.launch("step", "advance_step", launch, args![index.cuda()]) }
}

pub fn scale_input(device: &CudaDevice, x: &Tensor, steps: &StepTable, repeats: usize, y: &mut Tensor) -> Result<()> {
    let (count, entry) = (x.numel(), entry("scale_input", y.dtype()));
    let launch = Launch::grid([count.div_ceil(THREADS), 1, 1]).block(THREADS);
    let (table, step) = (steps.tensor().cuda(), steps.index().tensor().cuda());
    let repeats = repeats as i32;
    // SAFETY: as the entry has them; y holds `repeats` times x, and the table has the step.
    unsafe { device.launch("step", &entry, launch, args![y.cuda(), x.cuda(), table, step, count as i64, repeats]) }
}

pub fn sampler_step(
    device: &CudaDevice,
    x: &mut Tensor,
    x0: &mut Tensor,
    output: &Tensor,
    guidance: Option<f32>,
    steps: &StepTable,
    noise: Option<&Tensor>,
) -> Result<()> {
    let (count, entry) = (x.numel(), entry("sampler_step", output.dtype()));
    let launch = Launch::grid([count.div_ceil(THREADS), 1, 1]).block(THREADS);
    let (table, step) = (steps.tensor().cuda(), steps.index().tensor().cuda());
    let (noise, scale, guided) = (DevicePtr::or_null(noise), guidance.unwrap_or(0.0), i32::from(guidance.is_some()));
    // SAFETY: as the entry has them; x, x0 and noise have `count` elements, the output as many or with guidance twice; the
    // table has the step, and noise is there when one of its rows wants it.
    unsafe {
        let count = count as i64;
        device.launch(
            "step",
            &entry,
            launch,
            args![x.cuda(), x0.cuda(), output.cuda(), noise, table, step, scale, guided, count],
        )
    }
}
