//! Families of models: what is to be known of one before a model of it is described.
//!
//! A family says which names its tensors have in files, and reads a [`Spec`] off them; [`super::families`] lists them.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::config::ModelKind;
use super::detailer::DetailerLayout;
use super::spec::Spec;
use crate::error::Result;
use crate::layers::{NamedParameter, ParamSource};

/// What a tensor's name without wrappers stands for.
#[derive(Debug, PartialEq, Eq)]
pub enum Meaning {
    /// A tensor with this canonical name, the same or of the packed layout.
    One {
        /// The canonical name.
        canonical: String,
        /// Whether it is the packed layout's.
        packed: bool,
    },
    /// Equal groups of rows, which are tensors with these canonical names, from the first row on.
    Stack(Vec<String>),
    /// The tensor with this canonical name, whose two halves of rows stand in the other order.
    Swapped(String),
    /// Not part of such a model.
    Foreign,
}

/// The input and output side as the tensors of a whole model, or of a part of one, tell them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ends {
    /// Latent or pixel.
    pub kind: Option<ModelKind>,
    /// Side of a patch.
    pub patch: Option<usize>,
    /// A pixel model's head, where its widths make sense.
    pub head: Option<DetailerLayout>,
}

/// A family; see the module's head comment. Names are without what programs put before them.
pub trait Family: fmt::Debug + Sync {
    /// What people call it.
    fn name(&self) -> &'static str;

    /// The class that a transformer's `config.json` names.
    fn class(&self) -> &'static str;

    /// Whether a tensor of this name, of whatever layout, is part of such a model.
    fn owns(&self, name: &str) -> bool;

    /// Whether the name is so telling that what stands before it can only be a wrapper.
    fn is_telling(&self, name: &str) -> bool {
        self.owns(name)
    }

    /// What a name stands for; `patch` is the patch that [`Family::packed_patch`] found.
    fn meaning(&self, name: &str, _patch: Option<usize>) -> Meaning {
        match self.owns(name) {
            true => Meaning::One {
                canonical: name.into(),
                packed: false,
            },
            false => Meaning::Foreign,
        }
    }

    /// The packed layout's name for a canonical one; the stack's for each of its tensors.
    fn packed(&self, canonical: &str) -> String {
        canonical.into()
    }

    /// The side of a patch, where the packed layout's names leave it out and this tensor tells it.
    fn packed_patch(&self, _name: &str, _shape: &[usize]) -> Option<usize> {
        None
    }

    /// What the names of the input side's and of the output side's parts begin with, the usual ones first. Patch sizes and kinds of
    /// models differ in these alone.
    fn ends(&self) -> [&'static [&'static str]; 2];

    /// What the tensors tell of input and output.
    fn survey(&self, params: &dyn ParamSource) -> Ends;

    /// Every parameter of the model that the tensors are a part of, as far as they tell; what depends on a size that they do not tell has
    /// its name alone right.
    fn outline(&self, params: &dyn ParamSource) -> Vec<NamedParameter>;

    /// Whether a tensor of `base` is left behind when `own` tensors are laid over it: it belongs to an input or output that the result
    /// does not have.
    fn left_behind(&self, _own: &dyn ParamSource, _base: &dyn ParamSource) -> Box<dyn Fn(&str) -> bool> {
        Box::new(|_| false)
    }

    /// Refuses a `config.json` that cannot be read or describes what the engine does not do.
    ///
    /// # Errors
    /// Naming the file and the entry.
    fn ensure_config(&self, path: &Path) -> Result<()>;

    /// Reads the sizes off the tensors and the settings from `file`, and compares both.
    ///
    /// # Errors
    /// When a tensor that tells a size is missing, sizes contradict each other, or the file contradicts them.
    fn read(&self, params: &dyn ParamSource, file: Option<&TransformerConfig>) -> Result<Arc<dyn Spec>>;
}

/// A transformer's `config.json`: settings, and sizes to be compared with the tensors, for its family to read.
#[derive(Clone, Debug)]
pub struct TransformerConfig {
    pub(super) path: PathBuf,
    pub(super) class: Option<String>,
    pub(super) trunk_only: bool,
}

impl TransformerConfig {
    /// The same without what a pixel model does not share with the source model that it was made from.
    pub fn trunk_only(mut self) -> Self {
        self.trunk_only = true;
        self
    }

    /// Whether it tells nothing of input and output, see [`TransformerConfig::trunk_only`].
    pub fn is_trunk_only(&self) -> bool {
        self.trunk_only
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}
