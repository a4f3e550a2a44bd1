//! The engine of l2p: tensors and fused operations on CPU and CUDA, the models made of them, and what drives them.
//!
//! The layers, each using only those before it: [`device`] → [`tensor`] → [`ops`] → [`dist`], [`layers`] → [`model`] →
//! [`checkpoint`], [`flow`] → [`pipeline`] → [`data`], [`serve`] → [`report`] → [`train`]; [`text`] and [`image_io`] stand beside them,
//! [`profile`] below and [`ceilings`] above the operations. `scripts/layers` checks it.
//! Operations know nothing of models; each defines itself by a plain CPU loop and launches the CUDA kernel that must equal it.

#![deny(clippy::print_stderr, clippy::print_stdout)]

pub mod ceilings;
pub mod checkpoint;
pub mod codes;
pub mod data;
pub mod device;
pub mod dist;
mod dtype;
mod error;
pub mod files;
pub mod flow;
pub mod image_io;
pub mod layers;
pub mod limits;
pub mod lock;
pub mod model;
mod nvtx;
pub mod ops;
pub mod patterns;
pub mod pipeline;
mod printable;
pub mod profile;
pub mod report;
pub mod serve;
mod shape;
pub mod tensor;
pub mod text;
pub mod train;

pub use device::{Device, DeviceChoice};
pub use dtype::{DType, Element};
pub use error::{Error, ErrorKind, Result};
pub use layers::{MemoryParams, ParamSource};
pub use printable::{printable, shown_name};
pub use shape::Shape;
pub use tensor::{HostTensor, Tensor};
