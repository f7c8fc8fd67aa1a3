//! The cpu device's side of the ops: vector math and the matrix product that linear and conv2d share.

pub mod gemm;
pub mod kernels;
pub mod math;
pub mod norm;
pub mod patches;

use std::marker::PhantomData;
use std::ops::Range;

use crate::runtime::{Element, Tensor};

/// The elements as f32: bias, gamma and the like, converted once per call.
pub fn to_f32<T: Element>(x: &Tensor) -> Vec<f32> {
    let mut values = vec![0.0; x.numel()];
    math::load(&mut values, x.cpu::<T>());
    values
}

/// A row-major `[rows, columns]` output that threads fill piece by piece.
pub struct OutputRows<'a, T> {
    first: *mut T,
    rows: usize,
    columns: usize,
    lifetime: PhantomData<&'a mut [T]>,
}

// SAFETY: stands for a `&mut [T]` that is divided among threads; `get` makes the caller promise disjoint pieces.
unsafe impl<T: Send> Sync for OutputRows<'_, T> {}

impl<'a, T> OutputRows<'a, T> {
    pub fn new(output: &'a mut [T], columns: usize) -> OutputRows<'a, T> {
        let rows = output.len().checked_div(columns).unwrap_or(0);
        OutputRows { first: output.as_mut_ptr(), rows, columns, lifetime: PhantomData }
    }

    /// A piece of one row.
    ///
    /// # Safety
    /// No two pieces that are alive at once overlap.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn get(&self, row: usize, columns: Range<usize>) -> &mut [T] {
        assert!(row < self.rows && columns.start <= columns.end && columns.end <= self.columns);
        // SAFETY: inside the output by the assertion; disjoint from the others by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(row * self.columns + columns.start), columns.len()) }
    }
}
