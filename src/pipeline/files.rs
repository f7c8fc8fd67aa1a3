use std::path::PathBuf;

use crate::error::Result;
use crate::models::{ClipTextConfig, ClipTextModel, Unet, UnetConfig, Vae, VaeConfig};
use crate::runtime::{DType, Device};

/// Where a model comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelSource {
    /// A directory in the layout of diffusers: tokenizer/, text_encoder/, unet/, vae/, scheduler/.
    Directory(PathBuf),
    /// The small model that ships inside the program.
    Embedded,
}

/// The files of a model, read part by part: configurations when opened, weights when asked for.
pub struct ModelFiles {
    _private: (),
}

impl ModelFiles {
    /// Reads nothing but `model_index.json` (if there) and checks that the part directories exist.
    ///
    /// # Errors
    /// [`Error::File`](crate::Error::File): what is missing and what the directory should look like.
    pub fn open(_source: &ModelSource) -> Result<ModelFiles> {
        unimplemented!()
    }

    pub fn text_config(&self) -> Result<ClipTextConfig> {
        unimplemented!()
    }

    pub fn unet_config(&self) -> Result<UnetConfig> {
        unimplemented!()
    }

    pub fn vae_config(&self) -> Result<VaeConfig> {
        unimplemented!()
    }

    pub fn text_encoder(&self, _device: &Device, _dtype: DType) -> Result<ClipTextModel> {
        unimplemented!()
    }

    pub fn unet(&self, _device: &Device, _dtype: DType) -> Result<Unet> {
        unimplemented!()
    }

    pub fn vae(&self, _device: &Device, _dtype: DType) -> Result<Vae> {
        unimplemented!()
    }

    // tokenizer() follows when src/text has landed.
}
