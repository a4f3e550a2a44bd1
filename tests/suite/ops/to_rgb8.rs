use l2p_engine::ops::to_rgb8::to_rgb8;
use l2p_engine::{DType, Device, Result, Tensor};
use l2p_tests::{Outcome, Suite, expect_like_cpu, random};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::to_rgb8::cpu_rounds_and_clamps", cpu_rounds_and_clamps);
    suite.cpu("ops::to_rgb8::other_tensors_are_refused", other_tensors_are_refused);
    suite.cuda("ops::to_rgb8::cuda_equals_cpu", cuda_equals_cpu);
}

/// Ends, outliers, and values whose byte is a tie: 0.5 → 0, 127.5 → 128, 2.5 → 2.
const VALUES: [f32; 9] = [
    -1.0,
    1.0,
    -3.0,
    f32::INFINITY,
    f32::NAN,
    0.0,
    1.0 / 255.0 - 1.0,
    5.0 / 255.0 - 1.0,
    0.5,
];
const BYTES: [u8; 9] = [0, 255, 0, 255, 0, 128, 0, 2, 191];

fn cpu_rounds_and_clamps() -> Outcome {
    let x = Tensor::from_slice(&Device::Cpu, &VALUES, [1, 1, 3, 3])?;
    assert_eq!(to_rgb8(&x)?.to_vec::<u8>()?, BYTES);
    Ok(())
}

fn other_tensors_are_refused() -> Outcome {
    let message = |shape: [usize; 4], dtype| -> Result<String> {
        Ok(to_rgb8(&Tensor::zeros(&Device::Cpu, shape, dtype)?)
            .unwrap_err()
            .to_string())
    };
    assert_eq!(
        message([1, 2, 2, 4], DType::F32)?,
        "to_rgb8: x has shape [1, 2, 2, 4], expected [1, 2, 2, 3]"
    );
    assert_eq!(message([1, 2, 2, 3], DType::U8)?, "to_rgb8: x holds u8, expected f32");
    Ok(())
}

fn cuda_equals_cpu(device: &Device) -> Outcome {
    for shape in [[1, 1, 1, 3], [1, 37, 23, 3], [2, 100, 101, 3]] {
        expect_like_cpu(&format!("{shape:?}"), device, 0.0, |device| {
            let mut values = random("x", shape.iter().product());
            let special = VALUES.len().min(values.len());
            values[..special].copy_from_slice(&VALUES[..special]);
            Ok(vec![to_rgb8(&Tensor::from_slice(device, &values, shape)?)?])
        })?;
    }
    // An item of a batch need not start at a multiple of four values.
    expect_like_cpu("view", device, 0.0, |device| {
        let x = Tensor::from_slice(device, &random("x", 2 * 5 * 7 * 3), [2, 5, 7, 3])?;
        Ok(vec![to_rgb8(&x.narrow(1, 1)?)?])
    })
}
