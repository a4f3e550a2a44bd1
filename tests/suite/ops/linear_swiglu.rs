use l2p_engine::ops::linear_swiglu::linear_swiglu;
use l2p_engine::{Device, Result, Tensor};
use l2p_tests::{BF16_TOLERANCE, Outcome, Suite, expect_like_cpu, random, random_bf16};

use super::loops::{exact, expect_exact, product, silu};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::linear_swiglu::cpu_equals_plain_loops", cpu_equals_plain_loops);
    suite.cpu("ops::linear_swiglu::mistakes_are_named", mistakes_are_named);
    suite.cuda("ops::linear_swiglu::cuda_equals_cpu", cuda_equals_cpu);
    suite.cuda("ops::linear_swiglu::cuda_repeats_its_bits", cuda_repeats_its_bits);
}

fn inputs(device: &Device, batch: usize, tokens: usize, dim: usize, hidden: usize) -> Result<[Tensor; 2]> {
    let x = random_bf16("x", batch * tokens * dim);
    let scale = 1.0 / (dim as f32).sqrt();
    let weight: Vec<f32> = random("weight", 2 * hidden * dim)
        .into_iter()
        .map(|value| half::bf16::from_f32(value * scale).to_f32())
        .collect();
    Ok([
        Tensor::from_f32(device, &x, [batch, tokens, dim])?,
        Tensor::from_f32(device, &weight, [2 * hidden, dim])?,
    ])
}

fn cpu_equals_plain_loops() -> Outcome {
    for [batch, tokens, dim, hidden] in [[2, 7, 24, 10], [1, 1, 1, 1], [1, 33, 200, 65]] {
        let [x, weight] = inputs(&Device::Cpu, batch, tokens, dim, hidden)?;
        let found = linear_swiglu(&x, &weight)?;
        assert_eq!(found.shape().to_vec(), [batch, tokens, hidden]);
        let projections = product(&exact(&x)?, &exact(&weight)?, dim);
        let expected: Vec<f64> = projections
            .chunks(2 * hidden)
            .flat_map(|row| (0..hidden).map(|column| silu(row[column]) * row[hidden + column]))
            .collect();
        expect_exact(&format!("{batch}x{tokens}x{dim} to {hidden}"), &found, &expected)?;
    }
    Ok(())
}

/// Few rows, which the library takes; one tile of rows, several with a rest; one step of summed elements, broken ones, more than
/// the kernel's ring holds; fewer columns than a tile, an odd number of tiles, tiles with a rest.
fn cuda_equals_cpu(device: &Device) -> Outcome {
    for [batch, tokens, dim, hidden] in [
        [2, 5, 64, 32],
        [1, 1024, 64, 32],
        [1, 1024, 64, 128],
        [1, 1024, 128, 256],
        [1, 1056, 72, 160],
        [2, 640, 320, 384],
        [1, 1500, 648, 416],
        [1, 3000, 1024, 2048],
    ] {
        let what = format!("{batch}x{tokens}x{dim} to {hidden}");
        expect_like_cpu(&what, device, BF16_TOLERANCE, |device| {
            let [x, weight] = inputs(device, batch, tokens, dim, hidden)?;
            Ok(vec![linear_swiglu(&x, &weight)?])
        })?;
    }
    Ok(())
}

fn cuda_repeats_its_bits(device: &Device) -> Outcome {
    let [x, weight] = inputs(device, 1, 2048, 512, 1024)?;
    let run = || linear_swiglu(&x, &weight)?.to_vec::<half::bf16>();
    assert!(run()? == run()?);
    Ok(())
}

fn mistakes_are_named() -> Outcome {
    let [x, weight] = inputs(&Device::Cpu, 1, 3, 8, 4)?;
    let odd = Tensor::from_f32(&Device::Cpu, &[0.0; 24], [3, 8])?;
    let message = linear_swiglu(&x, &odd).unwrap_err().to_string();
    assert!(
        message.contains("linear_swiglu") && message.contains("[2·hidden, dim]"),
        "{message}"
    );
    let narrow = weight.reshape([16, 4])?;
    assert!(linear_swiglu(&x, &narrow).is_err());
    Ok(())
}
