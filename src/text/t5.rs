//! T5's tokenizer: a unigram language model over pieces of words. Raffel et al. 2020, arXiv:1910.10683, sec. 3.2.3; Kudo 2018,
//! arXiv:1804.10959.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tokenizers::decoders::metaspace::Metaspace as Joining;
use tokenizers::models::unigram::Unigram;
use tokenizers::normalizers::Precompiled;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::whitespace::WhitespaceSplit;
use tokenizers::{AddedToken, PreTokenizerWrapper, Tokenizer};

use super::files::read_optional;
use super::t5_pieces::{Pieces, is_whole};
use crate::error::{Error, Result};

/// What stands for a space before a word.
const SPACE: char = '\u{2581}';

/// Tokens that the vocabulary of `spiece.model` does not hold and the model has rows for: `<extra_id_0>` has the last id of them.
const EXTRA_IDS: u64 = 100;

/// Prompt to token ids, equal to transformers' `T5Tokenizer` (version 5, the one on the `tokenizers` library), from
/// `tokenizer.json` or from sentencepiece's own `spiece.model`.
///
/// The text goes through the normaliser's table (NFKC and white space to spaces, in the published files), is cut at white space,
/// and each word with a mark before it becomes the pieces whose probabilities have the largest product. A special token that
/// stands in the prompt (`</s>`, `<extra_id_0>`) is that token, not text.
///
/// The sentencepiece library, on which transformers' older `T5Tokenizer` stood, differs on a few texts: it reads special tokens
/// as text, and looks for replacements at every character rather than in whole graphemes, of which the shortest prefix
/// that has one is taken here. This follows the library's current one, which published pipelines use.
#[derive(Clone)]
pub struct T5Tokenizer {
    tokenizer: Tokenizer,
    eos: u32,
    pad: u32,
    /// Ids must be below it: the rows of the text encoder's embedding.
    vocab_size: usize,
    /// The folder, for messages.
    name: String,
}

/// A prompt's ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct T5Encoding {
    /// The prompt's tokens, end token, padding.
    pub ids: Vec<u32>,
    /// How many of them stand before the padding.
    pub length: usize,
    /// The end of the prompt that did not fit, as text, when it was cut off. Worth a warning.
    pub truncated: Option<String>,
}

/// The files of a tokenizer folder, in memory. `None`: the folder does not have it.
#[derive(Clone, Copy, Debug, Default)]
pub struct T5TokenizerFiles<'a> {
    /// `tokenizer.json`, which wins: of it the vocabulary, the normaliser's table and the added tokens are used.
    pub tokenizer: Option<&'a [u8]>,
    /// `spiece.model`
    pub pieces: Option<&'a [u8]>,
    /// `tokenizer_config.json`
    pub config: Option<&'a [u8]>,
}

/// What the files say.
struct Description {
    /// That of the vocabulary.
    file: PathBuf,
    vocab: Vec<(String, f64)>,
    unk_id: usize,
    normalizer: Option<Precompiled>,
    /// Looked for in the text before anything else.
    added: BTreeMap<String, AddedToken>,
}

impl T5Tokenizer {
    /// Reads a `tokenizer_3/` folder: `tokenizer.json` or `spiece.model`, and where present tokenizer_config.json.
    ///
    /// # Errors
    /// [`Error::File`], [`Error::Io`]: a file is missing, unreadable, not what its name says.
    pub fn load(dir: &Path) -> Result<T5Tokenizer> {
        if !dir.is_dir() {
            let reason = "no such folder; a model directory holds the tokenizer of its T5 text encoder there (tokenizer.json or \
                          spiece.model)";
            return Err(Error::file(dir, reason));
        }
        let read = |name: &str| read_optional(&dir.join(name));
        let (tokenizer, pieces) = (read("tokenizer.json")?, read("spiece.model")?);
        let config = read("tokenizer_config.json")?;
        let files =
            T5TokenizerFiles { tokenizer: tokenizer.as_deref(), pieces: pieces.as_deref(), config: config.as_deref() };
        T5Tokenizer::from_bytes(dir, &files)
    }

    /// As [`load`](T5Tokenizer::load) from the folder `name` beside a single file, which holds none itself.
    ///
    /// # Errors
    /// [`Error::File`] naming `file` where there is no such folder; as [`load`](T5Tokenizer::load).
    pub fn beside(file: &Path, name: &str) -> Result<T5Tokenizer> {
        let folder = file.parent().unwrap_or(Path::new("")).join(name);
        if folder.is_dir() {
            return T5Tokenizer::load(&folder);
        }
        let reason = format!(
            "a single file holds no tokenizer of its T5 text encoder: put the folder {name} of the model's repository (tokenizer.json \
             or spiece.model) beside it"
        );
        Err(Error::file(file, reason))
    }

    /// From files that are in memory; `place` is the folder that errors name. Errors as [`load`](T5Tokenizer::load).
    pub fn from_bytes(place: &Path, files: &T5TokenizerFiles) -> Result<T5Tokenizer> {
        let config_file = place.join("tokenizer_config.json");
        let config = files.config.map_or(Ok(Map::new()), |bytes| object(&config_file, bytes))?;
        check_class(&config_file, &config)?;
        let extra_ids =
            config.get("extra_ids").map_or(Some(EXTRA_IDS), Value::as_u64).filter(|&count| count <= 1 << 16);
        let extra_ids = extra_ids.ok_or_else(|| Error::file(&config_file, "extra_ids is not a number up to 65536"))?;
        let mut description = match (files.tokenizer, files.pieces) {
            (Some(bytes), _) => Description::of_json(place.join("tokenizer.json"), bytes)?,
            (None, Some(bytes)) => Description::of_pieces(place.join("spiece.model"), bytes, extra_ids)?,
            (None, None) => {
                let reason = "tokenizer.json and spiece.model are missing; a T5 tokenizer needs one of them";
                return Err(Error::file(place, reason));
            }
        };
        let role = |name: &str, default: &str| special_token(&config_file, &config, name, default);
        let (eos, unk, pad) = (role("eos_token", "</s>")?, role("unk_token", "<unk>")?, role("pad_token", "<pad>")?);
        let extra = (0..extra_ids).map(|number| format!("<extra_id_{number}>"));
        for token in [eos.clone(), unk, pad.clone()].into_iter().chain(extra) {
            if description.vocab.iter().any(|(piece, _)| *piece == token) {
                let special = AddedToken::from(token.clone(), true).normalized(false);
                description.added.entry(token).or_insert(special);
            }
        }
        description.read_flags(&config_file, &config)?;
        let tokenizer = description.build()?;
        let id = |token: &str| {
            let missing = || Error::file(&description.file, format!("the vocabulary lacks the token {token:?}"));
            tokenizer.token_to_id(token).ok_or_else(missing)
        };
        let (eos, pad) = (id(&eos)?, id(&pad)?);
        Ok(T5Tokenizer { eos, pad, tokenizer, vocab_size: usize::MAX, name: place.display().to_string() })
    }

    /// Fits the tokenizer to its text encoder: [`encode`](T5Tokenizer::encode) will give no id that has no embedding.
    ///
    /// # Errors
    /// [`Error::Config`] when the end or padding id is not below `vocab_size`.
    pub fn fitted(mut self, vocab_size: usize) -> Result<T5Tokenizer> {
        self.vocab_size = vocab_size;
        self.check(&[self.eos, self.pad])?;
        Ok(self)
    }

    pub fn eos_id(&self) -> u32 {
        self.eos
    }

    pub fn pad_id(&self) -> u32 {
        self.pad
    }

    /// Ids of `text` with the end token, cut and padded to `length`.
    ///
    /// # Errors
    /// [`Error::Argument`]: a length of 0; [`Error::Config`]: a token beyond the text encoder's embeddings (see
    /// [`fitted`](T5Tokenizer::fitted)).
    pub fn encode(&self, text: &str, length: usize) -> Result<T5Encoding> {
        let (encoding, _) = self.encode_parts(&[(text, 1.0)], length)?;
        Ok(encoding)
    }

    /// The same for parts of a text one after the other, each read on its own, and the weights of all ids: those of the parts, 1 for
    /// end and padding.
    ///
    /// # Errors
    /// As [`encode`](T5Tokenizer::encode).
    pub fn encode_parts(&self, parts: &[(&str, f32)], length: usize) -> Result<(T5Encoding, Vec<f32>)> {
        if length == 0 {
            return Err(Error::argument("T5Tokenizer", "length", length, "room for the end token: 1 or more"));
        }
        let (mut ids, mut weights) = (Vec::new(), Vec::new());
        for &(text, weight) in parts {
            let failed =
                |error: tokenizers::Error| Error::config(&self.name, format!("cannot encode {text:?}: {error}"));
            ids.extend_from_slice(self.tokenizer.encode(text, false).map_err(failed)?.get_ids());
            weights.resize(ids.len(), weight);
        }
        self.check(&ids)?;
        let rest = ids.split_off(ids.len().min(length - 1));
        let failed = |error: tokenizers::Error| Error::config(&self.name, format!("cannot decode {rest:?}: {error}"));
        let truncated = match rest.is_empty() {
            true => None,
            false => Some(self.tokenizer.decode(&rest, false).map_err(failed)?.trim().to_string()),
        };
        weights.truncate(ids.len());
        ids.push(self.eos);
        let tokens = ids.len();
        ids.resize(length, self.pad);
        weights.resize(length, 1.0);
        Ok((T5Encoding { ids, length: tokens, truncated }, weights))
    }

    fn check(&self, ids: &[u32]) -> Result<()> {
        let Some(&id) = ids.iter().find(|&&id| id as usize >= self.vocab_size) else { return Ok(()) };
        let token = self.tokenizer.id_to_token(id).unwrap_or_default();
        let reason = format!(
            "the token {token:?} has id {id}, but the T5 text encoder's vocab_size is {}; the two do not belong together",
            self.vocab_size
        );
        Err(Error::config(&self.name, reason))
    }
}

impl Description {
    fn of_pieces(file: PathBuf, bytes: &[u8], extra_ids: u64) -> Result<Description> {
        let Pieces { mut pieces, symbols, unk_id, charsmap } = Pieces::parse(&file, bytes)?;
        let symbol = |id: usize| {
            let text = pieces[id].0.clone();
            (text.clone(), AddedToken::from(text, true).normalized(false))
        };
        let added = symbols.into_iter().map(symbol).collect();
        pieces.extend((0..extra_ids).rev().map(|number| (format!("<extra_id_{number}>"), 0.0)));
        let normalizer = if charsmap.is_empty() { None } else { Some(normalizer(&file, &charsmap)?) };
        Ok(Description { file, vocab: pieces, unk_id, normalizer, added })
    }

    fn of_json(file: PathBuf, bytes: &[u8]) -> Result<Description> {
        let json = object(&file, bytes)?;
        let wrong =
            |what: &str, want: &str| Error::file(&file, format!("{what} is not {want}: not a T5 tokenizer's file"));
        let model = json.get("model").and_then(Value::as_object).ok_or_else(|| wrong("model", "an object"))?;
        if model.get("type").is_some_and(|kind| kind != "Unigram") {
            return Err(wrong("model.type", "\"Unigram\""));
        }
        let piece = |entry: &Value| Some((entry.get(0)?.as_str()?.to_string(), entry.get(1)?.as_f64()?));
        let vocab = model.get("vocab").and_then(Value::as_array).map(|list| list.iter().map(piece).collect());
        let vocab: Option<Vec<(String, f64)>> = vocab.flatten();
        let vocab = vocab.ok_or_else(|| wrong("model.vocab", "a list of pieces with their scores"))?;
        let unk_id = model.get("unk_id").and_then(Value::as_u64);
        let unk_id = unk_id.ok_or_else(|| wrong("model.unk_id", "an id"))? as usize;
        let normalizer = match json.get("normalizer").and_then(charsmap_of) {
            None => None,
            Some(table) => {
                let bytes = table.as_str().and_then(from_base64);
                Some(normalizer(&file, &bytes.ok_or_else(|| wrong("precompiled_charsmap", "in Base64"))?)?)
            }
        };
        Ok(Description { file, vocab, unk_id, normalizer, added: BTreeMap::new() })
    }

    /// How tokens are looked for, where tokenizer_config.json says it (`added_tokens_decoder`).
    fn read_flags(&mut self, config_file: &Path, config: &Map<String, Value>) -> Result<()> {
        let Some(listed) = config.get("added_tokens_decoder").and_then(Value::as_object) else { return Ok(()) };
        for (id, token) in listed {
            let flag = |name: &str| token.get(name).and_then(Value::as_bool);
            let content = token.get("content").and_then(Value::as_str);
            let content = content.ok_or_else(|| {
                Error::file(config_file, format!("added_tokens_decoder: {id} has no text \"content\""))
            })?;
            let at = |piece: &(String, f64)| piece.0 == content;
            if self.vocab.iter().position(at).is_none_or(|found| found.to_string() != *id) {
                let reason = format!(
                    "added_tokens_decoder gives {content:?} the id {id}, which {} does not",
                    self.file.display()
                );
                return Err(Error::file(config_file, reason));
            }
            let special = flag("special").unwrap_or(false) || self.added.contains_key(content);
            let token = AddedToken::from(content, special)
                .single_word(flag("single_word").unwrap_or(false))
                .lstrip(flag("lstrip").unwrap_or(false))
                .rstrip(flag("rstrip").unwrap_or(false))
                .normalized(flag("normalized").unwrap_or(!special));
            self.added.insert(content.into(), token);
        }
        Ok(())
    }

    fn build(&self) -> Result<Tokenizer> {
        let broken = |error: tokenizers::Error| Error::file(&self.file, error.to_string());
        let model = Unigram::from(self.vocab.clone(), Some(self.unk_id), false).map_err(broken)?;
        let mut tokenizer = Tokenizer::new(model);
        tokenizer.with_normalizer(self.normalizer.clone());
        tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![
            PreTokenizerWrapper::WhitespaceSplit(WhitespaceSplit),
            PreTokenizerWrapper::Metaspace(Metaspace::new(SPACE, PrependScheme::Always, true)),
        ])));
        tokenizer.with_decoder(Some(Joining::new(SPACE, PrependScheme::Always, true)));
        let added: Vec<AddedToken> = self.added.values().cloned().collect();
        tokenizer.add_tokens(&added);
        Ok(tokenizer)
    }
}

fn normalizer(file: &Path, charsmap: &[u8]) -> Result<Precompiled> {
    let damaged = || Error::file(file, "the normaliser's table is damaged: download it again");
    if !is_whole(charsmap) {
        return Err(damaged());
    }
    Precompiled::from(charsmap).map_err(|_| damaged())
}

/// The table of the first `Precompiled` of a normaliser, which may be a sequence.
fn charsmap_of(normalizer: &Value) -> Option<&Value> {
    match normalizer.get("normalizers").and_then(Value::as_array) {
        Some(list) => list.iter().find_map(charsmap_of),
        None if normalizer.get("type")? == "Precompiled" => normalizer.get("precompiled_charsmap"),
        None => None,
    }
}

/// Base64 with padding: RFC 4648, sec. 4.
fn from_base64(text: &str) -> Option<Vec<u8>> {
    let digits = text.trim_end_matches('=').bytes().map(|digit| match digit {
        b'A'..=b'Z' => Some(digit - b'A'),
        b'a'..=b'z' => Some(digit - b'a' + 26),
        b'0'..=b'9' => Some(digit - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    });
    let digits: Vec<u8> = digits.collect::<Option<_>>()?;
    let group = |digits: &[u8]| {
        let bits = digits.iter().enumerate().fold(0, |bits, (i, &digit)| bits | u32::from(digit) << (18 - 6 * i));
        bits.to_be_bytes().into_iter().skip(1).take(digits.len() * 6 / 8)
    };
    Some(digits.chunks(4).flat_map(group).collect())
}

fn check_class(path: &Path, config: &Map<String, Value>) -> Result<()> {
    match config.get("tokenizer_class").and_then(Value::as_str) {
        None | Some("T5Tokenizer" | "T5TokenizerFast") => Ok(()),
        Some(class) => {
            let reason = format!("tokenizer_class is {class:?}; that of a T5 text encoder is \"T5Tokenizer\"");
            Err(Error::file(path, reason))
        }
    }
}

/// A special token by its role: a text, or an object with its text as `content`.
fn special_token(path: &Path, config: &Map<String, Value>, name: &str, default: &str) -> Result<String> {
    let text = match config.get(name) {
        None | Some(Value::Null) => Some(default),
        Some(value) => value.as_str().or_else(|| value.get("content")?.as_str()),
    };
    let text = text.filter(|text| !text.is_empty());
    text.map(String::from).ok_or_else(|| Error::file(path, format!("{name} is not a text")))
}

fn object(path: &Path, bytes: &[u8]) -> Result<Map<String, Value>> {
    serde_json::from_slice(bytes).map_err(|error| {
        let hint = if error.is_eof() { "; is the file complete?" } else { "" };
        Error::file(path, format!("not a JSON object: {error}{hint}"))
    })
}
