//! freeu against the discrete Fourier transform by its definition, in f64.

use std::f64::consts::TAU;

use crate::common::{Expected, Random, assert_close, cases, devices, f64s, unaligned};
use megafuse::Error;
use megafuse::ops::{self, FreeU};
use megafuse::runtime::{DType, Device, MetaDevice, Tensor};

/// N, H, W and the channels of backbone and skip: one value; one row, one column; primes; whole vectors; more channels than a
/// block and more pixels than a part; no channel, no picture.
const SHAPES: [([usize; 3], [usize; 2]); 10] = [
    ([1, 1, 1], [2, 3]),
    ([1, 1, 6], [16, 8]),
    ([1, 2, 1], [4, 16]),
    ([2, 5, 7], [7, 5]),
    ([2, 6, 4], [16, 24]),
    ([1, 17, 33], [16, 72]),
    ([1, 33, 31], [70, 9]),
    ([1, 4, 4], [8, 0]),
    ([1, 4, 4], [0, 8]),
    ([0, 4, 4], [8, 8]),
];

const FACTORS: FreeU = FreeU { backbone: 1.2, skip: 0.4 };

/// The frequencies of an axis that the two places around the centre of the shifted spectrum hold.
fn low(length: usize) -> Vec<f64> {
    let half = length / 2;
    (half.saturating_sub(1)..=half).map(|at| at as f64 - half as f64).collect()
}

fn expected(backbone: &Tensor, skip: &Tensor, factors: FreeU) -> Expected {
    let (&[n, h, w, c], &[_, _, _, d]) = (backbone.shape(), skip.shape()) else { panic!("four dimensions") };
    let (b, x) = (f64s(backbone), f64s(skip));
    let (b_factor, s) = (f64::from(factors.backbone), f64::from(factors.skip));
    let (mut values, mut magnitudes) = (vec![0.0; n * h * w * (c + d)], vec![0.0; n * h * w * (c + d)]);
    for image in 0..n {
        for channel in 0..d {
            let at = |i: usize, j: usize| x[((image * h + i) * w + j) * d + channel];
            let pixels = || (0..h).flat_map(|i| (0..w).map(move |j| (i, j)));
            let all: f64 = pixels().map(|(i, j)| at(i, j).abs()).sum();
            let mut spectrum = Vec::new();
            for (u, v) in low(h).into_iter().flat_map(|u| low(w).into_iter().map(move |v| (u, v))) {
                let phase = |i: usize, j: usize| TAU * (u * i as f64 / h as f64 + v * j as f64 / w as f64);
                let re: f64 = pixels().map(|(i, j)| at(i, j) * phase(i, j).cos()).sum();
                let im: f64 = pixels().map(|(i, j)| -at(i, j) * phase(i, j).sin()).sum();
                spectrum.push((u, v, re, im));
            }
            for (i, j) in pixels() {
                let wave = |&(u, v, re, im): &(f64, f64, f64, f64)| {
                    let phase = TAU * (u * i as f64 / h as f64 + v * j as f64 / w as f64);
                    re * phase.cos() - im * phase.sin()
                };
                let sum: f64 = spectrum.iter().map(wave).sum();
                let to = ((image * h + i) * w + j) * (c + d) + c + channel;
                values[to] = at(i, j) + (s - 1.0) / (h * w) as f64 * sum;
                magnitudes[to] = at(i, j).abs() + (s - 1.0).abs() * 4.0 * all / (h * w) as f64;
            }
        }
        for (pixel, channel) in (0..h * w).flat_map(|pixel| (0..c).map(move |channel| (pixel, channel))) {
            let value = b[(image * h * w + pixel) * c + channel];
            let to = (image * h * w + pixel) * (c + d) + channel;
            values[to] = if channel < c / 2 { b_factor * value } else { value };
            magnitudes[to] = values[to].abs();
        }
    }
    Expected { shape: vec![n, h, w, c + d], values, magnitudes }
}

/// Phases err by an ulp of a number up to 2, times pi; sums are of a few dozen terms one after the other.
const F32_EPS: f64 = 48.0;

#[test]
fn matches_the_transform() {
    for (device, dtype, ([n, h, w], [c, d])) in cases(&SHAPES) {
        let mut random = Random::new(1);
        let backbone = random.randn(&device, &[n, h, w, c], dtype);
        let skip = random.tensor(&device, &[n, h, w, d], dtype, 0.5, 1.0);
        let got = ops::freeu(&backbone, &skip, FACTORS).unwrap();
        assert_close(&got, &expected(&backbone, &skip, FACTORS), F32_EPS, format!("{device} {n} {h}x{w} {c} {d}"));
    }
}

#[test]
fn tensors_may_begin_at_any_element() {
    for (device, dtype, shape) in cases(&[[1, 5, 6, 16]]) {
        let mut random = Random::new(2);
        let (backbone, skip) = (random.randn(&device, &shape, dtype), random.randn(&device, &shape, dtype));
        let want = expected(&backbone, &skip, FACTORS);
        for (b, s) in [(&unaligned(&backbone), &skip), (&backbone, &unaligned(&skip))] {
            assert_close(&ops::freeu(b, s, FACTORS).unwrap(), &want, F32_EPS, format!("{device} {dtype}"));
        }
    }
}

/// Factors of 1 put the two side by side as they are.
#[test]
fn factors_of_1_change_nothing() {
    for device in devices() {
        let mut random = Random::new(3);
        let [backbone, skip] = [16, 24].map(|c| random.randn(&device, &[2, 9, 6, c], DType::BF16));
        let got = ops::freeu(&backbone, &skip, FreeU { backbone: 1.0, skip: 1.0 }).unwrap();
        assert_eq!(got.to_f32_vec().unwrap(), ops::concat(&backbone, &skip).unwrap().to_f32_vec().unwrap(), "{device}");
    }
}

#[test]
fn an_image_does_not_depend_on_its_batch() {
    for device in devices() {
        let mut random = Random::new(4);
        let [backbone, skip] = [8, 16].map(|c| random.randn(&device, &[3, 23, 24, c], DType::F32));
        let all = ops::freeu(&backbone, &skip, FACTORS).unwrap();
        for image in 0..3 {
            let [b, s] = [&backbone, &skip].map(|x| x.rows(image..image + 1).unwrap());
            let alone = ops::freeu(&b, &s, FACTORS).unwrap().to_f32_vec().unwrap();
            assert_eq!(alone, all.rows(image..image + 1).unwrap().to_f32_vec().unwrap(), "{device} {image}");
        }
    }
}

#[test]
fn meta_records_two_launches() {
    let meta = MetaDevice::default();
    let device = Device::Meta(meta.clone());
    let [backbone, skip] = [16, 8].map(|c| Tensor::zeros(&device, &[2, 6, 4, c], DType::BF16).unwrap());
    let y = ops::freeu(&backbone, &skip, FACTORS).unwrap();
    let report = meta.take_report();
    let [op] = &report.ops[..] else { panic!("{:?}", report.ops) };
    assert_eq!((y.shape(), op.op, op.work.launches), (&[2, 6, 4, 24][..], "freeu", 2));
    assert_eq!(op.work.bytes, 2 * 48 * (16 + 8 + 8 + 24));
}

#[test]
fn errors_name_the_argument() {
    let of = |shape: &[usize], dtype| Tensor::zeros(&Device::cpu(), shape, dtype).unwrap();
    let x = of(&[1, 4, 4, 8], DType::F32);
    let fails = |backbone: &Tensor, skip: &Tensor| ops::freeu(backbone, skip, FACTORS).unwrap_err();
    assert!(matches!(fails(&x, &of(&[1, 4, 5, 8], DType::F32)), Error::Shape { arg: "skip", .. }));
    assert!(matches!(fails(&x, &of(&[2, 4, 4, 8], DType::F32)), Error::Shape { arg: "skip", .. }));
    assert!(matches!(fails(&x, &of(&[1, 4, 4, 8], DType::F16)), Error::Dtype { arg: "skip", .. }));
    assert!(matches!(fails(&of(&[4, 8], DType::F32), &x), Error::Shape { arg: "backbone", .. }));
    assert!(matches!(fails(&of(&[1, 4, 4, 8], DType::U32), &x), Error::Dtype { arg: "backbone", .. }));
}
