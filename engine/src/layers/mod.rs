//! Layers: what owns parameters, and what can be done with all the parameters of a model without knowing the model.
//!
//! A module is a structure of parameters. What stands in a parameter's place is its [`Kind`]: a description before anything is
//! read ([`Described`]), a tensor on a device ([`Loaded`]), a place for a gradient ([`Gradients`]), or the answer whether it is
//! trained ([`Trained`]). A module is written down once, by [`module!`], in the order in which its parameters are listed; loading,
//! checking, planning, gradients, optimizer and checkpoints are [`Module::transform`]s and [`Module::visit`]s over that one list,
//! and a gradient has the same name in `Block<Gradients>` as its weight in `Block`.

mod balance;
mod conv;
mod linear;
mod load;
mod meta;
mod norm;
mod source;
mod streamed;

pub use conv::{ConvLayer, ConvMeta, ConvSlots};
pub use linear::{Linear, Weight};
pub use load::Loader;
pub use meta::{Balance, Group, NamedParameter, Published};
pub use norm::{Bare, GroupNorm, Norm};
pub use source::{MemoryParams, ParamSource};
pub use streamed::{Pass, Spread, Streamed, block_of, room_for};

use crate::error::{Error, Result};
use crate::ops::conv::Conv;
use crate::tensor::Tensor;

/// What stands in the places of a module's parameters.
pub trait Kind: Sized {
    /// The weight of a [`Linear`] layer, which may be held in other precisions or places than the compute type on the device.
    type Matrix;
    /// Any other parameter: biases, factors of normalisations, tokens, tables.
    type Dense;
    /// Weight and bias of a convolution.
    type Conv: WeightAndBias<Self::Dense>;
}

/// Weight and bias of a convolution, whatever stands in their places.
pub trait WeightAndBias<P> {
    /// Weight, then bias.
    fn parts(&self) -> [&P; 2];
    /// The same, to be changed.
    fn parts_mut(&mut self) -> [&mut P; 2];
}

/// Names and shapes; needs neither files nor a device.
pub enum Described {}

impl Kind for Described {
    type Matrix = NamedParameter;
    type Dense = NamedParameter;
    type Conv = ConvMeta;
}

/// Tensors on a device.
pub enum Loaded {}

impl Kind for Loaded {
    type Matrix = Weight;
    type Dense = Tensor;
    type Conv = Conv;
}

impl WeightAndBias<Tensor> for Conv {
    fn parts(&self) -> [&Tensor; 2] {
        self.parameters()
    }

    fn parts_mut(&mut self) -> [&mut Tensor; 2] {
        self.parameters_mut()
    }
}

/// A place for a parameter's gradient, in the compute type, added to; `None` where the parameter is frozen.
pub type Slot = Option<Tensor>;

/// Places for gradients.
pub enum Gradients {}

impl Kind for Gradients {
    type Matrix = Slot;
    type Dense = Slot;
    type Conv = ConvSlots;
}

/// Whether each parameter is trained.
pub enum Trained {}

impl Kind for Trained {
    type Matrix = bool;
    type Dense = bool;
    type Conv = [bool; 2];
}

impl WeightAndBias<bool> for [bool; 2] {
    fn parts(&self) -> [&bool; 2] {
        self.each_ref()
    }

    fn parts_mut(&mut self) -> [&mut bool; 2] {
        self.each_mut()
    }
}

/// A parameter's place, by reference.
pub enum Place<'a, K: Kind> {
    /// A linear layer's weight.
    Matrix(&'a K::Matrix),
    /// Any other parameter.
    Dense(&'a K::Dense),
}

/// A parameter's place, to be changed.
pub enum PlaceMut<'a, K: Kind> {
    /// A linear layer's weight.
    Matrix(&'a mut K::Matrix),
    /// Any other parameter.
    Dense(&'a mut K::Dense),
}

/// Makes, place by place, what stands in another kind of module.
pub trait Transform<A: Kind, B: Kind> {
    /// For a linear layer's weight.
    ///
    /// # Errors
    /// The transform's own.
    fn matrix(&mut self, from: &A::Matrix) -> Result<B::Matrix>;

    /// For any other parameter.
    ///
    /// # Errors
    /// The transform's own.
    fn dense(&mut self, from: &A::Dense) -> Result<B::Dense>;

    /// For a convolution.
    ///
    /// # Errors
    /// The transform's own.
    fn conv(&mut self, from: &A::Conv) -> Result<B::Conv>;
}

/// A structure of parameters; see the module's head comment. Implemented by [`module!`] and for lists of modules.
pub trait Module {
    /// What stands in the places.
    type Kind: Kind;
    /// The same structure with something else in the places.
    type As<B: Kind>;

    /// The same structure with what `transform` makes of each place, in the order of the list.
    ///
    /// # Errors
    /// The first of the transform's.
    fn transform<B: Kind>(&self, transform: &mut impl Transform<Self::Kind, B>) -> Result<Self::As<B>>;

    /// Shows every place, in the order of the list.
    fn visit<'a>(&'a self, visit: &mut dyn FnMut(Place<'a, Self::Kind>));

    /// Shows every place, to be changed, in the order of the list.
    fn visit_mut<'a>(&'a mut self, visit: &mut dyn FnMut(PlaceMut<'a, Self::Kind>));
}

/// Declares a module: first the parts that hold parameters, in the order of the list; after a semicolon plain values that are the
/// same whatever stands in the places; after `; made` what is made of loaded parameters later on and has a default before.
macro_rules! module {
    (
        $(#[$attribute:meta])*
        $visibility:vis struct $name:ident<$kind:ident> {
            $( $(#[$part_attribute:meta])* $part_visibility:vis $part:ident: $part_type:ty, )*
            $( ; $( $(#[$value_attribute:meta])* $value_visibility:vis $value:ident: $value_type:ty, )* )?
            $( ; made $( $(#[$made_attribute:meta])* $made_visibility:vis $made:ident: $made_type:ty, )* )?
        }
    ) => {
        $(#[$attribute])*
        $visibility struct $name<$kind: $crate::layers::Kind = $crate::layers::Loaded> {
            $( $(#[$part_attribute])* $part_visibility $part: $part_type, )*
            $( $( $(#[$value_attribute])* $value_visibility $value: $value_type, )* )?
            $( $( $(#[$made_attribute])* $made_visibility $made: $made_type, )* )?
        }

        impl<$kind: $crate::layers::Kind> $crate::layers::Module for $name<$kind> {
            type Kind = $kind;
            type As<B: $crate::layers::Kind> = $name<B>;

            fn transform<B: $crate::layers::Kind>(
                &self,
                transform: &mut impl $crate::layers::Transform<$kind, B>,
            ) -> $crate::error::Result<$name<B>> {
                Ok($name {
                    $( $part: $crate::layers::Module::transform(&self.$part, transform)?, )*
                    $( $( $value: self.$value.clone(), )* )?
                    $( $( $made: Default::default(), )* )?
                })
            }

            fn visit<'a>(&'a self, visit: &mut dyn FnMut($crate::layers::Place<'a, $kind>)) {
                $( $crate::layers::Module::visit(&self.$part, visit); )*
            }

            fn visit_mut<'a>(&'a mut self, visit: &mut dyn FnMut($crate::layers::PlaceMut<'a, $kind>)) {
                $( $crate::layers::Module::visit_mut(&mut self.$part, visit); )*
            }
        }
    };
}
pub(crate) use module;

macro_rules! lists {
    ($( [$($generic:tt)*] $list:ty => $as:ty, |$this:ident, $transform:ident| $make:expr; )+) => { $(
        impl<$($generic)*> Module for $list {
            type Kind = M::Kind;
            type As<B: Kind> = $as;

            fn transform<B: Kind>(&self, $transform: &mut impl Transform<M::Kind, B>) -> Result<$as> {
                let $this = self;
                $make
            }

            fn visit<'a>(&'a self, visit: &mut dyn FnMut(Place<'a, M::Kind>)) {
                self.iter().for_each(|module| module.visit(visit));
            }

            fn visit_mut<'a>(&'a mut self, visit: &mut dyn FnMut(PlaceMut<'a, M::Kind>)) {
                self.iter_mut().for_each(|module| module.visit_mut(visit));
            }
        }
    )+ };
}

lists! {
    [M: Module] Vec<M> => Vec<M::As<B>>, |list, transform| list.iter().map(|module| module.transform(transform)).collect();
    [M: Module] Option<M> => Option<M::As<B>>, |list, transform| list.as_ref().map(|module| module.transform(transform)).transpose();
}

impl<M: Module> Module for Box<M> {
    type Kind = M::Kind;
    type As<B: Kind> = Box<M::As<B>>;

    fn transform<B: Kind>(&self, transform: &mut impl Transform<M::Kind, B>) -> Result<Box<M::As<B>>> {
        (**self).transform(transform).map(Box::new)
    }

    fn visit<'a>(&'a self, visit: &mut dyn FnMut(Place<'a, M::Kind>)) {
        (**self).visit(visit);
    }

    fn visit_mut<'a>(&'a mut self, visit: &mut dyn FnMut(PlaceMut<'a, M::Kind>)) {
        (**self).visit_mut(visit);
    }
}

/// The descriptions of a module's parameters, in the order of its list.
pub fn metas<M: Module<Kind = Described>>(module: &M) -> Vec<&NamedParameter> {
    let mut all = Vec::new();
    module.visit(&mut |place| match place {
        Place::Matrix(meta) | Place::Dense(meta) => all.push(meta),
    });
    all
}

/// The tensors of a loaded module, in the order of its list; the codes of a weight in eight bits.
pub fn tensors<M: Module<Kind = Loaded>>(module: &M) -> Vec<&Tensor> {
    let mut all = Vec::new();
    module.visit(&mut |place| match place {
        Place::Matrix(weight) => all.push(weight.tensor()),
        Place::Dense(tensor) => all.push(tensor),
    });
    all
}

/// The tensors of a loaded module, to be changed, in the order of its list.
pub fn tensors_mut<M: Module<Kind = Loaded>>(module: &mut M) -> Vec<&mut Tensor> {
    let mut all = Vec::new();
    module.visit_mut(&mut |place| match place {
        PlaceMut::Matrix(weight) => all.push(weight.tensor_mut()),
        PlaceMut::Dense(tensor) => all.push(tensor),
    });
    all
}

/// The places of a module's gradients, in the order of its list.
pub fn slots<M: Module<Kind = Gradients>>(module: &M) -> Vec<&Slot> {
    let mut all = Vec::new();
    module.visit(&mut |place| match place {
        Place::Matrix(slot) | Place::Dense(slot) => all.push(slot),
    });
    all
}

/// The places of a module's gradients, to be changed, in the order of its list.
pub fn slots_mut<M: Module<Kind = Gradients>>(module: &mut M) -> Vec<&mut Slot> {
    let mut all = Vec::new();
    module.visit_mut(&mut |place| match place {
        PlaceMut::Matrix(slot) | PlaceMut::Dense(slot) => all.push(slot),
    });
    all
}

/// Whether each of a module's parameters is trained, in the order of its list.
pub fn trained<M: Module<Kind = Trained>>(module: &M) -> Vec<bool> {
    let mut all = Vec::new();
    module.visit(&mut |place| match place {
        Place::Matrix(trained) | Place::Dense(trained) => all.push(*trained),
    });
    all
}

/// Whether any of a module's parameters is trained.
pub fn any_trained<M: Module<Kind = Trained>>(module: &M) -> bool {
    trained(module).contains(&true)
}

/// Asks of every parameter whether it is trained.
pub struct Choose<F>(pub F);

impl<F: FnMut(&NamedParameter) -> Result<bool>> Transform<Described, Trained> for Choose<F> {
    fn matrix(&mut self, meta: &NamedParameter) -> Result<bool> {
        self.0(meta)
    }

    fn dense(&mut self, meta: &NamedParameter) -> Result<bool> {
        self.0(meta)
    }

    fn conv(&mut self, conv: &ConvMeta) -> Result<[bool; 2]> {
        Ok([self.0(&conv.weight)?, self.0(&conv.bias)?])
    }
}

/// Makes a place for the gradient of every parameter that `chosen` says is trained, in the order of the list.
pub struct MakeSlots<I>(pub I);

impl<I: Iterator<Item = bool>> MakeSlots<I> {
    fn slot(&mut self, like: &Tensor) -> Result<Slot> {
        let zeros = || Tensor::zeros(&like.device(), like.shape(), like.dtype());
        self.0.next().unwrap_or(false).then(zeros).transpose()
    }
}

impl<I: Iterator<Item = bool>> Transform<Loaded, Gradients> for MakeSlots<I> {
    fn matrix(&mut self, weight: &Weight) -> Result<Slot> {
        match weight {
            Weight::Dense(weight) => self.slot(weight),
            Weight::Quantised(weight) => match self.0.next() {
                Some(true) => Err(Error::invalid(format!(
                    "a weight {} in eight bits cannot be trained",
                    weight.shape()
                ))),
                _ => Ok(None),
            },
        }
    }

    fn dense(&mut self, tensor: &Tensor) -> Result<Slot> {
        self.slot(tensor)
    }

    fn conv(&mut self, conv: &Conv) -> Result<ConvSlots> {
        let [weight, bias] = conv.parameters();
        Ok(ConvSlots {
            weight: self.slot(weight)?,
            bias: self.slot(bias)?,
        })
    }
}
