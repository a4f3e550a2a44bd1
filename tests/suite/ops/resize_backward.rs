use l2p_engine::ops::resize::resize_nearest_backward;
use l2p_engine::{DType, Device, Tensor};
use l2p_tests::{BF16_TOLERANCE, Outcome, Suite, expect_like_cpu, random_bf16};

use super::loops::{exact, expect_exact, pixels};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::resize_backward::cpu_equals_plain_loops", cpu_equals_plain_loops);
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

/// The source index that stands at `index` of the output: quotient and product are rounded to f32, as in PyTorch.
fn source_of(index: usize, source: usize, output: usize) -> usize {
    let ratio = source as f32 / output as f32;
    ((index as f32 * ratio) as usize).min(source - 1)
}

/// Every pixel of the gradient is added to the source pixel that it was taken from.
fn cpu_equals_plain_loops() -> Outcome {
    for [[rows, columns], [height, width]] in GRIDS {
        let shape = [2, height, width, 3];
        let dy = Tensor::from_f32(&Device::Cpu, &random_bf16("dy", shape.iter().product()), shape)?;
        let found = resize_nearest_backward(&dy, rows, columns)?;
        assert_eq!(found.shape().to_vec(), [2, rows, columns, 3]);
        let mut expected = vec![0.0; found.elements()];
        for ((item, y, x), pixel) in pixels([2, height, width]).zip(exact(&dy)?.chunks(3)) {
            let (row, column) = (source_of(y, rows, height), source_of(x, columns, width));
            let to = &mut expected[((item * rows + row) * columns + column) * 3..][..3];
            to.iter_mut().zip(pixel).for_each(|(sum, value)| *sum += value);
        }
        expect_exact(&format!("{rows}x{columns} to {height}x{width}"), &found, &expected)?;
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
