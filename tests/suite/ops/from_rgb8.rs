use l2p_engine::ops::from_rgb8::from_rgb8;
use l2p_engine::ops::to_rgb8::to_rgb8;
use l2p_engine::{DType, Device, Tensor};
use l2p_tests::{Outcome, Suite, expect_like_cpu, random};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::from_rgb8::bytes_go_there_and_back", bytes_go_there_and_back);
    suite.cpu("ops::from_rgb8::other_tensors_are_refused", other_tensors_are_refused);
    suite.cuda("ops::from_rgb8::cuda_equals_cpu", cuda_equals_cpu);
}

fn bytes_go_there_and_back() -> Outcome {
    let bytes: Vec<u8> = (0..=255).cycle().take(256 * 3).collect();
    let picture = from_rgb8(&Tensor::from_slice(&Device::Cpu, &bytes, [1, 16, 16, 3])?)?;
    let values = picture.to_vec::<f32>()?;
    assert_eq!((values[0], values[255]), (-1.0, 1.0));
    for (value, byte) in values.iter().zip(&bytes) {
        let exact = f64::from(*byte) / 127.5 - 1.0;
        assert!((f64::from(*value) - exact).abs() < 1e-7, "{byte}: {value}");
    }
    assert_eq!(to_rgb8(&picture)?.bytes.to_vec::<u8>()?, bytes);
    Ok(())
}

fn other_tensors_are_refused() -> Outcome {
    let picture = Tensor::zeros(&Device::Cpu, [1, 2, 2, 3], DType::F32)?;
    assert_eq!(
        from_rgb8(&picture).unwrap_err().to_string(),
        "from_rgb8: x holds f32, expected u8"
    );
    Ok(())
}

fn cuda_equals_cpu(device: &Device) -> Outcome {
    for shape in [[1, 1, 1, 3], [1, 37, 23, 3], [2, 100, 101, 3]] {
        expect_like_cpu(&format!("{shape:?}"), device, 0.0, |device| {
            let values = random("x", shape.iter().product());
            let bytes: Vec<u8> = values.iter().map(|value| (value * 70.0 + 127.0) as u8).collect();
            Ok(vec![from_rgb8(&Tensor::from_slice(device, &bytes, shape)?)?])
        })?;
    }
    Ok(())
}
