//! Recorded work gives what call by call gives, and its memory is nobody else's.

use l2p_engine::device::Graph;
use l2p_engine::ops::cast::cast;
use l2p_engine::ops::guidance::guided_euler_step;
use l2p_engine::{DType, Device, Tensor};
use l2p_tests::{Outcome, Suite, expect_close, random};

pub fn register(suite: &mut Suite) {
    suite.cuda("device::graph::replays_equal_calls", replays_equal_calls);
    suite.cuda(
        "device::graph::tensors_do_not_outlive_a_recording",
        tensors_do_not_outlive_a_recording,
    );
}

fn replays_equal_calls(device: &Device) -> Outcome {
    let Device::Cuda(cuda) = device else {
        return Err("not a GPU".into());
    };
    const COUNT: usize = 100_000;
    let values = random("x", COUNT);
    let velocity = Tensor::from_slice(device, &random("v", COUNT), [COUNT])?;
    let run = |recorded: bool| -> l2p_engine::Result<Vec<f32>> {
        let mut x = Tensor::from_slice(device, &values, [COUNT])?;
        let mut delta = Tensor::from_slice(device, &[0f32], [1])?;
        let mut graph = None;
        for step in 1..=5 {
            delta.copy_from_slice(&[-0.1 * step as f32])?;
            let mut work = || {
                // A temporary of the recording, in the way of whoever allocates between replays.
                let rounded = cast(&cast(&velocity, DType::Bf16)?, DType::F32)?;
                guided_euler_step(&mut x, &rounded, None, &delta)
            };
            match &mut graph {
                Some(graph) => Graph::launch(graph)?,
                None if recorded && step > 1 => {
                    let mut new = Graph::record(cuda, work)?;
                    new.launch()?;
                    graph = Some(new);
                }
                None => work()?,
            }
            let bystander = Tensor::from_slice(device, &values, [COUNT])?;
            if let Some(graph) = graph.as_mut().filter(|_| step == 5) {
                // Nothing that was allocated since may change when the graph runs again.
                let before = x.to_vec::<f32>()?;
                graph.launch()?;
                assert_eq!(bystander.to_vec::<f32>()?, values);
                x.copy_from_slice(&before)?;
            }
        }
        x.to_vec::<f32>()
    };
    expect_close("replayed steps", &run(true)?, &run(false)?, [COUNT], 0.0)
}

fn tensors_do_not_outlive_a_recording(device: &Device) -> Outcome {
    let Device::Cuda(cuda) = device else {
        return Err("not a GPU".into());
    };
    let x = Tensor::from_slice(device, &random("x", 64), [64])?;
    let mut kept = Some(cast(&x, DType::Bf16)?);
    let outcome = Graph::record(cuda, || {
        kept = Some(cast(&x, DType::Bf16)?);
        Ok(())
    });
    let message = outcome.err().map(|error| error.to_string()).unwrap_or_default();
    assert!(message.contains("outlives the recording"), "{message}");
    drop(kept);
    Ok(())
}
