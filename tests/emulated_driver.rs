//! The emulated card's driver: what kernels/emu/driver/driver.h promises, by a C++ program beside it that is linked with the
//! library as a host program is with libcuda.so.1. A scenario a process, since a fault or a setting lasts for one.

#[path = "common/skip.rs"]
mod skip;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use skip::skipped;

/// What the driver reads beside itself: a kernel of the test with many registers on the card that is emulated, and few on
/// others, whose machine code that card does not run.
const RESOURCES: &str = "75\ttest_heavy\t10\t0\t0\t0\t0\n75\ttest_twice\t99\t0\t0\t0\t0\n80\ttest_heavy\t255\t16384\t8\t8\t24\n\
                         86\ttest_heavy\t10\t0\t0\t0\t0\n90a\ttest_heavy\t10\t0\t0\t0\t0\n";
const SANITIZERS: &str = "-fsanitize=address,undefined";

/// Scenarios and the variables that they are about, `NAME=value` after MEGAFUSE_EMU_. The others run without any.
const ENVIRONMENTS: [(&str, &[&str]); 21] = [
    ("attributes", &[]),
    ("attributes", &["CAPABILITY=8.0"]),
    ("attributes", &["CAPABILITY=8.6"]),
    ("failure_on_demand", &["FAIL_ALLOC=1"]),
    ("instruction_sets", &[]),
    ("instruction_sets", &["CAPABILITY=8.9"]),
    ("late_by_environment", &["ASYNC=late"]),
    ("launch_attributes", &[]),
    ("launch_attributes", &["CAPABILITY=8.0"]),
    ("launch_limits", &["CAPABILITY=8.6", "SCHEDULE=random"]),
    ("launch_limits", &["CAPABILITY=9.0", "SCHEDULE=reverse"]),
    ("memory_limit", &["MEMORY=4096"]),
    ("mistyped_environment", &["ASYNC=soon"]),
    ("mistyped_environment", &["CAPABILITY=8"]),
    ("mistyped_environment", &["FAIL_ALLOC=first"]),
    ("mistyped_environment", &["MEMORY=-1"]),
    ("mistyped_environment", &["SCHEDULE=inorder"]),
    ("no_card_and_an_old_driver", &["DEVICES=0", "DRIVER_VERSION=12040"]),
    ("no_tensor_maps", &["CAPABILITY=8.9"]),
    ("replay", &["SCHEDULE=run-ahead", "SEED=7"]),
    ("resources", &["CAPABILITY=8.0"]),
];

struct Program {
    folder: tempfile::TempDir,
}

impl Program {
    /// Links the test with the library of that name, in a folder of its own; `None` where no emulated card was built.
    fn build(library: &str, flags: &[&str]) -> Option<Program> {
        let built = Path::new(env!("MEGAFUSE_EMU_DIR"));
        if built.as_os_str().is_empty() {
            skipped(env!("MEGAFUSE_EMU_NOTE"));
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        // Under both of the driver's names: the program looks for the one that the library says it has.
        let copy = folder.path().join("libcuda.so.1");
        fs::copy(built.join(library).join("libcuda.so.1"), &copy).unwrap();
        fs::hard_link(&copy, folder.path().join("libcuda.so")).unwrap();
        fs::write(folder.path().join("resources.tsv"), RESOURCES).unwrap();
        let mut command = compiler();
        command.args(["-std=c++20", "-O0", "-g", "-Wall", "-Werror", "-Ikernels"]).args(flags);
        command.arg("kernels/emu/tests/driver_test.cpp").arg("-o").arg(folder.path().join("driver_test"));
        command.arg(&copy).arg(format!("-Wl,-rpath,{}", folder.path().display())).arg("-lpthread");
        succeeds(&mut command);
        Some(Program { folder })
    }

    /// The one with the library that programs use, built once.
    fn plain() -> Option<&'static Program> {
        static PLAIN: OnceLock<Option<Program>> = OnceLock::new();
        PLAIN.get_or_init(|| Program::build("plain", &[])).as_ref()
    }

    fn command(&self, argument: &str) -> Command {
        let mut command = Command::new(self.folder.path().join("driver_test"));
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("MEGAFUSE_EMU_") {
                command.env_remove(name);
            }
        }
        command.arg(argument);
        command
    }
}

fn compiler() -> Command {
    let cxx = std::env::var("CXX").ok().filter(|cxx| !cxx.trim().is_empty());
    let words: Vec<String> = cxx.as_deref().unwrap_or("c++").split_whitespace().map(String::from).collect();
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).current_dir(env!("CARGO_MANIFEST_DIR"));
    command
}

fn succeeds(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}\n{}", text(&output));
    String::from_utf8(output.stdout).unwrap()
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn it_keeps_its_promises() {
    let Some(program) = Program::plain() else { return };
    let listed = succeeds(&mut program.command("--list"));
    let scenarios: Vec<&str> = listed.lines().filter(|&name| name != "damage_seen_at_exit").collect();
    assert!(scenarios.len() > 30);
    let mut failed = Vec::new();
    let mut run = |name: &str, variables: &[&str]| {
        let mut command = program.command(name);
        command.envs(variables.iter().map(|variable| {
            let (name, value) = variable.split_once('=').unwrap();
            (format!("MEGAFUSE_EMU_{name}"), value)
        }));
        let output = command.output().unwrap();
        if !output.status.success() {
            failed.push(format!("{name} {variables:?}: {}\n{}", output.status, text(&output)));
        }
    };
    for name in scenarios {
        let mut own = ENVIRONMENTS.iter().filter(|(scenario, _)| *scenario == name).peekable();
        if own.peek().is_none() {
            run(name, &[]);
        }
        own.for_each(|(_, variables)| run(name, variables));
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// A program that ends well although it wrote out of bounds, and asked nothing of the driver afterwards, ends badly.
#[test]
fn damage_is_seen_at_exit_at_the_latest() {
    let Some(program) = Program::plain() else { return };
    let output = program.command("damage_seen_at_exit").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("device allocation 1 of 8 bytes"), "{}", text(&output));
}

/// The sanitizer's red zones take the place of the guard zones: the report names the kernel's line.
#[test]
fn the_sanitizer_sees_a_kernel_write_out_of_bounds() {
    let Some(program) = Program::build("sanitize", &[SANITIZERS]) else { return };
    let output = program.command("write_past_the_end").output().unwrap();
    let text = text(&output);
    assert!(!output.status.success() && text.contains("heap-buffer-overflow"), "{text}");
    assert!(text.contains("test_write_at") && text.contains("driver_test.cpp"), "{text}");
}

/// Every `sys::cu...` of src/ is in the library: a symbol that is missing panics in cudarc at its first call.
#[test]
fn no_function_that_the_product_calls_is_missing() {
    let built = Path::new(env!("MEGAFUSE_EMU_DIR"));
    if built.as_os_str().is_empty() {
        return skipped(env!("MEGAFUSE_EMU_NOTE"));
    }
    let library = fs::read(built.join("plain/libcuda.so.1")).unwrap();
    let names: BTreeSet<&[u8]> = library.split(|&byte| byte == 0).collect();
    let called = called_in(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src")));
    assert!(called.contains("cuLaunchKernelEx"), "{called:?}");
    let missing: Vec<&String> = called.iter().filter(|name| !names.contains(name.as_bytes())).collect();
    assert!(missing.is_empty(), "kernels/emu/driver/*.cpp lack {missing:?}");
}

fn called_in(folder: &Path) -> BTreeSet<String> {
    let mut called = BTreeSet::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            called.append(&mut called_in(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            called.extend(text.split("sys::cu").skip(1).filter(|rest| rest.starts_with(char::is_uppercase)).map(
                |rest| {
                    let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
                    format!("cu{}", &rest[..end])
                },
            ));
        }
    }
    called
}

/// With a toolkit at hand, the compiler compares every exported function with the driver's own header.
#[test]
fn its_functions_are_declared_as_the_real_ones() {
    let Some(include) = toolkit_include() else {
        return skipped("no cuda.h of CUDA 13.0; CUDA_HOME names a toolkit, tools/nvcc installs one");
    };
    // All in one unit: the header is long.
    let mut unit = String::new();
    for entry in fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/emu/driver")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "cpp") {
            unit += &format!("#include \"{}\"\n", path.display());
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("driver.cpp");
    fs::write(&source, unit).unwrap();
    let mut command = compiler();
    command.args(["-std=c++20", "-fsyntax-only", "-DEMU_CUDA_H", "-Ikernels"]).arg("-I").arg(include).arg(source);
    succeeds(&mut command);
}

/// The folder of a cuda.h: `CUDA_HOME`, the usual place, or what tools/nvcc installed.
fn toolkit_include() -> Option<PathBuf> {
    let mut folders: Vec<PathBuf> = std::env::var_os("CUDA_HOME").map(PathBuf::from).into_iter().collect();
    folders.push("/usr/local/cuda".into());
    if let Some(home) = std::env::var_os("HOME") {
        let pythons = fs::read_dir(Path::new(&home).join(".cache/megafuse/nvcc-13.0/lib"));
        folders.extend(pythons.into_iter().flatten().flatten().map(|p| p.path().join("site-packages/nvidia/cu13")));
    }
    // Types of other versions differ.
    let version = |include: &Path| {
        fs::read_to_string(include.join("cuda.h")).ok()?.contains("#define CUDA_VERSION 13000").then_some(())
    };
    folders.into_iter().map(|folder| folder.join("include")).find(|include| version(include).is_some())
}
