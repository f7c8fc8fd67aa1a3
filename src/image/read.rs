use std::io::{Cursor, ErrorKind};
use std::path::Path;

use image::{DynamicImage, ImageDecoder, ImageError, ImageReader};

use crate::error::{Error, Result};

/// Largest side that is read; a header that claims more is refused before any memory is asked for.
const MAX_SIDE: u32 = 32_768;
/// Largest number of bytes that decoding may take: 32768 x 32768 RGB would be 3.2e9.
const MAX_BYTES: u64 = 4 << 30;

/// What is read, for messages.
const WANTED: &str = "expected a PNG, JPEG or WebP file";

/// Reads a PNG, JPEG or WebP (by its content, not its name) as 8-bit RGB: width, height, `[height, width, 3]`. Transparency
/// is dropped, as PIL's `convert("RGB")` does it: what lies under it shows. Grey, palette and CMYK become RGB, 16 bits
/// become the nearest 8, an Exif orientation is applied, and of an animation the first picture is read.
///
/// # Errors
/// [`Error::File`]: no such file, a folder, another kind of file, truncated or corrupt, a side above 32768 pixels;
/// [`Error::Io`] when the system cannot read it.
pub fn read_image(path: &Path) -> Result<(usize, usize, Vec<u8>)> {
    if path.is_dir() {
        return Err(Error::file(path, format!("is a folder; {WANTED}")));
    }
    let bytes = std::fs::read(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => Error::file(path, format!("no such file; {WANTED}")),
        _ => Error::io(path, error),
    })?;
    if bytes.is_empty() {
        return Err(Error::file(path, format!("the file is empty; {WANTED}")));
    }
    decode_image(path, &bytes, u64::MAX)
}

/// The same of a file's bytes; `name` stands in messages. A header that claims more than `most_pixels` is refused before any memory is
/// asked for.
///
/// # Errors
/// As [`read_image`]; [`Error::File`]: too many pixels.
pub fn decode_image(name: &Path, bytes: &[u8], most_pixels: u64) -> Result<(usize, usize, Vec<u8>)> {
    let wrong = |error: ImageError| Error::file(name, explain(&error));
    let decoder = decoder(bytes).map_err(wrong)?;
    let (width, height) = decoder.dimensions();
    if u64::from(width) * u64::from(height) > most_pixels {
        return Err(Error::file(name, format!("has more than {most_pixels} pixels, the limit; make it smaller")));
    }
    let image = decode(decoder).map_err(wrong)?.into_rgb8();
    Ok((image.width() as usize, image.height() as usize, image.into_raw()))
}

fn decoder(bytes: &[u8]) -> image::ImageResult<impl ImageDecoder> {
    let mut limits = image::Limits::default();
    limits.max_image_width = Some(MAX_SIDE);
    limits.max_image_height = Some(MAX_SIDE);
    limits.max_alloc = Some(MAX_BYTES);
    let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format()?;
    reader.limits(limits);
    reader.into_decoder()
}

fn decode(mut decoder: impl ImageDecoder) -> image::ImageResult<DynamicImage> {
    let orientation = decoder.orientation()?;
    let mut image = DynamicImage::from_decoder(decoder)?;
    image.apply_orientation(orientation);
    Ok(image)
}

fn explain(error: &ImageError) -> String {
    match error {
        ImageError::Unsupported(_) => "not a PNG, JPEG or WebP file that can be read; convert it to one".into(),
        ImageError::Limits(limits) => {
            format!("too large ({limits}); at most {MAX_SIDE} pixels a side and {} GiB are read", MAX_BYTES >> 30)
        }
        ImageError::IoError(io) if io.kind() == ErrorKind::UnexpectedEof => {
            "truncated: the file ends in the middle of the picture".into()
        }
        // The decoders say "unexpected end of file" in their own words.
        other if other.to_string().to_lowercase().contains("eof") => {
            format!("truncated: the file ends in the middle of the picture ({other})")
        }
        other => format!("damaged: {other}"),
    }
}
