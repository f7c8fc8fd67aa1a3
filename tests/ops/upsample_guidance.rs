//! pool_latents and upsample_guidance against plain f64 loops.

use crate::common::{Expected, Random, assert_close, cards, devices, f64s};
use megafuse::Error;
use megafuse::ops::{self, StepIndex, StepRows};
use megafuse::runtime::{DType, Device, MetaDevice, OpKind, Tensor};

/// Images, height, width and channels of the smaller map, and the squares' side: a cell; one to one; a prime side; more values than
/// a block has threads; no images.
const SHAPES: [([usize; 4], usize); 6] =
    [([1, 1, 1, 1], 2), ([2, 3, 5, 4], 1), ([3, 2, 3, 4], 3), ([1, 9, 8, 4], 2), ([2, 1, 4, 5], 7), ([0, 2, 2, 4], 2)];

/// Of three steps.
const FACTORS: [f32; 9] = [9.0, 9.0, 9.0, 0.6, -0.35, 1.2, 0.5, 0.25, 0.75];

/// Row, column and channel of the map of each value of a square of the smaller one's value.
fn square([h, w, c]: [usize; 3], m: usize, i: usize) -> impl Iterator<Item = usize> {
    let (channel, column, row, image) = (i % c, i / c % w, i / (c * w) % h, i / (c * w * h));
    let at = move |y: usize, x: usize| ((image * h * m + y) * w * m + x) * c + channel;
    (0..m).flat_map(move |a| (0..m).map(move |b| at(row * m + a, column * m + b)))
}

fn mean([h, w, c]: [usize; 3], m: usize, values: &[f64], i: usize) -> f64 {
    square([h, w, c], m, i).map(|at| values[at]).sum::<f64>() / (m * m) as f64
}

#[test]
fn pooling_matches_f64() {
    for (device, ([n, h, w, c], m)) in devices().into_iter().flat_map(|d| SHAPES.map(|shape| (d.clone(), shape))) {
        let x = Random::new(51).randn(&device, &[n, m * h, m * w, c], DType::F32);
        let input = f64s(&x);
        let values: Vec<f64> = (0..n * h * w * c).map(|i| mean([h, w, c], m, &input, i)).collect();
        let want = Expected { shape: vec![n, h, w, c], magnitudes: vec![5.0; values.len()], values };
        // A sum of m^2 values, one after the other.
        let eps = 1.0 + (m * m) as f64 / 2.0;
        assert_close(&ops::pool_latents(&x, m).unwrap(), &want, eps, format!("{device} {:?} by {m}", want.shape));
    }
}

/// Every step of the table, for all images and for each; with and without the rows of guidance.
#[test]
fn the_correction_matches_f64() {
    for (device, ([n, h, w, c], m)) in devices().into_iter().flat_map(|d| SHAPES.map(|shape| (d.clone(), shape))) {
        let table = Tensor::from_f32(&device, &[3, 3], DType::F32, &FACTORS).unwrap();
        let each: Vec<usize> = (0..n).map(|image| 1 + image % 2).collect();
        for (dtype, repeats) in DType::FLOATS.into_iter().flat_map(|dtype| [(dtype, 1), (dtype, 2)]) {
            for steps in [&[1][..], &each].into_iter().filter(|steps| !steps.is_empty()) {
                let mut random = Random::new(52);
                let output = random.randn(&device, &[repeats * n, m * h, m * w, c], dtype);
                let low = random.randn(&device, &[repeats * n, h, w, c], dtype);
                let pooled = random.randn(&device, &[n, h, w, c], DType::F32);
                let step = StepIndex::new(&device, steps).unwrap();
                let factors = StepRows { table: &table, step: &step, rows: 1 };
                let got = ops::upsample_guidance(&output, &low, &pooled, factors).unwrap();
                let (e, low, pooled) = (f64s(&output), f64s(&low), f64s(&pooled));
                let mut values = e.clone();
                for (i, low) in low.iter().enumerate() {
                    let (image, within) = (i / (h * w * c) % n, i % (h * w * c));
                    let row = 3 * steps[image % steps.len()];
                    let [k0, k1, k2] = [0, 1, 2].map(|column| f64::from(FACTORS[row + column]));
                    let of_x = pooled[image * h * w * c + within];
                    let correction = k0 * low + k1 * of_x - k2 * mean([h, w, c], m, &e, i);
                    square([h, w, c], m, i).for_each(|at| values[at] += correction);
                }
                let magnitudes = vec![12.0; values.len()];
                let want = Expected { shape: output.shape().to_vec(), values, magnitudes };
                let what = format!("{device} {:?} by {m}, {repeats} times, steps {steps:?}", [n, h, w, c]);
                assert_close(&got, &want, 3.0 + (m * m) as f64 / 2.0, what);
            }
        }
    }
}

/// The meta device counts the launches that a card makes, and each tensor once.
#[test]
fn a_card_launches_what_meta_counts() {
    for card in cards() {
        let run = |device: &Device| {
            let zeros = |shape: &[usize], dtype| Tensor::zeros(device, shape, dtype).unwrap();
            let (x, e, low) = (
                zeros(&[2, 12, 8, 4], DType::F32),
                zeros(&[4, 12, 8, 4], DType::BF16),
                zeros(&[4, 6, 4, 4], DType::BF16),
            );
            let (table, step) = (zeros(&[1, 3], DType::F32), StepIndex::one(device, 0).unwrap());
            move || {
                let pooled = ops::pool_latents(&x, 2).unwrap();
                let factors = StepRows { table: &table, step: &step, rows: 1 };
                ops::upsample_guidance(&e, &low, &pooled, factors)
            }
        };
        let meta = MetaDevice::default();
        let counted = run(&Device::Meta(meta.clone()));
        meta.take_report();
        assert_eq!(counted().unwrap().shape(), [4, 12, 8, 4]);
        let report = meta.take_report();
        let [pooling, correction] = report.ops.as_slice() else { panic!("two ops, two records: {report:?}") };
        let (large, small) = (2 * 12 * 8 * 4, 2 * 6 * 4 * 4);
        assert_eq!((pooling.op, pooling.kind), ("pool_latents", OpKind::Elementwise));
        assert_eq!(pooling.work.bytes, 4 * (large + small));
        assert_eq!((correction.op, correction.kind), ("upsample_guidance", OpKind::Elementwise));
        assert_eq!(correction.work.bytes, 2 * (2 * 2 * large + 2 * small) + 4 * small);
        let Device::Cuda(cuda) = &card else { unreachable!() };
        let launched = run(&card);
        let graph = cuda.capture(0, || launched().map(drop)).unwrap();
        assert_eq!(graph.kernels().len() as u64, pooling.work.launches + correction.work.launches, "{card}");
    }
}

#[test]
fn errors_name_the_argument() {
    let device = Device::cpu();
    let of = |shape: &[usize], dtype| Tensor::zeros(&device, shape, dtype).unwrap();
    let x = of(&[1, 6, 4, 4], DType::F32);
    for scale in [0, 3, 4] {
        assert!(matches!(ops::pool_latents(&x, scale).unwrap_err(), Error::Argument { arg: "scale", .. }), "{scale}");
    }
    assert!(matches!(ops::pool_latents(&of(&[1, 6, 4, 4], DType::F16), 2).unwrap_err(), Error::Dtype { arg: "x", .. }));

    let (table, step) = (of(&[2, 3], DType::F32), StepIndex::one(&device, 1).unwrap());
    let (low, pooled) = (of(&[2, 3, 2, 4], DType::F32), of(&[1, 3, 2, 4], DType::F32));
    let output = of(&[2, 6, 4, 4], DType::F32);
    let guide = |output: &Tensor, low: &Tensor, pooled: &Tensor, factors| {
        ops::upsample_guidance(output, low, pooled, factors).unwrap_err()
    };
    let factors = StepRows { table: &table, step: &step, rows: 1 };
    for bad in [[2, 3, 4, 4], [2, 4, 2, 4], [1, 3, 2, 4], [2, 3, 2, 3], [2, 0, 2, 4]] {
        let error = guide(&output, &of(&bad, DType::F32), &pooled, factors);
        assert!(matches!(error, Error::Shape { arg: "low", .. }), "{bad:?}: {error}");
    }
    assert!(matches!(
        guide(&output, &of(&[2, 3, 2, 4], DType::F16), &pooled, factors),
        Error::Dtype { arg: "low", .. }
    ));
    for bad in [[3, 3, 2, 4], [0, 3, 2, 4], [1, 6, 4, 4]] {
        let error = guide(&output, &low, &of(&bad, DType::F32), factors);
        assert!(matches!(error, Error::Shape { arg: "pooled", .. }), "{bad:?}: {error}");
    }
    let narrow = of(&[2, 2], DType::F32);
    let factors = StepRows { table: &narrow, ..factors };
    assert!(matches!(guide(&output, &low, &pooled, factors), Error::Shape { arg: "factors", .. }));
    let short = of(&[1, 3], DType::F32);
    let factors = StepRows { table: &short, ..factors };
    assert!(matches!(guide(&output, &low, &pooled, factors), Error::Argument { arg: "step", .. }));
    let factors = StepRows { table: &table, step: &step, rows: 2 };
    assert!(matches!(guide(&output, &low, &pooled, factors), Error::Argument { arg: "rows", .. }));
}
