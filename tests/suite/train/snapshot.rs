//! Snapshots: copies of a model of one step, made while later steps are taken.

use std::collections::HashMap;

use l2p_engine::model::config::ModelKind;
use l2p_engine::model::zimage::DitConfig;
use l2p_engine::train::{Recompute, SnapshotMemory, StatePart, StateSource, TrainOptions, TrainableModel};
use l2p_engine::{DType, Device, Result, Tensor};
use l2p_tests::{Outcome, Suite};

use super::{Inputs, load, options};
use crate::models::{random_model, small_config};

pub fn register(suite: &mut Suite) {
    suite.cpu("train::snapshot::it_is_of_its_step", || its_step(&Device::Cpu));
    suite.cpu("train::snapshot::too_little_memory_is_named", too_little);
    suite.cuda("train::snapshot::cuda_it_is_of_its_step", its_step);
    suite.cuda("train::snapshot::cuda_it_outlives_its_model", outlives);
}

fn config() -> DitConfig {
    DitConfig {
        layers: 3,
        ..small_config(ModelKind::Pixel, 384, 16)
    }
}

fn model(device: &Device) -> Result<TrainableModel> {
    let options = TrainOptions {
        clip_norm: Some(0.5),
        ema_decay: Some(0.9),
        ..options("released:1", Recompute::None)
    };
    let config = config();
    load(&random_model(&config, &[8, 16, 24, 32]), device, &config, &options)
}

/// One step on a batch that `name` decides; the loss, on the device, so that nobody waits.
fn step(model: &mut TrainableModel, device: &Device, name: &str) -> Result<Tensor> {
    let inputs = Inputs::new(device, name, &config(), [48, 80], &[20, 45])?;
    let loss = inputs.batch(|batch| model.accumulate(batch, 1.0))?;
    model.step(1e-3)?;
    Ok(loss)
}

/// All that checkpoints are made of, by name.
fn values(source: &dyn StateSource) -> Result<HashMap<String, Vec<f32>>> {
    let mut found = HashMap::new();
    for tensor in source.trained() {
        found.insert(tensor.name.clone(), tensor.read(StatePart::Weight)?.expect("a weight"));
    }
    for tensor in source.state_tensors() {
        found.insert(tensor.name.clone(), tensor.read()?);
    }
    Ok(found)
}

/// What a snapshot holds is what the model was, whatever steps followed; and taking it changes nothing.
fn its_step(device: &Device) -> Outcome {
    let (mut plain, mut copied) = (model(device)?, model(device)?);
    let mut memory = SnapshotMemory::new(device, copied.snapshot_bytes(), &|| Ok(()))?;
    let mut losses = Vec::new();
    // The same memory serves one snapshot after the other.
    for round in 0..3 {
        let names = ["a", "b", "c", "d"].map(|name| format!("{name}{round}"));
        for name in &names[..2] {
            losses.push((step(&mut plain, device, name)?, step(&mut copied, device, name)?));
        }
        let expected = values(&plain)?;
        let snapshot = copied.snapshot(memory)?;
        for name in &names[2..] {
            losses.push((step(&mut plain, device, name)?, step(&mut copied, device, name)?));
        }
        assert_eq!(snapshot.steps(), 4 * round + 2);
        let found = values(&snapshot)?;
        let mut names: Vec<&String> = expected.keys().collect();
        names.sort();
        assert_eq!(found.len(), names.len());
        for name in names {
            assert!(
                found[name] == expected[name],
                "round {round}: `{name}` is of another step"
            );
        }
        assert!(values(&copied)? != expected, "later steps changed nothing");
        let held = snapshot.held_seconds()?;
        assert!((0.0..10.0).contains(&held), "the device stood still for {held} s");
        // Gradients are no part of it.
        let source: &dyn StateSource = &snapshot;
        assert!(source.trained()[0].read(StatePart::Gradient)?.is_none());
        memory = snapshot.into_memory();
    }
    for (plain, copied) in &losses {
        assert_eq!(plain.to_vec_f32()?, copied.to_vec_f32()?);
    }
    assert!(values(&plain)? == values(&copied)?, "snapshots change the training");
    Ok(())
}

/// The model may go, and its memory to others, while the copies are made.
fn outlives(device: &Device) -> Outcome {
    let mut model = model(device)?;
    step(&mut model, device, "a")?;
    let expected = values(&model)?;
    let memory = SnapshotMemory::new(device, model.snapshot_bytes(), &|| Ok(()))?;
    let bytes = model.snapshot_bytes();
    let snapshot = model.snapshot(memory)?;
    drop(model);
    let taken = Tensor::zeros(device, [bytes], DType::U8)?;
    assert!(values(&snapshot)? == expected);
    drop(taken);
    Ok(())
}

fn too_little() -> Outcome {
    let device = Device::Cpu;
    let refused = SnapshotMemory::new(&device, usize::MAX / 2, &|| Ok(()));
    let message = refused.err().ok_or("more memory than there is was given")?.to_string();
    assert!(message.contains("no host memory for"), "{message}");
    Ok(())
}
