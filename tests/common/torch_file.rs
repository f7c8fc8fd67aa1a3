//! Tensors in the form that `torch.save` gives them: an archive of a pickle and a file per storage.
#![allow(dead_code)] // each test binary uses a part

use std::path::Path;

use safetensors::{Dtype, SafeTensors};

fn text(value: &str) -> Vec<u8> {
    [b"X", &(value.len() as u32).to_le_bytes()[..], value.as_bytes()].concat()
}

fn int(value: usize) -> Vec<u8> {
    [b"J", &(value as u32).to_le_bytes()[..]].concat()
}

fn tuple(items: &[usize]) -> Vec<u8> {
    [b"(", &items.iter().flat_map(|item| int(*item)).collect::<Vec<u8>>()[..], b"t"].concat()
}

/// A tensor of a storage.
fn tensor(storage: usize, dtype: Dtype, shape: &[usize]) -> Vec<u8> {
    let class = match dtype {
        Dtype::F32 => "Float",
        Dtype::F16 => "Half",
        Dtype::BF16 => "BFloat16",
        Dtype::I64 => "Long",
        other => panic!("a storage of {other:?}"),
    };
    let count = shape.iter().product::<usize>();
    let strides: Vec<usize> = (0..shape.len()).map(|i| shape[i + 1..].iter().product()).collect();
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n((".as_slice(),
        &text("storage"),
        format!("ctorch\n{class}Storage\n").as_bytes(),
        &text(&storage.to_string()),
        &text("cpu"),
        &int(count),
        b"tQ",
        &int(0),
        &tuple(shape),
        &tuple(&strides),
        b"\x89ccollections\nOrderedDict\n)RtR",
    ]
    .concat()
}

/// An archive whose pickle is `pickle`, with these storages; `method`: of compression, 0 for none.
pub fn archive(pickle: &[u8], storages: &[&[u8]], method: u16) -> Vec<u8> {
    let names = (0..storages.len()).map(|i| format!("it/data/{i}"));
    let files: Vec<(String, &[u8])> =
        [("it/data.pkl".into(), pickle)].into_iter().chain(names.zip(storages.iter().copied())).collect();
    let (mut all, mut directory) = (Vec::new(), Vec::new());
    for (name, data) in &files {
        let sizes = [(data.len() as u32).to_le_bytes(); 2].concat();
        let names = (name.len() as u32).to_le_bytes(); // and no extra field
        let place = (all.len() as u32).to_le_bytes();
        let head = [&[20, 0, 0, 0][..], &method.to_le_bytes(), &[0; 8], &sizes, &names].concat();
        directory.extend([b"PK\x01\x02\x14\0", &head[..], &[0; 10], &place, name.as_bytes()].concat());
        all.extend([b"PK\x03\x04", &head[..], name.as_bytes(), data].concat());
    }
    let count = (files.len() as u16).to_le_bytes();
    let sizes = [(directory.len() as u32).to_le_bytes(), (all.len() as u32).to_le_bytes()].concat();
    [&all[..], &directory, b"PK\x05\x06\0\0\0\0", &count, &count, &sizes, &[0, 0]].concat()
}

/// The tensors of a safetensors file as a state dict.
pub fn of_safetensors(path: &Path) -> Vec<u8> {
    saved(path, None)
}

/// The tensors of a safetensors file within the checkpoint of a training, with these texts beside them.
pub fn checkpoint(path: &Path, global_step: usize, texts: &[(String, String)]) -> Vec<u8> {
    let texts = texts.iter().flat_map(|(key, value)| [text(key), text(value)].concat());
    let values: Vec<u8> = text("global_step").into_iter().chain(int(global_step)).chain(texts).collect();
    saved(path, Some(&values))
}

fn saved(path: &Path, beside: Option<&[u8]>) -> Vec<u8> {
    let bytes = std::fs::read(path).expect("a file");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let tensors = file.tensors();
    let mut state: Vec<u8> = b"}(".to_vec();
    for (i, (key, view)) in tensors.iter().enumerate() {
        state.extend([text(key), tensor(i, view.dtype(), view.shape())].concat());
    }
    state.push(b'u');
    let root = match beside {
        None => state,
        Some(values) => [b"}(", values, &text("state_dict"), &state, b"u"].concat(),
    };
    let storages: Vec<&[u8]> = tensors.iter().map(|(_, view)| view.data()).collect();
    archive(&[b"\x80\x02", &root[..], b"."].concat(), &storages, 0)
}
