use super::families::Defaults;
use super::{ControlInput, InitImage, IpImage, Lowres, ModelFiles, ModelSource};
use crate::error::{Error, Result};
use crate::methods::{
    Choices, ControlShares, Geometry, MegaFusion, Method, Plain, Run, Sides, Size, Stage, Start, StepCache,
};
use crate::ops::GuidanceScale;
use crate::rng::RngKind;
use crate::schedulers::{Sampler, Scheduler, SchedulerConfig, SigmaSpacing};
use crate::text::{LongPrompt, Syntax};

/// Everything that decides a picture, beside the model. `None` and an empty list mean: chosen from the model and the
/// method. The other defaults are for Stable Diffusion; [`Request::suited_to`] has those of any model.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    pub prompt: String,
    /// What guidance steers away from. `None`: the empty prompt, or what the family has for none (zeros for SDXL).
    pub negative_prompt: Option<String>,
    /// How the prompts are read.
    pub text: TextOptions,
    /// The method with its options.
    pub method: Method,
    /// Size of the final picture. Default: the last of `stages`; without those the model's native size (plain) or twice
    /// its sides (MegaFusion; four times for models below 128 pixels).
    pub size: Option<Size>,
    /// Sizes and steps, smallest first; empty: planned from `size` by the method.
    pub stages: Vec<Stage>,
    /// Default: the method's own: `ddim` for MegaFusion, the sampler of the model's scheduler class for `plain`.
    pub scheduler: Option<Sampler>,
    /// How the noise levels of a sampler with sigmas are spaced. Default: as the model's configuration says.
    pub sigmas: Option<SigmaSpacing>,
    /// DDIM's share of fresh noise per step, 0 to 1. Default: the method's own, 1 for ScaleCrafter and FouriScale, else 0.
    pub eta: Option<f64>,
    /// Steps over all stages. Default: the sum of `stages`, else 50.
    pub steps: Option<usize>,
    /// Classifier-free guidance scale; up to 1: no guidance. A latent consistency model is told it instead.
    pub guidance: f32,
    /// phi of Lin et al. 2023, arXiv:2305.08891, sec. 3.4: how far the guided output's standard deviation goes back to that
    /// of the conditional one, 0 (not) to 1 (all the way).
    pub guidance_rescale: f32,
    /// Scale of what of guidance the map of the stage before (in a first stage larger than the trained size: the trained one's) does
    /// not hold, the rest keeping `guidance`: FA-CFG of FreCaS, arXiv:2410.18410. `None`: as the method does, most without.
    pub guidance_high: Option<f32>,
    /// A picture to begin from. Without `size` and `stages` its own size, rounded down to whole cells,
    /// is the final one.
    pub init_image: Option<InitImage>,
    /// The picture that a second stage of DeepFloyd IF enlarges.
    pub lowres: Option<Lowres>,
    /// The run of the second model that the model was loaded with; its prompts, seed and picture are this request's. `None`: as that
    /// model's defaults have it.
    pub second: Option<Box<SecondRequest>>,
    /// Of each ControlNet that the model was loaded with, in their order: what it reads, and how it counts.
    pub controls: Vec<ControlInput>,
    /// Pictures that the model's IP-Adapters show the network beside the prompt, those of one adapter in this order.
    pub ip_images: Vec<IpImage>,
    /// What SDXL is told of sizes.
    pub size_ids: SizeIds,
    /// Picture i of `count` uses seed + i.
    pub seed: u64,
    pub count: usize,
    /// Pictures in one batch, at most; at least 1. They have the same bytes as those made alone.
    pub batch: usize,
    pub rng: RngKind,
    /// What stands in place of the method's own draws besides noise, for every picture; empty: it draws.
    pub choices: Choices,
    /// Which steps are made without the network. `None`: every step asks it.
    pub cache: Option<StepCache>,
}

/// The run of a second model, of whose request prompts, seed and picture are the first one's.
#[derive(Clone, Debug, PartialEq)]
pub struct SecondRequest {
    pub request: Request,
    /// As in [`Lowres`].
    pub noise_level: usize,
}

impl Default for Request {
    fn default() -> Request {
        Request {
            prompt: String::new(),
            negative_prompt: None,
            text: TextOptions::default(),
            method: Method::default(),
            size: None,
            stages: Vec::new(),
            scheduler: None,
            sigmas: None,
            eta: None,
            steps: None,
            guidance: Defaults::LATENT.guidance,
            guidance_rescale: 0.0,
            guidance_high: None,
            init_image: None,
            lowres: None,
            second: None,
            controls: Vec::new(),
            ip_images: Vec::new(),
            size_ids: SizeIds::default(),
            seed: 0,
            count: 1,
            batch: 1,
            rng: RngKind::default(),
            choices: Choices::default(),
            cache: None,
        }
    }
}

/// How prompts become what the network reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TextOptions {
    pub syntax: Syntax,
    /// What becomes of a prompt that is longer than the text encoder's context.
    pub long_prompt: LongPrompt,
    /// As webui counts: 1 is the last layer's output, n the n-th layer's from the end; then the final layer norm, which SDXL
    /// does without. `None`: the family's own, the last for SD and the last but one for SDXL.
    pub clip_skip: Option<usize>,
    /// Tokens of T5, the end token and padding included. `None`: [`T5_LENGTH`] ([`IF_T5_LENGTH`]), or what `reference_compat` asks
    /// for.
    pub t5_length: Option<usize>,
}

/// Tokens that T5 reads of a prompt, as published pipelines have it; a prompt is cut off there, or padded to it.
pub const T5_LENGTH: usize = 256;

/// The same of DeepFloyd IF's.
pub const IF_T5_LENGTH: usize = 77;

/// The same of MegaFusion's published code.
const REFERENCE_T5_LENGTH: usize = 77;

/// What SDXL is told of sizes, in pixels. `None`: the stage's own size, and no crop; a value holds for every stage. Podell
/// et al. 2023, arXiv:2307.01952, sec. 2.2.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SizeIds {
    /// Size of the picture before it was cropped and resized for training.
    pub original: Option<Size>,
    /// Left and top of the crop.
    pub crop: Option<(usize, usize)>,
    pub target: Option<Size>,
}

impl Request {
    /// [`Request::text`], with what the method's options ask for where it says nothing.
    pub(super) fn text_options(&self) -> TextOptions {
        let compat = self.method.option("reference_compat").and_then(serde_json::Value::as_bool) == Some(true);
        let t5_length = self.text.t5_length.or(compat.then_some(REFERENCE_T5_LENGTH));
        TextOptions { t5_length, ..self.text }
    }

    /// The defaults with the method and the guidance that suit a model: plain `megafusion` and 2 for the one inside the
    /// program (docs/ablations.md, models/pocket/README.md); `plain` without guidance for a model distilled to a few steps,
    /// or with what it was told, 8.5, where it reads the scale (LCM); 7 for any other, and `megafusion++`, or for a transformer,
    /// which has no convolutions to dilate, `megafusion`.
    pub fn suited_to(source: &ModelSource) -> Request {
        match source {
            ModelSource::Embedded => Request { guidance: 2.0, ..Request::default() },
            ModelSource::Modified { model, .. }
            | ModelSource::Resized { model, .. }
            | ModelSource::Prompted { model, .. } => Request::suited_to(model),
            ModelSource::Directory(_) | ModelSource::File(_) | ModelSource::Random(_) => {
                Request::with_defaults(ModelFiles::open(source).map_or(Defaults::LATENT, |files| files.defaults()))
            }
        }
    }

    pub(super) fn with_defaults(defaults: Defaults) -> Request {
        let method = match defaults.is_distilled() {
            true => Plain {}.into(),
            false if defaults.dilates => MegaFusion::plus().into(),
            false => MegaFusion::default().into(),
        };
        Request { method, guidance: defaults.guidance, ..Request::default() }
    }

    /// Which method [`suited_to`](Request::suited_to) chooses, in a sentence for a help text.
    pub fn default_method_text() -> String {
        let (inside, others) = (Request::suited_to(&ModelSource::Embedded), ModelSource::Directory("".into()));
        let others = Request::suited_to(&others);
        format!("Default: {}; {} for the model inside the program.", others.method, inside.method)
    }

    /// The run for a model with this scheduler configuration and native size.
    ///
    /// # Errors
    /// [`Error::Request`]: an option and what it would accept; [`Error::Config`] for the scheduler's configuration.
    pub(super) fn resolve(
        &self,
        config: &SchedulerConfig,
        native: Option<Size>,
        sides: Sides,
        defaults: Defaults,
    ) -> Result<Run> {
        if self.count == 0 {
            return Err(refused("count", self.count, "expected at least 1"));
        }
        self.check_guidance()?;
        let guided = defaults.guides(self.guidance);
        if !(0.0..=1.0).contains(&self.guidance_rescale) {
            return Err(refused("guidance_rescale", self.guidance_rescale, "expected 0 (none) to 1"));
        }
        let unguided = match defaults.embeds_guidance {
            true => "has no effect with this model, which is told its guidance scale".to_string(),
            false => format!("has no effect with request.guidance {}; up to 1 there is no guidance", self.guidance),
        };
        if self.guidance_rescale > 0.0 && !guided {
            return Err(refused("guidance_rescale", self.guidance_rescale, unguided));
        }
        if let Some(negative) = self.negative_prompt.as_ref().filter(|text| !text.is_empty())
            && defaults.embeds_guidance
        {
            return Err(refused("negative_prompt", format!("{negative:?}"), unguided));
        }
        let stages = self.resolve_stages(native, sides, defaults)?;
        let steps = self.method.scheduled_steps(&stages);
        if let Some(asked) = self.steps.filter(|&asked| asked != steps) {
            return Err(refused(
                "steps",
                asked,
                format!("the request.stages have {steps} steps; leave one of the two out"),
            ));
        }
        let sampler = self.scheduler.or(defaults.sampler);
        let sampler = sampler.unwrap_or_else(|| self.method.implementation().sampler(config));
        let own_eta = if sampler == Sampler::Ddim { self.method.implementation().eta() } else { 0.0 };
        let eta = self.eta.unwrap_or(own_eta);
        let scheduler = Scheduler::new(&config.clone().with_sigmas(self.sigmas), sampler, steps, eta)?;
        let guidance = guided.then_some(self.guidance);
        let run = Run::for_native(self.method.clone(), stages, scheduler, guidance, sides, native)?;
        let run = match &self.init_image {
            None => run,
            Some(init) => run.starting(start_of(init, &self.method, steps)?)?,
        };
        self.controls.iter().try_for_each(ControlInput::check)?;
        for control in &self.controls {
            let made = run.stages().iter().zip(run.ranges()).enumerate().filter(|(_, (_, range))| !range.is_empty());
            control.image.check(made.map(|(index, (stage, _))| (index, stage.size)))?;
        }
        let shares = |control: &ControlInput| ControlShares { start: control.start, end: control.end };
        run.with_guidance(vec![self.guidance_scale()])
            .with_controls(self.controls.iter().map(shares).collect())
            .published_as(defaults.published)
            .with_guidance_high(self.guidance_high)?
            .with_choices(self.choices.clone())?
            .with_cache(self.cache.clone())
    }

    /// Does each picture decide for itself which of its steps are computed, so that none shares a batch?
    pub fn one_at_a_time(&self) -> bool {
        self.cache.as_ref().is_some_and(StepCache::decides_by_picture)
    }

    /// Pictures that are made in one batch, at most.
    pub fn most_at_once(&self) -> usize {
        if self.one_at_a_time() { 1 } else { self.batch.max(1) }
    }

    pub(super) fn guidance_scale(&self) -> GuidanceScale {
        GuidanceScale { scale: self.guidance, rescale: self.guidance_rescale }
    }

    /// # Errors
    /// [`Error::Request`]: not a guidance scale.
    pub(super) fn check_guidance(&self) -> Result<()> {
        match self.guidance.is_finite() && self.guidance >= 0.0 {
            true => Ok(()),
            false => Err(refused("guidance", self.guidance, "expected a number from 0; up to 1 means no guidance")),
        }
    }

    /// Without what makes no difference to the cost: words, seed, the pixels that are enlarged, and how strong a guidance is.
    pub(super) fn without_words(&self) -> Request {
        let guidance = if self.is_guided() { 2.0 } else { 1.0 };
        let lowres = self.lowres.as_ref().map(Lowres::without_pixels);
        Request { prompt: String::new(), negative_prompt: None, seed: 0, guidance, lowres, ..self.clone() }
    }

    /// Is the scale one of classifier-free guidance? So there is a negative prompt, unless the model is told the scale.
    pub fn is_guided(&self) -> bool {
        self.guidance > 1.0
    }

    /// Do the two differ in words, guidance scale, seed, enlarged picture and counts alone? One without guidance is no neighbour of
    /// one with.
    pub fn fits_into_batch_of(&self, other: &Request) -> bool {
        let alike = |request: &Request| Request { count: 1, batch: 1, ..request.without_words() };
        alike(self) == alike(other)
    }

    fn resolve_stages(&self, native: Option<Size>, sides: Sides, defaults: Defaults) -> Result<Vec<Stage>> {
        if let Some(last) = self.stages.last() {
            if let Some(size) = self.size.filter(|&size| size != last.size) {
                return Err(refused(
                    "size",
                    size,
                    format!("the last of request.stages is {}; leave one of the two out", last.size),
                ));
            }
            return Ok(self.stages.clone());
        }
        let steps = self.steps.unwrap_or(defaults.steps);
        if steps == 0 {
            return Err(refused("steps", steps, "expected at least 1"));
        }
        let own = |init: &InitImage| {
            let Size { width, height } = init.picture.size();
            // Below one cell: the method's check names the size.
            let multiple = sides.multiple();
            let whole = |side: usize| if side < multiple { side } else { side / multiple * multiple };
            Size::new(whole(width), whole(height))
        };
        let own = self.init_image.as_ref().map(own);
        // The network makes no first stage: none of a size that it was trained at is needed.
        let replaced = own.filter(|_| self.method.in_place_of_first_stage().is_some());
        let (size, native) = match (self.size.or(own), native.or(replaced)) {
            (Some(size), Some(native)) => (size, native),
            (None, Some(native)) => {
                let size = match defaults.relayed_size.filter(|_| self.method.spec().relays) {
                    Some(times) => native.times(times),
                    None => self.method.implementation().default_size(native),
                };
                (size, native)
            }
            (Some(size), None) if !self.method.spec().relays => (size, size),
            (Some(size), None) => {
                let reason = "the model's configuration has no sample_size to plan stages from; name request.stages";
                return Err(refused("size", size, reason));
            }
            (None, None) => {
                let reason = "the model's configuration has no sample_size; name the size, or request.stages";
                return Err(refused("size", "(none)", reason));
            }
        };
        let Defaults { relay_growth, relayed_share, .. } = defaults;
        let geometry = Geometry { size, native, sides, steps, relay_growth, relayed_share };
        match replaced {
            Some(picture) => self.method.implementation().stages_from_picture(&geometry, picture),
            None => self.method.implementation().stages(&geometry),
        }
    }
}

/// The step at which a run of `steps` begins.
///
/// # Errors
/// [`Error::Request`]: a strength outside 0 to 1, or one that leaves no step, or any of a method that has none.
fn start_of(init: &InitImage, method: &Method, steps: usize) -> Result<Start> {
    let strength = match (method.in_place_of_first_stage(), init.strength, init.strength_with(method)) {
        (Some(by), Some(given), _) => {
            let reason = format!("{by} says how much {method} makes anew of a picture; leave request.strength out");
            return Err(refused("strength", given, reason));
        }
        (_, _, Some(strength)) => strength,
        _ => return Ok(Start { step: 0, noise_only: false, repaints: init.mask.is_some() }),
    };
    if !(0.0..=1.0).contains(&strength) {
        return Err(refused("strength", strength, "expected 0 (the picture as it is) to 1 (all steps)"));
    }
    Start::new(strength, steps, init.mask.is_some()).ok_or_else(|| {
        let reason = format!("leaves none of the {steps} steps; expected at least {}", 1.0 / steps as f64);
        refused("strength", strength, reason)
    })
}

fn refused(field: &'static str, value: impl ToString, reason: impl Into<String>) -> Error {
    Error::Request { field, value: value.to_string(), reason: reason.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_code_reads_77_tokens_of_t5() {
        let length = |reference_compat, t5_length| {
            let method = MegaFusion { reference_compat, ..MegaFusion::plus() }.into();
            let text = TextOptions { t5_length, ..TextOptions::default() };
            Request { method, text, ..Request::default() }.text_options().t5_length
        };
        assert_eq!([length(false, None), length(true, None)], [None, Some(77)]);
        assert_eq!([length(false, Some(128)), length(true, Some(128))], [Some(128); 2]);
    }
}
