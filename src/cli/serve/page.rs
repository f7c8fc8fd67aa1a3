//! The web page, which is inside the program, and what it asks beside jobs: methods, and what a request would cost.

use std::sync::Arc;

use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use axum::http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, X_CONTENT_TYPE_OPTIONS};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use megafuse::pipeline::{METHODS, OptionKind, OptionSpec, Sampler};
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::body::PictureBody;
use super::guard::{Problem, Refusals};
use super::jobs_api::read;
use super::{App, Model};

/// The page's files: they are the same for everyone, and say nothing of anyone.
pub const FILES: [(&str, &str, &str); 3] = [
    ("/", "text/html; charset=utf-8", include_str!("page/index.html")),
    ("/page.css", "text/css; charset=utf-8", include_str!("page/page.css")),
    ("/page.js", "text/javascript; charset=utf-8", include_str!("page/page.js")),
];

/// Nothing comes from elsewhere, nothing is run that stands in a text, and no other page may frame this one.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob: data:; \
                      form-action 'none'; base-uri 'none'; frame-ancestors 'none'";

pub fn files() -> Router<Arc<App>> {
    FILES.into_iter().fold(Router::new(), |router, (path, kind, text)| {
        router.route(path, get(move || async move { file(kind, text) }))
    })
}

fn file(kind: &'static str, text: &'static str) -> Response {
    let headers: [(HeaderName, &str); 4] = [
        (CONTENT_TYPE, kind),
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (CACHE_CONTROL, "no-cache"),
    ];
    (headers, text).into_response()
}

pub fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(methods)).routes(routes!(plan))
}

/// Every model with what the server's flags choose for it, every method with its options, every sampler.
#[utoipa::path(get, path = "/v1/methods", tag = "jobs", responses((status = 200)))]
async fn methods(State(app): State<Arc<App>>) -> Json<Value> {
    let methods = METHODS.iter().map(|spec| {
        let options: Vec<Value> = spec.options.iter().map(described).collect();
        json!({"name": spec.name, "summary": spec.summary, "relays": spec.relays, "options": options})
    });
    let methods: Vec<Value> = methods.collect();
    let of = |model: &Model| json!({"name": &*model.name, "native": model.native.map(|size| size.to_string()), "method": model.base.request.method.name()});
    let models: Vec<Value> = app.models.iter().map(of).collect();
    let samplers = Sampler::ALL.map(Sampler::name);
    Json(json!({"device": app.device, "dtype": app.dtype, "models": models, "methods": methods, "samplers": samplers}))
}

fn described(option: &OptionSpec) -> Value {
    let (kind, values, expects): (_, &[&str], _) = match option.kind {
        OptionKind::Switch => ("switch", &[], ""),
        OptionKind::Bool => ("choice", &["true", "false"], ""),
        OptionKind::Choice(names) => ("choice", names, ""),
        OptionKind::Share => ("text", &[], "a number from 0 to 1"),
        OptionKind::Integer { expected, .. }
        | OptionKind::Number { expected, .. }
        | OptionKind::Numbers { expected, .. } => ("text", &[], expected.trim_start_matches("expected ")),
        OptionKind::Text { .. } => ("text", &[], ""),
    };
    let help = option.help.replace("request.", "");
    json!({"name": option.name, "help": help, "kind": kind, "values": values, "expects": expects})
}

/// What a picture of a job would cost.
#[derive(Serialize, ToSchema)]
struct Plan {
    /// Sizes and steps.
    stages: Vec<String>,
    steps: usize,
    flops: u64,
    /// Weights and live activations, of one picture.
    peak_bytes: u64,
    /// Of the device's time for a picture, as far as those made before tell.
    seconds: Option<f64>,
    warnings: Vec<String>,
}

/// Say what a job would cost, without making it.
#[utoipa::path(post, path = "/v1/plan", tag = "jobs", request_body = PictureBody, responses(
    (status = 200, body = Plan), Refusals,
))]
async fn plan(
    State(app): State<Arc<App>>,
    body: Result<Json<PictureBody>, JsonRejection>,
) -> Result<Json<Plan>, Problem> {
    let body = read(body)?;
    let at = app.named(body.model.as_deref())?;
    let planned = tokio::task::spawn_blocking(move || {
        let model = &app.models[at];
        let (requests, mut warnings) = body.requests(&model.base)?;
        model.check(&requests[0], &mut warnings)?;
        let report = model.report(&requests[0])?;
        Ok::<_, Problem>(Plan {
            stages: report.stages.iter().map(ToString::to_string).collect(),
            steps: report.stages.iter().map(|stage| stage.steps).sum(),
            flops: report.total.flops,
            peak_bytes: report.peak_bytes,
            seconds: app.jobs.seconds_of(report.total.macs),
            warnings,
        })
    });
    planned.await.unwrap_or_else(|_| Err(Problem::internal())).map(Json)
}
