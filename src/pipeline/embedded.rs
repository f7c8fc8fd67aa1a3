//! The model that ships inside the program: models/pocket.

use crate::error::{Error, Result};

/// Path inside the model's directory, contents.
#[derive(Clone, Copy)]
pub struct Files(&'static [(&'static str, &'static [u8])]);

impl Files {
    pub fn get(&self, name: &str) -> Option<&'static [u8]> {
        self.0.iter().find(|(path, _)| *path == name).map(|(_, bytes)| *bytes)
    }
}

#[cfg(embedded_model)]
macro_rules! pocket {
    ($($path:literal),* $(,)?) => {
        Files(&[$(($path, include_bytes!(concat!("../../models/pocket/", $path)))),*])
    };
}

#[cfg(embedded_model)]
const FILES: Files = pocket![
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
];

#[cfg(not(embedded_model))]
const FILES: Files = Files(&[]);

pub fn files() -> Result<Files> {
    if FILES.0.is_empty() {
        let reason = "this program was built without models/pocket; name a model directory";
        return Err(Error::config("embedded model", reason));
    }
    Ok(FILES)
}
