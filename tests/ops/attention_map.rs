//! attention_map and blend_attention_map against textbook loops in f64, and against attention.

use crate::common::{Expected, Random, assert_close, cards, cases, f64s, unaligned};
use megafuse::Error;
use megafuse::ops::{self, Attention};
use megafuse::runtime::{DType, Device, MetaDevice, OpKind, Tensor};

/// Images, rows of kv, queries, keys, heads, head_dim: one of each; primes; more keys than a warp has lanes and more channels than
/// a block; whole vectors; the text's 77; several rows of kv for several images; no images.
const SHAPES: [[usize; 6]; 6] = [
    [1, 1, 1, 1, 1, 1],
    [2, 1, 5, 3, 2, 3],
    [4, 2, 35, 41, 5, 16],
    [2, 2, 9, 77, 2, 8],
    [6, 2, 3, 5, 1, 7],
    [0, 1, 4, 5, 2, 8],
];

struct Inputs {
    q: Tensor,
    kv: Tensor,
    map: Tensor,
}

fn inputs(device: &Device, dtype: DType, [n, rows, queries, keys, heads, head_dim]: [usize; 6]) -> Inputs {
    let mut random = Random::new(61);
    Inputs {
        q: random.randn(device, &[n, queries, heads, head_dim], dtype),
        kv: random.randn(device, &[rows, keys, 2, heads, head_dim], dtype),
        map: random.randn(device, &[n, queries, keys], DType::F32),
    }
}

/// Where element `j` of a key's (part 0) or a value's (part 1) head is.
fn of_kv(
    [n, rows, queries, keys, heads, head_dim]: [usize; 6],
    query: usize,
    key: usize,
    part: usize,
    at: usize,
) -> usize {
    let row = query / queries / (n / rows).max(1);
    ((row * keys + key) * 2 + part) * heads * head_dim + at
}

/// The mean over heads of every query's softmax, and the size of what it is computed from.
fn softmax(q: &[f64], kv: &[f64], shape: [usize; 6]) -> (Vec<f64>, Vec<f64>) {
    let [n, _, queries, keys, heads, head_dim] = shape;
    let (mut values, mut magnitudes) = (vec![0.0; n * queries * keys], vec![0.0; n * queries * keys]);
    let scale = 1.0 / (head_dim as f64).sqrt();
    for (query, head) in (0..n * queries).flat_map(|query| (0..heads).map(move |head| (query, head))) {
        let terms = |key: usize| -> Vec<f64> {
            let at = |j: usize| head * head_dim + j;
            let product = |j| q[query * heads * head_dim + at(j)] * kv[of_kv(shape, query, key, 0, at(j))];
            (0..head_dim).map(product).collect()
        };
        let scores: Vec<f64> = (0..keys).map(|key| scale * terms(key).iter().sum::<f64>()).collect();
        let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = scores.iter().map(|score| (score - highest).exp()).sum();
        for (key, score) in scores.iter().enumerate() {
            let p = (score - highest).exp() / total / heads as f64;
            let size = scale * terms(key).iter().map(|term| term.abs()).sum::<f64>();
            values[query * keys + key] += p;
            magnitudes[query * keys + key] += p * (4.0 + 2.0 * size + 2.0 * (highest - score));
        }
    }
    (values, magnitudes)
}

/// Once in place of what is there, once added to it.
#[test]
fn the_map_matches_f64() {
    for (device, dtype, shape) in cases(&SHAPES) {
        let [n, _, queries, keys, _, head_dim] = shape;
        let Inputs { q, kv, map } = inputs(&device, dtype, shape);
        let (values, magnitudes) = softmax(&f64s(&q), &f64s(&kv), shape);
        // A score's sum and its exponential, the highest one's, their total.
        let eps = 2.0 + head_dim as f64 / 2.0 + (keys as f64).sqrt();
        let mut want = Expected { shape: vec![n, queries, keys], values, magnitudes };
        for (q, kv) in [(q.clone(), kv.clone()), (unaligned(&q), unaligned(&kv))] {
            let mut got = Tensor::uninit(&device, &want.shape, DType::F32).unwrap();
            ops::attention_map(&q, &kv, &mut got, false).unwrap();
            assert_close(&got, &want, eps, format!("{device} {dtype} {shape:?}"));
            let sums: Vec<f64> = f64s(&got).chunks(keys).map(|map| map.iter().sum()).collect();
            assert!(
                sums.iter().all(|sum| (sum - 1.0).abs() < 1e-5),
                "{device} {dtype} {shape:?}: rows sum to {sums:?}"
            );
        }
        let mut got = map.duplicate().unwrap();
        ops::attention_map(&q, &kv, &mut got, true).unwrap();
        want.values.iter_mut().zip(f64s(&map)).for_each(|(sum, before)| *sum += before);
        want.magnitudes.iter_mut().for_each(|magnitude| *magnitude += 4.0);
        assert_close(&got, &want, eps, format!("{device} {dtype} {shape:?}, added"));
    }
}

#[test]
fn the_blend_matches_f64() {
    for (device, dtype, shape) in cases(&SHAPES) {
        let [n, _, queries, keys, heads, head_dim] = shape;
        let Inputs { q, kv, map } = inputs(&device, dtype, shape);
        let (x, values, shares, weight) = (f64s(&q), f64s(&kv), f64s(&map), 0.6f32);
        let channels = heads * head_dim;
        let mut want = Expected { shape: vec![n, queries, heads, head_dim], values: vec![], magnitudes: vec![] };
        for (at, x) in x.iter().enumerate() {
            let query = at / channels;
            let term = |key| shares[query * keys + key] * values[of_kv(shape, query, key, 1, at % channels)];
            let terms: Vec<f64> = (0..keys).map(term).collect();
            let weight = f64::from(weight);
            want.values.push((1.0 - weight) * x + weight * terms.iter().sum::<f64>());
            want.magnitudes.push(x.abs() + terms.iter().map(|term| term.abs()).sum::<f64>());
        }
        let got = ops::blend_attention_map(&q, &map, &kv, weight).unwrap();
        assert_close(&got, &want, 2.0 + keys as f64 / 2.0, format!("{device} {dtype} {shape:?}"));
    }
}

/// One head, and the map of its own queries and keys: attention itself.
#[test]
fn a_map_of_the_same_queries_is_attention() {
    for (device, dtype, shape) in cases(&[[2, 1, 19, 13, 1, 24]]) {
        let Inputs { q, kv, mut map } = inputs(&device, dtype, shape);
        ops::attention_map(&q, &kv, &mut map, false).unwrap();
        let attention = ops::attention(Attention::Cross { q: &q, kv: &kv }).unwrap();
        let by_map = ops::blend_attention_map(&attention, &map, &kv, 1.0).unwrap();
        for (got, want) in f64s(&by_map).into_iter().zip(f64s(&attention)) {
            // Attention of the narrow types multiplies rounded probabilities.
            assert!((got - want).abs() < 1e-6 + 3.0 * dtype.ulp(), "{device} {dtype}: {got}, expected {want}");
        }
    }
}

#[test]
fn nan_comes_out() {
    for (device, dtype, shape) in cases(&[[1, 1, 2, 40, 2, 8]]) {
        let Inputs { q, kv, mut map } = inputs(&device, dtype, shape);
        let mut values = kv.to_f32_vec().unwrap();
        values[33 * 32] = f32::NAN; // of one key
        let kv = Tensor::from_f32(&device, kv.shape(), dtype, &values).unwrap();
        ops::attention_map(&q, &kv, &mut map, false).unwrap();
        assert!(f64s(&map).iter().all(|share| share.is_nan()), "{device} {dtype}");
    }
}

/// The meta device counts the launches that a card makes, and each tensor once.
#[test]
fn a_card_launches_what_meta_counts() {
    for card in cards() {
        let run = |device: &Device| {
            let zeros = |shape: &[usize], dtype| Tensor::zeros(device, shape, dtype).unwrap();
            let (q, kv) = (zeros(&[4, 6, 2, 8], DType::BF16), zeros(&[2, 5, 2, 2, 8], DType::BF16));
            let mut map = zeros(&[4, 6, 5], DType::F32);
            move || {
                ops::attention_map(&q, &kv, &mut map, true).unwrap();
                ops::blend_attention_map(&q, &map, &kv, 0.5)
            }
        };
        let meta = MetaDevice::default();
        let mut counted = run(&Device::Meta(meta.clone()));
        meta.take_report();
        counted().unwrap();
        let report = meta.take_report();
        let [map, blend] = report.ops.as_slice() else { panic!("two ops, two records: {report:?}") };
        let (of_q, of_kv, of_map) = (2 * 4 * 6 * 16, 2 * 2 * 5 * 2 * 16, 4 * 4 * 6 * 5);
        assert_eq!((map.op, map.kind, map.work.macs), ("attention_map", OpKind::Attention, 4 * 6 * 5 * 16));
        assert_eq!(map.work.bytes, of_q + of_kv / 2 + 2 * of_map);
        assert_eq!((blend.op, blend.kind, blend.work.macs), ("blend_attention_map", OpKind::Attention, 4 * 6 * 5 * 16));
        assert_eq!(blend.work.bytes, 2 * of_q + of_kv / 2 + of_map);
        let Device::Cuda(cuda) = &card else { unreachable!() };
        let mut launched = run(&card);
        let graph = cuda.capture(0, || launched().map(drop)).unwrap();
        assert_eq!(graph.kernels().len() as u64, map.work.launches + blend.work.launches, "{card}");
    }
}

#[test]
fn errors_name_the_argument() {
    let device = Device::cpu();
    let of = |shape: &[usize], dtype| Tensor::zeros(&device, shape, dtype).unwrap();
    let (q, kv) = (of(&[2, 6, 2, 8], DType::F32), of(&[1, 5, 2, 2, 8], DType::F32));
    let map = |shape: &[usize], dtype| ops::attention_map(&q, &kv, &mut of(shape, dtype), false).unwrap_err();
    assert!(matches!(map(&[2, 6, 4], DType::F32), Error::Shape { arg: "map", .. }));
    assert!(matches!(map(&[2, 6, 5], DType::F16), Error::Dtype { arg: "map", .. }));
    let (mut shared, shape) = (of(&[2, 6, 5], DType::F32), [2, 6, 5]);
    let other = shared.clone();
    let error = ops::attention_map(&q, &kv, &mut shared, false).unwrap_err();
    assert!(matches!(error, Error::Argument { arg: "map", .. }), "{error}");
    drop(other);
    for (kv, arg) in [
        (of(&[1, 5, 3, 2, 8], DType::F32), "kv"),
        (of(&[1, 5, 2, 2, 7], DType::F32), "kv"),
        (of(&[0, 5, 2, 2, 8], DType::F32), "rows of kv"),
        (of(&[3, 5, 2, 2, 8], DType::F32), "rows of kv"),
    ] {
        let error = ops::attention_map(&q, &kv, &mut of(&shape, DType::F32), false).unwrap_err();
        let (Error::Shape { arg: named, .. } | Error::Argument { arg: named, .. }) = error else { panic!("{error}") };
        assert_eq!(named, arg);
    }
    let none = ops::attention_map(&q, &of(&[1, 0, 2, 2, 8], DType::F32), &mut of(&[2, 6, 0], DType::F32), false);
    assert!(matches!(none.unwrap_err(), Error::Argument { arg: "keys", .. }));
    let error = ops::blend_attention_map(&q, &of(&shape, DType::F32), &kv, f32::NAN).unwrap_err();
    assert!(matches!(error, Error::Argument { arg: "weight", .. }), "{error}");
    let error = ops::blend_attention_map(&q, &of(&[2, 6, 5], DType::BF16), &kv, 0.5).unwrap_err();
    assert!(matches!(error, Error::Dtype { arg: "map", .. }), "{error}");
}
