//! Convolutions whose weights were arranged for Hopper's kernels. On other GPUs the same calls run on the portable ones.

use l2p_engine::ops::conv::{
    Activation, Canvas, Conv, Input, conv2d, conv2d_f32, conv3x3_silu_picture, conv3x3_silu_pool, conv3x3_silu_pooled,
    upsample_conv3x3,
};
use l2p_engine::{DType, Device, Result, Tensor};
use l2p_tests::{BF16_TOLERANCE, Outcome, Suite, expect_like_cpu, random_bf16};

use super::{image, layer};

pub fn register(suite: &mut Suite) {
    suite.cuda("ops::conv::hopper_equals_cpu", hopper_equals_cpu);
    suite.cuda("ops::conv::hopper_pool_equals_cpu", hopper_pool_equals_cpu);
    suite.cuda("ops::conv::hopper_upsample_equals_cpu", hopper_upsample_equals_cpu);
    suite.cuda("ops::conv::hopper_two_sources_equal_cpu", hopper_two_sources_equal_cpu);
    suite.cuda("ops::conv::hopper_f32_equals_cpu", hopper_f32_equals_cpu);
    suite.cuda("ops::conv::picture_equals_cpu", picture_equals_cpu);
    suite.cuda("ops::conv::pooled_image_equals_cpu", pooled_image_equals_cpu);
    suite.cuda("ops::conv::hopper_repeats_its_bits", hopper_repeats_its_bits);
}

/// Batch, height and width: a tile and less, odd, several tiles with a rest, long and thin, one pixel, more tiles than a GPU
/// has multiprocessors.
const IMAGES: [[usize; 3]; 8] = [
    [1, 8, 16],
    [1, 16, 16],
    [2, 5, 3],
    [1, 17, 33],
    [2, 40, 24],
    [1, 3, 70],
    [1, 1, 1],
    [1, 130, 230],
];

/// Inputs and outputs that reach every kernel for 3x3 convolutions, with whole and broken blocks of outputs and one to
/// several chunks of inputs.
const CHANNELS: [[usize; 2]; 15] = [
    [64, 16],
    [128, 16],
    [32, 16],
    [96, 8],
    [16, 16],
    [16, 32],
    [32, 32],
    [64, 32],
    [64, 24],
    [32, 64],
    [64, 64],
    [128, 48],
    [16, 136],
    [64, 128],
    [192, 256],
];

/// Both sum in f32, in another order.
const F32_OUTPUT_TOLERANCE: f64 = 1e-4;

/// A layer arranged for `input`; on Hopper it must have found a kernel.
fn arranged(device: &Device, kernel: usize, channels: &[usize], outputs: usize, input: Input) -> Result<Conv> {
    let conv = layer(device, kernel, channels, outputs)?.arranged(input)?;
    if let Device::Cuda(cuda) = device {
        assert_eq!(
            conv.is_arranged(),
            cuda.has_hopper_kernels(),
            "{channels:?} to {outputs}"
        );
    }
    Ok(conv)
}

fn hopper_equals_cpu(device: &Device) -> Outcome {
    let pointwise = [[64, 128], [128, 64], [192, 136]];
    let cases = CHANNELS
        .map(|channels| (3, channels))
        .into_iter()
        .chain(pointwise.map(|channels| (1, channels)));
    for (kernel, [inputs, outputs]) in cases {
        for [batch, height, width] in IMAGES {
            let what = format!("{kernel}x{kernel} {batch}x{height}x{width} {inputs} to {outputs}");
            expect_like_cpu(&what, device, BF16_TOLERANCE, |device| {
                let x = image(device, "x", [batch, height, width, inputs])?;
                let residual = image(device, "residual", [batch, height, width, outputs])?;
                let conv = arranged(device, kernel, &[inputs], outputs, Input::Same)?;
                Ok(vec![
                    conv2d(&x, None, &conv, Activation::None, None)?,
                    conv2d(&x, None, &conv, Activation::Silu, None)?,
                    conv2d(&x, None, &conv, Activation::None, Some(&residual))?,
                ])
            })?;
        }
    }
    Ok(())
}

fn hopper_pool_equals_cpu(device: &Device) -> Outcome {
    for [inputs, outputs] in CHANNELS {
        for [batch, height, width] in IMAGES {
            let what = format!("{batch}x{height}x{width} {inputs} to {outputs}");
            expect_like_cpu(&what, device, BF16_TOLERANCE, |device| {
                let x = image(device, "x", [batch, height, width, inputs])?;
                let conv = arranged(device, 3, &[inputs], outputs, Input::Same)?;
                let (full, pooled) = conv3x3_silu_pool(&x, &conv)?;
                Ok(vec![full, pooled, conv3x3_silu_pooled(&x, &conv)?])
            })?;
        }
    }
    Ok(())
}

fn hopper_upsample_equals_cpu(device: &Device) -> Outcome {
    for [inputs, outputs] in [
        [16, 16],
        [32, 16],
        [16, 8],
        [32, 32],
        [64, 64],
        [64, 40],
        [64, 128],
        [128, 128],
        [192, 264],
    ] {
        for [batch, height, width] in IMAGES {
            let what = format!("{batch}x{height}x{width} {inputs} to {outputs}");
            expect_like_cpu(&what, device, BF16_TOLERANCE, |device| {
                let x = image(device, "x", [batch, height, width, inputs])?;
                let conv = arranged(device, 3, &[inputs], outputs, Input::Upsampled)?;
                Ok(vec![upsample_conv3x3(&x, &conv)?])
            })?;
        }
    }
    Ok(())
}

fn hopper_two_sources_equal_cpu(device: &Device) -> Outcome {
    let cases = [
        (3, [32, 32], 16),
        (3, [64, 64], 32),
        (3, [64, 64], 64),
        (3, [32, 96], 64),
        (3, [64, 128], 128),
        (3, [16, 32], 24),
        (1, [64, 192], 128),
    ];
    for (kernel, channels, outputs) in cases {
        for [batch, height, width] in IMAGES {
            let what = format!("{kernel}x{kernel} {batch}x{height}x{width} {channels:?} to {outputs}");
            expect_like_cpu(&what, device, BF16_TOLERANCE, |device| {
                let x = image(device, "x", [batch, height, width, channels[0]])?;
                let second = image(device, "second", [batch, height, width, channels[1]])?;
                let conv = arranged(device, kernel, &channels, outputs, Input::Same)?;
                Ok(vec![conv2d(&x, Some(&second), &conv, Activation::Silu, None)?])
            })?;
        }
    }
    // A second source on another grid is left to the portable kernels.
    expect_like_cpu("another grid", device, BF16_TOLERANCE, |device| {
        let x = image(device, "x", [1, 20, 12, 64])?;
        let second = image(device, "second", [1, 5, 6, 64])?;
        let conv = arranged(device, 1, &[64, 64], 128, Input::Same)?;
        Ok(vec![conv2d(&x, Some(&second), &conv, Activation::Silu, None)?])
    })
}

fn hopper_f32_equals_cpu(device: &Device) -> Outcome {
    for [inputs, outputs] in [[64, 3], [128, 3], [32, 5], [64, 40]] {
        for [batch, height, width] in IMAGES {
            let what = format!("{batch}x{height}x{width} {inputs} to {outputs}");
            expect_like_cpu(&what, device, F32_OUTPUT_TOLERANCE, |device| {
                let x = image(device, "x", [batch, height, width, inputs])?;
                let conv = arranged(device, 3, &[inputs], outputs, Input::Same)?;
                Ok(vec![conv2d_f32(&x, &conv, -1.0)?])
            })?;
        }
    }
    Ok(())
}

/// A picture written and one added to, by each kernel that ends in one and by the way around them.
fn picture_equals_cpu(device: &Device) -> Outcome {
    for (channels, outputs) in [
        ([64, 64], 64),
        ([64, 64], 48),
        ([32, 32], 32),
        ([32, 32], 24),
        ([64, 64], 128),
        ([16, 24], 8),
    ] {
        for [batch, height, width] in IMAGES {
            let what = format!("{batch}x{height}x{width} {channels:?} to {outputs} to 3");
            expect_like_cpu(&what, device, BF16_TOLERANCE, |device| {
                let x = image(device, "x", [batch, height, width, channels[0]])?;
                let second = image(device, "second", [batch, height, width, channels[1]])?;
                let conv = layer(device, 3, &channels, outputs)?.arranged(Input::Same)?;
                let to_picture = layer(device, 1, &[outputs], 3)?;
                let shape = [batch, height, width, 3];
                let mut written = Tensor::empty(device, shape, DType::F32)?;
                let mut added = Tensor::from_slice(device, &random_bf16("picture", shape.iter().product()), shape)?;
                let factors = Tensor::from_slice(device, &[0.625f32, -0.75], [2])?;
                for (picture, factors) in [(&mut written, None), (&mut added, Some(&factors))] {
                    let canvas = Canvas {
                        picture,
                        scale: -1.5,
                        factors,
                    };
                    conv3x3_silu_picture(&x, Some(&second), &conv, &to_picture, canvas)?;
                }
                Ok(vec![written, added])
            })?;
        }
    }
    Ok(())
}

fn pooled_image_equals_cpu(device: &Device) -> Outcome {
    for outputs in [8, 16, 32, 40, 64] {
        for [batch, height, width] in IMAGES {
            let what = format!("{batch}x{height}x{width} to {outputs}");
            expect_like_cpu(&what, device, BF16_TOLERANCE, |device| {
                let x = image(device, "x", [batch, height, width, 3])?;
                let conv = layer(device, 3, &[3], outputs)?;
                let (full, pooled) = conv3x3_silu_pool(&x, &conv)?;
                Ok(vec![full, pooled, conv3x3_silu_pooled(&x, &conv)?])
            })?;
        }
    }
    Ok(())
}

fn hopper_repeats_its_bits(device: &Device) -> Outcome {
    let x = image(device, "x", [1, 100, 200, 128])?;
    let conv = arranged(device, 3, &[128], 128, Input::Same)?;
    let run = || conv2d(&x, None, &conv, Activation::Silu, None)?.to_vec::<half::bf16>();
    assert!(run()? == run()?);
    Ok(())
}
