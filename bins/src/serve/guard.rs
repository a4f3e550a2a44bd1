//! What stands before every route: request ids, keys, the log, and the time and bytes that a client may take.

use std::net::IpAddr;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Instant;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use tokio::sync::OwnedSemaphorePermit;

use super::app::App;
use super::failure::Failure;

/// The header of a request's id.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The longest id that a client may give.
const LONGEST_ID: usize = 64;

/// Who asks: a key's name, or an address.
#[derive(Clone, Debug)]
pub struct Client(pub String);

/// The address that a connection comes from.
#[derive(Clone, Copy, Debug)]
pub struct Peer(pub IpAddr);

/// Routes that need no key: what says nothing but whether the server lives, and the page, which asks for one.
fn is_open(path: &str) -> bool {
    matches!(path, "/" | "/healthz" | "/readyz" | "/favicon.svg" | "/favicon.ico") || path.starts_with("/assets/")
}

/// Gives the request an id and a client, or refuses it, and writes a line of what came of it.
pub async fn guard(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let start = Instant::now();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let matched = request.extensions().get::<MatchedPath>();
    let route = matched.map_or("none", MatchedPath::as_str).to_owned();
    let id = request_id(&request, &app);
    let peer = request.extensions().get::<Peer>().copied();
    let address = peer.map_or_else(|| "unknown".to_owned(), |peer| peer.0.to_string());
    let client = match app.keys.is_open() {
        true => Some(address.clone()),
        false => app.keys.client(request.headers()),
    };
    let known = client.is_some();
    request
        .extensions_mut()
        .insert(Client(client.unwrap_or(address.clone())));
    let allowed = app.arguments.cors_origin.as_deref();
    let foreign = method == Method::POST && is_from_another_site(request.headers(), allowed);
    let mut response = match known || is_open(&path) {
        true if foreign => {
            let message = "a page of another site sent this: --cors-origin would allow it";
            Failure::new(StatusCode::FORBIDDEN, message).into_response()
        }
        true => next.run(request).await,
        false => {
            let message = "a key is needed: send it as `Authorization: Bearer KEY`";
            Failure::new(StatusCode::UNAUTHORIZED, message).into_response()
        }
    };
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    let headers = response.headers_mut();
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    let (status, taken) = (response.status().as_u16(), start.elapsed());
    app.metrics.served(&route, status, taken);
    tracing::info!(id, %method, path = %l2p_engine::printable(&path), status, client = address, ms = taken.as_millis() as u64, "request");
    response
}

/// The id that the client gave, if it is sound, or one of our own.
fn request_id(request: &Request, app: &App) -> String {
    let given = request.headers().get(REQUEST_ID).and_then(|value| value.to_str().ok());
    let sound = |id: &&str| {
        let letters = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        !id.is_empty() && id.len() <= LONGEST_ID && id.bytes().all(letters)
    };
    match given.filter(sound) {
        Some(id) => id.to_owned(),
        None => format!("r{:x}-{}", app.started, app.number()),
    }
}

/// Whether a page of another site had a browser send this. Browsers name the site where it is another one, and ask nobody before they
/// send a form.
fn is_from_another_site(headers: &HeaderMap, allowed: Option<&str>) -> bool {
    let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    let Some(origin) = text(header::ORIGIN) else {
        return false;
    };
    let host = origin.split_once("://").map_or(origin, |(_, host)| host);
    Some(host) != text(header::HOST) && allowed != Some("*") && allowed != Some(origin)
}

/// A body that was read, and its share of what all bodies may take together, which it holds as long as it is there.
pub struct Read {
    bytes: Bytes,
    _share: OwnedSemaphorePermit,
}

impl Deref for Read {
    type Target = Bytes;

    fn deref(&self) -> &Bytes {
        &self.bytes
    }
}

/// The whole body of a request that says that it is JSON, within the limits.
///
/// # Errors
/// When it says something else, and as [`body`].
pub async fn json(app: &App, headers: &HeaderMap, sent: Body) -> Result<Read, Failure> {
    let media_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let kind = media_type
        .unwrap_or_default()
        .split(';')
        .next()
        .unwrap_or_default()
        .trim();
    if !kind.eq_ignore_ascii_case("application/json") {
        return Err(Failure::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "expected JSON: content-type application/json",
        ));
    }
    body(app, sent).await
}

/// The whole body, within the limits.
///
/// # Errors
/// When it is too large, comes too slowly, or breaks off; when too many come at a time.
pub async fn body(app: &App, body: Body) -> Result<Read, Failure> {
    let most = usize::try_from(app.arguments.max_body.0).unwrap_or(usize::MAX);
    // As much as it says, or as it may be.
    let bytes = body
        .size_hint()
        .exact()
        .map_or(most, |bytes| (bytes as usize).min(most));
    let kilobytes = u32::try_from(bytes.div_ceil(1024))
        .unwrap_or(u32::MAX)
        .clamp(1, app.body_kilobytes());
    let share = tokio::time::timeout(
        app.arguments.patience(),
        app.bodies.clone().acquire_many_owned(kilobytes),
    );
    let Ok(Ok(share)) = share.await else {
        return Err(Failure::later(
            StatusCode::SERVICE_UNAVAILABLE,
            "too much is being sent at a time",
            5,
        ));
    };
    let collected = tokio::time::timeout(app.arguments.patience(), Limited::new(body, most).collect());
    match collected.await {
        Err(_) => Err(Failure::new(StatusCode::REQUEST_TIMEOUT, "the request came too slowly")),
        Ok(Ok(collected)) => Ok(Read {
            bytes: collected.to_bytes(),
            _share: share,
        }),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            let message = format!("the request has more than {most} bytes");
            Err(Failure::new(StatusCode::PAYLOAD_TOO_LARGE, message))
        }
        Ok(Err(_)) => Err(Failure::bad("the request broke off")),
    }
}
