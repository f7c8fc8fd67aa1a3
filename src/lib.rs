//! megafuse: training-free high-resolution image generation on a tensor runtime of its own.
//!
//! Data goes one way: `cli -> pipeline -> methods -> models -> ops -> runtime`. A model offers options per call, a method
//! fills them; no method edits a model.
//!
//! A picture from the model that ships inside, in ten lines (leave `size` and `steps` out for the defaults):
//! ```
//! use megafuse::pipeline::{ModelSource, Pipeline, Request, Silent, Size};
//! use megafuse::{DType, Device, image};
//!
//! # fn main() -> megafuse::Result<()> {
//! let pipeline = Pipeline::load(ModelSource::Embedded, Device::cpu(), DType::F32)?;
//! let request = Request {
//!     prompt: "a red ball".into(),
//!     size: Some(Size::new(96, 64)),
//!     steps: Some(5),
//!     ..Request::suited_to(&ModelSource::Embedded)
//! };
//! let picture = pipeline.generate(&request, &mut Silent)?.remove(0);
//! let text = image::PngText { parameters: &picture.parameters.text, json: "" };
//! let png = image::encode_png(&picture.rgb, picture.width, picture.height, text)?;
//! # assert!(png.starts_with(b"\x89PNG"));
//! # Ok(())
//! # }
//! ```

pub mod error;
pub mod hub;
pub mod image;
pub mod json;
pub mod methods;
pub mod models;
mod names;
pub mod ops;
mod pickle;
pub mod pipeline;
pub mod rng;
pub mod runtime;
pub mod schedulers;
pub mod text;

pub use error::{Error, Result};
pub use runtime::{DType, Device, Tensor};
