//! Seeded Gaussian noise, value for value what torch draws, so that a seed means the same picture everywhere; and what torch
//! and Python draw beside it, for methods that choose something at random.
//!
//! The order of draws is part of a method's documentation; within a draw values come in NCHW order, as
//! `torch.randn([N, C, H, W], generator=g)` fills its tensor.

use std::f64::consts::TAU;

use crate::error::Result;
use crate::names::named;
use crate::runtime::{DType, Device, Tensor};

/// Which of torch's generators is reproduced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum RngKind {
    /// `torch.Generator("cpu")`, f32, bit for bit as on an x86-64 machine with AVX2 or AVX-512 (torch's AVX2 code runs
    /// on both; its portable fallback for older processors differs in the last bits).
    #[default]
    TorchCpu,
    /// `torch.Generator("cuda")`, f32, to rounding: the card's logf and fast sincosf differ from ours in the last bits.
    /// The layout follows torch's launch rules for a card that runs [`CUDA_THREADS`] threads at once; below that many
    /// values a draw is the same on every such card. Checked against Philox's published vectors, the values that
    /// stable-diffusion-webui prints for the same generator, and torch 2.11 on an H200: at most 2.4e-6 apart.
    TorchCuda,
}

named!(RngKind, [TorchCpu => "torch-cpu", TorchCuda => "torch-cuda"]);

/// Threads in torch's largest grid for a draw on a data-centre card: 132 multiprocessors of 2048 threads (H100, H200).
pub const CUDA_THREADS: u64 = 132 * 2048;

/// One generator; each draw continues where the last one ended.
#[derive(Clone, Debug)]
pub struct Rng(Generator);

#[derive(Clone, Debug)]
enum Generator {
    TorchCpu(Box<TorchCpu>),
    TorchCuda(TorchCuda),
}

impl Rng {
    /// As `torch.Generator(..).manual_seed(seed)`. Of the seed the cpu generator uses the lower 32 bits.
    pub fn new(kind: RngKind, seed: u64) -> Rng {
        Rng(match kind {
            RngKind::TorchCpu => {
                Generator::TorchCpu(Box::new(TorchCpu { bits: Mt19937::new(seed as u32), cached: None }))
            }
            RngKind::TorchCuda => Generator::TorchCuda(TorchCuda { seed, offset: 0 }),
        })
    }

    /// One draw of `count` values from N(0, 1): `torch.randn(count, generator=g)`. Two draws are not one of the summed
    /// size: see the kinds for how torch treats the ends of a draw.
    pub fn normal(&mut self, count: usize) -> Vec<f32> {
        match &mut self.0 {
            Generator::TorchCpu(generator) => generator.normal(count),
            Generator::TorchCuda(generator) => generator.normal(count),
        }
    }

    /// One draw of `torch.randn([n, c, h, w])`, stored channels-last: `[n, h, w, c]`, f32. On the meta device nothing is
    /// drawn.
    ///
    /// # Errors
    /// As [`Tensor::uninit`].
    pub fn normal_nhwc(&mut self, device: &Device, [n, h, w, c]: [usize; 4]) -> Result<Tensor> {
        let shape = [n, h, w, c];
        // The allocation first: a shape beyond memory is an error, not an abort in the draw.
        let mut tensor = Tensor::uninit(device, &shape, DType::F32)?;
        self.normal_nhwc_into(&mut tensor)?;
        Ok(tensor)
    }

    /// [`normal_nhwc`](Rng::normal_nhwc) into a tensor `[n, h, w, c]` that nobody else holds.
    ///
    /// # Errors
    /// [`Error::Shape`]; [`Error::Driver`].
    pub fn normal_nhwc_into(&mut self, to: &mut Tensor) -> Result<()> {
        let [n, h, w, c] = to.dims("normal", "to")?;
        if let Device::Meta(_) = to.device() {
            return Ok(());
        }
        let planar = self.normal(n * h * w * c);
        let mut values = vec![0.0; planar.len()];
        for (image, planes) in values.chunks_exact_mut((h * w * c).max(1)).zip(planar.chunks_exact((h * w * c).max(1)))
        {
            for (channel, plane) in planes.chunks_exact(h * w).enumerate() {
                image[channel..].iter_mut().step_by(c).zip(plane).for_each(|(to, &from)| *to = from);
            }
        }
        to.write_f32(&values)
    }
}

/// Matsumoto & Nishimura 1998, doi:10.1145/272991.272995.
#[derive(Clone, Debug)]
struct Mt19937 {
    state: [u32; 624],
    next: usize,
}

impl Mt19937 {
    fn new(seed: u32) -> Mt19937 {
        let mut state = [seed; 624];
        for i in 1..624 {
            let last = state[i - 1];
            state[i] = 1_812_433_253u32.wrapping_mul(last ^ (last >> 30)).wrapping_add(i as u32);
        }
        Mt19937 { state, next: 624 }
    }

    /// The published init_by_array, of at least one word.
    fn by_array(key: &[u32]) -> Mt19937 {
        let Mt19937 { mut state, next } = Mt19937::new(19_650_218);
        let mixed = |last: u32, factor: u32| (last ^ (last >> 30)).wrapping_mul(factor);
        // Places 1 to 623 in turn; place 0 holds what stands before place 1.
        let places = || (1..624).cycle();
        let mut last = 0;
        for (i, j) in places().zip((0..key.len()).cycle()).take(624.max(key.len())) {
            state[i] = (state[i] ^ mixed(state[i - 1], 1_664_525)).wrapping_add(key[j]).wrapping_add(j as u32);
            if i == 623 {
                state[0] = state[623];
            }
            last = i;
        }
        for i in places().skip(last).take(623) {
            state[i] = (state[i] ^ mixed(state[i - 1], 1_566_083_941)).wrapping_sub(i as u32);
            if i == 623 {
                state[0] = state[623];
            }
        }
        state[0] = 0x8000_0000;
        Mt19937 { state, next }
    }

    fn next_u32(&mut self) -> u32 {
        if self.next == 624 {
            for i in 0..624 {
                let word = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % 624] & 0x7fff_ffff);
                let twist = if word & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + 397) % 624] ^ (word >> 1) ^ twist;
            }
            self.next = 0;
        }
        let mut word = self.state[self.next];
        self.next += 1;
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c_5680;
        word ^= (word << 15) & 0xefc6_0000;
        word ^ (word >> 18)
    }

    /// 24 bits, in [0, 1).
    fn uniform_f32(&mut self) -> f32 {
        (self.next_u32() & 0x00ff_ffff) as f32 / (1 << 24) as f32
    }

    /// 53 bits, in [0, 1); the first word is the upper half.
    fn uniform_f64(&mut self) -> f64 {
        let word = u64::from(self.next_u32()) << 32 | u64::from(self.next_u32());
        (word & ((1 << 53) - 1)) as f64 / (1u64 << 53) as f64
    }
}

/// torch's CPU generator as methods draw from it beside the noise: `torch.manual_seed(seed)`, then one number at a time. Of the
/// seed it uses the lower 32 bits.
#[derive(Clone, Debug)]
pub struct TorchUniform(Mt19937);

impl TorchUniform {
    pub fn new(seed: u64) -> TorchUniform {
        TorchUniform(Mt19937::new(seed as u32))
    }

    /// `torch.rand(1)`: in [0, 1), of 24 bits. So many draws are those of one larger `torch.rand`.
    pub fn rand(&mut self) -> f32 {
        self.0.uniform_f32()
    }

    /// `torch.empty(1).uniform_(from, to)`, where torch's compiler fused the multiplication and the addition.
    pub fn uniform(&mut self, from: f32, to: f32) -> f32 {
        self.rand().mul_add(to - from, from)
    }
}

/// Python's `random.Random(seed)`.
#[derive(Clone, Debug)]
pub struct PythonRandom(Mt19937);

impl PythonRandom {
    /// Python seeds by an array: the seed's words of 32 bits, the lowest first, without zeros at the top.
    pub fn new(seed: u64) -> PythonRandom {
        let words = [seed as u32, (seed >> 32) as u32];
        PythonRandom(Mt19937::by_array(if words[1] == 0 { &words[..1] } else { &words }))
    }

    /// `randint(low, high)`, both ends included; `low` where `high` is less.
    pub fn randint(&mut self, low: i64, high: i64) -> i64 {
        // Values, less one: their number may be 2^64.
        let most = high.max(low).wrapping_sub(low) as u64;
        // As many bits as their number has, drawn until they are below it.
        loop {
            let (drawn, below) = match most.checked_add(1) {
                Some(values) => {
                    let drawn = self.bits(values.ilog2() + 1);
                    (drawn, drawn < values)
                }
                None => (self.bits(64), self.bits(1) == 0),
            };
            if below {
                return low.wrapping_add(drawn as i64);
            }
        }
    }

    /// `getrandbits(count)`, of 1 to 64: the lower word is drawn first, of the last one the upper bits count.
    fn bits(&mut self, count: u32) -> u64 {
        match count {
            0..=32 => u64::from(self.0.next_u32()) >> (32 - count),
            _ => u64::from(self.0.next_u32()) | u64::from(self.0.next_u32() >> (64 - count.min(64))) << 32,
        }
    }
}

/// Draws of 16 and more are filled with uniforms, then turned into normals in blocks of 16 (Box & Muller 1958): the first
/// eight of a block give the radii, the other eight the angles. When 16 does not divide the size, the last 16 values are
/// drawn once more, from fresh uniforms. Smaller draws take pairs in f64, of which one may be left for the next draw.
#[derive(Clone, Debug)]
struct TorchCpu {
    bits: Mt19937,
    /// The second half of a pair; only draws below 16 leave and take it.
    cached: Option<f64>,
}

impl TorchCpu {
    fn normal(&mut self, count: usize) -> Vec<f32> {
        if count < 16 {
            return (0..count).map(|_| self.next_f64() as f32).collect();
        }
        let mut values: Vec<f32> = (0..count).map(|_| self.bits.uniform_f32()).collect();
        values.as_chunks_mut().0.iter_mut().for_each(box_muller_16);
        if !count.is_multiple_of(16)
            && let Some(last) = values.last_chunk_mut()
        {
            last.fill_with(|| self.bits.uniform_f32());
            box_muller_16(last);
        }
        values
    }

    fn next_f64(&mut self) -> f64 {
        if let Some(value) = self.cached.take() {
            return value;
        }
        let (u1, u2) = (self.bits.uniform_f64(), self.bits.uniform_f64());
        let radius = (-2.0 * (-u2).ln_1p()).sqrt();
        let angle = TAU * u1;
        self.cached = Some(radius * angle.sin());
        radius * angle.cos()
    }
}

/// Uniforms to normals in place.
fn box_muller_16(block: &mut [f32; 16]) {
    let (first, second) = block.split_at_mut(8);
    for (u1, u2) in first.iter_mut().zip(second) {
        let radius = (-2.0 * ln(1.0 - *u1)).sqrt();
        let (sin, cos) = sin_cos(TAU as f32 * *u2);
        // + 0 turns -0 into 0, as torch's addition of the mean does.
        *u1 = radius * cos + 0.0;
        *u2 = radius * sin + 0.0;
    }
}

/// `c[0] x^n + c[1] x^(n-1) + ...`, one rounding a step.
fn horner<const N: usize>(x: f32, c: [f32; N]) -> f32 {
    c.into_iter().reduce(|sum, c| sum.mul_add(x, c)).unwrap_or(0.0)
}

/// Natural logarithm of a normal number, rounding for rounding as torch's vector code: the Cephes library's logf, with
/// the multiplications and additions fused where that code's compiler fused them.
#[allow(clippy::excessive_precision)] // as published
fn ln(x: f32) -> f32 {
    const P: [f32; 9] = [
        7.0376836292e-2,
        -1.1514610310e-1,
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    ];
    // ln 2 = LN2_HI + LN2_LO, the first exact in a few bits.
    const LN2_HI: f32 = 0.693359375;
    const LN2_LO: f32 = -2.12194440e-4;
    // x = m 2^e, m in [1/2, 1); then m - 1, or 2 m - 1 for m below sqrt(1/2).
    let mut e = (x.to_bits() >> 23) as i32 - 126;
    let mut m = f32::from_bits((x.to_bits() & 0x007f_ffff) | 0x3f00_0000);
    if m < std::f32::consts::FRAC_1_SQRT_2 {
        e -= 1;
        m += m;
    }
    let (m, e) = (m - 1.0, e as f32);
    let square = m * m;
    let cubic = (horner(m, P) * m).mul_add(square, e * LN2_LO);
    e.mul_add(LN2_HI, m + (-0.5f32).mul_add(square, cubic))
}

/// Sine and cosine of `x` in [0, 8), as [`ln`] is: the Cephes library's sinf and cosf.
#[allow(clippy::excessive_precision)] // as published
fn sin_cos(x: f32) -> (f32, f32) {
    const SIN: [f32; 3] = [-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1];
    const COS: [f32; 3] = [2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2];
    // pi/4 in three parts, the first two exact in a few bits.
    const PI_4: [f32; 3] = [0.78515625, 2.4187564849853515625e-4, 3.77489497744594108e-8];
    // The multiple of pi/2 nearest to x, counted in octants: 0, 2, 4, 6 or 8.
    let octant = ((x * 1.27323954473516) as i32 + 1) & !1;
    let r = PI_4.into_iter().fold(x, |r, part| (-part).mul_add(octant as f32, r));
    let square = r * r;
    let sin = (horner(square, SIN) * square).mul_add(r, r);
    let cos = (horner(square, COS) * square).mul_add(square, -0.5 * square) + 1.0;
    match octant & 7 {
        0 => (sin, cos),
        2 => (cos, -sin),
        4 => (-sin, -cos),
        _ => (-cos, sin),
    }
}

/// Philox 4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405): thread i of the draw's grid has subsequence i, and
/// every pass over the grid takes four values a thread, which land a grid apart.
#[derive(Clone, Debug)]
struct TorchCuda {
    seed: u64,
    /// In quadruples: torch's offset divided by 4.
    offset: u64,
}

impl TorchCuda {
    fn normal(&mut self, count: usize) -> Vec<f32> {
        const BLOCK: u64 = 256;
        let total = count as u64;
        let threads = total.div_ceil(BLOCK).min(CUDA_THREADS / BLOCK) * BLOCK;
        let mut values = vec![0.0; count];
        for (index, value) in values.iter_mut().enumerate() {
            let (row, thread) = (index as u64 / threads, index as u64 % threads);
            let words = philox(self.seed, thread, self.offset + row / 4);
            let normals = [box_muller_cuda(words[0], words[1]), box_muller_cuda(words[2], words[3])];
            *value = normals.as_flattened()[(row % 4) as usize];
        }
        if total > 0 {
            self.offset += total.div_ceil(4 * threads);
        }
        values
    }
}

/// curand's Box-Muller: the sine first. Angles and radii in f32 as there, their functions rounded once.
fn box_muller_cuda(x: u32, y: u32) -> [f32; 2] {
    const INV: f32 = 1.0 / (1u64 << 32) as f32;
    let inv_tau = INV * TAU as f32;
    let u = (x as f32).mul_add(INV, INV / 2.0);
    let angle = (y as f32).mul_add(inv_tau, inv_tau / 2.0);
    let radius = (-2.0 * f64::from(u).ln() as f32).sqrt();
    let (sin, cos) = f64::from(angle).sin_cos();
    [sin as f32 * radius, cos as f32 * radius]
}

/// Block `offset` of subsequence `thread`.
fn philox(seed: u64, thread: u64, offset: u64) -> [u32; 4] {
    let words = |x: u64| [x as u32, (x >> 32) as u32];
    let ([offset_lo, offset_hi], [thread_lo, thread_hi]) = (words(offset), words(thread));
    philox_rounds([offset_lo, offset_hi, thread_lo, thread_hi], words(seed))
}

/// The ten rounds.
fn philox_rounds(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
        }
        let [a, b] = [u64::from(counter[0]) * 0xd251_1f53, u64::from(counter[2]) * 0xcd9e_8d57];
        let (a_hi, b_hi) = ((a >> 32) as u32, (b >> 32) as u32);
        counter = [b_hi ^ counter[1] ^ key[0], b as u32, a_hi ^ counter[3] ^ key[1], a as u32];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Random123's kat_vectors for philox4x32 with 10 rounds.
    #[test]
    fn philox_known_answers() {
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344, 0xa409_3822, 0x299f_31d0];
        for (counter, key, want) in [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            ([pi[0], pi[1], pi[2], pi[3]], [pi[4], pi[5]], [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]),
        ] {
            assert_eq!(philox_rounds(counter, key), want);
        }
    }
}
