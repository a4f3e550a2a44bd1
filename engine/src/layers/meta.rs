//! What is known of a parameter without its values.

use crate::error::{Error, Result};

/// A tensor of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// Its canonical name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl Published {
    /// The number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Which part of a model a parameter belongs to: what freeze policies, estimates and reports go by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// The input projection, from patches to tokens.
    Input,
    /// What prepares conditions: embedders of time and captions, pad tokens.
    Embedder,
    /// A block that sees only image tokens or only captions, before the main blocks.
    Refiner,
    /// Main block `index` of `of`, counted through all kinds of main blocks.
    Block {
        /// From 0.
        index: usize,
        /// How many there are.
        of: usize,
    },
    /// What makes a velocity of the last block's tokens: Detailer Head or final layer.
    Output,
    /// A layer of a text encoder, which no policy trains.
    Layer {
        /// From 0.
        index: usize,
    },
    /// The rest of a text encoder, or an autoencoder.
    Other,
}

/// A parameter of the engine: a tensor of a checkpoint, or several stacked along dimension 0. The weights of a convolution, four
/// extents in a checkpoint, have their taps before their input channels here; see `ParamSource::load_conv`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedParameter {
    /// What it is made of, in order.
    pub parts: Vec<Published>,
    /// Where it belongs.
    pub group: Group,
    /// A vector in the engine, whatever its extents in the checkpoint: pad tokens are stored as `[1, dim]`.
    pub flat: bool,
    /// Stays in the compute type where others are kept in eight bits: what it makes is used by every token.
    pub precise: bool,
    /// What shares factors with it that cancel out.
    pub balance: Option<Balance>,
}

/// Two weights between which factors may be moved, for one's outputs are the other's inputs, with nothing but products between them:
/// the rows of SwiGLU's second half and the columns of the layer after it. See [`super::balance`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Balance {
    /// The rows of part `part` make the inputs of `of`.
    Rows {
        /// Which of its parts.
        part: usize,
        /// The weight that takes them.
        of: Box<NamedParameter>,
    },
    /// Its inputs are made by `of`.
    Columns {
        /// The weight that makes them.
        of: Box<NamedParameter>,
    },
}

impl NamedParameter {
    /// One tensor of a checkpoint.
    pub fn one(group: Group, name: impl Into<String>, shape: &[usize]) -> Self {
        Self::stacked(group, [(name.into(), shape)])
    }

    /// Several tensors of a checkpoint, equal in all extents but the first.
    pub fn stacked<'a>(group: Group, parts: impl IntoIterator<Item = (String, &'a [usize])>) -> Self {
        let parts = parts.into_iter().map(|(name, shape)| Published {
            name,
            shape: shape.to_vec(),
        });
        NamedParameter {
            parts: parts.collect(),
            group,
            flat: false,
            precise: false,
            balance: None,
        }
    }

    /// The canonical name of the first tensor that it is made of.
    pub fn name(&self) -> &str {
        self.parts.first().map_or("", |part| &part.name)
    }

    /// The shape in the engine: parts stacked, taps before channels.
    pub fn shape(&self) -> Vec<usize> {
        if self.flat {
            return vec![self.elements()];
        }
        match self.parts.first().map_or(&[][..], |part| &part.shape) {
            &[outputs, inputs, height, width] => vec![outputs, height * width * inputs],
            [_, rest @ ..] => {
                let rows = self.parts.iter().map(|part| part.shape[0]).sum();
                [&[rows], rest].concat()
            }
            [] => Vec::new(),
        }
    }

    /// The number of elements of all parts.
    pub fn elements(&self) -> usize {
        self.parts.iter().map(Published::elements).sum()
    }

    /// The same, where sizes may be such that it does not fit.
    pub fn elements_exact(&self) -> f64 {
        let extents = |part: &Published| part.shape.iter().map(|extent| *extent as f64).product::<f64>();
        self.parts.iter().map(extents).sum()
    }

    /// What `trains` says of its parts, which must be of one mind.
    ///
    /// # Errors
    /// When some parts are trained and some are not.
    pub fn trained(&self, trains: &dyn Fn(&str) -> bool) -> Result<bool> {
        let (trained, frozen): (Vec<_>, Vec<_>) = self.parts.iter().partition(|part| trains(&part.name));
        match (trained.first(), frozen.first()) {
            (Some(trained), Some(frozen)) => Err(Error::invalid(format!(
                "the policy trains `{}` but not `{}`: these are one matrix in this engine, so train both or neither",
                trained.name, frozen.name
            ))),
            (trained, _) => Ok(trained.is_some()),
        }
    }

    /// The elements before part `index`, and those of it.
    pub fn range(&self, index: usize) -> std::ops::Range<usize> {
        let start: usize = self.parts[..index].iter().map(Published::elements).sum();
        start..start + self.parts[index].elements()
    }

    /// Values of part `index` from the engine's order of axes to the checkpoint's.
    pub fn to_published(&self, index: usize, values: Vec<f32>) -> Vec<f32> {
        self.reordered(index, values, true)
    }

    /// Values of part `index` from the checkpoint's order of axes to the engine's.
    pub fn to_engine(&self, index: usize, values: Vec<f32>) -> Vec<f32> {
        self.reordered(index, values, false)
    }

    fn reordered(&self, index: usize, values: Vec<f32>, publish: bool) -> Vec<f32> {
        let &[_, inputs, height, width] = self.parts[index].shape.as_slice() else {
            return values;
        };
        let taps = height * width;
        let mut result = Vec::with_capacity(values.len());
        for output in values.chunks((inputs * taps).max(1)) {
            let (rows, columns) = if publish { (taps, inputs) } else { (inputs, taps) };
            result.extend((0..columns).flat_map(|column| (0..rows).map(move |row| output[row * columns + column])));
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn convolutions_go_there_and_back() {
        let meta = NamedParameter::one(Group::Output, "conv.weight", &[2, 3, 2, 2]);
        let stored: Vec<f32> = (0..24).map(|value| value as f32).collect();
        let engine = meta.to_engine(0, stored.clone());
        // Output 0, tap 0, inputs 0 to 2; then tap 1.
        assert_eq!(engine[..6], [0.0, 4.0, 8.0, 1.0, 5.0, 9.0]);
        assert_eq!(meta.to_published(0, engine), stored);
        assert_eq!(meta.shape(), [2, 12]);
    }

    #[test]
    fn stacks_are_trained_as_one() {
        let group = Group::Block { index: 0, of: 1 };
        let stack = NamedParameter::stacked(
            group,
            [("layers.0.a".into(), &[2, 3][..]), ("layers.0.b".into(), &[2, 3])],
        );
        assert_eq!(
            (stack.elements(), stack.range(1), stack.shape()),
            (12, 6..12, vec![4, 3])
        );
        assert!(stack.trained(&|_| true).unwrap());
        assert!(!stack.trained(&|_| false).unwrap());
        let message = stack.trained(&|name| name.ends_with('a')).unwrap_err().to_string();
        assert!(
            message.contains("trains `layers.0.a` but not `layers.0.b`"),
            "{message}"
        );
    }
}
