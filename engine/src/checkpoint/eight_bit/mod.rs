//! Weights of eight bits: reading them with their scales, and writing them.
//!
//! | beside `NAME.weight` | |
//! | --- | --- |
//! | `NAME.weight_scale`, `NAME.scale_weight` | what its codes are multiplied with: one number, or one for each row |
//! | `NAME.input_scale`, `NAME.scale_input` | what the layer's inputs are divided by where products are of eight bits; not needed to read it |
//! | `NAME.comfy_quant`, the header's `_quantization_metadata` | the format, and whether inputs are rotated, see [`note`] |
//! | `scaled_fp8` | a marker: weights of eight bits in this file have scales |
//!
//! A weight of F8_E4M3 or F8_E5M2 in a file without any of these is what its codes stand for. One without its scale where others have
//! theirs is refused, and so is a scale without its weight: to leave out a scale means to draw noise.

mod attach;
mod decoding;
mod note;
mod quantise;
mod report;
mod rotation;

pub use crate::codes::Code;
pub use attach::{Named, Source, attach};
pub use decoding::{Decoding, ScaleName};
pub use note::Unknown;
pub use quantise::{EightBitFormat, LayerError, QuantiseOptions, QuantisePlan, quantise};
pub use report::{EightBit, EightBitKind};
