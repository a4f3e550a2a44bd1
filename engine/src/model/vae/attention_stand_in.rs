//! Stands in for `ops::attention` on the CPU until that operation is there: one head, no mask. To be removed with its two lines
//! in `attention.rs`.

use crate::error::{Error, Result};
use crate::ops::linear::{Matrix, cpu_matmul};
use crate::tensor::Tensor;

/// The sizes of an attention.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub causal: bool,
    pub scale: f32,
}

/// `softmax(q · kᵀ · scale) · v` for `qkv` `[batch, tokens, 3 · head_dim]`.
pub fn attention(qkv: &Tensor, attention: &Attention, key_lengths: Option<&Tensor>) -> Result<Tensor> {
    let Attention {
        heads,
        kv_heads,
        head_dim,
        causal,
        scale,
    } = *attention;
    if (heads, kv_heads, causal, key_lengths.is_some()) != (1, 1, false, false) {
        return Err(Error::invalid("attention: only one head without a mask is there yet"));
    }
    let (batch, tokens) = (qkv.dim(0), qkv.dim(1));
    let mut output = Tensor::empty(&qkv.device(), [batch, tokens, head_dim], qkv.dtype())?;
    let width = 3 * head_dim;
    let items = qkv.as_slice::<f32>()?.chunks(tokens * width);
    for (qkv, output) in items.zip(output.as_mut_slice::<f32>()?.chunks_mut(tokens * head_dim)) {
        let matrix = |start: usize, row_stride, column_stride| Matrix {
            values: &qkv[start..],
            row_stride,
            column_stride,
        };
        let mut scores = vec![0.0; tokens * tokens];
        let (query, key, value) = (
            matrix(0, width, 1),
            matrix(head_dim, 1, width),
            matrix(2 * head_dim, width, 1),
        );
        cpu_matmul([tokens, head_dim, tokens], query, key, false, &mut scores);
        for row in scores.chunks_mut(tokens) {
            let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            row.iter_mut()
                .for_each(|score| *score = ((*score - largest) * scale).exp());
            let sum: f32 = row.iter().sum();
            row.iter_mut().for_each(|score| *score /= sum);
        }
        let weights = Matrix {
            values: &scores,
            row_stride: tokens,
            column_stride: 1,
        };
        cpu_matmul([tokens, tokens, head_dim], weights, value, false, output);
    }
    Ok(output)
}
