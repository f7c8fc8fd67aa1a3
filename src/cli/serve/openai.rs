//! OpenAI's image API, as its clients ask it.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{ConnectInfo, State};
use axum::http::header::{HOST, HeaderMap};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::stream;
use megafuse::pipeline::Size;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::body::{PictureBody, wrong};
use super::guard::{Problem, Refusals, client_of};
use super::jobs::unix_seconds;
use super::jobs_api::read;
use super::{App, Awaited, Model, png_of, submit};

pub fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(generations)).routes(routes!(models))
}

/// OpenAI's fields; what its models read and these do not (quality, style, user, ...) is passed over. `megafuse` holds the fields of a job
/// (POST /v1/jobs), which stand over all others.
#[derive(Deserialize, ToSchema)]
struct ImageBody {
    prompt: String,
    /// One of the server's models; left out: its default.
    model: Option<String>,
    /// How many pictures.
    n: Option<usize>,
    /// `1024x1024`, or `auto`.
    size: Option<String>,
    /// `b64_json` (default) or `url`.
    response_format: Option<String>,
    /// Events in place of one reply.
    #[serde(default)]
    stream: bool,
    /// `png`; there is no other.
    output_format: Option<String>,
    #[serde(default)]
    #[schema(value_type = Object)]
    megafuse: Map<String, Value>,
}

impl ImageBody {
    fn job(&self) -> Result<PictureBody, Problem> {
        if let Some(format) = self.output_format.as_ref().filter(|format| *format != "png") {
            return Err(wrong("output_format", format!("{format:?}"), "pictures are png").into());
        }
        let size = self.size.as_ref().filter(|size| *size != "auto");
        let fields = json!({"prompt": self.prompt, "model": self.model, "count": self.n, "size": size});
        Ok(PictureBody::of(fields, &self.megafuse)?)
    }

    fn as_urls(&self) -> Result<bool, Problem> {
        match self.response_format.as_deref() {
            None | Some("b64_json") => Ok(false),
            Some("url") => Ok(true),
            Some(other) => Err(wrong("response_format", format!("{other:?}"), "expected b64_json or url").into()),
        }
    }
}

/// Make pictures, as OpenAI's route of this name.
#[utoipa::path(post, path = "/v1/images/generations", tag = "openai", request_body = ImageBody, responses(
    (status = 200, description = "The pictures; with `stream`, an event for each."),
    Refusals,
))]
async fn generations(
    State(app): State<Arc<App>>,
    address: ConnectInfo<SocketAddr>,
    headers: HeaderMap,
    body: Result<Json<ImageBody>, JsonRejection>,
) -> Result<Response, Problem> {
    let body = read(body)?;
    let (job, as_urls) = (body.job()?, body.as_urls()?);
    let mut awaited = submit(&app, job, client_of(address)).await?;
    if body.stream {
        return Ok(streamed(app, awaited).into_response());
    }
    let status = awaited.over().await?;
    let host = headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let mut data = Vec::new();
    for picture in &status.pictures {
        data.push(match as_urls {
            true => json!({"url": format!("http://{host}{}", picture.url)}),
            false => json!({"b64_json": STANDARD.encode(png_of(&app, &picture.url).await?)}),
        });
    }
    let seeds: Vec<u64> = status.pictures.iter().map(|picture| picture.seed).collect();
    let own = json!({"job": status.id, "seeds": seeds, "warnings": status.warnings});
    Ok(Json(json!({"created": unix_seconds(), "data": data, "output_format": "png", "megafuse": own})).into_response())
}

/// Each picture as it is finished. When the client goes, the job ends.
fn streamed(app: Arc<App>, awaited: Awaited) -> impl IntoResponse {
    struct Going {
        app: Arc<App>,
        awaited: Awaited,
        sent: usize,
    }
    let begin = Some(Going { app, awaited, sent: 0 });
    let events = stream::unfold(begin, |going| async {
        let mut going = going?;
        let sent = going.sent;
        let more = |status: &super::jobs::Status| status.pictures.len() > sent || status.state.is_over();
        let status = going.awaited.status.wait_for(more).await.ok()?.clone();
        let Some(picture) = status.pictures.get(sent) else {
            // All are sent, or it has failed.
            let error = status.error.map(|error| Problem::failed(&error).to_json())?;
            return Some((Ok::<_, Infallible>(Event::default().event("error").data(error.to_string())), None));
        };
        let data = match png_of(&going.app, &picture.url).await {
            Ok(png) => json!({
                "type": "image_generation.completed", "created_at": unix_seconds(), "output_format": "png",
                "size": Size::new(picture.width, picture.height).to_string(), "b64_json": STANDARD.encode(png),
                "megafuse": {"seed": picture.seed},
            }),
            Err(problem) => problem.to_json(),
        };
        going.sent += 1;
        let event = Event::default().event("image_generation.completed").data(data.to_string());
        Some((Ok(event), Some(going)))
    });
    Sse::new(events).keep_alive(KeepAlive::default())
}

/// The server's models, the default first.
#[utoipa::path(get, path = "/v1/models", tag = "openai", responses((status = 200, description = "A list.")))]
async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    let of = |model: &Model| json!({"id": &*model.name, "object": "model", "created": 0, "owned_by": "megafuse"});
    let data: Vec<Value> = app.models.iter().map(of).collect();
    Json(json!({"object": "list", "data": data}))
}
