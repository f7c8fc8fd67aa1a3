//! Launches of kernels/resize.cu.

use super::{aligned, entry, int};
use crate::error::Result;
use crate::ops::low_band::Smoothing;
use crate::ops::{RelayNoise, Upsampler};
use crate::runtime::cuda::{CudaDevice, DevicePtr, Launch, args};
use crate::runtime::{DType, Device, Tensor};

/// Threads a block: `kThreads` of resize.cu.
const THREADS: usize = 256;
/// `kFilterThreads`, `kRows`, and `kVector` of common/vector.cuh.
const FILTER_THREADS: usize = 32;
const ROWS: usize = 4;
const VECTOR: usize = 8;

/// What the last pass does to a value: clamps it, then adds noise.
#[derive(Clone, Copy)]
pub struct Finish<'a> {
    pub low: f32,
    pub high: f32,
    pub noise: Option<RelayNoise<'a>>,
}

/// Leaves a value as it is.
const NOTHING: Finish = Finish { low: f32::NEG_INFINITY, high: f32::INFINITY, noise: None };

/// `FilterKind` of resize.cu.
#[derive(Clone, Copy)]
enum FilterKind {
    Triangle,
    Cubic,
    TorchCubic,
    Gaussian,
    Blur,
    LowBand,
}

impl FilterKind {
    fn of(upsampler: Upsampler) -> FilterKind {
        match upsampler {
            Upsampler::Bilinear => FilterKind::Triangle,
            Upsampler::BicubicTorch => FilterKind::TorchCubic,
            Upsampler::Bicubic | Upsampler::BicubicGaussian | Upsampler::BicubicEdge => FilterKind::Cubic,
        }
    }

    /// The most taps that an output can have.
    fn taps(self, from: usize, to: usize) -> usize {
        // One more than the interval's length, which is computed with roundings.
        let pil = |support: f64| (2.0 * support * (from as f64 / to as f64).max(1.0)).ceil() as usize + 1;
        match self {
            FilterKind::Triangle => pil(1.0).min(from),
            FilterKind::Cubic => pil(2.0).min(from),
            FilterKind::TorchCubic => 4,
            FilterKind::Gaussian => 5,
            FilterKind::Blur => 3,
            FilterKind::LowBand => 14,
        }
    }
}

/// A filter of one dimension, made on the device.
struct Table {
    kind: FilterKind,
    from: usize,
    to: usize,
    taps: usize,
    /// `[to, 1 + 2 taps]` words, u32
    words: Tensor,
}

impl Table {
    fn uninit(device: &Device, kind: FilterKind, [from, to]: [usize; 2]) -> Result<Table> {
        let taps = kind.taps(from, to);
        let words = Tensor::uninit(device, &[to, 1 + 2 * taps], DType::U32)?;
        Ok(Table { kind, from, to, taps, words })
    }
}

/// `Filters` of resize.cu.
#[derive(Clone, Copy, bytemuck::NoUninit)]
#[repr(C)]
struct Filters {
    words: [DevicePtr; 4],
    kind: [i32; 4],
    taps: [i32; 4],
    from: [i32; 4],
    to: [i32; 4],
    fixed: i32,
    sigma: f32,
}

/// All tables of a resize, at most four, in one launch. `fixed_point`: the weights are integers, but the Gaussian's; `sigma`: of
/// the tables of a blur.
fn compute<'a>(
    device: &CudaDevice,
    tables: impl Iterator<Item = &'a Table>,
    fixed_point: bool,
    sigma: f32,
) -> Result<()> {
    let mut filters = Filters {
        words: [DevicePtr::NULL; 4],
        kind: [0; 4],
        taps: [0; 4],
        from: [0; 4],
        to: [0; 4],
        fixed: i32::from(fixed_point),
        sigma,
    };
    let (mut count, mut longest) = (0, 0);
    for table in tables {
        // The kernel counts the table's words in 32 bits.
        int("resize", "words of a filter", table.words.numel())?;
        filters.words[count] = table.words.cuda();
        filters.kind[count] = table.kind as i32;
        filters.taps[count] = table.taps as i32;
        filters.from[count] = int("resize", "input size", table.from)?;
        filters.to[count] = table.to as i32;
        (count, longest) = (count + 1, longest.max(table.to));
    }
    let launch = Launch::grid([longest.div_ceil(FILTER_THREADS), count, 1]).block(FILTER_THREADS);
    // SAFETY: the argument as the entry has it; no output of a table has more than its `taps` taps.
    unsafe { device.launch("resize", "resize_filter", launch, args![filters]) }
}

/// One resize: its tables, and its images between the passes, f32.
pub struct Passes {
    upsampler: Upsampler,
    eight_bit: bool,
    fixed_point: bool,
    rows: Table,
    columns: Table,
    /// Of rows and columns.
    gaussian: Option<[Table; 2]>,
    /// The 8-bit input: `[N, H, W, C]`
    levels: Option<Tensor>,
    /// After the first pass: `[N, H, to_w, C]`
    narrow: Tensor,
    /// Where more passes follow the second: two images of the result's size.
    wide: Option<Tensor>,
    sharpened: Option<Tensor>,
}

impl Passes {
    /// Allocates, on any device.
    ///
    /// # Errors
    /// As [`Tensor::uninit`].
    pub fn uninit(x: &Tensor, y: &Tensor, upsampler: Upsampler, eight_bit: bool) -> Result<Passes> {
        let ([n, h, w, c], [_, to_h, to_w, _]) = (x.dims("resize", "x")?, y.dims("resize", "y")?);
        let device = x.device();
        let fixed_point = eight_bit && upsampler != Upsampler::BicubicTorch;
        let sharpens = matches!(upsampler, Upsampler::BicubicGaussian | Upsampler::BicubicEdge);
        let image = |h: usize, w: usize| Tensor::uninit(device, &[n, h, w, c], DType::F32);
        let table = |kind, sizes| Table::uninit(device, kind, sizes);
        let kind = FilterKind::of(upsampler);
        Ok(Passes {
            upsampler,
            eight_bit,
            fixed_point,
            rows: table(kind, [h, to_h])?,
            columns: table(kind, [w, to_w])?,
            gaussian: match upsampler {
                Upsampler::BicubicGaussian => {
                    Some([table(FilterKind::Gaussian, [to_h; 2])?, table(FilterKind::Gaussian, [to_w; 2])?])
                }
                _ => None,
            },
            levels: if eight_bit { Some(image(h, w)?) } else { None },
            narrow: image(h, to_w)?,
            wide: if eight_bit || sharpens { Some(image(to_h, to_w)?) } else { None },
            sharpened: match upsampler {
                Upsampler::BicubicGaussian => Some(image(to_h, to_w)?),
                Upsampler::BicubicEdge if eight_bit => Some(image(to_h, to_w)?),
                _ => None,
            },
        })
    }

    pub fn launches(&self) -> u64 {
        let sharpening = match self.upsampler {
            Upsampler::Bilinear | Upsampler::Bicubic | Upsampler::BicubicTorch => 0,
            Upsampler::BicubicGaussian => 2,
            Upsampler::BicubicEdge => 1,
        };
        let passes = if self.eight_bit { 4 + sharpening } else { 2 + sharpening };
        1 + passes
    }

    fn tables(&self) -> impl Iterator<Item = &Table> {
        [&self.rows, &self.columns].into_iter().chain(self.gaussian.iter().flatten())
    }

    pub fn resize(&self, device: &CudaDevice, x: &Tensor, finish: Finish, y: &mut Tensor) -> Result<()> {
        compute(device, self.tables(), self.fixed_point, 0.0)?;
        horizontal(device, "resize_horizontal", x, &self.columns, &self.narrow)?;
        match (self.upsampler, &self.wide, &self.sharpened, &self.gaussian) {
            (Upsampler::BicubicGaussian, Some(wide), Some(sharpened), Some([rows, columns])) => {
                vertical(device, &self.narrow, &self.rows, NOTHING, wide)?;
                horizontal(device, "resize_horizontal", wide, columns, sharpened)?;
                vertical(device, sharpened, rows, finish, y)
            }
            (Upsampler::BicubicEdge, Some(wide), ..) => {
                vertical(device, &self.narrow, &self.rows, NOTHING, wide)?;
                edge(device, wide, finish, y)
            }
            _ => vertical(device, &self.narrow, &self.rows, finish, y),
        }
    }

    pub fn resize_u8(&self, device: &CudaDevice, x: &Tensor, y: &mut Tensor) -> Result<()> {
        let (Some(levels), Some(wide)) = (&self.levels, &self.wide) else { unreachable!("allocated for 8 bits") };
        compute(device, self.tables(), self.fixed_point, 0.0)?;
        pointwise(device, &entry("resize_levels", x.dtype()), x, levels)?;
        if self.upsampler == Upsampler::BicubicTorch {
            horizontal(device, "resize_horizontal", levels, &self.columns, &self.narrow)?;
            vertical(device, &self.narrow, &self.rows, NOTHING, wide)?;
        } else {
            horizontal(device, "resize_fixed_horizontal", levels, &self.columns, &self.narrow)?;
            fixed_vertical(device, &self.narrow, &self.rows, wide)?;
        }
        let result = match (&self.sharpened, &self.gaussian) {
            (Some(sharpened), Some([rows, columns])) => {
                horizontal(device, "resize_horizontal", wide, columns, sharpened)?;
                vertical(device, sharpened, rows, NOTHING, wide)?;
                wide
            }
            (Some(sharpened), None) => {
                edge(device, wide, NOTHING, sharpened)?;
                sharpened
            }
            (None, _) => wide,
        };
        pointwise(device, &entry("resize_picture", y.dtype()), result, y)
    }
}

/// A picture smoothed along both axes: its tables, and the picture between the passes, f32.
pub struct SmoothingPasses {
    sigma: f32,
    rows: Table,
    columns: Table,
    between: Tensor,
}

impl SmoothingPasses {
    pub const LAUNCHES: u64 = 3;

    /// Allocates, on any device. `x: [N, H, W, C]`, f32.
    ///
    /// # Errors
    /// As [`Tensor::uninit`].
    pub fn uninit(x: &Tensor, smoothing: Smoothing) -> Result<SmoothingPasses> {
        let [_, h, w, _] = x.dims("smoothing", "x")?;
        let (kind, sigma) = match smoothing {
            Smoothing::Blur { sigma } => (FilterKind::Blur, sigma),
            Smoothing::LowBand => (FilterKind::LowBand, 0.0),
        };
        let table = |length| Table::uninit(x.device(), kind, [length; 2]);
        let between = Tensor::uninit(x.device(), x.shape(), DType::F32)?;
        Ok(SmoothingPasses { sigma, rows: table(h)?, columns: table(w)?, between })
    }

    /// `y = signal * smoothed x + sigma * noise`, as `added` has them.
    pub fn launch(&self, device: &CudaDevice, x: &Tensor, added: RelayNoise, y: &mut Tensor) -> Result<()> {
        compute(device, [&self.rows, &self.columns].into_iter(), false, self.sigma)?;
        horizontal(device, "resize_horizontal", x, &self.columns, &self.between)?;
        vertical(device, &self.between, &self.rows, Finish { noise: Some(added), ..NOTHING }, y)
    }
}

/// A block for every 256 elements of every row of y.
fn over_rows(y: &Tensor) -> Result<Launch> {
    let [n, h, w, c] = y.dims("resize", "y")?;
    int("resize", "width * channels", w * c)?;
    Ok(Launch::grid([n * h, (w * c).div_ceil(THREADS), 1]).block(THREADS))
}

fn horizontal(device: &CudaDevice, name: &str, x: &Tensor, table: &Table, y: &Tensor) -> Result<()> {
    let ([n, h, from, c], [_, _, to, _]) = (x.dims("resize", "x")?, y.dims("resize", "y")?);
    let (taps, from) = (int("resize", "taps", table.taps)?, int("resize", "W", from)?);
    let row = int("resize", "width * channels", to * c)? as usize;
    let launch = Launch::grid([(n * h).div_ceil(ROWS), row.div_ceil(THREADS), 1]).block(THREADS);
    let entry = entry(name, x.dtype());
    // SAFETY: arguments as the entry has them; the table names columns of x for every column of y.
    unsafe {
        device.launch(
            "resize",
            &entry,
            launch,
            args![y.cuda(), x.cuda(), table.words.cuda(), taps, (n * h) as i64, from, to as i32, c as i32],
        )
    }
}

/// A row of y a block, vectors or elements of it a thread.
fn along_rows(x: &Tensor, noise: Option<&Tensor>, y: &Tensor) -> Result<(Launch, bool)> {
    let [n, h, w, c] = y.dims("resize", "y")?;
    let row = int("resize", "width * channels", w * c)? as usize;
    let vector = row.is_multiple_of(VECTOR) && [Some(x), noise, Some(y)].into_iter().flatten().all(aligned);
    let threads = if vector { row / VECTOR } else { row };
    Ok((Launch::grid([n * h, threads.div_ceil(THREADS), 1]).block(THREADS), vector))
}

fn vertical(device: &CudaDevice, x: &Tensor, table: &Table, finish: Finish, y: &Tensor) -> Result<()> {
    let ([_, from, ..], [_, to, w, c]) = (x.dims::<4>("resize", "x")?, y.dims::<4>("resize", "y")?);
    let (taps, from, to) = (int("resize", "taps", table.taps)?, int("resize", "H", from)?, int("resize", "H", to)?);
    let (launch, vector) = along_rows(x, finish.noise.map(|noise| noise.noise), y)?;
    let entry = entry("resize_vertical", y.dtype());
    let (noise, signal, sigma) = finish.noise();
    // SAFETY: arguments as the entry has them; the table names rows of x for every row of y; the noise has y's shape.
    unsafe {
        device.launch(
            "resize",
            &entry,
            launch,
            args![
                y.cuda(),
                x.cuda(),
                table.words.cuda(),
                taps,
                from,
                to,
                (w * c) as i32,
                finish.low,
                finish.high,
                noise,
                signal,
                sigma,
                i32::from(vector)
            ],
        )
    }
}

fn fixed_vertical(device: &CudaDevice, x: &Tensor, table: &Table, y: &Tensor) -> Result<()> {
    let ([_, from, ..], [_, to, w, c]) = (x.dims::<4>("resize", "x")?, y.dims::<4>("resize", "y")?);
    let (taps, from, to) = (int("resize", "taps", table.taps)?, int("resize", "H", from)?, int("resize", "H", to)?);
    let (launch, vector) = along_rows(x, None, y)?;
    // SAFETY: arguments as the entry has them; the table names rows of x for every row of y.
    unsafe {
        device.launch(
            "resize",
            "resize_fixed_vertical_f32",
            launch,
            args![y.cuda(), x.cuda(), table.words.cuda(), taps, from, to, (w * c) as i32, i32::from(vector)],
        )
    }
}

fn edge(device: &CudaDevice, x: &Tensor, finish: Finish, y: &Tensor) -> Result<()> {
    let [_, h, w, c] = y.dims("resize", "y")?;
    let (entry, launch, h) = (entry("resize_edge", y.dtype()), over_rows(y)?, int("resize", "H", h)?);
    let (noise, signal, sigma) = finish.noise();
    // SAFETY: arguments as the entry has them; x and the noise have y's shape.
    unsafe {
        device.launch(
            "resize",
            &entry,
            launch,
            args![y.cuda(), x.cuda(), h, w as i32, c as i32, finish.low, finish.high, noise, signal, sigma],
        )
    }
}

fn pointwise(device: &CudaDevice, entry: &str, x: &Tensor, y: &Tensor) -> Result<()> {
    let count = y.numel();
    let launch = Launch::grid([count.div_ceil(THREADS), 1, 1]).block(THREADS);
    // SAFETY: arguments as the entry has them; both tensors have `count` elements.
    unsafe { device.launch("resize", entry, launch, args![y.cuda(), x.cuda(), count as i64]) }
}

pub fn nearest(device: &CudaDevice, x: &Tensor, y: &mut Tensor) -> Result<()> {
    let ([_, h, w, c], [_, to_h, to_w, _]) = (x.dims("resize", "x")?, y.dims("resize", "y")?);
    let [h, w] = [h, w].map(|size| int("resize_nearest", "size", size));
    let (entry, launch) = (entry("resize_nearest", y.dtype()), over_rows(y)?);
    let (h, w, to_h) = (h?, w?, int("resize_nearest", "H", to_h)?);
    // SAFETY: arguments as the entry has them; y has x's images and channels.
    unsafe { device.launch("resize", &entry, launch, args![y.cuda(), x.cuda(), h, w, to_h, to_w as i32, c as i32]) }
}

pub fn avg_pool(device: &CudaDevice, x: &Tensor, y: &mut Tensor) -> Result<()> {
    let ([_, h, w, c], [n, to_h, to_w, _]) = (x.dims("avg_pool", "x")?, y.dims("avg_pool", "y")?);
    let [h, w] = [h, w].map(|size| int("avg_pool", "size", size));
    let row = int("avg_pool", "width * channels", to_w * c)? as usize;
    let vector = c.is_multiple_of(VECTOR) && aligned(x) && aligned(y);
    let threads = if vector { row / VECTOR } else { row };
    let launch = Launch::grid([n * to_h, threads.div_ceil(THREADS), 1]).block(THREADS);
    let (entry, h, w) = (entry("avg_pool", y.dtype()), h?, w?);
    // SAFETY: arguments as the entry has them; y has half x's sizes, rounded up, and its images and channels.
    unsafe { device.launch("resize", &entry, launch, args![y.cuda(), x.cuda(), h, w, c as i32, i32::from(vector)]) }
}

pub fn bilinear(device: &CudaDevice, x: &Tensor, y: &mut Tensor) -> Result<()> {
    const OP: &str = "resize_bilinear";
    let ([_, h, w, c], [n, to_h, to_w, _]) = (x.dims(OP, "x")?, y.dims(OP, "y")?);
    let [h, w, height] = [h, w, to_h].map(|size| int(OP, "size", size));
    let row = int(OP, "width * channels", to_w * c)? as usize;
    let vector = c.is_multiple_of(VECTOR) && aligned(x) && aligned(y);
    let threads = if vector { row / VECTOR } else { row };
    let launch = Launch::grid([n * to_h, threads.div_ceil(THREADS), 1]).block(THREADS);
    let (entry, h, w, height) = (entry(OP, y.dtype()), h?, w?, height?);
    // SAFETY: arguments as the entry has them; y has x's images and channels.
    unsafe {
        device.launch(
            "resize",
            &entry,
            launch,
            args![y.cuda(), x.cuda(), h, w, height, to_w as i32, c as i32, i32::from(vector)],
        )
    }
}

impl Finish<'_> {
    fn noise(&self) -> (DevicePtr, f32, f32) {
        match self.noise {
            Some(RelayNoise { noise, signal, sigma }) => (noise.cuda(), signal, sigma),
            None => (DevicePtr::NULL, 1.0, 0.0),
        }
    }
}
