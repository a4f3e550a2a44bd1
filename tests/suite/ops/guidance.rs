use l2p_engine::ops::guidance::guided_euler_step;
use l2p_engine::{DType, Device, Tensor};
use l2p_tests::fixtures::Group;
use l2p_tests::{Outcome, Suite, expect_close, expect_like_cpu, random};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::guidance::cpu_equals_references", cpu_equals_references);
    suite.cpu("ops::guidance::wrong_velocities_are_named", wrong_velocities_are_named);
    suite.cuda("ops::guidance::cuda_equals_cpu", cuda_equals_cpu);
}

fn cpu_equals_references() -> Outcome {
    for case in Group::load("ops").cases("guided_euler") {
        let number = |key| case.config(&[key]).as_f64().expect("the case has this number");
        let (x, shape) = case.input("x");
        let mut x = Tensor::from_slice(&Device::Cpu, &x, shape.as_slice())?;
        let velocity = [case.input("v_pos").0, case.input("v_neg").0].concat();
        let velocity = Tensor::from_slice(&Device::Cpu, &velocity, [2 * shape[0], shape[1], shape[2], shape[3]])?;
        let delta = number("sigma_next") - number("sigma");
        guided_euler_step(&mut x, &velocity, number("cfg") as f32, delta as f32)?;
        case.check("x_next", x.as_slice()?)?;
    }
    // Without guidance there is one pass, and its velocity is followed as it is.
    let (x, v) = (random("x", 30), random("v", 30));
    let expected: Vec<f32> = x.iter().zip(&v).map(|(x, v)| x - 0.25 * v).collect();
    let mut x = Tensor::from_slice(&Device::Cpu, &x, [2, 15])?;
    guided_euler_step(&mut x, &Tensor::from_slice(&Device::Cpu, &v, [2, 15])?, 1.0, -0.25)?;
    expect_close("without guidance", x.as_slice()?, &expected, 1e-6)
}

fn wrong_velocities_are_named() -> Outcome {
    let message = |items: usize, dtype, cfg| -> Result<String, l2p_engine::Error> {
        let mut x = Tensor::zeros(&Device::Cpu, [2, 3], DType::F32)?;
        let velocity = Tensor::zeros(&Device::Cpu, [items, 3], dtype)?;
        let outcome = guided_euler_step(&mut x, &velocity, cfg, -0.1);
        Ok(outcome.unwrap_err().to_string())
    };
    assert_eq!(
        message(2, DType::F32, 2.0)?,
        "guided_euler_step: velocity has shape [2, 3], expected [4, 3]"
    );
    assert_eq!(
        message(4, DType::F32, 1.0)?,
        "guided_euler_step: velocity has shape [4, 3], expected [2, 3]"
    );
    assert_eq!(
        message(2, DType::Bf16, 1.0)?,
        "guided_euler_step: velocity holds bf16, expected f32"
    );
    Ok(())
}

fn cuda_equals_cpu(device: &Device) -> Outcome {
    // Whole vectors, halves that do not start at a multiple of 16 bytes, and more than one block.
    for (batch, elements) in [
        (1, 1),
        (1, 4),
        (2, 15),
        (1, 1023),
        (3, 1024),
        (1, 6 * 10 * 16),
        (2, 4099),
    ] {
        for cfg in [1.0, 2.5] {
            let items = if cfg == 1.0 { batch } else { 2 * batch };
            expect_like_cpu(&format!("{batch}x{elements}, cfg {cfg}"), device, 1e-6, |device| {
                let mut x = Tensor::from_slice(device, &random("x", batch * elements), [batch, elements])?;
                let velocity = Tensor::from_slice(device, &random("v", items * elements), [items, elements])?;
                guided_euler_step(&mut x, &velocity, cfg, -0.125)?;
                Ok(vec![x])
            })?;
        }
    }
    Ok(())
}
