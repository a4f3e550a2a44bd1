//! Gradients against central differences of plain loops in f64.

use l2p_engine::ops::conv::{
    Activation, ConvSaved, conv2d_backward, conv2d_f32_backward, conv3x3_silu_pool, conv3x3_silu_pool_backward,
    upsample_conv3x3_backward,
};
use l2p_engine::{Device, Shape, Tensor};
use l2p_tests::{Outcome, Suite, expect_close, random_bf16};

use super::super::loops::{Loops, maxima, pixels, silu};
use super::{Layer, image};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::conv_backward::cpu_equals_differences", || {
        equals_differences(false)
    });
    suite.cpu("ops::conv_backward::cpu_pool_equals_differences", || {
        equals_differences(true)
    });
    suite.cpu(
        "ops::conv_backward::cpu_upsample_equals_differences",
        upsample_equals_differences,
    );
    suite.cpu("ops::conv_backward::cpu_f32_equals_differences", f32_equals_differences);
    suite.cpu(
        "ops::conv_backward::cpu_bands_equal_plain_loops",
        bands_equal_plain_loops,
    );
}

impl Loops {
    /// The shape of one of the four arguments; of no elements for a source that there is not.
    fn shape_of(&self, argument: usize) -> Shape {
        let inputs: usize = self.sources.iter().map(|[_, _, channels]| channels).sum();
        match (argument, self.sources.get(argument)) {
            (0 | 1, Some(&[height, width, channels])) => [self.grid[0], height, width, channels].into(),
            (0 | 1, None) => [0].into(),
            (2, _) => [self.outputs, self.kernel * self.kernel, inputs].into(),
            _ => [self.outputs].into(),
        }
    }

    /// The gradients of a function of the four arguments, each in its own order.
    fn differences(&self, arguments: &[Vec<f32>; 4], loss: impl Fn(Vec<f64>) -> f64) -> [Vec<f32>; 4] {
        const STEP: f64 = 1e-5;
        let mut exact: [Vec<f64>; 4] =
            std::array::from_fn(|index| arguments[index].iter().copied().map(f64::from).collect());
        std::array::from_fn(|argument| {
            (0..exact[argument].len())
                .map(|index| {
                    let value = exact[argument][index];
                    let [above, below] = [value + STEP, value - STEP].map(|moved| {
                        exact[argument][index] = moved;
                        loss(self.sums(&exact))
                    });
                    exact[argument][index] = value;
                    ((above - below) / (2.0 * STEP)) as f32
                })
                .collect()
        })
    }
}

fn weighted(values: impl IntoIterator<Item = f64>, factors: &[f32]) -> f64 {
    values
        .into_iter()
        .zip(factors)
        .map(|(value, factor)| value * f64::from(*factor))
        .sum()
}

/// What the gradients hold beyond what was there before.
fn added(now: &Tensor, before: &Tensor) -> l2p_engine::Result<Vec<f32>> {
    let (now, before) = (now.as_slice::<f32>()?, before.as_slice::<f32>()?);
    Ok(now.iter().zip(before).map(|(now, before)| now - before).collect())
}

const TOLERANCE: f64 = 2e-5;

fn equals_differences(pool: bool) -> Outcome {
    let device = Device::Cpu;
    // Kernel, result's grid, outputs, channels of the sources, grid of the second.
    for (kernel, grid, outputs, channels, second) in [
        (3, [2, 5, 4], 3, [3, 0], [0, 0]),
        (3, [1, 6, 6], 2, [2, 0], [0, 0]),
        (1, [1, 4, 6], 3, [2, 3], [2, 3]),
        (3, [1, 6, 4], 2, [3, 2], [3, 2]),
        (3, [1, 3, 3], 2, [1, 2], [5, 7]),
        (1, [2, 1, 1], 2, [3, 0], [0, 0]),
    ] {
        if pool && (kernel == 1 || channels[1] > 0) {
            continue;
        }
        let sources: Vec<[usize; 3]> = match channels[1] {
            0 => vec![[grid[1], grid[2], channels[0]]],
            _ => vec![[grid[1], grid[2], channels[0]], [second[0], second[1], channels[1]]],
        };
        let what = format!("{kernel}x{kernel} {grid:?} {sources:?} to {outputs}");
        let shape = |[height, width, channels]: [usize; 3]| [grid[0], height, width, channels];
        let x = image(&device, "x", shape(sources[0]))?;
        let second = match sources.get(1) {
            Some(&source) => Some(image(&device, "second", shape(source))?),
            None => None,
        };
        let used: Vec<usize> = sources.iter().map(|source| source[2]).collect();
        let (mut layer, untouched) = (
            Layer::new(&device, kernel, &used, outputs)?,
            Layer::new(&device, kernel, &used, outputs)?,
        );
        let conv = layer.conv.clone();
        let dy = image(&device, "dy", [grid[0], grid[1], grid[2], outputs])?;
        let d_pooled = image(&device, "d_pooled", [grid[0], grid[1] / 2, grid[2] / 2, outputs])?;

        let saved = ConvSaved {
            second: second.as_ref(),
            ..ConvSaved::of(&x)
        };
        let (dx, d_second) = if pool {
            let (full, _) = conv3x3_silu_pool(&x, &conv)?;
            (
                conv3x3_silu_pool_backward([&dy, &d_pooled], &full, saved, &conv, true, layer.grads())?,
                None,
            )
        } else {
            let want = [true, second.is_some()];
            let grads = conv2d_backward(&dy, saved, &conv, Activation::Silu, want, layer.grads())?;
            (grads.x, grads.second)
        };

        let loops = Loops {
            kernel,
            grid,
            outputs,
            sources,
        };
        let arguments = [
            x.to_vec()?,
            second.as_ref().map_or(Ok(Vec::new()), Tensor::to_vec)?,
            conv.weight().to_vec()?,
            conv.bias().to_vec()?,
        ];
        let (dy, d_pooled) = (dy.as_slice::<f32>()?, d_pooled.as_slice::<f32>()?);
        let expected = loops.differences(&arguments, |sums| {
            let full: Vec<f64> = sums.into_iter().map(silu).collect();
            let of_maxima = if pool {
                weighted(maxima(grid, outputs, &full), d_pooled)
            } else {
                0.0
            };
            weighted(full, dy) + of_maxima
        });
        let found = [
            dx.map_or(Ok(Vec::new()), |dx| dx.to_vec())?,
            d_second.map_or(Ok(Vec::new()), |gradient| gradient.to_vec())?,
            added(&layer.weight, &untouched.weight)?,
            added(&layer.bias, &untouched.bias)?,
        ];
        compare(&what, &loops, found, expected)?;
    }
    Ok(())
}

fn compare(what: &str, loops: &Loops, found: [Vec<f32>; 4], expected: [Vec<f32>; 4]) -> Outcome {
    for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
        let name = ["x", "second", "weight", "bias"][index];
        let shape = loops.shape_of(index);
        expect_close(&format!("{what}, {name}"), found, expected, shape, TOLERANCE)?;
    }
    Ok(())
}

fn upsample_equals_differences() -> Outcome {
    let device = Device::Cpu;
    for ([batch, height, width], channels, outputs) in [([2, 3, 2], 2, 3), ([1, 1, 1], 3, 2), ([1, 4, 5], 1, 1)] {
        let x = image(&device, "x", [batch, height, width, channels])?;
        let (mut layer, untouched) = (
            Layer::new(&device, 3, &[channels], outputs)?,
            Layer::new(&device, 3, &[channels], outputs)?,
        );
        let conv = layer.conv.clone();
        let dy = image(&device, "dy", [batch, 2 * height, 2 * width, outputs])?;
        let dx = upsample_conv3x3_backward(&dy, &x, &conv, true, layer.grads())?;
        let loops = Loops {
            kernel: 3,
            grid: [batch, 2 * height, 2 * width],
            outputs,
            sources: vec![[height, width, channels]],
        };
        let arguments = [x.to_vec()?, Vec::new(), conv.weight().to_vec()?, conv.bias().to_vec()?];
        let dy = dy.as_slice::<f32>()?;
        let expected = loops.differences(&arguments, |sums| weighted(sums, dy));
        let found = [
            dx.map_or(Ok(Vec::new()), |dx| dx.to_vec())?,
            Vec::new(),
            added(&layer.weight, &untouched.weight)?,
            added(&layer.bias, &untouched.bias)?,
        ];
        compare(&format!("{batch}x{height}x{width}"), &loops, found, expected)?;
    }
    Ok(())
}

fn f32_equals_differences() -> Outcome {
    let device = Device::Cpu;
    let scale = -0.75;
    for (kernel, grid) in [(1, [2, 3, 4]), (3, [1, 4, 5])] {
        let x = image(&device, "x", [grid[0], grid[1], grid[2], 4])?;
        let (mut layer, untouched) = (
            Layer::new(&device, kernel, &[4], 3)?,
            Layer::new(&device, kernel, &[4], 3)?,
        );
        let conv = layer.conv.clone();
        let shape = [grid[0], grid[1], grid[2], 3];
        let dy = Tensor::from_slice(&device, &random_bf16("dy", shape.iter().product()), shape)?;
        let dx = conv2d_f32_backward(&dy, &x, &conv, scale, true, layer.grads())?;
        let loops = Loops {
            kernel,
            grid,
            outputs: 3,
            sources: vec![[grid[1], grid[2], 4]],
        };
        let arguments = [x.to_vec()?, Vec::new(), conv.weight().to_vec()?, conv.bias().to_vec()?];
        let dy = dy.as_slice::<f32>()?;
        let expected = loops.differences(&arguments, |sums| f64::from(scale) * weighted(sums, dy));
        let found = [
            dx.map_or(Ok(Vec::new()), |dx| dx.to_vec())?,
            Vec::new(),
            added(&layer.weight, &untouched.weight)?,
            added(&layer.bias, &untouched.bias)?,
        ];
        compare(&format!("{kernel}x{kernel}"), &loops, found, expected)?;
    }
    Ok(())
}

/// So many neighbourhoods that they are laid out in several bands, the last of them shorter and across two items; too many for
/// differences.
fn bands_equal_plain_loops() -> Outcome {
    let device = Device::Cpu;
    let ([batch, height, width], channels, outputs) = ([2, 48, 40], 140, 2);
    let x = image(&device, "x", [batch, height, width, channels])?;
    let dy = image(&device, "dy", [batch, height, width, outputs])?;
    let (mut layer, untouched) = (
        Layer::new(&device, 3, &[channels], outputs)?,
        Layer::new(&device, 3, &[channels], outputs)?,
    );
    let conv = layer.conv.clone();
    conv2d_backward(
        &dy,
        ConvSaved::of(&x),
        &conv,
        Activation::None,
        [false, false],
        layer.grads(),
    )?;
    let (source, slopes) = (x.as_slice::<f32>()?, dy.as_slice::<f32>()?);
    let mut expected = vec![0.0f64; outputs * 9 * channels];
    for (item, y, x_at) in pixels([batch, height, width]) {
        let slopes = &slopes[((item * height + y) * width + x_at) * outputs..][..outputs];
        for tap in 0..9 {
            let (row, column) = (y + tap / 3, x_at + tap % 3);
            if row == 0 || column == 0 || row > height || column > width {
                continue;
            }
            let pixel = &source[((item * height + row - 1) * width + column - 1) * channels..][..channels];
            for (output, slope) in slopes.iter().enumerate() {
                let sums = &mut expected[(output * 9 + tap) * channels..][..channels];
                let terms = sums.iter_mut().zip(pixel);
                terms.for_each(|(sum, value)| *sum += f64::from(*slope) * f64::from(*value));
            }
        }
    }
    let expected: Vec<f32> = expected.into_iter().map(|sum| sum as f32).collect();
    let found = added(&layer.weight, &untouched.weight)?;
    expect_close("bands", &found, &expected, [outputs, 9, channels], TOLERANCE)
}
