//! `l2p-serve`: pictures for others, over HTTP.
//!
//! Of a request's way: [`guard`] (id, key, log) → a dialect's route ([`draw`], [`openai`], [`sdapi`]), which makes an [`app::Ask`] of it →
//! [`app`], which makes an order of that within the limits and puts it into the [`queue`] → a [`drawer`], a thread with a worker of the
//! engine → back to the route, which waits on both ends of a [`job`]. Whoever leaves drops what the route holds, and with it
//! the place in the queue or, when nobody else waits for the batch, the drawing at its next step.

mod app;
mod arguments;
mod draw;
mod drawer;
mod failure;
mod fields;
mod files;
mod guard;
mod job;
mod keys;
mod listen;
mod metrics;
mod openai;
mod page;
mod pictures;
mod queue;
mod rate;
mod sdapi;
mod wait;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use anyhow::Context;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use l2p_engine::checkpoint::ModelPaths;
use l2p_engine::pipeline::{Asked, Batching, ModelFiles};
use l2p_engine::serve::{Worker, WorkerOptions};
use l2p_engine::{Device, DeviceChoice, Error};
use serde_json::json;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{AllowOrigin, Any, CorsLayer};
use tracing_subscriber::EnvFilter;

use app::{App, Model};
pub use arguments::Arguments;
use arguments::{LogFormat, NamedModel};
use drawer::Drawer;
use failure::Failure;
use keys::Keys;
use metrics::Metrics;
use queue::Queue;

/// Shapes of pictures whose recorded steps are kept.
const RECORDINGS: usize = 8;

/// Whether a request's body is understood in a dialect: `draw`, `generations`, `txt2img`, `img2img`, or `edits` with a boundary of `xx`.
/// Nothing is drawn.
///
/// # Errors
/// The line that the client would get.
pub fn understand(dialect: &str, body: &[u8]) -> Result<(), String> {
    let fields = || fields::Fields::of_json(body);
    let understood = match dialect {
        "draw" => draw::parse(body).map(drop),
        "generations" => fields()
            .and_then(|fields| openai::parse(fields, openai::Pictures::default()))
            .map(drop),
        "txt2img" | "img2img" => sdapi::parse(body, dialect == "img2img").map(drop),
        _ => {
            let runtime = tokio::runtime::Builder::new_current_thread().build();
            let runtime = runtime.map_err(|error| error.to_string())?;
            let form = openai::form("multipart/form-data; boundary=xx", body.to_vec().into());
            runtime
                .block_on(form)
                .and_then(|(fields, pictures)| openai::parse(fields, pictures))
                .map(drop)
        }
    };
    understood.map_err(|failure| failure.body()["error"]["message"].to_string())
}

/// Serves until it is asked to stop, and returns the exit code. Errors are printed.
pub fn main(arguments: Arguments) -> ExitCode {
    crate::run(|| serve(arguments))
}

fn serve(arguments: Arguments) -> anyhow::Result<()> {
    arguments.check()?;
    start_log(arguments.log);
    let keys = match &arguments.api_key_file {
        Some(path) => Keys::read(path)?,
        None => Keys::default(),
    };
    if keys.is_open() && !arguments.host.is_loopback() {
        crate::say("note: whoever reaches this address may draw: give --api-key-file, or listen at 127.0.0.1");
    }
    let metrics = Arc::new(Metrics::new());
    let (models, drawers) = open(&arguments, &metrics)?;
    let app = Arc::new(App::new(arguments, models, keys, metrics));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.context("the system gives no threads")?;
    let threads = start(&app, drawers);
    let served = runtime.block_on(listen::listen(&app, router(&app)));
    // What still waits is told that it will not be drawn; what is drawn has had its time.
    let left = app.models.iter().flat_map(|model| model.queue.close(true));
    let ending = Failure::later(StatusCode::SERVICE_UNAVAILABLE, "the server is about to end", 30);
    left.for_each(|job| job.answer(Err(ending.clone())));
    app.under_way().values().for_each(app::UnderWay::give_up);
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    let mut failed = None;
    for thread in threads {
        match thread.join() {
            Ok(Ok(())) => {}
            Ok(Err(error)) => failed = Some(anyhow::Error::from(error)),
            Err(_) => failed = Some(anyhow::anyhow!("a drawing thread ended in a panic")),
        }
    }
    served?;
    failed.map_or(Ok(()), Err)
}

fn start_log(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false);
    // There is one already where several servers run in one process, as in tests.
    let _ = match format {
        LogFormat::Text => log.with_ansi(false).try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
}

/// A thread to be.
struct Starting {
    model: Arc<Model>,
    drawer: Drawer,
    device: Device,
}

/// Opens the models, on each of the devices.
fn open(arguments: &Arguments, metrics: &Arc<Metrics>) -> anyhow::Result<(Vec<Arc<Model>>, Vec<Starting>)> {
    let (mut models, mut starting) = (Vec::new(), Vec::new());
    for named in &arguments.model {
        let opened: Vec<ModelFiles> = arguments
            .device
            .iter()
            .map(|device| open_on(arguments, named, *device))
            .collect::<anyhow::Result<_>>()?;
        let files: Vec<Arc<ModelFiles>> = opened.into_iter().map(Arc::new).collect();
        files[0].ensure_text_encoder()?;
        let usual = files[0].rounded(files[0].settings(&Asked::default())?).0;
        let batch = match arguments.max_batch {
            Some(batch) => batch.get(),
            None => files[0].batch_size(&usual, arguments.max_count.get(), Batching::PROMPT)?,
        };
        let model = Arc::new(Model {
            name: named.name.clone(),
            published: app::published(&named.path),
            files: files[0].clone(),
            queue: Arc::new(Queue::new(arguments.queue.get())),
        });
        for files in files {
            let options = WorkerOptions {
                keep_text_encoder: true,
                recordings: RECORDINGS,
                most_open: 4,
            };
            let device = files.device().clone();
            let drawer = Drawer {
                worker: Worker::start(files, options)?,
                queue: model.queue.clone(),
                batch,
                metrics: metrics.clone(),
            };
            starting.push(Starting {
                model: model.clone(),
                drawer,
                device,
            });
        }
        models.push(model);
    }
    Ok((models, starting))
}

fn open_on(arguments: &Arguments, named: &NamedModel, device: DeviceChoice) -> anyhow::Result<ModelFiles> {
    let paths = ModelPaths::resolve(Path::new(&named.path), &arguments.parts.overrides())?;
    let mut files = arguments.weights.open(paths, Device::open(device)?)?;
    let usual = files.rounded(files.settings(&Asked::default())?).0;
    if let Some(note) = arguments
        .memory
        .fit(&mut files, &usual, arguments.max_batch.map_or(1, |batch| batch.get()))?
    {
        crate::say(format_args!("note: {note}"));
    }
    Ok(files)
}

/// Starts the threads that draw. The server is ready when all have their models, and no longer when one has failed for good.
fn start(app: &Arc<App>, drawers: Vec<Starting>) -> Vec<JoinHandle<l2p_engine::Result<()>>> {
    let left = Arc::new(std::sync::atomic::AtomicUsize::new(drawers.len()));
    let threads = drawers.into_iter().map(|Starting { model, drawer, device }| {
        let (app, left) = (app.clone(), left.clone());
        std::thread::spawn(move || {
            let loaded = match app.arguments.lazy {
                true => Ok(()),
                false => drawer.worker.load().and_then(|ticket| ticket.wait()).map(drop),
            };
            let work = || {
                loaded?;
                tracing::info!(model = model.name, %device, "ready");
                if left.fetch_sub(1, Ordering::AcqRel) == 1 {
                    app.ready.store(true, Ordering::Release);
                }
                drawer.run()
            };
            let outcome = catch_unwind(AssertUnwindSafe(work));
            let outcome = outcome.unwrap_or_else(|_| Err(Error::invalid("a drawing thread ended in a panic")));
            if let Err(error) = &outcome {
                tracing::error!(model = model.name, %device, %error, "nothing more is drawn here");
                app.ready.store(false, Ordering::Release);
                app.stop();
            }
            outcome
        })
    });
    threads.collect()
}

/// All routes.
fn router(app: &Arc<App>) -> Router {
    let health = Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .route("/metrics", get(counts));
    let routes = health
        .merge(draw::router())
        .merge(openai::router())
        .merge(sdapi::router());
    let routes = routes
        .fallback(async || Failure::new(StatusCode::NOT_FOUND, "there is nothing at this address"))
        .method_not_allowed_fallback(async || {
            Failure::new(StatusCode::METHOD_NOT_ALLOWED, "this address takes another method")
        })
        .with_state(app.clone())
        .merge(page::router());
    let panics = CatchPanicLayer::custom(|_: Box<dyn std::any::Any + Send>| {
        tracing::error!("a request ended in a panic");
        Failure::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "the server failed at this; its log says why",
        )
        .into_response()
    });
    let routes = routes
        .layer(panics)
        .layer(from_fn_with_state(app.clone(), guard::guard));
    match &app.arguments.cors_origin {
        None => routes,
        Some(origin) => {
            let cors = CorsLayer::new().allow_methods(Any).allow_headers(Any);
            let exact = HeaderValue::from_str(origin).ok().filter(|_| origin != "*");
            routes.layer(match exact {
                Some(origin) => cors.allow_origin(AllowOrigin::exact(origin)),
                None => cors.allow_origin(AllowOrigin::any()),
            })
        }
    }
}

/// Whether requests are drawn: models are loaded and the server is not about to end.
async fn ready(State(app): State<Arc<App>>) -> Response {
    match app.ready.load(Ordering::Acquire) && !app.is_stopping() {
        true => Json(json!({"ready": true, "waiting": app.waiting()})).into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"ready": false}))).into_response(),
    }
}

async fn counts(State(app): State<Arc<App>>) -> Response {
    let kind = [(
        header::CONTENT_TYPE,
        "application/openmetrics-text; version=1.0.0; charset=utf-8",
    )];
    (kind, app.metrics.text(app.waiting())).into_response()
}
