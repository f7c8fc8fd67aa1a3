use std::collections::BTreeSet;

use super::StepIndex;
use crate::error::{Error, Result};
use crate::runtime::{DType, Device, Element, Tensor};

/// Rows of a table for the images of a batch, chosen by each image's step. Of every step the table has R conditioning rows
/// (1: the same for all; 2: of one negative prompt and one prompt; N: of every image's own). Of a batch of N images, image
/// i takes row `step[i mod n] * R + i / (N / R)`: R and n both divide N. Rows are read where they are, never copied.
#[derive(Clone, Copy, Debug)]
pub struct StepRows<'a> {
    /// `[steps * R, C]`
    pub table: &'a Tensor,
    pub step: &'a StepIndex,
    /// R, the conditioning rows of a step.
    pub rows: usize,
}

/// Columns of such rows: `width` from `first` on, where the op that takes them says what `width` is.
#[derive(Clone, Copy, Debug)]
pub struct StepColumns<'a> {
    /// The rows that they are of.
    pub rows: StepRows<'a>,
    /// The first column, in elements.
    pub first: usize,
}

impl StepColumns<'_> {
    /// As [`StepRows::check`], of a table that has at least the columns `first..first + width`.
    ///
    /// # Errors
    /// As there; [`Error::Shape`]: the table is narrower.
    pub(in crate::ops) fn check(
        &self,
        op: &'static str,
        arg: &'static str,
        images: usize,
        width: usize,
        dtype: DType,
        with: &Device,
    ) -> Result<()> {
        let table = self.rows.table;
        let [_, columns] = table.dims(op, arg)?;
        if width > columns || self.first > columns - width {
            let want = format!("columns {} to {} and more", self.first, self.first.saturating_add(width));
            return Err(Error::shape(op, arg, table, want));
        }
        self.rows.check(op, arg, images, columns, dtype, with)
    }

    /// The values of each of `images` images, in f32 on the cpu.
    pub(in crate::ops) fn cpu<T: Element>(&self, images: usize, width: usize) -> Vec<Vec<f32>> {
        let (table, columns) = (self.rows.table.cpu::<T>(), self.rows.table.shape()[1]);
        let of = |row: usize| table[row * columns + self.first..][..width].iter().map(|x| x.to_f32()).collect();
        self.rows.indices(images).map(of).collect()
    }

    /// Bytes of the rows that `images` images read, each row once.
    pub(in crate::ops) fn bytes(&self, images: usize, width: usize) -> u64 {
        let rows: BTreeSet<usize> = self.rows.indices(images).collect();
        (rows.len() * width * self.rows.table.dtype().size_bytes()) as u64
    }
}

impl StepRows<'_> {
    /// Fit for a batch of `images` images and `columns` channels? `arg`: what the op calls them.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: the table; [`Error::Argument`]: a step beyond it, R or n that
    /// does not divide the images.
    pub(in crate::ops) fn check(
        &self,
        op: &'static str,
        arg: &'static str,
        images: usize,
        columns: usize,
        dtype: DType,
        with: &Device,
    ) -> Result<()> {
        let [table_rows, _] = self.table.dims(op, arg)?;
        self.table.expect(op, arg, &[table_rows, columns], dtype, with)?;
        if !self.step.tensor().device().same(with) {
            let got = self.step.tensor().device().to_string();
            return Err(Error::Device { op, arg: "step", got, want: with.to_string() });
        }
        if self.rows == 0 || !images.is_multiple_of(self.rows) {
            let want = format!("1 or more that divide the {images} images of the batch");
            return Err(Error::argument(op, "conditioning rows", self.rows, want));
        }
        self.step.check_images(op, images)?;
        if table_rows % self.rows != 0 {
            let want = format!("a multiple of {} rows, those of each step", self.rows);
            return Err(Error::shape(op, arg, self.table, want));
        }
        if images > 0 && self.step.last() >= table_rows / self.rows {
            let want = format!("below {}, the steps that the table has", table_rows / self.rows);
            return Err(Error::argument(op, "step", self.step.last(), want));
        }
        Ok(())
    }

    /// The table's row of each of `images` images.
    pub(in crate::ops) fn indices(&self, images: usize) -> impl Iterator<Item = usize> {
        let images_per_row = images / self.rows;
        (0..images).map(move |image| self.step.get(image) * self.rows + image / images_per_row)
    }
}
