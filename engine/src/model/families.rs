//! The families there are, and which one a checkpoint is of: its tensors' names decide, and its `config.json` must agree.

use std::path::Path;
use std::sync::Arc;

use super::config::{Described, read_json};
use super::family::{Family, TransformerConfig};
use super::flux2::Flux2Family;
use super::spec::Spec;
use super::zimage::ZImageFamily;
use crate::error::{Error, Result};
use crate::layers::ParamSource;
use crate::printable::shown_name;

/// All families; the first is taken where names tell nothing.
const FAMILIES: &[&dyn Family] = &[
    &ZImageFamily,
    &Flux2Family,
    #[cfg(test)]
    &super::plain::PlainFamily,
];

/// The families' names, for messages.
pub fn known() -> String {
    let names: Vec<&str> = FAMILIES.iter().map(|family| family.name()).collect();
    names.join(" or ")
}

/// The family that most of these names are of.
pub fn family_of<'a>(names: impl IntoIterator<Item = &'a str>) -> &'static dyn Family {
    let mut counts = vec![0_usize; FAMILIES.len()];
    for name in names {
        for (count, family) in counts.iter_mut().zip(FAMILIES) {
            *count += usize::from(family.owns(name));
        }
    }
    let most = counts.iter().copied().max().unwrap_or(0);
    let found = counts.iter().position(|count| *count == most).unwrap_or(0);
    FAMILIES[found]
}

/// What stands before that part of a name which can only be a tensor's of some family.
pub fn before_telling_name(name: &str) -> Option<&str> {
    let starts = name.match_indices('.').map(|(at, _)| at + 1);
    let mut splits = starts.map(|at| name.split_at(at));
    let telling = |rest: &str| FAMILIES.iter().any(|family| family.is_telling(rest));
    splits.find(|(_, rest)| telling(rest)).map(|(before, _)| before)
}

/// What a model is, of whichever family: from its tensors, their canonical names, and its `config.json` if there is one.
///
/// # Errors
/// As [`Family::read`], and when the file describes a model of another family.
pub fn read_spec<'a>(
    params: &dyn ParamSource,
    names: impl IntoIterator<Item = &'a str>,
    file: Option<&TransformerConfig>,
) -> Result<Arc<dyn Spec>> {
    let family = family_of(names);
    if let Some(file) = file {
        file.ensure_class(&[family])?;
    }
    family.read(params, file)
}

impl TransformerConfig {
    /// Whether the file describes a transformer of a known family, and not another part of a model.
    pub fn describes(path: &Path) -> bool {
        let described = read_json::<Described>(path).ok();
        let class = described.and_then(|described| described.class_name);
        class.is_some_and(|class| FAMILIES.iter().any(|family| family.class() == class))
    }

    /// Reads the file.
    ///
    /// # Errors
    /// When it cannot be read, or describes a transformer of no known family.
    pub fn read(path: &Path) -> Result<Self> {
        let described: Described = read_json(path)?;
        let file = TransformerConfig {
            path: path.into(),
            class: described.class_name.clone(),
            trunk_only: false,
        };
        let family = file.ensure_class(FAMILIES)?;
        described.ensure_plain(path)?;
        family.ensure_config(path)?;
        Ok(file)
    }

    /// The one of these families that the file describes; the first where it names no class.
    fn ensure_class(&self, families: &[&'static dyn Family]) -> Result<&'static dyn Family> {
        let is_described = |family: &&&dyn Family| self.class.as_deref().is_none_or(|class| class == family.class());
        families.iter().find(is_described).copied().ok_or_else(|| {
            let known: Vec<&str> = families.iter().map(|family| family.class()).collect();
            let class = shown_name(self.class.as_deref().unwrap_or_default()).to_string();
            Error::file(
                &self.path,
                format!("describes a {class}, expected a {}", known.join(" or ")),
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn most_names_decide() {
        let of = |names: &[&str]| family_of(names.iter().copied()).name();
        assert_eq!(of(&["layers.0.ffn_norm1.weight", "x_pad_token"]), "Z-Image");
        assert_eq!(
            of(&["blocks.0.attn.qkv.weight", "pos_embed", "x_embedder.bias"]),
            "plain"
        );
        assert_eq!(of(&[]), "Z-Image");
        // Another model's names do not count, however many.
        assert_eq!(of(&["layers.0.self_attn.q_proj.weight", "head.proj.bias"]), "plain");
    }

    #[test]
    fn unknown_wrappers_are_told_from_names() {
        for (name, before) in [
            ("mine.ema.layers.0.attention.qkv.weight", Some("mine.ema.")),
            ("text.layers.0.self_attn.q_proj.weight", None),
        ] {
            assert_eq!(before_telling_name(name), before);
        }
    }
}
