//! One client: a connection for each request, read as it comes.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

/// The longest that a client waits for the next byte.
const PATIENCE: Duration = Duration::from_secs(600);

/// Where a server is: host and port.
pub struct Address(pub String);

/// A picture that is asked for.
pub struct Asked {
    /// What to draw.
    pub prompt: String,
    /// Seed of the noise.
    pub seed: usize,
    /// Pixels of a side.
    pub side: usize,
    /// Denoising steps.
    pub steps: usize,
}

/// A request's end.
#[derive(Debug)]
pub enum Outcome {
    /// The picture came.
    Picture {
        /// Its file, in base64.
        bytes: String,
        /// Seconds from the request on.
        seconds: f64,
        /// Seconds to the first preview, if there was one.
        preview: Option<f64>,
    },
    /// The server said that it makes no sense.
    Refused,
    /// The client went.
    Left,
}

impl Address {
    fn connect(&self) -> anyhow::Result<TcpStream> {
        let stream = TcpStream::connect(&self.0).with_context(|| format!("no server answers at {}", self.0))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    fn send(&self, head: &str, body: &[u8]) -> anyhow::Result<BufReader<TcpStream>> {
        let mut stream = self.connect()?;
        let lines = format!("{head} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n", self.0);
        let lines = format!(
            "{lines}content-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(&[lines.as_bytes(), body].concat())?;
        Ok(BufReader::new(stream))
    }

    /// The status of a page.
    pub fn status(&self, path: &str) -> anyhow::Result<u16> {
        status(&mut self.send(&format!("GET {path}"), b"")?)
    }

    /// What the server says of itself.
    pub fn info(&self) -> anyhow::Result<Value> {
        let mut reader = self.send("GET /api/info", b"")?;
        ensure!(status(&mut reader)? == 200, "the server does not say what it is");
        let mut text = String::new();
        reader.read_to_string(&mut text)?;
        let body = text.find("\r\n\r\n").map_or(text.as_str(), |end| &text[end + 4..]);
        Ok(serde_json::from_str(body)?)
    }

    /// Asks for a picture; one who leaves does so after the first step.
    pub fn draw(&self, asked: &Asked, leaves: bool) -> anyhow::Result<Outcome> {
        let start = Instant::now();
        let Asked {
            prompt,
            seed,
            side,
            steps,
        } = asked;
        let body = json!({"prompt": prompt, "seed": seed, "width": side, "height": side, "steps": steps, "cfg": 1});
        let mut reader = self.send("POST /api/draw", body.to_string().as_bytes())?;
        let found = status(&mut reader)?;
        ensure!(found == 200, "a request was refused with {found}");
        let (mut name, mut preview, mut picture) = (String::new(), None, None);
        let mut line = String::new();
        while reader.read_line(&mut line)? > 0 {
            if let Some(event) = line.strip_prefix("event:") {
                name = event.trim().to_owned();
            }
            if let Some(data) = line.strip_prefix("data:") {
                match name.as_str() {
                    "step" if leaves => return Ok(Outcome::Left),
                    "preview" => {
                        preview.get_or_insert_with(|| start.elapsed().as_secs_f64());
                    }
                    "picture" => {
                        let told: Value = serde_json::from_str(data)?;
                        ensure!(
                            told["seed"] == json!(seed),
                            "the picture of another seed: {}",
                            told["seed"]
                        );
                        picture = told["image"]
                            .as_str()
                            .map(|text| (text.to_owned(), start.elapsed().as_secs_f64()));
                    }
                    "error" => bail!("a request failed: {}", data.trim()),
                    _ => {}
                }
            }
            line.clear();
        }
        let (bytes, seconds) = picture.context("a request ended without a picture")?;
        Ok(Outcome::Picture {
            bytes,
            seconds,
            preview,
        })
    }

    /// Sends something that makes no sense, another thing each time.
    pub fn nonsense(&self, number: usize) -> anyhow::Result<Outcome> {
        const BODIES: [&str; 5] = [
            "{",
            "{\"prompt\": 1}",
            "{\"prompt\": \"x\", \"steps\": -1}",
            "{\"prompt\": \"x\", \"width\": 1e9}",
            "{\"prompt\": \"x\", \"image\": \"bm8gcGljdHVyZQ==\"}",
        ];
        let body = BODIES[number / 10 % BODIES.len()];
        let found = status(&mut self.send("POST /api/draw", body.as_bytes())?)?;
        ensure!((400..500).contains(&found), "{body} was answered with {found}");
        Ok(Outcome::Refused)
    }
}

/// The status of an answer that begins.
fn status(reader: &mut impl BufRead) -> anyhow::Result<u16> {
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
    status.with_context(|| format!("no answer, but `{}`", l2p_engine::shown_name(line.trim())))
}
