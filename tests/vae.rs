//! The autoencoder a part of the picture at a time: the same picture, in how much memory.

#[path = "common/drawn.rs"]
mod drawn;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use half::f16;
use megafuse::models::{Partition, Vae, VaeConfig, WeightStore};
use megafuse::runtime::CudaOptions;
use megafuse::{DType, Device, Tensor};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(path)
}

/// The cpu and the emulated card, or those that `MEGAFUSE_TEST_DEVICES` lists.
fn devices() -> Vec<Device> {
    let listed = std::env::var("MEGAFUSE_TEST_DEVICES").unwrap_or_else(|_| "cpu,emu".into());
    let device = |name: &str| match name {
        "cpu" => Device::cpu(),
        "emu" => Device::emulated(CudaOptions::default()).expect("the emulated card"),
        "cuda" => Device::cuda(0).expect("the card"),
        other => panic!("MEGAFUSE_TEST_DEVICES has {other:?}, expected cpu, emu and cuda, separated by commas"),
    };
    listed.split(',').map(device).collect()
}

fn load(model: &str, device: &Device, dtype: DType) -> Vae {
    let folder = drawn::folder(&format!("{model}/vae"));
    let config = fs::read_to_string(folder.join("config.json")).expect("config.json");
    let config = VaeConfig::from_json("config.json", &config).expect("a good config");
    let stem = "diffusion_pytorch_model";
    Vae::load(WeightStore::open(&folder, stem, device, dtype).expect("weights"), &config).expect("loads")
}

/// Values between -2 and 2 that do not repeat.
fn values(device: &Device, shape: &[usize], dtype: DType) -> Tensor {
    let count: usize = shape.iter().product();
    let values: Vec<f32> = (0..count).map(|i| ((i * i + 7 * i) % 1009) as f32 / 252.0 - 2.0).collect();
    Tensor::from_f32(device, shape, dtype, &values).expect("a tensor")
}

fn floats(x: &Tensor) -> Vec<f32> {
    x.to_f32_vec().expect("values")
}

/// Small models of two and of four levels.
const MODELS: [&str; 2] = ["sd15", "four-levels"];

#[test]
fn stripes_change_no_bit() {
    for device in devices() {
        let dtypes: &[DType] =
            if matches!(device, Device::Cpu(_)) { &[DType::F32] } else { &[DType::F32, DType::BF16] };
        for (model, dtype) in MODELS.into_iter().flat_map(|model| dtypes.iter().map(move |&dtype| (model, dtype))) {
            let vae = load(model, &device, dtype);
            let f = vae.config().factor();
            // More pixels than a card's norm sums up at once; a width that no power of two divides.
            let (h, w) = (40 / f + 1, 36 / f + 1);
            let latent = values(&device, &[1, h, w, vae.config().latent_channels], dtype);
            let picture = values(&device, &[1, h * f, w * f, 3], dtype);
            let (decoded, encoded) = (floats(&vae.decode(&latent).unwrap()), floats(&vae.encode(&picture).unwrap()));
            assert!(decoded.iter().chain(&encoded).all(|x| x.is_finite()));
            let cuts: &[usize] = if matches!(device, Device::Cpu(_)) { &[1, 2, 7, 16, 1000] } else { &[7, 16] };
            for &rows in cuts {
                let stripes = Partition::Stripes { rows };
                let what = format!("{device} {model} {dtype}, stripes of {rows} rows");
                assert!(floats(&vae.decode_in(&latent, stripes).unwrap()) == decoded, "decoder, {what}");
                assert!(floats(&vae.encode_in(&picture, stripes).unwrap()) == encoded, "encoder, {what}");
            }
        }
    }
}

/// A file's tensors: shape and values, [N, C, H, W] of `maps` as NHWC.
fn read(path: &Path) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let bytes = fs::read(path).expect("a file");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let value = |dtype: Dtype, bytes: &[u8]| match dtype {
        Dtype::F16 => f16::from_le_bytes(bytes.try_into().unwrap()).to_f32(),
        _ => f32::from_le_bytes(bytes.try_into().unwrap()),
    };
    let values = |view: &TensorView| -> Vec<f32> {
        let size = if view.dtype() == Dtype::F16 { 2 } else { 4 };
        view.data().chunks_exact(size).map(|bytes| value(view.dtype(), bytes)).collect()
    };
    file.iter().map(|(name, view)| (name.to_string(), (view.shape().to_vec(), values(&view)))).collect()
}

fn nhwc((shape, values): &(Vec<usize>, Vec<f32>), device: &Device, dtype: DType) -> Tensor {
    let [n, c, h, w] = shape[..] else { panic!("{shape:?}") };
    let at = |i: usize| values[((i / (h * w * c)) * c + i % c) * h * w + i / c % (h * w)];
    let moved: Vec<f32> = (0..values.len()).map(at).collect();
    Tensor::from_f32(device, &[n, h, w, c], dtype, &moved).expect("a tensor")
}

/// The largest error of an element, relative to the larger of its size and the root mean square of all.
fn error(got: &Tensor, want: &Tensor) -> f64 {
    let (got, want) = (floats(got), floats(want));
    assert_eq!(got.len(), want.len());
    let mean = want.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / want.len() as f64;
    let one = |(got, want): (&f32, &f32)| f64::from(got - want).abs() / f64::from(want.abs()).max(mean.sqrt());
    got.iter().zip(&want).map(one).fold(0.0, |most, error| if error.is_nan() { f64::INFINITY } else { error.max(most) })
}

/// `enable_tiling` of diffusers: tiles of 16 pixels with a quarter of overlap, of 32 with half.
#[test]
fn tiles_are_those_of_the_published_library() {
    let stored = read(&data("vae/tiled.safetensors"));
    for device in devices() {
        for (model, name, side, overlap) in
            [("sd15", "14x11", 16, 4), ("sd15", "9x8", 16, 4), ("four-levels", "7x9", 32, 16)]
        {
            let vae = load(model, &device, DType::F32);
            let get = |what: &str| nhwc(&stored[&format!("{model}.{name}.{what}")], &device, DType::F32);
            let tiles = Partition::Tiles { side, overlap };
            let decoded = error(&vae.decode_in(&get("latent"), tiles).unwrap(), &get("decoded"));
            let encoded = error(&vae.encode_in(&get("image"), tiles).unwrap(), &get("moments"));
            assert!(decoded < 1e-4 && encoded < 1e-4, "{device} {model} {name}: {decoded:.2e} and {encoded:.2e} off");
            assert!(
                error(&vae.decode(&get("latent")).unwrap(), &get("decoded")) > 1e-2,
                "the whole is another picture"
            );
        }
    }
}

/// A decoder whose activations leave the range of f16, as SDXL's do: bf16 holds them as well as torch's does.
#[test]
fn large_activations_are_for_bf16() {
    const LARGE: f32 = 65536.0;
    let (weights, stored) = (
        read(&drawn::folder("sdxl/vae").join("diffusion_pytorch_model.fp16.safetensors")),
        read(&data("vae/large.safetensors")),
    );
    // What tools/oracle/vae_values.py does to the same tensors.
    let grows = |name: &str| {
        let parts = ["conv_in.", ".conv2.", ".to_out.0.", ".upsamplers.0.conv.bias", ".conv_shortcut.bias"];
        name.starts_with("decoder.") && parts.iter().any(|part| name.contains(part))
    };
    let bytes: BTreeMap<&String, Vec<u8>> = weights
        .iter()
        .map(|(name, (_, values))| {
            let factor = if grows(name) { LARGE } else { 1.0 };
            (name, values.iter().flat_map(|value| (factor * value).to_le_bytes()).collect())
        })
        .collect();
    let views = weights
        .iter()
        .map(|(name, (shape, _))| (name, TensorView::new(Dtype::F32, shape.clone(), &bytes[name]).expect("a tensor")));
    let folder = tempfile::tempdir().expect("a folder");
    safetensors::serialize_to_file(views, None, &folder.path().join("vae.safetensors")).expect("a file");
    let config = fs::read_to_string(data("sdxl/vae/config.json")).expect("config.json");
    let config = VaeConfig::from_json("config.json", &config).expect("a good config");
    let torch = f64::from(stored["torch_error_bf16"].1[0]);
    for device in devices() {
        for (dtype, limit) in [(DType::F32, 1e-4), (DType::BF16, 2.0 * torch)] {
            let store = WeightStore::open(folder.path(), "vae", &device, dtype).expect("weights");
            let vae = Vae::load(store, &config).expect("loads");
            let got = vae.decode(&nhwc(&stored["latent"], &device, dtype)).unwrap();
            let error = error(&got, &nhwc(&stored["decoded"], &device, DType::F32));
            assert!(error < limit, "{device} {dtype}: {error:.2e} off, torch's bf16 {torch:.2e}");
        }
    }
}

#[test]
fn a_batch_in_stripes() {
    let device = Device::cpu();
    let vae = load("sd15", &device, DType::F32);
    let latent = values(&device, &[3, 5, 4, 4], DType::F32);
    let stripes = Partition::Stripes { rows: 3 };
    assert!(floats(&vae.decode_in(&latent, stripes).unwrap()) == floats(&vae.decode(&latent).unwrap()));
    let picture = values(&device, &[2, 10, 8, 3], DType::F32);
    assert!(floats(&vae.encode_in(&picture, stripes).unwrap()) == floats(&vae.encode(&picture).unwrap()));
}

#[test]
fn partitions_that_cannot_be_are_named() {
    let device = Device::cpu();
    let vae = load("sd15", &device, DType::F32);
    let latent = values(&device, &[1, 5, 4, 4], DType::F32);
    let error = vae.decode_in(&latent, Partition::Stripes { rows: 0 }).unwrap_err().to_string();
    assert!(error.contains("rows of a stripe is 0, expected at least 1"), "{error}");
    let tiles = |side, overlap| vae.decode_in(&latent, Partition::Tiles { side, overlap }).unwrap_err().to_string();
    assert!(tiles(0, 0).contains("side of a tile is 0, expected at least 2 pixels, a multiple of 2"));
    assert!(tiles(7, 2).contains("side of a tile is 7"));
    assert!(tiles(8, 8).contains("overlap of tiles is 8, expected less than the side, 8, and a multiple of 2"));
    assert!(tiles(8, 3).contains("overlap of tiles is 3"));
}

/// Bytes alive at most while `run` runs, of which the weights; a VAE of the published configuration of SD 1.5, which SDXL's
/// is but for its scaling factor.
fn peak(size: usize, partition: Partition, decode: bool) -> u64 {
    let device = Device::meta();
    let Device::Meta(meta) = &device else { unreachable!() };
    let config = fs::read_to_string(data("manifest/sd15-vae.json")).expect("config.json");
    let config = VaeConfig::from_json("config.json", &config).expect("a good config");
    let vae = Vae::from_weights(&WeightStore::meta(&device, DType::BF16).root(), &config).expect("loads");
    let shape = if decode { [1, size / 8, size / 8, 4] } else { [1, size, size, 3] };
    let x = Tensor::zeros(&device, &shape, DType::BF16).unwrap();
    meta.take_report();
    match decode {
        true => vae.decode_in(&x, partition).map(drop).unwrap(),
        false => vae.encode_in(&x, partition).map(drop).unwrap(),
    }
    meta.take_report().peak_bytes
}

/// docs/performance.md has these figures.
#[test]
fn memory_of_a_picture() {
    const GB: f64 = 1e9;
    let partitions = [Partition::Whole, Partition::Stripes { rows: 64 }, Partition::Tiles { side: 1024, overlap: 256 }];
    let mut peaks = Vec::new();
    for size in [1024, 2048, 4096] {
        let row = [true, false].map(|decode| partitions.map(|partition| peak(size, partition, decode) as f64 / GB));
        println!("{size}: decode {:.2?} GB, encode {:.2?} GB (whole, stripes, tiles)", row[0], row[1]);
        peaks.push(row);
    }
    let [decode, encode] = peaks[2];
    assert!(decode[0] < 22.0 && encode[0] < 22.0, "whole: {} and {} GB", decode[0], encode[0]);
    assert!(decode[1] < 12.0 && encode[1] < 12.0, "stripes: {} and {} GB", decode[1], encode[1]);
    assert!(decode[2] < 2.0 && encode[2] < 2.0, "tiles: {} and {} GB", decode[2], encode[2]);
}
