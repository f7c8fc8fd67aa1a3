//! What the families with a UNet over the latents of a VAE have in common.

use std::any::Any;
use std::sync::Arc;

use super::super::{ModelFiles, Size, WeightReport};
use super::{load_part, misfit};
use crate::error::{Error, Result};
use crate::methods::Denoiser;
use crate::models::{Unet, UnetConditioning, UnetConfig, UnetOptions, Vae, VaeConfig};
use crate::ops::{self, StepTable};
use crate::runtime::{DType, Device, Tensor};

/// The autoencoder between pictures and samples, which are scaled latents.
pub struct LatentSpace {
    vae: Vae,
}

impl LatentSpace {
    /// # Errors
    /// Those of the files; [`Error::Config`]: not a VAE of pictures.
    pub fn load(files: &ModelFiles, device: &Device, dtype: DType) -> Result<(LatentSpace, WeightReport)> {
        let config = files.vae_config()?;
        if (config.in_channels, config.out_channels) != (3, 3) {
            let (input, output) = (config.in_channels, config.out_channels);
            return misfit(
                files,
                format!("vae/config.json has in_channels {input} and out_channels {output}, expected 3 (RGB)"),
            );
        }
        let store = files.weights("vae", device, vae_dtype(&config, dtype))?;
        let (vae, report) = load_part("vae", store, |w| Vae::from_weights(w, &config))?;
        Ok((LatentSpace { vae }, report))
    }

    pub fn config(&self) -> &VaeConfig {
        self.vae.config()
    }

    /// f32, `[1, h, w, C]` to `[1, H, W, 3]`.
    ///
    /// # Errors
    /// Those of the decoder.
    pub fn decode(&self, x0: &Tensor) -> Result<Tensor> {
        let (scale, shift) = (1.0 / self.config().scaling_factor, self.config().shift_factor);
        let latents = ops::scale_cast(x0, scale as f32, shift as f32, self.vae.dtype(), 1)?;
        let picture = self.vae.decode(&latents)?;
        match picture.dtype() {
            DType::F32 => Ok(picture),
            _ => ops::scale_cast(&picture, 1.0, 0.0, DType::F32, 1),
        }
    }

    /// f32, `[1, H, W, 3]` to `[1, h, w, C]`; with `noise` a sample of the posterior.
    ///
    /// # Errors
    /// Those of the encoder.
    pub fn encode(&self, picture: &Tensor, noise: Option<&Tensor>) -> Result<Tensor> {
        let (scale, shift) = (self.config().scaling_factor, self.config().shift_factor);
        let moments = match picture.dtype() == self.vae.dtype() {
            true => self.vae.encode(picture)?,
            false => self.vae.encode(&ops::scale_cast(picture, 1.0, 0.0, self.vae.dtype(), 1)?)?,
        };
        let latent = ops::diagonal_gaussian(&moments, noise)?;
        ops::scale_cast(&latent, scale as f32, (-shift * scale) as f32, DType::F32, 1)
    }
}

/// A decoder with `force_upcast` may leave the range of f16, so it runs in f32.
pub fn vae_dtype(config: &VaeConfig, dtype: DType) -> DType {
    if config.force_upcast && dtype == DType::F16 { DType::F32 } else { dtype }
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
    if unet.in_channels != vae.latent_channels {
        return misfit(
            files,
            format!(
                "unet/config.json has in_channels {}, vae/config.json latent_channels {}; they must be equal (inpainting \
                 and other UNets with extra input channels are not supported)",
                unet.in_channels, vae.latent_channels
            ),
        );
    }
    if unet.out_channels != unet.in_channels {
        let (found, wanted) = (unet.out_channels, unet.in_channels);
        return misfit(
            files,
            format!("unet/config.json has out_channels {found} and in_channels {wanted}; they must be equal"),
        );
    }
    Ok(())
}

/// A UNet in a stage.
pub struct UnetDenoiser {
    unet: Arc<Unet>,
    conditioning: UnetConditioning,
    repeats: usize,
}

impl UnetDenoiser {
    /// In the memory of `reuse`, where that is given; on a card else in memory of its own, which a recorded step may read.
    ///
    /// # Errors
    /// Those of the device; [`Error::Config`]: `reuse` is of another kind.
    pub fn begin(
        unet: &Arc<Unet>,
        conditioning: UnetConditioning,
        repeats: usize,
        reuse: Option<Box<dyn Denoiser>>,
    ) -> Result<Box<dyn Denoiser>> {
        let Some(reuse) = reuse else {
            let conditioning = match unet.device() {
                Device::Cuda(_) => conditioning.duplicate()?,
                _ => conditioning,
            };
            return Ok(Box::new(UnetDenoiser { unet: unet.clone(), conditioning, repeats }));
        };
        let reuse: Box<dyn Any> = reuse;
        let mut reuse = reuse
            .downcast::<UnetDenoiser>()
            .map_err(|_| Error::config("recorded steps", "the denoiser to use again is of another family"))?;
        reuse.conditioning.copy_from(&conditioning)?;
        Ok(reuse)
    }
}

impl Denoiser for UnetDenoiser {
    fn denoise(&self, x: &Tensor, steps: &StepTable, options: &UnetOptions) -> Result<Tensor> {
        let input = ops::scale_input(x, steps, self.unet.dtype(), self.repeats)?;
        self.unet.forward(&input, steps.index(), &self.conditioning, options)
    }
}
