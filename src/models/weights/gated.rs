//! Gated projections that a file holds as two.

use half::{bf16, f16};
use rayon::prelude::*;

use super::Weights;
use super::repack::Layout;
use crate::error::Result;
use crate::runtime::{DType, Device, Element, Tensor};

impl Weights<'_> {
    /// Values and gates of a gated projection, each `[n, columns]` in the file, as interleaved rows value 0, gate 0, value 1, ...:
    /// `[2 * n, columns]`.
    ///
    /// # Errors
    /// As [`tensor`](Weights::tensor).
    pub fn gated(&self, values: &str, gates: &str, n: usize, columns: usize) -> Result<Tensor> {
        let sources = self.take_all(&[values, gates], n, Some(columns))?;
        let shape = [2 * n, columns];
        if let Device::Meta(_) = self.device() {
            return Tensor::uninit(self.device(), &shape, self.dtype());
        }
        let stacked = self.build_on_host(&shape, &sources, Layout::Same)?;
        let mut tensor = Tensor::uninit(stacked.device(), &shape, self.dtype())?;
        match self.dtype() {
            DType::F32 => interleave::<f32>(&stacked, &mut tensor, shape),
            DType::F16 => interleave::<f16>(&stacked, &mut tensor, shape),
            DType::BF16 => interleave::<bf16>(&stacked, &mut tensor, shape),
            DType::U32 | DType::F8E4M3 => unreachable!("build_on_host has refused these"),
        }
        tensor.to_device(self.device())
    }
}

/// Row `r` of `to` is row `r / 2` of the first half of `from`, or of the second for odd `r`.
fn interleave<T: Element>(from: &Tensor, to: &mut Tensor, [rows, columns]: [usize; 2]) {
    let from = from.cpu::<T>();
    to.cpu_mut::<T>().par_chunks_mut(columns.max(1)).enumerate().for_each(|(row, to)| {
        let source = row / 2 + row % 2 * (rows / 2);
        to.copy_from_slice(&from[source * columns..][..columns]);
    });
}
