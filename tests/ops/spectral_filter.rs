//! spectral_filter against the discrete Fourier transform by its definition, in f64, with the mask laid out as it is published.

use std::f64::consts::TAU;

use crate::common::{Expected, Random, assert_close, cases, devices, f64s, unaligned};
use megafuse::Error;
use megafuse::ops::{self, LowPass, SpectralFilter, Strength};
use megafuse::runtime::{DType, Device, MetaDevice, Tensor};

/// N, H, W, C, the padded sides, and how many images have the weak mask: one value; even and odd maps with and without padding; one
/// row, one column; beyond a block's outputs, values of a slice and columns; whole vectors; no picture, no channel.
const SHAPES: [([usize; 4], [usize; 2], usize); 11] = [
    ([1, 1, 1, 1], [2, 2], 0),
    ([3, 8, 8, 3], [8, 8], 1),
    ([2, 5, 7, 5], [8, 8], 1),
    ([2, 1, 9, 8], [4, 12], 1),
    ([2, 9, 1, 8], [10, 2], 2),
    ([1, 12, 20, 9], [12, 20], 0),
    ([3, 6, 10, 24], [6, 14], 1),
    ([1, 33, 17, 8], [48, 48], 1),
    ([1, 3, 36, 130], [4, 36], 0),
    ([0, 4, 4, 8], [4, 4], 0),
    ([2, 4, 4, 0], [4, 4], 1),
];

const PASS: LowPass = LowPass { scale: 2.6, floor: 0.3 };

/// The whole mask of an axis, by the published formula, at the places of the spectrum that is not shifted.
fn mask(n: usize, pass: LowPass, strength: Strength) -> Vec<f64> {
    let (half, LowPass { scale, floor }) = (n / 2, pass);
    let taper = match strength {
        Strength::Strong => (n / 8).max(1) as f64,
        Strength::Weak => ((scale - 1.0) * n as f64 / (2.0 * scale)).floor(),
    };
    let of = |j: usize| match taper {
        0.0 => 1.0,
        _ => ((1.0 - floor) / taper * (half as f64 / scale + 1.0 - j as f64) + 1.0).max(floor).min(1.0),
    };
    // flip(m) beside m, and back from the shifted order.
    let shifted: Vec<f64> = (0..half).rev().chain(0..half).map(of).collect();
    (0..n).map(|k| shifted[(k + half) % n]).collect()
}

/// `sum over k of z[k] e^(sign 2 pi i k t / n)`, of complex values.
fn transformed(z: &[[f64; 2]], sign: f64) -> Vec<[f64; 2]> {
    let n = z.len();
    let at = |t: usize| {
        z.iter().enumerate().fold([0.0, 0.0], |[re, im], (k, [a, b])| {
            let (sin, cos) = (sign * TAU * (k * t % n) as f64 / n as f64).sin_cos();
            [re + a * cos - b * sin, im + a * sin + b * cos]
        })
    };
    (0..n).map(at).collect()
}

/// One channel of one image, `[h][w]`, padded.
fn filtered(map: &mut [Vec<[f64; 2]>], masks: [&[f64]; 2]) {
    let sides = [map.len(), map[0].len()];
    for sign in [-1.0, 1.0] {
        map.iter_mut().for_each(|row| *row = transformed(row, sign));
        for column in 0..sides[1] {
            let values: Vec<[f64; 2]> = map.iter().map(|row| row[column]).collect();
            transformed(&values, sign).into_iter().zip(map.iter_mut()).for_each(|(value, row)| row[column] = value);
        }
        let factor = |i: usize, j: usize| match sign < 0.0 {
            true => masks[0][i] * masks[1][j],
            false => 1.0 / (sides[0] * sides[1]) as f64,
        };
        for (i, row) in map.iter_mut().enumerate() {
            row.iter_mut().enumerate().for_each(|(j, z)| *z = z.map(|part| part * factor(i, j)));
        }
    }
}

fn expected(args: &SpectralFilter) -> Expected {
    let &SpectralFilter { x, padded, pass, weak } = args;
    let &[n, h, w, c] = x.shape() else { panic!("four dimensions") };
    let values = f64s(x);
    let (mut y, mut magnitudes) = (vec![0.0; n * h * w * c], vec![0.0; n * h * w * c]);
    for (image, channel) in (0..n).flat_map(|image| (0..c).map(move |channel| (image, channel))) {
        let strength = if image + weak < n { Strength::Strong } else { Strength::Weak };
        let masks = padded.map(|side| mask(side, pass, strength));
        let at = |i: usize, j: usize| ((image * h + i) * w + j) * c + channel;
        let value = |i: usize, j: usize| if i < h && j < w { values[at(i, j)] } else { 0.0 };
        let mut map: Vec<Vec<[f64; 2]>> =
            (0..padded[0]).map(|i| (0..padded[1]).map(|j| [value(i, j), 0.0]).collect()).collect();
        let norm = map.iter().flatten().map(|z| z[0] * z[0]).sum::<f64>().sqrt();
        filtered(&mut map, [&masks[0], &masks[1]]);
        for (i, j) in (0..h).flat_map(|i| (0..w).map(move |j| (i, j))) {
            (y[at(i, j)], magnitudes[at(i, j)]) = (map[i][j][0], norm);
        }
    }
    Expected { shape: x.shape().to_vec(), values: y, magnitudes }
}

/// Taps are rounded once, sums are of a few dozen terms; the circulant of a mask up to 1 has rows of norm at most 1.
const F32_EPS: f64 = 12.0;

#[test]
fn matches_the_transform() {
    for (device, dtype, (shape, padded, weak)) in cases(&SHAPES) {
        let x = Random::new(1).tensor(&device, &shape, dtype, 0.5, 1.0);
        let args = SpectralFilter { x: &x, padded, pass: PASS, weak };
        let got = ops::spectral_filter(args).unwrap();
        assert_close(&got, &expected(&args), F32_EPS, format!("{device} {shape:?} in {padded:?}, weak {weak}"));
    }
}

#[test]
fn masks_are_the_published_ones() {
    for (n, scale, floor) in [(16, 2.0, 0.0), (24, 1.25, 0.6), (2, 4.0, 0.0), (96, 3.7, 0.6), (18, 1.0, 0.0)] {
        let pass = LowPass { scale, floor };
        for strength in [Strength::Strong, Strength::Weak] {
            let want = mask(n, pass, strength);
            assert_eq!(pass.mask(n, strength), want[..n / 2], "{n} {scale} {floor} {strength:?}");
            // The other half are its mirror image.
            assert!((0..n / 2).all(|j| want[n - 1 - j] == want[j]));
        }
    }
    // Worked out by hand: n = 16, scale 2: strong 4 + 1 - j over 2, weak over (2 - 1) 16 / 4 = 4.
    let pass = LowPass { scale: 2.0, floor: 0.0 };
    assert_eq!(pass.mask(16, Strength::Strong), [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.0]);
    assert_eq!(pass.mask(16, Strength::Weak), [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5]);
}

#[test]
fn what_lets_everything_pass_is_the_input() {
    for device in devices() {
        let x = Random::new(2).randn(&device, &[3, 5, 6, 4], DType::BF16);
        for (scale, floor, weak) in [(1.0, 0.0, 3), (1.0, 0.0, 0), (4.0, 1.0, 1)] {
            let pass = LowPass { scale, floor };
            let y = ops::spectral_filter(SpectralFilter { x: &x, padded: [6, 8], pass, weak }).unwrap();
            assert_eq!(y.to_f32_vec().unwrap(), x.to_f32_vec().unwrap(), "{device} {scale} {floor} {weak}");
        }
    }
}

#[test]
fn tensors_may_begin_at_any_element() {
    for (device, dtype, shape) in cases(&[[2, 5, 6, 16]]) {
        let x = unaligned(&Random::new(3).randn(&device, &shape, dtype));
        let args = SpectralFilter { x: &x, padded: [8, 10], pass: PASS, weak: 1 };
        assert_close(&ops::spectral_filter(args).unwrap(), &expected(&args), F32_EPS, format!("{device} {dtype}"));
    }
}

#[test]
fn an_image_does_not_depend_on_its_batch() {
    for device in devices() {
        let x = Random::new(4).randn(&device, &[4, 7, 9, 8], DType::F16);
        let of = |x: &Tensor, weak| {
            let args = SpectralFilter { x, padded: [8, 10], pass: PASS, weak };
            ops::spectral_filter(args).unwrap().to_f32_vec().unwrap()
        };
        let all = of(&x, 2);
        for (image, all) in all.chunks_exact(7 * 9 * 8).enumerate() {
            assert_eq!(of(&x.rows(image..image + 1).unwrap(), usize::from(image >= 2)), all, "{device} {image}");
        }
    }
}

#[test]
fn meta_records_three_launches() {
    let meta = MetaDevice::default();
    let x = Tensor::zeros(&Device::Meta(meta.clone()), &[3, 6, 4, 16], DType::BF16).unwrap();
    let y = ops::spectral_filter(SpectralFilter { x: &x, padded: [8, 8], pass: PASS, weak: 1 }).unwrap();
    let report = meta.take_report();
    let [op] = &report.ops[..] else { panic!("{:?}", report.ops) };
    assert_eq!((y.shape(), op.op, op.work.launches), (x.shape(), "spectral_filter", 3));
    assert_eq!(op.work.bytes, 2 * x.bytes());
}

#[test]
fn errors_name_the_argument() {
    let x = Tensor::zeros(&Device::cpu(), &[2, 5, 4, 8], DType::F32).unwrap();
    let args = SpectralFilter { x: &x, padded: [6, 4], pass: PASS, weak: 1 };
    let fails = |args| match ops::spectral_filter(args).unwrap_err() {
        Error::Argument { arg, .. } | Error::Shape { arg, .. } | Error::Dtype { arg, .. } => arg,
        other => panic!("{other}"),
    };
    assert_eq!(fails(SpectralFilter { padded: [5, 4], ..args }), "padded");
    assert_eq!(fails(SpectralFilter { padded: [4, 4], ..args }), "padded");
    assert_eq!(fails(SpectralFilter { pass: LowPass { scale: 0.5, ..PASS }, ..args }), "scale");
    assert_eq!(fails(SpectralFilter { pass: LowPass { scale: f64::NAN, ..PASS }, ..args }), "scale");
    assert_eq!(fails(SpectralFilter { pass: LowPass { floor: -0.1, ..PASS }, ..args }), "floor");
    assert_eq!(fails(SpectralFilter { weak: 3, ..args }), "weak");
    let flat = Tensor::zeros(&Device::cpu(), &[5, 4], DType::F32).unwrap();
    assert_eq!(fails(SpectralFilter { x: &flat, ..args }), "x");
    let words = Tensor::zeros(&Device::cpu(), &[1, 5, 4, 8], DType::U32).unwrap();
    assert_eq!(fails(SpectralFilter { x: &words, ..args }), "x");
}
