//! Attention on CUDA: which kernel, and its launch.

use std::f32::consts::LOG2_E;
use std::sync::Arc;

use super::{AttentionKernel, OP, Problem};
use crate::device::{Args, CudaDevice, TensorMap, TensorMapSpec};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::grid;
use crate::ops::quantise::{GROUP, Quantised};
use crate::tensor::Tensor;

/// The largest grid in its second and third dimension.
const MAX_GRID_YZ: usize = 65535;

/// A kernel by its image and name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Choice {
    image: &'static str,
    kernel: &'static str,
    /// Reads the packed rows through a tensor map.
    bulk_copies: bool,
}

impl Choice {
    const fn portable(image: &'static str, kernel: &'static str) -> Self {
        Choice {
            image,
            kernel,
            bulk_copies: false,
        }
    }

    const fn hopper(kernel: &'static str) -> Self {
        Choice {
            image: "attention_hopper",
            kernel,
            bulk_copies: true,
        }
    }
}

const HOPPER_128: Choice = Choice::hopper("attention_hopper_128");
const HOPPER_192: Choice = Choice::hopper("attention_hopper_192");

fn choose(device: &CudaDevice, kernel: AttentionKernel, problem: &Problem<'_>) -> Result<Choice> {
    let head_dim = problem.spec.head_dim;
    let on_hopper = device.has_hopper_kernels() && head_dim == 128;
    match kernel {
        AttentionKernel::Auto if on_hopper => {
            let blocks_apart = problem.spec.heads * problem.batch;
            Ok(
                match hopper_rows(problem.tokens, blocks_apart, device.multiprocessors() as usize) {
                    128 => HOPPER_128,
                    _ => HOPPER_192,
                },
            )
        }
        AttentionKernel::Hopper128 if on_hopper => Ok(HOPPER_128),
        AttentionKernel::Hopper192 if on_hopper => Ok(HOPPER_192),
        AttentionKernel::Hopper128 | AttentionKernel::Hopper192 => Err(Error::invalid(format!(
            "{OP}: {kernel:?} is for heads of 128 on Hopper with its own kernels in use; this is a head of {head_dim} on {}",
            device.name()
        ))),
        AttentionKernel::Auto | AttentionKernel::Portable => match head_dim {
            64 => Ok(Choice::portable("attention", "attention_64")),
            128 => Ok(Choice::portable("attention", "attention_128")),
            512 => choose_wide(device),
            _ => Err(Error::invalid(format!(
                "{OP}: there is no CUDA kernel for heads of {head_dim}, only for 64, 128 and 512"
            ))),
        },
    }
}

/// For heads of 512: the faster kernel where the GPU has the shared memory for it, which its smaller sibling names.
fn choose_wide(device: &CudaDevice) -> Result<Choice> {
    let small = Choice::portable("attention_wide", "attention_512_small");
    let [_, faster_needs, ..] = device.kernel(small.image, small.kernel)?.info().tile;
    match device.shared_memory_per_block()? >= faster_needs {
        true => Ok(Choice::portable("attention_wide", "attention_512")),
        false => Ok(small),
    }
}

/// Queries per block for Hopper: the choice with less work for the busiest multiprocessor, counting whole waves of blocks.
/// `heads` are those of all batch items together. Larger blocks read keys and values less often and win a tie.
fn hopper_rows(tokens: usize, heads: usize, multiprocessors: usize) -> usize {
    let busiest = |rows: usize| (tokens.div_ceil(rows) * heads).div_ceil(multiprocessors.max(1)) * rows;
    if busiest(128) < busiest(192) { 128 } else { 192 }
}

/// Whether a kernel writes the result in eight bits.
pub(super) fn makes_codes(device: &CudaDevice, problem: &Problem<'_>) -> bool {
    device.has_hopper_kernels() && problem.spec.head_dim == GROUP
}

/// Attention by one of Hopper's kernels, in eight bits.
pub(super) fn attention_codes(device: &Arc<CudaDevice>, problem: &Problem<'_>, result: &mut Quantised) -> Result<()> {
    let choice = choose(device, AttentionKernel::Auto, problem)?;
    let kernels = match choice == HOPPER_128 {
        true => ["attention_hopper_128_s8", "attention_hopper_128_e4m3"],
        false => ["attention_hopper_192_s8", "attention_hopper_192_e4m3"],
    };
    let choice = Choice::hopper(result.coding().of_kernels(kernels));
    let [codes, scales] = result.parts_mut();
    launch(device, choice, problem, |args| args.output(codes)?.output(scales))
}

pub(super) fn attention(
    device: &Arc<CudaDevice>,
    kernel: AttentionKernel,
    problem: &Problem<'_>,
    result: &mut Tensor,
    log_sums: Option<&mut Tensor>,
) -> Result<()> {
    let choice = choose(device, kernel, problem)?;
    launch(device, choice, problem, |args| {
        args.output(result)?.optional_output(log_sums)
    })
}

/// Launches a kernel; `results` adds what it writes to its arguments.
fn launch(
    device: &Arc<CudaDevice>,
    choice: Choice,
    problem: &Problem<'_>,
    results: impl FnOnce(Args) -> Result<Args>,
) -> Result<()> {
    let (spec, batch, tokens) = (problem.spec, problem.batch, problem.tokens);
    if spec.heads > MAX_GRID_YZ || batch > MAX_GRID_YZ || tokens > (i32::MAX >> 1) as usize {
        return Err(Error::invalid(format!(
            "{OP}: {batch} items of {tokens} tokens with {} heads are more than one launch can have",
            spec.heads
        )));
    }
    let kernel = device.kernel(choice.image, choice.kernel)?;
    let [rows, box_rows, box_columns, _] = kernel.info().tile;
    let packed = match choice.bulk_copies {
        true => Args::new().tensor_map(packed_map(problem, [box_columns, box_rows])?),
        false => Args::new().input(problem.qkv)?,
    };
    let args = results(packed.optional(problem.key_lengths)?)?
        .int(tokens)
        .int(spec.heads)
        .int(spec.kv_heads)
        .int(usize::from(spec.causal))
        .float(spec.scale * LOG2_E);
    let tiles = tokens.div_ceil(rows.max(1) as usize);
    let blocks = [grid(OP, tiles)?, grid(OP, spec.heads)?, grid(OP, batch)?];
    // SAFETY: the arguments are those that all attention kernels take, the packed rows by address or by tensor map as the
    // kernel wants them; shapes and types were checked at the door; null pointers stand for what is absent.
    unsafe { kernel.launch(device, blocks, args) }
}

/// The packed rows by boxes of one item, some tokens and some columns.
fn packed_map(problem: &Problem<'_>, [box_columns, box_rows]: [u32; 2]) -> Result<TensorMap> {
    let width = problem.spec.packed_width();
    let row_bytes = (width * DType::Bf16.size()) as u64;
    TensorMap::new(
        problem.qkv,
        &TensorMapSpec {
            extents: &[width as u64, problem.tokens as u64, problem.batch as u64],
            strides: &[row_bytes, row_bytes * problem.tokens as u64],
            tile: &[box_columns, box_rows, 1],
            swizzle: 128,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::hopper_rows;

    #[test]
    fn the_busiest_multiprocessor_decides_the_block() {
        // 22 blocks of 192 for 30 heads are five full waves of 132; 33 of 128 are seven and a half.
        assert_eq!(hopper_rows(4192, 30, 132), 192);
        // 20 waves of 192, 30 of 128: the same work, fewer reads.
        assert_eq!(hopper_rows(16640, 30, 132), 192);
        // One wave either way.
        assert_eq!(hopper_rows(512, 32, 132), 128);
        assert_eq!(hopper_rows(1, 1, 132), 128);
    }
}
