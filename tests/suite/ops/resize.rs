use l2p_engine::ops::resize::resize_nearest;
use l2p_engine::{DType, Device, Tensor};
use l2p_tests::fixtures::Group;
use l2p_tests::{Outcome, Suite, expect_like_cpu, random, random_bf16};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::resize::cpu_equals_torch", cpu_equals_torch);
    suite.cpu(
        "ops::resize::the_last_column_shows_the_last",
        the_last_column_shows_the_last,
    );
    suite.cpu("ops::resize::empty_images_are_refused", empty_images_are_refused);
    suite.cpu("ops::resize::other_types_are_refused", other_types_are_refused);
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

/// So wide that the last index times the ratio of extents is 9 in f32, where 8 is the last column.
fn the_last_column_shows_the_last() -> Outcome {
    const WIDTH: usize = 9_071_678;
    assert_eq!((WIDTH - 1) as f32 * (9.0 / WIDTH as f32), 9.0);
    let x = Tensor::from_slice(
        &Device::Cpu,
        &std::array::from_fn::<f32, 9, _>(|x| x as f32),
        [1, 1, 9, 1],
    )?;
    let y = resize_nearest(&x, 1, WIDTH)?;
    let y = y.as_slice::<f32>()?;
    assert!(y.is_sorted());
    assert_eq!((y[0], y[WIDTH / 2], y[WIDTH - 1]), (0.0, 4.0, 8.0));
    Ok(())
}

fn other_types_are_refused() -> Outcome {
    let x = Tensor::zeros(&Device::Cpu, [1, 2, 4, 8], DType::U8)?;
    let message = resize_nearest(&x, 2, 2).unwrap_err().to_string();
    assert_eq!(message, "resize_nearest: x holds u8, expected f32");
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
