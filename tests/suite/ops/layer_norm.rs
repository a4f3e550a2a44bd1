use half::bf16;
use l2p_engine::ops::Modulation;
use l2p_engine::ops::layer_norm::layer_norm_modulate;
use l2p_engine::{DType, Device, Tensor};
use l2p_tests::fixtures::Group;
use l2p_tests::{BF16_TOLERANCE, Outcome, Suite, expect_close, expect_like_cpu, random, random_bf16};

use super::loops::{exact, expect_exact};

const EPSILON: f32 = 1e-6;

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::layer_norm::cpu_equals_references", cpu_equals_references);
    suite.cpu("ops::layer_norm::cpu_equals_plain_loops", cpu_equals_plain_loops);
    suite.cpu("ops::layer_norm::cpu_takes_a_mean_far_from_zero", a_mean_far_from_zero);
    suite.cpu("ops::layer_norm::wrong_shapes_are_named", wrong_shapes_are_named);
    suite.cuda("ops::layer_norm::cuda_equals_cpu", cuda_equals_cpu);
}

fn cpu_equals_references() -> Outcome {
    for case in Group::load("ops").cases("layer_norm_scale") {
        let ((x, shape), (scale, scale_shape)) = (case.input("x"), case.input("scale"));
        let x = Tensor::from_slice(&Device::Cpu, &x, shape.as_slice())?;
        let table = Tensor::from_slice(&Device::Cpu, &scale, [scale_shape[0], 1, scale_shape[1]])?;
        let y = layer_norm_modulate(&x, Some(Modulation::new(&table, 0)?), EPSILON)?;
        case.check("y", y.as_slice()?)?;
    }
    Ok(())
}

/// Rows less their mean, over their deviation.
fn normalised(values: &[f64], dim: usize, epsilon: f32) -> Vec<f64> {
    let rows = values.chunks(dim);
    rows.flat_map(|row| {
        let mean = row.iter().sum::<f64>() / dim as f64;
        let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / dim as f64;
        let inverse = 1.0 / (variance + f64::from(epsilon)).sqrt();
        row.iter().map(move |x| (x - mean) * inverse).collect::<Vec<_>>()
    })
    .collect()
}

/// Without vectors, with one per item among others in the table, and with one for all items; an ε that does not count and one that
/// does.
fn cpu_equals_plain_loops() -> Outcome {
    let (batch, tokens, dim) = (3, 5, 37);
    let x: Vec<f32> = random("x", batch * tokens * dim)
        .into_iter()
        .map(|value| value + 2.0)
        .collect();
    let vectors = random("table", batch * 3 * dim);
    let x = Tensor::from_slice(&Device::Cpu, &x, [batch, tokens, dim])?;
    let table = Tensor::from_slice(&Device::Cpu, &vectors, [batch, 3, dim])?;
    let shared = table.narrow(1, 1)?;
    for epsilon in [EPSILON, 0.25] {
        let normalised = normalised(&exact(&x)?, dim, epsilon);
        let scaled = |item_of: &dyn Fn(usize) -> usize, index: usize| -> Vec<f64> {
            let values = normalised.iter().enumerate();
            values
                .map(|(at, value)| {
                    let item = item_of(at / (tokens * dim));
                    value * (1.0 + f64::from(vectors[(item * 3 + index) * dim + at % dim]))
                })
                .collect()
        };
        let run = |scale: Option<Modulation<'_>>| layer_norm_modulate(&x, scale, epsilon);
        expect_exact("plain", &run(None)?, &normalised)?;
        let own = run(Some(Modulation::new(&table, 2)?))?;
        expect_exact("own vectors", &own, &scaled(&|item| item, 2))?;
        let same = run(Some(Modulation::new(&shared, 1)?))?;
        expect_exact("one vector", &same, &scaled(&|_| 1, 1))?;
    }
    Ok(())
}

/// Rows whose mean is a thousand times their deviation: a variance that the mean's own rounding enters would be off by half. What is
/// left is that rounding, some 3·10⁻⁴ of the deviation.
fn a_mean_far_from_zero() -> Outcome {
    let (rows, dim) = (15, 37);
    let x: Vec<f32> = random("x", rows * dim)
        .into_iter()
        .map(|value| value + 1000.0)
        .collect();
    let x = Tensor::from_slice(&Device::Cpu, &x, [1, rows, dim])?;
    let expected: Vec<f32> = normalised(&exact(&x)?, dim, EPSILON)
        .into_iter()
        .map(|value| value as f32)
        .collect();
    let found = layer_norm_modulate(&x, None, EPSILON)?;
    expect_close("far from zero", found.as_slice()?, &expected, x.shape(), 1e-3)
}

fn wrong_shapes_are_named() -> Outcome {
    let x = Tensor::zeros(&Device::Cpu, [3, 2, 16], DType::F32)?;
    let table = Tensor::zeros(&Device::Cpu, [2, 1, 16], DType::F32)?;
    let outcome = layer_norm_modulate(&x, Some(Modulation::new(&table, 0)?), EPSILON);
    assert_eq!(
        outcome.unwrap_err().to_string(),
        "layer_norm_modulate: scale has shape [2, 1, 16], expected [3, 1, 16]"
    );
    Ok(())
}

fn cuda_equals_cpu(device: &Device) -> Outcome {
    for (batch, tokens, dim) in [(1, 1, 8), (2, 5, 384), (1, 67, 2560), (2, 33, 3840), (1, 3, 32768)] {
        expect_like_cpu(&format!("{batch}x{tokens}x{dim}"), device, BF16_TOLERANCE, |device| {
            // A mean far from zero, so that a variance taken before subtracting it would show.
            let values: Vec<f32> = random_bf16("x", batch * tokens * dim)
                .into_iter()
                .map(|x| bf16::from_f32(x + 8.0).to_f32())
                .collect();
            let x = Tensor::from_f32(device, &values, [batch, tokens, dim])?;
            let table = Tensor::from_slice(device, &random("table", batch * 2 * dim), [batch, 2, dim])?;
            let shared = table.narrow(0, 1)?;
            Ok(vec![
                layer_norm_modulate(&x, None, EPSILON)?,
                layer_norm_modulate(&x, Some(Modulation::new(&table, 1)?), EPSILON)?,
                layer_norm_modulate(&x, Some(Modulation::new(&shared, 0)?), EPSILON)?,
            ])
        })?;
    }
    Ok(())
}
