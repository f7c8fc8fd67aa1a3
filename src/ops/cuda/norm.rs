//! Launches of kernels/norm.cu and kernels/sm90/norm.cu. How many there are follows from shape, dtype and card; the meta
//! device counts as a card of sm_90 launches.

use super::step_rows::{StepRowsArgs, aligned_rows};
use super::{activation_number, aligned, entry, int};
use crate::error::Result;
use crate::ops::{GroupNorm, LayerNorm, Modulation};
use crate::runtime::cuda::{CudaDevice, DevicePtr, Isa, Launch, args};
use crate::runtime::{DType, Device, Tensor};

/// Threads a block: `kThreads` of norm.cu, and `kMergeThreads`.
const THREADS: usize = 256;
const MERGE_THREADS: usize = 128;
/// Elements a thread moves at once: `kVector`.
const VECTOR: usize = 8;
/// `kApplyPixels`
const APPLY_PIXELS: usize = 8;
/// Up to here one launch of a block per group beats three launches: 32x32.
const SMALL_PIXELS: usize = 1024;
/// An image is split into at most so many parts, each of at least so many pixels.
const SPLITS: usize = 512;
const SPLIT_PIXELS: usize = 64;

/// What decides how a group norm is launched.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    /// `[N, H, W, C]`
    dims: [usize; 4],
    groups: usize,
    dtype: DType,
    /// The card has Hopper's kernels.
    hopper: bool,
}

impl Form {
    /// `dims`: of the input, `[N, H, W, C]`, which `groups` divide. The meta device stands for a card of sm_90.
    pub fn of(device: &Device, dims: [usize; 4], groups: usize, dtype: DType) -> Form {
        let hopper = match device {
            Device::Cuda(card) => card.has(Isa::Sm90a),
            Device::Cpu(_) | Device::Meta(_) => true,
        };
        Form { dims, groups, dtype, hopper }
    }

    fn on_card(device: &CudaDevice, args: &GroupNorm, dims: [usize; 4]) -> Form {
        Form { dims, groups: args.groups, dtype: args.x.first().dtype(), hopper: device.has(Isa::Sm90a) }
    }

    /// Does a block per few groups do it, statistics and result?
    fn small(&self) -> bool {
        let [_, h, w, c] = self.dims;
        h * w <= SMALL_PIXELS && c / self.groups <= THREADS
    }

    fn clusters(&self) -> Option<Clusters> {
        let [_, h, w, c] = self.dims;
        if self.hopper && self.dtype != DType::F32 { Clusters::of(h * w, c, self.groups) } else { None }
    }

    /// Does one launch do it all, statistics and result?
    fn whole(&self) -> bool {
        self.small() || self.clusters().is_some()
    }

    /// Launches of a group norm. (One whose tensors are not aligned to 16 bytes may need another number.)
    pub fn launches(&self) -> u64 {
        if self.whole() { 1 } else { 3 }
    }
}

/// How clusters share an image out: kernels/sm90/norm.cu.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Clusters {
    /// Groups that a cluster takes.
    window: usize,
    /// Blocks of a cluster.
    blocks: usize,
}

impl Clusters {
    /// `kThreads`, `kHeld` and `kMostGroups` of sm90/norm.cu.
    const THREADS: usize = 512;
    const HELD: usize = 12;
    const MOST_GROUPS: usize = 16;
    const MOST_BLOCKS: usize = 8;
    /// A pixel's channels of a window are at least so many, 64 bytes, where that is possible: DRAM is read in such pieces.
    const CHANNELS: usize = 32;
    /// Blocks of an image: more would not all run at once.
    const BLOCKS: usize = 128;
    /// At least 1 in so many of a block's pixels stay in registers.
    const PIXELS_PER_HELD: usize = 4;

    /// By one image's size alone, so that its sums do not depend on the batch.
    fn of(pixels: usize, channels: usize, groups: usize) -> Option<Clusters> {
        let width = channels / groups;
        let two_groups_a_vector = width >= VECTOR || width == VECTOR / 2;
        // As few groups as whole vectors take.
        let mut window = VECTOR / gcd(VECTOR, width);
        if pixels == 0 || !two_groups_a_vector || width > THREADS || !groups.is_multiple_of(window) {
            return None;
        }
        while window * width < Self::CHANNELS && 2 * window <= Self::MOST_GROUPS && groups.is_multiple_of(2 * window) {
            window *= 2;
        }
        let columns = window * width / VECTOR;
        let (windows, rows) = (groups / window, Self::THREADS.checked_div(columns).filter(|&rows| rows > 0)?);
        let mut blocks = 1;
        // More blocks while each has something to do and all run at once; then while they hold more of the image.
        while blocks < Self::MOST_BLOCKS
            && (pixels >= 4 * blocks * rows && 2 * blocks * windows <= Self::BLOCKS
                || pixels > blocks * rows * Self::HELD)
        {
            blocks *= 2;
        }
        (pixels <= blocks * rows * Self::HELD * Self::PIXELS_PER_HELD).then_some(Clusters { window, blocks })
    }
}

fn split_pixels(pixels: usize) -> usize {
    pixels.div_ceil(SPLITS).max(SPLIT_PIXELS)
}

/// Mean and 1 / sqrt(var + eps) of every group, for the kernel that applies them (kernels/common/norm.cuh).
#[derive(Debug)]
pub struct Statistics {
    /// `[N, groups, 2]`, f32
    pub values: Tensor,
    /// `[N, splits, C, 2]`, f32; none where one launch makes the statistics
    partial: Option<Tensor>,
}

impl Statistics {
    /// Room for those of an input, on any device.
    ///
    /// # Errors
    /// As [`Tensor::uninit`].
    pub fn uninit(device: &Device, form: &Form) -> Result<Statistics> {
        let [n, h, w, c] = form.dims;
        let values = Tensor::uninit(device, &[n, form.groups, 2], DType::F32)?;
        let splits = (h * w).div_ceil(split_pixels(h * w));
        let partial = match form.whole() {
            true => None,
            false => Some(Tensor::uninit(device, &[n, splits, c, 2], DType::F32)?),
        };
        Ok(Statistics { values, partial })
    }

    /// # Errors
    /// As [`CudaDevice::launch`].
    pub fn compute(&mut self, device: &CudaDevice, args: &GroupNorm, dims: [usize; 4]) -> Result<()> {
        let [n, h, w, c] = dims;
        if n * h * w * c == 0 {
            return Ok(());
        }
        let Some(partial) = &self.partial else {
            return group_norm_whole(device, args, dims, None, Some(&self.values));
        };
        let split = split_pixels(h * w);
        gather(device, args, [n, h * w, c], split, partial.cuda())?;
        merge(device, args.eps, [n, h * w, c], split, partial, &self.values)
    }

    /// Pixels that [`add`](Statistics::add) takes at a time, of one image `[1, H, W, C]`.
    pub fn chunk(form: &Form) -> usize {
        let [_, h, w, _] = form.dims;
        if form.whole() { (h * w).max(1) } else { split_pixels(h * w) }
    }

    /// Launches of [`finish`](Statistics::finish).
    pub fn finish_launches(&self) -> u64 {
        u64::from(self.partial.is_some())
    }

    /// Takes pixels of one image, `[1, 1, pixels, C]`: whole chunks from pixel `first` on, the last of which may end with the
    /// image. The same bits as [`compute`](Statistics::compute).
    ///
    /// # Errors
    /// As [`CudaDevice::launch`].
    pub fn add(&mut self, device: &CudaDevice, args: &GroupNorm, dims: [usize; 4], first: usize) -> Result<()> {
        let [_, _, pixels, c] = args.x.dims("group_norm")?;
        match &self.partial {
            None => group_norm_whole(device, args, [1, 1, pixels, c], None, Some(&self.values)),
            Some(partial) => {
                let split = split_pixels(dims[1] * dims[2]);
                let to = DevicePtr(partial.cuda().0 + (first / split * c * 2 * size_of::<f32>()) as u64);
                gather(device, args, [1, pixels, c], split, to)
            }
        }
    }

    /// After all pixels of an image `dims` were added. `eps`: of the norm.
    ///
    /// # Errors
    /// As [`CudaDevice::launch`].
    pub fn finish(&mut self, device: &CudaDevice, eps: f32, [_, h, w, c]: [usize; 4]) -> Result<()> {
        match &self.partial {
            None => Ok(()),
            Some(partial) => merge(device, eps, [1, h * w, c], split_pixels(h * w), partial, &self.values),
        }
    }
}

/// Mean and squared deviations of every channel over each `split` of an image's pixels, to `partial [N, splits, C, 2]`. `dims`:
/// N, H * W, C.
fn gather(
    device: &CudaDevice,
    args: &GroupNorm,
    [n, pixels, c]: [usize; 3],
    split: usize,
    partial: DevicePtr,
) -> Result<()> {
    let (a, b) = (args.x.first(), args.x.second());
    let [channels_a, channels_b] = channels("group_norm", args)?;
    let vector = vectors(args) && aligned(a) && b.is_none_or(aligned);
    let (tiles, tile, rows) = tiling(c, vector);
    let launch = Launch::grid([tiles, pixels.div_ceil(split), n]).block(tile * rows);
    let entry = entry("group_norm_statistics", a.dtype());
    // SAFETY: arguments as the entry has them; the partial has a pair for every image, split and channel.
    unsafe {
        device.launch(
            "norm",
            &entry,
            launch,
            args![
                partial,
                a.cuda(),
                DevicePtr::or_null(b),
                channels_a,
                channels_b,
                int("group_norm", "H*W", pixels)?,
                split as i32,
                tile as i32,
                i32::from(vector)
            ],
        )
    }
}

/// Joins what [`gather`] left, by group, to `values [N, groups, 2]`. `dims`: N, H * W, C.
fn merge(
    device: &CudaDevice,
    eps: f32,
    [n, pixels, c]: [usize; 3],
    split: usize,
    partial: &Tensor,
    values: &Tensor,
) -> Result<()> {
    let launch = Launch::grid([values.shape()[1], n, 1]).block(MERGE_THREADS);
    // SAFETY: arguments as the entry has them; a pair for every image and group.
    unsafe {
        device.launch(
            "norm",
            "group_norm_merge_f32",
            launch,
            args![
                values.cuda(),
                partial.cuda(),
                int("group_norm", "C", c)?,
                int("group_norm", "H*W", pixels)?,
                split as i32,
                pixels.div_ceil(split) as i32,
                eps
            ],
        )
    }
}

/// Room for the statistics that [`group_norm`] passes from one launch to the next, on any device; `None` where
/// [`Form::launches`] is 1.
///
/// # Errors
/// As [`Tensor::uninit`].
pub fn scratch(device: &Device, form: &Form) -> Result<Option<Statistics>> {
    if form.whole() { Ok(None) } else { Statistics::uninit(device, form).map(Some) }
}

/// `y = group_norm(x)`, which is not empty. `statistics`: of [`scratch`].
pub fn group_norm(
    device: &CudaDevice,
    args: &GroupNorm,
    dims: [usize; 4],
    statistics: Option<Statistics>,
    y: &mut Tensor,
) -> Result<()> {
    let Some(mut statistics) = statistics else {
        return group_norm_whole(device, args, dims, Some(y), None);
    };
    statistics.compute(device, args, dims)?;
    group_norm_apply(device, args, dims, &statistics.values, y)
}

/// `y = group_norm(x)` by given statistics `[N, groups, 2]`.
pub fn group_norm_apply(
    device: &CudaDevice,
    args: &GroupNorm,
    [n, h, w, c]: [usize; 4],
    statistics: &Tensor,
    y: &Tensor,
) -> Result<()> {
    let (a, b) = (args.x.first(), args.x.second());
    let [channels_a, channels_b] = channels("group_norm", args)?;
    let vector = vectors(args) && all_aligned(args, Some(y));
    let (tiles, tile, rows) = tiling(c, vector);
    let launch = Launch::grid([(h * w).div_ceil(rows * APPLY_PIXELS), tiles, n]).block(tile * rows);
    let entry = entry("group_norm_apply", y.dtype());
    // SAFETY: arguments as the entry has them; the op checked that they fit together.
    unsafe {
        device.launch(
            "norm",
            &entry,
            launch,
            args![
                y.cuda(),
                a.cuda(),
                DevicePtr::or_null(b),
                statistics.cuda(),
                args.gamma.cuda(),
                args.beta.cuda(),
                ModulationArgs::new("group_norm", args.modulation.as_ref(), n)?,
                channels_a,
                channels_b,
                int("group_norm", "H*W", h * w)?,
                args.groups as i32,
                activation_number(args.activation),
                tile as i32,
                i32::from(vector)
            ],
        )
    }
}

/// Statistics or result or both, in one launch.
fn group_norm_whole(
    device: &CudaDevice,
    args: &GroupNorm,
    dims: [usize; 4],
    y: Option<&Tensor>,
    statistics: Option<&Tensor>,
) -> Result<()> {
    match Form::on_card(device, args, dims).clusters() {
        Some(clusters) if vectors(args) && all_aligned(args, y) => {
            group_norm_cluster(device, args, dims, clusters, y, statistics)
        }
        _ => group_norm_small(device, args, dims, y, statistics),
    }
}

fn group_norm_cluster(
    device: &CudaDevice,
    args: &GroupNorm,
    [n, h, w, _]: [usize; 4],
    Clusters { window, blocks }: Clusters,
    y: Option<&Tensor>,
    statistics: Option<&Tensor>,
) -> Result<()> {
    let (a, b) = (args.x.first(), args.x.second());
    let [channels_a, channels_b] = channels("group_norm", args)?;
    let launch = Launch::grid([args.groups / window * blocks, n, 1]).block(Clusters::THREADS).cluster([blocks, 1, 1]);
    let entry = entry("group_norm_cluster", a.dtype());
    // SAFETY: arguments as the entry has them; the op checked that they fit together, the caller that vectors do.
    unsafe {
        device.launch(
            "sm90/norm",
            &entry,
            launch,
            args![
                DevicePtr::or_null(y),
                DevicePtr::or_null(statistics),
                a.cuda(),
                DevicePtr::or_null(b),
                args.gamma.cuda(),
                args.beta.cuda(),
                ModulationArgs::new("group_norm", args.modulation.as_ref(), n)?,
                channels_a,
                channels_b,
                int("group_norm", "H*W", h * w)?,
                args.groups as i32,
                window as i32,
                args.eps,
                activation_number(args.activation)
            ],
        )
    }
}

fn group_norm_small(
    device: &CudaDevice,
    args: &GroupNorm,
    [n, h, w, c]: [usize; 4],
    y: Option<&Tensor>,
    statistics: Option<&Tensor>,
) -> Result<()> {
    let (a, b) = (args.x.first(), args.x.second());
    let [channels_a, channels_b] = channels("group_norm", args)?;
    // As few groups a block as whole vectors take.
    let group_channels = c / args.groups;
    let window = VECTOR / gcd(VECTOR, group_channels);
    let vector = vectors(args) && all_aligned(args, y) && args.groups.is_multiple_of(window);
    let window = if vector { window } else { 1 };
    let launch = Launch::grid([args.groups / window, n, 1]).block(THREADS);
    let entry = entry("group_norm_small", a.dtype());
    // SAFETY: arguments as the entry has them; the op checked that they fit together.
    unsafe {
        device.launch(
            "norm",
            &entry,
            launch,
            args![
                DevicePtr::or_null(y),
                DevicePtr::or_null(statistics),
                a.cuda(),
                DevicePtr::or_null(b),
                args.gamma.cuda(),
                args.beta.cuda(),
                ModulationArgs::new("group_norm", args.modulation.as_ref(), n)?,
                channels_a,
                channels_b,
                int("group_norm", "H*W", h * w)?,
                args.groups as i32,
                window as i32,
                args.eps,
                activation_number(args.activation),
                i32::from(vector)
            ],
        )
    }
}

/// `ModulationArgs` of norm.cuh.
#[derive(Clone, Copy, bytemuck::NoUninit)]
#[repr(C)]
struct ModulationArgs {
    rows: StepRowsArgs,
    scale: i32,
    shift: i32,
}

impl ModulationArgs {
    /// Of a batch of `images` images.
    fn new(op: &'static str, modulation: Option<&Modulation>, images: usize) -> Result<ModulationArgs> {
        let Some(Modulation { rows, scale, shift }) = modulation else {
            return Ok(ModulationArgs { rows: StepRowsArgs::NONE, scale: 0, shift: 0 });
        };
        let rows = StepRowsArgs::new(op, rows, images)?;
        Ok(ModulationArgs { rows, scale: int(op, "scale", *scale)?, shift: int(op, "shift", *shift)? })
    }
}

/// `LayerNormArgs` of norm.cu.
#[derive(Clone, Copy, bytemuck::NoUninit)]
#[repr(C)]
struct LayerNormArgs {
    y: DevicePtr,
    x: DevicePtr,
    gamma: DevicePtr,
    beta: DevicePtr,
    modulation: ModulationArgs,
    rows: i32,
    image_rows: i32,
    channels: i32,
    eps: f32,
    vector: i32,
    /// In place of padding.
    _end: u32,
}

pub fn layer_norm(device: &CudaDevice, args: &LayerNorm, c: usize, y: &mut Tensor) -> Result<()> {
    const OP: &str = "layer_norm";
    let LayerNorm { x, gamma, beta, eps, modulation } = *args;
    let columns = modulation.map(|modulation| modulation.columns());
    let vector = c.is_multiple_of(VECTOR)
        && [Some(x), gamma, beta, Some(&*y)].into_iter().flatten().all(aligned)
        && columns.iter().flatten().all(aligned_rows);
    let (rows, images) = (y.numel() / c, x.shape()[0]);
    let arguments = LayerNormArgs {
        y: y.cuda(),
        x: x.cuda(),
        gamma: DevicePtr::or_null(gamma),
        beta: DevicePtr::or_null(beta),
        modulation: ModulationArgs::new(OP, modulation.as_ref(), images)?,
        rows: int(OP, "rows", rows)?,
        image_rows: int(OP, "rows of an image", if modulation.is_some() { rows / images } else { rows })?,
        channels: int(OP, "C", c)?,
        eps,
        vector: i32::from(vector),
        _end: 0,
    };
    let launch = Launch::grid([rows.div_ceil(THREADS / 32), 1, 1]).block(THREADS);
    // SAFETY: the argument as the entry has it; x and y have `rows` rows of C elements, gamma, beta and the columns have C.
    unsafe { device.launch("norm", &entry(OP, y.dtype()), launch, args![arguments]) }
}

/// Of both sources; the sum fits too.
fn channels(op: &'static str, args: &GroupNorm) -> Result<[i32; 2]> {
    let [a, b] = [Some(args.x.first()), args.x.second()].map(|x| x.map_or(0, |x| x.shape()[3]));
    int(op, "C", a + b)?;
    Ok([a as i32, b as i32])
}

/// No vector of channels lies in both sources.
fn vectors(args: &GroupNorm) -> bool {
    [Some(args.x.first()), args.x.second()].into_iter().flatten().all(|x| x.shape()[3].is_multiple_of(VECTOR))
}

fn all_aligned(args: &GroupNorm, y: Option<&Tensor>) -> bool {
    let tensors = [Some(args.x.first()), args.x.second(), Some(args.gamma), Some(args.beta), y];
    tensors.into_iter().flatten().all(aligned) && args.columns().iter().flatten().all(aligned_rows)
}

/// Tiles side by side, columns of a tile, rows of threads: at most a warp of columns, tiles as even as can be.
fn tiling(channels: usize, vector: bool) -> (usize, usize, usize) {
    let columns = channels / if vector { VECTOR } else { 1 };
    let tile = columns.div_ceil(columns.div_ceil(32));
    (columns.div_ceil(tile), tile, THREADS / tile)
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The models' norms, and what the kernel cannot do.
    #[test]
    fn clusters_follow_from_one_images_size() {
        let clusters = |size: usize, channels| Clusters::of(size * size, channels, 32);
        let of = |window, blocks| Some(Clusters { window, blocks });
        // SDXL at 1024: 128x128, 64x64, 32x32. Of 960 channels too little of 128x128 stays in registers.
        assert_eq!([320, 640, 960].map(|c| clusters(128, c)), [of(4, 8), of(2, 8), None]);
        assert_eq!([640, 1280, 1920].map(|c| clusters(64, c)), [of(2, 8), of(1, 4), of(2, 8)]);
        assert_eq!([1280, 2560].map(|c| clusters(32, c)), [of(1, 4), of(1, 4)]);
        // The VAE's large maps have three launches.
        assert_eq!([(1024, 128), (512, 256), (512, 512)].map(|(size, c)| clusters(size, c)), [None; 3]);
        assert_eq!(clusters(1, 320), of(4, 1));
        // Three groups in a vector; groups that are no whole windows; no pixels; groups wider than a block of sm_80 takes.
        assert_eq!(Clusters::of(64, 40, 8), None);
        assert_eq!(Clusters::of(64, 60, 6), None);
        assert_eq!(Clusters::of(0, 320, 32), None);
        assert_eq!(Clusters::of(64, 512, 1), None);
    }
}
