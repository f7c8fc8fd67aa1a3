//! `torch.randn` on seeded CPU generators: the same bits.

use megafuse::rng::{Rng, RngKind};
use serde_json::Value;

use crate::files::{self, Array, Arrays, all_passed, data};

/// One draw against what is stored of it: all values of a small one, both ends and a hash of a large one.
fn check(what: &str, got: &[f32], entry: &Value, stored: &Arrays) -> Result<(), String> {
    let size = entry["size"].as_u64().unwrap() as usize;
    assert_eq!(got.len(), size, "{what}");
    let want = &stored.get(entry["tensor"].as_str().unwrap()).values;
    let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let whole = want.len() == size;
    let kept = if whole { got.to_vec() } else { [&got[..8], &got[size - 8..]].concat() };
    if let Some(i) = (0..want.len()).find(|&i| bits(&kept)[i] != bits(want)[i]) {
        return Err(format!("{what}: kept value {i} is {:?}, expected {:?}", kept[i], want[i]));
    }
    let crc = entry["crc32"].as_u64().unwrap() as u32;
    match crc32(bytemuck::cast_slice(got)) == crc {
        true => Ok(()),
        false => Err(format!("{what}: the ends are right, something between is not")),
    }
}

/// As zlib's.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, &byte: &u8| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg()))
    };
    !bytes.iter().fold(!0, step)
}

#[test]
fn single_draws() {
    let stored = Arrays::read(data("randn/oracle.safetensors"));
    let check = |entry: &Value| {
        let (seed, size) = (entry["seed"].as_u64().unwrap(), entry["size"].as_u64().unwrap());
        let got = Rng::new(RngKind::TorchCpu, seed).normal(size as usize);
        check(&format!("seed {seed}, {size} values"), &got, entry, &stored)
    };
    let listed = files::json("randn/oracle.json");
    all_passed(listed["single"].as_array().unwrap().iter().map(check).collect());
}

#[test]
fn consecutive_draws() {
    let stored = Arrays::read(data("randn/oracle.safetensors"));
    let mut results = Vec::new();
    for sequence in files::json("randn/oracle.json")["sequences"].as_array().unwrap() {
        let seed = sequence["seed"].as_u64().unwrap();
        let mut rng = Rng::new(RngKind::TorchCpu, seed);
        let mut before = Vec::new();
        for entry in sequence["draws"].as_array().unwrap() {
            let size = entry["size"].as_u64().unwrap();
            let got = rng.normal(size as usize);
            results.push(check(&format!("seed {seed}, {size} values after {before:?}"), &got, entry, &stored));
            before.push(size);
        }
    }
    all_passed(results);
}

#[test]
fn a_shaped_draw_is_in_nchw_order() {
    let want = Arrays::read(data("randn/oracle.safetensors"));
    let Array { shape, values } = want.get("shaped.seed3");
    let [n, c, h, w] = shape[..] else { panic!("shape {shape:?}") };
    let got = Rng::new(RngKind::TorchCpu, 3).normal_nhwc(&megafuse::Device::cpu(), [n, h, w, c]).unwrap();
    assert_eq!(got.shape(), [n, h, w, c]);
    let got = got.to_f32_vec().unwrap();
    for (i, want) in values.iter().enumerate() {
        let (image, channel, pixel) = (i / (c * h * w), i / (h * w) % c, i % (h * w));
        assert_eq!(got[(image * h * w + pixel) * c + channel].to_bits(), want.to_bits(), "element {i}");
    }
}
