mod cuda;
mod hopper;
mod mistakes;
mod plain;

use l2p_engine::layers::{MemoryParams, ParamSource};
use l2p_engine::ops::conv::{Activation, Conv, conv2d, conv3x3_silu_pool, upsample_conv3x3};
use l2p_engine::{DType, Device, Result, Tensor};
use l2p_tests::fixtures::{Case, Group};
use l2p_tests::{F32_TOLERANCE, Outcome, Suite, expect_close, random, random_bf16};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::conv::cpu_equals_torch", cpu_equals_torch);
    suite.cpu("ops::conv::cpu_pool_equals_torch", cpu_pool_equals_torch);
    suite.cpu("ops::conv::cpu_upsample_equals_torch", cpu_upsample_equals_torch);
    suite.cpu("ops::conv::cpu_two_sources_equal_torch", cpu_two_sources_equal_torch);
    suite.cpu("ops::conv::cpu_equals_plain_loops", cpu_equals_plain_loops);
    suite.cpu(
        "ops::conv::odd_images_are_pooled_to_whole_windows",
        odd_images_are_pooled,
    );
    suite.cpu("ops::conv::mistakes_are_named", mistakes_are_named);
    cuda::register(suite);
    hopper::register(suite);
    mistakes::register(suite);
    plain::register(suite);
}

fn fixture_conv(case: &Case<'_>, channels: &[usize]) -> Result<Conv> {
    let params = MemoryParams(case.weights().into_iter().collect());
    let kernel = params.shape("conv.weight").map_or(0, |shape| shape[2]);
    let outputs = params.shape("conv.bias").map_or(0, |shape| shape[0]);
    let weight = params.load_conv(&Device::Cpu, "conv.weight")?;
    Conv::new(
        weight,
        params.load(&Device::Cpu, "conv.bias", &[outputs])?,
        kernel,
        channels,
    )
}

fn fixture_input(case: &Case<'_>, name: &str) -> Result<Tensor> {
    let (values, shape) = case.input(name);
    Tensor::from_f32(&Device::Cpu, &values, &shape[..])
}

fn cpu_equals_torch() -> Outcome {
    let group = Group::load("ops");
    for case in group.cases("convolution.") {
        let x = fixture_input(&case, "x")?;
        let activation = match case.config(&[])["silu"].as_bool() {
            Some(true) => Activation::Silu,
            _ => Activation::None,
        };
        let y = conv2d(&x, None, &fixture_conv(&case, &[x.dim(3)])?, activation, None)?;
        case.check("y", y.as_slice()?)?;
    }
    Ok(())
}

fn cpu_pool_equals_torch() -> Outcome {
    let group = Group::load("ops");
    for case in group.cases("conv3x3_silu_pool.") {
        let x = fixture_input(&case, "x")?;
        let (full, pooled) = conv3x3_silu_pool(&x, &fixture_conv(&case, &[x.dim(3)])?)?;
        case.check("skip", full.as_slice()?)?;
        case.check("pooled", pooled.as_slice()?)?;
    }
    Ok(())
}

fn cpu_upsample_equals_torch() -> Outcome {
    let group = Group::load("ops");
    for case in group.cases("upsample_conv3x3.") {
        let x = fixture_input(&case, "x")?;
        let y = upsample_conv3x3(&x, &fixture_conv(&case, &[x.dim(3)])?)?;
        case.check("y", y.as_slice()?)?;
    }
    Ok(())
}

fn cpu_two_sources_equal_torch() -> Outcome {
    let group = Group::load("ops");
    for case in group.cases("two_source_conv.") {
        let (a, b) = (fixture_input(&case, "a")?, fixture_input(&case, "b")?);
        let conv = fixture_conv(&case, &[a.dim(3), b.dim(3)])?;
        case.check("y", conv2d(&a, Some(&b), &conv, Activation::Silu, None)?.as_slice()?)?;
    }
    Ok(())
}

/// Two sources, the second on another grid, with a residual, over a batch of images of odd size.
fn cpu_equals_plain_loops() -> Outcome {
    let (batch, height, width, channels, outputs) = (2, 5, 7, [3, 4], 6);
    let (rows, columns) = (2, 3);
    let x = random("x", batch * height * width * channels[0]);
    let second = random("second", batch * rows * columns * channels[1]);
    let residual = random("residual", batch * height * width * outputs);
    let inputs = channels[0] + channels[1];
    let (weight, bias) = (random("w", outputs * 9 * inputs), random("b", outputs));
    let value = |item: usize, y: isize, x_at: isize, channel: usize| -> f64 {
        if y < 0 || x_at < 0 || y >= height as isize || x_at >= width as isize {
            return 0.0;
        }
        let (y, x_at) = (y as usize, x_at as usize);
        if channel < channels[0] {
            return f64::from(x[((item * height + y) * width + x_at) * channels[0] + channel]);
        }
        let (row, column) = (y * rows / height, x_at * columns / width);
        f64::from(second[((item * rows + row) * columns + column) * channels[1] + channel - channels[0]])
    };
    let expected: Vec<f32> = (0..batch * height * width * outputs)
        .map(|index| {
            let (pixel, output) = (index / outputs, index % outputs);
            let (item, y, x_at) = (pixel / (height * width), pixel / width % height, pixel % width);
            let mut sum = f64::from(bias[output]);
            for tap in 0..9 {
                let (dy, dx) = ((tap / 3) as isize - 1, (tap % 3) as isize - 1);
                for channel in 0..inputs {
                    let factor = f64::from(weight[(output * 9 + tap) * inputs + channel]);
                    sum += factor * value(item, y as isize + dy, x_at as isize + dx, channel);
                }
            }
            (sum + f64::from(residual[index])) as f32
        })
        .collect();
    let tensor = |values: &[f32], shape: &[usize]| Tensor::from_f32(&Device::Cpu, values, shape);
    let conv = Conv::new(
        tensor(&weight, &[outputs, 9 * inputs])?,
        tensor(&bias, &[outputs])?,
        3,
        &channels,
    )?;
    let found = conv2d(
        &tensor(&x, &[batch, height, width, channels[0]])?,
        Some(&tensor(&second, &[batch, rows, columns, channels[1]])?),
        &conv,
        Activation::None,
        Some(&tensor(&residual, &[batch, height, width, outputs])?),
    )?;
    expect_close("conv2d", found.as_slice()?, &expected, found.shape(), F32_TOLERANCE)
}

fn odd_images_are_pooled() -> Outcome {
    let device = Device::Cpu;
    for (height, width) in [(1, 1), (3, 5), (4, 3)] {
        let conv = layer(&device, 3, &[8], 8)?;
        let (full, pooled) = conv3x3_silu_pool(&image(&device, "x", [2, height, width, 8])?, &conv)?;
        assert_eq!(pooled.shape().to_vec(), [2, height / 2, width / 2, 8]);
        let (full, pooled) = (full.as_slice::<f32>()?, pooled.as_slice::<f32>()?);
        for (index, &found) in pooled.iter().enumerate() {
            let (pixel, channel) = (index / 8, index % 8);
            let (x, y) = (pixel % (width / 2), pixel / (width / 2) % (height / 2));
            let item = pixel / (width / 2) / (height / 2);
            let at = |dy, dx| full[((item * height + 2 * y + dy) * width + 2 * x + dx) * 8 + channel];
            assert_eq!(found, at(0, 0).max(at(0, 1)).max(at(1, 0)).max(at(1, 1)));
        }
    }
    Ok(())
}

fn mistakes_are_named() -> Outcome {
    let device = Device::Cpu;
    let x = image(&device, "x", [1, 4, 4, 8])?;
    let conv = layer(&device, 3, &[8, 16], 8)?;
    let message = |outcome: Result<Tensor>| outcome.unwrap_err().to_string();
    let plain = |x: &Tensor, second| message(conv2d(x, second, &conv, Activation::None, None));
    assert_eq!(
        plain(&x, None),
        "conv2d: the convolution has two sources, of 8 and 16 channels, but one was given"
    );
    assert_eq!(
        plain(&x, Some(&x)),
        "conv2d: second has shape [1, 4, 4, 8], expected [1, 4, 4, 16]"
    );
    let wide = image(&device, "x", [1, 4, 4, 16])?;
    assert_eq!(
        plain(&wide, Some(&wide)),
        "conv2d: x has shape [1, 4, 4, 16], expected [1, 4, 4, 8]"
    );
    let two = image(&device, "x", [2, 4, 4, 16])?;
    assert_eq!(
        plain(&x, Some(&two)),
        "conv2d: second has shape [2, 4, 4, 16], expected [1, 4, 4, 16]"
    );
    let pointwise = layer(&device, 1, &[8], 8)?;
    assert_eq!(
        message(upsample_conv3x3(&x, &pointwise)),
        "upsample_conv3x3: the kernel is 1x1, expected 3x3"
    );
    let residual = image(&device, "r", [1, 4, 4, 16])?;
    assert_eq!(
        message(conv2d(&x, None, &pointwise, Activation::None, Some(&residual))),
        "conv2d: residual has shape [1, 4, 4, 16], expected [1, 4, 4, 8]"
    );
    let weight = Tensor::zeros(&device, [8, 72], DType::F32)?;
    let bias = Tensor::zeros(&device, [8], DType::F32)?;
    let refused = |kernel, channels: &[usize]| {
        Conv::new(weight.clone(), bias.clone(), kernel, channels)
            .unwrap_err()
            .to_string()
    };
    assert_eq!(refused(5, &[8]), "convolution: a kernel of 5 is neither 1 nor 3");
    assert_eq!(
        refused(3, &[16]),
        "convolution: weight has shape [8, 72], expected [8, 144]"
    );
    assert_eq!(
        refused(3, &[]),
        "convolution: sources of [] channels; expected one or two, none empty"
    );
    Ok(())
}

fn image(device: &Device, name: &str, shape: [usize; 4]) -> Result<Tensor> {
    Tensor::from_f32(device, &random_bf16(name, shape.iter().product()), shape)
}

/// A convolution of random weights that keep the size of their input.
fn layer(device: &Device, kernel: usize, channels: &[usize], outputs: usize) -> Result<Conv> {
    let depth = kernel * kernel * channels.iter().sum::<usize>();
    let weight: Vec<f32> = random("w", outputs * depth)
        .into_iter()
        .map(|value| half::bf16::from_f32(value / (depth as f32).sqrt()).to_f32())
        .collect();
    Conv::new(
        Tensor::from_f32(device, &weight, [outputs, depth])?,
        Tensor::from_f32(device, &random_bf16("b", outputs), [outputs])?,
        kernel,
        channels,
    )
}
