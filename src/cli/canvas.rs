//! A picture that labels and other pictures are put on.
//!
//! The letters are Noto Sans Mono, drawn beforehand in three sizes by the crate noto-sans-mono-bitmap: no font file to
//! find, no rasteriser, and all letters of one width, so that a label's size is known without shaping it.

use noto_sans_mono_bitmap::{FontWeight, RasterHeight, get_raster, get_raster_width};

/// 8 bits, row-major, 3 bytes a pixel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Canvas {
    pub width: usize,
    pub height: usize,
    pub rgb: Vec<u8>,
}

pub type Colour = [u8; 3];
pub const WHITE: Colour = [255; 3];
pub const BLACK: Colour = [0; 3];
pub const GREY: Colour = [110; 3];

/// A size of letters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Font(RasterHeight);

impl Font {
    /// For labels beside pictures of this many pixels a side.
    pub fn beside(side: usize) -> Font {
        Font(match side {
            0..384 => RasterHeight::Size16,
            384..768 => RasterHeight::Size24,
            _ => RasterHeight::Size32,
        })
    }

    /// Of every letter, in pixels.
    pub fn width(self) -> usize {
        get_raster_width(FontWeight::Regular, self.0)
    }

    /// Of a line, in pixels.
    pub fn height(self) -> usize {
        self.0.val()
    }
}

impl Canvas {
    pub fn new(width: usize, height: usize, colour: Colour) -> Canvas {
        Canvas { width, height, rgb: colour.repeat(width * height) }
    }

    /// Another picture with its upper left corner at `x`, `y`; what lies outside is cut off.
    pub fn place(&mut self, x: usize, y: usize, picture: &Canvas) {
        let width = picture.width.min(self.width.saturating_sub(x));
        for row in 0..picture.height.min(self.height.saturating_sub(y)) {
            let (from, to) = (row * picture.width * 3, ((y + row) * self.width + x) * 3);
            self.rgb[to..to + width * 3].copy_from_slice(&picture.rgb[from..from + width * 3]);
        }
    }

    /// One line of text with its upper left corner at `x`, `y`; what lies outside is cut off. Letters that the font does
    /// not have become U+FFFD, a question mark in a lozenge.
    pub fn text(&mut self, x: usize, y: usize, text: &str, font: Font, colour: Colour) {
        for (at, letter) in text.chars().enumerate() {
            let raster = |letter| get_raster(letter, FontWeight::Regular, font.0);
            let Some(glyph) = raster(letter).or_else(|| raster('\u{fffd}')) else { continue };
            for (row, intensities) in glyph.rows().enumerate() {
                for (column, &intensity) in intensities.iter().enumerate() {
                    self.blend(x + at * font.width() + column, y + row, colour, intensity);
                }
            }
        }
    }

    fn blend(&mut self, x: usize, y: usize, colour: Colour, intensity: u8) {
        if x >= self.width || y >= self.height {
            return;
        }
        let at = (y * self.width + x) * 3;
        for (below, above) in self.rgb[at..at + 3].iter_mut().zip(colour) {
            let share = u32::from(intensity);
            *below = ((u32::from(above) * share + u32::from(*below) * (255 - share) + 127) / 255) as u8;
        }
    }
}

/// `text` in lines of at most `letters`, broken at spaces where there are any, and at most `lines` of them, the last with
/// an ellipsis where something was left out. Line breaks and control characters are spaces.
pub fn wrapped(text: &str, letters: usize, lines: usize) -> Vec<String> {
    let letters = letters.max(1);
    let mut wrapped: Vec<String> = Vec::new();
    let mut room = 0;
    for word in text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty()) {
        let mut rest: Vec<char> = word.chars().collect();
        if rest.len() < room {
            let line = wrapped.last_mut().expect("a line has room");
            line.push(' ');
            line.extend(&rest);
            room -= rest.len() + 1;
            continue;
        }
        while rest.len() > letters {
            let tail = rest.split_off(letters);
            wrapped.push(rest.into_iter().collect());
            rest = tail;
        }
        room = letters - rest.len();
        wrapped.push(rest.into_iter().collect());
    }
    if wrapped.len() > lines {
        wrapped.truncate(lines);
        if let Some(last) = wrapped.last_mut() {
            let kept: String = last.chars().take(letters - 1).collect();
            *last = format!("{}\u{2026}", kept.trim_end());
        }
    }
    wrapped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_breaks_at_spaces_and_ends_with_an_ellipsis() {
        assert_eq!(wrapped("a small green cube", 11, 9), ["a small", "green cube"]);
        assert_eq!(wrapped("exactly ten", 11, 9), ["exactly ten"]);
        assert_eq!(wrapped("exactly ten", 10, 9), ["exactly", "ten"]);
        assert_eq!(wrapped("64x64:48,128x128:1", 8, 9), ["64x64:48", ",128x128", ":1"]);
        assert_eq!(wrapped(" \t\n a\u{7}b ", 8, 9), ["a b"]);
        assert_eq!(wrapped("one two three", 5, 2), ["one", "two\u{2026}"]);
        assert_eq!(wrapped("seven letters", 5, 1), ["seve\u{2026}"]);
        assert!(wrapped("", 5, 2).is_empty());
        assert_eq!(wrapped("ab", 0, 9), ["a", "b"]);
    }

    #[test]
    fn letters_are_inside_their_boxes_and_differ() {
        let font = Font::beside(64);
        let drawn = |text: &str| {
            let mut canvas = Canvas::new(3 * font.width(), font.height(), WHITE);
            canvas.text(font.width(), 0, text, font, BLACK);
            canvas
        };
        let (a, e, missing) = (drawn("a"), drawn("\u{e9}"), drawn("\u{4e2d}"));
        assert!(a != e && e != missing && a != missing);
        assert_eq!(missing, drawn("\u{fffd}"));
        for (at, pixel) in a.rgb.chunks(3).enumerate() {
            let column = at % a.width;
            assert!((font.width()..2 * font.width()).contains(&column) || pixel == WHITE, "column {column}");
        }
        assert!(a.rgb.iter().min() < Some(&64), "no stroke is dark");
        assert_eq!(drawn(" "), Canvas::new(3 * font.width(), font.height(), WHITE));
        // Beyond the border nothing is drawn and nothing breaks.
        let mut small = Canvas::new(3, 3, WHITE);
        small.text(1, 1, "\u{2588}WW", font, BLACK);
        small.place(2, 2, &a);
        small.place(9, 9, &a);
    }

    #[test]
    fn pictures_are_placed_where_they_belong() {
        let mut canvas = Canvas::new(4, 3, WHITE);
        canvas.place(1, 1, &Canvas { width: 2, height: 1, rgb: vec![1, 2, 3, 4, 5, 6] });
        let mut want = vec![255; 36];
        want[(4 + 1) * 3..(4 + 3) * 3].copy_from_slice(&[1, 2, 3, 4, 5, 6]);
        assert_eq!(canvas.rgb, want);
    }
}
