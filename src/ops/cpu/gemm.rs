//! The matrix product behind linear and conv2d: `sums[r, j] = sum_k rows[r, k] * weight[j, k]`, f32.
//!
//! The left side is not a matrix in memory but a [`Rows`]: asked for a stretch of one row, it copies it from the input,
//! converting dtypes, stepping over padding, taps and sources. So a convolution needs no im2col buffer and no padded
//! copy. The right side is the weight as stored, `[n, k]`; a block of it is transposed into panels when it is used.
//!
//! Blocks (Goto & van de Geijn 2008): a task is a block of rows times a block of columns; it walks k in steps of at most
//! [`K_BLOCK`]: the weight block becomes panels of [`Kernel::columns`] columns (L2), a tile of [`Kernel::rows`] rows is
//! gathered (L1), and the micro-kernel multiplies the tile with every panel. After the last step a [`Store`] gets each
//! row of sums: bias, activation, residual, rounding.
//!
//! Every sum is `((block 0) + block 1) + ...`, each block one chain over k, and the blocks depend on k alone: an element
//! does not depend on the other rows, on the number of threads or on where its tile begins.

use std::cell::Cell;
use std::ops::Range;

use rayon::prelude::*;

use super::kernels::Kernel;
use super::math;
use crate::runtime::Element;

/// Longest stretch of k between two updates of the sums: a tile of rows (14 x 320 f32 = 18 KiB) stays in L1. The
/// models' widths are multiples of 320: their linear layers of 320 inputs take one step.
pub const K_BLOCK: usize = 320;

/// Distance of a tile's rows in the tile buffer; the pad keeps them out of one another's cache sets.
pub const TILE_STRIDE: usize = K_BLOCK + 16;

/// Columns of a task: with [`K_BLOCK`] the packed weight block is 400 KiB, a fraction of L2.
const MAX_COLUMNS: usize = 320;

/// Rows of a task: the block's transposition is paid once for so many rows, the sums take 2.5 MiB.
const MAX_ROWS: usize = 2048;

/// The left side of the product.
pub trait Rows: Sync {
    /// Writes the values `k` of row `row` to `to`, which is as long as `k`.
    fn load(&self, row: usize, k: Range<usize>, to: &mut [f32]);
}

/// Takes the sums.
pub trait Store: Sync {
    /// `sums`: columns `column..column + sums.len()` of row `row`, free to be overwritten. Called once for each.
    fn store(&self, row: usize, column: usize, sums: &mut [f32]);
}

/// A dense `[m, k]` left side.
pub struct Dense<'a, T> {
    pub x: &'a [T],
    pub k: usize,
}

impl<T: Element> Rows for Dense<'_, T> {
    fn load(&self, row: usize, k: Range<usize>, to: &mut [f32]) {
        math::load(to, &self.x[row * self.k..][k]);
    }
}

/// `rows [m, k] * weight [n, k]^T`, each row of sums to `out`. Runs on rayon's current pool.
pub fn matmul<T: Element>([m, n, k]: [usize; 3], rows: &impl Rows, weight: &[T], out: &impl Store) {
    assert_eq!(weight.len(), n * k, "weight is [n, k]");
    let kernel = Kernel::best();
    let task = Task { rows, weight, out, k, kernel };
    let (row_block, column_block) = blocks(m, n, kernel, rayon::current_num_threads());
    let column_tasks = n.div_ceil(column_block);
    (0..m.div_ceil(row_block) * column_tasks).into_par_iter().with_max_len(1).for_each(|i| {
        let (r, c) = (i / column_tasks * row_block, i % column_tasks * column_block);
        task.run(r..m.min(r + row_block), c..n.min(c + column_block));
    });
}

/// Rows and columns of a task: large enough to use the caches, small enough to keep every thread busy.
fn blocks(m: usize, n: usize, kernel: Kernel, threads: usize) -> (usize, usize) {
    let split = |total: usize, parts: usize, multiple: usize| {
        total.div_ceil(parts.max(1)).next_multiple_of(multiple).max(multiple)
    };
    let (mut row_parts, mut column_parts) = (m.div_ceil(MAX_ROWS).max(1), n.div_ceil(MAX_COLUMNS).max(1));
    let wanted = if threads == 1 { 1 } else { 4 * threads };
    // A row block below 512 rows makes the transposition of the weights felt; a column block below 64, the gathering.
    while row_parts * column_parts < wanted && m / (row_parts + 1) >= 512 {
        row_parts += 1;
    }
    while row_parts * column_parts < wanted && n / (column_parts + 1) >= 2 * kernel.columns {
        column_parts += 1;
    }
    while row_parts * column_parts < threads && m / (row_parts + 1) >= kernel.rows {
        row_parts += 1;
    }
    (split(m, row_parts, kernel.rows), split(n, column_parts, kernel.columns))
}

struct Task<'a, R, T, S> {
    rows: &'a R,
    weight: &'a [T],
    out: &'a S,
    k: usize,
    kernel: Kernel,
}

thread_local! {
    /// Panels, tile and sums of this thread's last task, kept to spare the page faults of a fresh allocation.
    static SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

impl<R: Rows, T: Element, S: Store> Task<'_, R, T, S> {
    fn run(&self, rows: Range<usize>, columns: Range<usize>) {
        let Kernel { rows: tile_rows, columns: panel_columns, .. } = self.kernel;
        let width = columns.len().next_multiple_of(panel_columns);
        let steps = self.k.div_ceil(K_BLOCK).max(1);
        let k_block = self.k.div_ceil(steps);
        // One step: the sums live in the tile only. More: they wait for the next step.
        let kept_rows = if steps == 1 { tile_rows } else { rows.len() };

        let mut scratch = SCRATCH.take();
        let sizes = [width * k_block, tile_rows * TILE_STRIDE, kept_rows * width];
        scratch.resize(scratch.len().max(sizes.iter().sum::<usize>() + 16), 0.0);
        let misaligned = scratch.as_ptr().align_offset(64).min(16);
        let (panels, rest) = scratch[misaligned..].split_at_mut(sizes[0]);
        let (tile, sums) = rest.split_at_mut(sizes[1]);

        for step in 0..steps {
            let k = (step * k_block).min(self.k)..((step + 1) * k_block).min(self.k);
            self.pack(columns.clone(), k.clone(), panels);
            let calls = rows.len().div_ceil(tile_rows) * (width / panel_columns);
            let mut next = Ahead::new(self.weight, self.k, columns.clone(), k.end..self.k.min(k.end + k_block), calls);
            for tile_range in tiles(rows.clone(), tile_rows) {
                let kept = if steps == 1 { 0 } else { tile_range.start - rows.start };
                let sums = &mut sums[kept * width..(kept + tile_range.len()) * width];
                for (i, row) in tile_range.clone().enumerate() {
                    self.rows.load(row, k.clone(), &mut tile[i * TILE_STRIDE..][..k.len()]);
                }
                for (p, panel) in panels[..width * k.len()].chunks_exact((panel_columns * k.len()).max(1)).enumerate() {
                    let live = columns.len() - p * panel_columns;
                    let narrow = live <= panel_columns / 2;
                    let to = &mut sums[p * panel_columns..];
                    self.kernel.run(tile_range.len(), narrow, k.len(), tile, panel, to, width, step > 0);
                    next.prefetch();
                }
                if k.is_empty() {
                    sums.fill(0.0);
                }
                if step + 1 == steps {
                    for (i, row) in tile_range.enumerate() {
                        self.out.store(row, columns.start, &mut sums[i * width..][..columns.len()]);
                    }
                }
            }
        }
        SCRATCH.set(scratch);
    }

    /// `weight[columns, k]` to panels `[columns / panel][k][panel]`; columns beyond the last are zero.
    fn pack(&self, columns: Range<usize>, k: Range<usize>, panels: &mut [f32]) {
        let width = self.kernel.columns;
        for (p, first) in columns.clone().step_by(width).enumerate() {
            let panel = &mut panels[p * width * k.len()..][..width * k.len()];
            let count = width.min(columns.end - first);
            if count < width {
                panel.fill(0.0);
            }
            self.kernel.transpose(&self.weight[first * self.k..], self.k, count, k.clone(), panel);
        }
    }
}

/// Asks for the next step's weights while this step is computed, a few lines a call: transposing them would otherwise
/// wait for memory, which costs a third of the time where there are few rows (8x8 pixels).
struct Ahead<'a, T> {
    weight: &'a [T],
    /// Columns of `weight`.
    k: usize,
    first_row: usize,
    depth: Range<usize>,
    lines_per_row: usize,
    lines: usize,
    lines_per_call: usize,
    done: usize,
}

impl<'a, T> Ahead<'a, T> {
    fn new(weight: &'a [T], k: usize, rows: Range<usize>, depth: Range<usize>, calls: usize) -> Ahead<'a, T> {
        let lines_per_row = (depth.len() * size_of::<T>()).div_ceil(LINE_BYTES);
        let lines = rows.len() * lines_per_row;
        let lines_per_call = lines.div_ceil(calls.max(1));
        Ahead { weight, k, first_row: rows.start, depth, lines_per_row, lines, lines_per_call, done: 0 }
    }

    fn prefetch(&mut self) {
        for line in self.done..self.lines.min(self.done + self.lines_per_call) {
            let (row, line) = (self.first_row + line / self.lines_per_row, line % self.lines_per_row);
            let element = row * self.k + self.depth.start + line * LINE_BYTES / size_of::<T>();
            prefetch(self.weight.as_ptr().wrapping_add(element));
        }
        self.done += self.lines_per_call;
    }
}

const LINE_BYTES: usize = 64;

/// Asks for a cache line in L2; the address may be anything.
fn prefetch<T>(_from: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a hint that reads nothing; SSE is part of x86-64.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(_from.cast()) }
    }
}

/// Splits `rows` into tiles of at most `most` rows, equal but for one row.
fn tiles(rows: Range<usize>, most: usize) -> impl Iterator<Item = Range<usize>> {
    let count = rows.len().div_ceil(most);
    (0..count).map(move |i| rows.start + rows.len() * i / count..rows.start + rows.len() * (i + 1) / count)
}
