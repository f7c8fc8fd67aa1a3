use super::StepIndex;
use crate::error::{Error, Result};
use crate::runtime::{DType, Device, Tensor};

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

impl StepRows<'_> {
    /// Fit for a batch of `images` images and `columns` channels?
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: the table; [`Error::Argument`]: a step beyond it, R or n that
    /// does not divide the images.
    pub(in crate::ops) fn check(
        &self,
        op: &'static str,
        images: usize,
        columns: usize,
        dtype: DType,
        with: &Device,
    ) -> Result<()> {
        let [table_rows, _] = self.table.dims(op, "row")?;
        self.table.expect(op, "row", &[table_rows, columns], dtype, with)?;
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
            return Err(Error::shape(op, "row", self.table, want));
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
