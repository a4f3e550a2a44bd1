//! The command line of `l2p-train`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Args, Parser, Subcommand};
use l2p_engine::limits::Ranks;
use l2p_engine::train::run::{Resume, TrainConfig, XAxis, nearest_key};
use l2p_engine::{DeviceChoice, Result};

use super::flags::KeyFlags;
use crate::launch::{RANKS_HELP, RankFlags};

const LONG_ABOUT: &str = "\
Trains a pixel model from a latent one (or fine-tunes either kind).

What to train, on what and how stands in a configuration, a TOML file; every key of it is also a flag, which wins over the \
file. Paths in the file are relative to the file. docs/training.md explains the keys and holds commented examples for 1K, 4K \
and the demo.

Everything a run writes goes to --out: log.jsonl, events/ for TensorBoard, checkpoints/, samples/, report.html; one run at a \
time. A run that was interrupted continues from its newest checkpoint when the same command is given again, with the same \
losses, bit for bit, as if it had never stopped. Weights, gradients or losses that are not finite are never saved: after a \
divergence the same command with a lower --lr continues from before it.

Ctrl-C, SIGTERM or the closing of the terminal (unless nohup ignores it) saves and ends with exit code 130; a second Ctrl-C \
ends at once. Errors end with exit code 1. Nothing that happens to the output ends a run: not a reader that leaves, not a \
full disk behind a redirection.";

const EXAMPLES: &str = "\
Examples:
  What will it take?
    l2p-train plan --config train.toml
    l2p-train plan --config train.toml --gpus 8
  Train, and watch:
    l2p-train --config train.toml --out runs/first
    tensorboard --logdir runs
  Train on eight GPUs, each taking its own pictures; start again where a GPU fails:
    l2p-train --config train.toml --out runs/first --gpus 8 --max-restarts 3
  The demo, 20 steps on a CPU:
    l2p-train --config models/demo/train.toml --steps 20 --out /tmp/demo
  Draw with what was trained, or make one file of it:
    l2p-sample --model runs/first/checkpoints/step-00001000 --prompt \"a lighthouse\"
    l2p-convert merge --base runs/first/init.safetensors --delta runs/first/checkpoints/step-00001000/delta.safetensors \\
                      --out pixel.safetensors
  Keep it as a model that shares the text encoder of the one it began from:
    l2p-train package runs/first/checkpoints/step-00001000 --out models/pixel
  Two runs in one picture:
    l2p-train compare shallow=runs/first full=runs/second --out compare.svg";

/// Trains a pixel model from a latent one (or fine-tunes either kind).
#[derive(Parser, Clone, Debug)]
#[command(
    name = "l2p-train",
    version,
    long_about = LONG_ABOUT,
    after_help = EXAMPLES,
    after_long_help = format!("{EXAMPLES}\n\n{RANKS_HELP}"),
    args_conflicts_with_subcommands = true
)]
pub struct Arguments {
    /// Something other than training.
    #[command(subcommand)]
    pub command: Option<Command>,

    /// What to train and where.
    #[command(flatten)]
    pub run: Run,
}

/// A training run.
#[derive(Args, Clone, Debug)]
pub struct Run {
    /// The configuration.
    #[command(flatten)]
    pub source: Source,
    /// The run's folder
    #[arg(long, value_name = "DIR", default_value = "run")]
    pub out: PathBuf,
    /// Continue from the newest good checkpoint in --out (auto), from a checkpoint's or a run's folder, or from none
    #[arg(long, value_name = "auto|none|DIR", default_value = "auto", value_parser = resume)]
    pub resume: Resume,
    /// Print every line of the log as JSON to standard output
    #[arg(long)]
    pub json: bool,
    /// How many ranks, and how long they wait.
    #[command(flatten)]
    pub ranks: RankFlags,
}

/// Where a configuration comes from.
#[derive(Args, Clone, Debug)]
pub struct Source {
    /// The configuration
    #[arg(long, value_name = "FILE.toml")]
    pub config: Option<PathBuf>,
    /// Where to run: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = device_choice)]
    pub device: DeviceChoice,
    /// The keys that were given as flags.
    #[command(flatten)]
    pub keys: KeyFlags,
}

/// What `l2p-train` does besides training.
#[derive(Subcommand, Clone, Debug)]
pub enum Command {
    /// Say what a run would train, hold in memory and compute, before anything is allocated
    Plan {
        /// The configuration.
        #[command(flatten)]
        source: Source,
        /// Say it of one of N ranks, each on a GPU of its own
        #[arg(long, visible_alias = "gpus", value_name = "N", default_value = "1")]
        ranks: Ranks,
        /// Tokens of a caption; prompts of 200 to 350 characters have about 96
        #[arg(long, value_name = "N", default_value_t = 96, value_parser = clap::value_parser!(u32).range(1..=4096))]
        caption_tokens: u32,
        /// Print one JSON object, with the names of the trained tensors
        #[arg(long)]
        json: bool,
    },
    /// Say the flow-matching loss of a model on a data set, as a run's validation computes it
    Evaluate {
        /// The configuration; of its keys --model and --data matter most.
        #[command(flatten)]
        source: Source,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Make a model of a checkpoint: a folder with the trained tensors and an l2p.json that names the model they lie over
    Package {
        /// The checkpoint's folder
        checkpoint: PathBuf,
        /// The model's folder
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Take the averaged weights (key ema) instead of the last ones
        #[arg(long)]
        average: bool,
        /// The model that the tensors lie over, where it is no longer where the run found it
        #[arg(long, value_name = "DIR|FILE")]
        base: Option<PathBuf>,
        /// Replace what is there
        #[arg(long)]
        force: bool,
        /// Print the result as one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Draw the validation losses of several runs in one picture, and write the numbers behind it
    Compare {
        /// Folders of runs, each with a label before it if it is to have another than its name
        #[arg(required = true, value_name = "[LABEL=]DIR")]
        runs: Vec<String>,
        /// The picture; the numbers go beside it, to a file of the same name that ends in .json instead of .svg
        #[arg(long, value_name = "FILE.svg", default_value = "compare.svg")]
        out: PathBuf,
        /// Over what: steps, pictures or seconds
        #[arg(long, value_name = "AXIS", default_value = "steps", value_parser = axis)]
        over: XAxis,
        /// Above the picture
        #[arg(long, default_value = "Held-out loss")]
        title: String,
        /// Also lay the runs' last samples beside each other, a row for each run
        #[arg(long, value_name = "FILE.png|FILE.jpg")]
        samples: Option<PathBuf>,
        /// Samples in a row
        #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=64))]
        columns: u32,
        /// Replace what is there
        #[arg(long)]
        force: bool,
        /// Print the numbers as JSON
        #[arg(long)]
        json: bool,
    },
    /// Write the report of a run anew, from its log
    Report {
        /// The run's folder
        run: PathBuf,
    },
}

impl Source {
    /// The configuration.
    ///
    /// # Errors
    /// Naming the key at fault.
    pub fn read(&self) -> Result<TrainConfig> {
        TrainConfig::read(self.config.as_deref(), &self.keys.0)
    }
}

impl Arguments {
    /// The arguments of this process. Where they make no sense, says why and ends it; where a flag goes by the name that other
    /// programs give it, with the name that it has here.
    pub fn of_process() -> Self {
        Self::of(std::env::args_os()).unwrap_or_else(|error| error.exit())
    }

    fn of<T: Into<OsString> + Clone>(arguments: impl IntoIterator<Item = T>) -> std::result::Result<Self, clap::Error> {
        Self::try_parse_from(arguments).map_err(|mut error| {
            if let (ErrorKind::UnknownArgument, Some(ContextValue::String(flag))) =
                (error.kind(), error.get(ContextKind::InvalidArg))
                && let Some(key) = nearest_key(flag.trim_start_matches('-'))
            {
                let meant = format!("--{}", key.replace('_', "-"));
                error.insert(ContextKind::SuggestedArg, ContextValue::String(meant));
            }
            error
        })
    }
}

fn device_choice(text: &str) -> std::result::Result<DeviceChoice, String> {
    text.parse().map_err(|error: l2p_engine::Error| error.to_string())
}

fn axis(text: &str) -> std::result::Result<XAxis, String> {
    text.parse().map_err(|error: l2p_engine::Error| error.to_string())
}

fn resume(text: &str) -> std::result::Result<Resume, String> {
    Ok(match text {
        "auto" => Resume::Auto,
        "none" => Resume::Fresh,
        folder => Resume::From(folder.into()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn flags_of_other_programs_are_translated() {
        for (flag, meant) in [
            ("--learning-rate", "'--lr'"),
            ("--batch-size", "'--batch'"),
            ("--weight-deacy", "'--weight-decay'"),
            ("--max_train_steps", "'--steps'"),
        ] {
            let message = Arguments::of(["l2p-train", flag, "1"]).unwrap_err().to_string();
            assert!(message.contains(meant), "{flag}: {message}");
        }
        assert!(Arguments::of(["l2p-train", "--lr", "1"]).is_ok());
    }

    #[test]
    fn help_teaches() {
        let help = Arguments::command().render_long_help().to_string();
        // Lines end where the width ends.
        let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
        for word in [
            "--config",
            "--weight-decay",
            "compare",
            "plan",
            "package",
            "exit code 130",
            "[default: 5e-5]",
        ] {
            assert!(help.contains(word), "{word} is missing from:\n{help}");
        }
    }
}
