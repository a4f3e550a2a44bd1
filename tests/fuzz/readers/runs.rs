//! Readers of what training runs write, and of what they train on.

use clap::Parser;
use l2p_engine::Device;
use l2p_engine::checkpoint::read_values;
use l2p_engine::train::run::{
    Event, Observer, PackageOptions, TrainConfig, XAxis, compare, evaluate as evaluated, package, write_report,
};

use super::{Ended, ended};
use crate::case::Case;

/// A run's log: its report, and a comparison with itself.
pub fn log(case: &mut Case) -> Ended {
    let run = case.path("run");
    let report = write_report(&run);
    let compared = compare(&[(None, run.clone()), (Some("again".into()), run)], XAxis::Pictures);
    if let Ok(comparison) = &compared {
        let _ = comparison.svg("title");
    }
    ended(report.and(compared.map(drop)))
}

/// Runs `l2p-train` on the CPU.
fn train(arguments: &[&str]) -> anyhow::Result<()> {
    l2p_bins::train::train(l2p_bins::train::Arguments::try_parse_from(arguments)?)
}

/// A run that goes on for a step after something of it changed.
pub fn resume(case: &mut Case) -> Ended {
    let path = |name: &str| case.path(name).display().to_string();
    let (config, out) = (path("train.toml"), path("run"));
    let newest = case.path("run/checkpoints/step-00000002");
    let _ = package(&newest, &case.path("packaged"), &PackageOptions::default());
    let fixed = ["l2p-train", "--device", "cpu", "--config", &config, "--out", &out];
    // Whatever a configuration asks for, the case stays small.
    let small = [
        "--steps",
        "3",
        "--batch",
        "1",
        "--accumulate",
        "1",
        "--size",
        "16x16",
        "--workers",
        "1",
        "--sample-every",
        "0",
    ];
    if let Err(error) = train(&[&fixed[..], &small].concat()) {
        return Ended::Refused(format!("{error:#}"));
    }
    let delta = case.path("run/checkpoints/step-00000003/delta.safetensors");
    match read_values(&delta) {
        Ok(tensors)
            if tensors
                .values()
                .any(|tensor| tensor.values.iter().any(|value| !value.is_finite())) =>
        {
            Ended::Wrong("weights that are not finite were saved as a success", String::new())
        }
        _ => Ended::Drawn,
    }
}

/// The loss of a model on a data set of which something changed.
pub fn evaluate(case: &mut Case) -> Ended {
    let flags = [
        ("data", case.path("data/metadata.jsonl").display().to_string()),
        ("size", "16x16".into()),
    ];
    let flags = flags.map(|(name, value)| (name.to_owned(), vec![value]));
    let config = TrainConfig::read(Some(&case.path("train.toml")), &flags);
    let evaluated = config.and_then(|config| evaluated(&config, &case.path("run/cache"), &Device::Cpu, &mut Quiet));
    match evaluated {
        Ok(evaluation) if evaluation.loss.is_finite() => Ended::Drawn,
        Ok(evaluation) => Ended::Wrong("a loss that is not finite", evaluation.loss.to_string()),
        Err(error) => Ended::Refused(error.to_string()),
    }
}

/// An observer that says nothing.
struct Quiet;

impl Observer for Quiet {
    fn event(&mut self, _: &Event<'_>) {}

    fn stop_requested(&self) -> bool {
        false
    }
}
