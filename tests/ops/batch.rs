//! An image has the same bits in every batch: tiles, splits and blocks are chosen by one image's sizes, or make no
//! difference.

use crate::common::{Random, devices};
use megafuse::ops::{
    self, Activation, Attention, AttentionOptions, Conv2d, ConvNorm, GroupNorm, Linear, Modulation, SecondSource,
    StepIndex, StepRows,
};
use megafuse::runtime::{DType, Device, Tensor};

const BATCHES: [usize; 3] = [2, 3, 5];

/// `run(x, first)` for images `first..` of a batch; `shape`: of one image. Every image alone, then in batches.
fn check(device: &Device, dtype: DType, what: &str, shape: &[usize], run: impl Fn(&Tensor, usize) -> Tensor) {
    let count: usize = shape.iter().product();
    let most = BATCHES[BATCHES.len() - 1];
    let values = Random::new(21).randn(&Device::cpu(), &[most * count], DType::F32).to_f32_vec().unwrap();
    let batch = |first: usize, n: usize| {
        let shape = [&[n], shape].concat();
        let x = Tensor::from_f32(device, &shape, dtype, &values[first * count..(first + n) * count]).unwrap();
        run(&x, first).to_f32_vec().unwrap()
    };
    let alone: Vec<Vec<f32>> = (0..most).map(|image| batch(image, 1)).collect();
    for n in BATCHES {
        let all = batch(0, n);
        for (image, got) in all.chunks_exact(all.len() / n).enumerate() {
            assert!(got == alone[image], "{device} {dtype} {what}: image {image} of {n} has other bits than alone");
        }
    }
}

fn each(run: impl Fn(&Device, DType)) {
    for device in devices() {
        [DType::F32, DType::BF16].into_iter().for_each(|dtype| run(&device, dtype));
    }
}

/// The tile's choice depends on the batch, the parts of a sum do not; a row is that of the image's own step.
#[test]
fn conv2d_has_the_same_bits_in_every_batch() {
    each(|device, dtype| {
        // Of many pixels, of few with sums in several parts, of channels that are no whole chunks.
        for [h, w, c, outputs, k] in [[24, 23, 32, 64, 3], [4, 4, 128, 96, 3], [7, 5, 12, 20, 3], [9, 8, 64, 136, 1]] {
            let mut random = Random::new(22);
            let weight = random.tensor(device, &[outputs, k, k, c], dtype, 0.0, 0.05);
            let [gamma, beta] = [1.0, 0.0].map(|mean| random.tensor(device, &[c], dtype, mean, 0.5));
            let (bias, table) = (random.randn(device, &[outputs], dtype), random.randn(device, &[5, outputs], dtype));
            let modulations = random.randn(device, &[5, 2 * c], dtype);
            let norm = ConvNorm {
                gamma: &gamma,
                beta: &beta,
                groups: 4,
                eps: 1e-5,
                modulation: None,
                activation: Activation::Silu,
            };
            for (norm, modulated) in [(None, false), (Some(norm), false), (Some(norm), true)] {
                let what = format!("{h}x{w}x{c} norm {} modulated {modulated}", norm.is_some());
                check(device, dtype, &what, &[h, w, c], |x, first| {
                    let steps: Vec<usize> = (first..first + x.shape()[0]).collect();
                    let step = StepIndex::new(device, &steps).unwrap();
                    let rows = StepRows { table: &modulations, step: &step, rows: 1 };
                    let modulation = modulated.then_some(Modulation { rows, scale: 0, shift: c });
                    let norm = norm.map(|norm| ConvNorm { modulation, ..norm });
                    let row = Some(StepRows { table: &table, step: &step, rows: 1 });
                    ops::conv2d(Conv2d { bias: Some(&bias), norm, row, ..Conv2d::new(x, &weight) }).unwrap()
                });
            }
        }
    });
}

/// 16x16 pixels of 1280 channels, the largest of the UNet's that are split: the batch leaves the two launches as they are.
#[test]
fn a_convolution_is_split_by_the_size_of_one_image() {
    let device = Device::meta();
    let Device::Meta(meta) = &device else { unreachable!() };
    let zeros = |shape: &[usize]| Tensor::zeros(&device, shape, DType::BF16).unwrap();
    let weight = zeros(&[1280, 3, 3, 1280]);
    for n in [1, 2, 3, 5, 16] {
        let x = zeros(&[n, 16, 16, 1280]);
        meta.take_report();
        ops::conv2d(Conv2d::new(&x, &weight)).unwrap();
        assert_eq!(meta.take_report().ops[0].work.launches, 2, "{n} images");
    }
}

#[test]
fn linear_has_the_same_bits_in_every_batch() {
    each(|device, dtype| {
        for ([l, k, n], activation) in [
            ([77, 64, 96], Activation::None),
            ([300, 32, 128], Activation::Geglu),
            ([1, 320, 640], Activation::Silu),
            ([13, 23, 30], Activation::Gelu),
        ] {
            let mut random = Random::new(23);
            let weight = random.tensor(device, &[n, k], dtype, 0.0, 0.1);
            let bias = random.randn(device, &[n], dtype);
            check(device, dtype, &format!("{l}x{k} to {n}"), &[l, k], |x, _| {
                ops::linear(Linear { bias: Some(&bias), activation, ..Linear::new(x, &weight) }).unwrap()
            });
        }
    });
}

#[test]
fn attention_has_the_same_bits_in_every_batch() {
    each(|device, dtype| {
        for [l, heads, d] in [[130, 2, 40], [77, 3, 64], [20, 1, 23], [33, 1, 176]] {
            for causal in [false, true] {
                let what = format!("self {l} {heads} {d} causal {causal}");
                check(device, dtype, &what, &[l, 3, heads, d], |qkv, _| {
                    ops::attention(Attention::Packed { qkv, causal }).unwrap()
                });
            }
            let kv = Random::new(24).randn(device, &[1, 77, 2, heads, d], dtype);
            check(device, dtype, &format!("cross {l} {heads} {d}"), &[l, heads, d], |q, _| {
                ops::attention(Attention::Cross { q, kv: &kv }).unwrap()
            });
            for (more, weight) in [(16, Some(0.7)), (40, None)] {
                let kv2 = Random::new(26).randn(device, &[1, more, 2, heads, d], dtype);
                let second = Some(SecondSource { kv: &kv2, weight });
                check(device, dtype, &format!("cross {l} {heads} {d}, {more} more"), &[l, heads, d], |q, _| {
                    let options = AttentionOptions { second, ..AttentionOptions::default() };
                    ops::attention_with(Attention::Cross { q, kv: &kv }, options).unwrap()
                });
            }
        }
    });
}

#[test]
fn group_norm_has_the_same_bits_in_every_batch() {
    each(|device, dtype| {
        // One launch; statistics apart, in several parts; channels that are no whole vectors.
        for [h, w, c] in [[9, 7, 64], [40, 33, 32], [35, 31, 12]] {
            let mut random = Random::new(25);
            let [gamma, beta] = [1.0, 0.0].map(|mean| random.tensor(device, &[c], dtype, mean, 0.5));
            let table = random.randn(device, &[5, 2 * c], dtype);
            for (modulated, activation) in [(false, Activation::Silu), (true, Activation::Gelu)] {
                check(device, dtype, &format!("{h}x{w}x{c} {activation:?}"), &[h, w, c], |x, first| {
                    let steps: Vec<usize> = (first..first + x.shape()[0]).collect();
                    let step = StepIndex::new(device, &steps).unwrap();
                    let rows = StepRows { table: &table, step: &step, rows: 1 };
                    let modulation = modulated.then_some(Modulation { rows, scale: 0, shift: c });
                    let (x, gamma, beta) = (x.into(), &gamma, &beta);
                    ops::group_norm(GroupNorm { x, gamma, beta, groups: 4, eps: 1e-5, modulation, activation }).unwrap()
                });
            }
        }
    });
}
