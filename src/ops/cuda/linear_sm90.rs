//! Launches of kernels/sm90/linear.cu and linear_fp8.cu: linear by Hopper's wgmma and TMA.
//!
//! Whether it is these kernels or the portable ones follows from dtype, N, K and alignment, never from the number of rows:
//! the two add in other orders, and a row's bits must not depend on the other rows. All tiles here give the same bits, so
//! which tile may depend on the rows too.

use super::step_rows::aligned_rows;
use super::variants::{self, Variant};
use super::{aligned, entry};
use crate::error::Result;
use crate::ops::{Activation, Linear};
use crate::runtime::cuda::{CudaDevice, Isa, Launch, Swizzle, TensorMap, TensorView, args};
use crate::runtime::{DType, Tensor};

/// A row of a stage of the ring, the width of the swizzle: `WgmmaTile::kSlice` of k.
const SLICE_BYTES: usize = 128;

/// What an entry can do: `LinearKind` of sm90/epilogue_linear.cuh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Plain,
    Activated,
    Gated,
    RowGated,
}

impl Kind {
    fn of(args: &Linear) -> Kind {
        if args.gate.is_some() {
            return Kind::RowGated; // and there is no activation
        }
        match args.activation {
            Activation::None => Kind::Plain,
            Activation::Silu | Activation::Gelu | Activation::QuickGelu | Activation::GeluTanh => Kind::Activated,
            Activation::Geglu | Activation::GegluTanh => Kind::Gated,
        }
    }

    /// Part of the entry's name.
    fn suffix(self) -> &'static str {
        match self {
            Kind::Plain => "",
            Kind::Activated => "_activated",
            Kind::Gated => "_geglu",
            Kind::RowGated => "_gate",
        }
    }
}

/// A block's work: `WgmmaTile` of sm90/main_loop.cuh, and what it costs.
///
/// The costs were fitted to measurements of a prototype of these kernels on one H200, bf16, operands not in L2: a product
/// takes `start_ns + rounds * (slices * slice_ns + tile_ns)`, where a round is a tile on every place that the card has for
/// blocks. These kernels themselves have not been measured, so what the choice rests on is a prediction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tile {
    name: &'static str,
    reason: &'static str,
    /// Columns of a tile go through the strips in so many steps.
    passes: usize,
    m: usize,
    n: usize,
    stages: usize,
    /// Consumer warpgroups, and whether they take turns.
    consumers: usize,
    ping_pong: bool,
    /// On a multiprocessor.
    blocks: usize,
    kinds: &'static [Kind],
    /// Launch, the first slice's way and the last tile's.
    start_ns: usize,
    slice_ns: usize,
    /// Between two tiles: half with a residual, half without; of GEGLU.
    tile_ns: [usize; 2],
}

const ALL: &[Kind] = &[Kind::Plain, Kind::Activated, Kind::Gated, Kind::RowGated];
const NOT_ROW_GATED: &[Kind] = &[Kind::Plain, Kind::Activated, Kind::Gated];
const NOT_ACTIVATED: &[Kind] = &[Kind::Plain, Kind::Gated, Kind::RowGated];

/// The kernels of one op.
#[derive(Debug)]
pub struct Family {
    op: &'static str,
    /// Below kernels/, and how its entries begin.
    file: &'static str,
    tiles: &'static [Tile],
    /// A consumer warp has the scales of its tile's columns in shared memory.
    scales: bool,
}

pub static LINEAR: Family = Family { op: "linear", file: "sm90/linear", tiles: &TILES, scales: false };
pub static LINEAR_FP8: Family = Family { op: "linear_fp8", file: "sm90/linear_fp8", tiles: &TILES_FP8, scales: true };

static TILES: [Tile; 7] = [
    Tile {
        name: "sm90_128x160",
        reason: "320, 640 and 1280 outputs are whole tiles of 160: a wave of 128 blocks where 128x256 has 80",
        passes: 1,
        m: 128,
        n: 160,
        stages: 5,
        consumers: 2,
        ping_pong: false,
        blocks: 1,
        kinds: NOT_ROW_GATED,
        start_ns: 2600,
        slice_ns: 412,
        tile_ns: [1600, 3400],
    },
    Tile {
        name: "sm90_256x128",
        reason: "large results with long sums: least traffic a product",
        passes: 2,
        m: 256,
        n: 128,
        stages: 4,
        consumers: 2,
        ping_pong: false,
        blocks: 1,
        kinds: NOT_ACTIVATED,
        start_ns: 2800,
        slice_ns: 650,
        tile_ns: [2500, 3800],
    },
    Tile {
        name: "sm90_pingpong_128x160",
        reason: "many tiles with short sums: one consumer writes out while the other multiplies",
        passes: 1,
        m: 128,
        n: 160,
        stages: 4,
        consumers: 2,
        ping_pong: true,
        blocks: 1,
        kinds: &[Kind::Plain],
        start_ns: 3600,
        slice_ns: 445,
        tile_ns: [550, 0],
    },
    Tile {
        name: "sm90_pingpong_128x128",
        reason: "as sm90_pingpong_128x160, where its tiles fit better; GEGLU, whose way out is long",
        passes: 1,
        m: 128,
        n: 128,
        stages: 5,
        consumers: 2,
        ping_pong: true,
        blocks: 1,
        kinds: NOT_ACTIVATED,
        start_ns: 3300,
        slice_ns: 358,
        tile_ns: [530, 800],
    },
    Tile {
        name: "sm90_pingpong_64x256",
        reason: "GEGLU with few rows in the last tile",
        passes: 1,
        m: 64,
        n: 256,
        stages: 4,
        consumers: 2,
        ping_pong: true,
        blocks: 1,
        kinds: &[Kind::Plain, Kind::Gated],
        start_ns: 3300,
        slice_ns: 377,
        tile_ns: [670, 1050],
    },
    Tile {
        name: "sm90_64x80",
        reason: "few rows: most blocks, two on a multiprocessor",
        passes: 1,
        m: 64,
        n: 80,
        stages: 5,
        consumers: 1,
        ping_pong: false,
        blocks: 2,
        kinds: &[Kind::Plain, Kind::Activated],
        start_ns: 2300,
        slice_ns: 168,
        tile_ns: [800, 0],
    },
    Tile {
        name: "sm90_64x64",
        reason: "few rows: widths that tiles of 80 do not fit, GEGLU",
        passes: 1,
        m: 64,
        n: 64,
        stages: 4,
        consumers: 1,
        ping_pong: false,
        blocks: 3,
        kinds: NOT_ACTIVATED,
        start_ns: 2300,
        slice_ns: 200,
        tile_ns: [800, 1000],
    },
];

/// Of 8-bit floats. Two sets of sums in registers, so none of 256 rows or columns, and no turns. The costs of the larger two
/// were fitted as above; those of the others are a guess from the 16-bit tiles of the same bytes a slice.
static TILES_FP8: [Tile; 4] = [
    Tile {
        name: "sm90_128x160",
        reason: "320, 640 and 1280 outputs are whole tiles of 160",
        passes: 1,
        m: 128,
        n: 160,
        stages: 5,
        consumers: 2,
        ping_pong: false,
        blocks: 1,
        kinds: &[Kind::Plain],
        start_ns: 2600,
        slice_ns: 425,
        tile_ns: [1600, 0],
    },
    Tile {
        name: "sm90_128x128",
        reason: "GEGLU and other activations, widths that tiles of 160 do not fit",
        passes: 1,
        m: 128,
        n: 128,
        stages: 5,
        consumers: 2,
        ping_pong: false,
        blocks: 1,
        kinds: ALL,
        start_ns: 2600,
        slice_ns: 350,
        tile_ns: [1600, 2400],
    },
    Tile {
        name: "sm90_64x80",
        reason: "few rows: most blocks, two on a multiprocessor",
        passes: 1,
        m: 64,
        n: 80,
        stages: 5,
        consumers: 1,
        ping_pong: false,
        blocks: 2,
        kinds: &[Kind::Plain, Kind::Activated],
        start_ns: 2300,
        slice_ns: 190,
        tile_ns: [800, 0],
    },
    Tile {
        name: "sm90_64x64",
        reason: "few rows: widths that tiles of 80 do not fit, GEGLU",
        passes: 1,
        m: 64,
        n: 64,
        stages: 4,
        consumers: 1,
        ping_pong: false,
        blocks: 2,
        kinds: NOT_ACTIVATED,
        start_ns: 2300,
        slice_ns: 220,
        tile_ns: [800, 1000],
    },
];

impl Tile {
    fn variant(&self) -> Variant {
        Variant { name: self.name, reason: self.reason }
    }

    fn threads(&self) -> usize {
        128 * (1 + self.consumers)
    }

    /// Columns of y that a strip holds.
    fn strip_columns(&self, kind: Kind) -> usize {
        self.n / self.passes / if kind == Kind::Gated { 2 } else { 1 }
    }

    /// Columns of a box of the strip: `LinearStrip::kBox`.
    fn box_columns(&self, kind: Kind) -> usize {
        let columns = self.strip_columns(kind);
        [64, 32].into_iter().find(|&wide| columns.is_multiple_of(wide)).unwrap_or(16)
    }

    /// `sizeof(LinearShared)`: the ring, a strip per consumer warp, the mbarriers; it is aligned to 1024. With `scales`
    /// `sizeof(LinearFp8Shared)`.
    fn shared_bytes(&self, kind: Kind, scales: bool) -> usize {
        let ring = self.stages * (self.m + self.n) * SLICE_BYTES;
        let warps = 4 * self.consumers;
        let parts = self.m / 64 / if self.ping_pong { 1 } else { self.consumers };
        let strips = warps * parts * 16 * self.strip_columns(kind) * 2;
        let barriers = 8 * (2 * self.stages + 2 + warps);
        let linear = (ring + strips + barriers).next_multiple_of(1024);
        if scales { (linear + warps * self.n * size_of::<f32>()).next_multiple_of(1024) } else { linear }
    }

    fn tiles(&self, m: usize, columns: usize) -> usize {
        m.div_ceil(self.m) * columns.div_ceil(self.n)
    }

    /// Predicted duration; rows and columns of the product, slices of its sums.
    fn nanoseconds(&self, kind: Kind, [m, columns, slices]: [usize; 3], multiprocessors: usize) -> usize {
        let tiles = self.tiles(m, columns);
        let rounds = tiles.div_ceil(multiprocessors * self.blocks);
        // Blocks beside each other on a multiprocessor: each more makes all half as slow again.
        let beside = tiles.div_ceil(multiprocessors).min(self.blocks).max(1);
        let slice = self.slice_ns * (1 + beside) / 2;
        self.start_ns + rounds * (slices * slice + self.tile_ns[usize::from(kind == Kind::Gated)])
    }
}

impl Family {
    /// The tiles that some card has.
    pub fn all(&self) -> Vec<Variant> {
        self.tiles.iter().map(Tile::variant).collect()
    }

    /// Whether a variant of this name is one of these.
    pub fn has(&self, name: &str) -> bool {
        self.tiles.iter().any(|tile| tile.name == name)
    }

    /// The tile that is asked for, or that with the shortest predicted duration.
    fn pick(&self, kind: Kind, size: [usize; 3], multiprocessors: usize, asked: Option<&str>) -> Result<&'static Tile> {
        let what = || {
            let what = match kind {
                Kind::Plain => "no activation",
                Kind::Activated => "an activation",
                Kind::Gated => "GEGLU",
                Kind::RowGated => "a gate",
            };
            what.into()
        };
        let nanoseconds = |tile: &Tile| tile.nanoseconds(kind, size, multiprocessors);
        let fit = self.tiles.iter().filter(|tile| tile.kinds.contains(&kind));
        variants::pick(self.op, asked, fit, Tile::variant, what, nanoseconds)
    }

    /// Whether the kernels take these operands: TMA wants rows of whole 16 bytes, and there must be something to sum.
    pub fn takes(&self, device: &CudaDevice, args: &Linear, [_, n, k]: [usize; 3], y: &Tensor) -> bool {
        device.has(Isa::Sm90a)
            && y.dtype() != DType::F32
            && k > 0
            && (k * args.x.dtype().size_bytes()).is_multiple_of(16)
            && n.is_multiple_of(8)
            && [Some(args.x), Some(args.weight), Some(y), args.bias, args.residual].into_iter().flatten().all(aligned)
            && args.gate.as_ref().is_none_or(aligned_rows)
    }

    /// `[m, n, k]`: rows and columns of y, terms of a sum; `arguments`: as the portable kernel gets them. `asked`: a tile by
    /// its name.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument): the tile that is asked for lacks the activation.
    ///
    /// # Safety
    /// `arguments` is the entries' structure, made of `args` and `y`, whose shapes were checked.
    pub(super) unsafe fn launch<A: bytemuck::NoUninit>(
        &self,
        device: &CudaDevice,
        args: &Linear,
        [m, n, k]: [usize; 3],
        arguments: A,
        asked: Option<&str>,
        y: &Tensor,
    ) -> Result<()> {
        let columns = args.weight.shape()[0];
        let kind = Kind::of(args);
        let multiprocessors = device.multiprocessors();
        let slices = (k * args.x.dtype().size_bytes()).div_ceil(SLICE_BYTES);
        let tile = self.pick(kind, [m, columns, slices], multiprocessors, asked)?;
        let matrix = |tensor: &Tensor, rows: usize, columns: usize, boxes: [usize; 2], swizzle| {
            let dtype = tensor.dtype();
            let (dims, strides_bytes) = (&[columns, rows], &[columns * dtype.size_bytes()]);
            let view = TensorView { base: tensor.cuda(), dtype, dims, strides_bytes };
            TensorMap::tiled(device, view, &boxes, swizzle)
        };
        let wide = tile.box_columns(kind);
        let swizzle = match wide {
            64 => Swizzle::Bytes128,
            32 => Swizzle::Bytes64,
            _ => Swizzle::Bytes32,
        };
        let slice = SLICE_BYTES / args.x.dtype().size_bytes();
        let x_map = matrix(args.x, m, k, [slice, tile.m], Swizzle::Bytes128)?;
        let weight_map = matrix(args.weight, columns, k, [slice, tile.n], Swizzle::Bytes128)?;
        let y_map = matrix(y, m, n, [wide, 16], swizzle)?;
        let residual_map = args.residual.map(|residual| matrix(residual, m, n, [wide, 16], swizzle)).transpose()?;
        let blocks = tile.tiles(m, columns).min(multiprocessors * tile.blocks);
        let launch = Launch::grid([blocks, 1, 1]).block(tile.threads()).shared(tile.shared_bytes(kind, self.scales));
        let entry = entry(&format!("{}_{}{}", self.op, tile.name, kind.suffix()), y.dtype());
        // SAFETY: arguments as the entry has them; the maps end where the tensors end, whose shapes were checked.
        unsafe {
            device.launch(
                self.file,
                &entry,
                launch,
                args![x_map, weight_map, y_map, residual_map.unwrap_or(y_map), arguments],
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picked(kind: Kind, size: [usize; 3]) -> &'static str {
        let [m, columns, k] = size;
        LINEAR.pick(kind, [m, columns, k / 64], 132, None).unwrap().name
    }

    /// What was fastest when the prototype was measured on an H200, or within a few percent of it.
    #[test]
    fn tiles_by_shape() {
        for (kind, size, expected) in [
            (Kind::Plain, [2048, 1280, 1280], "sm90_128x160"),
            (Kind::Plain, [2048, 1280, 5120], "sm90_128x160"),
            (Kind::Plain, [8192, 640, 2560], "sm90_128x160"),
            (Kind::Plain, [8192, 320, 320], "sm90_128x160"),
            (Kind::Plain, [512, 10240, 1280], "sm90_128x160"),
            (Kind::Plain, [8192, 1920, 640], "sm90_pingpong_128x160"),
            (Kind::Plain, [8192, 5120, 640], "sm90_pingpong_128x160"),
            (Kind::Gated, [8192, 10240, 1280], "sm90_pingpong_128x128"),
            (Kind::Gated, [2048, 10240, 1280], "sm90_pingpong_128x128"),
            (Kind::Gated, [32768, 5120, 640], "sm90_pingpong_128x128"),
            (Kind::Plain, [512, 1280, 1280], "sm90_64x80"),
            (Kind::Plain, [2048, 640, 640], "sm90_64x80"),
            (Kind::Plain, [154, 2560, 2048], "sm90_64x80"),
            (Kind::Activated, [2, 1280, 320], "sm90_64x80"),
        ] {
            assert_eq!(picked(kind, size), expected, "{kind:?} {size:?}");
        }
    }

    #[test]
    fn a_tile_that_is_asked_for_is_taken_or_refused() {
        let asked = |kind, name| LINEAR.pick(kind, [64, 64, 1], 132, Some(name));
        assert_eq!(asked(Kind::Gated, "sm90_256x128").unwrap().name, "sm90_256x128");
        let error = asked(Kind::Gated, "sm90_64x80").unwrap_err().to_string();
        let expected =
            "linear: MEGAFUSE_KERNEL is linear=sm90_64x80, expected a variant that takes GEGLU: sm90_128x160, ";
        assert!(error.starts_with(expected), "{error}");
    }

    const BOTH: [(&Family, &str); 2] = [
        (&LINEAR, include_str!("../../../kernels/sm90/linear.cu")),
        (&LINEAR_FP8, include_str!("../../../kernels/sm90/linear_fp8.cu")),
    ];

    /// As the kernels' own table has them: `PLAIN(64x80, suffix, T, 1, 64, 80, 5, kCooperative, 1, 2)`.
    #[test]
    fn the_kernels_have_the_same_tiles() {
        for (family, text) in BOTH {
            the_kernels_have_the_tiles_of(family, text);
        }
    }

    fn the_kernels_have_the_tiles_of(family: &Family, text: &str) {
        let mut theirs = Vec::new();
        for (macro_name, kind) in
            [("PLAIN", Kind::Plain), ("ACTIVATED", Kind::Activated), ("GEGLU", Kind::Gated), ("GATE", Kind::RowGated)]
        {
            for line in text.lines().filter_map(|line| line.trim().strip_prefix(&format!("{macro_name}("))) {
                let fields: Vec<&str> = line.split_once(')').unwrap().0.split(", ").collect();
                let [tile, "suffix", "T", rest @ ..] = &fields[..] else { panic!("{line}") };
                theirs.push(format!("sm90_{tile} {kind:?} {}", rest.join(" ")));
            }
        }
        let mut ours = Vec::new();
        for tile in family.tiles {
            let Tile { name, passes, m, n, stages, consumers, blocks, .. } = tile;
            let schedule = if tile.ping_pong { "kPingPong" } else { "kCooperative" };
            ours.extend(
                tile.kinds
                    .iter()
                    .map(|kind| format!("{name} {kind:?} {passes} {m} {n} {stages} {schedule} {consumers} {blocks}")),
            );
        }
        theirs.sort();
        ours.sort();
        assert_eq!(ours, theirs);
    }

    /// 227 KiB for a block, 228 for a multiprocessor with 1 KiB of the system's for each block.
    #[test]
    fn tiles_fit_into_shared_memory() {
        for (family, _) in BOTH {
            for (tile, &kind) in family.tiles.iter().flat_map(|tile| tile.kinds.iter().map(move |kind| (tile, kind))) {
                let bytes = tile.shared_bytes(kind, family.scales);
                assert!(bytes <= 227 << 10 && tile.blocks * (bytes + 1024) <= 228 << 10, "{tile:?}: {bytes}");
                assert!(tile.strip_columns(kind).is_multiple_of(tile.box_columns(kind)), "{tile:?}");
            }
        }
    }
}
