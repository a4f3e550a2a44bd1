use l2p_engine::ops::to_rgb8::to_rgb8;
use l2p_engine::{DType, Device, Error, Result, Tensor};
use l2p_tests::{Outcome, Suite, expect_like_cpu, random};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::to_rgb8::cpu_rounds_and_clamps", cpu_rounds_and_clamps);
    suite.cpu("ops::to_rgb8::cpu_counts_what_is_not_finite", || counts(&Device::Cpu));
    suite.cpu(
        "ops::to_rgb8::the_first_bad_picture_is_named",
        the_first_bad_picture_is_named,
    );
    suite.cpu("ops::to_rgb8::other_tensors_are_refused", other_tensors_are_refused);
    suite.cuda("ops::to_rgb8::cuda_equals_cpu", cuda_equals_cpu);
    suite.cuda("ops::to_rgb8::cuda_counts_what_is_not_finite", counts);
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
    let found = to_rgb8(&x)?;
    assert_eq!(found.bytes.to_vec::<u8>()?, BYTES);
    assert_eq!(found.not_finite.to_vec::<i32>()?, [2]);
    Ok(())
}

/// Pictures of no, one, some and nothing but values that are not finite, whose sizes are no multiples of what a thread takes; what is
/// found of one is not said of its neighbours.
fn counts(device: &Device) -> Outcome {
    for (height, width) in [(1, 1), (3, 5), (37, 23), (128, 130)] {
        let values = height * width * 3;
        let expected = [0, 1, (values as i32 + 6) / 7, values as i32, 0];
        let mut pictures = random("x", expected.len() * values);
        pictures[2 * values - 1] = f32::NAN;
        for index in 0..values {
            let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][index % 3];
            if index % 7 == 0 {
                pictures[2 * values + index] = bad;
            }
            pictures[3 * values + index] = bad;
        }
        let shape = [expected.len(), height, width, 3];
        let found = to_rgb8(&Tensor::from_slice(device, &pictures, shape)?)?;
        assert_eq!(found.not_finite.to_vec::<i32>()?, expected, "{height}x{width}");
    }
    Ok(())
}

fn the_first_bad_picture_is_named() -> Outcome {
    let mut values = random("x", 3 * 12);
    let pictures = |values: &[f32]| to_rgb8(&Tensor::from_slice(&Device::Cpu, values, [3, 2, 2, 3])?);
    let found = pictures(&values)?.into_pictures(0, 3)?;
    assert_eq!(found.concat(), pictures(&values)?.bytes.to_vec::<u8>()?);
    assert_eq!(found.len(), 3);
    values[13] = f32::NAN;
    values[30] = f32::INFINITY;
    let message = |first, of| -> Result<String> {
        let error = pictures(&values)?.into_pictures(first, of).unwrap_err();
        assert!(matches!(error, Error::NotFinite { .. }), "{error}");
        Ok(error.to_string())
    };
    assert_eq!(
        message(0, 3)?,
        "picture 2 of 3 (1 of 12 values): not finite (NaN or infinity)"
    );
    // As part of a larger batch.
    assert_eq!(
        message(4, 9)?,
        "picture 6 of 9 (1 of 12 values): not finite (NaN or infinity)"
    );
    let alone = to_rgb8(&Tensor::from_slice(&Device::Cpu, &values[12..24], [1, 2, 2, 3])?)?;
    assert_eq!(
        alone.into_pictures(0, 1).unwrap_err().to_string(),
        "the picture (1 of 12 values): not finite (NaN or infinity)"
    );
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
            let found = to_rgb8(&Tensor::from_slice(device, &values, shape)?)?;
            Ok(vec![found.bytes, found.not_finite])
        })?;
    }
    // An item of a batch need not start at a multiple of four values.
    expect_like_cpu("view", device, 0.0, |device| {
        let x = Tensor::from_slice(device, &random("x", 2 * 5 * 7 * 3), [2, 5, 7, 3])?;
        Ok(vec![to_rgb8(&x.narrow(1, 1)?)?.bytes])
    })
}
