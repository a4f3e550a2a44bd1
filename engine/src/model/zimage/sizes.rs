//! What a model of the family is: its sizes, from which its parameters follow.

use super::{HEAD_PREFIX, Parts};
use crate::error::Result;
use crate::layers::{Described, ParamSource};
use crate::model::config::ModelKind;
use crate::model::detailer::DetailerLayout;
use crate::model::zimage::DitConfig;

/// A Z-Image transformer, latent or pixel.
#[derive(Clone, Debug, PartialEq)]
pub struct ZImage {
    /// Its sizes and settings.
    pub config: DitConfig,
    /// A pixel model's head.
    pub head: Option<DetailerLayout>,
}

impl ZImage {
    /// A model of these sizes, its head read off the parameters.
    ///
    /// # Errors
    /// When a pixel model's head is missing or makes no sense.
    pub fn read(params: &dyn ParamSource, config: &DitConfig) -> Result<Self> {
        let head = match config.kind {
            ModelKind::Latent => None,
            ModelKind::Pixel => Some(DetailerLayout::read(params, HEAD_PREFIX)?),
        };
        Ok(ZImage {
            config: config.clone(),
            head,
        })
    }

    /// Its parameters.
    ///
    /// # Errors
    /// When a pixel model has no head.
    pub fn describe(&self) -> Result<Parts<Described>> {
        Parts::describe(&self.config, self.head.as_ref())
    }
}
