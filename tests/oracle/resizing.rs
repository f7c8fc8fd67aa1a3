//! The relay's upsamplers against PIL and torch.

use megafuse::ops::{self, Upsampler};
use megafuse::{DType, Device, Tensor};

use crate::files::{self, Array, Arrays, all_passed, compare, data};

/// One f32 rounding a pass, and of each of up to a few dozen weights. torch without antialias computes the weights
/// themselves in f32, from coordinates in f32: a few ulps of cubic's slope more.
fn tolerance(upsampler: &str) -> f64 {
    if upsampler == "bicubic-torch" { 1e-5 } else { 2e-6 }
}

fn upsampler(name: &str) -> Upsampler {
    match name {
        "bilinear" => Upsampler::Bilinear,
        "bicubic" => Upsampler::Bicubic,
        "bicubic-torch" => Upsampler::BicubicTorch,
        "bicubic-gaussian" => Upsampler::BicubicGaussian,
        "bicubic-edge" => Upsampler::BicubicEdge,
        other => panic!("upsampler {other}"),
    }
}

/// `[N, C, H, W]` on the host to `[N, H, W, C]` on the device.
fn to_device(x: &Array) -> Tensor {
    let [n, c, h, w] = x.shape[..] else { panic!("shape {:?}", x.shape) };
    let at = |i: usize| {
        let (pixel, channel) = (i / c, i % c);
        x.values[(pixel / (h * w) * c + channel) * h * w + pixel % (h * w)]
    };
    let values: Vec<f32> = (0..x.values.len()).map(at).collect();
    Tensor::from_f32(&Device::cpu(), &[n, h, w, c], DType::F32, &values).unwrap()
}

fn to_host(x: &Tensor) -> Array {
    let [n, h, w, c] = x.shape()[..] else { panic!("shape {:?}", x.shape()) };
    let values = x.to_f32_vec().unwrap();
    let at = |i: usize| {
        let (plane, pixel) = (i / (h * w), i % (h * w));
        values[(plane / c * h * w + pixel) * c + plane % c]
    };
    Array { shape: vec![n, c, h, w], values: (0..values.len()).map(at).collect() }
}

fn size(value: &serde_json::Value) -> [usize; 2] {
    [0, 1].map(|i| value[i].as_u64().unwrap() as usize)
}

#[test]
fn small_pictures() {
    let want = Arrays::read(data("resize/oracle.safetensors"));
    let mut results = Vec::new();
    for case in files::json("resize/oracle.json")["cases"].as_array().unwrap() {
        let (name, to) = (case["name"].as_str().unwrap(), size(&case["to"]));
        let x = to_device(want.get(&format!("{name}.in")));
        for filter in case["upsamplers"].as_array().unwrap().iter().map(|f| f.as_str().unwrap()) {
            let key = format!("{name}.{filter}");
            let got = to_host(&ops::resize(&x, to, upsampler(filter), None, None).unwrap());
            results.push(compare(&key, &got, want.get(&key), tolerance(filter)));
            let clamped = to_host(&ops::resize(&x, to, upsampler(filter), Some((-0.5, 0.25)), None).unwrap());
            let mut bounded = want.get(&key).clone();
            bounded.values.iter_mut().for_each(|x| *x = x.clamp(-0.5, 0.25));
            results.push(compare(&format!("{key}, clamped"), &clamped, &bounded, 2.0 * tolerance(filter)));
        }
    }
    all_passed(results);
}

/// Through 8-bit levels, as the published code resizes: the same levels, all of them.
#[test]
fn eight_bit_pictures() {
    let want = Arrays::read(data("resize/oracle.safetensors"));
    let mut results = Vec::new();
    for case in files::json("resize/oracle.json")["cases"].as_array().unwrap() {
        let (name, to) = (case["name"].as_str().unwrap(), size(&case["to"]));
        let x = to_device(want.get(&format!("{name}.u8-in")));
        for filter in case["u8"].as_array().unwrap().iter().map(|f| f.as_str().unwrap()) {
            let key = format!("{name}.u8-{filter}");
            let got = to_host(&ops::resize_u8(&x, to, upsampler(filter)).unwrap());
            results.push(compare(&key, &got, want.get(&key), 1e-6));
        }
    }
    all_passed(results);
}

#[test]
fn large_pictures() {
    let want = Arrays::read(data("resize/oracle.safetensors"));
    let mut results = Vec::new();
    for case in files::json("resize/oracle.json")["large"].as_array().unwrap() {
        let (name, [h, w], to) = (case["name"].as_str().unwrap(), size(&case["from"]), size(&case["to"]));
        let pattern = |modulus: usize| {
            move |i: usize| {
                let (y, x) = (i / w, i % w);
                (y * y * 31 + x * x * 17 + x * y * 7) % modulus
            }
        };
        let floats: Vec<f32> = (0..h * w).map(pattern(257)).map(|v| (v as f32 - 128.0) / 128.0).collect();
        let levels: Vec<f32> = (0..h * w).map(pattern(256)).map(|v| (v as f32 / 255.0) * 2.0 - 1.0).collect();
        let picture = |values| Tensor::from_f32(&Device::cpu(), &[1, h, w, 1], DType::F32, values).unwrap();
        let (floats, levels) = (picture(&floats), picture(&levels));
        let rows = |x: Tensor| -> Array {
            let x = to_host(&x);
            assert_eq!(x.shape, [1, 1, to[0], to[1]]);
            let rows = case["rows"].as_array().unwrap().iter().map(|row| row.as_u64().unwrap() as usize);
            let values: Vec<f32> = rows.flat_map(|row| x.values[row * to[1]..][..to[1]].to_vec()).collect();
            Array { shape: vec![values.len() / to[1], to[1]], values }
        };
        for filter in ["bilinear", "bicubic", "bicubic-torch"] {
            let key = format!("{name}.{filter}");
            let got = rows(ops::resize(&floats, to, upsampler(filter), None, None).unwrap());
            results.push(compare(&key, &got, want.get(&key), tolerance(filter)));
        }
        for filter in ["bilinear", "bicubic"] {
            let key = format!("{name}.u8-{filter}");
            let mut got = rows(ops::resize_u8(&levels, to, upsampler(filter)).unwrap());
            got.values.iter_mut().for_each(|x| *x = ((*x + 1.0) / 2.0 * 255.0).round());
            results.push(compare(&key, &got, want.get(&key), 0.0));
        }
    }
    all_passed(results);
}
