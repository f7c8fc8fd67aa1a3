use super::{activation_number, aligned, entry, int};
use crate::error::Result;
use crate::ops::Activation;
use crate::runtime::Tensor;
use crate::runtime::cuda::{CudaDevice, Launch, args};

/// Threads a block and elements a thread: `kThreads`, `kVector` of elementwise.cu.
const THREADS: usize = 256;
const VECTOR: usize = 8;
/// `sizeof(Chunk<T>)`.
const CHUNK_BYTES: usize = 16;

fn over(count: usize) -> Launch {
    Launch::grid([count.div_ceil(THREADS * VECTOR), 1, 1]).block(THREADS)
}

pub fn activation(device: &CudaDevice, x: &Tensor, activation: Activation, y: &mut Tensor) -> Result<()> {
    let kind = activation_number(activation);
    let (entry, count) = (entry("activation", x.dtype()), x.numel());
    // SAFETY: arguments as the entry has them; both tensors have `count` elements.
    unsafe { device.launch("elementwise", &entry, over(count), args![y.cuda(), x.cuda(), kind, count as i64]) }
}

pub fn add(device: &CudaDevice, a: &Tensor, b: &Tensor, scale: f32, y: &mut Tensor) -> Result<()> {
    let (entry, count) = (entry("add", y.dtype()), y.numel());
    // SAFETY: arguments as the entry has them; all three tensors have `count` elements.
    unsafe {
        device.launch("elementwise", &entry, over(count), args![y.cuda(), a.cuda(), b.cuda(), scale, count as i64])
    }
}

pub fn add_masked(
    device: &CudaDevice,
    a: &Tensor,
    b: &Tensor,
    mask: &Tensor,
    scale: f32,
    y: &mut Tensor,
) -> Result<()> {
    let (entry, count) = (entry("add_masked", y.dtype()), y.numel());
    let tokens = int("add_masked", "tokens", mask.numel())?;
    let channels = int("add_masked", "channels", y.shape()[2..].iter().product())?;
    // SAFETY: arguments as the entry has them; y, a and b have `count` elements in rows of `channels`, and mask one for each of
    // the `tokens` rows after which it begins again.
    unsafe {
        device.launch(
            "elementwise",
            &entry,
            over(count),
            args![y.cuda(), a.cuda(), b.cuda(), mask.cuda(), scale, tokens, channels, count as i64],
        )
    }
}

pub fn concat(device: &CudaDevice, a: &Tensor, b: &Tensor, y: &mut Tensor) -> Result<()> {
    let &[.., channels] = y.shape() else { unreachable!("checked: there are channels") };
    let rows = y.numel() / channels;
    let [of_a, of_b] = [a, b].map(|x| x.numel() / rows);
    let chunk = CHUNK_BYTES / y.dtype().size_bytes();
    let wide = [of_a, of_b].iter().all(|channels| channels.is_multiple_of(chunk)) && [a, b, y].into_iter().all(aligned);
    let (entry, unit) = if wide { ("concat_wide".into(), chunk) } else { (entry("concat", y.dtype()), 1) };
    let [of_a, of_b] = [int("concat", "channels", of_a / unit)?, int("concat", "channels", of_b / unit)?];
    let launch = Launch::grid([(y.numel() / unit).div_ceil(THREADS), 1, 1]).block(THREADS);
    // SAFETY: arguments as the entry has them; y has the rows of both, `wide` only where all are whole aligned chunks.
    unsafe {
        device.launch("elementwise", &entry, launch, args![y.cuda(), a.cuda(), b.cuda(), of_a, of_b, rows as i64])
    }
}

pub fn clamp(device: &CudaDevice, x: &Tensor, low: f32, high: f32, y: &mut Tensor) -> Result<()> {
    let (entry, count) = (entry("clamp", x.dtype()), x.numel());
    // SAFETY: arguments as the entry has them; both tensors have `count` elements.
    unsafe { device.launch("elementwise", &entry, over(count), args![y.cuda(), x.cuda(), low, high, count as i64]) }
}

pub fn scale_cast(
    device: &CudaDevice,
    x: &Tensor,
    scale: f32,
    shift: f32,
    repeats: usize,
    y: &mut Tensor,
) -> Result<()> {
    let entry = entry(&format!("scale_cast_{}", x.dtype()), y.dtype());
    let (count, repeats) = (x.numel(), int("scale_cast", "repeats", repeats)?);
    // SAFETY: arguments as the entry has them; x has `count` elements, y `repeats` times as many.
    unsafe {
        device.launch(
            "elementwise",
            &entry,
            over(count),
            args![y.cuda(), x.cuda(), scale, shift, count as i64, repeats],
        )
    }
}

/// Adds to `counter`, one u32.
pub fn count_non_finite(device: &CudaDevice, x: &Tensor, counter: &mut Tensor) -> Result<()> {
    int("count_non_finite", "elements", x.numel())?;
    let (entry, count) = (entry("count_non_finite", x.dtype()), x.numel());
    // SAFETY: arguments as the entry has them; x has `count` elements.
    unsafe { device.launch("elementwise", &entry, over(count), args![counter.cuda(), x.cuda(), count as i64]) }
}
