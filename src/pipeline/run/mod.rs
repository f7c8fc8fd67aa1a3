use std::cell::{Cell, RefCell};
use std::sync::{Arc, Mutex};

mod model;
mod residency;

use model::{Conditioned, Noise};
use residency::Need;

use super::families::{ControlStrength, Defaults, Family, PromptEmbeds, PromptText, RunInputs};
use super::files::stem;
use super::ip_adapter::{self, ImagePrompts, IpAdapterFile, IpAdapters, IpImage};
use super::memory::{LoadOptions, Role, Rung};
use super::parameters::Parameters;
use super::plan::Planner;
use super::resident::Module;
use super::second::{OneOfTwo, SecondModel};
use super::start::OnDevice;
use super::upscale::Upscaler;
use super::{ControlInput, Lora, ModelFiles, ModelSource, Request, ResAdapter, SizeIds, TextOptions, WeightReport};
use crate::error::{Error, Result};
use crate::image;
use crate::methods::{
    self, Computed, Event, Geometry, ModelFacts, Observer, RecordedSteps, Run, RunRange, Size, Watch, tell,
};
use crate::models::UnetConfig;
use crate::rng::Rng;
use crate::runtime::{DType, Device, Tensor};
use crate::schedulers::SchedulerConfig;
use crate::text::LongPrompt;

/// A finished picture.
#[derive(Clone, Debug, PartialEq)]
pub struct Picture {
    pub width: usize,
    pub height: usize,
    /// 8 bits, row-major, 3 bytes per pixel.
    pub rgb: Vec<u8>,
    pub seed: u64,
    pub parameters: Parameters,
}

/// A model ready to make pictures.
pub struct Pipeline {
    name: String,
    options: LoadOptions,
    family: Box<dyn Family>,
    scheduler: SchedulerConfig,
    loras: Vec<Lora>,
    resadapter: Option<ResAdapter>,
    ip_adapters: Option<IpAdapters>,
    /// Of every part.
    weights: Vec<WeightReport>,
    /// The words of textual inversion that prompts may hold.
    embeddings: Vec<String>,
    /// The name of the file whose weights stand for those of the model's own VAE.
    vae: Option<String>,
    /// Enlarges every finished picture.
    upscaler: Option<Upscaler>,
    /// The same, as a run of its own.
    second: Option<SecondModel>,
    warnings: Vec<String>,
    defaults: Defaults,
    recorded: RecordedSteps,
    /// The prompts that were encoded last: pictures of one prompt encode it once.
    encoded: Mutex<Option<(Vec<PromptText>, TextOptions, PromptEmbeds)>>,
    /// The pictures that were encoded last, with unconditional rows or without.
    encoded_images: Mutex<Option<(Vec<IpImage>, bool, ImagePrompts)>>,
    /// How the model may be held in memory, the fastest way first.
    ladder: Vec<Rung>,
    /// Says how much memory a request wants. `None` on the meta device.
    planner: Option<Box<Planner>>,
    /// The request that was planned last, without what costs nothing, and what it needs on each rung looked at.
    planned: Mutex<Option<(Request, Vec<Need>)>>,
    /// The rung that was spoken of last.
    told: Mutex<usize>,
    /// The request whose memory was reserved last, as it was planned, and its rung.
    reserved: Mutex<Option<(Request, usize)>>,
}

impl Pipeline {
    /// Loads every part of the model, as far as there is memory, and checks that the parts fit together. On the meta device
    /// only configurations are read.
    ///
    /// # Errors
    /// As [`load_with`](Pipeline::load_with).
    pub fn load(source: ModelSource, device: Device, dtype: DType) -> Result<Pipeline> {
        Pipeline::load_with(source, LoadOptions::new(device, dtype))
    }

    /// The same with [`MemoryOptions`](super::MemoryOptions): with [`Residency::Low`] keys and shapes of the weight files are
    /// checked, and the parts loaded when a run needs them.
    ///
    /// # Errors
    /// Those of [`ModelFiles`] and of the weight files; [`Error::Config`] when two parts do not fit, naming both and
    /// their widths; with [`Residency::Keep`] [`Error::OutOfMemory`].
    pub fn load_with(source: ModelSource, options: LoadOptions) -> Result<Pipeline> {
        let files = Arc::new(ModelFiles::open(&source)?);
        let scheduler = match files.is_of_pixels() {
            true => files.scheduler_config()?,
            false => files.scheduler_config()?.for_latents(),
        };
        files.family().check_scheduler(&scheduler)?;
        let family = (files.family().open)(&files, &options)?;
        let is_meta = matches!(options.device, Device::Meta(_));
        let planner = if is_meta { None } else { Some(Box::new(Planner::with(&source, &options)?)) };
        let upscaler = options.upscale.as_ref().map(|upscale| Upscaler::open(upscale, &options.device)).transpose()?;
        let text_dim = family.unet().map(UnetConfig::text_dim);
        let second = options.second.as_ref().map(|source| SecondModel::open(source, &options, text_dim)).transpose()?;
        let ip_adapters = IpAdapters::open(&files, family.unet(), &options)?;
        let of_adapters = ip_adapters.iter().flat_map(|adapters| adapters.weights.iter().cloned());
        let weights = family.weights().iter().cloned().chain(of_adapters).collect();
        let mut pipeline = Pipeline {
            name: files.name(),
            ladder: options.memory.ladder(),
            options,
            family,
            scheduler,
            loras: files.loras().to_vec(),
            resadapter: files.resadapter().cloned(),
            ip_adapters,
            weights,
            embeddings: files.embeddings().iter().map(|file| file.word().to_string()).collect(),
            vae: files.vae_file().map(stem),
            upscaler,
            second,
            warnings: Vec::new(),
            defaults: files.defaults(),
            recorded: RecordedSteps::default(),
            encoded: Mutex::new(None),
            encoded_images: Mutex::new(None),
            planner,
            planned: Mutex::new(None),
            told: Mutex::new(0),
            reserved: Mutex::new(None),
        };
        if !is_meta {
            pipeline.warnings = pipeline.load_parts(&files)?;
            let of_upscaler = pipeline.upscaler.iter().flat_map(|upscaler| upscaler.warnings()).cloned();
            pipeline.warnings.extend(of_upscaler);
            let of_second = pipeline.second.iter().flat_map(|second| second.pipeline().warnings()).cloned();
            pipeline.warnings.extend(of_second.collect::<Vec<_>>());
        }
        Ok(pipeline)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The words of textual inversion that prompts may hold.
    pub fn embeddings(&self) -> &[String] {
        &self.embeddings
    }

    /// Those of [`embeddings`](Pipeline::embeddings) that stand in no prompt of these requests.
    ///
    /// # Errors
    /// Those of the tokenizer.
    pub fn unread_embeddings<'a>(&self, requests: impl Iterator<Item = &'a Request>) -> Result<Vec<&str>> {
        let mut unread: Vec<&str> = self.embeddings.iter().map(String::as_str).collect();
        for request in requests {
            if unread.is_empty() {
                break;
            }
            let negative = request.negative_prompt.clone().filter(|_| request.is_guided());
            for (negative, text) in [(false, Some(request.prompt.clone())), (true, negative)] {
                let read = self.family.learned(&PromptText { text, negative }, &request.text)?;
                unread.retain(|word| !read.iter().any(|read| read == word));
            }
        }
        Ok(unread)
    }

    /// The adapters that are merged into the weights.
    pub fn loras(&self) -> &[Lora] {
        &self.loras
    }

    pub fn resadapter(&self) -> Option<&ResAdapter> {
        self.resadapter.as_ref()
    }

    /// The name of the file whose weights stand for those of the model's own VAE.
    pub fn vae_name(&self) -> Option<&str> {
        self.vae.as_deref()
    }

    /// What enlarges every finished picture.
    pub fn upscaler(&self) -> Option<&Upscaler> {
        self.upscaler.as_ref()
    }

    /// The second model, which enlarges what this one makes.
    pub fn second(&self) -> Option<&Pipeline> {
        self.second.as_ref().map(SecondModel::pipeline)
    }

    /// The second model's run of a request's pictures.
    ///
    /// # Errors
    /// As [`resolve`](Pipeline::resolve).
    pub fn resolve_second(&self, request: &Request) -> Result<Option<Run>> {
        let Some(second) = &self.second else { return Ok(None) };
        second.pipeline().resolve(&second.request(request, None)?).map(Some).map_err(SecondModel::named)
    }

    /// Does the network read a smaller picture, which it enlarges?
    pub(super) fn enlarges_lowres(&self) -> bool {
        self.family.lowres_noising().is_some()
    }

    /// Width of the text that the network reads, where it is a UNet.
    pub(super) fn text_dim(&self) -> Option<usize> {
        self.family.unet().map(UnetConfig::text_dim)
    }

    /// The defaults that suit the model.
    pub(super) fn suited_request(&self) -> Request {
        Request::with_defaults(self.defaults)
    }

    /// What was odd about the files, a sentence each: tensors that belong to no part.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    pub fn device(&self) -> &Device {
        &self.options.device
    }

    pub fn dtype(&self) -> DType {
        self.options.dtype
    }

    /// As it was loaded.
    pub fn options(&self) -> &LoadOptions {
        &self.options
    }

    /// The model's scheduler_config.json.
    pub fn scheduler(&self) -> &SchedulerConfig {
        &self.scheduler
    }

    /// The size that the model was trained at, if its configuration says so.
    pub fn native_size(&self) -> Option<Size> {
        self.family.native_size()
    }

    /// Pixels per latent cell, along a side.
    pub fn factor(&self) -> usize {
        self.family.space().factor()
    }

    /// Sides of pictures are multiples of so many pixels: those of a latent cell, or of a patch of cells.
    pub fn side_multiple(&self) -> usize {
        self.family.sides().multiple()
    }

    /// Is there classifier-free guidance in a request's run, and so a negative prompt?
    pub fn guides(&self, request: &Request) -> bool {
        self.defaults.guides(request.guidance)
    }

    /// The weights of every part.
    pub fn weights(&self) -> &[WeightReport] {
        &self.weights
    }

    /// What has weights, in the order of a run but for the IP-Adapters' at the end: in that of [`weights`](Pipeline::weights).
    fn modules(&self) -> Vec<&dyn Module> {
        let of_adapters = self.ip_adapters.iter().flat_map(IpAdapters::modules);
        self.family.modules().into_iter().chain(of_adapters).collect()
    }

    /// The model's IP-Adapters.
    pub fn ip_adapters(&self) -> &[IpAdapterFile] {
        self.ip_adapters.as_ref().map_or(&[], IpAdapters::files)
    }

    /// The request for its `init_image` at a larger `size`, by its method: with the stages, where it names none, that this method
    /// makes from the picture's own size on, and options and a strength that suit it where they are unset. One without a picture
    /// stays as it is.
    ///
    /// # Errors
    /// [`Error::Request`]: `size` is not made of whole cells; an option leaves no step.
    pub fn enlarging(&self, request: &Request, size: Size) -> Result<Request> {
        let mut request = request.clone();
        let Some(init) = &mut request.init_image else { return Ok(request) };
        init.strength = init.strength.or(request.method.enlarging_strength());
        if !request.stages.is_empty() {
            return Ok(request);
        }
        let sides = self.family.sides();
        let multiple = sides.multiple();
        let whole = |side: usize| ((side + multiple / 2) / multiple).max(1) * multiple;
        let from = init.picture.size();
        let picture = Size::new(whole(from.width), whole(from.height));
        let native = self.native_size().unwrap_or(picture);
        let steps = request.steps.unwrap_or(self.defaults.steps);
        let relayed_share = self.defaults.relayed_share;
        let geometry = Geometry { size, native, sides, steps, relay_growth: 1.0, relayed_share };
        for (name, value) in request.method.implementation().enlarging_options(&geometry) {
            if request.method.option(name).is_none() {
                request.method = request.method.with(name, value)?;
            }
        }
        let stages = request.method.implementation().stages_from_picture(&geometry, picture)?;
        Ok(match request.method.spec().relays {
            true => Request { size: None, steps: None, stages, ..request },
            false => Request { size: Some(size), ..request },
        })
    }

    /// What a request comes to with this model.
    ///
    /// # Errors
    /// [`Error::Request`]: an option and what it would accept; [`Error::Config`] for the model's scheduler.
    pub fn resolve(&self, request: &Request) -> Result<Run> {
        let SizeIds { original, crop, target } = request.size_ids;
        if !self.family.reads_size_ids() {
            let given = [
                ("size_ids.original", original.map(|size| size.to_string())),
                ("size_ids.crop", crop.map(|(x, y)| format!("{x},{y}"))),
                ("size_ids.target", target.map(|size| size.to_string())),
            ];
            if let Some((field, value)) = given.into_iter().find_map(|(field, value)| Some((field, value?))) {
                let reason = format!("has no effect with {}, which is told no sizes; SDXL is", self.name);
                return Err(Error::Request { field, value, reason });
            }
        }
        if let Some(length) = request.text.t5_length.filter(|_| !self.family.reads_t5()) {
            let reason = format!("has no effect with {}, which has no T5 text encoder; SD 3 has", self.name);
            return Err(Error::Request { field: "text.t5_length", value: length.to_string(), reason });
        }
        let masked = request.init_image.as_ref().is_some_and(|init| init.mask.is_some());
        if self.family.reads_mask() && !masked {
            let (field, value) = ("mask", "(none)".into());
            let reason = format!("{} is an inpainting model; give it request.init_image and request.mask", self.name);
            return Err(Error::Request { field, value, reason });
        }
        match (self.family.lowres_noising(), &request.lowres) {
            (Some(levels), Some(lowres)) => lowres.check(levels)?,
            (None, None) => {}
            (Some(_), None) => {
                let (field, value) = ("lowres", "(none)".into());
                let reason =
                    format!("{} enlarges a picture: a second stage of DeepFloyd IF; give it request.lowres", self.name);
                return Err(Error::Request { field, value, reason });
            }
            (None, Some(lowres)) => {
                let (field, value) = ("lowres", lowres.picture.name().to_string());
                let reason = format!("has no effect with {}; a second stage of DeepFloyd IF reads it", self.name);
                return Err(Error::Request { field, value, reason });
            }
        }
        if let (None, Some(_)) = (&self.second, &request.second) {
            let (field, value) = ("second", "given".into());
            let reason = format!("has no effect with {}, beside which no second model was loaded", self.name);
            return Err(Error::Request { field, value, reason });
        }
        let (given, nets) = (request.controls.len(), self.options.controls.len());
        if given != nets {
            let (field, value) = ("control_image", format!("{given} pictures"));
            let reason = format!("expected {nets}, one for each ControlNet that the model was loaded with");
            return Err(Error::Request { field, value, reason });
        }
        let distilled = self.defaults.is_distilled();
        let model = ModelFacts { name: self.name.clone(), distilled, unet: self.family.unet().cloned() };
        model.check_method(&request.method)?; // before what its scheduler lacks for the method
        let sides = self.family.sides();
        let run = request.resolve(&self.scheduler, self.native_size(), sides, self.defaults)?.of_model(model)?;
        if let Some(unet) = self.family.unet().filter(|unet| unet.is_of_pixels()) {
            self.scheduler.check_channels(run.scheduler().sampler(), unet.sample_channels(), unet.out_channels)?;
        }
        ip_adapter::check(self.ip_adapters.as_ref(), &request.ip_images, &run)?;
        Ok(run)
    }

    /// What of a request may surprise, a sentence each: a picture that is stretched, a mask that repaints nothing.
    ///
    /// # Errors
    /// As [`Pipeline::resolve`].
    pub fn remarks(&self, request: &Request) -> Result<Vec<String>> {
        let Some(init) = &request.init_image else { return Ok(Vec::new()) };
        let run = self.resolve(request)?;
        let Some(size) = run.picture_size() else { return Ok(Vec::new()) };
        Ok(init.remarks(size, request.size.is_some() || !request.stages.is_empty() || run.stages().len() > 1))
    }

    /// What the first picture of a request says about itself.
    ///
    /// # Errors
    /// As [`Pipeline::resolve`].
    pub fn parameters(&self, request: &Request) -> Result<Parameters> {
        let parameters = Parameters::new(request, &self.resolve(request)?, self, request.seed);
        match (&self.second, self.resolve_second(request)?) {
            (Some(second), Some(run)) => Ok(parameters.with_second(second, &run, &second.request(request, None)?)),
            _ => Ok(parameters),
        }
    }

    /// The request's pictures, `batch` at a time; a picture depends on the request and its own seed alone. On the meta
    /// device: the ops' record, and no picture.
    ///
    /// # Errors
    /// [`Error::Request`]: an option and what it would accept; [`Error::Interrupted`]; [`Error::NonFinite`], naming the
    /// stage; [`Error::OutOfMemory`].
    pub fn generate(&self, request: &Request, observer: &mut dyn Observer) -> Result<Vec<Picture>> {
        self.generate_on(None, request, observer)
    }

    /// The same on a rung of the ladder. `None`: the first one that fits into memory.
    pub(super) fn generate_on(
        &self,
        rung: Option<usize>,
        request: &Request,
        observer: &mut dyn Observer,
    ) -> Result<Vec<Picture>> {
        let of = |index: usize| Request { seed: request.seed.wrapping_add(index as u64), count: 1, ..request.clone() };
        let requests: Vec<Request> = (0..request.count).map(of).collect();
        let mut pictures = Vec::new();
        let at_once = request.most_at_once();
        for (index, batch) in requests.chunks(at_once).enumerate() {
            let watch = Watch { observer, first: index * at_once };
            pictures.extend(self.batch(rung, batch, request.count, watch)?);
        }
        Ok(pictures)
    }

    /// One picture per request, in one batch: the requests differ in prompt, negative prompt, guidance scale and seed alone,
    /// all with guidance or none, and each picture has the same bytes as when it is made alone. `count` of a request is not
    /// read.
    ///
    /// # Errors
    /// As [`generate`](Pipeline::generate); [`Error::Request`]: requests that differ in something else.
    pub fn generate_batch(&self, requests: &[Request], observer: &mut dyn Observer) -> Result<Vec<Picture>> {
        // Prompts of one batch are padded to the same chunks, so those of different lengths are not neighbours; and a network
        // that is told its guidance scale is told one.
        let mut pictures: Vec<Option<Picture>> = requests.iter().map(|_| None).collect();
        type Alike = (usize, Option<f32>);
        let mut groups: Vec<(Alike, Vec<usize>)> = Vec::new();
        for (index, request) in requests.iter().enumerate() {
            let alike = (self.chunks(request)?, self.defaults.embeds_guidance.then_some(request.guidance));
            match groups.iter_mut().find(|(of_group, _)| *of_group == alike) {
                Some((_, group)) => group.push(index),
                None => groups.push((alike, vec![index])),
            }
        }
        if let [_] = &groups[..] {
            return self.batch(None, requests, requests.len(), Watch { observer, first: 0 });
        }
        for (_, group) in groups {
            let together: Vec<Request> = group.iter().map(|&index| requests[index].clone()).collect();
            let mut of_group = Group { observer: &mut *observer, pictures: &group };
            let made = self.batch(None, &together, requests.len(), Watch { observer: &mut of_group, first: 0 })?;
            group.into_iter().zip(made).for_each(|(index, picture)| pictures[index] = Some(picture));
        }
        Ok(pictures.into_iter().flatten().collect())
    }

    /// Chunks of the text encoder's context that a request's prompts fill.
    fn chunks(&self, request: &Request) -> Result<usize> {
        if request.text.long_prompt == LongPrompt::Truncate {
            return Ok(1);
        }
        let of = |negative, text: Option<String>| self.family.chunks(&PromptText { text, negative }, &request.text);
        let chunks = of(false, Some(request.prompt.clone()))?;
        match self.defaults.guides(request.guidance) {
            true => Ok(chunks.max(of(true, request.negative_prompt.clone())?)),
            false => Ok(chunks), // the negative prompt is not read
        }
    }

    fn batch(&self, rung: Option<usize>, requests: &[Request], count: usize, watch: Watch) -> Result<Vec<Picture>> {
        let Some(first) = requests.first() else { return Ok(Vec::new()) };
        let second = self.resolve_second(first)?; // before hours of work
        if let Some(other) = requests.iter().find(|other| !other.fits_into_batch_of(first)) {
            let (field, value) = ("batch", format!("with the prompt {:?}", other.prompt));
            let reason =
                "pictures of one batch differ in prompt, negative prompt, guidance scale and seed alone".into();
            return Err(Error::Request { field, value, reason });
        }
        requests.iter().try_for_each(Request::check_guidance)?;
        let guidance = requests.iter().map(Request::guidance_scale).collect();
        let run = self.resolve(first)?.with_guidance(guidance);
        let Watch { observer, first: first_index } = watch;
        let is_meta = matches!(self.options.device, Device::Meta(_));
        if requests.len() > 1 && first.one_at_a_time() {
            let mut pictures = Vec::new();
            for (index, request) in requests.iter().enumerate() {
                let watch = Watch { observer: &mut *observer, first: first_index + index };
                pictures.extend(self.batch(rung, std::slice::from_ref(request), count, watch)?);
            }
            return Ok(pictures);
        }
        let rngs = requests.iter().map(|request| Rng::new(request.rng, request.seed)).collect();
        let given = Given { rung, prompts: None, rngs };
        let [of_first, of_second] = [Some(&run), second.as_ref()].map(|run| {
            let of = |run: &Run| (run.stages().len(), run.steps());
            run.map(of).unwrap_or_default()
        });
        let mut part = OneOfTwo { observer: &mut *observer, is_second: false, other: of_second };
        let watch = Watch { observer: &mut part, first: first_index };
        let Made { mut images, computed, rngs, prompts, rung: first_rung } =
            self.made(requests, &run, count, given, watch)?;
        let mut enlarged = None;
        if let (Some(second), Some(of_second)) = (&self.second, second) {
            let pictures = requests.iter().zip(&images);
            let requests: Vec<Request> =
                pictures.map(|(request, image)| second.request(request, Some(image))).collect::<Result<_>>()?;
            let guidance = requests.iter().map(Request::guidance_scale).collect();
            let of_second = of_second.with_guidance(guidance);
            let guided = of_second.guidance().is_some();
            let prompts = match guided == run.guidance().is_some() {
                true => prompts,
                false => self.encode_prompts(&requests, guided, observer)?,
            };
            let prompts = Some(prompts);
            let rung = rung.map(|rung| rung.min(second.pipeline().ladder.len() - 1));
            let mut part = OneOfTwo { observer: &mut *observer, is_second: true, other: of_first };
            let watch = Watch { observer: &mut part, first: first_index };
            let given = Given { rung, prompts, rngs };
            let second_pipeline = second.pipeline();
            let keeps_network = self.ladder[first_rung].keeps_network;
            if !keeps_network {
                self.release(Role::Network);
            }
            second_pipeline.bring_for(Role::Network, &|| self.release_own(), &mut |m| watch.observer.warning(m))?;
            images = second_pipeline.made(&requests, &of_second, count, given, watch)?.images;
            if !keeps_network {
                second_pipeline.release(Role::Network);
            }
            enlarged = Some((second, of_second, requests));
        }
        let mut pictures = Vec::new();
        for (index, (request, image)) in requests.iter().zip(&images).enumerate() {
            let [_, height, width, _] = image.dims("generate", "picture")?;
            let rgb = if is_meta { Vec::new() } else { image::to_bytes(&image.to_f32_vec()?)? };
            let (size, rgb) = self.enlarge(Size::new(width, height), rgb, observer)?;
            if !is_meta {
                let mut parameters = Parameters::new(request, &run, self, request.seed).with_computed(computed);
                if let Some((second, run, requests)) = &enlarged {
                    parameters = parameters.with_second(second, run, &requests[index]);
                }
                let Size { width, height } = size;
                pictures.push(Picture { width, height, rgb, seed: request.seed, parameters });
            }
            tell(observer, &Event::PictureEnds { index: first_index + index });
        }
        Ok(pictures)
    }

    /// The pictures of a run, before they are bytes.
    fn made(&self, requests: &[Request], run: &Run, count: usize, given: Given, watch: Watch) -> Result<Made> {
        let first = &requests[0];
        let (Given { rung, prompts, rngs }, Watch { observer, first: first_index }) = (given, watch);
        let _range = RunRange::begin(|| match (&self.options.device, requests.len()) {
            (Device::Meta(_), _) => "plan".into(),
            (_, 1) => "1 picture".into(),
            (_, count) => format!("{count} pictures"),
        });
        let (rung, beside_weights) = match rung {
            Some(rung) => (rung, 0),
            None => self.choose_rung(first, requests.len(), observer)?,
        };
        let reserve = || self.reserve(first, requests.len(), (rung, beside_weights));
        let Rung { keeps_text, .. } = self.ladder[rung];
        self.recorded.set_short_of_memory(rung > 0);
        if keeps_text {
            for role in Role::ALL {
                self.bring(role, &mut |message| observer.warning(message))?;
            }
            reserve()?;
        }
        let guided = run.guidance().is_some();
        let prompts = match prompts {
            Some(prompts) => {
                tell(observer, &Event::Condition { stage: 0 });
                prompts
            }
            None => {
                tell(observer, &Event::EncodeText);
                if observer.cancelled() {
                    return Err(Error::Interrupted);
                }
                self.encode_prompts(requests, guided, observer)?
            }
        };
        let images = self.encode_images(&first.ip_images, guided, observer)?;
        if !keeps_text {
            self.release(Role::Text);
            self.bring(Role::Network, &mut |message| observer.warning(message))?;
            reserve()?;
        }
        let rows = [prompts.embeds.shape(), &images.key()].concat();
        let embedded = self.defaults.embeds_guidance.then_some(first.guidance - 1.0);
        let repeats = if guided { 2 } else { 1 };
        let strength = |input: &ControlInput| ControlStrength { scale: input.scale, guess: input.guess };
        let controls: Vec<ControlStrength> = first.controls.iter().map(strength).collect();
        let guesses = controls.iter().map(|control| usize::from(control.guess));
        let conditioning_key = rows.iter().copied().chain(guesses).collect();
        let original = || run.method().implementation().original_beside_controls(run).filter(|_| run.has_controls());
        let sizes = SizeIds { original: first.size_ids.original.or_else(original), ..first.size_ids };
        let told = prompts.clone();
        let noise_level = first.lowres.as_ref().map(|lowres| lowres.noise_level as f32);
        let inputs = RunInputs { prompts, images, repeats, sizes, guidance: embedded, noise_level, controls };
        let mut conditions = self.family.conditions(inputs);
        conditions.prepare(&run.timesteps())?;
        let (images, conditions, rung) = (requests.len(), RefCell::new(conditions), Cell::new(rung));
        let start = first.init_image.as_ref().map(|init| OnDevice { init, device: self.device() });
        let controls = &first.controls;
        let lowres = requests.iter().filter_map(|request| request.lowres.as_ref()).collect();
        let model = Conditioned { pipeline: self, images, conditioning_key, conditions, rung, start, controls, lowres };

        for (index, request) in requests.iter().enumerate() {
            tell(observer, &Event::PictureBegins { index: first_index + index, count, seed: request.seed });
        }
        let seeds = requests.iter().map(|request| request.seed).collect();
        let mut noise = Noise { seeds, rngs, device: self.device() };
        let watch = Watch { observer, first: first_index };
        let (images, computed) = methods::generate_counted(&model, run, &mut noise, watch)?;
        Ok(Made { images, computed, rngs: noise.rngs, prompts: told, rung: model.rung.get() })
    }

    /// A finished picture as the upscaler makes it; without one as it is.
    fn enlarge(&self, size: Size, rgb: Vec<u8>, observer: &mut dyn Observer) -> Result<(Size, Vec<u8>)> {
        let Some(upscaler) = &self.upscaler else { return Ok((size, rgb)) };
        let enlarged = upscaler.enlarged(size);
        tell(observer, &Event::Upscale { size: enlarged });
        if observer.cancelled() {
            return Err(Error::Interrupted);
        }
        match upscaler.upscale(size, &rgb, observer) {
            // The recorded steps hold memory that it needs.
            Err(Error::OutOfMemory { .. }) if self.recorded.clear() > 0 => {
                Ok((enlarged, upscaler.upscale(size, &rgb, observer)?))
            }
            made => Ok((enlarged, made?)),
        }
    }

    /// The rows of the network's batch, the negative prompts' first when there is guidance: one per picture, or one for
    /// all pictures where they have the same words.
    fn encode_prompts(&self, requests: &[Request], guided: bool, observer: &mut dyn Observer) -> Result<PromptEmbeds> {
        let same = requests.iter().all(|other| {
            (&other.prompt, &other.negative_prompt) == (&requests[0].prompt, &requests[0].negative_prompt)
        });
        let requests = if same { &requests[..1] } else { requests };
        let negative = requests.iter().filter(|_| guided).map(|request| (true, request.negative_prompt.clone()));
        let rows: Vec<PromptText> = negative
            .chain(requests.iter().map(|request| (false, Some(request.prompt.clone()))))
            .map(|(negative, text)| PromptText { text, negative })
            .collect();
        let options = requests[0].text_options();
        let mut distinct: Vec<PromptText> = Vec::new();
        for row in &rows {
            if !distinct.contains(row) {
                distinct.push(row.clone());
            }
        }
        let mut encoded = self.encoded.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // The planner counts the work of every run.
        let kept = !matches!(self.options.device, Device::Meta(_));
        let embeds = match &*encoded {
            Some((texts, with, embeds)) if kept && *texts == distinct && *with == options => embeds.clone(),
            _ => {
                *encoded = None;
                self.bring(Role::Text, &mut |message| observer.warning(message))?;
                let warn = &mut |message: &str| observer.warning(message);
                self.family.encode_prompts(&distinct, &options, warn)?.to_device(self.device())?
            }
        };
        if kept {
            *encoded = Some((distinct.clone(), options, embeds.clone()));
        }
        let index = |row: &PromptText| distinct.iter().position(|other| other == row).unwrap_or(0);
        embeds.rows(&rows.iter().map(index).collect::<Vec<_>>())
    }

    /// What the network is told of pictures beside the prompts: the same for every picture of a batch.
    fn encode_images(&self, images: &[IpImage], guided: bool, observer: &mut dyn Observer) -> Result<ImagePrompts> {
        let Some(adapters) = &self.ip_adapters else { return Ok(ImagePrompts::default()) };
        let mut encoded = self.encoded_images.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // The planner counts the work of every run.
        let kept = !matches!(self.options.device, Device::Meta(_));
        if let Some((of, with, prompts)) = &*encoded
            && (kept && *of == images && *with == guided)
        {
            return Ok(prompts.clone());
        }
        *encoded = None;
        self.bring(Role::Text, &mut |message| observer.warning(message))?;
        let prompts = adapters.encode(images, guided)?;
        if kept {
            *encoded = Some((images.to_vec(), guided, prompts.clone()));
        }
        Ok(prompts)
    }
}

/// What a run is given beside its requests.
struct Given {
    /// `None`: the first one that fits into memory.
    rung: Option<usize>,
    /// The rows of the network's batch; `None`: they are encoded.
    prompts: Option<PromptEmbeds>,
    /// Of every picture.
    rngs: Vec<Rng>,
}

/// What a run makes.
struct Made {
    /// f32, `[1, H, W, 3]` each, not clamped.
    images: Vec<Tensor>,
    computed: Option<Computed>,
    /// As the run leaves them.
    rngs: Vec<Rng>,
    /// The rows of the network's batch.
    prompts: PromptEmbeds,
    /// Where on the pipeline's ladder the run was at its end.
    rung: usize,
}

/// Tells the observer of a whole batch about a part of it.
struct Group<'a> {
    observer: &'a mut dyn Observer,
    /// The part's pictures by their index in the whole.
    pictures: &'a [usize],
}

impl Observer for Group<'_> {
    fn event(&mut self, event: &Event) {
        let mut event = event.clone();
        if let Event::PictureBegins { index, .. } | Event::PictureEnds { index } = &mut event {
            *index = self.pictures[*index];
        }
        self.observer.event(&event);
    }

    fn cancelled(&self) -> bool {
        self.observer.cancelled()
    }

    fn warning(&mut self, message: &str) {
        self.observer.warning(message);
    }

    fn wants_tensors(&self, index: usize) -> bool {
        self.observer.wants_tensors(self.pictures[index])
    }

    fn tensor(&mut self, index: usize, name: &str, shape: &[usize], values: Vec<f32>) -> Result<()> {
        self.observer.tensor(self.pictures[index], name, shape, values)
    }

    fn phase(&mut self, index: usize, phase: usize, size: [usize; 2], values: Vec<f32>) -> Result<()> {
        self.observer.phase(self.pictures[index], phase, size, values)
    }

    fn integers(&mut self, index: usize, name: &str, shape: &[usize], values: Vec<i64>) -> Result<()> {
        self.observer.integers(self.pictures[index], name, shape, values)
    }
}
