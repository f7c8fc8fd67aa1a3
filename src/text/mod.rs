//! Prompts to token ids.

mod clip;
mod files;

pub use clip::{ClipTokenizer, Encoding};
pub use files::TokenizerFiles;
