use l2p_engine::ops::linear::linear;
use l2p_engine::ops::linear_swiglu::linear_swiglu;
use l2p_engine::ops::swiglu::swiglu;
use l2p_engine::{Device, Result, Tensor};
use l2p_tests::{BF16_TOLERANCE, Outcome, Suite, expect_like_cpu, random, random_bf16};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::linear_swiglu::is_what_it_is_made_of", is_what_it_is_made_of);
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

fn is_what_it_is_made_of() -> Outcome {
    let [x, weight] = inputs(&Device::Cpu, 2, 7, 24, 10)?;
    let found = linear_swiglu(&x, &weight)?;
    let expected = swiglu(&linear(&x, &weight, None)?)?;
    assert_eq!(found.shape(), expected.shape());
    assert_eq!(found.as_slice::<f32>()?, expected.as_slice::<f32>()?);
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
