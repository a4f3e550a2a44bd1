//! `bench-attention`: attention forward at the model's sequence lengths, by every kernel.

use clap::{Parser, ValueEnum};
use half::bf16;
use l2p_engine::ops::attention::{Attention, AttentionKernel, attention, attention_with};
use l2p_engine::{DType, Device, Tensor};
use rayon::prelude::*;
use serde_json::json;

use crate::arguments::{COLUMNS, Common};
use crate::check::{relative_error, rows, spread_indices};
use crate::inputs::random;
use crate::runner::{Bench, Case};

const HELP: &str = "\
Examples:
  bench-attention                                    the published lengths, all kernels this GPU has
  bench-attention --peer                             beside PyTorch with cuDNN and with flash
  bench-attention --tokens 8192 --kernels auto       one length, the kernel that the engine would choose
  bench-attention --tokens 96 --heads 2 --device cpu

The reference is the f32 definition, for some queries of three heads over all keys.";

/// Times attention forward; checks it against the definition.
#[derive(Parser, Debug)]
#[command(name = "bench-attention", version, after_help = HELP, after_long_help = format!("{HELP}\n\n{COLUMNS}"))]
pub struct Arguments {
    /// Lengths of the sequence: 1K and 4K in large patches, 2K and 4K latent, each with 96 caption tokens
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_values_t = [4192, 16640, 65632])]
    tokens: Vec<usize>,
    /// Heads, of queries and of keys
    #[arg(long, value_name = "N", default_value_t = 30)]
    heads: usize,
    /// The width of a head
    #[arg(long, value_name = "N", default_value_t = 128)]
    head_dim: usize,
    /// Which kernels [default: all that the device has]
    #[arg(long, value_name = "NAME,..", value_delimiter = ',', value_enum)]
    kernels: Vec<KernelName>,
    #[command(flatten)]
    common: Common,
}

/// The kernels by name.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum KernelName {
    /// The engine's choice
    Auto,
    /// The one that runs on every GPU from Ampere on
    Portable,
    /// Hopper's with 128 queries per block
    Hopper128,
    /// Hopper's with 192 queries per block
    Hopper192,
}

impl KernelName {
    fn kernel(self) -> AttentionKernel {
        match self {
            KernelName::Auto => AttentionKernel::Auto,
            KernelName::Portable => AttentionKernel::Portable,
            KernelName::Hopper128 => AttentionKernel::Hopper128,
            KernelName::Hopper192 => AttentionKernel::Hopper192,
        }
    }

    fn label(self) -> String {
        self.to_possible_value()
            .map(|value| value.get_name().to_owned())
            .unwrap_or_default()
    }

    /// Those that the device has for heads of this width.
    fn of(device: &Device, head_dim: usize) -> Vec<Self> {
        match device {
            Device::Cuda(device) if device.has_hopper_kernels() && head_dim == 128 => Self::value_variants().to_vec(),
            Device::Cuda(_) => vec![KernelName::Auto, KernelName::Portable],
            // There is one on the CPU.
            Device::Cpu => vec![KernelName::Auto],
        }
    }
}

/// Runs the benchmark.
///
/// # Errors
/// When a case cannot be run or its result is wrong.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let Arguments {
        heads,
        head_dim,
        common,
        ..
    } = arguments;
    anyhow::ensure!(*heads > 0 && *head_dim > 0, "--heads and --head-dim are at least 1");
    let mut bench = Bench::start("attention", common, "attention.py")?;
    let spec = Attention {
        heads: *heads,
        kv_heads: *heads,
        head_dim: *head_dim,
        causal: false,
        scale: 1.0 / (*head_dim as f32).sqrt(),
    };
    let kernels = match arguments.kernels.is_empty() {
        true => KernelName::of(&bench.device, *head_dim),
        false => arguments.kernels.clone(),
    };
    for &tokens in &arguments.tokens {
        anyhow::ensure!(tokens > 0, "--tokens are at least 1");
        run_length(&mut bench, &spec, tokens, &kernels)?;
    }
    bench.finish()
}

fn run_length(bench: &mut Bench, spec: &Attention, tokens: usize, kernels: &[KernelName]) -> anyhow::Result<()> {
    let name = |kernel: &KernelName| format!("attention-{tokens}-{}", kernel.label());
    let wanted: Vec<_> = kernels.iter().filter(|kernel| bench.may_want(&name(kernel))).collect();
    if wanted.is_empty() {
        return Ok(());
    }
    let flops = 4.0 * (tokens as f64).powi(2) * (spec.heads * spec.head_dim) as f64;
    bench.ensure_feasible(
        &format!("attention over {tokens} tokens"),
        flops,
        "give fewer with --tokens and --heads",
    )?;
    let shape = [1, tokens, 3 * spec.heads * spec.head_dim];
    let sets = bench.sets(shape.iter().product::<usize>() * bench.device.compute_dtype().size());
    let inputs = (0..sets as u64)
        .map(|set| random(&bench.device, shape, bench.common.seed, set))
        .collect::<l2p_engine::Result<Vec<_>>>()?;
    let reference = Reference::new(&inputs[0], spec, tokens)?;
    for kernel in wanted {
        let mut call = |set: usize| {
            Ok(vec![match kernel {
                KernelName::Auto => attention(&inputs[set], spec, None)?,
                kernel => attention_with(kernel.kernel(), &inputs[set], spec, None)?.0,
            }])
        };
        bench.case(Case {
            name: name(kernel),
            inputs: json!({
                "tokens": tokens, "heads": spec.heads, "head_dim": spec.head_dim, "kernel": kernel.label(), "sets": sets,
            }),
            sets,
            call: &mut call,
            check: &mut |results| reference.error(&results[0]),
            // The weights are rounded to bf16 before their product with the values, and so is the result.
            tolerance: 1e-2,
            peer: (*kernel == KernelName::Auto)
                .then(|| json!({ "tokens": tokens, "heads": spec.heads, "head_dim": spec.head_dim, "sets": sets })),
        })?;
    }
    Ok(())
}

/// The definition, for some queries of some heads.
struct Reference {
    queries: Vec<usize>,
    /// First column of each head in a row of the result.
    columns: Vec<usize>,
    head_dim: usize,
    /// By query, then by head.
    expected: Vec<f32>,
}

impl Reference {
    const QUERIES: usize = 48;
    const HEADS: usize = 3;
    /// Rows that are copied to the host at once.
    const CHUNK: usize = 4096;

    fn new(qkv: &Tensor, spec: &Attention, tokens: usize) -> anyhow::Result<Self> {
        let (head_dim, width) = (spec.head_dim, spec.heads * spec.head_dim);
        let queries = spread_indices(tokens, Self::QUERIES);
        let heads = spread_indices(spec.heads, Self::HEADS);
        let columns: Vec<usize> = heads.iter().map(|head| head * head_dim).collect();
        // By head: keys and values of all tokens, one after the other.
        let mut keys = vec![Vec::with_capacity(tokens * head_dim); heads.len()];
        let mut values = keys.clone();
        let matrix = qkv.reshape([tokens, 3 * width])?;
        for start in (0..tokens).step_by(Self::CHUNK) {
            let chunk = HostRows::of(&matrix.narrow(start, Self::CHUNK.min(tokens - start))?)?;
            for row in 0..chunk.rows {
                for (head, column) in columns.iter().enumerate() {
                    chunk.append(row, width + column, head_dim, &mut keys[head]);
                    chunk.append(row, 2 * width + column, head_dim, &mut values[head]);
                }
            }
        }
        let wanted = rows(qkv, &queries)?;
        let pairs: Vec<(usize, usize)> = (0..queries.len())
            .flat_map(|query| (0..heads.len()).map(move |head| (query, head)))
            .collect();
        let expected = pairs.par_iter().flat_map_iter(|&(query, head)| {
            let q = &wanted[query * 3 * width + columns[head]..][..head_dim];
            attend(q, &keys[head], &values[head], f64::from(spec.scale))
        });
        Ok(Reference {
            expected: expected.collect(),
            queries,
            columns,
            head_dim,
        })
    }

    fn error(&self, result: &Tensor) -> anyhow::Result<f64> {
        let width = result.shape().last();
        let found = rows(result, &self.queries)?;
        let picked: Vec<f32> = found
            .chunks(width)
            .flat_map(|row| {
                self.columns
                    .iter()
                    .flat_map(|&column| row[column..column + self.head_dim].iter().copied())
            })
            .collect();
        Ok(relative_error(&picked, &self.expected))
    }
}

/// One query's result, in f64.
fn attend(query: &[f32], keys: &[f32], values: &[f32], scale: f64) -> Vec<f32> {
    let width = query.len();
    let dot = |key: &[f32]| {
        key.iter()
            .zip(query)
            .map(|(k, q)| f64::from(*k) * f64::from(*q))
            .sum::<f64>()
    };
    let scores: Vec<f64> = keys.chunks(width).map(|key| scale * dot(key)).collect();
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let mut result = vec![0.0f64; width];
    for (weight, value) in weights.iter().zip(values.chunks(width)) {
        for (result, value) in result.iter_mut().zip(value) {
            *result += weight * f64::from(*value);
        }
    }
    result.into_iter().map(|value| (value / sum) as f32).collect()
}

/// Rows on the host in their own type, of which a few columns are wanted.
struct HostRows {
    rows: usize,
    width: usize,
    values: HostValues,
}

enum HostValues {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

impl HostRows {
    fn of(matrix: &Tensor) -> l2p_engine::Result<Self> {
        Ok(HostRows {
            rows: matrix.dim(0),
            width: matrix.dim(1),
            values: match matrix.dtype() {
                DType::Bf16 => HostValues::Bf16(matrix.to_vec()?),
                _ => HostValues::F32(matrix.to_vec()?),
            },
        })
    }

    fn append(&self, row: usize, column: usize, count: usize, target: &mut Vec<f32>) {
        let range = row * self.width + column..row * self.width + column + count;
        match &self.values {
            HostValues::F32(values) => target.extend_from_slice(&values[range]),
            HostValues::Bf16(values) => target.extend(values[range].iter().map(|value| value.to_f32())),
        }
    }
}
