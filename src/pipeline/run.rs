use std::sync::Mutex;

use super::parameters::Parameters;
use super::plan::Planner;
use super::{ModelFiles, ModelSource, Request};
use crate::error::{Error, Result};
use crate::image;
use crate::methods::{self, DiffusionModel, Event, NoiseSource, Observer, Plan, Size, Watch};
use crate::models::{ClipTextModel, Unet, UnetConditioning, UnetConfig, UnetOptions, Vae, VaeConfig};
use crate::ops::{self, StepTable};
use crate::rng::Rng;
use crate::runtime::{DType, Device, Tensor};
use crate::schedulers::SchedulerConfig;
use crate::text::ClipTokenizer;

/// A finished picture.
#[derive(Clone, Debug, PartialEq)]
pub struct Picture {
    pub width: usize,
    pub height: usize,
    /// 8 bits, row-major, 3 bytes a pixel.
    pub rgb: Vec<u8>,
    pub seed: u64,
    pub parameters: Parameters,
}

/// A model ready to make pictures.
pub struct Pipeline {
    name: String,
    device: Device,
    dtype: DType,
    /// `None` on the meta device, where nobody reads the ids.
    tokenizer: Option<ClipTokenizer>,
    /// Ids of a prompt, padding included.
    tokens: usize,
    text_encoder: ClipTextModel,
    unet: Unet,
    vae: Vae,
    scheduler: SchedulerConfig,
    /// On a card: says how much memory a request wants.
    planner: Option<Box<Planner>>,
    /// The request that was planned last, without what costs nothing, and its bytes beside the weights.
    planned: Mutex<Option<(Request, u64)>>,
}

impl Pipeline {
    /// Loads every part of the model and checks that the parts fit together. On the meta device only configurations are
    /// read.
    ///
    /// # Errors
    /// Those of [`ModelFiles`] and of the weight files; [`Error::Config`] when two parts do not fit, naming both and
    /// their widths.
    pub fn load(source: ModelSource, device: Device, dtype: DType) -> Result<Pipeline> {
        let files = ModelFiles::open(&source)?;
        let scheduler = files.scheduler_config()?.for_latents();
        let (text_config, unet_config, vae_config) = (files.text_config()?, files.unet_config()?, files.vae_config()?);
        check_fit(&files.name(), text_config.hidden_size, &unet_config, &vae_config)?;
        let (tokenizer, tokens) = match device {
            Device::Meta(_) => (None, text_config.max_position_embeddings),
            _ => {
                let tokenizer =
                    files.tokenizer()?.fitted(text_config.vocab_size, text_config.max_position_embeddings)?;
                let tokens = tokenizer.max_length();
                (Some(tokenizer), tokens)
            }
        };
        let text_encoder = files.text_encoder(&device, dtype)?;
        let unet = files.unet(&device, dtype)?;
        let vae = files.vae(&device, dtype)?;
        let planner = match device {
            Device::Cuda(_) => Some(Box::new(Planner::new(&source, dtype)?)),
            _ => None,
        };
        let (name, planned) = (files.name(), Mutex::new(None));
        Ok(Pipeline { name, device, dtype, tokenizer, tokens, text_encoder, unet, vae, scheduler, planner, planned })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The size that the model was trained at, if its configuration says so.
    pub fn native_size(&self) -> Option<Size> {
        native_size(self.unet.config(), self.vae.config())
    }

    /// What a request comes to with this model.
    ///
    /// # Errors
    /// [`Error::Request`]: an option and what it would accept; [`Error::Config`] for the model's scheduler.
    pub fn resolve(&self, request: &Request) -> Result<Plan> {
        request.resolve(&self.scheduler, self.native_size(), self.vae.config().factor())
    }

    /// What the first picture of a request says about itself.
    ///
    /// # Errors
    /// As [`Pipeline::resolve`].
    pub fn parameters(&self, request: &Request) -> Result<Parameters> {
        Ok(Parameters::new(request, &self.resolve(request)?, self, request.seed))
    }

    /// One picture after another; a picture depends on the request and its own seed alone. On the meta device: the ops'
    /// record, and no picture.
    ///
    /// # Errors
    /// [`Error::Request`]: an option and what it would accept; [`Error::Interrupted`]; [`Error::NonFinite`], naming the
    /// stage; [`Error::OutOfMemory`].
    pub fn generate(&self, request: &Request, observer: &mut dyn Observer) -> Result<Vec<Picture>> {
        let plan = self.resolve(request)?;
        self.reserve(request)?;
        observer.event(&Event::EncodeText);
        if observer.cancelled() {
            return Err(Error::Interrupted);
        }
        let text = self.encode_prompts(request, plan.guidance.is_some(), observer)?;
        let conditioning = self.unet.condition(&text, &plan.timesteps())?;
        drop(text);
        let model = Conditioned { pipeline: self, conditioning: &conditioning };

        let mut pictures = Vec::new();
        for index in 0..request.count {
            let seed = request.seed.wrapping_add(index as u64);
            observer.event(&Event::PictureBegins { index, count: request.count, seed });
            let mut noise = Noise { rng: Rng::new(request.rng, seed), device: &self.device };
            let picture = methods::generate(&model, &plan, &mut noise, Watch { observer, index })?;
            if !matches!(self.device, Device::Meta(_)) {
                let [_, height, width, _] = picture.dims("generate", "picture")?;
                let rgb = image::to_bytes(&picture.to_f32_vec()?)?;
                let parameters = Parameters::new(request, &plan, self, seed);
                pictures.push(Picture { width, height, rgb, seed, parameters });
            }
            observer.event(&Event::PictureEnds { index });
        }
        Ok(pictures)
    }

    /// On a card, what the planner counts beside the weights, in one piece: nothing is asked of the driver while steps run,
    /// and what does not fit fails before the first of them. Pictures that differ in words and seed are planned once.
    fn reserve(&self, request: &Request) -> Result<()> {
        let (Device::Cuda(card), Some(planner)) = (&self.device, &self.planner) else { return Ok(()) };
        let (prompt, negative_prompt) = (String::new(), String::new());
        let request = Request { prompt, negative_prompt, seed: 0, count: 1, ..request.clone() };
        let mut planned = self.planned.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let bytes = match &*planned {
            Some((last, bytes)) if *last == request => *bytes,
            _ => {
                let plan = planner.plan(&request)?;
                let bytes = plan.peak_bytes.saturating_sub(plan.weight_bytes());
                *planned = Some((request, bytes));
                bytes
            }
        };
        card.reserve(bytes)
    }

    /// `[rows, tokens, hidden]`: the negative prompt's row first, when there is guidance.
    fn encode_prompts(&self, request: &Request, guided: bool, observer: &mut dyn Observer) -> Result<Tensor> {
        let negative = guided.then_some(("negative prompt", &request.negative_prompt));
        let mut ids = Vec::new();
        for (what, prompt) in negative.into_iter().chain([("prompt", &request.prompt)]) {
            let Some(tokenizer) = &self.tokenizer else {
                ids.push(vec![0; self.tokens]);
                continue;
            };
            let encoding = tokenizer.encode(prompt)?;
            if let Some(rest) = encoding.truncated {
                let length = self.tokens;
                observer.warning(&format!("the {what} is longer than the model's {length} tokens; not read: {rest:?}"));
            }
            ids.push(encoding.ids);
        }
        Ok(self.text_encoder.forward(&ids)?.last_hidden_state)
    }
}

/// Pixels of the UNet's `sample_size`, else the VAE's.
pub(super) fn native_size(unet: &UnetConfig, vae: &VaeConfig) -> Option<Size> {
    let cells = unet.sample_size.map(|[h, w]| Size::new(w * vae.factor(), h * vae.factor()));
    cells.or_else(|| vae.sample_size.map(|[h, w]| Size::new(w, h)))
}

fn check_fit(name: &str, text_width: usize, unet: &UnetConfig, vae: &VaeConfig) -> Result<()> {
    let refuse = |reason: String| Err(Error::config(format!("model {name}"), reason));
    if unet.cross_attention_dim != text_width {
        return refuse(format!(
            "unet/config.json has cross_attention_dim {}, text_encoder/config.json hidden_size {text_width}; they must \
             be equal",
            unet.cross_attention_dim
        ));
    }
    if unet.in_channels != vae.latent_channels {
        return refuse(format!(
            "unet/config.json has in_channels {}, vae/config.json latent_channels {}; they must be equal (inpainting and \
             other UNets with extra input channels are not supported)",
            unet.in_channels, vae.latent_channels
        ));
    }
    if unet.out_channels != unet.in_channels {
        let (found, wanted) = (unet.out_channels, unet.in_channels);
        return refuse(format!(
            "unet/config.json has out_channels {found} and in_channels {wanted}; they must be equal"
        ));
    }
    if (vae.in_channels, vae.out_channels) != (3, 3) {
        let (input, output) = (vae.in_channels, vae.out_channels);
        return refuse(format!("vae/config.json has in_channels {input} and out_channels {output}, expected 3 (RGB)"));
    }
    Ok(())
}

/// The model with its prompts.
struct Conditioned<'a> {
    pipeline: &'a Pipeline,
    conditioning: &'a UnetConditioning,
}

impl DiffusionModel for Conditioned<'_> {
    fn device(&self) -> &Device {
        &self.pipeline.device
    }

    fn sample_shape(&self, size: Size) -> [usize; 4] {
        let vae = self.pipeline.vae.config();
        [1, size.height / vae.factor(), size.width / vae.factor(), vae.latent_channels]
    }

    fn denoise(&self, x: &Tensor, steps: &StepTable, options: &UnetOptions) -> Result<Tensor> {
        let unet = &self.pipeline.unet;
        let input = ops::scale_input(x, steps, unet.dtype(), self.conditioning.batch())?;
        unet.forward(&input, steps.index(), self.conditioning, options)
    }

    fn decode(&self, x0: &Tensor) -> Result<Tensor> {
        let vae = &self.pipeline.vae;
        let (scale, shift) = (1.0 / vae.config().scaling_factor, vae.config().shift_factor);
        let picture = vae.decode(&ops::scale_cast(x0, scale as f32, shift as f32, vae.dtype(), 1)?)?;
        as_f32(picture)
    }

    fn encode(&self, picture: &Tensor, noise: Option<&Tensor>) -> Result<Tensor> {
        let vae = &self.pipeline.vae;
        let (scale, shift) = (vae.config().scaling_factor, vae.config().shift_factor);
        let moments = match picture.dtype() == vae.dtype() {
            true => vae.encode(picture)?,
            false => vae.encode(&ops::scale_cast(picture, 1.0, 0.0, vae.dtype(), 1)?)?,
        };
        let latent = ops::diagonal_gaussian(&moments, noise)?;
        ops::scale_cast(&latent, scale as f32, (-shift * scale) as f32, DType::F32, 1)
    }
}

fn as_f32(x: Tensor) -> Result<Tensor> {
    if x.dtype() == DType::F32 { Ok(x) } else { ops::scale_cast(&x, 1.0, 0.0, DType::F32, 1) }
}

/// The draws of one picture.
struct Noise<'a> {
    rng: Rng,
    device: &'a Device,
}

impl NoiseSource for Noise<'_> {
    fn normal(&mut self, shape: [usize; 4]) -> Result<Tensor> {
        self.rng.normal_nhwc(self.device, shape)
    }

    fn normal_into(&mut self, to: &mut Tensor) -> Result<()> {
        self.rng.normal_nhwc_into(to)
    }
}
