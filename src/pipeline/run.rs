use std::cell::RefCell;
use std::sync::Mutex;

use super::families::{Defaults, Family, PromptEmbeds, PromptText, RunConditions};
use super::files::stem;
use super::parameters::Parameters;
use super::plan::Planner;
use super::{Lora, ModelFiles, ModelSource, Request, SizeIds, TextOptions, WeightReport};
use crate::error::{Error, Result};
use crate::image;
use crate::methods::{self, Denoiser, DiffusionModel, Event, NoiseSource, Observer, RecordedSteps, Run, Size, Watch};
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
    device: Device,
    dtype: DType,
    family: Box<dyn Family>,
    scheduler: SchedulerConfig,
    loras: Vec<Lora>,
    /// The words of textual inversion that prompts may hold.
    embeddings: Vec<String>,
    /// The name of the file whose weights stand for those of the model's own VAE.
    vae: Option<String>,
    warnings: Vec<String>,
    defaults: Defaults,
    recorded: RecordedSteps,
    /// The prompts that were encoded last: pictures of one prompt encode it once.
    encoded: Mutex<Option<(Vec<PromptText>, TextOptions, PromptEmbeds)>>,
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
        let family = (files.family().load)(&files, &device, dtype)?;
        let warnings = match device {
            Device::Meta(_) => Vec::new(),
            _ => files.warnings(family.weights())?,
        };
        let (loras, vae) = (files.loras().to_vec(), files.vae_file().map(stem));
        let embeddings = files.embeddings().iter().map(|file| file.word().to_string()).collect();
        let planner = match device {
            Device::Cuda(_) => Some(Box::new(Planner::new(&source, dtype)?)),
            _ => None,
        };
        let (name, defaults, recorded) = (files.name(), files.defaults(), RecordedSteps::default());
        let (encoded, planned) = (Mutex::new(None), Mutex::new(None));
        Ok(Pipeline {
            name,
            device,
            dtype,
            family,
            scheduler,
            loras,
            embeddings,
            vae,
            warnings,
            defaults,
            recorded,
            encoded,
            planner,
            planned,
        })
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

    /// The name of the file whose weights stand for those of the model's own VAE.
    pub fn vae_name(&self) -> Option<&str> {
        self.vae.as_deref()
    }

    /// What was odd about the files, a sentence each: tensors that belong to no part.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The model's scheduler_config.json.
    pub fn scheduler(&self) -> &SchedulerConfig {
        &self.scheduler
    }

    /// The size that the model was trained at, if its configuration says so.
    pub fn native_size(&self) -> Option<Size> {
        self.family.native_size()
    }

    /// The weights of every part.
    pub fn weights(&self) -> &[WeightReport] {
        self.family.weights()
    }

    /// What a request comes to with this model.
    ///
    /// # Errors
    /// [`Error::Request`]: an option and what it would accept; [`Error::Config`] for the model's scheduler.
    pub fn resolve(&self, request: &Request) -> Result<Run> {
        let SizeIds { original, crop, target } = request.size_ids;
        if !self.family.reads_size_ids() {
            let given = [
                ("--original-size", original.map(|size| size.to_string())),
                ("--crop", crop.map(|(x, y)| format!("{x},{y}"))),
                ("--target-size", target.map(|size| size.to_string())),
            ];
            if let Some((flag, value)) = given.into_iter().find_map(|(flag, value)| Some((flag, value?))) {
                let reason = format!("has no effect with {}, which is told no sizes; SDXL is", self.name);
                return Err(Error::Request { flag, value, reason });
            }
        }
        request.resolve(&self.scheduler, self.native_size(), self.family.factor(), self.defaults)
    }

    /// What the first picture of a request says about itself.
    ///
    /// # Errors
    /// As [`Pipeline::resolve`].
    pub fn parameters(&self, request: &Request) -> Result<Parameters> {
        Ok(Parameters::new(request, &self.resolve(request)?, self, request.seed))
    }

    /// The request's pictures, `batch` at a time; a picture depends on the request and its own seed alone. On the meta
    /// device: the ops' record, and no picture.
    ///
    /// # Errors
    /// [`Error::Request`]: an option and what it would accept; [`Error::Interrupted`]; [`Error::NonFinite`], naming the
    /// stage; [`Error::OutOfMemory`].
    pub fn generate(&self, request: &Request, observer: &mut dyn Observer) -> Result<Vec<Picture>> {
        let of = |index: usize| Request { seed: request.seed.wrapping_add(index as u64), count: 1, ..request.clone() };
        let requests: Vec<Request> = (0..request.count).map(of).collect();
        let mut pictures = Vec::new();
        for (index, batch) in requests.chunks(request.batch.max(1)).enumerate() {
            let watch = Watch { observer, first: index * request.batch.max(1) };
            pictures.extend(self.batch(batch, request.count, watch)?);
        }
        Ok(pictures)
    }

    /// One picture per request, in one batch: the requests differ in prompt, negative prompt and seed alone, and each
    /// picture has the same bytes as when it is made alone. `count` of a request is not read.
    ///
    /// # Errors
    /// As [`generate`](Pipeline::generate); [`Error::Request`]: requests that differ in something else.
    pub fn generate_batch(&self, requests: &[Request], observer: &mut dyn Observer) -> Result<Vec<Picture>> {
        // Prompts of one batch are padded to the same chunks, so those of different lengths are not neighbours.
        let mut pictures: Vec<Option<Picture>> = requests.iter().map(|_| None).collect();
        let mut groups: Vec<(usize, Vec<usize>)> = Vec::new();
        for (index, request) in requests.iter().enumerate() {
            let chunks = self.chunks(request)?;
            match groups.iter_mut().find(|(of_group, _)| *of_group == chunks) {
                Some((_, group)) => group.push(index),
                None => groups.push((chunks, vec![index])),
            }
        }
        if let [_] = &groups[..] {
            return self.batch(requests, requests.len(), Watch { observer, first: 0 });
        }
        for (_, group) in groups {
            let together: Vec<Request> = group.iter().map(|&index| requests[index].clone()).collect();
            let mut of_group = Group { observer: &mut *observer, pictures: &group };
            let made = self.batch(&together, requests.len(), Watch { observer: &mut of_group, first: 0 })?;
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
        match request.is_guided() {
            true => Ok(chunks.max(of(true, request.negative_prompt.clone())?)),
            false => Ok(chunks), // the negative prompt is not read
        }
    }

    fn batch(&self, requests: &[Request], count: usize, watch: Watch) -> Result<Vec<Picture>> {
        let Some(first) = requests.first() else { return Ok(Vec::new()) };
        if let Some(other) = requests.iter().find(|other| !other.fits_into_batch_of(first)) {
            let (flag, value) = ("--batch", format!("with the prompt {:?}", other.prompt));
            let reason = "pictures of one batch differ in prompt, negative prompt and seed alone".into();
            return Err(Error::Request { flag, value, reason });
        }
        let run = self.resolve(first)?;
        self.reserve(first, requests.len())?;
        let Watch { observer, first: first_index } = watch;
        observer.event(&Event::EncodeText);
        if observer.cancelled() {
            return Err(Error::Interrupted);
        }
        let guided = run.guidance().is_some();
        let prompts = self.encode_prompts(requests, guided, observer)?;
        let rows = prompts.embeds.shape().to_vec();
        let mut conditions = self.family.conditions(prompts, if guided { 2 } else { 1 }, &first.size_ids);
        conditions.prepare(&run.timesteps())?;
        let model = Conditioned { pipeline: self, images: requests.len(), rows, conditions: RefCell::new(conditions) };

        for (index, request) in requests.iter().enumerate() {
            observer.event(&Event::PictureBegins { index: first_index + index, count, seed: request.seed });
        }
        let rngs = requests.iter().map(|request| Rng::new(request.rng, request.seed)).collect();
        let mut noise = Noise { rngs, device: &self.device };
        let images = methods::generate(&model, &run, &mut noise, Watch { observer, first: first_index })?;
        let mut pictures = Vec::new();
        for (index, (request, image)) in requests.iter().zip(&images).enumerate() {
            if !matches!(self.device, Device::Meta(_)) {
                let [_, height, width, _] = image.dims("generate", "picture")?;
                let rgb = image::to_bytes(&image.to_f32_vec()?)?;
                let parameters = Parameters::new(request, &run, self, request.seed);
                pictures.push(Picture { width, height, rgb, seed: request.seed, parameters });
            }
            observer.event(&Event::PictureEnds { index: first_index + index });
        }
        Ok(pictures)
    }

    /// On a card, what the planner counts beside the weights, in one piece: nothing is asked of the driver while steps run,
    /// and what does not fit fails before the first of them. Pictures that differ in words and seed are planned once.
    fn reserve(&self, request: &Request, images: usize) -> Result<()> {
        let (Device::Cuda(card), Some(planner)) = (&self.device, &self.planner) else { return Ok(()) };
        let request = Request { count: images, batch: images, ..request.without_words() };
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
        let options = requests[0].text;
        let mut distinct: Vec<PromptText> = Vec::new();
        for row in &rows {
            if !distinct.contains(row) {
                distinct.push(row.clone());
            }
        }
        let mut encoded = self.encoded.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // The planner counts the work of every run.
        let kept = !matches!(self.device, Device::Meta(_));
        let embeds = match &*encoded {
            Some((texts, with, embeds)) if kept && *texts == distinct && *with == options => embeds.clone(),
            _ => {
                *encoded = None;
                self.family.encode_prompts(&distinct, &options, &mut |message| observer.warning(message))?
            }
        };
        if kept {
            *encoded = Some((distinct.clone(), options, embeds.clone()));
        }
        let index = |row: &PromptText| distinct.iter().position(|other| other == row).unwrap_or(0);
        embeds.rows(&rows.iter().map(index).collect::<Vec<_>>())
    }
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
}

/// The model with the prompts of a batch.
struct Conditioned<'a> {
    pipeline: &'a Pipeline,
    images: usize,
    /// Shape of the prompts' embeddings.
    rows: Vec<usize>,
    conditions: RefCell<Box<dyn RunConditions>>,
}

impl DiffusionModel for Conditioned<'_> {
    fn device(&self) -> &Device {
        &self.pipeline.device
    }

    fn sample_shape(&self, size: Size) -> [usize; 4] {
        let family = &self.pipeline.family;
        [self.images, size.height / family.factor(), size.width / family.factor(), family.channels()]
    }

    fn conditioning_key(&self) -> Vec<usize> {
        self.rows.clone()
    }

    fn begin_stage(
        &self,
        size: Size,
        timesteps: &[f32],
        reuse: Option<Box<dyn Denoiser>>,
    ) -> Result<Box<dyn Denoiser>> {
        self.conditions.borrow_mut().begin_stage(size, timesteps, reuse)
    }

    fn decode(&self, x0: &Tensor) -> Result<Tensor> {
        self.pipeline.family.decode(x0)
    }

    fn encode(&self, picture: &Tensor, noise: Option<&Tensor>) -> Result<Tensor> {
        self.pipeline.family.encode(picture, noise)
    }

    fn recorded_steps(&self) -> &RecordedSteps {
        &self.pipeline.recorded
    }
}

/// The draws of a batch: every picture has its own generator.
struct Noise<'a> {
    rngs: Vec<Rng>,
    device: &'a Device,
}

impl NoiseSource for Noise<'_> {
    fn normal(&mut self, [_, h, w, c]: [usize; 4]) -> Result<Tensor> {
        let device = self.device;
        let parts: Vec<Tensor> =
            self.rngs.iter_mut().map(|rng| rng.normal_nhwc(device, [1, h, w, c])).collect::<Result<_>>()?;
        match &parts[..] {
            [one] => Ok(one.clone()),
            parts => Tensor::concat(parts),
        }
    }

    fn normal_into(&mut self, to: &mut Tensor) -> Result<()> {
        let shape = to.dims("normal_into", "to")?;
        match &mut self.rngs[..] {
            [rng] => rng.normal_nhwc_into(to),
            _ => to.copy_from(&self.normal(shape)?),
        }
    }
}
