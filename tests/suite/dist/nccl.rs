//! The data plane between GPUs: with one GPU as a world of one, with two as two processes.

use std::process::Command;

use half::bf16;
use l2p_engine::device::visible_gpus;
use l2p_engine::dist::{World, nccl_available};
use l2p_engine::{DType, Device, Result, Tensor};
use l2p_tests::cli::{Finished, program};
use l2p_tests::{Outcome, Suite, gpu, random};
use libtest_mimic::Trial;

use super::{launches, options};

pub fn register(suite: &mut Suite) {
    let one = |suite: &mut Suite, name: &str, test: fn(&Device) -> Outcome| {
        suite.cuda(name, test);
        // Where there is a GPU and no NCCL, there is nothing to test.
        if let Some(trial) = suite.trials.pop() {
            suite
                .trials
                .push(trial.with_ignored_flag(gpu().is_err() || nccl_available().is_err()));
        }
    };
    one(suite, "dist::nccl::a_world_of_one_equals_plain_copies", alone);
    one(suite, "dist::nccl::memory_is_not_reused_while_it_travels", reuse);
    let few = visible_gpus().map_or(true, |gpus| gpus < 2) || nccl_available().is_err();
    for (name, test) in [
        ("dist::nccl::two_gpus_give_the_right_bits", two as fn() -> Outcome),
        ("dist::nccl::two_gpus_and_one_lost", lost),
    ] {
        suite
            .trials
            .push(Trial::test(name, test).with_kind("2 gpus").with_ignored_flag(few));
    }
}

fn world(device: &Device) -> Result<World> {
    World::connect(launches(1).remove(0), device, &options())
}

fn alone(device: &Device) -> Outcome {
    let ranks = world(device)?;
    let communicator = ranks.communicator();
    for size in [0, 1, 7, 8, 70_001, 5_000_000] {
        let values = random("values", size);
        let x = Tensor::from_slice(device, &values, [1, size])?;
        let empty = || Tensor::empty(device, [1, size], DType::F32);
        assert_eq!(communicator.all_to_all(&x, empty()?)?.wait()?.to_vec::<f32>()?, values);
        let row = x.reshape([size])?;
        assert_eq!(
            communicator.all_gather(&row, empty()?)?.wait()?.to_vec::<f32>()?,
            values
        );
        let own = Tensor::from_slice(device, &values, [size])?;
        assert_eq!(communicator.broadcast(own, 0)?.wait()?.to_vec::<f32>()?, values);
        let halves: Vec<bf16> = values.iter().map(|value| bf16::from_f32(*value)).collect();
        let narrow = Tensor::from_slice(device, &halves, [1, size])?;
        let expected: Vec<f32> = halves.iter().map(|value| value.to_f32() * 0.3).collect();
        assert_eq!(
            communicator.reduce_scatter(&narrow)?.wait(0.3)?.to_vec::<f32>()?,
            expected
        );
        assert_eq!(communicator.all_reduce(&narrow, 0.3)?.to_vec::<f32>()?, expected);
    }
    communicator.settle()?;
    ranks.leave()?;
    Ok(())
}

/// Tensors that are dropped while an operation uses them are not handed out again before it has ended.
fn reuse(device: &Device) -> Outcome {
    const SIZE: usize = 16 << 20;
    let ranks = world(device)?;
    let communicator = ranks.communicator();
    let values = random("values", SIZE);
    for _ in 0..10 {
        let pending = {
            let x = Tensor::from_slice(device, &values, [1, SIZE])?;
            communicator.all_to_all(&x, Tensor::empty(device, [1, SIZE], DType::F32)?)?
        };
        // One that nobody waits for.
        let x = Tensor::from_slice(device, &values, [1, SIZE])?;
        drop(communicator.all_to_all(&x, Tensor::empty(device, [1, SIZE], DType::F32)?)?);
        drop(x);
        for _ in 0..4 {
            drop(Tensor::zeros(device, [1, SIZE], DType::F32)?);
        }
        assert!(pending.wait()?.to_vec::<f32>()? == values);
    }
    ranks.leave()?;
    Ok(())
}

fn ranks(arguments: &[&str]) -> std::result::Result<Finished, libtest_mimic::Failed> {
    let mut command = Command::new(program("bench-ranks")?);
    Finished::from(command.args(["--ranks", "2", "--device", "cuda"]).args(arguments))
}

fn two() -> Outcome {
    let sizes = "0,1,7,1000,65536,1000003,16777216";
    let finished = ranks(&["check", "--sizes", sizes])?.success()?;
    assert!(finished.stdout.starts_with("2 ranks over NCCL "), "{}", finished.stdout);
    assert!(
        finished.stdout.contains("every operation right at 14 sizes and types"),
        "{}",
        finished.stdout
    );
    Ok(())
}

fn lost() -> Outcome {
    let finished = ranks(&["faults"])?.success()?;
    // Five ways to lose either of two ranks.
    assert_eq!(finished.stdout.lines().count(), 10, "{}", finished.stdout);
    Ok(())
}
