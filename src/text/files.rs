//! What a `tokenizer/` folder says: vocabulary, merges, special and added tokens, lengths.
//!
//! Two generations of files are in use: `vocab.json` + `merges.txt` beside `special_tokens_map.json`, and `tokenizer.json`.
//! Where both are present `tokenizer.json` wins, and `added_tokens_decoder` in tokenizer_config.json replaces what
//! special_tokens_map.json, added_tokens.json and tokenizer.json say of added tokens, as transformers has it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};
use tokenizers::AddedToken;

use crate::error::{Error, Result};

/// The files of a tokenizer folder, in memory. `None`: the folder does not have it.
#[derive(Clone, Copy, Debug, Default)]
pub struct TokenizerFiles<'a> {
    /// `vocab.json`: token to id. Together with `merges`, or `tokenizer` instead of both.
    pub vocab: Option<&'a [u8]>,
    /// `merges.txt`: a pair of tokens a line, best first.
    pub merges: Option<&'a [u8]>,
    /// `tokenizer.json`: of it the vocabulary, the merges and the added tokens are used.
    pub tokenizer: Option<&'a [u8]>,
    /// `tokenizer_config.json`
    pub config: Option<&'a [u8]>,
    /// `special_tokens_map.json`
    pub special_tokens_map: Option<&'a [u8]>,
    /// `added_tokens.json`: token to id.
    pub added_tokens: Option<&'a [u8]>,
}

/// The bytes of a file that need not be there.
pub fn read_optional(path: &Path) -> Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(path, error)),
    }
}

/// A special token's role and its value when no file names it. In the order in which transformers adds them.
const ROLES: [(&str, Option<&str>); 7] = [
    ("bos_token", Some("<|startoftext|>")),
    ("eos_token", Some("<|endoftext|>")),
    ("unk_token", Some("<|endoftext|>")),
    ("sep_token", None),
    ("pad_token", Some("<|endoftext|>")),
    ("cls_token", None),
    ("mask_token", None),
];

/// A `model_max_length` above this is the sentinel of "not set" (transformers writes 1e30).
const LARGEST_LENGTH: f64 = 1e6;

/// Everything the tokenizer is built from.
pub(super) struct Description {
    pub vocab: Vocab,
    pub merges: Merges,
    pub bos: String,
    pub eos: String,
    pub unk: String,
    pub pad: String,
    /// In the order in which they get their ids; the id is what the files claim it will be.
    pub added: Vec<(AddedToken, Option<u32>)>,
    pub max_length: Option<usize>,
    pub pad_left: bool,
    /// The file that holds the vocabulary, for messages.
    pub vocab_file: PathBuf,
    pub config_file: PathBuf,
}

/// A special token as a file names it: its text alone, or with the flags of how it is found in a text.
#[derive(Clone, Deserialize)]
#[serde(untagged)]
enum SpecialToken {
    Text(String),
    Object(TokenObject),
}

#[derive(Clone, Deserialize)]
struct TokenObject {
    content: String,
    id: Option<u32>,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    /// Is the token looked for in the normalised (lower-case) text? Default: unless it is special.
    normalized: Option<bool>,
    #[serde(default)]
    special: bool,
}

impl TokenObject {
    fn token(&self, special: bool) -> AddedToken {
        AddedToken::from(self.content.clone(), special)
            .single_word(self.single_word)
            .lstrip(self.lstrip)
            .rstrip(self.rstrip)
            .normalized(self.normalized.unwrap_or(!special))
    }
}

impl SpecialToken {
    fn content(&self) -> &str {
        match self {
            SpecialToken::Text(text) => text,
            SpecialToken::Object(object) => &object.content,
        }
    }

    fn token(&self) -> AddedToken {
        match self {
            SpecialToken::Text(text) => AddedToken::from(text.clone(), true).normalized(false),
            SpecialToken::Object(object) => object.token(true).normalized(object.normalized.unwrap_or(!object.special)),
        }
    }
}

impl Description {
    /// `place`: the folder, or the name of the embedded model; it stands in errors.
    pub fn parse(place: &Path, files: &TokenizerFiles) -> Result<Description> {
        let config_file = place.join("tokenizer_config.json");
        let config = match files.config {
            Some(bytes) => object(&config_file, bytes)?,
            None => Map::new(),
        };
        check_class(&config_file, &config)?;
        let json_file = place.join("tokenizer.json");
        let json = files.tokenizer.map(|bytes| object(&json_file, bytes)).transpose()?;
        let (vocab_file, vocab, merges) = match &json {
            Some(json) => {
                let (vocab, merges) = model_of(&json_file, json)?;
                (json_file.clone(), vocab, merges)
            }
            None => vocab_and_merges(place, files)?,
        };
        check_vocab(&vocab_file, &vocab, &merges)?;
        let special = Specials::parse(place, files, &config_file, &config, &json_file, json.as_ref())?;
        let role = |name: &str| special.role(name).map_or_else(String::new, |token| token.content().to_string());
        Ok(Description {
            bos: role("bos_token"),
            eos: role("eos_token"),
            unk: role("unk_token"),
            pad: role("pad_token"),
            added: special.added(),
            max_length: max_length(&config_file, &config)?,
            pad_left: pad_left(&config_file, &config, json.as_ref())?,
            vocab,
            merges,
            vocab_file,
            config_file,
        })
    }
}

/// The special tokens by role and the added tokens that the files list.
struct Specials {
    roles: HashMap<String, SpecialToken>,
    /// `additional_special_tokens` / `extra_special_tokens`.
    extra: Vec<SpecialToken>,
    /// Listed with an id, in the order of the ids.
    listed: Vec<(AddedToken, u32)>,
}

impl Specials {
    fn parse(
        place: &Path,
        files: &TokenizerFiles,
        config_file: &Path,
        config: &Map<String, Value>,
        json_file: &Path,
        json: Option<&Map<String, Value>>,
    ) -> Result<Specials> {
        let mut special = Specials { roles: HashMap::new(), extra: Vec::new(), listed: Vec::new() };
        for (name, default) in ROLES {
            if let Some(default) = default {
                special.roles.insert(name.into(), SpecialToken::Text(default.into()));
            }
        }
        special.read_roles(config_file, config)?;
        special.read_extra(config_file, config, "additional_special_tokens")?;
        special.read_extra(config_file, config, "extra_special_tokens")?;
        if let Some(listed) = config.get("added_tokens_decoder").filter(|value| !value.is_null()) {
            let listed: HashMap<u32, TokenObject> = typed(config_file, "added_tokens_decoder", listed)?;
            special.listed = listed.into_iter().map(|(id, object)| (object.token(object.special), id)).collect();
        } else {
            let map_file = place.join("special_tokens_map.json");
            let map = match files.special_tokens_map {
                Some(bytes) => object(&map_file, bytes)?,
                None => Map::new(),
            };
            special.read_roles(&map_file, &map)?;
            special.read_extra(&map_file, &map, "extra_special_tokens")?;
            if let Some(bytes) = files.added_tokens {
                let path = place.join("added_tokens.json");
                let tokens: HashMap<String, u32> = parse_json(&path, bytes)?;
                for (text, id) in tokens {
                    let named = special.roles.values().chain(&special.extra).any(|token| token.content() == text);
                    special.listed.push((AddedToken::from(text, named), id));
                }
            }
            // Only now: the older name in this file does not make a token of added_tokens.json special.
            if special.extra.is_empty() {
                special.read_extra(&map_file, &map, "additional_special_tokens")?;
            }
            if let Some(tokens) = json.and_then(|json| json.get("added_tokens")) {
                let tokens: Vec<TokenObject> = typed(json_file, "added_tokens", tokens)?;
                for object in tokens {
                    let id = object.id.ok_or_else(|| {
                        Error::file(json_file, format!("added_tokens: {:?} has no \"id\"", object.content))
                    })?;
                    special.listed.retain(|(_, listed)| *listed != id);
                    special.listed.push((object.token(object.special), id));
                }
            }
        }
        special.listed.sort_by_key(|(_, id)| *id);
        Ok(special)
    }

    fn role(&self, name: &str) -> Option<&SpecialToken> {
        self.roles.get(name)
    }

    fn read_roles(&mut self, path: &Path, map: &Map<String, Value>) -> Result<()> {
        for (name, _) in ROLES {
            if let Some(value) = map.get(name).filter(|value| !value.is_null()) {
                let token = SpecialToken::deserialize(value).map_err(|_| {
                    Error::file(
                        path,
                        format!("{name} is {value}; expected a text, or an object with a text \"content\""),
                    )
                })?;
                if token.content().is_empty() {
                    return Err(Error::file(path, format!("{name} is empty; a special token needs a text")));
                }
                self.roles.insert(name.into(), token);
            }
        }
        Ok(())
    }

    fn read_extra(&mut self, path: &Path, map: &Map<String, Value>, name: &str) -> Result<()> {
        if let Some(value @ Value::Array(_)) = map.get(name) {
            self.extra = typed(path, name, value)?;
        }
        Ok(())
    }

    /// Listed tokens first, then the roles and extras whose text is not listed. When one text is named in both forms (SD
    /// 1.5: the end token as an object, the padding token, which is the same, as a string), the later form's flags hold.
    fn added(&self) -> Vec<(AddedToken, Option<u32>)> {
        let named = |text: &str| self.roles.values().any(|token| token.content() == text);
        let mut added: Vec<(AddedToken, Option<u32>)> = Vec::new();
        for (token, id) in &self.listed {
            let special = token.special || named(&token.content);
            // A token that only its role makes special keeps where it is looked for.
            let token = AddedToken { special, ..token.clone() };
            added.push((token, Some(*id)));
        }
        let mut seen: Vec<(&str, bool)> = Vec::new();
        let roles = ROLES.iter().filter_map(|(name, _)| self.roles.get(*name));
        for token in roles.chain(&self.extra) {
            let form = (token.content(), matches!(token, SpecialToken::Text(_)));
            if seen.contains(&form) {
                continue;
            }
            seen.push(form);
            match added.iter_mut().find(|(present, _)| present.content == token.content()) {
                None => added.push((token.token(), None)),
                Some((present, None)) => *present = token.token(),
                Some((_, Some(_))) => {}
            }
        }
        added
    }
}

fn check_class(path: &Path, config: &Map<String, Value>) -> Result<()> {
    match config.get("tokenizer_class").and_then(Value::as_str) {
        None | Some("CLIPTokenizer" | "CLIPTokenizerFast") => Ok(()),
        Some(class) => {
            let reason = format!("tokenizer_class is {class:?}; the models of this family use \"CLIPTokenizer\"");
            Err(Error::file(path, reason))
        }
    }
}

fn max_length(path: &Path, config: &Map<String, Value>) -> Result<Option<usize>> {
    let value = match config.get("model_max_length").or(config.get("max_len")) {
        None | Some(Value::Null) => return Ok(None),
        Some(value) => value,
    };
    match value.as_f64() {
        Some(length) if length > LARGEST_LENGTH => Ok(None),
        Some(length) if length >= 2.0 && length.fract() == 0.0 => Ok(Some(length as usize)),
        _ => {
            let reason = format!("model_max_length is {value}; expected a whole number of tokens, at least 2");
            Err(Error::file(path, reason))
        }
    }
}

fn pad_left(path: &Path, config: &Map<String, Value>, json: Option<&Map<String, Value>>) -> Result<bool> {
    let from_json = json.and_then(|json| json.get("padding")?.get("direction")?.as_str());
    match config.get("padding_side").and_then(Value::as_str).or(from_json) {
        None => Ok(false),
        Some(side) if side.eq_ignore_ascii_case("right") => Ok(false),
        Some(side) if side.eq_ignore_ascii_case("left") => Ok(true),
        Some(side) => Err(Error::file(path, format!("padding_side is {side:?}; expected \"right\" or \"left\""))),
    }
}

/// Token to id.
type Vocab = HashMap<String, u32>;
/// Pairs of tokens that become one, best first.
type Merges = Vec<(String, String)>;

fn vocab_and_merges(place: &Path, files: &TokenizerFiles) -> Result<(PathBuf, Vocab, Merges)> {
    let missing = |name: &str| {
        let reason = format!("{name} is missing; a CLIP tokenizer needs vocab.json and merges.txt, or tokenizer.json");
        Error::file(place, reason)
    };
    let vocab_file = place.join("vocab.json");
    let vocab = parse_json(&vocab_file, files.vocab.ok_or_else(|| missing("vocab.json"))?)?;
    let merges = files.merges.ok_or_else(|| missing("merges.txt"))?;
    let merges = parse_merges(&place.join("merges.txt"), merges)?;
    Ok((vocab_file, vocab, merges))
}

fn parse_merges(path: &Path, bytes: &[u8]) -> Result<Merges> {
    let text = std::str::from_utf8(bytes).map_err(|error| Error::file(path, format!("not UTF-8: {error}")))?;
    let mut merges = Vec::new();
    for (i, line) in text.lines().enumerate() {
        if line.starts_with("#version") || line.is_empty() {
            continue;
        }
        merges.push(pair(line).ok_or_else(|| {
            Error::file(path, format!("line {}: {line:?} is not two tokens with one space between", i + 1))
        })?);
    }
    Ok(merges)
}

fn pair(line: &str) -> Option<(String, String)> {
    let (a, b) = line.split_once(' ')?;
    (!a.is_empty() && !b.is_empty() && !b.contains(' ')).then(|| (a.to_string(), b.to_string()))
}

/// `model` of a tokenizer.json: merges are pairs, or, as older versions wrote them, strings.
fn model_of(path: &Path, json: &Map<String, Value>) -> Result<(Vocab, Merges)> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Merge {
        Pair(String, String),
        Line(String),
    }
    let model = json.get("model").and_then(Value::as_object);
    let model = model.ok_or_else(|| Error::file(path, "\"model\" is missing; not a tokenizer's file"))?;
    if let Some(kind) = model.get("type").and_then(Value::as_str).filter(|kind| *kind != "BPE") {
        return Err(Error::file(path, format!("model.type is {kind:?}; a CLIP tokenizer is \"BPE\"")));
    }
    let part = |name: &str| model.get(name).ok_or_else(|| Error::file(path, format!("model.{name} is missing")));
    let vocab = typed(path, "model.vocab", part("vocab")?)?;
    let merges: Vec<Merge> = typed(path, "model.merges", part("merges")?)?;
    let merges = merges.into_iter().map(|merge| match merge {
        Merge::Pair(a, b) => Ok((a, b)),
        Merge::Line(line) => {
            pair(&line).ok_or_else(|| Error::file(path, format!("model.merges: {line:?} is not two tokens")))
        }
    });
    Ok((vocab, merges.collect::<Result<_>>()?))
}

fn check_vocab(path: &Path, vocab: &Vocab, merges: &[(String, String)]) -> Result<()> {
    if vocab.is_empty() {
        return Err(Error::file(path, "the vocabulary is empty"));
    }
    let mut by_id: HashMap<u32, &str> = HashMap::with_capacity(vocab.len());
    for (token, id) in vocab {
        if let Some(other) = by_id.insert(*id, token) {
            let (a, b) = if token.as_str() < other { (token.as_str(), other) } else { (other, token.as_str()) };
            return Err(Error::file(path, format!("the tokens {a:?} and {b:?} have the same id {id}")));
        }
    }
    for (i, (a, b)) in merges.iter().enumerate() {
        let merged = format!("{a}{b}");
        for token in [a, b, &merged] {
            if !vocab.contains_key(token) {
                let reason = format!(
                    "merge {} ({a} {b}) needs the token {token:?}, which the vocabulary lacks; do the vocabulary and the \
                     merges belong together?",
                    i + 1
                );
                return Err(Error::file(path, reason));
            }
        }
    }
    Ok(())
}

fn object(path: &Path, bytes: &[u8]) -> Result<Map<String, Value>> {
    match parse_json(path, bytes)? {
        Value::Object(map) => Ok(map),
        _ => Err(Error::file(path, "expected a JSON object")),
    }
}

fn parse_json<T: serde::de::DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|error| {
        let hint = if error.is_eof() { "; is the file complete?" } else { "" };
        Error::file(path, format!("{error}{hint}"))
    })
}

fn typed<T: serde::de::DeserializeOwned>(path: &Path, key: &str, value: &Value) -> Result<T> {
    T::deserialize(value).map_err(|error| Error::file(path, format!("{key}: {error}")))
}
