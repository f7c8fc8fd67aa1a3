//! A read prompt to rows of ids and weights: one row, or as many chunks as the prompt needs.

use super::clip::{ClipTokenizer, is_space};
use super::prompt::{Part, Prompt, Syntax};
use crate::error::{Error, Result};
use crate::names::named;

/// What happens to a prompt that is longer than the text encoder's context.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LongPrompt {
    /// Its end is cut off; `BREAK` has no effect.
    #[default]
    Truncate,
    /// It is cut into chunks that are encoded one by one; the UNet attends to all of them.
    Chunk,
}

named!(LongPrompt, [Truncate => "truncate", Chunk => "chunk"]);

/// A chunk that is full ends at its last comma when that is at most this many tokens back, as webui's default.
const COMMA_BACKTRACK: usize = 20;

/// Rows of ids for the text encoder.
#[derive(Clone, Debug, PartialEq)]
pub struct Chunks {
    /// Per chunk: start token, up to `max_length - 2` tokens, end token, padding; [`ClipTokenizer::max_length`] ids. A
    /// learned word's row k is the id `vocab_size + k`.
    pub ids: Vec<Vec<u32>>,
    /// The weight of every id; 1 for start, end and padding.
    pub weights: Vec<Vec<f32>>,
    /// The end of the prompt that did not fit, as text. Worth a warning.
    pub truncated: Option<String>,
    /// The learned words that stand in the prompt, each once.
    pub learned: Vec<String>,
}

/// A token, or a learned word by its index.
#[derive(Clone, Copy)]
enum Unit {
    Token(u32),
    Learned(usize),
}

impl ClipTokenizer {
    /// Ids and weights of `prompt`. [`Syntax::Plain`] with [`LongPrompt::Truncate`] gives
    /// [`encode`](ClipTokenizer::encode)'s ids.
    ///
    /// Chunks are filled as webui fills them: a learned word is never divided; a full chunk ends at a comma up to 20 tokens
    /// back; `BREAK` ends a chunk. In [`Syntax::A1111`] a learned word is found by its tokens, the longest first; in
    /// [`Syntax::Plain`] it must stand alone in the text. Letters' case does not count in either.
    ///
    /// # Errors
    /// As [`encode`](ClipTokenizer::encode).
    pub fn encode_chunks(&self, prompt: &Prompt, long: LongPrompt) -> Result<Chunks> {
        let room = self.max_length() - 2;
        if room == 0 && long == LongPrompt::Chunk {
            let reason =
                "model_max_length is 2: no token fits between start and end, the prompt cannot be cut into chunks";
            return Err(Error::config(self.name(), reason));
        }
        let (mut rows, mut learned) = (Filling::new(room), Vec::new());
        let comma = self.token_id(",</w>");
        for part in &prompt.parts {
            let Part::Text { text, weight } = part else {
                if long == LongPrompt::Chunk {
                    rows.finish();
                }
                continue;
            };
            for unit in self.units(text, prompt.syntax)? {
                let ids = match unit {
                    Unit::Token(id) => vec![id],
                    Unit::Learned(word) => {
                        let (word, first, count) = self.learned(word);
                        if !learned.contains(word) {
                            learned.push(word.clone());
                        }
                        (first..first + count).collect()
                    }
                };
                let is_comma = matches!(unit, Unit::Token(id) if Some(id) == comma);
                match long {
                    LongPrompt::Truncate => rows.row.extend(ids.iter().map(|&id| (id, *weight))),
                    LongPrompt::Chunk => rows.add(&ids, *weight, is_comma),
                }
            }
        }
        let mut truncated = None;
        if long == LongPrompt::Truncate && rows.row.len() > room {
            let dropped: Vec<u32> = rows.row.drain(room..).map(|(id, _)| id).collect();
            truncated = Some(self.text_of(&dropped)?);
        }
        if !rows.row.is_empty() || rows.rows.is_empty() {
            rows.finish();
        }
        let mut chunks = Chunks { ids: Vec::new(), weights: Vec::new(), truncated, learned };
        for row in &rows.rows {
            let (ids, weights) = self.framed(row, prompt.syntax == Syntax::A1111);
            chunks.ids.push(ids);
            chunks.weights.push(weights);
        }
        Ok(chunks)
    }

    /// Adds empty chunks up to `count`: positive and negative prompt need equally many. webui does so when "Pad
    /// prompt/negative prompt" is on.
    pub fn pad_chunks(&self, chunks: &mut Chunks, count: usize) {
        while chunks.ids.len() < count {
            let (ids, weights) = self.framed(&[], false);
            chunks.ids.push(ids);
            chunks.weights.push(weights);
        }
    }

    fn units(&self, text: &str, syntax: Syntax) -> Result<Vec<Unit>> {
        let tokens =
            |text: &str| -> Result<Vec<Unit>> { Ok(self.tokens(text)?.into_iter().map(Unit::Token).collect()) };
        if self.learned_words().is_empty() {
            return tokens(text);
        }
        let mut units = Vec::new();
        match syntax {
            Syntax::A1111 => {
                let ids = self.tokens(text)?;
                let mut at = 0;
                while at < ids.len() {
                    match self.learned_at(&ids[at..]) {
                        Some((word, length)) => {
                            units.push(Unit::Learned(word));
                            at += length;
                        }
                        None => {
                            units.push(Unit::Token(ids[at]));
                            at += 1;
                        }
                    }
                }
            }
            Syntax::Plain => {
                let (mut from, mut at) = (0, 0);
                while let Some(c) = text[at..].chars().next() {
                    let Some((word, length)) = self.learned_in(text, at) else {
                        at += c.len_utf8();
                        continue;
                    };
                    units.extend(tokens(&text[from..at])?);
                    units.push(Unit::Learned(word));
                    at += length;
                    from = at;
                }
                units.extend(tokens(&text[from..])?);
            }
        }
        Ok(units)
    }

    /// The longest learned word whose tokens begin `ids`, and their number.
    fn learned_at(&self, ids: &[u32]) -> Option<(usize, usize)> {
        let words = self.learned_words().iter().enumerate();
        let found = words.filter(|(_, word)| !word.tokens.is_empty() && ids.starts_with(&word.tokens));
        // Of equal ones the first, as a stable sort by length has it.
        found.map(|(i, word)| (i, word.tokens.len())).reduce(|best, next| if next.1 > best.1 { next } else { best })
    }

    /// The longest learned word that stands alone at byte `at` of `text`, and its length in bytes.
    fn learned_in(&self, text: &str, at: usize) -> Option<(usize, usize)> {
        let joins = |a: Option<char>, b: Option<char>| a.zip(b).is_some_and(|(a, b)| word_char(a) && word_char(b));
        let words = self.learned_words().iter().enumerate();
        words
            .filter_map(|(i, word)| {
                let length = prefix_in_any_case(&text[at..], &word.word)?;
                let found = &text[at..at + length];
                let before = joins(text[..at].chars().next_back(), found.chars().next());
                let after = joins(found.chars().next_back(), text[at + length..].chars().next());
                (!before && !after).then_some((i, length))
            })
            .max_by_key(|(_, length)| *length)
    }

    /// Start, `row`, end and padding; `end_hides_rest`: what follows a first end token is padding, as webui has it where
    /// the two differ.
    fn framed(&self, row: &[(u32, f32)], end_hides_rest: bool) -> (Vec<u32>, Vec<f32>) {
        let inside = row.iter().map(|(id, _)| *id);
        let mut ids: Vec<u32> = std::iter::once(self.bos_id()).chain(inside).chain([self.eos_id()]).collect();
        let mut weights: Vec<f32> = std::iter::once(1.0).chain(row.iter().map(|(_, w)| *w)).chain([1.0]).collect();
        if end_hides_rest && let Some(end) = ids.iter().position(|&id| id == self.eos_id()) {
            ids[end + 1..].fill(self.pad_id());
        }
        let missing = self.max_length().saturating_sub(ids.len());
        let at = if self.pads_left() { 0 } else { ids.len() };
        ids.splice(at..at, std::iter::repeat_n(self.pad_id(), missing));
        weights.splice(at..at, std::iter::repeat_n(1.0, missing));
        (ids, weights)
    }

    /// Ids as text, learned words by their names.
    fn text_of(&self, ids: &[u32]) -> Result<String> {
        let mut text = String::new();
        let mut rest = ids;
        let mut last = None;
        while let Some(&id) = rest.first() {
            if let Some(word) = self.learned_of(id) {
                if last != Some(word) {
                    text.push_str(word);
                    text.push(' ');
                }
                last = Some(word);
                rest = &rest[1..];
            } else {
                let end = rest.iter().position(|&id| self.learned_of(id).is_some()).unwrap_or(rest.len());
                text.push_str(&self.decoded(&rest[..end])?);
                last = None;
                rest = &rest[end..];
            }
        }
        Ok(text.trim_matches(is_space).to_string())
    }
}

/// Rows of ids and weights, without start and end.
struct Filling {
    rows: Vec<Vec<(u32, f32)>>,
    row: Vec<(u32, f32)>,
    last_comma: Option<usize>,
    room: usize,
}

impl Filling {
    fn new(room: usize) -> Filling {
        Filling { rows: Vec::new(), row: Vec::new(), last_comma: None, room }
    }

    fn finish(&mut self) {
        self.rows.push(std::mem::take(&mut self.row));
        self.last_comma = None;
    }

    /// Appends a token or all of a learned word's.
    fn add(&mut self, ids: &[u32], weight: f32, is_comma: bool) {
        if is_comma {
            self.last_comma = Some(self.row.len());
        } else if self.row.len() == self.room
            && let Some(comma) = self.last_comma
            && self.row.len() - comma <= COMMA_BACKTRACK
        {
            let moved = self.row.split_off(comma + 1);
            self.finish();
            self.row = moved;
        }
        if self.row.len() == self.room {
            self.finish();
        }
        if self.row.len() + ids.len() > self.room {
            self.finish();
        }
        self.row.extend(ids.iter().map(|&id| (id, weight)));
    }
}

fn word_char(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The length in bytes of the start of `text` that equals `word` but for letters' case.
fn prefix_in_any_case(text: &str, word: &str) -> Option<usize> {
    let mut wanted = word.chars().flat_map(char::to_lowercase).peekable();
    for (at, c) in text.char_indices() {
        if wanted.peek().is_none() {
            return Some(at);
        }
        for c in c.to_lowercase() {
            wanted.next_if_eq(&c)?;
        }
    }
    wanted.peek().is_none().then_some(text.len())
}
