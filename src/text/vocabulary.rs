//! The vocabulary that every published CLIP shares: byte pairs of Radford et al. 2021, arXiv:2103.00020, for models whose
//! files do not bring their own.

use std::io::Read;

use serde_json::{Map, Value};

/// `merges.txt` as the published tokenizers have it, compressed; of openai/CLIP, MIT licence (vocabulary/LICENSE).
const MERGES: &[u8] = include_bytes!("vocabulary/clip_merges.txt.gz");

/// The contents of `vocab.json` (49408 tokens) and `merges.txt`.
#[derive(Clone, Debug)]
pub struct ClipVocabulary {
    pub vocab: Vec<u8>,
    pub merges: Vec<u8>,
}

impl ClipVocabulary {
    /// Unpacks the merges and numbers the tokens: 256 bytes, the same at a word's end, the merges in order, start, end.
    pub fn published() -> ClipVocabulary {
        let mut merges = String::new();
        flate2::read::GzDecoder::new(MERGES).read_to_string(&mut merges).expect("compiled in, and read by a test");
        let bytes = byte_letters();
        let single = bytes.iter().map(|c| c.to_string()).chain(bytes.iter().map(|c| format!("{c}</w>")));
        let merged = merges.lines().skip(1).map(|pair| pair.replace(' ', ""));
        let special = ["<|startoftext|>", "<|endoftext|>"].map(String::from);
        let tokens = single.chain(merged).chain(special);
        let vocab: Map<String, Value> = tokens.enumerate().map(|(id, token)| (token, Value::from(id))).collect();
        ClipVocabulary { vocab: Value::Object(vocab).to_string().into_bytes(), merges: merges.into_bytes() }
    }
}

/// A printable letter for each byte, in the order of the vocabulary: the printable bytes stand for themselves, the others
/// for the letters from 256 on (Radford et al. 2019, GPT-2).
fn byte_letters() -> Vec<char> {
    let printable = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
    let own = (0..256).filter(|&b| printable(b));
    let others = (0..256).filter(|&b| !printable(b)).zip(256..).map(|(_, letter)| letter);
    own.chain(others).filter_map(char::from_u32).collect()
}
