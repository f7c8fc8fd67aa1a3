//! Prompts to token ids: syntax, chunks, learned words.

mod chunks;
mod clip;
mod emphasis;
mod files;
mod prompt;
mod t5;
mod t5_pieces;
mod textual_inversion;
mod vocabulary;

pub use chunks::{Chunks, LongPrompt};
pub use clip::{ClipTokenizer, Encoding};
pub use emphasis::{ClipSkip, emphasize};
pub use files::TokenizerFiles;
pub use prompt::{Part, Prompt, Syntax, syntax_hint};
pub use t5::{T5Encoding, T5Tokenizer, T5TokenizerFiles};
pub use textual_inversion::{Encoder, LearnedWords, TextualInversion};
pub use vocabulary::ClipVocabulary;
