//! megafuse: training-free high-resolution image generation on a tensor runtime of its own.
//!
//! Data goes one way: `cli -> pipeline -> methods -> models -> ops -> runtime`. A model offers options per call, a method
//! fills them; no method edits a model.

pub mod error;
pub mod image;
pub mod methods;
pub mod models;
pub mod ops;
pub mod pipeline;
pub mod rng;
pub mod runtime;
pub mod schedulers;
pub mod text;

pub use error::{Error, Result};
pub use runtime::{DType, Device, Tensor};
