use std::sync::Mutex;

use super::MmditConfig;
use crate::error::{Error, Result};
use crate::models::weights::Weights;
use crate::runtime::{DType, Device, Tensor};

/// The stored table of positions, of which a picture's are the middle. Esser et al. 2024, arXiv:2403.03206, app. B.1.
pub(super) struct Positions {
    /// `[side * side, C]` in host memory: at 1024 x 1024 pixels a picture has an eighth of it or less. `None` on the meta device.
    table: Option<Tensor>,
    side: usize,
    width: usize,
    dtype: DType,
    /// Those asked for so far, `[N, h, w, C]` each. None of them is ever left: recorded steps read them.
    made: Mutex<Vec<Tensor>>,
}

impl Positions {
    pub(super) fn load(w: &Weights, config: &MmditConfig) -> Result<Positions> {
        let (side, width) = (config.pos_embed_max_size, config.width());
        let table = w.host_tensor("pos_embed", &[1, side * side, width])?;
        let table = table.map(|table| table.reshape(&[side * side, width])).transpose()?;
        Ok(Positions { table, side, width, dtype: w.dtype(), made: Mutex::default() })
    }

    /// For `n` samples of h x w patches, `[n, h, w, C]` on `device`.
    ///
    /// # Errors
    /// [`Error::Argument`]: more patches along a side than the table has; [`Error::OutOfMemory`].
    pub(super) fn of(&self, n: usize, [h, w]: [usize; 2], device: &Device) -> Result<Tensor> {
        for (arg, patches) in [("height in patches", h), ("width in patches", w)] {
            if patches > self.side {
                let want = format!("at most {}, the model's pos_embed_max_size: ask for a smaller picture", self.side);
                return Err(Error::argument("mmdit", arg, patches, want));
            }
        }
        // A panic while the list was held leaves whole tensors behind.
        let mut made = self.made.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(known) = made.iter().find(|known| known.shape() == [n, h, w, self.width]) {
            return Ok(known.clone());
        }
        let cropped = self.cropped(n, [h, w], device)?;
        made.push(cropped.clone());
        Ok(cropped)
    }

    fn cropped(&self, n: usize, [h, w]: [usize; 2], device: &Device) -> Result<Tensor> {
        let shape = [n, h, w, self.width];
        let Some(table) = &self.table else { return Tensor::uninit(device, &shape, self.dtype) };
        let [top, left] = [h, w].map(|patches| (self.side - patches) / 2);
        let row = |row: usize| table.rows((top + row) * self.side + left..(top + row) * self.side + left + w);
        let rows = (0..n).flat_map(|_| (0..h).map(row)).collect::<Result<Vec<_>>>()?;
        Tensor::concat(&rows)?.to_device(device)?.reshape(&shape)
    }
}
