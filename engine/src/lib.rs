//! The engine of l2p: tensors and fused operations on CPU and CUDA, the models made of them, and what drives them.
//!
//! The layers, each using only those before it: [`device`] → [`tensor`] → [`ops`] → [`model`] → [`checkpoint`], [`flow`] →
//! [`pipeline`] → [`data`] → [`train`]; [`text`] and [`image_io`] stand beside them, [`profile`] below and [`ceilings`] above
//! the operations.
//! Operations know nothing of models; each defines itself by a plain CPU loop and launches the CUDA kernel that must equal it.

pub mod ceilings;
pub mod checkpoint;
pub mod data;
pub mod device;
mod error;
mod files;
pub mod flow;
pub mod image_io;
pub mod model;
mod nvtx;
pub mod ops;
pub mod pipeline;
pub mod profile;
pub mod tensor;
pub mod text;
pub mod train;

pub use device::{Device, DeviceChoice};
pub use error::{Error, Result};
pub use model::{MemoryParams, ParamSource};
pub use tensor::{DType, Shape, Tensor};
