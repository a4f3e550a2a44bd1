//! The flags that say how weights are kept on the device.

use std::fmt;
use std::str::FromStr;

use clap::Args;
use l2p_engine::checkpoint::ModelPaths;
use l2p_engine::device::format_bytes;
use l2p_engine::image_io::WeightSettings;
use l2p_engine::model::Precision;
use l2p_engine::pipeline::{ModelFiles, Settings};
use l2p_engine::{Device, Error, Result};

use crate::size::ByteSize;

/// How the weights of a model's blocks are kept.
#[derive(Args, Clone, Debug)]
pub struct PrecisionFlags {
    /// How the weights of the transformer's main blocks are kept: bf16 (the compute type), int8 (half the memory, and on Hopper
    /// products at twice the rate) or fp8 (the same, less exact); what modulates blocks, embedders, refiners, input and output stay as
    /// they are [default: bf16]
    #[arg(long, value_name = "TYPE")]
    pub trunk: Option<Precision>,
    /// Weights of main blocks that stay in the compute type: patterns of names, `*` for any characters, separated by commas
    #[arg(long, value_name = "PATTERNS", value_delimiter = ',')]
    pub trunk_keep: Vec<String>,
    /// How the weights of the text encoder's blocks are kept: bf16, int8 or fp8 [default: bf16]
    #[arg(long, value_name = "TYPE")]
    pub text_weights: Option<Precision>,
}

/// Where weights are kept.
#[derive(Args, Clone, Debug)]
pub struct VramFlag {
    /// The most GPU memory to take, as the driver counts it: a size such as 4GB, or auto for what is free. Weights of blocks that do
    /// not fit stay in locked host memory, and every step copies them while it computes
    #[arg(long, value_name = "SIZE|auto")]
    pub vram: Option<Vram>,
}

/// The most GPU memory to take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vram {
    /// What is free.
    Auto,
    /// So many bytes.
    Most(ByteSize),
}

impl FromStr for Vram {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "auto" => Ok(Vram::Auto),
            // A plain small number is one of gigabytes, as the memory of GPUs is spoken of.
            _ => match text.parse::<f64>() {
                Ok(gigabytes) if (0.0..1000.0).contains(&gigabytes) => {
                    Ok(Vram::Most(ByteSize((gigabytes * 1e9) as u64)))
                }
                _ => text.parse().map(Vram::Most),
            },
        }
    }
}

impl fmt::Display for PrecisionFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "trunk {}", self.trunk())?;
        if !self.trunk_keep.is_empty() {
            write!(f, " but {}", self.trunk_keep.join(","))?;
        }
        write!(f, ", text {}", self.text_weights())
    }
}

impl PrecisionFlags {
    /// How the weights of the main blocks are kept, but for what --trunk-keep names.
    fn trunk(&self) -> Precision {
        self.trunk.clone().unwrap_or_default()
    }

    fn text_weights(&self) -> Precision {
        self.text_weights.clone().unwrap_or_default()
    }

    /// What pictures say of it; nothing where all weights are kept in the compute type.
    pub fn settings(&self) -> Option<WeightSettings> {
        let [trunk, text] = [self.trunk(), self.text_weights()];
        (trunk.coding.is_some() || text.coding.is_some()).then(|| WeightSettings {
            trunk: trunk.to_string(),
            trunk_keep: self.trunk_keep.clone(),
            text: text.to_string(),
        })
    }

    /// These, completed by those of a picture, where no flag says anything.
    ///
    /// # Errors
    /// When the picture names a precision that this program does not have.
    pub fn complete(&mut self, like: Option<&WeightSettings>) -> Result<()> {
        let given = self.trunk.is_some() || self.text_weights.is_some() || !self.trunk_keep.is_empty();
        let Some(like) = like.filter(|_| !given) else {
            return Ok(());
        };
        let precision = |text: &str| text.parse::<Precision>().map(Some);
        *self = PrecisionFlags {
            trunk: precision(&like.trunk)?,
            trunk_keep: like.trunk_keep.clone(),
            text_weights: precision(&like.text)?,
        };
        Ok(())
    }

    /// The model's files, to be loaded so.
    ///
    /// # Errors
    /// As [`ModelFiles::open`], and when there are patterns of what to keep that nothing fits, or nothing is to be changed.
    pub fn open(&self, paths: ModelPaths, device: Device) -> Result<ModelFiles> {
        let [trunk, text] = self.precisions()?;
        ModelFiles::open(paths, device)?.kept_in(trunk, text)
    }

    /// For the transformer and for the text encoder.
    ///
    /// # Errors
    /// When there are patterns of what to keep, but nothing is changed.
    fn precisions(&self) -> Result<[Precision; 2]> {
        let mut trunk = self.trunk();
        if trunk.coding.is_none() && !self.trunk_keep.is_empty() {
            return Err(Error::invalid(
                "--trunk-keep names what stays in the compute type, but --trunk bf16 keeps all of it there: give --trunk int8 or fp8",
            ));
        }
        trunk.keep.clone_from(&self.trunk_keep);
        Ok([trunk, self.text_weights()])
    }
}

impl VramFlag {
    /// Keeps what does not fit into --vram in host memory, for `batch` pictures of this size at once, and says so.
    ///
    /// # Errors
    /// As [`ModelFiles::fit`].
    pub fn fit(&self, files: &mut ModelFiles, settings: &Settings, batch: usize) -> Result<Option<String>> {
        let limit = match self.vram {
            None => return Ok(None),
            Some(Vram::Auto) => None,
            Some(Vram::Most(size)) => Some(size.0),
        };
        let kept = files.fit(limit, settings, batch)?;
        Ok((kept > 0).then(|| {
            format!(
                "{kept} of {} main blocks stay in host memory ({}), and every pass copies them to the GPU",
                files.spec().main_blocks(),
                format_bytes(files.host_bytes())
            )
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_as_people_speak_of_it() {
        for (text, expected) in [
            ("auto", Vram::Auto),
            ("4", Vram::Most(ByteSize(4_000_000_000))),
            ("7.5", Vram::Most(ByteSize(7_500_000_000))),
            ("6GiB", Vram::Most(ByteSize(6 << 30))),
        ] {
            assert_eq!(text.parse(), Ok(expected));
        }
        for bad in ["", "-1", "4XB", "lots"] {
            assert!(bad.parse::<Vram>().is_err(), "{bad}");
        }
    }
}
