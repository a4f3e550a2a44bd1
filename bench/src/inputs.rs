//! Random inputs, the same on every device.

use l2p_engine::ops::cast::cast;
use l2p_engine::ops::noise::normal_noise;
use l2p_engine::{DType, Device, Result, Shape, Tensor};

/// Unit normal numbers in the device's compute type, representable in bf16.
///
/// # Errors
/// When the device has no room.
pub fn random(device: &Device, shape: impl Into<Shape>, seed: u64, stream: u64) -> Result<Tensor> {
    let noise = normal_noise(device, shape, seed, stream)?;
    // So that every device holds the same numbers.
    cast(&cast(&noise, DType::Bf16)?, device.compute_dtype())
}

/// As [`random`], in f32.
///
/// # Errors
/// When the device has no room.
pub fn random_f32(device: &Device, shape: impl Into<Shape>, seed: u64, stream: u64) -> Result<Tensor> {
    normal_noise(device, shape, seed, stream)
}
