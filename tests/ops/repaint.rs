//! repaint against plain f64 loops.

use crate::common::{Expected, Random, assert_close, cards, devices, f64s};
use megafuse::Error;
use megafuse::ops::{self, Repaint, StepIndex};
use megafuse::runtime::{DType, Device, MetaDevice, Tensor};

/// One element; primes; off a block's 256 elements; empty; SD's latents.
const SHAPES: [[usize; 4]; 5] = [[1, 1, 1, 1], [2, 3, 5, 7], [3, 17, 19, 4], [0, 8, 8, 4], [2, 32, 33, 4]];

const LEVELS: [f32; 6] = [0.9, 0.3, 0.6, 14.6, 1.0, 0.0];

/// A mask of ones and zeros, with a half in it, which is repainted.
fn mask(device: &Device, [_, h, w, _]: [usize; 4]) -> Tensor {
    let of = |i: usize| if i % 7 == 3 { 0.5 } else { f32::from(u8::from(!i.is_multiple_of(3))) };
    Tensor::from_f32(device, &[1, h, w, 1], DType::F32, &(0..h * w).map(of).collect::<Vec<_>>()).unwrap()
}

fn levels(device: &Device) -> Tensor {
    Tensor::from_f32(device, &[3, 2], DType::F32, &LEVELS).unwrap()
}

#[test]
fn repaint_matches_f64() {
    for device in devices() {
        for shape @ [n, h, w, c] in SHAPES {
            // One step for all images, and each its own.
            for steps in [vec![1], (0..n.max(1)).map(|image| (image + 2) % 3).collect()] {
                let mut random = Random::new(5);
                let [mut x, known, noise] = [0; 3].map(|_| random.randn(&device, &shape, DType::F32));
                let (mask, levels) = (mask(&device, shape), levels(&device));
                let step = StepIndex::new(&device, &steps).unwrap();
                let [before, known_values, noise_values, kept] = [&x, &known, &noise, &mask].map(f64s);
                let at = |i: usize| {
                    let (image, pixel) = (i / (h * w * c), i / c % (h * w));
                    let [signal, sigma] = [0, 1].map(|k| f64::from(LEVELS[2 * steps[image % steps.len()] + k]));
                    match kept[pixel] < 0.5 {
                        true => (signal * known_values[i], sigma * noise_values[i]),
                        false => (before[i], 0.0),
                    }
                };
                let args = Repaint { mask: &mask, known: &known, noise: &noise, levels: &levels, step: &step };
                ops::repaint(&mut x, args).unwrap();
                let want = Expected {
                    shape: shape.to_vec(),
                    values: (0..before.len()).map(|i| at(i).0 + at(i).1).collect(),
                    magnitudes: (0..before.len()).map(|i| at(i).0.abs() + at(i).1.abs()).collect(),
                };
                assert_close(&x, &want, 1.0, format!("{device} {shape:?} {steps:?}"));
            }
        }
    }
}

/// An image that has ended keeps its samples; what is not finite shows where it is kept.
#[test]
fn an_image_that_has_ended_is_left() {
    for device in devices() {
        let shape = [2, 3, 5, 4];
        let mut random = Random::new(6);
        let mut x = random.randn(&device, &shape, DType::F32);
        let known = Tensor::from_f32(&device, &shape, DType::F32, &[f32::NAN; 120]).unwrap();
        let zeros = Tensor::zeros(&device, &[1, 3, 5, 1], DType::F32).unwrap();
        let mut step = StepIndex::new(&device, &[0, 0]).unwrap();
        step.set_left(&[0, 2]).unwrap();
        let before = f64s(&x);
        let levels = levels(&device);
        let args = Repaint { mask: &zeros, known: &known, noise: &known, levels: &levels, step: &step };
        ops::repaint(&mut x, args).unwrap();
        let after = f64s(&x);
        assert_eq!(after[..60], before[..60], "{device}");
        assert!(after[60..].iter().all(|value| value.is_nan()), "{device}");
    }
}

#[test]
fn meta_records_what_a_card_launches() {
    let meta = MetaDevice::default();
    let device = Device::Meta(meta.clone());
    let zeros = |shape: &[usize]| Tensor::uninit(&device, shape, DType::F32).unwrap();
    let (mut x, known, mask, levels) =
        (zeros(&[2, 3, 5, 4]), zeros(&[2, 3, 5, 4]), zeros(&[1, 3, 5, 1]), zeros(&[1, 2]));
    let step = StepIndex::one(&device, 0).unwrap();
    let args = Repaint { mask: &mask, known: &known, noise: &known, levels: &levels, step: &step };
    ops::repaint(&mut x, args).unwrap();
    let records: Vec<_> = meta.take_report().ops.iter().map(|op| (op.op, op.work.bytes, op.work.launches)).collect();
    assert_eq!(records, [("repaint", 3 * 480 + 60, 1)]);
}

#[test]
fn arguments_that_do_not_fit_are_named() {
    for device in cards().into_iter().chain([Device::cpu()]) {
        let tensor = |shape: &[usize]| Tensor::zeros(&device, shape, DType::F32).unwrap();
        let (known, mask, levels) = (tensor(&[2, 3, 5, 4]), tensor(&[1, 3, 5, 1]), tensor(&[2, 2]));
        let step = StepIndex::one(&device, 1).unwrap();
        let good = Repaint { mask: &mask, known: &known, noise: &known, levels: &levels, step: &step };
        let x = || tensor(&[2, 3, 5, 4]);
        ops::repaint(&mut x(), good).unwrap();
        let refused = |x: &mut Tensor, args: Repaint| ops::repaint(x, args).unwrap_err();
        let other = tensor(&[2, 3, 5, 3]);
        let error = |args: Repaint| refused(&mut x(), args);
        assert!(matches!(error(Repaint { known: &other, ..good }), Error::Shape { arg: "known", .. }));
        assert!(matches!(error(Repaint { noise: &other, ..good }), Error::Shape { arg: "noise", .. }));
        assert!(matches!(error(Repaint { mask: &known, ..good }), Error::Shape { arg: "mask", .. }));
        assert!(matches!(error(Repaint { levels: &tensor(&[2, 3]), ..good }), Error::Shape { arg: "levels", .. }));
        let half = tensor(&[2, 3, 5, 4]).to_dtype(DType::F16).unwrap();
        assert!(matches!(refused(&mut half.clone(), good), Error::Dtype { arg: "x", .. }));
        let beyond = StepIndex::one(&device, 2).unwrap();
        assert!(matches!(error(Repaint { step: &beyond, ..good }), Error::Argument { arg: "step", .. }));
        let three = StepIndex::new(&device, &[0, 0, 0]).unwrap();
        assert!(matches!(error(Repaint { step: &three, ..good }), Error::Argument { .. }));
        let shared = x();
        assert!(matches!(refused(&mut shared.clone(), good), Error::Argument { arg: "x", .. }));
    }
}
