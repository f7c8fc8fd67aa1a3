//! unpatchify against index arithmetic.

use crate::common::{Random, cards, cases, unaligned};
use megafuse::ops;
use megafuse::runtime::{DType, Device, OpKind, Tensor};

/// N, h, w, p, C: one element; primes; runs of whole 16 bytes and others; more than a block; empty; SD3's.
const SHAPES: [[usize; 5]; 8] = [
    [1, 1, 1, 1, 1],
    [2, 3, 5, 2, 7],
    [1, 2, 3, 3, 8],
    [2, 1, 7, 4, 4],
    [1, 31, 9, 2, 3],
    [2, 0, 3, 2, 16],
    [1, 4, 4, 1, 5],
    [2, 9, 13, 2, 16],
];

#[test]
fn every_element_is_at_its_place() {
    for (device, dtype, [n, h, w, p, c]) in cases(&SHAPES) {
        let x = Random::new(31).randn(&device, &[n, h * w, p * p * c], dtype);
        for x in [unaligned(&x), x] {
            let from = x.to_f32_vec().unwrap();
            let y = ops::unpatchify(&x, [h, w], p).unwrap();
            assert_eq!(y.shape(), [n, h * p, w * p, c]);
            let y = y.to_f32_vec().unwrap();
            for (at, value) in y.into_iter().enumerate() {
                let (of_c, column, row, image) =
                    (at % c, at / c % (w * p), at / c / (w * p) % (h * p), at / c / (w * p) / (h * p));
                let token = (image * h + row / p) * w + column / p;
                let in_token = (row % p * p + column % p) * c + of_c;
                assert_eq!(value, from[token * p * p * c + in_token], "{device} {dtype} {n} {h} {w} {p} {c}: {at}");
            }
        }
    }
}

#[test]
fn meta_records_a_copy() {
    let device = Device::meta();
    let x = Tensor::zeros(&device, &[2, 15, 64], DType::BF16).unwrap();
    let Device::Meta(meta) = &device else { unreachable!() };
    meta.take_report();
    assert_eq!(ops::unpatchify(&x, [3, 5], 2).unwrap().shape(), [2, 6, 10, 16]);
    let work = meta.take_report().of(OpKind::Elementwise);
    assert_eq!((work.macs, work.flops, work.bytes, work.launches), (0, 0, 2 * x.bytes(), 1));
}

#[test]
fn one_launch_of_the_kernel_for_the_width() {
    for device in cards() {
        let Device::Cuda(cuda) = &device else { unreachable!() };
        for (c, kernel) in [(16, "unpatchify_wide"), (3, "unpatchify_bf16")] {
            let x = Tensor::zeros(&device, &[1, 6, 4 * c], DType::BF16).unwrap();
            let run = || ops::unpatchify(&x, [2, 3], 2).map(drop);
            assert_eq!(cuda.capture(1 << 20, run).unwrap().kernels(), [kernel], "{c}");
        }
    }
}

#[test]
fn arguments_that_do_not_fit_are_named() {
    let device = Device::cpu();
    let x = Tensor::zeros(&device, &[1, 6, 12], DType::F32).unwrap();
    for (grid, patch, expected) in [
        ([2, 2], 2, "x has shape [1, 6, 12], expected [N, 2 * 2, 2 * 2 * C]"),
        ([2, 3], 5, "expected [N, 2 * 3, 5 * 5 * C]"),
        ([2, 3], 0, "patch is 0, expected 1 or more"),
        ([usize::MAX, 2], 1, "x has shape [1, 6, 12]"),
    ] {
        let error = ops::unpatchify(&x, grid, patch).unwrap_err().to_string();
        assert!(error.contains(expected), "{error} does not contain {expected}");
    }
}
