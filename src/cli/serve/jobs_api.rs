//! The server's own API: jobs, their events and pictures, health and metrics.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{ConnectInfo, Path, State};
use axum::http::StatusCode;
use axum::http::header::{CONTENT_TYPE, LOCATION};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, Stream};
use tokio::sync::watch;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::body::PictureBody;
use super::guard::{Problem, Refusals, client_of};
use super::jobs::Status;
use super::{App, png_of, png_reply, submit};

type Shared = State<Arc<App>>;

pub fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new()
        .routes(routes!(create, list))
        .routes(routes!(show, cancel))
        .routes(routes!(events))
        .routes(routes!(file))
        .routes(routes!(health))
        .routes(routes!(ready))
        .routes(routes!(metrics))
}

/// A body as it was read, or what is wrong with it.
pub fn read<T>(body: Result<Json<T>, JsonRejection>) -> Result<T, Problem> {
    body.map(|Json(body)| body).map_err(|rejection| Problem::new(rejection.status(), rejection.body_text()))
}

/// Submit a job.
#[utoipa::path(post, path = "/v1/jobs", tag = "jobs", request_body = PictureBody, responses(
    (status = 202, description = "Taken; Location has its place.", body = Status), Refusals,
))]
async fn create(
    State(app): Shared,
    address: ConnectInfo<SocketAddr>,
    body: Result<Json<PictureBody>, JsonRejection>,
) -> Result<Response, Problem> {
    let status = submit(&app, read(body)?, client_of(address)).await?.leave();
    let place = format!("/v1/jobs/{}", status.id);
    Ok((StatusCode::ACCEPTED, [(LOCATION, place)], Json(status)).into_response())
}

/// The caller's own jobs, the latest first, a hundred at most.
#[utoipa::path(get, path = "/v1/jobs", tag = "jobs", responses((status = 200, body = Vec<Status>)))]
async fn list(State(app): Shared, address: ConnectInfo<SocketAddr>) -> Json<Vec<Status>> {
    Json(app.jobs.of(&client_of(address)))
}

fn find(app: &App, id: &str) -> Result<watch::Receiver<Status>, Problem> {
    app.jobs.find(id).ok_or_else(|| Problem::not_found("no such job; finished ones are kept for --keep minutes"))
}

/// Where a job stands.
#[utoipa::path(get, path = "/v1/jobs/{id}", tag = "jobs", params(("id" = String, Path)), responses(
    (status = 200, body = Status), (status = 404, description = "No such job, or no longer."),
))]
async fn show(State(app): Shared, Path(id): Path<String>) -> Result<Json<Status>, Problem> {
    Ok(Json(find(&app, &id)?.borrow().clone()))
}

/// Cancel a job: what waits of it at once, what is being made at the next step.
#[utoipa::path(delete, path = "/v1/jobs/{id}", tag = "jobs", params(("id" = String, Path)), responses(
    (status = 200, description = "As it stands now.", body = Status),
    (status = 404, description = "No such job, or no longer."),
))]
async fn cancel(State(app): Shared, Path(id): Path<String>) -> Result<Json<Status>, Problem> {
    let status = find(&app, &id)?;
    app.jobs.cancel(&id);
    Ok(Json(status.borrow().clone()))
}

/// Where a job stands, at once and whenever that changes, until it is over: server-sent events named `status`.
#[utoipa::path(get, path = "/v1/jobs/{id}/events", tag = "jobs", params(("id" = String, Path)), responses(
    (status = 200, content_type = "text/event-stream", body = Status),
    (status = 404, description = "No such job, or no longer."),
))]
async fn events(
    State(app): Shared,
    Path(id): Path<String>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Problem> {
    let status = find(&app, &id)?;
    Ok(Sse::new(changes(status)).keep_alive(KeepAlive::default()))
}

fn changes(status: watch::Receiver<Status>) -> impl Stream<Item = Result<Event, Infallible>> {
    // The first status is one that was not seen.
    let mut status = status;
    status.mark_changed();
    stream::unfold(Some(status), |status| async {
        let mut status = status?;
        status.changed().await.ok()?;
        let now = status.borrow_and_update().clone();
        let event = Event::default().event("status").json_data(&now).ok()?;
        Some((Ok(event), (!now.state.is_over()).then_some(status)))
    })
}

/// A finished picture.
#[utoipa::path(get, path = "/v1/files/{name}", tag = "jobs", params(("name" = String, Path)), responses(
    (status = 200, content_type = "image/png", body = Vec<u8>),
    (status = 404, description = "No such picture, or no longer."),
))]
async fn file(State(app): Shared, Path(name): Path<String>) -> Result<Response, Problem> {
    Ok(png_reply(png_of(&app, &name).await?))
}

/// The server runs.
#[utoipa::path(get, path = "/healthz", tag = "server", responses((status = 200, body = String)))]
async fn health() -> &'static str {
    "ok\n"
}

/// The model is loaded, and jobs are taken.
#[utoipa::path(get, path = "/readyz", tag = "server", responses(
    (status = 200, body = String), (status = 503, description = "It is being loaded, or the server ends."),
))]
async fn ready(State(app): Shared) -> Result<&'static str, Problem> {
    match (app.jobs.is_ready(), app.jobs.is_draining()) {
        (true, _) => Ok("ok\n"),
        (false, true) => Err(Problem::draining()),
        (false, false) => Err(Problem::new(StatusCode::SERVICE_UNAVAILABLE, "the model is being loaded")),
    }
}

/// Counters for Prometheus.
#[utoipa::path(get, path = "/metrics", tag = "server", responses(
    (status = 200, content_type = "application/openmetrics-text", body = String),
))]
async fn metrics(State(app): Shared) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(CONTENT_TYPE, kind)], app.jobs.metrics_text()).into_response()
}
