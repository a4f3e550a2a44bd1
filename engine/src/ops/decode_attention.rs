//! Attention of one new token of each item, whose predecessors' keys and values stand in a cache.
//!
//! [`decode_attention`] takes the packed projection `qkv` `[items, 1, (heads + 2·kv_heads)·head_dim]` of the new tokens, normalises and
//! turns their queries and keys as [`super::qk_norm_rope`] does, by the angles in row `position` of `table` `[1, rows, head_dim / 2, 2]`,
//! puts key and value into the cache at `position`, and gives `[items, 1, heads·head_dim]`, where every query head sees the keys at
//! positions 0 to `position` of its item and key head. `positions` is `[items]` in i32, on the device, so that recorded work serves every
//! length; an item whose position lies outside cache or table (−1: nobody is there) leaves the cache alone, and its result is zero.
//!
//! The cache is `[2, items, kv_heads, capacity, head_dim]` in the compute type, keys first. [`keep_keys`] puts the keys and values of a
//! whole prompt there. Positions and what the cache holds have to be there before the operation ahead of this one begins, for on CUDA they
//! are read while that still runs; a step's tokens and positions, which come from the host, see to it. On CUDA heads are 128 wide, no more than 8 share a key head, and queries are not rounded on the way; the keys of
//! an item are divided among blocks, whose results are put together by their log-sum-exp. Source: Dao et al., "Flash-Decoding for
//! long-context inference" (2023).

use std::sync::Arc;

use rayon::prelude::*;

use super::qk_norm_rope::{QkNormRope, Rotation, qk_norm_rope_from};
use super::{TokenSizes, grid, launch_overlapped};
use crate::device::{Args, CudaDevice, Device, Kernel};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

const OP: &str = "decode_attention";
const IMAGE: &str = "decode_attention";

/// Blocks per multiprocessor that suffice to keep memory busy.
const BLOCKS_EACH: usize = 2;

/// The keys and values of a layer's earlier tokens.
pub struct KeyCache {
    /// `[2, items, kv_heads, capacity, head_dim]`
    values: Tensor,
}

/// What the blocks of one launch leave for each other; one serves all layers, one after the other.
pub struct DecodeScratch {
    items: usize,
    kv_heads: usize,
    parts: Option<Parts>,
}

/// On CUDA.
struct Parts {
    /// f32 `[items, kv_heads, runs, heads / kv_heads, head_dim + 4]`
    partial: Tensor,
    /// i32 `[items, kv_heads]`, zero between launches.
    arrived: Tensor,
    runs: usize,
}

impl KeyCache {
    /// A cache for `items` items of at most `capacity` tokens.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(device: &Device, items: usize, kv_heads: usize, capacity: usize, head_dim: usize) -> Result<Self> {
        // Zeros: what a key past an item's end holds has no weight, but a NaN times zero would be one.
        let shape = [2, items, kv_heads, capacity, head_dim];
        Ok(KeyCache {
            values: Tensor::zeros(device, shape, device.compute_dtype())?,
        })
    }

    /// The tokens of an item that there is room for.
    pub fn capacity(&self) -> usize {
        self.values.dim(3)
    }

    /// Items.
    pub fn items(&self) -> usize {
        self.values.dim(1)
    }

    /// Keys, then values, `[2, items, kv_heads, capacity, head_dim]`.
    pub fn tensor(&self) -> &Tensor {
        &self.values
    }
}

impl DecodeScratch {
    /// What [`decode_attention`] needs for caches of these sizes.
    ///
    /// # Errors
    /// When the device has no room or no kernel for such heads.
    pub fn new(device: &Device, items: usize, spec: &QkNormRope<'_>, capacity: usize) -> Result<Self> {
        let (heads, kv_heads) = (spec.heads, spec.kv_heads);
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(Error::invalid(format!(
                "{OP}: {heads} query heads cannot share {kv_heads} key and value heads"
            )));
        }
        let parts = match device {
            Device::Cpu => None,
            Device::Cuda(cuda) => {
                let kernel = kernel(cuda, spec)?;
                let [_, shortest, most, _] = kernel.info().tile.map(|size| size.max(1) as usize);
                let apart = (items * kv_heads).max(1);
                let runs = (BLOCKS_EACH * cuda.multiprocessors() as usize).div_ceil(apart);
                let runs = runs.clamp(1, most).min(capacity.div_ceil(shortest).max(1));
                let shape = [items, kv_heads, runs, heads / kv_heads, spec.head_dim + 4];
                Some(Parts {
                    partial: Tensor::empty(device, shape, DType::F32)?,
                    arrived: Tensor::zeros(device, [items, kv_heads], DType::I32)?,
                    runs,
                })
            }
        };
        Ok(DecodeScratch { items, kv_heads, parts })
    }
}

/// One step of every item; see the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit, or there is no CUDA kernel for the heads.
pub fn decode_attention(
    qkv: &Tensor,
    spec: &QkNormRope<'_>,
    table: &Tensor,
    positions: &Tensor,
    cache: &mut KeyCache,
    scratch: &mut DecodeScratch,
) -> Result<Tensor> {
    let sizes = TokenSizes::of(OP, "qkv", qkv)?;
    let items = sizes.batch;
    qkv.ensure_shape(OP, "qkv", [items, 1, spec.width()])?;
    spec.expect(OP, 1, table.shape().get(1).copied().unwrap_or(0), table, qkv)?;
    table.ensure_shape(OP, "table", [1, table.dim(1), spec.head_dim / 2, 2])?;
    positions.ensure_shape(OP, "positions", [items])?;
    positions.ensure_dtype(OP, "positions", DType::I32)?;
    positions.ensure_device(OP, "positions", &qkv.device())?;
    ensure_cache(OP, cache, spec, items, qkv)?;
    if scratch.items != items || scratch.kv_heads != spec.kv_heads {
        return Err(Error::invalid(format!(
            "{OP}: the scratch is for {} items of {} key heads, these are {items} of {}",
            scratch.items, scratch.kv_heads, spec.kv_heads
        )));
    }
    if spec.rotation != Rotation::HalfSplit {
        return Err(Error::invalid(format!("{OP}: pairs are those of halves of a head")));
    }
    let result = Tensor::empty_compute(&qkv.device(), [items, 1, spec.heads * spec.head_dim])?;
    let _op = crate::profile::op(OP, qkv, 0, qkv.bytes() + result.bytes());
    let step = Step {
        qkv,
        spec,
        table,
        positions,
    };
    match qkv.cuda() {
        None => step.on_cpu(cache, result),
        Some(device) => step.on_cuda(device, cache, scratch, result),
    }
}

/// Puts the keys and values of a prompt's tokens into an item's cache, from the first position on. `qkv`
/// `[1, tokens, (heads + 2·kv_heads)·head_dim]` is normalised and turned already.
///
/// # Errors
/// When shapes, types or devices do not fit, or there are more tokens than the cache takes.
pub fn keep_keys(qkv: &Tensor, spec: &QkNormRope<'_>, cache: &mut KeyCache, item: usize) -> Result<()> {
    const OP: &str = "keep_keys";
    let sizes = TokenSizes::of(OP, "qkv", qkv)?;
    qkv.ensure_shape(OP, "qkv", [1, sizes.tokens, spec.width()])?;
    let (items, capacity) = (cache.items(), cache.capacity());
    ensure_cache(OP, cache, spec, items, qkv)?;
    if item >= items || sizes.tokens > capacity {
        return Err(Error::invalid(format!(
            "{OP}: {} tokens of item {item} do not fit a cache of {items} items of {capacity} tokens",
            sizes.tokens
        )));
    }
    let (heads, kv_heads, head_dim) = (spec.heads, spec.kv_heads, spec.head_dim);
    let _op = crate::profile::op(
        OP,
        qkv,
        0,
        2 * 2 * sizes.tokens * kv_heads * head_dim * qkv.dtype().size(),
    );
    let Some(device) = qkv.cuda() else {
        let rows = qkv.as_slice::<f32>()?.chunks(spec.width());
        let values = cache.values.as_mut_slice::<f32>()?;
        for (token, row) in rows.enumerate() {
            let kept = row[heads * head_dim..].chunks(head_dim).enumerate();
            for (head, from) in kept {
                let (kind, kv_head) = (head / kv_heads, head % kv_heads);
                let place = ((kind * items + item) * kv_heads + kv_head) * capacity + token;
                values[place * head_dim..][..head_dim].copy_from_slice(from);
            }
        }
        return Ok(());
    };
    if !head_dim.is_multiple_of(8) {
        return Err(Error::invalid(format!(
            "{OP}: heads of {head_dim} elements are not a multiple of 8, which the CUDA kernel needs"
        )));
    }
    let kernel = device.kernel(IMAGE, OP)?;
    let args = Args::new()
        .input(qkv)?
        .output(&mut cache.values)?
        .int(item)
        .int(items)
        .int(heads)
        .int(kv_heads)
        .int(capacity)
        .int(head_dim / 8);
    // SAFETY: the arguments are those of `keep_keys`, of the shapes and types checked above; one block per token, of which there are no
    // more than the cache takes.
    unsafe { kernel.launch(device, [grid(OP, sizes.tokens)?, 1, 1], args) }
}

fn ensure_cache(op: &'static str, cache: &KeyCache, spec: &QkNormRope<'_>, items: usize, qkv: &Tensor) -> Result<()> {
    let shape = [2, items, spec.kv_heads, cache.capacity(), spec.head_dim];
    cache.values.ensure_shape(op, "cache", shape)?;
    cache.values.ensure_device(op, "cache", &qkv.device())
}

/// What was checked at the door.
struct Step<'a> {
    qkv: &'a Tensor,
    spec: &'a QkNormRope<'a>,
    table: &'a Tensor,
    positions: &'a Tensor,
}

impl Step<'_> {
    fn on_cpu(&self, cache: &mut KeyCache, mut result: Tensor) -> Result<Tensor> {
        let (heads, kv_heads, dim) = (self.spec.heads, self.spec.kv_heads, self.spec.head_dim);
        let (items, capacity, rows) = (cache.items(), cache.capacity(), self.table.dim(1));
        let positions = self.positions.as_slice::<i32>()?;
        let inside = |position: i32| {
            usize::try_from(position)
                .ok()
                .filter(|&position| position < capacity.min(rows))
        };
        let results = result.as_mut_slice::<f32>()?;
        results.fill(0.0);
        for (item, &position) in positions.iter().enumerate() {
            let Some(position) = inside(position) else { continue };
            let angles = self.table.reshape([rows, 1, dim / 2, 2])?.narrow(position, 1)?;
            let turned = qk_norm_rope_from(&self.qkv.narrow(item, 1)?, self.spec, &angles)?;
            let turned = turned.as_slice::<f32>()?;
            let values = cache.values.as_mut_slice::<f32>()?;
            for (head, from) in turned[heads * dim..].chunks(dim).enumerate() {
                let (kind, kv_head) = (head / kv_heads, head % kv_heads);
                let place = ((kind * items + item) * kv_heads + kv_head) * capacity + position;
                values[place * dim..][..dim].copy_from_slice(from);
            }
            let values = &*values;
            let run = |kind: usize, kv_head: usize| {
                let first = ((kind * items + item) * kv_heads + kv_head) * capacity * dim;
                &values[first..first + (position + 1) * dim]
            };
            let of_item = &mut results[item * heads * dim..][..heads * dim];
            of_item.par_chunks_mut(dim).enumerate().for_each(|(head, output)| {
                let kv_head = head / (heads / kv_heads);
                attend(&turned[head * dim..][..dim], run(0, kv_head), run(1, kv_head), output);
            });
        }
        Ok(result)
    }

    fn on_cuda(
        &self,
        device: &CudaDevice,
        cache: &mut KeyCache,
        scratch: &mut DecodeScratch,
        mut result: Tensor,
    ) -> Result<Tensor> {
        let Some(Parts { partial, arrived, runs }) = &mut scratch.parts else {
            return Err(Error::invalid(format!("{OP}: the scratch is for the CPU")));
        };
        let items = self.qkv.dim(0);
        partial.ensure_device(OP, "scratch", &self.qkv.device())?;
        partial.ensure_shape(
            OP,
            "scratch",
            [
                items,
                self.spec.kv_heads,
                *runs,
                self.spec.heads / self.spec.kv_heads,
                self.spec.head_dim + 4,
            ],
        )?;
        let kernel = kernel(device, self.spec)?;
        let capacity = cache.capacity();
        let args = Args::new()
            .input(self.qkv)?
            .input(self.spec.q_weight)?
            .input(self.spec.k_weight)?
            .input(self.table)?
            .input(self.positions)?
            .output(&mut cache.values)?
            .output(&mut result)?
            .output(partial)?
            .output(arrived)?
            .int(self.spec.heads)
            .int(self.spec.kv_heads)
            .int(capacity)
            .int(self.table.dim(1))
            .float(self.spec.epsilon)
            .float(std::f32::consts::LOG2_E / (self.spec.head_dim as f32).sqrt());
        let blocks = [grid(OP, *runs)?, grid(OP, self.spec.kv_heads)?, grid(OP, items)?];
        // SAFETY: the arguments are those of the kernels, of the shapes and types checked at the door; what the blocks leave for each other has
        // a place for every run of this grid. Ahead of the wait they read
        // positions and the cache alone, which are there since before the kernel ahead began, as the module's head demands.
        unsafe { launch_overlapped(device, &kernel, blocks, args)? };
        Ok(result)
    }
}

/// One query's result over these keys and values, row by row; the scores' scale is `1/√dim`.
fn attend(query: &[f32], keys: &[f32], values: &[f32], output: &mut [f32]) {
    let dim = query.len();
    let scale = 1.0 / (dim as f32).sqrt();
    let score = |key: &[f32]| scale * key.iter().zip(query).map(|(k, q)| k * q).sum::<f32>();
    let scores: Vec<f32> = keys.chunks(dim).map(score).collect();
    let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for (score, value) in scores.iter().zip(values.chunks(dim)) {
        let weight = (score - top).exp();
        sum += weight;
        output
            .iter_mut()
            .zip(value)
            .for_each(|(output, value)| *output += weight * value);
    }
    output.iter_mut().for_each(|output| *output /= sum);
}

/// The kernel for these heads.
fn kernel(device: &CudaDevice, spec: &QkNormRope<'_>) -> Result<Arc<Kernel>> {
    /// The width of heads that the kernels are for.
    const HEAD_DIM: usize = 128;
    let group = spec.heads / spec.kv_heads.max(1);
    let name = match group {
        _ if spec.head_dim != HEAD_DIM => None,
        0..=2 => Some("decode_attention_2"),
        3..=4 => Some("decode_attention_4"),
        5..=8 => Some("decode_attention_8"),
        _ => None,
    };
    let name = name.ok_or_else(|| {
        Error::invalid(format!(
            "{OP}: {group} heads of {} elements that share a key head; the CUDA kernels are for at most 8 of {HEAD_DIM}",
            spec.head_dim
        ))
    })?;
    device.kernel(IMAGE, name)
}
