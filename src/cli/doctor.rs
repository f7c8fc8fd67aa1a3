//! `megafuse doctor`: what this program and machine can do, what would be used, what is missing and how to get it.

use std::path::Path;

use megafuse::pipeline::{ModelFiles, ModelSource};
use megafuse::{DType, Device, Result};

use super::memory::{available_bytes, bytes_text, total_bytes};
use super::output::print_line;

pub fn run() -> Result<()> {
    print_line("build");
    row("version", env!("CARGO_PKG_VERSION"));
    row("profile", if cfg!(poison) { "for tests (slower); build with --release" } else { "release" });
    row("target", format!("{} {}", std::env::consts::ARCH, std::env::consts::OS));
    row("kernels", kernels());
    row("emulated card", env!("MEGAFUSE_EMU_NOTE"));

    print_line("machine");
    row("threads", format!("{} (RAYON_NUM_THREADS changes it)", rayon::current_num_threads()));
    row("cpu features", cpu_features());
    let memory = |bytes: Option<u64>| bytes.map_or("unknown".into(), bytes_text);
    row("memory", format!("{}, {} available", memory(total_bytes()), memory(available_bytes())));

    print_line("devices");
    row("cpu", "ready");
    let driver = Path::new("/proc/driver/nvidia/version").exists();
    let found = if driver { "an NVIDIA driver is installed, but " } else { "no NVIDIA driver found, and " };
    row("cuda", format!("{found}this version has no CUDA kernels yet"));
    row("emu", "this version has no emulated card yet");
    row("auto", format!("takes {}", Device::cpu()));

    print_line("models");
    let embedded = check_embedded();
    match &embedded {
        Ok(summary) => row("pocket", format!("inside the program, {summary}")),
        Err(error) => row("pocket", format!("broken: {error}; build the program again from a complete checkout")),
    }
    row("others", "--model DIR, a Stable Diffusion 1.x or 2.x directory as published in the layout of diffusers:");
    row("", "tokenizer/, text_encoder/, unet/, vae/, scheduler/, the weights as safetensors, f32 or f16");
    embedded.map(drop)
}

/// What the card's kernels were compiled for.
fn kernels() -> String {
    match env!("MEGAFUSE_NVCC") {
        "" => "none: built without nvcc; run tools/nvcc and build again".into(),
        nvcc => format!("for {} (nvcc {nvcc})", env!("MEGAFUSE_CUDA_ARCHS")),
    }
}

fn row(name: &str, value: impl std::fmt::Display) {
    print_line(format!("  {name:14}{value}"));
}

/// Reads every weight of the model inside the program, as a run would.
fn check_embedded() -> Result<String> {
    let files = ModelFiles::open(&ModelSource::Embedded)?;
    let (device, dtype) = (Device::cpu(), DType::F32);
    files.tokenizer()?;
    files.text_encoder(&device, dtype)?;
    files.unet(&device, dtype)?;
    files.vae(&device, dtype)?;
    let native = files.unet_config()?.sample_size.map(|[h, w]| {
        let factor = files.vae_config().map_or(1, |vae| vae.factor());
        format!(", made for {}x{}", w * factor, h * factor)
    });
    Ok(format!("complete{}", native.unwrap_or_default()))
}

/// What the gemm crate and the compiler's code can use.
fn cpu_features() -> String {
    #[cfg(target_arch = "x86_64")]
    let found: Vec<&str> = [
        ("avx2", std::arch::is_x86_feature_detected!("avx2")),
        ("fma", std::arch::is_x86_feature_detected!("fma")),
        ("f16c", std::arch::is_x86_feature_detected!("f16c")),
        ("avx512f", std::arch::is_x86_feature_detected!("avx512f")),
        ("avx512bw", std::arch::is_x86_feature_detected!("avx512bw")),
        ("avx512bf16", std::arch::is_x86_feature_detected!("avx512bf16")),
        ("avx512fp16", std::arch::is_x86_feature_detected!("avx512fp16")),
    ]
    .into_iter()
    .filter_map(|(name, there)| there.then_some(name))
    .collect();
    #[cfg(target_arch = "aarch64")]
    let found = vec!["neon"];
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let found: Vec<&str> = vec![];
    if found.is_empty() { "none beyond the baseline".into() } else { found.join(" ") }
}
