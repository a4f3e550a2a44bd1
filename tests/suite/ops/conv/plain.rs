//! Every kind of convolution on the CPU against plain loops in f64.

use l2p_engine::ops::conv::{
    Activation, Canvas, Conv, conv2d, conv2d_f32, conv3x3_silu_picture, conv3x3_silu_pool, conv3x3_silu_pooled,
    upsample_conv3x3,
};
use l2p_engine::{DType, Device, Result, Tensor};
use l2p_tests::{Outcome, Suite};

use super::super::loops::{Loops, exact, expect_exact, maxima, silu};
use super::{image, layer};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::conv::cpu_results_equal_plain_loops", results_equal_plain_loops);
    suite.cpu("ops::conv::cpu_pools_equal_plain_loops", pools_equal_plain_loops);
    suite.cpu(
        "ops::conv::cpu_upsample_equals_plain_loops",
        upsample_equals_plain_loops,
    );
    suite.cpu("ops::conv::cpu_pictures_equal_plain_loops", pictures_equal_plain_loops);
    suite.cpu("ops::conv::cpu_bands_equal_plain_loops", bands_equal_plain_loops);
}

const CPU: Device = Device::Cpu;

/// Batch, height and width.
const GRIDS: [[usize; 3]; 4] = [[1, 1, 1], [2, 5, 7], [1, 2, 6], [3, 4, 1]];

/// The sums of a convolution of these sources on a grid.
fn sums(grid: [usize; 3], sources: &[&Tensor], conv: &Conv) -> Result<Vec<f64>> {
    let loops = Loops {
        kernel: conv.kernel(),
        grid,
        outputs: conv.outputs(),
        sources: sources
            .iter()
            .map(|source| [source.dim(1), source.dim(2), source.dim(3)])
            .collect(),
    };
    let values = |index: usize| sources.get(index).map_or(Ok(Vec::new()), |source| exact(source));
    Ok(loops.sums(&[values(0)?, values(1)?, exact(conv.weight())?, exact(conv.bias())?]))
}

/// One source and two, without and with an activation and a residual, in the compute type and in f32 with a factor.
fn results_equal_plain_loops() -> Outcome {
    for (kernel, [batch, height, width]) in [1, 3].into_iter().flat_map(|kernel| GRIDS.map(|grid| (kernel, grid))) {
        let grid = [batch, height, width];
        let x = image(&CPU, "x", [batch, height, width, 5])?;
        let second = image(&CPU, "second", [batch, height, width, 2])?;
        let residual = image(&CPU, "residual", [batch, height, width, 4])?;
        for (second, channels) in [(None, &[5][..]), (Some(&second), &[5, 2])] {
            let what = format!("{kernel}x{kernel} {grid:?} {channels:?}");
            let conv = layer(&CPU, kernel, channels, 4)?;
            let sources: Vec<&Tensor> = [Some(&x), second].into_iter().flatten().collect();
            let sums = sums(grid, &sources, &conv)?;
            let activated: Vec<f64> = sums.iter().copied().map(silu).collect();
            let plus = |values: &[f64]| -> Result<Vec<f64>> {
                let residual = exact(&residual)?;
                Ok(values
                    .iter()
                    .zip(residual)
                    .map(|(value, residual)| value + residual)
                    .collect())
            };
            for (activation, residual, expected) in [
                (Activation::None, None, &sums),
                (Activation::Silu, None, &activated),
                (Activation::None, Some(&residual), &plus(&sums)?),
                (Activation::Silu, Some(&residual), &plus(&activated)?),
            ] {
                let found = conv2d(&x, second, &conv, activation, residual)?;
                let what = format!("{what}, {activation:?}, residual: {}", residual.is_some());
                expect_exact(&what, &found, expected)?;
            }
            if second.is_none() {
                let scaled: Vec<f64> = sums.iter().map(|sum| -0.75 * sum).collect();
                expect_exact(&format!("{what}, f32"), &conv2d_f32(&x, &conv, -0.75)?, &scaled)?;
            }
        }
    }
    Ok(())
}

fn pools_equal_plain_loops() -> Outcome {
    for grid in GRIDS {
        let [batch, height, width] = grid;
        let x = image(&CPU, "x", [batch, height, width, 5])?;
        let conv = layer(&CPU, 3, &[5], 4)?;
        let full: Vec<f64> = sums(grid, &[&x], &conv)?.into_iter().map(silu).collect();
        let expected = maxima(grid, 4, &full);
        let (found, pooled) = conv3x3_silu_pool(&x, &conv)?;
        expect_exact(&format!("{grid:?}"), &found, &full)?;
        for pooled in [pooled, conv3x3_silu_pooled(&x, &conv)?] {
            assert_eq!(pooled.shape().to_vec(), [batch, height / 2, width / 2, 4]);
            expect_exact(&format!("{grid:?}, maxima"), &pooled, &expected)?;
        }
    }
    Ok(())
}

fn upsample_equals_plain_loops() -> Outcome {
    for [batch, height, width] in GRIDS {
        let grid = [batch, 2 * height, 2 * width];
        let x = image(&CPU, "x", [batch, height, width, 5])?;
        let conv = layer(&CPU, 3, &[5], 4)?;
        let found = upsample_conv3x3(&x, &conv)?;
        assert_eq!(found.shape().to_vec(), [batch, 2 * height, 2 * width, 4]);
        expect_exact(&format!("{grid:?}"), &found, &sums(grid, &[&x], &conv)?)?;
    }
    Ok(())
}

/// A picture written, and one added to.
fn pictures_equal_plain_loops() -> Outcome {
    for grid in GRIDS {
        let [batch, height, width] = grid;
        let x = image(&CPU, "x", [batch, height, width, 5])?;
        let second = image(&CPU, "second", [batch, height, width, 2])?;
        let (conv, to_picture) = (layer(&CPU, 3, &[5, 2], 4)?, layer(&CPU, 1, &[4], 3)?);
        let activated: Vec<f32> = sums(grid, &[&x, &second], &conv)?
            .into_iter()
            .map(|sum| silu(sum) as f32)
            .collect();
        let activated = Tensor::from_slice(&CPU, &activated, [batch, height, width, 4])?;
        let colours = sums(grid, &[&activated], &to_picture)?;

        let before = image(&CPU, "picture", [batch, height, width, 3])?;
        let mut written = Tensor::empty(&CPU, before.shape(), DType::F32)?;
        let mut added = before.clone().into_unshared()?;
        let factors = Tensor::from_slice(&CPU, &[0.625f32, -0.75], [2])?;
        for (picture, factors) in [(&mut written, None), (&mut added, Some(&factors))] {
            let canvas = Canvas {
                picture,
                scale: -1.5,
                factors,
            };
            conv3x3_silu_picture(&x, Some(&second), &conv, &to_picture, canvas)?;
        }
        let scaled: Vec<f64> = colours.iter().map(|colour| -1.5 * colour).collect();
        expect_exact(&format!("{grid:?}, written"), &written, &scaled)?;
        let moved = exact(&before)?.into_iter().zip(&scaled);
        let moved: Vec<f64> = moved.map(|(before, scaled)| 0.625 * before - 0.75 * scaled).collect();
        expect_exact(&format!("{grid:?}, added"), &added, &moved)?;
    }
    Ok(())
}

/// So many neighbourhoods that they are laid out in several bands, the last of them shorter and across two items.
fn bands_equal_plain_loops() -> Outcome {
    let grid = [2, 48, 40];
    let x = image(&CPU, "x", [2, 48, 40, 140])?;
    let conv = layer(&CPU, 3, &[140], 2)?;
    let found = conv2d(&x, None, &conv, Activation::None, None)?;
    expect_exact("bands", &found, &sums(grid, &[&x], &conv)?)
}
