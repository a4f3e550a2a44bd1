//! The command line of `l2p-data score`.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::{Args, Subcommand};
use l2p_engine::DeviceChoice;
use l2p_engine::limits::{Bounded, Patch, Side};

const LONG_ABOUT: &str = "\
Computes what needs no foreign network: how alike pictures are, distances and scores of features that official extractors wrote to \
files, distances in the space of a model's own VAE, and tables of what the programs of GenEval and DPG-Bench found. docs/evaluation.md \
says which program makes which file.";

const EXAMPLES: &str = "\
Examples:
  l2p-data score pictures drawn --against reference
  l2p-data score features drawn.npz other.npz --against reference.npz --json
  l2p-data score inception drawn-logits.npz
  l2p-data score clip drawn-clip.npz --captions captions-clip.npz
  l2p-data score vae --model models/demo/source pixel=out/pixel source=out/source --against held-out
  l2p-data score crops drawn --against reference --side 299 --out crops
  l2p-data score geneval results.jsonl
  l2p-data score dpg results.txt

A set is a path, or NAME=PATH to give it a name in tables.";

/// Scores of pictures.
#[derive(Args, Clone, Debug)]
#[command(long_about = LONG_ABOUT, after_help = EXAMPLES)]
pub struct Score {
    /// Which.
    #[command(subcommand)]
    pub which: Which,
}

/// Which scores.
#[derive(Subcommand, Clone, Debug)]
pub enum Which {
    /// PSNR, SSIM and what can be seen of patches, of pictures with the same names in two folders
    Pictures(Pictures),
    /// Fréchet (FID) and kernel distance (KID) between files of features
    Features(Features),
    /// The Inception score of a file of logits
    Inception(Inception),
    /// The CLIP score of files of features of pictures and of their captions
    Clip(Clip),
    /// Fréchet and kernel distance in the space of a model's own VAE, between folders of pictures
    Vae(Vae),
    /// Write crops at random places, the same in every set, for FID-patch: its features are extracted of them
    Crops(Crops),
    /// The results of GenEval's evaluate_images.py as a table
    Geneval(Results),
    /// The results of DPG-Bench's compute_dpg_bench.py as a table
    Dpg(Results),
}

/// A set of pictures or features by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// What tables call it.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
}

impl FromStr for Named {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let named = text.split_once('=').filter(|_| !Path::new(text).exists());
        let (name, path) = match named {
            Some((name, path)) => (name.to_owned(), PathBuf::from(path)),
            None => {
                let path = PathBuf::from(text);
                let last = path.file_name().map(|name| name.to_string_lossy().into_owned());
                (last.unwrap_or_else(|| text.to_owned()), path)
            }
        };
        match name.is_empty() || path.as_os_str().is_empty() {
            true => Err(format!("`{text}` names no set; write PATH or NAME=PATH")),
            false => Ok(Named { name, path }),
        }
    }
}

/// Pictures against pictures.
#[derive(Args, Clone, Debug)]
pub struct Pictures {
    /// Folders of pictures
    #[arg(value_name = "[NAME=]DIR", required = true)]
    pub sets: Vec<Named>,
    /// The folder that they are compared with
    #[arg(long, value_name = "DIR")]
    pub against: PathBuf,
    /// Side of the patches whose edges are looked for, in pixels
    #[arg(long, value_name = "PIXELS", default_value = "16", allow_negative_numbers = true)]
    pub patch: Patch,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// How KID chooses subsets, as torch-fidelity does.
#[derive(Args, Clone, Debug)]
pub struct SubsetFlags {
    /// Subsets that KID is a mean of
    #[arg(long, value_name = "N", default_value = "100", allow_negative_numbers = true)]
    pub subsets: Bounded<1, 10_000>,
    /// Pictures in a subset [default: 1000, or as many as the smaller set has]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub subset_size: Option<Bounded<2, 20_000>>,
    /// Seed of the choice
    #[arg(long, value_name = "N", default_value = "2020", allow_negative_numbers = true)]
    pub seed: Bounded<0, { u32::MAX as u64 }>,
}

/// Features against features.
#[derive(Args, Clone, Debug)]
pub struct Features {
    /// Files of features: .npy, .npz or safetensors, [pictures, dimensions]; or .npz with mu and sigma, for FID alone
    #[arg(value_name = "[NAME=]FILE", required = true)]
    pub sets: Vec<Named>,
    /// The file that they are compared with
    #[arg(long, value_name = "FILE")]
    pub against: PathBuf,
    /// Name of the array in the files [default: the only matrix]
    #[arg(long, value_name = "NAME")]
    pub key: Option<String>,
    /// How KID chooses.
    #[command(flatten)]
    pub subsets: SubsetFlags,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Logits.
#[derive(Args, Clone, Debug)]
pub struct Inception {
    /// Files of logits, [pictures, classes]
    #[arg(value_name = "[NAME=]FILE", required = true)]
    pub sets: Vec<Named>,
    /// Name of the array in the files [default: the only matrix]
    #[arg(long, value_name = "NAME")]
    pub key: Option<String>,
    /// Parts of a set that the score is a mean of
    #[arg(long, value_name = "N", default_value = "10", allow_negative_numbers = true)]
    pub splits: Bounded<1, 10_000>,
    /// Seed of the order in which pictures are divided
    #[arg(long, value_name = "N", default_value = "2020", allow_negative_numbers = true)]
    pub seed: Bounded<0, { u32::MAX as u64 }>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Pictures and captions.
#[derive(Args, Clone, Debug)]
pub struct Clip {
    /// Files of the pictures' features, [pictures, dimensions]
    #[arg(value_name = "[NAME=]FILE", required = true)]
    pub sets: Vec<Named>,
    /// The file of the captions' features, in the order of the pictures
    #[arg(long, value_name = "FILE")]
    pub captions: PathBuf,
    /// Name of the array of pictures [default: the only matrix]
    #[arg(long, value_name = "NAME")]
    pub key: Option<String>,
    /// Name of the array of captions [default: the only matrix]
    #[arg(long, value_name = "NAME")]
    pub caption_key: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Pictures against pictures in a VAE's space.
#[derive(Args, Clone, Debug)]
pub struct Vae {
    /// Folders of pictures
    #[arg(value_name = "[NAME=]DIR", required = true)]
    pub sets: Vec<Named>,
    /// The folder that they are compared with
    #[arg(long, value_name = "DIR")]
    pub against: PathBuf,
    /// The model whose VAE it is
    #[arg(long, value_name = "DIR|FILE")]
    pub model: PathBuf,
    /// The VAE, where the model names none: its folder, or its file with config.json beside it
    #[arg(long, value_name = "DIR|FILE")]
    pub vae: Option<PathBuf>,
    /// Pixels along a side that pictures are brought to [default: what the model draws]
    #[arg(long, value_name = "PIXELS", allow_negative_numbers = true)]
    pub side: Option<Side>,
    /// Cells along a side of the grid over which latents are averaged
    #[arg(long, value_name = "N", default_value = "2", allow_negative_numbers = true)]
    pub grid: Bounded<1, 16>,
    /// How KID chooses.
    #[command(flatten)]
    pub subsets: SubsetFlags,
    /// Where to run: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = device_choice)]
    pub device: DeviceChoice,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Crops.
#[derive(Args, Clone, Debug)]
pub struct Crops {
    /// Folders of pictures; a set's crops go to a folder of its name
    #[arg(value_name = "[NAME=]DIR", required = true)]
    pub sets: Vec<Named>,
    /// The folder that they are compared with, whose crops go to `reference`
    #[arg(long, value_name = "DIR")]
    pub against: PathBuf,
    /// Where to
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Side of a crop in pixels
    #[arg(long, value_name = "PIXELS", default_value = "299", allow_negative_numbers = true)]
    pub side: Side,
    /// Crops of each picture
    #[arg(long, value_name = "N", default_value = "1", allow_negative_numbers = true)]
    pub per_picture: Bounded<1, 1000>,
    /// Seed of the places
    #[arg(long, value_name = "N", default_value = "2020", allow_negative_numbers = true)]
    pub seed: Bounded<0, { u32::MAX as u64 }>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// A file of results.
#[derive(Args, Clone, Debug)]
pub struct Results {
    /// The file that the program wrote
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

fn device_choice(text: &str) -> Result<DeviceChoice, String> {
    text.parse().map_err(|error: l2p_engine::Error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_have_the_name_that_is_given_or_that_of_their_path() {
        let named = |name: &str, path: &str| Named {
            name: name.into(),
            path: path.into(),
        };
        assert_eq!("a=b/c".parse(), Ok(named("a", "b/c")));
        assert_eq!("b/c.npz".parse(), Ok(named("c.npz", "b/c.npz")));
        assert_eq!("..".parse(), Ok(named("..", "..")));
        for bad in ["", "=b", "a="] {
            assert!(bad.parse::<Named>().is_err(), "{bad}");
        }
    }
}
