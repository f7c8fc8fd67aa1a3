//! Prompts to token ids.

mod clip;
mod files;
mod vocabulary;

pub use clip::{ClipTokenizer, Encoding};
pub use files::TokenizerFiles;
pub use vocabulary::ClipVocabulary;
