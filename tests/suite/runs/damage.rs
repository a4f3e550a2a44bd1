//! Pictures and captions that cannot be used.

use std::path::Path;

use l2p_engine::train::run::log::{Record, read};
use l2p_tests::{Outcome, Suite};
use libtest_mimic::Failed;

use super::{checkpoints, intervals, train, world, write_pictures};

pub fn register(suite: &mut Suite) {
    suite.cpu("runs::damage::a_little_is_skipped", a_little);
    suite.cpu("runs::damage::too_much_stops_the_run", too_much);
    suite.cpu("runs::damage::held_out_pictures_too", held_out);
    suite.cpu("runs::damage::metadata_that_says_nothing", metadata);
}

/// Pictures in these sets: one damaged of them is put up with, two are not.
const COUNT: usize = 150;

/// A set with pictures whose headers are sound and whose content is not.
fn damaged_set(folder: &Path, damaged: &[usize]) -> Outcome {
    write_pictures(folder, COUNT)?;
    for index in damaged {
        let path = folder.join(format!("{index:03}.png"));
        let bytes = std::fs::read(&path)?;
        std::fs::write(&path, &bytes[..bytes.len() - 40])?;
    }
    Ok(())
}

/// What a run reported as damaged.
fn reported(out: &Path) -> Result<Vec<String>, Failed> {
    let records = read(out)?.into_iter();
    Ok(records
        .filter_map(|record| match record {
            Record::Damaged { what, .. } => Some(what),
            _ => None,
        })
        .collect())
}

/// Two epochs, so that a damaged picture is met twice.
const TWO_EPOCHS: [&str; 10] = [
    "--steps",
    "40",
    "--batch",
    "8",
    "--held-out",
    "0",
    "--save-every",
    "0",
    "--log-every",
    "20",
];

fn a_little() -> Outcome {
    let folder = tempfile::tempdir()?;
    let (data, out) = (folder.path().join("data"), folder.path().join("run"));
    damaged_set(&data, &[7])?;
    let data = data.display().to_string();
    let finished = train(world()?, &out, &[&TWO_EPOCHS[..], &["--data", &data]].concat())?.success()?;
    assert_eq!(reported(&out)?, ["007.png"]);
    assert_eq!(finished.stderr.matches("damaged, skipped: 007.png").count(), 1);
    assert_eq!(intervals(&out)?.last().ok_or("no interval")?.pictures, 320);
    Ok(())
}

fn too_much() -> Outcome {
    let folder = tempfile::tempdir()?;
    let (data, out) = (folder.path().join("data"), folder.path().join("run"));
    damaged_set(&data, &[7, 90])?;
    let data = data.display().to_string();
    let arguments = [&TWO_EPOCHS[..], &["--data", &data]].concat();
    let finished = train(world()?, &out, &arguments)?;
    assert_eq!(finished.code, 1);
    let listed = "2 of 150 entries of the data set are damaged, more than the 1 % that are put up with (max_damaged)";
    assert!(finished.stderr.contains(listed), "{}", finished.stderr);
    assert!(finished.stderr.contains("007.png: ") && finished.stderr.contains("; 090.png: "));
    // Asked to, the run puts up with more.
    let out = folder.path().join("patient");
    train(world()?, &out, &[&arguments[..], &["--max-damaged", "0.02"]].concat())?.success()?;
    let mut names = reported(&out)?;
    names.sort();
    assert_eq!(names, ["007.png", "090.png"]);
    // Files that are no pictures at all are found before the first step.
    std::fs::write(Path::new(&data).join("011.png"), b"text")?;
    let out = folder.path().join("early");
    let finished = train(world()?, &out, &[&arguments[..], &["--max-damaged", "0.005"]].concat())?;
    assert!(
        finished.code == 1 && finished.stderr.contains("011.png: "),
        "{}",
        finished.stderr
    );
    assert!(checkpoints(&out)?.is_empty());
    Ok(())
}

fn held_out() -> Outcome {
    let folder = tempfile::tempdir()?;
    let (data, out) = (folder.path().join("data"), folder.path().join("run"));
    damaged_set(&data, &[7])?;
    let arguments = [
        "--steps",
        "2",
        "--validation",
        &data.display().to_string(),
        "--held-out",
        "0",
    ];
    train(world()?, &out, &arguments)?.success()?;
    assert_eq!(reported(&out)?, ["007.png"]);
    let Some(Record::Start(start)) = read(&out)?.into_iter().next() else {
        return Err("the log does not begin with a start".into());
    };
    assert_eq!(start.held_out, COUNT - 1);
    Ok(())
}

fn metadata() -> Outcome {
    let folder = tempfile::tempdir()?;
    let (data, out) = (folder.path().join("data"), folder.path().join("run"));
    write_pictures(&data, COUNT)?;
    let path = data.join("metadata.jsonl");
    let text = std::fs::read_to_string(&path)?;
    std::fs::write(&path, text.replacen("\"prompt\":\"fox\"", "\"title\":\"fox\"", 1))?;
    let arguments = ["--steps", "2", "--data", &data.display().to_string()];
    let finished = train(world()?, &out, &arguments)?.success()?;
    assert!(
        finished
            .stderr
            .contains("metadata.jsonl, line 1: has no prompt or text"),
        "{}",
        finished.stderr
    );
    Ok(())
}
