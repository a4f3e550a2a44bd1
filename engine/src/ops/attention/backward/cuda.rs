//! The gradient of attention on CUDA: which kernels, and their launches.

use std::f32::consts::LOG2_E;
use std::sync::Arc;

use super::{AttentionBackwardKernel, Gradient, OP};
use crate::device::{Args, CudaDevice, Kernel, MemoryTag, TensorMap, TensorMapSpec};
use crate::error::{Error, Result};
use crate::ops::grid;
use crate::tensor::{DType, Tensor};

/// The largest grid in its second and third dimension.
const MAX_GRID_YZ: usize = 65535;

/// The kernels that hold keys and queries.
struct Choice {
    image: &'static str,
    keys: &'static str,
    queries: &'static str,
    /// They read the packed rows and `dy` through tensor maps.
    bulk_copies: bool,
}

fn choose(device: &CudaDevice, kernel: AttentionBackwardKernel, head_dim: usize) -> Result<Choice> {
    let portable = |keys, queries| Choice {
        image: "attention_backward",
        keys,
        queries,
        bulk_copies: false,
    };
    let on_hopper = device.has_hopper_kernels() && head_dim == 128;
    match (kernel, head_dim) {
        (AttentionBackwardKernel::Auto | AttentionBackwardKernel::Hopper, _) if on_hopper => Ok(Choice {
            image: "attention_backward_hopper",
            keys: "attention_backward_hopper_keys",
            queries: "attention_backward_hopper_queries",
            bulk_copies: true,
        }),
        (AttentionBackwardKernel::Hopper, _) => Err(Error::invalid(format!(
            "{OP}: {kernel:?} is for heads of 128 on Hopper with its own kernels in use; this is a head of {head_dim} on {}",
            device.name()
        ))),
        (_, 64) => Ok(portable("attention_backward_keys_64", "attention_backward_queries_64")),
        (_, 128) => Ok(portable(
            "attention_backward_keys_128",
            "attention_backward_queries_128",
        )),
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
    for (name, heads) in [(choice.keys, spec.kv_heads), (choice.queries, spec.heads)] {
        let kernel = device.kernel(choice.image, name)?;
        let sources = match choice.bulk_copies {
            true => mapped_sources(&kernel, gradient)?,
            false => Args::new().input(gradient.forward.qkv)?.input(gradient.dy)?,
        };
        let args = sources
            .input(&stats)?
            .optional(gradient.forward.key_lengths)?
            .output(dqkv)?
            .int(tokens)
            .int(spec.heads)
            .int(spec.kv_heads)
            .int(usize::from(spec.causal))
            .float(spec.scale * LOG2_E)
            .float(spec.scale);
        let tiles = tokens.div_ceil(kernel.info().tile[0].max(1) as usize);
        let blocks = [grid(OP, tiles)?, grid(OP, heads)?, grid(OP, batch)?];
        // SAFETY: the arguments are those that all kernels of the gradient take, the packed rows and `dy` by address or by
        // tensor map as the kernel wants them; shapes and types were checked at the door; the stats are those of `row_stats`,
        // which all kernels share; a null pointer stands for absent lengths.
        unsafe { kernel.launch(device, blocks, args)? };
    }
    Ok(())
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
