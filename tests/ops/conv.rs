//! conv2d against plain f64 loops: every kernel, stride, dilation and padding, every fused option alone and together.

use crate::common::{F32_EPS, Random, assert_close, cards, devices, hoppers, kernels, unaligned};
use megafuse::Error;
use megafuse::ops::{self, Activation, Conv2d, ConvNorm, Modulation, Source, StepIndex, StepRows};
use megafuse::runtime::cuda::Isa;
use megafuse::runtime::{DType, Device, OpKind, Tensor};

#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// N, H, W
    pub input: [usize; 3],
    /// Of the first source; of the second, 0 for none.
    pub channels: [usize; 2],
    pub outputs: usize,
    pub kernel: [usize; 2],
    pub stride: usize,
    pub dilation: usize,
    pub padding: [usize; 4],
    pub resize_to: Option<[usize; 2]>,
    /// Of the norm, 0 for none.
    pub groups: usize,
    /// The norm: by a table's row of each image.
    pub modulated: bool,
    pub activation: Activation,
    pub bias: bool,
    pub row: bool,
    pub residual: bool,
    pub scale: f32,
    pub negative_slope: f32,
}

pub const PLAIN: Case = Case {
    input: [1, 5, 7],
    channels: [3, 0],
    outputs: 5,
    kernel: [3, 3],
    stride: 1,
    dilation: 1,
    padding: [1; 4],
    resize_to: None,
    groups: 0,
    modulated: false,
    activation: Activation::None,
    bias: false,
    row: false,
    residual: false,
    scale: 1.0,
    negative_slope: 1.0,
};

/// The tensors of a case.
pub struct Inputs {
    pub a: Tensor,
    pub b: Tensor,
    pub weight: Tensor,
    pub gamma: Tensor,
    pub beta: Tensor,
    /// Eight values, scales, shifts of every channel.
    pub modulation: Tensor,
    pub bias: Tensor,
    pub row: Tensor,
    pub step: StepIndex,
    /// Conditioning rows of a step.
    pub rows: usize,
    pub residual: Tensor,
}

impl Inputs {
    pub fn new(device: &Device, case: &Case, dtype: DType) -> Inputs {
        let mut random = Random::new(17);
        let [n, h, w] = case.input;
        let [c_a, c_b] = case.channels;
        let c = c_a + c_b;
        let [kh, kw] = case.kernel;
        let weight_std = 1.0 / ((kh * kw * c).max(1) as f64).sqrt();
        let mut inputs = Inputs {
            a: random.randn(device, &[n, h, w, c_a], dtype),
            b: random.tensor(device, &[n, h, w, c_b], dtype, 0.5, 1.0),
            weight: random.tensor(device, &[case.outputs, kh, kw, c], dtype, 0.0, weight_std),
            gamma: random.tensor(device, &[c], dtype, 1.0, 0.5),
            beta: random.tensor(device, &[c], dtype, 0.0, 0.5),
            bias: random.randn(device, &[case.outputs], dtype),
            modulation: Random::new(18).tensor(device, &[3 * n, 8 + 2 * c], dtype, 0.0, 0.3),
            // The second of three steps.
            row: random.randn(device, &[3 * n, case.outputs], dtype),
            step: StepIndex::one(device, 1).unwrap(),
            rows: n.max(1),
            residual: Tensor::zeros(device, &[0], dtype).unwrap(),
        };
        let plain = Case { residual: false, ..*case };
        let shape = ops::conv2d(inputs.args(&plain)).unwrap().shape().to_vec();
        inputs.residual = random.randn(device, &shape, dtype);
        inputs
    }

    pub fn args(&self, case: &Case) -> Conv2d<'_> {
        let by_image = |table| StepRows { table, step: &self.step, rows: self.rows };
        let c = case.channels[0] + case.channels[1];
        Conv2d {
            x: if case.channels[1] > 0 { Source::Two(&self.a, &self.b) } else { Source::One(&self.a) },
            weight: &self.weight,
            bias: case.bias.then_some(&self.bias),
            stride: case.stride,
            dilation: case.dilation,
            padding: case.padding,
            norm: (case.groups > 0).then_some(ConvNorm {
                gamma: &self.gamma,
                beta: &self.beta,
                groups: case.groups,
                eps: 1e-5,
                modulation: case.modulated.then(|| Modulation {
                    rows: by_image(&self.modulation),
                    scale: 8,
                    shift: 8 + c,
                }),
                activation: case.activation,
            }),
            resize_to: case.resize_to,
            row: case.row.then(|| by_image(&self.row)),
            residual: case.residual.then_some(&self.residual),
            scale: case.scale,
            negative_slope: case.negative_slope,
            stripe: None,
        }
    }
}

/// Allowed arithmetic error in units of [`F32_EPS`] times the magnitude: 8 for a chain of products and the norm's rounding
/// of each factor; on a card a normalised factor is also rounded to the dtype, and so is a sum of weights that Hopper's
/// kernels make to enlarge an input: half an ulp of every term.
fn allowed(device: &Device, case: &Case, dtype: DType) -> f64 {
    let doubled = case.resize_to == Some([2 * case.input[1], 2 * case.input[2]]);
    let rounded = matches!(device, Device::Cuda(_)) && (case.groups > 0 || doubled) && dtype != DType::F32;
    // As of a group norm alone.
    let gelu = if rounded && case.activation == Activation::Gelu { 5e-6 / F32_EPS } else { 0.0 };
    8.0 + gelu + if rounded { dtype.ulp() / 2.0 / F32_EPS } else { 0.0 }
}

fn run(device: &Device, case: &Case, dtype: DType) {
    let inputs = Inputs::new(device, case, dtype);
    let args = inputs.args(case);
    let want = crate::common::conv2d(&args);
    assert_close(&ops::conv2d(args).unwrap(), &want, allowed(device, case, dtype), format!("{device} {case:?}"));
}

fn run_all(cases: &[Case]) {
    for device in devices() {
        for case in cases {
            DType::FLOATS.iter().for_each(|&dtype| run(&device, case, dtype));
        }
    }
}

#[test]
fn kernels_strides_dilations_and_paddings() {
    for device in devices() {
        // A card's general way and the way of whole 16-byte chunks.
        let channels = match device {
            Device::Cpu(_) => [(DType::F32, [3, 0]), (DType::BF16, [2, 3])],
            _ => [(DType::F32, [4, 4]), (DType::BF16, [2, 3])],
        };
        let wide = matches!(device, Device::Cuda(_)).then_some((DType::F16, [8, 16]));
        for kernel in [[1, 1], [3, 3], [1, 3], [2, 2], [4, 1]] {
            for (stride, dilation) in [(1, 1), (2, 1), (3, 1), (1, 2), (1, 3), (2, 2), (5, 1)] {
                for padding in [[0; 4], [1; 4], [0, 1, 0, 1], [2, 0, 3, 1], [7, 7, 9, 9]] {
                    let case = Case { input: [1, 10, 9], kernel, stride, dilation, padding, ..PLAIN };
                    let reach = |kernel: usize| dilation * (kernel - 1) + 1;
                    if 10 + padding[0] + padding[1] < reach(kernel[0]) || 9 + padding[2] + padding[3] < reach(kernel[1])
                    {
                        continue;
                    }
                    for (dtype, channels) in channels.into_iter().chain(wide) {
                        run(&device, &Case { channels, ..case }, dtype);
                    }
                }
            }
        }
    }
}

/// HiDiffusion's downsampler, on every rest of a size by 4: a quarter of the sides, rounded up.
#[test]
fn a_downsampler_of_stride_4_and_dilation_2() {
    let sizes = [16, 17, 18, 19].map(|side| [1, side, 35 - side]);
    run_all(&sizes.map(|input| {
        let case = Case { input, channels: [8, 0], outputs: 16, stride: 4, dilation: 2, padding: [2; 4], ..PLAIN };
        Case { bias: true, ..case }
    }));
    let device = Device::cpu();
    let weight = Tensor::zeros(&device, &[1, 3, 3, 1], DType::F32).unwrap();
    for (side, want) in [(1, 1), (4, 1), (5, 2), (100, 25), (125, 32), (127, 32), (128, 32), (135, 34), (240, 60)] {
        let x = Tensor::zeros(&device, &[1, side, 1, 1], DType::F32).unwrap();
        let y = ops::conv2d(Conv2d { stride: 4, dilation: 2, padding: [2; 4], ..Conv2d::new(&x, &weight) }).unwrap();
        assert_eq!(y.shape(), [1, want, 1, 1], "{side}");
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
        // Slices of k that end inside a tap and inside a source.
        Case { input: [2, 6, 5], channels: [24, 40], outputs: 72, ..PLAIN },
        // The UNet's and the VAE's downsamplers.
        Case { input: [2, 9, 8], channels: [32, 0], outputs: 32, stride: 2, ..PLAIN },
        Case { input: [2, 9, 8], channels: [32, 0], outputs: 32, stride: 2, padding: [0, 1, 0, 1], ..PLAIN },
    ]);
}

/// All fused options at once, a card's general way.
const TOGETHER: Case = Case {
    input: [2, 6, 5],
    channels: [7, 5],
    outputs: 20,
    resize_to: Some([11, 9]),
    groups: 4,
    activation: Activation::Silu,
    bias: true,
    row: true,
    residual: true,
    scale: 0.7,
    negative_slope: 0.2,
    ..PLAIN
};

#[test]
fn every_fused_option_alone_and_together() {
    let base = Case { input: [2, 6, 5], channels: [12, 0], outputs: 20, ..PLAIN };
    let cases = [
        base,
        Case { channels: [7, 5], ..base },
        Case { groups: 4, ..base },
        Case { groups: 4, activation: Activation::Silu, ..base },
        Case { groups: 4, activation: Activation::Silu, channels: [7, 5], ..base },
        Case { groups: 4, activation: Activation::Gelu, ..base },
        Case { groups: 4, modulated: true, ..base },
        Case { groups: 4, modulated: true, activation: Activation::Gelu, channels: [7, 5], ..base },
        Case { modulated: true, activation: Activation::Gelu, channels: [8, 24], outputs: 24, ..TOGETHER },
        Case { groups: 12, activation: Activation::Silu, stride: 2, padding: [0, 1, 0, 1], ..base },
        Case { groups: 4, activation: Activation::Silu, dilation: 2, padding: [2; 4], ..base },
        Case { resize_to: Some([12, 10]), ..base },
        Case { resize_to: Some([7, 13]), ..base },
        Case { resize_to: Some([4, 3]), ..base },
        Case { resize_to: Some([6, 5]), ..base },
        Case { bias: true, ..base },
        Case { row: true, ..base },
        Case { residual: true, ..base },
        Case { scale: 0.5, ..base },
        Case { negative_slope: 0.2, ..base },
        Case { negative_slope: 0.0, bias: true, ..base },
        TOGETHER,
        Case { kernel: [1, 1], padding: [0; 4], ..TOGETHER },
        Case { stride: 2, dilation: 2, padding: [2, 1, 0, 3], ..TOGETHER },
        Case { channels: [8, 24], outputs: 24, ..TOGETHER },
    ];
    run_all(&cases);
}

/// Every image finds the row of its own step and of its conditioning, however many of either there are; with the sums in
/// one part and in several; the modulation of its norm too.
#[test]
fn rows_by_step_and_conditioning() {
    let case = Case { input: [6, 5, 3], channels: [8, 0], outputs: 24, bias: true, row: true, ..PLAIN };
    let modulated = Case { groups: 2, modulated: true, activation: Activation::Gelu, ..case };
    for (device, dtype) in devices().into_iter().flat_map(|d| DType::FLOATS.map(|dtype| (d.clone(), dtype))) {
        let mut inputs = Inputs::new(&device, &case, dtype);
        for steps in [&[2][..], &[0, 3], &[4, 0, 2], &[1, 1, 1], &[5, 4, 3, 2, 1, 0]] {
            for rows in [1, 2, 3, 6] {
                inputs.step = StepIndex::new(&device, steps).unwrap();
                inputs.rows = rows;
                inputs.row = Random::new(8).randn(&device, &[6 * rows, case.outputs], dtype);
                inputs.modulation = Random::new(9).tensor(&device, &[6 * rows, 8 + 2 * 8], dtype, 0.0, 0.3);
                for (case, splits) in [(&case, 1), (&case, 3), (&modulated, 1)] {
                    let args = inputs.args(case);
                    let want = crate::common::conv2d(&args);
                    let kernel = format!("conv2d.splits={splits}");
                    let got = ops::with_variants(&kernel, || ops::conv2d(args)).unwrap();
                    let what = format!("{device} steps {steps:?} rows {rows} splits {splits} norm {}", case.groups > 0);
                    assert_close(&got, &want, allowed(&device, case, dtype), what);
                }
            }
        }
    }
}

/// For `with_variants`: the kernels that every card has; where there is no choice, the op's own.
fn portable_kernels(device: &Device, dtype: DType) -> Vec<String> {
    kernels("conv2d", device, dtype).into_iter().filter(|kernel| !kernel.contains("sm90")).collect()
}

/// Hopper's; none where the card is another.
fn hopper_kernels(device: &Device, dtype: DType) -> Vec<String> {
    kernels("conv2d", device, dtype).into_iter().filter(|kernel| kernel.contains("sm90")).collect()
}

/// `None`: the kernel cannot make this convolution, and says so.
fn conv_by(kernel: &str, args: Conv2d) -> Option<Tensor> {
    match ops::with_variants(kernel, || ops::conv2d(args)) {
        Err(Error::Argument { arg: "MEGAFUSE_KERNEL", want, .. }) if want.contains("this convolution") => None,
        result => Some(result.unwrap()),
    }
}

/// Every portable tile of the card, with sums in one part and in several, at shapes that end inside its edges; without a
/// split all tiles make the same bits, with one too.
#[test]
fn every_tile_matches_f64_and_the_others_bit_for_bit() {
    let cases = [
        Case { groups: 0, channels: [24, 40], outputs: 136, ..TOGETHER },
        Case { input: [2, 9, 8], channels: [32, 0], outputs: 66, bias: true, ..PLAIN },
        Case { input: [3, 4, 4], channels: [64, 0], outputs: 33, row: true, stride: 2, ..PLAIN },
        Case { input: [1, 15, 17], channels: [8, 0], outputs: 264, kernel: [1, 1], padding: [0; 4], ..PLAIN },
    ];
    for (device, dtype) in cards().into_iter().flat_map(|card| DType::FLOATS.map(|dtype| (card.clone(), dtype))) {
        for case in &cases {
            let inputs = Inputs::new(&device, case, dtype);
            let args = inputs.args(case);
            let want = crate::common::conv2d(&args);
            // 5 does not divide the slices, 50 leaves parts without any.
            for splits in [1, 2, 5, 50] {
                let mut first: Option<Vec<f32>> = None;
                for tile in portable_kernels(&device, dtype) {
                    let kernel = format!("{tile},conv2d.splits={splits}");
                    let got = ops::with_variants(&kernel, || ops::conv2d(args)).unwrap();
                    let what = format!("{device} {kernel} {case:?}");
                    assert_close(&got, &want, allowed(&device, case, dtype), &what);
                    let got = got.to_f32_vec().unwrap();
                    assert!(*first.get_or_insert_with(|| got.clone()) == got, "{what} {dtype}: other bits");
                }
            }
        }
    }
}

/// What Hopper's kernels are for, each with channels and outputs that end inside a slice and a tile: maps that end inside a
/// block and are smaller than one; both sources; every stride, dilation and padding, every end. Splits; how many kernels.
const HOPPER: [(Case, &[usize], usize); 14] = [
    // Twice the edges: blocks of x that end inside, both sources, and sums in parts.
    (
        Case {
            input: [2, 9, 11],
            channels: [40, 72],
            outputs: 24,
            resize_to: Some([18, 22]),
            bias: true,
            scale: 0.7,
            negative_slope: 0.1,
            ..PLAIN
        },
        &[1, 2, 7],
        3,
    ),
    (
        Case { input: [1, 17, 5], channels: [8, 0], outputs: 168, resize_to: Some([34, 10]), row: true, ..PLAIN },
        &[1],
        3,
    ),
    // More tiles than a card has multiprocessors; in the second, more steps per tile than stages.
    (
        Case { input: [267, 1, 1], channels: [8, 0], kernel: [1, 1], padding: [0; 4], row: true, outputs: 16, ..PLAIN },
        &[1],
        2,
    ),
    (
        Case {
            input: [267, 1, 1],
            channels: [8, 0],
            kernel: [2, 3],
            padding: [1, 0, 1, 1],
            row: true,
            outputs: 8,
            residual: true,
            ..PLAIN
        },
        &[1],
        2,
    ),
    // Slices of both sources; a split that leaves parts without any.
    (
        Case {
            input: [2, 9, 11],
            channels: [40, 72],
            outputs: 24,
            bias: true,
            row: true,
            residual: true,
            scale: 0.7,
            ..PLAIN
        },
        &[1, 2, 7],
        5,
    ),
    // Blocks and boxes of 16 that end inside the map, and more outputs than a tile has.
    (Case { input: [1, 17, 18], channels: [8, 0], outputs: 168, residual: true, ..PLAIN }, &[1], 5),
    (Case { input: [1, 10, 9], channels: [16, 0], outputs: 8, padding: [2, 0, 3, 1], bias: true, ..PLAIN }, &[1, 2], 5),
    (Case { input: [3, 3, 2], channels: [64, 0], outputs: 32, row: true, ..PLAIN }, &[1], 5),
    (
        Case {
            input: [2, 7, 10],
            channels: [72, 0],
            outputs: 40,
            dilation: 2,
            padding: [2; 4],
            residual: true,
            ..PLAIN
        },
        &[1, 2],
        4,
    ),
    (
        Case { input: [1, 12, 19], channels: [8, 8], outputs: 16, dilation: 3, padding: [3; 4], bias: true, ..PLAIN },
        &[1],
        2,
    ),
    (
        Case {
            input: [3, 9, 8],
            channels: [32, 0],
            outputs: 40,
            stride: 2,
            padding: [0, 1, 0, 1],
            bias: true,
            ..PLAIN
        },
        &[1, 2],
        2,
    ),
    (Case { input: [2, 9, 13], channels: [24, 0], outputs: 8, stride: 4, row: true, residual: true, ..PLAIN }, &[1], 2),
    (
        Case {
            input: [2, 13, 11],
            channels: [8, 136],
            outputs: 16,
            kernel: [1, 1],
            padding: [0; 4],
            scale: 0.5,
            negative_slope: 0.2,
            residual: true,
            ..PLAIN
        },
        &[1, 3],
        2,
    ),
    (
        Case {
            input: [2, 11, 9],
            channels: [16, 0],
            outputs: 8,
            kernel: [4, 1],
            stride: 3,
            dilation: 2,
            padding: [2, 0, 3, 1],
            ..PLAIN
        },
        &[1],
        2,
    ),
];

/// Every tile of Hopper's that can. Whatever the tile, the bits are the same, and so they are for each image alone.
#[test]
fn hopper_tiles_match_f64_and_each_other_bit_for_bit() {
    for ((device, _), (i, (case, splits, count))) in
        hoppers().iter().flat_map(|h| HOPPER.iter().enumerate().map(move |c| (h, c)))
    {
        let dtype = [DType::BF16, DType::F16][i % 2];
        let inputs = Inputs::new(device, case, dtype);
        let args = inputs.args(case);
        let want = crate::common::conv2d(&args);
        for splits in *splits {
            let what = format!("{device} {case:?} {dtype} splits {splits}");
            let by =
                |kernel: &String| Some((kernel.clone(), conv_by(&format!("{kernel},conv2d.splits={splits}"), args)?));
            let results: Vec<_> = hopper_kernels(device, dtype).iter().filter_map(by).collect();
            assert_eq!(results.len(), *count, "{what}: {:?}", results.iter().map(|r| &r.0).collect::<Vec<_>>());
            let first = results[0].1.to_f32_vec().unwrap();
            for (kernel, got) in &results {
                assert_close(got, &want, allowed(device, case, dtype), format!("{what} {kernel}"));
                assert!(got.to_f32_vec().unwrap() == first, "{what} {kernel}: other bits");
            }
            // The op's own choice among them.
            let images = case.input[0];
            for image in (0..images).filter(|_| images > 1 && !case.row) {
                let [a, b] = [&inputs.a, &inputs.b].map(|x| x.rows(image..image + 1).unwrap());
                let residual = args.residual.map(|residual| residual.rows(image..image + 1).unwrap());
                let x = if case.channels[1] > 0 { Source::Two(&a, &b) } else { Source::One(&a) };
                let alone = Conv2d { x, residual: residual.as_ref(), ..args };
                let got = conv_by(&format!("conv2d.splits={splits}"), alone).unwrap().to_f32_vec().unwrap();
                assert!(got == first[image * got.len()..(image + 1) * got.len()], "{what}: image {image} alone");
            }
        }
    }
}

/// What a kernel right before wrote: Hopper's begin while that may still be at it.
#[test]
fn hopper_kernels_wait_for_the_launch_before() {
    let case = Case { input: [1, 3, 5], channels: [8, 0], outputs: 8, row: true, ..PLAIN };
    for (device, _) in hoppers() {
        for residual in [true, false] {
            let case = Case { residual, ..case };
            let inputs = Inputs::new(&device, &case, DType::BF16);
            let fresh = |x: &Tensor| ops::add(x, x).unwrap();
            // The kernel first: what the expected values read waits for the card.
            let (got, want) = if residual {
                let residual = fresh(&inputs.residual);
                let args = Conv2d { residual: Some(&residual), ..inputs.args(&case) };
                (ops::conv2d(args), crate::common::conv2d(&args))
            } else {
                let table = fresh(&inputs.row);
                let row = Some(StepRows { table: &table, step: &inputs.step, rows: inputs.rows });
                let args = Conv2d { row, ..inputs.args(&case) };
                (ops::conv2d(args), crate::common::conv2d(&args))
            };
            assert_close(&got.unwrap(), &want, 8.0, format!("{device} residual {residual}"));
        }
    }
}

/// Hopper's kernels are for rows of whole aligned 16 bytes, without a resize or to twice the edges; what is not so goes to the
/// portable ones. The meta device counts for twice the edges what they launch.
#[test]
fn hopper_kernels_run_where_tma_can_read() {
    let case = Case { input: [1, 5, 4], channels: [8, 16], outputs: 8, bias: true, row: true, residual: true, ..PLAIN };
    for (device, cuda) in hoppers() {
        let runs = |args: Conv2d, hopper: bool, what: &str| {
            let graph = cuda.capture(1 << 24, || ops::conv2d(args).map(drop)).unwrap();
            let found = graph.kernels().iter().any(|kernel| kernel.starts_with("conv2d_sm90_"));
            assert_eq!(found, hopper, "{what}: {:?}", graph.kernels());
            graph.kernels().len() as u64
        };
        let doubled = Case { resize_to: Some([10, 8]), residual: false, ..case };
        let on_meta = Device::meta();
        let inputs = Inputs::new(&on_meta, &doubled, DType::BF16);
        let Device::Meta(meta) = &on_meta else { unreachable!() };
        meta.take_report();
        ops::conv2d(inputs.args(&doubled)).unwrap();
        let counted = meta.take_report().total().launches;
        let inputs = Inputs::new(&device, &doubled, DType::BF16);
        assert_eq!(runs(inputs.args(&doubled), true, "twice the edges"), counted);
        assert_eq!(counted, 2, "{device}");
        for (case, dtype, hopper) in [
            (Case { residual: true, ..doubled }, DType::BF16, false),
            (Case { padding: [1, 1, 1, 0], ..doubled }, DType::BF16, false),
            (Case { dilation: 2, padding: [2; 4], ..doubled }, DType::BF16, false),
            (Case { resize_to: Some([10, 7]), ..doubled }, DType::BF16, false),
            (Case { kernel: [3, 1], padding: [1, 1, 0, 0], ..doubled }, DType::BF16, false),
            (case, DType::F16, true),
            (case, DType::F32, false),
            (Case { channels: [8, 12], ..case }, DType::BF16, false),
            (Case { channels: [4, 0], ..case }, DType::BF16, false),
            (Case { outputs: 12, ..case }, DType::BF16, false),
            (Case { resize_to: Some([5, 4]), ..case }, DType::BF16, true),
            (Case { resize_to: Some([6, 4]), ..case }, DType::BF16, false),
            (Case { stride: 8, ..case }, DType::BF16, true),
            (Case { stride: 9, ..case }, DType::BF16, false),
            (Case { kernel: [2, 2], padding: [127, 0, 0, 127], residual: false, ..case }, DType::BF16, true),
            (Case { kernel: [2, 2], padding: [128, 0, 0, 0], residual: false, ..case }, DType::BF16, false),
            // The box of 3 x 3 may lie anywhere.
            (Case { padding: [128, 0, 1, 1], residual: false, ..case }, DType::BF16, true),
        ] {
            let inputs = Inputs::new(&device, &case, dtype);
            runs(inputs.args(&case), hopper, &format!("{case:?} {dtype}"));
        }
        let inputs = Inputs::new(&device, &case, DType::BF16);
        let args = inputs.args(&case);
        let tensors = [&inputs.a, &inputs.b, &inputs.weight, &inputs.bias, &inputs.row, &inputs.residual];
        let [a, b, weight, bias, row, residual] = &tensors.map(unaligned);
        let row = StepRows { table: row, step: &inputs.step, rows: inputs.rows };
        for (what, args) in [
            ("x", Conv2d { x: Source::Two(a, &inputs.b), ..args }),
            ("x2", Conv2d { x: Source::Two(&inputs.a, b), ..args }),
            ("weight", Conv2d { weight, ..args }),
            ("bias", Conv2d { bias: Some(bias), ..args }),
            ("row", Conv2d { row: Some(row), ..args }),
            ("residual", Conv2d { residual: Some(residual), ..args }),
        ] {
            runs(args, false, &format!("{what} unaligned"));
        }
    }
}

#[test]
fn tensors_may_begin_at_any_element() {
    let case = Case { channels: [16, 8], outputs: 24, ..TOGETHER };
    for (device, dtype, splits) in
        devices().into_iter().flat_map(|d| [(DType::BF16, 1), (DType::F32, 3)].map(|(dtype, s)| (d.clone(), dtype, s)))
    {
        let kernel = format!("conv2d.splits={splits}");
        let inputs = Inputs::new(&device, &case, dtype);
        let args = inputs.args(&case);
        let run = |args: Conv2d| ops::with_variants(&kernel, || ops::conv2d(args)).unwrap().to_f32_vec().unwrap();
        let want = run(args);
        let norm = args.norm.unwrap();
        let tensors =
            [&inputs.a, &inputs.b, &inputs.weight, &inputs.bias, &inputs.row, &inputs.residual, &inputs.gamma];
        let [a, b, weight, bias, row, residual, gamma] = &tensors.map(unaligned);
        let row = StepRows { table: row, step: &inputs.step, rows: inputs.rows };
        for (what, args) in [
            ("x", Conv2d { x: Source::Two(a, &inputs.b), ..args }),
            ("x2", Conv2d { x: Source::Two(&inputs.a, b), ..args }),
            ("weight", Conv2d { weight, ..args }),
            ("bias", Conv2d { bias: Some(bias), ..args }),
            ("row", Conv2d { row: Some(row), ..args }),
            ("residual", Conv2d { residual: Some(residual), ..args }),
            ("gamma", Conv2d { norm: Some(ConvNorm { gamma, ..norm }), ..args }),
        ] {
            // The statistics of x may be gathered in another order.
            if what.starts_with('x') {
                let want = crate::common::conv2d(&args);
                let got = ops::with_variants(&kernel, || ops::conv2d(args)).unwrap();
                assert_close(&got, &want, allowed(&device, &case, dtype), format!("{device} {what} unaligned"));
            } else {
                assert!(run(args) == want, "{device} {dtype}: {what} unaligned");
            }
        }
    }
}

/// A pixel's NaN reaches the outputs whose kernel covers it, and no others; also where a slice of k ends inside a tap, on
/// the card's every tile.
#[test]
fn nan_and_infinity_reach_the_outputs_that_cover_them_and_no_others() {
    let (h, w, outputs) = (9, 8, 24);
    let spoiled = [(0, 0, f32::NAN), (4, 3, f32::INFINITY), (8, 7, f32::NAN)];
    // 37: the way without 16-byte chunks.
    let cases = DType::FLOATS.into_iter().flat_map(|dtype| [(dtype, 40), (dtype, 37)]);
    for (device, (dtype, c)) in devices().into_iter().flat_map(|d| cases.clone().map(move |case| (d.clone(), case))) {
        let mut x = vec![1.0; h * w * c];
        for (y, x_, value) in spoiled {
            x[(y * w + x_) * c..(y * w + x_ + 1) * c].fill(value);
        }
        let x = Tensor::from_f32(&device, &[1, h, w, c], dtype, &x).unwrap();
        let weight = Tensor::from_f32(&device, &[outputs, 3, 3, c], dtype, &vec![1.0; outputs * 9 * c]).unwrap();
        // Kernels that want whole chunks cannot take the odd rows.
        let mut kernels = if c == 40 { kernels("conv2d", &device, dtype) } else { vec![] };
        kernels.resize(kernels.len().max(2), String::new());
        let hopper = |kernel: &String| kernel.contains("sm90");
        let runs = kernels.iter().zip([1, 2].into_iter().cycle());
        let both = kernels.iter().filter(|kernel| hopper(kernel)).flat_map(|kernel| [(kernel, 1), (kernel, 2)]);
        for (kernel, dilation) in runs.filter(|(kernel, _)| !hopper(kernel)).chain(both) {
            let args = Conv2d { dilation, padding: [dilation; 4], ..Conv2d::new(&x, &weight) };
            let Some(y) = conv_by(kernel, args) else { continue };
            let y = y.to_f32_vec().unwrap();
            for (i, y) in y.into_iter().enumerate() {
                let (out_y, out_x) = (i / outputs / w, i / outputs % w);
                let covers = |(y, x, _): &(usize, usize, f32)| {
                    let near = |a: usize, b: usize| a.abs_diff(b) == dilation || a == b;
                    near(out_y, *y) && near(out_x, *x)
                };
                let sum: f32 = spoiled.iter().filter(|pixel| covers(pixel)).map(|pixel| pixel.2).sum();
                let ok = match () {
                    _ if sum.is_nan() => y.is_nan(),
                    _ if sum == f32::INFINITY => y == sum,
                    _ => y.is_finite(),
                };
                assert!(ok, "{device} {dtype} {c} {kernel} dilation {dilation}: pixel {out_y} {out_x} is {y}");
            }
        }
    }
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
    let norm =
        ConvNorm { gamma: &gamma, beta: &beta, groups: 8, eps: 1e-5, modulation: None, activation: Activation::Silu };
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
    // The second: sums in several parts on a card.
    for (device, [h, w, c]) in devices().into_iter().flat_map(|d| [[33, 37, 40], [3, 3, 256]].map(|s| (d.clone(), s))) {
        let [h, w] = if c == 40 && matches!(device, Device::Cuda(_)) { [13, 11] } else { [h, w] };
        let mut random = Random::new(3);
        let x = random.randn(&device, &[3, h, w, c], DType::F32);
        let weight = random.tensor(&device, &[96, 3, 3, c], DType::F32, 0.0, 0.05);
        let [gamma, beta] = [1.0, 0.0].map(|mean| random.tensor(&device, &[c], DType::F32, mean, 0.5));
        let norm = Some(ConvNorm {
            gamma: &gamma,
            beta: &beta,
            groups: 8,
            eps: 1e-5,
            modulation: None,
            activation: Activation::Silu,
        });
        let run = |x: &Tensor| ops::conv2d(Conv2d { norm, ..Conv2d::new(x, &weight) }).unwrap().to_f32_vec().unwrap();
        let all = run(&x);
        for image in 0..3 {
            let one = run(&x.rows(image..image + 1).unwrap());
            assert!(one == all[image * one.len()..(image + 1) * one.len()], "{device} image {image}");
        }
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert!(pool.install(|| run(&x)) == all, "{device} {threads} threads");
        }
    }
}

/// The meta device counts the launches that a card makes.
#[test]
fn a_card_launches_what_meta_counts() {
    let split = Case { input: [1, 3, 3], channels: [256, 0], outputs: 24, ..PLAIN };
    let one_tap = Case { kernel: [1, 1], padding: [0; 4], groups: 4, channels: [16, 0], ..PLAIN };
    let large = Case { input: [1, 33, 32], channels: [8, 0], groups: 2, outputs: 4, ..PLAIN };
    let cases = [
        PLAIN,
        TOGETHER,
        one_tap,
        split,
        Case { groups: 8, activation: Activation::Silu, ..split },
        large,
        Case { modulated: true, activation: Activation::Gelu, ..large },
        Case { kernel: [1, 1], padding: [0; 4], ..large },
        Case { input: [0, 4, 4], groups: 3, ..PLAIN },
        Case { input: [2, 4, 4], groups: 3, outputs: 0, ..PLAIN },
        Case { input: [2, 0, 4], kernel: [2, 1], groups: 3, ..PLAIN },
    ];
    for (card, case) in cards().into_iter().flat_map(|card| cases.map(|case| (card.clone(), case))) {
        let meta = Device::meta();
        let Device::Meta(recorder) = &meta else { unreachable!() };
        let inputs = Inputs::new(&meta, &case, DType::F16);
        recorder.take_report();
        ops::conv2d(inputs.args(&case)).unwrap();
        let counted = recorder.take_report().ops[0].work.launches;

        let Device::Cuda(cuda) = &card else { unreachable!() };
        let inputs = Inputs::new(&card, &case, DType::F16);
        let graph = cuda.capture(0, || ops::conv2d(inputs.args(&case)).map(drop)).unwrap();
        // One launch by clusters normalises a map above 1024 pixels on the card that the meta device stands for, else three.
        let by_clusters = case.groups > 0 && case.input[1] * case.input[2] > 1024;
        let want = counted + if by_clusters && !cuda.has(Isa::Sm90a) { 2 } else { 0 };
        assert_eq!(graph.kernels().len() as u64, want, "{card} {case:?}: {:?}", graph.kernels());
    }
}

#[test]
fn meta_records_the_fused_kernel() {
    let device = Device::meta();
    let zeros = |shape: &[usize]| Tensor::zeros(&device, shape, DType::F16).unwrap();
    let (a, b) = (zeros(&[2, 32, 32, 640]), zeros(&[2, 32, 32, 320]));
    let (weight, gamma, bias) = (zeros(&[640, 3, 3, 960]), zeros(&[960]), zeros(&[640]));
    let (row, residual) = (zeros(&[2, 640]), zeros(&[2, 32, 32, 640]));
    let modulations = zeros(&[1, 2 * 960]);
    let step = StepIndex::one(&device, 0).unwrap();
    let Device::Meta(meta) = &device else { unreachable!() };
    meta.take_report();
    let plain = Conv2d::new(Source::Two(&a, &b), &weight);
    let norm =
        ConvNorm { gamma: &gamma, beta: &gamma, groups: 32, eps: 1e-5, modulation: None, activation: Activation::Silu };
    let fused = Conv2d {
        bias: Some(&bias),
        norm: Some(norm),
        row: Some(StepRows { table: &row, step: &step, rows: 2 }),
        residual: Some(&residual),
        ..plain
    };
    let shared = Conv2d { row: Some(StepRows { table: &row, step: &step, rows: 1 }), ..plain };
    assert_eq!(ops::conv2d(plain).unwrap().shape(), [2, 32, 32, 640]);
    assert_eq!(ops::conv2d(fused).unwrap().shape(), [2, 32, 32, 640]);
    assert_eq!(ops::conv2d(Conv2d { stride: 2, padding: [0, 1, 0, 1], ..plain }).unwrap().shape(), [2, 16, 16, 640]);
    assert_eq!(ops::conv2d(Conv2d { resize_to: Some([63, 64]), ..plain }).unwrap().shape(), [2, 63, 64, 640]);
    ops::conv2d(shared).unwrap();
    let rows = StepRows { table: &modulations, step: &step, rows: 1 };
    let modulation = Some(Modulation { rows, scale: 960, shift: 0 });
    ops::conv2d(Conv2d { norm: Some(ConvNorm { modulation, activation: Activation::Gelu, ..norm }), ..fused }).unwrap();
    let report = meta.take_report();
    let (pixels, k) = (2 * 32 * 32, 9 * 960);
    let macs: Vec<u64> = report.ops[..4].iter().map(|op| op.work.macs).collect();
    assert_eq!(macs, [pixels, pixels, pixels / 4, 2 * 63 * 64].map(|pixels| pixels * 640 * k));
    let (plain, fused) = (report.ops[0].work, report.ops[1].work);
    assert_eq!((plain.flops, plain.launches), (2 * macs[0], 1));
    assert_eq!(plain.bytes, 2 * (pixels * 960 + 640 * k + pixels * 640));
    assert_eq!(fused.bytes - plain.bytes, 2 * (640 + 2 * 960 + 2 * 640 + pixels * 640));
    assert_eq!(report.ops[4].work.bytes - plain.bytes, 2 * 640, "one row for both images");
    assert_eq!(fused.flops - plain.flops, 3 * pixels * 640 + 12 * pixels * 960);
    assert_eq!(fused.launches, 2);
    let (modulated, fused) = (report.ops[5].work, report.ops[1].work);
    assert_eq!(modulated.bytes - fused.bytes, 2 * 2 * 960, "of one row for both images");
    assert_eq!(modulated.flops - fused.flops, 3 * pixels * 960, "scale, shift, and GELU's one more than SiLU's");
    assert_eq!(modulated.launches, 2);
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
    let step = StepIndex::one(&device, 1).unwrap();
    let tables = [[5, 7], [4, 6], [2, 7]].map(|shape| zeros(&shape, f));
    let [odd, narrow, short] = tables.each_ref().map(|table| StepRows { table, step: &step, rows: 2 });
    fails(Conv2d { row: Some(odd), ..ok }, "row has shape [5, 7], expected a multiple of 2 rows");
    fails(Conv2d { row: Some(narrow), ..ok }, "row has shape [4, 6], expected [4, 7]");
    fails(Conv2d { row: Some(short), ..ok }, "step is 1, expected below 1");
    for rows in [0, 3] {
        let row = Some(StepRows { rows, ..odd });
        fails(
            Conv2d { row, ..ok },
            &format!("conditioning rows is {rows}, expected 1 or more that divide the 2 images"),
        );
    }
    let three = StepIndex::new(&device, &[0; 3]).unwrap();
    let row = Some(StepRows { step: &three, rows: 1, ..odd });
    fails(Conv2d { row, ..ok }, "images with a step of their own is 3, expected a number that divides the 2 images");
    let late = StepIndex::new(&device, &[0, 5]).unwrap();
    fails(Conv2d { row: Some(StepRows { step: &late, rows: 1, ..odd }), ..ok }, "step is 5, expected below 5");
    fails(Conv2d { residual: Some(&x), ..ok }, "residual has shape [2, 4, 5, 6], expected [2, 4, 5, 7]");
    let seven = zeros(&[7], f);
    let norm =
        ConvNorm { gamma: &six, beta: &six, groups: 3, eps: 1e-5, modulation: None, activation: Activation::Silu };
    assert!(ops::conv2d(Conv2d { norm: Some(norm), ..ok }).is_ok());
    fails(Conv2d { norm: Some(ConvNorm { gamma: &seven, ..norm }), ..ok }, "gamma has shape [7], expected [6]");
    fails(Conv2d { norm: Some(ConvNorm { groups: 4, ..norm }), ..ok }, "that 4 groups divide");
    let table = zeros(&[4, 12], f);
    let modulation = Modulation { rows: StepRows { table: &table, step: &step, rows: 2 }, scale: 0, shift: 6 };
    let modulated = |modulation| Conv2d { norm: Some(ConvNorm { modulation: Some(modulation), ..norm }), ..ok };
    assert!(ops::conv2d(modulated(modulation)).is_ok());
    let expected = "conv2d: modulation has shape [4, 12], expected columns 7 to 13";
    fails(modulated(Modulation { shift: 7, ..modulation }), expected);
    let rows = StepRows { rows: 4, ..modulation.rows };
    fails(modulated(Modulation { rows, ..modulation }), "conditioning rows is 4");
    let quick = ConvNorm { activation: Activation::QuickGelu, ..norm };
    fails(Conv2d { norm: Some(quick), ..ok }, "conv2d: activation is QuickGelu, expected None, Silu or Gelu");
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
