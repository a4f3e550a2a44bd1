use l2p_engine::ops::conv::{Activation, Conv, conv2d};
use l2p_engine::ops::downsample_conv::downsample_conv3x3;
use l2p_engine::{Device, Result, Tensor};
use l2p_tests::{BF16_TOLERANCE, F32_TOLERANCE, Outcome, Suite, expect_close, expect_like_cpu, random_bf16};

pub fn register(suite: &mut Suite) {
    suite.cpu(
        "ops::downsample_conv::cpu_equals_every_second_of_all",
        cpu_equals_every_second_of_all,
    );
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

/// The padding on the right and below puts the kernel's centre on odd rows and columns, where a convolution of stride 1 with
/// padding all around gives the same.
fn cpu_equals_every_second_of_all() -> Outcome {
    for shape in SHAPES {
        let [batch, height, width, inputs, outputs] = shape;
        let Operands { x, weight, bias } = operands(&Device::Cpu, shape)?;
        let found = downsample_conv3x3(&x, &weight, &bias)?;
        assert_eq!(found.shape().to_vec(), [batch, height / 2, width / 2, outputs]);
        let conv = Conv::new(weight, bias, 3, &[inputs])?;
        let all = conv2d(&x, None, &conv, Activation::None, None)?.to_vec::<f32>()?;
        let expected: Vec<f32> = (0..batch * height * width)
            .filter(|pixel| pixel % width % 2 == 1 && pixel / width % height % 2 == 1)
            .flat_map(|pixel| all[pixel * outputs..(pixel + 1) * outputs].to_vec())
            .collect();
        expect_close(
            &format!("{shape:?}"),
            &found.to_vec::<f32>()?,
            &expected,
            found.shape(),
            F32_TOLERANCE,
        )?;
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
