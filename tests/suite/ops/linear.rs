use l2p_engine::ops::linear::{InputActivation, linear, linear_vectors};
use l2p_engine::{DType, Device, Tensor};
use l2p_tests::fixtures::Group;
use l2p_tests::{BF16_TOLERANCE, F32_TOLERANCE, Outcome, Suite, expect_close, expect_like_cpu, random, random_bf16};

use super::loops::{exact, expect_exact, product, silu};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::linear::cpu_equals_plain_loops", cpu_equals_plain_loops);
    suite.cpu("ops::linear::cpu_equals_references", cpu_equals_references);
    suite.cpu(
        "ops::linear::cpu_vectors_equal_plain_loops",
        cpu_vectors_equal_plain_loops,
    );
    suite.cpu("ops::linear::no_rows_give_no_rows", no_rows_give_no_rows);
    suite.cpu("ops::linear::wrong_shapes_are_named", wrong_shapes_are_named);
    suite.cuda("ops::linear::cuda_equals_cpu", cuda_equals_cpu);
    suite.cuda("ops::linear::cuda_vectors_equal_cpu", cuda_vectors_equal_cpu);
}

fn cpu_equals_plain_loops() -> Outcome {
    let (rows, inputs, outputs) = (7, 40, 13);
    let (x, weight, bias) = (
        random("x", rows * inputs),
        random("w", outputs * inputs),
        random("b", outputs),
    );
    let expected: Vec<f32> = (0..rows * outputs)
        .map(|index| {
            let (row, output) = (index / outputs, index % outputs);
            let products = (0..inputs).map(|i| f64::from(x[row * inputs + i]) * f64::from(weight[output * inputs + i]));
            (products.sum::<f64>() + f64::from(bias[output])) as f32
        })
        .collect();
    let tensor = |values: &[f32], shape: &[usize]| Tensor::from_f32(&Device::Cpu, values, shape);
    let y = linear(
        &tensor(&x, &[1, rows, inputs])?,
        &tensor(&weight, &[outputs, inputs])?,
        Some(&tensor(&bias, &[outputs])?),
    )?;
    expect_close("linear", y.as_slice()?, &expected, y.shape(), F32_TOLERANCE)
}

fn cpu_equals_references() -> Outcome {
    let group = Group::load("ops");
    for case in group.cases("linear.") {
        let (x, shape) = case.input("x");
        let weights = case.weights();
        let weight = |name: &str| {
            let (shape, values) = &weights[name];
            Tensor::from_slice(&Device::Cpu, values, shape.as_slice())
        };
        let x = Tensor::from_slice(&Device::Cpu, &x, shape.as_slice())?;
        let (weight, bias) = (weight("linear.weight")?, weight("linear.bias")?);
        case.check("y", linear(&x, &weight, Some(&bias))?.as_slice()?)?;
        let vectors = linear_vectors(&x, InputActivation::None, &weight, Some(&bias))?;
        case.check("y", vectors.as_slice()?)?;
    }
    Ok(())
}

/// With and without activation and bias; a product without terms is its bias.
fn cpu_vectors_equal_plain_loops() -> Outcome {
    for (vectors, inputs, outputs) in [(1, 1, 1), (3, 40, 13), (2, 0, 5)] {
        let tensor = |name: &str, shape: &[usize]| {
            Tensor::from_slice(&Device::Cpu, &random(name, shape.iter().product()), shape)
        };
        let (x, weight) = (tensor("x", &[vectors, inputs])?, tensor("w", &[outputs, inputs])?);
        let bias = tensor("b", &[outputs])?;
        for activation in [InputActivation::None, InputActivation::Silu] {
            let activated: Vec<f64> = match activation {
                InputActivation::None => exact(&x)?,
                InputActivation::Silu => exact(&x)?.into_iter().map(silu).collect(),
            };
            let products = match inputs {
                0 => vec![0.0; vectors * outputs],
                _ => product(&activated, &exact(&weight)?, inputs),
            };
            let added = exact(&bias)?;
            let sums: Vec<f64> = products.iter().zip(added.iter().cycle()).map(|(a, b)| a + b).collect();
            let what = format!("{vectors}x{inputs}x{outputs} {activation:?}");
            for (bias, expected) in [(None, &products), (Some(&bias), &sums)] {
                let found = linear_vectors(&x, activation, &weight, bias)?;
                assert_eq!(found.shape().to_vec(), [vectors, outputs]);
                expect_exact(&what, &found, expected)?;
                if activation == InputActivation::None {
                    expect_exact(&what, &linear(&x, &weight, bias)?, expected)?;
                }
            }
        }
    }
    Ok(())
}

fn no_rows_give_no_rows() -> Outcome {
    let zeros = |shape: &[usize]| Tensor::zeros(&Device::Cpu, shape, DType::F32);
    let (weight, bias) = (zeros(&[4, 8])?, zeros(&[4])?);
    for bias in [None, Some(&bias)] {
        assert_eq!(linear(&zeros(&[1, 0, 8])?, &weight, bias)?.shape().to_vec(), [1, 0, 4]);
    }
    // Nor do no outputs.
    let (weight, bias) = (zeros(&[0, 8])?, zeros(&[0])?);
    let nothing = linear(&zeros(&[1, 3, 8])?, &weight, Some(&bias))?;
    assert_eq!(nothing.shape().to_vec(), [1, 3, 0]);
    Ok(())
}

fn wrong_shapes_are_named() -> Outcome {
    let x = Tensor::zeros(&Device::Cpu, [2, 3, 8], DType::F32)?;
    let weight = Tensor::zeros(&Device::Cpu, [4, 16], DType::F32)?;
    let message = linear(&x, &weight, None).unwrap_err().to_string();
    assert_eq!(message, "linear: x has shape [2, 3, 8], expected [.., 16]");
    Ok(())
}

fn cuda_equals_cpu(device: &Device) -> Outcome {
    for (rows, inputs, outputs) in [(1, 64, 64), (33, 256, 136), (300, 384, 1152), (128, 4096, 72)] {
        for with_bias in [false, true] {
            expect_like_cpu(
                &format!("linear {rows}x{inputs}x{outputs}"),
                device,
                BF16_TOLERANCE,
                |device| {
                    let x = Tensor::from_f32(device, &random_bf16("x", rows * inputs), [1, rows, inputs])?;
                    let weight = Tensor::from_f32(device, &random_bf16("w", outputs * inputs), [outputs, inputs])?;
                    let bias = Tensor::from_f32(device, &random_bf16("b", outputs), [outputs])?;
                    Ok(vec![linear(&x, &weight, with_bias.then_some(&bias))?])
                },
            )?;
        }
    }
    Ok(())
}

fn cuda_vectors_equal_cpu(device: &Device) -> Outcome {
    for (vectors, inputs, outputs) in [(1, 256, 1024), (3, 1024, 256), (2, 256, 4 * 3840), (1, 8, 5)] {
        for activation in [InputActivation::None, InputActivation::Silu] {
            let what = format!("linear_vectors {vectors}x{inputs}x{outputs} {activation:?}");
            expect_like_cpu(&what, device, F32_TOLERANCE, |device| {
                let x = Tensor::from_slice(device, &random("x", vectors * inputs), [vectors, inputs])?;
                let weight = Tensor::from_f32(device, &random_bf16("w", outputs * inputs), [outputs, inputs])?;
                let bias = Tensor::from_f32(device, &random_bf16("b", outputs), [outputs])?;
                Ok(vec![linear_vectors(&x, activation, &weight, Some(&bias))?])
            })?;
        }
    }
    Ok(())
}
