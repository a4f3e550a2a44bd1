//! Parameters straight from a checkpoint's files: read and converted to the device's compute type while they are uploaded, piece
//! by piece, so that no large tensor is ever whole in host memory.

use rayon::prelude::*;

use super::elements::{Float, encode, read_converted};
use super::set::Checkpoint;
use super::stored::CheckpointTensor;
use crate::device::{Device, MemoryTag};
use crate::error::{Error, Result};
use crate::layers::ParamSource;
use crate::printable::shown_name;
use crate::shape::Shape;
use crate::tensor::Tensor;

/// Elements that one task reorders.
const TASK_ELEMENTS: usize = 1 << 14;

impl ParamSource for Checkpoint {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors().get(name).map(|tensor| tensor.shape().to_vec())
    }

    fn load(&self, device: &Device, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = self.tensor(name)?;
        if tensor.shape() != shape {
            return Err(wrong_shape(name, tensor, &format!("{shape:?}")));
        }
        load_rows(device, &[tensor], shape)
    }

    fn load_stacked(&self, device: &Device, names: &[&str], shape: &[usize]) -> Result<Tensor> {
        let tensors: Vec<_> = names.iter().map(|name| self.tensor(name)).collect::<Result<_>>()?;
        for (name, tensor) in names.iter().zip(&tensors) {
            let found = tensor.shape();
            if found.len() != shape.len() || found.get(1..) != shape.get(1..) {
                let mut expected = vec!["rows".to_owned()];
                expected.extend(shape.iter().skip(1).map(ToString::to_string));
                return Err(wrong_shape(name, tensor, &format!("[{}]", expected.join(", "))));
            }
        }
        let rows: usize = tensors.iter().filter_map(|tensor| tensor.shape().first()).sum();
        if shape.first().is_some_and(|&expected| expected != rows) {
            let names = names.join("`, `");
            let reason = format!("tensors `{names}` have {rows} rows, expected a stack of shape {shape:?}");
            return Err(Error::file(self.path(), reason));
        }
        load_rows(device, &tensors, shape)
    }

    fn load_conv(&self, device: &Device, name: &str) -> Result<Tensor> {
        let tensor = self.tensor(name)?;
        let order = ConvOrder::of(tensor.shape())
            .ok_or_else(|| wrong_shape(name, tensor, "[outputs, inputs, height, width]"))?;
        // Its elements come from all over the file's tensor; no convolution has more than some megabytes.
        let (source, from, to) = (
            tensor.numbers()?,
            tensor.float()?,
            Float::computed(device.compute_dtype()),
        );
        let _tag = MemoryTag::Weights.scope();
        let mut write = |first_byte: usize, target: &mut [u8]| {
            let first = first_byte / to.size();
            let tasks = target.par_chunks_mut(TASK_ELEMENTS * to.size()).enumerate();
            tasks.for_each(|(task, target)| reorder(&source, from, target, to, &order, first + task * TASK_ELEMENTS));
            Ok(())
        };
        Tensor::from_fill(device, order.shape(), device.compute_dtype(), &mut write)
    }
}

/// The two orders of a convolution's weights: as stored, and as the kernels read them; see [`ParamSource::load_conv`].
#[derive(Clone, Copy, Debug)]
struct ConvOrder {
    outputs: usize,
    inputs: usize,
    taps: usize,
}

impl ConvOrder {
    /// The orders of weights stored with the given shape, which must have four extents.
    fn of(stored: &[usize]) -> Option<Self> {
        match *stored {
            [outputs, inputs, height, width] => Some(ConvOrder {
                outputs,
                inputs,
                taps: height * width,
            }),
            _ => None,
        }
    }

    /// The shape on a device.
    fn shape(&self) -> Shape {
        [self.outputs, self.taps * self.inputs].into()
    }

    /// Where the device's element `index` stands in the file.
    fn stored_index(&self, index: usize) -> usize {
        let (run, input) = (index / self.inputs, index % self.inputs);
        let (output, tap) = (run / self.taps, run % self.taps);
        (output * self.inputs + input) * self.taps + tap
    }
}

/// Loads tensors of whole rows one after the other into one of the given shape.
fn load_rows(device: &Device, tensors: &[&CheckpointTensor], shape: &[usize]) -> Result<Tensor> {
    let to = Float::computed(device.compute_dtype());
    let mut sources = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        tensor.read_ahead();
        sources.push((*tensor, tensor.float()?));
    }
    let _tag = MemoryTag::Weights.scope();
    let mut write = |first_byte: usize, target: &mut [u8]| fill(&sources, first_byte / to.size(), target, to);
    Tensor::from_fill(device, shape, device.compute_dtype(), &mut write)
}

/// Writes the elements from `first` on, counted over all sources, until `target` is full.
fn fill(sources: &[(&CheckpointTensor, Float)], first: usize, target: &mut [u8], to: Float) -> Result<()> {
    let mut skip = first;
    let mut rest = target;
    for (source, from) in sources {
        let elements = source.elements();
        let here = elements.saturating_sub(skip).min(rest.len() / to.size());
        if here > 0 {
            let (target, after) = rest.split_at_mut(here * to.size());
            let start = skip * from.size();
            read_converted(
                &|byte, bytes| source.read_numbers(start + byte, bytes),
                *from,
                target,
                to,
            )?;
            rest = after;
        }
        skip = skip.saturating_sub(elements);
    }
    Ok(())
}

/// Writes the elements of a convolution from the device's element `first` on.
fn reorder(source: &[u8], from: Float, target: &mut [u8], to: Float, order: &ConvOrder, first: usize) {
    for (index, target) in target.chunks_exact_mut(to.size()).enumerate() {
        let at = order.stored_index(first + index) * from.size();
        encode(&[from.read(&source[at..])], target, to);
    }
}

fn wrong_shape(name: &str, tensor: &CheckpointTensor, expected: &str) -> Error {
    let stored = match tensor.stored_name() {
        stored if stored == name => String::new(),
        stored => format!(" (from `{}`)", shown_name(stored)),
    };
    let (name, found) = (shown_name(name), tensor.shape());
    Error::file(
        tensor.path(),
        format!("tensor `{name}`{stored} has shape {found:?}, expected {expected}"),
    )
}
