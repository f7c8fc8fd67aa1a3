//! Data goes one way through the crate: a module imports only what stands below it in this table (docs/architecture.md).

use std::fs;
use std::path::{Path, PathBuf};

/// Module, and the modules of ours that it may import.
const LAYERS: [(&str, &[&str]); 16] = [
    ("main", &["cli"]),
    ("cli", &["pipeline", "hub", "image", "models", "ops", "runtime", "json"]),
    ("pipeline", &["methods", "schedulers", "models", "ops", "text", "image", "rng", "runtime", "json", "hub"]),
    ("methods", &["schedulers", "models", "ops", "rng", "runtime"]),
    ("schedulers", &["ops", "runtime", "json"]),
    ("models", &["ops", "runtime", "json", "pickle"]),
    ("ops", &["runtime"]),
    ("runtime", &[]),
    ("hub", &["image"]),
    ("rng", &[]),
    ("text", &["json", "pickle"]),
    ("image", &[]),
    ("names", &[]),
    ("json", &[]),
    ("pickle", &[]),
    ("error", &[]),
];

/// May be named everywhere, under `crate::` or `crate::runtime::`.
const EVERYWHERE: [&str; 5] = ["Tensor", "DType", "Device", "Error", "Result"];

#[test]
fn imports_follow_the_layer_table() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut wrong = Vec::new();
    for file in rust_files(&src) {
        let inside = file.strip_prefix(&src).expect("found below src");
        let module = module_of(inside);
        if module == "lib" {
            continue; // declares the modules
        }
        let Some((_, allowed)) = LAYERS.iter().find(|(name, _)| *name == module) else {
            wrong.push(format!("{}: module {module} is not in the layer table", inside.display()));
            continue;
        };
        for path in crate_paths(&fs::read_to_string(&file).expect("a source file is UTF-8"), inside) {
            if !may_import(&module, allowed, &path) {
                wrong.push(format!("{}: {module} may not import crate::{}", inside.display(), path.join("::")));
            }
        }
    }
    assert!(wrong.is_empty(), "imports outside the layer table:\n{}", wrong.join("\n"));
}

fn may_import(module: &str, allowed: &[&str], path: &[String]) -> bool {
    let first = path[0].as_str();
    let named_everywhere = match first {
        "error" | "names" => true,
        "runtime" => path.get(1).is_some_and(|item| EVERYWHERE.contains(&item.as_str())),
        _ => EVERYWHERE.contains(&first),
    };
    named_everywhere || first == module || allowed.contains(&first)
}

/// `unet` of `models/unet.rs` belongs to `models`; a file directly in src is its own module.
fn module_of(inside: &Path) -> String {
    let first = inside.components().next().expect("not empty");
    Path::new(first.as_os_str()).with_extension("").display().to_string()
}

fn rust_files(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).expect("src is readable") {
        let path = entry.expect("src is readable").path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// Every path below the crate's root that a file names: `crate::a::{b, c::d}` gives `a::b` and `a::c::d`. The binary says
/// `megafuse::` for `crate::`; `super::` counts where it leaves the file's own layer.
fn crate_paths(text: &str, inside: &Path) -> Vec<Vec<String>> {
    let code = without_comments_and_strings(text);
    let depth = inside.components().count() - usize::from(inside.ends_with("mod.rs"));
    let root_by_super = format!("\nuse {}", "super::".repeat(depth));
    let mut paths = Vec::new();
    for (start, root) in ["crate::", "megafuse::", &root_by_super]
        .iter()
        .flat_map(|root| code.match_indices(*root).map(|(start, found)| (start, found.len())).collect::<Vec<_>>())
    {
        let joined = code[..start].ends_with(|c: char| c.is_alphanumeric() || c == '_');
        if !joined {
            use_tree(&mut code[start + root..].chars().peekable(), &[], &mut paths);
        }
    }
    paths
}

/// Expands `a::{b, c::d}` after the root; stops at the first character that cannot continue a path.
fn use_tree(text: &mut std::iter::Peekable<std::str::Chars>, prefix: &[String], paths: &mut Vec<Vec<String>>) {
    let mut path = prefix.to_vec();
    loop {
        while text.next_if(|c| c.is_whitespace()).is_some() {}
        if text.next_if_eq(&'{').is_some() {
            loop {
                use_tree(text, &path, paths);
                while text.next_if(|c| c.is_whitespace()).is_some() {}
                if text.next_if_eq(&',').is_none() {
                    text.next_if_eq(&'}');
                    return;
                }
                while text.next_if(|c| c.is_whitespace()).is_some() {}
                if text.next_if_eq(&'}').is_some() {
                    return;
                }
            }
        }
        let mut name = String::new();
        while let Some(c) = text.next_if(|c| c.is_alphanumeric() || *c == '_' || *c == '*') {
            name.push(c);
        }
        if !name.is_empty() {
            path.push(name);
        }
        if text.next_if_eq(&':').is_none() || text.next_if_eq(&':').is_none() {
            break;
        }
    }
    // `use a::b as c` inside braces: skip the new name.
    while text.peek().is_some_and(|c| c.is_whitespace()) {
        text.next();
    }
    let rest: String = text.clone().take(3).collect();
    if rest == "as " {
        text.nth(2);
        while text.next_if(|c| c.is_alphanumeric() || *c == '_').is_some() {}
    }
    if path.len() > prefix.len() && !path.is_empty() {
        paths.push(path);
    }
}

fn without_comments_and_strings(text: &str) -> String {
    let mut code = String::from("\n");
    for line in text.lines() {
        let mut in_string = false;
        let mut previous = '\0';
        let mut characters = line.chars().peekable();
        while let Some(c) = characters.next() {
            match c {
                '"' if previous != '\\' && previous != '\'' => in_string = !in_string,
                '/' if !in_string && characters.peek() == Some(&'/') => break,
                _ if in_string => {}
                _ => code.push(c),
            }
            previous = c;
        }
        code.push('\n');
    }
    code
}

#[test]
fn the_reader_of_imports_sees_what_is_written() {
    let text = r#"
use crate::runtime::{DType, Tensor as T, meta::Report};
use super::super::pipeline::Request;
use super::sibling::Thing;
//! use crate::commented::Out;
fn f() { let s = "crate::in_a::string"; crate::ops::linear::linear(x); mycrate::x(); }
use crate::{Error, methods};
"#;
    let paths: Vec<String> =
        crate_paths(text, Path::new("models/unet.rs")).iter().map(|path| path.join("::")).collect();
    let want = [
        "runtime::DType",
        "runtime::Tensor",
        "runtime::meta::Report",
        "ops::linear::linear",
        "Error",
        "methods",
        "pipeline::Request",
    ];
    assert_eq!(paths, want);
    assert_eq!(crate_paths("use super::ops::add;", Path::new("models/mod.rs")), [["ops", "add"]]);

    let path = |text: &str| text.split("::").map(String::from).collect::<Vec<_>>();
    assert!(may_import("models", &["ops"], &path("ops::add")));
    assert!(may_import("text", &[], &path("runtime::Tensor")));
    assert!(!may_import("text", &[], &path("runtime::MetaDevice")));
    assert!(!may_import("ops", &["runtime"], &path("models::Unet")));
}

/// The flags are the command line's: what is below it says what would help, in words that any of its users understands.
/// Errors about a request ([`megafuse::Error::Request`]) name its fields, which the command line turns into flags.
#[test]
fn only_the_command_line_speaks_of_flags() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    // The hub's errors name the flags of its own program, hf, beside those that stand for settings of ours.
    let exempt = ["cli", "main.rs", "pipeline/hub.rs"].map(|place| src.join(place));
    let mut found = Vec::new();
    for file in rust_files(&src).into_iter().filter(|file| !exempt.iter().any(|place| file.starts_with(place))) {
        for (number, line) in fs::read_to_string(&file).expect("UTF-8").lines().enumerate() {
            let flag = line.match_indices("--").any(|(at, _)| {
                let starts = line[..at].ends_with([' ', '"', '(', '`']);
                starts && line[at + 2..].starts_with(|c: char| c.is_ascii_lowercase())
            });
            if flag {
                found.push(format!("{}:{}: {}", file.display(), number + 1, line.trim()));
            }
        }
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}
