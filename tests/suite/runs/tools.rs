//! What `l2p-train` does besides training: plan, evaluate, compare.

use l2p_engine::image_io::read_image;
use l2p_engine::train::run::TrainConfig;
use l2p_tests::{Outcome, Suite, models_folder};
use serde_json::Value;

use super::{l2p_train, train, validation, world, write_pictures};

pub fn register(suite: &mut Suite) {
    suite.cpu("runs::tools::a_plan_needs_no_data_and_no_gpu", plan);
    suite.cpu("runs::tools::the_examples_are_configurations", examples);
    suite.cpu("runs::tools::evaluation_is_a_runs_validation", evaluation);
    suite.cpu("runs::tools::runs_are_compared", comparison);
    suite.cpu("runs::tools::unknown_keys_are_named", unknown);
}

fn plan() -> Outcome {
    let source = models_folder().join("demo/source").display().to_string();
    let arguments = [
        "plan", "--model", &source, "--patch", "16", "--policy", "paper:1", "--batch", "192", "--size", "128x128",
        "--device", "cuda",
    ];
    let text = l2p_train(&arguments)?.success()?.stdout;
    for word in [
        "policy paper:1: ",
        "frozen *",
        "detailer head",
        "dX",
        "bf16 on a GPU",
        "192 pictures of 128x128",
    ] {
        let word = word.replace("frozen *", "none *");
        assert!(text.contains(&word), "{word} is missing from:\n{text}");
    }
    let json = l2p_train(&[&arguments[..], &["--json", "--accumulate", "2"]].concat())?
        .success()?
        .stdout;
    let plan: Value = serde_json::from_str(&json)?;
    let trained = plan["trained_parameters"].as_u64().ok_or("no number")?;
    assert!((6_000_000..8_000_000).contains(&trained), "{trained}");
    let choices = plan["choices"].as_array().ok_or("no choices")?;
    assert_eq!(choices.len(), 3);
    let number = |choice: &Value, path: &str| choice.pointer(path).and_then(Value::as_f64).unwrap_or_default();
    // Recomputing more takes less memory and more arithmetic.
    for pair in choices.windows(2) {
        assert!(number(&pair[0], "/memory/saved") > number(&pair[1], "/memory/saved"));
        assert!(number(&pair[0], "/operations") < number(&pair[1], "/operations"));
    }
    let head_dw = choices[0]["arithmetic"]
        .as_array()
        .and_then(|parts| parts.last())
        .map(|part| number(part, "/weights"));
    assert!(head_dw.is_some_and(|operations| operations > 1e9));
    Ok(())
}

fn examples() -> Outcome {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let paths = [
        "docs/examples/train-1k.toml",
        "docs/examples/train-4k.toml",
        "models/demo/transfer/train.toml",
    ];
    for path in paths {
        // Copied along with the tests only where the whole tree is.
        if root.join(path).exists() {
            TrainConfig::read(Some(&root.join(path)), &[])?.ensure_named(false)?;
        }
    }
    let demo = TrainConfig::read(Some(&models_folder().join("demo/train.toml")), &[])?;
    demo.ensure_named(true)?;
    assert_eq!(demo.policy.to_string(), "paper:2");
    Ok(())
}

fn evaluation() -> Outcome {
    let (world, folder) = (world()?, tempfile::tempdir()?);
    let data = folder.path().join("held-out");
    write_pictures(&data, 7)?;
    let data = data.display().to_string();
    let out = folder.path().join("run");
    let held_out = [
        "--held-out",
        "0",
        "--validation",
        &data,
        "--steps",
        "4",
        "--save-dtype",
        "f32",
    ];
    train(world, &out, &held_out)?.success()?;
    let checkpoint = out.join("checkpoints/step-00000004").display().to_string();
    let config = world.path("train.toml").display().to_string();
    let finished = l2p_train(&[
        "evaluate",
        "--config",
        &config,
        "--model",
        &checkpoint,
        "--data",
        &data,
        "--device",
        "cpu",
        "--json",
    ])?;
    let found: Value = serde_json::from_str(&finished.success()?.stdout)?;
    let logged = validation(&out)?.last().ok_or("no validation")?.1;
    assert_eq!(
        (found["loss"].as_f64(), found["pictures"].as_u64()),
        (Some(logged), Some(7))
    );
    Ok(())
}

fn comparison() -> Outcome {
    let (world, folder) = (world()?, tempfile::tempdir()?);
    let at = |name: &str| folder.path().join(name).display().to_string();
    let samples = [
        "--sample-every",
        "12",
        "--sample-prompts",
        "fox",
        "--sample-prompts",
        "house",
        "--sample-prompts",
        "apple",
    ];
    train(world, &folder.path().join("a"), &samples)?.success()?;
    train(
        world,
        &folder.path().join("b"),
        &[&samples[..], &["--policy", "full", "--lr", "2e-3"]].concat(),
    )?
    .success()?;
    let arguments = [
        "compare",
        &format!("shallow={}", at("a")),
        &at("b"),
        "--out",
        &at("both.svg"),
        "--title",
        "Two runs",
        "--samples",
        &at("rows.png"),
        "--columns",
        "2",
    ];
    let table = l2p_train(&arguments)?.success()?.stdout;
    assert!(table.contains("\nshallow ") && table.contains("\nb "), "{table}");
    let svg = std::fs::read_to_string(folder.path().join("both.svg"))?;
    for word in ["<svg", "Two runs", "shallow (", "held-out flow-matching loss"] {
        assert!(svg.contains(word), "{word} is missing from:\n{svg}");
    }
    let numbers: Value = serde_json::from_slice(&std::fs::read(folder.path().join("both.json"))?)?;
    let runs = numbers["runs"].as_array().ok_or("no runs")?;
    let last = validation(&folder.path().join("a"))?.last().ok_or("no validation")?.1;
    assert_eq!(runs[0]["last_validation"].as_f64(), Some(last));
    let differing = runs[1]["differing"].as_object().ok_or("nothing differs")?;
    assert_eq!(differing.keys().collect::<Vec<_>>(), ["policy", "lr"]);
    let rows = read_image(&folder.path().join("rows.png"))?;
    assert_eq!((rows.width(), rows.height()), (2 * 32 + 4, 2 * 32 + 4));
    let missing = l2p_train(&["compare", &at("c"), "--out", &at("c.svg")])?;
    assert!(
        missing.code == 1 && missing.stderr.contains("log.jsonl"),
        "{}",
        missing.stderr
    );
    Ok(())
}

fn unknown() -> Outcome {
    let folder = tempfile::tempdir()?;
    let config = folder.path().join("train.toml");
    std::fs::write(&config, "model = \"m\"\ndata = \"d\"\nweight_deacy = 0.1\n")?;
    let finished = l2p_train(&["--config", &config.display().to_string()])?;
    let message = format!(
        "{}: `weight_deacy` is no key; did you mean `weight_decay`?",
        config.display()
    );
    finished.failure(1, &message)?;
    let flag = l2p_train(&["--weight-deacy", "0.1"])?;
    assert!(
        flag.code == 2 && flag.stderr.contains("'--weight-decay'"),
        "{}",
        flag.stderr
    );
    Ok(())
}
