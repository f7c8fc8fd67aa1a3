//! sampler_step, add_noise and diagonal_gaussian against plain f64 loops.

use crate::common::{Expected, Random, assert_close, f64s};
use megafuse::Error;
use megafuse::ops::{self, StepCoefficients};
use megafuse::runtime::{DType, Device, MetaDevice, OpKind, Tensor};

/// One element; primes; off a task's 8192 elements; empty; SD's latents.
const SHAPES: [[usize; 4]; 5] = [[1, 1, 1, 1], [2, 3, 5, 7], [3, 41, 67, 1], [0, 8, 8, 4], [2, 64, 64, 4]];

const COEFFICIENTS: StepCoefficients = StepCoefficients {
    x0_from_x: 1.25,
    x0_from_e: -0.75,
    clip: None,
    next_from_x: 0.3,
    next_from_e: 0.4,
    next_from_x0: 0.9,
    next_from_noise: 0.0,
};

#[test]
fn sampler_step_matches_f64() {
    let device = Device::cpu();
    for (dtype, shape) in DType::FLOATS.into_iter().flat_map(|dtype| SHAPES.map(|s| (dtype, s))) {
        for (guidance, clip, next_from_noise) in
            [(None, None, 0.0), (Some(7.5), None, 0.0), (Some(-1.0), Some(1.0), 0.6)]
        {
            let mut random = Random::new(1);
            let x = random.randn(&device, &shape, DType::F32);
            let noise = random.randn(&device, &shape, DType::F32);
            let mut doubled = shape;
            doubled[0] *= if guidance.is_some() { 2 } else { 1 };
            let output = random.randn(&device, &doubled, dtype);
            let k = StepCoefficients { clip, next_from_noise, ..COEFFICIENTS };
            let given = (next_from_noise != 0.0).then_some(&noise);
            let got = ops::sampler_step(&x, &output, guidance, &k, given).unwrap();

            let count = x.numel();
            let (x, noise, output) = (f64s(&x), f64s(&noise), f64s(&output));
            let f = f64::from;
            let (mut x0, mut next) = (empty(&shape), empty(&shape));
            for i in 0..count {
                let (e, size) = match guidance {
                    None => (output[i], output[i].abs()),
                    Some(w) => {
                        let (u, c) = (output[i], output[count + i]);
                        (u + f(w) * (c - u), u.abs() + f(w.abs()) * (c.abs() + u.abs()))
                    }
                };
                let clean = f(k.x0_from_x) * x[i] + f(k.x0_from_e) * e;
                let clipped = clip.map_or(clean, |c| clean.clamp(-f(c), f(c)));
                let clean_size = f(k.x0_from_x).abs() * x[i].abs() + f(k.x0_from_e).abs() * size;
                x0.values.push(clipped);
                x0.magnitudes.push(clean_size);
                next.values.push(
                    f(k.next_from_x) * x[i]
                        + f(k.next_from_e) * e
                        + f(k.next_from_x0) * clipped
                        + f(next_from_noise) * noise[i],
                );
                next.magnitudes.push(x[i].abs() + size + clean_size + noise[i].abs());
            }
            let what = format!("{dtype} {shape:?} guidance {guidance:?} clip {clip:?}");
            assert_close(&got.x0, &x0, 2.0, format!("x0 {what}"));
            assert_close(&got.next, &next, 2.0, format!("next {what}"));
        }
    }
}

fn empty(shape: &[usize]) -> Expected {
    Expected { shape: shape.to_vec(), values: Vec::new(), magnitudes: Vec::new() }
}

/// Guidance of 1 and of 0 are the conditional and the unconditional output; NaN is not clipped away.
#[test]
fn guidance_picks_and_clip_keeps_nan() {
    let device = Device::cpu();
    let tensor = |values: &[f32]| Tensor::from_f32(&device, &[values.len(), 1, 1, 1], DType::F32, values).unwrap();
    let (x, output) = (tensor(&[0.0, 0.0]), tensor(&[3.0, f32::NAN, -0.5, 0.25]));
    let k = StepCoefficients { x0_from_e: 1.0, clip: Some(1.0), ..COEFFICIENTS };
    let run = |guidance| ops::sampler_step(&x, &output, Some(guidance), &k, None).unwrap().x0.to_f32_vec().unwrap();
    assert_eq!(run(1.0)[0], -0.5);
    assert_eq!(run(0.0)[0], 1.0);
    assert!(run(1.0)[1].is_nan());
}

#[test]
fn add_noise_matches_f64() {
    let device = Device::cpu();
    for shape in [&[][..], &[7], &[2, 3, 5, 7], &[0, 3], &[1, 91, 97, 4]] {
        let mut random = Random::new(2);
        let [x0, noise] = [0, 1].map(|_| random.randn(&device, shape, DType::F32));
        let got = ops::add_noise(&x0, &noise, 0.8, 0.6).unwrap();
        let (a, b) = (f64s(&x0), f64s(&noise));
        let [signal, sigma] = [0.8f32, 0.6].map(f64::from);
        let want = Expected {
            shape: shape.to_vec(),
            values: a.iter().zip(&b).map(|(a, b)| signal * a + sigma * b).collect(),
            magnitudes: a.iter().zip(&b).map(|(a, b)| signal * a.abs() + sigma * b.abs()).collect(),
        };
        assert_close(&got, &want, 1.0, format!("{shape:?}"));
    }
}

#[test]
fn diagonal_gaussian_matches_f64() {
    let device = Device::cpu();
    for (dtype, [n, h, w, c]) in DType::FLOATS.into_iter().flat_map(|dtype| SHAPES.map(|s| (dtype, s))) {
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
            assert_close(&got, &want, 2.0, format!("{dtype} {n} {h} {w} {c} sampled {sampled}"));
        }
    }
}

#[test]
fn meta_records_what_cpu_would_do() {
    let meta = MetaDevice::default();
    let device = Device::Meta(meta.clone());
    let x = Tensor::uninit(&device, &[2, 3, 5, 4], DType::F32).unwrap();
    let output = Tensor::uninit(&device, &[4, 3, 5, 4], DType::F16).unwrap();
    let moments = Tensor::uninit(&device, &[2, 3, 5, 8], DType::BF16).unwrap();
    let noisy = StepCoefficients { next_from_noise: 1.0, ..COEFFICIENTS };
    let step = ops::sampler_step(&x, &output, Some(7.0), &noisy, Some(&x)).unwrap();
    assert_eq!((step.next.shape(), step.x0.shape()), (x.shape(), x.shape()));
    let noised = ops::add_noise(&x, &x, 1.0, 0.5).unwrap();
    let [mean, sample] = [None, Some(&x)].map(|noise| ops::diagonal_gaussian(&moments, noise).unwrap());
    assert!([&noised, &mean, &sample].iter().all(|y| y.shape() == x.shape() && y.dtype() == DType::F32));
    let records: Vec<(&str, u64)> = meta.take_report().ops.iter().map(|op| (op.op, op.work.bytes)).collect();
    // 120 elements of f32; 240 of f16; of the posterior's 240 bf16 moments the mean reads half.
    let want = [
        ("sampler_step", 4 * 480 + 480),
        ("add_noise", 3 * 480),
        ("diagonal_gaussian", 240 + 480),
        ("diagonal_gaussian", 480 + 480 + 480),
    ];
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
    let elsewhere = Tensor::zeros(&Device::cpu(), &[2, 3, 5, 4], DType::F32).unwrap();
    let noisy = StepCoefficients { next_from_noise: 0.5, ..COEFFICIENTS };
    let step = |x: &Tensor, output: &Tensor, guidance, k: &StepCoefficients, noise: Option<&Tensor>| {
        ops::sampler_step(x, output, guidance, k, noise).unwrap_err()
    };

    assert!(matches!(step(&half, &x, None, &COEFFICIENTS, None), Error::Dtype { arg: "x", .. }));
    assert!(matches!(step(&zeros(&[3], DType::F32), &x, None, &COEFFICIENTS, None), Error::Shape { arg: "x", .. }));
    assert!(matches!(step(&x, &two, None, &COEFFICIENTS, None), Error::Shape { arg: "model_output", .. }));
    assert!(matches!(step(&x, &x, Some(7.0), &COEFFICIENTS, None), Error::Shape { arg: "model_output", .. }));
    let ids = zeros(&[2, 3, 5, 4], DType::U32);
    assert!(matches!(step(&x, &ids, None, &COEFFICIENTS, None), Error::Dtype { arg: "model_output", .. }));
    assert!(matches!(step(&x, &elsewhere, None, &COEFFICIENTS, None), Error::Device { arg: "model_output", .. }));
    assert!(matches!(step(&x, &x, None, &COEFFICIENTS, Some(&x)), Error::Argument { arg: "noise", .. }));
    assert!(matches!(step(&x, &x, None, &noisy, None), Error::Argument { arg: "noise", .. }));
    assert!(matches!(step(&x, &x, None, &noisy, Some(&two)), Error::Shape { arg: "noise", .. }));
    assert!(matches!(step(&x, &x, None, &noisy, Some(&half)), Error::Dtype { arg: "noise", .. }));
    for clip in [-1.0, f32::NAN] {
        let k = StepCoefficients { clip: Some(clip), ..COEFFICIENTS };
        assert!(matches!(step(&x, &x, None, &k, None), Error::Argument { arg: "clip", .. }));
    }

    assert!(matches!(ops::add_noise(&half, &half, 1.0, 1.0).unwrap_err(), Error::Dtype { arg: "x0", .. }));
    assert!(matches!(ops::add_noise(&x, &half, 1.0, 1.0).unwrap_err(), Error::Dtype { arg: "noise", .. }));
    assert!(matches!(ops::add_noise(&x, &two, 1.0, 1.0).unwrap_err(), Error::Shape { arg: "noise", .. }));
    let gaussian = |moments: &Tensor, noise: Option<&Tensor>| ops::diagonal_gaussian(moments, noise).unwrap_err();
    assert!(matches!(gaussian(&zeros(&[1, 2, 2, 3], DType::F32), None), Error::Shape { arg: "moments", .. }));
    assert!(matches!(gaussian(&zeros(&[2, 2, 4], DType::F32), None), Error::Shape { arg: "moments", .. }));
    assert!(matches!(gaussian(&ids, None), Error::Dtype { arg: "moments", .. }));
    assert!(matches!(gaussian(&x, Some(&x)), Error::Shape { arg: "noise", .. }));
}
