//! Gated sums, and LayerNorm with a shift.

use l2p_engine::ops::gated_add::{gated_add, gated_add_backward, item_sums};
use l2p_engine::ops::layer_norm::layer_norm_shift;
use l2p_engine::ops::{Modulation, VectorGradient};
use l2p_engine::{DType, Device, Result, Tensor};
use l2p_tests::{BF16_TOLERANCE, F32_TOLERANCE, Outcome, Suite, expect_close, expect_like_cpu, random, random_bf16};

const EPSILON: f32 = 1e-6;

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::gated_add::cpu_equals_formulas", cpu_equals_formulas);
    suite.cpu("ops::gated_add::wrong_arguments_are_named", wrong_arguments_are_named);
    suite.cuda("ops::gated_add::cuda_equals_cpu", cuda_equals_cpu);
}

fn cpu_equals_formulas() -> Outcome {
    let (batch, tokens, dim) = (3, 37, 21);
    let count = batch * tokens * dim;
    let (x, y, vectors) = (random("x", count), random("y", count), random("table", batch * 4 * dim));
    let tensor = |values: &[f32]| Tensor::from_slice(&Device::Cpu, values, [batch, tokens, dim]);
    let table = Tensor::from_slice(&Device::Cpu, &vectors, [batch, 4, dim])?;
    let vector = |at: usize, index: usize| f64::from(vectors[(at / (tokens * dim) * 4 + index) * dim + at % dim]);
    let shape = tensor(&x)?.shape();
    let each = |of: &dyn Fn(usize) -> f64| -> Vec<f32> { (0..count).map(|at| of(at) as f32).collect() };
    let (exact_x, exact_y) = (|at: usize| f64::from(x[at]), |at: usize| f64::from(y[at]));

    let gate = Modulation::new(&table, 3)?;
    let sum = gated_add(&tensor(&x)?, &tensor(&y)?, gate)?;
    let expected = each(&|at| exact_x(at) + vector(at, 3) * exact_y(at));
    expect_close("sum", sum.as_slice()?, &expected, shape, F32_TOLERANCE)?;

    let mut gradients = Tensor::zeros(&Device::Cpu, [batch, 2, dim], DType::F32)?;
    let place = VectorGradient {
        table: &mut gradients,
        index: 1,
    };
    let dy = gated_add_backward(&tensor(&x)?, &tensor(&y)?, gate, Some(place))?;
    let expected = each(&|at| vector(at, 3) * exact_x(at));
    expect_close("dy", dy.as_slice()?, &expected, shape, F32_TOLERANCE)?;
    let place = VectorGradient {
        table: &mut gradients,
        index: 0,
    };
    item_sums(&tensor(&x)?, place)?;
    let mut expected = vec![0.0_f64; batch * 2 * dim];
    for at in 0..count {
        let start = at / (tokens * dim) * 2 * dim + at % dim;
        expected[start] += exact_x(at);
        expected[start + dim] += exact_x(at) * exact_y(at);
    }
    let expected: Vec<f32> = expected.into_iter().map(|sum| sum as f32).collect();
    expect_close(
        "vectors",
        gradients.as_slice()?,
        &expected,
        gradients.shape(),
        F32_TOLERANCE,
    )?;

    let moved = layer_norm_shift(
        &tensor(&x)?,
        Modulation::new(&table, 2)?,
        Modulation::new(&table, 0)?,
        EPSILON,
    )?;
    let normalised = |at: usize| {
        let row: Vec<f64> = x[at / dim * dim..][..dim].iter().map(|x| f64::from(*x)).collect();
        let mean = row.iter().sum::<f64>() / dim as f64;
        let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / dim as f64;
        (row[at % dim] - mean) / (variance + f64::from(EPSILON)).sqrt()
    };
    let expected = each(&|at| normalised(at) * (1.0 + vector(at, 2)) + vector(at, 0));
    expect_close("shift", moved.as_slice()?, &expected, shape, F32_TOLERANCE)
}

fn wrong_arguments_are_named() -> Outcome {
    let zeros = |shape: [usize; 3]| Tensor::zeros(&Device::Cpu, shape, DType::F32);
    let (x, y, table, shared) = (
        zeros([2, 2, 16])?,
        zeros([2, 3, 16])?,
        zeros([2, 2, 16])?,
        zeros([1, 2, 16])?,
    );
    let gate = Modulation::new(&table, 0)?;
    let message = gated_add(&x, &y, gate).unwrap_err().to_string();
    assert_eq!(message, "gated_add: x has shape [2, 2, 16], expected [2, 3, 16]");
    let narrow = zeros([2, 1, 8])?;
    let message = gated_add(&x, &x, Modulation::new(&narrow, 0)?).unwrap_err().to_string();
    assert_eq!(message, "gated_add: gate has shape [2, 1, 8], expected [2, 1, 16]");
    let mut gradients = zeros([2, 1, 16])?;
    let place = VectorGradient {
        table: &mut gradients,
        index: 1,
    };
    let message = item_sums(&x, place).unwrap_err().to_string();
    assert_eq!(message, "item_sums: there is no vector 1 in a table of 1 gradients");
    let message = layer_norm_shift(&x, gate, Modulation::new(&shared, 1)?, EPSILON).unwrap_err();
    assert_eq!(
        message.to_string(),
        "layer_norm_shift: scale and shift are of tables of different sizes"
    );
    Ok(())
}

fn cuda_equals_cpu(device: &Device) -> Outcome {
    // Rows that fill a block, leave threads idle, or need several vectors per thread; tokens beyond the blocks of an item.
    for (batch, tokens, dim) in [(1, 1, 8), (2, 5, 48), (2, 777, 384), (1, 33, 3072), (3, 17, 8192)] {
        expect_like_cpu(&format!("{batch}x{tokens}x{dim}"), device, BF16_TOLERANCE, |device| {
            let tensor = |name: &str| -> Result<Tensor> {
                Tensor::from_f32(device, &random_bf16(name, batch * tokens * dim), [batch, tokens, dim])
            };
            let (x, y) = (tensor("x")?, tensor("y")?);
            let table = Tensor::from_slice(device, &random("table", batch * 3 * dim), [batch, 3, dim])?;
            let vector = |index| Modulation::new(&table, index);
            let mut gradients = Tensor::zeros(device, [batch, 2, dim], DType::F32)?;
            let place = VectorGradient {
                table: &mut gradients,
                index: 1,
            };
            let dy = gated_add_backward(&x, &y, vector(2)?, Some(place))?;
            let place = VectorGradient {
                table: &mut gradients,
                index: 0,
            };
            item_sums(&y, place)?;
            let shared = table.narrow(0, 1)?;
            Ok(vec![
                gated_add(&x, &y, vector(2)?)?,
                gated_add(&x, &y, Modulation::new(&shared, 1)?)?,
                dy,
                gradients,
                layer_norm_shift(&x, vector(1)?, vector(0)?, EPSILON)?,
            ])
        })?;
    }
    Ok(())
}
