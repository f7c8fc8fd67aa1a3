//! Runs that begin from a picture, and those that repaint a part of it.
//!
//! ```text
//! z     = a sample of E(picture)'s posterior                                     clean samples, "known" under a mask
//! x_t   = signal_t z + sigma_t noise                                             where the run begins, t by the strength
//! x_s   = mask x_s + (1 - mask) (signal_s z + sigma_s noise)                     after each evaluation; z alone at the end
//! input = [input_scale x_t, mask, E(picture (1 - mask))]                         of a network that reads the mask
//! ```
//! Meng et al. 2021, arXiv:2108.01073 (SDEdit); Lugmayr et al. 2022, arXiv:2201.09865, eq. (8); Rombach et al. 2022,
//! arXiv:2112.10752, sec. 4.5. Draws are those of diffusers' pipelines, in their order, for each stage that begins: the
//! posterior of the picture, where it is encoded; the noise; with a mask the posterior of the masked picture, which a network
//! that does not read the mask leaves unused.

use super::{Event, Sampling, Size};
use crate::error::Result;
use crate::ops::{self, Repaint, StepIndex};
use crate::runtime::{DType, Device, Tensor};

/// The picture that a run begins from.
pub trait StartPicture {
    /// f32, `[1, H, W, 3]`, in [-1, 1].
    ///
    /// # Errors
    /// Those of the device.
    fn picture(&self, size: Size) -> Result<Tensor>;

    /// Is there a mask?
    fn repaints(&self) -> bool;

    /// The picture with 0, grey, where it is repainted.
    ///
    /// # Errors
    /// Those of the device.
    fn masked_picture(&self, size: Size) -> Result<Tensor>;

    /// `[1, h, w, 1]`, f32: 1 where the mask of this size repaints, 0 where the picture is kept, at every cell of a sample.
    ///
    /// # Errors
    /// Those of the device.
    fn mask(&self, size: Size, cells: [usize; 2]) -> Result<Tensor>;
}

/// Where a run begins that begins from a picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// Of the schedule, from 0.
    pub step: usize,
    /// It begins with noise alone: the picture is only what stays around the repainted part.
    pub noise_only: bool,
    /// A part of the picture is kept.
    pub repaints: bool,
}

impl Start {
    /// The last `strength` of `steps`, rounded down, as diffusers counts; under a mask a strength of 1 begins with noise
    /// alone, without one with the picture under nearly all noise. `None`: no step is left.
    pub fn new(strength: f64, steps: usize, repaints: bool) -> Option<Start> {
        let left = ((steps as f64 * strength) as usize).min(steps);
        (left > 0).then_some(Start { step: steps - left, noise_only: repaints && strength == 1.0, repaints })
    }
}

/// What a stage keeps of the picture.
#[derive(Debug)]
pub struct Known {
    /// `[1, h, w, 1]`, f32: 1 is repainted.
    pub mask: Tensor,
    /// `[N, h, w, C]`, f32: the picture's clean samples.
    pub samples: Tensor,
    /// Of the same shape.
    pub noise: Tensor,
    /// `[evaluations, 2]`, f32: signal and sigma after each evaluation of the run.
    pub levels: Tensor,
}

impl Known {
    /// In memory of its own, which a recorded step may read.
    ///
    /// # Errors
    /// Those of the device.
    pub fn duplicate(&self) -> Result<Known> {
        Ok(Known {
            mask: self.mask.duplicate()?,
            samples: self.samples.duplicate()?,
            noise: self.noise.duplicate()?,
            levels: self.levels.duplicate()?,
        })
    }

    /// Another stage's in the same memory.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape): of another shape; [`Error::Driver`](crate::Error::Driver).
    pub fn copy_from(&mut self, from: &Known) -> Result<()> {
        self.mask.copy_from(&from.mask)?;
        self.samples.copy_from(&from.samples)?;
        self.noise.copy_from(&from.noise)?;
        self.levels.copy_from(&from.levels)
    }

    /// The op's arguments after an evaluation.
    pub fn args<'a>(&'a self, step: &'a StepIndex) -> Repaint<'a> {
        Repaint { mask: &self.mask, known: &self.samples, noise: &self.noise, levels: &self.levels, step }
    }

    /// Clean samples with the picture's where it is kept.
    ///
    /// # Errors
    /// Those of the device.
    pub fn in_place_of(&self, x0: &Tensor) -> Result<Tensor> {
        let (mut x0, device) = (x0.duplicate()?, x0.device());
        let levels = Tensor::from_f32(device, &[1, 2], DType::F32, &[1.0, 0.0])?;
        let step = StepIndex::one(device, 0)?;
        ops::repaint(&mut x0, Repaint { levels: &levels, ..self.args(&step) })?;
        Ok(x0)
    }
}

impl Sampling<'_> {
    /// The samples that the run's first stage begins with: noise, or the picture under the noise of its step.
    ///
    /// # Errors
    /// Those of the device and the model.
    pub fn first_samples(&mut self) -> Result<Tensor> {
        let stage = self.run.first_stage();
        let size = self.run.stages()[stage].size;
        let (Some(picture), Some(start)) = (self.model.start(), self.run.start()) else {
            return self.initial_noise(size);
        };
        self.begin(Event::EncodePicture { stage })?;
        let known = match start.noise_only && self.model.reads_mask() {
            true => None, // it sees what is around the mask
            false => Some(self.encode_start(picture, stage)?),
        };
        let noise = self.draw(self.sample_shape(size))?;
        let scheduler = &self.schedulers[stage];
        let x = match &known {
            Some(known) if !start.noise_only => {
                let (signal, sigma) = scheduler.noise_level(start.step);
                ops::add_noise(known, &noise, signal as f32, sigma as f32)?
            }
            _ => ops::scale_cast(&noise, scheduler.init_noise_sigma() as f32, 0.0, DType::F32, 1)?,
        };
        self.enter(picture, stage, known, noise)?;
        self.dump(&format!("init{stage}.noised"), &x)?;
        Ok(x)
    }

    /// Clean samples noised to where step `level` begins, for a stage that begins with them: where the run repaints, with
    /// the picture of the stage's size in place of what is kept.
    ///
    /// # Errors
    /// Those of the device and the model.
    pub fn noised(&mut self, stage: usize, x0: &Tensor, level: usize) -> Result<Tensor> {
        let (signal, sigma) = self.schedulers[stage].noise_level(level);
        let add = |x0: &Tensor, noise: &Tensor| ops::add_noise(x0, noise, signal as f32, sigma as f32);
        let Some(picture) = self.model.start().filter(|picture| picture.repaints()) else {
            let noise = self.draw(self.sample_shape(self.run.stages()[stage].size))?;
            return add(x0, &noise);
        };
        let known = match self.model.reads_mask() {
            true => None,
            false => Some(self.encode_start(picture, stage)?),
        };
        let noise = self.draw(self.sample_shape(self.run.stages()[stage].size))?;
        self.enter(picture, stage, known, noise.clone())?;
        match &self.known {
            Some(known) => add(&known.in_place_of(x0)?, &noise),
            None => add(x0, &noise),
        }
    }

    /// The clean samples of the run's picture at a stage's size; `None`: it begins from none.
    ///
    /// # Errors
    /// Those of the device and the model.
    pub fn start_samples(&mut self, stage: usize) -> Result<Option<Tensor>> {
        let Some(picture) = self.model.start() else { return Ok(None) };
        self.begin(Event::EncodePicture { stage })?;
        self.encode_start(picture, stage).map(Some)
    }

    /// The picture's clean samples at a stage's size, a sample of the posterior for each image of the batch.
    fn encode_start(&mut self, picture: &dyn StartPicture, stage: usize) -> Result<Tensor> {
        let size = self.run.stages()[stage].size;
        let shape = self.sample_shape(size);
        let noise = self.posterior_noise(shape)?;
        let pixels = picture.picture(size)?;
        self.dump_each(&format!("init{stage}.picture"), &vec![pixels.clone(); shape[0]])?;
        let known = self.encode_once(&pixels, noise.as_ref())?;
        self.dump(&format!("init{stage}.encoded"), &known)?;
        Ok(known)
    }

    /// What the stage keeps, and what its network reads beside the samples; nothing without a mask.
    fn enter(&mut self, picture: &dyn StartPicture, stage: usize, known: Option<Tensor>, noise: Tensor) -> Result<()> {
        if !picture.repaints() {
            return Ok(());
        }
        let size = self.run.stages()[stage].size;
        let shape @ [n, h, w, _] = self.sample_shape(size);
        let posterior_noise = self.posterior_noise(shape)?;
        let mask = picture.mask(size, [h, w])?;
        self.dump_each(&format!("init{stage}.mask"), &vec![mask.clone(); n])?;
        match known.filter(|_| !self.model.reads_mask()) {
            Some(samples) => {
                let levels: Vec<f32> = self.levels.iter().flatten().map(|&level| level as f32).collect();
                let levels = Tensor::from_f32(self.model.device(), &[self.levels.len(), 2], DType::F32, &levels)?;
                self.known = Some(Known { mask, samples, noise, levels });
            }
            None => {
                let masked = self.encode_once(&picture.masked_picture(size)?, posterior_noise.as_ref())?;
                self.dump(&format!("init{stage}.masked"), &masked)?;
                self.channels = Some(beside(&mask, &masked)?);
            }
        }
        Ok(())
    }
}

/// `[1, h, w, 1]` and `[N, h, w, C]` side by side, `[N, h, w, 1 + C]`; made on the host, once per stage.
fn beside(mask: &Tensor, samples: &Tensor) -> Result<Tensor> {
    let [n, h, w, c] = samples.dims("channels", "masked picture")?;
    let (device, shape) = (samples.device(), [n, h, w, 1 + c]);
    if let Device::Meta(_) = device {
        return Tensor::uninit(device, &shape, DType::F32);
    }
    let (mask, samples) = (mask.to_f32_vec()?, samples.to_f32_vec()?);
    let pixels = samples.chunks_exact(c).zip(mask.iter().cycle());
    let values: Vec<f32> = pixels.flat_map(|(pixel, mask)| [&[*mask], pixel].concat()).collect();
    Tensor::from_f32(device, &shape, DType::F32, &values)
}
