use l2p_engine::Device;
use l2p_engine::ops::linear::{InputActivation, linear_vectors};
use l2p_engine::ops::timestep::{timestep_embedding, timestep_embedding_on};
use l2p_engine::{DType, Tensor};
use l2p_tests::fixtures::Group;
use l2p_tests::{Outcome, Suite};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::timestep::sinusoids_equal_reference", sinusoids_equal_reference);
    suite.cpu("ops::timestep::layers_equal_reference", layers_equal_reference);
    suite.cpu("ops::timestep::odd_widths_end_in_zero", odd_widths_end_in_zero);
    suite.cuda("ops::timestep::cuda_equals_cpu", cuda_equals_cpu);
}

fn sinusoids_equal_reference() -> Outcome {
    let group = Group::load("ops");
    let case = group.case("timestep_features.eight");
    let (t, _) = case.input("t");
    case.check("y", &timestep_embedding(&t, 256, 10_000.0))
}

/// The model's timestep embedder: the sinusoids and two layers.
fn layers_equal_reference() -> Outcome {
    let group = Group::load("ops");
    let case = group.case("timestep_embedder.ends");
    let weights = case.weights();
    let weight = |name: &str| {
        let (shape, values) = &weights[name];
        Tensor::from_slice(&Device::Cpu, values, shape.as_slice())
    };
    let x = timestep_embedding_on(&Device::Cpu, &case.input("t").0, 256, 10_000.0)?;
    let none = InputActivation::None;
    let hidden = linear_vectors(&x, none, &weight("mlp.0.weight")?, Some(&weight("mlp.0.bias")?))?;
    let silu = InputActivation::Silu;
    let y = linear_vectors(&hidden, silu, &weight("mlp.2.weight")?, Some(&weight("mlp.2.bias")?))?;
    case.check("y", y.as_slice()?)
}

fn odd_widths_end_in_zero() -> Outcome {
    let embedding = timestep_embedding(&[0.0, 0.002], 5, 10_000.0);
    assert_eq!(embedding[..5], [1.0, 1.0, 0.0, 0.0, 0.0]);
    assert!((embedding[5] - 2f32.cos()).abs() < 1e-6 && (embedding[7] - 2f32.sin()).abs() < 1e-6);
    assert_eq!(embedding[9], 0.0);
    Ok(())
}

fn cuda_equals_cpu(device: &Device) -> Outcome {
    let t = [0.0, 0.3, 1.0];
    let found = timestep_embedding_on(device, &t, 256, 10_000.0)?;
    assert_eq!((found.dtype(), *found.shape() == [3, 256]), (DType::F32, true));
    assert_eq!(found.to_vec::<f32>()?, timestep_embedding(&t, 256, 10_000.0));
    Ok(())
}
