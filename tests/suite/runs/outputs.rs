//! What a run writes: log, event files, samples, report.

use l2p_engine::image_io::read_image;
use l2p_engine::train::run::log::{Record, read};
use l2p_tests::{Outcome, Suite};

use super::{train, world};

pub fn register(suite: &mut Suite) {
    suite.cpu("runs::outputs::everything_is_in_the_runs_folder", everything);
    suite.cpu("runs::outputs::time_ends_a_run_as_its_last_step_does", time);
}

fn everything() -> Outcome {
    let folder = tempfile::tempdir()?;
    let out = folder.path();
    let samples = [
        "--sample-every",
        "6",
        "--sample-prompts",
        "fox",
        "--sample-prompts",
        "a red apple",
    ];
    let finished = train(world()?, out, &[&samples[..], &["--profile", "--json"]].concat())?.success()?;
    // One line an interval, for people and for programs.
    let lines: Vec<&str> = finished
        .stderr
        .lines()
        .filter(|line| line.contains("  loss "))
        .collect();
    assert_eq!(lines.len(), 6, "{}", finished.stderr);
    for word in ["step  2/12", "norm ", "lr 1.00e-3", "pictures/s", "data wait", "left"] {
        assert!(lines[0].contains(word), "{word} is missing from {}", lines[0]);
    }
    let printed: Vec<Record> = finished
        .stdout
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()?;
    let records = read(out)?;
    assert_eq!(printed, records);
    let train_record = records.iter().find_map(|record| match record {
        Record::Train(train) => Some(train),
        _ => None,
    });
    let train_record = train_record.ok_or("no interval")?;
    assert!(train_record.peak_memory_bytes > 1_000_000 && train_record.pictures_per_second > 0.0);
    assert!((0.0..=1.0).contains(&train_record.data_wait) && train_record.eta_seconds > 0.0);

    // Where the time went: the parts of a step, which together are no longer than it.
    let Some(parts) = records.iter().find_map(|record| match record {
        Record::Profile { parts, .. } => Some(parts),
        _ => None,
    }) else {
        return Err("the log holds no profile".into());
    };
    let seconds = |path: &str| {
        parts
            .iter()
            .find(|part| part.path == path)
            .map(|part| (part.calls, part.seconds))
    };
    let step = seconds("step").ok_or("no step")?;
    assert_eq!(step.0, 12);
    let mut within = 0.0;
    for part in ["data", "feed", "forward", "backward", "optimizer"] {
        let (calls, seconds) = seconds(&format!("step/{part}")).ok_or(format!("no {part}"))?;
        assert_eq!(calls, 12, "{part}");
        within += seconds;
    }
    assert!(within <= step.1 && within > 0.8 * step.1, "{within} of {}", step.1);
    assert!(finished.stderr.contains("  backward "), "{}", finished.stderr);

    // Sheets of samples: two of them side by side, in the log, in the event file and in the report.
    let sheets: Vec<_> = records
        .iter()
        .filter_map(|record| match record {
            Record::Samples {
                step,
                file,
                size,
                count,
            } => Some((*step, file.clone(), *size, *count)),
            _ => None,
        })
        .collect();
    let names = ["samples/step-00000006.png", "samples/step-00000012.png"];
    assert_eq!(sheets[0], (6, names[0].to_owned(), [32, 32], 2));
    assert_eq!(sheets[1], (12, names[1].to_owned(), [32, 32], 2));
    let sheet = read_image(&out.join(names[1]))?;
    assert_eq!((sheet.width(), sheet.height()), (32 + 4 + 32, 32));
    let events = out.join("events").read_dir()?.next().ok_or("no event file")??.path();
    assert!(
        events
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("events.out.tfevents."))
    );
    let events = std::fs::read(events)?;
    let holds = |bytes: &[u8]| events.windows(bytes.len()).any(|window| window == bytes);
    for tag in [
        "train/loss",
        "train/grad_norm",
        "train/lr",
        "validation/loss",
        "speed/data_wait",
        "samples",
    ] {
        assert!(holds(tag.as_bytes()), "{tag} is missing from the event file");
    }
    assert!(holds(&std::fs::read(out.join(names[0]))?));

    // The report needs nothing beside it.
    let report = std::fs::read_to_string(out.join("report.html"))?;
    assert_eq!(report.matches("<svg").count(), 5);
    assert_eq!(report.matches("src=\"data:image/png;base64,").count(), 2);
    assert_eq!(report.matches(" src=").count(), 2);
    for word in [
        "fox · a red apple",
        "Where the time went",
        "&quot;weight_decay&quot;",
        "paper:1",
    ] {
        assert!(report.contains(word), "{word} is missing from the report");
    }
    assert!(!report.contains("href=") && !report.contains("@import"));
    Ok(())
}

fn time() -> Outcome {
    let folder = tempfile::tempdir()?;
    let arguments = [
        "--steps",
        "100000",
        "--max-minutes",
        "0.01",
        "--validate-every",
        "1000000",
    ];
    let finished = train(world()?, folder.path(), &arguments)?.success()?;
    assert!(
        finished.stderr.contains("the time is up (max_minutes)"),
        "{}",
        finished.stderr
    );
    let records = read(folder.path())?;
    let Some(Record::End { step, outcome }) = records.last() else {
        return Err("the log does not end with an end".into());
    };
    assert!(*step > 0 && *step < 100_000 && outcome == "done", "{outcome} at {step}");
    let validated = |record: &Record| matches!(record, Record::Validation { step: at, .. } if at == step);
    assert!(records.iter().any(validated));
    assert!(
        folder
            .path()
            .join(format!("checkpoints/step-{step:08}/l2p.json"))
            .is_file()
    );
    // Given again, the command has nothing left to do.
    train(world()?, folder.path(), &arguments)?.success()?;
    let end = read(folder.path())?.pop();
    assert!(matches!(end, Some(Record::End { step: at, .. }) if at == *step));
    Ok(())
}
