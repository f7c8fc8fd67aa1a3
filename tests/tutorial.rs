//! kernels/tutorial/*.cu, the steps of docs/kernels.md from a plain product to Hopper's: each goes the way of
//! `megafuse bench kernels --kernel` (compiled for the emulated card, compared with the cpu, raced), compiles for its card
//! without spills, and has the arithmetic that the page gives it.

#[path = "common/place.rs"]
mod place;
#[path = "common/skip.rs"]
mod skip;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use place::{Place, text};
use rayon::prelude::*;

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/tutorial");
const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/kernels.md");

/// Name and text of every step, in their order.
fn steps() -> Vec<(String, String)> {
    let folder = fs::read_dir(FOLDER).expect("kernels/tutorial");
    let mut names: Vec<String> =
        folder.map(|entry| entry.expect("readable").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
        .into_iter()
        .map(|name| {
            let text = fs::read_to_string(Path::new(FOLDER).join(&name)).expect("a step");
            (name, text)
        })
        .collect()
}

fn bench(place: &Place, name: &str, text: &str) -> Output {
    fs::write(place.path(name), text).expect("a writable folder");
    let mut command = place.command(&["bench", "kernels", "--device", "emu", "--kernel", name]);
    // The program's own builds of the emulated card, whichever the other tests run on.
    command.env_remove("MEGAFUSE_EMU_LIBRARY").output().expect("the program starts")
}

#[test]
fn every_step_is_right_and_without_races() {
    let steps = steps();
    assert_eq!(steps.len(), 8, "docs/kernels.md counts them");
    steps.par_iter().for_each(|(name, source)| {
        let output = bench(&Place::new(), name, source);
        let (table, message) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{name}: {table}{message}");
        for build in ["plain", "race"] {
            let start = table.find(&format!("({build}), compared with the cpu"));
            let own = table[start.unwrap_or_else(|| panic!("{name}: no {build} build: {table}"))..].lines().skip(1);
            let right = own.take_while(|line| line.ends_with("  ok")).count();
            assert_eq!(right, 8, "{name}, {build}: {table}");
        }
    });
}

/// What each of the last two rests on, taken away.
#[test]
fn a_mistake_in_a_step_is_seen() {
    let steps = steps();
    let broken = [
        // The result is read by TMA before what ordinary stores wrote is there for it.
        ("08_warp_specialised.cu", "fence_proxy_async();", "", "asynchronous access without fence.proxy.async"),
        // Rows beyond the last one.
        ("07_tma_wgmma.cu", "GUARD(row < m) && ", "", "which is in no allocation"),
    ];
    broken.par_iter().for_each(|(name, line, instead, words)| {
        let (_, source) = steps.iter().find(|(step, _)| step == name).expect("a step");
        assert!(source.contains(line), "{name} has no {line}");
        let output = bench(&Place::new(), name, &source.replace(line, instead));
        let message = text(&output.stderr);
        assert!(!output.status.success() && message.contains(words), "{name} without {line}: {message}");
    });
}

/// All in one file, each in a namespace of its own: nvcc takes longer to read its headers than to compile a step.
#[test]
fn every_step_compiles_for_its_card_without_spills() {
    if env!("MEGAFUSE_NVCC").is_empty() {
        assert!(std::env::var_os("CI").is_none(), "CI must have nvcc; see the build's warnings");
        return skip::skipped("built without nvcc; run tools/nvcc");
    }
    let nvcc = fs::read_to_string(Path::new(env!("OUT_DIR")).join("nvcc")).expect("the build says which nvcc");
    let steps = steps();
    let (portable, hopper): (Vec<_>, Vec<_>) = steps.iter().partition(|(_, text)| !text.contains("// bench: map"));
    assert_eq!((portable.len(), hopper.len()), (6, 2));
    let folder = tempfile::tempdir().expect("a temporary folder");
    [("sm_80", &portable), ("sm_90a", &hopper)].par_iter().for_each(|(arch, steps)| {
        let mut source = String::from("#include \"common/vector.cuh\"\n");
        if *arch == "sm_90a" {
            source += "#include \"sm90/ring.cuh\"\n#include \"sm90/strip.cuh\"\n";
        }
        for (at, (name, _)) in steps.iter().enumerate() {
            source += &format!("namespace step_{at} {{\n#include \"tutorial/{name}\"\n#undef ENTRY\n}}\n");
        }
        let path: PathBuf = folder.path().join(format!("{arch}.cu"));
        fs::write(&path, source).expect("a writable folder");
        let mut command = Command::new(nvcc.trim());
        command.args(["-std=c++20", "-O3", "-cubin", "-Xptxas", "-v", "-I"]);
        command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/kernels")).arg(format!("-arch={arch}"));
        let output = command.arg("-o").arg(path.with_extension("cubin")).arg(&path).output().expect("nvcc starts");
        let said = text(&output.stdout) + &text(&output.stderr);
        assert!(output.status.success(), "{arch}: {said}");
        let spills = said.matches("bytes spill stores").count();
        let none = said.matches("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads").count();
        let kernels = said.matches("Compiling entry function").count();
        let entries: usize = steps.iter().map(|(_, text)| text.matches("\nENTRY(").count()).sum();
        assert_eq!((kernels, none), (entries, spills), "{arch}: {said}");
        // setmaxnreg ignored, wgmma one after the other.
        assert!(!said.contains("C75"), "{arch}: {said}");
    });
}

/// A constant of a step: `constexpr int kM = 128, kN = 256, ...`.
fn constant(source: &str, name: &str) -> f64 {
    let value = source.split(&format!("{name} = ")).nth(1).unwrap_or_else(|| panic!("no {name}"));
    let digits: String = value.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap_or_else(|_| panic!("{name} is no number"))
}

/// The table of the page: flops per byte from global memory, tiles of [2048, 1280], and the bound that follows.
#[test]
fn the_page_has_the_arithmetic_of_each_step() {
    /// From docs/performance.md and src/cli/predict.rs: flops per second of the three units.
    const UNITS: [(&str, f64); 3] = [("FMA", 60e12), ("mma", 647e12), ("wgmma", 790e12)];
    /// 128 bytes per clock of 132 multiprocessors at 1.83 GHz, the clock of the data sheet's peak.
    const SHARED: f64 = 128.0 * 132.0 * 1.83e9;
    const FLOPS: f64 = 2.0 * 2048.0 * 1280.0 * 1280.0;
    let page = fs::read_to_string(PAGE).expect("the page");
    for (name, source) in steps() {
        let row = page.lines().find(|line| line.starts_with("| ") && line.contains(&format!("tutorial/{name})")));
        let row = row.unwrap_or_else(|| panic!("docs/kernels.md has no row for {name}"));
        let cells: Vec<&str> = row.split('|').map(str::trim).filter(|cell| !cell.is_empty()).collect();
        let [_, _, unit, global, shared, tiles, bound] = &cells[..] else { panic!("{row}") };
        let number = |cell: &str| -> f64 {
            let digits: String = cell.chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
            digits.parse().unwrap_or_else(|_| panic!("{name}: {cell:?} is no number"))
        };
        let (m, n) = (constant(&source, "kM"), constant(&source, "kN"));
        // One element per product in bf16 where nothing is kept.
        let per_byte = if name.starts_with("01") { 0.5 } else { m * n / (m + n) };
        assert!((number(global) - per_byte).abs() < 0.06, "{name}: {global} is not {per_byte}");
        let count = (2048.0 / m).ceil() * (1280.0 / n).ceil();
        assert_eq!(number(tiles), count, "{name}: tiles");
        if name.starts_with("01") {
            continue; // no shared memory, no bound of this kind
        }
        let rate = UNITS.iter().find(|(name, _)| name == unit).unwrap_or_else(|| panic!("{name}: {unit}")).1;
        // The multiprocessor with the most tiles takes longest.
        let used = count / (132.0 * (count / 132.0).ceil());
        let bound_us = 1e6 * (FLOPS / rate).max(FLOPS / number(shared) / SHARED) / used;
        assert!((number(bound) / bound_us - 1.0).abs() < 0.02, "{name}: {bound} is not {bound_us:.1} us");
    }
}
