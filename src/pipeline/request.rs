use crate::methods::{Method, RelayClamp, Size, Stage};
use crate::ops::Upsampler;
use crate::schedulers::Sampler;

/// Which generator draws the noise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum RngKind {
    #[default]
    TorchCpu,
}

/// Everything that decides a picture, beside the model. `None` and an empty list mean: chosen from the model and the
/// method.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    pub prompt: String,
    /// What guidance steers away from; the empty prompt by default.
    pub negative_prompt: String,
    pub method: Method,
    /// Size of the final picture. Default: the last of `stages`; without those the model's native size (plain) or twice
    /// its sides (MegaFusion).
    pub size: Option<Size>,
    /// Sizes and steps, smallest first; empty: planned from `size` (see [`methods::default_stages`](crate::methods)).
    pub stages: Vec<Stage>,
    pub upsampler: Upsampler,
    pub relay_clamp: RelayClamp,
    /// Noise re-scheduling in stages 2 and later. Default: true for `megafusion++`.
    pub reschedule: Option<bool>,
    /// Dilation of the UNet's middle block in stages 2 and later. Default: 2 for `megafusion++`, else 1.
    pub dilation: Option<usize>,
    /// How many steps less noisy a relay's noise is than the step that follows it.
    pub relay_noise_offset: usize,
    /// Do as the published code of MegaFusion does where it differs from the paper.
    pub reference_compat: bool,
    /// Default: the sampler of the model's own scheduler class.
    pub scheduler: Option<Sampler>,
    /// DDIM's share of fresh noise per step, 0 to 1.
    pub eta: f64,
    /// Steps over all stages. Default: the sum of `stages`, else 50.
    pub steps: Option<usize>,
    /// Classifier-free guidance scale; up to 1: no guidance.
    pub guidance: f32,
    /// Picture i of `count` uses seed + i.
    pub seed: u64,
    pub count: usize,
    pub rng: RngKind,
}

impl Default for Request {
    fn default() -> Request {
        Request {
            prompt: String::new(),
            negative_prompt: String::new(),
            method: Method::default(),
            size: None,
            stages: Vec::new(),
            upsampler: Upsampler::default(),
            relay_clamp: RelayClamp::default(),
            reschedule: None,
            dilation: None,
            relay_noise_offset: 0,
            reference_compat: false,
            scheduler: None,
            eta: 0.0,
            steps: None,
            guidance: 7.0,
            seed: 0,
            count: 1,
            rng: RngKind::default(),
        }
    }
}
