use crate::error::{Error, Result};
use crate::ops::{cuda, profile};
use crate::runtime::{DType, Device, OpKind, Tensor, Work};

/// Which step of a run each of n images takes next, on the host and on the device: kernels read the device's, so that work
/// recorded in a graph finds the right row of every table at each replay. A batch of k n images is k times the n images in
/// their order (with classifier-free guidance: all unconditional, then all conditional), so its image i takes step i mod n.
///
/// An image has ended when it has taken its last step: it stays at that step, [`sampler_step`](crate::ops::sampler_step) leaves
/// its samples as they are, and what is computed for it is not read.
#[derive(Debug)]
pub struct StepIndex {
    /// Of each image, at least one.
    images: Vec<ImageStep>,
    /// Of a table: its steps, beyond which no image goes.
    end: Option<usize>,
    /// `[2, n]`, u32: of each image its step, then of each what is left.
    device: Tensor,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct ImageStep {
    step: usize,
    /// How many steps it still takes, this one included; 0: it has ended.
    left: usize,
}

impl ImageStep {
    /// For an index without an end.
    const FOREVER: usize = u32::MAX as usize;

    fn next(self) -> ImageStep {
        ImageStep { step: self.step + usize::from(self.left > 1), left: self.left.saturating_sub(1) }
    }
}

impl StepIndex {
    /// The steps of n images, each its own; no image ends.
    ///
    /// # Errors
    /// [`Error::Argument`]: no steps; [`Error::TooLarge`]; [`Error::OutOfMemory`].
    pub fn new(device: &Device, steps: &[usize]) -> Result<StepIndex> {
        StepIndex::ending(device, steps, None)
    }

    /// One step for all images of a batch.
    ///
    /// # Errors
    /// [`Error::TooLarge`]; [`Error::OutOfMemory`].
    pub fn one(device: &Device, step: usize) -> Result<StepIndex> {
        StepIndex::new(device, &[step])
    }

    pub(super) fn ending(device: &Device, steps: &[usize], end: Option<usize>) -> Result<StepIndex> {
        if steps.is_empty() {
            return Err(Error::argument("StepIndex", "steps", 0, "one for each image, at least one"));
        }
        let device = Tensor::uninit(device, &[2, steps.len()], DType::U32)?;
        let mut index = StepIndex { images: vec![ImageStep { step: 0, left: 0 }; steps.len()], end, device };
        index.set(steps)?;
        Ok(index)
    }

    /// The images with a step of their own, n.
    pub fn images(&self) -> usize {
        self.images.len()
    }

    /// The step of image `image` of a batch, whose images 0, n, 2 n, ... are the same one: its last step when it has ended.
    pub fn get(&self, image: usize) -> usize {
        self.images[image % self.images.len()].step
    }

    /// Has this image taken its last step?
    pub fn has_ended(&self, image: usize) -> bool {
        self.images[image % self.images.len()].left == 0
    }

    /// The largest of the images' steps.
    pub fn last(&self) -> usize {
        self.images.iter().map(|image| image.step).max().unwrap_or(0)
    }

    /// `[2, n]`, u32, on the device: the steps, then what is left.
    pub fn tensor(&self) -> &Tensor {
        &self.device
    }

    /// Every image goes on from its step to the table's end, if there is one; a step at the end: the image has ended. The
    /// index on a card stays where it is, so recorded work reads the new steps.
    ///
    /// # Errors
    /// [`Error::Argument`]: other than n steps, a step beyond the end; [`Error::TooLarge`]; [`Error::Driver`].
    pub fn set(&mut self, steps: &[usize]) -> Result<()> {
        self.one_per_image("steps", steps)?;
        let of = |&step: &usize| match self.end {
            None => Ok(ImageStep { step, left: ImageStep::FOREVER }),
            Some(end) if step <= end => Ok(ImageStep { step: step.min(end - 1), left: end - step }),
            Some(end) => {
                Err(Error::argument("StepIndex", "step", step, format!("at most {end}, the steps of the table")))
            }
        };
        let images = steps.iter().map(of).collect::<Result<_>>()?;
        self.write(images)
    }

    /// How many steps every image still takes from where it is, this one included. 0: it takes none and stays, so that the
    /// others advance without it.
    ///
    /// # Errors
    /// [`Error::Argument`]: other than n numbers, more than the table has; [`Error::Driver`].
    pub fn set_left(&mut self, left: &[usize]) -> Result<()> {
        self.one_per_image("left", left)?;
        let of = |(image, &left): (&ImageStep, &usize)| {
            let most = self.end.map_or(ImageStep::FOREVER, |end| end - image.step);
            if left > most {
                return Err(Error::argument(
                    "StepIndex",
                    "left",
                    left,
                    format!("at most {most} from step {}", image.step),
                ));
            }
            Ok(ImageStep { left, ..*image })
        };
        let images = self.images.iter().zip(left).map(of).collect::<Result<_>>()?;
        self.write(images)
    }

    pub(in crate::ops) fn check_images(&self, op: &'static str, images: usize) -> Result<()> {
        if images.is_multiple_of(self.images()) {
            return Ok(());
        }
        let want = format!("a number that divides the {images} images of the batch");
        Err(Error::argument(op, "images with a step of their own", self.images(), want))
    }

    fn one_per_image(&self, arg: &'static str, values: &[usize]) -> Result<()> {
        if values.len() == self.images() {
            return Ok(());
        }
        let want = format!("{}, one for each image of the index", self.images());
        Err(Error::argument("StepIndex", arg, values.len(), want))
    }

    fn write(&mut self, images: Vec<ImageStep>) -> Result<()> {
        write_images(&mut self.device, &images)?;
        self.images = images;
        Ok(())
    }

    /// Every image that has not ended to its next step; on a card by one launch, after the work launched before.
    ///
    /// # Errors
    /// [`Error::TooLarge`]; [`Error::Driver`]
    pub fn advance(&mut self) -> Result<()> {
        const OP: &str = "advance_step";
        let n = self.images();
        let next: Vec<ImageStep> = self.images.iter().map(|image| image.next()).collect();

        let _timed = profile::scope(OP, &[n]);
        match self.device.device().clone() {
            Device::Meta(meta) => {
                let bytes = 2 * self.device.bytes();
                meta.record(OP, OpKind::Elementwise, &[n], Work { macs: 0, flops: 0, bytes, launches: 1 });
            }
            Device::Cpu(_) => write_images(&mut self.device, &next)?,
            Device::Cuda(card) => cuda::step::advance(&card, n, &mut self.device)?,
        }
        self.images = next;
        Ok(())
    }

    /// Tells the host of an [`advance`](StepIndex::advance) that a replay did on the device.
    pub fn replayed(&mut self) {
        self.images.iter_mut().for_each(|image| *image = image.next());
    }
}

/// To an index's `[2, n]` on the device: the steps, then what is left.
fn write_images(device: &mut Tensor, images: &[ImageStep]) -> Result<()> {
    let (steps, left): (Vec<usize>, Vec<usize>) = images.iter().map(|image| (image.step, image.left)).unzip();
    device.write_u32(&as_u32(&[steps, left].concat())?)
}

fn as_u32(steps: &[usize]) -> Result<Vec<u32>> {
    let limit = u128::from(u32::MAX);
    let checked = |&step: &usize| {
        u32::try_from(step).map_err(|_| Error::TooLarge { op: "StepIndex", what: "step", got: step as u128, limit })
    };
    steps.iter().map(checked).collect()
}
