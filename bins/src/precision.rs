//! The flags that say how weights are kept on the device.

use clap::Args;
use l2p_engine::checkpoint::ModelPaths;
use l2p_engine::model::Precision;
use l2p_engine::pipeline::ModelFiles;
use l2p_engine::{Device, Error, Result};

/// How the weights of a model's blocks are kept.
#[derive(Args, Clone, Debug)]
pub struct PrecisionFlags {
    /// How the weights of the transformer's main blocks are kept: bf16 (the compute type), int8 (half the memory, and on Hopper
    /// products at twice the rate) or fp8 (the same, less exact); what modulates blocks, embedders, refiners, input and output stay as
    /// they are
    #[arg(long, value_name = "TYPE", default_value_t = Precision::default())]
    pub trunk: Precision,
    /// Weights of main blocks that stay in the compute type: patterns of names, `*` for any characters, separated by commas
    #[arg(long, value_name = "PATTERNS", value_delimiter = ',')]
    pub trunk_keep: Vec<String>,
    /// How the weights of the text encoder's blocks are kept: bf16, int8 or fp8
    #[arg(long, value_name = "TYPE", default_value_t = Precision::default())]
    pub text_weights: Precision,
}

impl PrecisionFlags {
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
        if self.trunk.coding.is_none() && !self.trunk_keep.is_empty() {
            return Err(Error::invalid(
                "--trunk-keep names what stays in the compute type, but --trunk bf16 keeps all of it there: give --trunk int8 or fp8",
            ));
        }
        let mut trunk = self.trunk.clone();
        trunk.keep.clone_from(&self.trunk_keep);
        Ok([trunk, self.text_weights.clone()])
    }
}
