//! linear against plain f64 loops.

use crate::common::{F32_EPS, Random, assert_close, cards, cases, devices, kernels};
use megafuse::Error;
use megafuse::ops::{self, Activation, Linear, StepColumns, StepIndex, StepRows};
use megafuse::runtime::{DType, Device, OpKind, Tensor};

/// Leading dimensions, K, rows of the weight: one element; primes; one off a tile (cpu: 14 rows, 32 columns, 256 k; card:
/// 64 or 128 rows and columns, 32 k); empty batch, no columns, nothing to sum; models' widths.
const SHAPES: [(&[usize], usize, usize); 16] = [
    (&[1], 1, 2),
    (&[], 5, 2),
    (&[2, 3], 7, 10),
    (&[13], 31, 34),
    (&[15], 33, 30),
    (&[14], 256, 32),
    (&[29], 257, 66),
    (&[65], 40, 130),
    (&[127], 24, 48),
    (&[2], 1021, 16),
    (&[0, 77], 64, 64),
    (&[3], 4, 0),
    (&[3], 0, 4),
    (&[2, 77], 768, 48),
    (&[2], 320, 1280),
    (&[5, 3], 600, 322),
];

struct Inputs {
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
}

impl Inputs {
    fn new(device: &Device, dtype: DType, leading: &[usize], k: usize, rows: usize, n: usize) -> Inputs {
        let mut random = Random::new(7);
        Inputs {
            x: random.randn(device, &[leading, &[k]].concat(), dtype),
            weight: random.tensor(device, &[rows, k], dtype, 0.0, 1.0 / (k.max(1) as f64).sqrt()),
            bias: random.randn(device, &[rows], dtype),
            residual: random.randn(device, &[leading, &[n]].concat(), dtype),
        }
    }

    fn args(&self, activation: Activation, bias: bool, residual: bool) -> Linear<'_> {
        Linear {
            bias: bias.then_some(&self.bias),
            activation,
            residual: residual.then_some(&self.residual),
            ..Linear::new(&self.x, &self.weight)
        }
    }
}

/// 8: a chain of products (see the cpu's engine; a card's is one chain), and the activation's own few ulp. A card's GELU
/// for results of 16 bits errs by up to 5e-6 of the value where that counts (kernels/common/math.cuh): 84 more.
fn f32_eps_allowed(activation: Activation, dtype: DType) -> f64 {
    match activation {
        Activation::Gelu | Activation::Geglu if dtype != DType::F32 => 8.0 + 5e-6 / F32_EPS,
        _ => 8.0,
    }
}

#[test]
fn linear_matches_f64() {
    for device in devices() {
        for (dtype, &(leading, k, rows)) in DType::FLOATS.into_iter().flat_map(|d| SHAPES.iter().map(move |s| (d, s))) {
            for activation in Activation::ALL {
                let n = if activation.is_gated() { rows / 2 } else { rows };
                let inputs = Inputs::new(&device, dtype, leading, k, rows, n);
                let allowed = f32_eps_allowed(activation, dtype);
                let alone = [(false, false), (true, true), (true, false), (false, true)];
                for &(bias, residual) in if activation == Activation::None { &alone[..] } else { &alone[..2] } {
                    let args = inputs.args(activation, bias, residual);
                    let what =
                        format!("{device} {leading:?} {k} {rows} {activation:?} bias {bias} residual {residual}");
                    assert_close(&ops::linear(args).unwrap(), &crate::common::linear(&args), allowed, what);
                }
            }
        }
    }
}

/// For `with_variants`: the kernels that every card has; where there is no choice, the op's own.
fn portable_kernels(device: &Device, dtype: DType) -> Vec<String> {
    kernels("linear", device, dtype).into_iter().filter(|kernel| !kernel.contains("sm90")).collect()
}

/// Hopper's; none where the card is another.
fn hopper_kernels(device: &Device, dtype: DType) -> Vec<String> {
    kernels("linear", device, dtype).into_iter().filter(|kernel| kernel.contains("sm90")).collect()
}

/// `None`: the kernel lacks the activation, and says so.
fn linear_by(kernel: &str, args: Linear) -> Option<Tensor> {
    match ops::with_variants(kernel, || ops::linear(args)) {
        Err(Error::Argument { want, .. })
            if ["activation", "GEGLU", "gate"].iter().any(|lacks| want.contains(lacks)) =>
        {
            None
        }
        result => Some(result.unwrap()),
    }
}

/// Every portable tile of the card at shapes that end inside, at and one off its edges; and all of them make the same bits.
#[test]
fn every_tile_matches_f64_and_the_others_bit_for_bit() {
    for (device, dtype) in cards().into_iter().flat_map(|card| DType::FLOATS.map(|dtype| (card.clone(), dtype))) {
        // M, K, rows of the weight. Wide and odd rows; one slice, fewer than the ring has slots, and many.
        for (m, k, rows) in [(1, 8, 2), (129, 40, 264), (64, 256, 128), (130, 104, 66), (70, 168, 34)] {
            for activation in [Activation::Gelu, Activation::Geglu, Activation::GegluTanh] {
                let n = if activation.is_gated() { rows / 2 } else { rows };
                let inputs = Inputs::new(&device, dtype, &[m], k, rows, n);
                let args = inputs.args(activation, true, true);
                let want = crate::common::linear(&args);
                let mut first: Option<Vec<f32>> = None;
                for kernel in portable_kernels(&device, dtype) {
                    let got = ops::with_variants(&kernel, || ops::linear(args)).unwrap();
                    let what = format!("{device} {kernel} {m} {k} {rows} {activation:?}");
                    assert_close(&got, &want, f32_eps_allowed(activation, dtype), &what);
                    let got = got.to_f32_vec().unwrap();
                    assert!(*first.get_or_insert_with(|| got.clone()) == got, "{what} {dtype}: other bits");
                }
            }
        }
    }
}

/// Every tile of Hopper's, with every end that it has, at shapes that end inside, at and one chunk off its edges, with one
/// slice of k, fewer than the ring has stages, and many; with fewer tiles than blocks and more. Whatever the tile, the bits
/// are the same, and so they are for any number of rows.
#[test]
fn every_hopper_tile_matches_f64_and_the_others_bit_for_bit() {
    const ENDS: [(bool, bool); 4] = [(true, true), (false, false), (true, false), (false, true)];
    for (device, dtype) in cards().into_iter().flat_map(|card| [DType::BF16, DType::F16].map(|d| (card.clone(), d))) {
        let tiles = hopper_kernels(&device, dtype);
        if tiles.is_empty() {
            continue;
        }
        for (i, (m, k, rows)) in
            [(1, 8, 16), (200, 136, 336), (77, 704, 176), (257, 64, 256), (300, 72, 528)].into_iter().enumerate()
        {
            for activation in Activation::ALL {
                let n = if activation.is_gated() { rows / 2 } else { rows };
                let inputs = Inputs::new(&device, dtype, &[m], k, rows, n);
                let (bias, residual) = ENDS[i % 4];
                let ends = if i == 1 { &ENDS[..] } else { &[(true, true), (bias, residual)] };
                for &(bias, residual) in ends {
                    let args = inputs.args(activation, bias, residual);
                    let want = crate::common::linear(&args);
                    let what = format!("{device} {m} {k} {rows} {activation:?} bias {bias} residual {residual}");
                    let results: Vec<_> = tiles.iter().filter_map(|t| Some((t, linear_by(t, args)?))).collect();
                    assert!(results.len() >= 2, "{what}: {} kernels", results.len());
                    let first = results[0].1.to_f32_vec().unwrap();
                    for (tile, got) in &results {
                        assert_close(got, &want, f32_eps_allowed(activation, dtype), format!("{what} {tile}"));
                        assert!(got.to_f32_vec().unwrap() == first, "{what} {dtype} {tile}: other bits");
                    }
                    // The op's own choice among them, for fewer rows.
                    for some in [1, 63, 64, 65, 129].into_iter().filter(|&some| some < m) {
                        let [x, residual] = [&inputs.x, &inputs.residual].map(|all| all.rows(m - some..m).unwrap());
                        let args = Linear { x: &x, residual: args.residual.map(|_| &residual), ..args };
                        let got = ops::linear(args).unwrap().to_f32_vec().unwrap();
                        assert!(got == first[(m - some) * n..], "{what} {dtype}: the last {some} rows alone");
                    }
                }
            }
        }
    }
}

/// Hopper's kernels are for rows of whole aligned 16 bytes; what is not so goes to the portable ones, whatever the rows.
#[test]
fn hopper_kernels_run_where_tma_can_read() {
    for device in cards().into_iter().filter(|card| !hopper_kernels(card, DType::BF16).is_empty()) {
        let Device::Cuda(cuda) = &device else { unreachable!() };
        for (m, k, n, dtype, hopper) in [
            (1, 64, 64, DType::BF16, true),
            (130, 8, 8, DType::F16, true),
            (64, 60, 64, DType::BF16, false),
            (64, 64, 60, DType::BF16, false),
            (64, 64, 64, DType::F32, false),
        ] {
            let inputs = Inputs::new(&device, dtype, &[m], k, n, n);
            let moved = [&inputs.x, &inputs.weight, &inputs.bias, &inputs.residual].map(unaligned);
            let [x, weight, bias, residual] = &moved;
            let aligned = inputs.args(Activation::Gelu, true, true);
            for (args, hopper) in [
                (aligned, hopper),
                (Linear { x, ..aligned }, false),
                (Linear { weight, ..aligned }, false),
                (Linear { bias: Some(bias), ..aligned }, false),
                (Linear { residual: Some(residual), ..aligned }, false),
            ] {
                let graph = cuda.capture(1 << 24, || ops::linear(args).map(drop)).unwrap();
                let [kernel] = graph.kernels() else { panic!("{m} {k} {n}: {:?}", graph.kernels()) };
                assert_eq!(kernel.starts_with("linear_sm90_"), hopper, "{m} {k} {n} {dtype}: {kernel}");
            }
        }
    }
}

/// A copy of a tensor that begins 4 elements into its memory: no 16-byte boundary.
fn unaligned(x: &Tensor) -> Tensor {
    let values = x.to_f32_vec().unwrap();
    let padded = [&[f32::NAN; 4][..], &values].concat();
    let shape = [padded.len() / 4, 4];
    let all = Tensor::from_f32(x.device(), &shape, x.dtype(), &padded).unwrap();
    all.rows(1..shape[0]).unwrap().reshape(x.shape()).unwrap()
}

#[test]
fn tensors_may_begin_at_any_element() {
    for (device, dtype) in devices().into_iter().flat_map(|d| [DType::BF16, DType::F16].map(|dtype| (d.clone(), dtype)))
    {
        for activation in [Activation::Silu, Activation::Geglu] {
            let n = if activation.is_gated() { 16 } else { 32 };
            let aligned = Inputs::new(&device, dtype, &[20], 40, 32, n);
            let args = aligned.args(activation, true, true);
            // Hopper's kernels, which want aligned operands, add in another order.
            let portable = &portable_kernels(&device, dtype)[0];
            let want = ops::with_variants(portable, || ops::linear(args)).unwrap().to_f32_vec().unwrap();
            let moved = [&aligned.x, &aligned.weight, &aligned.bias, &aligned.residual].map(unaligned);
            let [x, weight, bias, residual] = &moved;
            for (what, args) in [
                ("x", Linear { x, ..args }),
                ("weight", Linear { weight, ..args }),
                ("bias", Linear { bias: Some(bias), ..args }),
                ("residual", Linear { residual: Some(residual), ..args }),
                ("all", Linear { x, weight, bias: Some(bias), residual: Some(residual), ..args }),
            ] {
                let got = ops::linear(args).unwrap().to_f32_vec().unwrap();
                assert!(got == want, "{device} {dtype} {activation:?}: {what} unaligned");
            }
        }
    }
}

/// An image depends on its own seed only: a row's sums are the same in any batch and on any number of threads.
#[test]
fn a_row_does_not_depend_on_the_others_or_on_the_threads() {
    for (device, dtype) in devices().into_iter().flat_map(|d| [DType::F32, DType::BF16].map(|dtype| (d.clone(), dtype)))
    {
        let m = if matches!(device, Device::Cpu(_)) { 1100 } else { 300 };
        let inputs = Inputs::new(&device, dtype, &[m], 700, 96, 96);
        let run =
            |x: &Tensor| ops::linear(Linear { bias: Some(&inputs.bias), ..Linear::new(x, &inputs.weight) }).unwrap();
        let all = run(&inputs.x).to_f32_vec().unwrap();
        // bf16: rows of 1400 bytes, so that the middle one begins beside a 16-byte boundary.
        for rows in [0..1, 5..19, m - 100..m] {
            let some = run(&inputs.x.rows(rows.clone()).unwrap()).to_f32_vec().unwrap();
            assert!(some == all[rows.start * 96..rows.end * 96], "{device} {dtype} rows {rows:?}");
        }
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert!(pool.install(|| run(&inputs.x)).to_f32_vec().unwrap() == all, "{device} {threads} threads");
        }
    }
}

#[test]
fn nan_and_infinity_reach_the_result() {
    for (device, dtype) in devices().into_iter().flat_map(|d| DType::FLOATS.map(|dtype| (d.clone(), dtype))) {
        // Of 8: Hopper's kernels.
        for size in [2, 8] {
            let mut values = vec![1.0; 2 * size];
            (values[0], values[size]) = (f32::NAN, f32::INFINITY);
            let x = Tensor::from_f32(&device, &[2, size], dtype, &values).unwrap();
            let weight = Tensor::from_f32(&device, &[size, size], dtype, &vec![1.0; size * size]).unwrap();
            for activation in Activation::ALL.into_iter().filter(|activation| !activation.is_gated()) {
                let y = ops::linear(Linear { activation, ..Linear::new(&x, &weight) }).unwrap().to_f32_vec().unwrap();
                let ok = y[..size].iter().all(|y| y.is_nan()) && y[size..].iter().all(|&y| y == f32::INFINITY);
                assert!(ok, "{device} {dtype} {activation:?} {size}: {y:?}");
            }
        }
    }
}

/// A row's NaN stays in that row, a weight's in its column, also where a tile ends inside K.
#[test]
fn nan_does_not_spread() {
    let (m, k) = (67, 40);
    for (device, dtype) in devices().into_iter().flat_map(|d| DType::FLOATS.map(|dtype| (d.clone(), dtype))) {
        let portable = portable_kernels(&device, dtype).into_iter().map(|kernel| (kernel, 70));
        for (kernel, n) in portable.chain(hopper_kernels(&device, dtype).into_iter().map(|kernel| (kernel, 72))) {
            let mut x = vec![1.0; m * k];
            let mut weight = vec![1.0; n * k];
            for row in (1..m).step_by(2) {
                x[row * k..(row + 1) * k].fill(f32::NAN);
            }
            for column in (1..n).step_by(2) {
                weight[column * k..(column + 1) * k].fill(f32::NAN);
            }
            let x = Tensor::from_f32(&device, &[m, k], dtype, &x).unwrap();
            let weight = Tensor::from_f32(&device, &[n, k], dtype, &weight).unwrap();
            let y =
                ops::with_variants(&kernel, || ops::linear(Linear::new(&x, &weight))).unwrap().to_f32_vec().unwrap();
            for (i, y) in y.into_iter().enumerate() {
                let spoiled = (i / n) % 2 == 1 || (i % n) % 2 == 1;
                let ok = if spoiled { y.is_nan() } else { y == k as f32 };
                assert!(ok, "{device} {dtype} {kernel}: row {} column {} is {y}", i / n, i % n);
            }
        }
    }
}

/// A table of gates for `images` images, `rows` a step, of three steps, with 8 columns before those of the gates.
struct Gates {
    table: Tensor,
    step: StepIndex,
    rows: usize,
}

const BEFORE: usize = 8;

impl Gates {
    fn new(device: &Device, dtype: DType, images: usize, rows: usize, n: usize) -> Gates {
        let table = Random::new(8).randn(device, &[3 * rows, BEFORE + n], dtype);
        // Every image at a step of its own, but the first.
        let steps: Vec<usize> = (0..images.max(1)).map(|image| (2 + image) % 3).collect();
        Gates { table, step: StepIndex::new(device, &steps).unwrap(), rows }
    }

    fn columns(&self) -> StepColumns<'_> {
        StepColumns { rows: StepRows { table: &self.table, step: &self.step, rows: self.rows }, first: BEFORE }
    }
}

/// Images, rows of each, K, N, conditioning rows: images that end inside a tile of rows and at its edge; N of whole chunks and not;
/// a row for all, one for every two, one each; no image.
const GATED: [[usize; 5]; 8] = [
    [1, 1, 1, 1, 1],
    [2, 3, 7, 5, 2],
    [4, 33, 40, 66, 2],
    [2, 64, 72, 136, 1],
    [3, 77, 64, 264, 3],
    [6, 1, 16, 8, 3],
    [2, 150, 136, 160, 2],
    [0, 4, 8, 8, 1],
];

#[test]
fn a_gate_multiplies_each_images_rows() {
    for (device, dtype, [images, l, k, n, rows]) in cases(&GATED) {
        let (inputs, gates) =
            (Inputs::new(&device, dtype, &[images, l], k, n, n), Gates::new(&device, dtype, images, rows, n));
        for (bias, residual) in [(true, true), (false, false), (true, false)] {
            let args = Linear { gate: Some(gates.columns()), ..inputs.args(Activation::None, bias, residual) };
            let want = crate::common::linear(&args);
            // Portable ones make the same bits, and Hopper's.
            let mut some = false;
            for kernels in [portable_kernels(&device, dtype), hopper_kernels(&device, dtype)] {
                let mut first: Option<Vec<f32>> = None;
                for kernel in &kernels {
                    let got = match ops::with_variants(kernel, || ops::linear(args)) {
                        Err(Error::Argument { arg: "MEGAFUSE_KERNEL", .. }) => continue,
                        got => got.unwrap(),
                    };
                    some = true;
                    let what = format!("{device} {kernel} {images} {l} {k} {n} {rows} bias {bias} residual {residual}");
                    assert_close(&got, &want, 9.0, &what);
                    let got = got.to_f32_vec().unwrap();
                    assert!(*first.get_or_insert_with(|| got.clone()) == got, "{what} {dtype}: other bits");
                }
            }
            assert!(some, "{device} {dtype} {images} {l} {k} {n}: no kernel takes a gate");
        }
    }
}

/// The gates' columns begin at any element of the table, or their rows do.
#[test]
fn gates_may_begin_at_any_element() {
    for (device, dtype, wide) in cases(&[0, 3]) {
        let (inputs, gates) =
            (Inputs::new(&device, dtype, &[2, 9], 40, 32, 32), Gates::new(&device, dtype, 2, 2, 32 + wide));
        for first in [0, 5, 8] {
            let gate = Some(StepColumns { first, ..gates.columns() });
            let args = Linear { gate, ..inputs.args(Activation::None, true, true) };
            assert_close(&ops::linear(args).unwrap(), &crate::common::linear(&args), 9.0, format!("{device} {first}"));
        }
    }
}

#[test]
fn meta_records_gates_that_are_read_once() {
    let device = Device::meta();
    let zeros = |shape: &[usize]| Tensor::zeros(&device, shape, DType::BF16).unwrap();
    let (x, weight) = (zeros(&[4, 10, 16]), zeros(&[24, 16]));
    let (table, step) = (zeros(&[6, 100]), StepIndex::one(&device, 1).unwrap());
    let Device::Meta(meta) = &device else { unreachable!() };
    meta.take_report();
    let gate = Some(StepColumns { rows: StepRows { table: &table, step: &step, rows: 2 }, first: 76 });
    ops::linear(Linear { gate, ..Linear::new(&x, &weight) }).unwrap();
    let work = meta.take_report().of(OpKind::Linear);
    assert_eq!(work.flops, 2 * work.macs + 40 * 24);
    assert_eq!(work.bytes, 2 * (40 * 16 + 24 * 16 + 2 * 24 + 40 * 24));
}

#[test]
fn arguments_of_a_gate_that_do_not_fit_are_named() {
    let device = Device::cpu();
    let zeros = |shape: &[usize], dtype| Tensor::zeros(&device, shape, dtype).unwrap();
    let f = DType::F32;
    let (x, weight, table) = (zeros(&[4, 2, 3], f), zeros(&[5, 3], f), zeros(&[6, 12], f));
    let step = |step| StepIndex::one(&device, step).unwrap();
    let (first, third) = (step(0), step(3));
    let gate = StepColumns { rows: StepRows { table: &table, step: &first, rows: 2 }, first: 7 };
    let ok = Linear { gate: Some(gate), ..Linear::new(&x, &weight) };
    assert!(ops::linear(ok).is_ok());
    let fails = |args: Linear, expected: &str| {
        let error = ops::linear(args).unwrap_err().to_string();
        assert!(error.contains(expected), "{error} does not contain {expected}");
    };
    fails(
        Linear { gate: Some(StepColumns { first: 8, ..gate }), ..ok },
        "gate has shape [6, 12], expected columns 8 to 13",
    );
    let half = zeros(&[6, 12], DType::F16);
    for (rows, expected) in [
        (StepRows { rows: 3, ..gate.rows }, "conditioning rows is 3"),
        (StepRows { step: &third, ..gate.rows }, "step is 3, expected below 3"),
        (StepRows { table: &half, ..gate.rows }, "gate is f16, expected f32"),
    ] {
        fails(Linear { gate: Some(StepColumns { rows, ..gate }), ..ok }, expected);
    }
    fails(Linear { activation: Activation::Silu, ..ok }, "activation is Silu, expected None beside a gate");
    fails(Linear { x: &zeros(&[3], f), ..ok }, "x has shape [3], expected [images, ..., K] beside a gate");
}

#[test]
fn meta_records_the_fused_kernel() {
    let device = Device::meta();
    let zeros = |shape: &[usize]| Tensor::zeros(&device, shape, DType::BF16).unwrap();
    let (x, weight, bias, residual) =
        (zeros(&[2, 4096, 320]), zeros(&[2560, 320]), zeros(&[2560]), zeros(&[2, 4096, 1280]));
    let Device::Meta(meta) = &device else { unreachable!() };
    meta.take_report();
    let args = Linear {
        bias: Some(&bias),
        activation: Activation::Geglu,
        residual: Some(&residual),
        ..Linear::new(&x, &weight)
    };
    let y = ops::linear(args).unwrap();
    assert_eq!(y.shape(), [2, 4096, 1280]);
    let report = meta.take_report();
    let work = report.of(OpKind::Linear);
    assert_eq!((work.macs, work.launches, report.ops.len()), (2 * 4096 * 320 * 2560, 1, 1));
    assert_eq!(work.bytes, 2 * (2 * 4096 * 320 + 2560 * 320 + 2560 + 2 * (2 * 4096 * 1280)));
    // bias: 2560 a row; GEGLU 6 and residual 1: 1280 a row each.
    assert_eq!(work.flops, 2 * work.macs + 8192 * (2560 + 7 * 1280));
    assert_eq!((report.ops[0].op, &report.ops[0].output[..]), ("linear", y.shape()));
}

#[test]
fn arguments_that_do_not_fit_are_named() {
    let device = Device::cpu();
    let zeros = |shape: &[usize], dtype| Tensor::zeros(&device, shape, dtype).unwrap();
    let f = DType::F32;
    let (x, weight) = (zeros(&[2, 3], f), zeros(&[5, 3], f));
    let elsewhere = Tensor::zeros(&Device::cpu(), &[5], f).unwrap();
    let fails = |args: Linear, expected: &str| {
        let error = ops::linear(args).unwrap_err();
        assert!(error.to_string().contains(expected), "{error} does not contain {expected}");
        error
    };
    let ok = Linear::new(&x, &weight);
    assert!(ops::linear(ok).is_ok());
    let scalar = zeros(&[], f);
    fails(Linear { x: &scalar, ..ok }, "linear: x has shape []");
    fails(Linear { weight: &zeros(&[5, 4], f), ..ok }, "weight has shape [5, 4], expected [5, 3]");
    fails(Linear { weight: &zeros(&[3], f), ..ok }, "weight has shape [3], expected 2 dimensions");
    fails(Linear { weight: &zeros(&[5, 3], DType::F16), ..ok }, "weight is f16, expected f32");
    fails(Linear { bias: Some(&zeros(&[4], f)), ..ok }, "bias has shape [4], expected [5]");
    fails(Linear { residual: Some(&zeros(&[2, 3], f)), ..ok }, "residual has shape [2, 3], expected [2, 5]");
    fails(Linear { activation: Activation::Geglu, ..ok }, "weight has shape [5, 3], expected an even number");
    let error = fails(Linear { bias: Some(&elsewhere), ..ok }, "bias is on cpu");
    assert!(matches!(error, Error::Device { arg: "bias", .. }));
    let error = fails(Linear { x: &zeros(&[2, 3], DType::U32), ..ok }, "x is u32");
    assert!(matches!(error, Error::Dtype { arg: "x", .. }));
}
