//! sharpen and exchange_low_band against a whole wavelet transform in f64, PyWavelets and plain loops.

use crate::common::{Expected, Random, assert_close, cards, devices, f64s};
use megafuse::Error;
use megafuse::ops;
use megafuse::runtime::{DType, Device, MetaDevice, OpKind, Tensor};

/// N, H, W, C: one pixel; shorter than the filter, odd and even; the lengths of all remainders; a row of more than a block, with
/// and without vectors; no pictures.
const SHAPES: [[usize; 4]; 9] = [
    [1, 1, 1, 1],
    [1, 2, 3, 3],
    [2, 5, 7, 3],
    [1, 8, 4, 1],
    [1, 64, 65, 3],
    [1, 66, 67, 2],
    [1, 3, 96, 3],
    [1, 11, 89, 3],
    [0, 8, 8, 3],
];

/// `dec_lo` of PyWavelets' db4, after Daubechies 1988.
const LOW: [f64; 8] = [
    -0.010597401785069032,
    0.0328830116668852,
    0.030841381835560764,
    -0.18703481171909309,
    -0.027983769416859854,
    0.6308807679298589,
    0.7148465705529157,
    0.2303778133088965,
];

fn high(n: usize) -> f64 {
    if n.is_multiple_of(2) { -LOW[7 - n] } else { LOW[7 - n] }
}

/// Low and high band of a line, `floor((n + 7) / 2)` coefficients each: a convolution of the line, mirrored with its ends
/// repeated, of which every second value is kept.
fn analysis(line: &[f64]) -> [Vec<f64>; 2] {
    let n = line.len() as isize;
    let at = |i: isize| {
        let i = i.rem_euclid(2 * n);
        line[i.min(2 * n - 1 - i) as usize]
    };
    let band = |tap: &dyn Fn(usize) -> f64| {
        (0..(line.len() + 7) / 2).map(|k| (0..8).map(|j| tap(j) * at(2 * k as isize + 1 - j as isize)).sum()).collect()
    };
    [band(&|j| LOW[j]), band(&high)]
}

/// The line of `length` values that has these bands.
fn synthesis(bands: &[Vec<f64>; 2], length: usize) -> Vec<f64> {
    let value = |i: usize| {
        let of = |k: usize| (i + 6).checked_sub(2 * k).filter(|&tap| tap < 8).map(|tap| 7 - tap);
        let taps = (0..bands[0].len()).filter_map(|k| Some((k, of(k)?)));
        taps.map(|(k, tap)| LOW[tap] * bands[0][k] + high(tap) * bands[1][k]).sum()
    };
    (0..length).map(value).collect()
}

type Plane = Vec<Vec<f64>>;

fn transposed(plane: &Plane) -> Plane {
    (0..plane[0].len()).map(|j| plane.iter().map(|row| row[j]).collect()).collect()
}

/// Four bands: of the rows low or high, and in each of these of the columns.
fn transformed(plane: &Plane) -> [[Plane; 2]; 2] {
    let rows: Vec<[Vec<f64>; 2]> = plane.iter().map(|row| analysis(row)).collect();
    [0, 1].map(|band| {
        let columns = transposed(&rows.iter().map(|bands| bands[band].clone()).collect());
        let bands: Vec<[Vec<f64>; 2]> = columns.iter().map(|column| analysis(column)).collect();
        [0, 1].map(|band| bands.iter().map(|bands| bands[band].clone()).collect())
    })
}

fn restored(bands: &[[Plane; 2]; 2], [h, w]: [usize; 2]) -> Plane {
    let of_rows = [0, 1].map(|band| {
        let [low, high] = &bands[band];
        let columns: Plane =
            low.iter().zip(high).map(|(low, high)| synthesis(&[low.clone(), high.clone()], h)).collect();
        transposed(&columns)
    });
    (0..h).map(|i| synthesis(&[of_rows[0][i].clone(), of_rows[1][i].clone()], w)).collect()
}

fn exchanged(x: &Plane, guide: &Plane) -> Plane {
    let (mut bands, mut other) = (transformed(x), transformed(guide));
    std::mem::swap(&mut bands[0][0], &mut other[0][0]);
    restored(&bands, [x.len(), x[0].len()])
}

/// `2 x - blur(x)`; beyond the border the picture is mirrored about its border pixels.
fn sharpened(x: &Plane, sigma: f64) -> Plane {
    let at = |i: isize, length: usize| {
        let last = length as isize - 1;
        (if i < 0 {
            -i
        } else if i > last {
            2 * last - i
        } else {
            i
        })
        .clamp(0, last) as usize
    };
    let g = |a: isize, b: isize| (-((a * a + b * b) as f64) / (2.0 * sigma * sigma)).exp();
    let taps: Vec<(isize, isize)> = (-1..=1).flat_map(|a| (-1..=1).map(move |b| (a, b))).collect();
    let total: f64 = taps.iter().map(|&(a, b)| g(a, b)).sum();
    let value = |i: usize, j: usize| {
        let tap = |&(a, b): &(isize, isize)| g(a, b) * x[at(i as isize + a, x.len())][at(j as isize + b, x[0].len())];
        2.0 * x[i][j] - taps.iter().map(tap).sum::<f64>() / total
    };
    (0..x.len()).map(|i| (0..x[0].len()).map(|j| value(i, j)).collect()).collect()
}

/// Plane by plane: `f` of the planes of all inputs.
fn by_plane(inputs: &[&Tensor], f: impl Fn(&[Plane]) -> Plane) -> Expected {
    let &[n, h, w, c] = inputs[0].shape() else { panic!("four dimensions") };
    let all: Vec<Vec<f64>> = inputs.iter().map(|x| f64s(x)).collect();
    let mut values = vec![0.0; n * h * w * c];
    for (image, channel) in (0..n).flat_map(|image| (0..c).map(move |channel| (image, channel))) {
        let place = |i: usize, j: usize| ((image * h + i) * w + j) * c + channel;
        let planes: Vec<Plane> =
            all.iter().map(|x| (0..h).map(|i| (0..w).map(|j| x[place(i, j)]).collect()).collect()).collect();
        for (i, row) in f(&planes).into_iter().enumerate() {
            row.into_iter().enumerate().for_each(|(j, value)| values[place(i, j)] = value);
        }
    }
    // Inputs below 5; absolute weights up to 1.7 along an axis, and what is added.
    Expected { shape: inputs[0].shape().to_vec(), magnitudes: vec![20.0; values.len()], values }
}

#[test]
fn the_bands_together_are_the_line() {
    for length in [1, 2, 5, 8, 64, 65, 66, 67] {
        let line: Vec<f64> = (0..length).map(|i| ((i * 37 + 11) % 19) as f64 / 9.0 - 1.0).collect();
        let again = synthesis(&analysis(&line), length);
        assert!(line.iter().zip(&again).all(|(a, b)| (a - b).abs() < 1e-10), "{length}");
    }
}

#[test]
fn the_low_band_is_the_guides_and_the_others_stay() {
    for (device, shape) in devices().into_iter().flat_map(|device| SHAPES.map(|shape| (device.clone(), shape))) {
        let mut random = Random::new(41);
        let [x, guide] = [0; 2].map(|_| random.randn(&device, &shape, DType::F32));
        let got = ops::exchange_low_band(&x, &guide).unwrap();
        let want = by_plane(&[&x, &guide], |planes| exchanged(&planes[0], &planes[1]));
        assert_close(&got, &want, 3.0, format!("{device} {shape:?}"));
        // Its own low band changes nothing, to the bit.
        assert_eq!(f64s(&ops::exchange_low_band(&x, &x).unwrap()), f64s(&x), "{device} {shape:?}");
    }
}

/// PyWavelets 1.8: dwt2 and idwt2 with db4 and mode symmetric, 5x7.
#[test]
fn the_low_band_is_pywavelets() {
    let levels = |a: usize, b: usize, c: usize, period: usize| -> Vec<f32> {
        let level = move |i: usize, j: usize| (i * a + j * b + i * j % period * c) % 64;
        (0..5).flat_map(|i| (0..7).map(move |j| level(i, j) as f32 / 32.0 - 1.0)).collect()
    };
    for device in devices() {
        let tensor = |values: &[f32]| Tensor::from_f32(&device, &[1, 5, 7, 1], DType::F32, values).unwrap();
        let (x, guide) = (tensor(&levels(37, 91, 13, 5)), tensor(&levels(53, 29, 11, 7)));
        let got = f64s(&ops::exchange_low_band(&x, &guide).unwrap());
        for (i, (got, want)) in got.iter().zip(PYWAVELETS).enumerate() {
            assert!((got - want).abs() < 2e-6, "{device} element {i}: {got}, not {want}");
        }
    }
}

#[rustfmt::skip]
const PYWAVELETS: [f64; 35] = [
    -0.988073369715, -0.057557354828, 0.865251866852, -0.199599745021, 0.711229632711, -0.422163913717, 0.440141223716,
    0.961797780352, -1.237864483087, -0.1557472242, -0.174542710667, -0.644646820189, 0.797695321301, 0.199883043777,
    0.042304150592, 0.164791173923, -0.411399807573, -0.127414148043, -0.162213778091, -0.156425142871, -0.288873840857,
    0.459179586402, -0.039579117356, -0.187712307732, -0.087980455538, 0.152586364456, 0.73289099326, 1.027319495777,
    -0.643357819498, -0.439242102396, -0.175683769875, 0.086597180334, -1.292750844332, -0.22270429441, 0.494545447193,
];

#[test]
fn sharpen_matches_f64() {
    for (device, shape) in devices().into_iter().flat_map(|device| SHAPES.map(|shape| (device.clone(), shape))) {
        for sigma in [0.1, 0.75, 2.0] {
            let x = Random::new(42).randn(&device, &shape, DType::F32);
            let got = ops::sharpen(&x, sigma).unwrap();
            let want = by_plane(&[&x], |planes| sharpened(&planes[0], sigma.into()));
            assert_close(&got, &want, 2.0, format!("{device} {shape:?} sigma {sigma}"));
        }
    }
}

/// The meta device counts the launches that a card makes, and each tensor once.
#[test]
fn a_card_launches_what_meta_counts() {
    for (card, name) in cards().into_iter().flat_map(|card| [(card.clone(), "sharpen"), (card, "exchange_low_band")]) {
        let run = |device: &Device| {
            let [x, guide] = [0; 2].map(|_| Tensor::zeros(device, &[2, 16, 24, 3], DType::F32).unwrap());
            move || match name {
                "sharpen" => ops::sharpen(&x, 0.5),
                _ => ops::exchange_low_band(&x, &guide),
            }
        };
        let meta = MetaDevice::default();
        let counted = run(&Device::Meta(meta.clone()));
        meta.take_report();
        assert_eq!(counted().unwrap().shape(), [2, 16, 24, 3]);
        let report = meta.take_report();
        let last = report.ops.last().unwrap();
        let tensors = if name == "sharpen" { 2 } else { 3 };
        assert_eq!((last.op, last.kind, last.work.bytes), (name, OpKind::Resize, tensors * 4 * 2 * 16 * 24 * 3));
        let launches: u64 = report.ops.iter().map(|op| op.work.launches).sum();
        let Device::Cuda(cuda) = &card else { unreachable!() };
        let launched = run(&card);
        let graph = cuda.capture(0, || launched().map(drop)).unwrap();
        assert_eq!(graph.kernels().len() as u64, launches, "{card} {name}: {:?}", graph.kernels());
    }
}

#[test]
fn errors_name_the_argument() {
    let device = Device::cpu();
    let of = |shape: &[usize], dtype| Tensor::zeros(&device, shape, dtype).unwrap();
    let x = of(&[1, 4, 4, 3], DType::F32);
    for sigma in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        assert!(matches!(ops::sharpen(&x, sigma).unwrap_err(), Error::Argument { arg: "sigma", .. }));
    }
    for (bad, shape) in [(of(&[4, 4, 3], DType::F32), true), (of(&[1, 4, 4, 3], DType::F16), false)] {
        for error in [ops::sharpen(&bad, 1.0).unwrap_err(), ops::exchange_low_band(&bad, &bad).unwrap_err()] {
            let fits = match error {
                Error::Shape { arg: "x", .. } => shape,
                Error::Dtype { arg: "x", .. } => !shape,
                _ => false,
            };
            assert!(fits, "{error}");
        }
    }
    assert!(matches!(ops::sharpen(&of(&[1, 0, 4, 3], DType::F32), 1.0).unwrap_err(), Error::Shape { arg: "x", .. }));
    let error = ops::exchange_low_band(&x, &of(&[1, 4, 5, 3], DType::F32)).unwrap_err();
    assert!(matches!(error, Error::Shape { arg: "guide", .. }));
}
