//! The API of stable-diffusion-webui, as its clients ask it. Fields that mean nothing here are passed over, as webui does it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{ConnectInfo, State};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use megafuse::image::read_png_texts_of;
use megafuse::pipeline::{Sampler, SigmaSpacing, Size, Stage};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::body::{PictureBody, decoded, sampler, wrong};
use super::guard::{Problem, Refusals, client_of};
use super::jobs::State as JobState;
use super::jobs_api::read;
use super::{App, Model, png_of, submit};

/// webui's share of the second pass.
const DENOISE: f64 = 0.7;
/// Its share of a picture that a run begins from.
const STRENGTH: f64 = 0.75;
/// Its steps and size, where neither request, flags nor model name any.
const STEPS: usize = 50;
const SIZE: Size = Size { width: 512, height: 512 };

pub fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new()
        .routes(routes!(txt2img))
        .routes(routes!(img2img))
        .routes(routes!(progress))
        .routes(routes!(interrupt))
        .routes(routes!(samplers))
        .routes(routes!(schedulers))
        .routes(routes!(sd_models))
        .routes(routes!(options, set_options))
        .routes(routes!(png_info))
        .routes(routes!(cmd_flags))
        .routes(routes!(upscalers))
        .routes(routes!(loras))
}

/// webui's fields. `megafuse` holds those of a job (POST /v1/jobs), which stand over all others.
#[derive(Clone, Default, Deserialize, ToSchema)]
#[serde(default)]
struct WebuiBody {
    prompt: String,
    negative_prompt: Option<String>,
    /// -1: drawn and returned.
    #[schema(value_type = Option<i64>)]
    seed: Option<Value>,
    steps: Option<usize>,
    cfg_scale: Option<f64>,
    width: Option<usize>,
    height: Option<usize>,
    /// `Euler a`; a schedule behind it (`DPM++ 2M Karras`) is read.
    sampler_name: Option<String>,
    sampler_index: Option<String>,
    /// `Automatic`, `Karras`, `Exponential`.
    scheduler: Option<String>,
    batch_size: Option<usize>,
    n_iter: Option<usize>,
    eta: Option<f64>,
    /// Method hires-fix: the picture at width x height, enlarged, its last steps made again.
    enable_hr: bool,
    hr_scale: Option<f64>,
    hr_resize_x: usize,
    hr_resize_y: usize,
    hr_second_pass_steps: usize,
    denoising_strength: Option<f64>,
    /// Of img2img, in base64: the first is read.
    init_images: Vec<String>,
    mask: Option<String>,
    send_images: Option<bool>,
    #[schema(value_type = Object)]
    override_settings: Map<String, Value>,
    #[schema(value_type = Object)]
    megafuse: Map<String, Value>,
}

impl WebuiBody {
    /// As a job; `begins`: from a picture.
    fn job(&self, app: &App, begins: bool) -> Result<PictureBody, Problem> {
        let model = match self.override_settings.get("sd_model_checkpoint").and_then(Value::as_str) {
            Some(title) => titled(app, title)?,
            None => app.chosen.load(Ordering::Relaxed),
        };
        let model = &app.models[model];
        let (scheduler, sigmas) = self.sampler()?;
        let count = self.batch_size.unwrap_or(1).saturating_mul(self.n_iter.unwrap_or(1));
        let size = match (self.width, self.height) {
            (None, None) => None,
            (width, height) => Some(Size::new(width.or(height).unwrap_or(0), height.or(width).unwrap_or(0))),
        };
        let mut fields = json!({
            "model": &*model.name, "prompt": self.prompt, "negative_prompt": self.negative_prompt,
            "seed": self.seed, "steps": self.steps, "guidance": self.cfg_scale, "size": size.map(|size| size.to_string()),
            // Clients send one with every sampler, and webui reads it with those that have one.
            "eta": self.eta.filter(|_| scheduler == Some(Sampler::Ddim)),
            "scheduler": scheduler.map(Sampler::name), "sigmas": sigmas.map(|spacing| spacing.to_string()), "count": count,
        });
        if begins {
            let Some(image) = self.init_images.first() else {
                return Err(wrong("init_images", "(none)", "expected a picture in base64").into());
            };
            (fields["init_image"], fields["mask"]) = (image.as_str().into(), self.mask.as_deref().into());
            fields["strength"] = self.denoising_strength.unwrap_or(STRENGTH).into();
        } else if self.enable_hr {
            fields["method"] = "hires-fix".into();
            fields["stages"] = self.passes(model, size)?.map(|stage| stage.to_string()).to_vec().into();
        }
        Ok(PictureBody::of(fields, &self.megafuse)?)
    }

    /// The two passes of hires fix.
    fn passes(&self, model: &Model, size: Option<Size>) -> Result<[Stage; 2], Problem> {
        let first = size.or(model.native).unwrap_or(SIZE);
        let scale = self.hr_scale.unwrap_or(2.0);
        if !(1.0..=16.0).contains(&scale) {
            return Err(wrong("hr_scale", scale, "expected 1 to 16").into());
        }
        let scaled = |side: usize| (side as f64 * scale) as usize;
        // A side that is 0 follows from the other, as webui has it.
        let of = |side: usize, from: usize, to: usize| side.saturating_mul(to) / from.max(1);
        let last = match (self.hr_resize_x, self.hr_resize_y) {
            (0, 0) => Size::new(scaled(first.width), scaled(first.height)),
            (x, 0) => Size::new(x, of(x, first.width, first.height)),
            (0, y) => Size::new(of(y, first.height, first.width), y),
            (x, y) => Size::new(x, y),
        };
        let denoise = self.denoising_strength.unwrap_or(DENOISE);
        if !(denoise > 0.0 && denoise <= 1.0) {
            return Err(wrong("denoising_strength", denoise, "expected a number above 0, at most 1").into());
        }
        let steps = self.steps.or(model.base.request.steps).unwrap_or(STEPS);
        let again = ((steps as f64 * denoise) as usize).max(1);
        Ok([Stage::new(first, steps), Stage::new(last, again)])
    }

    /// The sampler and how its noise levels are spaced, by this program's names.
    fn sampler(&self) -> Result<(Option<Sampler>, Option<SigmaSpacing>), Problem> {
        let spacing = |name: &str| {
            SigmaSpacing::ALL.iter().copied().find(|spacing| spacing.webui_name().eq_ignore_ascii_case(name))
        };
        let mut sigmas = match self.scheduler.as_deref() {
            None | Some("" | "Automatic" | "automatic") => None,
            Some(name) => Some(spacing(name).ok_or_else(|| {
                let names: Vec<&str> = SigmaSpacing::ALL.iter().map(|spacing| spacing.webui_name()).collect();
                wrong("scheduler", format!("{name:?}"), format!("is unknown; expected Automatic, {}", names.join(", ")))
            })?),
        };
        let Some(name) = self.sampler_name.as_ref().or(self.sampler_index.as_ref()).filter(|name| !name.is_empty())
        else {
            return Ok((None, sigmas));
        };
        let found = sampler(name).or_else(|reason| {
            let (name, last) = name.rsplit_once(' ').ok_or_else(|| reason.clone())?;
            let of_name = spacing(last).ok_or(reason)?;
            sigmas = sigmas.or(Some(of_name));
            sampler(name)
        });
        let found = found.map_err(|reason| wrong("sampler_name", format!("{name:?}"), reason))?;
        Ok((Some(found), sigmas))
    }
}

/// Which model has this title, `name` or `name [hash]`; an empty one is the one that was chosen.
///
/// # Errors
/// There is none of this name.
fn titled(app: &App, title: &str) -> Result<usize, Problem> {
    match title.split(" [").next().unwrap_or_default() {
        "" => Ok(app.chosen.load(Ordering::Relaxed)),
        name => app.named(Some(name)),
    }
}

async fn make(app: Arc<App>, client: String, body: WebuiBody, begins: bool) -> Result<Json<Value>, Problem> {
    let job = body.job(&app, begins)?;
    let mut awaited = submit(&app, job, client).await?;
    let status = awaited.over().await?;
    let mut images = Vec::new();
    for picture in &status.pictures {
        if body.send_images.unwrap_or(true) {
            images.push(STANDARD.encode(png_of(&app, &picture.url).await?));
        }
    }
    let first = &status.pictures[0];
    let of = |field: &str| first.parameters[field].clone();
    let each = |value: &dyn Fn(usize) -> Value| (0..status.pictures.len()).map(value).collect::<Vec<_>>();
    let info = json!({
        "prompt": of("prompt"), "all_prompts": each(&|_| of("prompt")),
        "negative_prompt": of("negative_prompt"), "all_negative_prompts": each(&|_| of("negative_prompt")),
        "seed": first.seed, "all_seeds": each(&|i| status.pictures[i].seed.into()),
        "subseed": first.seed, "all_subseeds": each(&|i| status.pictures[i].seed.into()), "subseed_strength": 0,
        "width": first.width, "height": first.height, "steps": of("steps"), "cfg_scale": of("guidance"),
        "sampler_name": webui_sampler(&of("scheduler")), "batch_size": status.pictures.len(),
        "denoising_strength": body.denoising_strength, "sd_model_name": status.model, "index_of_first_image": 0,
        "infotexts": each(&|i| status.pictures[i].infotext.clone().into()),
        "warnings": status.warnings, "megafuse": {"job": status.id, "parameters": first.parameters},
    });
    let parameters = json!({
        "prompt": body.prompt, "negative_prompt": body.negative_prompt, "seed": body.seed, "steps": body.steps,
        "cfg_scale": body.cfg_scale, "width": body.width, "height": body.height, "sampler_name": body.sampler_name,
        "batch_size": body.batch_size, "n_iter": body.n_iter, "enable_hr": body.enable_hr,
        "denoising_strength": body.denoising_strength,
    });
    Ok(Json(json!({"images": images, "parameters": parameters, "info": info.to_string()})))
}

fn webui_sampler(name: &Value) -> Value {
    let sampler = name.as_str().and_then(|name| name.parse::<Sampler>().ok());
    sampler.map_or(name.clone(), |sampler| sampler.webui_name().into())
}

/// Make pictures from a prompt.
#[utoipa::path(post, path = "/sdapi/v1/txt2img", tag = "webui", request_body = WebuiBody, responses(
    (status = 200, description = "images in base64, parameters, and info as JSON in a string."),
    Refusals,
))]
async fn txt2img(
    State(app): State<Arc<App>>,
    address: ConnectInfo<SocketAddr>,
    body: Result<Json<WebuiBody>, JsonRejection>,
) -> Result<Json<Value>, Problem> {
    make(app, client_of(address), read(body)?, false).await
}

/// Make pictures from a picture.
#[utoipa::path(post, path = "/sdapi/v1/img2img", tag = "webui", request_body = WebuiBody, responses(
    (status = 200, description = "images in base64, parameters, and info as JSON in a string."),
    Refusals,
))]
async fn img2img(
    State(app): State<Arc<App>>,
    address: ConnectInfo<SocketAddr>,
    body: Result<Json<WebuiBody>, JsonRejection>,
) -> Result<Json<Value>, Problem> {
    make(app, client_of(address), read(body)?, true).await
}

/// Where the present job stands.
#[utoipa::path(get, path = "/sdapi/v1/progress", tag = "webui", responses((status = 200, description = "progress from 0 to 1.")))]
async fn progress(State(app): State<Arc<App>>) -> Json<Value> {
    let current = app.jobs.current().filter(|status| status.state == JobState::Running);
    let (waiting, none) = (app.jobs.waiting(), String::new());
    let Some(status) = current else {
        let state = json!({"skipped": false, "interrupted": false, "stopping_generation": false, "job": none, "job_count": waiting,
                           "job_timestamp": "0", "job_no": 0, "sampling_step": 0, "sampling_steps": 0});
        return Json(
            json!({"progress": 0.0, "eta_relative": 0.0, "state": state, "current_image": null, "textinfo": null}),
        );
    };
    let done = status.made as f64 + status.step as f64 / status.steps.max(1) as f64;
    let state = json!({"skipped": false, "interrupted": false, "stopping_generation": false, "job": status.id,
                       "job_count": status.count + waiting, "job_timestamp": status.created.to_string(), "job_no": status.made,
                       "sampling_step": status.step, "sampling_steps": status.steps});
    Json(json!({"progress": (done / status.count as f64).min(1.0), "eta_relative": status.eta_seconds.unwrap_or(0.0),
                "state": state, "current_image": null, "textinfo": null}))
}

/// End what is being made.
#[utoipa::path(post, path = "/sdapi/v1/interrupt", tag = "webui", responses((status = 200)))]
async fn interrupt(State(app): State<Arc<App>>) -> Json<Value> {
    app.jobs.interrupt();
    Json(json!({}))
}

#[utoipa::path(get, path = "/sdapi/v1/samplers", tag = "webui", responses((status = 200)))]
async fn samplers() -> Json<Value> {
    let of = |sampler: &Sampler| json!({"name": sampler.webui_name(), "aliases": [sampler.name()], "options": {}});
    // DDPM is webui's DDIM with an eta, and what flows has no name of its own there.
    let own = Sampler::ALL.iter().filter(|sampler| !matches!(sampler, Sampler::FlowEuler));
    Json(own.map(of).collect())
}

#[utoipa::path(get, path = "/sdapi/v1/schedulers", tag = "webui", responses((status = 200)))]
async fn schedulers() -> Json<Value> {
    let of =
        |spacing: &SigmaSpacing| json!({"name": spacing.to_string(), "label": spacing.webui_name(), "aliases": null});
    let automatic = json!({"name": "automatic", "label": "Automatic", "aliases": null});
    Json(std::iter::once(automatic).chain(SigmaSpacing::ALL.iter().map(of)).collect())
}

#[utoipa::path(get, path = "/sdapi/v1/sd-models", tag = "webui", responses((status = 200)))]
async fn sd_models(State(app): State<Arc<App>>) -> Json<Value> {
    let of = |model: &Model| {
        let name = &*model.name;
        json!({"title": name, "model_name": name, "hash": null, "sha256": null, "filename": name, "config": null})
    };
    Json(app.models.iter().map(of).collect())
}

#[utoipa::path(get, path = "/sdapi/v1/options", tag = "webui", responses((status = 200)))]
async fn options(State(app): State<Arc<App>>) -> Json<Value> {
    let chosen = &*app.models[app.chosen.load(Ordering::Relaxed)].name;
    Json(json!({"sd_model_checkpoint": chosen, "samples_format": "png", "CLIP_stop_at_last_layers": 1}))
}

/// Of the options, only the model is looked at: that of later requests which name none, of every client of this API.
#[utoipa::path(post, path = "/sdapi/v1/options", tag = "webui", request_body = Object, responses(
    (status = 200), (status = 404, description = "Another model was asked for."), (status = 422, description = "No object."),
))]
async fn set_options(
    State(app): State<Arc<App>>,
    body: Result<Json<Map<String, Value>>, JsonRejection>,
) -> Result<Json<Value>, Problem> {
    if let Some(model) = read(body)?.get("sd_model_checkpoint").and_then(Value::as_str) {
        app.chosen.store(titled(&app, model)?, Ordering::Relaxed);
    }
    Ok(Json(json!({})))
}

#[derive(Deserialize, ToSchema)]
struct PngBody {
    /// A PNG in base64.
    image: String,
}

/// What a PNG says of how it was made.
#[utoipa::path(post, path = "/sdapi/v1/png-info", tag = "webui", request_body = PngBody, responses(
    (status = 200), (status = 400, description = "No PNG."), (status = 422, description = "Not the JSON that is expected."),
))]
async fn png_info(body: Result<Json<PngBody>, JsonRejection>) -> Result<Json<Value>, Problem> {
    let PngBody { image } = read(body)?;
    let bytes = decoded("image", &image)?;
    let texts = read_png_texts_of("image".as_ref(), &bytes)?;
    let info = texts.iter().find(|(keyword, _)| keyword == "parameters").map_or("", |(_, text)| text).to_string();
    let items: Map<String, Value> = texts.into_iter().map(|(keyword, text)| (keyword, text.into())).collect();
    Ok(Json(json!({"info": info, "items": items, "parameters": {}})))
}

#[utoipa::path(get, path = "/sdapi/v1/cmd-flags", tag = "webui", responses((status = 200)))]
async fn cmd_flags() -> Json<Value> {
    Json(json!({"api": true}))
}

#[utoipa::path(get, path = "/sdapi/v1/upscalers", tag = "webui", responses((status = 200)))]
async fn upscalers() -> Json<Value> {
    Json(json!([]))
}

#[utoipa::path(get, path = "/sdapi/v1/loras", tag = "webui", responses((status = 200)))]
async fn loras() -> Json<Value> {
    Json(json!([]))
}
