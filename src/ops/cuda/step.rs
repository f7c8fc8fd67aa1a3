use crate::error::Result;
use crate::runtime::Tensor;
use crate::runtime::cuda::{CudaDevice, Launch, args};

pub fn advance(device: &CudaDevice, index: &mut Tensor) -> Result<()> {
    // SAFETY: the index is one u32.
    unsafe { device.launch("step", "advance_step", Launch::grid([1, 1, 1]).block(1), args![index.cuda()]) }
}
