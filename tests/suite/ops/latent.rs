use l2p_engine::ops::latent::denormalize_latent;
use l2p_engine::{DType, Device, Tensor};
use l2p_tests::{BF16_TOLERANCE, Outcome, Suite, expect_like_cpu, random};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::latent::cpu_equals_formula", cpu_equals_formula);
    suite.cuda("ops::latent::cuda_equals_cpu", cuda_equals_cpu);
}

fn cpu_equals_formula() -> Outcome {
    let x = Tensor::from_slice(&Device::Cpu, &[0.0f32, 1.0, -2.0], [3])?;
    let y = denormalize_latent(&x, 0.5, 0.25)?;
    assert_eq!(y.as_slice::<f32>()?, [0.25, 2.25, -3.75]);
    let bytes = Tensor::zeros(&Device::Cpu, [3], DType::U8)?;
    let message = denormalize_latent(&bytes, 1.0, 0.0).unwrap_err().to_string();
    assert_eq!(message, "denormalize_latent: latent holds u8, expected f32");
    Ok(())
}

fn cuda_equals_cpu(device: &Device) -> Outcome {
    for shape in [[1, 1, 1, 4], [2, 9, 7, 16], [1, 64, 64, 16]] {
        expect_like_cpu(&format!("{shape:?}"), device, BF16_TOLERANCE, |device| {
            let x = Tensor::from_slice(device, &random("x", shape.iter().product()), shape)?;
            Ok(vec![denormalize_latent(&x, 0.3611, 0.1159)?])
        })?;
    }
    Ok(())
}
