//! One request and its response.

use std::time::{Duration, SystemTime};

use anyhow::bail;
use l2p_engine::shown_name;
use serde::Deserialize;
use serde_json::{Value, json};
use ureq::Agent;
use ureq::http::Uri;

use super::EndpointOptions;
use crate::data::language::{Answer, Request};

/// The longest that a connection may take to come about.
const CONNECT: Duration = Duration::from_secs(10);

/// The most bytes of a response.
const LARGEST: u64 = 16 << 20;

/// What a response that cannot be understood is told apart by from a server that is in trouble.
const OF_THE_ANSWER: &str = "its answer ";

/// What came of sending a request.
pub(super) enum Outcome {
    Answered(Answer),
    /// This request is not served.
    Refused(String),
    /// It may be served later, not before the server said.
    Again {
        reason: String,
        after: Option<Duration>,
    },
    /// None is served.
    Over(String),
}

/// The client side of the protocol.
pub(super) struct Exchange {
    agent: Agent,
    url: String,
    model: String,
    key: Option<String>,
    schema: bool,
}

/// What is read of a response.
#[derive(Deserialize)]
struct Response {
    choices: Vec<Choice>,
    #[serde(default)]
    usage: Option<Usage>,
}

#[derive(Deserialize)]
struct Choice {
    message: Message,
    #[serde(default)]
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Message {
    #[serde(default)]
    content: Option<String>,
}

#[derive(Deserialize)]
struct Usage {
    #[serde(default)]
    completion_tokens: Option<u64>,
}

impl Exchange {
    /// A client of the server that the options name.
    ///
    /// # Errors
    /// As [`super::Endpoint::new`].
    pub(super) fn new(options: &EndpointOptions) -> anyhow::Result<Self> {
        let url = full_url(&options.url)?;
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_connect(Some(CONNECT.min(options.timeout)))
            .timeout_global(Some(options.timeout))
            .user_agent(concat!("l2p-data/", env!("CARGO_PKG_VERSION")));
        if is_this_machine(&url) {
            config = config.proxy(None);
        }
        Ok(Exchange {
            agent: config.build().into(),
            url,
            model: options.model.clone(),
            key: options.key.clone(),
            schema: options.schema,
        })
    }

    /// Where requests go.
    pub(super) fn url(&self) -> &str {
        &self.url
    }

    /// Whether a reason to ask again lies in an answer, which speaks against that request and not against the server.
    pub(super) fn is_of_the_answer(&self, reason: &str) -> bool {
        reason.contains(OF_THE_ANSWER)
    }

    /// Sends a request and waits for the response.
    pub(super) fn send(&self, request: &Request) -> Outcome {
        let mut post = self.agent.post(&self.url).header("content-type", "application/json");
        if let Some(key) = &self.key {
            post = post.header("authorization", format!("Bearer {key}"));
        }
        let again = |reason: String| Outcome::Again { reason, after: None };
        let mut response = match post.send(self.body(request).to_string()) {
            Ok(response) => response,
            Err(error) => return again(format!("{}: {}", self.url, in_words(&error))),
        };
        let status = response.status().as_u16();
        let after = response
            .headers()
            .get("retry-after")
            .and_then(|value| value.to_str().ok());
        let after = after.and_then(retry_after);
        let bytes = response.body_mut().with_config().limit(LARGEST).read_to_vec();
        if status == 200 {
            return match bytes {
                Ok(bytes) => self.read(&bytes),
                Err(error) => again(format!("{}: {}", self.url, in_words(&error))),
            };
        }
        // Of a key that is wrong, servers sometimes repeat a part.
        let said = match status {
            401 | 403 => String::new(),
            _ => said(&bytes.unwrap_or_default()),
        };
        let reason = format!("{} answers {status}{said}", self.url);
        match status {
            408 | 409 | 425 | 429 | 500..=599 => Outcome::Again { reason, after },
            400 | 413 | 422 => Outcome::Refused(reason),
            401 | 403 => Outcome::Over(format!(
                "{reason}: {} (see --llm-key-env)",
                match self.key {
                    Some(_) => "the key is not accepted",
                    None => "it asks for a key, and none was given",
                }
            )),
            300..=399 => Outcome::Over(format!("{reason}: it is elsewhere; give the address that it has now")),
            _ => Outcome::Over(format!(
                "{reason}: is the address right, and `{}` a model there?",
                shown_name(&self.model)
            )),
        }
    }

    fn body(&self, request: &Request) -> Value {
        let mut body = json!({
            "model": self.model,
            "messages": [
                {"role": "system", "content": request.system},
                {"role": "user", "content": request.user},
            ],
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            // Some servers read 32 bits with a sign.
            "seed": request.seed & 0x7fff_ffff,
            "stream": false,
        });
        if let Some(shape) = request.shape.filter(|_| self.schema) {
            body["response_format"] = json!({
                "type": "json_schema",
                "json_schema": {"name": "answer", "strict": true, "schema": shape.schema()},
            });
        }
        body
    }

    fn read(&self, bytes: &[u8]) -> Outcome {
        let unusable = |what: &str| Outcome::Again {
            reason: format!("{}: {OF_THE_ANSWER}{what}", self.url),
            after: None,
        };
        let Ok(text) = std::str::from_utf8(bytes) else {
            return unusable("is not UTF-8");
        };
        let Ok(response) = serde_json::from_str::<Response>(text) else {
            return unusable("is not the JSON of a completion");
        };
        let Some(choice) = response.choices.into_iter().next() else {
            return unusable("holds no choice");
        };
        Outcome::Answered(Answer {
            text: choice.message.content.unwrap_or_default(),
            tokens: response.usage.and_then(|usage| usage.completion_tokens).unwrap_or(0) as usize,
            cut: choice.finish_reason.as_deref() == Some("length"),
        })
    }
}

/// What a server says about a failure, cut short.
fn said(bytes: &[u8]) -> String {
    let text = match serde_json::from_slice::<Value>(bytes) {
        Ok(value) => {
            let places = ["/error/message", "/message", "/detail", "/error"];
            let mut found = places.iter().filter_map(|place| value.pointer(place)?.as_str());
            found.next().unwrap_or_default().to_owned()
        }
        Err(_) => String::from_utf8_lossy(bytes).into_owned(),
    };
    match text.trim() {
        "" => String::new(),
        text => format!(" (\"{}\")", shown_name(text)),
    }
}

/// A failure of the connection, without the words that differ from one time to the next.
fn in_words(error: &ureq::Error) -> String {
    match error {
        ureq::Error::Timeout(_) => "no answer in time (see --llm-timeout)".into(),
        ureq::Error::BodyExceedsLimit(_) => format!("{OF_THE_ANSWER}has more than {LARGEST} bytes"),
        error => error.to_string(),
    }
}

/// The whole address of `chat/completions`.
fn full_url(text: &str) -> anyhow::Result<String> {
    let shown = shown_name(text);
    let Ok(uri) = text.parse::<Uri>() else {
        bail!("--llm-url {shown}: is no URL; expected one such as http://localhost:8000/v1");
    };
    if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none_or(str::is_empty) {
        bail!("--llm-url {shown}: expected a URL such as http://localhost:8000/v1");
    }
    if uri
        .authority()
        .is_some_and(|authority| authority.as_str().contains('@'))
    {
        bail!(
            "--llm-url: holds a name or password, which would show in logs; put the key into a variable (--llm-key-env)"
        );
    }
    if uri.query().is_some() {
        return Ok(text.into());
    }
    let base = text.trim_end_matches('/');
    Ok(match uri.path().trim_end_matches('/') {
        "" => format!("{base}/v1/chat/completions"),
        path if path.ends_with("/chat/completions") => base.into(),
        _ => format!("{base}/chat/completions"),
    })
}

/// Whether an address is on this machine, where no proxy is needed and no key can be read on the way.
pub(in crate::data) fn is_this_machine(url: &str) -> bool {
    let uri = url.parse::<Uri>().ok();
    let host = uri.as_ref().and_then(Uri::host).unwrap_or_default();
    host == "localhost" || host == "[::1]" || host.starts_with("127.")
}

/// What `Retry-After` says: seconds, or a date. Source: RFC 9110 § 10.2.3.
fn retry_after(text: &str) -> Option<Duration> {
    let text = text.trim();
    match text.parse::<f64>() {
        // What is no number is no time: `f64::max` alone would make it zero.
        Ok(seconds) if seconds.is_nan() => None,
        Ok(seconds) => Duration::try_from_secs_f64(seconds.max(0.0)).ok(),
        Err(_) => {
            let date = httpdate::parse_http_date(text).ok()?;
            Some(date.duration_since(SystemTime::now()).unwrap_or_default())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_completed() {
        for (given, expected) in [
            ("http://localhost:8000", "http://localhost:8000/v1/chat/completions"),
            ("http://localhost:8000/", "http://localhost:8000/v1/chat/completions"),
            ("https://host/v1", "https://host/v1/chat/completions"),
            ("https://host/api/v1/", "https://host/api/v1/chat/completions"),
            ("https://host/v1/chat/completions", "https://host/v1/chat/completions"),
            ("https://host/x?version=1", "https://host/x?version=1"),
        ] {
            assert_eq!(full_url(given).unwrap(), expected);
        }
        for bad in [
            "",
            "localhost:8000",
            "ftp://host",
            "http://",
            "file:///etc/passwd",
            "http://a b",
        ] {
            assert!(full_url(bad).is_err(), "{bad}");
        }
        let secret = full_url("https://me:secret@host").unwrap_err().to_string();
        assert!(secret.contains("password") && !secret.contains("secret"), "{secret}");
        assert!(is_this_machine("http://127.0.0.1:1/v1") && !is_this_machine("http://example.org"));
    }

    #[test]
    fn waiting_times_are_read() {
        assert_eq!(retry_after("2"), Some(Duration::from_secs(2)));
        assert_eq!(retry_after(" 0.5 "), Some(Duration::from_millis(500)));
        assert_eq!(retry_after("-3"), Some(Duration::ZERO));
        assert_eq!(retry_after("Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::ZERO));
        for bad in ["", "soon", "NaN", "inf", "1e300"] {
            assert_eq!(retry_after(bad), None, "{bad}");
        }
    }

    #[test]
    fn what_a_server_says_is_quoted_within_bounds() {
        assert_eq!(said(br#"{"error": {"message": "too long"}}"#), " (\"too long\")");
        assert_eq!(said(b"plain\x1b[2J"), " (\"plain\\u{1b}[2J\")");
        assert_eq!(said(b"{}"), "");
        assert!(said(&[b'x'; 5000]).len() < 300);
    }
}
