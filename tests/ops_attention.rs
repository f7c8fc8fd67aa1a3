//! attention against textbook loops in f64.

use megafuse::ops::{self, Attention};
use megafuse::runtime::OpKind;
use megafuse::{DType, Device, Error, Tensor};

/// Deterministic values, about normal with the given scale: sums of uniforms of a 64-bit congruential generator.
fn values(seed: u64, count: usize, scale: f32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let mut uniform = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..count).map(|_| scale * (uniform() + uniform() + uniform() + uniform()) * 1.73).collect()
}

/// `softmax(q k^T / sqrt(d)) v` of one head's rows; masked pairs never enter.
fn reference(q: &[Vec<f64>], k: &[Vec<f64>], v: &[Vec<f64>], causal: bool) -> Vec<Vec<f64>> {
    let scale = 1.0 / (q[0].len() as f64).sqrt();
    q.iter()
        .enumerate()
        .map(|(i, q)| {
            let seen = if causal { i + 1 } else { k.len() };
            let scores: Vec<f64> =
                k[..seen].iter().map(|k| scale * q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>()).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
            let sum: f64 = weights.iter().sum();
            (0..q.len()).map(|c| weights.iter().zip(v).map(|(w, v)| w * v[c]).sum::<f64>() / sum).collect()
        })
        .collect()
}

struct Case {
    n: usize,
    queries: usize,
    keys: usize,
    heads: usize,
    head_dim: usize,
}

/// Token rows of one head of a `[n, l, parts, heads, d]` tensor.
fn head(x: &[f32], case: &Case, l: usize, parts: usize, at: [usize; 3]) -> Vec<Vec<f64>> {
    let [n, part, head] = at;
    let (heads, d) = (case.heads, case.head_dim);
    (0..l)
        .map(|i| {
            let start = (((n * l + i) * parts + part) * heads + head) * d;
            x[start..start + d].iter().map(|&v| f64::from(v)).collect()
        })
        .collect()
}

/// Runs both forms that the case allows and compares every element.
fn check(case: &Case, dtype: DType, causal: bool, packed: bool, scale: f32) {
    let device = Device::cpu();
    let Case { n, queries, keys, heads, head_dim } = *case;
    let (y, q, kv, parts) = if packed {
        let shape = [n, queries, 3, heads, head_dim];
        let x = values(7, shape.iter().product(), scale);
        let qkv = Tensor::from_f32(&device, &shape, dtype, &x).unwrap();
        let y = ops::attention(Attention::Packed { qkv: &qkv, causal }).unwrap();
        let x = qkv.to_f32_vec().unwrap();
        (y, x.clone(), x, (3, 0, 1, 3))
    } else {
        let (q_shape, kv_shape) = ([n, queries, heads, head_dim], [n, keys, 2, heads, head_dim]);
        let q = values(11, q_shape.iter().product(), scale);
        let kv = values(13, kv_shape.iter().product(), scale);
        let q = Tensor::from_f32(&device, &q_shape, dtype, &q).unwrap();
        let kv = Tensor::from_f32(&device, &kv_shape, dtype, &kv).unwrap();
        let y = ops::attention(Attention::Cross { q: &q, kv: &kv }).unwrap();
        (y, q.to_f32_vec().unwrap(), kv.to_f32_vec().unwrap(), (1, 0, 0, 2))
    };
    assert_eq!(y.shape(), [n, queries, heads, head_dim]);
    assert_eq!(y.dtype(), dtype);
    let y = y.to_f32_vec().unwrap();
    let (q_parts, q_part, k_part, kv_parts) = parts;
    for b in 0..n {
        for h in 0..heads {
            let q = head(&q, case, queries, q_parts, [b, q_part, h]);
            let k = head(&kv, case, keys, kv_parts, [b, k_part, h]);
            let v = head(&kv, case, keys, kv_parts, [b, k_part + 1, h]);
            let want = reference(&q, &k, &v, causal);
            let largest = v.iter().flatten().fold(0.0f64, |a, v| a.max(v.abs()));
            for (i, want) in want.iter().enumerate() {
                for (c, want) in want.iter().enumerate() {
                    let got = f64::from(y[((b * queries + i) * heads + h) * head_dim + c]);
                    // Store: half an ulp. Score: |s| eps * head_dim roundings at worst, sqrt of it typically; it moves
                    // a weight by as much relatively. Sums over keys: eps * sqrt(keys), of values up to `largest`.
                    let score = f64::from(scale * scale) * 16.0;
                    let f32_eps = DType::F32.ulp();
                    let roundings = (keys as f64).sqrt() + score * (head_dim as f64).sqrt() + 8.0;
                    let tolerance = dtype.ulp() / 2.0 * want.abs() + f32_eps * roundings * largest;
                    assert!(
                        (got - want).abs() <= tolerance,
                        "{dtype} causal {causal} packed {packed} n{n} q{queries} k{keys} h{heads} d{head_dim}: [{b}, {i}, {h}, {c}] is {got}, not {want} +- {tolerance:e}"
                    );
                }
            }
        }
    }
}

/// One; primes; around the tile of 14 rows, the panel of 32, the blocks of 224 queries and 256 keys, and K_BLOCK.
const CASES: [Case; 14] = [
    Case { n: 1, queries: 1, keys: 1, heads: 1, head_dim: 1 },
    Case { n: 2, queries: 3, keys: 3, heads: 2, head_dim: 5 },
    Case { n: 1, queries: 14, keys: 14, heads: 3, head_dim: 16 },
    Case { n: 1, queries: 15, keys: 15, heads: 1, head_dim: 17 },
    Case { n: 2, queries: 77, keys: 77, heads: 2, head_dim: 64 },
    Case { n: 1, queries: 97, keys: 97, heads: 1, head_dim: 33 },
    Case { n: 1, queries: 256, keys: 256, heads: 2, head_dim: 40 },
    Case { n: 1, queries: 257, keys: 257, heads: 1, head_dim: 31 },
    Case { n: 2, queries: 521, keys: 521, heads: 1, head_dim: 8 },
    Case { n: 1, queries: 64, keys: 64, heads: 8, head_dim: 160 },
    Case { n: 1, queries: 50, keys: 50, heads: 1, head_dim: 255 },
    Case { n: 1, queries: 50, keys: 50, heads: 1, head_dim: 257 },
    Case { n: 1, queries: 300, keys: 300, heads: 1, head_dim: 512 },
    Case { n: 1, queries: 1025, keys: 1025, heads: 1, head_dim: 24 },
];

#[test]
fn packed_matches_f64_loops() {
    for dtype in DType::FLOATS {
        for case in &CASES {
            check(case, dtype, false, true, 1.0);
            check(case, dtype, true, true, 1.0);
        }
    }
}
