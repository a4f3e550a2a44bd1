//! The interface of the page: what there is, pictures as they come, and the settings of a picture.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use l2p_engine::image_io::RgbImage;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::app::{App, Ask, Drawing};
use super::failure::Failure;
use super::fields::Fields;
use super::guard::{self, Client};
use super::pictures::{format_name, format_of, from_base64, media_type, preview_url, read_settings, to_base64};
use super::wait;

/// How often somebody who waits is told of a changed place.
const TICK: Duration = Duration::from_millis(500);

/// Events that wait for a client that reads slowly; then drawing's news wait too.
const EVENTS: usize = 8;

/// The routes.
pub fn router() -> Router<Arc<App>> {
    Router::new()
        .route("/api/info", get(info))
        .route("/api/draw", post(draw))
        .route("/api/settings", post(settings))
}

/// What there is to draw with, and its limits.
async fn info(State(app): State<Arc<App>>) -> Result<Json<Value>, Failure> {
    let models = app.models.iter().map(|model| {
        let files = &model.files;
        let usual = files.settings(&Default::default()).map_err(|error| Failure::of(&error))?;
        let (usual, _) = files.rounded(usual);
        Ok(json!({
            "id": model.name, "kind": model.kind(), "multiple": files.size_multiple(),
            "max_side": app.arguments.max_side.get(),
            "default": {"width": usual.width, "height": usual.height, "steps": usual.steps, "cfg": usual.cfg, "shift": usual.shift},
        }))
    });
    let models: Vec<Value> = models.collect::<Result<_, Failure>>()?;
    let device = app.models[0].files.device().to_string();
    Ok(Json(json!({
        "version": env!("CARGO_PKG_VERSION"), "models": models, "device": device,
        "limits": {"count": app.arguments.max_count.get(), "side": app.arguments.max_side.get(), "steps": app.arguments.max_steps.get()},
    })))
}

/// The settings of a PNG that was drawn here or by `l2p-sample`.
async fn settings(State(app): State<Arc<App>>, body: Body) -> Result<Response, Failure> {
    let bytes = guard::body(&app, body).await?;
    let settings = wait::blocking(move || read_settings(&bytes)).await?;
    Ok(Json(settings).into_response())
}

/// What is asked, and how it is answered.
pub(super) struct Asked {
    /// What to draw.
    pub ask: Ask,
    /// The format of pictures.
    pub format: l2p_engine::image_io::ImageFormat,
}

/// What a request of the page asks for.
///
/// # Errors
/// Naming the field at fault.
pub(super) fn parse(bytes: &[u8]) -> Result<Asked, Failure> {
    let mut fields = Fields::of_json(bytes)?;
    let picture = |fields: &mut Fields, name: &str| -> Result<Option<Vec<u8>>, Failure> {
        fields.text(name)?.map(|text| from_base64(name, &text)).transpose()
    };
    let asked = Asked {
        ask: Ask {
            model: fields.text("model")?,
            prompt: fields
                .text("prompt")?
                .ok_or_else(|| Failure::field("prompt", "is missing"))?,
            negative: fields.text("negative")?,
            width: fields.whole("width")?,
            height: fields.whole("height")?,
            steps: fields.whole("steps")?,
            cfg: fields.real("cfg")?,
            shift: fields.real("shift")?,
            seed: fields.whole("seed")?,
            count: fields.whole("count")?,
            rng: fields.text("rng")?,
            image: picture(&mut fields, "image")?,
            strength: fields.real("strength")?,
            mask: picture(&mut fields, "mask")?,
            invert_mask: false,
            feather: fields.whole("feather")?,
            extend: None,
        },
        format: format_of("format", fields.text("format")?.as_deref())?,
    };
    fields.finish()?;
    Ok(asked)
}

/// Draws, and tells as events what happens meanwhile.
async fn draw(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Failure> {
    let bytes = guard::json(&app, &headers, body).await?;
    let Asked { ask, format } = wait::blocking(move || parse(&bytes)).await?;
    let start = Instant::now();
    let drawing = wait::ask(&app, client.0, ask, true).await?;
    let (sender, events) = mpsc::channel(EVENTS);
    tokio::spawn(async move {
        // When nobody listens any more the drawing is dropped with this, and so given up.
        let patience = app.arguments.patience();
        let teller = Teller { sender, patience };
        let outcome = follow(&app, drawing, format, &teller).await;
        let _ = match outcome {
            Ok(Some(())) => {
                teller
                    .tell("done", json!({"seconds": start.elapsed().as_secs_f64()}))
                    .await
            }
            Ok(None) => Some(()),
            Err(failure) => {
                teller
                    .tell("error", json!({"message": failure.body()["error"]["message"]}))
                    .await
            }
        };
    });
    let events = Sse::new(ReceiverStream::new(events)).keep_alive(KeepAlive::default());
    Ok(events.into_response())
}

/// Tells of events as long as somebody listens.
struct Teller {
    sender: mpsc::Sender<Result<Event, Infallible>>,
    patience: Duration,
}

impl Teller {
    /// Nothing where nobody listens any more, or reads too slowly to be waited for.
    async fn tell(&self, name: &str, data: Value) -> Option<()> {
        let event = Event::default().event(name).data(data.to_string());
        let sent = tokio::time::timeout(self.patience, self.sender.send(Ok(event)));
        sent.await.ok()?.ok()
    }
}

/// Tells of a drawing until it is done; nothing where nobody listens any more.
async fn follow(
    app: &Arc<App>,
    mut drawing: Drawing,
    format: l2p_engine::image_io::ImageFormat,
    teller: &Teller,
) -> Result<Option<()>, Failure> {
    let settings = drawing.model.described(&drawing.order, 0, &app.arguments);
    let mut place = drawing.waiting.ahead();
    let mut accepted = json!({"id": drawing.waiting.id, "position": place.unwrap_or(0), "settings": settings});
    accepted["settings"]["count"] = json!(drawing.order.count);
    accepted["settings"]["format"] = json!(format_name(format));
    if teller.tell("accepted", accepted).await.is_none() {
        return Ok(None);
    }
    let mut shown: Vec<(usize, Arc<RgbImage>)> = Vec::new();
    let mut steps = None;
    let mut ticks = tokio::time::interval(TICK);
    let pictures = loop {
        tokio::select! {
            outcome = &mut drawing.waiting.answer => {
                break outcome.unwrap_or_else(|_| Err(Failure::bad("the server is about to end")))?;
            }
            changed = drawing.waiting.progress.changed() => {
                if changed.is_err() {
                    continue;
                }
                let progress = drawing.waiting.progress.borrow_and_update().clone();
                let mut told = Some(());
                if progress.steps != steps {
                    steps = progress.steps;
                    if let Some((done, total)) = steps {
                        told = teller.tell("step", json!({"done": done, "total": total})).await;
                    }
                }
                for (index, image) in progress.previews {
                    if shown.iter().any(|(other, last)| *other == index && Arc::ptr_eq(last, &image)) {
                        continue;
                    }
                    shown.retain(|(other, _)| *other != index);
                    shown.push((index, image.clone()));
                    if let Some(url) = wait::blocking(move || Ok(preview_url(&image))).await? {
                        told = told.and(teller.tell("preview", json!({"index": index, "image": url})).await);
                    }
                }
                if told.is_none() {
                    return Ok(None);
                }
            }
            _ = ticks.tick() => {
                let now = drawing.waiting.ahead();
                if now != place && let Some(position) = now {
                    teller.tell("queued", json!({"position": position})).await;
                }
                place = now;
                if teller.sender.is_closed() {
                    return Ok(None);
                }
            }
        }
    };
    let files = wait::files(app, &drawing, pictures, (format, 92)).await?;
    for (index, picture) in files.into_iter().enumerate() {
        let url = format!("data:{};base64,{}", media_type(format), to_base64(&picture.bytes));
        let seed = picture.settings.seed;
        let told = json!({"index": index, "seed": seed, "image": url, "settings": picture.settings});
        if teller.tell("picture", told).await.is_none() {
            return Ok(None);
        }
    }
    Ok(Some(()))
}
