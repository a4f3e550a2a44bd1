use l2p_engine::model::objective::{FlowMatching, Objective};
use l2p_engine::ops::flow_loss::{flow_loss, noisy_image};
use l2p_engine::{DType, Device, Result, Tensor};
use l2p_tests::fixtures::Group;
use l2p_tests::{Outcome, Suite, random};

use super::loops::{exact, expect_exact};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::flow_loss::cpu_equals_references", cpu_equals_references);
    suite.cpu("ops::flow_loss::cpu_equals_plain_loops", cpu_equals_plain_loops);
    suite.cpu(
        "ops::flow_loss::the_mean_of_many_keeps_its_digits",
        the_mean_of_many_keeps_its_digits,
    );
    suite.cpu("ops::flow_loss::mistakes_are_named", mistakes_are_named);
}

const CPU: Device = Device::Cpu;

/// Two numbers for each of some items.
fn shares(pairs: impl IntoIterator<Item = [f32; 2]>) -> Result<Tensor> {
    let values: Vec<f32> = pairs.into_iter().flatten().collect();
    Tensor::from_slice(&CPU, &values, [values.len() / 2, 2])
}

/// The targets of flow matching.
fn velocities(items: usize) -> Result<Tensor> {
    shares(vec![FlowMatching.target(0.0); items])
}

fn cpu_equals_references() -> Outcome {
    let group = Group::load("ops");
    for case in group.cases("flow_loss.") {
        let input = |name: &str| {
            let (values, shape) = case.input(name);
            Tensor::from_slice(&CPU, &values, shape.as_slice())
        };
        let (image, noise) = (input("image")?, input("noise")?);
        let sigmas = case.input("sigma").0;
        let mixes = shares(sigmas.iter().map(|sigma| FlowMatching.mix(*sigma)))?;
        case.check("x_t", noisy_image(&image, &noise, &mixes)?.as_slice()?)?;
        let (loss, gradient) = flow_loss(&input("v")?, &image, &noise, &velocities(sigmas.len())?, Some(1.0))?;
        case.check("loss", loss.as_slice()?)?;
        case.check("dv", gradient.ok_or("it was asked for")?.as_slice()?)?;
    }
    Ok(())
}

/// One element, and more elements than one task sums.
fn cpu_equals_plain_loops() -> Outcome {
    for shape in [[1, 1, 1, 1], [2, 37, 53, 3], [3, 64, 64, 3]] {
        let what = format!("{shape:?}");
        let [image, noise, velocity] = ["image", "noise", "velocity"]
            .map(|name| Tensor::from_slice(&CPU, &random(name, shape.iter().product()), shape));
        let (image, noise, velocity) = (image?, noise?, velocity?);
        let mixes = [[1.0f32, 0.0], [0.125, 0.875], [0.8, 0.6]];
        let targets = [[-1.0f32, 1.0], [0.0, 1.0], [-0.6, 0.8]];
        let of_items = |pairs: &[[f32; 2]]| shares(pairs[..shape[0]].iter().copied());
        let (x, e, v) = (exact(&image)?, exact(&noise)?, exact(&velocity)?);
        let count = x.len();
        let mixed = |pairs: &[[f32; 2]], index: usize| {
            let [of_image, of_noise] = pairs[index / (count / shape[0])].map(f64::from);
            of_image * x[index] + of_noise * e[index]
        };
        let noisy: Vec<f64> = (0..count).map(|index| mixed(&mixes, index)).collect();
        expect_exact(&what, &noisy_image(&image, &noise, &of_items(&mixes)?)?, &noisy)?;

        let errors: Vec<f64> = (0..count).map(|index| v[index] - mixed(&targets, index)).collect();
        let loss = errors.iter().map(|error| error.powi(2)).sum::<f64>() / count as f64;
        let gradient: Vec<f64> = errors.iter().map(|error| 0.375 * 2.0 * error / count as f64).collect();
        let of_targets = of_items(&targets)?;
        let (found, slope) = flow_loss(&velocity, &image, &noise, &of_targets, Some(0.375))?;
        expect_exact(&what, &found, &[loss])?;
        expect_exact(&what, &slope.ok_or("it was asked for")?, &gradient)?;
        let (alone, none) = flow_loss(&velocity, &image, &noise, &of_targets, None)?;
        assert!(none.is_none());
        assert_eq!(alone.as_slice::<f32>()?, found.as_slice::<f32>()?);
    }
    Ok(())
}

/// A million equal errors, whose sum one after the other would be off by 1.6 % in f32.
fn the_mean_of_many_keeps_its_digits() -> Outcome {
    let shape = [1, 1 << 20];
    let velocity = Tensor::from_slice(&CPU, &vec![0.1f32; 1 << 20], shape)?;
    let nothing = Tensor::zeros(&CPU, shape, DType::F32)?;
    let (loss, _) = flow_loss(&velocity, &nothing, &nothing, &velocities(1)?, None)?;
    let loss = loss.to_vec::<f32>()?[0];
    assert!((loss - 0.01).abs() < 5e-6, "{loss}");
    Ok(())
}

fn mistakes_are_named() -> Outcome {
    let zeros = |shape: &[usize]| Tensor::zeros(&CPU, shape, DType::F32);
    let image = zeros(&[2, 4, 4, 3])?;
    let message = |outcome: Result<Tensor>| outcome.unwrap_err().to_string();
    assert_eq!(
        message(noisy_image(&image, &zeros(&[2, 4, 5, 3])?, &zeros(&[2, 2])?)),
        "noisy_image: noise has shape [2, 4, 5, 3], expected [2, 4, 4, 3]"
    );
    assert_eq!(
        message(noisy_image(&image, &image, &zeros(&[3])?)),
        "noisy_image: mixes has shape [3], expected [2, 2]"
    );
    let loss = |velocity: &Tensor, image: &Tensor| {
        let targets = velocities(velocity.dim(0)).expect("two numbers an item");
        message(flow_loss(velocity, image, image, &targets, None).map(|(loss, _)| loss))
    };
    assert_eq!(
        loss(&zeros(&[1, 4, 4, 3])?, &image),
        "flow_loss: image has shape [2, 4, 4, 3], expected [1, 4, 4, 3]"
    );
    let nothing = zeros(&[2, 0, 4, 3])?;
    assert!(loss(&nothing, &nothing).starts_with("flow_loss: "));
    Ok(())
}
