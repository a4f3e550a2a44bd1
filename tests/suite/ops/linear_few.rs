use l2p_engine::ops::add_rms_norm::add;
use l2p_engine::ops::linear_few::{
    FewScratch, MOST_ROWS, RowNorm, linear_few, linear_few_add, linear_few_f32, linear_few_swiglu,
};
use l2p_engine::{DType, Device, Result, Tensor};
use l2p_tests::{BF16_TOLERANCE, Outcome, Suite, expect_like_cpu, random, random_bf16};

use super::loops::{exact, expect_exact, product, silu};

const EPSILON: f32 = 1e-6;

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::linear_few::cpu_equals_plain_loops", cpu_equals_plain_loops);
    suite.cpu("ops::linear_few::mistakes_are_named", mistakes_are_named);
    suite.cuda("ops::linear_few::cuda_equals_cpu", cuda_equals_cpu);
    suite.cuda("ops::linear_few::cuda_of_a_model", cuda_of_a_model);
    suite.cuda("ops::linear_few::cuda_rows_are_their_own", cuda_rows_are_their_own);
    suite.cuda("ops::linear_few::cuda_recorded_steps_follow_each_other", cuda_recorded);
}

/// x, the norm's factors, and a weight of `outputs` rows that keeps results near 1.
fn inputs(device: &Device, rows: usize, depth: usize, outputs: usize) -> Result<[Tensor; 3]> {
    let x = random_bf16("x", rows * depth);
    let factor: Vec<f32> = random_bf16("factor", depth)
        .iter()
        .map(|value| 1.0 + 0.25 * value)
        .collect();
    let scale = 1.0 / (depth as f32).sqrt();
    let weight = random("weight", outputs * depth).into_iter();
    let weight: Vec<f32> = weight
        .map(|value| half::bf16::from_f32(value * scale).to_f32())
        .collect();
    Ok([
        Tensor::from_f32(device, &x, [rows, 1, depth])?,
        Tensor::from_f32(device, &factor, [depth])?,
        Tensor::from_f32(device, &weight, [outputs, depth])?,
    ])
}

fn norm(weight: &Tensor) -> Option<RowNorm<'_>> {
    Some(RowNorm {
        weight,
        epsilon: EPSILON,
    })
}

/// Everything that is done with these inputs.
fn all(device: &Device, rows: usize, depth: usize, outputs: usize) -> Result<Vec<Tensor>> {
    let [x, factor, weight] = inputs(device, rows, depth, 2 * outputs)?;
    let scratch = &mut FewScratch::new(device)?;
    let mut sum = Tensor::from_f32(device, &random_bf16("sum", rows * 2 * outputs), [rows, 1, 2 * outputs])?;
    linear_few_add(&x, &weight, &mut sum, scratch)?;
    let mut logits = [x.clone(), x.clone()].map(|_| Tensor::zeros(device, [rows, 1, 2 * outputs], DType::F32));
    let [plain, normed] = &mut logits;
    if let (Ok(plain), Ok(normed)) = (plain, normed) {
        linear_few_f32(&x, None, &weight, plain, scratch)?;
        linear_few_f32(&x, norm(&factor), &weight, normed, scratch)?;
    }
    let [plain, normed] = logits;
    Ok(vec![
        linear_few(&x, None, &weight, scratch)?,
        linear_few(&x, norm(&factor), &weight, scratch)?,
        sum,
        linear_few_swiglu(&x, None, &weight, scratch)?,
        linear_few_swiglu(&x, norm(&factor), &weight, scratch)?,
        plain?,
        normed?,
    ])
}

fn cpu_equals_plain_loops() -> Outcome {
    for [rows, depth, outputs] in [[1, 1, 1], [3, 24, 10], [32, 70, 7]] {
        let [x, factor, weight] = inputs(&Device::Cpu, rows, depth, 2 * outputs)?;
        let (values, factors, weights) = (exact(&x)?, exact(&factor)?, exact(&weight)?);
        let normed: Vec<f64> = values
            .chunks(depth)
            .flat_map(|row| {
                let square = row.iter().map(|x| x * x).sum::<f64>() / depth as f64;
                let inverse = 1.0 / (square + f64::from(EPSILON)).sqrt();
                let scaled: Vec<f64> = row
                    .iter()
                    .zip(&factors)
                    .map(|(x, factor)| x * inverse * factor)
                    .collect();
                scaled
            })
            .collect();
        let (plain, normed) = (product(&values, &weights, depth), product(&normed, &weights, depth));
        let gated = |projections: &[f64]| -> Vec<f64> {
            let rows = projections.chunks(2 * outputs);
            rows.flat_map(|row| {
                (0..outputs)
                    .map(|column| silu(row[column]) * row[outputs + column])
                    .collect::<Vec<_>>()
            })
            .collect()
        };
        let before = random_bf16("sum", rows * 2 * outputs).into_iter().map(f64::from);
        let added: Vec<f64> = plain.iter().zip(before).map(|(y, before)| y + before).collect();
        let expected = [
            plain.clone(),
            normed.clone(),
            added,
            gated(&plain),
            gated(&normed),
            plain.clone(),
            normed.clone(),
        ];
        for (index, (found, expected)) in all(&Device::Cpu, rows, depth, outputs)?
            .iter()
            .zip(&expected)
            .enumerate()
        {
            expect_exact(&format!("{rows}x{depth} to {outputs}, result {index}"), found, expected)?;
        }
    }
    Ok(())
}

/// The longest rows that kernels of norms take; models normalise their hidden state alone, which is shorter.
const MOST_NORMED_DEPTH: usize = 8192;

/// Where SwiGLU of normalised x stands among the results of [`all`].
const NORMED_SWIGLU: usize = 4;

/// That of two operations in a row: normalised x is rounded to bf16, an error of 1.7e-3, which both factors of the product have, one of
/// them about twice over by silu, before the result is rounded.
const NORMED_SWIGLU_TOLERANCE: f64 = 1.5 * BF16_TOLERANCE;

/// One to all rows on either side of every kernel's bound; fewer summed elements than a warp's step, a step with a rest, more than
/// all warps take at once and more than the ring holds; tiles of outputs with a rest.
fn cuda_equals_cpu(device: &Device) -> Outcome {
    for rows in [1, 2, 7, 8, 9, 16, 17, 31, 32] {
        for [depth, outputs] in [[8, 8], [64, 16], [136, 40], [520, 24], [2600, 72], [4104, 36]] {
            let what = format!("{rows}x{depth} to {outputs}");
            let choose = |device: &Device, normed: bool| -> Result<Vec<Tensor>> {
                let results = all(device, rows, depth, outputs)?.into_iter().enumerate();
                let chosen = results.filter(|(index, _)| (*index == NORMED_SWIGLU) == normed);
                Ok(chosen.map(|(_, result)| result).collect())
            };
            expect_like_cpu(&what, device, BF16_TOLERANCE, |device| choose(device, false))?;
            expect_like_cpu(&what, device, NORMED_SWIGLU_TOLERANCE, |device| choose(device, true))?;
        }
    }
    Ok(())
}

/// The layers of Qwen3-4B, and a part of its table as the matrix of logits; more tiles than blocks.
fn cuda_of_a_model(device: &Device) -> Outcome {
    for rows in [1, 32] {
        for [depth, outputs] in [[2560, 3072], [4096, 1280], [2560, 9728], [9728, 1280], [2560, 20000]] {
            let what = format!("{rows}x{depth} to {outputs}");
            expect_like_cpu(&what, device, BF16_TOLERANCE, |device| {
                let [x, factor, weight] = inputs(device, rows, depth, 2 * outputs)?;
                let mut logits = Tensor::zeros(device, [rows, 1, 2 * outputs], DType::F32)?;
                let norm = if depth <= MOST_NORMED_DEPTH {
                    norm(&factor)
                } else {
                    None
                };
                let scratch = &mut FewScratch::new(device)?;
                linear_few_f32(&x, norm, &weight, &mut logits, scratch)?;
                Ok(vec![linear_few_swiglu(&x, None, &weight, scratch)?, logits])
            })?;
            if depth > MOST_NORMED_DEPTH {
                continue;
            }
            expect_like_cpu(&what, device, NORMED_SWIGLU_TOLERANCE, |device| {
                let [x, factor, weight] = inputs(device, rows, depth, 2 * outputs)?;
                let scratch = &mut FewScratch::new(device)?;
                Ok(vec![linear_few_swiglu(&x, norm(&factor), &weight, scratch)?])
            })?;
        }
    }
    Ok(())
}

/// A row gives the same bits alone as among others, and every time.
fn cuda_rows_are_their_own(device: &Device) -> Outcome {
    let [x, factor, weight] = inputs(device, 8, 2560, 512)?;
    let mut scratch = FewScratch::new(device)?;
    let mut run = |x: &Tensor| linear_few(x, norm(&factor), &weight, &mut scratch)?.to_vec::<half::bf16>();
    let together = run(&x)?;
    assert!(together == run(&x)?);
    for row in 0..8 {
        assert!(run(&x.narrow(row, 1)?)? == together[row * 512..][..512], "row {row}");
    }
    Ok(())
}

/// A chain in which each layer reads what the one before has just written, recorded and replayed many times: that none begins too
/// early shows in its bits.
fn cuda_recorded(device: &Device) -> Outcome {
    let Device::Cuda(cuda) = device else { return Ok(()) };
    let [x, factor, weight] = inputs(device, 2, 1024, 1024)?;
    let zero = Tensor::zeros(device, x.shape(), DType::Bf16)?;
    let mut sum = Tensor::zeros(device, x.shape(), DType::Bf16)?;
    let mut scratch = FewScratch::new(device)?;
    let mut chain = |sum: &mut Tensor| -> Result<()> {
        let mut stream = add(&x, &zero)?;
        for _ in 0..24 {
            let inner = linear_few(&stream, norm(&factor), &weight, &mut scratch)?;
            linear_few_add(&inner, &weight, &mut stream, &mut scratch)?;
        }
        sum.copy_from(&stream)
    };
    chain(&mut sum)?;
    let expected = sum.to_vec::<half::bf16>()?;
    let mut graph = l2p_engine::device::Graph::record(cuda, || chain(&mut sum))?;
    for _ in 0..50 {
        graph.launch()?;
        assert!(sum.to_vec::<half::bf16>()? == expected);
    }
    Ok(())
}

fn mistakes_are_named() -> Outcome {
    let scratch = &mut FewScratch::new(&Device::Cpu)?;
    let [x, factor, weight] = inputs(&Device::Cpu, 3, 8, 4)?;
    let message = |outcome: Result<Tensor>| outcome.unwrap_err().to_string();
    let many = Tensor::zeros(&Device::Cpu, [MOST_ROWS + 1, 1, 8], DType::F32)?;
    assert_eq!(
        message(linear_few(&many, None, &weight, scratch)),
        "linear_few: x has 33 rows, more than the 32 that are few"
    );
    let narrow = weight.reshape([8, 4])?;
    assert!(message(linear_few(&x, None, &narrow, scratch)).starts_with("linear_few: weight has shape [8, 4]"));
    assert!(message(linear_few(&x, norm(&weight), &weight, scratch)).starts_with("linear_few: norm has shape [4, 8]"));
    let odd = Tensor::zeros(&Device::Cpu, [3, 8], DType::F32)?;
    assert!(message(linear_few_swiglu(&x, norm(&factor), &odd, scratch)).contains("[2·hidden, in]"));
    let mut small = Tensor::zeros(&Device::Cpu, [3, 1, 3], DType::F32)?;
    let message = linear_few_add(&x, &weight, &mut small, scratch)
        .unwrap_err()
        .to_string();
    assert_eq!(message, "linear_few_add: sum has shape [3, 1, 3], expected [3, 1, 4]");
    let message = linear_few_f32(&x, None, &weight, &mut small, scratch)
        .unwrap_err()
        .to_string();
    assert_eq!(message, "linear_few_f32: y has shape [3, 1, 3], expected [3, 1, 4]");
    Ok(())
}
