//! Keys, rates, places in the queue, and the end.

use std::io::Read;
use std::time::{Duration, Instant};

use l2p_tests::{Outcome, Suite};
use serde_json::{Value, json};

use super::{Server, read, request};

pub fn register(suite: &mut Suite) {
    suite.cpu("server::limits::keys_are_asked_for", keys);
    suite.cpu("server::limits::rates_are_kept", rates);
    suite.cpu("server::limits::who_leaves_frees_a_place", leaving);
    #[cfg(unix)]
    suite.cpu("server::limits::what_is_under_way_is_finished", draining);
    suite.cpu("server::limits::wrong_flags_are_named", flags);
}

const HEADERS: &str = "content-type: application/json\r\n";

fn small() -> Value {
    json!({"prompt": "fox", "size": "64x64", "steps": 2})
}

/// Takes some seconds.
fn long() -> Value {
    json!({"prompt": "fox", "size": "256x256", "steps": 100, "n": 4, "cfg": 2})
}

fn keys() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("keys");
    std::fs::write(&path, "0123456789abcdef-one\n0123456789abcdef-two\n")?;
    let server = Server::start(&["--api-key-file", &path.display().to_string(), "--log", "json"])?;
    for path in ["/", "/healthz", "/readyz", "/assets/app.js"] {
        assert_eq!(server.get(path)?.status, 200, "{path}");
    }
    for path in ["/api/info", "/v1/models", "/metrics", "/sdapi/v1/sd-models"] {
        let refused = server.get(path)?;
        assert!(
            refused.status == 401 && refused.head.to_lowercase().contains("www-authenticate: bearer"),
            "{path}"
        );
    }
    let with = |key: &str, id: &str| {
        let headers = format!("{HEADERS}authorization: Bearer {key}\r\nx-request-id: {id}\r\n");
        server.exchange(&request(
            "/v1/images/generations",
            &headers,
            small().to_string().as_bytes(),
        ))
    };
    assert_eq!(with("0123456789abcdef", "a")?.status, 401);
    let answer = with("0123456789abcdef-two", "my-id.7")?;
    assert!(
        answer.status == 200 && answer.head.contains("x-request-id: my-id.7"),
        "{}",
        answer.head
    );
    // An id that would break lines is replaced.
    let answer = with("0123456789abcdef-one", "a b{}")?;
    assert!(answer.status == 200 && !answer.head.contains("a b{}"));
    std::thread::sleep(Duration::from_millis(100));
    let said = server.said();
    let line = said
        .lines()
        .find(|line| line.contains("my-id.7"))
        .ok_or("no line of the request")?;
    let line: Value = serde_json::from_str(line)?;
    assert_eq!((&line["status"], &line["method"]), (&json!(200), &json!("POST")));
    assert!(!said.contains("0123456789abcdef"), "keys are written nowhere");
    Ok(())
}

fn rates() -> Outcome {
    let server = Server::start(&["--rate", "3"])?;
    let ask = |count: u64| {
        let mut asked = small();
        asked["n"] = json!(count);
        server.post("/v1/images/generations", &asked)
    };
    assert_eq!(ask(2)?.status, 200);
    let refused = ask(2)?;
    assert!(
        refused.status == 429 && refused.head.to_lowercase().contains("retry-after: "),
        "{}",
        refused.head
    );
    assert_eq!(ask(1)?.status, 200);
    assert_eq!(ask(4)?.status, 400, "more than there ever is");
    Ok(())
}

fn leaving() -> Outcome {
    let server = Server::start(&["--queue", "1"])?;
    let begin = |asked: &Value| server.begin("/v1/images/generations", HEADERS, asked.to_string().as_bytes());
    let waiting = |expected: u64| -> Outcome {
        let start = Instant::now();
        while server.get("/readyz")?.json()?["waiting"] != json!(expected) {
            if start.elapsed() > Duration::from_secs(30) {
                return Err(format!("it does not come to {expected} that wait").into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    };
    let drawn = begin(&long())?;
    // It is drawn when nothing waits any more, and something else can.
    std::thread::sleep(Duration::from_millis(300));
    waiting(0)?;
    let queued = begin(&small())?;
    waiting(1)?;
    let refused = server.post("/v1/images/generations", &small())?;
    assert!(
        refused.status == 503 && refused.head.to_lowercase().contains("retry-after: "),
        "{}",
        refused.head
    );
    drop(queued);
    waiting(0)?;
    let queued = begin(&small())?;
    waiting(1)?;
    // Who is drawn for leaves too: then the next one need not wait until it is done.
    let start = Instant::now();
    drop(drawn);
    assert_eq!(read(queued)?.status, 200);
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    Ok(())
}

#[cfg(unix)]
fn draining() -> Outcome {
    let server = Server::start(&[])?;
    let asked = json!({"prompt": "fox", "size": "128x128", "steps": 30});
    let first = server.begin("/v1/images/generations", HEADERS, asked.to_string().as_bytes())?;
    std::thread::sleep(Duration::from_millis(200));
    server.terminate()?;
    let answer = read(first)?;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(server.wait()?, Some(0));
    // What takes longer than there is time for is given up.
    let server = Server::start(&["--drain", "1"])?;
    let mut first = server.begin("/v1/images/generations", HEADERS, long().to_string().as_bytes())?;
    std::thread::sleep(Duration::from_millis(300));
    let start = Instant::now();
    server.terminate()?;
    let mut rest = Vec::new();
    let _ = first.read_to_end(&mut rest);
    assert!(!rest.starts_with(b"HTTP/1.1 200"));
    assert_eq!(server.wait()?, Some(0));
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
    Ok(())
}

fn flags() -> Outcome {
    let folder = tempfile::tempdir()?;
    let model = super::model()?;
    let empty = folder.path().join("keys");
    std::fs::write(&empty, "# none\n")?;
    let named = format!("a={model}");
    let empty = empty.display().to_string();
    let cases: [(&[&str], &str); 5] = [
        (&[], "--model"),
        (&["--model", "nothing"], "nothing"),
        (
            &["--model", &model, "--device", "cpu", "--api-key-file", &empty],
            "holds no key",
        ),
        (
            &["--model", &named, "--model", &named, "--device", "cpu"],
            "two models are named a",
        ),
        (
            &[
                "--model",
                &model,
                "--device",
                "cpu",
                "--host",
                "192.0.2.1",
                "--port",
                "0",
            ],
            "cannot listen at 192.0.2.1",
        ),
    ];
    for (flags, word) in cases {
        let ended = l2p_tests::cli::run("l2p-serve", flags)?;
        assert!(
            ended.code != 0 && ended.stderr.contains(word),
            "{flags:?}: {}",
            ended.stderr
        );
    }
    Ok(())
}
