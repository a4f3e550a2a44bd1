//! Operations: one file each, with its contract, the CPU loop that defines it, and the CUDA launch that must equal it.
//!
//! Every function checks its arguments at the door and returns an error that names the operation, the tensor, and what
//! was expected and found; kernels assume what was checked. On the CPU everything is f32, on CUDA activations and weights
//! are bf16 and sums are f32; the head comment of an operation names the exceptions.

pub mod add_rms_norm;
pub mod attention;
pub mod cast;
pub mod conv;
pub mod decode_attention;
pub mod detail_stage;
pub mod downsample_conv;
mod elementwise;
pub mod embedding;
pub mod finite;
pub mod flow_loss;
pub mod from_rgb8;
pub mod gated_add;
pub mod group_norm;
pub mod guidance;
pub mod hold_known;
pub mod latent;
pub mod layer_norm;
pub mod linear;
pub mod linear_few;
mod linear_hopper;
pub mod linear_quantised;
pub mod linear_swiglu;
mod modulation;
pub mod noise;
pub mod patch_embed;
pub mod qk_norm_rope;
pub mod quantise;
pub mod resize;
pub mod rms_norm;
pub mod sample_tokens;
pub mod sum_parts;
pub mod sum_rows;
pub mod sum_squares;
pub mod swiglu;
pub mod timestep;
pub mod to_rgb8;
pub mod tokens;
pub mod unpatchify;

pub use modulation::{Modulation, VectorGradient};

use crate::device::{Args, CudaDevice, Kernel};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// The sizes of a token tensor `[batch, tokens, dim]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TokenSizes {
    pub batch: usize,
    pub tokens: usize,
    pub dim: usize,
}

impl TokenSizes {
    /// Reads the sizes of `x` and checks that it is in the device's compute type.
    pub fn of(op: &'static str, name: &str, x: &Tensor) -> Result<Self> {
        x.ensure_rank(op, name, 3, "[batch, tokens, dim]")?;
        x.ensure_dtype(op, name, x.device().compute_dtype())?;
        Ok(TokenSizes {
            batch: x.dim(0),
            tokens: x.dim(1),
            dim: x.dim(2),
        })
    }

    pub fn rows(&self) -> usize {
        self.batch * self.tokens
    }

    /// CUDA kernels move eight elements at a time.
    pub fn ensure_vectors(&self, op: &'static str) -> Result<()> {
        if self.dim.is_multiple_of(8) {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "{op}: a width of {} is not a multiple of 8, which the CUDA kernels need",
            self.dim
        )))
    }
}

/// Checks a parameter: shape, the device's compute type, and the device of the operation's input.
pub(crate) fn ensure_parameter(
    op: &'static str,
    name: &str,
    parameter: &Tensor,
    shape: &[usize],
    input: &Tensor,
) -> Result<()> {
    parameter.ensure_shape(op, name, shape)?;
    parameter.ensure_dtype(op, name, input.device().compute_dtype())?;
    parameter.ensure_device(op, name, &input.device())
}

/// A size as a grid extent.
pub(crate) fn grid(op: &'static str, blocks: usize) -> Result<u32> {
    match u32::try_from(blocks) {
        Ok(blocks) if blocks <= i32::MAX as u32 => Ok(blocks),
        _ => Err(Error::invalid(format!(
            "{op}: {blocks} blocks are more than one launch can have"
        ))),
    }
}

/// Threads of a block that holds a row of `dim` elements in registers, `per_thread` of them in each thread.
pub(crate) fn threads_per_row(op: &'static str, dim: usize, per_thread: u32) -> Result<u32> {
    let threads = dim.div_ceil(per_thread.max(1) as usize).next_multiple_of(32);
    if threads > 1024 {
        return Err(Error::invalid(format!(
            "{op}: rows of {dim} elements are longer than the CUDA kernel's {}",
            1024 * per_thread
        )));
    }
    Ok(threads as u32)
}

/// Launches a kernel that may begin while the one ahead of it still runs, so far as the device allows that.
///
/// # Errors
/// As for [`Kernel::launch`].
///
/// # Safety
/// As for [`Kernel::launch_overlapped`].
pub(crate) unsafe fn launch_overlapped(device: &CudaDevice, kernel: &Kernel, grid: [u32; 3], args: Args) -> Result<()> {
    match device.overlaps_kernels() {
        // SAFETY: by the caller's promise.
        true => unsafe { kernel.launch_overlapped(device, grid, args) },
        // SAFETY: as above.
        false => unsafe { kernel.launch(device, grid, args) },
    }
}
