//! Convolutions in stripes: the bits of the whole, wherever the image is cut.

use crate::common::{Random, cards, devices};
use megafuse::ops::{self, Conv2d, ConvNorm, GroupMoments, GroupStatistics, Source, Stripe};
use megafuse::runtime::{DType, Device, Tensor};

#[derive(Clone, Copy, Debug)]
struct Case {
    /// H, W
    input: [usize; 2],
    channels: usize,
    outputs: usize,
    kernel: usize,
    stride: usize,
    dilation: usize,
    padding: [usize; 4],
    resize_to: Option<[usize; 2]>,
    /// Of the norm, 0 for none.
    groups: usize,
    residual: bool,
}

const PLAIN: Case = Case {
    input: [9, 7],
    channels: 8,
    outputs: 5,
    kernel: 3,
    stride: 1,
    dilation: 1,
    padding: [1; 4],
    resize_to: None,
    groups: 0,
    residual: false,
};

const CASES: [Case; 11] = [
    PLAIN,
    Case { groups: 4, residual: true, ..PLAIN },
    Case { kernel: 1, padding: [0; 4], groups: 2, ..PLAIN },
    Case { stride: 2, padding: [0, 1, 0, 1], groups: 2, ..PLAIN },
    Case { dilation: 2, padding: [2; 4], input: [11, 5], ..PLAIN },
    // More rows of padding than the kernel reaches: output rows that read nothing.
    Case { padding: [4, 5, 1, 1], groups: 2, ..PLAIN },
    Case { resize_to: Some([18, 14]), ..PLAIN },
    Case { resize_to: Some([13, 7]), groups: 8, ..PLAIN },
    // More than 1024 pixels: the statistics in several parts, of pixels that no row ends with.
    Case { input: [37, 31], channels: 12, outputs: 8, groups: 3, residual: true, ..PLAIN },
    // Long sums of a small image, which a card splits.
    Case { input: [5, 3], channels: 256, outputs: 16, groups: 8, ..PLAIN },
    // On the cpu 16 pixels are summed up at a time.
    Case { input: [6, 11], channels: 1024, outputs: 3, kernel: 1, padding: [0; 4], groups: 4, ..PLAIN },
];

struct Inputs {
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    bias: Tensor,
}

impl Inputs {
    fn new(device: &Device, case: &Case, dtype: DType) -> Inputs {
        let mut random = Random::new(23);
        let ([h, w], c, k) = (case.input, case.channels, case.kernel);
        let weight_std = 1.0 / ((k * k * c) as f64).sqrt();
        Inputs {
            x: random.tensor(device, &[1, h, w, c], dtype, 0.5, 1.0),
            weight: random.tensor(device, &[case.outputs, k, k, c], dtype, 0.0, weight_std),
            gamma: random.tensor(device, &[c], dtype, 1.0, 0.5),
            beta: random.tensor(device, &[c], dtype, 0.0, 0.5),
            bias: random.randn(device, &[case.outputs], dtype),
        }
    }

    fn norm(&self, case: &Case) -> ConvNorm<'_> {
        let silu = !case.channels.is_multiple_of(3);
        ConvNorm { gamma: &self.gamma, beta: &self.beta, groups: case.groups, eps: 1e-5, silu }
    }

    fn args(&self, case: &Case) -> Conv2d<'_> {
        let (stride, dilation, padding, resize_to) = (case.stride, case.dilation, case.padding, case.resize_to);
        let (bias, norm) = (Some(&self.bias), (case.groups > 0).then(|| self.norm(case)));
        Conv2d { bias, norm, stride, dilation, padding, resize_to, ..Conv2d::new(&self.x, &self.weight) }
    }
}

/// Rows of one image.
fn rows(x: &Tensor, first: usize, end: usize) -> Tensor {
    let [_, h, w, c] = x.dims("test", "x").unwrap();
    let x = x.reshape(&[h, w, c]).unwrap().rows(first..end).unwrap();
    x.reshape(&[1, end - first, w, c]).unwrap()
}

/// From stripes of `cut` rows.
fn statistics(inputs: &Inputs, case: &Case, cut: usize) -> GroupStatistics {
    let [_, h, w, c] = inputs.x.dims("test", "x").unwrap();
    let mut moments = GroupMoments::new(inputs.norm(case), [1, h, w, c]).unwrap();
    for first in (0..h).step_by(cut) {
        moments.add(&rows(&inputs.x, first, h.min(first + cut))).unwrap();
    }
    moments.finish().unwrap()
}

/// Input rows under the output rows `first..end`: those of the widest reach, and a row more on both sides.
fn under(case: &Case, first: usize, end: usize) -> [usize; 2] {
    let h = case.input[0];
    let resized = case.resize_to.map_or(h, |[h, _]| h);
    let top = (first * case.stride).saturating_sub(case.padding[0]).min(resized);
    let bottom = ((end - 1) * case.stride + case.dilation * (case.kernel - 1) + 1).saturating_sub(case.padding[0]);
    [(top * h / resized).saturating_sub(1), (bottom.min(resized) * h).div_ceil(resized).min(h - 1) + 1]
}

#[test]
fn stripes_have_the_bits_of_the_whole() {
    let dtypes = |device: &Device| match device {
        Device::Cpu(_) => vec![DType::F32, DType::BF16],
        _ => vec![DType::F32, DType::F16, DType::BF16],
    };
    for (device, case) in devices().into_iter().flat_map(|device| CASES.map(|case| (device.clone(), case))) {
        for dtype in dtypes(&device) {
            check(&device, &case, dtype);
        }
    }
}

fn check(device: &Device, case: &Case, dtype: DType) {
    let inputs = Inputs::new(device, case, dtype);
    let mut args = inputs.args(case);
    let plain = ops::conv2d(args).unwrap();
    let [_, height, w, c] = plain.dims("test", "y").unwrap();
    let residual = Random::new(24).randn(device, &[1, height, w, c], dtype);
    args.residual = case.residual.then_some(&residual);
    let whole = ops::conv2d(args).unwrap().to_f32_vec().unwrap();
    for cut in [1, 3, 4, 100] {
        let statistics = (case.groups > 0).then(|| statistics(&inputs, case, cut));
        for (first, end) in (0..height).step_by(cut).map(|first| (first, height.min(first + cut))) {
            let residual = rows(&residual, first, end);
            let [from, to] = under(case, first, end);
            for [from, to] in [[0, case.input[0]], [from, to]] {
                let x = rows(&inputs.x, from, to);
                let output = [first, end];
                let (height, first_row, statistics) = (case.input[0], from, statistics.as_ref());
                let stripe = Some(Stripe { height, first_row, output, statistics });
                let residual = args.residual.map(|_| &residual);
                let got = ops::conv2d(Conv2d { x: Source::One(&x), stripe, residual, ..args }).unwrap();
                assert_eq!(got.shape(), [1, end - first, w, c]);
                let want = &whole[first * w * c..end * w * c];
                assert!(
                    got.to_f32_vec().unwrap() == want,
                    "{device} {dtype} {case:?}: rows {first}..{end} from rows {from}..{to}"
                );
            }
        }
    }
}

/// Two sources, of which each stripe holds the same rows.
#[test]
fn stripes_of_two_sources() {
    for device in devices() {
        let mut random = Random::new(31);
        let [a, b] = [8, 24].map(|c| random.randn(&device, &[1, 7, 5, c], DType::F32));
        let weight = random.randn(&device, &[6, 3, 3, 32], DType::F32);
        let whole = ops::conv2d(Conv2d::new(Source::Two(&a, &b), &weight)).unwrap().to_f32_vec().unwrap();
        let (a, b) = (rows(&a, 2, 7), rows(&b, 2, 7));
        let stripe = Some(Stripe { height: 7, first_row: 2, output: [3, 6], statistics: None });
        let got = ops::conv2d(Conv2d { stripe, ..Conv2d::new(Source::Two(&a, &b), &weight) }).unwrap();
        assert!(got.to_f32_vec().unwrap() == whole[3 * 5 * 6..6 * 5 * 6], "{device}");
    }
}

/// The meta device counts the launches that a card makes.
#[test]
fn a_card_launches_what_meta_counts_in_stripes() {
    let run = |inputs: &Inputs, case: &Case, statistics: Option<&GroupStatistics>| {
        let stripe = Some(Stripe { height: case.input[0], first_row: 0, output: [1, 4], statistics });
        ops::conv2d(Conv2d { stripe, ..inputs.args(case) }).map(drop)
    };
    let made = |device: &Device, case: &Case| {
        let inputs = Inputs::new(device, case, DType::F16);
        let statistics = (case.groups > 0).then(|| statistics(&inputs, case, 4));
        (inputs, statistics)
    };
    for (card, case) in cards().into_iter().flat_map(|card| CASES.map(|case| (card.clone(), case))) {
        let meta = Device::meta();
        let Device::Meta(recorder) = &meta else { unreachable!() };
        let (inputs, statistics) = made(&meta, &case);
        recorder.take_report();
        run(&inputs, &case, statistics.as_ref()).unwrap();
        let counted = recorder.take_report().total().launches;
        let Device::Cuda(cuda) = &card else { unreachable!() };
        let (inputs, statistics) = made(&card, &case);
        let graph = cuda.capture(0, || run(&inputs, &case, statistics.as_ref())).unwrap();
        assert_eq!(graph.kernels().len() as u64, counted, "{card} {case:?}: {:?}", graph.kernels());
    }
}

#[test]
fn stripes_that_do_not_fit_are_named() {
    let device = Device::cpu();
    let case = Case { groups: 2, ..PLAIN };
    let inputs = Inputs::new(&device, &case, DType::F32);
    let statistics = statistics(&inputs, &case, 2);
    let ok = Stripe { height: 9, first_row: 0, output: [2, 4], statistics: Some(&statistics) };
    let run = |x: &Tensor, stripe: Stripe, groups: usize| {
        let norm = Some(ConvNorm { groups, ..inputs.norm(&case) }).filter(|_| groups > 0);
        ops::conv2d(Conv2d { x: x.into(), norm, stripe: Some(stripe), ..inputs.args(&case) })
    };
    assert!(run(&inputs.x, ok, 2).is_ok());
    let fails = |x: &Tensor, stripe: Stripe, groups: usize, expected: &str| {
        let error = run(x, stripe, groups).unwrap_err().to_string();
        assert!(error.contains(expected), "{error} does not contain {expected}");
    };
    fails(&inputs.x, Stripe { output: [4, 2], ..ok }, 2, "stripe.output is 4..2, expected a range within 0..9");
    fails(&inputs.x, Stripe { output: [4, 10], ..ok }, 2, "stripe.output is 4..10");
    fails(&inputs.x, Stripe { first_row: 1, ..ok }, 2, "stripe.first_row is 1, expected 9 rows from there on within 9");
    fails(&inputs.x, Stripe { statistics: None, ..ok }, 2, "stripe.statistics is none");
    fails(&inputs.x, ok, 0, "stripe.statistics is some");
    fails(
        &inputs.x,
        ok,
        4,
        "statistics is 8 channels of f32 in 2 groups on cpu, expected 8 channels of f32 in 4 groups",
    );
    let part = rows(&inputs.x, 2, 5);
    fails(
        &part,
        Stripe { first_row: 2, ..ok },
        2,
        "stripe is rows 2..5, expected rows 1..5 of the 9, for output rows 2..4",
    );
    let two = Tensor::concat(&[inputs.x.clone(), inputs.x.clone()]).unwrap();
    fails(&two, ok, 2, "x has shape [2, 9, 7, 8], expected one image");

    let mut moments = GroupMoments::new(inputs.norm(&case), [1, 9, 7, 8]).unwrap();
    moments.add(&part).unwrap();
    let error = moments.add(&inputs.x).unwrap_err().to_string();
    assert!(error.contains("expected at most the 6 rows that are left of 9"), "{error}");
    let error = moments.finish().unwrap_err().to_string();
    assert!(error.contains("rows is 3, expected all 9 rows of the image"), "{error}");
    let error = GroupMoments::new(inputs.norm(&case), [2, 9, 7, 8]).unwrap_err().to_string();
    assert!(error.contains("dims has shape [2, 9, 7, 8], expected one image"), "{error}");
    assert!(GroupMoments::new(ConvNorm { groups: 3, ..inputs.norm(&case) }, [1, 9, 7, 8]).is_err());
}
