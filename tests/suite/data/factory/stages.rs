//! Prompts by grammar, their check, and pictures of them.

use std::collections::BTreeMap;

use l2p_engine::data::Metadata;
use l2p_tests::{Outcome, Suite, models_folder};
use libtest_mimic::Failed;
use serde_json::Value;

use super::{data, lines, texts};

pub fn register(suite: &mut Suite) {
    suite.cpu("data::factory::stages::the_grammar_passes_the_check", grammar);
    suite.cpu("data::factory::stages::a_cut_anywhere_is_mended", cuts);
    suite.cpu("data::factory::stages::other_settings_are_refused", refused);
    suite.cpu("data::factory::stages::checked_prompts_are_drawn", drawn);
    suite.cpu("data::factory::stages::flags_out_of_range", out_of_range);
}

/// Many prompts of both languages, balanced, different, and all of them valid; the same again from the same seed.
fn grammar() -> Outcome {
    let folder = tempfile::tempdir()?;
    let set = folder.path().join("set");
    let write = [
        "prompts",
        "--count",
        "1210",
        "--languages",
        "en,zh",
        "--out",
        "set",
        "--json",
    ];
    let finished = data(folder.path(), &write)?.success()?;
    assert!(finished.stderr.contains("written by a grammar"), "{}", finished.stderr);
    let result: Value = serde_json::from_str(&finished.stdout)?;
    let cells = result["by_cell"].as_object().ok_or("no cells")?;
    assert_eq!(cells.len(), 40);
    assert!(
        cells
            .values()
            .all(|count| (30..=31).contains(&count.as_u64().unwrap_or(0))),
        "{result}"
    );
    let check: Value = serde_json::from_str(
        &data(folder.path(), &["check", "--out", "set", "--json"])?
            .success()?
            .stdout,
    )?;
    assert_eq!(
        (&check["valid"], &check["auditor"]),
        (&Value::from(1210), &Value::Null),
        "{check}"
    );
    // Openings are not of a few kinds.
    let prompts = texts(&set)?;
    let mut openings: BTreeMap<String, usize> = BTreeMap::new();
    for prompt in &prompts {
        *openings.entry(prompt.chars().take(12).collect()).or_default() += 1;
    }
    assert!(
        openings.len() > 100 && openings.values().all(|count| *count < 60),
        "{openings:?}"
    );
    // Every category once before any comes twice.
    let categories: std::collections::BTreeSet<String> = lines(&set.join("prompts.jsonl"))?
        .iter()
        .map(|line| format!("{} {} {}", line["sub_class"], line["category"], line["language"]))
        .collect();
    assert!(categories.len() * 10 > prompts.len() * 9, "{}", categories.len());
    // The model, its seed and the counts are in the manifest, which says that a grammar wrote.
    let manifest: Value = serde_json::from_slice(&std::fs::read(set.join("factory.json"))?)?;
    let settings = &manifest["prompts"]["settings"];
    assert_eq!(
        (&settings["model"], &settings["understands"]),
        (&Value::from("grammar 1"), &Value::from(false))
    );
    assert_eq!(
        (&manifest["prompts"]["prompts"], &manifest["check"]["valid"]),
        (&Value::from(1210), &Value::from(1210))
    );
    // The same seed, the same prompts; another one, others.
    let mut other = write;
    other[6] = "same";
    data(folder.path(), &other)?.success()?;
    assert_eq!(texts(&folder.path().join("same"))?, prompts);
    other[6] = "other";
    data(folder.path(), &[&other[..], &["--seed", "5"]].concat())?.success()?;
    assert_ne!(texts(&folder.path().join("other"))?, prompts);
    // A larger count adds at the end.
    let mut more = write;
    more[2] = "1250";
    data(folder.path(), &more)?.success()?;
    let grown = texts(&set)?;
    assert_eq!((grown.len(), &grown[..1210]), (1250, &prompts[..]));
    Ok(())
}

/// Whatever a crash leaves of the files, the next run ends with the same set.
fn cuts() -> Outcome {
    let folder = tempfile::tempdir()?;
    let write = |out: &str| {
        data(
            folder.path(),
            &["prompts", "--count", "24", "--prompts-per-request", "2", "--out", out],
        )
    };
    write("whole")?.success()?;
    let whole = folder.path().join("whole");
    let (prompts, turns) = (
        std::fs::read(whole.join("prompts.jsonl"))?,
        std::fs::read(whole.join("turns.jsonl"))?,
    );
    let cut = folder.path().join("cut");
    for step in 0..24 {
        let _ = std::fs::remove_dir_all(&cut);
        std::fs::create_dir(&cut)?;
        std::fs::copy(whole.join("factory.json"), cut.join("factory.json"))?;
        let turns_left = turns.len() * step / 23;
        // At least the prompts of the requests that are noted as done, as their lines were brought onto the disk before.
        let noted = String::from_utf8_lossy(&turns[..turns_left]);
        let noted: Option<Value> = noted
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .next_back();
        let lines_done = noted.and_then(|turn| turn["lines"].as_u64()).unwrap_or(0) as usize;
        let least: usize = prompts
            .split_inclusive(|byte| *byte == b'\n')
            .take(lines_done)
            .map(<[u8]>::len)
            .sum();
        let left = (least + 137 * step % 700).min(prompts.len());
        std::fs::write(cut.join("prompts.jsonl"), &prompts[..left])?;
        std::fs::write(cut.join("turns.jsonl"), &turns[..turns_left])?;
        let finished = write("cut")?.success()?;
        assert!(
            std::fs::read(cut.join("prompts.jsonl"))? == prompts,
            "{step}: {}",
            finished.stderr
        );
        assert!(
            std::fs::read(cut.join("turns.jsonl"))? == turns,
            "{step}: {}",
            finished.stderr
        );
    }
    // Verdicts as well.
    data(folder.path(), &["check", "--out", "whole"])?.success()?;
    let checks = std::fs::read(whole.join("checks.jsonl"))?;
    for step in 0..12 {
        std::fs::write(whole.join("checks.jsonl"), &checks[..checks.len() * step / 11])?;
        let finished = data(folder.path(), &["check", "--out", "whole"])?.success()?;
        assert!(std::fs::read(whole.join("checks.jsonl"))? == checks, "{step}");
        let cut_line = step > 0 && !checks[..checks.len() * step / 11].ends_with(b"\n");
        assert_eq!(
            finished.stderr.contains("its last line is cut and is dropped"),
            cut_line,
            "{step}: {}",
            finished.stderr
        );
    }
    // A line that was changed by hand is not passed over.
    let changed = String::from_utf8(turns)?.replacen("\"kept\":2", "\"kept\":1", 1);
    std::fs::write(cut.join("turns.jsonl"), changed)?;
    let finished = write("cut")?;
    assert!(
        finished.code == 1 && finished.stderr.contains("does not follow from the lines before it"),
        "{}",
        finished.stderr
    );
    Ok(())
}

fn refused() -> Outcome {
    let folder = tempfile::tempdir()?;
    let write = ["prompts", "--count", "4", "--out", "set"];
    data(folder.path(), &write)?.success()?;
    for (more, words) in [
        (["--seed", "2"], "begun with another seed"),
        (["--length", "210-350"], "begun with another length_en"),
        (["--near", "0.9"], "begun with another near"),
    ] {
        let finished = data(folder.path(), &[&write[..], &more].concat())?;
        assert!(
            finished.code == 1 && finished.stderr.contains(words),
            "{}",
            finished.stderr
        );
    }
    let model = models_folder()
        .join("demo/source")
        .canonicalize()?
        .display()
        .to_string();
    let draw = ["synthesize", "--model", &model, "--out", "set", "--device", "cpu"];
    let unchecked = data(folder.path(), &draw)?;
    assert!(
        unchecked.code == 1 && unchecked.stderr.contains("4 of 4 prompts are not checked yet"),
        "{}",
        unchecked.stderr
    );
    std::fs::write(folder.path().join("terms.txt"), "# everything\nthe\na\n")?;
    data(folder.path(), &["check", "--out", "set", "--blocked", "terms.txt"])?.success()?;
    let none = data(folder.path(), &draw)?;
    assert!(
        none.code == 1 && none.stderr.contains("none of its prompts may be used"),
        "{}",
        none.stderr
    );
    for arguments in [&["check", "--out", "nothing"][..], &["report", "nothing"]] {
        let finished = data(folder.path(), arguments)?;
        assert!(
            finished.code == 1 && finished.stderr.contains("nothing"),
            "{}",
            finished.stderr
        );
    }
    Ok(())
}

/// Several pictures of each checked prompt, none twice when prompts and pictures become more; the table says what the list says.
fn drawn() -> Outcome {
    let folder = tempfile::tempdir()?;
    let set = folder.path().join("set");
    let model = models_folder()
        .join("demo/source")
        .canonicalize()?
        .display()
        .to_string();
    let stages = |count: &str, per_prompt: &str| -> Result<String, Failed> {
        data(folder.path(), &["prompts", "--count", count, "--out", "set"])?.success()?;
        data(folder.path(), &["check", "--out", "set"])?.success()?;
        let draw = [
            "synthesize",
            "--model",
            &model,
            "--out",
            "set",
            "--device",
            "cpu",
            "--steps",
            "1",
            "--batch",
            "2",
            "--per-prompt",
            per_prompt,
        ];
        let finished = data(
            folder.path(),
            &[&draw[..], &["--format", "jpeg", "--seed", "50"]].concat(),
        )?
        .success()?;
        assert!(
            finished.stderr.contains(" of disk, ") && finished.stderr.contains("by the first batch: about "),
            "{}",
            finished.stderr
        );
        Ok(finished.stdout)
    };
    assert!(stages("3", "2")?.contains("6 pictures drawn"));
    let first = std::fs::read_to_string(set.join("metadata.jsonl"))?;
    // One prompt that may no longer be used would not take its pictures away; here more come.
    assert!(stages("5", "3")?.contains("9 pictures drawn"));
    let list = std::fs::read_to_string(set.join("metadata.jsonl"))?;
    assert!(list.starts_with(&first));
    let lines = lines(&set.join("metadata.jsonl"))?;
    let pairs: std::collections::BTreeSet<(String, u64)> = lines
        .iter()
        .map(|line| (line["prompt"].to_string(), line["seed"].as_u64().unwrap_or(0)))
        .collect();
    let seeds: std::collections::BTreeSet<u64> = pairs.iter().map(|(_, seed)| *seed).collect();
    let prompts: std::collections::BTreeSet<&str> = lines.iter().filter_map(|line| line["prompt"].as_str()).collect();
    assert_eq!((pairs.len(), seeds.len(), prompts.len()), (15, 15, 5));
    let (of_folder, of_list) = (Metadata::read(&set)?, Metadata::read(&set.join("metadata.jsonl"))?);
    let of_table = Metadata::read(&set.join("metadata.csv"))?;
    assert_eq!(
        (of_folder.path.clone(), of_table.damaged.len()),
        (set.join("metadata.jsonl"), 0)
    );
    assert!(of_list.records == of_table.records && of_table.records.len() == 15);
    assert!(of_table.records[0].name.ends_with(".jpg"));
    let table = std::fs::read_to_string(set.join("metadata.csv"))?;
    assert!(table.starts_with("image,prompt,seed\n000/000000.jpg,"), "{table}");
    let manifest: Value = serde_json::from_slice(&std::fs::read(set.join("factory.json"))?)?;
    assert_eq!(
        (
            &manifest["synthesize"]["pictures"],
            &manifest["synthesize"]["per_prompt"]
        ),
        (&Value::from(15), &Value::from(3))
    );
    // A folder that nobody drew, with both kinds of metadata, is still a riddle.
    std::fs::remove_file(set.join("synthesis.json"))?;
    assert!(
        Metadata::read(&set)
            .err()
            .ok_or("a riddle was read")?
            .to_string()
            .contains("holds both")
    );
    Ok(())
}

fn out_of_range() -> Outcome {
    let folder = tempfile::tempdir()?;
    for (more, words) in [
        ("--count 0", "'--count <N>': expected a whole number from 1 to 1000000"),
        ("--count -3", "found `-3`"),
        ("--length 300", "expected two numbers of characters such as 200-350"),
        ("--length 300-200", "found `300-200`"),
        ("--length 1-1000000", "from 1 to 4000"),
        ("--near 0", "expected a number from 0.05 to 1"),
        ("--near NaN", "expected a number from 0.05 to 1, found `NaN`"),
        ("--temperature 9", "expected a number from 0 to 2"),
        ("--top-p 0", "expected a number from 0.01 to 1"),
        ("--languages fr", "invalid value 'fr'"),
        ("--attempts 1000", "expected a whole number from 0 to 100"),
        (
            "--llm-timeout 0",
            "'--llm-timeout <SECONDS>': expected a whole number from 1",
        ),
        ("--llm-rate 0", "'--llm-rate <N>': expected a whole number from 1"),
        ("--seed -1", "there is no random seed"),
    ] {
        let more: Vec<&str> = more.split(' ').collect();
        let count: &[&str] = if more[0] == "--count" { &[] } else { &["--count", "1"] };
        let finished = data(
            folder.path(),
            &[&["prompts", "--out", "set"], count, &more[..]].concat(),
        )?;
        assert!(
            finished.code == 2 && finished.stderr.contains(words),
            "{more:?}: {}",
            finished.stderr
        );
    }
    Ok(())
}
