//! disperse against plain f64 loops, and its matrix against what is known of it.

use crate::common::{Expected, Random, assert_close, cases, f64s, unaligned};
use megafuse::Error;
use megafuse::ops::{self, dispersion};
use megafuse::runtime::{DType, Device, MetaDevice, Tensor};

/// One kernel; primes; one off a block; empty; whole blocks.
const SHAPES: [[usize; 4]; 6] =
    [[1, 3, 3, 1], [3, 3, 3, 5], [2, 3, 3, 257], [0, 3, 3, 8], [4, 3, 3, 0], [5, 3, 3, 512]];

fn expected(weight: &Tensor) -> Expected {
    let &[o, _, _, i] = weight.shape() else { panic!("four dimensions") };
    let (k, r) = (f64s(weight), dispersion());
    let (mut values, mut magnitudes) = (Vec::new(), Vec::new());
    for (output, tap, input) in crate::common::product3(o, 25, i) {
        let terms: Vec<f64> = (0..9).map(|small| r[tap][small] * k[(output * 9 + small) * i + input]).collect();
        values.push(terms.iter().sum());
        magnitudes.push(terms.iter().map(|term| term.abs()).sum());
    }
    Expected { shape: vec![o, 5, 5, i], values, magnitudes }
}

#[test]
fn matches_f64() {
    for (device, dtype, shape) in cases(&SHAPES) {
        let weight = Random::new(1).randn(&device, &shape, dtype);
        // Nine products, their sums, and the matrix rounded to f32.
        assert_close(&ops::disperse(&weight).unwrap(), &expected(&weight), 10.0, format!("{device} {shape:?}"));
        if shape == [3, 3, 3, 5] {
            let shifted = unaligned(&weight);
            assert_close(&ops::disperse(&shifted).unwrap(), &expected(&weight), 10.0, format!("{device} shifted"));
        }
    }
}

/// Of the matrix that was published, R20to1: what all taps at 1 become, the sums of its columns, and that the centre's tap
/// stays the centre's.
#[test]
fn the_matrix_is_the_published_one() {
    let r = dispersion();
    let rows: Vec<f64> = r.iter().map(|row| row.iter().sum()).collect();
    let of_ones = [
        [0.59132, 0.33147, 0.55416, 0.33147, 0.59132],
        [0.33147, 0.18609, 0.31390, 0.18609, 0.33147],
        [0.55416, 0.31390, 0.51864, 0.31390, 0.55416],
        [0.33147, 0.18609, 0.31390, 0.18609, 0.33147],
        [0.59132, 0.33147, 0.55416, 0.33147, 0.59132],
    ];
    for (tap, (got, want)) in rows.iter().zip(of_ones.as_flattened()).enumerate() {
        assert!((got - want).abs() < 1e-5, "tap {tap} of ones: {got}, expected {want}");
    }
    for small in 0..9 {
        let sum: f64 = r.iter().map(|row| row[small]).sum();
        let want = if small == 4 {
            1.0
        } else if small % 2 == 1 {
            1.061347
        } else {
            1.126727
        };
        assert!((sum - want).abs() < 1e-6, "column {small}: {sum}, expected {want}");
    }
    for (tap, row) in r.iter().enumerate() {
        let want = f64::from(tap == 12);
        assert!((row[4] - want).abs() < 1e-12, "the centre's part of tap {tap}: {}", row[4]);
    }
}

#[test]
fn meta_records_one_launch() {
    let meta = MetaDevice::default();
    let weight = Tensor::zeros(&Device::Meta(meta.clone()), &[6, 3, 3, 4], DType::BF16).unwrap();
    assert_eq!(ops::disperse(&weight).unwrap().shape(), [6, 5, 5, 4]);
    let report = meta.take_report();
    let [op] = &report.ops[..] else { panic!("{:?}", report.ops) };
    assert_eq!((op.op, op.work.bytes, op.work.launches), ("disperse", 2 * 24 * (9 + 25), 1));
}

#[test]
fn other_kernels_are_refused() {
    let of = |shape: &[usize], dtype| ops::disperse(&Tensor::zeros(&Device::cpu(), shape, dtype).unwrap()).unwrap_err();
    assert!(of(&[2, 1, 1, 4], DType::F32).to_string().contains("expected [O, 3, 3, I]"));
    assert!(matches!(of(&[2, 9, 4], DType::F32), Error::Shape { .. }));
    assert!(matches!(of(&[2, 3, 3, 4], DType::U32), Error::Dtype { .. }));
}
