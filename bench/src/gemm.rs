//! `bench-gemm`: the matrix products of the model, through the engine's linear layer.

mod fused;

use std::str::FromStr;

use clap::Parser;
use l2p_engine::ops::linear::linear;
use l2p_engine::{Error, Result, Tensor};
use serde_json::json;

use crate::arguments::{COLUMNS, Common};
use crate::check::{relative_error, rows, spread_indices};
use crate::inputs::random;
use crate::runner::{Bench, Case};

const HELP: &str = "\
Examples:
  bench-gemm                                     the published model's products
  bench-gemm --peer                              beside torch.nn.functional.linear
  bench-gemm --tokens 16640                      the same layers on more tokens
  L2P_FUSED_LINEAR=0 bench-gemm                  SwiGLU and head norms by kernels of their own
  bench-gemm --shape mine=4096x11520x3840        rows x outputs x inputs; repeatable
  bench-gemm --shape small=64x48x32 --device cpu

The reference is an f64 sum over the same inputs, for 64 x 64 elements spread over the result; for layers with an operation done
inside (w13-swiglu, qkv-norm-rope) the same on the CPU in f32, on the first rows.";

/// Times the model's matrix products; checks them against sums on the CPU.
#[derive(Parser, Debug)]
#[command(name = "bench-gemm", version, after_help = HELP, after_long_help = format!("{HELP}\n\n{COLUMNS}"))]
pub struct Arguments {
    /// Rows of the published layers' inputs
    #[arg(long, value_name = "N", default_value_t = 4192)]
    tokens: usize,
    /// These products instead of the published layers: a name, rows, outputs and inputs; `+bias` at the end adds one
    #[arg(long, value_name = "NAME=MxNxK[+bias]")]
    shape: Vec<Product>,
    #[command(flatten)]
    common: Common,
}

/// `y[m, n] = x[m, k] · w[n, k]ᵀ (+ bias[n])`
#[derive(Clone, Debug, PartialEq, Eq)]
struct Product {
    name: String,
    m: usize,
    n: usize,
    k: usize,
    bias: bool,
}

impl FromStr for Product {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || {
            Error::invalid(format!(
                "`{text}` is no product: write NAME=MxNxK, for example qkv=4192x11520x3840"
            ))
        };
        let (name, extents) = text.split_once('=').ok_or_else(wrong)?;
        let (extents, bias) = match extents.strip_suffix("+bias") {
            Some(extents) => (extents, true),
            None => (extents, false),
        };
        let extents: Vec<usize> = extents
            .split('x')
            .map(str::parse)
            .collect::<std::result::Result<_, _>>()
            .map_err(|_| wrong())?;
        match extents[..] {
            [m, n, k] if m > 0 && n > 0 && k > 0 && !name.is_empty() => Ok(Product {
                name: name.into(),
                m,
                n,
                k,
                bias,
            }),
            _ => Err(wrong()),
        }
    }
}

/// The layers of the published transformer.
fn published(tokens: usize) -> Vec<Product> {
    let layers = [
        ("qkv", 11520, 3840, false),
        ("out", 3840, 3840, false),
        ("w13", 20480, 3840, false),
        ("w2", 3840, 10240, false),
        // What a patch embedding would be on an unfolded image, and the caption's projection.
        ("patch16", 3840, 768, true),
        ("patch64", 3840, 12288, true),
        ("caption", 3840, 2560, true),
    ];
    let product = |(name, n, k, bias): (&str, usize, usize, bool)| Product {
        name: name.into(),
        m: if name == "caption" { 96 } else { tokens },
        n,
        k,
        bias,
    };
    layers.map(product).to_vec()
}

/// Runs the benchmark.
///
/// # Errors
/// When a case cannot be run or its result is wrong.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    anyhow::ensure!(arguments.tokens > 0, "--tokens is at least 1");
    let mut bench = Bench::start("gemm", &arguments.common, "gemm.py")?;
    let products = match arguments.shape.is_empty() {
        true => published(arguments.tokens),
        false => arguments.shape.clone(),
    };
    for product in &products {
        run_product(&mut bench, product)?;
    }
    if arguments.shape.is_empty() {
        fused::run(&mut bench, &fused::Sizes::published(arguments.tokens))?;
    }
    bench.finish()
}

fn run_product(bench: &mut Bench, product: &Product) -> anyhow::Result<()> {
    let Product { name, m, n, k, bias } = product;
    let (m, n, k) = (*m, *n, *k);
    let case_name = format!("gemm-{name}");
    if !bench.may_want(&case_name) {
        return Ok(());
    }
    bench.ensure_feasible(
        &case_name,
        2.0 * m as f64 * n as f64 * k as f64,
        "give a smaller --shape NAME=MxNxK",
    )?;
    let device = bench.device.clone();
    let seed = bench.common.seed;
    let sets = bench.sets((m * k + n * k + m * n) * device.compute_dtype().size());
    let inputs = (0..sets as u64)
        .map(|set| {
            let x = random(&device, [1, m, k], seed, 3 * set)?;
            let weight = random(&device, [n, k], seed, 3 * set + 1)?;
            let bias = match bias {
                true => Some(random(&device, [n], seed, 3 * set + 2)?),
                false => None,
            };
            Ok((x, weight, bias))
        })
        .collect::<Result<Vec<_>>>()?;
    let (picked_rows, picked_columns) = (spread_indices(m, 64), spread_indices(n, 64));
    let mut check = |results: &[Tensor]| {
        let (x, weight, bias) = &inputs[0];
        let (x, weight) = (rows(x, &picked_rows)?, rows(weight, &picked_columns)?);
        let bias = bias.as_ref().map(Tensor::to_vec_f32).transpose()?;
        let dot = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum::<f64>();
        let mut expected = Vec::new();
        for x in x.chunks(k) {
            for (w, &column) in weight.chunks(k).zip(&picked_columns) {
                let bias = bias.as_ref().map_or(0.0, |bias| f64::from(bias[column]));
                expected.push((dot(x, w) + bias) as f32);
            }
        }
        let found = rows(&results[0], &picked_rows)?;
        let found: Vec<f32> = found
            .chunks(n)
            .flat_map(|row| picked_columns.iter().map(|&column| row[column]))
            .collect();
        Ok(relative_error(&found, &expected))
    };
    let mut call = |set: usize| {
        let (x, weight, bias) = &inputs[set];
        Ok(vec![linear(x, weight, bias.as_ref())?])
    };
    let shape = json!({ "m": m, "n": n, "k": k, "bias": bias, "sets": sets });
    bench.case(Case {
        name: case_name,
        inputs: shape.clone(),
        sets,
        call: &mut call,
        check: &mut check,
        // One rounding to bf16.
        tolerance: 4e-3,
        peer: Some(shape),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_read() {
        let product: Product = "a=2x3x4+bias".parse().unwrap();
        assert_eq!((product.m, product.n, product.k, product.bias), (2, 3, 4, true));
        for wrong in ["2x3x4", "a=2x3", "a=2x3x0", "=2x3x4", "a=2x3x4x5", "a=2xbx4"] {
            let message = wrong.parse::<Product>().unwrap_err().to_string();
            assert!(message.contains("write NAME=MxNxK"), "{message}");
        }
    }

    #[test]
    fn the_published_layers_hold_a_block() {
        let flops: usize = published(4192)[..4]
            .iter()
            .map(|product| 2 * product.m * product.n * product.k)
            .sum();
        // Times 30 blocks and, on nearly as many tokens, 2 refiners: the 47.8 TFLOP of a step.
        assert!((flops as f64 * 32.0 / 1e12 - 47.5).abs() < 0.5, "{flops}");
    }
}
