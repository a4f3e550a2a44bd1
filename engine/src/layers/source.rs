//! Where a model's parameters come from: by name, in the device's compute type (f32 on the CPU, bf16 on CUDA).

use std::collections::HashMap;
use std::sync::Arc;

use super::{NamedParameter, Streamed, Weight};
use crate::device::{Device, MemoryTag};
use crate::error::{Error, Result};
use crate::ops::quantise::Coding;
use crate::tensor::Tensor;

/// A set of named parameters that can be brought onto a device.
pub trait ParamSource {
    /// The shape of the parameter `name`, `None` where there is none of that name.
    fn shape(&self, name: &str) -> Option<Vec<usize>>;

    /// The parameter `name`, which must have the given shape.
    ///
    /// # Errors
    /// When it is missing, has another shape, cannot be read, or the device has no room.
    fn load(&self, device: &Device, name: &str, shape: &[usize]) -> Result<Tensor>;

    /// The rows of several parameters, one after the other along dimension 0, as one tensor of the given shape.
    ///
    /// # Errors
    /// As [`ParamSource::load`].
    fn load_stacked(&self, device: &Device, names: &[&str], shape: &[usize]) -> Result<Tensor>;

    /// In which coding the weight of a linear layer is kept on the device; `None` for the compute type.
    fn coding(&self, _meta: &NamedParameter) -> Option<Coding> {
        None
    }

    /// The weight of a linear layer where it is to stay: on the device, as it was made, or in host memory.
    ///
    /// # Errors
    /// When it cannot be brought there.
    fn keep(&self, _meta: &NamedParameter, weight: Weight) -> Result<Weight> {
        Ok(weight)
    }

    /// The weights that stay in host memory, for the model to bring them to the device when it runs.
    fn streamed(&self) -> Option<Arc<Streamed>> {
        None
    }

    /// The weights of a convolution, stored as `[outputs, inputs, height, width]`, as `[outputs, height · width · inputs]`:
    /// taps in row-major order outermost, input channels fastest.
    ///
    /// # Errors
    /// As [`ParamSource::load`].
    fn load_conv(&self, device: &Device, name: &str) -> Result<Tensor>;
}

/// Parameters in host memory, as shape and values; for tests and small models.
#[derive(Clone, Debug, Default)]
pub struct MemoryParams(pub HashMap<String, (Vec<usize>, Vec<f32>)>);

impl MemoryParams {
    /// Adds a parameter, or replaces the one of that name.
    pub fn insert(&mut self, name: impl Into<String>, shape: &[usize], values: Vec<f32>) {
        self.0.insert(name.into(), (shape.to_vec(), values));
    }

    fn get(&self, name: &str) -> Result<(&[usize], &[f32])> {
        let entry = self.0.get(name);
        let (shape, values) = entry.ok_or_else(|| Error::invalid(format!("there is no parameter `{name}`")))?;
        Ok((shape, values))
    }
}

impl ParamSource for MemoryParams {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.0.get(name).map(|(shape, _)| shape.clone())
    }

    fn load(&self, device: &Device, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.load_stacked(device, &[name], shape)
    }

    fn load_stacked(&self, device: &Device, names: &[&str], shape: &[usize]) -> Result<Tensor> {
        let (mut rows, mut stacked) = (0, Vec::new());
        for name in names {
            let (found, values) = self.get(name)?;
            rows += found.first().copied().unwrap_or(1);
            let fits = found.len() == shape.len() && found.get(1..) == shape.get(1..);
            if !fits || shape.first().is_some_and(|&all| rows > all) {
                return Err(wrong_shape(name, found, &format!("{shape:?}")));
            }
            stacked.extend_from_slice(values);
        }
        if shape.first().is_some_and(|&all| rows != all) {
            return Err(wrong_shape(&names.join("`, `"), &[rows], &format!("{shape:?}")));
        }
        let _tag = MemoryTag::Weights.scope();
        Tensor::from_f32(device, &stacked, shape)
    }

    fn load_conv(&self, device: &Device, name: &str) -> Result<Tensor> {
        let (found, values) = self.get(name)?;
        let &[outputs, inputs, height, width] = found else {
            return Err(wrong_shape(name, found, "[outputs, inputs, height, width]"));
        };
        let taps = height * width;
        let mut taps_first = Vec::with_capacity(values.len());
        for output in values.chunks(inputs * taps) {
            taps_first.extend((0..taps).flat_map(|tap| output.iter().skip(tap).step_by(taps)));
        }
        let _tag = MemoryTag::Weights.scope();
        Tensor::from_f32(device, &taps_first, [outputs, taps * inputs])
    }
}

fn wrong_shape(name: &str, found: &[usize], expected: &str) -> Error {
    Error::invalid(format!("`{name}` has shape {found:?}, expected {expected}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn convolution_weights_come_taps_first() {
        let mut params = MemoryParams::default();
        // Value = 100 · output + 10 · input + tap.
        let values = (0..2)
            .flat_map(|o| (0..3).flat_map(move |i| (0..4).map(move |t| (100 * o + 10 * i + t) as f32)))
            .collect();
        params.insert("conv", &[2, 3, 2, 2], values);
        let loaded = params.load_conv(&Device::Cpu, "conv").unwrap();
        assert_eq!(loaded.shape().to_vec(), [2, 12]);
        assert_eq!(
            loaded.as_slice::<f32>().unwrap()[..7],
            [0.0, 10.0, 20.0, 1.0, 11.0, 21.0, 2.0]
        );
    }

    #[test]
    fn stacks_check_rows_and_width() {
        let mut params = MemoryParams::default();
        params.insert("a", &[1, 2], vec![1.0, 2.0]);
        params.insert("b", &[2, 2], vec![3.0, 4.0, 5.0, 6.0]);
        params.insert("c", &[1, 3], vec![0.0; 3]);
        let stacked = params.load_stacked(&Device::Cpu, &["a", "b"], &[3, 2]).unwrap();
        assert_eq!(stacked.as_slice::<f32>().unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        for (names, shape) in [
            (["a", "c"], [2, 2]),
            (["a", "b"], [2, 2]),
            (["a", "b"], [4, 2]),
            (["a", "x"], [3, 2]),
        ] {
            assert!(params.load_stacked(&Device::Cpu, &names, &shape).is_err());
        }
    }
}
