//! conv2d against plain f64 loops: every kernel, stride, dilation and padding, every fused option alone and together.

use crate::common::{Random, assert_close};
use megafuse::Error;
use megafuse::ops::{self, Conv2d, ConvNorm, Source, StepIndex, StepRows};
use megafuse::runtime::{DType, Device, OpKind, Tensor};

#[derive(Clone, Copy, Debug)]
struct Case {
    /// N, H, W
    input: [usize; 3],
    /// Of the first source; of the second, 0 for none.
    channels: [usize; 2],
    outputs: usize,
    kernel: [usize; 2],
    stride: usize,
    dilation: usize,
    padding: [usize; 4],
    resize_to: Option<[usize; 2]>,
    /// Of the on-load norm, 0 for none.
    groups: usize,
    silu: bool,
    bias: bool,
    row: bool,
    residual: bool,
    scale: f32,
}

const PLAIN: Case = Case {
    input: [1, 5, 7],
    channels: [3, 0],
    outputs: 5,
    kernel: [3, 3],
    stride: 1,
    dilation: 1,
    padding: [1; 4],
    resize_to: None,
    groups: 0,
    silu: false,
    bias: false,
    row: false,
    residual: false,
    scale: 1.0,
};

fn run(case: &Case, dtype: DType) {
    let device = Device::cpu();
    let mut random = Random::new(17);
    let [n, h, w] = case.input;
    let [c_a, c_b] = case.channels;
    let c = c_a + c_b;
    let [kh, kw] = case.kernel;
    let a = random.randn(&device, &[n, h, w, c_a], dtype);
    let b = random.tensor(&device, &[n, h, w, c_b], dtype, 0.5, 1.0);
    let weight_std = 1.0 / ((kh * kw * c).max(1) as f64).sqrt();
    let weight = random.tensor(&device, &[case.outputs, kh, kw, c], dtype, 0.0, weight_std);
    let [gamma, beta] = [1.0, 0.0].map(|mean| random.tensor(&device, &[c], dtype, mean, 0.5));
    // The second of three steps.
    let [bias, row] = [&[case.outputs][..], &[3 * n, case.outputs]].map(|shape| random.randn(&device, shape, dtype));
    let step = StepIndex::new(&device, 1).unwrap();
    let mut args = Conv2d {
        x: if c_b > 0 { Source::Two(&a, &b) } else { Source::One(&a) },
        weight: &weight,
        bias: case.bias.then_some(&bias),
        stride: case.stride,
        dilation: case.dilation,
        padding: case.padding,
        norm: (case.groups > 0).then_some(ConvNorm {
            gamma: &gamma,
            beta: &beta,
            groups: case.groups,
            eps: 1e-5,
            silu: case.silu,
        }),
        resize_to: case.resize_to,
        row: case.row.then_some(StepRows { table: &row, step: &step }),
        residual: None,
        scale: case.scale,
    };
    let residual = random.randn(&device, ops::conv2d(args).unwrap().shape(), dtype);
    if case.residual {
        args.residual = Some(&residual);
    }
    // 8: a chain of products, and the norm's rounding of each factor.
    assert_close(&ops::conv2d(args).unwrap(), &crate::common::conv2d(&args), 8.0, format!("{case:?}"));
}

fn run_all(cases: &[Case]) {
    for case in cases {
        DType::FLOATS.iter().for_each(|&dtype| run(case, dtype));
    }
}

#[test]
fn kernels_strides_dilations_and_paddings() {
    for kernel in [[1, 1], [3, 3], [1, 3], [2, 2], [4, 1]] {
        for (stride, dilation) in [(1, 1), (2, 1), (3, 1), (1, 2), (1, 3), (2, 2), (5, 1)] {
            for padding in [[0; 4], [1; 4], [0, 1, 0, 1], [2, 0, 3, 1], [7, 7, 9, 9]] {
                let case = Case { input: [1, 10, 9], kernel, stride, dilation, padding, ..PLAIN };
                let reach = |kernel: usize| dilation * (kernel - 1) + 1;
                if 10 + padding[0] + padding[1] >= reach(kernel[0]) && 9 + padding[2] + padding[3] >= reach(kernel[1]) {
                    run(&case, DType::F32);
                    run(&Case { channels: [2, 3], ..case }, DType::BF16);
                }
            }
        }
    }
}

#[test]
fn shapes() {
    let same = [1; 4];
    run_all(&[
        Case { input: [1, 1, 1], channels: [1, 0], outputs: 1, kernel: [1, 1], padding: [0; 4], ..PLAIN },
        Case { input: [0, 4, 4], ..PLAIN },
        Case { input: [2, 4, 4], outputs: 0, ..PLAIN },
        Case { input: [2, 4, 4], channels: [0, 0], bias: true, ..PLAIN },
        Case { input: [2, 0, 4], kernel: [2, 1], padding: same, bias: true, ..PLAIN },
        Case { input: [2, 13, 11], channels: [31, 0], outputs: 33, ..PLAIN },
        // Sums of more than one block of k, tiles that end inside an image row and between images.
        Case { input: [3, 5, 3], channels: [97, 0], outputs: 31, ..PLAIN },
        Case { input: [2, 3, 5], channels: [320, 0], outputs: 16, ..PLAIN },
        Case { input: [1, 9, 6], channels: [4, 0], outputs: 64, ..PLAIN },
        Case { input: [1, 16, 17], channels: [128, 0], outputs: 3, ..PLAIN },
        Case { input: [1, 16, 17], channels: [64, 0], outputs: 4, ..PLAIN },
        Case { input: [2, 4, 4], channels: [640, 320], outputs: 32, kernel: [1, 1], padding: [0; 4], ..PLAIN },
        // The UNet's and the VAE's downsamplers.
        Case { input: [2, 9, 8], channels: [32, 0], outputs: 32, stride: 2, ..PLAIN },
        Case { input: [2, 9, 8], channels: [32, 0], outputs: 32, stride: 2, padding: [0, 1, 0, 1], ..PLAIN },
    ]);
}

#[test]
fn every_fused_option_alone_and_together() {
    let base = Case { input: [2, 6, 5], channels: [12, 0], outputs: 20, ..PLAIN };
    let together = Case {
        channels: [7, 5],
        resize_to: Some([11, 9]),
        groups: 4,
        silu: true,
        bias: true,
        row: true,
        residual: true,
        scale: 0.7,
        ..base
    };
    run_all(&[
        base,
        Case { channels: [7, 5], ..base },
        Case { groups: 4, ..base },
        Case { groups: 4, silu: true, ..base },
        Case { groups: 4, silu: true, channels: [7, 5], ..base },
        Case { groups: 12, silu: true, stride: 2, padding: [0, 1, 0, 1], ..base },
        Case { groups: 4, silu: true, dilation: 2, padding: [2; 4], ..base },
        Case { resize_to: Some([12, 10]), ..base },
        Case { resize_to: Some([7, 13]), ..base },
        Case { resize_to: Some([4, 3]), ..base },
        Case { resize_to: Some([6, 5]), ..base },
        Case { bias: true, ..base },
        Case { row: true, ..base },
        Case { residual: true, ..base },
        Case { scale: 0.5, ..base },
        together,
        Case { kernel: [1, 1], padding: [0; 4], ..together },
        Case { stride: 2, dilation: 2, padding: [2, 1, 0, 3], ..together },
    ]);
}

/// Normalised inputs beyond 128 MiB go through in bands of rows: the seams must not show.
#[test]
fn bands_of_a_large_image_join() {
    let device = Device::cpu();
    let mut random = Random::new(5);
    let (h, w, c) = (1030, 512, 72);
    let x = random.randn(&device, &[1, 8, 8, c], DType::F32).to_f32_vec().unwrap();
    let values: Vec<f32> = (0..h * w * c).map(|i| x[(i / c % w * 7 + i / c / w * 13) % 64 * c + i % c]).collect();
    let x = Tensor::from_f32(&device, &[1, h, w, c], DType::F32, &values).unwrap();
    let [gamma, beta] = [1.0, 0.0].map(|mean| random.tensor(&device, &[c], DType::F32, mean, 0.5));
    let norm = ConvNorm { gamma: &gamma, beta: &beta, groups: 8, eps: 1e-5, silu: true };
    let weight = random.tensor(&device, &[4, 3, 3, c], DType::F32, 0.0, 0.05);
    let normalised = ops::group_norm(norm.of((&x).into())).unwrap();
    for (stride, padding) in [(1, [1; 4]), (2, [0, 1, 0, 1])] {
        let fused = Conv2d { norm: Some(norm), stride, padding, ..Conv2d::new(&x, &weight) };
        let split = Conv2d { norm: None, x: (&normalised).into(), ..fused };
        let fused = ops::conv2d(fused).unwrap().to_f32_vec().unwrap();
        assert!(fused == ops::conv2d(split).unwrap().to_f32_vec().unwrap(), "stride {stride}");
    }
}

#[test]
fn an_image_does_not_depend_on_the_others_or_on_the_threads() {
    let device = Device::cpu();
    let mut random = Random::new(3);
    let x = random.randn(&device, &[3, 33, 37, 40], DType::F32);
    let weight = random.tensor(&device, &[96, 3, 3, 40], DType::F32, 0.0, 0.05);
    let [gamma, beta] = [1.0, 0.0].map(|mean| random.tensor(&device, &[40], DType::F32, mean, 0.5));
    let norm = Some(ConvNorm { gamma: &gamma, beta: &beta, groups: 8, eps: 1e-5, silu: true });
    let run = |x: &Tensor| ops::conv2d(Conv2d { norm, ..Conv2d::new(x, &weight) }).unwrap().to_f32_vec().unwrap();
    let all = run(&x);
    for image in 0..3 {
        let one = run(&x.rows(image..image + 1).unwrap());
        assert_eq!(one, all[image * one.len()..(image + 1) * one.len()], "image {image}");
    }
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        assert_eq!(pool.install(|| run(&x)), all, "{threads} threads");
    }
}

#[test]
fn meta_records_the_fused_kernel() {
    let device = Device::meta();
    let zeros = |shape: &[usize]| Tensor::zeros(&device, shape, DType::F16).unwrap();
    let (a, b) = (zeros(&[2, 32, 32, 640]), zeros(&[2, 32, 32, 320]));
    let (weight, gamma, bias) = (zeros(&[640, 3, 3, 960]), zeros(&[960]), zeros(&[640]));
    let (row, residual) = (zeros(&[2, 640]), zeros(&[2, 32, 32, 640]));
    let step = StepIndex::new(&device, 0).unwrap();
    let Device::Meta(meta) = &device else { unreachable!() };
    meta.take_report();
    let plain = Conv2d::new(Source::Two(&a, &b), &weight);
    let norm = ConvNorm { gamma: &gamma, beta: &gamma, groups: 32, eps: 1e-5, silu: true };
    let fused = Conv2d {
        bias: Some(&bias),
        norm: Some(norm),
        row: Some(StepRows { table: &row, step: &step }),
        residual: Some(&residual),
        ..plain
    };
    assert_eq!(ops::conv2d(plain).unwrap().shape(), [2, 32, 32, 640]);
    assert_eq!(ops::conv2d(fused).unwrap().shape(), [2, 32, 32, 640]);
    assert_eq!(ops::conv2d(Conv2d { stride: 2, padding: [0, 1, 0, 1], ..plain }).unwrap().shape(), [2, 16, 16, 640]);
    assert_eq!(ops::conv2d(Conv2d { resize_to: Some([63, 64]), ..plain }).unwrap().shape(), [2, 63, 64, 640]);
    let report = meta.take_report();
    let (pixels, k) = (2 * 32 * 32, 9 * 960);
    let macs: Vec<u64> = report.ops.iter().map(|op| op.work.macs).collect();
    assert_eq!(macs, [pixels, pixels, pixels / 4, 2 * 63 * 64].map(|pixels| pixels * 640 * k));
    let (plain, fused) = (report.ops[0].work, report.ops[1].work);
    assert_eq!((plain.flops, plain.launches), (2 * macs[0], 1));
    assert_eq!(plain.bytes, 2 * (pixels * 960 + 640 * k + pixels * 640));
    assert_eq!(fused.bytes - plain.bytes, 2 * (640 + 2 * 960 + 2 * 640 + pixels * 640));
    assert_eq!(fused.flops - plain.flops, 3 * pixels * 640 + 12 * pixels * 960);
    assert_eq!(fused.launches, 2);
    assert_eq!((report.ops[0].op, report.ops[0].kind), ("conv2d", OpKind::Conv));
}

#[test]
fn arguments_that_do_not_fit_are_named() {
    let device = Device::cpu();
    let zeros = |shape: &[usize], dtype| Tensor::zeros(&device, shape, dtype).unwrap();
    let f = DType::F32;
    let (x, weight, six) = (zeros(&[2, 4, 5, 6], f), zeros(&[7, 3, 3, 6], f), zeros(&[6], f));
    let ok = Conv2d::new(&x, &weight);
    assert!(ops::conv2d(ok).is_ok());
    let fails = |args: Conv2d, expected: &str| {
        let error = ops::conv2d(args).unwrap_err();
        assert!(error.to_string().contains(expected), "{error} does not contain {expected}");
        error
    };
    fails(Conv2d { x: (&six).into(), ..ok }, "conv2d: x has shape [6], expected 4 dimensions");
    fails(Conv2d { x: Source::Two(&x, &x), ..ok }, "weight has shape [7, 3, 3, 6], expected [7, 3, 3, 12]");
    let x2 = zeros(&[1, 4, 5, 6], f);
    fails(Conv2d { x: Source::Two(&x, &x2), ..ok }, "x2 has shape [1, 4, 5, 6], expected [2, 4, 5, 6]");
    fails(Conv2d::new(&x, &six), "weight has shape [6], expected 4 dimensions");
    fails(Conv2d::new(&x, &zeros(&[7, 0, 3, 6], f)), "a kernel of at least 1 x 1");
    fails(Conv2d { weight: &zeros(&[7, 3, 3, 6], DType::F16), ..ok }, "weight is f16, expected f32");
    fails(Conv2d { bias: Some(&six), ..ok }, "bias has shape [6], expected [7]");
    let step = StepIndex::new(&device, 1).unwrap();
    let tables = [[5, 7], [4, 6], [2, 7]].map(|shape| zeros(&shape, f));
    let [odd, narrow, short] = tables.each_ref().map(|table| Some(StepRows { table, step: &step }));
    fails(Conv2d { row: odd, ..ok }, "row has shape [5, 7], expected a multiple of 2 rows");
    fails(Conv2d { row: narrow, ..ok }, "row has shape [4, 6], expected [4, 7]");
    fails(Conv2d { row: short, ..ok }, "step is 1, expected below 1");
    fails(Conv2d { residual: Some(&x), ..ok }, "residual has shape [2, 4, 5, 6], expected [2, 4, 5, 7]");
    let seven = zeros(&[7], f);
    let norm = ConvNorm { gamma: &six, beta: &six, groups: 3, eps: 1e-5, silu: true };
    assert!(ops::conv2d(Conv2d { norm: Some(norm), ..ok }).is_ok());
    fails(Conv2d { norm: Some(ConvNorm { gamma: &seven, ..norm }), ..ok }, "gamma has shape [7], expected [6]");
    fails(Conv2d { norm: Some(ConvNorm { groups: 4, ..norm }), ..ok }, "that 4 groups divide");
    fails(Conv2d { stride: 0, ..ok }, "stride is 0, expected at least 1");
    fails(Conv2d { dilation: 0, ..ok }, "dilation is 0, expected at least 1");
    fails(Conv2d { dilation: 4, ..ok }, "9 values of the height, expected at most the padded input's 6");
    fails(Conv2d { dilation: usize::MAX, ..ok }, "expected at most the padded input's 6");
    fails(Conv2d { resize_to: Some([0, 4]), ..ok }, "resize_to is 0 x 4");
    let empty = zeros(&[2, 0, 5, 6], f);
    fails(Conv2d { x: (&empty).into(), resize_to: Some([4, 4]), ..ok }, "resize_to is 4 x 4");
    assert!(matches!(fails(Conv2d { padding: [usize::MAX; 4], ..ok }, "padded input"), Error::TooLarge { .. }));
    let huge = fails(Conv2d { padding: [1 << 40, 0, 1 << 40, 0], ..ok }, "is too large");
    assert!(matches!(huge, Error::TooLarge { .. }));
    let elsewhere = Tensor::zeros(&Device::cpu(), &[7], f).unwrap();
    assert!(matches!(fails(Conv2d { bias: Some(&elsewhere), ..ok }, "bias is on cpu"), Error::Device { .. }));
    fails(Conv2d::new(&zeros(&[1, 4, 4, 6], DType::U32), &weight), "x is u32");
}
