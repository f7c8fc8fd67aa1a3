use std::any::Any;

use super::{RecordedSteps, Size, StartPicture};
use crate::error::{Error, Result};
use crate::models::UnetOptions;
use crate::ops::{PatchLayout, Patches, Restandardised, StepTable};
use crate::runtime::{Device, Tensor};

/// What a method needs of a model, conditioned on the prompts of a batch. A latent model decodes to and encodes from
/// pictures; for a pixel model the two are the identity.
///
/// Samples are f32, `[N, h, w, C]` with the images of the batch along N; pictures f32, `[1, H, W, 3]`, in [-1, 1].
pub trait DiffusionModel {
    /// Where samples live.
    fn device(&self) -> &Device;

    /// Shape of the samples of the batch's pictures.
    fn sample_shape(&self, size: Size) -> [usize; 4];

    /// The network with what it is told in a stage of this size. `timesteps`: those of the run's step table, in its order;
    /// `reuse`: the denoiser of an earlier stage of the same [`conditioning_key`](DiffusionModel::conditioning_key), whose
    /// memory must then be used again: a recorded step reads it.
    ///
    /// # Errors
    /// Those of the model.
    fn begin_stage(&self, size: Size, timesteps: &[f32], reuse: Option<Box<dyn Denoiser>>)
    -> Result<Box<dyn Denoiser>>;

    /// Tells apart the shapes of conditionings: two stages with equal keys, samples and numbers of timesteps have
    /// conditionings of equal shapes.
    fn conditioning_key(&self) -> Vec<usize>;

    /// The picture of one clean sample `[1, h, w, C]`, not clamped. `warn` is told what had to be done otherwise than asked.
    fn decode(&self, x0: &Tensor, warn: &mut dyn FnMut(&str)) -> Result<Tensor>;

    /// The clean sample of one picture: the posterior's mode, or with `noise`, `[N, h, w, C]`, N samples of it.
    /// `warn` as in [`decode`](DiffusionModel::decode).
    fn encode(&self, picture: &Tensor, noise: Option<&Tensor>, warn: &mut dyn FnMut(&str)) -> Result<Tensor>;

    /// The model's recorded steps, kept from one run to the next.
    fn recorded_steps(&self) -> &RecordedSteps;

    /// The picture that the run begins from, if it begins from one.
    fn start(&self) -> Option<&dyn StartPicture> {
        None
    }

    /// The pictures that ControlNets read in a stage of this size, one for each: f32, `[1, H, W, 3]`, from 0 to 1.
    ///
    /// # Errors
    /// Those of the pictures and the device.
    fn control_pictures(&self, _stage: usize, _size: Size) -> Result<Vec<Tensor>> {
        Ok(Vec::new())
    }

    /// The pictures that the network enlarges, of a stage's size, if it reads such beside the samples.
    ///
    /// # Errors
    /// Those of the pictures and the device.
    fn lowres(&self, _size: Size) -> Result<Option<NoisedPicture>> {
        Ok(None)
    }

    /// Has a picture a distribution of clean samples, of which [`encode`](DiffusionModel::encode) draws one? Samples of pixels are
    /// the picture's own.
    fn has_posterior(&self) -> bool {
        true
    }

    /// Does the network read a mask and the masked picture beside the samples?
    fn reads_mask(&self) -> bool {
        false
    }
}

/// What a network enlarges, and the noise that it reads it with: signal picture + sigma noise.
pub struct NoisedPicture {
    /// f32, `[N, H, W, 3]`, in [-1, 1].
    pub pictures: Tensor,
    pub signal: f64,
    pub sigma: f64,
}

/// A network in a stage.
pub trait Denoiser: Any + Send {
    /// The network's output at the current step for `x` times the step's input scale: N rows, or with guidance 2 N, the
    /// unconditional ones first; any float dtype. Work that a card can record: nothing is waited for, and what depends on
    /// the step is read on the device.
    ///
    /// # Errors
    /// Those of the model.
    fn denoise(&self, x: &Tensor, steps: &StepTable, options: &UnetOptions) -> Result<Tensor>;

    /// The same with the conditional samples once more behind the others: 2 N rows, or with guidance 3 N. The last N of them are
    /// twins of those before ([`UnetCall::twins`](crate::models::UnetCall::twins)).
    ///
    /// # Errors
    /// [`Error::Config`]: it knows no twins; those of the model.
    fn denoise_twins(&self, _x: &Tensor, _steps: &StepTable, _options: &UnetOptions) -> Result<Tensor> {
        Err(Error::config("denoiser", "has no conditioning for samples that come twice"))
    }

    /// What the network reads beside the samples, `[N, h, w, C]`, f32: the mask, then the masked picture's samples; or the noised
    /// picture that it enlarges. Before
    /// the first step of a stage; where the denoiser has them already, in the same memory.
    ///
    /// # Errors
    /// [`Error::Config`]: it reads none; those of the device.
    fn set_channels(&mut self, _channels: &Tensor) -> Result<()> {
        Err(Error::config("denoiser", "reads nothing beside the samples"))
    }

    /// The pictures of a stage that ControlNets read ([`DiffusionModel::control_pictures`]). Before the first step of a stage; where
    /// the denoiser had some, in the same memory.
    ///
    /// # Errors
    /// [`Error::Config`]: there are no ControlNets; those of the device.
    fn set_control_pictures(&mut self, _pictures: &[Tensor]) -> Result<()> {
        Err(Error::config("denoiser", "has no ControlNets that read pictures"))
    }

    /// Where the views lie that are denoised next. Done before a step, no part of what a card records. Default: nothing depends on
    /// it.
    ///
    /// # Errors
    /// Those of the device.
    fn place_views(&mut self, _places: &ViewPlaces) -> Result<()> {
        Ok(())
    }

    /// What the last call that collects found of cross-attention ([`UnetOptions::attention_maps`]): `[R, h, w, text tokens]`, f32,
    /// one row per row of the output, in memory that the next such call writes. `None`: there was none.
    fn attention_maps(&self) -> Option<Tensor> {
        None
    }

    /// The maps that calls of this stage, for samples of height and width `sample`, reuse where their options say so; resized here,
    /// once for all its steps. Before the first step of a stage; where the denoiser had some, in the same memory.
    ///
    /// # Errors
    /// [`Error::Config`]: it has no cross-attention; those of the device.
    fn reuse_attention_maps(&mut self, _maps: &Tensor, _sample: [usize; 2], _flat: bool) -> Result<()> {
        Err(Error::config("denoiser", "has no cross-attention whose maps could be reused"))
    }

    /// The same for a group of V patches of each of N maps: N V rows, or with guidance 2 N V, the patches of an image side by
    /// side.
    ///
    /// # Errors
    /// [`Error::Config`]: it takes none; those of the model.
    fn denoise_patches(&self, _patches: &PatchInput, _steps: &StepTable, _options: &UnetOptions) -> Result<Tensor> {
        Err(Error::config("denoiser", "takes no patches"))
    }

    /// Where the N V patches that are denoised next lie in their pictures: top and left of each in pixels, at evaluation
    /// `evaluation` of the run. Done before a step, no part of what a card records. Default: the network reads no crops.
    ///
    /// # Errors
    /// Those of the model.
    fn tell_crops(&mut self, _evaluation: usize, _crops: &[[f32; 2]]) -> Result<()> {
        Ok(())
    }
}

/// Where the views of a group lie on their maps.
#[derive(Clone, Copy, Debug)]
pub struct ViewPlaces<'a> {
    /// `map`: the cells of the stage.
    pub layout: PatchLayout,
    /// First row and column of each view, the first picture's before the second's; outside of the map there are zeros.
    pub origins: &'a [[i32; 2]],
}

/// Patches as a network reads them: see [`gather_patches`](crate::ops::gather_patches).
#[derive(Clone, Copy, Debug)]
pub struct PatchInput<'a> {
    /// `[N, H, W, C]`, f32.
    pub x: &'a Tensor,
    pub patches: &'a Patches,
    pub restandardised: Option<Restandardised<'a>>,
    /// Has the input scale of the step.
    pub scales: &'a StepTable,
    /// Is the network told of each patch what [`tell_crops`](Denoiser::tell_crops) said last?
    pub crops: bool,
}

/// Where a method's noise comes from.
pub trait NoiseSource {
    /// The seed of each image of the batch.
    fn seeds(&self) -> Vec<u64>;

    /// The next draw: independent N(0, 1), f32, of `shape` (NHWC), each image of the batch from its own generator.
    ///
    /// # Errors
    /// Those of the device.
    fn normal(&mut self, shape: [usize; 4]) -> Result<Tensor>;

    /// The next draw, of the shape of `to`, into its memory.
    ///
    /// # Errors
    /// Those of the device.
    fn normal_into(&mut self, to: &mut Tensor) -> Result<()>;
}
