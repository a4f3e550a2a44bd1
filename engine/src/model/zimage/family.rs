//! What is to be known of the family before a model of it is described.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use super::config::{DitConfig, DitSurvey};
use super::config_file::{CLASS, ConfigFile};
use super::{HEAD_PREFIX, Parts, ZImage, names};
use crate::error::{Error, Result};
use crate::layers::{NamedParameter, ParamSource, metas};
use crate::model::config::ModelKind;
use crate::model::detailer::DetailerLayout;
use crate::model::family::{Ends, Family, Meaning, TransformerConfig};
use crate::model::spec::Spec;

/// What the names of the input projections of all patch sizes begin with.
pub(super) const INPUT: &str = "all_x_embedder.";

/// What the names of a latent model's final layers of all patch sizes begin with.
pub(super) const FINAL_LAYER: &str = "all_final_layer.";

/// What the names of a pixel model's head begin with.
const HEAD: &str = "local_decoder.";

/// Z-Image, and the pixel models made from it.
#[derive(Debug)]
pub struct ZImageFamily;

impl Family for ZImageFamily {
    fn name(&self) -> &'static str {
        "Z-Image"
    }

    fn class(&self) -> &'static str {
        CLASS
    }

    fn owns(&self, name: &str) -> bool {
        names::is_of_the_family(name)
    }

    fn is_telling(&self, name: &str) -> bool {
        names::is_of_the_family(name) && names::is_block_tensor(name)
    }

    fn meaning(&self, name: &str, patch: Option<usize>) -> Meaning {
        names::meaning(name, patch)
    }

    fn packed(&self, canonical: &str) -> String {
        names::packed(canonical)
    }

    fn packed_patch(&self, name: &str, shape: &[usize]) -> Option<usize> {
        names::packed_patch(name, shape)
    }

    fn ends(&self) -> [&'static [&'static str]; 2] {
        [&[INPUT], &[HEAD, FINAL_LAYER]]
    }

    fn survey(&self, params: &dyn ParamSource) -> Ends {
        let survey = DitSurvey::of(params);
        let head = DetailerLayout::seen(params, HEAD_PREFIX, survey.width.unwrap_or(0));
        Ends {
            kind: survey.kind,
            patch: survey.patch,
            head: head.filter(|head| head.check().is_ok()),
        }
    }

    fn outline(&self, params: &dyn ParamSource) -> Vec<NamedParameter> {
        let survey = DitSurvey::of(params);
        let blocks = |found: &BTreeSet<usize>| found.last().map_or(1, |last| last + 1);
        let refiners = [blocks(&survey.noise_refiners), blocks(&survey.context_refiners)];
        let described = DitConfig::surveyed(params, &survey, &|_, _| Ok(1)).and_then(|config| {
            let config = DitConfig {
                kind: ModelKind::Latent,
                layers: blocks(&survey.layers),
                ..config
            };
            Parts::describe_with(&config, None, refiners)
        });
        described.map_or_else(|_| Vec::new(), |parts| metas(&parts).into_iter().cloned().collect())
    }

    fn left_behind(&self, own: &dyn ParamSource, base: &dyn ParamSource) -> Box<dyn Fn(&str) -> bool> {
        let (mine, bases) = (DitSurvey::of(own), DitSurvey::of(base));
        let kind = match (mine.kind, bases.kind) {
            (Some(ModelKind::Pixel), _) | (None, Some(ModelKind::Pixel)) => ModelKind::Pixel,
            _ => ModelKind::Latent,
        };
        let patch = mine.patch.or(bases.patch.filter(|_| bases.kind == Some(kind)));
        let embedder = patch.map(|patch| format!("{INPUT}{patch}-1."));
        let has_head = DetailerLayout::seen(own, HEAD_PREFIX, 0).is_some();
        let brings_head = has_head && mine.patch.is_some_and(|mine| bases.patch != Some(mine));
        Box::new(move |name| {
            let is_own_embedder = |embedder: &String| name.starts_with(embedder.as_str());
            let other_embedder = name.starts_with(INPUT) && embedder.as_ref().is_some_and(|own| !is_own_embedder(own));
            let other_output = match kind {
                ModelKind::Pixel => name.starts_with(FINAL_LAYER),
                ModelKind::Latent => name.starts_with(HEAD),
            };
            other_embedder || other_output || (brings_head && name.starts_with(HEAD))
        })
    }

    fn ensure_config(&self, path: &Path) -> Result<()> {
        ConfigFile::read(path).map(|_| ())
    }

    fn read(&self, params: &dyn ParamSource, file: Option<&TransformerConfig>) -> Result<Arc<dyn Spec>> {
        let config = DitConfig::read(params, file)?;
        let head = match config.kind {
            ModelKind::Latent => None,
            ModelKind::Pixel => {
                let head = DetailerLayout::seen(params, HEAD_PREFIX, config.dim).ok_or_else(|| {
                    Error::invalid(format!(
                        "lacks the head's stages or its bottleneck: tensor `{HEAD_PREFIX}.bottleneck.0.weight` or \
                         `{HEAD_PREFIX}.enc1.0.weight` is missing"
                    ))
                })?;
                head.check()?;
                Some(head)
            }
        };
        Ok(Arc::new(ZImage { config, head }))
    }
}
