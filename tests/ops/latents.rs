//! mix_latents, latent_moments, standardise_latents and blur_latents against plain f64 loops.

use crate::common::{Expected, Random, assert_close, devices, f64s};
use megafuse::Error;
use megafuse::ops::{self, StepIndex, StepRows};
use megafuse::runtime::{DType, Device, MetaDevice, Tensor};

/// One pixel; primes; off a block's 256 and 512 elements; empty; more than one block.
const SHAPES: [[usize; 4]; 5] = [[1, 1, 2, 1], [2, 3, 5, 7], [3, 17, 19, 4], [0, 8, 8, 4], [2, 33, 31, 4]];

#[test]
fn mixes_by_the_step_of_each_image() {
    for device in devices() {
        for shape in SHAPES {
            let mut random = Random::new(1);
            let [x, a, b] = [0, 1, 2].map(|_| random.randn(&device, &shape, DType::F32));
            let values = [[0.5f32, 0.25, -1.5], [0.0, 0.75, 0.5], [1.25, 0.0, 0.5]];
            let table = Tensor::from_f32(&device, &[3, 3], DType::F32, values.as_flattened()).unwrap();
            let n = shape[0];
            let steps: Vec<usize> = (0..n.max(1)).map(|image| 2 - image % 3).collect();
            let own = StepIndex::new(&device, &steps).unwrap();
            let second = StepIndex::one(&device, 1).unwrap();
            for (step, with_b) in [(&own, true), (&own, false), (&second, true)] {
                let mut got = x.duplicate().unwrap();
                let factors = StepRows { table: &table, step, rows: 1 };
                ops::mix_latents(&mut got, &a, with_b.then_some(&b), factors).unwrap();
                let (x, a, b) = (f64s(&x), f64s(&a), f64s(&b));
                let per_image: usize = shape[1..].iter().product();
                let terms = |i: usize| {
                    let k = values[step.get(i / per_image)].map(f64::from);
                    [k[0] * x[i], k[1] * a[i], if with_b { k[2] * b[i] } else { 0.0 }]
                };
                let want = Expected {
                    shape: shape.to_vec(),
                    values: (0..x.len()).map(|i| terms(i).iter().sum()).collect(),
                    magnitudes: (0..x.len()).map(|i| terms(i).iter().map(|term| term.abs()).sum()).collect(),
                };
                assert_close(&got, &want, 2.0, format!("{device} {shape:?} {step:?} with b {with_b}"));
            }
        }
    }
}

/// A factor of 0 is not read: memory that nobody has written yet counts as nothing.
#[test]
fn what_has_the_factor_0_is_not_read() {
    for device in devices() {
        let ones = |value| Tensor::from_f32(&device, &[1, 2], DType::F32, &[value; 2]).unwrap();
        for at in 0..3 {
            let parts = [0, 1, 2].map(|part| ones(if part == at { f32::NAN } else { 1.0 }));
            let [mut x, a, b] = parts;
            let factors: Vec<f32> = (0..3).map(|part| if part == at { 0.0 } else { 2.0 }).collect();
            let table = Tensor::from_f32(&device, &[1, 3], DType::F32, &factors).unwrap();
            let step = StepIndex::one(&device, 0).unwrap();
            ops::mix_latents(&mut x, &a, Some(&b), StepRows { table: &table, step: &step, rows: 1 }).unwrap();
            assert_eq!(x.to_f32_vec().unwrap(), [4.0, 4.0], "{device} {at}");
        }
    }
}

fn moments(values: &[f64], padding: usize) -> [f64; 2] {
    let count = (values.len() + padding) as f64;
    let mean = values.iter().sum::<f64>() / count;
    let squares = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() + padding as f64 * mean * mean;
    [mean, (squares / (count - 1.0)).sqrt()]
}

#[test]
fn moments_count_the_padding() {
    for device in devices() {
        for shape in SHAPES {
            for (mean, padding) in [(0.0, 0), (10.0, 0), (-3.0, 37)] {
                let x = Random::new(2).tensor(&device, &shape, DType::F32, mean, 1.0);
                let got = ops::latent_moments(&x, padding).unwrap();
                let per_image: usize = shape[1..].iter().product();
                let all = f64s(&x);
                let (mut values, mut magnitudes) = (Vec::new(), Vec::new());
                for image in all.chunks(per_image.max(1)) {
                    let [mean, std] = moments(image, padding);
                    let largest = image.iter().fold(0.0f64, |most, x| most.max(x.abs()));
                    values.extend([mean, std]);
                    // The mean is a sum of terms of this size, in threads of a few elements and a tree over them.
                    magnitudes.extend([largest, largest + std]);
                }
                let want = Expected { shape: vec![shape[0], 2], values, magnitudes };
                assert_close(&got, &want, 16.0, format!("{device} {shape:?} mean {mean} padding {padding}"));
            }
        }
    }
}

#[test]
fn standardised_latents_have_the_moments_they_are_given() {
    for device in devices() {
        for shape in SHAPES {
            let mut random = Random::new(3);
            let x = random.tensor(&device, &shape, DType::F32, 4.0, 2.5);
            let to = random.tensor(&device, &[shape[0], 2], DType::F32, 1.0, 0.2);
            let got = ops::standardise_latents(&x, &ops::latent_moments(&x, 0).unwrap(), &to).unwrap();
            let per_image: usize = shape[1..].iter().product();
            let (x, to) = (f64s(&x), f64s(&to));
            let (mut values, mut magnitudes) = (Vec::new(), Vec::new());
            for (image, x) in x.chunks(per_image.max(1)).enumerate() {
                let [mean, std] = moments(x, 0);
                let scale = to[2 * image + 1] / std;
                values.extend(x.iter().map(|x| (x - mean) * scale + to[2 * image]));
                magnitudes
                    .extend(x.iter().map(|x| ((x - mean).abs() + x.abs() + 8.0) * scale.abs() + to[2 * image].abs()));
            }
            assert_close(
                &got,
                &Expected { shape: shape.to_vec(), values, magnitudes },
                16.0,
                format!("{device} {shape:?}"),
            );
        }
    }
}

#[test]
fn blurs_with_zeros_outside_and_before() {
    for device in devices() {
        for shape in SHAPES {
            for (taps, padding) in [(1, [0, 0]), (3, [0, 1]), (5, [2, 0]), (7, [1, 3])] {
                let mut random = Random::new(4);
                let x = random.randn(&device, &shape, DType::F32);
                let weights = random.tensor(&device, &[3, taps], DType::F32, 0.3, 0.1);
                let n = shape[0];
                let steps: Vec<usize> = (0..n.max(1)).map(|image| image % 3).collect();
                let step = StepIndex::new(&device, &steps).unwrap();
                let rows = StepRows { table: &weights, step: &step, rows: 1 };
                let got = ops::blur_latents(&x, padding, rows).unwrap();
                let [_, h, w, c] = shape;
                let [top, left] = padding;
                let (x, k) = (f64s(&x), f64s(&weights));
                let (mut values, mut magnitudes) = (Vec::new(), Vec::new());
                for at in 0..n * (top + h) * (left + w) * c {
                    let (channel, cell) = (at % c, at / c);
                    let (column, row) = (cell % (left + w), cell / (left + w) % (top + h));
                    let image = cell / (left + w) / (top + h);
                    let k = &k[steps[image] * taps..][..taps];
                    let (mut value, mut size) = (0.0, 0.0);
                    for (a, b) in (0..taps).flat_map(|a| (0..taps).map(move |b| (a, b))) {
                        let i = (row + a).checked_sub(taps / 2 + top).filter(|&i| i < h);
                        let j = (column + b).checked_sub(taps / 2 + left).filter(|&j| j < w);
                        let (Some(i), Some(j)) = (i, j) else { continue };
                        let term = k[a] * k[b] * x[((image * h + i) * w + j) * c + channel];
                        value += term;
                        size += term.abs();
                    }
                    values.push(value);
                    magnitudes.push(size);
                }
                let want = Expected { shape: vec![n, top + h, left + w, c], values, magnitudes };
                // A sum of rows of `taps` products each.
                let f32_eps = 2.0 * taps as f64;
                assert_close(&got, &want, f32_eps, format!("{device} {shape:?} {taps} taps {padding:?}"));
            }
        }
    }
}

/// Whatever else is in the batch: sums of an image run over its own values.
#[test]
fn an_image_does_not_depend_on_its_batch() {
    for device in devices() {
        let x = Random::new(5).randn(&device, &[3, 17, 19, 4], DType::F32);
        let all = ops::latent_moments(&x, 5).unwrap().to_f32_vec().unwrap();
        for image in 0..3 {
            let alone = ops::latent_moments(&x.rows(image..image + 1).unwrap(), 5).unwrap().to_f32_vec().unwrap();
            assert_eq!(alone, all[2 * image..2 * image + 2], "{device} {image}");
        }
    }
}

#[test]
fn meta_records_a_launch_for_each() {
    let meta = MetaDevice::default();
    let device = Device::Meta(meta.clone());
    let zeros = |shape: &[usize]| Tensor::zeros(&device, shape, DType::F32).unwrap();
    let (mut x, a, step) = (zeros(&[2, 6, 5, 4]), zeros(&[2, 6, 5, 4]), StepIndex::one(&device, 0).unwrap());
    let (factors, weights) = (zeros(&[1, 3]), zeros(&[1, 5]));
    ops::mix_latents(&mut x, &a, None, StepRows { table: &factors, step: &step, rows: 1 }).unwrap();
    let moments = ops::latent_moments(&x, 3).unwrap();
    ops::standardise_latents(&x, &moments, &moments).unwrap();
    let y = ops::blur_latents(&x, [1, 2], StepRows { table: &weights, step: &step, rows: 1 }).unwrap();
    assert_eq!(y.shape(), [2, 7, 7, 4]);
    let records: Vec<_> = meta.take_report().ops.iter().map(|op| (op.op, op.work.launches, op.work.bytes)).collect();
    let bytes = 4 * 240;
    let want = [
        ("mix_latents", 1, 3 * bytes),
        ("latent_moments", 1, bytes + 16),
        ("standardise_latents", 1, 2 * bytes),
        ("blur_latents", 1, bytes + 4 * 392),
    ];
    assert_eq!(records, want);
}

#[test]
fn errors_name_the_argument() {
    let device = Device::cpu();
    let zeros = |shape: &[usize], dtype| Tensor::zeros(&device, shape, dtype).unwrap();
    let (x, other, half) =
        (zeros(&[2, 3, 5, 4], DType::F32), zeros(&[1, 3, 5, 4], DType::F32), zeros(&[2, 3, 5, 4], DType::F16));
    let step = StepIndex::one(&device, 0).unwrap();
    let table = |columns: usize| zeros(&[1, columns], DType::F32);
    let (three, four) = (table(3), table(4));
    let rows = |table| StepRows { table, step: &step, rows: 1 };
    let mix = |a: &Tensor, factors| ops::mix_latents(&mut x.duplicate().unwrap(), a, None, factors).unwrap_err();
    assert!(matches!(mix(&other, rows(&three)), Error::Shape { arg: "a", .. }));
    assert!(matches!(mix(&half, rows(&three)), Error::Dtype { arg: "a", .. }));
    assert!(matches!(mix(&x, rows(&four)), Error::Shape { arg: "factors", .. }));
    assert!(matches!(mix(&x, StepRows { rows: 2, ..rows(&three) }), Error::Argument { arg: "rows", .. }));
    let late = StepIndex::one(&device, 1).unwrap();
    assert!(matches!(mix(&x, StepRows { step: &late, ..rows(&three) }), Error::Argument { arg: "step", .. }));
    assert!(matches!(ops::latent_moments(&half, 0).unwrap_err(), Error::Dtype { arg: "x", .. }));
    assert!(matches!(ops::latent_moments(&x, 1 << 31).unwrap_err(), Error::TooLarge { .. }));
    let moments = zeros(&[2, 2], DType::F32);
    let standardise = |from: &Tensor, to: &Tensor| ops::standardise_latents(&x, from, to).unwrap_err();
    assert!(matches!(standardise(&other, &moments), Error::Shape { arg: "from", .. }));
    assert!(matches!(standardise(&moments, &other), Error::Shape { arg: "to", .. }));
    assert!(matches!(ops::blur_latents(&x, [0, 0], rows(&four)).unwrap_err(), Error::Shape { arg: "weights", .. }));
    assert!(matches!(ops::blur_latents(&half, [0, 0], rows(&three)).unwrap_err(), Error::Dtype { arg: "x", .. }));
}
