use super::variants::{self, Variant};
use super::{attention_sm90, entry, tiles};
use crate::error::{Error, Result};
use crate::ops::attention::{Dims, Operands, Part};
use crate::runtime::cuda::{CudaDevice, DevicePtr, Launch, args};
use crate::runtime::{DType, Tensor};

pub(super) const OP: &str = "attention";

/// The widest head that has a kernel.
const MAX_HEAD_DIM: usize = 512;

/// `AttentionArgs` of attention.cuh.
#[derive(Clone, Copy, Debug, bytemuck::NoUninit)]
#[repr(C)]
pub(super) struct AttentionArgs {
    pub y: DevicePtr,
    pub q: DevicePtr,
    pub k: DevicePtr,
    pub v: DevicePtr,
    pub k2: DevicePtr,
    pub v2: DevicePtr,
    bias: DevicePtr,
    shifts: DevicePtr,
    step: DevicePtr,
    images: i32,
    queries: i32,
    keys: i32,
    keys2: i32,
    heads: i32,
    head_dim: i32,
    pub q_stride: i32,
    pub kv_stride: i32,
    pub kv2_stride: i32,
    images_per_kv: i32,
    images_per_kv2: i32,
    images_per_bias: i32,
    map_h: i32,
    map_w: i32,
    window_h: i32,
    window_w: i32,
    unit_h: i32,
    unit_w: i32,
    key_h: i32,
    key_w: i32,
    shift_columns: i32,
    shift_images: i32,
    step_images: i32,
    causal: i32,
    apart: i32,
    scale: f32,
    weight2: f32,
    /// In place of padding.
    _end: u32,
}

/// One instantiation of a kernel of attention.cu.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tile {
    /// Part of the entry's name.
    name: &'static str,
    /// Heads up to this wide.
    head_dim: usize,
    /// Queries a block.
    rows: usize,
    threads: usize,
    shared_bytes: usize,
}

impl Tile {
    /// f16 and bf16, 4 warps: the queries and two stages of `keys` keys and values.
    const fn narrow(name: &'static str, head_dim: usize, rows: usize, keys: usize) -> Tile {
        Tile { name, head_dim, rows, threads: 128, shared_bytes: 2 * head_dim * (rows + 4 * keys) }
    }

    /// f32, chunks of `v_columns` columns of v or of 32 of q and k, and the weights.
    const fn f32(name: &'static str, head_dim: usize, v_columns: usize) -> Tile {
        let (qk, v) = (2 * 64 * 33, 64 * v_columns);
        let shared_bytes = 4 * (if qk > v { qk } else { v } + 64 * 65);
        Tile { name, head_dim, rows: 64, threads: 256, shared_bytes }
    }
}

/// f16 and bf16, not causal, heads and addresses of whole 16 bytes. The widths are those of the models that matter: 32
/// (pocket), 48 (SD 1.5's 40; a quarter less work than 64), 64 (SD 2.1, SDXL), 80 and 160 (SD 1.5's deeper levels), 128
/// (SD 3's kin). 32 keys a tile at 160, so that two stages leave a second block its shared memory.
const NARROW: [Tile; 6] = [
    Tile::narrow("d32", 32, 64, 64),
    Tile::narrow("d48", 48, 64, 64),
    Tile::narrow("d64", 64, 64, 64),
    Tile::narrow("d80", 80, 64, 64),
    Tile::narrow("d128", 128, 64, 64),
    Tile::narrow("d160", 160, 64, 32),
];

/// As [`NARROW`], 32 queries a warp instead of 16: half the shared memory traffic, which bounds the others, but half the
/// blocks and more registers.
const LONG: [Tile; 3] = [
    Tile::narrow("d48_long", 48, 128, 64),
    Tile::narrow("d64_long", 64, 128, 64),
    Tile::narrow("d80_long", 80, 128, 64),
];

/// f16 and bf16 of any width and alignment, causal or not, with bias, second source and windows or without: CLIP, T5, and models
/// for tests. All of that costs registers, so the others do without.
const ANY: [Tile; 5] = [
    Tile::narrow("d16_any", 16, 64, 64),
    Tile::narrow("d32_any", 32, 64, 64),
    Tile::narrow("d64_any", 64, 64, 64),
    Tile::narrow("d160_any", 160, 64, 32),
    WIDE,
];

/// Blocks that the long tiles need: about one for every multiprocessor of the largest cards. Counted in one image, whose
/// bits must not depend on the batch.
const LONG_BLOCKS: usize = 128;

/// One tile of 32 keys and values at 64 columns a warp, the eight terms of 32 * 32 scores, the weights, a factor a row.
const WIDE: Tile = Tile {
    name: "d512",
    head_dim: 512,
    rows: 32,
    threads: 256,
    shared_bytes: 2 * 2 * 32 * 512 + 8 * 4 * 32 * 32 + 2 * 32 * 32 + 4 * 32,
};

const F32: [Tile; 5] = [
    Tile::f32("d32", 32, 32),
    Tile::f32("d64", 64, 64),
    Tile::f32("d128", 128, 64),
    Tile::f32("d192", 192, 64),
    Tile::f32("d512", 512, 64),
];

/// The tiles for operands of these dtypes.
pub fn variants(dtypes: &[DType]) -> Vec<Variant> {
    let short: [(&[Tile], _); 3] = [
        (&NARROW, "heads of the models' widths"),
        (&LONG, "as without _long, for many queries: 32 a warp"),
        (&ANY, "heads of any width and alignment, causal, with bias, a second source or windows"),
    ];
    let long: [(&[Tile], _); 1] = [(&F32, "f32, the parity mode")];
    let of_dtype = |dtype: &DType| if *dtype == DType::F32 { &long[..] } else { &short[..] };
    let groups = dtypes.iter().flat_map(of_dtype);
    groups.flat_map(|&(tiles, reason)| tiles.iter().map(move |tile| Variant { name: tile.name, reason })).collect()
}

impl Tile {
    /// The tile for a head, or the one that `MEGAFUSE_KERNEL` names. `plain`: neither causal, bias, second source nor windows, and
    /// heads and addresses are whole 16 bytes.
    ///
    /// # Errors
    /// [`Error::Argument`]: there is none for so wide a head, or the one that is named cannot take it; [`Error::Config`]:
    /// `MEGAFUSE_KERNEL` names none.
    fn choose(dims: &Dims, plain: bool, dtype: DType) -> Result<Tile> {
        let fits = |tile: &&Tile| dims.head_dim <= tile.head_dim;
        let (narrow, long, any) = match (dtype, plain) {
            (DType::F32, _) => (&[][..], &[][..], &F32[..]),
            (_, true) => (&NARROW[..], &LONG[..], &ANY[..]),
            (_, false) => (&[][..], &[][..], &ANY[..]),
        };
        if let Some(name) = variants::asked(OP)? {
            let all = [narrow, long, any].concat();
            return all.iter().filter(fits).find(|tile| tile.name == name).copied().ok_or_else(|| {
                let others = variants(&[dtype]);
                let can = |variant: &&Variant| all.iter().filter(fits).any(|tile| tile.name == variant.name);
                let others: Vec<Variant> = others.iter().filter(can).copied().collect();
                let kind = if plain {
                    ""
                } else {
                    ", causal, biased, of two sources, in windows or not of whole aligned 16 bytes"
                };
                variants::refused(OP, name, &format!("{dtype} heads of {}{kind}", dims.head_dim), &others)
            });
        }
        // The first of the narrowest.
        let Some(tile) = narrow.iter().chain(any).filter(fits).min_by_key(|tile| tile.head_dim) else {
            return Err(Error::argument(OP, "head_dim", dims.head_dim, format!("at most {MAX_HEAD_DIM}")));
        };
        let long = long.iter().find(|long| long.head_dim == tile.head_dim);
        let long = long.filter(|long| dims.heads * dims.queries.div_ceil(long.rows) >= LONG_BLOCKS);
        Ok(*long.unwrap_or(tile))
    }
}

pub fn attention(device: &CudaDevice, operands: &Operands, dims: &Dims, y: &mut Tensor) -> Result<()> {
    let &Dims { n, images_per_kv, queries, keys, heads, head_dim, causal, second, .. } = dims;
    let dtype = y.dtype();
    let width = heads * head_dim;
    let address =
        |&Part { tensor, part, .. }: &Part| DevicePtr(tensor.cuda().0 + (part * width * dtype.size_bytes()) as u64);
    let stride = |part: &Part| (part.parts * width) as i32;
    let [k, v] = &operands.kv;
    let [k2, v2] = operands.second.as_ref().map_or([DevicePtr::NULL; 2], |[k, v]| [address(k), address(v)]);
    // Rows of a tile are addressed from its first in 32 bits.
    let map_tokens = dims.windows.map_or(0, |windows| windows.map[0] * windows.map[1]);
    let most = queries.max(keys).max(second.map_or(0, |second| second.keys)).max(map_tokens);
    let limit = i32::MAX as usize;
    for (what, got) in [("256 * L", 256 * most), ("128 * 3 * heads * head_dim", 128 * 3 * width)] {
        if got > limit {
            return Err(Error::TooLarge { op: OP, what, got: got as u128, limit: limit as u128 });
        }
    }
    let weight = second.and_then(|second| second.weight);
    let [map, window, unit] = dims.windows.map_or([[0; 2]; 3], |windows| [windows.map, windows.window, windows.unit]);
    let key_box = dims.windows.filter(|windows| windows.around).map_or([0; 2], |windows| windows.keys);
    let shifts = operands.shift.map_or(DevicePtr::NULL, |shift| {
        DevicePtr(shift.factors.cuda().0 + (shift.column * DType::U32.size_bytes()) as u64)
    });
    let arguments = AttentionArgs {
        y: y.cuda(),
        q: address(&operands.q),
        k: address(k),
        v: address(v),
        k2,
        v2,
        bias: DevicePtr::or_null(operands.bias),
        shifts,
        step: DevicePtr::or_null(operands.shift.map(|shift| shift.step.tensor())),
        images: tiles::count(OP, "images", n)?,
        queries: queries as i32,
        keys: keys as i32,
        keys2: second.map_or(0, |second| second.keys as i32),
        heads: heads as i32,
        head_dim: head_dim as i32,
        q_stride: stride(&operands.q),
        kv_stride: stride(k),
        kv2_stride: operands.second.as_ref().map_or(0, |[k, _]| stride(k)),
        images_per_kv: tiles::count(OP, "images of a row of kv", images_per_kv)?,
        images_per_kv2: second.map_or(1, |second| second.images_per_kv as i32),
        images_per_bias: dims.images_per_bias as i32,
        map_h: map[0] as i32,
        map_w: map[1] as i32,
        window_h: window[0] as i32,
        window_w: window[1] as i32,
        unit_h: unit[0] as i32,
        unit_w: unit[1] as i32,
        key_h: key_box[0] as i32,
        key_w: key_box[1] as i32,
        shift_columns: operands.shift.map_or(0, |shift| shift.factors.shape()[2] as i32),
        shift_images: operands.shift.map_or(1, |shift| shift.factors.shape()[1] as i32),
        step_images: operands.shift.map_or(1, |shift| shift.step.images() as i32),
        causal: i32::from(causal),
        apart: i32::from(weight.is_some()),
        scale: (std::f64::consts::LOG2_E * f64::from(dims.scale)) as f32,
        weight2: weight.unwrap_or(0.0),
        _end: 0,
    };
    let whole = (head_dim * dtype.size_bytes()).is_multiple_of(16)
        && [arguments.y, arguments.q, arguments.k, arguments.v, k2, v2].iter().all(|a| a.0.is_multiple_of(16));
    let asked = variants::asked(OP)?;
    let taken = whole && operands.bias.is_none() && attention_sm90::takes(device, dtype, dims);
    if taken && asked.is_none_or(attention_sm90::is_one) {
        return attention_sm90::attention(device, dtype, dims, arguments, asked);
    }
    let plain = whole && !causal && operands.bias.is_none() && second.is_none() && dims.windows.is_none();
    let tile = Tile::choose(dims, plain, dtype)?;
    let launch = Launch::grid([queries.div_ceil(tile.rows), heads, n]).block(tile.threads).shared(tile.shared_bytes);
    let entry = entry(&format!("attention_{}", tile.name), dtype);
    // SAFETY: the argument as the entry has it; the op checked that the tensors have the shapes that it describes, the kernel
    // guards what is outside them, and only y is written. What a kernel asks of addresses, `whole` has checked.
    unsafe { device.launch("attention", &entry, launch, args![arguments]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(queries: usize, heads: usize, head_dim: usize, plain: bool, dtype: DType) -> Option<&'static str> {
        let dims = Dims {
            n: 1,
            images_per_kv: 1,
            queries,
            keys: queries,
            heads,
            head_dim,
            scale: 1.0,
            causal: false,
            second: None,
            images_per_bias: 1,
            windows: None,
        };
        Tile::choose(&dims, plain, dtype).ok().map(|tile| tile.name)
    }

    #[test]
    fn tiles_by_shape() {
        assert_eq!(choose(4096, 8, 40, true, DType::BF16), Some("d48_long"));
        assert_eq!(choose(1024, 8, 80, true, DType::BF16), Some("d80"));
        assert_eq!(choose(256, 8, 160, true, DType::F16), Some("d160"));
        assert_eq!(choose(1 << 20, 8, 24, true, DType::F16), Some("d32"));
        assert_eq!(choose(1 << 20, 8, 8, true, DType::F16), Some("d16_any"));
        assert_eq!(choose(4096, 1, 512, true, DType::F16), Some("d512"));
        assert_eq!(choose(77, 12, 64, false, DType::F16), Some("d64_any"));
        assert_eq!(choose(1 << 20, 12, 64, false, DType::F16), Some("d64_any"));
        assert_eq!(choose(1, 1, 161, false, DType::F16), Some("d512"));
        assert_eq!(choose(4096, 1, 161, false, DType::F32), Some("d192"));
        for plain in [false, true] {
            assert_eq!(choose(1, 1, 513, plain, DType::F32), None);
            assert_eq!(choose(1, 1, 513, plain, DType::BF16), None);
        }
    }

    /// Two blocks of the models' tiles on a multiprocessor of sm_80 (164 KiB), and every tile on those of sm_86, sm_89
    /// and sm_120 (99 KiB).
    #[test]
    fn shared_memory_fits_every_card() {
        for tile in NARROW.into_iter().chain(LONG).chain(ANY).chain(F32) {
            assert!(tile.shared_bytes <= 99 * 1024, "{tile:?}");
            assert!(tile == WIDE || 2 * (tile.shared_bytes + 1024) <= 164 * 1024, "{tile:?}");
        }
    }
}
