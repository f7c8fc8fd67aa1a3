//! Shared by the ops' tests: seeded inputs, textbook loops in f64, and a comparison of every element.
#![allow(dead_code)] // each test binary uses a part

pub mod drawn;
pub mod skip;

use std::fmt::Display;

use megafuse::Error;
use megafuse::ops::{Activation, Conv2d, GroupNorm, LayerNorm, Linear, Modulation, Source, StepColumns, StepRows};
use megafuse::runtime::cuda::Isa;
use megafuse::runtime::{CudaDevice, CudaOptions, DType, Device, Tensor};

pub const F32_EPS: f64 = f32::EPSILON as f64;

/// The devices that every op is tested on: the cpu and the emulated card, or those that `MEGAFUSE_TEST_DEVICES` lists
/// (`cpu`, `emu`, `cuda`), for a machine that has a card. On a card each tensor is an allocation of its own.
pub fn devices() -> Vec<Device> {
    skip::device_names().iter().map(|name| device(name)).collect()
}

/// The cards among [`devices`]; a test without one says that it checks nothing.
pub fn cards() -> Vec<Device> {
    let cards: Vec<Device> = devices().into_iter().filter(|device| matches!(device, Device::Cuda(_))).collect();
    if cards.is_empty() {
        skip::skipped("no card among MEGAFUSE_TEST_DEVICES");
    }
    cards
}

/// The cards among [`devices`] that run kernels/sm90; each other one is said to be left out.
pub fn hoppers() -> Vec<(Device, CudaDevice)> {
    let mut found = Vec::new();
    for device in cards() {
        match &device {
            Device::Cuda(card) if card.has(Isa::Sm90a) => found.push((device.clone(), card.clone())),
            other => skip::skipped(&format!("{other} or this build has no sm_90a")),
        }
    }
    found
}

/// One of these by its name.
pub fn device(name: &str) -> Device {
    let options = CudaOptions { separate_allocations: true, ..CudaOptions::default() };
    match name {
        "cpu" => Device::cpu(),
        "emu" => Device::emulated(options).unwrap_or_else(|error| match error {
            Error::DeviceUnavailable { .. } => {
                panic!("{error}\n(MEGAFUSE_TEST_DEVICES=cpu tests without the emulated card)")
            }
            // Tests that run at once share the card, and its faults.
            _ => panic!("{error}\n(a fault of another test? the first [emu] line says which kernel; --test-threads=1)"),
        }),
        "cuda" => Device::Cuda(CudaDevice::open(options).unwrap_or_else(|error| panic!("{error}"))),
        other => panic!("MEGAFUSE_TEST_DEVICES has {other:?}, expected cpu, emu and cuda, separated by commas"),
    }
}

/// Every device, float dtype and shape.
pub fn cases<S: Copy>(shapes: &[S]) -> impl Iterator<Item = (Device, DType, S)> {
    let of_device = move |device: Device| {
        DType::FLOATS.into_iter().flat_map(move |dtype| {
            let device = device.clone();
            shapes.iter().map(move |&shape| (device.clone(), dtype, shape))
        })
    };
    devices().into_iter().flat_map(of_device)
}

/// A copy of a tensor that begins one element into its memory.
pub fn unaligned(x: &Tensor) -> Tensor {
    let padded = [&[f32::NAN][..], &x.to_f32_vec().unwrap()].concat();
    let all = Tensor::from_f32(x.device(), &[padded.len()], x.dtype(), &padded).unwrap();
    all.rows(1..padded.len()).unwrap().reshape(x.shape()).unwrap()
}

/// Seeded normal numbers (SplitMix64, Box-Muller).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In (0, 1].
    pub fn uniform(&mut self) -> f64 {
        ((self.bits() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    pub fn normal(&mut self) -> f64 {
        (-2.0 * self.uniform().ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// Normal values of mean `mean` and deviation `std`, rounded to `dtype`.
    pub fn tensor(&mut self, device: &Device, shape: &[usize], dtype: DType, mean: f64, std: f64) -> Tensor {
        let count = shape.iter().product();
        let values: Vec<f32> = (0..count).map(|_| (mean + std * self.normal()) as f32).collect();
        Tensor::from_f32(device, shape, dtype, &values).unwrap()
    }

    /// Standard normal values.
    pub fn randn(&mut self, device: &Device, shape: &[usize], dtype: DType) -> Tensor {
        self.tensor(device, shape, dtype, 0.0, 1.0)
    }
}

/// The elements in f64.
pub fn f64s(x: &Tensor) -> Vec<f64> {
    x.to_f32_vec().unwrap().into_iter().map(f64::from).collect()
}

/// For `ops::with_variants`: each kernel that the device has for an op of whole aligned operands; where there is no choice,
/// the op's own.
pub fn kernels(op: &str, device: &Device, dtype: DType) -> Vec<String> {
    let variants = megafuse::ops::variants_on(op, device, dtype);
    let named: Vec<String> = variants.iter().map(|variant| format!("{op}={}", variant.name)).collect();
    if named.is_empty() { vec![String::new()] } else { named }
}

/// What an op should return, and how large the terms were that each element is a sum of: f32 arithmetic errs by a few
/// [`F32_EPS`] of that.
#[derive(Clone, Debug)]
pub struct Expected {
    pub shape: Vec<usize>,
    pub values: Vec<f64>,
    pub magnitudes: Vec<f64>,
}

/// Every element within half an ulp of its dtype (the store's rounding) plus `f32_eps` times [`F32_EPS`] times its
/// magnitude (the arithmetic).
pub fn assert_close(got: &Tensor, want: &Expected, f32_eps: f64, what: impl Display) {
    assert_eq!(got.shape(), want.shape, "{what}");
    let dtype = got.dtype();
    // Below the normal numbers f16 rounds to multiples of 2^-24.
    let floor = if dtype == DType::F16 { 2f64.powi(-25) } else { 1e-37 };
    let got = f64s(got);
    for (i, (&got, (&value, &magnitude))) in got.iter().zip(want.values.iter().zip(&want.magnitudes)).enumerate() {
        let arithmetic = f32_eps * F32_EPS * magnitude;
        let tolerance = dtype.ulp() / 2.0 * (value.abs() + arithmetic) + arithmetic + floor;
        let error = (got - value).abs();
        assert!(
            error <= tolerance,
            "{what} {dtype}: element {i} of {:?} is {got}, expected {value}: off by {error:.3e}, allowed {tolerance:.3e}",
            want.shape
        );
    }
}

/// Standard normal distribution function times x, by erf in f64.
pub fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + erf(x / 2f64.sqrt()))
}

pub fn gelu_tanh(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
}

pub fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// Maclaurin series, or the continued fraction of the tail: 1e-13.
pub fn erf(x: f64) -> f64 {
    let z = x.abs();
    let value = if z < 2.5 {
        let (mut sum, mut term) = (z, z);
        for n in 1..100 {
            term *= -z * z / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        2.0 / std::f64::consts::PI.sqrt() * sum
    } else {
        let fraction = (1..200).rev().fold(z, |f, n| z + f64::from(n) / 2.0 / f);
        1.0 - (-z * z).exp() / (std::f64::consts::PI.sqrt() * fraction)
    };
    value.copysign(x)
}

pub fn linear(args: &Linear) -> Expected {
    linear_of(args, &f64s(args.x), &f64s(args.weight))
}

/// With these values for x and weight, of which only the shapes are asked.
pub fn linear_of(args: &Linear, x: &[f64], weight: &[f64]) -> Expected {
    let (bias, residual) = (args.bias.map(f64s), args.residual.map(f64s));
    let (k, rows) = (args.weight.shape()[1], args.weight.shape()[0]);
    let m: usize = args.x.shape().split_last().unwrap().1.iter().product();
    let n = if args.activation.is_gated() { rows / 2 } else { rows };
    let gates = args.gate.map(|gate| columns_of(&gate, args.x.shape()[0], n));
    let mut shape = args.x.shape().to_vec();
    *shape.last_mut().unwrap() = n;
    let (mut values, mut magnitudes) = (Vec::new(), Vec::new());
    for i in 0..m {
        let product = |j: usize| {
            let bias = bias.as_ref().map_or(0.0, |b| b[j]);
            let terms = || (0..k).map(|k_| x[i * k + k_] * weight[j * k + k_]).chain([bias]);
            (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>())
        };
        for j in 0..n {
            let (value, magnitude) = match args.activation {
                Activation::None => product(j),
                Activation::Silu => (silu(product(j).0), 1.2 * product(j).1),
                Activation::Gelu => (gelu(product(j).0), 1.2 * product(j).1),
                Activation::QuickGelu => (product(j).0 / (1.0 + (-1.702 * product(j).0).exp()), 1.2 * product(j).1),
                Activation::GeluTanh => (gelu_tanh(product(j).0), 1.2 * product(j).1),
                Activation::Geglu | Activation::GegluTanh => {
                    let ((value, value_magnitude), (gate, gate_magnitude)) = (product(2 * j), product(2 * j + 1));
                    let factor = if args.activation == Activation::Geglu { gelu(gate) } else { gelu_tanh(gate) };
                    // The factors' errors, each times the other factor.
                    (value * factor, value_magnitude * factor.abs() + 1.2 * gate_magnitude * value.abs())
                }
            };
            let gate = gates.as_ref().map_or(1.0, |gates| gates[i / (m / gates.len())][j]);
            let (value, magnitude) = (value * gate, magnitude * gate.abs());
            let residual = residual.as_ref().map_or(0.0, |r| r[i * n + j]);
            values.push(value + residual);
            magnitudes.push(magnitude + value.abs() + residual.abs());
        }
    }
    Expected { shape, values, magnitudes }
}

/// The `width` columns of each image's row, by the table's definition.
pub fn columns_of(columns: &StepColumns, images: usize, width: usize) -> Vec<Vec<f64>> {
    let StepRows { table, step, rows } = columns.rows;
    let (values, all) = (f64s(table), table.shape()[1]);
    let row = |image: usize| step.get(image % step.images()) * rows + image / (images / rows);
    (0..images).map(|image| values[row(image) * all + columns.first..][..width].to_vec()).collect()
}

/// Scale and shift of each image.
fn modulation_of(&Modulation { rows, scale, shift }: &Modulation, images: usize, c: usize) -> [Vec<Vec<f64>>; 2] {
    [scale, shift].map(|first| columns_of(&StepColumns { rows, first }, images, c))
}

/// The sources side by side, `[N, H, W, C]`.
pub fn concatenated(x: &Source) -> (Vec<f64>, [usize; 4]) {
    let [n, h, w, c] = x.dims("test").unwrap();
    let c_a = x.first().shape()[3];
    let (a, b) = (f64s(x.first()), x.second().map(f64s).unwrap_or_default());
    let mut values = Vec::with_capacity(n * h * w * c);
    for pixel in 0..n * h * w {
        values.extend(&a[pixel * c_a..(pixel + 1) * c_a]);
        values.extend(&b[pixel * (c - c_a)..(pixel + 1) * (c - c_a)]);
    }
    (values, [n, h, w, c])
}

pub fn group_norm(args: &GroupNorm) -> Expected {
    let (x, [n, h, w, c]) = concatenated(&args.x);
    let (gamma, beta) = (f64s(args.gamma), f64s(args.beta));
    let modulation = args.modulation.map(|modulation| modulation_of(&modulation, n, c));
    let group = c / args.groups;
    let mut values = vec![0.0; x.len()];
    let mut magnitudes = vec![0.0; x.len()];
    for image in 0..n {
        for g in 0..args.groups {
            let at = |pixel: usize, j: usize| (image * h * w + pixel) * c + g * group + j;
            let all = || (0..h * w).flat_map(|pixel| (0..group).map(move |j| at(pixel, j)));
            let count = (h * w * group) as f64;
            let mean = all().map(|i| x[i]).sum::<f64>() / count;
            let var = all().map(|i| (x[i] - mean).powi(2)).sum::<f64>() / count;
            let rstd = 1.0 / (var + f64::from(args.eps)).sqrt();
            let size = all().map(|i| x[i].abs()).sum::<f64>() / count;
            for i in all() {
                let [scale, shift] =
                    modulation.as_ref().map_or([0.0; 2], |parts| parts.each_ref().map(|part| part[image][i % c]));
                let y = ((x[i] - mean) * rstd * gamma[i % c] + beta[i % c]) * (1.0 + scale) + shift;
                values[i] = match args.activation {
                    Activation::None => y,
                    Activation::Silu => silu(y),
                    Activation::Gelu => gelu(y),
                    other => panic!("{other:?} after a group norm"),
                };
                // The mean, a sum of terms of this size, and the difference from it are rounded.
                let affine = (x[i].abs() + size) * rstd * gamma[i % c].abs() + beta[i % c].abs();
                magnitudes[i] = affine * (1.0 + scale).abs() + shift.abs() + y.abs();
            }
        }
    }
    Expected { shape: vec![n, h, w, c], values, magnitudes }
}

pub fn layer_norm(args: &LayerNorm) -> Expected {
    let x = f64s(args.x);
    let c = *args.x.shape().last().unwrap();
    let of = |affine: Option<&Tensor>, otherwise: f64| affine.map_or_else(|| vec![otherwise; c], f64s);
    let (gamma, beta) = (of(args.gamma, 1.0), of(args.beta, 0.0));
    let images = args.x.shape()[0];
    let modulation = args.modulation.map(|modulation| modulation_of(&modulation, images, c));
    let (mut values, mut magnitudes) = (Vec::new(), Vec::new());
    let image_rows = (x.len() / c.max(1) / images.max(1)).max(1);
    for (number, row) in x.chunks_exact(c.max(1)).enumerate() {
        let mean = row.iter().sum::<f64>() / c as f64;
        let var = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / c as f64;
        let rstd = 1.0 / (var + f64::from(args.eps)).sqrt();
        let size = row.iter().map(|x| x.abs()).sum::<f64>() / c as f64;
        for (i, x) in row.iter().enumerate() {
            let of_image = |part: &[Vec<Vec<f64>>; 2], number_of: usize| part[number_of][number / image_rows][i];
            let [scale, shift] = modulation.as_ref().map_or([0.0, 0.0], |m| [of_image(m, 0), of_image(m, 1)]);
            values.push(((x - mean) * rstd * gamma[i] + beta[i]) * (1.0 + scale) + shift);
            let affine = (x.abs() + size) * rstd * gamma[i].abs() + beta[i].abs();
            magnitudes.push(affine * (1.0 + scale).abs() + shift.abs());
        }
    }
    Expected { shape: args.x.shape().to_vec(), values, magnitudes }
}

pub fn conv2d(args: &Conv2d) -> Expected {
    let (x, [n, h, w, c]) = match args.norm {
        None => concatenated(&args.x),
        Some(norm) => (group_norm(&norm.of(args.x)).values, concatenated(&args.x).1),
    };
    let weight = f64s(args.weight);
    let &[outputs, kh, kw, _] = args.weight.shape() else { panic!("[O, kh, kw, I]") };
    let [top, bottom, left, right] = args.padding;
    let [in_h, in_w] = args.resize_to.unwrap_or([h, w]);
    let size = |size: usize, padding: usize, kernel: usize| {
        (size + padding - args.dilation * (kernel - 1) - 1) / args.stride + 1
    };
    let (out_h, out_w) = (size(in_h, top + bottom, kh), size(in_w, left + right, kw));
    let (bias, residual) = (args.bias.map(f64s), args.residual.map(f64s));
    let steps = |row: &StepRows| f64s(row.step.tensor())[..row.step.images()].to_vec();
    let row = args.row.map(|row| (f64s(row.table), steps(&row), row.rows));
    // Image i of n: the step of i modulo the steps given, the conditioning row of its part of the batch.
    let row = row.map(|(table, steps, rows)| {
        let first = |image: usize| (steps[image % steps.len()] as usize * rows + image / (n / rows)) * outputs;
        (0..n).map(|image| table[first(image)..][..outputs].to_vec()).collect::<Vec<_>>()
    });
    let (mut values, mut magnitudes) = (Vec::new(), Vec::new());
    for (image, out_y, out_x) in product3(n, out_h, out_w) {
        for o in 0..outputs {
            let mut terms = vec![
                bias.as_ref().map_or(0.0, |b| b[o]),
                row.as_ref().map_or(0.0, |r| r[image][o]),
                residual.as_ref().map_or(0.0, |r| r[((image * out_h + out_y) * out_w + out_x) * outputs + o]),
            ];
            for (ky, kx, i) in product3(kh, kw, c) {
                let (y, x_) = (out_y * args.stride + ky * args.dilation, out_x * args.stride + kx * args.dilation);
                if y < top || x_ < left || y - top >= in_h || x_ - left >= in_w {
                    continue;
                }
                let (y, x_) = ((y - top) * h / in_h, (x_ - left) * w / in_w);
                terms.push(weight[((o * kh + ky) * kw + kx) * c + i] * x[((image * h + y) * w + x_) * c + i]);
            }
            let scale = f64::from(args.scale);
            let sum = scale * terms.iter().sum::<f64>();
            values.push(if sum < 0.0 { f64::from(args.negative_slope) * sum } else { sum });
            magnitudes.push(scale.abs() * terms.iter().map(|t| t.abs()).sum::<f64>());
        }
    }
    Expected { shape: vec![n, out_h, out_w, outputs], values, magnitudes }
}

pub fn product3(a: usize, b: usize, c: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..a).flat_map(move |i| (0..b).flat_map(move |j| (0..c).map(move |k| (i, j, k))))
}
