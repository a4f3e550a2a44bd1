use l2p_engine::ops::conv::{Canvas, Conv};
use l2p_engine::ops::detail_stage::{DetailStage, detail_stage};
use l2p_engine::{DType, Device, Result, Tensor};
use l2p_tests::{Outcome, Suite, expect_like_cpu, random, random_bf16};

use super::loops::{Loops, exact, expect_exact, silu};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::detail_stage::cpu_equals_plain_loops", cpu_equals_plain_loops);
    suite.cpu("ops::detail_stage::mistakes_are_named", mistakes_are_named);
    suite.cuda("ops::detail_stage::cuda_equals_cpu", cuda_equals_cpu);
    suite.cuda("ops::detail_stage::cuda_repeats_its_bits", cuda_repeats_its_bits);
}

/// What is kept in bf16 on the way: upsampled, encoded and decoded channels.
const TOLERANCE: f64 = 6e-3;

fn layer(device: &Device, name: &str, kernel: usize, channels: &[usize], outputs: usize) -> Result<Conv> {
    let inputs = kernel * kernel * channels.iter().sum::<usize>();
    let scale = 1.0 / (inputs as f32).sqrt();
    let rounded = |values: Vec<f32>| -> Vec<f32> {
        let scaled = values
            .into_iter()
            .map(|value| half::bf16::from_f32(value * scale).to_f32());
        scaled.collect()
    };
    let weight = rounded(random(&format!("{name}.weight"), outputs * inputs));
    let bias = rounded(random(&format!("{name}.bias"), outputs));
    Conv::new(
        Tensor::from_f32(device, &weight, [outputs, inputs])?,
        Tensor::from_f32(device, &bias, [outputs])?,
        kernel,
        channels,
    )
}

/// Encoder, up, decoder and output.
fn layers(device: &Device) -> Result<[Conv; 4]> {
    Ok([
        layer(device, "encoder", 3, &[3], 16)?,
        layer(device, "up", 3, &[16], 16)?,
        layer(device, "decoder", 3, &[16, 16], 16)?,
        layer(device, "output", 1, &[16], 3)?,
    ])
}

fn stage([encoder, up, decoder, output]: &[Conv; 4]) -> DetailStage<'_> {
    DetailStage {
        encoder,
        up,
        decoder,
        output,
    }
}

fn run(layers: &[Conv; 4], map: &Tensor, image: &Tensor, canvas: Canvas<'_>) -> Result<()> {
    let stage = stage(layers);
    detail_stage(&stage, &stage.arrange()?, map, image, canvas)
}

fn image(device: &Device, name: &str, shape: [usize; 4]) -> Result<Tensor> {
    Tensor::from_f32(device, &random_bf16(name, shape.iter().product()), shape)
}

fn cpu_equals_plain_loops() -> Outcome {
    let cpu = &Device::Cpu;
    let layers = layers(cpu)?;
    for [batch, height, width] in [[1, 2, 2], [2, 6, 10], [1, 16, 4]] {
        let grid = [batch, height, width];
        let what = format!("{batch}x{height}x{width}");
        let map = image(cpu, "map", [batch, height / 2, width / 2, 16])?;
        let picture = image(cpu, "image", [batch, height, width, 3])?;
        let before = image(cpu, "canvas", [batch, height, width, 3])?;

        let sums = |conv: &Conv, sources: [(Vec<f64>, [usize; 3]); 2]| -> Result<Vec<f64>> {
            let [(first, of_first), (second, of_second)] = sources;
            let loops = Loops {
                kernel: conv.kernel(),
                grid,
                outputs: conv.outputs(),
                sources: [of_first, of_second][..conv.channels().iter().filter(|count| **count > 0).count()].to_vec(),
            };
            Ok(loops.sums(&[first, second, exact(conv.weight())?, exact(conv.bias())?]))
        };
        let nothing = || (Vec::new(), [0; 3]);
        let [encoder, up, decoder, output] = &layers;
        let encoded = sums(encoder, [(exact(&picture)?, [height, width, 3]), nothing()])?;
        let encoded = encoded.into_iter().map(silu).collect();
        let upsampled = sums(up, [(exact(&map)?, [height / 2, width / 2, 16]), nothing()])?;
        let whole = [height, width, 16];
        let decoded = sums(decoder, [(upsampled, whole), (encoded, whole)])?;
        let decoded = decoded.into_iter().map(silu).collect();
        let result = sums(output, [(decoded, whole), nothing()])?;

        let mut written = Tensor::empty(cpu, picture.shape(), DType::F32)?;
        let mut added = before.clone().into_unshared()?;
        let factors = Tensor::from_slice(cpu, &[0.625f32, -0.75], [2])?;
        for (target, factors) in [(&mut written, None), (&mut added, Some(&factors))] {
            let canvas = Canvas {
                picture: target,
                scale: -1.5,
                factors,
            };
            run(&layers, &map, &picture, canvas)?;
        }
        let expected: Vec<f64> = result.iter().map(|value| -1.5 * value).collect();
        expect_exact(&format!("{what}, written"), &written, &expected)?;
        let expected = exact(&before)?.into_iter().zip(&expected);
        let expected: Vec<f64> = expected.map(|(before, value)| 0.625 * before - 0.75 * value).collect();
        expect_exact(&format!("{what}, added"), &added, &expected)?;
    }
    Ok(())
}

/// One window, a tile and less, one row and column more, several tiles with a rest, two items.
fn cuda_equals_cpu(device: &Device) -> Outcome {
    for [batch, height, width] in [
        [1, 2, 2],
        [1, 14, 62],
        [1, 8, 34],
        [1, 16, 64],
        [2, 30, 130],
        [1, 60, 6],
        [1, 2, 190],
        [1, 64, 256],
    ] {
        let what = format!("{batch}x{height}x{width}");
        expect_like_cpu(&what, device, TOLERANCE, |device| {
            let layers = layers(device)?;
            let map = image(device, "map", [batch, height / 2, width / 2, 16])?;
            let shape = [batch, height, width, 3];
            let picture = image(device, "image", shape)?;
            let mut written = Tensor::empty(device, shape, DType::F32)?;
            let mut added = Tensor::from_slice(device, &random_bf16("canvas", shape.iter().product()), shape)?;
            let factors = Tensor::from_slice(device, &[0.625f32, -0.75], [2])?;
            for (target, factors) in [(&mut written, None), (&mut added, Some(&factors))] {
                let canvas = Canvas {
                    picture: target,
                    scale: -1.5,
                    factors,
                };
                run(&layers, &map, &picture, canvas)?;
            }
            Ok(vec![written, added])
        })?;
    }
    Ok(())
}

fn cuda_repeats_its_bits(device: &Device) -> Outcome {
    let layers = layers(device)?;
    let (map, picture) = (
        image(device, "map", [1, 50, 80, 16])?,
        image(device, "image", [1, 100, 160, 3])?,
    );
    let draw = || {
        let mut written = Tensor::empty(device, picture.shape(), DType::F32)?;
        let canvas = Canvas {
            picture: &mut written,
            scale: 1.0,
            factors: None,
        };
        run(&layers, &map, &picture, canvas)?;
        written.to_vec::<f32>()
    };
    assert!(draw()? == draw()?);
    Ok(())
}

fn mistakes_are_named() -> Outcome {
    let cpu = &Device::Cpu;
    let [_, up, decoder, output] = layers(cpu)?;
    let wide = layer(cpu, "encoder", 3, &[3], 24)?;
    let message = stage(&[wide, up, decoder, output]).arrange().unwrap_err().to_string();
    assert!(message.contains("([3, 0], 24)"), "{message}");

    let attempt = |map: [usize; 4], picture: [usize; 4]| {
        let mut target = Tensor::empty(cpu, picture, DType::F32)?;
        let canvas = Canvas {
            picture: &mut target,
            scale: 1.0,
            factors: None,
        };
        run(
            &layers(cpu)?,
            &image(cpu, "map", map)?,
            &image(cpu, "image", picture)?,
            canvas,
        )
    };
    let message = attempt([1, 2, 2, 16], [1, 5, 4, 3]).unwrap_err().to_string();
    assert!(message.contains("both sides must be even"), "{message}");
    let message = attempt([1, 2, 3, 16], [1, 4, 4, 3]).unwrap_err().to_string();
    assert!(
        message.contains("map") && message.contains("[1, 2, 2, 16]"),
        "{message}"
    );
    Ok(())
}
