//! quantize and linear_fp8 against plain f64 loops.

use crate::common::{Random, assert_close, cards, cases, devices, f64s, kernels, linear_of, unaligned};
use megafuse::Error;
use megafuse::ops::{self, Activation, Linear, LinearFp8, Quantized, StepColumns, StepIndex, StepRows};
use megafuse::runtime::cuda::is_emulated;
use megafuse::runtime::{DType, Device, OpKind, Tensor};

/// One value; primes; one off a warp's vectors; where a row gets a block of its own; nothing.
const ROWS: [[usize; 2]; 9] = [[1, 1], [3, 7], [9, 33], [8, 256], [5, 264], [2, 1024], [3, 1025], [2, 1032], [0, 8]];

/// All finite values from 0 on, in ascending order: the place of each is its code.
fn positive_values() -> Vec<f64> {
    let value = |code: i32| match (code >> 3, f64::from(code & 7)) {
        (0, fraction) => fraction / 512.0,
        (exponent, fraction) => (1.0 + fraction / 8.0) * 2f64.powi(exponent - 7),
    };
    (0..0x7f).map(value).collect()
}

/// The nearest of `values` to x, which is at most the largest; of two equally near the one with the even code.
fn nearest(values: &[f64], x: f64) -> f64 {
    let above = values.partition_point(|&value| value < x.abs());
    let below = above.saturating_sub(1);
    let (low, high) = (x.abs() - values[below], values[above] - x.abs());
    let code = if low < high || (low == high && below % 2 == 0) { below } else { above };
    values[code].copysign(x)
}

#[test]
fn quantize_rounds_to_the_nearest_code() {
    let values = positive_values();
    for (device, dtype, [rows, k]) in cases(&ROWS) {
        for (mean, deviation) in [(0.0, 2.0), (1.0, 1e-3), (0.0, 1e-6)] {
            let x = Random::new(61).tensor(&device, &[rows, k], dtype, mean, deviation);
            for x in [&x, &unaligned(&x)] {
                let quantized = ops::quantize(x).unwrap();
                assert_eq!((quantized.shape(), quantized.codes().dtype()), (&[rows, k][..], DType::F8E4M3));
                let (codes, scales) = (f64s(quantized.codes()), quantized.scales().to_f32_vec().unwrap());
                for (row, x) in x.to_f32_vec().unwrap().chunks_exact(k).enumerate() {
                    let peak = x.iter().fold(1e-30f32, |peak, x| peak.max(x.abs()));
                    assert_eq!(scales[row], peak / 448.0, "{device} {dtype} {rows} {k}: row {row}");
                    for (i, x) in x.iter().enumerate() {
                        let want = nearest(&values, f64::from(x * (448.0 / peak)).clamp(-448.0, 448.0));
                        let got = codes[row * k + i];
                        assert_eq!(got, want, "{device} {dtype} {rows} {k}: row {row} element {i}, {x} of {peak}");
                    }
                }
            }
        }
    }
}

/// Every code, the places half way to the next, and what lies one step of f32 beside them.
#[test]
fn quantize_rounds_every_value_to_even() {
    let values = positive_values();
    for device in devices() {
        let middles = values.windows(2).map(|pair| ((pair[0] + pair[1]) / 2.0) as f32);
        let near =
            middles.flat_map(|x| [x.next_down(), x, x.next_up()]).chain(values.iter().map(|&value| value as f32));
        let row: Vec<f32> = near.flat_map(|x| [x, -x]).collect();
        assert!(row.contains(&448.0));
        let x = Tensor::from_f32(&device, &[1, row.len()], DType::F32, &row).unwrap();
        for (got, x) in f64s(ops::quantize(&x).unwrap().codes()).into_iter().zip(row) {
            let want = nearest(&values, f64::from(x));
            assert!(got == want && got.is_sign_negative() == want.is_sign_negative(), "{device}: {x} is {got}");
        }
    }
}

#[test]
fn a_value_that_is_not_finite_is_seen_in_its_row() {
    for (device, dtype, k) in cases(&[40, 1100]) {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, k - 1] {
                let mut values: Vec<f32> = (0..3 * k).map(|i| (i * 37 % 101) as f32 - 50.0).collect();
                values[k + at] = bad;
                let x = ops::quantize(&Tensor::from_f32(&device, &[3, k], dtype, &values).unwrap()).unwrap();
                let weight = ops::quantize(&Tensor::from_f32(&device, &[8, k], dtype, &vec![1.0; 8 * k]).unwrap());
                let y = ops::linear_fp8(plain(&x, &weight.unwrap(), dtype)).unwrap().to_f32_vec().unwrap();
                for (i, y) in y.into_iter().enumerate() {
                    assert_eq!(y.is_nan(), i / 8 == 1, "{device} {dtype} {k} {bad} at {at}: row {} is {y}", i / 8);
                }
            }
        }
    }
}

fn plain<'a>(x: &'a Quantized, weight: &'a Quantized, dtype: DType) -> LinearFp8<'a> {
    LinearFp8 { x, weight, bias: None, activation: Activation::None, gate: None, residual: None, dtype }
}

/// Leading dimensions, K, rows of the weight: those of linear's tests and of whole chunks for Hopper's kernels; with one
/// slice (of 32 or 128 of k), fewer than a ring has stages, and many.
const SHAPES: [(&[usize], usize, usize); 12] = [
    (&[1], 1, 2),
    (&[2, 3], 7, 10),
    (&[65], 40, 130),
    (&[29], 257, 66),
    (&[0, 77], 64, 64),
    (&[3], 4, 0),
    (&[3], 0, 4),
    (&[2, 77], 768, 48),
    (&[1], 16, 16),
    (&[200], 144, 336),
    (&[130], 1424, 176),
    (&[257], 128, 256),
];

struct Inputs {
    x: Quantized,
    weight: Quantized,
    bias: Tensor,
    residual: Tensor,
}

impl Inputs {
    /// `mean` of x and of weight, whose deviation is 1.
    fn new(device: &Device, dtype: DType, leading: &[usize], k: usize, rows: usize, n: usize, mean: f64) -> Inputs {
        let mut random = Random::new(62);
        let norm = 1.0 / (k.max(1) as f64).sqrt();
        // Every row another size: a scale in the wrong place is seen.
        let mut grown = |shape: &[usize], mean: f64, deviation: f64| {
            let mut values = random.tensor(&Device::cpu(), shape, DType::F32, mean, deviation).to_f32_vec().unwrap();
            let k = shape[shape.len() - 1].max(1);
            for (i, row) in values.chunks_mut(k).enumerate() {
                row.iter_mut().for_each(|x| *x *= 1.0 + (i % 7) as f32 / 4.0);
            }
            ops::quantize(&Tensor::from_f32(device, shape, DType::F32, &values).unwrap()).unwrap()
        };
        let x = grown(&[leading, &[k]].concat(), mean, 1.0);
        let weight = grown(&[rows, k], mean * norm, norm);
        let bias = random.randn(device, &[rows], dtype);
        Inputs { x, weight, bias, residual: random.randn(device, &[leading, &[n]].concat(), dtype) }
    }

    fn args(&self, activation: Activation, bias: bool, residual: bool, dtype: DType) -> LinearFp8<'_> {
        LinearFp8 {
            bias: bias.then_some(&self.bias),
            activation,
            residual: residual.then_some(&self.residual),
            ..plain(&self.x, &self.weight, dtype)
        }
    }
}

/// The values that codes and scales stand for.
fn values(x: &Quantized) -> Vec<f64> {
    let (codes, scales) = (f64s(x.codes()), f64s(x.scales()));
    let k = x.shape().last().copied().unwrap().max(1);
    codes.into_iter().enumerate().map(|(i, code)| code * scales[i / k]).collect()
}

fn expected(args: &LinearFp8) -> crate::common::Expected {
    let LinearFp8 { x, weight, bias, activation, gate, residual, .. } = *args;
    let linear = Linear { x: x.codes(), weight: weight.codes(), bias, activation, gate, residual };
    linear_of(&linear, &values(x), &values(weight))
}

/// As of linear, and two scales.
fn f32_eps_allowed(activation: Activation, dtype: DType) -> f64 {
    match activation {
        Activation::Gelu | Activation::Geglu if dtype != DType::F32 => 10.0 + 5e-6 / crate::common::F32_EPS,
        _ => 10.0,
    }
}

/// Hopper's tensor cores keep 13 bits of fraction of a sum of 32 products, all of which they cut off there. The kernels add
/// up sums of 128 in f32: four times 33 terms, each short of at most 2^-13 of the largest. The emulated card's are exact.
fn hopper_allowed(kernel: &str) -> f64 {
    if kernel.contains("sm90") && !is_emulated() { 4.0 * 33.0 / 8192.0 / crate::common::F32_EPS } else { 0.0 }
}

#[test]
fn linear_fp8_matches_f64() {
    for (device, dtype, (leading, k, rows)) in cases(&SHAPES) {
        for (i, activation) in Activation::ALL.into_iter().enumerate() {
            let n = if activation.is_gated() { rows / 2 } else { rows };
            let inputs = Inputs::new(&device, dtype, leading, k, rows, n, 0.0);
            let args = inputs.args(activation, i % 2 == 0, i % 3 == 0, dtype);
            let want = expected(&args);
            for kernel in kernels("linear_fp8", &device, dtype) {
                let Some(got) = linear_by(&kernel, args) else { continue };
                let what = format!("{device} {leading:?} {k} {rows} {activation:?} {kernel}");
                assert_close(&got, &want, f32_eps_allowed(activation, dtype) + hopper_allowed(&kernel), what);
            }
        }
    }
}

/// `None`: the kernel cannot take these operands, and says so.
fn linear_by(kernel: &str, args: LinearFp8) -> Option<Tensor> {
    match ops::with_variants(kernel, || ops::linear_fp8(args)) {
        Err(Error::Argument { arg: "MEGAFUSE_KERNEL", .. }) => None,
        result => Some(result.unwrap()),
    }
}

/// Images that end inside a tile of rows; N of whole chunks and not.
#[test]
fn a_gate_multiplies_each_images_rows() {
    for (device, dtype, [images, l, k, n]) in cases(&[[2, 3, 7, 10], [2, 75, 144, 176], [3, 40, 128, 136]]) {
        let inputs = Inputs::new(&device, dtype, &[images, l], k, n, n, 0.0);
        let table = Random::new(63).randn(&device, &[2 * images, n + 8], dtype);
        let step = StepIndex::one(&device, 1).unwrap();
        let rows = StepRows { table: &table, step: &step, rows: images };
        let gate = Some(StepColumns { rows, first: 8 });
        let args = LinearFp8 { gate, ..inputs.args(Activation::None, true, true, dtype) };
        let want = expected(&args);
        let mut count = 0;
        for kernel in kernels("linear_fp8", &device, dtype) {
            let Some(got) = linear_by(&kernel, args) else { continue };
            count += 1;
            let what = format!("{device} {images} {l} {k} {n} {kernel}");
            assert_close(&got, &want, f32_eps_allowed(Activation::None, dtype) + 1.0 + hopper_allowed(&kernel), what);
        }
        assert!(count > 0, "{device} {dtype}: no kernel takes a gate");
    }
}

/// A row's bits depend on that row alone, whichever kernel runs.
#[test]
fn a_row_does_not_depend_on_the_others() {
    for (device, dtype) in devices().into_iter().flat_map(|d| DType::FLOATS.map(|dtype| (d.clone(), dtype))) {
        let inputs = Inputs::new(&device, dtype, &[150], 272, 96, 96, 0.0);
        let all = ops::linear_fp8(inputs.args(Activation::Silu, true, false, dtype)).unwrap().to_f32_vec().unwrap();
        for rows in [0..1, 5..70, 22..150] {
            let codes = inputs.x.codes().rows(rows.clone()).unwrap();
            let scales = Tensor::from_f32(
                &device,
                &[rows.len()],
                DType::F32,
                &inputs.x.scales().to_f32_vec().unwrap()[rows.clone()],
            );
            let x = Quantized::new(codes, scales.unwrap()).unwrap();
            let some =
                ops::linear_fp8(LinearFp8 { x: &x, ..inputs.args(Activation::Silu, true, false, dtype) }).unwrap();
            assert!(some.to_f32_vec().unwrap() == all[rows.start * 96..rows.end * 96], "{device} {dtype} {rows:?}");
        }
    }
}

/// Codes, scales and the rest may lie anywhere.
#[test]
fn tensors_may_begin_at_any_element() {
    for (device, dtype) in devices().into_iter().flat_map(|d| DType::FLOATS.map(|dtype| (d.clone(), dtype))) {
        let inputs = Inputs::new(&device, dtype, &[19], 48, 32, 32, 0.0);
        let args = inputs.args(Activation::Silu, true, true, dtype);
        let want = expected(&args);
        let [bias, residual] = [&inputs.bias, &inputs.residual].map(unaligned);
        let [x, weight] = [&inputs.x, &inputs.weight].map(|x| {
            // The rows behind the first, which has one code.
            let all: Vec<f32> = [&[1.0; 48][..], &x.codes().to_f32_vec().unwrap()].concat();
            let codes = ops::quantize(&Tensor::from_f32(&device, &[1, all.len()], DType::F32, &all).unwrap()).unwrap();
            let codes = codes.codes().reshape(&[all.len()]).unwrap().rows(48..all.len()).unwrap();
            Quantized::new(codes.reshape(x.shape()).unwrap(), x.scales().clone()).unwrap()
        });
        for args in [
            LinearFp8 { x: &x, ..args },
            LinearFp8 { weight: &weight, ..args },
            LinearFp8 { bias: Some(&bias), ..args },
            LinearFp8 { residual: Some(&residual), ..args },
        ] {
            assert_close(&ops::linear_fp8(args).unwrap(), &want, f32_eps_allowed(args.activation, dtype), &device);
        }
    }
}

#[test]
fn meta_records_the_operands_bytes() {
    let device = Device::meta();
    let zeros = |shape: &[usize]| Tensor::zeros(&device, shape, DType::BF16).unwrap();
    let Device::Meta(meta) = &device else { unreachable!() };
    meta.take_report();
    let x = ops::quantize(&zeros(&[2, 4096, 320])).unwrap();
    let weight = ops::quantize(&zeros(&[640, 320])).unwrap();
    let report = meta.take_report();
    let (values, rows) = (2 * 4096 * 320, 2 * 4096);
    assert_eq!((report.ops[0].op, report.ops[0].kind), ("quantize", OpKind::Elementwise));
    assert_eq!((report.ops[0].work.flops, report.ops[0].work.bytes), (3 * values, 3 * values + 4 * rows));
    ops::linear_fp8(plain(&x, &weight, DType::BF16)).unwrap();
    let report = meta.take_report();
    let work = report.of(OpKind::Linear);
    assert_eq!((work.macs, work.launches), (rows * 640 * 320, 1));
    assert_eq!(work.bytes, values + 640 * 320 + 4 * (rows + 640) + 2 * rows * 640);
    assert_eq!(work.flops, 2 * work.macs + 2 * rows * 640);
}

#[test]
fn arguments_that_do_not_fit_are_named() {
    let device = Device::cpu();
    let zeros = |shape: &[usize], dtype| Tensor::zeros(&device, shape, dtype).unwrap();
    let x = ops::quantize(&zeros(&[4, 6], DType::F32)).unwrap();
    let weight = ops::quantize(&zeros(&[5, 6], DType::F16)).unwrap();
    let ok = plain(&x, &weight, DType::F16);
    assert!(ops::linear_fp8(ok).is_ok());
    let fails = |args: LinearFp8, expected: &str| {
        let error = ops::linear_fp8(args).unwrap_err();
        assert!(error.to_string().contains(expected), "{error} does not contain {expected}");
    };
    let other = ops::quantize(&zeros(&[5, 7], DType::F32)).unwrap();
    fails(LinearFp8 { weight: &other, ..ok }, "linear_fp8: weight has shape [5, 7], expected [5, 6]");
    fails(LinearFp8 { bias: Some(&zeros(&[5], DType::F32)), ..ok }, "bias is f32, expected f16");
    fails(LinearFp8 { dtype: DType::U32, ..ok }, "dtype is u32");
    fails(LinearFp8 { activation: Activation::Geglu, ..ok }, "an even number of rows");
    let refused = |result: megafuse::Result<Quantized>, expected: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(expected), "{error} does not contain {expected}");
    };
    refused(ops::quantize(&zeros(&[], DType::F32)), "quantize: x has shape []");
    refused(ops::quantize(&zeros(&[4], DType::U32)), "x is u32");
    refused(Quantized::new(zeros(&[4, 6], DType::F32), zeros(&[4], DType::F32)), "codes is f32, expected f8_e4m3");
    refused(Quantized::new(x.codes().clone(), zeros(&[5], DType::F32)), "scales has shape [5], expected [4]");
}

/// Short rows share a block, long ones have one each; any size takes one launch.
#[test]
fn one_launch_each() {
    for device in cards() {
        let Device::Cuda(cuda) = &device else { unreachable!() };
        for (k, kernel) in [(1024, "quantize_bf16"), (1025, "quantize_wide_bf16")] {
            let x = Tensor::zeros(&device, &[3, k], DType::BF16).unwrap();
            assert_eq!(cuda.capture(1 << 20, || ops::quantize(&x).map(drop)).unwrap().kernels(), [kernel], "{k}");
        }
        let inputs = Inputs::new(&device, DType::BF16, &[150], 272, 96, 96, 0.0);
        let args = inputs.args(Activation::Silu, true, false, DType::BF16);
        let graph = cuda.capture(1 << 20, || ops::linear_fp8(args).map(drop)).unwrap();
        assert_eq!(graph.kernels().len(), 1, "{:?}", graph.kernels());
    }
}
