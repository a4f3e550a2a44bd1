use l2p_engine::ops::resize::resize_nearest;
use l2p_engine::{DType, Device, Tensor};
use l2p_tests::fixtures::Group;
use l2p_tests::{Outcome, Suite, expect_like_cpu, random, random_bf16};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::resize::cpu_equals_torch", cpu_equals_torch);
    suite.cpu("ops::resize::empty_images_are_refused", empty_images_are_refused);
    suite.cuda("ops::resize::cuda_equals_cpu", cuda_equals_cpu);
}

fn cpu_equals_torch() -> Outcome {
    let group = Group::load("ops");
    for case in group.cases("resize_nearest.") {
        let (values, shape) = case.input("x");
        let size = case.sizes(&["size"]);
        let x = Tensor::from_f32(&Device::Cpu, &values, &shape[..])?;
        case.check("y", resize_nearest(&x, size[0], size[1])?.as_slice()?)?;
    }
    Ok(())
}

fn empty_images_are_refused() -> Outcome {
    let x = Tensor::zeros(&Device::Cpu, [1, 0, 4, 8], DType::F32)?;
    let message = resize_nearest(&x, 2, 2).unwrap_err().to_string();
    assert_eq!(message, "resize_nearest: cannot resize 0x4 to 2x2");
    Ok(())
}

fn cuda_equals_cpu(device: &Device) -> Outcome {
    for [batch, height, width, channels] in [
        [1, 64, 64, 16],
        [2, 5, 7, 3],
        [1, 64, 3, 2],
        [3, 1, 1, 8],
        [1, 9, 300, 24],
    ] {
        for (rows, columns) in [(height, width), (160, 5), (82, 123), (1, 1), (3 * height, 2 * width)] {
            let what = format!("{batch}x{height}x{width}x{channels} to {rows}x{columns}");
            expect_like_cpu(&what, device, 0.0, |device| {
                let shape = [batch, height, width, channels];
                let count = shape.iter().product();
                let compute = Tensor::from_f32(device, &random_bf16("x", count), shape)?;
                let single = Tensor::from_slice(device, &random("y", count), shape)?;
                Ok(vec![
                    resize_nearest(&compute, rows, columns)?,
                    resize_nearest(&single, rows, columns)?,
                ])
            })?;
        }
    }
    Ok(())
}
