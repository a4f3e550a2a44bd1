use l2p_engine::ops::add_rms_norm::{add, add_rms_norm};
use l2p_engine::{DType, Device, Tensor};
use l2p_tests::{BF16_TOLERANCE, F32_TOLERANCE, Outcome, Suite, expect_close, expect_like_cpu, random, random_bf16};

const EPSILON: f32 = 1e-6;

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::add_rms_norm::cpu_equals_formula", cpu_equals_formula);
    suite.cpu("ops::add_rms_norm::wrong_shapes_are_named", wrong_shapes_are_named);
    suite.cuda("ops::add_rms_norm::cuda_equals_cpu", cuda_equals_cpu);
}

fn cpu_equals_formula() -> Outcome {
    let (rows, dim) = (5, 48);
    let (x, y, weight) = (random("x", rows * dim), random("y", rows * dim), random("w", dim));
    let sum: Vec<f64> = x.iter().zip(&y).map(|(x, y)| f64::from(*x) + f64::from(*y)).collect();
    let normalised: Vec<f32> = sum
        .chunks(dim)
        .flat_map(|row| {
            let mean = row.iter().map(|x| x.powi(2)).sum::<f64>() / dim as f64;
            let inverse = 1.0 / (mean + f64::from(EPSILON)).sqrt();
            row.iter()
                .zip(&weight)
                .map(move |(x, w)| (x * inverse * f64::from(*w)) as f32)
        })
        .collect();
    let sum: Vec<f32> = sum.into_iter().map(|value| value as f32).collect();
    let tensor = |values: &[f32]| Tensor::from_f32(&Device::Cpu, values, [1, rows, dim]);
    let weight = Tensor::from_f32(&Device::Cpu, &weight, [dim])?;
    let found = add_rms_norm(&tensor(&x)?, &tensor(&y)?, &weight, EPSILON)?;
    expect_close("sum", found.0.as_slice()?, &sum, found.0.shape(), F32_TOLERANCE)?;
    expect_close(
        "normalised",
        found.1.as_slice()?,
        &normalised,
        found.1.shape(),
        F32_TOLERANCE,
    )?;
    expect_close(
        "add",
        add(&tensor(&x)?, &tensor(&y)?)?.as_slice()?,
        &sum,
        found.0.shape(),
        F32_TOLERANCE,
    )
}

fn wrong_shapes_are_named() -> Outcome {
    let x = Tensor::zeros(&Device::Cpu, [1, 2, 16], DType::F32)?;
    let y = Tensor::zeros(&Device::Cpu, [1, 3, 16], DType::F32)?;
    let weight = Tensor::zeros(&Device::Cpu, [8], DType::F32)?;
    let message = add(&x, &y).unwrap_err().to_string();
    assert_eq!(message, "add: y has shape [1, 3, 16], expected [1, 2, 16]");
    let message = add_rms_norm(&x, &x, &weight, EPSILON).unwrap_err().to_string();
    assert_eq!(message, "add_rms_norm: weight has shape [8], expected [16]");
    Ok(())
}

fn cuda_equals_cpu(device: &Device) -> Outcome {
    // Rows that fill a block, leave threads idle, or need several vectors per thread.
    for (batch, tokens, dim) in [
        (1, 1, 8),
        (2, 5, 384),
        (1, 67, 2560),
        (2, 33, 3840),
        (1, 3, 10240),
        (1, 2, 32768),
    ] {
        expect_like_cpu(&format!("{batch}x{tokens}x{dim}"), device, BF16_TOLERANCE, |device| {
            let shape = [batch, tokens, dim];
            let x = Tensor::from_f32(device, &random_bf16("x", batch * tokens * dim), shape)?;
            let y = Tensor::from_f32(device, &random_bf16("y", batch * tokens * dim), shape)?;
            let weight = Tensor::from_f32(device, &random_bf16("w", dim), [dim])?;
            let (sum, normalised) = add_rms_norm(&x, &y, &weight, EPSILON)?;
            Ok(vec![sum, normalised, add(&x, &y)?])
        })?;
    }
    Ok(())
}
