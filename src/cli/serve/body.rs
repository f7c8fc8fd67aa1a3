//! What a client asks for, as JSON, and the requests that it becomes.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use megafuse::pipeline::{
    InitImage, InputPicture, LongPrompt, METHODS, Method, MethodSpec, OptionKind, Request, RngKind, Sampler,
    SigmaSpacing, Size, SizeIds, Stage, Syntax, TextOptions, text_of, without_effect,
};
use megafuse::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::super::method_options::MethodOptions;
use super::super::picture_args::by_method;
use super::super::values;

/// A prompt in bytes, at most. Text encoders read 77 to 512 tokens.
const LONGEST_PROMPT: usize = 20_000;
/// What a seed is.
const SEED: &str = "a whole number from 0, or -1 for one that is drawn";

/// What the server may be asked for.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Pixels of a stage, and of a picture that a run begins from.
    pub pixels: u64,
    pub steps: usize,
    /// Pictures of one job.
    pub count: usize,
}

/// What the server's flags say of every request.
pub struct Base {
    pub request: Request,
    /// Of any method.
    pub options: MethodOptions,
    pub limits: Limits,
}

/// A job. Fields are those of a picture's own JSON text, which may be posted as it is (of what a run read beside its prompt, and of step
/// caches, a warning says that it is not read); what is left out is as the server's flags say.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(default)]
pub struct PictureBody {
    /// What the picture shows.
    pub prompt: String,
    /// What guidance steers away from. An empty one counts as none, unless `negative_prompt_is_empty` is true.
    pub negative_prompt: Option<String>,
    /// One of the server's models; left out: its default.
    pub model: Option<String>,
    /// `megafusion`, `hidiffusion`, ... A method's own options are fields beside it: `dilation`, `view_batch`, ...
    pub method: Option<String>,
    /// Width x height in pixels, like `1024x1024`.
    pub size: Option<String>,
    /// Sizes and steps: `512x512:40,1024x1024:10`, or a list of such.
    #[schema(value_type = Option<Vec<String>>)]
    pub stages: Option<OneOrMore>,
    pub steps: Option<usize>,
    pub guidance: Option<f64>,
    pub guidance_rescale: Option<f64>,
    pub guidance_high: Option<f64>,
    pub scheduler: Option<String>,
    pub sigmas: Option<String>,
    pub eta: Option<f64>,
    pub clip_skip: Option<usize>,
    pub prompt_syntax: Option<String>,
    pub long_prompt: Option<String>,
    pub t5_length: Option<usize>,
    pub original_size: Option<String>,
    pub crop: Option<String>,
    pub target_size: Option<String>,
    pub rng: Option<String>,
    /// Of the first picture, the others have the next ones. Left out, or -1: one is drawn and told.
    #[schema(value_type = Option<i64>)]
    pub seed: Option<Value>,
    /// How many pictures.
    pub count: Option<usize>,
    /// A PNG, JPEG or WebP in base64, or a data URL: a picture to begin from.
    pub init_image: Option<String>,
    /// The same: white is made anew.
    pub mask: Option<String>,
    /// How much of the schedule is run, 0 to 1.
    pub strength: Option<f64>,
    /// -10 to 10: each level is worth 30 seconds of waiting, among the client's own jobs.
    pub priority: Option<i32>,
    /// The job fails when it is not finished after so many seconds.
    pub deadline_seconds: Option<f64>,
    /// Options of methods; others are told in a warning.
    #[serde(flatten)]
    #[schema(ignore)]
    pub rest: Map<String, Value>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(untagged)]
pub enum OneOrMore {
    One(String),
    More(Vec<String>),
}

/// Fields of a picture's JSON that say how it was made on its machine, or that follow from others.
const PASSED_OVER: [&str; 7] =
    ["version", "device", "dtype", "negative_prompt_is_empty", "cache_computed", "init_image_digest", "mask_digest"];

impl PictureBody {
    /// What another API asks for, as fields of a job, and over these its field `megafuse`. Who names stages there names size and steps
    /// with them, and the other way round.
    ///
    /// # Errors
    /// [`Error::Request`]: a field of `megafuse` is of another kind.
    pub fn of(mut fields: Value, own: &Map<String, Value>) -> Result<PictureBody> {
        let left_out: &[&str] =
            match (own.contains_key("stages"), own.contains_key("size") || own.contains_key("steps")) {
                (true, _) => &["size", "steps"],
                (false, true) => &["stages"],
                (false, false) => &[],
            };
        left_out.iter().for_each(|name| fields[*name] = Value::Null);
        own.iter().for_each(|(name, value)| fields[name] = value.clone());
        serde_json::from_value(fields)
            .map_err(|error| wrong("megafuse", "given", format!("{error}; expected the fields of a job")))
    }

    /// One request for each picture, and what was odd.
    ///
    /// # Errors
    /// [`Error::Request`], naming the field.
    pub fn requests(&self, base: &Base) -> Result<(Vec<Request>, Vec<String>)> {
        let mut warnings = Vec::new();
        for (field, text) in [("prompt", Some(&self.prompt)), ("negative_prompt", self.negative_prompt.as_ref())] {
            if let Some(text) = text.filter(|text| text.len() > LONGEST_PROMPT) {
                return Err(wrong(
                    field,
                    format!("of {} bytes", text.len()),
                    format!("at most {LONGEST_PROMPT} are read"),
                ));
            }
        }
        let count = self.count.unwrap_or(1);
        if !(1..=base.limits.count).contains(&count) {
            return Err(wrong("count", count, format!("expected 1 to {}, this server's limit", base.limits.count)));
        }
        let seed = self.first_seed(count)?;
        let request = self.request(base, &mut warnings)?;
        let of = |index: u64| Request { seed: seed + index, ..request.clone() };
        Ok(((0..count as u64).map(of).collect(), warnings))
    }

    /// How long the client wants to wait, and its priority.
    ///
    /// # Errors
    /// [`Error::Request`], naming the field.
    pub fn urgency(&self) -> Result<(i32, Option<Duration>)> {
        let priority = self.priority.unwrap_or(0);
        if !(-10..=10).contains(&priority) {
            return Err(wrong("priority", priority, "expected -10 to 10"));
        }
        let patience = match self.deadline_seconds {
            None => None,
            Some(seconds) if seconds > 0.0 && seconds <= 1e7 => Some(Duration::from_secs_f64(seconds)),
            Some(seconds) => return Err(wrong("deadline_seconds", seconds, "expected a number of seconds above 0")),
        };
        Ok((priority, patience))
    }

    fn first_seed(&self, count: usize) -> Result<u64> {
        let text = match &self.seed {
            None | Some(Value::Null) => "-1".to_string(),
            Some(Value::Number(number)) => number.to_string(),
            Some(Value::String(text)) => text.clone(),
            Some(other) => return Err(wrong("seed", other, format!("expected {SEED}"))),
        };
        let seed = values::seed(&text).map_err(|_| wrong("seed", &text, format!("expected {SEED}")))?;
        match seed.checked_add(count as u64 - 1) {
            Some(_) => Ok(seed),
            None => Err(wrong("seed", seed, format!("with a count of {count} the last seed would exceed 2^64 - 1"))),
        }
    }

    fn request(&self, base: &Base, warnings: &mut Vec<String>) -> Result<Request> {
        let flags = &base.request;
        let stages = match &self.stages {
            None => None,
            Some(OneOrMore::One(text)) => Some(text.clone()),
            Some(OneOrMore::More(list)) => Some(list.join(",")),
        };
        let stages: Option<Vec<Stage>> = match stages {
            None => None,
            Some(text) => Some(values::stages(&text).map_err(|reason| wrong("stages", &text, reason))?.0),
        };
        let steps = parsed("steps", self.steps, values::steps)?;
        let size: Option<Size> = parsed("size", self.size.as_ref(), values::library)?;
        // Stages have their sizes and steps (a picture's JSON has all three), and who names a size or steps wants stages planned for them:
        // of the flags' stages only the size and the steps are left then.
        let (stages, size, steps) = match (stages, flags.stages.last()) {
            (Some(stages), _) => (stages, None, None),
            (None, Some(last)) if size.is_some() || steps.is_some() => {
                let of_flags = flags.stages.iter().map(|stage| stage.steps).sum();
                (Vec::new(), Some(size.unwrap_or(last.size)), Some(steps.unwrap_or(of_flags)))
            }
            (None, _) => (flags.stages.clone(), size.or(flags.size), steps.or(flags.steps)),
        };
        let number = |value: Option<f64>| value.map(|value| value as f32);
        let text = TextOptions {
            clip_skip: parsed("clip_skip", self.clip_skip, values::clip_skip)?.or(flags.text.clip_skip),
            syntax: parsed("prompt_syntax", self.prompt_syntax.as_ref(), values::library::<Syntax>)?
                .unwrap_or(flags.text.syntax),
            long_prompt: parsed("long_prompt", self.long_prompt.as_ref(), values::library::<LongPrompt>)?
                .unwrap_or(flags.text.long_prompt),
            t5_length: parsed("t5_length", self.t5_length, values::t5_length)?.or(flags.text.t5_length),
        };
        let size_ids = SizeIds {
            original: parsed("original_size", self.original_size.as_ref(), values::library)?
                .or(flags.size_ids.original),
            crop: parsed("crop", self.crop.as_ref(), values::crop)?.or(flags.size_ids.crop),
            target: parsed("target_size", self.target_size.as_ref(), values::library)?.or(flags.size_ids.target),
        };
        let request = Request {
            prompt: self.prompt.clone(),
            negative_prompt: self.own_negative().or_else(|| flags.negative_prompt.clone()),
            text,
            size_ids,
            size,
            stages,
            steps,
            guidance: parsed("guidance", number(self.guidance), values::guidance)?.unwrap_or(flags.guidance),
            guidance_rescale: parsed("guidance_rescale", number(self.guidance_rescale), values::guidance_rescale)?
                .unwrap_or(flags.guidance_rescale),
            guidance_high: parsed("guidance_high", number(self.guidance_high), values::guidance_high)?
                .or(flags.guidance_high),
            scheduler: parsed("scheduler", self.scheduler.as_ref(), sampler)?.or(flags.scheduler),
            sigmas: parsed("sigmas", self.sigmas.as_ref(), values::library::<SigmaSpacing>)?.or(flags.sigmas),
            eta: parsed("eta", self.eta, values::eta)?.or(flags.eta),
            rng: parsed("rng", self.rng.as_ref(), values::library::<RngKind>)?.unwrap_or(flags.rng),
            init_image: self.init_image(base)?.or_else(|| flags.init_image.clone()),
            count: 1,
            ..flags.clone()
        };
        let spec = parsed("method", self.method.as_ref(), values::method)?;
        let request = match spec {
            Some(spec) if spec.name != flags.method.name() => by_method(&request, spec)?,
            _ => request,
        };
        let method = self.method(request.method.spec(), &request, base, warnings)?;
        let mut request = Request { method, ..request };
        if !request.is_guided() && self.negative_prompt.as_ref().is_some_and(|negative| !negative.is_empty()) {
            let guidance = request.guidance;
            warnings.push(format!(
                "negative_prompt has no effect with a guidance of {guidance}; up to 1 there is no guidance"
            ));
            request.negative_prompt = None;
        }
        Ok(request)
    }

    /// The method with the server's options, and over them the client's.
    fn method(
        &self,
        spec: &'static MethodSpec,
        request: &Request,
        base: &Base,
        warnings: &mut Vec<String>,
    ) -> Result<Method> {
        let mut options = base.options.clone();
        for (name, value) in &self.rest {
            let Some(option) = METHODS.iter().find_map(|spec| spec.option(name)) else {
                if !PASSED_OVER.contains(&name.as_str()) {
                    warnings.push(format!("{name} is not read: no field of a request and no option of a method"));
                }
                continue;
            };
            if !spec.reads(name, &request.stages) {
                return Err(without_effect(option.name, value, &[spec]));
            }
            let value = match (option.kind, value) {
                (_, Value::Null) | (OptionKind::Switch, Value::Bool(false)) => continue,
                (OptionKind::Switch, value) if *value != Value::Bool(true) => {
                    return Err(wrong(option.name, value, "expected true or false"));
                }
                (kind, value) => {
                    kind.parse(&text_of(value)).map_err(|reason| wrong(option.name, text_of(value), reason))?
                }
            };
            options.given.insert(name.clone(), value);
        }
        options.of(spec, &request.stages)
    }

    /// A picture's JSON has an empty one also where there was none, and says so where it was given.
    fn own_negative(&self) -> Option<String> {
        let is_empty = self.rest.get("negative_prompt_is_empty") == Some(&Value::Bool(true));
        self.negative_prompt.clone().filter(|text| !text.is_empty() || is_empty)
    }

    fn init_image(&self, base: &Base) -> Result<Option<InitImage>> {
        let strength = parsed("strength", self.strength, values::strength)?;
        let Some(text) = &self.init_image else {
            let reason = "is of a run from a picture; give init_image too";
            return match (&self.mask, strength) {
                (Some(_), _) => Err(wrong("mask", "given", reason)),
                (None, Some(strength)) => Err(wrong("strength", strength, reason)),
                (None, None) => Ok(None),
            };
        };
        let most_pixels = base.limits.pixels;
        let mask = self.mask.as_ref().map(|mask| picture("mask", mask, most_pixels)).transpose()?;
        Ok(Some(InitImage { picture: picture("init_image", text, most_pixels)?, mask, strength }))
    }
}

/// A PNG, JPEG or WebP in base64.
fn picture(field: &'static str, text: &str, most_pixels: u64) -> Result<InputPicture> {
    InputPicture::decode(field, &decoded(field, text)?, most_pixels).map_err(|error| match error {
        Error::File { reason, .. } => wrong(field, "given", reason),
        other => other,
    })
}

/// A file in base64, with the beginning of a data URL or without.
///
/// # Errors
/// [`Error::Request`], naming the field.
pub fn decoded(field: &'static str, text: &str) -> Result<Vec<u8>> {
    let coded = match text.split_once(";base64,") {
        Some((kind, coded)) if kind.starts_with("data:") => coded,
        _ => text,
    };
    let bytes = STANDARD.decode(coded.trim());
    bytes.map_err(|error| wrong(field, "given", format!("is not base64 ({error}); expected a picture file in it")))
}

/// Samplers by this program's names and others'.
pub fn sampler(text: &str) -> std::result::Result<Sampler, String> {
    let known = |sampler: &Sampler| {
        let is = |name: &str| name.eq_ignore_ascii_case(text);
        is(sampler.name()) || is(sampler.webui_name()) || sampler.aliases().iter().any(|alias| is(alias))
    };
    Sampler::ALL.into_iter().find(known).ok_or_else(|| {
        let names: Vec<&str> = Sampler::ALL.iter().map(|sampler| sampler.name()).collect();
        format!("is unknown; expected one of {}", names.join(", "))
    })
}

/// A field as the command line's parsers read it.
fn parsed<V: ToString, T>(
    field: &'static str,
    value: Option<V>,
    parse: impl Fn(&str) -> std::result::Result<T, String>,
) -> Result<Option<T>> {
    let Some(text) = value.map(|value| value.to_string()) else { return Ok(None) };
    parse(&text).map(Some).map_err(|reason| wrong(field, &text, reason))
}

pub fn wrong(field: &'static str, value: impl ToString, reason: impl Into<String>) -> Error {
    Error::Request { field, value: value.to_string(), reason: reason.into() }
}

/// An error in the words of the JSON: its fields are called as the library's request calls them.
pub fn api_text(error: &Error) -> String {
    match error {
        Error::Request { field, .. } if field.starts_with("--") => {
            error.to_string().replacen(field, &field.trim_start_matches('-').replace('-', "_"), 1)
        }
        other => other.to_string(),
    }
    .replace("request.", "")
}

#[cfg(test)]
mod tests {
    use megafuse::pipeline::MegaFusion;
    use serde_json::json;

    use super::*;

    fn base(request: Request) -> Base {
        let limits = Limits { pixels: 1 << 20, steps: 100, count: 4 };
        Base { request, options: MethodOptions::default(), limits }
    }

    fn read(json: serde_json::Value, base: &Base) -> Request {
        let body: PictureBody = serde_json::from_value(json).unwrap();
        body.requests(base).unwrap().0.remove(0)
    }

    fn stages(text: &str) -> Vec<Stage> {
        values::stages(text).unwrap().0
    }

    #[test]
    fn what_a_request_says_of_its_size_stands_in_place_of_the_flags() {
        let less_stages = |request| Request { stages: Vec::new(), ..request };
        let staged = || Request {
            stages: stages("64x64:40,128x128:10"),
            method: MegaFusion::default().into(),
            ..Request::default()
        };
        let sized = || Request { size: Some(Size::new(128, 64)), steps: Some(9), ..less_stages(staged()) };
        type Geometry = (Vec<Stage>, Option<Size>, Option<usize>);
        let geometry = |json: serde_json::Value, flags: Request| -> Geometry {
            let Request { stages, size, steps, .. } = read(json, &base(flags));
            (stages, size, steps)
        };
        let size = |width, height| Some(Size::new(width, height));
        assert_eq!(geometry(json!({}), staged()), (staged().stages, None, None));
        assert_eq!(geometry(json!({"steps": 20}), staged()), (Vec::new(), size(128, 128), Some(20)));
        assert_eq!(geometry(json!({"size": "256x64"}), staged()), (Vec::new(), size(256, 64), Some(50)));
        assert_eq!(geometry(json!({}), sized()), (Vec::new(), size(128, 64), Some(9)));
        assert_eq!(geometry(json!({"steps": 20}), sized()), (Vec::new(), size(128, 64), Some(20)));
        let own = stages("64x64:5,96x96:1");
        for flags in [staged(), sized()] {
            for named in [json!("64x64:5,96x96:1"), json!(["64x64:5", "96x96:1"])] {
                let json = json!({"stages": named, "size": "96x96", "steps": 6});
                assert_eq!(geometry(json, flags.clone()), (own.clone(), None, None));
            }
        }
    }

    #[test]
    fn options_of_methods_are_fields() {
        let flags = base(Request { method: MegaFusion::default().into(), ..Request::default() });
        let given = |value: serde_json::Value| read(json!({"method": "megafusion", "dilation": value}), &flags).method;
        assert_eq!(given(json!(3)).option("dilation"), Some(&json!(3)));
        assert_eq!(given(json!("3")), given(json!(3)));
        assert_eq!(given(json!(null)), read(json!({"method": "megafusion"}), &flags).method);
    }

    #[test]
    fn seeds_are_drawn_where_none_is_named() {
        let flags = base(Request::default());
        let seed = |json: serde_json::Value| read(json, &flags).seed;
        assert_eq!((seed(json!({"seed": 7})), seed(json!({"seed": "18446744073709551615"}))), (7, u64::MAX));
        let drawn = [json!({}), json!({"seed": -1}), json!({"seed": null}), json!({"seed": "random"})].map(seed);
        assert!(drawn.iter().all(|seed| *seed <= u64::from(u32::MAX)) && drawn[0] != drawn[1], "{drawn:?}");
    }
}
