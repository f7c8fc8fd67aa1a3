use super::HISTORY;
use crate::error::{Error, Result};
use crate::runtime::{DType, Tensor};

/// The sample on its way, the clean sample of the latest step, and what later steps need of earlier ones.
#[derive(Debug)]
pub struct SampleState {
    pub(super) x: Tensor,
    pub(super) x0: Tensor,
    /// `[depth, N, H, W, C]`, f32, the latest first.
    pub(super) history: Option<Tensor>,
}

impl SampleState {
    /// `x: [N, H, W, C]`, f32, that nobody else holds: steps overwrite it. `x0` is unspecified before the first.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Dtype`]: `x`; [`Error::Argument`]: it is shared; [`Error::OutOfMemory`].
    pub fn new(x: Tensor) -> Result<SampleState> {
        SampleState::with_history(x, 0)
    }

    /// The same with room for `depth` earlier values, at first all 0: [`StepTable::history`](super::StepTable::history). A sampler that starts anew
    /// takes a new state.
    ///
    /// # Errors
    /// As [`new`](SampleState::new).
    pub fn with_history(x: Tensor, depth: usize) -> Result<SampleState> {
        const OP: &str = "SampleState";
        x.dims::<4>(OP, "x")?;
        x.expect(OP, "x", x.shape(), DType::F32, x.device())?;
        if !x.is_unshared() {
            return Err(Error::argument(OP, "x", "shared", "a tensor that nobody else holds"));
        }
        if depth > HISTORY {
            return Err(Error::argument(OP, "depth", depth, format!("at most {HISTORY}")));
        }
        let history = match depth {
            0 => None,
            _ => Some(Tensor::zeros(x.device(), &[&[depth], x.shape()].concat(), DType::F32)?),
        };
        let x0 = Tensor::uninit(x.device(), x.shape(), DType::F32)?;
        Ok(SampleState { x, x0, history })
    }

    /// Other samples of the same shape, in the same place. What the history holds is left: the first evaluation gives it the
    /// weight 0, and what has that weight is not read.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: `x`; [`Error::Driver`].
    pub fn restart(&mut self, x: &Tensor) -> Result<()> {
        self.x.copy_from(x)
    }

    /// Does nobody else hold the samples?
    pub fn is_unshared(&self) -> bool {
        self.x.is_unshared() && self.x0.is_unshared()
    }

    pub fn x(&self) -> &Tensor {
        &self.x
    }

    /// The samples, for what changes them between steps.
    pub fn x_mut(&mut self) -> &mut Tensor {
        &mut self.x
    }

    pub fn x0(&self) -> &Tensor {
        &self.x0
    }

    /// The clean samples of the latest step, for what changes them between steps.
    pub fn x0_mut(&mut self) -> &mut Tensor {
        &mut self.x0
    }

    /// `(x, x0)`
    pub fn into_parts(self) -> (Tensor, Tensor) {
        (self.x, self.x0)
    }

    /// Earlier values that there is room for.
    pub fn depth(&self) -> usize {
        self.history.as_ref().map_or(0, |history| history.shape()[0])
    }

    /// `(x, x0, history)`, for the kernel that overwrites them.
    pub(in crate::ops) fn parts_mut(&mut self) -> (&mut Tensor, &mut Tensor, Option<&mut Tensor>) {
        (&mut self.x, &mut self.x0, self.history.as_mut())
    }
}
