//! What the families with a UNet over the latents of a VAE have in common.

use std::any::Any;
use std::sync::{Arc, Mutex, MutexGuard};

use super::super::memory::{LoadOptions, Role};
use super::super::resident::{Module, Resident};
use super::super::{ModelFiles, Size, WeightReport};
use super::conditioning::StageConditioning;
use super::control::{Controls, Told};
use super::{SampleSpace, misfit};
use crate::error::{Error, Result};
use crate::methods::{Denoiser, PatchInput, ViewPlaces};
use crate::models::{
    AttentionMapMemory, ImageMasks, Partition, Unet, UnetCall, UnetConfig, UnetOptions, Vae, VaeConfig,
};
use crate::ops::{self, Source, StepIndex, StepTable};
use crate::runtime::{DType, Device, Tensor};

/// The autoencoder between pictures and samples, which are scaled latents.
pub struct LatentSpace {
    config: VaeConfig,
    /// Of the VAE, when it is loaded next.
    dtype: Arc<Mutex<DType>>,
    vae: Resident<Vae>,
}

impl LatentSpace {
    /// `upcasts`: does the family's VAE leave the range of f16 where its configuration does not say so?
    ///
    /// # Errors
    /// Those of the files; [`Error::Config`]: not a VAE of pictures.
    pub fn new(files: &Arc<ModelFiles>, options: &LoadOptions, upcasts: bool) -> Result<(LatentSpace, WeightReport)> {
        let config = files.vae_config()?;
        if (config.in_channels, config.out_channels) != (3, 3) {
            let (input, output) = (config.in_channels, config.out_channels);
            return misfit(
                files,
                format!("vae/config.json has in_channels {input} and out_channels {output}, expected 3 (RGB)"),
            );
        }
        let dtype = options.vae_dtype.unwrap_or(match options.dtype {
            DType::F16 if config.force_upcast.unwrap_or(upcasts) => DType::BF16,
            dtype => dtype,
        });
        let (_, report) = files.vae_of(files.outline("vae", &options.device, dtype)?)?;
        let dtype = Arc::new(Mutex::new(dtype));
        let load = {
            let (files, device, dtype) = (files.clone(), options.device.clone(), dtype.clone());
            move || Ok(files.vae(&device, *locked(&dtype))?.0)
        };
        Ok((LatentSpace { config, dtype, vae: Resident::new(Role::Vae, load) }, report))
    }

    pub fn config(&self) -> &VaeConfig {
        &self.config
    }

    pub fn module(&self) -> &dyn Module {
        &self.vae
    }

    /// What `work` makes with the VAE; where f16 has no room for it, once more with the VAE in bf16, which it keeps.
    fn in_range(
        &self,
        what: &str,
        warn: &mut dyn FnMut(&str),
        work: &dyn Fn(&Vae) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let vae = self.vae.get()?;
        let made = work(&vae)?;
        let narrow = vae.dtype() == DType::F16 && !matches!(vae.device(), Device::Meta(_));
        if !narrow || ops::count_non_finite(&made)? == 0 {
            return Ok(made);
        }
        warn(&format!("the {what} is not finite in f16: the VAE runs in bf16 from here on"));
        drop((vae, made));
        *locked(&self.dtype) = DType::BF16;
        self.vae.release();
        work(&*self.vae.get()?)
    }
}

impl SampleSpace for LatentSpace {
    fn factor(&self) -> usize {
        self.config.factor()
    }

    fn channels(&self) -> usize {
        self.config.latent_channels
    }

    fn decode(&self, x0: &Tensor, partition: Partition, warn: &mut dyn FnMut(&str)) -> Result<Tensor> {
        let (scale, shift) = (1.0 / self.config.scaling_factor, self.config.shift_factor);
        self.in_range("decoded picture", warn, &|vae| {
            let latents = ops::scale_cast(x0, scale as f32, shift as f32, vae.dtype(), 1)?;
            let picture = vae.decode_in(&latents, partition)?;
            match picture.dtype() {
                DType::F32 => Ok(picture),
                _ => ops::scale_cast(&picture, 1.0, 0.0, DType::F32, 1),
            }
        })
    }

    fn encode(
        &self,
        picture: &Tensor,
        noise: Option<&Tensor>,
        partition: Partition,
        warn: &mut dyn FnMut(&str),
    ) -> Result<Tensor> {
        let (scale, shift) = (self.config.scaling_factor, self.config.shift_factor);
        self.in_range("encoded picture", warn, &|vae| {
            let moments = match picture.dtype() == vae.dtype() {
                true => vae.encode_in(picture, partition)?,
                false => vae.encode_in(&ops::scale_cast(picture, 1.0, 0.0, vae.dtype(), 1)?, partition)?,
            };
            let latent = match noise {
                None => ops::diagonal_gaussian(&moments, None)?,
                Some(noise) if noise.shape()[0] == 1 => ops::diagonal_gaussian(&moments, Some(noise))?,
                Some(noise) => {
                    let sample = |i| ops::diagonal_gaussian(&moments, Some(&noise.rows(i..i + 1)?));
                    Tensor::concat(&(0..noise.shape()[0]).map(sample).collect::<Result<Vec<_>>>()?)?
                }
            };
            ops::scale_cast(&latent, scale as f32, (-shift * scale) as f32, DType::F32, 1)
        })
    }
}

fn locked(dtype: &Mutex<DType>) -> MutexGuard<'_, DType> {
    dtype.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Pixels of the UNet's `sample_size`, else the VAE's.
pub fn native_size(unet: &UnetConfig, vae: &VaeConfig) -> Option<Size> {
    let cells = unet.sample_size.map(|[h, w]| Size::new(w * vae.factor(), h * vae.factor()));
    cells.or_else(|| vae.sample_size.map(|[h, w]| Size::new(w, h)))
}

/// Do UNet and VAE speak of the same latents, and the UNet and its text encoders of the same width?
///
/// # Errors
/// [`Error::Config`] naming both parts and their widths.
pub fn check_fit(files: &ModelFiles, text: (&str, usize), unet: &UnetConfig, vae: &VaeConfig) -> Result<()> {
    let (text_key, text_width) = text;
    if unet.cross_attention_dim != text_width {
        return misfit(
            files,
            format!(
                "unet/config.json has cross_attention_dim {}, {text_key} {text_width}; they must be equal",
                unet.cross_attention_dim
            ),
        );
    }
    let (input, output, latents) = (unet.in_channels, unet.out_channels, vae.latent_channels);
    if input != latents && !reads_mask(unet, vae) {
        let reason = format!(
            "unet/config.json has in_channels {input}, vae/config.json latent_channels {latents}; they must be equal, or the \
             UNet an inpainting one, of {} channels (others with further input channels are not supported)",
            inpainting_channels(latents)
        );
        return misfit(files, reason);
    }
    if output != latents {
        let reason = format!(
            "unet/config.json has out_channels {output} and vae/config.json latent_channels {latents}; they must be equal"
        );
        return misfit(files, reason);
    }
    Ok(())
}

/// Is it a UNet for inpainting, whose input is the latents, the mask and the latents of the masked picture side by side?
/// Rombach et al. 2022, arXiv:2112.10752, sec. 4.5.
pub fn reads_mask(unet: &UnetConfig, vae: &VaeConfig) -> bool {
    unet.in_channels == inpainting_channels(vae.latent_channels)
}

fn inpainting_channels(latents: usize) -> usize {
    2 * latents + 1
}

/// The UNet as a module, and its weights.
///
/// # Errors
/// Those of the configuration.
pub fn unet(files: &Arc<ModelFiles>, options: &LoadOptions) -> Result<(Arc<Resident<Unet>>, WeightReport)> {
    let format = options.weights;
    let (_, report) = files.unet_of(files.outline("unet", &options.device, options.dtype)?.with_format(format))?;
    let (files, device, dtype) = (files.clone(), options.device.clone(), options.dtype);
    let load = move || Ok(files.unet_of(files.weights("unet", &device, dtype)?.with_format(format))?.0);
    Ok((Arc::new(Resident::new(Role::Network, load)), report))
}

/// A UNet in a stage.
pub struct UnetDenoiser {
    unet: Arc<Unet>,
    conditioning: StageConditioning,
    /// `[repeats N, h, w, C]`: what an inpainting UNet reads beside the latents.
    channels: Option<Tensor>,
    attention_maps: AttentionMapMemory,
    /// Where on the stage's map image prompts count.
    image_masks: ImageMasks,
    /// Of the conditioning of crops, which has one step: its index.
    only: StepIndex,
    controls: Controls,
}

impl UnetDenoiser {
    /// In the memory of `reuse`, where that is given; on a card else in memory of its own, which a recorded step may read.
    ///
    /// # Errors
    /// Those of the device; [`Error::Config`]: `reuse` is of another kind.
    pub fn begin(
        unet: Arc<Unet>,
        conditioning: StageConditioning,
        controls: Controls,
        image_masks: Vec<Option<Tensor>>,
        reuse: Option<Box<dyn Denoiser>>,
    ) -> Result<Box<dyn Denoiser>> {
        let Some(reuse) = reuse else {
            let device = unet.device();
            return Ok(Box::new(UnetDenoiser {
                conditioning: conditioning.in_own_memory(device)?,
                controls: controls.in_own_memory()?,
                channels: None,
                attention_maps: AttentionMapMemory::default(),
                image_masks: ImageMasks::new(image_masks),
                only: StepIndex::one(device, 0)?,
                unet,
            }));
        };
        let reuse: Box<dyn Any> = reuse;
        let mut reuse = reuse
            .downcast::<UnetDenoiser>()
            .map_err(|_| Error::config("recorded steps", "the denoiser to use again is of another family"))?;
        reuse.conditioning.replace(conditioning)?;
        reuse.image_masks.replace(image_masks)?;
        reuse.controls.replace(controls)?;
        Ok(reuse)
    }
}

impl Denoiser for UnetDenoiser {
    fn denoise(&self, x: &Tensor, steps: &StepTable, options: &UnetOptions) -> Result<Tensor> {
        let input = ops::scale_input(x, steps, self.unet.dtype(), self.conditioning.repeats())?;
        let input = match &self.channels {
            None => Source::One(&input),
            Some(channels) => Source::Two(&input, channels),
        };
        let [images, h, w, _] = x.dims("denoise", "x")?;
        let hints = self.controls.hints(options.control, [h, w], images, 0)?;
        let controls = &*self.controls.calls(options.control, &hints, images, Told::Whole)?;
        let maps = Some(&self.attention_maps);
        let (window_shifts, image_masks) = (steps.window_shifts(), Some(&self.image_masks));
        let call = UnetCall { options, window_shifts, attention_maps: maps, twins: 0, controls, image_masks };
        self.unet.forward(input, steps.index(), self.conditioning.whole(), call)
    }

    fn denoise_twins(&self, x: &Tensor, steps: &StepTable, options: &UnetOptions) -> Result<Tensor> {
        let (twins, [images, h, w, _]) = (self.conditioning.twins()?, x.dims("denoise_twins", "x")?);
        let input = ops::scale_input(x, steps, self.unet.dtype(), self.conditioning.repeats() + 1)?;
        let channels = match &self.channels {
            Some(channels) => Some(ops::stack(channels, &channels.rows(0..images)?)?),
            None => None,
        };
        let input = channels.as_ref().map_or(Source::One(&input), |channels| Source::Two(&input, channels));
        let hints = self.controls.hints(options.control, [h, w], images, images)?;
        let controls = &*self.controls.calls(options.control, &hints, images, Told::Twins)?;
        let image_masks = Some(&self.image_masks);
        let call =
            UnetCall { options, window_shifts: None, attention_maps: None, twins: images, controls, image_masks };
        self.unet.forward(input, steps.index(), twins, call)
    }

    fn set_channels(&mut self, channels: &Tensor) -> Result<()> {
        let channels = ops::scale_cast(channels, 1.0, 0.0, self.unet.dtype(), self.conditioning.repeats())?;
        match &mut self.channels {
            Some(own) => own.copy_from(&channels),
            None => {
                self.channels = Some(channels);
                Ok(())
            }
        }
    }

    fn attention_maps(&self) -> Option<Tensor> {
        self.attention_maps.collected()
    }

    fn reuse_attention_maps(&mut self, maps: &Tensor, sample: [usize; 2], flat: bool) -> Result<()> {
        self.attention_maps.reuse(maps, &self.unet.attention_levels(sample), flat)
    }

    fn denoise_patches(&self, patches: &PatchInput, steps: &StepTable, options: &UnetOptions) -> Result<Tensor> {
        let &PatchInput { x, patches, restandardised, scales, crops } = patches;
        let input =
            ops::gather_patches(x, patches, restandardised, scales, self.unet.dtype(), self.conditioning.repeats())?;
        let samples = input.shape()[0];
        let views = samples / self.conditioning.repeats();
        let hints = self.controls.view_hints(options.control, patches.layout(), views)?;
        let cropped = if crops { self.conditioning.cropped(samples) } else { None };
        let told = if cropped.is_some() { Told::Crops } else { Told::Whole };
        let controls = &*self.controls.calls(options.control, &hints, views, told)?;
        let call = UnetCall { controls, ..options.into() };
        match cropped {
            Some(cropped) => self.unet.forward(&input, &self.only, cropped, call),
            None => self.unet.forward(&input, steps.index(), self.conditioning.whole(), call),
        }
    }

    fn set_control_pictures(&mut self, pictures: &[Tensor]) -> Result<()> {
        self.controls.set_pictures(pictures)
    }

    fn place_views(&mut self, places: &ViewPlaces) -> Result<()> {
        self.controls.place_views(places)
    }

    fn tell_crops(&mut self, evaluation: usize, crops: &[[f32; 2]]) -> Result<()> {
        self.controls.tell_crops(evaluation, crops)?;
        self.conditioning.tell_crops(self.unet.conditioner(), evaluation, crops)
    }
}
