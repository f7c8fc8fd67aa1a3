//! The step table, scale_input and sampler_step against plain f64 loops.

use crate::common::{Expected, Random, assert_close, cards, devices, f64s};
use megafuse::Error;
use megafuse::ops::{
    self, Guidance, GuidanceScale, Kept, LearnedNoise, SampleState, StepCoefficients, StepIndex, StepRow, StepTable,
    Thresholding,
};
use megafuse::runtime::{DType, Device, MetaDevice, Repeated, Tensor};
use megafuse::schedulers::{Evaluation, Sampler, Scheduler, SchedulerConfig};

/// One element; primes; off a block's 256 elements; empty; off a cpu task's 8192.
const SHAPES: [[usize; 4]; 5] = [[1, 1, 1, 1], [2, 3, 5, 7], [1, 17, 19, 4], [0, 8, 8, 4], [3, 41, 67, 1]];

const COEFFICIENTS: StepCoefficients = StepCoefficients {
    x0_from_x: 1.25,
    x0_from_e: -0.75,
    clip: None,
    next_from_x: 0.3,
    next_from_e: 0.4,
    next_from_x0: 0.9,
    next_from_noise: 0.0,
    learned: None,
    next_from_history: [0.0; 3],
    kept: None,
    x0_from_next: false,
};

/// The same scale for every image.
fn guide(device: &Device, images: usize, scale: Option<f32>) -> Option<Guidance> {
    scale.map(|scale| Guidance::uniform(device, images, scale).unwrap())
}

fn row(coefficients: StepCoefficients) -> StepRow {
    StepRow { input_scale: 0.7, coefficients }
}

fn table(device: &Device, coefficients: &[StepCoefficients]) -> StepTable {
    StepTable::new(device, coefficients.iter().map(|&c| row(c)).collect()).unwrap()
}

/// Every kind of step, one after the other on the same state, by one table.
#[test]
fn steps_follow_the_table() {
    let kinds = [
        COEFFICIENTS,
        StepCoefficients { clip: Some(1.0), next_from_noise: 0.6, ..COEFFICIENTS },
        StepCoefficients { x0_from_next: true, x0_from_x: 0.5, ..COEFFICIENTS },
        StepCoefficients { x0_from_next: true, clip: Some(0.5), next_from_noise: -0.2, ..COEFFICIENTS },
    ];
    for device in devices() {
        for (dtype, shape) in DType::FLOATS.into_iter().flat_map(|dtype| SHAPES.map(|s| (dtype, s))) {
            for guidance in [None, Some(7.5), Some(-1.0)] {
                let mut random = Random::new(1);
                let mut steps = table(&device, &kinds);
                let mut state = SampleState::new(random.randn(&device, &shape, DType::F32)).unwrap();
                for (step, k) in kinds.iter().enumerate() {
                    let noise = random.randn(&device, &shape, DType::F32);
                    let rows = if guidance.is_some() { 2 * shape[0] } else { shape[0] };
                    let output = random.randn(&device, &[rows, shape[1], shape[2], shape[3]], dtype);
                    let want = expected(k, &f64s(state.x()), &f64s(&output), guidance, &f64s(&noise));
                    assert_eq!(steps.index().get(0), step);
                    let guided = guide(&device, shape[0], guidance);
                    ops::sampler_step(&mut state, &output, guided.as_ref(), &steps, Some(&noise)).unwrap();
                    steps.index_mut().advance().unwrap();
                    let what = format!("{device} {dtype} {shape:?} guidance {guidance:?} step {step}");
                    for (got, (values, magnitudes), name) in [(state.x(), &want.0, "x"), (state.x0(), &want.1, "x0")] {
                        let (values, magnitudes) = (values.clone(), magnitudes.clone());
                        let want = Expected { shape: shape.to_vec(), values, magnitudes };
                        assert_close(got, &want, 3.0, format!("{name} {what}"));
                    }
                }
                assert!(steps.next_row(0).is_none());
                let on_device = steps.index().tensor().to_f32_vec().unwrap();
                assert_eq!(on_device, [kinds.len() as f32 - 1.0, 0.0], "{device}: the index on the device");
            }
        }
    }
}

type Values = (Vec<f64>, Vec<f64>);

/// The next x and x0, each with the size of its terms.
fn expected(k: &StepCoefficients, x: &[f64], output: &[f64], guidance: Option<f32>, noise: &[f64]) -> (Values, Values) {
    let f = f64::from;
    let (mut next, mut x0) = (Values::default(), Values::default());
    for i in 0..x.len() {
        let (e, e_size) = match guidance {
            None => (output[i], output[i].abs()),
            Some(w) => {
                let (u, c) = (output[i], output[x.len() + i]);
                (u + f(w) * (c - u), u.abs() + f(w.abs()) * (c.abs() + u.abs()))
            }
        };
        let clean = |x: f64, x_size: f64| {
            let value = f(k.x0_from_x) * x + f(k.x0_from_e) * e;
            let clipped = k.clip.map_or(value, |clip| value.clamp(-f(clip), f(clip)));
            (clipped, f(k.x0_from_x).abs() * x_size + f(k.x0_from_e).abs() * e_size)
        };
        let (from_x, from_x_size) = clean(x[i], x[i].abs());
        let noised = f(k.next_from_noise) * noise[i];
        let value = f(k.next_from_x) * x[i] + f(k.next_from_e) * e + f(k.next_from_x0) * from_x + noised;
        let size = x[i].abs() + e_size + from_x_size + noised.abs();
        next.0.push(value);
        next.1.push(size);
        let (value, size) = if k.x0_from_next { clean(value, size) } else { (from_x, from_x_size) };
        x0.0.push(value);
        x0.1.push(size);
    }
    (next, x0)
}

/// The logarithms of a variance that a network's predictions lie between.
const LEARNED: LearnedNoise = LearnedNoise { log_smallest: -3.5, log_largest: -0.75 };

/// An output `[.., C]` with a variance behind it, `[.., 2C]`.
fn with_variance(output: &Tensor, variance: impl Iterator<Item = f32>) -> Tensor {
    let (mut shape, values) = (output.shape().to_vec(), output.to_f32_vec().unwrap());
    let (c, variance) = (shape[3], variance.take(values.len()).collect::<Vec<f32>>());
    let pixels = values.chunks(c.max(1)).zip(variance.chunks(c.max(1)));
    let wide: Vec<f32> = pixels.flat_map(|(values, variance)| [values, variance].concat()).collect();
    shape[3] = 2 * c;
    Tensor::from_f32(output.device(), &shape, output.dtype(), &wide).unwrap()
}

/// Noise of the variance that the network predicts for each value: with guidance in the conditional half, of which the other's
/// is NaN here; of rows that learn none, or add none, it is not read. A variance may lie beyond the two of the row.
#[test]
fn learned_noise_has_the_variance_of_the_conditional_half() {
    let noisy = StepCoefficients { next_from_noise: 1.0, learned: Some(LEARNED), ..COEFFICIENTS };
    let posterior = LearnedNoise { log_smallest: 1e-20f32.ln(), log_largest: -9.0 };
    let kinds = [
        (noisy, true),
        (StepCoefficients { learned: None, ..noisy }, false),
        (StepCoefficients { next_from_noise: -0.4, clip: Some(0.5), x0_from_next: true, ..noisy }, true),
        (StepCoefficients { learned: Some(posterior), ..noisy }, true),
        (StepCoefficients { next_from_noise: 0.0, ..noisy }, false),
    ];
    for device in devices() {
        for (dtype, shape) in DType::FLOATS.into_iter().flat_map(|dtype| SHAPES.map(|s| (dtype, s))) {
            for guidance in [None, Some(7.5), Some(-1.0)] {
                let mut random = Random::new(21);
                let mut steps = table(&device, &kinds.map(|(k, _)| k));
                let mut state = SampleState::new(random.randn(&device, &shape, DType::F32)).unwrap();
                let count = shape.iter().product::<usize>();
                for (step, (k, reads)) in kinds.iter().enumerate() {
                    let noise = random.randn(&device, &shape, DType::F32);
                    let halves = if guidance.is_some() { 2 } else { 1 };
                    let output = random.randn(&device, &[halves * shape[0], shape[1], shape[2], shape[3]], dtype);
                    let v = random.randn(&device, &shape, dtype);
                    let nan = std::iter::repeat_n(f32::NAN, (halves - 1) * count);
                    let of_condition = v.to_f32_vec().unwrap().into_iter().map(|v| if *reads { v } else { f32::NAN });
                    let wide = with_variance(&output, nan.chain(of_condition));

                    let f = f64::from;
                    let deviation = |v: f64| match k.learned.filter(|_| *reads) {
                        None => (1.0, 1.0),
                        Some(LearnedNoise { log_smallest, log_largest }) => {
                            let fraction = (v + 1.0) / 2.0;
                            let [large, small] = [fraction * f(log_largest), (1.0 - fraction) * f(log_smallest)];
                            // An error of the logarithm is one of the deviation, relative to it.
                            ((0.5 * (large + small)).exp(), 1.0 + large.abs() + small.abs())
                        }
                    };
                    let deviations: Vec<(f64, f64)> = f64s(&v).into_iter().map(deviation).collect();
                    let noised: Vec<f64> = f64s(&noise).iter().zip(&deviations).map(|(n, (d, _))| n * d).collect();
                    let mut want = expected(k, &f64s(state.x()), &f64s(&output), guidance, &noised);
                    for (i, (_, size)) in deviations.iter().enumerate() {
                        let more = (f(k.next_from_noise) * noised[i]).abs() * size;
                        want.0.1[i] += more;
                        want.1.1[i] += if k.x0_from_next { more } else { 0.0 };
                    }
                    let guided = guide(&device, shape[0], guidance);
                    ops::sampler_step(&mut state, &wide, guided.as_ref(), &steps, Some(&noise)).unwrap();
                    steps.index_mut().advance().unwrap();
                    let what = format!("{device} {dtype} {shape:?} guidance {guidance:?} step {step}");
                    for (got, (values, magnitudes), name) in [(state.x(), want.0, "x"), (state.x0(), want.1, "x0")] {
                        let want = Expected { shape: shape.to_vec(), values, magnitudes };
                        assert_close(got, &want, 3.0, format!("{name} {what}"));
                    }
                }
            }
        }
    }
}

/// What rescales, thresholds and remembers has the same bits beside a predicted variance as without it; learned noise is
/// its own image's. One of three images ends before the others.
#[test]
fn a_predicted_variance_is_no_part_of_the_output() {
    let kept = Some(Kept { from_x: 0.2, from_e: 0.3, from_x0: 0.5 });
    let k = StepCoefficients { next_from_history: [0.4, 0.0, 0.0], kept, ..COEFFICIENTS };
    let learned = StepCoefficients { next_from_noise: 1.0, learned: Some(LEARNED), ..k };
    let scales = [(7.5, 0.7), (3.0, 0.0), (1.5, 1.0)].map(|(scale, rescale)| GuidanceScale { scale, rescale });
    let shape = [3, 5, 7, 3];
    for (device, dtype, guided, thresholds) in devices().into_iter().flat_map(|device| {
        let dtypes = DType::FLOATS.map(|dtype| [(dtype, true, true), (dtype, true, false), (dtype, false, true)]);
        dtypes.into_iter().flatten().map(move |(dtype, guided, bounds)| (device.clone(), dtype, guided, bounds))
    }) {
        let mut random = Random::new(22);
        let x = random.randn(&device, &shape, DType::F32).to_f32_vec().unwrap();
        let rows = if guided { 6 } else { 3 };
        let outputs = [0, 1].map(|_| random.randn(&device, &[rows, 5, 7, 3], dtype));
        let noise = random.randn(&device, &shape, DType::F32);
        let v: Vec<f32> = (0..rows * 105).map(|_| random.normal() as f32).collect();
        let v = Tensor::from_f32(&device, &[rows, 5, 7, 3], dtype, &v).unwrap().to_f32_vec().unwrap();
        let run = |k: StepCoefficients, variance: Option<f32>| {
            let mut steps = table(&device, &[k, k]).with_images(3).unwrap();
            let limit = Thresholding { ratio: 0.83, max: 1.75 };
            steps = steps.with_thresholding(thresholds.then_some(limit)).unwrap();
            steps.index_mut().set_left(&[2, 2, 1]).unwrap();
            let x = Tensor::from_f32(&device, &shape, DType::F32, &x).unwrap();
            let mut state = SampleState::with_history(x, steps.history()).unwrap();
            let guidance = guided.then(|| Guidance::new(&device, &scales).unwrap());
            for output in &outputs {
                let wide = variance.map(|scale| with_variance(output, v.iter().map(|v| scale * v)));
                let noise = steps.adds_noise().then_some(&noise);
                let output = wide.as_ref().unwrap_or(output);
                ops::sampler_step(&mut state, output, guidance.as_ref(), &steps, noise).unwrap();
                steps.index_mut().advance().unwrap();
            }
            [state.x(), state.x0()].map(|x| x.to_f32_vec().unwrap())
        };
        let what = format!("{device} {dtype} guided {guided} thresholds {thresholds}");
        assert!(run(k, None) == run(k, Some(20.0)) && run(k, None) == run(k, Some(f32::NAN)), "{what}");
        // Of the noise alone.
        let alone = StepCoefficients { next_from_x: 0.0, next_from_e: 0.0, next_from_x0: 0.0, kept: None, ..learned };
        let [noised, _] = run(StepCoefficients { next_from_history: [0.0; 3], ..alone }, Some(1.0));
        for (i, got) in noised.into_iter().enumerate() {
            let f = f64::from;
            let fraction = (f(v[i + (rows - 3) * 105]) + 1.0) / 2.0;
            let log = fraction * f(LEARNED.log_largest) + (1.0 - fraction) * f(LEARNED.log_smallest);
            let want = (0.5 * log).exp() * f64s(&noise)[i];
            assert!((f(got) - want).abs() <= 2e-6 * want.abs(), "{what} element {i}: {got}, expected {want}");
        }
    }
}

/// Guidance of 1 and of 0 are the conditional and the unconditional output; NaN is not clipped away; noise of weight 0 is
/// not read.
#[test]
fn guidance_picks_and_clip_keeps_nan() {
    for device in devices() {
        let tensor = |values: &[f32]| Tensor::from_f32(&device, &[values.len(), 1, 1, 1], DType::F32, values).unwrap();
        let output = tensor(&[3.0, f32::NAN, -0.5, 0.25]);
        let k = StepCoefficients { x0_from_e: 1.0, clip: Some(1.0), ..COEFFICIENTS };
        let noisy = StepCoefficients { next_from_noise: 1.0, ..k };
        let steps = table(&device, &[k, noisy]);
        let noise = tensor(&[f32::NAN, f32::NAN]);
        let run = |guidance| {
            let mut state = SampleState::new(tensor(&[0.0, 0.0])).unwrap();
            let guided = guide(&device, 2, Some(guidance));
            ops::sampler_step(&mut state, &output, guided.as_ref(), &steps, Some(&noise)).unwrap();
            (state.x0().to_f32_vec().unwrap(), state.x().to_f32_vec().unwrap())
        };
        assert_eq!(run(1.0).0[0], -0.5);
        assert_eq!(run(0.0).0[0], 1.0);
        assert!(run(1.0).0[1].is_nan() && run(1.0).1[0].is_finite(), "{device}");
    }
}

#[test]
fn scale_input_reads_the_current_row() {
    for device in devices() {
        for (dtype, shape) in DType::FLOATS.into_iter().flat_map(|dtype| SHAPES.map(|s| (dtype, s))) {
            let x = Random::new(3).randn(&device, &shape, DType::F32);
            let scales = [0.25, 1.75, -3.0];
            let rows = scales.map(|input_scale| StepRow { input_scale, coefficients: COEFFICIENTS });
            let mut steps = StepTable::new(&device, rows.to_vec()).unwrap();
            for (step, scale) in scales.into_iter().enumerate() {
                for repeats in [1, 2, 3] {
                    let got = ops::scale_input(&x, &steps, dtype, repeats).unwrap();
                    let values: Vec<f64> = f64s(&x).iter().map(|x| f64::from(scale) * x).collect();
                    let values = values.repeat(repeats);
                    let magnitudes = values.iter().map(|v| v.abs()).collect();
                    let [n, h, w, c] = shape;
                    let want = Expected { shape: vec![repeats * n, h, w, c], values, magnitudes };
                    assert_close(&got, &want, 1.0, format!("{device} {shape:?} step {step} x {repeats}"));
                }
                steps.index_mut().advance().unwrap();
            }
        }
    }
}

/// A recorded step goes through the table by itself: the index lives on the device.
#[test]
fn a_replayed_step_finds_its_row() {
    for device in cards() {
        let Device::Cuda(card) = &device else { unreachable!() };
        let kinds = [1.0, 2.0, 3.0, 4.0].map(|next_from_x| StepCoefficients { next_from_x, ..COEFFICIENTS });
        let run = |recorded: bool| {
            let mut random = Random::new(4);
            let mut steps = table(&device, &kinds);
            let mut state = SampleState::new(random.randn(&device, &[1, 5, 7, 4], DType::F32)).unwrap();
            let output = random.randn(&device, &[2, 5, 7, 4], DType::BF16);
            let guided = guide(&device, 1, Some(3.0));
            let mut step = || {
                ops::sampler_step(&mut state, &output, guided.as_ref(), &steps, None)?;
                steps.index_mut().advance()
            };
            if recorded {
                let graph = card.capture(0, &mut step).unwrap();
                assert_eq!(graph.kernels(), ["sampler_step_bf16", "advance_step"]);
                (0..kinds.len()).for_each(|_| graph.replay().unwrap());
            } else {
                (0..kinds.len()).for_each(|_| step().unwrap());
            }
            [state.x(), state.x0()].map(|x| x.to_f32_vec().unwrap())
        };
        assert_eq!(run(true), run(false), "{device}: bit for bit");
    }
}

/// Each image has its own step; all advance in one launch, and a batch's images take them in turn.
#[test]
fn images_have_steps_of_their_own() {
    for device in devices() {
        let mut steps = StepIndex::new(&device, &[7, 0, 300]).unwrap();
        let on_device = |steps: &StepIndex| steps.tensor().to_f32_vec().unwrap()[..3].to_vec();
        steps.advance().unwrap();
        assert_eq!((on_device(&steps), steps.images(), steps.last()), (vec![8.0, 1.0, 301.0], 3, 301), "{device}");
        assert_eq!([0, 1, 2, 3, 5].map(|image| steps.get(image)), [8, 1, 301, 8, 301]);
        steps.set(&[2, 2, 1]).unwrap();
        assert_eq!(on_device(&steps), [2.0, 2.0, 1.0], "{device}");
        if let Device::Cuda(card) = &device {
            let graph = card.capture(0, || steps.advance()).unwrap();
            assert_eq!(graph.kernels(), ["advance_step"]);
            let before = on_device(&steps);
            graph.replay().unwrap();
            let moved: Vec<f32> = on_device(&steps).iter().zip(before).map(|(after, before)| after - before).collect();
            assert_eq!(moved, [1.0; 3], "{device}");
            steps.set_left(&[0, 1, 2]).unwrap();
            (0..3).for_each(|_| graph.replay().unwrap());
            assert_eq!(steps.tensor().to_f32_vec().unwrap(), [3.0, 3.0, 3.0, 0.0, 0.0, 0.0], "{device}");
            steps.set(&[2, 2, 1]).unwrap();
        }
        // Chosen images: the others stay.
        steps.set_left(&[2, 0, 5]).unwrap();
        (0..3).for_each(|_| steps.advance().unwrap());
        assert_eq!(steps.tensor().to_f32_vec().unwrap(), [3.0, 2.0, 4.0, 0.0, 0.0, 2.0], "{device}");
        assert_eq!(
            [0, 1, 2].map(|image| (steps.get(image), steps.has_ended(image))),
            [(3, true), (2, true), (4, false)]
        );
        assert!(matches!(steps.set_left(&[1, 1]).unwrap_err(), Error::Argument { arg: "left", .. }));
        let mut table = table(&device, &[COEFFICIENTS; 4]).with_images(2).unwrap();
        table.index_mut().set(&[4, 3]).unwrap();
        assert!(table.next_row(0).is_none() && table.next_row(1).is_some());
        assert_eq!(table.index().tensor().to_f32_vec().unwrap(), [3.0, 3.0, 0.0, 1.0], "{device}");
        for error in [table.index_mut().set(&[0, 5]), table.index_mut().set_left(&[1, 2])] {
            assert!(matches!(error.unwrap_err(), Error::Argument { op: "StepIndex", .. }));
        }
        assert!(table.with_images(0).is_err());
        for wrong in [&[][..], &[1, 2]] {
            assert!(matches!(steps.set(wrong).unwrap_err(), Error::Argument { arg: "steps", .. }));
        }
        assert!(matches!(StepIndex::new(&device, &[]).unwrap_err(), Error::Argument { arg: "steps", .. }));
        assert!(matches!(steps.set(&[0, 1, 1 << 40]).unwrap_err(), Error::TooLarge { .. }));
    }
}

#[test]
fn meta_records_what_the_card_launches() {
    let meta = MetaDevice::default();
    let device = Device::Meta(meta.clone());
    let x = Tensor::uninit(&device, &[2, 3, 5, 4], DType::F32).unwrap();
    let output = Tensor::uninit(&device, &[4, 3, 5, 4], DType::F16).unwrap();
    let noise = Tensor::uninit(&device, &[2, 3, 5, 4], DType::F32).unwrap();
    let mut steps = table(&device, &[StepCoefficients { next_from_noise: 1.0, ..COEFFICIENTS }]);
    let guided = guide(&device, 2, Some(7.0));
    meta.take_report();
    assert_eq!(ops::scale_input(&x, &steps, DType::F16, 2).unwrap().shape(), [4, 3, 5, 4]);
    let mut state = SampleState::new(x).unwrap();
    ops::sampler_step(&mut state, &output, guided.as_ref(), &steps, Some(&noise)).unwrap();
    steps.index_mut().advance().unwrap();
    let records: Vec<(&str, u64)> = meta.take_report().ops.iter().map(|op| (op.op, op.work.bytes)).collect();
    // 120 elements of f32 are 480 bytes, as are 240 of f16.
    assert_eq!(records, [("scale_input", 960), ("sampler_step", 4 * 480 + 480 + 480), ("advance_step", 16)]);
}

/// A step that learns its noise, with everything before it: as many launches as a card makes of it.
#[test]
fn meta_counts_the_launches_of_learned_noise() {
    let work = |device: &Device, wide: usize, run: &mut dyn FnMut(&mut dyn FnMut())| {
        let zeros = |shape: [usize; 4], dtype| Tensor::zeros(device, &shape, dtype).unwrap();
        let mut state = SampleState::new(zeros([2, 3, 5, 4], DType::F32)).unwrap();
        let (output, noise) = (zeros([4, 3, 5, wide * 4], DType::F16), zeros([2, 3, 5, 4], DType::F32));
        let learned = (wide == 2).then_some(LEARNED);
        let mut steps = table(device, &[StepCoefficients { next_from_noise: 1.0, learned, ..COEFFICIENTS }]);
        steps = steps.with_thresholding(Some(Thresholding { ratio: 0.9, max: 1.5 })).unwrap();
        let guidance = Guidance::new(device, &[GuidanceScale { scale: 7.0, rescale: 0.5 }; 2]).unwrap();
        run(&mut || ops::sampler_step(&mut state, &output, Some(&guidance), &steps, Some(&noise)).unwrap());
    };
    let names = ["guidance_rescale", "dynamic_threshold", "sampler_step"];
    let bytes = [1, 2].map(|wide| {
        let meta = MetaDevice::default();
        let mut bytes = Vec::new();
        work(&Device::Meta(meta.clone()), wide, &mut |step| {
            meta.take_report();
            step();
            let ops = meta.take_report().ops;
            assert_eq!(ops.iter().map(|op| (op.op, op.work.launches)).collect::<Vec<_>>(), names.map(|name| (name, 1)));
            bytes = ops.iter().map(|op| op.work.bytes).collect();
        });
        bytes
    });
    // The variance of 240 values in f16 beside the output: read twice, eight times, once.
    let more: Vec<u64> = bytes[1].iter().zip(&bytes[0]).map(|(wide, narrow)| wide - narrow).collect();
    assert_eq!(more, [2 * 480, 8 * 480, 480]);
    for device in cards() {
        let Device::Cuda(card) = &device else { unreachable!() };
        work(&device, 2, &mut |step| {
            let graph = card
                .capture(0, || {
                    step();
                    Ok(())
                })
                .unwrap();
            assert_eq!(graph.kernels(), names.map(|name| format!("{name}_f16")));
        });
    }
}

#[test]
fn errors_name_the_argument() {
    for device in devices() {
        let zeros = |shape: &[usize], dtype| Tensor::zeros(&device, shape, dtype).unwrap();
        let shape = [2, 3, 5, 4];
        let [plain, noisy] =
            [0.0, 0.5].map(|next_from_noise| table(&device, &[StepCoefficients { next_from_noise, ..COEFFICIENTS }]));
        let step = |output: &Tensor, guidance, steps: &StepTable, noise: Option<&Tensor>| {
            let mut state = SampleState::new(zeros(&shape, DType::F32)).unwrap();
            let guided = guide(&device, 2, guidance);
            ops::sampler_step(&mut state, output, guided.as_ref(), steps, noise).unwrap_err()
        };
        let (x, two) = (zeros(&shape, DType::F32), zeros(&[4, 3, 5, 4], DType::F32));
        let (half, ids) = (zeros(&shape, DType::F16), zeros(&shape, DType::U32));
        let elsewhere = Tensor::zeros(&Device::cpu(), &shape, DType::F32).unwrap();
        assert!(matches!(step(&two, None, &plain, None), Error::Shape { arg: "model_output", .. }));
        assert!(matches!(step(&x, Some(7.0), &plain, None), Error::Shape { arg: "model_output", .. }));
        assert!(matches!(step(&ids, None, &plain, None), Error::Dtype { arg: "model_output", .. }));
        assert!(matches!(step(&elsewhere, None, &plain, None), Error::Device { arg: "model_output", .. }));
        assert!(matches!(step(&x, None, &plain, Some(&x)), Error::Argument { arg: "noise", .. }));
        assert!(matches!(step(&x, None, &noisy, None), Error::Argument { arg: "noise", .. }));
        assert!(matches!(step(&x, None, &noisy, Some(&two)), Error::Shape { arg: "noise", .. }));
        assert!(matches!(step(&x, None, &noisy, Some(&half)), Error::Dtype { arg: "noise", .. }));
        assert!(matches!(SampleState::new(half.clone()).unwrap_err(), Error::Dtype { arg: "x", .. }));
        assert!(matches!(SampleState::new(zeros(&[3], DType::F32)).unwrap_err(), Error::Shape { arg: "x", .. }));
        assert!(matches!(SampleState::new(x.clone()).unwrap_err(), Error::Argument { arg: "x", .. }), "it is shared");
        // Samples of 4 channels, and of 8 with their variance.
        let learns =
            table(&device, &[StepCoefficients { next_from_noise: 1.0, learned: Some(LEARNED), ..COEFFICIENTS }]);
        let wide = |rows: usize, channels: usize| zeros(&[rows, 3, 5, channels], DType::F32);
        for (output, guidance, steps) in [
            (wide(2, 4), None, &learns),
            (wide(2, 12), None, &learns),
            (wide(2, 12), None, &plain),
            (wide(2, 2), None, &plain),
            (wide(2, 8), Some(7.0), &learns),
            (wide(4, 8), None, &plain),
        ] {
            let error = step(&output, guidance, steps, steps.adds_noise().then_some(&x));
            let text = error.to_string();
            assert!(matches!(error, Error::Shape { arg: "model_output", .. }) && text.contains("variance"), "{text}");
        }
        for log in [f32::NAN, f32::NEG_INFINITY] {
            let learned = Some(LearnedNoise { log_smallest: log, ..LEARNED });
            let rows = vec![row(StepCoefficients { learned, ..COEFFICIENTS })];
            assert!(matches!(StepTable::new(&device, rows).unwrap_err(), Error::Argument { arg: "learned", .. }));
        }
        for clip in [-1.0, f32::NAN] {
            let rows = vec![row(StepCoefficients { clip: Some(clip), ..COEFFICIENTS })];
            assert!(matches!(StepTable::new(&device, rows).unwrap_err(), Error::Argument { arg: "clip", .. }));
        }
        assert!(StepTable::new(&device, Vec::new()).is_err());
        assert!(ops::scale_input(&x, &plain, DType::F32, 0).is_err());
        let shifted = |values: &[u32]| table(&device, &[COEFFICIENTS; 2]).with_window_shifts(2, values);
        for values in [&[0; 3][..], &[0; 6]] {
            assert!(matches!(shifted(values).unwrap_err(), Error::Argument { arg: "window shifts", .. }));
        }
        let mut shifted = shifted(&[0, 1, 2, 3, 4, 5, 6, 7]).unwrap();
        assert!(matches!(
            shifted.rewrite_window_shifts(&[1]).unwrap_err(),
            Error::Argument { arg: "window shifts", .. }
        ));
        shifted.rewrite_window_shifts(&[9, 1, 2, 3, 4, 5, 6, 8]).unwrap();
        let shifts = shifted.window_shifts().unwrap();
        assert_eq!((shifts.shape(), shifts.to_f32_vec().unwrap()[7]), (&[2, 2, 2][..], 8.0));
        assert!(matches!(StepIndex::one(&device, 1 << 40).unwrap_err(), Error::TooLarge { .. }));
        let three = table(&device, &[COEFFICIENTS]).with_images(3).unwrap();
        let divides = |error| matches!(error, Error::Argument { arg: "images with a step of their own", .. });
        assert!(divides(step(&x, None, &three, None)));
        assert!(divides(ops::scale_input(&x, &three, DType::F32, 1).unwrap_err()));
        let mut done = table(&device, &[COEFFICIENTS]);
        done.index_mut().advance().unwrap();
        assert!(matches!(step(&x, None, &done, None), Error::Argument { arg: "step", .. }));
        assert!(matches!(ops::scale_input(&x, &done, DType::F32, 1).unwrap_err(), Error::Argument { arg: "step", .. }));
    }
}

/// Each image has its own scale and rescale, deviations and quantile; the history goes back three steps, of which
/// one keeps nothing.
#[test]
fn images_rescale_threshold_and_remember() {
    let (n, size, f) = (3, 5 * 7 * 4, f64::from);
    let scales = [(7.5, 0.7), (3.0, 0.0), (1.5, 1.0)].map(|(scale, rescale)| GuidanceScale { scale, rescale });
    let limit = Thresholding { ratio: 0.83, max: 1.75 };
    let kept = Some(Kept { from_x: 0.2, from_e: 0.3, from_x0: 0.5 });
    let k = StepCoefficients { next_from_history: [0.4, -0.6, 0.3], kept, ..COEFFICIENTS };
    let keeps = [true, true, false, true, true];
    for device in devices() {
        let mut random = Random::new(9);
        let mut steps =
            table(&device, &keeps.map(|keeps| if keeps { k } else { StepCoefficients { kept: None, ..k } }))
                .with_thresholding(Some(limit))
                .unwrap();
        let x = random.randn(&device, &[n, 5, 7, 4], DType::F32);
        let (mut want, mut history) = (f64s(&x), [0; 3].map(|_| vec![0.0; n * size]));
        let mut state = SampleState::with_history(x, steps.history()).unwrap();
        let guidance = Guidance::new(&device, &scales).unwrap();
        for (step, keeps) in keeps.into_iter().enumerate() {
            let output = random.randn(&device, &[2 * n, 5, 7, 4], DType::F32);
            ops::sampler_step(&mut state, &output, Some(&guidance), &steps, None).unwrap();
            steps.index_mut().advance().unwrap();
            let (uncond, cond) = (&f64s(&output)[..n * size], &f64s(&output)[n * size..]);
            let mut latest = vec![0.0; n * size];
            for (image, GuidanceScale { scale, rescale }) in scales.into_iter().enumerate() {
                let range = image * size..(image + 1) * size;
                let mut e: Vec<f64> = range.clone().map(|i| uncond[i] + f(scale) * (cond[i] - uncond[i])).collect();
                let std = |v: &[f64]| {
                    let mean = v.iter().sum::<f64>() / size as f64;
                    v.iter().map(|v| (v - mean).powi(2)).sum::<f64>().sqrt()
                };
                let factor = f(rescale) * std(&cond[range.clone()]) / std(&e) + 1.0 - f(rescale);
                e.iter_mut().for_each(|e| *e *= factor);
                let of = |i: usize| f(k.x0_from_x) * want[i] + f(k.x0_from_e) * e[i - range.start];
                let x0: Vec<f64> = range.clone().map(of).collect();
                let mut sorted: Vec<f64> = x0.iter().map(|v| v.abs()).collect();
                sorted.sort_by(f64::total_cmp);
                let rank = f(limit.ratio * (size - 1) as f32);
                let (low, high) = (sorted[rank as usize], sorted[rank.ceil() as usize]);
                let bound = (low + rank.fract() * (high - low)).max(1.0).min(f(limit.max));
                for (j, i) in range.enumerate() {
                    let x0 = x0[j].clamp(-bound, bound) / bound;
                    latest[i] = 0.2 * want[i] + 0.3 * e[j] + 0.5 * x0;
                    let before: f64 = [0.4, -0.6, 0.3].iter().zip(&history).map(|(weight, h)| weight * h[i]).sum();
                    want[i] = 0.3 * want[i] + 0.4 * e[j] + 0.9 * x0 + before;
                    let got = f(state.x().to_f32_vec().unwrap()[i]);
                    assert!((got - want[i]).abs() < 2e-5, "{device} step {step} image {image}: {got}, {}", want[i]);
                }
            }
            if keeps {
                history.rotate_right(1);
                history[0] = latest;
            }
        }
    }
}

/// Samples that start anew in the place of others: what these left in the history has the weight 0 and is not read.
#[test]
fn a_restart_reads_no_history() {
    let kept = Some(Kept { from_x: 1.0, ..Kept::default() });
    let first = StepCoefficients { kept, ..COEFFICIENTS };
    let second = StepCoefficients { next_from_history: [0.5, 0.0, 0.0], ..first };
    for device in devices() {
        let tensor = |v: f32| Tensor::from_f32(&device, &[1, 5, 7, 4], DType::F32, &[v; 140]).unwrap();
        let mut steps = table(&device, &[first, second]);
        let mut state = SampleState::with_history(tensor(f32::NAN), steps.history()).unwrap();
        ops::sampler_step(&mut state, &tensor(1.0), None, &steps, None).unwrap();
        steps.index_mut().set(&[0]).unwrap();
        state.restart(&tensor(2.0)).unwrap();
        let mut want = 2.0;
        for before in [0.0, 0.5 * 2.0] {
            ops::sampler_step(&mut state, &tensor(1.0), None, &steps, None).unwrap();
            steps.index_mut().advance().unwrap();
            want = 0.3 * want + 0.4 + 0.9 * (1.25 * want - 0.75) + before;
            let got = state.x().to_f32_vec().unwrap();
            assert!(
                got.iter().all(|got| (f64::from(*got) - want).abs() < 1e-5),
                "{device}: {}, expected {want}",
                got[0]
            );
        }
    }
}

/// An output without deviation, which rescaling would divide by: of an image that does not rescale, beside one that does.
#[test]
fn a_flat_output_that_is_not_rescaled_stays() {
    for device in devices() {
        let steps = table(&device, &[StepCoefficients { x0_from_x: 0.0, x0_from_e: 1.0, ..COEFFICIENTS }]);
        let scales = [0.0, 0.5].map(|rescale| GuidanceScale { scale: 2.0, rescale });
        let guidance = Guidance::new(&device, &scales).unwrap();
        let mut state = SampleState::new(Tensor::zeros(&device, &[2, 1, 4, 1], DType::F32).unwrap()).unwrap();
        let halves = [[1.0; 4], [1.0, -1.0, 2.0, 0.0], [3.0; 4], [0.0, 2.0, -1.0, 1.0]].concat();
        let output = Tensor::from_f32(&device, &[4, 1, 4, 1], DType::F32, &halves).unwrap();
        ops::sampler_step(&mut state, &output, Some(&guidance), &steps, None).unwrap();
        let got = state.x0().to_f32_vec().unwrap();
        assert_eq!(got[..4], [5.0; 4], "{device}");
        assert!(got[4..].iter().all(|value| value.is_finite()), "{device}");
    }
}

/// The bound of the clean sample: between which ranks, with equal values among them, and within 1 and the most.
#[test]
fn thresholds_are_quantiles() {
    // A clean sample that is the network's output.
    let k = StepCoefficients { x0_from_x: 0.0, x0_from_e: 1.0, ..COEFFICIENTS };
    let spread = |size: usize, scale: f32| -> Vec<f32> {
        let mut random = Random::new(size as u64);
        (0..size).map(|_| scale * random.normal() as f32).collect()
    };
    let levels = |size: usize| (0..size).map(|i| [1.5, -2.0, 2.5, -1.5][i * i % 7 % 4]).collect::<Vec<f32>>();
    let mut odd = spread(90, 3.0);
    (odd[7], odd[11], odd[50]) = (f32::NAN, f32::NEG_INFINITY, -0.0);
    // The last: all but two values are below 1.
    let rare = [vec![0.25; 60], vec![-3.0, 5.0]].concat();
    let all = [spread(1, 4.0), spread(2, 4.0), spread(700, 2.0), spread(140, 0.01), levels(257), levels(6), odd, rare];
    for (device, values) in devices().into_iter().flat_map(|device| all.clone().map(|values| (device.clone(), values)))
    {
        let mut sorted: Vec<f32> = values.iter().map(|v| v.abs()).collect();
        sorted.sort_by(f32::total_cmp);
        for ratio in [0.0, 0.3, 0.5, 0.83, 0.9, 0.995, 1.0] {
            let rank = ratio * (values.len() - 1) as f32;
            let [low, high] = [rank.floor(), rank.ceil()].map(|rank| f64::from(sorted[rank as usize]));
            if !high.is_finite() {
                continue; // a quantile between a number and none
            }
            let quantile = low + f64::from(rank.fract()) * (high - low);
            for max in [1.0, 1.75, 100.0] {
                let mut steps = table(&device, &[k]);
                steps = steps.with_thresholding(Some(Thresholding { ratio, max })).unwrap();
                let tensor = |v: &[f32]| Tensor::from_f32(&device, &[1, 1, v.len(), 1], DType::F32, v).unwrap();
                let mut state = SampleState::new(tensor(&vec![0.0; values.len()])).unwrap();
                ops::sampler_step(&mut state, &tensor(&values), None, &steps, None).unwrap();
                steps.index_mut().advance().unwrap();
                let bound = quantile.max(1.0).min(f64::from(max));
                for (i, got) in state.x0().to_f32_vec().unwrap().into_iter().enumerate() {
                    let (value, got) = (f64::from(values[i]), f64::from(got));
                    let want = value.clamp(-bound, bound) / bound;
                    let what = || format!("{device} {} values, ratio {ratio} max {max}: element {i}", values.len());
                    assert_eq!(got.is_nan(), want.is_nan(), "{}", what());
                    assert!(want.is_nan() || (got - want).abs() <= 5e-7, "{}: {got}, expected {want}", what());
                }
            }
        }
    }
}

/// A batch larger than the images with a step of their own takes these in turn: its images 0, 2, 4 at one step, 1, 3, 5 at
/// another; when one of the two has ended, its images keep their samples, in the batch as in what follows it.
#[test]
fn a_batch_takes_the_images_in_turn() {
    let (n, size, f) = (6, 3 * 5 * 4, f64::from);
    let kinds = [0.25, 0.5, -1.5].map(|next_from_x| StepCoefficients { next_from_x, ..COEFFICIENTS });
    let scales = [0.7, 1.3, -2.0];
    let rows: Vec<StepRow> =
        kinds.iter().zip(scales).map(|(&coefficients, input_scale)| StepRow { input_scale, coefficients }).collect();
    for (device, bounded) in devices().into_iter().flat_map(|device| [(device.clone(), false), (device, true)]) {
        let mut random = Random::new(15);
        let mut steps = StepTable::new(&device, rows.clone()).unwrap().with_images(2).unwrap();
        steps = steps.with_thresholding(bounded.then_some(Thresholding { ratio: 0.9, max: 1.5 })).unwrap();
        steps.index_mut().set(&[2, 0]).unwrap();
        let mut state = SampleState::new(random.randn(&device, &[n, 3, 5, 4], DType::F32)).unwrap();
        for (t, at) in [[Some(2), Some(0)], [None, Some(1)], [None, Some(2)]].into_iter().enumerate() {
            let x = f64s(state.x());
            let input = ops::scale_input(state.x(), &steps, DType::F32, 2).unwrap().to_f32_vec().unwrap();
            let output = random.randn(&device, &[n, 3, 5, 4], DType::F32);
            let e = f64s(&output);
            ops::sampler_step(&mut state, &output, None, &steps, None).unwrap();
            steps.index_mut().advance().unwrap();
            let got = state.x().to_f32_vec().unwrap();
            for image in 0..n {
                let range = image * size..(image + 1) * size;
                // An image that has ended is scaled as in its last step.
                let scale = f(scales[at[image % 2].unwrap_or(2)]);
                let near = |got: f32, want: f64| (f(got) - want).abs() <= 2e-6 * (1.0 + want.abs());
                for i in range.clone() {
                    let what = format!("{device} step {t} image {image}");
                    assert!(near(input[i], scale * x[i]) && near(input[n * size + i], scale * x[i]), "{what}");
                }
                let Some(step) = at[image % 2] else {
                    assert!(range.clone().all(|i| f(got[i]) == x[i]), "{device} step {t} image {image} has ended");
                    continue;
                };
                let k = kinds[step];
                let clean: Vec<f64> = range.clone().map(|i| f(k.x0_from_x) * x[i] + f(k.x0_from_e) * e[i]).collect();
                let mut sorted: Vec<f64> = clean.iter().map(|v| v.abs()).collect();
                sorted.sort_by(f64::total_cmp);
                let rank = f(0.9f32 * (size - 1) as f32);
                let (low, high) = (sorted[rank as usize], sorted[rank.ceil() as usize]);
                let bound = (low + rank.fract() * (high - low)).clamp(1.0, 1.5);
                for (clean, i) in clean.into_iter().zip(range) {
                    let clean = if bounded { clean.clamp(-bound, bound) / bound } else { clean };
                    let want = f(k.next_from_x) * x[i] + f(k.next_from_e) * e[i] + f(k.next_from_x0) * clean;
                    assert!(near(got[i], want), "{device} step {t} image {image}: {}, expected {want}", got[i]);
                }
            }
        }
        assert!(steps.index().has_ended(0) && steps.index().has_ended(1));
    }
}

/// Samples, clean samples and scaled input after each evaluation.
type Trace = Vec<[Vec<f32>; 3]>;

/// Runs a table with outputs and noise that depend on image and row alone. Of each image: at which evaluation it begins.
/// Images that have not begun or have ended get NaN for output and noise, as do images whose row draws none.
fn traces(device: &Device, run: &TwoImages, images: &[usize], begins: &[usize]) -> Vec<Trace> {
    let (count, n) = (run.rows.len(), images.len());
    let (size, shape) = (run.shape.iter().product::<usize>(), |n| [&[n], &run.shape[..]].concat());
    let mut steps = StepTable::new(device, run.rows.clone()).unwrap().with_images(n).unwrap();
    steps = steps.with_thresholding(run.thresholding).unwrap();
    let guidance = Guidance::new(device, &images.iter().map(|&i| run.guidance[i]).collect::<Vec<_>>()).unwrap();
    // One per image, row and kind: the start, the two halves of the output, the noise.
    let some = |count: usize, image: usize, row: usize, kind: usize| -> Vec<f32> {
        let mut random = Random::new((1 + image + 7 * row + 1009 * kind) as u64);
        (0..count).map(|_| random.normal() as f32).collect()
    };
    let values = |image: usize, row: usize, kind: usize| some(size, image, row, kind);
    let start: Vec<f32> = images.iter().flat_map(|&image| values(image, 0, 9)).collect();
    let x = Tensor::from_f32(device, &shape(n), DType::F32, &start).unwrap();
    let mut state = SampleState::with_history(x, steps.history()).unwrap();
    let outputs = if steps.learns_noise() { 2 } else { 1 };
    let mut output_shape = shape(2 * n);
    output_shape[3] *= outputs;
    let mut output = Tensor::zeros(device, &output_shape, DType::F32).unwrap();
    let mut noise = steps.adds_noise().then(|| Tensor::zeros(device, &shape(n), DType::F32).unwrap());
    let (mut repeated, mut traces) = (Repeated::new(device), vec![Trace::new(); n]);
    let mut input = None;
    for t in 0..begins.iter().max().unwrap() + count {
        let running: Vec<bool> = begins.iter().map(|&begin| (begin..begin + count).contains(&t)).collect();
        if t == 0 || begins.contains(&t) {
            let left = |&begin: &usize| if t < begin { 0 } else { (begin + count).saturating_sub(t) };
            steps.index_mut().set_left(&begins.iter().map(left).collect::<Vec<_>>()).unwrap();
        }
        let of = |kind: usize, count: usize, read: &dyn Fn(&StepRow) -> bool| -> Vec<f32> {
            let of_image = |i: usize| match running[i] && read(&run.rows[t - begins[i]]) {
                true => some(count, images[i], t - begins[i], kind),
                false => vec![f32::NAN; count],
            };
            (0..n).flat_map(of_image).collect()
        };
        let halves = [0, 1].map(|half| of(half, outputs * size, &|_| true));
        output.write_f32(&halves.concat()).unwrap();
        if let Some(noise) = &mut noise {
            noise.write_f32(&of(2, size, &|row| row.coefficients.next_from_noise != 0.0)).unwrap();
        }
        let step = || {
            input = Some(ops::scale_input(state.x(), &steps, DType::F16, 2)?);
            ops::sampler_step(&mut state, &output, Some(&guidance), &steps, noise.as_ref())?;
            steps.index_mut().advance()
        };
        if repeated.run(step).unwrap() {
            steps.index_mut().replayed();
        }
        let input = input.as_ref().unwrap().to_f32_vec().unwrap();
        assert!(input[..n * size] == input[n * size..]);
        let [x, x0] = [state.x(), state.x0()].map(|x| x.to_f32_vec().unwrap());
        for i in 0..n {
            let part = |values: &[f32]| values[i * size..(i + 1) * size].to_vec();
            match running[i] {
                true => traces[i].push([&x, &x0, &input].map(|values| part(values))),
                false if t < begins[i] => assert!(part(&x) == values(images[i], 0, 9), "{device}: it has not begun"),
                false => {
                    let [last, last0, _] = traces[i].last().unwrap();
                    assert!(part(&x) == *last && part(&x0) == *last0, "{device}: it has ended");
                }
            }
        }
    }
    assert!((0..n).all(|image| steps.index().has_ended(image)));
    traces
}

struct TwoImages {
    rows: Vec<StepRow>,
    guidance: [GuidanceScale; 2],
    thresholding: Option<Thresholding>,
    /// `[H, W, C]`
    shape: [usize; 3],
}

/// Two images of one batch at different steps, with guidance of their own, are what each is alone, bit for bit: one begins
/// two evaluations after the other, and goes on when that one has ended. On a card the steps are launched, recorded and
/// replayed.
#[test]
fn images_at_different_steps_are_what_each_is_alone() {
    let json = r#"{"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000, "clip_sample": false, "set_alpha_to_one": false, "steps_offset": 1,
        "variance_type": "learned_range"}"#;
    let config = SchedulerConfig::from_json("scheduler_config.json", json).unwrap();
    // Ddpm's noise is learned.
    let samplers = [Sampler::Ddim, Sampler::EulerAncestral, Sampler::Dpm2M, Sampler::Heun, Sampler::Ddpm];
    for (device, sampler) in devices().into_iter().flat_map(|device| samplers.map(|sampler| (device.clone(), sampler)))
    {
        let scheduler = Scheduler::new(&config, sampler, 5, 0.0).unwrap();
        let row = |evaluation: &Evaluation| StepRow {
            input_scale: evaluation.input_scale,
            coefficients: evaluation.coefficients,
        };
        let rows: Vec<StepRow> = scheduler.evaluations(0..5).iter().map(row).collect();
        for (rescale, thresholding) in [([0.0, 0.0], None), ([0.7, 0.0], Some(Thresholding { ratio: 0.9, max: 2.0 }))] {
            let guidance =
                [GuidanceScale { scale: 7.5, rescale: rescale[0] }, GuidanceScale { scale: 2.0, rescale: rescale[1] }];
            let run = TwoImages { rows: rows.clone(), guidance, thresholding, shape: [5, 7, 4] };
            let together = traces(&device, &run, &[0, 1], &[0, 2]);
            for image in [0, 1] {
                let alone = traces(&device, &run, &[image], &[0]).remove(0);
                for (step, (got, want)) in together[image].iter().zip(&alone).enumerate() {
                    assert!(want.iter().flatten().all(|v| v.is_finite()), "{device} {sampler} step {step}");
                    assert!(got == want, "{device} {sampler} image {image} step {step}, {thresholding:?}");
                }
                assert_eq!(together[image].len(), alone.len());
            }
        }
    }
}
