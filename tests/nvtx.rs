//! Ranges for NVIDIA's profilers: a library that stands in for one is attached by NVTX's own protocol.

#[path = "common/place.rs"]
mod place;
#[path = "common/skip.rs"]
mod skip;

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use place::{MODEL, Place, text};

/// The stand-in, compiled; `None` without a C++ compiler.
fn profiler(place: &Place) -> Option<PathBuf> {
    let compiler = std::env::var("CXX").ok().filter(|compiler| !compiler.trim().is_empty());
    let words: Vec<String> = compiler.as_deref().unwrap_or("c++").split_whitespace().map(String::from).collect();
    let library = place.path("libinjection.so");
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).args(["-std=c++17", "-shared", "-fPIC", "-Wall", "-Werror", "-o"]).arg(&library);
    let output = command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/nvtx/injection.cpp")).output();
    let Ok(output) = output else {
        assert!(std::env::var_os("CI").is_none(), "CI must have a C++ compiler");
        skip::skipped("no C++ compiler; CXX names one");
        return None;
    };
    assert!(output.status.success(), "{}", text(&output.stderr));
    Some(library)
}

const RUN: [&str; 8] = ["generate", "x", "--model", MODEL, "--stages", "16x16:2,24x24:1", "--device", "cpu"];

/// Pictures, phases, steps and ops, each within the one that it belongs to; and the picture is what it is without.
#[test]
fn phases_steps_and_ops_are_ranges_of_a_profiler() {
    let place = Place::new();
    let Some(library) = profiler(&place) else { return };
    let without = place.run(&[&RUN[..], &["--out", "without.png"]].concat());
    assert!(without.status.success(), "{}", text(&without.stderr));
    let run = |out: &str, refuse: bool| {
        let mut command = place.command(&[&RUN[..], &["--out", out]].concat());
        command.env("NVTX_INJECTION64_PATH", &library).env("NVTX_TEST_LOG", place.path("log"));
        if refuse {
            command.env("NVTX_TEST_REFUSE", "1");
        }
        let output = command.output().expect("the program starts");
        assert!(output.status.success(), "{}", text(&output.stderr));
        fs::read_to_string(place.path("log")).expect("the profiler was loaded")
    };
    let log = run("with.png", false);
    assert_eq!(place.bytes("with.png"), place.bytes("without.png"));

    let mut lines = log.lines();
    assert_eq!(lines.next(), Some("attached"), "{log}");
    let mut open: Vec<&str> = Vec::new();
    let mut paths: Vec<String> = Vec::new();
    for line in lines {
        match line.strip_prefix("push ") {
            Some(name) => {
                open.push(name);
                paths.push(open.join(" > "));
            }
            None => {
                assert_eq!(line, "pop");
                assert!(open.pop().is_some(), "a pop too many: {log}");
            }
        }
    }
    assert_eq!(open, [""; 0], "ranges that never end");
    let position = |path: &str| {
        let found = paths.iter().position(|other| other.starts_with(path));
        found.unwrap_or_else(|| panic!("no range {path}: {}", paths.join("\n")))
    };
    // Before the run its plan is made; then the phases in their order.
    let order = [
        "plan > ",
        "1 picture > text > ",
        "1 picture > stage 1, conditioning",
        "1 picture > stage 1 of 2, 16x16 > step 1 of 2 > conv2d [",
        "1 picture > stage 1 of 2, 16x16 > step 2 of 2 > attention [",
        "1 picture > relay to stage 2, decode 16x16 for 24x24 > conv2d [",
        "1 picture > relay to stage 2, upsample > resize [1, 24, 24, 3]",
        "1 picture > relay to stage 2, encode > conv2d [",
        "1 picture > stage 2 of 2, 24x24 > step 1 of 1 > linear [",
        "1 picture > decode > conv2d [",
    ];
    let positions: Vec<usize> = order.iter().map(|path| position(path)).collect();
    assert!(positions.is_sorted(), "{positions:?} of {}", paths.join("\n"));
    assert!(paths.iter().all(|path| !path.contains("step 3")), "{log}");

    assert_eq!(run("refused.png", true), "attached\n", "a profiler that refused is not called");
    // A library that is not there: nobody listens.
    let mut command = place.command(&[&RUN[..], &["--out", "missing.png"]].concat());
    let output = command.env("NVTX_INJECTION64_PATH", place.path("nothing.so")).output().expect("the program starts");
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(place.bytes("missing.png"), place.bytes("without.png"));
}
