//! What a trainable transformer promises, whatever it is trained on.

use std::collections::HashMap;

use l2p_engine::layers::MemoryParams;
use l2p_engine::model::Denoiser;
use l2p_engine::model::config::ModelKind;
use l2p_engine::model::zimage::DitConfig;
use l2p_engine::ops::cast::cast;
use l2p_engine::train::{Recompute, StatePart, TrainOptions, TrainableModel};
use l2p_engine::{DType, Device, Result, Tensor};
use l2p_tests::{Outcome, Suite, expect_close, relative_error};

use super::{Inputs, load, options, trains};
use crate::models::{random_model, small_config};

pub fn register(suite: &mut Suite) {
    suite.cpu("train::promises::frozen_weights_stay", || {
        frozen_weights_stay(&Device::Cpu)
    });
    suite.cpu("train::promises::recomputing_gives_the_same_bits", || {
        recomputing(&Device::Cpu)
    });
    suite.cpu("train::promises::restored_state_continues_bit_for_bit", || {
        restored(&Device::Cpu)
    });
    suite.cpu("train::promises::a_trained_model_is_its_weights", || {
        a_trained_model_is_its_weights(&Device::Cpu)
    });
    suite.cpu("train::promises::a_frozen_trunk_may_be_in_eight_bits", || {
        eight_bit_trunk(&Device::Cpu)
    });
    suite.cuda(
        "train::promises::cuda_a_frozen_trunk_may_be_in_eight_bits",
        eight_bit_trunk,
    );
    suite.cpu("train::promises::micro_batches_add_up", micro_batches_add_up);
    suite.cpu("train::promises::the_loss_falls", the_loss_falls);
    suite.cpu("train::promises::mistakes_are_named", mistakes_are_named);
    suite.cuda("train::promises::cuda_frozen_weights_stay", frozen_weights_stay);
    suite.cuda("train::promises::cuda_recomputing_gives_the_same_bits", recomputing);
    suite.cuda("train::promises::cuda_restored_state_continues_bit_for_bit", restored);
    suite.cuda(
        "train::promises::cuda_a_trained_model_is_its_weights",
        a_trained_model_is_its_weights,
    );
}

const HEAD: [usize; 4] = [8, 16, 24, 32];
pub const SIZE: [usize; 2] = [48, 80];
const LENGTHS: [usize; 2] = [20, 45];

pub fn model() -> (DitConfig, MemoryParams) {
    let config = DitConfig {
        layers: 3,
        ..small_config(ModelKind::Pixel, 384, 16)
    };
    let params = random_model(&config, &HEAD);
    (config, params)
}

fn with_extras(policy: &str, recompute: Recompute) -> TrainOptions {
    TrainOptions {
        clip_norm: Some(0.5),
        ema_decay: Some(0.9),
        ..options(policy, recompute)
    }
}

/// One step on a batch that `name` decides; the loss and the norm.
fn step(model: &mut TrainableModel, device: &Device, config: &DitConfig, name: &str) -> Result<Vec<f32>> {
    let inputs = Inputs::new(device, name, config, SIZE, &LENGTHS)?;
    let mut found = inputs.batch(|batch| model.accumulate(batch, 1.0))?.to_vec_f32()?;
    found.push(model.step(1e-3)?.read()?.0);
    Ok(found)
}

/// Everything that is kept of the trained tensors, by name.
fn state(model: &TrainableModel) -> Result<HashMap<String, Vec<f32>>> {
    let tensors = model.state_tensors().into_iter();
    tensors
        .map(|tensor| Ok((tensor.name.clone(), tensor.read()?)))
        .collect()
}

/// Every parameter of the model as it computes with them.
fn weights(model: &TrainableModel) -> Result<Vec<(String, Vec<f32>)>> {
    model.parameter_values()
}

fn frozen_weights_stay(device: &Device) -> Outcome {
    let (config, params) = model();
    for policy in [
        "paper:1",
        "released:1",
        "head-only",
        "layers.1.attention*,cap_embedder.1.bias",
    ] {
        let options = with_extras(policy, Recompute::Frozen);
        let mut model = load(&params, device, &config, &options)?;
        let before = weights(&model)?;
        for name in ["a", "b", "c"] {
            step(&mut model, device, &config, name)?;
        }
        assert_eq!(model.steps(), 3);
        for ((name, before), (_, after)) in before.iter().zip(&weights(&model)?) {
            let trained = trains(&options.policy, name, config.layers);
            assert!(trained || before == after, "{policy}: frozen `{name}` has changed");
            assert!(
                !trained || before != after,
                "{policy}: trained `{name}` has not changed"
            );
        }
    }
    Ok(())
}

/// A loss, and gradients by name.
type Found = (f32, Vec<(String, Vec<f32>)>);

/// Blocks that are not trained compute in eight bits: the loss and the gradients are nearly the same, with whatever is recomputed, and steps
/// leave their weights as they are.
fn eight_bit_trunk(device: &Device) -> Outcome {
    let (config, params) = model();
    let run = |trunk: &str, recompute: Recompute| -> Result<Found> {
        let options = TrainOptions {
            trunk: trunk.parse()?,
            ..options("paper:1", recompute)
        };
        let mut model = load(&params, device, &config, &options)?;
        let codes = |model: &TrainableModel| -> Result<Vec<Vec<u8>>> {
            let frozen = model.frozen().into_iter();
            let codes = frozen.filter(|(_, tensor)| tensor.dtype() == DType::U8);
            codes.map(|(_, tensor)| tensor.to_vec::<u8>()).collect()
        };
        let before = codes(&model)?;
        assert_eq!(before.is_empty(), trunk == "bf16", "{trunk}");
        let inputs = Inputs::new(device, "a", &config, SIZE, &LENGTHS)?;
        let loss = inputs.batch(|batch| model.accumulate(batch, 1.0))?.to_vec_f32()?[0];
        let gradients = model.trained().into_iter().map(|tensor| {
            let gradient = tensor.read(StatePart::Gradient)?;
            Ok((tensor.name.clone(), gradient.expect("it is trained")))
        });
        let gradients = gradients.collect::<Result<Vec<_>>>()?;
        model.step(1e-3)?;
        assert!(codes(&model)? == before, "{trunk}: frozen weights have changed");
        Ok((loss, gradients))
    };
    let (loss, gradients) = run("bf16", Recompute::None)?;
    for (trunk, bound) in [("int8", 0.05), ("fp8", 0.15)] {
        for recompute in Recompute::ALL {
            let (found, others) = run(trunk, recompute)?;
            let off = (found - loss).abs() / loss;
            assert!(
                off > 0.0 && off < bound,
                "{trunk}, recompute {recompute}: the loss is off by {off}"
            );
            for ((name, expected), (_, found)) in gradients.iter().zip(&others) {
                let error = relative_error(found, expected);
                assert!(
                    error < f64::from(bound),
                    "{trunk}, recompute {recompute}: {name} is off by {error}"
                );
            }
        }
    }
    let options = TrainOptions {
        trunk: "int8".parse()?,
        ..options("full", Recompute::None)
    };
    let refused = load(&params, device, &config, &options)
        .err()
        .map(|error| error.to_string());
    assert!(refused.is_some_and(|message| message.contains("trains all of them")));
    Ok(())
}

fn recomputing(device: &Device) -> Outcome {
    let (config, params) = model();
    let run = |recompute: Recompute| -> Result<Vec<(String, Vec<f32>)>> {
        let mut model = load(&params, device, &config, &options("released:1", recompute))?;
        let inputs = Inputs::new(device, "a", &config, SIZE, &LENGTHS)?;
        let loss = inputs.batch(|batch| model.accumulate(batch, 1.0))?.to_vec_f32()?;
        let gradients = model.trained().into_iter().map(|tensor| {
            let gradient = tensor.read(StatePart::Gradient)?;
            Ok((tensor.name.clone(), gradient.expect("it is trained")))
        });
        let mut found = gradients.collect::<Result<Vec<_>>>()?;
        found.insert(0, ("the loss".into(), loss));
        Ok(found)
    };
    // Twice the same, and the same whatever is kept.
    let first = run(Recompute::None)?;
    for again in [Recompute::None, Recompute::Frozen, Recompute::All] {
        let found = run(again)?;
        let differing = first.iter().zip(&found).filter(|(a, b)| a != b);
        let differing: Vec<String> = differing
            .map(|((name, a), (_, b))| format!("{name} by {:.1e}", relative_error(a, b)))
            .collect();
        assert!(
            differing.is_empty(),
            "recomputing {again} gives other bits: {}",
            differing.join(", ")
        );
    }
    Ok(())
}

fn restored(device: &Device) -> Outcome {
    let (config, params) = model();
    let options = with_extras("released:1", Recompute::None);
    let mut unbroken = load(&params, device, &config, &options)?;
    for name in ["a", "b"] {
        step(&mut unbroken, device, &config, name)?;
    }
    let (kept, steps) = (state(&unbroken)?, unbroken.steps());
    let expected = [
        step(&mut unbroken, device, &config, "c")?,
        step(&mut unbroken, device, &config, "d")?,
    ];

    let mut resumed = load(&params, device, &config, &options)?;
    resumed.restore_state(steps, &mut |name, _| Ok(kept[name].clone()))?;
    assert!(state(&resumed)? == kept, "the restored state is another");
    let found = [
        step(&mut resumed, device, &config, "c")?,
        step(&mut resumed, device, &config, "d")?,
    ];
    assert_eq!(found, expected);
    assert_eq!(resumed.steps(), 4);
    assert!(weights(&resumed)? == weights(&unbroken)?, "the weights differ");
    assert!(state(&resumed)? == state(&unbroken)?, "the states differ");
    // Averages lie between what the weights were and what they are.
    let tensor = &resumed.trained()[0];
    let [weight, average] = [StatePart::Weight, StatePart::Ema].map(|part| tensor.read(part));
    assert!(weight? != average?);

    let message = resumed
        .restore_state(1, &mut |_, _| Ok(vec![0.0]))
        .unwrap_err()
        .to_string();
    assert!(message.contains("has 1 values, expected ["), "{message}");
    Ok(())
}

/// The velocity by the way that sampling takes.
fn sampled(dit: &dyn Denoiser, inputs: &Inputs) -> Result<Vec<f32>> {
    let captions: Vec<&Tensor> = inputs.captions.iter().collect();
    let image = cast(&inputs.images, dit.device().compute_dtype())?;
    let prepared = dit.prepare(&captions, [image.dim(1), image.dim(2)])?;
    dit.forward(&image, &prepared, &dit.modulate(&inputs.sigmas, None)?)?
        .to_vec_f32()
}

/// Nothing that kernels keep of the weights stays behind when these change, by a step or by what was saved: sampling and training
/// give the bits of a model that was read with the new weights.
fn a_trained_model_is_its_weights(device: &Device) -> Outcome {
    // Heads whose convolutions are arranged for Hopper; the second one's outermost stage too.
    for (patch, widths, size) in [
        (16, &[32, 32, 64, 64][..], [48, 80]),
        (64, &[16, 16, 32, 32, 32, 64][..], [64, 128]),
    ] {
        let config = DitConfig {
            layers: 2,
            ..small_config(ModelKind::Pixel, 384, patch)
        };
        let mut params = random_model(&config, widths);
        let options = options("full", Recompute::None);
        let inputs = Inputs::new(device, "a", &config, size, &LENGTHS)?;
        let loss = |model: &mut TrainableModel| inputs.batch(|batch| model.accumulate(batch, 1.0))?.to_vec_f32();

        let mut model = load(&params, device, &config, &options)?;
        let untrained = sampled(model.denoiser(), &inputs)?;
        for _ in 0..2 {
            loss(&mut model)?;
            model.step(1e-2)?;
        }
        for (name, values) in weights(&model)? {
            params.0.get_mut(&name).expect("a parameter of the model").1 = values;
        }
        let mut fresh = load(&params, device, &config, &options)?;
        let expected = sampled(fresh.denoiser(), &inputs)?;
        assert!(
            sampled(model.denoiser(), &inputs)? == expected,
            "patch {patch}: sampling differs"
        );
        assert!(untrained != expected, "patch {patch}: training changed nothing");
        assert_eq!(loss(&mut model)?, loss(&mut fresh)?, "patch {patch}: training differs");

        let kept = state(&model)?;
        let mut restored = load(&random_model(&config, widths), device, &config, &options)?;
        assert!(sampled(restored.denoiser(), &inputs)? == untrained);
        restored.restore_state(2, &mut |name, _| Ok(kept[name].clone()))?;
        assert!(
            sampled(restored.denoiser(), &inputs)? == expected,
            "patch {patch}: what was restored differs"
        );
    }
    Ok(())
}

/// Two micro-batches of one item, half each, against one batch of both.
fn micro_batches_add_up() -> Outcome {
    let (config, params) = model();
    let options = options("full", Recompute::None);
    let inputs = Inputs::new(&Device::Cpu, "a", &config, SIZE, &LENGTHS)?;
    let mut together = load(&params, &Device::Cpu, &config, &options)?;
    let loss = inputs.batch(|batch| together.accumulate(batch, 1.0))?.to_vec_f32()?[0];
    let mut apart = load(&params, &Device::Cpu, &config, &options)?;
    let mut losses = 0.0;
    for item in 0..2 {
        let one = Inputs {
            images: inputs.images.narrow(item, 1)?,
            noise: inputs.noise.narrow(item, 1)?,
            sigmas: vec![inputs.sigmas[item]],
            captions: vec![inputs.captions[item].clone()],
        };
        losses += one.batch(|batch| apart.accumulate(batch, 0.5))?.to_vec_f32()?[0] / 2.0;
    }
    assert!((losses - loss).abs() < 1e-5 * loss, "{losses} {loss}");
    for (together, apart) in together.trained().iter().zip(&apart.trained()) {
        let gradient = |tensor: &l2p_engine::train::TrainedTensor<'_>| -> Result<Vec<f32>> {
            Ok(tensor.read(StatePart::Gradient)?.expect("it is trained"))
        };
        let shape = together.shape.as_slice();
        expect_close(&together.name, &gradient(apart)?, &gradient(together)?, shape, 2e-5)?;
    }
    Ok(())
}

fn the_loss_falls() -> Outcome {
    let (config, params) = model();
    let mut model = load(&params, &Device::Cpu, &config, &with_extras("paper:1", Recompute::All))?;
    let mut losses = Vec::new();
    for _ in 0..6 {
        losses.push(step(&mut model, &Device::Cpu, &config, "a")?[0]);
    }
    assert!(losses.windows(2).all(|pair| pair[1] < pair[0]), "{losses:?}");
    Ok(())
}

fn mistakes_are_named() -> Outcome {
    let (config, params) = model();
    let refused = |policy: &str| {
        let outcome = load(&params, &Device::Cpu, &config, &options(policy, Recompute::None));
        outcome.map(|_| ()).unwrap_err().to_string()
    };
    assert!(refused("layers.0.feed_forward.w3.*").contains("train both or neither"));
    assert!(refused("layer.*").starts_with("the pattern `layer.*` of the freeze policy fits no tensor of this model"));
    let mut model = load(&params, &Device::Cpu, &config, &options("head-only", Recompute::None))?;
    let inputs = Inputs::new(&Device::Cpu, "a", &config, SIZE, &LENGTHS)?;
    let message = |inputs: &Inputs, model: &mut TrainableModel| {
        let outcome = inputs.batch(|batch| model.accumulate(batch, 1.0));
        outcome.map(|_| ()).unwrap_err().to_string()
    };
    let few = Inputs {
        captions: inputs.captions[..1].to_vec(),
        ..Inputs::new(&Device::Cpu, "a", &config, SIZE, &LENGTHS)?
    };
    assert_eq!(message(&few, &mut model), "dit: 1 captions and 2 times for 2 images");
    let loud = Inputs {
        sigmas: vec![0.5, 1.5],
        ..Inputs::new(&Device::Cpu, "a", &config, SIZE, &LENGTHS)?
    };
    assert_eq!(
        message(&loud, &mut model),
        "a noise level of 1.5 is not between 0 and 1"
    );
    Ok(())
}
