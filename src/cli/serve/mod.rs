//! `megafuse serve`: pictures over HTTP, for tools that speak OpenAI's or stable-diffusion-webui's API, and an API of jobs of its own.
//!
//! One thread owns the model ([`engine`]); routes only put jobs into a queue ([`jobs`]) and watch them.

mod args;
mod body;
mod engine;
mod guard;
mod jobs;
mod jobs_api;
mod metrics;
mod openai;
mod page;
mod queue;
mod webui;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::extract::DefaultBodyLimit;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router, middleware};
use megafuse::pipeline::{Pipeline, PlanReport, Request, Size};
use megafuse::{Device, Error, Result};
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::timeout::RequestBodyTimeoutLayer;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;

pub use args::{ServeArgs, adapted};

use super::console::say;
use super::flags;
use super::output;
use super::session::{self, AUTO_BATCH, Costs, Session};
use super::values::Batch;
use body::{Base, Limits, PictureBody};
use engine::Engine;
use guard::{Guard, Problem};
use jobs::{Jobs, Order, Refusal, Status};

/// How often finished jobs are looked through for old ones.
const SWEEP: Duration = Duration::from_secs(5);
/// A client that is silent for so long in the middle of its request is not waited for.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// What the routes share.
pub struct App {
    jobs: Arc<Jobs>,
    /// The default first.
    models: Vec<Model>,
    /// Which of them webui's clients have chosen.
    chosen: AtomicUsize,
    device: String,
    dtype: &'static str,
    guard: Guard,
}

/// A model that requests may name, as its configurations say; its weights are the device's thread's.
struct Model {
    name: Arc<str>,
    base: Base,
    planner: Mutex<(Session, Costs)>,
    /// The size that it was trained at, if its configuration says so.
    native: Option<Size>,
}

impl Model {
    /// # Errors
    /// Those of its configurations; what the flags ask for and it cannot meet.
    fn open(args: &ServeArgs, device: Device) -> Result<Model> {
        let session = Session::on(&args.run, device)?;
        let limits = Limits { pixels: args.max_pixels, steps: args.max_steps, count: args.max_count };
        let base = Base { request: args.request()?, options: args.run.options.clone(), limits };
        match session.check(&base.request) {
            // Such a model has no use for a request without a picture, and every request may bring one.
            Err(Error::Request { field: "mask" | "lowres", .. }) => {}
            checked => drop(checked?),
        }
        let pipeline = session.planner.pipeline();
        let (name, native) = (pipeline.name().into(), pipeline.native_size());
        Ok(Model { name, base, native, planner: Mutex::new((session, Costs::default())) })
    }
}

#[derive(OpenApi)]
#[openapi(
    info(title = "megafuse", description = "Training-free high-resolution image generation.",
         license(name = "MIT OR Apache-2.0")),
    tags(
        (name = "jobs", description = "Pictures as jobs: submit, watch, cancel."),
        (name = "openai", description = "As OpenAI's image API."),
        (name = "webui", description = "As the API of stable-diffusion-webui."),
        (name = "server", description = "Health and metrics."),
    )
)]
struct Document;

/// # Errors
/// [`Error::Request`], naming the flag; those of the models and the device; [`Error::Io`]: the address cannot be had.
pub fn run(mut args: ServeArgs) -> Result<()> {
    args.check()?;
    let device = args.run.device.open()?;
    let (mut models, mut sources) = (Vec::<Model>::new(), HashMap::new());
    let own = args.run.model.clone();
    for path in args.model_paths()? {
        args.run.model = path;
        let model = match Model::open(&args, device.clone()) {
            // What else lies in a folder is not this server's to refuse.
            Err(error) if args.model_dir.is_some() && args.run.model != own => {
                let path = args.run.model.as_deref().unwrap_or(Path::new(""));
                say!("warning: {} is left out: {}", path.display(), flags::error_text(&error));
                continue;
            }
            model => model?,
        };
        if models.iter().any(|other| other.name == model.name) {
            let reason = format!("two models are called {:?}; rename one", model.name);
            return Err(Error::config("--model-dir", reason));
        }
        sources.insert(Arc::clone(&model.name), args.run.source());
        models.push(model);
    }
    let Some(first) = models.first().map(|model| Arc::clone(&model.name)) else {
        let folder = args.model_dir.unwrap_or_default();
        return Err(Error::file(&folder, "holds no model that can be served; the lines above say why"));
    };
    let batch = match (args.run.batch, &device) {
        (Batch::Of(batch), _) => batch,
        (Batch::Auto, Device::Cuda(_)) => AUTO_BATCH,
        (Batch::Auto, _) => 1,
    };
    let jobs = Arc::new(Jobs::new(Duration::from_secs_f64(60.0 * args.keep), args.queue)?);
    let options = args.run.load_options(&device);
    let load = move |name: &str| session::load(&sources[name], &options);
    let kept = args.models;
    let app = App {
        jobs: Arc::clone(&jobs),
        models,
        chosen: AtomicUsize::new(0),
        device: device.to_string(),
        dtype: args.run.dtype_on(&device).name(),
        guard: Guard::new(&args),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|error| Error::config("threads", error.to_string()))?;
    let engine = Engine { jobs, batch, kept, first, load };
    let ended = runtime.block_on(serve(args.addr, args.max_body << 20, app, engine));
    runtime.shutdown_timeout(Duration::from_secs(1));
    ended
}

/// Until the device's thread ends: by a signal once nothing waits, or by an error.
async fn serve<L>(addr: SocketAddr, body_limit: usize, app: App, engine: Engine<L>) -> Result<()>
where
    L: Fn(&str) -> Result<Pipeline> + Send + 'static,
{
    let at = |error| Error::Io { path: format!("address {addr}").into(), source: error };
    let listener = TcpListener::bind(addr).await.map_err(at)?;
    let address = listener.local_addr().map_err(at)?;
    let jobs = Arc::clone(&app.jobs);
    let (over, ended) = oneshot::channel();
    let of_engine = Arc::clone(&jobs);
    let thread = std::thread::Builder::new().name("device".into()).spawn(move || {
        let result = engine.run();
        // Without its thread the server is of no use: no one may wait for it.
        of_engine.drain();
        of_engine.fail_waiting("the server ends");
        let _ = over.send(());
        result
    });
    let thread = thread.map_err(|error| Error::config("threads", error.to_string()))?;
    tokio::spawn(end_by_signal(Arc::clone(&jobs)));
    tokio::spawn(sweep(jobs));
    // The first line on standard output, for programs that start this one.
    output::print_line(format!("http://{address}"));
    let service = router(Arc::new(app), body_limit).into_make_service_with_connect_info::<SocketAddr>();
    let drained = async move { drop(ended.await) };
    axum::serve(listener, service).with_graceful_shutdown(drained).await.map_err(at)?;
    thread.join().unwrap_or_else(|_| Err(Error::config("the device's thread", "ended by a panic")))
}

/// Every route, with its checks. The document is made of the same list.
fn router(app: Arc<App>, body_limit: usize) -> Router {
    let (router, document) = OpenApiRouter::with_openapi(Document::openapi())
        .merge(jobs_api::routes())
        .merge(page::routes())
        .merge(openai::routes())
        .merge(webui::routes())
        .split_for_parts();
    let document = Arc::new(document);
    router
        .merge(page::files())
        .route("/openapi.json", get(move || async move { Json(document.as_ref().clone()) }))
        .fallback(|| async { Problem::not_found("no such route; /openapi.json lists them") })
        .method_not_allowed_fallback(|| async { Problem::method_not_allowed() })
        .layer(middleware::from_fn_with_state(Arc::clone(&app), guard::check))
        .layer(DefaultBodyLimit::max(body_limit))
        .layer(RequestBodyTimeoutLayer::new(BODY_TIMEOUT))
        .layer(CatchPanicLayer::custom(|_| Problem::internal().into_response()))
        .layer(app.guard.cors())
        .with_state(app)
}

/// The first signal lets what was taken be finished; the second ends at once.
async fn end_by_signal(jobs: Arc<Jobs>) {
    for count in 0.. {
        if next_signal().await.is_err() {
            return;
        }
        if count > 0 {
            say!("ended at once; what was not finished is lost");
            std::process::exit(130);
        }
        say!("no more jobs are taken; {} picture(s) wait and are made; a second signal ends at once", jobs.waiting());
        jobs.drain();
    }
}

/// Ctrl-C, or what asks a program to end.
async fn next_signal() -> std::io::Result<()> {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let mut term = signal(SignalKind::terminate())?;
        tokio::select! { ended = tokio::signal::ctrl_c() => ended, _ = term.recv() => Ok(()) }
    }
    #[cfg(not(unix))]
    tokio::signal::ctrl_c().await
}

async fn sweep(jobs: Arc<Jobs>) {
    let mut every = tokio::time::interval(SWEEP);
    loop {
        every.tick().await;
        jobs.sweep(Instant::now());
    }
}

/// Puts a job into the queue, once it is known that it can be met. A client may go while that is found out: the job then ends with what
/// this gives, wherever it is dropped.
///
/// # Errors
/// What is wrong with it; a full queue; the server ends.
async fn submit(app: &Arc<App>, body: PictureBody, client: String) -> std::result::Result<Awaited, Problem> {
    let app = Arc::clone(app);
    let at = app.named(body.model.as_deref())?;
    // Pictures are decoded and runs planned here: work of the processor.
    let submitted = tokio::task::spawn_blocking(move || {
        let (priority, patience) = body.urgency()?;
        let model = &app.models[at];
        let (requests, mut warnings) = body.requests(&model.base)?;
        let planned = model.check(&requests[0], &mut warnings)?;
        let order = Order {
            client,
            model: Arc::clone(&model.name),
            requests,
            cost: planned.cost,
            steps: planned.steps,
            stages: planned.stages,
            warnings,
            priority,
            patience,
        };
        let status = app.jobs.submit(order).map_err(|refusal| match refusal {
            Refusal::Full { waiting, after_seconds } => Problem::full(waiting, after_seconds),
            Refusal::Draining => Problem::draining(),
        })?;
        Ok(Awaited { jobs: Arc::clone(&app.jobs), status, is_left: false })
    });
    submitted.await.unwrap_or_else(|_| Err(Problem::internal()))
}

struct Planned {
    cost: u64,
    steps: usize,
    stages: usize,
}

impl App {
    /// Which model is called so; without a name the default.
    ///
    /// # Errors
    /// There is none of this name.
    fn named(&self, name: Option<&str>) -> std::result::Result<usize, Problem> {
        let Some(name) = name else { return Ok(0) };
        self.models.iter().position(|model| &*model.name == name).ok_or_else(|| {
            let names: Vec<String> = self.models.iter().map(|model| format!("{:?}", model.name)).collect();
            Problem::not_found(&format!("the model {name:?} is not here; this server has {}", names.join(", ")))
        })
    }
}

impl Model {
    /// Can the model meet it, within the limits and the memory?
    fn check(&self, request: &Request, warnings: &mut Vec<String>) -> std::result::Result<Planned, Problem> {
        let mut planner = self.planner.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let (session, costs) = &mut *planner;
        let pipeline = session.planner.pipeline();
        let run = pipeline.resolve(request)?;
        let limits = self.base.limits;
        for stage in run.stages() {
            if stage.size.area() as u64 > limits.pixels {
                let reason = format!("has more than {} pixels, this server's limit", limits.pixels);
                return Err(body::wrong("size", stage.size, reason).into());
            }
        }
        let steps = run.ranges().iter().map(|range| range.len()).sum::<usize>();
        if steps > limits.steps {
            return Err(
                body::wrong("steps", steps, format!("at most {} in all, this server's limit", limits.steps)).into()
            );
        }
        warnings.extend(pipeline.remarks(request)?);
        let stages = run.stages().len();
        let cost = costs.of(session, request)?;
        Ok(Planned { cost, steps, stages })
    }

    /// What one picture costs on the rung of memory that would be taken.
    ///
    /// # Errors
    /// As [`Planner::plan_within`](megafuse::pipeline::Planner::plan_within).
    fn report(&self, request: &Request) -> Result<PlanReport> {
        let planner = self.planner.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let session = &planner.0;
        session.planner.plan_within(session.device().budget_bytes(), request)
    }
}

/// A job that ends when no one waits for it any longer: its client has gone.
struct Awaited {
    jobs: Arc<Jobs>,
    status: watch::Receiver<Status>,
    /// Does it go on by itself?
    is_left: bool,
}

impl Awaited {
    /// The job's status; it goes on, whoever waits.
    fn leave(mut self) -> Status {
        self.is_left = true;
        self.status.borrow().clone()
    }

    /// # Errors
    /// Why it was not finished.
    async fn over(&mut self) -> std::result::Result<Status, Problem> {
        let over = self.status.wait_for(|status| status.state.is_over()).await.map(|status| status.clone());
        let status = over.map_err(|_| Problem::internal())?;
        match status.state {
            jobs::State::Done => Ok(status),
            jobs::State::Cancelled => Err(Problem::cancelled()),
            _ => Err(Problem::failed(status.error.as_deref().unwrap_or("it could not be made"))),
        }
    }
}

impl Drop for Awaited {
    fn drop(&mut self) {
        let status = self.status.borrow().clone();
        if !self.is_left && !status.state.is_over() {
            self.jobs.cancel(&status.id);
        }
    }
}

/// The PNG of a picture that a job says it has.
///
/// # Errors
/// It is no longer kept.
async fn png_of(app: &Arc<App>, url: &str) -> std::result::Result<Vec<u8>, Problem> {
    let (jobs, url) = (Arc::clone(&app.jobs), url.to_string());
    let read = tokio::task::spawn_blocking(move || jobs.picture(&url)).await;
    read.ok().flatten().ok_or_else(|| Problem::not_found("no such picture; they are kept for --keep minutes"))
}

/// A PNG as a reply.
fn png_reply(bytes: Vec<u8>) -> Response {
    ([("content-type", "image/png"), ("cache-control", "private, no-store")], bytes).into_response()
}
