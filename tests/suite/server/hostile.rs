//! What no client should send: each gets a refusal of one line, and the server goes on.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use l2p_tests::{Outcome, Suite};
use serde_json::{Value, json};

use super::{Server, encoded, request};

pub fn register(suite: &mut Suite) {
    suite.cpu("server::hostile::each_is_refused_in_one_line", refused);
    suite.cpu("server::hostile::slow_clients_are_left", slow);
    suite.cpu("server::hostile::random_bytes_are_survived", random);
}

/// A PNG whose header says that it has more pixels than anything.
fn bomb() -> Vec<u8> {
    let mut png = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR\x7f\xff\xff\xff\x7f\xff\xff\xff\x08\x02\0\0\0".to_vec();
    let crc = crc32fast::hash(&png[12..]);
    png.extend_from_slice(&crc.to_be_bytes());
    png
}

fn refused() -> Outcome {
    let server = Server::start(&[
        "--max-body",
        "1MiB",
        "--max-side",
        "256",
        "--max-steps",
        "20",
        "--max-count",
        "3",
    ])?;
    let generations = |fields: Value| ("/v1/images/generations", fields.to_string().into_bytes());
    let draw = |fields: Value| ("/api/draw", fields.to_string().into_bytes());
    let deep = format!("{{\"prompt\": {}1{}}}", "[".repeat(5000), "]".repeat(5000));
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("/v1/images/generations", vec![]),
        ("/v1/images/generations", b"{".to_vec()),
        ("/v1/images/generations", b"[]".to_vec()),
        ("/v1/images/generations", b"{\"prompt\": \"\xff\xfe\"}".to_vec()),
        ("/v1/images/generations", deep.into_bytes()),
        ("/v1/images/generations", b"{\"prompt\": \"x\", \"cfg\": NaN}".to_vec()),
        (
            "/v1/images/generations",
            b"{\"prompt\": \"x\", \"cfg\": 1e400}".to_vec(),
        ),
        generations(json!({"prompt": 3})),
        generations(json!({"prompt": "x", "size": "1x1000000"})),
        generations(json!({"prompt": "x", "size": "0x64"})),
        generations(json!({"prompt": "x", "size": "18446744073709551615x64"})),
        generations(json!({"prompt": "x", "steps": 0})),
        generations(json!({"prompt": "x", "steps": -4})),
        generations(json!({"prompt": "x", "steps": 21})),
        generations(json!({"prompt": "x", "n": 1000000})),
        generations(json!({"prompt": "x", "cfg": 1e38, "size": "64x64", "shift": -1})),
        generations(json!({"prompt": "x", "seed": -1})),
        generations(json!({"prompt": "x", "rng": "dice"})),
        generations(json!({"prompt": "x".repeat(100_000)})),
        generations(json!({"prompt": "x", "../../etc/passwd": 1})),
        ("/v1/images/edits", b"not a form".to_vec()),
        draw(json!({"prompt": "x", "image": "not base64!"})),
        draw(json!({"prompt": "x", "image": encoded(b"no picture")})),
        draw(json!({"prompt": "x", "image": encoded(&bomb())})),
        draw(json!({"prompt": "x", "mask": encoded(&bomb())})),
        draw(json!({"prompt": "x", "strength": 0.5})),
        ("/api/settings", b"no picture".to_vec()),
        ("/sdapi/v1/img2img", b"{}".to_vec()),
        (
            "/sdapi/v1/txt2img",
            b"{\"batch_size\": 9007199254740991, \"n_iter\": 9007199254740991}".to_vec(),
        ),
        ("/v1/images/generations/../../../etc/passwd", vec![]),
        ("/v1/files/..%2f..%2fetc%2fpasswd", vec![]),
        ("/nothing", vec![]),
    ];
    for (path, body) in cases {
        let answer = server.exchange(&request(path, "content-type: application/json\r\n", &body))?;
        let shown = String::from_utf8_lossy(&body[..body.len().min(80)]).into_owned();
        assert!((400..500).contains(&answer.status), "{path} {shown}: {}", answer.text());
        let message = answer.message()?;
        assert!(
            !message.is_empty() && message.len() < 2100 && !message.contains('\n'),
            "{path} {shown}: {message}"
        );
        assert!(!message.contains("/tmp"), "{path} {shown}: {message}");
    }
    // What is no JSON by its own word, and what a page of another site has a browser send.
    let plain = server.exchange(&request(
        "/v1/images/generations",
        "content-type: text/plain\r\n",
        b"{\"prompt\": \"x\"}",
    ))?;
    assert_eq!(plain.status, 415);
    let foreign = "content-type: application/json\r\norigin: https://evil.example\r\n";
    assert_eq!(
        server
            .exchange(&request("/api/draw", foreign, b"{\"prompt\": \"x\"}"))?
            .status,
        403
    );
    // Larger than allowed, said and not said.
    let large = server.exchange(&request(
        "/v1/images/generations",
        "content-type: application/json\r\n",
        &vec![b' '; 2 << 20],
    ))?;
    assert_eq!(large.status, 413);
    let mut chunked =
        b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
            .to_vec();
    for _ in 0..40 {
        chunked.extend_from_slice(b"10000\r\n");
        chunked.extend_from_slice(&[b' '; 0x10000]);
        chunked.extend_from_slice(b"\r\n");
    }
    assert_eq!(server.exchange(&chunked)?.status, 413);
    // Headers that never end, and words that are no request.
    let long = format!("GET / HTTP/1.1\r\nhost: x\r\nx-a: {}\r\n\r\n", "a".repeat(200_000));
    assert_eq!(server.exchange(long.as_bytes())?.status, 431);
    assert_eq!(server.exchange(b"HELLO\r\n\r\n")?.status, 400);
    // It goes on.
    let answer = server.post(
        "/v1/images/generations",
        &json!({"prompt": "fox", "size": "64x64", "steps": 1}),
    )?;
    assert_eq!(answer.status, 200);
    assert!(!server.said().contains("panic"), "{}", server.said());
    Ok(())
}

fn slow() -> Outcome {
    let server = Server::start(&["--patience", "1", "--connections", "3"])?;
    let start = Instant::now();
    // A body that does not come, headers that do not, and nothing at all.
    let head = b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{";
    let mut held = Vec::new();
    for beginning in [&head[..], b"GET / HT", b""] {
        let mut stream = server.connect()?;
        stream.write_all(beginning)?;
        held.push(stream);
    }
    // All places are taken; when they are left, somebody else is served.
    assert_eq!(server.get("/healthz")?.status, 200);
    assert!(start.elapsed() < Duration::from_secs(20));
    let mut answer = String::new();
    held[0].read_to_string(&mut answer)?;
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    Ok(())
}

fn random() -> Outcome {
    let server = Server::start(&[])?;
    let valid = request(
        "/v1/images/generations",
        "content-type: application/json\r\n",
        br#"{"prompt": "x", "n": 0, "size": "64x64", "steps": 3, "cfg": 1.5}"#,
    );
    let mut state = 7u64;
    let mut next = |most: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % most
    };
    for _ in 0..150 {
        let mut bytes = valid.clone();
        for _ in 0..1 + next(4) {
            let place = next(bytes.len());
            match next(3) {
                0 => bytes[place] = next(256) as u8,
                1 => bytes.truncate(place.max(1)),
                _ => bytes.insert(place, next(256) as u8),
            }
        }
        let mut stream = server.connect()?;
        stream.set_read_timeout(Some(Duration::from_millis(200)))?;
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
    }
    assert_eq!(server.get("/healthz")?.status, 200);
    assert!(!server.said().contains("panic"), "{}", server.said());
    Ok(())
}
