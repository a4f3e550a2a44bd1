//! A transformer's parameters as the engine holds them: in which order, and which tensors of a checkpoint each is made of.
//!
//! Gradients and the optimizer's state are lists in this order; a module takes the part of a list that is its own. A module lists
//! its parameters twice, by name from the sizes alone, and as tensors once it is loaded; both lists have one order.

use crate::error::{Error, Result};
use crate::ops::conv::Conv;
use crate::tensor::Tensor;

/// A place for a parameter's gradient; `None` where the parameter is frozen.
pub type Slot = Option<Tensor>;

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

/// A tensor of the engine: one of a checkpoint, or several stacked along dimension 0. The weights of a convolution, four extents
/// in a checkpoint, have their taps before their input channels here; see `ParamSource::load_conv`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// What it is made of, in order.
    pub parts: Vec<Published>,
}

impl Parameter {
    /// One tensor of a checkpoint.
    pub fn one(name: impl Into<String>, shape: &[usize]) -> Self {
        Parameter {
            parts: vec![Published {
                name: name.into(),
                shape: shape.to_vec(),
            }],
        }
    }

    /// Several tensors of a checkpoint, of one shape.
    pub fn stacked(prefix: &str, suffixes: &[&str], shape: &[usize]) -> Self {
        let parts = suffixes.iter().map(|suffix| Published {
            name: format!("{prefix}.{suffix}"),
            shape: shape.to_vec(),
        });
        Parameter { parts: parts.collect() }
    }

    /// The number of elements of all parts.
    pub fn elements(&self) -> usize {
        self.parts.iter().map(Published::elements).sum()
    }

    /// Whether `trains` says so of its parts, which must be of one mind.
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

/// A module's parameters, in the order of its list by name: of a reference to the module for reading, of a mutable one for
/// changing them.
pub(crate) trait Listed {
    /// A reference of the same kind.
    type Reference;

    /// All of them.
    fn listed(self) -> Vec<Self::Reference>;
}

/// Implements [`Listed`] for both references to a module by one body, which adds to a list what it binds by reference.
macro_rules! list_tensors {
    ($module:ty, |$value:ident, $all:ident| $body:block) => {
        impl<'a> crate::model::parameters::Listed for &'a $module {
            type Reference = &'a crate::tensor::Tensor;

            fn listed(self) -> Vec<Self::Reference> {
                let $value = self;
                let mut $all = Vec::new();
                $body
                $all
            }
        }

        impl<'a> crate::model::parameters::Listed for &'a mut $module {
            type Reference = &'a mut crate::tensor::Tensor;

            fn listed(self) -> Vec<Self::Reference> {
                let $value = self;
                let mut $all = Vec::new();
                $body
                $all
            }
        }
    };
}
pub(in crate::model) use list_tensors;

impl<'a, T> Listed for &'a Box<T>
where
    &'a T: Listed,
{
    type Reference = <&'a T as Listed>::Reference;

    fn listed(self) -> Vec<Self::Reference> {
        (&**self).listed()
    }
}

impl<'a, T> Listed for &'a mut Box<T>
where
    &'a mut T: Listed,
{
    type Reference = <&'a mut T as Listed>::Reference;

    fn listed(self) -> Vec<Self::Reference> {
        (&mut **self).listed()
    }
}

impl<'a> Listed for &'a Conv {
    type Reference = &'a Tensor;

    fn listed(self) -> Vec<Self::Reference> {
        self.parameters().to_vec()
    }
}

impl<'a> Listed for &'a mut Conv {
    type Reference = &'a mut Tensor;

    fn listed(self) -> Vec<Self::Reference> {
        self.parameters_mut().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn convolutions_go_there_and_back() {
        let parameter = Parameter::one("conv.weight", &[2, 3, 2, 2]);
        let stored: Vec<f32> = (0..24).map(|value| value as f32).collect();
        let engine = parameter.to_engine(0, stored.clone());
        // Output 0, tap 0, inputs 0 to 2; then tap 1.
        assert_eq!(engine[..6], [0.0, 4.0, 8.0, 1.0, 5.0, 9.0]);
        assert_eq!(parameter.to_published(0, engine), stored);
    }

    #[test]
    fn stacks_are_trained_as_one() {
        let stack = Parameter::stacked("layers.0", &["a", "b"], &[2, 3]);
        assert_eq!((stack.elements(), stack.range(1)), (12, 6..12));
        assert!(stack.trained(&|_| true).unwrap());
        assert!(!stack.trained(&|_| false).unwrap());
        let message = stack.trained(&|name| name.ends_with('a')).unwrap_err().to_string();
        assert!(
            message.contains("trains `layers.0.a` but not `layers.0.b`"),
            "{message}"
        );
    }
}
