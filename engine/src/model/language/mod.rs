//! A text encoder as the language model that it is: a whole Qwen3 decoder, which continues texts.
//!
//! After all layers of [`super::text`] the stream is normalised once more and multiplied by the table of embeddings (or by a matrix of
//! its own, `lm_head`, where the file has one): the logits of the next token. [`Decoding`] keeps the keys and values of what was read
//! and takes a token of every text at a time. Source: "Qwen3 Technical Report" (2025).

mod decoding;
mod memory;

pub use decoding::{Decoding, Feed};
pub use memory::LanguageMemory;

use super::config::TextConfig;
use super::limits::DeviceLimits;
use super::text::{EMBEDDINGS, Layer};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::layers::{Bare, Described, Group, Loader, Norm, ParamSource, module};
use crate::tensor::Tensor;

module! {
    /// The model.
    pub struct LanguageModel<K> {
        /// `[vocabulary, dim]`
        embeddings: Bare<K>,
        layers: Vec<Layer<K>>,
        /// `[dim]`
        norm: Norm<K>,
        /// `[vocabulary, dim]`, where it is not the embeddings.
        head: Option<Bare<K>>,
        ;
        config: TextConfig,
    }
}

/// The normalisation behind the last layer, and the matrix of logits.
const NORM: &str = "norm.weight";
const HEAD: &str = "lm_head.weight";

impl LanguageModel<Described> {
    /// The parameters of a model of these sizes, named as in `Qwen3Model` after `prefix`; with `head`, one of its own.
    ///
    /// # Errors
    /// When there are no layers.
    pub fn describe(config: &TextConfig, prefix: &str, head: bool) -> Result<Self> {
        if config.layers == 0 {
            return Err(Error::invalid("a language model without layers has nothing to say"));
        }
        let table = [config.vocabulary, config.dim];
        let layer = |index| Layer::describe(config, &format!("{prefix}layers.{index}"), index);
        Ok(LanguageModel {
            embeddings: Bare::new(Group::Other, format!("{prefix}{EMBEDDINGS}"), &table),
            layers: (0..config.layers).map(layer).collect(),
            norm: Bare::norm(
                Group::Other,
                &format!("{prefix}{}", NORM.trim_end_matches(".weight")),
                config.dim,
            ),
            head: head.then(|| Bare::new(Group::Other, HEAD, &table)),
            config: config.clone(),
        })
    }
}

impl LanguageModel {
    /// Reads the parameters, named as in `Qwen3Model` or, with the prefix `model.`, as in the whole language model. `loaded` is told how
    /// many there are and how many are there; an error from it ends the loading.
    ///
    /// # Errors
    /// When the file holds a text encoder that was cut off behind the layers that it needs, a tensor is missing or has another shape,
    /// the device's kernels cannot take its sizes, or it has no room.
    pub fn load(
        params: &dyn ParamSource,
        device: &Device,
        config: &TextConfig,
        loaded: &mut dyn FnMut(usize, usize) -> Result<()>,
    ) -> Result<Self> {
        config.ensure_runs_on(device)?;
        let prefix = match params.shape(&format!("model.{EMBEDDINGS}")) {
            Some(_) => "model.",
            None => "",
        };
        if params.shape(&format!("{prefix}{NORM}")).is_none() {
            return Err(Error::invalid(format!(
                "the text encoder has no `{prefix}{NORM}`: it was cut off behind the layers that captions need and cannot write; name a \
                 source whose text encoder is a whole language model"
            )));
        }
        let described = LanguageModel::describe(config, prefix, params.shape(HEAD).is_some())?;
        Loader::load(&described, params, device, loaded)
    }

    /// Its sizes.
    pub fn config(&self) -> &TextConfig {
        &self.config
    }

    /// The device that it is on.
    pub fn device(&self) -> Device {
        self.embeddings.tensor().device()
    }

    /// The matrix of logits.
    fn logits_weight(&self) -> &Tensor {
        self.head.as_ref().unwrap_or(&self.embeddings).tensor()
    }

    /// Bytes that a step of one token reads of the weights: all but the table of embeddings, of which it reads a row per text, and the
    /// matrix of logits.
    pub fn step_bytes(&self) -> u64 {
        let every: usize = crate::layers::tensors(self).iter().map(|tensor| tensor.bytes()).sum();
        let looked_up = match &self.head {
            Some(_) => self.embeddings.tensor().bytes(),
            None => 0,
        };
        (every - looked_up) as u64
    }
}
