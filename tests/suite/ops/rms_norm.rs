use l2p_engine::ops::Modulation;
use l2p_engine::ops::rms_norm::{GatedResidual, RmsNorm, gated_residual_rms_norm, rms_norm, rms_norm_modulate};
use l2p_engine::{Device, Result, Tensor};
use l2p_tests::fixtures::Group;
use l2p_tests::{BF16_TOLERANCE, F32_TOLERANCE, Outcome, Suite, expect_close, expect_like_cpu, random, random_bf16};

use super::loops::{exact, expect_exact};

const EPSILON: f32 = 1e-5;

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::rms_norm::cpu_equals_formula", cpu_equals_formula);
    suite.cpu("ops::rms_norm::cpu_equals_references", cpu_equals_references);
    suite.cpu("ops::rms_norm::cpu_equals_plain_loops", cpu_equals_plain_loops);
    suite.cpu("ops::rms_norm::wrong_shapes_are_named", wrong_shapes_are_named);
    suite.cuda("ops::rms_norm::cuda_equals_cpu", cuda_equals_cpu);
    suite.cuda("ops::rms_norm::cuda_residual_equals_cpu", cuda_residual_equals_cpu);
}

fn cpu_equals_formula() -> Outcome {
    let (rows, dim) = (5, 48);
    let (x, weight) = (random("x", rows * dim), random("w", dim));
    let expected: Vec<f32> = x
        .chunks(dim)
        .flat_map(|row| {
            let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / dim as f64;
            let inverse = 1.0 / (mean + f64::from(EPSILON)).sqrt();
            row.iter()
                .zip(&weight)
                .map(move |(x, w)| (f64::from(*x) * inverse * f64::from(*w)) as f32)
        })
        .collect();
    let found = rms_norm(
        &Tensor::from_f32(&Device::Cpu, &x, [1, rows, dim])?,
        &Tensor::from_f32(&Device::Cpu, &weight, [dim])?,
        EPSILON,
    )?;
    expect_close("rms_norm", found.as_slice()?, &expected, found.shape(), F32_TOLERANCE)
}

fn cpu_equals_references() -> Outcome {
    let cpu = &Device::Cpu;
    let group = Group::load("ops");
    for case in [
        "rms_norm.",
        "rms_norm_modulate.",
        "gated_residual_rms_norm.",
        "residual_rms_norm.",
    ]
    .into_iter()
    .flat_map(|kind| group.cases(kind))
    {
        let (values, shape) = case.input("x");
        let dim = shape[shape.len() - 1];
        // Token sequences have three dimensions; without vectors it does not matter how rows are grouped.
        let shape = match shape[..] {
            [batch, tokens, dim] => [batch, tokens, dim],
            _ => [1, values.len() / dim, dim],
        };
        let x = Tensor::from_slice(cpu, &values, shape)?;
        let weight = Tensor::from_slice(cpu, &case.weight("norm.weight"), [dim])?;
        let table = ["scale", "gate"].into_iter().find(|name| case.has_input(name));
        let table = table
            .map(|name| Tensor::from_slice(cpu, &case.input(name).0, [shape[0], 1, dim]))
            .transpose()?;
        let vectors = table.as_ref().map(|table| Modulation::new(table, 0)).transpose()?;
        let epsilon = match case.has_config(&["eps"]) {
            true => case.config(&["eps"]).as_f64().expect("a number") as f32,
            false => EPSILON,
        };
        if case.has_input("y") {
            let y = Tensor::from_slice(cpu, &case.input("y").0, shape)?;
            let residual = GatedResidual {
                weight: &weight,
                gate: vectors,
                epsilon,
            };
            case.check("out", gated_residual_rms_norm(&x, &y, &residual, None)?.0.as_slice()?)?;
        } else {
            let norm = RmsNorm {
                weight: &weight,
                scale: vectors,
                epsilon,
            };
            case.check("y", rms_norm_modulate(&x, &norm)?.as_slice()?)?;
        }
    }
    Ok(())
}

/// A sublayer's end and the next one's beginning at once, with vectors from the middle of a table and without.
fn cpu_equals_plain_loops() -> Outcome {
    let (batch, tokens, dim) = (3, 5, 37);
    let shape = [batch, tokens, dim];
    let tensor =
        |name: &str, shape: &[usize]| Tensor::from_slice(&Device::Cpu, &random(name, shape.iter().product()), shape);
    let (x, y) = (tensor("x", &shape)?, tensor("y", &shape)?);
    let (weight, next) = (tensor("weight", &[dim])?, tensor("next", &[dim])?);
    let table = table(&Device::Cpu, batch, dim)?;
    let vectors = exact(&table)?;
    let normalised = |values: &[f64], weight: &Tensor, factor: &dyn Fn(usize, usize) -> f64| -> Result<Vec<f64>> {
        let weight = exact(weight)?;
        let mut result = Vec::new();
        for (row, values) in values.chunks(dim).enumerate() {
            let mean = values.iter().map(|value| value.powi(2)).sum::<f64>() / dim as f64;
            let inverse = 1.0 / (mean + f64::from(EPSILON)).sqrt();
            let columns = values.iter().zip(&weight).enumerate();
            result.extend(
                columns.map(|(column, (value, weight))| value * inverse * weight * factor(row / tokens, column)),
            );
        }
        Ok(result)
    };
    for modulated in [false, true] {
        let vector = |index| modulated.then(|| Modulation::new(&table, index)).transpose();
        let of = |index: usize, item: usize, column: usize| match modulated {
            true => vectors[(item * 4 + index) * dim + column],
            false => 0.0,
        };
        let residual = GatedResidual {
            weight: &weight,
            gate: vector(1)?,
            epsilon: EPSILON,
        };
        let norm = RmsNorm {
            weight: &next,
            scale: vector(2)?,
            epsilon: EPSILON,
        };
        let gate = |item: usize, column: usize| match modulated {
            true => of(1, item, column).tanh(),
            false => 1.0,
        };
        let branch = normalised(&exact(&y)?, &weight, &gate)?;
        let sum: Vec<f64> = exact(&x)?.iter().zip(branch).map(|(x, branch)| x + branch).collect();
        let expected = normalised(&sum, &next, &|item, column| 1.0 + of(2, item, column))?;
        let (found, then) = gated_residual_rms_norm(&x, &y, &residual, Some(&norm))?;
        expect_exact("sum", &found, &sum)?;
        expect_exact("normalised", &then.ok_or("it was asked for")?, &expected)?;
        let (alone, none) = gated_residual_rms_norm(&x, &y, &residual, None)?;
        assert!(none.is_none());
        assert_eq!(alone.as_slice::<f32>()?, found.as_slice::<f32>()?);
    }
    Ok(())
}

fn wrong_shapes_are_named() -> Outcome {
    let x = Tensor::from_f32(&Device::Cpu, &random("x", 32), [1, 2, 16])?;
    let weight = Tensor::from_f32(&Device::Cpu, &random("w", 8), [8])?;
    let message = rms_norm(&x, &weight, EPSILON).unwrap_err().to_string();
    assert_eq!(message, "rms_norm_modulate: weight has shape [8], expected [16]");
    Ok(())
}

/// Batch, tokens and dim of rows that fill a block, leave threads idle, or need several vectors per thread.
const SIZES: [(usize, usize, usize); 6] = [
    (1, 1, 8),
    (2, 5, 384),
    (1, 67, 2560),
    (2, 33, 3840),
    (1, 3, 8192),
    (3, 700, 1032),
];

fn table(device: &Device, batch: usize, dim: usize) -> Result<Tensor> {
    Tensor::from_slice(device, &random("table", batch * 4 * dim), [batch, 4, dim])
}

fn cuda_equals_cpu(device: &Device) -> Outcome {
    for (batch, tokens, dim) in SIZES {
        expect_like_cpu(&format!("{batch}x{tokens}x{dim}"), device, BF16_TOLERANCE, |device| {
            let x = Tensor::from_f32(device, &random_bf16("x", batch * tokens * dim), [batch, tokens, dim])?;
            let weight = Tensor::from_f32(device, &random_bf16("w", dim), [dim])?;
            let table = table(device, batch, dim)?;
            let scale = Some(Modulation::new(&table, 2)?);
            let modulated = rms_norm_modulate(
                &x,
                &RmsNorm {
                    weight: &weight,
                    scale,
                    epsilon: EPSILON,
                },
            )?;
            Ok(vec![rms_norm(&x, &weight, EPSILON)?, modulated])
        })?;
    }
    Ok(())
}

fn cuda_residual_equals_cpu(device: &Device) -> Outcome {
    for (batch, tokens, dim) in SIZES {
        for modulated in [false, true] {
            let what = format!("{batch}x{tokens}x{dim} modulated: {modulated}");
            expect_like_cpu(&what, device, BF16_TOLERANCE, |device| {
                let shape = [batch, tokens, dim];
                let x = Tensor::from_f32(device, &random_bf16("x", batch * tokens * dim), shape)?;
                let y = Tensor::from_f32(device, &random_bf16("y", batch * tokens * dim), shape)?;
                let weights = Tensor::from_f32(device, &random_bf16("w", 2 * dim), [2, dim])?;
                let (weight, next) = (
                    weights.narrow(0, 1)?.reshape([dim])?,
                    weights.narrow(1, 1)?.reshape([dim])?,
                );
                let table = table(device, batch, dim)?;
                let vector = |index| modulated.then(|| Modulation::new(&table, index)).transpose();
                let residual = GatedResidual {
                    weight: &weight,
                    gate: vector(1)?,
                    epsilon: EPSILON,
                };
                let norm = RmsNorm {
                    weight: &next,
                    scale: vector(2)?,
                    epsilon: EPSILON,
                };
                let (sum, normalised) = gated_residual_rms_norm(&x, &y, &residual, Some(&norm))?;
                let (alone, none) = gated_residual_rms_norm(&x, &y, &residual, None)?;
                assert!(none.is_none());
                Ok([sum, alone].into_iter().chain(normalised).collect())
            })?;
        }
    }
    Ok(())
}
