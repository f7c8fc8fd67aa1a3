//! The emulated card's own tests, kernels/emu/tests: every primitive against a plain computation, and every kind of mistake
//! in a kernel reported by the build that should find it. Compiled here with the flags that build/emulated.rs gives the
//! libraries: plain, with the race detector, and under the sanitizers.

#[path = "common/skip.rs"]
mod skip;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::SystemTime;

const FLAGS: [&str; 7] =
    ["-std=c++20", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-Ikernels", "-Wall", "-Wno-psabi"];

struct Build {
    name: &'static str,
    flags: &'static [&'static str],
    /// Of the files with kernels.
    kernel_flags: &'static [&'static str],
    link_flags: &'static [&'static str],
}

#[test]
fn primitives_and_mistakes() {
    run(&Build { name: "plain", flags: &["-O2"], kernel_flags: &[], link_flags: &[] });
}

#[test]
fn primitives_and_mistakes_with_the_race_detector() {
    run(&Build {
        name: "race",
        flags: &["-O1", "-g", "-DEMU_RACE"],
        kernel_flags: &["-fsanitize=thread"],
        link_flags: &[],
    });
}

#[test]
fn primitives_and_mistakes_under_the_sanitizers() {
    run(&Build {
        name: "sanitize",
        flags: &["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"],
        kernel_flags: &[],
        link_flags: &["-fsanitize=address,undefined"],
    });
}

fn run(build: &Build) {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    if Command::new(&compiler).arg("--version").output().is_err() {
        return skip::skipped(&format!("{compiler} does not start; CXX names a C++ compiler"));
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulator").join(build.name);
    fs::create_dir_all(&folder).expect("the target folder can be written");

    let emulator = sources(&root.join("kernels/emu/machine"));
    // The look-alike driver has tests of its own: emulated_driver.rs.
    let own = |path: &PathBuf| stem(path) != "driver_test";
    let tests: Vec<PathBuf> = sources(&root.join("kernels/emu/tests")).into_iter().filter(own).collect();
    let headers =
        ["kernels/common", "kernels/emu/machine", "kernels/emu/tests"].map(|path| newest_header(&root.join(path)));
    let headers = headers.into_iter().max().expect("three folders");
    let mut objects = vec![];
    let mut changed = false;
    for (source, extra) in emulator.iter().map(|s| (s, &[][..])).chain(tests.iter().map(|s| (s, build.kernel_flags))) {
        // A part of the machine and its tests may have the same name.
        let kind = source.parent().and_then(Path::file_name).expect("in a folder").to_string_lossy();
        let object = folder.join(format!("{kind}-{}.o", stem(source)));
        let current = modified(&object).is_some_and(|time| time > headers && Some(time) > modified(source));
        if !current {
            changed = true;
            let mut command = Command::new(&compiler);
            command.current_dir(root).args(FLAGS).args(build.flags).args(extra).args(["-c", "-o"]);
            succeed(command.arg(&object).arg(source.strip_prefix(root).expect("below the root")));
        }
        objects.push(object);
    }
    let program = folder.join("selftest");
    if changed || !program.exists() {
        let mut command = Command::new(&compiler);
        succeed(command.args(build.link_flags).arg("-o").arg(&program).args(&objects).args(["-lpthread", "-ldl"]));
    }
    // Stacks that a kernel's error leaves behind are no leaks.
    let output = succeed(Command::new(&program).current_dir(root).env("ASAN_OPTIONS", "detect_leaks=0"));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains(" 0 failures"), "no summary in:\n{text}");
}

fn succeed(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = files(folder).filter(|path| path.extension().is_some_and(|e| e == "cpp")).collect();
    found.sort();
    assert!(!found.is_empty(), "no sources in {}", folder.display());
    found
}

fn newest_header(folder: &Path) -> SystemTime {
    let headers = files(folder).filter(|path| path.extension().is_some_and(|e| e == "h" || e == "cuh"));
    headers.filter_map(|path| modified(&path)).max().unwrap_or(SystemTime::UNIX_EPOCH)
}

fn files(folder: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(folder).expect("a folder of the repository").map(|entry| entry.expect("readable").path())
}

fn stem(path: &Path) -> String {
    path.file_stem().expect("a file").to_string_lossy().into_owned()
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).ok()?.modified().ok()
}
