//! The product against diffusers, transformers, torch and PIL: the files of tests/data that tools/oracle/generate.py
//! writes from fourteen small random Stable Diffusion models, six of them SDXL. Modules and whole runs go through the command line, as a
//! user's do; randn, tokenizers and resizing through the library.

mod control;
mod deepfloyd;
#[path = "../common/drawn.rs"]
mod drawn;
mod files;
mod modules;
mod pictures_in;
mod random;
mod resadapter;
mod resizing;
mod runs;
mod sd3;
#[path = "../common/skip.rs"]
mod skip;
mod tokens;
