//! T5's tokenizer with its text encoder: prompts to hidden states of one length.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::super::memory::{LoadOptions, Role};
use super::super::resident::{Module, Resident};
use super::super::{ModelFiles, T5_LENGTH, TextOptions, WeightReport};
use super::PromptText;
use super::prompts::emphasized;
use crate::error::Result;
use crate::models::T5Encoder;
use crate::ops;
use crate::runtime::{DType, Device, Tensor};
use crate::text::{Part, Prompt, T5Encoding, T5Tokenizer};

/// T5 beside other text encoders, or on its own.
pub struct T5TextEncoder {
    /// `None` on the meta device and with random weights of a published model, where nobody reads the ids, and where there is no model.
    tokenizer: Option<T5Tokenizer>,
    /// `None`: the model has none, and its rows are zeros.
    model: Option<Resident<T5Encoder>>,
    padding: T5Padding,
    /// C
    width: usize,
    /// Where the results are, and in which dtype.
    device: Device,
    dtype: DType,
    /// Was said what is odd about the model?
    told: AtomicBool,
}

/// What becomes of the padding behind a prompt's tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum T5Padding {
    /// It is text like other text (SD 3).
    Read,
    /// No token attends to it within the encoder (DeepFloyd IF).
    Masked,
}

impl T5TextEncoder {
    /// The tokenizer and the model in these folders.
    ///
    /// # Errors
    /// Those of the files.
    pub fn open(
        files: &Arc<ModelFiles>,
        [tokenizer, folder]: [&'static str; 2],
        padding: T5Padding,
        options: &LoadOptions,
    ) -> Result<(T5TextEncoder, WeightReport)> {
        let config = files.t5_config(folder)?;
        let tokenizer = match options.device {
            Device::Meta(_) => None,
            // Random weights make noise of whatever they read.
            _ if files.is_published() => None,
            _ => Some(files.t5_tokenizer(tokenizer)?.fitted(config.vocab_size)?),
        };
        let (device, dtype) = (options.text_device().clone(), options.dtype);
        let outline = files.outline(folder, &device, T5Encoder::dtype_for(dtype))?;
        let (_, report) = files.t5_of(folder, outline)?;
        let (files, on) = (files.clone(), device.clone());
        let load = move || files.t5(folder, &on, dtype).map(|(model, _)| model);
        let model = Some(Resident::new(Role::Text, load));
        let told = AtomicBool::new(false);
        let encoder = T5TextEncoder { tokenizer, model, padding, width: config.d_model, device, dtype, told };
        Ok((encoder, report))
    }

    /// In place of a model that was left out to save memory: rows of `width` zeros, as SD 3's pipelines have it.
    pub fn missing(width: usize, options: &LoadOptions) -> T5TextEncoder {
        let (device, dtype) = (options.text_device().clone(), options.dtype);
        let (padding, told) = (T5Padding::Read, AtomicBool::new(false));
        T5TextEncoder { tokenizer: None, model: None, padding, width, device, dtype, told }
    }

    /// What has weights.
    pub fn module(&self) -> Option<&dyn Module> {
        self.model.as_ref().map(|model| model as &dyn Module)
    }

    /// C
    pub fn width(&self) -> usize {
        self.width
    }

    /// `[R, L, C]` with L = [`TextOptions::t5_length`], in the dtype of the run; a prompt's weights (syntax a1111) multiply its tokens' rows.
    /// `warn` is told what of a prompt is not read, and once what is odd about the model.
    ///
    /// # Errors
    /// Those of the tokenizer and the model.
    pub fn encode(&self, prompts: &[&PromptText], options: &TextOptions, warn: &mut dyn FnMut(&str)) -> Result<Tensor> {
        let length = options.t5_length.unwrap_or(T5_LENGTH);
        self.tell(warn);
        let Some(model) = &self.model else {
            return Tensor::zeros(&self.device, &[prompts.len(), length, self.width], self.dtype);
        };
        let (mut ids, mut lengths, mut weights) = (Vec::new(), Vec::new(), Vec::new());
        for prompt in prompts {
            let (encoding, of_prompt) = self.read(prompt, options, length)?;
            if let Some(rest) = &encoding.truncated {
                let what = prompt.kind();
                warn(&format!("the {what} is longer than T5's {length} tokens, and it does not read: {rest:?}"));
            }
            ids.push(encoding.ids);
            lengths.push(encoding.length);
            weights.push(of_prompt);
        }
        let lengths = (self.padding == T5Padding::Masked).then_some(&lengths[..]);
        let hidden = model.get()?.forward(&ids, lengths)?;
        let hidden = emphasized(hidden, &weights.iter().collect::<Vec<_>>())?;
        match hidden.dtype() == self.dtype {
            true => Ok(hidden),
            false => ops::scale_cast(&hidden, 1.0, 0.0, self.dtype, 1),
        }
    }

    /// The ids of a prompt and their weights.
    fn read(&self, prompt: &PromptText, options: &TextOptions, length: usize) -> Result<(T5Encoding, Vec<f32>)> {
        let Some(tokenizer) = &self.tokenizer else {
            return Ok((T5Encoding { ids: vec![0; length], length, truncated: None }, vec![1.0; length]));
        };
        let parsed = Prompt::parse(prompt.text.as_deref().unwrap_or_default(), options.syntax);
        let mut parts = Vec::new();
        for part in &parsed.parts {
            match part {
                Part::Text { text, weight } => parts.push((text.as_str(), *weight)),
                Part::Break => {} // T5 has no chunks that it could end
            }
        }
        tokenizer.encode_parts(&parts, length)
    }

    fn tell(&self, warn: &mut dyn FnMut(&str)) {
        let is_odd = self.model.is_none() || T5Encoder::dtype_for(self.dtype) != self.dtype;
        if !is_odd || self.told.swap(true, Ordering::Relaxed) {
            return;
        }
        match self.model {
            None => warn("the model has no T5 text encoder: what it would say of the prompt is zeros"),
            Some(_) => warn("the T5 text encoder runs in bf16, as it leaves the range of f16"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::models::{T5Config, WeightStore};
    use crate::text::{Syntax, T5TokenizerFiles, emphasize};

    /// A small T5 with 20 tokens, and a tokenizer whose first pieces they are.
    fn encoder(padding: T5Padding, dtype: DType) -> (T5TextEncoder, T5Tokenizer, T5Encoder) {
        let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/t5");
        let pieces = std::fs::read(data.join("tokenizer/plain.model")).unwrap();
        let files = T5TokenizerFiles { pieces: Some(&pieces), ..T5TokenizerFiles::default() };
        let tokenizer = T5Tokenizer::from_bytes(Path::new("tokenizer_3"), &files).unwrap().fitted(20).unwrap();
        let load = move || {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/t5/fp8");
            let config =
                T5Config::from_json("config.json", &std::fs::read_to_string(folder.join("config.json")).unwrap())?;
            let store = WeightStore::open(&folder, "model", &Device::cpu(), T5Encoder::dtype_for(dtype))?;
            T5Encoder::load(store, &config)
        };
        let model = load().unwrap();
        let encoder = T5TextEncoder {
            tokenizer: Some(tokenizer.clone()),
            model: Some(Resident::new(Role::Text, load)),
            padding,
            width: model.config().d_model,
            device: Device::cpu(),
            dtype,
            told: AtomicBool::new(false),
        };
        (encoder, tokenizer, model)
    }

    fn prompt(text: &str) -> PromptText {
        PromptText { text: Some(text.into()), negative: false }
    }

    fn encode(
        encoder: &T5TextEncoder,
        texts: &[&str],
        length: usize,
        syntax: Syntax,
    ) -> (Vec<f32>, Vec<usize>, Vec<String>) {
        let prompts: Vec<PromptText> = texts.iter().map(|text| prompt(text)).collect();
        let options = TextOptions { t5_length: Some(length), syntax, ..TextOptions::default() };
        let mut heard = Vec::new();
        let all: Vec<&PromptText> = prompts.iter().collect();
        let hidden = encoder.encode(&all, &options, &mut |message| heard.push(message.to_string())).unwrap();
        assert_eq!(hidden.dtype(), encoder.dtype);
        (hidden.to_f32_vec().unwrap(), hidden.shape().to_vec(), heard)
    }

    #[test]
    fn prompts_are_padded_to_the_length_and_encoded() {
        for padding in [T5Padding::Read, T5Padding::Masked] {
            let (encoder, tokenizer, model) = encoder(padding, DType::F32);
            let texts = ["a ground", "on a ground, on a ground"];
            let (got, shape, heard) = encode(&encoder, &texts, 7, Syntax::Plain);
            let read = texts.map(|text| tokenizer.encode(text, 7).unwrap());
            let (ids, lengths) = (read.clone().map(|read| read.ids), read.clone().map(|read| read.length));
            let lengths = (padding == T5Padding::Masked).then_some(&lengths[..]);
            assert_eq!(got, model.forward(&ids, lengths).unwrap().to_f32_vec().unwrap());
            assert_eq!(shape, [2, 7, encoder.width()]);
            let [told] = &heard[..] else { panic!("{heard:?}") };
            assert_eq!(read[1].truncated.as_deref(), Some("ground"));
            assert_eq!(told, "the prompt is longer than T5's 7 tokens, and it does not read: \"ground\"");
        }
    }

    #[test]
    fn weights_of_words_multiply_their_rows() {
        let (encoder, tokenizer, model) = encoder(T5Padding::Read, DType::F32);
        let (got, ..) = encode(&encoder, &["a (ground:1.5) BREAK on"], 6, Syntax::A1111);
        let (read, weights) = tokenizer.encode_parts(&[("a ", 1.0), ("ground", 1.5), ("on", 1.0)], 6).unwrap();
        assert_eq!(weights, [1.0, 1.5, 1.0, 1.0, 1.0, 1.0]);
        let mut want = model.forward(&[read.ids], None).unwrap().to_f32_vec().unwrap();
        emphasize(&mut want, [6, encoder.width()], &weights).unwrap();
        assert_eq!(got, want);
    }

    #[test]
    fn what_is_odd_about_the_model_is_said_once() {
        let (narrow, _, model) = encoder(T5Padding::Read, DType::F16);
        assert_eq!(model.dtype(), DType::BF16);
        let missing = T5TextEncoder::missing(16, &LoadOptions::new(Device::cpu(), DType::F16));
        assert!(missing.module().is_none() && narrow.module().is_some());
        for (encoder, word) in [(&narrow, "bf16"), (&missing, "zeros")] {
            let (values, shape, heard) = encode(encoder, &["a", "on a ground"], 5, Syntax::Plain);
            assert_eq!(shape, [2, 5, 16]);
            assert_eq!(values.iter().all(|&value| value == 0.0), word == "zeros");
            assert!(heard.len() == 1 && heard[0].contains(word), "{heard:?}");
            assert!(encode(encoder, &["a"], 5, Syntax::Plain).2.is_empty());
        }
    }
}
