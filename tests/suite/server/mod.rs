//! `l2p-serve` as its clients see it, with the demo's pixel model on the CPU.

mod api;
mod hostile;
mod limits;
mod openai;
#[cfg(unix)]
mod page;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use l2p_tests::cli::{Finished, program};
use l2p_tests::{Suite, models_folder};
use libtest_mimic::Failed;
use serde_json::Value;

pub fn register(suite: &mut Suite) {
    api::register(suite);
    hostile::register(suite);
    limits::register(suite);
    openai::register(suite);
    #[cfg(unix)]
    page::register(suite);
}

/// A server, ended when this is dropped.
struct Server {
    child: Child,
    port: u16,
    said: Arc<Mutex<String>>,
}

/// What came back.
#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

/// The demo's pixel model.
fn model() -> Result<String, Failed> {
    Ok(models_folder().join("demo/pixel").canonicalize()?.display().to_string())
}

impl Server {
    /// Starts one with the demo's pixel model and these flags, and waits until it is ready.
    fn start(flags: &[&str]) -> Result<Self, Failed> {
        let mut command = Command::new(program("l2p-serve")?);
        command
            .args(["--model", &model()?, "--device", "cpu", "--port", "0"])
            .args(flags);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let mut lines = BufReader::new(child.stderr.take().ok_or("no standard error")?);
        let said = Arc::new(Mutex::new(String::new()));
        let mut port = None;
        let mut line = String::new();
        while port.is_none() && lines.read_line(&mut line)? > 0 {
            let found = line
                .trim()
                .strip_prefix("listening at http://")
                .and_then(|rest| rest.strip_suffix('/'));
            port = found.and_then(|address| address.rsplit_once(':')?.1.parse().ok());
            said.lock().map_err(|_| "a reader panicked")?.push_str(&line);
            line.clear();
        }
        let heard = said.clone();
        std::thread::spawn(move || {
            let mut line = String::new();
            while lines.read_line(&mut line).is_ok_and(|bytes| bytes > 0) {
                if let Ok(mut said) = heard.lock() {
                    said.push_str(&line);
                }
                line.clear();
            }
        });
        let server = Server {
            child,
            port: port.ok_or("the server does not listen")?,
            said,
        };
        let started = Instant::now();
        while server.get("/readyz")?.status != 200 {
            if started.elapsed() > Duration::from_secs(60) {
                return Err(format!("the server does not become ready: {}", server.said()).into());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(server)
    }

    /// What it has said so far.
    fn said(&self) -> String {
        self.said.lock().map(|said| said.clone()).unwrap_or_default()
    }

    /// A connection.
    fn connect(&self) -> Result<TcpStream, Failed> {
        let stream = TcpStream::connect(("127.0.0.1", self.port))?;
        stream.set_read_timeout(Some(Duration::from_secs(120)))?;
        Ok(stream)
    }

    /// Sends bytes as they are, and reads until the server closes.
    fn exchange(&self, bytes: &[u8]) -> Result<Answer, Failed> {
        let mut stream = self.connect()?;
        // A server that refuses what is too large need not read it all.
        let _ = stream.write_all(bytes);
        read(stream)
    }

    fn get(&self, path: &str) -> Result<Answer, Failed> {
        self.exchange(format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").as_bytes())
    }

    /// Begins a request and leaves it open.
    fn begin(&self, path: &str, headers: &str, body: &[u8]) -> Result<TcpStream, Failed> {
        let mut stream = self.connect()?;
        stream.write_all(&request(path, headers, body))?;
        Ok(stream)
    }

    fn post(&self, path: &str, body: &Value) -> Result<Answer, Failed> {
        self.exchange(&request(
            path,
            "content-type: application/json\r\n",
            body.to_string().as_bytes(),
        ))
    }

    /// Asks it to end.
    #[cfg(unix)]
    fn terminate(&self) -> Result<(), Failed> {
        let sent = Command::new("kill")
            .args(["-TERM", &self.child.id().to_string()])
            .status()?;
        match sent.success() {
            true => Ok(()),
            false => Err("the signal could not be sent".into()),
        }
    }

    /// Waits until it has ended, and returns its exit code.
    #[cfg(unix)]
    fn wait(mut self) -> Result<Option<i32>, Failed> {
        Ok(self.child.wait()?.code())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The bytes of a POST.
fn request(path: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let length = body.len();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{headers}content-length: {length}\r\n\r\n"
    );
    [head.as_bytes(), body].concat()
}

/// An answer, up to where the server closes.
fn read(mut stream: TcpStream) -> Result<Answer, Failed> {
    let mut bytes = Vec::new();
    // A connection that is cut after an answer loses nothing of it.
    let outcome = stream.read_to_end(&mut bytes);
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n");
    let Some(end) = end else {
        return Err(format!("no answer: {outcome:?}, {} bytes", bytes.len()).into());
    };
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    let body = bytes[end + 4..].to_vec();
    let chunked = head.to_lowercase().contains("transfer-encoding: chunked");
    Ok(Answer {
        status: status.ok_or("no status")?,
        body: if chunked { joined(&body) } else { body },
        head,
    })
}

/// What chunks hold.
fn joined(mut chunks: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(line) = chunks.windows(2).position(|two| two == b"\r\n") {
        let size = std::str::from_utf8(&chunks[..line])
            .ok()
            .and_then(|size| usize::from_str_radix(size, 16).ok());
        let Some(size @ 1..) = size else { break };
        let start = line + 2;
        body.extend_from_slice(&chunks[start..(start + size).min(chunks.len())]);
        chunks = chunks.get(start + size + 2..).unwrap_or_default();
    }
    body
}

impl Answer {
    fn json(&self) -> Result<Value, Failed> {
        serde_json::from_slice(&self.body).map_err(|error| format!("{error}: {}", self.text()).into())
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The line of a refusal.
    fn message(&self) -> Result<String, Failed> {
        let message = self.json()?["error"]["message"].as_str().map(str::to_owned);
        message.ok_or_else(|| format!("no message: {}", self.text()).into())
    }

    /// The events of a stream, by their names.
    fn events(&self) -> Result<Vec<(String, Value)>, Failed> {
        let text = self.text();
        let blocks = text.split("\n\n").filter(|block| block.contains("data:"));
        blocks
            .map(|block| {
                let field = |name: &str| {
                    block
                        .lines()
                        .find_map(|line| line.strip_prefix(name))
                        .unwrap_or_default()
                        .trim()
                };
                Ok((field("event:").to_owned(), serde_json::from_str(field("data:"))?))
            })
            .collect()
    }
}

/// Bytes of a text in base64, with or without the beginning of a data URL.
fn decoded(text: &Value) -> Result<Vec<u8>, Failed> {
    let text = text.as_str().ok_or("no text")?;
    let data = text.split_once(',').map_or(text, |(_, data)| data);
    Ok(BASE64.decode(data)?)
}

fn encoded(bytes: &[u8]) -> String {
    BASE64.encode(bytes)
}

/// The file that `l2p-sample` draws with these flags.
fn sampled(folder: &Path, flags: &[&str]) -> Result<Vec<u8>, Failed> {
    let mut command = Command::new(program("l2p-sample")?);
    command.current_dir(folder);
    command
        .args(["--model", &model()?, "--device", "cpu", "--out", "sampled.png"])
        .args(flags);
    Finished::from(&mut command)?.success()?;
    Ok(std::fs::read(folder.join("sampled.png"))?)
}
