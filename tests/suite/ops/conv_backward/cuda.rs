use l2p_engine::ops::conv::{
    Activation, ConvGrads, ConvSaved, conv2d_backward, conv2d_f32_backward, conv2d_silu_with_sum, conv3x3_silu_pool,
    conv3x3_silu_pool_backward, conv3x3_silu_pool_with_sum, upsample_conv3x3_backward,
};
use l2p_engine::{Device, Result, Tensor};
use l2p_tests::{BF16_TOLERANCE, Outcome, Suite, expect_like_cpu, random_bf16};

use super::{Layer, TWICE_ROUNDED, first_of_equal_maxima, image};

pub fn register(suite: &mut Suite) {
    // From the parts outwards, so that the first failure says which one is at fault.
    suite.cuda("ops::conv_backward::cuda_1_sums_are_kept", sums_are_kept);
    suite.cuda("ops::conv_backward::cuda_2_bias", |device| plain(device, Part::Bias));
    suite.cuda("ops::conv_backward::cuda_3_source", |device| {
        plain(device, Part::Source)
    });
    suite.cuda("ops::conv_backward::cuda_4_weight", |device| {
        plain(device, Part::Weight)
    });
    suite.cuda("ops::conv_backward::cuda_silu_equals_cpu", silu_equals_cpu);
    suite.cuda("ops::conv_backward::cuda_pool_equals_cpu", pool_equals_cpu);
    suite.cuda("ops::conv_backward::cuda_first_of_equal_maxima", first_of_equal_maxima);
    suite.cuda("ops::conv_backward::cuda_upsample_equals_cpu", upsample_equals_cpu);
    suite.cuda("ops::conv_backward::cuda_two_sources_equal_cpu", two_sources_equal_cpu);
    suite.cuda(
        "ops::conv_backward::cuda_image_sources_equal_cpu",
        image_sources_equal_cpu,
    );
    suite.cuda("ops::conv_backward::cuda_f32_equals_cpu", f32_equals_cpu);
    suite.cuda("ops::conv_backward::cuda_large_equals_cpu", large_equals_cpu);
    suite.cuda("ops::conv_backward::cuda_refuses_odd_channels", refuses_odd_channels);
    suite.cuda("ops::conv_backward::cuda_repeats_its_bits", repeats_its_bits);
}

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

/// Inputs and outputs that reach every kernel, with whole and broken tiles of channels.
const CHANNELS: [[usize; 2]; 22] = [
    [8, 8],
    [16, 16],
    [16, 3],
    [24, 16],
    [32, 16],
    [40, 16],
    [128, 3],
    [16, 32],
    [32, 24],
    [64, 32],
    [16, 64],
    [64, 64],
    [104, 40],
    [64, 128],
    [32, 72],
    [136, 200],
    [256, 128],
    [32, 32],
    [32, 64],
    [128, 32],
    [144, 48],
    [96, 192],
];

/// What of a gradient a test looks at.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Part {
    Source,
    Weight,
    Bias,
}

/// The gradients that were made, of sources and parameters.
fn all(sources: impl IntoIterator<Item = Option<Tensor>>, layer: Layer) -> Vec<Tensor> {
    sources
        .into_iter()
        .flatten()
        .chain([layer.weight, layer.bias])
        .collect()
}

/// Without activation, one part at a time.
fn plain(device: &Device, part: Part) -> Outcome {
    for kernel in [1, 3] {
        for [batch, height, width] in IMAGES {
            for [inputs, outputs] in CHANNELS {
                if kernel == 1 && outputs % 8 != 0 {
                    continue;
                }
                let what = format!("{part:?} {kernel}x{kernel} {batch}x{height}x{width} {inputs} to {outputs}");
                expect_like_cpu(&what, device, BF16_TOLERANCE, |device| {
                    let x = image(device, "x", [batch, height, width, inputs])?;
                    let dy = image(device, "dy", [batch, height, width, outputs])?;
                    let mut layer = Layer::new(device, kernel, &[inputs], outputs)?;
                    let conv = layer.conv.clone();
                    let grads = if part == Part::Source { None } else { layer.grads() };
                    let want = [part == Part::Source, false];
                    let dx = conv2d_backward(&dy, ConvSaved::of(&x), &conv, Activation::None, want, grads)?.x;
                    Ok(match part {
                        Part::Source => dx.into_iter().collect(),
                        Part::Weight => vec![layer.weight],
                        Part::Bias => vec![layer.bias],
                    })
                })?;
            }
        }
    }
    Ok(())
}

fn sums_are_kept(device: &Device) -> Outcome {
    for [batch, height, width] in IMAGES {
        for [inputs, outputs] in [[16, 16], [3, 64], [64, 24], [16, 3]] {
            let what = format!("{batch}x{height}x{width} {inputs} to {outputs}");
            expect_like_cpu(&what, device, BF16_TOLERANCE, |device| {
                let x = image(device, "x", [batch, height, width, inputs])?;
                let conv = Layer::new(device, 3, &[inputs], outputs)?.conv;
                let (y, sum) = conv2d_silu_with_sum(&x, None, &conv)?;
                let (full, pooled, same_sum) = conv3x3_silu_pool_with_sum(&x, &conv)?;
                Ok(vec![y, sum, full, pooled, same_sum])
            })?;
        }
    }
    Ok(())
}

/// With the sum kept and without.
fn silu_equals_cpu(device: &Device) -> Outcome {
    for (kernel, keep) in [(1, false), (3, false), (3, true)] {
        for [batch, height, width] in IMAGES {
            for [inputs, outputs] in [[16, 16], [32, 16], [64, 24], [24, 136], [512, 128]] {
                let what = format!("{kernel}x{kernel} {batch}x{height}x{width} {inputs} to {outputs}, kept: {keep}");
                expect_like_cpu(&what, device, TWICE_ROUNDED, |device| {
                    let x = image(device, "x", [batch, height, width, inputs])?;
                    let dy = image(device, "dy", [batch, height, width, outputs])?;
                    let mut layer = Layer::new(device, kernel, &[inputs], outputs)?;
                    let conv = layer.conv.clone();
                    let sum = keep.then(|| conv2d_silu_with_sum(&x, None, &conv)).transpose()?;
                    let saved = ConvSaved {
                        sum: sum.map(|(_, sum)| sum),
                        ..ConvSaved::of(&x)
                    };
                    let dx = conv2d_backward(&dy, saved, &conv, Activation::Silu, [true, false], layer.grads())?.x;
                    Ok(all([dx], layer))
                })?;
            }
        }
    }
    Ok(())
}

/// The activated sum as CPU and CUDA shall both see it: where the maxima are must not depend on rounding.
fn same_full(device: &Device, shape: [usize; 4], outputs: usize) -> Result<Tensor> {
    let cpu = Device::Cpu;
    let conv = Layer::new(&cpu, 3, &[shape[3]], outputs)?.conv;
    let (full, _) = conv3x3_silu_pool(&image(&cpu, "x", shape)?, &conv)?;
    let rounded: Vec<f32> = full
        .to_vec_f32()?
        .into_iter()
        .map(|value| half::bf16::from_f32(value).to_f32())
        .collect();
    Tensor::from_f32(device, &rounded, full.shape())
}

fn pool_equals_cpu(device: &Device) -> Outcome {
    for [batch, height, width] in IMAGES {
        for [inputs, outputs] in [[16, 16], [3, 16], [3, 3], [3, 64], [24, 40], [64, 128], [128, 512]] {
            let what = format!("{batch}x{height}x{width} {inputs} to {outputs}");
            expect_like_cpu(&what, device, TWICE_ROUNDED, |device| {
                let shape = [batch, height, width, inputs];
                let x = image(device, "x", shape)?;
                let full = same_full(device, shape, outputs)?;
                let d_full = image(device, "d_full", [batch, height, width, outputs])?;
                let d_pooled = image(device, "d_pooled", [batch, height / 2, width / 2, outputs])?;
                let mut layer = Layer::new(device, 3, &[inputs], outputs)?;
                let conv = layer.conv.clone();
                let upstream = [&d_full, &d_pooled];
                let saved = ConvSaved::of(&x);
                let dx = conv3x3_silu_pool_backward(upstream, &full, saved, &conv, inputs > 3, layer.grads())?;
                Ok(all([dx], layer))
            })?;
        }
    }
    Ok(())
}

fn upsample_equals_cpu(device: &Device) -> Outcome {
    for [batch, height, width] in IMAGES {
        for [inputs, outputs] in [
            [8, 8],
            [16, 16],
            [32, 32],
            [64, 64],
            [24, 40],
            [128, 128],
            [264, 136],
            [40, 200],
            [16, 32],
            [64, 128],
            [24, 64],
        ] {
            let what = format!("{batch}x{height}x{width} {inputs} to {outputs}");
            expect_like_cpu(&what, device, TWICE_ROUNDED, |device| {
                let x = image(device, "x", [batch, height, width, inputs])?;
                let dy = image(device, "dy", [batch, 2 * height, 2 * width, outputs])?;
                let mut layer = Layer::new(device, 3, &[inputs], outputs)?;
                let conv = layer.conv.clone();
                let dx = upsample_conv3x3_backward(&dy, &x, &conv, true, layer.grads())?;
                Ok(all([dx], layer))
            })?;
        }
    }
    Ok(())
}

fn two_sources_equal_cpu(device: &Device) -> Outcome {
    for kernel in [1, 3] {
        for [batch, height, width] in IMAGES {
            for (channels, outputs) in [
                ([16, 16], 16),
                ([8, 24], 8),
                ([64, 40], 64),
                ([32, 96], 136),
                ([128, 128], 64),
            ] {
                // The same grid, a coarser one and a finer one.
                for (rows, columns) in [(height, width), (2, 3), (2 * height + 1, width + 2)] {
                    let what = format!("{kernel}x{kernel} {batch}x{height}x{width} {channels:?} of {rows}x{columns}");
                    expect_like_cpu(&what, device, TWICE_ROUNDED, |device| {
                        let x = image(device, "x", [batch, height, width, channels[0]])?;
                        let second = image(device, "second", [batch, rows, columns, channels[1]])?;
                        let dy = image(device, "dy", [batch, height, width, outputs])?;
                        let mut layer = Layer::new(device, kernel, &channels, outputs)?;
                        let conv = layer.conv.clone();
                        let saved = ConvSaved {
                            second: Some(&second),
                            ..ConvSaved::of(&x)
                        };
                        let grads = layer.grads();
                        let sources = conv2d_backward(&dy, saved, &conv, Activation::Silu, [true, true], grads)?;
                        Ok(all([sources.x, sources.second], layer))
                    })?;
                }
            }
        }
    }
    Ok(())
}

/// Images of three channels and less, alone or after another source, in f32 and in bf16.
fn image_sources_equal_cpu(device: &Device) -> Outcome {
    for [batch, height, width] in IMAGES {
        for (first, image_channels, outputs) in [
            (0, 3, 3),
            (0, 3, 16),
            (0, 3, 64),
            (0, 1, 24),
            (16, 3, 16),
            (8, 2, 40),
            (40, 3, 8),
            (16, 3, 136),
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
                    let dy = image(device, "dy", [batch, height, width, outputs])?;
                    let x = image(device, "x", [batch, height, width, first.max(1)])?;
                    let (saved, channels) = match first {
                        0 => (ConvSaved::of(&picture), vec![image_channels]),
                        _ => (
                            ConvSaved {
                                second: Some(&picture),
                                ..ConvSaved::of(&x)
                            },
                            vec![first, image_channels],
                        ),
                    };
                    let want = [true, first > 0 && outputs % 8 == 0];
                    let mut layer = Layer::new(device, 3, &channels, outputs)?;
                    let conv = layer.conv.clone();
                    let sources = conv2d_backward(&dy, saved, &conv, Activation::None, want, layer.grads())?;
                    Ok(all([sources.x, sources.second], layer))
                })?;
            }
        }
    }
    Ok(())
}

fn f32_equals_cpu(device: &Device) -> Outcome {
    for kernel in [1, 3] {
        for [batch, height, width] in IMAGES {
            for [inputs, outputs] in [[8, 3], [16, 3], [64, 3], [128, 3], [512, 3], [32, 1], [16, 72]] {
                for in_f32 in [true, false] {
                    let what = format!("{kernel}x{kernel} {batch}x{height}x{width} {inputs} to {outputs}, {in_f32}");
                    expect_like_cpu(&what, device, BF16_TOLERANCE, |device| {
                        let x = image(device, "x", [batch, height, width, inputs])?;
                        let shape = [batch, height, width, outputs];
                        let values = random_bf16("dy", shape.iter().product());
                        let dy = match in_f32 {
                            true => Tensor::from_slice(device, &values, shape)?,
                            false => Tensor::from_f32(device, &values, shape)?,
                        };
                        let mut layer = Layer::new(device, kernel, &[inputs], outputs)?;
                        let conv = layer.conv.clone();
                        let dx = conv2d_f32_backward(&dy, &x, &conv, -0.5, true, layer.grads())?;
                        Ok(all([dx], layer))
                    })?;
                }
            }
        }
    }
    Ok(())
}

/// Enough pixels that every block works on several parts and there are several partial sums.
fn large_equals_cpu(device: &Device) -> Outcome {
    for (grid, inputs, outputs) in [
        ([1, 512, 480], 16, 16),
        ([1, 250, 262], 64, 32),
        ([2, 130, 126], 128, 64),
    ] {
        let [batch, height, width] = grid;
        expect_like_cpu(
            &format!("{grid:?} {inputs} to {outputs}"),
            device,
            BF16_TOLERANCE,
            |device| {
                let x = image(device, "x", [batch, height, width, inputs])?;
                let dy = image(device, "dy", [batch, height, width, outputs])?;
                let mut layer = Layer::new(device, 3, &[inputs], outputs)?;
                let conv = layer.conv.clone();
                let saved = ConvSaved::of(&x);
                let dx = conv2d_backward(&dy, saved, &conv, Activation::Silu, [true, false], layer.grads())?.x;
                Ok(all([dx], layer))
            },
        )?;
        expect_like_cpu(
            &format!("{grid:?} {inputs} to {outputs}, upsampled"),
            device,
            BF16_TOLERANCE,
            |device| {
                let x = image(device, "x", [batch, height / 2, width / 2, inputs])?;
                let dy = image(device, "dy", [batch, height / 2 * 2, width / 2 * 2, outputs])?;
                let mut layer = Layer::new(device, 3, &[inputs], outputs)?;
                let conv = layer.conv.clone();
                let dx = upsample_conv3x3_backward(&dy, &x, &conv, true, layer.grads())?;
                Ok(all([dx], layer))
            },
        )?;
    }
    // A picture's layer, whose bias sums over all pixels.
    expect_like_cpu("to a picture", device, BF16_TOLERANCE, |device| {
        let x = image(device, "x", [1, 512, 480, 16])?;
        let dy = Tensor::from_slice(device, &random_bf16("dy", 512 * 480 * 3), [1, 512, 480, 3])?;
        let mut layer = Layer::new(device, 1, &[16], 3)?;
        let conv = layer.conv.clone();
        let dx = conv2d_f32_backward(&dy, &x, &conv, -1.0, true, layer.grads())?;
        Ok(all([dx], layer))
    })
}

fn refuses_odd_channels(device: &Device) -> Outcome {
    let x = image(device, "x", [1, 4, 4, 8])?;
    let dy = image(device, "dy", [1, 4, 4, 12])?;
    let conv = Layer::new(device, 3, &[8], 12)?.conv;
    let outcome = conv2d_backward(&dy, ConvSaved::of(&x), &conv, Activation::None, [true, false], None);
    let message = outcome.map(|_| ()).unwrap_err().to_string();
    assert!(message.contains("multiple of 8 channels"), "{message}");
    Ok(())
}

fn repeats_its_bits(device: &Device) -> Outcome {
    let run = |inputs: usize, outputs: usize| {
        let x = image(device, "x", [1, 130, 70, inputs])?;
        let dy = image(device, "dy", [1, 130, 70, outputs])?;
        let mut layer = Layer::new(device, 3, &[inputs], outputs)?;
        let conv = layer.conv.clone();
        let grads = ConvGrads {
            weight: &mut layer.weight,
            bias: &mut layer.bias,
        };
        let dx = conv2d_backward(
            &dy,
            ConvSaved::of(&x),
            &conv,
            Activation::Silu,
            [true, false],
            Some(grads),
        )?
        .x;
        let gradients = all([dx], layer);
        gradients
            .iter()
            .map(Tensor::to_vec::<half::bf16>)
            .collect::<Result<Vec<_>>>()
    };
    for (inputs, outputs) in [(16, 16), (128, 64)] {
        assert!(run(inputs, outputs)? == run(inputs, outputs)?, "{inputs} to {outputs}");
    }
    Ok(())
}
