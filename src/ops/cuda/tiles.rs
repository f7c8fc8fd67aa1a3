//! The tile table of linear and conv2d (kernels/common/tiles.cuh) and who picks from it.
//!
//! Every variant makes the same bits: a sum runs over K in the same order whatever the tile (kernels/common/gemm.cuh), so
//! a choice may depend on the batch. Only a split sum has another order; [`splits`] therefore looks at one image alone.
//!
//! All figures here are arithmetic for an A100 or H100, not measurements.

use super::variants::{self, Variant};
use crate::error::{Error, Result};
use crate::runtime::DType;
use crate::runtime::cuda::CudaDevice;

/// Bytes of k in a row of a slice: `kRowChunks` of 16.
const SLICE_BYTES: usize = 64;

/// A block's work: `Tile` of kernels/common/gemm.cuh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    pub name: &'static str,
    /// What the tile is there for.
    reason: &'static str,
    /// Rows and columns of C.
    pub m: usize,
    pub n: usize,
    /// Warps down and across.
    warps: [usize; 2],
    /// Slots of the ring.
    stages: usize,
    /// Blocks a multiprocessor that registers and 164 KiB of shared memory (A100) have room for.
    blocks: usize,
    /// Takes any alignment and any K.
    general: bool,
}

const fn tile(
    name: &'static str,
    [m, n]: [usize; 2],
    warps: [usize; 2],
    stages: usize,
    blocks: usize,
    reason: &'static str,
) -> Tile {
    Tile { name, reason, m, n, warps, stages, blocks, general: false }
}

/// f16 and bf16. The larger a warp's part, the less shared memory a product reads: 64x64 in the first two.
static TILES_16_BIT: [Tile; 6] = [
    tile("128x256", [128, 256], [2, 4], 4, 1, "results that fill the card with its blocks: least traffic a product"),
    tile("128x128", [128, 128], [2, 2], 4, 2, "large results: two blocks a multiprocessor hide each other's waits"),
    tile("128x64", [128, 64], [2, 2], 4, 3, "narrow results, or too few blocks of the larger tiles"),
    tile("64x128", [64, 128], [2, 2], 4, 3, "few rows, or too few blocks of the larger tiles"),
    tile("64x64", [64, 64], [2, 2], 4, 4, "small results: most blocks"),
    Tile { general: true, ..tile("general", [64, 64], [2, 2], 2, 3, "operands that are not whole aligned chunks") },
];

/// f32, the parity mode.
static TILES_F32: [Tile; 3] = [
    tile("128x128", [128, 128], [4, 2], 3, 1, "large results"),
    tile("64x64", [64, 64], [2, 2], 3, 3, "small results: more blocks"),
    Tile { general: true, ..tile("general", [64, 64], [2, 2], 2, 3, "operands that are not whole aligned chunks") },
];

fn of_dtype(dtype: DType) -> &'static [Tile] {
    match dtype {
        DType::F32 => &TILES_F32,
        _ => &TILES_16_BIT,
    }
}

/// The tile of 16-bit operands that takes any alignment and any K.
pub fn general() -> &'static Tile {
    &TILES_16_BIT[5]
}

/// The tiles for operands of these dtypes.
pub fn variants(dtypes: &[DType]) -> Vec<Variant> {
    dtypes.iter().flat_map(|&dtype| of_dtype(dtype)).map(Tile::variant).collect()
}

impl Tile {
    fn variant(&self) -> Variant {
        Variant { name: self.name, reason: self.reason }
    }

    pub fn threads(&self) -> usize {
        32 * self.warps[0] * self.warps[1]
    }

    /// `sizeof(Tile::Shared)`: the ring, later the sums of 16 rows a warp.
    pub fn shared_bytes(&self) -> usize {
        let ring = self.stages * (self.m + self.n) * SLICE_BYTES;
        let rows = self.warps[0] * self.warps[1] * 16 * (self.n / self.warps[1] + 4) * size_of::<f32>();
        ring.max(rows)
    }

    /// Blocks for a result of m rows and n columns.
    pub fn blocks(&self, m: usize, n: usize) -> usize {
        m.div_ceil(self.m) * n.div_ceil(self.n)
    }

    /// Clocks of a multiprocessor for one slice of one block: the slowest of the arithmetic units, shared memory and L2.
    fn slice_clocks(&self, dtype: DType, card: Card) -> usize {
        let k = SLICE_BYTES / dtype.size_bytes();
        let arithmetic = self.m * self.n * k / card.products_a_clock(dtype);
        // Written once; every warp reads its rows of A and of B. 128 bytes a clock.
        let [warp_m, warp_n] = [self.m / self.warps[0], self.n / self.warps[1]];
        let read = self.warps[0] * self.warps[1] * (warp_m + warp_n) * SLICE_BYTES;
        let shared = ((self.m + self.n) * SLICE_BYTES + read) / 128;
        // cp.async passes the first-level cache by; L2 gives a multiprocessor about 32 bytes a clock when all of them ask.
        let l2 = (self.m + self.n) * SLICE_BYTES / 32;
        arithmetic.max(shared).max(l2)
    }

    /// Estimated clocks for the whole product.
    fn clocks(&self, dtype: DType, [m, n, k]: [usize; 3], card: Card) -> usize {
        // A block alone waits for its barrier and its fragments in every slice; others hide that.
        const LATENCY: usize = 100;
        // Start of the pipeline and the store of the tile, in slices.
        const ENDS: usize = 4;
        let slice = self.slice_clocks(dtype, card);
        let slices = (k * dtype.size_bytes()).div_ceil(SLICE_BYTES) + ENDS;
        let blocks = self.blocks(m, n).div_ceil(card.multiprocessors);
        let waves = blocks.div_ceil(self.blocks);
        slices * (blocks * slice).max(waves * (slice + LATENCY))
    }
}

/// What the choice of a tile needs to know of a card.
#[derive(Clone, Copy, Debug)]
pub struct Card {
    pub multiprocessors: usize,
    /// Compute capability 9.0 or later.
    pub hopper: bool,
}

impl Card {
    pub fn of(device: &CudaDevice) -> Card {
        Card { multiprocessors: device.multiprocessors(), hopper: device.compute_capability().0 >= 9 }
    }

    /// Multiply-accumulates of a multiprocessor: of mma.sync (on Hopper two thirds of what wgmma would do), of the FMA
    /// units.
    fn products_a_clock(self, dtype: DType) -> usize {
        match (dtype, self.hopper) {
            (DType::F32, false) => 64,
            (DType::F32, true) => 128,
            (_, false) => 1024,
            (_, true) => 1365,
        }
    }
}

/// What a product asks of its tile.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    pub op: &'static str,
    pub dtype: DType,
    /// Rows and columns of the result, terms of a sum.
    pub size: [usize; 3],
    /// All operands are whole 16-byte chunks, and aligned.
    pub chunks: bool,
    pub card: Card,
}

/// The tile with the fewest estimated clocks, or the one that `MEGAFUSE_KERNEL` names.
///
/// # Errors
/// [`Error::Argument`]: the tile that is named cannot take the operands; [`Error::Config`]: `MEGAFUSE_KERNEL` names none.
pub fn pick(product: &Product) -> Result<&'static Tile> {
    let tiles = of_dtype(product.dtype);
    let fits = |tile: &&Tile| tile.general || product.chunks;
    if let Some(name) = variants::asked(product.op)? {
        return tiles.iter().filter(fits).find(|tile| tile.name == name).ok_or_else(|| {
            let chunks = if product.chunks { "" } else { " that are not whole aligned 16-byte chunks" };
            let others: Vec<Variant> = tiles.iter().filter(fits).map(Tile::variant).collect();
            variants::refused(product.op, name, &format!("{} operands{chunks}", product.dtype), &others)
        });
    }
    let general = || tiles.iter().find(|tile| tile.general).unwrap_or(&tiles[0]);
    if !product.chunks {
        return Ok(general());
    }
    let clocks = |tile: &&Tile| tile.clocks(product.dtype, product.size, product.card);
    Ok(tiles.iter().filter(|tile| !tile.general).min_by_key(clocks).unwrap_or_else(general))
}

/// Parts of a convolution's sums that different blocks make, joined by a second launch; 1: no split.
///
/// The 16x16 and smaller images of a UNet have few tiles and long sums (8x8 pixels, 1280 outputs: 20 tiles of 64x64, and
/// K = 11520), and would leave most of a card idle. From one image's size alone, so that an image's bits do not depend
/// on the batch, and the same on every card: 256 blocks an image, for the two images of a guided step about the 528
/// blocks of 64x64 that an H100 holds at once. A part keeps at least 512 terms: below that the parts' way through memory
/// costs more than it brings.
pub fn splits(pixels: usize, outputs: usize, k: usize) -> usize {
    const BLOCKS: usize = 256;
    const TERMS: usize = 512;
    if let Some(splits) = variants::asked_splits() {
        return splits;
    }
    let tiles = (pixels.div_ceil(64) * outputs.div_ceil(64)).max(1);
    (BLOCKS / tiles).min(k / TERMS).max(1)
}

/// Bits of the kernels' `wide`: these rows are whole aligned chunks.
#[derive(Clone, Copy, Debug)]
pub struct Wide {
    pub x: bool,
    pub weight: bool,
    pub output: bool,
}

impl Wide {
    pub fn bits(self) -> i32 {
        i32::from(self.x) | i32::from(self.weight) << 1 | i32::from(self.output) << 2
    }
}

/// Values of a dtype in 16 bytes.
pub fn chunk(dtype: DType) -> usize {
    16 / dtype.size_bytes()
}

/// A size as the kernels count; they add tiles and slices to it.
pub fn count(op: &'static str, what: &'static str, value: usize) -> Result<i32> {
    const LIMIT: usize = i32::MAX as usize - (1 << 16);
    match i32::try_from(value) {
        Ok(small) if value <= LIMIT => Ok(small),
        _ => Err(Error::TooLarge { op, what, got: value as u128, limit: LIMIT as u128 }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CARD: Card = Card { multiprocessors: 132, hopper: true };

    fn picked(dtype: DType, size: [usize; 3]) -> &'static str {
        pick(&Product { op: "linear", dtype, size, chunks: true, card: CARD }).unwrap().name
    }

    #[test]
    fn large_results_take_large_tiles_and_small_ones_many_small_tiles() {
        assert_eq!(picked(DType::BF16, [262_144, 256, 2304]), "128x256");
        assert_eq!(picked(DType::BF16, [4096, 1280, 640]), "128x128");
        assert_eq!(picked(DType::BF16, [154, 1280, 768]), "64x64");
        assert_eq!(picked(DType::F32, [154, 320, 768]), "64x64");
        let unaligned = Product { op: "linear", dtype: DType::F16, size: [8192, 320, 36], chunks: false, card: CARD };
        assert_eq!(pick(&unaligned).unwrap().name, "general");
    }

    #[test]
    fn a_tile_that_is_asked_for_is_taken_or_refused() {
        let product = Product { op: "conv2d", dtype: DType::F16, size: [32768, 2560, 320], chunks: true, card: CARD };
        variants::with_variants("conv2d=64x128,conv2d.splits=3", || {
            assert_eq!((pick(&product)?.name, splits(4096, 320, 2880)), ("64x128", 3));
            assert_ne!(pick(&Product { op: "linear", ..product })?.name, "64x128");
            for (product, expected) in [
                (
                    Product { chunks: false, ..product },
                    "conv2d: MEGAFUSE_KERNEL is conv2d=64x128, expected a variant that takes f16 operands that are not \
                     whole aligned 16-byte chunks: general",
                ),
                (Product { dtype: DType::F32, ..product }, "takes f32 operands: 128x128, 64x64, general"),
            ] {
                let error = pick(&product).unwrap_err().to_string();
                assert!(error.ends_with(expected), "{error}");
            }
            Ok(())
        })
        .unwrap();
        assert_ne!(pick(&product).unwrap().name, "64x128");
        assert_eq!(splits(4096, 320, 2880), 1);
    }

    #[test]
    fn only_small_images_with_long_sums_are_split() {
        assert_eq!(splits(64, 1280, 11520), 12);
        assert_eq!(splits(256, 1280, 11520), 3);
        assert_eq!(splits(16, 1280, 2560), 5);
        assert_eq!(splits(1024, 640, 5760), 1);
        assert_eq!(splits(64, 64, 36), 1);
    }

    /// `ENTRY(128x64_##suffix, T, 3, 128, 64, 2, 2, 4, false)`: name, type, blocks, M, N, warps, stages, general.
    #[test]
    fn the_kernels_have_the_same_tiles() {
        let text = include_str!("../../../kernels/common/tiles.cuh");
        let (mut short, mut long) = (Vec::new(), Vec::new());
        for entry in text.split("    ENTRY(").skip(1) {
            let fields: Vec<&str> = entry.split_once(')').unwrap().0.split(", ").collect();
            let [name, _, _, rest @ ..] = &fields[..] else { panic!("{entry}") };
            let (name, kind) = name.split_once('_').unwrap();
            let list = if kind == "f32" { &mut long } else { &mut short };
            list.push(format!("{name} {}", rest.join(" ")));
        }
        let table = |tiles: &[Tile]| -> Vec<String> {
            let line = |tile: &Tile| {
                let Tile { name, m, n, warps: [down, across], stages, general, .. } = tile;
                format!("{name} {m} {n} {down} {across} {stages} {general}")
            };
            tiles.iter().map(line).collect()
        };
        assert_eq!(table(&TILES_16_BIT), short);
        assert_eq!(table(&TILES_F32), long);
    }

    #[test]
    fn tiles_fit_into_the_shared_memory_of_an_a100() {
        for tile in TILES_16_BIT.iter().chain(&TILES_F32) {
            assert!(tile.blocks * (tile.shared_bytes() + 1024) <= 164 * 1024, "{tile:?}");
        }
    }
}
