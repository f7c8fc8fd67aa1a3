//! Tells the crate two things: whether models/pocket is there to be embedded (a source package may come without it), and
//! whether this is a build for tests, which fills fresh memory with NaN.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-check-cfg=cfg(embedded_model)");
    println!("cargo::rerun-if-changed=models/pocket");
    if std::path::Path::new("models/pocket/unet/diffusion_pytorch_model.safetensors").is_file() {
        println!("cargo::rustc-cfg=embedded_model");
    }
    println!("cargo::rustc-check-cfg=cfg(poison)");
    if std::env::var("PROFILE").as_deref() != Ok("release") {
        println!("cargo::rustc-cfg=poison");
    }
}
