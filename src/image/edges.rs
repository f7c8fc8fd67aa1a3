use image::GrayImage;

use super::luma;
use crate::error::{Error, Result};

/// The largest strength of an edge: a Sobel gradient of 8-bit levels.
const STRONGEST: f32 = 1140.4;

/// White edges on black, Canny 1986 as the crate `imageproc` has it: of the grey picture, blurred by a Gaussian of 1.4 pixels; an edge is at
/// least as strong as `low` (the length of the Sobel gradient), and joined to one as strong as `high`. `rgb` and the result:
/// `[height, width, 3]`, 8 bits.
///
/// # Errors
/// [`Error::Argument`]: thresholds out of order, or outside 0 to 1140; a picture of another length than said, or without pixels.
pub fn canny_edges(rgb: &[u8], width: usize, height: usize, [low, high]: [f32; 2]) -> Result<Vec<u8>> {
    const OP: &str = "canny_edges";
    if !(low >= 0.0 && low <= high && high <= STRONGEST) {
        return Err(Error::argument(
            OP,
            "thresholds",
            format!("{low},{high}"),
            "LOW,HIGH with 0 <= LOW <= HIGH <= 1140",
        ));
    }
    let gray = match (u32::try_from(width), u32::try_from(height), rgb.len() == 3 * width * height) {
        (Ok(columns @ 1..), Ok(rows @ 1..), true) => GrayImage::from_raw(columns, rows, luma(rgb)),
        _ => None,
    };
    let gray = gray.ok_or_else(|| {
        Error::argument(OP, "levels", rgb.len(), format!("the 3 bytes of each of {width} x {height} pixels"))
    })?;
    Ok(imageproc::edges::canny(&gray, low, high).into_raw().into_iter().flat_map(|level| [level; 3]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A white square on black: its border, and nothing else.
    #[test]
    fn a_square_has_a_border() {
        let (width, height) = (32, 24);
        let inside = |i: usize| (8..24).contains(&(i % width)) && (6..18).contains(&(i / width));
        let rgb: Vec<u8> = (0..width * height).flat_map(|i| [if inside(i) { 255 } else { 0 }; 3]).collect();
        let edges = canny_edges(&rgb, width, height, [100.0, 200.0]).unwrap();
        assert!(edges.chunks_exact(3).all(|pixel| pixel == [0; 3] || pixel == [255; 3]));
        let at = |x: usize, y: usize| edges[3 * (y * width + x)] > 0;
        let near = |x: usize, y: usize| {
            (6..=9).contains(&x) || (22..=25).contains(&x) || (4..=7).contains(&y) || (16..=19).contains(&y)
        };
        let all = || (0..height).flat_map(|y| (0..width).map(move |x| (x, y)));
        assert!(all().filter(|&(x, y)| at(x, y)).count() > 40, "a border of 2 x (16 + 12) pixels");
        assert!(all().filter(|&(x, y)| at(x, y)).all(|(x, y)| near(x, y)));
        assert!(canny_edges(&rgb, width, height, [1100.0, 1140.0]).unwrap().iter().all(|&level| level == 0));
    }

    #[test]
    fn thresholds_are_checked() {
        for thresholds in [[200.0, 100.0], [-1.0, 5.0], [1.0, 2000.0], [f32::NAN, 1.0]] {
            let error = canny_edges(&[0; 12], 2, 2, thresholds).unwrap_err().to_string();
            assert!(error.contains("expected LOW,HIGH with 0 <= LOW <= HIGH <= 1140"), "{error}");
        }
        assert_eq!(canny_edges(&[9; 3], 1, 1, [1.0, 2.0]).unwrap(), [0; 3]);
    }
}
