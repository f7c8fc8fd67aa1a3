use super::{aligned, entry, int};
use crate::error::Result;
use crate::runtime::Tensor;
use crate::runtime::cuda::{CudaDevice, Launch, args};

/// `kThreads` and `kVector` of embedding.cu.
const THREADS: usize = 128;
const VECTOR: usize = 8;

/// `ids`: all below the table's rows.
pub fn embedding(device: &CudaDevice, ids: &Tensor, table: &Tensor, positions: &Tensor, y: &mut Tensor) -> Result<()> {
    let [n, l, c] = y.dims("embedding", "y")?;
    let vector = c.is_multiple_of(VECTOR) && [table, positions, y].into_iter().all(aligned);
    let (length, channels) = (int("embedding", "L", l)?, int("embedding", "C", c)?);
    let entry = entry("embedding", y.dtype());
    let launch = Launch::grid([n * l, 1, 1]).block(THREADS);
    // SAFETY: arguments as the entry has them; the ids are rows of the table, and there are positions for L tokens.
    unsafe {
        device.launch(
            "embedding",
            &entry,
            launch,
            args![y.cuda(), ids.cuda(), table.cuda(), positions.cuda(), length, channels, i32::from(vector)],
        )
    }
}
