//! Which tensors a training run changes, and what is computed twice to save memory: data, not code.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

use crate::error::{Error, Result};
use crate::layers::{Group, NamedParameter};
use crate::patterns;

/// Main blocks that the published recipe trains at either end.
pub const DEFAULT_ENDS: usize = 5;

/// A freeze policy: says of every parameter whether it is trained. In a latent model the final layer
/// stands in the head's place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// Input projection, the first and the last `ends` main blocks, head (the paper's recipe).
    Paper {
        /// Main blocks at either end.
        ends: usize,
    },
    /// That, the refiners, the embedders and the pad tokens (the released code).
    Released {
        /// Main blocks at either end.
        ends: usize,
    },
    /// Everything.
    Full,
    /// The head alone.
    HeadOnly,
    /// Every tensor whose name fits one of these patterns: `*` stands for any characters, `?` for any one.
    Patterns(Vec<String>),
}

impl Policy {
    /// Whether the policy trains a parameter.
    ///
    /// # Errors
    /// When patterns fit some of the tensors that it is made of and others not.
    pub fn trains(&self, meta: &NamedParameter) -> Result<bool> {
        let at_an_end = |ends: usize| match meta.group {
            Group::Block { index, of } => index < ends || index + ends >= of,
            _ => false,
        };
        let at_the_border = matches!(meta.group, Group::Input | Group::Output);
        let conditions = matches!(meta.group, Group::Embedder | Group::Refiner);
        match self {
            Policy::Paper { ends } => Ok(at_the_border || at_an_end(*ends)),
            Policy::Released { ends } => Ok(at_the_border || conditions || at_an_end(*ends)),
            Policy::Full => Ok(!matches!(meta.group, Group::Layer { .. } | Group::Other)),
            Policy::HeadOnly => Ok(meta.group == Group::Output),
            Policy::Patterns(patterns) => {
                meta.trained(&|name| patterns.iter().any(|pattern| patterns::fits(pattern, name)))
            }
        }
    }

    /// The patterns that fit none of `names`.
    pub fn unused_patterns<'a>(&'a self, names: &[&str]) -> Vec<&'a str> {
        let Policy::Patterns(patterns) = self else {
            return Vec::new();
        };
        patterns::unused(patterns, names)
    }
}

impl FromStr for Policy {
    type Err = Error;

    /// `paper`, `released` (each with `:N` for the number of end blocks), `full`, `head-only`, or patterns separated by commas.
    fn from_str(text: &str) -> Result<Self> {
        let (name, count) = text.split_once(':').unwrap_or((text, ""));
        let ends = || match (count, text.contains(':')) {
            (_, false) => Ok(DEFAULT_ENDS),
            (count, true) => count
                .parse()
                .map_err(|_| Error::invalid(format!("freeze policy `{text}`: `{count}` is no number of main blocks"))),
        };
        match (name, text) {
            ("paper", _) => Ok(Policy::Paper { ends: ends()? }),
            ("released", _) => Ok(Policy::Released { ends: ends()? }),
            (_, "full") => Ok(Policy::Full),
            (_, "head-only") => Ok(Policy::HeadOnly),
            _ if text.contains(['.', '*', '_']) => Ok(Policy::Patterns(patterns::split(text))),
            _ => Err(Error::invalid(format!(
                "`{text}` is no freeze policy; use paper, released (paper:N, released:N for N end blocks), full, head-only, \
                 or patterns of tensor names such as layers.0.*,local_decoder.*"
            ))),
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Policy::Paper { ends: DEFAULT_ENDS } => f.write_str("paper"),
            Policy::Paper { ends } => write!(f, "paper:{ends}"),
            Policy::Released { ends: DEFAULT_ENDS } => f.write_str("released"),
            Policy::Released { ends } => write!(f, "released:{ends}"),
            Policy::Full => f.write_str("full"),
            Policy::HeadOnly => f.write_str("head-only"),
            Policy::Patterns(patterns) => f.write_str(&patterns.join(",")),
        }
    }
}

/// Which blocks keep only their input during the forward pass and compute the rest again in the backward pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// No block.
    #[default]
    None,
    /// Blocks without a trained tensor.
    Frozen,
    /// Every block.
    All,
}

impl Recompute {
    /// All choices, from the fastest to the smallest.
    pub const ALL: [Recompute; 3] = [Recompute::None, Recompute::Frozen, Recompute::All];

    /// Whether a block is computed twice.
    pub fn applies_to(self, trained: bool) -> bool {
        match self {
            Recompute::None => false,
            Recompute::Frozen => !trained,
            Recompute::All => true,
        }
    }
}

impl FromStr for Recompute {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let found = Recompute::ALL.into_iter().find(|choice| choice.to_string() == text);
        found.ok_or_else(|| {
            Error::invalid(format!(
                "`{text}` says nothing about recomputing; use none, frozen or all"
            ))
        })
    }
}

impl fmt::Display for Recompute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Recompute::None => "none",
            Recompute::Frozen => "frozen",
            Recompute::All => "all",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trained(policy: &str, name: &str, group: Group) -> bool {
        let meta = NamedParameter::one(group, name, &[8]);
        policy.parse::<Policy>().unwrap().trains(&meta).unwrap()
    }

    #[test]
    fn policies_choose_by_group() {
        let block = |index| Group::Block { index, of: 30 };
        for (group, paper, released, head) in [
            (Group::Input, true, true, false),
            (Group::Output, true, true, true),
            (block(4), true, true, false),
            (block(5), false, false, false),
            (block(24), false, false, false),
            (block(25), true, true, false),
            (Group::Refiner, false, true, false),
            (Group::Embedder, false, true, false),
        ] {
            let found = ["paper", "released", "head-only"].map(|policy| trained(policy, "x.weight", group));
            assert_eq!(found, [paper, released, head], "{group:?}");
            assert!(trained("full", "x.weight", group));
        }
        assert!(!trained("paper:1", "x.weight", block(1)));
        assert!(trained("released:0", "x.weight", Group::Embedder));
        assert!(!trained("released:0", "x.weight", block(0)));
    }

    #[test]
    fn patterns_have_stars_and_question_marks() {
        assert!(trained(
            "layers.?.*norm*, cap_*",
            "layers.3.ffn_norm1.weight",
            Group::Other
        ));
        assert!(trained("layers.?.*norm*, cap_*", "cap_pad_token", Group::Other));
        assert!(!trained(
            "layers.?.*norm*, cap_*",
            "layers.13.ffn_norm1.weight",
            Group::Other
        ));
        assert!(!trained(
            "layers.?.*norm*, cap_*",
            "layers.3.feed_forward.w1.weight",
            Group::Other
        ));
        let policy: Policy = "layers.*,lazers.*".parse().unwrap();
        assert_eq!(policy.unused_patterns(&["layers.0.x"]), ["lazers.*"]);
    }

    #[test]
    fn names_of_policies_are_read_and_shown() {
        for text in ["paper", "released:2", "full", "head-only", "layers.*,x_pad_token"] {
            assert_eq!(text.parse::<Policy>().unwrap().to_string(), text);
        }
        for text in ["papers", "paper:x", "full:2", ""] {
            assert!(text.parse::<Policy>().is_err(), "{text}");
        }
        assert_eq!("frozen".parse::<Recompute>().unwrap(), Recompute::Frozen);
        assert!("some".parse::<Recompute>().is_err());
    }
}
