//! The messages of OpenAI's own client (`tests/fixtures/openai_client.py` recorded them), sent again.

use l2p_tests::{Outcome, Suite, fixtures};
use serde_json::{Value, json};

use super::{Server, decoded};

pub fn register(suite: &mut Suite) {
    suite.cpu("server::openai::messages_of_the_client_are_answered", messages);
    suite.cpu("server::openai::streams_end_with_the_whole_picture", streams);
}

fn messages() -> Outcome {
    let server = Server::start(&[])?;
    let folder = fixtures::folder().join("data/openai");
    for (name, pictures) in [("generate", 2), ("edit", 1)] {
        let recorded = std::fs::read(folder.join(format!("{name}.http")))?;
        let answer = server.exchange(&recorded)?;
        assert_eq!(answer.status, 200, "{name}: {}", answer.text());
        let answer = answer.json()?;
        let data = answer["data"].as_array().ok_or("no data")?;
        assert_eq!(data.len(), pictures, "{name}");
        assert!(answer["created"].is_u64());
        for picture in data {
            assert!(decoded(&picture["b64_json"])?.starts_with(b"\x89PNG"), "{name}");
        }
    }
    let recorded = std::fs::read(folder.join("stream.http"))?;
    let events = server.exchange(&recorded)?.events()?;
    let (name, last) = events.last().ok_or("no event")?;
    assert_eq!(
        (name.as_str(), &last["type"]),
        ("image_generation.completed", &json!("image_generation.completed"))
    );
    Ok(())
}

fn streams() -> Outcome {
    let server = Server::start(&[])?;
    let mut asked = json!({"prompt": "fox", "size": "128x128", "steps": 12, "seed": 3, "cfg": 1});
    let whole = server.post("/v1/images/generations", &asked)?.json()?;
    asked["stream"] = json!(true);
    asked["partial_images"] = json!(2);
    let events = server.post("/v1/images/generations", &asked)?.events()?;
    let named = |name: &str| -> Vec<&Value> {
        events
            .iter()
            .filter(|(found, _)| found == name)
            .map(|(_, data)| data)
            .collect()
    };
    let (partial, completed) = (
        named("image_generation.partial_image"),
        named("image_generation.completed"),
    );
    assert!(
        (1..=2).contains(&partial.len()) && completed.len() == 1,
        "{}",
        events.len()
    );
    for (index, data) in partial.iter().enumerate() {
        assert_eq!(data["partial_image_index"], json!(index));
        assert!(decoded(&data["b64_json"])?.starts_with(b"\xff\xd8"));
    }
    assert_eq!(completed[0]["b64_json"], whole["data"][0]["b64_json"]);
    Ok(())
}
