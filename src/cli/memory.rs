//! What the commands say of memory.

pub use megafuse::runtime::{available_bytes, bytes_text, total_bytes};
