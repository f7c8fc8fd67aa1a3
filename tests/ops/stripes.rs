//! Convolutions in stripes: the bits of the whole, wherever the image is cut.

use crate::common::{cards, devices, hoppers};
use crate::conv::{Case, Inputs, PLAIN};
use megafuse::ops::{self, Activation, Conv2d, ConvNorm, GroupMoments, GroupStatistics, Source, Stripe};
use megafuse::runtime::{DType, Device, Tensor};

const WHOLE: Case = Case { input: [1, 9, 7], channels: [8, 0], activation: Activation::Silu, bias: true, ..PLAIN };

const CASES: [Case; 14] = [
    WHOLE,
    Case { channels: [8, 24], ..WHOLE },
    Case { groups: 4, residual: true, ..WHOLE },
    Case { kernel: [1, 1], padding: [0; 4], groups: 2, ..WHOLE },
    Case { stride: 2, padding: [0, 1, 0, 1], groups: 2, ..WHOLE },
    Case { dilation: 2, padding: [2; 4], input: [1, 11, 5], ..WHOLE },
    // More rows of padding than the kernel reaches: output rows that read nothing.
    Case { padding: [4, 5, 1, 1], groups: 2, ..WHOLE },
    Case { resize_to: Some([18, 14]), ..WHOLE },
    Case { resize_to: Some([13, 7]), groups: 8, ..WHOLE },
    // More than 1024 pixels: the statistics in several parts, of pixels that no row ends with.
    Case {
        input: [1, 37, 31],
        channels: [12, 0],
        outputs: 8,
        groups: 3,
        activation: Activation::None,
        residual: true,
        ..WHOLE
    },
    // A ResNet of DeepFloyd IF: the norm modulated, and GELU; with statistics in one launch and in several.
    Case { groups: 4, modulated: true, activation: Activation::Gelu, residual: true, ..WHOLE },
    Case {
        input: [1, 37, 31],
        channels: [32, 0],
        outputs: 8,
        groups: 4,
        modulated: true,
        activation: Activation::Gelu,
        ..WHOLE
    },
    // Long sums of a small image, which a card splits.
    Case { input: [1, 5, 3], channels: [256, 0], outputs: 16, groups: 8, ..WHOLE },
    // On the cpu 16 pixels are summed up at a time.
    Case { input: [1, 6, 11], channels: [1024, 0], outputs: 3, kernel: [1, 1], padding: [0; 4], groups: 4, ..WHOLE },
];

/// Rows of one image.
fn rows(x: &Tensor, first: usize, end: usize) -> Tensor {
    let [_, h, w, c] = x.dims("test", "x").unwrap();
    let x = x.reshape(&[h, w, c]).unwrap().rows(first..end).unwrap();
    x.reshape(&[1, end - first, w, c]).unwrap()
}

/// Those of the norm's input, from stripes of `cut` rows; none without a norm.
fn statistics(args: &Conv2d, cut: usize) -> Option<GroupStatistics> {
    let (norm, x) = (args.norm?, args.x.first());
    let dims: [usize; 4] = x.dims("test", "x").unwrap();
    let mut moments = GroupMoments::new(norm, dims).unwrap();
    for first in (0..dims[1]).step_by(cut) {
        moments.add(&rows(x, first, dims[1].min(first + cut))).unwrap();
    }
    Some(moments.finish().unwrap())
}

/// Input rows under the output rows `first..end`: those of the widest reach, and a row more on both sides.
fn under(case: &Case, first: usize, end: usize) -> [usize; 2] {
    let h = case.input[1];
    let resized = case.resize_to.map_or(h, |[h, _]| h);
    let top = (first * case.stride).saturating_sub(case.padding[0]).min(resized);
    let bottom = ((end - 1) * case.stride + case.dilation * (case.kernel[0] - 1) + 1).saturating_sub(case.padding[0]);
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
            check(&device, &case, dtype, &[1, 3, 4, 100]);
        }
    }
}

/// With outputs that Hopper's kernels take: a stripe and its whole run on the same kernels, or the stripe reads nothing.
#[test]
fn hopper_stripes_have_the_bits_of_the_whole() {
    for (device, cuda) in hoppers() {
        for case in CASES.map(|case| Case { outputs: 16, ..case }).into_iter().filter(|case| case.channels[0] % 8 == 0)
        {
            // Twice the edges: also stripes of one row.
            let doubled = case.resize_to == Some([2 * case.input[1], 2 * case.input[2]]);
            check(&device, &case, DType::BF16, if doubled { &[1, 3] } else { &[3] });
            let inputs = Inputs::new(&device, &case, DType::BF16);
            let statistics = statistics(&inputs.args(&case), 4);
            let hopper = |stripe: Option<Stripe>| {
                let args = Conv2d { stripe, residual: None, ..inputs.args(&case) };
                let graph = cuda.capture(1 << 26, || ops::conv2d(args).map(drop)).unwrap();
                graph.kernels().iter().any(|kernel| kernel.starts_with("conv2d_sm90_"))
            };
            let height = case.input[1];
            let stripe = Stripe { height, first_row: 0, output: [1, 4], statistics: statistics.as_ref() };
            // Its row 0 lies 4 rows outside.
            let nothing = Stripe { output: [0, 1], ..stripe };
            assert_eq!(hopper(None), case.resize_to.is_none() || doubled, "{device} {case:?}");
            assert_eq!(hopper(Some(stripe)), hopper(None), "{device} {case:?}");
            assert_eq!(hopper(Some(nothing)), hopper(None) && case.padding[0] < 4, "{device} {case:?}");
        }
    }
}

fn check(device: &Device, case: &Case, dtype: DType, cuts: &[usize]) {
    let inputs = Inputs::new(device, case, dtype);
    let args = inputs.args(case);
    let whole = ops::conv2d(args).unwrap();
    let [_, height, w, c] = whole.dims("test", "y").unwrap();
    let whole = whole.to_f32_vec().unwrap();
    for &cut in cuts {
        let statistics = statistics(&args, cut);
        for (first, end) in (0..height).step_by(cut).map(|first| (first, height.min(first + cut))) {
            let residual = args.residual.map(|residual| rows(residual, first, end));
            let [from, to] = under(case, first, end);
            for [from, to] in [[0, case.input[1]], [from, to]] {
                let [a, b] = [&inputs.a, &inputs.b].map(|x| rows(x, from, to));
                let x = args.x.second().map_or(Source::One(&a), |_| Source::Two(&a, &b));
                let (height, output, statistics) = (case.input[1], [first, end], statistics.as_ref());
                let stripe = Some(Stripe { height, first_row: from, output, statistics });
                let got = ops::conv2d(Conv2d { x, stripe, residual: residual.as_ref(), ..args }).unwrap();
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

/// The meta device counts the launches that a card makes.
#[test]
fn a_card_launches_what_meta_counts_in_stripes() {
    let made = |device: &Device, case: &Case| {
        let inputs = Inputs::new(device, case, DType::F16);
        let statistics = statistics(&inputs.args(case), 4);
        (inputs, statistics)
    };
    let run = |(inputs, statistics): &(Inputs, Option<GroupStatistics>), case: &Case| {
        let (height, statistics) = (case.input[1], statistics.as_ref());
        let stripe = Some(Stripe { height, first_row: 0, output: [1, 4], statistics });
        ops::conv2d(Conv2d { stripe, residual: None, ..inputs.args(case) }).map(drop)
    };
    for (card, case) in cards().into_iter().flat_map(|card| CASES.map(|case| (card.clone(), case))) {
        let meta = Device::meta();
        let Device::Meta(recorder) = &meta else { unreachable!() };
        let on_meta = made(&meta, &case);
        recorder.take_report();
        run(&on_meta, &case).unwrap();
        let counted = recorder.take_report().total().launches;
        let Device::Cuda(cuda) = &card else { unreachable!() };
        let on_card = made(&card, &case);
        let graph = cuda.capture(0, || run(&on_card, &case)).unwrap();
        assert_eq!(graph.kernels().len() as u64, counted, "{card} {case:?}: {:?}", graph.kernels());
    }
}

#[test]
fn stripes_that_do_not_fit_are_named() {
    let device = Device::cpu();
    let case = Case { groups: 2, ..WHOLE };
    let inputs = Inputs::new(&device, &case, DType::F32);
    let args = inputs.args(&case);
    let (whole, norm, statistics) = (&inputs.a, args.norm.unwrap(), statistics(&args, 2).unwrap());
    let ok = Stripe { height: 9, first_row: 0, output: [2, 4], statistics: Some(&statistics) };
    let run = |x: &Tensor, stripe: Stripe, groups: usize| {
        let norm = Some(ConvNorm { groups, ..norm }).filter(|_| groups > 0);
        ops::conv2d(Conv2d { x: x.into(), norm, stripe: Some(stripe), ..args })
    };
    assert!(run(whole, ok, 2).is_ok());
    let fails = |x: &Tensor, stripe: Stripe, groups: usize, expected: &str| {
        let error = run(x, stripe, groups).unwrap_err().to_string();
        assert!(error.contains(expected), "{error} does not contain {expected}");
    };
    fails(whole, Stripe { output: [4, 2], ..ok }, 2, "stripe.output is 4..2, expected a range within 0..9");
    fails(whole, Stripe { output: [4, 10], ..ok }, 2, "stripe.output is 4..10");
    fails(whole, Stripe { first_row: 1, ..ok }, 2, "stripe.first_row is 1, expected 9 rows from there on within 9");
    fails(whole, Stripe { statistics: None, ..ok }, 2, "stripe.statistics is none");
    fails(whole, ok, 0, "stripe.statistics is some");
    fails(whole, ok, 4, "statistics is 8 channels of f32 in 2 groups on cpu, expected 8 channels of f32 in 4 groups");
    let part = rows(whole, 2, 5);
    fails(
        &part,
        Stripe { first_row: 2, ..ok },
        2,
        "stripe is rows 2..5, expected rows 1..5 of the 9, for output rows 2..4",
    );
    let two = Tensor::concat(&[whole.clone(), whole.clone()]).unwrap();
    fails(&two, ok, 2, "x has shape [2, 9, 7, 8], expected one image");

    let mut moments = GroupMoments::new(norm, [1, 9, 7, 8]).unwrap();
    moments.add(&part).unwrap();
    let error = moments.add(whole).unwrap_err().to_string();
    assert!(error.contains("expected at most the 6 rows that are left of 9"), "{error}");
    let error = moments.finish().unwrap_err().to_string();
    assert!(error.contains("rows is 3, expected all 9 rows of the image"), "{error}");
    let error = GroupMoments::new(norm, [2, 9, 7, 8]).unwrap_err().to_string();
    assert!(error.contains("dims has shape [2, 9, 7, 8], expected one image"), "{error}");
    assert!(GroupMoments::new(ConvNorm { groups: 3, ..norm }, [1, 9, 7, 8]).is_err());
}
