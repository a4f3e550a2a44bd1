//! Putting token sequences together and taking them apart. All sequences are `[batch, tokens, dim]`; on CUDA `dim` is a
//! multiple of 8.
//!
//! * [`concat_tokens`], [`concat_all`]: one sequence after the other, item by item
//! * [`narrow_tokens`]: some consecutive tokens of every item
//! * [`pad_tokens`]: zero tokens at the end, up to a given length
//! * [`stack_tokens`]: sequences of one item each and of different lengths, one item after the other, zeros at the end
//! * [`fill_pad_tokens`]: overwrites every token at or past its item's length with a learned pad token
//!
//! Backward: putting together and taking apart are each other's; the pad token's gradient is
//! [`super::sum_rows::add_pad_row_sum`].

use rayon::prelude::*;

use super::{TokenSizes, ensure_parameter, grid};
use crate::device::{Args, CudaDevice};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// What a CUDA thread moves at once.
const VECTOR_BYTES: u64 = 16;

/// `[batch, first tokens + second tokens, dim]`: the tokens of `first`, then those of `second`.
///
/// # Errors
/// When shapes, types or devices do not fit.
pub fn concat_tokens(first: &Tensor, second: &Tensor) -> Result<Tensor> {
    concat_all(&[first, second])
}

/// `[batch, tokens of all, dim]`: the tokens of each part, one part after the other. The parts may also be f32 tables of
/// vectors.
///
/// # Errors
/// When shapes, types or devices do not fit, or there is no part.
pub fn concat_all(parts: &[&Tensor]) -> Result<Tensor> {
    const OP: &str = "concat_tokens";
    let first = parts
        .first()
        .ok_or_else(|| Error::invalid(format!("{OP}: nothing to put together")))?;
    first.ensure_rank(OP, "part 0", 3, "[batch, tokens, dim]")?;
    let [batch, dim] = [first.dim(0), first.dim(2)];
    let mut spans = Vec::with_capacity(parts.len());
    let mut tokens = 0;
    for (index, part) in parts.iter().enumerate() {
        let name = format!("part {index}");
        part.ensure_rank(OP, &name, 3, "[batch, tokens, dim]")?;
        part.ensure_shape(OP, &name, [batch, part.dim(1), dim])?;
        part.ensure_dtype(OP, &name, first.dtype())?;
        part.ensure_device(OP, &name, &first.device())?;
        spans.push(Span::of_tokens(Some(part), 0, tokens, part.dim(1)));
        tokens += part.dim(1);
    }
    let mut output = Tensor::empty(&first.device(), [batch, tokens, dim], first.dtype())?;
    let _op = crate::profile::op(OP, first, 0, 2 * output.bytes());
    copy_spans(OP, &spans, &mut output)?;
    Ok(output)
}

/// The tokens `start .. start + count` of every item. With a batch of 1 this is a view that shares the buffer of `x`,
/// otherwise a copy.
///
/// # Errors
/// When they reach past the end, or shape or type do not fit.
pub fn narrow_tokens(x: &Tensor, start: usize, count: usize) -> Result<Tensor> {
    const OP: &str = "narrow_tokens";
    let sizes = TokenSizes::of(OP, "x", x)?;
    if start.checked_add(count).is_none_or(|end| end > sizes.tokens) {
        return Err(Error::Shape {
            op: OP,
            tensor: "x".into(),
            expected: format!("at least {} tokens", start.saturating_add(count)),
            found: x.shape(),
        });
    }
    if x.cuda().is_some() {
        // Also of a view: the kernels that read it need rows that start at multiples of 16 bytes.
        sizes.ensure_vectors(OP)?;
    }
    if sizes.batch == 1 {
        let rows = x.reshape([sizes.tokens, sizes.dim])?.narrow(start, count)?;
        return rows.reshape([1, count, sizes.dim]);
    }
    let mut output = Tensor::empty(&x.device(), [sizes.batch, count, sizes.dim], x.dtype())?;
    let _op = crate::profile::op(OP, x, 0, 2 * output.bytes());
    copy_spans(OP, &[Span::of_tokens(Some(x), start, 0, count)], &mut output)?;
    Ok(output)
}

/// `x` with zero tokens appended up to `to_length` tokens; `x` itself, sharing its buffer, if it has that many.
///
/// # Errors
/// When `x` is longer, or its shape or type do not fit.
pub fn pad_tokens(x: &Tensor, to_length: usize) -> Result<Tensor> {
    const OP: &str = "pad_tokens";
    let sizes = TokenSizes::of(OP, "x", x)?;
    if sizes.tokens == to_length {
        return Ok(x.clone());
    }
    let Some(missing) = to_length.checked_sub(sizes.tokens) else {
        return Err(Error::Shape {
            op: OP,
            tensor: "x".into(),
            expected: format!("at most {to_length} tokens"),
            found: x.shape(),
        });
    };
    let mut output = Tensor::empty(&x.device(), [sizes.batch, to_length, sizes.dim], x.dtype())?;
    let _op = crate::profile::op(OP, x, 0, x.bytes() + output.bytes());
    let spans = [
        Span::of_tokens(Some(x), 0, 0, sizes.tokens),
        Span::of_tokens(None, 0, sizes.tokens, missing),
    ];
    copy_spans(OP, &spans, &mut output)?;
    Ok(output)
}

/// `[parts, to_length, dim]`: each of the parts, `[1, tokens, dim]`, as an item of its own, with zero tokens up to `to_length`.
///
/// # Errors
/// When a part is longer, or shapes, types or devices do not fit.
pub fn stack_tokens(parts: &[&Tensor], to_length: usize) -> Result<Tensor> {
    const OP: &str = "stack_tokens";
    let first = parts
        .first()
        .ok_or_else(|| Error::invalid(format!("{OP}: nothing to put together")))?;
    let dim = TokenSizes::of(OP, "part 0", first)?.dim;
    let mut spans = Vec::with_capacity(2 * parts.len());
    for (index, part) in parts.iter().enumerate() {
        let name = format!("part {index}");
        let tokens = TokenSizes::of(OP, &name, part)?.tokens.min(to_length);
        part.ensure_shape(OP, &name, [1, tokens, dim])?;
        part.ensure_device(OP, &name, &first.device())?;
        spans.push(Span::of_tokens(Some(part), 0, index * to_length, tokens));
        if tokens < to_length {
            spans.push(Span::of_tokens(None, 0, index * to_length + tokens, to_length - tokens));
        }
    }
    // Items of equal length, one behind the other, are one long item until they are reshaped.
    let mut output = Tensor::empty(&first.device(), [1, parts.len() * to_length, dim], first.dtype())?;
    copy_spans(OP, &spans, &mut output)?;
    output.into_shape([parts.len(), to_length, dim])
}

/// Overwrites the tokens of `x` `[batch, tokens, dim]` whose index is at least their item's entry of `lengths` (i32 `[batch]`)
/// with `pad` `[dim]`.
///
/// # Errors
/// When shapes, types or devices do not fit, or `x` shares its buffer.
pub fn fill_pad_tokens(x: &mut Tensor, lengths: &Tensor, pad: &Tensor) -> Result<()> {
    const OP: &str = "fill_pad_tokens";
    let sizes = TokenSizes::of(OP, "x", x)?;
    lengths.ensure_shape(OP, "lengths", [sizes.batch])?;
    lengths.ensure_dtype(OP, "lengths", DType::I32)?;
    lengths.ensure_device(OP, "lengths", &x.device())?;
    ensure_parameter(OP, "pad", pad, &[sizes.dim], x)?;
    let _op = crate::profile::op(OP, x, 0, pad.bytes());
    match x.cuda().cloned() {
        None => cpu_fill_pad(x, lengths, pad, sizes),
        Some(device) => cuda_fill_pad(OP, &device, x, lengths, pad, sizes),
    }
}

/// Consecutive tokens of every item of one tensor, and where they go in another; zeros where there is no source.
struct Span<'a> {
    source: Option<&'a Tensor>,
    source_start: usize,
    target_start: usize,
    tokens: usize,
}

impl<'a> Span<'a> {
    fn of_tokens(source: Option<&'a Tensor>, source_start: usize, target_start: usize, tokens: usize) -> Self {
        Span {
            source,
            source_start,
            target_start,
            tokens,
        }
    }
}

/// Fills `target` `[batch, tokens, dim]` span by span; batch and dim of the sources are the same.
fn copy_spans(op: &'static str, spans: &[Span<'_>], target: &mut Tensor) -> Result<()> {
    let sizes = TokenSizes {
        batch: target.dim(0),
        tokens: target.dim(1),
        dim: target.dim(2),
    };
    let device = target.cuda().cloned();
    for span in spans {
        match &device {
            None => cpu_copy_span(span, sizes, target)?,
            Some(device) => cuda_copy_span(op, device, span, sizes, target)?,
        }
    }
    Ok(())
}

fn cpu_copy_span(span: &Span<'_>, sizes: TokenSizes, target: &mut Tensor) -> Result<()> {
    let count = span.tokens * sizes.dim;
    let target = target.as_mut_slice::<f32>()?;
    for item in 0..sizes.batch {
        let target = &mut target[(item * sizes.tokens + span.target_start) * sizes.dim..][..count];
        match span.source {
            Some(source) => {
                let start = (item * source.dim(1) + span.source_start) * sizes.dim;
                target.copy_from_slice(&source.as_slice::<f32>()?[start..start + count]);
            }
            None => target.fill(0.0),
        }
    }
    Ok(())
}

fn cpu_fill_pad(x: &mut Tensor, lengths: &Tensor, pad: &Tensor, sizes: TokenSizes) -> Result<()> {
    if sizes.dim == 0 {
        return Ok(());
    }
    let (lengths, pad) = (lengths.as_slice::<i32>()?, pad.as_slice::<f32>()?);
    let rows = x.as_mut_slice::<f32>()?.par_chunks_mut(sizes.dim).enumerate();
    rows.for_each(|(row, values)| {
        let (item, token) = (row / sizes.tokens, row % sizes.tokens);
        if token as i64 >= i64::from(lengths[item]) {
            values.copy_from_slice(pad);
        }
    });
    Ok(())
}

fn cuda_copy_span(
    op: &'static str,
    device: &CudaDevice,
    span: &Span<'_>,
    sizes: TokenSizes,
    target: &mut Tensor,
) -> Result<()> {
    sizes.ensure_vectors(op)?;
    let kernel = device.kernel("tokens", "copy_span")?;
    let token_bytes = (sizes.dim * target.dtype().size()) as u64;
    let token_vectors = token_bytes / VECTOR_BYTES;
    let (source, source_tokens) = match span.source {
        Some(source) => (
            source.device_ptr()? + span.source_start as u64 * token_bytes,
            source.dim(1) as u64,
        ),
        None => (0, 0),
    };
    let vectors = span.tokens as u64 * token_vectors;
    let blocks_per_item = (vectors as usize).div_ceil(kernel.info().tile[0] as usize);
    let args = Args::new()
        .long(source)
        .long(target.device_ptr_mut()? + span.target_start as u64 * token_bytes)
        .long(vectors)
        .long(source_tokens * token_vectors)
        .long(sizes.tokens as u64 * token_vectors)
        .int(grid(op, blocks_per_item)? as usize);
    // SAFETY: the arguments are those of `copy_span`; source and target hold `vectors` vectors of 16 bytes per item from
    // these addresses on, at these strides, as the callers' checks have established; the target is not shared.
    unsafe { kernel.launch(device, [grid(op, blocks_per_item * sizes.batch)?, 1, 1], args) }
}

fn cuda_fill_pad(
    op: &'static str,
    device: &CudaDevice,
    x: &mut Tensor,
    lengths: &Tensor,
    pad: &Tensor,
    sizes: TokenSizes,
) -> Result<()> {
    sizes.ensure_vectors(op)?;
    let kernel = device.kernel("tokens", op)?;
    let rows = grid(op, sizes.rows())?;
    let blocks = rows.div_ceil(kernel.info().tile[0]);
    let args = Args::new()
        .output(x)?
        .input(lengths)?
        .input(pad)?
        .int(sizes.tokens)
        .int(rows as usize)
        .int(sizes.dim / 8);
    // SAFETY: the arguments are those of `fill_pad_tokens`, of the shapes and types checked at the door; the blocks cover
    // every row.
    unsafe { kernel.launch(device, [blocks, 1, 1], args) }
}
