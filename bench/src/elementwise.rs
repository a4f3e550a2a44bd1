//! `bench-elementwise`: the operations that move memory, at the model's shapes.

use clap::Parser;
use l2p_engine::ops::Modulation;
use l2p_engine::ops::cast::cast;
use l2p_engine::ops::conv::Activation;
use l2p_engine::ops::group_norm::{GroupNorm, group_norm};
use l2p_engine::ops::guidance::guided_euler_step;
use l2p_engine::ops::layer_norm::layer_norm_modulate;
use l2p_engine::ops::patch_embed::patch_embed;
use l2p_engine::ops::qk_norm_rope::{QkNormRope, Rotation, qk_norm_rope};
use l2p_engine::ops::rms_norm::{GatedResidual, RmsNorm, gated_residual_rms_norm, rms_norm_modulate};
use l2p_engine::ops::swiglu::swiglu;
use l2p_engine::ops::to_rgb8::to_rgb8;
use l2p_engine::ops::tokens::concat_tokens;
use l2p_engine::ops::unpatchify::unpatchify;
use l2p_engine::{DType, Device, Result, Tensor};
use serde_json::{Value, json};

use crate::arguments::{COLUMNS, Common};
use crate::check::{relative_error, worse};
use crate::inputs::{random, random_f32};
use crate::runner::{Bench, Case};

const HELP: &str = "\
Examples:
  bench-elementwise                              everything at the published shapes
  bench-elementwise --peer                       beside PyTorch, eager and compiled
  bench-elementwise --ops swiglu,qk_norm_rope    some of them
  bench-elementwise --tokens 64 --heads 2 --ffn 512 --image 64 --device cpu

The reference is the same operation on the CPU in f32, on the first rows. patch_embed is here for its reading of the image;
its ceiling is that of its product.";

/// Times what moves memory; checks it against the CPU.
#[derive(Parser, Debug)]
#[command(name = "bench-elementwise", version, after_help = HELP, after_long_help = format!("{HELP}\n\n{COLUMNS}"))]
pub struct Arguments {
    /// Tokens of the sequence
    #[arg(long, value_name = "N", default_value_t = 4192)]
    tokens: usize,
    /// Heads of 128 that make up the width
    #[arg(long, value_name = "N", default_value_t = 30)]
    heads: usize,
    /// Width inside the feed-forward network
    #[arg(long, value_name = "N", default_value_t = 10240)]
    ffn: usize,
    /// Side of the picture, a multiple of 64
    #[arg(long, value_name = "PIXELS", default_value_t = 4096)]
    image: usize,
    /// Which operations [default: all]
    #[arg(long, value_name = "NAME,..", value_delimiter = ',')]
    ops: Vec<String>,
    #[command(flatten)]
    common: Common,
}

/// The width of a head, and ε.
const HEAD_DIM: usize = 128;
const EPSILON: f32 = 1e-5;

/// Rows of tokens that are compared with the CPU.
const ROWS: usize = 64;

/// One input of an operation.
struct Input {
    shape: Vec<usize>,
    /// The extent of axis 1 that is compared with the CPU; 0 where the whole input is needed for it.
    part: usize,
    f32: bool,
}

impl Input {
    /// Of which the first `part` entries of axis 1 are compared.
    fn rows(shape: &[usize], part: usize) -> Self {
        Input {
            shape: shape.to_vec(),
            part: part.min(shape[1]),
            f32: false,
        }
    }

    /// Of which all is needed.
    fn whole(shape: &[usize]) -> Self {
        Input {
            shape: shape.to_vec(),
            part: 0,
            f32: false,
        }
    }

    fn in_f32(self) -> Self {
        Input { f32: true, ..self }
    }

    fn make(&self, device: &Device, seed: u64, stream: u64) -> Result<Tensor> {
        match self.f32 {
            true => random_f32(device, self.shape.as_slice(), seed, stream),
            false => random(device, self.shape.as_slice(), seed, stream),
        }
    }

    fn on_cpu(&self, tensor: &Tensor) -> Result<Tensor> {
        let part = match self.part {
            0 => tensor.clone(),
            part => {
                let mut extents = self.shape.clone();
                extents[1] = part;
                leading(tensor, extents.iter().product())?.reshape(extents.as_slice())?
            }
        };
        let values = part.to_vec_f32()?;
        Tensor::from_slice(&Device::Cpu, &values, part.shape())
    }
}

/// The first elements of a tensor, as a vector.
fn leading(tensor: &Tensor, elements: usize) -> Result<Tensor> {
    tensor.reshape([tensor.elements()])?.narrow(0, elements)
}

/// An operation on its inputs; what it makes, or changed, is returned.
type Call = Box<dyn Fn(&mut [Tensor]) -> Result<Vec<Tensor>>>;

/// An operation with its inputs.
struct Op {
    name: &'static str,
    /// For the record and the peer.
    sizes: Value,
    inputs: Vec<Input>,
    call: Call,
}

/// Runs the benchmark.
///
/// # Errors
/// When a case cannot be run or its result is wrong.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let (tokens, heads, ffn, side) = (arguments.tokens, arguments.heads, arguments.ffn, arguments.image);
    anyhow::ensure!(
        tokens > 0 && heads > 0 && ffn > 0,
        "--tokens, --heads and --ffn are at least 1"
    );
    anyhow::ensure!(
        side > 0 && side.is_multiple_of(64),
        "--image {side} is no multiple of 64"
    );
    let mut ops = token_ops(tokens, heads, ffn);
    ops.extend(image_ops(side, heads * HEAD_DIM));
    let known: Vec<&str> = ops.iter().map(|op| op.name).collect();
    if let Some(name) = arguments.ops.iter().find(|name| !known.contains(&name.as_str())) {
        anyhow::bail!("there is no operation `{name}`; there are {}", known.join(", "));
    }
    let mut bench = Bench::start("elementwise", &arguments.common, "elementwise.py")?;
    for op in &ops {
        if arguments.ops.is_empty() || arguments.ops.iter().any(|name| name == op.name) {
            run_op(&mut bench, op)?;
        }
    }
    bench.finish()
}

/// What a block does to tokens beside its products.
fn token_ops(tokens: usize, heads: usize, ffn: usize) -> Vec<Op> {
    let dim = heads * HEAD_DIM;
    let rows = |width: usize| Input::rows(&[1, tokens, width], ROWS);
    let vector = |width: usize| Input::whole(&[width]);
    // A table like that of a block, of which the first two vectors are used.
    let table = || Input::whole(&[1, 4, dim]).in_f32();
    let sizes = json!({ "tokens": tokens, "heads": heads, "ffn": ffn });
    let op = |name, inputs, call: Call| Op {
        name,
        sizes: sizes.clone(),
        inputs,
        call,
    };
    vec![
        op(
            "qk_norm_rope",
            vec![
                rows(3 * dim),
                vector(HEAD_DIM),
                vector(HEAD_DIM),
                Input::rows(&[1, tokens, HEAD_DIM / 2, 2], ROWS).in_f32(),
            ],
            Box::new(move |inputs| {
                let (qkv, others) = inputs.split_first_mut().expect("four inputs");
                let spec = QkNormRope {
                    heads,
                    kv_heads: heads,
                    head_dim: HEAD_DIM,
                    q_weight: &others[0],
                    k_weight: &others[1],
                    epsilon: EPSILON,
                    rotation: Rotation::Interleaved,
                };
                qk_norm_rope(qkv, &spec, &others[2])?;
                Ok(vec![qkv.clone()])
            }),
        ),
        op(
            "rms_norm_modulate",
            vec![rows(dim), vector(dim), table()],
            Box::new(|inputs| Ok(vec![rms_norm_modulate(&inputs[0], &norm(&inputs[1], &inputs[2])?)?])),
        ),
        op(
            "gated_residual_rms_norm",
            vec![rows(dim), rows(dim), vector(dim), vector(dim), table()],
            Box::new(|inputs| {
                let residual = GatedResidual {
                    weight: &inputs[2],
                    gate: Some(Modulation::new(&inputs[4], 1)?),
                    epsilon: EPSILON,
                };
                let next = norm(&inputs[3], &inputs[4])?;
                let (sum, normalised) = gated_residual_rms_norm(&inputs[0], &inputs[1], &residual, Some(&next))?;
                Ok([Some(sum), normalised].into_iter().flatten().collect())
            }),
        ),
        op(
            "swiglu",
            vec![rows(2 * ffn)],
            Box::new(|inputs| Ok(vec![swiglu(&inputs[0])?])),
        ),
        op(
            "layer_norm_modulate",
            vec![rows(dim), table()],
            Box::new(|inputs| {
                let scale = Modulation::new(&inputs[1], 0)?;
                Ok(vec![layer_norm_modulate(&inputs[0], Some(scale), EPSILON)?])
            }),
        ),
        op(
            "concat_tokens",
            // What stands where depends on the length of the first.
            vec![Input::whole(&[1, tokens, dim]), Input::whole(&[1, 96, dim])],
            Box::new(|inputs| Ok(vec![concat_tokens(&inputs[0], &inputs[1])?])),
        ),
    ]
}

fn norm<'a>(weight: &'a Tensor, table: &'a Tensor) -> Result<RmsNorm<'a>> {
    Ok(RmsNorm {
        weight,
        scale: Some(Modulation::new(table, 0)?),
        epsilon: EPSILON,
    })
}

/// What is done to pictures and latents.
fn image_ops(side: usize, dim: usize) -> Vec<Op> {
    let sizes = json!({ "image": side, "dim": dim });
    let op = |name, inputs, call: Call| Op {
        name,
        sizes: sizes.clone(),
        inputs,
        call,
    };
    let picture = |side: usize| Input::rows(&[1, side, side, 3], 64);
    let embed = |name, patch: usize, side: usize| {
        let inputs = vec![
            picture(side),
            Input::whole(&[dim, patch * patch * 3]),
            Input::whole(&[dim]),
        ];
        let call: Call = Box::new(move |inputs| Ok(vec![patch_embed(&inputs[0], patch, &inputs[1], &inputs[2])?]));
        op(name, inputs, call)
    };
    // An eighth of the side: what the decoder's widest maps have at 4K would take many seconds on the CPU.
    let map = (side / 8).max(8);
    let cells = side / 8;
    vec![
        embed("patch_embed_16", 16, side / 4),
        embed("patch_embed_64", 64, side),
        op(
            "cast",
            vec![picture(side).in_f32()],
            // Towards bf16 on every device.
            Box::new(|inputs| Ok(vec![cast(&inputs[0], DType::Bf16)?])),
        ),
        op(
            "guided_euler_step",
            vec![
                picture(side).in_f32(),
                picture(side).in_f32(),
                Input::whole(&[2]).in_f32(),
            ],
            Box::new(|inputs| {
                let (x, others) = inputs.split_first_mut().expect("three inputs");
                guided_euler_step(x, &others[0], None, &others[1])?;
                Ok(vec![x.clone()])
            }),
        ),
        op(
            "to_rgb8",
            vec![picture(side).in_f32()],
            Box::new(|inputs| Ok(vec![to_rgb8(&inputs[0])?.bytes])),
        ),
        op(
            "group_norm",
            vec![
                Input::whole(&[1, map, map, 256]),
                Input::whole(&[256]),
                Input::whole(&[256]),
            ],
            Box::new(|inputs| {
                let norm = GroupNorm {
                    weight: inputs[1].clone(),
                    bias: inputs[2].clone(),
                    groups: 32,
                    epsilon: 1e-6,
                };
                Ok(vec![group_norm(&inputs[0], &norm, Activation::Silu)?])
            }),
        ),
        op(
            "unpatchify",
            vec![Input::rows(&[1, cells / 2 * (cells / 2), 64], cells / 2)],
            Box::new(move |inputs| {
                let rows = inputs[0].dim(1) / (cells / 2);
                Ok(vec![unpatchify(&inputs[0], 2 * rows, cells, 2, 16, -1.0)?])
            }),
        ),
    ]
}

fn run_op(bench: &mut Bench, op: &Op) -> anyhow::Result<()> {
    if !bench.may_want(op.name) {
        return Ok(());
    }
    let device = bench.device.clone();
    let bytes = op
        .inputs
        .iter()
        .map(|input| input.shape.iter().product::<usize>())
        .sum::<usize>();
    let flops = match op.name.starts_with("patch_embed") {
        true => 2.0 * bytes as f64 * op.inputs[1].shape[0] as f64,
        false => bytes as f64,
    };
    bench.ensure_feasible(
        op.name,
        flops,
        "give fewer --tokens, --heads and --ffn, and a smaller --image",
    )?;
    let sets = bench.sets(2 * bytes * device.compute_dtype().size());
    let count = op.inputs.len();
    let mut inputs = Vec::with_capacity(sets);
    for set in 0..sets {
        let stream = |index: usize| (set * count + index) as u64;
        let tensors = op
            .inputs
            .iter()
            .enumerate()
            .map(|(index, input)| input.make(&device, bench.common.seed, stream(index)));
        inputs.push(tensors.collect::<Result<Vec<_>>>()?);
    }
    // Before an operation in place changes them.
    let on_cpu = op
        .inputs
        .iter()
        .zip(&inputs[0])
        .map(|(input, tensor)| input.on_cpu(tensor));
    let mut on_cpu = on_cpu.collect::<Result<Vec<_>>>()?;
    let mut check = |results: &[Tensor]| {
        let mut error = 0.0;
        for (found, expected) in results.iter().zip((op.call)(&mut on_cpu)?) {
            let found = leading(found, expected.elements())?.to_vec_f32()?;
            error = worse(error, relative_error(&found, &expected.to_vec_f32()?));
        }
        Ok(error)
    };
    let mut call = |set: usize| (op.call)(&mut inputs[set]);
    let mut peer = op.sizes.clone();
    peer["op"] = json!(op.name);
    peer["sets"] = json!(sets);
    bench.case(Case {
        name: op.name.into(),
        inputs: peer.clone(),
        sets,
        call: &mut call,
        check: &mut check,
        // One rounding to bf16; of bytes, one unit in a hundred.
        tolerance: 5e-3,
        peer: Some(peer),
    })
}
