//! Every op against textbook loops in f64, on every device this run has: the cpu, and the card or its emulation.

#[path = "../common/mod.rs"]
mod common;

mod attention;
mod attention_map;
mod batch;
mod conformance;
mod conformance_tma;
mod conformance_wgmma;
mod conv;
mod disperse;
mod elementwise;
mod freeu;
mod latents;
mod linear;
mod linear_fp8;
mod low_band;
mod norm;
mod patches;
mod peaks;
mod profile;
mod repaint;
mod resize;
mod rms_norm;
mod sampler;
mod spectral_filter;
mod step;
mod stripes;
mod unpatchify;
mod upsample_guidance;
