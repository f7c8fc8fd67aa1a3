//! What every primitive of kernels/common/device.cuh does on a card, as raw numbers, against the same numbers computed
//! here from NVIDIA's description of the instructions in the PTX ISA. The kernels are in
//! kernels/conformance.cu. On the emulated card this tests the emulator; on a real one, what both it and the kernels
//! assume: a layout that they have wrong in the same way shows nowhere else.
//!
//! tests/data/conformance.txt records the expected numbers (of long sections a digest), so that their change is seen:
//! `MEGAFUSE_UPDATE_CONFORMANCE=1 cargo test --test ops conformance` writes it, from the computation here and from no
//! card. `MEGAFUSE_CONFORMANCE_DUMP=folder` makes the test leave what the card gave in folder/SECTION.txt.

use std::fmt::Write as _;
use std::path::Path;

use half::{bf16, f16};
use megafuse::runtime::cuda::{Arg, DevicePtr, Launch};
use megafuse::runtime::{CudaDevice, DType, Device, Tensor};

use crate::common::cards;

/// What an element that no kernel wrote holds.
const UNWRITTEN: u32 = 0xdead_beef;

/// Runs `entry` of conformance.cu with an output of `count` numbers, then `inputs` and perhaps a count.
fn dump(
    device: &Device,
    entry: &str,
    launch: Launch,
    count: usize,
    inputs: &[&Tensor],
    scalar: Option<i32>,
) -> Vec<u32> {
    // f32 tensors, for they come and go with all their bits.
    let out = tensor(device, &vec![UNWRITTEN; count]);
    let pointers: Vec<DevicePtr> =
        [&out].into_iter().chain(inputs.iter().copied()).map(|t| DevicePtr::or_null(Some(t))).collect();
    let args: Vec<Arg> = pointers.iter().map(Arg::of).chain(scalar.as_ref().map(Arg::of)).collect();
    // SAFETY: the arguments are the entry's, as its comment has them, and the tensors as large as it says.
    unsafe { card(device).launch("conformance", entry, launch, &args).unwrap() };
    let numbers: Vec<u32> = out.to_f32_vec().unwrap().into_iter().map(f32::to_bits).collect();
    if let Some(folder) = std::env::var_os("MEGAFUSE_CONFORMANCE_DUMP") {
        let text = lines(&numbers);
        std::fs::write(Path::new(&folder).join(format!("{entry}.txt")), text).unwrap();
    }
    numbers
}

fn card(device: &Device) -> &CudaDevice {
    match device {
        Device::Cuda(cuda) => cuda,
        other => panic!("{other} is no card"),
    }
}

fn tensor(device: &Device, bits: &[u32]) -> Tensor {
    let values: Vec<f32> = bits.iter().map(|&bits| f32::from_bits(bits)).collect();
    Tensor::from_f32(device, &[bits.len()], DType::F32, &values).unwrap()
}

/// Sixteen numbers a line, in hexadecimal.
fn lines(numbers: &[u32]) -> String {
    let line = |line: &[u32]| line.iter().map(|n| format!("{n:x}")).collect::<Vec<_>>().join(" ");
    numbers.chunks(16).map(|numbers| line(numbers) + "\n").collect()
}

/// Every number as expected; the first that is not is named by `place`.
fn assert_same(device: &Device, section: &str, got: &[u32], want: &[u32], place: impl Fn(usize) -> String) {
    assert_eq!(got.len(), want.len(), "{section}");
    let wrong: Vec<usize> = (0..got.len()).filter(|&i| got[i] != want[i]).collect();
    if let Some(&i) = wrong.first() {
        panic!(
            "{device}: {section}: {} of {} numbers differ, the first at {}: {:#x}, expected {:#x}",
            wrong.len(),
            got.len(),
            place(i),
            got[i],
            want[i]
        );
    }
}

// ---- what the instructions are documented to do ----

/// ldmatrix: thread i of the eight that a matrix belongs to names row i; thread L receives of row L / 4
/// elements 2 (L % 4) and the next, the first in the low half; with .trans of column L / 4.
fn expected_ldmatrix() -> Vec<u32> {
    let orders: [fn(u32) -> u32; 2] = [|lane| lane, |lane| (lane * 5 + 3) % 32];
    let mut numbers = Vec::new();
    for row_of_lane in orders {
        for transposed in [false, true] {
            for lane in 0..32 {
                for matrix in 0..4 {
                    let element = |j: u32| {
                        let (row, column) = if transposed { (j, lane / 4) } else { (lane / 4, j) };
                        row_of_lane(matrix * 8 + row) * 8 + column
                    };
                    numbers.push(element(lane % 4 * 2) | element(lane % 4 * 2 + 1) << 16);
                }
            }
        }
    }
    numbers
}

/// Matrix fragments for mma.m16n8k16 with 16-bit elements: with group = lane >> 2 and t = lane % 4, element i
/// of a thread's 8 of a, 4 of b and 4 of c and d is at
///   a: row group, or group + 8 for i in 2..4 and 6..8; column 2t + (i & 1), and 8 more for i >= 4
///   b: row 2t + (i & 1), and 8 more for i >= 2; column group
///   c: row group, or group + 8 for i >= 2; column 2t + (i & 1)
fn expected_mma() -> Vec<u32> {
    let mut numbers = Vec::new();
    for place in 0..256 {
        let (lane, i) = (place / 8, place % 8);
        let a_row = lane / 4 + if (2..4).contains(&i) || i >= 6 { 8 } else { 0 };
        let a_column = lane % 4 * 2 + i % 2 + if i >= 4 { 8 } else { 0 };
        let b = |row: u32, column: u32| {
            let found = (0..128).find(|&place| {
                let (lane, i) = (place / 4, place % 4);
                (lane % 4 * 2 + i % 2 + if i >= 2 { 8 } else { 0 }, lane / 4) == (row, column)
            });
            found.unwrap() + 1
        };
        for (lane, i) in (0..32).flat_map(|lane| (0..4).map(move |i| (lane, i))) {
            let (row, column) = (lane / 4 + if i >= 2 { 8 } else { 0 }, lane % 4 * 2 + i % 2);
            let product = if row == a_row { b(a_column, column) } else { 0 };
            numbers.push((256.0 * (lane * 4 + i) as f32 + product as f32).to_bits());
        }
    }
    numbers
}

/// cp.async: src-size 0 copies nothing and fills with zeros; wait_group N leaves at most the N latest groups.
fn expected_cp_async(input: &[u32]) -> Vec<u32> {
    let large = (0..64 * 4).map(|i| if i / 4 % 3 != 0 { input[i] } else { 0 });
    let small = (0..64).map(|thread| (thread + 33) % 64).map(|i| if i % 5 != 0 { input[64 * 4 + i] } else { 0 });
    large.chain(small).collect()
}

/// shfl.sync, as its pseudocode; `width` as CUDA maps it to the clamp and the segment mask.
fn expected_shuffle() -> Vec<u32> {
    #[derive(Clone, Copy)]
    enum Mode {
        Idx,
        Up,
        Down,
        Bfly,
    }
    let source = |mode: Mode, lane: u32, b: u32, width: u32| {
        let b = b & 0x1f;
        let segment_mask = 32 - width;
        let clamp = if let Mode::Up = mode { 0 } else { 0x1f };
        let max_lane = (lane & segment_mask) | (clamp & !segment_mask & 0x1f);
        let min_lane = lane & segment_mask;
        let (j, inside) = match mode {
            Mode::Idx => (min_lane | (b & !segment_mask), None),
            Mode::Up => (lane.wrapping_sub(b), Some((lane as i32 - b as i32) >= max_lane as i32)),
            Mode::Down => (lane + b, None),
            Mode::Bfly => (lane ^ b, None),
        };
        if inside.unwrap_or(j <= max_lane) { j } else { lane }
    };
    use Mode::*;
    type Source = fn(u32) -> u32;
    let all: [(Mode, Source, u32); 13] = [
        (Idx, |lane| (lane * 7 + 3) % 32, 32),
        (Idx, |lane| lane + 5, 8),
        (Idx, |_| 37, 32),
        (Up, |_| 1, 32),
        (Up, |_| 3, 8),
        (Down, |_| 1, 32),
        (Down, |_| 3, 8),
        (Bfly, |_| 1, 32),
        (Bfly, |_| 16, 32),
        (Bfly, |_| 5, 8),
        (Bfly, |_| 9, 8),
        (Bfly, |_| 2, 4),
        (Bfly, |_| 2, 32),
    ];
    let mut numbers = Vec::new();
    for (i, (mode, b, width)) in all.into_iter().enumerate() {
        let value = |lane: u32| source(mode, lane, b(lane), width) * 3 + 1;
        numbers.extend((0..32).map(value).map(|value| if i == 12 { (value as f32).to_bits() } else { value }));
    }
    let ballot = (0..32).filter(|lane| lane % 3 == 0).fold(0u32, |bits, lane| bits | 1 << lane);
    numbers.extend([ballot, 1, 0, 1].into_iter().flat_map(|number| [number; 32]));
    numbers
}

fn expected_named_barrier() -> Vec<u32> {
    (0..3).flat_map(|round| (0..32).map(move |lane| round * 100 + 31 - lane)).collect()
}

const SWIZZLED_ROWS: [u32; 7] = [2, 4, 6, 8, 10, 16, 20];

/// Chunk `c` of row `r` of C chunks: XORed with as many low bits as divide C, taken from the row where rows begin to fall
/// on the same 128 bytes again.
fn expected_swizzle() -> Vec<u32> {
    let mut numbers = Vec::new();
    for chunks in SWIZZLED_ROWS {
        let span = 1 << chunks.trailing_zeros().min(3);
        for (row, chunk) in (0..16).flat_map(|row| (0..chunks).map(move |chunk| (row, chunk))) {
            numbers.push(row * chunks + (chunk ^ (row * span / 8 % span)));
        }
    }
    numbers
}

// ---- the card against it ----

fn element(i: usize) -> String {
    format!("element {i}")
}

#[test]
fn ldmatrix() {
    for device in cards() {
        let got = dump(&device, "conformance_ldmatrix", Launch::grid([1, 1, 1]).block(32), 512, &[], None);
        assert_same(&device, "ldmatrix", &got, &expected_ldmatrix(), |i| {
            format!("order {}, trans {}, lane {}, register {}", i / 256, i / 128 % 2, i / 4 % 32, i % 4)
        });
    }
}

#[test]
fn mma() {
    for (device, entry) in
        cards().into_iter().flat_map(|d| ["f16", "bf16"].map(|t| (d.clone(), format!("conformance_mma_{t}"))))
    {
        let got = dump(&device, &entry, Launch::grid([256, 1, 1]).block(32), 256 * 128, &[], None);
        assert_same(&device, &entry, &got, &expected_mma(), |i| {
            format!("a's place {}, lane {}, register {} of d", i / 128, i / 4 % 32, i % 4)
        });
    }
}

#[test]
fn cp_async() {
    for device in cards() {
        let input: Vec<u32> = (0..64 * 5).map(|i| 0x0101_0101 * (i % 200 + 1)).collect();
        let launch = Launch::grid([1, 1, 1]).block(64);
        let got = dump(&device, "conformance_cp_async", launch, 64 * 5, &[&tensor(&device, &input)], None);
        assert_same(&device, "cp.async", &got, &expected_cp_async(&input), element);
    }
}

#[test]
fn shuffles_and_votes() {
    for device in cards() {
        let got = dump(&device, "conformance_shuffle", Launch::grid([1, 1, 1]).block(32), 17 * 32, &[], None);
        let place = |i: usize| format!("operation {}, lane {}", i / 32, i % 32);
        assert_same(&device, "shuffle", &got, &expected_shuffle(), place);
    }
}

#[test]
fn named_barriers() {
    for device in cards() {
        let got = dump(&device, "conformance_named_barrier", Launch::grid([1, 1, 1]).block(96), 96, &[], None);
        let place = |i: usize| format!("round {}, lane {}", i / 32, i % 32);
        assert_same(&device, "named barrier", &got, &expected_named_barrier(), place);
    }
}

#[test]
fn swizzles() {
    let want = expected_swizzle();
    // What they are for: a permutation of each row's chunks, and of 8 aligned rows a chunk lies in 8 different places of
    // the 128 bytes that shared memory serves at once.
    let mut tables = want.as_slice();
    for chunks in SWIZZLED_ROWS.map(|chunks| chunks as usize) {
        let (table, rest) = tables.split_at(16 * chunks);
        tables = rest;
        for (row, places) in table.chunks(chunks).enumerate() {
            let mut sorted = places.to_vec();
            sorted.sort_unstable();
            assert!(sorted.iter().copied().eq((row * chunks) as u32..((row + 1) * chunks) as u32), "{chunks} {row}");
        }
        for (first, chunk) in [0, 8].into_iter().flat_map(|row| (0..chunks).map(move |chunk| (row, chunk))) {
            let places = (first..first + 8).map(|row| table[row * chunks + chunk] % 8);
            assert_eq!(places.fold(0, |seen, place| seen | 1 << place), 0xff, "{chunks} {first} {chunk}");
        }
    }
    for device in cards() {
        let got = dump(&device, "conformance_swizzle", Launch::grid([1, 1, 1]).block(1), want.len(), &[], None);
        assert_same(&device, "swizzle", &got, &want, element);
    }
}

/// A NaN for comparison: of its bits only that it is one is specified for all.
fn canonical(bits: u32) -> u32 {
    if f32::from_bits(bits).is_nan() { 0x7fc0_0000 } else { bits }
}

fn canonical_f16(bits: u16) -> u32 {
    u32::from(if f16::from_bits(bits).is_nan() { 0x7e00 } else { bits })
}

fn canonical_bf16(bits: u16) -> u32 {
    u32::from(if bf16::from_bits(bits).is_nan() { 0x7fc0 } else { bits })
}

/// Every f16 and every bf16, and one more so that the last block is not full.
#[test]
fn sixteen_bits_to_f32() {
    let count = 0x1_0001;
    let patterns: Vec<u16> = (0..count + 1).map(|i| i as u16).collect();
    let packed: Vec<u32> = patterns.chunks(2).map(|pair| u32::from(pair[0]) | u32::from(pair[1]) << 16).collect();
    let halves = patterns[..count].iter().map(|&bits| f16::from_bits(bits).to_f32());
    let bfloats = patterns[..count].iter().map(|&bits| bf16::from_bits(bits).to_f32());
    let want: Vec<u32> = halves.chain(bfloats).map(|x| canonical(x.to_bits())).collect();
    for device in cards() {
        let packed = tensor(&device, &packed);
        let launch = Launch::grid([count.div_ceil(256), 1, 1]).block(256);
        let got = dump(&device, "conformance_widen", launch, 2 * count, &[&packed, &packed], Some(count as i32));
        let got: Vec<u32> = got.into_iter().map(canonical).collect();
        assert_same(&device, "to_f32", &got, &want, |i| format!("{} {:#x}", ["f16", "bf16"][i / count], i % count));
    }
}

/// Every f16 and bf16, and between each and the next the middle and its two neighbours; f32's own specials.
fn f32s_to_round() -> Vec<f32> {
    let mut values =
        vec![0.0, f32::NAN, -f32::NAN, f32::MIN_POSITIVE, f32::MAX, f32::MIN, 1e-45, -1e-45, 65519.99, 65520.0];
    for bits in 0..=u16::MAX {
        let following = bits.wrapping_add(1);
        for (x, y) in [
            (f16::from_bits(bits).to_f32(), f16::from_bits(following).to_f32()),
            (bf16::from_bits(bits).to_f32(), bf16::from_bits(following).to_f32()),
        ] {
            let middle = ((f64::from(x) + f64::from(y)) / 2.0) as f32;
            values.extend([x, middle]);
            if middle.is_finite() && middle != 0.0 {
                values.extend([f32::from_bits(middle.to_bits() - 1), f32::from_bits(middle.to_bits() + 1)]);
            }
        }
    }
    values
}

#[test]
fn f32_to_sixteen_bits() {
    let values = f32s_to_round();
    let count = values.len();
    assert_ne!(count % 256, 0);
    let half = |i: usize| canonical_f16(f16::from_f32(values[i % count]).to_bits());
    let bfloat = |i: usize| canonical_bf16(bf16::from_f32(values[i % count]).to_bits());
    let each = (0..count).map(|i| half(i) | bfloat(i) << 16);
    let halves = (0..count).map(|i| half(i) | half(i + 1) << 16);
    let bfloats = (0..count).map(|i| bfloat(i) | bfloat(i + 1) << 16);
    let want: Vec<u32> = each.chain(halves).chain(bfloats).collect();
    for device in cards() {
        let input = Tensor::from_f32(&device, &[count], DType::F32, &values).unwrap();
        let launch = Launch::grid([count.div_ceil(256), 1, 1]).block(256);
        let mut got = dump(&device, "conformance_round", launch, 3 * count, &[&input], Some(count as i32));
        for (i, number) in got.iter_mut().enumerate() {
            let (low, high) = (*number as u16, (*number >> 16) as u16);
            *number = match i / count {
                0 => canonical_f16(low) | canonical_bf16(high) << 16,
                1 => canonical_f16(low) | canonical_f16(high) << 16,
                _ => canonical_bf16(low) | canonical_bf16(high) << 16,
            };
        }
        assert_same(&device, "from_f32, pack2", &got, &want, |i| {
            let how = ["from_f32", "pack2<f16>", "pack2<bf16>"][i / count];
            format!("{how} of {:e} ({:#x})", values[i % count], values[i % count].to_bits())
        });
    }
}

/// Within 2 ulp of 2^x (ex2.approx.ftz) and within 1 of 1 / x (rcp.approx.ftz);
/// subnormal arguments and results are 0 of their sign.
#[test]
fn approximations() {
    let mut values =
        vec![0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e-40, -1e-40, 1e38, -1e38, 3e38, 1.0, -1.0];
    values.extend((-1300..=1290).map(|i| i as f32 * 0.1 + 0.0123));
    values.extend((-150..=128).map(|i| i as f32));
    values.extend((0..20_000).map(|i| -(i as f32) * 1e-3));
    values.extend((0..4_000).flat_map(|i| [1.0, -1.0].map(|sign| sign * (1.0 + i as f32 / 4_000.0))));
    values.extend((-126..=127).map(|e| 1.37 * 2f32.powi(e)));
    let count = values.len();
    assert_ne!(count % 256, 0);
    let flushed = |x: f64| if x.abs() < f64::from(f32::MIN_POSITIVE) { 0.0f64.copysign(x) } else { x };
    for device in cards() {
        let input = Tensor::from_f32(&device, &[count], DType::F32, &values).unwrap();
        let launch = Launch::grid([count.div_ceil(256), 1, 1]).block(256);
        let got = dump(&device, "conformance_approx", launch, 2 * count, &[&input], Some(count as i32));
        for (i, &x) in values.iter().enumerate() {
            let x64 = flushed(f64::from(x));
            for (name, got, exact, ulps) in [("exp2", got[i], x64.exp2(), 2.0), ("rcp", got[count + i], 1.0 / x64, 1.0)]
            {
                let (got, want) = (f64::from(f32::from_bits(got)), flushed(exact));
                // At the edge of the subnormals either side is right.
                let smallest = f64::from(f32::MIN_POSITIVE);
                let ulp = 2f64.powi(want.abs().max(smallest).log2().floor() as i32 - 23);
                let close = (got - want).abs() <= ulps * ulp
                    || (exact.abs() < 1.000_001 * smallest && (got == 0.0 || got.abs() <= 1.000_001 * smallest))
                    || (exact.abs() > f64::from(f32::MAX) && got.is_infinite() && got.signum() == exact.signum());
                assert!(
                    close || (got.is_nan() && want.is_nan()) || got == want,
                    "{device}: {name} of {x:e} is {got:e}, expected {want:e}: off by {} ulp",
                    (got - want).abs() / ulp
                );
            }
        }
    }
}

/// tests/data/conformance.txt is what this file computes.
#[test]
fn the_record_of_expected_numbers() {
    let input: Vec<u32> = (0..64 * 5).map(|i| 0x0101_0101 * (i % 200 + 1)).collect();
    let mut text = String::from(
        "Expected numbers of tests/ops/conformance.rs, computed there from the PTX ISA; hexadecimal. Written by\n\
         MEGAFUSE_UPDATE_CONFORMANCE=1 cargo test --test ops conformance\n",
    );
    for (section, numbers) in [
        ("ldmatrix", expected_ldmatrix()),
        ("mma", expected_mma()),
        ("cp_async", expected_cp_async(&input)),
        ("shuffle", expected_shuffle()),
        ("named_barrier", expected_named_barrier()),
        ("swizzle", expected_swizzle()),
    ] {
        // FNV-1a over the numbers' bytes.
        let bytes = numbers.iter().flat_map(|number| number.to_le_bytes());
        let digest =
            bytes.fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        writeln!(text, "\n{section}: {} numbers, FNV-1a {digest:016x}", numbers.len()).unwrap();
        if numbers.len() <= 1024 {
            text += &lines(&numbers);
        }
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/conformance.txt");
    if std::env::var_os("MEGAFUSE_UPDATE_CONFORMANCE").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    assert_eq!(std::fs::read_to_string(&path).unwrap(), text, "see the head of tests/ops/conformance.rs");
}
