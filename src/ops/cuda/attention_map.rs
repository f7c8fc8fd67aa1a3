//! Launches of kernels/attention_map.cu.

use super::{aligned, entry, int};
use crate::error::Result;
use crate::ops::attention_map::Dims;
use crate::runtime::Tensor;
use crate::runtime::cuda::{CudaDevice, Launch, args};

/// Threads a block, and what a block of `blend_attention_map` has: `kThreads`, `kQueries` and `kChannels` of attention_map.cu.
const THREADS: usize = 256;
const QUERIES: usize = 32;
const CHANNELS: usize = 64;
/// `kVector` of common/vector.cuh.
const VECTOR: usize = 8;

pub fn attention_map(
    device: &CudaDevice,
    q: &Tensor,
    kv: &Tensor,
    dims: &Dims,
    map: &mut Tensor,
    adds: bool,
) -> Result<()> {
    const OP: &str = "attention_map";
    let vector = dims.head_dim.is_multiple_of(VECTOR) && aligned(q) && aligned(kv);
    let (queries, keys) = (int(OP, "queries", dims.queries)?, int(OP, "keys", dims.keys)?);
    let (heads, head_dim) = (int(OP, "heads", dims.heads)?, int(OP, "head_dim", dims.head_dim)?);
    let (images, count) = (int(OP, "images of a row", dims.images)?, dims.n * dims.queries);
    // SAFETY: arguments as the entry has them; q and the map have `count` queries, kv a row for every `images` of their images.
    unsafe {
        device.launch(
            OP,
            &entry(OP, q.dtype()),
            Launch::grid([count.div_ceil(THREADS / 32), 1, 1]).block(THREADS),
            args![
                map.cuda(),
                q.cuda(),
                kv.cuda(),
                queries,
                keys,
                heads,
                head_dim,
                images,
                dims.scale(),
                i32::from(adds),
                i32::from(vector),
                count as i64
            ],
        )
    }
}

pub fn blend(
    device: &CudaDevice,
    x: &Tensor,
    map: &Tensor,
    kv: &Tensor,
    dims: &Dims,
    weight: f32,
    y: &mut Tensor,
) -> Result<()> {
    const OP: &str = "blend_attention_map";
    let (queries, keys) = (int(OP, "queries", dims.queries)?, int(OP, "keys", dims.keys)?);
    let channels = dims.heads * dims.head_dim;
    let grid = [dims.queries.div_ceil(QUERIES), channels.div_ceil(CHANNELS), dims.n];
    let (channels, images) = (int(OP, "channels", channels)?, int(OP, "images of a row", dims.images)?);
    // SAFETY: arguments as the entry has them; x and y have as many queries as the map, of as many channels as kv's values.
    unsafe {
        device.launch(
            "attention_map",
            &entry(OP, y.dtype()),
            Launch::grid(grid).block(THREADS),
            args![y.cuda(), x.cuda(), map.cuda(), kv.cuda(), queries, keys, channels, images, weight],
        )
    }
}
