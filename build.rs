//! Says whether models/pocket is there to be embedded (a source package may come without it).

fn main() {
    println!("cargo::rustc-check-cfg=cfg(embedded_model)");
    println!("cargo::rerun-if-changed=models/pocket");
    if std::path::Path::new("models/pocket/unet/diffusion_pytorch_model.safetensors").is_file() {
        println!("cargo::rustc-cfg=embedded_model");
    }
}
