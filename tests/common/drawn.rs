//! Small models whose weights are drawn from a seed rather than stored: tools/oracle/drawn.py.

use std::fs;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use megafuse::rng::{Rng, RngKind};
use safetensors::{Dtype, View};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// The folder `tests/data/{name}`, or where some of its weights are described by `*.drawn.json`, a copy with these as safetensors.
pub fn folder(name: &str) -> PathBuf {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
    let mut files = Vec::new();
    list(&from, &mut files);
    if !files.iter().any(|file| file.to_string_lossy().ends_with(".drawn.json")) {
        return from;
    }
    files.sort();
    let mut hash = Sha256::new();
    for file in &files {
        hash.update(file.to_string_lossy().as_bytes());
        hash.update(fs::read(file).expect("a file of tests/data"));
    }
    // Of this content; whoever makes it first, for all.
    let all = Path::new(env!("CARGO_TARGET_TMPDIR")).join("drawn");
    fs::create_dir_all(&all).expect("a folder for models");
    let made =
        all.join(format!("{}-{}", name.replace('/', "-"), hex(&hash.finalize()[..6]))).join(from.file_name().unwrap());
    if made.is_dir() {
        return made;
    }
    let temporary = tempfile::tempdir_in(&all).expect("a temporary folder");
    let to = temporary.path().join(from.file_name().unwrap());
    for file in &files {
        let to = to.join(file.strip_prefix(&from).unwrap());
        fs::create_dir_all(to.parent().unwrap()).expect("a folder");
        match to.to_string_lossy().strip_suffix(".drawn.json") {
            Some(stem) => fs::write(format!("{stem}.safetensors"), weights(file)).expect("weights"),
            None => drop(fs::copy(file, &to).expect("a file")),
        }
    }
    // Another test may have been faster.
    let _ = fs::rename(temporary.path(), made.parent().unwrap());
    assert!(made.is_dir(), "{}", made.display());
    made
}

fn list(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
        let path = entry.expect("an entry").path();
        if path.is_dir() { list(&path, files) } else { files.push(path) }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

struct Drawn {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl View for &Drawn {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        (&self.bytes).into()
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// A safetensors file of what a `*.drawn.json` describes.
pub fn weights(path: &Path) -> Vec<u8> {
    let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let described: Value = serde_json::from_str(&text).expect("JSON");
    let (seed, part) = (described["seed"].as_u64().unwrap(), described["part"].as_str().unwrap());
    let mut crc = flate2::Crc::new();
    let mut tensors = Vec::new();
    for entry in described["tensors"].as_array().unwrap() {
        let key = entry[0].as_str().unwrap();
        let name = entry[2].as_str().unwrap_or(key);
        let shape: Vec<usize> = entry[1].as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize).collect();
        let mut values = draw(seed, part, name, &shape);
        for scaled in described["scaled"].as_array().unwrap().iter().filter(|scaled| scaled[0] == name) {
            let (rows, factor) = (scaled[1].as_u64().unwrap() as usize, scaled[2].as_f64().unwrap() as f32);
            let row = values.len() / shape[0];
            values[..rows * row].iter_mut().for_each(|value| *value *= factor);
        }
        let (dtype, bytes): (Dtype, Vec<u8>) = match described["dtype"].as_str().unwrap() {
            "f32" => (Dtype::F32, bytemuck::cast_slice(&values).to_vec()),
            "f16" => {
                let rounded: Vec<f16> = values.iter().map(|&value| f16::from_f32(value)).collect();
                values = rounded.iter().map(|value| value.to_f32()).collect();
                (Dtype::F16, bytemuck::cast_slice(&rounded).to_vec())
            }
            "bf16" => {
                let rounded: Vec<bf16> = values.iter().map(|&value| bf16::from_f32(value)).collect();
                values = rounded.iter().map(|value| value.to_f32()).collect();
                (Dtype::BF16, bytemuck::cast_slice(&rounded).to_vec())
            }
            other => panic!("{}: dtype {other}", path.display()),
        };
        crc.update(bytemuck::cast_slice(&values));
        tensors.push((key.to_string(), Drawn { dtype, shape, bytes }));
    }
    let want = described["crc32"].as_u64().unwrap() as u32;
    assert_eq!(crc.sum(), want, "{}: other values than those that the oracle drew", path.display());
    safetensors::serialize(tensors.iter().map(|(name, tensor)| (name, tensor)), None).expect("safetensors")
}

/// As `draw` of tools/oracle/small_models.py.
fn draw(seed: u64, part: &str, name: &str, shape: &[usize]) -> Vec<f32> {
    let digest = Sha256::digest(format!("{seed} {part}.{name}").as_bytes());
    let seed = u32::from_le_bytes(*digest.first_chunk().unwrap());
    let count: usize = shape.iter().product();
    let mut x = Rng::new(RngKind::TorchCpu, u64::from(seed)).normal(count);
    let row = (count / shape.first().copied().unwrap_or(1).max(1)) as f64;
    x.iter_mut().for_each(|x| {
        *x = if name.ends_with("embedding.weight") {
            *x * 0.5
        } else if name.ends_with("bias") {
            *x * 0.1
        } else if shape.len() == 1 {
            1.0 + 0.2 * *x
        } else {
            *x / row.sqrt() as f32
        }
    });
    x
}
