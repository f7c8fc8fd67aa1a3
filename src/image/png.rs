use std::fs::File;
use std::io::{self, BufRead, BufReader, Cursor, Seek, SeekFrom, Write};
use std::path::Path;

use super::write_atomically;
use crate::error::{Error, Result};

/// Text that travels in a PNG. Latin-1 text becomes a `tEXt` chunk, anything else `iTXt` (UTF-8), as Pillow does it.
#[derive(Clone, Copy, Debug, Default)]
pub struct PngText<'a> {
    /// Chunk `parameters`, as stable-diffusion-webui writes it: see [`infotext`](super::infotext). Empty: no chunk.
    pub parameters: &'a str,
    /// Chunk `megafuse`: JSON. Empty: no chunk.
    pub json: &'a str,
}

/// Writes 8-bit RGB (`[height, width, 3]`) as a PNG, whole or not at all.
///
/// # Errors
/// [`Error::Argument`]: the number of bytes is not `width * height * 3`, or a side is 0 or above 2^31 - 1; otherwise as
/// [`write_atomically`].
pub fn write_png(path: &Path, pixels: &[u8], width: usize, height: usize, text: PngText) -> Result<()> {
    let [w, h] = checked(pixels, width, height)?;
    write_atomically(path, |file| encode(file, pixels, w, h, text))
}

/// The bytes of the PNG that [`write_png`] would write.
pub fn encode_png(pixels: &[u8], width: usize, height: usize, text: PngText) -> Result<Vec<u8>> {
    let [w, h] = checked(pixels, width, height)?;
    let mut bytes = Vec::new();
    encode(&mut bytes, pixels, w, h, text).map_err(|error| Error::io(Path::new("PNG in memory"), error))?;
    Ok(bytes)
}

/// The last chunk of every PNG: length, name, checksum.
const END: [u8; 12] = *b"\0\0\0\0IEND\xae\x42\x60\x82";

/// The text chunk `keyword` of a PNG file, if it has one before its pixels, as ours do: as [`read_png_texts`].
pub fn read_png_text(path: &Path, keyword: &str) -> Result<Option<String>> {
    let texts = read_png_texts(path)?;
    Ok(texts.into_iter().find(|(key, _)| key == keyword).map(|(_, text)| text))
}

/// Keyword and text of every text chunk before a PNG file's pixels. The pixels are not read, only that the file goes on to
/// its end.
///
/// # Errors
/// [`Error::File`]: not a PNG, or truncated; [`Error::Io`] when the system cannot read it.
pub fn read_png_texts(path: &Path) -> Result<Vec<(String, String)>> {
    texts_of(path, BufReader::new(File::open(path).map_err(|error| Error::io(path, error))?))
}

/// The same of a file's bytes; `name` stands in messages.
///
/// # Errors
/// [`Error::File`]: not a PNG, or truncated.
pub fn read_png_texts_of(name: &Path, bytes: &[u8]) -> Result<Vec<(String, String)>> {
    texts_of(name, Cursor::new(bytes))
}

fn texts_of(path: &Path, mut file: impl BufRead + Seek) -> Result<Vec<(String, String)>> {
    let mut end = [0; END.len()];
    let whole = file.seek(SeekFrom::End(-(END.len() as i64))).and_then(|_| file.read_exact(&mut end));
    if whole.is_err() || end != END {
        return Err(Error::file(path, "not a PNG, or one that ends in the middle"));
    }
    file.rewind().map_err(|error| Error::io(path, error))?;
    let damaged = |error: png::DecodingError| Error::file(path, format!("a damaged PNG: {error}"));
    let reader = png::Decoder::new(file).read_info().map_err(damaged)?;
    let info = reader.info();
    let plain = info.uncompressed_latin1_text.iter().map(|chunk| Ok((chunk.keyword.clone(), chunk.text.clone())));
    let compressed = info.compressed_latin1_text.iter();
    let compressed = compressed.map(|chunk| Ok((chunk.keyword.clone(), chunk.get_text().map_err(damaged)?)));
    let utf8 = info.utf8_text.iter().map(|chunk| Ok((chunk.keyword.clone(), chunk.get_text().map_err(damaged)?)));
    plain.chain(compressed).chain(utf8).collect()
}

fn checked(pixels: &[u8], width: usize, height: usize) -> Result<[u32; 2]> {
    const OP: &str = "write_png";
    let side = |arg: &'static str, got: usize| match u32::try_from(got) {
        Ok(side @ 1..=0x7fff_ffff) => Ok(side),
        _ => Err(Error::argument(OP, arg, got, "1 to 2147483647 pixels")),
    };
    let sides = [side("width", width)?, side("height", height)?];
    if pixels.len() as u128 != width as u128 * height as u128 * 3 {
        return Err(Error::argument(OP, "pixels", pixels.len(), format!("{width} * {height} * 3 bytes")));
    }
    Ok(sides)
}

fn encode(to: &mut dyn Write, pixels: &[u8], width: u32, height: u32, text: PngText) -> io::Result<()> {
    let mut encoder = png::Encoder::new(to, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    for (keyword, text) in [("parameters", text.parameters), ("megafuse", text.json)] {
        if text.is_empty() {
            continue;
        }
        let text = text.replace('\0', "\u{fffd}"); // a NUL would end the chunk's text for its readers
        if text.chars().all(|c| u32::from(c) < 256) {
            encoder.add_text_chunk(keyword.into(), text).map_err(io_error)?;
        } else {
            encoder.add_itxt_chunk(keyword.into(), text).map_err(io_error)?;
        }
    }
    let mut writer = encoder.write_header().map_err(io_error)?;
    writer.write_image_data(pixels).map_err(io_error)?;
    writer.finish().map_err(io_error)
}

/// Keeps the kind of an I/O error: a full disk is still a full disk.
fn io_error(error: png::EncodingError) -> io::Error {
    match error {
        png::EncodingError::IoError(error) => error,
        other => io::Error::other(other),
    }
}
