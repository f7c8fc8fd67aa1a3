use super::{ModelSource, Observer, Request};
use crate::error::Result;
use crate::runtime::{DType, Device};

/// How a picture was made, for its file.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameters {
    /// As stable-diffusion-webui writes it (PNG text chunk `parameters`).
    pub text: String,
    /// Everything, as a JSON object (PNG text chunk `megafuse`).
    pub json: serde_json::Value,
}

/// A finished picture.
#[derive(Clone, Debug, PartialEq)]
pub struct Picture {
    pub width: usize,
    pub height: usize,
    /// 8 bits, row-major, 3 bytes a pixel.
    pub rgb: Vec<u8>,
    pub seed: u64,
    pub parameters: Parameters,
}

/// A model ready to make pictures.
pub struct Pipeline {
    _private: (),
}

impl Pipeline {
    /// Loads every part of the model and checks that the parts fit together.
    ///
    /// # Errors
    /// Those of [`ModelFiles`](super::ModelFiles) and of the weight files;
    /// [`Error::Config`](crate::Error::Config) when two parts do not fit, naming both and their widths.
    pub fn load(_source: ModelSource, _device: Device, _dtype: DType) -> Result<Pipeline> {
        unimplemented!()
    }

    /// One picture after another; a picture depends on the request and its own seed alone.
    ///
    /// # Errors
    /// [`Error::Request`](crate::Error::Request): an option and what it would accept;
    /// [`Error::Interrupted`](crate::Error::Interrupted); [`Error::NonFinite`](crate::Error::NonFinite), naming the stage;
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory).
    pub fn generate(&self, _request: &Request, _observer: &mut dyn Observer) -> Result<Vec<Picture>> {
        unimplemented!()
    }
}
