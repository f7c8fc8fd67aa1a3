//! T5's text encoder and its tokenizer among a model's files.

use std::borrow::Cow;

use super::super::WeightReport;
use super::super::families::load_part;
use super::{ModelFiles, Place};
use crate::error::Result;
use crate::models::{T5Config, T5Encoder, WeightStore};
use crate::runtime::{DType, Device};
use crate::text::{T5Tokenizer, T5TokenizerFiles};

impl ModelFiles {
    /// The tokenizer in `folder` (`tokenizer_3`), of a single file beside it.
    ///
    /// # Errors
    /// As [`T5Tokenizer::load`] and [`T5Tokenizer::beside`].
    pub fn t5_tokenizer(&self, folder: &str) -> Result<T5Tokenizer> {
        if let Place::File(file) = &self.place {
            return T5Tokenizer::beside(file.path(), folder);
        }
        let file = |name: &str| Ok(self.read(&format!("{folder}/{name}"))?.map(Cow::into_owned));
        let tokenizer: Option<Vec<u8>> = file("tokenizer.json")?;
        let (pieces, config) = (file("spiece.model")?, file("tokenizer_config.json")?);
        let files =
            T5TokenizerFiles { tokenizer: tokenizer.as_deref(), pieces: pieces.as_deref(), config: config.as_deref() };
        T5Tokenizer::from_bytes(&self.path(folder), &files)
    }

    /// Of the T5 text encoder in `folder` (`text_encoder_3`).
    ///
    /// # Errors
    /// [`Error::File`](crate::Error::File); as [`T5Config::from_json`].
    pub fn t5_config(&self, folder: &str) -> Result<T5Config> {
        let (what, json) = self.json(&format!("{folder}/config.json"))?;
        T5Config::from_json(&what, &json)
    }

    /// The T5 text encoder in `folder`, in [`T5Encoder::dtype_for`] this dtype, and its weights' report; on the meta device from
    /// its configuration alone.
    ///
    /// # Errors
    /// Those of the files; as [`T5Encoder::load`].
    pub fn t5(&self, folder: &'static str, device: &Device, dtype: DType) -> Result<(T5Encoder, WeightReport)> {
        self.t5_of(folder, self.weights(folder, device, T5Encoder::dtype_for(dtype))?)
    }

    /// The same of these weights.
    pub(in crate::pipeline) fn t5_of(
        &self,
        folder: &'static str,
        store: WeightStore,
    ) -> Result<(T5Encoder, WeightReport)> {
        let config = self.t5_config(folder)?;
        load_part(folder, T5Encoder::prepared(store)?, |w| T5Encoder::from_weights(w, &config))
    }
}
