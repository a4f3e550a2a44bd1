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
    suite.cuda(
        "device::graph::memory_of_dropped_tensors_is_held",
        memory_of_dropped_tensors_is_held,
    );
    suite.cuda(
        "device::graph::copies_from_the_host_are_refused",
        copies_from_the_host_are_refused,
    );
    suite.cuda("device::graph::holes_serve_recordings", holes_serve_recordings);
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
        let mut factors = Tensor::from_slice(device, &[1f32, 0.0], [2])?;
        let mut graph = None;
        for step in 1..=5 {
            factors.copy_from_slice(&[1.0, -0.1 * step as f32])?;
            let mut work = || {
                // A temporary of the recording, in the way of whoever allocates between replays.
                let rounded = cast(&cast(&velocity, DType::Bf16)?, DType::F32)?;
                guided_euler_step(&mut x, &rounded, None, &factors)
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

/// What recorded work reads and writes is dropped before it is replayed: nobody else gets that memory, and it returns with the
/// graph.
fn memory_of_dropped_tensors_is_held(device: &Device) -> Outcome {
    let Device::Cuda(cuda) = device else {
        return Err("not a GPU".into());
    };
    const COUNT: usize = 100_000;
    let held = || device.memory_report().total.current;
    let before = held();
    let mut graph = {
        let source = Tensor::from_slice(device, &random("source", COUNT), [COUNT])?;
        let mut target = Tensor::zeros(device, [COUNT], DType::F32)?;
        Graph::record(cuda, || target.copy_from(&source))?
    };
    assert!(held() >= before + 2 * 4 * COUNT as u64, "the graph holds too little");
    let zeros = vec![0f32; COUNT];
    let bystanders: Vec<Tensor> = (0..8)
        .map(|_| Tensor::from_slice(device, &zeros, [COUNT]))
        .collect::<l2p_engine::Result<_>>()?;
    graph.launch()?;
    for bystander in &bystanders {
        assert_eq!(bystander.to_vec::<f32>()?, zeros);
    }
    drop((graph, bystanders));
    assert_eq!(held(), before);
    Ok(())
}

fn copies_from_the_host_are_refused(device: &Device) -> Outcome {
    let Device::Cuda(cuda) = device else {
        return Err("not a GPU".into());
    };
    let mut x = Tensor::zeros(device, [64], DType::F32)?;
    let outcome = Graph::record(cuda, || x.copy_from_slice(&[1f32; 64]));
    let message = outcome.err().map(|error| error.to_string()).unwrap_or_default();
    assert!(message.contains("a copy from the host cannot be recorded"), "{message}");
    x.copy_from_slice(&[1f32; 64])?;
    assert_eq!(x.to_vec::<f32>()?, [1f32; 64]);
    Ok(())
}

/// A recording finds the memory of holes that are too small for its tensors, where the pool can move it; what is between the holes stays.
fn holes_serve_recordings(device: &Device) -> Outcome {
    let Device::Cuda(cuda) = device else {
        return Err("not a GPU".into());
    };
    const COUNT: usize = 24 << 20;
    let moves = device.memory_report().reserved > 0;
    let mut between = Vec::new();
    let mut holes = Vec::new();
    for number in 0..4 {
        holes.push(Tensor::zeros(device, [COUNT], DType::F32)?);
        between.push(Tensor::from_slice(device, &[number as f32; 1000], [1000])?);
    }
    holes.clear();
    let before = device.memory_report().reserved;
    let velocity = Tensor::from_slice(device, &random("v", 1000), [1000])?;
    let mut graph = Graph::record(cuda, || {
        let large = Tensor::zeros(device, [3 * COUNT], DType::F32)?;
        cast(&large, DType::Bf16).map(|_| ())?;
        cast(&velocity, DType::Bf16).map(|_| ())
    })?;
    graph.launch()?;
    device.synchronize()?;
    for (number, tensor) in between.iter().enumerate() {
        assert!(tensor.to_vec::<f32>()?.iter().all(|value| *value == number as f32));
    }
    // 450 MB in a row and half of them beside, of 400 MB in four holes.
    let grown = device.memory_report().reserved - before;
    let needed = (3 * COUNT * (4 + 2)) as u64 - 4 * (COUNT * 4) as u64;
    let edges = 10 * (32 << 20);
    assert!(
        !moves || grown <= needed + edges,
        "the pool grew by {grown} bytes where {needed} were missing"
    );
    drop(graph);
    // Memory that was moved is found again.
    let again = Tensor::zeros(device, [3 * COUNT], DType::F32)?;
    assert!(
        again
            .narrow(3 * COUNT - 1000, 1000)?
            .to_vec::<f32>()?
            .iter()
            .all(|value| *value == 0.0)
    );
    Ok(())
}
