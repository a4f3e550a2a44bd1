//! The command line of `l2p-sample`.

use std::path::PathBuf;

use anyhow::bail;
use clap::{Parser, Subcommand, ValueEnum};
use l2p_engine::DeviceChoice;
use l2p_engine::flow::noise_source::NoiseSource;
use l2p_engine::flow::solver::Solver;
use l2p_engine::image_io::Settings as PictureSettings;
use l2p_engine::limits::{Batch, Pictures, Quality, Side, Steps};

use crate::launch::{RANKS_HELP, RankFlags};
use crate::parts::PartFlags;
use crate::precision::{PrecisionFlags, VramFlag};

use super::sets::Layout;
use super::start::StartFlags;

const EXAMPLES: &str = "\
Examples:
  l2p-sample --model models/demo/source --prompt \"slice of pizza\" --out pizza.png
  l2p-sample --model l2p_4k_sft.safetensors --text-encoder Z-Image/text_encoder --tokenizer Z-Image/tokenizer \\
             --prompt \"A lighthouse in a storm\" --steps 8 --shift 4 --out lighthouse.png --report text
  l2p-sample --model Z-Image-Turbo --prompts prompts.jsonl --count 4 --out pictures/
  l2p-sample --model Z-Image-Turbo --prompts prompts.jsonl --out pictures/ --gpus 8 --skip-existing
  l2p-sample --model Z-Image-Turbo --prompts geneval/prompts/evaluation_metadata.jsonl --out geneval-turbo/ --gpus 8
  l2p-sample --model models/demo/source --like pizza.png --seed 7 --out another.png
  l2p-sample --model models/demo/source --prompt fox --report --profile
  l2p-sample --model models/demo/pixel --prompt fox --init face.png --mask mask.png --out edited.png
  l2p-sample --model models/demo/pixel --prompt fox --init face.png --extend 0,0,64,0 --out wider.png
  l2p-sample devices
  l2p-sample warm --model Z-Image-Turbo --size 1024x1024 --batch 1,4

A line of --prompts is a JSON object: {\"prompt\": \"...\", \"negative\": \"...\", \"seed\": 1, \"out\": \"name.png\"}, all but the
prompt optional; \"out\" is a name within --out. GenEval's evaluation_metadata.jsonl, DPG-Bench's folder of prompts and a folder of
captions (one .txt file each) are recognised, or told by --layout: their pictures go to --out as their scorers read them, and
the same command given again draws what is missing. A manifest beside the pictures keeps other settings out (docs/evaluation.md).
Settings that are not given come from --like, then from the model.

Guidance by another scale: cfg = 1 + guidance_scale of diffusers' Z-Image pipelines, whose 0 (none) is 1 here.

Pictures in a folder are numbered on from those that are there, so that none is overwritten; a file that is named is replaced.
With --skip-existing they are numbered from 1, and those that are there already are kept: given again after it was ended or
killed, a command draws what is missing.";

const RANKS_SHARE: &str = "\
Ranks draw batches of the prompts' pictures in turn, into the same folder, which all of them see; a picture has the bits
that one rank gives it in the same --batch. The first rank shows progress, and its report counts all. --max-restarts
needs --skip-existing; --noise, --embeds, --save-raw and --profile are for one rank.";

/// Draws pictures from prompts, with a latent or a pixel model, on a GPU or on the CPU.
#[derive(Parser, Clone, Debug)]
#[command(name = "l2p-sample", version, long_version = crate::long_version(), args_conflicts_with_subcommands = true)]
#[command(after_help = EXAMPLES, after_long_help = format!("{EXAMPLES}\n\n{RANKS_HELP}\n\n{RANKS_SHARE}"))]
pub struct Arguments {
    /// Something other than drawing.
    #[command(subcommand)]
    pub command: Option<Command>,

    /// The model: a diffusers folder, a folder with l2p.json, a transformer's folder, or a safetensors file
    #[arg(long, value_name = "DIR|FILE")]
    pub model: Option<PathBuf>,
    /// What to draw
    #[arg(long)]
    pub prompt: Option<String>,
    /// What to move away from; takes effect with --cfg other than 1 [default: nothing]
    #[arg(long)]
    pub negative: Option<String>,
    /// A file with one JSON object per line, instead of --prompt; or the prompts of GenEval, of DPG-Bench, or a folder of captions
    #[arg(long, value_name = "FILE.jsonl|DIR", conflicts_with = "prompt")]
    pub prompts: Option<PathBuf>,
    /// What --prompts are, and so how pictures are laid out [default: what they are recognised as]
    #[arg(long, value_enum, value_name = "NAME", requires = "prompts")]
    pub layout: Option<Layout>,
    /// Guidance: 1 is none (one pass per step), more follows the prompt closer (two passes), 0 ignores the prompt; diffusers'
    /// guidance_scale plus 1 [default: the model's]
    #[arg(long, value_name = "SCALE", allow_negative_numbers = true)]
    pub cfg: Option<f32>,
    /// Denoising steps [default: the model's, or 28]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub steps: Option<Steps>,
    /// How far the schedule is shifted towards noise; larger pictures need more [default: the model's, or 3]
    #[arg(long, value_name = "SHIFT", allow_negative_numbers = true)]
    pub shift: Option<f32>,
    /// Solver: euler (flow matching), ddim (models of noise, v or picture) or dpm++2m (all; fewer steps) [default: the model's, or the
    /// first of these that fits it]
    #[arg(long, value_name = "NAME", value_parser = crate::prompts::solver)]
    pub solver: Option<Solver>,
    /// Seed of the first picture's noise; each further picture takes the next [default: 0]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = crate::prompts::seed)]
    pub seed: Option<u64>,
    /// Pictures per prompt [default: 1; 4 of GenEval's and DPG-Bench's]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub count: Option<Pictures>,
    /// Pictures drawn at once [default: as many as fill the device]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub batch: Option<Batch>,
    /// Pixels, rounded up to what the model draws [default: the model's]
    #[arg(long, value_name = "PIXELS", allow_negative_numbers = true)]
    pub width: Option<Side>,
    /// Pixels, rounded up to what the model draws [default: the model's]
    #[arg(long, value_name = "PIXELS", allow_negative_numbers = true)]
    pub height: Option<Side>,
    /// Noise generator: philox (same bits on CPU and GPU) or torch (PyTorch's CPU generator) [default: philox]
    #[arg(long, value_name = "NAME", value_parser = noise_source)]
    pub rng: Option<NoiseSource>,
    /// A .png, .jpg or .webp file, or a folder for several pictures (a name that ends with / is one)
    #[arg(long, value_name = "FILE|DIR", default_value = "out.png")]
    pub out: PathBuf,
    /// Keep pictures that are there under their names, and draw the others: what a run that was ended or killed has left.
    /// Damaged ones are drawn again; a PNG that was drawn with another prompt, seed or setting is an error (JPEG and WebP
    /// files tell their size alone)
    #[arg(long, conflicts_with_all = ["noise", "embeds", "save_raw", "profile"])]
    pub skip_existing: bool,
    /// Quality of JPEG files, 1 to 100
    #[arg(long, value_name = "N", default_value = "92", allow_negative_numbers = true)]
    pub quality: Quality,
    /// Where to run: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = device_choice)]
    pub device: DeviceChoice,
    /// Precision: bf16 on CUDA, f32 on the CPU; auto takes what the device has
    #[arg(long, value_enum, default_value_t = Precision::Auto)]
    pub dtype: Precision,
    /// How weights are kept.
    #[command(flatten)]
    pub weights: PrecisionFlags,
    /// Where they are kept.
    #[command(flatten)]
    pub memory: VramFlag,
    /// Where parts are that the model does not bring along.
    #[command(flatten)]
    pub parts: PartFlags,
    /// Keep the text encoder in memory while drawing, instead of freeing it before the transformer is loaded
    #[arg(long)]
    pub keep_text_encoder: bool,
    /// Take prompt, seed and settings from a PNG that l2p-sample drew; flags win over it
    #[arg(long, value_name = "PICTURE")]
    pub like: Option<PathBuf>,
    /// Print time and peak memory by phase and tag to standard output
    #[arg(long, value_enum, value_name = "FORMAT", num_args = 0..=1, default_missing_value = "text")]
    pub report: Option<ReportFormat>,
    /// Time the operations of one more step, run call by call after the pictures, and print each kind's share of the step,
    /// rate and share of what this device's copies or products reach; with `--report json` as part of the report
    #[arg(long)]
    pub profile: bool,
    /// Also write all images as f32 (tensor `image`, [pictures, channels, height, width], and `latent` of a latent model) to a
    /// safetensors file
    #[arg(long, value_name = "FILE")]
    pub save_raw: Option<PathBuf>,
    /// Take the noise from a safetensors file (tensor `noise`, [channels, height, width]) instead of the seed
    #[arg(long, value_name = "FILE")]
    pub noise: Option<PathBuf>,
    /// Take caption features from a safetensors file (tensors cap.0, cap.1, .. and neg.0, .., [tokens, width]) instead of
    /// encoding the prompt
    #[arg(long, value_name = "FILE")]
    pub embeds: Option<PathBuf>,
    /// Show what this machine has to run on, and why a GPU cannot be used
    #[arg(long)]
    pub list_devices: bool,
    /// What pictures begin with.
    #[command(flatten)]
    pub start: StartFlags,
    /// How many ranks, and how long they wait.
    #[command(flatten)]
    pub ranks: RankFlags,
}

/// What `l2p-sample` does besides drawing.
#[derive(Subcommand, Clone, Debug)]
pub enum Command {
    /// Show what this machine has to run on, and why a GPU cannot be used
    Devices {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Choose the algorithms of the model's matrix products ahead of time, so that no drawing has to search for them
    Warm(Box<super::warm::Warm>),
}

/// A precision by name.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// What the device has
    Auto,
    /// bfloat16 with f32 sums, on CUDA
    Bf16,
    /// f32, on the CPU
    F32,
}

/// How a report is printed.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReportFormat {
    /// A table
    Text,
    /// One JSON object
    Json,
}

impl Arguments {
    /// These, completed by the settings of a picture.
    ///
    /// # Errors
    /// When the picture names a noise generator or a precision that this program does not have, or began with another picture, which
    /// nobody names.
    pub fn completed(mut self, like: Option<&PictureSettings>) -> l2p_engine::Result<Self> {
        let Some(like) = like else { return Ok(self) };
        if self.prompts.is_none() {
            self.prompt.get_or_insert_with(|| like.prompt.clone());
        }
        self.negative.get_or_insert_with(|| like.negative.clone());
        self.model.get_or_insert_with(|| PathBuf::from(&like.model));
        self.cfg.get_or_insert(like.cfg);
        self.steps = self.steps.or(Steps::new(like.steps as u64));
        self.shift.get_or_insert(like.shift);
        if let (None, Some(solver)) = (self.solver, &like.solver) {
            self.solver = Some(solver.parse()?);
        }
        self.seed.get_or_insert(like.seed);
        if like.start.is_none() && self.start.init.is_none() {
            self.width = self.width.or(Side::new(like.width as u64));
            self.height = self.height.or(Side::new(like.height as u64));
        }
        if self.rng.is_none() {
            self.rng = Some(like.rng.parse()?);
        }
        self.weights.complete(like.weights.as_ref())?;
        match (&like.start, &self.start.init) {
            (Some(_), None) => {
                return Err(l2p_engine::Error::invalid(
                    "the picture of --like began with another one, which it does not hold: name that with --init, and what of it was \
                     kept with --mask or --extend",
                ));
            }
            (Some(start), Some(_)) => {
                self.start.strength.get_or_insert(start.strength);
            }
            (None, _) => {}
        }
        Ok(self)
    }

    /// Checks that what is asked for can be shared by so many ranks.
    ///
    /// # Errors
    /// Naming the flag that cannot.
    pub fn ensure_shareable(&self, ranks: usize) -> anyhow::Result<()> {
        if self.ranks.max_restarts.get() > 0 && !self.skip_existing && !self.draws_a_set() {
            bail!(
                "--max-restarts would draw all pictures again: give --skip-existing too, so that those that are there stay"
            );
        }
        let alone = [
            ("--noise", self.noise.is_some()),
            ("--embeds", self.embeds.is_some()),
            ("--save-raw", self.save_raw.is_some()),
            ("--profile", self.profile),
        ];
        match alone.into_iter().find(|(_, given)| *given && ranks > 1) {
            Some((flag, _)) => {
                bail!("{flag} is for one rank, but there are {ranks}: leave it away, or draw without --ranks")
            }
            None => Ok(()),
        }
    }

    /// Whether the prompts are a scorer's set, whose pictures are never drawn twice. What is wrong with them is said when they are read.
    fn draws_a_set(&self) -> bool {
        let layout = self.prompts.as_deref().map(|path| Layout::of(path, self.layout));
        matches!(layout, Some(Ok(layout)) if layout != Layout::Plain)
    }

    /// These, for the pictures of a scorer's set: those that are there stay.
    ///
    /// # Errors
    /// Naming a flag that means nothing then.
    pub fn for_a_set(mut self) -> anyhow::Result<Self> {
        let others = [
            ("--noise", self.noise.is_some()),
            ("--embeds", self.embeds.is_some()),
            ("--save-raw", self.save_raw.is_some()),
            ("--profile", self.profile),
            ("--init", self.start.init.is_some()),
        ];
        if let Some((flag, _)) = others.into_iter().find(|(_, given)| *given) {
            bail!(
                "{flag} is not for the prompts of a scorer's set: leave it away, or give --prompts a file of prompts"
            );
        }
        self.skip_existing = true;
        Ok(self)
    }

    /// Whether something else than drawing is asked for.
    pub fn draws_nothing(&self) -> bool {
        self.list_devices || self.command.is_some()
    }

    /// Where to run.
    pub fn device_choice(&self) -> DeviceChoice {
        match (self.device, self.dtype) {
            // Asking for f32 is asking for the device that has it.
            (DeviceChoice::Auto, Precision::F32) => DeviceChoice::Cpu,
            (choice, _) => choice,
        }
    }
}

pub(crate) fn device_choice(text: &str) -> Result<DeviceChoice, String> {
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

    #[test]
    fn what_ranks_cannot_share_is_named() {
        let checked = |flags: &[&str], ranks| {
            let given = Arguments::try_parse_from([&["l2p-sample"], flags].concat()).unwrap();
            given.ensure_shareable(ranks).map_err(|error| error.to_string())
        };
        for flags in [
            &["--noise", "n"][..],
            &["--embeds", "e"],
            &["--save-raw", "r"],
            &["--profile"],
        ] {
            assert_eq!(checked(flags, 1), Ok(()));
            let message = checked(flags, 2).unwrap_err();
            assert!(
                message.starts_with(flags[0]) && message.contains("one rank"),
                "{message}"
            );
        }
        let restarts = ["--ranks", "2", "--max-restarts", "1"];
        assert!(checked(&restarts, 2).unwrap_err().contains("--skip-existing"));
        assert_eq!(checked(&[&restarts[..], &["--skip-existing"]].concat(), 2), Ok(()));
        for flags in [&["--noise", "n"][..], &["--save-raw", "r"], &["--profile"]] {
            let both = [&["l2p-sample", "--skip-existing"], flags].concat();
            assert!(Arguments::try_parse_from(both).is_err());
        }
    }

    #[test]
    fn flags_win_over_a_picture() {
        let mut like = PictureSettings {
            prompt: "a fox".into(),
            negative: String::new(),
            seed: 5,
            steps: 8,
            cfg: 2.5,
            shift: 3.0,
            width: 128,
            height: 64,
            model: "m".into(),
            rng: "torch".into(),
            weights: None,
            start: None,
            solver: Some("dpm++2m".into()),
        };
        let given = Arguments::parse_from(["l2p-sample", "--seed", "9", "--model", "other"]);
        let arguments = given.clone().completed(Some(&like)).unwrap();
        assert_eq!(
            (arguments.seed, arguments.steps, arguments.width),
            (Some(9), Steps::new(8), Side::new(128))
        );
        assert_eq!(arguments.prompt.as_deref(), Some("a fox"));
        assert_eq!(arguments.model, Some(PathBuf::from("other")));
        assert_eq!(arguments.rng, Some(NoiseSource::Torch));
        like.rng = "dice".into();
        assert!(given.completed(Some(&like)).unwrap_err().to_string().contains("`dice`"));
    }
}
