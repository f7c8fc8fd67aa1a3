//! What every relay through pictures does, whatever enlarges them, and where the run's own picture stands in place of the first
//! stage's.

use super::observer::check_finite;
use super::{Event, Sampling};
use crate::error::{Error, Result};
use crate::runtime::Tensor;

/// What a stage leaves to the next one.
pub(super) enum Left {
    /// Its clean samples, `[N, h, w, C]`.
    Samples(Tensor),
    /// The picture that the run begins from in their place, `[1, H, W, 3]`, for every image of the batch.
    Picture(Tensor),
}

impl Sampling<'_> {
    /// What the first stage leaves: the run's picture at the stage's size, dumped as `init0.picture`, where it begins from one,
    /// else what `make` makes. Draws nothing itself.
    ///
    /// # Errors
    /// Those of the device and of `make`.
    pub(super) fn first_stage(&mut self, make: impl FnOnce(&mut Self) -> Result<Tensor>) -> Result<Left> {
        let Some(picture) = self.model.start() else { return make(self).map(Left::Samples) };
        let pixels = picture.picture(self.run().stages()[0].size)?;
        self.dump_each("init0.picture", &vec![pixels.clone(); self.images()])?;
        Ok(Left::Picture(pixels))
    }

    /// Dumps what a stage leaves as `relay<to>.x0`, a picture not.
    ///
    /// # Errors
    /// Those of the observer.
    pub(super) fn dump_left(&mut self, to: usize, left: &Left) -> Result<()> {
        match left {
            Left::Samples(x0) => self.dump(&format!("relay{to}.x0"), x0),
            Left::Picture(_) => Ok(()),
        }
    }

    /// The clean samples that a stage leaves, of a picture the posterior's mode, dumped as `init0.encoded`.
    ///
    /// # Errors
    /// [`Error::Interrupted`](crate::Error::Interrupted); those of the model.
    pub(super) fn samples_left(&mut self, to: usize, left: &Left) -> Result<Tensor> {
        match left {
            Left::Samples(x0) => Ok(x0.clone()),
            Left::Picture(picture) => {
                self.begin(Event::EncodePicture { stage: to - 1 })?;
                let one = self.encode(std::slice::from_ref(picture), None)?;
                let encoded = Tensor::concat(&vec![one; self.images()])?;
                self.dump("init0.encoded", &encoded)?;
                Ok(encoded)
            }
        }
    }

    /// What the last stage leaves.
    ///
    /// # Errors
    /// [`Error::Config`]: a picture, which no stage has made anything of.
    pub(super) fn last_samples(&self, left: Left) -> Result<Tensor> {
        match left {
            Left::Samples(x) => Ok(x),
            Left::Picture(_) => Err(Error::config("stages", "none follows the one in whose place the picture stands")),
        }
    }

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
        enlarge: impl FnMut(Tensor, [usize; 2]) -> Result<Tensor>,
    ) -> Result<Vec<Tensor>> {
        let (from, size) = (self.run().stages()[to - 1].size, self.run().stages()[to].size);
        self.begin(Event::Relay { stage: to, from, to: size })?;
        let decoded = self.decode(x0)?;
        self.dump_each(&format!("relay{to}.decoded"), &decoded)?;
        for picture in &decoded {
            check_finite(picture, || format!("the decoded picture of the relay to stage {} ({size})", to + 1))?;
        }
        self.upsampled(to, decoded, enlarge)
    }

    /// The same of what a stage leaves: a picture is not decoded.
    ///
    /// # Errors
    /// As [`enlarged_pictures`](Sampling::enlarged_pictures).
    pub(super) fn enlarged_left(
        &mut self,
        to: usize,
        left: &Left,
        enlarge: impl FnMut(Tensor, [usize; 2]) -> Result<Tensor>,
    ) -> Result<Vec<Tensor>> {
        match left {
            Left::Samples(x0) => self.enlarged_pictures(to, x0, enlarge),
            Left::Picture(picture) => self.upsampled(to, vec![picture.clone(); self.images()], enlarge),
        }
    }

    fn upsampled(
        &mut self,
        to: usize,
        pictures: Vec<Tensor>,
        mut enlarge: impl FnMut(Tensor, [usize; 2]) -> Result<Tensor>,
    ) -> Result<Vec<Tensor>> {
        let size = self.run().stages()[to].size;
        self.begin(Event::RelayUpsample { stage: to })?;
        let enlarge = |picture| enlarge(picture, [size.height, size.width]);
        let enlarged = pictures.into_iter().map(enlarge).collect::<Result<Vec<_>>>()?;
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
