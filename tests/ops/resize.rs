//! resize against PIL, torch and plain f64 loops.

use crate::common::{Expected, Random, assert_close, cards, devices, f64s};
use megafuse::Error;
use megafuse::ops::{self, RelayNoise, SampleState, StepCoefficients, StepRow, StepTable, Upsampler};
use megafuse::runtime::{DType, Device, MetaDevice, OpKind, Repeated, Tensor};

const ALL: [Upsampler; 5] = [
    Upsampler::Bilinear,
    Upsampler::Bicubic,
    Upsampler::BicubicTorch,
    Upsampler::BicubicGaussian,
    Upsampler::BicubicEdge,
];

/// N, H, W, C and the new height and width: a pixel; up, down, both; one dimension kept; even factors; primes; no images.
const SHAPES: [([usize; 4], [usize; 2]); 11] = [
    ([1, 1, 1, 1], [1, 1]),
    ([1, 1, 1, 3], [4, 5]),
    ([2, 5, 4, 3], [7, 9]),
    ([1, 2, 3, 4], [5, 2]),
    ([1, 31, 17, 1], [7, 5]),
    ([1, 13, 29, 2], [13, 41]),
    ([1, 13, 29, 2], [5, 29]),
    ([2, 16, 16, 3], [32, 32]),
    ([1, 61, 53, 3], [97, 20]),
    ([0, 4, 4, 3], [8, 8]),
    ([1, 4, 6, 5], [1, 1]),
];

/// Levels with steep steps in every direction.
fn pattern(h: usize, w: usize, c: usize) -> Vec<u8> {
    let level = |y: usize, x: usize, k: usize| ((x * 37 + y * 91 + k * 53 + (x * y) % 17 * 11) % 256) as u8;
    crate::common::product3(h, w, c).map(|(y, x, k)| level(y, x, k)).collect()
}

/// Levels as a `[1, h, w, c]` image in [-1, 1].
fn image(device: &Device, h: usize, w: usize, c: usize) -> Tensor {
    let values: Vec<f32> = pattern(h, w, c).into_iter().map(|level| f32::from(level) / 255.0 * 2.0 - 1.0).collect();
    Tensor::from_f32(device, &[1, h, w, c], DType::F32, &values).unwrap()
}

/// Every device and dtype.
fn floats() -> impl Iterator<Item = (Device, DType)> {
    devices().into_iter().flat_map(|device| DType::FLOATS.map(|dtype| (device.clone(), dtype)))
}

fn fnv(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// Image size, new size, and FNV-1a of PIL's RGB levels: BILINEAR, BICUBIC, BICUBIC then EDGE_ENHANCE. Pillow 12.
const PIL_U8: [([usize; 2], [usize; 2], [u64; 3]); 9] = [
    ([1, 1], [3, 2], [0x2f56_7e6e_38ea_98ff, 0x2f56_7e6e_38ea_98ff, 0x2f56_7e6e_38ea_98ff]),
    ([5, 4], [7, 9], [0x2dc7_d6b4_3c24_65af, 0xc7f4_b3cd_8272_4020, 0xf707_b76e_fe68_7c01]),
    ([72, 96], [101, 137], [0x4e9f_ddff_d92f_409e, 0x7a4c_976f_7dd9_eec4, 0x71bf_ea5d_7070_542e]),
    ([64, 64], [128, 128], [0x0eb5_add1_6356_d782, 0x041a_69f3_bea0_cbe1, 0xd64c_abbf_fab8_9247]),
    ([61, 53], [20, 31], [0x2b4f_4a87_9b66_288d, 0x2d01_df19_d6af_d123, 0x9720_be32_a123_b731]),
    ([40, 30], [40, 45], [0xc34b_3d72_697a_16a8, 0x7b80_cf5b_d8c9_3781, 0x7ff4_976c_3ea9_a750]),
    ([33, 20], [50, 20], [0x2789_5902_45d7_6d29, 0xb317_c9a9_cc87_2542, 0xca02_9caf_dd36_1da0]),
    ([96, 96], [96, 96], [0x8b85_5fd4_5592_1edd, 0x8b85_5fd4_5592_1edd, 0xd5f9_9cac_6dcc_bacb]),
    ([2, 3], [5, 2], [0xad9e_190a_19ef_3074, 0x9d2e_79f3_4a8d_052a, 0x9d2e_79f3_4a8d_052a]),
];

#[test]
fn resize_u8_equals_pil_level_for_level() {
    for (device, ([h, w], size, want)) in devices().into_iter().flat_map(|d| PIL_U8.map(|case| (d.clone(), case))) {
        let x = image(&device, h, w, 3);
        let got = [Upsampler::Bilinear, Upsampler::Bicubic, Upsampler::BicubicEdge].map(|upsampler| {
            let y = ops::resize_u8(&x, size, upsampler).unwrap();
            assert_eq!(y.shape(), [1, size[0], size[1], 3]);
            let levels = y.to_f32_vec().unwrap().into_iter().map(|v| ((v / 2.0 + 0.5) * 255.0).round() as u8);
            fnv(levels)
        });
        assert_eq!(got, want, "{device} {h}x{w} to {size:?}");
    }
}

/// The upsamplers without a counterpart in PIL: the float filters on levels, rounded once.
#[test]
fn resize_u8_of_the_other_upsamplers_is_the_rounded_float() {
    devices().iter().for_each(rounded_floats_on);
}

fn rounded_floats_on(device: &Device) {
    let x = image(device, 23, 31, 3);
    let levels = |y: Tensor| f64s(&y).into_iter().map(|v| (v / 2.0 + 0.5) * 255.0).collect::<Vec<f64>>();
    for upsampler in [Upsampler::BicubicTorch, Upsampler::BicubicGaussian] {
        let got = levels(ops::resize_u8(&x, [40, 47], upsampler).unwrap());
        // The Gaussian filters what the 8-bit bicubic has left.
        let want = if upsampler == Upsampler::BicubicTorch {
            levels(ops::resize(&x, [40, 47], upsampler, Some((-1.0, 1.0)), None).unwrap())
        } else {
            let bicubic = ops::resize_u8(&x, [40, 47], Upsampler::Bicubic).unwrap();
            levels(ops::resize(&bicubic, [40, 47], upsampler, None, None).unwrap())
        };
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            assert!((got - got.round()).abs() < 1e-3 && (got - want).abs() < 0.501, "{upsampler:?} {i}: {got} {want}");
        }
    }
}

#[test]
fn resize_u8_quantises_ties_to_even_clamps_and_takes_nan_to_black() {
    devices().iter().for_each(quantises_on);
}

fn quantises_on(device: &Device) {
    let values = [f32::NAN, -3.0, 7.0, -1.0 + 1.0 / 255.0, 0.0];
    let x = Tensor::from_f32(device, &[1, 1, 5, 1], DType::F32, &values).unwrap();
    let got = ops::resize_u8(&x, [1, 5], Upsampler::Bicubic).unwrap().to_f32_vec().unwrap();
    assert_eq!(got[..3], [-1.0, -1.0, 1.0]);
    // Level 0.5 (or a rounding beside it) and level 127.5.
    assert!(got[3] == -1.0 || got[3] == 2.0 * (1.0 / 255.0) - 1.0);
    assert_eq!(got[4], 2.0 * (128.0 / 255.0) - 1.0);
}

/// PIL on mode F and torch's `interpolate(mode="bicubic")`, 3x4 to 5x6 and to 2x3, as they print it.
#[test]
fn resize_matches_pil_and_torch_floats() {
    devices().iter().for_each(floats_on);
}

fn floats_on(device: &Device) {
    let x = image(device, 3, 4, 1);
    for (size, upsampler, want) in [
        ([5, 6], Upsampler::Bilinear, &BILINEAR_UP[..]),
        ([5, 6], Upsampler::Bicubic, &BICUBIC_UP),
        ([5, 6], Upsampler::BicubicTorch, &TORCH_UP),
        ([2, 3], Upsampler::Bilinear, &BILINEAR_DOWN),
        ([2, 3], Upsampler::Bicubic, &BICUBIC_DOWN),
        ([2, 3], Upsampler::BicubicTorch, &TORCH_DOWN),
    ] {
        let got = f64s(&ops::resize(&x, size, upsampler, None, None).unwrap());
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            assert!((got - want).abs() < 5e-7, "{upsampler:?} {size:?} element {i}: {got}, not {want}");
        }
        assert_eq!(got.len(), want.len());
    }
}

#[rustfmt::skip]
const BILINEAR_UP: [f64; 30] = [
    -1.0, -0.85490197, -0.66143793, -0.46797383, -0.27450979, -0.12941176,
    -0.71450979, -0.55215687, -0.33568627, -0.11921565, 0.097254917, 0.25960785,
    -0.28627449, -0.09803918, 0.15294123, 0.4039216, 0.65490198, 0.84313726,
    0.14196081, 0.35607845, 0.44078434, -0.076862738, 0.0078431424, 0.2219608,
    0.42745101, 0.65882355, 0.63267976, -0.39738563, -0.42352942, -0.19215685,
];
#[rustfmt::skip]
const BICUBIC_UP: [f64; 30] = [
    -1.0725296, -0.93705475, -0.72290051, -0.53377724, -0.31962305, -0.18414821,
    -0.80244982, -0.65654773, -0.4014405, -0.12211814, 0.13298905, 0.27889115,
    -0.31104231, -0.13125718, 0.15294123, 0.4039216, 0.68811995, 0.86790508,
    0.18036522, 0.46542722, 0.56122983, -0.13764185, -0.041839264, 0.24322276,
    0.45044497, 0.80156255, 0.76885766, -0.5578329, -0.59053779, -0.23942013,
];
#[rustfmt::skip]
const TORCH_UP: [f64; 30] = [
    -1.0929896, -0.95399028, -0.72656691, -0.5647276, -0.33730388, -0.19830485,
    -0.80201972, -0.6590476, -0.36864901, -0.083335169, 0.20706373, 0.35003564,
    -0.31895429, -0.1333333, 0.17037031, 0.38649234, 0.6901961, 0.87581706,
    0.16411138, 0.49402842, 0.55378205, -0.07230784, -0.012554197, 0.31736282,
    0.45508096, 0.89362955, 0.75148141, -0.54705763, -0.689206, -0.25065741,
];
const BILINEAR_DOWN: [f64; 6] = [-0.63558823, -0.24852937, 0.13852943, 0.28892159, 0.17794119, 0.066960797];
const BICUBIC_DOWN: [f64; 6] = [-0.72330976, -0.2632235, 0.19686277, 0.36383012, 0.20774244, 0.051654771];
const TORCH_DOWN: [f64; 6] = [-0.82592046, -0.36803001, 0.089860052, 0.3740958, 0.18371628, -0.0066626924];

/// Weight of input j for output i by the definition, over all inputs; torch's repeated border adds up on the last one.
fn weights(upsampler: Upsampler, len: usize, out: usize, i: usize) -> Vec<f64> {
    let keys = |x: f64, a: f64| match x.abs() {
        x if x < 1.0 => (a + 2.0) * x.powi(3) - (a + 3.0) * x.powi(2) + 1.0,
        x if x < 2.0 => a * x.powi(3) - 5.0 * a * x.powi(2) + 8.0 * a * x - 4.0 * a,
        _ => 0.0,
    };
    let scale = len as f64 / out as f64;
    let center = (i as f64 + 0.5) * scale - 0.5;
    let mut weights = vec![0.0; len];
    if upsampler == Upsampler::BicubicTorch {
        for j in center.floor() as isize - 1..=center.floor() as isize + 2 {
            weights[j.clamp(0, len as isize - 1) as usize] += keys(center - j as f64, -0.75);
        }
        return weights;
    }
    let widening = scale.max(1.0);
    for (j, weight) in weights.iter_mut().enumerate() {
        let x = (j as f64 - center) / widening;
        *weight = if upsampler == Upsampler::Bilinear { (1.0 - x.abs()).max(0.0) } else { keys(x, -0.5) };
    }
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / sum).collect()
}

/// One channel of one image: columns, then rows, then what the configuration adds.
fn reference(x: &[Vec<f64>], size: [usize; 2], upsampler: Upsampler) -> Vec<Vec<f64>> {
    let (h, w) = (x.len(), x[0].len());
    let rows: Vec<Vec<f64>> = (0..size[0]).map(|i| weights(upsampler, h, size[0], i)).collect();
    let columns: Vec<Vec<f64>> = (0..size[1]).map(|i| weights(upsampler, w, size[1], i)).collect();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let narrow: Vec<Vec<f64>> = x.iter().map(|row| columns.iter().map(|weights| dot(weights, row)).collect()).collect();
    let column = |j: usize| narrow.iter().map(|row| row[j]).collect::<Vec<f64>>();
    let y: Vec<Vec<f64>> =
        rows.iter().map(|weights| (0..size[1]).map(|j| dot(weights, &column(j))).collect()).collect();
    let at = |i: isize, j: isize| {
        // Mirrored about the border pixels, again and again in tiny images.
        let mirror = |mut k: isize, len: usize| {
            let last = len as isize - 1;
            while last > 0 && !(0..=last).contains(&k) {
                k = if k < 0 { -k } else { 2 * last - k };
            }
            k.clamp(0, last) as usize
        };
        y[mirror(i, size[0])][mirror(j, size[1])]
    };
    let each = |f: &dyn Fn(isize, isize) -> f64| {
        (0..size[0] as isize).map(|i| (0..size[1] as isize).map(|j| f(i, j)).collect()).collect()
    };
    match upsampler {
        Upsampler::BicubicGaussian => {
            let g = |a: isize, b: isize| (-((a * a + b * b) as f64) / (2.0 * 1.1 * 1.1)).exp();
            let taps = || (-2..=2).flat_map(|a| (-2..=2).map(move |b| (a, b)));
            let total: f64 = taps().map(|(a, b)| g(a, b)).sum();
            each(&|i, j| taps().map(|(a, b)| g(a, b) * at(i + a, j + b)).sum::<f64>() / total)
        }
        Upsampler::BicubicEdge => each(&|i, j| {
            if i == 0 || j == 0 || i as usize == size[0] - 1 || j as usize == size[1] - 1 {
                return at(i, j);
            }
            let ring = (-1..=1).flat_map(|a| (-1..=1).map(move |b| (a, b))).filter(|&(a, b)| (a, b) != (0, 0));
            0.5 * (10.0 * at(i, j) - ring.map(|(a, b)| at(i + a, j + b)).sum::<f64>())
        }),
        _ => y,
    }
}

#[test]
fn resize_matches_f64() {
    for (device, dtype, (shape, size)) in floats().flat_map(|(d, dtype)| SHAPES.map(|s| (d.clone(), dtype, s))) {
        let [n, h, w, c] = shape;
        let x = Random::new(4).randn(&device, &shape, dtype);
        let input = f64s(&x);
        for upsampler in ALL {
            for clamp in [None, Some((-0.5, 0.25))] {
                let got = ops::resize(&x, size, upsampler, clamp, None).unwrap();
                assert_eq!(got.dtype(), dtype);
                let mut values = vec![0.0; n * size[0] * size[1] * c];
                for (b, channel) in (0..n).flat_map(|b| (0..c).map(move |k| (b, k))) {
                    let pixel = |i: usize, j: usize| input[((b * h + i) * w + j) * c + channel];
                    let plane: Vec<Vec<f64>> = (0..h).map(|i| (0..w).map(|j| pixel(i, j)).collect()).collect();
                    for (i, row) in reference(&plane, size, upsampler).into_iter().enumerate() {
                        for (j, value) in row.into_iter().enumerate() {
                            let (low, high) = clamp.unwrap_or((f32::MIN, f32::MAX));
                            values[((b * size[0] + i) * size[1] + j) * c + channel] =
                                value.clamp(low.into(), high.into());
                        }
                    }
                }
                // Every value is a sum of inputs below 5, of absolute weights up to 2 in the resize and 9 in the edge
                // filter; torch's phase is f32: 1e-6 at these sizes, times a slope below 2 a pixel.
                let magnitudes = vec![5.0 * if upsampler == Upsampler::BicubicEdge { 9.0 } else { 2.0 }; values.len()];
                let phase = if upsampler == Upsampler::BicubicTorch { 50.0 } else { 0.0 };
                let want = Expected { shape: vec![n, size[0], size[1], c], values, magnitudes };
                let what = format!("{device} {upsampler:?} {shape:?} {size:?} {clamp:?}");
                assert_close(&got, &want, 2.0 + phase, &what);

                let mut random = Random::new(9);
                let noise = random.randn(&device, got.shape(), DType::F32);
                let relay = RelayNoise { noise: &noise, signal: 0.75, sigma: -0.5 };
                let noised = ops::resize(&x, size, upsampler, clamp, Some(relay)).unwrap();
                let mut want = want;
                for ((value, magnitude), noise) in want.values.iter_mut().zip(&mut want.magnitudes).zip(f64s(&noise)) {
                    *value = 0.75 * *value - 0.5 * noise;
                    *magnitude += noise.abs();
                }
                assert_close(&noised, &want, 2.0 + phase, format!("noised {what}"));
            }
        }
    }
}

/// Where torch's bicubic looks is computed in f32, product by difference: 700 pixels from the border, exact coordinates would
/// be 3e-5 of a pixel elsewhere.
#[test]
fn torchs_coordinates_are_rounded_to_f32() {
    let (from, to) = (1111, 1501);
    let values: Vec<f32> = (0..from).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 } * (1.0 + (i % 5) as f32)).collect();
    for (device, tall) in devices().into_iter().flat_map(|device| [(device.clone(), false), (device, true)]) {
        let (shape, size) = if tall { ([1, from, 1, 1], [to, 1]) } else { ([1, 1, from, 1], [1, to]) };
        let x = Tensor::from_f32(&device, &shape, DType::F32, &values).unwrap();
        let got = ops::resize(&x, size, Upsampler::BicubicTorch, None, None).unwrap().to_f32_vec().unwrap();
        let keys = |x: f64| match x.abs() {
            x if x < 1.0 => 1.25 * x.powi(3) - 2.25 * x.powi(2) + 1.0,
            x => -0.75 * (x.powi(3) - 5.0 * x.powi(2) + 8.0 * x - 4.0),
        };
        let scale = from as f32 / to as f32;
        for (i, got) in got.into_iter().enumerate() {
            let product = scale * (i as f32 + 0.5);
            let at = f64::from(product - 0.5);
            let taps = at.floor() as isize - 1..=at.floor() as isize + 2;
            let value = |j: isize| f64::from(values[j.clamp(0, from as isize - 1) as usize]);
            let want: f64 = taps.map(|j| keys(at - j as f64) * value(j)).sum();
            assert!((f64::from(got) - want).abs() < 4e-6, "{device} {i}: {got}, expected {want}");
        }
    }
}

/// Between equal sizes the filters pass everything through untouched, NaN included.
#[test]
fn the_same_size_is_a_copy() {
    for device in devices() {
        let mut values = image(&device, 5, 7, 2).to_f32_vec().unwrap();
        (values[11], values[12]) = (f32::NAN, 1e-40);
        let x = Tensor::from_f32(&device, &[1, 5, 7, 2], DType::F32, &values).unwrap();
        for upsampler in [Upsampler::Bilinear, Upsampler::Bicubic, Upsampler::BicubicTorch] {
            let got = ops::resize(&x, [5, 7], upsampler, None, None).unwrap().to_f32_vec().unwrap();
            // A card has one NaN only.
            let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
            assert!(got.iter().zip(&values).all(same), "{device} {upsampler:?}");
        }
    }
}

#[test]
fn nearest_takes_the_floor_index() {
    for (device, dtype, (shape, size)) in floats().flat_map(|(d, dtype)| SHAPES.map(|s| (d.clone(), dtype, s))) {
        let [n, h, w, c] = shape;
        let x = Random::new(8).randn(&device, &shape, dtype);
        let got = ops::resize_nearest(&x, size).unwrap();
        assert_eq!((got.shape(), got.dtype()), ([n, size[0], size[1], c].as_slice(), dtype));
        let (x, got) = (f64s(&x), f64s(&got));
        for (b, i, j) in crate::common::product3(n, size[0], size[1]) {
            let from = ((b * h + i * h / size[0]) * w + j * w / size[1]) * c;
            let to = ((b * size[0] + i) * size[1] + j) * c;
            assert_eq!(got[to..to + c], x[from..from + c], "{shape:?} {size:?} [{b}, {i}, {j}]");
        }
    }
}

/// Where the output lies between two inputs, in f64; channels of whole vectors and of others, up, down, both, one pixel.
#[test]
fn resize_bilinear_matches_f64() {
    let shapes = [
        ([1, 1, 1, 1], [3, 2]),
        ([2, 5, 4, 3], [7, 9]),
        ([1, 13, 29, 8], [5, 29]),
        ([2, 20, 20, 16], [24, 24]),
        ([1, 24, 25, 24], [20, 21]),
        ([1, 7, 130, 9], [11, 131]),
        ([0, 4, 4, 8], [3, 5]),
        ([1, 6, 5, 8], [1, 1]),
    ];
    for (device, dtype, (shape, size)) in floats().flat_map(|(d, dtype)| shapes.map(|s| (d.clone(), dtype, s))) {
        let [n, h, w, c] = shape;
        let x = Random::new(11).randn(&device, &shape, dtype);
        let got = ops::resize_bilinear(&x, size).unwrap();
        let x = f64s(&x);
        let (mut values, mut magnitudes) = (Vec::new(), Vec::new());
        let taps = |i: usize, from: usize, to: usize| {
            let at = ((i as f64 + 0.5) * from as f64 / to as f64 - 0.5).max(0.0);
            let (first, k) = (at.floor() as usize, at - at.floor());
            [(first, 1.0 - k), ((first + 1).min(from - 1), k)]
        };
        for (image, i, j) in crate::common::product3(n, size[0], size[1]) {
            for channel in 0..c {
                let rows = taps(i, h, size[0]);
                let columns = taps(j, w, size[1]);
                let value = |(row, k): (usize, f64), (column, l): (usize, f64)| {
                    k * l * x[((image * h + row) * w + column) * c + channel]
                };
                values.push(rows.iter().flat_map(|&row| columns.map(|column| value(row, column))).sum());
                // A weight may be 1 less a number close to 1, and errs by an ulp of that.
                let read = |(row, _): (usize, f64), (column, _): (usize, f64)| value((row, 1.0), (column, 1.0)).abs();
                magnitudes.push(rows.iter().flat_map(|&row| columns.map(|column| read(row, column))).sum());
            }
        }
        let want = Expected { shape: vec![n, size[0], size[1], c], values, magnitudes };
        assert_close(&got, &want, 8.0, format!("{device} {shape:?} to {size:?}"));
    }
}

/// Which torch's `interpolate(mode="bilinear", align_corners=False)` is: larger it is PIL's, smaller it skips pixels.
#[test]
fn resize_bilinear_is_torchs() {
    const SMALLER: [f64; 6] = [-0.76960784, -0.35392157, 0.061764706, 0.32254902, 0.15784314, -0.0068627451];
    for device in devices() {
        let x = image(&device, 3, 4, 1);
        for (size, want) in [([5, 6], &BILINEAR_UP[..]), ([2, 3], &SMALLER)] {
            let got = f64s(&ops::resize_bilinear(&x, size).unwrap());
            assert_eq!(got.len(), want.len());
            for (i, (got, want)) in got.iter().zip(want).enumerate() {
                assert!((got - want).abs() < 5e-7, "{device} {size:?} element {i}: {got}, not {want}");
            }
        }
        assert!(ops::resize_bilinear(&x, [3, 4]).unwrap().is_same(&x));
    }
}

/// Means of what is there, in f64; channels of whole vectors and of others, one pixel, one row, odd and even sizes.
#[test]
fn avg_pool_matches_f64() {
    let shapes = [[1, 1, 1, 1], [2, 3, 3, 3], [1, 4, 6, 8], [2, 5, 8, 16], [1, 2, 7, 24], [3, 7, 1, 5], [1, 1, 130, 9]];
    for (device, dtype, shape) in floats().flat_map(|(d, dtype)| shapes.map(|s| (d.clone(), dtype, s))) {
        let [n, h, w, c] = shape;
        let x = Random::new(9).randn(&device, &shape, dtype);
        let got = ops::avg_pool(&x).unwrap();
        let (to_h, to_w) = (h.div_ceil(2), w.div_ceil(2));
        assert_eq!((got.shape(), got.dtype()), ([n, to_h, to_w, c].as_slice(), dtype));
        let (x, got) = (f64s(&x), f64s(&got));
        for (at, got) in got.iter().enumerate() {
            let (b, i, j, channel) = (at / c / to_w / to_h, at / c / to_w % to_h, at / c % to_w, at % c);
            let pixels = [(0, 0), (0, 1), (1, 0), (1, 1)].map(|(di, dj)| (2 * i + di, 2 * j + dj));
            let there = pixels.into_iter().filter(|&(i, j)| i < h && j < w);
            let values: Vec<f64> = there.map(|(i, j)| x[((b * h + i) * w + j) * c + channel]).collect();
            let want = values.iter().sum::<f64>() / values.len() as f64;
            // Three sums and a quotient in f32, one rounding to the dtype.
            let size = values.iter().map(|v| v.abs()).sum::<f64>();
            let allowed = 4.0 * f64::from(f32::EPSILON) * size + dtype.ulp() / 2.0 * want.abs();
            assert!((got - want).abs() <= allowed, "{device} {dtype} {shape:?} [{at}]: {got}, expected {want}");
        }
    }
    let nine: Vec<f32> = (1..=9).map(|v| v as f32).collect();
    let x = Tensor::from_f32(&Device::cpu(), &[1, 3, 3, 1], DType::F32, &nine).unwrap();
    assert_eq!(ops::avg_pool(&x).unwrap().to_f32_vec().unwrap(), [3.0, 4.5, 7.5, 9.0]);
}

/// Averaging a constant map and enlarging it again gives it back.
#[test]
fn a_constant_map_is_pooled_and_enlarged_to_itself() {
    let x = Tensor::from_f32(&Device::cpu(), &[1, 7, 10, 2], DType::F32, &[0.3; 140]).unwrap();
    let back = ops::resize(&ops::avg_pool(&x).unwrap(), [7, 10], Upsampler::BicubicTorch, None, None).unwrap();
    assert!(back.to_f32_vec().unwrap().iter().all(|v| (v - 0.3).abs() < 1e-6));
}

/// A step whose network makes its input smaller and larger again: launched, recorded and replayed, bit for bit. Nothing of a
/// resize comes from the host, so nothing has to be there before a step is recorded.
#[test]
fn a_recorded_step_may_resize() {
    for (device, upsampler) in cards().into_iter().flat_map(|device| ALL.map(|upsampler| (device.clone(), upsampler))) {
        let run = |recorded: bool| {
            let row = |next_from_e| StepRow {
                input_scale: 1.0,
                coefficients: StepCoefficients { next_from_x: 0.75, next_from_e, ..StepCoefficients::default() },
            };
            let rows = [0.25, -0.5, 0.125, 0.5].map(row).to_vec();
            let mut steps = StepTable::new(&device, rows).unwrap();
            let x = Random::new(8).randn(&device, &[2, 13, 10, 4], DType::F32);
            let mut state = SampleState::new(x).unwrap();
            let mut repeated = Repeated::new(&device);
            for step in 0..4 {
                let mut step_of = || {
                    let x = ops::scale_input(state.x(), &steps, DType::F16, 1)?;
                    let smaller = ops::resize_u8(&ops::resize(&x, [5, 8], upsampler, None, None)?, [4, 6], upsampler)?;
                    let output = ops::resize(&smaller, [13, 10], upsampler, Some((-0.9, 0.9)), None)?;
                    ops::sampler_step(&mut state, &output, None, &steps, None)?;
                    steps.index_mut().advance()
                };
                if !recorded {
                    step_of().unwrap();
                } else if repeated.run(step_of).unwrap() {
                    steps.index_mut().replayed();
                    assert!(step > 1, "the third is the first that is replayed");
                }
            }
            assert_eq!(repeated.graph().is_some(), recorded);
            state.x().to_f32_vec().unwrap()
        };
        assert!(run(true) == run(false), "{device} {upsampler}");
    }
}

/// The meta device counts the launches that a card makes.
#[test]
fn a_card_launches_what_meta_counts() {
    for (card, upsampler) in cards().into_iter().flat_map(|card| ALL.map(|upsampler| (card.clone(), upsampler))) {
        for eight_bit in [false, true] {
            let resize = |device: &Device| {
                let x = Tensor::zeros(device, &[2, 16, 24, 3], DType::F16).unwrap();
                move || match eight_bit {
                    true => ops::resize_u8(&x, [40, 12], upsampler),
                    false => ops::resize(&x, [40, 12], upsampler, None, None),
                }
            };
            let meta = MetaDevice::default();
            let counted = resize(&Device::Meta(meta.clone()));
            meta.take_report();
            counted().unwrap();
            let launches = meta.take_report().ops[0].work.launches;
            let Device::Cuda(cuda) = &card else { unreachable!() };
            let launched = resize(&card);
            let graph = cuda.capture(0, || launched().map(drop)).unwrap();
            assert_eq!(graph.kernels().len() as u64, launches, "{card} {upsampler}: {:?}", graph.kernels());
        }
    }
}

#[test]
fn meta_has_the_shapes_and_bytes_of_cpu() {
    let meta = MetaDevice::default();
    let device = Device::Meta(meta.clone());
    let x = Tensor::uninit(&device, &[2, 16, 24, 3], DType::BF16).unwrap();
    let run = |name: &str, y: Tensor| {
        assert_eq!((y.shape(), y.dtype()), ([2, 40, 33, 3].as_slice(), DType::BF16));
        let report = meta.take_report();
        let [record] = report.ops.as_slice() else { panic!("one op, one record: {report:?}") };
        assert_eq!((record.op, record.kind, record.output.as_slice()), (name, OpKind::Resize, y.shape()));
        assert_eq!(record.work.macs, 0);
        assert_eq!(record.work.bytes, 2 * (2 * 3 * (16 * 24 + 40 * 33)) as u64);
        record.work.flops
    };
    for upsampler in ALL {
        assert!(run("resize", ops::resize(&x, [40, 33], upsampler, None, None).unwrap()) > 0);
        assert!(run("resize_u8", ops::resize_u8(&x, [40, 33], upsampler).unwrap()) > 0);
    }
    assert_eq!(run("resize_nearest", ops::resize_nearest(&x, [40, 33]).unwrap()), 0);
    assert_eq!(run("resize_bilinear", ops::resize_bilinear(&x, [40, 33]).unwrap()), 9 * 2 * 3 * 40 * 33);
    let y = ops::avg_pool(&Tensor::uninit(&device, &[2, 15, 24, 3], DType::BF16).unwrap()).unwrap();
    let work = meta.take_report().ops[0].work;
    assert_eq!((y.shape(), work.bytes), (&[2, 8, 12, 3][..], 2 * (2 * 3 * (15 * 24 + 8 * 12))));
}

#[test]
fn errors_name_the_argument() {
    let device = Device::cpu();
    let x = Tensor::zeros(&device, &[1, 4, 4, 3], DType::F32).unwrap();
    let of = |shape: &[usize], dtype| Tensor::zeros(&device, shape, dtype).unwrap();
    for f in [
        (|x, size| ops::resize(x, size, Upsampler::Bicubic, None, None))
            as fn(&Tensor, [usize; 2]) -> megafuse::Result<Tensor>,
        |x, size| ops::resize_u8(x, size, Upsampler::Bicubic),
        ops::resize_nearest,
        ops::resize_bilinear,
    ] {
        assert!(matches!(f(&x, [0, 4]).unwrap_err(), Error::Argument { arg: "size", .. }));
        assert!(matches!(f(&x, [4, 0]).unwrap_err(), Error::Argument { arg: "size", .. }));
        assert!(matches!(f(&x, [usize::MAX, 2]).unwrap_err(), Error::TooLarge { .. }));
        assert!(matches!(f(&of(&[4, 4, 3], DType::F32), [2, 2]).unwrap_err(), Error::Shape { arg: "x", .. }));
        for empty in [[1, 0, 4, 3], [1, 4, 0, 3], [1, 4, 4, 0]] {
            assert!(matches!(f(&of(&empty, DType::F32), [2, 2]).unwrap_err(), Error::Shape { arg: "x", .. }));
        }
        assert!(matches!(f(&of(&[1, 4, 4, 3], DType::U32), [2, 2]).unwrap_err(), Error::Dtype { arg: "x", .. }));
    }
    for clamp in [(1.0, -1.0), (f32::NAN, 1.0)] {
        let error = ops::resize(&x, [2, 2], Upsampler::Bicubic, Some(clamp), None).unwrap_err();
        assert!(matches!(error, Error::Argument { arg: "clamp", .. }));
    }
    let noised = |noise: &Tensor| {
        let relay = RelayNoise { noise, signal: 1.0, sigma: 1.0 };
        ops::resize(&x, [2, 2], Upsampler::Bicubic, None, Some(relay)).unwrap_err()
    };
    assert!(matches!(noised(&of(&[1, 4, 4, 3], DType::F32)), Error::Shape { arg: "noise", .. }));
    assert!(matches!(noised(&of(&[1, 2, 2, 3], DType::F16)), Error::Dtype { arg: "noise", .. }));
    let elsewhere = Tensor::zeros(&Device::cpu(), &[1, 2, 2, 3], DType::F32).unwrap();
    assert!(matches!(noised(&elsewhere), Error::Device { arg: "noise", .. }));
}
