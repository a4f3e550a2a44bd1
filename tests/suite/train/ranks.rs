//! Several ranks that train one model: the same steps as one rank with as many micro-batches, whatever the ranks divide among them.

use std::rc::Rc;

use l2p_engine::device::visible_gpus;
use l2p_engine::dist::{World, nccl_available};
use l2p_engine::model::zimage::ZImage;
use l2p_engine::train::{Ranks, Recompute, Sharding, StatePart, TrainOptions, TrainableModel};
use l2p_engine::{Device, DeviceChoice, Result};
use l2p_tests::{Outcome, Suite, expect_close, gpu};
use libtest_mimic::Trial;

use super::promises::{SIZE, model};
use super::{Inputs, options};
use crate::dist::{launches, options as patience, places};

const STEPS: usize = 5;

pub fn register(suite: &mut Suite) {
    suite.cpu("train::ranks::ranks_equal_micro_batches", equal_micro_batches);
    suite.cpu(
        "train::ranks::sharded_equals_unsharded_bit_for_bit",
        sharded_equals_unsharded,
    );
    suite.cuda("train::ranks::nccl_with_one_rank_equals_a_rank_alone", nccl_alone);
    if let Some(trial) = suite.trials.pop() {
        suite
            .trials
            .push(trial.with_ignored_flag(gpu().is_err() || nccl_available().is_err()));
    }
    let few = visible_gpus().map_or(true, |gpus| gpus < 2) || nccl_available().is_err();
    let two = Trial::test("train::ranks::two_gpus_equal_micro_batches", two_gpus);
    suite.trials.push(two.with_kind("2 gpus").with_ignored_flag(few));
}

/// What came of some steps on one rank.
#[derive(Debug, PartialEq)]
struct Trained {
    losses: Vec<f32>,
    norms: Vec<f32>,
    weights: Vec<(String, Vec<f32>)>,
}

/// Takes steps of `batches` micro-batches each, of which this rank takes every one that is its turn.
fn train(device: &Device, options: &TrainOptions, ranks: &Ranks, batches: usize) -> Result<Trained> {
    let (config, params) = model();
    let spec = ZImage::read(&params, &config)?;
    let mut model = TrainableModel::load_among(&spec, &params, device, options, ranks, &mut |_, _| Ok(()))?;
    let (mut losses, mut norms) = (Vec::new(), Vec::new());
    for step in 0..STEPS {
        let own: Vec<usize> = (ranks.world.rank()..batches).step_by(ranks.world.size()).collect();
        for &batch in &own {
            // Captions differ in length, so that ranks take different times.
            let inputs = Inputs::new(
                device,
                &format!("{step} {batch}"),
                &config,
                SIZE,
                &[20 + 25 * (batch % 2)],
            )?;
            let weight = 1.0 / batches as f32;
            let loss = inputs.batch(|inputs| match Some(&batch) == own.last() {
                true => model.accumulate_last(inputs, weight),
                false => model.accumulate(inputs, weight),
            })?;
            losses.push(loss.to_vec_f32()?[0]);
        }
        norms.push(model.step(1e-3)?.read()?.0);
    }
    let weights = model.trained().into_iter();
    let weights = weights
        .map(|tensor| {
            Ok((
                tensor.name.clone(),
                tensor.read(StatePart::Weight)?.expect("a weight is kept"),
            ))
        })
        .collect::<Result<_>>()?;
    Ok(Trained { losses, norms, weights })
}

fn among(world: World, sharding: Sharding, bucket_bytes: usize) -> Ranks {
    Ranks {
        world: Rc::new(world),
        sharding,
        bucket_bytes,
    }
}

/// As many ranks as `devices`.
fn together(
    devices: &[Device],
    options: &TrainOptions,
    sharding: Sharding,
    bucket_bytes: usize,
    batches: usize,
) -> Result<Vec<Trained>> {
    let trained = places(launches(devices.len()), &patience(), |launch, waits| {
        let device = &devices[launch.rank];
        let ranks = among(World::connect(launch, device, waits)?, sharding, bucket_bytes);
        train(device, options, &ranks, batches)
    });
    trained.into_iter().collect()
}

fn clipped(policy: &str) -> TrainOptions {
    TrainOptions {
        clip_norm: Some(0.5),
        ema_decay: Some(0.9),
        ..options(policy, Recompute::None)
    }
}

/// Checks that all ranks have the same weights, and those that one rank alone has within `tolerance`.
fn expect_like_one(alone: &Trained, ranks: &[Trained], tolerance: f64) -> Outcome {
    let mut losses = vec![0.0; alone.losses.len()];
    for (rank, trained) in ranks.iter().enumerate() {
        assert!(
            trained.weights == ranks[0].weights && trained.norms == ranks[0].norms,
            "rank {rank}"
        );
        let own = losses.iter_mut().skip(rank).step_by(ranks.len());
        own.zip(&trained.losses).for_each(|(place, loss)| *place = *loss);
    }
    expect_close("losses", &losses, &alone.losses, [losses.len()], tolerance)?;
    expect_close("norms", &ranks[0].norms, &alone.norms, [STEPS], 4.0 * tolerance)?;
    for ((name, expected), (_, found)) in alone.weights.iter().zip(&ranks[0].weights) {
        expect_close(name, found, expected, [found.len()], tolerance)?;
    }
    Ok(())
}

fn equal_micro_batches() -> Outcome {
    for (policy, ranks, batches) in [("full", 2, 2), ("paper:1", 3, 6), ("head-only", 2, 4)] {
        let options = clipped(policy);
        let alone = train(&Device::Cpu, &options, &Ranks::solo(), batches)?;
        let devices = vec![Device::Cpu; ranks];
        let found = together(&devices, &options, Sharding::Optimizer, 50_000, batches)?;
        expect_like_one(&alone, &found, 1e-4)?;
    }
    Ok(())
}

fn sharded_equals_unsharded() -> Outcome {
    let devices = vec![Device::Cpu; 3];
    let options = clipped("released:1");
    let found = |sharding, bucket| together(&devices, &options, sharding, bucket, 3);
    let sharded = found(Sharding::Optimizer, 50_000)?;
    assert!(sharded == found(Sharding::None, 50_000)?, "unsharded differs");
    // One bucket for everything, one for every tensor.
    let one = found(Sharding::Optimizer, usize::MAX)?;
    let each = found(Sharding::None, 0)?;
    for (other, what) in [(&one, "one bucket"), (&each, "a bucket for each tensor")] {
        expect_close(what, &other[0].norms, &sharded[0].norms, [STEPS], 1e-5)?;
    }
    Ok(())
}

fn nccl_alone(device: &Device) -> Outcome {
    let options = clipped("full");
    let alone = train(device, &options, &Ranks::solo(), 2)?;
    for sharding in [Sharding::Optimizer, Sharding::None] {
        let found = together(std::slice::from_ref(device), &options, sharding, 50_000, 2)?;
        expect_like_one(&alone, &found, 2e-2)?;
    }
    Ok(())
}

fn two_gpus() -> Outcome {
    let devices: Vec<Device> = (0..2)
        .map(|index| Device::open(DeviceChoice::Cuda(index)))
        .collect::<Result<_>>()?;
    let options = clipped("full");
    let alone = train(&devices[0], &options, &Ranks::solo(), 2)?;
    let sharded = together(&devices, &options, Sharding::Optimizer, 50_000, 2)?;
    expect_like_one(&alone, &sharded, 2e-2)?;
    let unsharded = together(&devices, &options, Sharding::None, 50_000, 2)?;
    assert!(sharded == unsharded, "unsharded differs");
    Ok(())
}
