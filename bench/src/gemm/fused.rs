//! Products with what follows them.

use l2p_engine::ops::linear::linear;
use l2p_engine::ops::linear_swiglu::linear_swiglu;
use l2p_engine::ops::qk_norm_rope::{QkNormRope, Rotation, qk_norm_rope};
use l2p_engine::{Device, Result, Tensor};
use serde_json::{Value, json};

use crate::check::relative_error;
use crate::inputs::{random, random_f32};
use crate::runner::{Bench, Case};

/// The width of a head, and ε.
const HEAD_DIM: usize = 128;
const EPSILON: f32 = 1e-5;

/// Rows that are compared with the CPU.
const ROWS: usize = 32;

/// A block's sizes.
pub(super) struct Sizes {
    tokens: usize,
    heads: usize,
    ffn: usize,
}

impl Sizes {
    /// The published ones.
    pub fn published(tokens: usize) -> Self {
        Sizes {
            tokens,
            heads: 30,
            ffn: 10240,
        }
    }
}

/// A layer with what follows its product.
#[derive(Clone, Copy)]
enum Layer {
    Swiglu,
    QkNormRope,
}

impl Layer {
    fn case_name(self) -> &'static str {
        match self {
            Layer::Swiglu => "gemm-w13-swiglu",
            Layer::QkNormRope => "gemm-qkv-norm-rope",
        }
    }

    /// For the peer.
    fn then(self) -> &'static str {
        match self {
            Layer::Swiglu => "swiglu",
            Layer::QkNormRope => "qk_norm_rope",
        }
    }

    /// Rows of the weight.
    fn outputs(self, sizes: &Sizes) -> usize {
        match self {
            Layer::Swiglu => 2 * sizes.ffn,
            Layer::QkNormRope => 3 * sizes.heads * HEAD_DIM,
        }
    }
}

/// What a layer takes: tokens and weight; weights of the norms, and cosines with sines by token.
struct Inputs {
    x: Tensor,
    weight: Tensor,
    norms: [Tensor; 2],
    table: Tensor,
}

impl Inputs {
    fn new(device: &Device, sizes: &Sizes, outputs: usize, seed: u64, set: u64) -> Result<Self> {
        let dim = sizes.heads * HEAD_DIM;
        let stream = 8 * set;
        Ok(Inputs {
            x: random(device, [1, sizes.tokens, dim], seed, stream)?,
            weight: random(device, [outputs, dim], seed, stream + 1)?,
            norms: [
                random(device, [HEAD_DIM], seed, stream + 2)?,
                random(device, [HEAD_DIM], seed, stream + 3)?,
            ],
            table: random_f32(device, [1, sizes.tokens, HEAD_DIM / 2, 2], seed, stream + 4)?,
        })
    }

    /// On the CPU, of the first `rows` tokens.
    fn on_cpu(&self, rows: usize) -> Result<Self> {
        let first = |tensor: &Tensor| {
            let mut extents = tensor.shape().to_vec();
            let elements = extents[2..].iter().product::<usize>();
            let part = tensor.reshape([extents[1], elements])?.narrow(0, rows)?;
            extents[1] = rows;
            Tensor::from_slice(&Device::Cpu, &part.to_vec_f32()?, extents.as_slice())
        };
        let whole = |tensor: &Tensor| Tensor::from_slice(&Device::Cpu, &tensor.to_vec_f32()?, tensor.shape());
        Ok(Inputs {
            x: first(&self.x)?,
            weight: whole(&self.weight)?,
            norms: [whole(&self.norms[0])?, whole(&self.norms[1])?],
            table: first(&self.table)?,
        })
    }

    fn run(&self, layer: Layer, sizes: &Sizes) -> Result<Tensor> {
        match layer {
            Layer::Swiglu => linear_swiglu(&self.x, &self.weight),
            Layer::QkNormRope => {
                let spec = QkNormRope {
                    heads: sizes.heads,
                    kv_heads: sizes.heads,
                    head_dim: HEAD_DIM,
                    q_weight: &self.norms[0],
                    k_weight: &self.norms[1],
                    epsilon: EPSILON,
                    rotation: Rotation::Interleaved,
                };
                let mut qkv = linear(&self.x, &self.weight, None)?;
                qk_norm_rope(&mut qkv, &spec, &self.table)?;
                Ok(qkv)
            }
        }
    }
}

/// Measures both layers.
///
/// # Errors
/// When one cannot be run.
pub(super) fn run(bench: &mut Bench, sizes: &Sizes) -> anyhow::Result<()> {
    for layer in [Layer::Swiglu, Layer::QkNormRope] {
        run_layer(bench, layer, sizes)?;
    }
    Ok(())
}

fn run_layer(bench: &mut Bench, layer: Layer, sizes: &Sizes) -> anyhow::Result<()> {
    let name = layer.case_name();
    if !bench.may_want(name) {
        return Ok(());
    }
    let (m, n, k) = (sizes.tokens, layer.outputs(sizes), sizes.heads * HEAD_DIM);
    let flops = 2.0 * m as f64 * n as f64 * k as f64;
    bench.ensure_feasible(name, flops, "give a smaller --shape NAME=MxNxK")?;
    let (device, seed) = (bench.device.clone(), bench.common.seed);
    let sets = bench.sets((m * k + n * k + m * n) * device.compute_dtype().size());
    let inputs = (0..sets as u64)
        .map(|set| Inputs::new(&device, sizes, n, seed, set))
        .collect::<Result<Vec<_>>>()?;
    let shape: Value = json!({ "m": m, "n": n, "k": k, "bias": false, "sets": sets, "then": layer.then() });
    bench.case(Case {
        name: name.into(),
        inputs: shape.clone(),
        sets,
        call: &mut |set| Ok(vec![inputs[set].run(layer, sizes)?]),
        check: &mut |results| {
            let rows = ROWS.min(m);
            let expected = inputs[0].on_cpu(rows)?.run(layer, sizes)?;
            let width = results[0].shape().last();
            let found = results[0].reshape([m, width])?.narrow(0, rows)?;
            Ok(relative_error(&found.to_vec_f32()?, &expected.to_vec_f32()?))
        },
        // By kernels of their own the product is rounded before what follows, and that once more.
        tolerance: 8e-3,
        peer: Some(shape),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arguments::Common;
    use clap::Parser;

    #[derive(Parser)]
    struct Arguments {
        #[command(flatten)]
        common: Common,
    }

    #[test]
    fn both_layers_are_checked_against_the_cpu() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("record.json");
        let json = format!("--json={}", path.display());
        let common = Arguments::parse_from(["bench", "--device=cpu", "--repeats=1", &json]).common;
        let mut bench = Bench::start("gemm", &common, "gemm.py").unwrap();
        let sizes = Sizes {
            tokens: 40,
            heads: 2,
            ffn: 96,
        };
        run(&mut bench, &sizes).unwrap();
        bench.finish().unwrap();
        let record = crate::record::Record::read(&path).unwrap();
        let names: Vec<&str> = record.rows.iter().map(|row| row.name.as_str()).collect();
        assert_eq!(names, ["gemm-w13-swiglu", "gemm-qkv-norm-rope"]);
        assert!(record.rows.iter().all(|row| row.pass && row.work.flops > 0));
    }
}
