//! rms_norm against plain f64 loops.

use crate::common::{Expected, Random, assert_close, cards, cases, f64s, unaligned};
use megafuse::Error;
use megafuse::ops::{self, RmsNorm};
use megafuse::runtime::{DType, Device, OpKind, Tensor};

/// One element; primes; one off a warp, one off a block of 8 rows; empty; one off the width where a row gets a block of
/// its own, with and without vectors; a row shorter than a block's vectors; SD3's heads, T5's width.
const SHAPES: [&[usize]; 16] = [
    &[1],
    &[5, 1],
    &[2, 3, 7],
    &[1, 31],
    &[7, 33],
    &[9, 264],
    &[8, 256],
    &[0, 8],
    &[3, 0],
    &[2, 1024],
    &[3, 1025],
    &[1, 1032],
    &[2, 2047],
    &[1, 2, 2056],
    &[2, 5, 24, 64],
    &[2, 7, 4096],
];

fn expected(args: &RmsNorm) -> Expected {
    let (x, gamma) = (f64s(args.x), f64s(args.gamma));
    let c = gamma.len();
    let mut values = Vec::new();
    for row in x.chunks_exact(c.max(1)) {
        let mean_square = row.iter().map(|x| x * x).sum::<f64>() / c as f64;
        let scale = 1.0 / (mean_square + f64::from(args.eps)).sqrt();
        values.extend(row.iter().zip(&gamma).map(|(x, gamma)| x * scale * gamma));
    }
    let magnitudes = values.iter().map(|value: &f64| value.abs()).collect();
    Expected { shape: args.x.shape().to_vec(), values, magnitudes }
}

/// Squares do not cancel: a sum of n of them one after the other errs by at most n/2 F32_EPS, its root by half of that.
/// The longest chain has a 16th of the row. 4: joining the chains, the mean, root, quotient and two products.
fn f32_eps(c: usize) -> f64 {
    4.0 + c as f64 / 64.0
}

#[test]
fn matches_f64() {
    for (device, dtype, shape) in cases(&SHAPES) {
        for (mean, eps) in [(0.0, 1e-6), (100.0, 0.0), (0.0, 2.0)] {
            let mut random = Random::new(21);
            let c = shape[shape.len() - 1];
            let x = random.tensor(&device, shape, dtype, mean, 2.0);
            let gamma = random.tensor(&device, &[c], dtype, 1.0, 0.5);
            let args = RmsNorm { x: &x, gamma: &gamma, eps };
            let what = format!("{device} {shape:?} mean {mean} eps {eps}");
            assert_close(&ops::rms_norm(args).unwrap(), &expected(&args), f32_eps(c), what);
        }
    }
}

/// Each tensor alone, and all of them.
#[test]
fn tensors_may_begin_at_any_element() {
    for (device, dtype, c) in cases(&[64, 1056]) {
        let mut random = Random::new(22);
        let (x, gamma) = (random.randn(&device, &[3, c], dtype), random.tensor(&device, &[c], dtype, 1.0, 0.5));
        let [shifted_x, shifted_gamma] = [&x, &gamma].map(unaligned);
        for (x, gamma) in [(&shifted_x, &gamma), (&x, &shifted_gamma), (&shifted_x, &shifted_gamma)] {
            let args = RmsNorm { x, gamma, eps: 1e-6 };
            assert_close(&ops::rms_norm(args).unwrap(), &expected(&args), f32_eps(c), format!("{device} {c}"));
        }
    }
}

#[test]
fn a_row_does_not_depend_on_the_others() {
    for (device, dtype, c) in cases(&[24, 1500]) {
        let (x, gamma) = {
            let mut random = Random::new(23);
            (random.randn(&device, &[11, c], dtype), random.randn(&device, &[c], dtype))
        };
        let run = |x: &Tensor| ops::rms_norm(RmsNorm { x, gamma: &gamma, eps: 1e-6 }).unwrap().to_f32_vec().unwrap();
        let all = run(&x);
        for (row, all) in all.chunks_exact(c).enumerate() {
            for (i, (one, all)) in run(&x.rows(row..row + 1).unwrap()).into_iter().zip(all).enumerate() {
                let bits = [one, *all].map(f32::to_bits);
                assert_eq!(
                    bits[0], bits[1],
                    "{device} {dtype} {c}: row {row}, element {i} is {one} alone, {all} among 11"
                );
            }
        }
    }
}

/// As the formula says: NaN spoils its row, an infinity is NaN in its own place; both touch no other row.
#[test]
fn a_value_that_is_not_finite_is_seen_in_its_row() {
    for (device, dtype, c) in cases(&[40, 1100]) {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, c - 1] {
                let mut values: Vec<f32> = (0..3 * c).map(|i| (i * 37 % 101) as f32 - 50.0).collect();
                values[c + at] = bad;
                let x = Tensor::from_f32(&device, &[3, c], dtype, &values).unwrap();
                let gamma = Tensor::from_f32(&device, &[c], dtype, &vec![1.0; c]).unwrap();
                let y = ops::rms_norm(RmsNorm { x: &x, gamma: &gamma, eps: 1e-6 }).unwrap().to_f32_vec().unwrap();
                for (i, y) in y.into_iter().enumerate() {
                    let spoiled = i / c == 1 && (bad.is_nan() || i % c == at);
                    assert_eq!(y.is_nan(), spoiled, "{device} {dtype} {bad} at {at}: element {i} is {y}");
                    assert!(spoiled || i / c != 1 || y == 0.0, "{device} {dtype} {bad} at {at}: element {i} is {y}");
                }
            }
        }
    }
}

#[test]
fn meta_records_one_pass_over_the_operands() {
    let device = Device::meta();
    let zeros = |shape: &[usize]| Tensor::zeros(&device, shape, DType::BF16).unwrap();
    let (x, gamma) = (zeros(&[2, 77, 4096]), zeros(&[4096]));
    let Device::Meta(meta) = &device else { unreachable!() };
    meta.take_report();
    assert_eq!(ops::rms_norm(RmsNorm { x: &x, gamma: &gamma, eps: 1e-6 }).unwrap().shape(), x.shape());
    let report = meta.take_report();
    let [op] = &report.ops[..] else { panic!("{:?}", report.ops) };
    let (work, values) = (op.work, 2 * 77 * 4096);
    assert_eq!((op.op, op.kind), ("rms_norm", OpKind::Norm));
    assert_eq!((work.macs, work.flops, work.bytes, work.launches), (0, 4 * values, 2 * (2 * values + 4096), 1));
}

/// Short rows share a block, long ones have one each.
#[test]
fn one_launch_of_the_kernel_for_the_length() {
    for device in cards() {
        let Device::Cuda(cuda) = &device else { unreachable!() };
        for (c, kernel) in [(1024, "rms_norm_bf16"), (1025, "rms_norm_wide_bf16")] {
            let (x, gamma) = (zeros(&device, &[3, c], DType::BF16), zeros(&device, &[c], DType::BF16));
            let run = || ops::rms_norm(RmsNorm { x: &x, gamma: &gamma, eps: 1e-6 }).map(drop);
            assert_eq!(cuda.capture(1 << 20, run).unwrap().kernels(), [kernel], "{c}");
        }
    }
}

#[test]
fn arguments_that_do_not_fit_are_named() {
    let device = Device::cpu();
    let f = DType::F32;
    let (x, gamma) = (zeros(&device, &[4, 6], f), zeros(&device, &[6], f));
    let ok = RmsNorm { x: &x, gamma: &gamma, eps: 1e-6 };
    assert!(ops::rms_norm(ok).is_ok());
    let fails = |args: RmsNorm, expected: &str| {
        let error = ops::rms_norm(args).unwrap_err();
        assert!(error.to_string().contains(expected), "{error} does not contain {expected}");
        error
    };
    fails(RmsNorm { x: &zeros(&device, &[], f), ..ok }, "rms_norm: x has shape []");
    fails(RmsNorm { x: &zeros(&device, &[4, 6], DType::U32), ..ok }, "x is u32");
    fails(RmsNorm { gamma: &zeros(&device, &[4], f), ..ok }, "gamma has shape [4], expected [6]");
    fails(RmsNorm { gamma: &zeros(&device, &[6], DType::F16), ..ok }, "gamma is f16, expected f32");
    fails(RmsNorm { eps: -1.0, ..ok }, "eps is -1");
    fails(RmsNorm { eps: f32::NAN, ..ok }, "eps is NaN");
    let elsewhere = zeros(&Device::cpu(), &[6], f);
    assert!(matches!(fails(RmsNorm { gamma: &elsewhere, ..ok }, "gamma"), Error::Device { .. }));
}

/// N, L, parts, heads, head_dim: one element; primes; a quarter of a warp a row, one off it and a warp; rows that end inside a block
/// and at its edge, of 32 rows and of 8; empty; SD3.5's heads.
const HEADS: [[usize; 5]; 10] = [
    [1, 1, 2, 1, 1],
    [2, 3, 3, 5, 7],
    [1, 16, 3, 1, 64],
    [1, 11, 3, 3, 64],
    [2, 3, 2, 3, 65],
    [1, 4, 3, 1, 72],
    [2, 9, 2, 5, 40],
    [2, 0, 3, 2, 8],
    [1, 5, 3, 24, 64],
    [1, 2, 3, 2, 300],
];

#[test]
fn queries_and_keys_of_a_fused_projection_match_f64() {
    for (device, dtype, shape) in cases(&HEADS) {
        let [n, l, parts, heads, c] = shape;
        for shift in [false, true] {
            let mut random = Random::new(24);
            let x = random.tensor(&device, &shape, dtype, 0.5, 2.0);
            let gammas = [0, 1].map(|_| random.tensor(&device, &[c], dtype, 1.0, 0.5));
            let (x, gammas) = if shift { (unaligned(&x), gammas.each_ref().map(unaligned)) } else { (x, gammas) };
            let gammas: Vec<&Tensor> = gammas.iter().take(parts - 1).collect();
            let all = x.reshape(&[n * l * parts, heads, c]).unwrap();
            let mut want = Expected { shape: shape.to_vec(), values: Vec::new(), magnitudes: Vec::new() };
            for row in 0..n * l * parts {
                let part = all.rows(row..row + 1).unwrap();
                let of_part = match gammas.get(row % parts) {
                    Some(gamma) => expected(&RmsNorm { x: &part, gamma, eps: 1e-6 }),
                    None => {
                        let values = f64s(&part);
                        let magnitudes = vec![0.0; values.len()];
                        Expected { shape: Vec::new(), values, magnitudes }
                    }
                };
                want.values.extend(of_part.values);
                want.magnitudes.extend(of_part.magnitudes);
            }
            drop(all);
            let mut got = x;
            ops::rms_norm_heads(&mut got, &gammas, 1e-6).unwrap();
            assert_close(&got, &want, f32_eps(c), format!("{device} {shape:?} shifted {shift}"));
        }
    }
}

/// The same memory, and no more of it.
#[test]
fn heads_take_no_memory() {
    let device = Device::meta();
    let (mut x, gamma) = (zeros(&device, &[1, 5, 3, 2, 8], DType::F16), zeros(&device, &[8], DType::F16));
    let Device::Meta(meta) = &device else { unreachable!() };
    meta.take_report();
    ops::rms_norm_heads(&mut x, &[&gamma, &gamma], 1e-6).unwrap();
    let report = meta.take_report();
    assert_eq!(report.peak_bytes, x.bytes() + gamma.bytes());
    let work = report.of(OpKind::Norm);
    assert_eq!((work.flops, work.bytes, work.launches), (4 * 160, 2 * 2 * 160 + 2 * 16, 1));
}

#[test]
fn a_heads_value_that_is_not_finite_stays_in_its_row() {
    for (device, dtype, c) in cases(&[16, 72]) {
        for at in [0, 3 * 2 * c, 2 * 2 * c] {
            let mut values = vec![1.0; 2 * 3 * 2 * c];
            values[at] = f32::NAN;
            let x = Tensor::from_f32(&device, &[1, 2, 3, 2, c], dtype, &values).unwrap();
            let gamma = Tensor::from_f32(&device, &[c], dtype, &vec![1.0; c]).unwrap();
            let mut x = x;
            ops::rms_norm_heads(&mut x, &[&gamma, &gamma], 0.0).unwrap();
            for (i, y) in x.to_f32_vec().unwrap().into_iter().enumerate() {
                let spoiled = i == at || i / c == at / c && at % (3 * 2 * c) < 2 * 2 * c;
                assert_eq!(y.is_nan(), spoiled, "{device} {dtype} {c} at {at}: element {i} is {y}");
            }
        }
    }
}

#[test]
fn arguments_of_heads_that_do_not_fit_are_named() {
    let device = Device::cpu();
    let zeros = |shape: &[usize]| zeros(&device, shape, DType::F32);
    let (three, gamma) = (zeros(&[1, 2, 3, 2, 8]), zeros(&[8]));
    let fails = |x: &Tensor, gammas: &[&Tensor], expected: &str| {
        let error = ops::rms_norm_heads(&mut x.duplicate().unwrap(), gammas, 1e-6).unwrap_err().to_string();
        assert!(error.contains(expected), "{error} does not contain {expected}");
    };
    fails(&three, &[&gamma], "number of gammas is 1, expected 2: one for each of 3 parts but the last");
    fails(&zeros(&[1, 2, 4, 2, 8]), &[&gamma], "x has shape [1, 2, 4, 2, 8], expected [N, L, 2 or 3, heads, head_dim]");
    fails(&three, &[&gamma, &zeros(&[7])], "gamma has shape [7], expected [8]");
    let mut held = three.clone();
    let error = ops::rms_norm_heads(&mut held, &[&gamma, &gamma], 1e-6).unwrap_err().to_string();
    assert!(error.contains("x is shared, expected a tensor that nobody else holds"), "{error}");
    drop(held);
    let mut three = three;
    assert!(
        ops::rms_norm_heads(&mut three, &[&gamma, &gamma], f32::NAN).unwrap_err().to_string().contains("eps is NaN")
    );
}

fn zeros(device: &Device, shape: &[usize], dtype: DType) -> Tensor {
    Tensor::zeros(device, shape, dtype).unwrap()
}
