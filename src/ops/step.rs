use super::Tensor;
use crate::error::{Error, Result};
use crate::runtime::{DType, Device, OpKind, Work};

/// Which step of a run is next, on the host and on the device: kernels read the device's, so that work recorded in a graph
/// finds the right row of every table at each replay.
#[derive(Debug)]
pub struct StepIndex {
    host: usize,
    /// `[1]`, u32
    device: Tensor,
}

impl StepIndex {
    /// # Errors
    /// [`Error::TooLarge`]; [`Error::OutOfMemory`].
    pub fn new(device: &Device, step: usize) -> Result<StepIndex> {
        let device = Tensor::from_u32(device, &[1], &[as_u32(step)?])?;
        Ok(StepIndex { host: step, device })
    }

    pub fn get(&self) -> usize {
        self.host
    }

    /// `[1]`, u32, on the device.
    pub fn tensor(&self) -> &Tensor {
        &self.device
    }

    /// # Errors
    /// [`Error::TooLarge`]; [`Error::Driver`].
    pub fn set(&mut self, step: usize) -> Result<()> {
        self.device = Tensor::from_u32(self.device.device(), &[1], &[as_u32(step)?])?;
        self.host = step;
        Ok(())
    }

    /// To the next step; on a card by a kernel, after the work launched before.
    ///
    /// # Errors
    /// [`Error::Driver`]
    pub fn advance(&mut self) -> Result<()> {
        match self.device.device().clone() {
            Device::Meta(meta) => {
                let work = Work { macs: 0, flops: 0, bytes: 8, launches: 1 };
                meta.record("advance_step", OpKind::Elementwise, &[1], work);
            }
            Device::Cpu(_) => self.device = Tensor::from_u32(self.device.device(), &[1], &[as_u32(self.host + 1)?])?,
            Device::Cuda(cuda) => super::cuda::step::advance(&cuda, &mut self.device)?,
        }
        self.host += 1;
        Ok(())
    }

    /// Tells the host of an [`advance`](StepIndex::advance) that a replay did on the device.
    pub fn replayed(&mut self) {
        self.host += 1;
    }
}

fn as_u32(step: usize) -> Result<u32> {
    let limit = u128::from(u32::MAX);
    u32::try_from(step).map_err(|_| Error::TooLarge { op: "StepIndex", what: "step", got: step as u128, limit })
}

/// Rows of a table for the images of a batch, chosen by the step: `step * N .. (step + 1) * N`.
#[derive(Clone, Copy, Debug)]
pub struct StepRows<'a> {
    /// `[steps * N, C]`
    pub table: &'a Tensor,
    pub step: &'a StepIndex,
}

impl StepRows<'_> {
    /// `[images, columns]` of the current step.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: the table; [`Error::Argument`]: a step beyond it.
    pub(super) fn check(
        &self,
        op: &'static str,
        images: usize,
        columns: usize,
        dtype: DType,
        with: &Device,
    ) -> Result<()> {
        let [rows, _] = self.table.dims(op, "row")?;
        self.table.expect(op, "row", &[rows, columns], dtype, with)?;
        if images == 0 {
            return Ok(());
        }
        if rows % images != 0 {
            let want = format!("a multiple of {images} rows, the images of each step");
            return Err(Error::shape(op, "row", self.table, want));
        }
        if self.step.get() >= rows / images {
            let want = format!("below {}, the steps that the table has", rows / images);
            return Err(Error::argument(op, "step", self.step.get(), want));
        }
        if !self.step.tensor().device().same(with) {
            let got = self.step.tensor().device().to_string();
            return Err(Error::Device { op, arg: "step", got, want: with.to_string() });
        }
        Ok(())
    }

    /// The rows of the current step: `[images, C]`.
    pub(super) fn current(&self, images: usize) -> Result<Tensor> {
        let first = self.step.get() * images;
        self.table.rows(first..first + images)
    }
}
