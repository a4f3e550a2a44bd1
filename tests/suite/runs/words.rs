//! What a user is told who asks for something unusual.

use l2p_engine::checkpoint::{Values, read_values, write_values};
use l2p_engine::train::run::log::{Record, read};
use l2p_tests::{Outcome, Suite};
use serde_json::Value;

use super::{curve, l2p_train, train, world};

pub fn register(suite: &mut Suite) {
    suite.cpu("runs::words::a_run_is_continued_by_its_folder", by_folder);
    suite.cpu("runs::words::other_numbers_of_steps_are_told", other_steps);
    suite.cpu("runs::words::settings_that_make_no_sense_are_named", nonsense);
    suite.cpu("runs::words::sizes_that_are_rounded_are_told", rounded);
    suite.cpu("runs::words::a_loss_that_is_no_number_is_no_evaluation", no_number);
    suite.cpu("runs::words::comparisons_replace_nothing_unasked", comparisons);
    suite.cpu("runs::words::reports_hold_no_files_but_sheets", foreign_sheets);
}

fn by_folder() -> Outcome {
    let folder = tempfile::tempdir()?;
    let (out, other) = (folder.path().join("run"), folder.path().join("other"));
    train(world()?, &out, &["--steps", "4"])?.success()?;
    let name = out.display().to_string();
    train(world()?, &out, &["--steps", "8", "--resume", &name])?.success()?;
    let finished = train(world()?, &other, &["--resume", &name])?.success()?;
    assert!(finished.stderr.contains("step-00000008"), "{}", finished.stderr);
    assert_eq!(curve(&other)?.len(), 2);
    let empty = folder.path().display().to_string();
    let finished = train(world()?, &folder.path().join("third"), &["--resume", &empty])?;
    assert!(
        finished.code == 1 && finished.stderr.contains("neither a checkpoint"),
        "{}",
        finished.stderr
    );
    Ok(())
}

fn other_steps() -> Outcome {
    let folder = tempfile::tempdir()?;
    let cosine = |steps: &'static str| ["--schedule", "cosine", "--steps", steps];
    train(world()?, folder.path(), &cosine("8"))?.success()?;
    let fewer = train(world()?, folder.path(), &cosine("6"))?.success()?;
    assert!(
        fewer
            .stderr
            .contains("8 steps are done already and steps = 6 asks for fewer"),
        "{}",
        fewer.stderr
    );
    let more = train(
        world()?,
        folder.path(),
        &[&cosine("16")[..], &["--lr", "5e-4"]].concat(),
    )?
    .success()?;
    for word in [
        "lr 0.001 → 0.0005, steps 8 → 16",
        "the cosine now ends at step 16 instead of 8: the learning rate goes on at 2.500e-4",
    ] {
        assert!(more.stderr.contains(word), "{word} is missing from {}", more.stderr);
    }
    let again = train(
        world()?,
        folder.path(),
        &[&cosine("16")[..], &["--lr", "5e-4"]].concat(),
    )?
    .success()?;
    assert!(!again.stderr.contains("before the break"), "{}", again.stderr);
    Ok(())
}

fn nonsense() -> Outcome {
    let base = ["--model", "m", "--data", "d"];
    for (flags, told) in [
        (
            ["--seed", "-1"],
            "`seed`: expected a whole number from 0 to 9223372036854775807, found -1",
        ),
        (
            ["--workers", "4294967296"],
            "`workers`: expected a whole number from 1 to 1024",
        ),
        (
            ["--accumulate", "4294967296"],
            "`accumulate`: expected a whole number from 1 to 65536",
        ),
        (
            ["--steps", "1099511627776"],
            "`steps`: expected a whole number from 1 to 1000000000000",
        ),
        (
            ["--head-bottleneck", "4611686018427387904"],
            "`head_bottleneck`: expected a whole number from 1 to 262144",
        ),
        (
            ["--lr", "1e39"],
            "lr = 1000000000000000000000000000000000000000: must be a positive number",
        ),
    ] {
        let finished = l2p_train(&[&base[..], &flags].concat())?;
        assert!(
            finished.code == 1 && finished.stderr.contains(told),
            "{}",
            finished.stderr
        );
        let planned = l2p_train(&[&["plan"], &base[..], &flags].concat())?;
        assert!(planned.code == 1 && planned.stderr.contains(told), "{}", planned.stderr);
    }
    let flag = l2p_train(&["--learning-rate", "1"])?;
    assert!(flag.code == 2 && flag.stderr.contains("'--lr'"), "{}", flag.stderr);
    let folder = tempfile::tempdir()?;
    let config = folder.path().join("train.toml");
    for (text, told) in [
        ("learning_rate = 1e-4", "`learning_rate` is no key; did you mean `lr`?"),
        ("model = \"C:\\Users\\me\"", "put a path in single quotes, 'C:\\Users'"),
        ("data = \"C:\\new\"", "`data` holds a control character (C: ew)"),
        ("batch = 0", "`batch`: expected a whole number from 1 to 65536, found 0"),
    ] {
        std::fs::write(&config, text)?;
        let finished = l2p_train(&["--config", &config.display().to_string()])?;
        assert!(
            finished.code == 1 && finished.stderr.contains(told),
            "{}",
            finished.stderr
        );
        assert!(finished.stderr.contains("train.toml: "), "{}", finished.stderr);
    }
    Ok(())
}

/// The world's model with another size of its own.
fn rounded() -> Outcome {
    let (world, folder) = (world()?, tempfile::tempdir()?);
    let mut manifest: Value = serde_json::from_slice(&std::fs::read(world.path("model/l2p.json"))?)?;
    manifest["defaults"]["width"] = 40.into();
    manifest["transformer"] = world.path("model/weights.safetensors").display().to_string().into();
    std::fs::write(folder.path().join("l2p.json"), manifest.to_string())?;
    let (model, data) = (
        folder.path().display().to_string(),
        world.path("data").display().to_string(),
    );
    let cache = world.path("cache").display().to_string();
    let out = folder.path().join("run").display().to_string();
    let arguments = [
        "--model", &model, "--data", &data, "--cache", &cache, "--out", &out, "--device", "cpu", "--steps", "1",
    ];
    let finished = l2p_train(&arguments)?.success()?;
    let told = "the model's own size, 40x32, is no multiple of 16: pictures and samples are of 48x32";
    assert!(finished.stderr.contains(told), "{}", finished.stderr);
    Ok(())
}

fn no_number() -> Outcome {
    let (world, folder) = (world()?, tempfile::tempdir()?);
    let mut tensors: Vec<(String, Values)> = read_values(&world.path("model/weights.safetensors"))?
        .into_iter()
        .collect();
    let norm = tensors
        .iter_mut()
        .find(|(name, _)| name.ends_with("attention_norm1.weight"));
    norm.ok_or("no norm")?.1.values[5] = f32::NAN;
    write_values(&folder.path().join("weights.safetensors"), &tensors)?;
    std::fs::copy(world.path("model/l2p.json"), folder.path().join("l2p.json"))?;
    let (config, model) = (
        world.path("train.toml").display().to_string(),
        folder.path().display().to_string(),
    );
    let finished = l2p_train(&["evaluate", "--config", &config, "--model", &model, "--device", "cpu"])?;
    assert!(
        finished.code == 1 && finished.stdout.is_empty(),
        "{}{}",
        finished.stdout,
        finished.stderr
    );
    assert!(finished.stderr.contains("not finite"), "{}", finished.stderr);
    Ok(())
}

fn comparisons() -> Outcome {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name).display().to_string();
    train(world()?, &folder.path().join("a"), &["--steps", "2"])?.success()?;
    let compare = |more: &[&str]| l2p_train(&[&["compare", &at("a")], more].concat());
    let files = || -> std::io::Result<Vec<(String, Vec<u8>)>> {
        let mut found = Vec::new();
        for entry in folder.path().read_dir()? {
            let path = entry?.path();
            if path.is_file() {
                found.push((path.display().to_string(), std::fs::read(&path)?));
            }
        }
        found.sort();
        Ok(found)
    };
    // A picture that would be its own numbers' file, or no picture.
    for out in ["x.json", "x", "x.png"] {
        let finished = compare(&["--out", &at(out)])?;
        assert!(
            finished.code == 1 && finished.stderr.contains("does not end in .svg"),
            "{}",
            finished.stderr
        );
    }
    assert!(files()?.is_empty());
    compare(&["--out", &at("both.svg")])?.success()?;
    let before = files()?;
    assert_eq!(before.len(), 2);
    // Nothing is replaced unasked, be it the picture or the numbers.
    for gone in ["both.json", "both.svg"] {
        std::fs::remove_file(at(gone))?;
        let finished = compare(&["--out", &at("both.svg"), "--title", "Other"])?;
        assert!(
            finished.code == 1 && finished.stderr.contains("--force"),
            "{}",
            finished.stderr
        );
        assert_eq!(files()?.len(), 1);
        compare(&["--out", &at("both.svg"), "--force"])?.success()?;
    }
    assert!(files()? == before);
    // A disk that takes no more leaves what was there.
    if cfg!(unix) {
        let mut limited = std::process::Command::new("bash");
        let program = l2p_tests::cli::program("l2p-train")?;
        limited
            .args(["-c", "trap '' XFSZ; ulimit -f 1; exec \"$@\"", "bash"])
            .arg(program);
        limited.args([
            "compare",
            &at("a"),
            "--out",
            &at("both.svg"),
            "--force",
            "--title",
            "Other",
        ]);
        let finished = l2p_tests::cli::Finished::from(&mut limited)?;
        assert!(
            finished.code == 1 && finished.stderr.contains("both."),
            "{}",
            finished.stderr
        );
        assert!(files()? == before);
    }
    Ok(())
}

/// A log from elsewhere that names a file of its reader's as a sheet of samples: neither the report nor a comparison takes it up.
fn foreign_sheets() -> Outcome {
    let folder = tempfile::tempdir()?;
    let (run, secret) = (folder.path().join("run"), folder.path().join("secret.png"));
    train(world()?, &run, &["--steps", "2"])?.success()?;
    std::fs::copy(world()?.path("data/000.png"), &secret)?;
    let log = run.join("log.jsonl");
    let honest = std::fs::read_to_string(&log)?;
    let bytes = std::fs::read(&secret)?;
    std::fs::create_dir_all(run.join("samples"))?;
    std::fs::write(run.join("samples/text.png"), "no picture")?;
    let absolute = secret.display().to_string();
    for file in [
        "../secret.png",
        "samples/../../secret.png",
        &absolute,
        "samples/text.png",
    ] {
        let record = Record::Samples {
            step: 2,
            file: file.into(),
            size: [32, 32],
            count: 1,
        };
        std::fs::write(&log, format!("{honest}{}\n", serde_json::to_string(&record)?))?;
        assert!(read(&run)?.contains(&record));
        l2p_train(&["report", &run.display().to_string()])?.success()?;
        let report = std::fs::read_to_string(run.join("report.html"))?;
        assert!(
            !report.contains("data:image/png"),
            "{file} of {} bytes is in the report",
            bytes.len()
        );
        let rows = folder.path().join("rows.png").display().to_string();
        let out = folder.path().join("rows.svg").display().to_string();
        let finished = l2p_train(&["compare", &run.display().to_string(), "--samples", &rows, "--out", &out])?;
        assert!(finished.code == 1, "{file} was laid beside others");
    }
    Ok(())
}
