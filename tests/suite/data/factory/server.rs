//! A server that speaks the protocol of language models, on loopback, and misbehaves as it is told.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use l2p_tests::hash_uniform;
use serde_json::{Value, json};

/// What the server does with a request.
#[derive(Clone, Debug)]
pub enum Reply {
    /// A completion with this text.
    Says(String),
    /// A status with further headers and a body.
    Status(u16, &'static str, &'static str),
    /// Status 200 with these bytes as its body.
    Raw(Vec<u8>),
    /// Nothing for so long, then the connection ends.
    Silence(Duration),
    /// The connection ends at once.
    Closes,
}

/// A request as the server saw it.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The header lines.
    pub head: String,
    /// The JSON body.
    pub body: Value,
}

impl Seen {
    /// What the user's message holds.
    pub fn user(&self) -> Value {
        let text = self.body["messages"][1]["content"].as_str().unwrap_or_default();
        serde_json::from_str(text).unwrap_or_default()
    }

    /// The subjects that prompts are wanted of.
    pub fn subjects(&self) -> Vec<String> {
        let subjects = self.user()["subjects"].as_array().cloned().unwrap_or_default();
        subjects
            .iter()
            .filter_map(|subject| subject.as_str().map(String::from))
            .collect()
    }

    /// Whether a verdict is asked for.
    pub fn is_audit(&self) -> bool {
        self.user()["prompt"].is_string()
    }
}

type Behaviour = dyn Fn(usize, &Seen) -> Reply + Send + Sync;

/// The server, until it is dropped.
pub struct Server {
    port: u16,
    over: Arc<AtomicBool>,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Server {
    /// Starts one that replies to its requests, numbered from 0, as `behaviour` says.
    pub fn start(behaviour: impl Fn(usize, &Seen) -> Reply + Send + Sync + 'static) -> std::io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = listener.local_addr()?.port();
        let (over, seen) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let behaviour: Arc<Behaviour> = Arc::new(behaviour);
        let (ended, noted) = (over.clone(), seen.clone());
        std::thread::spawn(move || {
            let count = Arc::new(AtomicUsize::new(0));
            for stream in listener.incoming().flatten() {
                if ended.load(Ordering::Relaxed) {
                    return;
                }
                let (behaviour, noted, count) = (behaviour.clone(), noted.clone(), count.clone());
                // A connection that breaks is the client's matter.
                std::thread::spawn(move || serve(stream, &*behaviour, &noted, &count).ok());
            }
        });
        Ok(Server { port, over, seen })
    }

    /// Its address.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The requests so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port));
    }
}

fn serve(
    stream: TcpStream,
    behaviour: &Behaviour,
    noted: &Mutex<Vec<Seen>>,
    count: &AtomicUsize,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut out = stream;
    loop {
        let (mut head, mut length) = (String::new(), 0);
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
            if line.trim().is_empty() {
                break;
            }
            let lower = line.to_lowercase();
            if let Some(value) = lower.strip_prefix("content-length:") {
                length = value.trim().parse().unwrap_or(0);
            }
            head += &line;
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        let seen = Seen {
            head,
            body: serde_json::from_slice(&body).unwrap_or_default(),
        };
        let number = count.fetch_add(1, Ordering::Relaxed);
        let reply = behaviour(number, &seen);
        noted.lock().unwrap().push(seen);
        let mut send = |status: u16, headers: &str, body: &[u8]| -> std::io::Result<()> {
            let head = format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n{headers}\r\n", body.len());
            out.write_all(head.as_bytes())?;
            out.write_all(body)?;
            out.flush()
        };
        match reply {
            Reply::Says(text) => {
                let body = json!({
                    "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
                    "usage": {"completion_tokens": 7},
                });
                send(200, "content-type: application/json\r\n", body.to_string().as_bytes())?;
            }
            Reply::Status(status, headers, body) => send(status, headers, body.as_bytes())?,
            Reply::Raw(body) => send(200, "", &body)?,
            Reply::Silence(time) => {
                std::thread::sleep(time);
                return Ok(());
            }
            Reply::Closes => return Ok(()),
        }
    }
}

/// A prompt as a good model would write one of a subject, the same each time for the same words.
pub fn good_prompt(subject: &str, about: &str) -> String {
    const WORDS: [&str; 40] = [
        "amber", "river", "window", "quiet", "copper", "meadow", "shadow", "linen", "winter", "lantern", "harbour",
        "velvet", "stone", "morning", "paper", "silver", "garden", "distant", "gentle", "hollow", "crimson", "marble",
        "thunder", "orchard", "feather", "ribbon", "cellar", "violet", "bridge", "candle", "frozen", "saffron",
        "timber", "mirror", "valley", "canvas", "ember", "willow", "granite", "cotton",
    ];
    let draws = hash_uniform(&format!("{subject} {about}"), 40);
    let mut words = draws.iter().map(|draw| WORDS[(f64::from(draw + 1.0) * 19.99) as usize]);
    let mut next = |count: usize| words.by_ref().take(count).collect::<Vec<_>>().join(" ");
    format!(
        "Beside {} stands the {subject}, seen against {}. The light is {} and falls on {}. Behind it one makes out {}. The words \"{}\" \
         are written nearby.",
        next(3),
        next(4),
        next(3),
        next(4),
        next(5),
        next(2)
    )
}

/// What a good model answers to a request of the factory.
pub fn good(seen: &Seen) -> Reply {
    if seen.is_audit() {
        return Reply::Says(json!({"is_valid": true, "reason": "fine"}).to_string());
    }
    Reply::Says(json!(good_prompts(seen)).to_string())
}

/// A good prompt for each subject of a request.
pub fn good_prompts(seen: &Seen) -> Vec<String> {
    let about = seen.body["seed"].to_string();
    let subjects = seen.subjects();
    subjects.iter().map(|subject| good_prompt(subject, &about)).collect()
}
