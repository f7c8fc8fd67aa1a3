//! Launches of kernels/sm90/conv2d.cu: conv2d by Hopper's wgmma and TMA.
//!
//! Whether it is these kernels or the portable ones follows from dtype, alignment and the geometry of one whole image, never
//! from the batch or from which rows are made: the two add in other orders, and an image's bits must not depend on its
//! neighbours, nor a stripe's on where the image is cut. All tiles here give the same bits, so which tile may depend on the
//! batch and on the stripe too.

use std::ops::Range;

use super::conv::{ConvArgs, Operands};
use super::variants::{self, Variant};
use super::{aligned, entry, tiles};
use crate::error::Result;
use crate::ops::conv::{Conv2d, Geometry, OP};
use crate::runtime::cuda::{CudaDevice, DevicePtr, Im2col, Isa, Launch, Swizzle, TensorMap, TensorView, args};
use crate::runtime::{DType, Tensor};

/// Channels of a slice: 128 bytes, the width of the swizzle. `ConvTile::kSlice`.
const SLICE: usize = 64;
/// Output pixels of a block, what one wgmma makes.
const BLOCK: usize = 64;
/// Columns that the epilogue's strip takes at a time: `kStripColumns` of sm90/epilogue_conv2d.cuh.
const STRIP_COLUMNS: usize = 32;
/// A map in im2col mode has 8 bits for a corner and for an offset, and steps up to 8.
const LARGEST_OFFSET: usize = 127;
const LARGEST_STRIDE: usize = 8;

/// How pixels come into shared memory: `ConvForm` of sm90/conv2d_loop.cuh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// 3 x 3 with stride 1 and this dilation: one box of pixels for all taps.
    Halo(usize),
    /// 3 x 3 of an input enlarged to twice its edges, as four 2 x 2 convolutions of what is stored.
    Doubled,
    /// A box for each tap.
    Im2col,
}

/// A block's work: `ConvTile` of sm90/conv2d_loop.cuh, and what it costs.
///
/// The costs were fitted to measurements of a prototype of these kernels on one H200, bf16, operands not in L2: a convolution
/// takes `start_ns + rounds * (steps * step_ns + tile_ns)`, where a step is a tap of a slice and a round a tile on every
/// multiprocessor. Those of `halo2`, `doubled_128x160` and `im2col_128x160` are their neighbours', by the bytes that L2 has to
/// deliver. These kernels themselves have not been measured, so what the choice rests on is a prediction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tile {
    name: &'static str,
    reason: &'static str,
    form: Form,
    /// Of 64 output pixels.
    blocks: usize,
    /// The blocks lie side by side, 2 x 2, and have one box together.
    united: bool,
    /// Output channels.
    n: usize,
    /// Of the rings of pixels and of weights.
    stages: [usize; 2],
    /// Launch, the first slice's way and the last tile's.
    start_ns: usize,
    step_ns: usize,
    /// Between two tiles, half with a residual, half without.
    tile_ns: usize,
}

static TILES: [Tile; 10] = [
    Tile {
        name: "sm90_halo_128x160",
        reason: "3x3 on small maps, or whose edges are no multiples of 16: most tiles",
        form: Form::Halo(1),
        blocks: 2,
        united: false,
        n: 160,
        stages: [4, 5],
        start_ns: 4700,
        step_ns: 400,
        tile_ns: 1600,
    },
    Tile {
        name: "sm90_halo_256x160",
        reason: "3x3 with 320, 640, 1280 outputs on maps that fill the card: least traffic a product",
        form: Form::Halo(1),
        blocks: 4,
        united: true,
        n: 160,
        stages: [2, 5],
        start_ns: 4700,
        step_ns: 772,
        tile_ns: 3000,
    },
    Tile {
        name: "sm90_halo_256x128",
        reason: "3x3 with 128, 256, 512 outputs: whole tiles, where 160 would waste a fifth",
        form: Form::Halo(1),
        blocks: 4,
        united: true,
        n: 128,
        stages: [3, 4],
        start_ns: 4000,
        step_ns: 564,
        tile_ns: 5500,
    },
    Tile {
        name: "sm90_halo2_128x160",
        reason: "dilation 2, as sm90_halo_128x160",
        form: Form::Halo(2),
        blocks: 2,
        united: false,
        n: 160,
        stages: [3, 5],
        start_ns: 4700,
        step_ns: 410,
        tile_ns: 1600,
    },
    Tile {
        name: "sm90_halo2_256x160",
        reason: "dilation 2, as sm90_halo_256x160",
        form: Form::Halo(2),
        blocks: 4,
        united: true,
        n: 160,
        stages: [2, 4],
        start_ns: 4700,
        step_ns: 790,
        tile_ns: 3000,
    },
    Tile {
        name: "sm90_doubled_128x160",
        reason: "twice the edges, then 3x3, as sm90_halo_128x160",
        form: Form::Doubled,
        blocks: 2,
        united: false,
        n: 160,
        stages: [4, 5],
        start_ns: 4700,
        step_ns: 405,
        tile_ns: 1600,
    },
    Tile {
        name: "sm90_doubled_256x160",
        reason: "twice the edges, then 3x3, as sm90_halo_256x160",
        form: Form::Doubled,
        blocks: 4,
        united: true,
        n: 160,
        stages: [3, 4],
        start_ns: 4700,
        step_ns: 780,
        tile_ns: 3000,
    },
    Tile {
        name: "sm90_doubled_256x128",
        reason: "twice the edges, then 3x3, as sm90_halo_256x128",
        form: Form::Doubled,
        blocks: 4,
        united: true,
        n: 128,
        stages: [3, 5],
        start_ns: 4000,
        step_ns: 570,
        tile_ns: 4500,
    },
    Tile {
        name: "sm90_im2col_128x160",
        reason: "1x1, strides, other kernels and dilations: most tiles",
        form: Form::Im2col,
        blocks: 2,
        united: false,
        n: 160,
        stages: [5, 5],
        start_ns: 4700,
        step_ns: 540,
        tile_ns: 1600,
    },
    Tile {
        name: "sm90_im2col_256x128",
        reason: "1x1, strides, other kernels and dilations: large maps, 128, 256, 512 outputs",
        form: Form::Im2col,
        blocks: 4,
        united: false,
        n: 128,
        stages: [4, 4],
        start_ns: 4700,
        step_ns: 720,
        tile_ns: 4500,
    },
];

/// Rows later than any image has: what begins then lies outside.
const NEVER: usize = 1 << 30;

/// Two warpgroups multiply, one loads.
const THREADS: usize = 384;
const CONSUMER_WARPS: usize = 8;
/// `kSumThreads` of sm90/conv2d.cu.
const SUM_THREADS: usize = 256;

impl Tile {
    fn variant(&self) -> Variant {
        Variant { name: self.name, reason: self.reason }
    }

    /// Output pixels along the edge of a unit, which is a block or the united blocks of a tile.
    fn edge(&self) -> usize {
        if self.united { 16 } else { 8 }
    }

    /// Pixels along the edge of a box that serves all taps; none where each tap has its own.
    fn pitch(&self) -> Option<usize> {
        match self.form {
            Form::Halo(dilation) => Some(self.edge() + 2 * dilation),
            Form::Doubled => Some(self.edge() + 1),
            Form::Im2col => None,
        }
    }

    /// Units of an image, of this many pixels: all, and those of a row.
    fn units(&self, [height, width]: [usize; 2]) -> [usize; 2] {
        match self.form {
            Form::Halo(_) | Form::Doubled => {
                let across = width.div_ceil(self.edge());
                [height.div_ceil(self.edge()) * across, across]
            }
            Form::Im2col => [(height * width).div_ceil(BLOCK), 1],
        }
    }

    /// `sizeof(ConvShared)`: the rings, a strip per consumer warp, the mbarriers; it is aligned to 1024.
    fn shared_bytes(&self) -> usize {
        let pixels = self.pitch().map_or(BLOCK, |pitch| pitch * pitch);
        let units = if self.united { 1 } else { self.blocks };
        let pixels = units * (pixels * SLICE * 2).next_multiple_of(1024);
        let rings = self.stages[0] * pixels + self.stages[1] * self.n * SLICE * 2;
        let strips = CONSUMER_WARPS * 2 * (self.blocks / 2) * 16 * STRIP_COLUMNS * 2;
        let barriers = 8 * (2 * self.stages[0] + 2 * self.stages[1] + CONSUMER_WARPS);
        (rings + strips + barriers).next_multiple_of(1024)
    }

    /// How a convolution is cut.
    fn cut(&self, g: &Geometry, channels: [usize; 2], splits: usize) -> Cut {
        let (pixels, parities) = match self.form {
            Form::Doubled => ([doubled_rows(g).len(), g.stored[1]], 4),
            _ => (g.output, 1),
        };
        let [units, units_across] = self.units(pixels);
        let units_of_a_tile = if self.united { 1 } else { self.blocks };
        let slices = channels.map(|channels| channels.div_ceil(SLICE));
        let (tiles_m, tiles_n) = ((g.images * units).div_ceil(units_of_a_tile), g.outputs.div_ceil(self.n));
        let all = slices[0] + slices[1];
        Cut {
            units,
            units_across,
            tiles_m,
            tiles_n,
            parities,
            tiles: splits * parities * tiles_m * tiles_n,
            slices_a: slices[0],
            slices: all,
            share: all.div_ceil(splits),
        }
    }

    /// Predicted duration.
    fn nanoseconds(&self, cut: &Cut, taps: usize, multiprocessors: usize) -> usize {
        let rounds = cut.tiles.div_ceil(multiprocessors);
        self.start_ns + rounds * (cut.share * taps * self.step_ns + self.tile_ns)
    }
}

/// `ConvTiles` as numbers, before they are counted as the kernels do.
#[derive(Clone, Copy, Debug)]
struct Cut {
    units: usize,
    units_across: usize,
    tiles_m: usize,
    tiles_n: usize,
    parities: usize,
    tiles: usize,
    slices_a: usize,
    slices: usize,
    share: usize,
}

/// `ConvTiles` of conv2d_loop.cuh.
#[derive(Clone, Copy, bytemuck::NoUninit)]
#[repr(C)]
struct ConvTiles {
    images: i32,
    units: i32,
    units_across: i32,
    tiles_m: i32,
    tiles_n: i32,
    parities: i32,
    tiles: i32,
    slices_a: i32,
    slices: i32,
    share: i32,
    corner_y: i32,
    corner_x: i32,
    odd: i32,
    later: [i32; 2],
}

/// The tiles that some card has.
pub fn all() -> Vec<Variant> {
    TILES.iter().map(Tile::variant).collect()
}

/// Whether a variant of this name is one of these.
pub fn is_one(name: &str) -> bool {
    TILES.iter().any(|tile| tile.name == name)
}

/// Whether a convolution of 16 bits is one of twice the edges that has a form of its own, by the geometry of the whole image:
/// it reads sums of its weights, which are made before it.
pub(super) fn is_doubled(args: &Conv2d, g: &Geometry) -> bool {
    g.input == g.stored.map(|size| 2 * size)
        && g.kernel == [3, 3]
        && (args.stride, args.dilation, args.padding) == (1, 1, [1; 4])
        && args.residual.is_none()
        && args.x.first().dtype() != DType::F32
        && [args.x.first().shape()[3], g.channels, g.outputs].iter().all(|size| size.is_multiple_of(8))
}

/// Rows of the stored image whose doubles a convolution to twice the edges makes.
fn doubled_rows(g: &Geometry) -> Range<usize> {
    g.first_output / 2..(g.first_output + g.output[0]).div_ceil(2)
}

/// The forms that a convolution may have, by the geometry of the whole image. `doubled`: [`is_doubled`].
fn forms(args: &Conv2d, g: &Geometry, doubled: bool) -> impl Fn(Form) -> bool + use<> {
    let ([kh, kw], Conv2d { stride, dilation, padding, .. }) = (g.kernel, *args);
    let im2col = stride <= LARGEST_STRIDE
        && padding.into_iter().chain([dilation * (kh - 1), dilation * (kw - 1)]).all(|size| size <= LARGEST_OFFSET);
    move |form| match form {
        _ if doubled => form == Form::Doubled,
        Form::Doubled => false,
        Form::Halo(wanted) => [kh, kw] == [3, 3] && stride == 1 && dilation == wanted,
        Form::Im2col => im2col,
    }
}

/// Whether the kernels take these operands: TMA wants rows of whole 16 bytes, and there must be something to sum. A stripe
/// that reads no row is not for them; its sums are zeros, whoever makes them.
pub(super) fn takes(device: &CudaDevice, args: &Conv2d, g: &Geometry, operands: &Operands) -> bool {
    let doubled = operands.doubled_weights.is_some();
    let form = forms(args, g, doubled);
    let sources = [Some(operands.a), operands.b];
    device.has(Isa::Sm90a)
        && operands.y.dtype() != DType::F32
        && (g.input == g.stored || doubled)
        && TILES.iter().any(|tile| form(tile.form))
        && sources.into_iter().flatten().all(|x| x.numel() > 0 && x.shape()[3].is_multiple_of(8))
        && g.outputs.is_multiple_of(8)
        && [Some(operands.y), Some(args.weight), args.bias, args.row.map(|row| row.table), args.residual]
            .into_iter()
            .chain(sources)
            .flatten()
            .all(aligned)
}

fn pick(
    form: impl Fn(Form) -> bool,
    cut: impl Fn(&Tile) -> Cut,
    taps: usize,
    multiprocessors: usize,
    asked: Option<&str>,
) -> Result<&'static Tile> {
    let what = || "this convolution".into();
    let nanoseconds = |tile: &Tile| tile.nanoseconds(&cut(tile), taps, multiprocessors);
    let form = &form;
    variants::pick(OP, asked, TILES.iter().filter(|tile| form(tile.form)), Tile::variant, what, nanoseconds)
}

/// The sums of weights that the form doubled reads: conv2d_join_weights of sm90/conv2d.cu.
pub(super) fn join_weights(device: &CudaDevice, weight: &Tensor, sums: &Tensor) -> Result<()> {
    let &[outputs, _, _, channels] = weight.shape() else { unreachable!("checked: [O, 3, 3, C]") };
    let launch = Launch::grid([(outputs * channels / 8).div_ceil(SUM_THREADS), 1, 1]).block(SUM_THREADS);
    let (outputs, channels) = (tiles::count(OP, "O", outputs)?, tiles::count(OP, "C", channels)?);
    let entry = entry("conv2d_join_weights", weight.dtype());
    // SAFETY: arguments as the entry has them: sums [4, O, 2, 2, C], weight [O, 3, 3, C], C a multiple of 8; both aligned.
    unsafe { device.launch("sm90/conv2d", &entry, launch, args![sums.cuda(), weight.cuda(), outputs, channels]) }
}

/// `arguments`: as the portable kernel gets them. `splits`: parts of the sums, which the caller joins if there are several.
/// `asked`: a tile by its name.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument): the tile that is asked for cannot make this convolution.
pub(super) fn conv2d(
    device: &CudaDevice,
    args: &Conv2d,
    g: &Geometry,
    splits: usize,
    operands: &Operands,
    arguments: ConvArgs,
    asked: Option<&str>,
) -> Result<()> {
    let dtype = operands.y.dtype();
    let bytes = dtype.size_bytes();
    let Operands { a, b, y, doubled_weights, .. } = *operands;
    let channels = [a.shape()[3], b.map_or(0, |b| b.shape()[3])];
    let multiprocessors = device.multiprocessors();
    // In the form doubled 2 x 2 weights for each of the four parities.
    let (weight, taps, weight_rows) = match doubled_weights {
        Some(sums) => (sums, 4, 4 * g.outputs),
        None => (args.weight, g.kernel[0] * g.kernel[1], g.outputs),
    };
    let cut = |tile: &Tile| tile.cut(g, channels, splits);
    let tile = pick(forms(args, g, doubled_weights.is_some()), cut, taps, multiprocessors, asked)?;
    let cut = cut(tile);

    let [height, width] = [g.held[1] - g.held[0], g.stored[1]];
    let [top, _, left, _] = args.padding;
    // The pixel under the first tap of the first output.
    let corner = match tile.form {
        Form::Doubled => [doubled_rows(g).start as i64 - 1 - g.held[0] as i64, -1],
        _ => [(g.first_output * args.stride) as i64 - top as i64 - g.held[0] as i64, -(left as i64)],
    };
    let x_map = |x: &Tensor| {
        let (c, pixel) = (x.shape()[3], x.shape()[3] * bytes);
        let (dims, strides_bytes) = (&[c, width, height, g.images], &[pixel, width * pixel, height * width * pixel]);
        let view = TensorView { base: x.cuda(), dtype, dims, strides_bytes };
        if let Some(pitch) = tile.pitch() {
            return TensorMap::tiled(device, view, &[SLICE, pitch, pitch, 1], Swizzle::Bytes128);
        }
        // From the corner at the first output to that at the last, which is counted from the last pixel of x.
        let last = [0, 1].map(|d| corner[d] + ((g.output[d] - 1) * args.stride) as i64 + 1 - [height, width][d] as i64);
        let im2col = Im2col {
            lower_corner: &[corner[1] as i32, corner[0] as i32],
            upper_corner: &[last[1] as i32, last[0] as i32],
            channels: SLICE,
            pixels: BLOCK,
            strides: &[args.stride; 2],
        };
        TensorMap::im2col(device, view, im2col, Swizzle::Bytes128)
    };
    let weight_map = |first: usize, channels: usize| {
        let base = DevicePtr(weight.cuda().0 + (first * bytes) as u64);
        let (dims, strides_bytes) = (&[channels, taps, weight_rows], &[g.channels * bytes, taps * g.channels * bytes]);
        let view = TensorView { base, dtype, dims, strides_bytes };
        TensorMap::tiled(device, view, &[SLICE, 1, tile.n], Swizzle::Bytes128)
    };
    let output_map = |tensor: &Tensor| {
        let ([h, w], pixel) = (g.output, g.outputs * bytes);
        let (dims, strides_bytes, boxes) = match tile.form {
            Form::Im2col => {
                ([g.outputs, h * w, 1, g.images], [pixel, h * w * pixel, h * w * pixel], [STRIP_COLUMNS, 16, 1, 1])
            }
            _ => ([g.outputs, w, h, g.images], [pixel, w * pixel, h * w * pixel], [STRIP_COLUMNS, 8, 2, 1]),
        };
        let view = TensorView { base: tensor.cuda(), dtype, dims: &dims, strides_bytes: &strides_bytes };
        TensorMap::tiled(device, view, &boxes, Swizzle::Bytes64)
    };
    // The pixels of y of one parity of rows and columns; the rows begin with the first that y has.
    let odd = g.first_output % 2;
    let parity_map = |parity: usize| {
        let ([h, w], pixel) = (g.output, g.outputs * bytes);
        let first_row = (parity / 2 + odd) % 2;
        let rows = h.saturating_sub(first_row).div_ceil(2);
        // One row makes no map empty; what has no row is never written.
        let base = DevicePtr(y.cuda().0 + (first_row.min(h - 1) * w * pixel + parity % 2 * pixel) as u64);
        let dims = &[g.outputs, w / 2, rows.max(1), g.images];
        let view = TensorView { base, dtype, dims, strides_bytes: &[2 * pixel, 2 * w * pixel, h * w * pixel] };
        TensorMap::tiled(device, view, &[STRIP_COLUMNS, 8, 2, 1], Swizzle::Bytes64)
    };
    let later = [0, 1].map(|parity| {
        let has_rows = (parity + odd) % 2 < g.output[0];
        if has_rows { usize::from(parity < odd) } else { NEVER }
    });
    let (a_map, b_map) = (x_map(a)?, b.map(x_map).transpose()?);
    let weight_a = weight_map(0, channels[0])?;
    let weight_b = if channels[1] > 0 { weight_map(channels[0], channels[1])? } else { weight_a };
    let y_maps = match tile.form {
        Form::Doubled => [parity_map(0)?, parity_map(1)?, parity_map(2)?, parity_map(3)?],
        _ => [output_map(y)?; 4],
    };
    let residual_map = args.residual.map(output_map).transpose()?;

    let count = |what, value| tiles::count(OP, what, value);
    let conv_tiles = ConvTiles {
        images: count("N", g.images)?,
        units: count("blocks of an image", cut.units)?,
        units_across: count("blocks of a row", cut.units_across)?,
        tiles_m: count("tiles", cut.tiles_m)?,
        tiles_n: count("tiles", cut.tiles_n)?,
        parities: count("parities", cut.parities)?,
        tiles: count("tiles", cut.tiles)?,
        slices_a: count("slices", cut.slices_a)?,
        slices: count("slices", cut.slices)?,
        share: count("slices", cut.share)?,
        corner_y: corner[0] as i32,
        corner_x: corner[1] as i32,
        odd: odd as i32,
        later: later.map(|rows| rows as i32),
    };
    let launch = Launch::grid([cut.tiles.min(multiprocessors), 1, 1]).block(THREADS).shared(tile.shared_bytes());
    let entry = entry(&format!("conv2d_{}", tile.name), dtype);
    // SAFETY: arguments as the entry has them; the maps end where the tensors end, whose shapes were checked; the partial sums
    // have room for every split; the kernel waits for the launch before it reads or writes what others do.
    unsafe {
        device.launch(
            "sm90/conv2d",
            &entry,
            launch,
            args![
                a_map,
                b_map.unwrap_or(a_map),
                weight_a,
                weight_b,
                y_maps,
                residual_map.unwrap_or(y_maps[0]),
                arguments,
                conv_tiles
            ],
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of N images with H x W outputs from C channels, O outputs.
    fn picked(form: Form, [n, h, w, c, o]: [usize; 5], taps: usize, splits: usize) -> &'static str {
        let g = Geometry {
            images: n,
            stored: [h, w],
            held: [0, h],
            input: [h, w],
            output: [h, w],
            first_output: 0,
            whole_output: [h, w],
            channels: c,
            outputs: o,
            kernel: [3, 3],
        };
        pick(|other| other == form, |tile| tile.cut(&g, [c, 0], splits), taps, 132, None).unwrap().name
    }

    /// What was fastest when the prototype was measured on an H200, or within a few percent of it.
    #[test]
    fn tiles_by_shape() {
        for (size, splits, expected) in [
            ([2, 128, 128, 320, 320], 1, "sm90_halo_256x160"),
            ([2, 64, 64, 640, 640], 1, "sm90_halo_256x160"),
            ([2, 64, 64, 1920, 640], 1, "sm90_halo_256x160"),
            ([2, 32, 32, 1280, 1280], 1, "sm90_halo_128x160"),
            ([2, 64, 64, 320, 320], 1, "sm90_halo_128x160"),
            ([2, 24, 24, 1280, 1280], 1, "sm90_halo_128x160"),
            ([2, 16, 16, 1280, 1280], 3, "sm90_halo_128x160"),
            ([2, 8, 8, 1280, 1280], 12, "sm90_halo_128x160"),
            ([1, 512, 512, 512, 512], 1, "sm90_halo_256x128"),
            ([1, 512, 512, 256, 256], 1, "sm90_halo_256x128"),
            ([1, 1024, 1024, 128, 128], 1, "sm90_halo_256x128"),
            ([1, 256, 256, 512, 512], 1, "sm90_halo_256x128"),
        ] {
            assert_eq!(picked(Form::Halo(1), size, 9, splits), expected, "{size:?}");
        }
        assert_eq!(picked(Form::Halo(2), [2, 64, 64, 640, 640], 9, 1), "sm90_halo2_256x160");
        assert_eq!(picked(Form::Im2col, [2, 64, 64, 320, 320], 9, 1), "sm90_im2col_128x160");
        assert_eq!(picked(Form::Im2col, [1, 512, 512, 512, 512], 9, 1), "sm90_im2col_256x128");
    }

    #[test]
    fn a_tile_that_is_asked_for_is_taken_or_refused() {
        let cut = |_: &Tile| -> Cut { unreachable!() };
        let asked = |name| pick(|form| form == Form::Im2col, cut, 9, 132, Some(name));
        assert_eq!(asked("sm90_im2col_256x128").unwrap().name, "sm90_im2col_256x128");
        let error = asked("sm90_halo_128x160").unwrap_err().to_string();
        let expected = "conv2d: MEGAFUSE_KERNEL is conv2d=sm90_halo_128x160, expected a variant that takes this \
                        convolution: sm90_im2col_128x160, sm90_im2col_256x128";
        assert_eq!(error, expected);
    }

    /// As the kernels' own table has them: `CONV(halo_128x160, suffix, T, kHalo, 2, false, 1, 160, 4, 5)`.
    #[test]
    fn the_kernels_have_the_same_tiles() {
        let text = include_str!("../../../kernels/sm90/conv2d.cu");
        let theirs: Vec<String> = text
            .lines()
            .filter_map(|line| line.trim().strip_prefix("CONV("))
            .map(|line| {
                let fields: Vec<&str> = line.split_once(')').unwrap().0.split(", ").collect();
                let [tile, "suffix", "T", rest @ ..] = &fields[..] else { panic!("{line}") };
                format!("sm90_{tile} {}", rest.join(" "))
            })
            .collect();
        let ours = TILES.each_ref().map(|tile| {
            let Tile { name, form, blocks, united, n, stages: [a, b], .. } = tile;
            let (form, dilation) = match form {
                Form::Halo(dilation) => ("kHalo", dilation),
                Form::Doubled => ("kDoubled", &1),
                Form::Im2col => ("kIm2col", &1),
            };
            format!("{name} {form} {blocks} {united} {dilation} {n} {a} {b}")
        });
        assert_eq!(theirs, ours);
    }

    /// 227 KiB for a block.
    #[test]
    fn tiles_fit_into_shared_memory() {
        for tile in &TILES {
            assert!(tile.shared_bytes() <= 227 << 10, "{tile:?}: {}", tile.shared_bytes());
            assert!(tile.n.is_multiple_of(STRIP_COLUMNS) && (!tile.united || tile.blocks == 4), "{tile:?}");
        }
    }
}
