//! The kernels that measure a card: that they do all of what is counted.

use crate::common::{Random, cards, f64s, hoppers};
use megafuse::Error;
use megafuse::ops::peaks::{self, A, B, READ_BLOCK, SUMS, THREADS, WARPGROUPS, WARPS, WGMMA};
use megafuse::runtime::{DType, Device, Tensor};

/// Small whole numbers, so that every sum is exact.
fn whole(card: &Device, shape: &[usize], dtype: DType, seed: u64) -> Tensor {
    let mut random = Random::new(seed);
    let count = shape.iter().product();
    let values: Vec<f32> = (0..count).map(|_| (random.uniform() * 7.0).floor() as f32 - 3.0).collect();
    Tensor::from_f32(card, shape, dtype, &values).unwrap()
}

#[test]
fn products_are_all_computed() {
    for card in cards() {
        for (dtype, blocks, rounds) in [(DType::F16, 1, 1), (DType::BF16, 3, 5), (DType::F16, 2, 0)] {
            let (a, b) = (whole(&card, &[A, 16, 16], dtype, 1), whole(&card, &[B, 8, 16], dtype, 2));
            let got = peaks::products(&a, &b, blocks, rounds).unwrap();
            assert_eq!(got.shape(), [blocks * WARPS, 16, 8]);
            let (a, b) = (f64s(&a), f64s(&b));
            for (at, got) in f64s(&got).into_iter().enumerate() {
                let (row, column) = (at / 8 % 16, at % 8);
                let product = |i: usize, j: usize| -> f64 {
                    (0..16).map(|k| a[(i * 16 + row) * 16 + k] * b[(j * 8 + column) * 16 + k]).sum()
                };
                let want: f64 = (0..A * B).map(|ij| product(ij / B, ij % B)).sum();
                assert_eq!(got, want * rounds as f64, "{card} {dtype} {blocks} {rounds}: element {at}");
            }
        }
    }
}

#[test]
fn products_of_warpgroups_are_all_computed() {
    for (device, _) in hoppers() {
        let [m, n, k] = WGMMA;
        for (dtype, blocks, rounds) in [(DType::F16, 1, 1), (DType::BF16, 2, 3), (DType::F16, 1, 0)] {
            let (a, b) = (whole(&device, &[m, k], dtype, 1), whole(&device, &[n, k], dtype, 2));
            let got = peaks::warpgroup_products(&a, &b, blocks, rounds).unwrap();
            assert_eq!(got.shape(), [blocks * WARPGROUPS, m, n]);
            let (a, b) = (f64s(&a), f64s(&b));
            let product =
                |row: usize, column: usize| -> f64 { (0..k).map(|i| a[row * k + i] * b[column * k + i]).sum() };
            let want: Vec<f64> = (0..m * n).map(|at| product(at / n, at % n) * rounds as f64).collect();
            for (at, got) in f64s(&got).into_iter().enumerate() {
                assert_eq!(got, want[at % (m * n)], "{device} {dtype} {blocks} {rounds}: element {at}");
            }
        }
    }
}

#[test]
fn reads_are_of_every_value() {
    for card in cards() {
        let x = whole(&card, &[2 * READ_BLOCK], DType::F32, 6);
        let sums = f64s(&peaks::read(&x).unwrap());
        assert_eq!(sums.len(), 2 * THREADS);
        let values = f64s(&x);
        for (at, sum) in sums.into_iter().enumerate() {
            // A thread's pieces of four values are THREADS pieces apart.
            let first = at / THREADS * READ_BLOCK + at % THREADS * 4;
            let want: f64 = (0..64).map(|i| values[first + i / 4 * THREADS * 4 + i % 4]).sum();
            assert_eq!(sum, want, "{card} thread {at}");
        }
        let error = peaks::read(&x.rows(0..READ_BLOCK - 4).unwrap()).unwrap_err().to_string();
        assert!(error.contains("whole blocks of 16384"), "{error}");
    }
}

#[test]
fn sums_are_all_computed() {
    for card in cards() {
        let x = Random::new(3).randn(&card, &[THREADS], DType::F32);
        let (scale, shift, blocks, rounds) = (0.75, 0.5, 2, 9);
        let got = peaks::sums(&x, scale, shift, blocks, rounds).unwrap();
        let of_thread = |x: &f32| -> f32 {
            let sum = |i: usize| (0..rounds).fold(x + i as f32, |sum, _| sum.mul_add(scale, shift));
            (0..SUMS).map(sum).sum()
        };
        let row: Vec<f32> = x.to_f32_vec().unwrap().iter().map(of_thread).collect();
        assert_eq!(got.to_f32_vec().unwrap(), row.repeat(blocks), "{card}");
    }
}

#[test]
fn copies_are_the_same_bits() {
    for card in cards() {
        for (count, dtype) in
            [(4, DType::F32), (8, DType::F16), (4096, DType::F32), (4100, DType::F32), (0, DType::F32)]
        {
            let x = Random::new(4).randn(&card, &[count], dtype);
            let y = peaks::copy(&x).unwrap();
            assert_eq!(y.to_f32_vec().unwrap(), x.to_f32_vec().unwrap(), "{card} {count} {dtype}");
        }
        let x = Random::new(5).randn(&card, &[16], DType::F32);
        for (rows, what) in [(0..15, "60 bytes"), (1..13, "48 bytes")] {
            let error = peaks::copy(&x.rows(rows).unwrap()).unwrap_err().to_string();
            assert!(error.contains(what) && error.contains("16 divides"), "{error}");
        }
    }
}

#[test]
fn arguments_are_checked() {
    let cpu = Tensor::zeros(&Device::cpu(), &[THREADS], DType::F32).unwrap();
    assert!(matches!(peaks::copy(&cpu), Err(Error::Device { .. })));
    assert!(matches!(peaks::sums(&cpu, 1.0, 0.0, 1, 1), Err(Error::Device { .. })));
    for card in cards() {
        let x = Tensor::zeros(&card, &[THREADS], DType::F32).unwrap();
        assert!(matches!(peaks::products(&x, &x, 1, 1), Err(Error::Dtype { .. })));
        let x = Tensor::zeros(&card, &[THREADS], DType::F16).unwrap();
        assert!(matches!(peaks::products(&x, &x, 1, 1), Err(Error::Shape { .. })));
        assert!(matches!(peaks::warpgroup_products(&x, &x, 1, 1), Err(Error::Shape { .. })));
        assert!(matches!(peaks::sums(&x, 1.0, 0.0, 1, 1), Err(Error::Dtype { .. })));
    }
}
