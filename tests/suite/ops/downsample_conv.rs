use l2p_engine::ops::downsample_conv::downsample_conv3x3;
use l2p_engine::{Device, Result, Tensor};
use l2p_tests::{BF16_TOLERANCE, Outcome, Suite, expect_like_cpu, random_bf16};

use super::loops::{exact, expect_exact, pixels};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::downsample_conv::cpu_equals_plain_loops", cpu_equals_plain_loops);
    suite.cpu("ops::downsample_conv::mistakes_are_named", mistakes_are_named);
    suite.cuda("ops::downsample_conv::cuda_equals_cpu", cuda_equals_cpu);
}

/// `[batch, height, width, inputs, outputs]`
const SHAPES: [[usize; 5]; 5] = [
    [1, 2, 2, 8, 8],
    [1, 8, 6, 16, 24],
    [2, 7, 9, 8, 16],
    [3, 16, 10, 64, 64],
    [1, 33, 40, 128, 128],
];

struct Operands {
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
}

fn operands(device: &Device, [batch, height, width, inputs, outputs]: [usize; 5]) -> Result<Operands> {
    let tensor =
        |name: &str, shape: &[usize]| Tensor::from_f32(device, &random_bf16(name, shape.iter().product()), shape);
    Ok(Operands {
        x: tensor("x", &[batch, height, width, inputs])?,
        weight: tensor("weight", &[outputs, 9 * inputs])?,
        bias: tensor("bias", &[outputs])?,
    })
}

fn cpu_equals_plain_loops() -> Outcome {
    for shape in SHAPES {
        let [batch, height, width, inputs, outputs] = shape;
        let Operands { x, weight, bias } = operands(&Device::Cpu, shape)?;
        let found = downsample_conv3x3(&x, &weight, &bias)?;
        assert_eq!(found.shape().to_vec(), [batch, height / 2, width / 2, outputs]);
        let (x, weight, bias) = (exact(&x)?, exact(&weight)?, exact(&bias)?);
        let mut expected = Vec::new();
        for (item, row, column) in pixels([batch, height / 2, width / 2]) {
            for output in 0..outputs {
                let mut sum = bias[output];
                for (a, b) in (0..3).flat_map(|a| (0..3).map(move |b| (a, b))) {
                    let (y, x_at) = (2 * row + a, 2 * column + b);
                    // Beyond the image there are zeros.
                    if y < height && x_at < width {
                        for input in 0..inputs {
                            let factor = weight[((output * 3 + a) * 3 + b) * inputs + input];
                            sum += factor * x[((item * height + y) * width + x_at) * inputs + input];
                        }
                    }
                }
                expected.push(sum);
            }
        }
        expect_exact(&format!("{shape:?}"), &found, &expected)?;
    }
    Ok(())
}

fn mistakes_are_named() -> Outcome {
    let Operands { x, weight, bias } = operands(&Device::Cpu, [1, 4, 4, 8, 8])?;
    let narrow = Tensor::from_f32(&Device::Cpu, &[0.0; 8 * 64], [8, 64])?;
    assert_eq!(
        downsample_conv3x3(&x, &narrow, &bias).unwrap_err().to_string(),
        "downsample_conv3x3: weight has shape [8, 64], expected [8, 72]"
    );
    let line = x.reshape([1, 1, 16, 8])?;
    assert_eq!(
        downsample_conv3x3(&line, &weight, &bias).unwrap_err().to_string(),
        "downsample_conv3x3: an image of 16x1 cannot be halved"
    );
    Ok(())
}

fn cuda_equals_cpu(device: &Device) -> Outcome {
    for shape in SHAPES {
        expect_like_cpu(&format!("{shape:?}"), device, BF16_TOLERANCE, |device| {
            let Operands { x, weight, bias } = operands(device, shape)?;
            Ok(vec![downsample_conv3x3(&x, &weight, &bias)?])
        })?;
    }
    Ok(())
}
