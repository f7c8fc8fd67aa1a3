//! CLIP's tokenizer: lower-cased text, byte-level BPE with an end-of-word mark. Radford et al. 2021, arXiv:2103.00020,
//! sec. 2.4; Sennrich et al. 2016, arXiv:1508.07909.

use std::path::Path;

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::{Lowercase, NFC, Replace, replace::ReplacePattern};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::roberta::RobertaProcessing;
use tokenizers::{NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer};

use super::files::{Description, TokenizerFiles, read_optional};
use super::textual_inversion::LearnedWords;
use crate::error::{Error, Result};

/// Words, one digit at a time, runs of anything else but white space; contractions and the special tokens whole.
const SPLIT: &str = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
const END_OF_WORD: &str = "</w>";
/// Length when neither the tokenizer's config nor the text encoder gives one: CLIP's context.
const DEFAULT_LENGTH: usize = 77;

/// Prompt to token ids, equal to transformers' `CLIPTokenizer` (version 5, the one on the `tokenizers` library).
///
/// The text is brought to NFC, white-space runs become one space, letters lower case; then it is split and each piece
/// becomes byte-level BPE tokens, the last of a piece ending in `</w>`. A special token that stands in the prompt
/// (`<|endoftext|>`; in SD 2.x also `!`, its padding token) is that token, not text: so has transformers.
///
/// The older pure-Python `CLIPTokenizer` differs without `ftfy` on a few texts: it puts spaces around CJK characters and
/// drops control characters. This follows the library's current one.
#[derive(Clone)]
pub struct ClipTokenizer {
    tokenizer: Tokenizer,
    max_length: Option<usize>,
    bos: u32,
    eos: u32,
    pad: u32,
    pad_left: bool,
    /// Ids must be below it: the rows of the text encoder's embedding.
    vocab_size: usize,
    /// The folder, for messages.
    name: String,
    learned: Vec<LearnedWord>,
}

/// A word of textual inversion as the tokenizer knows it.
#[derive(Clone)]
pub(super) struct LearnedWord {
    pub word: String,
    /// The ids of the word's own text, by which webui finds it.
    pub tokens: Vec<u32>,
    /// Its first row among the learned ones, and how many it has.
    first: u32,
    rows: u32,
}

/// A prompt's ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoding {
    /// Start token, the prompt's tokens, end token, padding: [`ClipTokenizer::max_length`] ids.
    pub ids: Vec<u32>,
    /// The end of the prompt that did not fit, as text, when it was cut off. Worth a warning.
    pub truncated: Option<String>,
}

impl ClipTokenizer {
    /// Reads a `tokenizer/` folder: `vocab.json` and `merges.txt`, or `tokenizer.json` (which wins), and where present
    /// tokenizer_config.json, special_tokens_map.json and added_tokens.json.
    ///
    /// # Errors
    /// [`Error::File`], [`Error::Io`]: a file is missing, unreadable, not what its name says, or contradicts another.
    pub fn load(dir: &Path) -> Result<ClipTokenizer> {
        if !dir.is_dir() {
            let reason = "no such folder; a model directory holds its tokenizer there (vocab.json and merges.txt, or \
                          tokenizer.json)";
            return Err(Error::file(dir, reason));
        }
        let read = |name: &str| read_optional(&dir.join(name));
        let (vocab, merges, tokenizer) = (read("vocab.json")?, read("merges.txt")?, read("tokenizer.json")?);
        let (config, special_tokens_map) = (read("tokenizer_config.json")?, read("special_tokens_map.json")?);
        let added_tokens = read("added_tokens.json")?;
        ClipTokenizer::from_bytes(
            dir,
            &TokenizerFiles {
                vocab: vocab.as_deref(),
                merges: merges.as_deref(),
                tokenizer: tokenizer.as_deref(),
                config: config.as_deref(),
                special_tokens_map: special_tokens_map.as_deref(),
                added_tokens: added_tokens.as_deref(),
            },
        )
    }

    /// From files that are in memory; `place` is the folder that errors name. Errors as [`load`](ClipTokenizer::load).
    pub fn from_bytes(place: &Path, files: &TokenizerFiles) -> Result<ClipTokenizer> {
        let d = Description::parse(place, files)?;
        let broken = |error: tokenizers::Error| Error::file(&d.vocab_file, error.to_string());
        let vocab: Vocab = d.vocab.iter().map(|(token, id)| (token.clone(), *id)).collect();
        let model = BPE::builder()
            .vocab_and_merges(vocab, d.merges.clone())
            .continuing_subword_prefix(String::new())
            .end_of_word_suffix(END_OF_WORD.into())
            .unk_token(d.unk.clone())
            .build()
            .map_err(broken)?;
        let mut tokenizer = Tokenizer::new(model);
        let spaces = Replace::new(ReplacePattern::Regex(r"\s+".into()), " ").map_err(broken)?;
        tokenizer.with_normalizer(Some(tokenizers::normalizers::Sequence::new(vec![
            NormalizerWrapper::NFC(NFC),
            NormalizerWrapper::Replace(spaces),
            NormalizerWrapper::Lowercase(Lowercase),
        ])));
        let split = Split::new(SplitPattern::Regex(SPLIT.into()), SplitDelimiterBehavior::Removed, true);
        tokenizer.with_pre_tokenizer(Some(tokenizers::pre_tokenizers::sequence::Sequence::new(vec![
            PreTokenizerWrapper::Split(split.map_err(broken)?),
            PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, true)),
        ])));
        tokenizer.with_decoder(Some(ByteLevel::default()));
        let added: Vec<_> = d.added.iter().map(|(token, _)| token.clone()).collect();
        tokenizer.add_tokens(&added);

        let id = |text: &str| {
            tokenizer.token_to_id(text).ok_or_else(|| Error::file(&d.config_file, format!("{text:?} has no id")))
        };
        for (token, claimed) in &d.added {
            let got = id(&token.content)?;
            if claimed.is_some_and(|claimed| claimed != got) {
                let reason = format!(
                    "the added token {:?} is listed with id {}, but its id is {got} in this vocabulary",
                    token.content,
                    claimed.unwrap_or_default()
                );
                return Err(Error::file(&d.config_file, reason));
            }
        }
        let (bos, eos, pad) = (id(&d.bos)?, id(&d.eos)?, id(&d.pad)?);
        let ends = RobertaProcessing::new((d.eos.clone(), eos), (d.bos.clone(), bos));
        tokenizer.with_post_processor(Some(ends.trim_offsets(false).add_prefix_space(false)));
        let (max_length, pad_left, name) = (d.max_length, d.pad_left, place.display().to_string());
        Ok(ClipTokenizer {
            tokenizer,
            max_length,
            bos,
            eos,
            pad,
            pad_left,
            vocab_size: usize::MAX,
            name,
            learned: Vec::new(),
        })
    }

    /// Fits the tokenizer to its text encoder: the length becomes at most `max_positions` (exactly that when the config
    /// gave none), and [`encode`](ClipTokenizer::encode) will give no id that has no embedding.
    ///
    /// # Errors
    /// [`Error::Config`] when the start, end or padding id is not below `vocab_size`.
    pub fn fitted(mut self, vocab_size: usize, max_positions: usize) -> Result<ClipTokenizer> {
        self.max_length = Some(self.max_length.unwrap_or(max_positions).min(max_positions));
        self.vocab_size = vocab_size;
        self.check(&[self.bos, self.eos, self.pad])?;
        Ok(self)
    }

    /// Knows the words of textual inversion from here on, in [`encode_chunks`](ClipTokenizer::encode_chunks): row k of
    /// their table is the id `vocab_size + k`. To be called after [`fitted`](ClipTokenizer::fitted).
    ///
    /// # Errors
    /// [`Error::Config`]: the tokenizer is not fitted, or a word has more vectors than a prompt has room for.
    pub fn with_learned_words(mut self, words: &LearnedWords) -> Result<ClipTokenizer> {
        if self.vocab_size > u32::MAX as usize / 2 {
            let reason = "learned words need the text encoder's vocab_size; call fitted first";
            return Err(Error::config(&self.name, reason));
        }
        let (room, mut first) = (self.max_length() - 2, 0);
        let mut learned = Vec::new();
        for (word, rows) in words.words() {
            if *rows > room {
                let reason =
                    format!("the learned word {word:?} has {rows} vectors; a prompt has room for {room} tokens");
                return Err(Error::config(&self.name, reason));
            }
            let rows = *rows as u32;
            learned.push(LearnedWord { word: word.clone(), tokens: self.tokens(word)?, first, rows });
            first += rows;
        }
        self.learned = learned;
        Ok(self)
    }

    pub(super) fn learned_words(&self) -> &[LearnedWord] {
        &self.learned
    }

    /// A learned word, its first id and the number of its ids.
    pub(super) fn learned(&self, index: usize) -> (&String, u32, u32) {
        let word = &self.learned[index];
        (&word.word, self.vocab_size as u32 + word.first, word.rows)
    }

    /// The learned word that has `id`.
    pub(super) fn learned_of(&self, id: u32) -> Option<&str> {
        let row = (id as usize).checked_sub(self.vocab_size)? as u32;
        let word = self.learned.iter().find(|word| (word.first..word.first + word.rows).contains(&row));
        word.map(|word| word.word.as_str())
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn pads_left(&self) -> bool {
        self.pad_left
    }

    pub(super) fn token_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// Ids of `text` without start and end. A token beyond the text encoder's embeddings is an error here, before the
    /// learned words' ids, which are beyond them too, come in.
    pub(super) fn tokens(&self, text: &str) -> Result<Vec<u32>> {
        let failed = |error: tokenizers::Error| Error::config(&self.name, format!("cannot encode {text:?}: {error}"));
        let ids = self.tokenizer.encode(text, false).map_err(failed)?.get_ids().to_vec();
        self.check(&ids)?;
        Ok(ids)
    }

    /// Ids as text, a space after each word.
    pub(super) fn decoded(&self, ids: &[u32]) -> Result<String> {
        let failed = |error: tokenizers::Error| Error::config(&self.name, format!("cannot decode {ids:?}: {error}"));
        Ok(self.tokenizer.decode(ids, false).map_err(failed)?.replace(END_OF_WORD, " "))
    }

    fn check(&self, ids: &[u32]) -> Result<()> {
        match ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            None => Ok(()),
            Some(&id) => {
                let token = self.tokenizer.id_to_token(id).unwrap_or_default();
                let reason = format!(
                    "the token {token:?} has id {id}, but the text encoder's vocab_size is {}; tokenizer and text_encoder \
                     do not belong together",
                    self.vocab_size
                );
                Err(Error::config(&self.name, reason))
            }
        }
    }

    /// Ids of every encoding.
    pub fn max_length(&self) -> usize {
        self.max_length.unwrap_or(DEFAULT_LENGTH)
    }

    pub fn bos_id(&self) -> u32 {
        self.bos
    }

    pub fn eos_id(&self) -> u32 {
        self.eos
    }

    pub fn pad_id(&self) -> u32 {
        self.pad
    }

    /// Ids of `text`, cut and padded to [`max_length`](ClipTokenizer::max_length).
    ///
    /// # Errors
    /// [`Error::Config`]: the text has a byte for which the vocabulary has neither a token nor an unknown token, or a
    /// token beyond the text encoder's embeddings (see [`fitted`](ClipTokenizer::fitted)).
    pub fn encode(&self, text: &str) -> Result<Encoding> {
        let failed = |error: tokenizers::Error| Error::config(&self.name, format!("cannot encode {text:?}: {error}"));
        let mut ids = self.tokenizer.encode(text, true).map_err(failed)?.get_ids().to_vec();
        let length = self.max_length();
        let mut truncated = None;
        if ids.len() > length {
            truncated = Some(self.decoded(&ids[length - 1..ids.len() - 1])?.trim_matches(is_space).to_string());
            ids.truncate(length - 1);
            ids.push(self.eos);
        }
        self.check(&ids)?;
        let padding = vec![self.pad; length - ids.len()];
        let at = if self.pad_left { 0 } else { ids.len() };
        ids.splice(at..at, padding);
        Ok(Encoding { ids, truncated })
    }
}

/// White space as Python's `strip` has it: the four separators U+001C to U+001F too.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}
