//! What programs put before tensors' names, and the names of text encoders and VAEs; a transformer's are its family's
//! ([`crate::model::family`]).
//!
//! Programs save a model inside of others, or wrapped; [`COMMON`], [`TRANSFORMER`], [`TEXT_ENCODER`], [`VAE`] and [`INNER`] are the
//! only list of what they put before names, and it is left out in any combination.

pub(super) mod vae;

use std::borrow::Cow;
use std::str::FromStr;

use crate::printable::shown_name;

/// Wrappers of any part.
const COMMON: [&str; 4] = ["model.", "module.", "base_model.", "state_dict."];

/// Wrappers that may stand before the name of any module.
const INNER: [&str; 3] = ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."];

/// Wrappers of a transformer.
const TRANSFORMER: [&str; 6] = ["diffusion_model.", "pipe.", "dit.", "transformer.", "denoiser.", "net."];

/// Wrappers of a text encoder.
const TEXT_ENCODER: [&str; 4] = [
    "text_encoder.",
    "text_encoders.qwen3_4b.",
    "transformer.",
    "language_model.",
];

/// Wrappers of a VAE.
const VAE: [&str; 3] = ["vae.", "first_stage_model.", "autoencoder."];

/// Splits a name as found into the wrappers before it, possibly none, and the rest.
fn unwrapped<'a>(name: &'a str, own: &[&str]) -> (&'a str, &'a str) {
    let mut bare = name;
    let known = || own.iter().chain(&COMMON).chain(&INNER);
    while let Some(rest) = known().find_map(|wrapper| bare.strip_prefix(wrapper)) {
        bare = rest;
    }
    name.split_at(name.len() - bare.len())
}

/// Splits the name of a transformer's tensor into the wrappers before it, possibly none, and the rest.
pub(super) fn split_prefix(name: &str) -> (&str, &str) {
    unwrapped(name, &TRANSFORMER)
}

/// The name without wrappers of modules within it.
pub(super) fn without_inner(bare: &str) -> Cow<'_, str> {
    let mut name = Cow::Borrowed(bare);
    for wrapper in INNER {
        if name.contains(wrapper) {
            name = Cow::Owned(name.replace(wrapper, ""));
        }
    }
    name
}

/// What is written before every name of a transformer, so that this program and others find it again: nothing, or wrappers of
/// the list that is read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prefix(String);

impl Prefix {
    /// The prefix, which ends with a dot unless there is none.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Prefix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let dotted = match text {
            "" => String::new(),
            text => format!("{}.", text.strip_suffix('.').unwrap_or(text)),
        };
        match split_prefix(&dotted).1 {
            "" => Ok(Prefix(dotted)),
            unknown => Err(format!(
                "`{}` is no prefix under which a transformer is found again; use words of {}, such as model.diffusion_model.",
                shown_name(unknown),
                known_prefixes()
            )),
        }
    }
}

/// The wrappers of a transformer, for messages.
pub(super) fn known_prefixes() -> String {
    let all = TRANSFORMER.iter().chain(&COMMON).chain(&INNER);
    all.copied().collect::<Vec<_>>().join(" ")
}

/// The canonical name of a text encoder's tensor.
pub(super) fn text_encoder(name: &str) -> String {
    without_inner(unwrapped(name, &TEXT_ENCODER).1).into_owned()
}

/// The name of a VAE's tensor without wrappers.
pub(super) fn vae_bare(name: &str) -> Cow<'_, str> {
    without_inner(unwrapped(name, &VAE).1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_stripped_in_any_combination() {
        for prefix in [
            "",
            "diffusion_model.",
            "model.diffusion_model.",
            "pipe.dit.",
            "pipe.dit.model.diffusion_model.",
            "base_model.model.",
            "module._orig_mod.",
            "transformer.",
            "model.",
        ] {
            let name = format!("{prefix}layers.0.ffn_norm1.weight");
            assert_eq!(split_prefix(&name), (prefix, "layers.0.ffn_norm1.weight"));
        }
    }

    #[test]
    fn wrappers_within_names_are_left_out() {
        let found = "layers.0._checkpoint_wrapped_module.attention._orig_mod.to_q.weight";
        assert_eq!(without_inner(found), "layers.0.attention.to_q.weight");
    }

    #[test]
    fn prefixes_to_be_written_are_those_that_are_read() {
        for (text, prefix) in [
            ("", ""),
            ("pipe.dit", "pipe.dit."),
            ("pipe.dit.", "pipe.dit."),
            ("model.diffusion_model.", "model.diffusion_model."),
            ("transformer", "transformer."),
        ] {
            assert_eq!(text.parse::<Prefix>().unwrap().as_str(), prefix);
        }
        for text in ["mine.", "pipe.dot", ".", "pipe..dit", "layers.", "pipe.dit\u{1b}"] {
            let message = text.parse::<Prefix>().unwrap_err();
            assert!(
                message.contains("is no prefix") && !message.contains('\u{1b}'),
                "{message}"
            );
        }
    }

    #[test]
    fn names_of_text_encoders_have_no_wrappers() {
        assert_eq!(
            text_encoder("model.language_model.layers.0.mlp.up_proj.weight"),
            "layers.0.mlp.up_proj.weight"
        );
    }
}
