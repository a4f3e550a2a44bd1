//! How pictures are drawn.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use l2p_engine::DeviceChoice;
use l2p_engine::flow::noise_source::NoiseSource;
use l2p_engine::flow::solver::Solver;
use l2p_engine::limits::{Batch, Side, Steps};

use crate::launch::RankFlags;
use crate::parts::PartFlags;
use crate::precision::{PrecisionFlags, VramFlag};

/// The model, its settings, and where it runs.
#[derive(Args, Clone, Debug)]
pub struct DrawFlags {
    /// The model that draws: a diffusers folder, a folder with l2p.json, a transformer's folder, or a safetensors file
    #[arg(long, value_name = "DIR|FILE")]
    pub model: PathBuf,
    /// Where the features of the prompts are kept [default: cache in --out]
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
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
    /// Solver: euler, ddim or dpm++2m [default: the model's, or the first of these that fits it]
    #[arg(long, value_name = "NAME", value_parser = crate::prompts::solver)]
    pub solver: Option<Solver>,
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
    /// Where parts are that the model does not bring along.
    #[command(flatten)]
    pub parts: PartFlags,
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
    #[value(alias = "jpeg")]
    Jpg,
}

impl DrawFlags {
    /// The extension of the pictures' names.
    pub fn extension(&self) -> &'static str {
        match self.format {
            Format::Png => "png",
            Format::Webp => "webp",
            Format::Jpg => "jpg",
        }
    }
}

pub(super) fn device_choice(text: &str) -> Result<DeviceChoice, String> {
    text.parse().map_err(|error: l2p_engine::Error| error.to_string())
}

fn noise_source(text: &str) -> Result<NoiseSource, String> {
    text.parse().map_err(|error: l2p_engine::Error| error.to_string())
}
