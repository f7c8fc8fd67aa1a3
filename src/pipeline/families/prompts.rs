//! A CLIP tokenizer with its text encoder: prompts to hidden states, in chunks of the encoder's context.

use std::sync::Arc;

use super::super::memory::{LoadOptions, Role};
use super::super::resident::{Module, Resident};
use super::super::{ModelFiles, TextOptions, WeightReport};
use super::{PromptText, misfit};
use crate::error::{Error, Result};
use crate::models::{ClipOutput, ClipTextModel};
use crate::runtime::{Device, Tensor};
use crate::text::{Chunks, ClipTokenizer, Encoder, LearnedWords, Prompt, Syntax, emphasize, syntax_hint};

pub struct TextEncoder {
    /// `None` on the meta device, where nobody reads the ids.
    pub tokenizer: Option<ClipTokenizer>,
    /// Ids of a chunk, padding included.
    pub tokens: usize,
    /// Its layers.
    layers: usize,
    pub model: Resident<ClipTextModel>,
}

/// What the encoder says of R prompts of c chunks of L tokens.
pub struct EncodedText {
    /// `[R, c L, C]`
    pub hidden: Tensor,
    /// The projection of each prompt's first chunk, `[R, P]`, if asked for; of an encoder that has none the pooled output itself.
    pub projected: Option<Tensor>,
}

impl TextEncoder {
    /// The tokenizer and the model in these folders; they know the words of textual inversion.
    ///
    /// # Errors
    /// Those of the files; as [`LearnedWords::new`].
    pub fn open(
        files: &Arc<ModelFiles>,
        [tokenizer, folder]: [&'static str; 2],
        kind: Encoder,
        options: &LoadOptions,
    ) -> Result<(TextEncoder, WeightReport)> {
        let config = files.clip_config(folder)?;
        let words = LearnedWords::new(files.embeddings(), kind, config.hidden_size)?;
        let (tokenizer, tokens) = match options.device {
            Device::Meta(_) => (None, config.max_position_embeddings),
            _ => {
                let fitted = files.tokenizer(tokenizer)?.fitted(config.vocab_size, config.max_position_embeddings)?;
                let tokenizer = fitted.with_learned_words(&words)?;
                let tokens = tokenizer.max_length();
                (Some(tokenizer), tokens)
            }
        };
        let (_, report) = files.clip_of(folder, files.outline(folder, options.text_device(), options.dtype)?)?;
        let layers = config.num_hidden_layers;
        let (files, device, dtype) = (files.clone(), options.text_device().clone(), options.dtype);
        let load = move || {
            let (model, _) = files.clip(folder, &device, dtype)?;
            let (rows, [count, _]) = words.table();
            if count > 0 { model.with_learned(rows, count) } else { Ok(model) }
        };
        Ok((TextEncoder { tokenizer, tokens, layers, model: Resident::new(Role::Text, load) }, report))
    }

    fn read(&self, prompt: &PromptText, options: &TextOptions) -> Result<(Chunks, Prompt)> {
        let parsed = Prompt::parse(prompt.text.as_deref().unwrap_or_default(), options.syntax);
        let chunks = match &self.tokenizer {
            Some(tokenizer) => tokenizer.encode_chunks(&parsed, options.long_prompt)?,
            None => {
                let (ids, weights) = (vec![vec![0; self.tokens]], vec![vec![1.0; self.tokens]]);
                Chunks { ids, weights, truncated: None, learned: Vec::new() }
            }
        };
        Ok((chunks, parsed))
    }

    /// Chunks of a prompt.
    ///
    /// # Errors
    /// Those of the tokenizer.
    pub fn chunks(&self, prompt: &PromptText, options: &TextOptions) -> Result<usize> {
        Ok(self.read(prompt, options)?.0.ids.len())
    }

    /// Words of textual inversion in a prompt.
    ///
    /// # Errors
    /// Those of the tokenizer.
    pub fn learned(&self, prompt: &PromptText, options: &TextOptions) -> Result<Vec<String>> {
        Ok(self.read(prompt, options)?.0.learned)
    }

    /// `warn` is told what of a prompt is not read, or is read as words.
    ///
    /// # Errors
    /// Those of the tokenizer and the model; [`Error::Request`]: a clip skip that the model has no layer for.
    pub fn encode(
        &self,
        prompts: &[&PromptText],
        options: &TextOptions,
        output: ClipOutput,
        warn: &mut dyn FnMut(&str),
    ) -> Result<EncodedText> {
        let layers = self.layers;
        let hidden = options.clip_skip.unwrap_or(output.hidden);
        if options.clip_skip.is_some_and(|hidden| !(1..=layers).contains(&hidden)) {
            let (field, value) = ("text.clip_skip", hidden.to_string());
            let reason = format!("expected 1 (the last layer) to {layers}, the layers of the text encoder");
            return Err(Error::Request { field, value, reason });
        }
        let mut all = Vec::new();
        for prompt in prompts {
            let (chunks, parsed) = self.read(prompt, options)?;
            self.tell(prompt, options, &chunks, &parsed, warn);
            all.push(chunks);
        }
        let count = all.iter().map(|chunks| chunks.ids.len()).max().unwrap_or(1);
        if let Some(tokenizer) = &self.tokenizer {
            all.iter_mut().for_each(|chunks| tokenizer.pad_chunks(chunks, count));
        }
        let ids: Vec<Vec<u32>> = all.iter().flat_map(|chunks| chunks.ids.iter().cloned()).collect();
        let encoded = self.model.get()?.forward(&ids, ClipOutput { hidden, ..output })?;
        let [rows, length, width] = encoded.hidden.dims("text", "hidden")?;
        let weights: Vec<&Vec<f32>> = all.iter().flat_map(|chunks| &chunks.weights).collect();
        let hidden = emphasized(encoded.hidden, &weights)?.reshape(&[rows / count, count * length, width])?;
        let first = |projected: Tensor| -> Result<Tensor> {
            let rows = (0..rows / count).map(|row| projected.rows(row * count..row * count + 1));
            Tensor::concat(&rows.collect::<Result<Vec<_>>>()?)
        };
        let projected = match encoded.projected.or(encoded.pooled) {
            Some(projected) if count > 1 => Some(first(projected)?),
            projected => projected,
        };
        Ok(EncodedText { hidden, projected })
    }

    fn tell(
        &self,
        prompt: &PromptText,
        options: &TextOptions,
        chunks: &Chunks,
        parsed: &Prompt,
        warn: &mut dyn FnMut(&str),
    ) {
        let what = prompt.kind();
        parsed.warnings.iter().for_each(|warning| warn(&format!("the {what}: {warning}")));
        if let Some(rest) = &chunks.truncated {
            warn(&format!("the {what} is longer than the model's {} tokens; not read: {rest:?}", self.tokens));
        }
        let text = prompt.text.as_deref().unwrap_or_default();
        if options.syntax == Syntax::Plain
            && let Some(piece) = syntax_hint(text)
        {
            warn(&format!(
                "the {what} has {piece:?}, which is read as words; request.text.syntax a1111 gives it its meaning"
            ));
        }
    }
}

/// Two text encoders that read the same prompts, and whose hidden states lie side by side: CLIP ViT-L and OpenCLIP bigG.
pub struct ClipPair([TextEncoder; 2]);

/// What a pair says of R prompts of c chunks of L tokens.
pub struct EncodedPair {
    /// `[R, c L, C of both]`
    pub hidden: Tensor,
    /// As [`EncodedText::projected`], of each.
    pub projected: [Option<Tensor>; 2],
}

impl ClipPair {
    /// Those in `tokenizer` and `text_encoder`, and in `tokenizer_2` and `text_encoder_2`.
    ///
    /// # Errors
    /// As [`TextEncoder::open`]; [`Error::Config`]: they read prompts of other lengths.
    pub fn open(files: &Arc<ModelFiles>, options: &LoadOptions) -> Result<(ClipPair, [WeightReport; 2])> {
        let (first, second) = (["tokenizer", "text_encoder"], ["tokenizer_2", "text_encoder_2"]);
        let (first, first_report) = TextEncoder::open(files, first, Encoder::ClipL, options)?;
        let (second, second_report) = TextEncoder::open(files, second, Encoder::ClipG, options)?;
        if first.tokens != second.tokens {
            let reason =
                format!("tokenizer gives {} tokens, tokenizer_2 {}; they must be equal", first.tokens, second.tokens);
            return misfit(files, reason);
        }
        Ok((ClipPair([first, second]), [first_report, second_report]))
    }

    pub fn modules(&self) -> impl Iterator<Item = &dyn Module> {
        self.0.iter().map(|encoder| &encoder.model as &dyn Module)
    }

    /// As [`TextEncoder::chunks`]. The tokenizers differ in their padding alone.
    ///
    /// # Errors
    /// Those of the tokenizers.
    pub fn chunks(&self, prompt: &PromptText, options: &TextOptions) -> Result<usize> {
        let [first, second] = &self.0;
        Ok(first.chunks(prompt, options)?.max(second.chunks(prompt, options)?))
    }

    /// As [`TextEncoder::learned`]. Both find the same words.
    ///
    /// # Errors
    /// Those of the tokenizer.
    pub fn learned(&self, prompt: &PromptText, options: &TextOptions) -> Result<Vec<String>> {
        self.0[0].learned(prompt, options)
    }

    /// As [`TextEncoder::encode`]; `outputs`: of each.
    ///
    /// # Errors
    /// As [`TextEncoder::encode`].
    pub fn encode(
        &self,
        prompts: &[&PromptText],
        options: &TextOptions,
        outputs: [ClipOutput; 2],
        warn: &mut dyn FnMut(&str),
    ) -> Result<EncodedPair> {
        let [first, second] = &self.0;
        let first = first.encode(prompts, options, outputs[0], warn)?;
        // What there is to say was said.
        let second = second.encode(prompts, options, outputs[1], &mut |_| {})?;
        let hidden = Tensor::concat_channels(&first.hidden, &second.hidden)?;
        Ok(EncodedPair { hidden, projected: [first.projected, second.projected] })
    }
}

/// `hidden: [chunks of all prompts, L, C]` with each token times its weight, the mean of each chunk kept; the same tensor
/// where every weight is 1. `weights`: L for each chunk.
pub fn emphasized(hidden: Tensor, weights: &[&Vec<f32>]) -> Result<Tensor> {
    if weights.iter().all(|weights| weights.iter().all(|&weight| weight == 1.0)) {
        return Ok(hidden);
    }
    let [_, length, width] = hidden.dims("text", "hidden")?;
    let mut values = hidden.to_f32_vec()?;
    for (chunk, weights) in values.chunks_exact_mut((length * width).max(1)).zip(weights) {
        if weights.iter().any(|&weight| weight != 1.0) {
            emphasize(chunk, [length, width], weights)?;
        }
    }
    Tensor::from_f32(hidden.device(), hidden.shape(), hidden.dtype(), &values)
}
