//! What every relay through pictures does, whatever enlarges them.

use super::observer::check_finite;
use super::{Event, Sampling};
use crate::error::Result;
use crate::runtime::Tensor;

impl Sampling<'_> {
    /// A relay to stage `to` begins: the pictures of clean samples `x0`, `[N, h, w, C]`, each as `enlarge` makes it for the
    /// stage's height and width. Dumped as `relay<to>.decoded` and `.upsampled`.
    ///
    /// # Errors
    /// [`Error::Interrupted`](crate::Error::Interrupted); [`Error::NonFinite`](crate::Error::NonFinite): a decoded picture;
    /// those of the model and of `enlarge`.
    pub(super) fn enlarged_pictures(
        &mut self,
        to: usize,
        x0: &Tensor,
        mut enlarge: impl FnMut(Tensor, [usize; 2]) -> Result<Tensor>,
    ) -> Result<Vec<Tensor>> {
        let (from, size) = (self.run().stages()[to - 1].size, self.run().stages()[to].size);
        self.begin(Event::Relay { stage: to, from, to: size })?;
        let decoded = self.decode(x0)?;
        self.dump_each(&format!("relay{to}.decoded"), &decoded)?;
        for picture in &decoded {
            check_finite(picture, || format!("the decoded picture of the relay to stage {} ({size})", to + 1))?;
        }
        self.begin(Event::RelayUpsample { stage: to })?;
        let enlarge = |picture| enlarge(picture, [size.height, size.width]);
        let enlarged = decoded.into_iter().map(enlarge).collect::<Result<Vec<_>>>()?;
        self.dump_each(&format!("relay{to}.upsampled"), &enlarged)?;
        Ok(enlarged)
    }

    /// The clean samples of the enlarged pictures, `[N, h, w, C]`: the posterior's mode, or with `sampled`, which draws, a
    /// sample of it. Dumped as `relay<to>.encoded`.
    ///
    /// # Errors
    /// [`Error::Interrupted`](crate::Error::Interrupted); those of the model.
    pub(super) fn encoded_pictures(&mut self, to: usize, pictures: &[Tensor], sampled: bool) -> Result<Tensor> {
        self.begin(Event::RelayEncode { stage: to })?;
        let noise = match sampled {
            true => Some(self.draw(self.sample_shape(self.run().stages()[to].size))?),
            false => None,
        };
        let encoded = self.encode(pictures, noise.as_ref())?;
        self.dump(&format!("relay{to}.encoded"), &encoded)?;
        Ok(encoded)
    }
}
