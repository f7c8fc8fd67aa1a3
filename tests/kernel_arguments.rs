//! A struct that is passed to kernels by value is written twice, in CUDA and in Rust. The two must have the same fields, of
//! the same types, in the same order: two of one type exchanged change no size, so a launch would not notice.
//!
//! In src/ops/cuda each `#[repr(C)]` struct names its twin in the comment above it: "`LinearArgs` of linear.cuh."

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

#[derive(Debug)]
struct Field {
    name: String,
    /// As Rust writes it.
    kind: String,
    /// How many: an array.
    count: usize,
}

#[test]
fn structs_of_kernels_and_of_their_launches_agree() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let sources: BTreeMap<String, String> = files(&root.join("kernels"))
        .into_iter()
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu" || extension == "cuh"))
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read_to_string(path).unwrap()))
        .collect();
    let mut compared = 0;
    for path in files(&root.join("src/ops/cuda")) {
        for (name, file, fields) in structs_of_launches(&fs::read_to_string(&path).unwrap(), &path) {
            let source = sources.get(&file).unwrap_or_else(|| panic!("{}: there is no {file}", path.display()));
            compare(&fields, &struct_of_kernels(source, &name), &format!("{name} in {file} and {}", path.display()));
            compared += 1;
        }
    }
    assert!(compared >= 4, "only {compared} structs found");
}

/// An array of the launch's may be several fields of the kernel's, whatever their names.
fn compare(launch: &[Field], kernel: &[Field], what: &str) {
    let one_by_one = |fields: &[Field]| -> Vec<(String, Option<String>)> {
        let one = |f: &Field| vec![(f.kind.clone(), (f.count == 1).then(|| f.name.clone())); f.count];
        fields.iter().flat_map(one).collect()
    };
    let (launch, kernel) = (one_by_one(launch), one_by_one(kernel));
    let agree = launch.len() == kernel.len()
        && launch.iter().zip(&kernel).all(|(a, b)| a.0 == b.0 && (a.1.is_none() || b.1.is_none() || a.1 == b.1));
    assert!(agree, "{what} differ:\n{launch:?}\n{kernel:?}");
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found
}

/// The twin's name, its file, and the fields of each `#[repr(C)]` struct.
fn structs_of_launches(text: &str, path: &Path) -> Vec<(String, String, Vec<Field>)> {
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let mut found = Vec::new();
    for at in (0..lines.len()).filter(|&at| lines[at] == "#[repr(C)]") {
        let comment = lines[..at].iter().rev().find(|line| line.starts_with("///"));
        let twin = comment.and_then(|line| line.strip_prefix("/// `")?.trim_end_matches('.').split_once("` of "));
        let Some((name, file)) = twin else {
            panic!("{} line {}: no \"/// `Name` of file.cu.\" above #[repr(C)]", path.display(), at + 1);
        };
        let body = lines[at + 2..].iter().take_while(|line| **line != "}");
        // A field `_end` stands in place of padding, which the kernel's has.
        let fields = body.filter(|line| !line.starts_with("//") && !line.starts_with("_end")).map(|line| {
            let field = line.trim_start_matches("pub ").trim_end_matches(',');
            let (name, kind) = field.split_once(": ").unwrap_or_else(|| panic!("{}: {line}", path.display()));
            match kind.strip_prefix('[').and_then(|array| array.strip_suffix(']')?.split_once("; ")) {
                Some((kind, count)) => Field { name: name.into(), kind: kind.into(), count: count.parse().unwrap() },
                None => Field { name: name.into(), kind: kind.into(), count: 1 },
            }
        });
        found.push((name.into(), file.into(), fields.collect()));
    }
    found
}

/// The fields of a struct: lines `type name, name[2];` up to the closing brace or the first function.
fn struct_of_kernels(text: &str, name: &str) -> Vec<Field> {
    let start = text.find(&format!("struct {name} {{\n")).unwrap_or_else(|| panic!("no struct {name}"));
    let mut fields = Vec::new();
    for line in text[start..].lines().skip(1).map(|line| line.split("//").next().unwrap().trim()) {
        if line == "};" || line.starts_with("DEVICE") {
            return fields;
        }
        let Some(line) = line.strip_suffix(';') else { continue };
        // `const T* a, b`, `int m, n`, `Other<T> c`
        let ends = |c: char| c == '*' || c == ' ' && !line.starts_with("const") && !line.contains('<');
        let split = line.find("> ").or_else(|| line.find(ends)).or_else(|| line.find('*'));
        let (kind, names) = line.split_at(split.unwrap_or_else(|| panic!("struct {name}: cannot read {line:?}")) + 1);
        let kind = match kind.trim() {
            "int" => "i32",
            "float" => "f32",
            "double" => "f64",
            pointer if pointer.ends_with('*') => "DevicePtr",
            other => match other.split_once('<') {
                Some((of_kernels, _)) => of_kernels,
                None => panic!("struct {name}: {other} has no counterpart here"),
            },
        };
        for field in names.split(',').map(str::trim) {
            let (name, count) = match field.strip_suffix(']').and_then(|field| field.split_once('[')) {
                Some((name, count)) => (name, count.parse().unwrap()),
                None => (field, 1),
            };
            fields.push(Field { name: name.into(), kind: kind.into(), count });
        }
    }
    panic!("struct {name} does not end");
}
