//! The gradient of attention on CUDA: which kernels, and their launches.

use std::f32::consts::LOG2_E;
use std::sync::Arc;

use super::{AttentionBackwardKernel, Gradient, OP};
use crate::device::{Args, CudaDevice, Kernel, MemoryTag, TensorMap, TensorMapSpec};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::grid;
use crate::tensor::Tensor;

/// The largest grid in its second and third dimension.
const MAX_GRID_YZ: usize = 65535;

/// Which kernels to launch, each on the heads and blocks that it wants.
enum Choice {
    /// Keys and then queries are held, in one launch; packed rows and `dy` are read through tensor maps.
    Hopper,
    /// Kernels that hold keys and kernels that hold queries.
    Portable { keys: &'static str, queries: &'static str },
}

fn choose(device: &CudaDevice, kernel: AttentionBackwardKernel, head_dim: usize) -> Result<Choice> {
    let on_hopper = device.has_hopper_kernels() && head_dim == 128;
    match (kernel, head_dim) {
        (AttentionBackwardKernel::Auto | AttentionBackwardKernel::Hopper, _) if on_hopper => Ok(Choice::Hopper),
        (AttentionBackwardKernel::Hopper, _) => Err(Error::invalid(format!(
            "{OP}: {kernel:?} is for heads of 128 on Hopper with its own kernels in use; this is a head of {head_dim} on {}",
            device.name()
        ))),
        (_, 64) => Ok(Choice::Portable {
            keys: "attention_backward_keys_64",
            queries: "attention_backward_queries_64",
        }),
        (_, 128) => Ok(Choice::Portable {
            keys: "attention_backward_keys_128",
            queries: "attention_backward_queries_128",
        }),
        _ => Err(Error::invalid(format!(
            "{OP}: there is no CUDA kernel for heads of {head_dim}, only for 64 and 128"
        ))),
    }
}

pub(super) fn attention_backward(
    device: &Arc<CudaDevice>,
    kernel: AttentionBackwardKernel,
    gradient: &Gradient<'_>,
    dqkv: &mut Tensor,
) -> Result<()> {
    let (spec, batch, tokens) = (gradient.forward.spec, gradient.forward.batch, gradient.forward.tokens);
    if spec.heads > MAX_GRID_YZ || batch > MAX_GRID_YZ || tokens > (i32::MAX >> 1) as usize {
        return Err(Error::invalid(format!(
            "{OP}: {batch} items of {tokens} tokens with {} heads are more than one launch can have",
            spec.heads
        )));
    }
    let choice = choose(device, kernel, spec.head_dim)?;
    let stats = row_stats(device, gradient)?;
    match choice {
        Choice::Hopper => launch_hopper(device, gradient, &stats, dqkv),
        Choice::Portable { keys, queries } => {
            for (name, heads) in [(keys, spec.kv_heads), (queries, spec.heads)] {
                let kernel = device.kernel("attention_backward", name)?;
                let sources = Args::new().input(gradient.forward.qkv)?.input(gradient.dy)?;
                let args = sources
                    .input(&stats)?
                    .optional(gradient.forward.key_lengths)?
                    .output(dqkv)?;
                let tiles = tokens.div_ceil(kernel.info().tile[0].max(1) as usize);
                let blocks = [grid(OP, tiles)?, grid(OP, heads)?, grid(OP, batch)?];
                // SAFETY: the arguments are those of the kernels of `attention_backward.cu`; shapes and types were checked at
                // the door; the stats are those of `row_stats`; a null pointer stands for absent lengths.
                unsafe { kernel.launch(device, blocks, scalars(args, gradient))? };
            }
            Ok(())
        }
    }
}

fn launch_hopper(device: &CudaDevice, gradient: &Gradient<'_>, stats: &Tensor, dqkv: &mut Tensor) -> Result<()> {
    let (spec, batch, tokens) = (gradient.forward.spec, gradient.forward.batch, gradient.forward.tokens);
    let kernel = device.kernel("attention_backward_hopper", "attention_backward_hopper")?;
    let sources = mapped_sources(&kernel, gradient)?.input(stats)?;
    let args = sources.optional(gradient.forward.key_lengths)?.output(dqkv)?.int(batch);
    let tiles = tokens.div_ceil(kernel.info().tile[0].max(1) as usize);
    let blocks = grid(OP, tiles * (spec.kv_heads + spec.heads) * batch)?;
    // SAFETY: the arguments are those of the kernel; shapes and types were checked at the door; the stats are those of
    // `row_stats`; one block per tile of keys and of queries; a null pointer stands for absent lengths.
    unsafe { kernel.launch(device, [blocks, 1, 1], scalars(args, gradient)) }
}

/// The last arguments of all kernels.
fn scalars(args: Args, gradient: &Gradient<'_>) -> Args {
    let spec = gradient.forward.spec;
    args.int(gradient.forward.tokens)
        .int(spec.heads)
        .int(spec.kv_heads)
        .int(usize::from(spec.causal))
        .float(spec.scale * LOG2_E)
        .float(spec.scale)
}

/// What each row of queries brings along, as described in `cuda/common/attention_backward.cuh`.
fn row_stats(device: &Arc<CudaDevice>, gradient: &Gradient<'_>) -> Result<Tensor> {
    let (spec, batch, tokens) = (gradient.forward.spec, gradient.forward.batch, gradient.forward.tokens);
    let kernel = device.kernel("attention_backward", "attention_backward_rows")?;
    let [heads_per_block, tile_rows, ..] = kernel.info().tile.map(|extent| extent.max(1) as usize);
    let tiles = tokens.div_ceil(tile_rows);
    let _tag = MemoryTag::Workspace.scope();
    let shape = [batch, spec.heads, tiles, 2, tile_rows];
    let mut stats = Tensor::empty(&gradient.dy.device(), shape, DType::F32)?;
    let args = Args::new()
        .input(gradient.dy)?
        .input(gradient.out)?
        .input(gradient.lse)?
        .output(&mut stats)?
        .int(tokens)
        .int(spec.heads)
        .int(spec.head_dim);
    let blocks = [
        grid(OP, tiles * tile_rows)?,
        grid(OP, spec.heads.div_ceil(heads_per_block))?,
        grid(OP, batch)?,
    ];
    // SAFETY: the arguments are those of `attention_backward_rows`, of the shapes and types checked at the door; the heads'
    // width is one of those that `choose` lets pass.
    unsafe { kernel.launch(device, blocks, args)? };
    Ok(stats)
}

/// The packed rows and `dy`, each by boxes of one item, some tokens and some columns.
fn mapped_sources(kernel: &Kernel, gradient: &Gradient<'_>) -> Result<Args> {
    let [_, box_rows, box_columns, _] = kernel.info().tile;
    let map = |tensor: &Tensor| {
        let width = tensor.dim(2);
        let row_bytes = (width * DType::Bf16.size()) as u64;
        TensorMap::new(
            tensor,
            &TensorMapSpec {
                extents: &[width as u64, tensor.dim(1) as u64, tensor.dim(0) as u64],
                strides: &[row_bytes, row_bytes * tensor.dim(1) as u64],
                tile: &[box_columns, box_rows, 1],
                swizzle: 128,
            },
        )
    };
    Ok(Args::new()
        .tensor_map(map(gradient.forward.qkv)?)
        .tensor_map(map(gradient.dy)?))
}
