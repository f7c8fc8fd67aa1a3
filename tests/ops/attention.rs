//! attention against plain f64 loops.

use crate::common::{Expected, F32_EPS, Random, assert_close, cards, devices, f64s, kernels};
use megafuse::Error;
use megafuse::ops::{self, Attention, AttentionOptions, SecondSource, StepIndex, WindowShift, Windows};
use megafuse::runtime::{DType, Device, OpKind, Tensor};

/// N, tokens, heads, head_dim. One; primes; off and on the cpu's tile of 14 rows, panel of 32 columns, blocks of 224
/// queries and 256 keys and depth of 256; off and on the card's tiles of 32 and 64 queries and keys and every width that
/// has a kernel of its own; nothing at all; the models' head widths.
const SELF: [[usize; 4]; 26] = [
    [1, 1, 1, 1],
    [2, 3, 2, 5],
    [1, 14, 3, 16],
    [1, 15, 1, 17],
    [2, 77, 2, 64],
    [1, 97, 1, 33],
    [1, 224, 1, 7],
    [1, 256, 2, 40],
    [1, 257, 1, 31],
    [2, 521, 1, 8],
    [1, 64, 3, 160],
    [1, 50, 1, 255],
    [1, 50, 1, 257],
    [1, 300, 1, 512],
    [1, 1025, 1, 24],
    [1, 64, 1, 48],
    [1, 63, 2, 72],
    [1, 65, 1, 80],
    [2, 129, 1, 81],
    [1, 128, 1, 128],
    [1, 33, 2, 144],
    [1, 32, 2, 192],
    [2, 95, 1, 161],
    [0, 5, 2, 8],
    [2, 0, 2, 8],
    [2, 5, 0, 8],
];

/// N, queries, keys, heads, head_dim. Those of 64 heads and more have so many blocks that the card takes its long tiles.
const CROSS: [[usize; 5]; 13] = [
    [1, 1, 1, 1, 1],
    [1, 1, 513, 2, 3],
    [2, 13, 7, 3, 11],
    [2, 256, 77, 2, 40],
    [1, 61, 154, 2, 80],
    [1, 300, 257, 1, 64],
    [2, 40, 77, 1, 512],
    [1, 129, 65, 64, 40],
    [1, 17, 33, 128, 64],
    [1, 2, 77, 128, 80],
    [1, 70, 63, 2, 61],
    [0, 3, 5, 2, 8],
    [2, 0, 5, 2, 8],
];

/// What a device rounds the weights to before their product with the values.
fn weights(device: &Device, dtype: DType) -> DType {
    if matches!(device, Device::Cuda(_)) { dtype } else { DType::F32 }
}

#[test]
fn self_attention_matches_f64() {
    for device in devices() {
        for (dtype, [n, l, heads, d]) in DType::FLOATS.into_iter().flat_map(|dtype| SELF.map(|s| (dtype, s))) {
            let qkv = Random::new(5).randn(&device, &[n, l, 3, heads, d], dtype);
            for causal in [false, true] {
                let got = ops::attention(Attention::Packed { qkv: &qkv, causal }).unwrap();
                assert_eq!(got.dtype(), dtype);
                let x = f64s(&qkv);
                let want = reference([n, l, l, heads, d], causal, weights(&device, dtype), |part, b, i, h| {
                    row(&x, d, ((b * l + i) * 3 + part) * heads + h)
                });
                assert_close(&got, &want, 8.0, format!("{device} self {n} {l} {heads} {d} causal {causal}"));
            }
        }
    }
}

#[test]
fn cross_attention_matches_f64() {
    for device in devices() {
        for (dtype, shape) in DType::FLOATS.into_iter().flat_map(|dtype| CROSS.map(|s| (dtype, s))) {
            let [n, queries, keys, heads, d] = shape;
            let mut random = Random::new(6);
            let q = random.randn(&device, &[n, queries, heads, d], dtype);
            let kv = random.randn(&device, &[n, keys, 2, heads, d], dtype);
            let got = ops::attention(Attention::Cross { q: &q, kv: &kv }).unwrap();
            let (q, kv) = (f64s(&q), f64s(&kv));
            let want = reference(shape, false, weights(&device, dtype), |part, b, i, h| match part {
                0 => row(&q, d, (b * queries + i) * heads + h),
                _ => row(&kv, d, ((b * keys + i) * 2 + part - 1) * heads + h),
            });
            assert_close(&got, &want, 8.0, format!("{device} cross {shape:?}"));
        }
    }
}

/// Queries and keys of one fused projection, values of another, which may lie behind it in one memory.
#[test]
fn borrowed_weights_match_f64() {
    let shapes = [[2, 77, 2, 64], [1, 97, 1, 33], [1, 65, 1, 80], [3, 30, 3, 32], [0, 5, 2, 8], [2, 5, 0, 8]];
    for device in devices() {
        for (dtype, [n, l, heads, d]) in DType::FLOATS.into_iter().flat_map(|dtype| shapes.map(|s| (dtype, s))) {
            let both = Random::new(16).randn(&device, &[2 * n, l, 3, heads, d], dtype);
            let (qk, v) = (both.rows(0..n).unwrap(), both.rows(n..2 * n).unwrap());
            let got = ops::attention(Attention::Borrowed { qk: &qk, v: &v }).unwrap();
            let x = f64s(&both);
            let want = reference([n, l, l, heads, d], false, weights(&device, dtype), |part, b, i, h| {
                let image = if part == 2 { n + b } else { b };
                row(&x, d, ((image * l + i) * 3 + part) * heads + h)
            });
            assert_close(&got, &want, 8.0, format!("{device} borrowed {n} {l} {heads} {d}"));
        }
    }
}

/// Images that share keys and values, on every kind of tile: narrow and long, of any width, wide.
#[test]
fn images_share_the_rows_of_kv() {
    for (device, dtype) in devices().into_iter().flat_map(|device| DType::FLOATS.map(|dtype| (device.clone(), dtype))) {
        for [queries, keys, heads, d] in [[40, 77, 2, 40], [5, 9, 1, 7], [17, 33, 128, 64], [3, 33, 1, 176]] {
            let mut random = Random::new(12);
            let n = if heads > 2 { 2 } else { 6 };
            let q = random.randn(&device, &[n, queries, heads, d], dtype);
            for rows in [1, 2, 3, 6].into_iter().filter(|rows| n % rows == 0) {
                let kv = random.randn(&device, &[rows, keys, 2, heads, d], dtype);
                let got = ops::attention(Attention::Cross { q: &q, kv: &kv }).unwrap();
                let (q, kv) = (f64s(&q), f64s(&kv));
                let shape = [n, queries, keys, heads, d];
                let want = reference(shape, false, weights(&device, dtype), |part, b, i, h| match part {
                    0 => row(&q, d, (b * queries + i) * heads + h),
                    _ => row(&kv, d, ((b / (n / rows) * keys + i) * 2 + part - 1) * heads + h),
                });
                assert_close(&got, &want, 8.0, format!("{device} {shape:?} {rows} rows"));
            }
        }
    }
}

fn row(x: &[f64], d: usize, index: usize) -> &[f64] {
    &x[index * d..][..d]
}

/// The textbook: `part(0 | 1 | 2, batch, token, head)` is a row of q, k or v. Pairs that causality masks never enter.
/// `weights`: what the device rounds them to, relative to their maximum so far.
fn reference<'a>(
    [n, queries, keys, heads, d]: [usize; 5],
    causal: bool,
    weights: DType,
    part: impl Fn(usize, usize, usize, usize) -> &'a [f64],
) -> Expected {
    let scale = 1.0 / (d as f64).sqrt();
    softmax_sum([n, queries, keys, heads, d], causal, weights, scale, |_, _, _, _| 0.0, part)
}

/// The same with a scale, and `bias(batch, query, key, head)`.
fn softmax_sum<'a>(
    [n, queries, keys, heads, d]: [usize; 5],
    causal: bool,
    weights: DType,
    scale: f64,
    bias: impl Fn(usize, usize, usize, usize) -> f64,
    part: impl Fn(usize, usize, usize, usize) -> &'a [f64],
) -> Expected {
    let relative = if weights == DType::F32 { 0.0 } else { weights.ulp() / 2.0 };
    // f16 rounds what is below its normal numbers to multiples of 2^-24.
    let absolute = if weights == DType::F16 { 2f64.powi(-25) } else { 0.0 };
    let (mut values, mut magnitudes) = (Vec::new(), Vec::new());
    for (b, i, h) in crate::common::product3(n, queries, heads) {
        let q = part(0, b, i, h);
        let seen = if causal { i + 1 } else { keys };
        let terms = |j: usize| q.iter().zip(part(1, b, j, h)).map(move |(q, k)| scale * q * k);
        let bias = |j: usize| bias(b, i, j, h);
        let scores: Vec<f64> = (0..seen).map(|j| terms(j).sum::<f64>() + bias(j)).collect();
        // What the roundings of a score are relative to; they move the weights by as much, relatively.
        let size = |j: usize| terms(j).map(f64::abs).sum::<f64>() + bias(j).abs();
        let largest_terms = (0..seen).map(size).filter(|size| size.is_finite()).fold(0.0, f64::max);
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = scores.iter().map(|score| (score - max).exp()).sum();
        let (mut sum, mut magnitude) = (vec![0.0; d], vec![0.0; d]);
        for (j, score) in scores.iter().enumerate() {
            let weight = (score - max).exp() / total;
            let rounding = (weight * relative + absolute / total) / (8.0 * F32_EPS);
            for (c, v) in part(2, b, j, h).iter().enumerate() {
                sum[c] += weight * v;
                magnitude[c] += (weight * (1.0 + largest_terms) + rounding) * v.abs();
            }
        }
        values.extend(sum);
        magnitudes.extend(magnitude);
    }
    Expected { shape: vec![n, queries, heads, d], values, magnitudes }
}

/// Whether the kernel that `MEGAFUSE_KERNEL` names can take this, and what it gives.
fn attention_by(kernel: &str, args: Attention, options: AttentionOptions) -> Option<Tensor> {
    match ops::with_variants(kernel, || ops::attention_with(args, options)) {
        Err(Error::Argument { arg: "MEGAFUSE_KERNEL", .. }) => None,
        result => Some(result.unwrap()),
    }
}

/// The width that a kernel is for: 64 of `attention=sm90_d64_192`.
fn width_of(kernel: &str) -> usize {
    let words = kernel.split(['=', '_']);
    let width = words.filter_map(|word| word.strip_prefix('d')?.parse().ok()).next();
    width.unwrap_or_else(|| panic!("{kernel} names no width"))
}

/// Each kernel by its name, at more than one tile of queries and of keys, both with an end inside a tile; and whichever ring
/// Hopper has for a width, it gives the same bits.
#[test]
fn every_kernel_matches_f64() {
    for (device, dtype) in cards().into_iter().flat_map(|card| DType::FLOATS.map(|dtype| (card.clone(), dtype))) {
        let mut hopper: Vec<(usize, usize, String, Vec<f32>)> = Vec::new();
        for kernel in kernels("attention", &device, dtype) {
            let d = width_of(&kernel);
            if kernel.contains("windows") {
                continue;
            }
            // A small picture's, and text; of a wide head fewer.
            let tokens = if d > 160 { [70, 130] } else { [201, 150] };
            let mut taken = 0;
            for [queries, keys] in [tokens, [70, 77], [3, 1]] {
                let mut random = Random::new(15);
                let q = random.randn(&device, &[1, queries, 1, d], dtype);
                let kv = random.randn(&device, &[1, keys, 2, 1, d], dtype);
                let args = Attention::Cross { q: &q, kv: &kv };
                let Some(got) = attention_by(&kernel, args, AttentionOptions::default()) else { continue };
                taken += 1;
                let (q, kv) = (f64s(&q), f64s(&kv));
                let want =
                    reference([1, queries, keys, 1, d], false, weights(&device, dtype), |part, _, i, _| match part {
                        0 => row(&q, d, i),
                        _ => row(&kv, d, i * 2 + part - 1),
                    });
                assert_close(&got, &want, 8.0, format!("{device} {kernel} {queries} x {keys}"));
                if kernel.contains("sm90") && !kernel.contains("short") {
                    let bits = got.to_f32_vec().unwrap();
                    match hopper.iter().find(|(width, count, _, _)| (*width, *count) == (d, keys)) {
                        Some((.., other, values)) => {
                            assert!(bits == *values, "{device} {dtype}: {kernel} and {other} differ")
                        }
                        None => hopper.push((d, keys, kernel.clone(), bits)),
                    }
                }
            }
            assert!(taken > 0, "{device} {dtype}: {kernel} took none of the shapes");
        }
    }
}

/// More tiles of queries than a card has multiprocessors: blocks that take several, whose rings go on from one to the next. Two
/// tiles of keys in rings of two stages; and one, the first and the last, in rings of three, which so begin each time elsewhere.
#[test]
fn blocks_take_tile_after_tile() {
    for (device, card) in crate::common::hoppers() {
        for (kernel, keys) in [("attention=sm90_d64_192", 130), ("attention=sm90_d64_128", 5)] {
            let (n, d) = (card.multiprocessors() + 3, 64);
            let mut random = Random::new(16);
            let q = random.randn(&device, &[n, 2, 1, d], DType::BF16);
            let kv = random.randn(&device, &[1, keys, 2, 1, d], DType::BF16);
            let args = Attention::Cross { q: &q, kv: &kv };
            let got = attention_by(kernel, args, AttentionOptions::default()).unwrap();
            let (q, kv) = (f64s(&q), f64s(&kv));
            let want = reference([n, 2, keys, 1, d], false, DType::BF16, |part, b, i, _| match part {
                0 => row(&q, d, b * 2 + i),
                _ => row(&kv, d, i * 2 + part - 1),
            });
            assert_close(&got, &want, 8.0, format!("{device} {kernel} {keys} keys"));
        }
    }
}

/// Hopper's kernels may begin before the launch that makes their queries is done: they wait for it. With a ring and without.
#[test]
fn a_dependent_launch_sees_the_one_before() {
    for (device, _) in crate::common::hoppers() {
        for keys in [130, 77] {
            let mut random = Random::new(24);
            let q = random.randn(&device, &[1, 3, 1, 64], DType::BF16);
            let kv = random.randn(&device, &[1, keys, 2, 1, 64], DType::BF16);
            let run = |q: &Tensor| ops::attention(Attention::Cross { q, kv: &kv }).unwrap();
            let got = run(&run(&q)).to_f32_vec().unwrap();
            let first = run(&q).to_f32_vec().unwrap();
            let first = Tensor::from_f32(&device, &[1, 3, 1, 64], DType::BF16, &first).unwrap();
            assert_eq!(got, run(&first).to_f32_vec().unwrap(), "{device}: {keys} keys");
        }
    }
}

/// Queries, keys, heads, head_dim: of every kernel that knows a bias; T5 has heads of 64.
const BIASED: [[usize; 4]; 4] = [[33, 70, 2, 64], [9, 65, 1, 12], [35, 33, 1, 100], [17, 40, 1, 200]];

/// T5's: a bias per pair of tokens and head, the same for all images or not, scores that are not scaled; -inf masks a key.
#[test]
fn bias_and_scale_match_f64() {
    for (device, dtype) in devices().into_iter().flat_map(|device| DType::FLOATS.map(|dtype| (device.clone(), dtype))) {
        for [l, keys, heads, d] in BIASED {
            for (rows, masks) in [(1, false), (2, true)] {
                let mut random = Random::new(17);
                let n = 2;
                let q = random.tensor(&device, &[n, l, heads, d], dtype, 0.0, 0.3);
                let kv = random.randn(&device, &[n, keys, 2, heads, d], dtype);
                let mut values = random.randn(&device, &[rows, heads, l, keys], dtype).to_f32_vec().unwrap();
                if masks {
                    for (i, value) in values.iter_mut().enumerate() {
                        // Whole tiles at the beginning among them.
                        if i % keys < keys * 2 / 3 || i % 5 == 0 {
                            *value = f32::NEG_INFINITY;
                        }
                    }
                }
                let bias = Tensor::from_f32(&device, &[rows, heads, l, keys], dtype, &values).unwrap();
                let options = AttentionOptions { scale: Some(1.0), bias: Some(&bias), ..AttentionOptions::default() };
                let got = ops::attention_with(Attention::Cross { q: &q, kv: &kv }, options).unwrap();
                let (q, kv, bias) = (f64s(&q), f64s(&kv), f64s(&bias));
                let bias =
                    |b: usize, i: usize, j: usize, h: usize| bias[((b / (n / rows) * heads + h) * l + i) * keys + j];
                let want =
                    softmax_sum([n, l, keys, heads, d], false, weights(&device, dtype), 1.0, bias, |part, b, i, h| {
                        match part {
                            0 => row(&q, d, (b * l + i) * heads + h),
                            _ => row(&kv, d, ((b * keys + i) * 2 + part - 1) * heads + h),
                        }
                    });
                assert_close(&got, &want, 8.0, format!("{device} {l} {keys} {heads} {d} of {rows} rows"));
            }
        }
    }
}

/// A causal query with a bias: both masks at once, as a decoder with relative positions has them.
#[test]
fn causal_with_bias_matches_f64() {
    for (device, dtype) in devices().into_iter().flat_map(|device| DType::FLOATS.map(|dtype| (device.clone(), dtype))) {
        let [l, heads, d] = [70, 2, 24];
        let mut random = Random::new(18);
        let qkv = random.randn(&device, &[1, l, 3, heads, d], dtype);
        let bias = random.randn(&device, &[1, heads, l, l], dtype);
        let options = AttentionOptions { bias: Some(&bias), ..AttentionOptions::default() };
        let got = ops::attention_with(Attention::Packed { qkv: &qkv, causal: true }, options).unwrap();
        let (x, bias) = (f64s(&qkv), f64s(&bias));
        let scale = 1.0 / (d as f64).sqrt();
        let bias = |_, i: usize, j: usize, h: usize| bias[(h * l + i) * l + j];
        let want = softmax_sum([1, l, l, heads, d], true, weights(&device, dtype), scale, bias, |part, _, i, h| {
            row(&x, d, (i * 3 + part) * heads + h)
        });
        assert_close(&got, &want, 8.0, format!("{device}"));
    }
}

/// Image tokens, text tokens, heads, head_dim: on and off the tiles' edges in both sources; every kernel.
const JOINT: [[usize; 4]; 9] = [
    [70, 33, 2, 64],
    [129, 130, 1, 64],
    [128, 1, 1, 40],
    [1, 77, 2, 80],
    [64, 64, 1, 160],
    [20, 150, 1, 128],
    [5, 3, 1, 7],
    [33, 40, 1, 200],
    [66, 9, 1, 512],
];

/// SD 3's streams: the queries of either one see the keys of both.
#[test]
fn joined_sources_match_f64() {
    for (device, dtype) in devices().into_iter().flat_map(|device| DType::FLOATS.map(|dtype| (device.clone(), dtype))) {
        for [image, text, heads, d] in JOINT {
            let mut random = Random::new(19);
            let n = 2;
            let streams = [image, text].map(|l| (l, random.randn(&device, &[n, l, 3, heads, d], dtype)));
            for (own, other) in [(0, 1), (1, 0)] {
                let ((l, qkv), (more, kv)) = (&streams[own], &streams[other]);
                let options =
                    AttentionOptions { second: Some(SecondSource { kv, weight: None }), ..AttentionOptions::default() };
                let got = ops::attention_with(Attention::Packed { qkv, causal: false }, options).unwrap();
                let (x, y) = (f64s(qkv), f64s(kv));
                let want = reference([n, *l, l + more, heads, d], false, weights(&device, dtype), |part, b, i, h| {
                    match i.checked_sub(*l) {
                        None => row(&x, d, ((b * l + i) * 3 + part) * heads + h),
                        Some(i) => row(&y, d, ((b * more + i) * 3 + part) * heads + h),
                    }
                });
                assert_close(&got, &want, 8.0, format!("{device} {l} and {more} tokens, {heads} {d}"));
            }
        }
    }
}

/// Queries, keys, keys of the second, heads, head_dim: IP-Adapter's 4 and 16 tokens beside 77 of text, and what only the
/// portable kernels have.
const APART: [[usize; 5]; 8] = [
    [70, 77, 4, 2, 40],
    [65, 77, 16, 1, 64],
    [64, 80, 1, 1, 80],
    [3, 5, 16, 1, 160],
    [9, 77, 17, 1, 64],
    [33, 130, 70, 1, 128],
    [5, 3, 90, 2, 7],
    [33, 40, 70, 1, 200],
];

/// IP-Adapter's: a softmax of its own for the second source, added with a weight. Rows of either shared by images or not.
#[test]
fn a_second_softmax_matches_f64() {
    for (device, dtype) in devices().into_iter().flat_map(|device| DType::FLOATS.map(|dtype| (device.clone(), dtype))) {
        for [l, keys, more, heads, d] in APART {
            let mut random = Random::new(20);
            let (n, weight) = (2, 0.6f32);
            let q = random.randn(&device, &[n, l, heads, d], dtype);
            let kv = random.randn(&device, &[1, keys, 2, heads, d], dtype);
            let kv2 = random.randn(&device, &[n, more, 2, heads, d], dtype);
            let second = Some(SecondSource { kv: &kv2, weight: Some(weight) });
            let options = AttentionOptions { second, ..AttentionOptions::default() };
            let got = ops::attention_with(Attention::Cross { q: &q, kv: &kv }, options).unwrap();
            let (q, kv, kv2) = (f64s(&q), f64s(&kv), f64s(&kv2));
            let of = |keys: usize, kv: &[f64], rows: usize| {
                reference([n, l, keys, heads, d], false, weights(&device, dtype), |part, b, i, h| match part {
                    0 => row(&q, d, (b * l + i) * heads + h),
                    _ => row(kv, d, ((b / (n / rows) * keys + i) * 2 + part - 1) * heads + h),
                })
            };
            let (mut want, second) = (of(keys, &kv, 1), of(more, &kv2, n));
            for (value, second) in want.values.iter_mut().zip(&second.values) {
                *value += f64::from(weight) * second;
            }
            for (size, second) in want.magnitudes.iter_mut().zip(&second.magnitudes) {
                *size += f64::from(weight) * second;
            }
            assert_close(&got, &want, 8.0, format!("{device} {l} x {keys}, {more} {heads} {d}"));
        }
    }
}

/// What is not finite in the second source: its softmax's NaN, where all its scores are -inf, or an infinite value, comes out.
#[test]
fn a_second_source_that_is_not_finite_is_seen() {
    for (device, dtype) in devices().into_iter().flat_map(|device| DType::FLOATS.map(|dtype| (device.clone(), dtype))) {
        for [keys, more, d] in [[77, 4, 64], [77, 40, 64], [77, 40, 200]] {
            let q = Tensor::from_f32(&device, &[1, 1, 1, d], dtype, &vec![1.0; d]).unwrap();
            let kv = Random::new(21).randn(&device, &[1, keys, 2, 1, d], dtype);
            for weight in [None, Some(0.5)] {
                let run = |key: &dyn Fn(usize) -> f32, value: &dyn Fn(usize) -> f32| {
                    let values: Vec<f32> =
                        (0..more).flat_map(|j| [vec![key(j); d], vec![value(j); d]].concat()).collect();
                    let kv2 = Tensor::from_f32(&device, &[1, more, 2, 1, d], dtype, &values).unwrap();
                    let second = Some(SecondSource { kv: &kv2, weight });
                    let options = AttentionOptions { second, ..AttentionOptions::default() };
                    let y = ops::attention_with(Attention::Cross { q: &q, kv: &kv }, options).unwrap();
                    y.to_f32_vec().unwrap()[0]
                };
                let what = format!("{device} {dtype} {more} {d} {weight:?}");
                let masked = run(&|_| f32::NEG_INFINITY, &|_| 1.0);
                assert_eq!(masked.is_nan(), weight.is_some(), "{what}: {masked}");
                assert!(run(&|j| if j == 2 { f32::NAN } else { 0.0 }, &|_| 1.0).is_nan(), "{what}");
                let infinite = run(&|_| 0.0, &|j| if j == 2 { f32::INFINITY } else { 0.0 });
                assert_eq!(infinite, f32::INFINITY, "{what}");
                // The first of them masked: what it begins with is not NaN.
                assert!(run(&|j| if j < more - 1 { f32::NEG_INFINITY } else { 0.0 }, &|_| 1.0).is_finite(), "{what}");
            }
        }
    }
}

/// Map, window, unit of the shift, heads, head_dim. Windows of whole boxes, as Hopper wants them: less than a tile of keys,
/// several with a rest, four of a wider map; and of others, for every portable kernel.
const WINDOWS: [([[usize; 2]; 3], usize, usize); 7] = [
    ([[16, 16], [8, 8], [8, 8]], 2, 64),
    ([[16, 48], [16, 24], [8, 8]], 1, 40),
    ([[24, 16], [24, 16], [0, 8]], 1, 64),
    ([[6, 10], [3, 5], [1, 2]], 2, 12),
    ([[4, 12], [4, 3], [3, 1]], 1, 40),
    ([[12, 6], [6, 6], [1, 1]], 1, 100),
    ([[4, 18], [2, 18], [2, 5]], 1, 200),
];

/// Where token `i` of window `number` of an image lies: on the map rolled by minus the shift, cut into windows row by row.
fn place([h, w]: [usize; 2], window: [usize; 2], shift: [usize; 2], number: usize, i: usize) -> usize {
    let across = w / window[1];
    let y = number / across * window[0] + i / window[1];
    let x = number % across * window[1] + i % window[1];
    (y + shift[0]) % h * w + (x + shift[1]) % w
}

/// MSW-MSA: every image by the shift of its own step, in the column of the table that the call reads.
#[test]
fn windows_match_f64() {
    for (device, dtype) in devices().into_iter().flat_map(|device| DType::FLOATS.map(|dtype| (device.clone(), dtype))) {
        let (steps, columns, column, n) = ([2, 1], 3, 1, 4);
        // Images 0 and 2 have one table, 1 and 3 another, as under guidance.
        let factors = [9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 3, 9, 9, 2, 9, 9, 9, 9];
        let table = Tensor::from_u32(&device, &[3, 2, columns], &factors).unwrap();
        let step = StepIndex::new(&device, &steps).unwrap();
        for ([map, window, unit], heads, d) in WINDOWS {
            let (l, own) = (map[0] * map[1], window[0] * window[1]);
            let count = l / own;
            let qkv = Random::new(22).randn(&device, &[n, l, 3, heads, d], dtype);
            for shifted in [false, true] {
                let shift = shifted.then_some(WindowShift { factors: &table, step: &step, column, unit });
                let windows = Some(Windows { map, window, keys: None, shift });
                let options = AttentionOptions { windows, ..AttentionOptions::default() };
                let got = ops::attention_with(Attention::Packed { qkv: &qkv, causal: false }, options).unwrap();
                let x = f64s(&qkv);
                let token = |b: usize, i: usize| {
                    let image = b / count;
                    let factor = if shifted {
                        factors[(steps[image % 2] * 2 + image % 2) * columns + column] as usize
                    } else {
                        0
                    };
                    image * l + place(map, window, unit.map(|unit| factor * unit), b % count, i)
                };
                let by_window = [n * count, own, own, heads, d];
                let cut = reference(by_window, false, weights(&device, dtype), |part, b, i, h| {
                    row(&x, d, (token(b, i) * 3 + part) * heads + h)
                });
                let shape = vec![n, l, heads, d];
                let mut want =
                    Expected { shape, values: vec![0.0; n * l * heads * d], magnitudes: vec![0.0; n * l * heads * d] };
                let width = heads * d;
                for (from, (b, i)) in (0..n * count).flat_map(|b| (0..own).map(move |i| (b, i))).enumerate() {
                    let (from, to) = (from * width..(from + 1) * width, token(b, i) * width..(token(b, i) + 1) * width);
                    want.values[to.clone()].copy_from_slice(&cut.values[from.clone()]);
                    want.magnitudes[to].copy_from_slice(&cut.magnitudes[from]);
                }
                assert_close(&got, &want, 8.0, format!("{device} {map:?} {window:?} {heads} {d} shifted {shifted}"));
            }
        }
    }
}

/// The others may be all NaN, of the same image and of other images.
#[test]
fn a_window_does_not_depend_on_the_others() {
    for (device, dtype) in devices().into_iter().flat_map(|device| DType::FLOATS.map(|dtype| (device.clone(), dtype))) {
        for (map, window, d) in [([16, 16], [8, 8], 64), ([6, 6], [3, 3], 24), ([6, 6], [3, 3], 200)] {
            let l = map[0] * map[1];
            let clean = Random::new(23).randn(&device, &[2, l, 3, 1, d], dtype).to_f32_vec().unwrap();
            let run = |values: &[f32], n: usize| {
                let qkv = Tensor::from_f32(&device, &[n, l, 3, 1, d], dtype, values).unwrap();
                let windows = Some(Windows { map, window, keys: None, shift: None });
                let options = AttentionOptions { windows, ..AttentionOptions::default() };
                let y = ops::attention_with(Attention::Packed { qkv: &qkv, causal: false }, options).unwrap();
                y.to_f32_vec().unwrap()
            };
            let want = run(&clean[l * 3 * d..], 1);
            let count = l / (window[0] * window[1]);
            for number in 0..count {
                let inside: Vec<usize> =
                    (0..window[0] * window[1]).map(|i| place(map, window, [0, 0], number, i)).collect();
                let mut values = vec![f32::NAN; clean.len()];
                for token in &inside {
                    let at = (l + token) * 3 * d..(l + token + 1) * 3 * d;
                    values[at.clone()].copy_from_slice(&clean[at]);
                }
                let got = run(&values, 2);
                for token in inside {
                    let at = token * d..(token + 1) * d;
                    let what = format!("{device} {dtype} {d}: window {number}, token {token}");
                    assert!(got[l * d..][at.clone()] == want[at], "{what}");
                }
            }
        }
    }
}

/// Map, window, box of keys, heads, head_dim: several tiles of queries and of keys; short windows on either axis and both; a
/// box of an odd rest around the window, one of the window's own height, one higher than the map; a window larger than the map;
/// one row; single cells.
const NEIGHBOURHOODS: [([[usize; 2]; 3], usize, usize); 8] = [
    ([[12, 20], [9, 9], [12, 18]], 1, 64),
    ([[13, 11], [4, 3], [8, 6]], 1, 40),
    ([[9, 20], [5, 7], [5, 12]], 2, 12),
    ([[6, 30], [4, 8], [9, 17]], 1, 100),
    ([[7, 5], [9, 8], [12, 10]], 1, 200),
    ([[1, 45], [1, 16], [1, 32]], 1, 16),
    ([[10, 10], [9, 9], [10, 10]], 1, 80),
    ([[3, 4], [1, 1], [2, 3]], 2, 32),
];

/// Of one axis: where each window begins and ends, and where its keys do, as ScaleDiff has it.
fn neighbourhoods(side: usize, window: usize, keys: usize) -> Vec<[usize; 4]> {
    let (window, keys) = (window.min(side), keys.min(side));
    let of = |start: usize| {
        let first = (start as i64 - ((keys - window) / 2) as i64).clamp(0, (side - keys) as i64) as usize;
        [start, side.min(start + window), first, first + keys]
    };
    (0..side).step_by(window).map(of).collect()
}

/// The tokens of the queries and of the keys of every window of one image.
fn tokens_of_neighbourhoods([map, window, keys]: [[usize; 2]; 3]) -> Vec<[Vec<usize>; 2]> {
    let [rows, columns] = [0, 1].map(|axis| neighbourhoods(map[axis], window[axis], keys[axis]));
    let mut all = Vec::new();
    for row in &rows {
        for column in &columns {
            let within = |from: usize| -> Vec<usize> {
                let of_row = |y: usize| (column[from]..column[from + 1]).map(move |x| y * map[1] + x);
                (row[from]..row[from + 1]).flat_map(of_row).collect()
            };
            all.push([within(0), within(2)]);
        }
    }
    all
}

#[test]
fn neighbourhoods_match_f64() {
    // ScaleDiff's own numbers: 128 cells, boxes of 32 and 64.
    assert_eq!(neighbourhoods(128, 32, 64).iter().map(|own| own[2]).collect::<Vec<_>>(), [0, 16, 48, 64]);
    for (device, dtype) in devices().into_iter().flat_map(|device| DType::FLOATS.map(|dtype| (device.clone(), dtype))) {
        for (sizes @ [map, window, keys], heads, d) in NEIGHBOURHOODS {
            let (n, l) = (if heads > 1 { 1 } else { 2 }, map[0] * map[1]);
            let qkv = Random::new(24).randn(&device, &[n, l, 3, heads, d], dtype);
            let windows = Some(Windows { map, window, keys: Some(keys), shift: None });
            let options = AttentionOptions { windows, ..AttentionOptions::default() };
            let got = ops::attention_with(Attention::Packed { qkv: &qkv, causal: false }, options).unwrap();
            let x = f64s(&qkv);
            let (shape, count) = (vec![n, l, heads, d], n * l * heads * d);
            let mut want = Expected { shape, values: vec![f64::NAN; count], magnitudes: vec![f64::NAN; count] };
            let width = heads * d;
            for image in 0..n {
                for [queries, keys] in tokens_of_neighbourhoods(sizes) {
                    let shape = [1, queries.len(), keys.len(), heads, d];
                    let own = reference(shape, false, weights(&device, dtype), |part, _, i, h| {
                        let token = if part == 0 { queries[i] } else { keys[i] };
                        row(&x, d, ((image * l + token) * 3 + part) * heads + h)
                    });
                    for (i, query) in queries.iter().enumerate() {
                        let (from, to) = (i * width..(i + 1) * width, (image * l + query) * width);
                        want.values[to..to + width].copy_from_slice(&own.values[from.clone()]);
                        want.magnitudes[to..to + width].copy_from_slice(&own.magnitudes[from]);
                    }
                }
            }
            assert_close(&got, &want, 8.0, format!("{device} {sizes:?} {heads} {d}"));
        }
    }
}

/// What is outside of a window's keys may be all NaN, and its bits do not depend on how many images there are.
#[test]
fn a_neighbourhood_does_not_depend_on_the_rest() {
    for (device, dtype) in devices().into_iter().flat_map(|device| DType::FLOATS.map(|dtype| (device.clone(), dtype))) {
        for (sizes, d) in
            [([[5, 7], [2, 3], [4, 4]], 24), ([[6, 5], [3, 2], [5, 3]], 64), ([[4, 5], [2, 3], [3, 4]], 200)]
        {
            let [map, window, keys] = sizes;
            let l = map[0] * map[1];
            let clean = Random::new(25).randn(&device, &[2, l, 3, 1, d], dtype).to_f32_vec().unwrap();
            let run = |values: &[f32], n: usize| {
                let qkv = Tensor::from_f32(&device, &[n, l, 3, 1, d], dtype, values).unwrap();
                let windows = Some(Windows { map, window, keys: Some(keys), shift: None });
                let options = AttentionOptions { windows, ..AttentionOptions::default() };
                let y = ops::attention_with(Attention::Packed { qkv: &qkv, causal: false }, options).unwrap();
                y.to_f32_vec().unwrap()
            };
            let want = run(&clean[l * 3 * d..], 1);
            for (number, [queries, keys]) in tokens_of_neighbourhoods(sizes).into_iter().enumerate() {
                let mut values = vec![f32::NAN; clean.len()];
                for token in keys {
                    let at = (l + token) * 3 * d..(l + token + 1) * 3 * d;
                    values[at.clone()].copy_from_slice(&clean[at]);
                }
                let got = run(&values, 2);
                for token in queries {
                    let at = token * d..(token + 1) * d;
                    let what = format!("{device} {dtype} {d}: window {number}, token {token}");
                    assert!(got[l * d..][at.clone()] == want[at], "{what}");
                }
            }
        }
    }
}

/// Tensors that begin at any element, and so at addresses that no vector load may touch.
#[test]
fn unaligned_tensors() {
    for device in devices() {
        for (dtype, [l, heads, d]) in
            DType::FLOATS.into_iter().flat_map(|t| [[70, 2, 40], [33, 1, 512]].map(|s| (t, s)))
        {
            let count = l * 3 * heads * d;
            let qkv = Random::new(7).randn(&device, &[count + 1], dtype).rows(1..count + 1).unwrap();
            let qkv = qkv.reshape(&[1, l, 3, heads, d]).unwrap();
            for causal in [false, true] {
                let got = ops::attention(Attention::Packed { qkv: &qkv, causal }).unwrap();
                let x = f64s(&qkv);
                let want = reference([1, l, l, heads, d], causal, weights(&device, dtype), |part, _, i, h| {
                    row(&x, d, (i * 3 + part) * heads + h)
                });
                assert_close(&got, &want, 8.0, format!("{device} {l} {heads} {d} causal {causal}"));
            }
        }
    }
}

/// Scores of several hundred, rising and falling along the keys: the running maximum changes in every block.
#[test]
fn large_scores_neither_overflow_nor_vanish() {
    for (device, dtype) in devices().into_iter().flat_map(|device| DType::FLOATS.map(|dtype| (device.clone(), dtype))) {
        for (sign, l, d) in [(1.0, 700, 4), (-1.0, 700, 4), (1.0, 130, 170)] {
            let x: Vec<f32> = (0..l)
                .flat_map(|i| {
                    let k = sign * (i as f32 - 350.0);
                    let rows = [[1.0, 0.5, -0.5, 0.25], [k, 0.0, 0.0, 1.0], [i as f32, -1.0, 0.0, 2.0]];
                    rows.into_iter().flat_map(move |row| row.into_iter().chain(vec![0.0; d - 4]))
                })
                .collect();
            let qkv = Tensor::from_f32(&device, &[1, l, 3, 1, d], dtype, &x).unwrap();
            let got = ops::attention(Attention::Packed { qkv: &qkv, causal: false }).unwrap();
            let x = f64s(&qkv);
            let want =
                reference([1, l, l, 1, d], false, weights(&device, dtype), |part, _, i, _| row(&x, d, i * 3 + part));
            assert_close(&got, &want, 8.0, format!("{device} sign {sign} d {d}"));
        }
    }
}

/// NaN or infinity reaches the rows that see it and no others: causal rows before it stay as they were, bit for bit.
#[test]
fn a_masked_nan_touches_no_row() {
    for (device, dtype) in devices().into_iter().flat_map(|device| DType::FLOATS.map(|dtype| (device.clone(), dtype))) {
        for [l, d] in [[300, 8], [70, 200]] {
            let heads = 2;
            let clean = Random::new(9).randn(&device, &[1, l, 3, heads, d], dtype);
            let run = |values: &[f32]| {
                let qkv = Tensor::from_f32(&device, &[1, l, 3, heads, d], dtype, values).unwrap();
                ops::attention(Attention::Packed { qkv: &qkv, causal: true }).unwrap().to_f32_vec().unwrap()
            };
            let values = clean.to_f32_vec().unwrap();
            let want = run(&values);
            for (part, token, bad) in
                [(1, 0, f32::NAN), (2, 20, f32::NAN), (1, l / 2, f32::INFINITY), (2, l - 1, f32::INFINITY)]
            {
                let mut values = values.clone();
                values[((token * 3 + part) * heads + 1) * d + 3] = bad;
                let got = run(&values);
                let what = format!("{device} {dtype} d {d} part {part} token {token}");
                for (i, h) in (0..l).flat_map(|i| [(i, 0), (i, 1)]) {
                    let at = (i * heads + h) * d..(i * heads + h + 1) * d;
                    if h == 0 || i < token {
                        assert_eq!(got[at.clone()], want[at], "{what}: row {i} head {h}");
                    } else if bad.is_nan() {
                        // A bad key spoils the row, a bad value its column.
                        let spoilt = got[at.clone()].iter().filter(|v| v.is_nan()).count();
                        assert_eq!(spoilt, if part == 1 { d } else { 1 }, "{what}: row {i}");
                    } else {
                        assert!(got[at].iter().any(|v| !v.is_finite()) || part == 1, "{what}: row {i}");
                    }
                }
            }
        }
    }
}

/// An infinite score of one key: torch's softmax gives NaN for +inf, weight 0 for -inf, NaN when all are -inf.
#[test]
fn infinite_scores() {
    for (device, dtype) in devices().into_iter().flat_map(|device| DType::FLOATS.map(|dtype| (device.clone(), dtype))) {
        for d in [1, 170] {
            let l = 600;
            let run = |score: &dyn Fn(usize) -> f32| {
                let kv: Vec<f32> =
                    (0..l).flat_map(|j| [vec![score(j); d], vec![1.0 + (j % 3) as f32; d]].concat()).collect();
                let kv = Tensor::from_f32(&device, &[1, l, 2, 1, d], dtype, &kv).unwrap();
                let q = Tensor::from_f32(&device, &[1, 1, 1, d], dtype, &vec![1.0; d]).unwrap();
                ops::attention(Attention::Cross { q: &q, kv: &kv }).unwrap().to_f32_vec().unwrap()[0]
            };
            assert!(run(&|j| if j == 300 { f32::INFINITY } else { 0.0 }).is_nan());
            assert!(run(&|_| f32::NEG_INFINITY).is_nan());
            // The whole first block invisible: the second must not inherit garbage from it. Only keys = 0 mod 3 (value 1).
            assert_eq!(run(&|j| if j < 256 || j % 3 != 0 { f32::NEG_INFINITY } else { 0.0 }), 1.0);
        }
    }
}

/// The others may even be all NaN: what lies behind an image's keys and values is not read as theirs.
#[test]
fn an_image_does_not_depend_on_the_others() {
    for (device, dtype) in devices().into_iter().flat_map(|device| DType::FLOATS.map(|dtype| (device.clone(), dtype))) {
        for (causal, [l, heads, d]) in
            [false, true].into_iter().flat_map(|c| [[69, 2, 24], [33, 1, 176]].map(|s| (c, s)))
        {
            let count = l * 3 * heads * d;
            let mut x = Random::new(3).randn(&device, &[3, l, 3, heads, d], dtype).to_f32_vec().unwrap();
            x[..count].fill(f32::NAN);
            x[2 * count..].fill(f32::NAN);
            let qkv = Tensor::from_f32(&device, &[3, l, 3, heads, d], dtype, &x).unwrap();
            let run = |x: &Tensor| ops::attention(Attention::Packed { qkv: x, causal }).unwrap().to_f32_vec().unwrap();
            let (all, one) = (run(&qkv), run(&qkv.rows(1..2).unwrap()));
            let what = format!("{device} {dtype} {l} {heads} {d} causal {causal}");
            assert!(one.iter().all(|x| x.is_finite()), "{what}");
            assert_eq!(one, all[one.len()..2 * one.len()], "{what}");
        }
    }
}

#[test]
fn an_image_does_not_depend_on_the_threads() {
    let device = Device::cpu();
    for causal in [false, true] {
        let qkv = Random::new(3).randn(&device, &[3, 311, 3, 2, 24], DType::F32);
        let run = |threads: usize, x: &Tensor| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| ops::attention(Attention::Packed { qkv: x, causal }).unwrap().to_f32_vec().unwrap())
        };
        let want = run(1, &qkv);
        assert_eq!(run(5, &qkv), want);
        let one = run(2, &qkv.rows(1..2).unwrap());
        assert_eq!(one, want[one.len()..2 * one.len()]);
    }
}

/// The kernels' widest head; the cpu takes any.
#[test]
fn a_head_too_wide_for_the_card() {
    for (device, dtype) in cards().into_iter().flat_map(|device| DType::FLOATS.map(|dtype| (device.clone(), dtype))) {
        let qkv = Tensor::zeros(&device, &[1, 2, 3, 1, 513], dtype).unwrap();
        let error = ops::attention(Attention::Packed { qkv: &qkv, causal: false }).unwrap_err();
        assert!(matches!(error, Error::Argument { arg: "head_dim", .. }), "{error}");
    }
}

#[test]
fn meta_records_the_fused_cost() {
    let meta = megafuse::runtime::MetaDevice::default();
    let device = Device::Meta(meta.clone());
    let bytes = |elements: usize| 2 * elements as u64;
    let [n, l, k, heads, d] = [2, 77, 13, 3, 8];
    let qkv = Tensor::uninit(&device, &[n, l, 3, heads, d], DType::F16).unwrap();
    let q = Tensor::uninit(&device, &[n, l, heads, d], DType::F16).unwrap();
    let kv = Tensor::uninit(&device, &[n, k, 2, heads, d], DType::F16).unwrap();
    for (args, pairs, kv_tokens) in [
        (Attention::Packed { qkv: &qkv, causal: false }, l * l, l),
        (Attention::Packed { qkv: &qkv, causal: true }, (1..=l).sum(), l),
        (Attention::Cross { q: &q, kv: &kv }, l * k, k),
    ] {
        let y = ops::attention(args).unwrap();
        assert_eq!((y.shape(), y.dtype()), ([n, l, heads, d].as_slice(), DType::F16));
        let report = meta.take_report();
        let [record] = report.ops.as_slice() else { panic!("one op, one record: {report:?}") };
        assert_eq!((record.op, record.kind, record.output.as_slice()), ("attention", OpKind::Attention, y.shape()));
        assert_eq!(record.work.macs, (2 * n * heads * d * pairs) as u64);
        assert!(record.work.flops > 2 * record.work.macs);
        assert_eq!(record.work.bytes, bytes(n * heads * d * 2 * (l + kv_tokens)));
        assert_eq!(record.work.launches, 1);
    }
    let bias = Tensor::uninit(&device, &[1, heads, l, l], DType::F16).unwrap();
    let second = Some(SecondSource { kv: &kv, weight: Some(1.0) });
    let options = AttentionOptions { bias: Some(&bias), second, ..AttentionOptions::default() };
    ops::attention_with(Attention::Packed { qkv: &qkv, causal: false }, options).unwrap();
    let work = meta.take_report().ops[0].work;
    assert_eq!(work.macs, (2 * n * heads * d * l * (l + k)) as u64);
    assert_eq!(work.bytes, bytes(n * heads * d * 2 * (2 * l + k) + heads * l * l));
    let windows = Some(Windows { map: [7, 11], window: [7, 1], keys: None, shift: None });
    let options = AttentionOptions { windows, ..AttentionOptions::default() };
    let y = ops::attention_with(Attention::Packed { qkv: &qkv, causal: false }, options).unwrap();
    let work = meta.take_report().ops[0].work;
    assert_eq!(y.shape(), [n, l, heads, d]);
    assert_eq!((work.macs, work.bytes), ((2 * n * heads * d * l * 7) as u64, bytes(n * heads * d * 4 * l)));
    // Short windows have as many keys, and none of their rows is counted that is not there.
    let windows = Some(Windows { map: [7, 11], window: [4, 3], keys: Some([5, 20]), shift: None });
    let options = AttentionOptions { windows, ..AttentionOptions::default() };
    ops::attention_with(Attention::Packed { qkv: &qkv, causal: false }, options).unwrap();
    let work = meta.take_report().ops[0].work;
    assert_eq!((work.macs, work.bytes), ((2 * n * heads * d * l * 55) as u64, bytes(n * heads * d * 4 * l)));
}

#[test]
fn errors_name_the_argument() {
    let device = Device::cpu();
    let zeros = |shape: &[usize], dtype| Tensor::zeros(&device, shape, dtype).unwrap();
    let packed = |qkv: &Tensor| ops::attention(Attention::Packed { qkv, causal: false }).unwrap_err();
    let cross = |q: &Tensor, kv: &Tensor| ops::attention(Attention::Cross { q, kv }).unwrap_err();
    let q = zeros(&[2, 5, 3, 8], DType::F32);

    assert!(matches!(packed(&q), Error::Shape { arg: "qkv", .. }));
    assert!(matches!(packed(&zeros(&[2, 5, 2, 3, 8], DType::F32)), Error::Shape { arg: "qkv", .. }));
    assert!(matches!(packed(&zeros(&[2, 5, 3, 3, 8], DType::U32)), Error::Dtype { arg: "qkv", .. }));
    assert!(matches!(cross(&q, &q), Error::Shape { arg: "kv", .. }));
    for rows in [0, 3, 4] {
        let error = cross(&q, &zeros(&[rows, 7, 2, 3, 8], DType::F32));
        assert!(matches!(error, Error::Argument { arg: "rows of kv", .. }), "{rows}: {error}");
    }
    for shape in [[2, 7, 3, 3, 8], [2, 7, 2, 2, 8], [2, 7, 2, 3, 9]] {
        assert!(matches!(cross(&q, &zeros(&shape, DType::F32)), Error::Shape { arg: "kv", .. }), "{shape:?}");
    }
    assert!(matches!(cross(&q, &zeros(&[2, 7, 2, 3, 8], DType::F16)), Error::Dtype { arg: "kv", .. }));
    let other = Tensor::zeros(&Device::cpu(), &[2, 7, 2, 3, 8], DType::F32).unwrap();
    assert!(matches!(cross(&q, &other), Error::Device { arg: "kv", .. }));
    assert!(matches!(cross(&q, &zeros(&[2, 0, 2, 3, 8], DType::F32)), Error::Argument { arg: "L_k", .. }));

    let (qkv, kv) = (zeros(&[2, 5, 3, 3, 8], DType::F32), zeros(&[2, 7, 2, 3, 8], DType::F32));
    let with = |causal: bool, options: AttentionOptions| {
        ops::attention_with(Attention::Packed { qkv: &qkv, causal }, options).unwrap_err()
    };
    let none = AttentionOptions::default();
    for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let error = with(false, AttentionOptions { scale: Some(scale), ..none });
        assert!(matches!(error, Error::Argument { arg: "scale", .. }), "{error}");
    }
    let biased = |shape: &[usize], dtype| with(false, AttentionOptions { bias: Some(&zeros(shape, dtype)), ..none });
    for shape in [[1, 2, 5, 5], [1, 3, 4, 5], [1, 3, 5, 7]] {
        assert!(matches!(biased(&shape, DType::F32), Error::Shape { arg: "bias", .. }), "{shape:?}");
    }
    assert!(matches!(biased(&[1, 3, 5, 5], DType::F16), Error::Dtype { arg: "bias", .. }));
    assert!(matches!(biased(&[3, 3, 5, 5], DType::F32), Error::Argument { arg: "rows of bias", .. }));
    let second = |causal: bool, kv: &Tensor, weight: Option<f32>| {
        with(causal, AttentionOptions { second: Some(SecondSource { kv, weight }), ..none })
    };
    for shape in [[2, 7, 1, 3, 8], [2, 7, 4, 3, 8], [2, 7, 2, 2, 8], [2, 7, 2, 3, 9]] {
        let error = second(false, &zeros(&shape, DType::F32), None);
        assert!(matches!(error, Error::Shape { arg: "second.kv", .. }), "{shape:?}");
    }
    let error = second(false, &zeros(&[3, 7, 2, 3, 8], DType::F32), None);
    assert!(matches!(error, Error::Argument { arg: "rows of second.kv", .. }), "{error}");
    let error = second(false, &zeros(&[2, 0, 2, 3, 8], DType::F32), Some(1.0));
    assert!(matches!(error, Error::Argument { arg: "L_k2", .. }), "{error}");
    assert!(matches!(second(true, &kv, None), Error::Argument { arg: "causal", .. }));
    let bias = zeros(&[1, 3, 5, 5], DType::F32);
    let both = AttentionOptions { bias: Some(&bias), second: Some(SecondSource { kv: &kv, weight: None }), ..none };
    assert!(matches!(with(false, both), Error::Argument { arg: "bias", .. }));

    let step = StepIndex::one(&device, 2).unwrap();
    let factors = Tensor::from_u32(&device, &[3, 1, 2], &[0; 6]).unwrap();
    let shift = WindowShift { factors: &factors, step: &step, column: 1, unit: [1, 1] };
    let windows = Windows { map: [1, 5], window: [1, 5], keys: None, shift: Some(shift) };
    let of = |windows| with(false, AttentionOptions { windows: Some(windows), ..none });
    let argument = |error: Error, name: &str| {
        let Error::Argument { arg, .. } = &error else { panic!("{error}") };
        assert_eq!(*arg, name, "{error}");
    };
    argument(of(Windows { map: [2, 2], ..windows }), "map");
    for window in [[1, 2], [0, 5], [2, 5]] {
        argument(of(Windows { window, ..windows }), "window");
    }
    for keys in [[0, 5], [1, 4]] {
        argument(of(Windows { keys: Some(keys), shift: None, ..windows }), "keys");
    }
    argument(of(Windows { window: [1, 0], keys: Some([1, 5]), shift: None, ..windows }), "window");
    argument(of(Windows { window: [1, 2], keys: Some([1, 4]), ..windows }), "shift");
    argument(of(Windows { shift: Some(WindowShift { column: 2, ..shift }), ..windows }), "column");
    argument(of(Windows { shift: Some(WindowShift { unit: [2, 0], ..shift }), ..windows }), "unit");
    let late = StepIndex::one(&device, 3).unwrap();
    argument(of(Windows { shift: Some(WindowShift { step: &late, ..shift }), ..windows }), "step");
    let three = Tensor::from_u32(&device, &[3, 3, 2], &[0; 18]).unwrap();
    let own = Windows { shift: Some(WindowShift { factors: &three, ..shift }), ..windows };
    argument(of(own), "images of factors");
    let floats = zeros(&[3, 1, 2], DType::F32);
    let error = of(Windows { shift: Some(WindowShift { factors: &floats, ..shift }), ..windows });
    assert!(matches!(error, Error::Dtype { arg: "factors", .. }), "{error}");
    argument(with(true, AttentionOptions { windows: Some(windows), ..none }), "windows");
    argument(with(false, AttentionOptions { windows: Some(windows), bias: Some(&bias), ..none }), "windows");
    let error =
        ops::attention_with(Attention::Cross { q: &q, kv: &kv }, AttentionOptions { windows: Some(windows), ..none });
    argument(error.unwrap_err(), "windows");
}
