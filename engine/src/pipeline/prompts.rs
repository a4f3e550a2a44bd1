//! From a prompt to the features that the transformer takes: tokenizer and text encoder as one.

use sha2::{Digest, Sha256};

use super::blame::{ensure_finite_features, of_file};
use crate::checkpoint::{Checkpoint, ModelPaths, open_text_encoder};
use crate::device::{Device, MemoryTag};
use crate::error::{Error, Result};
use crate::files;
use crate::layers::{NamedParameter, metas};
use crate::limits::Budget;
use crate::model::config::TextConfig;
use crate::model::text::{Readout, TextEncoder};
use crate::model::{DeviceLimits, Precision};
use crate::tensor::Tensor;
use crate::text::PromptTokenizer;

/// A text encoder's files, opened and checked; its weights are not loaded.
#[derive(Debug)]
pub struct PromptFiles<'a> {
    paths: &'a ModelPaths,
    config: TextConfig,
    readout: Readout,
    checkpoint: Checkpoint,
    /// How the weights of the blocks are kept.
    weights: Precision,
}

/// What encoding a prompt takes beside the weights: activations of 512 tokens.
const ENCODING_BYTES: f64 = 100e6;

/// A tokenizer, and a text encoder on its device.
pub struct PromptEncoder {
    tokenizer: PromptTokenizer,
    encoder: TextEncoder,
    readout: Readout,
    /// Its weights' files.
    checkpoint: Checkpoint,
}

/// A prompt's features.
pub struct Encoded {
    /// `[1, tokens, width]` in the device's compute type.
    pub features: Tensor,
    /// Tokens at the prompt's end that the tokenizer's limit cut off.
    pub dropped_tokens: usize,
}

impl<'a> PromptFiles<'a> {
    /// Finds the text encoder and tokenizer of a model whose transformer takes features of the given width, which are read so.
    ///
    /// # Errors
    /// Saying how to name a part that is missing, or what is damaged, does not fit or cannot run on the device.
    pub fn open(paths: &'a ModelPaths, device: &Device, width: usize, readout: Readout) -> Result<Self> {
        let folder = paths.text_encoder()?;
        paths.tokenizer()?;
        let (config, checkpoint) = open_text_encoder(folder)?;
        let made = config.dim.saturating_mul(readout.count());
        if made != width {
            return Err(Error::file(
                folder,
                format!("makes features of width {made}, the transformer takes {width}"),
            ));
        }
        readout
            .layers(config.layers)
            .map_err(|error| Error::file(folder, error.to_string()))?;
        config.ensure_runs_on(device)?;
        Ok(PromptFiles {
            paths,
            config,
            readout,
            checkpoint,
            weights: Precision::default(),
        })
    }

    /// The same, with the weights of the encoder's blocks kept so.
    pub(super) fn kept_in(mut self, weights: Precision) -> Self {
        self.weights = weights;
        self
    }

    /// The encoder's layers that features come out of.
    pub fn layers(&self) -> usize {
        self.readout.layers(self.config.layers).unwrap_or(0)
    }

    /// Keeps as many of the encoder's layers in host memory as lets the rest, and what encoding takes, fit into `limit` bytes of the
    /// device; how many.
    ///
    /// # Errors
    /// When it does not fit however many stay there.
    pub(super) fn fit(&mut self, limit: u64, device: &Device) -> Result<usize> {
        let metas = text_metas(&self.config, &self.readout)?;
        let what = "the text encoder";
        let layers = self.layers();
        self.weights.fit(what, &metas, layers, device, ENCODING_BYTES, limit)
    }

    /// Brings the encoder onto the device.
    ///
    /// # Errors
    /// When a file is damaged, or the device has no room.
    pub fn load(&self, device: &Device) -> Result<PromptEncoder> {
        let tokenizer = PromptTokenizer::open(self.paths.tokenizer()?)?;
        let _tag = MemoryTag::Weights.scope();
        let params = self
            .weights
            .over_blocks(&self.checkpoint, &text_metas(&self.config, &self.readout)?, device)?;
        let encoder = TextEncoder::load_read(&params, device, &self.config, &self.readout);
        Ok(PromptEncoder {
            tokenizer,
            encoder: encoder.map_err(|error| of_file(&self.checkpoint, error))?,
            readout: self.readout.clone(),
            checkpoint: self.checkpoint.clone(),
        })
    }

    /// A SHA-256 that two encoders share only if they give the same features on devices of one kind: of their sizes, the
    /// tokenizer's files and [`Checkpoint::identity`]. Copies of one encoder share it.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn identity(&self, device: &Device) -> Result<Vec<u8>> {
        let mut hash = Sha256::new();
        let mut add = |part: &[u8]| {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        };
        add(format!("{:?} {}", self.config, device.compute_dtype()).as_bytes());
        if self.weights != Precision::default() {
            add(format!("{:?}", self.weights).as_bytes());
        }
        if self.readout != Readout::default() {
            add(format!("{:?}", self.readout).as_bytes());
        }
        let tokenizer = self.paths.tokenizer()?;
        for name in PromptTokenizer::FILES {
            add(&files::read_if_there(&tokenizer.join(name), Budget::TOKENIZER)?.unwrap_or_default());
        }
        add(&self.checkpoint.identity()?);
        Ok(hash.finalize().to_vec())
    }
}

/// The parameters of an encoder.
fn text_metas(config: &TextConfig, readout: &Readout) -> Result<Vec<NamedParameter>> {
    let described = TextEncoder::describe_read(config, "", readout)?;
    Ok(metas(&described).into_iter().cloned().collect())
}

impl PromptEncoder {
    /// The features of a prompt.
    ///
    /// # Errors
    /// When the tokenizer or its template refuses it, the device has no room, or a feature is not finite.
    pub fn encode(&self, prompt: &str) -> Result<Encoded> {
        let mut tokens = match self.readout.thoughtless {
            true => self.tokenizer.encode_thoughtless(prompt)?,
            false => self.tokenizer.encode(prompt)?,
        };
        let real = tokens.ids.len();
        if let Some(padded) = self.readout.padded.filter(|padded| *padded > real) {
            tokens.ids.resize(padded, self.tokenizer.pad_id()?);
        }
        let features = self.encoder.encode_padded(&tokens.ids, real)?;
        ensure_finite_features(&features, &self.checkpoint)?;
        Ok(Encoded {
            features,
            dropped_tokens: tokens.dropped,
        })
    }
}
