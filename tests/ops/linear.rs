//! linear against plain f64 loops.

use crate::common::{Random, assert_close};
use megafuse::Error;
use megafuse::ops::{self, Activation, Linear};
use megafuse::runtime::{DType, Device, OpKind, Tensor};

/// Leading dimensions, K, rows of the weight: one element; primes; one off a tile (14 rows, 32 columns, 256 k); empty
/// batch, no columns, nothing to sum; models' widths.
const SHAPES: [(&[usize], usize, usize); 14] = [
    (&[1], 1, 2),
    (&[], 5, 2),
    (&[2, 3], 7, 10),
    (&[13], 31, 34),
    (&[15], 33, 30),
    (&[14], 256, 32),
    (&[29], 257, 66),
    (&[2], 1021, 16),
    (&[0, 77], 64, 64),
    (&[3], 4, 0),
    (&[3], 0, 4),
    (&[2, 77], 768, 48),
    (&[2], 320, 1280),
    (&[5, 3], 600, 322),
];

const ACTIVATIONS: [Activation; 5] =
    [Activation::None, Activation::Silu, Activation::Gelu, Activation::QuickGelu, Activation::Geglu];

struct Inputs {
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
}

impl Inputs {
    fn new(device: &Device, dtype: DType, leading: &[usize], k: usize, rows: usize, n: usize) -> Inputs {
        let mut random = Random::new(7);
        Inputs {
            x: random.randn(device, &[leading, &[k]].concat(), dtype),
            weight: random.tensor(device, &[rows, k], dtype, 0.0, 1.0 / (k.max(1) as f64).sqrt()),
            bias: random.randn(device, &[rows], dtype),
            residual: random.randn(device, &[leading, &[n]].concat(), dtype),
        }
    }
}

#[test]
fn linear_matches_f64() {
    let device = Device::cpu();
    for (dtype, &(leading, k, rows)) in DType::FLOATS.into_iter().flat_map(|d| SHAPES.iter().map(move |s| (d, s))) {
        for activation in ACTIVATIONS {
            let n = if activation == Activation::Geglu { rows / 2 } else { rows };
            let inputs = Inputs::new(&device, dtype, leading, k, rows, n);
            let alone = [(false, false), (true, true), (true, false), (false, true)];
            for &(bias, residual) in if activation == Activation::None { &alone[..] } else { &alone[..2] } {
                let args = Linear {
                    bias: bias.then_some(&inputs.bias),
                    activation,
                    residual: residual.then_some(&inputs.residual),
                    ..Linear::new(&inputs.x, &inputs.weight)
                };
                let what = format!("{leading:?} {k} {rows} {activation:?} bias {bias} residual {residual}");
                // 8: a chain of products (see the engine), and the activation's own few ulp.
                assert_close(&ops::linear(args).unwrap(), &crate::common::linear(&args), 8.0, what);
            }
        }
    }
}

/// An image depends on its own seed only: a row's sums are the same in any batch and on any number of threads.
#[test]
fn a_row_does_not_depend_on_the_others_or_on_the_threads() {
    let device = Device::cpu();
    let inputs = Inputs::new(&device, DType::F32, &[1100], 700, 96, 96);
    let run = |x: &Tensor| ops::linear(Linear { bias: Some(&inputs.bias), ..Linear::new(x, &inputs.weight) }).unwrap();
    let all = run(&inputs.x).to_f32_vec().unwrap();
    for rows in [0..1, 5..19, 1000..1100] {
        let some = run(&inputs.x.rows(rows.clone()).unwrap()).to_f32_vec().unwrap();
        assert_eq!(some, all[rows.start * 96..rows.end * 96], "rows {rows:?}");
    }
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        assert_eq!(pool.install(|| run(&inputs.x)).to_f32_vec().unwrap(), all, "{threads} threads");
    }
}

#[test]
fn nan_and_infinity_reach_the_result() {
    let device = Device::cpu();
    let x = Tensor::from_f32(&device, &[2, 2], DType::F32, &[f32::NAN, 1.0, f32::INFINITY, 1.0]).unwrap();
    let weight = Tensor::from_f32(&device, &[1, 2], DType::F32, &[1.0, 1.0]).unwrap();
    for activation in [Activation::None, Activation::Silu, Activation::Gelu, Activation::QuickGelu] {
        let y = ops::linear(Linear { activation, ..Linear::new(&x, &weight) }).unwrap().to_f32_vec().unwrap();
        assert!(y[0].is_nan() && y[1] == f32::INFINITY, "{activation:?}: {y:?}");
    }
}

#[test]
fn meta_records_the_fused_kernel() {
    let device = Device::meta();
    let zeros = |shape: &[usize]| Tensor::zeros(&device, shape, DType::BF16).unwrap();
    let (x, weight, bias, residual) =
        (zeros(&[2, 4096, 320]), zeros(&[2560, 320]), zeros(&[2560]), zeros(&[2, 4096, 1280]));
    let Device::Meta(meta) = &device else { unreachable!() };
    meta.take_report();
    let args = Linear {
        bias: Some(&bias),
        activation: Activation::Geglu,
        residual: Some(&residual),
        ..Linear::new(&x, &weight)
    };
    let y = ops::linear(args).unwrap();
    assert_eq!(y.shape(), [2, 4096, 1280]);
    let report = meta.take_report();
    let work = report.of(OpKind::Linear);
    assert_eq!((work.macs, work.launches, report.ops.len()), (2 * 4096 * 320 * 2560, 1, 1));
    assert_eq!(work.bytes, 2 * (2 * 4096 * 320 + 2560 * 320 + 2560 + 2 * (2 * 4096 * 1280)));
    // bias: 2560 a row; GEGLU 6 and residual 1: 1280 a row each.
    assert_eq!(work.flops, 2 * work.macs + 8192 * (2560 + 7 * 1280));
    assert_eq!((report.ops[0].op, &report.ops[0].output[..]), ("linear", y.shape()));
}

#[test]
fn arguments_that_do_not_fit_are_named() {
    let device = Device::cpu();
    let zeros = |shape: &[usize], dtype| Tensor::zeros(&device, shape, dtype).unwrap();
    let f = DType::F32;
    let (x, weight) = (zeros(&[2, 3], f), zeros(&[5, 3], f));
    let elsewhere = Tensor::zeros(&Device::cpu(), &[5], f).unwrap();
    let fails = |args: Linear, expected: &str| {
        let error = ops::linear(args).unwrap_err();
        assert!(error.to_string().contains(expected), "{error} does not contain {expected}");
        error
    };
    let ok = Linear::new(&x, &weight);
    assert!(ops::linear(ok).is_ok());
    let scalar = zeros(&[], f);
    fails(Linear { x: &scalar, ..ok }, "linear: x has shape []");
    fails(Linear { weight: &zeros(&[5, 4], f), ..ok }, "weight has shape [5, 4], expected [5, 3]");
    fails(Linear { weight: &zeros(&[3], f), ..ok }, "weight has shape [3], expected 2 dimensions");
    fails(Linear { weight: &zeros(&[5, 3], DType::F16), ..ok }, "weight is f16, expected f32");
    fails(Linear { bias: Some(&zeros(&[4], f)), ..ok }, "bias has shape [4], expected [5]");
    fails(Linear { residual: Some(&zeros(&[2, 3], f)), ..ok }, "residual has shape [2, 3], expected [2, 5]");
    fails(Linear { activation: Activation::Geglu, ..ok }, "weight has shape [5, 3], expected an even number");
    let error = fails(Linear { bias: Some(&elsewhere), ..ok }, "bias is on cpu");
    assert!(matches!(error, Error::Device { arg: "bias", .. }));
    let error = fails(Linear { x: &zeros(&[2, 3], DType::U32), ..ok }, "x is u32");
    assert!(matches!(error, Error::Dtype { arg: "x", .. }));
}
