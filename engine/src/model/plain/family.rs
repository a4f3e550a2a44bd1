//! Names, and which sizes they tell.

use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;

use super::{CLASS, Plain, PlainConfig};
use crate::error::{Error, Result};
use crate::layers::{NamedParameter, ParamSource};
use crate::limits::Heads;
use crate::model::config::{ModelKind, read_json};
use crate::model::family::{Ends, Family, TransformerConfig};
use crate::model::spec::Spec;

/// How names begin.
const PARTS: [&str; 6] = [
    "patch_embed.",
    "pos_embed",
    "caption_embed.",
    "time_embed.",
    "blocks.",
    "head.",
];

/// The most blocks that are looked for.
const MOST_BLOCKS: usize = 512;

/// The entries of a `config.json` that are used.
#[derive(Default, Deserialize)]
struct Entries {
    heads: Option<Heads>,
}

/// See the module's head comment.
#[derive(Debug)]
pub struct PlainFamily;

impl PlainFamily {
    /// The sizes; `unknown` stands for those that no tensor tells.
    fn config(params: &dyn ParamSource, heads: usize, unknown: &dyn Fn(&str) -> Result<usize>) -> Result<PlainConfig> {
        let extent = |name: &str, index: usize| match params.shape(name).and_then(|shape| shape.get(index).copied()) {
            Some(extent) if extent > 0 => Ok(extent),
            _ => unknown(name),
        };
        let is_there = |index: &usize| params.shape(&format!("blocks.{index}.attn.qkv.weight")).is_some();
        let dim = extent("patch_embed.proj.weight", 0)?;
        let features = extent("patch_embed.proj.weight", 1)?;
        let patch = (features / 3).isqrt().max(1);
        Ok(PlainConfig {
            dim,
            heads,
            blocks: (0..MOST_BLOCKS).rev().find(is_there).map_or(0, |last| last + 1),
            ffn: extent("blocks.0.mlp.fc2.weight", 1)?,
            caption_width: extent("caption_embed.weight", 1)?,
            positions: extent("pos_embed", 1)?,
            patch,
            channels: features / (patch * patch),
            times: [
                extent("time_embed.0.weight", 1)?,
                extent("time_embed.0.weight", 0)?,
                extent("time_embed.2.weight", 0)?,
            ],
        })
    }
}

impl Family for PlainFamily {
    fn name(&self) -> &'static str {
        "plain"
    }

    fn is_telling(&self, name: &str) -> bool {
        name.starts_with("blocks.") && name.contains(".attn.")
    }

    fn class(&self) -> &'static str {
        CLASS
    }

    fn owns(&self, name: &str) -> bool {
        PARTS.iter().any(|part| name.starts_with(part))
    }

    fn ends(&self) -> [&'static [&'static str]; 2] {
        [&["patch_embed."], &["head."]]
    }

    fn survey(&self, params: &dyn ParamSource) -> Ends {
        let config = Self::config(params, 1, &|_| Ok(1)).ok();
        Ends {
            kind: Some(ModelKind::Pixel),
            patch: config.map(|config| config.patch),
            head: None,
        }
    }

    fn outline(&self, params: &dyn ParamSource) -> Vec<NamedParameter> {
        let config = Self::config(params, 1, &|_| Ok(1));
        config.map_or_else(|_| Vec::new(), |config| Plain(config).metas())
    }

    fn ensure_config(&self, path: &Path) -> Result<()> {
        read_json::<Entries>(path).map(|_| ())
    }

    fn read(&self, params: &dyn ParamSource, file: Option<&TransformerConfig>) -> Result<Arc<dyn Spec>> {
        let entries: Entries = file.map(|file| read_json(file.path())).transpose()?.unwrap_or_default();
        let missing = |name: &str| Err(Error::invalid(format!("tensor `{name}` is missing")));
        let config = Self::config(params, entries.heads.map_or(1, Heads::get), &missing)?;
        match config.dim.is_multiple_of(config.heads) && config.patch * config.patch * 3 == config.patch_features() {
            true => Ok(Arc::new(Plain(config))),
            false => Err(Error::invalid(format!("its sizes contradict each other: {config:?}"))),
        }
    }
}
