//! `megafuse doctor`: what this program and machine can do, what would be used, what is missing and how to get it.

use megafuse::pipeline::{ModelFiles, ModelSource};
use megafuse::runtime::{CudaDevice, CudaOptions, cuda};
use megafuse::{DType, Device, Result, ops};

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
    row("cpu", format!("ready, with {} kernels (MEGAFUSE_CPU names a smaller set)", ops::cpu_level()?));
    let card = Device::cuda(0);
    match &card {
        Ok(Device::Cuda(card)) => cards(card)?,
        Ok(other) => row("cuda", other),
        Err(error) => row("cuda", error),
    }
    match cuda::emulated_library() {
        Ok(_) => row("emu", "ready: the same kernels on this machine's processor, for trying out and for tests; slow"),
        Err(error) => row("emu", error),
    }
    row("auto", format!("takes {}", card.unwrap_or_else(|_| Device::cpu())));

    print_line("models");
    let embedded = check_embedded();
    match &embedded {
        Ok(summary) => row("pocket", format!("inside the program, {summary}")),
        Err(error) => row("pocket", format!("broken: {error}; build the program again from a complete checkout")),
    }
    row("others", "--model DIR, a Stable Diffusion 1.x or 2.x directory as published in the layout of diffusers:");
    row("", "tokenizer/, text_encoder/, unet/, vae/, scheduler/, the weights as safetensors or .bin, f32 or f16");
    embedded.map(drop)
}

fn cards(first: &CudaDevice) -> Result<()> {
    let version = cuda::driver_version().unwrap_or_default();
    let driver = format!("driver for CUDA {}.{}", version / 1000, version % 1000 / 10);
    for ordinal in 0..CudaDevice::count()? {
        let card = match ordinal {
            0 => Ok(first.clone()),
            _ => CudaDevice::open(CudaOptions { ordinal, ..CudaOptions::default() }),
        };
        let name = format!("cuda:{ordinal}");
        match card {
            Ok(card) => {
                let (memory, (major, minor)) = (card.memory()?, card.compute_capability());
                let (free, total) = (bytes_text(memory.free_bytes), bytes_text(memory.total_bytes));
                let card = card.card();
                row(
                    &name,
                    format!("ready: {card}, compute capability {major}.{minor}, {free} of {total} free, {driver}"),
                );
            }
            Err(error) => row(&name, error),
        }
    }
    Ok(())
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
    files.tokenizer("tokenizer")?;
    files.clip("text_encoder", &device, dtype)?;
    files.unet(&device, dtype)?;
    files.vae(&device, dtype)?;
    let native = files.unet_config()?.sample_size.map(|[h, w]| {
        let factor = files.vae_config().map_or(1, |vae| vae.factor());
        format!(", made for {}x{}", w * factor, h * factor)
    });
    Ok(format!("complete{}", native.unwrap_or_default()))
}

/// What kernels of the cpu can use.
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
