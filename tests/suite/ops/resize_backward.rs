use l2p_engine::ops::resize::{resize_nearest, resize_nearest_backward};
use l2p_engine::{DType, Device, Tensor};
use l2p_tests::{BF16_TOLERANCE, Outcome, Suite, expect_close, expect_like_cpu, random_bf16};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::resize_backward::is_the_transpose_of_resize", is_the_transpose);
    suite.cpu("ops::resize_backward::mistakes_are_named", mistakes_are_named);
    suite.cuda("ops::resize_backward::cuda_equals_cpu", cuda_equals_cpu);
}

/// Source and output grid: larger, smaller, the same, by odd factors; one whose quotient's rounding decides.
const GRIDS: [[[usize; 2]; 2]; 8] = [
    [[4, 4], [10, 10]],
    [[9, 7], [4, 3]],
    [[5, 6], [5, 6]],
    [[1, 1], [3, 5]],
    [[3, 8], [1, 1]],
    [[64, 2], [160, 5]],
    [[41, 3], [29, 11]],
    [[13, 97], [31, 53]],
];

/// ⟨resize(x), dy⟩ = ⟨x, resize_backward(dy)⟩, for the unit images x: the gradient's elements one by one.
fn is_the_transpose() -> Outcome {
    let device = Device::Cpu;
    for [[rows, columns], [height, width]] in GRIDS {
        let shape = [2, height, width, 3];
        let dy = Tensor::from_f32(&device, &random_bf16("dy", shape.iter().product()), shape)?;
        let found = resize_nearest_backward(&dy, rows, columns)?;
        // Each source pixel's number is carried along by the resize.
        let numbers: Vec<f32> = (0..2 * rows * columns).map(|index| index as f32).collect();
        let shown = resize_nearest(
            &Tensor::from_slice(&device, &numbers, [2, rows, columns, 1])?,
            height,
            width,
        )?;
        let mut expected = vec![0.0; found.elements()];
        for (number, pixel) in shown.as_slice::<f32>()?.iter().zip(dy.as_slice::<f32>()?.chunks(3)) {
            for (channel, value) in pixel.iter().enumerate() {
                expected[*number as usize * 3 + channel] += value;
            }
        }
        expect_close(
            &format!("{rows}x{columns} to {height}x{width}"),
            found.as_slice()?,
            &expected,
            found.shape(),
            1e-6,
        )?;
    }
    Ok(())
}

fn mistakes_are_named() -> Outcome {
    let dy = Tensor::zeros(&Device::Cpu, [1, 4, 4, 8], DType::F32)?;
    let message = resize_nearest_backward(&dy, 0, 4).unwrap_err().to_string();
    assert_eq!(message, "resize_nearest_backward: there is no resize of 0x4 to 4x4");
    let flat = Tensor::zeros(&Device::Cpu, [4, 4, 8], DType::F32)?;
    let message = resize_nearest_backward(&flat, 4, 4).unwrap_err().to_string();
    assert_eq!(
        message,
        "resize_nearest_backward: dy has shape [4, 4, 8], expected [batch, height, width, channels]"
    );
    Ok(())
}

fn cuda_equals_cpu(device: &Device) -> Outcome {
    for [[rows, columns], [height, width]] in GRIDS {
        for channels in [1, 3, 8, 24, 512] {
            let what = format!("{rows}x{columns} to {height}x{width}, {channels} channels");
            expect_like_cpu(&what, device, BF16_TOLERANCE, |device| {
                let shape = [2, height, width, channels];
                let dy = Tensor::from_f32(device, &random_bf16("dy", shape.iter().product()), shape)?;
                Ok(vec![resize_nearest_backward(&dy, rows, columns)?])
            })?;
        }
    }
    Ok(())
}
