//! The command line of `l2p-data`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use l2p_engine::DeviceChoice;
use l2p_engine::checkpoint::PathOverrides;
use l2p_engine::flow::noise_source::NoiseSource;
use l2p_engine::limits::{Batch, Pictures, Side, Steps};

use crate::launch::{RANKS_HELP, RankFlags};
use crate::precision::{PrecisionFlags, VramFlag};
use crate::score::Score;

/// Makes data sets for training, and scores pictures.
#[derive(Parser, Clone, Debug)]
#[command(name = "l2p-data", version)]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What `l2p-data` does.
#[derive(Subcommand, Clone, Debug)]
pub enum Command {
    /// Have a model draw many prompts, into a folder that l2p-train reads
    Synthesize(Box<Synthesize>),
    /// Score pictures: likeness, distances of features, tables of what other programs found
    Score(Box<Score>),
}

const LONG_ABOUT: &str = "\
Has a model draw many prompts, into a folder that l2p-train reads: pictures, and metadata.jsonl with file_name, prompt and \
seed of each. The features of the prompts go to a cache, so that training does not encode them again.

A run that was interrupted goes on where it stopped when the same command is given again. Given a larger --count, the \
same folder grows. Pictures that are damaged or gone by then are drawn again. One run at a time writes into a folder.";

const EXAMPLES: &str = "\
Examples:
  l2p-data synthesize --model models/demo/source --prompts prompts.jsonl --count 2 --out synthetic
  l2p-data synthesize --model z-image --prompts prompts.jsonl --out synthetic --gpus 8    GPUs draw in turn
  l2p-train --config models/demo/train.toml --data synthetic --cache synthetic/cache --out runs/first

A line of --prompts is a JSON object: {\"prompt\": \"...\", \"seed\": 1}, the seed optional; other keys are ignored.";

/// Drawing a data set.
#[derive(Args, Clone, Debug)]
#[command(long_about = LONG_ABOUT, after_help = EXAMPLES, after_long_help = format!("{EXAMPLES}\n\n{RANKS_HELP}"))]
pub struct Synthesize {
    /// The model that draws: a diffusers folder, a folder with l2p.json, a transformer's folder, or a safetensors file
    #[arg(long, value_name = "DIR|FILE")]
    pub model: PathBuf,
    /// A file with one JSON object per line
    #[arg(long, value_name = "FILE.jsonl")]
    pub prompts: PathBuf,
    /// Pictures per prompt, each with a seed of its own
    #[arg(long, value_name = "N", default_value = "1", allow_negative_numbers = true)]
    pub count: Pictures,
    /// Use only the first so many prompts
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub limit: Option<Pictures>,
    /// The folder
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Where the features of the prompts are kept [default: cache in --out]
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
    /// Seed of the first picture's noise; each further picture takes the next
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true, value_parser = crate::prompts::seed)]
    pub seed: u64,
    /// Format of the pictures
    #[arg(long, value_enum, default_value_t = Format::Png)]
    pub format: Format,
    /// Guidance: 1 is none, 0 would ignore the prompt; diffusers' guidance_scale plus 1 [default: the model's]
    #[arg(long, value_name = "SCALE", allow_negative_numbers = true)]
    pub cfg: Option<f32>,
    /// Denoising steps [default: the model's, or 28]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub steps: Option<Steps>,
    /// How far the schedule is shifted towards noise [default: the model's, or 3]
    #[arg(long, value_name = "SHIFT", allow_negative_numbers = true)]
    pub shift: Option<f32>,
    /// Pixels [default: the model's]
    #[arg(long, value_name = "PIXELS", allow_negative_numbers = true)]
    pub width: Option<Side>,
    /// Pixels [default: the model's]
    #[arg(long, value_name = "PIXELS", allow_negative_numbers = true)]
    pub height: Option<Side>,
    /// Pictures drawn at once [default: as many as fill the device]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub batch: Option<Batch>,
    /// Noise generator: philox (same bits on CPU and GPU) or torch (PyTorch's CPU generator)
    #[arg(long, value_name = "NAME", default_value = "philox", value_parser = noise_source)]
    pub rng: NoiseSource,
    /// Where to run: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = device_choice)]
    pub device: DeviceChoice,
    /// How weights are kept.
    #[command(flatten)]
    pub weights: PrecisionFlags,
    /// Where they are kept.
    #[command(flatten)]
    pub memory: VramFlag,
    /// The text encoder, where the model names none: its folder, or its file with config.json beside it
    #[arg(long, value_name = "DIR|FILE")]
    pub text_encoder: Option<PathBuf>,
    /// Folder of the tokenizer, where the model names none
    #[arg(long, value_name = "DIR")]
    pub tokenizer: Option<PathBuf>,
    /// The VAE, where a latent model names none: its folder, or its file with config.json beside it
    #[arg(long, value_name = "DIR|FILE")]
    pub vae: Option<PathBuf>,
    /// The model that a delta file was trained over
    #[arg(long, value_name = "DIR|FILE")]
    pub base: Option<PathBuf>,
    /// Print the result as one JSON object
    #[arg(long)]
    pub json: bool,
    /// How many ranks, and how long they wait.
    #[command(flatten)]
    pub ranks: RankFlags,
}

/// A format of pictures.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Lossless
    Png,
    /// Lossless, smaller and slower
    Webp,
    /// Lossy, of quality 92
    Jpg,
}

impl Synthesize {
    /// The parts of the model that were named.
    pub fn path_overrides(&self) -> PathOverrides {
        PathOverrides {
            base: self.base.clone(),
            text_encoder: self.text_encoder.clone(),
            tokenizer: self.tokenizer.clone(),
            vae: self.vae.clone(),
        }
    }

    /// The extension of the pictures' names.
    pub fn extension(&self) -> &'static str {
        match self.format {
            Format::Png => "png",
            Format::Webp => "webp",
            Format::Jpg => "jpg",
        }
    }
}

fn device_choice(text: &str) -> Result<DeviceChoice, String> {
    text.parse().map_err(|error: l2p_engine::Error| error.to_string())
}

fn noise_source(text: &str) -> Result<NoiseSource, String> {
    text.parse().map_err(|error: l2p_engine::Error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }
}
