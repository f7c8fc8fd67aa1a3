//! Machines on which there is no card to be had: each says what is missing and what to do. The drivers are small C
//! libraries that answer as such a machine's would.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A driver's library with these answers, in `folder`.
fn driver(folder: &Path, version: i32, init: i32, count: i32) -> PathBuf {
    driver_with(folder, version, init, count, "")
}

/// The same, and whatever else it is asked for.
fn driver_with(folder: &Path, version: i32, init: i32, count: i32, more: &str) -> PathBuf {
    let source = folder.join("driver.c");
    let code = format!(
        "int cuDriverGetVersion(int *version) {{ *version = {version}; return 0; }}\n\
         int cuInit(unsigned flags) {{ return {init}; }}\n\
         int cuDeviceGetCount(int *count) {{ *count = {count}; return 0; }}\n\
         int cuGetErrorName(int error, const char **name) {{ *name = \"CUDA_ERROR_SYSTEM_NOT_READY\"; return 0; }}\n\
         int cuGetErrorString(int error, const char **text) {{ *text = \"system not yet initialized\"; return 0; }}\n\
         {more}\n"
    );
    std::fs::write(&source, code).unwrap();
    let library = folder.join("libcuda.so.1");
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-Wl,-soname,libcuda.so", "-o"]).arg(&library).arg(&source);
    let status = compiler.status().expect("cc, which Rust links with, starts");
    assert!(status.success(), "{compiler:?}");
    library
}

fn generate(device: &str, library: Option<&Path>) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_megafuse"));
    command.args([
        "generate",
        "a red ball",
        "--steps",
        "1",
        "--method",
        "plain",
        "--size",
        "32x32",
        "--device",
        device,
    ]);
    command.current_dir(&folder);
    match library {
        Some(library) => command.env("MEGAFUSE_EMU_LIBRARY", library),
        None => command.env_remove("MEGAFUSE_EMU_LIBRARY"),
    };
    let output = command.output().unwrap();
    let left = std::fs::read_dir(&folder).unwrap().count();
    assert_eq!(left, usize::from(output.status.success()), "nothing but a picture is left behind");
    output
}

fn refused(device: &str, library: Option<&Path>, parts: &[&str]) {
    let output = generate(device, library);
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(!text.contains("panicked"), "{text}");
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
}

/// What is needed goes by the toolkit that compiled the kernels: those of any 12.x run on a driver for 12.8.
#[test]
fn too_old_a_driver() {
    let newer_toolkit = env!("MEGAFUSE_NVCC").starts_with("13.");
    let (needed, branch, version) = if newer_toolkit { ("13.0", "580", 13_000) } else { ("12.8", "570", 12_080) };
    let parts = ["too old", "CUDA 12.4", &format!("{needed} is needed"), branch, "--device cpu"];
    let folder = tempfile::tempdir().unwrap();
    refused("emu", Some(&driver(folder.path(), 12_040, 0, 1)), &parts);
    // The next thing that such a machine lacks is a card.
    let folder = tempfile::tempdir().unwrap();
    refused("emu", Some(&driver(folder.path(), version, 0, 0)), &["finds no card"]);
    let folder = tempfile::tempdir().unwrap();
    refused("emu", Some(&driver(folder.path(), version - 10, 0, 0)), &["too old"]);
}

#[test]
fn a_driver_without_a_card() {
    for (init, count) in [(100, 0), (0, 0)] {
        let folder = tempfile::tempdir().unwrap();
        let library = driver(folder.path(), 13_000, init, count);
        refused("emu", Some(&library), &["finds no card", "CUDA_VISIBLE_DEVICES", "--device cpu"]);
    }
}

#[test]
fn a_driver_that_does_not_start() {
    let folder = tempfile::tempdir().unwrap();
    let library = driver(folder.path(), 13_000, 802, 1);
    refused("emu", Some(&library), &["cuInit", "CUDA_ERROR_SYSTEM_NOT_READY", "system not yet initialized"]);
}

/// A card whose driver takes no kernel: a program built without nvcc says that it has none, any other what the driver said.
#[test]
fn a_driver_that_loads_no_kernels() {
    let capability = "if (attribute == 75) *value = 9; else *value = 100000;";
    let more = format!(
        "typedef void *handle;\n\
         int cuDeviceGet(int *device, int ordinal) {{ *device = 0; return 0; }}\n\
         int cuDevicePrimaryCtxRetain(handle *context, int device) {{ *context = context; return 0; }}\n\
         int cuDevicePrimaryCtxRelease_v2(int device) {{ return 0; }}\n\
         int cuCtxSetCurrent(handle context) {{ return 0; }}\n\
         int cuStreamCreate(handle *stream, unsigned flags) {{ *stream = stream; return 0; }}\n\
         int cuStreamSynchronize(handle stream) {{ return 0; }}\n\
         int cuStreamDestroy_v2(handle stream) {{ return 0; }}\n\
         int cuDeviceGetName(char *name, int length, int device) {{ name[0] = 'x'; name[1] = 0; return 0; }}\n\
         int cuDeviceGetAttribute(int *value, int attribute, int device) {{ {capability} return 0; }}\n\
         int cuModuleLoadData(handle *module, const void *image) {{ return 200; }}\n"
    );
    let folder = tempfile::tempdir().unwrap();
    let library = driver_with(folder.path(), 13_000, 0, 1, &more);
    match megafuse::runtime::cuda::KERNELS_BUILT {
        true => {
            let parts = ["kernels/", ".cu: cuModuleLoadData: CUDA_ERROR_INVALID_IMAGE", "MEGAFUSE_CUDA_ARCHS"];
            refused("emu", Some(&library), &parts);
        }
        false => refused("emu", Some(&library), &["holds no kernels", "tools/nvcc", "--device cpu"]),
    }
}

#[test]
fn a_library_that_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let library = folder.path().join("libcuda.so.1");
    refused("emu", Some(&library), &["libcuda.so.1", "cannot be loaded"]);
    std::fs::write(&library, "no library").unwrap();
    refused("emu", Some(&library), &["libcuda.so.1", "cannot be loaded"]);
}

/// On a machine with a card this makes a picture on it.
#[test]
fn no_driver_at_all() {
    let there = megafuse::runtime::cuda::driver_version().is_some();
    match there {
        true => assert!(generate("cuda", None).status.success()),
        false => refused("cuda", None, &["no NVIDIA driver", "libcuda.so.1", "install", "--device cpu"]),
    }
    assert!(generate("auto", None).status.success(), "auto takes what is there");
}

#[test]
fn a_card_that_is_not_there() {
    refused("cuda:4096", None, &["cuda:4096"]);
}
