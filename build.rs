//! Builds what is not Rust, and tells the crate what there is.
//!
//! * kernels/*.cu, and those of one instruction set in kernels/sm90 (build/sources.rs), with nvcc: one compressed fat binary
//!   a file, listed in OUT_DIR/kernels.rs (build/card.rs). Without nvcc the crate builds all the same, with placeholders,
//!   and `megafuse doctor` says what to do.
//! * the same files with the host's C++ compiler: the emulated card, OUT_DIR/emu/*/libcuda.so.1 (build/emulated.rs).
//! * whether models/pocket is there to be embedded; a source package may come without it.
//! * whether this is a build for tests, which fills fresh memory with NaN.
//!
//! Every file is compiled by itself, several at a time, and only when it or something it includes has changed
//! (build/jobs.rs). The crate's environment: MEGAFUSE_EMU_DIR, MEGAFUSE_EMU_NOTE, MEGAFUSE_NVCC, MEGAFUSE_CUDA_ARCHS.

#[path = "build/archs.rs"]
mod archs;
#[path = "build/card.rs"]
mod card;
#[path = "build/depfile.rs"]
mod depfile;
#[path = "build/emulated.rs"]
mod emulated;
#[path = "build/jobs.rs"]
mod jobs;
#[path = "build/ptx.rs"]
mod ptx;
#[path = "build/resources.rs"]
mod resources;
#[path = "build/sources.rs"]
mod sources;
#[path = "build/toolchain.rs"]
mod toolchain;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    embedded_model();
    let for_tests = variable("PROFILE").as_deref() != Some("release");
    println!("cargo::rustc-check-cfg=cfg(poison)");
    if for_tests {
        println!("cargo::rustc-cfg=poison");
    }
    match kernels(for_tests) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn embedded_model() {
    println!("cargo::rustc-check-cfg=cfg(embedded_model)");
    println!("cargo::rerun-if-changed=models/pocket");
    if Path::new("models/pocket/unet/diffusion_pytorch_model.safetensors").is_file() {
        println!("cargo::rustc-cfg=embedded_model");
    }
}

/// The card's and the emulated card's kernels, compiled side by side.
fn kernels(for_tests: bool) -> Result<(), String> {
    println!("cargo::rerun-if-changed=kernels");
    let out = PathBuf::from(variable("OUT_DIR").ok_or("OUT_DIR is not set: cargo runs this program")?);
    let sources = sources::find("kernels")?;

    let card = card::plan(&out, &sources)?;
    let emulated = emulated::plan(&out, &sources, for_tests)?;
    // nvcc takes longest, so it starts first.
    let results = jobs::run(card.jobs().iter().chain(emulated.jobs()))?;
    let (card_results, emulated_results) = results.split_at(card.jobs().len());

    // Both speak up, so that one build shows all mistakes.
    let resources = card.finish(&out, card_results);
    let emulated = emulated.finish(&out, emulated_results, resources.as_deref().unwrap_or_default());
    match (resources, emulated) {
        (Err(card), Err(emulated)) => Err(format!("{card}\n\n{emulated}")),
        (card, emulated) => card.and(emulated),
    }
}

/// An environment variable that is set and not empty.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// As `variable`, for those whose change must run this program again.
fn watched(name: &str) -> Option<String> {
    println!("cargo::rerun-if-env-changed={name}");
    variable(name)
}
