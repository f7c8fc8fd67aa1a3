//! Super-resolution networks: torch's results for every form of file, the same bits in stripes, what published files hold, and
//! files that are none.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use megafuse::models::{RrdbNet, RrdbNetConfig, Tiling, WeightStore};
use megafuse::runtime::CudaOptions;
use megafuse::{DType, Device, Tensor};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/rrdbnet").join(path)
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

const fn config(blocks: usize, features: usize, growth: usize, unshuffle: usize, doublings: usize) -> RrdbNetConfig {
    RrdbNetConfig { blocks, features, growth, unshuffle, doublings }
}

/// One per form: names of Real-ESRGAN in a zip archive under `params_ema`, of BSRGAN, of Real-ESRGAN behind `module.`, of the
/// first ESRGAN in PyTorch's older form.
const NETWORKS: [(&str, &str, RrdbNetConfig); 4] = [
    ("x4", "x4.pth", config(2, 16, 8, 1, 2)),
    ("x2-bsrgan", "x2-bsrgan.safetensors", config(1, 8, 4, 2, 2)),
    ("x1", "x1.safetensors", config(1, 8, 4, 4, 2)),
    ("x2-esrgan", "x2-esrgan.pth", config(1, 6, 5, 1, 1)),
];

struct Values(Vec<u8>);

impl Values {
    fn read() -> Values {
        Values(fs::read(data("values.safetensors")).expect("values.safetensors"))
    }

    fn get(&self, key: &str) -> (Vec<usize>, Vec<f32>) {
        let file = SafeTensors::deserialize(&self.0).expect("safetensors");
        let tensor = file.tensor(key).unwrap_or_else(|_| panic!("{key} is missing"));
        let values = tensor.data().as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes));
        (tensor.shape().to_vec(), values.collect())
    }

    /// `[1, C, H, W]` as `[1, H, W, C]`.
    fn channels_last(&self, key: &str) -> ([usize; 4], Vec<f32>) {
        let (shape, values) = self.get(key);
        let &[n, c, h, w] = &shape[..] else { panic!("{key} has shape {shape:?}") };
        let at = |i: usize| values[(i % c) * h * w + i / c];
        ([n, h, w, c], (0..values.len()).map(at).collect())
    }

    fn picture(&self, name: &str, device: &Device, dtype: DType) -> Tensor {
        let (shape, values) = self.channels_last(&format!("{name}.picture"));
        Tensor::from_f32(device, &shape, dtype, &values).expect("a tensor")
    }
}

fn open(file: &str, device: &Device, dtype: DType) -> RrdbNet {
    let (net, unused) = RrdbNet::open(&data(file), device, dtype).expect("opens");
    assert!(unused.is_empty(), "{unused:?}");
    net
}

/// The largest of an element, relative to the larger of its size and the root mean square of all.
fn error(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let mean_square = want.iter().map(|&want| f64::from(want).powi(2)).sum::<f64>() / want.len() as f64;
    let of = |(&got, &want): (&f32, &f32)| f64::from(got - want).abs() / f64::from(want).abs().max(mean_square.sqrt());
    got.iter().zip(want).map(of).fold(0.0, |most, error| if error <= most { most } else { error })
}

/// Names and shapes.
type Listing = Vec<(String, Vec<usize>)>;

#[test]
fn every_form_of_file_gives_torchs_picture() {
    let values = Values::read();
    for device in devices() {
        for (name, file, config) in NETWORKS {
            for dtype in DType::FLOATS {
                let net = open(file, &device, dtype);
                assert_eq!(*net.config(), config, "{name}");
                let ([_, height, width, _], want) = values.channels_last(&format!("{name}.out"));
                let picture = values.picture(name, &device, dtype);
                assert_eq!([height, width], [picture.shape()[1], picture.shape()[2]].map(|size| config.scale() * size));
                let got = net.forward(&picture, Tiling::Automatic).expect("runs");
                let allowed = match dtype {
                    DType::F32 => 1e-5,
                    dtype => 2.0 * f64::from(values.get(&format!("{name}.torch_error_{dtype}")).1[0]),
                };
                let error = error(&got, &want);
                assert!(error <= allowed, "{device} {name} {dtype}: off by {error:.3e}, allowed {allowed:.3e}");
            }
        }
    }
}

#[test]
fn stripes_change_no_bit() {
    let values = Values::read();
    for device in devices() {
        let dtypes: &[DType] = if matches!(device, Device::Cpu(_)) { &[DType::F32] } else { &[DType::F32, DType::F16] };
        for ((name, file, _), &dtype) in NETWORKS.iter().flat_map(|net| dtypes.iter().map(move |dtype| (net, dtype))) {
            let net = open(file, &device, dtype);
            let picture = values.picture(name, &device, dtype);
            let whole = net.forward(&picture, Tiling::Whole).expect("runs");
            for tiling in [Tiling::Automatic, Tiling::Stripes(4), Tiling::Stripes(7)] {
                let got = net.forward(&picture, tiling).expect("runs");
                assert!(got == whole, "{device} {name} {dtype} {tiling:?}: other bits");
            }
        }
    }
}

/// Taller than what a row depends on, so that stripes have cut edges on both sides in every layer.
#[test]
fn stripes_of_a_tall_picture_change_no_bit() {
    for device in devices() {
        let net = open("x2-esrgan.pth", &device, DType::F32);
        let shape = [1, 61, 5, 3];
        let values: Vec<f32> = (0..shape.iter().product()).map(|i| ((i * i + 7 * i) % 251) as f32 / 250.0).collect();
        let picture = Tensor::from_f32(&device, &shape, DType::F32, &values).expect("a tensor");
        let whole = net.forward(&picture, Tiling::Whole).expect("runs");
        let mut rows = Vec::new();
        let mut striped = Vec::new();
        net.forward_rows(&picture, Tiling::Stripes(11), &mut |part| {
            rows.push(part.shape()[1]);
            striped.extend(part.to_f32_vec()?);
            Ok(())
        })
        .expect("runs");
        assert_eq!(rows, [22, 22, 22, 22, 22, 12]);
        assert!(striped == whole, "{device}: other bits");
    }
}

/// In memory: a stripe holds less than the whole.
#[test]
fn stripes_take_less_memory() {
    let device = Device::meta();
    let Device::Meta(meta) = &device else { unreachable!() };
    let mut store = WeightStore::meta(&device, DType::F16);
    let net = RrdbNet::load(&mut store, &RrdbNetConfig::X4).expect("loads");
    let picture = Tensor::zeros(&device, &[1, 4096, 1024, 3], DType::F16).expect("a tensor");
    let peak = |tiling| {
        meta.take_report();
        net.forward_rows(&picture, tiling, &mut |_| Ok(())).expect("runs");
        meta.take_report().peak_bytes as f64 / f64::from(1 << 30)
    };
    let [whole, automatic, stripes] = [Tiling::Whole, Tiling::Automatic, Tiling::Stripes(512)].map(peak);
    assert!(whole > 16.0 && automatic < 4.0 && stripes < 2.0, "{whole:.2} {automatic:.2} {stripes:.2} GiB");
}

/// The tensors of RealESRGAN_x4plus.pth and BSRGAN.pth.
#[test]
fn published_networks_have_these_tensors() {
    let mut store = WeightStore::meta(&Device::meta(), DType::F32);
    let net = RrdbNet::load(&mut store, &RrdbNetConfig::X4).expect("loads");
    assert_eq!(net.parameters(), 16_697_987);
    let got: BTreeMap<String, Vec<usize>> = store.manifest().into_iter().collect();
    let mut want = BTreeMap::new();
    let mut conv = |name: String, outputs: usize, inputs: usize| {
        want.insert(format!("{name}.weight"), vec![outputs, inputs, 3, 3]);
        want.insert(format!("{name}.bias"), vec![outputs]);
    };
    conv("conv_first".into(), 64, 3);
    for (i, k) in (0..23).flat_map(|i| (1..=3).map(move |k| (i, k))) {
        for (j, (outputs, inputs)) in [(32, 64), (32, 96), (32, 128), (32, 160), (64, 192)].into_iter().enumerate() {
            conv(format!("body.{i}.rdb{k}.conv{}", j + 1), outputs, inputs);
        }
    }
    ["conv_body", "conv_up1", "conv_up2", "conv_hr"].into_iter().for_each(|name| conv(name.into(), 64, 64));
    conv("conv_last".into(), 3, 64);
    assert_eq!(want.len(), 702);
    assert!(got == want, "{got:?}");
}

/// Tensors of zeros by names and shapes.
fn write(path: &Path, tensors: &[(String, Vec<usize>)]) {
    let bytes: Vec<Vec<u8>> = tensors.iter().map(|(_, shape)| vec![0; 4 * shape.iter().product::<usize>()]).collect();
    let views: Vec<(&String, TensorView)> = tensors
        .iter()
        .zip(&bytes)
        .map(|((key, shape), bytes)| (key, TensorView::new(Dtype::F32, shape.clone(), bytes).expect("a view")))
        .collect();
    safetensors::serialize_to_file(views, None, path).expect("written");
}

fn tensors_of(config: &RrdbNetConfig) -> Vec<(String, Vec<usize>)> {
    let mut store = WeightStore::meta(&Device::meta(), DType::F32);
    RrdbNet::load(&mut store, config).expect("loads");
    store.manifest()
}

#[track_caller]
fn refused(path: &Path, words: &[&str]) {
    let error = RrdbNet::open(path, &Device::cpu(), DType::F32).err().expect("an error").to_string();
    for word in words {
        assert!(error.contains(word), "{word:?} is not in: {error}");
    }
}

#[test]
fn files_that_are_no_such_network_are_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.safetensors");
    let good = tensors_of(&config(1, 4, 2, 1, 2));
    let file = |tensors: &[(&str, &[usize])]| {
        let tensors: Vec<(String, Vec<usize>)> =
            tensors.iter().map(|(key, shape)| (key.to_string(), shape.to_vec())).collect();
        write(&path, &tensors);
    };
    let changed = |change: &dyn Fn(&mut Listing)| {
        let mut tensors = good.clone();
        change(&mut tensors);
        write(&path, &tensors);
    };
    write(&path, &good);
    RrdbNet::open(&path, &Device::cpu(), DType::F32).expect("opens");

    changed(&|tensors| tensors.retain(|(key, _)| key != "body.0.rdb2.conv3.bias"));
    refused(&path, &["body.0.rdb2.conv3.bias", "missing"]);
    changed(&|tensors| tensors.retain(|(key, _)| key != "conv_last.weight"));
    refused(&path, &["conv_last.weight is missing"]);
    let reshape = |key: &'static str, shape: &'static [usize]| {
        changed(&move |tensors| tensors.iter_mut().filter(|tensor| tensor.0 == key).for_each(|t| t.1 = shape.to_vec()));
    };
    reshape("body.0.rdb1.conv2.weight", &[2, 5, 3, 3]);
    refused(&path, &["body.0.rdb1.conv2.weight", "[2, 5, 3, 3]", "[2, 6, 3, 3]"]);
    reshape("conv_first.weight", &[4, 4, 3, 3]);
    refused(&path, &["reads 4 channels"]);
    reshape("conv_first.weight", &[4, 3, 7, 7]);
    refused(&path, &["conv_first.weight has shape [4, 3, 7, 7]"]);
    reshape("conv_last.weight", &[1, 4, 3, 3]);
    refused(&path, &["makes 1 channels"]);
    let quarter = tensors_of(&config(1, 4, 2, 4, 0));
    write(&path, &quarter);
    refused(&path, &["0 upsampling convolutions after squares of 4"]);

    file(&[("body.0.weight", &[64, 3, 3, 3]), ("body.1.weight", &[64])]);
    refused(&path, &["SRVGGNet", "RRDBNet"]);
    file(&[
        ("conv_after_body.weight", &[1]),
        ("layers.0.residual_group.blocks.0.attn.relative_position_bias_table", &[1]),
    ]);
    refused(&path, &["SwinIR"]);
    file(&[("layers.0.blocks.0.attn.attns.0.pos.weight", &[1])]);
    refused(&path, &["DAT"]);
    file(&[("layers.0.residual_group.overlap_attn.qkv.weight", &[1])]);
    refused(&path, &["HAT"]);
    file(&[("residual_layer.0.residual_layer.0.layer.0.weight", &[1])]);
    refused(&path, &["OmniSR"]);
    file(&[("model.diffusion_model.input_blocks.0.0.weight", &[1])]);
    refused(&path, &["a diffusion model"]);
    refused(&folder.path().join("none.pth"), &["none.pth"]);
    fs::write(&path, "").expect("written");
    refused(&path, &["is empty"]);
    fs::write(&path, "<html>").expect("written");
    refused(&path, &["a web page"]);
}

/// PyTorch's older form around a pickle.
fn legacy(pickle: &[u8]) -> Vec<u8> {
    let parts: [&[u8]; 4] =
        [b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", b"\x80\x02M\xe9\x03.", b"\x80\x02}.", pickle];
    [&parts.concat()[..], b"\x80\x02]."].concat()
}

#[test]
fn pickles_are_read_as_data() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.pth");
    let file = |bytes: &[u8]| fs::write(&path, bytes).expect("written");
    // What would run a command if it were called: os.system("touch ran").
    let ran = folder.path().join("ran");
    let command = format!("cos\nsystem\n(X\x10\0\0\0touch {}tR.", ran.display());
    file(&legacy(command.as_bytes()));
    refused(&path, &["model.pth"]);
    file(&legacy(b"\x80\x02cos\nsystem\nU\x04true\x85R."));
    refused(&path, &["would call os.system", "was not run"]);
    assert!(!ran.exists());
    file(&legacy(b"\x80\x02]."));
    refused(&path, &["holds no dict of tensors"]);
    file(&legacy(b"\x80\x02\xff."));
    refused(&path, &["the unknown instruction 0xff"]);
    file(&legacy(b"\x80\x02R."));
    refused(&path, &["an empty stack"]);
    // Values that could fill the memory or the stack, each in few bytes of file.
    let nested = [vec![b']'; 1 << 20], vec![b'a'; (1 << 20) - 1], vec![b'.']].concat();
    file(&legacy(&nested));
    refused(&path, &["holds no dict of tensors"]);
    // A tensor of another name, one that lies transposed, and one that is longer than its storage.
    let tensor = |size: &str, strides: &str| {
        let storage = "(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x04tQ";
        format!("}}U\x01wctorch._utils\n_rebuild_tensor_v2\n({storage}K\0{size}{strides}tRs.").into_bytes()
    };
    let with_storage = |pickle: &[u8]| {
        let mut bytes = legacy(pickle);
        bytes.truncate(bytes.len() - 4);
        [&bytes[..], b"\x80\x02]U\x010a.", &4u64.to_le_bytes(), &[0; 16]].concat()
    };
    file(&with_storage(&tensor("(K\x02K\x02t", "(K\x02K\x01t")));
    refused(&path, &["conv_first.weight is missing"]);
    file(&with_storage(&tensor("(K\x02K\x02t", "(K\x01K\x02t")));
    refused(&path, &["conv_first.weight is missing"]);
    file(&with_storage(&tensor("(K\x02K\x03t", "(K\x03K\x01t")));
    refused(&path, &["w is longer than its storage"]);
}

/// Every cut and many changed bytes: an error or a network, never a panic.
#[test]
fn damaged_files_give_errors() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.pth");
    for file in ["x4.pth", "x2-esrgan.pth"] {
        let good = fs::read(data(file)).expect("a file");
        let device = Device::meta();
        let mut opened = 0;
        let mut check = |bytes: &[u8]| {
            fs::write(&path, bytes).expect("written");
            opened += usize::from(RrdbNet::open(&path, &device, DType::F32).is_ok());
        };
        for end in (0..good.len()).step_by(good.len() / 97) {
            check(&good[..end]);
        }
        // In the pickle, which the older form begins with, and in the directory at the end of an archive.
        let ends = [0..6000.min(good.len()), good.len().saturating_sub(6000)..good.len()];
        for (step, at) in ends.into_iter().flat_map(|range| range.step_by(37).enumerate()) {
            let mut bytes = good.clone();
            bytes[at] ^= [1, 0x80, 0xff][step % 3];
            check(&bytes);
        }
        assert!(opened < 400, "{opened}");
    }
}
