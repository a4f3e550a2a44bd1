//! The gradient of attention on the CPU: the definition.

use rayon::prelude::*;

use super::Gradient;
use crate::error::Result;
use crate::ops::linear::{Matrix, cpu_matmul_in_thread};
use crate::tensor::Tensor;

/// Tokens that one task handles at a time, first as queries and then as keys.
const ROWS: usize = 64;

pub(super) fn attention_backward(gradient: &Gradient<'_>, dqkv: &mut Tensor) -> Result<()> {
    let (tokens, spec) = (gradient.forward.tokens, gradient.forward.spec);
    let qkv = gradient.forward.qkv.as_slice::<f32>()?;
    let (dy, out, lse) = (
        gradient.dy.as_slice()?,
        gradient.out.as_slice()?,
        gradient.lse.as_slice()?,
    );
    let lengths = gradient.forward.key_lengths.map(Tensor::as_slice::<i32>).transpose()?;
    let delta = row_products(gradient, dy, out);
    let (packed, width) = (spec.packed_width(), spec.width());
    let items: Vec<Item<'_>> = (0..gradient.forward.batch)
        .map(|item| Item {
            gradient,
            qkv: &qkv[item * tokens * packed..][..tokens * packed],
            dy: &dy[item * tokens * width..][..tokens * width],
            lse: &lse[item * spec.heads * tokens..][..spec.heads * tokens],
            delta: &delta[item * spec.heads * tokens..][..spec.heads * tokens],
            keys: lengths.map_or(tokens, |lengths| lengths[item].clamp(0, tokens as i32) as usize),
        })
        .collect();
    let mut blocks = Vec::new();
    for (item, rows) in items
        .iter()
        .zip(dqkv.as_mut_slice::<f32>()?.chunks_mut(tokens * packed))
    {
        blocks.extend(
            rows.chunks_mut(ROWS * packed)
                .enumerate()
                .map(|(index, rows)| (item, index * ROWS, rows)),
        );
    }
    blocks.into_par_iter().for_each(|(item, first, rows)| {
        (0..spec.heads).for_each(|head| item.queries(head, first, rows));
        (0..spec.kv_heads).for_each(|head| item.keys_and_values(head, first, rows));
    });
    Ok(())
}

/// `dy · out` for each batch item, head and query, in this order.
fn row_products(gradient: &Gradient<'_>, dy: &[f32], out: &[f32]) -> Vec<f32> {
    let (tokens, heads, dim) = (
        gradient.forward.tokens,
        gradient.forward.spec.heads,
        gradient.forward.spec.head_dim,
    );
    let rows = gradient.forward.batch * heads * tokens;
    let product = |row: usize| -> f32 {
        let (item, head, query) = (row / (heads * tokens), row / tokens % heads, row % tokens);
        let start = ((item * tokens + query) * heads + head) * dim;
        let pairs = dy[start..start + dim].iter().zip(&out[start..start + dim]);
        pairs.map(|(dy, out)| dy * out).sum()
    };
    (0..rows).into_par_iter().map(product).collect()
}

/// One batch item.
struct Item<'a> {
    gradient: &'a Gradient<'a>,
    /// `[tokens, packed width]`.
    qkv: &'a [f32],
    /// `[tokens, width]`.
    dy: &'a [f32],
    /// `[heads, tokens]`.
    lse: &'a [f32],
    /// `[heads, tokens]`.
    delta: &'a [f32],
    /// The item's number of keys.
    keys: usize,
}

impl Item<'_> {
    /// The packed rows from `row` on, those of packed head `head`, as a matrix.
    fn packed(&self, row: usize, head: usize) -> Matrix<'_> {
        let spec = self.gradient.forward.spec;
        let width = spec.packed_width();
        Matrix {
            values: &self.qkv[row * width + head * spec.head_dim..],
            row_stride: width,
            column_stride: 1,
        }
    }

    /// The gradients of the result's rows from `row` on, those of query head `head`, as a matrix.
    fn dy(&self, row: usize, head: usize) -> Matrix<'_> {
        let spec = self.gradient.forward.spec;
        let width = spec.width();
        Matrix {
            values: &self.dy[row * width + head * spec.head_dim..],
            row_stride: width,
            column_stride: 1,
        }
    }

    /// Turns a score and the product `dy · v` of query `query` and key `key` into `w` and `scale · ds`.
    fn weigh(&self, head: usize, query: usize, key: usize, score: &mut f32, product: &mut f32) {
        let spec = self.gradient.forward.spec;
        let seen = key < self.keys && !(spec.causal && key > query);
        let row = head * self.gradient.forward.tokens + query;
        *score = if seen {
            (spec.scale * *score - self.lse[row]).exp()
        } else {
            0.0
        };
        *product = if seen {
            spec.scale * *score * (*product - self.delta[row])
        } else {
            0.0
        };
    }

    /// Writes the gradients of the queries from `first` on, as many as there are in `rows`.
    fn queries(&self, head: usize, first: usize, rows: &mut [f32]) {
        let spec = self.gradient.forward.spec;
        let (dim, width) = (spec.head_dim, spec.packed_width());
        let count = rows.len() / width;
        let keys = if spec.causal {
            self.keys.min(first + count)
        } else {
            self.keys
        };
        let columns = rows.chunks_mut(width).map(|row| &mut row[head * dim..][..dim]);
        if keys == 0 {
            return columns.for_each(|row| row.fill(0.0));
        }
        let key_head = spec.heads + head / (spec.heads / spec.kv_heads);
        let (mut scores, mut products) = (vec![0.0; count * keys], vec![0.0; count * keys]);
        let extents = [count, dim, keys];
        let (q, k) = (self.packed(first, head), self.packed(0, key_head));
        cpu_matmul_in_thread(extents, q, k.transposed(), &mut scores);
        let v = self.packed(0, key_head + spec.kv_heads);
        cpu_matmul_in_thread(extents, self.dy(first, head), v.transposed(), &mut products);
        for (index, (score, product)) in scores.iter_mut().zip(&mut products).enumerate() {
            self.weigh(head, first + index / keys, index % keys, score, product);
        }
        let mut dq = vec![0.0; count * dim];
        cpu_matmul_in_thread([count, keys, dim], row_major(&products, keys), k, &mut dq);
        columns
            .zip(dq.chunks(dim))
            .for_each(|(row, dq)| row.copy_from_slice(dq));
    }

    /// Writes the gradients of the keys and values from `first` on, as many as there are in `rows`.
    fn keys_and_values(&self, kv_head: usize, first: usize, rows: &mut [f32]) {
        let (spec, tokens) = (self.gradient.forward.spec, self.gradient.forward.tokens);
        let (dim, width) = (spec.head_dim, spec.packed_width());
        let count = rows.len() / width;
        let parts = [spec.heads + kv_head, spec.heads + spec.kv_heads + kv_head];
        for row in rows.chunks_mut(width) {
            parts.iter().for_each(|part| row[part * dim..][..dim].fill(0.0));
        }
        if first >= self.keys {
            return;
        }
        let group = spec.heads / spec.kv_heads;
        let (mut scores, mut products) = (vec![0.0; count * tokens], vec![0.0; count * tokens]);
        let mut sums = vec![0.0; count * dim];
        for head in kv_head * group..(kv_head + 1) * group {
            let extents = [count, dim, tokens];
            let [k, v] = parts.map(|part| self.packed(first, part));
            let (q, dy) = (self.packed(0, head), self.dy(0, head));
            cpu_matmul_in_thread(extents, k, q.transposed(), &mut scores);
            cpu_matmul_in_thread(extents, v, dy.transposed(), &mut products);
            for (index, (score, product)) in scores.iter_mut().zip(&mut products).enumerate() {
                self.weigh(head, index % tokens, first + index / tokens, score, product);
            }
            for (part, factors, summed) in [(parts[0], &products, q), (parts[1], &scores, dy)] {
                cpu_matmul_in_thread([count, tokens, dim], row_major(factors, tokens), summed, &mut sums);
                for (row, sums) in rows.chunks_mut(width).zip(sums.chunks(dim)) {
                    row[part * dim..][..dim]
                        .iter_mut()
                        .zip(sums)
                        .for_each(|(to, sum)| *to += sum);
                }
            }
        }
    }
}

fn row_major(values: &[f32], columns: usize) -> Matrix<'_> {
    Matrix {
        values,
        row_stride: columns,
        column_stride: 1,
    }
}
