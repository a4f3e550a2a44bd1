//! What a pass through a model holds and computes, by its sizes alone: each family tells it of itself ([`super::Spec::work`]), plans and
//! estimates add it up.

use crate::layers::{Linear, Trained};

/// What a block keeps of its forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Nothing: no gradient passes through it.
    Nothing,
    /// Its input, from which the rest is made again.
    Input,
    /// Everything that is worth it.
    Everything,
}

impl Keep {
    /// A gradient passes through the block.
    pub fn reached(self) -> bool {
        self != Keep::Nothing
    }

    /// The block is run a second time.
    pub fn again(self) -> bool {
        self == Keep::Input
    }
}

/// A product of a row with a weight.
#[derive(Clone, Copy, Debug)]
pub struct ProductWork {
    /// Elements of the weight: multiplications per row.
    pub size: f64,
    /// A gradient passes to its input.
    pub passes: bool,
    /// The weight is trained.
    pub trained: bool,
}

impl ProductWork {
    /// The product of a linear layer of these extents.
    pub fn of(layer: &Linear<Trained>, [outputs, inputs]: [usize; 2], passes: bool) -> Self {
        ProductWork {
            size: outputs as f64 * inputs as f64,
            passes,
            trained: layer.weight,
        }
    }
}

/// Products over some rows of an item, outside of blocks.
#[derive(Clone, Debug)]
pub struct RowsWork {
    /// Rows of an item; a count of any size, as all of these.
    pub rows: f64,
    /// What each row is multiplied with.
    pub product: ProductWork,
}

/// A block.
#[derive(Clone, Debug)]
pub struct BlockWork {
    /// Tokens of an item.
    pub tokens: f64,
    /// What it keeps.
    pub keep: Keep,
    /// What each token is multiplied with.
    pub products: Vec<ProductWork>,
    /// Width of queries, over which attention multiplies.
    pub attention_width: usize,
    /// Elements per token, in the compute type.
    pub elements: BlockElements,
}

/// Elements per token of a block's tensors, in the compute type.
#[derive(Clone, Copy, Debug)]
pub struct BlockElements {
    /// Of its input.
    pub input: usize,
    /// Of what it keeps besides.
    pub inside: usize,
    /// Of what it keeps in f32 (log-sum-exp).
    pub inside_f32: usize,
    /// Of what lives at once in its forward pass.
    pub forward: usize,
    /// Of what lives at once in its backward pass.
    pub backward: usize,
}

/// Blocks that are reported together.
#[derive(Clone, Debug)]
pub struct StackWork {
    /// What they are called, and what their attention is called.
    pub names: [&'static str; 2],
    /// The blocks.
    pub blocks: Vec<BlockWork>,
}

/// What makes a prediction of the last block's tokens.
#[derive(Clone, Debug)]
pub enum OutputWork {
    /// One product per image token.
    FinalLayer(RowsWork),
    /// The Detailer Head; its work follows from its layout.
    Head {
        /// A gradient passes to the feature map.
        passes: bool,
        /// It is trained.
        trained: bool,
    },
}

/// One item's pass through a model.
#[derive(Clone, Debug)]
pub struct Work {
    /// Input projection and embedders.
    pub embedders: Vec<RowsWork>,
    /// The blocks, in stacks.
    pub stacks: Vec<StackWork>,
    /// The output part.
    pub output: OutputWork,
}
