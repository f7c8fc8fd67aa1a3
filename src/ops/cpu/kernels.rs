//! Micro-kernels of the matrix product, one per instruction set, and the transposition that feeds them.

use std::ops::Range;

use super::gemm::{K_BLOCK, TILE_STRIDE};
use super::math::{self, Level};
use crate::runtime::{DType, Element};

/// The tile that the sums' registers hold, by instruction set.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    level: Level,
    /// Rows of a tile.
    pub rows: usize,
    /// Columns of a panel.
    pub columns: usize,
}

impl Kernel {
    /// The one for this machine.
    pub fn best() -> Kernel {
        Kernel::of(math::level())
    }

    fn of(level: Level) -> Kernel {
        let (rows, columns) = match level {
            Level::Avx512 => (14, 32), // 28 sums, 2 panel vectors and a broadcast: 31 of 32 registers
            Level::Avx2 => (6, 16),    // 12 + 2 + 1 of 16
            Level::Baseline => (4, 8),
        };
        Kernel { level, rows, columns }
    }

    /// `sums[i][j] (+)= sum over k of tile[i][k] * panel[k][j]`, i below `rows`, j below the panel's columns, or only
    /// the first half of them when `narrow`.
    ///
    /// `tile`: rows [`TILE_STRIDE`] apart; `sums`: rows `stride` apart; `add`: to what is there.
    #[allow(clippy::too_many_arguments)]
    pub fn run(
        &self,
        rows: usize,
        narrow: bool,
        k: usize,
        tile: &[f32],
        panel: &[f32],
        sums: &mut [f32],
        stride: usize,
        add: bool,
    ) {
        let columns = if narrow { self.columns / 2 } else { self.columns };
        assert!((1..=self.rows).contains(&rows) && k <= K_BLOCK);
        assert!(tile.len() >= (rows - 1) * TILE_STRIDE + k && panel.len() >= k * self.columns);
        assert!(sums.len() >= (rows - 1) * stride + columns);
        let args = Args { k, tile: tile.as_ptr(), panel: panel.as_ptr(), sums: sums.as_mut_ptr(), stride, add };
        // SAFETY: the assertions bound every access of a kernel with this many rows and columns; `level` was detected.
        unsafe {
            match self.level {
                #[cfg(target_arch = "x86_64")]
                Level::Avx512 => x86::avx512(rows, narrow, args),
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 => x86::avx2(rows, narrow, args),
                _ => baseline(rows, narrow, args),
            }
        }
    }

    /// `panel[k][j] = weight[j * stride + k]` for `count` columns j of a panel.
    pub fn transpose<T: Element>(&self, weight: &[T], stride: usize, count: usize, k: Range<usize>, panel: &mut [f32]) {
        const ROWS: usize = 16;
        let (width, depth) = (self.columns, k.len());
        assert!(count <= width && depth <= K_BLOCK && panel.len() >= depth * width);
        let mut block = [0.0f32; ROWS * K_BLOCK];
        for first in (0..count).step_by(ROWS) {
            let rows = ROWS.min(count - first);
            let (from, from_stride) = match bytemuck::try_cast_slice::<T, f32>(weight) {
                Ok(weight) if T::DTYPE == DType::F32 => (&weight[first * stride + k.start..], stride),
                _ => {
                    for j in 0..rows {
                        math::load(&mut block[j * K_BLOCK..][..depth], &weight[(first + j) * stride..][k.clone()]);
                    }
                    (&block[..], K_BLOCK)
                }
            };
            assert!(from.len() >= (rows - 1) * from_stride + depth);
            let mut done = 0;
            #[cfg(target_arch = "x86_64")]
            if self.level == Level::Avx512 && rows == ROWS {
                done = depth / 16 * 16;
                for k in (0..done).step_by(16) {
                    let (from, to) = (from[k..].as_ptr(), panel[k * width + first..].as_mut_ptr());
                    // SAFETY: rows 0..16 and k..k + 16 lie in `from`, rows k..k + 16 and columns first..first + 16 in
                    // the panel, by the assertions.
                    unsafe { x86::transpose_16x16(from, from_stride, to, width) };
                }
            }
            for k in done..depth {
                for j in 0..rows {
                    panel[k * width + first + j] = from[j * from_stride + k];
                }
            }
        }
    }
}

#[derive(Clone, Copy)]
struct Args {
    k: usize,
    /// `rows` rows, [`TILE_STRIDE`] apart, k readable values each.
    tile: *const f32,
    /// k rows of the kernel's full panel width.
    panel: *const f32,
    /// `rows` rows, `stride` apart, as many writable values as the kernel has columns.
    sums: *mut f32,
    stride: usize,
    add: bool,
}

/// A vector register of f32.
trait Vector: Copy {
    const LANES: usize;
    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// `self * b + c`
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
    unsafe fn add(self, b: Self) -> Self;
    /// Asks for a cache line; the address may be anything.
    fn prefetch(_from: *const f32) {}
}

/// `ROWS` rows times `WIDE` vectors of a panel that is two vectors wide.
///
/// # Safety
/// `args` as [`Args`] says, and the instruction set of `V` present.
#[inline(always)]
unsafe fn tile<V: Vector, const ROWS: usize, const WIDE: usize>(args: Args) {
    let Args { k, tile, mut panel, sums, stride, add } = args;
    // SAFETY: the caller's.
    unsafe {
        if add {
            for i in 0..ROWS {
                V::prefetch(sums.add(i * stride));
                V::prefetch(sums.add(i * stride + V::LANES));
            }
        }
        let mut sum = [[V::splat(0.0); WIDE]; ROWS];
        for k in 0..k {
            let mut b = [V::splat(0.0); WIDE];
            for (j, b) in b.iter_mut().enumerate() {
                *b = V::load(panel.add(j * V::LANES));
            }
            panel = panel.add(2 * V::LANES);
            for (i, sum) in sum.iter_mut().enumerate() {
                let a = V::splat(*tile.add(i * TILE_STRIDE + k));
                for (sum, b) in sum.iter_mut().zip(b) {
                    *sum = a.mul_add(b, *sum);
                }
            }
        }
        for (i, sum) in sum.iter().enumerate() {
            for (j, &sum) in sum.iter().enumerate() {
                let to = sums.add(i * stride + j * V::LANES);
                if add { V::load(to).add(sum).store(to) } else { sum.store(to) }
            }
        }
    }
}

/// Calls the instance of [`tile`] for a number of rows that is known only at run time.
macro_rules! by_rows {
    ($V:ty, $rows:expr, $narrow:expr, $args:expr, [$($n:literal)*]) => {
        match ($rows, $narrow) {
            $(($n, false) => unsafe { tile::<$V, $n, 2>($args) },
              ($n, true) => unsafe { tile::<$V, $n, 1>($args) },)*
            _ => unreachable!("checked: at most as many rows as a tile has"),
        }
    };
}

impl Vector for [f32; 4] {
    const LANES: usize = 4;
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        [value; 4]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's: four readable values.
        unsafe { from.cast::<[f32; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's: four writable values.
        unsafe { to.cast::<[f32; 4]>().write_unaligned(self) }
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        std::array::from_fn(|i| math::fma::<{ cfg!(target_arch = "aarch64") }>(self[i], b[i], c[i]))
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        std::array::from_fn(|i| self[i] + b[i])
    }
}

/// # Safety
/// As [`tile`].
unsafe fn baseline(rows: usize, narrow: bool, args: Args) {
    by_rows!([f32; 4], rows, narrow, args, [1 2 3 4]);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Args, Vector, tile};

    /// # Safety
    /// As [`tile`].
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    pub unsafe fn avx512(rows: usize, narrow: bool, args: Args) {
        by_rows!(__m512, rows, narrow, args, [1 2 3 4 5 6 7 8 9 10 11 12 13 14]);
    }

    /// # Safety
    /// As [`tile`].
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn avx2(rows: usize, narrow: bool, args: Args) {
        by_rows!(__m256, rows, narrow, args, [1 2 3 4 5 6]);
    }

    // SAFETY of the bodies below: the caller's, namely the instruction set and readable or writable memory.
    impl Vector for __m512 {
        const LANES: usize = 16;
        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            unsafe { _mm512_set1_ps(value) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { _mm512_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm512_storeu_ps(to, self) }
        }
        #[inline(always)]
        unsafe fn mul_add(self, b: Self, c: Self) -> Self {
            unsafe { _mm512_fmadd_ps(self, b, c) }
        }
        #[inline(always)]
        unsafe fn add(self, b: Self) -> Self {
            unsafe { _mm512_add_ps(self, b) }
        }
        #[inline(always)]
        fn prefetch(from: *const f32) {
            // SAFETY: a hint; SSE is part of x86-64.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
        }
    }

    impl Vector for __m256 {
        const LANES: usize = 8;
        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            unsafe { _mm256_set1_ps(value) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { _mm256_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm256_storeu_ps(to, self) }
        }
        #[inline(always)]
        unsafe fn mul_add(self, b: Self, c: Self) -> Self {
            unsafe { _mm256_fmadd_ps(self, b, c) }
        }
        #[inline(always)]
        unsafe fn add(self, b: Self) -> Self {
            unsafe { _mm256_add_ps(self, b) }
        }
    }

    /// `to[i][j] = from[j][i]` for 16 x 16 values, rows `from_stride` and `to_stride` apart.
    ///
    /// # Safety
    /// AVX-512 F present; both squares readable and writable.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn transpose_16x16(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
        // SAFETY: the caller's.
        unsafe {
            let mut rows = [_mm512_setzero_ps(); 16];
            for (i, row) in rows.iter_mut().enumerate() {
                *row = _mm512_loadu_ps(from.add(i * from_stride));
            }
            // 4 x 4 squares within the 128-bit lanes of four rows each: pairs[4 g + c] holds, in lane l, the values
            // (rows 4 g..4 g + 4, column 4 l + c).
            let mut pairs = [_mm512_setzero_ps(); 16];
            for g in 0..4 {
                let [a, b, c, d] = [rows[4 * g], rows[4 * g + 1], rows[4 * g + 2], rows[4 * g + 3]];
                let (ab_low, ab_high) = (_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
                let (cd_low, cd_high) = (_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
                pairs[4 * g] = _mm512_shuffle_ps::<0x44>(ab_low, cd_low);
                pairs[4 * g + 1] = _mm512_shuffle_ps::<0xee>(ab_low, cd_low);
                pairs[4 * g + 2] = _mm512_shuffle_ps::<0x44>(ab_high, cd_high);
                pairs[4 * g + 3] = _mm512_shuffle_ps::<0xee>(ab_high, cd_high);
            }
            // Then the 4 x 4 lanes: column 4 l + c is lane l of pairs[c], pairs[4 + c], pairs[8 + c], pairs[12 + c].
            for c in 0..4 {
                let [p, q, r, s] = [pairs[c], pairs[4 + c], pairs[8 + c], pairs[12 + c]];
                let (pq_even, pq_odd) = (_mm512_shuffle_f32x4::<0x88>(p, q), _mm512_shuffle_f32x4::<0xdd>(p, q));
                let (rs_even, rs_odd) = (_mm512_shuffle_f32x4::<0x88>(r, s), _mm512_shuffle_f32x4::<0xdd>(r, s));
                _mm512_storeu_ps(to.add(c * to_stride), _mm512_shuffle_f32x4::<0x88>(pq_even, rs_even));
                _mm512_storeu_ps(to.add((4 + c) * to_stride), _mm512_shuffle_f32x4::<0x88>(pq_odd, rs_odd));
                _mm512_storeu_ps(to.add((8 + c) * to_stride), _mm512_shuffle_f32x4::<0xdd>(pq_even, rs_even));
                _mm512_storeu_ps(to.add((12 + c) * to_stride), _mm512_shuffle_f32x4::<0xdd>(pq_odd, rs_odd));
            }
        }
    }
}
