//! Attention on the CPU: the definition.

use rayon::prelude::*;

use super::Problem;
use crate::error::Result;
use crate::ops::linear::{Matrix, cpu_matmul_in_thread};
use crate::tensor::Tensor;

/// Queries that one task handles at a time: enough for the matrix products to be fast, few enough for their scores (this
/// many rows of all keys) to stay in a core's cache.
const QUERIES: usize = 64;

pub(super) fn attention(problem: &Problem<'_>, result: &mut Tensor, log_sums: Option<&mut Tensor>) -> Result<()> {
    let (tokens, heads) = (problem.tokens, problem.spec.heads);
    let qkv = problem.qkv.as_slice::<f32>()?;
    let lengths = problem.key_lengths.map(Tensor::as_slice::<i32>).transpose()?;
    let width = problem.spec.width();
    let blocks: Vec<Block<'_>> = (0..problem.batch)
        .flat_map(|item| {
            let keys = lengths.map_or(tokens, |lengths| lengths[item].clamp(0, tokens as i32) as usize);
            let rows = &qkv[item * tokens * problem.spec.packed_width()..];
            (0..tokens).step_by(QUERIES).map(move |first| Block {
                problem,
                rows,
                keys,
                first,
                count: QUERIES.min(tokens - first),
            })
        })
        .collect();
    let mut outputs = Vec::with_capacity(blocks.len());
    for item in result.as_mut_slice::<f32>()?.chunks_mut(tokens * width) {
        outputs.extend(item.chunks_mut(QUERIES * width));
    }
    let block_log_sums: Vec<Vec<f32>> = blocks
        .par_iter()
        .zip(outputs)
        .map(|(block, output)| (0..heads).flat_map(|head| block.attend(head, output)).collect())
        .collect();
    if let Some(log_sums) = log_sums {
        let log_sums = log_sums.as_mut_slice::<f32>()?;
        for (index, (block, values)) in blocks.iter().zip(&block_log_sums).enumerate() {
            let item = index / tokens.div_ceil(QUERIES);
            for (head, values) in values.chunks(block.count).enumerate() {
                let start = (item * heads + head) * tokens + block.first;
                log_sums[start..start + block.count].copy_from_slice(values);
            }
        }
    }
    Ok(())
}

/// Some neighbouring queries of one batch item.
struct Block<'a> {
    problem: &'a Problem<'a>,
    /// The item's packed rows, and whatever follows them.
    rows: &'a [f32],
    /// The item's number of keys.
    keys: usize,
    /// The first query.
    first: usize,
    /// The number of queries.
    count: usize,
}

impl Block<'_> {
    /// The number of keys that the block's query `query` sees.
    fn seen(&self, query: usize) -> usize {
        match self.problem.spec.causal {
            true => self.keys.min(self.first + query + 1),
            false => self.keys,
        }
    }

    /// The packed rows from `row` on, from column `column` on, as a matrix.
    fn matrix(&self, row: usize, column: usize) -> Matrix<'_> {
        let width = self.problem.spec.packed_width();
        Matrix {
            values: &self.rows[row * width + column..],
            row_stride: width,
            column_stride: 1,
        }
    }

    /// Writes the results of one head into its columns of `output` and returns the log-sum-exp of each query.
    fn attend(&self, head: usize, output: &mut [f32]) -> Vec<f32> {
        let spec = self.problem.spec;
        let (dim, keys) = (spec.head_dim, self.seen(self.count - 1));
        let kv_head = head / (spec.heads / spec.kv_heads);
        let columns = output.chunks_mut(spec.width()).map(|row| &mut row[head * dim..][..dim]);
        if keys == 0 {
            columns.for_each(|row| row.fill(0.0));
            return vec![f32::NEG_INFINITY; self.count];
        }
        let queries = self.matrix(self.first, head * dim);
        let transposed_keys = self.matrix(0, (spec.heads + kv_head) * dim).transposed();
        let values = self.matrix(0, (spec.heads + spec.kv_heads + kv_head) * dim);

        let mut weights = vec![0.0; self.count * keys];
        cpu_matmul_in_thread([self.count, dim, keys], queries, transposed_keys, &mut weights);
        let (factors, log_sums): (Vec<f32>, Vec<f32>) = weights
            .chunks_mut(keys)
            .enumerate()
            .map(|(query, row)| exponentials(row, self.seen(query), spec.scale))
            .unzip();
        let weights = Matrix {
            values: &weights,
            row_stride: keys,
            column_stride: 1,
        };
        let mut sums = vec![0.0; self.count * dim];
        cpu_matmul_in_thread([self.count, keys, dim], weights, values, &mut sums);
        for ((row, sums), factor) in columns.zip(sums.chunks(dim)).zip(factors) {
            for (result, sum) in row.iter_mut().zip(sums) {
                *result = sum * factor;
            }
        }
        log_sums
    }
}

/// Turns a row of scores into `exp(scale · (score − largest))` for the keys that are seen and zero for the others. Returns the
/// inverse of their sum and the log-sum-exp of the scaled scores.
fn exponentials(row: &mut [f32], seen: usize, scale: f32) -> (f32, f32) {
    let (row, unseen) = row.split_at_mut(seen);
    unseen.fill(0.0);
    let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for score in row.iter_mut() {
        *score = (scale * (*score - largest)).exp();
        sum += *score;
    }
    (1.0 / sum, scale * largest + sum.ln())
}
