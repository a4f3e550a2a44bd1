//! The client of language model servers.

use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use l2p_tests::cli::Finished;
use l2p_tests::{Outcome, Suite};
use serde_json::json;

use super::server::{Reply, Server, good};
use super::{command, data, lines, texts};

pub fn register(suite: &mut Suite) {
    suite.cpu("data::factory::endpoint::the_key_goes_where_it_belongs", key);
    suite.cpu("data::factory::endpoint::what_ends_the_work_says_why", ends);
    suite.cpu("data::factory::endpoint::a_run_that_gave_up_goes_on", gave_up);
    suite.cpu("data::factory::endpoint::requests_are_as_asked_for", requests);
    suite.cpu("data::factory::endpoint::many_at_once_and_no_more", concurrency);
    suite.cpu("data::factory::endpoint::verdicts_are_kept_and_asked_again", verdicts);
    suite.cpu("data::factory::endpoint::expansions_show_and_then_write", expand);
    #[cfg(unix)]
    suite.cpu("data::factory::endpoint::ctrl_c_does_not_wait_for_a_server", ctrl_c);
}

fn arguments<'a>(url: &'a str, count: &'a str) -> Vec<&'a str> {
    [
        "prompts",
        "--count",
        count,
        "--out",
        "set",
        "--llm-model",
        "test",
        "--llm-timeout",
        "5",
        "--llm-url",
        url,
    ]
    .to_vec()
}

fn key() -> Outcome {
    let folder = tempfile::tempdir()?;
    let server = Server::start(|_, seen| good(seen))?;
    let url = server.url();
    data(folder.path(), &arguments(&url, "2"))?.success()?;
    assert!(
        server
            .seen()
            .iter()
            .all(|seen| !seen.head.to_lowercase().contains("authorization"))
    );
    let mut with_key = command(folder.path(), &arguments(&url, "4"))?;
    let finished = Finished::from(with_key.env("L2P_LLM_KEY", "sk-secret"))?.success()?;
    assert!(
        server
            .seen()
            .last()
            .unwrap()
            .head
            .to_lowercase()
            .contains("authorization: bearer sk-secret")
    );
    let mut named = command(
        folder.path(),
        &[&arguments(&url, "6")[..], &["--llm-key-env", "OTHER"]].concat(),
    )?;
    Finished::from(named.env("OTHER", "sk-other").env("L2P_LLM_KEY", "sk-secret"))?.success()?;
    assert!(server.seen().last().unwrap().head.contains("sk-other"));
    // It is written nowhere.
    let mut all = finished.stdout + &finished.stderr;
    for name in ["factory.json", "turns.jsonl", "prompts.jsonl"] {
        all += &std::fs::read_to_string(folder.path().join("set").join(name))?;
    }
    assert!(!all.contains("sk-"), "{all}");
    let mut odd = command(folder.path(), &arguments(&url, "8"))?;
    let odd = Finished::from(odd.env("L2P_LLM_KEY", "two words"))?;
    assert!(
        odd.code == 1 && odd.stderr.contains("L2P_LLM_KEY: is no key") && !odd.stderr.contains("two words"),
        "{}",
        odd.stderr
    );
    Ok(())
}

fn ends() -> Outcome {
    let folder = tempfile::tempdir()?;
    for (status, headers, body, words) in [
        (
            401,
            "",
            "{\"error\": {\"message\": \"bad key sk-abc\"}}",
            "answers 401: it asks for a key, and none was given (see --llm-key-env)",
        ),
        (
            404,
            "",
            "{\"error\": {\"message\": \"no such model\"}}",
            "(\"no such model\"): is the address right, and `test` a model there?",
        ),
        (302, "location: http://127.0.0.1:1/\r\n", "", "it is elsewhere"),
        (429, "retry-after: 5000\r\n", "", "asks to come back in 5000 s"),
        (
            400,
            "",
            "{\"detail\": \"context\\u001b[2J too long\"}",
            "answers 400 (\"context\\u{1b}[2J too long\")",
        ),
    ] {
        let server = Server::start(move |_, _| Reply::Status(status, headers, body))?;
        let finished = data(folder.path(), &arguments(&server.url(), "2"))?;
        assert!(
            finished.code == 1 && finished.stderr.contains(words),
            "{status}: {}",
            finished.stderr
        );
        assert!(!finished.stderr.contains("sk-abc"), "{}", finished.stderr);
        assert_eq!(finished.stderr.matches("error: ").count(), 1, "{}", finished.stderr);
        std::fs::remove_dir_all(folder.path().join("set"))?;
    }
    // Nobody is there.
    let finished = data(
        folder.path(),
        &[&arguments("http://127.0.0.1:9", "2")[..], &["--llm-retries", "1"]].concat(),
    )?;
    assert!(
        finished.code == 1 && finished.stderr.contains("after 2 tries"),
        "{}",
        finished.stderr
    );
    for (url, words) in [
        ("localhost:1", "--llm-url localhost:1"),
        ("http://a:b@c", "holds a name or password"),
    ] {
        let finished = data(folder.path(), &arguments(url, "2"))?;
        assert!(
            finished.code == 1 && finished.stderr.contains(words),
            "{}",
            finished.stderr
        );
    }
    let alone = data(
        folder.path(),
        &[
            "prompts",
            "--count",
            "1",
            "--out",
            "set",
            "--llm-url",
            "http://localhost:1",
        ],
    )?;
    assert!(
        alone.code == 2 && alone.stderr.contains("--llm-model"),
        "{}",
        alone.stderr
    );
    Ok(())
}

fn gave_up() -> Outcome {
    let folder = tempfile::tempdir()?;
    let down = Arc::new(AtomicBool::new(false));
    let is_down = down.clone();
    let server = Server::start(move |number, seen| {
        if number >= 5 && !is_down.load(Ordering::Relaxed) {
            return Reply::Status(503, "", "");
        }
        good(seen)
    })?;
    let url = server.url();
    let few = [
        &arguments(&url, "40")[..],
        &[
            "--llm-retries",
            "0",
            "--llm-concurrency",
            "1",
            "--prompts-per-request",
            "2",
        ],
    ]
    .concat();
    let first = data(folder.path(), &few)?;
    assert!(
        first.code == 1 && first.stderr.contains("give the same command again to go on"),
        "{}",
        first.stderr
    );
    let asked = server.seen().len();
    down.store(true, Ordering::Relaxed);
    data(folder.path(), &few)?.success()?;
    // The five that were answered are not asked for again.
    let again: Vec<String> = server.seen()[asked..]
        .iter()
        .map(|seen| seen.body.to_string())
        .collect();
    assert!(
        server.seen()[..5]
            .iter()
            .all(|seen| !again.contains(&seen.body.to_string()))
    );
    let interrupted = texts(&folder.path().join("set"))?;
    assert_eq!(interrupted.len(), 40);
    // As if nothing had happened.
    let mut whole = few.clone();
    let place = whole.iter().position(|argument| *argument == "set").unwrap();
    whole[place] = "whole";
    data(folder.path(), &whole)?.success()?;
    assert_eq!(texts(&folder.path().join("whole"))?, interrupted);
    Ok(())
}

fn requests() -> Outcome {
    let folder = tempfile::tempdir()?;
    let server = Server::start(|_, seen| good(seen))?;
    let url = format!("{}/v1", server.url());
    let more = [
        "--llm-schema",
        "--temperature",
        "0.5",
        "--top-p",
        "0.8",
        "--prompts-per-request",
        "3",
        "--seed",
        "7",
    ];
    data(folder.path(), &[&arguments(&url, "60")[..], &more].concat())?.success()?;
    for seen in server.seen() {
        assert!(
            seen.head.starts_with("POST /v1/chat/completions HTTP/1.1"),
            "{}",
            seen.head
        );
        let body = &seen.body;
        assert_eq!((&body["model"], &body["stream"]), (&json!("test"), &json!(false)));
        assert_eq!(
            (body["temperature"].as_f64(), body["messages"][0]["role"].as_str()),
            (Some(0.5), Some("system"))
        );
        let schema = &body["response_format"]["json_schema"]["schema"];
        assert_eq!(schema["minItems"], json!(seen.subjects().len()));
        assert!(body["max_tokens"].as_u64().unwrap() > 500 && (1..=3).contains(&seen.subjects().len()));
        let system = body["messages"][0]["content"].as_str().unwrap();
        assert!(
            system.contains("200 to 350 characters") && system.contains("three to five"),
            "{system}"
        );
        let kind = seen.user()["kind_of_picture"].as_str().unwrap().to_owned();
        let shows =
            kind.starts_with("synthetic/") || ["design/posters", "design/slides", "design/ui"].contains(&kind.as_str());
        assert_eq!(system.contains("Every picture shows written text"), shows, "{kind}");
    }
    let seeds: std::collections::BTreeSet<String> =
        server.seen().iter().map(|seen| seen.body["seed"].to_string()).collect();
    assert_eq!(seeds.len(), server.seen().len());
    Ok(())
}

fn concurrency() -> Outcome {
    let folder = tempfile::tempdir()?;
    let (open, most) = (Arc::new(Mutex::new(0)), Arc::new(Mutex::new(0)));
    let (now, highest) = (open.clone(), most.clone());
    let server = Server::start(move |_, seen| {
        {
            let mut now = now.lock().unwrap();
            *now += 1;
            let mut highest = highest.lock().unwrap();
            *highest = (*highest).max(*now);
        }
        std::thread::sleep(Duration::from_millis(60));
        *now.lock().unwrap() -= 1;
        good(seen)
    })?;
    data(
        folder.path(),
        &[&arguments(&server.url(), "20")[..], &["--llm-concurrency", "4"]].concat(),
    )?
    .success()?;
    let highest = *most.lock().unwrap();
    assert!((2..=4).contains(&highest), "{highest}");
    Ok(())
}

/// The rules come first; the auditor's word and reason stay beside each prompt; no verdict is asked for again.
fn verdicts() -> Outcome {
    let folder = tempfile::tempdir()?;
    let set = folder.path().join("set");
    data(folder.path(), &["prompts", "--count", "12", "--out", "set"])?.success()?;
    // One that the rules refuse; nobody needs to be asked about it.
    let text = std::fs::read_to_string(set.join("prompts.jsonl"))?;
    let mut prompts = lines(&set.join("prompts.jsonl"))?;
    prompts[3]["prompt"] = json!("fox, red, snow, 4k, sharp, best quality");
    let changed: String = prompts.iter().map(|line| format!("{line}\n")).collect();
    std::fs::write(set.join("prompts.jsonl"), &changed)?;
    let first: Arc<Mutex<std::collections::BTreeSet<String>>> = Arc::default();
    let server = Server::start(move |_, seen| {
        assert!(seen.is_audit());
        let prompt = seen.user()["prompt"].to_string();
        let is_first = first.lock().unwrap().insert(prompt.clone());
        match (prompt.len() % 3, is_first) {
            (0, true) => Reply::Says("It looks valid to me.".into()),
            (1, _) => Reply::Says("{\"is_valid\": false, \"reason\": \"the light\\ncontradicts itself\"}".into()),
            _ => good(seen),
        }
    })?;
    let url = server.url();
    let check = [
        "check",
        "--out",
        "set",
        "--json",
        "--llm-url",
        &url,
        "--llm-model",
        "judge",
    ];
    let result: serde_json::Value = serde_json::from_str(&data(folder.path(), &check)?.success()?.stdout)?;
    assert_eq!(result["checked"], 12);
    let checks = lines(&set.join("checks.jsonl"))?;
    assert_eq!(checks.len(), 12);
    for (check, prompt) in checks.iter().zip(&prompts) {
        assert_eq!(check["id"], prompt["id"]);
        let text = prompt["prompt"].to_string();
        match (check["id"].as_u64(), text.len() % 3) {
            (Some(3), _) => assert_eq!((&check["rule"], &check["by"]), (&json!("length"), &json!("rules"))),
            (_, 1) => {
                assert_eq!((&check["is_valid"], &check["rule"]), (&json!(false), &json!("auditor")));
                assert_eq!(check["reason"], "the light contradicts itself");
            }
            _ => assert_eq!(check["is_valid"], true, "{check}"),
        }
    }
    let asked = server.seen();
    assert!(
        asked
            .iter()
            .all(|seen| !seen.user()["prompt"].to_string().contains("best quality"))
    );
    // Nothing is deleted, and nothing is asked twice.
    assert_eq!(std::fs::read_to_string(set.join("prompts.jsonl"))?, changed);
    assert_ne!(text, changed);
    data(folder.path(), &check)?.success()?;
    assert_eq!(server.seen().len(), asked.len());
    // An auditor that never comes to a verdict leaves prompts that are not used, and are asked about the next time.
    let mute = Server::start(|_, _| Reply::Says("Hm.".into()))?;
    let mute_url = mute.url();
    let again = [
        "check",
        "--out",
        "set",
        "--json",
        "--again",
        "--llm-url",
        &mute_url,
        "--llm-model",
        "mute",
    ];
    let result: serde_json::Value = serde_json::from_str(&data(folder.path(), &again)?.success()?.stdout)?;
    assert_eq!(
        (&result["valid"], &result["rejects"]["undecided"]),
        (&json!(0), &json!(11))
    );
    let result: serde_json::Value = serde_json::from_str(&data(folder.path(), &check)?.success()?.stdout)?;
    assert_eq!(result["checked"], 11);
    assert!(result["rejects"].get("undecided").is_none(), "{result}");
    Ok(())
}

fn expand() -> Outcome {
    let folder = tempfile::tempdir()?;
    let own = r#"{"version": 4, "classes": [{"name": "nature", "sub_classes": [{"name": "animals", "categories": {"fox": "狐狸", "owl": null}}]}]}"#;
    std::fs::write(folder.path().join("own.json"), own)?;
    let server = Server::start(|number, _| {
        Reply::Says(match number {
            0 => "[\"Foxes\", \"sea lion\", \"the owl\", \"elon musk's dog {x}\", \"sea lions\"]".into(),
            1 => "no list".into(),
            _ => "[\"red deer\", \"lego cat\", \"tapir\", \"wombat\"]".into(),
        })
    })?;
    let url = server.url();
    let cache = folder.path().join("cache").display().to_string();
    let arguments = [
        "taxonomy",
        "--taxonomy",
        "own.json",
        "--expand",
        "3",
        "--llm-url",
        &url,
        "--llm-model",
        "test",
        "--llm-cache",
        &cache,
    ];
    let shown = data(folder.path(), &arguments)?.success()?;
    for line in [
        "nature/animals: 3 more",
        "  + sea lion\n",
        "  + red deer\n",
        "  + tapir\n",
        "  - foxes: is there as \"fox\"",
        "  - the owl: ",
        "  - sea lions: is there as \"sea lion\"",
        "  - lego cat: ",
        "  - wombat: more than",
    ] {
        assert!(shown.stdout.contains(line), "{line}: {}", shown.stdout);
    }
    assert!(shown.stderr.contains("nothing is written yet"), "{}", shown.stderr);
    assert_eq!(std::fs::read_to_string(folder.path().join("own.json"))?, own);
    let asked = server.seen().len();
    let written = data(folder.path(), &[&arguments[..], &["--write", "new.json"]].concat())?.success()?;
    assert_eq!(server.seen().len(), asked);
    assert!(
        written.stdout.ends_with("new.json: version 5, 5 categories\n"),
        "{}",
        written.stdout
    );
    let table = data(
        folder.path(),
        &["taxonomy", "--taxonomy", "new.json", "--format", "table"],
    )?
    .success()?;
    assert!(
        table
            .stdout
            .contains("nature\tanimals\tfox\t狐狸\nnature\tanimals\towl\t\nnature\tanimals\tred deer\t\n"),
        "{}",
        table.stdout
    );
    data(folder.path(), &[&arguments[..], &["--yes"]].concat())?.success()?;
    assert_eq!(
        std::fs::read(folder.path().join("own.json"))?,
        std::fs::read(folder.path().join("new.json"))?
    );
    let nobody = data(folder.path(), &["taxonomy", "--expand", "3"])?;
    assert!(
        nobody.code == 1 && nobody.stderr.contains("--llm-url"),
        "{}",
        nobody.stderr
    );
    Ok(())
}

#[cfg(unix)]
fn ctrl_c() -> Outcome {
    let folder = tempfile::tempdir()?;
    let server = Server::start(|_, _| Reply::Silence(Duration::from_secs(120)))?;
    let url = server.url();
    let mut slow = arguments(&url, "4");
    slow[8] = "120";
    let child = command(folder.path(), &slow)?
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let started = Instant::now();
    while server.seen().is_empty() && started.elapsed() < Duration::from_secs(30) {
        std::thread::sleep(Duration::from_millis(10));
    }
    crate::runs::ranks::kill(child.id(), "INT")?;
    let told = Instant::now();
    let output = child.wait_with_output()?;
    assert_eq!(output.status.code(), Some(130));
    assert!(told.elapsed() < Duration::from_secs(10), "{:?}", told.elapsed());
    Ok(())
}
