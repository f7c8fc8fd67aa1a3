//! What wgmma, stmatrix, elect and setmaxnreg do, by the kernels of kernels/sm90/conformance_wgmma.cu, against plain loops
//! from NVIDIA's description (PTX ISA: asynchronous warpgroup level matrix instructions, stmatrix, elect). All sums are
//! exact, so that the order in which a card adds does not matter.

use half::{bf16, f16};
use megafuse::runtime::cuda::{Arg, DevicePtr, Launch};
use megafuse::runtime::{CudaDevice, DType, Device, Tensor};

use crate::common::hoppers;

/// Bytes of the kernels' images of shared memory.
const A_BYTES: usize = 16 << 10;
const B_BYTES: usize = 64 << 10;

/// What `entry` writes, of `count` numbers, with `args` after the output.
fn written(device: &Device, card: &CudaDevice, entry: &str, launch: Launch, count: usize, args: &[Arg]) -> Vec<u32> {
    let out = tensor(device, &vec![0xdead_beef; count]);
    let to = DevicePtr::or_null(Some(&out));
    let args: Vec<Arg> = [Arg::of(&to)].into_iter().chain(args.iter().copied()).collect();
    // SAFETY: the arguments are the entry's, as its comment has them; it writes `count` numbers.
    unsafe { card.launch("sm90/conformance_wgmma", entry, launch, &args).unwrap() };
    out.to_f32_vec().unwrap().into_iter().map(f32::to_bits).collect()
}

/// f32 tensors come and go with all their bits.
fn tensor(device: &Device, bits: &[u32]) -> Tensor {
    let values: Vec<f32> = bits.iter().map(|&bits| f32::from_bits(bits)).collect();
    Tensor::from_f32(device, &[bits.len()], DType::F32, &values).unwrap()
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Factors {
    Bf16,
    F16,
    E4m3,
}

impl Factors {
    /// K of one wgmma: 32 bytes.
    fn depth(self) -> usize {
        if self == Factors::E4m3 { 32 } else { 16 }
    }

    /// The code of a small multiple of a half.
    fn encode(self, x: f32) -> u16 {
        match self {
            Factors::Bf16 => bf16::from_f32(x).to_bits(),
            Factors::F16 => f16::from_f32(x).to_bits(),
            Factors::E4m3 => (0..=255).find(|&code| e4m3(code) == x).expect("exact in e4m3").into(),
        }
    }
}

/// FP8 with 4 bits of exponent (bias 7) and 3 of mantissa; no infinities, 0x7f and 0xff are NaN.
fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (8.0 + mantissa) * 2f32.powi(exponent - 10),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// Where an operand's elements lie in shared memory.
#[derive(Clone, Copy, Debug)]
struct Layout {
    /// Of a swizzled row, 32, 64 or 128; 16: no swizzle.
    row_bytes: usize,
    leading: usize,
    stride: usize,
    start: usize,
    mn_major: bool,
}

const ROWS: Layout = Layout { row_bytes: 128, leading: 0, stride: 1024, start: 0, mn_major: false };
const COLUMNS: Layout = Layout { row_bytes: 128, leading: 2048, stride: 1024, start: 0, mn_major: true };

impl Layout {
    /// Byte of element (row, k); `size` bytes each. Matrix-descriptor format and canonical layouts of the PTX ISA.
    fn at(&self, row: usize, k: usize, size: usize) -> usize {
        let width = self.row_bytes;
        let byte = self.start
            + match (self.mn_major, width) {
                (false, 16) => row / 8 * self.stride + row % 8 * 16 + k * size / 16 * self.leading + k * size % 16,
                (false, _) => row / 8 * self.stride + row % 8 * width + k * size,
                (true, 16) => row / 8 * self.stride + row % 8 * 2 + k / 8 * self.leading + k % 8 * 16,
                (true, _) => {
                    let (block, column) = (row / (width / 2), row % (width / 2));
                    block * self.leading + column * 2 + k / 8 * self.stride + k % 8 * width
                }
            };
        // Of the 16-byte chunks of 128 bytes number c of line l goes to c XOR l modulo 2, 4 or 8.
        byte ^ ((byte / 128 % (width / 16)) * 16)
    }

    /// The descriptor but for the image's address.
    fn bits(&self) -> u64 {
        let swizzle = match self.row_bytes {
            128 => 1u64,
            64 => 2,
            32 => 3,
            _ => 0,
        };
        (self.start / 16 + ((self.leading / 16) << 16)) as u64 | (self.stride as u64 / 16) << 32 | swizzle << 62
    }
}

/// Reproducible values: multiples of a half from -2 to 2, different in neighbouring rows and columns.
fn value(row: usize, k: usize) -> f32 {
    ((row * 37 + k * 101 + row * k * 13) % 9) as f32 * 0.5 - 2.0
}

fn image(factors: Factors, layout: Layout, rows: usize, bytes: usize, value: impl Fn(usize, usize) -> f32) -> Vec<u32> {
    let size = 32 / factors.depth();
    let mut image = vec![0xffu8; bytes];
    for (row, k) in (0..rows).flat_map(|row| (0..factors.depth()).map(move |k| (row, k))) {
        let code = factors.encode(value(row, k)).to_le_bytes();
        let at = layout.at(row, k, size);
        image[at..at + size].copy_from_slice(&code[..size]);
    }
    image.chunks(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
}

/// Register i of thread t holds of `a` row t / 32 * 16 + t % 32 / 4, 8 more for odd i, columns 2 (t % 4) and the next, 8
/// more for i >= 2.
fn registers(factors: Factors) -> Vec<u32> {
    let pair = |t: usize, i: usize| {
        let (row, k) = (t / 32 * 16 + t % 32 / 4 + i % 2 * 8, t % 4 * 2 + i / 2 * 8);
        u32::from(factors.encode(value(row, k))) | u32::from(factors.encode(value(row, k + 1))) << 16
    };
    (0..128).flat_map(|t| (0..4).map(move |i| pair(t, i))).collect()
}

/// One product with c against the sums.
fn check(device: &Device, card: &CudaDevice, entry: &str, factors: Factors, n: usize, a: Layout, b: Layout) {
    let image_a = tensor(device, &image(factors, a, 64, A_BYTES, value));
    let column = |column: usize, k: usize| value(column + 5, k + 3);
    let image_b = tensor(device, &image(factors, b, n, B_BYTES, column));
    let held = tensor(device, &if factors == Factors::E4m3 { vec![0; 512] } else { registers(factors) });
    let [from_a, from_b, from_registers] = [&image_a, &image_b, &held].map(|t| DevicePtr::or_null(Some(t)));
    let (bits_a, bits_b, accumulate) = (a.bits(), b.bits(), 1i32);
    let args = [
        Arg::of(&from_a),
        Arg::of(&from_b),
        Arg::of(&from_registers),
        Arg::of(&bits_a),
        Arg::of(&bits_b),
        Arg::of(&accumulate),
    ];
    let launch = Launch::grid([1, 1, 1]).block(128).shared(A_BYTES + B_BYTES);
    let got = written(device, card, entry, launch, 64 * n, &args);
    for (i, got) in got.into_iter().enumerate() {
        let (row, at) = (i / n, i % n);
        let c = row as f64 + if factors == Factors::E4m3 { 0.0 } else { at as f64 / 256.0 };
        let sum: f64 = (0..factors.depth()).map(|k| f64::from(value(row, k)) * f64::from(column(at, k))).sum();
        let (got, want) = (f32::from_bits(got), (c + sum) as f32);
        assert_eq!(got, want, "{device}: {entry}, row {row}, column {at}, a in {a:?}, b in {b:?}");
    }
}

#[test]
fn products_of_every_width_and_form() {
    for (device, card) in hoppers() {
        for n in (8..=256).step_by(8) {
            let check = |form: &str, factors, b| {
                check(&device, &card, &format!("conformance_wgmma_{form}_{n}"), factors, n, ROWS, b)
            };
            // The types by turns, as WGMMA_ENTRIES has them.
            let [t, u] = if n % 16 == 8 { [Factors::Bf16, Factors::F16] } else { [Factors::F16, Factors::Bf16] };
            check("bf16", Factors::Bf16, ROWS);
            check("f16", Factors::F16, ROWS);
            check("trans", t, COLUMNS);
            check("registers", u, ROWS);
            check("registers_trans", t, COLUMNS);
            check("e4m3", Factors::E4m3, ROWS);
        }
    }
}

#[test]
fn layouts_of_shared_memory() {
    for (device, card) in hoppers() {
        let check = |entry: &str, factors, a, b| check(&device, &card, entry, factors, 72, a, b);
        for row_bytes in [128, 64, 32] {
            let plain = Layout { row_bytes, stride: 8 * row_bytes, ..ROWS };
            // A step of k: inside the row, at any 16 bytes.
            for start in (0..=row_bytes - 32).step_by(16) {
                let step = Layout { start, ..plain };
                check("conformance_wgmma_bf16_72", Factors::Bf16, step, plain);
                check("conformance_wgmma_f16_72", Factors::F16, plain, step);
                check("conformance_wgmma_e4m3_72", Factors::E4m3, step, step);
            }
            // Rows that begin in the middle of the swizzle's pattern, with base offset 0, and a stride of no whole pattern.
            for row in 1..8 {
                let shifted = Layout { start: row * row_bytes, stride: 10 * row_bytes, ..plain };
                check("conformance_wgmma_bf16_72", Factors::Bf16, shifted, plain);
                check("conformance_wgmma_f16_72", Factors::F16, plain, shifted);
            }
            let columns = Layout { leading: 16 * row_bytes, mn_major: true, ..plain };
            check("conformance_wgmma_trans_72", Factors::Bf16, plain, columns);
        }
        let none = Layout { row_bytes: 16, leading: 128, stride: 256, ..ROWS };
        let far = Layout { row_bytes: 16, leading: 2048, stride: 128, ..ROWS };
        check("conformance_wgmma_bf16_72", Factors::Bf16, none, far);
        check("conformance_wgmma_f16_72", Factors::F16, far, none);
        check("conformance_wgmma_e4m3_72", Factors::E4m3, none, far);
        let columns = Layout { leading: 256, stride: 512, mn_major: true, ..none };
        check("conformance_wgmma_trans_72", Factors::Bf16, ROWS, columns);
    }
}

/// Every code of e4m3: `a` has a single one in each row.
#[test]
fn every_code_of_e4m3() {
    for (device, card) in hoppers() {
        let one = |row: usize, k: usize| if k == row % 32 { 1.0 } else { 0.0 };
        let image_a = tensor(&device, &image(Factors::E4m3, ROWS, 64, A_BYTES, one));
        // A code in one k of its column, so that a NaN spoils no other sum.
        let mut bytes = vec![0u8; B_BYTES];
        for column in 0..256 {
            bytes[ROWS.at(column, column % 32, 1)] = column as u8;
        }
        let words: Vec<u32> = bytes.chunks(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect();
        let (image_b, held) = (tensor(&device, &words), tensor(&device, &[0; 512]));
        let [from_a, from_b, from_registers] = [&image_a, &image_b, &held].map(|t| DevicePtr::or_null(Some(t)));
        let (bits, accumulate) = (ROWS.bits(), 0i32);
        let args = [
            Arg::of(&from_a),
            Arg::of(&from_b),
            Arg::of(&from_registers),
            Arg::of(&bits),
            Arg::of(&bits),
            Arg::of(&accumulate),
        ];
        let launch = Launch::grid([1, 1, 1]).block(128).shared(A_BYTES + B_BYTES);
        let got = written(&device, &card, "conformance_wgmma_e4m3_256", launch, 64 * 256, &args);
        for (i, got) in got.into_iter().enumerate() {
            let (row, code) = (i / 256, (i % 256) as u8);
            let (got, exact) = (f32::from_bits(got), e4m3(code));
            // 0 times NaN is NaN, too.
            let want = if exact.is_nan() || row % 32 == usize::from(code) % 32 { exact } else { 0.0 };
            assert!(
                got == want || (got.is_nan() && want.is_nan()),
                "{device}: {code:#x} in row {row}: {got}, not {want}"
            );
        }
    }
}

/// Element k of a lane-ordered fragment belongs to row k / 8, column k % 8, or with .trans the other way round.
#[test]
fn stmatrix() {
    let mut want = Vec::new();
    for transposed in [false, true] {
        for count in [1, 2, 4] {
            let mut rows = [[0xffffu16; 8]; 32];
            for (matrix, k) in (0..count).flat_map(|matrix| (0..64).map(move |k| (matrix, k))) {
                let (row, column) = if transposed { (k % 8, k / 8) } else { (k / 8, k % 8) };
                rows[(matrix * 8 + row) * 5 % 32][column] = (2 * (matrix * 32 + k / 2) + k % 2) as u16;
            }
            want.extend(rows.iter().flat_map(|row| row.chunks(2)).map(|p| u32::from(p[0]) | u32::from(p[1]) << 16));
        }
    }
    for (device, card) in hoppers() {
        let launch = Launch::grid([1, 1, 1]).block(32);
        let got = written(&device, &card, "conformance_stmatrix", launch, want.len(), &[]);
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            assert_eq!(got, want, "{device}: form {}, row {}, word {}", i / 128, i / 4 % 32, i % 4);
        }
    }
}

#[test]
fn elect_chooses_one_lane_every_time_the_same() {
    for (device, card) in hoppers() {
        let got = written(&device, &card, "conformance_elect", Launch::grid([1, 1, 1]).block(64), 128, &[]);
        let (first, second) = got.split_at(64);
        assert_eq!(first, second, "{device}");
        for warp in first.chunks(32) {
            assert_eq!(warp.iter().sum::<u32>(), 1, "{device}: {warp:?}");
        }
    }
}

#[test]
fn setmaxnreg_passes_registers_on() {
    for (device, card) in hoppers() {
        let launch = Launch::grid([4, 1, 1]).block(384);
        let got = written(&device, &card, "conformance_setmaxnreg", launch, 4 * 384, &[]);
        let want: Vec<u32> = (0..4 * 384).map(|i| i / 128 % 3).collect();
        assert_eq!(got, want, "{device}");
    }
}
