//! Pictures in and out: PNG with the parameters of the run, PNG, JPEG and WebP as input, f32 pixels to bytes and back.

mod atomic;
mod edges;
mod infotext;
mod pixels;
mod png;
mod read;
mod scale;

pub use atomic::{is_part, write_atomically};
pub use edges::canny_edges;
pub use infotext::{Infotext, infotext};
pub use pixels::{from_bytes, to_bytes};
pub use png::{PngText, encode_png, read_png_text, read_png_texts, read_png_texts_of, write_png};
pub use read::{decode_image, read_image};
pub use scale::{LevelFilter, luma, resize_levels};
