//! The target table.

use std::collections::BTreeSet;

use l2p_tests::{Outcome, Suite};
use serde_json::{Value, json};

use super::{number, read, run};

pub fn register(suite: &mut Suite) {
    suite.cpu(
        "bench::targets::parts_are_merged_and_judged",
        parts_are_merged_and_judged,
    );
    suite.cpu("bench::targets::a_table_is_about_one_gpu", a_table_is_about_one_gpu);
}

const SMALL: [&str; 6] = ["--tiny", "--device", "cpu", "--no-peer", "--repeats", "2"];

/// What a row of the record holds, and nothing else.
fn expect_rows(record: &Value) -> Result<BTreeSet<String>, libtest_mimic::Failed> {
    let mut names = BTreeSet::new();
    for row in record["rows"].as_array().ok_or("no rows")? {
        assert!(number(&row["ours"]) >= 0.0, "{row}");
        assert!(
            row["unit"].is_string() && row["target"].is_string() && row["pass"].is_boolean(),
            "{row}"
        );
        match (&row["peer"], &row["ratio"]) {
            (Value::Null, Value::Null) => {}
            (peer, ratio) => assert!(number(peer) > 0.0 && number(ratio) > 0.0, "{row}"),
        }
        let name = row["name"].as_str().ok_or("a row without name")?;
        assert!(names.insert(name.to_owned()), "{name} twice");
    }
    Ok(names)
}

fn parts_are_merged_and_judged() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let first = [&SMALL[..], &["--only", "attention,elementwise", "--out", "first.json"]].concat();
    run(folder, "bench-targets", &first)?.success()?;
    let names = expect_rows(&read(&folder.join("first.json"))?)?;
    assert_eq!(names.len(), 7, "{names:?}");
    assert!(
        names.contains("swiglu, rate") && names.contains("attention forward, L = 130"),
        "{names:?}"
    );

    let second = [
        &SMALL[..],
        &["--only", "products", "--merge", "first.json", "--out", "second.json"],
    ]
    .concat();
    let finished = run(folder, "bench-targets", &second)?.success()?;
    let record = read(&folder.join("second.json"))?;
    let all = expect_rows(&record)?;
    assert!(all.is_superset(&names) && all.len() == 9, "{all:?}");
    assert!(finished.stdout.contains("of 9 reached"), "{}", finished.stdout);
    // Every sample is kept.
    let kept = &record["measurements"]["attention"]["rows"][0]["samples_ms"];
    assert_eq!(kept.as_array().map(Vec::len), Some(2));
    assert_eq!(record["gpu"], "cpu");

    // Without peers their rows are misses, for which a reason can be given; a reason for no row is a slip.
    std::fs::write(folder.join("reasons.toml"), "\"swiglu, rate\" = \"a CPU\"\n")?;
    let third = [
        "--no-run",
        "--tiny",
        "--merge",
        "second.json",
        "--reasons",
        "reasons.toml",
        "--out",
        "third.json",
    ];
    run(folder, "bench-targets", &third)?.success()?;
    let record = read(&folder.join("third.json"))?;
    let rows = record["rows"].as_array().ok_or("no rows")?;
    let named = |name: &str| rows.iter().find(|row| row["name"] == name).cloned().unwrap_or_default();
    assert_eq!(named("swiglu, rate")["reason"], "a CPU");
    let product = named("product qkv, 64 x 48 x 32");
    assert_eq!(
        (&product["pass"], &product["ratio"]),
        (&json!(false), &Value::Null),
        "{product}"
    );
    std::fs::write(folder.join("reasons.toml"), "nothing = \"a slip\"\n")?;
    run(folder, "bench-targets", &third)?.failure(1, "there is a reason for `nothing`, but no such row")
}

fn a_table_is_about_one_gpu() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let only = |part: &'static str, out: &'static str| [&SMALL[..], &["--only", part, "--out", out]].concat();
    run(folder, "bench-targets", &only("products", "a.json"))?.success()?;
    let mut other = read(&folder.join("a.json"))?;
    let record = other["measurements"]["products"].take();
    other["measurements"] = json!({ "attention": record });
    other["measurements"]["attention"]["gpu"] = json!("NVIDIA H200");
    std::fs::write(folder.join("b.json"), other.to_string())?;
    let merged = [
        "--no-run", "--tiny", "--merge", "a.json", "--merge", "b.json", "--out", "c.json",
    ];
    let finished = run(folder, "bench-targets", &merged)?;
    assert!(
        finished.code == 1 && finished.stderr.starts_with("error: a table is about one GPU"),
        "{finished:?}"
    );
    let published = ["--no-run", "--merge", "a.json", "--out", "c.json"];
    run(folder, "bench-targets", &published)?.failure(1, "a.json is about small models")
}
