use l2p_engine::layers::{Group as Part, Loader, MemoryParams};
use l2p_engine::model::config::ModelKind;
use l2p_engine::model::rope::{Position, RopeAxes};
use l2p_engine::model::zimage::block::{Block, Sequence, run_blocks};
use l2p_engine::{Device, Result, Tensor};
use l2p_tests::fixtures::{Case, Group};
use l2p_tests::{Outcome, Suite, expect_like_cpu};

use super::{rounded, small_config};

const PREFIX: &str = "block";

/// 1.25 times the error of PyTorch's own bf16 on such blocks, 6.6e-3.
const BF16_BLOCK_TOLERANCE: f64 = 8.2e-3;

pub fn register(suite: &mut Suite) {
    suite.cpu("models::block::cpu_equals_diffusers", cpu_equals_diffusers);
    suite.cpu("models::block::mistakes_are_named", mistakes_are_named);
    suite.cuda("models::block::cuda_equals_cpu", cuda_equals_cpu);
}

/// The case's weights under a block's name.
fn params(case: &Case<'_>, round: bool) -> MemoryParams {
    let named = case.weights().into_iter().map(|(name, (shape, values))| {
        let values = if round { rounded(&values) } else { values };
        (format!("{PREFIX}.{name}"), (shape, values))
    });
    MemoryParams(named.collect())
}

/// Valid tokens per item, where they differ.
fn lengths(case: &Case<'_>) -> Option<Vec<usize>> {
    let is_list = case.has_config(&["lengths"]);
    is_list.then(|| case.sizes(&["lengths"]))
}

/// What the block makes of the case's input, rows past an item's length as they are.
fn run(case: &Case<'_>, params: &MemoryParams, device: &Device, round: bool) -> Result<Tensor> {
    let modulated = case.has_input("c");
    let config = small_config(ModelKind::Latent, case.size(&["dim"]), 2);
    let described = Block::describe(&config, Part::Refiner, PREFIX, modulated);
    let block = Loader::load(&described, params, device, &mut |_, _| Ok(()))?;
    let values = |name: &str| {
        let (values, shape) = case.input(name);
        (if round { rounded(&values) } else { values }, shape)
    };
    let (x, shape) = values("x");
    let x = Tensor::from_f32(device, &x, shape.as_slice())?;
    let tables = match modulated {
        true => {
            let (c, shape) = values("c");
            let c = Tensor::from_slice(device, &c, shape.as_slice())?;
            block.modulation_table(&c)?.into_iter().collect()
        }
        false => Vec::new(),
    };
    let ids: Vec<Position> = case
        .input("ids")
        .0
        .chunks(3)
        .map(|id| [id[0] as usize, id[1] as usize, id[2] as usize])
        .collect();
    let axes = RopeAxes {
        theta: config.rope_theta,
        dims: config.axes_dims,
        rounded: true,
    };
    let rope = axes.table(device, &ids.chunks(shape[1]).map(<[_]>::to_vec).collect::<Vec<_>>())?;
    let lengths = lengths(case).map(|lengths| lengths.into_iter().map(|length| length as i32).collect::<Vec<_>>());
    let lengths = lengths
        .map(|lengths| Tensor::from_slice(device, &lengths, [lengths.len()]))
        .transpose()?;
    let sequence = Sequence {
        rope: &rope,
        key_lengths: lengths.as_ref(),
    };
    run_blocks(&[block], tables.first().map(|table| (table, 0)), x, &sequence, None)
}

/// The values with zeros past each item's length.
fn valid_rows(case: &Case<'_>, y: &Tensor) -> Result<Vec<f32>> {
    let mut values = y.to_vec_f32()?;
    if let Some(lengths) = lengths(case) {
        let dim = y.dim(2);
        for (item, length) in values.chunks_mut(y.dim(1) * dim).zip(lengths) {
            item[length * dim..].fill(0.0);
        }
    }
    Ok(values)
}

fn cpu_equals_diffusers() -> Outcome {
    let group = Group::load("dit_blocks");
    for case in group.cases("") {
        let y = run(&case, &params(&case, false), &Device::Cpu, false)?;
        case.check("y", &valid_rows(&case, &y)?)?;
    }
    Ok(())
}

fn cuda_equals_cpu(device: &Device) -> Outcome {
    let group = Group::load("dit_blocks");
    let case = group.case("modulated.d384");
    let params = params(&case, true);
    expect_like_cpu(case.name(), device, BF16_BLOCK_TOLERANCE, |device| {
        Ok(vec![run(&case, &params, device, true)?])
    })
}

fn mistakes_are_named() -> Outcome {
    let group = Group::load("dit_blocks");
    let case = group.case("modulated.b1");
    let config = small_config(ModelKind::Latent, 256, 2);
    let message = |change: &dyn Fn(&mut MemoryParams)| {
        let mut params = params(&case, false);
        change(&mut params);
        let described = Block::describe(&config, Part::Refiner, PREFIX, true);
        let outcome = Loader::load(&described, &params, &Device::Cpu, &mut |_, _| Ok(()));
        outcome.err().map(|error| error.to_string()).unwrap_or_default()
    };
    assert_eq!(
        message(&|params| drop(params.0.remove("block.attention.to_k.weight"))),
        "there is no parameter `block.attention.to_k.weight`"
    );
    assert_eq!(
        message(&|params| params.insert("block.ffn_norm1.weight", &[128], vec![0.0; 128])),
        "`block.ffn_norm1.weight` has shape [128], expected [256]"
    );
    Ok(())
}
