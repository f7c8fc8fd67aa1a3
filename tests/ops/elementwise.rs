//! activation, add, clamp, scale_cast, embedding and timestep_embedding against plain f64 loops.

use crate::common::{Expected, Random, assert_close, cases, devices, f64s, unaligned};
use megafuse::Error;
use megafuse::ops::{self, Activation, TimestepEmbedding};
use megafuse::runtime::{DType, Device, MetaDevice, OpKind, Tensor};

/// One element; primes; off and on a task's 8192 elements; empty.
const SHAPES: [&[usize]; 6] = [&[1], &[2, 3, 5, 7], &[8192], &[3, 2731], &[0, 4], &[2, 64, 64, 4]];

fn expected(x: &Tensor, f: impl Fn(usize) -> f64, magnitude: impl Fn(usize) -> f64) -> Expected {
    let count = x.numel();
    let (values, magnitudes) = ((0..count).map(f).collect(), (0..count).map(magnitude).collect());
    Expected { shape: x.shape().to_vec(), values, magnitudes }
}

#[test]
fn activations_match_f64() {
    let quick_gelu = |x: f64| x / (1.0 + (-1.702 * x).exp());
    for (device, dtype, shape) in cases(&SHAPES) {
        let x = Random::new(1).tensor(&device, shape, dtype, 0.0, 3.0);
        let v = f64s(&x);
        for (activation, f) in [
            (Activation::None, &(|x| x) as &dyn Fn(f64) -> f64),
            (Activation::Silu, &crate::common::silu),
            (Activation::Gelu, &crate::common::gelu),
            (Activation::QuickGelu, &quick_gelu),
        ] {
            let got = ops::activation(&x, activation).unwrap();
            assert_eq!(got.dtype(), dtype);
            // The exponent is rounded before the exponential, which turns |x| roundings into relative ones; last, what
            // is left of the reference's 1 + erf where that cancels: f64's resolution.
            let roundings = |v: f64| f(v).abs() * (4.0 + 2.0 * v.abs() + v * v) + v.abs() * 1e-8;
            let want = expected(&x, |i| f(v[i]), |i| roundings(v[i]));
            assert_close(&got, &want, 2.0, format!("{device} {activation:?} {shape:?}"));
        }
    }
    for device in devices() {
        let x = [f32::NEG_INFINITY, -1e30, f32::NAN, 1e30, f32::INFINITY, 0.0, 0.0, 0.0, f32::NAN];
        let x = Tensor::from_f32(&device, &[9], DType::F32, &x).unwrap();
        for activation in [Activation::Silu, Activation::Gelu, Activation::QuickGelu] {
            let y = ops::activation(&x, activation).unwrap().to_f32_vec().unwrap();
            let passes = y[2].is_nan() && y[8].is_nan() && y[4] == f32::INFINITY && y[3] == 1e30 && y[1] == 0.0;
            assert!(passes, "{device} {activation:?} {y:?}");
        }
    }
}

#[test]
fn add_matches_f64() {
    for (device, dtype, shape) in cases(&SHAPES) {
        let mut random = Random::new(2);
        let [a, b] = [0, 1].map(|_| random.randn(&device, shape, dtype));
        let [x, y] = [f64s(&a), f64s(&b)];
        let want = expected(&a, |i| x[i] + y[i], |i| (x[i] + y[i]).abs());
        for (a, b) in [(&a, &b), (&unaligned(&a), &b), (&a, &unaligned(&b))] {
            assert_close(&ops::add(a, b).unwrap(), &want, 0.5, format!("{device} {shape:?}"));
        }
    }
}

#[test]
fn scaled_sums_match_f64() {
    for (device, dtype, shape) in cases(&SHAPES) {
        let mut random = Random::new(9);
        let [a, b] = [0, 1].map(|_| random.randn(&device, shape, dtype));
        let ([x, y], scale) = ([f64s(&a), f64s(&b)], f64::from(0.2f32));
        let want = expected(&a, |i| x[i] + scale * y[i], |i| x[i].abs() + scale * y[i].abs());
        for (a, b) in [(&a, &b), (&unaligned(&a), &b)] {
            assert_close(&ops::add_scaled(a, b, 0.2).unwrap(), &want, 1.0, format!("{device} {shape:?}"));
        }
    }
}

/// Tokens of whole vectors and others; a mask begins again with each sample.
#[test]
fn masked_sums_match_f64() {
    let shapes =
        [[1, 1, 1, 1], [2, 3, 5, 4], [2, 37, 2, 16], [3, 257, 1, 8], [0, 4, 2, 8], [2, 0, 2, 8], [2, 31, 3, 11]];
    for (device, dtype, shape) in cases(&shapes) {
        let mut random = Random::new(12);
        let [a, b] = [0, 1].map(|_| random.randn(&device, &shape, dtype));
        let mask = random.randn(&device, &[shape[1]], DType::F32);
        let ([x, y, m], scale) = ([f64s(&a), f64s(&b), f64s(&mask)], f64::from(0.7f32));
        let row = shape[2] * shape[3];
        let factor = |i: usize| scale * m[i / row % shape[1]];
        let want = expected(&a, |i| x[i] + factor(i) * y[i], |i| x[i].abs() + 2.0 * (factor(i) * y[i]).abs());
        for (a, b) in [(&a, &b), (&unaligned(&a), &b), (&a, &unaligned(&b))] {
            assert_close(&ops::add_masked(a, b, &mask, 0.7).unwrap(), &want, 1.0, format!("{device} {shape:?}"));
        }
    }
    let zeros = |shape: &[usize], dtype| Tensor::zeros(&Device::cpu(), shape, dtype).unwrap();
    let (a, mask) = (zeros(&[2, 3, 4], DType::F16), zeros(&[3], DType::F32));
    let fails = |b: &Tensor, mask: &Tensor| ops::add_masked(&a, b, mask, 1.0).unwrap_err();
    assert!(matches!(fails(&zeros(&[2, 3, 5], DType::F16), &mask), Error::Shape { arg: "b", .. }));
    assert!(matches!(fails(&a, &zeros(&[4], DType::F32)), Error::Shape { arg: "mask", .. }));
    assert!(matches!(fails(&a, &zeros(&[3], DType::F16)), Error::Dtype { arg: "mask", .. }));
    let line = zeros(&[3], DType::F32);
    assert!(matches!(ops::add_masked(&line, &line, &mask, 1.0).unwrap_err(), Error::Shape { arg: "a", .. }));
}

/// Rows of whole 16 bytes and others, and addresses that are not.
#[test]
fn concat_puts_rows_side_by_side() {
    let sizes = [([2, 3, 5, 4], 7), ([1, 9, 31, 8], 16), ([2, 1, 1, 0], 3), ([2, 2, 3, 5], 0), ([0, 2, 2, 8], 8)];
    for (device, dtype, (shape, of_b)) in cases(&sizes) {
        let mut random = Random::new(10);
        let [n, h, w, of_a] = shape;
        let (a, b) = (random.randn(&device, &shape, dtype), random.randn(&device, &[n, h, w, of_b], dtype));
        let (x, y, c) = (f64s(&a), f64s(&b), of_a + of_b);
        let at = |i: usize| match i % c {
            channel if channel < of_a => x[i / c * of_a + channel],
            channel => y[i / c * of_b + channel - of_a],
        };
        let values: Vec<f64> = (0..n * h * w * c).map(at).collect();
        let want = Expected { shape: vec![n, h, w, c], magnitudes: vec![0.0; values.len()], values };
        for (a, b) in [(&a, &b), (&unaligned(&a), &b), (&a, &unaligned(&b))] {
            assert_close(&ops::concat(a, b).unwrap(), &want, 0.0, format!("{device} {shape:?} {of_b}"));
        }
    }
    let zeros = |shape: &[usize], dtype| Tensor::zeros(&Device::cpu(), shape, dtype).unwrap();
    let a = zeros(&[2, 3, 4], DType::F32);
    let fails = |b: Tensor| ops::concat(&a, &b).unwrap_err();
    assert!(matches!(fails(zeros(&[2, 4, 4], DType::F32)), Error::Shape { arg: "b", .. }));
    assert!(matches!(fails(zeros(&[2, 3, 4], DType::F16)), Error::Dtype { arg: "b", .. }));
    assert!(matches!(fails(zeros(&[], DType::F32)), Error::Shape { arg: "b", .. }));
}

#[test]
fn clamp_is_exact_and_keeps_nan() {
    for (device, dtype, shape) in cases(&SHAPES) {
        let x = Random::new(3).randn(&device, shape, dtype);
        let v = f64s(&x);
        let want = expected(&x, |i| v[i].clamp(-0.5, 0.75), |_| 0.0);
        for x in [&x, &unaligned(&x)] {
            assert_close(&ops::clamp(x, -0.5, 0.75).unwrap(), &want, 0.0, format!("{device} {shape:?}"));
        }
    }
    for device in devices() {
        let values = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY].repeat(3);
        let x = Tensor::from_f32(&device, &[9], DType::F16, &values).unwrap();
        let y = ops::clamp(&x, -1.0, 1.0).unwrap().to_f32_vec().unwrap();
        assert!(y.chunks_exact(3).all(|y| y[0].is_nan() && y[1..] == [1.0, -1.0]), "{device} {y:?}");
    }
}

#[test]
fn scale_cast_repeats_the_batch() {
    for (device, from, shape) in cases(&SHAPES) {
        let repeats = if shape.len() == 1 { 1 } else { shape.len() };
        for (to, shift) in DType::FLOATS.into_iter().flat_map(|to| [(to, false), (to, true)]) {
            let x = Random::new(4).randn(&device, shape, from);
            let x = if shift { unaligned(&x) } else { x };
            let v = f64s(&x);
            let got = ops::scale_cast(&x, 0.18215, -0.5, to, repeats).unwrap();
            assert_eq!(got.dtype(), to);
            let (scale, count) = (f64::from(0.18215f32), v.len());
            let values: Vec<f64> = (0..repeats * count).map(|i| scale * v[i % count] - 0.5).collect();
            let magnitudes = (0..repeats * count).map(|i| scale * v[i % count].abs() + 0.5).collect();
            let mut shape = shape.to_vec();
            shape[0] *= repeats;
            assert_close(&got, &Expected { shape, values, magnitudes }, 1.0, format!("{device} {from} {to} {repeats}"));
        }
    }
}

#[test]
fn values_that_are_not_finite_are_counted() {
    for (device, dtype, shape) in cases(&SHAPES) {
        let mut values = Random::new(7).randn(&Device::cpu(), shape, DType::F32).to_f32_vec().unwrap();
        let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -f32::NAN];
        let mut count = 0;
        let ends = (0..values.len()).filter(|i| i % 97 == 0 || i + 2 > shape.iter().product::<usize>());
        for (i, bad) in ends.collect::<Vec<_>>().into_iter().zip(bad.into_iter().cycle()) {
            (values[i], count) = (bad, count + 1);
        }
        let x = Tensor::from_f32(&device, shape, dtype, &values).unwrap();
        assert_eq!(ops::count_non_finite(&x).unwrap(), count, "{device} {dtype} {shape:?}");
        assert_eq!(ops::count_non_finite(&unaligned(&x)).unwrap(), count, "{device} {dtype} {shape:?}");
    }
    for device in devices() {
        let largest = Tensor::from_f32(&device, &[2], DType::F32, &[f32::MAX, f32::MIN]).unwrap();
        assert_eq!(ops::count_non_finite(&largest).unwrap(), 0);
    }
}

#[test]
fn embedding_adds_token_and_position() {
    for (device, dtype) in devices().into_iter().flat_map(|device| DType::FLOATS.map(|dtype| (device.clone(), dtype))) {
        for ([n, l, v, p, c], shift) in [
            ([1, 1, 1, 1, 1], false),
            ([2, 7, 11, 7, 5], false),
            ([3, 77, 49, 77, 64], false),
            ([1, 3, 5, 3, 1032], false),
            ([1, 3, 5, 3, 261], false),
            ([1, 5, 3, 9, 8], true),
            ([0, 4, 3, 4, 2], false),
        ] {
            let mut random = Random::new(5);
            let [table, positions] = [v, p].map(|rows| random.randn(&device, &[rows, c], dtype));
            let table = if shift { unaligned(&table) } else { table };
            let ids: Vec<u32> = (0..n * l).map(|i| (i * i + 3 * i) as u32 % v as u32).collect();
            let ids = Tensor::from_u32(&device, &[n, l], &ids).unwrap();
            let got = ops::embedding(&ids, &table, &positions).unwrap();
            assert_eq!((got.shape(), got.dtype()), ([n, l, c].as_slice(), dtype));
            let (ids, table, positions) = (f64s(&ids), f64s(&table), f64s(&positions));
            let value = |i: usize| table[ids[i / c] as usize * c + i % c] + positions[i / c % l * c + i % c];
            let want = expected(&got, value, |i| value(i).abs());
            assert_close(&got, &want, 0.5, format!("{device} {n} {l} {v} {p} {c}"));
        }
    }
}

#[test]
fn timestep_embedding_matches_f64() {
    devices().iter().for_each(timestep_embedding_on);
}

fn timestep_embedding_on(device: &Device) {
    let timesteps = [0.0, 1.0, 21.0, 181.0, 250.25, 501.0, 981.0, 999.0];
    for (dtype, dim, flip_sin_to_cos, freq_shift) in DType::FLOATS.into_iter().flat_map(|dtype| {
        [(2, true, 0.0), (3, false, 0.0), (5, true, 0.0), (32, false, 1.0), (128, true, 1.0), (320, true, 0.0)]
            .map(|(dim, flip, shift)| (dtype, dim, flip, shift))
    }) {
        let e = TimestepEmbedding { dim, flip_sin_to_cos, freq_shift };
        let got = ops::timestep_embedding(&timesteps, e, device, dtype).unwrap();
        let half = dim / 2;
        let phase = |i: usize| {
            let j = (i % dim % half) as f64;
            f64::from(timesteps[i / dim]) * (-(10000f64.ln()) * j / (half as f64 - freq_shift)).exp()
        };
        let value = |i: usize| match i % dim {
            column if column == 2 * half => 0.0,
            column if (column < half) == flip_sin_to_cos => phase(i).cos(),
            _ => phase(i).sin(),
        };
        // f32 phases: the exponent, up to 9.2, the exponential and the product round; one more for the result.
        let want = Expected {
            shape: vec![timesteps.len(), dim],
            values: (0..timesteps.len() * dim).map(value).collect(),
            magnitudes: (0..timesteps.len() * dim)
                .map(|i| if i % dim == 2 * half { 0.0 } else { 1.0 + 16.0 * phase(i) })
                .collect(),
        };
        assert_close(&got, &want, 1.0, format!("{e:?}"));
    }
    assert_eq!(
        ops::timestep_embedding(
            &[],
            TimestepEmbedding { dim: 4, flip_sin_to_cos: true, freq_shift: 0.0 },
            device,
            DType::F32
        )
        .unwrap()
        .shape(),
        [0, 4]
    );
}

/// diffusers' get_timestep_embedding in f32, as it prints: the phases' roundings are part of what the models learned.
#[test]
fn timestep_embedding_has_torchs_roundings() {
    let device = Device::cpu();
    let check = |timesteps: &[f32], e: TimestepEmbedding, want: &[f64]| {
        let got = f64s(&ops::timestep_embedding(timesteps, e, &device, DType::F32).unwrap());
        assert_eq!(got.len(), want.len());
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            assert!((got - want).abs() < 1e-6, "{e:?} element {i}: {got}, not {want}");
        }
    };
    #[rustfmt::skip]
    let want = [
        0.67995721, -0.030819386, 0.88179862, -0.72218603, 0.81447697, 0.73325181, -0.99952495, -0.4716261, -0.69169891,
        0.5801959, 0.54030234, 0.98746681, 0.99968451, 0.99999207, 0.99999982, 0.84147096, 0.15782663, 0.025116224,
        0.0039810613, 0.00063095731, 0.47360903, -0.38207889, 0.99999607, 0.5434429, 0.98756015, -0.88073522, 0.92412972,
        0.0028106493, 0.83944613, 0.15724181,
    ];
    check(&[981.0, 1.0, 250.25], TimestepEmbedding { dim: 10, flip_sin_to_cos: true, freq_shift: 0.0 }, &want);
    let want = [0.73325181, -0.37576443, 0.097942725, 0.67995721, -0.9267152, 0.99519205, 0.0];
    check(&[981.0], TimestepEmbedding { dim: 7, flip_sin_to_cos: false, freq_shift: 1.0 }, &want);
}

#[test]
fn meta_records_what_cpu_would_do() {
    let meta = MetaDevice::default();
    let device = Device::Meta(meta.clone());
    let x = Tensor::uninit(&device, &[2, 3, 5, 4], DType::F16).unwrap();
    let ids = Tensor::uninit(&device, &[2, 7], DType::U32).unwrap();
    let table = Tensor::uninit(&device, &[11, 6], DType::F32).unwrap();
    let mask = Tensor::uninit(&device, &[3], DType::F32).unwrap();
    let e = TimestepEmbedding { dim: 8, flip_sin_to_cos: true, freq_shift: 0.0 };
    let calls = [
        ("activation", ops::activation(&x, Activation::Gelu), vec![2, 3, 5, 4], 2 * 240, 1),
        ("add", ops::add(&x, &x), vec![2, 3, 5, 4], 3 * 240, 1),
        ("add_masked", ops::add_masked(&x, &x, &mask, 0.5), vec![2, 3, 5, 4], 3 * 240 + 12, 1),
        ("clamp", ops::clamp(&x, 0.0, 1.0), vec![2, 3, 5, 4], 2 * 240, 1),
        ("scale_cast", ops::scale_cast(&x, 2.0, 0.0, DType::F32, 3), vec![6, 3, 5, 4], 240 + 3 * 480, 1),
        ("embedding", ops::embedding(&ids, &table, &table), vec![2, 7, 6], 56 + 2 * 336 + 168, 1),
        // On the host, then uploaded.
        ("timestep_embedding", ops::timestep_embedding(&[1.0; 5], e, &device, DType::BF16), vec![5, 8], 20 + 80, 0),
    ];
    let report = meta.take_report();
    assert_eq!(ops::count_non_finite(&x).unwrap(), 0);
    let counted = meta.take_report().ops.remove(0);
    assert_eq!((counted.op, counted.work.bytes, counted.work.launches), ("count_non_finite", 240, 1));
    assert_eq!(report.ops.len(), calls.len());
    let mut records = report.ops.iter();
    for (op, y, shape, bytes, launches) in calls {
        let y = y.unwrap();
        let record = records.next().unwrap();
        assert_eq!((record.op, record.kind), (op, OpKind::Elementwise));
        assert_eq!((y.shape(), record.output.as_slice()), (shape.as_slice(), shape.as_slice()), "{op}");
        assert_eq!((record.work.macs, record.work.launches, record.work.bytes), (0, launches, bytes), "{op}");
        assert!(launches == 0 || record.work.flops >= y.numel() as u64, "{op}");
    }
}

#[test]
fn rows_are_those_of_a_first_dimension() {
    let device = Device::cpu();
    let number = Tensor::from_f32(&device, &[], DType::F32, &[7.0]).unwrap();
    let table = Tensor::from_f32(&device, &[3, 2], DType::F32, &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]).unwrap();
    assert_eq!(table.rows(1..3).unwrap().to_f32_vec().unwrap(), [2.0, 3.0, 4.0, 5.0]);
    assert_eq!(table.rows(3..3).unwrap().shape(), [0, 2]);
    for range in [0..0, 0..1] {
        let error = number.rows(range).unwrap_err();
        assert!(matches!(error, Error::Shape { op: "rows", .. }), "{error}");
    }
    assert!(matches!(table.rows(2..4).unwrap_err(), Error::Argument { op: "rows", .. }));
}

#[test]
fn errors_name_the_argument() {
    let device = Device::cpu();
    let zeros = |shape: &[usize], dtype| Tensor::zeros(&device, shape, dtype).unwrap();
    let x = zeros(&[2, 3], DType::F32);
    let ids = zeros(&[2, 3], DType::U32);
    let elsewhere = Tensor::zeros(&Device::cpu(), &[2, 3], DType::F32).unwrap();

    assert!(matches!(ops::activation(&ids, Activation::Silu).unwrap_err(), Error::Dtype { arg: "x", .. }));
    assert!(matches!(ops::activation(&x, Activation::Geglu).unwrap_err(), Error::Argument { arg: "activation", .. }));
    assert!(matches!(ops::add(&x, &zeros(&[3, 2], DType::F32)).unwrap_err(), Error::Shape { arg: "b", .. }));
    assert!(matches!(ops::add(&x, &zeros(&[2, 3], DType::F16)).unwrap_err(), Error::Dtype { arg: "b", .. }));
    assert!(matches!(ops::add(&x, &elsewhere).unwrap_err(), Error::Device { arg: "b", .. }));
    assert!(matches!(ops::add(&ids, &ids).unwrap_err(), Error::Dtype { arg: "a", .. }));
    assert!(matches!(ops::clamp(&x, 1.0, 0.0).unwrap_err(), Error::Argument { .. }));
    assert!(matches!(ops::clamp(&x, f32::NAN, 0.0).unwrap_err(), Error::Argument { .. }));
    assert!(matches!(ops::clamp(&ids, 0.0, 1.0).unwrap_err(), Error::Dtype { arg: "x", .. }));
    let cast = |x: &Tensor, dtype, repeats| ops::scale_cast(x, 1.0, 0.0, dtype, repeats).unwrap_err();
    assert!(matches!(cast(&x, DType::F32, 0), Error::Argument { arg: "repeats", .. }));
    assert!(matches!(cast(&x, DType::U32, 1), Error::Dtype { arg: "dtype", .. }));
    assert!(matches!(cast(&ids, DType::F32, 1), Error::Dtype { arg: "x", .. }));
    assert!(matches!(cast(&zeros(&[], DType::F32), DType::F32, 2), Error::Shape { arg: "x", .. }));
    assert!(matches!(cast(&x, DType::F32, usize::MAX), Error::TooLarge { .. }));

    let table = zeros(&[5, 4], DType::F32);
    let embed = |ids: &Tensor, table: &Tensor, positions: &Tensor| ops::embedding(ids, table, positions).unwrap_err();
    assert!(matches!(embed(&zeros(&[3], DType::U32), &table, &table), Error::Shape { arg: "ids", .. }));
    assert!(matches!(embed(&x, &table, &table), Error::Dtype { arg: "ids", .. }));
    assert!(matches!(embed(&ids, &zeros(&[5], DType::F32), &table), Error::Shape { arg: "table", .. }));
    assert!(matches!(embed(&ids, &zeros(&[5, 4], DType::U32), &table), Error::Dtype { arg: "table", .. }));
    assert!(matches!(embed(&ids, &table, &zeros(&[5, 3], DType::F32)), Error::Shape { arg: "positions", .. }));
    assert!(matches!(embed(&ids, &table, &zeros(&[2, 4], DType::F32)), Error::Shape { arg: "positions", .. }));
    assert!(matches!(embed(&ids, &table, &zeros(&[5, 4], DType::F16)), Error::Dtype { arg: "positions", .. }));
    for device in devices() {
        let beyond = Tensor::from_u32(&device, &[1, 2], &[0, 5]).unwrap();
        let table = Tensor::zeros(&device, &[5, 4], DType::F32).unwrap();
        let error = embed(&beyond, &table, &table);
        assert!(matches!(error, Error::Argument { arg: "ids", .. }) && error.to_string().contains("is 5,"), "{error}");
    }
    assert!(matches!(ops::count_non_finite(&ids).unwrap_err(), Error::Dtype { arg: "x", .. }));

    let sinusoid = |dim, freq_shift, dtype| {
        let e = TimestepEmbedding { dim, flip_sin_to_cos: true, freq_shift };
        ops::timestep_embedding(&[1.0], e, &device, dtype).unwrap_err()
    };
    assert!(matches!(sinusoid(1, 0.0, DType::F32), Error::Argument { arg: "dim", .. }));
    assert!(matches!(sinusoid(2, 1.0, DType::F32), Error::Argument { arg: "freq_shift", .. }));
    assert!(matches!(sinusoid(8, f64::NAN, DType::F32), Error::Argument { arg: "freq_shift", .. }));
    assert!(matches!(sinusoid(8, 0.0, DType::U32), Error::Dtype { arg: "dtype", .. }));
}
