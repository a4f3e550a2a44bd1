//! README and plots are what the records give.

use std::path::PathBuf;

use l2p_tests::{Outcome, Suite};

use super::{read, run};

pub fn register(suite: &mut Suite) {
    suite.cpu("bench::report::readme_shows_the_records", readme_shows_the_records);
    suite.cpu(
        "bench::report::sections_and_plots_are_written",
        sections_and_plots_are_written,
    );
}

/// The source tree, or what a bundle has of it: README, records and plots.
fn source() -> PathBuf {
    match std::env::var_os("L2P_SOURCE") {
        Some(folder) => folder.into(),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(".."),
    }
}

fn readme_shows_the_records() -> Outcome {
    run(&source(), "bench-report", &["--check"])?.success().map(drop)
}

fn sections_and_plots_are_written() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let results = folder.join("bench/results/cpu");
    std::fs::create_dir_all(&results)?;
    let json = results.join("step.json").display().to_string();
    let mut arguments = vec![
        "--tiny",
        "--model",
        "pixel-1k,pixel-4k",
        "--device",
        "cpu",
        "--repeats",
        "2",
    ];
    arguments.extend(["--json", &json]);
    run(folder, "bench-step", &arguments)?.success()?;
    let only = "--only=attention,products";
    run(
        folder,
        "bench-targets",
        &["--tiny", "--device=cpu", "--no-peer", "--repeats=2", only],
    )?
    .success()?;
    let arguments = ["--tiny", "--device=cpu", "--repeats=2", "--recompute=all", "--record"];
    run(folder, "bench-train", &arguments)?.success()?;
    let readme = folder.join("README.md");
    let names = ["parity", "4k", "train", "plots"];
    let sections = names.map(|name| format!("before {name}\n<!-- bench:{name} -->\nold\n<!-- /bench:{name} -->\n"));
    std::fs::write(&readme, sections.concat())?;

    run(folder, "bench-report", &["--check"])?
        .failure(1, "./README.md is not what the records give: run bench-report")?;
    run(folder, "bench-report", &[])?.success()?;
    run(folder, "bench-report", &["--check"])?.success()?;
    let text = std::fs::read_to_string(&readme)?;
    // No parity record, no table.
    assert!(
        text.contains("before parity\n<!-- bench:parity -->\n<!-- /bench:parity -->\n"),
        "{text}"
    );
    assert!(
        text.contains("| attention forward, L = 64 |") && text.contains("**miss**"),
        "{text}"
    );
    assert!(text.contains("| train-all step | "), "{text}");
    for name in ["latency", "memory", "roofline"] {
        let plot = format!("docs/plots/cpu-{name}.svg");
        assert!(text.contains(&format!("({plot})")), "{text}");
        let svg = std::fs::read_to_string(folder.join(&plot))?;
        assert!(
            svg.starts_with("<svg ") && svg.ends_with("</svg>\n") && !svg.contains("NaN"),
            "{svg}"
        );
    }

    // A record that changes is seen, and so is a plot.
    let plot = folder.join("docs/plots/cpu-latency.svg");
    std::fs::write(&plot, "")?;
    let message = "./docs/plots/cpu-latency.svg is not what the records give: run bench-report";
    run(folder, "bench-report", &["--check"])?.failure(1, message)?;
    run(folder, "bench-report", &[])?.success()?;
    let table = results.join("4k.json");
    let mut record = read(&table)?;
    record["rows"][0]["ours"] = 123.0.into();
    std::fs::write(&table, record.to_string())?;
    run(folder, "bench-report", &["--check"])?.failure(1, "./README.md is not what the records give: run bench-report")
}
