//! Which weights of a model are kept in eight bits: data, not code.
//!
//! Kept so are the weights of the linear layers of main blocks (of a text encoder those of all blocks), and neither what modulates them
//! nor embedders, refiners, input projection and output; patterns keep more in the compute type.

use std::fmt;
use std::str::FromStr;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::layers::{Group, NamedParameter, ParamSource, fits};
use crate::ops::quantise::Coding;
use crate::tensor::Tensor;

/// How the weights of a model's blocks are kept; see the module's head comment. The default is the compute type.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Precision {
    /// `None` for the compute type.
    pub coding: Option<Coding>,
    /// Patterns of names (`*` stands for any characters, `?` for any one) of weights that stay in the compute type.
    pub keep: Vec<String>,
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.coding {
            None => f.write_str("bf16"),
            Some(coding) => coding.fmt(f),
        }
    }
}

impl FromStr for Precision {
    type Err = Error;

    /// `bf16`, `int8` or `fp8`.
    fn from_str(text: &str) -> Result<Self> {
        let coding = match text {
            "bf16" => None,
            other => Some(other.parse().map_err(|_| {
                Error::invalid(format!(
                    "`{text}` is no precision of weights: use int8, fp8 or bf16 (the compute type)"
                ))
            })?),
        };
        Ok(Precision {
            coding,
            keep: Vec::new(),
        })
    }
}

impl Precision {
    /// In which coding a parameter is kept, a linear layer's weight or not.
    pub fn of(&self, meta: &NamedParameter) -> Option<Coding> {
        let in_blocks = matches!(meta.group, Group::Block { .. } | Group::Other);
        let matrix = !meta.flat && meta.shape().len() == 2 && meta.parts.iter().all(|part| part.shape.len() == 2);
        let kept = || {
            meta.parts
                .iter()
                .any(|part| self.keep.iter().any(|pattern| fits(pattern, &part.name)))
        };
        self.coding.filter(|_| in_blocks && matrix && !meta.precise && !kept())
    }

    /// Bytes of a parameter on a device whose compute type has elements of so many bytes.
    pub fn bytes(&self, meta: &NamedParameter, element: usize) -> u64 {
        let elements = meta.elements() as u64;
        match self.of(meta) {
            None => elements * element as u64,
            Some(_) => elements + 4 * meta.shape()[0] as u64,
        }
    }

    /// Refuses patterns that fit none of these parameters.
    ///
    /// # Errors
    /// Naming the first such pattern.
    pub fn ensure_used(&self, metas: &[NamedParameter]) -> Result<()> {
        let parts = || metas.iter().flat_map(|meta| &meta.parts);
        match self
            .keep
            .iter()
            .find(|pattern| !parts().any(|part| fits(pattern, &part.name)))
        {
            None => Ok(()),
            Some(pattern) => Err(Error::invalid(format!(
                "no tensor of the model fits the pattern `{pattern}` of those to keep in the compute type"
            ))),
        }
    }

    /// `params` with this precision.
    pub fn over<'a>(&'a self, params: &'a dyn ParamSource) -> impl ParamSource + 'a {
        Over {
            precision: self,
            params,
        }
    }
}

struct Over<'a> {
    precision: &'a Precision,
    params: &'a dyn ParamSource,
}

impl ParamSource for Over<'_> {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.params.shape(name)
    }

    fn load(&self, device: &Device, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.params.load(device, name, shape)
    }

    fn load_stacked(&self, device: &Device, names: &[&str], shape: &[usize]) -> Result<Tensor> {
        self.params.load_stacked(device, names, shape)
    }

    fn load_conv(&self, device: &Device, name: &str) -> Result<Tensor> {
        self.params.load_conv(device, name)
    }

    fn coding(&self, meta: &NamedParameter) -> Option<Coding> {
        self.precision.of(meta).or_else(|| self.params.coding(meta))
    }
}
