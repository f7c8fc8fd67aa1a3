//! Rows of a table by each image's step, as kernels read them: kernels/common/step_rows.cuh.

use super::tiles;
use crate::error::Result;
use crate::ops::{StepColumns, StepRows};
use crate::runtime::cuda::DevicePtr;

/// `StepRowsArgs` of step_rows.cuh.
#[derive(Clone, Copy, bytemuck::NoUninit)]
#[repr(C)]
pub(super) struct StepRowsArgs {
    table: DevicePtr,
    step: DevicePtr,
    stride: i32,
    images: i32,
    rows: i32,
    images_per_row: i32,
}

impl StepRowsArgs {
    /// No table, which no kernel reads.
    pub(super) const NONE: StepRowsArgs =
        StepRowsArgs { table: DevicePtr(0), step: DevicePtr(0), stride: 0, images: 1, rows: 1, images_per_row: 1 };

    /// Of a batch of `images` images, from the first column on.
    pub(super) fn new(op: &'static str, rows: &StepRows, images: usize) -> Result<StepRowsArgs> {
        let count = |what, value| tiles::count(op, what, value);
        Ok(StepRowsArgs {
            table: rows.table.cuda(),
            step: rows.step.tensor().cuda(),
            stride: count("columns of the table", rows.table.shape()[1])?,
            images: count("images with a step of their own", rows.step.images())?,
            rows: count("conditioning rows", rows.rows)?,
            images_per_row: count("N / conditioning rows", images / rows.rows)?,
        })
    }

    /// The same from another column on.
    pub(super) fn columns(op: &'static str, columns: &StepColumns, images: usize) -> Result<StepRowsArgs> {
        let whole = StepRowsArgs::new(op, &columns.rows, images)?;
        Ok(StepRowsArgs { table: address(columns), ..whole })
    }
}

/// Of the first row, where the columns begin.
fn address(columns: &StepColumns) -> DevicePtr {
    let table = columns.rows.table;
    DevicePtr(table.cuda().0 + (columns.first * table.dtype().size_bytes()) as u64)
}

/// Does each row begin at a multiple of 16 bytes?
pub(super) fn aligned_rows(columns: &StepColumns) -> bool {
    let table = columns.rows.table;
    address(columns).0.is_multiple_of(16) && (table.shape()[1] * table.dtype().size_bytes()).is_multiple_of(16)
}
