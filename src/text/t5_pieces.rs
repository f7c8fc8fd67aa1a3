//! A sentencepiece model file (`spiece.model`), of which a T5 tokenizer needs four things: Kudo & Richardson 2018,
//! arXiv:1808.06226. The file is a protobuf message; its few fields are read by hand, the others skipped.

use std::path::Path;

use crate::error::{Error, Result};

/// What of a sentencepiece model decides a T5 prompt's ids.
#[derive(Debug, Default)]
pub(super) struct Pieces {
    /// Piece and its log probability, by id.
    pub pieces: Vec<(String, f64)>,
    /// Ids of control symbols (`<pad>`, `</s>`) and of symbols that its maker defined: found in the text before anything else.
    pub symbols: Vec<usize>,
    pub unk_id: usize,
    /// The normaliser's table of replacements; empty: none.
    pub charsmap: Vec<u8>,
}

/// Types of a piece (`SentencePiece.Type`).
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

/// Of `TrainerSpec.model_type`.
const UNIGRAM: u64 = 1;

impl Pieces {
    /// # Errors
    /// [`Error::File`] naming `path`: damaged, not a sentencepiece model, or one of another kind than T5's.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Pieces> {
        let damaged = || Error::file(path, "not a sentencepiece model, or damaged: download it again");
        let mut model = Pieces::default();
        let (mut kind, mut byte_fallback) = (UNIGRAM, false);
        let (mut dummy_prefix, mut extra_spaces_go, mut spaces_escaped) = (true, true, true);
        for field in Fields(bytes) {
            match field.ok_or_else(damaged)? {
                (1, Value::Bytes(piece)) => {
                    let (mut text, mut score, mut kind) = (None, 0.0, 1);
                    for field in Fields(piece) {
                        match field.ok_or_else(damaged)? {
                            (1, Value::Bytes(bytes)) => text = String::from_utf8(bytes.to_vec()).ok(),
                            (2, Value::Fixed32(bits)) => score = f64::from(f32::from_bits(bits)),
                            (3, Value::Varint(value)) => kind = value,
                            _ => {}
                        }
                    }
                    if [CONTROL, USER_DEFINED].contains(&kind) {
                        model.symbols.push(model.pieces.len());
                    }
                    model.pieces.push((text.ok_or_else(damaged)?, score));
                }
                (2, Value::Bytes(trainer)) => {
                    for field in Fields(trainer) {
                        match field.ok_or_else(damaged)? {
                            (3, Value::Varint(value)) => kind = value,
                            (35, Value::Varint(value)) => byte_fallback = value != 0,
                            (40, Value::Varint(value)) => model.unk_id = value as usize,
                            _ => {}
                        }
                    }
                }
                (3, Value::Bytes(normalizer)) => {
                    for field in Fields(normalizer) {
                        match field.ok_or_else(damaged)? {
                            (2, Value::Bytes(charsmap)) => model.charsmap = charsmap.to_vec(),
                            (3, Value::Varint(value)) => dummy_prefix = value != 0,
                            (4, Value::Varint(value)) => extra_spaces_go = value != 0,
                            (5, Value::Varint(value)) => spaces_escaped = value != 0,
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        if model.pieces.is_empty() {
            return Err(damaged());
        }
        let of_t5 = [
            (kind == UNIGRAM, "model_type", "a unigram model"),
            (!byte_fallback, "byte_fallback", "false"),
            (dummy_prefix, "add_dummy_prefix", "true"),
            (extra_spaces_go, "remove_extra_whitespaces", "true"),
            (spaces_escaped, "escape_whitespaces", "true"),
        ];
        match of_t5.into_iter().find(|(is_so, ..)| !is_so) {
            None => Ok(model),
            Some((_, field, want)) => {
                Err(Error::file(path, format!("its {field} is not {want}: not the tokenizer of a T5 text encoder")))
            }
        }
    }
}

/// A field's value, as the wire has it.
enum Value<'a> {
    Varint(u64),
    Fixed32(u32),
    Bytes(&'a [u8]),
    Fixed64,
}

/// The fields of a protobuf message: number and value. `None`: the bytes are no message; the last item then.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.0.split_first()?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn field(&mut self) -> Option<(u64, Value<'a>)> {
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Value::Varint(self.varint()?),
            1 => self.take(8).map(|_| Value::Fixed64)?,
            2 => {
                let length = usize::try_from(self.varint()?).ok()?;
                Value::Bytes(self.take(length)?)
            }
            5 => Value::Fixed32(u32::from_le_bytes(*self.take(4)?.first_chunk()?)),
            _ => return None,
        };
        Some((tag >> 3, value))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Option<(u64, Value<'a>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            self.0 = &[];
        }
        Some(field)
    }
}

/// Whether a normaliser's table ([`Pieces::charsmap`]) can be read without leaving it: the number of its trie's bytes, the trie as a
/// double array (Darts) whose every reachable node lies in it, and the replacements, UTF-8 and each ended by 0. The library that
/// reads it looks at nothing of this.
pub(super) fn is_whole(charsmap: &[u8]) -> bool {
    let Some((size, rest)) = charsmap.split_first_chunk::<4>() else { return false };
    let Some((trie, replacements)) = rest.split_at_checked(u32::from_le_bytes(*size) as usize) else { return false };
    let units: Vec<usize> = trie.as_chunks().0.iter().map(|&unit| u32::from_le_bytes(unit) as usize).collect();
    let (Ok(replacements), Some(&root)) = (std::str::from_utf8(replacements), units.first()) else { return false };
    // As the format has it: 22 bits of offset, one that multiplies it by 256, one that says that a value follows, a label of 8.
    let offset = |unit: usize| (unit >> 10) << ((unit & (1 << 9)) >> 6);
    let mut seen = vec![false; units.len()];
    let mut open = vec![(0, root)];
    while let Some((place, unit)) = open.pop() {
        let base = place ^ offset(unit);
        if (base | 0xff) >= units.len() {
            return false;
        }
        if (unit >> 8) & 1 == 1 && !replacements.is_char_boundary(units[base] & 0x7fff_ffff) {
            return false;
        }
        for label in 1..=0xff {
            let (place, unit) = (base ^ label, units[base ^ label]);
            if unit & 0x8000_00ff == label && !std::mem::replace(&mut seen[place], true) {
                open.push((place, unit));
            }
        }
    }
    true
}
