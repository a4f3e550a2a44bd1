//! What goes wrong, as clients are told: a status and one line, in the form that OpenAI's clients read.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use l2p_engine::{Error, ErrorKind, printable};
use serde_json::{Value, json};

/// Characters of a message at most: it may quote what was sent.
const LONGEST: usize = 500;

/// A refusal, or a failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The status.
    pub status: StatusCode,
    /// One line.
    pub message: String,
    /// The field at fault, if it is one.
    pub field: Option<String>,
    /// Seconds after which it may be tried again.
    pub retry_after: Option<u64>,
}

impl Failure {
    /// With a status and a line.
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Failure {
            status,
            message: message.into(),
            field: None,
            retry_after: None,
        }
    }

    /// The client's mistake.
    pub fn bad(message: impl Into<String>) -> Self {
        Failure::new(StatusCode::BAD_REQUEST, message)
    }

    /// The client's mistake in a field.
    pub fn field(name: &str, message: impl std::fmt::Display) -> Self {
        Failure {
            field: Some(name.to_owned()),
            ..Failure::bad(format!("{name}: {message}"))
        }
    }

    /// To be tried again later.
    pub fn later(status: StatusCode, message: impl Into<String>, seconds: u64) -> Self {
        Failure {
            retry_after: Some(seconds),
            ..Failure::new(status, message)
        }
    }

    /// What the engine says. What it says of files and devices is for whoever runs the server, and goes to its log.
    pub fn of(error: &Error) -> Self {
        match error.kind() {
            ErrorKind::Request => Failure::bad(error.to_string()),
            ErrorKind::Interrupted => {
                Failure::new(StatusCode::SERVICE_UNAVAILABLE, "it was stopped before it was done")
            }
            _ if matches!(error, Error::Busy { .. }) => {
                Failure::later(StatusCode::SERVICE_UNAVAILABLE, "too many requests wait", 2)
            }
            _ => {
                tracing::error!(error = %error, "drawing failed");
                let message = match error {
                    Error::OutOfMemory { .. } => {
                        "the device has too little memory for this: ask for a smaller size or fewer pictures"
                    }
                    Error::NotFinite { .. } => {
                        "the model gave numbers that are none: another seed, size or guidance may do"
                    }
                    _ => "the server failed at this; its log says why",
                };
                Failure::new(StatusCode::INTERNAL_SERVER_ERROR, message)
            }
        }
    }

    /// The line, without anything that moves a terminal's cursor, and not longer than a line.
    fn line(&self) -> String {
        let line = printable(&self.message);
        match line.char_indices().nth(LONGEST) {
            Some((end, _)) => format!("{}…", &line[..end]),
            None => line.into_owned(),
        }
    }

    /// The body.
    pub fn body(&self) -> Value {
        let kind = match self.status.as_u16() {
            401 | 403 => "authentication_error",
            429 => "rate_limit_error",
            400..500 => "invalid_request_error",
            _ => "server_error",
        };
        json!({"error": {"message": self.line(), "type": kind, "param": self.field, "code": self.status.as_u16().to_string()}})
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_short_and_harmless() {
        let body = Failure::field("size\x1b[2J", "x".repeat(2000)).body();
        let message = body["error"]["message"].as_str().unwrap();
        assert!(
            message.chars().count() <= LONGEST + 1 && !message.contains('\x1b'),
            "{message}"
        );
        assert_eq!(
            (&body["error"]["type"], &body["error"]["code"]),
            (&json!("invalid_request_error"), &json!("400"))
        );
    }

    #[test]
    fn what_is_not_the_clients_matter_is_not_told() {
        let failure = Failure::of(&Error::file("/secret/model.safetensors", "is damaged"));
        assert_eq!(failure.status, StatusCode::INTERNAL_SERVER_ERROR);
        assert!(!failure.message.contains("secret"), "{}", failure.message);
        assert_eq!(
            Failure::of(&Error::invalid("a steps of 0")).status,
            StatusCode::BAD_REQUEST
        );
    }
}
