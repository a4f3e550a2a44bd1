//! The page, with all that it needs, in the program itself.

use axum::Router;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use sha2::{Digest, Sha256};

/// What a browser may load for the page: nothing from elsewhere, and pictures that came with an answer.
const POLICY: &str =
    "default-src 'self'; img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// A file of the page.
#[derive(Clone, Copy)]
struct Asset {
    media_type: &'static str,
    text: &'static str,
}

const PAGE: Asset = Asset {
    media_type: "text/html; charset=utf-8",
    text: include_str!("index.html"),
};
const STYLE: Asset = Asset {
    media_type: "text/css; charset=utf-8",
    text: include_str!("style.css"),
};
const ICON: Asset = Asset {
    media_type: "image/svg+xml",
    text: include_str!("icon.svg"),
};
const SCRIPTS: [(&str, &str); 5] = [
    ("/assets/app.js", include_str!("app.js")),
    ("/assets/events.js", include_str!("events.js")),
    ("/assets/history.js", include_str!("history.js")),
    ("/assets/mask.js", include_str!("mask.js")),
    ("/assets/compare.js", include_str!("compare.js")),
];

/// The routes.
pub fn router() -> Router {
    let router = Router::new()
        .route("/", get(async |headers: HeaderMap| PAGE.answer(&headers)))
        .route(
            "/assets/style.css",
            get(async |headers: HeaderMap| STYLE.answer(&headers)),
        )
        .route("/favicon.svg", get(async |headers: HeaderMap| ICON.answer(&headers)));
    SCRIPTS.into_iter().fold(router, |router, (path, text)| {
        let script = Asset {
            media_type: "text/javascript; charset=utf-8",
            text,
        };
        router.route(path, get(async move |headers: HeaderMap| script.answer(&headers)))
    })
}

impl Asset {
    /// The file, or word that the browser's is the same.
    fn answer(self, headers: &HeaderMap) -> Response {
        let hash = Sha256::digest(self.text.as_bytes());
        let tag: String = hash.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        let tag = format!("\"{tag}\"");
        let same = headers
            .get(header::IF_NONE_MATCH)
            .is_some_and(|given| given == tag.as_str());
        let mut response = match same {
            true => StatusCode::NOT_MODIFIED.into_response(),
            false => self.text.into_response(),
        };
        let told = response.headers_mut();
        for (name, value) in [
            (header::CONTENT_TYPE, self.media_type),
            (header::CONTENT_SECURITY_POLICY, POLICY),
            (header::REFERRER_POLICY, "no-referrer"),
            // Asked for again each time, and not sent again.
            (header::CACHE_CONTROL, "no-cache"),
        ] {
            told.insert(name, HeaderValue::from_static(value));
        }
        if let Ok(tag) = HeaderValue::from_str(&tag) {
            told.insert(header::ETAG, tag);
        }
        response
    }
}
