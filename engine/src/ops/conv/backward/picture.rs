//! The gradients of a 1×1 convolution to a picture on CUDA, of its source and parameters in one pass.

use std::sync::Arc;

use super::weights::{Parts, add_parts};
use super::{ConvGrads, Gradient};
use crate::device::{Args, CudaDevice, Kernel, MemoryTag};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::grid;
use crate::tensor::Tensor;

const IMAGE: &str = "conv_picture_backward";

impl Gradient<'_> {
    /// The kernel for this convolution, if it is one that goes to a picture.
    pub(super) fn picture_kernel(&self, device: &CudaDevice, dy: &Tensor) -> Result<Option<Arc<Kernel>>> {
        let (call, conv) = (&self.call, self.call.conv);
        let name = match dy.dtype() {
            DType::F32 => "conv_picture_backward_f32",
            _ => "conv_picture_backward_bf16",
        };
        let kernel = device.kernel(IMAGE, name)?;
        let [most_outputs, most_inputs, ..] = kernel.info().tile.map(|extent| extent as usize);
        let plain = conv.kernel == 1 && call.second.is_none() && call.x.dtype() == DType::Bf16;
        let inputs = conv.inputs();
        let suits = plain && conv.outputs() <= most_outputs && inputs <= most_inputs && inputs.is_multiple_of(8);
        Ok(suits.then_some(kernel))
    }

    /// The gradient of the source, if it is wanted, and those of the parameters from `scale · dy`.
    pub(super) fn picture(
        &self,
        device: &Arc<CudaDevice>,
        kernel: &Kernel,
        dy: &Tensor,
        scale: f32,
        want: bool,
        grads: Option<ConvGrads<'_>>,
    ) -> Result<Option<Tensor>> {
        let (x, conv) = (self.call.x, self.call.conv);
        let (pixels, inputs, outputs) = (self.pixels(), conv.inputs(), conv.outputs());
        let mut dx = want
            .then(|| Tensor::empty_compute(&x.device(), x.shape()))
            .transpose()?;
        if pixels == 0 || (dx.is_none() && grads.is_none()) {
            return Ok(dx);
        }
        // As many blocks as run at once, or as have a pixel for each of their threads.
        let threads = kernel.info().threads;
        let resident = device.multiprocessors() * kernel.resident_blocks(threads)?;
        let blocks =
            grid(self.call.op, (pixels * inputs / 8).div_ceil(threads.max(1) as usize))?.clamp(1, resident.max(1));
        let mut parts = match grads {
            None => None,
            Some(_) => {
                let _tag = MemoryTag::Workspace.scope();
                let count = blocks as usize;
                Some(Parts {
                    weights: Tensor::empty(&x.device(), [count, outputs, 1, inputs], DType::F32)?,
                    biases: Tensor::empty(&x.device(), [count, outputs], DType::F32)?,
                    count,
                    turns: 1,
                    stride: inputs,
                })
            }
        };
        let args = Args::new()
            .input(dy)?
            .input(x)?
            .input(&conv.weight)?
            .optional_output(dx.as_mut())?
            .optional_output(parts.as_mut().map(|parts| &mut parts.weights))?
            .optional_output(parts.as_mut().map(|parts| &mut parts.biases))?
            .long(pixels as u64)
            .int(inputs)
            .int(outputs)
            .float(scale);
        // SAFETY: the arguments are those of the kernels of `conv_picture_backward.cu`, which `picture_kernel` found to suit; each
        // block has its place in the parts; null pointers stand for what is not wanted.
        unsafe { kernel.launch(device, [blocks, 1, 1], args)? };
        if let (Some(parts), Some(grads)) = (parts, grads) {
            add_parts(device, self.call.op, &parts, 1, grads)?;
        }
        Ok(dx)
    }
}
