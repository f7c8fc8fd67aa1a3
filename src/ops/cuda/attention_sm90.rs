//! Launches of kernels/sm90/attention.cu: attention by Hopper's wgmma and TMA.
//!
//! Whether it is these kernels or the portable ones follows from dtype, head_dim, alignment, what is asked for and the numbers
//! of keys, never from the number of images: the two add in other orders. So does whether it is a kernel with a ring or
//! without. All tiles with a ring for a width give the same bits, so which of them may depend on anything.

use super::attention::{AttentionArgs, OP};
use super::entry;
use super::variants::{self, Variant};
use crate::error::Result;
use crate::ops::attention::{Dims, SecondDims, WindowDims};
use crate::runtime::DType;
use crate::runtime::cuda::{CudaDevice, DevicePtr, Isa, Launch, Swizzle, TensorMap, TensorView, args};

/// Queries of a warpgroup.
const ROWS: usize = 64;

/// Columns of a box: 128 bytes, the width of the swizzle.
const COLUMNS: usize = 64;

/// Keys that the kernels without a ring take, and keys of their second softmax: `kShortKeys`, `kSecondKeys`.
const SHORT_KEYS: usize = 80;
const SECOND_KEYS: usize = 16;

/// Rows and columns of a window's boxes: `kBoxSide`.
const BOX_SIDE: usize = 8;

/// A block's work: `AttentionTile` of sm90/attention.cu.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tile {
    name: &'static str,
    reason: &'static str,
    head_dim: usize,
    /// Of v and y that a block makes.
    columns: usize,
    /// Consumer warpgroups.
    consumers: usize,
    /// Of a tile of the ring; all of them, in the kernels without one.
    keys: usize,
    stages: usize,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// `key_tile_ns`: what a block takes for a tile of keys. Measured for a prototype of these kernels on one H200, bf16, at
    /// 1024 tokens and more; of these themselves nothing has been measured.
    Ring { key_tile_ns: usize },
    /// As `Ring`, of windows: their boxes have to lie whole on the map.
    Windows { key_tile_ns: usize },
    /// `blocks`: per multiprocessor that the registers must leave room for.
    Short { blocks: usize },
}

const fn ring(
    name: &'static str,
    reason: &'static str,
    [head_dim, columns, consumers, keys, stages]: [usize; 5],
    key_tile_ns: usize,
) -> Tile {
    Tile { name, reason, head_dim, columns, consumers, keys, stages, kind: Kind::Ring { key_tile_ns } }
}

const fn windows(name: &'static str, of: Tile) -> Tile {
    let Kind::Ring { key_tile_ns } = of.kind else { panic!("of a ring") };
    Tile { name, reason: "windows of a map, shifted (MSW-MSA)", kind: Kind::Windows { key_tile_ns }, ..of }
}

const fn short(name: &'static str, head_dim: usize, blocks: usize) -> Tile {
    let reason = "text, whose keys are one tile: no ring, several blocks on a multiprocessor";
    let kind = Kind::Short { blocks };
    Tile { name, reason, head_dim, columns: head_dim, consumers: 1, keys: SHORT_KEYS, stages: 1, kind }
}

const D40: Tile = ring(
    "sm90_d40_192",
    "SD 1.5's first level: three warpgroups, whose exponentials outlast the products of one",
    [40, 40, 3, 128, 2],
    1315,
);
const D64: Tile =
    ring("sm90_d64_192", "SD 2.1, SDXL, SD 3: three warpgroups, of which one multiplies", [64, 64, 3, 128, 2], 1444);

static TILES: [Tile; 15] = [
    D40,
    D64,
    ring("sm90_d64_128", "as sm90_d64_192, where its tiles leave multiprocessors idle", [64, 64, 2, 128, 3], 1198),
    ring("sm90_d80_128", "SD 1.5's second level", [80, 80, 2, 128, 2], 1349),
    ring("sm90_d128_128", "transformers with heads of 128", [128, 128, 2, 128, 2], 1605),
    ring("sm90_d160_128", "SD 1.5's deeper levels: 64 keys, as registers allow", [160, 160, 2, 64, 2], 1250),
    ring("sm90_d512_128", "the VAE: half of the columns per block, the scores twice", [512, 256, 2, 64, 1], 2480),
    // Predicted: not half of the time, for nothing fills that of the exponentials.
    ring("sm90_d512_64", "as sm90_d512_128, for small pictures: twice the blocks", [512, 256, 1, 64, 1], 1500),
    windows("sm90_d40_192_windows", D40),
    windows("sm90_d64_192_windows", D64),
    short("sm90_d40_short", 40, 4),
    short("sm90_d64_short", 64, 4),
    short("sm90_d80_short", 80, 3),
    short("sm90_d128_short", 128, 2),
    short("sm90_d160_short", 160, 2),
];

impl Tile {
    fn variant(&self) -> Variant {
        Variant { name: self.name, reason: self.reason }
    }

    fn is_short(&self) -> bool {
        matches!(self.kind, Kind::Short { .. })
    }

    /// A second softmax is for the short ones, a second source of one softmax for the others.
    fn takes(&self, dims: &Dims) -> bool {
        let fits = match (self.kind, dims.windows) {
            (Kind::Windows { .. }, Some(windows)) => {
                !windows.around
                    && [windows.window, windows.unit].concat().iter().all(|size| size.is_multiple_of(BOX_SIDE))
            }
            (Kind::Windows { .. }, None) | (_, Some(_)) => false,
            (Kind::Ring { .. }, None) => dims.second.is_none_or(|second| second.weight.is_none()),
            (Kind::Short { .. }, None) => {
                let fits = |second: SecondDims| second.weight.is_some() && second.keys <= SECOND_KEYS;
                dims.keys <= SHORT_KEYS && dims.second.is_none_or(fits)
            }
        };
        self.head_dim == dims.head_dim && fits
    }

    /// `sizeof(AttentionShared)`: queries, the rings, the mbarriers; it is aligned to 1024. `sizeof(ShortShared)`: that, the
    /// second softmax's keys and values, their mbarrier.
    fn shared_bytes(&self) -> usize {
        let boxes = |columns: usize, rows: usize| columns.next_multiple_of(COLUMNS) * rows * 2;
        let queries = self.consumers * boxes(self.head_dim, ROWS);
        let ring = self.stages * (boxes(self.head_dim, self.keys) + boxes(self.columns, self.keys));
        let barriers = 8 * (2 * self.consumers + 4 * self.stages);
        let bytes = (queries + ring + barriers).next_multiple_of(1024);
        if self.is_short() { bytes + 2 * boxes(self.head_dim, SECOND_KEYS) + 1024 } else { bytes }
    }

    /// Tiles of queries.
    fn tiles(&self, dims: &Dims) -> usize {
        dims.queries.div_ceil(ROWS * self.consumers) * (self.head_dim / self.columns) * dims.heads * dims.n
    }

    /// Predicted duration of a kernel with a ring; those without are always the shorter ones.
    fn nanoseconds(&self, dims: &Dims, multiprocessors: usize) -> usize {
        let (Kind::Ring { key_tile_ns } | Kind::Windows { key_tile_ns }) = self.kind else { return 0 };
        let key_tiles = dims.keys.div_ceil(self.keys) + dims.second.map_or(0, |second| second.keys.div_ceil(self.keys));
        self.tiles(dims).div_ceil(multiprocessors) * key_tiles * key_tile_ns
    }
}

/// The tiles that some card has.
pub fn all() -> Vec<Variant> {
    TILES.iter().map(Tile::variant).collect()
}

/// Whether a variant of this name is one of these.
pub fn is_one(name: &str) -> bool {
    TILES.iter().any(|tile| tile.name == name)
}

/// Whether the kernels take these operands, heads and addresses of whole 16 bytes, as TMA wants them, without bias.
pub(super) fn takes(device: &CudaDevice, dtype: DType, dims: &Dims) -> bool {
    device.has(Isa::Sm90a) && dtype != DType::F32 && !dims.causal && TILES.iter().any(|tile| tile.takes(dims))
}

fn pick(dims: &Dims, multiprocessors: usize, asked: Option<&str>) -> Result<&'static Tile> {
    let what = || {
        let second = match dims.second {
            None => String::new(),
            Some(SecondDims { keys, weight: None, .. }) => format!(" and {keys} more"),
            Some(SecondDims { keys, .. }) => format!(" and {keys} of a second softmax"),
        };
        let windows = if dims.windows.is_some() { " in windows" } else { "" };
        format!("heads of {} with {} keys{second}{windows}", dims.head_dim, dims.keys)
    };
    let nanoseconds = |tile: &Tile| tile.nanoseconds(dims, multiprocessors);
    variants::pick(OP, asked, TILES.iter().filter(|tile| tile.takes(dims)), Tile::variant, what, nanoseconds)
}

/// `arguments`: as the portable kernel gets them. `asked`: a tile by its name.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument): the tile that is asked for is for other heads or fewer keys.
pub(super) fn attention(
    device: &CudaDevice,
    dtype: DType,
    dims: &Dims,
    arguments: AttentionArgs,
    asked: Option<&str>,
) -> Result<()> {
    let &Dims { n, images_per_kv, queries, keys, heads, head_dim, .. } = dims;
    let multiprocessors = device.multiprocessors();
    let tile = pick(dims, multiprocessors, asked)?;
    let element = dtype.size_bytes();
    let map = |base: DevicePtr, images: usize, tokens: usize, stride: i32, rows: usize| {
        let stride = stride as usize * element;
        if let Some(WindowDims { map: [h, w], count, .. }) = dims.windows {
            let dims = &[head_dim, heads, w, h, images / count];
            let strides_bytes = &[head_dim * element, stride, w * stride, h * w * stride];
            let view = TensorView { base, dtype, dims, strides_bytes };
            return TensorMap::tiled(device, view, &[COLUMNS, 1, BOX_SIDE, BOX_SIDE, 1], Swizzle::Bytes128);
        }
        let (dims, strides_bytes) =
            (&[head_dim, heads, tokens, images], &[head_dim * element, stride, tokens * stride]);
        let view = TensorView { base, dtype, dims, strides_bytes };
        TensorMap::tiled(device, view, &[COLUMNS, 1, rows, 1], Swizzle::Bytes128)
    };
    let q = map(arguments.q, n, queries, arguments.q_stride, ROWS)?;
    let k = map(arguments.k, n / images_per_kv, keys, arguments.kv_stride, tile.keys)?;
    let v = map(arguments.v, n / images_per_kv, keys, arguments.kv_stride, tile.keys)?;
    let [k2, v2] = match dims.second {
        None => [k, v],
        Some(SecondDims { keys, images_per_kv, .. }) => {
            let rows = if tile.is_short() { SECOND_KEYS } else { tile.keys };
            let map = |base| map(base, n / images_per_kv, keys, arguments.kv2_stride, rows);
            [map(arguments.k2)?, map(arguments.v2)?]
        }
    };
    let launch = if tile.is_short() {
        Launch::grid([queries.div_ceil(ROWS), heads, n]).block(128)
    } else {
        let tiles = super::tiles::count(OP, "tiles of queries", tile.tiles(dims))? as usize;
        Launch::grid([tiles.min(multiprocessors), 1, 1]).block(128 * (1 + tile.consumers))
    };
    let launch = launch.shared(tile.shared_bytes());
    let entry = entry(&format!("attention_{}", tile.name), dtype);
    // SAFETY: arguments as the entry has them; the maps end where the tensors end, whose shapes were checked; y is guarded.
    unsafe { device.launch("sm90/attention", &entry, launch, args![q, k, v, k2, v2, arguments]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dims(n: usize, heads: usize, [queries, keys]: [usize; 2], head_dim: usize) -> Dims {
        Dims {
            n,
            images_per_kv: 1,
            queries,
            keys,
            heads,
            head_dim,
            scale: 1.0,
            causal: false,
            second: None,
            images_per_bias: 1,
            windows: None,
        }
    }

    /// What was fastest when the prototype was measured on an H200; at 512 the one warpgroup is a prediction.
    #[test]
    fn tiles_by_shape() {
        for (dims, expected) in [
            (dims(1, 10, [1024, 1024], 64), "sm90_d64_128"),
            (dims(2, 10, [4096, 4096], 64), "sm90_d64_192"),
            (dims(2, 20, [1024, 1024], 64), "sm90_d64_192"),
            (dims(2, 20, [4096, 4096], 64), "sm90_d64_192"),
            (dims(2, 10, [16384, 16384], 64), "sm90_d64_192"),
            (dims(2, 10, [4096, 77], 64), "sm90_d64_short"),
            (dims(2, 10, [4096, 81], 64), "sm90_d64_192"),
            (dims(2, 8, [4096, 4096], 40), "sm90_d40_192"),
            (dims(2, 8, [4096, 80], 40), "sm90_d40_short"),
            (dims(2, 8, [1024, 1024], 80), "sm90_d80_128"),
            (dims(2, 8, [256, 256], 160), "sm90_d160_128"),
            (dims(2, 16, [4096, 4096], 128), "sm90_d128_128"),
            (dims(1, 1, [4096, 4096], 512), "sm90_d512_64"),
            (dims(1, 1, [16384, 16384], 512), "sm90_d512_128"),
            (dims(1, 1, [64, 64], 512), "sm90_d512_64"),
        ] {
            assert_eq!(pick(&dims, 132, None).unwrap().name, expected, "{dims:?}");
        }
    }

    #[test]
    fn a_second_source_has_its_tiles() {
        let with = |keys: usize, second: usize, weight: Option<f32>| {
            let second = Some(SecondDims { keys: second, images_per_kv: 1, weight });
            let dims = Dims { second, ..dims(2, 24, [4096, keys], 64) };
            TILES.iter().any(|tile| tile.takes(&dims)).then(|| pick(&dims, 132, None).unwrap().name)
        };
        assert_eq!(with(4096, 333, None), Some("sm90_d64_192"));
        assert_eq!(with(77, 4096, None), Some("sm90_d64_192"));
        assert_eq!(with(77, 16, Some(0.5)), Some("sm90_d64_short"));
        assert_eq!(with(77, 17, Some(0.5)), None);
        assert_eq!(with(4096, 16, Some(0.5)), None);
    }

    /// HiDiffusion's maps at 2048x2048 pixels, whole and pooled; one whose quarter windows are no whole boxes.
    #[test]
    fn windows_of_whole_boxes_have_their_tiles() {
        let with = |side: usize, head_dim: usize| {
            let (window, unit) = (side / 2, side / 8);
            let windows = Some(WindowDims {
                map: [side; 2],
                window: [window; 2],
                keys: [window; 2],
                around: false,
                unit: [unit; 2],
                count: 4,
            });
            let dims = Dims { windows, ..dims(8, 10, [window * window; 2], head_dim) };
            TILES.iter().any(|tile| tile.takes(&dims)).then(|| pick(&dims, 132, None).unwrap().name)
        };
        assert_eq!(with(128, 64), Some("sm90_d64_192_windows"));
        assert_eq!(with(64, 64), Some("sm90_d64_192_windows"));
        assert_eq!(with(128, 40), Some("sm90_d40_192_windows"));
        assert_eq!(with(96, 64), None);
        assert_eq!(with(128, 80), None);
    }

    #[test]
    fn a_tile_that_is_asked_for_is_taken_or_refused() {
        let asked = |keys, name| pick(&dims(1, 1, [64, keys], 64), 132, Some(name));
        assert_eq!(asked(70, "sm90_d64_192").unwrap().name, "sm90_d64_192");
        for (keys, name) in [(81, "sm90_d64_short"), (81, "sm90_d80_128")] {
            let error = asked(keys, name).unwrap_err().to_string();
            let expected = format!(
                "attention: MEGAFUSE_KERNEL is attention={name}, expected a variant that takes heads of 64 with 81 keys: \
                 sm90_d64_192, sm90_d64_128"
            );
            assert_eq!(error, expected);
        }
    }

    /// As the kernels' own table has them: `RING(d64_128, suffix, T, 64, 64, 2, 128, 3)`, `SHORT(d40_short, suffix, T, 40, 4)`.
    #[test]
    fn the_kernels_have_the_same_tiles() {
        let text = include_str!("../../../kernels/sm90/attention.cu");
        assert!(text.contains(&format!("constexpr int kBoxSide = {BOX_SIDE};")));
        assert!(text.contains(&format!("constexpr int kShortKeys = {SHORT_KEYS}, kSecondKeys = {SECOND_KEYS};")));
        let lines = text.lines().map(|line| line.trim().trim_end_matches('\\').trim_end());
        let theirs: Vec<&str> = lines
            .filter(|line| (line.starts_with("RING(") || line.starts_with("SHORT(")) && line.ends_with(')'))
            .collect();
        let ours = TILES.iter().map(|tile| {
            let Tile { name, head_dim, columns, consumers, keys, stages, .. } = tile;
            let name = name.strip_prefix("sm90_").unwrap();
            match tile.kind {
                Kind::Ring { .. } => {
                    format!("RING({name}, suffix, T, {head_dim}, {columns}, {consumers}, {keys}, {stages})")
                }
                Kind::Windows { .. } => {
                    format!("RING({name}, suffix, T, {head_dim}, {columns}, {consumers}, {keys}, {stages}, true)")
                }
                Kind::Short { blocks } => format!("SHORT({name}, suffix, T, {head_dim}, {blocks})"),
            }
        });
        assert_eq!(ours.collect::<Vec<_>>(), theirs);
    }

    /// 227 KiB for a block, 228 for a multiprocessor with 1 KiB of the system's for each block.
    #[test]
    fn tiles_fit_into_shared_memory() {
        for tile in &TILES {
            let blocks = if let Kind::Short { blocks } = tile.kind { blocks } else { 1 };
            let bytes = tile.shared_bytes();
            assert!(bytes <= 227 << 10 && blocks * (bytes + 1024) <= 228 << 10, "{tile:?}: {bytes}");
        }
    }
}
