use l2p_engine::ops::conv::Activation;
use l2p_engine::ops::group_norm::{GroupNorm, group_norm, group_norm_in_place};
use l2p_engine::{DType, Device, Result, Tensor};
use l2p_tests::fixtures::Group;
use l2p_tests::{BF16_TOLERANCE, Outcome, Suite, expect_like_cpu, random, random_bf16};

use super::loops::{exact, expect_exact, silu};

const EPSILON: f32 = 1e-6;

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::group_norm::cpu_equals_torch", cpu_equals_torch);
    suite.cpu("ops::group_norm::cpu_equals_plain_loops", cpu_equals_plain_loops);
    suite.cpu("ops::group_norm::mistakes_are_named", mistakes_are_named);
    suite.cuda("ops::group_norm::cuda_equals_cpu", cuda_equals_cpu);
    suite.cuda(
        "ops::group_norm::cuda_keeps_small_variances",
        cuda_keeps_small_variances,
    );
    suite.cuda("ops::group_norm::cuda_repeats_its_bits", cuda_repeats_its_bits);
}

fn cpu_equals_torch() -> Outcome {
    let group = Group::load("ops");
    for case in group.cases("group_norm.") {
        let (values, shape) = case.input("x");
        let vector = |name: &str| Tensor::from_f32(&Device::Cpu, &case.weight(name), [shape[3]]);
        let norm = GroupNorm {
            weight: vector("norm.weight")?,
            bias: vector("norm.bias")?,
            groups: 32,
            epsilon: EPSILON,
        };
        let activation = match case.config(&["silu"]).as_bool() {
            Some(true) => Activation::Silu,
            _ => Activation::None,
        };
        let x = Tensor::from_f32(&Device::Cpu, &values, &shape[..])?;
        case.check("y", group_norm(&x, &norm, activation)?.as_slice()?)?;
    }
    Ok(())
}

fn norm(device: &Device, channels: usize, groups: usize) -> Result<GroupNorm> {
    Ok(GroupNorm {
        weight: Tensor::from_f32(device, &random_bf16("w", channels), [channels])?,
        bias: Tensor::from_f32(device, &random_bf16("b", channels), [channels])?,
        groups,
        epsilon: EPSILON,
    })
}

/// One pixel; more pixels than one task sums, of channels that do not divide a task's values; an ε that counts and one that does
/// not.
fn cpu_equals_plain_loops() -> Outcome {
    for (shape, groups, epsilon) in [
        ([1, 1, 1, 8], 2, 0.5),
        ([2, 33, 41, 6], 3, 0.25),
        ([3, 3, 5, 6], 1, 1e-6),
    ] {
        let [batch, height, width, channels] = shape;
        let x = Tensor::from_slice(&Device::Cpu, &random("x", shape.iter().product()), shape)?;
        let norm = GroupNorm {
            epsilon,
            ..norm(&Device::Cpu, channels, groups)?
        };
        let (values, weight, bias) = (exact(&x)?, exact(&norm.weight)?, exact(&norm.bias)?);
        let (pixels, run) = (height * width, channels / groups);
        let mut expected = vec![0.0; values.len()];
        for (item, group) in (0..batch * groups).map(|index| (index / groups, index % groups)) {
            let place = |index| (item * pixels + index / run) * channels + group * run + index % run;
            let places: Vec<usize> = (0..pixels * run).map(place).collect();
            let mean_of = |term: &dyn Fn(f64) -> f64| {
                let terms = places.iter().map(|&at| term(values[at]));
                terms.sum::<f64>() / places.len() as f64
            };
            let mean = mean_of(&|value| value);
            let variance = mean_of(&|value| (value - mean).powi(2));
            let inverse = 1.0 / (variance + f64::from(epsilon)).sqrt();
            for &at in &places {
                expected[at] = (values[at] - mean) * inverse * weight[at % channels] + bias[at % channels];
            }
        }
        let activated: Vec<f64> = expected.iter().copied().map(silu).collect();
        for (activation, expected) in [(Activation::None, &expected), (Activation::Silu, &activated)] {
            let what = format!("{shape:?} in {groups}, {activation:?}");
            expect_exact(&what, &group_norm(&x, &norm, activation)?, expected)?;
            let mut in_place = x.clone().into_unshared()?;
            group_norm_in_place(&mut in_place, &norm, activation)?;
            expect_exact(&what, &in_place, expected)?;
        }
    }
    Ok(())
}

fn mistakes_are_named() -> Outcome {
    let x = Tensor::zeros(&Device::Cpu, [1, 2, 2, 24], DType::F32)?;
    let without = Tensor::zeros(&Device::Cpu, [1, 2, 2, 0], DType::F32)?;
    let outcome = group_norm(&without, &norm(&Device::Cpu, 0, 4)?, Activation::None);
    assert_eq!(
        outcome.unwrap_err().to_string(),
        "group_norm: 0 channels do not fall into 4 equal groups"
    );
    let message = |groups: usize, channels: usize| -> Result<String> {
        let norm = norm(&Device::Cpu, channels, groups)?;
        Ok(group_norm(&x, &norm, Activation::None).unwrap_err().to_string())
    };
    assert_eq!(
        message(32, 24)?,
        "group_norm: 24 channels do not fall into 32 equal groups"
    );
    assert_eq!(
        message(0, 24)?,
        "group_norm: 24 channels do not fall into 0 equal groups"
    );
    assert_eq!(message(4, 16)?, "group_norm: weight has shape [16], expected [24]");
    Ok(())
}

/// Batch, height, width, channels and groups: one pixel, vectors that hold several groups, channels that leave threads idle,
/// several blocks with a rest.
const SIZES: [[usize; 5]; 9] = [
    [1, 1, 1, 8, 2],
    [2, 5, 7, 64, 32],
    [1, 9, 4, 32, 32],
    [1, 3, 3, 512, 32],
    [2, 33, 31, 24, 3],
    [1, 64, 70, 128, 32],
    [3, 17, 19, 256, 32],
    [1, 11, 13, 2048, 32],
    [1, 300, 301, 8, 4],
];

fn cuda_equals_cpu(device: &Device) -> Outcome {
    for [batch, height, width, channels, groups] in SIZES {
        for activation in [Activation::None, Activation::Silu] {
            let what = format!("{batch}x{height}x{width}x{channels} in {groups}, {activation:?}");
            expect_like_cpu(&what, device, BF16_TOLERANCE, |device| {
                let shape = [batch, height, width, channels];
                let x = Tensor::from_f32(device, &random_bf16("x", shape.iter().product()), shape)?;
                let norm = norm(device, channels, groups)?;
                let y = group_norm(&x, &norm, activation)?;
                let mut in_place = x;
                group_norm_in_place(&mut in_place, &norm, activation)?;
                Ok(vec![y, in_place])
            })?;
        }
    }
    Ok(())
}

/// A mean a hundred times the deviation.
fn cuda_keeps_small_variances(device: &Device) -> Outcome {
    expect_like_cpu("large mean", device, BF16_TOLERANCE, |device| {
        let shape = [1, 128, 128, 32];
        let values: Vec<f32> = random_bf16("x", shape.iter().product())
            .into_iter()
            .map(|value| half::bf16::from_f32(100.0 + value).to_f32())
            .collect();
        let x = Tensor::from_f32(device, &values, shape)?;
        Ok(vec![group_norm(&x, &norm(device, 32, 4)?, Activation::None)?])
    })
}

fn cuda_repeats_its_bits(device: &Device) -> Outcome {
    let shape = [1, 200, 100, 64];
    let x = Tensor::from_f32(device, &random_bf16("x", shape.iter().product()), shape)?;
    let norm = norm(device, 64, 32)?;
    let run = || group_norm(&x, &norm, Activation::Silu)?.to_vec::<half::bf16>();
    assert!(run()? == run()?);
    Ok(())
}
