use rayon::prelude::*;

use crate::error::{Error, Result};

/// 8-bit levels to another size as PIL's `resize(..., LANCZOS)` does it, level for level: a windowed sinc of three lobes,
/// widened when downscaling, taps outside the picture left out; one pass for each side, each rounded to 8 bits, with
/// weights in units of 2^-22. Proportions follow the sizes: the picture is stretched.
///
/// `levels`: `[height, width, channels]` with `from` and `to` as (width, height).
///
/// # Errors
/// [`Error::Argument`]: `levels` has another length than `from` says, or a side is 0.
pub fn resize_levels(levels: &[u8], channels: usize, from: (usize, usize), to: (usize, usize)) -> Result<Vec<u8>> {
    const OP: &str = "resize_levels";
    let count = from.0.checked_mul(from.1).and_then(|pixels| pixels.checked_mul(channels));
    if [from.0, from.1, to.0, to.1, channels].contains(&0) || count != Some(levels.len()) {
        let want = format!("{} x {} pixels of {channels} channels, and sides of at least 1", from.0, from.1);
        return Err(Error::argument(OP, "levels", levels.len(), want));
    }
    let (columns, rows) = (Taps::new(from.0, to.0), Taps::new(from.1, to.1));
    if heights_first(from, to) {
        let low = resize_columns(levels, from.0 * channels, &rows);
        return Ok(resize_rows(&low, channels, from.0, &columns));
    }
    let wide = resize_rows(levels, channels, from.0, &columns);
    Ok(resize_columns(&wide, to.0 * channels, &rows))
}

/// Which pass PIL makes first; as each rounds to 8 bits, that shows. From version 13 on, as found by comparison of sizes of all
/// proportions with its results: the vertical one where it takes away more than twice as many rows as the other takes columns.
fn heights_first(from: (usize, usize), to: (usize, usize)) -> bool {
    let less = |from: usize, to: usize| from as i64 - to as i64;
    to.1 < from.1 && 2 * less(from.0, to.0) < less(from.1, to.1)
}

/// Every row of `width` pixels by itself.
fn resize_rows(levels: &[u8], channels: usize, width: usize, columns: &Taps) -> Vec<u8> {
    let (row, to) = (width * channels, columns.0.len() * channels);
    let mut out = vec![0; levels.len() / row * to];
    out.par_chunks_mut(to).zip(levels.par_chunks(row)).for_each(|(out, levels)| {
        for (pixel, (first, weights)) in out.chunks_exact_mut(channels).zip(&columns.0) {
            for (channel, level) in pixel.iter_mut().enumerate() {
                let from = levels[first * channels + channel..].iter().step_by(channels);
                *level = rounded(weights.iter().zip(from).map(|(&weight, &level)| weight * i64::from(level)).sum());
            }
        }
    });
    out
}

/// Every column by itself; `row`: levels of a row.
fn resize_columns(levels: &[u8], row: usize, rows: &Taps) -> Vec<u8> {
    let mut out = vec![0; rows.0.len() * row];
    out.par_chunks_mut(row).zip(&rows.0).for_each(|(out, (first, weights))| {
        for (i, level) in out.iter_mut().enumerate() {
            let from = levels[first * row + i..].iter().step_by(row);
            *level = rounded(weights.iter().zip(from).map(|(&weight, &level)| weight * i64::from(level)).sum());
        }
    });
    out
}

/// PIL's `L` of RGB levels: (19595 R + 38470 G + 7471 B) / 2^16, rounded. `[pixels, 3]` to `[pixels]`.
pub fn luma(rgb: &[u8]) -> Vec<u8> {
    let of = |pixel: &[u8]| {
        let [r, g, b] = [pixel[0], pixel[1], pixel[2]].map(u32::from);
        ((19_595 * r + 38_470 * g + 7_471 * b + 0x8000) >> 16) as u8
    };
    rgb.chunks_exact(3).map(of).collect()
}

/// One in PIL's fixed point for 8-bit pictures, as a power of two.
const FIXED_POINT_BITS: u32 = 22;

/// A sum of levels times fixed-point weights, rounded half up and clamped to 8 bits.
fn rounded(sum: i64) -> u8 {
    ((sum + (1 << (FIXED_POINT_BITS - 1))) >> FIXED_POINT_BITS).clamp(0, 255) as u8
}

/// Of every output along a side: its first input, and the weights from there on.
struct Taps(Vec<(usize, Vec<i64>)>);

impl Taps {
    fn new(from: usize, to: usize) -> Taps {
        const LOBES: f64 = 3.0;
        let scale = from as f64 / to as f64;
        let width = scale.max(1.0);
        let support = LOBES * width;
        let sinc = |x: f64| if x == 0.0 { 1.0 } else { (x * std::f64::consts::PI).sin() / (x * std::f64::consts::PI) };
        let lanczos = |x: f64| if (-LOBES..LOBES).contains(&x) { sinc(x) * sinc(x / LOBES) } else { 0.0 };
        let of = |i: usize| {
            let center = (i as f64 + 0.5) * scale;
            // Casts to an integer truncate, those to usize also stop at 0.
            let (first, end) = ((center - support + 0.5) as usize, ((center + support + 0.5) as usize).min(from));
            let weights: Vec<f64> = (first..end).map(|j| lanczos((j as f64 - center + 0.5) * (1.0 / width))).collect();
            let sum: f64 = weights.iter().sum();
            let fixed = |weight: f64| (weight / sum * f64::from(1u32 << FIXED_POINT_BITS)).round() as i64;
            (first, weights.into_iter().map(fixed).collect())
        };
        Taps((0..to).map(of).collect())
    }
}
