//! add_noise and diagonal_gaussian against plain f64 loops.

use crate::common::{Expected, Random, assert_close, devices, f64s};
use megafuse::Error;
use megafuse::ops;
use megafuse::runtime::{DType, Device, MetaDevice, OpKind, Tensor};

/// One element; primes; off a task's 8192 elements; empty; SD's latents.
const SHAPES: [[usize; 4]; 5] = [[1, 1, 1, 1], [2, 3, 5, 7], [3, 41, 67, 1], [0, 8, 8, 4], [2, 64, 64, 4]];

#[test]
fn add_noise_matches_f64() {
    devices().iter().for_each(add_noise_on);
}

fn add_noise_on(device: &Device) {
    for shape in [&[][..], &[7], &[2, 3, 5, 7], &[0, 3], &[1, 91, 97, 4]] {
        let mut random = Random::new(2);
        let [x0, noise] = [0, 1].map(|_| random.randn(device, shape, DType::F32));
        let got = ops::add_noise(&x0, &noise, 0.8, 0.6).unwrap();
        let (a, b) = (f64s(&x0), f64s(&noise));
        let [signal, sigma] = [0.8f32, 0.6].map(f64::from);
        let want = Expected {
            shape: shape.to_vec(),
            values: a.iter().zip(&b).map(|(a, b)| signal * a + sigma * b).collect(),
            magnitudes: a.iter().zip(&b).map(|(a, b)| signal * a.abs() + sigma * b.abs()).collect(),
        };
        assert_close(&got, &want, 1.0, format!("{device} {shape:?}"));
    }
}

/// Every device, dtype and shape.
fn cases() -> impl Iterator<Item = (Device, DType, [usize; 4])> {
    let of_device = |device: Device| {
        DType::FLOATS.into_iter().flat_map(move |dtype| {
            let device = device.clone();
            SHAPES.into_iter().map(move |shape| (device.clone(), dtype, shape))
        })
    };
    devices().into_iter().flat_map(of_device)
}

#[test]
fn diagonal_gaussian_matches_f64() {
    for (device, dtype, [n, h, w, c]) in cases() {
        let mut random = Random::new(3);
        // Log variances far beyond both ends of [-30, 20] in some.
        let moments = random.tensor(&device, &[n, h, w, 2 * c], dtype, 0.0, 20.0);
        let noise = random.randn(&device, &[n, h, w, c], DType::F32);
        let (m, z) = (f64s(&moments), f64s(&noise));
        for sampled in [false, true] {
            let got = ops::diagonal_gaussian(&moments, sampled.then_some(&noise)).unwrap();
            let terms = |i: usize| {
                let (mean, logvar) = (m[i / c * 2 * c + i % c], m[i / c * 2 * c + c + i % c].clamp(-30.0, 20.0));
                (mean, if sampled { (logvar / 2.0).exp() * z[i] } else { 0.0 })
            };
            let want = Expected {
                shape: vec![n, h, w, c],
                values: (0..z.len()).map(|i| terms(i).0 + terms(i).1).collect(),
                // exp's argument is exact: at most 15, halved and clamped.
                magnitudes: (0..z.len()).map(|i| terms(i).0.abs() + 2.0 * terms(i).1.abs()).collect(),
            };
            assert_eq!(got.dtype(), DType::F32);
            assert_close(&got, &want, 2.0, format!("{device} {dtype} {n} {h} {w} {c} sampled {sampled}"));
        }
    }
}

#[test]
fn meta_records_what_cpu_would_do() {
    let meta = MetaDevice::default();
    let device = Device::Meta(meta.clone());
    let x = Tensor::uninit(&device, &[2, 3, 5, 4], DType::F32).unwrap();
    let moments = Tensor::uninit(&device, &[2, 3, 5, 8], DType::BF16).unwrap();
    let noised = ops::add_noise(&x, &x, 1.0, 0.5).unwrap();
    let [mean, sample] = [None, Some(&x)].map(|noise| ops::diagonal_gaussian(&moments, noise).unwrap());
    assert!([&noised, &mean, &sample].iter().all(|y| y.shape() == x.shape() && y.dtype() == DType::F32));
    let records: Vec<(&str, u64)> = meta.take_report().ops.iter().map(|op| (op.op, op.work.bytes)).collect();
    // 120 elements of f32; of the posterior's 240 bf16 moments the mean reads half.
    let want = [("add_noise", 3 * 480), ("diagonal_gaussian", 240 + 480), ("diagonal_gaussian", 480 + 480 + 480)];
    assert_eq!(records, want);
    ops::add_noise(&x, &x, 1.0, 0.5).unwrap();
    assert_eq!(meta.take_report().of(OpKind::Elementwise).launches, 1);
}

#[test]
fn errors_name_the_argument() {
    let device = Device::cpu();
    let zeros = |shape: &[usize], dtype| Tensor::zeros(&device, shape, dtype).unwrap();
    let x = zeros(&[2, 3, 5, 4], DType::F32);
    let two = zeros(&[4, 3, 5, 4], DType::F32);
    let half = zeros(&[2, 3, 5, 4], DType::F16);
    assert!(matches!(ops::add_noise(&half, &half, 1.0, 1.0).unwrap_err(), Error::Dtype { arg: "x0", .. }));
    assert!(matches!(ops::add_noise(&x, &half, 1.0, 1.0).unwrap_err(), Error::Dtype { arg: "noise", .. }));
    assert!(matches!(ops::add_noise(&x, &two, 1.0, 1.0).unwrap_err(), Error::Shape { arg: "noise", .. }));
    let gaussian = |moments: &Tensor, noise: Option<&Tensor>| ops::diagonal_gaussian(moments, noise).unwrap_err();
    assert!(matches!(gaussian(&zeros(&[1, 2, 2, 3], DType::F32), None), Error::Shape { arg: "moments", .. }));
    assert!(matches!(gaussian(&zeros(&[2, 2, 4], DType::F32), None), Error::Shape { arg: "moments", .. }));
    let ids = zeros(&[2, 3, 5, 4], DType::U32);
    assert!(matches!(gaussian(&ids, None), Error::Dtype { arg: "moments", .. }));
    assert!(matches!(gaussian(&x, Some(&x)), Error::Shape { arg: "noise", .. }));
}
