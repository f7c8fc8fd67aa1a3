//! Overlapping tiles, each by itself, blended over their overlap: `enable_tiling` of diffusers' `AutoencoderKL`. Not the picture
//! that the whole gives: a norm takes the statistics of its tile, and attention sees no further.

use crate::error::Result;
use crate::runtime::{Device, Tensor};

/// How a map is cut into square tiles, and what becomes of them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tiles {
    /// Rows and columns of a tile's input, and from one to the next.
    pub(super) side: usize,
    pub(super) step: usize,
    /// The same of its result; tiles overlap by `result_side - result_step`.
    pub(super) result_side: usize,
    pub(super) result_step: usize,
}

/// A tile's result on the host, `[height, width, C]`; none of its values on the meta device.
struct Tile {
    height: usize,
    width: usize,
    values: Vec<f32>,
}

impl Tiles {
    /// One image `[1, H, W, C]` through `f`, tile by tile; they are blended on the host in f32. `f` makes of h x w pixels
    /// h * result_side / side x w * result_side / side.
    ///
    /// # Errors
    /// Those of `f`, and of tensors.
    pub(super) fn run(self, x: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let [_, h, w, _] = x.dims("vae", "x")?;
        if h <= self.side && w <= self.side {
            return f(x);
        }
        let (height, width) = (self.result(h), self.result(w));
        let (mut picture, mut channels) = (Vec::new(), 0);
        let mut above: Vec<Tile> = Vec::new();
        for top in (0..h).step_by(self.step) {
            let mut row: Vec<Tile> = Vec::new();
            for left in (0..w).step_by(self.step) {
                let part = cut(x, [top, h.min(top + self.side)], [left, w.min(left + self.side)])?;
                let y = f(&part)?;
                channels = y.shape()[3];
                let mut tile = Tile::new(&y)?;
                if let Some(above) = above.get(row.len()) {
                    tile.blend_below(above, self.overlap(), channels);
                }
                if let Some(left) = row.last() {
                    tile.blend_right_of(left, self.overlap(), channels);
                }
                row.push(tile);
            }
            picture.resize(height * width * channels, 0.0);
            self.place(&row, top / self.step * self.result_step, width, channels, &mut picture);
            above = row;
        }
        let shape = [1, height, width, channels];
        match x.device() {
            Device::Meta(_) => Tensor::uninit(x.device(), &shape, x.dtype()),
            _ => Tensor::from_f32(x.device(), &shape, x.dtype(), &picture),
        }
    }

    fn overlap(self) -> usize {
        self.result_side - self.result_step
    }

    fn result(self, size: usize) -> usize {
        size * self.result_side / self.side
    }

    /// Of every tile the rows and columns up to the next one's.
    fn place(self, row: &[Tile], top: usize, width: usize, channels: usize, picture: &mut [f32]) {
        for (i, tile) in row.iter().enumerate() {
            let count = tile.width.min(self.result_step) * channels;
            for y in 0..tile.height.min(self.result_step) {
                let to = ((top + y) * width + i * self.result_step) * channels;
                let from = y * tile.width * channels;
                if !tile.values.is_empty() {
                    picture[to..to + count].copy_from_slice(&tile.values[from..from + count]);
                }
            }
        }
    }
}

impl Tile {
    fn new(y: &Tensor) -> Result<Tile> {
        let [_, height, width, _] = y.dims("vae", "tile")?;
        let values = match y.device() {
            Device::Meta(_) => Vec::new(),
            _ => y.to_f32_vec()?,
        };
        Ok(Tile { height, width, values })
    }

    /// The first rows become the last ones of the tile above, little by little.
    fn blend_below(&mut self, above: &Tile, overlap: usize, channels: usize) {
        let overlap = overlap.min(above.height).min(self.height);
        for y in 0..overlap {
            self.blend([y, 0], above, [above.height - overlap + y, 0], self.width * channels, y, overlap);
        }
    }

    /// The first columns become the last ones of the tile to the left.
    fn blend_right_of(&mut self, left: &Tile, overlap: usize, channels: usize) {
        let overlap = overlap.min(left.width).min(self.width);
        for y in 0..self.height {
            for x in 0..overlap {
                let from = [y, (left.width - overlap + x) * channels];
                self.blend([y, x * channels], left, from, channels, x, overlap);
            }
        }
    }

    /// `count` values from row and value `to` on: `i` parts of `parts` of their own, the rest of `other`'s.
    fn blend(&mut self, to: [usize; 2], other: &Tile, from: [usize; 2], count: usize, i: usize, parts: usize) {
        if self.values.is_empty() {
            return;
        }
        let own = i as f32 / parts as f32;
        let at = |tile: &Tile, [row, value]: [usize; 2]| row * tile.values.len() / tile.height + value;
        let (to, from) = (at(self, to), at(other, from));
        for (to, from) in self.values[to..][..count].iter_mut().zip(&other.values[from..][..count]) {
            *to = from * (1.0 - own) + *to * own;
        }
    }
}

/// Rows and columns `[first, end)` of one image.
fn cut(x: &Tensor, rows: [usize; 2], columns: [usize; 2]) -> Result<Tensor> {
    let [_, h, w, c] = x.dims("vae", "x")?;
    let (height, width) = (rows[1] - rows[0], columns[1] - columns[0]);
    let stripe = x.reshape(&[h, w * c])?.rows(rows[0]..rows[1])?;
    if width == w {
        return stripe.reshape(&[1, height, w, c]);
    }
    let pixels = stripe.reshape(&[height * w, c])?;
    let mut part = Tensor::uninit(x.device(), &[height * width, c], x.dtype())?;
    for y in 0..height {
        part.copy_rows_from(y * width, &pixels.rows(y * w + columns[0]..y * w + columns[1])?)?;
    }
    part.reshape(&[1, height, width, c])
}
