//! What a UNet that reads no sizes is told in a run: the same in every stage.

use std::sync::Arc;

use super::conditioning::{OfTimesteps, StageConditioning};
use super::control::{ControlConditions, ControlNets};
use super::latent::UnetDenoiser;
use super::{PromptEmbeds, RunConditions, RunInputs};
use crate::error::Result;
use crate::methods::{Denoiser, Size};
use crate::models::{TextConditioning, Unet, UnetConditioning};
use crate::pipeline::ip_adapter::ImagePrompts;
use crate::pipeline::resident::Resident;

/// A run's prompts.
pub struct UnetConditions {
    unet: Arc<Resident<Unet>>,
    controls: ControlConditions,
    prompts: PromptEmbeds,
    images: ImagePrompts,
    repeats: usize,
    /// What a UNet that reads its guidance scale is told.
    guidance: Option<f32>,
    /// The same of one that reads how noisy the picture is that it enlarges.
    noise_level: Option<f32>,
    made: OfTimesteps<UnetConditioning>,
}

impl UnetConditions {
    pub fn new(unet: Arc<Resident<Unet>>, controls: &ControlNets, inputs: RunInputs) -> UnetConditions {
        let RunInputs { prompts, images, repeats, guidance, controls: strengths, noise_level, sizes: _ } = inputs;
        let (controls, made) = (controls.conditions(strengths, repeats), OfTimesteps::nothing());
        UnetConditions { unet, controls, prompts, images, repeats, guidance, noise_level, made }
    }

    fn conditioning(&mut self, timesteps: &[f32]) -> Result<&UnetConditioning> {
        let &mut UnetConditions { ref unet, ref prompts, ref images, guidance, noise_level, ref mut made, .. } = self;
        made.get(timesteps, || {
            let text = TextConditioning { text: &prompts.embeds, added: None, guidance, noise_level };
            let unet = unet.get()?;
            unet.condition(text, timesteps)?.with_images(&unet, images.prompts.clone())
        })
    }
}

impl RunConditions for UnetConditions {
    fn prepare(&mut self, timesteps: &[f32]) -> Result<()> {
        self.conditioning(timesteps).map(drop)
    }

    fn begin_stage(
        &mut self,
        size: Size,
        timesteps: &[f32],
        reuse: Option<Box<dyn Denoiser>>,
    ) -> Result<Box<dyn Denoiser>> {
        let conditioning = self.conditioning(timesteps)?.clone();
        let controls = self.controls.begin_stage(&self.prompts, None, timesteps)?;
        let unet = self.unet.get()?;
        let masks = self.images.masks(size, unet.device())?;
        UnetDenoiser::begin(unet, StageConditioning::new(conditioning, self.repeats, None), controls, masks, reuse)
    }
}
