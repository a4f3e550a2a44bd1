use l2p_engine::ops::conv::{Activation, conv2d, conv2d_f32, conv3x3_silu_pool, upsample_conv3x3};
use l2p_engine::{Device, Tensor};
use l2p_tests::{BF16_TOLERANCE, Outcome, Suite, expect_like_cpu, random_bf16};

use super::{image, layer};

pub fn register(suite: &mut Suite) {
    suite.cuda("ops::conv::cuda_equals_cpu", cuda_equals_cpu);
    suite.cuda("ops::conv::cuda_pool_equals_cpu", cuda_pool_equals_cpu);
    suite.cuda("ops::conv::cuda_upsample_equals_cpu", cuda_upsample_equals_cpu);
    suite.cuda("ops::conv::cuda_two_sources_equal_cpu", cuda_two_sources_equal_cpu);
    suite.cuda("ops::conv::cuda_image_sources_equal_cpu", cuda_image_sources_equal_cpu);
    suite.cuda("ops::conv::cuda_residual_equals_cpu", cuda_residual_equals_cpu);
    suite.cuda("ops::conv::cuda_f32_equals_cpu", cuda_f32_equals_cpu);
    suite.cuda("ops::conv::cuda_refuses_odd_channels", cuda_refuses_odd_channels);
    suite.cuda("ops::conv::cuda_repeats_its_bits", cuda_repeats_its_bits);
}

/// Both sum in f32, in another order.
const F32_OUTPUT_TOLERANCE: f64 = 1e-4;

/// Batch, height and width: a tile and less, odd, several tiles with a rest, long and thin, one pixel.
const IMAGES: [[usize; 3]; 7] = [
    [1, 16, 16],
    [2, 5, 3],
    [1, 17, 33],
    [2, 40, 24],
    [1, 3, 70],
    [1, 65, 2],
    [1, 1, 1],
];

/// Inputs and outputs that reach every kernel, with whole and broken chunks and tiles of channels.
const CHANNELS: [[usize; 2]; 19] = [
    [8, 8],
    [16, 16],
    [16, 3],
    [24, 12],
    [32, 16],
    [40, 16],
    [128, 3],
    [16, 32],
    [32, 24],
    [64, 32],
    [72, 20],
    [16, 64],
    [64, 64],
    [104, 40],
    [64, 128],
    [32, 72],
    [136, 200],
    [256, 128],
    [8, 257],
];

fn cuda_equals_cpu(device: &Device) -> Outcome {
    for kernel in [1, 3] {
        for [batch, height, width] in IMAGES {
            for [inputs, outputs] in CHANNELS {
                let what = format!("{kernel}x{kernel} {batch}x{height}x{width} {inputs} to {outputs}");
                expect_like_cpu(&what, device, BF16_TOLERANCE, |device| {
                    let x = image(device, "x", [batch, height, width, inputs])?;
                    let conv = layer(device, kernel, &[inputs], outputs)?;
                    Ok(vec![
                        conv2d(&x, None, &conv, Activation::None, None)?,
                        conv2d(&x, None, &conv, Activation::Silu, None)?,
                    ])
                })?;
            }
        }
    }
    Ok(())
}

fn cuda_pool_equals_cpu(device: &Device) -> Outcome {
    for [batch, height, width] in IMAGES {
        for [inputs, outputs] in CHANNELS {
            let what = format!("{batch}x{height}x{width} {inputs} to {outputs}");
            expect_like_cpu(&what, device, BF16_TOLERANCE, |device| {
                let x = image(device, "x", [batch, height, width, inputs])?;
                let (full, pooled) = conv3x3_silu_pool(&x, &layer(device, 3, &[inputs], outputs)?)?;
                Ok(vec![full, pooled])
            })?;
        }
    }
    Ok(())
}

fn cuda_upsample_equals_cpu(device: &Device) -> Outcome {
    for [batch, height, width] in IMAGES {
        for [inputs, outputs] in CHANNELS {
            let what = format!("{batch}x{height}x{width} {inputs} to {outputs}");
            expect_like_cpu(&what, device, BF16_TOLERANCE, |device| {
                let x = image(device, "x", [batch, height, width, inputs])?;
                Ok(vec![upsample_conv3x3(&x, &layer(device, 3, &[inputs], outputs)?)?])
            })?;
        }
    }
    Ok(())
}

fn cuda_two_sources_equal_cpu(device: &Device) -> Outcome {
    for kernel in [1, 3] {
        for [batch, height, width] in IMAGES {
            for (channels, outputs) in [
                ([16, 16], 16),
                ([8, 24], 8),
                ([64, 40], 64),
                ([32, 96], 136),
                ([64, 64], 32),
            ] {
                // The same grid, a coarser one and a finer one.
                for (rows, columns) in [(height, width), (2, 3), (2 * height + 1, width + 2)] {
                    let what = format!("{kernel}x{kernel} {batch}x{height}x{width} {channels:?} of {rows}x{columns}");
                    expect_like_cpu(&what, device, BF16_TOLERANCE, |device| {
                        let x = image(device, "x", [batch, height, width, channels[0]])?;
                        let second = image(device, "second", [batch, rows, columns, channels[1]])?;
                        let conv = layer(device, kernel, &channels, outputs)?;
                        Ok(vec![conv2d(&x, Some(&second), &conv, Activation::Silu, None)?])
                    })?;
                }
            }
        }
    }
    Ok(())
}

/// Images of three channels and less, alone or after another source, in f32 and in bf16.
fn cuda_image_sources_equal_cpu(device: &Device) -> Outcome {
    for [batch, height, width] in IMAGES {
        for (first, image_channels, outputs) in [
            (0, 3, 3),
            (0, 3, 16),
            (0, 3, 64),
            (0, 1, 24),
            (16, 3, 16),
            (8, 2, 40),
            (40, 3, 8),
        ] {
            for in_f32 in [false, true] {
                let what = format!("{batch}x{height}x{width} {first}+{image_channels} to {outputs}, f32: {in_f32}");
                expect_like_cpu(&what, device, BF16_TOLERANCE, |device| {
                    let shape = [batch, height, width, image_channels];
                    let values = random_bf16("picture", shape.iter().product());
                    let picture = match in_f32 {
                        true => Tensor::from_slice(device, &values, shape)?,
                        false => Tensor::from_f32(device, &values, shape)?,
                    };
                    if first == 0 {
                        let (full, pooled) =
                            conv3x3_silu_pool(&picture, &layer(device, 3, &[image_channels], outputs)?)?;
                        return Ok(vec![full, pooled]);
                    }
                    let x = image(device, "x", [batch, height, width, first])?;
                    let conv = layer(device, 3, &[first, image_channels], outputs)?;
                    Ok(vec![conv2d(&x, Some(&picture), &conv, Activation::None, None)?])
                })?;
            }
        }
    }
    Ok(())
}

fn cuda_residual_equals_cpu(device: &Device) -> Outcome {
    for kernel in [1, 3] {
        for [batch, height, width] in IMAGES {
            for [inputs, outputs] in [[16, 16], [64, 24], [32, 64], [128, 136]] {
                let what = format!("{kernel}x{kernel} {batch}x{height}x{width} {inputs} to {outputs}");
                expect_like_cpu(&what, device, BF16_TOLERANCE, |device| {
                    let x = image(device, "x", [batch, height, width, inputs])?;
                    let residual = image(device, "residual", [batch, height, width, outputs])?;
                    let conv = layer(device, kernel, &[inputs], outputs)?;
                    Ok(vec![conv2d(&x, None, &conv, Activation::None, Some(&residual))?])
                })?;
            }
        }
    }
    Ok(())
}

fn cuda_f32_equals_cpu(device: &Device) -> Outcome {
    for kernel in [1, 3] {
        for [batch, height, width] in IMAGES {
            for [inputs, outputs] in [[8, 3], [16, 3], [64, 3], [128, 3], [520, 3], [32, 5], [16, 72]] {
                let what = format!("{kernel}x{kernel} {batch}x{height}x{width} {inputs} to {outputs}");
                expect_like_cpu(&what, device, F32_OUTPUT_TOLERANCE, |device| {
                    let x = image(device, "x", [batch, height, width, inputs])?;
                    Ok(vec![conv2d_f32(&x, &layer(device, kernel, &[inputs], outputs)?, -1.0)?])
                })?;
            }
        }
    }
    Ok(())
}

fn cuda_refuses_odd_channels(device: &Device) -> Outcome {
    let x = image(device, "x", [1, 4, 4, 12])?;
    let outcome = conv2d(&x, None, &layer(device, 3, &[12], 8)?, Activation::None, None);
    let message = outcome.unwrap_err().to_string();
    assert!(message.contains("multiple of 8 channels"), "{message}");
    Ok(())
}

fn cuda_repeats_its_bits(device: &Device) -> Outcome {
    let x = image(device, "x", [1, 40, 40, 128])?;
    let conv = layer(device, 3, &[128], 128)?;
    let run = || conv2d(&x, None, &conv, Activation::Silu, None)?.to_vec::<half::bf16>();
    assert!(run()? == run()?);
    Ok(())
}
