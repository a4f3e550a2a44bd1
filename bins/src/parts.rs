//! The flags that name parts of a model.

use std::path::PathBuf;

use clap::Args;
use l2p_engine::checkpoint::PathOverrides;

/// Where the parts are that a model does not bring along.
#[derive(Args, Clone, Debug)]
pub struct PartFlags {
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
}

impl PartFlags {
    /// The parts that were named.
    pub fn overrides(&self) -> PathOverrides {
        PathOverrides {
            base: self.base.clone(),
            text_encoder: self.text_encoder.clone(),
            tokenizer: self.tokenizer.clone(),
            vae: self.vae.clone(),
        }
    }
}
