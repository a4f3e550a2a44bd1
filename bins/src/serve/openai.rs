//! OpenAI's interface for pictures, as its clients speak it: `/v1/models`, `/v1/images/generations`, `/v1/images/edits`, with fields of our
//! own for what theirs cannot say (`seed`, `steps`, `cfg`, `shift`, `negative_prompt`, `rng`; of edits `strength`, `feather`, `extend`).

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use l2p_engine::image_io::ImageFormat;
use serde_json::{Value, json};
use tokio_stream::wrappers::ReceiverStream;

use super::app::{App, Ask, Drawing};
use super::failure::Failure;
use super::fields::Fields;
use super::guard::{self, Client};
use super::pictures::{format_name, format_of, media_type, preview, to_base64};
use super::wait::{self, Picture};

/// Fields of OpenAI's that mean nothing to a model on one's own machine.
const WITHOUT_MEANING: [&str; 7] = [
    "user",
    "quality",
    "style",
    "moderation",
    "background",
    "input_fidelity",
    "extra_body",
];

/// The most partial pictures that a client may ask for, as OpenAI has it.
const MOST_PARTIAL: u64 = 3;

/// The routes.
pub fn router() -> Router<Arc<App>> {
    Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{name}", get(model))
        .route("/v1/images/generations", post(generations))
        .route("/v1/images/edits", post(edits))
        .route("/v1/files/{name}", get(file))
}

fn described(app: &App, name: &str) -> Value {
    json!({"id": name, "object": "model", "created": app.started, "owned_by": "l2p"})
}

async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    let all: Vec<Value> = app.models.iter().map(|model| described(&app, &model.name)).collect();
    Json(json!({"object": "list", "data": all}))
}

async fn model(State(app): State<Arc<App>>, Path(name): Path<String>) -> Result<Json<Value>, Failure> {
    let model = app.model(Some(&name))?;
    Ok(Json(described(&app, &model.name)))
}

/// A picture whose address was given out.
async fn file(State(app): State<Arc<App>>, Path(name): Path<String>) -> Result<Response, Failure> {
    let found = app.files.get(&name);
    let (media_type, bytes) =
        found.ok_or_else(|| Failure::new(StatusCode::NOT_FOUND, "there is no such picture, or not any more"))?;
    Ok(([(header::CONTENT_TYPE, media_type)], bytes).into_response())
}

/// How pictures are answered.
#[derive(Clone, Debug)]
pub(super) struct Form {
    format: ImageFormat,
    quality: u8,
    by_url: bool,
    stream: bool,
    partial: u64,
    ignored: Vec<String>,
}

/// What a request asks for.
#[derive(Debug)]
pub(super) struct Asked {
    ask: Ask,
    form: Form,
}

/// What fields ask for; pictures come beside them.
///
/// # Errors
/// Naming the field at fault.
pub(super) fn parse(mut fields: Fields, pictures: Pictures) -> Result<Asked, Failure> {
    let prompt = fields.text("prompt")?;
    let size = size(fields.text("size")?.as_deref())?;
    let ask = Ask {
        model: fields.text("model")?,
        prompt: prompt.ok_or_else(|| Failure::field("prompt", "is missing"))?,
        negative: fields.text("negative_prompt")?,
        width: size.map(|[width, _]| width),
        height: size.map(|[_, height]| height),
        steps: fields.whole("steps")?,
        cfg: fields.real("cfg")?,
        shift: fields.real("shift")?,
        seed: fields.whole("seed")?,
        count: fields.whole("n")?,
        rng: fields.text("rng")?,
        image: pictures.image,
        strength: fields.real("strength")?,
        mask: pictures.mask,
        invert_mask: false,
        feather: fields.whole("feather")?,
        extend: fields.text("extend")?.as_deref().map(margins).transpose()?,
    };
    let format = format_of("output_format", fields.text("output_format")?.as_deref())?;
    let quality = match fields.whole("output_compression")? {
        None => 92,
        Some(quality @ 0..=100) => quality.max(1) as u8,
        Some(other) => {
            return Err(Failure::field(
                "output_compression",
                format!("expected 0 to 100, found {other}"),
            ));
        }
    };
    let by_url = match fields.text("response_format")?.as_deref() {
        None | Some("b64_json") => false,
        Some("url") => true,
        Some(_) => return Err(Failure::field("response_format", "expected b64_json or url")),
    };
    let stream = fields.flag("stream")?.unwrap_or(false);
    if stream && by_url {
        return Err(Failure::field("response_format", "url is not for streams"));
    }
    let partial = fields.whole("partial_images")?.unwrap_or(0);
    if partial > MOST_PARTIAL {
        return Err(Failure::field(
            "partial_images",
            format!("expected 0 to {MOST_PARTIAL}, found {partial}"),
        ));
    }
    let ignored = fields.pass_over(&WITHOUT_MEANING);
    fields.finish()?;
    let form = Form {
        format,
        quality,
        by_url,
        stream,
        partial,
        ignored,
    };
    Ok(Asked { ask, form })
}

/// Width and height, as `1024x1024`; nothing of `auto`.
fn size(text: Option<&str>) -> Result<Option<[u64; 2]>, Failure> {
    let Some(text) = text.filter(|text| *text != "auto") else {
        return Ok(None);
    };
    let sides = text
        .split_once('x')
        .and_then(|(width, height)| Some([width.parse().ok()?, height.parse().ok()?]));
    match sides {
        Some(sides) => Ok(Some(sides)),
        None => Err(Failure::field(
            "size",
            "expected WIDTHxHEIGHT, such as 1024x1024, or auto",
        )),
    }
}

/// Columns and rows at the left, top, right and bottom.
fn margins(text: &str) -> Result<[u64; 4], Failure> {
    let numbers: Option<Vec<u64>> = text.split(',').map(|number| number.trim().parse().ok()).collect();
    let numbers = numbers.and_then(|numbers| <[u64; 4]>::try_from(numbers).ok());
    numbers.ok_or_else(|| Failure::field("extend", "expected four numbers of pixels: left,top,right,bottom"))
}

async fn generations(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Failure> {
    let bytes = guard::json(&app, &headers, body).await?;
    let asked = parse(Fields::of_json(&bytes)?, Pictures::default())?;
    answer(&app, client, &headers, asked, "image_generation").await
}

async fn edits(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Failure> {
    let bytes = guard::body(&app, body).await?;
    let media_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let (fields, pictures) = form(media_type.unwrap_or_default(), bytes.clone()).await?;
    if pictures.image.is_none() {
        return Err(Failure::field("image", "is missing: the picture to begin with"));
    }
    let asked = parse(fields, pictures)?;
    answer(&app, client, &headers, asked, "image_edit").await
}

/// The pictures of a form.
#[derive(Debug, Default)]
pub(super) struct Pictures {
    pub image: Option<Vec<u8>>,
    pub mask: Option<Vec<u8>>,
}

/// The most parts of a form.
const MOST_PARTS: usize = 64;

/// The texts and pictures of a form.
///
/// # Errors
/// When it is no form, or has a part that means nothing here.
pub(super) async fn form(media_type: &str, bytes: Bytes) -> Result<(Fields, Pictures), Failure> {
    let unread = |error: multer::Error| Failure::bad(format!("the form cannot be read: {error}"));
    let boundary = multer::parse_boundary(media_type)
        .map_err(|_| Failure::bad("expected a form: content-type multipart/form-data with a boundary"))?;
    let stream = tokio_stream::once(Ok::<Bytes, Infallible>(bytes));
    let mut form = multer::Multipart::new(stream, boundary);
    let (mut texts, mut pictures, mut parts) = (BTreeMap::new(), Pictures::default(), 0);
    while let Some(part) = form.next_field().await.map_err(unread)? {
        parts += 1;
        if parts > MOST_PARTS {
            return Err(Failure::bad(format!("the form has more than {MOST_PARTS} parts")));
        }
        let name = part.name().unwrap_or_default().to_owned();
        let place = match name.as_str() {
            "image" | "image[]" => Some(&mut pictures.image),
            "mask" => Some(&mut pictures.mask),
            _ => None,
        };
        match place {
            Some(Some(_)) => return Err(Failure::field(&name, "is there twice: one picture is edited at a time")),
            Some(place) => *place = Some(part.bytes().await.map_err(unread)?.to_vec()),
            None => {
                let bytes = part.bytes().await.map_err(unread)?;
                let text = String::from_utf8(bytes.to_vec()).map_err(|_| Failure::field(&name, "is no text"))?;
                if texts.insert(name.clone(), text).is_some() {
                    return Err(Failure::field(&name, "is there twice"));
                }
            }
        }
    }
    Ok((Fields::of_form(texts)?, pictures))
}

/// Draws, and answers in the form that was asked for.
async fn answer(
    app: &Arc<App>,
    Client(client): Client,
    headers: &HeaderMap,
    Asked { ask, form }: Asked,
    event: &'static str,
) -> Result<Response, Failure> {
    let mut drawing = wait::ask(app, client, ask, form.stream && form.partial > 0).await?;
    if form.stream {
        return Ok(stream(app.clone(), drawing, form, event));
    }
    let pictures = wait::drawn(&mut drawing).await?;
    let files = wait::files(app, &drawing, pictures, (form.format, form.quality)).await?;
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    let secure = headers.get("x-forwarded-proto").is_some_and(|scheme| scheme == "https");
    let scheme = if secure { "https" } else { "http" };
    let base = format!("{scheme}://{}/v1/files", host.unwrap_or("localhost"));
    let size = files
        .first()
        .map(|file| format!("{}x{}", file.settings.width, file.settings.height));
    let data = files.into_iter().map(|file| {
        let mut entry = json!({"seed": file.settings.seed});
        match form.by_url {
            true => {
                let name = app
                    .files
                    .keep(format_name(form.format), media_type(form.format), file.bytes);
                entry["url"] = json!(format!("{base}/{name}"));
            }
            false => entry["b64_json"] = json!(to_base64(&file.bytes)),
        }
        entry
    });
    let data: Vec<Value> = data.collect();
    let order = &drawing.order;
    Ok(Json(json!({
        "created": now(), "data": data, "output_format": format_name(form.format), "size": size,
        "model": drawing.model.name, "steps": order.settings.steps, "cfg": order.settings.cfg, "shift": order.settings.shift,
        "rng": order.rng.to_string(), "prompt": order.prompt, "negative_prompt": order.negative,
        "strength": order.start.as_ref().map(|start| start.strength), "without_meaning": form.ignored,
    }))
    .into_response())
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_secs())
}

/// Events of a drawing: partial pictures, then a whole one each.
fn stream(app: Arc<App>, mut drawing: Drawing, form: Form, event: &'static str) -> Response {
    let (sender, events) = tokio::sync::mpsc::channel::<Result<Event, Infallible>>(4);
    // Who does not read is not waited for.
    let patience = app.arguments.patience();
    let send = move |name: String, data: Value| {
        let sender = sender.clone();
        async move {
            let event = Ok(Event::default().event(name).data(data.to_string()));
            matches!(tokio::time::timeout(patience, sender.send(event)).await, Ok(Ok(())))
        }
    };
    tokio::spawn(async move {
        let shape = |drawing: &Drawing| {
            let described = drawing.model.described(&drawing.order, 0, &app.arguments);
            json!({"created_at": now(), "size": format!("{}x{}", described.width, described.height),
                   "quality": "auto", "background": "opaque", "output_format": format_name(form.format)})
        };
        let (mut told, mut last) = (0, None);
        let outcome = loop {
            tokio::select! {
                outcome = &mut drawing.waiting.answer => {
                    break outcome.unwrap_or_else(|_| Err(Failure::bad("the server is about to end")));
                }
                changed = drawing.waiting.progress.changed(), if told < form.partial => {
                    let preview_of = drawing.waiting.progress.borrow_and_update().previews.last().cloned();
                    let (true, Some((_, image))) = (changed.is_ok(), preview_of) else { continue };
                    if last.as_ref().is_some_and(|last| Arc::ptr_eq(last, &image)) {
                        continue;
                    }
                    last = Some(image.clone());
                    let bytes = wait::blocking(move || Ok(preview(&image))).await.ok().flatten();
                    let mut data = shape(&drawing);
                    data["type"] = json!(format!("{event}.partial_image"));
                    data["b64_json"] = json!(to_base64(&bytes.unwrap_or_default()));
                    data["output_format"] = json!("jpeg");
                    data["partial_image_index"] = json!(told);
                    told += 1;
                    if !send(format!("{event}.partial_image"), data).await {
                        return;
                    }
                }
            }
        };
        let files = match outcome {
            Ok(pictures) => wait::files(&app, &drawing, pictures, (form.format, form.quality)).await,
            Err(failure) => Err(failure),
        };
        let files: Vec<Picture> = match files {
            Ok(files) => files,
            Err(failure) => {
                send("error".into(), failure.body()).await;
                return;
            }
        };
        for file in files {
            let mut data = shape(&drawing);
            data["type"] = json!(format!("{event}.completed"));
            data["b64_json"] = json!(to_base64(&file.bytes));
            data["seed"] = json!(file.settings.seed);
            data["usage"] = json!({"input_tokens": 0, "output_tokens": 0, "total_tokens": 0,
                                   "input_tokens_details": {"image_tokens": 0, "text_tokens": 0}});
            if !send(format!("{event}.completed"), data).await {
                return;
            }
        }
    });
    Sse::new(ReceiverStream::new(events))
        .keep_alive(KeepAlive::default())
        .into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Asked, Failure> {
        parse(Fields::of_json(text.as_bytes())?, Pictures::default())
    }

    #[test]
    fn what_openais_clients_send_is_understood() {
        let asked = parsed(
            r#"{"model": "pixel", "prompt": "fox", "n": 2, "size": "64x128", "quality": "high", "user": "me", "stream": false,
                "output_format": "webp", "output_compression": 80, "response_format": "url", "seed": 7}"#,
        )
        .unwrap();
        let Ask {
            width,
            height,
            count,
            seed,
            ..
        } = asked.ask;
        assert_eq!((width, height, count, seed), (Some(64), Some(128), Some(2), Some(7)));
        assert!(asked.form.by_url && asked.form.quality == 80 && asked.form.format == ImageFormat::WebP);
        assert_eq!(asked.form.ignored, ["user", "quality"]);
        assert_eq!(
            parsed(r#"{"prompt": "fox", "size": "auto", "n": null}"#)
                .unwrap()
                .ask
                .width,
            None
        );
    }

    #[test]
    fn mistakes_are_named() {
        for (text, field) in [
            (r#"{"n": 1}"#, "prompt"),
            (r#"{"prompt": 3}"#, "prompt"),
            (r#"{"prompt": "x", "size": "big"}"#, "size"),
            (r#"{"prompt": "x", "size": "1x-2"}"#, "size"),
            (r#"{"prompt": "x", "output_format": "gif"}"#, "output_format"),
            (r#"{"prompt": "x", "output_compression": 101}"#, "output_compression"),
            (r#"{"prompt": "x", "response_format": "pdf"}"#, "response_format"),
            (r#"{"prompt": "x", "partial_images": 9}"#, "partial_images"),
            (r#"{"prompt": "x", "extend": "1,2"}"#, "extend"),
            (r#"{"prompt": "x", "sede": 3}"#, "sede"),
        ] {
            assert_eq!(parsed(text).unwrap_err().field.as_deref(), Some(field), "{text}");
        }
    }

    #[tokio::test]
    async fn forms_are_read() {
        let body = "--b\r\ncontent-disposition: form-data; name=\"prompt\"\r\n\r\nfox\r\n--b\r\n\
                    content-disposition: form-data; name=\"image\"; filename=\"a.png\"\r\ncontent-type: image/png\r\n\r\nPNG\r\n--b--\r\n";
        let (fields, pictures) = form("multipart/form-data; boundary=b", body.into()).await.unwrap();
        assert_eq!(pictures.image.as_deref(), Some(&b"PNG"[..]));
        assert_eq!(parse(fields, pictures).unwrap().ask.prompt, "fox");
        for (media_type, body) in [
            ("application/json", "{}"),
            ("multipart/form-data", body),
            ("multipart/form-data; boundary=b", "--b\r\n"),
            ("multipart/form-data; boundary=c", body),
        ] {
            assert!(form(media_type, body.into()).await.is_err(), "{media_type} {body}");
        }
    }
}
