//! group_norm and layer_norm against plain f64 loops.

use crate::common::{F32_EPS, Random, assert_close, cards, cases, devices, unaligned};
use megafuse::Error;
use megafuse::ops::{self, Activation, GroupNorm, LayerNorm, Modulation, Source, StepIndex, StepRows};
use megafuse::runtime::cuda::Isa;
use megafuse::runtime::{DType, Device, OpKind, Tensor};

/// N, H, W, channels of the first and of the second source (0: one source), groups: one element; primes; groups that
/// span both sources; more pixels than one partial sum takes; empty; the models' own widths.
const SHAPES: [[usize; 6]; 21] = [
    [1, 1, 1, 1, 0, 1],
    [2, 7, 5, 6, 0, 3],
    [1, 31, 33, 33, 0, 11],
    [3, 1, 255, 4, 0, 2],
    [2, 3, 5, 7, 5, 4],
    [1, 2, 3, 3, 9, 2],
    [2, 0, 3, 8, 0, 4],
    [0, 4, 4, 8, 8, 4],
    [2, 9, 16, 320, 0, 32],
    [1, 5, 7, 640, 320, 32],
    // More than 1024 pixels: split on a card; columns that are no multiple of a tile, alone and as vectors.
    [2, 67, 31, 48, 16, 32],
    [1, 25, 41, 35, 0, 5],
    [1, 41, 25, 256, 8, 33],
    [2, 32, 33, 4, 20, 2],
    // Vectors that would straddle the number of groups; a group too wide for one block.
    [1, 4, 5, 16, 8, 12],
    [1, 3, 2, 600, 0, 2],
    [1, 2, 2, 1024, 1280, 4],
    // On Hopper several blocks, of a window of groups: that a vector straddles, that are a vector and half of one; so many
    // pixels that not all stay in registers.
    [2, 43, 24, 16, 24, 4],
    [1, 9, 57, 64, 0, 8],
    [2, 32, 33, 32, 0, 8],
    [1, 2200, 1, 72, 184, 1],
];

/// Errors of f32 arithmetic in units of `F32_EPS`. 4: the mean in f32, the difference, the scale, the activation; modulated 2 more:
/// 1 + scale, and its product. A card's GELU for results of 16 bits errs by up to 5e-6 (kernels/common/math.cuh).
fn allowed(args: &GroupNorm) -> f64 {
    let modulation = if args.modulation.is_some() { 2.0 } else { 0.0 };
    let is_16_bit = args.x.first().dtype() != DType::F32;
    let gelu = if args.activation == Activation::Gelu && is_16_bit { 5e-6 / F32_EPS } else { 0.0 };
    4.0 + modulation + gelu
}

#[test]
fn group_norm_matches_f64() {
    for (device, dtype, [n, h, w, c_a, c_b, groups]) in cases(&SHAPES) {
        let [none, silu, gelu] = [Activation::None, Activation::Silu, Activation::Gelu];
        for (mean, activation) in [(0.0, none), (0.0, silu), (0.0, gelu), (1000.0, none), (-3.0, silu), (-3.0, gelu)] {
            let mut random = Random::new(11);
            let a = random.tensor(&device, &[n, h, w, c_a], dtype, mean, 2.0);
            let b = random.tensor(&device, &[n, h, w, c_b], dtype, mean + 1.0, 1.0);
            let [gamma, beta] = [1.0, 0.0].map(|mean| random.tensor(&device, &[c_a + c_b], dtype, mean, 0.5));
            let x = if c_b > 0 { Source::Two(&a, &b) } else { Source::One(&a) };
            let args = GroupNorm { x, gamma: &gamma, beta: &beta, groups, eps: 1e-5, modulation: None, activation };
            let what = format!("{device} {n} {h} {w} {c_a}+{c_b} groups {groups} mean {mean} {activation:?}");
            assert_close(&ops::group_norm(args).unwrap(), &crate::common::group_norm(&args), allowed(&args), what);
        }
    }
}

/// Every form of the norm, at steps of the images' own and at one for all; scale and shift anywhere in the table, also where vectors
/// do not begin; the three activations.
#[test]
fn modulated_group_norm_matches_f64() {
    for (device, dtype, [n, h, w, c_a, c_b, groups]) in cases(&SHAPES) {
        let c = c_a + c_b;
        for (scale, shift, steps, rows, activation) in [
            (0, c, n.max(1), n.max(1), Activation::Gelu),
            (c + 8, 8, 1, n.max(1), Activation::Silu),
            (3, c + 5, n.max(1), 1, Activation::None),
        ] {
            let mut random = Random::new(16);
            let a = random.tensor(&device, &[n, h, w, c_a], dtype, 1.0, 2.0);
            let b = random.tensor(&device, &[n, h, w, c_b], dtype, -1.0, 1.0);
            let [gamma, beta] = [1.0, 0.0].map(|mean| random.tensor(&device, &[c], dtype, mean, 0.5));
            let table = random.tensor(&device, &[3 * rows, 2 * c + 8], dtype, 0.0, 0.5);
            let steps: Vec<usize> = (0..steps).map(|image| (1 + image) % 3).collect();
            let step = StepIndex::new(&device, &steps).unwrap();
            let modulation = Some(Modulation { rows: StepRows { table: &table, step: &step, rows }, scale, shift });
            let x = if c_b > 0 { Source::Two(&a, &b) } else { Source::One(&a) };
            let args = GroupNorm { x, gamma: &gamma, beta: &beta, groups, eps: 1e-5, modulation, activation };
            let what =
                format!("{device} {n} {h} {w} {c_a}+{c_b} groups {groups} {steps:?} {rows} from {scale} and {shift}");
            assert_close(&ops::group_norm(args).unwrap(), &crate::common::group_norm(&args), allowed(&args), what);
        }
    }
}

/// Two of the images of a batch of four follow one prompt, two another, each pair at two steps.
#[test]
fn images_of_a_group_norm_are_modulated_by_their_step_and_conditioning() {
    for device in devices() {
        let [ones, zeros] = [1.0, 0.0].map(|x| Tensor::from_f32(&device, &[2], DType::F32, &[x; 2]).unwrap());
        let x = Tensor::from_f32(&device, &[4, 1, 2, 2], DType::F32, &[-1.0, -1.0, 1.0, 1.0].repeat(4)).unwrap();
        // Two rows for each of three steps: scales of 1, 2, ..., shifts of 10, 20, ...
        let table: Vec<f32> =
            (1..=6).flat_map(|row| [row as f32; 2].into_iter().chain([10.0 * row as f32; 2])).collect();
        let table = Tensor::from_f32(&device, &[6, 4], DType::F32, &table).unwrap();
        let step = StepIndex::new(&device, &[2, 0]).unwrap();
        let modulation =
            Some(Modulation { rows: StepRows { table: &table, step: &step, rows: 2 }, scale: 0, shift: 2 });
        let (x, activation) = ((&x).into(), Activation::None);
        let args = GroupNorm { x, gamma: &ones, beta: &zeros, groups: 1, eps: 0.0, modulation, activation };
        let y = ops::group_norm(args).unwrap().to_f32_vec().unwrap();
        let rows = [5.0, 1.0, 6.0, 2.0];
        let want: Vec<f32> =
            rows.iter().flat_map(|row| [-1.0, -1.0, 1.0, 1.0].map(|x| (1.0 + row) * x + 10.0 * row)).collect();
        assert_eq!(y, want, "{device}");
    }
}

/// A thousandfold outlier where a thread takes its first sample: the sums around it lose nothing of what is asked.
#[test]
fn group_norm_of_an_outlier_in_the_first_place() {
    for (device, dtype, [pixels]) in cases(&[[900], [2000]]) {
        let mut values: Vec<f32> = {
            let mut random = Random::new(12);
            (0..pixels * 16).map(|_| random.normal() as f32).collect()
        };
        values[..16].fill(1000.0);
        values[16 * (pixels - 1)..].fill(-3000.0);
        let x = Tensor::from_f32(&device, &[1, pixels, 1, 16], dtype, &values).unwrap();
        let [gamma, beta] = [1.0, 0.0].map(|value| Tensor::from_f32(&device, &[16], dtype, &[value; 16]).unwrap());
        let args = GroupNorm {
            x: (&x).into(),
            gamma: &gamma,
            beta: &beta,
            groups: 4,
            eps: 1e-5,
            modulation: None,
            activation: Activation::None,
        };
        let mut want = crate::common::group_norm(&args);
        // The sums run over differences from the outlier: F32_EPS of a deviation, which is 1 in the result.
        want.magnitudes.iter_mut().for_each(|magnitude| *magnitude += 1.0);
        assert_close(&ops::group_norm(args).unwrap(), &want, 4.0, format!("{device} {dtype} {pixels}"));
    }
}

/// One NaN or infinity leaves nothing finite in its group, and touches no other.
#[test]
fn a_value_that_is_not_finite_spoils_its_group() {
    for (device, dtype, [pixels]) in cases(&[[63], [1100]]) {
        for bad in [f32::NAN, f32::INFINITY] {
            for at in [0, pixels - 1] {
                let mut values: Vec<f32> = (0..2 * pixels * 16).map(|i| (i * 37 % 101) as f32).collect();
                values[at * 16 + 6] = bad;
                let x = Tensor::from_f32(&device, &[2, 1, pixels, 16], dtype, &values).unwrap();
                let gamma = Tensor::from_f32(&device, &[16], dtype, &[1.0; 16]).unwrap();
                let args = GroupNorm {
                    x: (&x).into(),
                    gamma: &gamma,
                    beta: &gamma,
                    groups: 4,
                    eps: 1e-5,
                    modulation: None,
                    activation: Activation::Silu,
                };
                for (i, y) in ops::group_norm(args).unwrap().to_f32_vec().unwrap().into_iter().enumerate() {
                    let in_group = i < pixels * 16 && i % 16 / 4 == 1;
                    assert_eq!(y.is_finite(), !in_group, "{device} {dtype} {bad} at pixel {at}: element {i} is {y}");
                }
            }
        }
    }
}

/// Tensors that begin at any element of their storage.
#[test]
fn tensors_need_no_alignment() {
    for (device, dtype, [n, h, w, c]) in cases(&[[2, 5, 7, 16], [1, 33, 32, 24]]) {
        let mut random = Random::new(14);
        let whole = [0, 1].map(|_| random.randn(&device, &[n, h, w, c], dtype));
        let [a, b] = whole.each_ref().map(unaligned);
        let [whole_gamma, beta] = [1.0, 0.0].map(|mean| random.tensor(&device, &[2 * c], dtype, mean, 0.5));
        let [gamma, beta] = [&whole_gamma, &beta].map(unaligned);
        let args = GroupNorm {
            x: Source::Two(&a, &b),
            gamma: &gamma,
            beta: &beta,
            groups: 4,
            eps: 1e-5,
            modulation: None,
            activation: Activation::Silu,
        };
        assert_close(&ops::group_norm(args).unwrap(), &crate::common::group_norm(&args), 4.0, &device);
        let (table, step) = (random.randn(&device, &[n, 4 * c], dtype), StepIndex::one(&device, 0).unwrap());
        for (table, x, gamma) in [(&table, [&a, &b], &gamma), (&unaligned(&table), whole.each_ref(), &whole_gamma)] {
            let rows = StepRows { table, step: &step, rows: n };
            let modulation = Some(Modulation { rows, scale: 0, shift: 2 * c });
            let args = GroupNorm { x: Source::Two(x[0], x[1]), gamma, beta: gamma, modulation, ..args };
            assert_close(&ops::group_norm(args).unwrap(), &crate::common::group_norm(&args), allowed(&args), &device);
        }
        let tokens = a.reshape(&[n * h * w / 2, 2 * c]).unwrap();
        let args = LayerNorm { gamma: Some(&gamma), beta: Some(&beta), ..LayerNorm::new(&tokens, 1e-5) };
        assert_close(&ops::layer_norm(args).unwrap(), &crate::common::layer_norm(&args), 4.0, &device);
    }
}

/// What the meta device counts is what a card launches.
#[test]
fn launches_are_those_the_meta_device_counts() {
    for device in cards() {
        let Device::Cuda(cuda) = &device else { unreachable!() };
        // Above 1024 pixels: three launches; one, by clusters, on the card that the meta device stands for.
        let clusters = ([2, 33, 32, 32], 4);
        for (shape, groups) in
            [([2, 32, 32, 24], 4), ([2, 33, 32, 24], 4), clusters, ([1, 3, 5, 600], 2), ([0, 3, 5, 8], 2)]
        {
            let run = |device: &Device, modulated: bool| {
                let zeros = |shape: &[usize]| Tensor::zeros(device, shape, DType::BF16).unwrap();
                let (x, gamma, table) = (zeros(&shape), zeros(&shape[3..]), zeros(&[1, 2 * shape[3]]));
                let step = StepIndex::one(device, 0).unwrap();
                move || {
                    let rows = StepRows { table: &table, step: &step, rows: 1 };
                    let modulation = modulated.then_some(Modulation { rows, scale: 0, shift: shape[3] });
                    let activation = if modulated { Activation::Gelu } else { Activation::Silu };
                    let (x, gamma, beta) = ((&x).into(), &gamma, &gamma);
                    ops::group_norm(GroupNorm { x, gamma, beta, groups, eps: 1e-5, modulation, activation })
                }
            };
            for modulated in [false, true] {
                let meta = Device::meta();
                run(&meta, modulated)().unwrap();
                let Device::Meta(recorder) = &meta else { unreachable!() };
                let counted = recorder.take_report().total().launches;
                let on_card = run(&device, modulated);
                let graph = cuda.capture(1 << 20, || on_card().map(drop)).unwrap();
                let want = match cuda.has(Isa::Sm90a) {
                    false if (shape, groups) == clusters => 3,
                    _ => counted,
                };
                if shape[0] > 0 {
                    assert_eq!(graph.kernels().len() as u64, want, "{shape:?}: {:?}", graph.kernels());
                }
            }
        }
    }
}

/// A group of equal values: variance 0, only eps below the root.
#[test]
fn group_norm_of_a_constant_is_beta() {
    for (device, pixels) in devices().into_iter().flat_map(|device| [(device.clone(), 9), (device, 1500)]) {
        let x = Tensor::from_f32(&device, &[1, pixels, 1, 4], DType::F32, &vec![1234.5; 4 * pixels]).unwrap();
        let gamma = Tensor::from_f32(&device, &[4], DType::F32, &[1.0, 2.0, 3.0, 4.0]).unwrap();
        let beta = Tensor::from_f32(&device, &[4], DType::F32, &[0.5, -0.5, 0.25, 0.0]).unwrap();
        let args = GroupNorm {
            x: (&x).into(),
            gamma: &gamma,
            beta: &beta,
            groups: 2,
            eps: 1e-6,
            modulation: None,
            activation: Activation::None,
        };
        let y = ops::group_norm(args).unwrap().to_f32_vec().unwrap();
        for pixel in y.chunks_exact(4) {
            assert_eq!(pixel, [0.5, -0.5, 0.25, 0.0], "{device}");
        }
    }
}

#[test]
fn an_image_does_not_depend_on_the_others_or_on_the_threads() {
    let in_pool = |threads: usize| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    for (device, dtype, [h, w, c]) in cases(&[[40, 50, 24], [40, 50, 80], [9, 11, 24]]) {
        let mut random = Random::new(3);
        let x = random.randn(&device, &[3, h, w, c], dtype);
        let [gamma, beta] = [1.0, 0.0].map(|mean| random.tensor(&device, &[c], dtype, mean, 0.5));
        let run = |x: &Tensor| {
            let args = GroupNorm {
                x: x.into(),
                gamma: &gamma,
                beta: &beta,
                groups: 8,
                eps: 1e-5,
                modulation: None,
                activation: Activation::Silu,
            };
            ops::group_norm(args).unwrap().to_f32_vec().unwrap()
        };
        let all = run(&x);
        for image in 0..3 {
            let one = run(&x.rows(image..image + 1).unwrap());
            assert_eq!(one, all[image * one.len()..(image + 1) * one.len()], "{device} {dtype} {c}: image {image}");
        }
        for threads in [1, 3] {
            assert_eq!(in_pool(threads).install(|| run(&x)), all, "{device} {dtype} {c}: {threads} threads");
        }
    }
}

#[test]
fn layer_norm_matches_f64() {
    // Rows that stay in a warp's registers end at 2048.
    let shapes: [&[usize]; 13] = [
        &[1],
        &[5, 1],
        &[2, 3, 7],
        &[3, 17],
        &[2, 31],
        &[2, 33],
        &[0, 8],
        &[2, 77, 768],
        &[1, 60, 320],
        &[9, 264],
        &[3, 1280],
        &[2, 2048],
        &[2, 2056],
    ];
    for (device, dtype, shape) in cases(&shapes) {
        for mean in [0.0, 1000.0] {
            let mut random = Random::new(13);
            let x = random.tensor(&device, shape, dtype, mean, 2.0);
            let c = shape[shape.len() - 1];
            let [gamma, beta] = [1.0, 0.0].map(|mean| random.tensor(&device, &[c], dtype, mean, 0.5));
            let args = LayerNorm { gamma: Some(&gamma), beta: Some(&beta), ..LayerNorm::new(&x, 1e-5) };
            let what = format!("{device} {shape:?} mean {mean}");
            assert_close(&ops::layer_norm(args).unwrap(), &crate::common::layer_norm(&args), 4.0, what);
        }
    }
    for device in devices() {
        let empty = Tensor::zeros(&device, &[3, 0], DType::F32).unwrap();
        let none = Tensor::zeros(&device, &[0], DType::F32).unwrap();
        let y = ops::layer_norm(LayerNorm { gamma: Some(&none), beta: Some(&none), ..LayerNorm::new(&empty, 1e-5) })
            .unwrap();
        assert_eq!(y.shape(), [3, 0]);
    }
}

/// Images, rows of each, C, conditioning rows; the ways of [`layer_norm_matches_f64`].
const MODULATED: [[usize; 4]; 8] = [
    [1, 1, 1, 1],
    [2, 3, 7, 2],
    [4, 9, 264, 2],
    [2, 5, 1536, 1],
    [3, 1, 2048, 3],
    [2, 2, 2056, 2],
    [2, 3, 33, 1],
    [0, 2, 8, 1],
];

/// With gamma and beta and without, at steps of the images' own; scale and shift anywhere in the table, also where vectors do not
/// begin.
#[test]
fn modulated_layer_norm_matches_f64() {
    for (device, dtype, [images, l, c, rows]) in cases(&MODULATED) {
        for (affine, scale, shift) in [(false, 0, c), (true, 8 + c, 8), (false, 3, c + 3)] {
            let mut random = Random::new(15);
            let x = random.tensor(&device, &[images, l, c], dtype, 1.0, 2.0);
            let [gamma, beta] = [1.0, 0.0].map(|mean| random.tensor(&device, &[c], dtype, mean, 0.5));
            let table = random.randn(&device, &[3 * rows, 2 * c + 8], dtype);
            let steps: Vec<usize> = (0..images.max(1)).map(|image| (1 + image) % 3).collect();
            let step = StepIndex::new(&device, &steps).unwrap();
            let modulation = Some(Modulation { rows: StepRows { table: &table, step: &step, rows }, scale, shift });
            let (gamma, beta) = (affine.then_some(&gamma), affine.then_some(&beta));
            let args = LayerNorm { gamma, beta, modulation, ..LayerNorm::new(&x, 1e-6) };
            let what = format!("{device} {images} {l} {c} {rows} affine {affine} from {scale} and {shift}");
            // 2 more: 1 + scale, and its product.
            assert_close(&ops::layer_norm(args).unwrap(), &crate::common::layer_norm(&args), 6.0, what);
            let plain = LayerNorm { modulation: None, ..args };
            assert_close(&ops::layer_norm(plain).unwrap(), &crate::common::layer_norm(&plain), 4.0, &device);
        }
    }
}

#[test]
fn meta_records_a_modulated_group_norm() {
    let device = Device::meta();
    let zeros = |shape: &[usize]| Tensor::zeros(&device, shape, DType::F16).unwrap();
    let (x, gamma, table) = (zeros(&[4, 2, 5, 64]), zeros(&[64]), zeros(&[6, 200]));
    let (step, activation) = (StepIndex::one(&device, 2).unwrap(), Activation::Gelu);
    let Device::Meta(meta) = &device else { unreachable!() };
    meta.take_report();
    let modulation = Some(Modulation { rows: StepRows { table: &table, step: &step, rows: 2 }, scale: 0, shift: 64 });
    let (x, gamma, beta) = ((&x).into(), &gamma, &gamma);
    ops::group_norm(GroupNorm { x, gamma, beta, groups: 4, eps: 1e-5, modulation, activation }).unwrap();
    let work = meta.take_report().of(OpKind::Norm);
    let values = 4 * 10 * 64;
    // 2 for scale and shift, 5 for GELU.
    assert_eq!((work.flops, work.bytes, work.launches), (15 * values, 2 * (2 * values + 2 * 64 + 2 * 2 * 64), 1));
}

#[test]
fn meta_records_modulation_that_is_read_once() {
    let device = Device::meta();
    let zeros = |shape: &[usize]| Tensor::zeros(&device, shape, DType::F16).unwrap();
    let (x, table, step) = (zeros(&[4, 10, 64]), zeros(&[6, 200]), StepIndex::one(&device, 2).unwrap());
    let Device::Meta(meta) = &device else { unreachable!() };
    meta.take_report();
    let modulation = Some(Modulation { rows: StepRows { table: &table, step: &step, rows: 2 }, scale: 0, shift: 64 });
    ops::layer_norm(LayerNorm { modulation, ..LayerNorm::new(&x, 1e-6) }).unwrap();
    let work = meta.take_report().of(OpKind::Norm);
    let values = 4 * 10 * 64;
    assert_eq!((work.flops, work.bytes, work.launches), (8 * values, 2 * (2 * values + 2 * 2 * 64), 1));
}

#[test]
fn arguments_of_a_modulation_that_do_not_fit_are_named() {
    let device = Device::cpu();
    let zeros = |shape: &[usize]| Tensor::zeros(&device, shape, DType::F32).unwrap();
    let (x, table, step) = (zeros(&[4, 2, 6]), zeros(&[6, 20]), StepIndex::one(&device, 0).unwrap());
    let ok = Modulation { rows: StepRows { table: &table, step: &step, rows: 2 }, scale: 14, shift: 0 };
    let norm = |modulation| ops::layer_norm(LayerNorm { modulation: Some(modulation), ..LayerNorm::new(&x, 1e-6) });
    assert!(norm(ok).is_ok());
    let late = StepIndex::one(&device, 3).unwrap();
    let wrong = [
        (Modulation { scale: 15, ..ok }, "modulation has shape [6, 20], expected columns 15 to 21"),
        (Modulation { shift: usize::MAX, ..ok }, "modulation has shape [6, 20]"),
        (Modulation { rows: StepRows { rows: 3, ..ok.rows }, ..ok }, "conditioning rows is 3"),
        (Modulation { rows: StepRows { step: &late, ..ok.rows }, ..ok }, "step is 3, expected below 3"),
    ];
    for (modulation, expected) in wrong {
        let error = norm(modulation).unwrap_err().to_string();
        assert!(error.contains(expected), "{error} does not contain {expected}");
    }
    let flat = LayerNorm { modulation: Some(ok), ..LayerNorm::new(&table, 1e-6) };
    let flat = LayerNorm { x: &zeros(&[6]), ..flat };
    let error = ops::layer_norm(flat).unwrap_err().to_string();
    assert!(error.contains("expected [images, ..., C] beside a modulation"), "{error}");

    let (x, gamma) = (zeros(&[4, 1, 1, 6]), zeros(&[6]));
    let args = GroupNorm {
        x: (&x).into(),
        gamma: &gamma,
        beta: &gamma,
        groups: 2,
        eps: 1e-5,
        modulation: Some(ok),
        activation: Activation::Gelu,
    };
    assert!(ops::group_norm(args).is_ok());
    let fails = |args: GroupNorm, expected: &str| {
        let error = ops::group_norm(args).unwrap_err().to_string();
        assert!(error.contains(expected), "{error} does not contain {expected}");
    };
    for (modulation, expected) in wrong {
        fails(GroupNorm { modulation: Some(modulation), ..args }, &format!("group_norm: {expected}"));
    }
    let halves = Tensor::zeros(&device, &[6, 20], DType::F16).unwrap();
    let rows = StepRows { table: &halves, ..ok.rows };
    fails(GroupNorm { modulation: Some(Modulation { rows, ..ok }), ..args }, "modulation is f16, expected f32");
    for activation in [Activation::QuickGelu, Activation::GeluTanh, Activation::Geglu, Activation::GegluTanh] {
        let expected = format!("activation is {activation:?}, expected None, Silu or Gelu");
        fails(GroupNorm { activation, ..args }, &expected);
    }
}

#[test]
fn meta_records_one_pass_over_the_operands() {
    let device = Device::meta();
    let zeros = |shape: &[usize]| Tensor::zeros(&device, shape, DType::F16).unwrap();
    let (a, b, gamma) = (zeros(&[2, 8, 8, 640]), zeros(&[2, 8, 8, 320]), zeros(&[960]));
    let Device::Meta(meta) = &device else { unreachable!() };
    meta.take_report();
    let args = GroupNorm {
        x: Source::Two(&a, &b),
        gamma: &gamma,
        beta: &gamma,
        groups: 32,
        eps: 1e-5,
        modulation: None,
        activation: Activation::Silu,
    };
    let y = ops::group_norm(args).unwrap();
    assert_eq!(y.shape(), [2, 8, 8, 960]);
    let tokens = y.reshape(&[2, 64, 960]).unwrap();
    ops::layer_norm(LayerNorm { gamma: Some(&gamma), beta: Some(&gamma), ..LayerNorm::new(&tokens, 1e-5) }).unwrap();
    let report = meta.take_report();
    let values = 2 * 64 * 960;
    assert_eq!(report.ops.iter().map(|op| op.op).collect::<Vec<_>>(), ["group_norm", "layer_norm"]);
    for (op, flops) in report.ops.iter().zip([12 * values, 8 * values]) {
        let work = op.work;
        let expected_bytes = 2 * (2 * values + 2 * 960);
        assert_eq!((work.macs, work.flops, work.bytes, work.launches), (0, flops, expected_bytes, 1));
        assert_eq!(op.kind, OpKind::Norm);
    }
}

#[test]
fn arguments_that_do_not_fit_are_named() {
    let device = Device::cpu();
    let zeros = |shape: &[usize], dtype| Tensor::zeros(&device, shape, dtype).unwrap();
    let f = DType::F32;
    let (x, x2, gamma, tokens) = (zeros(&[1, 2, 2, 6], f), zeros(&[1, 2, 3, 6], f), zeros(&[6], f), zeros(&[4, 6], f));
    let ok = GroupNorm {
        x: (&x).into(),
        gamma: &gamma,
        beta: &gamma,
        groups: 3,
        eps: 1e-5,
        modulation: None,
        activation: Activation::None,
    };
    assert!(ops::group_norm(ok).is_ok());
    let fails = |args: GroupNorm, expected: &str| {
        let error = ops::group_norm(args).unwrap_err();
        assert!(error.to_string().contains(expected), "{error} does not contain {expected}");
        error
    };
    fails(GroupNorm { x: (&tokens).into(), ..ok }, "group_norm: x has shape [4, 6], expected 4 dimensions");
    fails(GroupNorm { x: Source::Two(&x, &x2), ..ok }, "x2 has shape [1, 2, 3, 6], expected [1, 2, 2, 6]");
    fails(GroupNorm { gamma: &zeros(&[5], f), ..ok }, "gamma has shape [5], expected [6]");
    fails(GroupNorm { beta: &zeros(&[6], DType::BF16), ..ok }, "beta is bf16, expected f32");
    let error =
        fails(GroupNorm { groups: 4, ..ok }, "x has shape [1, 2, 2, 6], expected a channel count that 4 groups");
    assert!(matches!(error, Error::Shape { arg: "x", .. }));
    fails(GroupNorm { groups: 0, ..ok }, "0 groups");
    fails(GroupNorm { eps: -1.0, ..ok }, "eps is -1");
    fails(GroupNorm { eps: f32::NAN, ..ok }, "eps is NaN");
    let elsewhere = Tensor::zeros(&Device::cpu(), &[6], f).unwrap();
    assert!(matches!(fails(GroupNorm { gamma: &elsewhere, ..ok }, "gamma"), Error::Device { .. }));
    fails(GroupNorm { x: (&zeros(&[1, 2, 2, 6], DType::U32)).into(), ..ok }, "x is u32");

    let ok = LayerNorm { gamma: Some(&gamma), beta: Some(&gamma), ..LayerNorm::new(&tokens, 1e-5) };
    assert!(ops::layer_norm(ok).is_ok());
    let fails = |args: LayerNorm, expected: &str| {
        let error = ops::layer_norm(args).unwrap_err();
        assert!(error.to_string().contains(expected), "{error} does not contain {expected}");
    };
    fails(LayerNorm { x: &zeros(&[], f), ..ok }, "layer_norm: x has shape []");
    fails(LayerNorm { gamma: Some(&zeros(&[4], f)), ..ok }, "gamma has shape [4], expected [6]");
    fails(LayerNorm { beta: Some(&zeros(&[6], DType::F16)), ..ok }, "beta is f16, expected f32");
    fails(LayerNorm { x: &zeros(&[4, 6], DType::U32), ..ok }, "x is u32");
    fails(LayerNorm { eps: f32::INFINITY, ..ok }, "eps is inf");
}
